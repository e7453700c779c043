"""Claims of readers/arrays.py on .npy and .npz files."""

import io
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from vjepa_jax import data
from vjepa_jax.data.readers import ReadOptions, arrays, read_content
from vjepa_jax.data.record import ReadError

NAN = np.nan


def read(content: bytes, **options):
  return read_content(content, "scan.npz", ReadOptions(**options))


def reason(content: bytes, **options) -> str:
  with pytest.raises(ReadError) as caught:
    read(content, **options)
  return caught.value.reason


def npy(array: np.ndarray, **how) -> bytes:
  file = io.BytesIO()
  np.save(file, array, **how)
  return file.getvalue()


def npz(**members) -> bytes:
  file = io.BytesIO()
  np.savez_compressed(file, **members)
  return file.getvalue()


def make(shape=(2, 3, 4), dtype=np.uint16) -> np.ndarray:
  return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def claim(shape: str, dtype: str = "'<u2'") -> bytes:
  """A .npy header of its own claims, and nothing behind."""
  text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
  return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize("pack", [npy, lambda a: npz(volume=a)], ids=["npy", "npz"])
@pytest.mark.parametrize("dtype", [
    "<u2", ">u2", "<i2", ">f8", "<f2", "u1", "i1", "?", "<i8", ">u4",
])
@pytest.mark.parametrize("order", "CF")
def test_every_type_and_order_reads_as_numpy_reads_it(pack, dtype, order):
  array = np.asarray(make(dtype=dtype), order=order)
  record = read(pack(array))
  np.testing.assert_array_equal(record.volume[0, ..., 0], array)
  assert record.volume.dtype.isnative and record.meta["axes_source"] == "default"


@pytest.mark.parametrize("axes, shape, wanted", [
    ("TYX", (2, 3, 4), (2, 1, 3, 4, 1)), ("YX", (3, 4), (1, 1, 3, 4, 1)),
    ("YXZ", (3, 4, 2), (1, 2, 3, 4, 1)), ("TZYX", (5, 2, 3, 4), (5, 2, 3, 4, 1)),
    ("CZYX", (5, 2, 3, 4), (1, 2, 3, 4, 5)),
])
def test_stated_axes_are_put_in_order(axes, shape, wanted):
  array = make(shape)
  record = read(npy(array), axes=axes)
  assert record.volume.shape == wanted and record.meta["axes_source"] == "stated"
  kept = array.transpose([axes.index(a) for a in "TZYXC" if a in axes])
  np.testing.assert_array_equal(record.volume.ravel(), kept.ravel())


def test_axes_that_nobody_states_are_refused():
  assert reason(npy(make((2, 3, 4, 5)))) == "unsupported_format"
  assert reason(npy(make((3, 4)))) == "unsupported_format"
  assert reason(npy(make((2, 3, 4))), axes="TZYX") == "ambiguous_axes"


def test_the_array_of_an_npz_is_named_or_the_only_one():
  volume, mask = make(), make(dtype=np.uint8)
  with pytest.raises(ReadError, match="mask uint8.*scan uint16.*key=") as caught:
    read(npz(scan=volume, mask=mask))
  assert caught.value.reason == "several_series"
  assert read(npz(scan=volume, mask=mask), key="mask").volume.dtype == np.uint8
  assert read(npz(volume=volume, mask=mask)).volume.dtype == np.uint16
  assert read(npz(scan=volume, when=np.arange(3))).volume.dtype == np.uint16
  assert reason(npz(scan=volume), key="absent") == "several_series"
  assert reason(npz(a=np.arange(3), b=np.arange(4))) == "several_series"


def test_spacing_may_have_a_time_step_before():
  volume = make()
  three = read(npz(volume=volume, spacing=[0.1, NAN, 0.3]))
  np.testing.assert_allclose(three.spacing, [NAN, 0.1, NAN, 0.3], rtol=1e-6)
  four = read(npz(volume=volume, spacing=[2, 0.1, 0.2, 0.3]))
  np.testing.assert_allclose(four.spacing, [2, 0.1, 0.2, 0.3], rtol=1e-6)
  assert reason(npz(volume=volume, spacing=[1, 2, 3, 4, 5])) == "bad_header"
  assert reason(npz(volume=volume, spacing=[0.1, -1, 2])) == "bad_header"


@pytest.mark.parametrize("array, wanted", [
    (np.array([[[NAN, 1]]]), "nan_voxels"), (np.array([[[np.inf, 1]]]), "nan_voxels"),
    (np.full((1, 1, 2), 1e300), "nan_voxels"),
    (np.ones((1, 2, 3), np.complex64), "unsupported_pixels"),
    (np.array([[["a", "b"]]]), "unsupported_pixels"),
    (np.zeros((1, 2, 3), [("a", "u1")]), "unsupported_pixels"),
    (np.zeros((0, 2, 3)), "empty_file"),
])
def test_what_is_no_image_is_refused(array, wanted):
  assert reason(npy(array)) == wanted
  assert reason(npz(volume=array)) == wanted


class Trap:
  def __reduce__(self):
    return os.mkdir, ("sprung",)


