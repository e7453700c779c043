"""Pre-norm transformer blocks, scanned over depth."""

from collections.abc import Callable, Mapping
import difflib
import math
from typing import Any

from flax import linen as nn
import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp

from vjepa_jax.nn import cudnn, placement
from vjepa_jax.nn import positions as positions_lib
from vjepa_jax.nn.attention import (
    IMPLEMENTATIONS,
    INITIALIZERS,
    SAVED,
    MultiHeadAttention,
    of_process,
    scaled,
)
from vjepa_jax.nn.positions import Rope
from vjepa_jax.nn.received import COLLECTION

REMAT = ("none", "full", "attention")
DTYPES = ("float32", "bfloat16", "float16")


def layer_norm(
    name: str | None = None, eps: float = 1e-6, dtype: str = "float32"
) -> nn.LayerNorm:
  """Returns the LayerNorm of all our models: affine, computed in float32.

  Args:
    name: of the module.
    eps: added to the variance.
    dtype: of what it is given. The variance E[x^2] - E[x]^2 takes one pass over it
      where two are exact, and loses digits where it is small: only for types that
      have fewer digits to lose.
  """
  return nn.LayerNorm(
      epsilon=eps, dtype=jnp.float32, use_fast_variance=_is_short(dtype), name=name
  )


def gelu(x: jax.Array) -> jax.Array:
  """Returns GELU, x Phi(x), and its slope to a gradient.

  In float32 by way of erf. Types of 16 bits take a tanh of a polynomial of degree 5,
  which a TPU has in hardware: off by at most 2.6e-5, half a unit in bfloat16's last
  place where GELU is 0.007, and more of them nearer to zero. The slope is computed
  together with the value, so that the backward pass need not visit x again.
  """
  return _gelu(x)


@jax.custom_jvp
def _gelu(x):
  return _apart(_gelu_and_slope(x)[0])


@_gelu.defjvp
def _gelu_jvp(primals, tangents):
  out, slope = _apart(_gelu_and_slope(primals[0]))
  return out, (slope * tangents[0]).astype(out.dtype)


def _gelu_and_slope(x):
  x32 = x.astype(jnp.float32)
  if _is_short(x.dtype):
    # Least largest error of x (1 + tanh(a x + b x^3 + c x^5)) / 2.
    a, b, c = 0.797508, 0.0370056, -0.000351517
    square = jnp.minimum(x32 * x32, 36.0)  # beyond it the polynomial falls again
    half = 0.5 + 0.5 * jnp.tanh(x32 * (a + square * (b + square * c)))
    rise = 2.0 * half * (1.0 - half) * (a + square * (3.0 * b + square * 5.0 * c))
  else:
    half = 0.5 + 0.5 * jax.lax.erf(x32 * math.sqrt(0.5))
    rise = jnp.exp(-0.5 * x32 * x32) / math.sqrt(2.0 * math.pi)
  return (x32 * half).astype(x.dtype), (half + x32 * rise).astype(x.dtype)


def _apart(values):
  """Keeps the compiler from computing the values anew for each block of a product."""
  return jax.lax.optimization_barrier(values)


def _is_short(dtype) -> bool:
  return jnp.dtype(dtype).itemsize < 4


def default_heads(
    width: int, heads: int | None = None, otherwise: int | None = None
) -> int:
  """Returns the number of heads: 128 wide wherever the width allows it.

  A TPU's matrix unit is 128 x 128; narrower heads leave it idle in proportion.

  Args:
    width: D.
    heads: taken as it is where given.
    otherwise: heads where D is no multiple of 128; None: 64 wide, or the widest
      power of two below that divides D.

  Raises:
    ValueError: if D is not a multiple of the number of heads.
  """
  if heads is None:
    fits = [size for size in (64, 32, 16, 8) if width % size == 0]
    if width % 128 == 0:
      heads = width // 128
    elif otherwise is not None:
      heads = otherwise
    elif fits:
      heads = width // fits[0]
    else:
      raise ValueError(
          f"width {width} is a multiple of no usual head width (128, 64, 32, 16, 8); "
          "say heads="
      )
  if heads < 1 or width % heads:
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    nearest = sorted(sorted(divisors, key=lambda n: abs(n - heads))[:2])
    raise ValueError(
        f"width {width} is not a multiple of heads {heads}; nearest "
        f"{' or '.join(map(str, nearest))}"
    )
  return heads


