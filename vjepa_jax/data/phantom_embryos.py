"""Phantom embryos, written as NIH-LS keeps them: a TIFF a minute and tracked nuclei.

An ellipsoid egg in which nuclei divide and shrink, which then elongates, bends and
folds. The eight stages follow one another in every embryo, at a tempo of its own; size,
place, brightness, bleaching, lamp and noise are drawn without looking at them, so that
plain statistics of the intensity say little of the stage.
"""

from collections.abc import Mapping
import csv
import dataclasses
import io
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from vjepa_jax.data.phantoms import write_once
from vjepa_jax.data.readers import tiff

VERSION = 1
STAGES = (
    "1-cell", "2-cell", "4-cell", "8-cell", "16-cell", "32-cell", "bent", "folded",
)
EMBRYOS = {"train": 48, "validation": 8, "test": 8}
FRAMES = 64
SHAPE = (16, 32, 32)
COLUMNS = (
    "participant_id", "filepath", "spacing", "time_step_s", "modality", "device",
    "split",
)
_SPACING_UM = (2.2, 1.8, 1.8)
_MINUTE_S = 60.0
# Half axes of an egg in um (z, y, x), before its own proportions are drawn.
_HALF_AXES = np.array([13.0, 13.5, 23.0])
_RADIUS_UM = 7.0  # of the first nucleus; n nuclei have it times n^(-1/3)
_MOST_CELLS = 44
_TRACK_COLUMNS = (
    "t", "z", "y", "x", "cell_id", "parent_id", "track_id", "radius", "name",
    "div_state",
)


@dataclasses.dataclass(frozen=True)
class Truth:
  """What is true of a phantom.

  Attributes:
    stages: int32 [T], a place in STAGES, never falling.
    counts: int32 [T], nuclei.
    tracks: one dict a nucleus and time point, of the columns of `tracks.txt`.
    spacing_um: (dz, dy, dx).
  """

  stages: np.ndarray
  counts: np.ndarray
  tracks: list[dict[str, Any]]
  spacing_um: tuple[float, float, float]


def embryo(
    rng: np.random.Generator,
    *,
    frames: int = FRAMES,
    shape: tuple[int, int, int] = SHAPE,
) -> tuple[np.ndarray, Truth]:
  """Draws one embryo as its microscope would store it.

  Args:
    rng: source of all randomness.
    frames: minutes; the eight stages are shared out over them.
    shape: (Z, Y, X) voxels over a field of 35 x 58 x 58 um.

  Returns:
    The movie uint16 [T, Z, Y, X], and its truth.

  Raises:
    ValueError: for fewer minutes than stages, or less than 4 voxels along an axis.
  """
  if frames < len(STAGES) or min(shape) < 4:
    raise ValueError(
        f"embryo: {frames} frames of {shape}; needs at least {len(STAGES)} frames and "
        "4 voxels along each axis"
    )
  spacing = tuple(
      s * whole / n for s, whole, n in zip(_SPACING_UM, SHAPE, shape, strict=True)
  )
  clock = _clock(rng, frames)  # 0..8: which stage, and how far in it.
  body = _Body(rng)
  nuclei = _divide(rng, clock)
  scene = _Scene(rng, frames, shape, spacing)
  movie = np.empty((frames, *shape), np.uint16)
  tracks, counts = [], np.empty(frames, np.int32)
  for t in range(frames):
    alive = [nucleus for nucleus in nuclei if nucleus.start <= t < nucleus.end]
    counts[t] = len(alive)
    places = np.array([nucleus.place(t) for nucleus in alive])
    places += rng.normal(0, 0.012, places.shape)
    places = scene.put(body.bend(places, clock[t]), t)
    radius = _RADIUS_UM * body.size * len(alive) ** (-1 / 3)
    light = scene.draw(places, radius, body, clock[t], t)
    movie[t] = scene.expose(rng, light, t)
    tracks += [
        _track(t, nucleus, place, radius / spacing[2])
        for nucleus, place in zip(alive, scene.in_voxels(places), strict=True)
    ]
  return movie, Truth(_stages(counts, clock), counts, tracks, spacing)


