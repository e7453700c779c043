"""The real command with its data and its workdir in a bucket that misbehaves."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
from urllib.parse import quote
import urllib.request

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.data import bucket as buckets
from vjepa_jax.config import units
from vjepa_jax.data import phantoms
from vjepa_jax.train import metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


class Store:
  """What a test does with the emulator, by plain HTTP: none of the code it tests."""

  def __init__(self, emulator):
    self.emulator = emulator

  def put(self, bucket, name, content):
    address = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(name, '')}"
    self._ask(address, content, "POST")

  def get(self, bucket, name):
    return self._ask(f"/storage/v1/b/{bucket}/o/{quote(name, '')}?alt=media")

  def names(self, bucket, prefix):
    found, token = [], ""
    while True:
      page = json.loads(self._ask(
          f"/storage/v1/b/{bucket}/o?prefix={quote(prefix, '')}&pageToken={token}"
      ))
      found += [item["name"] for item in page.get("items", [])]
      token = quote(page.get("nextPageToken", ""), "")
      if not token:
        return found

  def copy(self, bucket, prefix, folder):
    """Copies all below a prefix into a local folder."""
    for name in self.names(bucket, prefix + "/"):
      path = folder / name.removeprefix(prefix + "/")
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(self.get(bucket, name))
    return folder

  def _ask(self, address, content=None, method="GET"):
    request = urllib.request.Request(
        self.emulator.host + address, data=content, method=method
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
      return answer.read()


@pytest.fixture(scope="module")
def store():
  with buckets.start() as emulator:
    yield Store(emulator)


@pytest.fixture(scope="module")
def environment(store, programs, tmp_path_factory):
  return {
      **os.environ, **store.emulator.env, "JAX_PLATFORMS": "cpu",
      # What a killed run leaves goes with the rest.
      "TMPDIR": str(tmp_path_factory.mktemp("left")), **programs,
  }


@pytest.fixture(scope="module")
def corpus(store, tmp_path_factory):
  """The tiny corpus, with its three broken files, here and in the bucket `scans`."""
  folder = tmp_path_factory.mktemp("corpus") / "oct"
  manifest = phantoms.write_oct_corpus(folder, **units.PHANTOMS["oct_tiny"])
  store.emulator.make_bucket("scans")
  for path in sorted(folder.rglob("*")):
    if path.is_file():
      store.put("scans", f"oct/{path.relative_to(folder)}", path.read_bytes())
  return manifest


@pytest.fixture(scope="module")
def local(environment, corpus, tmp_path_factory):
  """The run that all others must equal: files and workdir on the disk."""
  workdir = tmp_path_factory.mktemp("local")
  done = run(environment, workdir, f"--config.data.manifest={corpus}")
  assert done.returncode == 0, done.stdout + done.stderr
  return workdir


IN_BUCKET = "--config.data.manifest=gs://scans/oct/manifest.tsv"


def command(workdir, *overrides, module="main"):
  where = [f"--workdir={workdir}"] if workdir else []
  return [
      sys.executable, "-m", f"vjepa_jax.{module}",
      "--config=configs/oct_multi.py:tiny", *where, *overrides,
  ]


def run(environment, workdir, *overrides, **options):
  return subprocess.run(
      command(workdir, *overrides, **options), env=environment, cwd=ROOT,
      capture_output=True, text=True, timeout=600,
  )


@contextlib.contextmanager
def running(environment, workdir, *overrides):
  """Yields (process, lines that it has printed so far)."""
  process = subprocess.Popen(
      command(workdir, *overrides), env=environment, cwd=ROOT,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )
  printed = []
  reader = threading.Thread(target=lambda: printed.extend(process.stdout), daemon=True)
  reader.start()
  try:
    yield process, printed
  finally:
    process.kill()
    process.wait()
    reader.join()


def wait_for(process, printed, claim, seconds=300):
  deadline = time.monotonic() + seconds
  while not claim():
    assert process.poll() is None and time.monotonic() < deadline, "".join(printed)
    time.sleep(0.01)


def comparable(workdir):
  return [
      {k: v for k, v in line.items() if k not in metrics.TIMING_KEYS}
      for line in metrics.read(workdir)
  ]


def last_arrays(workdir):
  """(step, every array) of the last checkpoint, without the library's own tree."""
  step = max(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*"))
  tree = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")
  return step, [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same_run(one, other):
  assert comparable(one) == comparable(other)
  (step_a, arrays_a), (step_b, arrays_b) = last_arrays(one), last_arrays(other)
  assert step_a == step_b == 12 and len(arrays_a) == len(arrays_b) > 20
  for a, b in zip(arrays_a, arrays_b, strict=True):
    np.testing.assert_array_equal(a, b)


def test_data_and_workdir_in_a_bucket_change_no_number(
    environment, store, corpus, local, tmp_path
):
  del corpus
  bucket = store.emulator.make_bucket("plain")
  store.put("plain", "other/keep.bin", b"not ours")
  store.put("plain", "run2/keep.bin", b"a name that begins alike")
  traced = "--config.train.profile_from_step=3"
  done = run(environment, f"{bucket}/run", IN_BUCKET, traced)
  assert done.returncode == 0, done.stdout + done.stderr
  copy = store.copy("plain", "run", tmp_path)
  assert_same_run(local, copy)
  names = {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()}
  assert names >= {
      "config.json", "data_report.json", "quarantine.tsv", "metrics.jsonl",
      "report.json", "figures/curves.png", "figures/figures.masks_0000000.png",
  }
  assert any(name.startswith("events.") for name in names)
  assert any(name.startswith("profile/") for name in names)
  # Two are kept and the best; what was deleted left nothing, and nothing else went.
  steps = {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
  assert steps == {"8", "12", "best"}
  assert store.get("plain", "other/keep.bin") == b"not ours"
  assert store.get("plain", "run2/keep.bin") == b"a name that begins alike"
  assert_loads(environment, f"{bucket}/run")


def assert_loads(environment, workdir):
  """`vjepa_jax.load` gives the encoders of a run in a bucket."""
  code = (
      "import sys, vjepa_jax; run = vjepa_jax.load(sys.argv[1]);"
      "best = vjepa_jax.load(sys.argv[1], best=True);"
      "print(run.step, best.step, sorted(run.params))"
  )
  done = subprocess.run(
      [sys.executable, "-c", code, workdir], env=environment, cwd=ROOT,
      capture_output=True, text=True, timeout=300,
  )
  assert done.stdout.split() == ["12", "6", "['context',", "'target']"], done.stderr


def test_killed_in_a_bucket_at_a_random_step_it_goes_on_bit_for_bit(
    environment, store, corpus, local, tmp_path
):
  del corpus
  bucket = store.emulator.make_bucket("killed")
  fatal = random.SystemRandom().randint(5, 11)
  print(f"killed once step {fatal} was said")
  complete = "run/checkpoints/4/commit_success.txt"
  with running(environment, f"{bucket}/run", IN_BUCKET) as (process, printed):
    wait_for(process, printed, lambda: (
        any(line.startswith(f"step {fatal}/12") for line in printed)
        and complete in store.names("killed", complete)
    ))
    process.send_signal(signal.SIGKILL)
  done = run(environment, f"{bucket}/run", IN_BUCKET)
  assert done.returncode == 0, done.stdout + done.stderr
  assert "goes on from step" in done.stdout
  assert_same_run(local, store.copy("killed", "run", tmp_path))


def test_faults_of_the_bucket_cost_time_and_nothing_else(
    environment, store, corpus, local, tmp_path
):
  del corpus
  bucket = store.emulator.make_bucket("faulty")
  for seed, (kind, share) in enumerate(
      (("503", 0.02), ("reset", 0.01), ("truncate", 0.01), ("dropped", 0.01))
  ):
    for name in ("scans/", "faulty/"):
      store.emulator.fault(kind, share=share, name=name, seed=seed)
  store.emulator.forget_requests()
  done = run(environment, f"{bucket}/run", IN_BUCKET)
  requests = store.emulator.requests()
  store.emulator.clear_faults()
  assert done.returncode == 0, done.stdout + done.stderr
  copy = store.copy("faulty", "run", tmp_path)
  assert_same_run(local, copy)
  struck = [r for r in requests if r.rsplit(" ", 1)[1] in (
      "503", "reset", "truncate", "dropped"
  )]
  assert len(struck) > 0.03 * len(requests)
  report = json.loads((copy / "data_report.json").read_text())
  of_data = [r for r in struck if " scans/" in r]
  # Every struck reading was tried again, and is counted by its kind.
  assert sum(report["retries"].values()) >= len(of_data) > 0
  assert sum(report["quarantine"].values()) == 3
  named = [path for paths in report["quarantine_paths"].values() for path in paths]
  assert len(named) == 3 and all(path.startswith("gs://scans/oct/") for path in named)
  table = (copy / "quarantine.tsv").read_text().splitlines()[1:]
  assert {row.split("\t")[0] for row in table} == set(named)


def test_a_lost_bucket_ends_the_run_in_time_with_a_code_of_its_own(
    environment, store, corpus
):
  del corpus
  bucket = store.emulator.make_bucket("lost")
  patience = {**environment, "VJEPA_JAX_STORAGE_DEADLINE_S": "5"}
  overrides = (IN_BUCKET, "--config.train.total_steps=2000")
  complete = "run/checkpoints/4/commit_success.txt"
  with running(patience, f"{bucket}/run", *overrides) as (process, printed):
    wait_for(
        process, printed, lambda: complete in store.names("lost", complete)
    )
    store.emulator.fault("503")
    begin = time.monotonic()
    process.wait(timeout=120)
    seconds = time.monotonic() - begin
  store.emulator.clear_faults()
  said = "".join(printed)
  assert process.returncode == 75, said
  assert seconds < 60
  assert "out of reach" in said and "the same command goes on" in said
  assert "Traceback" not in said


def test_a_lost_bucket_of_the_data_ends_the_run_before_it_starts(environment, store):
  store.emulator.fault("503", name="scans/")
  patience = {**environment, "VJEPA_JAX_STORAGE_DEADLINE_S": "3"}
  begin = time.monotonic()
  done = run(patience, f"{store.emulator.make_bucket('unread')}/run", IN_BUCKET)
  store.emulator.clear_faults()
  assert done.returncode == 75, done.stdout + done.stderr
  assert "unreachable" in done.stderr and "Traceback" not in done.stderr
  assert time.monotonic() - begin < 60


def test_shards_in_a_bucket_change_no_number(
    environment, store, corpus, local, tmp_path
):
  del corpus
  shards = f"--config.data.cache={store.emulator.make_bucket('shards')}/oct"
  done = run(environment, None, IN_BUCKET, shards, module="prepare")
  assert done.returncode == 0, done.stdout + done.stderr
  bucket = store.emulator.make_bucket("from-shards")
  store.emulator.forget_requests()
  done = run(environment, f"{bucket}/run", IN_BUCKET, shards)
  assert done.returncode == 0, done.stdout + done.stderr
  assert_same_run(local, store.copy("from-shards", "run", tmp_path))
  read = store.emulator.requests(" scans/oct/")
  assert not [r for r in read if ".dcm" in r]  # no raw file is touched again
