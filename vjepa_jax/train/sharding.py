"""Where arrays live: a mesh of devices, rules for state, batches put on it.

The mesh has three axes. "data" and "fsdp" split the rows of a batch; "fsdp" splits
parameters, moments and EMA copies as well (ZeRO, arXiv:1910.02054); "sequence"
splits the tokens of one volume, for those too large for a device.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
import re
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from vjepa_jax.nn.placement import BATCH_AXES, MIN_SIZE, SEQUENCE_AXIS, split_axis
from vjepa_jax.train.optim import named_leaves

AXES = (*BATCH_AXES, SEQUENCE_AXIS)
# Regex of a name -> PartitionSpec entries, e.g. (r"mlp/.*kernel$", (None, "fsdp")).
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    sequence: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
  """Arranges devices as [data, fsdp, sequence], host by host.

  Args:
    data: devices along which only the batch is split; -1 takes what is left.
    fsdp: devices along which parameters are split as well.
    sequence: devices that share the tokens of each volume.
    devices: of a topology that need not be there; None: all of this run.

  Raises:
    ValueError: the axes do not use exactly all devices, or `sequence` would reach
      beyond a host.
  """
  devices = jax.devices() if devices is None else list(devices)
  shape = _mesh_shape(data, fsdp, sequence, len(devices), devices[0].platform)
  # Explicit axes, the default, forbid splitting the batch for the scan.
  return Mesh(_arranged(shape, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_faults(
    data: int, fsdp: int, sequence: int, count: int | None = None
) -> list[str]:
  """Says what is wrong with the sizes of a mesh; an empty list is well.

  Args:
    data: of `make_mesh`.
    fsdp: of `make_mesh`.
    sequence: of `make_mesh`.
    count: of all devices; None: not known yet.
  """
  if min(fsdp, sequence) < 1 or (data < 1 and data != -1):
    return ["sizes must be positive, or -1 for data (all devices that are left)"]
  if not count:
    return []
  inner = fsdp * sequence
  if count % inner:
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    return [
        f"fsdp x sequence = {inner} does not divide the {count} device(s); it must be "
        f"one of {divisors}"
    ]
  if data not in (-1, count // inner):
    return [
        f"data x fsdp x sequence = {data * inner} is not the number of devices, "
        f"{count}; set data to {count // inner}, or to -1, which takes what is left"
    ]
  return []


def batch_shares(mesh: Mesh) -> int:
  """In how many parts the mesh splits the rows of a batch."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_size: int, accum: int, mesh: Mesh) -> None:
  """Refuses a global batch that micro-batches and devices do not divide.

  Raises:
    ValueError: with the nearest batch sizes that would do.
  """
  shares = batch_shares(mesh)
  unit = accum * shares
  if batch_size < 1 or batch_size % unit:
    lower = batch_size // unit * unit
    near = [n for n in (lower, lower + unit) if n]
    split = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in BATCH_AXES)
    raise ValueError(
        f"batch_size {batch_size} is not a multiple of accum {accum} x {shares} "
        f"devices ({split}) = {unit}; nearest: {' or '.join(map(str, near))}"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
  """Makes a mesh the ambient one while `function` is traced.

  Kernels that a compiler cannot split over devices are mapped over it, and
  constraints on activations name its axes.
  """

  @functools.wraps(function)
  def traced(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args, **kwargs)

  return traced


def state_sharding(
    state: Any, mesh: Mesh, *, rules: Rules = (), min_size: int = MIN_SIZE
) -> Any:
  """Says where each array of a train state lives: a tree of NamedSharding.

  Moments and EMA copies have the shapes and name endings of their parameters, so
  they follow them without being named.

  Args:
    state: tree of arrays or of ShapeDtypeStruct.
    mesh: of `make_mesh`.
    rules: first match decides; elsewhere `placement.split_axis` does.
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
  batch = _checked(batch, _own_shares(mesh), "devices of this host")
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
      for name, value in _checked(batch, batch_shares(mesh), "devices").items()
  }


def _mesh_shape(
    data: int, fsdp: int, sequence: int, count: int, platform: str
) -> tuple[int, int, int]:
  faults = mesh_faults(data, fsdp, sequence, count)
  if faults:
    raise ValueError(
        f"mesh: data={data}, fsdp={fsdp}, sequence={sequence}, but {count} {platform} "
        f"devices; {faults[0]}"
    )
  return count // (fsdp * sequence), fsdp, sequence


def _arranged(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
  """Orders devices host by host, within a host as they are wired.

  So the rows that a host reads are one part of the global batch, the same part on
  any machine; by the wires of the whole slice hosts would be interleaved.
  """
  data, fsdp, sequence = shape
  hosts = len({device.process_index for device in devices})
  if hosts == 1:
    return mesh_utils.create_device_mesh(
        shape, devices, allow_split_physical_axes=True
    )
  own = len(devices) // hosts
  if own % sequence:
    raise ValueError(
        f"mesh: sequence={sequence} does not divide the {own} devices of a host, which "
        "reads whole rows; set it to a divisor, and fsdp to more instead"
    )
  inner = math.gcd(fsdp, own // sequence)
  within = (own // sequence // inner, inner, sequence)
  return mesh_utils.create_hybrid_device_mesh(
      within, (data // within[0], fsdp // inner, 1), devices,
      process_is_granule=True, allow_split_physical_axes=True,
  )


def _own_shares(mesh: Mesh) -> int:
  """How many parts of a batch's rows the devices of this process hold."""
  rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  own = rows.addressable_devices_indices_map((batch_shares(mesh),))
  return len({str(part) for part in own.values()})


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
  axis = split_axis(leaf.shape, mesh.shape["fsdp"], min_size)
  return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "fsdp")


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
