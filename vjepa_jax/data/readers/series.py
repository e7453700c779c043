"""The slices of one DICOM series, a file each, as one volume.

Slices are ordered by their position along the slice normal, never by name. What
is uneven about them (gaps, duplicates, a tilted gantry) is told in the Record's meta:
`slice_positions_mm`, `slice_steps_mm`, `slice_gaps`, `duplicate_slices`,
`gantry_tilt_deg` and `slice_shear_mm`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import dataclasses
import math
import posixpath
from typing import Any

import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.readers import dicom, dicom_geometry, dicom_header
from vjepa_jax.data.readers.base import ReadOptions, check_voxels, to_voxels
from vjepa_jax.data.readers.dicom_header import Parsed
from vjepa_jax.data.record import ReadError, Record

SUFFIXES = (".dcm", ".dicom", ".dic", ".ima")
# Files that lie beside slices and are none.
_BESIDE = ("dicomdir", "thumbs.db", "license", "readme", "version", "lockfile")
_HEAD_BYTES = 1 << 16
_THREADS = 16
_BATCH = 128
# What tells the images of one place apart that are not of several times.
_CONTRASTS = (
    "EchoTime", "EchoNumbers", "ImageType", "DiffusionBValue", "FlipAngle",
    "InversionTime", "ConvolutionKernel", "ReconstructionDiameter",
)
_TIMES = (
    "TemporalPositionIdentifier", "TriggerTime", "AcquisitionNumber",
    "AcquisitionDateTime", "AcquisitionTime", "ContentTime",
)


@dataclasses.dataclass(frozen=True)
class Member:
  """One file of a folder or an archive.

  Attributes:
    name: its path, for messages.
    load: load(limit) gives its first `limit` bytes, or all for None.
  """

  name: str
  load: Callable[[int | None], bytes]


@dataclasses.dataclass(eq=False)
class _Slice:
  name: str
  parsed: Parsed
  series: str
  localiser: bool

  def get(self, name: str, default: Any = None) -> Any:
    return self.parsed.header.get(name, default)


def matches_folder(names: Sequence[str]) -> bool:
  """Says whether a folder holds DICOM files, by their names or a few heads."""
  names = [name for name in names if not _is_beside(name)]
  if any(name.lower().endswith(SUFFIXES) for name in names):
    return True
  # Slices often have no suffix, or their number for one.
  bare = [n for n in names if not posixpath.splitext(n)[1].strip(".0123456789")]
  return any(
      dicom_header.is_dicom(storage.read_bytes(name, start=0, stop=1024))
      for name in bare[:3]
  )


def read_folder(path: str, names: Sequence[str], options: ReadOptions) -> Record:
  """Reads a folder of one series; see `read_members`."""

  def load(name: str, limit: int | None) -> bytes:
    if limit is None:
      return storage.read_bytes(name, max_bytes=options.max_bytes)
    return storage.read_bytes(name, start=0, stop=limit)

  members = [Member(n, lambda limit, n=n: load(n, limit)) for n in names]
  return read_members(members, path, options)


def read_members(
    members: Sequence[Member], source: str, options: ReadOptions
) -> Record:
  """Reads the slices of one series as one volume.

  Several images of one place become T where they differ in time alone. Localisers
  beside other images are left out. A single multi-frame file is read as itself.

  Args:
    members: the files, in any order.
    source: the folder or archive.
    options: `series` names one of several.

  Returns:
    Record with volume [T, Z, Y, X, 1], Z along the slice normal; dz is the distance
    of the planes, NaN where it varies.

  Raises:
    ReadError: several_series, irregular_frames, slices_missing, or of a single file.
  """
  slices, ignored = _collect(members, source, options)
  try:
    record = _build(slices, source, options)
  except ReadError:
    raise
  except MemoryError as error:
    raise ReadError(source, "too_large", "not enough memory for its voxels") from error
  except Exception as error:  # As in `read_dicom`: values convert on access.
    raise ReadError(
        source, "bad_header", f"{type(error).__name__}: {error}"
    ) from error
  if ignored:
    record.meta["files_ignored"] = len(ignored)
  return record


def _is_beside(name: str) -> bool:
  base = posixpath.basename(name.replace("\\", "/")).lower()
  return (
      base.startswith(".") or "__macosx/" in name.lower()
      or posixpath.splitext(base)[0] in _BESIDE
  )


def _collect(
    members: Sequence[Member], source: str, options: ReadOptions
) -> tuple[list[_Slice], list[str]]:
  """Returns the slices of the series asked for, and the files that are none."""
  ignored = [m.name for m in members if _is_beside(m.name)]
  members = [m for m in members if not _is_beside(m.name)]
  found: dict[str, list[_Slice]] = defaultdict(list)
  total = 0
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    if options.series is not None:
      uids = list(pool.map(_series_uid, members))
      members = [m for m, uid in zip(members, uids) if uid in (options.series, None)]
    for start in range(0, len(members), _BATCH):
      batch = members[start:start + _BATCH]
      for member, data in zip(batch, pool.map(lambda m: m.load(None), batch)):
        total += len(data)
        if total > options.max_bytes:
          raise ReadError(
              source, "too_large", f"more than max_bytes {options.max_bytes:,} in all"
          )
        slice_ = _parse(member, data)
        if slice_ is None:
          ignored.append(member.name)
        else:
          found[slice_.series].append(slice_)
      if len(_with_images(found)) > 1 and options.series is None:
        _refuse_several(found, pool.map(_series_uid, members[start + _BATCH:]), source)
  return _choose(found, ignored, source, options), ignored


def _parse(member: Member, data: bytes) -> _Slice | None:
  """Returns a slice, or None for a file of another kind."""
  if not data:
    raise ReadError(member.name, "empty_file", "0 bytes")
  if not dicom_header.is_dicom(data[:1024]):
    if member.name.lower().endswith(SUFFIXES):
      raise ReadError(member.name, "not_dicom", "no DICM mark at byte 128")
    return None
  parsed = dicom_header.parse(data, member.name)
  try:
    kinds = parsed.header.get("ImageType") or ()
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return _Slice(
        member.name, parsed, str(parsed.header.get("SeriesInstanceUID", "")),
        "LOCALIZER" in (str(kind).upper() for kind in kinds),
    )
  except Exception as error:  # As in `dicom.to_record`: values convert on access.
    raise ReadError(
        member.name, "bad_header", f"{type(error).__name__}: {error}"
    ) from error


def _series_uid(member: Member) -> str | None:
  """Returns a file's series by its head alone, None where that does not say."""
  try:
    found = _parse(member, member.load(_HEAD_BYTES))
    return None if found is None else found.series
  except ReadError:
    return None


