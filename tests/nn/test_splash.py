"""The TPU's kernels, interpreted on whatever is here, and compiled for chips."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.nn import attention, naive, on_mesh, splash


def draw(rows, heads, queries, keys, width, *, dtype=jnp.float32, seed=0):
  """Returns q, k, v and a key_valid that leaves row 1 without any key."""
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(rows, heads, queries, width))
  k, v = rng.normal(size=(2, rows, heads, keys, width))
  valid = rng.random((rows, keys)) > 0.3
  valid[1:2] = False
  return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(valid)


def interpreted(q, k, v, key_valid=None, causal=False):
  local = lambda q, k, v, key_valid, offset: splash.attend(
      q, k, v, key_valid=key_valid, causal=causal, offset=offset, chunk=1,
      interpret=True,
  )
  return on_mesh.attend(local, q, k, v, key_valid, opaque=True)


def gradients(function, q, k, v, *rest):
  """Returns the output and the gradients of a weighted sum of it, as float32."""
  weight = np.random.default_rng(1).normal(size=q.shape)

  def loss(q, k, v):
    out = function(q, k, v, *rest)
    return (out * weight).sum(), out

  grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
  grads, out = grad(q, k, v)
  return [np.asarray(x, np.float32) for x in (out, *grads)]


def in_full(q, k, v, key_valid=None, causal=False):
  return attention.attend(q, k, v, key_valid=key_valid, causal=causal, impl="xla")


@pytest.mark.parametrize(
    "queries, keys, width, masked, causal, dtype",
    [
        (128, 128, 128, 0, 0, "float32"),
        (140, 200, 64, 1, 0, "float32"),
        (200, 140, 80, 0, 1, "float32"),  # the first queries see nothing
        (150, 150, 128, 1, 1, "bfloat16"),
        (1, 300, 32, 0, 0, "bfloat16"),
    ],
)
def test_splash_is_attention_in_value_and_gradient(
    queries, keys, width, masked, causal, dtype
):
  q, k, v, valid = draw(2, 2, queries, keys, width, dtype=dtype)
  rest = valid if masked else None, bool(causal)
  got = gradients(interpreted, q, k, v, *rest)
  close = 1e-4 if dtype == "float32" else 0.06
  for a, b in zip(got, gradients(in_full, q, k, v, *rest), strict=True):
    np.testing.assert_allclose(a, b, rtol=close, atol=close)
  assert np.isfinite(got[0]).all() and (not masked or not got[0][1].any())


@pytest.mark.parametrize("keys, shares, fused", [(2250, 2, True), (5700, 5, False)])
def test_gradients_of_keys_held_in_several_shares_are_summed(keys, shares, fused):
  q, k, v, _ = draw(1, 1, 130, keys, 16)
  blocks = splash.choose_blocks(130, keys, 16, jnp.float32, masked=True)
  assert blocks.keys // blocks.key_memory_backward >= shares
  assert blocks.fused == fused
  got, want = gradients(interpreted, q, k, v), gradients(in_full, q, k, v)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_what_invalid_keys_hold_changes_nothing():
  q, k, v, valid = draw(1, 1, 150, 150, 16)
  spoil = lambda x: jnp.where(valid[:, None, :, None], x, 1e6)
  run = jax.jit(interpreted)
  np.testing.assert_array_equal(
      run(q, k, v, valid), run(q, spoil(k), spoil(v), valid)
  )


def equations(jaxpr):
  """All equations of a jaxpr; those within kernels left out."""
  for equation in jaxpr.eqns:
    yield equation
    if equation.primitive.name != "pallas_call":
      for inner in jax.core.jaxprs_in_params(equation.params):
        yield from equations(inner)


def traced(tokens, policy=None):
  x = jax.ShapeDtypeStruct((2, 1, tokens, 128), jnp.bfloat16)
  valid = jax.ShapeDtypeStruct((2, tokens), bool)
  attend = lambda q, k, v, valid: attention.attend(
      q, k, v, key_valid=valid, impl="splash"
  )
  if policy:
    attend = jax.checkpoint(attend, policy=policy)
  # A loss that needs the output itself, so that no pass over it is spared.
  loss = lambda q, k, v, valid: (attend(q, k, v, valid).astype(jnp.float32) ** 2).sum()
  grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
  return grad.trace(x, x, x, valid)


def test_no_buffer_of_all_pairs_leaves_the_kernels():
  jaxpr = traced(4096).jaxpr.jaxpr
  sizes = [v.aval.size for e in equations(jaxpr) for v in e.outvars]
  assert max(sizes) < 4096 * 4096


def test_what_is_named_spares_the_forward_kernel():
  kernels = lambda policy: traced(256, policy).lower(
      lowering_platforms=("tpu",)
  ).as_text().count("tpu_custom_call")
  assert kernels(None) == 2
  assert kernels(jax.checkpoint_policies.save_only_these_names(naive.SAVED)) == 2
  assert kernels(jax.checkpoint_policies.nothing_saveable) == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_divide_the_padded_tokens_and_pad_little(dtype, masked):
  for tokens in (1, 127, 608, 2304, 3072, 3457, 6728, 7059, 9216, 18432, 36864):
    b = splash.choose_blocks(tokens, tokens, 128, dtype, masked=masked)
    blocks = (b.query, b.query_backward), (b.key, b.key_memory, b.key_memory_backward)
    for padded, sizes in zip((b.queries, b.keys), blocks, strict=True):
      assert all(padded % size == 0 and size % 128 == 0 for size in sizes), tokens
      assert tokens <= padded < tokens * 1.06 + 128, tokens
    assert b.key_memory % b.key == 0 and b.key_memory_backward % b.key == 0
    assert not b.fused or b.keys // b.key_memory_backward <= 4


# Runs on eight devices in a process of its own; prints one line a case.
ON_EIGHT = """
import itertools
import jax, numpy as np
from jax.sharding import AxisType
from vjepa_jax.nn import attention, on_mesh
from tests.nn.test_splash import draw, gradients, in_full, interpreted

