"""The evaluator of stages: raw and decoded guesses, truth and answers."""

import json
import shutil

import numpy as np
import pytest

from vjepa_jax.data import pipeline
from vjepa_jax.data.phantom_embryos import STAGES
from vjepa_jax.evaluators import embryos
from vjepa_jax.evaluators.stages import Evaluator

QUICK = {"bootstrap": 50, "batch_size": 4, "figures": False}


def telling(change=lambda stages: stages, sure=20.0, of="frame_label"):
  """Functions whose logits name change(true stages) [B, T]."""

  def logits(params, model_state, batch):
    del params, model_state
    told = change(np.maximum(batch[of], 0))
    return sure * np.eye(len(STAGES))[np.clip(told, 0, len(STAGES) - 1)]

  return {"logits": logits}


def drawing(seed):
  def logits(params, model_state, batch):
    del params, model_state
    rng = np.random.default_rng([seed, *np.maximum(batch["index"], 0)])
    return rng.normal(size=(*batch["frame_label"].shape, len(STAGES)))

  return {"logits": logits}


def run(functions, data, **options):
  return dict(Evaluator(functions, data, **QUICK | options).run({}, {}))


@pytest.fixture(scope="module")
def data(open_embryos):
  return open_embryos()


def test_a_perfect_objective_has_perfect_numbers(data):
  found = run(telling(), data)
  for name in ("accuracy", "accuracy.low", "accuracy.high", "balanced_accuracy",
               "macro_f1", "off_by_one", "kappa", "decoded_accuracy"):
    assert found[f"stages.{name}"] == 1.0, name
  for name in ("stage_mae", "impossible_raw", "impossible_raw_rate",
               "impossible_decoded", "transition_error_minutes", "boundaries_missed"):
    assert found[f"stages.{name}"] == 0.0, name
  assert found["stages.nll"] < 1e-6 and found["stages.calibration_error"] < 1e-6
  assert found["stages.embryos"] == 3 and found["stages.time_points"] == 96
  assert 1 / 8 <= found["stages.chance"] < 0.3
  assert all(np.isfinite(value) for value in found.values())


def test_tiles_are_asked_one_by_one_and_the_mean_counts(data):
  """One half tells stages, the other is as sure of the first of all."""
  right = telling(sure=20.0)["logits"]

  def logits(params, model_state, batch):
    told = right(params, model_state, batch)
    if batch["crop_start"][0, 2]:
      return 0.1 * told
    return told

  found = run({"logits": logits}, data, tile=(4, 8, 8, 16))
  alone = run(telling(sure=2.0), data)
  assert found["stages.accuracy"] == 1.0
  assert found["stages.nll"] == pytest.approx(
      -np.log((1 + np.exp(-alone["stages.nll"])) / 2), rel=1e-4
  )


def test_a_tile_larger_than_the_clip_is_an_error(data):
  with pytest.raises(ValueError, match="tiles"):
    run(telling(), data, tile=(4, 8, 32, 16))


def test_a_random_one_is_near_chance_and_decoding_hides_what_raw_guesses_do(data):
  found = run(drawing(1), data)
  assert abs(found["stages.accuracy"] - 1 / 8) < 0.1
  assert found["stages.accuracy.low"] < found["stages.accuracy.high"]
  assert abs(found["stages.kappa"]) < 0.25
  assert found["stages.impossible_raw"] > 40 and found["stages.impossible_decoded"] == 0
  assert found["stages.impossible_raw_rate"] == found["stages.impossible_raw"] / 93
  assert found["stages.transition_error_minutes"] > 1.0
  assert found["stages.decoded_accuracy"] != found["stages.accuracy"]


def test_one_stage_late_is_wrong_off_by_one_and_possible(data):
  found = run(telling(lambda stages: stages - 1), data)
  first = np.mean([row == 0 for row in data.splits["validation"].stage_ids])
  assert found["stages.accuracy"] == pytest.approx(first)
  assert found["stages.off_by_one"] == 1.0
  assert found["stages.stage_mae"] == pytest.approx(1 - first)
  assert found["stages.boundaries_missed"] == 3  # Nobody is ever called folded.
  assert found["stages.impossible_raw"] == 0


