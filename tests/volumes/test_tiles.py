"""Tiles cover every voxel, with as few as can."""

import math

import numpy as np
import pytest

from vjepa_jax.volumes import tiles


@pytest.mark.parametrize("voxels, tile", [
    ((1, 16, 32, 32), (1, 16, 32, 32)), ((4, 16, 32, 33), (4, 8, 16, 16)),
    ((8, 96, 96, 160), (8, 64, 96, 96)), ((3, 5, 7, 9), (2, 5, 3, 4)),
])
def test_tiles_cover_every_voxel_with_as_few_as_can(voxels, tile):
  starts = tiles.tile_starts(voxels, tile)
  assert len(starts) == math.prod(-(-n // t) for n, t in zip(voxels, tile))
  volume = np.arange(2 * math.prod(voxels)).reshape(2, *voxels, 1)
  seen = np.zeros(volume.size, bool)
  for start in starts:
    part = volume[(slice(None), *(slice(s, s + t) for s, t in zip(start, tile)))]
    assert part.shape == (2, *tile, 1)
    seen[part.ravel()] = True
  assert seen.all()


def test_tiles_are_spread_evenly():
  assert tiles.tile_starts((10,), (4,)) == ((0,), (3,), (6,))


@pytest.mark.parametrize("tile", [(1, 17, 4, 4), (1, 0, 4, 4), (1, 4, 4)])
def test_tiles_that_do_not_fit_are_refused(tile):
  with pytest.raises(ValueError, match="tiles"):
    tiles.tile_starts((1, 16, 16, 16), tile)
