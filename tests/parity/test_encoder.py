"""Published V-JEPA encoders, layer by layer, from their own checkpoints."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.backbones import vit
from vjepa_jax.interop import vjepa
from vjepa_jax.nn import blocks, positions


def build(weights, patch, **options):
  """Returns (model, params) of a published encoder; the widths are the weights'."""
  width = weights["norm.weight"].shape[0]
  depth = 1 + max(int(name.split(".")[1]) for name in weights if "blocks." in name)
  channels = weights["patch_embed.proj.weight"].shape[1]
  image = weights["patch_embed.proj.weight"].ndim == 4
  options = {"rope_layout": "vjepa2"} | options
  model = vit.ViT(width=width, depth=depth, patch=patch, **options)
  like = jax.eval_shape(
      lambda: model.init(jax.random.key(0), jnp.zeros((1, *patch, channels)))
  )["params"]
  swiglu = options.get("swiglu", False)
  params = vjepa.load_encoder(weights, like, patch, image=image, swiglu=swiglu)
  return model, params


def layers(model, params, volume, **options):
  """Returns {patch_embed, block_i, norm} and the output."""
  features, state = model.apply(
      {"params": params}, volume, mutable=["intermediates"], **options
  )
  sown = {k: v[0] for k, v in state["intermediates"].items()}
  found = {"patch_embed": sown["embedded"], "norm": sown["normed"]}
  found |= {f"block_{i}": block for i, block in enumerate(sown["blocks"])}
  return found, features.tokens


@pytest.fixture(autouse=True)
def full_precision():
  with cases.highest():
    yield


@pytest.fixture(scope="module")
def nonsquare(shared):
  case = cases.load(shared("fixtures/parity/fb_vjepa2_encoder_nonsquare"))
  weights = vjepa.read(case.path / "encoder.pt")["encoder"]
  patch = (case.config["tub"], 1, case.config["p"], case.config["p"])
  return case, weights, patch


@pytest.mark.parametrize("axis", ["T", "Z"])
@pytest.mark.parametrize("attention", ["xla", "chunked"])
def test_rotary_encoder_matches_at_every_depth(nonsquare, axis, attention):
  case, weights, patch = nonsquare
  if axis == "Z":
    patch = (1, patch[0], *patch[2:])
  model, params = build(
      weights, patch, heads=case.config["heads"], attention=attention,
      attention_chunk=16,
  )
  found, out = layers(model, params, cases.volume(case["in/x"], axis))
  case.check("enc/full/out", out)
  assert set(found) == {"patch_embed", "block_0", "block_1", "block_2", "norm"}
  for name, value in found.items():
    case.check(f"enc/full/{name}", value)


def test_masked_encoder_matches_at_every_depth(nonsquare):
  case, weights, patch = nonsquare
  model, params = build(weights, patch, heads=case.config["heads"])
  volume = cases.volume(case["in/x"])
  masks = [jnp.asarray(case[f"in/mask_{i}"]) for i in (0, 1)]
  results = [layers(model, params, volume, keep_ids=mask) for mask in masks]
  case.check("enc/masked/out", np.concatenate([out for _, out in results]))
  for name in ("block_0", "block_1", "block_2", "norm"):
    value = np.concatenate([found[name] for found, _ in results])
    case.check(f"enc/masked/{name}", value)


def test_encoder_matches_at_another_size(nonsquare):
  case, weights, patch = nonsquare
  model, params = build(weights, patch, heads=case.config["heads"])
  _, out = layers(model, params, cases.volume(case["in/x_other_size"]))
  case.check("enc/other_size/out", out)


def test_chosen_layers_match_after_the_final_norm(nonsquare):
  case, weights, patch = nonsquare
  model, params = build(weights, patch, heads=case.config["heads"])
  found, _ = layers(model, params, cases.volume(case["in/x"]))
  norm = lambda x: blocks.layer_norm().apply({"params": params["norm"]}, x)
  # The reference took blocks 0 and 2.
  for number, name in enumerate(("block_0", "block_2")):
    case.check(f"enc/out_layers/{number}", norm(found[name]))


@pytest.mark.parametrize("remat", ["none", "attention"])
@pytest.mark.parametrize("attention", ["xla", "chunked"])
def test_gradient_of_the_input_matches(nonsquare, attention, remat):
  case, weights, patch = nonsquare
  model, params = build(
      weights, patch, heads=case.config["heads"], attention=attention,
      attention_chunk=16, remat=remat,
  )

  def loss(volume):
    tokens = model.apply({"params": params}, volume).tokens
    return jnp.sum(tokens * case["in/cotangent"])

  gradient = jax.grad(loss)(cases.volume(case["in/x"]))  # [B, T, 1, Y, X, C]
  case.check("enc/full/grad_x", np.moveaxis(gradient[:, :, 0], -1, 1))


