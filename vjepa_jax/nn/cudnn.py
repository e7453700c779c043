"""Attention on NVIDIA GPUs: cuDNN's flash attention, as jax.nn offers it."""

import functools
from typing import Any

from absl import logging
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from vjepa_jax.nn import chunked
from vjepa_jax.nn.naive import SAVED

DTYPES = ("bfloat16", "float16")


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
  """Returns what `naive.attend` returns, [B, H, Nq, d], on one GPU.

  cuDNN knows how many keys a row has, not which: valid keys are moved to the front,
  whose order nobody sees. What it does not take (`refusal`) is computed by
  `chunked.attend`, and said once in the log.

  Args:
    q: [B, H, Nq, d].
    k: [B, H, Nk, d].
    v: [B, H, Nk, d].
    key_valid: bool [B, Nk]; None: all.
    causal: query i sees the keys up to i + offset.
    offset: may be traced.
    chunk: of `chunked.attend`.

  Raises:
    RuntimeError: there is no cuDNN on this host (JAX).
  """
  reason = refusal(
      q.dtype, q.shape[3], masked=key_valid is not None, causal=causal, offset=offset
  )
  if reason:
    _tell(reason)
    return chunked.attend(
        q, k, v, key_valid=key_valid, causal=causal, offset=offset, chunk=chunk
    )
  counts = None
  if key_valid is not None:
    order = jnp.argsort(~key_valid, axis=1, stable=True)[:, None, :, None]
    k, v = (jnp.take_along_axis(x, order, axis=2) for x in (k, v))
    counts = key_valid.sum(axis=1, dtype=jnp.int32)
  wide = lambda x: x.swapaxes(1, 2)  # [B, N, H, d]
  out = wide(jax.nn.dot_product_attention(
      wide(q), wide(k), wide(v), is_causal=causal, implementation="cudnn",
      # A row without keys is given one, and is cleared.
      key_value_seq_lengths=None if counts is None else jnp.maximum(counts, 1),
  ))
  if counts is not None:
    out = jnp.where(counts[:, None, None, None] > 0, out, 0)
  return checkpoint_name(out, SAVED)


def refusal(
    dtype: Any, head: int, *, masked: bool, causal: bool, offset: int | jax.Array
) -> str | None:
  """Says why cuDNN cannot compute this attention; None where it can.

  Args:
    dtype: of q, k and v.
    head: d.
    masked: whether there is a key_valid.
    causal: whether later keys are hidden.
    offset: keys before the first query's own; may be traced.
  """
  if jnp.dtype(dtype).name not in DTYPES:
    return f"it computes in {' or '.join(DTYPES)}, not in {jnp.dtype(dtype).name}"
  if head > 128 or head % 8:
    return f"heads must be a multiple of 8 and at most 128 wide, these are {head}"
  if causal and masked:
    return "causality goes with no mask of keys"
  if causal and not (isinstance(offset, int) and offset == 0):
    return "causality wants as many queries as keys, all on one device"
  return None


def keeps_forward(primitive: Any, *_: Any, **__: Any) -> bool:
  """A rematerialisation policy: keep what cuDNN's forward pass returns.

  Its log-sums have no name, so that a policy by names alone runs it again.
  """
  return primitive.name.startswith("dot_product_attention_fwd")


@functools.cache
def _tell(reason: str) -> None:
  logging.warning("attention: not by cuDNN but in chunks: %s", reason)
