"""Claims of data/file_cache.py, with real processes and a real bucket emulator."""

import concurrent.futures
import fcntl
import multiprocessing
import os
import pathlib
import random
import signal
import time

import pytest

from vjepa_jax.data import file_cache, storage
from vjepa_jax.data.record import ReadError

OBJECT_BYTES = 40_000
OBJECTS = 30


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """Configures a cache; returns (folder, set its bound)."""
  folder = tmp_path / "cache"
  monkeypatch.setenv("VJEPA_JAX_FILE_CACHE", str(folder))
  monkeypatch.setenv("VJEPA_JAX_FILE_CACHE_BYTES", str(1 << 30))
  storage.reset_counters()
  return folder


def held(folder) -> list[pathlib.Path]:
  return sorted(
      f for f in folder.rglob("*") if f.is_file() and f.parent.name != "locks"
      and f.name not in ("lock", "total")
  )


def test_what_was_read_is_not_sent_again(bucket, cache):
  path = f"{bucket}/oct/a.dcm"
  storage.write_bytes(path, b"voxels" * 1000)
  listed = storage.stat(path).stamp
  assert storage.read_bytes(path) == b"voxels" * 1000
  bucket.forget_requests()
  assert storage.read_bytes(path, expect=listed) == b"voxels" * 1000
  assert bucket.requests() == []
  assert storage.read_bytes(path) == b"voxels" * 1000
  assert [line.rpartition(" ")[2] for line in bucket.requests()] == ["304"]
  assert storage.read_bytes(path, start=1, stop=3) == b"ox"


def test_a_replaced_object_is_never_read_from_the_cache(bucket, cache):
  path = f"{bucket}/a.dcm"
  storage.write_bytes(path, b"first")
  listed = storage.stat(path).stamp
  assert storage.read_bytes(path) == b"first"
  storage.write_bytes(path, b"other")
  assert storage.read_bytes(path) == b"other"
  with pytest.raises(ReadError) as caught:
    storage.read_bytes(path, expect=listed)
  assert caught.value.reason == "changed"
  assert len(held(cache)) == 1
  storage.delete(path)
  with pytest.raises(ReadError) as caught:
    storage.read_bytes(path)
  assert caught.value.reason == "missing_file"


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_a_damaged_file_is_seen_and_fetched_again(bucket, cache, damage):
  path = f"{bucket}/a.dcm"
  content = os.urandom(5000)
  storage.write_bytes(path, content)
  listed = storage.stat(path).stamp
  for read in (storage.read_bytes, lambda *a, **k: _file(storage.local_copy(*a, **k))):
    storage.reset_counters()
    assert read(path, expect=listed) == content
    file = held(cache)[0]
    file.write_bytes({
        "torn": content[:3000], "empty": b"",
        "flipped": content[:9] + bytes([content[9] ^ 1]) + content[10:],
    }[damage])
    assert read(path, expect=listed) == content
    assert storage.counters() == {"cache file damaged": 1}


def _file(path):
  return pathlib.Path(path).read_bytes()


def test_the_least_recently_used_goes_first_and_the_bound_holds(
    bucket, cache, monkeypatch
):
  monkeypatch.setenv("VJEPA_JAX_FILE_CACHE_BYTES", "10000")
  for number in range(12):
    storage.write_bytes(f"{bucket}/{number}.dcm", os.urandom(2000))
    storage.read_bytes(f"{bucket}/{number}.dcm")
    storage.read_bytes(f"{bucket}/0.dcm")
    assert sum(f.stat().st_size for f in held(cache)) <= 10000
    time.sleep(0.01)
  sent = [r for r in bucket.requests() if "/0.dcm?alt" in r and r.endswith("200")]
  assert len(sent) == 1
  kept = {f.name.rpartition("-")[2] for f in held(cache)}
  assert "0.dcm" in kept and "11.dcm" in kept and "1.dcm" not in kept
  storage.write_bytes(f"{bucket}/large.dcm", os.urandom(20000))
  assert len(storage.read_bytes(f"{bucket}/large.dcm")) == 20000
  assert "large.dcm" not in {f.name.rpartition("-")[2] for f in held(cache)}
  with pytest.raises(ReadError) as caught:
    storage.local_copy(f"{bucket}/large.dcm")
  assert caught.value.reason == "too_large"


def test_a_copy_keeps_its_ending_and_stays_while_it_is_held(bucket, cache, monkeypatch):
  monkeypatch.setenv("VJEPA_JAX_FILE_CACHE_BYTES", "10000")
  storage.write_bytes(f"{bucket}/a scan.nii.gz", b"x" * 4000)
  copy = storage.local_copy(f"{bucket}/a scan.nii.gz")
  assert copy.endswith("a_scan.nii.gz") and _file(copy) == b"x" * 4000
  assert storage.local_copy(f"{bucket}/a scan.nii.gz") == copy
  for number in range(10):
    storage.write_bytes(f"{bucket}/{number}", os.urandom(3000))
    storage.read_bytes(f"{bucket}/{number}")
  assert _file(copy) == b"x" * 4000
  assert storage.local_copy(copy) == copy


