"""What must hold for a V-JEPA to learn anything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.backbones import vit
from vjepa_jax.objectives import vjepa

MASKS = {
    "short": dict(
        kind="blocks", count=4, spatial_scale=0.2, depth_scale=1.0,
        aspect=(0.75, 1.5), context=0.3, target=0.3,
    ),
    "long": dict(
        kind="blocks", count=1, spatial_scale=0.6, depth_scale=1.0,
        aspect=(0.75, 1.5), context=0.2, target=0.4,
    ),
}
VOXELS = (1, 6, 20, 28)
PATCH = (1, 2, 4, 4)  # an odd grid: 3 x 5 x 7 tokens


def make_objective(**options):
  backbone = vit.build(
      "tiny", width=24, depth=2, heads=2, patch=PATCH, rope_base=100.0,
      initializer="xavier",
  )
  options = {
      "masks": MASKS,
      "predictor": dict(width=24, depth=1, heads=2, initializer="xavier"),
      "momentum_start": 0.9, "momentum_end": 0.9,
  } | options
  return vjepa.VJEPA(backbone, **options)


def make_batch(rows=4, seed=0):
  volume = np.random.default_rng(seed).normal(size=(rows, *VOXELS, 1))
  return {
      "volume": jnp.asarray(volume, jnp.float32),
      "spacing": jnp.full((rows, 4), 0.1, jnp.float32),
      "_mask": jnp.ones(rows),
      "_position": jnp.arange(rows),
  }


def initial(objective, batch):
  return jax.jit(objective.init)(jax.random.key(0), batch)


def masks_of(objective, batch, seed=3):
  return jax.jit(objective.draw_masks)(batch, jax.random.key(seed))


@functools.cache
def loss_and_gradients(objective):
  """Compiles once: ((loss, (state, metrics)), gradients by params, target, view)."""

  def loss(params, target, view, state, batch, splits):
    return objective.loss_on(
        params, {**state, "target": target}, {**batch, "volume_context": view},
        splits, train=True,
    )

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def evaluate(objective, params, state, batch, splits):
  """Returns loss and {params, target, view: gradient} for given masks."""
  view = batch.get("volume_context", batch["volume"])
  batch = {k: v for k, v in batch.items() if k != "volume_context"}
  (loss, _), gradients = loss_and_gradients(objective)(
      params, state["target"], view, state, batch, splits
  )
  return float(loss), dict(zip(("params", "target", "view"), gradients, strict=True))


def drawn_loss(objective, *, train=True):
  return jax.jit(functools.partial(objective.loss, train=train))


@pytest.fixture(scope="module")
def setup():
  objective, batch = make_objective(), make_batch()
  params, state = initial(objective, batch)
  # A predictor with zero mask tokens and an equal target would hide mistakes.
  noise = lambda tree, seed: jax.tree.map(
      lambda x: x + 0.05 * jax.random.normal(jax.random.key(seed), x.shape), tree
  )
  params = noise(params, 1)
  state = {**state, "target": noise(state["target"], 2)}
  return objective, params, state, batch


def token_grid(objective, batch):
  return objective._grid(batch["volume"])


def voxels_of(objective, batch, ids):
  """Marks the voxels that belong to the given token ids, [B, T, Z, Y, X, C]."""
  grid = token_grid(objective, batch)
  hit = np.zeros((ids.shape[0], grid.tokens, int(np.prod(PATCH))), np.float32)
  for row, row_ids in enumerate(np.asarray(ids)):
    hit[row, row_ids] = 1.0
  return np.asarray(grid.unpatchify(jnp.asarray(hit)))


def prediction_of(objective, params, state, split, group):
  return jax.jit(
      lambda b: objective._predictor.apply(
          {"params": params["predictor"]},
          objective._context(params, b, split, False, None), split,
          token_grid(objective, b), group=group,
      )[0]
  )


def test_gradient_with_respect_to_masked_context_voxels_is_zero(setup):
  objective, params, state, batch = setup
  splits = masks_of(objective, batch)
  _, gradients = evaluate(objective, params, state, batch, splits)
  # A voxel counts as seen where either group's context shows it.
  kept = sum(voxels_of(objective, batch, s.context) for s in splits) > 0
  gradient = np.asarray(gradients["view"])
  assert 0 < kept.mean() < 0.9
  assert np.abs(gradient[~kept]).max() == 0.0
  assert np.abs(gradient[kept]).max() > 0.0


def test_changing_hidden_voxels_leaves_the_prediction_unchanged(setup):
  objective, params, state, batch = setup
  for group, split in enumerate(masks_of(objective, batch)):
    kept = voxels_of(objective, batch, split.context)
    other = {**batch, "volume": jnp.where(kept > 0, batch["volume"], 7.0)}
    predict = prediction_of(objective, params, state, split, group)
    np.testing.assert_array_equal(predict(batch), predict(other))


def test_target_sees_every_token_and_carries_no_gradient(setup):
  objective, params, state, batch = setup
  _, gradients = evaluate(objective, params, state, batch, masks_of(objective, batch))
  largest = lambda tree: max(np.abs(np.asarray(g)).max() for g in jax.tree.leaves(tree))
  assert largest(gradients["target"]) == 0.0
  assert largest(gradients["params"]) > 0.0
  targets = jax.jit(objective.targets)
  changed = {**batch, "volume": batch["volume"].at[:, :, 0].add(1.0)}
  assert targets(state, batch).shape[1] == token_grid(objective, batch).tokens
  assert not np.allclose(targets(state, batch), targets(state, changed))


def test_after_update_moves_the_target_by_one_minus_momentum_times_the_gap(setup):
  objective, params, state, batch = setup
  moved = objective.after_update(params, state, jnp.asarray(0))
  for before, online, after in zip(
      *(jax.tree.leaves(t) for t in (state["target"], params["encoder"], moved["target"])),
      strict=True,
  ):
    np.testing.assert_allclose(after - before, 0.1 * (online - before), atol=1e-6)


def test_momentum_runs_from_start_to_end_and_stays():
  objective = make_objective(momentum_start=0.9, momentum_end=1.0, momentum_steps=10)
  values = [float(objective.momentum(s)) for s in (0, 5, 10, 50)]
  np.testing.assert_allclose(values, [0.9, 0.95, 1.0, 1.0], rtol=1e-6)


def test_padding_rows_add_nothing(setup):
  objective, params, state, batch = setup
  key = jax.random.key(5)
  padded = {k: jnp.concatenate([v, v[:2]]) for k, v in batch.items()}
  padded["_mask"] = padded["_mask"].at[4:].set(0.0)
  padded["_position"] = jnp.arange(6)
  loss = drawn_loss(objective, train=False)
  one, two = loss(params, state, batch, key), loss(params, state, padded, key)
  np.testing.assert_allclose(one[0], two[0], rtol=1e-6)
  assert float(two[1][1]["loss"][1]) == 4.0


def test_a_row_has_the_same_masks_whatever_batch_it_comes_in(setup):
  objective, _, _, batch = setup
  whole = masks_of(objective, batch)
  half = masks_of(objective, {k: v[2:] for k, v in batch.items()})
  for a, b in zip(whole, half, strict=True):
    np.testing.assert_array_equal(a.context[2:], b.context)
    np.testing.assert_array_equal(a.target[2:], b.target)


def test_invalid_tokens_of_a_split_change_no_loss(setup):
  objective, params, state, batch = setup
  split, rest = masks_of(objective, batch)
  # The last two of each are declared padding; their ids must not matter.
  valid = lambda ids: jnp.ones(ids.shape, bool).at[:, -2:].set(False)
  first = split.replace(
      context_valid=valid(split.context), target_valid=valid(split.target)
  )
  other = first.replace(
      context=first.context.at[:, -2:].set(first.context[:, :2]),
      target=first.target.at[:, -2:].set(first.target[:, :2]),
  )
  loss = lambda s: evaluate(objective, params, state, batch, (s, rest))[0]
  np.testing.assert_allclose(loss(first), loss(other), rtol=1e-6)
  assert abs(loss(first) - loss(split)) > 1e-6


@pytest.mark.parametrize("kind", ["l1", "l2", "smooth_l1"])
def test_losses_match_their_definitions(kind):
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 3, 8))
  d = np.abs(a - b)
  want = {
      "l1": d, "l2": d**2 / 2, "smooth_l1": np.where(d < 1, d**2 / 2, d - 0.5)
  }[kind].mean(-1)
  got = vjepa.token_loss(jnp.asarray(a), jnp.asarray(b), kind, "layer_norm")
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_cosine_loss_is_two_minus_two_cos_at_any_width():
  for width in (8, 512):
    a, b = np.random.default_rng(width).normal(size=(2, 1, 3, width))
    cos = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    got = vjepa.token_loss(
        jnp.asarray(a), vjepa.normalize_target(jnp.asarray(b), "l2"), "cosine", "l2"
    )
    np.testing.assert_allclose(got, 2 - 2 * cos, rtol=1e-5)


def test_context_prediction_adds_a_warmed_up_term(setup):
  plain, params, state, batch = setup
  ramped = make_objective(context_weight=0.5, context_warmup_steps=4)
  key = jax.random.key(1)
  late = {**state, "updates": jnp.asarray(9)}
  base = float(drawn_loss(plain)(params, state, batch, key)[0])
  loss = drawn_loss(ramped)
  extra_first = float(loss(params, state, batch, key)[0]) - base
  extra_late = float(loss(params, late, batch, key)[0]) - base
  assert extra_late > 0
  np.testing.assert_allclose(extra_first, extra_late / 4, rtol=1e-3)


def test_variance_term_punishes_equal_predictions(setup):
  plain, params, state, batch = setup
  regular = make_objective(variance_weight=1.0)
  flat = jax.tree.map(jnp.zeros_like, params["predictor"])
  params = {**params, "predictor": flat}  # every prediction is the same vector
  key = jax.random.key(1)
  gap = (
      drawn_loss(regular)(params, state, batch, key)[0]
      - drawn_loss(plain)(params, state, batch, key)[0]
  )
  np.testing.assert_allclose(gap, 1.0 - 1e-2, rtol=1e-3)  # std floor sqrt(1e-4)


def test_mlp_predictor_with_batch_norm_learns_statistics_and_uses_them_in_evaluation():
  objective = make_objective(
      predictor=dict(kind="mlp", width=16, norm="batch"),
      target_norm="l2", loss_kind="cosine",
  )
  batch = make_batch()
  params, state = initial(objective, batch)
  key = jax.random.key(1)
  _, (trained, _) = drawn_loss(objective)(params, state, batch, key)
  _, (evaluated, _) = drawn_loss(objective, train=False)(params, state, batch, key)
  changed = lambda s: any(
      not np.array_equal(a, b) for a, b in zip(
          jax.tree.leaves(s["batch_stats"]), jax.tree.leaves(state["batch_stats"])
      )
  )
  assert changed(trained) and not changed(evaluated)


def test_groups_of_one_size_are_predicted_in_one_pass_as_one_by_one(setup):
  _, params, state, batch = setup
  sized = {
      "short": MASKS["short"] | dict(context=30, target=33),
      "long": MASKS["long"] | dict(context=21, target=42),
  }
  objective = make_objective(masks=sized)
  splits = masks_of(objective, batch)
  keep = lambda ids: jnp.arange(ids.shape[1])[None] < ids.shape[1] - 5
  valid = jnp.broadcast_to(keep(splits[1].target), splits[1].target.shape)
  splits = (splits[0], splits[1].replace(target_valid=valid))
  joined = jax.jit(
      lambda b: objective._predict(params, state, b, splits, False, None)[0]
  )
  text = str(jax.make_jaxpr(joined)(batch))
  assert f"[{2 * len(batch['volume'])},63," in text
  for group, (split, (found, _)) in enumerate(zip(splits, joined(batch))):
    wanted = prediction_of(objective, params, state, split, group)(batch)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_mlp_prediction_depends_on_the_place_and_on_the_context(setup):
  _, _, _, batch = setup
  objective = make_objective(predictor=dict(kind="mlp", norm="none"))
  params, state = initial(objective, batch)
  split = masks_of(objective, batch)[0]
  predict = prediction_of(objective, params, state, split, 0)
  assert np.abs(predict(batch)[:, 0] - predict(batch)[:, 1]).max() > 0
  assert np.abs(predict(batch) - predict(make_batch(seed=9))).max() > 0


def test_photometric_view_reaches_the_context_only(setup):
  objective, params, state, batch = setup
  splits = masks_of(objective, batch)
  # A context of other brightness, so that LayerNorm cannot undo it.
  shown = {**batch, "volume_context": batch["volume"] ** 2}
  targets = jax.jit(objective.targets)
  np.testing.assert_array_equal(targets(state, batch), targets(state, shown))
  loss = lambda b: evaluate(objective, params, state, b, splits)[0]
  assert loss(batch) != loss(shown)


def test_faults_are_listed_together():
  faults = vjepa.objective_faults(
      masks={}, target_norm="rms", loss_kind="l3", momentum_start=1.2
  )
  text = "\n".join(faults)
  for word in ("masks", "target_norm", "loss_kind", "momentum_start"):
    assert word in text
  with pytest.raises(ValueError, match="target_norm"):
    make_objective(target_norm="rms")
