"""Evaluators inside the loop: functions that take host batches, and their turns."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextvars
import difflib
import itertools
import math
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from vjepa_jax.evaluators.base import Evaluator
from vjepa_jax.objectives.base import Objective
from vjepa_jax.train import metrics as metrics_lib
from vjepa_jax.train import sharding
from vjepa_jax.train.state import Augment, with_positions
from vjepa_jax.train.step import make_eval_step

HostBatch = Mapping[str, np.ndarray]
# Called before each batch that an evaluator has the devices look at.
_before_batch: contextvars.ContextVar[Callable[[], None]] = contextvars.ContextVar(
    "before_batch", default=lambda: None
)


class Interrupted(Exception):
  """A signal broke an evaluation off; it is made to its end when the run goes on.

  Attributes:
    signal: its number.
  """

  def __init__(self, signal: int):
    super().__init__(f"signal {signal}")
    self.signal = signal


def wrap_functions(
    functions: Mapping[str, Callable[..., Any]], augment: Augment, mesh: Mesh
) -> dict[str, Callable[..., Any]]:
  """Makes an objective's functions take host batches.

  Args:
    functions: of `Objective.functions()`, fn(params, model_state, [batch, ...]).
    augment: called with train=False.
    mesh: where batches go, rows over all devices.

  Returns:
    name -> fn(params, model_state, [host batch, ...]), each compiled once a shape;
    every host gives the same whole batch (evaluators all see all of it);
    what they return has its whole value on every host (`np.asarray` works).
  """
  return {name: _wrap(fn, augment, mesh) for name, fn in functions.items()}


class Validation:
  """The objective's own metrics on held-out batches, an evaluator like others.

  Masks come from one fixed key and nothing is augmented, so that two values differ
  by what was learned alone.
  """

  def __init__(
      self,
      objective: Objective,
      augment: Augment,
      mesh: Mesh,
      batches: Callable[[], Iterable[HostBatch]],
      limit: int | None = None,
  ):
    """Holds what it takes.

    Args:
      objective: whose loss is asked.
      augment: called with train=False.
      mesh: where batches go.
      batches: gives whole batches, the same on every host, padded with `_mask` 0,
        at each call afresh.
      limit: at most so many batches; None: all.
    """
    self._step = jax.jit(
        sharding.on_mesh(make_eval_step(objective, augment), mesh),
        out_shardings=sharding.replicated(mesh),
    )
    self._mesh, self._batches, self._limit = mesh, batches, limit

  def run(self, params: Any, model_state: Any) -> Iterator[tuple[str, float]]:
    """Yields ("validation.loss", mean over real rows) and the other metrics.

    Raises:
      ValueError: there was no batch, no row with `_mask` 1, or none with a label.
    """
    total: metrics_lib.Sums = {}
    batches = rows = 0
    for batch in itertools.islice(self._batches(), self._limit):
      _before_batch.get()()
      batches, rows = batches + 1, rows + int(np.sum(batch["_mask"]))
      metrics = self._step(params, model_state, sharding.put_common_batch(batch, self._mesh))
      total = metrics_lib.merge(total, jax.device_get(metrics))
    if not total.get("loss", (0.0, 0.0))[1]:
      if rows:
        raise ValueError(
            f"validation: none of the {rows} rows in {batches} batch(es) has a label, "
            "so that there is no loss to tell; put labelled records into the "
            "validation split, raise train.validation_batches, or set no eval_batches"
        )
      raise ValueError(
          "validation: no batch had a row with _mask 1; give the validation split at "
          "least one record, or no eval_batches"
      )
    for name, value in metrics_lib.means(total).items():
      yield f"validation.{name}", value


class Evaluations:
  """Runs evaluators when they are due, writes what they yield, remembers it.

  Attributes:
    history: [step, value] pairs of the early-stopping metric, kept in checkpoints.
    latest: name -> value of the numbers that this process has seen.
    broken: what of an evaluation was made before a signal broke it off, as JSON for
      a checkpoint: step, done (evaluators), found (their numbers); else None.
  """

  def __init__(
      self,
      evaluators: Mapping[str, tuple[Evaluator, int | None]],
      writer: metrics_lib.Writer,
      *,
      watched: str | None = None,
      mode: str = "max",
      patience: int = 10,
      history: Sequence[Sequence[float]] = (),
      broken: Mapping[str, Any] | None = None,
      stopped: Callable[[int], int] = lambda step: 0,
  ):
    """Takes the evaluators in their order.

    Args:
      evaluators: name -> (evaluator, every how many steps or None).
      writer: gets numbers, figures and a line for people.
      watched: number whose stagnation ends the run; None: no number.
      mode: "max" or "min", what is better for `watched`.
      patience: evaluations without a better value before it counts as stagnant.
      history: of the checkpoint that the run resumes from.
      broken: of the same checkpoint; `run` at its step goes on from it.
      stopped: asked before each batch with the step: signal to stop for, or 0.
    """
    self._evaluators, self._writer, self._stopped = evaluators, writer, stopped
    self._watched, self._mode, self._patience = watched, mode, patience
    self.history = [[int(step), float(value)] for step, value in history]
    self.latest: dict[str, float] = {}
    self.broken = broken
    broken = broken or {"step": None, "done": (), "found": {}}
    self._step, self._found = broken["step"], dict(broken["found"])
    self._done_at = dict.fromkeys(broken["done"], self._step)

  def run(
      self, step: int, params: Any, model_state: Any, *, everything: bool = False
  ) -> dict[str, float]:
    """Runs those that are due at `step`, or everything not yet run at it.

    Returns:
      The numbers of this step up to now; empty where nothing was due.

    Raises:
      KeyError: two evaluators gave one name.
      Interrupted: a signal came; `broken` holds what was made before.
    """
    if step != self._step:
      self._step, self._found = step, {}
    found, self.broken = self._found, None
    for name, (evaluator, every_steps) in self._evaluators.items():
      due = everything or (every_steps and step % every_steps == 0)
      if not due or self._done_at.get(name) == step:
        continue
      try:
        numbers = self._run_one(step, evaluator, params, model_state)
      except Interrupted:
        done = [other for other, at in self._done_at.items() if at == step]
        self.broken = {"step": step, "done": done, "found": dict(found)}
        raise
      self._done_at[name] = step
      if twice := numbers.keys() & found:
        raise KeyError(
            f"evaluator {name!r} gives {sorted(twice)}, which another one gave at the "
            "same step; names must differ"
        )
      found |= numbers
      self._writer.write(step, numbers)
      if numbers:
        line = metrics_lib.format_scalars(numbers, prefix=f"{name}.")
        self._writer.say(f"step {step} {name}: {line}")
    self.latest |= found
    known = self.history and self.history[-1][0] == step
    if self._watched in found and not known:
      self.history.append([step, found[self._watched]])
    return dict(found)

  def require(self, name: str | None, option: str) -> None:
    """Refuses the name of a number that no evaluator gave when all were run.

    Raises:
      KeyError: with the three closest names.
    """
    if name is None or name in self.latest:
      return
    close = difflib.get_close_matches(name, self.latest, n=3, cutoff=0.0)
    raise KeyError(
        f"{option} {name!r} is no number of the evaluators {list(self._evaluators)}; "
        f"the closest are {close}"
    )

  def stagnant(self) -> bool:
    """Says whether the last `patience` values of the metric were no better."""
    if self._watched is None:
      return False
    sign = 1.0 if self._mode == "max" else -1.0
    best, since = -math.inf, 0
    for _, value in self.history:
      if sign * value > best:
        best, since = sign * value, 0
      else:
        since += 1
    return since >= self._patience

  def _run_one(self, step, evaluator, params, model_state) -> dict[str, float]:
    def check() -> None:
      if number := self._stopped(step):
        raise Interrupted(number)

    token = _before_batch.set(check)
    numbers = {}
    try:
      for name, value in evaluator.run(params, model_state):
        if isinstance(value, np.ndarray) and value.ndim:
          self._writer.figure(step, name, value)
        else:
          numbers[name] = float(value)
    finally:
      _before_batch.reset(token)
    return numbers


def _wrap(fn: Callable[..., Any], augment: Augment, mesh: Mesh) -> Callable[..., Any]:
  whole = sharding.replicated(mesh)
  without_batch = jax.jit(sharding.on_mesh(fn, mesh), out_shardings=whole)

  def on_device(params, model_state, batch, *args):
    batch = augment(with_positions(batch), jax.random.key(0), train=False)
    return fn(params, model_state, batch, *args)

  with_batch = jax.jit(sharding.on_mesh(on_device, mesh), out_shardings=whole)

  def call(params, model_state, batch=None, *args):
    if batch is None:
      return without_batch(params, model_state)
    _before_batch.get()()
    batch = sharding.put_common_batch(batch, mesh)
    return with_batch(params, model_state, batch, *args)

  return call