def _clock(rng: np.random.Generator, frames: int) -> np.ndarray:
  """Returns float [T], how far development is: whole numbers are where stages end."""
  lengths = rng.uniform(0.8, 1.2, len(STAGES))
  # Some are put under the microscope late in the first stage, some are let go early.
  lengths[0] *= rng.uniform(0.6, 1.0)
  lengths[-1] *= rng.uniform(0.6, 1.0)
  ends = np.cumsum(lengths) / lengths.sum() * frames
  return np.interp(np.arange(frames) + 0.5, [0, *ends], np.arange(len(STAGES) + 1))


def _stages(counts: np.ndarray, clock: np.ndarray) -> np.ndarray:
  """Stages by count up to 32 cells, then by shape; never falling."""
  counted = np.minimum(np.log2(counts).astype(np.int32), 5)
  shaped = np.where(clock >= 7, 7, np.where(clock >= 6, 6, 0))
  return np.maximum.accumulate(np.maximum(counted, shaped)).astype(np.int32)


@dataclasses.dataclass
class _Nucleus:
  """A nucleus from one division to the next; places in the unit ball."""

  number: int
  parent: int
  name: str
  start: int
  end: int
  home: np.ndarray
  origin: np.ndarray

  def place(self, t: int) -> np.ndarray:
    """Where it is: from its mother's place to its own within two minutes."""
    gone = math.exp(-(t - self.start + 0.5) / 0.7)
    return self.home + (self.origin - self.home) * gone


def _divide(rng: np.random.Generator, clock: np.ndarray) -> list[_Nucleus]:
  """Draws the lineage: nuclei of a generation divide within about a minute."""
  frames = len(clock)
  generation = [_Nucleus(1, -1, "P", 0, frames, np.zeros(3), np.zeros(3))]
  found, number = list(generation), 1
  for step in range(1, 7):
    # The sixth division is of some only, while the embryo takes shape.
    at = float(np.interp(step if step < 6 else 5.6, clock, np.arange(frames)))
    if at >= frames - 1:
      break
    mothers = generation
    if step == 6:
      few = rng.permutation(len(generation))[: _MOST_CELLS - len(generation)]
      mothers = [generation[n] for n in few]
    homes = _spread(rng, 2 * len(mothers), radius=0.82)
    generation = []
    for mother in mothers:
      when = int(np.clip(round(at + rng.normal(0, 0.35)), mother.start + 1, frames))
      mother.end = when
      for side in "ap":
        nearest = int(np.argmin(((homes - mother.home) ** 2).sum(axis=1)))
        number += 1
        generation.append(_Nucleus(
            number, mother.number, mother.name + side, when, frames, homes[nearest],
            mother.place(when),
        ))
        homes = np.delete(homes, nearest, axis=0)
    found += generation
  return found


def _spread(rng: np.random.Generator, count: int, radius: float) -> np.ndarray:
  """Returns [n, 3] places in a ball that keep apart from one another."""
  places = rng.normal(size=(count, 3))
  places *= radius * rng.uniform(size=(count, 1)) ** (1 / 3) / np.linalg.norm(
      places, axis=1, keepdims=True
  )
  step = 0.35 * radius / count ** (1 / 3)
  for _ in range(30):
    apart = places[:, None] - places
    distance = np.linalg.norm(apart, axis=-1) + np.eye(count)
    push = (apart / distance[..., None] ** 3).sum(axis=1)
    size = np.linalg.norm(push, axis=1, keepdims=True)
    places = places + step * push / np.maximum(size, 1.0)
    out = np.linalg.norm(places, axis=1, keepdims=True)
    places *= np.minimum(1.0, radius / np.maximum(out, 1e-6))
  return places


