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

from vjepa_jax.nn import placement
from vjepa_jax.train import sharding

SHARDED_RUN = """
import json, sys
import jax
import toy
from vjepa_jax.train import program, sharding, watch

def losses(data, fsdp, sequence, accum=1):
  count = data * fsdp * sequence
  mesh = sharding.make_mesh(data, fsdp, sequence, devices=jax.devices()[:count])
  run = program.make_program(
      objective=toy.Toy(), optimizer=toy.optimizer(), augment=toy.augment,
      batch=toy.batch(), mesh=mesh, accum=accum, fsdp_min_size=64)
  state, step = run.init(jax.random.key(0)), run.step
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
  whole, held = 0, 0
  for leaf in jax.tree.leaves(state):
    if leaf.size >= 64 and any(n % fsdp == 0 for n in leaf.shape):
      whole += leaf.nbytes
      held += leaf.addressable_shards[0].data.nbytes
  return dict(losses=values, split=names, compiles=compiles, share=held / whole)

print(json.dumps({
    "one": losses(1, 1, 1), "data": losses(8, 1, 1), "both": losses(2, 4, 1, accum=2),
    "fsdp": losses(1, 8, 1), "sequence": losses(2, 2, 2),
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
      "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
      "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": os.pathsep.join([os.getcwd(), os.path.dirname(__file__)]),
  }
  done = subprocess.run(
      [sys.executable, "-c", SHARDED_RUN], env=env, capture_output=True, text=True,
      timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("layout", ["data", "both", "fsdp", "sequence"])
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


def test_a_device_holds_an_eighth_of_what_eight_share(eight_devices):
  assert eight_devices["fsdp"]["share"] == 1 / 8
  assert eight_devices["sequence"]["share"] == 1 / 2
  assert eight_devices["data"]["share"] == 1


def mesh_of(data, fsdp, sequence=1):
  axis_types = (jax.sharding.AxisType.Auto,) * 3
  return jax.sharding.AbstractMesh((data, fsdp, sequence), sharding.AXES, axis_types)


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
  found = f"but {count} cpu devices; fsdp x sequence = {count + 1} does not divide"
  for axis in ("fsdp", "sequence"):
    with pytest.raises(ValueError, match=found):
      sharding.make_mesh(**{axis: count + 1})
  with pytest.raises(ValueError, match=f"set data to {count}, or to -1"):
    sharding.make_mesh(data=count + 1)
  with pytest.raises(ValueError, match="sizes must be positive"):
    sharding.make_mesh(sequence=0)


def test_a_batch_that_does_not_divide_names_the_nearest():
  wanted = r"accum 3 x 8 devices \(data 8 x fsdp 1\) = 24; nearest: 24 or 48"
  with pytest.raises(ValueError, match=wanted):
    sharding.check_batch(40, 3, mesh_of(8, 1))
  sharding.check_batch(48, 3, mesh_of(8, 1))
  sharding.check_batch(12, 3, mesh_of(2, 2, 2))  # tokens are split, not rows


def test_a_batch_of_text_is_refused_by_name():
  batch = {**toy.batch(), "path": np.array(["a"] * 16)}
  with pytest.raises(ValueError, match=r"batch\['path'\]"):
    sharding.put_batch(batch, sharding.make_mesh())


class Device:
  """What arranging asks of a device."""

  platform, device_kind = "gpu", "some GPU"

  def __init__(self, number, own):
    self.id, self.process_index = number, number // own

  def __repr__(self):
    return str(self.id)


def test_the_rows_of_a_host_follow_one_another_and_share_no_tokens_with_others():
  devices = [Device(number, own=4) for number in range(16)]
  for shape in ((16, 1, 1), (1, 16, 1), (2, 8, 1), (4, 2, 2), (1, 4, 4), (8, 1, 2)):
    mesh = sharding.make_mesh(*shape, devices=devices)
    assert tuple(mesh.shape.values()) == shape
    hosts = [device.process_index for device in mesh.devices.flat]
    assert hosts == sorted(hosts)
  with pytest.raises(ValueError, match="sequence=8 does not divide the 4 devices"):
    sharding.make_mesh(1, 2, 8, devices=devices)


def test_axes_have_one_name_everywhere():
  assert (*placement.BATCH_AXES, placement.SEQUENCE_AXIS) == sharding.AXES
