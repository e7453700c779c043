"""Geometry of voxels: spacing, orientation, size, on arrays and on Records.

The functions on arrays take a channel-first volume [C, X, Y, Z] and an affine 4 x 4 to
mm along (right, anterior, superior), and agree with MONAI's transforms of the same
names; they are written anew, from what those do. The ops on Records share their
kernels, keep the type of whole numbers, and keep `meta["affine"]` true.
"""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from vjepa_jax.data.ops import taps as taps_lib
from vjepa_jax.data.ops.affine import affine_of, move_meta, place_meta
from vjepa_jax.data.ops.taps import apply_taps
from vjepa_jax.data.record import ReadError, Record

MODES = ("bilinear", "nearest")
RESIZE_MODES = ("area", "nearest", "nearest-exact", "trilinear", "cubic")
MAX_VOXELS = 2**30
_CODES = ("LR", "PA", "IS")
# Affines closer than this count as one, as in MONAI.
_TOLERANCE = 1e-3


def spacing(
    volume: np.ndarray,
    affine: np.ndarray,
    pixdim: Sequence[float],
    *,
    diagonal: bool = False,
    mode: str = "bilinear",
    padding: str = "border",
    scale_extent: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Resamples to voxels of another size, as MONAI's `Spacing` does.

  The first voxel's centre stays where it is. MONAI's `align_corners` is not here: it
  changes nothing but rounding.

  Args:
    volume: [C, X, Y, Z].
    affine: [4, 4].
    pixdim: (dx, dy, dz) in mm of the stored axes; not positive: as it is.
    diagonal: resample along (right, anterior, superior) instead of the stored axes.
    mode: "bilinear" or "nearest".
    padding: beyond the volume, "border" or "zeros".
    scale_extent: keep the outer edges instead of the outer centres, with MONAI's rule
      for the offset.

  Returns:
    (float32 [C, x, y, z], its affine).
  """
  affine = np.array(affine, float)
  wanted = _target(affine, pixdim, diagonal)
  size, wanted[:3, 3] = _extent(volume.shape[1:], affine, wanted, scale_extent)
  volume = np.asarray(volume, np.float32)
  change = np.linalg.solve(affine, wanted)
  if size == volume.shape[1:] and np.allclose(change, np.eye(4), atol=_TOLERANCE):
    return volume, affine
  return sample(volume, change, size, mode=mode, padding=padding), wanted


def _target(
    affine: np.ndarray, pixdim: Sequence[float], diagonal: bool
) -> np.ndarray:
  """Returns an affine of the new voxel sizes, without shear and without offset."""
  found = np.linalg.norm(affine[:3, :3], axis=0)
  lengths = np.array(pixdim, float)
  keep = (lengths <= 0) | (np.abs(lengths - found) <= _TOLERANCE)
  lengths = np.where(keep, found, lengths)
  wanted = np.eye(4)
  if diagonal:
    wanted[:3, :3] = np.diag(lengths)
  else:
    rotation, upper = np.linalg.qr(affine[:3, :3])
    wanted[:3, :3] = rotation * np.sign(np.diag(upper)) * lengths
  return wanted


def _extent(
    shape: Sequence[int], affine: np.ndarray, wanted: np.ndarray, scale_extent: bool
) -> tuple[tuple[int, ...], np.ndarray]:
  """Returns the new size, and where its first voxel lies in mm."""
  half = 0.5 if scale_extent else 0.0
  ends = [(-half, n - 1 + half) for n in shape]
  corners = np.stack(np.meshgrid(*ends, indexing="ij")).reshape(3, 8)
  placed = affine[:3, :3] @ corners + affine[:3, 3:]
  inside = np.linalg.solve(wanted[:3, :3], placed)  # [3, 8]
  whole = np.round(np.ptp(inside, axis=1) + (0 if scale_extent else 1))
  size = np.maximum(whole, 1)
  least = np.isclose(inside, inside.min(axis=1, keepdims=True), rtol=1e-3).all(axis=0)
  if least.any():
    start = placed[:, np.argmax(least)]
  else:  # An oblique volume has no lowest corner; the centres meet.
    start = affine[:3, :3] @ (np.array(shape) / 2) + affine[:3, 3]
    start = start - wanted[:3, :3] @ (size / 2)
  if scale_extent:
    first = affine[:3, :3] @ ((np.array(shape) / size - 1) / 2) + affine[:3, 3]
    start = np.abs(first) * np.sign(start)
  return tuple(int(n) for n in size), start


def sample(
    volume: np.ndarray,
    change: np.ndarray,
    size: Sequence[int],
    *,
    mode: str = "bilinear",
    padding: str = "border",
) -> np.ndarray:
  """Returns float32 [C, *size] of the values at affine positions.

  Args:
    volume: [C, X, Y, Z].
    change: [4, 4] from new voxel indices to old ones.
    size: (x, y, z).
    mode: "bilinear" or "nearest".
    padding: beyond the volume, "border" or "zeros".

  Raises:
    ValueError: for an unknown mode or padding.
  """
  _check("mode", mode, MODES)
  _check("padding", padding, taps_lib.PADDINGS)
  matrix, offset = np.array(change[:3, :3], float), np.array(change[:3, 3], float)
  volume = np.asarray(volume, np.float32)
  scale = np.diag(matrix)
  if np.abs(matrix - np.diag(scale)).max() * max(size) < 1e-9:
    kind = taps_lib.linear_taps if mode == "bilinear" else taps_lib.nearest_taps
    taps = [
        kind(np.arange(count) * scale[axis] + offset[axis], n, padding)
        for axis, (n, count) in enumerate(zip(volume.shape[1:], size, strict=True))
    ]
    return apply_taps(volume[..., None], taps)[..., 0]
  from scipy import ndimage  # Only what turns needs it, and its import takes long.

  if mode == "nearest":
    return _nearest(volume, matrix, offset, size, padding)
  edge = "nearest" if padding == "border" else "grid-constant"
  return np.stack([
      ndimage.affine_transform(
          channel.astype(float), matrix, offset, tuple(size), order=1, mode=edge
      ) for channel in volume
  ]).astype(np.float32)


def _nearest(
    volume: np.ndarray, matrix: np.ndarray, offset: np.ndarray, size: Sequence[int],
    padding: str,
) -> np.ndarray:
  result = np.empty((len(volume), *size), np.float32)
  rest = np.stack(np.meshgrid(*map(np.arange, size[1:]), indexing="ij"))  # [2, y, z]
  last = np.array(volume.shape[1:])[:, None, None] - 1
  for x in range(size[0]):  # Positions of all voxels would take 24 bytes each.
    start = offset + matrix[:, 0] * x
    at = np.tensordot(matrix[:, 1:], rest, 1) + start[:, None, None]
    at = np.rint(np.clip(at, 0, last) if padding == "border" else at).astype(int)
    outside = ((at < 0) | (at > last)).any(axis=0)
    found = volume[(slice(None), *np.clip(at, 0, last))]
    result[:, x] = np.where(outside, 0, found)
  return result


def closest_axes(affine: np.ndarray) -> np.ndarray:
  """Returns int [3, 2]: for each stored axis the nearest of (right, anterior,
  superior) and its direction, +1 or -1; the clearest axis chooses first.

  Raises:
    ValueError: for an affine that places no volume.
  """
  matrix = np.array(affine, float)[:3, :3]
  lengths = np.linalg.norm(matrix, axis=0)
  if not np.isfinite(matrix).all() or not lengths.all():
    raise ValueError(f"affine {matrix.tolist()} places no volume")
  left, _, right = np.linalg.svd(matrix / lengths)
  rotation = left @ right  # The nearest one without shear.
  axes = np.zeros((3, 2), int)
  free = np.ones(3, bool)
  for stored in np.argsort(-np.abs(rotation).max(axis=0), kind="stable"):
    column = np.where(free, np.abs(rotation[:, stored]), -1)
    axes[stored] = np.argmax(column), 1
    if rotation[axes[stored, 0], stored] < 0:
      axes[stored, 1] = -1
    free[axes[stored, 0]] = False
  return axes


def axis_codes(affine: np.ndarray) -> str:
  """Returns where the stored axes point, such as "LPS"."""
  return "".join(_CODES[a][int(way > 0)] for a, way in closest_axes(affine))


def orientation(
    volume: np.ndarray, affine: np.ndarray, axcodes: str = "RAS"
) -> tuple[np.ndarray, np.ndarray]:
  """Turns whole axes so that they point as asked, as MONAI's `Orientation` does.

  Args:
    volume: [C, X, Y, Z].
    affine: [4, 4].
    axcodes: three of L R, P A, I S.

  Returns:
    ([C, x, y, z] of the same values, its affine).
  """
  turned, affine, _ = _turn(np.moveaxis(volume, 0, -1), affine, axcodes)
  return np.ascontiguousarray(np.moveaxis(turned, -1, 0)), affine


def _turn(
    volume: np.ndarray, affine: np.ndarray, axcodes: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Turns the first three axes; also returns new voxel indices -> old ones."""
  wanted = wanted_axes(axcodes)
  found = closest_axes(affine)
  change = np.zeros((4, 4))
  change[3, 3] = 1
  order = [0, 0, 0]
  for stored, (axis, way) in enumerate(found):
    (place,) = np.flatnonzero(wanted[:, 0] == axis)
    order[place] = stored
    same = wanted[place, 1] == way
    change[stored, place] = 1 if same else -1
    if not same:
      change[stored, 3] = volume.shape[stored] - 1
      volume = np.flip(volume, stored)
  rest = range(3, volume.ndim)
  return volume.transpose(*order, *rest), np.array(affine, float) @ change, change


def wanted_axes(axcodes: str) -> np.ndarray:
  """Returns int [3, 2], (axis, direction) that three letters ask for.

  Raises:
    ValueError: for letters that are none.
  """
  found = [
      (axis, 2 * codes.index(code) - 1)
      for code in axcodes for axis, codes in enumerate(_CODES) if code in codes
  ]
  if len(axcodes) != 3 or sorted(a for a, _ in found) != [0, 1, 2]:
    raise ValueError(
        f"axcodes is {axcodes!r}, must be one each of L R, P A and I S, such as \"RAS\""
    )
  return np.array(found)


def resize(
    volume: np.ndarray,
    size: Sequence[int],
    *,
    mode: str = "area",
    align_corners: bool = False,
    antialias: bool = False,
) -> np.ndarray:
  """Resizes to `size`, as MONAI's `Resize` does.

  Args:
    volume: [C, X, Y, Z].
    size: (x, y, z).
    mode: "area" (plain mean of all voxels touched), "nearest" (PyTorch's, which leans
      to the start), "nearest-exact", "trilinear", or "cubic" (SciPy's spline of
      order 3, the edge continued; not in MONAI).
    align_corners: the outer centres meet instead of the outer edges.
    antialias: blur by a Gaussian of (factor - 1) / 2 voxels an axis that shrinks.

  Returns:
    float32 [C, x, y, z].
  """
  volume = np.asarray(volume, np.float32)
  if mode == "cubic":
    return _cubic(volume, size, align_corners)
  taps = _resize_taps(volume.shape[1:], size, mode, align_corners, antialias)
  return apply_taps(volume[..., None], taps)[..., 0]


def _resize_taps(
    shape: Sequence[int], size: Sequence[int], mode: str, align_corners: bool,
    antialias: bool,
) -> list[taps_lib.Taps]:
  _check("mode", mode, RESIZE_MODES)
  taps = []
  for n, count in zip(shape, size, strict=True):
    step = n / count
    if align_corners:
      at = np.linspace(0, n - 1, count) if count > 1 else np.zeros(1)
    else:
      at = (np.arange(count) + 0.5) * step - 0.5
    if mode == "area":
      one = taps_lib.pooled_taps(n, count)
    elif mode == "nearest":  # float32, as PyTorch: it decides what a tie becomes.
      low = np.floor(np.arange(count, dtype=np.float32) * np.float32(step))
      one = taps_lib.nearest_taps(low, n)
    elif mode == "nearest-exact":
      one = taps_lib.nearest_taps(np.floor(at + 0.5), n)
    else:
      one = taps_lib.linear_taps(at, n)
    sigma = max(0.0, (step - 1) / 2) if antialias else 0.0
    taps.append(taps_lib.smoothed_taps(one, n, sigma))
  return taps


def _cubic(volume: np.ndarray, size: Sequence[int], align_corners: bool) -> np.ndarray:
  from scipy import ndimage

  factors = [s / n for s, n in zip(size, volume.shape[1:], strict=True)]
  return np.stack([
      ndimage.zoom(
          channel, factors, np.float32, order=3, mode="nearest",
          grid_mode=not align_corners,
      ) for channel in volume
  ])


def pad_or_crop(
    volume: np.ndarray, size: Sequence[int], value: float = 0.0
) -> np.ndarray:
  """Pads and crops about the centre, as MONAI's `ResizeWithPadOrCrop` does.

  Args:
    volume: [C, X, Y, Z].
    size: (x, y, z).
    value: of the padding.
  """
  starts = _centred(volume.shape[1:], size)
  return _place(volume, [0, *starts], [len(volume), *size], value)


def _centred(shape: Sequence[int], size: Sequence[int]) -> list[int]:
  """Where the new axes start in the old ones; negative where they are padded."""
  return [
      n // 2 - s // 2 if n > s else -((s - n) // 2)
      for n, s in zip(shape, size, strict=True)
  ]


def _place(
    volume: np.ndarray, starts: Sequence[int], size: Sequence[int], value: float
) -> np.ndarray:
  """Returns the box of `size` that starts at `starts`; beyond the volume `value`."""
  inside = [
      slice(max(0, start), min(n, start + s))
      for start, n, s in zip(starts, volume.shape, size, strict=True)
  ]
  found = volume[tuple(inside)]
  if found.shape == tuple(size):
    return np.ascontiguousarray(found)
  result = np.full(tuple(size), value, volume.dtype)
  result[tuple(
      slice(part.start - start, part.stop - start)
      for part, start in zip(inside, starts, strict=True)
  )] = found
  return result


def foreground_box(
    volume: np.ndarray, above: float = 0.0, margin: int = 0
) -> tuple[list[int], list[int]] | None:
  """Returns (first, one past the last) of each axis where a voxel is above a value.

  Args:
    volume: of any axes.
    above: voxels greater than this are foreground.
    margin: voxels more on each side, within the volume.

  Returns:
    None where no voxel is.
  """
  found = volume > above
  low, high = [], []
  for axis, n in enumerate(volume.shape):
    (places,) = np.nonzero(found.any(axis=tuple(
        a for a in range(volume.ndim) if a != axis
    )))
    if not len(places):
      return None
    low.append(max(0, int(places[0]) - margin))
    high.append(min(n, int(places[-1]) + 1 + margin))
  return low, high


def crop_foreground(
    volume: np.ndarray, above: float = 0.0, margin: int = 0
) -> np.ndarray:
  """Cuts to the voxels above a value, as MONAI's `CropForeground` does.

  Args:
    volume: [C, X, Y, Z]; a voxel counts where any channel is above.
    above: see `foreground_box`.
    margin: see `foreground_box`.

  Returns:
    [C, x, y, z], empty where no voxel is above.
  """
  box = foreground_box(volume.max(axis=0), above, margin) or ([0] * 3, [0] * 3)
  return np.ascontiguousarray(
      volume[(slice(None), *(slice(a, b) for a, b in zip(*box, strict=True)))]
  )


def _check(what: str, value: str, allowed: Sequence[str]):
  if value not in allowed:
    raise ValueError(f"{what} is {value!r}, must be one of {tuple(allowed)}")


def set_spacing(
    record: Record, spacing_mm: Sequence[float], mode: str, max_voxels: int
) -> Record:
  """Brings a Record to voxels of (dz, dy, dx) mm; the outer voxels' centres stay.

  Raises:
    ReadError: missing_spacing, too_large.
  """
  found = record.spacing[1:].astype(float)
  if np.isnan(found).any():
    raise ReadError(
        record.source, "missing_spacing", f"(dz, dy, dx) is {found.tolist()}"
    )
  shape = record.volume.shape[1:4]
  affine, wanted = (np.diag([*v[::-1], 1.0]) for v in (found, spacing_mm))
  size, _ = _extent(shape[::-1], affine, wanted, False)
  check_result(
      record, size[::-1], max_voxels, f"{found.tolist()} mm to {tuple(spacing_mm)} mm"
  )
  ratio = np.array(spacing_mm, float) / found
  kind = taps_lib.linear_taps if mode == "bilinear" else taps_lib.nearest_taps
  taps = [
      kind(np.arange(count) * r, n)
      for n, count, r in zip(shape, size[::-1], ratio, strict=True)
  ]
  return _moved(
      record, apply_taps(record.volume, taps),
      np.array([1.0, *ratio]), np.diag([*ratio[::-1], 1.0]),
  )


def check_result(
    record: Record, size: Sequence[int], max_voxels: int, what: str
) -> None:
  """Refuses (Z, Y, X) of all time points and channels before they are made.

  Raises:
    ReadError: too_large.
  """
  shape = (len(record.volume), *size, record.volume.shape[4])
  if math.prod(shape) > max_voxels:
    raise ReadError(
        record.source, "too_large",
        f"{what} gives {' x '.join(map(str, shape))} = {math.prod(shape):,} voxels "
        f"[T, Z, Y, X, C], more than max_voxels {max_voxels:,}",
    )


def turn(record: Record, axcodes: str) -> Record:
  """Turns whole axes so that (X, Y, Z) point as asked, such as "RAS".

  Raises:
    ReadError: missing_spacing, where the file says nothing of directions.
  """
  affine = affine_of(record.meta)
  if affine is None:
    raise ReadError(
        record.source, "missing_spacing", "no affine: its directions are unknown",
        "leave the op `orientation` out for this format",
    )
  stored = record.volume.transpose(3, 2, 1, 0, 4)  # [X, Y, Z, T, C]
  turned, _, change = _turn(stored, affine, axcodes)
  order = np.argmax(np.abs(change[:3, :3]), axis=0)  # New axis -> stored axis.
  spacing_xyz = record.spacing[1:][::-1][order]
  moved = _moved(
      record, np.ascontiguousarray(turned.transpose(3, 2, 1, 0, 4)),
      np.ones(4), change,
  )
  return dataclasses.replace(
      moved, spacing=np.array([record.spacing[0], *spacing_xyz[::-1]], np.float32)
  )


def set_size(
    record: Record, size: Sequence[int], mode: str, antialias: bool
) -> Record:
  """Resizes a Record to (Z, Y, X) voxels; its outer edges stay.

  Raises:
    ReadError: too_large.
  """
  check_result(record, size, MAX_VOXELS, f"size {tuple(size)}")
  shape = record.volume.shape[1:4]
  taps = _resize_taps(shape, size, mode, False, antialias)
  ratio = [n / s for n, s in zip(shape, size, strict=True)]
  resized = apply_taps(record.volume, taps)
  return dataclasses.replace(
      record, volume=resized, mean=None, std=None,
      spacing=record.spacing * np.array([1.0, *ratio], np.float32),
      meta=place_meta(record.meta, ratio, (0, 0, 0)),
  )


def fit_size(record: Record, size: Sequence[int], value: float | None) -> Record:
  """Pads and crops a Record about its centre to (Z, Y, X); None: the lowest value.

  Raises:
    ReadError: too_large; unsupported_pixels for a value that its type cannot hold.
  """
  check_result(record, size, MAX_VOXELS, f"size {tuple(size)}")
  volume = record.volume
  if value is not None and volume.dtype.kind != "f":
    limits = np.iinfo(volume.dtype)
    if value != int(value) or not limits.min <= value <= limits.max:
      raise ReadError(
          record.source, "unsupported_pixels",
          f"voxels of {volume.dtype} cannot be padded with {value:g}",
          "leave `value` out, or scale the voxels to float32 before",
      )
  starts = _centred(volume.shape[1:4], size)
  value = volume.min() if value is None else value
  return _cut(record, starts, size, value)


def cut_foreground(record: Record, above: float, margin: int) -> Record:
  """Cuts a Record to the box of voxels above a value, in any time point or channel.

  Raises:
    ReadError: constant, where there is none.
  """
  box = foreground_box(record.volume.max(axis=(0, 4)), above, margin)
  if box is None:
    raise ReadError(record.source, "constant", f"no voxel is above {above:g}")
  low, high = box
  return _cut(record, low, [b - a for a, b in zip(low, high, strict=True)], 0)


def project(record: Record, axis: str, how: str) -> Record:
  """Makes one voxel of each line along an axis: its maximum or its mean."""
  place = "ZYX".index(axis)
  volume = record.volume
  if how == "max":
    made = volume.max(axis=place + 1, keepdims=True)
  else:
    made = volume.mean(axis=place + 1, keepdims=True, dtype=np.float64)
    made = (np.rint(made) if volume.dtype.kind in "iu" else made).astype(volume.dtype)
  ratio = np.ones(4, np.float32)
  ratio[place + 1] = volume.shape[place + 1]
  return dataclasses.replace(
      record, volume=made, mean=None, std=None, spacing=record.spacing * ratio,
      meta=place_meta(record.meta, ratio[1:].tolist(), (0, 0, 0)),
  )


def _cut(
    record: Record, starts: Sequence[int], size: Sequence[int], value: float
) -> Record:
  times, *_, channels = record.volume.shape
  volume = _place(
      record.volume, [0, *starts, 0], [times, *size, channels], value
  )
  return dataclasses.replace(
      record, volume=volume, mean=None, std=None,
      meta=place_meta(record.meta, (1, 1, 1), starts),
  )


def _moved(
    record: Record, volume: np.ndarray, ratio: np.ndarray, change: np.ndarray
) -> Record:
  return dataclasses.replace(
      record, volume=volume, mean=None, std=None,
      spacing=record.spacing * ratio.astype(np.float32),
      meta=move_meta(record.meta, change),
  )
