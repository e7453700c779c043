"""Divided space-time blocks, scanned over depth: attention over time, then space.

Tokens stay [B, T, n, D] throughout: frames (or places) are groups of their own, so
that no axis that a mesh splits is ever joined with another. T lies over the mesh's
axis "sequence"; around the attention over time the places do, which is one
all-to-all there and one back.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.nn import placement
from vjepa_jax.nn.attention import INITIALIZERS, MultiHeadAttention, scaled
from vjepa_jax.nn.blocks import (
    Mlp,
    branch_scale,
    check_stack,
    drop_path,
    laid_out,
    layer_norm,
    rematerialized,
)
from vjepa_jax.nn.received import COLLECTION

ORDERS = ("time_first", "space_first")


class DividedBlock(nn.Module):
  """x += time(norm(x)); x += space(norm(x)); x += mlp(norm(x)).

  The class token has no part in the attention over time. In the attention over
  space each frame has a copy of it, and it moves by the mean of what the copies
  moved; it goes through the MLP as all tokens do. Its parts but the time's are those
  of a plain `blocks.Block`, under the same names.

  Attributes:
    width: D.
    heads: H, of both attentions.
    mlp_ratio: hidden width of the MLP over D.
    time: whether there is attention over time at all; without, a plain block on
      every frame, with a class token of its own where it is given one.
    order: "time_first" or "space_first".
    time_projection: whether another Dense, "time_proj", follows the attention over
      time.
    zero_time: whether the last Dense of the time's path starts at zero, so that a
      new block is a plain one on every frame.
    attention, attention_chunk, eps, dtype, initializer: see `blocks.Block`.

  Source: TimeSformer (Bertasius et al. 2021, arXiv:2102.05095;
  facebookresearch/TimeSformer, timesformer/models/vit.py). Different on purpose:
  drop-path drops whole clips, there a row of the reshaped batch; every block's
  projection may start at zero, there all but the first.
  """

  width: int
  heads: int
  mlp_ratio: float = 4.0
  time: bool = True
  order: str = "time_first"
  time_projection: bool = True
  zero_time: bool = True
  attention: str = "xla"
  attention_chunk: int = 512
  eps: float = 1e-6
  dtype: str = "float32"
  initializer: str = "vjepa"

  @nn.compact
  def __call__(
      self,
      x: jax.Array,
      cls: jax.Array | None = None,
      *,
      layer: int | jax.Array = 0,
      drop_rate: float | jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Maps tokens and class tokens.

    Args:
      x: [B, T, n, D], the same places in every frame.
      cls: [B, 1, D], or [B, T, D] for one a frame; None: none.
      layer: which block of the stack, from 0; matters for the initial weights.
      drop_rate: share of clips that skip each branch (rng "drop_path"); None: none.
    """
    scale = branch_scale(self.initializer, layer)
    shared = dict(dtype=self.dtype, initializer=self.initializer)
    attend = lambda name, scale: MultiHeadAttention(
        self.width, self.heads, self.attention, self.attention_chunk, **shared,
        out_scale=scale, name=name,
    )
    norm = lambda name: layer_norm(name, self.eps, self.dtype)
    steps = [lambda x, cls: self._space(x, cls, attend, norm, scale, drop_rate)]
    if self.time:
      over_time = lambda x, cls: (
          x + self._time(x, attend, norm, scale, drop_rate), cls
      )
      steps.insert(self.order == "space_first", over_time)
    for step in steps:
      x, cls = step(x, cls)
    norm2 = norm("norm2")
    mlp = Mlp(self.width, self.mlp_ratio, **shared, out_scale=scale, name="mlp")
    keys = self._key(drop_rate)
    forward = lambda x: self._drop(
        mlp(norm2(x).astype(self.dtype)), drop_rate, keys
    )
    return x + forward(x), None if cls is None else cls + forward(cls)

  def _time(self, x, attend, norm, scale, rate):
    """What the attention over time adds to [B, T, n, D]."""
    y = norm("time_norm")(x).astype(self.dtype)
    # Here too said before and after: what the norm gives would be sent in float32.
    y = placement.constrain(y, "batch", "tokens", None, None)
    y = placement.constrain(y.swapaxes(1, 2), "batch", "tokens", None, None)
    last = 0.0 if self.zero_time else scale
    attention = attend("time_attn", scale if self.time_projection else last)
    y = attention(y, asking=None)  # [B, n, T, D]
    # Said on both sides of the exchange: left to find out, XLA's partitioner gives a
    # wrong gradient of the weights in between (jaxlib 0.10.2, CPU).
    y = placement.constrain(y, "batch", "tokens", None, None)
    y = placement.constrain(y.swapaxes(1, 2), "batch", "tokens", None, None)
    if self.time_projection:
      draw = scaled(INITIALIZERS[self.initializer], last)
      y = nn.Dense(
          self.width, dtype=jnp.dtype(self.dtype), kernel_init=draw,
          promote_dtype=placement.promote, name="time_proj",
      )(y)
    return self._drop(y, rate, self._key(rate))

  def _space(self, x, cls, attend, norm, scale, rate):
    frames = x.shape[1]
    tokens = x
    if cls is not None:
      copies = jnp.broadcast_to(cls, (x.shape[0], frames, self.width))
      tokens = jnp.concatenate([copies[:, :, None], x], axis=2)  # [B, T, 1 + n, D]
    y = attend("attn", scale)(
        norm("norm1")(tokens).astype(self.dtype), asking=int(cls is not None)
    )
    y = self._drop(y, rate, self._key(rate))
    if cls is None:
      return x + y, None
    moved = y[:, :, 0]
    if cls.shape[1] == 1:
      moved = moved.mean(axis=1, keepdims=True)
    return x + y[:, :, 1:], cls + moved

  def _key(self, rate):
    return None if rate is None else self.make_rng("drop_path")

  def _drop(self, y, rate, key):
    return y if rate is None else drop_path(key, y, rate)


