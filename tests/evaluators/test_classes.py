"""The evaluator of classes of volumes: what it counts, and for whom."""

import numpy as np
import pytest

from tests.evaluators.conftest import CLASSES
from vjepa_jax.evaluators.classes import Evaluator

QUICK = {"split": "probe", "bootstrap": 50, "batch_size": 8, "figures": False}


def telling(change=lambda labels: labels):
  """Functions whose logits name change(true label) [B]."""

  def logits(params, model_state, batch):
    del params, model_state
    return 20.0 * np.eye(len(CLASSES))[change(np.maximum(batch["label"], 0))]

  return {"logits": logits}


def run(functions, data, **options):
  return dict(Evaluator(functions, data, **QUICK | options).run({}, {}))


def test_a_perfect_objective_has_perfect_numbers(make_data):
  found = run(telling(), make_data())
  for name in ("balanced_accuracy", "balanced_accuracy.low", "accuracy", "macro_f1"):
    assert found[f"classes.{name}"] == 1.0, name
  assert found["classes.nll"] < 1e-6
  assert (found["classes.volumes"], found["classes.participants"]) == (80, 40)


def test_one_class_for_all_is_chance_however_many_it_is_right_for(make_data):
  labels = ("drusen",) * 8 + ("fluid", "normal")
  found = run(telling(lambda labels: labels * 0), make_data(labels=labels))
  assert found["classes.accuracy"] == found["classes.chance"] == pytest.approx(0.8)
  assert found["classes.balanced_accuracy"] == pytest.approx(1 / 3)
  low, high = (found[f"classes.balanced_accuracy.{end}"] for end in ("low", "high"))
  assert low <= 1 / 3 <= high


def test_volumes_without_a_label_or_a_readable_file_count_for_nothing(make_data):
  data = make_data(patients=12, labels=(*CLASSES, None), missing=("0_0", "3_0"))
  found = run(telling(), data, prefix="test")
  # Nine of twelve patients have a label, with two eyes each; one of these is missing.
  assert found["test.volumes"] == 2 * 9 - 1
  assert found["test.accuracy"] == 1.0
  assert all(name.startswith("test.") for name in found)


def test_the_confusion_is_drawn(make_data):
  figure = run(telling(), make_data(), figures=True)["classes.confusion"]
  assert figure.dtype == np.uint8 and figure.ndim == 3 and figure.std() > 10


def test_what_it_cannot_answer_is_refused(make_data):
  with pytest.raises(KeyError, match="must offer 'logits'.*it offers features"):
    Evaluator({"features": None}, make_data(), **QUICK)
  with pytest.raises(ValueError, match="no volume has a label"):
    Evaluator(telling(), make_data(labels=(None,)), **QUICK)
  of_frames = {"logits": lambda *unused: np.zeros((8, 4, 3))}
  with pytest.raises(ValueError, match="judged by the evaluator 'stages'"):
    run(of_frames, make_data())
