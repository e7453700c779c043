"""Masked autoencoder: say what the hidden patches look like from the visible ones.

The encoder sees the visible tokens only. A small decoder gets them with a mask token
for each hidden place, all with their positions, and gives the voxels of the hidden
patches. Volumes, movies and volumes in time are cut by the same `Grid`.

Source: VideoMAE (Tong et al. 2022, arXiv:2203.12602; MCG-NJU/VideoMAE). Different on
purpose: tubes run through T in a grid of three more axes, targets may have a noise
floor and a weight by what there is to see, the decoder may divide space and time.
"""

from collections.abc import Callable, Mapping
import dataclasses
import difflib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.backbones import base
from vjepa_jax.backbones.base import Backbone, Features
from vjepa_jax.nn import blocks, divided, placement, positions, tables
from vjepa_jax.nn.attention import INITIALIZERS
from vjepa_jax.objectives.base import Batch, Metrics, ModelState, Params
from vjepa_jax.volumes import masks as masks_lib
from vjepa_jax.volumes.grid import Grid

TARGETS = ("normalized", "videomae", "pixel")
SPACE_TIME = ("joint", "divided")
POSITIONS = ("learned", "sincos", "flat")
# VideoMAE adds it to the standard deviation.
VIDEOMAE_EPS = 1e-6


