"""cuDNN's attention: what it is given, and what a CUDA device would be told to run."""

import jax
from jax._src.cudnn import fused_attention_stablehlo
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.nn import attention, cudnn

on_gpu = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs GPU: this process has none"
)


def draw(queries, keys, dtype, width=16):
  """Returns q, k, v and a key_valid, no prefix, that leaves row 1 without any key."""
  rng = np.random.default_rng(0)
  q = rng.normal(size=(2, 3, queries, width))
  k, v = rng.normal(size=(2, 2, 3, keys, width))
  valid = rng.random((2, keys)) > 0.3
  valid[1] = False
  return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(valid)


@pytest.mark.parametrize(
    "dtype, head, options, reason",
    [
        ("bfloat16", 128, {}, None),
        ("float16", 64, dict(masked=True), None),
        ("bfloat16", 64, dict(causal=True), None),
        ("float32", 128, {}, "not in float32"),
        ("bfloat16", 36, {}, "these are 36"),
        ("bfloat16", 256, {}, "these are 256"),
        ("bfloat16", 64, dict(causal=True, masked=True), "no mask"),
        ("bfloat16", 64, dict(causal=True, offset=3), "as many queries"),
    ],
)
def test_what_cudnn_does_not_take_is_said(dtype, head, options, reason):
  options = dict(masked=False, causal=False, offset=0) | options
  said = cudnn.refusal(dtype, head, **options)
  assert said is None if reason is None else reason in said


def test_what_cudnn_does_not_take_is_computed_in_chunks():
  q, k, v, valid = draw(20, 30, jnp.float32)
  run = lambda impl: attention.attend(q, k, v, key_valid=valid, impl=impl, chunk=16)
  np.testing.assert_array_equal(run("cudnn"), run("chunked"))


def grad_of(policy=None, masked=True):
  q, k, v, valid = draw(64, 64, jnp.bfloat16, 64)
  attend = lambda q, k, v: attention.attend(
      q, k, v, key_valid=valid if masked else None, impl="cudnn"
  )
  if policy:
    attend = jax.checkpoint(attend, policy=policy)
  loss = lambda q, k, v: (attend(q, k, v).astype(jnp.float32) ** 2).sum()
  return jax.jit(jax.grad(loss, argnums=(0, 1, 2))), (q, k, v)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a cuDNN here")
def test_without_cudnn_it_is_asked_for_by_name():
  grad, args = grad_of()
  with pytest.raises(RuntimeError, match="cuDNN is not detected"):
    grad.trace(*args)


@pytest.mark.parametrize("masked", [False, True])
def test_cuda_is_told_to_run_the_flash_kernels_once_each(monkeypatch, masked):
  # JAX asks the library for its version while it traces; lowering needs no more.
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
  by_kind = jax.checkpoint_policies.save_from_both_policies(
      jax.checkpoint_policies.save_only_these_names(attention.SAVED),
      cudnn.keeps_forward,
  )
  nothing = jax.checkpoint_policies.nothing_saveable
  for policy, forward in ((None, 1), (by_kind, 1), (nothing, 2)):
    grad, args = grad_of(policy, masked)
    text = grad.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == forward, policy
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1


@pytest.mark.parametrize("impl", ["xla", "chunked"])
def test_a_whole_train_step_is_exported_for_cuda(impl):
  from vjepa_jax import config as config_lib
  from vjepa_jax.config import programs

  plain = config_lib.as_plain(config_lib.load("configs/oct_multi.py:tiny"))
  plain["model"]["attention"] = plain["objective"]["predictor"]["attention"] = impl
  program = programs.step_program(plain, programs.mesh_of(plain, jax.devices()[:1]))
  exported = jax.export.export(program.step, platforms=["cuda"])(
      program.state, program.batch
  )
  assert exported.platforms == ("cuda",)
  assert "stablehlo.dot_general" in exported.mlir_module()


@on_gpu
@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_is_attention_in_value_and_gradient(masked):
  q, k, v, valid = draw(200, 300, jnp.bfloat16, 64)

  def run(impl):
    loss = lambda q, k, v: attention.attend(
        q, k, v, key_valid=valid if masked else None, impl=impl
    ).astype(jnp.float32).sum()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

  got, want = jax.tree.leaves(run("cudnn")), jax.tree.leaves(run("xla"))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(
        np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.05, atol=0.05
    )
