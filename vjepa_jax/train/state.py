"""What a training run carries from step to step."""

from collections.abc import Mapping
from typing import Any, Protocol

from flax import struct, traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.objectives.base import Batch, Objective
from vjepa_jax.train.optim import Optimizer


class Augment(Protocol):
  """Host batch -> device batch; draws keyed by each row's `_position`."""

  def __call__(self, batch: Batch, key: jax.Array, *, train: bool) -> Batch:
    ...


@struct.dataclass
class TrainState:
  """Everything a step reads and writes.

  Attributes:
    step: int32 [], optimiser steps taken, skipped ones included.
    params: what the optimiser moves.
    model_state: what has no gradient (EMA target, statistics).
    opt_state: moments.
    key: typed PRNG key []; a step draws from fold_in(key, step).
    skipped: int32 [2], non-finite steps (in a row, in total).
  """

  step: jax.Array
  params: Any
  model_state: Any
  opt_state: Any
  key: jax.Array
  skipped: jax.Array


def init_state(
    objective: Objective,
    optimizer: Optimizer,
    augment: Augment,
    batch: Batch,
    key: jax.Array,
) -> TrainState:
  """Draws a fresh state; jittable.

  Args:
    objective: owns parameters and model state.
    optimizer: owns moments.
    augment: as in `make_train_step`.
    batch: host batch [B, ...]; only its shapes should matter.
    key: typed PRNG key [].
  """
  init_key, run_key = jax.random.split(key)
  batch = augment(with_positions(batch), init_key, train=False)
  params, model_state = objective.init(init_key, batch)
  return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      model_state=model_state,
      opt_state=optimizer.init(params),
      key=run_key,
      skipped=jnp.zeros((2,), jnp.int32),
  )


def with_positions(batch: Batch) -> Batch:
  """Adds `_position` int32 [B], each row's place in the global batch."""
  rows = jax.tree.leaves(batch)[0].shape[0]
  return {**batch, "_position": jnp.arange(rows, dtype=jnp.int32)}


class PartsError(ValueError):
  """Parameters to start from that do not fit the model."""


def with_parts(params: Any, parts: Mapping[str, Any]) -> Any:
  """Returns parameters whose named parts have been put in place of drawn ones.

  Args:
    params: of a fresh state, each leaf where it shall lie.
    parts: such as {"encoder": nested mapping of arrays}.

  Raises:
    PartsError: names every parameter that is missing, not known or of another shape.
  """
  flat = traverse_util.flatten_dict(params)
  given = traverse_util.flatten_dict(dict(parts))
  wanted = {path for path in flat if path[0] in parts}
  show = lambda paths: sorted("/".join(path) for path in paths)
  faults = [f"{name} is missing" for name in show(wanted - given.keys())]
  faults += [f"{name} is not of this model" for name in show(given.keys() - wanted)]
  faults += [
      f"{'/'.join(path)} has shape {given[path].shape}, the model's {flat[path].shape}"
      for path in sorted(wanted & given.keys())
      if tuple(given[path].shape) != tuple(flat[path].shape)
  ]
  if faults:
    raise PartsError(
        f"what the run starts from does not fit its model: {'; '.join(faults)}; give "
        "the model the options of that run (of learned positions: model.table_voxels, "
        "the voxels that they were made for)"
    )

  def place(leaf: Any, like: jax.Array) -> jax.Array:
    whole = np.asarray(leaf, like.dtype)
    return jax.make_array_from_callback(
        whole.shape, like.sharding, whole.__getitem__
    )

  placed = {path: place(leaf, flat[path]) for path, leaf in given.items()}
  return traverse_util.unflatten_dict({**flat, **placed})
