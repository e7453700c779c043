"""How well hidden voxels are filled in, in numbers and to look at."""

from collections.abc import Callable, Iterator, Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.data import pipeline
from vjepa_jax.evaluators.base import find_split
from vjepa_jax.evaluators.health import otsu
from vjepa_jax.report import canvas, timelines

# Voxels of a volume that its threshold is found on, evenly over it.
_SAMPLED = 2**16
_ARRAYS = ("volume", "visible", "reconstruction", "hidden")


class Evaluator:
  """What is left unexplained of hidden voxels, and pictures of some.

  `run` yields:
    reconstruction.error_over_variance: over hidden voxels, the sum of
      (reconstruction - volume)^2 over the sum of (volume - mean)^2, the mean being
      that of the same volume's hidden voxels, by channel; both sums over all volumes.
      0 is perfect, 1 the best constant of each volume.
    reconstruction.error_over_variance_foreground: both sums over those hidden voxels
      that are brighter than their volume's threshold (Otsu), about the same mean: 1 is
      the same constant. Left out where no volume hides any.
    reconstruction.panel: uint8 [H, W, 3], what is there, what was shown of it and what
      was made of that, of a few volumes beneath one another.

  A `reconstruct` that is given each patch's true mean and spread, as that of `MAE` is
  with any target but "pixel", explains some without having learned it: such numbers
  are not to be compared with others'.
  """

  def __init__(
      self,
      functions: Mapping[str, Callable[..., Any]],
      data: Any,
      *,
      split: str = "validation",
      volumes: int = 32,
      figures: int = 2,
      batch_size: int = 16,
      seed: int = 0,
  ):
    """Chooses the volumes.

    Args:
      functions: of the objective; "reconstruct" at least.
      data: the open data.
      split: where to look.
      volumes: number of volumes or clips, drawn once (all, where there are fewer).
      figures: how many of them are drawn, evenly over those; 0: no figure.
      batch_size: volumes a call. Every device holds all that `reconstruct` gives of
        them, 13 bytes a voxel.
      seed: of the draw.

    Raises:
      ImportError: if matplotlib is missing and a figure is asked for.
      KeyError: for an unknown split, or if functions lack "reconstruct".
      ValueError: for an empty split, or numbers out of range.
    """
    if "reconstruct" not in functions:
      raise KeyError(
          "reconstruction: the objective must offer 'reconstruct', as mae does; it "
          f"offers {', '.join(sorted(functions))}"
      )
    if volumes < 1 or figures < 0:
      raise ValueError(
          f"reconstruction: volumes {volumes} must be at least 1 and figures {figures} "
          "at least 0"
      )
    if figures:
      canvas.require_matplotlib()
    self._reconstruct = functions["reconstruct"]
    self._volumes = find_split(data, split, "reconstruction")
    generator = np.random.default_rng(seed)
    count = min(volumes, len(self._volumes))
    self._rows = np.sort(generator.choice(len(self._volumes), count, replace=False))
    places = np.linspace(0, count - 1, min(figures, count)).round().astype(int)
    self._drawn = set(self._rows[places].tolist())
    self._batch_size = batch_size

  def run(self, params: Any, model_state: Any) -> Iterator[tuple[str, Any]]:
    """Yields what is named above for these parameters."""
    sums, pictures = np.zeros((2, 2)), []
    for batch in pipeline.eval_batches(self._volumes, self._batch_size, self._rows):
      found = self._reconstruct(params, model_state, batch)
      missing = [name for name in _ARRAYS if name not in found]
      if missing:
        raise KeyError(
            f"reconstruction: 'reconstruct' gave no {', '.join(missing)}; it must give "
            f"{', '.join(_ARRAYS)}"
        )
      real = np.flatnonzero(batch["_mask"])
      each = _sums(
          found["volume"], found["reconstruction"], found["hidden"],
          _thresholds(found["volume"]),
      )
      sums += np.asarray(each, np.float64)[real].sum(axis=0)
      for row in real:
        if int(batch["index"][row]) in self._drawn:
          pictures.append(_panel(found, row, batch["spacing"][row]))
    (error, variance), (bright_error, bright_variance) = sums
    yield "reconstruction.error_over_variance", _ratio(error, variance)
    if bright_variance > 0:
      share = _ratio(bright_error, bright_variance)
      yield "reconstruction.error_over_variance_foreground", share
    if pictures:
      yield "reconstruction.panel", canvas.stack(pictures)


def _panel(found: Mapping[str, Any], row: int, spacing: np.ndarray) -> np.ndarray:
  # Row by row, so that no more than what is drawn comes to the host.
  volume, visible, filled, hidden = (np.asarray(found[name][row]) for name in _ARRAYS)
  grey = lambda x: x.astype(np.float32).mean(axis=-1)
  return timelines.reconstruction_panel(
      grey(volume), grey(visible), grey(filled), hidden.any(axis=-1),
      1e3 * np.asarray(spacing, float)[1:],
  )


def _thresholds(volume: jax.Array) -> np.ndarray:
  """Returns what is foreground above it, [B]."""
  flat = volume.reshape(len(volume), -1)
  few = np.asarray(flat[:, :: -(-flat.shape[1] // _SAMPLED)])
  return np.array([otsu(row) for row in few], np.float32)


@jax.jit
def _sums(
    volume: jax.Array, filled: jax.Array, hidden: jax.Array, thresholds: jax.Array
) -> jax.Array:
  """Returns squared error and deviation, of all hidden and of bright ones, [B, 2, 2]."""
  volume, filled = volume.astype(jnp.float32), filled.astype(jnp.float32)
  hidden = jnp.broadcast_to(hidden, volume.shape)
  bright = hidden & (volume > thresholds.reshape(-1, *[1] * (volume.ndim - 1)))
  axes = tuple(range(1, volume.ndim - 1))

  def total(values, chosen):
    return jnp.where(chosen, values, 0.0).sum(axis=axes, keepdims=True)

  mean = total(volume, hidden) / jnp.maximum(total(1.0, hidden), 1.0)

  def apart(chosen):
    """How far the chosen voxels are from what was filled in and from the mean."""
    squares = (total(jnp.square(x - volume), chosen) for x in (filled, mean))
    return [x.reshape(len(volume), -1).sum(axis=1) for x in squares]

  return jnp.moveaxis(jnp.asarray([apart(hidden), apart(bright)]), -1, 0)


def _ratio(error: float, variance: float) -> float:
  return float(error / variance) if variance > 0 else math.nan
