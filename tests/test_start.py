"""What `train.start_from` refuses by the configs of the two runs alone."""

import json

import pytest

from tests.test_config import load
from vjepa_jax import config as config_lib
from vjepa_jax import main


def plain_of(name, *, model=(), frames=None, **section):
  """The plain config of an arm `tiny`, with options of its sections changed."""
  config = load(name, "tiny")
  with config.unlocked(), config.ignore_type():
    config.model.update(dict(model))
    if frames:
      config.data.clip.frames = frames
    for key, options in section.items():
      config[key].update(options)
  return config_lib.as_plain(config)


def start(folder, theirs, own):
  (folder / "config.json").write_text(json.dumps(theirs))
  own["train"]["start_from"] = str(folder)
  main._check_start(own)


SINCOS = dict(positions="sincos")


@pytest.mark.parametrize("there, here, words", [
    (4, 1, ["T, Z, Y, X there (4, 2, 4, 4)", "Z, Y, X here (1, 2, 4, 4)"]),
    (1, 4, ["Z, Y, X there (1, 2, 4, 4)", "T, Z, Y, X here (4, 2, 4, 4)"]),
])
def test_fixed_positions_of_other_axes_are_refused(tmp_path, there, here, words):
  theirs = plain_of("worm_mae", model=SINCOS, frames=there)
  own = plain_of("worm_stages", model=SINCOS, frames=here)
  with pytest.raises(config_lib.ConfigError) as error:
    start(tmp_path, theirs, own)
  (fault,) = error.value.faults
  for part in (
      f"train.start_from: {tmp_path}", "'sincos'", *words,
      "at least two tokens along T in both", "model.positions='learned'",
  ):
    assert part in fault, fault


@pytest.mark.parametrize("model, there, here", [
    (SINCOS, 4, 2), (SINCOS, 1, 1), (dict(positions="learned"), 4, 1),
])
def test_positions_that_mean_the_same_places_are_not(tmp_path, model, there, here):
  theirs = plain_of("worm_mae", model=model, frames=there)
  start(tmp_path, theirs, plain_of("worm_stages", model=model, frames=here))


def test_a_crop_of_one_patch_is_an_axis_less(tmp_path):
  theirs = plain_of("worm_mae", model=SINCOS)
  own = plain_of("worm_stages", model=SINCOS, augment=dict(crop=(4, 4, 16, 16)))
  with pytest.raises(config_lib.ConfigError, match="two tokens along Z in both"):
    start(tmp_path, theirs, own)


def test_a_resampled_table_of_fixed_positions_counts_as_what_it_is_made_for(tmp_path):
  theirs = plain_of("oct_multi", model=SINCOS)
  whole = tuple(theirs["data"]["canvas"])
  flat = dict(crop=(1, theirs["model"]["patch"][1], *whole[1:]))
  own = plain_of("oct_diagnosis", model=SINCOS, augment=flat)
  with pytest.raises(config_lib.ConfigError, match="two tokens along Z in both"):
    start(tmp_path, theirs, own)
  made = SINCOS | dict(table_voxels=(1, *whole))
  start(tmp_path, theirs, plain_of("oct_diagnosis", model=made, augment=flat))
