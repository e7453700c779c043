"""From a config to the units it names: all faults at once, then one build each.

This room is the only place where a string of a config becomes an import, and,
beside `main`, the only one that sees a whole config. Every unit gets its own
keywords and nothing else.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import ml_collections
import numpy as np

from vjepa_jax.config import names, programs, units
from vjepa_jax.config.check import ConfigError, check_config, positions_fault
from vjepa_jax.config.names import as_plain, duration, in_steps, load
from vjepa_jax.config.programs import objective_and_optimizer
from vjepa_jax.config.units import (
    build_objective,
    build_optimizer,
    model_grid,
    open_data,
    phantom_manifest,
)
from vjepa_jax.data import pipeline
from vjepa_jax.train import evaluate, loop, optim, sharding
from vjepa_jax.volumes import augment
from vjepa_jax.volumes.grid import Grid

__all__ = [
    "ConfigError", "Experiment", "as_plain", "build", "build_objective",
    "build_optimizer", "check_config", "duration", "in_steps", "load", "model_grid",
    "open_data", "phantom_manifest", "positions_fault",
]


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a config stands for, built and ready to run.

  Attributes:
    config: the plain config, as saved with the run.
    data: the open data.
    objective: owns parameters, masks and loss.
    optimizer: of `train.optim`.
    augment: host batch -> device batch.
    mesh: of devices.
    grid: tokens that the model sees.
    options: of the train loop.
    evaluators: name -> (evaluator, every how many steps).
  """

  config: dict[str, Any]
  data: pipeline.Data
  objective: Any
  optimizer: optim.Optimizer
  augment: Callable[..., Any]
  mesh: Any
  grid: Grid
  options: loop.LoopOptions
  evaluators: dict[str, tuple[Any, int | None]]


def build(
    config: ml_collections.ConfigDict,
    *,
    quarantine: str | None = None,
    say: Callable[[str], None] = print,
) -> Experiment:
  """Builds every unit of a sound config, each from its own keywords.

  Args:
    config: of a config file, with overrides; `check_config` is run again, now
      with the number of devices.
    quarantine: file that bad recordings are listed in.
    say: gets a line now and then while data are read.

  Raises:
    ConfigError: as `check_config`.
    DataError: if the manifest or too many of its files cannot be used.
  """
  check_config(config, device_count=jax.device_count())
  plain = as_plain(config)
  grid = model_grid(plain)
  data = open_data(
      plain, quarantine=quarantine, host=(jax.process_index(), jax.process_count()),
      say=say,
  )
  train, steps = plain["train"], _lengths(plain["train"], data)
  try:
    plain = _with_counted_labels(plain, data)
    objective, optimizer = objective_and_optimizer(plain, **steps)
  except ValueError as error:  # lengths that only the size of the data tells
    raise ConfigError(plain["name"], [str(error)]) from error
  unit_augment = augment.make_augment(**plain["augment"])
  mesh = programs.mesh_of(plain)
  functions = evaluate.wrap_functions(objective.functions(), unit_augment, mesh)
  evaluators = _build_evaluators(plain, functions, data, **steps)
  options = _loop_options(plain, grid, evaluators, **steps)
  if train.get("best_metric") and options.best_metric is None:
    key = "stages" if plain["data"].get("clip") else "label"
    say(
        f"data.{key} is empty: no probe, so no checkpoint is the best by "
        f"{train['best_metric']}; the last {options.keep} are kept"
    )
  return Experiment(
      config=plain,
      data=data,
      objective=objective,
      optimizer=optimizer,
      augment=unit_augment,
      mesh=mesh,
      grid=grid,
      options=options,
      evaluators=evaluators,
  )


def _with_counted_labels(
    plain: dict[str, Any], data: pipeline.Data
) -> dict[str, Any]:
  """Fills in what an objective that learns from labels leaves to the data.

  Raises:
    ValueError: if the data have another number of classes.
  """
  options, train = plain["objective"], data.splits["train"]
  if "classes" not in options:
    return plain
  if options["classes"] != len(train.labels):
    raise ValueError(
        f"objective.classes: {options['classes']}, but the labels of the data are "
        f"{len(train.labels)}: {', '.join(train.labels)}"
    )
  by_frame = options.get("labels", "label") == "frame_label"
  labels = train.stage_ids if by_frame else train.label_ids
  counts = np.bincount(labels[labels >= 0], minlength=options["classes"])
  if not counts.sum():
    where = "data.stages" if by_frame or plain["data"].get("stages") else "data.label"
    raise ValueError(
        f"{where}: no training recording has a label, so that nothing can be learned; "
        "data_report.json counts what was dropped"
    )
  module, weights = names.module_of("objective", options["name"]), ()
  if options.get("balance_classes"):
    weights = module.balanced_weights(counts)
  elif options.get("class_weights"):
    weights = module.scaled_weights(options["class_weights"], counts)
  counted = {"class_weights": weights, "balance_classes": False}
  return plain | {"objective": options | counted}


def _lengths(train: Mapping[str, Any], data: pipeline.Data) -> dict[str, int]:
  """Returns total_steps and steps_per_epoch of a run on these data."""
  volumes = len(data.splits["train"])
  per_epoch = train.get("steps_per_epoch") or max(volumes // train["batch_size"], 1)
  total = train.get("total_steps") or round(train["total_epochs"] * per_epoch)
  return {"total_steps": total, "steps_per_epoch": per_epoch}


def _loop_options(plain, grid, evaluators, **steps) -> loop.LoopOptions:
  own = (
      "steps_per_epoch", "total_epochs", "start_from",
      *(f"mesh_{a}" for a in sharding.AXES),
  )
  section = {k: v for k, v in plain["train"].items() if k not in own}
  section = in_steps(section, names.parameters(loop.LoopOptions), **steps)
  section["total_steps"] = steps["total_steps"]
  best = section.get("best_metric") or None
  # Without labels there is no probe, and then nothing to choose the best by.
  given = {names.told_as(plain["evals"][name]) for name in evaluators}
  if best and best.split(".")[0] not in given:
    best = None
  wandb = units.filled_in(plain.get("wandb", {}))
  return loop.LoopOptions(**{
      **section,
      "best_metric": best,
      "early_stop_metric": section.get("early_stop_metric") or None,
      "tokens_per_volume": grid.tokens,
      "flops_per_volume": functools.partial(programs.flops_per_volume, plain),
      "compilation_cache": section.get("compilation_cache", "auto"),
      "wandb": wandb if wandb.get("project") else None,
  })


def _build_evaluators(plain, functions, data, **steps):
  evaluators = {}
  for name, options in plain["evals"].items():
    unit = names.resolve("evals", options["type"])
    labelled = plain["data"].get("label") or plain["data"].get("stages")
    if getattr(unit, "needs_labels", False) and not labelled:
      continue
    if options.get("split") == "":
      continue
    options = in_steps(
        options, [*names.parameters(unit), "every_steps"], **steps
    )
    every = options.pop("every_steps") or None
    options.pop("type")
    try:
      evaluators[name] = (unit(functions, data, **options), every)
    except (KeyError, ValueError) as error:
      raise ConfigError(
          plain["name"], [f"evals.{name}: {error.args[0]}"]
      ) from error
  return evaluators
