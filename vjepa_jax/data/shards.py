"""Canvases written once as ArrayRecord shards, read back in any order.

A DICOM file costs tens of milliseconds to seconds to decode and resample, its
canvas a few to read. The shards are those of a tensorflow-datasets builder
(`file_format="array_record"`; TensorFlow is not needed), in a folder named by a
hash of the rows and the options, so that another canvas never meets them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import hashlib
import json
import os
import re
import shutil
from typing import Any
import zlib

import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.manifest import Row
from vjepa_jax.data.record import DataError, Record

_VERSION = "1.0.1"
_NOTES = "notes.json"
_SHARD_BYTES = 512 << 20


class Shards:
  """The canvases of one split, in the order written; opened on first use.

  Args:
    path: folder that `write` made.
    split: name of the split.
  """

  def __init__(self, path: str, split: str):
    self._path = path
    self._split = split
    self._source = None

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_source": None}  # A worker opens its own handles.

  def __len__(self) -> int:
    return len(self._open())

  def __getitem__(self, index: int) -> Record:
    """Returns one canvas.

    Raises:
      DataError: if what was stored is damaged (ArrayRecord holds checksums).
    """
    try:
      example = self._open()[index]
      facts = json.loads(example["facts"])
    except (ValueError, RuntimeError) as error:
      raise DataError(
          f"{self._path}: {self._split} {index} is damaged ({error}); delete the "
          "folder to write it again"
      ) from error
    return Record(
        np.frombuffer(example["volume"], facts["dtype"]).reshape(facts["shape"]),
        example["spacing"], facts["source"], subject=facts["subject"],
        mean=facts["mean"], std=facts["std"], meta=facts["meta"],
    )

  def _open(self):
    if self._source is None:
      builder = _tfds().builder_from_directory(self._path)
      self._source = builder.as_data_source(split=_name_of(self._split))
    return self._source


def locate(
    folder: str, parts: Mapping[str, Sequence[Row]], options: Mapping[str, Any]
) -> str:
  """Returns the folder for the canvases of these rows under these options.

  Raises:
    ValueError: if `folder` is in a bucket; a cache is local.
  """
  if storage.is_remote(folder):
    raise ValueError(f"cache={folder!r}: a cache folder must be local")
  files = {
      name: [(row.path, storage.stamp(row.path), row.spacing) for row in rows]
      for name, rows in parts.items()
  }
  text = json.dumps([_VERSION, files, options], sort_keys=True, default=str)
  return os.path.join(folder, hashlib.sha256(text.encode()).hexdigest()[:16])


def read_notes(path: str) -> dict[str, Any] | None:
  """Returns what was stored beside the shards, or None where there are none."""
  file = os.path.join(path, _NOTES)
  return json.loads(storage.read_bytes(file)) if os.path.exists(file) else None


def write(
    path: str,
    streams: Mapping[str, Iterable[Record]],
    finish: Callable[[], Mapping[str, Any]],
) -> None:
  """Writes canvases in order, reads them back, then gives them their name.

  Until the last step everything lies in a folder of another name, so that a run
  cut short leaves nothing that a later one would trust.

  Args:
    path: folder to make.
    streams: {split: canvases}.
    finish: called when all are written; what it returns is stored as notes, and
      what it raises leaves no cache behind.

  Raises:
    DataError: if a split is empty or what is read back differs.
  """
  partial = f"{path}.writing-{os.getpid()}"
  shutil.rmtree(partial, ignore_errors=True)
  os.makedirs(partial)
  try:
    sums = _write_splits(partial, streams)
    notes = finish()
    _verify(partial, sums)
    storage.write_bytes(
        os.path.join(partial, _NOTES), json.dumps(notes, default=str).encode()
    )
    try:
      os.rename(partial, path)
    except OSError:
      if read_notes(path) is None:  # Else another process was first: same canvases.
        raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _write_splits(
    path: str, streams: Mapping[str, Iterable[Record]]
) -> dict[str, list[int]]:
  tfds = _tfds()
  info = tfds.core.DatasetInfo(
      builder=tfds.core.DatasetIdentity(
          name="canvases", version=tfds.core.Version(_VERSION), data_dir=path,
          module_name=__name__,
      ),
      description="Canvases of vjepa_jax.",
      features=tfds.features.FeaturesDict({
          "volume": tfds.features.Tensor(shape=(), dtype=np.object_),
          "spacing": tfds.features.Tensor(shape=(4,), dtype=np.float32),
          "facts": tfds.features.Text(),
      }),
  )
  sums: dict[str, list[int]] = {name: [] for name in streams}
  writer = None
  for name, records in streams.items():
    for record in records:
      if writer is None:
        # The builder that generates sorts all examples of a split in memory; the
        # sequential writer holds one.
        writer = tfds.core.SequentialWriter(
            info, max(1, _SHARD_BYTES // record.volume.nbytes),
            file_format="array_record",
        )
        writer.initialize_splits([_name_of(n) for n in streams])
      example = _encode(record)
      sums[name].append(zlib.crc32(example["volume"]))
      writer.add_examples({_name_of(name): [example]})
  if writer is not None:
    writer.close_all()
  return sums


def _encode(record: Record) -> dict[str, Any]:
  facts = {
      "shape": record.volume.shape, "dtype": record.volume.dtype.name,
      "mean": record.mean, "std": record.std, "source": record.source,
      "subject": record.subject, "meta": dict(record.meta),
  }
  return {
      "volume": record.volume.tobytes(), "spacing": record.spacing,
      "facts": json.dumps(facts, default=str),
  }


def _name_of(split: str) -> str:
  """Returns a name that tensorflow-datasets takes; "all" is its own, "a+b" a sum."""
  return "part_" + re.sub(r"\W", "_", split)


def _verify(path: str, sums: Mapping[str, Sequence[int]]):
  for name, expected in sums.items():
    if not expected:
      raise DataError(f"split {name} has no good file left to cache")
    found = Shards(path, name)
    if len(found) != len(expected):
      raise DataError(
          f"{path}: {name} holds {len(found)} canvases, {len(expected)} were written"
      )
    for index, crc in enumerate(expected):
      if zlib.crc32(np.ascontiguousarray(found[index].volume)) != crc:
        raise DataError(f"{path}: {name} {index} reads back differently")


def _tfds():
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  return tfds
