"""What the loop watches beside the step: data, time, memory, compilations, signals."""

from collections.abc import Callable, Iterator, Mapping
import concurrent.futures
import contextlib
import copy
import functools
import pathlib
import resource
import signal
import sys
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from vjepa_jax.train import metrics as metrics_lib
from vjepa_jax.train.checkpoint import DataIterator

# Steps handed to the device before the host waits: enough to hide the host's work,
# few enough that batches do not pile up in device memory.
_IN_FLIGHT = 2
_CLOSING_S = 10.0
_COMPILED = "/jax/core/compile/backend_compile_duration"


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

  def __init__(self, feed: Feed):
    self._feed = feed
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
    self.recompiled = new > 0 and self._all_steps > 2

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Around what is no training (evaluation, saving): its time does not count."""
    begin = time.perf_counter()
    yield
    self._paused += time.perf_counter() - begin

  def rates(self, batch_size: int, tokens_per_volume: int | None) -> dict[str, float]:
    """Returns the TIMING_KEYS since the last line, and begins the next."""
    seconds = max(time.perf_counter() - self._begin - self._paused, 1e-9)
    volumes = self._steps * batch_size / seconds
    rates = {"volumes_per_s": volumes}
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


class Profile:
  """Writes one trace of a few steps into workdir/profile."""

  def __init__(self, workdir: pathlib.Path, from_step: int | None, steps: int):
    self._path = str(workdir / "profile")
    self._from, self._to = from_step, (from_step or 0) + steps
    self._running = False

  def at(self, step: int) -> None:
    """To be called before each step; begins and ends the trace."""
    if step == self._from:
      jax.profiler.start_trace(self._path)
      self._running = True
    elif self._running and step >= self._to:
      self.close()

  def close(self) -> None:
    """Ends the trace if it is running."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False


def peak_bytes() -> int:
  """Returns the fullest local device's peak; on a CPU the peak of the process."""
  stats = [device.memory_stats() for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
  if peaks:
    return max(peaks)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def agree(flag: bool) -> bool:
  """Says whether the flag is up on any process; all of them must ask together."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


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
