"""The recordings of one split, of one source or of several, indexed by row."""

from collections.abc import Mapping, Sequence
import dataclasses
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from vjepa_jax.data import mixture as mixture_lib
from vjepa_jax.data import shards
from vjepa_jax.data.buffers import Buffers
from vjepa_jax.data.ledger import Ledger
from vjepa_jax.data.manifest import Row
from vjepa_jax.data.record import DataError, ReadError, Record

Batch = dict[str, np.ndarray]
# What the manifest knows of a recording and its Record does not.
_FACTS = (
    "device", "region", "imaging", "laterality", "geometry", "site", "modality"
)
# Seen in the file itself, which then knows better than the manifest.
_SEEN = ("geometry", "modality")


class Reader(Protocol):
  """Where canvases come from that no shard holds."""

  def read(self, row: Row) -> Record:
    """Returns a row's canvas, or raises ReadError."""


class Volumes:
  """The recordings of one split of one source; picklable, and indexed by row.

  Attributes:
    name: of the split.
    rows: the manifest rows, without what was quarantined before the start.
    labels: class names; a label number is a place in it.
    label_ids: int32 [len]; -1 where a row has no label.
    stage_ids: int32 [len, T] where rows are clips with stages, -1 for a time point
      without; else None.
    ledger: what was tried and what was bad, of the whole run; None where nothing is.
  """

  def __init__(
      self,
      name: str,
      rows: Sequence[Row],
      labels: Sequence[str],
      canvases: Reader | shards.Shards,
      *,
      ledger: Ledger | None = None,
  ):
    self.name = name
    self.rows = tuple(rows)
    self.labels = tuple(labels)
    place = {label: n for n, label in enumerate(self.labels)}
    self.label_ids = np.array(
        [-1 if r.label is None else place[r.label] for r in self.rows], np.int32
    )
    self.ledger = ledger
    self.stage_ids = _stage_ids(self.rows, place)
    self._canvases = canvases
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
    row, record = self.rows[index], self._record(index)
    label = int(self.label_ids[index])
    known = {
        field: value for field in _FACTS if (value := getattr(row, field)) != "unknown"
        and not (field in _SEEN and field in record.meta)
    }
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
      record = self._record(index)
    except ReadError as error:  # Counted and logged where it was read.
      self._bad.add(index)
      if len(self._bad) == len(self):  # Else the reader would skip for ever.
        raise DataError(
            f"split {self.name}: all {len(self)} files are bad; the last: {error}"
        ) from error
      return None
    element = {
        "volume": record.volume,
        "mean": np.float32(record.mean),
        "std": np.float32(record.std),
        "spacing": record.spacing,
        "index": np.int32(index),
        "label": self.label_ids[index],
        "source": np.int32(0),
        "_mask": np.float32(1),
    }
    if self.stage_ids is not None:
      element["frame_label"] = self.stage_ids[index]
    return element

  def _record(self, index: int) -> Record:
    if isinstance(self._canvases, shards.Shards):
      return self._canvases[index]
    return self._canvases.read(self.rows[index])


class Mixture:
  """One split of several sources, as one; the rows of the first source come first.

  Args:
    name: of the split.
    parts: {source: its volumes}.
    mixture: "weighted" (each row of a batch by the weights), "alternate" (whole
      batches by the weights) or "concatenate" (all rows alike).
    weights: {source: weight}; None, and for "concatenate", leaves them alike.

  Attributes:
    name, rows, labels, label_ids, stage_ids, ledger: as of `Volumes`.
    parts: the volumes of the sources.
    sources: their names; `source` of a batch is a place in it.
    mixture: as given.
    shares: of the sources, exact.
  """

  def __init__(
      self,
      name: str,
      parts: Mapping[str, Volumes],
      *,
      mixture: str,
      weights: Mapping[str, float] | None = None,
  ):
    self.name = name
    self.parts = tuple(parts.values())
    self.sources = tuple(parts)
    self.mixture = mixture
    self.rows = tuple(row for part in self.parts for row in part.rows)
    self.labels = self.parts[0].labels
    self.label_ids = np.concatenate([part.label_ids for part in self.parts])
    stages = [part.stage_ids for part in self.parts]
    staged = all(own is not None for own in stages)
    self.stage_ids = np.concatenate(stages) if staged else None
    self.ledger = self.parts[0].ledger
    weights = weights or dict.fromkeys(parts, 1)
    self.shares: tuple[Fraction, ...] = tuple(
        mixture_lib.shares_of({source: weights[source] for source in parts}).values()
    )
    self.starts = np.cumsum([0, *map(len, self.parts)])

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> Record:
    """Returns a row's canvas; as `Volumes`."""
    part, row = self.home(range(len(self))[index])
    return self.parts[part][row]

  def home(self, index: int) -> tuple[int, int]:
    """Returns (source, row of that source)."""
    part = int(np.searchsorted(self.starts, index, side="right")) - 1
    return part, int(index - self.starts[part])

  def element(self, index: int) -> Batch | None:
    """Returns one row as a batch without the batch axis; as `Volumes`."""
    part, row = self.home(index)
    element = self.parts[part].element(row)
    if element is None:
      return None
    return {**element, "index": np.int32(index), "source": np.int32(part)}


def _stage_ids(
    rows: Sequence[Row], place: Mapping[str, int]
) -> np.ndarray | None:
  stages = [getattr(row, "stages", ()) for row in rows]
  if not stages or not all(stages):
    return None
  return np.array(
      [[-1 if s is None else place[s] for s in own] for own in stages], np.int32
  )


def padding(like: Batch) -> Batch:
  """Returns a row that counts for nothing and yields no NaN when normalised."""
  row = {
      "volume": np.zeros_like(like["volume"]), "mean": np.float32(0),
      "std": np.float32(1), "spacing": like["spacing"], "index": np.int32(-1),
      "label": np.int32(-1), "source": like["source"], "_mask": np.float32(0),
  }
  if "frame_label" in like:
    row["frame_label"] = np.full_like(like["frame_label"], -1)
  return row


def stack(elements: Sequence[Batch], buffers: Buffers | None = None) -> Batch:
  """Joins elements along a new first axis; one element is not copied.

  Args:
    elements: of one shape.
    buffers: give the memory of the volumes.
  """
  if len(elements) == 1:
    return {key: np.asarray(value)[None] for key, value in elements[0].items()}
  first = elements[0]["volume"]
  out = buffers and buffers.take((len(elements), *first.shape), first.dtype)
  volume = np.stack([element["volume"] for element in elements], out=out)
  return {"volume": volume} | {
      key: np.stack([element[key] for element in elements])
      for key in elements[0] if key != "volume"
  }


def facts(volumes: Volumes | Mixture) -> dict[str, Any]:
  """Returns what decides the order of a split's rows, as JSON."""
  if isinstance(volumes, Volumes):
    return {"mixture": "one source"}
  weighed = volumes.mixture != "concatenate"
  return {
      "mixture": volumes.mixture, "sources": list(volumes.sources),
      "shares": [str(s) for s in volumes.shares] if weighed else [],
  }
