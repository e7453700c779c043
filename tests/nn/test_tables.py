"""Learned positions: of all tokens, of some, and of the places of every frame."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.nn import tables

DIMS = (3, 2, 4, 5)
PLACES = jnp.asarray([[1, 7, 39], [0, 2, 20]])


@pytest.mark.parametrize("time", [True, False])
def test_some_tokens_have_the_vectors_they_have_among_all(time):
  table = tables.SpaceTimeTable(8, time=time)
  params = table.init(jax.random.key(0), DIMS)
  assert set(params["params"]) == ({"space", "time"} if time else {"space"})
  all_ = table.apply(params, DIMS)
  assert all_.shape == (120, 8)
  ids = (jnp.arange(3)[:, None] * 40 + PLACES[:, None]).reshape(2, -1)
  for some in (dict(ids=ids), dict(places=PLACES)):
    np.testing.assert_array_equal(table.apply(params, DIMS, **some), all_[ids])


def test_the_gradient_of_places_holds_no_table_of_all_tokens():
  table = tables.SpaceTimeTable(8)
  params = table.init(jax.random.key(0), DIMS)

  def gradient(params, **some):
    out = lambda params: jnp.square(table.apply(params, DIMS, **some)).sum()
    return jax.grad(out)(params)

  text = lambda **some: str(jax.make_jaxpr(lambda p: gradient(p, **some))(params))
  ids = jnp.arange(3)[:, None] * 40 + PLACES[:, None]
  assert "[120,8]" in text(ids=ids.reshape(2, -1))
  assert "120" not in text(places=PLACES)
  one, other = gradient(params, ids=ids.reshape(2, -1)), gradient(params, places=PLACES)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, other)


def test_one_time_point_has_the_middle_of_the_times_that_were_learned():
  table = tables.SpaceTimeTable(8, dims=(4, *DIMS[1:]))
  params = table.init(jax.random.key(0), (4, *DIMS[1:]))
  one = table.apply(params, (1, *DIMS[1:]))
  learned = params["params"]
  middle = learned["time"][1:3].mean(axis=0)
  np.testing.assert_allclose(one, learned["space"] + middle, rtol=1e-5, atol=1e-6)
