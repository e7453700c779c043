"""Saved on eight devices, a run goes on on one, two, four, or eight split otherwise."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from vjepa_jax.train import metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

MOVED = """
import json, sys
import jax
import numpy as np
from vjepa_jax import config as config_lib
from vjepa_jax.bench import scaling
from vjepa_jax.train import checkpoint, sharding

plain = config_lib.as_plain(config_lib.load("configs/oct_multi.py:tiny"))
plain["train"]["fsdp_min_size"] = 256
folder = checkpoint.Checkpoints(sys.argv[1])

def go_on(run, state, steps):
  losses = []
  for step in steps:
    batch = sharding.put_batch(scaling.random_batch(plain, step), run.mesh)
    state, metrics = run.step(state, batch)
    losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
  return state, losses

def arrays(state):
  words = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(
      x.dtype, jax.dtypes.prng_key) else x
  return {k: np.asarray(words(v)) for k, v in sharding.named_leaves(state).items()}

run = scaling.make_run(plain, sharding.make_mesh(fsdp=8))
state, _ = go_on(run, run.init(jax.random.key(0)), range(3))
folder.save(3, state, config=plain)
folder.wait()
saved = arrays(state)
_, losses = go_on(run, state, range(3, 6))
found = {"unbroken": dict(losses=losses)}
for name, shape in {
    "one": (1, 1, 1), "two": (1, 2, 1), "four": (2, 2, 1), "eight": (8, 1, 1),
}.items():
  mesh = sharding.make_mesh(*shape, devices=jax.devices()[:np.prod(shape)])
  run = scaling.make_run(plain, mesh)
  state, _ = folder.restore(3, run.state)
  placed = all(leaf.sharding == wanted.sharding for leaf, wanted in zip(
      jax.tree.leaves(state), jax.tree.leaves(run.state), strict=True))
  differing = [k for k, v in arrays(state).items() if not np.array_equal(v, saved[k])]
  _, losses = go_on(run, state, range(3, 6))
  found[name] = dict(losses=losses, differing=differing, placed=placed, of=len(saved))
print(json.dumps(found))
"""


def environment(cache, devices):
  return {
      **os.environ, "JAX_PLATFORMS": "cpu", "VJEPA_JAX_CACHE": str(cache),
      "PYTHONPATH": str(ROOT),
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
      "--xla_backend_optimization_level=0",
  }


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("moved")
  done = subprocess.run(
      [sys.executable, "-c", MOVED, str(folder / "checkpoints")], cwd=ROOT,
      env=environment(folder, 8), capture_output=True, text=True, timeout=600,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("devices", ["one", "two", "four", "eight"])
def test_a_state_saved_on_eight_devices_is_the_same_on_another_mesh(moved, devices):
  found = moved[devices]
  assert found["of"] > 50 and not found["differing"]
  assert found["placed"]
  np.testing.assert_allclose(
      found["losses"], moved["unbroken"]["losses"], rtol=1e-6
  )


def test_the_command_goes_on_with_fewer_devices(tmp_path):
  eight, one = tmp_path / "eight", tmp_path / "one"
  split = ("--config.train.mesh_fsdp=8", "--config.train.fsdp_min_size=256")
  command(tmp_path, 8, eight, *split)
  shutil.copytree(eight, one)
  shutil.rmtree(one / "checkpoints" / "12")
  assert "goes on from step 8" in command(tmp_path, 1, one)
  wanted, got = losses(eight), losses(one)
  assert len(got) == 12
  np.testing.assert_allclose(got, wanted, rtol=1e-6)


def command(cache, devices, workdir, *overrides):
  done = subprocess.run(
      [
          sys.executable, "-m", "vjepa_jax.main", f"--workdir={workdir}",
          "--config=configs/oct_multi.py:tiny", *overrides,
      ],
      env=environment(cache, devices), cwd=ROOT, capture_output=True, text=True,
      timeout=600,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout + done.stderr


def losses(workdir):
  return [line["loss"] for line in metrics.read(workdir) if "loss" in line]
