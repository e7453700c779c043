"""What frozen features know: a ridge readout of labels, split by patient.

Run before the first step it measures the untrained encoder, run later the
trained one; beside both stand baselines that need no model. Folds, baselines and
intervals depend on the data and the seed alone, so that two runs, or two steps
of one run, are compared on the same patients.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.data import pipeline
from vjepa_jax.evaluators import baselines as simple
from vjepa_jax.evaluators import ridge
from vjepa_jax.evaluators.base import find_split

# function of the objective -> what its probe is called
ENCODERS = {"features": "accuracy", "context_features": "context"}
POOLS = ("mean", "mean_std")


class Evaluator:
  """Ridge probe on frozen pooled features, balanced accuracy over patients.

  `run` yields, each with `.low` and `.high` (95 % bootstrap over patients):
    probe.accuracy: pooled target features ("features").
    probe.context: pooled online features, where offered ("context_features").
    probe.<baseline>: each baseline, on the same folds.
    probe.minus_<baseline>: probe.accuracy less the baseline, paired.
    probe.few: target features, with only `few` labelled patients (if asked).
    probe.<attribute>: each of `leaks` decoded from the target features, such as
      the device: what features should not depend on.
  and once, without an interval, probe.chance and probe.<attribute>_chance.

  Attributes:
    needs_labels: True; a run without labels leaves the probe out.
  """

  needs_labels = True

  def __init__(
      self,
      functions: Mapping[str, Callable[..., Any]],
      data: Any,
      *,
      split: str = "probe",
      label: str = "label",
      folds: int = 5,
      inner_folds: int = 4,
      pool: str = "mean",
      batch_size: int = 16,
      bootstrap: int = 1000,
      seed: int = 0,
      encoders: Sequence[str] = ("features", "context_features"),
      baselines: Sequence[str] = ("intensity", "pixel_pca", "depth_profile"),
      components: int = 64,
      few: int | None = None,
      few_draws: int = 8,
      leaks: Sequence[str] = (),
  ):
    """Checks that the split can answer before anything is computed.

    Args:
      functions: of the objective; "features" at least.
      data: the open data; rows need `participant` and the attributes named.
      split: where labelled volumes are.
      label: attribute of a row that is predicted; None or "" means no label.
      folds: outer folds over patients.
      inner_folds: folds that choose the ridge penalty.
      pool: "mean" over tokens, or "mean_std": their std beside it.
      batch_size: volumes a call of the encoder.
      bootstrap: resamples of patients.
      seed: of folds, draws and resamples.
      encoders: keys of `ENCODERS`; those that `functions` offers are probed.
      baselines: keys of `baselines.BASELINES`.
      components: of pixel PCA.
      few: number of labelled patients of probe.few; None: not computed.
      few_draws: draws of those patients; the accuracies are averaged.
      leaks: attributes of a row to decode, such as ("device",).

    Raises:
      KeyError: for an unknown split, encoder or baseline, or no "features".
      ValueError: if the split has no labels, fewer than two classes, or fewer
        patients than folds (or no more than `few`); or pool is not known.
    """
    if pool not in POOLS:
      raise ValueError(f"probe.pool {pool!r} is not one of {', '.join(POOLS)}")
    simple.check_names(baselines)
    self._encoders = _offered(encoders, functions)
    self._functions = functions
    self._volumes = find_split(data, split, "probe")
    self._label = _Target(self._volumes, label, folds, split)
    self._leaks = {name: _Target(self._volumes, name, folds, split) for name in leaks}
    self._targets = [self._label, *self._leaks.values()]
    self._rows = np.unique(np.concatenate([t.rows for t in self._targets]))
    patients = len(np.unique(self._label.patients))
    if few is not None and not 2 <= few < patients:
      raise ValueError(
          f"probe.few={few}: needs at least 2 patients and fewer than the "
          f"{patients} of split {split!r}, of whom the rest are the test"
      )
    self._few, self._few_draws = few, few_draws
    self._baselines, self._components = tuple(baselines), components
    self._batch_size, self._pool = batch_size, pool
    self._repeats, self._seed = bootstrap, seed
    self._classify = functools.partial(
        ridge.cross_predict, folds=folds, inner_folds=inner_folds, seed=seed
    )
    self._inner_folds = inner_folds

  def run(self, params: Any, model_state: Any) -> Iterator[tuple[str, float]]:
    """Yields the numbers named above for these parameters."""
    target = self._label
    guesses = {}
    for function in self._encoders:
      pooled = self._pooled(function, params, model_state)
      guesses[ENCODERS[function]] = self._guess(self._of(target, pooled), target)
      if function == "features":
        features = pooled
    guesses |= self._baseline_guesses
    for name, guess in guesses.items():
      yield from self._scored(name, guess, target)
    for name in self._baselines:
      yield from _interval(
          f"probe.minus_{name}",
          *ridge.paired_bootstrap_difference(
              ridge.balanced_accuracy, target.patients, target.labels,
              guesses["accuracy"], guesses[name],
              repeats=self._repeats, seed=self._seed,
          ),
      )
    yield "probe.chance", 1.0 / target.classes
    if self._few is not None:
      yield from self._few_labels(self._of(target, features))
    for name, leak in self._leaks.items():
      guess = self._guess(self._of(leak, features), leak)
      yield from self._scored(name, guess, leak)
      yield f"probe.{name}_chance", 1.0 / leak.classes

  def _guess(self, features: np.ndarray, target: "_Target", **options) -> np.ndarray:
    return self._classify(
        features, target.labels, target.patients, classes=target.classes, **options
    )

  def _of(self, target: "_Target", features: np.ndarray) -> np.ndarray:
    """Picks the target's rows out of features of all rows looked at."""
    return features[np.searchsorted(self._rows, target.rows)]

  def _scored(self, name: str, guess: np.ndarray, target: "_Target"):
    low, high = ridge.bootstrap_interval(
        ridge.balanced_accuracy, target.patients, target.labels, guess,
        repeats=self._repeats, seed=self._seed,
    )
    value = ridge.balanced_accuracy(target.labels, guess)
    return _interval(f"probe.{name}", value, low, high)

  def _pooled(self, function: str, params: Any, model_state: Any) -> np.ndarray:
    """Returns the pooled features of all rows looked at, [rows, D or 2 D]."""
    pooled, found = [], []
    for batch in pipeline.eval_batches(self._volumes, self._batch_size, self._rows):
      tokens = self._functions[function](params, model_state, batch).tokens
      real = batch["_mask"] > 0
      pooled.append(np.asarray(_pool(tokens, self._pool))[real])
      found.append(batch["index"][real])
    pooled = np.concatenate(pooled)
    self._leave_out_unread(np.concatenate(found))
    if not np.isfinite(pooled).all():
      raise ValueError(
          f"probe: {function!r} gave features that are not finite for "
          f"{(~np.isfinite(pooled).all(axis=1)).sum()} of {len(pooled)} volumes"
      )
    return pooled

  def _leave_out_unread(self, found: np.ndarray) -> None:
    # Files that are validated lazily turn out bad when they are first read.
    if len(found) < len(self._rows):
      self._rows = found
      for target in self._targets:
        target.keep(found)

  @functools.cached_property
  def _baseline_guesses(self) -> dict[str, np.ndarray]:
    # They depend on nothing that training changes: read once a process.
    if not self._baselines:
      return {}
    features = simple.extract(
        self._baselines,
        pipeline.eval_batches(self._volumes, self._batch_size, self._label.rows),
    )
    guesses = {}
    for name in self._baselines:
      transform = simple.BASELINES[name].transform
      guesses[name] = self._guess(
          features[name], self._label,
          transform=transform and transform(self._components),
      )
    return guesses

  def _few_labels(self, features: np.ndarray) -> Iterator[tuple[str, float]]:
    """Trains on few patients, tests on all others, averages over draws."""
    target = self._label
    patients = len(np.unique(target.patients))
    # As many folds as patients rank them by class; evenly spaced ranks are then
    # a draw that holds each class in its share.
    ranks = np.arange(self._few) * patients // self._few
    guesses = np.full((len(target.labels), self._few_draws), -1)
    for draw in range(self._few_draws):
      rank_of = ridge.grouped_folds(
          target.patients, patients, seed=self._seed + draw, stratify=target.labels
      )
      known = np.isin(rank_of, ranks)
      guesses[~known, draw] = ridge.fit_predict(
          features[known], target.labels[known], target.patients[known],
          features[~known], classes=target.classes,
          inner_folds=self._inner_folds, seed=self._seed,
      )
    low, high = ridge.bootstrap_interval(
        _mean_accuracy, target.patients, target.labels, guesses,
        repeats=self._repeats, seed=self._seed,
    )
    yield from _interval(
        "probe.few", _mean_accuracy(target.labels, guesses), low, high
    )


