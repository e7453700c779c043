"""Claims of data/storage.py, on a disk and on a bucket emulator."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from vjepa_jax.data import storage
from vjepa_jax.data.record import ReadError


def test_a_leading_slash_of_a_path_joins_onto_the_root():
  assert storage.join("/data", "/oct/a.dcm") == "/data/oct/a.dcm"
  assert storage.join("gs://b/root/", "/oct/a.dcm") == "gs://b/root/oct/a.dcm"
  assert storage.join("/data", "gs://b/a.dcm") == "gs://b/a.dcm"


def test_the_parent_of_a_bucket_path_is_a_bucket_path():
  assert storage.parent("gs://b/root/manifest.tsv") == "gs://b/root"
  assert storage.parent("manifest.tsv") == "."


def test_what_cannot_be_read_has_a_reason(tmp_path):
  with pytest.raises(ReadError) as missing:
    storage.read_bytes(str(tmp_path / "absent.dcm"))
  assert missing.value.reason == "missing_file"
  with pytest.raises(ReadError) as folder:
    storage.read_bytes(str(tmp_path))
  assert folder.value.reason == "missing_file" and "folder" in folder.value.detail


def test_files_are_listed_in_order_with_their_suffix(tmp_path):
  for name in ("b/2.dcm", "a/1.dcm", "a/notes.txt"):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
  found = storage.list_files(str(tmp_path), ".dcm")
  assert [os.path.relpath(f, tmp_path) for f in found] == ["a/1.dcm", "b/2.dcm"]


def test_a_write_leaves_no_half_file_behind(tmp_path):
  path = str(tmp_path / "x.tsv")
  storage.write_bytes(path, b"old")
  storage.write_bytes(path, b"new")
  assert storage.read_bytes(path) == b"new"
  assert os.listdir(tmp_path) == ["x.tsv"]


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


@pytest.fixture
def bucket(monkeypatch):
  """A bucket emulator on loopback; yields the name of an empty bucket."""
  from gcp_storage_emulator.server import create_server

  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  server = create_server("127.0.0.1", port, in_memory=True, default_bucket="scans")
  server.start()
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
  yield "gs://scans"
  server.stop()


def test_objects_of_a_bucket_are_read_written_listed_and_missed(bucket):
  content = bytes(range(256)) * 400
  storage.write_bytes(f"{bucket}/oct/a.dcm", content)
  storage.write_bytes(f"{bucket}/oct/b.txt", b"b")
  assert storage.read_bytes(f"{bucket}/oct/a.dcm") == content
  assert storage.exists(f"{bucket}/oct/a.dcm")
  assert not storage.exists(f"{bucket}/oct/c.dcm")
  assert storage.list_files(f"{bucket}/oct", ".dcm") == [f"{bucket}/oct/a.dcm"]
  with pytest.raises(ReadError) as missing:
    storage.read_bytes(f"{bucket}/oct/c.dcm")
  assert missing.value.reason == "missing_file"


def test_an_object_read_by_several_threads_is_whole_in_each(bucket):
  storage.write_bytes(f"{bucket}/a.bin", b"0123456789" * 5000)
  found = []
  read = lambda: found.append(storage.read_bytes(f"{bucket}/a.bin"))  # noqa: E731
  threads = [threading.Thread(target=read) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == [b"0123456789" * 5000] * 4
