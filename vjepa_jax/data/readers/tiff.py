"""TIFF and its kinds: BigTIFF, OME-TIFF, ImageJ stacks, pyramids.

Which axis is which: as stated in `axes`; else as the file's metadata says; else,
where one single axis besides Y and X is unknown, it is Z, and `meta["axes_source"]`
is "assumed". Two or more unknown axes are refused. Lengths count only where the
file gives them a physical unit; the dots per inch of a printer are none.
"""

from collections.abc import Iterator
import dataclasses
import io
import logging
import math
import mmap
import os
import struct
from typing import Any
from xml.etree import ElementTree

import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.readers import apart
from vjepa_jax.data.readers.base import (
    ReadOptions,
    arrange,
    border,
    check_voxels,
    luminance,
    missing_extra,
    to_record,
)
from vjepa_jax.data.record import ReadError, Record

_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# No recording has more; a chain of directories that is longer is hostile.
_MAX_PAGES = 1 << 20
# Of a tag's type, by its number; private tags are not ours to judge.
_TYPE_BYTES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
    16: 8, 17: 8, 18: 8,
}
_FIRST_PRIVATE = 1024
# Names of TIFF 6.0 and DNG for what a sample means.
_WHITE_IS_ZERO, _GREY, _RGB, _PALETTE, _YCBCR, _LINEAR = 0, 1, 2, 3, 6, 34892
_MM = {
    "m": 1e3, "cm": 10.0, "mm": 1.0, "µm": 1e-3, "μm": 1e-3, "um": 1e-3, "nm": 1e-6,
    "pm": 1e-9, "å": 1e-7, "inch": 25.4, "in": 25.4, "micron": 1e-3, "microns": 1e-3,
    "micrometer": 1e-3, "millimeter": 1.0, "centimeter": 10.0, "nanometer": 1e-6,
    "\\u00b5m": 1e-3,
}
_S = {
    "s": 1.0, "sec": 1.0, "ms": 1e-3, "msec": 1e-3, "µs": 1e-6, "us": 1e-6,
    "min": 60.0, "h": 3600.0, "hour": 3600.0, "d": 86400.0,
}
# Dots per inch that drawing programs write without having measured anything.
_PRINT_DPI = (72, 96, 100, 120, 144, 150, 180, 200, 240, 300, 360, 400, 600, 1200, 2400)


def matches(head: bytes, path: str) -> bool:
  """Says whether a content begins as a TIFF file does."""
  del path
  return head[:4] in _MARKS


def read(data: bytes, source: str, options: ReadOptions) -> Record:
  """Reads one TIFF file.

  `options.key` chooses a series of several, by its number or its name.

  Raises:
    ReadError: ambiguous_axes, several_series, colour, unsupported_pixels, truncated,
      frames_mismatch, bad_header, decode_failed, too_large, missing_extra, timed_out,
      decoder_died.
  """
  return apart.call(
      _read, data, source, options, source=source, timeout_s=options.timeout_s
  )


def read_frame(path: str, options: ReadOptions) -> Record:
  """Reads one time point, `options.frame`, of a movie in one file.

  Of a local file nothing else is read but its directories; of an object in a bucket a
  local copy is made once.

  Raises:
    ReadError: as `read`; frames_mismatch for a time point that the file lacks,
      unsupported_format for what is no TIFF, unsupported_pixels for colour.
  """
  local = storage.local_copy(path)
  return apart.call(
      _read_frame, local, path, options, source=path, timeout_s=options.timeout_s
  )


def count_frames(path: str, options: ReadOptions) -> int:
  """Returns how many time points a movie in one file holds; arguments of `read_frame`.

  Raises:
    ReadError: as `read_frame`.
  """
  local = storage.local_copy(path)
  return apart.call(
      _count_frames, local, path, options, source=path, timeout_s=options.timeout_s
  )


def movie_axes(path: str, options: ReadOptions) -> tuple[str, str]:
  """Returns the axes of a movie in one file, and who says so; as `count_frames`.

  The second is "stated" (by the options), "file" or "assumed".

  Raises:
    ReadError: as `read_frame`.
  """
  local = storage.local_copy(path)
  return apart.call(
      _movie_axes, local, path, options, source=path, timeout_s=options.timeout_s
  )


