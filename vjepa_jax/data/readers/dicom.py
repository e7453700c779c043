"""Files to Records: DICOM (multi-frame, any codec pydicom can reach) and arrays.

A reader gets bytes or an open file and knows nothing of buckets or training.
Frame = Z, row = Y, column = X. What a file does not say stays unknown: a
missing spacing is NaN with `spacing_source` "missing", never 1 mm.
"""

from collections.abc import Sequence
import io
import math
from typing import Any, BinaryIO
import zipfile
import zlib

import numpy as np
import pydicom
from pydicom.pixels import get_decoder
from pydicom.uid import RLELossless

from vjepa_jax.data import storage
from vjepa_jax.data.record import DTYPES, ReadError, Record

MAX_VOXELS = 2**30
_INSTALL = "pip install \"vjepa_jax[codecs]\""
# Frames closer to even than this share one pitch; above it, dz is unknown.
_PITCH_TOLERANCE = 0.1
# Way as the crow flies over way along the frames: 1 for a raster, less where the
# eye moved, 0.64 for the corners of radial frames over half a turn.
_STRAIGHT = 0.9
_IN_PLANE_TOLERANCE = 0.02
Spacing = tuple[float, float, float]


def read(
    path: str,
    *,
    modalities: Sequence[str] | None = None,
    manifest_spacing: Spacing | None = None,
    colour: str = "reject",
    max_voxels: int = MAX_VOXELS,
) -> Record:
  """Reads one recording, local or `gs://`; its content decides the format.

  Args:
    path: a DICOM file, or a `.npy` / `.npz` array [Z, Y, X] or [T, Z, Y, X, C]
      (an npz may hold `spacing`, (dz, dy, dx) in mm).
    modalities: DICOM modalities to accept, such as ("OPT",); None: any.
    manifest_spacing: (dz, dy, dx) in mm, for what the file leaves open.
    colour: "reject" or "luminance", for DICOM with three samples a pixel.
    max_voxels: larger recordings are refused before they are decoded.

  Returns:
    The Record, in the stored type where it can be kept.

  Raises:
    ReadError: with a reason code, where the file cannot be used.
  """
  data = storage.read_bytes(path)
  if not data:
    raise ReadError(path, "empty_file", "0 bytes")
  if data[128:132] == b"DICM":
    return read_dicom(
        data, source=path, modalities=modalities, colour=colour,
        manifest_spacing=manifest_spacing, max_voxels=max_voxels,
    )
  if data[:6] == b"\x93NUMPY" or data[:4] == b"PK\x03\x04":
    return _read_array(data, path, manifest_spacing, max_voxels)
  if path.lower().endswith((".dcm", ".dicom")):
    raise ReadError(path, "not_dicom", "no DICM mark at byte 128")
  raise ReadError(
      path, "unsupported_format",
      f"starts with {data[:8]!r}; supported are DICOM, .npy and .npz",
  )


def read_dicom(
    file: bytes | BinaryIO,
    *,
    source: str = "",
    modalities: Sequence[str] | None = ("OPT",),
    manifest_spacing: Spacing | None = None,
    colour: str = "reject",
    max_voxels: int = MAX_VOXELS,
) -> Record:
  """Reads one DICOM object, single- or multi-frame.

  Spacing is looked up in the shared functional groups, then the per-frame ones,
  then the top level, then `manifest_spacing`; the frame pitch in the frames'
  positions, the fundus coordinates of OphthalmicFrameLocation,
  SpacingBetweenSlices, SliceThickness, then `manifest_spacing`.
  `meta["spacing_source"]` says which ("shared+positions", ..., "missing").
  MONOCHROME1 is inverted within its stored bits. A rescale that is not whole
  gives float32. Source: DICOM PS3.3 A.52.4 (OPT), C.7.6.16 (functional groups).

  Args:
    file: the content, or an open binary file.
    source: its path, for messages.
    modalities: accepted modalities; None: any.
    manifest_spacing: (dz, dy, dx) in mm; NaN where unknown.
    colour: "reject" or "luminance" (Rec. 601).
    max_voxels: cap on rows x columns x frames, checked before decoding.

  Returns:
    Record with volume [1, frames, rows, columns, 1].

  Raises:
    ReadError: with a reason code, where the file cannot be used.
    ValueError: for an unknown `colour`.
  """
  if colour not in ("reject", "luminance"):
    raise ValueError(f"colour is {colour!r}, must be \"reject\" or \"luminance\"")
  data = file if isinstance(file, bytes) else file.read()
  dataset = _parse(data, source)
  try:
    return _to_record(
        dataset, source, modalities, manifest_spacing, colour, max_voxels
    )
  except (ReadError, MemoryError):
    raise
  except Exception as error:
    # pydicom converts values on access and raises kinds of its own: what random
    # bytes in a header bring up is never anything but one bad file.
    raise ReadError(
        source, "bad_header", f"{type(error).__name__}: {error}"
    ) from error


