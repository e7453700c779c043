"""Reads the text of a compiled program: what runs, how often, at what estimated cost.

`Compiled.cost_analysis()` counts the body of a loop once and knows nothing of custom
kernels; the text holds each operation's own estimate and the loops' bounds.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
    "c128": 16,
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\([^=]*)?.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$", re.DOTALL)
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_COPIES = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start")


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape: HLO's name of its type, and its axes."""

  dtype: str
  shape: tuple[int, ...]

  @property
  def bytes(self) -> float:
    """Bytes without the padding of a device's layout."""
    return _BYTES.get(self.dtype, 1) * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: without "%".
    opcode: "fusion", "while", "custom-call", ...
    result: text of its type.
    operands: names.
    inside: text between the opcode's parentheses.
    attributes: text behind them.
  """

  name: str
  opcode: str
  result: str
  operands: tuple[str, ...]
  inside: str
  attributes: str

  @property
  def cycles(self) -> int | None:
    """The compiler's estimate for one execution; None where it gives none."""
    found = _CYCLES.search(self.attributes)
    return int(found.group(1)) if found else None

  @property
  def op_name(self) -> str:
    """The path of the operation in the traced program; "" where none is kept."""
    found = _OP_NAME.search(self.attributes)
    return found.group(1) if found else ""

  @property
  def target(self) -> str:
    """What a custom-call calls; "" for all else, whatever its attributes mention."""
    found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return found.group(1) if found and self.opcode == "custom-call" else ""

  def attribute(self, key: str) -> str | None:
    """Returns the computation or number of `key=`; None where it is absent."""
    found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
    return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Run:
  """An instruction and how often a step executes it.

  Attributes:
    instruction: what runs.
    trips: product of the trip counts of the loops around it.
    where: name of its computation.
  """

  instruction: Instruction
  trips: int
  where: str


@dataclasses.dataclass(frozen=True)
class Collective:
  """Bytes that chips exchange.

  Attributes:
    kind: of COLLECTIVES.
    bytes: what one chip hands in at one execution; of an all-gather, what it gets.
    group: chips that take part in one.
    trips: executions a step.
    op_name: path of the operation in the traced program.
  """

  kind: str
  bytes: float
  group: int
  trips: int
  op_name: str

  @property
  def sent(self) -> float:
    """Bytes that one chip sends a step, by the best known way around a ring."""
    share = (self.group - 1) / self.group
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
    return self.bytes * factor * self.trips