class _Target:
  """Labelled rows of a split: which rows, whose, and of which class."""

  def __init__(self, volumes: Any, attribute: str, folds: int, split: str):
    values = [getattr(row, attribute) for row in volumes.rows]
    rows = [i for i, value in enumerate(values) if value not in (None, "")]
    names = sorted({values[i] for i in rows})
    patients = np.array([str(volumes.rows[i].participant) for i in rows])
    place = f"probe: {attribute!r} of split {split!r}"
    if not rows:
      raise ValueError(
          f"{place}: none of {len(values)} volumes has a label; name a column "
          "that holds one, or leave the probe out"
      )
    if len(names) < 2:
      raise ValueError(
          f"{place}: {len(rows)} labelled volumes are all {names[0]!r}; needs at "
          "least two classes"
      )
    if len(set(patients)) < folds:
      raise ValueError(
          f"{place}: {len(set(patients))} labelled patients for {folds} folds; "
          "needs at least one a fold: label more or set probe.folds lower"
      )
    self.rows, self.patients = np.array(rows), patients
    self.labels = np.array([names.index(values[i]) for i in rows])
    self.classes = len(names)

  def keep(self, rows: np.ndarray) -> None:
    """Leaves out what is not among these rows of the split."""
    inside = np.isin(self.rows, rows)
    self.rows, self.patients = self.rows[inside], self.patients[inside]
    self.labels = self.labels[inside]


