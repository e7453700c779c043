"""What every objective owns: parameters, masks, state without gradient, a loss."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

Params = Any
ModelState = Any
Batch = Mapping[str, jax.Array]
# name -> (sum, weight): exact under accumulation, padding and many hosts.
Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Objective(Protocol):
  """The seam between the one train loop and what is learned.

  A device batch holds `volume` float32 [B, T, Z, Y, X, C] (normalised and
  augmented), `spacing` float32 [B, 4], `_mask` float32 [B] (0 marks padding
  rows) and `_position` int32 [B], the row's place in the global batch: random
  draws are keyed by it, so that accumulation and device count change nothing.

  An objective that learns from labels may set `needs_labels = True`: a batch may then
  have none, weigh 0 and change nothing; of others that is a fault (`train.step`).
  """

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, ModelState]:
    """Draws parameters and the state that has no gradient (EMA, statistics)."""

  def loss(
      self,
      params: Params,
      model_state: ModelState,
      batch: Batch,
      key: jax.Array,
      *,
      train: bool,
  ) -> tuple[jax.Array, tuple[ModelState, Metrics]]:
    """Returns the mean loss over real rows, and (model_state, metrics).

    metrics["loss"] is (sum over rows, number of real rows), so that loss equals
    their ratio and the loop can join micro-batches exactly.
    """

  def after_update(
      self, params: Params, model_state: ModelState, step: jax.Array
  ) -> ModelState:
    """Advances model_state once an optimiser step; `step` counts from 0."""

  def scalars(self, step: jax.Array) -> dict[str, jax.Array]:
    """Schedules of its own to log at `step` (V-JEPA: the EMA momentum)."""

  def functions(self) -> dict[str, Callable[..., Any]]:
    """What evaluators may ask for, each fn(params, model_state, batch, ...)."""
