"""Matrix products counted by hand and by the library."""

import jax
import jax.numpy as jnp
import pytest

from vjepa_jax.compiler import flops


def of(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product_is_two_operations_for_each_pair():
  assert flops.model_flops(lambda a, b: a @ b, of(3, 5), of(5, 7)) == 2 * 3 * 5 * 7
  batched = lambda a, b: jnp.einsum("bhnd,bhmd->bhnm", a, b)
  assert flops.model_flops(batched, of(2, 3, 8, 4), of(2, 3, 9, 4)) == (
      2 * (2 * 3) * 8 * 9 * 4
  )


def test_the_gradient_costs_twice_the_product():
  loss = lambda w, x: jnp.sum(jnp.tanh(x @ w))
  one = 2 * 6 * 4 * 5
  assert flops.model_flops(jax.grad(loss), of(4, 5), of(6, 4)) == 2 * one
  assert flops.model_flops(jax.grad(loss, (0, 1)), of(4, 5), of(6, 4)) == 3 * one


@pytest.mark.parametrize("wrap", [
    jax.jit, jax.checkpoint, lambda f: jax.jit(jax.jit(f)),
    lambda f: lambda x: jax.lax.cond(x.sum() > 0, f, lambda y: y, x),
])
def test_functions_within_functions_are_counted(wrap):
  assert flops.model_flops(wrap(lambda x: x @ x), of(4, 4)) == 2 * 4**3


def test_a_loop_counts_as_often_as_it_runs():
  scan = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=9)[0]
  assert flops.model_flops(scan, of(4, 4)) == 9 * 2 * 4**3


def test_a_function_with_its_own_gradient_is_counted():
  @jax.custom_vjp
  def double(x):
    return x @ x

  double.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
  assert flops.model_flops(double, of(4, 4)) == 2 * 4**3
  gradient = jax.grad(lambda x: double(x).sum())
  assert flops.model_flops(gradient, of(4, 4)) == 3 * 2 * 4**3


def test_a_convolution_counts_its_window():
  patches = lambda x, w: jax.lax.conv_general_dilated(
      x, w, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  assert flops.model_flops(patches, of(1, 8, 8, 3), of(2, 2, 3, 5)) == (
      2 * (4 * 4) * 5 * (2 * 2 * 3)
  )
