"""The probe: what frozen features know of labels, by patient."""

import numpy as np
import pytest

from vjepa_jax.backbones.base import Features
from vjepa_jax.evaluators.probe import Evaluator
from vjepa_jax.volumes.grid import Grid

GRID = Grid((1, 4, 16, 16), (1, 2, 4, 4))  # that of the fixtures
CLASSES = ("drusen", "fluid", "normal")
QUICK = {"bootstrap": 100, "batch_size": 16}


def _planted(volume, label, patient):
  """A bright spot whose place is the class; its row tells nothing."""
  del patient
  volume[0, :, 4:8, 4 * label : 4 * label + 4] += 60.0


def test_it_finds_a_planted_signal_and_beats_intensity(make_data, patches):
  functions = {"features": _mixed(patches["features"])}
  evaluator = Evaluator(functions, make_data(paint=_planted), **QUICK)
  found = dict(evaluator.run({"scale": 1.0}, {}))
  assert found["probe.accuracy"] > 0.9
  assert found["probe.accuracy.low"] <= found["probe.accuracy"]
  assert found["probe.accuracy"] <= found["probe.accuracy.high"]
  assert found["probe.pixel_pca"] > 0.9
  assert found["probe.intensity"] < 0.6
  assert found["probe.chance"] == pytest.approx(1 / 3)
  difference = found["probe.accuracy"] - found["probe.intensity"]
  assert found["probe.minus_intensity"] == pytest.approx(difference)
  assert found["probe.minus_intensity.low"] > 0.2


def _mixed(features):
  """Tokens weighted by their place, so that their mean still knows it."""
  weights = np.random.default_rng(0).normal(size=(1, GRID.tokens, 8))

  def mixed(params, model_state, batch):
    tokens = features(params, model_state, batch).tokens
    return Features(tokens.mean(axis=-1, keepdims=True) * weights, GRID)

  return mixed


def test_on_noise_it_stays_at_chance_and_the_interval_says_so(make_data, patches):
  found = dict(Evaluator(patches, make_data(), **QUICK).run({"scale": 1.0}, {}))
  for name in ("accuracy", "intensity", "pixel_pca", "depth_profile"):
    assert abs(found[f"probe.{name}"] - 1 / 3) < 0.17, name
    assert found[f"probe.{name}.low"] < 0.45, name


