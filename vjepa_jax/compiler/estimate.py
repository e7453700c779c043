"""A compiled step in numbers: bytes a chip, estimated time, traffic, worst operations."""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

from vjepa_jax.compiler import kernels
from vjepa_jax.compiler.chips import GIB, Chip
from vjepa_jax.compiler.hlo import COLLECTIVES, Module, arrays

# What moves nothing by itself, or goes on behind other work.
_FREE = (
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call",
    "conditional", "custom-call", *COLLECTIVES,
)
_NOTICED = 2**20  # bytes of a result
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"


class CompilerError(RuntimeError):
  """The compiler failed, not for want of memory."""


class OutOfMemory(Exception):
  """A program that the compiler refuses.

  Attributes:
    needed: bytes that it wanted a chip; None where it does not say.
    available: bytes that a chip has; None where it does not say.
  """

  def __init__(self, message: str):
    super().__init__(message)
    self.needed, self.available = _refused_bytes(message)


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes that a program holds on one device.

  Attributes:
    peak: at any time, state and batch included.
    temporary: what lives only within a step.
    arguments: state and batch.
    whole: all of them side by side, as a runtime that sets temporaries aside for the
      whole step holds them.
  """

  peak: int
  temporary: int
  arguments: int
  whole: int


@dataclasses.dataclass(frozen=True)
class Cost:
  """The time of a step as the compiler and the kernels' model have it.

  Attributes:
    non_kernel_ms: estimated cycles of everything but custom kernels; operations to
      which the compiler gives no estimate count as nothing.
    kernel_ms: of `kernels.milliseconds`.
    collective_ms: bytes over the chip's links, were nothing hidden behind work; not
      in the two above.
    collective_bytes: kind -> bytes a chip hands in a step; "total": their sum.
    largest_ops: the operations that take longest: ms, trips, name, op_name, result.
    kernels: one entry a kernel: name, trips, ms.
    unknown_kernels: custom calls whose time no number here holds.
    unknown_ops: operations without an estimate that write a MiB or more: name, trips,
      mib (of all trips), op_name, result.
    unknown_loops: loops that count once since their length is not in the text.
  """

  non_kernel_ms: float
  kernel_ms: float
  collective_ms: float | None
  collective_bytes: dict[str, float]
  largest_ops: list[dict[str, Any]]
  kernels: list[dict[str, Any]]
  unknown_kernels: list[str]
  unknown_ops: list[dict[str, Any]]
  unknown_loops: list[str]

  @property
  def bound_ms(self) -> float:
    """Work and kernels one after the other, collectives hidden behind them."""
    return self.non_kernel_ms + self.kernel_ms


def compile_lowered(lowered: Any) -> Any:
  """Compiles what `jit(...).lower(...)` returned.

  Raises:
    OutOfMemory: where the compiler finds that it does not fit.
    CompilerError: where it fails by itself, with its first words.
  """
  import jax

  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
      raise OutOfMemory(str(error)) from error
    said = str(error).strip().splitlines()
    raise CompilerError(
        f"the compiler failed: {said[0] if said else error}\nA compiler whose programs "
        "this jaxlib cannot read shows so; install the libtpu that belongs to it "
        f"(jax {jax.__version__}: see `pip show jax`, extra tpu)"
    ) from error


def memory(compiled: Any) -> Memory:
  """Returns the bytes of a compiled program a device, by its own account."""
  found = compiled.memory_analysis()
  arguments, temporary = found.argument_size_in_bytes, found.temp_size_in_bytes
  # A donated argument becomes a result in place.
  held = arguments + found.output_size_in_bytes - found.alias_size_in_bytes
  return Memory(
      peak=int(found.peak_memory_in_bytes), temporary=int(temporary),
      arguments=int(arguments), whole=int(held + temporary),
  )


def cost(text: str, chip: Chip, *, top: int = 20) -> Cost:
  """Returns what a step costs by the text of its compiled program.

  Args:
    text: of `compiled.as_text()`, for TPU.
    chip: that it was compiled for, with a clock.
    top: how many of the largest operations to list.
  """
  module = Module(text)
  to_ms = lambda cycles: 1e3 * cycles / chip.clock_hz
  spent = []
  for run in module.runs:
    cycles = run.instruction.cycles
    if cycles and run.instruction.opcode != "custom-call":
      spent.append((cycles * run.trips, run))
  spent.sort(key=lambda pair: -pair[0])
  largest = [
      {
          "ms": round(to_ms(cycles), 3), "trips": run.trips,
          "name": run.instruction.name, "op_name": run.instruction.op_name,
          "result": run.instruction.result.split("{")[0],
      } for cycles, run in spent[:top]
  ]
  found, unknown = kernels.find(module)
  traffic, sent = _traffic(module)
  return Cost(
      non_kernel_ms=to_ms(sum(cycles for cycles, _ in spent)),
      kernel_ms=kernels.milliseconds(found, chip),
      collective_ms=chip.link_bandwidth and 1e3 * sent / chip.link_bandwidth,
      collective_bytes=traffic,
      largest_ops=largest,
      kernels=[
          {"name": k.name, "trips": k.trips, "ms": round(1e3 * k.seconds(chip), 3)}
          for k in found
      ],
      unknown_kernels=unknown,
      unknown_ops=_without_estimate(module),
      unknown_loops=list(module.unknown_loops),
  )


def gib(count: float) -> float:
  """Returns bytes as GiB, rounded to what is worth comparing."""
  return round(count / GIB, 3)


def _without_estimate(module: Module) -> list[dict[str, Any]]:
  """Returns the operations that no estimate holds, what writes most first."""
  found = []
  for run in module.runs:
    one = run.instruction
    waits = one.opcode.endswith(("-start", "-done"))
    if one.cycles is not None or waits or one.opcode in _FREE:
      continue
    size = sum(array.bytes for array in arrays(one.result))
    if size >= _NOTICED:
      found.append({
          "mib": round(size * run.trips / 2**20, 1), "trips": run.trips,
          "name": one.name, "op_name": one.op_name, "result": one.result.split("{")[0],
      })
  return sorted(found, key=lambda one: -one["mib"])


def _traffic(module: Module) -> tuple[Mapping[str, float], float]:
  """Returns bytes a kind, and what a chip sends in all."""
  found = module.collectives()
  kinds: dict[str, float] = {}
  for one in found:
    kinds[one.kind] = kinds.get(one.kind, 0) + one.bytes * one.trips
  return {**kinds, "total": sum(kinds.values())}, sum(one.sent for one in found)


def _refused_bytes(message: str) -> tuple[int | None, int | None]:
  """Reads what a refusal says: "Used 49.09G of 30.75G hbm" in one form or another."""
  for pattern in (
      rf"Used {_SIZE} of {_SIZE} hbm",
      rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
  ):
    if found := re.search(pattern, message):
      needed, unit, available, other = found.groups()
      return (
          int(float(needed) * _UNITS[unit]), int(float(available) * _UNITS[other])
      )
  return None, None
