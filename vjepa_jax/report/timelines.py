"""Pictures of volumes in time: stages over minutes, what was rebuilt, what is looked at.

Every function here takes plain arrays and gives a picture, uint8 [H, W, 3], as those
of `report.figures` do.
"""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from vjepa_jax.report import canvas
from vjepa_jax.report.canvas import BLUE, INK, MUTED, ORANGE, RULE, VIOLET

UNKNOWN = -1
# Runs from dark to light as stages do from first to last, for colour-blind readers too.
_STAGES, _TIMES, _LOOKS = "viridis", "magma", "inferno"
_HIDDEN = (0.09, 0.10, 0.20)
# Panels side by side; of more time points as many are drawn, evenly over them.
_MOST_COLUMNS = 16


@dataclasses.dataclass(frozen=True)
class Timeline:
  """What was said of one embryo, time point by time point.

  Attributes:
    name: of the embryo.
    minutes: float [T], rising.
    probabilities: float [T, K], p(stage).
    truth: int [T], a stage or -1 where unknown.
    decoded: int [T], the stages after decoding.

  Raises:
    ValueError: if the shapes disagree, the minutes do not rise, or a stage is none
      of the K.
  """

  name: str
  minutes: np.ndarray
  probabilities: np.ndarray
  truth: np.ndarray
  decoded: np.ndarray

  def __post_init__(self):
    for field in ("minutes", "probabilities", "truth", "decoded"):
      object.__setattr__(self, field, np.asarray(getattr(self, field)))
    place, times = f"Timeline {self.name!r}", len(self.minutes)
    if self.probabilities.ndim != 2 or any(
        len(getattr(self, field)) != times
        for field in ("probabilities", "truth", "decoded")
    ):
      raise ValueError(
          f"{place}: minutes {self.minutes.shape}, probabilities "
          f"{self.probabilities.shape}, truth {self.truth.shape} and decoded "
          f"{self.decoded.shape} must be [T], [T, K], [T] and [T] with T > 0"
      )
    if not times or (np.diff(self.minutes) <= 0).any():
      raise ValueError(f"{place}: its minutes must rise, and there must be some")
    for field, least in (("truth", UNKNOWN), ("decoded", 0)):
      stages = getattr(self, field)
      if stages.min() < least or stages.max() >= self.probabilities.shape[1]:
        raise ValueError(
            f"{place}: {field} holds {stages.min()}..{stages.max()}, its stages are "
            f"{least}..{self.probabilities.shape[1] - 1}"
        )


def timeline(embryos: Sequence[Timeline], classes: Sequence[str]) -> np.ndarray:
  """Draws p(stage) over time, a strip an embryo, all on one scale of minutes.

  Over it lie the truth, the most probable stage and the decoded one; a line breaks
  where time points are missing, the truth also where it is unknown.

  Args:
    embryos: those to draw.
    classes: names of the K stages, in their order.

  Returns:
    uint8 [H, W, 3].

  Raises:
    ValueError: if there is no embryo, or one has other than K stages.
  """
  if not embryos:
    raise ValueError("timeline: there is no embryo to draw")
  for embryo in embryos:
    if embryo.probabilities.shape[1] != len(classes):
      raise ValueError(
          f"timeline: {embryo.name!r} has probabilities of "
          f"{embryo.probabilities.shape[1]} stages, there are {len(classes)} classes"
      )
  height = 0.17 * len(classes) + 0.45
  figure = canvas.figure(8.6, height * len(embryos) + 0.8)
  axes = figure.subplots(len(embryos), 1, squeeze=False, sharex=True).ravel()
  for axis, embryo in zip(axes, embryos, strict=True):
    image = _strip(axis, embryo, classes)
  axes[-1].set_xlabel("minutes", fontsize=9, color=MUTED)
  bar = figure.colorbar(image, ax=list(axes), fraction=0.02, pad=0.01, aspect=14)
  _label_bar(bar, "p(stage)")
  figure.legend(
      *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
      frameon=False, fontsize=8, labelcolor=INK, handlelength=2.8,
  )
  return canvas.pixels(figure)


