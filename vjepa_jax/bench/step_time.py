"""Time of one train step, without the input pipeline.

python -m vjepa_jax.bench.step_time --config=FILE[:ARG] [--config.key=value ...]
"""

from collections.abc import Callable, Mapping
import sys
from typing import Any

from absl import app, flags
import jax
from jax.sharding import Mesh
from ml_collections import config_flags
import numpy as np

from vjepa_jax import config as config_lib
from vjepa_jax.bench import common
from vjepa_jax.data import pipeline
from vjepa_jax.objectives.base import Objective
from vjepa_jax.train import sharding
from vjepa_jax.train.optim import Optimizer
from vjepa_jax.train.program import make_program
from vjepa_jax.train.state import Augment


def measure(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    batch: Mapping[str, jax.Array],
    *,
    repeats: int = 10,
    warmup: int = 2,
) -> tuple[list[float], list[float]]:
  """Times step(state, batch) on one batch that is already on the device.

  Args:
    step: jitted; may donate the state, which is handed on from call to call.
    state: before the first step.
    batch: device arrays [B, ...].
    repeats: timed steps, at least 5.
    warmup: untimed steps before, at least 1.

  Returns:
    (wall seconds, CPU seconds), one each a timed step.
  """
  current = [state]

  def call():
    current[0], metrics = step(current[0], batch)
    return current[0], metrics

  return common.repeat(call, repeats=repeats, warmup=warmup)


def measure_objective(
    *,
    objective: Objective,
    optimizer: Optimizer,
    augment: Augment,
    batch: Mapping[str, np.ndarray],
    name: str,
    accum: int = 1,
    mesh: Mesh | None = None,
    tokens_per_volume: int | None = None,
    repeats: int = 10,
    warmup: int = 2,
) -> dict[str, Any]:
  """Builds the state and the real train step, and measures them.

  Args:
    objective: whose step is timed.
    optimizer: of `optim.make_optimizer`.
    augment: as in training.
    batch: host batch [B, ...].
    name: of the configuration, for the line.
    accum: micro-batches a step.
    mesh: of `sharding.make_mesh`; None: all devices along data.
    tokens_per_volume: adds tokens_per_s.
    repeats: timed steps.
    warmup: untimed steps before.

  Returns:
    The numbers of `common.line`, in seconds a step, with volumes_per_s.
  """
  mesh = mesh or sharding.make_mesh()
  rows = len(next(iter(batch.values())))
  sharding.check_batch(rows, accum, mesh)
  program = make_program(
      objective=objective, optimizer=optimizer, augment=augment, batch=batch,
      mesh=mesh, accum=accum,
  )
  state = program.init(jax.random.key(0))
  batch = sharding.put_batch(batch, mesh)
  wall, cpu = measure(program.step, state, batch, repeats=repeats, warmup=warmup)
  rates = {"batch": rows, "accum": accum, "volumes_per_s": rows / np.median(wall)}
  if tokens_per_volume:
    rates["tokens_per_s"] = rates["volumes_per_s"] * tokens_per_volume
  return common.line("step_time", name, wall, cpu, **rates)


def main(argv: list[str]) -> None:
  """Measures the step of a config on its own first batch."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")
  experiment = config_lib.build(
      flags.FLAGS.config, say=lambda text: print(text, file=sys.stderr)
  )
  options = experiment.options
  batches = pipeline.train_iterator(
      experiment.data.splits["train"], batch_size=options.batch_size, seed=0
  )
  common.emit(measure_objective(
      objective=experiment.objective,
      optimizer=experiment.optimizer,
      augment=experiment.augment,
      batch=next(batches),
      name=experiment.config["name"],
      accum=options.accum,
      mesh=experiment.mesh,
      tokens_per_volume=options.tokens_per_volume,
      repeats=flags.FLAGS.repeats,
  ))


if __name__ == "__main__":
  # Not at import: other verbs define --config too.
  config_flags.DEFINE_config_file("config", None, "FILE.py[:ARG]", lock_config=True)
  flags.DEFINE_integer("repeats", 10, "Timed steps.", lower_bound=5)
  flags.mark_flags_as_required(["config"])
  app.run(main)
