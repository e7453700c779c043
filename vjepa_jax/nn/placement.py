"""Where activations and weights lie on the ambient mesh; without one, nothing happens.

A mesh is ambient where `jax.sharding.use_abstract_mesh` set it for the trace. Its
axes "data" and "fsdp" split rows, "sequence" splits tokens. Left to itself, the
compiler may split the activations by the parameters' axis and send them around,
which for these widths is far more than the weights.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import AxisType, PartitionSpec

BATCH_AXES = ("data", "fsdp")
SEQUENCE_AXIS = "sequence"
_AXES = {"batch": BATCH_AXES, "tokens": (SEQUENCE_AXIS,), None: ()}
# Smaller arrays are not worth being split.
MIN_SIZE = 2**16


def split_axis(
    shape: Sequence[int], parts: int, min_size: int = MIN_SIZE
) -> int | None:
  """Returns the axis along which a weight is split in equal parts; None: in none.

  Args:
    shape: of the weight, or of its gradient.
    parts: devices along "fsdp".
    min_size: arrays with fewer elements stay whole.

  Returns:
    The largest axis that `parts` divides, the last among equals.
  """
  fitting = [(size, axis) for axis, size in enumerate(shape) if size % parts == 0]
  if parts == 1 or not fitting or math.prod(shape) < min_size:
    return None
  return max(fitting)[1]


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Says along which of its axes an array is split; returns it as it is.

  Args:
    x: any array.
    names: for each axis "batch", "tokens" or None (whole everywhere); an axis that
      the mesh does not divide is left to the compiler.
  """
  mesh = _ambient()
  if mesh is None:
    return x
  spec = []
  for size, name in zip(x.shape, names, strict=True):
    axes = tuple(a for a in _AXES[name] if mesh.shape.get(a, 1) > 1)
    divides = size % math.prod(mesh.shape[a] for a in axes) == 0
    spec.append(axes or None if divides else PartitionSpec.UNCONSTRAINED)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def per_device(
    fn: Callable[[jax.Array], jax.Array], x: jax.Array, *names: str | None
) -> jax.Array:
  """Runs what keeps a shape on each device's own part of an array.

  For what the compiler would not split by itself, and gather the array for.

  Args:
    fn: part -> part of the same shape.
    x: any array.
    names: as in `constrain`; where the mesh does not divide an axis, `fn` is left
      out and the array returned as it is.
  """
  mesh = _ambient()
  if mesh is None:
    return fn(x)
  spec = []
  for size, name in zip(x.shape, names, strict=True):
    axes = tuple(a for a in _AXES[name] if mesh.shape.get(a, 1) > 1)
    if size % math.prod(mesh.shape[a] for a in axes):
      return x
    spec.append(axes or None)
  spec = PartitionSpec(*spec)
  return jax.shard_map(fn, in_specs=(spec,), out_specs=spec, check_vma=False)(x)


def promote(*arrays: Any, dtype: Any = None, inexact: bool = True) -> Sequence[Any]:
  """Casts inputs and weights as flax does, then makes the weights whole everywhere.

  For `promote_dtype` of flax's layers. Weights split over "fsdp" are cast before
  they are gathered, where they are used: inside a scan over depth one layer at a
  time, and again where the layer is rematerialised. Their gradients are split again
  as soon as they are summed over the rows.

  Args:
    *arrays: inputs first, then weights; None stays None.
    dtype: as in `flax.linen.dtypes.promote_dtype`.
    inexact: as in `flax.linen.dtypes.promote_dtype`.
  """
  inputs, *weights = nn.dtypes.promote_dtype(*arrays, dtype=dtype, inexact=inexact)
  mesh = _ambient()
  if mesh is None or mesh.shape.get("fsdp", 1) == 1:
    return [inputs, *weights]
  return [inputs, *(w if w is None else _whole(w) for w in weights)]


def _ambient() -> jax.sharding.AbstractMesh | None:
  """The ambient mesh; None where there is nothing to split."""
  mesh = jax.sharding.get_abstract_mesh()
  # Within a shard_map arrays are a device's own already.
  if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
    return None
  return mesh


@jax.custom_vjp
def _whole(weight: jax.Array) -> jax.Array:
  return jax.lax.with_sharding_constraint(weight, PartitionSpec())


def _whole_forward(weight):
  return _whole(weight), None


def _whole_backward(_, gradient):
  # Whole first: a product that is summed and split at once becomes a loop of sends.
  gradient = jax.lax.with_sharding_constraint(gradient, PartitionSpec())
  fsdp = jax.sharding.get_abstract_mesh().shape["fsdp"]
  axis = split_axis(gradient.shape, fsdp)
  if axis is not None:
    spec = PartitionSpec(*[None] * axis, "fsdp")
    gradient = jax.lax.with_sharding_constraint(gradient, spec)
  return (gradient,)


_whole.defvjp(_whole_forward, _whole_backward)
