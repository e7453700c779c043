"""The ops that a config can name, and what is wrong with options that it gives."""

from collections.abc import Callable, Mapping, Sequence
import difflib
import inspect
import math
from typing import Any

import numpy as np

from vjepa_jax.data.ops import intensity, slices, spatial
from vjepa_jax.data.ops.monai import monai_op
from vjepa_jax.data.record import Record

Op = Callable[[Record, np.random.Generator], Record]
_RESIZE_MODES = tuple(m for m in spatial.RESIZE_MODES if m != "cubic")


def spacing_op(
    *,
    spacing_mm: Sequence[float],
    mode: str = "bilinear",
    max_voxels: int = spatial.MAX_VOXELS,
) -> Op:
  """Voxels of (dz, dy, dx) mm; the outer centres stay, as MONAI's `Spacing`.

  Args:
    spacing_mm: (dz, dy, dx).
    mode: "bilinear" or "nearest" (for labels).
    max_voxels: cap on the result.
  """
  _three("spacing_mm", spacing_mm, float)
  _one_of("mode", mode, spatial.MODES)
  return lambda record, rng: spatial.set_spacing(record, spacing_mm, mode, max_voxels)


def orientation_op(*, axcodes: str = "RAS") -> Op:
  """Whole axes turned so that (X, Y, Z) point as asked.

  Args:
    axcodes: three of L R, P A, I S.
  """
  spatial.wanted_axes(axcodes)
  return lambda record, rng: spatial.turn(record, axcodes)


def resize_op(
    *, size: Sequence[int], mode: str = "area", antialias: bool = False
) -> Op:
  """Another number of voxels over the same extent, as MONAI's `Resize`.

  Args:
    size: (Z, Y, X) voxels.
    mode: "area", "trilinear", "nearest" or "nearest-exact".
    antialias: blur an axis that shrinks before.
  """
  _three("size", size, int)
  _one_of("mode", mode, _RESIZE_MODES)
  return lambda record, rng: spatial.set_size(record, size, mode, antialias)


def pad_or_crop_op(*, size: Sequence[int], value: float | None = None) -> Op:
  """Padded and cropped about the centre.

  Args:
    size: (Z, Y, X) voxels.
    value: of the padding; None: the lowest of the recording.
  """
  _three("size", size, int)
  if value is not None:
    _finite("value", value)
  return lambda record, rng: spatial.fit_size(record, size, value)


def crop_foreground_op(*, above: float = 0.0, margin: int = 0) -> Op:
  """Cut to the box of what is above a value.

  Args:
    above: voxels greater than this are foreground.
    margin: voxels more on each side.
  """
  _finite("above", above)
  if not isinstance(margin, int) or margin < 0:
    raise ValueError(f"margin is {margin!r}, must be a whole number, at least 0")
  return lambda record, rng: spatial.cut_foreground(record, above, margin)


def project_op(*, axis: str = "Z", how: str = "max") -> Op:
  """One voxel along an axis: the projection that a 2-D model sees.

  Args:
    axis: "Z", "Y" or "X".
    how: "max" or "mean" of a line's voxels.
  """
  _one_of("axis", axis, ("Z", "Y", "X"))
  _one_of("how", how, ("max", "mean"))
  return lambda record, rng: spatial.project(record, axis, how)


def even_slices_op(
    *,
    step_mm: float | None = None,
    max_step_mm: float | None = None,
    max_voxels: int = spatial.MAX_VOXELS,
) -> Op:
  """Unequal steps and a tilted gantry made straight and even.

  Args:
    step_mm: between slices; None: the median step.
    max_step_mm: a wider step is refused.
    max_voxels: cap on the result.
  """
  for name, value in (("step_mm", step_mm), ("max_step_mm", max_step_mm)):
    if value is not None and not 0 < value < math.inf:
      raise ValueError(f"{name} is {value}, must be a positive number of mm")
  return lambda record, rng: slices.even_slices(
      record, step_mm, max_step_mm, max_voxels
  )


def normalize_intensity_op(
    *,
    subtrahend: float | Sequence[float] | None = None,
    divisor: float | Sequence[float] | None = None,
    nonzero: bool = False,
    channel_wise: bool = False,
) -> Op:
  """float32 (values - subtrahend) / divisor; see `intensity.normalize_intensity`."""
  for name, value in (("subtrahend", subtrahend), ("divisor", divisor)):
    several = isinstance(value, Sequence) and not isinstance(value, str)
    if several and not channel_wise:
      raise ValueError(f"{name} is {value}, one a channel needs channel_wise=True")
    for number in value if several else () if value is None else (value,):
      _finite(name, number)
      if name == "divisor" and not number:
        raise ValueError(f"divisor is {divisor}, must not be 0")
  options = {
      "subtrahend": subtrahend, "divisor": divisor, "nonzero": nonzero,
      "channel_wise": channel_wise,
  }
  return lambda record, rng: intensity.on_channels(
      record, lambda volume: intensity.normalize_intensity(volume, **options)
  )


