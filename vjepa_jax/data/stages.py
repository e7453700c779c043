"""Which stage of development each time point of an embryo shows, and who says so.

Stages come from cell counts (tracked nuclei, one row each and time point), from the
answers of a vision-language model, or from a table. What cannot be told is left
without a stage and counted by its reason; nothing is moved to a neighbouring stage.
Answers are given by a model that was told minute and cell count: they are no truth.
"""

import bisect
import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import csv
import dataclasses
import difflib
import io
import json
import math
from typing import Any

from vjepa_jax.data import answers, storage
from vjepa_jax.data.record import DataError, ReadError

_WORM10 = (
    "1-cell", "2-cell", "4-cell", "8-cell", "early gastrulation", "late gastrulation",
    *answers.FOLDS,
)
_GASTRULATION = {
    "~44-cell": "early gastrulation", "~90-cell": "early gastrulation",
    "~190-cell": "late gastrulation", "~350-cell": "late gastrulation",
}
# What a count above the last edge shows: comma and folds all have about 550 cells.
_ELONGATION = "elongation"
# Geometric midpoints of 1, 2, 4, 8, 14, 24, 44, 90, 190, 350 and 550 cells.
EDGES = (1.4, 2.8, 5.7, 10.6, 18.3, 32.5, 62.9, 131.0, 258.0, 439.0)
TAXONOMIES: dict[str, tuple[str, ...]] = {
    # The categories that the model was asked to choose from.
    "vlm14": answers.COUNTED + answers.FOLDS,
    # Of the WormVT project; it has no class for about 14 and 24 cells: those time
    # points are without one, or count as 8-cell.
    "worm10": _WORM10,
    "worm10_merged": _WORM10,
    "count": (*answers.COUNTED, _ELONGATION),
    "phantom8": (
        "1-cell", "2-cell", "4-cell", "8-cell", "16-cell", "32-cell", "bent", "folded",
    ),
}
_MOVED = {
    "worm10": _GASTRULATION,
    "worm10_merged": _GASTRULATION | dict.fromkeys(("~14-cell", "~24-cell"), "8-cell"),
    "count": dict.fromkeys(answers.FOLDS, _ELONGATION),
}
SOURCES = ("counts", "answers", "table")
_OPTION_OF = {"counts": "tracks", "answers": "answers", "table": "table"}
# Of one file of labels; the longest real one has 1.2 MB.
_MAX_BYTES = 1 << 28

Stages = dict[int, str]
Losses = collections.Counter[str]


@dataclasses.dataclass(frozen=True)
class StageOptions:
  """Where stages come from, and into which classes they go.

  Attributes:
    taxonomy: a name of `TAXONOMIES`, or the names of the classes in their order.
    sources: of `SOURCES`; the first that knows a time point decides.
    tracks: table of tracked nuclei, below the embryo's folder.
    answers: the model's answers, JSON below the embryo's folder.
    table: a TSV of the columns t and stage, below the embryo's folder.

  Each of the last three may be {participant: path} instead, for files that lie
  elsewhere; who is not in it has no such file.

  Raises:
    ValueError: for an option out of range; names all that are.
  """

  taxonomy: str | tuple[str, ...] = "vlm14"
  sources: tuple[str, ...] = ("counts",)
  tracks: str | Mapping[str, str] = "tracks/tracks.txt"
  answers: str | Mapping[str, str] = "embryo_classifications_all.json"
  table: str | Mapping[str, str] = "stages.tsv"

  def __post_init__(self):
    faults = stage_option_faults(dataclasses.asdict(self))
    if faults:
      raise ValueError("stages: " + "; ".join(faults))

  @property
  def classes(self) -> tuple[str, ...]:
    """Names of the classes, in the order of development."""
    named = isinstance(self.taxonomy, str)
    return TAXONOMIES[self.taxonomy] if named else tuple(self.taxonomy)


def stage_option_faults(options: Mapping[str, Any]) -> list[str]:
  """Says what is wrong with fields of `StageOptions`; an empty list is well."""
  known = [field.name for field in dataclasses.fields(StageOptions)]
  faults = [
      f"{name}: unknown key; closest: {', '.join(_closest(name, known))}"
      for name in options if name not in known
  ]
  taxonomy = options.get("taxonomy", "vlm14")
  if isinstance(taxonomy, str):
    if taxonomy not in TAXONOMIES:
      near = ", ".join(_closest(taxonomy, TAXONOMIES))
      faults.append(f"taxonomy {taxonomy!r} is unknown; closest: {near}")
  elif not _are_names(taxonomy) or len(taxonomy) < 2:
    faults.append(
        f"taxonomy {taxonomy!r} must be a name or two or more different names"
    )
  sources = options.get("sources", ("counts",))
  if not _are_names(sources) or not set(sources) <= set(SOURCES):
    faults.append(f"sources {sources!r} must be some of {', '.join(SOURCES)}")
  faults += [
      f"{name} {options[name]!r} must be a path below each embryo's folder; for a file "
      "that lies elsewhere give {participant: path}"
      for name in _OPTION_OF.values()
      if name in options and not _is_place(options[name])
  ]
  return faults


