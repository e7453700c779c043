"""NumPy files: `.npy`, and `.npz` with one array or several.

Axes are those stated in `axes`; else three are [Z, Y, X] and five [T, Z, Y, X, C].
Pickled objects are never loaded. What a header or a ZIP directory claims is checked
before anything of that size is made.
"""

import io
import math
import struct
from typing import Any, BinaryIO
import zipfile

import numpy as np

from vjepa_jax.data.readers.base import (
    DEFAULT_AXES,
    ReadOptions,
    arrange,
    border,
    check_voxels,
    to_record,
)
from vjepa_jax.data.record import ReadError, Record

_MAGIC = b"\x93NUMPY"
_ZIP = b"PK\x03\x04"
_STEP = 1 << 24


def matches(head: bytes, path: str) -> bool:
  """Says whether a content begins as a NumPy file, or as a ZIP of such files."""
  if head[:4] == _ZIP and len(head) >= 30:
    (size,) = struct.unpack_from("<H", head, 26)
    return head[30:30 + size].endswith(b".npy") or path.lower().endswith(".npz")
  return head[:6] == _MAGIC


def read(data: bytes, source: str, options: ReadOptions) -> Record:
  """Reads one array.

  Of an npz `options.key` chooses the array; else `volume`, else the only one of three
  to five axes. An array `spacing`, (dz, dy, dx) in mm or with dt in s before, belongs
  to it.

  Raises:
    ReadError: truncated, bad_header, several_series, unsupported_format (axes),
      unsupported_pixels, nan_voxels, too_large, empty_file, no_decoder.
  """
  spacing = None
  if data[:4] == _ZIP:
    array, spacing = _read_npz(data, source, options)
  else:
    stream = io.BytesIO(data)
    array = _take(stream, len(data), source, _header(stream, source), options)
  axes = options.axes or DEFAULT_AXES.get(array.ndim)
  if axes is None or len(axes) != array.ndim:
    raise ReadError(
        source, "unsupported_format" if options.axes is None else "ambiguous_axes",
        f"array of shape {array.shape}" + (f", axes {axes!r}" if axes else ""),
        "store [Z, Y, X] or [T, Z, Y, X, C], or state axes=\"TYX\" or the like",
    )
  return to_record(
      arrange(array, axes, source), _lengths(spacing, source), source, options,
      meta={
          "format": "npz" if data[:4] == _ZIP else "npy", "axes": axes,
          "axes_source": "stated" if options.axes else "default",
          "stored_type": str(array.dtype),
      },
  )


def _read_npz(
    data: bytes, source: str, options: ReadOptions
) -> tuple[np.ndarray, np.ndarray | None]:
  with border(source, "truncated"):
    archive = zipfile.ZipFile(io.BytesIO(data))
    entries = {
        e.filename.removesuffix(".npy"): e for e in archive.infolist()
        if e.filename.endswith(".npy")
    }
  headers = {}
  for name, entry in entries.items():
    if entry.flag_bits & 1:
      raise ReadError(source, "no_decoder", f"{name} is encrypted")
    with border(source, "truncated"), archive.open(entry) as stream:
      headers[name] = _header(stream, source)
  name = _choose(headers, source, options.key)
  array = _member(archive, entries[name], source, options)
  spacing = None
  if "spacing" in entries and name != "spacing":
    if math.prod(headers["spacing"][0]) <= 4 and headers["spacing"][2].kind in "iuf":
      spacing = _member(archive, entries["spacing"], source, options)
    else:
      shape, _, dtype = headers["spacing"]
      raise _bad_spacing(source, f"{dtype} {shape}")
  return array, spacing


def _member(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, source: str, options: ReadOptions
) -> np.ndarray:
  with border(source, "truncated"), archive.open(entry) as stream:
    header = _header(stream, source)
    return _take(stream, entry.file_size, source, header, options)


def _choose(headers: dict[str, tuple], source: str, key: str | None) -> str:
  whole = [n for n, h in headers.items() if 3 <= len(h[0]) <= 5 and h[2].kind in "biuf"]
  if key is None and "volume" in headers:
    return "volume"
  if key is None and len(headers) == 1:
    return next(iter(headers))
  if key is None and len(whole) == 1:
    return whole[0]
  if key is not None and key in headers:
    return key
  found = ", ".join(f"{n} {h[2]} {h[0]}" for n, h in sorted(headers.items())[:8])
  raise ReadError(
      source, "several_series" if headers else "unsupported_format",
      f"npz holds {found or 'no array'}" + (f", no {key!r}" if key else ""),
      "name the array `volume`, or choose one with key=\"NAME\"",
  )


def _header(stream: BinaryIO, source: str) -> tuple[tuple[int, ...], bool, np.dtype]:
  """Reads a .npy header: (shape, Fortran order, type)."""
  with border(source, "truncated"):
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
      header = np.lib.format.read_array_header_1_0(stream)
    else:
      header = np.lib.format.read_array_header_2_0(stream)
  if any(n < 0 for n in header[0]):
    raise ReadError(source, "bad_header", f"shape {header[0]}")
  return header


def _take(
    stream: BinaryIO, size: int, source: str, header: tuple, options: ReadOptions
) -> np.ndarray:
  """Reads the voxels behind a header of a file or entry of `size` bytes."""
  shape, fortran, dtype = header
  if dtype.hasobject or dtype.kind not in "biuf":
    raise ReadError(source, "unsupported_pixels", f"array of {dtype}")
  check_voxels(shape, source, options.max_voxels)
  wanted, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
  if wanted != held:
    raise ReadError(
        source, "truncated" if held < wanted else "bad_header",
        f"{dtype} {shape} takes {wanted:,} bytes, there are {held:,}",
    )
  content = bytearray(wanted)
  view, at = memoryview(content), 0
  while at < wanted:
    got = stream.readinto(view[at:at + _STEP])
    if not got:
      raise ReadError(source, "truncated", f"{at:,} of {wanted:,} bytes")
    at += got
  array = np.frombuffer(content, dtype)
  return array.reshape(shape, order="F" if fortran else "C")


def _lengths(spacing: Any, source: str) -> tuple[float, ...]:
  """Returns (dt, dz, dy, dx) of an array's spacing; NaN stays unknown."""
  if spacing is None:
    return (math.nan,) * 4
  lengths = np.asarray(spacing, np.float64)
  if lengths.shape not in ((3,), (4,)) or not (np.isnan(lengths) | (lengths > 0)).all():
    raise _bad_spacing(source, spacing.tolist())
  return (*(math.nan,) * (4 - len(lengths)), *lengths.tolist())


def _bad_spacing(source: str, found: Any) -> ReadError:
  return ReadError(
      source, "bad_header", f"spacing is {found!r}",
      "store (dz, dy, dx) in mm, above 0, NaN where unknown",
  )
