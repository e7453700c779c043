"""A folder with one volume a time point, in the order of the number in their names.

`t9.tif` comes before `t10.tif`. Names differ in one number only, and its steps are
equal: a lost time point would make motion out of a gap. Volumes are of one shape, one
type and one spacing.
"""

from collections.abc import Iterator, Sequence
from concurrent import futures
import dataclasses
import itertools
import os
import re

import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.readers import arrays, nifti, tiff
from vjepa_jax.data.readers.base import ReadOptions, check_voxels
from vjepa_jax.data.record import ReadError, Record

_FORMATS = (nifti, tiff, arrays)
_ENDINGS = (".tif", ".tiff", ".btf", ".nii", ".nii.gz", ".npy")
# Notes that lie beside volumes and are none.
_NOTES = (
    ".txt", ".csv", ".tsv", ".json", ".xml", ".md", ".log", ".ini", ".yaml", ".yml",
    ".db", ".pdf", ".html",
)
_AHEAD = 3
# A number behind such a word counts people or scans, not time.
_NOT_TIME = re.compile(
    r"(^|[^a-z])(sub|subj|subject|pat|patient|participant|case|ses|session|run|scan|id)"
    r"[-_ ]*$", re.IGNORECASE,
)


def matches_folder(names: Sequence[str]) -> bool:
  """Says whether these files are volumes of one kind, two or more, and notes."""
  volumes = volumes_of(names)
  endings = {_ending(n) for n in volumes}
  return len(volumes) > 1 and len(endings) == 1 and "" not in endings


def read_folder(path: str, names: Sequence[str], options: ReadOptions) -> Record:
  """Reads a folder of volumes, one a time point.

  `options.axes` are those of one file; `time_step_s` is the time from one file to
  the next.

  Raises:
    ReadError: irregular_frames where names, numbers, shapes, types or spacings do
      not go together; otherwise as the format's reader.
  """
  ordered, numbers = _in_order(path, volumes_of(names))
  # A time point is one volume: T is the folder's.
  one = dataclasses.replace(options, time_step_s=None)
  records = _records(ordered, one)
  first = next(records)
  _check(first, first, path)
  shape = (len(ordered), *first.volume.shape[1:])
  check_voxels(shape, path, options.max_voxels)
  volume = np.empty(shape, first.volume.dtype)
  volume[0] = first.volume[0]
  for index, record in enumerate(records, 1):
    _check(record, first, path)
    if record.volume.dtype != volume.dtype:
      volume = volume.astype(_common(volume[:index], record.volume))
    volume[index] = record.volume[0]
  step = options.time_step_s or np.nan
  meta = dict(first.meta) | {
      "time_points": f"{numbers[0]}..{numbers[-1]} step {numbers[1] - numbers[0]}",
  }
  return Record(
      volume, np.array([step, *first.spacing[1:]], np.float32), path,
      subject=first.subject, meta=meta,
  )


def volumes_of(names: Sequence[str]) -> list[str]:
  """Returns the names that may be volumes: neither hidden nor notes.

  Nor what lies in a folder `tracks` beside one folder `images`, as NIH-LS has them.
  """
  found = [
      n for n in names
      if not os.path.basename(n).startswith(".") and not n.lower().endswith(_NOTES)
  ]
  folders = {os.path.dirname(n) for n in found}
  homes = [os.path.dirname(f) for f in folders if os.path.basename(f) == "images"]
  if len(homes) == 1:
    found = [n for n in found if not n.startswith(os.path.join(homes[0], "tracks/"))]
  return found


def _ending(name: str) -> str:
  return next((e for e in _ENDINGS if name.lower().endswith(e)), "")