def scale_range_op(
    *,
    a_min: float,
    a_max: float,
    b_min: float = 0.0,
    b_max: float = 1.0,
    clip: bool = True,
) -> Op:
  """float32 with [a_min, a_max] brought to [b_min, b_max], such as a window in HU."""
  for name, value in (("a_min", a_min), ("a_max", a_max), ("b_min", b_min),
                      ("b_max", b_max)):
    _finite(name, value)
  if not a_min < a_max or not b_min < b_max:
    raise ValueError(
        f"ranges are ({a_min}, {a_max}) to ({b_min}, {b_max}), each must rise"
    )
  return lambda record, rng: intensity.on_channels(
      record,
      lambda volume: intensity.scale_range(
          volume, a_min, a_max, b_min, b_max, clip=clip
      ),
  )


def scale_percentiles_op(
    *,
    lower: float = 0.5,
    upper: float = 99.5,
    b_min: float = 0.0,
    b_max: float = 1.0,
    clip: bool = True,
    channel_wise: bool = False,
) -> Op:
  """float32 with two percentiles brought to [b_min, b_max]."""
  _rising(lower, upper)
  return lambda record, rng: intensity.on_channels(
      record,
      lambda volume: intensity.scale_percentiles(
          volume, lower, upper, b_min, b_max, clip=clip, channel_wise=channel_wise
      ),
  )


def clip_percentiles_op(*, lower: float = 0.5, upper: float = 99.5) -> Op:
  """Values limited to two percentiles; the type stays."""
  _rising(lower, upper)
  return lambda record, rng: intensity.on_channels(
      record, lambda volume: intensity.clip_percentiles(volume, lower, upper)
  )


OPS: dict[str, Callable[..., Op]] = {
    "spacing": spacing_op,
    "orientation": orientation_op,
    "resize": resize_op,
    "pad_or_crop": pad_or_crop_op,
    "crop_foreground": crop_foreground_op,
    "project": project_op,
    "even_slices": even_slices_op,
    "normalize_intensity": normalize_intensity_op,
    "scale_range": scale_range_op,
    "scale_percentiles": scale_percentiles_op,
    "clip_percentiles": clip_percentiles_op,
    "monai": monai_op,
}


# What these do to a volume follows from its own values, or from where its content lies:
# time points of a movie would lose their common range and place.
OF_ITS_OWN_VALUES = frozenset({
    "crop_foreground", "normalize_intensity", "scale_percentiles", "clip_percentiles",
})


def op_faults(
    steps: Sequence[Mapping[str, Any]], *, of_movies: bool = False
) -> list[str]:
  """Says what is wrong with ops of a config; an empty list is well.

  Args:
    steps: dicts of `name` and options.
    of_movies: whether each volume is one time point of a movie.
  """
  faults = []
  for index, step in enumerate(steps):
    options = dict(step)
    name = options.pop("name", None)
    if name not in OPS:
      close = difflib.get_close_matches(str(name), OPS, 3, 0.0)
      faults.append(f"ops[{index}]: unknown name {name!r}; closest {close}")
      continue
    faults.extend(f"ops[{index}] {name}: {f}" for f in _option_faults(name, options))
    if of_movies and name in OF_ITS_OWN_VALUES:
      faults.append(
          f"ops[{index}] {name}: goes by the values of one time point, and those of a "
          "clip would no longer be alike; a movie has one range of values, "
          "data.percentiles, and data.resample fits it to the canvas"
      )
  return faults


def _option_faults(name: str, options: dict[str, Any]) -> list[str]:
  known = inspect.signature(OPS[name]).parameters
  faults = [
      f"unknown option {option!r}; closest "
      f"{difflib.get_close_matches(option, known, 3, 0.0)}"
      for option in options if option not in known
  ]
  faults += [
      f"option {p.name!r} is missing" for p in known.values()
      if p.default is p.empty and p.name not in options
  ]
  if not faults:
    try:
      OPS[name](**options)
    except (ValueError, TypeError, ImportError) as error:
      faults.append(str(error))
  return faults


def _three(what: str, values: Sequence[float], kind: type):
  numbers = isinstance(values, Sequence) and not isinstance(values, str) and all(
      isinstance(v, int | kind) and not isinstance(v, bool) and 0 < v < math.inf
      for v in values
  )
  if not numbers or len(values) != 3:
    raise ValueError(
        f"{what} is {values!r}, must be three positive "
        f"{'whole ' if kind is int else ''}numbers for Z, Y and X"
    )


def _finite(what: str, value: float):
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not number or not math.isfinite(value):
    raise ValueError(f"{what} is {value!r}, must be a finite number")


def _one_of(what: str, value: str, allowed: Sequence[str]):
  if value not in allowed:
    raise ValueError(f"{what} is {value!r}, must be one of {tuple(allowed)}")


def _rising(lower: float, upper: float):
  if not 0 <= lower < upper <= 100:
    raise ValueError(f"percentiles are ({lower}, {upper}), must rise within 0 .. 100")
