"""Any file, folder or archive to a Record; what the content is decides, not its name.

A format is a module with `matches(head, path)` and `read(data, source, options)`;
a kind of folder one with `matches_folder(names)` and `read_folder(path, names,
options)`. A reader knows nothing of training, and states what it cannot use as a
`ReadError`. TIFF, HDF5, Zarr, movies and vendor files are decoded in a helper process
with a clock and a memory ceiling (`apart`).
"""

import os
from typing import Any

from vjepa_jax.data import storage
from vjepa_jax.data.readers import (
    archives,
    arrays,
    dicom,
    hdf5,
    movies,
    nifti,
    oct_vendor,
    series,
    tiff,
    time_points,
    zarrs,
)
from vjepa_jax.data.readers.base import (
    COLOURS,
    MAX_BYTES,
    MAX_VOXELS,
    ReadOptions,
    read_option_faults,
)
from vjepa_jax.data.readers.dicom import read_dicom
from vjepa_jax.data.record import ReadError, Record

__all__ = [
    "COLOURS", "MAX_BYTES", "MAX_VOXELS", "ReadOptions", "read", "read_dicom",
    "read_option_faults",
]

# In the order asked: an npz is a ZIP too, and vendor files have the weakest marks.
FORMATS = (dicom, nifti, tiff, hdf5, arrays, archives, movies, oct_vendor)
FOLDERS = (zarrs, series, time_points)
HEAD_BYTES = 1024


def read(path: str | os.PathLike[str], **options: Any) -> Record:
  """Reads one recording, local or `gs://`; its content decides the format.

  Args:
    path: a file (DICOM, NIfTI, TIFF, npy, npz, HDF5, a movie, an OCT vendor's file),
      a ZIP of one DICOM series, or a folder (a DICOM series, one TIFF a time point,
      a Zarr array).
    **options: fields of `ReadOptions`.

  Returns:
    The Record, in the stored type where it can be kept.

  Raises:
    ReadError: with a reason code, where it cannot be used.
    ValueError: for an option out of range.
  """
  chosen, path = ReadOptions(**options), os.fspath(path)
  if chosen.frame is not None:
    return tiff.read_frame(path, chosen)
  if storage.is_folder(path):
    return _read_folder(path, chosen)
  data = storage.read_bytes(path, max_bytes=chosen.max_bytes)
  if not data:
    raise ReadError(path, "empty_file", "0 bytes")
  return read_content(data, path, chosen)


def read_content(data: bytes, source: str, options: ReadOptions) -> Record:
  """Reads the content of one file.

  Args:
    data: the whole content.
    source: its path, for messages and as a weak hint of its kind.
    options: what the caller states.

  Raises:
    ReadError: with a reason code.
  """
  head = bytes(data[:HEAD_BYTES])
  for format_ in FORMATS:
    if format_.matches(head, source):
      return format_.read(data, source, options)
  if source.lower().endswith((".dcm", ".dicom")):
    raise ReadError(source, "not_dicom", "no DICM mark at byte 128")
  raise ReadError(source, "unsupported_format", f"starts with {head[:8]!r}")


def _read_folder(path: str, options: ReadOptions) -> Record:
  names = storage.list_files(path)
  for kind in FOLDERS:
    if kind.matches_folder(names):
      return kind.read_folder(path, names, options)
  raise ReadError(
      path, "unsupported_format",
      f"a folder of {len(names)} files, such as {', '.join(names[:3]) or 'none'}",
  )
