"""Time points of embryos: which of them a split shows, and what is found of each.

A time point may be in several clips; what is said of it is the mean over them. The
stages that a number is measured against are the truth, where there is any: answers of
a model are something to agree with, and numbers against them are named so.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any

from absl import logging
import numpy as np

from vjepa_jax.data import clips as clips_lib
from vjepa_jax.evaluators.stage_metrics import UNKNOWN
from vjepa_jax.volumes import tiles

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TimePoints:
  """N time points of a split, movie by movie, in the order of time.

  Attributes:
    rows: int [R], rows of the split that show them, rising.
    places: int [R, T], which time point each one of these rows is.
    strides: float [R], numbers from one time point of a row to the next.
    movies: names, different ones.
    movie: int [N], a place in `movies`.
    embryos: [N], the participant.
    numbers: int [N], as in the names of the files.
    stages: int [N], those to learn from; -1 where unknown, as in the next two.
    truth: int [N], without what a model answered.
    answers: int [N], what a model answered.
  """

  rows: np.ndarray
  places: np.ndarray
  strides: np.ndarray
  movies: tuple[str, ...]
  movie: np.ndarray
  embryos: np.ndarray
  numbers: np.ndarray
  stages: np.ndarray
  truth: np.ndarray
  answers: np.ndarray

  def __len__(self) -> int:
    return len(self.numbers)

  @property
  def judged(self) -> tuple[str, np.ndarray]:
    """What numbers of labels begin with, and the stages that they are against.

    ("", truth) where any truth is known, else ("answers_", answers).
    """
    if (self.truth != UNKNOWN).any():
      return "", self.truth
    return "answers_", self.answers


@dataclasses.dataclass(frozen=True)
class Found:
  """What was found of time points.

  Attributes:
    values: float64 [N, V], NaN where not seen.
    minutes: float64 [N]; NaN where not seen, or where nobody knows the time step.
    seen: bool [N]; files that are read lazily may turn out bad.
  """

  values: np.ndarray
  minutes: np.ndarray
  seen: np.ndarray


def time_points(volumes: Any, place: str, *, once: bool = False) -> TimePoints:
  """Lists the time points of a split of clips.

  Args:
    volumes: of `data.splits`.
    place: who asks and of which split, for errors.
    once: whether to keep as few clips as show every time point (training clips
      overlap), not all of them.

  Raises:
    ValueError: if the rows are no clips, or no time point has a stage.
  """
  clips = list(volumes.rows)
  if not all(isinstance(row, clips_lib.Clip) for row in clips):
    raise ValueError(
        f"{place} holds recordings, not clips of movies: needs data.clip, and stages "
        "by data.stages"
    )
  by_movie: dict[tuple[str, str], list[int]] = {}
  for row, clip in enumerate(clips):
    by_movie.setdefault((clip.source, clip.movie), []).append(row)
  if once:
    by_movie = {movie: _fewest(clips, rows) for movie, rows in by_movie.items()}
  return _listed(clips, by_movie, volumes.labels, place)


def _fewest(clips, rows: list[int]) -> list[int]:
  """Picks rows of one movie that show each of its time points, once if possible."""
  kinds: dict[tuple[int, int], dict[int, int]] = {}
  for row in rows:
    kind = (len(clips[row].frames), clips[row].stride)
    kinds.setdefault(kind, {})[clips[row].start] = row
  found = []
  for (frames, stride), starts in kinds.items():
    numbers = {n for row in starts.values() for n in clips[row].numbers}
    kept = clips_lib.fewest_starts(starts, numbers, frames=frames, stride=stride)
    found += [starts[start] for start in kept]
  return found


def _listed(clips, by_movie, labels, place: str) -> TimePoints:
  label_id = {None: UNKNOWN} | {label: n for n, label in enumerate(labels)}
  found = {name: [] for name in ("movie", "embryos", "numbers")}
  stages = {name: [] for name in ("stages", "truth", "answers")}
  places = {}
  for movie, rows in enumerate(by_movie.values()):
    said = {name: {} for name in stages}
    for row in rows:
      for name in stages:
        names = getattr(clips[row], name) or (None,) * len(clips[row].frames)
        said[name] |= zip(clips[row].numbers, names, strict=True)
    numbers = sorted(said["stages"])
    at = {number: len(found["movie"]) + n for n, number in enumerate(numbers)}
    places |= {row: [at[number] for number in clips[row].numbers] for row in rows}
    found["movie"] += [movie] * len(numbers)
    found["embryos"] += [str(clips[rows[0]].participant)] * len(numbers)
    found["numbers"] += numbers
    for name, own in said.items():
      stages[name] += [label_id[own[number]] for number in numbers]
  stages = {name: np.array(ids, int) for name, ids in stages.items()}
  if not (stages["stages"] != UNKNOWN).any():
    raise ValueError(
        f"{place}: none of {len(found['movie'])} time points has a stage; say by "
        "data.stages where stages are, or leave this evaluator out"
    )
  kept = sorted(places)
  return TimePoints(
      rows=np.array(kept), places=np.array([places[row] for row in kept]),
      strides=np.array([clips[row].stride for row in kept], float),
      movies=_names(clips, by_movie), **stages,
      **{name: np.array(values) for name, values in found.items()},
  )


def _names(clips, by_movie) -> tuple[str, ...]:
  people = [str(clips[rows[0]].participant) for rows in by_movie.values()]
  return tuple(
      name if people.count(name) == 1 else f"{name} {people[:n].count(name) + 1}"
      for n, name in enumerate(people)
  )


def gather(
    points: TimePoints, batches: Iterable[Batch], of: Callable[[Batch], Any], place: str
) -> Found:
  """Gathers what is said of each time point; the mean where it is in several clips.

  Args:
    points: those of the split.
    batches: host batches of `points.rows`.
    of: batch -> [B, T, V], or [B, V], which is then of the middle time point (that
      of a clip's `label`).
    place: who asks, for errors.

  Raises:
    ValueError: for values of another T, or that are not finite.
  """
  length = points.places.shape[1]
  totals, counts = None, np.zeros(len(points))
  minutes = np.full(len(points), np.nan)
  for batch in batches:
    values = np.asarray(of(batch), np.float64)
    where = slice(None)
    if values.ndim == 2:
      values, where = values[:, None], slice(length // 2, length // 2 + 1)
    elif values.shape[1] != length:
      raise ValueError(
          f"{place}: values {values.shape} of clips of {length} time points, must be "
          f"[B, {length}, ...]; crop no time in augment.crop"
      )
    if totals is None:
      totals = np.zeros((len(points), values.shape[-1]))
    for row in np.flatnonzero(batch["_mask"]):
      clip = np.searchsorted(points.rows, batch["index"][row])
      at = points.places[clip, where]
      totals[at] += values[row]
      counts[at] += 1
      step_s = float(batch["spacing"][row][0]) / points.strides[clip]
      minutes[at] = points.numbers[at] * step_s / 60.0
  seen = counts > 0
  values = np.full((len(points), 0 if totals is None else totals.shape[1]), np.nan)
  if totals is not None:
    values[seen] = totals[seen] / counts[seen, None]
  if not seen.any() or not np.isfinite(values[seen]).all():
    raise ValueError(
        f"{place}: of {seen.sum()} time points that could be read, "
        f"{(~np.isfinite(values[seen]).all(axis=1)).sum()} have values that are not "
        "finite; needs one, and all finite"
    )
  return Found(values, minutes, seen)


def tiled(batch: Batch, tile: Sequence[int]) -> Iterator[Batch]:
  """Yields a host batch once for each tile of its volumes, saying which by crop_start.

  Args:
    batch: host batch, volume [B, T, Z, Y, X, C].
    tile: (T, Z, Y, X) voxels, as `augment.crop` cuts them; () yields it as it is.

  Raises:
    ValueError: for a tile larger than the volumes.
  """
  if not len(tile):
    yield batch
    return
  volume = batch["volume"]
  for start in tiles.tile_starts(volume.shape[1:5], tile):
    starts = np.broadcast_to(np.array(start, np.int32), (len(volume), 4))
    yield {**batch, "crop_start": starts}


def sequences(
    points: TimePoints, found: Found, place: str
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields each movie's name and its time points that were seen, int [t], in order.

  A movie whose time step is not known is passed over with a warning: nobody can say
  how far an embryo may develop within it.
  """
  for movie, name in enumerate(points.movies):
    at = np.flatnonzero((points.movie == movie) & found.seen)
    if not (np.diff(found.minutes[at]) > 0).all():
      logging.warning(
          "%s: the time step of %s is not known, so that its transitions are not "
          "judged; give the manifest a column time_step_s, or data.reader.time_step_s",
          place, name,
      )
    elif at.size:
      yield name, at