class Module:
  """A compiled program as text, read.

  Attributes:
    computations: name -> its instructions in order.
    entry: name of the computation that runs.
    partitions: devices that the program is split over.
    unknown_loops: names of loops whose trip count is not in the text; they count
      once.
  """

  def __init__(self, text: str):
    self.computations, self.entry = _parse(text)
    found = re.search(r"\bnum_partitions=(\d+)", text)
    self.partitions = int(found.group(1)) if found else 1
    self.unknown_loops: list[str] = []
    self._tables = {
        name: {i.name: i for i in instructions}
        for name, instructions in self.computations.items()
    }

  @functools.cached_property
  def runs(self) -> tuple[Run, ...]:
    """Every instruction of computations that run by themselves, loops resolved."""
    return tuple(self._walk(self.entry, 1))

  def arrays(self) -> Iterator[Array]:
    """Yields the arrays that instructions outside of fusions hold."""
    for run in self.runs:
      yield from arrays(run.instruction.result)

  def operand_arrays(self, run: Run) -> list[Array]:
    """Returns the arrays that an instruction reads."""
    stated = re.search(r"operand_layout_constraints=\{(.*)", run.instruction.attributes)
    if stated:
      return arrays(_balanced("{" + stated.group(1))[0])
    table = self._tables[run.where]
    return [
        array for name in run.instruction.operands if name in table
        for array in arrays(table[name].result)
    ]

  def collectives(self) -> list[Collective]:
    """Returns what chips exchange; the second half of an asynchronous pair is none."""
    found = []
    for run in self.runs:
      found += self._collectives_of(run)
    return found

  def _collectives_of(self, run: Run) -> Iterator[Collective]:
    instruction = run.instruction
    kind = instruction.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
      held = self.operand_arrays(run)
      if kind == "all-gather":  # A start returns (operands, results).
        held = arrays(instruction.result)
        if instruction.opcode.endswith("-start"):
          held = held[len(held) // 2 :]
      yield Collective(
          kind, sum(array.bytes for array in held),
          _group(instruction.attributes) or self.partitions, run.trips,
          instruction.op_name,
      )
    elif instruction.opcode in ("fusion", "async-start"):
      # Only the first half of a pair of fusions is told from its second by name.
      called = instruction.attribute("calls")
      if called and "-done" not in instruction.name:
        for inner in self.computations.get(called, ()):
          yield from self._collectives_of(Run(inner, run.trips, called))

  def _walk(self, name: str, trips: int) -> Iterator[Run]:
    for instruction in self.computations[name]:
      yield Run(instruction, trips, name)
      if instruction.opcode == "while":
        body = instruction.attribute("body")
        yield from self._walk(body, trips * self._trips(instruction, name))
      elif instruction.opcode == "call":
        yield from self._walk(instruction.attribute("to_apply"), trips)
      elif instruction.opcode == "conditional":
        for branch in _branches(instruction.attributes):
          yield from self._walk(branch, trips)

  def _trips(self, loop: Instruction, where: str) -> int:
    """Returns how often a loop runs: annotated, or from its counter's three numbers."""
    if found := _TRIPS.search(loop.attributes):
      return int(found.group(1))
    body = loop.attribute("body")
    compared = self._condition(loop.attribute("condition"))
    if compared is None:
      self.unknown_loops.append(loop.name)
      return 1
    index, limit, direction = compared
    start = self._initial(loop, where, index) or 0
    step = self._step(loop, where, body, index) or 1
    count = math.ceil((limit - start) / step)
    if direction == "LE":
      count = (limit - start) // step + 1
    return max(count, 0)

  def _condition(self, name: str) -> tuple[int, int, str] | None:
    """Returns (place of the counter, limit, direction) of `counter < limit`."""
    table = self._tables[name]
    root = self.computations[name][-1]
    direction = re.search(r"direction=(\w+)", root.attributes)
    if root.opcode == "fusion":  # A fused comparison: its operands are the same two.
      inner = self.computations[root.attribute("calls")][-1]
      direction = re.search(r"direction=(\w+)", inner.attributes)
    if not direction or direction.group(1) not in ("LT", "LE"):
      return None
    limits = [c for o in root.operands if (c := _constant(table, o)) is not None]
    places = [p for o in root.operands if (p := _place(table, o)) is not None]
    if len(limits) != 1 or len(places) != 1:
      return None
    return places[0], limits[0], direction.group(1)

  def _initial(self, loop: Instruction, where: str, index: int) -> int | None:
    """Returns the number that a loop starts with at a place of its state."""
    table = self._tables[where]
    state = table.get(loop.operands[0]) if loop.operands else None
    if state is None or state.opcode != "tuple" or index >= len(state.operands):
      return None
    return _constant(table, state.operands[index])

  def _step(self, loop, where: str, body: str, index: int) -> int | None:
    """Returns what an iteration adds to the counter; XLA unrolls some loops by 2."""
    table, root = self._tables[body], self.computations[body][-1]
    if root.opcode != "tuple" or index >= len(root.operands):
      return None
    added = table.get(root.operands[index])
    while added is not None and added.opcode in _COPIES:
      added = table.get(added.operands[0])
    if added is None or added.opcode != "add":
      return None
    for operand in added.operands:
      if (value := _constant(table, operand)) is not None:
        return value
      place = _place(table, operand)
      if place not in (None, index):
        return self._initial(loop, where, place)
    return None


def arrays(text: str) -> list[Array]:
  """Returns the arrays of a type such as `(f32[8,128]{1,0:T(8,128)}, bf16[4])`."""
  return [
      Array(dtype, tuple(int(n) for n in axes.split(",") if n))
      for dtype, axes in _ARRAY.findall(text)
  ]


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  computations: dict[str, list[Instruction]] = {}
  entry, current, pending = "", None, ""

  def flush() -> None:
    if pending and (found := _INSTRUCTION.match(pending)):
      computations[current].append(_instruction(found.group(2), found.group(3)))

  for line in text.splitlines():
    if line.startswith("}") and not line.startswith("}}"):
      flush()
      current, pending = None, ""
    elif current is None:
      if line.endswith("{") and not line.startswith("HloModule"):
        found = _COMPUTATION.match(line)
        if found:
          current = found.group(2)
          computations[current] = []
          entry = current if found.group(1) else entry
    elif _INSTRUCTION.match(line):
      flush()
      pending = line
    else:  # Metadata of kernels holds line breaks.
      pending += "\n" + line
  if not entry:
    raise ValueError("not the text of a compiled program: it has no ENTRY")
  return computations, entry


def _instruction(name: str, text: str) -> Instruction:
  text = re.sub(r"/\*index=\d+\*/", "", text)
  if text.startswith("("):
    result, rest = _balanced(text)
  else:
    result, _, rest = text.partition(" ")
  opcode, _, rest = rest.strip().partition("(")
  inside, attributes = _balanced("(" + rest)
  return Instruction(
      name, opcode.strip(), result, tuple(_OPERAND.findall(inside)), inside[1:-1],
      attributes,
  )


def _balanced(text: str) -> tuple[str, str]:
  """Splits behind the bracket that closes the first one."""
  opening = text[0]
  closing = {"(": ")", "{": "}"}[opening]
  depth = 0
  for found in re.finditer(f"[{re.escape(opening + closing)}]", text):
    depth += 1 if found.group() == opening else -1
    if depth == 0:
      return text[: found.end()], text[found.end() :]
  return text, ""


def _source(table: dict[str, Instruction], name: str) -> Instruction | None:
  """Returns the instruction that a name is, perhaps by copies of it, the value of."""
  found = table.get(name)
  while found is not None and found.opcode in _COPIES and found.operands:
    found = table.get(found.operands[0])
  return found


def _constant(table: dict[str, Instruction], name: str) -> int | None:
  found = _source(table, name)
  if found is None or found.opcode != "constant":
    return None
  return int(found.inside) if re.fullmatch(r"-?\d+", found.inside) else None


def _place(table: dict[str, Instruction], name: str) -> int | None:
  """Returns which part of the loop's state a name stands for."""
  found = _source(table, name)
  if found is None or found.opcode != "get-tuple-element":
    return None
  return int(found.attribute("index"))


def _branches(attributes: str) -> list[str]:
  found = re.search(r"branch_computations=\{([^}]*)\}", attributes)
  if found:
    return _OPERAND.findall(found.group(1))
  return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", attributes)


def _group(attributes: str) -> int | None:
  """Returns how many chips take part in one collective."""
  if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return len(found.group(1).split(","))
  if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
    return int(found.group(2))
  if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found.group(2)))
  return None
