"""What each format's own library reads, without this one: the truth to compare with."""

import importlib
import warnings

import numpy as np

_MODULES = (
    "cv2", "pydicom.pixels", "openjpeg", "libjpeg", "nibabel", "tifffile",
    "imagecodecs", "h5py", "zarr", "av", "oct_converter.readers",
)


def load() -> None:
  """Imports them all, so that their memory does not count as a file's."""
  for name in _MODULES:
    importlib.import_module(name)


def read(name: str, path: str) -> np.ndarray | None:
  """Returns the voxels in the library's own order, or None where none can tell.

  Args:
    name: a key of `seeds.SEEDS`.
    path: the file or folder.
  """
  reader = next((r for start, r in _READERS if name.startswith(start)), None)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return None if reader is None else reader(path)


def same_voxels(volume: np.ndarray, wanted: np.ndarray) -> bool:
  """Says whether two arrays hold the same voxels, in whatever order of axes."""
  if volume.size != wanted.size:
    return False
  first, second = (np.sort(a, axis=None).astype(np.float64) for a in (volume, wanted))
  return np.allclose(first, second, rtol=1e-5, atol=1e-6)


def _read_dicom(path: str) -> np.ndarray | None:
  import pydicom

  dataset = pydicom.dcmread(path)
  if dataset.get("PhotometricInterpretation") != "MONOCHROME2":
    return None
  return pydicom.pixels.apply_rescale(dataset.pixel_array, dataset)


def _read_nifti(path: str) -> np.ndarray:
  import nibabel

  return nibabel.load(path).get_fdata()


def _read_tiff(path: str) -> np.ndarray | None:
  import tifffile

  with tifffile.TiffFile(path) as file:
    # Where large means dark the reader turns the values round.
    dark = file.pages.first.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    return None if dark else file.asarray()


def _read_npy(path: str) -> np.ndarray:
  return np.load(path)


def _read_npz(path: str) -> np.ndarray:
  with np.load(path) as arrays:
    return arrays["volume"]


def _read_hdf5(path: str) -> np.ndarray:
  import h5py

  with h5py.File(path) as file:
    return file["volume"][:]


def _read_zarr(path: str) -> np.ndarray:
  import zarr

  return zarr.open_array(path, mode="r")[:]


_READERS = (
    ("dicom", _read_dicom), ("nifti", _read_nifti), ("tiff", _read_tiff),
    ("npy", _read_npy), ("npz", _read_npz), ("hdf5", _read_hdf5), ("zarr", _read_zarr),
)
