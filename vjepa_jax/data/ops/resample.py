"""Host operations on Records: from any geometry onto one canvas.

Heavy augmentation runs on the device; here a volume is cut, resized and padded
once. Sizes are predicted and capped before anything is allocated.
"""

import dataclasses
import math

import cv2
import numpy as np

from vjepa_jax.data.record import ReadError, Record, mean_std

POLICIES = ("resize", "fov", "spacing")
DTYPES = ("keep", "uint8")
MAX_VOXELS = 2**30
_AXES = "ZYX"
# Above this shrink factor a linear kernel skips voxels, so areas are averaged.
_AREA_FACTOR = 2.0

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
    max_voxels: cap on what the policy asks for before it is cropped.

  Returns:
    Record with volume [T, *canvas, C], its new spacing (that of the voxels as
    they lie, NaN where unknown), mean and std without the padding, and
    `meta["padding"]`, the share of voxels that are padding (the lowest value).

  Raises:
    ReadError: too_small, missing_spacing, too_large (names the spacing's
      source), constant, nan_voxels.
    ValueError: for an unknown policy or dtype.
  """
  check_options(policy, dtype)
  shape = record.volume.shape
  _check_size(record, shape[1:4], min_size, "volume")
  axes = _plan(record, tuple(canvas), policy, fov_mm, spacing_mm, max_voxels)
  _check_size(record, [a.length for a in axes], min_size, f"{policy} crop")
  if record.volume.dtype == np.float32 and not np.isfinite(record.volume).all():
    raise ReadError(record.source, "nan_voxels", "NaN or infinite voxels")
  part = (slice(None), *(slice(a.start, a.start + a.length) for a in axes))
  inner = _resize(record.volume[part], tuple(a.size for a in axes))
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
      meta={**record.meta, "raw_size": tuple(shape[1:4]), "padding": padding},
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


def _resize(volume: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
  """Resizes [T, Z, Y, X, C] to `size` (Z, Y, X)."""
  times, depth, rows, columns, channels = volume.shape
  if (depth, rows, columns) == size:
    return np.ascontiguousarray(volume)
  result = np.empty((times, *size, channels), volume.dtype)
  for t in range(times):
    for z, (first, weights) in enumerate(_depth_weights(depth, size[0])):
      frame = _blend(volume[t, first : first + len(weights)], weights)
      result[t, z] = _resize_frame(frame, size[1:])
  return result


def _depth_weights(n: int, size: int) -> list[tuple[int, np.ndarray]]:
  """Returns, for each frame made, (first source frame, weights adding to 1)."""
  factor = n / size
  plan = []
  for z in range(size):
    if factor > _AREA_FACTOR:
      low, high = z * factor, (z + 1) * factor
      first, last = int(low), min(n, math.ceil(high - 1e-9))
      index = np.arange(first, last)
      weights = np.minimum(index + 1, high) - np.maximum(index, low)
      plan.append((first, weights / weights.sum()))
      continue
    at = min(max((z + 0.5) * factor - 0.5, 0.0), n - 1.0)
    first = min(int(at), n - 1)
    part = at - first
    plan.append((first, np.array([1 - part, part] if part > 1e-9 else [1.0])))
  return plan


def _blend(frames: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Returns the weighted sum of frames [K, Y, X, C]."""
  if len(weights) == 1:
    return frames[0]
  if len(weights) == 2:
    return cv2.addWeighted(
        frames[0], weights[0], frames[1], weights[1], 0.0
    ).reshape(frames.shape[1:])
  total = np.zeros(frames.shape[1:], np.float32)
  for frame, weight in zip(frames, weights, strict=True):
    total += frame.astype(np.float32) * np.float32(weight)
  return total if frames.dtype == np.float32 else np.rint(total).astype(frames.dtype)


def _resize_frame(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes [Y, X, C]; each axis has its own kernel, so one may need two steps."""
  shape = (*size, frame.shape[2])
  kernels = [
      cv2.INTER_AREA if n > _AREA_FACTOR * s else cv2.INTER_LINEAR
      for n, s in zip(frame.shape, size, strict=False)
  ]
  if kernels[0] == kernels[1]:
    return cv2.resize(frame, size[::-1], interpolation=kernels[0]).reshape(shape)
  steps = [((size[0], frame.shape[1]), kernels[0]), (size, kernels[1])]
  if kernels[1] == cv2.INTER_AREA:  # Shrink first: less is left to do.
    steps = [((frame.shape[0], size[1]), kernels[1]), (size, kernels[0])]
  for target, kernel in steps:
    frame = cv2.resize(frame, target[::-1], interpolation=kernel)
  return frame.reshape(shape)


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
  step = max(1, volume.size // 1_000_000)
  low, high = np.percentile(volume.reshape(-1)[::step], (0.5, 99.5))
  if low == high:
    raise ReadError(
        source, "constant", f"percentiles 0.5 and 99.5 are both {low:g}"
    )
  scaled = cv2.convertScaleAbs(
      np.clip(volume.reshape(-1, volume.shape[-1]), low, high).astype(np.float32)
      - np.float32(low),
      alpha=255 / (high - low),
  )
  return scaled.reshape(volume.shape)
