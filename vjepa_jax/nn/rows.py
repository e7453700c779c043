"""Attention for a CPU: whole rows of scores, as many at a time as a cache holds.

A few heads and a block of their queries are taken at a time, with all their keys, so
that a softmax needs no second look; the backward pass computes the scores again. On
a CPU writing scores to memory costs more than computing them, and that is most of
what `naive.attend` does.
"""

import functools
import math

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from vjepa_jax.nn.naive import MINUS_INFINITY, SAVED, seen_keys

# Scores at a time: 1 MiB of float32, what a core's second-level cache holds.
_SCORES = 2**18


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

  Products are float32 whatever the type of q: a CPU is slower at others.

  Args:
    q: [B, H, Nq, d].
    k: [B, H, Nk, d].
    v: [B, H, Nk, d].
    key_valid: bool [B, Nk]; None: all.
    causal: query i sees the keys up to i + offset.
    offset: may be traced.
    chunk: most queries of a block.
  """
  dtype, (b, h, queries, width) = q.dtype, q.shape
  keys = k.shape[2]
  group, block = _sizes(b * h, queries, keys, chunk)
  if key_valid is not None:
    key_valid = jnp.repeat(key_valid, h, axis=0).reshape(-1, group, keys)
  in_groups = lambda x: x.astype(jnp.float32).reshape(-1, group, *x.shape[2:])
  # Invented queries are cut off the output, so that their gradient is zero.
  pad = [(0, 0)] * 2 + [(0, -queries % block), (0, 0)]
  q = jnp.pad(in_groups(q) / math.sqrt(width), pad)
  offset = jnp.asarray(offset, jnp.int32)
  out = _attend(q, in_groups(k), in_groups(v), key_valid, offset, causal, block)
  return out[:, :, :queries].reshape(b, h, queries, width).astype(dtype)


def _sizes(heads: int, queries: int, keys: int, chunk: int) -> tuple[int, int]:
  """Heads and queries of a block; even shares, so that little is invented."""
  most = max(1, min(chunk, _SCORES // keys))
  block = -(-queries // -(-queries // most))
  most = max(1, _SCORES // (block * keys))
  return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most), block


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, key_valid, offset, causal, block):
  return _forward(q, k, v, key_valid, offset, causal, block)[0]


def _forward(q, k, v, key_valid, offset, causal, block):
  """Maps groups of heads [n, G, N, d]; also returns what the backward pass keeps."""

  def one_group(given):
    q, k, v, valid = given

    def one_block(given):
      start, q = given
      scores = jnp.einsum("gqd,gkd->gqk", q, k)
      seen = _seen(valid, causal, scores.shape, start + offset)
      if seen is not None:
        scores = jnp.where(seen, scores, MINUS_INFINITY)
      top = scores.max(-1)
      weights = _hidden(jnp.exp(scores - top[..., None]), seen)
      total = weights.sum(-1)
      total = jnp.where(total > 0, total, 1.0)  # Of a row without keys.
      mixed = jnp.einsum("gqk,gkd->gqd", weights, v)
      return mixed / total[..., None], top + jnp.log(total)

    return jax.lax.map(one_block, _cut(q, block))

  out, log_total = jax.lax.map(one_group, (q, k, v, key_valid))
  out, log_total = checkpoint_name(out, SAVED), checkpoint_name(log_total, SAVED)
  return _join(out), (q, k, v, key_valid, offset, out, log_total)


def _backward(causal, block, residuals, d_out):
  q, k, v, key_valid, offset, out, log_total = residuals
  blocks = d_out.reshape(*d_out.shape[:2], -1, block, d_out.shape[-1])
  d_out = jnp.moveaxis(blocks, 2, 1)  # [n, blocks, G, block, d]
  dots = (d_out * out).sum(-1)

  def one_group(given):
    q, k, v, valid, d_out, log_total, dots = given

    def one_block(carry, given):
      start, q, d_out, log_total, dots = given
      scores = jnp.einsum("gqd,gkd->gqk", q, k)
      seen = _seen(valid, causal, scores.shape, start + offset)
      weights = _hidden(jnp.exp(scores - log_total[..., None]), seen)
      d_weights = jnp.einsum("gqd,gkd->gqk", d_out, v)
      d_scores = weights * (d_weights - dots[..., None])
      d_k, d_v = carry
      # Transposed [G, d, Nk]: a product whose long operand must be transposed first
      # runs at a third of the speed.
      d_v += jnp.einsum("gqd,gqk->gdk", d_out, weights)
      d_k += jnp.einsum("gqd,gqk->gdk", q, d_scores)
      return (d_k, d_v), jnp.einsum("gqk,gkd->gqd", d_scores, k)

    zeros = jnp.zeros((k.shape[0], k.shape[2], k.shape[1]))
    parts = (*_cut(q, block), d_out, log_total, dots)
    (d_k, d_v), d_q = jax.lax.scan(one_block, (zeros, zeros), parts)
    # Else the compiler joins a loop of one trip with the transposition to come.
    return d_q, *jax.lax.optimization_barrier((d_k, d_v))

  d_q, d_k, d_v = jax.lax.map(
      one_group, (q, k, v, key_valid, d_out, log_total, dots)
  )
  return _join(d_q), d_k.swapaxes(2, 3), d_v.swapaxes(2, 3), None, None


_attend.defvjp(_forward, _backward)


def _seen(valid, causal, shape, first):
  """Which keys a block of queries may see: bool [G or 1, Nq or 1, Nk], or None."""
  seen = seen_keys(valid, causal, shape[1:], (0, first))
  return None if seen is None else seen[:, 0]


def _hidden(weights, seen):
  return weights if seen is None else jnp.where(seen, weights, 0.0)


def _cut(q, block):
  """[G, N, d] -> first queries [n], blocks [n, G, block, d]."""
  blocks = q.reshape(q.shape[0], -1, block, q.shape[-1])
  return jnp.arange(0, q.shape[1], block), jnp.moveaxis(blocks, 1, 0)


def _join(blocks):
  """[groups, n, G, block, d] -> [groups, G, N, d]."""
  x = jnp.moveaxis(blocks, 1, 2)
  return x.reshape(*x.shape[:2], -1, x.shape[-1])
