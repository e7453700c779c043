"""What guesses of ordered stages are worth, as numbers of plain arrays.

Stages are numbers 0..K-1 in the order of development; a truth of -1 is unknown and
left out. Raw guesses may go back in time, a decoded path cannot: a number is of one or
of the other, never of both.
"""

from collections.abc import Mapping
import dataclasses

import numpy as np
from scipy import stats
from scipy.spatial import distance

from vjepa_jax.evaluators import ridge

UNKNOWN = -1
# Of a stage: what a clock that is a little fast takes from a minute.
_SLACK = 0.01


def accuracy(truth: np.ndarray, guesses: np.ndarray) -> float:
  """Share of the known time points that are guessed.

  Args:
    truth: int [n], -1 where unknown.
    guesses: int [n].

  Raises:
    ValueError: if no truth is known, or the lengths differ (as of all functions here).
  """
  truth, guesses = known(truth, guesses)
  return float((truth == guesses).mean())


def balanced_accuracy(truth: np.ndarray, guesses: np.ndarray) -> float:
  """Mean recall over the stages that the truth holds."""
  return ridge.balanced_accuracy(*known(truth, guesses))


def macro_f1(truth: np.ndarray, guesses: np.ndarray) -> float:
  """Mean F1 over the stages that the truth holds; one never guessed has 0."""
  truth, guesses = known(truth, guesses)
  scores = []
  for stage in np.unique(truth):
    hits = ((truth == stage) & (guesses == stage)).sum()
    scores.append(2.0 * hits / ((truth == stage).sum() + (guesses == stage).sum()))
  return float(np.mean(scores))


def off_by_one(truth: np.ndarray, guesses: np.ndarray) -> float:
  """Share of the known time points guessed as their stage or one next to it."""
  truth, guesses = known(truth, guesses)
  return float((np.abs(truth - guesses) <= 1).mean())


def stage_mae(truth: np.ndarray, guesses: np.ndarray) -> float:
  """Mean distance between truth and guess, in stages."""
  truth, guesses = known(truth, guesses)
  return float(np.abs(truth - guesses).mean())


def quadratic_kappa(truth: np.ndarray, guesses: np.ndarray) -> float:
  """Cohen's kappa with weights (a - b)^2: 1 where all agree, 0 at chance.

  1 - sum (a - b)^2 / the same expected of independent draws of both (Cohen 1968).
  Where truth and guesses are all of one stage, chance explains all of it: 0.
  """
  truth, guesses = known(truth, guesses)
  # The mean of (a - b)^2 over every truth with every guess.
  expected = truth.var() + guesses.var() + (truth.mean() - guesses.mean()) ** 2
  if not expected:
    return 0.0
  return float(1.0 - ((truth - guesses) ** 2).mean() / expected)


def majority_share(truth: np.ndarray) -> float:
  """Share of the commonest stage: the accuracy of who always says it."""
  truth, = known(truth)
  return float(np.bincount(truth).max() / len(truth))


def confusion(truth: np.ndarray, guesses: np.ndarray, classes: int) -> np.ndarray:
  """Counts of (truth, guess), int [K, K]; rows are the truth."""
  truth, guesses = known(truth, guesses)
  counts = np.zeros((classes, classes), int)
  np.add.at(counts, (truth, guesses), 1)
  return counts


def calibration_error(
    truth: np.ndarray, probabilities: np.ndarray, *, bins: int = 10
) -> float:
  """Expected calibration error of the likeliest stage.

  Mean over bins, weighted by their rows, of |share guessed right - mean probability|;
  bins of equal width in the probability of the guess (Guo et al. 2017, eq. 3).

  Args:
    truth: int [n].
    probabilities: [n, K].
    bins: their number.
  """
  truth, probabilities = known(truth, probabilities)
  sure = probabilities.max(axis=1)
  right = probabilities.argmax(axis=1) == truth
  place = np.minimum((sure * bins).astype(int), bins - 1)
  off = np.bincount(place, right - sure, minlength=bins)
  return float(np.abs(off).sum() / len(truth))


def nll(truth: np.ndarray, probabilities: np.ndarray) -> float:
  """Mean -log of the true stage's probability, in nats; never infinite."""
  truth, probabilities = known(truth, probabilities)
  return float(-_log(probabilities)[np.arange(len(truth)), truth].mean())


