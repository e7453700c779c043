"""How well an objective tells the class of unseen volumes, such as a diagnosis."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from scipy import special

from vjepa_jax.data import pipeline
from vjepa_jax.evaluators import ridge
from vjepa_jax.evaluators import stage_metrics as metrics
from vjepa_jax.evaluators.base import find_split
from vjepa_jax.report import canvas, timelines


class Evaluator:
  """Scores the classes of the volumes of a split that have a label.

  `run` yields
    classes.balanced_accuracy, .accuracy (with .low and .high: 95 % bootstrap over
      participants, where there are two), .macro_f1, .calibration_error, .nll;
    classes.chance, .volumes, .participants: share of the commonest class, and how many
      were judged;
    classes.confusion: figure.

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
      bins: int = 10,
      bootstrap: int = 1000,
      seed: int = 0,
      figures: bool = True,
      prefix: str = "classes",
  ):
    """Checks that the split can answer before anything is computed.

    Args:
      functions: of the objective; "logits" [B, K].
      data: the open data, with labels.
      split: of participants that nothing was learned from.
      batch_size: volumes a call.
      bins: of the calibration error.
      bootstrap: resamples of participants.
      seed: of the resamples.
      figures: whether to draw.
      prefix: of the names of numbers and figures, in place of "classes": for a second
        split.

    Raises:
      KeyError: for an unknown split, or if functions lack "logits".
      ValueError: for an empty split, one without labels, or an option out of range.
      ImportError: if figures are asked for and matplotlib is missing.
    """
    if "logits" not in functions:
      raise KeyError(
          "classes: the objective must offer 'logits', such as classify; it offers "
          f"{', '.join(sorted(functions))}"
      )
    if min(bins, bootstrap) < 1:
      raise ValueError(
          f"classes: bins {bins} and bootstrap {bootstrap} must be at least 1"
      )
    if figures:
      canvas.require_matplotlib()
    self._logits, self._volumes = functions["logits"], find_split(data, split, "classes")
    self._place = f"classes: split {split!r}"
    self._rows = np.flatnonzero(self._volumes.label_ids >= 0)
    if not len(self._rows):
      raise ValueError(
          f"{self._place}: no volume has a label; name the column by data.label, or "
          "leave this evaluator out"
      )
    self._batch_size, self._bins, self._repeats = batch_size, bins, bootstrap
    self._seed, self._figures, self._prefix = seed, figures, prefix

  def run(
      self, params: Any, model_state: Any
  ) -> Iterator[tuple[str, float | np.ndarray]]:
    """Yields the numbers and the figure named above for these parameters."""
    for name, value in self._all(params, model_state):
      yield f"{self._prefix}.{name}", value

  def _all(self, params, model_state):
    rows, chances = self._chances(params, model_state)
    truth, guesses = self._volumes.label_ids[rows], chances.argmax(axis=1)
    people = np.array([str(self._volumes.rows[row].participant) for row in rows])
    for name in ("balanced_accuracy", "accuracy"):
      yield from ridge.with_interval(
          name, getattr(metrics, name), people, truth, guesses,
          repeats=self._repeats, seed=self._seed,
      )
    yield "macro_f1", metrics.macro_f1(truth, guesses)
    yield "calibration_error", metrics.calibration_error(truth, chances, bins=self._bins)
    yield "nll", metrics.nll(truth, chances)
    yield "chance", metrics.majority_share(truth)
    yield "volumes", float(len(rows))
    yield "participants", float(len(np.unique(people)))
    if self._figures:
      labels = self._volumes.labels
      matrix = metrics.confusion(truth, guesses, len(labels))
      yield "confusion", timelines.confusion(matrix, labels, what="volumes")

  def _chances(self, params, model_state) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows that could be read and p(class) of each, [n, K]."""
    classes, rows, found = len(self._volumes.labels), [], []
    for batch in pipeline.eval_batches(self._volumes, self._batch_size, self._rows):
      logits = np.asarray(self._logits(params, model_state, batch), np.float64)
      if logits.ndim != 2 or logits.shape[1] != classes:
        raise ValueError(
            f"{self._place}: logits {logits.shape} for {classes} classes of volumes; "
            "stages of time points are judged by the evaluator 'stages'"
        )
      real = batch["_mask"] > 0
      rows.append(batch["index"][real])
      found.append(special.softmax(logits[real], axis=-1))
    rows, found = np.concatenate(rows), np.concatenate(found)
    if not len(rows) or not np.isfinite(found).all():
      raise ValueError(
          f"{self._place}: {len(rows)} volumes could be read; needs one, and finite "
          "logits"
      )
    return rows, found
