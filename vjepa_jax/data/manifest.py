"""The table of recordings: who, which eye, which device, which file, which split.

A row never enters or leaves in silence: what is dropped is counted by reason,
and a participant is never on two sides of a split.
"""

import collections
from collections.abc import Collection, Iterable, Mapping, Sequence
import csv
import dataclasses
import difflib
import hashlib
import io
import json
import math
from typing import Any

from vjepa_jax.data import storage
from vjepa_jax.data.record import DataError

REQUIRED = ("participant_id", "filepath")
DEVICES = (
    "heidelberg_spectralis", "topcon_triton", "topcon_maestro2", "zeiss_cirrus"
)
FIELDS = (
    "participant", "device", "region", "imaging", "laterality", "geometry", "site",
    "modality", "source",
)
# Why a row may leave without a word of alarm: it was asked for, or it is there twice.
_ASKED = ("filtered_", "excluded_", "max_records", "train_participants", "duplicate_")
# A datalist of MONAI's or nnU-Net's kind names the split by its key.
_DATALIST_KEYS = {"image": "filepath", "image_path": "filepath"}
_DATALISTS = ("training", "train", "validation", "val", "test", "testing")
_NONE = ("", "nan", "none", "null", "n/a", "na")
# "none" is what a class without a finding is often called.
_NO_LABEL = tuple(name for name in _NONE if name != "none")
_UNLABELLED = "unlabelled"
_VARIES = "varies by frame"


