"""Matrix products of a traced function, counted before any compiler has seen it."""

from collections.abc import Callable
import math
from typing import Any

import jax

# Where a primitive keeps the function that it calls once.
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def model_flops(function: Callable[..., Any], *abstract: Any) -> float:
  """Returns the floating point operations of a function's matrix products.

  Given the gradient of a loss with attention written out and nothing
  rematerialised, it is what the model needs: what a kernel or a policy computes
  twice is no work done.

  Args:
    function: traceable by jax.
    *abstract: trees of arrays or of ShapeDtypeStruct.

  Returns:
    Two for each multiplication and addition of every dot_general and convolution,
    bodies of loops as often as they run (once where only the data tell).
  """
  return _count(jax.make_jaxpr(function)(*abstract).jaxpr)


def _count(jaxpr: Any) -> float:
  return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    return _dot(equation)
  if name == "conv_general_dilated":
    return _convolution(equation)
  if name == "cond":
    return max(_count(branch.jaxpr) for branch in params["branches"])
  if name == "while":
    return _count(params["body_jaxpr"].jaxpr)
  times = params["length"] if name == "scan" else 1
  if name == "shard_map":  # Its body has one device's shapes.
    times = math.prod(
        params["mesh"].shape[axis] for axis in params.get("manual_axes", ())
    )
  for key in _BODIES:
    if key in params:
      inner = params[key]
      return times * _count(getattr(inner, "jaxpr", inner))
  return 0.0


def _dot(equation: Any) -> float:
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  out = equation.outvars[0].aval.shape
  return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
  numbers = equation.params["dimension_numbers"]
  kernel = equation.invars[1].aval.shape
  inputs = kernel[numbers.rhs_spec[1]]
  window = math.prod(kernel[axis] for axis in numbers.rhs_spec[2:])
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * inputs * window
