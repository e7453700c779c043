"""Ridge readouts, folds and intervals."""

import numpy as np
import pytest

from vjepa_jax.evaluators import ridge


def _problem(rows=60, width=8, classes=3, seed=0):
  generator = np.random.default_rng(seed)
  labels = generator.integers(0, classes, rows)
  centres = generator.normal(size=(classes, width))
  return centres[labels] + generator.normal(size=(rows, width)), labels


@pytest.mark.parametrize("width", [5, 200])
def test_primal_and_dual_equal_scikit_learn(width):
  linear_model = pytest.importorskip("sklearn.linear_model", reason="extra `test`")
  preprocessing = pytest.importorskip("sklearn.preprocessing", reason="extra `test`")
  generator = np.random.default_rng(0)
  features = generator.normal(3.0, 2.0, size=(40, width))
  targets = features[:, :2] + generator.normal(size=(40, 2))
  weights = generator.uniform(0.5, 2.0, 40)
  unseen = generator.normal(3.0, 2.0, size=(7, width))
  scaler = preprocessing.StandardScaler().fit(features)
  fitted = ridge.fit_ridge(features, targets, alphas=(0.3, 50.0), weights=weights)
  for found, alpha in zip(fitted(unseen), (0.3, 50.0), strict=True):
    peer = linear_model.Ridge(alpha=alpha).fit(
        scaler.transform(features), targets, sample_weight=weights
    )
    wanted = peer.predict(scaler.transform(unseen))
    np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-8)


def test_classifier_equals_scikit_learn_with_balanced_classes():
  linear_model = pytest.importorskip("sklearn.linear_model", reason="extra `test`")
  preprocessing = pytest.importorskip("sklearn.preprocessing", reason="extra `test`")
  features, labels = _problem()
  keep = (labels != 2) | (np.arange(60) % 3 == 0)
  features, labels = features[keep], labels[keep]
  scaled = preprocessing.StandardScaler().fit_transform(features)
  peer = linear_model.RidgeClassifier(alpha=7.0, class_weight="balanced")
  peer.fit(scaled, labels)
  found = ridge.fit_classifier(features, labels, 3, alphas=(7.0,))(features)[0]
  np.testing.assert_allclose(found, peer.decision_function(scaled), atol=1e-9)


def test_constant_features_change_nothing():
  features, labels = _problem()
  constant = np.full((len(features), 2), 0.1)
  wider = np.concatenate([features, constant], axis=1)
  for alphas in ((0.1,), (100.0,)):
    np.testing.assert_allclose(
        ridge.fit_classifier(wider, labels, 3, alphas=alphas)(wider),
        ridge.fit_classifier(features, labels, 3, alphas=alphas)(features),
        atol=1e-9,
    )


def test_folds_never_part_a_group_and_hold_every_class_alike():
  groups = np.repeat([f"p{i}" for i in range(30)], 2)
  labels = np.repeat(np.arange(30) % 3, 2)
  fold_of = ridge.grouped_folds(groups, 5, seed=1, stratify=labels)
  for group in np.unique(groups):
    assert len(set(fold_of[groups == group])) == 1
  for fold in range(5):
    counts = np.bincount(labels[fold_of == fold], minlength=3)
    assert counts.tolist() == [4, 4, 4]


def test_folds_depend_on_the_seed_alone():
  groups = np.repeat(np.arange(20), 2)
  first = ridge.grouped_folds(groups, 4, seed=3)
  assert (first == ridge.grouped_folds(groups, 4, seed=3)).all()
  assert (first != ridge.grouped_folds(groups, 4, seed=4)).any()


def test_fewer_groups_than_folds_is_an_error():
  with pytest.raises(ValueError, match="3 groups .* 5 folds"):
    ridge.grouped_folds(np.array([0, 0, 1, 2, 2]), 5, seed=0)


def test_features_that_name_the_patient_stay_at_chance_by_patient():
  """The leak that a split by volume would report as knowledge."""
  generator = np.random.default_rng(0)
  patients = np.repeat(np.arange(60), 4)
  labels = np.repeat(generator.permutation(np.arange(60) % 3), 4)
  features = generator.normal(size=(60, 40))[patients]
  features = features + 0.05 * generator.normal(size=features.shape)
  by_patient = ridge.cross_predict(features, labels, patients, classes=3)
  by_volume = ridge.cross_predict(features, labels, np.arange(240), classes=3)
  assert ridge.balanced_accuracy(labels, by_patient) < 0.45
  assert ridge.balanced_accuracy(labels, by_volume) > 0.7


