"""Attention by blocks of scores, with a gradient that computes them again.

The online softmax of Dao et al. 2022 (arXiv:2205.14135) in plain jax.numpy: any
device, any number of tokens, and never more than chunk x chunk scores at a time.
"""

import functools
import math

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from vjepa_jax.nn.naive import MINUS_INFINITY, SAVED, mix, scores, seen_keys


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
  """Returns what `naive.attend` returns, [B, H, Nq, d].

  Args:
    q: [B, H, Nq, d].
    k: [B, H, Nk, d].
    v: [B, H, Nk, d].
    key_valid: bool [B, Nk]; None: all.
    causal: query i sees the keys up to i + offset.
    offset: may be traced.
    chunk: queries and keys of a block.
  """
  b, _, queries, _ = q.shape
  keys = k.shape[2]
  sizes = min(chunk, queries), min(chunk, keys)
  # Whole chunks: invented keys are invalid, invented queries are cut.
  if key_valid is None:
    key_valid = jnp.ones((b, keys), bool)
  pad_q, pad_k = -queries % sizes[0], -keys % sizes[1]
  q = jnp.pad(q, ((0, 0), (0, 0), (0, pad_q), (0, 0)))
  k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad_k), (0, 0))) for x in (k, v))
  key_valid = jnp.pad(key_valid, ((0, 0), (0, pad_k)))
  offset = jnp.asarray(offset, jnp.int32)
  return _flash(q, k, v, key_valid, offset, causal, sizes)[:, :, :queries]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _flash(q, k, v, key_valid, offset, causal, sizes):
  return _flash_forward(q, k, v, key_valid, offset, causal, sizes)[0]


def _flash_forward(q, k, v, key_valid, offset, causal, sizes):
  """Returns the output and what the backward pass keeps of it."""
  blocks = _key_blocks(k, v, key_valid, sizes[1])

  def one_query_block(block):
    start_q, q_block = block

    def one_key_block(carry, block):
      start_k, k_block, v_block, valid = block
      top, total, mixed = carry
      block_scores = scores(q_block, k_block)
      seen = seen_keys(valid, causal, sizes, (start_k, start_q + offset))
      highest = jnp.max(jnp.where(seen, block_scores, MINUS_INFINITY), -1)
      new_top = jnp.maximum(top, highest)
      weights = jnp.where(seen, jnp.exp(block_scores - new_top[..., None]), 0.0)
      shrink = jnp.exp(top - new_top)
      total = total * shrink + weights.sum(-1)
      mixed = mixed * shrink[..., None] + mix(weights, v_block)
      return (new_top, total, mixed), None

    rows = q_block.shape[:-1]
    start = (
        jnp.full(rows, MINUS_INFINITY), jnp.zeros(rows),
        jnp.zeros(q_block.shape, jnp.float32),
    )
    (top, total, mixed), _ = jax.lax.scan(one_key_block, start, blocks)
    # A row without keys: its total is 0; 1 keeps the quotient 0.
    total = jnp.where(total > 0, total, 1.0)
    return (mixed / total[..., None]).astype(q.dtype), top + jnp.log(total)

  out, log_total = jax.lax.map(one_query_block, _cut(q, sizes[0]))
  out, log_total = _join(out), _join(log_total)
  out, log_total = checkpoint_name(out, SAVED), checkpoint_name(log_total, SAVED)
  return out, (q, k, v, key_valid, offset, out, log_total)


def _flash_backward(causal, sizes, residuals, d_out):
  """Computes each block of weights again from the saved log-sum."""
  q, k, v, key_valid, offset, out, log_total = residuals
  dots = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)  # [B, H, N]
  query_blocks = _cut(q, sizes[0]) + tuple(
      _cut(x, sizes[0])[1] for x in (d_out, log_total, dots)
  )
  scale = 1.0 / math.sqrt(q.shape[-1])

  def one_key_block(d_q, block):
    start_k, k_block, v_block, valid = block

    def one_query_block(carry, block):
      d_k, d_v = carry
      start_q, q_block, d_out_block, log_block, dot_block = block
      seen = seen_keys(valid, causal, sizes, (start_k, start_q + offset))
      block_scores = scores(q_block, k_block)
      weights = jnp.where(seen, jnp.exp(block_scores - log_block[..., None]), 0.0)
      d_v += _product("bhqk,bhqd->bhkd", weights, d_out_block)
      d_weights = _product("bhqd,bhkd->bhqk", d_out_block, v_block)
      d_scores = weights * (d_weights - dot_block[..., None]) * scale
      d_k += _product("bhqk,bhqd->bhkd", d_scores, q_block)
      return (d_k, d_v), _product("bhqk,bhkd->bhqd", d_scores, k_block)

    zeros = jnp.zeros(k_block.shape, jnp.float32)
    (d_k, d_v), d_q_blocks = jax.lax.scan(one_query_block, (zeros, zeros), query_blocks)
    return d_q + d_q_blocks, (d_k, d_v)

  d_q = jnp.zeros(query_blocks[1].shape, jnp.float32)
  d_q, (d_k, d_v) = jax.lax.scan(
      one_key_block, d_q, _key_blocks(k, v, key_valid, sizes[1])
  )
  d_q, d_k, d_v = _join(d_q), _join(d_k), _join(d_v)
  return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _product(equation, a, b):
  return jnp.einsum(equation, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _cut(x, size):
  """[B, H, N, ...] -> starts [n], blocks [n, B, H, size, ...]."""
  b, h, tokens = x.shape[:3]
  blocks = x.reshape(b, h, tokens // size, size, *x.shape[3:])
  return jnp.arange(0, tokens, size), jnp.moveaxis(blocks, 2, 0)


def _join(blocks):
  """[n, B, H, size, ...] -> [B, H, N, ...]."""
  x = jnp.moveaxis(blocks, 0, 2)
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _key_blocks(k, v, key_valid, size):
  starts, k = _cut(k, size)
  valid = jnp.moveaxis(key_valid.reshape(key_valid.shape[0], -1, size), 1, 0)
  return starts, k, _cut(v, size)[1], valid