def _with_images(found: dict[str, list[_Slice]]) -> list[str]:
  """Returns the series that hold images, localisers not counted beside others."""
  images = [
      uid for uid, slices in found.items()
      if any(s.parsed.pixels is not None for s in slices)
  ]
  proper = [uid for uid in images if not all(s.localiser for s in found[uid])]
  return proper or images


def _refuse_several(
    found: dict[str, list[_Slice]], rest: Iterator[str | None], source: str
):
  counts = Counter({uid: len(found[uid]) for uid in _with_images(found)})
  counts.update(uid for uid in rest if uid and (uid in counts or uid not in found))
  listed = [f"{uid} ({n})" for uid, n in counts.most_common(8)]
  more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
  raise ReadError(
      source, "several_series",
      f"{len(counts)} series (and files of each): {', '.join(listed)}{more}",
  )


def _choose(
    found: dict[str, list[_Slice]], ignored: list[str], source: str,
    options: ReadOptions,
) -> list[_Slice]:
  """Returns the one series with images; reports in `ignored` what is left out."""
  if options.series is not None:
    if options.series not in found:
      raise ReadError(
          source, "several_series", f"none of its files is of series {options.series}"
      )
    chosen = [options.series]
  else:
    chosen = _with_images(found)
  if not found:
    raise ReadError(
        source, "unsupported_format",
        f"{len(ignored)} files and no DICOM object among them",
    )
  if not chosen:
    raise ReadError(source, "no_pixel_data", "no file of it has PixelData")
  for uid, slices in found.items():
    if uid not in chosen:
      ignored.extend(s.name for s in slices)
  return found[chosen[0]]


