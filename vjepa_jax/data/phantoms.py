"""Phantom retinas, written as real Ophthalmic Tomography DICOM.

The sample corpus needs no download and no patient: layered retinas of four
classes, seen by four devices that each write DICOM in a dialect of their own.
The class sits in the shape of layers and lesions; gain, gamma, floor, speckle
and blur are drawn without looking at it, so that plain intensity statistics
stay near chance.
"""

from collections.abc import Callable, Mapping
import csv
import dataclasses
from difflib import get_close_matches
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import cv2
import numpy as np
from pydicom import uid as dicom_uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence

VERSION = 1
PATHOLOGIES = ("normal", "drusen", "fluid", "thinning")
BREAKAGES = ("no_pixel_data", "truncated", "wrong_modality")
# Tops of the layers, from the vitreous down; the last two bound choroid and sclera.
SURFACES = (
    "ilm", "rnfl_gcl", "ipl_inl", "inl_opl", "opl_onl", "onl_ez", "ez_os", "os_rpe",
    "rpe_druse", "bruch", "choroid_sclera",
)
COLUMNS = (
    "participant_id", "manufacturer", "manufacturers_model_name", "anatomic_region",
    "imaging", "laterality", "height", "width", "number_of_frames", "pixel_spacing",
    "slice_thickness", "sop_instance_uid", "filepath", "reference_instance_uid",
    "reference_filepath", "device", "clinical_site", "pathology", "split",
)
PATIENTS = {"train": 110, "probe": 152, "validation": 16}
# Sites of AI-READI, told apart by the first digit of the participant's number.
_SITES = (("UW", 1000), ("UCSD", 4000), ("UAB", 7000))
# Reflectivity above the first surface, then below each of SURFACES.
_REFLECTIVITY = np.array(
    [0.04, 0.62, 0.40, 0.22, 0.42, 0.15, 0.75, 0.38, 0.95, 0.42, 0.50, 0.30],
    np.float32,
)
# Thickness in mm between the first nine surfaces, away from the fovea.
_THICKNESS = np.array([0.045, 0.085, 0.045, 0.035, 0.080, 0.025, 0.025, 0.030])
_MARKER = "corpus.json"
_MACULA = ("82859000", "SCT", "Macula lutea of retina")


@dataclasses.dataclass(frozen=True)
class Device:
  """How one instrument samples the eye, and how it writes what it saw.

  Attributes:
    manufacturer: DICOM Manufacturer.
    model: DICOM Manufacturer's Model Name.
    tag: short name inside file names.
    frames: numbers of B-scans that it writes.
    rows: voxels along the beam (axial).
    columns: voxels along the fast scan.
    field_mm: extent (z, y, x) in mm.
    bits: bits stored; 8 in 8 or 12 in 16.
    photometric: MONOCHROME1 (white is 0) or MONOCHROME2.
    measures: where spacing is: "per_frame" (PixelMeasures of each frame and
      positions), "shared" (shared PixelMeasures and positions), "between"
      (shared PixelMeasures, SpacingBetweenSlices at the top, no positions) or
      "thickness" (shared PixelMeasures with SliceThickness only).
    missing: every how many files the spacing is missing altogether; 0 = never.
    syntaxes: transfer syntaxes, taken in turn.
    gain, gamma, floor, speckle, blur: (low, high) of the uniform draw for a scan.
  """

  manufacturer: str
  model: str
  tag: str
  frames: tuple[int, ...]
  rows: int
  columns: int
  field_mm: tuple[float, float, float]
  bits: int
  photometric: str
  measures: str
  missing: int
  syntaxes: tuple[str, ...]
  gain: tuple[float, float]
  gamma: tuple[float, float]
  floor: tuple[float, float]
  speckle: tuple[float, float]
  blur: tuple[float, float]


_SYNTAX = {
    "explicit": dicom_uid.ExplicitVRLittleEndian,
    "rle": dicom_uid.RLELossless,
    "jpegls": dicom_uid.JPEGLSLossless,
    "jpeg2000": dicom_uid.JPEG2000Lossless,
}

