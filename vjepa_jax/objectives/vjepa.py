"""V-JEPA 2: predict the features of hidden places from the visible ones.

A context encoder sees the visible tokens only; an exponential moving average of
it, the target encoder, sees the whole volume; a predictor says, from the
context, what the target encoder finds at each hidden place.

Source: V-JEPA 2 (Assran et al. 2025, sec. 2); reference facebookresearch/vjepa2,
app/vjepa/train.py. Different on purpose: masks have fixed counts filled at
random (the reference cuts every sample to the batch's shortest prefix), block
sizes are drawn per sample, the predictor is not sorted by place (attention with
positions from ids does not depend on order), one mask token a mask group.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import difflib
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.backbones.base import Backbone, Features
from vjepa_jax.nn import blocks, placement, positions
from vjepa_jax.nn.attention import INITIALIZERS
from vjepa_jax.objectives.base import Batch, Metrics, ModelState, Params
from vjepa_jax.volumes import masks as masks_lib
from vjepa_jax.volumes.grid import Grid

TARGET_NORMS = ("layer_norm", "l2", "none")
LOSSES = ("l1", "l2", "smooth_l1", "cosine")
PREDICTORS = ("transformer", "mlp")
NORMS = ("batch", "layer", "none")
# The reference normalises targets with torch's default, not with its models' 1e-6.
TARGET_EPS = 1e-5


class TransformerPredictor(nn.Module):
  """Context tokens and mask tokens in, features at the target places out.

  Attributes:
    features: width of the encoder, D.
    groups: number of mask groups, each with its own mask token.
    width: the predictor's own width.
    depth: number of blocks.
    heads: attention heads; None: 128 wide where the width divides by 128, else
      12 (the reference's number).
    positions: "rope" or "sincos".
    rope_*: see `nn.positions.rope`; as in the backbone.
    mlp_ratio, attention, attention_chunk, remat, unroll, initializer: see
      `nn.blocks.Stack`.
    dtype: compute type.

  Source: facebookresearch/vjepa2, src/models/predictor.py. Non-square grids have
  their true places here, which upstream's predictor gets wrong.
  """

  features: int
  groups: int = 1
  width: int = 384
  depth: int = 12
  heads: int | None = None
  mlp_ratio: float = 4.0
  positions: str = "rope"
  rope_layout: str = "rotation"
  rope_base: float = 10000.0
  rope_units: str = "index"
  rope_reference: tuple[float, float, float, float] | None = None
  attention: str = "xla"
  attention_chunk: int = 512
  remat: str = "none"
  unroll: int = 1
  initializer: str = "vjepa"
  dtype: str = "float32"

  def setup(self):
    draw = INITIALIZERS[self.initializer]
    dense = lambda width: nn.Dense(
        width, dtype=self.dtype, kernel_init=draw, promote_dtype=placement.promote
    )
    self.embed = dense(self.width)
    # The reference starts at zero, where LayerNorm's gradient is 1 / sqrt(eps) = 1000.
    self.mask_tokens = self.param(
        "mask_tokens", nn.initializers.normal(0.02), (self.groups, self.width)
    )
    self.stack = blocks.Stack(
        width=self.width, depth=self.depth, heads=self._heads(),
        mlp_ratio=self.mlp_ratio, attention=self.attention,
        attention_chunk=self.attention_chunk, remat=self.remat, unroll=self.unroll,
        initializer=self.initializer, dtype=self.dtype,
    )
    self.norm = blocks.layer_norm()
    self.proj = dense(self.features)

  def __call__(
      self,
      context: jax.Array,
      split: masks_lib.Split,
      grid: Grid,
      *,
      group: int = 0,
      spacing: jax.Array | None = None,
      train: bool = False,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns predictions at the target places [B, M, D] and the context's [B, K, D]."""
    tokens, ids = self._assemble(context, split, group)
    tokens = self._transform(
        tokens, ids, split.valid(), grid, spacing, train
    )
    kept = context.shape[1]
    return tokens[:, kept:], tokens[:, :kept]

  def together(
      self,
      contexts: Sequence[jax.Array],
      splits: Sequence[masks_lib.Split],
      grid: Grid,
      *,
      spacing: jax.Array | None = None,
      train: bool = False,
  ) -> list[tuple[jax.Array, jax.Array]]:
    """Returns what calls with group 0, 1, ... return, as rows of one pass.

    All groups must have the same K + M; one pass is compiled in place of several.
    """
    many = len(splits)
    parts = [self._assemble(c, s, g) for g, (c, s) in enumerate(zip(contexts, splits))]
    # The groups of a row lie side by side, so that rows stay on their devices.
    join = lambda arrays: jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])
    tokens, ids = (join(arrays) for arrays in zip(*parts))
    valid = [split.valid() for split in splits]
    if any(v is not None for v in valid):
      whole = jnp.ones(parts[0][1].shape, bool)
      valid = join([whole if v is None else v for v in valid])
    else:
      valid = None
    spacing = None if spacing is None else jnp.repeat(spacing, many, axis=0)
    tokens = self._transform(tokens, ids, valid, grid, spacing, train)
    tokens = tokens.reshape(-1, many, *tokens.shape[1:])
    kept = [context.shape[1] for context in contexts]
    return [(tokens[:, g, k:], tokens[:, g, :k]) for g, k in enumerate(kept)]

  def _heads(self) -> int:
    return blocks.default_heads(self.width, self.heads, otherwise=12)

  def _assemble(self, context, split, group):
    """Embeds a group's context and puts mask tokens behind: [B, K+M, width], ids."""
    tokens = self.embed(context)
    hidden = jnp.broadcast_to(
        self.mask_tokens[group].astype(tokens.dtype), (*split.target.shape, self.width)
    )
    ids = jnp.concatenate([split.context, split.target], axis=1)
    return jnp.concatenate([tokens, hidden], axis=1), ids

  def _transform(self, tokens, ids, valid, grid, spacing, train):
    rope = None
    if self.positions == "sincos":
      table = positions.sincos_table(grid.dims, self.width)
      tokens = tokens + jnp.asarray(table, tokens.dtype)[ids]
    else:
      rope = positions.rope(
          grid, ids, self.width // self._heads(), layout=self.rope_layout,
          base=self.rope_base, units=self.rope_units,
          reference=self.rope_reference, spacing=spacing,
      )
    tokens = self.stack(tokens, rope=rope, key_valid=valid, train=train)
    return self.proj(self.norm(tokens))


