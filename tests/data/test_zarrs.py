"""Claims of readers/zarrs.py on small folders that zarr writes."""

import json
import os

import numpy as np
import pytest

from vjepa_jax import data
from vjepa_jax.data import storage
from vjepa_jax.data.readers import zarrs
from vjepa_jax.data.record import ReadError

zarr = pytest.importorskip("zarr", reason="extra zarr is not installed")

NAN = np.nan


def make(shape=(4, 20, 24), dtype=np.uint16) -> np.ndarray:
  return np.random.default_rng(5).integers(1, 250, shape).astype(dtype)


@pytest.fixture
def folder(tmp_path):
  return str(tmp_path / "a.zarr")


def write(folder: str, array: np.ndarray, **how):
  how = {"chunks": (2, 8, 24)} | how
  made = zarr.create_array(folder, shape=array.shape, dtype=array.dtype, **how)
  made[:] = array
  return made


def reason(folder: str, **options) -> str:
  with pytest.raises(ReadError) as caught:
    data.read(folder, **options)
  return caught.value.reason


def edit(folder: str, name: str, change) -> None:
  path = os.path.join(folder, name)
  with open(path) as file:
    meta = json.load(file)
  change(meta)
  with open(path, "w") as file:
    json.dump(meta, file)


@pytest.mark.parametrize("how", [
    {"zarr_format": 2}, {"zarr_format": 3}, {"shards": (4, 16, 24)},
    {"zarr_format": 2, "compressors": None}, {"zarr_format": 3, "compressors": None},
    {"zarr_format": 2, "order": "F"},
])
@pytest.mark.parametrize("dtype", ["u1", "<u2", ">i2", "f4", "f8", "i4", "?"])
def test_every_storage_reads_as_zarr_reads_it(folder, how, dtype):
  array = make(dtype=dtype)
  made = write(folder, array, **how)
  record = data.read(folder)
  np.testing.assert_array_equal(record.volume[0, ..., 0], made[:])
  np.testing.assert_array_equal(record.volume[0, ..., 0], array)
  assert record.meta["axes_source"] == "default" and "pieces_absent" not in record.meta


def write_image(folder: str, version: int) -> np.ndarray:
  """An OME-NGFF image of two levels, and labels beside."""
  array = make((2, 1, 3, 16, 24), np.uint8)
  group = zarr.open_group(folder, mode="w", zarr_format=version)
  axes = [
      {"name": n, "type": k, "unit": u} for n, k, u in (
          ("t", "time", "minute"), ("c", "channel", ""), ("z", "space", "micrometer"),
          ("y", "space", "nanometer"), ("x", "space", "furlong"),
      )
  ]
  levels = []
  for level in range(2):
    step = 2**level
    part = array[..., ::step, ::step]
    made = group.create_array(str(level), shape=part.shape, chunks=(1, 1, 3, 8, 8),
                              dtype="u1")
    made[:] = part
    change = [{"type": "scale", "scale": [1, 1, 2, 500 * step, step]}]
    levels.append({"path": str(level), "coordinateTransformations": change})
  image = {"axes": axes, "datasets": levels, "name": "one", "version": "0.4",
           "coordinateTransformations": [{"type": "scale", "scale": [3, 1, 1, 1, 1]}]}
  if version == 2:
    group.attrs["multiscales"] = [image]
  else:
    group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
  made = group.create_array("labels/cells/0", shape=(3, 16, 24), dtype="u1")
  made[:] = 1
  return array


@pytest.mark.parametrize("version", [2, 3])
def test_the_finest_level_of_an_image_is_read_with_axes_and_lengths(folder, version):
  array = write_image(folder, version)
  record = data.read(folder)
  np.testing.assert_array_equal(record.volume, np.moveaxis(array, 1, -1))
  np.testing.assert_allclose(record.spacing, [180, 2e-3, 5e-4, NAN], rtol=1e-6)
  assert record.meta["key"] == "0" and record.meta["axes_source"] == "file"


def test_a_level_is_chosen_by_its_path(folder):
  write_image(folder, 3)
  record = data.read(folder, key="1")
  assert record.volume.shape == (2, 3, 8, 12, 1)
  np.testing.assert_allclose(record.spacing, [180, 2e-3, 1e-3, NAN], rtol=1e-6)
  assert data.read(folder, key="labels/cells/0").volume.shape == (1, 3, 16, 24, 1)
  assert reason(folder, key="7") == "several_series"


def test_one_of_several_arrays_is_chosen_by_its_path(folder):
  group = zarr.open_group(folder, mode="w")
  for name in ("a", "b/c"):
    group.create_array(name, shape=(4, 5, 6), dtype="u1")[:] = 3
  with pytest.raises(ReadError, match=r"a \[4, 5, 6\].*b/c") as caught:
    data.read(folder)
  assert caught.value.reason == "several_series"
  assert data.read(folder, key="b/c").volume.max() == 3