def _to_record(
    dataset: pydicom.Dataset,
    source: str,
    modalities: Sequence[str] | None,
    manifest_spacing: Spacing | None,
    colour: str,
    max_voxels: int,
) -> Record:
  modality = str(dataset.get("Modality", ""))
  if modalities is not None and modality not in tuple(modalities):
    raise ReadError(
        source, "wrong_modality",
        f"Modality is {modality!r}, wanted {', '.join(modalities)}",
    )
  shape = _shape(dataset, source, max_voxels)
  frames = _decode(dataset, shape, colour, source)  # [Z, Y, X]
  if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
    frames = _invert(frames, dataset)
  frames = _rescale(frames, dataset, source)
  if frames.dtype == np.float32 and not np.isfinite(frames).all():
    raise ReadError(source, "nan_voxels", "NaN or infinite voxels")
  spacing, meta = _spacing(dataset, manifest_spacing)
  meta |= {
      "modality": modality,
      "transfer_syntax": dataset.file_meta.TransferSyntaxUID.name,
      **_anatomy(dataset),
  }
  return Record(
      frames[None, ..., None], np.array([math.nan, *spacing], np.float32), source,
      subject=str(dataset.get("PatientID", "")), meta=meta,
  )


def _parse(data: bytes, source: str) -> pydicom.Dataset:
  if data[128:132] != b"DICM":
    raise ReadError(source, "not_dicom", "no DICM mark at byte 128")
  try:
    dataset = pydicom.dcmread(io.BytesIO(data))
  except (EOFError, zlib.error) as error:
    raise ReadError(source, "truncated", f"{error}") from error
  except Exception as error:  # pydicom raises many kinds on damaged headers.
    raise ReadError(
        source, "bad_header", f"{type(error).__name__}: {error}"
    ) from error
  if "TransferSyntaxUID" not in dataset.file_meta:
    raise ReadError(source, "bad_header", "no transfer syntax")
  if not _has_pixels(dataset) and "Modality" not in dataset:
    # pydicom gives an empty dataset where an encapsulated element is cut off.
    raise ReadError(source, "truncated", f"{len(data):,} bytes end inside an element")
  return dataset


def _has_pixels(dataset: pydicom.Dataset) -> bool:
  return any(
      k in dataset for k in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
  )


def _shape(
    dataset: pydicom.Dataset, source: str, max_voxels: int
) -> tuple[int, int, int]:
  """Returns (frames, rows, columns) after checking what the header claims."""
  if not _has_pixels(dataset):
    raise ReadError(source, "no_pixel_data", "no PixelData")
  missing = [k for k in ("Rows", "Columns") if not dataset.get(k)]
  if missing:
    raise ReadError(source, "bad_header", f"no {', '.join(missing)}")
  try:
    shape = (
        int(dataset.get("NumberOfFrames") or 1), int(dataset.Rows),
        int(dataset.Columns),
    )
  except (TypeError, ValueError) as error:
    raise ReadError(source, "bad_header", f"image size: {error}") from error
  if min(shape) < 1:
    raise ReadError(source, "bad_header", f"frames, rows, columns are {shape}")
  if math.prod(shape) > max_voxels:
    raise ReadError(
        source, "too_large",
        f"the header claims {' x '.join(map(str, shape))} = {math.prod(shape):,} "
        f"voxels, more than max_voxels {max_voxels:,}",
    )
  groups = dataset.get("PerFrameFunctionalGroupsSequence")
  if groups and len(groups) != shape[0]:
    raise ReadError(
        source, "frames_mismatch",
        f"NumberOfFrames is {shape[0]}, functional groups for {len(groups)}",
    )
  return shape