def _read(data: bytes, source: str, options: ReadOptions) -> Record:
  tifffile = library(source)
  with border(source, "bad_header"):
    _check_directories(data, source)
    file = tifffile.TiffFile(io.BytesIO(data), _multifile=False)
    series, number = _choose(file, source, options.key)
    page = series.keyframe
    axes, shape = _axes_and_shape(series, source, options)
    _check_description(file, series, source, options)
    _check_pixels(page, shape, source, options)
    _check_segments(series, len(data), source)
    spacing, notes = _spacing(file, page, number)
  apart.allow(6 * math.prod(shape) * page.dtype.itemsize + 4 * math.prod(page.chunks))
  with border(source, "decode_failed"):
    array = series.levels[0].asarray(maxworkers=1)
  if array.size != math.prod(shape):
    raise ReadError(
        source, "frames_mismatch", f"decodes to {array.shape}, claims {shape}"
    )
  array, letters = _grey(array.reshape(shape), axes, page, source, options)
  letters, origin = _name_axes(letters, array.shape, source, options)
  volume = arrange(array, letters, source)
  device = " ".join(
      str(page.tags.valueof(n, "") or "").strip() for n in ("Make", "Model")
  )
  notes |= {
      "format": f"TIFF ({series.kind})", "device": device.strip(), "axes": letters,
      "axes_source": origin, "compression": page.compression.name.lower(),
      "stored_type": str(page.dtype),
  }
  return to_record(volume, spacing, source, options, meta=notes)


def library(source: str) -> Any:
  """Returns tifffile, which says nothing below a critical fault.

  Raises:
    ReadError: missing_extra, with the path `source`, without the extra `formats`.
  """
  try:
    import tifffile
  except ImportError as error:
    raise missing_extra(source, "formats", error) from error
  logging.getLogger("tifffile").setLevel(logging.CRITICAL)
  return tifffile


@dataclasses.dataclass
class _Movie:
  """A file of several time points, its directories read and checked."""

  file: Any
  series: Any
  letters: str
  origin: str
  shape: tuple[int, ...]
  spacing: tuple[float, ...]
  notes: dict[str, Any]


# The movie read last: its directories, one a plane, are many.
_last: tuple[Any, _Movie] | None = None


def _open_movie(local: str, source: str, options: ReadOptions) -> _Movie:
  global _last
  stamp = os.stat(local)
  key = local, stamp.st_size, stamp.st_mtime_ns, options.axes, options.key
  apart.allow(stamp.st_size + (1 << 30))  # Mapped, which counts as held.
  if _last and _last[0] == key:
    return _last[1]
  tifffile = library(source)
  if stamp.st_size < 8:
    raise ReadError(source, "truncated", f"{stamp.st_size} bytes")
  with open(local, "rb") as file, border(source, "bad_header"):
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      if not matches(data[:4], source):
        raise ReadError(source, "unsupported_format", f"starts with {data[:8]!r}")
      _check_directories(data, source)
    opened = tifffile.TiffFile(local, _multifile=False)
    series, number = _choose(opened, source, options.key)
    page = series.keyframe
    # Of the whole movie any size goes; a time point is judged when it is read.
    axes, shape = _axes_and_shape(
        series, source, dataclasses.replace(options, max_voxels=1 << 62)
    )
    if "S" in axes:
      raise ReadError(
          source, "unsupported_pixels", f"axes {axes}: pixels of several samples",
          "store the channels as an axis C, or one file a time point",
      )
    _check_description(opened, series, source, options)
    _check_pixels(page, shape, source, options)
    _check_segments(series, stamp.st_size, source)
    letters, origin = _name_axes(axes, shape, source, options)
    spacing, notes = _spacing(opened, page, number)
  if "T" in letters[len(shape) - len(page.shape):]:
    raise ReadError(
        source, "ambiguous_axes", f"axes {letters}: its planes lie along time",
        "write it as TZYX",
    )
  movie = _Movie(opened, series, letters, origin, shape, spacing, notes)
  if _last:
    _last[1].file.close()
  _last = key, movie
  return movie


def _count_frames(local: str, source: str, options: ReadOptions) -> int:
  movie = _open_movie(local, source, options)
  return movie.shape[movie.letters.index("T")] if "T" in movie.letters else 1


def _movie_axes(local: str, source: str, options: ReadOptions) -> tuple[str, str]:
  movie = _open_movie(local, source, options)
  return movie.letters, movie.origin


