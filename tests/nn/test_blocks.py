"""The stack of blocks: one scan that equals its blocks one by one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from vjepa_jax.nn import attention, blocks, positions
from vjepa_jax.nn.patch_embed import PatchEmbed
from vjepa_jax.volumes.grid import Grid

GRID = Grid((1, 3, 5, 7), (1, 1, 1, 1))
WIDTH, DEPTH, HEADS = 24, 3, 2
X = jax.random.normal(jax.random.key(0), (2, GRID.tokens, WIDTH))
ROPE = positions.rope(GRID, None, WIDTH // HEADS)


def make(**options):
  return blocks.Stack(**(dict(width=WIDTH, depth=DEPTH, heads=HEADS) | options))


def spread(params, seed=7):
  """Parameters away from their start, so that biases and norms count."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  noise = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
  return jax.tree.unflatten(tree, noise)


@pytest.fixture(scope="module")
def params():
  return spread(jax.jit(make().init)(jax.random.key(1), X, rope=ROPE)["params"])


@pytest.mark.parametrize("swiglu", [False, True])
def test_scanned_blocks_equal_blocks_one_by_one(swiglu):
  stack = make(swiglu=swiglu)
  params = spread(jax.jit(stack.init)(jax.random.key(1), X, rope=ROPE)["params"])
  run = jax.jit(lambda p: stack.apply({"params": p}, X, rope=ROPE, capture=True))
  out, captured = run(params)
  block = blocks.Block(WIDTH, HEADS, swiglu=swiglu)
  run_one = jax.jit(lambda p, x: block.apply({"params": p}, x, rope=ROPE))
  x = X
  unstacked = [
      jax.tree.map(lambda a, i=i: a[i], params["blocks"]) for i in range(DEPTH)
  ]
  for own, after in zip(unstacked, captured, strict=True):
    x = run_one(own, x)
    np.testing.assert_allclose(after, x, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(captured[-1], out)


@pytest.mark.parametrize(
    "options",
    [
        dict(remat="full"), dict(remat="attention"), dict(unroll=3),
        dict(remat="attention", attention="chunked", attention_chunk=32),
    ],
    ids=str,
)
def test_remat_and_unroll_change_neither_value_nor_gradient(params, options):
  def run(**options):
    loss = lambda p: jnp.mean(make(**options).apply({"params": p}, X, rope=ROPE) ** 2)
    return jax.jit(jax.value_and_grad(loss))(params)

  for got, want in zip(
      jax.tree.leaves(run(**options)), jax.tree.leaves(run()), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def count(jaxpr, name):
  """How often a primitive stands in a jaxpr, inner ones included."""
  total = 0
  for equation in jaxpr.eqns:
    total += equation.primitive.name == name
    for inner in jax.core.jaxprs_in_params(equation.params):
      total += count(inner, name)
  return total


@pytest.mark.parametrize("impl", ["xla", "chunked"])
def test_saving_attention_computes_less_again_than_full_remat(params, impl):
  def work(remat):
    stack = make(remat=remat, attention=impl, attention_chunk=32)
    loss = lambda p: jnp.sum(stack.apply({"params": p}, X, rope=ROPE))
    program = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    return count(program, "dot_general"), count(program, "exp")

  none, attention_only, full = (work(kind) for kind in ("none", "attention", "full"))
  assert none[0] < attention_only[0] < full[0]
  # The log-sums are saved too, so that chunked attention never runs forward again;
  # one exponential is in the slope of GELU.
  if impl == "chunked":
    assert none[1] + 1 == attention_only[1] < full[1]


def test_auto_on_a_tpu_is_the_program_that_names_its_kernels(monkeypatch):
  x = jax.ShapeDtypeStruct((1, 128, 128), jnp.bfloat16)

  def program(impl):
    stack = blocks.Stack(width=128, depth=1, heads=1, attention=impl, dtype="bfloat16")
    params = jax.eval_shape(stack.init, jax.random.key(0), x)
    traced = jax.jit(stack.apply).trace(params, x)
    return traced.lower(lowering_platforms=("tpu",)).as_text()

  named = program("splash")
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert program("auto") == named


def test_drop_path_draws_in_training_only(params):
  stack = make(drop_path=0.5)

  @functools.partial(jax.jit, static_argnums=0)
  def run(train, seed):
    rngs = {"drop_path": jax.random.key(seed)}
    variables = {"params": params}
    return stack.apply(variables, X, rope=ROPE, train=train, rngs=rngs, capture=True)[1]

  np.testing.assert_array_equal(run(False, 0), run(False, 1))
  np.testing.assert_array_equal(run(True, 0), run(True, 0))
  # The first block never drops; later ones do.
  np.testing.assert_allclose(run(True, 0)[0], run(False, 0)[0], rtol=1e-5, atol=1e-5)
  assert not np.allclose(run(True, 0)[-1], run(False, 0)[-1])
  assert not np.allclose(run(True, 0)[-1], run(True, 1)[-1])


def test_drop_path_keeps_the_mean():
  block = blocks.Block(WIDTH, HEADS)
  ones = jnp.ones((4000, 1, WIDTH))
  drop = lambda module: module._drop(ones, 0.25)
  dropped = block.apply({}, method=drop, rngs={"drop_path": jax.random.key(0)})
  assert set(np.unique(dropped).round(4)) == {0.0, np.float32(1 / 0.75).round(4)}
  assert np.mean(dropped) == pytest.approx(1.0, abs=0.05)


def test_initial_weights_are_those_of_vjepa():
  stack = make(width=256, depth=4, heads=2)
  params = jax.jit(stack.init)(jax.random.key(0), jnp.ones((1, 3, 256)))["params"]
  block = params["blocks"]
  std = lambda kernel: np.asarray(kernel).reshape(4, -1).std(axis=1)
  for name in ("query", "key", "value"):
    np.testing.assert_allclose(std(block["attn"][name]["kernel"]), 0.02, rtol=0.02)
  np.testing.assert_allclose(std(block["mlp"]["fc1"]["kernel"]), 0.02, rtol=0.02)
  want = 0.02 / np.sqrt(2 * np.arange(1, 5))
  np.testing.assert_allclose(std(block["attn"]["out"]["kernel"]), want, rtol=0.02)
  np.testing.assert_allclose(std(block["mlp"]["fc2"]["kernel"]), want, rtol=0.02)
  assert not np.any(block["attn"]["out"]["bias"]) and not np.any(
      block["mlp"]["fc1"]["bias"]
  )


def test_xavier_counts_fans_over_joined_heads():
  stack = make(width=256, depth=2, heads=2, initializer="xavier")
  params = jax.jit(stack.init)(jax.random.key(0), jnp.ones((1, 3, 256)))["params"]
  square = math.sqrt(2 / (256 + 256))
  for name in ("query", "out"):
    kernel = np.asarray(params["blocks"]["attn"][name]["kernel"])
    np.testing.assert_allclose(kernel.std(), square, rtol=0.02)
  kernel = np.asarray(params["blocks"]["mlp"]["fc2"]["kernel"])
  np.testing.assert_allclose(kernel.std(), math.sqrt(2 / (256 * 5)), rtol=0.02)


def test_bfloat16_computes_with_float32_parameters():
  stack = make(dtype="bfloat16")
  params = jax.jit(stack.init)(jax.random.key(0), X, rope=ROPE)["params"]
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
  out = jax.jit(stack.apply)({"params": params}, X, rope=ROPE)
  assert out.dtype == jnp.bfloat16
  exact = jax.jit(make().apply)({"params": params}, X, rope=ROPE)
  np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.05)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(remat="attn"), "closest: attention"),
        (dict(initializer="vjeppa"), "closest: vjepa"),
        (dict(drop_path=1.0), r"\[0, 1\)"),
        (dict(attention="flash"), "attention='flash'"),
    ],
)
def test_unknown_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: make(**options).init(jax.random.key(0), X))