def test_axes_come_from_names_of_dimensions(folder):
  array = make((2, 3, 10, 12))
  names = ("t", "channel", "y", "x")
  write(folder, array, chunks=(1, 1, 10, 12), dimension_names=names)
  assert data.read(folder).volume.shape == (2, 1, 10, 12, 3)
  assert data.read(folder, axes="TZYX").volume.shape == (2, 3, 10, 12, 1)
  assert reason(folder, axes="ZYX") == "ambiguous_axes"


def test_unnamed_axes_of_four_are_refused(folder):
  write(folder, make((2, 3, 10, 12)), chunks=(1, 1, 10, 12))
  assert reason(folder) == "ambiguous_axes"


def test_a_claim_of_a_million_slices_over_a_few_pieces_is_refused_at_once(folder):
  write(folder, make())
  edit(folder, "zarr.json", lambda meta: meta.update(shape=[300_000, 20, 24]))
  with pytest.raises(ReadError, match="6 of the 450,000 pieces") as caught:
    data.read(folder)
  assert caught.value.reason == "truncated"


def test_pieces_that_hold_the_fill_value_are_stated(folder):
  array = make()
  array[:2] = 0
  write(folder, array)
  record = data.read(folder)
  np.testing.assert_array_equal(record.volume[0, ..., 0], array)
  assert record.meta["pieces_absent"] == "3 of 6"


def test_an_array_without_any_piece_is_no_zeros(folder):
  zarr.create_array(folder, shape=(4, 5, 6), dtype="u1")
  assert reason(folder) == "no_pixel_data"


@pytest.mark.parametrize("version, name", [(2, ".zarray"), (3, "zarr.json")])
def test_a_codec_that_runs_code_is_refused(folder, version, name):
  write(folder, make(), zarr_format=version)

  def change(meta):
    if version == 2:
      meta["filters"] = [{"id": "pickle"}]
    else:
      meta["codecs"].append({"name": "numcodecs.pickle", "configuration": {}})

  edit(folder, name, change)
  with pytest.raises(ReadError, match="pickle") as caught:
    data.read(folder)
  assert caught.value.reason == "no_decoder"


@pytest.mark.parametrize("path", ["../../secret", "/../x", "a/./../../b"])
def test_a_level_outside_the_folder_is_refused(folder, path):
  write_image(folder, 2)
  edit(
      folder, ".zattrs", lambda m: m["multiscales"][0]["datasets"][0].update(path=path)
  )
  assert reason(folder) == "path_escape"
  assert reason(folder, key=path) == "path_escape"


@pytest.mark.parametrize("change, wanted", [
    ({"shape": [10**6, 10**6, 10**3]}, "too_large"),
    ({"shape": [-1, 2, 3]}, "empty_file"), ({"shape": "many"}, "bad_header"),
    ({"data_type": "string"}, "unsupported_pixels"),
    ({"shape": [4, 20]}, "bad_header"), ({"codecs": 3}, "bad_header"),
    ({"chunk_grid": {"configuration": {"chunk_shape": [10**6] * 3}}}, "too_large"),
    ({"chunk_grid": {"configuration": {"chunk_shape": [0, 1, 1]}}}, "bad_header"),
    ({"data_type": "complex64"}, "unsupported_pixels"),
])
def test_hostile_metadata_are_refused(folder, change, wanted):
  write(folder, make())
  edit(folder, "zarr.json", lambda m: m.update(change))
  assert reason(folder) == wanted


def test_a_damaged_piece_is_an_error(folder):
  array = make()
  write(folder, array)
  pieces = [
      os.path.join(base, n) for base, _, names in os.walk(folder) for n in names
      if n != "zarr.json"
  ]
  with open(pieces[0], "rb") as file:
    content = file.read()
  for damaged in (content[:len(content) // 2], b"", b"\xff" * 40):
    with open(pieces[0], "wb") as file:
      file.write(damaged)
    assert reason(folder) in ("decode_failed", "too_large", "decoder_died")


def test_objects_beyond_the_bytes_allowed_are_not_all_fetched(folder):
  write(folder, make((40, 20, 24)), compressors=None)
  assert reason(folder, max_bytes=2000) == "too_large"


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "{\"zarr_format\": 3}", "[" * 9000]
)
def test_metadata_that_are_none_are_an_error(folder, content):
  os.makedirs(folder)
  with open(os.path.join(folder, "zarr.json"), "w") as file:
    file.write(content)
  assert reason(folder) in ("bad_header", "several_series")


def test_other_folders_are_not_taken():
  assert zarrs.matches_folder(["a/zarr.json"]) and zarrs.matches_folder(["a/0/.zarray"])
  assert not zarrs.matches_folder(["a/b.json", "a/zarr.json.txt"])


def test_an_image_in_a_bucket_reads_as_the_local_one(folder, bucket):
  write_image(folder, 3)
  for name in storage.list_files(folder):
    storage.upload(name, storage.join(f"{bucket.url}/a.zarr", name[len(folder) + 1:]))
  remote, local = data.read(f"{bucket.url}/a.zarr"), data.read(folder)
  np.testing.assert_array_equal(remote.volume, local.volume)
  np.testing.assert_array_equal(remote.spacing, local.spacing)
  assert remote.source == f"{bucket.url}/a.zarr"
