"""NIfTI-1 and NIfTI-2 files, .nii and .nii.gz, turned to their closest canonical axes.

X runs to the right, Y to the front and Z to the top as nearly as whole axes can (RAS);
oblique volumes keep their angle in `meta["affine"]`. The sform counts before the
qform; with neither code nibabel's convention holds (x to the left), and
`meta["orientation_source"]` is "none". The fourth axis is time and the fifth holds
channels, as the format says; SimpleITK writes channels as [X, Y, Z, 1, C]. Free text
of a header may hold names and is not kept.
"""

import dataclasses
import gzip
import io
import math
import types
from typing import Any, BinaryIO
import zlib

import numpy as np

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

_GZIP = b"\x1f\x8b"
_MARKS = {b"n+1": (1, True), b"ni1": (1, False), b"n+2": (2, True), b"ni2": (2, False)}
_SIZES = {1: 348, 2: 540}
_AXES = {2: "YX", 3: "ZYX", 4: "TZYX", 5: "CTZYX"}
_COLOUR_TYPES = {128: 3, 2304: 4}  # RGB24 and RGBA32: samples a voxel.
_COLOUR_INTENTS = {2003: 3, 2004: 4}
_MM = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}
_UNITS = {0: "not stated, taken as mm", 1: "m", 2: "mm", 3: "um"}
_SECONDS = {8: 1.0, 16: 1e-3, 24: 1e-6}
# Deflate cannot shrink by more.
_GZIP_RATIO = 1032
# What may follow the voxels in a compressed file whose checksum is to be reached.
_MAX_TAIL = 16 << 20
_STEP = 1 << 22


def matches(head: bytes, path: str) -> bool:
  """Says whether a content begins as a NIfTI file does, compressed or not.

  A damaged mark is known by the size that the header states and the file's name.
  """
  named = path.lower().endswith((".nii", ".nii.gz", ".hdr"))
  if head[:2] == _GZIP:
    head = _gunzip_head(head)
    if len(head) < _SIZES[1]:
      return named
  if _mark(head):
    return True
  sizes = {int.from_bytes(head[:4], order) for order in ("little", "big")}
  return named and not sizes.isdisjoint(_SIZES.values())


def read(data: bytes, source: str, options: ReadOptions) -> Record:
  """Reads one file.

  Whole numbers keep their type unless a scaling makes fractions of them; those become
  float32, computed in float64. `options.axes` states the stored axes, slowest first,
  where the fourth is not time: "CZYX". `meta["affine"]` is that of the canonical axes,
  from voxel (x, y, z) to mm.

  Returns:
    Record with volume [T, Z, Y, X, C].

  Raises:
    ReadError: truncated, bad_header, bad_rescale, ambiguous_axes, colour,
      unsupported_format, unsupported_pixels, nan_voxels, too_large, empty_file,
      decode_failed, missing_extra.
  """
  try:
    import nibabel
  except ImportError as error:
    raise missing_extra(source, "formats", error) from error
  with border(source, "bad_header"):
    header, raw = _load(nibabel, data, source, options)
    volume = arrange(raw, header.axes, source)
    if header.is_colour:
      volume = luminance(volume)[..., None]
    volume, affine = _turn(nibabel, volume, header.affine)
    order = np.argsort(nibabel.io_orientation(header.affine)[:, 0])
    with np.errstate(over="ignore"):  # Beyond float32 it is no length.
      spacing = np.array(
          [header.time_step, *header.spacing[order][::-1]], np.float32
      )
    meta = header.meta | {
        "orientation": "".join(nibabel.aff2axcodes(header.affine)),
        "affine": affine.tolist(),
    }
    return to_record(
        np.ascontiguousarray(volume), spacing, source, options, meta=meta
    )


@dataclasses.dataclass(frozen=True)
class _Header:
  """What a header says, checked.

  Attributes:
    shape: as stored, X first; with a colour type its samples come before X.
    axes: letters of the stored axes, slowest first.
    dtype: of one stored value.
    offset: first byte of the voxels.
    slope: of the scaling, and `inter`, its intercept.
    is_colour: the last axis of the arranged volume means red, green, blue.
    affine: float64 [4, 4], stored voxel (x, y, z) to mm.
    spacing: float64 [3], (dx, dy, dz) of the stored axes in mm; NaN: unknown.
    time_step: in s, NaN: unknown.
    meta: what the Record tells of it.
  """

  shape: tuple[int, ...]
  axes: str
  dtype: np.dtype
  offset: int
  slope: float
  inter: float
  is_colour: bool
  affine: np.ndarray
  spacing: np.ndarray
  time_step: float
  meta: dict[str, Any]


