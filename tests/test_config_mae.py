"""A masked autoencoder of volumes in time, as a config says it."""

import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from vjepa_jax import config as config_lib
from vjepa_jax.backbones import vt_former
from vjepa_jax.config import names, units
from vjepa_jax.objectives import mae
from vjepa_jax.train import optim

ROOT = pathlib.Path(__file__).resolve().parents[1]
TUBE = dict(kind="tube", through="T", context=0.25, target=0.75)


def make(**changes):
  """The smallest OCT config with another model and objective."""
  config = config_lib.load(f"{ROOT / 'configs' / 'oct_multi'}.py:tiny")
  with config.unlocked():
    config.model = dict(
        name="vt_former", preset="tiny", width=32, depth=1, heads=2, patch=(1, 4, 8, 8)
    )
    config.objective = dict(
        name="mae", masks=dict(tubes=TUBE),
        decoder=dict(width=32, depth=1, heads=2, space_time="divided"),
    )
    for path, value in changes.items():
      *sections, key = path.split("__")
      place = config
      for section in sections:
        place = place[section]
      place[key] = ml_collections.ConfigDict(value) if isinstance(value, dict) else value
  return config


def faults_of(**changes):
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.check_config(make(**changes))
  return error.value.faults


def test_a_sound_config_builds_and_every_parameter_can_be_optimised():
  config = make()
  config_lib.check_config(config)
  plain = names.as_plain(config)
  objective = units.build_objective(plain, total_steps=10, steps_per_epoch=5)
  assert isinstance(objective, mae.MAE)
  assert isinstance(objective.backbone, vt_former.VTFormer)
  grid = units.model_grid(plain)
  assert grid.dims == (1, 2, 4, 4)
  batch = {
      "volume": jnp.zeros((2, *grid.voxels, 1)), "spacing": jnp.ones((2, 4)),
      "_mask": jnp.ones(2), "_position": jnp.arange(2),
  }
  params, _ = jax.eval_shape(objective.init, jax.random.key(0), batch)
  assert set(params) == {"encoder", "decoder"}
  optim.decay_mask(params)


def test_a_model_that_pads_takes_sizes_that_others_refuse():
  crop = (1, 8, 30, 32)
  config_lib.check_config(make(augment__crop=crop))
  assert units.model_grid(names.as_plain(make(augment__crop=crop))).dims == (1, 2, 4, 4)
  for changes in (
      dict(model__pad=False), dict(model__name="vit", objective__decoder={}),
  ):
    (fault,) = faults_of(augment__crop=crop, **changes)
    assert "Y=30 is not a multiple of patch 8" in fault


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(objective__masks=dict(a=dict(TUBE, kind="randm"))),
            ["objective.masks.a", "closest: random"],
        ),
        (dict(objective__masks__tubes__context=0.5), ["fit together"]),
        (dict(objective__target="raw"), ["objective.target", "pixel"]),
        (dict(objective__decoder__depth=0), ["objective.decoder", "depth 0"]),
        (dict(model__space_time="both"), ["model.space_time 'both'"]),
        (dict(model__stride=(1, 2, 4, 4)), ["model.stride", "overlap"]),
    ],
)
def test_what_cannot_work_is_a_fault_of_the_config(changes, words):
  faults = "\n".join(faults_of(**changes))
  assert all(word in faults for word in words), faults


def test_masks_that_divided_attention_cannot_have_are_refused_with_the_reason():
  random = dict(kind="random", context=0.25, target=0.75)
  faults = faults_of(objective__masks=dict(all=random))
  assert len(faults) == 2  # of the model and of the decoder
  assert all("one place in every frame" in fault for fault in faults)
  config_lib.check_config(make(
      objective__masks=dict(all=random), model__space_time="joint",
      objective__decoder__space_time="joint",
  ))
