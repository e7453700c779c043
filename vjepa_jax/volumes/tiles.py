"""Where the tiles of a volume lie that is larger than what a model sees."""

from collections.abc import Sequence
import itertools


def tile_starts(
    voxels: Sequence[int], tile: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
  """Returns where the fewest tiles lie that cover a volume, evenly spread.

  Args:
    voxels: of the volume along each axis.
    tile: of a tile, at most as many.

  Returns:
    The first voxel along each axis of each tile; neighbours overlap where the volume is
    no multiple of the tile.

  Raises:
    ValueError: if a tile is larger than the volume, or below 1.
  """
  if len(voxels) != len(tile) or any(
      not 1 <= t <= n for n, t in zip(voxels, tile, strict=False)
  ):
    raise ValueError(
        f"tiles {tuple(tile)} must be of 1 to {tuple(voxels)} voxels along each axis"
    )
  along = []
  for n, t in zip(voxels, tile, strict=True):
    last = -(-n // t) - 1  # Of the tiles along this axis, from 0.
    along.append([round(place * (n - t) / max(last, 1)) for place in range(last + 1)])
  return tuple(itertools.product(*along))