def confusion(
    matrix: np.ndarray, classes: Sequence[str], *, what: str = "time points"
) -> np.ndarray:
  """Draws a confusion matrix: counts, and their shares of a row as shades.

  Args:
    matrix: int [K, K], rows are the truth, columns what was said.
    classes: names of the K stages, in their order.
    what: is counted.

  Returns:
    uint8 [H, W, 3].

  Raises:
    ValueError: if the matrix is not [K, K].
  """
  matrix = np.asarray(matrix)
  k = len(classes)
  if matrix.shape != (k, k):
    raise ValueError(f"confusion: matrix {matrix.shape} must be {(k, k)}")
  totals = matrix.sum(axis=1)
  shares = matrix / np.maximum(totals, 1)[:, None]
  figure = canvas.figure(0.62 * k + 2.2, 0.52 * k + 1.5)
  axis = figure.subplots()
  image = axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
  for row, column in np.argwhere(matrix > 0):
    share = shares[row, column]
    axis.text(
        column, row, f"{matrix[row, column]}\n{share:.0%}", ha="center", va="center",
        fontsize=7, color="white" if share > 0.55 else INK, linespacing=1.1,
    )
  axis.set_xticks(range(k), classes, rotation=40, ha="right", rotation_mode="anchor")
  names = [f"{name}  ({total})" for name, total in zip(classes, totals, strict=True)]
  axis.set_yticks(range(k), names)
  axis.set_xlabel("said", fontsize=9, color=MUTED)
  axis.set_ylabel(f"truth ({what})", fontsize=9, color=MUTED)
  canvas.bare(axis)
  axis.tick_params(labelsize=8, pad=3)
  for line in np.arange(k + 1) - 0.5:
    axis.axhline(line, color=RULE, linewidth=0.6)
    axis.axvline(line, color=RULE, linewidth=0.6)
  right, total = np.trace(matrix), matrix.sum()
  canvas.head(axis, f"{right} of {total} right ({right / max(total, 1):.1%})")
  _label_bar(figure.colorbar(image, fraction=0.04, pad=0.02), "share of the row")
  return canvas.pixels(figure)


def embedding(
    points: np.ndarray,
    stages: np.ndarray,
    minutes: np.ndarray,
    classes: Sequence[str],
    method: str,
) -> np.ndarray:
  """Draws points twice: coloured by stage and by time.

  Args:
    points: float [N, 2].
    stages: int [N], -1 where unknown: drawn grey.
    minutes: float [N].
    classes: names of the K stages, in their order.
    method: how the points were made, such as "t-SNE"; names the axes.

  Returns:
    uint8 [H, W, 3].

  Raises:
    ValueError: if the shapes disagree or a stage is none of the K.
  """
  points, stages, minutes = map(np.asarray, (points, stages, minutes))
  n, k = len(points), len(classes)
  if points.shape != (n, 2) or stages.shape != (n,) or minutes.shape != (n,) or not n:
    raise ValueError(
        f"embedding: points {points.shape}, stages {stages.shape} and minutes "
        f"{minutes.shape} must be [N, 2], [N] and [N] with N > 0"
    )
  if stages.max() >= k or stages.min() < UNKNOWN:
    raise ValueError(
        f"embedding: stages hold {stages.min()}..{stages.max()}, there are {k} classes"
    )
  from matplotlib import colormaps, colors  # noqa: PLC0415

  figure = canvas.figure(10.6, 4.5)
  left, right = figure.subplots(1, 2)
  known = stages >= 0
  dots = dict(s=max(4.0, min(18.0, 9000.0 / n)), linewidths=0, alpha=0.9)
  left.scatter(*points[~known].T, color=RULE, **dots)
  edges = colors.BoundaryNorm(np.arange(k + 1) - 0.5, k)
  shown = left.scatter(
      *points[known].T, c=stages[known], cmap=colormaps[_STAGES].resampled(k),
      norm=edges, **dots,
  )
  bar = figure.colorbar(shown, ax=left, fraction=0.05, pad=0.02)
  _label_bar(bar, "")
  bar.set_ticks(range(k), labels=list(classes))
  bar.ax.minorticks_off()
  canvas.head(left, "by stage" + ("" if known.all() else " (grey: unknown)"))
  shown = right.scatter(*points.T, c=minutes, cmap=_TIMES, **dots)
  _label_bar(figure.colorbar(shown, ax=right, fraction=0.05, pad=0.02), "minutes")
  canvas.head(right, "by time")
  for axis in (left, right):
    canvas.plain(axis)
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_xlabel(f"{method} 1", fontsize=9, color=MUTED)
    axis.set_ylabel(f"{method} 2", fontsize=9, color=MUTED)
  return canvas.pixels(figure)


