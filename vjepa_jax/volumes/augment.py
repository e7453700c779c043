"""From a host batch to a device batch: cast, normalise, one random view.

Everything is a pure function of (batch, key), jittable, and drawn for each sample
from its own key, so that accumulation and device count change nothing. One
geometric view serves context and target alike: token i of both is one place in
the anatomy.
"""

from collections.abc import Callable, Mapping
import difflib
from typing import Any

import jax
import jax.numpy as jnp

from vjepa_jax.volumes.grid import AXES
from vjepa_jax.volumes.masks import sample_keys

Batch = Mapping[str, jax.Array]
Augment = Callable[..., dict[str, jax.Array]]

NORMALIZATIONS = ("zscore", "unit", "none")
VIEWS = ("shared", "shared_geometry")
_PROBABILITIES = ("rot90", "noise_probability")
_AMOUNTS = ("rotate", "brightness", "contrast", "gamma", "noise_std")
_PER_AXIS = ("flip", "shift", "scale")
_EPSILON = 1e-6


def make_augment(
    *,
    normalize: str = "zscore",
    crop: tuple[int, int, int, int] | None = None,
    flip: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
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
    views: str = "shared",
) -> Augment:
  """Builds `augment(batch, key, *, train) -> batch`; all that varies is off by default.

  Args:
    normalize: "zscore" by the batch's stored `mean` and `std`; "unit" maps each
      volume's own least and greatest voxel to 0 and 1; "none" only casts.
    crop: voxels (T, Z, Y, X) to cut out, at random in training, else the centre.
      None keeps the volume whole.
    flip: probability of mirroring each axis. Mirroring Y puts a retina upside down.
    shift: largest move along each axis, in voxels of the stored volume.
    scale: largest relative change of size along each axis; 0.1 draws 0.9..1.1.
    rotate: largest angle in rad in the plane of `rotate_axes`, in voxel units.
    rotate_axes: names of two axes.
    rot90: probability of a quarter, half or three-quarter turn.
    rot90_axes: names of two axes of equal length.
    brightness: largest number added to the normalised volume.
    contrast: largest relative change of the normalised volume.
    gamma: largest |log exponent|, applied between the volume's own extremes.
    noise_std: standard deviation of Gaussian noise on the normalised volume.
    noise_probability: how often there is noise.
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
      for name in ("brightness", "contrast", "gamma", "noise_std", "noise_probability")
  }

  def augment(batch: Batch, key: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    batch = dict(batch)
    volume = batch["volume"]
    _check_shape(volume, options)
    volume = _normalize(volume, batch, normalize)
    if not train:
      batch["volume"] = _crop(volume, crop, None)
      return batch
    keys = sample_keys(key, batch["_position"])
    place_key, photo_key, context_key = (
        jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in range(3)
    )
    spacing = batch.get("spacing", jnp.full((volume.shape[0], 4), jnp.nan))
    volume, spacing = _move(volume, spacing, place_key, options)
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
  for name, names in (("normalize", NORMALIZATIONS), ("views", VIEWS)):
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
    if not _numbers((value,), 1) or not 0 <= value <= top:
      faults.append(f"{name} {value!r} must be a number in 0..{top}")
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


def _move(
    volume: jax.Array, spacing: jax.Array, keys: jax.Array, options: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array]:
  """Scale, shift, rotate, crop, turn and flip, in this order."""
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (19,)))(keys)  # [B, 19]
  signed = 2 * uniform - 1
  for axis in range(4):
    if options["scale"][axis] or options["shift"][axis]:
      factor = 1 + options["scale"][axis] * signed[:, axis]
      move = options["shift"][axis] * signed[:, 4 + axis]
      volume = _resample(volume, axis + 1, factor, move)
      spacing = spacing.at[:, axis].divide(factor)
  if options["rotate"]:
    axes = [AXES.index(a) + 1 for a in options["rotate_axes"]]
    volume = _rotate(volume, *axes, options["rotate"] * signed[:, 8])
  volume = _crop(volume, options["crop"], uniform[:, 9:13])
  if options["rot90"]:
    axes = [AXES.index(a) + 1 for a in options["rot90_axes"]]
    turns = 1 + jnp.floor(uniform[:, 13] * 3).astype(jnp.int32)
    turns = jnp.where(uniform[:, 14] < options["rot90"], turns, 0)
    volume, spacing = _turn(volume, spacing, *axes, turns)
  for axis, probability in enumerate(options["flip"]):
    if probability:
      mirrored = _per_sample(uniform[:, 15 + axis] < probability)
      volume = jnp.where(mirrored, jnp.flip(volume, axis + 1), volume)
  return volume, spacing


def _resample(
    volume: jax.Array, axis: int, factor: jax.Array, move: jax.Array
) -> jax.Array:
  """Magnifies one axis about its centre and moves it, by linear interpolation.

  As a product with a matrix [B, out, in] of two weights a row: a gather over the
  volume is an order of magnitude slower on a TPU.
  """
  size = volume.shape[axis]
  centre = (size - 1) / 2
  place = jnp.arange(size)
  source = (place - centre - move[:, None]) / factor[:, None] + centre  # [B, out]
  source = jnp.clip(source, 0, size - 1)
  matrix = jnp.maximum(0, 1 - jnp.abs(source[:, :, None] - place))
  letters = "btzyxc"
  out = letters.replace(letters[axis], "o")
  return jnp.einsum(
      f"{letters},bo{letters[axis]}->{out}", volume, matrix,
      precision=jax.lax.Precision.HIGH,
  )  # yapf: disable


def _rotate(volume: jax.Array, first: int, second: int, angle: jax.Array) -> jax.Array:
  """Turns a plane by three shears, each a 1-D linear interpolation."""
  volume = _shear(volume, second, first, -jnp.tan(angle / 2))
  volume = _shear(volume, first, second, jnp.sin(angle))
  return _shear(volume, second, first, -jnp.tan(angle / 2))


def _shear(
    volume: jax.Array, along: int, across: int, slope: jax.Array
) -> jax.Array:
  """Moves each line of axis `along` by slope times its place on axis `across`."""
  rows, size = volume.shape[across], volume.shape[along]
  lines = jnp.moveaxis(volume, (across, along), (-2, -1))  # [B, ..., rows, size]
  offset = slope[:, None] * (jnp.arange(rows) - (rows - 1) / 2)  # [B, rows]
  source = jnp.clip(jnp.arange(size) - offset[:, :, None], 0, size - 1)
  source = source.reshape(-1, 1, 1, 1, rows, size)
  low = jnp.floor(source).astype(jnp.int32)
  high = jnp.minimum(low + 1, size - 1)
  weight = source - low
  lines = (
      jnp.take_along_axis(lines, low, axis=-1) * (1 - weight)
      + jnp.take_along_axis(lines, high, axis=-1) * weight
  )
  return jnp.moveaxis(lines, (-2, -1), (across, along))


def _crop(
    volume: jax.Array,
    crop: tuple[int, int, int, int] | None,
    uniform: jax.Array | None,
) -> jax.Array:
  """Cuts `crop` voxels out, at places [B, 4] in [0, 1), or at the centre."""
  if crop is None or tuple(crop) == volume.shape[1:5]:
    return volume
  spare = jnp.asarray(volume.shape[1:5]) - jnp.asarray(crop)
  if uniform is None:
    starts = jnp.broadcast_to(spare // 2, (volume.shape[0], 4))
  else:
    starts = jnp.minimum(jnp.floor(uniform * (spare + 1)).astype(jnp.int32), spare)
  starts = jnp.pad(starts, ((0, 0), (0, 1)))
  size = (*crop, volume.shape[-1])
  return jax.vmap(lambda v, s: jax.lax.dynamic_slice(v, s, size))(volume, starts)


def _turn(
    volume: jax.Array, spacing: jax.Array, first: int, second: int, turns: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Turns a square plane by quarters, 0..3 for each sample."""
  odd = turns % 2 == 1
  volume = jnp.where(_per_sample(odd), jnp.swapaxes(volume, first, second), volume)
  # A quarter turn is a transposition and one flip, a half turn is two flips.
  for axis, flipped in ((first, (1, 2)), (second, (2, 3))):
    mirrored = _per_sample((turns == flipped[0]) | (turns == flipped[1]))
    volume = jnp.where(mirrored, jnp.flip(volume, axis), volume)
  order = list(range(4))
  order[first - 1], order[second - 1] = second - 1, first - 1
  spacing = jnp.where(odd[:, None], spacing[:, jnp.asarray(order)], spacing)
  return volume, spacing


def _shade(
    volume: jax.Array,
    keys: jax.Array,
    *,
    brightness: float,
    contrast: float,
    gamma: float,
    noise_std: float,
    noise_probability: float,
) -> jax.Array:
  """Gamma, contrast, brightness and noise, in this order."""
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (4,)))(keys)
  signed = [_per_sample(u) for u in (2 * uniform - 1).T]
  if gamma:
    low, high = _extremes(volume)
    span = jnp.maximum(high - low, _EPSILON)
    volume = ((volume - low) / span) ** jnp.exp(gamma * signed[0]) * span + low
  if contrast:
    volume = volume * (1 + contrast * signed[1])
  if brightness:
    volume = volume + brightness * signed[2]
  if noise_std:
    noise_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
    noise = jax.vmap(lambda key: jax.random.normal(key, volume.shape[1:]))(noise_keys)
    noisy = _per_sample(uniform[:, 3] < noise_probability)
    volume = volume + jnp.where(noisy, noise_std * noise, 0)
  return volume