class _Body:
  """An embryo's proportions, and how it is bent at a time of its clock."""

  def __init__(self, rng: np.random.Generator):
    self.size = float(rng.uniform(0.9, 1.08))
    self.half = _HALF_AXES * self.size * rng.uniform(0.94, 1.06, 3)
    self._curl = float(rng.uniform(0.9, 1.1))
    self._roll = float(rng.uniform(0, 2 * np.pi))

  def bend(self, places: np.ndarray, clock: float) -> np.ndarray:
    """Returns um (z, y, x) about the egg's centre of places in the unit ball."""
    late = np.clip(clock - 6, 0, 2)
    # Each of the last two stages takes its shape in its first quarter.
    bent, folded = (float(np.clip((late - n) / 0.25, 0, 1)) for n in (0, 1))
    longer = 1 + 0.25 * bent + 0.35 * folded
    thinner = (1 - 0.42 * bent - 0.16 * folded)
    z, y, x = (places * self.half).T
    z, y = z * thinner, y * thinner
    angle = self._curl * (1.5 * bent + 1.7 * folded)
    if angle:
      length = 2 * self.half[2] * longer
      turn = x * longer / length * angle
      radius = length / angle
      x, sink = (radius - y) * np.sin(turn), (radius - y) * np.cos(turn)
      y = radius * np.sin(angle / 2) / (angle / 2) - sink
    roll = self._roll * bent  # The curved side shows in any direction.
    z, y = z * np.cos(roll) - y * np.sin(roll), z * np.sin(roll) + y * np.cos(roll)
    found = np.stack([z, y, x], axis=-1)
    return found / np.maximum(1.0, np.abs(found / (1.05 * self.half)).max())


class _Scene:
  """Where the egg lies before the objective, and what the camera makes of it."""

  def __init__(self, rng, frames, shape, spacing):
    self.shape, self.spacing = shape, np.array(spacing)
    angle = rng.uniform(0, 2 * np.pi)
    self._turn = np.array([
        [1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]
    ])
    walk = np.cumsum(rng.normal(0, 0.08, (frames, 3)), axis=0)
    self._centre = (np.array(shape) - 1) / 2 * self.spacing + rng.normal(0, 0.8, 3) + walk
    self._background = rng.uniform(0.02, 0.08)
    self._haze = rng.uniform(0.1, 0.3)
    self._photons = rng.uniform(40, 110)
    self._gain = rng.uniform(2.0, 6.0)
    self._offset, self._noise = 100.0, rng.uniform(3.0, 9.0)
    time = np.arange(frames) / frames
    # Bleaching, some of it made up for by the laser, and a lamp that wanders.
    wander = rng.uniform(0.05, 0.25) * np.sin(
        2 * np.pi * (rng.uniform(0.7, 2.5) * time + rng.uniform())
    )
    self._lamp = np.exp(
        -rng.uniform(-0.25, 0.45) * time + wander + rng.normal(0, 0.05, frames)
    )
    self._polar = rng.normal(size=(2, 3))
    self._polar /= np.linalg.norm(self._polar, axis=1, keepdims=True)

  def put(self, places: np.ndarray, t: int) -> np.ndarray:
    """Returns um (z, y, x) in the field of places about the egg's centre."""
    return places @ self._turn.T + self._centre[t]

  def in_voxels(self, places: np.ndarray) -> np.ndarray:
    return places / self.spacing

  def draw(self, places, radius, body, clock, t) -> np.ndarray:
    """Returns light [Z, Y, X]: nuclei, haze of the egg, polar bodies, background."""
    # As much light from few large nuclei as from many small ones, at any sharpness.
    sigma = 0.5 * radius
    light = _blobs(places, sigma, self.shape, self.spacing)
    light *= 0.9 / max(float(np.sqrt((light**2).mean())), 1e-6) * 0.12
    late = float(np.clip((clock - 6) * 4, 0, 1))
    egg = _ellipsoid(
        self._turn, self._centre[t], body.half * 1.08, self.shape, self.spacing
    )
    light += self._haze * egg + self._background
    polar = self.put(self._polar * body.half * 1.05, t)
    light += 0.5 * (1 - late) * _blobs(polar, 1.6, self.shape, self.spacing)
    return light

  def expose(self, rng: np.random.Generator, light: np.ndarray, t: int) -> np.ndarray:
    """Returns uint16 counts: photons, gain, offset and read noise."""
    photons = rng.poisson(light * self._photons * self._lamp[t])
    counts = photons * self._gain + self._offset
    counts = counts + rng.normal(0, self._noise, light.shape)
    return np.clip(np.rint(counts), 0, 65535).astype(np.uint16)


