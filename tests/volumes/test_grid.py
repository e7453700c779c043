"""The grid: ids are row-major places, and cutting loses nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.volumes.grid import Grid, grid_faults

GRIDS = [
    Grid((1, 6, 10, 14), (1, 2, 2, 2)),
    Grid((4, 1, 6, 6), (2, 1, 3, 2)),
    Grid((2, 3, 4, 5), (1, 1, 1, 1)),
]


def test_the_full_oct_grid_has_9216_tokens():
  grid = Grid((1, 64, 384, 384), (1, 4, 16, 16))
  assert grid.dims == (1, 16, 24, 24) and grid.tokens == 9216


@pytest.mark.parametrize("grid", GRIDS)
def test_ids_are_row_major_and_coords_of_agrees_with_coords(grid):
  coords = grid.coords()
  assert coords.dtype == np.int32 and coords.shape == (grid.tokens, 4)
  np.testing.assert_array_equal(
      np.ravel_multi_index(coords.T, grid.dims), np.arange(grid.tokens)
  )
  ids = jnp.arange(grid.tokens)[::-1].reshape(-1, 1)
  np.testing.assert_array_equal(grid.coords_of(ids)[:, 0], coords[::-1])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_unpatchify_undoes_patchify(grid, channels):
  volume = jax.random.normal(jax.random.key(0), (2, *grid.voxels, channels))
  patches = grid.patchify(volume)
  assert patches.shape == (2, grid.tokens, np.prod(grid.patch) * channels)
  np.testing.assert_array_equal(grid.unpatchify(patches, channels), volume)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_patch_holds_the_voxels_of_its_place(grid):
  places = np.stack(np.meshgrid(*map(np.arange, grid.voxels), indexing="ij"), -1)
  patches = grid.patchify(jnp.asarray(places[None]))
  patches = np.asarray(patches).reshape(grid.tokens, -1, 4)
  np.testing.assert_array_equal(patches[:, 0], grid.coords() * np.array(grid.patch))
  assert (patches // np.array(grid.patch) == grid.coords()[:, None]).all()


def test_sizes_that_do_not_fit_are_named_with_the_nearest_that_do():
  with pytest.raises(ValueError, match="Y=380.*nearest 368 or 384"):
    Grid((1, 64, 380, 384), (1, 4, 16, 16))
  assert "nearest 4" in grid_faults((1, 2, 8, 8), (1, 4, 8, 8))[0]
  assert len(grid_faults((0, 3, 8, 9), (1, 2, 8, 8))) == 3
  assert grid_faults((1, 2, 3), (1, 1, 1))
  assert not grid_faults((1, 4, 8, 8), (1, 2, 8, 4))


def test_a_volume_or_patches_of_another_size_are_refused():
  grid = GRIDS[0]
  with pytest.raises(ValueError, match="this grid wants"):
    grid.patchify(jnp.zeros((1, 1, 6, 10, 15, 1)))
  with pytest.raises(ValueError, match="this grid wants"):
    grid.unpatchify(jnp.zeros((1, grid.tokens, 9)))
