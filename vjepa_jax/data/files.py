"""From a manifest row to its canvas: reading, host operations, resampling, keeping."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
import functools
import threading
from typing import Any
import zlib

import numpy as np

from vjepa_jax.data import ops, readers
from vjepa_jax.data import pool as pool_lib
from vjepa_jax.data.ledger import Ledger
from vjepa_jax.data.manifest import Row
from vjepa_jax.data.record import ReadError, Record

Step = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Transform:
  """Row -> canvas Record with fixed options; the same in any process.

  Attributes: as in `pipeline.open_data`; `reader` and each of `ops` are pairs of
  (option, value), so that equal options are equal keys of a cache.
  """

  canvas: tuple[int, int, int] = (64, 384, 384)
  resample: str = "resize"
  fov_mm: tuple[float, float, float] = (6.0, 2.0, 6.0)
  spacing_mm: tuple[float, float, float] = (0.05, 0.02, 0.02)
  dtype: str = "uint8"
  modalities: tuple[str, ...] | None = None
  colour: str = "reject"
  min_size: tuple[int, int, int] = (1, 1, 1)
  max_voxels: int = readers.MAX_VOXELS
  require_spacing: bool = False
  reader: Step = ()
  ops: tuple[Step, ...] = ()
  seed: int = 0

  def __call__(
      self, row: Row, look: Callable[[Record], None] | None = None
  ) -> Record:
    """Reads a row's file onto the canvas; `look` is shown the recording as read.

    What the row states (axes, key, series, time step, spacing) wins over `reader`.

    Raises:
      ReadError: with a reason code, where the file cannot be used.
    """
    record = readers.read(row.path, **{
        "modalities": self.modalities, "colour": self.colour,
        "max_voxels": self.max_voxels, **dict(self.reader), **row.read_options(),
    })
    if look:
      look(record)
    for op in self._ops:
      # One draw a recording, whenever and wherever it is read: what should differ
      # from epoch to epoch is drawn on the device.
      draw = np.random.default_rng([self.seed, zlib.crc32(row.id.encode())])
      record = op(record, draw)
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

  def check(self) -> None:
    """Refuses options that no file could be read with.

    Raises:
      ValueError: as of the readers, the operations and `ops.resample`.
    """
    ops.check_options(self.resample, self.dtype)
    for name in ("canvas", "fov_mm", "spacing_mm", "min_size"):
      sizes = getattr(self, name)
      if len(sizes) != 3 or not min(sizes) > 0:
        raise ValueError(f"{name} is {sizes}, must be three numbers (Z, Y, X) above 0")
    reader = dict(self.reader)
    known = {field.name for field in dataclasses.fields(readers.ReadOptions)}
    faults = [f"reader: unknown option {key!r}" for key in sorted(reader.keys() - known)]
    faults += [f"reader: {fault}" for fault in readers.read_option_faults(reader)]
    faults += ops.op_faults([dict(step) for step in self.ops])
    if faults:
      raise ValueError("; ".join(faults))
    readers.ReadOptions(**{
        "modalities": self.modalities, "colour": self.colour,
        "max_voxels": self.max_voxels, **reader,
    })

  @functools.cached_property
  def _ops(self) -> list[Callable[..., Record]]:
    steps = [dict(step) for step in self.ops]
    return [ops.OPS[step.pop("name")](**step) for step in steps]

  def __getstate__(self) -> dict[str, Any]:
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def frozen(options: Mapping[str, Any]) -> Step:
  """Returns options as sorted pairs, at any depth, so that they can be compared."""
  def freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
      return frozen(value)
    return tuple(map(freeze, value)) if isinstance(value, list | tuple) else value

  return tuple(sorted((key, freeze(value)) for key, value in options.items()))


class Files:
  """Canvases read from files, kept in memory up to a budget.

  Args:
    transform: row -> canvas.
    ledger: notes what is good and bad.
    budget: bytes of canvases to keep.
    pool: worker processes that read; None reads in the caller's thread.
    group: volumes of one group must stack.
  """

  def __init__(
      self,
      transform: Transform,
      ledger: Ledger,
      budget: int,
      *,
      pool: pool_lib.Pool | None = None,
      group: Any = None,
  ):
    self.transform = transform
    self.ledger = ledger
    self._budget = budget
    self._pool = pool
    self._group = group
    self._lock = threading.Lock()
    self._kept: dict[str, Record] = {}

  def __getstate__(self) -> dict[str, Any]:
    # A copy reads for itself: gigabytes of canvases are not sent to it.
    return {
        **self.__dict__, "_kept": {}, "_lock": None, "_pool": None,
        "_budget": self._whole_budget(),
    }

  def __setstate__(self, state: dict[str, Any]):
    self.__dict__.update(state, _lock=threading.Lock())

  def read(self, row: Row) -> Record:
    """Returns a row's canvas, and notes how it went.

    Raises:
      ReadError: if the file is bad.
      DataError: if too many are, or if it is not the file's fault.
    """
    kept = self._kept.get(row.id)
    if kept is not None:
      return kept
    error = self.ledger.error_of(row)
    if error:
      raise error
    try:
      record = self._canvas(row)
    except ReadError as error:
      self.ledger.failed(row, error)
      raise
    self.accept(row, record)
    return record

  def accept(self, row: Row, record: Record) -> None:
    """Notes a canvas that was read, and keeps it while there is room."""
    self.ledger.good(row, record, group=self._group)
    with self._lock:
      if record.volume.nbytes <= self._budget and row.id not in self._kept:
        self._budget -= record.volume.nbytes
        self._kept[row.id] = record

  def note(self, row: Row, facts: Mapping[str, Any]) -> None:
    """Notes what is known of a canvas that was read before."""
    self.ledger.note_good(row, facts, group=self._group)

  def read_all(
      self,
      rows: Sequence[Row],
      threads: int,
      progress: Callable[[int, int], None] | None = None,
  ) -> Iterator[Record | None]:
    """Reads the rows side by side and yields in order; None for a bad file.

    Raises:
      DataError: as `read`.
    """

    def read(row: Row) -> Record | ReadError:
      try:
        return self._canvas(row)
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
          self.ledger.failed(row, found)
          yield None
        else:
          self.accept(row, found)
          yield found
        if progress:
          progress(done, len(rows))
    finally:
      pool.shutdown(cancel_futures=True)

  def _canvas(self, row: Row) -> Record:
    return self._pool.read(row) if self._pool else self.transform(row)

  def _whole_budget(self) -> int:
    with self._lock:
      return self._budget + sum(r.volume.nbytes for r in self._kept.values())
