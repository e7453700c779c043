"""What the loop watches beside the step: data, time, memory, compilations, signals."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import copy
import functools
import pathlib
import re
import resource
import signal
import sys
import threading
import time
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np

from vjepa_jax.compiler import chips
from vjepa_jax.train import metrics as metrics_lib
from vjepa_jax.train.checkpoint import DataIterator

# Steps handed to the device before the host waits: enough to hide the host's work,
# few enough that batches do not pile up in device memory.
_IN_FLIGHT = 2
_CLOSING_S = 10.0
_COMPILED = "/jax/core/compile/backend_compile_duration"
# Of a trace: once the steps of this process are compiled.
SOON = -1


class NonFiniteError(FloatingPointError):
  """Too many steps in a row had a non-finite loss or gradient."""


class Feed:
  """The training data: timed, and read one batch ahead by a thread.

  While a step runs, the thread reads the next batch and puts it on the devices. The
  place is that of the batches taken, not of those read.

  Attributes:
    waited: seconds spent in waiting for batches.
  """

  def __init__(
      self,
      iterator: DataIterator,
      put: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]] = dict,
  ):
    """Reads nothing yet.

    Args:
      iterator: endless host batches.
      put: brings a host batch to the devices; called in the thread.
    """
    self._iterator, self._put = iterator, put
    self._reader = concurrent.futures.ThreadPoolExecutor(1, "batches")
    self._ahead: concurrent.futures.Future | None = None
    self._place: Any = None
    self.waited = 0.0

  def peek(self) -> Mapping[str, Any]:
    """Returns the batch that `take` will return next.

    Raises:
      ValueError: the iterator has ended.
    """
    if self._ahead is None:
      self._place = self._iterator.get_state()
      self._ahead = self._reader.submit(self._read)
    begin = time.perf_counter()
    batch, _ = self._ahead.result()
    self.waited += time.perf_counter() - begin
    return batch

  def take(self) -> Mapping[str, Any]:
    """Returns the next batch.

    Raises:
      ValueError: the iterator has ended.
    """
    batch = self.peek()
    self._place = self._ahead.result()[1]
    self._ahead = self._reader.submit(self._read)
    return batch

  def get_state(self) -> Any:
    """Returns the place before the batch that `take` will return next."""
    return self._iterator.get_state() if self._ahead is None else self._place

  def set_state(self, state: Any) -> None:
    """Goes to a place of `get_state`."""
    if self._ahead is not None:
      concurrent.futures.wait([self._ahead])
      self._ahead = None
    self._iterator.set_state(state)

  def close(self) -> None:
    """Reads no further; a batch that is being read is waited for, but not for long."""
    self._reader.shutdown(wait=False, cancel_futures=True)
    if self._ahead is not None and not self._ahead.cancelled():
      concurrent.futures.wait([self._ahead], timeout=_CLOSING_S)

  def _read(self) -> tuple[Mapping[str, Any], Any]:
    batch = next(self._iterator, None)
    if batch is None:
      raise ValueError(
          "training data: the iterator has ended; it must repeat without end, with at "
          "least one whole batch an epoch"
      )
    # A copy: some iterators go on counting in the state that they gave.
    place = copy.deepcopy(self._iterator.get_state())
    return self._put(batch), place


class Window:
  """Joins the metrics of the steps since the last log line.

  Device values stay on the device until they are asked for, so that no step waits
  for the host, but for a bound on the steps in flight.
  """

  def __init__(
      self,
      step: int,
      sums: Mapping[str, Any],
      *,
      skipped_in_row: int,
      max_skipped_in_row: int,
  ):
    """Goes on from what a checkpoint holds, or from nothing.

    Args:
      step: steps taken up to now.
      sums: of `sums` when the checkpoint was made.
      skipped_in_row: non-finite steps up to now.
      max_skipped_in_row: how many of them end the run.
    """
    self._sums: metrics_lib.Sums = {name: tuple(pair) for name, pair in sums.items()}
    self._pending: list[Any] = []
    self._step, self._row, self._limit = step, skipped_in_row, max_skipped_in_row

  def add(self, metrics: Any) -> None:
    """Takes one step's (sum, weight) pairs, on the device."""
    self._pending.append(metrics)
    if len(self._pending) > _IN_FLIGHT:
      jax.block_until_ready(self._pending[-1 - _IN_FLIGHT])

  def sums(self) -> metrics_lib.Sums:
    """Returns the joined pairs; waits for the device.

    Raises:
      NonFiniteError: too many steps in a row were not finite.
    """
    pending, self._pending = self._pending, []
    for metrics in jax.device_get(pending):
      self._sums = metrics_lib.merge(self._sums, metrics)
      self._step += 1
      self._row = self._row + 1 if metrics["nonfinite"][0] else 0
      if self._row >= self._limit:
        raise NonFiniteError(
            f"steps {self._step - self._row + 1} to {self._step}: {self._row} in a row "
            "had no finite loss or gradient"
        )
    return self._sums

  def flush(self) -> dict[str, float]:
    """Returns the means, and begins the next window."""
    values = metrics_lib.means(self.sums())
    self._sums = {}
    return values


