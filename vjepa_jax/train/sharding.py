"""Where arrays live: a mesh of data and fsdp, rules for state, batches put on it."""

from collections.abc import Mapping, Sequence
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from vjepa_jax.train.optim import named_leaves

BATCH_AXES = ("data", "fsdp")
# Regex of a name -> PartitionSpec entries, e.g. (r"mlp/.*kernel$", (None, "fsdp")).
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
  """Arranges all devices as [data, fsdp].

  Args:
    data: devices along which only the batch is split; -1 takes what is left.
    fsdp: devices along which parameters are split as well.

  Raises:
    ValueError: the axes do not use exactly all devices.
  """
  count = jax.device_count()
  found = f"mesh: data={data}, fsdp={fsdp}, but {count} {jax.default_backend()} devices"
  if fsdp < 1 or count % fsdp or (data < 1 and data != -1):
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    raise ValueError(
        f"{found}; fsdp must be one of {divisors}, data positive or -1 (all the rest)"
    )
  data = count // fsdp if data == -1 else data
  if data * fsdp != count:
    raise ValueError(
        f"{found}; data x fsdp must be {count}: set data={count // fsdp} or -1"
    )
  # Explicit axes, the default, forbid splitting the batch for the scan.
  return jax.make_mesh((data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def check_batch(batch_size: int, accum: int, mesh: Mesh) -> None:
  """Refuses a global batch that micro-batches and devices do not divide.

  Raises:
    ValueError: with the nearest batch sizes that would do.
  """
  unit = accum * mesh.size
  if batch_size < 1 or batch_size % unit:
    lower = batch_size // unit * unit
    near = [n for n in (lower, lower + unit) if n]
    raise ValueError(
        f"batch_size {batch_size} is not a multiple of accum {accum} x {mesh.size} "
        f"devices = {unit}; nearest: {' or '.join(map(str, near))}"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def state_sharding(
    state: Any, mesh: Mesh, *, rules: Rules = (), min_size: int = 2**16
) -> Any:
  """Says where each array of a train state lives: a tree of NamedSharding.

  Moments and EMA copies have the shapes and name endings of their parameters, so
  they follow them without being named.

  Args:
    state: tree of arrays or of ShapeDtypeStruct.
    mesh: of `make_mesh`.
    rules: first match decides; elsewhere the largest axis that fsdp divides is
      split, the last among equals.
    min_size: arrays with fewer elements stay whole everywhere.

  Raises:
    ValueError: a rule does not fit the shape that it matches.
  """
  specs = [
      _spec(name, leaf, mesh, rules, min_size)
      for name, leaf in named_leaves(state).items()
  ]
  shardings = [NamedSharding(mesh, spec) for spec in specs]
  return jax.tree.unflatten(jax.tree.structure(state), shardings)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Makes global arrays [B, ...], rows over all devices, from this host's rows.

  Args:
    batch: numpy arrays [B / hosts, ...] of this process.
    mesh: of `make_mesh`.

  Raises:
    ValueError: an array's rows do not divide by this host's devices, or its
      values are no numbers.
  """
  sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  batch = _checked(batch, mesh.size // jax.process_count(), "devices of this host")
  return {
      name: jax.make_array_from_process_local_data(sharding, value)
      for name, value in batch.items()
  }


def put_common_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """Makes global arrays [B, ...], rows over all devices, of rows that every host has.

  What is evaluated is the same on any number of hosts.

  Args:
    batch: numpy arrays [B, ...], equal on all processes.
    mesh: of `make_mesh`.

  Raises:
    ValueError: an array's rows do not divide by the devices, or its values are no
      numbers.
  """
  sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  return {
      name: jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
      for name, value in _checked(batch, mesh.size, "devices").items()
  }


def _checked(
    batch: Mapping[str, np.ndarray], count: int, places: str
) -> dict[str, np.ndarray]:
  """Returns the batch as arrays of numbers whose rows `count` divides."""
  arrays = {name: np.asarray(value) for name, value in batch.items()}
  for name, value in arrays.items():
    if value.dtype.kind not in "biuf" or value.ndim < 1 or len(value) % count:
      raise ValueError(
          f"batch[{name!r}]: {value.dtype} {list(value.shape)} cannot be put on "
          f"{count} {places}; wanted numbers, with a first axis that {count} divides"
      )
  return arrays


def _spec(
    name: str, leaf: Any, mesh: Mesh, rules: Rules, min_size: int
) -> PartitionSpec:
  for pattern, entries in rules:
    if re.search(pattern, name):
      _check_rule(name, leaf.shape, pattern, entries, mesh)
      return PartitionSpec(*entries)
  fsdp = mesh.shape["fsdp"]
  divisible = [
      (size, axis) for axis, size in enumerate(leaf.shape) if size % fsdp == 0
  ]
  if fsdp == 1 or not divisible or np.prod(leaf.shape) < min_size:
    return PartitionSpec()
  _, axis = max(divisible)
  return PartitionSpec(*[None] * axis, "fsdp")


def _check_rule(name, shape, pattern, entries, mesh) -> None:
  fits = len(entries) <= len(shape) and all(
      entry is None or (entry in mesh.shape and size % mesh.shape[entry] == 0)
      for entry, size in zip(entries, shape)
  )
  if not fits:
    raise ValueError(
        f"sharding: rule {pattern!r} -> {entries} does not fit {name} "
        f"{list(shape)} on the mesh {dict(mesh.shape)}; axes are "
        f"{list(mesh.shape)} and must divide the size"
    )
