"""Who is hidden from whom: context and target tokens of each sample.

Counts are fixed by the config, so shapes are static under jit; ids are filled by
uniform random choice among the tokens that qualify, never by a prefix. Every
sample draws from its own key, so batch size, accumulation and device count
change no mask.
"""

from collections.abc import Mapping
import difflib
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.volumes.grid import Grid

KINDS = ("random", "tube", "frame_random", "frames", "blocks")
PRIORS = ("uniform", "foreground", "texture")
THROUGH = ("TZ", "T")


@struct.dataclass
class Split:
  """Token ids that a sample shows and that it asks for; the two are disjoint.

  Attributes:
    context: int32 [B, K], ascending.
    target: int32 [B, M], ascending.
    context_valid: bool [B, K]; False marks a repeated id that only fills the row.
      None: all are valid.
    target_valid: bool [B, M], likewise.
  """

  context: jax.Array
  target: jax.Array
  context_valid: jax.Array | None = None
  target_valid: jax.Array | None = None

  def valid(self) -> jax.Array | None:
    """Which of context and target, one behind the other, are valid: bool [B, K + M].

    None: all.
    """
    if self.context_valid is None and self.target_valid is None:
      return None
    parts = [
        jnp.ones(ids.shape, bool) if valid is None else valid
        for ids, valid in (
            (self.context, self.context_valid), (self.target, self.target_valid)
        )
    ]
    return jnp.concatenate(parts, axis=1)


def sample_keys(key: jax.Array, positions: jax.Array) -> jax.Array:
  """Gives each sample a key of its own.

  The keys are threefry whatever the type of `key`: the other generators draw, under
  vmap, from the whole batch's keys at once, which would tie a sample's masks to
  its neighbours.

  Args:
    key: one key, typed or raw.
    positions: int32 [B], places in the global batch.

  Returns:
    Typed keys [B].
  """
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    key = jax.random.key_data(key)
  key = jax.random.wrap_key_data(key[..., :2], impl="threefry2x32")
  return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)


def count(share: float | int, tokens: int, unit: int = 1) -> int:
  """Returns how many tokens a share means: a float is a fraction, an int a count.

  Args:
    share: fraction or count.
    tokens: of the whole, N.
    unit: tokens that stay together, see `unit_of`; a fraction is rounded to whole
      ones.
  """
  if isinstance(share, int):
    return share
  return unit * max(1, round(share * tokens / unit))


def unit_of(options: Mapping[str, Any], grid: Grid) -> int:
  """Returns how many tokens a mask group shows or hides at a time.

  Tubes through T alone are whole (t tokens), as are frames (n tokens), and every
  frame has as many random tokens as the others (t); all else goes token by token.
  """
  kind = options["kind"]
  whole = kind == "tube" and options.get("through", "TZ") == "T"
  if whole or kind == "frame_random":
    return grid.dims[0]
  return grid.places if kind == "frames" else 1


def keeps_places(options: Mapping[str, Any]) -> bool:
  """Whether a mask group shows the same places of every frame."""
  return options.get("kind") == "tube" and options.get("through", "TZ") == "T"


def draw(
    groups: Mapping[str, Mapping[str, Any]],
    volume: jax.Array,
    grid: Grid,
    key: jax.Array,
    positions: jax.Array,
) -> tuple[Split, ...]:
  """Draws one Split a mask group of a config, in the order of their names.

  Args:
    groups: name -> options, see `mask_faults`.
    volume: float [B, T, Z, Y, X, C], what priors look at.
    grid: geometry of the tokens.
    key: of the batch.
    positions: int32 [B], see `sample_keys`.
  """
  splits = []
  for number, name in enumerate(sorted(groups)):
    options = dict(groups[name])
    keys = sample_keys(jax.random.fold_in(key, number), positions)
    unit = unit_of(options, grid)
    for side in ("context", "target"):
      options[side] = count(options[side], grid.tokens, unit)
    prior = options.pop("prior", "uniform")
    if prior != "uniform":
      options["weights"] = _PRIORS[prior](volume, grid)
    splits.append(sample(options.pop("kind"), keys, grid, **options))
  return tuple(splits)


