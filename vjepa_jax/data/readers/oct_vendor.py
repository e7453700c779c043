"""Files of OCT makers: Heidelberg .vol and .e2e, Topcon .fda and .fds, Bioptigen and
Optovue .oct, Zeiss .img.

A Heidelberg .vol is read here, by its published layout; the others by `oct-converter`.
What that library fills in by itself (a width of 10 or 15 micrometres, a distance of 50)
is left unknown, and slices that it would skip or repeat are an error. Names, birth
dates and visit dates are not passed on.
"""

import dataclasses
import math
import os
import re
import struct
import tempfile
from typing import Any

import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.readers import apart
from vjepa_jax.data.readers.base import (
    ReadOptions,
    border,
    check_voxels,
    missing_extra,
    to_record,
)
from vjepa_jax.data.record import ReadError, Record

_VOL_HEADER = struct.Struct("<12s3i3d2i2did4sq2i16s16si21s")
_VOL_BYTES, _SLICE_HEADER = 2048, struct.Struct("<12si4d")
# Heidelberg writes the largest float32 where the eye's motion left no sample.
_NO_SAMPLE = np.finfo(np.float32).max
_SIDES = {"OD": "R", "OS": "L", "R": "R", "L": "L", 0: "R", 1: "L"}
_CIRRUS = re.compile(r"(\d+)x(\d+)_.*cube_z", re.IGNORECASE)
_CIRRUS_DEPTH = 1024
_TOPCON_VOLUME = 2  # scan_mode: 2 a raster, 3 radial, 4 a cross.


@dataclasses.dataclass
class _Scan:
  """One volume of a file: voxels [Z, Y, X], (dz, dy, dx) in mm, the eye."""

  name: str
  volume: Any
  spacing: tuple[float, float, float] = (math.nan,) * 3
  laterality: str = ""
  geometry: str = ""
  subject: str = ""


def matches(head: bytes, path: str) -> bool:
  """Says whether a content has a maker's mark, or a name as these machines give it."""
  return bool(_maker(head, path))


def _maker(head: bytes, path: str) -> str:
  if head[:8] == b"HSF-OCT-":
    return "vol"
  if head[:4] == b"CMDb" or head[:21] == b"E2EMultipleVolumeFile":
    return "e2e"
  if head[:4] == b"FOCT":
    return "topcon"
  if head[10:21] == b"FRAMEHEADER":
    return "boct"
  name = os.path.basename(path).lower()
  if name.endswith(".oct"):
    return "poct"
  return "img" if name.endswith(".img") and "cube" in name else ""


def read(data: bytes, source: str, options: ReadOptions) -> Record:
  """Reads one scan: `options.key`, or the only one, as [1, Z, Y, X, 1].

  Raises:
    ReadError: several_series, no_pixel_data, bad_header, truncated, irregular_frames,
      slices_missing, ambiguous_axes (a .img whose name does not give its size),
      decode_failed, too_large, missing_extra, timed_out, decoder_died.
  """
  maker = _maker(data[:1024], source)
  sidecar = b""
  if maker == "poct":
    sidecar = storage.read_bytes(source[:-4] + ".txt", max_bytes=1 << 20)
  # Made here, so that a helper that is killed leaves none.
  with tempfile.TemporaryDirectory() as folder:
    return apart.call(
        _read, data, sidecar, maker, folder, source, options, source=source,
        timeout_s=options.timeout_s,
    )


def _read(
    data: bytes, sidecar: bytes, maker: str, folder: str, source: str,
    options: ReadOptions,
) -> Record:
  if maker == "vol":
    scans = [_read_vol(data, source, options)]
  else:
    path = os.path.join(folder, "scan.oct")
    with open(path, "wb") as file:
      file.write(data)
    if sidecar:
      with open(os.path.join(folder, "scan.txt"), "wb") as file:
        file.write(sidecar)
    reader = {
        "e2e": _read_e2e, "topcon": _read_topcon, "boct": _read_boct,
        "poct": _read_poct, "img": _read_img,
    }[maker]
    apart.allow(0)
    with border(source, "bad_header"):
      try:
        scans = reader(path, data, source, options)
      except ModuleNotFoundError as error:
        raise missing_extra(source, "oct", error) from error
  scan = _choose(scans, source, options.key)
  volume = _stack(scan.volume, source, options)
  # A missing sample is no brightness; the voxels of all other formats are kept.
  absent = volume == _NO_SAMPLE if volume.dtype.kind == "f" else np.False_
  meta = {
      "format": f"OCT ({maker})", "laterality": scan.laterality, "key": scan.name,
      "axes": "ZYX", "axes_source": "file", "stored_type": str(volume.dtype),
  }
  if absent.any():
    meta["samples_absent"] = f"{absent.mean():.2%} of the voxels, set to 0"
    volume = np.where(absent, np.float32(0), volume)
  if scan.geometry:
    meta["geometry"] = scan.geometry
  return to_record(
      volume[None, ..., None], (math.nan, *scan.spacing), source, options,
      subject=scan.subject, meta=meta,
  )


