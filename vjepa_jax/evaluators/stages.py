"""How well an objective tells the stage of each time point of unseen embryos."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from vjepa_jax.data import pipeline
from vjepa_jax.evaluators import embryos as embryos_lib
from vjepa_jax.evaluators import ridge
from vjepa_jax.evaluators import stage_metrics as metrics
from vjepa_jax.evaluators.base import find_split
from vjepa_jax.report import canvas, timelines

# Of raw guesses against what they are judged by, each fn(stages, guesses).
_OF_GUESSES = {
    "balanced_accuracy": metrics.balanced_accuracy,
    "macro_f1": metrics.macro_f1,
    "off_by_one": metrics.off_by_one,
    "stage_mae": metrics.stage_mae,
    "kappa": metrics.quadratic_kappa,
}


class Evaluator:
  """Scores p(stage) of every time point of a split, raw and decoded.

  A guess is the likeliest stage of a time point by itself. The decoded path is the
  likeliest one of an embryo on which no transition is impossible. `run` yields
    stages.accuracy (with .low and .high: 95 % bootstrap over embryos, where there are
      two), .balanced_accuracy, .macro_f1, .off_by_one, .stage_mae, .kappa (quadratic
      weights), .calibration_error, .nll: of the guesses, against the truth;
    stages.decoded_accuracy, .transition_error_minutes (mean over the boundaries of
      all embryos; left out where there is none), .boundaries_missed: of the decoded
      paths, against the truth (`stage_metrics.transition_errors`);
    stages.chance, .time_points: share of the commonest true stage, and how many time
      points have a truth;
    stages.impossible_raw, .impossible_raw_rate, .impossible_decoded: transitions, of
      all time points; the last is 0 by construction;
    stages.kappa_answers: agreement with a model's answers, where there are some
      beside the truth;
    stages.embryos: how many there are;
    stages.timeline, .confusion: figures.
  Of movies whose time step nobody gave, nothing is decoded and no transition counted.
  Where no time point of the split has a truth and a model's answers are all there is,
  numbers against them are stages.answers_accuracy and so on, and nothing is drawn as
  the truth.

  Attributes:
    needs_labels: True; a run without labels leaves it out.
  """

  needs_labels = True

  def __init__(
      self,
      functions: Mapping[str, Callable[..., Any]],
      data: Any,
      *,
      split: str = "validation",
      batch_size: int = 16,
      max_skip: float = 1.0,
      bins: int = 10,
      bootstrap: int = 1000,
      seed: int = 0,
      figures: bool = True,
      drawn: int = 6,
      tile: Sequence[int] | None = None,
      prefix: str = "stages",
  ):
    """Checks that the split can answer before anything is computed.

    Args:
      functions: of the objective; "logits" [B, T, K], or [B, K] for the middle time
        point of a clip.
      data: the open data, of clips with stages.
      split: of embryos that nothing was learned from.
      batch_size: clips a call.
      max_skip: stages that an embryo may go forward a minute.
      bins: of the calibration error.
      bootstrap: resamples of embryos.
      seed: of the resamples.
      figures: whether to draw.
      drawn: embryos in the timeline.
      tile: (T, Z, Y, X) voxels of augment.crop: the mean over tiles of that size that
        cover a clip, in place of what its centre says.
      prefix: of the names of numbers and figures, in place of "stages": for a second
        split.

    Raises:
      KeyError: for an unknown split, or if functions lack "logits".
      ValueError: for an empty split, one without clips or stages, or an option out
        of range.
      ImportError: if figures are asked for and matplotlib is missing.
    """
    if "logits" not in functions:
      raise KeyError(
          "stages: the objective must offer 'logits', such as classify; it offers "
          f"{', '.join(sorted(functions))}"
      )
    if not max_skip > 0 or min(bins, bootstrap, drawn) < 1:
      raise ValueError(
          f"stages: max_skip {max_skip} must be above 0; bins {bins}, bootstrap "
          f"{bootstrap} and drawn {drawn} at least 1"
      )
    if figures:
      canvas.require_matplotlib()
    self._logits = functions["logits"]
    self._volumes = find_split(data, split, "stages")
    self._place = f"stages: split {split!r}"
    self._points = embryos_lib.time_points(self._volumes, self._place)
    self._batch_size, self._max_skip, self._bins = batch_size, max_skip, bins
    self._repeats, self._seed = bootstrap, seed
    self._figures, self._drawn, self._tile = figures, drawn, tuple(tile or ())
    self._prefix = prefix

  def run(
      self, params: Any, model_state: Any
  ) -> Iterator[tuple[str, float | np.ndarray]]:
    """Yields the numbers and figures named above for these parameters."""
    for name, value in self._all(params, model_state):
      yield f"{self._prefix}.{name}", value

  def _all(self, params, model_state):
    points, found = self._points, self._probabilities(params, model_state)
    guesses = np.where(found.seen, found.values.argmax(axis=1), metrics.UNKNOWN)
    decoded = np.full(len(points), metrics.UNKNOWN)
    movies = dict(embryos_lib.sequences(points, found, self._place))
    for at in movies.values():
      most = metrics.allowed_steps(found.minutes[at], max_skip=self._max_skip)
      decoded[at] = metrics.decode(found.values[at], most=most)
    prefix, judged = points.judged
    judged = np.where(found.seen, judged, metrics.UNKNOWN)
    for name, value in self._against(judged, found, guesses, decoded, movies):
      yield f"{prefix}{name}", value
    if not prefix:
      yield from self._against_answers(guesses, found.seen)
    if movies:
      yield from self._impossible(guesses, decoded, found.minutes, movies)
    yield "embryos", float(len(np.unique(points.embryos[found.seen])))
    if self._figures:
      yield from self._drawings(found, guesses, decoded, movies)

  def _probabilities(self, params: Any, model_state: Any) -> embryos_lib.Found:
    classes = len(self._volumes.labels)

    def probabilities(batch):
      found = []
      for part in embryos_lib.tiled(batch, self._tile):
        logits = np.asarray(self._logits(params, model_state, part), np.float64)
        if logits.shape[-1] != classes:
          raise ValueError(
              f"{self._place}: logits {logits.shape} for {classes} stages; the "
              "objective's classes must be those of data.stages.taxonomy"
          )
        found.append(special.softmax(logits, axis=-1))
      return np.mean(found, axis=0)

    batches = pipeline.eval_batches(self._volumes, self._batch_size, self._points.rows)
    return embryos_lib.gather(self._points, batches, probabilities, self._place)

  def _against(self, judged, found, guesses, decoded, movies):
    """Numbers against the truth, or what takes its place."""
    there = judged != metrics.UNKNOWN
    stages, own, p = judged[there], guesses[there], found.values[there]
    yield from ridge.with_interval(
        "accuracy", metrics.accuracy, self._points.embryos[there], stages, own,
        repeats=self._repeats, seed=self._seed,
    )
    for name, statistic in _OF_GUESSES.items():
      yield name, statistic(stages, own)
    yield "calibration_error", metrics.calibration_error(stages, p, bins=self._bins)
    yield "nll", metrics.nll(stages, p)
    if movies:
      timed = there & (decoded != metrics.UNKNOWN)
      if timed.any():
        yield "decoded_accuracy", metrics.accuracy(judged[timed], decoded[timed])
      yield from self._boundaries(judged, decoded, found, movies)
    yield "chance", metrics.majority_share(stages)
    yield "time_points", float(there.sum())

  def _boundaries(self, judged, decoded, found, movies):
    boundaries = [
        metrics.transition_errors(judged[at], decoded[at], found.minutes[at])
        for at in movies.values()
    ]
    errors = np.concatenate([b.errors for b in boundaries])
    if errors.size:
      yield "transition_error_minutes", float(errors.mean())
    yield "boundaries_missed", float(sum(b.missed for b in boundaries))

  def _against_answers(self, guesses, seen):
    answers = np.where(seen, self._points.answers, metrics.UNKNOWN)
    if (answers != metrics.UNKNOWN).any():
      yield "kappa_answers", metrics.quadratic_kappa(answers, guesses)

  def _impossible(self, guesses, decoded, minutes, movies):
    times = {name: minutes[at] for name, at in movies.items()}
    raw, repaired = (
        metrics.impossible_transitions(
            {name: path[at] for name, at in movies.items()}, times,
            max_skip=self._max_skip,
        ) for path in (guesses, decoded)
    )
    yield "impossible_raw", float(raw.count)
    if raw.total:
      yield "impossible_raw_rate", raw.rate
    yield "impossible_decoded", float(repaired.count)

  def _drawings(self, found, guesses, decoded, movies):
    classes, truth = self._volumes.labels, self._points.truth
    drawn = [
        timelines.Timeline(
            name, found.minutes[at], found.values[at], truth[at], decoded[at]
        ) for name, at in list(movies.items())[: self._drawn]
    ]
    if drawn:
      yield "timeline", timelines.timeline(drawn, classes)
    truth = np.where(found.seen, truth, metrics.UNKNOWN)
    if (truth != metrics.UNKNOWN).any():
      matrix = metrics.confusion(truth, guesses, len(classes))
      yield "confusion", timelines.confusion(matrix, classes)
