"""Attention by rows of scores equals attention as it is written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.nn import attention, rows


def results(impl, q, k, v, *, chunk=8, **options):
  """Returns output and gradients of a weighted sum of it."""
  weight = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

  def loss(q, k, v):
    out = attention.attend(q, k, v, impl=impl, chunk=chunk, **options)
    return jnp.sum(weight * out), out

  grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  return (out, *grads)


def draw(queries, keys, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  q = rng.normal(size=(2, 3, queries, 8))
  k, v = rng.normal(size=(2, 2, 3, keys, 8))
  valid = rng.random((2, keys)) > 0.3
  valid[1] = False  # A sample whose queries see nothing at all.
  return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(valid)


@pytest.mark.parametrize("scores", [40, 150, 10**6])
@pytest.mark.parametrize("queries, keys", [(37, 37), (13, 29), (29, 13)])
@pytest.mark.parametrize("masked, causal", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_rows_are_naive_attention_in_value_and_gradient(
    monkeypatch, scores, queries, keys, masked, causal
):
  # One query of one head at a time, several queries, several heads.
  monkeypatch.setattr(rows, "_SCORES", scores)
  q, k, v, valid = draw(queries, keys)
  options = dict(key_valid=valid if masked else None, causal=bool(causal))
  got = results("rows", q, k, v, **options)
  want = results("xla", q, k, v, **options)
  for ours, naive in zip(got, want, strict=True):
    assert np.all(np.isfinite(ours))
    np.testing.assert_allclose(ours, naive, rtol=1e-5, atol=1e-5)


def test_rows_of_short_types_return_their_type():
  q, k, v, _ = draw(9, 9, jnp.bfloat16)
  out = attention.attend(q, k, v, impl="rows")
  assert out.dtype == jnp.bfloat16
  wide = attention.attend(*(x.astype(jnp.float32) for x in (q, k, v)), impl="xla")
  np.testing.assert_allclose(out.astype(jnp.float32), wide, atol=0.02)


def test_a_block_holds_no_more_scores_than_fit(monkeypatch):
  monkeypatch.setattr(rows, "_SCORES", 512)
  for heads, queries, keys in ((6, 64, 64), (6, 61, 64), (4, 7, 3), (2, 5, 4096)):
    group, block = rows._sizes(heads, queries, keys, 512)
    assert heads % group == 0 and 1 <= block <= queries
    assert group * block * keys <= max(512, keys)
    invented = -queries % block
    assert invented < -(-queries // block)


def test_auto_takes_rows_on_a_cpu_where_scores_are_many():
  x = jnp.ones((1, 1, 256, 4))

  def loops(tokens):
    program = jax.make_jaxpr(lambda q: attention.attend(q, q, q, impl="auto"))
    return "scan" in str(program(x[:, :, :tokens]))

  assert loops(256) and not loops(64)