DEVICES: dict[str, Device] = {
    "heidelberg_spectralis": Device(
        "Heidelberg Engineering", "Spectralis", "spectralis", (25, 19), 112, 144,
        (5.8, 1.00, 5.8), 8, "MONOCHROME2", "per_frame", 0, ("explicit",),
        (0.85, 1.10), (0.60, 0.85), (0.01, 0.05), (0.25, 0.45), (0.5, 0.9),
    ),
    "topcon_triton": Device(
        "Topcon", "Triton", "triton", (24,), 96, 128,
        (6.0, 1.05, 6.0), 12, "MONOCHROME2", "shared", 0,
        ("explicit",) * 7 + ("jpegls",),
        (0.70, 1.00), (0.75, 1.05), (0.03, 0.09), (0.40, 0.65), (0.4, 0.8),
    ),
    "topcon_maestro2": Device(
        "Topcon", "Maestro2", "maestro2", (21,), 80, 160,
        (6.0, 0.95, 6.0), 8, "MONOCHROME2", "between", 0,
        ("explicit",) * 3 + ("rle",) + ("explicit",) * 3 + ("jpeg2000",),
        (0.60, 0.95), (0.55, 0.80), (0.04, 0.12), (0.35, 0.60), (0.6, 1.1),
    ),
    "zeiss_cirrus": Device(
        "Carl Zeiss Meditec", "CIRRUS HD-OCT 5000", "cirrus", (20, 28), 88, 120,
        (6.0, 1.10, 6.0), 8, "MONOCHROME1", "thickness", 4, ("explicit",),
        (0.75, 1.10), (0.80, 1.15), (0.02, 0.08), (0.45, 0.75), (0.4, 0.7),
    ),
}


