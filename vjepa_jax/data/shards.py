"""Canvases written once as ArrayRecord shards, read back in any order.

A scan costs tens of milliseconds to seconds to decode and resample, its canvas
one to read. A prepared folder, local or `gs://`, is one that tensorflow-datasets
opens (`builder_from_directory`; TensorFlow is not needed), with an index of byte
ranges for our own reading. Its name is a hash of the rows and the options, so that
another canvas never meets it. `notes.json` is written last: a folder without it is
unfinished. See `shard_writing` for how it is made.
"""

import bisect
from collections.abc import Iterable, Mapping, Sequence
import hashlib
import json
import posixpath
import types
from typing import Any

import numpy as np

from vjepa_jax.data import array_records, file_cache, storage
from vjepa_jax.data.array_records import Place
from vjepa_jax.data.manifest import Row
from vjepa_jax.data.record import DataError, ReadError, Record

VERSION = "2.0.0"
NOTES, INDEX = "notes.json", "index.json"


class Shards(Sequence[Record]):
  """The canvases of one split, in the order written; picklable, holds no handles.

  Args:
    path: folder that `shard_writing.prepare` made, local or `gs://`.
    split: name of the split.

  Attributes:
    path: as given.
  """

  def __init__(self, path: str, split: str):
    self.path = path
    self._split = split
    self._files: list[str] = []
    self._stamps: dict[str, str] = {}
    self._places: list[tuple[int, Place]] | None = None

  def __len__(self) -> int:
    return len(self._opened())

  def __getitem__(self, index: int) -> Record:
    """Returns one canvas.

    Raises:
      DataError: naming shard and row, if what was stored is damaged or cannot be
        fetched.
    """
    return self.read_into(index, None)

  def read_into(self, index: int, out: np.ndarray | None) -> Record:
    """Reads a canvas straight to where it is wanted, such as a row of a batch.

    Args:
      index: of the canvas.
      out: C-contiguous, of the canvas's shape and dtype; None: a new array.

    Returns:
      The Record, whose volume is `out`.

    Raises:
      DataError: as of `[index]`.
      ValueError: if `out` does not fit.
    """
    index = range(len(self))[index]
    number, place = self._opened()[index]
    file = storage.join(self.path, self._files[number])
    if out is None:
      flat = np.empty(place.volume, np.uint8)
    elif out.flags.c_contiguous and out.nbytes == place.volume:
      flat = out.reshape(-1).view(np.uint8)
    else:
      raise ValueError(
          f"{file}: out is {out.dtype} {out.shape}, of {out.nbytes} bytes or not "
          f"contiguous; the canvas has {place.volume}"
      )
    try:
      if storage.is_remote(file):
        head = array_records.read_bytes(self._fetch(file, place), place, flat)
      else:
        head = array_records.read_local(file, place, flat)
      return _decode(head, flat)
    except ReadError as error:
      raise DataError(f"{self._split} {index}: {error}") from error
    except (OSError, ValueError, KeyError, IndexError) as error:
      raise DataError(
          f"{file}: {self._split} {index} is damaged ({error}); delete the folder "
          "and prepare it again"
      ) from error

  def _fetch(self, file: str, place: Place) -> bytes:
    """Returns the bytes around a record of a bucket's file, or the cache's copy."""
    stamp = self._stamps.get(file)
    get = lambda *_, **__: types.SimpleNamespace(
        data=storage.read_bytes(
            file, start=place.start, stop=place.stop, expect=stamp
        ),
        generation=stamp,
    )
    cache = file_cache.configured()
    if cache is None or not stamp:
      return get().data
    return cache.read(f"{file}#{place.start}", get, expect=stamp)

  def _opened(self) -> list[tuple[int, Place]]:
    if self._places is None:
      try:
        index = json.loads(storage.read_bytes(storage.join(self.path, INDEX)))
        found = index[self._split]
        if storage.is_remote(self.path):  # One request, and none for what is cached.
          listed = storage.list_entries(self.path)
          self._stamps = {entry.path: entry.stamp for entry in listed}
      except (ReadError, ValueError, KeyError) as error:
        raise DataError(
            f"{self.path}: no split {self._split} to read ({error})"
        ) from error
      self._files = found["files"]
      self._places = [(cells[0], Place(*cells[1:])) for cells in found["places"]]
    return self._places


def locate(
    folder: str, parts: Mapping[str, Sequence[Row]], options: Mapping[str, Any]
) -> str:
  """Returns the folder for the canvases of these rows under these options.

  Args:
    folder: local or `gs://`.
    parts: {split: rows}.
    options: all that a canvas depends on beside its row.
  """
  stamps = _stamps(row.path for rows in parts.values() for row in rows)
  files = {
      name: [(row.id, stamps[row.path], row.read_options()) for row in rows]
      for name, rows in parts.items()
  }
  return storage.join(folder, digest([VERSION, files, options]))


def read_notes(path: str) -> dict[str, Any] | None:
  """Returns what was stored beside the shards, or None where they are unfinished.

  Returns:
    {"options", "bad": [[row id, reason, detail]], "facts": {row id: facts}}, both in
    the order of the rows.
  """
  file = storage.join(path, NOTES)
  return json.loads(storage.read_bytes(file)) if storage.exists(file) else None


def digest(value: Any) -> str:
  """Returns a short hash of what JSON can hold."""
  return hashlib.sha256(to_json(value)).hexdigest()[:16]


def to_json(value: Any) -> bytes:
  """Returns JSON of one form only; what JSON has no word for becomes text."""
  return json.dumps(value, sort_keys=True, default=_plain).encode()


def _plain(value: Any) -> Any:
  if isinstance(value, np.ndarray | np.generic):
    return value.tolist()
  return str(value)


def _decode(head: bytes, flat: np.ndarray) -> Record:
  features = array_records.decode_head(head)
  facts = json.loads(features["facts"])
  return Record(
      flat.view(facts["dtype"]).reshape(facts["shape"]), features["spacing"],
      facts["source"], subject=facts["subject"], mean=facts["mean"], std=facts["std"],
      meta=facts["meta"],
  )


def _stamps(paths: Iterable[str]) -> dict[str, str]:
  """Returns {path: what changes when its file is replaced}, "" where there is none.

  One listing serves all objects of a bucket: a request each takes minutes.
  """
  paths = sorted(set(paths))
  stamps = {path: storage.stamp(path) for path in paths if not storage.is_remote(path)}
  buckets: dict[str, list[str]] = {}
  for path in paths:
    if storage.is_remote(path):
      buckets.setdefault(path.split("/")[2], []).append(path)
  for members in buckets.values():
    if len(members) == 1:
      stamps[members[0]] = storage.stamp(members[0])
      continue
    stamps |= _listed_stamps(members)
  return stamps


def _listed_stamps(paths: Sequence[str]) -> dict[str, str]:
  root = posixpath.commonpath([path[len("gs://"):] for path in paths])
  listed = storage.list_entries(f"gs://{root}")
  names = [entry.path for entry in listed]
  stamps = {}
  for path in paths:
    first, last = bisect.bisect_left(names, path), bisect.bisect_left(names, f"{path}0")
    # A file is one entry, a folder all that lie below it ("0" comes after "/").
    own = [
        f"{entry.path} {entry.stamp}" for entry in listed[first:last]
        if entry.path == path or entry.path.startswith(f"{path}/")
    ]
    stamps[path] = digest(own) if own else ""
  return stamps
