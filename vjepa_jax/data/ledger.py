"""What was tried, what was bad and why: counted, logged once, written down, judged.

One ledger serves all splits and sources of a run. It goes with the place of the
training data into a checkpoint, so that a run that is resumed counts on.
"""

import base64
import collections
from collections.abc import Iterable, Mapping, Sequence
import csv
import io
import threading
from typing import Any, NamedTuple

from absl import logging
import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.manifest import Row
from vjepa_jax.data.record import DataError, ReadError, Record

# Fewer attempts than this say nothing about the share of bad files.
MIN_ATTEMPTS = 20
# What is not the file's fault: nothing is quarantined, the run stops.
STOPS = ("unreachable",)
BY = ("device", "site", "split", "label", "source")
_COLUMNS = ("path", "reason", "detail")
_SPACING = "spacing_source "
# Paths named by a report, for each reason; the table has them all.
_NAMED = 100


class Bad(NamedTuple):
  """One quarantined recording; `path` is its row's id."""

  path: str
  reason: str
  detail: str


class Ledger:
  """Good and bad recordings of a run; shared by splits and threads.

  Args:
    parts: {split: rows} of all sources.
    max_bad_fraction: above this share of bad files there is no run, of all files
      and of each device of at least 20.
    lazy: whether files are found bad while training; else all are read before.
    path: table to write bad files to, or None.
  """

  def __init__(
      self,
      parts: Mapping[str, Sequence[Row]],
      max_bad_fraction: float,
      *,
      lazy: bool = False,
      path: str | None = None,
  ):
    self._rows = {row.id: row for rows in parts.values() for row in rows}
    self._place = {name: n for n, name in enumerate(self._rows)}
    self._split = {row.id: name for name, rows in parts.items() for row in rows}
    self._files = collections.Counter(row.device for row in self._rows.values())
    self._max = max_bad_fraction
    self._lazy = lazy
    self._write_each = lazy
    self._path = path
    self._lock = threading.Lock()
    self._bad: dict[str, Bad] = {}
    self._good = np.zeros(len(self._rows), bool)
    self._tallies: collections.Counter[str] = collections.Counter()
    self._kinds: dict[Any, dict[tuple[Any, ...], str]] = {}
    self._retries: collections.Counter[str] = collections.Counter()
    # A lazy run begun anew keeps the table of the one before; a full reading does not.
    self._earlier = _read_table(path) if lazy and path else {}

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != "_lock"}

  def __setstate__(self, state: dict[str, Any]):
    self.__dict__.update(state, _lock=threading.Lock())

  def is_bad(self, row: Row) -> bool:
    return row.id in self._bad

  def bad(self) -> list[Bad]:
    with self._lock:
      return list(self._bad.values())

  def error_of(self, row: Row) -> ReadError | None:
    bad = self._bad.get(row.id)
    return ReadError(*bad) if bad else None

  def good(self, row: Row, record: Record, *, group: Any = None) -> None:
    """Notes a volume that was read; it must stack with the others of its group."""
    self.note_good(row, facts_of(record), group=group)

  def note_good(
      self, row: Row, facts: Mapping[str, Any], *, group: Any = None
  ) -> None:
    """Notes what is known of a good volume, here or from where it was read."""
    with self._lock:
      place = self._place[row.id]
      if not self._good[place] and row.id not in self._bad:
        self._good[place] = True
        self._tallies[f"{_SPACING}{facts['spacing_source']}"] += 1
        self._tallies["spacing_invalid"] += facts["spacing_invalid"]
        self._tallies["padding_millionths"] += round(1e6 * facts["padding"])
        self._tallies["cut_millionths"] += round(1e6 * facts.get("cut", 0.0))
      kinds = self._kinds.setdefault(group, {})
      kinds.setdefault(tuple(facts["kind"]), row.id)
      if len(kinds) > 1:
        found = "; ".join(
            f"{kind[0]} of {' x '.join(map(str, kind[1:]))} [T, Z, Y, X, C]: {path}"
            for kind, path in kinds.items()
        )
        raise DataError(
            f"volumes of different kinds cannot share a batch ({found}); use "
            "dtype=\"uint8\", filter them apart, or give each kind a source of its own "
            "with mixture=\"alternate\""
        )

  def failed(self, row: Row, error: ReadError) -> None:
    """Quarantines a recording, once.

    Raises:
      DataError: if it is not the file's fault, or if there are too many.
    """
    stop_if_blameless(error)
    with self._lock:
      if row.id in self._bad:
        return
      detail = " ".join(error.detail.split())
      self._bad[row.id] = Bad(row.id, error.reason, detail)
      self._good[self._place[row.id]] = False  # It may have been when first read.
      logging.warning("quarantined %s", error)
      if self._write_each:
        self._write()
      self._check()

  def note_retries(self, counts: Mapping[str, int]) -> None:
    """Adds the retries of a worker process."""
    with self._lock:
      self._retries.update(counts)

  def finish(self) -> None:
    """Writes the quarantine of a full reading, empty or not, and judges it."""
    with self._lock:
      self._write_each = True
      # By the manifest, whoever was first to read.
      self._bad = dict(sorted(self._bad.items(), key=lambda kv: self._place[kv[0]]))
      self._write()
      self._check()

  def report(self) -> dict[str, Any]:
    """Returns counts ready for JSON: tries, reasons, by device, site, split, label."""
    with self._lock:
      bad = list(self._bad.values())
      sources = {
          key.removeprefix(_SPACING): n for key, n in self._tallies.items()
          if key.startswith(_SPACING)
      }
      tried = self._tried()
      retries = self._retries + collections.Counter(storage.counters())
      return {
          "spacing_source": _ranked(sources),
          "spacing_invalid": self._tallies["spacing_invalid"],
          "padding": self._tallies["padding_millionths"] / 1e6
          / max(sum(sources.values()), 1),
          "cut": self._tallies["cut_millionths"] / 1e6
          / max(sum(sources.values()), 1),
          "read": tried,
          "quarantine": _tally(b.reason for b in bad),
          "quarantine_device": _tally(self._rows[b.path].device for b in bad),
          "quarantine_by": count_by(
              (self._rows[b.path], self._split[b.path], b.reason) for b in bad
          ),
          "quarantine_paths": _paths(bad),
          "bad_fraction": len(bad) / tried if tried else 0.0,
          "retries": dict(sorted(retries.items())),
      }

  def state(self) -> dict[str, Any] | None:
    """Returns what a resumed run must know, as JSON; None where all is read before."""
    if not self._lazy:
      return None
    with self._lock:
      return {
          "good": base64.b64encode(np.packbits(self._good).tobytes()).decode(),
          "bad": [list(bad) for bad in self._bad.values()],
          "tallies": dict(self._tallies),
      }

  def restore(self, state: Mapping[str, Any] | None) -> None:
    """Counts on from `state` of a run over the same rows.

    A file found bad then is not tried again: an unbroken run would not either.
    """
    if not self._lazy or not state:
      return
    bits = np.unpackbits(np.frombuffer(base64.b64decode(state["good"]), np.uint8))
    with self._lock:
      self._good = bits[: len(self._rows)].astype(bool)
      self._tallies = collections.Counter(state["tallies"])
      self._bad = {cells[0]: Bad(*cells) for cells in state["bad"]}
      if self._bad:
        self._write()

  def _tried(self) -> int:
    return int(np.count_nonzero(self._good)) + len(self._bad)

  def _check(self):
    tried, total = self._tried(), len(self._rows)
    # A full reading is judged against all files, a lazy one against those tried.
    base = tried if self._lazy else total
    soon = self._lazy and tried < min(MIN_ATTEMPTS, total)
    # A share found on the way is a sample of the whole: three standard errors.
    margin = 0.0
    if self._lazy and tried < total:
      margin = 3 * (self._max * (1 - self._max) * tried) ** 0.5
    where = ""
    if len(self._bad) <= self._max * base + margin or soon:
      # One device may be lost whole while the others hide it in the mean.
      devices = collections.Counter(self._rows[name].device for name in self._bad)
      where = next((
          f" ({bad} of the {self._files[device]} of {device})"
          for device, bad in devices.items()
          if self._files[device] >= MIN_ATTEMPTS
          and bad > self._max * self._files[device]
      ), "")
      if not where:
        return
    self._write()
    raise DataError(
        f"{len(self._bad)} of {tried} files read are bad{where}, more than "
        f"max_bad_fraction {self._max:g}: {reasons(self._bad.values())}. Mend them, "
        "leave them out of the manifest, or raise max_bad_fraction"
    )

  def _write(self):
    if self._path is None:
      return
    table = format_table({**self._earlier, **self._bad}.values())
    try:
      storage.make_folder(storage.parent(self._path))
      storage.write_bytes(self._path, table)
    except ReadError as error:  # Of the table: it must not pass for the recording's.
      raise DataError(f"the quarantine table cannot be written: {error}") from error