def sample(kind: str, keys: jax.Array, grid: Grid, **options: Any) -> Split:
  """Draws a Split by the sampler called `kind`, one of KINDS.

  Raises:
    KeyError: for an unknown kind.
  """
  samplers = {
      "random": random, "tube": tube, "frame_random": frame_random, "frames": frames,
      "blocks": blocks,
  }
  if kind not in samplers:
    raise KeyError(f"masks: no kind {kind!r}; {_closest(kind, KINDS)}")
  return samplers[kind](keys, grid, **options)


def random(
    keys: jax.Array,
    grid: Grid,
    *,
    context: int,
    target: int,
    weights: jax.Array | None = None,
) -> Split:
  """Draws tokens one by one, without regard to place.

  Args:
    keys: [B] of `sample_keys`.
    grid: geometry of the tokens.
    context: K, number of visible tokens.
    target: M, number of tokens to predict.
    weights: float [B, N]; a token is hidden in proportion, without replacement.
      None: all alike.

  Raises:
    ValueError: if the counts do not fit the grid.
  """
  _require(grid, kind="random", context=context, target=target)

  def draw(key, weight):
    order = _order(jax.random.bits(key, (grid.tokens,)), weight)
    return (
        jnp.sort(order[target : target + context]), jnp.sort(order[:target])
    )  # yapf: disable

  shown, hidden = _by_row(draw, keys, weights)
  return Split(shown.astype(jnp.int32), hidden.astype(jnp.int32))


