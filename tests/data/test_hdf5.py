"""Claims of readers/hdf5.py on small files that h5py writes."""

import io
import json
import os

import numpy as np
import pytest

from vjepa_jax import data
from vjepa_jax.data.record import ReadError

h5py = pytest.importorskip("h5py", reason="extra formats is not installed")

NAN = np.nan


def make(shape=(4, 20, 24), dtype=np.uint16) -> np.ndarray:
  return np.random.default_rng(5).integers(0, 250, shape).astype(dtype)


@pytest.fixture
def write(tmp_path):
  """Returns write(fill) -> path of a file that `fill(file)` filled."""

  def write_one(fill, name="a.h5", **how) -> str:
    path = str(tmp_path / name)
    with h5py.File(path, "w", **how) as file:
      fill(file)
    return path

  return write_one


def reason(path: str, **options) -> str:
  with pytest.raises(ReadError) as caught:
    data.read(path, **options)
  return caught.value.reason


@pytest.mark.parametrize("how", [
    {}, {"chunks": (2, 8, 7)}, {"compression": "gzip", "shuffle": True},
    {"compression": "lzf", "fletcher32": True}, {"maxshape": (None, 20, 24)},
    {"compression": "gzip", "chunks": (4, 20, 24)},
])
@pytest.mark.parametrize("dtype", ["u1", "<u2", ">i2", "f4", "f8", "i4"])
def test_every_storage_reads_as_h5py_reads_it(write, how, dtype):
  array = make(dtype=dtype)
  path = write(lambda f: f.create_dataset("deep/raw", data=array, **how))
  record = data.read(path)
  np.testing.assert_array_equal(record.volume[0, ..., 0], array)
  assert record.meta["key"] == "/deep/raw" and record.meta["axes_source"] == "default"


def test_one_of_several_arrays_is_chosen_by_its_path(write):
  def fill(file):
    file["a/raw"], file["a/mask"] = make(), make(dtype=np.uint8)
    file["a/table"] = np.zeros((3, 2))
    file["link"] = h5py.SoftLink("/a/mask")

  path = write(fill)
  with pytest.raises(ReadError, match="/a/mask uint8.*/a/raw uint16") as caught:
    data.read(path)
  assert caught.value.reason == "several_series"
  assert data.read(path, key="a/mask").volume.dtype == np.uint8
  assert data.read(path, key="/link").volume.dtype == np.uint8
  assert data.read(path, key="a/table", axes="YX").volume.shape == (1, 1, 3, 2, 1)
  for key in ("a", "a/absent", "a/raw/x"):
    assert reason(path, key=key) == "several_series"


def test_axes_come_from_what_the_file_says(write):
  array = make((2, 3, 10, 12))

  def labelled(file):
    for dimension, name in zip(file.create_dataset("d", data=array).dims, "tzyx"):
      dimension.label = name

  def named(file):
    file.create_dataset("d", data=array).attrs["axes"] = "tczyx"[0] + "cyx"

  def tagged(file):
    tags = {"axes": [{"key": k} for k in "zcyx"]}
    file.create_dataset("d", data=array).attrs["axistags"] = json.dumps(tags)

  def listed(file):
    file.create_dataset("d", data=array).attrs["axes"] = [b"c", b"z", b"y", b"x"]

  for fill, shape in (
      (labelled, (2, 3, 10, 12, 1)), (named, (2, 1, 10, 12, 3)),
      (tagged, (1, 2, 10, 12, 3)), (listed, (1, 3, 10, 12, 2)),
  ):
    record = data.read(write(fill))
    assert record.volume.shape == shape and record.meta["axes_source"] == "file"
  assert data.read(write(labelled), axes="CZYX").volume.shape == (1, 3, 10, 12, 2)
  assert reason(write(lambda f: f.create_dataset("d", data=array))) == "ambiguous_axes"


def test_axes_that_contradict_the_array_are_refused(write):
  def fill(file):
    file.create_dataset("d", data=make()).attrs["axes"] = "tzyx"

  assert reason(write(fill)) == "ambiguous_axes"
  assert reason(write(fill), axes="CZYX") == "ambiguous_axes"
  assert data.read(write(fill), axes="ZYX").volume.shape == (1, 4, 20, 24, 1)


def test_a_voxel_s_size_is_read_in_micrometres(write):
  def fill(file):
    file.create_dataset("d", data=make()).attrs["element_size_um"] = [3, 0.5, 0.25]

  record = data.read(write(fill))
  np.testing.assert_allclose(record.spacing, [NAN, 3e-3, 5e-4, 2.5e-4], rtol=1e-6)


def test_a_matlab_file_has_its_axes_turned_round(write):
  volume = make((20, 24, 4))  # As MATLAB shows it: rows, columns, slices.
  path = write(
      lambda f: f.create_dataset("scan", data=volume.T), "a.mat", userblock_size=512
  )
  with open(path, "r+b") as file:
    file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512))
  record = data.read(path)
  assert record.volume.shape == (1, 4, 20, 24, 1)
  np.testing.assert_array_equal(record.volume[0, ..., 0], volume.transpose(2, 0, 1))
  assert record.meta["format"] == "MATLAB 7.3"