def _offered(encoders, functions) -> tuple[str, ...]:
  for name in encoders:
    if name not in ENCODERS:
      raise KeyError(
          f"probe.encoders: {name!r} is not one of {', '.join(ENCODERS)}"
      )
  if "features" not in functions or "features" not in encoders:
    raise KeyError(
        "probe: the objective must offer 'features', and encoders name it; it "
        f"offers {', '.join(sorted(functions))}"
    )
  return tuple(name for name in ENCODERS if name in encoders and name in functions)


@functools.partial(jax.jit, static_argnums=1)
def _pool(tokens: jax.Array, pool: str) -> jax.Array:
  tokens = tokens.astype(jnp.float32)
  mean = tokens.mean(axis=1)
  if pool == "mean":
    return mean
  return jnp.concatenate([mean, tokens.std(axis=1)], axis=-1)


def _mean_accuracy(labels: np.ndarray, guesses: np.ndarray) -> float:
  """Mean over draws [n, draws] of the accuracy on rows that were tested (>= 0)."""
  scores = [
      ridge.balanced_accuracy(labels[tested], guess[tested])
      for guess in guesses.T
      if (tested := guess >= 0).any()
  ]
  return float(np.mean(scores))


def _interval(name: str, value: float, low: float, high: float):
  yield name, value
  yield f"{name}.low", low
  yield f"{name}.high", high
