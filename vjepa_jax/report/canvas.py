"""What all drawings share: a canvas without a display, colours, plain axes."""

from collections.abc import Sequence

import numpy as np

INK, MUTED, RULE = "#1f2328", "#5b6169", "#d5d8dc"
# Blue, orange, green, violet, grey: told apart by colour-blind readers.
BLUE, ORANGE, GREEN, VIOLET, GREY = (
    "#0072b2", "#d55e00", "#009e73", "#8a5fbf", "#7a7f87"
)
_DPI = 110


def require_matplotlib() -> None:
  """Raises ImportError that names the extra, where matplotlib is missing."""
  try:
    import matplotlib  # noqa: F401, PLC0415
  except ImportError as error:
    raise ImportError(
        "figures need matplotlib, which is not installed: "
        'pip install "vjepa_jax[figures]"'
    ) from error


def figure(width: float, height: float):
  """Returns an empty white matplotlib Figure of so many inches, on an Agg canvas.

  Raises:
    ImportError: if matplotlib is missing.
  """
  require_matplotlib()
  from matplotlib.backends import backend_agg  # noqa: PLC0415
  from matplotlib.figure import Figure  # noqa: PLC0415

  made = Figure(
      figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white"
  )
  backend_agg.FigureCanvasAgg(made)
  return made


def pixels(drawn) -> np.ndarray:
  """Returns what a figure looks like, uint8 [H, W, 3]."""
  drawn.canvas.draw()
  return np.asarray(drawn.canvas.buffer_rgba())[..., :3].copy()


def head(axis, text: str) -> None:
  """Puts a title over an axis, at its left."""
  axis.set_title(text, loc="left", fontsize=10, color=INK)


def plain(axis) -> None:
  """Leaves of an axis its left and lower border, with small muted numbers."""
  axis.tick_params(labelsize=8, colors=MUTED, length=3)
  for side in ("top", "right"):
    axis.spines[side].set_visible(False)
  for side in ("left", "bottom"):
    axis.spines[side].set_color(RULE)


def bare(axis) -> None:
  """Leaves of an axis its numbers alone, for pictures."""
  axis.tick_params(length=0, labelsize=7, colors=MUTED, pad=1)
  for spine in axis.spines.values():
    spine.set_visible(False)


def grey(section: np.ndarray, low: float, high: float) -> np.ndarray:
  """Returns a section [H, W] as RGB in 0..1, black at `low`, white at `high`."""
  shade = np.clip((section - low) / max(high - low, 1e-12), 0.0, 1.0)
  return np.repeat(shade[..., None], 3, axis=-1)


def stack(pictures: Sequence[np.ndarray]) -> np.ndarray:
  """Puts pictures [H, W, 3] beneath one another, on white where one is narrower.

  Returns:
    uint8 [sum of H, largest W, 3].

  Raises:
    ValueError: if there is none.
  """
  if not pictures:
    raise ValueError("stack: there is no picture")
  width = max(picture.shape[1] for picture in pictures)
  return np.concatenate([
      np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255)
      for p in pictures
  ])