class MLPPredictor(nn.Module):
  """A two-layer MLP at each hidden place, over the mean of the visible tokens.

  The simplest predictor that can work: what it knows of a place is the place's
  learned position and the mean of the context.

  Attributes:
    features: width of the encoder, D.
    width: hidden width; None: D.
    norm: "batch", "layer" or "none", after the first layer. Batch statistics are
      over all rows of the global (micro-)batch.
  """

  features: int
  width: int | None = None
  norm: str = "batch"
  initializer: str = "vjepa"
  dtype: str = "float32"

  @nn.compact
  def __call__(
      self,
      context: jax.Array,
      split: masks_lib.Split,
      grid: Grid,
      *,
      group: int = 0,
      spacing: jax.Array | None = None,
      train: bool = False,
  ) -> tuple[jax.Array, None]:
    """Returns predictions at the target places [B, M, D]."""
    del group, spacing
    init = INITIALIZERS[self.initializer]
    places = self.param("positions", init, (grid.tokens, self.features))
    known = _masked_mean(context, split.context_valid)  # [B, D]
    tokens = known[:, None] + places[split.target].astype(known.dtype)
    tokens = nn.Dense(
        self.width or self.features, dtype=self.dtype, kernel_init=init, name="fc1",
        promote_dtype=placement.promote,
    )(tokens)
    if self.norm == "batch":
      tokens = nn.BatchNorm(
          use_running_average=not train, momentum=0.9, name="norm"
      )(tokens, mask=_token_mask(split))
    elif self.norm == "layer":
      tokens = blocks.layer_norm(name="norm")(tokens)
    tokens = nn.gelu(tokens, approximate=False)
    tokens = nn.Dense(
        self.features, dtype=self.dtype, kernel_init=init, name="fc2",
        promote_dtype=placement.promote,
    )(tokens)
    return tokens, None


