"""Claims of data/storage.py, on a disk and on a bucket that fails as it is told."""

import concurrent.futures
import gzip
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import urllib.request

from array_record.python import array_record_module
import pytest

from vjepa_jax.data import storage
from vjepa_jax.data.record import ReadError

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh_counters():
  storage.reset_counters()


@pytest.fixture
def deadline(monkeypatch):
  """Returns set(seconds)."""
  return lambda s: monkeypatch.setenv("VJEPA_JAX_STORAGE_DEADLINE_S", str(s))


def refuse(call, *args, **kwargs) -> ReadError:
  with pytest.raises(ReadError) as caught:
    call(*args, **kwargs)
  return caught.value


def test_a_leading_slash_of_a_path_joins_onto_the_root():
  assert storage.join("/data", "/oct/a.dcm") == "/data/oct/a.dcm"
  assert storage.join("gs://b/root/", "/oct/a.dcm") == "gs://b/root/oct/a.dcm"
  assert storage.join("/data", "gs://b/a.dcm") == "gs://b/a.dcm"


def test_the_parent_of_a_bucket_path_is_a_bucket_path():
  assert storage.parent("gs://b/root/manifest.tsv") == "gs://b/root"
  assert storage.parent("manifest.tsv") == "."
  assert storage.basename("gs://b/root/series/") == "series"


def test_what_cannot_be_read_has_a_reason(tmp_path):
  assert refuse(storage.read_bytes, str(tmp_path / "no.dcm")).reason == "missing_file"
  folder = refuse(storage.read_bytes, str(tmp_path))
  assert folder.reason == "missing_file" and "folder" in folder.detail
  assert refuse(storage.read_bytes, "gs://bucket").reason == "missing_file"


def test_files_are_listed_in_order_with_their_suffix_size_and_stamp(tmp_path):
  for name in ("b/2.dcm", "a/1.dcm", "a/notes.txt"):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
  found = storage.list_files(str(tmp_path), ".dcm")
  assert [os.path.relpath(f, tmp_path) for f in found] == ["a/1.dcm", "b/2.dcm"]
  entries = storage.list_entries(str(tmp_path))
  assert [e.size for e in entries] == [1, 1, 1]
  assert entries[0].stamp == storage.stamp(entries[0].path)


def test_a_write_leaves_no_half_file_behind(tmp_path):
  path = str(tmp_path / "x.tsv")
  storage.write_bytes(path, b"old")
  storage.write_bytes(path, b"new")

  def breaks():
    yield b"half"
    raise RuntimeError("killed on the way")

  with pytest.raises(RuntimeError):
    storage.write_pieces(path, breaks())
  assert storage.read_bytes(path) == b"new"
  assert os.listdir(tmp_path) == ["x.tsv"]


def test_a_local_file_too_large_or_replaced_is_refused_before_it_is_read(tmp_path):
  path = str(tmp_path / "a.dcm")
  storage.write_bytes(path, b"0123456789")
  stamp = storage.stamp(path)
  assert refuse(storage.read_bytes, path, max_bytes=9).reason == "too_large"
  assert storage.read_bytes(path, max_bytes=10, expect=stamp) == b"0123456789"
  assert storage.read_bytes(path, start=2, stop=5) == b"234"
  assert storage.read_bytes(path, start=-3) == b"789"
  storage.write_bytes(path, b"another one")
  assert refuse(storage.read_bytes, path, expect=stamp).reason == "changed"


def test_a_local_read_does_not_import_gcsfs(tmp_path):
  (tmp_path / "a").write_bytes(b"1")
  code = (
      "import sys; from vjepa_jax.data import storage; "
      f"storage.read_bytes({str(tmp_path / 'a')!r}); print('gcsfs' in sys.modules)"
  )
  ran = subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert ran.stdout.strip() == "False"


