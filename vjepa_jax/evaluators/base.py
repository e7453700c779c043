"""What every evaluator takes and gives."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np


class Evaluator(Protocol):
  """Turns functions and data into named numbers and figures.

  An evaluator module holds a class `Evaluator`, built once as
  `Evaluator(functions, data, **options)`: `functions` is what the objective
  offers (`Objective.functions()`, wrapped by the loop so that they take host
  batches), `data` the open `vjepa_jax.data.pipeline.Data`.
  """

  def run(
      self, params: Any, model_state: Any
  ) -> Iterator[tuple[str, float | np.ndarray]]:
    """Yields (name, number) or (name, figure uint8 [H, W, 3])."""


def find_split(data: Any, split: str, place: str) -> Any:
  """Returns data.splits[split], the `Volumes` that an evaluator looks at.

  Args:
    data: the open `vjepa_jax.data.pipeline.Data`.
    split: its name.
    place: who asks, for the error.

  Raises:
    KeyError: if there is no such split; names those there are.
    ValueError: if it holds no volumes.
  """
  if split not in data.splits:
    raise KeyError(
        f"{place}: the data has no split {split!r}; it has "
        f"{', '.join(sorted(data.splits))}"
    )
  if not len(data.splits[split]):
    raise ValueError(f"{place}: split {split!r} holds no volumes")
  return data.splits[split]