def build_predictor(
    *, kind: str = "transformer", features: int, groups: int, **options: Any
) -> nn.Module:
  """Builds the predictor named by `kind` from its own options.

  Raises:
    ValueError: for an unknown kind.
  """
  if kind == "transformer":
    return TransformerPredictor(features=features, groups=groups, **options)
  if kind == "mlp":
    return MLPPredictor(features=features, **options)
  raise ValueError(f"objective.predictor.kind: {kind!r} is none of {PREDICTORS}")


@dataclasses.dataclass(frozen=True, eq=False)
class VJEPA:
  """The objective of V-JEPA 2.

  Attributes:
    backbone: the encoder; context and target encoder share its architecture.
    masks: name -> {kind, context, target, ...}: mask groups; `context` and
      `target` are fractions of all tokens.
    predictor: {kind: "transformer" | "mlp", ...} and the predictor's attributes.
    target_norm: what is done to each target vector: "layer_norm" (no affine),
      "l2", "none".
    loss_kind: "l1", "l2" (half the square), "smooth_l1" (mean over D), or "cosine"
      (2 - 2 cos, summed over D, so that it does not shrink with width).
    momentum_start, momentum_end: EMA momentum at step 0 and at `momentum_steps`.
    momentum_schedule: "linear" or "cosine" in between.
    context_weight: weight of predicting the visible tokens too (V-JEPA 2.1),
      reached linearly over `context_warmup_steps`; 0 turns it off.
    variance_weight: weight of mean(relu(1 - std over tokens)) of the predictions
      (V-JEPA 1); 0 turns it off.

  Raises:
    ValueError: for unknown names and values out of range.
  """

  backbone: Backbone
  masks: Mapping[str, Mapping[str, Any]]
  predictor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  target_norm: str = "layer_norm"
  loss_kind: str = "l1"
  momentum_start: float = 0.99925
  momentum_end: float = 0.99925
  momentum_steps: int = 1
  momentum_schedule: str = "linear"
  context_weight: float = 0.0
  context_warmup_steps: int = 0
  variance_weight: float = 0.0

  def __post_init__(self):
    faults = objective_faults(**{
        f.name: getattr(self, f.name)
        for f in dataclasses.fields(self) if f.name != "backbone"
    })
    if faults:
      raise ValueError("; ".join(faults))
    object.__setattr__(
        self, "_predictor",
        build_predictor(
            features=self.backbone.width, groups=len(self.masks), **self.predictor
        ),
    )

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, ModelState]:
    """Draws encoder and predictor; the target starts as the encoder's copy."""
    encoder_key, predictor_key, mask_key = jax.random.split(key, 3)
    batch = {k: v[:1] for k, v in batch.items()}
    volume, spacing = batch["volume"], batch.get("spacing")
    encoder = self.backbone.init(encoder_key, volume, spacing=spacing)["params"]
    split = self.draw_masks(batch, mask_key)[0]
    context = jnp.zeros((*split.context.shape, self.backbone.width))
    predictor = self._predictor.init(
        predictor_key, context, split, self._grid(volume), spacing=spacing
    )
    model_state = {
        "target": jax.tree.map(jnp.copy, encoder),
        "updates": jnp.zeros((), jnp.int32),
    }
    if "batch_stats" in predictor:
      model_state["batch_stats"] = predictor["batch_stats"]
    return {"encoder": encoder, "predictor": predictor["params"]}, model_state

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
    """Returns the loss on given masks: the mean over mask groups."""
    rows = batch["_mask"]
    targets = self.targets(model_state, batch)
    terms, spreads, metrics = [], [], {}
    predictions, model_state = self._predict(
        params, model_state, batch, splits, train, rngs
    )
    for split, (prediction, seen) in zip(splits, predictions):
      wanted = _take(targets, split.target)
      row_loss = _masked_mean(
          token_loss(prediction, wanted, self.loss_kind, self.target_norm),
          split.target_valid,
      )
      if self.context_weight and seen is not None:
        row_loss += self._context_ramp(model_state) * _masked_mean(
            token_loss(
                seen, _take(targets, split.context), self.loss_kind, self.target_norm
            ),
            split.context_valid,
        )
      terms.append(row_loss)
      spreads.append(_spread(prediction, split.target_valid))
      agreement = _masked_mean(_cosine(prediction, wanted), split.target_valid)
      metrics["cosine"] = _joined(metrics.get("cosine"), agreement, rows)
    row_loss = sum(terms) / len(terms)  # [B]
    if self.variance_weight:
      spread = sum(spreads) / len(spreads)  # [B, D]
      row_loss += self.variance_weight * jax.nn.relu(1.0 - spread).mean(axis=-1)
    total, weight = jnp.sum(row_loss * rows), jnp.sum(rows)
    metrics["loss"] = (total, weight)
    metrics["prediction_std"] = (
        jnp.sum(sum(spreads).mean(axis=-1) / len(spreads) * rows), weight
    )
    return total / jnp.maximum(weight, 1.0), (model_state, metrics)

  def targets(self, model_state: ModelState, batch: Batch) -> jax.Array:
    """Returns the normalised target of every token [B, N, D]; no gradient."""
    features = self.backbone.apply(
        {"params": model_state["target"]}, batch["volume"],
        spacing=batch.get("spacing"),
    )
    return jax.lax.stop_gradient(normalize_target(features.tokens, self.target_norm))

  def after_update(
      self, params: Params, model_state: ModelState, step: jax.Array
  ) -> ModelState:
    """Moves the target encoder: theta <- m theta + (1 - m) encoder."""
    m = self.momentum(step)
    target = jax.tree.map(
        lambda t, o: m * t + (1.0 - m) * o, model_state["target"], params["encoder"]
    )
    return {**model_state, "target": target, "updates": model_state["updates"] + 1}

  def momentum(self, step: jax.Array) -> jax.Array:
    """EMA momentum of the update that ends optimiser step `step` (from 0)."""
    progress = jnp.clip(jnp.asarray(step, jnp.float32) / self.momentum_steps, 0.0, 1.0)
    if self.momentum_schedule == "cosine":
      progress = 0.5 * (1.0 - jnp.cos(jnp.pi * progress))
    return self.momentum_start + (self.momentum_end - self.momentum_start) * progress

  def scalars(self, step: jax.Array) -> dict[str, jax.Array]:
    """Returns the EMA momentum at `step`, to be logged."""
    return {"momentum": self.momentum(step)}

  def functions(self) -> dict[str, Callable[..., Any]]:
    """Returns what evaluators may ask for.

    features(params, model_state, batch): Features of the target encoder on the
      whole volume; context_features: of the online encoder; masks(params,
      model_state, batch): one Split a group, drawn from a fixed key;
      target_offset(params, model_state): |target - online| / |online|.
    """
    return {
        "features": lambda params, state, batch: self._encode(state["target"], batch),
        "context_features": lambda params, state, batch: self._encode(
            params["encoder"], batch
        ),
        "masks": lambda params, state, batch: self.draw_masks(batch, jax.random.key(0)),
        "target_offset": lambda params, state: _relative_distance(
            state["target"], params["encoder"]
        ),
    }

  def _encode(self, params: Params, batch: Batch) -> Features:
    return self.backbone.apply(
        {"params": params}, batch["volume"], spacing=batch.get("spacing")
    )

  def _grid(self, volume: jax.Array) -> Grid:
    return Grid(tuple(volume.shape[1:5]), tuple(self.backbone.patch))

  def _predict(self, params, model_state, batch, splits, train, rngs):
    """Encodes the visible tokens and predicts the hidden ones, group by group.

    Returns [(prediction [B, M, D], the context's [B, K, D] or None)] and the state.
    """
    contexts = [self._context(params, batch, s, train, rngs) for s in splits]
    options = dict(
        grid=self._grid(batch["volume"]), spacing=batch.get("spacing"), train=train
    )
    variables = {"params": params["predictor"]}
    totals = {s.context.shape[1] + s.target.shape[1] for s in splits}
    if hasattr(self._predictor, "together") and len(totals) == 1 < len(splits):
      return self._predictor.apply(
          variables, contexts, splits, method="together", **options
      ), model_state
    predictions = []
    for group, (context, split) in enumerate(zip(contexts, splits)):
      predict = functools.partial(
          self._predictor.apply, context=context, split=split, group=group, **options
      )
      if "batch_stats" in model_state:
        statistics = {"batch_stats": model_state["batch_stats"]}
        found, changed = predict(variables | statistics, mutable=["batch_stats"])
        model_state = {**model_state, **changed}
      else:
        found = predict(variables)
      predictions.append(found)
    return predictions, model_state

  def _context(self, params, batch, split, train, rngs) -> jax.Array:
    """Encodes the visible tokens of one group, [B, K, D]."""
    # With separate photometric views the context is the other view of one geometry.
    volume = batch.get("volume_context", batch["volume"])
    return self.backbone.apply(
        {"params": params["encoder"]}, volume, keep_ids=split.context,
        keep_valid=split.context_valid, spacing=batch.get("spacing"), train=train,
        rngs=rngs,
    ).tokens

  def _context_ramp(self, model_state: ModelState) -> jax.Array:
    warmup = max(self.context_warmup_steps, 1)
    return self.context_weight * jnp.minimum(
        (model_state["updates"] + 1).astype(jnp.float32) / warmup, 1.0
    )


