"""The files of a run: in a local folder, or in a bucket (`gs://`).

A bucket has no append, may take its time, and may be out of reach for minutes. So
a run writes into a local folder as ever, and a thread copies what has changed.
"""

from collections.abc import Callable, Sequence
import logging
import math
import os
import pathlib
import random
import shutil
import tempfile
import threading
import time
from typing import Any, TypeVar

from etils import epath
import fsspec.config

# Seconds that a bucket may stay out of reach; data workers know the same variable.
DEADLINE = "VJEPA_JAX_STORAGE_DEADLINE_S"
_DEADLINE_S = 300.0
# Seconds between two copies of a file that grows, and how much longer copying may
# make them: a long metrics.jsonl is written whole each time.
_PAUSE_S = 5.0
_PAUSE_PER_COPY = 20.0
# Synchronised by its own client; half of what is being written.
_LEFT = ("wandb",)
_PARTIAL = (".tmp", ".partial")

_T = TypeVar("_T")


class WorkdirError(OSError):
  """A file of the run could not be written or read before the deadline."""


def open_path(path: str | os.PathLike[str]) -> epath.Path:
  """Returns a path that works for local files and `gs://`."""
  if is_remote(path):
    # gcsfs otherwise asks by gRPC for the bucket's kind first: 58 s without it.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # Who looks at a run is another process than the run: a remembered listing would
    # never show its new checkpoints.
    options = fsspec.config.conf.setdefault("gcs", {})
    options.setdefault("use_listings_cache", False)
    # It prints a traceback a try; here trouble is told once, in a line.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  return epath.Path(path)


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Says whether a path is in a bucket."""
  return "://" in str(path)


def deadline_s() -> float:
  """Returns the seconds that a bucket may stay out of reach.

  They come from the environment variable VJEPA_JAX_STORAGE_DEADLINE_S.
  """
  return float(os.environ.get(DEADLINE, _DEADLINE_S))


def read_bytes(path: str | os.PathLike[str]) -> bytes | None:
  """Returns the content of a file; None where there is none.

  Raises:
    WorkdirError: a bucket refuses, or is out of reach for longer than the deadline.
  """
  path = open_path(path)

  def read() -> bytes | None:
    try:
      return path.read_bytes()
    except FileNotFoundError:
      return None

  return _insist(read, path) if is_remote(path) else read()


def write_bytes(
    path: str | os.PathLike[str],
    data: bytes,
    *,
    on_trouble: Callable[[Exception], None] | None = None,
) -> None:
  """Writes a whole file; a reader sees the old content or the new.

  Args:
    path: local or `gs://`; its folder is made where absent.
    data: the content.
    on_trouble: gets each error of a bucket that is tried again.

  Raises:
    WorkdirError: a bucket refuses, or is out of reach for longer than the deadline.
    OSError: a local file cannot be written.
  """
  path = open_path(path)
  if is_remote(path):
    _insist(lambda: path.write_bytes(data), path, on_trouble)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(data)
  os.replace(partial, path)


def watched(act: Callable[[], _T], folder: str | os.PathLike[str]) -> _T:
  """Runs what may wait for a bucket for ever, and gives up once that is lost.

  Args:
    act: what to do; it goes on in a thread when this gives up.
    folder: in the bucket; looked at while `act` runs. If local, `act` just runs.

  Raises:
    WorkdirError: the bucket gave no sign of life for longer than the deadline.
  """
  if not is_remote(folder):
    return act()
  outcome: dict[str, Any] = {}

  def run() -> None:
    try:
      outcome["value"] = act()
    except BaseException as error:
      outcome["error"] = error

  # No pool: the interpreter would wait for its threads before it ends.
  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  path, alive, reason = open_path(folder), time.monotonic(), None
  while True:
    thread.join(_PAUSE_S)
    if not thread.is_alive():
      break
    try:
      _look_at(path)
      alive = time.monotonic()
    except Exception as error:
      reason = error
    if time.monotonic() - alive > deadline_s():
      raise WorkdirError(_given_up(path, time.monotonic() - alive, reason)) from reason
  if "error" in outcome:
    raise outcome["error"]
  return outcome["value"]


class Files:
  """Where a run writes its files: its workdir, or a local copy of one in a bucket.

  Attributes:
    folder: local; all that is written below it reaches the workdir, but for the
      folder `wandb`.
  """

  def __init__(
      self,
      workdir: str | os.PathLike[str],
      *,
      fetch: Sequence[str] = (),
      say: Callable[[str], None] = print,
      pause_s: float = _PAUSE_S,
  ):
    """Makes the folder; for a bucket, starts the thread that copies.

    Args:
      workdir: local, or `gs://bucket/folder`.
      fetch: files of the workdir that the run goes on with.
      say: gets a line when the bucket is out of reach, and when it is back.
      pause_s: seconds between two copies of a file that changes.

    Raises:
      WorkdirError: the bucket refuses, or is out of reach.
    """
    self._target = open_path(workdir) if is_remote(workdir) else None
    if self._target is None:
      self.folder = pathlib.Path(workdir)
      self.folder.mkdir(parents=True, exist_ok=True)
      return
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix="vjepa_jax_"))
    self._say, self._pause_s = say, pause_s
    self._copied: dict[str, tuple[int, int]] = {}
    for name in fetch:
      data = read_bytes(self._target / name)
      if data is not None:
        (self.folder / name).write_bytes(data)
        # Only one process of a run writes it: the others must not put it back.
        self._copied[name] = _state(self.folder / name)
    self._changed = threading.Condition()
    self._asked = self._done = 0
    self._closing = False
    self._busy_since: float | None = None
    self._trouble: Exception | None = None
    self._error: WorkdirError | None = None
    threading.Thread(target=self._copy_for_ever, daemon=True).start()

  def check(self) -> None:
    """Raises what keeps the files from the bucket, once it lasts too long.

    Raises:
      WorkdirError: the bucket refuses, or is out of reach for longer than the
        deadline.
    """
    if self._target is None:
      return
    if self._error is not None:
      raise self._error
    since = self._busy_since
    if since is not None and time.monotonic() - since > deadline_s():
      seconds = time.monotonic() - since
      self._error = WorkdirError(_given_up(self._target, seconds, self._trouble))
      raise self._error

  def flush(self, *, patience_s: float = math.inf) -> bool:
    """Returns True once all that was written is in the workdir.

    Args:
      patience_s: how long the bucket may give trouble before this returns False.

    Raises:
      WorkdirError: as `check`.
    """
    if self._target is None:
      return True
    begin = time.monotonic()
    with self._changed:
      self._asked += 1
      mine = self._asked
      self._changed.notify_all()
      while self._done < mine:
        self.check()
        if self._trouble and time.monotonic() - begin > patience_s:
          return False
        self._changed.wait(timeout=0.5)
    return True

  def close(self) -> None:
    """Flushes, unless the bucket is known to be lost, and ends the copying.

    Raises:
      WorkdirError: as `check`.
    """
    if self._target is None:
      return
    try:
      if self._error is None:
        self.flush()
    finally:
      with self._changed:
        self._closing = True
        self._changed.notify_all()
      shutil.rmtree(self.folder, ignore_errors=True)

  def _copy_for_ever(self) -> None:
    pause = self._pause_s
    while True:
      with self._changed:
        self._changed.wait_for(
            lambda: self._closing or self._asked > self._done, timeout=pause
        )
        if self._closing:
          return
        asked = self._asked
      begin = time.monotonic()
      try:
        self._copy_changed()
      except WorkdirError as error:
        self._error = error
        return
      pause = max(self._pause_s, _PAUSE_PER_COPY * (time.monotonic() - begin))
      with self._changed:
        self._done = asked
        self._changed.notify_all()

  def _copy_changed(self) -> None:
    """Copies what is not in the bucket as it is here."""
    for path in sorted(self.folder.rglob("*")):
      name = path.relative_to(self.folder).as_posix()
      if name.split("/")[0] in _LEFT or name.endswith(_PARTIAL):
        continue
      try:
        state = _state(path)
        if self._copied.get(name) == state or not path.is_file():
          continue
        data = path.read_bytes()
      except FileNotFoundError:  # Replaced or removed meanwhile.
        continue
      self._busy_since = time.monotonic()
      write_bytes(self._target / name, data, on_trouble=self._on_trouble)
      self._copied[name] = state
      if self._trouble is not None:
        seconds = time.monotonic() - self._busy_since
        self._say(f"{self._target}: written again after {seconds:.0f} s")
      self._busy_since = self._trouble = None

  def _on_trouble(self, error: Exception) -> None:
    if self._trouble is None:
      self._say(
          f"{self._target}: not written ({_reason(error)}); trying again for "
          f"{deadline_s():.0f} s, training goes on"
      )
    self._trouble = error


def _state(path: pathlib.Path) -> tuple[int, int]:
  """Returns what changes when a file is written."""
  found = path.stat()
  return found.st_size, found.st_mtime_ns


def _look_at(path: epath.Path) -> None:
  """Raises where a bucket does not answer; `exists` would say that nothing is there."""
  try:
    next(path.iterdir(), None)
  except FileNotFoundError:
    pass


def _insist(
    act: Callable[[], _T],
    path: epath.Path,
    on_trouble: Callable[[Exception], None] | None = None,
) -> _T:
  """Repeats what a bucket cannot do for now, with growing pauses."""
  begin, tries = time.monotonic(), 0
  while True:
    try:
      return act()
    except Exception as error:
      if _is_final(error):
        raise WorkdirError(f"{path}: {_reason(error)}") from error
      if on_trouble:
        on_trouble(error)
      pause = random.uniform(0.5, 1.0) * min(2.0**tries, 30.0)
      waited = time.monotonic() - begin
      if waited + pause > deadline_s():
        raise WorkdirError(_given_up(path, waited, error)) from error
      time.sleep(pause)
      tries += 1


def _is_final(error: Exception) -> bool:
  """Says whether no later try could help: no such bucket, no rights."""
  code = str(getattr(error, "code", "") or getattr(error, "status", ""))
  if isinstance(error, (FileNotFoundError, PermissionError)):
    return True
  # How gcsfs tells 403 and 400.
  told = str(error).startswith(("Forbidden", "Bad Request"))
  return told or code in ("400", "401", "403", "404")


def _given_up(path: epath.Path, seconds: float, error: Exception | None) -> str:
  return (
      f"{path}: out of reach for {seconds:.0f} s "
      f"({_reason(error) if error else 'no answer'}); the same command goes on from "
      f"the last checkpoint ({DEADLINE} is how long a run waits)"
  )


def _reason(error: Exception) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