def test_nothing_outside_the_file_is_read(write, tmp_path):
  secret = tmp_path / "secret.h5"
  with h5py.File(secret, "w") as file:
    file["d"] = make()
  raw = tmp_path / "raw"
  raw.write_bytes(bytes(4 * 5 * 6))

  def link(file):
    file["out"] = h5py.ExternalLink(str(secret), "/d")
    file["soft"] = h5py.SoftLink("/out")

  path = write(link)
  assert reason(path) == "no_pixel_data"
  assert reason(path, key="out") == "path_escape"
  assert reason(path, key="soft") == "path_escape"
  stored = {"shape": (4, 5, 6), "dtype": "u1"}
  path = write(lambda f: f.create_dataset("d", external=[(str(raw), 0, 120)], **stored))
  assert reason(path) == "path_escape"

  def virtual(file):
    layout = h5py.VirtualLayout((4, 20, 24), "u2")
    layout[:] = h5py.VirtualSource(str(secret), "d", (4, 20, 24))
    file.create_virtual_dataset("d", layout)

  assert reason(write(virtual)) == "path_escape"


def test_minc_is_refused_since_its_values_are_scaled_apart(write):
  path = write(
      lambda f: f.create_dataset("minc-2.0/image/0/image", data=make()), "a.mnc"
  )
  assert reason(path) == "unsupported_format"


def test_links_in_a_circle_end(write):
  def fill(file):
    file["a"], file["b"] = h5py.SoftLink("/b"), h5py.SoftLink("/a")
    group = file.create_group("g")
    group["up"] = file["/"]

  assert reason(write(fill), key="a") == "bad_header"
  assert reason(write(fill)) == "no_pixel_data"


def test_voxels_that_were_never_written_are_no_zeros(write):
  how = {"shape": (4, 20, 24), "dtype": "u2", "chunks": (1, 20, 24)}
  assert reason(write(lambda f: f.create_dataset("d", **how))) == "no_pixel_data"

  def half(file):
    file.create_dataset("d", **how)[:2] = 7

  assert reason(write(half)) == "truncated"


def test_a_claim_beyond_all_bounds_is_refused_before_memory_is_taken(write):
  how = {"dtype": "u1", "chunks": (1, 1000, 1000)}

  def fill(file):
    file.create_dataset("d", shape=(10**6, 1000, 1000), **how)[0] = 1

  assert reason(write(fill)) == "too_large"
  path = write(lambda f: f.create_dataset("d", data=make()))
  assert reason(path, max_voxels=4 * 20 * 24 - 1) == "too_large"


def test_a_chunk_that_swells_is_stopped(write):
  import zlib

  bomb = zlib.compress(bytes(9 << 27), 1)

  def fill(file):
    dataset = file.create_dataset(
        "d", shape=(4, 20, 24), dtype="u1", chunks=(4, 20, 24), compression="gzip"
    )
    dataset.id.write_direct_chunk((0, 0, 0), bomb)

  assert reason(write(fill)) in ("too_large", "decode_failed")


@pytest.mark.parametrize("array, wanted", [
    (np.ones((2, 3, 4), np.complex64), "no_pixel_data"),
    (np.full((2, 3, 4), NAN), "nan_voxels"), (np.zeros((3, 4)), "no_pixel_data"),
    (np.array([[[b"abc"]]]), "no_pixel_data"),
])
def test_what_is_no_image_is_refused(write, array, wanted):
  assert reason(write(lambda f: f.create_dataset("d", data=array))) == wanted


def test_a_damaged_file_is_an_error_or_a_record(write):
  def fill(file):
    file.create_dataset("g/d", data=make(), chunks=(2, 10, 12), compression="gzip")

  path = write(fill)
  with open(path, "rb") as file:
    content = file.read()
  damaged = path + ".damaged"

  def outcome(changed: bytes) -> str:
    with open(damaged, "wb") as file:
      file.write(changed)
    try:
      data.read(damaged, max_voxels=2**20, timeout_s=20)
      return "record"
    except ReadError as error:
      return error.reason

  for part in (0.99, 0.6, 0.2):
    assert outcome(content[:int(part * len(content))]) in ("bad_header", "truncated")
  rng = np.random.default_rng(1)
  found = set()
  for _ in range(80):
    changed = bytearray(content)
    changed[rng.integers(8, min(len(content), 3000))] ^= 1 << rng.integers(8)
    found.add(outcome(bytes(changed)))
  assert {"record", "bad_header"} <= found and "timed_out" not in found


def test_a_missing_filter_is_named(write):
  def fill(file):
    space = h5py.h5s.create_simple((4, 20, 24))
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((4, 20, 24))
    plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
    made = h5py.h5d.create(file.id, b"d", h5py.h5t.STD_U8LE, space, plist)
    made.write_direct_chunk((0, 0, 0), b"x" * 9, 0)

  if h5py.h5z.filter_avail(32015):
    pytest.skip("this HDF5 has the filter")
  with pytest.raises(ReadError, match="32015") as caught:
    data.read(write(fill))
  assert caught.value.reason == "no_decoder"


def test_the_mark_decides_and_not_the_name(write, tmp_path):
  path = write(lambda f: f.create_dataset("d", data=make()), "a.tif")
  assert data.read(path).meta["format"] == "HDF5"
  other = tmp_path / "b.h5"
  other.write_bytes(io.BytesIO(os.urandom(64)).getvalue())
  assert reason(str(other)) == "unsupported_format"