def number_of(path: str, names: Sequence[str]) -> dict[int, str]:
  """Returns {number of the time point: name}, in order, gaps as they are.

  Args:
    path: the folder, for messages.
    names: its volumes, one or more; they differ in one number only.

  Raises:
    ReadError: irregular_frames, where the names number no time.
  """
  parts = {n: re.split(r"(\d+)", n[:len(n) - len(_ending(n))]) for n in names}
  first = parts[names[0]]
  for name, split in parts.items():
    if split[::2] != first[::2]:
      raise ReadError(
          path, "irregular_frames",
          f"{os.path.basename(names[0])} and {os.path.basename(name)} differ by more "
          "than a number",
      )
  columns = [[int(s[i]) for s in parts.values()] for i in range(1, len(first), 2)]
  varying = [column for column in columns if len(set(column)) > 1]
  if len(names) == 1:  # The last number, as in `embryo_1_t000`.
    varying = columns[-1:]
  if len(varying) != 1 or len(set(varying[0])) != len(names):
    raise ReadError(
        path, "irregular_frames",
        f"{len(varying)} numbers vary in names such as {os.path.basename(names[0])} "
        "and not one that differs in each",
        "keep one folder a channel or a view, its files numbered by time",
    )
  place = max(n for n, column in enumerate(columns) if column is varying[0])
  word = os.path.basename(first[2 * place])
  if _NOT_TIME.search(word):
    raise ReadError(
        path, "irregular_frames", f"{word!r} is followed by the number that varies: "
        "these look like recordings of their own",
        "name each file in the manifest, or rename time points to _t000, _t001, ...",
    )
  return dict(sorted(zip(varying[0], names)))


def _in_order(path: str, names: Sequence[str]) -> tuple[list[str], list[int]]:
  """Sorts names by the one number in which they differ; refuses gaps."""
  ordered = number_of(path, names)
  numbers = list(ordered)
  steps = {after - before for before, after in itertools.pairwise(numbers)}
  if len(steps) > 1:
    there, wanted = set(numbers), range(numbers[0], numbers[-1], min(steps))
    # Never a list of all: one odd name can make them billions.
    lost = itertools.islice((n for n in wanted if n not in there), 10)
    size = -((numbers[0] - numbers[-1]) // min(steps))  # Beyond what len() counts.
    count = size - sum(n in wanted for n in numbers)
    raise ReadError(
        path, "irregular_frames",
        f"{count} of {size + 1} time points are missing: {', '.join(map(str, lost))}",
        "copy the missing ones, or split the folder there",
    )
  return list(ordered.values()), numbers


def _records(names: Sequence[str], options: ReadOptions) -> Iterator[Record]:
  """Reads the files in order; the next ones are fetched meanwhile."""
  with futures.ThreadPoolExecutor(1) as pool:
    waiting = []
    for name in (*names, *[None] * _AHEAD):
      if name is not None:
        fetch = pool.submit(storage.read_bytes, name, max_bytes=options.max_bytes)
        waiting.append((name, fetch))
      if len(waiting) > _AHEAD or (name is None and waiting):
        path, fetched = waiting.pop(0)
        yield _read_one(fetched.result(), path, options)


def _read_one(data: bytes, path: str, options: ReadOptions) -> Record:
  head = data[:1024]
  for format_ in _FORMATS:
    if format_.matches(head, path):
      return format_.read(data, path, options)
  raise ReadError(
      path, "unsupported_format" if data else "empty_file", f"starts with {head[:8]!r}"
  )


def _check(record: Record, first: Record, path: str) -> None:
  """Refuses a time point that is unlike the first."""
  name = os.path.basename(record.source)
  if len(record.volume) != 1:
    raise ReadError(
        path, "irregular_frames",
        f"{name} holds {len(record.volume)} time points of its own",
    )
  for what, mine, wanted in (
      ("shape", record.volume.shape[1:], first.volume.shape[1:]),
      ("type", record.stored_type, first.stored_type),
  ):
    if mine != wanted:
      raise ReadError(
          path, "irregular_frames",
          f"{name} is of {what} {mine}, {os.path.basename(first.source)} of {wanted}",
      )
  if not np.allclose(record.spacing[1:], first.spacing[1:], rtol=1e-3, equal_nan=True):
    raise ReadError(
        path, "irregular_frames",
        f"{name} has spacing {record.spacing[1:].tolist()} mm, "
        f"{os.path.basename(first.source)} {first.spacing[1:].tolist()}",
    )


def _common(one: np.ndarray, other: np.ndarray) -> np.dtype:
  """Returns a type for both; files of 32 bits each became small by their own range."""
  if {one.dtype.kind, other.dtype.kind} <= set("iu"):
    low = min(int(one.min()), int(other.min()))
    high = max(int(one.max()), int(other.max()))
    for kind in (np.uint8, np.int16, np.uint16):
      if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
        return np.dtype(kind)
  return np.dtype(np.float32)
