"""What people look at: masks on scans, token features as colours, curves.

Every function here takes plain arrays and gives a picture, uint8 [H, W, 3].
matplotlib is imported inside and only its Agg canvas is used, so that drawing
needs no display and shares no state with a user's own plots.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import cv2
import numpy as np

from vjepa_jax.report import canvas
from vjepa_jax.report.canvas import BLUE, GREEN, GREY, INK, MUTED, ORANGE, RULE, VIOLET
from vjepa_jax.report.canvas import require_matplotlib as require_matplotlib

UNUSED, CONTEXT, TARGET = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Scan:
  """One volume to draw.

  Attributes:
    title: what it is, such as the device.
    volume: [Z, Y, X] intensities; Y is depth.
    spacing_mm: (dz, dy, dx) of a voxel; NaN where unknown.
  """

  title: str
  volume: np.ndarray
  spacing_mm: Sequence[float] = (math.nan, math.nan, math.nan)


def mask_panel(
    scans: Sequence[Scan], masks: Sequence[Sequence[np.ndarray]]
) -> np.ndarray:
  """Draws scans with who is visible and who is to be predicted.

  A row a scan: its middle B-scan, then for each mask group the same B-scan and
  an en-face section (Z against X) through the brightest row of tokens, which a
  dashed line marks.

  Args:
    scans: S volumes.
    masks: for each scan, for each mask group, int [z, y, x] tokens that are
      `CONTEXT`, `TARGET` or `UNUSED`.

  Returns:
    uint8 [H, W, 3].
  """
  groups = len(masks[0])
  face = scans[0].volume.shape[0] > 1
  columns = 1 + groups * (2 if face else 1)
  figure, axes, shape = _scan_grid(scans, columns)
  for row, (scan, states) in enumerate(zip(scans, masks, strict=True)):
    middle = scan.volume.shape[0] // 2
    token_z = middle * states[0].shape[0] // scan.volume.shape[0]
    token_y = _brightest(scan.volume, states[0].shape[1])
    step = scan.volume.shape[1] / states[0].shape[1]
    level = int((token_y + 0.5) * step)
    _show(axes[row][0], _grey(scan.volume[middle], scan.volume), scan, "yx", shape)
    if face:  # where the en-face section is cut
      height = axes[row][0].get_ylim()[0] * (level + 0.5) / scan.volume.shape[1]
      axes[row][0].axhline(height, color="#f0c000", linewidth=0.8, linestyle="--")
    for group, state in enumerate(states):
      at = 1 + group * (2 if face else 1)
      section = _grey(scan.volume[middle], scan.volume)
      _show(axes[row][at], _tinted(section, state[token_z]), scan, "yx", shape)
      if face:
        section = _grey(scan.volume[:, level], scan.volume)
        _show(axes[row][at + 1], _tinted(section, state[:, token_y]), scan, "zx", shape)
  titles = ["B-scan"]
  for group in range(groups):
    titles += [f"mask {group + 1}: B-scan"] + [f"mask {group + 1}: en face"] * face
  _title_grid(axes, titles, scans)
  _mask_legend(figure)
  return canvas.pixels(figure)


def grid_panel(scans: Sequence[Scan], dims: Sequence[int]) -> np.ndarray:
  """Draws scans as the model gets them, with the borders of their tokens.

  A row a scan: its middle B-scan, the section along Z through its brightest row of
  tokens, and its middle section across (Z against Y).

  Args:
    scans: S volumes.
    dims: tokens along (z, y, x).

  Returns:
    uint8 [H, W, 3].
  """
  figure, axes, shape = _scan_grid(scans, 3)
  step = scans[0].volume.shape[1] / dims[1]
  for row, scan in enumerate(scans):
    level = int((_brightest(scan.volume, dims[1]) + 0.5) * step)
    sections = {
        "yx": scan.volume[shape[0] // 2], "zx": scan.volume[:, level],
        "zy": scan.volume[:, :, shape[2] // 2],
    }
    for axis, (plane, section) in zip(axes[row], sections.items(), strict=True):
      _show(axis, _grey(section, scan.volume), scan, plane, shape)
      _rule_tokens(axis, [dims["zyx".index(a)] for a in plane])
  _title_grid(axes, ["B-scan", "en face", "across"], scans)
  figure.supxlabel(
      f"Lines: borders of {' x '.join(map(str, dims))} tokens (z, y, x)",
      fontsize=8, color=MUTED,
  )
  return canvas.pixels(figure)


def pca_panel(
    scans: Sequence[Scan],
    colours: Sequence[np.ndarray],
    foregrounds: Sequence[np.ndarray] | None = None,
    *,
    sections: int = 2,
) -> np.ndarray:
  """Draws B-scans, each beside the colours of its tokens.

  Args:
    scans: S volumes.
    colours: for each scan, float [z, y, x, 3] in 0..1.
    foregrounds: for each scan, bool [z, y, x]; other tokens are drawn dark.
    sections: B-scans a volume, evenly spaced.

  Returns:
    uint8 [H, W, 3].
  """
  sections = min(sections, scans[0].volume.shape[0])
  figure, axes, shape = _scan_grid(scans, 2 * sections)
  titles = []
  for section in range(sections):
    titles += [f"B-scan at {(section + 0.5) / sections:.0%} of Z", "token features"]
  for row, (scan, colour) in enumerate(zip(scans, colours, strict=True)):
    if foregrounds is not None:
      colour = np.where(foregrounds[row][..., None], colour, 0.1)
    depth = scan.volume.shape[0]
    for section in range(sections):
      z = int((section + 0.5) * depth / sections)
      token_z = z * colour.shape[0] // depth
      plain = _grey(scan.volume[z], scan.volume)
      _show(axes[row][2 * section], plain, scan, "yx", shape)
      _show(
          axes[row][2 * section + 1], colour[token_z], scan, "yx", shape,
          interpolation="bilinear",
      )
  _title_grid(axes, titles, scans)
  note = "Colours: three principal components, fitted on the foreground of all scans"
  figure.supxlabel(note, fontsize=8, color=MUTED)
  return canvas.pixels(figure)


def token_colours(
    tokens: Sequence[np.ndarray], foregrounds: Sequence[np.ndarray]
) -> list[np.ndarray]:
  """Turns token features into colours: three principal components as R, G, B.

  Components are fitted on foreground tokens of all volumes together, so that one
  colour means one thing in every panel. The sign of each is fixed by the places
  of its tokens (deeper, then brighter-right, is more), never by the algorithm's
  chance, so that colours hold still from step to step.

  Args:
    tokens: for each volume [z, y, x, D].
    foregrounds: for each volume bool [z, y, x].

  Returns:
    for each volume float32 [z, y, x, 3] in 0..1; 2nd to 98th percentile of the
    foreground span the range.
  """
  inside = np.concatenate([t[f] for t, f in zip(tokens, foregrounds, strict=True)])
  places = np.concatenate([_places(f)[f] for f in foregrounds])
  centre = inside.mean(axis=0, dtype=np.float64)
  centred = inside - centre
  values, vectors = np.linalg.eigh(centred.T @ centred)
  axes = vectors[:, np.argsort(values)[::-1][:3]]
  axes = np.pad(axes, ((0, 0), (0, 3 - axes.shape[1])))
  scores = centred @ axes
  axes = axes * np.where((places - places.mean()) @ scores < 0, -1.0, 1.0)
  low, high = np.percentile(centred @ axes, [2.0, 98.0], axis=0)
  span = np.maximum(high - low, 1e-12)
  return [
      np.clip(((t - centre) @ axes - low) / span, 0.0, 1.0).astype(np.float32)
      for t in tokens
  ]


def _places(foreground: np.ndarray) -> np.ndarray:
  """One number a place, [z, y, x]; uneven weights leave no axis of symmetry."""
  z, y, x = (np.linspace(-1.0, 1.0, n) for n in foreground.shape)
  return y[None, :, None] + 0.31 * x + 0.13 * z[:, None, None]


def curves(
    history: Iterable[Mapping[str, Any]], *, title: str = ""
) -> np.ndarray:
  """Draws a run: loss, probe against its baselines, spread and rank of features.

  Panels without numbers are left out.

  Args:
    history: the lines of metrics.jsonl.
    title: over the figure.

  Returns:
    uint8 [H, W, 3].

  Raises:
    ValueError: if there is nothing to draw.
  """
  history = list(history)
  panels = _panels(history)
  if not panels:
    raise ValueError(
        "curves: no line of the metrics has loss, probe.accuracy, health.std or "
        "health.rankme"
    )
  columns = min(2, len(panels))
  rows = math.ceil(len(panels) / columns)
  figure = canvas.figure(5.4 * columns, 3.6 * rows + (0.3 if title else 0.0))
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for axis in axes[len(panels):]:
    axis.remove()
  for axis, draw in zip(axes, panels, strict=False):
    draw(axis, history)
    _style(axis)
  if title:
    figure.suptitle(title, fontsize=11, color=INK)
  return canvas.pixels(figure)


def has_curves(history: Iterable[Mapping[str, Any]]) -> bool:
  """Says whether `curves` would find anything to draw."""
  return bool(_panels(list(history)))


def _panels(history: list[Mapping[str, Any]]) -> list[Callable[..., None]]:
  panels = {
      "loss": _loss_panel,
      "probe.accuracy": _probe_panel,
      "health.std": _spread_panel,
      "health.rankme": _rank_panel,
  }
  return [draw for key, draw in panels.items() if series(history, key)[0].size]


def series(
    history: Iterable[Mapping[str, Any]], key: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (steps, values) of the lines that hold a finite number `key`."""
  points = [
      (line["step"], line[key])
      for line in history
      if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])
  ]
  steps, values = zip(*points, strict=True) if points else ((), ())
  return np.array(steps), np.array(values, float)