def _decode(
    dataset: pydicom.Dataset, shape: tuple[int, int, int], colour: str, source: str
) -> np.ndarray:
  """Returns the stored values [frames, rows, columns], u8, u16, i16 or f32."""
  syntax = dataset.file_meta.TransferSyntaxUID
  samples = int(dataset.get("SamplesPerPixel", 1))
  if samples != 1 and colour == "reject":
    raise ReadError(
        source, "colour",
        f"SamplesPerPixel is {samples}, "
        f"{dataset.get('PhotometricInterpretation')}",
    )
  if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
    raise ReadError(
        source, "colour", "PALETTE COLOR pixels are indices, not intensities",
        "export the file again as greyscale",
    )
  bits = int(dataset.get("BitsAllocated", 0))
  is_float = "PixelData" not in dataset
  if not is_float and bits not in (8, 16):
    raise ReadError(source, "unsupported_pixels", f"BitsAllocated is {bits}")
  if not syntax.is_encapsulated:
    _check_length(dataset, shape, samples, source)
  if is_float or not (
      samples == 1 and syntax.is_little_endian and not syntax.is_encapsulated
  ):
    frames = _decode_frames(dataset, shape, samples, source)
  else:
    kind = np.dtype(f"<{'i' if dataset.get('PixelRepresentation') else 'u'}{bits // 8}")
    frames = np.frombuffer(dataset.PixelData, kind, math.prod(shape)).reshape(shape)
  return frames if is_float else _mask_bits(frames, dataset, source)


def _check_length(
    dataset: pydicom.Dataset, shape: tuple[int, int, int], samples: int, source: str
):
  key, bits = next(
      (k, b) for k, b in (
          ("PixelData", dataset.get("BitsAllocated")), ("FloatPixelData", 32),
          ("DoubleFloatPixelData", 64),
      ) if k in dataset
  )
  frame = shape[1] * shape[2] * samples * bits // 8
  if key == "PixelData" and dataset.get("PhotometricInterpretation") == "YBR_FULL_422":
    frame = frame * 2 // 3  # Chroma is stored once for two pixels.
  got, want = len(dataset[key].value), frame * shape[0]
  if got < want:
    raise ReadError(source, "truncated", f"{got:,} of {want:,} bytes of {key}")
  if got > want + 1:  # One byte pads an odd length.
    raise ReadError(
        source, "frames_mismatch",
        f"{key} holds {got / frame:.6g} frames, NumberOfFrames is {shape[0]}",
    )


def _decode_frames(
    dataset: pydicom.Dataset, shape: tuple[int, int, int], samples: int, source: str
) -> np.ndarray:
  """Decodes with pydicom's plugins, one frame at a time."""
  syntax = dataset.file_meta.TransferSyntaxUID
  try:
    decoder = get_decoder(syntax)
  except NotImplementedError as error:
    raise ReadError(
        source, "no_decoder", f"no decoder exists for {syntax.name} ({syntax})",
        "store the file with another transfer syntax",
    ) from error
  if not decoder.is_available:
    missing = "; ".join(decoder.missing_dependencies)
    raise ReadError(
        source, "no_decoder", f"{syntax.name} needs one of: {missing}", _INSTALL
    )
  frames = None
  count = 0
  try:
    for frame, _ in decoder.iter_array(dataset, raw=samples == 1):
      if samples != 1:
        frame = _luminance(frame)
      if frames is None:
        frames = np.empty(shape, frame.dtype.newbyteorder("="))
      if frame.shape != shape[1:]:
        raise ReadError(
            source, "bad_header",
            f"a frame decodes to {frame.shape}, the header says {shape[1:]}",
        )
      if count < shape[0]:
        frames[count] = frame
      count += 1
  except ReadError:
    raise
  except Exception as error:  # Each plugin raises its own kinds.
    raise ReadError(
        source, "decode_failed",
        f"frame {count} of {shape[0]} ({syntax.name}): {type(error).__name__}: "
        f"{error}",
    ) from error
  if count != shape[0]:
    raise ReadError(
        source, "frames_mismatch",
        f"{count} frames decode, NumberOfFrames is {shape[0]}",
    )
  return frames.astype(np.float32) if frames.dtype.kind == "f" else frames


def _luminance(frame: np.ndarray) -> np.ndarray:
  grey = frame[..., :3].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
  return np.rint(grey).astype(frame.dtype)


def _stored_bits(dataset: pydicom.Dataset) -> int:
  return int(dataset.get("BitsStored") or dataset.BitsAllocated)