def _blobs(places, sigma, shape, spacing) -> np.ndarray:
  """Returns the sum of round Gaussians of height 1 at places [n, 3] in um."""
  along = [
      np.exp(-((np.arange(n) * d - places[:, axis, None]) ** 2) / (2 * sigma**2))
      for axis, (n, d) in enumerate(zip(shape, spacing, strict=True))
  ]  # [n, Z], [n, Y], [n, X]
  planes = (along[0][:, :, None] * along[1][:, None, :]).reshape(len(places), -1)
  return (planes.T @ along[2]).reshape(shape)


def _ellipsoid(turn, centre, half, shape, spacing) -> np.ndarray:
  """Returns 1 within an egg and 0 without, over a soft edge."""
  axes = [np.arange(n) * d - c for n, d, c in zip(shape, spacing, centre, strict=True)]
  grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
  away = np.sqrt((((grid @ turn) / half) ** 2).sum(axis=-1))
  return np.clip((1.08 - away) / 0.16, 0, 1)


def _track(t: int, nucleus: _Nucleus, place: np.ndarray, radius: float) -> dict:
  z, y, x = (f"{v:.2f}" for v in place)
  dividing = "1" if t == nucleus.end - 1 else "0"
  return dict(zip(_TRACK_COLUMNS, (
      t, z, y, x, t * 1000 + nucleus.number,
      (t - 1) * 1000 + (nucleus.parent if t == nucleus.start else nucleus.number)
      if t else -1,
      nucleus.number, f"{radius:.2f}", nucleus.name, dividing,
  ), strict=True))


def write_embryo_corpus(
    folder: str | os.PathLike[str],
    *,
    embryos: Mapping[str, int] | None = None,
    frames: int = FRAMES,
    shape: tuple[int, int, int] = SHAPE,
    seed: int = 0,
) -> pathlib.Path:
  """Writes a corpus of phantom embryos in the layout of NIH-LS, once.

  `nih-ls/EMBRYO/images/EMBRYO_tNNN.tif` (uint16 [Z, Y, X]), `tracks/tracks.txt`,
  `tracks/tracks_polar_bodies.txt`, and `stages.tsv` with the true stage of each minute.
  A second call with the same options returns at once; another process never sees half
  a corpus.

  Args:
    folder: where the corpus goes; must not exist, be empty, or hold this corpus.
    embryos: split name -> number of embryos; None takes EMBRYOS.
    frames: minutes of each.
    shape: (Z, Y, X) voxels.
    seed: source of all randomness; equal seeds write equal bytes.

  Returns:
    Path of `manifest.tsv` with COLUMNS.

  Raises:
    ValueError: if the folder holds something else, or a number is out of range.
    ReadError: missing_extra, without the extra `formats`.
  """
  embryos = dict(EMBRYOS if embryos is None else embryos)
  if not embryos or min(embryos.values()) < 0 or not sum(embryos.values()):
    raise ValueError(
        f"write_embryo_corpus: embryos {embryos} must be counts of at least 0, with at "
        "least one embryo"
    )
  options = {
      "embryo_version": VERSION, "seed": seed, "embryos": embryos, "frames": frames,
      "shape": list(shape),
  }

  def write(draft: pathlib.Path) -> None:
    tiff.library(str(folder))  # Before an embryo is drawn, which takes a while.
    _write(draft, embryos, frames, shape, seed)

  return write_once(pathlib.Path(folder), options, write)