def tube(
    keys: jax.Array,
    grid: Grid,
    *,
    context: int,
    target: int,
    through: str = "TZ",
    weights: jax.Array | None = None,
) -> Split:
  """Draws places and keeps them through all of T, or of T and Z.

  Where a count is no multiple of the tokens of one tube, the last tube is thinned
  at random; no place ever holds both context and target. Tubes through T alone must
  be whole, so that every frame has the same places: ids are then [t, k], row-major.

  Args:
    keys: [B] of `sample_keys`.
    grid: geometry of the tokens.
    context: K, number of visible tokens.
    target: M, number of tokens to predict.
    through: "TZ", places lie in (y, x); or "T", in (z, y, x).
    weights: float [B, N]; a tube is hidden in proportion to the sum of its tokens',
      without replacement. None: all alike.

  Raises:
    ValueError: if the counts do not fit the grid.
  """
  _require(grid, kind="tube", context=context, target=target, through=through)
  t, z, y, x = grid.dims
  length = t * z if through == "TZ" else t
  places = grid.tokens // length
  hidden_tubes, shown_tubes = -(-target // length), -(-context // length)

  def draw(key, weight):
    bits = jax.random.bits(key, (places + grid.tokens,))
    if weight is not None:
      weight = weight.reshape(length, places).sum(axis=0)
    order = _order(bits[:places], weight)
    rank = jnp.tile(jnp.argsort(order), length)  # [N], of each token's tube
    hidden = rank < hidden_tubes
    shown = ~hidden & (rank < hidden_tubes + shown_tubes)
    split = _fill(bits[places:], shown, hidden, context, target)
    return split.replace(context_valid=None, target_valid=None)

  return _by_row(draw, keys, weights)


def frame_random(
    keys: jax.Array,
    grid: Grid,
    *,
    context: int,
    target: int,
    weights: jax.Array | None = None,
) -> Split:
  """Draws tokens of every frame by themselves, as many in each.

  Args:
    keys: [B] of `sample_keys`.
    grid: geometry of the tokens.
    context: K, number of visible tokens, a multiple of t.
    target: M, number of tokens to predict, a multiple of t.
    weights: float [B, N]; a token is hidden in proportion, without replacement.
      None: all alike.

  Raises:
    ValueError: if the counts do not fit the grid.
  """
  _require(grid, kind="frame_random", context=context, target=target)
  t, n = grid.dims[0], grid.places
  first = jnp.arange(t, dtype=jnp.int32)[:, None] * n
  shown, hidden = context // t, target // t

  def draw(key, weight):
    weight = None if weight is None else weight.reshape(t, n)
    order = _order(jax.random.bits(key, (t, n)), weight)
    ids = lambda part: (jnp.sort(part) + first).reshape(-1)
    return ids(order[:, hidden : hidden + shown]), ids(order[:, :hidden])

  return Split(*(ids.astype(jnp.int32) for ids in _by_row(draw, keys, weights)))


def frames(keys: jax.Array, grid: Grid, *, context: int, target: int) -> Split:
  """Draws whole frames.

  Args:
    keys: [B] of `sample_keys`.
    grid: geometry of the tokens.
    context: K, number of visible tokens, a multiple of n.
    target: M, number of tokens to predict, a multiple of n.

  Raises:
    ValueError: if the counts do not fit the grid.
  """
  _require(grid, kind="frames", context=context, target=target)
  t, n = grid.dims[0], grid.places
  shown, hidden = context // n, target // n

  def draw(key, _):
    order = jnp.argsort(jax.random.bits(key, (t,)))
    ids = lambda part: (jnp.sort(part)[:, None] * n + jnp.arange(n)).reshape(-1)
    return ids(order[hidden : hidden + shown]), ids(order[:hidden])

  return Split(*(ids.astype(jnp.int32) for ids in _by_row(draw, keys, None)))


def blocks(
    keys: jax.Array,
    grid: Grid,
    *,
    context: int,
    target: int,
    count: int,
    spatial_scale: float | tuple[float, float],
    depth_scale: float | tuple[float, float] = 1.0,
    aspect: tuple[float, float] = (0.75, 1.5),
    weights: jax.Array | None = None,
) -> Split:
  """Hides the union of a few blocks; the rest is what may be seen.

  Args:
    keys: [B] of `sample_keys`.
    grid: geometry of the tokens.
    context: K, number of visible tokens, drawn from outside the blocks.
    target: M, number of tokens to predict, drawn from inside.
    count: blocks a sample, all of one size.
    spatial_scale: share of the (y, x) plane that a block covers; a number or the
      (low, high) of a uniform draw.
    depth_scale: share of T and of Z, likewise; an axis of one token stays whole.
    aspect: (low, high) of height over width.
    weights: float [B, N]; blocks are centred on tokens drawn by these weights and
      pushed inside the grid. None: every place that fits is equally likely.

  Raises:
    ValueError: if the options do not fit the grid.

  Source: V-JEPA 2, facebookresearch/vjepa2 src/masks/multiseq_multiblock3d.py.
  Different on purpose: block sizes are drawn for each sample, not for a batch;
  counts are filled at random where the reference cuts all samples of a batch to
  the shortest prefix; where blocks cover everything, one token is given back.
  """
  _require(
      grid, kind="blocks", context=context, target=target, count=count,
      spatial_scale=spatial_scale, depth_scale=depth_scale, aspect=aspect,
  )  # yapf: disable

  def draw(key, weight):
    # One call of the generator: several would each add to the time of compiling.
    bits = jax.random.bits(key, (grid.tokens + 4 * count + 4,))
    fill_bits, place_bits = bits[: grid.tokens], bits[grid.tokens : -4]
    extents = block_extents(
        *_uniform(bits[-3:]), grid.dims, spatial_scale=spatial_scale,
        depth_scale=depth_scale, aspect=aspect,
    )  # yapf: disable
    uniforms = _uniform(place_bits).reshape(count, 4)
    starts = _block_starts(uniforms, grid.dims, extents, weight)
    hidden = _covered(grid.dims, starts, extents)
    lucky = jnp.arange(grid.tokens) == bits[-4] % grid.tokens
    hidden &= ~(hidden.all() & lucky)
    return _fill(fill_bits, ~hidden, hidden, context, target)

  return _by_row(draw, keys, weights)


def block_extents(
    depth_uniform: jax.Array,
    spatial_uniform: jax.Array,
    aspect_uniform: jax.Array,
    dims: tuple[int, int, int, int],
    *,
    spatial_scale: float | tuple[float, float],
    depth_scale: float | tuple[float, float],
    aspect: tuple[float, float],
) -> jax.Array:
  """Returns a block's tokens per axis (t, z, y, x), int32 [..., 4].

  Args:
    depth_uniform: float [...] in [0, 1), where in `depth_scale`.
    spatial_uniform: likewise in `spatial_scale`.
    aspect_uniform: likewise in `aspect`.
    dims: tokens of the grid per axis.
    spatial_scale, depth_scale, aspect: see `blocks`.

  Source: as `blocks`; the aspect ratio is drawn linearly, as there.
  """
  t, z, y, x = dims
  depths = [
      jnp.maximum(1, _floor_share(n, depth_scale, depth_uniform)) for n in (t, z)
  ]
  area = jnp.maximum(1, _floor_share(y * x, spatial_scale, spatial_uniform))
  ratio = aspect[0] + aspect_uniform * (aspect[1] - aspect[0])
  height = jnp.clip(jnp.round(jnp.sqrt(area * ratio)), 1, y)
  width = jnp.clip(jnp.round(jnp.sqrt(area / ratio)), 1, x)
  extents = jnp.broadcast_arrays(*depths, height, width)
  return jnp.stack([e.astype(jnp.int32) for e in extents], axis=-1)


def foreground(volume: jax.Array, grid: Grid) -> jax.Array:
  """Says where the tissue is, from the volume's own intensity.

  A token weighs by its mean intensity above the volume's lower quarter, half by
  its own and half by that of its whole row of depth (same y), so that dark
  lesions inside bright layers count as tissue. No token weighs less than a tenth
  of the average. Voxels that the grid pads count for nothing.

  Args:
    volume: float [B, T, Z, Y, X, C].
    grid: geometry of the tokens.

  Returns:
    float32 [B, N], each row summing to 1.
  """
  patches = grid.patchify(volume).astype(jnp.float32)
  level = patches.mean(axis=-1, where=_real(volume, grid))  # [B, N]
  level = jax.nn.relu(level - jnp.percentile(level, 25, axis=1, keepdims=True))
  cells = level.reshape(-1, *grid.dims)  # [B, t, z, y, x]
  rows = cells.mean(axis=(1, 2, 4), keepdims=True)
  weight = (cells + rows).reshape(level.shape) / 2
  mean = weight.mean(axis=1, keepdims=True)
  weight = jnp.where(mean > 0, weight / jnp.where(mean > 0, mean, 1), 1)
  weight = jnp.maximum(weight, 0.1)
  return weight / weight.sum(axis=1, keepdims=True)


def texture(volume: jax.Array, grid: Grid) -> jax.Array:
  """Says where something is to be seen, by the spread of voxels in every token.

  No token weighs less than a tenth of the average. Voxels that the grid pads count
  for nothing: beside real ones they would look like an edge.

  Args:
    volume: float [B, T, Z, Y, X, C].
    grid: geometry of the tokens.

  Returns:
    float32 [B, N], each row summing to 1.
  """
  patches = grid.patchify(volume).astype(jnp.float32)
  spread = patches.std(axis=-1, where=_real(volume, grid))  # [B, N]
  mean = spread.mean(axis=1, keepdims=True)
  weight = jnp.maximum(jnp.where(mean > 0, spread, 1), 0.1 * mean)
  return weight / weight.sum(axis=1, keepdims=True)


def _real(volume: jax.Array, grid: Grid) -> np.ndarray | None:
  """Which values of each patch are of the volume, bool [N, P]; None: all."""
  valid = grid.valid() if grid.padded else np.ones(1, bool)
  # Channels lie innermost.
  return None if valid.all() else np.repeat(valid, volume.shape[-1], axis=-1)


_PRIORS = {"foreground": foreground, "texture": texture}


def mask_faults(options: Mapping[str, Any], grid: Grid) -> list[str]:
  """Says what is wrong with a mask group of a config; an empty list is well.

  Args:
    options: `kind`, `context` and `target` (fractions of the tokens, or counts),
      and what the kind's sampler takes; all but "frames" may name a `prior` of
      PRIORS.
    grid: geometry of the tokens.
  """
  kind = options.get("kind")
  if kind not in KINDS:
    return [f"kind {kind!r} is no mask; {_closest(kind, KINDS)}"]
  known = ("kind", "context", "target")
  needed = known
  if kind == "blocks":
    needed += ("count", "spatial_scale")
    known = needed + ("depth_scale", "aspect")
  if kind == "tube":
    known += ("through",)
  if kind != "frames":
    known += ("prior",)
  faults = [
      f"{key} is no option of {kind}; {_closest(key, known)}"
      for key in options if key not in known
  ] + [f"{key} is missing" for key in needed if key not in options]  # yapf: disable
  if faults:
    return faults
  if options.get("through", "TZ") not in THROUGH:
    return [f"through {options['through']!r}; {_closest(options['through'], THROUGH)}"]
  numbers, unit = dict(options), unit_of(options, grid)
  for key in ("context", "target"):
    value = options[key]
    top = 1 if isinstance(value, float) else grid.tokens
    if not _is_number(value) or not 0 < value <= top:
      faults.append(
          f"{key} {value!r} must be a fraction in (0, 1] or a count of tokens, "
          f"1..{grid.tokens}"
      )
    else:
      numbers[key] = count(value, grid.tokens, unit)
  if options.get("prior", "uniform") not in PRIORS:
    faults.append(f"prior {options['prior']!r}; {_closest(options['prior'], PRIORS)}")
  return faults or _count_faults(grid, **numbers)


def _count_faults(
    grid: Grid, *, kind: str, context: int, target: int, prior: str = "uniform",
    through: str = "TZ", **shape: Any,
) -> list[str]:  # yapf: disable
  del prior  # checked by the caller; changes no count
  faults = []
  unit = unit_of(dict(kind=kind, through=through), grid)
  if context % unit or target % unit:
    faults.append(
        f"context {context} and target {target} must be multiples of {unit}: a "
        f"{kind} mask of the grid {grid.dims} has that many tokens at a time"
    )
  if kind == "tube":
    unit = grid.dims[0] * (grid.dims[1] if through == "TZ" else 1)
  room = grid.tokens // unit
  wanted = -(-context // unit) + -(-target // unit)
  if min(context, target) < 1 or wanted > room:
    what = f"{kind}: groups of {unit} tokens" if unit > 1 else "tokens"
    what = f"tubes of {unit} tokens" if kind == "tube" else what
    faults.append(
        f"context {context} and target {target} must be at least 1 and fit together: "
        f"they need {wanted} {what}, the grid {grid.dims} has {room}"
    )
  if kind == "blocks":
    faults += _shape_faults(**shape)
  return faults


def _shape_faults(
    count: int,
    spatial_scale: Any,
    depth_scale: Any = 1.0,
    aspect: Any = (0.75, 1.5),
) -> list[str]:
  faults = []
  if not isinstance(count, int) or count < 1:
    faults.append(f"count {count!r} must be a number of blocks, at least 1")
  bounds = {
      "spatial_scale": (spatial_scale, 1),
      "depth_scale": (depth_scale, 1),
      "aspect": (aspect, float("inf")),
  }
  for name, (value, top) in bounds.items():
    pair = (value, value) if _is_number(value) and name != "aspect" else value
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or not all(_is_number(v) for v in pair)
        or not 0 < pair[0] <= pair[1] <= top
    ):
      upper = " <= 1" if top == 1 else ""
      faults.append(f"{name} {value!r} must be (low, high) with 0 < low <= high{upper}")
  return faults


def _require(grid: Grid, **options: Any) -> None:
  faults = _count_faults(grid, **options)
  if faults:
    raise ValueError(f"masks.{options['kind']}: " + "; ".join(faults))


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _closest(name: Any, names: tuple[str, ...]) -> str:
  near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.0)
  return f"closest: {', '.join(near)}"


