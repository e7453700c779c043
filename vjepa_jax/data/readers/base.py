"""What all readers share: the options a caller may state, and the checks."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import math
import numbers
from typing import Any

import numpy as np

from vjepa_jax.data.record import DTYPES, ReadError, Record

MAX_VOXELS = 2**30
MAX_BYTES = 8 << 30
# Of arrays that name no axes; [T, Y, X, ...] of four could be anything.
DEFAULT_AXES = {3: "ZYX", 5: "TZYXC"}
COLOURS = ("reject", "luminance")
Spacing = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class ReadOptions:
  """What a caller states about recordings; a reader uses what concerns its format.

  Attributes:
    modalities: DICOM modalities to accept, such as ("OPT",); None: any.
    manifest_spacing: (dz, dy, dx) in mm, for what a file leaves open.
    colour: "reject" or "luminance", for three samples a pixel that mean colour.
    max_voxels: larger recordings are refused before they are decoded.
    max_bytes: larger files are refused before they are fetched.
    axes: letters of the stored axes, slowest first, of T, Z, Y, X and C ("TZYX"),
      where a file does not say or says wrongly; "Q" or "I" of a file are unknown.
    key: name of the array in an HDF5, Zarr or npz file that holds several.
    series: SeriesInstanceUID, for a folder or archive of several DICOM series.
    time_step_s: seconds between time points, for what a file leaves open.
    timeout_s: seconds that decoding one file may take, where a helper process
      decodes.
    frame: the place along T of the one time point to read of a movie in one TIFF.

  Raises:
    ValueError: for an option out of range.
  """

  modalities: tuple[str, ...] | None = None
  manifest_spacing: Spacing | None = None
  colour: str = "reject"
  max_voxels: int = MAX_VOXELS
  max_bytes: int = MAX_BYTES
  axes: str | None = None
  key: str | None = None
  series: str | None = None
  time_step_s: float | None = None
  timeout_s: float = 120.0
  frame: int | None = None

  def __post_init__(self):
    faults = read_option_faults(dataclasses.asdict(self))
    if faults:
      raise ValueError("read: " + "; ".join(faults))


def read_option_faults(options: dict[str, Any]) -> list[str]:
  """Says what is wrong with fields of `ReadOptions`; an empty list is well."""
  faults = []
  colour, axes = options.get("colour", "reject"), options.get("axes")
  if colour not in COLOURS:
    faults.append(f"colour is {colour!r}, must be one of {COLOURS}")
  if isinstance(options.get("modalities"), str):
    faults.append(
        f"modalities is {options['modalities']!r}, must be names, such as (\"OPT\",)"
    )
  for name in ("max_voxels", "max_bytes"):
    most = options.get(name, 1)
    if not _is_number(most) or not most >= 1:
      faults.append(f"{name} is {most!r}, must be at least 1")
  letters = set(axes or "YX") if isinstance(axes, str | None) else {axes}
  if axes is not None and (
      letters - set("TZYXC") or len(letters) != len(axes) or not set("YX") <= letters
  ):
    faults.append(
        f"axes is {axes!r}, must name each stored axis once, of T, Z, Y, X and C, "
        "Y and X among them"
    )
  for name in ("time_step_s", "timeout_s"):
    seconds = options.get(name)
    if seconds is not None and (
        not _is_number(seconds) or not 0 < seconds < math.inf
    ):
      faults.append(f"{name} is {seconds!r}, must be a positive number of seconds")
  frame = options.get("frame")
  if frame is not None and (
      not isinstance(frame, int) or isinstance(frame, bool) or frame < 0
  ):
    faults.append(f"frame is {frame!r}, must be a place along T, from 0")
  lengths = options.get("manifest_spacing")
  if lengths is not None and (
      len(lengths) != 3 or not all(map(_is_number, lengths))
      or any(v <= 0 or math.isinf(v) for v in lengths)
  ):
    faults.append(
        f"manifest_spacing is {lengths!r}, must be (dz, dy, dx) in mm, above 0, NaN "
        "where unknown"
    )
  return faults


def _is_number(value: Any) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


@contextlib.contextmanager
def border(source: str, reason: str) -> Iterator[None]:
  """Turns whatever a library raises inside into one `ReadError` of this reason."""
  try:
    yield
  except ReadError:
    raise
  except MemoryError as error:
    raise ReadError(
        source, "too_large", "decoding takes more memory than there is"
    ) from error
  except Exception as error:  # Each library raises its own kinds.
    raise ReadError(
        source, reason, f"{type(error).__name__}: {str(error)[:300]}"
    ) from error


def missing_extra(source: str, extra: str, error: ImportError) -> ReadError:
  """Returns the error that names the extra which brings an absent library."""
  return ReadError(
      source, "missing_extra", f"needs {error.name}",
      f"pip install \"vjepa_jax[{extra}]\"",
  )


def check_voxels(shape: Sequence[int], source: str, max_voxels: int) -> None:
  """Refuses a claimed shape before anything of its size is allocated.

  Raises:
    ReadError: empty_file or too_large.
  """
  voxels = math.prod(int(n) for n in shape)
  if voxels < 1:
    raise ReadError(source, "empty_file", f"shape {tuple(shape)} holds no voxel")
  if voxels > max_voxels:
    raise ReadError(
        source, "too_large",
        f"the header claims {' x '.join(map(str, shape))} = {voxels:,} voxels, more "
        f"than max_voxels {max_voxels:,}",
    )


def luminance(pixels: np.ndarray) -> np.ndarray:
  """Returns [..., rows, columns] grey of [..., rows, columns, red green blue ...].

  ITU-R BT.601 weights; the type is kept, whole numbers are rounded.
  """
  grey = np.empty(pixels.shape[:-1], pixels.dtype)
  weights = np.array([0.299, 0.587, 0.114], np.float32)
  # A plane at a time: float32 takes four times the bytes.
  for at in np.ndindex(pixels.shape[:-3]):
    plane = pixels[at][..., :3].astype(np.float32) @ weights
    grey[at] = plane if pixels.dtype.kind == "f" else np.rint(plane)
  return grey


def to_voxels(array: np.ndarray, source: str) -> np.ndarray:
  """Returns the array in a type that a Record holds, values unchanged.

  float16 and float64 become float32, int8 int16, bool uint8; whole numbers of
  32 and 64 bits the smallest of uint8, int16 and uint16 that holds them all, else
  float32. Byte order becomes the machine's.

  Raises:
    ReadError: unsupported_pixels, nan_voxels.
  """
  kind = array.dtype.kind
  if kind not in "biuf":
    raise ReadError(source, "unsupported_pixels", f"array of {array.dtype}")
  if kind == "f":
    with np.errstate(over="ignore"):  # Beyond float32 is infinite, and refused below.
      single = array.astype(np.float32, copy=False)
    if not np.isfinite(single).all():
      raise ReadError(source, "nan_voxels", "NaN or infinite voxels")
    if not single.any() and array.any():
      raise ReadError(
          source, "unsupported_pixels",
          f"every voxel of {array.dtype} is too small for float32",
          "store it in a larger unit",
      )
    return single
  if kind == "b":
    return array.astype(np.uint8)
  if array.dtype == np.int8:
    return array.astype(np.int16)
  if array.dtype.itemsize > 2:
    low, high = int(array.min()), int(array.max())
    fits = (
        t for t in (np.uint8, np.int16, np.uint16)
        if np.iinfo(t).min <= low and high <= np.iinfo(t).max
    )
    array = array.astype(next(fits, np.float32))
  array = array.astype(array.dtype.newbyteorder("="), copy=False)
  assert array.dtype.name in DTYPES
  return array


def arrange(array: np.ndarray, axes: str, source: str) -> np.ndarray:
  """Returns an array of the named axes as [T, Z, Y, X, C]; absent axes get 1.

  Raises:
    ReadError: ambiguous_axes, where the letters do not fit the array.
  """
  if len(axes) != array.ndim or set(axes) - set("TZYXC") or len(set(axes)) != len(axes):
    raise ReadError(
        source, "ambiguous_axes", f"axes {axes!r} for an array of shape {array.shape}"
    )
  array = array.transpose([axes.index(a) for a in "TZYXC" if a in axes])
  absent = tuple(at for at, a in enumerate("TZYXC") if a not in axes)
  return np.expand_dims(array, absent)


def to_record(
    volume: np.ndarray,
    spacing: Sequence[float],
    source: str,
    options: ReadOptions,
    *,
    subject: str = "",
    meta: dict[str, Any] | None = None,
) -> Record:
  """Makes a Record; lengths that the file leaves open come from the options.

  Args:
    volume: [T, Z, Y, X, C].
    spacing: (dt, dz, dy, dx) in s and mm as the file has it; what is not a
      positive finite number is unknown, and named in `meta["spacing_invalid"]`
      unless it is NaN or 0.
    source: the path.
    options: manifest_spacing and time_step_s fill what is unknown.
    subject: the participant, where the file says.
    meta: what else is known; `spacing_source` is set here to "file", "manifest",
      "file+manifest" or "missing" unless given.

  Raises:
    ReadError: as of `to_voxels`.
  """
  meta = dict(meta or {})
  with np.errstate(over="ignore", under="ignore"):
    stated = [float(np.float32(v)) for v in spacing]  # As a Record holds them.
  wrong = [v for v in stated if not math.isnan(v) and v != 0 and not 0 < v < math.inf]
  if wrong:
    meta["spacing_invalid"] = f"spacing {stated}"
  known = [v if 0 < v < math.inf else math.nan for v in stated]
  given = (
      options.time_step_s or math.nan, *(options.manifest_spacing or (math.nan,) * 3)
  )
  filled = [g if math.isnan(k) else k for k, g in zip(known, given, strict=True)]
  origins = []
  if not all(map(math.isnan, known[1:])):
    origins.append("file")
  if any(
      math.isnan(k) and not math.isnan(g)
      for k, g in zip(known[1:], given[1:], strict=True)
  ):
    origins.append("manifest")
  meta.setdefault("spacing_source", "+".join(origins) or "missing")
  return Record(
      to_voxels(volume, source), np.array(filled, np.float32), source,
      subject=subject, meta=meta,
  )
