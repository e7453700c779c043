"""What every backbone takes and gives."""

from typing import Any, Protocol

from flax import struct
import jax

from vjepa_jax.nn.received import COLLECTION
from vjepa_jax.volumes.grid import Grid


@struct.dataclass
class Features:
  """What a backbone says of a volume.

  Attributes:
    tokens: [B, K, D] one vector a token, after the final norm.
    grid: the geometry of all N tokens.
    ids: int32 [B, K] which of the N places the tokens stand for; None: all, in
      order.
    cls: [B, D] the class token's vector; None where the backbone has none.
    stages: feature maps [B, t, z, y, x, C_i], finest first; empty where flat.
  """

  tokens: jax.Array
  grid: Grid = struct.field(pytree_node=False)
  ids: jax.Array | None = None
  cls: jax.Array | None = None
  stages: tuple[jax.Array, ...] = ()

  @property
  def pooled(self) -> jax.Array:
    """Mean over the tokens, [B, D]."""
    return self.tokens.mean(axis=1)


class Backbone(Protocol):
  """A linen module from volume to Features.

  Attributes:
    width: D.
    patch: (pt, pz, py, px).

  One that cannot keep any tokens, only the same places of every frame, says so with
  `rectangular`, and takes keep_places, int32 [B, k], in place of keep_ids.
  """

  width: int
  patch: tuple[int, int, int, int]

  def grid_of(self, voxels: tuple[int, ...]) -> Grid:
    """Returns the tokens of volumes of (T, Z, Y, X) voxels."""

  def __call__(
      self,
      volume: jax.Array,
      *,
      keep_ids: jax.Array | None = None,
      keep_valid: jax.Array | None = None,
      spacing: jax.Array | None = None,
      train: bool = False,
  ) -> Features:
    """Encodes a volume, or only the kept tokens of it.

    Args:
      volume: float [B, T, Z, Y, X, C], normalised.
      keep_ids: int32 [B, K] token ids to keep; the others never enter.
      keep_valid: bool [B, K]; False marks padding in keep_ids, which no token
        attends to.
      spacing: float32 [B, 4] (dt, dz, dy, dx) in s and mm, for positions in mm.
      train: whether drop-path draws (rng stream "drop_path").
    """


def attention(
    backbone: Backbone, params: Any, volume: jax.Array, *, spacing: jax.Array | None = None
) -> jax.Array:
  """Returns where the attention over space of the last block goes, by frame.

  Of each place of a frame the share that it gets of its frame's attention, mean over
  heads: from the class token where there is one, else the mean over all queries. With
  attention over all of space and time at once, too, each frame's shares sum to 1.

  Args:
    backbone: a module whose attention is `nn.attention.MultiHeadAttention`, in
      one stack.
    params: its parameters.
    volume: float [B, T, Z, Y, X, C], normalised.
    spacing: float32 [B, 4] (dt, dz, dy, dx) in s and mm.

  Returns:
    float32 [B, t, z, y, x], the sum over (z, y, x) is 1.

  Raises:
    ValueError: if the backbone writes down no attention, or several stacks' of it.
  """
  features, state = backbone.apply(
      {"params": params}, volume, spacing=spacing, mutable=[COLLECTION]
  )
  stacks = jax.tree.leaves(state)
  if len(stacks) != 1:
    raise ValueError(
        f"attention: {type(backbone).__name__} writes down {len(stacks)} maps in the "
        f"collection {COLLECTION!r}, there must be one, of a stack of blocks"
    )
  t, *space = features.grid.dims
  last = stacks[0][-1]  # [B, class + N], or [B, t, class + n] by frame
  own = features.grid.tokens if last.ndim == 2 else features.grid.places
  frames = last[..., last.shape[-1] - own :].reshape(len(last), t, -1)
  return (frames / frames.sum(axis=-1, keepdims=True)).reshape(len(last), t, *space)
