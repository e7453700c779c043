"""The time of Pallas attention kernels, of which a compiler's estimate knows nothing.

A kernel's matrix products are counted as full blocks at the matrix unit's peak: a
bound from below, since softmax, masks and memory take time of their own.
"""

from collections.abc import Iterable
import dataclasses
import math
import re

from vjepa_jax.compiler import hlo
from vjepa_jax.compiler.chips import Chip
from vjepa_jax.compiler.hlo import Module, Run

# Words of a kernel's name -> products of [queries, keys] that it forms. Forward: q k^T
# and p v. Backward in one kernel: q k^T, do v^T, dv, dk, dq; in two, dk and dv take 4
# of these and dq 3, since each forms the scores again.
_PRODUCTS_OF_DKV, _PRODUCTS_OF_ALL = 4, 5
_PRODUCTS = (
    ("dkv", _PRODUCTS_OF_DKV), ("dq", 3), ("bwd", _PRODUCTS_OF_ALL),
    ("backward", _PRODUCTS_OF_ALL), ("fwd", 2), ("attention", 2),
)
_FLOATS = ("bf16", "f16", "f32")
_BLOCK = re.compile(r'\\?"block_(q|kv)(?:_dkv|_dq)?\\?": (\d+)')


@dataclasses.dataclass(frozen=True)
class Kernel:
  """An attention kernel of a compiled program.

  Attributes:
    name: as compiled.
    products: matrix products over [queries, keys] that it forms.
    rows: batch x heads.
    queries: padded to whole blocks.
    keys: padded to whole blocks.
    width: of a head.
    trips: executions a step.
  """

  name: str
  products: int
  rows: int
  queries: int
  keys: int
  width: int
  trips: int

  def seconds(self, chip: Chip) -> float:
    """Returns the time of a step's executions; narrow heads fill the unit in part."""
    unit = chip.mxu_width or 1
    width = math.ceil(self.width / unit) * unit
    flops = 2.0 * self.products * self.rows * self.queries * self.keys * width
    return flops * self.trips / chip.bf16_flops


def find(module: Module) -> tuple[list[Kernel], list[str]]:
  """Returns the attention kernels of a program, and names of kernels not understood.

  What is not understood takes time that no number here holds.
  """
  known, unknown = [], []
  for run in module.runs:
    if run.instruction.target == "tpu_custom_call":
      kernel = _kernel(module, run)
      if kernel is None:
        unknown.append(run.instruction.name)
      else:
        known.append(kernel)
  return known, unknown


def milliseconds(kernels: Iterable[Kernel], chip: Chip) -> float:
  """Returns the time of all kernels of a step."""
  return 1e3 * sum(kernel.seconds(chip) for kernel in kernels)


def _kernel(module: Module, run: Run) -> Kernel | None:
  instruction = run.instruction
  text = f"{instruction.name} {instruction.op_name}".lower()
  own = instruction.name.lower()
  products = next((n for word, n in _PRODUCTS if word in own), None)
  if products is None and ("attention" in text or "splash" in text):
    products = next((n for word, n in _PRODUCTS if word in text), None)
  heads = [
      array for array in module.operand_arrays(run)
      if array.dtype in _FLOATS and len(array.shape) >= 3
  ]
  # q [..., N, d], k and v [..., M, d] come first in every kernel of this kind.
  if products is None or len(heads) < 3 or heads[1].shape != heads[2].shape:
    return None
  q, k = _minor(instruction.attributes, "q", heads[0].shape), _minor(
      instruction.attributes, "k", heads[1].shape
  )
  if q[-1] != k[-1]:
    return None
  # A third result beside dk and dv is dq, block by block: one kernel does it all.
  results = [
      array for array in hlo.arrays(instruction.result)
      if array.dtype == heads[0].dtype and array.shape[-2:] in (q[-2:], k[-2:])
  ]
  if products == _PRODUCTS_OF_DKV and len(results) > 2:
    products = _PRODUCTS_OF_ALL
  blocks = {"q": 1, "kv": 1}
  for axis, size in _BLOCK.findall(instruction.attributes):
    blocks[axis] = max(blocks[axis], int(size))
  whole = lambda n, block: math.ceil(n / min(block, n)) * min(block, n)
  return Kernel(
      instruction.name, products, math.prod(q[:-2]), whole(q[-2], blocks["q"]),
      whole(k[-2], blocks["kv"]), q[-1], run.trips,
  )


def _minor(attributes: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns a shape as [..., N, d]; splash can keep the sequence minor (layout 2)."""
  if re.search(rf'{name}_layout\\?": 2', attributes):
    return (*shape[:-2], shape[-1], shape[-2])
  return shape
