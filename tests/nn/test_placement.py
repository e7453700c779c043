"""What the ambient mesh does to a stack of blocks, as it is compiled for it."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.nn import placement

COMPILED = """
import json, re
import jax, jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np
from vjepa_jax.nn import blocks

rows, tokens, width = 8, 48, 256
stack = blocks.Stack(width, 2, 2, dtype="bfloat16", remat="full")

def run(*shape):
  mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp", "sequence"),
              axis_types=(AxisType.Auto,) * 3)
  x = jax.ShapeDtypeStruct((rows, tokens, width), jnp.float32,
                           sharding=NamedSharding(mesh, P(("data", "fsdp"))))
  params = jax.eval_shape(stack.init, jax.random.key(0), x)
  def place(leaf):
    axis = max((n, a) for a, n in enumerate(leaf.shape))[1]
    spec = P(*[None] * axis, "fsdp") if leaf.size >= 2**16 else P()
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
  params = jax.tree.map(place, params)
  def loss(params, x):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return jnp.square(stack.apply(params, x)).sum()
  places = jax.tree.map(lambda leaf: leaf.sharding, params)
  lowered = jax.jit(jax.grad(loss), out_shardings=places).lower(params, x)
  found = {}
  for kind, shape in re.findall(
      r"= (?:\\()?\\w+\\[([\\d,]*)\\][^=]* (all-gather|all-to-all|collective-permute|"
      r"all-reduce|reduce-scatter)\\(", lowered.compile().as_text()):
    found.setdefault(shape, []).append([int(n) for n in kind.split(",") if n])
  return found

from jax.experimental.layout import Layout, with_layout_constraint
from vjepa_jax.nn import placement

def local(rows):
  mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "sequence"),
              axis_types=(AxisType.Auto,) * 3)
  parts = []
  def fn(part):
    parts.append(part.shape)
    return with_layout_constraint(2 * part, Layout((0, 1, 2)))
  def twice(x):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return placement.per_device(fn, x, "batch", "tokens", None)
  place = NamedSharding(mesh, P(("data", "fsdp") if rows % 4 == 0 else None, "sequence"))
  x = jax.device_put(jnp.arange(rows * 48 * 4.0).reshape(rows, 48, 4), place)
  grad = jax.jit(jax.grad(lambda x: (twice(x) * x).sum()))
  text = grad.lower(x).compile().as_text()
  factor = float((grad(x) / x)[1, 1, 1])
  return dict(parts=parts, gathers="all-gather" in text, factor=factor)

print(json.dumps(dict(whole=local(8), uneven=local(6), fsdp=run(1, 8, 1), both=run(2, 4, 1), sequence=run(2, 2, 2))))
"""


@pytest.fixture(scope="module")
def collectives():
  env = os.environ | {
      "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
      "--xla_backend_optimization_level=0",
      "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd(),
  }
  done = subprocess.run(
      [sys.executable, "-c", COMPILED], env=env, capture_output=True, text=True,
      timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("layout", ["fsdp", "both"])
def test_weights_travel_and_activations_stay(collectives, layout):
  found = collectives[layout]
  assert not found.keys() & {"all-to-all", "collective-permute"}
  assert found["all-gather"]
  for kind in ("all-gather", "all-reduce", "reduce-scatter"):
    for shape in found.get(kind, []):
      assert 48 not in shape, f"{kind} of {shape} moves tokens"


def test_tokens_travel_only_to_be_keys_and_values(collectives):
  wide = [s for s in collectives["sequence"]["all-gather"] if 48 in s]
  assert wide and all(len(s) == 4 and s[-1] == 128 for s in wide), wide
  assert not collectives["sequence"].keys() & {"all-to-all"}


def test_what_is_done_on_each_device_sees_its_own_part_and_sends_nothing(collectives):
  whole, uneven = collectives["whole"], collectives["uneven"]
  assert set(map(tuple, whole["parts"])) == {(2, 24, 4)} and whole["factor"] == 4
  assert not whole["gathers"]
  # Rows that the mesh does not divide: left as they are.
  assert uneven == {"parts": [], "gathers": False, "factor": 2}


def test_without_a_mesh_nothing_happens():
  x = jnp.ones((3, 5, 4))
  assert placement.constrain(x, "batch", "tokens", None) is x
  np.testing.assert_array_equal(
      placement.per_device(jnp.negative, x, "batch", "tokens", None), -x
  )
  inputs, kernel, bias = placement.promote(
      x, np.ones((4, 4), np.float32), None, dtype=jnp.bfloat16
  )
  assert inputs.dtype == kernel.dtype == jnp.bfloat16 and bias is None