def test_objects_are_read_written_listed_missed_and_deleted(bucket):
  content = bytes(range(256)) * 400
  storage.write_bytes(f"{bucket}/oct/a b+%25#?.dcm", content)
  storage.write_bytes(f"{bucket}/oct/b.txt", b"b")
  path = f"{bucket}/oct/a b+%25#?.dcm"
  assert storage.read_bytes(path) == content
  assert storage.read_bytes(path, start=3, stop=9) == content[3:9]
  assert storage.read_bytes(path, start=-5) == content[-5:]
  assert storage.read_bytes(path, start=len(content)) == b""
  assert storage.exists(path) and storage.exists(f"{bucket}/oct")
  assert not storage.exists(f"{bucket}/oct/c.dcm")
  assert storage.list_files(f"{bucket}/oct", ".dcm") == [path]
  entry = storage.list_entries(f"{bucket}/oct")[0]
  assert entry == storage.stat(path) and entry.size == len(content) and entry.md5
  assert refuse(storage.read_bytes, f"{bucket}/c.dcm").reason == "missing_file"
  assert refuse(storage.list_files, f"{bucket}/none").reason == "missing_file"
  assert storage.stamp(f"{bucket}/c.dcm") == ""
  storage.delete(f"{bucket}/oct/b.txt")
  assert refuse(storage.delete, f"{bucket}/oct/b.txt").reason == "missing_file"
  storage.write_bytes(f"{bucket}/empty", b"")
  assert storage.read_bytes(f"{bucket}/empty") == b""


def test_a_tree_is_deleted_and_its_neighbours_stay(bucket):
  for name in ("run/1", "run/a/2", "run2/keep", "other"):
    storage.write_bytes(f"{bucket}/{name}", b"x")
  storage.delete_tree(f"{bucket}/run")
  storage.delete_tree(f"{bucket}/run")
  left = [f"{bucket}/other", f"{bucket}/run2/keep"]
  assert storage.list_files(str(bucket)) == left
  with pytest.raises(ValueError, match="whole bucket"):
    storage.delete_tree(str(bucket))


def test_a_listing_of_more_than_a_page_is_whole(bucket):
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(
        lambda i: storage.write_bytes(f"{bucket}/many/{i:04}", b"x"), range(1003)
    ))
  bucket.forget_requests()
  entries = storage.list_entries(f"{bucket}/many")
  assert [e.path[-4:] for e in entries] == [f"{i:04}" for i in range(1003)]
  assert len(bucket.requests()) == 2


def test_a_read_costs_one_request(bucket):
  storage.write_bytes(f"{bucket}/oct/a.dcm", b"x" * (5 << 20))
  storage.write_bytes(f"{bucket}/oct/IM0001", b"x")

  def cost(call, *args, **kwargs):
    bucket.forget_requests()
    call(*args, **kwargs)
    return len(bucket.requests())

  entry = storage.stat(f"{bucket}/oct/a.dcm")
  assert cost(storage.read_bytes, entry.path) == 1
  bounds = {"expect": entry.stamp, "max_bytes": 6 << 20}
  assert cost(storage.read_bytes, entry.path, **bounds) == 1
  assert cost(storage.write_bytes, f"{bucket}/oct/b.dcm", b"x") == 1
  assert cost(storage.stat, entry.path) == 1
  assert cost(storage.exists, entry.path) == 1
  assert cost(storage.list_entries, f"{bucket}/oct") == 1
  assert cost(storage.is_folder, entry.path) == 0
  assert cost(storage.is_folder, f"{bucket}/oct/IM0001") == 1


def test_a_folder_of_a_bucket_is_known_by_what_lies_below(bucket):
  for name in ("series/IM0001", "a.zarr/zarr.json", "odd.name/1", "1.2.840/1.2.1"):
    storage.write_bytes(f"{bucket}/{name}", b"x")
  folders = ("series", "series/", "a.zarr", "odd.name/", "1.2.840")
  assert all(storage.is_folder(f"{bucket}/{name}") for name in folders)
  files = ("series/IM0001", "serie", "a.dcm", "1.2.840/1.2.1", "none/")
  assert not any(storage.is_folder(f"{bucket}/{name}") for name in files)


@pytest.mark.parametrize("status, reason", [(401, "forbidden"), (403, "forbidden"),
                                            (404, "missing_file")])
def test_what_is_refused_for_good_is_asked_once(bucket, status, reason):
  storage.write_bytes(f"{bucket}/a.dcm", b"x")
  bucket.fault(str(status))
  bucket.forget_requests()
  for call in (storage.read_bytes, storage.stat, storage.open_read, storage.delete):
    assert refuse(call, f"{bucket}/a.dcm").reason == reason
  assert len(bucket.requests()) == 4 and storage.counters() == {}


