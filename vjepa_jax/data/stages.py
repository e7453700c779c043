"""Which stage of development each time point of an embryo shows, and who says so.

Stages come from cell counts (tracked nuclei, one row each and time point), from the
answers of a vision-language model, or from a table. What cannot be told is left
without a stage and counted by its reason; nothing is moved to a neighbouring stage.
Answers are given by a model that was told minute and cell count: they are no truth.
"""

import bisect
import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import csv
import dataclasses
import difflib
import io
import json
import math
import posixpath
import re
from typing import Any

from vjepa_jax.data import storage
from vjepa_jax.data.record import DataError, ReadError

_COUNTED = (
    "1-cell", "2-cell", "4-cell", "8-cell", "~14-cell", "~24-cell", "~44-cell",
    "~90-cell", "~190-cell", "~350-cell",
)
_FOLDS = ("comma", "1.5-fold", "2-fold", "3-fold")
_WORM10 = (
    "1-cell", "2-cell", "4-cell", "8-cell", "early gastrulation", "late gastrulation",
    *_FOLDS,
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
    "vlm14": _COUNTED + _FOLDS,
    # Of the WormVT project; it has no class for about 14 and 24 cells: those time
    # points are without one, or count as 8-cell.
    "worm10": _WORM10,
    "worm10_merged": _WORM10,
    "count": (*_COUNTED, _ELONGATION),
    "phantom8": (
        "1-cell", "2-cell", "4-cell", "8-cell", "16-cell", "32-cell", "bent", "folded",
    ),
}
_MOVED = {
    "worm10": _GASTRULATION,
    "worm10_merged": _GASTRULATION | dict.fromkeys(("~14-cell", "~24-cell"), "8-cell"),
    "count": dict.fromkeys(_FOLDS, _ELONGATION),
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
    _check_own(path, source, (sharers or {}).get(_plain(path), ()))
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
        _plain(path) for source in options.sources
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


def _plain(path: str) -> str:
  """Returns a path without "..": one file, one name."""
  scheme, mark, rest = path.rpartition("://")
  return scheme + mark + posixpath.normpath(rest)


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
    data: the table; tabs, commas or blanks part its columns.
    path: for messages.

  Returns:
    {t: rows}, and rows left out by reason.

  Raises:
    DataError: without a header that names t once, or without a row.
  """
  lines = data.decode("utf-8-sig", errors="replace").splitlines()
  lines = [line for line in lines if line.strip("\0 \t\r\n,")]
  head = lines[0].lstrip("# ") if lines else ""
  mark = next((m for m in ("\t", ",") if m in head), None)
  names = [name.strip().strip('"').lower() for name in head.split(mark)]
  if names.count("t") != 1:
    raise DataError(
        f"{path}: the header of a table of tracks must name the column t once; found "
        f"{', '.join(names)[:200] or 'nothing'}"
    )
  place = names.index("t")
  counts: collections.Counter[int] = collections.Counter()
  losses: Losses = collections.Counter()
  for line in lines[1:]:
    if line.lstrip().startswith("#"):
      continue
    cells = line.split(mark)
    number = _whole(cells[place]) if place < len(cells) else None
    if number is None:
      losses["row without a time"] += 1
    else:
      counts[number] += 1
  if not counts:
    raise DataError(f"{path}: no row of this table of tracks has a time")
  return dict(counts), losses


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
  whose section on the developmental stage alone is read; see `stage_of_answer`.

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
  stage, reason = stage_of_answer(text)
  return number, stage, reason


# `## 1. Developmental Stage: ...`, with or without marks, number and more words.
_HEADER = re.compile(
    r"^[\s#>*_\d.)(-]*(?:predicted |estimated |most likely )?developmental stage"
    r"(?: (?:analysis|classification|assessment|identification))?[\s*_]*"
    r"(?:[:\u2013\u2014-]+|$)[\s*_]*", re.IGNORECASE,
)
# What ends a section: a heading, a numbered item, or the next thing asked for.
_NEXT = re.compile(
    r"^\s*(?:#+\s|[*_]*\d+[.)]\s|-{3,}\s*$|[-*_\s]*(?:confidence|reasoning|key features|"
    r"justification|explanation|observations?|evidence|morpholog\w+|alternatives?)\b)",
    re.IGNORECASE,
)
# Hyphens and the minus that models write for "-".
_HYPHENS = dict.fromkeys((0x2010, 0x2011, 0x2212), "-")
_IN_BRACKETS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")
_WORDS = {
    "one": "1", "single": "1", "two": "2", "three": "3", "four": "4", "eight": "8",
}
# Never the end of another one, such as of 1,350.
_NUMBER = r"(?<![\d.,])(?:\d+(?:\.\d+)?)"
_RANGE = re.compile(
    rf"{_NUMBER}[\s~\u2248]*(?:-|\u2013|\u2014|/|to|or|and|through)[\s~\u2248]*{_NUMBER}"
    rf"|{_NUMBER}(?:[\s-]*(?:cells?|fold))?\s*\+"
)
_MENTION = re.compile(
    rf"({_NUMBER})[\s-]*(cells?|folds?)\b|\b(comma)\b", re.IGNORECASE
)
# Words with which one stage named means another, or none.
_HEDGED = re.compile(
    r"[<>\u2264\u2265]|\b(?:not|no|nor|un\w*|between|before|after|beyond|past|post|pre|"
    r"exceed\w*|less|more|fewer|earlier|later|above|below|least|most|towards?|"
    r"approach\w*|transition\w*|if|cannot|ruled?|exclud\w*|versus|vs|or|to|and)\b|[/&]",
    re.IGNORECASE,
)


def stage_of_answer(text: str) -> tuple[str, str]:
  """Returns the stage that an answer states, or why there is none.

  Only the section "Developmental Stage" is read, and of it the answer alone: the rest
  of its line, or the next line that says anything. Other stages are named all over
  such texts, to be ruled out.

  Args:
    text: Markdown, as the model wrote it.

  Returns:
    (stage of "vlm14", ""), or ("", reason): "no stage section", "ambiguous" (several
    stages, a range, or one that is hedged) or "unknown stage".
  """
  answer = _answer(text.translate(_HYPHENS))
  if not answer:
    return "", "no stage section"
  answer = re.sub(r"[*_`\"]", "", answer).replace("\u00bd", ".5")
  answer = re.sub(
      rf"(?<![\w-])({'|'.join(_WORDS)})(?=[\s-]*(?:cell|fold))",
      lambda found: _WORDS[found[0].lower()], answer, flags=re.IGNORECASE,
  )
  outside = _IN_BRACKETS.sub(" ", answer)
  beside = " ".join(_IN_BRACKETS.findall(answer))
  if not _MENTION.search(outside):
    outside, beside = answer, ""
  if _RANGE.search(outside) or _HEDGED.search(outside):
    return "", "ambiguous"
  named = {_named(*found) for found in _MENTION.findall(outside)}
  if len(named) > 1:
    return "", "ambiguous"
  stage = named.pop() if named else ""
  # The number of cells beside a name, as in "comma (~550 cells)", is no second stage;
  # "~44-cell (or ~90-cell)" has one.
  others = {_named(*found) for found in _MENTION.findall(beside)} - {"", stage}
  if stage and others:
    return "", "ambiguous"
  return (stage, "") if stage else ("", "unknown stage")


def _answer(text: str) -> str:
  """Returns what the section on the stage says first, or ""."""
  inside = False
  for line in text.splitlines():
    if header := _HEADER.match(line):
      inside = True
      if rest := line[header.end():].strip(" \t*_#:-"):
        return rest
    elif inside and _NEXT.match(line):
      inside = False  # A title may be followed by the section of its name.
    elif inside and (said := line.strip(" \t*_#:->")):
      return said
  return ""


def _named(number: str, kind: str, comma: str) -> str:
  """Returns the stage that a mention names, or "" for none of the categories."""
  if comma:
    return "comma"
  value = float(number)
  if not value < 1e6:
    return ""
  if kind.lower().startswith("fold"):
    name = f"{value:g}-fold"
    return name if name in _FOLDS else ""
  if value == 550:
    return "comma"
  exact = {f"{int(value)}-cell", f"~{int(value)}-cell"} & set(_COUNTED)
  return exact.pop() if exact and value == int(value) else ""


def read_table(data: bytes, path: str) -> tuple[Stages, Losses]:
  """Reads a TSV of the columns t and stage, others are passed over.

  Returns:
    {t: stage}, and rows left out by reason.

  Raises:
    DataError: without these columns.
  """
  text = data.decode("utf-8-sig", errors="replace").replace("\0", "")
  reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t")
  found: dict[int, set[str]] = {}
  losses: Losses = collections.Counter()
  try:
    names = list(reader.fieldnames or ())
    if not {"t", "stage"} <= set(names):
      raise DataError(
          f"{path}: a table of stages needs the columns t and stage; found "
          f"{', '.join(names)[:200] or 'nothing'}"
      )
    for cells in reader:
      number, stage = _whole(cells["t"] or ""), (cells["stage"] or "").strip()
      if number is None or not stage:
        losses["row without a time" if number is None else "no stage given"] += 1
      else:
        found.setdefault(number, set()).add(stage)
  except csv.Error as error:
    raise DataError(f"{path}: is no table: {error}") from error
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
