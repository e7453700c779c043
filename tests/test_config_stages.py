"""Configs that learn stages and classes from labels: sound, counted, refused."""

import numpy as np
import pytest

from tests.test_config import faults_of, load
from vjepa_jax import config as config_lib
from vjepa_jax.config import programs
from vjepa_jax.objectives import classify


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("VJEPA_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def changed(name="worm_stages", arm="tiny", **changes):
  """A config with the value of section__key changed; None takes it out."""
  config = load(name, arm)
  with config.unlocked(), config.ignore_type():
    for path, value in changes.items():
      *sections, key = path.split("__")
      place = config
      for section in sections:
        place = place[section]
      if value is None:
        del place[key]
      else:
        place[key] = value
  return config


def built(config):
  return config_lib.build(config, say=lambda text: None)


def test_balanced_weights_come_from_the_training_labels(cache):
  experiment = built(load("worm_stages", "tiny"))
  weights = experiment.objective.class_weights
  ids = experiment.data.splits["train"].stage_ids
  counts = np.bincount(ids[ids >= 0], minlength=8)
  assert len(weights) == 8
  assert (weights * counts).sum() / counts.sum() == pytest.approx(1.0)
  np.testing.assert_allclose(
      weights, classify.balanced_weights(counts), rtol=1e-9
  )
  seen = counts > 0
  products = np.asarray(weights)[seen] * counts[seen]
  np.testing.assert_allclose(products, products[0], rtol=1e-9)
  assert counts[seen].max() > counts[seen].min()
  assert experiment.optimizer.layer_decay == 0.75
  assert "stages" in experiment.evaluators and "stage_probe" not in experiment.evaluators
  assert experiment.options.best_metric == "stages.accuracy"


def test_weights_that_are_given_keep_their_ratios(cache):
  weights = (1.0,) * 7 + (2.0,)
  experiment = built(changed(
      objective__class_weights=weights, objective__balance_classes=False
  ))
  found = np.array(experiment.objective.class_weights)
  np.testing.assert_allclose(found / found[0], weights)
  ids = experiment.data.splits["train"].stage_ids
  assert found[ids[ids >= 0]].mean() == pytest.approx(1.0)


def test_training_embryos_without_any_stage_are_refused(cache):
  config = changed(data__stages__table="none.tsv")
  with pytest.raises(config_lib.ConfigError, match="data.stages: no training recording"):
    built(config)


@pytest.mark.parametrize("arm", ["tiny,scratch", "tiny,frozen"])
def test_arms_of_the_encoder_build(cache, arm):
  optimizer = built(load("worm_stages", arm)).optimizer
  assert optimizer.layer_decay == 1.0
  assert optimizer.frozen == (("^encoder/",) if "frozen" in arm else ())


def test_a_diagnosis_is_built_from_labels_of_volumes(cache):
  """Of the OCT corpus, in which a column of the manifest names the class."""
  config = diagnosis()
  experiment = built(config)
  assert experiment.data.labels == ("drusen", "fluid", "normal", "thinning")
  ids = experiment.data.splits["train"].label_ids
  counts = np.bincount(ids[ids >= 0], minlength=4)
  np.testing.assert_allclose(
      experiment.objective.class_weights, classify.balanced_weights(counts)
  )
  with config.unlocked():
    config.data.split_column = "split"
  with pytest.raises(config_lib.ConfigError, match="data.label: no training recording"):
    built(config)
  with config.unlocked():
    config.objective.classes = 3
  with pytest.raises(config_lib.ConfigError, match="labels of the data are 4"):
    built(config)


def diagnosis():
  config = load("oct_multi", "tiny")
  with config.unlocked():
    config.objective = dict(
        name="classify", classes=4, labels="label", balance_classes=True
    )
    # The corpus's own split "train" has no labels.
    config.data.split_column = ""
    config.data.splits = dict(train=0.7, validation=0.3)
    config.train.best_metric = ""
    config.evals = {}
  return config


@pytest.mark.parametrize("changes, words", [
    (
        dict(objective__classes=11),
        ["objective.classes: 11", "data.stages.taxonomy has 8"],
    ),
    (
        dict(data__stages={}, evals={}, train__best_metric=""),
        ["'frame_label' without data.stages"],
    ),
    (dict(objective__classes=None), ["objective.classes: missing"]),
    (dict(objective__class_weights=(1.0,) * 8), ["balance_classes; give one of them"]),
    (dict(objective__max_skp=1.0), ["objective.max_skp: unknown key; closest: max_skip"]),
    (dict(objective__head__pool="median"), ["objective.head.pool"]),
    (
        dict(augment__crop=(4, 8, 8, 8), evals__stages__tile=(4, 8, 8, 16)),
        ["evals.stages.tile: (4, 8, 8, 16) is not augment.crop (4, 8, 8, 8)"],
    ),
    (
        dict(objective__labels="label", objective__head__pool="cls",
             objective__transition_weight=0.0, data__clip__eval_step=1),
        ["'cls' without model.class_token"],
    ),
    (
        dict(data__stages__sources=("answers",)),
        ["train.best_metric: 'stages.accuracy'", "stages.answers_accuracy"],
    ),
    (
        dict(objective__labels="label", objective__transition_weight=0.0),
        ["objective.labels: 'label'", "data.clip.eval_step=1"],
    ),
    (dict(train__mesh_sequence=3), ["train.mesh_sequence: 3 devices cannot share 4"]),
    (dict(data__percentiles=(0.5,)), ["data.percentiles: (0.5,)"]),
    (dict(optimizer__freeze=("^encoder/",)), ["optimizer.freeze and", "both or neither"]),
    (dict(optimizer__freeze_steps=3), ["optimizer.freeze and", "both or neither"]),
    (dict(optimizer__layer_decay=0.0), ["optimizer.layer_decay: 0.0 is not in (0, 1]"]),
    (dict(augment__flip=(0.5, 0.0, 0.0, 0.0)), ["augment.flip", "stages"]),
])
def test_what_cannot_work_is_a_fault_of_the_config(changes, words):
  (fault,) = faults_of(changed(**changes))
  assert all(word in fault for word in words), fault


def test_labels_of_volumes_need_a_column_that_holds_them():
  config = diagnosis()
  with config.unlocked():
    config.data.label = ""
  (fault,) = faults_of(config)
  assert "objective.labels: 'label' without data.label" in fault


def test_freezing_until_an_epoch_becomes_steps(cache):
  config = changed(optimizer__freeze=("^encoder/",), optimizer__freeze_percent=50.0)
  optimizer = built(config).optimizer
  assert (optimizer.freeze, optimizer.freeze_steps) == (("^encoder/",), 6)


def test_the_compiled_step_has_labels_of_every_time_point():
  plain = config_lib.as_plain(load("worm_stages", "tiny"))
  assert programs.batch_shapes(plain, 2)["frame_label"].shape == (2, 4)
  assert programs.flops_per_volume(plain) > 0


@pytest.mark.parametrize("arm", ["scratch,frozen", "full,base", "sample,literal"])
def test_arms_that_cannot_be_joined_are_refused(arm):
  with pytest.raises(ValueError, match="cannot be joined"):
    load("worm_stages", arm)


def test_losses_over_time_need_two_time_points():
  found = faults_of(changed(data__clip=dict(frames=1, stride=1, step=1)))
  assert any("objective.transition_weight: 0.1 with data.clip.frames 1" in f for f in found)


def test_a_moving_average_is_not_started_from_elsewhere():
  found = faults_of(changed("oct_multi", train__start_from="runs/other"))
  assert any("train.start_from: 'runs/other' with objective 'vjepa'" in f for f in found)


@pytest.mark.parametrize("name", ["worm_stages", "oct_diagnosis"])
def test_a_frozen_encoder_drops_no_block(name):
  assert load(name, "frozen").model.drop_path == 0.0
  assert load(name).model.drop_path == load(name, "scratch").model.drop_path == 0.1


def test_the_literal_recipe_steps_at_its_batch_and_rate():
  config = load("worm_stages", "literal")
  train, optimizer = config.train, config.optimizer
  assert (train.batch_size, train.accum) == (16, 2)  # 8 rows, twice
  plain = config_lib.as_plain(config)["optimizer"]
  del plain["warmup_percent"]
  built = config_lib.build_optimizer(
      **plain, batch_size=train.batch_size, total_steps=100, warmup_steps=10
  )
  rates = [float(built.learning_rate(step)) for step in range(100)]
  assert max(rates) == pytest.approx(5e-5) == optimizer.learning_rate


@pytest.mark.parametrize("changes", [
    dict(
        data__filters__participant=("embryo1",), data__split_column="",
        data__clip__time_blocks=10,
    ),
    dict(data__stages__sources=("counts",), train__best_metric="stages.accuracy"),
])
def test_ways_out_of_answers_for_one_embryo_are_sound(changes):
  config = changed("worm_stages", "literal", data__manifest="manifest.tsv", **changes)
  config_lib.check_config(config)
