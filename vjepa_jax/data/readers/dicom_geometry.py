"""Voxel size and order of the frames of one DICOM object, from its header.

Each length is looked up in the shared functional groups, then the frames' own, then
the top level, then the manifest. Source: DICOM PS3.3 A.52.4 and C.7.6.16.
"""

from collections.abc import Sequence
import math
from typing import Any

import numpy as np

from vjepa_jax.data.readers.base import Spacing
from vjepa_jax.data.readers.dicom_header import Header
from vjepa_jax.data.record import ReadError

# Frames closer to even than this share one pitch; above it, dz is unknown.
PITCH_TOLERANCE = 0.1
# Way as the crow flies over way along the frames: 1 for a raster, less where the
# eye moved, 0.64 for the corners of radial frames over half a turn.
_STRAIGHT = 0.9
_IN_PLANE_TOLERANCE = 0.02
# (0018,1063) FrameTime and (0018,1065) FrameTimeVector.
_TIME_POINTERS = (0x00181063, 0x00181065)


def spacing(
    header: Header, manifest: Spacing | None, frames: Sequence[int] | None = None
) -> tuple[Spacing, dict[str, Any]]:
  """Returns (dz, dy, dx) in mm and what is known of its origin.

  Args:
    header: of a single- or multi-frame object.
    manifest: (dz, dy, dx) in mm for what it leaves open.
    frames: the frames along Z in their order, where not all as stored.
  """
  invalid: list[str] = []
  manifest = manifest or (math.nan,) * 3
  (dy, dx), plane = in_plane(header, manifest, invalid)
  dz, pitch, geometry = _pitch(header, manifest, dx, invalid, frames)
  meta = describe(plane, pitch, invalid, geometry)
  steps = None if pitch == "not_raster" else _position_steps(header, frames)
  if steps is None or not ((steps > 0).all() or (steps < 0).all()):
    return (dz, dy, dx), meta
  axes = _plane_axes(header)
  slant = {} if axes is None else tilt(_places(header, frames), axes)
  if pitch == "varies" or "slice_shear_mm" in slant:
    meta["slice_positions_mm"] = [0.0, *np.abs(steps).cumsum().round(6).tolist()]
  return (dz, dy, dx), meta | (slant if "slice_shear_mm" in slant else {})


def describe(
    plane: str, pitch: str, invalid: list[str], geometry: str = ""
) -> dict[str, Any]:
  """Returns `spacing_source` and the like for the origins of the lengths."""
  meta = {"spacing_source": plane if plane == pitch else f"{plane}+{pitch}"}
  if invalid:
    meta["spacing_invalid"] = "; ".join(sorted(set(invalid)))
  if geometry:
    meta["geometry"] = geometry
  return meta


def in_plane(
    header: Header, manifest: Spacing, invalid: list[str]
) -> tuple[tuple[float, float], str]:
  """Returns (dy, dx) in mm and their origin; notes in `invalid` what is no length."""
  values, origin = _measure(header, "PixelSpacing", invalid)
  if values and len(values) == 2:
    return (values[0], values[1]), origin
  if origin == "varies":
    return (math.nan, math.nan), origin
  if np.isfinite(manifest[1:]).all():
    return (manifest[1], manifest[2]), "manifest"
  return (math.nan, math.nan), "missing"


def stated_pitch(
    header: Header, manifest: Spacing, invalid: list[str]
) -> tuple[float, str]:
  """Returns dz as a header states it, with no position to measure it by."""
  for name, origin in (
      ("SpacingBetweenSlices", "between_slices"),
      ("SliceThickness", "slice_thickness"),
  ):
    values, where = _measure(header, name, invalid)
    if where == "varies":
      return math.nan, "varies"
    if values:
      return values[0], origin
  if math.isfinite(manifest[0]):
    return manifest[0], "manifest"
  return math.nan, "missing"


def even_step(steps: np.ndarray) -> float:
  """Returns the common size of the steps, or NaN where they differ."""
  middle = float(np.median(steps))
  # Written so that NaN is not even.
  if middle and (np.abs(steps - middle) <= PITCH_TOLERANCE * abs(middle)).all():
    return abs(middle)
  return math.nan


