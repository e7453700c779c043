"""The grid: ids are row-major places, and cutting loses nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.volumes.grid import Grid, grid_faults

GRIDS = [
    Grid((1, 6, 10, 14), (1, 2, 2, 2)),
    Grid((4, 1, 6, 6), (2, 1, 3, 2)),
    Grid((2, 3, 4, 5), (1, 1, 1, 1)),
    Grid((4, 6, 4, 15), (2, 3, 2, 5)),
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


def test_a_clip_is_cut_one_layer_at_a_time_into_the_same_patches():
  grid = Grid((4, 6, 4, 15), (2, 3, 2, 5))
  volume = np.random.default_rng(0).normal(size=(2, *grid.voxels, 3)).astype(np.float32)
  np.testing.assert_array_equal(grid.patchify(jnp.asarray(volume)), grid.patchify(volume))
  found = re.findall(r"f32\[([\d,]+)\]", str(jax.make_jaxpr(grid.patchify)(volume)))
  shapes = [tuple(map(int, shape.split(","))) for shape in found]
  # Where an axis of a patch is the last, a TPU holds it as 128.
  narrow = [np.prod(shape) for shape in shapes if len(shape) > 6]
  assert narrow and max(narrow) == volume.size // grid.dims[1]


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


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_a_padded_grid_covers_the_volume_and_says_what_is_real(array):
  grid = Grid((3, 5, 7, 9), (2, 2, 4, 4), padded=True)
  assert grid.dims == (2, 3, 2, 3) and grid.places == 18
  volume = np.random.default_rng(0).normal(size=(2, 3, 5, 7, 9, 2)).astype(np.float32)
  patches = grid.patchify(array(volume))
  assert patches.shape == (2, 36, 2 * 2 * 4 * 4 * 2)
  np.testing.assert_array_equal(grid.unpatchify(jnp.asarray(patches), 2), volume)
  valid = grid.valid()
  assert valid.shape == (36, 64) and valid.sum() == 3 * 5 * 7 * 9
  beyond = np.asarray(patches).reshape(2, 36, 64, 2)[:, ~valid]
  assert beyond.size and not beyond.any()
  assert Grid((4, 6, 8, 12), (2, 2, 4, 4), padded=True).valid().all()


@pytest.mark.parametrize("padded", [False, True])
def test_overlapping_patches_lie_a_stride_apart(padded):
  voxels = (2, 4, 9, 9 + 2 * padded)
  grid = Grid(voxels, (1, 4, 5, 5), padded=padded, stride=(1, 4, 2, 4))
  # (size - patch) // stride + 1, and one more where padding completes it.
  assert grid.dims == (2, 1, 3, 2 + padded)
  volume = np.random.default_rng(0).normal(size=(1, *voxels, 1)).astype(np.float32)
  patches = np.asarray(grid.patchify(jnp.asarray(volume))).reshape(2, 3, -1, 4, 5, 5)
  np.testing.assert_array_equal(patches[1, 2, 1], volume[0, 1, :, 4:9, 4:9, 0])
  with pytest.raises(ValueError, match="overlap"):
    grid.unpatchify(jnp.zeros((1, grid.tokens, 100)))


def test_strides_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="Y=11 is not patch 4 plus.*nearest 10 or 13"):
    Grid((1, 4, 11, 10), (1, 4, 4, 4), stride=(1, 4, 3, 3))
  with pytest.raises(ValueError, match="1 <= stride <= patch"):
    Grid((1, 4, 10, 10), (1, 4, 4, 4), stride=(1, 4, 5, 3))
  whole = Grid((1, 4, 8, 8), (1, 4, 4, 4), stride=(1, 4, 4, 4))
  assert whole == Grid((1, 4, 8, 8), (1, 4, 4, 4))
