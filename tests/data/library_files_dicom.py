"""Every test file of pydicom: read as pydicom reads it, or refused for a true reason.

python -m tests.data.library_files_dicom [FOLDER]
"""

from collections.abc import Iterable
import math
import os
import pathlib
import sys

import numpy as np
import pydicom
from pydicom.data import get_testdata_files
from pydicom.pixels import apply_modality_lut

from tests.data.library_files import Row, quietly, table
from vjepa_jax import data


def pydicom_files() -> list[str]:
  """Returns the paths of the test files in pydicom's package."""
  return sorted(path for path in get_testdata_files() if os.path.isfile(path))


def compare(paths: Iterable[str]) -> list[Row]:
  """Reads each file by the library and by pydicom alone."""
  return quietly(_compare, paths)


def _compare(path: str) -> Row:
  try:
    record = data.read(path, colour="reject")
  except data.ReadError as error:
    fault = _untrue(error, path)
    return Row(path, error.reason, error.detail, fault)
  syntax = record.meta["transfer_syntax"]
  spacing = [round(float(v), 4) for v in record.spacing]
  detail = f"{syntax} {record.volume.dtype} {record.volume.shape} {spacing}"
  dataset = pydicom.dcmread(path, force=True)
  fault = _differs(record, _voxels(dataset)) or _wrong_spacing(record, dataset)
  return Row(path, "read", detail, fault)


def _voxels(dataset: pydicom.Dataset) -> np.ndarray:
  """Returns [frames, rows, columns] by pydicom's own functions, float64."""
  if "TransferSyntaxUID" not in dataset.file_meta:
    implicit, little = dataset.original_encoding
    dataset.file_meta.TransferSyntaxUID = (
        pydicom.uid.ExplicitVRBigEndian if not little else
        pydicom.uid.ImplicitVRLittleEndian if implicit else
        pydicom.uid.ExplicitVRLittleEndian
    )
  stored = dataset.pixel_array
  stored = stored.reshape(-1, dataset.Rows, dataset.Columns)
  if dataset.PhotometricInterpretation == "MONOCHROME1":
    signed = dataset.PixelRepresentation
    stored = ~stored if signed else 2**dataset.BitsStored - 1 - stored.astype(np.int64)
  groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
  shared = dataset.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()]
  frames = []
  for index, frame in enumerate(stored):
    own = groups[index] if groups else pydicom.Dataset()
    items = (
        shared[0].get("PixelValueTransformationSequence")
        or own.get("PixelValueTransformationSequence")
    )
    frames.append(apply_modality_lut(frame, items[0] if items else dataset))
  return np.array(frames, np.float64)


def _differs(record: data.Record, want: np.ndarray) -> str:
  volume = record.volume[..., 0]
  if volume.shape[0] > 1 or volume.shape[1] != len(want):
    volume = volume.reshape(1, -1, *volume.shape[2:])
  if volume.shape[1:] != want.shape:
    return f"shape {volume.shape}, pydicom {want.shape}"
  error = np.abs(volume[0] - want).max() / max(1.0, np.abs(want).max())
  # Integers must be equal; float32 holds 24 bits of pydicom's float64.
  return f"voxels differ by {error:.3g}" if error > 2**-23 else ""


def _wrong_spacing(record: data.Record, dataset: pydicom.Dataset) -> str:
  stated = _stated(dataset, "PixelSpacing")
  want = [float(v) for v in stated] if stated else [math.nan] * 2
  if not all(v > 0 for v in want):
    want = [math.nan] * 2
  if not np.allclose(record.spacing[2:], want, rtol=1e-6, equal_nan=True):
    return f"spacing {record.spacing[2:].tolist()}, pydicom {want}"
  between = _stated(dataset, "SpacingBetweenSlices")
  if not (between and float(between) > 0):
    between = _stated(dataset, "SliceThickness")
  known = math.isfinite(record.spacing[1])
  measured = record.meta["spacing_source"].endswith(("positions", "grid_offsets"))
  if known and not measured and not math.isclose(
      record.spacing[1], float(between), rel_tol=1e-6
  ):
    return f"dz {record.spacing[1]}, pydicom {between}"
  return ""


def _stated(dataset: pydicom.Dataset, name: str):
  for kind in ("Shared", "PerFrame"):
    groups = dataset.get(f"{kind}FunctionalGroupsSequence")
    items = groups[0].get("PixelMeasuresSequence") if groups else None
    if items and items[0].get(name) is not None:
      return items[0].get(name)
  return dataset.get(name)


def _untrue(error: data.ReadError, path: str) -> str:
  """Says what speaks against a refusal: "" where its reason holds."""
  try:
    dataset = pydicom.dcmread(path, force=True)
    has_pixels = any("Pixel Data" in e.name for e in dataset if e.tag.group == 0x7FE0)
  except Exception:  # pydicom cannot read it at all.
    return ""
  samples = dataset.get("SamplesPerPixel", 1)
  palette = dataset.get("PhotometricInterpretation") == "PALETTE COLOR"
  groups = dataset.get("PerFrameFunctionalGroupsSequence", "")
  holds = {
      "no_pixel_data": not has_pixels,
      "colour": samples != 1 or palette,
      "not_dicom": len(dataset) < 3,
      "unsupported_format": len(dataset) < 3,
      "frames_mismatch": str(dataset.get("NumberOfFrames") or 1) != str(len(groups)),
  }
  if error.reason in holds:
    return "" if holds[error.reason] else f"{error.reason} is untrue"
  try:
    _voxels(dataset)
  except Exception:  # pydicom cannot decode it either.
    return ""
  return f"pydicom reads it: {error.detail}"


def main() -> None:
  """Prints a line a file, then the counts."""
  folder = sys.argv[1] if len(sys.argv) > 1 else ""
  paths = (
      sorted(str(p) for p in pathlib.Path(folder).rglob("*") if p.is_file())
      if folder else pydicom_files()
  )
  rows = compare(paths)
  for row in rows:
    print(f"{pathlib.Path(row.path).name:45} {row.outcome:16} {row.detail} {row.fault}")
  print(table(rows))
  print(f"{len(rows)} files, {sum(bool(row.fault) for row in rows)} at fault")


if __name__ == "__main__":
  main()
