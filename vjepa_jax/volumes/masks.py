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

KINDS = ("random", "tube", "blocks")
PRIORS = ("uniform", "foreground")


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


def count(share: float | int, tokens: int) -> int:
  """Returns how many tokens a share means: a float is a fraction, an int a count."""
  return share if isinstance(share, int) else max(1, round(share * tokens))


def sample(kind: str, keys: jax.Array, grid: Grid, **options: Any) -> Split:
  """Draws a Split by the sampler called `kind`, one of KINDS.

  Raises:
    KeyError: for an unknown kind.
  """
  samplers = {"random": random, "tube": tube, "blocks": blocks}
  if kind not in samplers:
    raise KeyError(f"masks: no kind {kind!r}; {_closest(kind, KINDS)}")
  return samplers[kind](keys, grid, **options)


def random(keys: jax.Array, grid: Grid, *, context: int, target: int) -> Split:
  """Draws tokens one by one, without regard to place.

  Args:
    keys: [B] of `sample_keys`.
    grid: geometry of the tokens.
    context: K, number of visible tokens.
    target: M, number of tokens to predict.

  Raises:
    ValueError: if the counts do not fit the grid.
  """
  _require(grid, kind="random", context=context, target=target)

  def draw(key):
    order = jnp.argsort(jax.random.bits(key, (grid.tokens,)))
    return (
        jnp.sort(order[target : target + context]), jnp.sort(order[:target])
    )  # yapf: disable

  shown, hidden = jax.vmap(draw)(keys)
  return Split(shown.astype(jnp.int32), hidden.astype(jnp.int32))


def tube(keys: jax.Array, grid: Grid, *, context: int, target: int) -> Split:
  """Draws places in the (y, x) plane and keeps them through all of T and Z.

  Where a count is no multiple of the tokens of one tube, the last tube is thinned
  at random; no place ever holds both context and target.

  Args:
    keys: [B] of `sample_keys`.
    grid: geometry of the tokens.
    context: K, number of visible tokens.
    target: M, number of tokens to predict.

  Raises:
    ValueError: if the counts do not fit the grid.
  """
  _require(grid, kind="tube", context=context, target=target)
  t, z, y, x = grid.dims
  hidden_tubes, shown_tubes = -(-target // (t * z)), -(-context // (t * z))

  def draw(key):
    bits = jax.random.bits(key, (y * x + grid.tokens,))
    order = jnp.argsort(bits[: y * x])
    rank = jnp.tile(jnp.argsort(order), t * z)  # [N], of each token's tube
    hidden = rank < hidden_tubes
    shown = ~hidden & (rank < hidden_tubes + shown_tubes)
    split = _fill(bits[y * x :], shown, hidden, context, target)
    return split.replace(context_valid=None, target_valid=None)

  return jax.vmap(draw)(keys)


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

  return jax.vmap(draw, (0, None if weights is None else 0))(keys, weights)


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
  of the average.

  Args:
    volume: float [B, T, Z, Y, X, C].
    grid: geometry of the tokens.

  Returns:
    float32 [B, N], each row summing to 1.
  """
  level = grid.patchify(volume).astype(jnp.float32).mean(axis=-1)  # [B, N]
  level = jax.nn.relu(level - jnp.percentile(level, 25, axis=1, keepdims=True))
  cells = level.reshape(-1, *grid.dims)  # [B, t, z, y, x]
  rows = cells.mean(axis=(1, 2, 4), keepdims=True)
  weight = (cells + rows).reshape(level.shape) / 2
  mean = weight.mean(axis=1, keepdims=True)
  weight = jnp.where(mean > 0, weight / jnp.where(mean > 0, mean, 1), 1)
  weight = jnp.maximum(weight, 0.1)
  return weight / weight.sum(axis=1, keepdims=True)


def mask_faults(options: Mapping[str, Any], grid: Grid) -> list[str]:
  """Says what is wrong with a mask group of a config; an empty list is well.

  Args:
    options: `kind`, `context` and `target` (fractions of the tokens, or counts),
      and what the kind's sampler takes; blocks may name a `prior` of PRIORS.
    grid: geometry of the tokens.
  """
  kind = options.get("kind")
  if kind not in KINDS:
    return [f"kind {kind!r} is no mask; {_closest(kind, KINDS)}"]
  known = ("kind", "context", "target")
  needed = known
  if kind == "blocks":
    needed += ("count", "spatial_scale")
    known = needed + ("depth_scale", "aspect", "prior")
  faults = [
      f"{key} is no option of {kind}; {_closest(key, known)}"
      for key in options if key not in known
  ] + [f"{key} is missing" for key in needed if key not in options]  # yapf: disable
  if faults:
    return faults
  numbers = dict(options)
  for key in ("context", "target"):
    value = options[key]
    top = 1 if isinstance(value, float) else grid.tokens
    if not _is_number(value) or not 0 < value <= top:
      faults.append(
          f"{key} {value!r} must be a fraction in (0, 1] or a count of tokens, "
          f"1..{grid.tokens}"
      )
    else:
      numbers[key] = count(value, grid.tokens)
  if options.get("prior", "uniform") not in PRIORS:
    faults.append(f"prior {options['prior']!r}; {_closest(options['prior'], PRIORS)}")
  return faults or _count_faults(grid, **numbers)


def _count_faults(
    grid: Grid, *, kind: str, context: int, target: int, prior: str = "uniform",
    **shape: Any,
) -> list[str]:  # yapf: disable
  del prior  # checked by the caller; changes no count
  faults = []
  room, unit = grid.tokens, 1
  if kind == "tube":
    unit = grid.dims[0] * grid.dims[1]
    room = grid.dims[2] * grid.dims[3]
  wanted = -(-context // unit) + -(-target // unit)
  if min(context, target) < 1 or wanted > room:
    what = f"tubes of {unit} tokens" if kind == "tube" else "tokens"
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