class Clock:
  """Turns what passed since the last log line into rates."""

  def __init__(self, feed: Feed, mfu: Callable[[float], float | None] | None = None):
    """Begins to count.

    Args:
      feed: whose waiting is part of the rates.
      mfu: seconds a step -> share of the chips' peak, or None while it is not known.
    """
    self._feed, self._mfu = feed, mfu
    self._all_steps = self._compiles = 0
    self._restart()

  @contextlib.contextmanager
  def step(self) -> Iterator[None]:
    """Around the call of the train step: counts it, and what it compiled."""
    before = compile_count()
    yield
    self._steps += 1
    self._all_steps += 1
    new = compile_count() - before
    self._compiles += new
    self.recompiled |= new > 0 and self._all_steps > 2

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Around what is no training (evaluation, saving): its time does not count."""
    begin = time.perf_counter()
    yield
    self._paused += time.perf_counter() - begin

  def rates(self, batch_size: int, tokens_per_volume: int | None) -> dict[str, float]:
    """Returns the TIMING_KEYS since the last line, and begins the next.

    Time that was paused is no part of them. `mfu` is there where it is known.
    """
    seconds = max(time.perf_counter() - self._begin - self._paused, 1e-9)
    volumes = self._steps * batch_size / seconds
    rates = {"volumes_per_s": volumes}
    if self._steps:
      rates["step_ms"] = 1e3 * seconds / self._steps
      mfu = self._mfu and self._mfu(seconds / self._steps)
      if mfu is not None:
        rates["mfu"] = mfu
    if tokens_per_volume:
      rates["tokens_per_s"] = volumes * tokens_per_volume
    rates["data_wait"] = min((self._feed.waited - self._waited) / seconds, 1.0)
    rates["peak_bytes"] = peak_bytes()
    rates["compiles"] = self._compiles
    self._restart()
    return rates

  def _restart(self) -> None:
    self._begin, self._waited = time.perf_counter(), self._feed.waited
    self._steps, self._paused, self.recompiled = 0, 0.0, False


class Signals:
  """A context in which SIGTERM and SIGINT are remembered; a second one acts.

  Attributes:
    received: number of the signal; 0: none.
  """

  def __init__(self):
    self.received = 0
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "Signals":
    # Python lets only the main thread set handlers; elsewhere signals act as ever.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._remember)
    return self

  def __exit__(self, *unused) -> None:
    self._restore()

  def _remember(self, number: int, unused_frame: Any) -> None:
    self.received = number
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}


class Mfu:
  """The share of the chips' peak that a run makes use of, where the chip is known."""

  def __init__(
      self,
      flops_per_volume: Callable[[], float] | None,
      batch_size: int,
      devices: Sequence[jax.Device],
      chip: chips.Chip | None = None,
  ):
    """Begins to count the model's operations in a thread, where there is a use.

    Args:
      flops_per_volume: traces the model; None: not known.
      batch_size: volumes a step on all devices.
      devices: of the run.
      chip: what they are; None: by their own name, which a CPU has not.
    """
    self._flops: float | None = None
    self._batch_size = batch_size
    chip = chip or chips.of_kind(devices[0].device_kind)
    if chip is None or flops_per_volume is None:
      return
    self._peak = chip.bf16_flops * len(devices)

    def count() -> None:
      try:
        self._flops = flops_per_volume()
      except Exception as error:  # A number for the log is no reason to end a run.
        logging.warning("mfu is not known: %s: %s", type(error).__name__, error)

    # Beside the compilation of the step, which needs no Python.
    threading.Thread(target=count, name="flops", daemon=True).start()

  def __call__(self, seconds_per_step: float) -> float | None:
    """Returns model FLOP/s over peak; None where or while it is not known."""
    if self._flops is None:
      return None
    return self._flops * self._batch_size / seconds_per_step / self._peak