def reconstruction_panel(
    volume: np.ndarray,
    visible: np.ndarray,
    reconstruction: np.ndarray,
    hidden: np.ndarray,
    spacing_um: Sequence[float],
) -> np.ndarray:
  """Draws what is there, what was shown of it, and what was made of that.

  Maximum projections along Z, and beneath them along Y: the original, its visible
  voxels, and these together with the prediction of the hidden ones. Columns are time
  points; of a single one the three stand side by side. Where all of a line is hidden
  it is dark blue; so is what was neither shown nor asked for.

  Args:
    volume: [T, Z, Y, X].
    visible: [T, Z, Y, X], the volume where it was shown, else 0.
    reconstruction: [T, Z, Y, X], the prediction where hidden.
    hidden: bool [T, Z, Y, X], what was asked for.
    spacing_um: (dz, dy, dx); NaN where unknown.

  Returns:
    uint8 [H, W, 3].

  Raises:
    ValueError: if the shapes disagree.
  """
  shapes = [np.shape(a) for a in (volume, visible, reconstruction, hidden)]
  if len(shapes[0]) != 4 or len(set(shapes)) > 1:
    raise ValueError(
        "reconstruction_panel: volume, visible, reconstruction and hidden are "
        f"{', '.join(map(str, shapes))}; they must be [T, Z, Y, X] all"
    )
  hidden = np.asarray(hidden, bool)
  seen = ~hidden & (np.asarray(visible) == volume)
  kinds = {
      "original": (volume, np.ones_like(hidden)),
      "visible": (volume, seen),
      "reconstructed": (np.where(hidden, reconstruction, volume), seen | hidden),
  }
  times = _columns(len(volume))
  panels = _Panels(
      shapes[0], spacing_um, ("z", "y"), tuple(kinds), times, "reconstruction_panel"
  )
  for along in ("z", "y"):
    axis = 1 + "zyx".index(along)
    low, high = np.percentile(volume.max(axis=axis), [1.0, 99.7])
    for kind, (values, known) in kinds.items():
      lit = np.where(known, values, -np.inf).max(axis=axis)
      dark = ~known.any(axis=axis)
      for time in times:
        picture = canvas.grey(np.where(dark[time], low, lit[time]), low, high)
        picture[dark[time]] = _HIDDEN
        panels.show(along, kind, time, picture)
  return panels.pixels()


