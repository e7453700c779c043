"""The probe of stages: what frozen features of single time points know of them."""

import shutil

import numpy as np
import pytest

from vjepa_jax.backbones.base import Features
from vjepa_jax.data import pipeline
from vjepa_jax.data.phantom_embryos import STAGES
from vjepa_jax.evaluators import stage_probe
from vjepa_jax.evaluators.stage_probe import Evaluator
from vjepa_jax.volumes.grid import Grid

GRID = Grid((4, 8, 16, 16), (1, 4, 8, 8))
QUICK = {
    "bootstrap": 100, "batch_size": 8, "figures": False, "embryos": (1, 0), "draws": 3,
}


def coded(code, noise=0.0):
  """Functions whose tokens are code(batch) [B, 4, D] at every place, and noise."""

  def features(params, model_state, batch):
    del params, model_state
    told = np.asarray(code(batch), np.float32)
    tokens = np.repeat(told[:, :, None], GRID.places, axis=2)
    rng = np.random.default_rng(np.maximum(batch["index"], 0))
    tokens = tokens + noise * rng.normal(size=tokens.shape)
    return Features(tokens.reshape(len(told), -1, told.shape[-1]), GRID)

  return {"features": features}


def of_stage(batch):
  return np.eye(len(STAGES))[np.maximum(batch["frame_label"], 0)]


def of_nothing(batch):
  rng = np.random.default_rng([7, *np.maximum(batch["index"], 0)])
  return rng.normal(size=(*batch["frame_label"].shape, 6))


def run(functions, data, **options):
  return dict(Evaluator(functions, data, **QUICK | options).run({}, {}))


@pytest.fixture(scope="module")
def data(open_embryos):
  return open_embryos()


def test_features_that_tell_the_stage_are_read_out_and_beat_intensity(data):
  found = run(coded(of_stage), data)
  for name in ("accuracy", "accuracy.low", "accuracy_1", "balanced_accuracy",
               "off_by_one"):
    assert found[f"stage_probe.{name}"] == 1.0, name
  assert found["stage_probe.impossible_raw"] == found["stage_probe.absent"] == 0
  assert found["stage_probe.silhouette"] > 0.99
  for name in ("intensity", "radial", "intensity_1", "radial_1"):
    assert found[f"stage_probe.{name}"] < 0.9, name
    assert found[f"stage_probe.minus_{name}"] == pytest.approx(
        1 - found[f"stage_probe.{name}"]
    )
    low, high = (found[f"stage_probe.minus_{name}.{end}"] for end in ("low", "high"))
    assert 0 < low <= found[f"stage_probe.minus_{name}"] <= high
  assert found["stage_probe.embryos"] == 3
  assert found["stage_probe.labelled_embryos"] == 4
  assert found["stage_probe.time_points"] == 96
  assert all(np.isfinite(value) for value in found.values())


def test_features_of_noise_stay_near_chance_and_jump_about(data):
  found = run(coded(of_nothing), data, baselines=())
  assert found["stage_probe.accuracy"] < 0.3
  assert found["stage_probe.accuracy_1"] < 0.3
  assert found["stage_probe.accuracy.low"] < found["stage_probe.chance"] + 0.1
  assert found["stage_probe.impossible_raw"] > 30
  assert found["stage_probe.impossible_raw_rate"] == (
      found["stage_probe.impossible_raw"] / 93
  )
  assert found["stage_probe.silhouette"] < 0.05
  assert found["stage_probe.time_correlation"] < 0.4


def test_features_that_name_the_embryo_are_worth_nothing(data):
  """A split by time points would read these out; one by embryo cannot."""
  people = {
      split: [int(row.participant.rsplit("_")[-1]) for row in data.splits[split].rows]
      for split in data.splits
  }
  codes = np.random.default_rng(0).normal(size=(8, 16))

  def of_embryo(batch):
    fits = batch["index"].max() >= 24  # Rows of training, in batches of 8, go by 4.
    rows = people["train" if fits else "validation"]
    named = codes[np.array(rows)[np.maximum(batch["index"], 0)]]
    return np.repeat(named[:, None], 4, axis=1)

  found = run(coded(of_embryo), data, baselines=())
  assert found["stage_probe.accuracy"] < 0.3


def test_more_labelled_embryos_know_more(data):
  found = run(coded(of_stage, noise=1.2), data, embryos=(1, 2, 0))
  accuracy, two, one = (
      found[f"stage_probe.accuracy{end}"] for end in ("", "_2", "_1")
  )
  assert one < two < accuracy < 1.0
  low, high = (found[f"stage_probe.accuracy_1.{end}"] for end in ("low", "high"))
  assert low < one < high


