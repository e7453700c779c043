"""One strict engine that carries weights between their names and ours.

A model family is a table of `Rule`s. Nothing is loaded by halves: whatever has no
counterpart, on either side, is reported at once and is fatal by default. Torch's
.pt files are read without torch, and without running anything that is in them.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
import pickle
import re
from typing import Any, NamedTuple
import zipfile

from flax import traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

Arrays = dict[str, np.ndarray]
Shapes = tuple[tuple[int, ...], ...]


class Layout(NamedTuple):
  """How one of their arrays and one or more of ours hold the same numbers.

  Attributes:
    load: (their array, our shapes) -> our arrays.
    save: (our arrays) -> their array.
  """

  load: Callable[[np.ndarray, Shapes], tuple[np.ndarray, ...]]
  save: Callable[[tuple[np.ndarray, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rule:
  """One row of a name table.

  Attributes:
    theirs: their name; "{i}" stands for a number, the index along the leading axis
      of ours ("blocks.{i}.norm1.weight").
    ours: paths of ours that it fills together ("stack/blocks/norm1/scale").
    layout: how the numbers are laid out.
  """

  theirs: str
  ours: tuple[str, ...]
  layout: Layout

  @property
  def stacked(self) -> bool:
    """Whether ours holds all numbered ones of theirs along a leading axis."""
    return "{i}" in self.theirs


@dataclasses.dataclass
class Report:
  """What became of every name.

  Attributes:
    matched: their names that were loaded.
    ignored: their names that the caller declared to be of no use.
    missing: our paths that nothing of theirs fills.
    unexpected: their names that no rule, or no place of ours, takes.
    misshapen: what does not fit, said in words.
  """

  matched: list[str] = dataclasses.field(default_factory=list)
  ignored: list[str] = dataclasses.field(default_factory=list)
  missing: list[str] = dataclasses.field(default_factory=list)
  unexpected: list[str] = dataclasses.field(default_factory=list)
  misshapen: list[str] = dataclasses.field(default_factory=list)

  @property
  def complete(self) -> bool:
    """Whether every name of theirs and of ours has found its counterpart."""
    return not (self.missing or self.unexpected or self.misshapen)

  def __str__(self) -> str:
    """All faults, one a line, after a line of counts."""
    lines = [f"{len(self.matched)} matched, {len(self.ignored)} ignored"]
    for kind in ("missing", "unexpected", "misshapen"):
      lines += [f"  {kind}: {name}" for name in getattr(self, kind)]
    return "\n".join(lines)


def load(
    table: Sequence[Rule],
    theirs: Mapping[str, np.ndarray],
    like: Any,
    *,
    ignore: Sequence[str] = (),
    strict: bool = True,
) -> tuple[Any, Report]:
  """Fills a tree like ours with their arrays.

  Args:
    table: the rules; a name must fit one of them.
    theirs: name -> array.
    like: our parameters, arrays or anything with a shape and dtype.
    ignore: regexes of names of theirs to leave out, matched in full.
    strict: whether an incomplete report is fatal; otherwise the missing leaves
      keep the value they have in `like`.

  Returns:
    (tree like `like` of numpy arrays, report).

  Raises:
    ValueError: with the whole report, if it is incomplete and strict.
  """
  places = traverse_util.flatten_dict(like, sep="/")
  report, filled = Report(), {}
  names = []
  for name in theirs:
    ignored = any(re.fullmatch(pattern, name) for pattern in ignore)
    (report.ignored if ignored else names).append(name)
  for rule in table:
    matches = _matches(rule, names)
    names = [name for name in names if name not in matches]
    if matches:
      _load_rule(rule, matches, theirs, places, filled, report)
  report.unexpected += names
  report.missing += sorted(set(places) - set(filled))
  if strict and not report.complete:
    raise ValueError(f"the weights do not fit the model: {report}")
  values = {
      path: value if filled.get(path) is None else filled[path]
      for path, value in places.items()
  }
  return traverse_util.unflatten_dict(values, sep="/"), report


def save(table: Sequence[Rule], params: Any) -> Arrays:
  """Writes our parameters under their names; the inverse of `load`.

  Raises:
    ValueError: listing every path of ours that no rule takes, or a rule of several
      paths that finds only some of them.
  """
  places = traverse_util.flatten_dict(params, sep="/")
  left, saved = set(places), {}
  for rule in table:
    found = [path for path in rule.ours if path in places]
    if not found:
      continue
    if len(found) < len(rule.ours):
      raise ValueError(
          f"{rule.theirs} is made of {rule.ours}, the model has only {found}"
      )
    left -= set(found)
    arrays = tuple(np.asarray(places[path]) for path in rule.ours)
    if not rule.stacked:
      saved[rule.theirs] = rule.layout.save(arrays)
      continue
    for i in range(len(arrays[0])):
      name = rule.theirs.replace("{i}", str(i))
      saved[name] = rule.layout.save(tuple(a[i] for a in arrays))
  if left:
    raise ValueError(f"no rule of the table takes {', '.join(sorted(left))}")
  return saved


def _matches(rule: Rule, names: Sequence[str]) -> dict[str, int]:
  """Returns their names that fit the rule, with the number that stands for {i}."""
  pattern = re.escape(rule.theirs).replace(re.escape("{i}"), r"(\d+)")
  found = {name: re.fullmatch(pattern, name) for name in names}
  return {name: int(m[1]) if rule.stacked else 0 for name, m in found.items() if m}


def _load_rule(rule, matches, theirs, places, filled, report):
  """Fills the paths of one rule; None marks a path whose fault is reported."""
  if any(path not in places for path in rule.ours):
    report.unexpected += list(matches)
    return
  shapes = tuple(tuple(places[path].shape) for path in rule.ours)
  count = shapes[0][0] if rule.stacked else 1
  if rule.stacked:
    shapes = tuple(shape[1:] for shape in shapes)
  report.unexpected += [name for name, i in matches.items() if i >= count]
  report.missing += [
      f"{rule.ours[0]} (from {rule.theirs.replace('{i}', str(i))})"
      for i in range(count) if i not in matches.values()
  ]
  slices = {}
  for name, i in matches.items():
    if i < count:
      slices[i] = _load_one(rule, name, theirs[name], shapes, report)
  whole = len(slices) == count and None not in slices.values()
  for number, path in enumerate(rule.ours):
    filled[path] = None
    if whole:
      parts = [slices[i][number] for i in range(count)]
      value = np.stack(parts) if rule.stacked else parts[0]
      filled[path] = value.astype(places[path].dtype)


def _load_one(rule, name, array, shapes, report):
  """Returns our arrays for one of theirs, or None after reporting a misfit."""
  array = np.asarray(array)
  try:
    arrays = rule.layout.load(array, shapes)
  except ValueError:
    arrays = ()
  if tuple(a.shape for a in arrays) == shapes:
    report.matched.append(name)
    return arrays
  wanted = ", ".join(f"{p} {s}" for p, s in zip(rule.ours, shapes, strict=True))
  report.misshapen.append(f"{name} {array.shape} does not fit {wanted}")
  return None


# Layouts. `load` raises a ValueError where the array cannot be meant.


def _expect(array: np.ndarray, *shape: int) -> np.ndarray:
  if array.shape != shape:
    raise ValueError(f"shape {array.shape}, expected {shape}")
  return array


def _load_out(array, shapes):
  heads, size, width = shapes[0]
  return (_expect(array, width, heads * size).T.reshape(shapes[0]),)


def _load_joined_linear(array, shapes):
  width, heads, size = shapes[0]
  parts = _expect(array, len(shapes) * heads * size, width)
  return tuple(part.T.reshape(shapes[0]) for part in np.split(parts, len(shapes)))


def _load_joined_bias(array, shapes):
  heads, size = shapes[0]
  parts = _expect(array, len(shapes) * heads * size)
  return tuple(part.reshape(shapes[0]) for part in np.split(parts, len(shapes)))


SAME = Layout(load=lambda array, shapes: (array,), save=lambda ours: ours[0])
# weight [out, in] <-> kernel [in, out]
LINEAR = Layout(load=lambda array, shapes: (array.T,), save=lambda ours: ours[0].T)
# weight [D, D] over joined heads <-> kernel [H, d, D]
OUT_LINEAR = Layout(
    load=_load_out, save=lambda ours: ours[0].reshape(-1, ours[0].shape[-1]).T
)
# weight [n * H * d, D], rows (n, H, d) <-> n kernels [D, H, d]
JOINED_LINEAR = Layout(
    load=_load_joined_linear,
    save=lambda ours: np.concatenate([k.reshape(k.shape[0], -1).T for k in ours]),
)
# bias [n * H * d] <-> n biases [H, d]
JOINED_BIAS = Layout(
    load=_load_joined_bias,
    save=lambda ours: np.concatenate([b.reshape(-1) for b in ours]),
)


def leading_ones(count: int) -> Layout:
  """An array of ours that they keep with `count` axes of 1 in front."""
  ones = (1,) * count
  return Layout(
      load=lambda array, shapes: (_expect(array, *ones, *shapes[0])[(0,) * count],),
      save=lambda ours: ours[0].reshape(*ones, *ours[0].shape),
  )


def patch_conv(kernel: tuple[int, ...]) -> Layout:
  """Convolution weight [out, in, *kernel] <-> Dense kernel [prod(kernel) * in, out].

  Our patch vector is (pt, pz, py, px, c). Their kernel has the axes of it that they
  know, in the same order; a published video's time may be our T or our Z.
  """

  def to_ours(array, shapes):
    size, width = shapes[0]
    _expect(array, width, size // int(np.prod(kernel)), *kernel)
    moved = np.moveaxis(array, (0, 1), (-1, -2))  # [*kernel, in, out]
    return (moved.reshape(shapes[0]),)

  def to_theirs(ours):
    moved = ours[0].reshape(*kernel, -1, ours[0].shape[-1])
    return np.moveaxis(moved, (-1, -2), (0, 1))

  return Layout(load=to_ours, save=to_theirs)


# Rules of the layers that every family has.


def linear(theirs: str, ours: str) -> tuple[Rule, Rule]:
  """Rules of a Linear with a bias."""
  return (
      Rule(f"{theirs}.weight", (f"{ours}/kernel",), LINEAR),
      Rule(f"{theirs}.bias", (f"{ours}/bias",), SAME),
  )


def norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
  """Rules of a LayerNorm."""
  return (
      Rule(f"{theirs}.weight", (f"{ours}/scale",), SAME),
      Rule(f"{theirs}.bias", (f"{ours}/bias",), SAME),
  )


def attention(qkv: str, out: str, ours: str) -> tuple[Rule, ...]:
  """Rules of a `MultiHeadAttention`, theirs with one joined Linear `qkv`."""
  heads = [f"{ours}/{name}" for name in ("query", "key", "value")]
  return (
      Rule(f"{qkv}.weight", tuple(f"{name}/kernel" for name in heads), JOINED_LINEAR),
      Rule(f"{qkv}.bias", tuple(f"{name}/bias" for name in heads), JOINED_BIAS),
      Rule(f"{out}.weight", (f"{ours}/out/kernel",), OUT_LINEAR),
      Rule(f"{out}.bias", (f"{ours}/out/bias",), SAME),
  )


# Files of weights


def read_safetensors(path: str | pathlib.Path) -> Arrays:
  """Reads a .safetensors file, or the model.safetensors of a folder.

  Raises:
    ValueError: if it is cut short or none.
  """
  path = pathlib.Path(path)
  path = path / "model.safetensors" if path.is_dir() else path
  try:
    return safetensors.numpy.load_file(path)
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path}: {error}; fetch it again") from error


_DTYPES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16, "LongStorage": np.int64,
    "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
    "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}

# What reading a damaged or hostile pickle may raise.
_BROKEN = (
    pickle.UnpicklingError, zipfile.BadZipFile, EOFError, AttributeError, IndexError,
    KeyError, TypeError, ValueError,
)


def read_torch(path: str | pathlib.Path) -> Any:
  """Reads what `torch.save` wrote, tensors as numpy arrays.

  Only dicts, lists, numbers, strings and tensors are built; a file that asks for
  any other Python object is refused before that object is made.

  Raises:
    ValueError: if it is not torch's zip format (torch >= 1.6), was written on a
      big-endian machine, is cut short, or holds anything else than the above.
  """
  path = pathlib.Path(path)
  if not zipfile.is_zipfile(path):
    raise ValueError(
        f"{path} is not a zip file as torch >= 1.6 writes it, or it is cut short; "
        "load and save it again with a newer torch"
    )
  with zipfile.ZipFile(path) as file:
    inside = [name for name in file.namelist() if name.endswith("data.pkl")]
    if len(inside) != 1:
      raise ValueError(f"{path}: expected one data.pkl inside, found {inside}")
    root = inside[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in file.namelist() and file.read(order) != b"little":
      raise ValueError(f"{path}: byte order {file.read(order)!r}, only little is read")
    with file.open(inside[0]) as stream:
      try:
        return _TensorUnpickler(stream, file, root).load()
      except _BROKEN as error:
        raise ValueError(f"{path}: {error}") from error


class _Storage(NamedTuple):
  values: np.ndarray


class _TensorUnpickler(pickle.Unpickler):
  """Builds plain containers and tensors and refuses the rest."""

  def __init__(self, stream, file: zipfile.ZipFile, root: str):
    super().__init__(stream)
    self._file, self._root, self._storages = file, root, {}

  def find_class(self, module: str, name: str):
    if module == "collections" and name == "OrderedDict":
      return collections.OrderedDict
    if module == "torch._utils" and name == "_rebuild_tensor_v2":
      return _rebuild_tensor
    if module == "torch._utils" and name == "_rebuild_parameter":
      return lambda data, *_: data
    if module == "torch" and name == "Size":
      return tuple
    if module == "torch" and name in _DTYPES:
      return np.dtype(_DTYPES[name])
    raise pickle.UnpicklingError(
        f"it holds a {module}.{name}, which is not a tensor; save a plain state_dict"
    )

  def persistent_load(self, saved_id):
    kind, dtype, key = saved_id[:3]
    if kind != "storage" or not isinstance(dtype, np.dtype):
      raise pickle.UnpicklingError(f"it refers to {saved_id!r}, not to a storage")
    if key not in self._storages:
      raw = self._file.read(f"{self._root}data/{key}")
      self._storages[key] = _Storage(np.frombuffer(raw, dtype))
    return self._storages[key]


def _rebuild_tensor(storage, offset, shape, stride, *_):
  """A copy of the strided view, after checking that it lies within the storage."""
  values = storage.values
  last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
  empty = 0 in shape
  if offset < 0 or min(stride, default=0) < 0 or (not empty and last >= values.size):
    raise pickle.UnpicklingError(
        f"a tensor {tuple(shape)} with strides {tuple(stride)} reaches beyond its "
        f"storage of {values.size}"
    )
  if empty:
    return np.zeros(shape, values.dtype)
  strides = tuple(s * values.itemsize for s in stride)
  return np.lib.stride_tricks.as_strided(values[offset:], shape, strides).copy()