def cine_step(header: Header) -> float | None:
  """Returns seconds a frame where frames follow each other in time, else None.

  NaN where they do so at no one pace. Ophthalmic tomography is always a volume.
  """
  pointers = header.get("FrameIncrementPointer")
  if pointers is None or header.get("Modality") == "OPT":
    return None
  found = [int(p) for p in (pointers if hasattr(pointers, "__iter__") else [pointers])]
  if len(found) != 1 or found[0] not in _TIME_POINTERS:
    return None
  if header.items("PerFrameFunctionalGroupsSequence"):
    return None
  if found[0] == _TIME_POINTERS[0]:
    steps = np.atleast_1d(np.asarray(header.get("FrameTime", math.nan), float))
  else:
    steps = np.atleast_1d(np.asarray(header.get("FrameTimeVector", math.nan), float))
    steps = steps[1:] if len(steps) > 1 else steps  # The first has none before it.
  step = even_step(steps) / 1000
  return step if 0 < step < math.inf else math.nan


def group(header: Header, index: int, name: str) -> Header | None:
  """Returns a functional group's item: the shared one, else the frame's own."""
  for sequence, at in (
      ("SharedFunctionalGroupsSequence", 0),
      ("PerFrameFunctionalGroupsSequence", index),
  ):
    groups = header.items(sequence)
    found = groups[at].item(name) if len(groups) > at else None
    if found is not None:
      return found
  return None


def frame_values(
    header: Header, sequence: str, name: str, size: int
) -> np.ndarray | None:
  """Returns [frames, size] numbers of the frames' own groups, None unless all have."""
  values = []
  for frame in header.items("PerFrameFunctionalGroupsSequence"):
    item = frame.item(sequence)
    value = item.get(name) if item is not None else None
    value = [value] if size == 1 and value is not None else value
    if value is None or len(value) != size:
      return None
    values.append([float(v) for v in value])
  return np.array(values) if len(values) > 1 else None


def frame_order(header: Header, source: str) -> np.ndarray | None:
  """Returns [T, Z] indices of the frames where they are not stored in that order.

  Frames of several temporal positions become T; frames whose positions follow one
  line but out of order are sorted along it. Ophthalmic tomography stays as scanned.

  Raises:
    ReadError: irregular_frames, where the temporal positions differ in their places,
      or where each place has several frames and no time.
  """
  places = frame_values(header, "PlanePositionSequence", "ImagePositionPatient", 3)
  if places is None or header.get("Modality") == "OPT":
    return None
  along = places @ _main_direction(places)
  times = frame_values(header, "FrameContentSequence", "TemporalPositionIndex", 1)
  if times is not None and len(np.unique(times)) > 1:
    return _order_times(along, times[:, 0], source)
  _check_visits(along, source)
  steps = np.diff(along)
  if (steps > 0).all() or (steps < 0).all():
    return None
  order = np.argsort(along, kind="stable")
  straight = np.ptp(along) > _STRAIGHT * np.linalg.norm(np.ptp(places, axis=0))
  distinct = np.diff(along[order]) > 1e-5
  return order[None] if straight and distinct.all() else None


def _check_visits(along: np.ndarray, source: str):
  """Refuses frames that come to each of several places more than once."""
  _, visits = np.unique(along.round(3), return_counts=True)
  if len(visits) > 1 and visits.min() > 1:
    raise ReadError(
        source, "irregular_frames",
        f"{len(along)} frames at {len(visits)} places, and no temporal positions",
        "split the file by what its frames differ in, such as contrast",
    )


def _main_direction(places: np.ndarray) -> np.ndarray:
  """Returns the unit vector along which the places lie furthest apart."""
  far = places - places[np.linalg.norm(places - places[0], axis=1).argmax()]
  direction = far[np.linalg.norm(far, axis=1).argmax()]
  length = np.linalg.norm(direction)
  # The sign is free: it is chosen so that the largest part is positive.
  sign = np.sign(direction[np.abs(direction).argmax()]) or 1.0
  return sign * direction / (length or 1.0)