@dataclasses.dataclass(frozen=True)
class Row:
  """One recording of the manifest.

  Attributes:
    path: the file, joined to the root.
    participant: whose recording it is.
    device: named by a `device` column or a path component; else "unknown".
    region: anatomic_region; "unknown" where not given.
    imaging: kind of imaging; "unknown" where not given.
    laterality: as in the manifest; "unknown" where not given.
    geometry: "raster", "radial", ... from a column; else "line" (one frame),
      "varying" (pixel_spacing says so) or "raster".
    site: from a `site` or `clinical_site` column; else "unknown".
    label: name of the class ("none" is one), or None where the cell is empty,
      nan, null or n/a.
    split: from a split column, or "".
    spacing: (dz, dy, dx) in mm of the manifest, NaN where not given.
    modality: such as "OPT", "MR", "CT"; "unknown" where not given.
    axes: letters of the stored axes, such as "TZYX", or "".
    key: name of the array in a file that holds several, or "".
    series: SeriesInstanceUID, for one series of several in a folder, or "".
    time_step_s: seconds between time points; NaN where not given.
    size: bytes of the file, or None.
    checksum: "md5:..." or "crc32c:...", in hex, or "".
    source: name of the table it comes from, in a mixture of several.
    frame: place along T in a file that holds a movie; None: the whole file.
    window: (path, frame) of the time points that set the intensity window of this
      one, a frame of a movie; (): its own voxels do.
  """

  path: str
  participant: str
  device: str = "unknown"
  region: str = "unknown"
  imaging: str = "unknown"
  laterality: str = "unknown"
  geometry: str = "raster"
  site: str = "unknown"
  label: str | None = None
  split: str = ""
  spacing: tuple[float, float, float] = (math.nan, math.nan, math.nan)
  modality: str = "unknown"
  axes: str = ""
  key: str = ""
  series: str = ""
  time_step_s: float = math.nan
  size: int | None = None
  checksum: str = ""
  source: str = ""
  frame: int | None = None
  window: tuple[tuple[str, int | None], ...] = ()

  @property
  def id(self) -> str:
    """What tells this recording from all others: its path, or a part of a file."""
    frame = "" if self.frame is None else f"t{self.frame}"
    return "::".join(filter(None, (self.path, self.series, self.key, frame)))

  def read_options(self) -> dict[str, Any]:
    """Returns what the row states for `readers.read`; what it leaves open is absent."""
    options: dict[str, Any] = {"manifest_spacing": self.spacing}
    for name in ("axes", "key", "series"):
      if getattr(self, name):
        options[name] = getattr(self, name)
    if not math.isnan(self.time_step_s):
      options["time_step_s"] = self.time_step_s
    if self.frame is not None:
      options["frame"] = self.frame
    return options


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The kept rows of a manifest, in its order, and what was dropped.

  Attributes:
    path: the manifest.
    rows: what is kept.
    lost: rows dropped, by reason.
    unexplained: the dropped rows that nobody asked to drop, each with its reason.
    total: rows of the table.
    listed: what was there before the filters.
  """

  path: str
  rows: tuple[Row, ...]
  lost: Mapping[str, int]
  unexplained: tuple[tuple[Row, str], ...] = ()
  total: int = 0
  listed: tuple[Row, ...] = ()


def read_manifest(
    path: str,
    *,
    root: str | None = None,
    label: str | None = None,
    participants: str | None = None,
    split: str | None = None,
    filters: Mapping[str, Sequence[str] | str] | None = None,
    exclude: Mapping[str, Sequence[str] | str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Manifest:
  """Reads a TSV, CSV or JSON manifest, local or `gs://`.

  JSON is a list of objects, {"data": [...]}, or a datalist {"training": [{"image":
  ...}], ...}, whose keys become the column `split`. Of the columns are known:
  participant_id, filepath, device, anatomic_region, imaging, laterality, geometry,
  site or clinical_site, modality, number_of_frames, pixel_spacing [dy, dx] and
  slice_thickness (mm) or spacing [dz, dy, dx], sop_instance_uid, axes, key,
  series_instance_uid, time_step_s, size, checksum.

  Args:
    path: the manifest; needs the columns participant_id and filepath.
    root: what filepath is joined to, also where it starts with "/"; by default
      the manifest's folder.
    label: column with the class, here or in `participants`.
    participants: a second table with one row a participant_id; its columns
      serve where the manifest lacks them.
    split: column with the split, here or in `participants`.
    filters: keep only rows whose field has one of these values; fields are
      participant, device, region, imaging, laterality, geometry, site, modality,
      label ("unlabelled" where there is none).
    exclude: drop rows whose field has one of these values.
    columns: {column this library knows: its name in this file}.

  Returns:
    The kept rows and a count of the dropped by reason.

  Raises:
    DataError: missing columns (all at once, with the closest names), JSON of another
      kind, a file of two participants, a participant listed twice in `participants`,
      unknown fields, or a filter value that no row has.
    ReadError: if a table cannot be fetched.
  """
  table, names = _read_table(path)
  columns = dict(columns or {})
  _check_columns(path, names, [columns.get(k, k) for k in REQUIRED])
  people = _read_participants(participants)
  wanted = [columns.get(c, c) for c in (label, split) if c]
  known = set(names) | {k for person in people.values() for k in person}
  _check_columns(participants or path, sorted(known), wanted)
  root = storage.parent(path) if root is None else root
  lost: collections.Counter[str] = collections.Counter()
  unexplained = []
  rows: dict[str, Row] = {}
  uids = set()
  for line, cells in enumerate(table, 2):
    person = people.get(cells.get(columns.get("participant_id", "participant_id")))
    row, uid = _to_row(_joined(cells, person), columns, root, label, split)
    if participants and person is None:
      reason = "not_in_participants"
    else:
      reason = _reason_to_drop(row, uid, rows, uids, f"{path}:{line}")
    if reason:
      lost[reason] += 1
      if not is_explained(reason):
        unexplained.append((row, reason))
      continue
    uids.add(uid)
    rows[_plain_id(row)] = row
  kept = _filter(path, list(rows.values()), filters or {}, exclude or {}, lost)
  return Manifest(
      path, tuple(kept), dict(lost), tuple(unexplained), len(table),
      tuple(rows.values()),
  )


def is_explained(reason: str) -> bool:
  """Says whether rows lost for this reason were asked to go, or are there twice."""
  return reason.startswith(_ASKED)


def split_by_participant(
    rows: Sequence[Row],
    fractions: Mapping[str, float],
    *,
    stratify: Sequence[str] = ("device", "label"),
    seed: int = 0,
) -> dict[str, list[Row]]:
  """Parts the participants, never their files, into named splits.

  Participants of one stratum (their devices, labels, ...) are dealt out by the
  largest deficit against `fractions`, in an order that hashes the seed and the
  participant, so that a new participant moves few others. Every split gets at
  least one participant.

  Args:
    rows: the recordings.
    fractions: {split: share of the participants}, adding to 1.
    stratify: row fields to keep in proportion.
    seed: of the order.

  Returns:
    {split: rows in their order}; no participant is in two of them.

  Raises:
    DataError: for bad fractions or fields, or fewer participants than splits.
  """
  check_fractions(fractions)
  _check_fields(stratify, "stratify")
  strata = _strata(rows, stratify, seed)
  total = sum(map(len, strata))
  if total < len(fractions):
    raise DataError(
        f"{total} participant(s) cannot fill {len(fractions)} splits "
        f"({', '.join(fractions)}); ask for fewer splits or more records"
    )
  home = _deal(strata, fractions)
  parts: dict[str, list[Row]] = {name: [] for name in fractions}
  for row in rows:
    parts[home[row.participant]].append(row)
  check_disjoint({k: {r.participant for r in v} for k, v in parts.items()})
  return parts


def split_by_column(rows: Sequence[Row]) -> tuple[dict[str, list[Row]], int]:
  """Parts the rows by their `split` column.

  Returns:
    {split: rows}, and how many rows name no split.

  Raises:
    DataError: naming the participants that are in two splits.
  """
  parts: dict[str, list[Row]] = {}
  for row in rows:
    if row.split:
      parts.setdefault(row.split, []).append(row)
  check_disjoint({k: {r.participant for r in v} for k, v in parts.items()})
  return parts, sum(not row.split for row in rows)


def some_participants(
    rows: Sequence[Row], count: int, *, seed: int,
    among: Collection[str] | None = None,
) -> tuple[list[Row], list[Row]]:
  """Parts the rows into those of a few drawn participants, and the others.

  More participants of the same seed include the fewer.

  Args:
    rows: the recordings.
    count: of the participants.
    seed: of the draw.
    among: participants with labels, whom alone it draws; None: all.

  Raises:
    DataError: if there are fewer participants.
  """
  people = {row.participant for row in rows}
  if among is not None:
    people &= set(among)
  if not 1 <= count <= len(people):
    of = "" if among is None else " that have a clip with a known stage"
    raise DataError(
        f"train_participants is {count}, must be from 1 to the {len(people)} "
        f"participants of the training split{of}"
    )
  chosen = set(_shuffled(people, seed)[:count])
  return (
      [row for row in rows if row.participant in chosen],
      [row for row in rows if row.participant not in chosen],
  )


def check_disjoint(
    groups: Mapping[Any, Iterable[Any]], what: str = "participant"
) -> None:
  """Checks that no member is in two groups: participants of splits, rows of hosts.

  Raises:
    DataError: naming up to five members and the groups they are in.
  """
  homes: dict[Any, list[Any]] = {}
  for name, members in groups.items():
    for member in set(members):
      homes.setdefault(member, []).append(name)
  shared = {k: v for k, v in homes.items() if len(v) > 1}
  if shared:
    shown = "; ".join(
        f"{k} in {' and '.join(map(str, v))}"
        for k, v in sorted(shared.items(), key=lambda kv: str(kv[0]))[:5]
    )
    raise DataError(f"{len(shared)} {what}(s) are in two groups: {shown}")


def count(rows: Iterable[Row], field: str) -> dict[str, int]:
  """Counts the rows by a field, most frequent first; no label is "unlabelled"."""
  found = collections.Counter(_value(row, field) for row in rows)
  return dict(sorted(found.items(), key=lambda kv: (-kv[1], kv[0])))


def label_names(rows: Iterable[Row]) -> tuple[str, ...]:
  """Returns the class names in order: numbers by value, others by letter."""
  names = {row.label for row in rows if row.label is not None}
  return tuple(sorted(names, key=lambda n: (_number(n) is None, _number(n) or 0., n)))


def device_of(path: str) -> str:
  """Returns the device that a component of the path names; else "unknown"."""
  parts = path.lower().split("/")
  return next((device for device in DEVICES if device in parts), "unknown")


def _read_table(path: str) -> tuple[list[dict[str, str]], list[str]]:
  text = storage.read_bytes(path).decode("utf-8-sig", errors="replace")
  if path.endswith(".json") or text.lstrip()[:1] in ("{", "["):
    return _read_json(path, text)
  head = text.split("\n", 1)[0]
  if path.endswith(".tsv"):
    delimiter = "\t"
  elif path.endswith(".csv"):
    delimiter = ","
  else:
    delimiter = "\t" if head.count("\t") >= head.count(",") else ","
  # Strict: a quote that is never closed would take all rows below it in silence.
  reader = csv.DictReader(
      io.StringIO(text, newline=""), delimiter=delimiter, strict=True
  )
  table = []
  try:
    names = [(n or "").strip() for n in reader.fieldnames or ()]
    reader.fieldnames = names
    for cells in reader:
      _check_quotes(cells, delimiter, len(names))
      table.append(
          {k: (v or "").strip() for k, v in cells.items() if isinstance(k, str)}
      )
  except csv.Error as error:
    raise DataError(
        f"{path}: line {reader.reader.line_num} is no row of a table ({error}); close its "
        "quotes, or write it without"
    ) from error
  twice = sorted({name for name in names if name and names.count(name) > 1})
  if twice:
    raise DataError(f"{path}: column(s) {', '.join(twice)} are there twice")
  return table, names


def _check_quotes(cells: Mapping[str, Any], delimiter: str, columns: int) -> None:
  """Refuses a cell that holds a whole row: two quotes were not meant as a pair."""
  for value in cells.values():
    for line in value.split("\n")[1:] if isinstance(value, str) else ():
      if columns > 1 and line.count(delimiter) == columns - 1:
        raise csv.Error("a quote opens a cell that takes other rows in")


def _read_json(path: str, text: str) -> tuple[list[dict[str, str]], list[str]]:
  """Reads a list of objects, {"data": [...]}, or a datalist keyed by split."""
  try:
    tree = json.loads(text)
  except ValueError as error:
    raise DataError(f"{path}: is not JSON: {error}") from error
  if isinstance(tree, dict) and isinstance(tree.get("data"), list):
    tree = tree["data"]
  if not isinstance(tree, dict | list):
    tree = []
  groups = {"": tree} if isinstance(tree, list) else tree
  table = []
  for split, entries in groups.items():
    if not isinstance(entries, list):
      continue  # name, description, numTraining, ... of a datalist
    for entry in entries:
      bare = isinstance(entry, str) and split in _DATALISTS
      cells = {"filepath": entry} if bare else entry
      if not isinstance(cells, dict):
        break  # a list of other things, such as the names of classes
      table.append(_json_cells(path, cells, split))
  if not table:
    raise DataError(
        f"{path}: holds no list of objects; wanted [{{...}}], {{\"data\": [...]}} or "
        "{\"training\": [{\"image\": ...}], ...}"
    )
  return table, list(dict.fromkeys(name for cells in table for name in cells))


def _json_cells(path: str, entry: Mapping[str, Any], split: str) -> dict[str, str]:
  cells = {"split": split} if split else {}
  for name, value in entry.items():
    if name in _DATALIST_KEYS and isinstance(value, list):
      raise DataError(
          f"{path}: {name} {value} is a list; a recording is one file: join its "
          "channels first, or give each its own row"
      )
    name = _DATALIST_KEYS.get(name, name)
    cells[name] = "" if value is None else (
        value.strip() if isinstance(value, str) else json.dumps(value)
    )
  return cells


def _joined(
    cells: Mapping[str, str], person: Mapping[str, str] | None
) -> dict[str, str]:
  """Returns a row's cells, and the participant's where the row leaves one empty."""
  own = {k: v for k, v in cells.items() if v.lower() not in _NO_LABEL}
  return {**cells, **(person or {}), **own}


def _check_columns(path: str, found: Sequence[str], wanted: Sequence[str]):
  missing = [name for name in wanted if name not in found]
  if not missing:
    return
  hints = []
  for name in missing:
    close = difflib.get_close_matches(name, found, 3, 0.4)
    hints.append(f"{name} (closest: {', '.join(close)})" if close else name)
  raise DataError(
      f"{path}: missing column(s) {'; '.join(hints)}. Found: "
      f"{', '.join(found) or 'none'}. Rename them, or map them with `columns`."
  )


def _read_participants(path: str | None) -> dict[str, dict[str, str]]:
  if path is None:
    return {}
  table, names = _read_table(path)
  _check_columns(path, names, ["participant_id"])
  table = [cells for cells in table if cells.get("participant_id")]
  counts = collections.Counter(cells["participant_id"] for cells in table)
  twice = sorted(k for k, n in counts.items() if n > 1)
  if twice:
    raise DataError(
        f"{path}: participant(s) listed twice: {', '.join(twice[:5])}; keep one "
        "row each"
    )
  return {cells["participant_id"]: cells for cells in table}


def _to_row(
    cells: Mapping[str, str],
    columns: Mapping[str, str],
    root: str,
    label: str | None,
    split: str | None,
) -> tuple[Row, str]:
  def get(*names: str) -> str:
    for name in names:
      value = cells.get(columns.get(name, name), "")
      if value.lower() not in _NONE:
        return value
    return ""

  path = get("filepath").removeprefix("./")
  name = cells.get(columns.get(label, label), "") if label else ""
  row = Row(
      path=storage.join(root, path) if path else "",
      participant=get("participant_id"),
      device=get("device") or device_of(path),
      region=get("anatomic_region") or "unknown",
      imaging=get("imaging") or "unknown",
      laterality=get("laterality") or "unknown",
      geometry=get("geometry") or _geometry_of(get),
      site=get("site", "clinical_site") or "unknown",
      label=None if name.lower() in _NO_LABEL else name,
      split=get(split) if split else "",
      spacing=_spacing_of(
          get("spacing"), get("pixel_spacing"), get("slice_thickness")
      ),
      modality=get("modality") or "unknown",
      axes=get("axes").upper(),
      key=get("key"),
      series=get("series_instance_uid"),
      time_step_s=_positive(get("time_step_s")),
      size=int(_number(get("size")) or 0) or None,
      checksum=get("checksum"),
  )
  return row, get("sop_instance_uid")


def _reason_to_drop(
    row: Row, uid: str, rows: Mapping[str, Row], uids: set[str], where: str
) -> str | None:
  if not row.participant:
    return "no_participant"
  if not row.path:
    return "no_filepath"
  if (same := rows.get(_plain_id(row))) is not None:
    if same.participant != row.participant:
      raise DataError(
          f"{where}: {row.id} belongs to participants "
          f"{same.participant} and {row.participant}; keep one row"
      )
    return "duplicate_row"
  return "duplicate_uid" if uid and uid in uids else None


def _plain_id(row: Row) -> str:
  """Returns the id that all ways to write a path have in common."""
  return dataclasses.replace(row, path=storage.plain(row.path)).id


def _geometry_of(get: Any) -> str:
  if get("pixel_spacing").lower() == _VARIES:
    return "varying"
  return "line" if _number(get("number_of_frames")) == 1 else "raster"


def _spacing_of(
    whole: str, pixel: str, thickness: str
) -> tuple[float, float, float]:
  """Returns (dz, dy, dx) of "[dz, dy, dx]", else of a thickness and "[dy, dx]"."""
  cells = _cells_of(whole) if whole else [thickness, *_cells_of(pixel)]
  if len(cells) != 3:
    cells = ["" if whole else thickness, "", ""]
  return tuple(map(_positive, cells))


def _cells_of(text: str) -> list[str]:
  return text.strip("[]() ").replace("\\", ",").split(",")


def _positive(text: str) -> float:
  value = _number(text)
  return value if value is not None and value > 0 else math.nan


def _number(text: str) -> float | None:
  try:
    value = float(text)
  except ValueError:
    return None
  return value if math.isfinite(value) else None


def _value(row: Row, field: str) -> str:
  value = getattr(row, field)
  return _UNLABELLED if value is None else value


def _check_fields(fields: Iterable[str], what: str):
  allowed = (*FIELDS, "label")
  for field in fields:
    if field not in allowed:
      close = difflib.get_close_matches(field, allowed, 3, 0.0)
      raise DataError(f"{what}: unknown field {field!r}; closest {', '.join(close)}")


def _filter(
    path: str,
    rows: list[Row],
    filters: Mapping[str, Sequence[str] | str],
    exclude: Mapping[str, Sequence[str] | str],
    lost: collections.Counter[str],
) -> list[Row]:
  for rules, what in ((filters, "filters"), (exclude, "exclude")):
    _check_fields(rules, what)
  for field, values in filters.items():
    values = (values,) if isinstance(values, str) else tuple(map(str, values))
    present = {_value(row, field) for row in rows}
    for value in values:
      if value not in present:
        close = difflib.get_close_matches(value, present, 3, 0.0)
        raise DataError(
            f"{path}: filters.{field}: no row has {value!r}; closest "
            f"{', '.join(close) or 'none'}"
        )
    kept = [row for row in rows if _value(row, field) in values]
    lost[f"filtered_{field}"] += len(rows) - len(kept)
    rows = kept
  for field, values in exclude.items():
    values = (values,) if isinstance(values, str) else tuple(map(str, values))
    kept = [row for row in rows if _value(row, field) not in values]
    lost[f"excluded_{field}"] += len(rows) - len(kept)
    rows = kept
  return rows


def check_fractions(fractions: Mapping[str, float]) -> None:
  """Checks that shares of splits are above 0 and add to 1.

  Raises:
    DataError: naming them.
  """
  bad = {k: v for k, v in fractions.items() if not v > 0}
  if not fractions or bad or abs(sum(fractions.values()) - 1) > 1e-6:
    raise DataError(
        f"splits {dict(fractions)} must be positive shares that add to 1, got "
        f"{sum(fractions.values()):.6g}"
    )


def _strata(
    rows: Sequence[Row], fields: Sequence[str], seed: int
) -> list[list[str]]:
  """Returns participants grouped by what they have, in a seeded order."""
  facts: dict[str, list[set[str]]] = {}
  for row in rows:
    sets = facts.setdefault(row.participant, [set() for _ in fields])
    for found, field in zip(sets, fields, strict=True):
      found.add(_value(row, field))
  strata: dict[str, list[str]] = {}
  for person, sets in facts.items():
    strata.setdefault(repr([sorted(s) for s in sets]), []).append(person)
  return [_shuffled(strata[key], seed) for key in sorted(strata)]


def _shuffled(people: Iterable[str], seed: int) -> list[str]:
  """Returns the people in a seeded order that a newcomer hardly changes."""
  return sorted(
      people, key=lambda person: hashlib.sha256(f"{seed}:{person}".encode()).digest()
  )


def _deal(
    strata: Sequence[Sequence[str]], fractions: Mapping[str, float]
) -> dict[str, str]:
  """Gives each participant to the split that lags most, here and overall."""
  home: dict[str, str] = {}
  total: collections.Counter[str] = collections.Counter()
  for stratum in strata:
    inside: collections.Counter[str] = collections.Counter()
    for n, person in enumerate(stratum, 1):
      name = max(
          fractions,
          key=lambda k: (fractions[k] * n - inside[k])
          + (fractions[k] * (len(home) + 1) - total[k]),
      )
      home[person] = name
      inside[name] += 1
      total[name] += 1
  for name in fractions:
    if not total[name]:
      giver = max(total, key=lambda k: total[k])
      person = [p for p, k in home.items() if k == giver][-1]
      home[person] = name
      total[giver] -= 1
      total[name] += 1
  return home
