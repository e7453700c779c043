"""Attention on TPU: the Pallas kernels of splash attention (jax.experimental.pallas).

Scores live in the chip's vector memory only. What is ours: sizes of blocks, tokens
that no block divides, keys that are not there, and queries without any key.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from vjepa_jax.nn.naive import SAVED

_LANES = 128  # of a vector register; every block is a multiple


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    key_valid: jax.Array | None,
    causal: bool,
    offset: int | jax.Array,
    chunk: int,
    interpret: bool = False,
) -> jax.Array:
  """Returns what `naive.attend` returns, [B, H, Nq, d], on one TPU.

  Tokens are padded to whole blocks. Masks take vector instructions for each score,
  so that none is made where none is needed.

  Args:
    q: [B, H, Nq, d].
    k: [B, H, Nk, d].
    v: [B, H, Nk, d].
    key_valid: bool [B, Nk]; None: all.
    causal: query i sees the keys up to i + offset.
    offset: may be traced; then also blocks of which nothing is seen are computed.
    chunk: not read, blocks follow from the sizes.
    interpret: run the kernels without a TPU.
  """
  queries, keys = q.shape[2], k.shape[2]
  if causal and isinstance(offset, int) and offset < 0:
    # The first queries see nothing; the kernels want a key for each.
    blind = min(-offset, queries)
    out = jnp.zeros_like(q[:, :, :blind])
    if blind < queries:
      rest = attend(
          q[:, :, blind:], k, v, key_valid=key_valid, causal=True,
          offset=offset + blind, chunk=chunk, interpret=interpret,
      )
      out = jnp.concatenate([out, rest], axis=2)
    return out
  blocks = choose_blocks(queries, keys, q.shape[3], q.dtype, masked=False)
  if key_valid is not None or (blocks.keys > keys and not causal):
    blocks = choose_blocks(queries, keys, q.shape[3], q.dtype, masked=True)
  kernel = _kernel(q.shape[1], blocks, causal, offset, interpret)
  q = q * jnp.asarray(1.0 / math.sqrt(q.shape[3]), q.dtype)
  q = _padded(q, blocks.queries)
  k, v = _padded(k, blocks.keys), _padded(v, blocks.keys)
  ids, axes = _segments(key_valid, keys, blocks, causal)
  out = jax.vmap(kernel, in_axes=(0, 0, 0, axes))(q, k, v, ids)[:, :, :queries]
  if key_valid is None and (not causal or isinstance(offset, int)):
    return out
  sees = _sees_any(key_valid, keys, causal, queries, offset)
  return jnp.where(sees[:, None, :, None], out, 0)


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Padded numbers of tokens, and what of them is in vector memory at a time.

  Attributes:
    queries: Nq, padded to whole blocks.
    keys: Nk, padded to whole blocks.
    query: queries of a block, forward.
    query_backward: queries of a block, backward.
    key: keys whose scores are computed at a time.
    key_memory: keys that are held, forward; a multiple of `key`.
    key_memory_backward: keys that are held, backward; a multiple of `key`.
    fused: whether one kernel makes all gradients, with five products of matrices in
      place of seven. Each share of the keys that is held leaves gradients of all
      queries, which are then summed: not for more than four shares.
  """

  queries: int
  keys: int
  query: int
  query_backward: int
  key: int
  key_memory: int
  key_memory_backward: int
  fused: bool


