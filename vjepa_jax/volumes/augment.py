"""From a host batch to a device batch: cast, normalise, one random view.

Everything is a pure function of (batch, key), jittable, and drawn for each sample
from its own key, so that accumulation and device count change nothing. One
geometric view serves context and target alike: token i of both is one place in
the anatomy.

No voxel is fetched through an index of its own, which a TPU does slowly: scale and
shift are products with a matrix, a rotation is three shears of static shifts. What
happens within a plane is done plane by plane: it stays in the cache, and XLA, which
computes a pass anew for each of its readers, cannot join the passes of a volume.
"""

from collections.abc import Callable, Mapping
import difflib
import math
from typing import Any

import jax
import jax.numpy as jnp

from vjepa_jax.volumes.grid import AXES
from vjepa_jax.volumes.masks import sample_keys

Batch = Mapping[str, jax.Array]
Augment = Callable[..., dict[str, jax.Array]]

NORMALIZATIONS = ("zscore", "unit", "range", "none")
VIEWS = ("shared", "shared_geometry")
NOISE_GENERATORS = ("threefry", "rbg")
_PROBABILITIES = ("rot90", "noise_probability")
_AMOUNTS = ("rotate", "brightness", "contrast", "gamma", "noise_std")
_PER_AXIS = ("flip", "shift", "scale")
_EPSILON = 1e-6
# Beyond it the shears throw the corners far out; `rot90` turns further.
_MAX_ROTATE = math.pi / 4
# Outputs of one product; the inputs that they can need are few more.
_BLOCK = 64


def make_augment(
    *,
    normalize: str = "zscore",
    crop: tuple[int, int, int, int] | None = None,
    flip: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
    handed: bool = False,
    shift: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
    scale: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
    rotate: float = 0.0,
    rotate_axes: tuple[str, str] = ("Y", "X"),
    rot90: float = 0.0,
    rot90_axes: tuple[str, str] = ("Y", "X"),
    brightness: float = 0.0,
    contrast: float = 0.0,
    gamma: float = 0.0,
    noise_std: float = 0.0,
    noise_probability: float = 1.0,
    noise_generator: str = "threefry",
    views: str = "shared",
) -> Augment:
  """Builds `augment(batch, key, *, train) -> batch`; all that varies is off by default.

  Args:
    normalize: "zscore" by the batch's stored `mean` and `std`; "unit" maps each
      volume's own least and greatest voxel to 0 and 1; "range" the greatest number
      that the stored integers can be to 1, alike for all; "none" only casts.
    crop: voxels (T, Z, Y, X) to cut out, at random in training, else the centre, or
      where the batch says by `crop_start` int32 [B, 4], the first voxel along each
      axis. None keeps the volume whole.
    flip: probability of mirroring each axis. Mirroring Y puts a retina upside down.
    handed: whether what is left-handed stays so: X is then mirrored just where one of
      Z and Y alone is, which makes half turns of the flips; flip has no X then.
    shift: largest move along each axis, in voxels of the stored volume.
    scale: largest relative change of size along each axis; 0.1 draws 0.9..1.1.
    rotate: largest angle in rad in the plane of `rotate_axes`, in voxel units, at
      most pi / 4.
    rotate_axes: names of two axes.
    rot90: probability of a quarter, half or three-quarter turn.
    rot90_axes: names of two axes of equal length.
    brightness: largest number added to the normalised volume.
    contrast: largest relative change of the normalised volume.
    gamma: largest |log exponent|, applied between the volume's own extremes.
    noise_std: standard deviation of Gaussian noise on the normalised volume.
    noise_probability: how often there is noise.
    noise_generator: "threefry", or "rbg", the hardware's own. Both draw for each
      sample from its own key; rbg does so one sample after the other, on a mesh
      every device for all of the batch, and is slower on a CPU.
    views: "shared", one volume for context and target; "shared_geometry" adds
      `volume_context`, the same geometry under its own photometric draws.

  Returns:
    augment(batch, key, *, train). The batch holds `volume` [B, T, Z, Y, X, C] of
    any type, `_position` int32 [B] and, for zscore, `mean` and `std` float32 [B].
    It comes back with `volume` float32, `spacing` as the view has it, and all
    else as it was. Beyond the volume's border, its edge is repeated.

  Raises:
    ValueError: if an option is out of its range; names all that are.
  """
  options = dict(locals())
  faults = augment_faults(options)
  if faults:
    raise ValueError("make_augment: " + "; ".join(faults))
  photometric = {
      name: options[name]
      for name in (
          "brightness", "contrast", "gamma", "noise_std", "noise_probability",
          "noise_generator",
      )
  }

  def augment(batch: Batch, key: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    batch = dict(batch)
    volume = batch["volume"]
    _check_shape(volume, options)
    if not train:
      starts = batch.pop("crop_start", None)
      volume = _normalize(volume, batch, normalize)
      batch["volume"] = _crop(volume, crop, starts)
      return batch
    keys = sample_keys(key, batch["_position"])
    place_key, photo_key, context_key = (
        jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in range(3)
    )
    spacing = batch.get("spacing", jnp.full((volume.shape[0], 4), jnp.nan))
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (19,)))(place_key)
    # Turned in the stored type, a quarter of the bytes.
    volume, spacing = _mirror(volume, spacing, uniform, options)
    volume = _normalize(volume, batch, normalize)
    volume, spacing = _move(volume, spacing, uniform, options)
    if "spacing" in batch:
      batch["spacing"] = spacing
    batch["volume"] = _shade(volume, photo_key, **photometric)
    if views == "shared_geometry":
      batch["volume_context"] = _shade(volume, context_key, **photometric)
    return batch

  return augment