class Profile:
  """Writes one trace of a few steps into workdir/profile, for TensorBoard or xprof."""

  def __init__(
      self, workdir: pathlib.Path, from_step: int | None, steps: int, begin: int = 0
  ):
    """Traces nothing yet.

    Args:
      workdir: local folder.
      from_step: steps taken when the trace begins; SOON; None: no trace.
      steps: length of the trace.
      begin: steps taken when this process begins.
    """
    self._path = str(workdir / "profile")
    # Two steps have compiled all there is.
    self._from = begin + 2 if from_step == SOON else from_step
    self._to = (self._from or 0) + steps
    self._running = False

  def at(self, step: int, done: Any = None) -> None:
    """To be called before each step; begins and ends the trace.

    Args:
      step: steps taken.
      done: arrays that the trace waits for before it begins or ends.
    """
    if step == self._from:
      jax.block_until_ready(done)
      options = jax.profiler.ProfileOptions()
      # Following Python's calls in all threads can crash one that is just ending.
      options.python_tracer_level = 0
      jax.profiler.start_trace(self._path, profiler_options=options)
      self._running = True
    elif self._running and step >= self._to:
      jax.block_until_ready(done)
      self.close()

  def close(self) -> None:
    """Ends the trace if it is running."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()


def profile_span(text: str) -> tuple[int, int]:
  """Reads which steps to trace: `A:B` those after A up to B, `N` so many, soon.

  Returns:
    (from_step, steps) of `Profile`.

  Raises:
    ValueError: it is neither.
  """
  found = re.fullmatch(r"(?:(\d+):)?(\d+)", text.strip())
  first = SOON if found is None or found[1] is None else int(found[1])
  steps = int(found[2]) - max(first, 0) if found else 0
  if steps < 1:
    raise ValueError(
        f"{text!r}: wanted A:B with A < B (the steps after A up to B), or N (so many "
        "steps, once all is compiled)"
    )
  return first, steps


def peak_bytes() -> int:
  """Returns the fullest local device's peak; on a CPU the peak of the process."""
  stats = [device.memory_stats() for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
  if peaks:
    return max(peaks)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def stop_alone(unused_step: int, received: int) -> int:
  """Says by which signal a run of one process stops: the one that it got."""
  return received


def agree(flag: bool) -> bool:
  """Says whether the flag is up on any process; all of them must ask together."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def largest(value: float) -> float:
  """Returns the largest value of all processes; all of them must ask together."""
  if jax.process_count() == 1:
    return value
  return float(np.max(multihost_utils.process_allgather(np.float32(value))))


def compile_count() -> int:
  """Returns how many programs this process has compiled since the first call."""
  return _compile_counter()[0]


@functools.cache
def _compile_counter() -> list[int]:
  count = [0]

  def on_event(event: str, unused_seconds: float, **unused_details) -> None:
    count[0] += event == _COMPILED

  jax.monitoring.register_event_duration_secs_listener(on_event)
  return count
