"""The files of a run reach its bucket, whatever the bucket does meanwhile."""

import tempfile
import threading
import time

from etils.epath import backend
import gcsfs
import pytest

from tests.data import bucket as buckets
from vjepa_jax.train import metrics, workdir


@pytest.fixture(scope="module")
def emulator():
  with buckets.start() as running:
    yield running


@pytest.fixture
def bucket(emulator, monkeypatch, tmp_path):
  """An empty bucket; what clients remember of another emulator is forgotten."""
  for name, value in emulator.env.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  forget = backend._FileSystemSpecBackend._get_filesystem.cache_clear
  forget()
  gcsfs.GCSFileSystem.clear_instance_cache()
  yield buckets.Bucket(emulator.make_bucket(), emulator)
  emulator.clear_faults()
  forget()
  gcsfs.GCSFileSystem.clear_instance_cache()


def content(bucket, name):
  found = workdir.read_bytes(f"{bucket}/{name}")
  return None if found is None else found.decode()


def written_requests(bucket, name):
  return [r for r in bucket.requests() if r.startswith("POST") and name in r]


def wait_until(claim, seconds=20.0):
  deadline = time.monotonic() + seconds
  while not claim():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def test_a_local_workdir_is_written_directly(tmp_path):
  files = workdir.Files(tmp_path / "run")
  assert files.folder == tmp_path / "run" and files.folder.is_dir()
  files.check()
  files.flush()
  files.close()
  assert files.folder.is_dir()


def test_what_is_written_reaches_the_bucket_and_what_has_not_changed_stays(bucket):
  files = workdir.Files(f"{bucket}/run")
  (files.folder / "figures").mkdir()
  (files.folder / "figures" / "a.png").write_bytes(b"png")
  (files.folder / "metrics.jsonl").write_text("1\n")
  files.flush()
  assert content(bucket, "run/figures/a.png") == "png"
  with (files.folder / "metrics.jsonl").open("a") as file:
    file.write("2\n")
  files.close()
  assert content(bucket, "run/metrics.jsonl") == "1\n2\n"
  assert not files.folder.exists()
  count = len(written_requests(bucket, "a.png"))
  assert len(written_requests(bucket, "metrics.jsonl")) == 2 * count


def test_a_file_that_grows_is_copied_without_being_asked(bucket):
  files = workdir.Files(str(bucket), pause_s=0.05)
  for number in range(3):
    (files.folder / "log").write_text(str(number))
    wait_until(lambda: content(bucket, "log") == str(number))  # noqa: B023
  files.close()


def test_copies_are_spaced_so_that_a_long_log_is_not_written_all_the_time(bucket):
  files = workdir.Files(str(bucket), pause_s=0.3)
  begin = time.monotonic()
  while time.monotonic() - begin < 2.0:
    with (files.folder / "log").open("a") as file:
      file.write("line\n")
    time.sleep(0.005)
  copies = len(written_requests(bucket, "log"))
  files.close()
  # A copy is an opening and a closing request.
  assert 1 <= copies <= 2 * 7


def test_halves_and_the_folder_of_wandb_stay_where_they_are(bucket):
  files = workdir.Files(str(bucket))
  for name in ("wandb/run.log", "a.json.partial", "metrics.jsonl.tmp", "kept"):
    path = files.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
  files.close()
  assert content(bucket, "kept") == "x"
  for name in ("wandb/run.log", "a.json.partial", "metrics.jsonl.tmp"):
    assert content(bucket, name) is None


def test_a_run_goes_on_with_the_lines_up_to_its_checkpoint(bucket):
  lines = "".join(f'{{"step": {n}, "loss": 1.0}}\n' for n in range(5))
  workdir.write_bytes(f"{bucket}/run/metrics.jsonl", lines.encode())
  files = workdir.Files(f"{bucket}/run", fetch=("metrics.jsonl", "wandb_id.txt"))
  metrics.Writer(files.folder, restored_step=2, tensorboard=False)
  files.close()
  assert [line["step"] for line in metrics.read(f"{bucket}/run")] == [0, 1, 2]