Objective = VJEPA


def objective_faults(
    *,
    masks: Mapping[str, Mapping[str, Any]],
    predictor: Mapping[str, Any] | None = None,
    target_norm: str = "layer_norm",
    loss_kind: str = "l1",
    momentum_start: float = 0.99925,
    momentum_end: float = 0.99925,
    momentum_steps: int = 1,
    momentum_schedule: str = "linear",
    context_weight: float = 0.0,
    context_warmup_steps: int = 0,
    variance_weight: float = 0.0,
) -> list[str]:
  """Says what is wrong with the options of the objective, all at once."""
  faults = []
  if not masks:
    faults.append("objective.masks: names no mask group; nothing would be predicted")
  for what, value, known in (
      ("target_norm", target_norm, TARGET_NORMS),
      ("loss_kind", loss_kind, LOSSES),
      ("momentum_schedule", momentum_schedule, ("linear", "cosine")),
  ):
    if value not in known:
      faults.append(f"objective.{what}: {value!r} is none of {', '.join(known)}")
  for what, m in (("momentum_start", momentum_start), ("momentum_end", momentum_end)):
    if not 0.0 <= m <= 1.0:
      faults.append(f"objective.{what}: {m} is not in [0, 1]")
  for what, value in (
      ("context_weight", context_weight), ("variance_weight", variance_weight),
      ("context_warmup_steps", context_warmup_steps),
      ("momentum_steps", momentum_steps - 1),
  ):
    if value < 0:
      faults.append(f"objective.{what}: must not be negative (momentum_steps >= 1)")
  faults += [f"objective.predictor: {f}" for f in _predictor_faults(**predictor or {})]
  if loss_kind == "cosine" and target_norm != "l2":
    faults.append("objective.loss_kind: cosine needs objective.target_norm=l2")
  if context_weight and (predictor or {}).get("kind", "transformer") == "mlp":
    faults.append(
        "objective.context_weight: the mlp predictor has no context tokens to "
        "predict; set it to 0 or objective.predictor.kind=transformer"
    )
  return faults