def test_time_is_found_where_it_is_what_varies_most(data):
  def of_time(batch):
    stage = batch["frame_label"].astype(float)
    return np.stack([stage, -stage, np.sqrt(stage), np.sin(9 * stage)], axis=-1)

  found = run(coded(of_time), data, baselines=())
  assert found["stage_probe.time_correlation"] > 0.9


def test_the_same_parameters_give_the_same_numbers(data):
  first = Evaluator(coded(of_nothing), data, **QUICK)
  once = dict(first.run({}, {}))
  assert once == dict(first.run({}, {}))
  assert once == dict(Evaluator(coded(of_nothing), data, **QUICK).run({}, {}))


def test_baselines_are_made_once_a_process(data, monkeypatch):
  calls = []
  one = lambda frame, spacing: calls.append(spacing) or np.array([frame.mean(), 1.0])
  monkeypatch.setitem(stage_probe.BASELINES, "one", one)
  evaluator = Evaluator(coded(of_nothing), data, baselines=("one",), **QUICK)
  once = dict(evaluator.run({}, {}))
  assert len(calls) >= 7 * 32
  calls.clear()
  assert dict(evaluator.run({}, {})) == once and not calls


def test_each_time_point_goes_through_the_encoder_once(data):
  shown = []

  def counted(batch):
    shown.extend(batch["index"][batch["_mask"] > 0])
    return of_stage(batch)

  run(coded(counted), data, baselines=())
  # Training has a clip for each start, 4 x 29 of them; 4 x 8 show everything.
  assert len(shown) == 4 * 8 + 3 * 8
  assert len(data.splits["train"]) == 4 * 29


def test_frames_are_pooled_by_mean_and_maximum_over_their_places():
  grid = Grid((4, 4, 4, 4), (2, 2, 4, 4))
  tokens = np.array([[[1.0], [5.0], [2.0], [-4.0]]])  # Two times of two places.
  mean, most = np.asarray(stage_probe._pool(tokens, grid))[:, 0, :, 0]
  np.testing.assert_array_equal(mean, [3, 3, -1, -1])
  np.testing.assert_array_equal(most, [5, 5, 2, 2])


def test_tiles_are_pooled_together_over_all_of_a_clip(data):
  """Of what a tile holds: the mean of means and the greatest of all."""
  seen = []

  def features(params, model_state, batch):
    del params, model_state
    start, volume = batch["crop_start"][0], batch["volume"]
    part = volume[:, :, :, start[2] : start[2] + 8].astype(np.float32)
    seen.append(tuple(start))
    tokens = part.mean(axis=(2, 3, 4))  # One place a time point.
    return Features(tokens, Grid((4, 8, 8, 16), (1, 8, 8, 16)))

  made = Evaluator({"features": features}, data, **QUICK | {
      "baselines": (), "tile": (4, 8, 8, 16)
  })
  batch = next(pipeline.eval_batches(data.splits["validation"], 2))
  found = made._of_frames(None, None, batch)[..., 0]
  np.testing.assert_allclose(
      found, batch["volume"].mean(axis=(2, 3, 4, 5), dtype=float), rtol=1e-5
  )
  assert seen == [(0, 0, 0, 0), (0, 0, 8, 0)]


def test_a_stage_that_no_labelled_embryo_shows_is_counted(
    open_embryos, embryo_corpus, tmp_path
):
  home = shutil.copytree(embryo_corpus.parent, tmp_path / "corpus")
  for n in range(1, 5):
    path = home / "nih-ls" / f"phantom_diSPIM_{n}" / "stages.tsv"
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.strip().endswith(STAGES[-2:])]
    path.write_text("".join(kept))
  found = run(coded(of_stage), open_embryos(home / "manifest.tsv"), baselines=())
  assert found["stage_probe.absent"] == 2
  assert found["stage_probe.labelled_embryos"] == 4
  late = open_embryos().splits["validation"].stage_ids >= len(STAGES) - 2
  assert found["stage_probe.accuracy"] == pytest.approx(1 - late.mean())