@pytest.mark.parametrize("kind, counted", [
    ("429", "429"), ("500", "500"), ("503", "503"), ("408", "408"),
    ("reset", "reset"), ("dropped", "reset"), ("truncate", "short body"),
    ("short", "short body"), ("corrupt", "bad checksum"),
])
def test_a_fault_of_the_way_is_mended_and_counted(bucket, kind, counted):
  content = os.urandom(200_000)
  storage.write_bytes(f"{bucket}/a.dcm", content)
  bucket.fault(kind, times=2)
  assert storage.read_bytes(f"{bucket}/a.dcm") == content
  assert storage.counters() == {f"retried {counted}": 2}


def test_a_write_is_mended_whether_or_not_it_was_carried_out(bucket):
  for kind in ("503", "reset", "dropped"):
    bucket.fault(kind, times=1)
    storage.write_bytes(f"{bucket}/{kind}", kind.encode() * 1000)
    assert storage.read_bytes(f"{bucket}/{kind}") == kind.encode() * 1000
  bucket.fault("dropped", times=1, method="DELETE")
  storage.delete(f"{bucket}/503")
  assert not storage.exists(f"{bucket}/503")


def test_the_deadline_ends_the_tries_and_says_how_many(bucket, deadline):
  storage.write_bytes(f"{bucket}/a.dcm", b"x")
  bucket.fault("503")
  deadline(1.5)
  start = time.monotonic()
  error = refuse(storage.read_bytes, f"{bucket}/a.dcm")
  assert time.monotonic() - start < 6  # on a loaded machine; the default is minutes
  assert error.reason == "unreachable" and "tries in" in error.detail
  assert storage.counters()["gave up"] == 1


@pytest.mark.parametrize("kind, seconds", [("hang", 30), ("slow", 60)])
def test_a_server_that_hangs_or_drips_ends_by_the_deadline(
    bucket, deadline, kind, seconds
):
  storage.write_bytes(f"{bucket}/a.dcm", b"x" * 100_000)
  bucket.fault(kind, seconds=seconds, times=3)
  deadline(2.5)
  start = time.monotonic()
  error = refuse(storage.read_bytes, f"{bucket}/a.dcm")
  assert time.monotonic() - start < 10  # on a loaded machine; it hangs for longer
  assert error.reason == "unreachable" and "timeout" in error.detail


def test_a_slow_reader_within_the_deadline_is_waited_for(bucket, deadline):
  storage.write_bytes(f"{bucket}/a.dcm", b"x" * 100_000)
  bucket.fault("slow", seconds=1.2, times=1)
  deadline(10)
  assert storage.read_bytes(f"{bucket}/a.dcm") == b"x" * 100_000
  assert storage.counters() == {}


def test_an_address_where_nothing_listens_is_unreachable(monkeypatch, deadline):
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
  deadline(0.8)
  error = refuse(storage.read_bytes, "gs://bucket/a.dcm")
  assert error.reason == "unreachable" and "no connection" in error.detail


def test_a_file_replaced_between_listing_and_reading_is_told(
    bucket, tmp_path, monkeypatch
):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  path = f"{bucket}/oct/a.dcm"
  storage.write_bytes(path, b"first" * 100)
  listed = storage.list_entries(f"{bucket}/oct")[0]
  assert storage.read_bytes(path, expect=listed.stamp) == b"first" * 100
  storage.write_bytes(path, b"other" * 100)
  for call in (storage.read_bytes, storage.open_read, storage.local_copy):
    error = refuse(call, path, expect=listed.stamp)
    assert error.reason == "changed" and listed.stamp in error.detail


def test_an_object_too_large_is_refused_before_its_body_comes(bucket, deadline):
  storage.write_bytes(f"{bucket}/a.dcm", b"x" * (1 << 20))
  bucket.fault("slow", seconds=30)
  deadline(20)
  start = time.monotonic()
  error = refuse(storage.read_bytes, f"{bucket}/a.dcm", max_bytes=1000)
  assert error.reason == "too_large" and time.monotonic() - start < 5


def test_a_gzip_encoded_object_is_read_unpacked_and_bounded(bucket):
  content = b"participant_id\tfilepath\n" * 9000
  put(bucket, "m.tsv", gzip.compress(content), {"contentEncoding": "gzip"})
  put(bucket, "cut.tsv", gzip.compress(content)[:-20], {"contentEncoding": "gzip"})
  assert storage.read_bytes(f"{bucket}/m.tsv") == content
  bomb = refuse(storage.read_bytes, f"{bucket}/m.tsv", max_bytes=len(content) - 1)
  assert bomb.reason == "too_large"
  assert refuse(storage.read_bytes, f"{bucket}/cut.tsv").reason == "truncated"