def attention_panel(
    volume: np.ndarray,
    attention: np.ndarray,
    spacing_um: Sequence[float],
    patch: Sequence[int] | None = None,
) -> np.ndarray:
  """Draws where attention goes, over maximum projections along Z, Y and X.

  A colour says the most that a place on the line gets, as a multiple of an equal share
  of its frame; what gets no more than that has none. One scale holds for the whole
  figure, up to the 99th percentile. Columns are time points.

  Args:
    volume: [T, Z, Y, X].
    attention: [t, z, y, x], what each place gets, of all of its frame. A frame of
      attention lies over the middle one of its time points.
    spacing_um: (dz, dy, dx); NaN where unknown.
    patch: voxels (pz, py, px) of a place, which may go beyond the volume's end; None:
      the least that cover it.

  Returns:
    uint8 [H, W, 3].

  Raises:
    ValueError: if the shapes disagree.
  """
  volume, attention = np.asarray(volume), np.asarray(attention, np.float64)
  if volume.ndim != 4 or attention.ndim != 4 or len(attention) > len(volume):
    raise ValueError(
        f"attention_panel: volume {volume.shape} and attention {attention.shape} must "
        "be [T, Z, Y, X] and [t, z, y, x] with t no more than T"
    )
  each = -(-len(volume) // len(attention))
  middles = np.arange(len(attention)) * each + each // 2
  volume = volume[np.minimum(middles, len(volume) - 1)]
  times = _columns(len(volume))
  total = attention.sum(axis=(1, 2, 3), keepdims=True)
  looks = attention / np.maximum(total, 1e-12) * attention[0].size
  panels = _Panels(
      volume.shape, spacing_um, ("z", "y", "x"), ("attention",), times,
      "attention_panel", upright=True, room=0.9, patch=patch,
  )
  drawn = [looks[times].max(axis=axis).ravel() for axis in (1, 2, 3)]
  top = max(float(np.percentile(np.concatenate(drawn), 99.0)), 2.0)
  for along in ("z", "y", "x"):
    axis = 1 + "zyx".index(along)
    lit = volume.max(axis=axis)
    low, high = np.percentile(lit, [1.0, 99.7])
    for time in times:
      panels.show(along, "attention", time, canvas.grey(lit[time], low, high))
      panels.lay_over(along, "attention", time, looks[time].max(axis=axis - 1), top)
  panels.scale("attention, times an equal share")
  return panels.pixels()


def _strip(axis, embryo: Timeline, classes: Sequence[str]):
  """Draws one embryo; returns the picture of its probabilities."""
  half = _half_step(embryo.minutes)
  edges, cells = [], []
  for minute, column in zip(embryo.minutes, embryo.probabilities, strict=True):
    if edges and minute - half > edges[-1] + 1e-6 * half:
      edges.append(minute - half)
      cells.append(np.full(len(classes), np.nan))
    edges += [minute - half] * (not edges) + [minute + half]
    cells.append(column)
  levels = np.arange(len(classes) + 1) - 0.5
  image = axis.pcolormesh(
      edges, levels, np.ma.masked_invalid(np.transpose(cells)), cmap=_shares(),
      vmin=0.0, vmax=1.0,
  )
  said = embryo.probabilities.argmax(axis=1)
  for stages, label, style in (
      (embryo.truth, "truth", dict(color=ORANGE, linewidth=4.5, alpha=0.75)),
      (said, "most probable", dict(color=VIOLET, linewidth=1.0)),
      (embryo.decoded, "decoded", dict(color=BLUE, linewidth=1.7)),
  ):
    axis.plot(
        *_steps(embryo.minutes, stages, half), label=label, solid_joinstyle="miter",
        solid_capstyle="butt", **style,
    )
  axis.set_yticks(range(len(classes)), classes)
  axis.set_ylim(-0.5, len(classes) - 0.5)
  canvas.plain(axis)
  axis.tick_params(axis="y", labelsize=7, length=0)
  canvas.head(axis, embryo.name)
  known = embryo.truth >= 0
  if known.any():
    right = lambda stages: (stages == embryo.truth)[known].mean()
    axis.set_title(
        f"right: {right(said):.0%} most probable, {right(embryo.decoded):.0%} decoded",
        loc="right", fontsize=8, color=MUTED,
    )
  return image


def _shares():
  """Light greys, so that lines are seen on the darkest."""
  from matplotlib import colormaps, colors  # noqa: PLC0415

  return colors.ListedColormap(colormaps["Greys"](np.linspace(0.0, 0.62, 256)))


def _half_step(minutes: np.ndarray) -> float:
  """Half of the usual time from one time point to the next."""
  return 0.5 * float(np.median(np.diff(minutes))) if len(minutes) > 1 else 0.5


def _steps(minutes, stages, half) -> tuple[list[float], list[float]]:
  """Returns x and y of a line of steps, broken where time or stage is missing."""
  x, y = [], []
  for minute, stage in zip(minutes, stages, strict=True):
    if stage == UNKNOWN or (x and minute - half > x[-1] + 1e-6 * half):
      x.append(minute)
      y.append(math.nan)
    if stage != UNKNOWN:
      x += [minute - half, minute + half]
      y += [stage, stage]
  return x, y


def _columns(times: int) -> list[int]:
  """Returns the time points to draw."""
  few = np.linspace(0, times - 1, min(times, _MOST_COLUMNS))
  return few.round().astype(int).tolist()


def _label_bar(bar, text: str) -> None:
  bar.set_label(text, fontsize=8, color=MUTED)
  bar.ax.tick_params(labelsize=7, colors=MUTED, length=0)
  bar.outline.set_visible(False)


class _Panels:
  """Projections in rows of one direction and kind, columns of one time point.

  Of a single time point kinds are the columns, unless `upright`.
  """

  def __init__(
      self, shape, spacing_um, directions, kinds, times, place, *, upright=False,
      room=0.0, patch=None,
  ):
    if len(spacing_um) != 3:
      raise ValueError(f"{place}: spacing_um {tuple(spacing_um)} must be (dz, dy, dx)")
    steps = np.asarray(spacing_um, float)
    self._known = bool(np.isfinite(steps).all() and (steps > 0).all())
    steps = steps if self._known else np.ones(3)
    self._sizes = dict(zip("zyx", shape[1:], strict=True))
    self._steps = dict(zip("zyx", steps, strict=True))
    self._patch = patch and dict(zip("zyx", patch, strict=True))
    self._flat = len(times) == 1 and not upright
    self._times = times
    rows = [(d, None) for d in directions] if self._flat else [
        (d, k) for d in directions for k in kinds
    ]
    columns = kinds if self._flat else times
    widest = max(self._extent(d)[1] for d in directions)
    wide = 1.9 if self._flat else min(1.5, max(0.85, 7.0 / len(times)))
    heights = [self._extent(d)[0] / widest * wide for d, _ in rows]
    self._figure = canvas.figure(
        wide * len(columns) + 0.9 + room, sum(heights) + 0.09 * len(rows) + 0.75
    )
    self._figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    axes = self._figure.subplots(
        len(rows), len(columns), squeeze=False, gridspec_kw=dict(height_ratios=heights)
    )
    self._axes = {
        (direction, kind or column, self._times[0] if self._flat else column): axes[r][c]
        for r, (direction, kind) in enumerate(rows) for c, column in enumerate(columns)
    }
    self._name(axes, rows, columns)
    self._overlay = None

  def show(self, direction, kind, time, picture):
    """Draws one projection along `direction`, RGB [H, W, 3], in um."""
    axis = self._axes[direction, kind, time]
    height, width = self._extent(direction)
    axis.imshow(
        picture, extent=(0, width, height, 0), aspect="equal", interpolation="nearest"
    )

  def lay_over(self, direction, kind, time, looks, top):
    """Lays attention [h, w] over a projection: up to 1 lets it through."""
    from matplotlib import colormaps, colors  # noqa: PLC0415

    axis = self._axes[direction, kind, time]
    ramp = colormaps[_LOOKS](np.linspace(0.25, 0.95, 256))
    ramp[:, 3] = np.linspace(0.0, 0.75, 256)
    plane = [a for a in "zyx" if a != direction]
    # Patches go beyond the end of what they do not divide.
    patch = self._patch or {
        a: -(-self._sizes[a] // n) for a, n in zip(plane, looks.shape, strict=True)
    }
    ends = [
        patch[a] * n * self._steps[a] for a, n in zip(plane, looks.shape, strict=True)
    ]
    limits = axis.get_xlim(), axis.get_ylim()
    self._overlay = axis.imshow(
        looks, extent=(0, ends[1], ends[0], 0), cmap=colors.ListedColormap(ramp),
        vmin=1.0, vmax=top, interpolation="nearest",
    )
    axis.set(xlim=limits[0], ylim=limits[1])

  def scale(self, text):
    bar = self._figure.colorbar(
        self._overlay, ax=list(self._axes.values()), fraction=0.03, pad=0.01,
        aspect=30, extend="max", panchor=False,
    )
    bar.ax.set_facecolor("black")  # As over the dark of a projection.
    _label_bar(bar, text)

  def pixels(self):
    return canvas.pixels(self._figure)

  def _extent(self, direction):
    """Height and width of a projection, in um or voxels."""
    return [self._sizes[a] * self._steps[a] for a in "zyx" if a != direction]

  def _length(self, size):
    if not self._known:
      return f"{size:.3g}"
    return f"{size:.3g} µm" if size < 1000 else f"{size / 1000:.3g} mm"

  def _name(self, axes, rows, columns):
    for axis in axes.ravel():
      canvas.bare(axis)
      axis.set_anchor("W")
      axis.set_xticks([])
      axis.set_yticks([])
    for line, (direction, kind) in zip(axes, rows, strict=True):
      height, _ = self._extent(direction)
      text = f"along {direction.upper()}"
      line[0].set_ylabel(
          text if kind in (None, "attention") else f"{kind}\n{text}", fontsize=7,
          color=INK,
      )
      line[0].set_yticks([height], [self._length(height)], rotation=90, va="bottom")
    width = self._extent(rows[-1][0])[1]
    axes[-1][0].set_xticks([width], [self._length(width)], ha="right")
    if self._flat or len(columns) > 1:
      for axis, column in zip(axes[0], columns, strict=True):
        title = column if self._flat else f"{column + 1}"
        axis.set_title(title, fontsize=8, color=INK)
    if len(self._times) > 1:
      self._figure.supxlabel("time points", fontsize=8, color=MUTED)