def augment_faults(
    options: Mapping[str, Any], voxels: tuple[int, int, int, int] | None = None
) -> list[str]:
  """Says what is wrong with the options of `make_augment`; an empty list is well.

  Args:
    options: keywords of `make_augment`; those left out are well.
    voxels: (T, Z, Y, X) of the stored volume, where known.
  """
  faults = []
  for name, names in (
      ("normalize", NORMALIZATIONS), ("views", VIEWS),
      ("noise_generator", NOISE_GENERATORS),
  ):
    if options.get(name, names[0]) not in names:
      near = difflib.get_close_matches(str(options[name]), names, n=3, cutoff=0.0)
      faults.append(f"{name} {options[name]!r} is unknown; closest: {', '.join(near)}")
  for name in _PER_AXIS:
    top = {"flip": 1.0, "scale": 0.9}.get(name, float("inf"))
    values = options.get(name, (0.0,) * 4)
    if not _numbers(values, 4) or not all(0 <= v <= top for v in values):
      faults.append(
          f"{name} {values!r} must be four numbers in 0..{top} for T, Z, Y, X"
      )
  for name in _PROBABILITIES + _AMOUNTS:
    value = options.get(name, 0.0)
    top = 1.0 if name in _PROBABILITIES else float("inf")
    top = _MAX_ROTATE if name == "rotate" else top
    if not _numbers((value,), 1) or not 0 <= value <= top:
      faults.append(f"{name} {value!r} must be a number in 0..{top}")
  flip = options.get("flip", (0.0,) * 4)
  if options.get("handed") and _numbers(flip, 4) and flip[3]:
    faults.append(
        f"flip {flip!r} with handed: mirrors X where it must; give X no "
        "probability of its own"
    )
  for name in ("rotate_axes", "rot90_axes"):
    axes = options.get(name, ("Y", "X"))
    if len(axes) != 2 or len(set(axes)) != 2 or not set(axes) <= set(AXES):
      faults.append(f"{name} {axes!r} must be two of {AXES}")
  return faults + _size_faults(options, voxels)


def _size_faults(options, voxels) -> list[str]:
  faults = []
  crop = options.get("crop")
  if crop is not None and (not _numbers(crop, 4) or min(crop) < 1):
    return [f"crop {crop!r} must be four voxel counts of at least 1 for T, Z, Y, X"]
  if crop is not None and voxels is not None:
    faults = [
        f"crop {tuple(crop)}: {axis}={c} is larger than the volume's {v}"
        for axis, c, v in zip(AXES, crop, voxels, strict=True) if c > v
    ]  # yapf: disable
  axes = options.get("rot90_axes", ("Y", "X"))
  if options.get("rot90") and voxels is not None and set(axes) <= set(AXES):
    sizes = [voxels[AXES.index(a)] for a in axes]
    if len(set(sizes)) != 1:
      faults.append(f"rot90 needs axes {axes} of equal length, the volume has {sizes}")
  return faults


def _numbers(values: Any, count: int) -> bool:
  return (
      isinstance(values, (tuple, list))
      and len(values) == count
      and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
  )


def _check_shape(volume: jax.Array, options: Mapping[str, Any]) -> None:
  if volume.ndim != 6:
    raise ValueError(
        f"augment: volume has shape {tuple(volume.shape)}, wanted [B, T, Z, Y, X, C]"
    )
  faults = _size_faults(options, volume.shape[1:5])
  if faults:
    raise ValueError("augment: " + "; ".join(faults))


