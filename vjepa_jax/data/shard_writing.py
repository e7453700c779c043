"""Writes the canvases of a manifest's rows as shards, once, whatever happens.

The rows are dealt out to shards by their number and the size of a canvas, so that
the bytes of a prepared folder depend on the rows and the options alone: not on how
many workers wrote it, nor on how often they were killed. A shard is written under
another name, read back and checked, and then named; one that is there and whole is
not written again.
"""

import base64
import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from typing import Any, Protocol

import cv2
import google_crc32c
import numpy as np

from vjepa_jax.data import array_records, ledger, shards, storage
from vjepa_jax.data import pool as pool_lib
from vjepa_jax.data.manifest import Row
from vjepa_jax.data.record import DataError, ReadError, Record

_NAME = "canvases"
_QUARANTINE, _REPORT = "quarantine.tsv", "report.json"
_UNFINISHED = "unfinished"
_PLAN = f"{_UNFINISHED}/plan.json"
_SHARD_BYTES = 256 << 20
PERCENTILES = (0.5, 1.0, 50.0, 99.0, 99.5)
Notes = Mapping[str, Any]


class Transform(Protocol):
  """Row -> canvas; picklable by name, and `look` is shown the recording as read."""

  def __call__(
      self, row: Row, look: Callable[[Record], None] | None = None
  ) -> Record: ...


@dataclasses.dataclass(frozen=True)
class Spec:
  """The rows of one shard.

  Attributes:
    split: name of the split.
    number: of the shard in its split.
    count: shards of the split.
    rows: in their order.
  """

  split: str
  number: int
  count: int
  rows: tuple[Row, ...]

  @property
  def name(self) -> str:
    """The file, by tensorflow-datasets' rule."""
    return (
        f"{_NAME}-{_name_of(self.split)}.array_record-{self.number:05d}-of-"
        f"{self.count:05d}"
    )

  @property
  def outcome(self) -> str:
    """The file, while unfinished, with what became of each row."""
    return f"{_UNFINISHED}/{_name_of(self.split)}-{self.number:05d}.json"


@dataclasses.dataclass(frozen=True)
class Task:
  """One shard to write.

  Attributes:
    path: the folder, local or `gs://`.
    spec: its rows.
    transform: row -> canvas.
    options: what the transform depends on; their hash is kept with each canvas.
  """

  path: str
  spec: Spec
  transform: Transform
  options: Mapping[str, Any]


Runner = Callable[[Sequence[Task]], None]


@dataclasses.dataclass(frozen=True)
class Crew:
  """Who reads the files.

  Attributes:
    workers: processes, which a bad decoder may kill without harm; 0: threads of
      this process.
    threads: for no workers.
    timeout_s: that a worker may take for one file.
    note_retries: called with what a worker's storage counted.
  """

  workers: int = 0
  threads: int = 1
  timeout_s: float = 600.0
  note_retries: Callable[[dict[str, int]], None] = lambda counts: None


def prepare(
    path: str,
    parts: Mapping[str, Sequence[Row]],
    transform: Transform,
    *,
    options: Mapping[str, Any],
    crew: Crew = Crew(),  # noqa: B008
    judge: Callable[[Notes], None] = lambda notes: None,
    max_bad: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = print,
    runner: Runner | None = None,
) -> dict[str, Any]:
  """Writes the canvases of all rows, or goes on where it was cut short.

  Several calls for one folder on one machine take turns; on several machines they
  write the same bytes.

  Args:
    path: folder of `shards.locate`, local or `gs://`.
    parts: {split: rows}.
    transform: row -> canvas.
    options: as given to `locate`.
    crew: who reads the files.
    judge: called with the notes, of this writing before they are stored: what it
      raises leaves the folder unfinished.
    max_bad: above this many bad files `judge` is called with the notes so far.
    progress: called with (files done, files in all).
    say: gets a line where there is something to say.
    runner: writes the shards of these tasks elsewhere, such as `beam.Runner`.

  Returns:
    The notes; see `shards.read_notes`.

  Raises:
    DataError: if a split has no good file, a shard cannot be written or read back,
      or the bucket cannot be reached. The same call goes on from there.
  """
  _check_names(parts)
  notes = shards.read_notes(path)
  if notes is None or _leftovers(path):
    scratch = _scratch(path)
    with _alone(scratch, say):
      notes = shards.read_notes(path)  # Another writer may have ended meanwhile.
      if notes is None:
        notes = _write_all(
            path, parts, transform, options, crew, judge, max_bad, progress, runner
        )
        judge = lambda notes: None
      _sweep(path)
    if scratch != path:
      shutil.rmtree(scratch, ignore_errors=True)
  judge(notes)
  return notes


