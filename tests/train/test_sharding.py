"""Where arrays live, and that it changes no number."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from vjepa_jax.train import sharding

SHARDED_RUN = """
import json, sys
import jax
import toy
from vjepa_jax.train import loop, sharding, watch

def losses(data, fsdp, devices, accum=1):
  mesh = jax.make_mesh(
      (data, fsdp), sharding.BATCH_AXES,
      axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:devices])
  batch = sharding.put_batch(toy.batch(), mesh)
  options = loop.LoopOptions(total_steps=10, batch_size=16, accum=accum)
  parts = toy.Toy(), toy.optimizer(), toy.augment
  draw = lambda key: loop.init_state(*parts, batch, key)
  key = jax.random.key(0)
  places = sharding.state_sharding(jax.eval_shape(draw, key), mesh, min_size=64)
  state = jax.jit(draw, out_shardings=places)(key)
  step = loop._compiled_step(*parts, options, state, mesh)
  values = []
  compiles = 0
  for seed in range(10):
    batch = sharding.put_batch(toy.batch(seed), mesh)
    before = watch.compile_count()
    state, metrics = step(state, batch)
    compiles += watch.compile_count() - before
    values.append(float(metrics["loss"][0] / metrics["loss"][1]))
  names = {
      name: list(leaf.sharding.spec)
      for name, leaf in sharding.named_leaves(state).items() if any(leaf.sharding.spec)
  }
  return dict(losses=values, split=names, compiles=compiles)

print(json.dumps({
    "one": losses(1, 1, 1), "data": losses(8, 1, 8), "both": losses(2, 4, 8, accum=2),
}))
"""


EVALUATED = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from vjepa_jax.train import evaluate, sharding

functions = evaluate.wrap_functions(
    {"double": lambda params, state, batch: params * batch["volume"]},
    lambda batch, key, train: batch, sharding.make_mesh())
out = functions["double"](
    np.float32(2), np.float32(0), {"volume": np.arange(4, dtype=np.float32)})
print("got", np.asarray(out).tolist(), flush=True)
"""


@pytest.mark.slow
def test_two_processes_evaluate_a_common_batch_once():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
  processes = [
      subprocess.Popen(
          [sys.executable, "-c", EVALUATED, address, str(number)], env=env,
          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      )
      for number in range(2)
  ]
  for process in processes:
    out, err = process.communicate(timeout=120)
    assert "got [0.0, 2.0, 4.0, 6.0]" in out, err


@pytest.fixture(scope="module")
def eight_devices():
  env = os.environ | {
      "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": os.pathsep.join([os.getcwd(), os.path.dirname(__file__)]),
  }
  done = subprocess.run(
      [sys.executable, "-c", SHARDED_RUN], env=env, capture_output=True, text=True,
      timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("layout", ["data", "both"])
def test_eight_devices_equal_one(eight_devices, layout):
  np.testing.assert_allclose(
      eight_devices[layout]["losses"], eight_devices["one"]["losses"], rtol=1e-6
  )
  assert eight_devices[layout]["compiles"] == 1


def test_moments_and_ema_are_split_like_their_parameters(eight_devices):
  split = eight_devices["both"]["split"]
  wanted = split["params/encoder/kernel"]
  assert wanted == ["fsdp"]
  for name in (
      "model_state/target/kernel", "opt_state/inner_state/mu/encoder/kernel",
      "opt_state/inner_state/nu/encoder/kernel",
  ):
    assert split[name] == wanted
  assert "params/encoder/bias" not in split
  assert not eight_devices["data"]["split"]


def mesh_of(data, fsdp):
  axis_types = (jax.sharding.AxisType.Auto,) * 2
  return jax.sharding.AbstractMesh((data, fsdp), sharding.BATCH_AXES, axis_types)


def test_the_largest_axis_that_fsdp_divides_is_split():
  tree = {
      "wide": jnp.zeros((12, 16, 64)), "odd": jnp.zeros((63, 65)),
      "first": jnp.zeros((64, 33)), "small": jnp.zeros((8,)), "scalar": jnp.zeros(()),
  }
  placed = sharding.state_sharding(tree, mesh_of(2, 4), min_size=64)
  assert {name: tuple(place.spec) for name, place in placed.items()} == {
      "wide": (None, None, "fsdp"), "odd": (), "first": ("fsdp",), "small": (),
      "scalar": (),
  }


def test_a_rule_decides_before_the_size_and_must_fit():
  tree = {"mlp": {"kernel": jnp.zeros((16, 64))}}
  rules = (("mlp/kernel$", ("fsdp", None)),)
  placed = sharding.state_sharding(tree, mesh_of(2, 4), rules=rules)
  assert tuple(placed["mlp"]["kernel"].spec) == ("fsdp", None)
  for entries in (("model",), (None, None, "fsdp")):
    with pytest.raises(ValueError, match=r"does not fit mlp/kernel \[16, 64\]"):
      sharding.state_sharding(tree, mesh_of(2, 4), rules=(("mlp", entries),))


def test_a_mesh_that_does_not_use_all_devices_is_refused():
  count = jax.device_count()
  with pytest.raises(ValueError, match=f"but {count} cpu devices; fsdp must be one of"):
    sharding.make_mesh(fsdp=count + 1)
  with pytest.raises(ValueError, match=f"data x fsdp must be {count}"):
    sharding.make_mesh(data=count + 1)


def test_a_batch_that_does_not_divide_names_the_nearest():
  with pytest.raises(ValueError, match="accum 3 x 8 devices = 24; nearest: 24 or 48"):
    sharding.check_batch(40, 3, mesh_of(8, 1))
  sharding.check_batch(48, 3, mesh_of(8, 1))


def test_a_batch_of_text_is_refused_by_name():
  batch = {**toy.batch(), "path": np.array(["a"] * 16)}
  with pytest.raises(ValueError, match=r"batch\['path'\]"):
    sharding.put_batch(batch, sharding.make_mesh())