class DividedStack(nn.Module):
  """`depth` divided blocks, compiled once: parameters are stacked under "blocks".

  Attributes:
    width: D.
    depth: number of blocks.
    heads: H.
    drop_path, remat, unroll: see `blocks.Stack`.
    mlp_ratio, time, order, time_projection, zero_time, attention, attention_chunk,
      eps, dtype, initializer: see `DividedBlock`.
  """

  width: int
  depth: int
  heads: int
  mlp_ratio: float = 4.0
  time: bool = True
  order: str = "time_first"
  time_projection: bool = True
  zero_time: bool = True
  drop_path: float = 0.0
  attention: str = "xla"
  attention_chunk: int = 512
  remat: str = "none"
  unroll: int = 1
  eps: float = 1e-6
  dtype: str = "float32"
  initializer: str = "vjepa"

  @nn.compact
  def __call__(
      self,
      x: jax.Array,
      cls: jax.Array | None = None,
      *,
      train: bool = False,
      capture: bool = False,
  ) -> tuple[tuple[jax.Array, jax.Array | None], tuple | None]:
    """Maps tokens [B, T, n, D] and class tokens (see `DividedBlock`).

    Args:
      x: [B, T, n, D].
      cls: [B, 1 or T, D] or None.
      train: whether drop-path draws (rng stream "drop_path").
      capture: whether to return also what each block gives.

    Returns:
      ((x, cls), None or the same with a leading axis of depth).

    Raises:
      ValueError: for an unknown remat, order or initializer, or drop_path outside
        [0, 1).
    """
    check_stack(self.remat, self.initializer, self.drop_path)
    if self.order not in ORDERS:
      raise ValueError(f"order={self.order!r} is none of {', '.join(ORDERS)}")
    block = DividedBlock(
        self.width, self.heads, self.mlp_ratio, self.time, self.order,
        self.time_projection, self.zero_time, self.attention, self.attention_chunk,
        self.eps, self.dtype, self.initializer, name="blocks",
    )
    drops = train and self.drop_path > 0
    placed = lambda x: placement.constrain(x, "batch", "tokens", None, None)

    def step(block, state, layer):
      x, cls = state
      x = laid_out(x, self.attention)
      rate = self.drop_path * layer / max(self.depth - 1, 1) if drops else None
      x, cls = block(x, cls, layer=layer, drop_rate=rate)
      x = placed(x)
      return (x, cls), ((x, cls) if capture else None)

    scan = nn.scan(
        rematerialized(step, self.remat),
        variable_axes={"params": 0, COLLECTION: 0},
        split_rngs={"params": True, "drop_path": True},
        length=self.depth,
        unroll=self.unroll,
    )
    dtype = jnp.dtype(self.dtype)
    state = (placed(x.astype(dtype)), None if cls is None else cls.astype(dtype))
    return scan(block, state, jnp.arange(self.depth))