def _is_place(value: Any) -> bool:
  """Says whether this is a path below a folder, or {participant: path}."""
  if isinstance(value, Mapping):
    return all(isinstance(v, str) and v for pair in value.items() for v in pair)
  return (
      isinstance(value, str) and bool(value)
      and not value.startswith(("/", "~")) and "://" not in value
  )


def _are_names(values: Any) -> bool:
  return (
      isinstance(values, list | tuple) and bool(values)
      and all(isinstance(v, str) and v for v in values)
      and len(set(values)) == len(values)
  )


def _closest(name: str, known: Iterable[str]) -> list[str]:
  return difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.0)


def stages_of(
    options: StageOptions, home: str, participant: str, numbers: Sequence[int]
) -> tuple[Stages, Losses]:
  """Returns the stages of one embryo's time points, whoever says so.

  Args, Raises: as of `by_source`, with one folder, `home`.

  Returns:
    {number: class of `options.classes`}, of the first source that knows it, and
    losses as of `by_source`.
  """
  told, losses = by_source(options, [home], participant, numbers)
  return joined(told.values()), losses


def by_source(
    options: StageOptions,
    homes: Sequence[str],
    participant: str,
    numbers: Sequence[int],
    *,
    sharers: Mapping[str, Sequence[str]] | None = None,
) -> tuple[dict[str, Stages], Losses]:
  """Returns what each source says of one embryo's time points.

  Args:
    options: where stages come from.
    homes: the embryo's folders, local or `gs://`; the first that has a file decides.
    participant: its name in the manifest.
    numbers: of its time points, as in the names of their files.
    sharers: {file of labels: movies that may read it}, as of `sharers_of`.

  Returns:
    {source: {number: class of `options.classes`}}, in the order of `options.sources`,
    and {reason: how many labels or time points} of what has none: "SOURCE: reason",
    and "no stage" for time points in all.

  Raises:
    DataError: for a file of labels that is there and is none of its kind, or that
      several movies would read.
    ReadError: if one cannot be fetched (but for a file that is not there).
  """
  told: dict[str, Stages] = {}
  losses: Losses = collections.Counter()
  there = set(numbers)
  for source in options.sources:
    told[source] = {}
    path, data = _first_of(_paths_of(options, source, homes, participant))
    if data is None:
      losses[f"{source}: no file"] += 1
      continue
    _check_own(path, source, (sharers or {}).get(storage.plain(path), ()))
    before = joined(told.values())
    stages, lost = _SOURCES[source](data, path, options)
    lost["no such time point"] += len(stages.keys() - there)
    told[source] = {n: stage for n, stage in stages.items() if n in there}
    losses["sources differ"] += sum(
        before.get(n, stage) != stage for n, stage in told[source].items()
    )
    losses.update({f"{source}: {reason}": n for reason, n in lost.items()})
  losses["no stage"] = len(there - joined(told.values()).keys())
  return told, +losses


def joined(told: Iterable[Stages]) -> Stages:
  """Returns the stages of several sources; the first to know a time point decides."""
  found: Stages = {}
  for stages in told:
    for number, stage in stages.items():
      found.setdefault(number, stage)
  return found


def sharers_of(
    options: StageOptions, movies: Mapping[str, tuple[Sequence[str], str]]
) -> dict[str, list[str]]:
  """Returns which movies may read the same file of labels.

  Args:
    options: where stages come from.
    movies: {name: (folders where its labels may lie, its participant)}.

  Returns:
    {file of labels: movies whose labels may lie there}.
  """
  found: dict[str, list[str]] = {}
  for name, (homes, participant) in movies.items():
    paths = {
        storage.plain(path) for source in options.sources
        for path in _paths_of(options, source, homes, participant)
    }
    for path in paths:
      found.setdefault(path, []).append(name)
  return found


def _paths_of(
    options: StageOptions, source: str, homes: Sequence[str], participant: str
) -> list[str]:
  """Returns where a source's file of one embryo may lie, in the order of asking."""
  given = getattr(options, _OPTION_OF[source])
  if isinstance(given, Mapping):
    return [given[participant]] if participant in given else []
  return [storage.join(home, given) for home in homes]


def _first_of(paths: Iterable[str]) -> tuple[str, bytes | None]:
  """Returns the first file that is there, and its content; None where none is."""
  for path in paths:
    try:
      return path, storage.read_bytes(path, max_bytes=_MAX_BYTES)
    except ReadError as error:
      if error.reason != "missing_file":
        raise
  return "", None


