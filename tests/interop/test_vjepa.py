"""The V-JEPA name table against real files of the published layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.backbones import vit
from vjepa_jax.interop import engine, vjepa

PATCH = (2, 1, 8, 8)


@pytest.fixture(scope="module")
def weights(shared):
  return vjepa.read(shared("fixtures/parity/fb_vjepa2_pretrain_step/vjepa2_tiny.pt"))


@pytest.fixture(scope="module")
def like():
  model = vit.ViT(width=48, depth=3, heads=2, patch=PATCH)
  volume = jnp.zeros((1, *PATCH, 3))
  return jax.eval_shape(lambda: model.init(jax.random.key(0), volume))["params"]


def predictor_like(width=36, depth=2, heads=3, features=48, groups=3):
  size = width // heads
  block = {
      "attn": {
          **{
              name: {"kernel": (width, heads, size), "bias": (heads, size)}
              for name in ("query", "key", "value")
          },
          "out": {"kernel": (heads, size, width), "bias": (width,)},
      },
      "mlp": {
          "fc1": {"kernel": (width, 4 * width), "bias": (4 * width,)},
          "fc2": {"kernel": (4 * width, width), "bias": (width,)},
      },
      **{n: {"scale": (width,), "bias": (width,)} for n in ("norm1", "norm2")},
  }
  shape = lambda s: jax.ShapeDtypeStruct(s, jnp.float32)
  is_shape = lambda s: isinstance(s, tuple)
  return {
      "embed": {"kernel": shape((features, width)), "bias": shape((width,))},
      "mask_tokens": shape((groups, width)),
      "stack": {
          "blocks": jax.tree.map(lambda s: shape((depth, *s)), block, is_leaf=is_shape)
      },
      "norm": {"scale": shape((width,)), "bias": shape((width,))},
      "proj": {"kernel": shape((width, features)), "bias": shape((features,))},
  }


def test_wrappers_are_taken_off_and_components_found(weights):
  assert set(weights) == {"encoder", "predictor", "target_encoder"}
  assert "blocks.0.attn.qkv.weight" in weights["encoder"]
  assert "mask_tokens.2" in weights["predictor"]


def test_encoder_and_predictor_come_back_under_their_names(weights, like):
  encoder = vjepa.load_encoder(weights["encoder"], like, PATCH)
  back = engine.save(vjepa.encoder_table(PATCH), encoder)
  assert set(weights["encoder"]) - set(back) == {"pos_embed"}
  for name, value in back.items():
    np.testing.assert_array_equal(value, weights["encoder"][name], err_msg=name)
  predictor = vjepa.load_predictor(weights["predictor"], predictor_like())
  back = engine.save(vjepa.predictor_table(), predictor)
  assert set(weights["predictor"]) == set(back)
  for name, value in back.items():
    np.testing.assert_array_equal(value, weights["predictor"][name], err_msg=name)


def test_the_time_of_a_video_may_become_our_z(weights, like):
  as_t = vjepa.load_encoder(weights["encoder"], like, (2, 1, 8, 8))
  as_z = vjepa.load_encoder(weights["encoder"], like, (1, 2, 8, 8))
  for a, b in zip(jax.tree.leaves(as_t), jax.tree.leaves(as_z), strict=True):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(ValueError, match="one axis for T and Z"):
    vjepa.encoder_table((2, 2, 8, 8))


def test_weights_of_another_model_are_fatal_with_a_full_report(weights):
  model = vit.ViT(width=48, depth=2, heads=2, patch=(4, 1, 8, 8), class_token=True)
  volume = jnp.zeros((1, 4, 1, 8, 8, 3))
  like = jax.eval_shape(lambda: model.init(jax.random.key(0), volume))["params"]
  with pytest.raises(ValueError) as caught:
    vjepa.load_encoder(weights["encoder"], like, (4, 1, 8, 8))
  for fault in (
      "missing: cls", "unexpected: blocks.2.norm1.weight",
      "misshapen: patch_embed.proj.weight (48, 3, 2, 8, 8)",
  ):
    assert fault in str(caught.value)


def test_a_file_without_a_model_is_refused(shared):
  with pytest.raises(ValueError, match="none of encoder, predictor.*classifiers"):
    vjepa.read(shared("fixtures/parity/fb_attentive_probe/probe_depth1.pt"))
