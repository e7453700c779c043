"""Published VideoMAEs: what is seen, what is said of the hidden, every gradient."""

import json

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.backbones import vit
from vjepa_jax.interop import engine, videomae
from vjepa_jax.nn import blocks
from vjepa_jax.objectives import mae
from vjepa_jax.volumes.masks import Split

PRETRAINED = ["norm_pix_3ch", "norm_pix_1ch", "raw_pix_3ch", "no_qv_bias"]
# Of ImageNet, which Hugging Face undoes where there are three channels.
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def full_precision():
  with cases.highest():
    yield


def read(path):
  """Returns case, Hugging Face's config, weights, and a ViT for them."""
  case, weights = cases.load(path), videomae.read(path / "hf")
  c = json.loads((path / "hf" / "config.json").read_text())
  backbone = vit.ViT(
      width=c["hidden_size"], depth=c["num_hidden_layers"],
      heads=c["num_attention_heads"], positions="flat", final_norm=False,
      patch=(c["tubelet_size"], 1, c["patch_size"], c["patch_size"]),
      mlp_ratio=c["intermediate_size"] / c["hidden_size"], eps=c["layer_norm_eps"],
      biases="qv" if c["qv_bias"] else "",
  )
  return case, c, weights, backbone


def to_volume(pixels):
  """[B, T, C, H, W] -> [B, T, 1, Y, X, C]."""
  return jnp.asarray(np.moveaxis(pixels, 2, -1)[:, :, None], jnp.float32)


def from_volume(volume):
  return np.moveaxis(np.asarray(volume)[:, :, 0], -1, 2)


class Pretraining:
  """A fixture, its objective, and its weights in our trees."""

  def __init__(self, path):
    self.case, c, self.weights, backbone = read(path)
    self.objective = mae.MAE(
        backbone, {"given": dict(kind="random", context=0.5, target=0.5)},
        target="videomae" if c["norm_pix_loss"] else "pixel",
        decoder=dict(
            width=c["decoder_hidden_size"], depth=c["decoder_num_hidden_layers"],
            heads=c["decoder_num_attention_heads"], positions="flat",
            mlp_ratio=c["decoder_intermediate_size"] / c["decoder_hidden_size"],
            eps=c["layer_norm_eps"], norm_eps=1e-5, biases=backbone.biases,
        ),
    )
    pixels = self.case["in/pixel_values"]
    raw = np.moveaxis(pixels, 2, -1)
    if c["num_channels"] == 3:
      raw = raw * STD.astype(np.float32) + MEAN.astype(np.float32)
    self.batch = {
        "volume": jnp.asarray(raw[:, :, None]), "volume_context": to_volume(pixels),
        "_mask": jnp.ones(len(pixels)), "_position": jnp.arange(len(pixels)),
    }
    hidden = self.case["in/bool_masked_pos"]
    ids = lambda chosen: jnp.asarray([np.flatnonzero(row) for row in chosen], jnp.int32)
    self.split = Split(ids(~hidden), ids(hidden))
    like, _ = jax.eval_shape(self.objective.init, jax.random.key(0), self.batch)
    self.params = {
        "encoder": videomae.load_encoder(
            self.weights["encoder"], like["encoder"], backbone.patch
        ),
        "decoder": videomae.load_decoder(self.weights["decoder"], like["decoder"]),
    }

  def under_their_names(self, params):
    """Returns {name in the file: array} of a tree like the parameters."""
    tables = {
        "encoder": videomae.encoder_table(self.objective.backbone.patch),
        "decoder": videomae.decoder_table(),
    }
    saved = {
        part: engine.save(tables[part], jax.device_get(params[part])) for part in params
    }
    return saved["decoder"] | {
        f"videomae.{name}": value for name, value in saved["encoder"].items()
    }


@pytest.fixture(scope="module", params=PRETRAINED)
def reference(request, shared):
  return Pretraining(shared(f"fixtures/parity/hf_videomae_pretrain_{request.param}"))


def test_encoder_decoder_and_prediction_match(reference):
  case, objective, params = reference.case, reference.objective, reference.params
  volume, split = reference.batch["volume_context"], reference.split
  features, state = objective.backbone.apply(
      {"params": params["encoder"]}, volume, keep_ids=split.context,
      mutable=["intermediates"],
  )
  sown = {k: v[0] for k, v in state["intermediates"].items()}
  case.check("out/embeddings_visible", sown["embedded"])
  for i, block in enumerate(sown["blocks"]):
    case.check(f"out/block_{i}", block)
  whole = objective.backbone.apply({"params": params["encoder"]}, volume).tokens
  case.check("out/unmasked_last_hidden_state", whole)
  decoder = objective._decoder(volume)
  grid = objective._grid(volume)
  found, state = decoder.apply(
      {"params": params["decoder"]}, features.tokens, split, grid,
      mutable=["intermediates"],
  )
  sown = {k: v[0] for k, v in state["intermediates"].items()}
  for i, block in enumerate(sown["blocks"]):
    case.check(f"out/dec_block_{i}", block)
  case.check("out/dec_norm", sown["normed"])
  case.check("out/logits", found)


def test_loss_and_the_gradient_of_every_parameter_and_voxel_match(reference):
  def loss(params, view):
    batch = {**reference.batch, "volume_context": view}
    return reference.objective.loss_on(
        params, {}, batch, (reference.split,), train=True
    )[0]

  found, (gradients, view) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
      reference.params, reference.batch["volume_context"]
  )
  case = reference.case
  case.check("out/loss", found)
  case.check("out/grad_x", from_volume(view))
  # In memory a bias is called query.bias, in the file q_bias.
  memory = lambda name: name.replace("q_bias", "query.bias").replace(
      "v_bias", "value.bias"
  )
  gradients = {
      memory(name): value
      for name, value in reference.under_their_names(gradients).items()
  }
  start = "out/grad/"
  wanted = {k.removeprefix(start) for k in case.arrays if k.startswith(start)}
  assert wanted == set(gradients) and len(wanted) > 50
  for name in wanted:
    case.check(f"out/grad/{name}", gradients[name])


def test_weights_come_back_under_their_names(reference):
  back = reference.under_their_names(reference.params)
  theirs = reference.weights["decoder"] | {
      f"videomae.{name}": value for name, value in reference.weights["encoder"].items()
  }
  assert set(back) == set(theirs)
  for name, value in back.items():
    np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_classification_from_the_mean_of_the_tokens_matches(shared):
  path = shared("fixtures/parity/hf_videomae_classification")
  case, _, weights, backbone = read(path)
  volume = to_volume(case["in/pixel_values"])
  like = jax.eval_shape(lambda: backbone.init(jax.random.key(0), volume))["params"]
  params = videomae.load_encoder(weights["encoder"], like, backbone.patch)
  head = weights["head"]

  def logits(volume):
    pooled = backbone.apply({"params": params}, volume).pooled
    norm = {"scale": head["fc_norm.weight"], "bias": head["fc_norm.bias"]}
    pooled = blocks.layer_norm(eps=1e-5).apply({"params": norm}, pooled)
    return pooled @ head["classifier.weight"].T + head["classifier.bias"]

  found, pull = jax.vjp(logits, volume)
  case.check("out/logits", found)
  (gradient,) = pull(2 * found)  # of the sum of squares
  case.check("out/grad_x", from_volume(gradient))