def test_features_that_name_the_patient_are_worth_nothing(make_data):
  """Two eyes of one patient have one vector; a split by file would score 1."""
  codes = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)

  def features(params, model_state, batch):
    del params, model_state
    tokens = codes[np.maximum(batch["index"], 0) // 2]
    return Features(np.repeat(tokens[:, None], 4, axis=1), GRID)

  evaluator = Evaluator({"features": features}, make_data(), baselines=(), **QUICK)
  assert dict(evaluator.run({}, {}))["probe.accuracy"] < 0.5


def test_the_same_parameters_give_the_same_numbers(make_data, patches):
  data = make_data(paint=_planted)
  options = QUICK | {"few": 12, "leaks": ("device",)}
  first = Evaluator(patches, data, **options)
  once = dict(first.run({"scale": 1.0}, {}))
  assert once == dict(first.run({"scale": 1.0}, {}))
  assert once == dict(Evaluator(patches, data, **options).run({"scale": 1.0}, {}))


def test_baselines_are_read_once_a_process(make_data, patches):
  data = make_data(patients=10)
  evaluator = Evaluator(patches, data, folds=2, **QUICK)
  dict(evaluator.run({"scale": 1.0}, {}))
  source = data.splits["probe"]._canvases
  reads = []
  read = source.read
  source.read = lambda row: reads.append(row) or read(row)
  dict(evaluator.run({"scale": 2.0}, {}))
  assert len(reads) == 20  # the encoder's pass and no other


def test_the_online_encoder_is_probed_where_it_is_offered(make_data, patches):
  functions = {**patches, "context_features": patches["features"]}
  data = make_data(patients=10)
  options = QUICK | {"folds": 2, "baselines": ()}
  found = dict(Evaluator(functions, data, **options).run({"scale": 1.0}, {}))
  assert found["probe.context"] == found["probe.accuracy"]
  options["encoders"] = ("features",)
  found = dict(Evaluator(functions, data, **options).run({"scale": 1.0}, {}))
  assert "probe.context" not in found


def test_mean_std_pooling_sees_what_the_mean_cannot(make_data):
  def features(params, model_state, batch):
    del params, model_state
    generator = np.random.default_rng(1)
    noise = generator.normal(size=(len(batch["label"]), 64, 4)).astype(np.float32)
    noise -= noise.mean(axis=1, keepdims=True)
    return Features(noise * (1.0 + batch["label"][:, None, None]), GRID)

  data = make_data(labels=("drusen", "normal"))
  scores = {
      pool: dict(
          Evaluator({"features": features}, data, pool=pool, baselines=(), **QUICK)
          .run({}, {})
      )["probe.accuracy"]
      for pool in ("mean", "mean_std")
  }
  assert scores["mean_std"] > 0.95
  assert scores["mean"] < 0.65


def test_few_labels_know_less_and_the_device_is_decoded(make_data):
  generator = np.random.default_rng(0)
  centres = generator.normal(size=(3, 12))

  def features(params, model_state, batch):
    del params, model_state
    index = np.maximum(batch["index"], 0)
    noise = np.stack([np.random.default_rng(i).normal(size=12) for i in index])
    tokens = 1.2 * centres[index // 2 % 3] + noise
    device = (index // 2 // 3 % 2)[:, None] * 5.0
    return Features(np.concatenate([tokens, device], axis=1)[:, None], GRID)

  evaluator = Evaluator(
      {"features": features}, make_data(patients=60), baselines=(), few=6,
      leaks=("device",), **QUICK,
  )
  found = dict(evaluator.run({}, {}))
  assert 1 / 3 < found["probe.few"] < found["probe.accuracy"]
  assert found["probe.few.low"] < found["probe.few"] < found["probe.few.high"]
  assert found["probe.device"] > 0.95
  assert found["probe.device_chance"] == 0.5


def test_unlabelled_rows_are_left_out(make_data, patches):
  data = make_data(labels=(*CLASSES, None), patients=40, paint=_planted)
  evaluator = Evaluator(patches, data, baselines=("intensity",), **QUICK)
  found = dict(evaluator.run({"scale": 1.0}, {}))
  assert found["probe.chance"] == pytest.approx(1 / 3)


def test_a_file_that_turns_out_bad_is_left_out_of_every_number(make_data, patches):
  lost = make_data(paint=_planted, missing=("4_1", "9_0"))
  found = dict(
      Evaluator(patches, lost, folds=4, leaks=("device",), **QUICK)
      .run({"scale": 1.0}, {})
  )
  assert all(np.isfinite(value) for value in found.values())
  assert found["probe.pixel_pca"] > 0.9


@pytest.mark.parametrize(
    ("change", "options", "error"),
    [
        ({"labels": ()}, {}, "none of 80 volumes has a label"),
        ({"labels": ("normal",)}, {}, "all 'normal'; needs at least two classes"),
        ({"patients": 4}, {}, "4 labelled patients for 5 folds"),
        ({}, {"few": 40}, "few=40: needs at least 2 patients and fewer than the 40"),
        ({}, {"pool": "max"}, "pool 'max' is not one of mean, mean_std"),
    ],
)
def test_it_refuses_what_it_cannot_answer(make_data, patches, change, options, error):
  with pytest.raises(ValueError, match=error):
    Evaluator(patches, make_data(**change), **options)


def test_unknown_names_are_errors(make_data, patches):
  data = make_data()
  with pytest.raises(KeyError, match="no split 'prob'; it has probe"):
    Evaluator(patches, data, split="prob")
  with pytest.raises(KeyError, match="'pixel' is not known"):
    Evaluator(patches, data, baselines=("pixel",))
  with pytest.raises(KeyError, match="must offer 'features'"):
    Evaluator({}, data)


def test_features_that_are_not_finite_are_an_error(make_data, patches):
  evaluator = Evaluator(patches, make_data(), baselines=(), **QUICK)
  with pytest.raises(ValueError, match="not finite for 80 of 80 volumes"):
    dict(evaluator.run({"scale": np.nan}, {}))