def test_a_content_above_the_callers_bound_is_refused_from_the_cache_too(bucket, cache):
  storage.write_bytes(f"{bucket}/a.dcm", b"x" * 100)
  storage.read_bytes(f"{bucket}/a.dcm")
  with pytest.raises(ReadError) as caught:
    storage.read_bytes(f"{bucket}/a.dcm", max_bytes=99)
  assert caught.value.reason == "too_large"


def test_a_disk_that_takes_nothing_costs_no_content(bucket, cache):
  storage.write_bytes(f"{bucket}/a.dcm", b"x" * 100)
  storage.read_bytes(f"{bucket}/a.dcm")
  storage.write_bytes(f"{bucket}/a.dcm", b"y" * 100)
  # A file where the cache wants its lock: no insertion can succeed.
  (cache / "lock").unlink()
  (cache / "lock").mkdir()
  assert storage.read_bytes(f"{bucket}/a.dcm") == b"y" * 100
  assert storage.counters() == {"cache not written": 1}


def test_parts_of_killed_processes_are_cleared(bucket, cache, monkeypatch):
  monkeypatch.setenv("VJEPA_JAX_FILE_CACHE_BYTES", "3000")
  storage.write_bytes(f"{bucket}/a", b"x" * 2000)
  storage.write_bytes(f"{bucket}/b", b"x" * 2000)
  storage.read_bytes(f"{bucket}/a")
  for name, age in (("dead.part", 1000), ("young.part", 0)):
    (cache / name).write_bytes(b"half")
    os.utime(cache / name, (time.time() - age,) * 2)
  storage.read_bytes(f"{bucket}/b")
  assert sorted(f.name for f in cache.glob("*.part")) == ["young.part"]


def read_one(path):
  return storage.read_bytes(path)


def test_eight_processes_that_want_one_object_fetch_it_once(bucket, cache):
  path = f"{bucket}/a.dcm"
  content = os.urandom(100_000)
  storage.write_bytes(path, content)
  bucket.fault("slow", seconds=0.5)
  bucket.forget_requests()
  context = multiprocessing.get_context("fork")
  with concurrent.futures.ProcessPoolExecutor(8, mp_context=context) as pool:
    assert list(pool.map(read_one, [path] * 8)) == [content] * 8
  assert len([line for line in bucket.requests() if "ifGen" not in line]) == 1


def content_of(number: int, version: int) -> bytes:
  block = random.Random(f"{number} {version}").randbytes(997)
  size = OBJECT_BYTES + 50 * number
  return version.to_bytes(4, "big") + (block * (size // 997 + 1))[:size]


def hammer(url: str, versions, seed: int, done, wrong) -> None:
  rng = random.Random(seed)
  while True:
    number = rng.randrange(OBJECTS)
    least = versions[number]
    path = f"{url}/{number}.dcm"
    if rng.random() < 0.7:
      data = storage.read_bytes(path)
    else:
      data = _file(storage.local_copy(path))
    version = int.from_bytes(data[:4], "big")
    if version < least or data != content_of(number, version):
      wrong.value += 1
    with done.get_lock():
      done.value += 1


def measure(folder: pathlib.Path) -> int:
  """Returns the bytes of all cached files at one instant."""
  with open(folder / "lock", "ab") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    return file_cache.FileCache(str(folder), 0).size()


@pytest.mark.parametrize("workers", [2, 8])
def test_processes_killed_at_random_never_leave_a_wrong_file(
    bucket, cache, monkeypatch, workers
):
  bound = 12 * OBJECT_BYTES
  monkeypatch.setattr(file_cache, "_LEASES", 1)
  monkeypatch.setenv("VJEPA_JAX_FILE_CACHE_BYTES", str(bound))
  context = multiprocessing.get_context("fork")
  versions = context.Array("i", OBJECTS, lock=False)
  done, wrong = context.Value("i"), context.Value("i")
  for number in range(OBJECTS):
    storage.write_bytes(f"{bucket}/{number}.dcm", content_of(number, 0))
  bucket.fault("503", share=0.02, method="GET", seed=1)
  rng = random.Random(0)

  def launch(seed):
    process = context.Process(
        target=hammer, args=(bucket.url, versions, seed, done, wrong), daemon=True
    )
    process.start()
    return process

  running = [launch(i) for i in range(workers)]
  kills, largest = 0, 0
  end = time.monotonic() + 4
  while time.monotonic() < end or kills <= 10:  # A loaded machine is slow to kill.
    time.sleep(rng.uniform(0.02, 0.15))
    victim = rng.randrange(workers)
    assert running[victim].exitcode is None
    os.kill(running[victim].pid, signal.SIGKILL)
    running[victim].join()
    kills += 1
    running[victim] = launch(1000 + kills)
    number = rng.randrange(OBJECTS)
    storage.write_bytes(
        f"{bucket}/{number}.dcm", content_of(number, versions[number] + 1)
    )
    versions[number] += 1
    largest = max(largest, measure(cache))
  for process in running:
    process.kill()
    process.join()
  assert wrong.value == 0
  assert done.value > 100 and kills > 10
  assert bound / 2 < largest <= bound + workers * (OBJECT_BYTES + 50 * OBJECTS)
  # What is left serves a new process at once.
  assert storage.read_bytes(f"{bucket}/0.dcm") == content_of(0, versions[0])
