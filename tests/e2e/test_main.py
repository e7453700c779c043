"""The real command, in real processes, on real DICOM files."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from vjepa_jax.train import checkpoint, metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def command(workdir, *overrides, config="configs/oct_multi.py:tiny"):
  return [
      sys.executable, "-m", "vjepa_jax.main", f"--config={config}",
      f"--workdir={workdir}", *overrides,
  ]


@pytest.fixture(scope="module")
def environment(programs, tmp_path_factory):
  cache = tmp_path_factory.mktemp("cache")
  return {
      **os.environ, "JAX_PLATFORMS": "cpu", "VJEPA_JAX_CACHE": str(cache), **programs,
  }


@pytest.fixture(scope="module")
def unbroken(environment, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("unbroken")
  done = run(environment, workdir)
  assert done.returncode == 0, done.stdout + done.stderr
  return workdir


def run(environment, workdir, *overrides, **options):
  return subprocess.run(
      command(workdir, *overrides, **options), env=environment, cwd=ROOT,
      capture_output=True, text=True, timeout=600,
  )


def comparable(workdir):
  """The lines of metrics.jsonl without what depends on the clock."""
  return [
      {k: v for k, v in line.items() if k not in metrics.TIMING_KEYS}
      for line in metrics.read(workdir)
  ]


def final_arrays(workdir):
  """Every array of the last checkpoint, read without the library's own tree."""
  import orbax.checkpoint as ocp

  step = checkpoint.Checkpoints(workdir / "checkpoints").latest_step()
  tree = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")
  import jax

  return step, [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same_run(one, other):
  assert comparable(one) == comparable(other)
  (step_a, arrays_a), (step_b, arrays_b) = final_arrays(one), final_arrays(other)
  assert step_a == step_b and len(arrays_a) == len(arrays_b) > 20
  for a, b in zip(arrays_a, arrays_b, strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_main_job_leaves_everything_a_reader_needs(unbroken):
  names = {p.name for p in unbroken.iterdir()}
  assert names >= {
      "config.json", "data_report.json", "quarantine.tsv", "metrics.jsonl",
      "report.json", "figures", "checkpoints",
  }
  assert any(name.startswith("events.") for name in names)
  lines = metrics.read(unbroken)
  steps = [line for line in lines if "loss" in line]
  assert [line["step"] for line in steps] == list(range(1, 13))
  assert set(steps[0]) >= {
      "loss", "lr", "momentum", "grad_norm", "clipped", "volumes_per_s",
      "tokens_per_s", "data_wait", "peak_bytes", "compiles",
  }
  report = json.loads((unbroken / "report.json").read_text())
  for name in ("trained", "untrained", "intensity"):
    probe = report["probe"][name]
    low, high = probe["interval"]
    assert 0 <= low <= probe["value"] <= high <= 1
  for name in ("std", "rankme", "cosine"):
    assert set(report["health"][name]) == {"first", "last"}
  assert len(list((unbroken / "figures").glob("*.png"))) >= 3


def test_diagnoses_are_learned_from_labels_by_the_encoder_of_that_run(
    environment, unbroken, tmp_path
):
  done = subprocess.run(
      [sys.executable, "-m", "vjepa_jax.main", f"--workdir={tmp_path}",
       "--config=configs/oct_diagnosis.py:tiny",
       f"--config.train.start_from={unbroken}"],
      env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert "starts with the encoder of step 12" in done.stdout
  lines = [line for line in metrics.read(tmp_path) if "test.accuracy" in line]
  assert [line["step"] for line in lines] == [0, 6, 12]
  last = {key: value for line in metrics.read(tmp_path) for key, value in line.items()}
  for name in ("classes.balanced_accuracy", "test.balanced_accuracy", "test.nll"):
    assert np.isfinite(last[name]), name
  assert list((tmp_path / "figures").glob("classes.confusion*.png"))


def test_broken_files_are_counted_named_and_not_replaced(unbroken):
  report = json.loads((unbroken / "data_report.json").read_text())
  assert sum(report["quarantine"].values()) == 3
  table = (unbroken / "quarantine.tsv").read_text().splitlines()
  assert len(table) == 4 and all(len(row.split("\t")) == 3 for row in table)


def test_killed_at_a_random_step_and_run_again_equals_the_unbroken_run(
    environment, unbroken, tmp_path
):
  fatal = random.SystemRandom().randint(5, 11)
  print(f"killed once step {fatal} was logged")
  process = subprocess.Popen(
      command(tmp_path), env=environment, cwd=ROOT,
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 300
  saved = tmp_path / "checkpoints" / "4"  # under this name only once complete
  while not saved.exists() or metrics.read(tmp_path)[-1]["step"] < fatal:
    assert process.poll() is None, "the run ended before it was killed"
    assert time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  done = run(environment, tmp_path)
  assert done.returncode == 0, done.stdout + done.stderr
  assert "goes on from step" in done.stdout + done.stderr
  assert_same_run(unbroken, tmp_path)


def test_sigterm_saves_and_the_same_command_goes_on(environment, unbroken, tmp_path):
  process = subprocess.Popen(
      command(tmp_path), env=environment, cwd=ROOT,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )
  while not any(line["step"] >= 3 for line in metrics.read(tmp_path)):
    assert process.poll() is None, process.stdout.read()
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 143, out
  done = run(environment, tmp_path)
  assert done.returncode == 0, done.stdout + done.stderr
  assert_same_run(unbroken, tmp_path)


def test_accumulation_of_four_equals_one_large_batch(environment, unbroken, tmp_path):
  done = run(environment, tmp_path, "--config.train.accum=4")
  assert done.returncode == 0, done.stdout + done.stderr
  assert largest_difference(unbroken, tmp_path) < 1e-6


@pytest.mark.parametrize("axis", ["fsdp=2", "fsdp=8", "sequence=2"])
def test_one_device_equals_eight(environment, unbroken, tmp_path, axis):
  flags = f"{environment['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
  eight = {**environment, "XLA_FLAGS": flags}
  done = run(
      eight, tmp_path, f"--config.train.mesh_{axis}",
      "--config.train.fsdp_min_size=256",
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert largest_difference(unbroken, tmp_path) < 1e-6


def largest_difference(one, other):
  """Largest relative difference of the training losses of two runs."""
  losses = lambda workdir: [a["loss"] for a in comparable(workdir) if "loss" in a]
  pairs = zip(losses(one), losses(other), strict=True)
  return max(abs(a - b) / a for a, b in pairs)


def test_a_workdir_of_another_config_is_not_continued(environment, unbroken):
  before = comparable(unbroken)
  done = run(environment, unbroken, "--config.optimizer.learning_rate=0.5")
  assert done.returncode == 2
  assert "optimizer.learning_rate: 0.0015" in done.stderr
  assert comparable(unbroken) == before


def test_too_many_bad_files_stop_the_run_and_leave_what_was_saved(
    environment, tmp_path
):
  done = run(environment, tmp_path, "--config.data.max_bad_fraction=0.01")
  assert done.returncode == 2
  assert "max_bad_fraction" in done.stderr and "no_pixel_data" in done.stderr
  assert not (tmp_path / "metrics.jsonl").exists()


def test_a_manifest_without_the_columns_names_them(environment, tmp_path):
  manifest = tmp_path / "manifest.tsv"
  manifest.write_text("participant\tfile\n1\ta.dcm\n")
  done = run(
      environment, tmp_path / "run", f"--config.data.manifest={manifest}",
      config="configs/oct_multi.py:smoke",
  )
  assert done.returncode == 2
  assert "participant_id" in done.stderr and "filepath" in done.stderr


@pytest.mark.parametrize("arm", ["smoke", "literal,smoke"])
def test_the_users_own_manifest_runs_twenty_steps(environment, unbroken, tmp_path, arm):
  del unbroken  # has written the corpus
  (manifest,) = pathlib.Path(environment["VJEPA_JAX_CACHE"]).glob("oct_tiny*/manifest.tsv")
  done = run(
      environment, tmp_path, f"--config.data.manifest={manifest}",
      config=f"configs/oct_multi.py:{arm}",
  )
  assert done.returncode == 0, done.stdout + done.stderr
  lines = [line for line in metrics.read(tmp_path) if "loss" in line]
  assert lines[-1]["step"] == 20 and all(np.isfinite(line["loss"]) for line in lines)