def encode_png(image: np.ndarray) -> bytes:
  """Returns uint8 [H, W, 3] as a PNG file."""
  return cv2.imencode(".png", image[..., ::-1])[1].tobytes()  # OpenCV wants BGR


def _loss_panel(axis, history):
  steps, values = series(history, "loss")
  smooth = _smoothed(values)
  if smooth is not None:
    axis.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
    axis.plot(steps, smooth, color=BLUE, linewidth=1.8, label="training (smoothed)")
  else:
    axis.plot(steps, values, color=BLUE, linewidth=1.8, label="training")
  others = sorted({
      key
      for line in history
      for key in line
      if key != "loss" and "loss" in key.split(".")
  })
  for key, colour in zip(others, (ORANGE, GREEN, VIOLET), strict=False):
    axis.plot(
        *series(history, key), color=colour, linewidth=1.5, marker="o",
        markersize=3.5, label=key.replace("loss", "").strip(". ") or key,
    )
  canvas.head(axis, "Loss (no score of quality)")


def _probe_panel(axis, history):
  lines = (
      ("probe.accuracy", "target encoder", BLUE),
      ("probe.context", "online encoder", VIOLET),
  )
  for key, label, colour in lines:
    steps, values = series(history, key)
    if not steps.size:
      continue
    axis.plot(steps, values, color=colour, marker="o", markersize=3.5, label=label)
    if key == "probe.accuracy":
      low, high = (series(history, f"{key}.{end}")[1] for end in ("low", "high"))
      if low.size == high.size == steps.size:
        axis.fill_between(
            steps, low, high, color=colour, alpha=0.15, linewidth=0,
            label="95 % over patients",
        )
  baselines = (
      ("probe.depth_profile", "depth profile", GREEN, "-."),
      ("probe.pixel_pca", "pixel PCA", ORANGE, "--"),
      ("probe.intensity", "intensity", GREY, "--"),
      ("probe.chance", "chance", GREY, ":"),
  )
  for key, label, colour, style in baselines:
    values = series(history, key)[1]
    if values.size:
      axis.axhline(
          values[-1], color=colour, linestyle=style, linewidth=1.3, label=label
      )
  canvas.head(axis, "Probe: balanced accuracy, by patient")


