"""The ViT: places, padding, sizes, channels, class token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.backbones import vit
from vjepa_jax.nn import blocks

PATCH = (1, 2, 4, 4)
VOXELS = (1, 6, 20, 28)  # 3 x 5 x 7 tokens
TOKENS = 105
VOLUME = jax.random.normal(jax.random.key(0), (2, *VOXELS, 1))
IDS = jnp.asarray(np.random.default_rng(0).permuted(
    np.tile(np.arange(TOKENS), (2, 1)), axis=1
))


def make(**options):
  return vit.ViT(**(dict(width=24, depth=2, patch=PATCH, heads=2) | options))


def init(model, volume=VOLUME, **options):
  """Parameters away from their start, so that biases and norms count."""
  start = jax.jit(model.init)(jax.random.key(1), volume, **options)["params"]
  leaves, tree = jax.tree.flatten(start)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  noise = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
  return jax.tree.unflatten(tree, noise)


def encode(model, params, volume=VOLUME, **options):
  return jax.jit(model.apply)({"params": params}, volume, **options)


def pick(tokens, ids):
  return np.take_along_axis(np.asarray(tokens), np.asarray(ids)[..., None], axis=1)


@pytest.mark.parametrize("positions", ["rope", "sincos", "learned"])
def test_kept_tokens_keep_their_absolute_places(positions):
  model = make(positions=positions)
  params = init(model)
  whole = encode(model, params)
  permuted = encode(model, params, keep_ids=IDS)
  assert whole.tokens.shape == (2, TOKENS, 24) and whole.ids is None
  np.testing.assert_array_equal(permuted.ids, IDS)
  np.testing.assert_allclose(
      permuted.tokens, pick(whole.tokens, IDS), rtol=1e-4, atol=1e-4
  )
  # Places matter at all: the same patches elsewhere are encoded otherwise.
  flipped = encode(model, params, VOLUME[:, :, ::-1, ::-1, ::-1])
  assert not np.allclose(flipped.tokens[:, ::-1], whole.tokens, atol=1e-2)


@pytest.mark.parametrize("attention", ["xla", "chunked"])
@pytest.mark.parametrize("class_token", [False, True])
def test_padding_among_the_kept_tokens_influences_nothing(attention, class_token):
  model = make(attention=attention, attention_chunk=16, class_token=class_token)
  params = init(model)
  kept = IDS[:, :40]
  alone = encode(model, params, keep_ids=kept)
  padded = encode(
      model, params, keep_ids=IDS[:, :50],
      keep_valid=jnp.broadcast_to(jnp.arange(50) < 40, (2, 50)),
  )
  np.testing.assert_allclose(
      padded.tokens[:, :40], alone.tokens, rtol=1e-4, atol=1e-4
  )
  if class_token:
    np.testing.assert_allclose(padded.cls, alone.cls, rtol=1e-4, atol=1e-4)
  unmarked = encode(model, params, keep_ids=IDS[:, :50])
  assert not np.allclose(unmarked.tokens[:, :40], alone.tokens, atol=1e-3)


def test_hidden_voxels_have_no_influence_and_no_gradient():
  model = make()
  params = init(model)
  loss = lambda volume: jnp.sum(
      model.apply({"params": params}, volume, keep_ids=IDS[:, :30]).tokens ** 2
  )
  grid = model.apply({"params": params}, VOLUME).grid
  gradient = np.asarray(grid.patchify(jax.jit(jax.grad(loss))(VOLUME)))
  for row in range(2):
    assert np.all(np.any(gradient[row, IDS[row, :30]], axis=-1))
    assert not np.any(gradient[row, IDS[row, 30:]])


def test_the_class_token_stands_apart_and_has_no_place():
  model = make(class_token=True)
  params = init(model)
  features = encode(model, params, keep_ids=IDS)
  assert features.cls.shape == (2, 24) and features.tokens.shape == (2, TOKENS, 24)
  whole = encode(model, params)
  np.testing.assert_allclose(features.cls, whole.cls, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(
      features.tokens, pick(whole.tokens, IDS), rtol=1e-4, atol=1e-4
  )
  assert encode(make(), {k: v for k, v in params.items() if k != "cls"}).cls is None


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("voxels", [(1, 6, 20, 28), (4, 1, 8, 12), (3, 2, 4, 4)])
def test_any_channels_and_any_grid(channels, voxels):
  patch = tuple(min(p, v) for p, v in zip(PATCH, voxels))
  volume = jax.random.normal(jax.random.key(3), (2, *voxels, channels))
  model = make(patch=patch, depth=1)
  params = init(model, volume)
  features = encode(model, params, volume)
  assert features.tokens.shape == (2, features.grid.tokens, 24)
  assert np.all(np.isfinite(features.tokens))
  assert params["patch_embed"]["proj"]["kernel"].shape[0] == np.prod(patch) * channels


def test_bfloat16_gives_float32_tokens_from_float32_parameters():
  model = make(dtype="bfloat16")
  params = init(model)
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
  features = encode(model, params)
  assert features.tokens.dtype == jnp.float32
  exact = encode(make(), params)
  error = np.abs(np.asarray(features.tokens - exact.tokens))
  assert error.mean() < 0.05


def test_positions_in_mm_follow_the_spacing():
  options = dict(
      rope_units="mm", rope_reference=(1.0, 0.1, 0.04, 0.04), rope_base=100.0
  )
  spacing = jnp.asarray([[np.nan, 0.05, 0.01, 0.01], [np.nan, 0.1, 0.01, 0.01]])
  model = make(**options)
  params = init(model, spacing=spacing)
  in_mm = encode(model, params, spacing=spacing).tokens
  by_index = encode(make(rope_base=100.0), params).tokens
  # One patch of the first row is one step of the reference; of the second it is not.
  np.testing.assert_allclose(in_mm[0], by_index[0], rtol=1e-4, atol=1e-4)
  assert not np.allclose(in_mm[1], by_index[1], atol=1e-3)
  with pytest.raises(ValueError, match="spacing"):
    encode(model, params)


def test_a_table_made_for_one_size_serves_another():
  other = jnp.ones((1, 1, 8, 24, 20, 1))
  learned = make(positions="learned")
  params = init(learned)
  with pytest.raises(ValueError, match="105 tokens, the volume has 120"):
    encode(learned, params, other)
  for positions in ("learned", "sincos"):
    model = make(positions=positions, table_voxels=VOXELS)
    own = params if positions == "learned" else {
        k: v for k, v in params.items() if k != "pos_embed"
    }
    assert encode(model, own, other).tokens.shape == (1, 120, 24)
    np.testing.assert_array_equal(
        encode(model, own).tokens, encode(make(positions=positions), own).tokens
    )


def test_intermediates_are_given_on_request_only():
  model = make(class_token=True)
  variables = jax.jit(model.init)(jax.random.key(0), VOLUME)
  assert set(variables) == {"params"}
  features, state = model.apply(variables, VOLUME, mutable=["intermediates"])
  sown = {k: v[0] for k, v in state["intermediates"].items()}
  assert sown["embedded"].shape == (2, TOKENS, 24)
  assert sown["blocks"].shape == (2, 2, TOKENS + 1, 24)
  np.testing.assert_array_equal(sown["normed"][:, 1:], features.tokens)


# Counted by hand: P D + D for the patches, 12 D^2 + 13 D a block at MLP ratio 4
# (giant: hidden 6144), 2 D for the norm; P = 1 * 4 * 16 * 16 voxels.
@pytest.mark.parametrize(
    "preset, parameters",
    [
        ("tiny", 5_535_552), ("small", 21_687_936), ("base", 85_843_200),
        ("large", 303_361_024), ("huge", 630_992_640), ("giant", 1_011_453_056),
    ],
)
def test_presets_have_their_published_sizes(preset, parameters):
  model = vit.build(preset)
  d, hidden = model.width, int(model.width * model.mlp_ratio)
  by_hand = 1025 * d + 2 * d + model.depth * (
      4 * d * d + 4 * d + 2 * d * hidden + hidden + d + 4 * d
  )
  assert count(model, (1, 64, 384, 384), 1) == by_hand == parameters


def count(model, voxels, channels):
  shapes = jax.eval_shape(
      lambda: model.init(jax.random.key(0), jnp.zeros((1, *voxels, channels)))
  )
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def test_base_on_colour_video_has_the_parameters_of_the_pytorch_model():
  # facebookresearch/vjepa2 vit_base, 3 channels, patch 2 x 16 x 16, rotary.
  model = vit.build(
      "base", patch=(2, 1, 16, 16), heads=vit.REFERENCE_HEADS["base"]
  )
  assert count(model, (16, 1, 256, 256), 3) == 86_236_416


def test_heads_are_128_wide_unless_asked_otherwise():
  heads = lambda preset, **o: blocks.default_heads(
      vit.build(preset, **o).width, vit.build(preset, **o).heads
  )
  want = dict(tiny=3, small=3, base=6, large=8, huge=10, giant=11)
  assert {preset: heads(preset) for preset in vit.PRESETS} == want
  assert heads("base", heads=vit.REFERENCE_HEADS["base"]) == 12
  assert set(vit.REFERENCE_HEADS) == set(vit.PRESETS)


def test_unknown_names_list_the_closest():
  with pytest.raises(ValueError, match="'bass'.*closest: base, "):
    vit.build("bass")
  with pytest.raises(ValueError, match="'class_tokn'.*closest: class_token"):
    vit.build("base", class_tokn=True)
  with pytest.raises(ValueError, match="'sin'.*closest: sincos"):
    make(positions="sin").init(jax.random.key(0), VOLUME)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(volume=VOLUME[..., 0]), r"\[B, T, Z, Y, X, C\]"),
        (dict(volume=VOLUME[:, :, :5]), "Z=5 is not a multiple of patch 2"),
        (dict(keep_valid=jnp.ones((2, 3), bool)), "keep_valid without keep_ids"),
        (dict(keep_ids=jnp.zeros((3, 4), int)), r"keep_ids has shape \(3, 4\)"),
        (
            dict(keep_ids=IDS[:, :4], keep_valid=jnp.ones((2, 3), bool)),
            r"keep_valid has shape \(2, 3\)",
        ),
    ],
)
def test_wrong_shapes_are_refused(options, message):
  options = dict(volume=VOLUME) | options
  with pytest.raises(ValueError, match=message):
    make().init(jax.random.key(0), options.pop("volume"), **options)
