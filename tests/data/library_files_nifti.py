"""Every test file of nibabel: read as nibabel reads it, or refused for a true reason.

python -m tests.data.library_files_nifti [FOLDER]
"""

from collections.abc import Iterable
import os
import pathlib
import sys

import nibabel
import numpy as np

from tests.data.library_files import Row, quietly, table
from vjepa_jax import data


def nibabel_files() -> list[str]:
  """Returns the paths of the images among the test files in nibabel's package."""
  folder = pathlib.Path(nibabel.__file__).parent / "tests" / "data"
  texts = (".py", ".m", ".rst", ".gitignore")
  return sorted(
      str(p) for p in folder.iterdir()
      if p.is_file() and not p.name.endswith(texts)
  )


def compare(paths: Iterable[str]) -> list[Row]:
  """Reads each file by the library and by nibabel alone."""
  return quietly(_compare, paths)


def _load(path: str):
  try:
    return nibabel.load(path)
  except Exception:  # Its own kinds, by format.
    return None


def _compare(path: str) -> Row:
  image = _load(path)
  try:
    record = data.read(path)
  except data.ReadError as error:
    return Row(path, error.reason, error.detail, _refusal_fault(image, error))
  detail = f"{record.volume.shape} {record.volume.dtype} {record.spacing.tolist()}"
  if type(image) not in (nibabel.Nifti1Image, nibabel.Nifti2Image):
    return Row(path, f"read as {record.meta.get('format', 'DICOM')}", detail)
  return Row(path, "read", detail, _difference(image, record))


def _difference(image, record) -> str:
  """Says how a Record differs from nibabel's canonical image."""
  canonical = nibabel.as_closest_canonical(image)
  wanted = np.asanyarray(canonical.dataobj)
  wanted = wanted.reshape(wanted.shape + (1,) * (5 - wanted.ndim))
  wanted = wanted.transpose(3, 2, 1, 0, 4)
  if wanted.shape != record.volume.shape:
    return f"shape {record.volume.shape}, nibabel's {wanted.shape}"
  if not np.array_equal(record.volume, wanted.astype(record.volume.dtype)):
    return f"{np.mean(record.volume != wanted):.0%} of the voxels"
  if not np.allclose(record.meta["affine"], canonical.affine, rtol=1e-6):
    return f"affine {record.meta['affine']}, nibabel's {canonical.affine.tolist()}"
  zooms = nibabel.affines.voxel_sizes(canonical.affine)[::-1]
  if not np.allclose(record.spacing[1:], zooms, rtol=1e-5):
    return f"spacing {record.spacing[1:]}, nibabel's {zooms}"
  return ""


def _refusal_fault(image, error: data.ReadError) -> str:
  """Says why a refusal is untrue; "" where nibabel bears it out."""
  one_file = type(image) in (nibabel.Nifti1Image, nibabel.Nifti2Image)
  if error.reason == "nan_voxels":
    found = np.asanyarray(image.dataobj)
    return "" if not np.isfinite(found).all() else "every voxel is finite"
  if error.reason == "unsupported_format":
    return "a NIfTI file" if one_file and image.ndim < 6 else ""
  return "a NIfTI file that nibabel reads" if one_file else ""


if __name__ == "__main__":
  if len(sys.argv) > 1:
    names = [os.path.join(r, f) for r, _, fs in os.walk(sys.argv[1]) for f in fs]
  else:
    names = nibabel_files()
  found_rows = compare(names)
  for row in found_rows:
    print(f"{os.path.basename(row.path):52s} {row.outcome:20s} {row.detail[:70]} "
          f"{row.fault}")
  print(table(found_rows))