def _predictor_faults(kind: str = "transformer", **options: Any) -> list[str]:
  """Says what is wrong with the options of `build_predictor`."""
  unit = {"transformer": TransformerPredictor, "mlp": MLPPredictor}.get(kind)
  if unit is None:
    return [f"kind {kind!r} is none of {', '.join(PREDICTORS)}"]
  default = {
      f.name: f.default for f in dataclasses.fields(unit)
      if f.name not in ("features", "groups", "parent", "name")
  }
  faults = [
      f"{key} is no option of {kind}; closest: "
      + ", ".join(difflib.get_close_matches(key, default, 3, 0.0))
      for key in options if key not in default
  ]
  if kind == "transformer":
    return faults + blocks.stack_faults(
        {**default, **options}, positions=("rope", "sincos"), otherwise=12
    )
  for name, known in (
      ("norm", NORMS), ("initializer", tuple(INITIALIZERS)), ("dtype", blocks.DTYPES)
  ):
    if options.get(name, known[0]) not in known:
      faults.append(f"{name} {options[name]!r} is none of {', '.join(known)}")
  return faults


def normalize_target(tokens: jax.Array, kind: str) -> jax.Array:
  """Normalises each target vector [..., D] in float32.

  Source: V-JEPA 2 normalises with LayerNorm without affine, eps 1e-5.
  """
  tokens = tokens.astype(jnp.float32)
  if kind == "layer_norm":
    mean = tokens.mean(axis=-1, keepdims=True)
    variance = jnp.square(tokens - mean).mean(axis=-1, keepdims=True)
    return (tokens - mean) * jax.lax.rsqrt(variance + TARGET_EPS)
  if kind == "l2":
    return _unit(tokens)
  return tokens


