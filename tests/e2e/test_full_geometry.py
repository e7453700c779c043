"""The full configs trace at their own size: no array is made, every shape is."""

import functools

import jax
import jax.numpy as jnp
import pytest

from vjepa_jax import config as config_lib
from vjepa_jax.train.state import init_state
from vjepa_jax.train.step import make_train_step
from vjepa_jax.volumes import augment

STEPS = dict(total_steps=1000, steps_per_epoch=10)


@pytest.mark.parametrize("arm,encoder_parameters", [
    ("", 85_843_200), ("heads=12", 85_843_200), ("L", 303_361_024), ("H", 630_992_640),
    # Learned positions: 9,216 tokens x 768.
    ("literal", 85_843_200 + 9_216 * 768),
])
def test_the_train_step_of_a_full_config_traces(arm, encoder_parameters):
  plain = config_lib.as_plain(config_lib.load(f"configs/oct_multi.py:{arm}"))
  assert config_lib.model_grid(plain).tokens == 9_216
  objective, optimizer = config_lib.objective_and_optimizer(plain, **STEPS)
  unit_augment = augment.make_augment(**plain["augment"])
  accum = plain["train"]["accum"]
  of = jax.ShapeDtypeStruct
  batch = {
      "volume": of((accum, 1, *plain["data"]["canvas"], 1), jnp.uint8),
      **{k: of((accum,), jnp.float32) for k in ("mean", "std", "_mask")},
      "spacing": of((accum, 4), jnp.float32),
      **{k: of((accum,), jnp.int32) for k in ("index", "label")},
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  draw = functools.partial(init_state, objective, optimizer, unit_augment)
  state = jax.eval_shape(draw, batch, key)
  count = sum(leaf.size for leaf in jax.tree.leaves(state.params["encoder"]))
  assert count == encoder_parameters
  step = make_train_step(objective, optimizer, augment=unit_augment, accum=accum)
  after, metrics = jax.eval_shape(step, state, batch)
  shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  assert shapes(after) == shapes(state)
  assert metrics["loss"][0].dtype == jnp.float32
