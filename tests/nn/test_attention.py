"""All implementations of attention compute the same thing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.nn import attention


def draw(queries, keys, seed=0, dtype=jnp.float32):
  """Returns q, k, v, key_valid with about a third of the keys invalid."""
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(2, 3, queries, 8))
  k, v = rng.normal(size=(2, 2, 3, keys, 8))
  valid = rng.random((2, keys)) > 0.3
  valid[:, 0] = True
  return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(valid)


def by_hand(q, k, v, valid, causal):
  """Softmax attention in float64, one query at a time."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for b, h, i in np.ndindex(q.shape[:3]):
    seen = np.ones(k.shape[2], bool) if valid is None else np.asarray(valid[b])
    if causal:
      seen = seen & (np.arange(k.shape[2]) <= i + k.shape[2] - q.shape[2])
    if seen.any():
      score = k[b, h][seen] @ q[b, h, i] / np.sqrt(q.shape[-1])
      weight = np.exp(score - score.max())
      out[b, h, i] = weight @ v[b, h][seen] / weight.sum()
  return out


@pytest.mark.parametrize("impl", ["xla", "chunked"])
@pytest.mark.parametrize("queries, keys", [(16, 16), (37, 37), (13, 29), (29, 13)])
@pytest.mark.parametrize("masked, causal", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_attention_is_softmax_attention(impl, queries, keys, masked, causal):
  q, k, v, valid = draw(queries, keys)
  valid = valid if masked else None
  out = attention.attend(
      q, k, v, key_valid=valid, causal=bool(causal), impl=impl, chunk=8
  )
  want = by_hand(q, k, v, valid, causal)
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries, keys", [(37, 37), (13, 29)])
@pytest.mark.parametrize("masked, causal", [(0, 0), (1, 0), (1, 1)])
def test_chunked_gradients_are_those_of_the_whole(queries, keys, masked, causal):
  q, k, v, valid = draw(queries, keys)
  valid = valid if masked else None
  weight = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

  def gradients(impl):
    loss = lambda q, k, v: jnp.sum(weight * attention.attend(
        q, k, v, key_valid=valid, causal=bool(causal), impl=impl, chunk=8
    ))
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

  for got, want in zip(gradients("chunked"), gradients("xla"), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def sizes(jaxpr):
  """Sizes of all arrays that a jaxpr makes, inner ones included."""
  for equation in jaxpr.eqns:
    yield from (v.aval.size for v in equation.outvars)
    for inner in jax.core.jaxprs_in_params(equation.params):
      yield from sizes(inner)


@pytest.mark.parametrize("impl, holds", [("xla", True), ("chunked", False)])
@pytest.mark.parametrize("tokens", [64, 61])
def test_chunked_holds_no_buffer_of_all_pairs(impl, holds, tokens):
  x = jnp.ones((1, 1, tokens, 4))
  loss = lambda q, k, v: attention.attend(q, k, v, impl=impl, chunk=8).sum()
  program = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1, 2)))(x, x, x)
  assert (max(sizes(program.jaxpr)) >= tokens * tokens) == holds


@pytest.mark.parametrize("impl", ["xla", "chunked"])
def test_what_invalid_keys_hold_changes_nothing(impl):
  q, k, v, valid = draw(11, 19)
  spoil = lambda x: jnp.where(valid[:, None, :, None], x, 1e6)
  run = lambda k, v: attention.attend(q, k, v, key_valid=valid, impl=impl, chunk=4)
  np.testing.assert_array_equal(run(k, v), run(spoil(k), spoil(v)))


@pytest.mark.parametrize("impl", ["xla", "chunked"])
def test_a_row_without_keys_gives_zeros_and_finite_gradients(impl):
  q, k, v, _ = draw(5, 7)
  valid = jnp.zeros((2, 7), bool).at[1].set(True)
  run = lambda q: attention.attend(q, k, v, key_valid=valid, impl=impl, chunk=4)
  out = run(q)
  assert not np.any(out[0]) and np.all(np.any(out[1], axis=-1))
  gradient = jax.grad(lambda q: run(q).sum())(q)
  assert np.all(np.isfinite(gradient)) and not np.any(gradient[0])


@pytest.mark.parametrize("impl", ["xla", "chunked"])
def test_scores_and_softmax_are_float32_under_bfloat16(impl):
  q, k, v, _ = draw(9, 9, dtype=jnp.bfloat16)
  program = jax.make_jaxpr(
      lambda q, k, v: attention.attend(q, k, v, impl=impl, chunk=4)
  )(q, k, v)
  found = []

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == "exp":
        found.append(equation.invars[0].aval.dtype)
      for inner in jax.core.jaxprs_in_params(equation.params):
        walk(inner)

  walk(program.jaxpr)
  assert found and all(dtype == jnp.float32 for dtype in found)
  assert program.out_avals[0].dtype == jnp.bfloat16


def test_no_buffer_of_all_pairs_is_in_the_compiled_program():
  x = jax.ShapeDtypeStruct((1, 1, 4096, 8), jnp.float32)

  def compiled(impl):
    loss = lambda q, k, v: attention.attend(q, k, v, impl=impl).sum()
    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return grad.lower(x, x, x).compile().as_text()

  assert "4096,4096" in compiled("xla") and "4096,4096" not in compiled("chunked")


@pytest.mark.parametrize("seed", range(6))
def test_implementations_agree_on_drawn_sizes(seed):
  rng = np.random.default_rng(seed)
  queries, keys = (int(n) for n in rng.integers(1, 60, 2))
  masked, causal = rng.random(2) < 0.5
  dtype = (jnp.float32, jnp.bfloat16)[seed % 2]
  q, k, v, valid = draw(queries, keys, seed, dtype)
  chunk = int(rng.integers(1, 70))

  def run(impl):
    loss = lambda q, k, v: attention.attend(
        q, k, v, key_valid=valid if masked else None, causal=bool(causal), impl=impl,
        chunk=chunk,
    ).astype(jnp.float32).sum()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

  close = 1e-4 if dtype == jnp.float32 else 0.1
  for a, b in zip(*(jax.tree.leaves(run(i)) for i in ("chunked", "xla")), strict=True):
    np.testing.assert_allclose(
        np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=close, atol=close
    )


def test_auto_is_the_implementation_of_the_platform():
  of = attention.for_platform
  assert (of("tpu"), of("cuda"), of("gpu"), of("cpu")) == (
      "splash", "cudnn", "cudnn", "auto"
  )
  with pytest.raises(ValueError, match="'tpus' is not known; the closest: tpu"):
    of("tpus")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU does")
@pytest.mark.parametrize("tokens, whole", [(64, True), (2048, False)])
def test_auto_holds_all_scores_of_few_tokens_only_on_a_cpu(tokens, whole):
  x = jnp.ones((1, 1, tokens, 4))
  attend = lambda q, k, v: attention.attend(q, k, v, impl="auto")
  most = max(sizes(jax.make_jaxpr(attend)(x, x, x).jaxpr))
  assert (most >= tokens * tokens) == whole


def test_an_unknown_implementation_names_the_closest():
  x = jnp.ones((1, 1, 2, 4))
  with pytest.raises(ValueError, match="'chunks'.*closest: chunked"):
    attention.attend(x, x, x, impl="chunks")


def test_shapes_that_do_not_agree_are_refused():
  x = jnp.ones((1, 2, 3, 4))
  with pytest.raises(ValueError, match="equal B, H, d"):
    attention.attend(x, x[:, :1], x)
  with pytest.raises(ValueError, match=r"key_valid is \(1, 2\)"):
    attention.attend(x, x, x, key_valid=jnp.ones((1, 2), bool))