def oct_phantom(
    rng: np.random.Generator,
    *,
    pathology: str,
    device: str,
    laterality: str,
    traits: Mapping[str, float] | None = None,
    frames: int | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
  """Draws one macular volume as the device would store it.

  Args:
    rng: source of all randomness.
    pathology: one of PATHOLOGIES.
    device: one of DEVICES.
    laterality: "R" or "L"; the nasal side is at large x in a right eye.
    traits: what a patient's two eyes share (see `patient_traits`); None draws it.
    frames: number of B-scans; None takes the device's first.

  Returns:
    volume uint8 or uint16 [F, Y, X], y = 0 in the vitreous, bright = large; and
    the truth: `surfaces` float32 [len(SURFACES), F, X] in rows, `lesion` bool
    [F, Y, X], `severity` in 0..1, `spacing_mm` (dz, dy, dx), `pathology`.

  Raises:
    KeyError: for an unknown pathology, device or laterality.
  """
  _known(pathology, PATHOLOGIES, "pathology")
  _known(device, tuple(DEVICES), "device")
  _known(laterality, ("R", "L"), "laterality")
  machine = DEVICES[device]
  traits = patient_traits(rng) if traits is None else traits
  shape = (frames or machine.frames[0], machine.rows, machine.columns)
  spacing = tuple(f / n for f, n in zip(machine.field_mm, shape, strict=True))
  z, x = (
      (np.arange(n) + 0.5) * d - n * d / 2
      for n, d in ((shape[0], spacing[0]), (shape[2], spacing[2]))
  )
  x = x if laterality == "R" else -x
  z, x = z[:, None], x[None, :]
  lesions = _draw_lesions(rng, pathology, traits["severity"])
  surfaces = _surfaces(rng, z, x, machine.field_mm[1], traits, lesions)
  surfaces = (surfaces / spacing[1]).astype(np.float32)
  levels = _REFLECTIVITY.copy()
  levels[1:4] *= traits["inner_light"]
  levels[-2:] *= traits["choroid_light"]
  light, lesion = _reflectivity(
      levels, surfaces, shape[1], z, x, lesions, spacing[1]
  )
  light *= _shadows(rng, z, x, surfaces, shape[1])
  volume = _image(rng, light, machine)
  return volume, {
      "surfaces": surfaces,
      "lesion": lesion,
      "severity": traits["severity"] if pathology != "normal" else 0.0,
      "spacing_mm": spacing,
      "pathology": pathology,
  }


def patient_traits(rng: np.random.Generator) -> dict[str, float]:
  """Draws what both eyes of a patient share: build of the retina and severity."""
  return {
      "inner": rng.normal(1.0, 0.06),
      "outer": rng.normal(1.0, 0.05),
      "choroid": rng.uniform(0.10, 0.22),
      "pit": rng.uniform(0.65, 0.95),
      "pit_mm": rng.uniform(0.35, 0.6),
      "bend": rng.uniform(0.002, 0.010),
      "choroid_light": rng.uniform(0.55, 1.45),
      "inner_light": rng.uniform(0.8, 1.2),
      "severity": rng.uniform(0.4, 1.0),
  }


def _known(name: str, names: tuple[str, ...], what: str) -> None:
  if name not in names:
    near = get_close_matches(str(name), names, n=3, cutoff=0.0)
    raise KeyError(
        f"oct phantom: no {what} {name!r}; the closest are {', '.join(near)}"
    )


def _bump(z, x, lesion) -> np.ndarray:
  """A Gaussian hill [F, X] of height 1 at a lesion's place."""
  zc, xc, size = lesion["z"], lesion["x"], lesion["size"]
  return np.exp(-((z - zc) ** 2 + (x - xc) ** 2) / (2 * size**2))


def _draw_lesions(rng, pathology: str, severity: float) -> list[dict[str, Any]]:
  """Places and sizes in mm of a volume's lesions.

  Every eye gets two faint bumps, as healthy ones have: a single bump is no proof.
  """
  lesions = [
      {"kind": "druse", "height": rng.uniform(0.005, 0.02),
       "size": rng.uniform(0.1, 0.3), "z": rng.uniform(-2.5, 2.5),
       "x": rng.uniform(-2.5, 2.5), "faint": True}
      for _ in range(2)
  ]  # yapf: disable
  if pathology == "thinning":
    return lesions + [{
        "kind": "thin", "loss": 0.22 + 0.28 * severity,
        "angle": rng.uniform(0, 2 * np.pi), "sharp": rng.uniform(0.5, 1.5),
        "faint": False,
    }]
  if pathology == "normal":
    return lesions
  druse = pathology == "drusen"
  count = rng.integers(8, 14)
  for _ in range(count):
    radius, angle = 2.3 * np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
    height = (0.035, 0.05) if druse else (0.07, 0.09)
    lesions.append({
        "kind": "druse" if druse else "cyst",
        "height": height[0] + height[1] * severity * rng.uniform(0.4, 1.0),
        "size": rng.uniform(0.2, 0.4),
        "level": rng.uniform(0.35, 0.8),
        "z": radius * np.sin(angle), "x": radius * np.cos(angle), "faint": False,
    })
  return lesions


def _thicknesses(z, x, traits, lesions, fovea) -> np.ndarray:
  """Thickness in mm of the eight layers from ILM to the RPE's lower side, [8, F, X]."""
  radius = (z - fovea[0]) ** 2 + (x - fovea[1]) ** 2
  pit = traits["pit"] * np.exp(-radius / (2 * traits["pit_mm"] ** 2))
  thick = np.broadcast_to(
      _THICKNESS[:, None, None], (8,) + np.broadcast_shapes(z.shape, x.shape)
  ).copy()
  thick[0] *= 1.0 + 0.16 * x  # nerve fibres gather towards the disc, nasally
  thick[:3] *= (1 - pit) * traits["inner"]
  thick[3:] *= traits["outer"]
  thick[4] *= 1 + 0.35 * pit
  for lesion in lesions:
    if lesion["kind"] == "thin":
      side = z * np.sin(lesion["angle"]) + x * np.cos(lesion["angle"])
      thick[:2] *= 1 - lesion["loss"] / (1 + np.exp(-side * lesion["sharp"] - 1))
    elif lesion["kind"] == "druse":
      thick[4] -= 0.5 * lesion["height"] * _bump(z, x, lesion)
    else:
      thick[2:5] += 0.2 * lesion["height"] * _bump(z, x, lesion)
  return np.maximum(thick, 0.004)


def _surfaces(rng, z, x, depth_mm, traits, lesions) -> np.ndarray:
  """Depth in mm of SURFACES, [11, F, X]."""
  bruch = rng.uniform(0.62, 0.75) * depth_mm
  bruch = bruch + rng.normal(0, 0.012) * z + rng.normal(0, 0.012) * x
  bruch = bruch - traits["bend"] * (z**2 + x**2)
  motion = np.cumsum(rng.normal(0, 0.008, (z.shape[0], 1)), axis=0)
  bruch = bruch + motion - motion.mean()
  fovea = rng.normal(0, 0.25, 2)
  thick = _thicknesses(z, x, traits, lesions, fovea)
  druse = sum(
      (v["height"] * _bump(z, x, v) for v in lesions if v["kind"] == "druse"),
      np.zeros_like(bruch),
  )
  floor = bruch - np.minimum(druse, 0.12)
  above = floor - np.cumsum(thick[::-1], axis=0)[::-1]
  choroid = bruch + traits["choroid"] * (1 + 0.1 * np.sin(1.3 * x + rng.uniform(0, 6)))
  return np.concatenate([above, [floor, bruch, choroid]])


def _reflectivity(
    levels, surfaces, rows, z, x, lesions, dy
) -> tuple[np.ndarray, np.ndarray]:
  """Noiseless reflectivity float32 [F, Y, X] and lesion mask bool [F, Y, X]."""
  y = np.arange(rows, dtype=np.float32)[None, :, None] + 0.5
  light = np.full((surfaces.shape[1], rows, surfaces.shape[2]), levels[0])
  step = np.empty_like(light)
  for surface, change in zip(surfaces, np.diff(levels), strict=True):
    np.subtract(y + 0.5, surface[:, None, :], out=step)
    np.clip(step, 0, 1, out=step)
    step *= change
    light += step
  np.subtract(y, surfaces[-2][:, None, :], out=step)
  np.maximum(step, 0, out=step)
  step *= np.float32(-dy / 0.25)  # light fades over 0.25 mm below the RPE
  light *= cv2.exp(step.reshape(-1, step.shape[-1])).reshape(step.shape)
  drusen = [v for v in lesions if v["kind"] == "druse" and not v["faint"]]
  lesion = np.zeros(light.shape, bool)
  if drusen:
    lesion |= (y > surfaces[8][:, None, :]) & (y < surfaces[9][:, None, :])
    lesion &= (surfaces[9] - surfaces[8] > 0.01 / dy)[:, None, :]
  for v in lesions:
    if v["kind"] == "cyst":
      _carve_cyst(light, lesion, surfaces, y, z, x, v, dy)
    elif v["kind"] == "thin":
      lesion |= (y > surfaces[0][:, None, :]) & (y < surfaces[2][:, None, :])
  return light, lesion


def _carve_cyst(light, lesion, surfaces, y, z, x, cyst, dy) -> None:
  """Darkens one ellipsoid between IPL and ELM, in place."""
  size = 1.3 * cyst["size"]
  rim = 1 - ((z - cyst["z"]) ** 2 + (x - cyst["x"]) ** 2) / size**2
  fs, xs = (np.flatnonzero((rim > 0).any(axis=a)) for a in (1, 0))
  if not fs.size:
    return
  box = (slice(fs[0], fs[-1] + 1), slice(None), slice(xs[0], xs[-1] + 1))
  half = cyst["height"] / dy / 2 * np.sqrt(np.maximum(rim[box[0], box[2]], 0))
  top, bottom = surfaces[2][box[0], box[2]], surfaces[5][box[0], box[2]]
  centre = top + cyst["level"] * (bottom - top)
  inside = np.clip(half[:, None] - np.abs(y - centre[:, None]) + 0.5, 0, 1)
  inside = inside.astype(np.float32) * (half > 0.3)[:, None]
  light[box] += (0.05 - light[box]) * inside
  lesion[box] |= inside > 0.5


def _shadows(rng, z, x, surfaces, rows) -> np.ndarray:
  """Light left below the vessels of the nerve fibre layer, float32 [F, Y, X]."""
  dark = np.zeros(surfaces.shape[1:])
  for _ in range(rng.integers(4, 8)):
    side = rng.choice((-1.0, 1.0))
    path = side * (rng.uniform(0.8, 2.6) - rng.uniform(0.0, 0.12) * (x - 2) ** 2)
    path = path + rng.uniform(-0.5, 0.5) * x
    width = rng.uniform(0.04, 0.1)
    dark = np.maximum(
        dark, rng.uniform(0.2, 0.55) * np.exp(-((z - path) ** 2) / (2 * width**2))
    )
  y = np.arange(rows, dtype=np.float32)[None, :, None]
  below = np.clip(y - surfaces[1][:, None, :], 0, 1)
  below *= -dark.astype(np.float32)[:, None, :]
  below += 1
  return below


def _image(rng, light, machine: Device) -> np.ndarray:
  """What the device makes of the light: speckle, blur, floor, gamma, bits."""
  gain, gamma, floor, speckle, blur = (
      rng.uniform(*r)
      for r in (machine.gain, machine.gamma, machine.floor, machine.speckle,
                machine.blur)
  )  # yapf: disable
  light += np.float32(floor)
  noise = rng.standard_exponential(light.shape, np.float32)
  noise *= np.float32(speckle)
  noise += np.float32(1 - speckle)
  light *= noise
  for frame in light:
    cv2.GaussianBlur(frame, (5, 5), blur, dst=frame)
  flat = light.reshape(-1, light.shape[-1])
  flat = cv2.pow(flat, gamma)
  # Gain is set on the scan itself, as auto-exposure does, and so says nothing of
  # how much bright tissue the eye has.
  scale = gain * 0.55 / np.percentile(flat[:, ::7], 97)
  top = 2**machine.bits - 1
  flat *= np.float32(scale * top)
  dtype = np.uint8 if machine.bits == 8 else np.uint16
  return np.clip(flat, 0, top).astype(dtype).reshape(light.shape)


@dataclasses.dataclass(frozen=True)
class _Scan:
  """One file of the corpus, before it is drawn."""

  participant: str
  site: str
  split: str
  pathology: str
  device: str
  laterality: str
  seed: tuple[int, ...]
  number: int  # among the files of its device
  breakage: str = ""

  def uid(self, of: str) -> str:
    """A DICOM UID that follows from the scan alone."""
    who = (self.participant, self.device, self.laterality, self.breakage, of)
    return dicom_uid.generate_uid(entropy_srcs=[str(v) for v in self.seed + who])

  @property
  def path(self) -> pathlib.PurePosixPath:
    """Place of the file below the corpus."""
    tag = DEVICES[self.device].tag
    name = (
        f"{self.participant}_{tag}_mac_oct_{self.laterality.lower()}_"
        f"{self.uid('instance')}.dcm"
    )
    return pathlib.PurePosixPath(
        "retinal_oct", "structural_oct", self.device, self.participant, name
    )


def write_oct_corpus(
    folder: str | os.PathLike[str],
    *,
    patients: Mapping[str, int] | None = None,
    seed: int = 0,
    broken: int = 6,
) -> pathlib.Path:
  """Writes the sample corpus of OPT DICOM files, once.

  Each patient gives a right and a left eye, on two different devices. The
  default corpus has 276 patients and 552 sound files. A second call with the
  same options returns at once; another process never sees half a corpus.

  Args:
    folder: where the corpus goes; must not exist, be empty, or hold this corpus.
    patients: split name -> number of patients; None takes PATIENTS. The split
      named "train" carries no pathology in the manifest.
    seed: source of all randomness; equal seeds write equal bytes.
    broken: further files that no reader can use (BREAKAGES in turn), entered in
      the manifest as scans of the first split.

  Returns:
    Path of `manifest.tsv` with COLUMNS; `filepath` starts at the folder.

  Raises:
    ValueError: if the folder holds something else, or a count is negative.
  """
  folder = pathlib.Path(folder)
  patients = dict(PATIENTS if patients is None else patients)
  if broken < 0 or not patients or min(patients.values()) < 0:
    raise ValueError(
        f"write_oct_corpus: patients {patients} and broken {broken} must be counts "
        "of at least 0, with at least one split"
    )
  options = {
      "version": VERSION, "seed": seed, "patients": patients, "broken": broken
  }  # yapf: disable
  return write_once(
      folder, options, lambda draft: _write_files(draft, _plan(patients, seed, broken))
  )


def write_once(
    folder: pathlib.Path, options: Mapping[str, Any],
    write: Callable[[pathlib.Path], None],
) -> pathlib.Path:
  """Writes a corpus, unless the folder holds this very one.

  Args:
    folder: where it goes; must not exist, be empty, or hold this corpus.
    options: that it follows from.
    write: writes it, with its `manifest.tsv`, into an empty folder.

  Returns:
    Path of `manifest.tsv`.

  Raises:
    ValueError: if the folder holds something else.
  """
  if _holds(folder, options):
    return folder / "manifest.tsv"
  folder.parent.mkdir(parents=True, exist_ok=True)
  draft = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
  try:
    write(draft)
    (draft / _MARKER).write_text(json.dumps(_marker(options), indent=2) + "\n")
    try:
      draft.rename(folder)
    except OSError:
      if not _holds(folder, options):  # another process may have been first
        raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)
  return folder / "manifest.tsv"


