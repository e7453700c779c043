"""Processes that read a file when asked, for threads that wait for them.

A worker is a plain `python -c` that imports the readers and nothing of training: the
caller's main module, its flags and jax are not imported again, so that it starts in
a second or two and works from a notebook. It has one file at a time: a file that
kills two workers in turn is named and quarantined, and one that takes too long is
given up. The order of results is the caller's, never a worker's.
"""

from collections.abc import Callable
import contextlib
from multiprocessing import connection
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from typing import Any

import numpy as np

from vjepa_jax.data.manifest import Row
from vjepa_jax.data.record import DataError, ReadError, Record

# A worker that has not started by then never will.
_START_S = 120.0
_START = "import sys; sys.path[:] = {!r}; from {} import serve; serve({}, {})"
# One folder for the counts of all processes; a worker's come back with its answers.
_SHARED_COUNTS = "VJEPA_JAX_STORAGE_COUNTS"


class Pool:
  """Processes that turn rows into canvases, one row each at a time.

  Args:
    transform: row -> Record; picklable.
    count: processes.
    timeout_s: seconds allowed for one file.
    note_retries: called with what a worker's storage counted.
  """

  def __init__(
      self,
      transform: Callable[[Row], Record],
      count: int,
      *,
      timeout_s: float,
      note_retries: Callable[[dict[str, int]], None] = lambda counts: None,
  ):
    self.count = count
    self._transform = transform
    self._timeout_s = timeout_s
    self._note_retries = note_retries
    self._lock = threading.Lock()
    self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
    for _ in range(count):
      self._idle.put(None)  # started on first use
    self._live: set[_Worker] = set()
    self._closed = False

  def read(self, row: Row) -> Record:
    """Reads one row in a worker; waits for one to be free.

    Raises:
      ReadError: as of the transform; decoder_died, where two workers in turn died of
        this file; timed_out.
      DataError: if no worker can be started, or the pool is closed.
    """
    try:
      return self._read(row)
    except _Died:
      # Whoever killed it, the file gets a second worker, in the same place.
      try:
        return self._read(row)
      except _Died as error:
        raise ReadError(
            row.path, "decoder_died", f"two workers in turn ended: {error}"
        ) from error

  def pids(self) -> list[int]:
    """Returns the processes that are alive."""
    with self._lock:
      return sorted(worker.process.pid for worker in self._live)

  def close(self) -> None:
    """Ends all workers; the pool reads no more."""
    with self._lock:
      self._closed = True
      live = set(self._live)
    for worker in live:
      worker.end()
    # A pipe is closed by whoever reads from it, who sees the end now: closed twice, or
    # under a reader, its number may be another file's already.
    idle = []
    with contextlib.suppress(queue.Empty):
      while True:
        idle.append(self._idle.get_nowait())
    for worker in idle:
      if worker:
        self._end(worker)
      self._idle.put(None)  # Who waits is told that it is closed.

  def _read(self, row: Row) -> Record:
    worker = self._idle.get()
    try:
      worker = worker or self._start()
      found, counts = worker.read(row, self._timeout_s)
    except BaseException as error:
      # Not even after Ctrl-C may it answer the next row with this one's voxels.
      if worker:
        self._end(worker)
      worker = None
      if not isinstance(error, TimeoutError):
        raise
      raise ReadError(
          row.path, "timed_out", f"not read within {self._timeout_s:g} s"
      ) from error
    finally:
      if worker and self._closed:
        self._end(worker)
        worker = None
      self._idle.put(worker)
    self._note_retries(counts)
    if isinstance(found, Exception):
      raise found
    return found

  def _start(self) -> "_Worker":
    closed = DataError("the pool of data workers is closed")
    if self._closed:
      raise closed
    worker = _Worker(self._transform)
    with self._lock:
      if not self._closed:
        self._live.add(worker)
        return worker
    worker.close()  # It was closed while the worker started.
    raise closed

  def _end(self, worker: "_Worker"):
    with self._lock:
      self._live.discard(worker)
    worker.close()


