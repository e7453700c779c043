"""The real command with damaged checkpoints, here and in a bucket that refuses."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.data import bucket as buckets
from vjepa_jax.train import metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(programs, tmp_path_factory):
  return {
      **os.environ, "JAX_PLATFORMS": "cpu", **programs,
      "VJEPA_JAX_CACHE": str(tmp_path_factory.mktemp("cache")),
  }


@pytest.fixture(scope="module")
def emulator():
  with buckets.start() as running:
    yield running


@pytest.fixture(scope="module")
def unbroken(environment, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("unbroken")
  done = run(environment, workdir)
  assert done.returncode == 0, done.stdout + done.stderr
  return workdir


def run(environment, workdir, *overrides):
  return subprocess.run(
      [
          sys.executable, "-m", "vjepa_jax.main", "--config=configs/oct_multi.py:tiny",
          f"--workdir={workdir}", *overrides,
      ],
      env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600,
  )


def without_clock(workdir):
  return [
      {k: v for k, v in line.items() if k not in metrics.TIMING_KEYS}
      for line in metrics.read(workdir)
  ]


def arrays(checkpoint):
  tree = ocp.PyTreeCheckpointer().restore(checkpoint / "state")
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def tracebacks(text):
  """Those of errors; Python prints others for coroutines that end with the process."""
  blocks = text.split("Traceback (most recent call last):")
  return [b for a, b in zip(blocks, blocks[1:]) if "Exception ignored in" not in a[-300:]]


LOADED = (
    "import sys, vjepa_jax; run = vjepa_jax.load(sys.argv[1]);"
    "print('loaded', run.step, sorted(run.params))"
)


def test_a_garbled_checkpoint_is_passed_over_and_the_run_ends_as_ever(
    environment, unbroken
):
  lines, wanted = without_clock(unbroken), arrays(unbroken / "checkpoints" / "12")
  folder = unbroken / "checkpoints" / "12"
  path = max(
      (p for p in (folder / "state").rglob("*") if p.is_file()),
      key=lambda p: p.stat().st_size,
  )
  content = bytearray(path.read_bytes())
  content[len(content) // 3] ^= 1
  path.write_bytes(content)
  done = run(environment, unbroken)
  assert done.returncode == 0, done.stdout + done.stderr
  assert f"DAMAGED CHECKPOINT: {folder}" in done.stdout
  assert "FALLS BACK to the checkpoint of step 8" in done.stdout
  assert (unbroken / "checkpoints" / "12.damaged" / "state").is_dir()
  assert without_clock(unbroken) == lines
  for one, other in zip(wanted, arrays(folder), strict=True):
    np.testing.assert_array_equal(one, other)
  loaded = subprocess.run(
      [sys.executable, "-c", LOADED, str(unbroken)], env=environment, cwd=ROOT,
      capture_output=True, text=True, timeout=300,
  )
  assert "loaded 12 ['context', 'target']" in loaded.stdout, loaded.stderr


def test_a_bucket_that_refuses_for_a_while_costs_one_checkpoint(
    environment, unbroken, emulator, monkeypatch
):
  bucket = emulator.make_bucket()
  env = {**environment, **emulator.env}
  emulator.fault("403", name="run/checkpoints/4/", method="POST")
  done = run(env, f"{bucket}/run")
  emulator.clear_faults()
  assert done.returncode == 0, done.stdout + done.stderr
  assert "step 4: NOT SAVED, 1 of 3" in done.stdout
  assert "training goes on" in done.stdout and not tracebacks(done.stderr)
  for name, value in emulator.env.items():
    monkeypatch.setenv(name, value)
  assert without_clock(f"{bucket}/run") == without_clock(unbroken)


def test_a_bucket_that_refuses_for_good_ends_the_run_with_its_own_code(
    environment, emulator
):
  bucket = emulator.make_bucket()
  env = {**environment, **emulator.env}
  emulator.fault("403", name="run/checkpoints/", method="POST")
  done = run(env, f"{bucket}/run", "--config.train.checkpoint_every_steps=2")
  emulator.clear_faults()
  assert done.returncode == 75, done.stdout + done.stderr
  said = done.stdout + done.stderr
  assert "NOT SAVED, 3 of 3 times in a row" in said and not tracebacks(said)
