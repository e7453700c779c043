"""From a manifest row to its canvas: reading, host operations, resampling, keeping."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
import functools
import math
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
# Movies whose window is kept; a run reads one after the other, or a few side by side.
_KEPT_WINDOWS = 4096


@dataclasses.dataclass(frozen=True)
class Transform:
  """Row -> canvas Record with fixed options; the same in any process.

  Attributes: as in `pipeline.open_data`; `reader` and each of `ops` are pairs of
  (option, value), so that equal options are equal keys of a cache. `percentiles` are
  those of a movie's voxels that become the ends of the range, for rows of frames.
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
  require_time_step: bool = False
  reader: Step = ()
  ops: tuple[Step, ...] = ()
  seed: int = 0
  percentiles: tuple[float, float] = (0.5, 99.8)

  def __call__(
      self, row: Row, look: Callable[[Record], None] | None = None
  ) -> Record:
    """Reads a row's file onto the canvas; `look` is shown the recording as read.

    What the row states (axes, key, series, time step, spacing) wins over `reader`.

    Raises:
      ReadError: with a reason code, where the file cannot be used.
    """
    record = self._read(row)
    if look:
      look(record)
    if not row.window:
      return self._to_canvas(row, record)
    # By its text: NaN spacings that were pickled are no longer equal to themselves.
    options = {k: v for k, v in row.read_options().items() if k != "frame"}
    window = _window(self, repr((row.window, options))).found(row)
    canvas = self._to_canvas(row, window.apply(record, self.dtype))
    return dataclasses.replace(canvas, mean=window.mean, std=window.std)

  def _read(self, row: Row) -> Record:
    stated, reader = row.read_options(), dict(self.reader)
    common = reader.pop("manifest_spacing", (math.nan,) * 3)
    stated["manifest_spacing"] = tuple(
        c if math.isnan(own) else own
        for c, own in zip(common, stated["manifest_spacing"], strict=True)
    )
    record = readers.read(row.path, **{
        "modalities": self.modalities, "colour": self.colour,
        "max_voxels": self.max_voxels, **reader, **stated,
    })
    if row.window and len(record.volume) != 1:
      # Fiji calls any stack whose meaning it was not told TYX.
      raise ReadError(
          row.path, "ambiguous_axes",
          f"one time point of a movie, but it holds {len(record.volume)} of its own: "
          f"its axes are {record.meta.get('axes') or 'not named'}",
          "give axes=\"ZYX\" in data.reader or in the manifest's column axes",
      )
    if row.window and row.frame is None:
      # T is the folder's: what a file of one time point says is not from it to the next.
      step = stated.get("time_step_s") or reader.get("time_step_s") or math.nan
      spacing = np.array([step, *record.spacing[1:]], np.float32)
      record = dataclasses.replace(record, spacing=spacing)
    return record

  def _to_canvas(self, row: Row, record: Record) -> Record:
    if self._ops:
      # One draw a recording or movie, whenever and wherever it is read: what should
      # differ from epoch to epoch is drawn on the device.
      whole = _frames_of(row)[0] if row.window else row
      place = zlib.crc32(whole.id.encode())
    for op in self._ops:
      record = op(record, np.random.default_rng([self.seed, place]))
    if self.require_spacing and np.isnan(record.spacing[1:]).any():
      raise ReadError(
          row.path, "missing_spacing",
          f"spacing in mm is {tuple(record.spacing[1:].tolist())}, and it is required",
      )
    if self.require_time_step and np.isnan(record.spacing[0]):
      raise ReadError(
          row.path, "missing_spacing", "time_step_s is unknown, and it is required",
          "give time_step_s in the manifest or in data.reader",
      )
    return ops.resample(
        record, canvas=self.canvas, policy=self.resample, fov_mm=self.fov_mm,
        spacing_mm=self.spacing_mm, dtype=self.dtype, min_size=self.min_size,
        max_voxels=self.max_voxels,
    )

  def check(self, *, of_movies: bool = False) -> None:
    """Refuses options that no file could be read with.

    Args:
      of_movies: whether the rows are time points of movies.

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
    faults += ops.op_faults(
        [dict(step) for step in self.ops], of_movies=of_movies
    )
    low, high = self.percentiles
    if not 0 <= low < high <= 100:
      faults.append(f"percentiles are {self.percentiles}, must rise within 0 .. 100")
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


@dataclasses.dataclass(frozen=True)
class Window:
  """What all time points of a movie share: range of values, size, mean and std.

  Attributes:
    low, high: values that become the ends of the range.
    shape: (Z, Y, X, C) of a time point as stored.
    stored: its type as stored.
    spacing: (dz, dy, dx) in mm, NaN where unknown.
    mean, std: of the voxels on the canvas, without padding.
  """

  low: float
  high: float
  shape: tuple[int, ...]
  stored: str
  spacing: tuple[float, float, float]
  mean: float = math.nan
  std: float = math.nan

  def apply(self, record: Record, dtype: str) -> Record:
    """Returns a time point in the movie's range: uint8, or float32 in 0..1 ("keep").

    Raises:
      ReadError: irregular_frames, where it is not of the movie's size, type or spacing.
    """
    shape, stored = _kind_of(record)
    for what, mine, wanted in (
        ("shape [Z, Y, X, C]", shape, self.shape), ("type", stored, self.stored),
    ):
      if mine != wanted:
        raise ReadError(
            record.source, "irregular_frames",
            f"a time point of {what} {mine} in a movie of {wanted}",
        )
    mine = tuple(record.spacing[1:].tolist())
    if not np.allclose(mine, self.spacing, rtol=1e-3, equal_nan=True):
      raise ReadError(
          record.source, "irregular_frames",
          f"a time point of spacing {mine} mm in a movie of {self.spacing}",
      )
    if dtype == "uint8":
      volume = np.empty(record.volume.shape, np.uint8)
      ops.scale_to_uint8(
          np.ascontiguousarray(record.volume), self.low, 255 / (self.high - self.low),
          volume,
      )
    else:
      volume = ops.scale_range(record.volume, self.low, self.high, clip=True)
    return dataclasses.replace(record, volume=volume, mean=None, std=None)


class _Cell:
  """The window of one movie, found once by whoever asks first."""

  def __init__(self, transform: Transform):
    self._transform = transform
    self._lock = threading.Lock()
    self._answer: Window | ReadError | None = None

  def found(self, row: Row) -> Window:
    """Returns the window of the movie that a row is of; ReadError as `_find_window`."""
    with self._lock:
      if self._answer is None:
        try:
          self._answer = _find_window(self._transform, row)
        except ReadError as error:
          if error.reason == "unreachable":
            raise
          self._answer = error
    if isinstance(error := self._answer, ReadError):
      about = "" if error.path == row.path else f", as of {error.path}"
      raise ReadError(row.path, error.reason, error.detail + about, error.remedy)
    return self._answer


@functools.lru_cache(_KEPT_WINDOWS)
def _window(transform: Transform, movie: str) -> _Cell:
  del movie
  return _Cell(transform)


def _frames_of(row: Row) -> list[Row]:
  """Returns the rows of the time points that set a row's window, all of one movie."""
  return [
      dataclasses.replace(row, path=path, frame=frame, size=None, checksum="")
      for path, frame in row.window
  ]


