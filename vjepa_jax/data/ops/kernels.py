"""Loops over voxels, compiled by numba for the machine they run on.

numba and its compiler come in with the first call, not with the import. Code is
cached beside this file, or in the user's cache where that cannot be written
(`NUMBA_CACHE_DIR` says where else); only the first process of a machine compiles.
"""

from collections.abc import Callable
import functools
from typing import Any

import numpy as np


def resize_rows(
    volume: np.ndarray,
    z_taps: tuple[np.ndarray, np.ndarray],
    y_taps: tuple[np.ndarray, np.ndarray],
    x_taps: tuple[np.ndarray, np.ndarray],
    channels: int,
    out: np.ndarray,
) -> None:
  """Writes the separable weighted sums of a volume; sums in float32, rounds once.

  Args:
    volume: [Z, Y, X * C], C-contiguous, of a Record's type in native byte order.
    z_taps: (first int32 [z], weights float32 [z, K]): frame z of the result is the
      sum of K frames from `first`. K frames from any `first` lie in the volume.
    y_taps: the same for rows.
    x_taps: the same for columns.
    channels: C.
    out: [z, y, x * C], C-contiguous, of the same type; written.
  """
  low = int(x_taps[0].min())
  high = int(x_taps[0].max()) + x_taps[1].shape[1]
  first = ((x_taps[0] - low)[:, None] * channels + np.arange(channels)).ravel()
  weights = np.repeat(x_taps[1].T, channels, axis=1)  # [K, x * C]
  if len(weights) > 2 and len(weights) % 2:  # Columns are added two at a time.
    weights = np.concatenate([weights, np.zeros_like(weights[:1])])
  _compiled("resize", volume.dtype.name)(
      volume, *z_taps, *y_taps, first.astype(np.int32), np.ascontiguousarray(weights),
      channels, low * channels, high * channels, out.dtype.kind != "f", out,
  )


def count_values(values: np.ndarray) -> np.ndarray:
  """Returns int64 [65536], how often each value occurs, lowest of the type first.

  Args:
    values: uint8, uint16 or int16, C-contiguous, of any shape.
  """
  counts = np.zeros(65536, np.int64)
  _compiled("count", values.dtype.name)(
      values.reshape(-1), int(np.iinfo(values.dtype).min), counts
  )
  return counts


def count_keys(values: np.ndarray, high: int | None = None) -> np.ndarray:
  """Returns int64 [65536], how often each upper half of a value's key occurs.

  Keys are whole numbers of 32 bits that rise as the values do.

  Args:
    values: float32, C-contiguous, of any shape.
    high: count the lower halves of the keys with this upper half instead.
  """
  counts = np.zeros(65536, np.int64)
  _compiled("count_keys", "uint32")(
      values.reshape(-1).view(np.uint32), -1 if high is None else high, counts
  )
  return counts


def key_value(key: int) -> float:
  """Returns the float32 of a key."""
  bits = key ^ 0x80000000 if key >> 31 else key ^ 0xFFFFFFFF
  return float(np.uint32(bits).view(np.float32))


def scale_to_uint8(
    values: np.ndarray, low: float, scale: float, out: np.ndarray
) -> None:
  """Writes round((values - low) * scale), limited to 0 .. 255.

  Args:
    values: of a Record's type, C-contiguous.
    low: the value that becomes 0.
    scale: grey levels per value.
    out: uint8 of as many elements, C-contiguous; written.
  """
  _compiled("scale", values.dtype.name)(
      values.reshape(-1), np.float32(low), np.float32(scale), out.reshape(-1)
  )


@functools.cache
def _compiled(name: str, dtype: str) -> Callable[..., Any]:
  import numba
  from numba import types

  element = types.Array(getattr(types, dtype), 1, "C", readonly=True)
  volume = element.copy(ndim=3)
  first, weights = types.int32[::1], types.float32[:, ::1]
  function, signature = {
      "resize": (_resize, types.void(
          volume, first, weights, first, weights, first, weights, types.intp,
          types.intp, types.intp, types.boolean, volume.copy(readonly=False),
      )),
      "count": (_count, types.void(element, types.intp, types.int64[::1])),
      "count_keys": (_count_keys, types.void(element, types.intp, types.int64[::1])),
      "scale": (_scale, types.void(
          element, types.float32, types.float32, types.uint8[::1]
      )),
  }[name]
  # Sums may be regrouped, which vector units need; NaN and infinity stay as they are.
  options = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}}
  try:
    return numba.njit(signature, cache=True, **options)(function)
  except (RuntimeError, OSError):  # No folder for the cache can be written.
    return numba.njit(signature, **options)(function)


def _resize(
    volume, z_first, z_weights, y_first, y_weights, x_first, x_weights, channels,
    low, high, whole, out,
):
  depth, rows, columns = out.shape
  half = np.float32(0.5 if whole else 0.0)
  line = np.zeros(high - low + channels, np.float32)  # What lies past it has weight 0.
  total = np.empty(columns, np.float32)
  for z in range(depth):
    for y in range(rows):
      line[:] = 0
      for i in range(z_weights.shape[1]):
        for j in range(y_weights.shape[1]):
          weight = z_weights[z, i] * y_weights[y, j]
          if weight != 0:
            source = volume[z_first[z] + i, y_first[y] + j, low:high]
            for x in range(source.size):
              line[x] += weight * np.float32(source[x])
      taps = x_weights.shape[0]
      if taps == 1:
        for x in range(columns):
          total[x] = line[x_first[x]] + half
      else:
        for x in range(columns):
          total[x] = (
              x_weights[0, x] * line[x_first[x]]
              + x_weights[1, x] * line[x_first[x] + channels] + half
          )
      for k in range(2, taps, 2):
        for x in range(columns):
          at = x_first[x] + k * channels
          total[x] += (
              x_weights[k, x] * line[at] + x_weights[k + 1, x] * line[at + channels]
          )
      if whole:
        for x in range(columns):
          out[z, y, x] = np.int32(np.floor(total[x]))
      else:
        for x in range(columns):
          out[z, y, x] = total[x]


def _count(values, lowest, counts):
  for n in range(values.size):
    counts[np.int64(values[n]) - lowest] += 1


def _count_keys(keys, high, counts):
  for n in range(keys.size):
    # Bits of a float32, made to rise with it: all are turned where it is negative.
    key = np.int64(keys[n])
    key = key ^ 0xFFFFFFFF if key >> 31 else key | 0x80000000
    if high < 0:
      counts[key >> 16] += 1
    elif key >> 16 == high:
      counts[key & 0xFFFF] += 1


def _scale(values, low, scale, out):
  top, half = np.float32(255.0), np.float32(0.5)
  for n in range(values.size):
    level = (np.float32(values[n]) - low) * scale
    out[n] = np.int32(min(max(level, np.float32(0.0)), top) + half)