def _spread_panel(axis, history):
  for name, label, colour in (
      ("std", "std", BLUE), ("cosine", "cosine", ORANGE)
  ):
    for suffix, style, where in (("", "-", "all"), ("_foreground", "--", "foreground")):
      steps, values = series(history, f"health.{name}{suffix}")
      if steps.size:
        axis.plot(
            steps, values, style, color=colour, marker="o", markersize=3.5,
            label=f"{label}, {where}",
        )
  canvas.head(axis, "Target tokens: std of a dimension, pairwise cosine")
  axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))


def _rank_panel(axis, history):
  for key, label, colour, style in (
      ("health.rankme", "all, centred", BLUE, "-"),
      ("health.rankme_foreground", "foreground, centred", BLUE, "--"),
      ("health.rankme_uncentred", "all, uncentred", GREEN, "-"),
  ):
    steps, values = series(history, key)
    if steps.size:
      axis.plot(
          steps, values, style, color=colour, marker="o", markersize=3.5, label=label
      )
  canvas.head(axis, "Target tokens: RankMe (number of directions)")
  axis.set_ylim(bottom=0.0)


def _smoothed(values: np.ndarray) -> np.ndarray | None:
  """Centred moving mean over a twentieth of the points; None where too few."""
  width = len(values) // 20 | 1
  if width < 3:
    return None
  kernel = np.ones(width)
  # Divided by the points really inside, so that the ends do not sag.
  return np.convolve(values, kernel, "same") / np.convolve(
      np.ones_like(values), kernel, "same"
  )


