"""From a config to the step that it trains with, on devices that need not be there."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from vjepa_jax.compiler import flops
from vjepa_jax.config import names, units
from vjepa_jax.train import optim, program, sharding
from vjepa_jax.train.state import with_positions
from vjepa_jax.volumes import augment

# Where only the data say how long a run is: lengths move no shape.
_ANY_LENGTH = {"total_steps": 10**6, "steps_per_epoch": 10**3}


def batch_shapes(plain: Mapping[str, Any], rows: int) -> dict[str, Any]:
  """Returns what `data.batches` makes of a config's data, as shapes [rows, ...]."""
  data = plain["data"]
  crop = plain["augment"].get("crop")
  frames, *canvas = units.data_voxels(plain)
  if crop and not data.get("clip"):
    frames = crop[0]
  stages = {"frame_label": ((frames,), "int32")} if data.get("stages") else {}
  row = {
      "volume": ((frames, *canvas, 1), data.get("dtype") or "uint8"),
      **dict.fromkeys(("mean", "std", "_mask"), ((), "float32")),
      "spacing": ((4,), "float32"),
      **dict.fromkeys(("index", "label", "source"), ((), "int32")),
      **stages,
  }
  return {
      name: jax.ShapeDtypeStruct((rows, *shape), np.dtype(dtype))
      for name, (shape, dtype) in row.items()
  }


def mesh_of(plain: Mapping[str, Any], devices: list[Any] | None = None) -> Mesh:
  """Arranges devices as a config's `train.mesh_*` say.

  Raises:
    ValueError: if they do not divide.
  """
  sizes = {
      axis: plain["train"][f"mesh_{axis}"] for axis in sharding.AXES
      if f"mesh_{axis}" in plain["train"]
  }
  return sharding.make_mesh(**sizes, devices=devices)


def objective_and_optimizer(
    plain: Mapping[str, Any],
    *,
    total_steps: int,
    steps_per_epoch: int,
    batch_size: int | None = None,
    platform: str | None = None,
) -> tuple[Any, optim.Optimizer]:
  """Builds what a run trains and by what, once its lengths are known.

  Args:
    plain: of a sound config.
    total_steps: of the run.
    steps_per_epoch: what lengths in epochs are counted by.
    batch_size: of all chips; None: the config's.
    platform: that attention is chosen for; None: this process's own.

  Raises:
    ValueError: for numbers that do not fit each other.
  """
  steps = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
  optimizer = names.in_steps(
      plain["optimizer"], names.parameters(units.build_optimizer), **steps
  )
  optimizer |= {
      "total_steps": total_steps,
      "batch_size": batch_size or plain["train"]["batch_size"],
  }
  return (
      units.build_objective(for_platform(plain, platform), **steps),
      units.build_optimizer(**optimizer),
  )


def step_program(
    plain: Mapping[str, Any],
    mesh: Mesh,
    *,
    platform: str | None = None,
    batch_size: int | None = None,
    accum: int | None = None,
    lengths: Mapping[str, int] = MappingProxyType({}),
    wrap: Callable[[Any], Any] = lambda objective: objective,
) -> program.Program:
  """Builds the step that `main` trains with, without data.

  Args:
    plain: of a sound config.
    mesh: of `mesh_of`.
    platform: that attention is chosen for; None: this process's own.
    batch_size: of all chips; None: the config's.
    accum: micro-batches; None: the config's.
    lengths: total_steps and steps_per_epoch, in place of the config's.
    wrap: objective -> what is trained in its place.

  Raises:
    ValueError: for numbers that do not fit each other.
  """
  train = plain["train"]
  rows = batch_size or train["batch_size"]
  objective, optimizer = objective_and_optimizer(
      plain, **_steps(train) | lengths, batch_size=rows, platform=platform
  )
  optional = {
      key: train[key] for key in ("fsdp_rules", "fsdp_min_size") if key in train
  }
  return program.make_program(
      objective=wrap(objective),
      optimizer=optimizer,
      augment=augment.make_augment(**plain["augment"]),
      batch=batch_shapes(plain, rows),
      mesh=mesh,
      accum=accum or train.get("accum", 1),
      **optional,
  )


def for_platform(plain: Mapping[str, Any], platform: str | None) -> dict[str, Any]:
  """Returns a config whose `attention="auto"` is what a platform would take."""
  if platform is None:
    return dict(plain)
  from vjepa_jax.nn import attention

  def choose(key: str, value: Any) -> Any:
    if key == "attention" and value == "auto":
      return attention.for_platform(platform)
    return value

  return _rewrite(plain, choose)


def flops_per_volume(plain: Mapping[str, Any]) -> float:
  """Returns what the model needs for one volume of a step, whatever the hardware.

  The gradient of the loss with attention written out and nothing rematerialised;
  see `compiler.flops`.
  """
  # In float32 no product stands in for a permutation, as 16 bits allow.
  changed = {"attention": "xla", "remat": "none", "dtype": "float32"}
  plain = plain | {
      section: _rewrite(plain[section], lambda key, value: changed.get(key, value))
      for section in ("model", "objective")
  }
  objective = units.build_objective(plain, **_steps(plain["train"]))
  unit_augment = augment.make_augment(**plain["augment"])
  key = jax.eval_shape(lambda: jax.random.key(0))
  batch = jax.eval_shape(
      lambda rows, key: unit_augment(with_positions(rows), key, train=True),
      batch_shapes(plain, 1), key,
  )
  params, model_state = jax.eval_shape(objective.init, key, batch)

  def gradient(params, model_state, batch, key):
    loss = lambda params: objective.loss(params, model_state, batch, key, train=True)
    return jax.grad(loss, has_aux=True)(params)[0]

  return flops.model_flops(gradient, params, model_state, batch, key)


def _steps(train: Mapping[str, Any]) -> dict[str, int]:
  given = {key: train[key] for key in _ANY_LENGTH if train.get(key)}
  return _ANY_LENGTH | given


def _rewrite(tree: Mapping[str, Any], change: Any) -> dict[str, Any]:
  """Returns nested dicts with change(key, value) for every value that is no dict."""
  return {
      key: _rewrite(value, change) if isinstance(value, Mapping) else change(key, value)
      for key, value in tree.items()
  }