def _by_row(draw, keys: jax.Array, weights: jax.Array | None):
  """Maps draw(key, weight or None) over the rows of a batch."""
  return jax.vmap(draw, (0, None if weights is None else 0))(keys, weights)


def _order(bits: jax.Array, weight: jax.Array | None) -> jax.Array:
  """A random order of the last axis; the heavier come sooner (Gumbel's top k)."""
  if weight is None:
    return jnp.argsort(bits)
  uniform = jnp.maximum(_uniform(bits), 2.0**-25)
  return jnp.argsort(-jnp.log(uniform) / weight)


def _uniform(bits: jax.Array) -> jax.Array:
  """Random bits as float32 in [0, 1)."""
  return (bits >> 8).astype(jnp.float32) * 2.0**-24


def _fill(
    bits: jax.Array, shown: jax.Array, hidden: jax.Array, context: int, target: int
) -> Split:
  """Draws the counts from the tokens [N] that may be shown and that are hidden."""
  role = jnp.where(shown, 0, jnp.where(hidden, 1, 2)).astype(jnp.uint32)
  order = jnp.argsort((bits >> 2) | (role << 30))  # shown, hidden, neither
  seen, asked = shown.sum(), hidden.sum()
  shown_ids, shown_valid = _take_cyclic(order, 0, seen, context)
  hidden_ids, hidden_valid = _take_cyclic(order, seen, asked, target)
  return Split(shown_ids, hidden_ids, shown_valid, hidden_valid)