def _write(folder, embryos, frames, shape, seed) -> None:
  with (folder / "manifest.tsv").open("w", newline="") as file:
    writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    number = 0
    for split, count in embryos.items():
      for _ in range(count):
        number += 1
        name = f"phantom_diSPIM_{number}"
        rng = np.random.Generator(np.random.SFC64((seed, number)))
        movie, truth = embryo(rng, frames=frames, shape=shape)
        _write_one(folder / "nih-ls" / name, name, movie, truth)
        spacing = ", ".join(f"{1e-3 * v:.6g}" for v in truth.spacing_um)
        writer.writerow({
            "participant_id": name, "filepath": f"nih-ls/{name}",
            "spacing": f"[{spacing}]", "time_step_s": f"{_MINUTE_S:g}",
            "modality": "light_sheet", "device": "phantom_dispim", "split": split,
        })


def _write_one(
    folder: pathlib.Path, name: str, movie: np.ndarray, truth: Truth
) -> None:
  tifffile = tiff.library(str(folder))
  for part in ("images", "tracks"):
    (folder / part).mkdir(parents=True)
  for t, volume in enumerate(movie):
    tifffile.imwrite(
        folder / "images" / f"{name}_t{t:03d}.tif", volume, metadata=None,
        photometric="minisblack",
    )
  (folder / "tracks" / "tracks.txt").write_text(_table(_TRACK_COLUMNS, truth.tracks))
  polar = [dict(t=t, z=1, y=1, x=1, cell_id=t, parent_id=t - 1) for t in range(3)]
  (folder / "tracks" / "tracks_polar_bodies.txt").write_text(
      _table(_TRACK_COLUMNS[:6], polar)
  )
  (folder / "stages.tsv").write_text(_table(
      ("t", "stage"),
      [{"t": t, "stage": STAGES[stage]} for t, stage in enumerate(truth.stages)],
  ))


def _table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, delimiter="\t", lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def answers(truth: Truth, path: str = "1_png") -> list[dict[str, Any]]:
  """Returns what a vision-language model might have answered, in its own words.

  Entries are of the form of `embryo_classifications_all.json`: the header of the
  section on the stage varies, other stages are named to be ruled out, some calls
  failed. Bent is "comma", folded "2-fold"; stages without a category are left out.

  Args:
    truth: of an embryo.
    path: the folder of pictures that the model was shown.
  """
  said = {4: None, 5: None, 6: "comma", 7: "2-fold"}
  forms = (
      "## 1. Developmental Stage: **{}**\n\n## 2. Confidence: **0.85**\n",
      "1. Developmental Stage: {}\n2. Confidence: 0.85\n",
      "# Developmental Stage Analysis\n\n**{}** (elongation to follow)\n\n"
      "Confidence: 0.7\n",
  )
  entries = []
  for t, (stage, cells) in enumerate(zip(truth.stages, truth.counts, strict=True)):
    name = said.get(int(stage), STAGES[stage])
    if name is None:
      continue
    text = forms[t % len(forms)].format(name) + (
        "## 3. Reasoning\n- 1-cell stage: ruled out\n- **3-fold**: not yet\n"
    )
    failed = t % 17 == 16
    entries.append({
        "timepoint_minutes": t, "frame_index": t,
        "frame_path": f"{path}\\frame_{t:04d}.png", "cell_count": int(cells),
        "response": "ERROR: overloaded" if failed else text,
        "timestamp": "2024-01-01T00:00:00", "success": not failed,
    })
  return json.loads(json.dumps(entries))
