"""Pictures of where an encoder looks."""

import jax
import numpy as np
import pytest

from vjepa_jax.backbones import vt_former
from vjepa_jax.backbones.base import Features
from vjepa_jax.data import pipeline
from vjepa_jax.evaluators.attention import Evaluator
from vjepa_jax.objectives import mae
from vjepa_jax.train import evaluate, sharding
from vjepa_jax.volumes.augment import make_augment
from vjepa_jax.volumes.grid import Grid

GRID = Grid((1, 4, 16, 16), (1, 2, 4, 4))


def _looks(weights):
  """Functions whose attention is `weights(batch)`, [B, t, z, y, x]."""
  return {
      "attention": lambda params, state, batch: weights(batch),
      "features": lambda params, state, batch: Features(None, GRID),
  }


def _even(batch):
  return np.full((len(batch["_mask"]), *GRID.dims), 1 / GRID.places, np.float32)


def _one_place(batch):
  looks = np.zeros((len(batch["_mask"]), *GRID.dims), np.float32)
  looks[:, :, 0, 0, 0] = 1.0
  return looks


def _draw(functions, data, **options):
  found = dict(Evaluator(functions, data, split="probe", **options).run({}, {}))
  assert set(found) == {"attention.maps"}
  return found["attention.maps"]


def _coloured(image):
  image = image[:, : int(0.84 * image.shape[1])].astype(int)
  return image.max(axis=-1) - image.min(axis=-1) > 60


def test_volumes_are_stacked_and_coloured_where_looked_at(make_data):
  data = make_data(patients=6)
  one = _draw(_looks(_one_place), data, clips=1)
  three = _draw(_looks(_one_place), data, clips=3)
  assert three.dtype == np.uint8 and three.shape == (3 * len(one), *one.shape[1:])
  assert all(_coloured(part).sum() > 100 for part in np.split(three, 3))
  assert not _coloured(_draw(_looks(_even), data)).any()


def test_only_what_the_encoder_sees_of_a_volume_is_drawn(make_data):
  def paint(volume, label, patient):
    volume[:, 1:-1, 8:-8, 8:-8] = 3.0  # The encoder's part.

  larger = make_data(patients=2, shape=(1, 6, 32, 32), paint=paint)
  image = _draw(_looks(_even), larger, clips=1)
  flat = make_data(patients=2, paint=lambda v, *_: v.__setitem__(..., 3.0))
  np.testing.assert_array_equal(image, _draw(_looks(_even), flat, clips=1))


def test_wrong_options_are_refused(make_data):
  data = make_data(patients=2)
  with pytest.raises(KeyError, match="must offer 'attention'; it offers features"):
    Evaluator({"features": None}, data, split="probe")
  with pytest.raises(KeyError, match="must offer 'attention' and 'features'"):
    Evaluator({}, data, split="probe")
  with pytest.raises(KeyError, match="no split 'validation'; it has probe"):
    Evaluator(_looks(_even), data)
  with pytest.raises(ValueError, match="clips 0 must be at least 1"):
    Evaluator(_looks(_even), data, split="probe", clips=0)


def test_clips_of_a_masked_autoencoder_are_drawn(open_embryos):
  objective = mae.MAE(
      vt_former.VTFormer(24, 1, (1, 4, 4, 4), heads=2),
      {"tube": dict(kind="tube", through="T", context=0.25, target=0.75)},
      decoder=dict(width=16, depth=1, heads=2, space_time="divided"),
  )
  data = open_embryos()
  batch = {
      "volume": np.zeros((1, 4, 8, 16, 16, 1), np.float32),
      "spacing": np.ones((1, 4), np.float32), "_position": np.zeros(1, np.int32),
  }
  params, state = jax.jit(objective.init)(jax.random.key(0), batch)
  functions = evaluate.wrap_functions(
      objective.functions(), make_augment(), sharding.make_mesh()
  )
  first = next(pipeline.eval_batches(data.splits["validation"], 4))
  looks = functions["attention"](params, state, first)
  assert looks.shape == (4, 4, 2, 4, 4)
  np.testing.assert_allclose(np.asarray(looks).sum(axis=(2, 3, 4)), 1.0, rtol=1e-5)
  found = dict(Evaluator(functions, data, batch_size=4).run(params, state))
  assert found["attention.maps"].std() > 20