def named(impl):
  if impl == "splash":
    return interpreted
  return lambda q, k, v, valid, causal: attention.attend(
      q, k, v, key_valid=valid, causal=causal, impl=impl, chunk=32)

cases = [  # mesh, rows, queries, keys, masked, causal, implementations
    ((4, 2, 1), 8, 40, 40, True, False, ("splash", "rows")),
    ((4, 2, 1), 1, 20, 20, False, False, ("splash", "rows")),
    ((2, 2, 2), 4, 37, 70, True, True, ("splash", "chunked", "xla")),
    ((2, 1, 4), 2, 50, 50, False, False, ("splash", "chunked", "xla")),
]
for shape, rows, queries, keys, masked, causal, names in cases:
  mesh = jax.make_mesh(shape, ("data", "fsdp", "sequence"),
                       axis_types=(AxisType.Auto,) * 3)
  q, k, v, valid = draw(rows, 1, queries, keys, 16)
  rest = valid if masked else None, causal
  want = gradients(in_full, q, k, v, *rest)
  for impl in names:
    with jax.set_mesh(mesh):
      got = gradients(named(impl), q, k, v, *rest)
    worst = max(abs(a - b).max() for a, b in zip(got, want))
    print(impl, shape, rows, "worst", worst, "close" if worst < 1e-4 else "FAR")
"""


def test_a_mesh_of_eight_with_split_tokens_computes_what_one_device_does():
  flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
  done = subprocess.run(
      [sys.executable, "-c", ON_EIGHT], capture_output=True, text=True, timeout=240,
      env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."},
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.count("close") == 10 and "FAR" not in done.stdout, done.stdout


# Compiles value and gradient for the chip named in argv; no TPU is needed.
COMPILE = """
import sys
import jax, jax.numpy as jnp
from vjepa_jax.compiler import topology
device = topology.describe(sys.argv[1]).devices()[0]
place = jax.sharding.SingleDeviceSharding(device)
from vjepa_jax.nn import attention
loss = lambda q, k, v, valid: attention.attend(
    q, k, v, key_valid=valid, impl="splash").astype(jnp.float32).sum()
for tokens, width, dtype, masked in [
    (9216, 128, "bfloat16", False), (7059, 128, "bfloat16", True),
    (3072, 32, "bfloat16", False), (3457, 64, "float32", True),
    (18432, 80, "bfloat16", False),
]:
  x = jax.ShapeDtypeStruct((2, 1, tokens, width), dtype, sharding=place)
  valid = jax.ShapeDtypeStruct((2, tokens), bool, sharding=place) if masked else None
  grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
  text = grad.lower(x, x, x, valid).compile().as_text()
  assert text.count("tpu_custom_call") and f"{tokens},{tokens}" not in text, tokens
  print("compiled", tokens)
"""


@pytest.mark.slow
@pytest.mark.parametrize("slice_of", ["v4:2x2x1", "v5e:2x2", "v6e:2x2"])
def test_kernels_fit_the_vector_memory_of_chips(slice_of):
  pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")
  done = subprocess.run(
      [sys.executable, "-c", COMPILE, slice_of], capture_output=True, text=True,
      timeout=300, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": "."},
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.count("compiled") == 5
