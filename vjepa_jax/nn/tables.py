"""Learned positions of places and of times, each in a table of its own."""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.nn import positions

RESIZES = ("linear", "nearest")


class SpaceTimeTable(nn.Module):
  """A vector for each place (z, y, x) and one for each time; their sum is a token's.

  Attributes:
    width: D.
    dims: (t, z, y, x) tokens that the tables are made for; None: those at hand.
    resize: how the tables serve other grids, "linear" or "nearest"; see
      `positions.resize_table`.
    time: whether there is a table of times.
  """

  width: int
  dims: tuple[int, int, int, int] | None = None
  resize: str = "linear"
  time: bool = True

  @nn.compact
  def __call__(
      self,
      dims: tuple[int, int, int, int],
      *,
      ids: jax.Array | None = None,
      places: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the vector of every token of a grid, [N, D], or of some.

    Args:
      dims: (t, z, y, x) tokens of the grid.
      ids: int32 [B, K] tokens; what is returned is [B, K, D].
      places: int32 [B, k] places in (z, y, x) that every frame has in place of all;
        what is returned is [B, t k, D], frame by frame. Its gradient is summed in a
        table of places, not in one of all tokens.

    Raises:
      ValueError: if the tables were made for another grid than `self.dims` says.
    """
    made_for = self.dims or dims
    space = self._table("space", made_for[1:], dims[1:])
    # [1 or B, 1, n or k, D]
    table = space[None, None] if places is None else space[places][:, None]
    if self.time:
      table = table + self._table("time", made_for[:1], dims[:1])[:, None]
    table = jnp.broadcast_to(table, (table.shape[0], dims[0], *table.shape[2:]))
    table = table.reshape(table.shape[0], -1, self.width)
    if places is not None:
      return table
    return table[0] if ids is None else table[0][ids]

  def _table(self, name, made_for, to):
    count = math.prod(made_for)
    if self.has_variable("params", name):
      found = self.get_variable("params", name).shape[0]
      if found != count:
        raise ValueError(
            f"the learned positions in {name} are {found}, the grid has {count} "
            f"{tuple(made_for)}; set table_voxels to the size they were learned at to "
            "resample them"
        )
    table = self.param(name, nn.initializers.normal(0.02), (count, self.width))
    if tuple(made_for) == tuple(to):
      return table
    return positions.resize_table(table, made_for, to, self.resize)
