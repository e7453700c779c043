"""Parameters that a run starts from in place of drawn ones."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vjepa_jax.train import sharding, state


def drawn():
  """Parameters as of a fresh state: of some type, each lying somewhere."""
  mesh = sharding.make_mesh()
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  return {
      "encoder": {
          "kernel": jax.device_put(jnp.zeros((4, 2)), spread),
          "norm": {"scale": jnp.ones(2, jnp.bfloat16)},
      },
      "head": {"kernel": jnp.full((2, 3), 7.0)},
  }


def given():
  return {"encoder": {
      "kernel": np.arange(8.0).reshape(4, 2),
      "norm": {"scale": np.array([3, 5], ml_dtypes.bfloat16)},
  }}


def test_given_parts_take_the_place_of_drawn_ones_and_the_rest_stays():
  params = drawn()
  found = state.with_parts(params, given())
  np.testing.assert_array_equal(found["encoder"]["kernel"], given()["encoder"]["kernel"])
  np.testing.assert_array_equal(found["encoder"]["norm"]["scale"], [3, 5])
  assert found["head"]["kernel"] is params["head"]["kernel"]
  assert jax.tree.structure(found) == jax.tree.structure(params)
  np.testing.assert_array_equal(params["encoder"]["kernel"], 0)


def test_they_lie_where_and_are_of_the_type_that_the_drawn_ones_were():
  params = drawn()
  found = state.with_parts(params, given())
  for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
    assert one.dtype == two.dtype and one.sharding == two.sharding


@pytest.mark.parametrize("change, words", [
    (lambda e: e.pop("kernel"), ["encoder/kernel is missing"]),
    (lambda e: e.update(bias=np.ones(2)), ["encoder/bias is not of this model"]),
    (
        lambda e: e.update(kernel=np.ones((5, 2))),
        ["encoder/kernel has shape (5, 2), the model's (4, 2)"],
    ),
    (
        lambda e: (e.update(norm={"bias": np.ones(2)}, kernel=np.ones((4, 3)))),
        [
            "encoder/norm/scale is missing", "encoder/norm/bias is not of this model",
            "encoder/kernel has shape (4, 3)", "the options of that run",
        ],
    ),
])
def test_what_does_not_fit_is_named_all_at_once(change, words):
  parts = given()
  change(parts["encoder"])
  with pytest.raises(state.PartsError) as error:
    state.with_parts(drawn(), parts)
  for word in words:
    assert word in str(error.value)


def test_a_part_that_the_model_has_not_is_named():
  with pytest.raises(state.PartsError, match="target/kernel is not of this model"):
    state.with_parts(drawn(), {"target": {"kernel": np.ones(2)}})
