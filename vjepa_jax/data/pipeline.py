"""From a manifest to host batches: read, resample, split, shuffle, batch.

Each file is read once, by threads; a bad one is counted by its reason, logged
once, quarantined, and never replaced. The run stops above `max_bad_fraction`.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import concurrent.futures
import csv
import dataclasses
import io
import os
import threading
from typing import Any, NamedTuple

from absl import logging
import grain
import numpy as np

from vjepa_jax.data import manifest as manifest_lib
from vjepa_jax.data import ops, readers, shards, storage
from vjepa_jax.data.manifest import Row
from vjepa_jax.data.record import DataError, ReadError, Record

check_disjoint = manifest_lib.check_disjoint
Batch = dict[str, np.ndarray]
# Fewer attempts than this say nothing about the share of bad files.
_MIN_ATTEMPTS = 20
_QUARANTINE_COLUMNS = ("path", "reason", "detail")


class Bad(NamedTuple):
  """One quarantined file."""

  path: str
  reason: str
  detail: str


@dataclasses.dataclass(frozen=True)
class Transform:
  """Row -> canvas Record: reading and resampling with fixed options.

  Attributes: as in `open_data`.
  """

  canvas: tuple[int, int, int]
  resample: str
  fov_mm: tuple[float, float, float]
  spacing_mm: tuple[float, float, float]
  dtype: str
  modalities: tuple[str, ...] | None
  colour: str
  min_size: tuple[int, int, int]
  max_voxels: int
  require_spacing: bool

  def __call__(self, row: Row) -> Record:
    """Reads a row's file onto the canvas.

    Raises:
      ReadError: with a reason code, where the file cannot be used.
    """
    record = readers.read(
        row.path, modalities=self.modalities, manifest_spacing=row.spacing,
        colour=self.colour, max_voxels=self.max_voxels,
    )
    if self.require_spacing and np.isnan(record.spacing[1:]).any():
      raise ReadError(
          row.path, "missing_spacing",
          f"spacing in mm is {tuple(record.spacing[1:].tolist())}, and it is required",
      )
    return ops.resample(
        record, canvas=self.canvas, policy=self.resample, fov_mm=self.fov_mm,
        spacing_mm=self.spacing_mm, dtype=self.dtype, min_size=self.min_size,
        max_voxels=self.max_voxels,
    )


class Volumes:
  """The recordings of one split; picklable, and indexed by row.

  Attributes:
    name: of the split.
    rows: the manifest rows, without what was quarantined before the start.
    labels: class names; a label number is a place in it.
    label_ids: int32 [len]; -1 where a row has no label.
  """

  def __init__(
      self,
      name: str,
      rows: Sequence[Row],
      labels: Sequence[str],
      source: "_Files | shards.Shards",
  ):
    self.name = name
    self.rows = tuple(rows)
    self.labels = tuple(labels)
    place = {label: n for n, label in enumerate(self.labels)}
    self.label_ids = np.array(
        [-1 if r.label is None else place[r.label] for r in self.rows], np.int32
    )
    self._source = source
    self._bad: set[int] = set()

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> Record:
    """Returns a row's canvas, with what the manifest knows of it.

    Raises:
      ReadError: if the file turns out bad (only where `validate` is "lazy").
      DataError: if too many files are bad.
    """
    index = range(len(self.rows))[index]
    row = self.rows[index]
    if isinstance(self._source, shards.Shards):
      record = self._source[index]
    else:
      record = self._source.read(row)
    label = int(self.label_ids[index])
    facts = {
        field: getattr(row, field)
        for field in ("device", "region", "imaging", "laterality", "geometry", "site")
    }
    known = {k: v for k, v in facts.items() if v != "unknown"}
    if "geometry" in record.meta:  # Seen in the frames' own coordinates.
      del known["geometry"]
    return dataclasses.replace(
        record, subject=row.participant, label=None if label < 0 else label,
        meta={**record.meta, **known},
    )

  def element(self, index: int) -> Batch | None:
    """Returns one row as a batch without the batch axis; None if it is bad.

    Raises:
      DataError: if too many files are bad, or all of this split.
    """
    try:
      record = self[index]
    except ReadError as error:  # Counted and logged where it was read.
      self._bad.add(index)
      if len(self._bad) == len(self):  # Else the reader would skip for ever.
        raise DataError(
            f"split {self.name}: all {len(self)} files are bad; the last: {error}"
        ) from error
      return None
    return {
        "volume": record.volume,
        "mean": np.float32(record.mean),
        "std": np.float32(record.std),
        "spacing": record.spacing.astype(np.float32),
        "index": np.int32(index),
        "label": self.label_ids[index],
        "_mask": np.float32(1),
    }


class Data:
  """Splits of one manifest.

  Attributes:
    splits: {name: Volumes}.
    labels: class names, common to all splits.
  """

  def __init__(
      self,
      splits: Mapping[str, Volumes],
      labels: Sequence[str],
      ledger: "_Ledger",
      facts: Mapping[str, Any],
  ):
    self.splits = dict(splits)
    self.labels = tuple(labels)
    self._ledger = ledger
    self._facts = dict(facts)

  @property
  def quarantine(self) -> list[Bad]:
    """Files found bad so far, in the order found."""
    return self._ledger.bad()

  @property
  def report(self) -> dict[str, Any]:
    """Counts of what is there and what was lost, ready for JSON."""
    rows = [row for volumes in self.splits.values() for row in volumes.rows]
    return {
        **self._facts,
        "records": len(rows),
        "participants": len({row.participant for row in rows}),
        **_counts(rows),
        "splits": {
            name: {
                "records": len(v), "participants": len({r.participant for r in v.rows}),
                **_counts(v.rows),
            }
            for name, v in self.splits.items()
        },
        **self._ledger.report(),
    }


def open_data(
    manifest: str,
    *,
    root: str | None = None,
    canvas: Sequence[int] = (64, 384, 384),
    resample: str = "resize",
    fov_mm: Sequence[float] = (6.0, 2.0, 6.0),
    spacing_mm: Sequence[float] = (0.05, 0.02, 0.02),
    dtype: str = "uint8",
    splits: Mapping[str, float] | str,
    stratify: Sequence[str] = ("device", "label"),
    seed: int = 0,
    label: str | None = None,
    participants: str | None = None,
    columns: Mapping[str, str] | None = None,
    filters: Mapping[str, Sequence[str] | str] | None = None,
    exclude: Mapping[str, Sequence[str] | str] | None = None,
    max_records: int | None = None,
    modalities: Sequence[str] | None = ("OPT",),
    colour: str = "reject",
    min_size: Sequence[int] = (1, 1, 1),
    max_voxels: int = readers.MAX_VOXELS,
    require_spacing: bool = False,
    validate: str = "read",
    max_bad_fraction: float = 0.05,
    cache: str = "memory",
    cache_bytes: int = 4 << 30,
    threads: int = 2,
    quarantine: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Data:
  """Opens the recordings of a manifest as splits of canvases.

  Args:
    manifest: TSV or CSV, local or `gs://`; see `manifest.read_manifest`, also
      for root, label, participants, columns, filters and exclude.
    root: what the manifest's filepath is joined to.
    canvas: (Z, Y, X) voxels.
    resample: "resize", "fov" or "spacing"; see `ops.resample`.
    fov_mm: (Z, Y, X) mm for "fov".
    spacing_mm: (dz, dy, dx) mm for "spacing".
    dtype: "uint8" or "keep".
    splits: {name: share of participants}, or the name of a column.
    stratify: row fields to keep in proportion where splits are shares.
    seed: of the split by shares.
    label: column with the class.
    participants: second table, one row a participant.
    columns: {known column: its name in this manifest}.
    filters: {field: values to keep}.
    exclude: {field: values to drop}; {"participant": [...]} drops people.
    max_records: only the first rows left by the filters.
    modalities: accepted DICOM modalities; None: any.
    colour: "reject" or "luminance".
    min_size: (Z, Y, X) a recording must have, such as one patch.
    max_voxels: cap on a recording, before decoding and before resampling.
    require_spacing: whether a recording of unknown dz, dy or dx is bad.
    validate: "read" reads every file before the start; "lazy" finds bad files
      while training and skips them.
    max_bad_fraction: above this share of bad files there is no run; it holds for
      all files together and for each device that has at least 20.
    cache: "memory" keeps canvases up to cache_bytes, "none" reads each time, a
      local folder keeps them as ArrayRecord shards for later runs.
    cache_bytes: for "memory".
    threads: that read side by side.
    quarantine: file to write bad files to, as TSV (path, reason, detail).
    progress: called with (files done, files in all) while reading.

  Returns:
    The open data.

  Raises:
    DataError: for a manifest that cannot be used, an empty split, volumes that
      do not stack, or too many bad files (by reason, with the first path each).
    ReadError: if the manifest itself cannot be fetched.
    ValueError: for an option out of range.
  """
  _check_options(validate, cache, max_bad_fraction, threads, max_records)
  ops.check_options(resample, dtype)
  table = manifest_lib.read_manifest(
      manifest, root=root, label=label, participants=participants,
      split=splits if isinstance(splits, str) else None, filters=filters,
      exclude=exclude, columns=columns,
  )
  parts, lost = _split(table, splits, stratify, seed, max_records)
  transform = Transform(
      canvas=tuple(canvas), resample=resample, fov_mm=tuple(fov_mm),
      spacing_mm=tuple(spacing_mm), dtype=dtype,
      modalities=None if modalities is None else tuple(modalities), colour=colour,
      min_size=tuple(min_size), max_voxels=max_voxels, require_spacing=require_spacing,
  )
  devices = collections.Counter(r.device for rows in parts.values() for r in rows)
  ledger = _Ledger(devices, max_bad_fraction, validate == "lazy", quarantine)
  files = _Files(transform, ledger, cache_bytes if cache == "memory" else 0)
  labels = manifest_lib.label_names(row for rows in parts.values() for row in rows)
  if cache not in ("memory", "none"):
    sources = _open_shards(cache, parts, files, threads, progress)
  else:
    if validate == "read":
      everything = [row for rows in parts.values() for row in rows]
      for _ in _read_all(files, everything, threads, progress):
        pass
      ledger.finish()
    sources = dict.fromkeys(parts, files)
  kept = {
      name: [row for row in rows if not ledger.is_bad(row.path)]
      for name, rows in parts.items()
  }
  _check_filled(kept, ledger)
  return Data(
      {name: Volumes(name, rows, labels, sources[name]) for name, rows in kept.items()},
      labels, ledger,
      {
          "manifest": manifest, "lost": lost, "labels": list(labels), "cache": cache,
          "canvas": list(transform.canvas), "resample": resample, "dtype": dtype,
      },
  )


def train_iterator(
    volumes: Volumes,
    *,
    batch_size: int,
    seed: int,
    threads: int = 2,
    shard: tuple[int, int] = (0, 1),
    prefetch: int | None = None,
) -> grain.DatasetIterator:
  """Returns an endless iterator of shuffled batches that can be stopped and resumed.

  The order depends on (seed, epoch, row) alone: not on threads, and the batches
  of all hosts together are the batch one host alone would make. Each row comes
  once an epoch; nothing is dropped at its end. A bad file is skipped.

  Args:
    volumes: the split.
    batch_size: rows of a batch on this host.
    seed: of the shuffling.
    threads: that read ahead; 0 reads in the caller's thread.
    shard: (this host, hosts).
    prefetch: volumes read ahead; by default two batches.

  Returns:
    Iterator of dicts: volume [B, T, Z, Y, X, C] as stored, mean, std, _mask
    float32 [B], spacing float32 [B, 4], index, label int32 [B]; with
    get_state() and set_state(state).

  Raises:
    ValueError: for an empty split, or a batch_size or shard out of range.
  """
  host, hosts = shard
  if not len(volumes) or batch_size < 1 or not 0 <= host < hosts:
    raise ValueError(
        f"train_iterator: {len(volumes)} volumes, batch_size {batch_size}, shard "
        f"{shard}: needs at least one volume, batch_size >= 1 and host < hosts"
    )
  dataset = grain.MapDataset.source(_Elements(volumes)).seed(seed).shuffle()
  # Dealt out after shuffling: hosts own places in the order, not rows, so that
  # the global batches are the same for any number of hosts.
  dataset = dataset.repeat(None)[host::hosts]
  ahead = 2 * batch_size if prefetch is None else prefetch
  options = grain.ReadOptions(
      num_threads=threads, prefetch_buffer_size=max(ahead, threads)
  )
  return iter(
      dataset.to_iter_dataset(options).batch(batch_size, drop_remainder=True)
  )


def eval_batches(
    volumes: Volumes,
    batch_size: int,
    indices: Iterable[int] | None = None,
    *,
    threads: int = 2,
) -> Iterator[Batch]:
  """Yields batches in a fixed order, each row once; all of the same size.

  Args:
    volumes: the split.
    batch_size: rows of a batch.
    indices: rows to take, in this order; by default all.
    threads: that read side by side.

  Yields:
    Batches as of `train_iterator`. The last is filled up with rows of `_mask` 0,
    index -1 and label -1, whose volume is 0, std 1 and spacing the first row's.

  Raises:
    ValueError: if batch_size is below 1.
    DataError: if too many files are bad.
  """
  if batch_size < 1:
    raise ValueError(f"eval_batches: batch_size is {batch_size}, must be at least 1")
  wanted = range(len(volumes)) if indices is None else [int(i) for i in indices]
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    waiting: list[Batch] = []
    for start in range(0, len(wanted), batch_size):
      found = pool.map(volumes.element, wanted[start : start + batch_size])
      waiting += [element for element in found if element is not None]
      if len(waiting) >= batch_size:
        yield _stack(waiting[:batch_size])
        waiting = waiting[batch_size:]
    if waiting:
      yield _stack(waiting + [_padding(waiting[0])] * (batch_size - len(waiting)))


class _Elements:
  """What Grain draws from: row -> element, or None for a bad file."""

  def __init__(self, volumes: Volumes):
    self._volumes = volumes

  def __len__(self) -> int:
    return len(self._volumes)

  def __getitem__(self, index: int) -> Batch | None:
    return self._volumes.element(int(index))

  def __repr__(self) -> str:
    return f"_Elements({self._volumes.name}, {len(self)})"


class _Ledger:
  """What was tried, what was bad and why; shared by splits and threads."""

  def __init__(
      self,
      files: Mapping[str, int],
      max_bad_fraction: float,
      lazy: bool,
      path: str | None,
  ):
    self._files = dict(files)  # {device: files in all}
    self._total = sum(files.values())
    self._max = max_bad_fraction
    self._lazy = lazy
    self._write_each = lazy
    self._path = path
    self._lock = threading.Lock()
    self._bad: dict[str, Bad] = {}
    self._devices: collections.Counter[str] = collections.Counter()
    self._facts: dict[str, dict[str, Any]] = {}
    self._kinds: dict[tuple[Any, ...], str] = {}
    # A lazy run resumed adds to what it found before; a full reading starts anew.
    self._earlier = _read_quarantine(path) if lazy and path else {}

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != "_lock"}

  def __setstate__(self, state: dict[str, Any]):
    self.__dict__.update(state, _lock=threading.Lock())

  def is_bad(self, path: str) -> bool:
    return path in self._bad

  def bad(self) -> list[Bad]:
    with self._lock:
      return list(self._bad.values())

  def facts(self) -> dict[str, dict[str, Any]]:
    with self._lock:
      return dict(self._facts)

  def error_of(self, path: str) -> ReadError | None:
    bad = self._bad.get(path)
    return ReadError(*bad) if bad else None

  def good(self, row: Row, record: Record) -> None:
    """Notes a volume that was read; it must stack with the others."""
    shape = record.volume.shape
    self.note_good(row.path, {
        "spacing_source": record.meta.get("spacing_source", "unknown"),
        "spacing_invalid": bool(record.meta.get("spacing_invalid")),
        "padding": float(record.meta.get("padding", 0)),
        "kind": [record.volume.dtype.name, shape[0], shape[4]],
    })

  def note_good(self, path: str, facts: dict[str, Any]) -> None:
    with self._lock:
      self._facts[path] = facts
      self._kinds.setdefault(tuple(facts["kind"]), path)
      if len(self._kinds) > 1:
        found = "; ".join(
            f"{d} with T={t}, C={c}: {p}" for (d, t, c), p in self._kinds.items()
        )
        raise DataError(
            f"volumes of different kinds cannot share a batch ({found}); use "
            "dtype=\"uint8\", or filter them apart"
        )

  def failed(self, row: Row, error: ReadError) -> None:
    """Quarantines a file, once; raises DataError if there are too many."""
    with self._lock:
      if row.path in self._bad:
        return
      detail = " ".join(error.detail.split())
      self._bad[row.path] = Bad(row.path, error.reason, detail)
      self._facts.pop(row.path, None)  # It was good when first read.
      self._devices[row.device] += 1
      logging.warning("quarantined %s", error)
      if self._write_each:
        self._write()
      self._check()

  def finish(self) -> None:
    """Writes the quarantine of a full reading, empty or not, and judges it."""
    with self._lock:
      self._write_each = True
      self._write()
      self._check()

  def report(self) -> dict[str, Any]:
    with self._lock:
      facts = list(self._facts.values())
      tried = len(facts) + len(self._bad)
      return {
          "spacing_source": _tally(f["spacing_source"] for f in facts),
          "spacing_invalid": sum(f["spacing_invalid"] for f in facts),
          "padding": float(np.mean([f["padding"] for f in facts])) if facts else 0.0,
          "read": tried,
          "quarantine": _tally(b.reason for b in self._bad.values()),
          "quarantine_device": _tally(self._devices.elements()),
          "bad_fraction": len(self._bad) / tried if tried else 0.0,
      }

  def _check(self):
    tried = len(self._facts) + len(self._bad)
    # A full reading is judged against all files, a lazy one against those tried.
    base = tried if self._lazy else self._total
    soon = self._lazy and tried < min(_MIN_ATTEMPTS, self._total)
    # A share found on the way is a sample of the whole: three standard errors.
    margin = 0.0
    if self._lazy and tried < self._total:
      margin = 3 * (self._max * (1 - self._max) * tried) ** 0.5
    where = ""
    if len(self._bad) <= self._max * base + margin or soon:
      # One device may be lost whole while the others hide it in the mean.
      where = next((
          f" ({bad} of the {self._files[device]} of {device})"
          for device, bad in self._devices.items()
          if self._files[device] >= _MIN_ATTEMPTS
          and bad > self._max * self._files[device]
      ), "")
      if not where:
        return
    if self._path:
      self._write()
    raise DataError(
        f"{len(self._bad)} of {tried} files read are bad{where}, more than "
        f"max_bad_fraction {self._max:g}: {_reasons(self._bad.values())}. Mend them, "
        "leave them out of the manifest, or raise max_bad_fraction"
    )

  def _write(self):
    if self._path is None:
      return
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(_QUARANTINE_COLUMNS)
    writer.writerows({**self._earlier, **self._bad}.values())
    folder = storage.parent(self._path)
    if not storage.is_remote(folder):
      os.makedirs(folder, exist_ok=True)
    storage.write_bytes(self._path, text.getvalue().encode())


class _Files:
  """Canvases read from files, kept in memory up to a budget."""

  def __init__(self, transform: Transform, ledger: _Ledger, budget: int):
    self.transform = transform
    self.ledger = ledger
    self._budget = budget
    self._lock = threading.Lock()
    self._kept: dict[str, Record] = {}

  def __getstate__(self) -> dict[str, Any]:
    # A worker reads for itself: gigabytes of canvases are not sent to it.
    return {
        **self.__dict__, "_kept": {}, "_lock": None, "_budget": self._whole_budget()
    }

  def __setstate__(self, state: dict[str, Any]):
    self.__dict__.update(state, _lock=threading.Lock())

  def read(self, row: Row) -> Record:
    kept = self._kept.get(row.path)
    if kept is not None:
      return kept
    error = self.ledger.error_of(row.path)
    if error:
      raise error
    try:
      record = self.transform(row)
    except ReadError as error:
      self.ledger.failed(row, error)
      raise
    self.accept(row, record)
    return record

  def accept(self, row: Row, record: Record) -> None:
    """Notes a canvas that was read, and keeps it while there is room."""
    self.ledger.good(row, record)
    with self._lock:
      if record.volume.nbytes <= self._budget and row.path not in self._kept:
        self._budget -= record.volume.nbytes
        self._kept[row.path] = record

  def _whole_budget(self) -> int:
    with self._lock:
      return self._budget + sum(r.volume.nbytes for r in self._kept.values())


def _check_options(
    validate: str,
    cache: str,
    max_bad_fraction: float,
    threads: int,
    max_records: int | None,
):
  if validate not in ("read", "lazy"):
    raise ValueError(f"validate is {validate!r}, must be \"read\" or \"lazy\"")
  if cache not in ("memory", "none") and validate == "lazy":
    raise ValueError(
        f"cache={cache!r} reads every file when it is filled; use validate=\"read\""
    )
  if not 0 <= max_bad_fraction <= 1:
    raise ValueError(f"max_bad_fraction is {max_bad_fraction}, must be in [0, 1]")
  if threads < 1:
    raise ValueError(f"threads is {threads}, must be at least 1")
  if max_records is not None and max_records < 1:
    raise ValueError(f"max_records is {max_records}, must be at least 1 or None")


def _split(
    table: manifest_lib.Manifest,
    splits: Mapping[str, float] | str,
    stratify: Sequence[str],
    seed: int,
    max_records: int | None,
) -> tuple[dict[str, list[Row]], dict[str, int]]:
  lost = {reason: n for reason, n in table.lost.items() if n}
  rows = list(table.rows)
  if max_records is not None and len(rows) > max_records:
    lost["max_records"] = len(rows) - max_records
    rows = rows[:max_records]
  if not rows:
    raise DataError(f"{table.path}: no row is left; lost {lost or 'none'}")
  if not isinstance(splits, str):
    return manifest_lib.split_by_participant(
        rows, splits, stratify=stratify, seed=seed
    ), lost
  parts, missing = manifest_lib.split_by_column(rows)
  if missing:
    lost["no_split"] = missing
  if not parts:
    raise DataError(f"{table.path}: no row has a value in the column {splits!r}")
  return parts, lost


def _read_all(
    files: _Files,
    rows: Sequence[Row],
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Record | None]:
  """Reads the rows side by side and yields in order; None for a bad file."""

  def read(row: Row) -> Record | ReadError:
    try:
      return files.transform(row)
    except ReadError as error:
      return error

  pool = concurrent.futures.ThreadPoolExecutor(threads)
  ahead: collections.deque[concurrent.futures.Future] = collections.deque()
  try:
    waiting = iter(rows)
    for done, row in enumerate(rows, 1):
      # A bounded look-ahead: finished canvases wait in memory to be taken.
      while len(ahead) < 2 * threads and (later := next(waiting, None)) is not None:
        ahead.append(pool.submit(read, later))
      found = ahead.popleft().result()
      # Noted here and not by the threads: what is first, what is kept and where
      # reading stops then follow the manifest.
      if isinstance(found, ReadError):
        files.ledger.failed(row, found)
        yield None
      else:
        files.accept(row, found)
        yield found
      if progress:
        progress(done, len(rows))
  finally:
    pool.shutdown(cancel_futures=True)


def _open_shards(
    folder: str,
    parts: Mapping[str, Sequence[Row]],
    files: _Files,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, shards.Shards]:
  """Opens the cached canvases of these rows and options; writes them if absent."""
  options = dataclasses.asdict(files.transform)
  path = shards.locate(folder, parts, options)
  ledger = files.ledger
  notes = shards.read_notes(path)
  if notes is None:
    total = sum(map(len, parts.values()))
    before = 0
    streams = {}
    for name, rows in parts.items():
      def report(done: int, _: int, before: int = before):
        if progress:
          progress(before + done, total)

      streams[name] = (
          record for record in _read_all(files, rows, threads, report)
          if record is not None
      )
      before += len(rows)

    def finish() -> dict[str, Any]:
      ledger.finish()
      return {
          "bad": [list(bad) for bad in ledger.bad()], "facts": ledger.facts(),
          "options": options,
      }

    shards.write(path, streams, finish)
  else:
    by_path = {row.path: row for rows in parts.values() for row in rows}
    for bad in notes["bad"]:
      ledger.failed(by_path[bad[0]], ReadError(*bad))
    for name, facts in notes["facts"].items():
      ledger.note_good(name, facts)
    ledger.finish()
  return {name: shards.Shards(path, name) for name in parts}


def _check_filled(kept: Mapping[str, Sequence[Row]], ledger: _Ledger):
  empty = [name for name, rows in kept.items() if not rows]
  if empty:
    raise DataError(
        f"split(s) {', '.join(empty)} have no good file left: "
        f"{_reasons(ledger.bad())}"
    )


def _stack(elements: Sequence[Batch]) -> Batch:
  return {key: np.stack([e[key] for e in elements]) for key in elements[0]}


def _padding(like: Batch) -> Batch:
  """Returns a row that counts for nothing and yields no NaN when normalised."""
  return {
      "volume": np.zeros_like(like["volume"]), "mean": np.float32(0),
      "std": np.float32(1), "spacing": like["spacing"], "index": np.int32(-1),
      "label": np.int32(-1), "_mask": np.float32(0),
  }


def _counts(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
  return {
      field: manifest_lib.count(rows, field)
      for field in ("device", "site", "region", "laterality", "label")
  }


def _tally(values: Iterable[str]) -> dict[str, int]:
  found = collections.Counter(values)
  return dict(sorted(found.items(), key=lambda kv: (-kv[1], kv[0])))


def _reasons(bad: Iterable[Bad]) -> str:
  first: dict[str, Bad] = {}
  counts: collections.Counter[str] = collections.Counter()
  for entry in bad:
    first.setdefault(entry.reason, entry)
    counts[entry.reason] += 1
  return "; ".join(
      f"{n} {reason} (first: {first[reason].path}: {first[reason].detail})"
      for reason, n in counts.most_common()
  )


def _read_quarantine(path: str) -> dict[str, Bad]:
  if not storage.exists(path):
    return {}
  lines = csv.reader(
      io.StringIO(storage.read_bytes(path).decode()), delimiter="\t"
  )
  return {cells[0]: Bad(*cells) for cells in list(lines)[1:] if len(cells) == 3}