@pytest.fixture(scope="module")
def sincos(shared):
  case = cases.load(shared("fixtures/parity/fb_vjepa_sincos"))
  weights = vjepa.read(case.path / "vjepa_sincos.pt")["encoder"]
  config = case.config
  model, params = build(
      weights, (config["tubelet"], 1, config["patch"], config["patch"]),
      heads=config["heads"], positions="sincos",
      table_voxels=(config["frames"], 1, config["img"], config["img"]),
  )
  return case, weights, model, params


def test_sincos_encoder_matches_at_every_depth(sincos):
  case, _, model, params = sincos
  found, out = layers(model, params, cases.volume(case["in/x"]))
  case.check("m/full/out", out)
  for name, value in found.items():
    case.check(f"m/full/{name}", value)


def test_masked_sincos_encoder_matches(sincos):
  case, _, model, params = sincos
  volume = cases.volume(case["in/x"])
  masks = [jnp.asarray(case[f"in/masks_enc_{i}"]) for i in (0, 1)]
  outs = [layers(model, params, volume, keep_ids=mask)[1] for mask in masks]
  case.check("m/masked/out_0", outs[0])
  case.check("m/masked/out_1", outs[1])


def test_the_computed_sincos_table_is_the_one_in_the_checkpoint(sincos):
  _, weights, model, _ = sincos
  table = positions.sincos_table((4, 1, 4, 4), model.width)
  np.testing.assert_allclose(table[None], weights["pos_embed"], atol=1e-6)


def test_sincos_encoder_matches_at_another_size(sincos):
  case, _, model, params = sincos
  table = positions.sincos_table((4, 1, 4, 4), model.width)
  resized = positions.resize_table(jnp.asarray(table), (4, 1, 4, 4), (6, 1, 6, 6))
  case.check("m/interp/pos_embed", resized[None])
  _, out = layers(model, params, cases.volume(case["in/x_big"]))
  case.check("m/interp/out", out)


@pytest.mark.parametrize("kind", ["image", "swiglu"])
def test_image_and_swiglu_encoders_match_at_every_depth(shared, kind):
  case = cases.load(shared("fixtures/parity/fb_vjepa2_image_and_swiglu"))
  weights = vjepa.read(case.path / f"{kind}.pt")["encoder"]
  if kind == "image":
    model, params = build(weights, (1, 1, 8, 8), heads=2)
    volume = cases.volume(case["in/image"][:, :, None])
  else:
    model, params = build(weights, (2, 1, 8, 8), heads=2, swiglu=True)
    volume = cases.volume(case["in/video"])
  found, out = layers(model, params, volume)
  case.check(f"{kind}/out", out)
  for name, value in found.items():
    case.check(f"{kind}/{name}", value)


@pytest.fixture(scope="module")
def pretrain(shared):
  case = cases.load(shared("fixtures/parity/fb_vjepa2_pretrain_step"))
  weights = vjepa.read(case.path / "vjepa2_tiny.pt")
  patch = (case.config["tubelet_size"], 1, *(case.config["patch_size"],) * 2)
  return case, weights, patch, case.config["num_heads"]


@pytest.mark.parametrize("clip, mask", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_context_encoder_of_the_training_step_matches(pretrain, clip, mask):
  case, weights, patch, heads = pretrain
  model, params = build(weights["encoder"], patch, heads=heads)
  keep = jnp.asarray(case[f"in/masks_enc_{clip}_{mask}"])
  found, _ = layers(
      model, params, cases.volume(case[f"in/clip_{clip}"]), keep_ids=keep
  )
  call = 1 + 2 * clip + mask
  suffix = "" if call == 1 else f"#{call}"
  # The reference embeds all patches, then keeps some.
  embedded = case[f"step0/act/enc/patch_embed{suffix}"]
  kept = np.take_along_axis(embedded, np.asarray(keep)[..., None], axis=1)
  stated = case.tolerance[f"step0/act/enc/patch_embed{suffix}"]
  np.testing.assert_allclose(found.pop("patch_embed"), kept, **stated)
  for name, value in found.items():
    case.check(f"step0/act/enc/{name}{suffix}", value)


@pytest.mark.parametrize("clip", [0, 1])
def test_target_encoder_of_the_training_step_matches(pretrain, clip):
  case, weights, patch, heads = pretrain
  model, params = build(weights["target_encoder"], patch, heads=heads)
  _, out = layers(model, params, cases.volume(case[f"in/clip_{clip}"]))
  mean, variance = out.mean(-1, keepdims=True), out.var(-1, keepdims=True)
  case.check(f"step0/target_normed_{clip}", (out - mean) / np.sqrt(variance + 1e-5))
