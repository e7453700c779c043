"""Numbers of stage sequences, on sequences made by hand and against other makers."""

import itertools

import numpy as np
import pytest

from vjepa_jax.evaluators import stage_metrics as metrics

TRUTH = np.array([0, 0, 1, 1, 2, 2, -1, 3])
GUESS = np.array([0, 1, 1, 3, 2, 2, 0, 1])


def drawn(seed, length=200, classes=5):
  rng = np.random.default_rng(seed)
  truth = rng.integers(0, classes - 1, length)  # The last stage is never true.
  guesses = np.where(rng.random(length) < 0.5, truth, rng.integers(0, classes, length))
  return truth, guesses


def test_numbers_of_a_sequence_by_hand():
  assert metrics.accuracy(TRUTH, GUESS) == pytest.approx(4 / 7)
  assert metrics.balanced_accuracy(TRUTH, GUESS) == pytest.approx((0.5 + 0.5 + 1) / 4)
  assert metrics.off_by_one(TRUTH, GUESS) == pytest.approx(5 / 7)
  assert metrics.stage_mae(TRUTH, GUESS) == pytest.approx((1 + 2 + 2) / 7)
  assert metrics.majority_share(TRUTH) == pytest.approx(2 / 7)
  # Of the stages: 2 hits of 2 + 1, 2 of 2 + 3, 4 of 2 + 2, none of 1 + 1.
  assert metrics.macro_f1(TRUTH, GUESS) == pytest.approx((2 / 3 + 2 / 5 + 1 + 0) / 4)
  assert metrics.confusion(TRUTH, GUESS, 5).tolist() == [
      [1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 2, 0, 0], [0, 1, 0, 0, 0], [0] * 5,
  ]


@pytest.mark.parametrize("seed", range(3))
def test_f1_and_kappa_equal_scikit_learn(seed):
  sklearn = pytest.importorskip("sklearn.metrics", reason="extra `test`")
  truth, guesses = drawn(seed)
  f1 = sklearn.f1_score(
      truth, guesses, labels=np.unique(truth), average="macro", zero_division=0
  )
  assert metrics.macro_f1(truth, guesses) == pytest.approx(f1)
  kappa = sklearn.cohen_kappa_score(truth, guesses, weights="quadratic")
  assert metrics.quadratic_kappa(truth, guesses) == pytest.approx(kappa)


def test_kappa_is_one_of_the_perfect_and_nothing_of_the_constant():
  truth = np.array([0, 1, 2, 3])
  assert metrics.quadratic_kappa(truth, truth) == 1.0
  assert metrics.quadratic_kappa(truth, truth[::-1]) == -1.0
  assert metrics.quadratic_kappa(truth, np.full(4, 2)) == pytest.approx(0.0)
  assert metrics.quadratic_kappa(np.full(4, 2), np.full(4, 2)) == 0.0


def test_stages_that_the_truth_lacks_make_nothing_nan():
  truth, guesses = np.array([3, 3, -1]), np.array([3, 0, 1])
  probabilities = np.eye(6)[guesses]
  for name in ("accuracy", "balanced_accuracy", "macro_f1", "off_by_one", "stage_mae",
               "quadratic_kappa"):
    assert np.isfinite(getattr(metrics, name)(truth, guesses)), name
  assert np.isfinite(metrics.nll(truth, probabilities))
  assert np.isfinite(metrics.calibration_error(truth, probabilities))
  with pytest.raises(ValueError, match="of 2 time points none has a known stage"):
    metrics.accuracy(np.full(2, -1), np.zeros(2))
  with pytest.raises(ValueError, match="needs as many"):
    metrics.accuracy(truth, guesses[:2])


def test_calibration_and_nll_by_hand():
  truth = np.array([0, 0, 1, 1, -1])
  sure = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.0, 1.0]])
  # Right 2 of 3 at 0.9, 1 of 1 at 0.6.
  wanted = (3 * abs(2 / 3 - 0.9) + abs(1 - 0.6)) / 4
  assert metrics.calibration_error(truth, sure) == pytest.approx(wanted)
  # All in one bin: right 3 of 4 at 0.825.
  assert metrics.calibration_error(truth, sure, bins=1) == pytest.approx(0.075)
  found = metrics.nll(truth, sure)
  assert found == pytest.approx(-np.log([0.9, 0.9, 0.1, 0.6]).mean())


def test_impossible_transitions_go_back_or_too_far_for_their_minutes():
  guesses = {"a": np.array([0, 1, 0, 2, 2]), "b": np.array([0, 3]), "c": np.array([5])}
  minutes = {"a": np.array([0.0, 1, 2, 3, 4]), "b": np.array([0.0, 3]), "c": [7.0]}
  found = metrics.impossible_transitions(guesses, minutes)
  assert found.impossible == (("a", 2.0, 1, 0), ("a", 3.0, 0, 2))
  assert (found.count, found.total, found.rate) == (2, 5, 0.4)
  assert metrics.impossible_transitions(guesses, minutes, max_skip=2).count == 1
  minutes["b"] = np.array([0.0, 2])
  assert metrics.impossible_transitions(guesses, minutes).impossible[-1][0] == "b"
  alone = metrics.impossible_transitions({"c": [5]}, {"c": [7.0]})
  with pytest.raises(ValueError, match="no embryo has two time points"):
    assert alone.rate
  with pytest.raises(ValueError, match="rise"):
    metrics.impossible_transitions({"a": [0, 1]}, {"a": [np.nan, np.nan]})