def _marker(options: Mapping[str, Any]) -> dict[str, Any]:
  text = json.dumps(options, sort_keys=True)
  return {**options, "hash": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _holds(folder: pathlib.Path, options: Mapping[str, Any]) -> bool:
  """Whether the folder is this very corpus; ValueError where it is another."""
  if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
    return False
  marker = folder / _MARKER
  found = json.loads(marker.read_text()) if marker.is_file() else None
  if found == _marker(options):
    return True
  what = "no phantom corpus" if found is None else f"a corpus of other options {found}"
  raise ValueError(
      f"phantoms: {folder} holds {what}, wanted {_marker(options)}; name "
      "another folder or remove this one"
  )


def _plan(patients: Mapping[str, int], seed: int, broken: int) -> list[_Scan]:
  """All files in order; device, site and class are balanced against each other."""
  names = tuple(DEVICES)
  # Ordered pairs of devices; neighbours in the list share none, so that a small
  # corpus meets all four.
  order = ((0, 1), (2, 3), (1, 2), (3, 0), (0, 2), (1, 3))
  half = [(names[a], names[b]) for a, b in order]
  pairs = half + [pair[::-1] for pair in half]
  made = dict.fromkeys(DEVICES, 0)
  scans, running = [], 0
  for split, count in patients.items():
    for p in range(count):
      site, base = _SITES[p % len(_SITES)]
      running += 1
      # Each class meets each of the twelve pairs once in 48 patients.
      pair = pairs[(p // 4 + p % 4) % 12]
      for device, laterality in zip(pair, "RL", strict=True):
        scans.append(_Scan(
            str(base + running), site, split, PATHOLOGIES[p % 4], device, laterality,
            (seed, *split.encode(), p), made[device],
        ))  # yapf: disable
        made[device] += 1
  for i in range(broken if scans else 0):
    scan = scans[i * 3 % len(scans)]
    breakage = BREAKAGES[i % len(BREAKAGES)]
    scans.append(
        dataclasses.replace(scan, seed=scan.seed + (1 + i,), breakage=breakage)
    )
  return scans


def _write_files(folder: pathlib.Path, scans: list[_Scan]) -> None:
  with (folder / "manifest.tsv").open("w", newline="") as file:
    writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    for scan in scans:
      dataset, truth = _dataset(scan)
      path = folder / scan.path
      path.parent.mkdir(parents=True, exist_ok=True)
      dataset.save_as(path, enforce_file_format=True)
      if scan.breakage == "truncated":
        os.truncate(path, int(path.stat().st_size * 0.6))
      writer.writerow(_row(scan, dataset, truth["spacing_mm"]))


def _row(scan: _Scan, dataset: Dataset, spacing: tuple[float, ...]) -> dict[str, Any]:
  machine = DEVICES[scan.device]
  known = not _lacks_spacing(scan)
  pixel_spacing = f"[{spacing[1]:.6f}, {spacing[2]:.6f}]" if known else ""
  if machine.measures == "per_frame":
    pixel_spacing = "Varies by frame"
  thick = known and machine.measures in ("shared", "thickness")
  return {
      "participant_id": scan.participant,
      "manufacturer": machine.manufacturer,
      "manufacturers_model_name": machine.model,
      "anatomic_region": "Macula",
      "imaging": "OCT",
      "laterality": scan.laterality,
      "height": dataset.Rows,
      "width": dataset.Columns,
      "number_of_frames": dataset.get("NumberOfFrames", 1),
      "pixel_spacing": pixel_spacing,
      "slice_thickness": f"{spacing[0]:.6f}" if thick else "",
      "sop_instance_uid": dataset.SOPInstanceUID,
      "filepath": f"/{scan.path}",
      "reference_instance_uid": scan.uid("reference"),
      "reference_filepath": "",
      "device": scan.device,
      "clinical_site": scan.site,
      "pathology": "" if scan.split == "train" else scan.pathology,
      "split": scan.split,
  }


def _lacks_spacing(scan: _Scan) -> bool:
  every = DEVICES[scan.device].missing
  return bool(every) and scan.number % every == every - 1


def _dataset(scan: _Scan) -> tuple[Dataset, dict[str, Any]]:
  """Draws a scan and dresses it as its device would."""
  machine = DEVICES[scan.device]
  person = np.random.Generator(np.random.SFC64(scan.seed))
  eye = np.random.Generator(np.random.SFC64(scan.seed + (ord(scan.laterality),)))
  volume, truth = oct_phantom(
      eye,
      pathology=scan.pathology,
      device=scan.device,
      laterality=scan.laterality,
      traits=patient_traits(person),
      frames=machine.frames[scan.number % len(machine.frames)],
  )
  dataset = _header(scan, volume.shape)
  if scan.breakage == "wrong_modality":
    volume = volume[:1]
    dataset.SOPClassUID = dicom_uid.OphthalmicPhotography8BitImageStorage
    dataset.Modality = "OP"
    dataset.NumberOfFrames = 1
  else:
    _functional_groups(dataset, scan, truth["spacing_mm"])
  if scan.breakage != "no_pixel_data":
    syntax = machine.syntaxes[scan.number % len(machine.syntaxes)]
    _pixels(dataset, volume, machine, syntax)
  dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
  return dataset, truth


def _header(scan: _Scan, shape: tuple[int, int, int]) -> Dataset:
  """What every dialect says alike."""
  machine = DEVICES[scan.device]
  d = Dataset()
  d.file_meta = FileMetaDataset()
  d.file_meta.TransferSyntaxUID = dicom_uid.ExplicitVRLittleEndian
  d.file_meta.MediaStorageSOPInstanceUID = scan.uid("instance")
  d.SOPClassUID = dicom_uid.OphthalmicTomographyImageStorage
  d.SOPInstanceUID = scan.uid("instance")
  d.StudyInstanceUID = scan.uid("study")
  d.SeriesInstanceUID = scan.uid("series")
  d.FrameOfReferenceUID = scan.uid("frame of reference")
  d.Modality = "OPT"
  d.ImageType = ["ORIGINAL", "PRIMARY"]
  d.Manufacturer = machine.manufacturer
  d.ManufacturerModelName = machine.model
  d.DeviceSerialNumber = "0"
  d.SoftwareVersions = f"phantom {VERSION}"
  d.InstitutionName = scan.site
  d.PatientName = f"PHANTOM^{scan.participant}"
  d.PatientID = scan.participant
  d.PatientBirthDate = d.PatientSex = d.AccessionNumber = d.StudyID = ""
  d.ReferringPhysicianName = ""
  d.StudyDate = d.ContentDate = "20240101"
  d.StudyTime = d.ContentTime = "120000"
  d.AcquisitionDateTime = "20240101120000"
  d.SeriesNumber = d.InstanceNumber = 1
  d.ImageComments = "synthetic retina, no patient"
  d.ImageLaterality = scan.laterality
  d.AnatomicRegionSequence = Sequence([_code(*_MACULA)])
  d.AcquisitionDeviceTypeCodeSequence = Sequence(
      [_code("392012008", "SCT", "Optical Coherence Tomography Scanner")]
  )
  d.BurnedInAnnotation = "NO"
  d.PresentationLUTShape = (
      "INVERSE" if machine.photometric == "MONOCHROME1" else "IDENTITY"
  )
  d.NumberOfFrames, d.Rows, d.Columns = shape
  return d


def _item(**attributes: Any) -> Dataset:
  item = Dataset()
  for key, value in attributes.items():
    setattr(item, key, value)
  return item


def _one(**attributes: Any) -> Sequence:
  return Sequence([_item(**attributes)])


def _code(value: str, scheme: str, meaning: str) -> Dataset:
  return _item(
      CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning
  )


def _functional_groups(d: Dataset, scan: _Scan, spacing: tuple[float, ...]) -> None:
  """Spacing, positions and anatomy, each where this device keeps them."""
  machine = DEVICES[scan.device]
  dz, in_plane = round(spacing[0], 6), [round(v, 6) for v in spacing[1:]]
  shared = _item(
      FrameAnatomySequence=_one(
          FrameLaterality=scan.laterality,
          AnatomicRegionSequence=Sequence([_code(*_MACULA)]),
      ),
      PlaneOrientationSequence=_one(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
  )
  if machine.bits > 8:
    shared.PixelValueTransformationSequence = _one(
        RescaleSlope=2, RescaleIntercept=16, RescaleType="US"
    )
  if not _lacks_spacing(scan):
    measures = {
        "shared": {"PixelSpacing": in_plane, "SliceThickness": dz},
        "between": {"PixelSpacing": in_plane},
        "thickness": {"PixelSpacing": in_plane, "SliceThickness": dz},
    }.get(machine.measures)
    if measures:
      shared.PixelMeasuresSequence = _one(**measures)
    if machine.measures == "between":
      d.SpacingBetweenSlices = dz
  frames = []
  for i in range(d.NumberOfFrames):
    frame = _item(FrameContentSequence=_one(
        InStackPositionNumber=i + 1, StackID="1", DimensionIndexValues=[1, i + 1]
    ))  # yapf: disable
    if machine.measures in ("per_frame", "shared"):
      place = [-spacing[2] * d.Columns / 2, 0, (i - d.NumberOfFrames / 2) * dz]
      frame.PlanePositionSequence = _one(
          ImagePositionPatient=[round(float(v), 6) for v in place]
      )
    if machine.measures == "per_frame":
      frame.PixelMeasuresSequence = _one(PixelSpacing=in_plane)
      frame.OphthalmicFrameLocationSequence = _one(
          ReferencedSOPClassUID=dicom_uid.OphthalmicPhotography8BitImageStorage,
          ReferencedSOPInstanceUID=scan.uid("reference"),
          ReferenceCoordinates=[30.0 * i + 1, 1.0, 30.0 * i + 1, 768.0],
          OphthalmicImageOrientation="LINEAR",
      )
    frames.append(frame)
  d.SharedFunctionalGroupsSequence = Sequence([shared])
  d.PerFrameFunctionalGroupsSequence = Sequence(frames)


def _pixels(d: Dataset, volume: np.ndarray, machine: Device, syntax: str) -> None:
  """Stores a bright-is-large volume [F, Y, X] in the device's own way."""
  if machine.photometric == "MONOCHROME1":
    volume = 2**machine.bits - 1 - volume
  d.SamplesPerPixel = 1
  d.PhotometricInterpretation = machine.photometric
  d.BitsAllocated = volume.dtype.itemsize * 8
  d.BitsStored, d.HighBit = machine.bits, machine.bits - 1
  d.PixelRepresentation = 0
  d.PixelData = volume.astype(volume.dtype.newbyteorder("<"), copy=False).tobytes()
  d["PixelData"].VR = "OB" if volume.itemsize == 1 else "OW"
  if syntax != "explicit":
    d.compress(_SYNTAX[syntax], generate_instance_uid=False)
