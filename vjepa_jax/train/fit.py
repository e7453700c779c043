"""Chooses the micro-batch before step 1, from the bytes that the compiler names.

The global batch, the image and the model stay what the config says; a run that goes
on keeps the micro-batches that it began with, since other ones add up in another
order.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax.sharding import Mesh

from vjepa_jax.compiler import chips, estimate
from vjepa_jax.train import sharding, watch
from vjepa_jax.train.program import Program

CHOICES = ("off", "auto")
# Of a device's memory: a runtime has buffers of its own, and memory has holes.
_MARGIN = 0.05
# By how much more than in proportion a step may shrink with its micro-batch.
_SLACK = 1.25


class FitError(ValueError):
  """A step that no micro-batch makes small enough."""


def choose(
    build: Callable[[int], Program],
    *,
    batch_size: int,
    mesh: Mesh,
    least: int = 1,
    memory_gib: float | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Program, int]:
  """Finds the fewest micro-batches whose step fits into every device of the mesh.

  Args:
    build: number of micro-batches -> program of the whole step.
    batch_size: of all devices, never changed.
    mesh: of the run.
    least: micro-batches to begin with.
    memory_gib: of a device; None: what it says itself, or what is known of it.
    say: gets a line for each compilation, and one for the choice.

  Returns:
    (program, micro-batches). Running the program compiles nothing again.

  Raises:
    FitError: if one row a device is too much, or the memory is not known.
  """
  available = device_bytes(mesh, memory_gib)
  # All processes must choose alike: the fullest device of all decides.
  limit = -watch.largest(-(1 - _MARGIN) * available)
  counts = candidates(batch_size, mesh, least)
  accum, needed, state = 0, None, 0
  for count in counts:
    # The last is tried in any case: only the compiler's word refuses a config.
    if count != counts[-1] and _expected(state, needed, accum, count) > limit:
      continue
    program, accum = build(count), count
    state = _bytes_of((program.state, program.batch))
    needed = _needed(program, limit)
    say(
        f"train.fit: accum {accum} (micro-batches of {batch_size // accum}): "
        f"{_gib(needed)} of {_gib(limit)} a device"
    )
    if needed is not None and needed <= limit:
      say(
          f"train.fit: takes accum {accum}: {batch_size} volumes a step as {accum} "
          f"micro-batch(es) of {batch_size // accum}"
      )
      return program, accum
  raise FitError(_refusal(accum, needed, limit, batch_size, mesh))


def kept(
    accum: int | None,
    wanted: int,
    *,
    batch_size: int,
    mesh: Mesh,
    say: Callable[[str], None] = print,
) -> int | None:
  """Returns the micro-batches with which a run goes on; None: choose them anew.

  Args:
    accum: that the checkpoint was trained with; None: it does not say.
    wanted: of the config.
    batch_size: of all devices.
    mesh: of the run as it goes on.
    say: gets a line where the run will not go on bit for bit.
  """
  if accum is None:
    return wanted
  if accum in candidates(batch_size, mesh, 1):
    return accum
  say(
      f"train.fit: the checkpoint was trained with accum {accum}, which {mesh.size} "
      f"devices and a batch of {batch_size} do not divide; it is chosen anew, and sums "
      "are rounded in another order: the run does not go on bit for bit"
  )
  return None


def candidates(batch_size: int, mesh: Mesh, least: int) -> list[int]:
  """Returns the numbers of micro-batches, from `least`, that batch and mesh allow."""
  shares = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
  rows = batch_size // shares
  return [n for n in range(max(least, 1), rows + 1) if rows % n == 0] or [least]


def device_bytes(mesh: Mesh, memory_gib: float | None = None) -> float:
  """Returns the memory of the mesh's devices.

  Raises:
    FitError: if neither the device, the table of chips nor the config says it.
  """
  if memory_gib is not None:
    return memory_gib * chips.GIB
  device = mesh.local_devices[0]
  limit = (device.memory_stats() or {}).get("bytes_limit")
  chip = chips.of_kind(device.device_kind)
  if limit is None and chip is not None:
    limit = chip.hbm_bytes
  if limit is None:
    raise FitError(
        f"train.fit='auto': the memory of {device.device_kind!r} is not known; give it "
        "as train.memory_gib, or set train.fit='off' and train.accum yourself"
    )
  return float(limit)


def fit_faults(fit: str, memory_gib: float | None = None) -> list[str]:
  """Says what is wrong with the options; an empty list is well."""
  faults = []
  if fit not in CHOICES:
    faults.append(f"fit {fit!r} is none of {', '.join(CHOICES)}")
  if memory_gib is not None and not memory_gib > 0:
    faults.append(f"memory_gib {memory_gib} must be positive")
  return faults


def _expected(
    state: float, needed: float | None, accum: int, count: int
) -> float:
  """Returns what a step needs with `count` micro-batches, at the least, going by one
  with `accum` of them: what is no state shrinks with the micro-batch.
  """
  if needed is None:
    return 0.0
  return state + (needed - state) * accum / count / _SLACK


def _needed(program: Program, limit: float) -> float | None:
  """Returns the bytes of a step on a device; None where the compiler only refuses.

  All processes get the same answer: they must choose alike.
  """
  try:
    memory = estimate.memory(estimate.compile_lowered(program.lower()))
    # The next batch is on its way while a step runs.
    needed = float(memory.whole + _bytes_of(program.batch))
  except estimate.OutOfMemory as error:
    needed = math.inf if error.needed is None else max(float(error.needed), 1.001 * limit)
  needed = watch.largest(needed)
  return needed if math.isfinite(needed) else None


def _bytes_of(tree: Any) -> int:
  """Returns the bytes of a tree of shapes on one device."""
  def of(leaf: Any) -> int:
    size = getattr(leaf.dtype, "itemsize", 0)  # A key's own type has none.
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * size

  return sum(of(leaf) for leaf in jax.tree.leaves(tree))


def _refusal(
    accum: int, needed: float | None, limit: float, batch_size: int, mesh: Mesh
) -> str:
  fsdp = mesh.shape.get("fsdp", 1)
  advice = ["model.remat='full' and objective.predictor.remat='full'"]
  if fsdp < mesh.size:
    advice.append(f"train.mesh_fsdp={mesh.size} (is {fsdp})")
  advice += ["a smaller model or crop", "more devices, or ones with more memory"]
  return (
      f"train.fit='auto': batch_size {batch_size} does not fit even as accum {accum}, "
      f"{batch_size // accum} volumes on {mesh.size} device(s) at a time: "
      f"{_gib(needed)}, and {_gib(limit)} a device may be used. "
      f"Change: {'; '.join(advice)}"
  )


def _gib(count: float | None) -> str:
  return "more than there is" if count is None else f"{count / chips.GIB:.3g} GiB"
