"""VT-Former: divided attention, live class token, kept places, sizes, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.backbones import vit, vt_former
from vjepa_jax.nn import positions

PATCH = (1, 2, 4, 4)
VOXELS = (4, 4, 8, 12)  # 4 times 2 x 2 x 3 places
TIMES, PLACES = 4, 12
VOLUME = jax.random.normal(jax.random.key(0), (2, *VOXELS, 1))
KEPT = jnp.asarray([[1, 4, 5, 9], [0, 2, 7, 11]])


def make(**options):
  return vt_former.VTFormer(**(dict(width=24, depth=2, patch=PATCH, heads=2) | options))


def init(model, volume=VOLUME, noise=0.2, **options):
  """Parameters away from their start, so that zeros, biases and norms count."""
  start = jax.jit(model.init)(jax.random.key(1), volume, **options)["params"]
  leaves, tree = jax.tree.flatten(start)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  leaves = [x + noise * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
  return jax.tree.unflatten(tree, leaves)


def drawn(model, volume=VOLUME):
  """Parameters that nothing is compiled for."""
  shapes = jax.eval_shape(model.init, jax.random.key(1), volume)["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda p: np.float32(0.3 * rng.normal(size=p.shape)), shapes)


@functools.cache
def compiled(model):
  return jax.jit(model.apply, static_argnames="train")


def encode(model, params, volume=VOLUME, **options):
  return compiled(model)({"params": params}, volume, **options)


def frames(tokens):
  """[B, T n, D] -> [B, T, n, D]."""
  return np.asarray(tokens).reshape(len(tokens), TIMES, -1, tokens.shape[-1])


def count(model, voxels, channels=1):
  shapes = jax.eval_shape(
      lambda: model.init(jax.random.key(0), jnp.zeros((1, *voxels, channels)))
  )
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


@functools.cache
def gradients(**options):
  """Gradient of a weighted sum of tokens and class token by every parameter."""
  model = make(**options)
  params = init(model)
  weight = jax.random.normal(jax.random.key(3), (2, TIMES * PLACES, 24))

  def loss(params):
    features = model.apply({"params": params}, VOLUME)
    total = jnp.sum(weight * features.tokens)
    return total if features.cls is None else total + jnp.sum(features.cls ** 3)

  return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize(
    "space_time, order",
    [
        ("divided", "time_first"), ("divided", "space_first"), ("joint", "time_first"),
        ("space_only", "time_first"),
    ],
)
def test_class_token_and_mean_depend_on_the_input(space_time, order):
  model = make(space_time=space_time, order=order)
  params = init(model)
  features = encode(model, params)
  other = encode(model, params, VOLUME[::-1])
  assert features.cls.shape == (2, 24)
  assert features.tokens.shape == (2, TIMES * PLACES, 24)
  assert np.abs(features.cls - other.cls).max() > 0.1
  assert np.abs(features.pooled - other.pooled).max() > 0.1
  # The rows are exchanged and nothing else: no row looks at another.
  np.testing.assert_allclose(features.cls, other.cls[::-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(), dict(order="space_first", time_projection=False, class_position=True),
        dict(space_time="joint", positions="sincos"),
        dict(space_time="space_only", class_token=False),
    ],
)
def test_each_parameter_gets_gradient_and_no_unit_is_dead(options):
  found = jax.tree_util.tree_flatten_with_path(gradients(**options))[0]
  assert len(found) > 15
  for path, gradient in found:
    name = jax.tree_util.keystr(path)
    if "key" in name and "bias" in name:
      continue  # A constant on all keys changes no softmax.
    layers = len(gradient) if "blocks" in name else 1  # Stacked over depth.
    units = np.abs(gradient).reshape(layers, -1, gradient.shape[-1]).max(axis=1)
    assert units.min() > 0, f"{name}: {np.sum(units == 0)} units without gradient"


def test_a_new_time_path_is_silent_and_wakes_with_the_first_update():
  model = make()
  params = jax.jit(model.init)(jax.random.key(1), VOLUME)["params"]
  loss = lambda p: jnp.sum(model.apply({"params": p}, VOLUME).tokens ** 3)
  grad = jax.jit(jax.grad(loss))
  silent = grad(params)["stack"]["blocks"]
  assert np.abs(silent["time_proj"]["kernel"]).max() > 0
  assert np.abs(silent["time_attn"]["query"]["kernel"]).max() == 0
  params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grad(params))
  awake = grad(params)["stack"]["blocks"]
  for name in ("query", "key", "value", "out"):
    assert np.all(np.abs(awake["time_attn"][name]["kernel"]).max(axis=(1, 2, 3)) > 0)


def plain(params):
  """Parameters of a frame model: those of a VT-Former without its time."""
  kept = {k: v for k, v in params.items() if k != "positions"}
  blocks = params["stack"]["blocks"]
  blocks = {k: v for k, v in blocks.items() if not k.startswith("time_")}
  return kept | {
      "pos_embed": params["positions"]["space"][None], "stack": {"blocks": blocks}
  }


@pytest.mark.parametrize(
    "projection, order", [(True, "time_first"), (False, "space_first")]
)
def test_one_frame_with_a_zero_time_path_is_the_frame_model(projection, order):
  one = VOLUME[:, :1]
  model = make(time_projection=projection, order=order)
  params = init(model, one)
  last = "time_proj" if projection else "time_attn"
  own = params["stack"]["blocks"]
  own[last] = jax.tree.map(jnp.zeros_like, own[last])
  params["positions"]["time"] *= 0.0
  frame = vit.ViT(
      width=24, depth=2, patch=PATCH, heads=2, positions="learned", class_token=True
  )
  ours, theirs = encode(model, params, one), encode(frame, plain(params), one)
  np.testing.assert_allclose(ours.tokens, theirs.tokens, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(ours.cls, theirs.cls, rtol=1e-4, atol=1e-5)


def test_a_new_model_sees_every_frame_as_the_frame_model_does():
  # Without a class token: that is moved by all frames.
  model = make(class_token=False)
  params = jax.jit(model.init)(jax.random.key(1), VOLUME)["params"]
  params["positions"]["time"] *= 0.0
  frame = vit.ViT(width=24, depth=2, patch=PATCH, heads=2, positions="learned")
  ours = frames(encode(model, params).tokens)
  for time in range(TIMES):
    one = encode(frame, plain(params), VOLUME[:, time : time + 1])
    np.testing.assert_allclose(ours[:, time], one.tokens, rtol=1e-4, atol=1e-5)
  other = encode(model, init(model))
  assert not np.allclose(frames(other.tokens), ours, atol=1e-2)


def test_one_place_without_attention_over_space_is_the_joint_model_over_time():
  column = VOLUME[:, :, :2, :4, :4]
  model = make(time_projection=False, class_token=False)
  params = drawn(model, column)
  own = params["stack"]["blocks"]
  own["attn"] = jax.tree.map(np.zeros_like, own["attn"])
  kept = {k: v for k, v in own.items() if k not in ("time_attn", "time_norm")}
  over_time = kept | {"attn": own["time_attn"], "norm1": own["time_norm"]}
  joint = make(space_time="joint", class_token=False)
  ours = encode(model, params, column).tokens
  theirs = encode(joint, params | {"stack": {"blocks": over_time}}, column).tokens
  assert ours.shape == (2, TIMES, 24)
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def program(model, times):
  """The text of what is computed of clips of so many time points."""
  volume = jax.ShapeDtypeStruct((1, times, *VOXELS[1:], 1), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), volume)
  return str(jax.make_jaxpr(model.apply)(params, volume))


@pytest.mark.parametrize("space_time", vt_former.SPACE_TIME)
def test_neither_time_points_nor_blocks_make_the_program_longer(space_time):
  text = program(make(space_time=space_time, class_token=False), 5)
  steps = text.count(" = ")
  for depth, times in ((2, 17), (7, 5)):
    other = program(make(space_time=space_time, class_token=False, depth=depth), times)
    assert other.count(" = ") == steps > 50
  # Of all pairs of the 60 tokens only joint attention holds scores.
  assert ("60,60]" in text) == (space_time == "joint")


@pytest.mark.parametrize("space_time", vt_former.SPACE_TIME)
def test_each_blocks_output_is_given_and_the_last_one_normed_is_the_features(space_time):
  model, first = make(space_time=space_time), make(space_time=space_time, depth=1)
  params = drawn(model)
  cut = params | {"stack": jax.tree.map(lambda p: p[:1], params["stack"])}

  def normed(x):
    x = np.asarray(x, np.float64)
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1)[..., None] + 1e-6)
    return x * params["norm"]["scale"] + params["norm"]["bias"]

  @jax.jit
  def both(params, cut):
    whole = model.apply({"params": params}, VOLUME, mutable=["intermediates"])
    return whole, first.apply({"params": cut}, VOLUME)

  (features, state), shorter = both(params, cut)
  sown = {name: value[0] for name, value in state["intermediates"].items()}
  assert sown["blocks"].shape == (2, *features.tokens.shape)
  near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  for n, wanted in enumerate((shorter, features)):
    near(normed(sown["blocks"][n]), wanted.tokens)
    near(normed(sown["block_cls"][n].mean(axis=1)), wanted.cls)


def test_divided_attention_reaches_one_place_over_time_and_one_time_over_space():
  model = make(depth=1, class_token=False)
  params = init(model)
  tokens = lambda volume: encode(model, params, volume).tokens
  changed = VOLUME.at[0, 1, :2, :4, :4].add(3.0)  # time 1, place 0
  moved = np.abs(frames(tokens(changed) - tokens(VOLUME))[0]).max(axis=-1)  # [T, n]
  assert np.all(moved > 1e-4)
  # Without time before space, the other frames change at that place alone.
  model = make(depth=1, class_token=False, order="space_first")
  moved = np.abs(frames(tokens(changed) - tokens(VOLUME))[0]).max(axis=-1)
  assert np.all(moved > 1e-4)
  frame_wise = make(depth=1, class_token=False, space_time="space_only")
  del params["positions"]["time"]
  model, params = frame_wise, {**params, "stack": {"blocks": {
      k: v for k, v in params["stack"]["blocks"].items() if "time" not in k
  }}}
  moved = np.abs(frames(tokens(changed) - tokens(VOLUME))[0]).max(axis=-1)
  assert np.all(moved[1] > 1e-4) and np.all(moved[[0, 2, 3]] == 0)


@pytest.mark.parametrize(
    "space_time, learned",
    [("divided", "learned"), ("space_only", "sincos"), ("joint", "learned")],
)
def test_kept_places_are_encoded_alone_and_know_where_they_are(space_time, learned):
  model = make(space_time=space_time, positions=learned)
  params = init(model)
  features = encode(model, params, keep_places=KEPT)
  assert features.tokens.shape == (2, TIMES * 4, 24)
  ids = np.asarray(features.ids).reshape(2, TIMES, 4)
  np.testing.assert_array_equal(ids, KEPT[:, None] + PLACES * np.arange(4)[:, None])
  # All places, in another order: the same tokens in that order.
  order = jnp.asarray(np.random.default_rng(0).permuted(
      np.tile(np.arange(PLACES), (2, 1)), axis=1
  ))
  whole, turned = encode(model, params), encode(model, params, keep_places=order)
  picked = np.take_along_axis(
      np.asarray(whole.tokens), np.asarray(turned.ids)[..., None], axis=1
  )
  np.testing.assert_allclose(turned.tokens, picked, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(turned.cls, whole.cls, rtol=1e-4, atol=1e-4)


def test_hidden_voxels_have_no_influence_and_no_gradient():
  model = make()
  params = init(model)

  def loss(volume):
    features = model.apply({"params": params}, volume, keep_places=KEPT)
    return jnp.sum(features.tokens ** 3) + jnp.sum(features.cls ** 3)

  grid = model.grid_of(VOXELS)
  gradient = np.asarray(grid.patchify(jax.jit(jax.grad(loss))(VOLUME)))
  gradient = gradient.reshape(2, TIMES, PLACES, -1)
  for row in range(2):
    seen = np.isin(np.arange(PLACES), KEPT[row])
    assert np.all(np.any(gradient[row][:, seen], axis=-1))
    assert not np.any(gradient[row][:, ~seen])


@pytest.mark.parametrize("space_time", ["divided", "space_only"])
def test_ids_that_differ_by_frame_are_refused_with_the_reason(space_time):
  model = make(space_time=space_time)
  with pytest.raises(ValueError, match="same places of every frame.*joint"):
    model.init(jax.random.key(0), VOLUME, keep_ids=KEPT)
  joint = make(space_time="joint")
  params = init(joint)
  valid = jnp.broadcast_to(jnp.arange(4) < 3, (2, 4))
  alone = encode(joint, params, keep_ids=KEPT[:, :3])
  padded = encode(joint, params, keep_ids=KEPT, keep_valid=valid)
  np.testing.assert_allclose(padded.tokens[:, :3], alone.tokens, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(padded.cls, alone.cls, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis, size", [(2, 3), (3, 10), (4, 9)])
def test_a_volume_that_the_patch_does_not_divide_is_padded_with_nothing(axis, size):
  model = make()
  small = jnp.take(VOLUME, jnp.arange(size), axis=axis)
  params = init(model, small)
  features = encode(model, params, small)
  valid = features.grid.valid()
  assert features.grid.dims == model.grid_of(small.shape[1:5]).dims
  assert valid.sum() == np.prod(small.shape[1:5]) and not valid.all()
  assert valid.any(axis=1).all()
  widths = [(0, 0)] * 6
  widths[axis] = (0, -size % PATCH[axis - 1])
  by_hand = encode(model, params, jnp.pad(small, widths))
  np.testing.assert_allclose(features.tokens, by_hand.tokens, rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match="not a multiple of patch"):
    make(pad=False).init(jax.random.key(0), small)


def test_a_hundred_slices_are_thirteen_patches_of_which_the_last_is_half_real():
  model = vt_former.build("base")
  grid = model.grid_of((32, 100, 512, 512))
  assert grid.dims == (32, 13, 32, 32) and grid.places == 13_312
  one = model.grid_of((1, 100, 32, 32))
  shares = one.valid().reshape(13, 4, -1).mean(axis=(1, 2))
  np.testing.assert_array_equal(shares, [1.0] * 12 + [0.5])


# E (P + 1) + (n + T) E for embedding and positions, E for the class token, 2 E for the
# norm; a block 16 E^2 + 19 E, and E^2 + E with TimeSformer's projection; P = 2048.
@pytest.mark.parametrize(
    "preset, voxels, without, given",
    [
        ("tiny", (16, 64, 256, 256), 3_164_160, 3_312_384),
        ("small", (16, 64, 256, 256), 27_331_584, 28_907_520),
        ("base", (32, 96, 512, 512), 124_459_008, 131_546_112),
        ("large", (32, 96, 512, 512), 216_276_992, 228_872_192),
        ("xlarge", (16, 64, 256, 256), 289_758_208, 307_601_408),
        ("huge", (16, 64, 256, 256), 477_565_440, 507_079_680),
    ],
)
def test_presets_have_the_sizes_that_they_state(preset, voxels, without, given):
  model = vt_former.build(preset)
  n = int(np.prod(model.grid_of(voxels).dims[1:]))
  e = model.width
  by_hand = (2049 + n + voxels[0] + 3) * e + model.depth * (16 * e * e + 19 * e)
  assert count(vt_former.build(preset, time_projection=False), voxels) == by_hand
  assert by_hand == without
  assert count(model, voxels) == by_hand + model.depth * (e * e + e) == given


def test_small_has_32769_tokens():
  model = vt_former.build("small")
  volume = jax.ShapeDtypeStruct((2, 16, 64, 256, 256, 1), jnp.float32)
  features = jax.eval_shape(
      lambda v: model.init_with_output(jax.random.key(0), v)[0], volume
  )
  assert features.tokens.shape == (2, 32_768, 512) and features.cls.shape == (2, 512)
  kept = jax.ShapeDtypeStruct((2, 512), jnp.int32)
  features = jax.eval_shape(
      lambda v, k: model.init_with_output(jax.random.key(0), v, keep_places=k)[0],
      volume, kept,
  )
  assert features.tokens.shape == (2, 16 * 512, 512)


def test_learned_tables_serve_other_grids():
  other = jax.random.normal(jax.random.key(5), (2, 6, 4, 16, 8, 1))
  model = make()
  params = init(model)
  with pytest.raises(ValueError, match="12, the grid has 16.*table_voxels"):
    encode(model, params, other)
  for resize in ("linear", "nearest"):
    resized = make(table_voxels=VOXELS, table_resize=resize)
    np.testing.assert_array_equal(
        encode(resized, params).tokens, encode(model, params).tokens
    )
    assert encode(resized, params, other).tokens.shape == (2, 6 * 16, 24)
    # One frame of a longer clip has not the first time's place but the middle's.
    one = encode(resized, params, other[:, :1])
    assert one.tokens.shape == (2, 16, 24)


def test_nearest_tables_are_resized_as_torch_does_it():
  table = jnp.arange(6.0)[:, None] * jnp.ones(2)
  found = positions.resize_table(table, (6,), (4,), "nearest")
  np.testing.assert_array_equal(found[:, 0], [0, 1, 3, 4])  # floor(i 6 / 4)
  found = positions.resize_table(table, (2, 3), (4, 3), "nearest")
  np.testing.assert_array_equal(found[:, 0], [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])


def test_positions_in_minutes_and_micrometres_follow_the_spacing():
  options = dict(
      positions="sincos", position_units="mm",
      position_reference=(60.0, 0.001, 0.001, 0.001),
  )
  model = make(**options)
  spacing = jnp.asarray([[60.0, 0.0005, 0.00025, 0.00025], [30.0, 0.001, 0.001, 0.001]])
  params = init(model, spacing=spacing)
  found = encode(model, params, spacing=spacing).tokens
  # A patch of the first row is a minute and a micrometre, a step of the index.
  by_index = encode(make(positions="sincos"), params).tokens
  np.testing.assert_allclose(found[0], by_index[0], rtol=1e-4, atol=1e-4)
  assert not np.allclose(found[1], by_index[1], atol=1e-2)
  # Half as many voxels, twice as large, of the same thing lie at the same places.
  grids = (model.grid_of((4, 8, 8, 8)), model.grid_of((4, 4, 4, 4)))
  coords = [
      positions.coordinates(
          grid, None, units="mm", reference=(60.0, 0.001, 0.001, 0.001),
          spacing=jnp.full((1, 4), step),
      )[0]
      for grid, step in zip(grids, (0.001, 0.002))
  ]
  assert coords[0].shape == (4 * 16, 4)
  with pytest.raises(ValueError, match="spacing"):
    encode(model, params)


def test_overlapping_patches_are_more_tokens_and_equal_a_strided_convolution():
  model = make(stride=(1, 1, 2, 2), class_token=False, positions="none")
  params = init(model)
  features, state = model.apply(
      {"params": params}, VOLUME, mutable=["intermediates"]
  )
  # (size - patch) // stride + 1 along each axis.
  assert features.grid.dims == (4, 3, 3, 5)
  kernel = params["patch_embed"]["proj"]["kernel"].reshape(2, 4, 4, 1, 24)
  by_hand = jax.lax.conv_general_dilated(
      VOLUME.reshape(8, *VOXELS[1:], 1), kernel, (1, 2, 2), "VALID",
      dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
  ) + params["patch_embed"]["proj"]["bias"]
  embedded = state["intermediates"]["embedded"][0]
  np.testing.assert_allclose(
      embedded, by_hand.reshape(2, -1, 24), rtol=1e-4, atol=1e-4
  )
  with pytest.raises(ValueError, match="overlap"):
    features.grid.unpatchify(jnp.zeros((2, features.grid.tokens, 32)))


def test_drop_path_drops_whole_clips():
  model = make(drop_path=0.5, class_token=False)
  params = init(model)
  volume = jnp.tile(VOLUME[:1], (64, 1, 1, 1, 1, 1))
  given = encode(
      model, params, volume, train=True, rngs={"drop_path": jax.random.key(0)}
  ).tokens
  # Each clip skips some of the last block's three branches: eight outcomes at most,
  # each the same for all tokens of a clip.
  outcomes = []
  for clip in np.asarray(given):
    if not any(np.allclose(clip, known, atol=1e-2) for known in outcomes):
      outcomes.append(clip)
  assert 4 < len(outcomes) <= 8
  calm = encode(model, params, volume).tokens
  np.testing.assert_allclose(calm, jnp.tile(calm[:1], (64, 1, 1)), atol=1e-5)


@pytest.mark.parametrize("options", [
    dict(remat="full", unroll=2), dict(remat="attention", attention="rows"),
    dict(attention="chunked", attention_chunk=32),
])
def test_remat_unroll_and_attention_change_neither_value_nor_gradient(options):
  # 157 places: more tokens a frame than are left to "xla" in any case.
  volume = jax.random.normal(jax.random.key(1), (1, 2, 2, 4 * 12, 4 * 13, 1))
  plain, other = make(), make(**options)
  params = init(plain, volume)

  def both(model):
    loss = lambda p: jnp.sum(model.apply({"params": p}, volume).tokens ** 3)
    return jax.jit(jax.value_and_grad(loss))(params)

  (one, grads), (two, others) = both(plain), both(other)
  np.testing.assert_allclose(one, two, rtol=1e-4)
  largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(grads))
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * largest)


def test_bfloat16_gives_float32_tokens_from_float32_parameters():
  model = make(dtype="bfloat16")
  params = init(model)
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
  features = encode(model, params)
  assert features.tokens.dtype == features.cls.dtype == jnp.float32
  exact = encode(make(), params)
  assert np.abs(np.asarray(features.tokens - exact.tokens)).mean() < 0.05


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(preset="smal"), "'smal'.*closest: small"),
        (dict(space_time="divide"), "'divide'.*closest: divided"),
        (dict(order="time"), "'time'.*closest: time_first"),
        (dict(positions="rope"), "positions 'rope'"),
        (dict(remat="all"), "remat 'all'"),
        (dict(position_units="mm"), "positions 'sincos' only"),
        (dict(positions="sincos", position_units="mm"), "position_reference="),
        (dict(position_reference=(1, 1, 1, 1)), "position_units 'mm' only"),
        (dict(heads=7), "not a multiple of heads 7"),
    ],
)
def test_wrong_options_are_faults(options, message):
  faults = vt_former.model_faults(dict(preset="small") | options)
  assert len(faults) == 1, faults
  with pytest.raises(AssertionError, match=message):
    raise AssertionError(faults[0])


def test_unknown_names_and_wrong_shapes_are_refused():
  assert vt_former.model_faults(dict(preset="small", order="space_first")) == []
  with pytest.raises(ValueError, match="'small2'.*closest: small"):
    vt_former.build("small2")
  with pytest.raises(ValueError, match="'class_tokn'.*closest: class_token"):
    vt_former.build("small", class_tokn=True)
  key = jax.random.key(0)
  with pytest.raises(ValueError, match="'divide'.*closest: divided"):
    make(space_time="divide").init(key, VOLUME)
  with pytest.raises(ValueError, match=r"\[B, T, Z, Y, X, C\]"):
    make().init(key, VOLUME[..., 0])
  with pytest.raises(ValueError, match=r"keep_places has shape \(3, 4\)"):
    make().init(key, VOLUME, keep_places=jnp.zeros((3, 4), int))
