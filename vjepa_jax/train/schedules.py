"""Schedules: pure functions of the global step, the same one applied and logged.

A schedule maps a 0-based step (int, numpy array or traced jax array) to a value,
clamps its progress to [0, 1], and so stays at its last value for ever after: the
reference's cosines climb again past their end.

V-JEPA 2 counts its first `scheduler.step()` as step 1; ours counts from 0, so our
step s is the reference's step s + 1. `warmup_cosine(..., offset=1)` reproduces it.
EMA momentum starts at i = 0 there too and needs no offset.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Step = Any  # int, np.ndarray of ints, or jax.Array (traced or not)
Schedule = Callable[[Step], Any]


def constant(value: float) -> Schedule:
  """Returns `value` at every step."""

  def schedule(step: Step):
    xp, step = _namespace(step)
    return xp.full_like(step, value)

  return schedule


def linear(
    start: float, final: float, total_steps: int, *, offset: int = 0
) -> Schedule:
  """Goes straight from `start` at step 0 to `final` at `total_steps`.

  Args:
    start: value at step 0 (minus `offset`).
    final: value from `total_steps` on.
    total_steps: length, >= 1.
    offset: added to the step; 1 counts as V-JEPA 2 does.

  Raises:
    ValueError: total_steps is not positive.
  """
  _check_lengths(total_steps)

  def schedule(step: Step):
    xp, step = _namespace(step)
    return start + (final - start) * _progress(xp, step + offset, 0, total_steps)

  return schedule


def cosine(
    start: float, final: float, total_steps: int, *, offset: int = 0
) -> Schedule:
  """Goes from `start` to `final` along half a cosine (weight decay, momentum).

  Args and errors as `linear`. Source: CosineWDSchedule of V-JEPA 2.
  """
  return warmup_cosine(start, total_steps, final=final, offset=offset)


def warmup_cosine(
    peak: float,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    start: float = 0.0,
    final: float = 0.0,
    offset: int = 0,
) -> Schedule:
  """Rises straight from `start` to `peak`, then falls by half a cosine to `final`.

  Args:
    peak: value at `warmup_steps`.
    total_steps: step at which `final` is reached, warm-up included.
    warmup_steps: length of the rise; 0 begins at `peak`.
    start: value at step 0 where there is a warm-up.
    final: value from `total_steps` on.
    offset: added to the step; 1 counts as V-JEPA 2 does.

  Raises:
    ValueError: total_steps does not exceed warmup_steps.

  Source: WarmupCosineSchedule of V-JEPA 2, src/utils/schedulers.py; clamped here.
  """
  _check_lengths(total_steps, warmup_steps=warmup_steps)

  def schedule(step: Step):
    xp, step = _namespace(step)
    step = step + offset
    fall = _progress(xp, step, warmup_steps, total_steps)
    # cos(x/2)^2 is (1 + cos x)/2 without its cancellation near the end.
    value = final + (peak - final) * xp.cos(0.5 * np.pi * fall) ** 2
    return _with_warmup(xp, step, value, warmup_steps, start, peak)

  return schedule


def wsd(
    peak: float,
    total_steps: int,
    *,
    warmup_steps: int,
    decay_steps: int,
    start: float = 0.0,
    final: float = 0.0,
    offset: int = 0,
) -> Schedule:
  """Warm-up, stable, decay: up to `peak`, flat, straight down to `final`.

  Args:
    peak: the flat value.
    total_steps: step at which `final` is reached.
    warmup_steps: length of the rise.
    decay_steps: length of the fall, at the end.
    start: value at step 0 where there is a warm-up.
    final: value from `total_steps` on.
    offset: added to the step; 1 counts as V-JEPA 2 does.

  Raises:
    ValueError: rise and fall together are longer than total_steps.

  Source: WSDSchedule of V-JEPA 2, src/utils/schedulers.py; clamped here.
  """
  _check_lengths(total_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)

  def schedule(step: Step):
    xp, step = _namespace(step)
    step = step + offset
    fall = _progress(xp, step, total_steps - decay_steps, total_steps)
    value = peak + (final - peak) * fall
    return _with_warmup(xp, step, value, warmup_steps, start, peak)

  return schedule


def describe(schedule: Schedule, total_steps: int) -> dict[str, float]:
  """Returns the values at the first, the middle and the last step of a run."""
  steps = {"first": 0, "middle": total_steps // 2, "last": max(total_steps - 1, 0)}
  return {name: float(schedule(step)) for name, step in steps.items()}


def check_monotone(name: str, schedule: Schedule, total_steps: int) -> None:
  """Refuses a schedule that turns more than once, such as a cosine past its end.

  Args:
    name: what the schedule drives, for the message.
    schedule: called once with all steps.
    total_steps: how many steps the run has.

  Raises:
    ValueError: the value turns again after it has turned once.
  """
  values = np.broadcast_to(np.asarray(schedule(np.arange(total_steps))), total_steps)
  directions = np.sign(np.diff(values))
  moving = np.flatnonzero(directions)
  turns = moving[1:][np.diff(directions[moving]) != 0]
  if len(turns) > 1:
    raise ValueError(
        f"{name}: the schedule turns at steps {turns[:5].tolist()} of {total_steps}, "
        "but may turn once only (the end of the warm-up); build it with "
        "vjepa_jax.train.schedules, whose ends are clamped"
    )


def _namespace(step: Step):
  """Picks jnp under jit and float64 numpy on the host."""
  if isinstance(step, jax.Array):
    return jnp, step.astype(jnp.float32)
  return np, np.asarray(step, np.float64)


def _progress(xp, step, begin: int, end: int):
  return xp.clip((step - begin) / max(end - begin, 1), 0.0, 1.0)


def _with_warmup(xp, step, value, warmup_steps: int, start: float, peak: float):
  if not warmup_steps:
    return value
  rise = start + (peak - start) * _progress(xp, step, 0, warmup_steps)
  return xp.where(step < warmup_steps, rise, value)


def _check_lengths(total_steps: int, **parts: int) -> None:
  spent = sum(parts.values())
  if total_steps < 1 or min(parts.values(), default=0) < 0:
    raise ValueError(
        f"schedule: total_steps={total_steps}, {parts}: lengths must be positive"
    )
  if spent > total_steps or parts.get("warmup_steps", 0) >= total_steps:
    raise ValueError(
        f"schedule: {parts} do not fit into total_steps={total_steps}; shorten them "
        "or train longer"
    )