def _kind_of(record: Record) -> tuple[tuple[int, ...], str]:
  """Returns what all time points of a movie have in common: shape and type."""
  return record.volume.shape[1:], record.stored_type


def _find_window(transform: Transform, row: Row) -> Window:
  """Reads the time points that set a movie's window; a bad one is passed over.

  Raises:
    ReadError: if all are bad, or hold one value only.
  """
  records, errors = [], []
  for frame in _frames_of(row):
    try:
      records.append((frame, transform._read(frame)))
    except ReadError as error:
      if error.reason == "unreachable":
        raise
      errors.append(error)
  if not records:
    raise errors[0]
  kinds = collections.Counter(_kind_of(record) for _, record in records)
  shape, stored = kinds.most_common(1)[0][0]
  records = [(f, record) for f, record in records if _kind_of(record) == (shape, stored)]
  spacing = tuple(records[0][1].spacing[1:].tolist())
  kind = np.result_type(*(record.volume for _, record in records))
  kind = kind if kind.name in ("uint8", "int16", "uint16") else np.dtype(np.float32)
  low, high = ops.percentiles(
      np.concatenate([record.volume.astype(kind) for _, record in records]),
      transform.percentiles,
  )
  if not low < high:
    raise ReadError(
        row.path, "constant",
        f"percentiles {transform.percentiles} of its movie are {low:g} and {high:g}",
    )
  window, means, squares = Window(low, high, shape, stored, spacing), [], []
  for frame, record in records:
    try:
      canvas = transform._to_canvas(frame, window.apply(record, transform.dtype))
    except ReadError as error:
      errors.append(error)
      continue
    means.append(canvas.mean)
    squares.append(canvas.std**2 + canvas.mean**2)
  if not means:
    raise errors[-1]
  mean = float(np.mean(means))
  std = math.sqrt(max(float(np.mean(squares)) - mean**2, 0.0))
  return dataclasses.replace(window, mean=mean, std=std)


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