def _gunzip_head(head: bytes) -> bytes:
  try:
    return zlib.decompressobj(wbits=31).decompress(head, _SIZES[2])
  except zlib.error:
    return b""


def _mark(head: bytes) -> tuple[int, bool] | None:
  """Returns (version, header and voxels are in one file), or None."""
  return _MARKS.get(head[344:347]) or (
      _MARKS.get(head[4:7]) if head[7:12] == b"\0\r\n\x1a\n" else None
  )


def _load(
    nibabel: types.ModuleType, data: bytes, source: str, options: ReadOptions
) -> tuple[_Header, np.ndarray]:
  """Returns the header and the scaled voxels, stored axes slowest first."""
  zipped = data[:2] == _GZIP
  stream = gzip.GzipFile(fileobj=io.BytesIO(data)) if zipped else io.BytesIO(data)
  head = _take(stream, _SIZES[1], source, "header")
  mark = _mark(head)
  if not mark:
    analyze = source.lower().endswith(".hdr")
    raise ReadError(
        source, "unsupported_format" if analyze else "bad_header",
        "an Analyze header" if analyze else "no NIfTI mark in the header",
    )
  version, single = mark
  if not single:
    raise ReadError(
        source, "unsupported_format",
        "the header of a pair, whose voxels are in another file",
        "convert header and .img to one .nii file",
    )
  head += _take(stream, _SIZES[version] - len(head), source, "header")
  kind = nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header
  fields = kind.from_fileobj(io.BytesIO(head), check=False)
  header = _check(nibabel, fields, version, source, options)
  size = math.prod(header.shape) * header.dtype.itemsize
  room = len(data) * (_GZIP_RATIO if zipped else 1)
  if header.offset + size > room:
    raise ReadError(
        source, "truncated",
        f"the header claims {size:,} bytes of voxels from byte {header.offset:,}, the "
        f"file has {len(data):,}" + (" compressed" if zipped else ""),
    )
  if zipped:
    raw = np.frombuffer(_inflate(stream, header.offset, size, source), header.dtype)
  else:
    raw = np.frombuffer(data, header.dtype, math.prod(header.shape), header.offset)
  raw = _scale(raw, header.slope, header.inter).reshape(header.shape[::-1])
  return header, raw


def _take(stream: BinaryIO, size: int, source: str, what: str) -> bytes:
  try:
    found = stream.read(size)
  except EOFError as error:
    raise ReadError(source, "truncated", f"ends within its {what}") from error
  except (OSError, zlib.error) as error:
    raise ReadError(source, "decode_failed", f"gzip: {error}") from error
  if len(found) < size:
    raise ReadError(
        source, "truncated", f"{len(found):,} of {size:,} bytes of its {what}"
    )
  return found


def _inflate(stream: BinaryIO, offset: int, size: int, source: str) -> bytes:
  """Returns the voxels' bytes, and reads to the end, where the checksum is."""
  done = stream.tell()
  while done < offset:
    done += len(_take(stream, min(offset - done, _STEP), source, "header"))
  body = _take(stream, size, source, "voxels")
  tail = 0
  while True:
    try:
      more = len(stream.read(_STEP))
    except EOFError as error:
      raise ReadError(source, "truncated", "no end of the gzip stream") from error
    except (OSError, zlib.error) as error:
      raise ReadError(source, "decode_failed", f"gzip: {error}") from error
    if not more:
      return body
    tail += more
    if tail > _MAX_TAIL:
      raise ReadError(
          source, "bad_header", f"more than {_MAX_TAIL:,} bytes follow the voxels"
      )