def _read_frame(local: str, source: str, options: ReadOptions) -> Record:
  movie = _open_movie(local, source, options)
  letters, shape, page = movie.letters, movie.shape, movie.series.keyframe
  at = letters.find("T")
  count = shape[at] if at >= 0 else 1
  if options.frame >= count:
    raise ReadError(
        source, "frames_mismatch", f"frame {options.frame} of {count}",
        "make the manifest again from the files as they are",
    )
  one = shape if at < 0 else (*shape[:at], *shape[at + 1:])
  check_voxels(one, source, options.max_voxels)
  apart.allow(6 * math.prod(one) * page.dtype.itemsize + 4 * math.prod(page.chunks))
  planes = np.arange(math.prod(shape[: len(shape) - len(page.shape)]))
  planes = planes.reshape(shape[: len(shape) - len(page.shape)])
  if at >= 0:
    planes = planes.take(options.frame, at)
  with border(source, "decode_failed"):
    array = _planes(movie, planes.ravel())
  array, _ = _grey(array.reshape(one), letters.replace("T", ""), page, source, options)
  notes = movie.notes | {
      "format": f"TIFF ({movie.series.kind})", "axes": letters,
      "axes_source": movie.origin, "compression": page.compression.name.lower(),
      "stored_type": str(page.dtype), "frame": options.frame,
  }
  return to_record(
      arrange(array, letters.replace("T", ""), source), movie.spacing, source, options,
      meta=notes,
  )


def _planes(movie: _Movie, numbers: np.ndarray) -> np.ndarray:
  """Returns planes of a movie, [n, ...]; nothing else of its pixels is read."""
  level, page = movie.series.levels[0], movie.series.keyframe
  if level.dataoffset is None:
    pages = [level[int(n)].asarray(maxworkers=1) for n in numbers]
    return np.stack(pages)
  stored = np.dtype(movie.file.byteorder + page.dtype.char)
  count = math.prod(page.shape)
  planes = np.empty((len(numbers), *page.shape), page.dtype)
  for plane, number in zip(planes, numbers, strict=True):
    at = level.dataoffset + int(number) * count * stored.itemsize
    plane[...] = movie.file.filehandle.read_array(
        stored, count, offset=at
    ).reshape(page.shape)
  return planes


def _check_directories(data: bytes | mmap.mmap, source: str) -> None:
  """Walks the page directories once; refuses endless ones and what lies outside."""
  order = "<" if data[:2] == b"II" else ">"
  big = b"+" in data[2:4]
  link = struct.Struct(order + ("Q" if big else "I"))
  entries = struct.Struct(order + ("Q" if big else "H"))
  entry = struct.Struct(order + ("HHQQ" if big else "HHII"))
  (at,) = link.unpack_from(data, 8 if big else 4)
  seen = set()
  while at:
    if at in seen or len(seen) >= _MAX_PAGES:
      raise ReadError(source, "bad_header", "its page directories run in a circle")
    seen.add(at)
    first, n = at + entries.size, 0
    if first <= len(data):
      (n,) = entries.unpack_from(data, at)
    after = first + n * entry.size
    if after + link.size > len(data):
      raise ReadError(
          source, "truncated",
          f"a page directory of {n:,} entries at byte {at:,} of {len(data):,}",
      )
    for code, kind, count, start in entry.iter_unpack(data[first:after]):
      size = _TYPE_BYTES.get(kind, 0) * count
      if code < _FIRST_PRIVATE and size > link.size and start + size > len(data):
        raise ReadError(
            source, "truncated",
            f"tag {code} takes {size:,} bytes from byte {start:,} of {len(data):,}",
        )
    (at,) = link.unpack_from(data, after)


def _choose(file: Any, source: str, key: str | None) -> tuple[Any, int]:
  """Returns the series to read and its number."""
  found = list(file.series)
  if not found:
    raise ReadError(source, "no_pixel_data", "no image in this TIFF file")
  names = [
      f"{i} ({s.name or 'unnamed'}, {s.axes} {s.shape})" for i, s in enumerate(found)
  ]
  if key is not None:
    for number, series in enumerate(found):
      if key in (str(number), series.name):
        return series, number
  elif len(found) == 1:
    return found[0], 0
  raise ReadError(
      source, "several_series",
      f"key {key!r} is none of: {'; '.join(names[:8])}" if key is not None
      else f"{len(found)} series: {'; '.join(names[:8])}",
      "name one by its number or name, such as key=\"0\"",
  )


def _axes_and_shape(
    series: Any, source: str, options: ReadOptions
) -> tuple[str, tuple[int, ...]]:
  """Returns the file's axes with their sizes, S for the samples of a pixel."""
  shape = tuple(int(n) for n in series.shape)
  check_voxels(shape, source, options.max_voxels)
  colour = _is_colour(series.keyframe) and "S" in series.axes
  # Older releases of tifffile drop axes of length 1; get_shape tells of them.
  squeezed = hasattr(series, "get_shape")
  if squeezed and options.axes and len(options.axes) + colour > len(shape):
    whole = series.get_shape(False), series.get_axes(False)
    if len(whole[0]) == len(options.axes) + colour:
      return whole[1], tuple(whole[0])
  return series.axes, shape