def test_heads_are_128_wide_where_they_can_be():
  widths = {128: 1, 384: 3, 768: 6, 1024: 8, 1280: 10, 1408: 11, 192: 3, 96: 3, 24: 3}
  assert {w: blocks.default_heads(w) for w in widths} == widths
  assert blocks.default_heads(768, 12) == 12
  assert blocks.default_heads(768, otherwise=12) == 6
  assert blocks.default_heads(96, otherwise=12) == 12
  with pytest.raises(ValueError, match="heads 5; nearest 4 or 6"):
    blocks.default_heads(24, 5)
  with pytest.raises(ValueError, match="say heads="):
    blocks.default_heads(27)


def test_patch_embed_is_a_convolution_whose_stride_is_its_kernel():
  grid = Grid((1, 4, 6, 8), (1, 2, 3, 4))
  volume = jax.random.normal(jax.random.key(0), (2, 1, 4, 6, 8, 3))
  embed = PatchEmbed(width=5)
  patches = grid.patchify(volume)
  params = spread(embed.init(jax.random.key(1), patches)["params"])
  kernel = params["proj"]["kernel"].reshape(2, 3, 4, 3, 5)
  out = jax.lax.conv_general_dilated(
      volume[:, 0], kernel, (2, 3, 4), "VALID",
      dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
  )
  np.testing.assert_allclose(
      embed.apply({"params": params}, patches),
      out.reshape(2, -1, 5) + params["proj"]["bias"], rtol=1e-4, atol=1e-4,
  )
  with pytest.raises(ValueError, match="patchify"):
    embed.apply({"params": params}, volume)


def test_attention_refuses_a_width_that_heads_do_not_divide():
  layer = attention.MultiHeadAttention(width=24, heads=5)
  with pytest.raises(ValueError, match="24 is not a multiple of heads 5"):
    jax.eval_shape(lambda: layer.init(jax.random.key(0), X))


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-6), ("bfloat16", 3e-5)])
def test_gelu_and_its_slope_are_as_exact_as_their_type(dtype, tolerance):
  x = jnp.asarray(np.linspace(-30, 30, 7201), dtype)
  found, slope = jax.vmap(jax.value_and_grad(blocks.gelu))(x)
  x64 = np.asarray(x, np.float64)
  phi = 0.5 * (1.0 + scipy.special.erf(x64 / np.sqrt(2.0)))
  density = np.exp(-0.5 * x64 * x64) / np.sqrt(2.0 * np.pi)
  half_ulp = 0.0 if dtype == "float32" else 2.0**-8
  for got, wanted, slack in ((found, x64 * phi, 1), (slope, phi + x64 * density, 4)):
    error = np.abs(np.asarray(got, np.float64) - wanted)
    assert np.all(error <= slack * tolerance + half_ulp * np.abs(wanted))
