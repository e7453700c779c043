"""Position tables and rotary positions of the published V-JEPA code."""

import re

import cases
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.nn import positions
from vjepa_jax.volumes.grid import Grid


@pytest.fixture(scope="module")
def case(shared):
  return cases.load(shared("fixtures/parity/fb_pos_tables_and_rope"))


def test_sincos_tables_are_the_published_ones(case):
  names = [name for name in case.arrays if name.startswith("sincos")]
  assert len(names) == 7
  for name in names:
    axes = int(re.match(r"sincos(\d)d", name)[1])
    number = {k: int(v) for k, v in re.findall(r"([a-z]+)(\d+)", name.split("/")[1])}
    if axes == 1:
      dims = (number["len"],)
    else:
      side = (number["grid"],) * 2
      dims = (number["depth"], *side) if axes == 3 else side
    case.check(
        name,
        positions.sincos(
            dims, number["dim"], uniform=bool(number.get("uniform")),
            class_token="cls" in name,
        ),
    )


@pytest.mark.parametrize("size", [4, 8, 20])
def test_vjepa2_layout_turns_as_the_published_op(case, size):
  x, place = case[f"rope/x_{size}"], case[f"rope/pos_{size}"]
  rows, heads, tokens = place.shape
  # The op is for one axis; here all three axes say the same, each on its section.
  coords = np.repeat(place.reshape(rows * heads, tokens, 1), 3, axis=-1)
  tables = positions.rope_tables(
      jnp.asarray(coords, jnp.float32), 3 * size, layout="vjepa2"
  )
  sections = np.concatenate([x.reshape(-1, 1, tokens, size)] * 3, axis=-1)
  out = positions.apply_rope(jnp.asarray(sections), tables)
  for section in np.split(np.asarray(out), 3, axis=-1):
    case.check(f"rope/out_{size}", section.reshape(x.shape))


def test_head_channels_are_shared_among_axes_as_published(case):
  for size, *sections, rest in case["head_split/d_h_w_for_head_dim"]:
    coords = jnp.ones((1, 1, 3))
    for axis, channels in enumerate(sections):
      tables = positions.rope_tables(
          coords * (jnp.arange(3) == axis), int(size), layout="vjepa2"
      )
      turned = np.flatnonzero(np.asarray(tables.sin)[0, 0])
      start = sum(sections[:axis])
      np.testing.assert_array_equal(turned, np.arange(start, start + channels))
    assert sum(sections) + rest == size


@pytest.mark.parametrize("name, side", [("nonsquare_5x7", (5, 7)), ("grid4", (4, 4))])
def test_token_ids_name_the_published_places(case, name, side):
  count = len(case[f"ids/{name}_d"])
  depth = -(-count // (side[0] * side[1]))
  grid = Grid((depth, 1, *side), (1, 1, 1, 1))
  coords = grid.coords_of(jnp.arange(count))
  for axis, letter in ((0, "d"), (2, "h"), (3, "w")):
    case.check(f"ids/{name}_{letter}", coords[:, axis])
