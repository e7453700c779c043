"""Attention as it is written down, with all scores at once; and its parts."""

import math

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

# Name of the values that rematerialisation may keep (`blocks.Stack.remat`).
SAVED = "attention_out"
MINUS_INFINITY = -1e30  # finite, so that a row without any key stays free of NaN


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    key_valid: jax.Array | None,
    causal: bool,
    offset: int | jax.Array,
    chunk: int,
) -> jax.Array:
  """Returns softmax(q k^T / sqrt(d)) v, [B, H, Nq, d], holding [B, H, Nq, Nk].

  Args:
    q: [B, H, Nq, d].
    k: [B, H, Nk, d].
    v: [B, H, Nk, d].
    key_valid: bool [B, Nk]; None: all.
    causal: query i sees the keys up to i + offset.
    offset: may be traced.
    chunk: not read.
  """
  del chunk
  weights = scores(q, k)  # [B, H, Nq, Nk]
  seen = seen_keys(key_valid, causal, weights.shape[2:], (0, offset))
  if seen is None:
    weights = jax.nn.softmax(weights, axis=-1)
  else:
    weights = jax.nn.softmax(jnp.where(seen, weights, MINUS_INFINITY), axis=-1)
    weights = jnp.where(seen, weights, 0.0)
  return checkpoint_name(mix(weights, v).astype(q.dtype), SAVED)


def scores(q: jax.Array, k: jax.Array) -> jax.Array:
  """Returns q k^T / sqrt(d) of [B, H, N, d], float32 [B, H, Nq, Nk]."""
  product = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
  return product / math.sqrt(q.shape[-1])


def mix(weights: jax.Array, v: jax.Array) -> jax.Array:
  """Returns weights [B, H, Nq, Nk] times v [B, H, Nk, d], float32."""
  return jnp.einsum(
      "bhqk,bhkd->bhqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
  )


def seen_keys(
    key_valid: jax.Array | None,
    causal: bool,
    shape: tuple[int, int],
    start: tuple[int | jax.Array, int | jax.Array],
) -> jax.Array | None:
  """Says which keys queries see: bool [B or 1, 1, Nq, Nk]; None for all.

  Args:
    key_valid: bool [B, Nk] or None.
    causal: query i sees the keys j with start[0] + j <= i + start[1].
    shape: (Nq, Nk), of the whole or of a block.
    start: the block's first key, and its first query plus the offset.
  """
  seen = None if key_valid is None else key_valid[:, None, None]
  if causal:
    rows = start[1] + jnp.arange(shape[0])[:, None]
    columns = start[0] + jnp.arange(shape[1])[None]
    past = (columns <= rows)[None, None]
    seen = past if seen is None else seen & past
  return seen
