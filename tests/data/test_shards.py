"""Claims of data/shards.py and of the cache folder of open_data."""

import os
import pathlib
import pickle

import numpy as np
import pytest

from vjepa_jax.data import shards
from vjepa_jax.data.pipeline import open_data, train_iterator
from vjepa_jax.data.record import DataError, Record


def opened(manifest, cache, **options):
  return open_data(
      manifest, cache=str(cache),
      **{"canvas": (4, 16, 16), "splits": "part", "label": "pathology",
         "max_bad_fraction": 0.2, **options},
  )


def records(count, dtype=np.uint8, shape=(1, 2, 8, 8, 1)):
  rng = np.random.default_rng(0)
  return [
      Record(
          rng.integers(0, 255, shape).astype(dtype), np.array([np.nan, 0.1, 0.2, 0.3]),
          f"{n}.dcm", subject=str(n), meta={"spacing_source": "shared", "padding": 0.5},
      ) for n in range(count)
  ]


def delete_scans(folder: pathlib.Path):
  for path in folder.rglob("*.dcm"):
    path.write_bytes(b"gone")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_canvases_come_back_in_order_and_exactly(tmp_path, dtype):
  made = {"train": records(5, dtype), "all": records(2, dtype)}
  path = str(tmp_path / "cache")
  shards.write(path, made, lambda: {"note": 1})
  assert shards.read_notes(path) == {"note": 1}
  for name, want in made.items():
    found = shards.Shards(path, name)
    assert len(found) == len(want)
    for index in reversed(range(len(want))):
      a, b = want[index], found[index]
      np.testing.assert_array_equal(a.volume, b.volume)
      np.testing.assert_array_equal(a.spacing, b.spacing)
      for field in ("mean", "std", "source", "subject"):
        assert getattr(a, field) == getattr(b, field)
      assert b.volume.dtype == dtype and b.meta == dict(a.meta)


def test_what_is_cut_short_leaves_nothing_to_trust(tmp_path):
  def breaks():
    yield from records(2)
    raise KeyboardInterrupt

  path = str(tmp_path / "cache")
  with pytest.raises(KeyboardInterrupt):
    shards.write(path, {"train": breaks()}, dict)
  assert shards.read_notes(path) is None and os.listdir(tmp_path) == []


def test_a_split_without_canvases_is_not_cached(tmp_path):
  with pytest.raises(DataError, match="test"):
    shards.write(str(tmp_path / "c"), {"train": records(1), "test": []}, dict)
  assert os.listdir(tmp_path) == []


def test_a_damaged_shard_is_an_error_and_not_other_pixels(tmp_path):
  path = tmp_path / "cache"
  shards.write(str(path), {"train": records(1, shape=(1, 4, 64, 64, 1))}, dict)
  file, = path.glob("*array_record*")
  content = bytearray(file.read_bytes())
  middle = content.index(records(1, shape=(1, 4, 64, 64, 1))[0].volume.tobytes()[:64])
  content[middle + 3000] ^= 1
  file.write_bytes(bytes(content))
  with pytest.raises(DataError, match="damaged"):
    shards.Shards(str(path), "train")[0]


def test_shards_pickle_without_their_handles(tmp_path):
  path = str(tmp_path / "cache")
  shards.write(path, {"train": records(3)}, dict)
  found = shards.Shards(path, "train")
  want = found[1].volume
  again = pickle.loads(pickle.dumps(found))
  np.testing.assert_array_equal(again[1].volume, want)


def test_a_cache_in_a_bucket_is_refused():
  with pytest.raises(ValueError, match="local"):
    shards.locate("gs://bucket/cache", {}, {})


def test_a_second_run_reads_the_shards_and_no_dicom(write_corpus, tmp_path):
  manifest = write_corpus(broken={3: "truncated"})
  plain = opened(manifest, "memory")
  told = []
  first = opened(manifest, tmp_path / "c", progress=lambda *a: told.append(a))
  assert told == [(n, 12) for n in range(1, 13)]
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


def test_too_many_bad_files_leave_no_cache_and_the_message_has_their_reasons(
    write_corpus, tmp_path
):
  manifest = write_corpus(broken={1: "truncated", 2: "not_dicom", 3: "truncated"})
  with pytest.raises(DataError, match="2 truncated"):
    opened(manifest, tmp_path / "c")
  assert not (tmp_path / "c").exists() or os.listdir(tmp_path / "c") == []