@pytest.mark.parametrize(
    "pack", [npy, lambda a, **k: npz(volume=a)], ids=["npy", "npz"]
)
def test_a_pickle_is_never_loaded(pack, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  content = pack(np.array([[[Trap()]]], object), allow_pickle=True)
  assert reason(content) == "unsupported_pixels"
  assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("shape, dtype, wanted", [
    ("(1000000, 1000000, 1000)", "'<u2'", "too_large"),
    ("(-3, -4, 5)", "'<u2'", "bad_header"), ("(3, 4, 5)", "'<u2'", "truncated"),
    ("(3, 4, 5)", "'O'", "unsupported_pixels"), ("(3, 4, 'a')", "'<u2'", "truncated"),
    ("(3, 4, 5)", "'V1000000000'", "unsupported_pixels"), ("()", "'<u2'", "truncated"),
    ("((((3))))" + "(" * 50, "'<u2'", "truncated"), ("(1,2,3)", "'a', 1", "truncated"),
])
def test_a_hostile_header_is_refused_before_memory_is_taken(shape, dtype, wanted):
  content = claim(shape, dtype)
  tracemalloc.start()
  assert reason(content) == wanted
  assert tracemalloc.get_traced_memory()[1] < 8 << 20
  tracemalloc.stop()


def test_bytes_behind_the_voxels_are_not_ignored():
  assert reason(npy(make()) + b"more") == "bad_header"


def test_a_bomb_is_refused_by_what_the_archive_says_and_by_what_it_holds():
  bomb = npz(volume=np.zeros((64, 1024, 1024), np.uint8))
  assert len(bomb) < 1 << 20
  tracemalloc.start()
  assert reason(bomb, max_voxels=2**20) == "too_large"
  # A directory that understates what its entry swells to.
  at = bomb.rindex(b"PK\x01\x02")
  small = npy(make())
  lying = bytearray(bomb)
  lying[at + 24:at + 28] = struct.pack("<I", len(small))
  assert reason(bytes(lying), max_voxels=2**20) in ("too_large", "truncated")
  assert tracemalloc.get_traced_memory()[1] < 8 << 20
  tracemalloc.stop()


def test_a_damaged_archive_is_an_error():
  content = npz(volume=make((8, 16, 16)))
  for part in (0.99, 0.5, 0.1):
    assert reason(content[:int(part * len(content))]) == "truncated"
  rng = np.random.default_rng(0)
  found = set()
  for _ in range(200):
    damaged = bytearray(content)
    damaged[rng.integers(4, len(content))] ^= 1 << rng.integers(8)
    try:
      np.testing.assert_array_equal(
          read(bytes(damaged)).volume[0, ..., 0], make((8, 16, 16))
      )
      found.add("record")
    except ReadError as error:
      found.add(error.reason)
  assert "truncated" in found


def test_a_zip_of_other_files_is_not_taken():
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("a.dcm", b"x" * 200)
  assert not arrays.matches(file.getvalue()[:1024], "a.zip")
  assert arrays.matches(npz(volume=make())[:1024], "a.zip")


def test_real_arrays_under_other_names_are_read(shared):
  path = str(shared("data/ivoct_pullback_186x250x250.npz"))
  with np.load(path) as direct:
    vol = direct["vol"]
  np.testing.assert_array_equal(data.read(path, key="vol").volume[0, ..., 0], vol)
  movie = str(shared("data/cell_migration_2dt.npz"))
  with np.load(movie) as direct:
    (frames,) = (direct[k] for k in direct if direct[k].ndim == 3)
  record = data.read(movie, axes="TYX")
  assert record.volume.shape == (48, 1, 130, 130, 1)
  np.testing.assert_array_equal(record.volume[:, 0, ..., 0], frames)


@pytest.mark.parametrize("options, word", [
    ({"manifest_spacing": (-1, 1, 1)}, "manifest_spacing"),
    ({"manifest_spacing": (1, 1)}, "manifest_spacing"),
    ({"manifest_spacing": "111"}, "manifest_spacing"),
    ({"manifest_spacing": (np.inf, 1, 1)}, "manifest_spacing"),
    ({"modalities": "OPT"}, "modalities"), ({"max_voxels": None}, "max_voxels"),
    ({"max_bytes": NAN}, "max_bytes"), ({"time_step_s": "1"}, "time_step_s"),
    ({"axes": 3}, "axes"),
])
def test_an_option_out_of_range_is_named(options, word):
  with pytest.raises(ValueError, match=f"read: {word} is"):
    ReadOptions(**options)


def test_unknown_lengths_of_a_manifest_stay_unknown():
  found = read(npy(make()), manifest_spacing=(NAN, np.float32(2), 3)).spacing
  np.testing.assert_array_equal(found, [NAN, NAN, 2, 3])


def test_values_too_small_for_float32_never_become_zeros():
  tiny = np.full((2, 3, 4), 1e-60)
  assert reason(npy(tiny)) == "unsupported_pixels"
  assert not read(npy(0 * tiny)).volume.any()


def test_a_path_object_is_a_path(tmp_path):
  np.save(tmp_path / "a.npy", make())
  record = data.read(tmp_path / "a.npy")
  assert record.source == str(tmp_path / "a.npy")
