"""Numbers and pictures of what was filled in."""

import jax
import numpy as np
import pytest

from vjepa_jax.backbones import vit, vt_former
from vjepa_jax.evaluators.reconstruction import Evaluator
from vjepa_jax.objectives import mae
from vjepa_jax.train import evaluate, sharding
from vjepa_jax.volumes.augment import make_augment

NUMBER = "reconstruction.error_over_variance"
FIGURE = "reconstruction.panel"


def _filled_with(fill):
  """Functions whose hidden half is `fill(volume, hidden)`; the rest is exact."""

  def reconstruct(params, state, batch):
    volume = batch["volume"].astype(np.float32)
    hidden = np.zeros(volume.shape, bool)
    hidden[..., volume.shape[4] // 2 :, :] = True
    new = np.where(hidden, fill(volume, hidden), volume)
    new[batch["_mask"] == 0] = 99.0  # Of rows of padding nobody asks.
    return {
        "volume": volume, "visible": np.where(hidden, 0, volume),
        "reconstruction": new.astype(np.float32), "hidden": hidden,
    }

  return {"reconstruct": reconstruct}


def _mean_of(chosen):
  """Fills each volume with the mean of its own chosen voxels."""

  def fill(volume, hidden):
    picked = hidden & chosen(volume)
    axes = (1, 2, 3, 4)
    total = np.where(picked, volume, 0).sum(axis=axes, keepdims=True, dtype=np.float64)
    return total / np.maximum(picked.sum(axis=axes, keepdims=True), 1)

  return fill


def _run(functions, data, **options):
  return dict(Evaluator(functions, data, split="probe", **options).run({}, {}))


def test_a_perfect_reconstruction_leaves_nothing(make_data):
  found = _run(_filled_with(lambda volume, hidden: volume), make_data(patients=4))
  assert set(found) == {NUMBER, f"{NUMBER}_foreground", FIGURE}
  assert found[NUMBER] == found[f"{NUMBER}_foreground"] == 0.0


def test_the_mean_of_a_volumes_hidden_voxels_is_one(make_data):
  data = make_data(patients=5)  # 10 volumes: the last batch is padded.
  found = _run(_filled_with(_mean_of(lambda v: v >= 0)), data, batch_size=4)
  assert found[NUMBER] == pytest.approx(1.0, rel=1e-4)
  assert found[f"{NUMBER}_foreground"] == pytest.approx(1.0, rel=1e-4)
  # What is visible has no part in it, not even in the mean.
  other = _run(_filled_with(lambda volume, hidden: np.float32(40.0)), data)
  assert other[NUMBER] > 1.0


def test_the_foreground_is_judged_apart_from_the_rest(make_data):
  def paint(volume, label, patient):
    volume[:] = 10.0 + volume / 40.0
    volume[:, :, 4:8] += 100.0 + 10.0 * patient

  data, bright = make_data(patients=4, paint=paint), f"{NUMBER}_foreground"
  mean = _mean_of(lambda v: v >= 0)
  right = _run(_filled_with(lambda v, h: np.where(v > 60, v, mean(v, h))), data)
  assert right[bright] == 0.0 and 0.1 < right[NUMBER] < 0.5
  wrong = _run(_filled_with(lambda v, h: np.where(v > 60, mean(v, h), v)), data)
  assert wrong[bright] == pytest.approx(1.0, rel=1e-3)
  assert wrong[NUMBER] == pytest.approx(1.0 - right[NUMBER], rel=1e-3)


def test_both_sums_are_over_all_volumes(make_data):
  """A volume of ten times the contrast counts a hundred times."""

  def paint(volume, label, patient):
    volume[:] = 100.0 + (volume - 40.0) * (2.0 if patient else 0.2)

  def fill(volume, hidden):
    calm = volume.std(axis=(1, 2, 3, 4, 5), keepdims=True) < 10
    return np.where(calm, _mean_of(lambda v: v >= 0)(volume, hidden), volume)

  found = _run(_filled_with(fill), make_data(patients=2, paint=paint), batch_size=2)
  assert 0.002 < found[NUMBER] < 0.05


def test_volumes_without_contrast_have_no_number(make_data):
  def paint(volume, label, patient):
    volume[:] = 7.0

  found = _run(_filled_with(lambda v, h: v), make_data(patients=2, paint=paint))
  assert np.isnan(found[NUMBER]) and f"{NUMBER}_foreground" not in found


def test_as_many_pictures_as_asked_for_are_stacked(make_data):
  functions = _filled_with(lambda volume, hidden: volume)
  data = make_data(patients=6)
  one, two = (_run(functions, data, figures=n)[FIGURE] for n in (1, 2))
  assert two.dtype == np.uint8 and two.shape == (2 * len(one), *one.shape[1:])
  assert FIGURE not in _run(functions, data, figures=0)
  few = _run(functions, data, figures=9, volumes=3)[FIGURE]
  assert len(few) == 3 * len(one)


def test_wrong_options_are_refused_before_anything_is_computed(make_data):
  data, functions = make_data(patients=2), _filled_with(lambda v, h: v)
  with pytest.raises(KeyError, match="offer 'reconstruct'.*offers features"):
    Evaluator({"features": None}, data, split="probe")
  with pytest.raises(KeyError, match="no split 'validation'; it has probe"):
    Evaluator(functions, data)
  for options in (dict(volumes=0), dict(figures=-1)):
    with pytest.raises(ValueError, match="must be at least 1 and figures"):
      Evaluator(functions, data, split="probe", **options)
  broken = {"reconstruct": lambda p, s, b: {"volume": 0, "hidden": 0}}
  with pytest.raises(KeyError, match="gave no visible, reconstruction; it must give"):
    _run(broken, data)


def _functions(objective, data, split):
  """An objective's functions as the loop wraps them, and its parameters."""
  augment = make_augment()
  element = data.splits[split].element(0)
  batch = {
      "volume": np.zeros((1, *element["volume"].shape), np.float32),
      "spacing": np.ones((1, 4), np.float32), "_position": np.zeros(1, np.int32),
  }
  params, state = jax.jit(objective.init)(jax.random.key(0), batch)
  mesh = sharding.make_mesh()
  return evaluate.wrap_functions(objective.functions(), augment, mesh), params, state


DECODER = dict(width=16, depth=1, heads=2)


def test_clips_of_a_masked_autoencoder_are_judged_and_drawn(open_embryos):
  objective = mae.MAE(
      vt_former.VTFormer(24, 1, (1, 4, 4, 4), heads=2),
      {"tube": dict(kind="tube", through="T", context=0.25, target=0.75)},
      decoder=DECODER | dict(space_time="divided"), target="pixel",
  )
  data = open_embryos()
  functions, params, state = _functions(objective, data, "validation")
  evaluator = Evaluator(functions, data, volumes=6, batch_size=4)
  found = dict(evaluator.run(params, state))
  # Not trained: about as far off as 0, the mean of the whole clip.
  assert 0.7 < found[NUMBER] < 3.0
  assert found[FIGURE].shape[2] == 3 and found[FIGURE].std() > 20
  again = dict(evaluator.run(params, state))
  assert again[NUMBER] == found[NUMBER]


def test_single_volumes_of_a_masked_autoencoder_are_judged_and_drawn(make_data):
  objective = mae.MAE(
      vit.ViT(24, 1, (1, 2, 4, 4), heads=2, positions="sincos"),
      {"random": dict(kind="random", context=0.25, target=0.5)}, decoder=DECODER,
  )
  data = make_data(patients=3)
  functions, params, state = _functions(objective, data, "probe")
  found = dict(Evaluator(functions, data, split="probe").run(params, state))
  assert 0.0 < found[NUMBER] < 3.0 and found[FIGURE].std() > 20