def _choose(scans: list[_Scan], source: str, key: str | None) -> _Scan:
  for number, scan in enumerate(scans):
    if key is not None and key in (scan.name, str(number)):
      return scan
  if key is None and len(scans) == 1:
    return scans[0]
  if not scans:
    raise ReadError(source, "no_pixel_data", "it holds no OCT scan")
  names = ", ".join(
      f"{s.name} ({len(s.volume)} slices, {s.laterality})" for s in scans[:8]
  )
  raise ReadError(
      source, "several_series", f"it holds {names}; key is {key!r}",
      "choose one by its name or number, such as key=\"0\"",
  )


def _stack(slices: Any, source: str, options: ReadOptions) -> np.ndarray:
  """Returns [Z, Y, X] of slices of one size."""
  shapes = {np.shape(s) for s in slices}
  if len(shapes) != 1 or len(next(iter(shapes))) != 2:
    raise ReadError(source, "irregular_frames", f"its slices are {sorted(shapes)[:4]}")
  check_voxels((len(slices), *shapes.pop()), source, options.max_voxels)
  apart.allow(2 * len(slices) * slices[0].nbytes)
  return np.stack(list(slices))


def _read_vol(data: bytes, source: str, options: ReadOptions) -> _Scan:
  """Reads Heidelberg's export: a header, the fundus image, slices with headers."""
  if len(data) < _VOL_BYTES:
    raise ReadError(
        source, "truncated", f"{len(data)} bytes, its header has {_VOL_BYTES}"
    )
  header = _VOL_HEADER.unpack_from(data)
  width, slices, depth, dx, dz, dy, fundus_x, fundus_y = header[1:9]
  eye, pattern, slice_header, patient = (header[i] for i in (13, 15, 16, 20))
  sizes = (width, slices, depth, fundus_x, fundus_y)
  if min(sizes[:3]) < 1 or min(sizes) < 0 or slice_header < _SLICE_HEADER.size:
    raise ReadError(
        source, "bad_header", f"sizes {sizes}, slice header {slice_header}"
    )
  check_voxels((slices, depth, width), source, options.max_voxels)
  start = _VOL_BYTES + fundus_x * fundus_y
  step = slice_header + 4 * width * depth
  if start + slices * step > len(data):
    raise ReadError(
        source, "truncated",
        f"{slices} slices take {start + slices * step:,} bytes, there are "
        f"{len(data):,}",
    )
  lines, volume = [], np.empty((slices, depth, width), np.float32)
  for index in range(slices):
    at = start + index * step
    lines.append(_SLICE_HEADER.unpack_from(data, at)[2:])
    volume[index] = np.frombuffer(
        data, "<f4", width * depth, at + slice_header
    ).reshape(depth, width)
  geometry = _geometry(np.array(lines).reshape(-1, 2, 2))
  return _Scan(
      "0", volume, (dz if geometry in ("", "raster") else math.nan, dy, dx),
      _SIDES.get(_text(eye), ""), geometry or f"pattern {pattern}", _text(patient),
  )


def _geometry(lines: np.ndarray) -> str:
  """Tells parallel slices from a circle and a star; their ends are [Z, 2, (x, y)]."""
  along = lines[:, 1] - lines[:, 0]
  length = np.linalg.norm(along, axis=1)
  if not np.isfinite(length).all() or len(lines) < 2:
    return ""
  if (length < 1e-6).any():
    return "" if not length.any() else "circle"
  unit = along / length[:, None]
  return "raster" if (np.abs(unit @ unit[0]) > 0.99).all() else "radial"


def _text(value: bytes | None) -> str:
  return (value or b"").split(b"\0")[0].decode("latin-1").strip()


def _read_e2e(path: str, data: bytes, source: str, options: ReadOptions) -> list[_Scan]:
  """Reads Heidelberg's raw files; of the lengths they hold only the depth's."""
  from oct_converter.readers import E2E

  _check_e2e_directories(data, source)
  apart.allow(40 * len(data))  # The library decodes 16 bits to float64.
  file = E2E(path)
  volumes = file.read_oct_volume()
  # How many slices each one says belong to its volume.
  stated = {int(b["numImages"]) for b in file.read_all_metadata().get("bscan_data", ())}
  scans = []
  for volume in volumes:
    if stated and len(volume.volume) < min(stated):
      raise ReadError(
          source, "slices_missing", f"{len(volume.volume)} of {min(stated)} slices"
      )
    depth = (volume.pixel_spacing or (math.nan,) * 3)[1]
    scans.append(_Scan(
        str(volume.volume_id), [np.float32(s) for s in volume.volume],
        (math.nan, depth, math.nan), _SIDES.get(volume.laterality or "", ""),
        subject=str(volume.patient_id or "").strip("\0 "),
    ))
  return scans