def _per_sample(values: jax.Array) -> jax.Array:
  """[B] as [B, 1, 1, 1, 1, 1], to meet a volume."""
  return values.reshape(-1, 1, 1, 1, 1, 1)


def _normalize(volume: jax.Array, batch: Batch, how: str) -> jax.Array:
  if how == "range" and jnp.issubdtype(volume.dtype, jnp.integer):
    return volume.astype(jnp.float32) / jnp.iinfo(volume.dtype).max
  volume = volume.astype(jnp.float32)
  if how == "zscore":
    std = jnp.maximum(batch["std"].astype(jnp.float32), _EPSILON)
    return (volume - _per_sample(batch["mean"])) / _per_sample(std)
  if how == "unit":
    low, high = _extremes(volume)
    return (volume - low) / jnp.maximum(high - low, _EPSILON)
  return volume


def _extremes(volume: jax.Array) -> tuple[jax.Array, jax.Array]:
  axes = tuple(range(1, 6))
  return volume.min(axes, keepdims=True), volume.max(axes, keepdims=True)


def _mirror(
    volume: jax.Array, spacing: jax.Array, uniform: jax.Array,
    options: Mapping[str, Any],
) -> tuple[jax.Array, jax.Array]:
  """Quarter turns and flips; the other moves favour no side, so they may follow."""
  plane = [AXES.index(a) for a in options["rot90_axes"]]
  flips = [bool(probability) for probability in options["flip"]]
  mirrored = uniform[:, 15:] < jnp.asarray(options["flip"])  # [B, 4]
  if options["handed"]:
    flips[3] = flips[1] or flips[2]
    mirrored = mirrored.at[:, 3].set(mirrored[:, 1] ^ mirrored[:, 2])
  turns = 1 + jnp.floor(uniform[:, 13] * 3).astype(jnp.int32)
  turns = jnp.where(uniform[:, 14] < options["rot90"], turns, 0)

  def change(planes: jax.Array, number: jax.Array) -> jax.Array:
    del number
    if options["rot90"]:
      planes = _turn(planes, 1, 2, turns)
    for place, axis in enumerate(plane):
      if flips[axis]:
        planes = _flip_where(planes, 1 + place, mirrored[:, axis])
    return planes

  if options["rot90"]:
    order = jnp.asarray([
        plane[1 - plane.index(a)] if a in plane else a for a in range(4)
    ])
    spacing = jnp.where(turns[:, None] % 2 == 1, spacing[:, order], spacing)
  if options["rot90"] or any(flips[axis] for axis in plane):
    volume = _by_plane(change, volume, *(axis + 1 for axis in plane))
  for axis in set(range(4)) - set(plane):
    if flips[axis]:
      volume = _flip_where(volume, axis + 1, mirrored[:, axis])
  return volume, spacing


def _flip_where(array: jax.Array, axis: int, mirrored: jax.Array) -> jax.Array:
  """Mirrors the samples [B, ...] that `mirrored` [B] names."""
  mirrored = mirrored.reshape(-1, *[1] * (array.ndim - 1))
  return jnp.where(mirrored, jnp.flip(array, axis), array)


def _move(
    volume: jax.Array, spacing: jax.Array, uniform: jax.Array,
    options: Mapping[str, Any],
) -> tuple[jax.Array, jax.Array]:
  """Scale, shift, rotate and crop, in this order."""
  signed = 2 * uniform - 1
  scale, shift = options["scale"], options["shift"]
  within = {axis: None for axis in range(4) if scale[axis] or shift[axis]}
  for axis in within:
    factor = 1 + scale[axis] * signed[:, axis]
    within[axis] = (factor, shift[axis] * signed[:, 4 + axis])
    spacing = spacing.at[:, axis].divide(factor)
  # Within a frame where it is the plane of the rotation as well.
  plane = [AXES.index(a) for a in options["rotate_axes"]]
  for axis in sorted(set(within) - set(plane)):
    volume = _resample(volume, axis + 1, *within[axis], scale[axis], shift[axis])

  def change(planes: jax.Array, number: jax.Array) -> jax.Array:
    del number
    for place, axis in enumerate(plane):
      if axis in within:
        planes = _resample(
            planes, 1 + place, *within[axis], scale[axis], shift[axis]
        )
    if options["rotate"]:
      planes = _rotate(planes, options["rotate"] * signed[:, 8], options["rotate"])
    return planes

  if options["rotate"] or set(within) & set(plane):
    volume = _by_plane(change, volume, *(axis + 1 for axis in plane))
  return _crop_anywhere(volume, options["crop"], uniform[:, 9:13]), spacing