def _build(slices: list[_Slice], source: str, options: ReadOptions) -> Record:
  localisers = [s for s in slices if s.localiser]
  if len(localisers) < len(slices):
    slices = [s for s in slices if not s.localiser]
  else:
    localisers = []
  shapes = [_check_slice(s, options) for s in slices]
  if len(slices) == 1:
    return _read_one(slices[0], source, options, len(localisers))
  shape = _check_alike(slices, shapes, source)
  check_voxels((len(slices), *shape), source, options.max_voxels)
  slices, doubles = _drop_copies(slices)
  along, places = _positions(slices, source)
  order, dt = _arrange(slices, along, source)  # [T, Z]
  chosen = [slices[i] for i in order.ravel()]
  frames, table = _decode(chosen, shape, options)
  volume = to_voxels(dicom.rescale(frames, table, source), source)
  spacing, meta = _spacing(chosen[0], slices, along[order[0]], options)
  meta |= dicom.describe(chosen[0].parsed, table)
  if places is not None:
    _, axes = _plane(chosen[0])
    meta |= dicom_geometry.tilt(places[order[0]], np.array(axes))
  meta |= {"slices": order.shape[1], "duplicate_slices": doubles}
  if localisers:
    meta["localisers_left_out"] = len(localisers)
  if math.isnan(dt) and options.time_step_s and len(order) > 1:
    dt = options.time_step_s
  return Record(
      volume.reshape(*order.shape, *shape, 1), np.array([dt, *spacing], np.float32),
      source, subject=str(chosen[0].get("PatientID", "")), meta=meta,
  )


def _read_one(
    slice_: _Slice, source: str, options: ReadOptions, localisers: int
) -> Record:
  record = dicom.to_record(slice_.parsed, source, options)
  if localisers:
    record.meta["localisers_left_out"] = localisers
  return record


def _check_slice(slice_: _Slice, options: ReadOptions) -> tuple[int, int, int]:
  dicom.check_modality(slice_.parsed.header, options.modalities, slice_.name)
  shape = dicom.image_shape(slice_.parsed, slice_.name, options.max_voxels)
  pixels = slice_.parsed.pixels
  got = len(pixels.value())
  if pixels.length != dicom_header.UNDEFINED and got < pixels.length:
    # Else its pixels would seem to differ from those of a whole copy.
    raise ReadError(
        slice_.name, "truncated", f"{got:,} of {pixels.length:,} bytes of its pixels"
    )
  return shape


def _check_alike(
    slices: list[_Slice], shapes: list[tuple[int, int, int]], source: str
) -> tuple[int, int]:
  """Returns (rows, columns) that all slices share, as they share what they mean."""
  films = [s.name for s, shape in zip(slices, shapes) if shape[0] > 1]
  if films:
    raise ReadError(
        source, "irregular_frames",
        f"{len(films)} of {len(slices)} files have several frames, such as {films[0]}",
        "give each multi-frame file its own row",
    )
  people = {str(s.get("PatientID", "")) for s in slices}
  if len(people) > 1:  # Splits by subject would part one recording.
    raise ReadError(
        source, "irregular_frames", f"slices of {len(people)} patients in one series",
        "part the series by PatientID",
    )
  kinds = Counter(
      (*shape[1:], str(s.get("PhotometricInterpretation", "")))
      for s, shape in zip(slices, shapes)
  )
  if len(kinds) > 1:
    words = [f"{n} of {r} x {c} {p}" for (r, c, p), n in kinds.most_common(4)]
    raise ReadError(source, "irregular_frames", f"slices differ: {', '.join(words)}")
  return shapes[0][1:]