def put(bucket, name, data, about):
  """Uploads as another program would, with metadata of its own."""
  body = (
      b"--m\r\nContent-Type: application/json\r\n\r\n"
      + json.dumps({"name": name} | about).encode()
      + b"\r\n--m\r\nContent-Type: text/plain\r\n\r\n" + data + b"\r\n--m--\r\n"
  )
  host = bucket.emulator.host
  place = f"{host}/upload/storage/v1/b/{bucket.url[5:]}/o?uploadType=multipart"
  urllib.request.urlopen(urllib.request.Request(
      place, body, {"Content-Type": "multipart/related; boundary=m"}
  )).close()


def test_a_large_file_is_sent_and_fetched_by_pieces_through_faults(bucket, tmp_path):
  local, back = tmp_path / "big.bin", tmp_path / "back.bin"
  content = os.urandom(36 << 20)
  local.write_bytes(content)
  bucket.fault("503", method="PUT", times=1)
  bucket.fault("dropped", method="PUT", times=2)
  storage.upload(str(local), f"{bucket}/big.bin")
  assert storage.stat(f"{bucket}/big.bin").size == len(content)
  bucket.fault("truncate", method="GET", times=2)
  bucket.fault("corrupt", method="GET", name="big.bin?alt", times=1)
  storage.download(f"{bucket}/big.bin", str(back))
  assert back.read_bytes() == content
  assert sum(storage.counters().values()) == 6
  assert sorted(os.listdir(tmp_path)) == ["back.bin", "big.bin"]


def test_a_file_opened_for_reading_seeks_by_large_blocks(bucket):
  content = os.urandom(10 << 20)
  storage.write_bytes(f"{bucket}/a.bin", content)
  bucket.forget_requests()
  with storage.open_read(f"{bucket}/a.bin") as file:
    assert file.seek(-100, 2) == len(content) - 100
    assert file.read() == content[-100:]
    for at in range(0, 1 << 20, 1 << 14):
      file.seek(at)
      assert file.read(64) == content[at : at + 64]
    file.seek(0)
    assert file.read() == content
    assert file.read(1) == b""
  assert len(bucket.requests()) == 1 + 3
  with storage.open_read(f"{bucket}/a.bin") as file:
    file.read(10)
    storage.write_bytes(f"{bucket}/a.bin", content[::-1])
    file.seek(9 << 20)
    assert refuse(file.read, 10).reason == "changed"


def read_in_worker(path):
  return storage.read_bytes(path)[:4], os.getpid(), storage.counters()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_whatever_way_they_are_started(bucket, method):
  storage.write_bytes(f"{bucket}/a.bin", b"data" * 100_000)
  # The parent has a client, a loop and open connections that a child must not use.
  assert storage.read_bytes(f"{bucket}/a.bin")[:4] == b"data"
  context = multiprocessing.get_context(method)
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    found = list(pool.map(read_in_worker, [f"{bucket}/a.bin"] * 8))
  assert {f[0] for f in found} == {b"data"}
  assert os.getpid() not in {f[1] for f in found}
  assert storage.read_bytes(f"{bucket}/a.bin")[:4] == b"data"


GRAIN = """
import sys
from absl import app
import grain.python as grain
from vjepa_jax.data import storage

class Objects:
  def __len__(self): return 24
  def __getitem__(self, i): return storage.read_bytes(f"{sys.argv[1]}/{i}")

def main(_):
  # A client of the parent's, open when the workers start.
  assert storage.read_bytes(f"{sys.argv[1]}/0") == b"0" * 50_000
  options = grain.MultiprocessingOptions(num_workers=2)
  rows = grain.MapDataset.source(Objects()).to_iter_dataset().mp_prefetch(options)
  assert sorted(rows) == sorted(str(i).encode() * 50_000 for i in range(24))
  print("whole", sum(storage.counters().values()))

if __name__ == "__main__":
  app.run(main)
"""