def _take_cyclic(
    order: jax.Array, start: jax.Array, found: jax.Array, number: int
) -> tuple[jax.Array, jax.Array]:
  """Takes `number` of the `found` ids from start on, ascending, and which are new."""
  place = jnp.arange(number)
  ids = order[start + place % jnp.maximum(found, 1)]
  # One sort keeps ids and their validity together.
  packed = jnp.sort(ids.astype(jnp.int32) * 2 + (place >= found))
  return packed // 2, packed % 2 == 0


def _floor_share(
    size: int, scale: float | tuple[float, float], uniform: jax.Array
) -> jax.Array:
  low, high = (scale, scale) if _is_number(scale) else scale
  if low == high:  # exact in double precision: int(10 * 0.7) is 7
    return jnp.full(jnp.shape(uniform), int(size * low), jnp.int32)
  return jnp.floor(size * (low + uniform * (high - low))).astype(jnp.int32)


def _block_starts(
    uniforms: jax.Array,
    dims: tuple[int, int, int, int],
    extents: jax.Array,
    weight: jax.Array | None,
) -> jax.Array:
  """First token of each block per axis, int32 [count, 4], from uniforms [count, 4]."""
  free = jnp.asarray(dims) - extents  # [4]
  if weight is None:
    return jnp.minimum(jnp.floor(uniforms * (free + 1)).astype(jnp.int32), free)
  total = jnp.cumsum(weight)
  centre = jnp.searchsorted(total, uniforms[:, 0] * total[-1], side="right")
  centre = jnp.minimum(centre, int(np.prod(dims)) - 1)
  centre = jnp.stack(jnp.unravel_index(centre, dims), axis=-1)  # [count, 4]
  return jnp.clip(centre - extents // 2, 0, free)


def _covered(
    dims: tuple[int, int, int, int], starts: jax.Array, extents: jax.Array
) -> jax.Array:
  """Whether a token lies in any block, bool [N]."""
  inside = jnp.ones((starts.shape[0], 1, 1, 1, 1), bool)
  for axis, size in enumerate(dims):
    place = jnp.arange(size)
    start = starts[:, axis, None]
    within = (place >= start) & (place < start + extents[axis])  # [count, size]
    inside &= within.reshape(-1, *(size if a == axis else 1 for a in range(4)))
  return inside.any(axis=0).reshape(-1)