def _by_plane(
    change: Callable[[jax.Array, jax.Array], jax.Array],
    volume: jax.Array, first: int, second: int,
) -> jax.Array:
  """Applies change([B, rows, columns], number) to one plane after the other.

  Where no plane holds the axis T, the planes of all time points go together: a mesh
  may split it, and whoever picks from an axis that is split gets all of it sent.
  """
  lines = jnp.moveaxis(volume, (first, second), (-2, -1))
  together = first > 1 and second > 1 and volume.shape[1] > 1
  times = volume.shape[1] if together else 1
  planes = lines.reshape(len(volume), times, -1, *lines.shape[-2:])

  def body(number, planes):
    plane = jax.lax.dynamic_index_in_dim(planes, number, 2, keepdims=False)
    if together:
      numbers = number + planes.shape[2] * jnp.arange(times)
      plane = jax.vmap(change, in_axes=(1, 0), out_axes=1)(plane, numbers)
    else:
      plane = change(plane[:, 0], number)[:, None]
    return jax.lax.dynamic_update_index_in_dim(planes, plane, number, 2)

  planes = jax.lax.fori_loop(0, planes.shape[2], body, planes)
  return jnp.moveaxis(planes.reshape(lines.shape), (-2, -1), (first, second))


def _resample(
    array: jax.Array, axis: int, factor: jax.Array, move: jax.Array,
    max_scale: float, max_shift: float,
) -> jax.Array:
  """Magnifies one axis about its centre and moves it, by linear interpolation.

  A product with a matrix [B, out, in] of two weights a row, in blocks: how far a
  place can move is known, so that most of the matrix is known to be zero.

  Args:
    array: float32 [B, ...].
    axis: not the first.
    factor: [B].
    move: voxels [B].
    max_scale: bound of |factor - 1|.
    max_shift: bound of |move|.
  """
  size = array.shape[axis]
  centre = (size - 1) / 2
  source = (jnp.arange(size) - centre - move[:, None]) / factor[:, None] + centre
  source = jnp.clip(source, 0, size - 1)  # [B, out]
  letters = "byxcdef"[: array.ndim]
  out = letters.replace(letters[axis], "o")
  parts = []
  for start in range(0, size, _BLOCK):
    stop = min(start + _BLOCK, size)
    low, high = _reach(start, stop, size, max_scale, max_shift)
    near = jnp.abs(source[:, start:stop, None] - jnp.arange(low, high))
    parts.append(jnp.einsum(
        f"{letters},bo{letters[axis]}->{out}",
        jax.lax.slice_in_dim(array, low, high, axis=axis), jnp.maximum(0, 1 - near),
        precision=jax.lax.Precision.HIGH,
    ))  # yapf: disable
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _reach(
    start: int, stop: int, size: int, max_scale: float, max_shift: float
) -> tuple[int, int]:
  """Returns the range of inputs that outputs start..stop can be drawn from."""
  centre = (size - 1) / 2
  sources = [
      (place - centre - move) / factor + centre
      for place in (start, stop - 1)
      for move in (-max_shift, max_shift)
      for factor in (1 - max_scale, 1 + max_scale)
  ]
  # One more on either side: the draws are rounded.
  low, high = math.floor(min(sources)) - 1, math.ceil(max(sources)) + 2
  return min(max(low, 0), size - 1), max(min(high, size), 1)


def _rotate(planes: jax.Array, angle: jax.Array, max_angle: float) -> jax.Array:
  """Turns planes [B, rows, columns] by three shears, each a 1-D interpolation."""
  tangent, sine = math.tan(max_angle / 2), math.sin(max_angle)
  planes = _shear(planes, 2, -jnp.tan(angle / 2), tangent)
  planes = _shear(planes, 1, jnp.sin(angle), sine)
  return _shear(planes, 2, -jnp.tan(angle / 2), tangent)


