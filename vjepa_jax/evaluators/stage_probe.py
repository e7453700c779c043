"""What frozen features of single time points know of stages, across embryos.

Run before the first step it measures the untrained encoder, run later the trained
one. Beside it stand, at the same labels, statistics of each time point that need no
model. Draws of labelled embryos and intervals depend on the data and the seed alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import difflib
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.data import pipeline
from vjepa_jax.evaluators import baselines as simple
from vjepa_jax.evaluators import embryos as embryos_lib
from vjepa_jax.evaluators import ridge
from vjepa_jax.evaluators import stage_metrics as metrics
from vjepa_jax.evaluators.base import find_split
from vjepa_jax.report import canvas, timelines
from vjepa_jax.volumes.grid import Grid

# Shells of `radial`, in units of the root mean square distance of the light.
_SHELLS = np.linspace(0.0, 2.0, 9)
# Rows that distances and the embedding are made of, evenly over all.
_MOST_DISTANCES, _MOST_POINTS = 2000, 1000


def intensity(frame: np.ndarray, spacing: np.ndarray) -> np.ndarray:
  """`baselines.intensity` of one time point [Z, Y, X, C], its mean and std first."""
  del spacing
  mean, std = (float(f(frame, dtype=np.float64)) for f in (np.mean, np.std))
  return simple.intensity(frame[None], mean, std)


def radial(frame: np.ndarray, spacing: np.ndarray) -> np.ndarray:
  """Mean and std in shells about the centre of the light, and how far the light goes.

  Args:
    frame: [Z, Y, X, C], z-scored.
    spacing: (dz, dy, dx); where unknown, voxels are taken to be cubes.
  """
  light = frame.mean(axis=-1, dtype=np.float64)
  weight = np.maximum(light, 0.0) + 1e-9
  weight /= weight.sum()
  steps = spacing if np.isfinite(spacing).all() else np.ones(3)
  axes = np.ogrid[tuple(slice(n) for n in light.shape)]
  away = 0.0
  for axis, step in zip(axes, steps / steps.max(), strict=True):
    away = away + ((axis - (weight * axis).sum()) * step) ** 2
  reach = math.sqrt((weight * away).sum())
  shell = np.digitize(np.sqrt(away) / max(reach, 1e-9), _SHELLS[1:]).ravel()
  shells = len(_SHELLS)
  counts = np.maximum(np.bincount(shell, minlength=shells), 1)
  means = np.bincount(shell, light.ravel(), minlength=shells) / counts
  squares = np.bincount(shell, light.ravel() ** 2, minlength=shells) / counts
  spread = np.sqrt(np.maximum(squares - means**2, 0.0))
  return np.concatenate([means, spread, [reach]])


# Of one z-scored time point, each fn(frame [Z, Y, X, C], spacing [3]) -> [V].
BASELINES = {"intensity": intensity, "radial": radial}


class Evaluator:
  """Ridge readout of the stage from each time point's frozen features.

  Features are the mean and the maximum over the places of a time point. The readout
  is fitted on whole embryos of one split and tested on those of another. `run` yields
    stage_probe.accuracy, and of N labelled embryos .accuracy_N (a mean over draws);
    stage_probe.<baseline>, .<baseline>_N: the same of statistics of the intensity;
    stage_probe.minus_<baseline>, .minus_<baseline>_N: the first less the second;
  each with .low and .high where two embryos or more are tested (95 % bootstrap over
  them, in pairs for the differences); and of all labelled embryos
    stage_probe.balanced_accuracy, .off_by_one, .chance (share of the commonest stage);
    stage_probe.impossible_raw, .impossible_raw_rate: transitions of the guesses, over
      all time points of movies whose time step is known;
    stage_probe.silhouette (by stage; left out where there is one stage only),
      .time_correlation (of the first principal component): of the features;
    stage_probe.absent: tested stages that no labelled embryo shows, whose time points
      are guessed wrong;
    stage_probe.embryos, .labelled_embryos, .time_points: how many are tested, labelled
      and judged;
    stage_probe.embedding: figure, t-SNE where scikit-learn is installed, else PCA.
  Where the tested split has no truth but a model's answers, numbers that need stages
  are stage_probe.answers_accuracy and so on.

  Attributes:
    needs_labels: True; a run without labels leaves it out.
  """

  needs_labels = True

  def __init__(
      self,
      functions: Mapping[str, Callable[..., Any]],
      data: Any,
      *,
      train_split: str = "train",
      split: str = "validation",
      embryos: Sequence[int] = (1, 3, 0),
      draws: int = 8,
      baselines: Sequence[str] = ("intensity", "radial"),
      inner_folds: int = 4,
      alpha: float = 100.0,
      max_skip: float = 1.0,
      batch_size: int = 16,
      bootstrap: int = 1000,
      seed: int = 0,
      figures: bool = True,
      tile: Sequence[int] | None = None,
  ):
    """Checks that the splits can answer before anything is computed.

    Args:
      functions: of the objective; "features" at least.
      data: the open data, of clips with stages.
      train_split: of the labelled embryos.
      split: of the embryos that are tested.
      embryos: numbers of labelled embryos; 0, all of them, must be among them.
      draws: of those embryos, different ones; fewer where there are no more.
      baselines: keys of `BASELINES`.
      inner_folds: folds over labelled embryos that choose the ridge penalty.
      alpha: the penalty with one labelled embryo, which leaves nothing to choose by.
      max_skip: stages that an embryo may go forward a minute.
      batch_size: clips a call of the encoder.
      bootstrap: resamples of tested embryos.
      seed: of draws, folds and resamples.
      figures: whether to draw.
      tile: (T, Z, Y, X) voxels of augment.crop: features of all tiles of that size that
        cover a clip, pooled together, in place of those of its centre.

    Raises:
      KeyError: for an unknown split or baseline, or no "features".
      ValueError: for splits without clips or stages, one split for both, more
        labelled embryos than there are, or an option out of range.
      ImportError: if figures are asked for and matplotlib is missing.
    """
    _check(functions, train_split, split, baselines)
    least = min(draws, bootstrap, inner_folds - 1)
    if not max_skip > 0 or not alpha > 0 or least < 1:
      raise ValueError(
          f"stage_probe: max_skip {max_skip} and alpha {alpha} must be above 0, draws "
          f"{draws} and bootstrap {bootstrap} at least 1, inner_folds {inner_folds} at "
          "least 2"
      )
    if figures:
      canvas.require_matplotlib()
    self._features = functions["features"]
    self._fit = _Side(data, train_split)
    self._test = _Side(data, split)
    labelled = np.unique(self._fit.points.embryos[self._fit.points.stages >= 0])
    self._draws = _draw(labelled, embryos, draws, seed, train_split)
    self._baselines, self._alpha = tuple(baselines), alpha
    self._inner_folds, self._max_skip = inner_folds, max_skip
    self._batch_size, self._repeats, self._seed = batch_size, bootstrap, seed
    self._figures, self._tile = figures, tuple(tile or ())
    self._said: dict[bytes, dict[str, dict[int, np.ndarray]]] = {}

  def run(
      self, params: Any, model_state: Any
  ) -> Iterator[tuple[str, float | np.ndarray]]:
    """Yields the numbers and the figure named above for these parameters."""
    of_frames = functools.partial(self._of_frames, params, model_state)
    fit, test = (
        side.gather(of_frames, self._batch_size) for side in (self._fit, self._test)
    )
    guesses = {"accuracy": self._guesses(fit, test)}
    guesses |= self._baseline_guesses(fit.seen, test.seen)
    prefix, judged = self._test.points.judged
    judged = np.where(test.seen, judged, metrics.UNKNOWN)
    for name, value in self._scored(judged, guesses):
      yield f"stage_probe.{prefix}{name}", value
    raw = guesses["accuracy"][0][:, 0]
    for name, value in self._of_stages(judged, raw, fit, test):
      yield f"stage_probe.{prefix}{name}", value
    yield from self._of_time(raw, test)
    labelled = self._fit.points.embryos[fit.seen & (self._fit.points.stages >= 0)]
    yield "stage_probe.labelled_embryos", float(len(np.unique(labelled)))
    tested = self._test.points.embryos[test.seen]
    yield "stage_probe.embryos", float(len(np.unique(tested)))
    if self._figures:
      yield "stage_probe.embedding", self._embedding(judged, fit, test)

  def _of_frames(self, params, model_state, batch) -> np.ndarray:
    means, most = [], []
    for part in embryos_lib.tiled(batch, self._tile):
      features = self._features(params, model_state, part)
      if features.ids is not None:
        raise ValueError("stage_probe: 'features' must be of all tokens, not of some")
      pooled = _pool(features.tokens, features.grid)
      means.append(pooled[0])
      most.append(pooled[1])
    return np.concatenate([np.mean(means, axis=0), np.max(most, axis=0)], axis=-1)

  def _guesses(self, fit, test) -> dict[int, np.ndarray]:
    """Returns for each number of labelled embryos guesses, int [N, draws].

    Time points that were not seen are -1.
    """
    points = self._fit.points
    known = fit.seen & (points.stages >= 0)
    found = {}
    for count, draws in self._draws.items():
      guesses = np.full((len(test.seen), len(draws)), metrics.UNKNOWN)
      for column, draw in enumerate(draws):
        rows = known & np.isin(points.embryos, draw)
        if not rows.any():
          raise ValueError(
              f"{self._fit.place}: no labelled time point of {', '.join(draw)} could "
              "be read"
          )
        guesses[test.seen, column] = self._classify(
            fit.values[rows], points.stages[rows], points.embryos[rows],
            test.values[test.seen],
        )
      found[count] = guesses
    return found

  def _classify(self, features, labels, embryos, unseen) -> np.ndarray:
    classes = len(self._test.volumes.labels)
    if len(np.unique(embryos)) > 1:
      return ridge.fit_predict(
          features, labels, embryos, unseen, classes=classes,
          inner_folds=self._inner_folds, seed=self._seed,
      )
    readout = ridge.fit_classifier(features, labels, classes, alphas=[self._alpha])
    return readout(unseen)[0].argmax(axis=-1)

  def _baseline_guesses(self, *seen: np.ndarray) -> dict[str, dict[int, np.ndarray]]:
    # They depend on nothing that training changes: made once a process, and again
    # only if files turned out bad meanwhile.
    key = b"".join(np.packbits(s).tobytes() for s in seen)
    if key not in self._said:
      found = {}
      for name in self._baselines:
        of_frames = functools.partial(_frames, BASELINES[name])
        fit, test = (
            side.gather(of_frames, self._batch_size) for side in (self._fit, self._test)
        )
        found[name] = self._guesses(fit, test)
      self._said = {key: found}
    return self._said[key]

  def _scored(self, judged, guesses):
    there = judged != metrics.UNKNOWN
    stages, groups = judged[there], self._test.points.embryos[there]
    several = len(np.unique(groups)) > 1
    options = dict(repeats=self._repeats, seed=self._seed)
    for name, by_count in guesses.items():
      for count, own in by_count.items():
        end = f"_{count}" if count else ""
        yield from ridge.with_interval(
            f"{name}{end}", _mean_accuracy, groups, stages, own[there], **options
        )
        if name == "accuracy":
          continue
        ours = guesses["accuracy"][count][there]
        difference, low, high = ridge.paired_bootstrap_difference(
            _mean_accuracy, groups, stages, ours, own[there], **options
        )
        yield f"minus_{name}{end}", difference
        if several:
          yield f"minus_{name}{end}.low", low
          yield f"minus_{name}{end}.high", high

  def _of_stages(self, judged, raw, fit, test):
    yield "balanced_accuracy", metrics.balanced_accuracy(judged, raw)
    yield "off_by_one", metrics.off_by_one(judged, raw)
    yield "chance", metrics.majority_share(judged)
    yield "time_points", float((judged != metrics.UNKNOWN).sum())
    shown = np.unique(self._fit.points.stages[fit.seen])
    tested = np.unique(judged[judged != metrics.UNKNOWN])
    yield "absent", float(len(np.setdiff1d(tested, shown)))
    if len(tested) > 1:
      rows = _evenly(np.flatnonzero(judged != metrics.UNKNOWN), _MOST_DISTANCES)
      features = _standardised(test.values[rows], fit.values[fit.seen])
      yield "silhouette", metrics.silhouette(features, judged[rows])

  def _of_time(self, raw, test):
    points = self._test.points
    movies = dict(embryos_lib.sequences(points, test, self._test.place))
    if not movies:
      return
    transitions = metrics.impossible_transitions(
        {name: raw[at] for name, at in movies.items()},
        {name: test.minutes[at] for name, at in movies.items()},
        max_skip=self._max_skip,
    )
    yield "stage_probe.impossible_raw", float(transitions.count)
    if transitions.total:
      yield "stage_probe.impossible_raw_rate", transitions.rate
    seen = np.sort(np.concatenate(list(movies.values())))
    features = _standardised(test.values[seen], test.values[seen])
    yield "stage_probe.time_correlation", metrics.time_correlation(
        features, test.minutes[seen], points.movie[seen]
    )

  def _embedding(self, judged, fit, test) -> np.ndarray:
    rows = _evenly(np.flatnonzero(test.seen), _MOST_POINTS)
    features = _standardised(test.values[rows], fit.values[fit.seen])
    points, method = _embed(features, self._seed)
    return timelines.embedding(
        points, judged[rows], test.minutes[rows], self._test.volumes.labels, method
    )


class _Side:
  """A split: labelled, or tested."""

  def __init__(self, data: Any, split: str):
    self.volumes = find_split(data, split, "stage_probe")
    self.place = f"stage_probe: split {split!r}"
    self.points = embryos_lib.time_points(self.volumes, self.place, once=True)

  def gather(self, of: Callable[[Any], np.ndarray], batch_size: int):
    batches = pipeline.eval_batches(self.volumes, batch_size, self.points.rows)
    return embryos_lib.gather(self.points, batches, of, self.place)


def _check(functions, train_split: str, split: str, baselines: Sequence[str]) -> None:
  if "features" not in functions:
    raise KeyError(
        "stage_probe: the objective must offer 'features'; it offers "
        f"{', '.join(sorted(functions))}"
    )
  for name in baselines:
    if name not in BASELINES:
      closest = difflib.get_close_matches(name, BASELINES, n=3, cutoff=0.0)
      raise KeyError(
          f"stage_probe.baselines: {name!r} is not known; closest: "
          f"{', '.join(closest)}"
      )
  if train_split == split:
    raise ValueError(
        f"stage_probe: train_split and split are both {split!r}; embryos must be "
        "tested that the readout was not fitted on"
    )


def _draw(
    labelled: np.ndarray, counts: Sequence[int], draws: int, seed: int, split: str
) -> dict[int, list[tuple[str, ...]]]:
  """Returns for each number of embryos which are labelled in each of its draws."""
  counts = [int(count) for count in counts]
  if 0 not in counts or min(counts) < 0 or len(set(counts)) < len(counts):
    raise ValueError(
        f"stage_probe.embryos {counts} must be different numbers of embryos, 0 (all) "
        "among them"
    )
  if max(counts) > len(labelled):
    raise ValueError(
        f"stage_probe.embryos {counts}: split {split!r} has {len(labelled)} embryos "
        "with stages; ask for no more, 0 is all of them"
    )
  names = [str(name) for name in labelled]
  found = {0: [tuple(names)]}
  for count in sorted(set(counts) - {0}):
    if math.comb(len(names), count) <= draws:
      found[count] = list(itertools.combinations(names, count))
      continue
    generator, chosen = np.random.default_rng((seed, count)), set()
    while len(chosen) < draws:
      chosen.add(tuple(sorted(generator.choice(names, count, replace=False).tolist())))
    found[count] = sorted(chosen)
  return found


@functools.partial(jax.jit, static_argnums=1)
def _pool(tokens: jax.Array, grid: Grid) -> jax.Array:
  """Mean and maximum over the places of every time point, [2, B, T, D].

  Time points that share a token in time share its features.
  """
  times = grid.dims[0]
  tokens = tokens.astype(jnp.float32).reshape(len(tokens), times, grid.places, -1)
  pooled = jnp.stack([tokens.mean(axis=2), tokens.max(axis=2)])
  step = (grid.stride or grid.patch)[0]
  frame_of = np.minimum(np.arange(grid.voxels[0]) // step, times - 1)
  return pooled[:, :, frame_of]


def _frames(of: Callable[..., np.ndarray], batch: Mapping[str, np.ndarray]):
  """Returns a baseline of every time point of a host batch, [B, T, V]."""
  found = []
  for volume, mean, std, spacing in zip(
      batch["volume"], batch["mean"], batch["std"], batch["spacing"], strict=True
  ):
    safe = std if np.isfinite(std) and std > 0 else np.float32(1)
    scored = (volume.astype(np.float32) - mean) / safe
    found.append([of(frame, spacing[1:]) for frame in scored])
  return np.array(found)


def _mean_accuracy(stages: np.ndarray, guesses: np.ndarray) -> float:
  """Mean over draws [n, draws] of the accuracy, which are of the same rows."""
  return float((stages[:, None] == guesses).mean())


def _standardised(features: np.ndarray, by: np.ndarray) -> np.ndarray:
  spread = by.std(axis=0)
  constant = spread <= 1e-10 * np.maximum(np.abs(by.mean(axis=0)), 1e-10)
  return (features - by.mean(axis=0)) / np.where(constant, 1.0, spread)


def _evenly(rows: np.ndarray, most: int) -> np.ndarray:
  if len(rows) <= most:
    return rows
  return rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]


def _embed(features: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
  """Returns points [n, 2] and what they are called."""
  components = metrics.principal_components(features, 30)
  try:
    from sklearn import manifold  # noqa: PLC0415
  except ImportError:
    return components[:, :2], "PCA"
  spread = components[:, 0].std()
  if len(features) < 5 or not spread:
    return components[:, :2], "PCA"
  made = manifold.TSNE(
      # From the first components, as small as t-SNE wants them: no chance in it.
      init=(components[:, :2] / spread * 1e-4).astype(np.float32), max_iter=500,
      perplexity=min(30.0, (len(features) - 1) / 3), random_state=seed,
  )
  return made.fit_transform(components), "t-SNE"
