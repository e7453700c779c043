"""Attention: one entry, several implementations.

`attend` is the only place that knows how softmax(q k^T) v is computed; a kernel
for one more device is one more row of `_IMPLEMENTATIONS`.
"""

from collections.abc import Callable
import difflib
import functools
import math

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from vjepa_jax.nn.positions import Rope, apply_rope

# V-JEPA 2 draws weights from a normal of std 0.02, cut so far out (100 std) that
# nothing is cut. Small models on a CPU learn sooner from Xavier's.
INITIALIZERS: dict[str, nn.initializers.Initializer] = {
    "vjepa": nn.initializers.normal(0.02),
    "xavier": nn.initializers.xavier_uniform(),
}
# Name of the values that rematerialisation may keep (`blocks.Stack.remat`).
SAVED = "attention_out"
_MINUS_INFINITY = -1e30  # finite, so that a row without any key stays free of NaN


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    key_valid: jax.Array | None = None,
    causal: bool = False,
    impl: str = "xla",
    chunk: int = 512,
) -> jax.Array:
  """Returns softmax(q k^T / sqrt(d)) v, [B, H, Nq, d], in the type of q.

  Scores, softmax and sums are float32. A query that may see no key gets zeros.

  Args:
    q: [B, H, Nq, d].
    k: [B, H, Nk, d].
    v: [B, H, Nk, d].
    key_valid: bool [B, Nk]; no query sees a key marked False.
    causal: query i sees the keys up to i + Nk - Nq.
    impl: "xla" holds the scores [Nq, Nk]; "chunked" never holds more than a
      block of chunk x chunk of them, forward or backward (online softmax:
      Dao et al. 2022, arXiv:2205.14135), at the price of computing them again.
    chunk: queries and keys of a block, for "chunked".

  Raises:
    ValueError: for an unknown impl, shapes that do not agree, or chunk < 1.
  """
  if impl not in _IMPLEMENTATIONS:
    nearest = difflib.get_close_matches(str(impl), _IMPLEMENTATIONS, 3, 0.0)
    raise ValueError(
        f"attention={impl!r} is not known; the closest: {', '.join(nearest)}"
    )
  _check_shapes(q, k, v, key_valid)
  if chunk < 1:
    raise ValueError(f"attention chunk={chunk} must be at least 1")
  return _IMPLEMENTATIONS[impl](q, k, v, key_valid, causal, chunk)