def _order_times(along: np.ndarray, times: np.ndarray, source: str) -> np.ndarray:
  rows = []
  for time in np.unique(times):
    frames = np.flatnonzero(times == time)
    rows.append(frames[np.argsort(along[frames], kind="stable")])
  if len({len(row) for row in rows}) > 1 or not np.allclose(
      [along[row] for row in rows], along[rows[0]], atol=1e-3
  ):
    raise ReadError(
        source, "irregular_frames",
        f"{len(rows)} temporal positions whose frames lie in different places",
    )
  return np.array(rows)


def slice_normal(axes: np.ndarray) -> np.ndarray | None:
  """Returns the unit normal of (row, column) directions [6]; None if they are none."""
  normal = np.cross(axes[:3], axes[3:])
  length = np.linalg.norm(normal)
  return normal / length if 0.9 < length < 1.1 else None


def tilt(places: np.ndarray, axes: np.ndarray) -> dict[str, Any]:
  """Returns the angle of the slices' way to their normal, and their shear.

  Args:
    places: [Z, 3] their corners in mm.
    axes: [6] the directions of a row and of a column.
  """
  normal = slice_normal(axes)
  if len(places) < 2 or normal is None:
    return {}
  way = places[-1] - places[0]
  length = np.linalg.norm(way)
  cosine = min(1.0, abs(way @ normal) / length) if length else 1.0
  # How far each corner lies from the first within the plane: (down a column, along
  # a row), in mm.
  shear = (places - places[0]) @ np.array([axes[3:], axes[:3]]).T
  meta = {
      "gantry_tilt_deg": round(math.degrees(math.acos(cosine)), 4),
      "slice_steps_mm": np.linalg.norm(
          np.diff(places, axis=0), axis=1
      ).round(6).tolist(),
  }
  if np.abs(shear).max() > 1e-3:
    meta["slice_shear_mm"] = shear.round(6).tolist()
  return meta


