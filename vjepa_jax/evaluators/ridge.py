"""Ridge readouts, folds and intervals, all by group, in plain numpy.

A group is whatever must not be on both sides of a split: here a patient, whose
two eyes and repeated scans are far from independent.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses

import numpy as np

ALPHAS = tuple(float(a) for a in 10.0 ** np.arange(-1.0, 6.5, 0.5))

# Fitted on training rows [n, V], applied to any rows [m, V] -> [m, D].
Transform = Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]]
Statistic = Callable[..., float]


@dataclasses.dataclass(frozen=True)
class Ridge:
  """Linear readouts, one for each alpha.

  Attributes:
    weights: float64 [A, D, K], for features as given (not standardised).
    bias: float64 [A, K].
  """

  weights: np.ndarray
  bias: np.ndarray

  def __call__(self, features: np.ndarray) -> np.ndarray:
    """Reads features [n, D] out as [A, n, K]."""
    return features.astype(np.float64) @ self.weights + self.bias[:, None]


def fit_ridge(
    features: np.ndarray,
    targets: np.ndarray,
    *,
    alphas: Sequence[float] = ALPHAS,
    weights: np.ndarray | None = None,
) -> Ridge:
  """Fits ridge regressions on standardised features, for all alphas at once.

  Minimises sum_i w_i |y_i - b - z_i W|^2 + alpha |W|^2, z standardised by the
  mean and standard deviation of `features`; the intercept is free. One
  eigendecomposition of the smaller Gram matrix (the dual where D > n) serves
  every alpha.

  Args:
    features: [n, D].
    targets: [n, K].
    alphas: A penalties.
    weights: [n] weights of the rows; None: all 1.

  Raises:
    ValueError: if the rows of features and targets differ, or none is given.
  """
  if len(features) != len(targets) or not len(features):
    raise ValueError(
        f"fit_ridge: features {features.shape} and targets {targets.shape} need "
        "the same number of rows, at least one"
    )
  features, targets = features.astype(np.float64), targets.astype(np.float64)
  weights = np.ones(len(features)) if weights is None else weights
  centre, scale = _standardiser(features)
  inputs = (features - centre) / scale
  input_mean = np.average(inputs, axis=0, weights=weights)
  target_mean = np.average(targets, axis=0, weights=weights)
  root = np.sqrt(weights)[:, None]
  readout = _solve(
      root * (inputs - input_mean), root * (targets - target_mean), alphas
  )
  readout /= scale[:, None]
  return Ridge(readout, target_mean - (centre + scale * input_mean) @ readout)


def _standardiser(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  centre, scale = features.mean(axis=0), features.std(axis=0)
  # A constant feature has a std of rounding noise; dividing by it invents one.
  constant = scale <= 1e-10 * np.maximum(np.abs(centre), 1e-10)
  return centre, np.where(constant, 1.0, scale)


def _solve(
    inputs: np.ndarray, targets: np.ndarray, alphas: Sequence[float]
) -> np.ndarray:
  """Returns [A, D, K] that minimise |targets - inputs W|^2 + alpha |W|^2."""
  rows, width = inputs.shape
  dual = width > rows
  gram = inputs @ inputs.T if dual else inputs.T @ inputs
  values, vectors = np.linalg.eigh(gram)
  rotated = vectors.T @ (targets if dual else inputs.T @ targets)
  shrink = 1.0 / (np.maximum(values, 0.0) + np.asarray(alphas)[:, None])
  solved = vectors @ (shrink[..., None] * rotated)
  return inputs.T @ solved if dual else solved


def fit_classifier(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    alphas: Sequence[float] = ALPHAS,
) -> Ridge:
  """Fits a ridge classifier: targets +-1, every class of the same total weight.

  Args:
    features: [n, D].
    labels: int [n] in 0..classes-1; a class may be absent.
    classes: K, the number of columns read out; the class is their argmax.
    alphas: A penalties.
  """
  counts = np.bincount(labels, minlength=classes)
  weights = len(labels) / (np.count_nonzero(counts) * counts[labels])
  targets = 2.0 * np.eye(classes)[labels] - 1.0
  return fit_ridge(features, targets, alphas=alphas, weights=weights)


def grouped_folds(
    groups: np.ndarray, folds: int, *, seed: int, stratify: np.ndarray | None = None
) -> np.ndarray:
  """Deals whole groups into folds.

  Args:
    groups: [n] group of each row, numbers or names.
    folds: number of folds.
    seed: of the shuffle; the same arguments give the same folds.
    stratify: int [n]; groups are dealt class by class (a group's class is its
      commonest one), so that each fold holds about the same share of each.

  Returns:
    int [n], the fold of each row.

  Raises:
    ValueError: if there are fewer groups than folds, or fewer than two folds.
  """
  names, group_of = np.unique(groups, return_inverse=True)
  if folds < 2 or len(names) < folds:
    raise ValueError(
        f"grouped_folds: {len(names)} groups (patients) into {folds} folds; needs "
        "at least two folds and a group for each"
    )
  kind = np.zeros(len(names), int)
  if stratify is not None:
    for group in range(len(names)):
      kind[group] = np.bincount(stratify[group_of == group]).argmax()
  shuffled = np.random.default_rng(seed).permutation(len(names))
  dealt = shuffled[np.argsort(kind[shuffled], kind="stable")]
  fold_of_group = np.empty(len(names), int)
  fold_of_group[dealt] = np.arange(len(names)) % folds
  return fold_of_group[group_of]


def fit_predict(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    unseen: np.ndarray,
    *,
    classes: int,
    inner_folds: int = 4,
    seed: int = 0,
    alphas: Sequence[float] = ALPHAS,
    transform: Transform | None = None,
) -> np.ndarray:
  """Classifies `unseen` rows by a ridge classifier whose alpha the rows choose.

  Alpha maximises the balanced accuracy over inner folds of whole groups; of
  equals, the largest is taken.

  Args:
    features: [n, V] training rows.
    labels: int [n].
    groups: [n].
    unseen: [m, V].
    classes: K.
    inner_folds: folds over the training groups (fewer where they are fewer).
    seed: of the inner folds.
    alphas: candidates.
    transform: fitted on training rows only, also within the inner folds.

  Returns:
    int [m].
  """
  alphas = sorted(alphas)
  fold_of = grouped_folds(
      groups, min(inner_folds, len(np.unique(groups))), seed=seed, stratify=labels
  )
  held_out = np.empty((len(alphas), len(labels)), int)
  for fold in range(fold_of.max() + 1):
    test = fold_of == fold
    held_out[:, test] = _classify(
        features[~test], labels[~test], features[test], classes, alphas, transform
    )
  scores = [balanced_accuracy(labels, guess) for guess in held_out]
  best = max(alpha for alpha, s in zip(alphas, scores, strict=True) if s == max(scores))
  return _classify(features, labels, unseen, classes, [best], transform)[0]


def _classify(features, labels, unseen, classes, alphas, transform):
  if transform is not None:
    apply = transform(features)
    features, unseen = apply(features), apply(unseen)
  return fit_classifier(features, labels, classes, alphas=alphas)(unseen).argmax(-1)


def cross_predict(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    classes: int,
    folds: int = 5,
    inner_folds: int = 4,
    seed: int = 0,
    alphas: Sequence[float] = ALPHAS,
    transform: Transform | None = None,
) -> np.ndarray:
  """Classifies every row by readouts that never saw its group; int [n].

  Arguments as in `fit_predict`; `folds` are the outer ones, the same for the
  same groups, labels and seed, so that two sets of features compare in pairs.

  Raises:
    ValueError: if there are fewer groups than folds.
  """
  fold_of = grouped_folds(groups, folds, seed=seed, stratify=labels)
  guesses = np.empty(len(labels), int)
  for fold in range(folds):
    test = fold_of == fold
    guesses[test] = fit_predict(
        features[~test], labels[~test], groups[~test], features[test],
        classes=classes, inner_folds=inner_folds, seed=seed, alphas=alphas,
        transform=transform,
    )
  return guesses


def balanced_accuracy(labels: np.ndarray, guesses: np.ndarray) -> float:
  """Mean recall over the classes that `labels` holds."""
  counts = np.bincount(labels)
  hits = np.bincount(labels[labels == guesses], minlength=len(counts))
  present = counts > 0
  return float((hits[present] / counts[present]).mean())


def r2(targets: np.ndarray, guesses: np.ndarray) -> float:
  """Share of variance explained; negative where worse than the mean."""
  spread = ((targets - targets.mean(axis=0)) ** 2).sum()
  return float(1.0 - ((targets - guesses) ** 2).sum() / spread)


def bootstrap_interval(
    statistic: Statistic,
    groups: np.ndarray,
    *arrays: np.ndarray,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
  """Percentile interval of `statistic(*arrays)` over resampled whole groups.

  Args:
    statistic: of arrays whose rows are those of `arrays`, drawn again.
    groups: [n] group (patient) of each row.
    *arrays: [n, ...] what the statistic is of.
    repeats: number of resamples.
    seed: of the draw.
    level: share of the resamples within the interval.

  Returns:
    (low, high).
  """
  values = [
      statistic(*(array[rows] for array in arrays))
      for rows in _resamples(groups, repeats, seed)
  ]
  low, high = np.quantile(values, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
  return float(low), float(high)


def with_interval(
    name: str, statistic: Statistic, groups: np.ndarray, *arrays: np.ndarray,
    repeats: int = 1000, seed: int = 0,
) -> Iterator[tuple[str, float]]:
  """Yields `name`; and of two groups or more NAME.low and NAME.high.

  Args:
    name: of the number.
    statistic, groups, *arrays, repeats, seed: as of `bootstrap_interval`.
  """
  yield name, statistic(*arrays)
  if len(np.unique(groups)) > 1:
    low, high = bootstrap_interval(
        statistic, groups, *arrays, repeats=repeats, seed=seed
    )
    yield f"{name}.low", low
    yield f"{name}.high", high


def paired_bootstrap_difference(
    statistic: Statistic,
    groups: np.ndarray,
    targets: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    *,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
  """Difference of two predictors on the same rows, and its interval.

  Both are scored on the same resampled groups: what a hard patient costs both
  cancels, and the interval is that of the difference.

  Returns:
    (statistic(targets, first) - statistic(targets, second), low, high).
  """

  def difference(targets, first, second):
    return statistic(targets, first) - statistic(targets, second)

  low, high = bootstrap_interval(
      difference, groups, targets, first, second,
      repeats=repeats, seed=seed, level=level,
  )
  return difference(targets, first, second), low, high


def _resamples(groups, repeats: int, seed: int) -> Iterator[np.ndarray]:
  names, group_of = np.unique(groups, return_inverse=True)
  rows = [np.flatnonzero(group_of == group) for group in range(len(names))]
  generator = np.random.default_rng(seed)
  for _ in range(repeats):
    drawn = generator.integers(len(rows), size=len(rows))
    yield np.concatenate([rows[group] for group in drawn])