def test_what_jumps_about_is_repaired_in_the_decoded_path_alone(data):
  def flickering(stages):
    return np.where(np.arange(stages.shape[1]) == 1, 7 - stages, stages)

  found = run(telling(flickering, sure=3.0), data)
  assert found["stages.accuracy"] < 0.8 < found["stages.decoded_accuracy"]
  assert found["stages.impossible_raw"] > 10 and found["stages.impossible_decoded"] == 0
  assert found["stages.transition_error_minutes"] < 1.0


def test_probabilities_of_overlapping_clips_are_averaged(open_embryos):
  volumes = open_embryos(clip=dict(eval_step=1)).splits["validation"]
  points = embryos.time_points(volumes, "test")
  batches = pipeline.eval_batches(volumes, 4, points.rows)
  said = lambda batch: np.broadcast_to(
      np.arange(4.0)[:, None], (len(batch["_mask"]), 4, 1)
  )
  found = embryos.gather(points, batches, said, "test")
  first = found.values[points.movie == 0, 0]
  # The n-th minute is the n-th of the first clip, the first of the n-th, all between.
  np.testing.assert_allclose(first[:5], [0, 0.5, 1, 1.5, 1.5])
  np.testing.assert_allclose(first[-2:], [2.5, 3])
  np.testing.assert_allclose(found.minutes[points.movie == 0], np.arange(32))


def test_minutes_are_those_of_the_embryo_whatever_the_stride_of_a_clip(open_embryos):
  volumes = open_embryos(clip=dict(stride=3)).splits["validation"]
  points = embryos.time_points(volumes, "test")
  batches = pipeline.eval_batches(volumes, 4, points.rows)
  found = embryos.gather(points, batches, lambda b: np.zeros((4, 4, 1)), "test")
  for _, at in embryos.sequences(points, found, "test"):
    np.testing.assert_allclose(found.minutes[at], points.numbers[at], rtol=1e-6)
  assert len(set(points.numbers)) == 32


def test_few_clips_show_every_time_point_once(open_embryos):
  for clip in (dict(frames=4), dict(frames=4, stride=2), dict(frames=3)):
    volumes = open_embryos(clip=clip).splits["train"]
    points = embryos.time_points(volumes, "test", once=True)
    shown = np.bincount(points.places.ravel(), minlength=4 * 32)
    assert len(points) == 4 * 32 and shown.min() == 1, clip
    assert shown.sum() == 4 * (32 + -32 % clip["frames"]), clip
    whole = embryos.time_points(volumes, "test")
    np.testing.assert_array_equal(points.stages, whole.stages)
    assert len(whole.rows) == len(volumes)


def test_logits_of_a_whole_clip_are_of_its_middle(data):
  found = run(telling(of="label"), data)
  assert found["stages.accuracy"] == 1.0 and found["stages.time_points"] == 24
  assert found["stages.impossible_raw"] == 0  # Four minutes let four stages pass.


@pytest.fixture
def answered(open_embryos, tmp_path):
  """Returns answered(sources) -> data; a model calls each of 4 stages the next one."""
  plain = open_embryos()

  def make(sources):
    paths = {}
    for row in (r for split in plain.splits.values() for r in split.rows):
      said = {
          n: STAGES[STAGES.index(stage) + 1]
          for n, stage in zip(row.numbers, row.stages, strict=True)
          if stage in STAGES[:3]
      }
      path = tmp_path / f"{row.participant}.json"
      known = json.loads(path.read_text()) if path.exists() else []
      path.write_text(json.dumps(known + [
          {"frame_index": n, "response": f"## Developmental Stage: {stage}"}
          for n, stage in said.items()
      ]))
      paths[row.participant] = str(path)
    return open_embryos(stages=dict(sources=sources, answers=paths))

  return make


def test_agreement_with_answers_is_never_called_accuracy(answered):
  found = run(telling(of="frame_label"), answered(("answers",)))
  assert not [n for n in found if n.startswith(("stages.accuracy", "stages.kappa"))]
  assert found["stages.answers_accuracy"] == 1.0  # The labels are the answers.
  assert "stages.answers_transition_error_minutes" in found
  assert found["stages.answers_time_points"] < 50
  assert found["stages.impossible_raw_rate"] > 0  # Unlabelled minutes are guessed, too.


