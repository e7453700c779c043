"""Claims of data/shards.py, data/array_records.py and of open_data's cache folder."""

import hashlib
import json
import os
import pathlib
import pickle
import time

from array_record.python import array_record_module
import numpy as np
import pytest

from tests.data import making
from vjepa_jax.data import shard_writing, shards, storage
from vjepa_jax.data.pipeline import open_data, train_iterator
from vjepa_jax.data.record import DataError


def opened(manifest, cache, **options):
  return open_data(
      manifest, cache=str(cache),
      **{"canvas": (4, 16, 16), "splits": "part", "label": "pathology",
         "max_bad_fraction": 0.2, **options},
  )


def prepared(folder, path, count=5, **made):
  """Returns (what was meant, by split; where the shards lie)."""
  texts = [str(n) for n in range(count)]
  parts = {
      "train": making.rows(folder / "a", texts),
      "all": making.rows(folder / "b", texts[:2]),
  }
  transform = making.Made(**made)
  shard_writing.prepare(str(path), parts, transform, options=made)
  return {name: list(map(transform, part)) for name, part in parts.items()}


def delete_scans(folder: pathlib.Path):
  for path in folder.rglob("*.dcm"):
    path.write_bytes(b"gone")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_canvases_come_back_in_order_and_exactly(tmp_path, dtype):
  path = tmp_path / "cache"
  made = prepared(tmp_path, path, dtype=dtype)
  for name, want in made.items():
    found = shards.Shards(str(path), name)
    assert len(found) == len(want)
    for index in reversed(range(len(want))):
      a, b = want[index], found[index]
      np.testing.assert_array_equal(a.volume, b.volume)
      np.testing.assert_array_equal(a.spacing, b.spacing)
      for field in ("mean", "std", "source", "subject"):
        assert getattr(a, field) == getattr(b, field)
      assert b.volume.dtype == dtype and b.meta["padding"] == 0.5


@pytest.mark.parametrize("size", [1, 65100, 65512, 131024, 400_000])
def test_any_size_of_volume_is_found_between_the_file_s_block_headers(tmp_path, size):
  path = tmp_path / "cache"
  made = prepared(tmp_path, path, shape=(1, 1, 1, size, 2))
  for want, got in zip(made["train"], shards.Shards(str(path), "train"), strict=True):
    np.testing.assert_array_equal(want.volume, got.volume)


def test_a_canvas_larger_than_one_call_may_read_comes_whole(tmp_path):
  path = tmp_path / "cache"
  made = prepared(tmp_path, path, count=1, shape=(1, 1, 1000, 33_600, 1))
  np.testing.assert_array_equal(
      made["train"][0].volume, shards.Shards(str(path), "train")[0].volume
  )


def test_tensorflow_datasets_opens_the_folder_and_finds_the_same(tmp_path):
  import tensorflow_datasets as tfds

  path = tmp_path / "cache"
  made = prepared(tmp_path, path)
  builder = tfds.builder_from_directory(str(path))
  assert builder.info.splits["part_train"].num_examples == 5
  source = builder.as_data_source(split="part_train")
  for index, ours in enumerate(shards.Shards(str(path), "train")):
    theirs = source[index]
    assert theirs["volume"] == made["train"][index].volume.tobytes()
    np.testing.assert_array_equal(theirs["spacing"], ours.spacing)
    assert json.loads(theirs["facts"])["source"] == ours.source


def test_a_canvas_tells_what_it_was_made_of(tmp_path):
  made = prepared(tmp_path, tmp_path / "cache", shape=(1, 3, 40, 50, 1), dtype="int16")
  raw = made["train"][1].volume
  meta = shards.Shards(str(tmp_path / "cache"), "train")[1].meta
  assert meta["raw"]["mean"] == pytest.approx(raw.mean())
  assert meta["raw"]["std"] == pytest.approx(raw.std())
  for share, value in meta["raw"]["percentiles"].items():
    want = np.percentile(raw, float(share), method="inverted_cdf")
    assert value == want
  source = (tmp_path / "a" / "001.txt").read_bytes()
  assert meta["provenance"] == {"sha256": hashlib.sha256(source).hexdigest()}
  made_by = {"shape": [1, 3, 40, 50, 1], "dtype": "int16"}
  assert meta["transform"] == shards.digest(made_by)


