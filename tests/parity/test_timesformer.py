"""Published TimeSformers, block by block, from their own checkpoints."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.backbones import vt_former
from vjepa_jax.interop import engine, timesformer
from vjepa_jax.nn import blocks

KINDS = dict(
    divided_space_time="divided", joint_space_time="joint", space_only="space_only"
)
FACEBOOK = ["divided", "divided_1ch", "joint", "space_only"]


@pytest.fixture(autouse=True)
def full_precision():
  with cases.highest():
    yield


class Reference:
  """A fixture, its weights in a VT-Former, and our results under its names."""

  def __init__(self, path):
    self.case = cases.load(path)
    c = self.case.config
    self.hugging_face = "hidden_size" in c
    take = lambda *names: next(c[name] for name in names if name in c)
    width, size = take("embed_dim", "hidden_size"), take("img_size", "image_size")
    patch = (1, 1, c["patch_size"], c["patch_size"])
    channels, frames = take("in_chans", "num_channels"), c["num_frames"]
    ratio = c["mlp_ratio"] if "mlp_ratio" in c else c["intermediate_size"] / width
    self.model = vt_former.VTFormer(
        width=width, depth=take("depth", "num_hidden_layers"), patch=patch,
        heads=take("num_heads", "num_attention_heads"), mlp_ratio=ratio,
        space_time=KINDS[c["attention_type"]], class_position=True,
        table_voxels=(frames, 1, size, size), table_resize="nearest",
    )
    shape = (1, frames, 1, size, size, channels)
    like = jax.eval_shape(lambda: self.model.init(jax.random.key(0), jnp.zeros(shape)))
    file = "hf" if self.hugging_face else "checkpoint_epoch_00001.pyth"
    self.weights = timesformer.read(path / file)
    self.params = timesformer.load_encoder(
        self.weights["encoder"], like["params"], patch
    )

  def volume(self, number):
    if self.hugging_face:  # [B, T, C, H, W]
      frames = np.moveaxis(self.case[f"in/pixel_values_{number}"], 2, -1)
      return jnp.asarray(frames[:, :, None])
    return cases.volume(self.case[f"in/x_{number}"])

  def results(self, number):
    """Returns {name after out/inN/: array}."""
    volume = self.volume(number)

    def forward(volume):
      features, state = self.model.apply(
          {"params": self.params}, volume, mutable=["intermediates"]
      )
      return self._logits(features, state), (features, state)

    logits, pull, (features, state) = jax.vjp(forward, volume, has_aux=True)
    sown = {k: v[0] for k, v in state["intermediates"].items()}
    t, n = features.grid.dims[0], features.grid.places
    found = {"logits": logits, "norm": self._normed(features, sown, t, n)}
    for i, (tokens, cls) in enumerate(zip(sown["blocks"], sown["block_cls"])):
      found[f"block_{i}"] = self._order(tokens, cls, t, n)
    (gradient,) = pull(2 * logits / logits.size)  # of the mean square
    axis = 2 if self.hugging_face else 1
    found["grad_x"] = np.moveaxis(np.asarray(gradient)[:, :, 0], -1, axis)
    return found

  def _order(self, tokens, cls, t, n):
    """[B, T n, D] in (t, h, w) and the class tokens -> as the reference has them."""
    frames = tokens.reshape(len(tokens), t, n, -1)
    if self.model.space_time == "space_only":
      joined = np.concatenate([cls[:, :, None], frames], axis=2)
      return joined.reshape(-1, n + 1, joined.shape[-1])
    ordered = frames.swapaxes(1, 2).reshape(len(tokens), t * n, -1)  # (h, w, t)
    return np.concatenate([cls, ordered], axis=1)

  def _norm(self, x):
    return blocks.layer_norm().apply({"params": self.params["norm"]}, x)

  def _normed(self, features, sown, t, n):
    if self.model.space_time != "space_only":
      return self._order(features.tokens, features.cls[:, None], t, n)
    last = self._order(sown["blocks"][-1], sown["block_cls"][-1], t, n)
    if not self.hugging_face:
      # facebookresearch takes the mean over the frames first.
      last = last.reshape(-1, t, *last.shape[1:]).mean(axis=1)
    return self._norm(last)

  def _logits(self, features, state):
    head, cls = self.weights["head"], features.cls
    if self.hugging_face and self.model.space_time == "space_only":
      # Hugging Face forgets to take the mean: logits of every frame.
      own = state["intermediates"]["block_cls"][0][-1]
      cls = self._norm(own.reshape(-1, own.shape[-1]))
    return cls @ head["weight"].T + head["bias"]


@pytest.mark.parametrize("source", ["fb", "hf"])
@pytest.mark.parametrize("name", FACEBOOK)
def test_published_models_match_at_every_depth(shared, source, name):
  reference = Reference(shared(f"fixtures/parity/{source}_timesformer_{name}"))
  case = reference.case
  results = [key for key in case.arrays if key.startswith("out/in")]
  inputs = sorted({key.split("/")[1] for key in results})
  for place in inputs:
    found = reference.results(int(place.removeprefix("in")))
    wanted = {
        key.split("/")[2] for key in results if key.startswith(f"out/{place}/")
    } - {"patch_embed", "embeddings"}
    assert wanted == set(found)
    for key in wanted:
      case.check(f"out/{place}/{key}", found[key])


@pytest.mark.parametrize("source", ["fb", "hf"])
def test_weights_come_back_under_their_names(shared, source):
  reference = Reference(shared(f"fixtures/parity/{source}_timesformer_divided"))
  table = timesformer.encoder_table(
      reference.model.patch, hugging_face=reference.hugging_face
  )
  back = engine.save(table, reference.params)
  assert set(back) == set(reference.weights["encoder"])
  for name, value in back.items():
    np.testing.assert_array_equal(
        value, reference.weights["encoder"][name], err_msg=name
    )


def test_a_joint_checkpoint_does_not_fill_a_divided_model(shared):
  divided = Reference(shared("fixtures/parity/fb_timesformer_divided"))
  joint = Reference(shared("fixtures/parity/fb_timesformer_joint"))
  with pytest.raises(ValueError, match="missing: stack/blocks/time_attn"):
    timesformer.load_encoder(
        joint.weights["encoder"], divided.params, divided.model.patch
    )