def stack_faults(
    options: Mapping[str, Any],
    *,
    positions: tuple[str, ...],
    otherwise: int | None = None,
) -> list[str]:
  """Says what is wrong with the keywords of a module made of a `Stack`.

  Args:
    options: `width`, and what is given of heads, depth, drop_path, attention,
      attention_chunk, remat, unroll, initializer, dtype, positions and rope_*.
    positions: names that the module knows, its default first.
    otherwise: of `default_heads`.

  Returns:
    One sentence a fault; an empty list is well.
  """
  faults = []
  for name, known in (
      ("attention", IMPLEMENTATIONS), ("remat", REMAT), ("dtype", DTYPES),
      ("initializer", tuple(INITIALIZERS)), ("positions", positions),
      ("rope_layout", positions_lib.LAYOUTS), ("rope_units", positions_lib.UNITS),
  ):
    if options.get(name, known[0]) not in known:
      faults.append(f"{name} {options[name]!r} is none of {', '.join(known)}")
  for name in ("depth", "unroll", "attention_chunk"):
    if options.get(name, 1) < 1:
      faults.append(f"{name} {options[name]} must be at least 1")
  if not 0.0 <= options.get("drop_path", 0.0) < 1.0:
    faults.append(f"drop_path {options['drop_path']} must be in [0, 1)")
  try:
    default_heads(options["width"], options.get("heads"), otherwise)
  except ValueError as error:
    faults.append(str(error))
  return faults + _rope_faults(options, positions[0])


def _rope_faults(options: Mapping[str, Any], default: str) -> list[str]:
  """Units and reference of positions belong together."""
  units, reference = options.get("rope_units", "index"), options.get("rope_reference")
  if units == "mm" and options.get("positions", default) != "rope":
    return [f"rope_units 'mm' is read by positions 'rope' only, not {options['positions']!r}"]
  if units == "mm" and options.get("rope_layout") == "vjepa2":
    return ["rope_layout 'vjepa2' knows rope_units 'index' only, got 'mm'"]
  if units == "mm" and (reference is None or len(reference) != 4 or min(reference) <= 0):
    return [
        f"rope_units 'mm' needs rope_reference=(s, mm, mm, mm), positive: what "
        f"counts as one step along T, Z, Y, X; got {reference}"
    ]
  if units == "index" and reference is not None:
    return [f"rope_reference {reference} is read with rope_units 'mm' only"]
  return []