def test_a_canvas_is_read_into_a_row_of_a_batch(tmp_path):
  made = prepared(tmp_path, tmp_path / "cache", dtype="uint16")
  found = shards.Shards(str(tmp_path / "cache"), "train")
  batch = np.zeros((3, 1, 2, 8, 8, 1), np.uint16)
  record = found.read_into(4, batch[1])
  assert np.shares_memory(record.volume, batch)
  np.testing.assert_array_equal(batch[1], made["train"][4].volume)
  assert not batch[0].any() and not batch[2].any()
  with pytest.raises(ValueError, match="bytes"):
    found.read_into(0, batch[:2])


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_damaged_shard_names_file_and_row_and_gives_no_other_pixels(tmp_path, share):
  path = tmp_path / "cache"
  prepared(tmp_path, path, count=1, shape=(1, 4, 64, 64, 1))
  file, = path.glob("*part_train.array_record*")
  content = bytearray(file.read_bytes())
  content[int(16_500 * share)] ^= 1
  file.write_bytes(bytes(content))
  with pytest.raises(DataError, match=r"part_train.array_record-00000.*train 0 is dam"):
    shards.Shards(str(path), "train")[0]
  file.write_bytes(bytes(content[:9000]))
  with pytest.raises(DataError, match="ends at byte 9000"):
    shards.Shards(str(path), "train")[0]


def test_a_split_or_folder_that_is_not_there_is_said(tmp_path):
  prepared(tmp_path, tmp_path / "cache")
  with pytest.raises(DataError, match="no split test"):
    len(shards.Shards(str(tmp_path / "cache"), "test"))
  with pytest.raises(DataError, match="missing_file"):
    len(shards.Shards(str(tmp_path / "none"), "train"))
  with pytest.raises(IndexError):
    shards.Shards(str(tmp_path / "cache"), "train")[5]


def test_shards_pickle_and_hold_no_file_open(tmp_path):
  path = str(tmp_path / "cache")
  prepared(tmp_path, path)
  found = shards.Shards(path, "train")
  before = len(os.listdir("/proc/self/fd"))
  want = found[1].volume
  assert len(os.listdir("/proc/self/fd")) == before
  again = pickle.loads(pickle.dumps(found))
  np.testing.assert_array_equal(again[1].volume, want)


@pytest.mark.slow
def test_a_cpu_second_reads_120_volumes_of_64_x_384_x_384(tmp_path):
  path = str(tmp_path / "cache")
  prepared(tmp_path, path, count=8, shape=(1, 64, 384, 384, 1))
  found = shards.Shards(path, "train")
  batch = np.empty((8, 1, 64, 384, 384, 1), np.uint8)
  rates = []
  for _ in range(5):
    start = time.process_time()
    for index in range(8):
      found.read_into(index, batch[index])
    rates.append(8 / (time.process_time() - start))
  assert max(rates) > 120


def test_shards_in_a_bucket_read_as_local_ones(tmp_path, bucket):
  made = prepared(tmp_path, tmp_path / "cache", shape=(1, 3, 200, 150, 1))
  remote = f"{bucket.url}/prepared"
  for entry in storage.list_entries(str(tmp_path / "cache")):
    name = os.path.relpath(entry.path, tmp_path / "cache")
    storage.upload(entry.path, f"{remote}/{name}")
  found = pickle.loads(pickle.dumps(shards.Shards(remote, "train")))
  for index, want in enumerate(made["train"]):
    np.testing.assert_array_equal(found[index].volume, want.volume)
  assert shards.read_notes(remote) == shards.read_notes(str(tmp_path / "cache"))
  theirs = array_record_module.ArrayRecordReader(
      f"{remote}/canvases-part_train.array_record-00000-of-00001"
  )
  assert theirs.num_records() == 5
  assert theirs.read([2])[0].endswith(made["train"][2].volume.tobytes())


