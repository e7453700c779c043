"""AdamW whose rates are functions of the global step, decay chosen by name."""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vjepa_jax.train import schedules

Params = Any
# The first rule whose pattern is found in "path/of/the/parameter" decides. Blocks
# scanned over depth give biases and norm scales a leading axis, so that the number
# of axes says nothing. Tokens decay as in V-JEPA 2, which spares only 1-D tensors.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"(^|/)(bias|scale)$", False),
    (r"(^|/)(kernel|embedding)$", True),
    (r"(^|/)(mask_tokens?|cls|class_token|query|positions?|pos_embed\w*)$", True),
    (r"(^|/)(cls_position|positions/(space|time))$", True),
)


# Of an encoder, what comes before its blocks; what is neither comes after them.
_ENCODER = re.compile(r"(^|/)encoder/")
_BLOCKS = re.compile(r"(^|/)blocks/")
_BEFORE = re.compile(r"(^|/)(patch_embed|positions|pos_embed\w*|cls|cls_position)(/|$)")


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Turns gradients into updates; built by `make_optimizer`.

  Attributes:
    learning_rate: schedule, also what the log shows.
    weight_decay: schedule, also what the log shows.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    clip_norm: largest global gradient norm; None never clips.
    decay: (regex, whether to decay) tried before DECAY_RULES.
    frozen: regexes of parameters that never move and have no moments.
    layer_decay: see `layer_scales`.
    freeze: regexes of parameters that do not move before `freeze_steps`. Their
      moments follow their gradients all the while, so that the first step is no leap.
    freeze_steps: the first step that moves them.
  """

  learning_rate: schedules.Schedule
  weight_decay: schedules.Schedule
  b1: float
  b2: float
  eps: float
  clip_norm: float | None
  decay: tuple[tuple[str, bool], ...]
  frozen: tuple[str, ...]
  layer_decay: float = 1.0
  freeze: tuple[str, ...] = ()
  freeze_steps: int = 0

  def init(self, params: Params) -> optax.OptState:
    """Returns zero moments for every parameter that is not frozen.

    Raises:
      ValueError: a parameter is covered by no decay rule, a `frozen` or `freeze`
        pattern is found in no name, or layers decay and there is no encoder.
    """
    decay_mask(params, self.decay)
    if self.layer_decay != 1.0:
      layer_scales(params, self.layer_decay)
    trainable_mask(params, self.freeze)
    return self._adam(params).init(params)

  def update(
      self,
      grads: Params,
      opt_state: optax.OptState,
      params: Params,
      *,
      step: jax.Array,
  ) -> tuple[Params, optax.OptState, dict[str, jax.Array]]:
    """Computes what to add to the parameters.

    Args:
      grads: same tree as `params`, float32.
      opt_state: of `init` or the last `update`.
      params: before the update.
      step: int32 [], the GLOBAL step from 0; schedules read it, so that a step
        skipped for a non-finite gradient does not shift them.

    Returns:
      (updates, opt_state, {"grad_norm": before clipping, "clipped": 0. or 1.}).
    """
    trainable = trainable_mask(params, self.frozen)
    grads = jax.tree.map(lambda g, t: g if t else jnp.zeros_like(g), grads, trainable)
    norm, clipped, grads = clip(grads, self.clip_norm)
    direction, opt_state = self._adam(params).update(grads, opt_state, params)
    rate, decay = self.learning_rate(step), self.weight_decay(step)
    updates = jax.tree.map(
        lambda u, p, decayed, t: -rate * (u + decay * p if decayed else u)
        if t else jnp.zeros_like(p),
        direction, params, decay_mask(params, self.decay), trainable,
    )
    if self.layer_decay != 1.0:
      scales = layer_scales(params, self.layer_decay)
      updates = jax.tree.map(lambda u, scale: u * scale, updates, scales)
    if self.freeze and self.freeze_steps:
      thawed = step >= self.freeze_steps
      updates = jax.tree.map(
          lambda u, moves: u if moves else jnp.where(thawed, u, 0.0),
          updates, trainable_mask(params, self.freeze),
      )
    return updates, opt_state, {"grad_norm": norm, "clipped": clipped}

  def scalars(self, step: schedules.Step) -> dict[str, Any]:
    """Returns the learning rate and weight decay applied at `step`."""
    return {"lr": self.learning_rate(step), "weight_decay": self.weight_decay(step)}

  def _adam(self, params: Params) -> optax.GradientTransformation:
    return optax.masked(
        optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps),
        trainable_mask(params, self.frozen),
    )


def make_optimizer(
    *,
    learning_rate: schedules.Schedule | float,
    weight_decay: schedules.Schedule | float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip_norm: float | None = None,
    decay: Sequence[tuple[str, bool]] = (),
    frozen: Sequence[str] = (),
    layer_decay: float = 1.0,
    freeze: Sequence[str] = (),
    freeze_steps: int = 0,
) -> Optimizer:
  """Builds AdamW with decoupled weight decay, p <- p - lr (m / (sqrt(v) + eps) + wd p).

  Args:
    learning_rate: schedule of the global step, or a constant.
    weight_decay: schedule of the global step, or a constant.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: outside the root, as in torch.
    clip_norm: largest global gradient norm; None never clips.
    decay: (regex, whether to decay), tried before DECAY_RULES.
    frozen: regexes of parameters that never move.
    layer_decay, freeze, freeze_steps: see `Optimizer`.

  Raises:
    ValueError: clip_norm is not positive, or layer_decay not in (0, 1].

  Source: Loshchilov and Hutter 2019, algorithm 2; torch.optim.AdamW.
  """
  if clip_norm is not None and not clip_norm > 0:
    raise ValueError(f"optimizer: clip_norm {clip_norm} must be positive, or None")
  if not 0 < layer_decay <= 1:
    raise ValueError(f"optimizer: layer_decay {layer_decay} is not in (0, 1]")
  return Optimizer(
      learning_rate=_as_schedule(learning_rate),
      weight_decay=_as_schedule(weight_decay),
      b1=b1, b2=b2, eps=eps, clip_norm=clip_norm,
      decay=tuple((str(pattern), bool(decayed)) for pattern, decayed in decay),
      frozen=tuple(frozen), layer_decay=layer_decay, freeze=tuple(freeze),
      freeze_steps=freeze_steps,
  )


def clip(
    grads: Params, clip_norm: float | None
) -> tuple[jax.Array, jax.Array, Params]:
  """Scales gradients down to a global norm.

  Args:
    grads: tree of arrays.
    clip_norm: largest norm; None leaves the gradients as they are.

  Returns:
    (norm before, 1. where it was clipped else 0., gradients).
  """
  norm = optax.global_norm(grads)
  if clip_norm is None:
    return norm, jnp.zeros(()), grads
  scaled, _ = optax.clip_by_global_norm(clip_norm).update(grads, optax.EmptyState())
  return norm, (norm > clip_norm).astype(jnp.float32), scaled


def decay_mask(params: Params, rules: Sequence[tuple[str, bool]] = ()) -> Params:
  """Says which parameters decay: a tree of bools like `params`.

  Args:
    params: nested mapping of arrays.
    rules: (regex, whether to decay), tried before DECAY_RULES; first match wins.

  Raises:
    ValueError: parameters that no rule covers, all listed.
  """
  rules = (*rules, *DECAY_RULES)
  named = named_leaves(params)
  chosen = {
      name: next((decay for rule, decay in rules if re.search(rule, name)), None)
      for name in named
  }
  uncovered = [name for name, decay in chosen.items() if decay is None]
  if uncovered:
    raise ValueError(
        f"optimizer: no decay rule covers the parameters {uncovered}; add "
        "(regex, True or False) to `decay`"
    )
  return jax.tree.unflatten(jax.tree.structure(params), list(chosen.values()))


def trainable_mask(params: Params, frozen: Sequence[str]) -> Params:
  """Says which parameters move: a tree of bools like `params`.

  Raises:
    ValueError: a pattern of `frozen` is found in no name.
  """
  names = list(named_leaves(params))
  for pattern in frozen:
    if not any(re.search(pattern, name) for name in names):
      close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
      raise ValueError(
          f"optimizer: frozen pattern {pattern!r} is found in no parameter; the "
          f"closest names are {close}"
      )
  moves = [not any(re.search(pattern, name) for pattern in frozen) for name in names]
  return jax.tree.unflatten(jax.tree.structure(params), moves)


def layer_scales(params: Params, decay: float) -> Params:
  """Says by how much less the layers of an encoder learn than what follows it.

  Of L blocks, what comes before them (patch embedding, positions, class token) learns
  at decay^(L + 1) of the rate, block i, from 0, at decay^(L - i), all else at the
  rate itself.

  Args:
    params: nested mapping of arrays; an encoder's lie below "encoder", its blocks,
      stacked along their first axis, below "blocks".
    decay: 1 leaves all alike.

  Returns:
    A tree like `params` of arrays that can be multiplied with its leaves.

  Raises:
    ValueError: decay is not 1 and there are no blocks of an encoder.

  Source: BEiT (Bao et al. 2021, arXiv:2106.08254), as VideoMAE fine-tunes.
  """
  named = named_leaves(params)
  depths = {
      leaf.shape[0] for name, leaf in named.items()
      if _ENCODER.search(name) and _BLOCKS.search(name)
  }
  if decay != 1.0 and len(depths) != 1:
    raise ValueError(
        f"optimizer: layer_decay {decay} needs one stack of blocks below "
        f"\"encoder\", there are {len(depths)}; leave it out"
    )
  depth = max(depths, default=0)

  def scale(name: str, leaf: Any) -> jax.Array:
    if not _ENCODER.search(name):
      return jnp.ones(())
    if _BLOCKS.search(name):
      by_block = decay ** (depth - jnp.arange(depth, dtype=jnp.float32))
      return by_block.reshape(-1, *[1] * (leaf.ndim - 1))
    return jnp.asarray(decay ** (depth + 1.0) if _BEFORE.search(name) else 1.0)

  return jax.tree.unflatten(
      jax.tree.structure(params), [scale(name, leaf) for name, leaf in named.items()]
  )


def named_leaves(tree: Any) -> Mapping[str, Any]:
  """Returns {"path/of/the/leaf": leaf} in the order of the tree's leaves."""
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
      jax.tree_util.keystr(path, simple=True, separator="/"): leaf
      for path, leaf in paths
  }


def _as_schedule(value: schedules.Schedule | float) -> schedules.Schedule:
  return value if callable(value) else schedules.constant(float(value))
