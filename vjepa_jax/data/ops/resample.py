"""Host operations on Records: from any geometry onto one canvas.

Heavy augmentation runs on the device; here a volume is cut, resized and padded
once. Sizes are predicted and capped before anything is allocated.
"""

from collections.abc import Sequence
import dataclasses
import math

import cv2
import numpy as np

from vjepa_jax.data.ops import kernels
from vjepa_jax.data.ops.affine import place_meta
from vjepa_jax.data.ops.intensity import percentiles
from vjepa_jax.data.ops.spatial import MAX_VOXELS, check_result
from vjepa_jax.data.ops.taps import apply_taps, resize_taps
from vjepa_jax.data.record import ReadError, Record, mean_std

POLICIES = ("resize", "fov", "spacing")
DTYPES = ("keep", "uint8")
_AXES = "ZYX"

# Many volumes are read side by side; OpenCV's own threads would fight for cores.
cv2.setNumThreads(1)


@dataclasses.dataclass(frozen=True)
class _Axis:
  """How one axis goes: voxels [start, start + length) onto `size`, at `offset`."""

  start: int
  length: int
  size: int
  offset: int


def resample(
    record: Record,
    *,
    canvas: tuple[int, int, int],
    policy: str = "resize",
    fov_mm: tuple[float, float, float] = (6.0, 2.0, 6.0),
    spacing_mm: tuple[float, float, float] = (0.05, 0.02, 0.02),
    dtype: str = "keep",
    min_size: tuple[int, int, int] = (1, 1, 1),
    max_voxels: int = MAX_VOXELS,
) -> Record:
  """Brings a volume onto the canvas; T and C stay as they are.

  Linear interpolation with voxel centres at half integers; where an axis shrinks
  by more than two, the mean over the area instead.

  Args:
    record: volume [T, Z, Y, X, C].
    canvas: (Z, Y, X) voxels of the result.
    policy: "resize": the whole field of view onto the canvas. "fov": the central
      `fov_mm` onto the canvas, padded where the volume is smaller. "spacing":
      voxels of `spacing_mm`, then the central canvas, padded where smaller.
    fov_mm: (Z, Y, X) extent in mm for "fov".
    spacing_mm: (dz, dy, dx) in mm for "spacing".
    dtype: "keep", or "uint8" (percentiles 0.5 and 99.5 of the voxels become 0 and
      255; what is uint8 stays as it is).
    min_size: (Z, Y, X) that the part used must have, such as one patch.
    max_voxels: cap on what the policy asks for before it is cropped, and on the
      result with all its time points and channels.

  Returns:
    Record with volume [T, *canvas, C], its new spacing (that of the voxels as
    they lie, NaN where unknown), mean and std without the padding, and
    `meta["padding"]`, the share of voxels that are padding (the lowest value), and
    `meta["cut"]`, the share of the volume that lies beyond the canvas.

  Raises:
    ReadError: too_small, missing_spacing, too_large (names the spacing's
      source), constant, nan_voxels.
    ValueError: for an unknown policy or dtype.
  """
  check_options(policy, dtype)
  shape = record.volume.shape
  _check_size(record, shape[1:4], min_size, "volume")
  check_result(record, canvas, max_voxels, "the canvas")
  axes = _plan(record, tuple(canvas), policy, fov_mm, spacing_mm, max_voxels)
  _check_size(record, [a.length for a in axes], min_size, f"{policy} crop")
  if record.volume.dtype == np.float32 and not np.isfinite(record.volume).all():
    raise ReadError(record.source, "nan_voxels", "NaN or infinite voxels")
  inner = _resize(record.volume, axes)
  low, high = inner.min(), inner.max()
  if low == high:
    raise ReadError(record.source, "constant", f"every voxel is {low}")
  if dtype == "uint8" and inner.dtype != np.uint8:
    inner = _to_uint8(inner, record.source)
    low = inner.min()
  mean, std = mean_std(inner)
  ratio = [1.0] + [a.length / a.size for a in axes]
  padding = 1 - math.prod(a.size for a in axes) / math.prod(canvas)
  return dataclasses.replace(
      record,
      volume=_pad(inner, axes, tuple(canvas), low),
      spacing=record.spacing * np.array(ratio, np.float32),
      mean=mean,
      std=std,
      meta={
          **place_meta(
              record.meta, [a.length / a.size for a in axes],
              [a.start - a.offset * a.length / a.size for a in axes],
          ),
          "raw_size": tuple(shape[1:4]), "padding": padding,
          "cut": 1 - math.prod(a.length / n for a, n in zip(axes, shape[1:4])),
      },
  )