def test_a_bucket_s_canvas_is_fetched_once_where_there_is_a_cache(
    tmp_path, bucket, monkeypatch
):
  made = prepared(tmp_path, tmp_path / "cache")
  remote = f"{bucket.url}/prepared"
  for entry in storage.list_entries(str(tmp_path / "cache")):
    name = os.path.relpath(entry.path, tmp_path / "cache")
    storage.upload(entry.path, f"{remote}/{name}")
  monkeypatch.setenv("VJEPA_JAX_FILE_CACHE", str(tmp_path / "files"))
  found = shards.Shards(remote, "train")
  found[3]
  bucket.emulator.forget_requests()
  np.testing.assert_array_equal(found[3].volume, made["train"][3].volume)
  assert not bucket.emulator.requests()
  found[2]
  assert len(bucket.emulator.requests()) == 1


def test_a_bucket_out_of_reach_is_said_soon(monkeypatch):
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
  monkeypatch.setenv("VJEPA_JAX_STORAGE_DEADLINE_S", "1")
  start = time.monotonic()
  with pytest.raises(DataError, match="unreachable"):
    len(shards.Shards("gs://bucket/prepared", "train"))
  assert time.monotonic() - start < 10


def test_the_folder_follows_rows_options_and_files_in_a_bucket_by_one_listing(bucket):
  for n in range(3):
    storage.write_bytes(f"{bucket.url}/oct/s{n}/a.dcm", b"%d" % n)
  rows = [making.Row(f"{bucket.url}/oct/s{n}", f"p{n}") for n in range(2)]
  rows.append(making.Row(f"{bucket.url}/oct/s2/a.dcm", "p2"))
  bucket.emulator.forget_requests()
  places = {shards.locate("/c", {"all": rows}, {"a": 1})}
  assert len(bucket.emulator.requests()) == 1
  places.add(shards.locate("/c", {"all": rows}, {"a": 2}))
  places.add(shards.locate("/c", {"all": rows[:2]}, {"a": 1}))
  for name in ("s0/b.dcm", "s2/a.dcm"):
    storage.write_bytes(f"{bucket.url}/oct/{name}", b"new")
    places.add(shards.locate("/c", {"all": rows}, {"a": 1}))
  assert len(places) == 5


def test_a_second_run_reads_the_shards_and_no_dicom(write_corpus, tmp_path):
  manifest = write_corpus(broken={3: "truncated"})
  plain = opened(manifest, "memory")
  told = []
  first = opened(manifest, tmp_path / "c", progress=lambda *a: told.append(a))
  assert sorted(told) == [(n, 12) for n in range(1, 13)]
  stats = {p: p.stat() for p in tmp_path.rglob("*.dcm")}
  delete_scans(tmp_path)
  for path, stat in stats.items():  # Same size and time: the same file to the key.
    path.write_bytes(b"x" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  second = opened(manifest, tmp_path / "c")
  for data in (first, second):
    report = {k: v for k, v in data.report.items() if k != "cache"}
    assert report == {k: v for k, v in plain.report.items() if k != "cache"}
    assert data.quarantine == plain.quarantine
    for name, volumes in plain.splits.items():
      assert len(data.splits[name]) == len(volumes)
      for index in range(len(volumes)):
        want, found = volumes.element(index), data.splits[name].element(index)
        for key in want:
          np.testing.assert_array_equal(found[key], want[key])
  batches = [
      next(train_iterator(d.splits["train"], batch_size=4, seed=1))
      for d in (plain, second)
  ]
  np.testing.assert_array_equal(batches[0]["volume"], batches[1]["volume"])


def test_another_canvas_or_a_file_replaced_makes_other_shards(write_corpus, tmp_path):
  manifest = write_corpus()
  opened(manifest, tmp_path / "c")
  opened(manifest, tmp_path / "c", canvas=(2, 16, 16))
  assert len(os.listdir(tmp_path / "c")) == 2
  path = next(tmp_path.rglob("*.dcm"))
  path.write_bytes(path.read_bytes())
  os.utime(path, ns=(1, 1))
  opened(manifest, tmp_path / "c")
  assert len(os.listdir(tmp_path / "c")) == 3


def test_too_many_bad_files_finish_no_folder_and_the_message_has_their_reasons(
    write_corpus, tmp_path
):
  manifest = write_corpus(broken={1: "truncated", 2: "not_dicom", 3: "truncated"})
  with pytest.raises(DataError, match="2 truncated"):
    opened(manifest, tmp_path / "c")
  folder, = (tmp_path / "c").iterdir()
  assert shards.read_notes(str(folder)) is None