def _check(
    nibabel: types.ModuleType, fields: Any, version: int, source: str,
    options: ReadOptions,
) -> _Header:
  shape, axes = _shape(fields, source, options)
  time_step = _time_step(fields, axes)
  dtype, samples = _dtype(fields, source)
  colours = samples > 1
  if samples == 1 and len(shape) == 5:
    colours = _COLOUR_INTENTS.get(int(fields["intent_code"])) == shape[4]
  if colours and options.colour == "reject":
    raise ReadError(
        source, "colour", f"datatype {int(fields['datatype'])}, intent "
        f"{int(fields['intent_code'])}: red, green and blue",
    )
  if samples > 1:
    if "C" in axes:
      raise ReadError(source, "ambiguous_axes", "colour voxels with a fifth axis")
    shape, axes = (samples, *shape), axes + "C"
  check_voxels(shape, source, options.max_voxels)
  slope, inter = _scaling(fields, source)
  affine, spacing, meta = _place(nibabel, fields, shape[samples > 1 :], source)
  return _Header(
      shape, axes, dtype, _offset(fields, version, source), slope, inter, colours,
      affine, spacing, time_step,
      {"format": f"NIfTI-{version}", **meta},
  )


def _shape(
    fields: Any, source: str, options: ReadOptions
) -> tuple[tuple[int, ...], str]:
  """Returns the stored shape, X first, and its letters, slowest first."""
  dim = [int(n) for n in fields["dim"]]
  if not 1 <= dim[0] <= 7 or min(dim[1 : dim[0] + 1]) < 0:
    raise ReadError(source, "bad_header", f"dim is {dim}")
  shape = tuple(dim[1 : dim[0] + 1])
  while len(shape) > 5 and shape[-1] == 1:
    shape = shape[:-1]
  if len(shape) not in _AXES:
    raise ReadError(
        source, "unsupported_format", f"{len(shape)} axes {shape} are no volume",
        "save the volumes it holds as files of their own",
    )
  axes = options.axes or _AXES[len(shape)]
  if len(axes) != len(shape) or not axes.endswith("ZYX"[-min(3, len(shape)) :]):
    raise ReadError(
        source, "ambiguous_axes",
        f"axes {axes!r} for the stored axes {shape}, X first",
        "state one letter an axis, slowest first, such as axes=\"CZYX\"",
    )
  return shape, axes


def _dtype(fields: Any, source: str) -> tuple[np.dtype, int]:
  """Returns the type of one stored value, and the values a voxel has."""
  code = int(fields["datatype"])
  if code in _COLOUR_TYPES:
    return np.dtype(np.uint8), _COLOUR_TYPES[code]
  try:
    dtype = fields.get_data_dtype()
  except Exception as error:  # nibabel raises several kinds for codes it lacks.
    raise ReadError(source, "bad_header", f"datatype is {code}") from error
  if dtype.kind not in "iuf" or dtype.itemsize > 8:
    raise ReadError(source, "unsupported_pixels", f"datatype {code} ({dtype})")
  if int(fields["bitpix"]) != 8 * dtype.itemsize:
    raise ReadError(
        source, "bad_header",
        f"datatype {code} ({dtype}) with bitpix {int(fields['bitpix'])}",
    )
  return dtype, 1


def _offset(fields: Any, version: int, source: str) -> int:
  offset, least = float(fields["vox_offset"]), _SIZES[version] + 4
  if not least <= offset < 2**62 or offset != int(offset):
    raise ReadError(
        source, "bad_header", f"vox_offset is {offset:g}, the header ends at {least}"
    )
  return int(offset)


def _scaling(fields: Any, source: str) -> tuple[float, float]:
  """Returns (slope, intercept); a slope of 0 or NaN means none."""
  slope, inter = float(fields["scl_slope"]), float(fields["scl_inter"])
  if slope == 0 or math.isnan(slope):
    return 1.0, 0.0
  if not (math.isfinite(slope) and math.isfinite(inter)):
    raise ReadError(
        source, "bad_rescale", f"scl_slope is {slope:g}, scl_inter {inter:g}"
    )
  return slope, inter


