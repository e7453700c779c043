"""Classes of volumes, or stages of every time point of a movie, from labels.

An encoder, pooled over all tokens or over the places of each frame, and a head. Where
the classes are stages that follow one another, transitions that no embryo makes can
be made to cost something.

Source: fine-tuning of VideoMAE (Tong et al. 2022, arXiv:2203.12602): mean pooling, a
norm, a linear head drawn small. The losses over time are ours; the projects behind
this library name such losses and give no formula.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.backbones.base import Backbone, Features, attention
from vjepa_jax.nn import blocks, placement
from vjepa_jax.objectives.base import Batch, Metrics, ModelState, Params
from vjepa_jax.volumes.grid import Grid

POOLS = ("mean", "max", "cls", "attention")
LABELS = ("label", "frame_label")
# Weights of the losses over time, each 0 where it is not wanted.
OVER_TIME = ("transition_weight", "monotone_weight", "smooth_weight", "order_weight")
_MINUTE_S = 60.0
_ORDERS = 3  # before, same, after
# Keeps the logarithm of an impossible transition finite.
_EPS = 1e-6


class Head(nn.Module):
  """Tokens to logits, one row a volume or one a frame.

  Attributes:
    classes: K.
    pool: "mean" or "max" over tokens, "cls", or "attention" (a learned query).
    frames: whether each frame is pooled by itself.
    hidden: width of a layer before the last; 0: none.
    dropout: share of what is pooled, and of the hidden layer, that is dropped.
    heads: of attention pooling.
    scale: of the last kernel's first draw, over its usual one.
    dtype: compute type.
  """

  classes: int
  pool: str = "mean"
  frames: bool = False
  hidden: int = 0
  dropout: float = 0.0
  heads: int = 4
  scale: float = 1e-3
  dtype: str = "float32"

  @nn.compact
  def __call__(
      self, features: Features, *, train: bool = False
  ) -> tuple[jax.Array, jax.Array]:
    """Returns logits float32 [B, K] or [B, t, K], and what they were made from.

    Args:
      features: of all tokens, in their order.
      train: whether dropout draws (rng stream "dropout").
    """
    pooled = blocks.layer_norm("norm")(self._pooled(features)).astype(self.dtype)
    dense = lambda width, name, draw: nn.Dense(
        width, dtype=self.dtype, kernel_init=draw, promote_dtype=placement.promote,
        name=name,
    )
    drop = lambda x: nn.Dropout(self.dropout)(x, deterministic=not train)
    x = drop(pooled)
    if self.hidden:
      draw = nn.initializers.xavier_uniform()
      x = drop(blocks.gelu(dense(self.hidden, "hidden", draw)(x)))
    draw = nn.initializers.variance_scaling(self.scale**2, "fan_in", "truncated_normal")
    return dense(self.classes, "logits", draw)(x).astype(jnp.float32), pooled

  def _pooled(self, features):
    tokens = features.tokens
    if self.pool == "cls":
      return features.cls
    if self.frames:
      tokens = tokens.reshape(len(tokens), features.grid.dims[0], -1, tokens.shape[-1])
    if self.pool == "mean":
      return tokens.mean(axis=-2)
    if self.pool == "max":
      return tokens.max(axis=-2)
    width = tokens.shape[-1]
    query = self.param("query", nn.initializers.normal(0.02), (1, width))
    query = jnp.broadcast_to(query, (*tokens.shape[:-2], 1, width))
    return nn.MultiHeadDotProductAttention(
        self.heads, dtype=self.dtype, name="pool"
    )(query, tokens)[..., 0, :]


@dataclasses.dataclass(frozen=True)
class Classify:
  """The objective of fine-tuning on labels.

  Attributes:
    backbone: the encoder.
    classes: K; a label is a place among them, in the order of stages.
    labels: "label", one a volume (diagnosis), or "frame_label", one a time point; -1
      is unknown and counts for nothing.
    head: attributes of `Head`, without classes and frames.
    label_smoothing: share of the target that the other classes get.
    ordinal: whether only the neighbouring stages get it.
    class_weights: what a label of each class weighs in the cross entropy; (): 1.
      `config.build` scales those of a config, so that their mean over the training
      labels is 1 and the losses over time keep their weight.
    balance_classes: whether the weights are inverse to the classes' numbers among the
      training labels; `config.build` counts them and gives them as class_weights.
    transition_weight: of -log of the chance that two neighbouring time points make a
      possible transition: from a stage to itself or up to max_skip later ones.
    max_skip: stages that may be gone forward in a minute; one a time point at least.
    monotone_weight: of the square by which the expected stage falls from a time point
      to the next, beyond monotone_margin (stages).
    monotone_margin: see there.
    smooth_weight: of the square of the change of the probabilities.
    order_weight: of telling, from what is pooled of two time points of a clip, which
      is first: {before, same, after}.
    needs_labels: True; a batch may hold no label, see `train.step`.

  Where a token spans several time points they have one answer, and the losses over
  time compare those of neighbouring tokens; a transition between two is held against
  the time from one time point to the next, in which the answer changes.

  Raises:
    ValueError: for unknown names, values out of range, and options that do not go
      together; by `init` and `loss` where losses over time have nothing to compare.
  """

  needs_labels: ClassVar[bool] = True

  backbone: Backbone
  classes: int
  labels: str = "label"
  head: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  label_smoothing: float = 0.0
  ordinal: bool = False
  class_weights: Sequence[float] = ()
  balance_classes: bool = False
  transition_weight: float = 0.0
  max_skip: float = 1.0
  monotone_weight: float = 0.0
  monotone_margin: float = 0.0
  smooth_weight: float = 0.0
  order_weight: float = 0.0

  def __post_init__(self):
    options = {
        f.name: getattr(self, f.name)
        for f in dataclasses.fields(self) if f.name != "backbone"
    }
    faults = objective_faults(**options) + pair_faults(self.backbone, **options)
    if faults:
      raise ValueError("; ".join(faults))

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, ModelState]:
    """Draws encoder and head, and what tells the order of two time points."""
    encoder_key, head_key, order_key = jax.random.split(key, 3)
    volume = batch["volume"][:1]
    spacing = batch["spacing"][:1]
    encoder = self.backbone.init(encoder_key, volume, spacing=spacing)["params"]
    features = self.backbone.apply({"params": encoder}, volume, spacing=spacing)
    self._require_times(features.grid)
    head = self._head.init(head_key, features)["params"]
    params = {"encoder": encoder, "head": head}
    if self.order_weight:
      pair = jnp.zeros((1, 2 * self.backbone.width))
      params["order"] = self._order.init(order_key, pair)["params"]
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
    """Returns the mean over the rows that have a label, and its parts.

    Metrics: "loss"; "cross_entropy", "accuracy" over labels; of the losses over time
    that have a weight, "transition", "monotone", "smooth" and "order".
    """
    order_key, draw_key = jax.random.split(key)
    draw_key = jax.random.fold_in(draw_key, batch["_position"][0])
    drop_path, dropout = jax.random.split(draw_key)
    answers, pooled, grid = self._forward(
        params, batch, train=train, rngs={"drop_path": drop_path, "dropout": dropout}
    )
    self._require_times(grid)
    labels = batch[self.labels].reshape(len(answers), -1)
    logits = self._by_label(answers, grid).reshape(*labels.shape, self.classes)
    known = (labels >= 0).astype(jnp.float32)
    count = known.sum(axis=1)
    # A row without a label teaches nothing, and does not dilute the others.
    rows = batch["_mask"] * (count > 0)
    over_row = lambda x: (x * known).sum(axis=1) / jnp.maximum(count, 1.0)
    entropy = over_row(self._cross_entropy(logits, labels))
    right = ((logits.argmax(axis=-1) == labels) * known).sum(axis=1)
    parts = self._over_time(params, answers, pooled, batch, order_key)
    total = entropy + sum(
        getattr(self, f"{name}_weight") * value for name, value in parts.items()
    )
    weight = rows.sum()
    metrics = {
        "loss": ((total * rows).sum(), weight),
        "cross_entropy": ((entropy * rows).sum(), weight),
        "accuracy": ((right * rows).sum(), (count * rows).sum()),
        **{name: ((value * rows).sum(), weight) for name, value in parts.items()},
    }
    mean = metrics["loss"][0] / jnp.maximum(weight, 1.0)
    return mean, (model_state, metrics)

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

    features(params, model_state, batch): Features of the whole volume; logits(params,
      model_state, batch): float32 [B, T, K], one a time point, or [B, K];
      attention(params, model_state, batch): see `backbones.base.attention`.
    """
    return {
        "features": lambda params, state, batch: self._encode(params, batch),
        "logits": lambda params, state, batch: self._logits(params, batch),
        "attention": lambda params, state, batch: attention(
            self.backbone, params["encoder"], batch["volume"],
            spacing=batch.get("spacing"),
        ),
    }

  def _encode(self, params, batch, **options) -> Features:
    return self.backbone.apply(
        {"params": params["encoder"]}, batch["volume"], spacing=batch.get("spacing"),
        **options,
    )

  def _forward(self, params, batch, *, train=False, rngs=None):
    """Returns logits [B, (t,) K], what is pooled, [B, (t,) D], and the grid."""
    features = self._encode(params, batch, train=train, rngs=rngs)
    logits, pooled = self._head.apply(
        {"params": params["head"]}, features, train=train, rngs=rngs
    )
    return logits, pooled, features.grid

  def _logits(self, params, batch) -> jax.Array:
    logits, _, grid = self._forward(params, batch)
    return self._by_label(logits, grid)

  def _by_label(self, logits: jax.Array, grid: Grid) -> jax.Array:
    """[B, t, K] to [B, T, K]: time points that share a token share its logits."""
    times, frames = grid.dims[0], grid.voxels[0]
    # As they are: over a mesh, picking all of them would gather what is shared.
    if not self._by_frame or times == frames:
      return logits
    step = (grid.stride or grid.patch)[0]
    return logits[:, np.minimum(np.arange(frames) // step, times - 1)]

  def _require_times(self, grid: Grid) -> None:
    faults = time_faults(grid, **{name: getattr(self, name) for name in OVER_TIME})
    if faults:
      raise ValueError("; ".join(faults))

  def _cross_entropy(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """[B, F, K] and [B, F] to [B, F]; of unknown labels some number."""
    targets = smoothed_targets(
        labels, self.classes, smoothing=self.label_smoothing, ordinal=self.ordinal
    )
    entropy = -(targets * jax.nn.log_softmax(logits)).sum(axis=-1)
    if not len(self.class_weights):
      return entropy
    weights = jnp.asarray(self.class_weights, jnp.float32)
    return entropy * weights[jnp.maximum(labels, 0)]

  def _over_time(self, params, logits, pooled, batch, key) -> dict[str, jax.Array]:
    """Returns name -> [B] of logits [B, t, K]: the losses over time with a weight."""
    found = {}
    if not self._by_frame:
      return found
    chances = jax.nn.softmax(logits)
    if self.transition_weight:
      allowed = allowed_transitions(
          self.classes, batch["spacing"][:, 0], max_skip=self.max_skip
      )
      found["transition"] = transition_loss(chances, allowed)
    if self.monotone_weight:
      found["monotone"] = monotone_loss(chances, margin=self.monotone_margin)
    if self.smooth_weight:
      found["smooth"] = smooth_loss(chances)
    if self.order_weight:
      found["order"] = self._order_loss(params, pooled, batch["_position"], key)
    return found

  def _order_loss(self, params, pooled, positions, key):
    """One pair of time points a clip, drawn from the row's own key."""
    frames = pooled.shape[1]
    draw = lambda place: jax.random.randint(
        jax.random.fold_in(key, place), (2,), 0, frames
    )
    pair = jax.vmap(draw)(positions)  # [B, 2]
    both = jnp.take_along_axis(pooled, pair[..., None], axis=1)
    logits = self._order.apply(
        {"params": params["order"]}, both.reshape(len(both), -1)
    )
    wanted = jnp.sign(pair[:, 1] - pair[:, 0]) + 1
    return -jnp.take_along_axis(
        jax.nn.log_softmax(logits.astype(jnp.float32)), wanted[:, None], axis=1
    )[:, 0]

  @property
  def _by_frame(self) -> bool:
    return self.labels == "frame_label"

  @property
  def _head(self) -> Head:
    return Head(self.classes, frames=self._by_frame, **self.head)

  @property
  def _order(self) -> nn.Module:
    width, dtype = self.backbone.width, self._head.dtype
    return nn.Sequential(
        [nn.Dense(width, dtype=dtype), blocks.gelu, nn.Dense(_ORDERS, dtype=dtype)]
    )


Objective = Classify


def smoothed_targets(
    labels: jax.Array, classes: int, *, smoothing: float, ordinal: bool
) -> jax.Array:
  """Returns what the probabilities should be, float32 [..., K], each of sum 1.

  Args:
    labels: int [...]; a negative one gives some row.
    classes: K.
    smoothing: share that is taken from the label: the other K - 1 classes get it in
      equal parts, or its neighbours.
    ordinal: whether its neighbours alone get it; at either end the only one.
  """
  own = jax.nn.one_hot(labels, classes)
  others = 1.0 - jnp.eye(classes)
  if ordinal:
    others = jnp.eye(classes, k=1) + jnp.eye(classes, k=-1)
  others = others / others.sum(axis=1, keepdims=True)
  return (1.0 - smoothing) * own + smoothing * others[jnp.maximum(labels, 0)]


def allowed_transitions(
    classes: int, seconds: jax.Array, *, max_skip: float
) -> jax.Array:
  """Returns which stages may follow which, float32 [B, K, K] of 0 and 1.

  Args:
    classes: K.
    seconds: [B] between two time points; NaN: unknown, one stage forward.
    max_skip: stages that may be gone forward in a minute, in whole stages; always 1.
  """
  # As the evaluator does: a clock that is a little fast is no stage less.
  forward = jnp.floor(max_skip * seconds / _MINUTE_S + 1e-2)
  forward = jnp.maximum(jnp.nan_to_num(forward, nan=1.0), 1.0)[:, None, None]
  gone = jnp.arange(classes)[None] - jnp.arange(classes)[:, None]
  return ((gone >= 0) & (gone <= forward)).astype(jnp.float32)


def transition_loss(chances: jax.Array, allowed: jax.Array) -> jax.Array:
  """Returns -mean_t log(p_t A p_(t+1)), [B]: 0 where no transition is impossible.

  Args:
    chances: [B, T, K].
    allowed: [B, K, K] of `allowed_transitions`.
  """
  possible = jnp.einsum("bti,bij,btj->bt", chances[:, :-1], allowed, chances[:, 1:])
  return -jnp.log(possible + _EPS).mean(axis=1)


def monotone_loss(chances: jax.Array, *, margin: float = 0.0) -> jax.Array:
  """Returns mean_t max(0, E_t - E_(t+1) - margin)^2, [B]; E is the expected stage."""
  expected = chances @ jnp.arange(chances.shape[-1], dtype=chances.dtype)
  falls = expected[:, :-1] - expected[:, 1:] - margin
  return jnp.square(jax.nn.relu(falls)).mean(axis=1)


def smooth_loss(chances: jax.Array) -> jax.Array:
  """Returns mean_t |p_(t+1) - p_t|^2, [B], of [B, T, K]."""
  return jnp.square(jnp.diff(chances, axis=1)).sum(axis=-1).mean(axis=1)


def balanced_weights(counts: Sequence[int]) -> tuple[float, ...]:
  """Returns weights in inverse proportion to the counts of the classes.

  Their mean over the labels is 1. A class that is never seen gets 1, which is never
  used.
  """
  counts = np.asarray(counts, np.float64)
  return scaled_weights(1.0 / np.maximum(counts, 1.0), counts)


def scaled_weights(
    weights: Sequence[float], counts: Sequence[int]
) -> tuple[float, ...]:
  """Returns the weights times what makes their mean over the labels 1.

  Args:
    weights: of the classes, above 0.
    counts: labels of each class; a class without any gets 1.
  """
  weights, counts = np.asarray(weights, np.float64), np.asarray(counts, np.float64)
  if not counts.sum():
    return (1.0,) * len(counts)
  scaled = weights * counts.sum() / (weights * counts).sum()
  return tuple(float(w) for w in np.where(counts > 0, scaled, 1.0))


def objective_faults(
    *,
    classes: int = 2,
    labels: str = "label",
    head: Mapping[str, Any] | None = None,
    label_smoothing: float = 0.0,
    ordinal: bool = False,
    class_weights: Sequence[float] = (),
    balance_classes: bool = False,
    max_skip: float = 1.0,
    monotone_margin: float = 0.0,
    **over_time: float,
) -> list[str]:
  """Says what is wrong with the options of the objective, all at once."""
  faults = []
  if not isinstance(classes, int) or classes < 2:
    faults.append(f"objective.classes: {classes!r} must be a number of at least 2")
  if labels not in LABELS:
    faults.append(f"objective.labels: {labels!r} is none of {', '.join(LABELS)}")
  if not 0 <= label_smoothing < 1:
    faults.append(f"objective.label_smoothing: {label_smoothing} is not in [0, 1)")
  if ordinal and not label_smoothing:
    faults.append(
        "objective.ordinal: says where label_smoothing goes, and that is 0; set "
        "label_smoothing or leave ordinal out"
    )
  faults += _weight_faults(class_weights, balance_classes, classes)
  if not max_skip > 0:
    faults.append(f"objective.max_skip: {max_skip} must be above 0")
  if monotone_margin < 0:
    faults.append(f"objective.monotone_margin: {monotone_margin} must not be negative")
  for name in OVER_TIME:
    if not over_time.get(name, 0.0) >= 0:
      faults.append(f"objective.{name}: {over_time[name]} must not be negative")
    elif over_time.get(name) and labels != "frame_label":
      faults.append(
          f"objective.{name}: {over_time[name]} with labels {labels!r}; it compares "
          "time points, which only labels 'frame_label' has"
      )
  return faults + _head_faults(head or {}, labels)


def pair_faults(
    backbone: Backbone, *, head: Mapping[str, Any] | None = None, **_: Any
) -> list[str]:
  """Says what the head asks of a backbone that it does not have.

  Args:
    backbone: the encoder.
    head: of the objective.
  """
  head, faults = head or {}, []
  if head.get("pool") == "cls" and not getattr(backbone, "class_token", False):
    faults.append(
        "objective.head.pool: 'cls' without model.class_token; set that to True, or "
        "pool 'mean'"
    )
  heads = head.get("heads", Head.heads)
  if head.get("pool") == "attention" and (heads < 1 or backbone.width % heads):
    faults.append(
        f"objective.head.heads: {heads} does not divide the width {backbone.width}"
    )
  return faults


def time_faults(grid: Grid, **options: Any) -> list[str]:
  """Says which losses over time have nothing to compare.

  Args:
    grid: of the volumes that the model sees.
    options: of the objective.
  """
  if grid.dims[0] > 1:
    return []
  return [
      f"objective.{name}: {options[name]} with one token along T (T={grid.voxels[0]}, "
      f"patch {grid.patch[0]}); it compares tokens in time, give clips of two or more, "
      "or a smaller patch along T"
      for name in OVER_TIME if options.get(name)
  ]


def _weight_faults(class_weights, balance_classes, classes) -> list[str]:
  place = "objective.class_weights"
  if class_weights and balance_classes:
    return [f"{place}: {tuple(class_weights)} and balance_classes; give one of them"]
  if class_weights and len(class_weights) != classes:
    return [f"{place}: {len(class_weights)} numbers for {classes} classes"]
  if any(not weight > 0 for weight in class_weights):
    return [f"{place}: {tuple(class_weights)} must all be above 0"]
  return []


def _head_faults(head, labels) -> list[str]:
  place = "objective.head"
  known = [
      name for name in Head.__dataclass_fields__
      if name not in ("classes", "frames", "parent", "name")
  ]
  faults = [
      f"{place}.{key}: unknown key; there are {', '.join(known)}"
      for key in head if key not in known
  ]
  pool = head.get("pool", "mean")
  if pool not in POOLS:
    faults.append(f"{place}.pool: {pool!r} is none of {', '.join(POOLS)}")
  if pool == "cls" and labels == "frame_label":
    faults.append(
        f"{place}.pool: 'cls' with labels 'frame_label'; a clip has one class token, "
        "frames have none; pool 'mean', 'max' or 'attention'"
    )
  if not 0 <= head.get("dropout", 0.0) < 1:
    faults.append(f"{place}.dropout: {head['dropout']} is not in [0, 1)")
  if head.get("hidden", 0) < 0:
    faults.append(f"{place}.hidden: {head['hidden']} must not be negative")
  return faults
