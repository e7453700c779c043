"""DICOM objects, single- and multi-frame, in any codec that pydicom can reach.

Frame = Z, row = Y, column = X; frames of a film are T. What a file does not say
stays unknown: a missing spacing is NaN with `spacing_source` "missing", never 1 mm.
"""

from collections.abc import Sequence
import math
from typing import Any, BinaryIO

import numpy as np
from pydicom.pixels import apply_modality_lut
from pydicom.uid import DeflatedExplicitVRLittleEndian

from vjepa_jax.data.readers import dicom_geometry, dicom_header, dicom_pixels
from vjepa_jax.data.readers.base import (
    MAX_VOXELS,
    ReadOptions,
    Spacing,
    check_voxels,
    to_voxels,
)
from vjepa_jax.data.readers.dicom_header import Header, Parsed
from vjepa_jax.data.record import ReadError, Record


def matches(head: bytes, path: str) -> bool:
  """Says whether a content begins as a DICOM file does, with its mark or without."""
  del path
  return dicom_header.is_dicom(head)


def read(data: bytes, source: str, options: ReadOptions) -> Record:
  """Reads one DICOM object; see `read_dicom`."""
  return to_record(dicom_header.parse(data, source), source, options)


def read_dicom(
    file: bytes | BinaryIO,
    *,
    source: str = "",
    modalities: Sequence[str] | None = ("OPT",),
    manifest_spacing: Spacing | None = None,
    colour: str = "reject",
    max_voxels: int = MAX_VOXELS,
    time_step_s: float | None = None,
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
    time_step_s: seconds between the frames of a film that does not say.

  Returns:
    Record with volume [1, frames, rows, columns, 1]; [T, 1, rows, columns, 1] of a
    film, and [T, Z, rows, columns, 1] of several temporal positions. Uncompressed
    pixels are a read-only view of the content.

  Raises:
    ReadError: with a reason code, where the file cannot be used.
    ValueError: for an unknown `colour`.
  """
  data = file.read() if hasattr(file, "read") else bytes(file)
  options = ReadOptions(
      modalities=None if modalities is None else tuple(modalities), colour=colour,
      manifest_spacing=manifest_spacing, max_voxels=max_voxels, time_step_s=time_step_s,
  )
  return read(data, source, options)


def to_record(parsed: Parsed, source: str, options: ReadOptions) -> Record:
  """Decodes what was parsed; see `read_dicom`.

  Raises:
    ReadError: with a reason code.
  """
  try:
    check_modality(parsed.header, options.modalities, source)
    shape = image_shape(parsed, source, options.max_voxels)
    frames = stored_frames(parsed, shape, options, source)  # [F, Y, X]
    frames = rescale(frames, rescale_table(parsed.header, len(frames)), source)
    return _to_record(parsed, frames, source, options)
  except ReadError:
    raise
  except MemoryError as error:
    raise ReadError(source, "too_large", "not enough memory for its voxels") from error
  except Exception as error:
    # pydicom converts values on access and raises kinds of its own: what random
    # bytes in a header bring up is never anything but one bad file.
    raise ReadError(
        source, "bad_header", f"{type(error).__name__}: {error}"
    ) from error


def check_modality(header: Header, modalities: Sequence[str] | None, source: str):
  """Refuses a modality that was not asked for.

  Raises:
    ReadError: wrong_modality.
  """
  modality = str(header.get("Modality", ""))
  if modalities is not None and modality not in tuple(modalities):
    raise ReadError(
        source, "wrong_modality",
        f"Modality is {modality!r}, wanted {', '.join(modalities)}",
    )


def image_shape(
    parsed: Parsed, source: str, max_voxels: int
) -> tuple[int, int, int]:
  """Returns (frames, rows, columns) after checking what the header claims.

  Raises:
    ReadError: no_pixel_data, bad_header, too_large, frames_mismatch.
  """
  header = parsed.header
  if parsed.pixels is None:
    raise ReadError(source, "no_pixel_data", "no PixelData")
  missing = [k for k in ("Rows", "Columns") if not header.get(k)]
  if missing:
    raise ReadError(source, "bad_header", f"no {', '.join(missing)}")
  try:
    shape = (
        int(header.get("NumberOfFrames") or 1), int(header.get("Rows")),
        int(header.get("Columns")),
    )
  except (TypeError, ValueError) as error:
    raise ReadError(source, "bad_header", f"image size: {error}") from error
  if min(shape) < 1:
    raise ReadError(source, "bad_header", f"frames, rows, columns are {shape}")
  check_voxels(shape, source, max_voxels)
  _check_claim(parsed, shape, source)
  groups = header.items("PerFrameFunctionalGroupsSequence")
  if groups and len(groups) != shape[0]:
    raise ReadError(
        source, "frames_mismatch",
        f"NumberOfFrames is {shape[0]}, functional groups for {len(groups)}",
    )
  return shape


def _check_claim(parsed: Parsed, shape: tuple[int, int, int], source: str):
  """Refuses deflated pixels that would inflate to far more than the image needs."""
  length, frame = parsed.pixels.length, shape[1] * shape[2]
  most = 8 * frame * (shape[0] + 1)  # Bytes, and a frame of padding.
  deflated = parsed.syntax == DeflatedExplicitVRLittleEndian
  if deflated and most < length != dicom_header.UNDEFINED:
    raise ReadError(
        source, "frames_mismatch",
        f"{length:,} bytes of pixels for {' x '.join(map(str, shape))} voxels",
    )


def stored_frames(
    parsed: Parsed, shape: tuple[int, int, int], options: ReadOptions, source: str
) -> np.ndarray:
  """Returns frames [frames, rows, columns], large is bright, before any rescale.

  A modality LUT, which is no line, is applied here.

  Raises:
    ReadError: with a reason code.
  """
  header = parsed.header
  frames = dicom_pixels.decode(parsed, shape, options, source)
  if header.get("PhotometricInterpretation") == "MONOCHROME1":
    frames = _invert(frames, header)
  if _has_lut(header):
    frames = apply_modality_lut(frames, header.dataset)
  return frames


def rescale_table(header: Header, frames: int) -> np.ndarray:
  """Returns float64 [frames, (slope, intercept)], each frame's own."""
  if not _has_groups(header):
    return np.tile(_slope_and_intercept(header), (frames, 1))
  groups = (
      dicom_geometry.group(header, index, "PixelValueTransformationSequence")
      for index in range(frames)
  )
  return np.array([
      _slope_and_intercept(header if found is None else found) for found in groups
  ])


def rescale(frames: np.ndarray, table: np.ndarray, source: str) -> np.ndarray:
  """Applies slope and intercept, each frame's own where they differ.

  Args:
    frames: [Z, Y, X].
    table: [Z, (slope, intercept)].
    source: the path.

  Returns:
    Integers where every slope is 1 and one whole intercept fits 16 bits, else
    float32.

  Raises:
    ReadError: bad_rescale.
  """
  slope, intercept = table[:, 0], table[:, 1]
  if not np.isfinite(table).all() or (slope == 0).any():
    found = sorted(set(map(tuple, table.tolist())))
    raise ReadError(source, "bad_rescale", f"slope, intercept are {found[:3]}")
  if (slope == 1).all() and (intercept == 0).all():
    return frames
  if frames.dtype.kind != "f" and (slope == 1).all() and len(set(intercept)) == 1:
    shift = intercept[0]
    low, high = int(frames.min()) + shift, int(frames.max()) + shift
    for kind in (frames.dtype.type, np.int16, np.uint16):
      info = np.iinfo(kind)
      if shift == int(shift) and info.min <= low and high <= info.max:
        # Added in more bits: the sum fits, the shift alone may not.
        wide = np.int32 if frames.dtype.itemsize < 4 else np.int64
        return (frames.astype(wide) + int(shift)).astype(kind)
  # 32 stored bits would lose digits in float32 before the slope makes them small.
  kind = np.float32 if frames.dtype.itemsize < 4 else np.float64
  slope, intercept = (v.astype(kind)[:, None, None] for v in (slope, intercept))
  scaled = frames.astype(kind) * slope
  scaled += intercept
  return scaled.astype(np.float32, copy=False)


def describe(parsed: Parsed, table: np.ndarray) -> dict[str, Any]:
  """Returns modality, device, laterality and the like; no name and no date.

  Args:
    parsed: the object.
    table: [frames, (slope, intercept)]; where all are one, `padding_value` is given
      as the voxels have it.
  """
  header = parsed.header
  frame = dicom_geometry.group(header, 0, "FrameAnatomySequence") or header
  side = (
      header.get("ImageLaterality") or header.get("Laterality")
      or frame.get("FrameLaterality") or ""
  )
  region = header.item("AnatomicRegionSequence") or frame.item("AnatomicRegionSequence")
  device = " ".join(
      str(header.get(k, "")) for k in ("Manufacturer", "ManufacturerModelName")
  )
  meta = {
      "modality": str(header.get("Modality", "")),
      "transfer_syntax": parsed.syntax.name,
      "device": device.strip(),
      "laterality": str(side),
      "region": "" if region is None else str(region.get("CodeMeaning", "")),
      "site": str(header.get("InstitutionName", "")),
  }
  padding = _padding(header)
  if padding is not None and (table == table[0]).all():
    meta["padding_value"] = float(padding * table[0, 0] + table[0, 1])
  return meta


def _to_record(
    parsed: Parsed, frames: np.ndarray, source: str, options: ReadOptions
) -> Record:
  header = parsed.header
  frames = to_voxels(frames, source)
  order = dicom_geometry.frame_order(header, source) if len(frames) > 1 else None
  step = dicom_geometry.cine_step(header) if len(frames) > 1 else None
  if order is not None:
    volume = frames[order]  # [T, Z, Y, X]
  else:
    volume = frames[None] if step is None else frames[:, None]
  spacing, meta = dicom_geometry.spacing(
      header, options.manifest_spacing, None if order is None else order[0].tolist()
  )
  if step is None:
    step = _temporal_step(header, order)
  if math.isnan(step) and len(volume) > 1 and options.time_step_s:
    step = options.time_step_s
  meta |= describe(parsed, rescale_table(header, 1))
  return Record(
      volume[..., None], np.array([step, *spacing], np.float32), source,
      subject=str(header.get("PatientID", "")), meta=meta,
  )


def _temporal_step(header: Header, order: np.ndarray | None) -> float:
  """Returns seconds between temporal positions, NaN where there are none."""
  if order is None or len(order) < 2:
    return math.nan
  offsets = dicom_geometry.frame_values(
      header, "TemporalPositionSequence", "TemporalPositionTimeOffset", 1
  )
  if offsets is None:
    return math.nan
  return dicom_geometry.even_step(np.diff(offsets[order[:, 0], 0]))


def _has_groups(header: Header) -> bool:
  return any(
      header.items(name) for name in
      ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
  )


def _slope_and_intercept(header: Header) -> tuple[float, float]:
  slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
  return (
      1.0 if slope is None else float(slope),
      0.0 if intercept is None else float(intercept),
  )


def _has_lut(header: Header) -> bool:
  return bool(
      header.items("ModalityLUTSequence") and header.get("RescaleSlope") is None
  )


def _padding(header: Header) -> float | None:
  """Returns what `stored_frames` has outside the scan, or None."""
  value = header.get("PixelPaddingValue")
  if not isinstance(value, int) or _has_lut(header):
    return None
  bits = int(header.get("BitsAllocated") or 16)
  signed = bool(header.get("PixelRepresentation"))
  if signed and value >= 2 ** (bits - 1):
    value -= 2**bits  # Written as unsigned.
  if header.get("PhotometricInterpretation") == "MONOCHROME1":
    return (-1 if signed else 2 ** dicom_pixels.stored_bits(header) - 1) - value
  return value


def _invert(frames: np.ndarray, header: Header) -> np.ndarray:
  """Turns MONOCHROME1 (large is dark) round within its stored range."""
  if frames.dtype.kind == "f":
    return frames.max() + frames.min() - frames
  if header.get("PixelRepresentation"):
    return np.invert(frames)  # low + high of a signed range is -1.
  return frames.dtype.type(2 ** dicom_pixels.stored_bits(header) - 1) - frames
