"""One run as several real processes on loopback: equal, watched, stopped together."""

import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from vjepa_jax.train import checkpoint, metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch" / "local_multiprocess.sh"
# The tiny run without its evaluators, which are half of its time.
PLAIN = """
from configs import oct_multi

def get_config(arg=""):
  c = oct_multi.get_config("tiny")
  with c.unlocked():
    c.evals = {}
    c.train.best_metric = ""
    c.train.validate_every_steps = 1000
    c.train.max_failed_saves = 9
  return c
"""
TINY = "configs/oct_multi.py:tiny"


@pytest.fixture(scope="module")
def environment(programs, tmp_path_factory):
  cache = tmp_path_factory.mktemp("cache")
  return {
      **os.environ, "JAX_PLATFORMS": "cpu", "VJEPA_JAX_CACHE": str(cache),
      "PYTHON": sys.executable, **programs,
  }


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "plain.py"
  path.write_text(PLAIN)
  return str(path)


def alone(environment, config, workdir, *overrides, devices):
  """Runs one process with virtual devices."""
  flags = environment["XLA_FLAGS"]
  done = subprocess.run(
      [sys.executable, "-m", "vjepa_jax.main", f"--config={config}",
       f"--workdir={workdir}", *overrides],
      env={**environment, "XLA_FLAGS":
           f"{flags} --xla_force_host_platform_device_count={devices}"},
      cwd=ROOT, capture_output=True, text=True, timeout=600,
  )
  assert done.returncode == 0, done.stdout + done.stderr


def launch(environment, count, config, workdir, *overrides, restarts=0):
  """Starts launch/local_multiprocess.sh."""
  return subprocess.Popen(
      [LAUNCH, f"--restarts={restarts}", str(count), "--", f"--config={config}",
       f"--workdir={workdir}", *overrides],
      env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      text=True,
  )


def together(environment, count, config, workdir, *overrides):
  process = launch(environment, count, config, workdir, *overrides)
  out, _ = process.communicate(timeout=600)
  assert process.returncode == 0, out
  return out


def lines(workdir):
  return [
      {k: v for k, v in line.items() if k not in metrics.TIMING_KEYS}
      for line in metrics.read(workdir)
  ]


