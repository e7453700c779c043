"""Where the last block looks, as backbones give it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.backbones import base, vit, vt_former
from vjepa_jax.nn import positions
from vjepa_jax.nn.attention import apply_rope

PATCH, VOXELS, DIMS = (1, 2, 4, 4), (4, 4, 8, 12), (4, 2, 2, 3)
VOLUME = jax.random.normal(jax.random.key(0), (2, *VOXELS, 1))
COMMON = dict(width=24, depth=2, patch=PATCH, heads=2)
# Space first: the last block's input is what its attention over space sees.
FORMER = dict(order="space_first")
CASES = {
    "divided": (vt_former.VTFormer, FORMER),
    "divided, no class": (vt_former.VTFormer, dict(FORMER, class_token=False)),
    "joint": (vt_former.VTFormer, dict(space_time="joint")),
    "joint, no class": (
        vt_former.VTFormer, dict(space_time="joint", class_token=False)
    ),
    "space only": (vt_former.VTFormer, dict(space_time="space_only", remat="full")),
    "ViT": (vit.ViT, dict(positions="learned", class_token=True)),
    "ViT, rotary": (vit.ViT, dict(positions="rope")),
}


@functools.cache
def make(name):
  """A module, and parameters far from their start."""
  module, options = CASES[name]
  model = module(**COMMON, **options)
  params = jax.jit(model.init)(jax.random.key(1), VOLUME)["params"]
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  leaves = [x + 0.4 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
  return model, jax.tree.unflatten(tree, leaves)


@functools.cache
def found(name):
  model, params = make(name)
  return np.asarray(jax.jit(functools.partial(base.attention, model))(params, VOLUME))


def by_hand(name):
  """The same from what enters the last block and its weights, in numpy."""
  model, params = make(name)
  see = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
  _, state = see({"params": params}, VOLUME)
  state = {key: value[0] for key, value in state["intermediates"].items()}
  x, block = np.asarray(state["blocks"][0], np.float64), params["stack"]["blocks"]
  classes = int(getattr(model, "class_token", False))
  whole = model.__class__ is vit.ViT or model.space_time == "joint"
  if model.__class__ is vt_former.VTFormer:
    if not whole:
      x = x.reshape(2, 4, 12, 24)
    if classes:
      cls = np.asarray(state["block_cls"][0], np.float64)  # [B, 1 or T, D]
      cls = cls if whole else np.broadcast_to(cls, (2, 4, 24))[:, :, None]
      x = np.concatenate([cls, x], axis=-2)
  norm = {k: np.asarray(v[1], np.float64) for k, v in block["norm1"].items()}
  y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  y = y * norm["scale"] + norm["bias"]
  q, k = (
      np.einsum("...nd,dhk->...hnk", y, np.asarray(block["attn"][part]["kernel"][1]))
      + np.asarray(block["attn"][part]["bias"][1])[:, None]
      for part in ("query", "key")
  )
  if name == "ViT, rotary":
    rope = positions.rope(model.grid_of(VOXELS), None, 12)
    q, k = (np.asarray(apply_rope(jnp.asarray(a), rope)) for a in (q, k))
  weights = np.exp(np.einsum("...qd,...kd->...qk", q, k) / np.sqrt(12))
  weights /= weights.sum(axis=-1, keepdims=True)
  asking = weights[..., :1, :] if classes else weights
  shares = asking.mean(axis=(-3, -2))[..., classes:].reshape(2, *DIMS)
  return shares / shares.sum(axis=(2, 3, 4), keepdims=True)


@pytest.mark.parametrize("name", CASES)
def test_attention_is_what_the_last_blocks_weights_say(name):
  maps = found(name)
  assert maps.shape == (2, *DIMS) and maps.dtype == np.float32
  np.testing.assert_allclose(maps.sum(axis=(2, 3, 4)), 1.0, rtol=1e-5)
  np.testing.assert_allclose(maps, by_hand(name), rtol=2e-3, atol=1e-5)
  assert maps.max() > 2 / 12  # Not even.


@pytest.mark.parametrize("name", CASES)
def test_without_the_collection_nothing_is_computed(name):
  model, params = make(name)
  assert set(jax.eval_shape(model.init, jax.random.key(0), VOLUME)) == {"params"}

  def products(**options):
    apply = lambda p, v: model.apply({"params": p}, v, **options)
    return str(jax.make_jaxpr(apply)(params, VOLUME)).count("dot_general")

  two = name.startswith("divided")
  # The patches; attention: 3 projections, scores, sums, 1 projection; MLP: 2, for the
  # class tokens of divided blocks apart; over time 6 and its own projection.
  mlp = 4 if "no class" not in name and (two or name == "space only") else 2
  assert products() == 1 + 6 + mlp + 7 * two
  assert products(mutable=["attention"]) == products() + 2


def test_each_block_writes_its_own_and_attention_over_time_none():
  model, params = make("divided")
  see = jax.jit(functools.partial(model.apply, mutable=["attention"]))
  _, state = see({"params": params}, VOLUME)
  (shares,) = jax.tree.leaves(state)
  assert shares.shape == (2, 2, 4, 1 + 12)  # [depth, B, T, class and places]
  assert np.abs(shares[0] - shares[1]).max() > 0.01


def test_frames_of_divided_attention_know_only_themselves():
  model, params = make("space only")
  other = VOLUME.at[:, 2].set(-VOLUME[:, 2])
  attend = jax.jit(functools.partial(base.attention, model))
  changed = np.abs(found("space only") - attend(params, other))
  assert changed[:, 2].max() > 0.01
  assert np.delete(changed, 2, axis=1).max() < 1e-5


def test_padded_grids_and_single_volumes_have_maps_of_their_grid():
  model = vt_former.VTFormer(**COMMON)
  for shape, dims in (((1, 3, 8, 10), (1, 2, 2, 3)), ((2, 4, 5, 4), (2, 2, 2, 1))):
    volume = jnp.ones((3, *shape, 1))
    params = jax.eval_shape(model.init, jax.random.key(0), volume)["params"]
    attend = functools.partial(base.attention, model)
    assert jax.eval_shape(attend, params, volume).shape == (3, *dims)


def test_a_backbone_without_such_attention_is_refused():
  from flax import linen as nn

  class Pool(nn.Module):
    @nn.compact
    def __call__(self, volume, *, spacing=None):
      return base.Features(volume.mean(axis=(2, 3, 4)), None)

  with pytest.raises(ValueError, match="Pool writes down 0 maps"):
    base.attention(Pool(), {}, VOLUME)