def _check_own(path: str, source: str, movies: Sequence[str]) -> None:
  """Refuses labels of which nobody knows whose they are."""
  if len(movies) > 1:
    raise DataError(
        f"{path}: {source} of one embryo, which {len(movies)} movies would share, "
        f"{movies[0]} and {movies[1]} among them; put the labels of NAME.tif into a "
        f"folder NAME beside it, or give data.stages.{_OPTION_OF[source]} as "
        "{participant: path}, a path for each and a participant for each movie"
    )


def stage_of_count(cells: float) -> str:
  """Returns the nearest counted stage; "elongation" from 439 cells on.

  Raises:
    ValueError: for less than one cell.
  """
  if not cells >= 1:
    raise ValueError(f"stage_of_count: {cells} cells, must be at least 1")
  return TAXONOMIES["count"][bisect.bisect_right(EDGES, cells)]


def in_taxonomy(stage: str, options: StageOptions) -> str | None:
  """Returns the class that a stage of "vlm14" or "count" belongs to, or None."""
  moved = stage
  if isinstance(options.taxonomy, str):
    moved = _MOVED.get(options.taxonomy, {}).get(stage, stage)
  return moved if moved in options.classes else None


def _sorted_in(
    stages: Mapping[int, str], options: StageOptions, losses: Losses
) -> Stages:
  found = {}
  for number, stage in stages.items():
    moved = in_taxonomy(stage, options)
    if moved is None:
      losses[f"no class for {stage}"] += 1
    else:
      found[number] = moved
  return found


def read_tracks(data: bytes, path: str) -> tuple[dict[int, int], Losses]:
  """Counts the nuclei of each time point in a table of tracks.

  Columns go by the names of the header (t z y x cell_id parent_id ...): `t` is
  needed, others are not, and rows may end early.

  Args:
    data: the table; tabs, commas or blanks part its columns. Between tabs or commas a
      cell may stand in quotes. A "#" may go before the header.
    path: for messages.

  Returns:
    {t: rows}, and rows left out by reason.

  Raises:
    DataError: without a header that names t once, without a row, for a quote that
      does not end on its line, or if it cannot be told whether the rows have a cell
      below a "#" that is a column of its own.
  """
  lines = [line for line in _lines(data) if line[1].strip("\0 \t\r\n,")]
  first, title = lines[0] if lines else (0, "")
  head = title.lstrip("# ")
  mark = next((m for m in ("\t", ",") if m in head), None)
  # A "#" parted from the first name: the rows tell whether it is a column.
  marked = mark is not None and title.lstrip(" ")[0] == "#" and head.startswith(mark)
  (cells,) = _rows([(first, head[1:] if marked else head)], mark, path)
  names = [name.strip().strip('"').lower() for name in cells]
  if names.count("t") != 1:
    raise DataError(
        f"{path}: the header of a table of tracks must name the column t once; found "
        f"{', '.join(names)[:200] or 'nothing'}"
    )
  below = [line for line in lines[1:] if not line[1].lstrip().startswith("#")]
  rows = _rows(below, mark, path)
  place = names.index("t")
  if marked:
    rows = list(rows)
    place += _cells_below_mark(rows, len(names), path)
  counts: collections.Counter[int] = collections.Counter()
  losses: Losses = collections.Counter()
  for cells in rows:
    number = _whole(cells[place]) if place < len(cells) else None
    if number is None:
      losses["row without a time"] += 1
    else:
      counts[number] += 1
  if not counts:
    raise DataError(f"{path}: no row of this table of tracks has a time")
  return dict(counts), losses


def _cells_below_mark(rows: Sequence[Sequence[str]], columns: int, path: str) -> int:
  """Returns how many cells (0 or 1) the rows have below a "#" before the columns."""
  longest = max(map(len, rows), default=0)
  ends = (n for cells in rows for n, cell in enumerate(cells, 1) if cell.strip())
  filled = max(ends, default=0)
  if longest != filled or longest - columns not in (0, 1):
    raise DataError(
        f"{path}: the header of this table of tracks has # and {columns} names, the "
        f"longest row {longest} cells, {filled} up to the last that is filled; whether "
        "rows have a cell below the # cannot be told, take it out of the header"
    )
  return longest - columns


def _lines(data: bytes) -> Iterator[tuple[int, str]]:
  """Yields number and text of each line."""
  text = data.decode("utf-8-sig", errors="replace")
  return enumerate(io.StringIO(text, newline=None), 1)