def test_what_was_fetched_and_not_changed_is_not_written_back(bucket):
  workdir.write_bytes(f"{bucket}/run/metrics.jsonl", b"old\n")
  other = workdir.Files(f"{bucket}/run", fetch=("metrics.jsonl",))
  workdir.write_bytes(f"{bucket}/run/metrics.jsonl", b"old\nnew\n")
  other.close()
  assert content(bucket, "run/metrics.jsonl") == "old\nnew\n"


def test_a_bucket_that_comes_back_loses_nothing_and_stops_nobody(bucket):
  said = []
  files = workdir.Files(str(bucket), say=said.append, pause_s=0.05)
  bucket.fault("503", times=3)
  longest = 0.0
  for number in range(200):
    begin = time.monotonic()
    (files.folder / "log").write_text(str(number))
    files.check()
    longest = max(longest, time.monotonic() - begin)
    time.sleep(0.005)
  assert longest < 0.5
  files.close()
  assert content(bucket, "log") == "199"


def test_trouble_is_told_once_and_its_end_too(bucket):
  said = []
  files = workdir.Files(str(bucket), say=said.append, pause_s=0.05)
  bucket.fault("505", times=2)  # a status that the client does not try again itself
  (files.folder / "log").write_text("x")
  files.flush()
  assert content(bucket, "log") == "x"
  files.close()
  assert "505" in said[0] and "training goes on" in said[0]
  assert "written again after" in said[1] and len(said) == 2


def test_a_lost_bucket_is_an_error_after_the_deadline(bucket, monkeypatch):
  monkeypatch.setenv("VJEPA_JAX_STORAGE_DEADLINE_S", "1.5")
  files = workdir.Files(str(bucket), say=lambda text: None, pause_s=0.05)
  bucket.fault("503")
  (files.folder / "log").write_text("x")
  files.check()
  begin = time.monotonic()
  with pytest.raises(workdir.WorkdirError, match="out of reach for .* the same command"):
    files.flush()
  assert time.monotonic() - begin < 6
  with pytest.raises(workdir.WorkdirError):
    files.check()
  begin = time.monotonic()
  files.close()  # known to be lost: no second wait
  assert time.monotonic() - begin < 1


def test_a_refusal_is_an_error_at_once(bucket):
  files = workdir.Files(str(bucket), say=lambda text: None, pause_s=0.05)
  bucket.fault("403")
  (files.folder / "log").write_text("x")
  begin = time.monotonic()
  with pytest.raises(workdir.WorkdirError, match="Forbidden"):
    files.flush()
  assert time.monotonic() - begin < 5
  with pytest.raises(workdir.WorkdirError, match="no-such-bucket"):
    workdir.write_bytes("gs://no-such-bucket/x", b"")


def test_waiting_for_a_lost_bucket_ends(bucket, monkeypatch):
  monkeypatch.setenv("VJEPA_JAX_STORAGE_DEADLINE_S", "0.5")
  monkeypatch.setattr(workdir, "_PAUSE_S", 0.2)
  assert workdir.watched(lambda: 7, str(bucket)) == 7
  with pytest.raises(KeyError):
    workdir.watched(lambda: {}["absent"], str(bucket))
  bucket.fault("403")  # unlike 503, not tried again by the client itself
  never = threading.Event()
  with pytest.raises(workdir.WorkdirError, match="out of reach"):
    workdir.watched(never.wait, str(bucket))
  never.set()


def test_work_may_last_while_the_bucket_lives(bucket, monkeypatch):
  monkeypatch.setenv("VJEPA_JAX_STORAGE_DEADLINE_S", "0.3")
  monkeypatch.setattr(workdir, "_PAUSE_S", 0.1)
  assert workdir.watched(lambda: time.sleep(1.0) or "done", str(bucket)) == "done"
