"""Where the encoder looks: its last block's attention over space, over volumes."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vjepa_jax.data import pipeline
from vjepa_jax.evaluators.base import find_split
from vjepa_jax.evaluators.health import centre_crop
from vjepa_jax.report import canvas, timelines

NEEDED = ("attention", "features")


class Evaluator:
  """Draws a few volumes or clips of a split with the attention over them.

  `run` yields attention.maps, uint8 [H, W, 3], of volumes beneath one another; see
  `report.timelines.attention_panel`.
  """

  def __init__(
      self,
      functions: Mapping[str, Callable[..., Any]],
      data: Any,
      *,
      split: str = "validation",
      clips: int = 2,
      batch_size: int = 16,
  ):
    """Chooses the volumes.

    Args:
      functions: of the objective; "attention" and "features" (whose grid says what
        of a volume is seen) at least.
      data: the open data.
      split: where to look.
      clips: how many volumes or clips, evenly over the split.
      batch_size: volumes a call of the encoder.

    Raises:
      ImportError: if matplotlib is missing, so that a run says so at its start.
      KeyError: for an unknown split, or if functions lack one of those above.
      ValueError: for an empty split, or clips < 1.
    """
    canvas.require_matplotlib()
    missing = [name for name in NEEDED if name not in functions]
    if missing:
      raise KeyError(
          f"attention: the objective must offer {' and '.join(map(repr, missing))}; it "
          f"offers {', '.join(sorted(functions))}"
      )
    if clips < 1:
      raise ValueError(f"attention: clips {clips} must be at least 1")
    self._functions = functions
    self._volumes = find_split(data, split, "attention")
    rows = np.linspace(0, len(self._volumes) - 1, min(clips, len(self._volumes)))
    self._rows = rows.round().astype(int)
    self._batch_size = batch_size

  def run(self, params: Any, model_state: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the figure named above for these parameters."""
    pictures = []
    for batch in pipeline.eval_batches(self._volumes, self._batch_size, self._rows):
      looks = np.asarray(self._functions["attention"](params, model_state, batch))
      grid = self._functions["features"](params, model_state, batch).grid
      seen = centre_crop(batch["volume"], grid)
      patch = grid.patch[1:] if grid.stride is None else None
      for row in np.flatnonzero(batch["_mask"]):
        pictures.append(timelines.attention_panel(
            seen[row].astype(np.float32).mean(axis=-1), looks[row],
            1e3 * np.asarray(batch["spacing"][row], float)[1:], patch,
        ))
    yield "attention.maps", canvas.stack(pictures)