@dataclasses.dataclass(frozen=True)
class Transitions:
  """Steps from one time point of an embryo to its next.

  Attributes:
    impossible: (embryo, minute of the later time point, stage before, stage after) of
      each impossible one.
    total: how many there are.
  """

  impossible: tuple[tuple[str, float, int, int], ...]
  total: int

  @property
  def count(self) -> int:
    """How many are impossible."""
    return len(self.impossible)

  @property
  def rate(self) -> float:
    """Their share.

    Raises:
      ValueError: if no embryo has two time points.
    """
    if not self.total:
      raise ValueError("transitions: no embryo has two time points to go between")
    return self.count / self.total


def impossible_transitions(
    guesses: Mapping[str, np.ndarray],
    minutes: Mapping[str, np.ndarray],
    *,
    max_skip: float = 1.0,
) -> Transitions:
  """Finds transitions that go back, or forward faster than an embryo can.

  Args:
    guesses: embryo -> int [T], in the order of time.
    minutes: embryo -> float [T], rising.
    max_skip: stages that may be gone forward a minute; see `allowed_steps`.
  """
  impossible, total = [], 0
  for embryo, path in guesses.items():
    path, time = np.asarray(path), np.asarray(minutes[embryo])
    step, most = np.diff(path), allowed_steps(time, max_skip=max_skip)
    total += len(step)
    impossible += [
        (embryo, float(time[t + 1]), int(path[t]), int(path[t + 1]))
        for t in np.flatnonzero((step < 0) | (step > most))
    ]
  return Transitions(tuple(impossible), total)


def allowed_steps(minutes: np.ndarray, *, max_skip: float = 1.0) -> np.ndarray:
  """Returns how many stages may be gone forward between neighbours, int [T - 1].

  max_skip times the minutes between them, in whole stages, and always 1: at half a
  minute a time point, a new stage is still reached at one of them.

  Raises:
    ValueError: if the minutes do not rise.
  """
  gaps = np.diff(np.asarray(minutes, np.float64))
  if not (gaps > 0).all():
    raise ValueError(f"minutes must be known and rise; they are {minutes}")
  return np.maximum(np.floor(max_skip * gaps + _SLACK), 1).astype(int)


def decode(probabilities: np.ndarray, *, most: np.ndarray | None = None) -> np.ndarray:
  """Returns the likeliest path of stages that never falls, int [T].

  Maximises sum_t log p[t, path[t]] over all such paths, exactly (Viterbi, left to
  right). Of equals, the earlier stages are taken.

  Args:
    probabilities: [T, K].
    most: int [T - 1], how many stages a path may go forward at each step
      (`allowed_steps`); None: any number.
  """
  gain = _log(probabilities)
  length, classes = gain.shape
  stages = np.arange(classes)
  forward = stages[None] - stages[:, None]  # From a row to a column.
  best, before = gain[0], np.zeros((length, classes), int)
  for t in range(1, length):
    limit = classes if most is None else most[t - 1]
    reached = np.where((forward >= 0) & (forward <= limit), best[:, None], -np.inf)
    before[t] = reached.argmax(axis=0)
    best = reached.max(axis=0) + gain[t]
  path = np.empty(length, int)
  path[-1] = best.argmax()
  for t in range(length - 1, 0, -1):
    path[t - 1] = before[t, path[t]]
  return path


@dataclasses.dataclass(frozen=True)
class Boundaries:
  """When an embryo's stages begin, decoded against true.

  Attributes:
    errors: minutes, float [boundaries].
    missed: how many of them the decoded path never reaches.
  """

  errors: np.ndarray
  missed: int


def transition_errors(
    truth: np.ndarray, decoded: np.ndarray, minutes: np.ndarray
) -> Boundaries:
  """Compares when stages are first reached, for each boundary in an embryo's truth.

  A boundary is a stage s that the truth has, or passes, after an earlier one. It is
  reached at the first time point of a stage of at least s. Time points without a truth
  right before the first known one of at least s may be either side: a path that
  reaches s among them is not off. A boundary that the path never reaches counts as
  reached one time point after the last, which is the least that it is off.

  Args:
    truth: int [T] of one embryo, -1 where unknown.
    decoded: int [T].
    minutes: float [T], rising.
  """
  there, = np.nonzero(truth != UNKNOWN)
  errors, missed = [], 0
  stages = truth[there]
  if len(there):
    for stage in range(stages[0] + 1, stages.max() + 1):
      first = there[np.argmax(stages >= stage)]
      earliest = there[there < first][-1] + 1
      reached = np.flatnonzero(decoded >= stage)
      missed += not len(reached)
      at = minutes[reached[0]] if len(reached) else 2 * minutes[-1] - minutes[-2]
      errors.append(max(0.0, minutes[earliest] - at, at - minutes[first]))
  return Boundaries(np.array(errors, np.float64), missed)


