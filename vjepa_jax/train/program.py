"""The train step as it is compiled: what goes in, where it lives, how it is built.

The loop runs it; `precompile` and the fitting of memory compile the very same one
for devices that need not be there.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vjepa_jax.objectives.base import Metrics, Objective
from vjepa_jax.train import sharding
from vjepa_jax.train.optim import Optimizer
from vjepa_jax.train.state import Augment, TrainState, init_state
from vjepa_jax.train.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
  """A train step on a mesh, traced but not compiled.

  Attributes:
    mesh: of `sharding.make_mesh`, or of a topology without devices.
    state: TrainState of ShapeDtypeStruct, each with its sharding.
    batch: name -> ShapeDtypeStruct [B, ...] of the global batch, with sharding.
    init: jitted key -> TrainState.
    step: jitted (state, batch) -> (state, metrics); donates the state.
  """

  mesh: Mesh
  state: TrainState
  batch: dict[str, jax.ShapeDtypeStruct]
  init: Callable[[jax.Array], TrainState]
  step: Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]

  def lower(self) -> Any:
    """Returns the step lowered for the mesh; `.compile()` needs no array."""
    return self.step.lower(self.state, self.batch)


def make_program(
    *,
    objective: Objective,
    optimizer: Optimizer,
    augment: Augment,
    batch: Mapping[str, Any],
    mesh: Mesh,
    accum: int = 1,
    fsdp_rules: sharding.Rules = (),
    fsdp_min_size: int = 2**16,
) -> Program:
  """Builds the train step of a run on a mesh.

  Args:
    objective: as in `make_train_step`.
    optimizer: as in `make_train_step`.
    augment: as in `make_train_step`.
    batch: name -> something with the shape [B, ...] and dtype of the GLOBAL batch.
    mesh: of `sharding.make_mesh`, or of a topology without devices.
    accum: micro-batches a step.
    fsdp_rules: of `sharding.state_sharding`.
    fsdp_min_size: of `sharding.state_sharding`.
  """
  rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))
  shapes = {
      name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=rows)
      for name, value in batch.items()
  }
  # Zeros for data: parameters must not depend on which record comes first.
  draw = lambda key: init_state(
      objective, optimizer, augment,
      {name: jnp.zeros(s.shape, s.dtype) for name, s in shapes.items()}, key,
  )
  draw = sharding.on_mesh(draw, mesh)
  wanted = jax.eval_shape(draw, jax.eval_shape(functools.partial(jax.random.key, 0)))
  places = sharding.state_sharding(
      wanted, mesh, rules=fsdp_rules, min_size=fsdp_min_size
  )
  state = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      wanted, places,
  )
  step = sharding.on_mesh(
      make_train_step(objective, optimizer, augment=augment, accum=accum), mesh
  )
  return Program(
      mesh=mesh,
      state=state,
      batch=shapes,
      init=jax.jit(draw, out_shardings=places),
      step=jax.jit(
          step, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh))
      ),
  )