def choose_blocks(
    queries: int, keys: int, head: int, dtype: Any, masked: bool
) -> Blocks:
  """Chooses blocks that fit into the 16 MiB of vector memory that kernels get.

  The limits were found by compiling for v4, v5e and v6e.

  Args:
    queries: Nq.
    keys: Nk.
    head: d.
    dtype: of q, k and v.
    masked: whether keys carry ids, which are as wide as a head of 128.
  """
  bytes_a_row = -(-head // _LANES) * _LANES * jnp.dtype(dtype).itemsize
  most = lambda size: max(size * 256 // max(bytes_a_row, 256) // _LANES, 1) * _LANES
  padded_queries, query = _query_block(queries, most(1024))
  held = most(2304 if masked else 3072)
  padded_keys, key, held = _key_blocks(keys, most(896), held)
  return Blocks(
      queries=padded_queries,
      keys=padded_keys,
      query=query,
      query_backward=query if query <= 512 or query % 256 else query // 2,
      key=key,
      key_memory=_largest_divisor(held, max(most(1024), key), key),
      key_memory_backward=held,
      fused=padded_keys // held <= 4,
  )


def _query_block(tokens: int, most: int) -> tuple[int, int]:
  """Returns the padded queries and their block: little padding, large blocks.

  All keys are read once a block. The backward pass wants at most 640, so that larger
  blocks must have whole halves.
  """
  sizes = [n for n in _multiples(_LANES, most) if n <= 640 or n % 256 == 0]
  cost = lambda block: -(-tokens // block) * block * (1 + (_LANES / block) ** 2)
  block = min(sizes, key=cost)
  return -(-tokens // block) * block, block


def _key_blocks(tokens: int, most: int, most_held: int) -> tuple[int, int, int]:
  """Returns the padded keys, those computed and those held at a time.

  The gradients that a share leaves take as long as 70 keys (v4, by arithmetic).
  """
  choices = []
  for held in _multiples(_LANES, most_held):
    shares = -(-tokens // held)
    block = _largest_divisor(held, most, _LANES)
    cost = shares * held * (1 + 0.1 * _LANES / block) + 70 * shares
    choices.append((cost, shares * held, block, held))
  return min(choices)[1:]


def _multiples(unit: int, most: int) -> range:
  return range(unit, most + 1, unit)


def _largest_divisor(size: int, most: int, unit: int) -> int:
  """The largest multiple of `unit`, at most `most`, that divides `size`."""
  return max(n for n in _multiples(unit, most) if size % n == 0)


def _padded(x, tokens):
  return jnp.pad(x, ((0, 0), (0, 0), (0, tokens - x.shape[2]), (0, 0)))


def _segments(key_valid, keys, blocks, causal):
  """Segment 1 is seen by all; returns the ids and their axes for vmap, or Nones.

  Causality hides the invented keys, which come last, from all real queries.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

  if key_valid is None and (causal or keys == blocks.keys):
    return None, None
  q_ids = jnp.ones(blocks.queries, jnp.int32)
  if key_valid is None:
    k_ids = (jnp.arange(blocks.keys) < keys).astype(jnp.int32)
    return SegmentIds(q_ids, k_ids), SegmentIds(None, None)
  k_ids = jnp.pad(key_valid.astype(jnp.int32), ((0, 0), (0, blocks.keys - keys)))
  return SegmentIds(q_ids, k_ids), SegmentIds(None, 0)


def _sees_any(key_valid, keys, causal, queries, offset):
  """Which queries see a key at all: bool [B or 1, Nq]."""
  if key_valid is None:
    key_valid = jnp.ones((1, keys), bool)
  if not causal:
    return key_valid.any(axis=1, keepdims=True)
  first = key_valid.argmax(axis=1)[:, None]
  rows = jnp.arange(queries)[None] + offset
  return (first <= rows) & key_valid.any(axis=1, keepdims=True)


def _kernel(heads, blocks, causal, offset, interpret):
  """Returns the kernel (q, k, v [H, N, d], segments) -> [H, Nq, d]."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  dq = {} if blocks.fused else dict(
      block_q_dq=blocks.query_backward, block_kv_dq=blocks.key_memory
  )
  sizes = splash.BlockSizes(
      block_q=blocks.query, block_kv=blocks.key_memory, block_kv_compute=blocks.key,
      block_q_dkv=blocks.query_backward, block_kv_dkv=blocks.key_memory_backward,
      block_kv_dkv_compute=blocks.key, use_fused_bwd_kernel=blocks.fused, **dq,
  )
  shape = blocks.queries, blocks.keys
  static = causal and isinstance(offset, int)
  mask = splash.CausalMask(shape, offset) if static else splash.FullMask(shape)
  kernel = splash.make_splash_mha(
      splash.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1,
      q_seq_shards=1, residual_checkpoint_name=SAVED, interpret=interpret,
  )
  return kernel if static or not causal else _with_causality(kernel, blocks, offset)


def _with_causality(kernel, blocks, offset):
  """Replaces a full mask by causality whose offset is known on the device only."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
      splash_attention_mask_info as infos,
  )

  rows = jnp.arange(blocks.queries, dtype=jnp.int32) + offset
  info = infos.MaskInfo(None, None, None, None, q_sequence=rows)
  options = kernel.kwargs | dict(mask_function=lambda query, key: query >= key)
  return type(kernel)(info, None if blocks.fused else info, info, **options)
