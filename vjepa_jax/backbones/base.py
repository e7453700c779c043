"""What every backbone takes and gives."""

from typing import Protocol

from flax import struct
import jax

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
  """

  width: int
  patch: tuple[int, int, int, int]

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