def _check_e2e_directories(data: bytes, source: str) -> None:
  """Refuses directories that lead in a circle or out of the file.

  The library would follow the one for ever and pass over the other.
  """
  skip = 64 if data[:21] == b"E2EMultipleVolumeFile" else 0
  (at,) = struct.unpack_from("<I", data, skip + 36 + 40)
  seen = set()
  while at:
    if at in seen:
      raise ReadError(source, "bad_header", "its directories run in a circle")
    seen.add(at)
    first = at + skip + 52
    entries = 0
    if first <= len(data):
      (entries,) = struct.unpack_from("<I", data, at + skip + 36)
    if first + 44 * entries > len(data):
      raise ReadError(
          source, "truncated",
          f"a directory of {entries:,} at byte {at:,} of {len(data):,}",
      )
    for entry in range(entries):
      place, start, size = struct.unpack_from("<3I", data, first + 44 * entry)
      if start > place and start + skip + size > len(data):
        raise ReadError(
            source, "truncated", f"a part at byte {start:,} of {len(data):,}"
        )
    (at,) = struct.unpack_from("<I", data, at + skip + 44)


class _Numpy:
  """NumPy with the binary `fromstring` that version 2.3 took away."""

  fromstring = staticmethod(np.frombuffer)

  def __getattr__(self, name: str) -> Any:
    return getattr(np, name)


def _read_topcon(
    path: str, data: bytes, source: str, options: ReadOptions
) -> list[_Scan]:
  from oct_converter.readers import fda, fds

  fda.np = fds.np = _Numpy()
  chunks = _check_topcon_chunks(data, source)
  if b"@IMG_SCAN_03" in chunks:
    file = fds.FDS(path)
    scan = _chunk(data, chunks, b"@IMG_SCAN_03")
    header = fds.fds_binary.oct_header.parse(scan[:22])
    shape = _check_topcon_size(header, len(data), source, options)
    volume = np.frombuffer(scan, "<u2", math.prod(shape), 22).reshape(shape)
  else:
    file = fda.FDA(path)
    if b"@IMG_JPEG" in chunks:
      header = fda.fda_binary.oct_header.parse(_chunk(data, chunks, b"@IMG_JPEG")[:25])
    elif b"@IMG_MOT_COMP_03" in chunks:
      header = fda.fda_binary.oct_header_2.parse(
          _chunk(data, chunks, b"@IMG_MOT_COMP_03")[:22]
      )
      _check_topcon_size(header, len(data), source, options)
    else:
      return []
    shape = (header.number_slices, header.height, header.width)
    check_voxels(shape, source, options.max_voxels)
    apart.allow(4 * math.prod(shape))
    volume, _ = file.read_oct_data_chunk()
    if (len(volume), *np.shape(volume[0])) != shape:
      raise ReadError(
          source, "bad_header",
          f"{len(volume)} slices of {np.shape(volume[0])}, the header says {shape}",
      )
  return [_topcon_scan(file, header, volume, chunks)]


def _topcon_scan(file: Any, header: Any, volume: Any, chunks: dict) -> _Scan:
  spacing = (math.nan,) * 3
  if {b"@PARAM_SCAN_04", b"@PARAM_SCAN_02"} & set(chunks):
    dx, dz, dy = file.read_scan_params(header)
    raster = header.scan_mode == _TOPCON_VOLUME
    spacing = (dz if raster else math.nan, dy, dx)
  found = {}
  for name in (b"@CAPTURE_INFO", b"@CAPTURE_INFO_02", b"@PATIENT_INFO_02"):
    if name in chunks:
      found |= file.read_any_info_and_make_dict(name)
  modes = {_TOPCON_VOLUME: "raster", 3: "radial", 4: "cross"}
  return _Scan(
      "0", volume, spacing, _SIDES.get(found.get("eye"), ""),
      modes.get(header.scan_mode, f"mode {header.scan_mode}"),
      str(found.get("patient_id") or "").strip(),
  )