def _rows(
    lines: Sequence[tuple[int, str]], mark: str | None, path: str
) -> Iterator[list[str]]:
  """Yields the cells of each line; None for `mark` parts them at blanks.

  Raises:
    DataError: for a quote that does not end on its line, or not at the cell's end.
  """
  if mark is None:
    yield from (line.split() for _, line in lines)
    return
  # Strict: a quote that is never closed would take all rows below it in silence.
  reader = csv.reader(
      (line for _, line in lines), delimiter=mark, strict=True, skipinitialspace=True
  )
  for read, (number, _) in enumerate(lines, 1):
    try:
      cells = next(reader)
      if reader.line_num != read:
        raise csv.Error("a quote opens a cell that takes other rows in")
    except csv.Error as error:
      raise DataError(
          f"{path}: line {number} is no row of a table ({error}); close its quotes, or "
          "write it without"
      ) from error
    yield cells


def _whole(text: str) -> int | None:
  """Returns a whole number of at least 0, also one written as 12.0."""
  try:
    value = float(text.strip().strip('"'))
  except ValueError:
    return None
  if not math.isfinite(value) or value != int(value) or not 0 <= value < 1e9:
    return None
  return int(value)


def read_answers(data: bytes, path: str) -> tuple[Stages, Losses]:
  """Reads the stages of `embryo_classifications_all.json`.

  Each entry has `frame_index` (the number of the time point) and `response`, a text
  whose section on the developmental stage alone is read; see `answers.stage_of_answer`.

  Args:
    data: a JSON list of entries.
    path: for messages.

  Returns:
    {frame_index: stage of "vlm14"}, and entries left out by reason.

  Raises:
    DataError: if it is no JSON list.
  """
  try:
    entries = json.loads(data.decode("utf-8-sig", errors="replace"))
  except (ValueError, RecursionError) as error:
    raise DataError(f"{path}: is not JSON: {str(error)[:200]}") from error
  if not isinstance(entries, list):
    raise DataError(
        f"{path}: holds {type(entries).__name__}, must be a list of answers"
    )
  found: dict[int, set[str]] = {}
  losses: Losses = collections.Counter()
  for entry in entries:
    number, stage, reason = _entry(entry)
    if reason:
      losses[reason] += 1
    else:
      found.setdefault(number, set()).add(stage)
  stages = {number: min(names) for number, names in found.items() if len(names) == 1}
  losses["answers differ"] += len(found) - len(stages)
  return stages, losses


def _entry(entry: Any) -> tuple[int, str, str]:
  """Returns number and stage of an answer, and why it is left out."""
  if not isinstance(entry, Mapping):
    return 0, "", "no answer"
  number, text = entry.get("frame_index"), entry.get("response")
  if not isinstance(number, int) or isinstance(number, bool) or number < 0:
    return 0, "", "no frame_index"
  if entry.get("success", True) is not True or not isinstance(text, str):
    return number, "", "failed"
  if text.lstrip().upper().startswith("ERROR"):
    return number, "", "failed"
  stage, reason = answers.stage_of_answer(text)
  return number, stage, reason


def read_table(data: bytes, path: str) -> tuple[Stages, Losses]:
  """Reads a TSV of the columns t and stage, others are passed over.

  Returns:
    {t: stage}, and rows left out by reason.

  Raises:
    DataError: without these columns, each once, or for a quote that does not end on
      its line.
  """
  lines = [(number, line.replace("\0", "")) for number, line in _lines(data)]
  rows = _rows([line for line in lines if line[1].strip("\n")], "\t", path)
  names = next(rows, [])
  if names.count("t") != 1 or names.count("stage") != 1:
    raise DataError(
        f"{path}: a table of stages needs the columns t and stage; found "
        f"{', '.join(names)[:200] or 'nothing'}; each must be there once"
    )
  found: dict[int, set[str]] = {}
  losses: Losses = collections.Counter()
  for cells in rows:
    row = dict(zip(names, cells))
    number, stage = _whole(row.get("t", "")), row.get("stage", "").strip()
    if number is None or not stage:
      losses["row without a time" if number is None else "no stage given"] += 1
    else:
      found.setdefault(number, set()).add(stage)
  stages = {number: min(names) for number, names in found.items() if len(names) == 1}
  losses["rows differ"] += len(found) - len(stages)
  return stages, losses


def _from_counts(
    data: bytes, path: str, options: StageOptions
) -> tuple[Stages, Losses]:
  counts, losses = read_tracks(data, path)
  stages = {number: stage_of_count(cells) for number, cells in counts.items()}
  return _sorted_in(stages, options, losses), losses


def _from_answers(
    data: bytes, path: str, options: StageOptions
) -> tuple[Stages, Losses]:
  stages, losses = read_answers(data, path)
  return _sorted_in(stages, options, losses), losses


def _from_table(
    data: bytes, path: str, options: StageOptions
) -> tuple[Stages, Losses]:
  stages, losses = read_table(data, path)
  return _sorted_in(stages, options, losses), losses


_SOURCES: dict[str, Callable[..., tuple[Stages, Losses]]] = {
    "counts": _from_counts, "answers": _from_answers, "table": _from_table,
}