@pytest.mark.parametrize("sources", [("table", "answers"), ("answers", "table")])
def test_truth_and_answers_are_told_apart_in_either_order(answered, sources, data):
  mixed = answered(sources)
  true = np.concatenate(data.splits["validation"].stage_ids)
  learned = np.concatenate(mixed.splits["validation"].stage_ids)
  assert (learned == true).all() == (sources[0] == "table")
  points = embryos.time_points(mixed.splits["validation"], "test")
  np.testing.assert_array_equal(points.truth, true)
  told = points.answers >= 0
  assert 0 < told.sum() < len(told)
  np.testing.assert_array_equal(points.answers[told], points.truth[told] + 1)
  found = run(telling(), mixed)
  assert "stages.answers_accuracy" not in found
  assert 0 < found["stages.kappa_answers"] <= 1
  assert found["stages.time_points"] == 96
  assert (found["stages.accuracy"] == 1.0) == (sources[0] == "table")


def test_figures_are_drawn_where_asked_for(data):
  pytest.importorskip("matplotlib", reason="extra figures")
  found = run(drawing(1), data, figures=True, drawn=2)
  for name in ("stages.timeline", "stages.confusion"):
    assert found[name].dtype == np.uint8 and found[name].shape[2] == 3
    assert found[name].std() > 10


def test_figures_of_answers_show_no_truth(answered):
  pytest.importorskip("matplotlib", reason="extra figures")
  found = run(telling(), answered(("answers",)), figures=True)
  assert "stages.timeline" in found and "stages.confusion" not in found


def test_a_single_embryo_has_no_interval(open_embryos, embryo_corpus, tmp_path):
  lines = embryo_corpus.read_text().splitlines(keepends=True)
  home = shutil.copytree(embryo_corpus.parent, tmp_path / "one")
  (home / "manifest.tsv").write_text("".join(lines[:6]))
  found = run(telling(), open_embryos(home / "manifest.tsv"))
  assert found["stages.embryos"] == 1 and found["stages.accuracy"] == 1.0
  assert "stages.accuracy.low" not in found


def test_of_an_unknown_time_step_stages_are_judged_and_transitions_are_not(
    open_embryos, embryo_corpus, tmp_path, caplog
):
  home = shutil.copytree(embryo_corpus.parent, tmp_path / "untimed")
  table = (home / "manifest.tsv").read_text().replace("\t60\t", "\t\t")
  (home / "manifest.tsv").write_text(table)
  found = run(telling(), open_embryos(home / "manifest.tsv"), figures=True)
  assert found["stages.accuracy"] == 1.0 and "stages.confusion" in found
  assert "phantom_diSPIM_5 is not known" in caplog.text and "time_step_s" in caplog.text
  for name in ("impossible_raw", "decoded_accuracy", "boundaries_missed", "timeline"):
    assert f"stages.{name}" not in found, name


def test_a_second_split_has_names_of_its_own(data):
  found = run(telling(), data, prefix="test", figures=True)
  assert found["test.accuracy"] == 1.0
  assert all(name.startswith("test.") for name in found)


def test_what_it_cannot_answer_is_refused_at_the_start(data, make_data, open_embryos):
  with pytest.raises(KeyError, match="must offer 'logits'.*it offers features"):
    Evaluator({"features": None}, data)
  with pytest.raises(KeyError, match="no split 'test'; it has train, validation"):
    Evaluator(telling(), data, split="test")
  with pytest.raises(ValueError, match="not clips of movies"):
    Evaluator(telling(), make_data(patients=2), split="probe")
  unlabelled = open_embryos(stages=dict(sources=("answers",)))
  with pytest.raises(ValueError, match="none of 96 time points has a stage"):
    Evaluator(telling(), unlabelled)
  with pytest.raises(ValueError, match="max_skip 0 must be above 0"):
    Evaluator(telling(), data, max_skip=0)


def test_logits_of_other_stages_or_times_are_refused(data):
  of = lambda shape: {"logits": lambda params, state, batch: np.zeros(shape)}
  with pytest.raises(ValueError, match="logits .4, 4, 5. for 8 stages"):
    run(of((4, 4, 5)), data)
  with pytest.raises(ValueError, match="of clips of 4 time points"):
    run(of((4, 2, 8)), data)
  with pytest.raises(ValueError, match="not finite"):
    run({"logits": lambda params, state, batch: np.full((4, 4, 8), np.nan)}, data)
