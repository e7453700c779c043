"""What keys get of attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.nn.attention import MultiHeadAttention
from vjepa_jax.nn.received import received


def _draw(*shape):
  keys = jax.random.split(jax.random.key(0))
  return [2.0 * jax.random.normal(key, shape) for key in keys]


def _naive(q, k, queries, valid):
  """By the formula, all weights at once, in float64."""
  q, k = (np.asarray(x, np.float64) for x in (q, k))
  scores = np.einsum("...qd,...kd->...qk", q, k) / np.sqrt(q.shape[-1])
  scores = np.where(valid[..., None, None, :], scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights = (weights / weights.sum(-1, keepdims=True)).mean(axis=-3)
  counts = valid.astype(float)
  counts[..., queries:] = 0
  return np.einsum("...qk,...q->...k", weights, counts) / counts.sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", [(2, 3, 11, 4), (2, 5, 3, 11, 4)])
@pytest.mark.parametrize("queries", [0, 1, 3])
@pytest.mark.parametrize("most", [1, 700, 2**24])
def test_shares_are_those_of_the_formula_however_few_scores_are_held(
    shape, queries, most
):
  q, k = _draw(*shape)
  found = jax.jit(
      lambda q, k: received(q, k, queries=queries, most_scores=most)
  )(q, k)
  valid = np.ones((*shape[:-3], 11), bool)
  np.testing.assert_allclose(
      found, _naive(q, k, queries or 11, valid), rtol=1e-4, atol=1e-6
  )
  np.testing.assert_allclose(found.sum(axis=-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("queries", [0, 1])
def test_padding_gets_nothing_and_asks_nothing(queries):
  q, k = _draw(2, 3, 11, 4)
  valid = np.arange(11) < np.array([[11], [7]])
  found = received(q, k, queries=queries, key_valid=jnp.asarray(valid), most_scores=99)
  np.testing.assert_allclose(
      found, _naive(q, k, queries or 11, valid), rtol=1e-4, atol=1e-6
  )
  assert np.abs(found[1, 7:]).max() == 0
  other = received(
      q.at[1, :, 7:].set(9.0), k.at[1, :, 7:].set(9.0), queries=queries,
      key_valid=jnp.asarray(valid),
  )
  np.testing.assert_allclose(found, other, rtol=1e-5, atol=1e-6)


def test_no_array_of_all_pairs_is_made():
  q = jax.ShapeDtypeStruct((1, 2, 4096, 8), jnp.float32)
  compiled = jax.jit(lambda q, k: received(q, k, most_scores=2**18)).lower(q, q).compile()
  memory = compiled.memory_analysis()
  # All scores would be 134 MB, those of a step are 1 MB.
  assert memory.temp_size_in_bytes < 8e6


def test_a_layer_gives_its_shares_only_where_asked_and_changes_nothing_by_it():
  x = jax.random.normal(jax.random.key(1), (2, 11, 8))
  layer = MultiHeadAttention(8, 2)
  variables = layer.init(jax.random.key(0), x)
  assert set(variables) == {"params"}
  plain = layer.apply(variables, x)
  same, state = layer.apply(variables, x, mutable=["attention"])
  np.testing.assert_array_equal(plain, same)
  (shares,) = state["attention"]["received"]
  assert shares.shape == (2, 11)
  assert not layer.apply(variables, x, asking=None, mutable=["attention"])[1]
  count = lambda **options: str(jax.make_jaxpr(
      lambda v, x: layer.apply(v, x, **options)
  )(variables, x)).count("dot_general")
  # Three projections, scores, sums and the last projection; then also the shares.
  assert count() == count(mutable=["intermediates"]) == 6
  assert count(mutable=["attention"]) > 6