def test_a_probe_of_answers_is_named_so(open_embryos, embryo_corpus, tmp_path):
  paths = {
      name: tmp_path / f"{name}.json"
      for name in (f"phantom_diSPIM_{n}" for n in range(1, 8))
  }
  for path in paths.values():
    path.write_text(
        '[{"frame_index": 0, "response": "Developmental Stage: 1-cell"},'
        ' {"frame_index": 9, "response": "Developmental Stage: 2-cell"}]'
    )
  answers = {name: str(path) for name, path in paths.items()}
  answered = open_embryos(stages=dict(sources=("answers",), answers=answers))
  found = run(coded(of_stage), answered, baselines=())
  assert found["stage_probe.answers_accuracy"] == 1.0
  assert found["stage_probe.answers_time_points"] == 6
  assert "stage_probe.accuracy" not in found
  assert found["stage_probe.impossible_raw"] >= 0


def test_shells_see_a_ring_wherever_it_lies_and_how_thick_voxels_are():
  z, y, x = np.ogrid[:12, :24, :24]

  def ring(at, radius):
    away = np.sqrt((z - at[0]) ** 2 + (y - at[1]) ** 2 + (x - at[2]) ** 2)
    return np.exp(-((away - radius) ** 2))[..., None]

  spacing = np.ones(3)
  here, there = (
      stage_probe.radial(ring(at, 4.0), spacing) for at in ((6, 11, 11), (6, 13, 10))
  )
  ball = stage_probe.radial(ring((6, 11, 11), 0.0), spacing)
  assert np.abs(here - there).max() < 0.15 < np.abs(here - ball).max()
  flat = stage_probe.radial(ring((6, 11, 11), 4.0), np.array([3.0, 1.0, 1.0]))
  assert np.abs(flat - here).max() > 0.05
  unknown = stage_probe.radial(ring((6, 11, 11), 4.0), np.full(3, np.nan))
  np.testing.assert_array_equal(unknown, here)
  assert np.isfinite(stage_probe.radial(np.zeros((2, 3, 4, 1)), spacing)).all()


def test_the_embedding_is_drawn(data):
  pytest.importorskip("matplotlib", reason="extra figures")
  found = run(coded(of_stage, noise=0.3), data, figures=True, baselines=())
  image = found["stage_probe.embedding"]
  assert image.dtype == np.uint8 and image.shape[2] == 3 and image.std() > 10


def test_the_embedding_puts_what_is_alike_together():
  pytest.importorskip("sklearn", reason="extra `test`")
  rng = np.random.default_rng(0)
  group = np.arange(60) % 3
  points, method = stage_probe._embed(rng.normal(size=(60, 5)) + 30 * group[:, None], 0)
  assert method == "t-SNE"
  centres = np.stack([points[group == g].mean(axis=0) for g in range(3)])
  nearest = np.linalg.norm(points[:, None] - centres, axis=-1).argmin(axis=1)
  np.testing.assert_array_equal(nearest, group)
  assert stage_probe._embed(rng.normal(size=(4, 5)), 0)[1] == "PCA"


@pytest.mark.parametrize("options, error", [
    (dict(embryos=(1, 5, 0)), "split 'train' has 4 embryos with stages"),
    (dict(embryos=(1, 3)), r"embryos \[1, 3\] must be different numbers .* 0 \(all\)"),
    (dict(train_split="validation"), "train_split and split are both 'validation'"),
    (dict(alpha=0.0), "alpha 0.0 must be above 0"),
    (dict(inner_folds=1), "inner_folds 1 at least 2"),
])
def test_options_that_do_not_go_are_refused_at_the_start(data, options, error):
  with pytest.raises(ValueError, match=error):
    Evaluator(coded(of_stage), data, **options)


def test_unknown_names_and_recordings_are_refused(data, make_data):
  with pytest.raises(KeyError, match="must offer 'features'; it offers logits"):
    Evaluator({"logits": None}, data)
  with pytest.raises(KeyError, match="no split 'test'"):
    Evaluator(coded(of_stage), data, split="test")
  with pytest.raises(KeyError, match="'intensities' is not known; closest: intensity"):
    Evaluator(coded(of_stage), data, baselines=("intensities",))
  plain = make_data(patients=2)
  plain.splits["train"] = plain.splits["probe"]
  with pytest.raises(ValueError, match="split 'train' holds recordings, not clips"):
    Evaluator(coded(of_stage), plain, split="probe")


def test_features_that_are_not_finite_are_an_error(data):
  bad = coded(lambda batch: np.full((len(batch["index"]), 4, 2), np.nan))
  with pytest.raises(ValueError, match="128 have values that are not finite"):
    run(bad, data)
