"""Rotary positions are rotations, relative, and blind to axes of one token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.nn import positions
from vjepa_jax.volumes.grid import Grid

ODD = Grid((1, 3, 5, 7), (1, 1, 1, 1))
FULL = Grid((2, 3, 5, 7), (1, 1, 1, 1))


def vectors(tokens, size, seed=0):
  return jax.random.normal(jax.random.key(seed), (2, 3, tokens, size))


@pytest.mark.parametrize("grid", [ODD, FULL])
@pytest.mark.parametrize("size", [16, 20, 21])
def test_rotation_keeps_every_norm(grid, size):
  x = vectors(grid.tokens, size)
  turned = positions.apply_rope(x, positions.rope(grid, None, size))
  assert not np.allclose(x, turned)
  np.testing.assert_allclose(
      jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
  )


def test_the_published_layout_does_not_keep_norms():
  x = vectors(ODD.tokens, 20)
  turned = positions.apply_rope(x, positions.rope(ODD, None, 20, layout="vjepa2"))
  assert not np.allclose(
      jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-2
  )


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_products_depend_on_the_offset_only(axis):
  grid, size = Grid((9, 9, 9, 9), (1, 1, 1, 1)), 32
  q, k = vectors(1, size, 1), vectors(1, size, 2)
  step = 9 ** (3 - axis)

  def product(query_place, key_place):
    turn = lambda x, place: positions.apply_rope(
        x, positions.rope(grid, jnp.full((1, 1), place * step), size)
    )
    return jnp.sum(turn(q, query_place) * turn(k, key_place), axis=-1)

  same = [product(i, i + 3) for i in range(5)]
  for other in same[1:]:
    np.testing.assert_allclose(other, same[0], rtol=1e-4, atol=1e-4)
  assert not np.allclose(product(0, 4), same[0], atol=1e-2)


def test_an_axis_of_one_token_gets_no_channels():
  size = 24
  flat = positions.rope(Grid((1, 1, 5, 7), (1, 1, 1, 1)), None, size)
  deep = positions.rope(Grid((1, 3, 5, 7), (1, 1, 1, 1)), None, size)
  turned = lambda rope: np.any(np.asarray(rope.sin) != 0, axis=(0, 1)).sum()
  assert turned(flat) == 24 and turned(deep) == 24
  # Two axes share all channels: the first half of the pairs turns along Y only.
  cos = np.asarray(flat.cos).reshape(5, 7, size)
  assert np.all(cos[:, :, :6] == cos[:, :1, :6])
  assert np.all(cos[:, :, 6:12] == cos[:1, :, 6:12])


def test_a_grid_of_one_token_is_not_turned():
  x = vectors(1, 16)
  rope = positions.rope(Grid((1, 1, 4, 4), (1, 1, 4, 4)), None, 16)
  np.testing.assert_array_equal(positions.apply_rope(x, rope), x)


@pytest.mark.parametrize("layout", positions.LAYOUTS)
def test_a_subset_keeps_its_absolute_places(layout):
  ids = jnp.asarray([[104, 3, 50], [0, 99, 7]])
  rope = positions.rope(ODD, ids, 24, layout=layout)
  whole = positions.rope(ODD, None, 24, layout=layout)
  np.testing.assert_allclose(rope.cos, whole.cos[0][ids], atol=1e-6)
  np.testing.assert_allclose(rope.sin, whole.sin[0][ids], atol=1e-6)


def test_angles_are_float32_even_far_out():
  grid = Grid((1, 1, 1, 4096), (1, 1, 1, 1))
  rope = positions.rope(grid, None, 8)
  assert rope.cos.dtype == jnp.float32
  # 10000 ** (-1/4) = 0.1 is the second frequency of four.
  angle = np.arange(4096) * 0.1
  np.testing.assert_allclose(rope.cos[0, :, 1], np.cos(angle), atol=1e-4)


def test_millimetres_scale_each_sample_by_its_own_spacing():
  grid = Grid((1, 6, 8, 8), (1, 2, 4, 4))
  spacing = jnp.asarray([[np.nan, 0.05, 0.01, 0.02], [np.nan, 0.1, 0.01, 0.02]])
  rope = positions.rope(
      grid, None, 12, units="mm", spacing=spacing, reference=(1.0, 0.1, 0.04, 0.08)
  )
  index = positions.rope(grid, None, 12)
  # Patch 2 x 4 x 4 at this spacing is one step of the reference along each axis.
  np.testing.assert_allclose(rope.cos[0], index.cos[0], atol=1e-5)
  # Twice the distance along Z is twice the index.
  z = np.unravel_index(np.arange(grid.tokens), grid.dims)[1]
  np.testing.assert_allclose(rope.cos[1, :, 0], np.cos(2.0 * z), atol=1e-5)
  assert np.all(np.isfinite(rope.cos))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layout="rotate"), "closest: rotation"),
        (dict(units="m"), "closest: mm"),
        (dict(units="mm", reference=(1, 1, 1, 1)), "spacing"),
        (dict(units="mm", spacing=jnp.ones((2, 4))), "reference"),
        (
            dict(
                units="mm", layout="vjepa2", spacing=jnp.ones((2, 4)),
                reference=(1, 1, 1, 1),
            ),
            "'index' only",
        ),
    ],
)
def test_contradictions_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    positions.rope(ODD, None, 12, **options)


def test_four_axes_and_narrow_heads_are_refused():
  with pytest.raises(ValueError, match="three axes"):
    positions.rope(FULL, None, 12, layout="vjepa2")
  with pytest.raises(ValueError, match="at least 8"):
    positions.rope(FULL, None, 6)


def test_class_tokens_in_front_are_not_turned():
  rope = positions.rope(ODD, None, 12).prepend(1)
  x = vectors(ODD.tokens + 1, 12)
  turned = positions.apply_rope(x, rope)
  np.testing.assert_array_equal(turned[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("dims", [(7,), (5, 7), (3, 5, 7), (2, 3, 5, 7)])
def test_sincos_tells_all_places_apart(dims):
  table = positions.sincos(dims, 48)
  assert table.shape == (int(np.prod(dims)), 48)
  assert len(np.unique(table.round(6), axis=0)) == len(table)
  np.testing.assert_array_equal(
      positions.sincos_table((1, *dims, 1), 48), table
  )


def test_sincos_refuses_widths_that_cannot_be_shared():
  with pytest.raises(ValueError, match="nearest 16 or 24"):
    positions.sincos((3, 5, 7), 20)


def test_resizing_a_table_keeps_a_linear_ramp_inside():
  ramp = np.broadcast_to(np.arange(8.0)[:, None], (8, 2)).astype(np.float32)
  half = positions.resize_table(jnp.asarray(ramp), (1, 8, 1, 1), (1, 4, 1, 1))
  np.testing.assert_allclose(half[:, 0], [0.5, 2.5, 4.5, 6.5], atol=1e-6)