class Mlp(nn.Module):
  """The feed-forward half of a block.

  Attributes:
    width: D.
    ratio: hidden width over D.
    swiglu: silu(fc1 x) * fc2 x -> fc3, the hidden width cut to 2/3 and rounded up
      to a multiple of 8, instead of gelu(fc1 x) -> fc2 (V-JEPA 2's wide_silu).
    dtype: compute type.
    initializer: a name in INITIALIZERS.
    out_scale: factor on the initial output weights; may be traced.
  """

  width: int
  ratio: float = 4.0
  swiglu: bool = False
  dtype: str = "float32"
  initializer: str = "vjepa"
  out_scale: float | jax.Array = 1.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps each token of [B, N, D] on its own."""
    draw = INITIALIZERS[self.initializer]
    dense = lambda width, name, draw=draw: nn.Dense(
        width, dtype=jnp.dtype(self.dtype), kernel_init=draw, name=name,
        promote_dtype=placement.promote,
    )
    hidden = int(self.width * self.ratio)
    out = scaled(draw, self.out_scale)
    if self.swiglu:
      hidden = -(-(hidden * 2 // 3) // 8) * 8
      x = nn.silu(dense(hidden, "fc1")(x)) * dense(hidden, "fc2")(x)
      return dense(self.width, "fc3", out)(x)
    x = gelu(dense(hidden, "fc1")(x))
    return dense(self.width, "fc2", out)(x)


def branch_scale(initializer: str, layer: int | jax.Array) -> float | jax.Array:
  """Returns the factor on a branch's initial output weights in the l-th block.

  "vjepa" divides by sqrt(2 l), l from 1, "xavier" does not.
  """
  if initializer != "vjepa":
    return 1.0
  return jax.lax.rsqrt(2.0 * (jnp.asarray(layer, jnp.float32) + 1.0))


def drop_path(key: jax.Array, y: jax.Array, rate: float | jax.Array) -> jax.Array:
  """Drops whole samples of [B, ...] and scales the others up (arXiv:1603.09382)."""
  kept = 1.0 - jnp.asarray(rate, jnp.float32)
  keep = jax.random.bernoulli(key, kept, (y.shape[0],) + (1,) * (y.ndim - 1))
  return jnp.where(keep, y / kept, 0.0).astype(y.dtype)


class Block(nn.Module):
  """x += attention(norm(x)); x += mlp(norm(x)).

  Attributes:
    width: D.
    heads: H.
    mlp_ratio: hidden width of the MLP over D.
    swiglu: see `Mlp`.
    attention: implementation of `attention.attend`.
    attention_chunk: of `attention.attend`.
    eps: of both norms.
    biases: of the attention's projections, see `MultiHeadAttention`.
    dtype: compute type; parameters, norms and softmax stay float32.
    initializer: "vjepa" also divides the initial weights of both output
      projections by sqrt(2 l) in the l-th block, from 1 (of SwiGLU those of fc3;
      V-JEPA 2 divides fc2, there an input branch); "xavier" does not.
  """

  width: int
  heads: int
  mlp_ratio: float = 4.0
  swiglu: bool = False
  attention: str = "xla"
  attention_chunk: int = 512
  eps: float = 1e-6
  dtype: str = "float32"
  initializer: str = "vjepa"
  biases: str = "qkv"

  @nn.compact
  def __call__(
      self,
      x: jax.Array,
      *,
      layer: int | jax.Array = 0,
      drop_rate: float | jax.Array | None = None,
      rope: Rope | None = None,
      key_valid: jax.Array | None = None,
      class_tokens: int = 0,
  ) -> jax.Array:
    """Maps tokens [B, N, D].

    Args:
      x: [B, N, D].
      layer: which block of the stack, from 0; matters for the initial weights.
      drop_rate: share of samples that skip each half (rng "drop_path"); None: none.
      rope: tables of the tokens' positions.
      key_valid: bool [B, N]; no token attends to those marked False.
      class_tokens: how many of the first tokens are, for "received" of
        `MultiHeadAttention`.
    """
    dtype = jnp.dtype(self.dtype)
    scale = branch_scale(self.initializer, layer)
    shared = dict(dtype=self.dtype, initializer=self.initializer, out_scale=scale)
    y = layer_norm("norm1", self.eps, self.dtype)(x).astype(dtype)
    y = MultiHeadAttention(
        self.width, self.heads, self.attention, self.attention_chunk, **shared,
        biases=self.biases, name="attn",
    )(y, rope=rope, key_valid=key_valid, asking=class_tokens)
    x = x + self._drop(y, drop_rate)
    y = layer_norm("norm2", self.eps, self.dtype)(x).astype(dtype)
    y = Mlp(self.width, self.mlp_ratio, self.swiglu, **shared, name="mlp")(y)
    return x + self._drop(y, drop_rate)

  def _drop(self, y: jax.Array, rate) -> jax.Array:
    return y if rate is None else drop_path(self.make_rng("drop_path"), y, rate)


class Stack(nn.Module):
  """`depth` blocks, compiled once: parameters are stacked under "blocks".

  Attributes:
    width: D.
    depth: number of blocks.
    heads: H.
    mlp_ratio, swiglu, attention, attention_chunk, eps, dtype, initializer, biases:
      see `Block`.
    drop_path: share of samples that skip a half of the last block; grows linearly
      from 0 in the first.
    remat: what the backward pass keeps of a block: "none" everything, "full" only
      its input, "attention" also the output of attention, which is dear to
      compute again.
    unroll: blocks a trip of the loop; more trade compile time for speed.
  """

  width: int
  depth: int
  heads: int
  mlp_ratio: float = 4.0
  swiglu: bool = False
  drop_path: float = 0.0
  attention: str = "xla"
  attention_chunk: int = 512
  remat: str = "none"
  unroll: int = 1
  eps: float = 1e-6
  dtype: str = "float32"
  initializer: str = "vjepa"
  biases: str = "qkv"

  @nn.compact
  def __call__(
      self,
      x: jax.Array,
      *,
      rope: Rope | None = None,
      key_valid: jax.Array | None = None,
      train: bool = False,
      capture: bool = False,
      class_tokens: int = 0,
  ) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Maps tokens [B, N, D].

    Args:
      x: [B, N, D].
      rope: tables of the tokens' positions.
      key_valid: bool [B, N]; no token attends to those marked False.
      train: whether drop-path draws (rng stream "drop_path").
      capture: whether to return also the output of each block, [depth, B, N, D].
      class_tokens: see `Block`.

    Raises:
      ValueError: for an unknown remat or initializer, or drop_path outside [0, 1).
    """
    check_stack(self.remat, self.initializer, self.drop_path)
    block = Block(
        self.width, self.heads, self.mlp_ratio, self.swiglu, self.attention,
        self.attention_chunk, self.eps, self.dtype, self.initializer,
        self.biases, name="blocks",
    )
    drops = train and self.drop_path > 0

    def step(block, x, layer, rope, key_valid):
      x = laid_out(x, self.attention)
      rate = self.drop_path * layer / max(self.depth - 1, 1) if drops else None
      x = block(
          x, layer=layer, drop_rate=rate, rope=rope, key_valid=key_valid,
          class_tokens=class_tokens,
      )
      x = placement.constrain(x, "batch", "tokens", None)
      return x, (x if capture else None)

    scan = nn.scan(
        rematerialized(step, self.remat),
        variable_axes={"params": 0, COLLECTION: 0},
        split_rngs={"params": True, "drop_path": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=self.depth,
        unroll=self.unroll,
    )
    x = placement.constrain(x.astype(jnp.dtype(self.dtype)), "batch", "tokens", None)
    x, outputs = scan(block, x, jnp.arange(self.depth), rope, key_valid)
    return (x, outputs) if capture else x


def laid_out(x: jax.Array, attention: str) -> jax.Array:
  """Keeps channels innermost on a TPU; left alone, the compiler puts tokens there.

  Every product then reads and writes its rows as they lie in memory.

  Args:
    x: [B, N, D] or [B, T, n, D], N or T over the mesh's axis "sequence".
    attention: see `Block`.
  """
  if of_process(attention) != "splash":
    return x
  # By itself a compiler may gather the rows of all devices to lay them out.
  lay_out = lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim))))
  return placement.per_device(lay_out, x, "batch", "tokens", *[None] * (x.ndim - 2))


def check_stack(remat: str, initializer: str, drop_path: float) -> None:
  """Refuses options of a stack that are unknown or out of range.

  Raises:
    ValueError: for an unknown remat or initializer, or drop_path outside [0, 1).
  """
  for what, got, known in (
      ("remat", remat, REMAT), ("initializer", initializer, tuple(INITIALIZERS)),
  ):
    if got not in known:
      nearest = ", ".join(difflib.get_close_matches(str(got), known, 3, 0.0))
      raise ValueError(f"{what}={got!r} is not known; the closest: {nearest}")
  if not 0.0 <= drop_path < 1.0:
    raise ValueError(f"drop_path={drop_path} must lie in [0, 1)")


def rematerialized(step: Callable[..., Any], kind: str) -> Callable[..., Any]:
  """Wraps a scan's step so that it keeps what `kind`, one of REMAT, says."""
  if kind == "none":
    return step
  policy = None
  if kind == "attention":
    policies = jax.checkpoint_policies
    policy = policies.save_from_both_policies(
        policies.save_only_these_names(SAVED), cudnn.keeps_forward
    )
  # Inside a scan the compiler cannot merge the two passes anyway.
  return nn.remat(step, policy=policy, prevent_cse=False)