def _mask_bits(
    frames: np.ndarray, dataset: pydicom.Dataset, source: str
) -> np.ndarray:
  """Drops what lies above or below the stored bits, and restores the sign."""
  stored, allocated = _stored_bits(dataset), frames.dtype.itemsize * 8
  high = int(dataset.get("HighBit", stored - 1))
  if not stored <= high + 1 <= allocated:
    raise ReadError(
        source, "bad_header",
        f"BitsAllocated {allocated}, BitsStored {stored}, HighBit {high}",
    )
  syntax = dataset.file_meta.TransferSyntaxUID
  # The other codecs know the stored bits and give back clean values.
  if stored < allocated and (syntax == RLELossless or not syntax.is_encapsulated):
    # Shifted up, the bits above fall off; an arithmetic shift back keeps the sign.
    frames = np.right_shift(
        np.left_shift(frames, allocated - 1 - high), allocated - stored
    )
  return frames.astype(np.int16) if frames.dtype == np.int8 else frames


def _invert(frames: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
  """Turns MONOCHROME1 (large is dark) round within its stored range."""
  if frames.dtype.kind == "f":
    return frames.max() + frames.min() - frames
  if dataset.get("PixelRepresentation"):
    return np.invert(frames)  # low + high of a signed range is -1.
  return frames.dtype.type(2 ** _stored_bits(dataset) - 1) - frames


def _rescale(
    frames: np.ndarray, dataset: pydicom.Dataset, source: str
) -> np.ndarray:
  """Applies slope and intercept, each frame's own where they differ."""
  pairs = []
  for index in range(len(frames)):
    group = _group(dataset, index, "PixelValueTransformationSequence") or dataset
    slope, intercept = group.get("RescaleSlope"), group.get("RescaleIntercept")
    pairs.append((
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
    ))
  table = np.array(pairs)  # [Z, 2]
  if not np.isfinite(table).all() or (table[:, 0] == 0).any():
    raise ReadError(
        source, "bad_rescale", f"slope, intercept are {sorted(set(pairs))[:3]}"
    )
  slope, intercept = table[:, 0], table[:, 1]
  if (slope == 1).all() and (intercept == 0).all():
    return frames
  if frames.dtype.kind != "f" and (slope == 1).all() and len(set(intercept)) == 1:
    shift = intercept[0]
    low, high = int(frames.min()) + shift, int(frames.max()) + shift
    for kind in (frames.dtype.type, np.int16, np.uint16):
      info = np.iinfo(kind)
      if shift == int(shift) and info.min <= low and high <= info.max:
        # Added in 32 bits: the sum fits, the shift alone may not.
        return (frames.astype(np.int32) + int(shift)).astype(kind)
  slope, intercept = (
      v.astype(np.float32)[:, None, None] for v in (slope, intercept)
  )
  return frames.astype(np.float32) * slope + intercept


def _group(dataset: pydicom.Dataset, index: int, name: str) -> Any:
  """Returns a functional group's item: the shared one, else the frame's own."""
  for sequence, at in (
      ("SharedFunctionalGroupsSequence", 0),
      ("PerFrameFunctionalGroupsSequence", index),
  ):
    groups = dataset.get(sequence)
    if groups and len(groups) > at and groups[at].get(name):
      return groups[at].get(name)[0]
  return None


def _spacing(
    dataset: pydicom.Dataset, manifest: Spacing | None
) -> tuple[Spacing, dict[str, Any]]:
  """Returns (dz, dy, dx) in mm and what is known of its origin."""
  invalid: list[str] = []
  manifest = manifest or (math.nan,) * 3
  (dy, dx), plane = _in_plane(dataset, manifest, invalid)
  dz, pitch, geometry = _pitch(dataset, manifest, dx, invalid)
  same = plane == pitch
  meta = {"spacing_source": plane if same else f"{plane}+{pitch}"}
  if invalid:
    meta["spacing_invalid"] = "; ".join(sorted(set(invalid)))
  if geometry:
    meta["geometry"] = geometry
  return (dz, dy, dx), meta


def _lengths(values: Any, name: str, invalid: list[str]) -> list[float] | None:
  """Returns positive lengths in mm, or None; notes what is there but is not."""
  if values is None:
    return None
  try:
    numbers = [float(v) for v in np.atleast_1d(np.asarray(values, object))]
  except (TypeError, ValueError):
    invalid.append(f"{name} {values!r}")
    return None
  if not numbers or not all(math.isfinite(v) and v > 0 for v in numbers):
    invalid.append(f"{name} {numbers}")
    return None
  return numbers


def _measure(
    dataset: pydicom.Dataset, name: str, invalid: list[str]
) -> tuple[list[float] | None, str]:
  """Looks a length up: shared groups, per-frame groups, top level."""
  frames = int(dataset.get("NumberOfFrames") or 1)
  for sequence, origin, count in (
      ("SharedFunctionalGroupsSequence", "shared", 1),
      ("PerFrameFunctionalGroupsSequence", "per_frame", frames),
  ):
    groups = dataset.get(sequence) or ()
    found = []
    for group in groups[:count]:
      items = group.get("PixelMeasuresSequence")
      if items:
        found.append(_lengths(items[0].get(name), name, invalid))
    found = [value for value in found if value]
    if not found or (origin == "per_frame" and len(found) < frames):
      continue
    if len({len(value) for value in found}) > 1:
      return None, "varies"
    table = np.array(found)
    middle = np.median(table, axis=0)
    if (np.abs(table - middle) > _IN_PLANE_TOLERANCE * middle).any():
      return None, "varies"
    return middle.tolist(), origin
  return _lengths(dataset.get(name), name, invalid), "top_level"


def _in_plane(
    dataset: pydicom.Dataset, manifest: Spacing, invalid: list[str]
) -> tuple[tuple[float, float], str]:
  values, origin = _measure(dataset, "PixelSpacing", invalid)
  if values and len(values) == 2:
    return (values[0], values[1]), origin
  if origin == "varies":
    return (math.nan, math.nan), origin
  if np.isfinite(manifest[1:]).all():
    return (manifest[1], manifest[2]), "manifest"
  return (math.nan, math.nan), "missing"


def _pitch(
    dataset: pydicom.Dataset, manifest: Spacing, dx: float, invalid: list[str]
) -> tuple[float, str, str]:
  """Returns (dz, its origin, scan geometry or "")."""
  lines = _frame_lines(dataset)
  geometry = "" if lines is None else _scan_geometry(lines)
  if geometry not in ("", "raster"):  # Their corners may lie evenly all the same.
    return math.nan, "not_raster", geometry
  steps = _position_steps(dataset)
  if steps is not None and not steps.any():
    invalid.append("ImagePositionPatient equal in all frames")
  elif steps is not None:
    return *_even(steps, "positions"), geometry
  if lines is not None:
    steps = _line_steps(lines, dx * (int(dataset.Columns) - 1))
    if np.isfinite(steps).all() and steps.any():
      return *_even(steps, "frame_location"), geometry
  for name, origin in (
      ("SpacingBetweenSlices", "between_slices"),
      ("SliceThickness", "slice_thickness"),
  ):
    values, where = _measure(dataset, name, invalid)
    if where == "varies":
      return math.nan, "varies", geometry
    if values:
      return values[0], origin, geometry
  if math.isfinite(manifest[0]):
    return manifest[0], "manifest", geometry
  return math.nan, "missing", geometry


def _even(steps: np.ndarray, origin: str) -> tuple[float, str]:
  """Returns the common step, or NaN where the frames are not evenly spaced."""
  middle = float(np.median(steps))
  # Written so that NaN is not even.
  if middle and (np.abs(steps - middle) <= _PITCH_TOLERANCE * abs(middle)).all():
    return abs(middle), origin
  return math.nan, "varies"


def _position_steps(dataset: pydicom.Dataset) -> np.ndarray | None:
  """Returns how far each frame lies from the one before, in mm.

  Negative where frames turn back; NaN where they do not follow one line, as in
  radial scans, whose corners step evenly along a circle.
  """
  places = _per_frame(dataset, "PlanePositionSequence", "ImagePositionPatient", 3)
  if places is None:
    return None
  steps = np.diff(places, axis=0)  # [Z - 1, 3]
  lengths = np.linalg.norm(steps, axis=1)
  longest = steps[lengths.argmax()]
  signs = np.where(steps @ longest < 0, -1.0, 1.0)
  straight = np.linalg.norm((signs[:, None] * steps).sum(axis=0)) / max(
      lengths.sum(), np.finfo(float).tiny
  )
  return signs * lengths if straight > _STRAIGHT else signs * math.nan


def _frame_lines(dataset: pydicom.Dataset) -> np.ndarray | None:
  """Returns each frame's line on the fundus image, [Z, 2, (row, column)]."""
  lines = _per_frame(
      dataset, "OphthalmicFrameLocationSequence", "ReferenceCoordinates", 4
  )
  return None if lines is None else lines.reshape(-1, 2, 2)


def _per_frame(
    dataset: pydicom.Dataset, sequence: str, name: str, size: int
) -> np.ndarray | None:
  groups = dataset.get("PerFrameFunctionalGroupsSequence") or ()
  values = []
  for group in groups:
    items = group.get(sequence)
    value = items[0].get(name) if items else None
    if value is None or len(value) != size:
      return None
    values.append([float(v) for v in value])
  return np.array(values) if len(values) > 1 else None


def _scan_geometry(lines: np.ndarray) -> str:
  """Tells parallel frames from frames that turn about a point or close a ring."""
  along = lines[:, 1] - lines[:, 0]
  length = np.linalg.norm(along, axis=1)
  if (length < 1e-6).any():
    return "circle"
  unit = along / length[:, None]
  return "raster" if (np.abs(unit @ unit[0]) > 0.99).all() else "radial"


def _line_steps(lines: np.ndarray, width_mm: float) -> np.ndarray:
  """Returns signed frame steps in mm, scaled by a frame's length on the fundus."""
  along = lines[0, 1] - lines[0, 0]
  length = np.linalg.norm(along)
  normal = np.array([-along[1], along[0]]) / length
  middle = lines.mean(axis=1) @ normal  # [Z]
  return np.diff(middle) * width_mm / length


def _anatomy(dataset: pydicom.Dataset) -> dict[str, str]:
  """Returns device, laterality and region; no name and no date."""
  frame = _group(dataset, 0, "FrameAnatomySequence") or {}
  side = (
      dataset.get("ImageLaterality") or dataset.get("Laterality")
      or frame.get("FrameLaterality") or ""
  )
  regions = (
      dataset.get("AnatomicRegionSequence") or frame.get("AnatomicRegionSequence")
  )
  device = " ".join(
      str(dataset.get(k, "")) for k in ("Manufacturer", "ManufacturerModelName")
  )
  return {
      "device": device.strip(),
      "laterality": str(side),
      "region": str(regions[0].get("CodeMeaning", "")) if regions else "",
      "site": str(dataset.get("InstitutionName", "")),
  }


def _read_array(
    data: bytes, path: str, manifest_spacing: Spacing | None, max_voxels: int
) -> Record:
  try:
    loaded = np.load(io.BytesIO(data), allow_pickle=False)
    arrays = {"volume": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
  except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise ReadError(path, "truncated", f"{type(error).__name__}: {error}") from error
  spacing = arrays.pop("spacing", None)
  if "volume" not in arrays and len(arrays) != 1:
    raise ReadError(
        path, "unsupported_format", f"npz holds {sorted(arrays)}",
        "name the array `volume`",
    )
  volume = arrays.get("volume", next(iter(arrays.values())))
  if volume.ndim not in (3, 5):
    raise ReadError(
        path, "unsupported_format", f"array of shape {volume.shape}",
        "store [Z, Y, X] or [T, Z, Y, X, C]",
    )
  if not 0 < volume.size <= max_voxels:
    raise ReadError(path, "too_large" if volume.size else "empty_file",
                    f"{volume.size:,} voxels, max_voxels is {max_voxels:,}")
  if volume.dtype in (np.float64, np.float16):
    volume = volume.astype(np.float32)
  if volume.dtype.name not in DTYPES:
    raise ReadError(path, "unsupported_pixels", f"array of {volume.dtype}")
  if volume.dtype == np.float32 and not np.isfinite(volume).all():
    raise ReadError(path, "nan_voxels", "NaN or infinite voxels")
  origin = "file"
  if spacing is None:
    spacing = manifest_spacing or (math.nan,) * 3
    origin = "manifest" if np.isfinite(spacing).any() else "missing"
  return Record(
      volume if volume.ndim == 5 else volume[None, ..., None],
      _array_spacing(spacing, path), path, meta={"spacing_source": origin},
  )


def _array_spacing(spacing: Any, path: str) -> np.ndarray:
  """Returns (dt, dz, dy, dx) of an array's spacing; NaN stays unknown."""
  try:
    lengths = np.asarray(spacing, np.float32)
  except (TypeError, ValueError):
    lengths = np.empty(0)
  if lengths.shape != (3,) or not (np.isnan(lengths) | (lengths > 0)).all():
    raise ReadError(
        path, "bad_header", f"spacing is {spacing!r}",
        "store (dz, dy, dx) in mm, above 0, NaN where unknown",
    )
  return np.array([math.nan, *lengths], np.float32)