def test_every_transform_is_fitted_on_patients_that_are_not_tested():
  features, labels = _problem()
  patients = np.arange(60) // 2
  features = np.concatenate([features, patients[:, None]], axis=1)
  fold_of = ridge.grouped_folds(patients, 5, seed=0, stratify=labels)
  outer = [set(patients[fold_of != fold]) for fold in range(5)]
  fitted_on = []

  def transform(train):
    fitted_on.append(set(train[:, -1].astype(int)))
    return lambda rows: rows[:, :-1]

  ridge.cross_predict(
      features, labels, patients, classes=3, folds=5, inner_folds=4, seed=0,
      transform=transform,
  )
  assert len(fitted_on) == 5 * (4 + 1)
  for fold, allowed in enumerate(outer):
    calls = fitted_on[fold * 5 : fold * 5 + 5]
    assert calls[-1] == allowed
    assert all(call < allowed for call in calls[:-1])


def test_alpha_is_chosen_by_the_training_rows():
  generator = np.random.default_rng(0)
  labels = np.arange(100) % 2
  groups = np.arange(100)

  def score(features, alphas):
    guess = ridge.cross_predict(features, labels, groups, classes=2, alphas=alphas)
    return ridge.balanced_accuracy(labels, guess)

  # The signal is the small difference of two large features: a weak penalty.
  common = 10.0 * generator.normal(size=100)
  fine = np.stack([common, common + labels - 0.5], axis=1)
  # As many noise features as training rows: a strong penalty.
  noisy = generator.normal(size=(100, 80))
  noisy[:, :10] += 0.6 * labels[:, None]
  weak, strong = 1e-3, 1e4
  assert score(fine, (weak,)) > 0.9 > 0.7 > score(fine, (strong,))
  assert score(fine, (weak, strong)) == score(fine, (weak,))
  assert score(noisy, (strong,)) > score(noisy, (weak,)) + 0.1
  assert score(noisy, (weak, strong)) == score(noisy, (strong,))


def test_balanced_accuracy_is_the_mean_recall():
  labels = np.array([0, 0, 0, 0, 2, 2])
  guesses = np.array([0, 0, 0, 1, 2, 0])
  assert ridge.balanced_accuracy(labels, guesses) == pytest.approx((0.75 + 0.5) / 2)
  assert ridge.balanced_accuracy(labels, np.zeros(6, int)) == 0.5


def test_r2_is_0_for_the_mean_and_1_for_the_truth():
  targets = np.array([1.0, 2.0, 4.0])
  assert ridge.r2(targets, targets) == 1.0
  assert ridge.r2(targets, np.full(3, targets.mean())) == pytest.approx(0.0)


def test_the_interval_covers_the_truth_as_often_as_it_says():
  """Two equal eyes a patient: resampling eyes would give too narrow a band."""
  generator = np.random.default_rng(0)
  by_patient = by_eye = 0
  for trial in range(150):
    values = np.repeat(generator.normal(size=50), 2)
    for groups in (np.arange(100) // 2, np.arange(100)):
      low, high = ridge.bootstrap_interval(
          np.mean, groups, values, repeats=200, seed=trial
      )
      if groups[-1] == 49:
        by_patient += low <= 0 <= high
      else:
        by_eye += low <= 0 <= high
  assert 0.88 <= by_patient / 150 <= 0.99
  assert by_eye / 150 < 0.87


def test_the_paired_difference_is_tighter_than_two_intervals():
  generator = np.random.default_rng(0)
  labels = generator.integers(0, 2, 200)
  first = np.where(generator.random(200) < 0.7, labels, 1 - labels)
  second = np.where(np.arange(200) % 20 == 0, 1 - labels, first)
  groups = np.arange(200) // 2
  value, low, high = ridge.paired_bootstrap_difference(
      ridge.balanced_accuracy, groups, labels, first, second
  )
  alone = ridge.bootstrap_interval(ridge.balanced_accuracy, groups, labels, first)
  assert 0 < low < value < high
  assert high - low < alone[1] - alone[0]
