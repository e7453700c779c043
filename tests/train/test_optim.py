"""Decay by name, frozen parameters, clipping that is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.train import optim

PARAMS = {
    "encoder": {
        "blocks": {
            # Scanned over depth 3: biases and scales have two axes here.
            "attention": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))},
            "norm": {"scale": jnp.ones((3, 4)), "bias": jnp.ones((3, 4))},
        },
        "patch": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones((4,))},
    },
    "predictor": {"mask_tokens": jnp.ones((2, 4))},
}


def names(mask):
  return {name for name, chosen in optim.named_leaves(mask).items() if chosen}


def update(optimizer, grads, params=PARAMS, step=0):
  return optimizer.update(grads, optimizer.init(params), params, step=step)


def test_decay_goes_by_name_and_spares_stacked_biases_and_scales():
  assert names(optim.decay_mask(PARAMS)) == {
      "encoder/blocks/attention/kernel", "encoder/patch/kernel",
      "predictor/mask_tokens",
  }


def test_a_rule_of_the_config_comes_before_ours():
  mask = optim.decay_mask(PARAMS, [("mask_tokens$", False)])
  assert "predictor/mask_tokens" not in names(mask)


def test_weight_decay_moves_only_what_decays():
  optimizer = optim.make_optimizer(learning_rate=0.1, weight_decay=0.5)
  updates, _, _ = update(optimizer, jax.tree.map(jnp.zeros_like, PARAMS))
  moved = {n for n, u in optim.named_leaves(updates).items() if np.any(u != 0)}
  assert moved == names(optim.decay_mask(PARAMS))
  np.testing.assert_allclose(updates["encoder"]["patch"]["kernel"], -0.05)


def test_a_name_that_no_rule_covers_is_listed():
  with pytest.raises(ValueError, match=r"covers the parameters \['head/gamma'\]"):
    optim.make_optimizer(learning_rate=0.1).init({"head": {"gamma": jnp.ones(3)}})


def test_frozen_parameters_neither_move_nor_count_nor_have_moments():
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  optimizer = optim.make_optimizer(
      learning_rate=0.1, weight_decay=0.5, frozen=("^encoder/",)
  )
  updates, opt_state, info = update(optimizer, grads)
  assert not any(np.any(u) for u in jax.tree.leaves(updates["encoder"]))
  assert np.all(updates["predictor"]["mask_tokens"] != 0)
  assert info["grad_norm"] == pytest.approx(np.sqrt(8))
  assert not any("encoder" in name for name in optim.named_leaves(opt_state))


def test_a_frozen_pattern_found_nowhere_is_refused_with_close_names():
  optimizer = optim.make_optimizer(learning_rate=0.1, frozen=("encoder/patches/",))
  with pytest.raises(ValueError, match="encoder/patch/kernel"):
    optimizer.init(PARAMS)


def test_clipping_tells_the_norm_before_and_whether_it_acted():
  grads = jax.tree.map(jnp.zeros_like, PARAMS)
  grads["encoder"]["patch"]["bias"] = jnp.array([3.0, 0.0, 4.0, 0.0])
  for limit, clipped in ((4.9, 1.0), (5.1, 0.0), (None, 0.0)):
    optimizer = optim.make_optimizer(learning_rate=0.1, clip_norm=limit)
    _, _, info = update(optimizer, grads)
    assert (info["grad_norm"], info["clipped"]) == (5.0, clipped)
  norm, _, scaled = optim.clip(grads, 1.0)
  np.testing.assert_allclose(
      scaled["encoder"]["patch"]["bias"], [0.6, 0.0, 0.8, 0.0], rtol=1e-6
  )


def test_the_rate_is_that_of_the_global_step_not_of_the_moments_count():
  optimizer = optim.make_optimizer(learning_rate=lambda step: 0.1 * (step + 1))
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  first, _, _ = update(optimizer, grads, step=jnp.asarray(0))
  third, _, _ = update(optimizer, grads, step=jnp.asarray(2))
  close = lambda a, b: np.testing.assert_allclose(3 * a, b, rtol=1e-6)
  jax.tree.map(close, first, third)


def test_a_clip_norm_that_is_not_positive_is_refused():
  with pytest.raises(ValueError, match="clip_norm 0.0 must be positive"):
    optim.make_optimizer(learning_rate=0.1, clip_norm=0.0)


# An encoder of three blocks, as the backbones name its parts.
LAYERS = {
    "encoder": {
        "cls": jnp.ones((1, 1, 4)),
        "patch_embed": {"proj": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}},
        "positions": {"space": jnp.ones((6, 4)), "time": jnp.ones((2, 4))},
        "pos_embed": jnp.ones((1, 6, 4)),
        "stack": {"blocks": {
            "attn": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))},
            "norm": {"scale": jnp.ones((3, 4))},
        }},
        "norm": {"scale": jnp.ones(4)},
    },
    "head": {"norm": {"scale": jnp.ones(4)}, "logits": {"kernel": jnp.ones((4, 2))}},
}


def test_layers_of_an_encoder_learn_the_less_the_earlier_they_come():
  scales = optim.named_leaves(optim.layer_scales(LAYERS, 0.5))
  found = {name: np.ravel(scale).tolist() for name, scale in scales.items()}
  blocks = [0.125, 0.25, 0.5]
  assert found == {
      "encoder/cls": [0.0625],
      "encoder/patch_embed/proj/kernel": [0.0625],
      "encoder/patch_embed/proj/bias": [0.0625],
      "encoder/positions/space": [0.0625],
      "encoder/positions/time": [0.0625],
      "encoder/pos_embed": [0.0625],
      "encoder/stack/blocks/attn/kernel": blocks,
      "encoder/stack/blocks/attn/bias": blocks,
      "encoder/stack/blocks/norm/scale": blocks,
      "encoder/norm/scale": [1.0],
      "head/norm/scale": [1.0],
      "head/logits/kernel": [1.0],
  }


def test_layer_decay_scales_the_updates_and_the_weight_decay():
  grads = jax.tree.map(jnp.ones_like, LAYERS)
  make = lambda **options: optim.make_optimizer(
      learning_rate=0.1, weight_decay=0.5, **options
  )
  plain, _, _ = update(make(), grads, LAYERS)
  scaled, _, _ = update(make(layer_decay=0.5), grads, LAYERS)
  scales = optim.layer_scales(LAYERS, 0.5)
  jax.tree.map(
      lambda a, b, s: np.testing.assert_allclose(a, b * s, rtol=1e-6),
      scaled, plain, scales,
  )
  block = scaled["encoder"]["stack"]["blocks"]["attn"]["kernel"]
  np.testing.assert_allclose(block[:, 0, 0], [-0.15 / 8, -0.15 / 4, -0.15 / 2], rtol=1e-5)


def test_layer_decay_needs_one_stack_of_an_encoder_and_a_share():
  optimizer = optim.make_optimizer(learning_rate=0.1, layer_decay=0.5)
  with pytest.raises(ValueError, match="layer_decay 0.5 needs one stack"):
    optimizer.init({"head": LAYERS["head"]})
  two = {"encoder": {
      "a": {"blocks": {"kernel": jnp.ones((3, 4))}},
      "b": {"blocks": {"kernel": jnp.ones((2, 4))}},
  }}
  with pytest.raises(ValueError, match="there are 2"):
    optimizer.init(two)
  optim.make_optimizer(learning_rate=0.1).init(two)
  for share in (0.0, 1.5):
    with pytest.raises(ValueError, match=f"layer_decay {share} is not in"):
      optim.make_optimizer(learning_rate=0.1, layer_decay=share)


def test_what_is_frozen_until_a_step_stands_still_till_then_and_leaps_not():
  optimizer = optim.make_optimizer(
      learning_rate=0.1, weight_decay=0.5, freeze=("^encoder/",), freeze_steps=3
  )
  free = optim.make_optimizer(learning_rate=0.1, weight_decay=0.5)
  params, opt_state, other = PARAMS, optimizer.init(PARAMS), free.init(PARAMS)
  step = jax.jit(optimizer.update)
  for at in range(5):
    grads = jax.tree.map(lambda p, at=at: jnp.full_like(p, 1.0 + 0.1 * at), params)
    updates, opt_state, _ = step(grads, opt_state, params, step=at)
    wanted, other, _ = free.update(grads, other, params, step=at)
    moved = names(jax.tree.map(lambda u: bool(np.any(u != 0)), updates))
    assert "predictor/mask_tokens" in moved
    assert any("encoder" in name for name in moved) == (at >= 3), at
    # The moments have followed all the while.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), opt_state, other
    )
    if at >= 3:  # Adam's direction is of size 1, and the weights of 1 decay by half.
      bias = np.asarray(updates["encoder"]["patch"]["bias"])
      np.testing.assert_allclose(np.abs(bias), 0.1, rtol=0.02)
      kernel = np.asarray(updates["encoder"]["patch"]["kernel"])
      np.testing.assert_allclose(np.abs(kernel), 0.15, rtol=0.02)


def test_a_pattern_to_freeze_that_is_found_nowhere_is_refused_with_close_names():
  optimizer = optim.make_optimizer(
      learning_rate=0.1, freeze=("encoder/patches/",), freeze_steps=3
  )
  with pytest.raises(ValueError, match="encoder/patch/kernel"):
    optimizer.init(PARAMS)


def test_a_query_that_pools_decays_as_other_tokens():
  assert names(optim.decay_mask({"head": {"query": jnp.ones((1, 4))}})) == {"head/query"}