@pytest.mark.slow
def test_grain_workers_read_from_the_bucket_through_faults(bucket, tmp_path):
  for number in range(24):
    storage.write_bytes(f"{bucket}/{number}", str(number).encode() * 50_000)
  bucket.fault("503", share=0.1, seed=1)
  (tmp_path / "main.py").write_text(GRAIN)
  ran = subprocess.run(
      [sys.executable, str(tmp_path / "main.py"), str(bucket)], capture_output=True,
      text=True, cwd=ROOT, timeout=240, env=os.environ | {
          "PYTHONPATH": str(ROOT), "VJEPA_JAX_STORAGE_COUNTS": str(tmp_path),
      },
  )
  assert ran.returncode == 0, ran.stderr[-2000:]
  assert ran.stdout.split()[0] == "whole" and int(ran.stdout.split()[1]) > 0


def test_the_counts_of_worker_processes_are_summed(bucket, tmp_path, monkeypatch):
  monkeypatch.setenv("VJEPA_JAX_STORAGE_COUNTS", "")
  storage.configure(counts_folder=str(tmp_path / "counts"))
  storage.write_bytes(f"{bucket}/a.bin", b"data")
  storage.reset_counters()
  bucket.fault("503", times=3)
  context = multiprocessing.get_context("fork")
  with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
    list(pool.map(read_in_worker, [f"{bucket}/a.bin"] * 4))
  assert storage.counters() == {"retried 503": 3}
  storage.reset_counters()
  assert storage.counters() == {}


def test_an_object_read_by_several_threads_is_whole_in_each(bucket):
  storage.write_bytes(f"{bucket}/a.bin", b"0123456789" * 5000)
  bucket.fault("503", share=0.2, seed=3)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(storage.read_bytes, [f"{bucket}/a.bin"] * 40))
  assert found == [b"0123456789" * 5000] * 40
  assert storage.counters()["retried 503"] > 0


def test_options_reach_worker_processes_by_the_environment(monkeypatch):
  for name in ("FILE_CACHE", "FILE_CACHE_BYTES", "STORAGE_DEADLINE_S", "ANONYMOUS"):
    monkeypatch.setenv(f"VJEPA_JAX_{name}", "")
  storage.configure(cache="/x", cache_bytes=5, deadline_s=2.5, anonymous=True)
  assert os.environ["VJEPA_JAX_FILE_CACHE"] == "/x"
  assert os.environ["VJEPA_JAX_FILE_CACHE_BYTES"] == "5"
  assert os.environ["VJEPA_JAX_STORAGE_DEADLINE_S"] == "2.5"
  assert os.environ["VJEPA_JAX_ANONYMOUS"] == "1"
  storage.configure(cache=None, anonymous=False)
  assert "VJEPA_JAX_FILE_CACHE" not in os.environ
  assert os.environ["VJEPA_JAX_FILE_CACHE_BYTES"] == "5"


def test_array_records_own_reader_reads_from_the_bucket(bucket, tmp_path):
  rows = [os.urandom(50_000 + i) for i in range(12)]
  local = str(tmp_path / "x.array_record")
  writer = array_record_module.ArrayRecordWriter(local, "group_size:1,uncompressed")
  for row in rows:
    writer.write(row)
  writer.close()
  storage.upload(local, f"{bucket}/x.array_record")
  reader = array_record_module.ArrayRecordReader(f"{bucket}/x.array_record")
  assert reader.num_records() == 12
  assert reader.read([7, 2]) == [rows[7], rows[2]]
  reader.close()
  assert any("bytes=-" in line for line in bucket.requests())


@pytest.mark.parametrize("name", ["a\0b.dcm", "x" * 300, "loop"])
def test_a_name_that_no_file_can_have_is_a_missing_file(tmp_path, name):
  (tmp_path / "loop").symlink_to(tmp_path / "loop")
  with pytest.raises(ReadError) as caught:
    storage.read_bytes(f"{tmp_path}/{name}")
  assert caught.value.reason == "missing_file"


def test_what_is_out_of_reach_is_told_from_its_causes():
  def wrapped(path, reason):
    try:
      try:
        raise ReadError(path, reason)
      except ReadError as error:
        raise ValueError("outer") from error
    except ValueError as error:
      return error

  assert storage.is_out_of_reach(wrapped("gs://b/x", "unreachable"))
  assert not storage.is_out_of_reach(wrapped("gs://b/x", "forbidden"))
  assert not storage.is_out_of_reach(wrapped("/disk/x", "unreachable"))
  assert not storage.is_out_of_reach(None)