class _Died(Exception):
  """A worker ended while it read."""


class _Worker:
  """One process, a pipe for words and an unnamed file for voxels."""

  def __init__(self, transform: Callable[[Row], Record]):
    # In memory where there is such a place, and without a name: nothing is left
    # behind, however this process ends.
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    self._file = tempfile.TemporaryFile(dir=folder)
    self._pipe, far = connection.Pipe()
    with far:
      code = _START.format(sys.path, __name__, far.fileno(), self._file.fileno())
      self.process = subprocess.Popen(
          [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=2,
          pass_fds=(far.fileno(), self._file.fileno()),
          env={k: v for k, v in os.environ.items() if k != _SHARED_COUNTS},
      )
    try:
      self._ask(transform, _START_S)
    except (_Died, TimeoutError) as error:
      self.close()
      raise DataError(
          f"a data worker did not start ({error or 'no answer'}); look at what it "
          "wrote above, or use workers=0"
      ) from error

  def read(self, row: Row, timeout_s: float) -> tuple[Record | Exception, dict]:
    """Returns what was read, or why not, and the retries it took."""
    found, counts = self._ask(row, timeout_s)
    if isinstance(found, dict):
      volume = np.empty(found.pop("shape"), found.pop("dtype"))
      view, start = memoryview(volume.reshape(-1).view(np.uint8)), 0
      while start < len(view):
        start += os.preadv(self._file.fileno(), [view[start:]], start)
      found = Record(volume, **found)
    return found, counts

  def end(self) -> None:
    """Ends the process, if it still lives; any thread may."""
    with contextlib.suppress(ProcessLookupError):
      self.process.kill()
    self.process.wait()

  def close(self) -> None:
    """Ends the process and closes the pipe: for the thread that has the worker."""
    self.end()
    self._pipe.close()
    self._file.close()

  def _ask(self, what: Any, timeout_s: float) -> Any:
    try:
      self._pipe.send(what)
      # The far end is open in the worker alone: its death ends the wait at once.
      if not self._pipe.poll(timeout_s):
        raise TimeoutError
      return self._pipe.recv()
    except TimeoutError:
      raise
    except (EOFError, OSError) as error:
      self._pipe.close()  # Else one that hangs on its way out would be waited for.
      code = self.process.wait(_START_S)
      how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
      raise _Died(how) from error


def serve(pipe_number: int, file_number: int) -> None:
  """Reads rows until the other end closes; what a worker process runs."""
  import cv2

  from vjepa_jax.data import memory, storage

  memory.keep_large_blocks()
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle.
  cv2.setNumThreads(1)
  with connection.Connection(pipe_number) as pipe, contextlib.suppress(EOFError):
    transform = pipe.recv()
    pipe.send("ready")
    while True:
      row = pipe.recv()
      storage.reset_counters()
      try:
        found: Any = _store(transform(row), file_number)
      except (ReadError, DataError) as error:
        found = error
      except Exception as error:  # An operation's fault is not the file's.
        traceback.print_exc()
        found = DataError(
            f"{row.id}: {type(error).__name__}: {error}; a data worker wrote above "
            "where, and nothing was quarantined"
        )
      pipe.send((found, storage.counters()))


def _store(record: Record, file_number: int) -> dict[str, Any] | Record:
  """Writes the voxels into the common file; returns the rest."""
  volume = np.ascontiguousarray(record.volume)
  view, start = memoryview(volume.reshape(-1).view(np.uint8)), 0
  try:
    while start < len(view):
      start += os.pwrite(file_number, view[start:], start)
  except OSError:  # Containers often have 64 MB there: the slow way, by the pipe.
    os.ftruncate(file_number, 0)
    return record
  return {
      "shape": volume.shape, "dtype": volume.dtype.name, "spacing": record.spacing,
      "source": record.source, "subject": record.subject, "mean": record.mean,
      "std": record.std, "meta": dict(record.meta), "label": record.label,
  }
