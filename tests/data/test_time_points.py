"""Claims of readers/time_points.py on small folders."""

import os
import tracemalloc

import numpy as np
import pytest

from vjepa_jax import data
from vjepa_jax.data import storage
from vjepa_jax.data.readers import time_points
from vjepa_jax.data.record import ReadError

tifffile = pytest.importorskip("tifffile", reason="extra formats is not installed")


def volume(time: int, shape=(3, 8, 9), dtype=np.uint8) -> np.ndarray:
  return (np.arange(np.prod(shape)).reshape(shape) % 50 + time).astype(dtype)


@pytest.fixture
def write(tmp_path):
  """Returns write(name, array) into one folder, and the folder as `write.folder`."""
  folder = tmp_path / "embryo"
  folder.mkdir()

  def write_one(name: str, array: np.ndarray, **how):
    path = folder / name
    if name.endswith(".npy"):
      np.save(path, array)
    elif name.endswith((".nii", ".nii.gz")):
      nibabel = pytest.importorskip("nibabel", reason="extra formats is not installed")
      nibabel.save(nibabel.Nifti1Image(array.T, np.diag([2, 3, 4, 1])), path)
    else:
      how = {"photometric": "minisblack", "metadata": None} | how
      tifffile.imwrite(path, array, **how)

  write_one.folder = str(folder)
  return write_one


def reason(folder: str, **options) -> str:
  with pytest.raises(ReadError) as caught:
    data.read(folder, **options)
  assert folder in str(caught.value)
  return caught.value.reason


@pytest.mark.parametrize("name", ["e_1_t{}.tif", "e_1_t{:03d}.tif", "t{}.npy"])
def test_volumes_are_stacked_in_the_order_of_their_number(write, name):
  for time in (0, 10, 2, 1, 9, 11, 3, 4, 5, 6, 7, 8):
    write(name.format(time), volume(time))
  record = data.read(write.folder, time_step_s=60)
  assert record.volume.shape == (12, 3, 8, 9, 1) and record.source == write.folder
  for time in range(12):
    np.testing.assert_array_equal(record.volume[time, ..., 0], volume(time))
  assert record.spacing[0] == 60 and record.meta["time_points"] == "0..11 step 1"
  assert abs(record.mean - record.volume.mean()) < 1e-3


def test_nifti_volumes_are_stacked_with_their_spacing(write):
  for time in range(3):
    write(f"t{time}.nii.gz", volume(time, dtype=np.int16))
  record = data.read(write.folder)
  assert record.volume.shape[0] == 3 and np.isnan(record.spacing[0])
  np.testing.assert_allclose(record.spacing[1:], [4, 3, 2])


def test_axes_are_those_of_one_file(write):
  for time in range(3):
    write(f"t{time}.tif", volume(time, (2, 3, 8, 9)), metadata={})
  assert reason(write.folder) == "ambiguous_axes"
  record = data.read(write.folder, axes="CZYX")
  assert record.volume.shape == (3, 3, 8, 9, 2)
  assert reason(write.folder, axes="TZYX") == "irregular_frames"


def test_a_lost_time_point_is_named(write):
  for time in (0, 1, 2, 4, 5, 7):
    write(f"t{time:03d}.tif", volume(time))
  with pytest.raises(ReadError, match="2 of 8 time points are missing: 3, 6") as caught:
    data.read(write.folder)
  assert caught.value.reason == "irregular_frames"


def test_one_number_far_off_costs_no_memory_and_no_time(write):
  for time in ("1", "2", "9" * 40):
    write(f"t{time}.npy", volume(1))
  tracemalloc.start()
  try:
    with pytest.raises(ReadError, match="time points are missing: 3, 4, 5") as caught:
      data.read(write.folder)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
  finally:
    tracemalloc.stop()
  assert caught.value.reason == "irregular_frames"


def test_even_steps_above_one_are_read_and_stated(write):
  for time in (10, 15, 20):
    write(f"t{time:03d}.tif", volume(time))
  assert data.read(write.folder).meta["time_points"] == "10..20 step 5"


@pytest.mark.parametrize("other, words", [
    (volume(2, (3, 8, 10)), "t2.tif is of shape .*10"),
    (volume(2, dtype=np.uint16), "t2.tif is of type uint16"),
])
def test_the_first_that_differs_is_named(write, other, words):
  for time in (0, 1):
    write(f"t{time}.tif", volume(time))
  write("t2.tif", other)
  write("t3.tif", other)
  with pytest.raises(ReadError, match=words) as caught:
    data.read(write.folder)
  assert caught.value.reason == "irregular_frames"


def test_a_spacing_that_differs_is_named(write):
  for time in (0, 1):
    write(f"t{time}.tif", volume(time), resolution=(1000 + 500 * time,) * 2,
          resolutionunit="CENTIMETER")
  with pytest.raises(ReadError, match="t1.tif has spacing"):
    data.read(write.folder)


def test_files_of_32_bits_share_one_type(write):
  for time, most in enumerate((200, 60_000, 300)):
    array = volume(0, dtype=np.int32)
    array[0, 0, 0] = most
    write(f"t{time}.tif", array)
  record = data.read(write.folder)
  assert record.volume.dtype == np.uint16
  assert record.volume[:, 0, 0, 0, 0].tolist() == [200, 60_000, 300]


@pytest.mark.parametrize("names", [
    ("a1.tif", "b2.tif"), ("t0_c0.tif", "t0_c1.tif", "t1_c0.tif", "t1_c1.tif"),
    ("t1.tif", "t01.tif"), ("sub-01_T1w.tif", "sub-02_T1w.tif"),
    ("patient 3.npy", "patient 4.npy"),
])
def test_names_that_number_no_time_are_refused(write, names):
  for name in names:
    write(name, volume(0))
  assert reason(write.folder) == "irregular_frames"


def test_all_volumes_together_are_bounded_before_they_are_stacked(write):
  for time in range(4):
    write(f"t{time}.tif", volume(time))
  size = 4 * volume(0).size
  assert reason(write.folder, max_voxels=size - 1) == "too_large"
  assert data.read(write.folder, max_voxels=size).volume.size == size


def test_notes_beside_the_volumes_are_passed_over(write):
  for time in range(2):
    write(f"t{time}.tif", volume(time))
  for name in ("tracks.txt", ".hidden", "Thumbs.db"):
    with open(os.path.join(write.folder, name), "w") as file:
      file.write("t z y x")
  assert len(data.read(write.folder).volume) == 2


def test_a_broken_file_is_named_itself(write):
  for time in range(3):
    write(f"t{time}.tif", volume(time))
  path = os.path.join(write.folder, "t1.tif")
  with open(path, "r+b") as file:
    file.truncate(300)
  with pytest.raises(ReadError, match="t1.tif") as caught:
    data.read(write.folder)
  assert caught.value.path == path


def test_other_folders_are_not_taken():
  takes = time_points.matches_folder
  assert takes(["a/t0.tif", "a/t1.tif", "a/notes.txt"])
  assert not takes(["a/t0.tif"]) and not takes(["a/1.dcm", "a/2.dcm"])
  assert not takes(["a/t0.tif", "a/t1.npy"]) and not takes([])


def test_a_folder_in_a_bucket_reads_as_the_local_one(write, bucket):
  for time in range(3):
    write(f"t{time}.tif", volume(time))
    storage.upload(f"{write.folder}/t{time}.tif", f"{bucket.url}/e/t{time}.tif")
  remote = data.read(f"{bucket.url}/e")
  np.testing.assert_array_equal(remote.volume, data.read(write.folder).volume)