def run_local(tasks: Sequence[Task], crew: Crew) -> None:
  """Writes the shards of these tasks, of one transform, on this machine.

  Raises:
    DataError: as `prepare`.
  """
  if tasks:
    with _Reading(tasks[0].transform, tasks[0].options, crew) as reading:
      _run(tasks, reading, lambda: None, lambda outcome: None)


def _run(
    tasks: Sequence[Task],
    reading: "_Reading",
    read: Callable[[], None],
    done: Callable[[dict[str, Any]], None],
) -> None:
  """Writes shards side by side; `read` is told of each row, `done` of each shard."""
  # One that writes or checks keeps no reader waiting.
  writers = max(min(len(tasks), 1 + reading.size // 2), 1)
  ahead = 1 + -(-reading.size // writers)
  with concurrent.futures.ThreadPoolExecutor(writers) as executor:
    futures = [executor.submit(_write, task, reading, ahead, read) for task in tasks]
    try:
      for future in concurrent.futures.as_completed(futures):
        done(future.result())
    except BaseException:
      reading.stop()
      executor.shutdown(cancel_futures=True)
      raise


class _Reading:
  """Reads rows for the threads that write, in processes or here."""

  def __init__(self, transform: Transform, options: Mapping[str, Any], crew: Crew):
    self.size = crew.workers or crew.threads
    self._making = _Making(transform, shards.digest(options))
    self._pool = crew.workers and pool_lib.Pool(
        self._making, crew.workers, timeout_s=crew.timeout_s,
        note_retries=crew.note_retries,
    )
    self._executor = concurrent.futures.ThreadPoolExecutor(self.size)
    self._stopped = threading.Event()
    self._gate = threading.Condition()
    self._reading = 0
    self._alone = False

  def __enter__(self) -> "_Reading":
    return self

  def __exit__(self, *_):
    self.stop()

  def stop(self) -> None:
    self._stopped.set()
    if self._pool:
      self._pool.close()
    self._executor.shutdown(cancel_futures=True)

  def in_order(
      self, rows: Sequence[Row], ahead: int
  ) -> Iterator[tuple[Row, Record | ReadError]]:
    """Yields each row with its canvas, or why it has none; reads some ahead."""

    def read(row: Row) -> Record | ReadError:
      try:
        return self(row)
      except ReadError as error:
        return error

    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    later = iter(rows)
    for row in rows:
      for next_row in itertools.islice(later, ahead - len(waiting)):
        waiting.append(self._executor.submit(read, next_row))
      yield row, waiting.popleft().result()

  def __call__(self, row: Row) -> Record:
    """Returns a row's canvas.

    Raises:
      ReadError: if the file is bad.
      DataError: if it is not the file's fault, or others have failed.
    """
    if self._stopped.is_set():
      raise DataError("stopped")
    try:
      return self._read(row)
    except ReadError as error:
      ledger.stop_if_blameless(error)
      raise

  def _read(self, row: Row) -> Record:
    if not self._pool:
      return self._making(row)
    try:
      with self._among_others():
        return self._pool.read(row)
    except ReadError as error:
      # So a kernel out of memory ends a process, and whoever else was reading may
      # have been the one too many.
      if error.reason != "decoder_died" or "SIGKILL" not in error.detail:
        raise
    with self._by_itself():
      return self._pool.read(row)

  @contextlib.contextmanager
  def _among_others(self) -> Iterator[None]:
    with self._gate:
      self._gate.wait_for(lambda: not self._alone)
      self._reading += 1
    try:
      yield
    finally:
      with self._gate:
        self._reading -= 1
        self._gate.notify_all()

  @contextlib.contextmanager
  def _by_itself(self) -> Iterator[None]:
    with self._gate:
      self._gate.wait_for(lambda: not self._alone)
      self._alone = True
      self._gate.wait_for(lambda: not self._reading)
    try:
      yield
    finally:
      with self._gate:
        self._alone = False
        self._gate.notify_all()


@dataclasses.dataclass(frozen=True)
class _Making:
  """Row -> canvas with all that is kept beside it, in `meta`."""

  transform: Transform
  digest: str

  def __call__(self, row: Row) -> Record:
    seen: list[dict[str, Any]] = []
    try:
      canvas = self.transform(row, look=lambda raw: seen.append(raw_facts(raw)))
      known = {
          "raw": seen[0] if seen else {}, "provenance": _provenance(row.path),
          "transform": self.digest,
      }
    except (ReadError, DataError):
      raise
    except MemoryError as error:
      raise ReadError(row.path, "too_large", "no memory to read it") from error
    except Exception as error:  # The rest of thousands of files goes on.
      raise ReadError(
          row.path, "decode_failed", f"unexpected {type(error).__name__}: {error}",
          "report it; its reader met what it did not expect",
      ) from error
    if canvas.volume.nbytes > array_records.MAX_RECORD_BYTES:
      raise ReadError(
          row.path, "too_large",
          f"a canvas of {canvas.volume.nbytes:,} bytes; a record holds up to 2 GiB",
          "use a smaller canvas, or fewer time points",
      )
    return dataclasses.replace(
        canvas, volume=np.ascontiguousarray(canvas.volume),
        meta={**canvas.meta, **known},
    )


class _Count:
  """Counts rows read and files bad, and tells the caller."""

  def __init__(
      self,
      before: Sequence[Notes],
      total: int,
      judge: Callable[[Notes], None],
      max_bad: int | None,
      progress: Callable[[int, int], None] | None,
      options: Mapping[str, Any],
  ):
    self._outcomes = list(before)
    self._done = sum(len(outcome["rows"]) for outcome in before)
    self._total = total
    self._judge = judge
    self._max_bad = total if max_bad is None else max_bad
    self._progress = progress or (lambda done, total: None)
    self._options = options
    self._lock = threading.Lock()
    if self._done:
      self._progress(self._done, total)

  def read(self) -> None:
    with self._lock:
      self._done += 1
      self._progress(self._done, self._total)

  def done(self, outcome: dict[str, Any]) -> None:
    self._outcomes.append(outcome)
    if sum("reason" in r for o in self._outcomes for r in o["rows"]) > self._max_bad:
      self._judge(_notes(self._outcomes, self._options))


def _write_all(
    path, parts, transform, options, crew, judge, max_bad, progress, runner
) -> dict[str, Any]:
  with _Reading(transform, options, crew) as reading:
    specs = _plan(path, parts, reading)
    whole = _outcomes(path, specs)
    tasks = [Task(path, s, transform, options) for s in specs if s.name not in whole]
    if runner:
      runner(tasks)
    else:
      total = sum(len(spec.rows) for spec in specs)
      count = _Count(list(whole.values()), total, judge, max_bad, progress, options)
      _run(tasks, reading, count.read, count.done)
  return _finish(path, specs, parts, options, judge)


def _write(
    task: Task, reading: _Reading, ahead: int, read: Callable[[], None]
) -> dict[str, Any]:
  """Writes a shard, checks it, names it, and notes what became of its rows."""
  spec, rows = task.spec, []
  sizes: list[tuple[int, int, int]] = []  # head, crc, record

  def records() -> Iterator[bytes]:
    for row, canvas in reading.in_order(spec.rows, ahead):
      read()
      if isinstance(canvas, ReadError):
        rows.append({
            "id": row.id, "reason": canvas.reason,
            "detail": " ".join(canvas.detail.split()),
        })
        continue
      head = _head(canvas)
      record = b"".join((head, memoryview(canvas.volume).cast("B")))
      sizes.append((len(head), google_crc32c.value(record), len(record)))
      rows.append({"id": row.id, "facts": ledger.facts_of(canvas)})
      yield record

  scratch = _scratch(task.path)
  os.makedirs(scratch, exist_ok=True)
  partial = os.path.join(scratch, f".{spec.name}.{_owner()}.part")
  try:
    array_records.write(partial, records())
    places = array_records.find(partial, [s[0] for s in sizes], [s[1] for s in sizes])
    outcome = {
        "rows": rows, "places": places, "crc32c": _crc_of(partial),
        "file_bytes": os.path.getsize(partial),
        "record_bytes": sum(s[2] for s in sizes),
    }
    _name(partial, storage.join(task.path, spec.name))
    storage.write_bytes(storage.join(task.path, spec.outcome), shards.to_json(outcome))
  except DataError:
    raise
  except (OSError, ValueError, RuntimeError, ReadError) as error:
    raise DataError(f"{task.path}/{spec.name}: cannot be written: {error}") from error
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.remove(partial)
  return outcome


def _name(partial: str, target: str) -> None:
  """Gives a whole file its name: there it is never seen in part."""
  if storage.is_remote(target):
    storage.upload(partial, target)
    return
  file = os.open(partial, os.O_RDONLY)
  try:
    os.fsync(file)
  finally:
    os.close(file)
  os.replace(partial, target)


def _head(canvas: Record) -> bytes:
  facts = {
      "shape": canvas.volume.shape, "dtype": canvas.volume.dtype.name,
      "mean": canvas.mean, "std": canvas.std, "source": canvas.source,
      "subject": canvas.subject, "meta": dict(canvas.meta),
  }
  features = {"facts": shards.to_json(facts), "spacing": canvas.spacing}
  return array_records.encode(features, canvas.volume)


def raw_facts(record: Record) -> dict[str, Any]:
  """Returns mean, std and percentiles of the voxels as recorded.

  The percentiles (0.5, 1, 50, 99, 99.5) are voxels' own values: the smallest that
  at least this share does not exceed; of float32, among a million voxels at most.
  """
  volume = np.ascontiguousarray(record.volume)
  shares = np.array(PERCENTILES) / 100
  if volume.dtype == np.float32:
    step = max(1, volume.size // 1_000_000)
    values = np.quantile(volume.reshape(-1)[::step], shares, method="inverted_cdf")
  else:
    counts, lowest = _histogram(volume)
    values = np.searchsorted(np.cumsum(counts), shares * volume.size) + lowest
  return {
      "mean": record.mean, "std": record.std, "shape": volume.shape,
      "dtype": volume.dtype.name,
      "percentiles": {
          f"{p:g}": float(v) for p, v in zip(PERCENTILES, values, strict=True)
      },
  }


def _histogram(volume: np.ndarray) -> tuple[np.ndarray, int]:
  """Returns the counts of each value of whole numbers, and the first value."""
  bins, lowest = 1 << 8 * volume.itemsize, 0
  if volume.dtype == np.int16:
    volume, lowest = volume.view(np.uint16) ^ np.uint16(1 << 15), -(1 << 15)
  counts = np.zeros(bins)
  # A part at a time: OpenCV counts in float32, exact to 2^24.
  for part in np.array_split(volume.reshape(-1), -(-volume.size >> 23)):
    counts += cv2.calcHist([part], [0], None, [bins], [0, bins]).ravel()
  return counts, lowest


def _provenance(path: str) -> dict[str, Any]:
  """Returns what tells whether a recording is still the one that was read."""
  if storage.is_remote(path):
    return {"stamp": storage.stamp(path)}
  names = storage.list_files(path) if storage.is_folder(path) else [path]
  total = hashlib.sha256()
  for name in names:
    with open(name, "rb") as file:
      found = hashlib.file_digest(file, "sha256")
    if names == [path]:
      return {"sha256": found.hexdigest()}
    total.update(f"{os.path.relpath(name, path)}\0{found.hexdigest()}\n".encode())
  return {"sha256": total.hexdigest()}


def _plan(
    path: str, parts: Mapping[str, Sequence[Row]], reading: _Reading
) -> list[Spec]:
  """Deals the rows out to shards, by their number and the size of a canvas."""
  file = storage.join(path, _PLAN)
  if storage.exists(file):
    size = json.loads(storage.read_bytes(file))["canvas_bytes"]
  else:
    size = _canvas_bytes([row for part in parts.values() for row in part], reading)
    if not storage.is_remote(path):
      os.makedirs(os.path.join(path, _UNFINISHED), exist_ok=True)
    storage.write_bytes(file, shards.to_json({"canvas_bytes": size}))
  each = max(1, _SHARD_BYTES // size)
  return [
      Spec(split, n, -(-len(rows) // each), tuple(rows[n * each : (n + 1) * each]))
      for split, rows in parts.items() for n in range(-(-len(rows) // each))
  ]


def _canvas_bytes(rows: Sequence[Row], reading: _Reading) -> int:
  """Returns the size of the first canvas that can be made; all have one size."""
  for row in rows:
    with contextlib.suppress(ReadError):  # Judged where it is written.
      return reading(row).volume.nbytes
  return _SHARD_BYTES


def _outcomes(path: str, specs: Sequence[Spec]) -> dict[str, dict[str, Any]]:
  """Returns {shard: outcome} of the shards that are there and whole."""
  there = {entry.path: entry for entry in storage.list_entries(path)}
  found = {}
  for spec in specs:
    file = storage.join(path, spec.outcome)
    shard = there.get(storage.join(path, spec.name))
    if file not in there or shard is None:
      continue
    outcome = json.loads(storage.read_bytes(file))
    if shard.size == outcome["file_bytes"] and _crc(shard) == outcome["crc32c"]:
      found[spec.name] = outcome
  return found


def _crc(entry: storage.Entry) -> int | None:
  if not storage.is_remote(entry.path):
    return _crc_of(entry.path)
  return int.from_bytes(base64.b64decode(entry.crc32c)) if entry.crc32c else None


def _crc_of(path: str) -> int:
  total = 0
  with open(path, "rb") as file:
    while block := file.read(1 << 20):
      total = google_crc32c.extend(total, block)
  return total


def _notes(
    outcomes: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> dict[str, Any]:
  rows = [row for outcome in outcomes for row in outcome["rows"]]
  return {
      "options": options,
      "bad": [[r["id"], r["reason"], r["detail"]] for r in rows if "reason" in r],
      "facts": {r["id"]: r["facts"] for r in rows if "facts" in r},
  }


def _finish(
    path: str,
    specs: Sequence[Spec],
    parts: Mapping[str, Sequence[Row]],
    options: Mapping[str, Any],
    judge: Callable[[Notes], None],
) -> dict[str, Any]:
  """Writes what describes the shards; the notes last."""
  names = [storage.join(path, spec.outcome) for spec in specs]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    outcomes = list(map(json.loads, pool.map(storage.read_bytes, names)))
  notes = json.loads(json.dumps(_notes(outcomes, options), default=str))
  splits = {
      name: [(s, o) for s, o in zip(specs, outcomes, strict=True) if s.split == name]
      for name in parts
  }
  put = lambda name, data: storage.write_bytes(storage.join(path, name), data)
  put(_QUARANTINE, ledger.format_table(notes["bad"]))
  put(_REPORT, json.dumps(_report(splits, notes["bad"]), indent=2).encode() + b"\n")
  judge(notes)
  for name, members in splits.items():
    if not any(outcome["places"] for _, outcome in members):
      raise DataError(
          f"split {name} has no good file left; see "
          f"{storage.join(path, _QUARANTINE)}"
      )
  _describe(path, splits)
  put(shards.INDEX, shards.to_json({
      name: {
          "files": [spec.name for spec, _ in members],
          "places": [
              [n, *place] for n, (_, outcome) in enumerate(members)
              for place in outcome["places"]
          ],
      } for name, members in splits.items()
  }))
  put(shards.NOTES, json.dumps(notes).encode())
  return notes


def _report(
    splits: Mapping[str, Sequence[tuple[Spec, dict[str, Any]]]],
    bad: Sequence[Sequence[str]],
) -> dict[str, Any]:
  reasons = sorted({reason for _, reason, _ in bad})
  return {
      "splits": {
          name: {
              "files": sum(len(spec.rows) for spec, _ in members),
              "canvases": sum(len(outcome["places"]) for _, outcome in members),
              "shards": len(members),
              "bytes": sum(outcome["file_bytes"] for _, outcome in members),
          } for name, members in splits.items()
      },
      "quarantine": {
          reason: sum(found == reason for _, found, _ in bad) for reason in reasons
      },
  }


def _describe(
    path: str, splits: Mapping[str, Sequence[tuple[Spec, dict[str, Any]]]]
) -> None:
  """Lets tensorflow-datasets write its description of the folder."""
  import tensorflow_datasets as tfds

  with tempfile.TemporaryDirectory() as folder:
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=_NAME, version=tfds.core.Version(shards.VERSION), data_dir=folder,
            module_name=__name__,
        ),
        description="Canvases of vjepa_jax.",
        features=tfds.features.FeaturesDict({
            "facts": tfds.features.Text(),
            "spacing": tfds.features.Tensor(shape=(4,), dtype=np.float32),
            "volume": tfds.features.Tensor(shape=(), dtype=np.object_),
        }),
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict([
        tfds.core.SplitInfo(
            name=_name_of(name),
            shard_lengths=[len(outcome["places"]) for _, outcome in members],
            num_bytes=sum(outcome["record_bytes"] for _, outcome in members),
            filename_template=tfds.core.ShardedFileTemplate(
                dataset_name=_NAME, data_dir=folder, split=_name_of(name),
                filetype_suffix="array_record",
            ),
        ) for name, members in splits.items()
    ]))
    info.write_to_directory(folder)
    for name in sorted(os.listdir(folder)):
      storage.write_bytes(
          storage.join(path, name), storage.read_bytes(os.path.join(folder, name))
      )


@contextlib.contextmanager
def _alone(folder: str, say: Callable[[str], None]) -> Iterator[None]:
  """Holds a folder against other writers on this machine, and tidies it."""
  try:
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
  except OSError as error:
    raise DataError(f"{folder}: no folder to write in: {error}") from error
  try:
    if _lock(handle, folder, say):
      _remove_parts(folder)
    yield
  finally:
    os.close(handle)


def _lock(handle: int, folder: str, say: Callable[[str], None]) -> bool:
  for attempt in itertools.count():
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return True
    except BlockingIOError:
      if not attempt:
        say(f"{folder}: another process is writing here; waiting for it")
      time.sleep(0.5)
    except OSError:
      # A file system without locks. Parts are named by host and process, and what
      # two writers name alike is equal.
      return False


def _remove_parts(folder: str):
  for base, _, names in os.walk(folder):
    for name in names:
      if name.endswith(".part"):
        os.remove(os.path.join(base, name))


def _scratch(path: str) -> str:
  """Returns the local folder for files in the making: the same one at each call."""
  if not storage.is_remote(path):
    return path
  return os.path.join(
      tempfile.gettempdir(), f"vjepa_jax_{os.getuid()}_{shards.digest(path)}"
  )


def _owner() -> str:
  return f"{socket.gethostname()}.{os.getpid()}"


def _leftovers(path: str) -> bool:
  return storage.exists(storage.join(path, _PLAN))


def _sweep(path: str) -> None:
  """Removes what only the writing needed; the plan last, so that it is found."""
  if not _leftovers(path):
    return
  for entry in storage.list_entries(storage.join(path, _UNFINISHED)):
    if storage.basename(entry.path) != storage.basename(_PLAN):
      storage.delete(entry.path)
  storage.delete_tree(storage.join(path, _UNFINISHED))


def _check_names(splits: Iterable[str]) -> None:
  homes: dict[str, str] = {}
  for split in splits:
    other = homes.setdefault(_name_of(split), split)
    if other != split:
      raise DataError(
          f"the splits {other!r} and {split!r} would share the files {_name_of(split)}; "
          "rename one"
      )


def _name_of(split: str) -> str:
  """Returns a name that tensorflow-datasets takes; "all" is its own, "a+b" a sum."""
  return "part_" + re.sub(r"\W", "_", split)
