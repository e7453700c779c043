"""Attention: one entry, several implementations.

`attend` is the only place that knows how softmax(q k^T) v is computed; a kernel
for one more device is one more row of `_IMPLEMENTATIONS`.
"""

from collections.abc import Callable
import difflib
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.nn import chunked, cudnn, naive, on_mesh, placement, rows, splash
from vjepa_jax.nn.naive import SAVED as SAVED
from vjepa_jax.nn.positions import Rope, apply_rope
from vjepa_jax.nn.received import COLLECTION, received

# V-JEPA 2 draws weights from a normal of std 0.02, cut so far out (100 std) that
# nothing is cut. Small models on a CPU learn sooner from Xavier's.
INITIALIZERS: dict[str, nn.initializers.Initializer] = {
    "vjepa": nn.initializers.normal(0.02),
    "xavier": nn.initializers.xavier_uniform(),
}


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
      Dao et al. 2022, arXiv:2205.14135), at the price of computing them again;
      "rows" holds the scores of whole rows of queries, as many as a CPU's cache
      holds; "splash" and "cudnn" are kernels for TPU and NVIDIA GPUs; "auto" is the
      one for the devices that this process has.
    chunk: queries and keys of a block, for "chunked" and "rows".

  Raises:
    ValueError: for an unknown impl, shapes that do not agree, or chunk < 1.
  """
  _check_known("attention", impl, IMPLEMENTATIONS)
  _check_shapes(q, k, v, key_valid)
  if chunk < 1:
    raise ValueError(f"attention chunk={chunk} must be at least 1")
  impl = of_process(impl)
  if impl == "auto":
    few = q.shape[2] * k.shape[2] <= _FEW_SCORES
    impl = "xla" if few else "rows"
  function, opaque = _IMPLEMENTATIONS[impl]
  local = lambda q, k, v, key_valid, offset: function(
      q, k, v, key_valid=key_valid, causal=causal, offset=offset, chunk=chunk
  )
  return on_mesh.attend(local, q, k, v, key_valid, opaque=opaque)


def attend_within(
    q: jax.Array, k: jax.Array, v: jax.Array, *, impl: str = "xla", chunk: int = 512
) -> jax.Array:
  """Returns what `attend` returns for each group on its own, [B, G, H, N, d].

  Groups of up to 128 tokens are computed by "xla" whatever `impl` is: kernels work
  in blocks of 128, and so few scores cost little to hold.

  Args:
    q: [B, G, H, N, d].
    k: [B, G, H, N, d].
    v: [B, G, H, N, d].
    impl: of `attend`.
    chunk: of `attend`.

  Raises:
    ValueError: for an unknown impl, shapes that do not agree, or chunk < 1.
  """
  _check_known("attention", impl, IMPLEMENTATIONS)
  if q.ndim != 5 or q.shape != k.shape or q.shape != v.shape:
    raise ValueError(
        f"attend_within: q {q.shape}, k {k.shape}, v {v.shape} must be equal and "
        "[B, G, H, N, d]"
    )
  if chunk < 1:
    raise ValueError(f"attention chunk={chunk} must be at least 1")
  few = q.shape[3] ** 2 <= _FEW_SCORES
  impl = "xla" if few else of_process(impl)
  function, opaque = _IMPLEMENTATIONS["rows" if impl == "auto" else impl]

  def local(q, k, v):
    rows = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out = function(*rows, key_valid=None, causal=False, offset=0, chunk=chunk)
    return out.reshape(q.shape)

  return on_mesh.attend_within(local, q, k, v, opaque=opaque)


def for_platform(platform: str) -> str:
  """Returns the implementation that "auto" stands for on a platform.

  On a CPU it stays "auto": there the number of tokens decides.

  Args:
    platform: "tpu", "gpu", "cuda", "rocm" or "cpu".

  Raises:
    ValueError: for another platform.
  """
  _check_known("platform", platform, tuple(_OF_PLATFORM))
  return _OF_PLATFORM[platform]


def of_process(impl: str) -> str:
  """Returns `impl`, or what "auto" stands for on the devices of this process."""
  return for_platform(jax.default_backend()) if impl == "auto" else impl


class MultiHeadAttention(nn.Module):
  """Self-attention with separate projections straight to [B, H, N, d].

  One fused projection would be cut along a minor axis of 3 and copied; see V-JEPA
  2's `attn.qkv`, which interop splits.

  With `mutable=["attention"]`, `apply` also gives "received", float32 [B, N] or
  [B, G, N], what share of the attention each token gets (`received.received`).

  Attributes:
    width: D.
    heads: H; D must be a multiple.
    impl: implementation of `attend`.
    chunk: of `attend`.
    dtype: compute type.
    initializer: a name in INITIALIZERS.
    out_scale: factor on the initial output weights; may be traced.
    biases: which of "q", "k" and "v" have a bias.
  """

  width: int
  heads: int
  impl: str = "xla"
  chunk: int = 512
  dtype: str = "float32"
  initializer: str = "vjepa"
  out_scale: float | jax.Array = 1.0
  biases: str = "qkv"

  @nn.compact
  def __call__(
      self,
      x: jax.Array,
      *,
      rope: Rope | None = None,
      key_valid: jax.Array | None = None,
      asking: int | None = 0,
  ) -> jax.Array:
    """Attends tokens [B, N, D] among themselves; key_valid bool [B, N].

    Tokens [B, G, N, D] attend within their group; these know neither rope nor
    key_valid. `asking` says how many first tokens' attention "received" is of; 0: of
    all tokens; None: it is not given.
    """
    if self.width % self.heads:
      raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
    head = (self.heads, self.width // self.heads)
    flat = (self.width, self.width)
    draw = INITIALIZERS[self.initializer]
    rows = "BG" if x.ndim == 4 else "B"
    project = functools.partial(
        nn.Einsum, (self.width, *head), f"{rows}ND,DHK->{rows}HNK",
        dtype=jnp.dtype(self.dtype), kernel_init=_reshaped(draw, flat),
        promote_dtype=placement.promote,
    )
    q, k, v = (
        project(name=name, use_bias=name[0] in self.biases)(x)
        for name in ("query", "key", "value")
    )
    if rows == "BG":
      assert rope is None and key_valid is None
    elif rope is not None:
      q, k = apply_rope(q, rope), apply_rope(k, rope)
    looked_at = self.is_mutable_collection(COLLECTION) and not self.is_initializing()
    if looked_at and asking is not None:
      shares = received(q, k, queries=asking, key_valid=key_valid)
      self.sow(COLLECTION, "received", shares)
    if rows == "BG":
      x = attend_within(q, k, v, impl=self.impl, chunk=self.chunk)
    else:
      x = attend(q, k, v, key_valid=key_valid, impl=self.impl, chunk=self.chunk)
    return nn.Einsum(
        (*head, self.width), f"{rows}HNK,HKD->{rows}ND", dtype=jnp.dtype(self.dtype),
        kernel_init=_reshaped(draw, flat, self.out_scale), name="out",
        promote_dtype=placement.promote,
    )(x)


def scaled(draw: nn.initializers.Initializer, scale: float | jax.Array):
  """Returns the initializer whose values are `scale` times those of `draw`."""
  return lambda key, shape, dtype=jnp.float32: draw(key, shape, dtype) * scale


def _reshaped(draw, flat, scale=1.0):
  """An initializer that draws a matrix `flat`, whose fans count, and reshapes it."""
  draw = scaled(draw, scale)
  return lambda key, shape, dtype=jnp.float32: draw(key, flat, dtype).reshape(shape)


def _check_known(what: str, got: str, known: tuple[str, ...]) -> None:
  if got not in known:
    nearest = difflib.get_close_matches(str(got), known, 3, 0.0)
    raise ValueError(f"{what}={got!r} is not known; the closest: {', '.join(nearest)}")


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


# name -> function, and whether the compiler cannot split it over devices.
_IMPLEMENTATIONS: dict[str, tuple[Callable[..., jax.Array], bool]] = {
    "xla": (naive.attend, False),
    "chunked": (chunked.attend, False),
    "rows": (rows.attend, True),
    "splash": (splash.attend, True),
    "cudnn": (cudnn.attend, True),
}
IMPLEMENTATIONS = (*_IMPLEMENTATIONS, "auto")
_OF_PLATFORM = {
    "tpu": "splash", "gpu": "cudnn", "cuda": "cudnn", "rocm": "chunked", "cpu": "auto",
}
# Up to so many scores of a head a CPU is quicker with all of them at once.
_FEW_SCORES = 128**2