def token_loss(
    prediction: jax.Array, target: jax.Array, kind: str, target_norm: str
) -> jax.Array:
  """Returns the loss of every token, float32 [B, M], from [B, M, D] pairs."""
  prediction = prediction.astype(jnp.float32)
  if target_norm == "l2":
    prediction = _unit(prediction)
  difference = prediction - target
  if kind == "cosine":
    return jnp.square(difference).sum(axis=-1)  # 2 - 2 cos for unit vectors
  if kind == "l1":
    return jnp.abs(difference).mean(axis=-1)
  if kind == "l2":
    return 0.5 * jnp.square(difference).mean(axis=-1)
  size = jnp.abs(difference)
  return jnp.where(size < 1.0, 0.5 * jnp.square(size), size - 0.5).mean(axis=-1)


def _unit(tokens: jax.Array) -> jax.Array:
  return tokens * jax.lax.rsqrt(
      jnp.square(tokens).sum(axis=-1, keepdims=True) + 1e-12
  )


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  return (_unit(a.astype(jnp.float32)) * _unit(b.astype(jnp.float32))).sum(axis=-1)


def _take(tokens: jax.Array, ids: jax.Array) -> jax.Array:
  return jnp.take_along_axis(tokens, ids[..., None], axis=1)  # [B, M, D]


def _masked_mean(values: jax.Array, valid: jax.Array | None) -> jax.Array:
  """Means [B, M, ...] over the valid of its M tokens."""
  if valid is None:
    return values.mean(axis=1)
  weight = valid.astype(values.dtype).reshape(valid.shape + (1,) * (values.ndim - 2))
  return (values * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)


def _spread(tokens: jax.Array, valid: jax.Array | None) -> jax.Array:
  """Standard deviation over the tokens of each row, [B, D]."""
  tokens = tokens.astype(jnp.float32)
  mean = _masked_mean(tokens, valid)[:, None]
  return jnp.sqrt(_masked_mean(jnp.square(tokens - mean), valid) + 1e-4)


def _joined(
    metric: tuple[jax.Array, jax.Array] | None, rows: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
  total = (jnp.sum(rows * weight), jnp.sum(weight))
  return total if metric is None else (metric[0] + total[0], metric[1] + total[1])


def _token_mask(split: masks_lib.Split) -> jax.Array | None:
  return None if split.target_valid is None else split.target_valid[..., None]


def _relative_distance(tree: Params, reference: Params) -> jax.Array:
  gap = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), tree, reference)
  size = jax.tree.map(lambda b: jnp.sum(jnp.square(b)), reference)
  return jnp.sqrt(sum(jax.tree.leaves(gap)) / sum(jax.tree.leaves(size)))