def silhouette(features: np.ndarray, stages: np.ndarray) -> float:
  """Mean silhouette by stage: 1 where stages are tight and apart, below 0 where mixed.

  Mean over rows of (b - a) / max(a, b), a the mean distance to the others of its
  stage, b that to the nearest other stage; 0 for the only row of a stage (Rousseeuw
  1987).

  Args:
    features: [n, D].
    stages: int [n], -1 where unknown.

  Raises:
    ValueError: for fewer than two stages.
  """
  stages, features = known(stages, features)
  names, place = np.unique(stages, return_inverse=True)
  if len(names) < 2:
    raise ValueError(f"silhouette: needs two stages, the rows have {names.tolist()}")
  member = np.eye(len(names))[place]
  sums = distance.cdist(features, features) @ member  # [n, stages]
  sizes, rows = member.sum(axis=0), np.arange(len(place))
  own = sums[rows, place] / np.maximum(sizes[place] - 1, 1)
  means = sums / sizes
  means[rows, place] = np.inf
  other = means.min(axis=1)
  scale = np.maximum(np.maximum(own, other), np.finfo(np.float64).tiny)
  return float(np.where(sizes[place] > 1, (other - own) / scale, 0.0).mean())


def principal_components(features: np.ndarray, count: int) -> np.ndarray:
  """Scores of the rows along the first principal components, float64 [n, count].

  Components that are not there are 0; the largest weight of each is positive.
  """
  centred = features - features.mean(axis=0, dtype=np.float64)
  rows, width = centred.shape
  # The smaller of the two has the same directions.
  gram = centred.T @ centred if width <= rows else centred @ centred.T
  values, vectors = np.linalg.eigh(gram)
  order = np.argsort(values)[::-1][:count]
  values, vectors = values[order], vectors[:, order]
  real = values > 1e-10 * max(values[0], np.finfo(np.float64).tiny)
  vectors = vectors[:, real]
  scores = vectors * np.sqrt(values[real]) if width > rows else centred @ vectors
  axes = centred.T @ scores
  largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)
  return np.pad(scores * np.sign(largest), ((0, 0), (0, count - scores.shape[1])))


def time_correlation(
    features: np.ndarray, minutes: np.ndarray, embryos: np.ndarray
) -> float:
  """Says whether what varies most among features is time.

  |mean over embryos of Spearman's rank correlation| of the first principal component
  (of all rows) with the minutes. An embryo of one time point, or of one value, has 0.

  Args:
    features: [n, D].
    minutes: [n].
    embryos: [n], whose row it is.
  """
  first = principal_components(features, 1)[:, 0]
  # Rounding noise has ranks, too.
  first = np.round(first / max(np.abs(first).max(), 1e-12), 9)
  found = []
  for embryo in np.unique(embryos):
    own = embryos == embryo
    varies = len(np.unique(first[own])) > 1 and len(np.unique(minutes[own])) > 1
    found.append(
        float(stats.spearmanr(first[own], minutes[own])[0]) if varies else 0.0
    )
  return abs(float(np.mean(found)))


def known(truth: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
  """Returns truth and arrays without the rows whose truth is unknown.

  Raises:
    ValueError: if none is left, or lengths differ.
  """
  truth = np.asarray(truth)
  if any(len(array) != len(truth) for array in arrays):
    raise ValueError(
        f"stages: {len(truth)} truths with {[len(a) for a in arrays]} rows; needs as "
        "many"
    )
  there = truth != UNKNOWN
  if not there.any():
    raise ValueError(f"stages: of {len(truth)} time points none has a known stage")
  return truth[there], *(np.asarray(array)[there] for array in arrays)


def _log(probabilities: np.ndarray) -> np.ndarray:
  # A probability of 0 is as bad as can be counted, and still to be compared.
  probabilities = np.asarray(probabilities, np.float64)
  return np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