def _is_colour(page: Any) -> bool:
  return int(page.photometric) in (_RGB, _YCBCR)


def _check_description(
    file: Any, series: Any, source: str, options: ReadOptions
) -> None:
  """Refuses to read by pages alone what a broken description says more of."""
  text = str(file.pages[0].description)[:2000]
  kinds = {
      "ome": "<OME" in text or "OME>" in text, "imagej": text.startswith("ImageJ="),
  }
  for kind, says_so in kinds.items():
    if says_so and series.kind != kind and options.axes is None:
      raise ReadError(
          source, "bad_header", f"its {kind} description does not fit its pages",
          "make one file of all its parts, or state axes=\"ZYX\" or the like for its "
          "pages as they lie",
      )
  planes = math.prod(series.shape) // max(math.prod(series.keyframe.shape), 1)
  claimed = planes
  if file.is_imagej:
    claimed = (file.imagej_metadata or {}).get("images", planes)
  if claimed != planes:
    raise ReadError(
        source, "frames_mismatch", f"{planes} of {claimed} planes are there"
    )


def _check_pixels(page: Any, shape: tuple, source: str, options: ReadOptions) -> None:
  kind = int(page.photometric)
  if kind == _PALETTE:
    raise ReadError(
        source, "unsupported_pixels", "its pixels are numbers of a colour table",
        "convert it to grey",
    )
  if _is_colour(page) and options.colour != "luminance":
    raise ReadError(source, "colour", f"{page.photometric.name}, shape {shape}")
  if kind not in (_WHITE_IS_ZERO, _GREY, _RGB, _YCBCR, _LINEAR):
    raise ReadError(
        source, "unsupported_pixels", f"pixels are {page.photometric.name}",
        "convert it to grey",
    )
  if page.dtype is None or page.dtype.kind not in "biuf":
    raise ReadError(
        source, "unsupported_pixels",
        f"samples of {page.bitspersample} bits, {page.dtype or 'of no known type'}",
    )
  check_voxels(page.chunks, source, max(options.max_voxels, 1 << 24))


def _check_segments(series: Any, size: int, source: str) -> None:
  """Refuses planes that are not in the file: tifffile would give zeros."""
  level = series.levels[0]
  if level.dataoffset is not None and level.dataoffset + level.nbytes > size:
    raise ReadError(
        source, "truncated",
        f"{level.nbytes:,} bytes of pixels from byte {level.dataoffset:,} in a file "
        f"of {size:,}",
    )
  for number, page in enumerate(_pages(level)):
    if page is None:
      raise ReadError(
          source, "frames_mismatch",
          f"plane {number} of {len(level.pages)} is not in this file",
          "make one file of all its parts",
      )
    wanted = math.prod(page.keyframe.chunked)
    if page.keyframe.is_contiguous and page.keyframe.compression == 1:
      wanted = min(wanted, len(page.dataoffsets))
    spans = list(zip(page.dataoffsets, page.databytecounts))
    if len(spans) < wanted or any(not a or not n or a + n > size for a, n in spans):
      raise ReadError(
          source, "truncated", f"pixels of plane {number} lie outside the file",
      )


def _pages(level: Any) -> Iterator[Any]:
  """Yields the pages that hold the pixels: one, where all follow the first."""
  if level.dataoffset is not None:
    yield level.keyframe
    return
  for index in range(len(level)):
    yield level[index]


def _grey(
    array: np.ndarray, axes: str, page: Any, source: str, options: ReadOptions
) -> tuple[np.ndarray, str]:
  """Turns the samples of a pixel into grey or into channels; black becomes 0."""
  kind = int(page.photometric)
  if kind == _WHITE_IS_ZERO:
    if array.dtype.kind not in "bu":
      raise ReadError(source, "unsupported_pixels", f"white is zero, of {array.dtype}")
    most = 1 if array.dtype.kind == "b" else 2**page.bitspersample - 1
    array = array ^ np.array(most, array.dtype)
  if "S" not in axes:
    return array, axes
  at = axes.index("S")
  if _is_colour(page):
    if array.shape[at] < 3:
      raise ReadError(source, "bad_header", f"{array.shape[at]} samples of RGB")
    return luminance(np.moveaxis(array, at, -1)), axes.replace("S", "")
  alpha = sum(int(e) in (1, 2) for e in page.extrasamples)
  array = np.take(array, range(array.shape[at] - alpha), at) if alpha else array
  if array.shape[at] == 1 and options.axes is None:
    return array.squeeze(at), axes.replace("S", "")
  # Values side by side are channels. Planes of samples are what programs also make of
  # slices or times whose meaning they were not told; those stay unknown.
  known = at == len(axes) - 1 and set(axes) <= set("TZYXS")
  return array, axes.replace("S", "C") if known else axes