def test_whole_stages_may_be_skipped_and_one_always():
  assert metrics.allowed_steps([0, 0.5, 1.5, 3.4, 5.399]).tolist() == [1, 1, 1, 2]
  assert metrics.allowed_steps([0, 1, 2], max_skip=0.25).tolist() == [1, 1]
  assert metrics.allowed_steps([0, 1, 3], max_skip=1.5).tolist() == [1, 3]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("skip", [None, 1])
def test_decoding_finds_the_best_of_all_paths(seed, skip):
  rng = np.random.default_rng(seed)
  length, classes = 6, 4
  p = rng.dirichlet(np.full(classes, 0.5), length)
  most = None if skip is None else np.full(length - 1, skip)
  best, wanted = -np.inf, None
  for path in itertools.product(range(classes), repeat=length):
    steps = np.diff(path)
    if (steps < 0).any() or (skip is not None and (steps > skip).any()):
      continue
    score = np.log(p[np.arange(length), path]).sum()
    if score > best:
      best, wanted = score, path
  np.testing.assert_array_equal(metrics.decode(p, most=most), wanted)


def test_decoding_keeps_a_possible_path_and_repairs_an_impossible_one():
  minutes = np.arange(7.0)
  path = np.array([0, 0, 1, 2, 2, 3, 3])
  sure = 0.9 * np.eye(4) + 0.025
  np.testing.assert_array_equal(metrics.decode(sure[path]), path)
  np.testing.assert_array_equal(metrics.decode(np.eye(4)[path]), path)
  wrong = np.array([0, 3, 1, 0, 2, 3, 2])
  most = metrics.allowed_steps(minutes)
  count = lambda path: metrics.impossible_transitions({"a": path}, {"a": minutes}).count
  assert count(wrong) == 5
  assert count(metrics.decode(sure[wrong], most=most)) == 0
  assert len(metrics.decode(sure[:1])) == 1


def test_boundaries_are_off_by_the_minutes_between_first_times():
  minutes = 2.0 * np.arange(6)
  truth = np.array([0, 0, 1, 1, 3, 3])
  of = lambda path: metrics.transition_errors(truth, np.array(path), minutes)
  assert of(truth).errors.tolist() == [0, 0, 0]
  # Stage 1 two points early; stages 2 and 3 one late.
  assert of([1, 1, 1, 1, 2, 3]).errors.tolist() == [4, 0, 2]
  # Stage 3 is never reached: one time point after the last, at minute 12.
  found = of([0, 0, 1, 1, 2, 2])
  assert found.errors.tolist() == [0, 0, 4] and found.missed == 1


def test_a_boundary_may_be_anywhere_in_unknown_truth_before_it():
  minutes = np.arange(6.0)
  truth = np.array([0, 0, -1, -1, 1, -1])
  for first, error in ((1, 1), (2, 0), (3, 0), (4, 0), (5, 1)):
    decoded = (np.arange(6) >= first).astype(int)
    assert metrics.transition_errors(truth, decoded, minutes).errors.tolist() == [error]
  unknown = metrics.transition_errors(np.full(6, -1), truth, minutes)
  assert unknown.errors.size == 0 and unknown.missed == 0
  alone = metrics.transition_errors(np.full(6, 2), truth, minutes)
  assert alone.errors.size == 0


def test_silhouette_equals_scikit_learn_and_one_stage_is_refused():
  sklearn = pytest.importorskip("sklearn.metrics", reason="extra `test`")
  rng = np.random.default_rng(0)
  stages = np.array([0] * 10 + [1] * 15 + [4] * 20 + [5])
  features = rng.normal(size=(46, 3)) + 1.5 * stages[:, None]
  wanted = sklearn.silhouette_score(features, stages)
  assert metrics.silhouette(features, stages) == pytest.approx(wanted)
  more = np.concatenate([features, 100 * features])
  kept = np.concatenate([stages, np.full(46, -1)])
  assert metrics.silhouette(more, kept) == pytest.approx(wanted)
  with pytest.raises(ValueError, match="needs two stages"):
    metrics.silhouette(features[:5], stages[:5])
  assert metrics.silhouette(np.zeros((4, 2)), np.array([0, 0, 1, 1])) == 0.0


@pytest.mark.parametrize("shape", [(50, 6), (6, 50)])
def test_principal_components_equal_scikit_learn(shape):
  sklearn = pytest.importorskip("sklearn.decomposition", reason="extra `test`")
  features = np.random.default_rng(0).normal(size=shape) * np.arange(1, shape[1] + 1)
  wanted = sklearn.PCA(3).fit_transform(features)
  found = metrics.principal_components(features, 3)
  np.testing.assert_allclose(found, wanted, atol=1e-8)
  more = metrics.principal_components(features, 9)
  there = 5 if shape[0] < shape[1] else 6  # n centred rows span n - 1 directions.
  assert (more[:, :there] != 0).any(axis=0).all() and not more[:, there:].any()
  assert not metrics.principal_components(np.ones(shape), 2).any()


def test_time_correlation_sees_a_slow_direction_and_no_noise():
  rng = np.random.default_rng(0)
  minutes = np.tile(np.arange(40.0), 3)
  embryos = np.repeat(["a", "b", "c"], 40)
  direction = rng.normal(size=6)
  noise = rng.normal(size=(120, 6))
  slow = noise + 3 * np.sqrt(minutes)[:, None] * direction
  assert metrics.time_correlation(slow, minutes, embryos) > 0.9
  assert metrics.time_correlation(noise, minutes, embryos) < 0.3
  # Forward in one embryo and back in the other is no direction of time.
  turn = np.where(embryos == "b", -1.0, 1.0)[:80]
  back = (turn * (minutes[:80] - 20))[:, None] * direction
  assert metrics.time_correlation(back, minutes[:80], embryos[:80]) < 0.05
  assert metrics.time_correlation(np.ones((120, 6)), minutes, embryos) == 0.0