def _scale(raw: np.ndarray, slope: float, inter: float) -> np.ndarray:
  """Returns raw * slope + inter, whole numbers where all are whole and fit."""
  if slope == 1 and inter == 0:
    return raw
  if raw.dtype.kind in "iu" and raw.dtype.itemsize <= 2:
    ends = [int(raw.min()) * slope + inter, int(raw.max()) * slope + inter]
    for kind in (raw.dtype.newbyteorder("="), np.dtype(np.int16), np.dtype(np.uint16)):
      limits = np.iinfo(kind)
      if slope == int(slope) and inter == int(inter) and (
          limits.min <= min(ends) and max(ends) <= limits.max
      ):
        return _by_parts(raw, np.int64, int(slope), int(inter), kind)
  return _by_parts(raw, np.float64, slope, inter, np.dtype(np.float32))


def _by_parts(
    raw: np.ndarray, work: type, slope: float, inter: float, kind: np.dtype
) -> np.ndarray:
  result = np.empty(raw.size, kind)
  with np.errstate(all="ignore"):  # NaN and infinity are refused with the voxels.
    for start in range(0, raw.size, _STEP):
      part = slice(start, start + _STEP)
      result[part] = raw[part].astype(work) * slope + inter
  return result


def _place(
    nibabel: types.ModuleType, fields: Any, shape: tuple[int, ...], source: str
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
  """Returns the affine to mm, the spacing (dx, dy, dz) in mm, and what says so."""
  codes = {
      name: int(fields[name]) if 0 <= int(fields[name]) <= 5 else 0
      for name in ("sform_code", "qform_code")
  }
  stated = np.array(fields["pixdim"][1:4], float)
  stated[len(shape) :] = math.nan
  known = (stated > 0) & np.isfinite(stated)
  fields["pixdim"][1:4] = np.where(known, stated, 1.0)
  if fields["pixdim"][0] not in (-1, 1):
    fields["pixdim"][0] = 1  # What the format says of a 0.
  if codes["sform_code"]:
    origin, affine = "sform", fields.get_sform().astype(float)
  elif codes["qform_code"]:
    origin, affine = "qform", fields.get_qform()
  else:
    origin, affine = "none", fields.get_base_affine()
  matrix, single = affine[:3, :3], len(shape) < 3 or shape[2] == 1
  lengths = np.linalg.norm(matrix, axis=0)
  if single and not lengths[2]:  # A picture needs a third direction, of no length.
    matrix[:, 2] = np.cross(matrix[:, 0], matrix[:, 1])
    matrix[:, 2] /= np.linalg.norm(matrix[:, 2]) or 1
  if not np.isfinite(affine).all() or np.linalg.matrix_rank(
      matrix / np.where(lengths, lengths, 1)) < 3:
    raise ReadError(
        source, "bad_header", f"the {origin} {matrix.tolist()} places no volume",
        "set a valid sform or qform",
    )
  spacing = lengths if origin == "sform" else np.where(known, stated, np.nan)
  unit = int(fields["xyzt_units"]) & 7
  scale = _MM.get(unit, math.nan)
  affine[:3] *= 1 if math.isnan(scale) else scale
  meta = codes | {
      "orientation_source": origin, "spacing_unit": _UNITS.get(unit, f"unknown {unit}")
  }
  wrong = [v for v in stated[: len(shape)].tolist() if v < 0 or math.isinf(v)]
  if wrong:
    meta["spacing_invalid"] = f"pixdim {stated.tolist()}"
  elif origin == "sform" and not np.allclose(lengths[known], stated[known], rtol=0.01):
    meta["pixdim"] = stated.tolist()  # They disagree; the sform counts.
  return affine, spacing * scale, meta


def _time_step(fields: Any, axes: str) -> float:
  """Returns seconds between time points; NaN without a unit of time."""
  unit = _SECONDS.get(int(fields["xyzt_units"]) & 0x38, math.nan)
  at = axes[::-1].find("T")
  return float(fields["pixdim"][1 + at]) * unit if at >= 0 else math.nan


def _turn(
    nibabel: types.ModuleType, volume: np.ndarray, affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns [T, Z, Y, X, C] along the closest canonical axes, and its affine."""
  orientation = nibabel.io_orientation(affine)
  stored = volume.transpose(3, 2, 1, 0, 4)  # [X, Y, Z, T, C]
  turned = nibabel.apply_orientation(stored, orientation)
  change = nibabel.orientations.inv_ornt_aff(orientation, stored.shape[:3])
  return turned.transpose(3, 2, 1, 0, 4), affine @ change