def _name_axes(
    axes: str, shape: tuple[int, ...], source: str, options: ReadOptions
) -> tuple[str, str]:
  """Returns the letters of T, Z, Y, X and C, and who says so."""
  if options.axes:
    stated = options.axes
    if len(stated) == len(axes) - 1 and axes.endswith("C") and "C" not in stated:
      stated += "C"  # The samples of a pixel, which nobody counts as an axis.
    if len(stated) != len(shape):
      raise ReadError(
          source, "ambiguous_axes",
          f"axes {options.axes!r} were stated, the file holds {axes} {shape}",
      )
    return stated, "stated"
  unknown = [i for i, a in enumerate(axes) if a not in "TZYXC" or axes.count(a) > 1]
  if not unknown:
    return axes, "file"
  others = set(axes) - {axes[i] for i in unknown}
  if len(unknown) == 1 and others == {"Y", "X"} and "S" not in axes:
    return axes[:unknown[0]] + "Z" + axes[unknown[0] + 1:], "assumed"
  raise ReadError(
      source, "ambiguous_axes",
      f"the file names its axes {axes}, of sizes {' x '.join(map(str, shape))}",
      "state each axis, such as axes=\"TZYX\"",
  )


def _spacing(
    file: Any, page: Any, number: int
) -> tuple[tuple[float, ...], dict[str, Any]]:
  """Returns (dt, dz, dy, dx) in s and mm, and notes on what was left out."""
  if file.is_ome:
    return _ome_spacing(file.ome_metadata, number), {}
  dy, dx, notes = _resolution(page)
  if not file.is_imagej:
    return (math.nan, math.nan, dy, dx), notes
  found = file.imagej_metadata or {}
  unit = str(found.get("unit", "")).strip().lower()
  mm = _MM.get(unit, math.nan)
  dy, dx = (mm * _pixel_size(page, n) for n in ("YResolution", "XResolution"))
  dz = mm * _number(found.get("spacing"))
  second = _S.get(str(found.get("tunit", "s")).strip(), math.nan)
  dt = second * _number(found.get("finterval"))
  if found.get("unit") and math.isnan(mm):
    notes["spacing_ignored"] = f"unit {unit!r}"
  return (dt, abs(dz), dy, dx), notes


def _ome_spacing(xml: str, number: int) -> tuple[float, ...]:
  """Returns (dt, dz, dy, dx) of the image of this number in the OME description."""
  pixels = [e for e in ElementTree.fromstring(xml).iter() if e.tag.endswith("}Pixels")]
  if number >= len(pixels):
    return (math.nan,) * 4
  found = pixels[number].attrib
  lengths = [
      _number(found.get(f"PhysicalSize{a}"))
      * _MM.get(found.get(f"PhysicalSize{a}Unit", "µm").lower(), math.nan)
      for a in "ZYX"
  ]
  step = _number(found.get("TimeIncrement"))
  return (step * _S.get(found.get("TimeIncrementUnit", "s"), math.nan), *lengths)


def _resolution(page: Any) -> tuple[float, float, dict[str, Any]]:
  """Returns (dy, dx) in mm of the resolution tags, where they mean a length."""
  unit = {2: 25.4, 3: 10.0}.get(int(page.tags.valueof("ResolutionUnit", 2) or 0))
  sizes = [_pixel_size(page, n) for n in ("YResolution", "XResolution")]
  if unit is None or any(map(math.isnan, sizes)):
    return math.nan, math.nan, {}
  dpi = [25.4 / (size * unit) for size in sizes]
  if all(any(abs(d - p) < 0.02 * p / 10 for p in _PRINT_DPI) for d in dpi):
    return math.nan, math.nan, {"spacing_ignored": f"{dpi[0]:.0f} dpi, a printer's"}
  if all(size == 1 for size in sizes):
    return math.nan, math.nan, {}
  return sizes[0] * unit, sizes[1] * unit, {}


def _pixel_size(page: Any, tag: str) -> float:
  """Returns one over a resolution; NaN where there is none above 0."""
  top, bottom = page.tags.valueof(tag, (0, 1)) or (0, 1)
  return bottom / top if top > 0 and bottom > 0 else math.nan


def _number(value: Any) -> float:
  try:
    number = float(value)
  except (TypeError, ValueError):
    return math.nan
  return number if math.isfinite(number) else math.nan