@pytest.mark.parametrize("count, first, last", [
    (2, 0.0, 0.0), pytest.param(4, 3e-7, 1e-5, marks=pytest.mark.slow),
])
def test_fifty_steps_of_several_processes_equal_those_of_one(
    environment, plain, tmp_path, count, first, last
):
  # Sums of two are equal bit for bit. Of four, gloo adds in another order than one
  # process does: a unit in the last place, which training then carries on.
  steps = ["--config.train.total_steps=50", "--config.train.checkpoint_every_steps=50"]
  alone(environment, plain, tmp_path / "one", *steps, devices=count)
  out = together(environment, count, plain, tmp_path / "all", *steps)
  mark = f"{count} processes, {count} x cpu"
  (started,) = [line for line in out.splitlines() if mark in line]
  assert started.startswith("[0] ") and "jax 0." in started and "; code " in started
  one, several = lines(tmp_path / "one"), lines(tmp_path / "all")
  assert sum("loss" in line for line in several) == 50
  for wanted, found in zip(one, several, strict=True):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
      limit = first if wanted["step"] <= 2 else last
      assert found[key] == pytest.approx(value, rel=limit, abs=limit), (key, wanted)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_and_only_the_first_writes(environment, tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  steps = ["--config.train.total_steps=6", "--config.evals.figures.every_steps=6"]
  alone(environment, TINY, one, *steps, devices=2)
  together(environment, 2, TINY, two, *steps)
  assert lines(two) == lines(one)
  names = lambda folder: sorted(
      path.name for path in folder.iterdir() if not path.name.startswith("events.")
  )
  # Each process lists the files that it found bad.
  assert set(names(two)) - set(names(one)) <= {"quarantine.host1.tsv"}
  assert names(two / "figures") == names(one / "figures")
  assert len(list(two.glob("events.*"))) == 1
  report = lambda folder: json.loads((folder / "report.json").read_text())
  assert report(two)["probe"] == report(one)["probe"]


def process_of(launcher, number):
  """Returns the id of one of the processes that a launcher has started."""
  children = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
  for pid in children.read_text().split():
    command = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    if f"--process_id={number}".encode() in command:
      return int(pid)
  raise AssertionError(f"process {number} does not run")


def wait_for_step(launcher, workdir, step):
  deadline = time.monotonic() + 300
  while not any(line["step"] >= step for line in metrics.read(workdir)):
    assert launcher.poll() is None, launcher.stdout.read()
    assert time.monotonic() < deadline
    time.sleep(0.02)


LONG = ("--config.train.total_steps=40", "--config.train.checkpoint_every_steps=5")


@pytest.fixture(scope="module")
def unbroken(environment, plain, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("unbroken") / "run"
  together(environment, 2, plain, workdir, *LONG)
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named_and_the_restarted_run_is_equal(
    environment, plain, unbroken, tmp_path, victim
):
  launcher = launch(environment, 2, plain, tmp_path / "run", *LONG, restarts=1)
  wait_for_step(launcher, tmp_path / "run", 8)
  os.kill(process_of(launcher, victim), signal.SIGKILL)
  begin = time.monotonic()
  other = process_of(launcher, 1 - victim)
  while pathlib.Path(f"/proc/{other}/cmdline").exists():
    assert time.monotonic() - begin < 30
    time.sleep(0.05)
  out, _ = launcher.communicate(timeout=300)
  assert launcher.returncode == 0, out
  said = [line for line in out.splitlines() if "was lost" in line]
  assert len(said) == 1 and said[0].startswith(f"[{1 - victim}] process {victim} (")
  assert "fatal errors" not in out and "start 2 of at most 2" in out
  assert lines(tmp_path / "run") == lines(unbroken)


@pytest.mark.slow
def test_sigterm_to_one_saves_once_for_all(environment, plain, unbroken, tmp_path):
  never = [*LONG[:1], "--config.train.checkpoint_every_steps=1000"]
  launcher = launch(environment, 2, plain, tmp_path / "run", *never)
  wait_for_step(launcher, tmp_path / "run", 6)
  os.kill(process_of(launcher, 1), signal.SIGTERM)
  out, _ = launcher.communicate(timeout=120)
  assert launcher.returncode == 143, out
  assert "was lost" not in out
  assert len(checkpoint.Checkpoints(tmp_path / "run" / "checkpoints").all_steps()) == 1
  together(environment, 2, plain, tmp_path / "run", *never)
  assert lines(tmp_path / "run") == lines(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_cannot_write_costs_all_a_checkpoint_and_no_step(
    environment, plain, unbroken, tmp_path, victim
):
  launcher = launch(environment, 2, plain, tmp_path / "run", *LONG)
  wait_for_step(launcher, tmp_path / "run", 6)
  pid = process_of(launcher, victim)
  # As on a full disk: no file of this one may grow beyond 2 KiB.
  room = resource.prlimit(pid, resource.RLIMIT_FSIZE)
  resource.prlimit(pid, resource.RLIMIT_FSIZE, (2048, room[1]))
  begin, said = time.monotonic(), ""
  while "NOT SAVED" not in said:
    assert launcher.poll() is None and time.monotonic() - begin < 60, said
    said += launcher.stdout.readline()
  resource.prlimit(pid, resource.RLIMIT_FSIZE, room)
  out, _ = launcher.communicate(timeout=120)
  assert launcher.returncode == 0, said + out
  assert "File too large" in said and "training goes on" in said
  steps = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints").all_steps()
  assert steps[-1] == 40
  kept = [{k: v for k, v in line.items() if k != "failed_saves"}
          for line in lines(tmp_path / "run")]
  assert kept == lines(unbroken)


def free_port():
  with socket.socket() as probe:
    probe.bind(("", 0))
    return probe.getsockname()[1]


def start(environment, port, number, config, workdir, *flags, cwd=ROOT, count=2):
  return subprocess.Popen(
      [sys.executable, "-m", "vjepa_jax.main", f"--config={config}",
       f"--workdir={workdir}", f"--coordinator=localhost:{port}",
       f"--processes={count}", f"--process_id={number}", *flags],
      env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      text=True,
  )


@pytest.mark.slow
def test_a_worker_that_does_not_come_is_named_before_data_are_read(
    environment, plain, tmp_path
):
  port = free_port()
  processes = [
      start(environment, port, number, plain, tmp_path / "run", "--start_timeout_s=20",
            count=4)
      for number in (0, 2)
  ]
  for process in processes:
    _, error = process.communicate(timeout=120)
    assert process.returncode == 76
    assert "process(es) 1, 3 of 4 did not come within 20 s" in error
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_other_code_config_or_versions_are_refused_by_name(
    environment, plain, tmp_path
):
  copy = tmp_path / "copy"
  for folder in ("vjepa_jax", "configs"):
    shutil.copytree(ROOT / folder, copy / folder)
  with open(copy / "vjepa_jax" / "train" / "optim.py", "a") as file:
    file.write("# Another line.\n")
  other = tmp_path / "versions" / "optax-9.9.dist-info"
  other.mkdir(parents=True)
  (other / "METADATA").write_text("Metadata-Version: 2.1\nName: optax\nVersion: 9.9\n")
  path = f"{other.parent}:{environment.get('PYTHONPATH', '')}"
  cases = {
      "other code: vjepa_jax/train/optim.py": dict(cwd=copy),
      "other config: seed '7', not '0'": dict(flags=["--config.seed=7"]),
      "other versions: optax '9.9', not": dict(PYTHONPATH=path),
  }
  for said, case in cases.items():
    port, flags = free_port(), case.pop("flags", [])
    cwd = case.pop("cwd", ROOT)
    pair = [
        start(environment, port, 0, plain, tmp_path / "run"),
        start({**environment, **case}, port, 1, plain, tmp_path / "run", *flags,
              cwd=cwd),
    ]
    for process in pair:
      _, error = process.communicate(timeout=120)
      assert process.returncode == 2, error
      assert "process 1 (" in error and said in error
  assert not (tmp_path / "run").exists()
