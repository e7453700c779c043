"""Configs: all faults at once, before anything is touched; golden dumps."""

import os
import pathlib
import subprocess
import sys

import pytest

from vjepa_jax import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
ARMS = [
    (name, arm)
    for name in ("oct_multi", "oct_single")
    for arm in ("", "L", "H", "heads=12", "literal", "smoke", "literal,smoke", "sample", "tiny")
]


def load(name, arm=""):
  return config_lib.load(f"{ROOT / 'configs' / name}.py:{arm}")


def faults_of(config, **known):
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.check_config(config, **known)
  return error.value.faults


@pytest.mark.parametrize("name,arm", ARMS)
def test_every_config_is_sound_and_equals_its_golden_dump(name, arm):
  config = load(name, arm)
  text = str(config)
  golden = GOLDEN / f"{name}_{arm.replace('=', '').replace(',', '_') or 'default'}.txt"
  if os.environ.get("UPDATE_GOLDEN"):
    golden.write_text(text)
  assert text == golden.read_text(), "UPDATE_GOLDEN=1 rewrites the dumps"
  with config.unlocked():
    config.data.manifest = config.data.manifest or "manifest.tsv"
  config_lib.check_config(config)


def test_all_faults_are_reported_at_once():
  config = load("oct_multi", "sample")
  with config.unlocked():
    config.data.canvaz = (1, 2, 3)
    config.model.patch = (1, 7, 8, 8)
    config.model.preset = "tiny"
    config.optimizer.warmup_epochs = 3
    config.objective.name = "vjeppa"
    config.evals.health.type = "helth"
    del config.train.batch_size
  text = "\n".join(faults_of(config))
  for part in (
      "data.canvaz: unknown key; closest: canvas",
      "optimizer.warmup: spelled twice, as warmup_steps and warmup_epochs",
      "objective: 'vjeppa' is none of vjepa",
      "evals.health: 'helth' is none of health",
      "train.batch_size: missing",
  ):
    assert part in text, text


def test_voxels_that_the_patch_does_not_divide_name_the_axis_and_the_nearest():
  config = load("oct_multi")
  with config.unlocked():
    config.data.manifest = "m.tsv"
    config.data.canvas = (64, 380, 384)
  (fault,) = faults_of(config)
  assert "Y=380 is not a multiple of patch 16; nearest 368 or 384" in fault


def test_mask_counts_are_held_against_the_grid():
  config = load("oct_multi", "literal")
  with config.unlocked():
    config.data.manifest = "m.tsv"
    config.objective.masks.random.target = 0.7
  assert any("objective.masks.random" in f for f in faults_of(config))


def test_batch_must_divide_by_accumulation_and_devices():
  config = load("oct_multi", "sample")
  with config.unlocked():
    config.train.accum = 3
  assert any("not a multiple of train.accum 3" in f for f in faults_of(config))
  config = load("oct_multi", "sample")
  assert any("3 device(s)" in f for f in faults_of(config, device_count=3))
  config = load("oct_multi", "L")
  with config.unlocked():
    config.data.manifest = "m.tsv"
  assert any("mesh_fsdp 16" in f for f in faults_of(config, device_count=8))


def test_best_is_never_chosen_by_the_self_supervised_loss():
  config = load("oct_multi", "sample")
  with config.unlocked():
    config.train.best_metric = "validation.loss"
  assert any("best_metric" in f for f in faults_of(config))


def test_a_run_has_one_length():
  config = load("oct_multi", "sample")
  with config.unlocked():
    config.train.total_epochs = 3
  assert any("total_steps and total_epochs" in f for f in faults_of(config))


def test_the_full_config_without_a_manifest_names_the_remedy():
  (fault,) = faults_of(load("oct_multi"))
  assert "--config.data.manifest=" in fault and ":sample" in fault


def test_unknown_arms_list_the_closest():
  with pytest.raises(ValueError, match="closest: sample"):
    load("oct_multi", "smaple")


@pytest.mark.parametrize("options,steps", [
    (dict(warmup_steps=7), 7), (dict(warmup_epochs=2), 20),
    (dict(warmup_percent=10.0), 30), (dict(), None),
])
def test_durations_become_steps(options, steps):
  got = config_lib.duration(options, "warmup", total_steps=300, steps_per_epoch=10)
  assert got == steps


def test_a_duration_spelled_twice_is_refused():
  with pytest.raises(ValueError, match="twice"):
    config_lib.duration(
        dict(warmup_steps=1, warmup_epochs=1), "warmup", total_steps=1, steps_per_epoch=1
    )


@pytest.mark.slow
def test_faults_are_reported_before_a_device_or_a_file_is_touched(tmp_path):
  done = subprocess.run(
      [sys.executable, "-m", "vjepa_jax.main", "--config=configs/oct_multi.py",
       f"--workdir={tmp_path / 'run'}", "--config.train.accum=5"],
      # A platform that does not exist: touching a device would say so.
      env={**os.environ, "JAX_PLATFORMS": "no_such_platform"},
      cwd=ROOT, capture_output=True, text=True, timeout=120,
  )
  assert done.returncode == 2, done.stderr
  assert "--config.data.manifest=" in done.stderr and "train.accum 5" in done.stderr
  assert "no_such_platform" not in done.stderr
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_unknown_override_names_the_closest_key(tmp_path):
  done = subprocess.run(
      [sys.executable, "-m", "vjepa_jax.main", "--config=configs/oct_multi.py:tiny",
       f"--workdir={tmp_path / 'run'}", "--config.train.batchsize=5"],
      cwd=ROOT, capture_output=True, text=True, timeout=120,
  )
  assert done.returncode != 0 and "batch_size" in done.stderr + done.stdout
