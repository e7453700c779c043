"""Clips of movies: which time points an embryo has, and which make a clip together.

A row of the manifest is a movie: a folder with one TIFF a time point (also with the
folders `images` and `tracks` in it), or one TIFF of all. Each time point is read, kept
and judged by itself, once, however many clips it is in; a clip joins the canvases of
its time points. All of a movie share one range of values, one mean and one standard
deviation: what flickers or bleaches stays to be seen.

Time points that are missing or bad lose the clips that need them, and movies shorter
than a clip are lost; all are counted.
"""

import bisect
import collections
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
import copy
import dataclasses
import itertools
import math
import re
from typing import Any

from absl import logging
import numpy as np

from vjepa_jax.data import shards, storage
from vjepa_jax.data import stages as stages_lib
from vjepa_jax.data.manifest import Row
from vjepa_jax.data.readers import ReadOptions, tiff, time_points
from vjepa_jax.data.record import DataError, ReadError, Record

# Time points that set a movie's range of values, evenly over it.
_WINDOW_FRAMES = 9
_IMAGES = "images"
_TIFF = re.compile(r"(\.ome)?\.(tiff?|btf)$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class ClipOptions:
  """How movies are cut into clips.

  Attributes:
    frames: time points of a clip.
    stride: from one time point of a clip to its next.
    step: from the start of a training clip to the next one's.
    eval_step: the same in other splits; 0: as few clips as show each time point.
    time_blocks: 0: whole movies go to a split, by participant. n: each movie's time is
      cut into n stretches, and each of them shared out between the splits, in their
      order, with a gap between: for few movies. Neighbours in time are alike, so such
      splits say less.
    gap: time points left out between two splits of a movie; None: those that a clip
      spans.

  Raises:
    ValueError: for an option out of range; names all that are.
  """

  frames: int
  stride: int = 1
  step: int = 1
  eval_step: int = 0
  time_blocks: int = 0
  gap: int | None = None

  def __post_init__(self):
    faults = clip_option_faults(dataclasses.asdict(self))
    if faults:
      raise ValueError("clip: " + "; ".join(faults))

  @property
  def span(self) -> int:
    """Time points from the first to the last of a clip, both counted."""
    return (self.frames - 1) * self.stride + 1


def clip_option_faults(options: Mapping[str, Any]) -> list[str]:
  """Says what is wrong with fields of `ClipOptions`; an empty list is well."""
  known = {field.name: field for field in dataclasses.fields(ClipOptions)}
  faults = [
      f"{name}: unknown key; closest: {', '.join(sorted(known))}"
      for name in options if name not in known
  ]
  if "frames" not in options:
    faults.append("frames: missing, the time points of a clip")
  for name, least in (
      ("frames", 1), ("stride", 1), ("step", 1), ("eval_step", 0), ("time_blocks", 0),
      ("gap", 0),
  ):
    value = options.get(name)
    if value is not None and (
        not isinstance(value, int) or isinstance(value, bool) or value < least
    ):
      faults.append(f"{name} is {value!r}, must be a whole number of at least {least}")
  return faults


@dataclasses.dataclass(frozen=True)
class Clip(Row):
  """A clip as a row of a split: `frames` are the rows of its time points.

  Attributes:
    start: number of its first time point, as in the name of the file.
    stride: numbers from one of its time points to the next.
    hop: time points from one of its time points to the next.
    frames: a row each.
    stages: names of the stages, None where unknown; () where nobody asked.
    truth: the same without what a model answered; () where only a model was asked.
    answers: what a model answered, whoever decided; () where none was asked.
  """

  start: int = 0
  stride: int = 1
  hop: int = 1
  frames: tuple[Row, ...] = ()
  stages: tuple[str | None, ...] = ()
  truth: tuple[str | None, ...] = ()
  answers: tuple[str | None, ...] = ()

  @property
  def id(self) -> str:
    """The movie, and which of its time points."""
    return f"{self.movie}::t{self.start}+{len(self.frames)}x{self.stride}"

  @property
  def movie(self) -> str:
    """The movie that it is cut from."""
    return super().id

  @property
  def numbers(self) -> tuple[int, ...]:
    """Numbers of the time points."""
    return tuple(self.start + n * self.stride for n in range(len(self.frames)))


@dataclasses.dataclass(frozen=True)
class Movie:
  """The time points of one row of a manifest.

  Attributes:
    row: of the manifest.
    homes: the embryo's folders, where labels lie, as of `homes_of`.
    frames: {number: row of the time point}, in order.
    step: from one number to the next, where none is missing.
    assumed: axes of its one file, where neither that nor anyone else names them; "".
  """

  row: Row
  homes: tuple[str, ...]
  frames: Mapping[int, Row]
  step: int
  assumed: str = ""

  @property
  def missing(self) -> int:
    """How many time points between the first and the last are not there."""
    numbers = list(self.frames)
    return (numbers[-1] - numbers[0]) // self.step + 1 - len(numbers)


@dataclasses.dataclass(frozen=True)
class _Share:
  """What a split may use of a movie: numbers of time points, in stretches."""

  movie: Movie
  split: str
  stretches: Sequence[Sequence[int]]
  known: Mapping[str, stages_lib.Stages] | None


@dataclasses.dataclass(frozen=True)
class Cut:
  """Movies cut into clips.

  Attributes:
    frames: {split: rows of the time points that its clips need}.
    clips: {split: clips}.
    lost: movies of which nothing is left, with the reason.
    facts: counts for the report.
    stage_facts: the same of the stages; {} where nobody asked.
  """

  frames: dict[str, list[Row]]
  clips: dict[str, list[Clip]]
  lost: list[tuple[Row, str]]
  facts: dict[str, Any]
  stage_facts: dict[str, Any]
  _shares: Sequence[_Share] = dataclasses.field(repr=False)
  _tally: "_Tally" = dataclasses.field(repr=False)

  def without(self, is_bad: Callable[[Row], bool]) -> "Cut":
    """Cuts again without the time points that are bad, and counts what is left.

    A clip that shows each time point once is chosen anew about a gap: what is good
    beside a bad one stays.
    """
    if not any(is_bad(row) for rows in self.frames.values() for row in rows):
      return self
    return _joined(self._shares, self.lost, self._tally, is_bad)

  def movies(self) -> list[Movie]:
    """Returns the movies that were cut."""
    return list({share.movie.row.id: share.movie for share in self._shares}.values())


def max_start(length: int, frames: int, stride: int) -> int:
  """Returns the last place where a clip can start; negative where none can."""
  return length - (frames - 1) * stride - 1


def homes_of(path: str) -> tuple[str, ...]:
  """Returns the folders where a movie's labels may lie, in the order of asking.

  Of a folder of time points: itself, or the one that its folder `images` is in. Of
  one TIFF, `FOLDER/NAME.tif`: `FOLDER/NAME`, then `FOLDER`, whose labels count where
  no other movie of the manifest may have them.

  Args:
    path: of the manifest.
  """
  home = path.rstrip("/")
  name = _TIFF.sub("", home)
  if name != home:
    return name, storage.parent(home)
  return (storage.parent(home) if storage.basename(home) == _IMAGES else home,)


def list_movie(row: Row, reader: Mapping[str, Any] | None = None) -> Movie:
  """Lists the time points of a row; no voxel is read.

  Args:
    row: a folder of one TIFF a time point, or one with such a folder `images` in it
      (what lies beside that is passed over), or a TIFF with an axis T.
    reader: further fields of `ReadOptions`; what the row states wins.

  Raises:
    ReadError: missing_file, empty_file (no time point), irregular_frames (the names
      number no time, or not evenly), or as a file's header.
  """
  if not storage.is_folder(row.path):
    return _list_one_file(row, reader or {})
  names = [
      n for n in time_points.volumes_of(storage.list_files(row.path)) if _TIFF.search(n)
  ]
  images = storage.join(row.path, _IMAGES) + "/"
  names = [n for n in names if n.startswith(images)] or names
  if not names:
    raise ReadError(row.path, "empty_file", "no TIFF of a time point in this folder")
  found = time_points.number_of(row.path, names)
  frames = {
      number: dataclasses.replace(row, path=name, size=None, checksum="")
      for number, name in found.items()
  }
  return Movie(
      row, homes_of(row.path), _with_window(frames), _step_of(row.path, list(found))
  )


def _list_one_file(row: Row, reader: Mapping[str, Any]) -> Movie:
  options = ReadOptions(**{**reader, **row.read_options()})
  count = tiff.count_frames(row.path, options)
  frames = {n: dataclasses.replace(row, frame=n) for n in range(count)}
  axes, origin = tiff.movie_axes(row.path, options) if count == 1 else ("", "")
  return Movie(
      row, homes_of(row.path), _with_window(frames), 1,
      axes if origin == "assumed" else "",
  )


def _step_of(path: str, numbers: Sequence[int]) -> int:
  """Returns the step between numbers; some of its multiples may be missing."""
  steps = {after - before for before, after in itertools.pairwise(numbers)}
  step = min(steps, default=1)
  uneven = [s for s in steps if s % step]
  if uneven:
    raise ReadError(
        path, "irregular_frames",
        f"numbers of time points go on by {step} and by {min(uneven)}",
        "number the time points evenly",
    )
  return step


def _with_window(frames: Mapping[int, Row]) -> dict[int, Row]:
  rows = list(frames.values())
  places = np.linspace(0, len(rows) - 1, min(_WINDOW_FRAMES, len(rows)))
  window = tuple((rows[n].path, rows[n].frame) for n in places.round().astype(int))
  return {
      number: dataclasses.replace(row, window=window) for number, row in frames.items()
  }


def starts(numbers: Collection[int], *, frames: int, stride: int, step: int) -> list[int]:
  """Returns where clips start whose time points are all there.

  Args:
    numbers: of the time points.
    frames: of a clip.
    stride: between its numbers.
    step: between the starts, counted from the first number; 0: as few clips as show
      each time point that a clip can show, none twice where it can be helped.
  """
  there = set(numbers)
  valid = [
      number for number in sorted(there)
      if all(number + n * stride in there for n in range(1, frames))
  ]
  if step:
    first = min(there, default=0)
    return [number for number in valid if (number - first) % step == 0]
  return fewest_starts(valid, there, frames=frames, stride=stride)


def fewest_starts(
    valid: Iterable[int], numbers: Iterable[int], *, frames: int, stride: int
) -> list[int]:
  """Returns those of the valid starts that together show what all of them show.

  As few as can be, and none of the numbers twice where it can be helped.

  Args:
    valid: where clips can start.
    numbers: of the time points to show.
    frames: of a clip.
    stride: between its numbers.
  """
  found: set[int] = set()
  shown: set[int] = set()
  possible = set(valid)
  for number in sorted(numbers):
    if number in shown:
      continue
    start = next(
        (s for n in range(frames) if (s := number - n * stride) in possible), None
    )
    if start is not None:
      found.add(start)
      shown.update(start + n * stride for n in range(frames))
  return sorted(found)


def time_parts(
    numbers: Sequence[int], fractions: Mapping[str, float], *, blocks: int, gap: int,
    step: int = 1,
) -> dict[str, list[list[int]]]:
  """Shares a movie's time out between splits.

  Args:
    numbers: of the time points, in order.
    fractions: {split: share}.
    blocks: stretches that are shared out each.
    gap: time points left out between two parts.
    step: between two numbers where none is missing.

  Returns:
    {split: its parts, in order}; between any two of different splits lie at least
    `gap` time points that are in none.
  """
  length = (numbers[-1] - numbers[0]) // step + 1
  shares = np.cumsum([0.0, *fractions.values()])
  shares /= shares[-1]
  ends = [
      (block + share) * length / blocks for block in range(blocks) for share in shares[1:]
  ]
  cuts = [0, *(round(end) for end in ends)]
  cuts[-1] = length + gap  # No gap behind the last part.
  parts: dict[str, list[list[int]]] = {name: [] for name in fractions}
  names = list(fractions) * blocks
  for name, first, last in zip(names, cuts, cuts[1:]):
    low, high = (
        bisect.bisect_left(numbers, numbers[0] + step * place)
        for place in (first, max(first, last - gap))
    )
    parts[name].append(list(numbers[low:high]))
  return parts


def cut(
    parts: Mapping[str, Sequence[Row]],
    options: ClipOptions,
    *,
    fractions: Mapping[str, float] | None = None,
    stages: stages_lib.StageOptions | None = None,
    train: str = "train",
    reader: Mapping[str, Any] | None = None,
    listed: Iterable[Row] | None = None,
) -> Cut:
  """Cuts the movies of all splits into clips.

  Args:
    parts: {split: rows}; with `time_blocks` one entry of any name.
    options: of the clips.
    fractions: {split: share} of the time, for `time_blocks`.
    stages: where the stages of the time points come from; None: there are none.
    train: the split whose clips start by `step`.
    reader: further fields of `ReadOptions`; what a row states wins.
    listed: rows that may have labels of their own, here or not; None: those of parts.

  Raises:
    DataError: if a file of labels is no such file, or several movies would read it.
    ReadError: if a bucket cannot be reached.
  """
  names = list(fractions) if options.time_blocks else list(parts)
  if listed is None:
    listed = itertools.chain.from_iterable(parts.values())
  tally = _Tally(names, options, stages, listed, train)
  shares: list[_Share] = []
  lost: list[tuple[Row, str]] = []
  for split, rows in parts.items():
    for row in rows:
      try:
        movie = _long_enough(list_movie(row, reader), options)
      except ReadError as error:
        if error.reason == "unreachable":
          raise
        logging.warning("lost %s", error)
        lost.append((row, error.reason))
        continue
      known = tally.stages_of(movie)
      own = [
          _Share(movie, name, stretches, known) for name, stretches
          in _pieces(movie, split, options, fractions).items()
      ]
      if not any(
          starts(
              numbers, frames=options.frames, stride=options.stride * movie.step,
              step=movie.step,
          ) for share in own for numbers in share.stretches
      ):
        length = len(movie.frames) + movie.missing
        short = max_start(length, options.frames, options.stride) < 0
        lost.append((row, "shorter_than_clip" if short else "no_whole_clip"))
        continue
      shares += own
  return _joined(shares, lost, tally)


def _joined(
    shares: Sequence[_Share], lost: list[tuple[Row, str]], tally: "_Tally",
    is_bad: Callable[[Row], bool] = lambda row: False,
) -> Cut:
  """Returns the clips of all movies, none with a bad time point, and their counts."""
  tally = tally.afresh()
  frames: dict[str, list[Row]] = {name: [] for name in tally.splits}
  clips: dict[str, list[Clip]] = {name: [] for name in tally.splits}
  for share in shares:
    bad = {n for n, row in share.movie.frames.items() if is_bad(row)}
    own = [
        clip for numbers in share.stretches
        for clip in _clips_of(
            share.movie, numbers, tally.options, share.split == tally.train,
            share.known, bad,
        )
    ]
    used = {n: f for clip in own for n, f in zip(clip.numbers, clip.frames)}
    clips[share.split] += own
    frames[share.split] += [used[n] for n in sorted(used)]
    tally.note(share, own, used, bad)
  return Cut(
      frames, clips, lost, tally.facts(shares), tally.stage_facts(), shares, tally
  )


def check_apart(movies: Iterable[Movie]) -> None:
  """Refuses movies that have a time point in common: splits would share it.

  Raises:
    DataError: naming the two rows and a time point.
  """
  of: dict[tuple[str, int | None], Row] = {}
  for movie in movies:
    for frame in movie.frames.values():
      other = of.setdefault((storage.plain(frame.path), frame.frame), movie.row)
      if other is not movie.row:
        raise DataError(
            f"{other.path} and {movie.row.path} are two rows and hold the same time "
            f"point {frame.path}; keep one"
        )


def _long_enough(movie: Movie, options: ClipOptions) -> Movie:
  """Returns the movie; refuses one that is short because nobody named its axes."""
  if movie.assumed and len(movie.frames) < options.span:
    raise ReadError(
        movie.row.path, "ambiguous_axes",
        f"nobody names its axes: taken as {movie.assumed} it is one time point",
        "write it with its axes (tifffile: metadata={\"axes\": \"TZYX\"}); where its "
        "planes are time points, give axes=\"TYX\" in data.reader or in the manifest's "
        "column axes",
    )
  return movie


def _pieces(
    movie: Movie, split: str, options: ClipOptions,
    fractions: Mapping[str, float] | None,
) -> dict[str, list[list[int]]]:
  """Returns the numbers of a movie that each split may use, in stretches."""
  numbers = list(movie.frames)
  if not options.time_blocks:
    return {split: [numbers]}
  gap = options.span if options.gap is None else options.gap
  return time_parts(
      numbers, fractions, blocks=options.time_blocks, gap=gap, step=movie.step
  )


def _clips_of(
    movie: Movie, numbers: Sequence[int], options: ClipOptions, train: bool,
    known: Mapping[str, stages_lib.Stages] | None, bad: Collection[int] = (),
) -> Iterable[Clip]:
  if not numbers:
    return
  stride = options.stride * movie.step
  step = options.step if train else options.eval_step
  shape = dict(frames=options.frames, stride=stride)
  if not step:
    places = starts([n for n in numbers if n not in bad], **shape, step=0)
  else:
    # Counted from the first, be that bad or not.
    places = [
        start for start in starts(numbers, **shape, step=step * movie.step)
        if not any(start + n * stride in bad for n in range(options.frames))
    ]
  own = {f.name: getattr(movie.row, f.name) for f in dataclasses.fields(Row)}
  for start in places:
    used = [start + n * stride for n in range(options.frames)]
    clip = {
        **own, "start": start, "stride": stride, "hop": options.stride,
        "frames": tuple(movie.frames[n] for n in used),
    }
    for field, stages in (known or {}).items():
      clip[field] = tuple(stages.get(n) for n in used)
    if "stages" in clip:
      clip["label"] = clip["stages"][len(used) // 2]
    yield Clip(**clip)


class _Tally:
  """What there is to say of movies, clips and stages."""

  def __init__(
      self, splits: Sequence[str], options: ClipOptions,
      stages: stages_lib.StageOptions | None, listed: Iterable[Row], train: str,
  ):
    self.splits, self.options, self.train = tuple(splits), options, train
    self._stages = stages
    self._sharers = stages_lib.sharers_of(
        stages, {row.id: (homes_of(row.path), row.participant) for row in listed}
    ) if stages else {}
    self._losses: stages_lib.Losses = collections.Counter()
    self._without: list[str] = []
    self._warned: list[str] = []
    self._clear()

  def _clear(self) -> None:
    self._counts = {name: collections.Counter() for name in self.splits}
    self._shown = {name: collections.Counter() for name in self.splits}

  def afresh(self) -> "_Tally":
    """Returns one that knows the movies and has counted no clip."""
    other = copy.copy(self)
    other._clear()
    return other

  def stages_of(self, movie: Movie) -> dict[str, stages_lib.Stages] | None:
    """Returns what goes into the fields of its clips: stages, truth, answers."""
    if self._stages is None:
      return None
    told, losses = stages_lib.by_source(
        self._stages, movie.homes, movie.row.participant, list(movie.frames),
        sharers=self._sharers,
    )
    self._losses += losses
    fields = {"stages": stages_lib.joined(told.values())}
    if not fields["stages"]:
      self._without.append(movie.row.id)
    if "answers" in told:
      fields["answers"] = told.pop("answers")
    if told:
      fields["truth"] = stages_lib.joined(told.values())
    return fields

  def note(
      self, share: _Share, clips: Sequence[Clip], used: Collection[int],
      bad: Collection[int],
  ) -> None:
    there = [number for stretch in share.stretches for number in stretch]
    damaged = sum(number in bad for number in there)
    self._counts[share.split].update(
        movies=int(bool(clips)), clips=len(clips), time_points=len(used),
        in_no_clip=len(there) - damaged - len(used), bad=damaged,
    )
    if share.known is not None:
      stages = share.known["stages"]
      self._shown[share.split].update(stages.get(number) for number in used)

  def facts(self, shares: Sequence[_Share]) -> dict[str, Any]:
    movies = {share.movie.row.id: share.movie for share in shares}.values()
    shared_out = sum(len(part) for share in shares for part in share.stretches)
    options = self.options
    return {
        "frames": options.frames, "stride": options.stride,
        "time_blocks": options.time_blocks,
        "missing_time_points": sum(movie.missing for movie in movies),
        "in_gaps": sum(len(movie.frames) for movie in movies) - shared_out,
        "splits": {name: dict(counts) for name, counts in self._counts.items()},
    }

  def stage_facts(self) -> dict[str, Any]:
    """Returns counts by split and class, losses, and classes that training lacks."""
    if self._stages is None:
      return {}
    classes = self._stages.classes
    shown_in_training = self._shown.get(self.train, {})
    absent = [c for c in classes if not shown_in_training.get(c)]
    elsewhere = {
        name: wanted for name, shown in self._shown.items()
        if (wanted := {c: shown[c] for c in absent if shown[c]})
    }
    if set(absent) - set(self._warned):
      self._warned[:] = absent
      logging.warning(
          "no time point of the split %s shows the stages %s; other splits: %s",
          self.train, ", ".join(absent), elsewhere or "neither",
      )
    return {
        "taxonomy": self._stages.taxonomy, "classes": list(classes),
        "sources": list(self._stages.sources),
        "time_points": {
            name: {c: shown[c] for c in classes} | {"without": shown[None]}
            for name, shown in self._shown.items()
        },
        "dropped": dict(sorted(self._losses.items(), key=lambda kv: (-kv[1], kv[0]))),
        "movies_without": self._without,
        "absent_from_training": absent, "absent_but_elsewhere": elsewhere,
    }


class Canvases:
  """Joins the canvases of a clip's time points; picklable.

  Args:
    store: canvases of the time points: anything with `read(row)`, or shards.
    rows: of the time points in the shards, in their order.
  """

  def __init__(self, store: Any, rows: Sequence[Row] = ()):
    self._store = store
    self._places = {row.id: n for n, row in enumerate(rows)}

  def read(self, clip: Clip) -> Record:
    """Returns the clip, [T, Z, Y, X, C].

    Raises:
      ReadError: if one of its time points is bad.
      DataError: if too many files are, or it is not the file's fault.
    """
    records = [self._one(row) for row in clip.frames]
    shapes = {record.volume.shape for record in records}
    if len(shapes) > 1:
      raise DataError(f"{clip.id}: canvases of the shapes {sorted(shapes)} in one clip")
    first = records[0]
    means = np.array([record.mean for record in records])
    squares = np.array([record.std for record in records]) ** 2 + means**2
    spacing = first.spacing * np.array([clip.hop, 1, 1, 1], np.float32)
    return Record(
        np.concatenate([record.volume for record in records]), spacing, clip.id,
        subject=first.subject, mean=float(means.mean()),
        std=math.sqrt(max(float(squares.mean() - means.mean() ** 2), 0.0)),
        meta={**first.meta, "start": clip.start, "stride": clip.stride},
    )

  def _one(self, row: Row) -> Record:
    if isinstance(self._store, shards.Shards):
      return self._store[self._places[row.id]]
    return self._store.read(row)


def with_stages(clips: Iterable[Clip]) -> set[str]:
  """Returns the participants of whom a clip has a time point with a stage."""
  return {clip.participant for clip in clips if any(clip.stages)}


def check_parts(
    clips: Mapping[str, Sequence[Clip]], options: ClipOptions
) -> None:
  """Refuses splits without a clip.

  Raises:
    DataError: naming them and what would help.
  """
  empty = [name for name, own in clips.items() if not own]
  if not empty:
    return
  help_ = "give each split a movie of its own, or shorter clips"
  if options.time_blocks:
    help_ = "ask for fewer time_blocks, a smaller gap, larger shares or shorter clips"
  raise DataError(
      f"split(s) {', '.join(empty)} have no clip of {options.frames} time points at "
      f"stride {options.stride} ({options.span} from first to last); {help_}"
  )