class MultiHeadAttention(nn.Module):
  """Self-attention with separate projections straight to [B, H, N, d].

  One fused projection would be cut along a minor axis of 3 and copied; see V-JEPA
  2's `attn.qkv`, which interop splits.

  Attributes:
    width: D.
    heads: H; D must be a multiple.
    impl: implementation of `attend`.
    chunk: of `attend`.
    dtype: compute type.
    initializer: a name in INITIALIZERS.
    out_scale: factor on the initial output weights; may be traced.
  """

  width: int
  heads: int
  impl: str = "xla"
  chunk: int = 512
  dtype: str = "float32"
  initializer: str = "vjepa"
  out_scale: float | jax.Array = 1.0

  @nn.compact
  def __call__(
      self,
      x: jax.Array,
      *,
      rope: Rope | None = None,
      key_valid: jax.Array | None = None,
  ) -> jax.Array:
    """Attends tokens [B, N, D] among themselves; key_valid bool [B, N]."""
    if self.width % self.heads:
      raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
    head = (self.heads, self.width // self.heads)
    flat = (self.width, self.width)
    draw = INITIALIZERS[self.initializer]
    project = functools.partial(
        nn.Einsum, (self.width, *head), "BND,DHK->BHNK", dtype=jnp.dtype(self.dtype),
        kernel_init=_reshaped(draw, flat),
    )
    q, k, v = (project(name=name)(x) for name in ("query", "key", "value"))
    if rope is not None:
      q, k = apply_rope(q, rope), apply_rope(k, rope)
    x = attend(q, k, v, key_valid=key_valid, impl=self.impl, chunk=self.chunk)
    return nn.Einsum(
        (*head, self.width), "BHNK,HKD->BND", dtype=jnp.dtype(self.dtype),
        kernel_init=_reshaped(draw, flat, self.out_scale), name="out",
    )(x)


def scaled(draw: nn.initializers.Initializer, scale: float | jax.Array):
  """Returns the initializer whose values are `scale` times those of `draw`."""
  return lambda key, shape, dtype=jnp.float32: draw(key, shape, dtype) * scale


def _reshaped(draw, flat, scale=1.0):
  """An initializer that draws a matrix `flat`, whose fans count, and reshapes it."""
  draw = scaled(draw, scale)
  return lambda key, shape, dtype=jnp.float32: draw(key, flat, dtype).reshape(shape)


def _check_shapes(q, k, v, key_valid):
  b, h, _, d = q.shape
  keys = k.shape[2]
  if k.shape != (b, h, keys, d) or v.shape != k.shape:
    raise ValueError(
        f"attend: q {q.shape}, k {k.shape}, v {v.shape} must be [B, H, N, d] with "
        "equal B, H, d, and k and v of equal N"
    )
  if key_valid is not None and key_valid.shape != (b, keys):
    raise ValueError(f"attend: key_valid is {key_valid.shape}, it must be {(b, keys)}")


def _xla(q, k, v, key_valid, causal, chunk):
  del chunk
  scores = _scores(q, k)  # [B, H, Nq, Nk]
  seen = _seen(key_valid, causal, (q.shape[2], k.shape[2]))
  if seen is None:
    weights = jax.nn.softmax(scores, axis=-1)
  else:
    weights = jax.nn.softmax(jnp.where(seen, scores, _MINUS_INFINITY), axis=-1)
    weights = jnp.where(seen, weights, 0.0)
  return checkpoint_name(_mix(weights, v).astype(q.dtype), SAVED)


def _scores(q, k):
  scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
  return scores / math.sqrt(q.shape[-1])


def _mix(weights, v):
  return jnp.einsum(
      "bhqk,bhkd->bhqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
  )


def _seen(key_valid, causal, shape, start=(0, 0), offset=None):
  """Which keys a block of queries may see: bool [B or 1, 1, Nq, Nk], None for all.

  `start` is the block's first query and key; `offset` is Nk - Nq of the whole.
  """
  seen = None if key_valid is None else key_valid[:, None, None]
  if causal:
    offset = shape[1] - shape[0] if offset is None else offset
    rows = start[0] + jnp.arange(shape[0])[:, None]
    columns = start[1] + jnp.arange(shape[1])[None]
    past = (columns <= rows + offset)[None, None]
    seen = past if seen is None else seen & past
  return seen


def _chunked(q, k, v, key_valid, causal, chunk):
  """Pads to whole chunks; invented keys are invalid, invented queries are cut."""
  b, _, queries, _ = q.shape
  keys = k.shape[2]
  sizes = min(chunk, queries), min(chunk, keys)
  if key_valid is None:
    key_valid = jnp.ones((b, keys), bool)
  pad_q, pad_k = -queries % sizes[0], -keys % sizes[1]
  q = jnp.pad(q, ((0, 0), (0, 0), (0, pad_q), (0, 0)))
  k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad_k), (0, 0))) for x in (k, v))
  key_valid = jnp.pad(key_valid, ((0, 0), (0, pad_k)))
  out = _flash(q, k, v, key_valid, causal, sizes, keys - queries)
  return out[:, :, :queries]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _flash(q, k, v, key_valid, causal, sizes, offset):
  return _flash_forward(q, k, v, key_valid, causal, sizes, offset)[0]


def _flash_forward(q, k, v, key_valid, causal, sizes, offset):
  """Returns the output and what the backward pass keeps of it."""
  blocks = _key_blocks(k, v, key_valid, sizes[1])

  def one_query_block(block):
    start_q, q_block = block

    def one_key_block(carry, block):
      start_k, k_block, v_block, valid = block
      top, total, mixed = carry
      scores = _scores(q_block, k_block)
      seen = _seen(valid, causal, sizes, (start_q, start_k), offset)
      new_top = jnp.maximum(top, jnp.max(jnp.where(seen, scores, _MINUS_INFINITY), -1))
      weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
      shrink = jnp.exp(top - new_top)
      total = total * shrink + weights.sum(-1)
      mixed = mixed * shrink[..., None] + _mix(weights, v_block)
      return (new_top, total, mixed), None

    rows = q_block.shape[:-1]
    start = (
        jnp.full(rows, _MINUS_INFINITY), jnp.zeros(rows),
        jnp.zeros(q_block.shape, jnp.float32),
    )
    (top, total, mixed), _ = jax.lax.scan(one_key_block, start, blocks)
    # A row without keys: its total is 0; 1 keeps the quotient 0.
    total = jnp.where(total > 0, total, 1.0)
    return (mixed / total[..., None]).astype(q.dtype), top + jnp.log(total)

  out, log_total = jax.lax.map(one_query_block, _cut(q, sizes[0]))
  out, log_total = _join(out), _join(log_total)
  out, log_total = checkpoint_name(out, SAVED), checkpoint_name(log_total, SAVED)
  return out, (q, k, v, key_valid, out, log_total)


def _flash_backward(causal, sizes, offset, residuals, d_out):
  """Computes each block of weights again from the saved log-sum."""
  q, k, v, key_valid, out, log_total = residuals
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
      seen = _seen(valid, causal, sizes, (start_q, start_k), offset)
      scores = _scores(q_block, k_block)
      weights = jnp.where(seen, jnp.exp(scores - log_block[..., None]), 0.0)
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
  return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


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


_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": _xla,
    "chunked": _chunked,
}
IMPLEMENTATIONS = tuple(_IMPLEMENTATIONS)