class Decoder(nn.Module):
  """Visible tokens and mask tokens in, voxels of the hidden patches out.

  Attributes:
    voxels: P, numbers of a patch.
    width: D of the decoder.
    depth: number of blocks.
    heads: attention heads; None: `blocks.default_heads`.
    space_time: "joint", every token sees every other; or "divided", for masks that
      hide the same places of every frame.
    positions: "learned" (a table of places and one of times), "sincos" (of the grid)
      or "flat" (VideoMAE's, of the row of tokens).
    mlp_ratio, attention, attention_chunk, remat, unroll, initializer, eps: see
      `blocks.Stack`.
    norm_eps: of the last norm.
    biases: of the attention's projections, with "joint".
    dtype: compute type.
  """

  voxels: int
  width: int = 384
  depth: int = 4
  heads: int | None = None
  space_time: str = "joint"
  positions: str = "learned"
  mlp_ratio: float = 4.0
  attention: str = "xla"
  attention_chunk: int = 512
  remat: str = "none"
  unroll: int = 1
  eps: float = 1e-6
  norm_eps: float = 1e-6
  biases: str = "qkv"
  initializer: str = "vjepa"
  dtype: str = "float32"

  @nn.compact
  def __call__(
      self,
      context: jax.Array,
      split: masks_lib.Split,
      grid: Grid,
      *,
      train: bool = False,
  ) -> jax.Array:
    """Returns the voxels at the target places, float32 [B, M, P].

    Args:
      context: [B, K, D of the encoder].
      split: who is seen and who is asked for.
      grid: geometry of the tokens.
      train: as everywhere; nothing is drawn.
    """
    dense = lambda width, name, **options: nn.Dense(
        width, dtype=self.dtype, kernel_init=INITIALIZERS[self.initializer],
        promote_dtype=placement.promote, name=name, **options,
    )
    of_seen, of_asked = self._positions(split, grid)
    seen = dense(self.width, "embed", use_bias=False)(context)
    seen = seen + of_seen.astype(seen.dtype)
    token = self.param("mask_token", nn.initializers.normal(0.02), (self.width,))
    asked = (token + of_asked).astype(seen.dtype)
    divides = self.space_time == "divided"
    decode = self._divided if divides else self._joint
    tokens = decode(seen, asked, split, grid, train)
    tokens = blocks.layer_norm("norm", self.norm_eps)(tokens)
    self.sow("intermediates", "normed", tokens)
    return dense(self.voxels, "head")(tokens).astype(jnp.float32)

  def _positions(self, split, grid):
    """The vectors of the places seen and of those asked for, [B, K and M, D]."""
    both = split.context, split.target
    if self.positions == "learned":
      table = tables.SpaceTimeTable(self.width, name="positions")
      if self.space_time == "joint":
        return [table(grid.dims, ids=ids) for ids in both]
      # The ids of the first frame are its places.
      first = (ids[:, : ids.shape[1] // grid.dims[0]] for ids in both)
      return [table(grid.dims, places=places) for places in first]
    if self.positions == "sincos":
      table = positions.sincos_table(grid.dims, self.width)
    else:
      table = positions.flat_sincos(grid.tokens, self.width)
    return [jnp.asarray(table, jnp.float32)[ids] for ids in both]

  def _joint(self, seen, asked, split, grid, train):
    """All tokens among themselves; returns those asked for, [B, M, D]."""
    tokens = jnp.concatenate([seen, asked], axis=1)
    capture = self.is_mutable_collection("intermediates")
    tokens = blocks.Stack(
        **self._stack(), biases=self.biases, name="stack"
    )(tokens, key_valid=split.valid(), train=train, capture=capture)
    if capture:
      tokens, outputs = tokens
      self.sow("intermediates", "blocks", outputs)
    return tokens[:, seen.shape[1] :]

  def _divided(self, seen, asked, split, grid, train):
    """The places of every frame, then what is at a place through time."""
    frames = lambda x: x.reshape(x.shape[0], grid.dims[0], -1, self.width)
    seen, asked = frames(seen), frames(asked)
    tokens = jnp.concatenate([seen, asked], axis=2)  # [B, T, k + m, D]
    (tokens, _), _ = divided.DividedStack(**self._stack(), name="stack")(
        tokens, train=train
    )
    return tokens[:, :, seen.shape[2] :].reshape(len(tokens), -1, self.width)

  def _stack(self):
    return dict(
        width=self.width, depth=self.depth,
        heads=blocks.default_heads(self.width, self.heads), mlp_ratio=self.mlp_ratio,
        attention=self.attention, attention_chunk=self.attention_chunk,
        remat=self.remat, unroll=self.unroll, eps=self.eps, dtype=self.dtype,
        initializer=self.initializer,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class MAE:
  """The objective of a masked autoencoder.

  Attributes:
    backbone: the encoder.
    masks: name -> {kind, context, target, ...}: mask groups (`masks.mask_faults`);
      `context` and `target` are fractions of all tokens and need not fill them, so
      that a part of what is hidden is asked for.
    decoder: attributes of `Decoder`.
    target: what is predicted of a patch: "pixel", its voxels as they are;
      "normalized", less their mean, over sqrt(var + noise_floor^2), so that a patch
      of noise stays small; "videomae", over sqrt(var) + 1e-6. Mean and (unbiased)
      variance are of each patch and channel.
    noise_floor: in units of the volume; about the standard deviation of its noise.
    foreground_std: a patch of a smaller standard deviation weighs less in the loss,
      in proportion; 0: all weigh the same.
    foreground_min: what a patch weighs at least.

  Voxels that the grid adds to a volume (`Grid.padded`) are in no target. A batch may
  hold "volume_context", what the encoder sees in place of "volume".

  Raises:
    ValueError: for unknown names, values out of range, and masks that the backbone
      or the decoder cannot have.
  """

  backbone: Backbone
  masks: Mapping[str, Mapping[str, Any]]
  decoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  target: str = "normalized"
  noise_floor: float = 0.1
  foreground_std: float = 0.0
  foreground_min: float = 0.1

  def __post_init__(self):
    options = {
        f.name: getattr(self, f.name)
        for f in dataclasses.fields(self) if f.name != "backbone"
    }
    faults = objective_faults(**options) + pair_faults(self.backbone, **options)
    if faults:
      raise ValueError("; ".join(faults))

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, ModelState]:
    """Draws encoder and decoder."""
    encoder_key, decoder_key, mask_key = jax.random.split(key, 3)
    batch = {k: v[:1] for k, v in batch.items()}
    volume = batch["volume"]
    encoder = self.backbone.init(encoder_key, volume, spacing=batch.get("spacing"))
    split = self.draw_masks(batch, mask_key)[0]
    context = jnp.zeros((*split.context.shape, self.backbone.width))
    decoder = self._decoder(volume).init(
        decoder_key, context, split, self._grid(volume)
    )
    params = {"encoder": encoder["params"], "decoder": decoder["params"]}
    return params, {"updates": jnp.zeros((), jnp.int32)}

  def loss(
      self,
      params: Params,
      model_state: ModelState,
      batch: Batch,
      key: jax.Array,
      *,
      train: bool,
  ) -> tuple[jax.Array, tuple[ModelState, Metrics]]:
    """Draws the masks of this batch and returns the loss on them."""
    mask_key, drop_key = jax.random.split(key)
    splits = self.draw_masks(batch, mask_key)
    drop_key = jax.random.fold_in(drop_key, batch["_position"][0])
    return self.loss_on(
        params, model_state, batch, splits, train=train, rngs={"drop_path": drop_key}
    )

  def draw_masks(self, batch: Batch, key: jax.Array) -> tuple[masks_lib.Split, ...]:
    """Draws one Split a mask group, each row from its own key."""
    volume = batch["volume"]
    return masks_lib.draw(
        self.masks, volume, self._grid(volume), key, batch["_position"]
    )

  def loss_on(
      self,
      params: Params,
      model_state: ModelState,
      batch: Batch,
      splits: tuple[masks_lib.Split, ...],
      *,
      train: bool,
      rngs: Mapping[str, jax.Array] | None = None,
  ) -> tuple[jax.Array, tuple[ModelState, Metrics]]:
    """Returns the loss on given masks: the mean over mask groups.

    Its metrics are "loss"; "error_over_variance", the unweighted error of the hidden
    patches over the variance of their targets about the volume's mean target (1 for
    the best constant); and "prediction_std" over the tokens of a volume.
    """
    rows = batch["_mask"]
    terms, errors, variances, spreads = [], [], [], []
    for split in splits:
      wanted = self.targets(batch, split)
      found = self.predict(params, batch, split, train=train, rngs=rngs)
      found = found.reshape(wanted.values.shape)
      error = wanted.mean(jnp.square(found - wanted.values))  # [B, M]
      terms.append(_masked_mean(error, split.target_valid, wanted.weight))
      errors.append(_masked_mean(error, split.target_valid))
      variances.append(wanted.variance(split.target_valid))
      spreads.append(found.std(axis=1).mean(axis=(1, 2)))
    mean = lambda values: jnp.sum(sum(values) / len(values) * rows)
    total, weight = mean(terms), jnp.sum(rows)
    metrics = {
        "loss": (total, weight),
        "error_over_variance": (mean(errors), mean(variances)),
        "prediction_std": (mean(spreads), weight),
    }
    return total / jnp.maximum(weight, 1.0), (model_state, metrics)

  def predict(
      self,
      params: Params,
      batch: Batch,
      split: masks_lib.Split,
      *,
      train: bool = False,
      rngs: Mapping[str, jax.Array] | None = None,
  ) -> jax.Array:
    """Returns what the decoder says of the hidden patches, float32 [B, M, P]."""
    volume = batch.get("volume_context", batch["volume"])
    grid = self._grid(volume)
    kept = dict(keep_ids=split.context, keep_valid=split.context_valid)
    if getattr(self.backbone, "rectangular", False):
      # The ids of the first frame are its places.
      each = split.context.shape[1] // grid.dims[0]
      kept = dict(keep_places=split.context[:, :each])
    context = self.backbone.apply(
        {"params": params["encoder"]}, volume, spacing=batch.get("spacing"),
        train=train, rngs=rngs, **kept,
    ).tokens
    return self._decoder(volume).apply(
        {"params": params["decoder"]}, context, split, grid, train=train
    )

  def targets(self, batch: Batch, split: masks_lib.Split) -> "Targets":
    """Returns what the hidden patches of a batch are; no gradient."""
    volume = jax.lax.stop_gradient(batch["volume"])
    volume = placement.constrain(volume, "batch", "tokens", *[None] * 4)
    grid = self._grid(volume)
    patches, ids = grid.patchify(volume), split.target
    if self._by_frame:
      # Within each frame, so that nothing is sent where a mesh splits time.
      frames = (len(patches), grid.dims[0])
      patches = patches.reshape(*frames, grid.places, -1)
      ids = ids.reshape(*frames, -1) % grid.places
    patches = jnp.take_along_axis(patches, ids[..., None], axis=-2)
    patches = patches.astype(jnp.float32)
    patches = patches.reshape(*split.target.shape, -1, volume.shape[-1])
    valid = grid.valid()
    real = None if valid.all() else jnp.asarray(valid, jnp.float32)[split.target]
    return make_targets(
        patches, real, self.target, noise_floor=self.noise_floor,
        foreground_std=self.foreground_std, foreground_min=self.foreground_min,
    )

  def after_update(
      self, params: Params, model_state: ModelState, step: jax.Array
  ) -> ModelState:
    """Counts the updates."""
    return {"updates": model_state["updates"] + 1}

  def scalars(self, step: jax.Array) -> dict[str, jax.Array]:
    """Returns nothing: there is no schedule."""
    return {}

  def functions(self) -> dict[str, Callable[..., Any]]:
    """Returns what evaluators may ask for.

    features(params, model_state, batch): Features of the whole volume; masks(params,
      model_state, batch): one Split a group, drawn from a fixed key;
      reconstruct(params, model_state, batch): see `reconstruct`; attention(params,
      model_state, batch): where the encoder looks, see `backbones.base.attention`.
    """
    return {
        "features": lambda params, state, batch: self._encode(params, batch),
        "masks": lambda params, state, batch: self.draw_masks(batch, jax.random.key(0)),
        "reconstruct": lambda params, state, batch: self.reconstruct(params, batch),
        "attention": lambda params, state, batch: base.attention(
            self.backbone, params["encoder"], batch["volume"],
            spacing=batch.get("spacing"),
        ),
    }

  def reconstruct(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """Fills in what the first mask group asks for, drawn from a fixed key.

    Normalised predictions get the true mean and spread of their patch back.

    Returns:
      "volume", what is to be found; "visible", what the encoder saw, else 0;
      "reconstruction", the prediction where it was asked for, else the volume; all
      [B, T, Z, Y, X, C]; "hidden", bool [B, T, Z, Y, X, 1], where it was asked for.
    """
    volume = batch["volume"]
    grid, channels = self._grid(volume), volume.shape[-1]
    split = self.draw_masks(batch, jax.random.key(0))[0]
    wanted = self.targets(batch, split)
    found = self.predict(params, batch, split).reshape(wanted.values.shape)
    found = found * wanted.scale + wanted.offset
    patches = grid.patchify(volume).astype(jnp.float32)
    put = jax.vmap(lambda all_, ids, new: all_.at[ids].set(new))
    filled = put(patches, split.target, found.reshape(*found.shape[:2], -1))
    marks = jnp.zeros((*patches.shape[:2], 1))
    ones = lambda ids: jnp.ones((*ids.shape, 1))
    spread = lambda mark: jnp.broadcast_to(mark, (*mark.shape[:2], _size(grid)))
    seen = put(marks, split.context, ones(split.context))
    hidden = put(marks, split.target, ones(split.target))
    return {
        "volume": volume,
        "visible": grid.unpatchify(patches * seen, channels),
        "reconstruction": grid.unpatchify(filled, channels),
        "hidden": grid.unpatchify(spread(hidden), 1) > 0,
    }

  @property
  def _by_frame(self) -> bool:
    """Whether every mask shows the same places of every frame."""
    return all(masks_lib.keeps_places(group) for group in self.masks.values())

  def _encode(self, params: Params, batch: Batch) -> Features:
    return self.backbone.apply(
        {"params": params["encoder"]}, batch["volume"], spacing=batch.get("spacing")
    )

  def _grid(self, volume: jax.Array) -> Grid:
    return self.backbone.grid_of(volume.shape[1:5])

  def _decoder(self, volume: jax.Array) -> Decoder:
    return Decoder(_size(self._grid(volume)) * volume.shape[-1], **self.decoder)


Objective = MAE


@dataclasses.dataclass(frozen=True)
class Targets:
  """What hidden patches are.

  Attributes:
    values: float32 [B, M, V, C], what is to be predicted; V voxels a patch.
    offset, scale: float32 [B, M, 1, C]; the voxels are values * scale + offset.
    real: float32 [B, M, V], 0 where the grid goes beyond the volume; None: nowhere.
    weight: float32 [B, M], of each patch in the loss; None: all alike.
  """

  values: jax.Array
  offset: jax.Array
  scale: jax.Array
  real: jax.Array | None
  weight: jax.Array | None

  def mean(self, values: jax.Array) -> jax.Array:
    """Means [B, M, V, C] over the real voxels and channels, [B, M]."""
    if self.real is None:
      return values.mean(axis=(2, 3))
    return (values.mean(axis=3) * self.real).sum(axis=2) / self.real.sum(axis=2)

  def variance(self, valid: jax.Array | None) -> jax.Array:
    """Variance of the values of a row about their mean by channel, [B]."""
    real = jnp.ones(self.values.shape[:3]) if self.real is None else self.real
    if valid is not None:
      real = real * valid[..., None]
    total = real.sum(axis=(1, 2))[:, None, None, None]
    mean = (self.values * real[..., None]).sum(axis=(1, 2), keepdims=True) / total
    return _masked_mean(self.mean(jnp.square(self.values - mean)), valid)


def make_targets(
    patches: jax.Array,
    real: jax.Array | None,
    kind: str,
    *,
    noise_floor: float = 0.1,
    foreground_std: float = 0.0,
    foreground_min: float = 0.1,
) -> Targets:
  """Turns patches into what is predicted of them; see `MAE`.

  Args:
    patches: float32 [B, M, V, C].
    real: float32 [B, M, V] or None, see `Targets`.
    kind: a name in TARGETS.
    noise_floor, foreground_std, foreground_min: see `MAE`.
  """
  ones = jnp.ones(patches.shape[:3]) if real is None else real
  count = ones.sum(axis=2)[:, :, None, None]
  mean = (patches * ones[..., None]).sum(axis=2, keepdims=True) / count
  square = jnp.square(patches - mean) * ones[..., None]
  variance = square.sum(axis=2, keepdims=True) / jnp.maximum(count - 1, 1)
  if kind == "normalized":
    offset, scale = mean, jnp.sqrt(variance + noise_floor**2)
  elif kind == "videomae":
    offset, scale = mean, jnp.sqrt(variance) + VIDEOMAE_EPS
  else:
    offset, scale = jnp.zeros_like(mean), jnp.ones_like(mean)
  weight = None
  if foreground_std:
    spread = jnp.sqrt(variance.mean(axis=(2, 3)))
    weight = jnp.clip(spread / foreground_std, foreground_min, 1.0)
  return Targets((patches - offset) / scale, offset, scale, real, weight)


def objective_faults(
    *,
    masks: Mapping[str, Mapping[str, Any]],
    decoder: Mapping[str, Any] | None = None,
    target: str = "normalized",
    noise_floor: float = 0.1,
    foreground_std: float = 0.0,
    foreground_min: float = 0.1,
) -> list[str]:
  """Says what is wrong with the options of the objective, all at once."""
  faults = []
  if not masks:
    faults.append("objective.masks: names no mask group; nothing would be predicted")
  if target not in TARGETS:
    faults.append(f"objective.target: {target!r} is none of {', '.join(TARGETS)}")
  if target == "normalized" and not noise_floor > 0:
    faults.append(
        f"objective.noise_floor: {noise_floor} must be above 0, or empty patches "
        "divide by 0; give the standard deviation of the volume's noise"
    )
  if foreground_std < 0:
    faults.append(f"objective.foreground_std: {foreground_std} must not be negative")
  if not 0 < foreground_min <= 1:
    faults.append(f"objective.foreground_min: {foreground_min} is not in (0, 1]")
  return faults + [f"objective.decoder: {f}" for f in _decoder_faults(decoder or {})]


def pair_faults(
    backbone: Backbone,
    *,
    masks: Mapping[str, Mapping[str, Any]],
    decoder: Mapping[str, Any] | None = None,
    **_: Any,
) -> list[str]:
  """Says which masks the backbone or the decoder cannot have, and why.

  Args:
    backbone: the encoder.
    masks, decoder: of the objective.
  """
  faults = []
  stride = getattr(backbone, "stride", None)
  if stride is not None and tuple(stride) != tuple(backbone.patch):
    faults.append(
        f"model.stride: {tuple(stride)} with patch {tuple(backbone.patch)}: patches "
        "overlap, so that a hidden one is seen in its neighbours; leave stride out"
    )
  for place, remedy, divides in (
      ("model", "model.space_time=joint", getattr(backbone, "rectangular", False)),
      (
          "objective.decoder", "objective.decoder.space_time=joint",
          (decoder or {}).get("space_time") == "divided",
      ),
  ):
    faults += [
        f"objective.masks.{name}: kind {group.get('kind')!r} with a divided {place}: "
        "attention over time takes what is at one place in every frame, and other "
        "masks show other places; use kind='tube' with through='T', or " + remedy
        for name, group in masks.items()
        if divides and not masks_lib.keeps_places(group)
    ]
  return faults


def _decoder_faults(options: Mapping[str, Any]) -> list[str]:
  """Says what is wrong with the options of `Decoder`."""
  default = {
      f.name: f.default for f in dataclasses.fields(Decoder)
      if f.name not in ("voxels", "parent", "name")
  }
  faults = [
      f"{key} is no option of the decoder; closest: "
      + ", ".join(difflib.get_close_matches(key, default, 3, 0.0))
      for key in options if key not in default
  ]
  if options.get("space_time", "joint") not in SPACE_TIME:
    faults.append(
        f"space_time {options['space_time']!r} is none of {', '.join(SPACE_TIME)}"
    )
  return faults + blocks.stack_faults({**default, **options}, positions=POSITIONS)


def _size(grid: Grid) -> int:
  """Voxels of a patch."""
  return int(np.prod(grid.patch))


def _masked_mean(
    values: jax.Array, valid: jax.Array | None, weight: jax.Array | None = None
) -> jax.Array:
  """Means [B, M] over the valid of its M tokens, by their weights, [B]."""
  weight = jnp.ones_like(values) if weight is None else weight
  if valid is not None:
    weight = weight * valid
  return (values * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1e-9)
