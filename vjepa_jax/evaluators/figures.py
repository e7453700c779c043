"""Figures of a run: masks on scans of each device, token features as colours."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vjepa_jax.data import pipeline
from vjepa_jax.evaluators.base import find_split
from vjepa_jax.evaluators.health import centre_crop, foreground_tokens
from vjepa_jax.report import figures as drawing
from vjepa_jax.volumes.grid import Grid


class Evaluator:
  """Draws the first volumes of every device.

  `run` yields uint8 [H, W, 3]:
    figures.masks: who is seen and who is predicted, where functions offer
      "masks"; once a process, since no step changes it.
    figures.pca: principal components of the target features as colours.
  """

  def __init__(
      self,
      functions: Mapping[str, Callable[..., Any]],
      data: Any,
      *,
      split: str = "probe",
      per_device: int = 1,
      sections: int = 2,
      batch_size: int = 16,
      foreground: str = "otsu",
  ):
    """Chooses the volumes.

    Args:
      functions: of the objective; "features" at least.
      data: the open data; rows need `device`.
      split: where the volumes are.
      per_device: volumes a device.
      sections: B-scans a volume in the figure of features.
      batch_size: volumes a call of the encoder.
      foreground: "otsu" or "median" of a volume's token intensities; components
        are fitted on the tokens above.

    Raises:
      ImportError: if matplotlib is missing, so that a run says so at its start.
      KeyError: for an unknown split, or if functions lack "features".
      ValueError: for an empty split.
    """
    drawing.require_matplotlib()
    if "features" not in functions:
      raise KeyError(
          "figures: the objective must offer 'features'; it offers "
          f"{', '.join(sorted(functions))}"
      )
    self._functions = functions
    self._volumes = find_split(data, split, "figures")
    by_device = {}
    for row, found in enumerate(self._volumes.rows):
      by_device.setdefault(found.device, []).append(row)
    self._rows = np.array(
        [r for device in sorted(by_device) for r in by_device[device][:per_device]]
    )
    self._sections, self._batch_size = sections, batch_size
    self._foreground = foreground
    self._masks_drawn = False

  def run(self, params: Any, model_state: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the figures named above for these parameters."""
    scans, tokens, foregrounds, masks, states = [], [], [], [], []
    draw_masks = "masks" in self._functions and not self._masks_drawn
    for batch in pipeline.eval_batches(self._volumes, self._batch_size, self._rows):
      features = self._functions["features"](params, model_state, batch)
      grid = features.grid
      real = np.flatnonzero(batch["_mask"])
      if draw_masks:
        splits = self._functions["masks"](params, model_state, batch)
        states = token_states(splits, len(batch["_mask"]), grid.tokens)
      bright = foreground_tokens(batch["volume"], grid, self._foreground)
      volumes = centre_crop(batch["volume"], grid)
      found = np.asarray(features.tokens, np.float32)
      for row in real:
        scans.append(self._scan(batch, volumes, row))
        tokens.append(_middle(found[row], grid))
        foregrounds.append(_middle(bright[row], grid))
        if draw_masks:
          masks.append([_middle(state[row], grid) for state in states])
    if draw_masks:
      self._masks_drawn = True
      yield "figures.masks", drawing.mask_panel(scans, masks)
    colours = drawing.token_colours(tokens, foregrounds)
    yield "figures.pca", drawing.pca_panel(
        scans, colours, foregrounds, sections=self._sections
    )

  def _scan(self, batch, volumes: np.ndarray, row: int) -> drawing.Scan:
    found = self._volumes.rows[int(batch["index"][row])]
    volume = volumes[row].astype(np.float32).mean(axis=-1)
    return drawing.Scan(
        title=str(found.device).replace("_", " "),
        volume=volume[volume.shape[0] // 2],
        spacing_mm=tuple(float(s) for s in batch["spacing"][row][1:]),
    )


def token_states(splits: Sequence[Any], rows: int, tokens: int) -> list[np.ndarray]:
  """Returns for each mask group what every token is, int8 [B, N].

  Args:
    splits: `volumes.masks.Split` a group.
    rows: volumes of the batch, B.
    tokens: of a volume, N.

  Returns:
    `report.figures.CONTEXT`, `TARGET` or `UNUSED` of each token.
  """
  states = []
  for split in splits:
    state = np.full((rows, tokens), drawing.UNUSED, np.int8)
    for ids, valid, value in (
        (split.context, split.context_valid, drawing.CONTEXT),
        (split.target, split.target_valid, drawing.TARGET),
    ):
      ids = np.asarray(ids)
      keep = np.ones(ids.shape, bool) if valid is None else np.asarray(valid)
      places = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
      state[places[keep], ids[keep]] = value
    states.append(state)
  return states


def _middle(tokens: np.ndarray, grid: Grid) -> np.ndarray:
  """Returns what tokens [N, ...] are at the middle time, [z, y, x, ...]."""
  return tokens.reshape(*grid.dims, *tokens.shape[1:])[grid.dims[0] // 2]