def _style(axis) -> None:
  axis.set_xlabel("optimiser step", fontsize=9, color=MUTED)
  axis.grid(True, color=RULE, linewidth=0.6)
  axis.set_axisbelow(True)
  canvas.plain(axis)
  entries = len(axis.get_legend_handles_labels()[0])
  # Below, where no curve can run beneath it.
  axis.legend(
      loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False, fontsize=8,
      ncols=2 if entries == 4 else 3, labelcolor=INK, handlelength=2.8,
  )


def _scan_grid(scans, columns: int):
  """Returns (figure, axes [S][columns], shape): panels of one size."""
  shape = scans[0].volume.shape
  figure = canvas.figure(1.8 * columns + 0.35, 1.4 * len(scans) + 0.6)
  axes = figure.subplots(len(scans), columns, squeeze=False)
  return figure, axes, shape


def _show(axis, picture, scan: Scan, plane: str, shape, *, interpolation="nearest"):
  """Draws a section in mm where its spacing is known, else in voxels."""
  sizes = dict(zip("zyx", shape, strict=True))
  spacing = dict(zip("zyx", scan.spacing_mm, strict=True))
  known = all(math.isfinite(spacing[a]) and spacing[a] > 0 for a in plane)
  extents = [sizes[a] * (spacing[a] if known else 1.0) for a in plane]
  axis.imshow(
      picture, extent=(0, extents[1], extents[0], 0), aspect="auto",
      interpolation=interpolation,
  )
  axis.set_xticks([0, extents[1]])
  axis.set_yticks([0, extents[0]])
  unit = " mm" if known else ""
  axis.set_xticklabels(["", f"{extents[1]:.3g}{unit}"], ha="right")
  axis.set_yticklabels(["", f"{extents[0]:.3g}{unit}"], rotation=90, va="bottom")
  canvas.bare(axis)


def _rule_tokens(axis, counts: Sequence[int]) -> None:
  right, bottom = axis.get_xlim()[1], axis.get_ylim()[0]
  style = dict(color="#f0c000", linewidth=0.4, alpha=0.6)
  for line in range(1, counts[0]):
    axis.axhline(bottom * line / counts[0], **style)
  for line in range(1, counts[1]):
    axis.axvline(right * line / counts[1], **style)


def _title_grid(axes, titles, scans) -> None:
  for axis, text in zip(axes[0], titles, strict=True):
    axis.set_title(text, fontsize=8, color=INK)
  for row, scan in zip(axes, scans, strict=True):
    row[0].set_ylabel(scan.title, fontsize=8, color=INK)


def _mask_legend(figure) -> None:
  from matplotlib import patches  # noqa: PLC0415

  figure.legend(
      handles=[
          patches.Patch(color=BLUE, label="context: seen"),
          patches.Patch(color=ORANGE, label="target: predicted"),
          patches.Patch(color="#33363a", label="neither"),
      ],
      loc="outside lower center", ncols=3, frameon=False, fontsize=8,
      labelcolor=INK,
  )


def _grey(section: np.ndarray, volume: np.ndarray) -> np.ndarray:
  """Returns the section as RGB [H, W, 3], windowed by its whole volume."""
  return canvas.grey(section, *np.percentile(volume, [1.0, 99.7]))


def _tinted(picture: np.ndarray, state: np.ndarray) -> np.ndarray:
  """Lays token states [h, w] over a picture [H, W, 3]; unused places go dark."""
  from matplotlib import colors  # noqa: PLC0415

  rows = np.arange(picture.shape[0]) * state.shape[0] // picture.shape[0]
  columns = np.arange(picture.shape[1]) * state.shape[1] // picture.shape[1]
  state = state[rows][:, columns, None]
  context = 0.5 * picture + 0.5 * np.array(colors.to_rgb(BLUE))
  target = 0.45 * picture + 0.55 * np.array(colors.to_rgb(ORANGE))
  tinted = np.where(state == CONTEXT, context, 0.3 * picture)
  return np.where(state == TARGET, target, tinted)


def _brightest(volume: np.ndarray, tokens: int) -> int:
  """Returns the row of tokens whose voxels are brightest."""
  return int(volume.mean(axis=(0, 2)).reshape(tokens, -1).mean(axis=1).argmax())
