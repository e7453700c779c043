"""What keys get of attention: for people to look at, never for training."""

import jax
import jax.numpy as jnp

from vjepa_jax.nn.naive import MINUS_INFINITY

# Collection in which attention is written down, where `apply` has it as mutable.
COLLECTION = "attention"
# Scores held at a time.
_MOST_SCORES = 2**24


def received(
    q: jax.Array,
    k: jax.Array,
    *,
    queries: int = 0,
    key_valid: jax.Array | None = None,
    most_scores: int = _MOST_SCORES,
) -> jax.Array:
  """Returns what share of attention each key gets, mean over heads and queries.

  softmax(q k^T / sqrt(d)) in float32, as many queries at a time as `most_scores`
  allow; never all of [Nq, Nk] where they are many.

  Args:
    q: [..., H, N, d].
    k: [..., H, N, d].
    queries: how many count, the first ones; 0: all.
    key_valid: bool [..., N]; keys marked False get nothing, and as queries they do
      not count.
    most_scores: held at a time; a single query's are held in any case.

  Returns:
    float32 [..., N], sums to 1.
  """
  *lead, heads, tokens, width = q.shape
  counts = jnp.ones((*lead, tokens), jnp.float32)
  if key_valid is not None:
    counts = key_valid.astype(jnp.float32)
  queries = min(queries, tokens) or tokens
  q, counts = q[..., :queries, :], counts[..., :queries]
  rows = max(1, min(most_scores // (k.size // width), queries))
  extra = -queries % rows
  q = jnp.pad(q, [(0, 0)] * (len(lead) + 1) + [(0, extra), (0, 0)])
  counts = jnp.pad(counts, [(0, 0)] * len(lead) + [(0, extra)])

  def add(total, block):
    q, counts = block  # [..., H, rows, d], [..., rows]
    scores = jnp.einsum("...qd,...kd->...qk", q, k, preferred_element_type=jnp.float32)
    scores = scores / width**0.5
    if key_valid is not None:
      scores = jnp.where(key_valid[..., None, None, :], scores, MINUS_INFINITY)
    weights = jax.nn.softmax(scores, axis=-1).mean(axis=-3)  # [..., rows, N]
    return total + jnp.einsum("...qk,...q->...k", weights, counts), None

  blocks = (
      jnp.moveaxis(q.reshape(*lead, heads, -1, rows, width), -3, 0),
      jnp.moveaxis(counts.reshape(*lead, -1, rows), -2, 0),
  )
  total, _ = jax.lax.scan(add, jnp.zeros((*lead, tokens)), blocks)
  return total / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1.0)
