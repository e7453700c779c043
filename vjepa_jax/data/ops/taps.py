"""Kernels of one axis: which old voxels, with which weights, make a new one.

All are (first int32 [size], weights float32 [size, K]): a new voxel is the sum of K
old ones from `first`, each times its weight. An axis at a time is enough for all that
does not rotate. Voxel n has its centre at n and reaches from n - 0.5 to n + 0.5.
"""

from collections.abc import Sequence
import functools
import math

import numpy as np

from vjepa_jax.data.ops import kernels

Taps = tuple[np.ndarray, np.ndarray]
PADDINGS = ("border", "zeros")
# Above this shrink factor a linear kernel skips voxels, so areas are averaged.
AREA_FACTOR = 2.0


def apply_taps(
    volume: np.ndarray, taps: Sequence[Taps], starts: Sequence[int] = (0, 0, 0)
) -> np.ndarray:
  """Returns [T, z, y, x, C] of the same type; whole numbers are rounded once.

  Args:
    volume: of a Record, [T, Z, Y, X, C].
    taps: of Z, Y and X.
    starts: voxels of Z, Y and X before those that the taps count from.
  """
  native = volume.dtype.newbyteorder("=")
  if not volume.flags.c_contiguous or volume.dtype != native:
    ends = [s + int(f.max()) + w.shape[1] for s, (f, w) in zip(starts, taps)]
    part = (slice(None), *(slice(s, e) for s, e in zip(starts, ends)))
    volume, starts = np.ascontiguousarray(volume[part], native), (0, 0, 0)
  taps = [(first + np.int32(s), w) for s, (first, w) in zip(starts, taps, strict=True)]
  times, depth, rows, columns, channels = volume.shape
  size = tuple(len(first) for first, _ in taps)
  result = np.empty((times, *size, channels), native)
  for source, target in zip(volume, result, strict=True):
    kernels.resize_rows(
        source.reshape(depth, rows, columns * channels), *taps, channels,
        target.reshape(size[0], size[1], size[2] * channels),
    )
  return result


@functools.lru_cache(maxsize=256)
def resize_taps(n: int, size: int) -> Taps:
  """Linear between centres; the mean over the area where more than two make one."""
  if n == size:
    return keep_taps(n)
  factor = n / size
  if factor <= AREA_FACTOR:
    return linear_taps((np.arange(size) + 0.5) * factor - 0.5, n)
  low, high = (np.arange(size) + e for e in (0, 1))
  low, high = low * factor, high * factor
  width = min(n, math.ceil(factor) + 1)
  first = np.minimum(low.astype(int), n - width)
  index = first[:, None] + np.arange(width)
  weights = np.minimum(index + 1, high[:, None]) - np.maximum(index, low[:, None])
  weights = np.maximum(weights, 0)
  return _taps(first, weights / weights.sum(axis=1, keepdims=True))


def keep_taps(n: int) -> Taps:
  """The axis as it is."""
  return _taps(np.arange(n), np.ones((n, 1)))


def linear_taps(at: np.ndarray, n: int, padding: str = "border") -> Taps:
  """Linear between the centres of an axis of n voxels.

  Args:
    at: float [size], where the new centres lie.
    n: voxels.
    padding: beyond the volume, "border": its outer voxels; "zeros": zero.
  """
  if padding == "border":
    at = np.clip(at, 0, n - 1)
  low = np.floor(at).astype(int)
  part = at - low
  pairs = np.stack([low, low + 1], axis=1), np.stack([1 - part, part], axis=1)
  return _inside(*pairs, n)


def nearest_taps(at: np.ndarray, n: int, padding: str = "border") -> Taps:
  """The nearest centre, the even one of two; arguments as of `linear_taps`."""
  if padding == "border":
    at = np.clip(at, 0, n - 1)
  return _inside(np.rint(at).astype(int)[:, None], np.ones((len(at), 1)), n)


def pooled_taps(n: int, size: int) -> Taps:
  """The plain mean of all voxels that a new one touches (adaptive pooling)."""
  first = np.arange(size) * n // size
  last = -(-(np.arange(size) + 1) * n // size)
  index = first[:, None] + np.arange((last - first).max())
  weights = (index < last[:, None]) / (last - first)[:, None]
  return _inside(index, weights, n)


def smoothed_taps(taps: Taps, n: int, sigma: float) -> Taps:
  """The taps of an axis that a Gaussian blurs before; zero lies beyond its ends.

  A voxel's weight is the Gaussian over its width, out to 4 sigma.
  """
  if sigma <= 0:
    return taps
  reach = int(max(4 * sigma, 0.5) + 0.5)
  ends = np.arange(-reach, reach + 2) - 0.5
  area = np.array([math.erf(e / (sigma * math.sqrt(2))) for e in ends]) / 2
  first, weights = taps
  width = weights.shape[1] + 2 * reach
  wide = np.zeros((len(first), width))
  for k in range(weights.shape[1]):
    wide[:, k : k + 2 * reach + 1] += weights[:, k, None] * np.diff(area)
  return _inside((first - reach)[:, None] + np.arange(width), wide, n)


def _inside(index: np.ndarray, weights: np.ndarray, n: int) -> Taps:
  """Drops what lies beyond n voxels; `index` [size, K] counts up by one."""
  width = min(n, index.shape[1])
  first = np.clip(index[:, 0], 0, n - width)
  place = index - first[:, None]
  found = np.zeros((len(index), width))
  rows, columns = np.nonzero((index >= 0) & (index < n) & (place < width))
  found[rows, place[rows, columns]] = weights[rows, columns]
  return _taps(first, found)


def _taps(first: np.ndarray, weights: np.ndarray) -> Taps:
  # What rounding leaves of a 0 would cost a pass over the row.
  kept = np.where(np.abs(weights) < 1e-7, 0, weights)
  return first.astype(np.int32), np.ascontiguousarray(kept, np.float32)