def _check_topcon_chunks(data: bytes, source: str) -> dict[bytes, tuple[int, int]]:
  """Returns name -> (start, bytes); the library itself never looks for the end."""
  at, chunks = 15, {}
  while at < len(data) and data[at]:
    name = bytes(data[at + 1:at + 1 + data[at]])
    at += 1 + data[at]
    size = int.from_bytes(data[at:at + 4], "little")
    chunks[name] = (at + 4, size)
    at += 4 + size
  if at >= len(data):
    raise ReadError(
        source, "truncated", f"its parts take more than {len(data):,} bytes"
    )
  return chunks


def _chunk(data: bytes, chunks: dict[bytes, tuple[int, int]], name: bytes) -> bytes:
  start, size = chunks[name]
  return data[start:start + size]


def _check_topcon_size(
    header: Any, size: int, source: str, options: ReadOptions
) -> tuple[int, int, int]:
  shape = (header.number_slices, header.height, header.width)
  check_voxels(shape, source, options.max_voxels)
  if 2 * math.prod(shape) > size or header.bits_per_pixel != 16:
    raise ReadError(
        source, "bad_header",
        f"{shape} of {header.bits_per_pixel} bits in a file of {size:,} bytes",
    )
  apart.allow(8 * math.prod(shape))
  return shape


def _read_boct(
    path: str, data: bytes, source: str, options: ReadOptions
) -> list[_Scan]:
  """Reads Bioptigen's files; each time point of a series is a scan of its own."""
  from oct_converter.readers import BOCT

  file = BOCT(path)
  header = BOCT.header_structure.parse(data)
  frames = header.framecount.value
  shape = (frames, header.linelength.value, header.linecount.value)
  check_voxels(shape, source, options.max_voxels)
  if 2 * math.prod(shape) > len(data):
    raise ReadError(source, "truncated", f"{shape} voxels in {len(data):,} bytes")
  apart.allow(16 * math.prod(shape))
  found = file.file_structure.parse(data)
  sizes = {(f.image.rows, f.image.columns) for f in found.data}
  if len(sizes) != 1 or header.frames.value * header.scans.value != frames:
    raise ReadError(
        source, "irregular_frames",
        f"{frames} frames for {header.frames.value} x {header.scans.value}, of sizes "
        f"{sorted(sizes)[:4]}",
    )
  if any(f.image.end > len(data) for f in found.data):
    raise ReadError(source, "truncated", "its last frames lie outside the file")
  side = re.search(r"O[DS]", os.path.basename(source))
  volumes = file.read_oct_volume()  # [scans, A-scans, depth] each
  return [
      _Scan(
          str(i), np.swapaxes(v.volume, 1, 2),
          laterality=_SIDES.get(side.group() if side else "", ""),
      )
      for i, v in enumerate(volumes)
  ]


def _read_poct(
    path: str, data: bytes, source: str, options: ReadOptions
) -> list[_Scan]:
  """Reads Optovue's floats, by the sizes in the text file beside."""
  from oct_converter.readers import POCT

  file = POCT(path)
  file._read_filespec()
  shapes = [(s["number"], s["height"], s["length"]) for s in file.scan_info]
  for shape in shapes:
    check_voxels(shape, source, options.max_voxels)
  # The library reads every scan from the file's start.
  if len(shapes) != 1 or 4 * math.prod(shapes[0]) != len(data):
    raise ReadError(
        source, "frames_mismatch",
        f"the text file states {shapes}, the file holds {len(data):,} bytes",
    )
  apart.allow(8 * math.prod(shapes[0]))
  (volume,) = file.read_oct_volume()
  return [_Scan("0", volume.volume, laterality=file.file_info.get("laterality", ""))]


def _read_img(path: str, data: bytes, source: str, options: ReadOptions) -> list[_Scan]:
  """Reads Zeiss' bare bytes, by the size in the name that the machine gives them."""
  from oct_converter.readers import IMG

  name = os.path.basename(source)
  found = _CIRRUS.search(name)
  if not found:
    raise ReadError(
        source, "ambiguous_axes", "the file has no header and its name no size",
        "keep the machine's name, such as P1_Macular Cube 512x128_..._OD_cube_z.img",
    )
  width, slices = map(int, found.groups())
  check_voxels((slices, _CIRRUS_DEPTH, width), source, options.max_voxels)
  size = slices * _CIRRUS_DEPTH * width
  if size != len(data):
    raise ReadError(
        source, "truncated" if size > len(data) else "bad_header",
        f"its name means {slices} x {_CIRRUS_DEPTH} x {width} bytes, it has "
        f"{len(data):,}",
    )
  apart.allow(8 * len(data))
  volume = IMG(path).read_oct_volume(rows=_CIRRUS_DEPTH, cols=width)
  side = re.search(r"_(O[DS])_", name)
  laterality = _SIDES.get(side.group(1) if side else "", "")
  return [_Scan("0", volume.volume, laterality=laterality)]
