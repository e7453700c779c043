"""Pre-training on movies of embryos, then stages, by the real command."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import vjepa_jax
from vjepa_jax import config as config_lib
from vjepa_jax.train import checkpoint, metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
MAE, STAGES = (f"configs/worm_{name}.py:tiny" for name in ("mae", "stages"))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(programs, tmp_path_factory):
  cache = tmp_path_factory.mktemp("cache")
  environment = {
      **os.environ, "JAX_PLATFORMS": "cpu", "VJEPA_JAX_CACHE": str(cache),
      **programs,
  }

  def start(config, workdir, *overrides):
    return subprocess.run(
        [sys.executable, "-m", "vjepa_jax.main", f"--config={config}",
         f"--workdir={workdir}", *overrides],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )

  return start


@pytest.fixture(scope="module")
def pretrained(run, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("mae")
  done = run(MAE, workdir)
  assert done.returncode == 0, done.stdout + done.stderr
  return workdir


@pytest.fixture(scope="module")
def tuned(run, pretrained, tmp_path_factory):
  """Returns (workdir, what was said) of a run that started from the other."""
  workdir = tmp_path_factory.mktemp("stages")
  # So slow that what step 0 had can still be recognised in the last checkpoint.
  done = run(
      STAGES, workdir, f"--config.train.start_from={pretrained}",
      "--config.optimizer.learning_rate=1e-7",
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return workdir, done.stdout + done.stderr


def test_pre_training_leaves_its_numbers_and_figures(pretrained):
  lines = metrics.read(pretrained)
  steps = [line for line in lines if "loss" in line]
  assert [line["step"] for line in steps] == list(range(1, 13))
  assert all(np.isfinite(line["loss"]) for line in steps)
  found = {key for line in lines for key in line}
  for family in ("stage_probe.", "reconstruction.", "health."):
    assert any(key.startswith(family) for key in found), family
  assert len(list((pretrained / "figures").glob("*.png"))) >= 3


def test_stages_start_with_the_encoder_and_leave_numbers_and_figures(tuned):
  workdir, said = tuned
  assert "starts with the encoder of step 12" in said
  lines = metrics.read(workdir)
  last = [line for line in lines if "stages.accuracy" in line]
  assert [line["step"] for line in last] == [0, 6, 12]
  for name in ("accuracy", "kappa", "decoded_accuracy", "impossible_raw", "nll"):
    assert np.isfinite(last[-1][f"stages.{name}"]), name
  steps = [line for line in lines if "cross_entropy" in line and "lr" in line]
  assert all(np.isfinite(line["transition"]) for line in steps) and len(steps) == 12
  names = {path.name for path in (workdir / "figures").rglob("*.png")}
  assert any("timeline" in name for name in names), names
  assert any("confusion" in name for name in names), names
  assert (workdir / "checkpoints" / "best").is_dir()


def test_load_gives_the_features_of_both_runs_and_they_share_an_encoder(
    pretrained, tuned
):
  one, two = (vjepa_jax.load(str(folder)) for folder in (pretrained, tuned[0]))
  assert one.step == two.step == 12 and set(one.params) == set(two.params) == {"context"}
  volume = np.random.default_rng(0).normal(size=(2, 4, 8, 16, 16, 1))
  features = [np.asarray(model.features(volume).tokens) for model in (one, two)]
  assert features[0].shape == (2, 4 * 2 * 4 * 4, 32)
  np.testing.assert_allclose(features[1], features[0], atol=1e-2)
  assert np.abs(features[1] - features[0]).max() > 0
  fresh = config_lib.build_objective(
      one.config, total_steps=12, steps_per_epoch=1
  ).backbone
  drawn = fresh.init(jax.random.key(0), volume)
  other = np.asarray(fresh.apply(drawn, volume).tokens)
  assert np.abs(other - features[0]).max() > 0.1
  with pytest.raises(KeyError, match="'target' is none of context"):
    one.features(volume, encoder="target")


def test_an_encoder_of_another_width_is_refused_with_the_shapes(
    run, pretrained, tmp_path
):
  done = run(
      STAGES, tmp_path / "run", f"--config.train.start_from={pretrained}",
      "--config.model.width=48",
  )
  assert done.returncode == 2, done.stdout + done.stderr
  assert "encoder/norm/scale has shape (32,), the model's (48,)" in done.stderr
  assert "Traceback" not in done.stderr
  assert not checkpoint.Checkpoints(tmp_path / "run" / "checkpoints").latest_step()


def test_a_folder_that_is_no_run_is_refused(run, tmp_path):
  done = run(
      STAGES, tmp_path / "run", f"--config.train.start_from={tmp_path / 'nothing'}"
  )
  assert done.returncode == 2, done.stdout + done.stderr
  assert "train.start_from" in done.stderr and "config.json" in done.stderr


def test_an_encoder_that_is_spared_must_come_from_somewhere(run, tmp_path):
  done = run(STAGES, tmp_path / "run")
  assert done.returncode == 2
  assert "train.start_from: empty" in done.stderr and "'scratch'" in done.stderr
  assert "Traceback" not in done.stderr


def test_a_run_that_goes_on_has_its_own_encoder(run, pretrained, tmp_path):
  start = f"--config.train.start_from={pretrained}"
  workdir = tmp_path / "run"
  for total, words in ((4, True), (8, False)):
    done = run(STAGES, workdir, start, f"--config.train.total_steps={total}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("starts with the encoder" in done.stdout) == words
  assert "goes on from step 4" in done.stdout + done.stderr
