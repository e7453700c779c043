"""A step compiled for chips that are not there: numbers, and refusals in seconds."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import pytest

from vjepa_jax import config as config_lib
from vjepa_jax import precompile
from vjepa_jax.compiler import topology
from vjepa_jax.config import programs
from vjepa_jax.data import pipeline

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = str(ROOT / "configs" / "oct_multi.py:tiny")
FULL = str(ROOT / "configs" / "oct_multi.py")
KEYS = {
    "topology", "chips", "hosts", "config", "batch_per_chip", "tokens",
    "peak_gib_per_chip", "temp_gib", "argument_gib", "usable_gib", "fits",
    "max_batch_per_chip", "model_tflop_per_step", "non_kernel_ms", "kernel_ms",
    "step_ms_bound", "mfu_bound", "collective_bytes", "collective_ms", "largest_ops",
    "compile_s", "versions", "label",
}


def verb(*arguments):
  return subprocess.run(
      [sys.executable, "-m", "vjepa_jax.precompile", *arguments], cwd=ROOT,
      capture_output=True, text=True, timeout=280,
      env={k: v for k, v in os.environ.items() if not k.startswith(("TPU", "JAX"))},
  )


def test_a_small_config_is_compiled_for_a_slice_and_described():
  done = verb(
      f"--config={TINY}", "--topology=v4:2x2x1", "--json", "--max_batch=false",
      "--batch_per_chip=3", "--top=5",
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found.keys() >= KEYS
  assert found["label"] == "compiler estimate, not a measurement"
  assert (found["chips"], found["hosts"], found["batch_per_chip"]) == (4, 1, 3)
  assert found["tokens"] == 32 and found["config"].endswith("oct_multi.py:tiny")
  assert found["fits"] is True and 0 < found["peak_gib_per_chip"] < 1
  assert found["non_kernel_ms"] > 0 and 0 < found["mfu_bound"] < 1
  # Data-parallel: the gradients are added up.
  assert found["collective_bytes"]["all-reduce"] > 1e4
  assert len(found["largest_ops"]) == 5 and found["max_batch_per_chip"] is None
  text = precompile.format_table(found)
  assert "not a measurement" in text and "fits" in text and "v4:2x2x1" in text


def test_the_models_work_is_that_of_the_report():
  """A volume by hand: target 4.71, context 2.62 and predictor 5.89 TFLOP."""
  plain = config_lib.as_plain(config_lib.load(f"{FULL}:"))
  plain["objective"]["masks"] = {
      "one": dict(kind="random", context=3072 / 9216, target=6144 / 9216)
  }
  assert programs.flops_per_volume(plain) == pytest.approx(13.2e12, rel=0.01)


def refusal(config, topology_name, **options):
  begin = time.process_time()
  with pytest.raises((config_lib.ConfigError, topology.TopologyError)) as error:
    precompile.precompile(config, topology_name, **options)
  assert time.process_time() - begin < 5
  return str(error.value)


def test_a_topology_that_does_not_exist_is_refused_with_the_closest():
  told = refusal(config_lib.load(f"{FULL}:"), "v4:2x2x5")
  assert "no topology 'v4:2x2x5'" in told and "v4:2x2x4" in told


@pytest.mark.parametrize("change,told", [
    (dict(batch_size=100), "multiple of 16"),
    (dict(batch_size=128, accum=16), "train.batch_size"),
    (dict(mesh_fsdp=3), "train.mesh_data"),
    (dict(mesh_fsdp=32), "train.mesh_data"),
    (dict(accum=3), "not a multiple of train.accum 3"),
])
def test_a_batch_and_a_mesh_that_the_chips_do_not_divide_are_refused(change, told):
  config = config_lib.load(f"{FULL}:")
  config.train.update(change)
  assert told in refusal(config, "v4:2x2x4")


def test_no_data_are_needed_but_all_other_faults_are_named():
  config = config_lib.load(f"{FULL}:")
  with config.unlocked():
    config.model.width_ = 3
  told = refusal(config, "v4:2x2x4")
  assert "model.width_" in told and "data.manifest" not in told


def test_what_does_not_fit_says_what_to_change_and_what_does():
  """State alone: 10^11 parameters are refused before any work."""
  config = config_lib.load(TINY)
  config.model.update(width=16384, depth=40, heads=128)
  said = []
  begin = time.perf_counter()
  found = precompile.precompile(
      config, "v5e:2x2", max_batch=False, batch_per_chip=4, say=said.append
  )
  print(f"{time.perf_counter() - begin:.0f} s")
  assert found["fits"] is False and found["peak_gib_per_chip"] > found["usable_gib"]
  told = precompile.format_table(found)
  assert "DOES NOT FIT" in told and "does not fit" in said[0]
  for remedy in ("train.accum=2", "remat=full", "train.mesh_fsdp=4", "train.batch_size="):
    assert remedy in told


def test_the_batch_that_is_compiled_is_the_one_that_the_data_make():
  config = config_lib.load(TINY)
  plain = config_lib.as_plain(config)
  with contextlib.closing(
      config_lib.open_data(plain, say=lambda text: None)
  ) as data:
    batch = next(pipeline.train_iterator(data.splits["train"], batch_size=4, seed=0))
  shapes = programs.batch_shapes(plain, 4)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
      k: (v.shape, v.dtype) for k, v in shapes.items()
  }


def test_a_fingerprint_is_of_all_that_decides_the_numbers(monkeypatch):
  config = config_lib.load(TINY)
  digest = lambda **options: precompile.fingerprint(
      config, options.pop("slice_", "v4:2x2x1"), batch_per_chip=4, **options
  )
  first = digest()
  config.train.log_every_steps += 1
  assert digest() == first
  assert digest(slice_="v5e:2x2") != first
  with monkeypatch.context() as patch:
    patch.setattr(precompile, "_versions", lambda *packages: {"libtpu": "another"})
    assert digest() != first
  with monkeypatch.context() as patch:
    patch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=4096")
    assert digest() != first
  jax.config.update("jax_optimization_level", "O1")
  try:
    assert digest() != first
  finally:
    jax.config.update("jax_optimization_level", "UNKNOWN")
  text = pathlib.Path.read_text
  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "read_text", lambda p, **o: text(p, **o) + p.name)
    assert digest() != first
  config.optimizer.weight_decay *= 2  # A constant in the program.
  assert digest() != first


def test_a_fingerprint_knows_no_folder_and_compiles_nothing(monkeypatch):
  compiles = lambda lowered: pytest.fail("compiled")
  monkeypatch.setattr(precompile.estimate, "compile_lowered", compiles)
  here = precompile.fingerprint(config_lib.load(TINY), "v4:2x2x1", batch_per_chip=4)
  there = verb(
      f"--config={TINY}", "--topology=v4:2x2x1", "--batch_per_chip=4", "--fingerprint"
  )
  assert there.stdout.strip() == here, there.stderr