def check_options(policy: str, dtype: str) -> None:
  """Checks the names of policy and dtype.

  Raises:
    ValueError: naming the allowed.
  """
  _check_choice("policy", policy, POLICIES)
  _check_choice("dtype", dtype, DTYPES)


def _check_choice(what: str, value: str, allowed: tuple[str, ...]):
  if value not in allowed:
    raise ValueError(f"resample: {what} is {value!r}, must be one of {allowed}")


def _check_size(
    record: Record, size: tuple[int, ...] | list[int], least: tuple[int, ...], what: str
):
  faults = [
      f"{axis}={n} < {m}" for axis, n, m in zip(_AXES, size, least, strict=True)
      if n < m
  ]
  if faults:
    raise ReadError(
        record.source, "too_small",
        f"{what} {' x '.join(map(str, size))}: {', '.join(faults)}",
    )


def _plan(
    record: Record,
    canvas: tuple[int, int, int],
    policy: str,
    fov_mm: tuple[float, float, float],
    spacing_mm: tuple[float, float, float],
    max_voxels: int,
) -> list[_Axis]:
  """Decides crop, size and offset of each axis before anything is allocated."""
  size = record.volume.shape[1:4]
  if policy == "resize":
    return [_Axis(0, n, c, 0) for n, c in zip(size, canvas, strict=True)]
  spacing = record.spacing[1:].astype(float)
  origin = record.meta.get("spacing_source", "unknown")
  if np.isnan(spacing).any():
    raise ReadError(
        record.source, "missing_spacing",
        f"resample=\"{policy}\" needs (dz, dy, dx), got {spacing.tolist()} "
        f"(spacing_source {origin})",
    )
  if policy == "fov":
    # `whole` canvas voxels would hold the volume's own extent.
    whole = [
        n * d / f * c for n, d, f, c in zip(size, spacing, fov_mm, canvas, strict=True)
    ]
  else:
    whole = [n * d / s for n, d, s in zip(size, spacing, spacing_mm, strict=True)]
    _check_cap(record, whole, origin, max_voxels)
  return [_centre(n, w, c) for n, w, c in zip(size, whole, canvas, strict=True)]


def _check_cap(record: Record, whole: list[float], origin: str, max_voxels: int):
  voxels = math.prod(max(1, round(w)) for w in whole)
  if voxels > max_voxels:
    raise ReadError(
        record.source, "too_large",
        f"spacing {record.spacing[1:].tolist()} mm (spacing_source {origin}) "
        f"resampled gives {' x '.join(str(round(w)) for w in whole)} = {voxels:,} "
        f"voxels, more than max_voxels {max_voxels:,}",
    )


def _centre(n: int, whole: float, canvas: int) -> _Axis:
  """Crops or pads about the centre an axis that would take `whole` voxels."""
  if whole > canvas:
    length = min(n, max(1, round(n * canvas / whole)))
    return _Axis((n - length) // 2, length, canvas, 0)
  size = max(1, round(whole))
  return _Axis(0, n, size, (canvas - size) // 2)


def _resize(volume: np.ndarray, axes: Sequence[_Axis]) -> np.ndarray:
  """Cuts and resizes [T, Z, Y, X, C] to the sizes of (Z, Y, X)."""
  part = (slice(None), *(slice(a.start, a.start + a.length) for a in axes))
  if all(a.length == a.size for a in axes):
    return np.ascontiguousarray(volume[part])
  return apply_taps(
      volume, [resize_taps(a.length, a.size) for a in axes], [a.start for a in axes]
  )


def _pad(
    inner: np.ndarray, axes: list[_Axis], canvas: tuple[int, int, int], low: float
) -> np.ndarray:
  if inner.shape[1:4] == canvas:
    return inner
  result = np.full((inner.shape[0], *canvas, inner.shape[4]), low, inner.dtype)
  place = (slice(None), *(slice(a.offset, a.offset + a.size) for a in axes))
  result[place] = inner
  return result


def _to_uint8(volume: np.ndarray, source: str) -> np.ndarray:
  """Maps percentiles 0.5 and 99.5 onto 0 and 255."""
  low, high = percentiles(volume, (0.5, 99.5))
  if low == high:
    raise ReadError(
        source, "constant", f"percentiles 0.5 and 99.5 are both {low:g}"
    )
  scaled = np.empty(volume.shape, np.uint8)
  kernels.scale_to_uint8(volume, low, 255 / (high - low), scaled)
  return scaled