def facts_of(record: Record) -> dict[str, Any]:
  """Returns what a ledger notes of a good canvas, ready for JSON."""
  return {
      "spacing_source": record.meta.get("spacing_source", "unknown"),
      "spacing_invalid": bool(record.meta.get("spacing_invalid")),
      "padding": float(record.meta.get("padding", 0)),
      "cut": float(record.meta.get("cut", 0)),
      "kind": [record.volume.dtype.name, *record.volume.shape],
  }


def stop_if_blameless(error: ReadError) -> None:
  """Lets a file's fault pass.

  Raises:
    DataError: if it is none, such as a bucket that cannot be reached.
  """
  if error.reason in STOPS:
    raise DataError(
        f"{error}. This is not the file's fault: nothing was quarantined, and the "
        "same command goes on"
    ) from error


def format_table(bad: Iterable[Sequence[str]]) -> bytes:
  """Returns bad recordings (path, reason, detail) as TSV with a heading."""
  text = io.StringIO()
  writer = csv.writer(text, delimiter="\t", lineterminator="\n")
  writer.writerow(_COLUMNS)
  writer.writerows(bad)
  return text.getvalue().encode()


def check_lost(
    lost: Sequence[tuple[Row, str]], total: int, max_lost_fraction: float, path: str
) -> None:
  """Refuses a manifest that loses rows which nobody asked to drop.

  Args:
    lost: (row, reason) of each.
    total: rows of the manifest.
    max_lost_fraction: the share above which there is no run.
    path: of the manifest, for the message.

  Raises:
    DataError: by reason, and by site and device where more than one is known.
  """
  if len(lost) <= max_lost_fraction * total:
    return
  tally = lambda values: ", ".join(f"{k} {n}" for k, n in _tally(values).items())
  parts = [tally(reason for _, reason in lost)]
  for field in ("site", "device"):
    parts.append(f"by {field}: {tally(getattr(row, field) for row, _ in lost)}")
  raise DataError(
      f"{path}: {len(lost)} of {total} rows are lost for reasons that nobody asked for "
      f"({'; '.join(parts)}), more than max_lost_fraction {max_lost_fraction:g}. Mend "
      "the table, drop them by `filters` or `exclude`, or raise max_lost_fraction"
  )