def _shear(
    planes: jax.Array, along: int, slope: jax.Array, max_slope: float
) -> jax.Array:
  """Moves each line of axis `along` by slope times its place on the other axis.

  Whole voxels by powers of two, each line taking part or not, then the fraction.

  Args:
    planes: float32 [B, rows, columns].
    along: 1 or 2.
    slope: [B].
    max_slope: bound of |slope|.
  """
  size, lines = planes.shape[along], planes.shape[3 - along]
  reach = math.ceil(max_slope * (lines - 1) / 2)
  bits = (2 * reach).bit_length()
  offset = slope[:, None] * (jnp.arange(lines) - (lines - 1) / 2)  # [B, lines]
  offset = jnp.expand_dims(jnp.clip(reach - offset, 0, 2 * reach), along)
  whole = jnp.floor(offset).astype(jnp.int32)
  pad = [(0, 0)] * 3
  pad[along] = (reach, 2**bits - reach)
  planes = jnp.pad(planes, pad, mode="edge")
  cut = lambda start, length: jax.lax.slice_in_dim(
      planes, start, start + length, axis=along
  )
  for bit in reversed(range(bits)):
    length = planes.shape[along] - 2**bit
    planes = jnp.where(whole >> bit & 1, cut(2**bit, length), cut(0, length))
  weight = offset - whole
  return cut(0, size) * (1 - weight) + cut(1, size) * weight


def _crop_anywhere(
    volume: jax.Array, crop: tuple[int, int, int, int] | None, uniform: jax.Array
) -> jax.Array:
  """Cuts `crop` voxels out, at places [B, 4] in [0, 1)."""
  if crop is None:
    return volume
  spare = jnp.asarray(volume.shape[1:5]) - jnp.asarray(crop)
  starts = jnp.minimum(jnp.floor(uniform * (spare + 1)).astype(jnp.int32), spare)
  return _crop(volume, crop, starts)


def _crop(
    volume: jax.Array,
    crop: tuple[int, int, int, int] | None,
    starts: jax.Array | None,
) -> jax.Array:
  """Cuts `crop` voxels out from `starts` [B, 4] on, or about the centre."""
  if crop is None or tuple(crop) == volume.shape[1:5]:
    return volume
  if starts is None:
    spare = jnp.asarray(volume.shape[1:5]) - jnp.asarray(crop)
    starts = jnp.broadcast_to(spare // 2, (volume.shape[0], 4))
  starts = jnp.pad(starts, ((0, 0), (0, 1)))
  size = (*crop, volume.shape[-1])
  return jax.vmap(lambda v, s: jax.lax.dynamic_slice(v, s, size))(volume, starts)


def _turn(array: jax.Array, first: int, second: int, turns: jax.Array) -> jax.Array:
  """Turns a square plane of [B, ...] by quarters, 0..3 for each sample."""
  odd = (turns % 2 == 1).reshape(-1, *[1] * (array.ndim - 1))
  array = jnp.where(odd, jnp.swapaxes(array, first, second), array)
  # A quarter turn is a transposition and one flip, a half turn is two flips.
  for axis, flipped in ((first, (1, 2)), (second, (2, 3))):
    mirrored = (turns == flipped[0]) | (turns == flipped[1])
    array = _flip_where(array, axis, mirrored)
  return array


def _shade(
    volume: jax.Array,
    keys: jax.Array,
    *,
    brightness: float,
    contrast: float,
    gamma: float,
    noise_std: float,
    noise_probability: float,
    noise_generator: str,
) -> jax.Array:
  """Gamma, contrast, brightness and noise, in this order."""
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (4,)))(keys)
  signed = [_per_sample(u) for u in (2 * uniform - 1).T]
  if gamma:
    low, high = _extremes(volume)
    span = jnp.maximum(high - low, _EPSILON)
    # Compiled, the volume may be rounded anew here and lie a little below its least.
    share = jnp.clip((volume - low) / span, 0.0, 1.0)
    volume = share ** jnp.exp(gamma * signed[0]) * span + low
  if contrast:
    volume = volume * (1 + contrast * signed[1])
  if brightness:
    volume = volume + brightness * signed[2]
  if noise_std:
    noise_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
    std = jnp.where(uniform[:, 3] < noise_probability, noise_std, 0.0)
    volume = _add_noise(volume, noise_keys, std, noise_generator)
  return volume


def _add_noise(
    volume: jax.Array, keys: jax.Array, std: jax.Array, generator: str
) -> jax.Array:
  """Adds normal noise of the sample's own std [B], drawn from its own key."""

  def change(planes: jax.Array, number: jax.Array) -> jax.Array:
    draws = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    if generator == "rbg":
      # Under vmap it would draw all samples from the first one's key.
      data = jnp.tile(jax.random.key_data(draws), 2)  # [B, 4]
      noise = jax.lax.map(
          lambda key: jax.random.normal(
              jax.random.wrap_key_data(key, impl="rbg"), planes.shape[1:]
          ), data,
      )
    else:
      noise = jax.vmap(lambda key: jax.random.normal(key, planes.shape[1:]))(draws)
    return planes + std[:, None, None] * noise

  return _by_plane(change, volume, 3, 4)