def _plane_axes(header: Header) -> np.ndarray | None:
  """Returns the (row, column) directions [6] that all frames share, else None."""
  own = frame_values(header, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
  if own is None:
    item = group(header, 0, "PlaneOrientationSequence") or header
    stated = item.get("ImageOrientationPatient")
    own = np.array([stated if stated is not None else ()], float)
  if own.shape[1] != 6 or not np.abs(own - own[0]).max() <= 1e-2:
    return None
  return own[0] if slice_normal(own[0]) is not None else None


def _places(header: Header, frames: Sequence[int] | None) -> np.ndarray | None:
  """Returns the corners [Z, 3] of frames in mm, in their order, or None."""
  places = frame_values(header, "PlanePositionSequence", "ImagePositionPatient", 3)
  if places is None or (frames is not None and len(frames) < 2):
    return None
  return places if frames is None else places[list(frames)]


def _lengths(values: Any, name: str, invalid: list[str]) -> list[float] | None:
  """Returns positive lengths in mm, or None; notes what is there but is not."""
  if values is None:
    return None
  try:
    numbers = [float(v) for v in np.atleast_1d(np.asarray(values, object))]
  except (TypeError, ValueError):
    invalid.append(f"{name} {values!r}")
    return None
  if not numbers or not all(math.isfinite(v) and v > 0 for v in numbers):
    invalid.append(f"{name} {numbers}")
    return None
  return numbers


def _measure(
    header: Header, name: str, invalid: list[str]
) -> tuple[list[float] | None, str]:
  """Looks a length up: shared groups, per-frame groups, top level."""
  frames = int(header.get("NumberOfFrames") or 1)
  for sequence, origin, count in (
      ("SharedFunctionalGroupsSequence", "shared", 1),
      ("PerFrameFunctionalGroupsSequence", "per_frame", frames),
  ):
    items = [g.item("PixelMeasuresSequence") for g in header.items(sequence)[:count]]
    found = [_lengths(i.get(name), name, invalid) for i in items if i is not None]
    found = [value for value in found if value]
    if not found or (origin == "per_frame" and len(found) < frames):
      continue
    if len({len(value) for value in found}) > 1:
      return None, "varies"
    table = np.array(found)
    middle = np.median(table, axis=0)
    if (np.abs(table - middle) > _IN_PLANE_TOLERANCE * middle).any():
      return None, "varies"
    return middle.tolist(), origin
  return _lengths(header.get(name), name, invalid), "top_level"


def _pitch(
    header: Header, manifest: Spacing, dx: float, invalid: list[str],
    frames: Sequence[int] | None,
) -> tuple[float, str, str]:
  """Returns (dz, its origin, scan geometry or "")."""
  lines = _frame_lines(header)
  geometry = "" if lines is None else _scan_geometry(lines)
  if geometry not in ("", "raster"):  # Their corners may lie evenly all the same.
    return math.nan, "not_raster", geometry
  steps = _position_steps(header, frames)
  if steps is not None and not steps.any():
    invalid.append("ImagePositionPatient equal in all frames")
  elif steps is not None:
    return *_even(steps, "positions"), geometry
  if lines is not None:
    steps = _line_steps(lines, dx * (int(header.get("Columns")) - 1))
    if np.isfinite(steps).all() and steps.any():
      return *_even(steps, "frame_location"), geometry
  offsets = header.get("GridFrameOffsetVector")  # A dose grid's planes.
  if offsets is not None and np.size(offsets) > 1:
    return *_even(np.diff([float(v) for v in offsets]), "grid_offsets"), geometry
  return *stated_pitch(header, manifest, invalid), geometry


def _even(steps: np.ndarray, origin: str) -> tuple[float, str]:
  """Returns the common step, or NaN where the frames are not evenly spaced."""
  step = even_step(steps)
  return step, "varies" if math.isnan(step) else origin


def _position_steps(
    header: Header, frames: Sequence[int] | None
) -> np.ndarray | None:
  """Returns how far each frame lies from the one before, in mm.

  Along the frames' normal where all share one. Negative where frames turn back; NaN
  where they do not follow one line, as in radial scans, whose corners step evenly
  along a circle, or lie side by side in one plane.
  """
  places = _places(header, frames)
  if places is None:
    return None
  steps = np.diff(places, axis=0)  # [Z - 1, 3]
  lengths = np.linalg.norm(steps, axis=1)
  longest = steps[lengths.argmax()]
  signs = np.where(steps @ longest < 0, -1.0, 1.0)
  straight = np.linalg.norm((signs[:, None] * steps).sum(axis=0)) / max(
      lengths.sum(), np.finfo(float).tiny
  )
  if lengths.any() and not straight > _STRAIGHT:
    return signs * math.nan
  axes = _plane_axes(header)
  if axes is None or not lengths.any():
    return signs * lengths
  apart = np.abs(steps @ slice_normal(axes))
  return signs * np.where((apart < 1e-5) & (lengths > 1e-5), math.nan, apart)


def _frame_lines(header: Header) -> np.ndarray | None:
  """Returns each frame's line on the fundus image, [Z, 2, (row, column)]."""
  lines = frame_values(
      header, "OphthalmicFrameLocationSequence", "ReferenceCoordinates", 4
  )
  return None if lines is None else lines.reshape(-1, 2, 2)


def _scan_geometry(lines: np.ndarray) -> str:
  """Tells parallel frames from frames that turn about a point or close a ring."""
  along = lines[:, 1] - lines[:, 0]
  length = np.linalg.norm(along, axis=1)
  if (length < 1e-6).any():
    return "circle"
  unit = along / length[:, None]
  return "raster" if (np.abs(unit @ unit[0]) > 0.99).all() else "radial"


def _line_steps(lines: np.ndarray, width_mm: float) -> np.ndarray:
  """Returns signed frame steps in mm, scaled by a frame's length on the fundus."""
  along = lines[0, 1] - lines[0, 0]
  length = np.linalg.norm(along)
  normal = np.array([-along[1], along[0]]) / length
  middle = lines.mean(axis=1) @ normal  # [Z]
  return np.diff(middle) * width_mm / length
