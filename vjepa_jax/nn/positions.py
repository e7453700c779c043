"""Where a token lies: fixed sin-cos tables and rotary positions.

Positions follow from token ids, so a masked subset keeps its absolute places.
An axis of the grid with one token says nothing and gets no channels.
"""

import difflib
import math

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.volumes.grid import Grid

LAYOUTS = ("rotation", "vjepa2")
UNITS = ("index", "mm")


@struct.dataclass
class Rope:
  """Cosines and sines that turn queries and keys.

  Attributes:
    cos: float32 [B or 1, N, d].
    sin: float32 [B or 1, N, d].
    layout: which channels form a pair: "rotation" (i, i + d // 2) or "vjepa2"
      (2i, 2i + 1).
  """

  cos: jax.Array
  sin: jax.Array
  layout: str = struct.field(pytree_node=False, default="rotation")

  def prepend(self, count: int) -> "Rope":
    """Puts `count` tokens without a position (class tokens) in front."""
    pad = [(0, 0), (count, 0), (0, 0)]
    return self.replace(
        cos=jnp.pad(self.cos, pad, constant_values=1.0), sin=jnp.pad(self.sin, pad)
    )


def active_axes(dims: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the axes that have more than one token."""
  return tuple(axis for axis, size in enumerate(dims) if size > 1)


def rope(
    grid: Grid,
    ids: jax.Array | None,
    head_dim: int,
    *,
    layout: str = "rotation",
    base: float = 10000.0,
    units: str = "index",
    reference: tuple[float, ...] | None = None,
    spacing: jax.Array | None = None,
) -> Rope:
  """Returns the tables of the tokens of a grid.

  Args:
    grid: the geometry.
    ids: int32 [B, K] token ids; None: all, in order.
    head_dim: d, channels of one head.
    layout: "rotation", or "vjepa2" for published V-JEPA 2 weights.
    base: of the geometric series of frequencies.
    units: "index", one patch is one step; or "mm", a place is
      index * patch * spacing / reference.
    reference: (T, Z, Y, X) what counts as one step, in s and mm; for "mm".
    spacing: float32 [B, 4] (dt, dz, dy, dx) in s and mm; for "mm". The caller
      answers for its values: NaN (unknown) on an axis with more than one token
      makes every output NaN.

  Raises:
    ValueError: for an unknown layout or unit, for "mm" without reference or
      spacing, and for what `rope_tables` refuses.
  """
  _check_known("layout", layout, LAYOUTS)
  _check_known("units", units, UNITS)
  ids = jnp.arange(grid.tokens)[None] if ids is None else ids
  axes = _vjepa2_axes(grid.dims) if layout == "vjepa2" else active_axes(grid.dims)
  axes = np.array(axes, int)
  coords = grid.coords_of(ids).astype(jnp.float32)[..., axes]  # [B or 1, N, A]
  if units == "mm":
    coords = coords * _physical_step(grid, layout, reference, spacing)[:, None, axes]
  return rope_tables(coords, head_dim, base=base, layout=layout)


def rope_tables(
    coords: jax.Array,
    head_dim: int,
    *,
    base: float = 10000.0,
    layout: str = "rotation",
) -> Rope:
  """Turns coordinates into the cosines and sines of every channel.

  The channels are split evenly among the axes; what does not divide stays
  unturned. "rotation" is RoPE (Su et al. 2021, arXiv:2104.09864) per axis, the
  two members of a pair d // 2 apart, which costs the device one swap of halves.
  "vjepa2" repeats what V-JEPA 2's weights were trained with
  (facebookresearch/vjepa2, src/models/utils/modules.py): three axes of
  2 * (d // 3 // 2) channels, pairs (2i, 2i + 1), but the angles tiled as
  [f0 .. fn, f0 .. fn], so that the members of a pair turn by different angles
  and the map is no rotation.

  Args:
    coords: float32 [..., N, A], one column an axis that counts.
    head_dim: d.
    base: of the geometric series of frequencies.
    layout: "rotation" or "vjepa2".

  Raises:
    ValueError: if d has no pair for some axis, or "vjepa2" is not given three.
  """
  axes = coords.shape[-1]
  if layout == "vjepa2" and axes != 3:
    raise ValueError(f"rope layout 'vjepa2' wants 3 axes of coordinates, got {axes}")
  pairs = head_dim // 2 // axes if axes else 0
  if axes and not pairs:
    raise ValueError(
        f"rope: a head of {head_dim} channels has no pair for each of {axes} axes; "
        f"it needs at least {2 * axes}"
    )
  frequencies = base ** (-jnp.arange(pairs, dtype=jnp.float32) / max(pairs, 1))
  angles = coords.astype(jnp.float32)[..., None] * frequencies  # [..., N, A, pairs]
  if layout == "vjepa2":
    angles = jnp.concatenate([angles, angles], axis=-1)
    angles = angles.reshape(*angles.shape[:-2], axes * pairs * 2)
    return Rope(*_fill(angles, head_dim), layout=layout)
  angles = angles.reshape(*angles.shape[:-2], axes * pairs)
  cos, sin = _fill(angles, head_dim // 2)
  odd = [(0, 0)] * (cos.ndim - 1) + [(0, head_dim % 2)]
  cos = jnp.pad(jnp.concatenate([cos, cos], axis=-1), odd, constant_values=1.0)
  sin = jnp.pad(jnp.concatenate([sin, sin], axis=-1), odd)
  return Rope(cos, sin, layout=layout)


def apply_rope(x: jax.Array, tables: Rope) -> jax.Array:
  """Turns queries or keys [B, H, N, d] by the tables, in float32."""
  cos, sin = tables.cos[:, None], tables.sin[:, None]  # [B or 1, 1, N, d]
  partner = _adjacent if tables.layout == "vjepa2" else _halves
  x32 = x.astype(jnp.float32)
  if x.dtype == jnp.float32:
    return x32 * cos + partner(x32) * sin
  # A product with a signed permutation is exact and one pass over x, where cutting
  # and joining the channels of a TPU's vector registers takes four.
  turn = partner(jnp.eye(x.shape[-1])).astype(x.dtype)
  turned = jnp.einsum("bhnd,de->bhne", x, turn, preferred_element_type=jnp.float32)
  return (x32 * cos + turned * sin).astype(x.dtype)


def sincos(
    dims: tuple[int, ...],
    width: int,
    *,
    uniform: bool = False,
    class_token: bool = False,
) -> np.ndarray:
  """Returns the fixed table of a grid, float64 [N (+ 1), D].

  The same numbers as V-JEPA's `get_{1,2,3}d_sincos_pos_embed`
  (facebookresearch/vjepa2, src/models/utils/pos_embs.py). Three axes: D/2 channels
  for the first and D/4 for each other, or equal thirds, rounded up and cut to D.
  One, two or four axes: equal shares.

  Args:
    dims: tokens per axis, slowest first.
    width: D.
    uniform: equal shares for three axes also ("uniform_power" there).
    class_token: put a row of zeros in front.

  Raises:
    ValueError: if D cannot be shared among the axes.
  """
  axes = max(len(dims), 1)
  if axes == 3 and not uniform:
    shares = (width // 2, width // 4, width // 4)
  else:
    shares = (2 * math.ceil(width / (2 * axes)),) * axes
  if sum(shares) < width or any(share % 2 for share in shares):
    step = 8 if axes == 3 and not uniform else 2
    raise ValueError(
        f"sincos: width {width} cannot be shared as sines and cosines among "
        f"{axes} axes; nearest {width // step * step} or {(width // step + 1) * step}"
    )
  coords = np.indices(dims or (1,)).reshape(axes, -1)  # [A, N]
  parts = [_sincos_axis(c, share) for c, share in zip(coords, shares, strict=True)]
  table = np.concatenate(parts, axis=-1)[:, :width]
  return np.concatenate([np.zeros((1, width)), table]) if class_token else table


def sincos_table(dims: tuple[int, ...], width: int) -> np.ndarray:
  """Returns `sincos` of a grid's axes that have more than one token, [N, D].

  As of `sincos_at`: where other axes have more than one, the channels mean others.
  """
  return sincos(tuple(size for size in dims if size > 1), width)


def flat_sincos(tokens: int, width: int) -> np.ndarray:
  """Returns the fixed table of a row of tokens, float64 [N, D].

  Sine and cosine of a frequency lie side by side, and places are counted through
  the whole grid as if it were a line: VideoMAE's `get_sinusoid_encoding_table`.
  """
  channels = np.arange(width)
  angles = np.arange(tokens)[:, None] / 10000.0 ** (channels // 2 * 2 / width)
  return np.where(channels % 2, np.cos(angles), np.sin(angles))


def sincos_at(coords: jax.Array, width: int) -> jax.Array:
  """Returns sines and cosines of coordinates, float32 [..., D].

  Equal shares of the channels for each axis, rounded up and cut to D, each of the
  frequencies of `sincos`. With another number of axes every axis has other channels:
  what was learned from clips does not know the places of single time points.

  Args:
    coords: float32 [..., A], one column an axis that counts; A may be 0.
    width: D.
  """
  axes = coords.shape[-1]
  if not axes:
    return jnp.zeros((*coords.shape[:-1], width))
  pairs = -(-width // (2 * axes))
  omega = 10000.0 ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
  angles = coords.astype(jnp.float32)[..., None] * omega  # [..., A, pairs]
  table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
  return table.reshape(*coords.shape[:-1], -1)[..., :width]


def coordinates(
    grid: Grid,
    ids: jax.Array | None,
    *,
    units: str = "index",
    reference: tuple[float, ...] | None = None,
    spacing: jax.Array | None = None,
) -> jax.Array:
  """Returns where tokens lie on the axes that have more than one, [B or 1, N, A].

  Args and errors are those of `rope`.
  """
  _check_known("units", units, UNITS)
  ids = jnp.arange(grid.tokens)[None] if ids is None else ids
  axes = np.array(active_axes(grid.dims), int)
  coords = grid.coords_of(ids).astype(jnp.float32)[..., axes]
  if units == "mm":
    step = _physical_step(grid, "rotation", reference, spacing)
    coords = coords * step[:, None, axes]
  return coords


def resize_table(
    table: jax.Array,
    dims: tuple[int, ...],
    to: tuple[int, ...],
    method: str = "linear",
) -> jax.Array:
  """Resamples a table [N, D] of grid `dims` onto grid `to`, [M, D].

  "linear" keeps centres of cells in place and smooths nothing, as V-JEPA's
  `interpolate_pos_encoding` does it; "nearest" takes cell floor(i n / m), as
  torch's `interpolate` and with it TimeSformer does.
  """
  width = table.shape[-1]
  if method == "nearest":
    picked = [np.arange(m) * n // m for n, m in zip(dims, to, strict=True)]
    return table.reshape(*dims, width)[np.ix_(*picked)].reshape(-1, width)
  resized = jax.image.resize(
      table.reshape(*dims, width), (*to, width), "linear", antialias=False
  )
  return resized.reshape(-1, width)


def _vjepa2_axes(dims: tuple[int, ...]) -> tuple[int, int, int]:
  t, z, _, _ = dims
  if t > 1 and z > 1:
    raise ValueError(
        f"rope layout 'vjepa2' knows three axes, the grid {dims} has four with more "
        "than one token; use layout 'rotation'"
    )
  return (1 if z > 1 else 0, 2, 3)


def _physical_step(grid, layout, reference, spacing) -> jax.Array:
  """Returns the size of one patch in units of the reference, [B, 4]."""
  if layout == "vjepa2":
    raise ValueError("rope layout 'vjepa2' knows units 'index' only, got 'mm'")
  if spacing is None:
    raise ValueError(
        "rope units 'mm' need the spacing [B, 4] of each volume; pass spacing= or "
        "use units 'index'"
    )
  if reference is None or len(reference) != 4 or min(reference) <= 0:
    raise ValueError(
        "rope units 'mm' need reference=(s, mm, mm, mm), positive, what counts as "
        f"one step along T, Z, Y, X; got {reference}"
    )
  step = np.array(grid.stride or grid.patch, np.float32) / np.array(reference, np.float32)
  return spacing.astype(jnp.float32) * step


def _check_known(what: str, got: str, known: tuple[str, ...]) -> None:
  if got not in known:
    nearest = ", ".join(difflib.get_close_matches(str(got), known, 3, 0.0))
    raise ValueError(f"rope {what}={got!r} is not known; the closest: {nearest}")


def _fill(angles: jax.Array, channels: int) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of angles [..., n], the channels beyond n left unturned."""
  rest = [(0, 0)] * (angles.ndim - 1) + [(0, channels - angles.shape[-1])]
  angles = jnp.pad(angles, rest)
  return jnp.cos(angles), jnp.sin(angles)


def _halves(x: jax.Array) -> jax.Array:
  half = x.shape[-1] // 2
  parts = [-x[..., half : 2 * half], x[..., :half], x[..., 2 * half :]]
  return jnp.concatenate(parts, axis=-1)


def _adjacent(x: jax.Array) -> jax.Array:
  even = x.shape[-1] // 2 * 2
  pairs = x[..., :even].reshape(*x.shape[:-1], -1, 2)
  turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1)
  return jnp.concatenate(
      [turned.reshape(*x.shape[:-1], even), x[..., even:]], axis=-1
  )


def _sincos_axis(coords: np.ndarray, channels: int) -> np.ndarray:
  omega = 10000.0 ** (-np.arange(channels // 2) / (channels / 2))
  angles = coords[:, None] * omega
  return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