def count_by(
    losses: Iterable[tuple[Row, str, str]]
) -> dict[str, dict[str, dict[str, int]]]:
  """Counts (row, split, reason) as {field: {value: {reason: n}}}."""
  losses = list(losses)
  found = {}
  for field in BY:
    values = collections.defaultdict(list)
    for row, split, reason in losses:
      value = split if field == "split" else getattr(row, field)
      values["unlabelled" if value is None else value].append(reason)
    found[field] = {value: _tally(rs) for value, rs in sorted(values.items())}
  return {k: v for k, v in found.items() if k != "source" or set(v) - {""}}


def reasons(bad: Iterable[Bad]) -> str:
  """Returns one line: how many of each reason, with the first of each."""
  first: dict[str, Bad] = {}
  counts: collections.Counter[str] = collections.Counter()
  for entry in bad:
    first.setdefault(entry.reason, entry)
    counts[entry.reason] += 1
  return "; ".join(
      f"{n} {reason} (first: {first[reason].path}: {first[reason].detail})"
      for reason, n in counts.most_common()
  )


def _paths(bad: Iterable[Bad]) -> dict[str, list[str]]:
  found: dict[str, list[str]] = {}
  for entry in bad:
    found.setdefault(entry.reason, []).append(entry.path)
  return {reason: paths[:_NAMED] for reason, paths in sorted(found.items())}


def _tally(values: Iterable[str]) -> dict[str, int]:
  return _ranked(collections.Counter(values))


def _ranked(counts: Mapping[str, int]) -> dict[str, int]:
  return dict(sorted(counts.items(), key=lambda kv: (-kv[1], kv[0])))


def _read_table(path: str) -> dict[str, Bad]:
  if not storage.exists(path):
    return {}
  lines = csv.reader(
      io.StringIO(storage.read_bytes(path).decode()), delimiter="\t"
  )
  return {cells[0]: Bad(*cells) for cells in list(lines)[1:] if len(cells) == 3}