def _drop_copies(slices: list[_Slice]) -> tuple[list[_Slice], int]:
  """Drops what is the same image of the same place and time twice, and counts it."""
  alike = defaultdict(list)
  for slice_ in slices:
    place = slice_.get("ImagePositionPatient")
    mark = slice_.get("SOPInstanceUID") if place is None else tuple(map(float, place))
    times = tuple(str(slice_.get(name, "")) for name in (*_TIMES, *_CONTRASTS))
    alike[mark, times].append(slice_)
  kept = []
  for group in alike.values():
    seen: list[memoryview] = []
    for slice_ in group:
      value = slice_.parsed.pixels.value()
      if value not in seen:
        seen.append(value)
        kept.append(slice_)
  return kept, len(slices) - len(kept)


def _positions(
    slices: list[_Slice], source: str
) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns places along the slice normal in mm, and corners [n, 3] in mm or None."""
  frames = [_plane(s) for s in slices]
  if all(frame is not None for frame in frames):
    places = np.array([place for place, _ in frames])
    axes = np.array([orientation for _, orientation in frames])
    if np.abs(axes - axes[0]).max() > 1e-2:
      raise ReadError(
          source, "irregular_frames", "slices of several orientations",
          "split the series by orientation",
      )
    normal = dicom_geometry.slice_normal(axes[0])
    if normal is None:
      raise ReadError(
          source, "bad_header", f"ImageOrientationPatient is {axes[0].tolist()}"
      )
    return places @ normal, places
  for name in ("SliceLocation", "InstanceNumber"):
    values = [s.get(name) for s in slices]
    if all(value is not None for value in values):
      return np.array([float(v) for v in values]), None
  raise ReadError(
      source, "irregular_frames", "slices without position, location or number"
  )


def _plane(slice_: _Slice) -> tuple[list[float], list[float]] | None:
  """Returns a slice's corner and axes: its own, or its functional group's."""
  header = slice_.parsed.header
  group = dicom_geometry.group
  at = group(header, 0, "PlanePositionSequence") or header
  along = group(header, 0, "PlaneOrientationSequence") or header
  place, axes = at.get("ImagePositionPatient"), along.get("ImageOrientationPatient")
  if place is None or axes is None or len(place) != 3 or len(axes) != 6:
    return None
  values = [float(v) for v in (*place, *axes)]
  return (values[:3], values[3:]) if all(map(math.isfinite, values)) else None


def _arrange(
    slices: list[_Slice], along: np.ndarray, source: str
) -> tuple[np.ndarray, float]:
  """Returns [T, Z] indices by time and place, and seconds between times."""
  order = np.argsort(along, kind="stable")
  steps = np.diff(along[order])
  apart = steps[steps > 1e-5]
  if not len(apart) and len(slices) > 1:
    groups = [order.tolist()]
  else:
    cuts = np.flatnonzero(steps > 0.02 * np.median(apart)) + 1
    groups = [part.tolist() for part in np.split(order, cuts)]
  sizes = Counter(map(len, groups))
  if set(sizes) == {1}:
    return np.array([[g[0] for g in groups]]), math.nan
  if len(sizes) > 1:
    double = next(g for g in groups if len(g) > 1)
    raise ReadError(
        source, "slices_missing",
        f"{len(slices)} slices at {len(groups)} places, such as "
        f"{' and '.join(slices[i].name for i in double[:2])} at "
        f"{along[double[0]]:.6g} mm, with pixels that differ",
    )
  return _arrange_times(slices, groups, source)


def _arrange_times(
    slices: list[_Slice], groups: list[list[int]], source: str
) -> tuple[np.ndarray, float]:
  """Parts the images of each place by the first mark of time that tells them apart."""
  for name in _CONTRASTS:
    if any(len({str(slices[i].get(name)) for i in g}) > 1 for g in groups):
      raise ReadError(
          source, "irregular_frames",
          f"{len(groups[0])} images a place that differ in {name}",
          "split the series by it",
      )
  for name in _TIMES:
    keys = [[_number(slices[i].get(name)) for i in g] for g in groups]
    if any(None in row or len(set(row)) < len(row) for row in keys):
      continue
    order = np.array([
        [g[i] for i in np.argsort(row)] for g, row in zip(groups, keys)
    ]).T
    return order, _time_step(slices, order)
  raise ReadError(
      source, "irregular_frames",
      f"{len(groups[0])} images a place and nothing that tells their times",
  )


def _number(value: Any) -> float | None:
  """Returns a number, or a DICOM time of day (HHMMSS.F) or date and time, in s."""
  if value is None or str(value) == "":
    return None
  text = str(value).split("+")[0].split("-")[0] if len(str(value)) > 12 else str(value)
  try:
    return float(text)
  except ValueError:
    return None


def _time_step(slices: list[_Slice], order: np.ndarray) -> float:
  """Returns seconds between the times of the first place, NaN where unknown."""
  first = [slices[i] for i in order[:, 0]]
  trigger = [_number(s.get("TriggerTime")) for s in first]
  if None not in trigger and len(set(trigger)) > 1:
    return _positive_step(np.array(trigger) / 1000)
  for name in ("AcquisitionTime", "ContentTime"):
    clock = [_seconds(s.get(name)) for s in first]
    if None not in clock and len(set(clock)) > 1:
      return _positive_step(np.array(clock))
  return math.nan


def _positive_step(times: np.ndarray) -> float:
  steps = np.diff(times)
  return dicom_geometry.even_step(steps) if (steps > 0).all() else math.nan


def _seconds(value: Any) -> float | None:
  """Returns a time of day HHMMSS.F in seconds."""
  text = str(value or "")
  if len(text) < 6 or not text[:6].isdigit():
    return None
  number = _number(text[4:])
  hours, minutes = int(text[:2]), int(text[2:4])
  return None if number is None else hours * 3600 + minutes * 60 + number


def _decode(
    slices: list[_Slice], shape: tuple[int, int], options: ReadOptions
) -> tuple[np.ndarray, np.ndarray]:
  """Returns frames [n, Y, X] as stored, and their [n, (slope, intercept)]."""
  volume, tables = None, []
  for index, slice_ in enumerate(slices):
    frame = dicom.stored_frames(
        slice_.parsed, (1, *shape), options, slice_.name
    )[0]
    if volume is None:
      volume = np.empty((len(slices), *shape), frame.dtype)
    elif frame.dtype != volume.dtype:
      volume = volume.astype(np.result_type(volume, frame), copy=False)
    volume[index] = frame
    tables.append(dicom.rescale_table(slice_.parsed.header, 1)[0])
  return volume, np.array(tables)


def _spacing(
    first: _Slice, slices: list[_Slice], along: np.ndarray, options: ReadOptions
) -> tuple[tuple[float, float, float], dict[str, Any]]:
  """Returns (dz, dy, dx) in mm; dz of the places, else as the slices state it."""
  invalid: list[str] = []
  manifest = options.manifest_spacing or (math.nan,) * 3
  (dy, dx), plane = dicom_geometry.in_plane(first.parsed.header, manifest, invalid)
  stated = np.array([s.get("PixelSpacing") or (math.nan,) * 2 for s in slices], float)
  if (np.abs(stated - stated[0]) > 0.02 * np.abs(stated[0])).any():
    (dy, dx), plane = (math.nan, math.nan), "varies"
  measured = _plane(first) is not None or first.get("SliceLocation") is not None
  if len(along) < 2 or not measured:
    dz, pitch = dicom_geometry.stated_pitch(first.parsed.header, manifest, invalid)
    return (dz, dy, dx), dicom_geometry.describe(plane, pitch, invalid)
  steps = np.diff(along)
  dz = dicom_geometry.even_step(steps)
  pitch = "varies" if math.isnan(dz) else "positions"
  meta = dicom_geometry.describe(plane, pitch, invalid)
  meta["slice_positions_mm"] = along.round(6).tolist()
  meta["slice_gaps"] = _gaps(steps)
  return (dz, dy, dx), meta


def _gaps(steps: np.ndarray) -> list[list[int]]:
  """Returns [slice before, slices lost] where all steps are multiples of one."""
  ratio = steps / np.median(steps)
  lost = np.rint(ratio)
  near = dicom_geometry.PITCH_TOLERANCE * np.maximum(lost, 1)
  if (lost < 1).any() or (np.abs(ratio - lost) > near).any():
    return []
  return [[int(i), int(lost[i]) - 1] for i in np.flatnonzero(lost > 1)]
