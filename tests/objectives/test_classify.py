"""What must hold for an encoder and a head to learn classes and stages from labels."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vjepa_jax.backbones import vit, vt_former
from vjepa_jax.backbones.base import Features
from vjepa_jax.objectives import classify
from vjepa_jax.train import optim
from vjepa_jax.volumes.grid import Grid

VOXELS = (4, 4, 8, 12)  # 4 times 2 x 2 x 3 places
K = 5
MINUTE = 60.0
OVER_TIME = dict(
    transition_weight=0.5, monotone_weight=0.4, smooth_weight=0.3, order_weight=0.2
)
CASES = dict(
    frames=dict(backbone="vt_former", labels="frame_label"),
    over_time=dict(
        patch=(2, 2, 4, 4), labels="frame_label",
        head=dict(pool="attention", heads=2), **OVER_TIME,
    ),
    volume=dict(head=dict(hidden=8)),
    cls=dict(class_token=True, head=dict(pool="cls")),
)


def make_backbone(name="vit", patch=(1, 2, 4, 4), **options):
  module = {"vit": vit.ViT, "vt_former": vt_former.VTFormer}[name]
  common = dict(width=16, depth=1, heads=2, patch=patch, initializer="xavier")
  return module(**(common | options))


def make(backbone="vit", patch=(1, 2, 4, 4), class_token=False, drop_path=0.0,
         depth=1, classes=K, stride=None, **objective):
  strided = {} if stride is None else {"stride": stride}
  encoder = make_backbone(
      backbone, patch=patch, class_token=class_token, drop_path=drop_path, depth=depth,
      **strided,
  )
  return classify.Classify(encoder, classes, **objective)


def make_batch(rows=4, seed=0, classes=K, dt=MINUTE):
  rng = np.random.default_rng(seed)
  spacing = np.tile(np.float32([dt, 1, 1, 1]), (rows, 1))
  return {
      "volume": jnp.asarray(rng.normal(size=(rows, *VOXELS, 1)), jnp.float32),
      "spacing": jnp.asarray(spacing),
      "label": jnp.asarray(rng.integers(0, classes, rows), jnp.int32),
      "frame_label": jnp.asarray(rng.integers(0, classes, (rows, 4)), jnp.int32),
      "_mask": jnp.ones(rows),
      "_position": jnp.arange(rows, dtype=jnp.int32),
  }


def noisy(params, scale=0.2):
  """Parameters away from their start, so that zeros and small draws count."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return jax.tree.unflatten(tree, [
      x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)
  ])


class Case:
  """An objective, noisy parameters, a batch, and what is compiled once."""

  def __init__(self, **options):
    self.objective = make(**options)
    self.batch = make_batch(classes=options.get("classes", K))
    params, self.state = jax.jit(self.objective.init)(jax.random.key(0), self.batch)
    self.start, self.params = params, noisy(params)
    functions = self.objective.functions()
    self._logits = jax.jit(functions["logits"])

    def loss(params, batch, key, train):
      return self.objective.loss(params, self.state, batch, key, train=train)

    self._loss = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=3)
    self._value = jax.jit(loss, static_argnums=3)

  def logits(self, **changes):
    return np.asarray(self._logits(self.params, self.state, self.batch | changes))

  def loss(self, batch=None, key=7, train=True):
    """Returns (loss, {name: (sum, weight)}, gradients)."""
    (loss, (_, metrics)), gradients = self._loss(
        self.params, batch or self.batch, jax.random.key(key), train
    )
    return float(loss), jax.tree.map(float, metrics), gradients


  def variant(self, **changes):
    """Returns the loss of a batch, of the same parameters and other options."""
    loss = dataclasses.replace(self.objective, **changes).loss
    return lambda batch: jax.jit(functools.partial(loss, train=True))(
        self.params, self.state, batch, jax.random.key(0)
    )[0]

  def value(self, key=7, train=True, **changes):
    batch = self.batch | changes
    return float(self._value(self.params, batch, jax.random.key(key), train)[0])


@functools.cache
def case(name):
  return Case(**CASES[name])


def close(one, other, tolerance=2e-5):
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=tolerance),
      one, other,
  )


@pytest.mark.parametrize("name", CASES)
def test_logits_follow_the_input_and_have_a_row_for_each_label(name):
  c = case(name)
  found = c.logits()
  labels = c.batch[c.objective.labels]
  assert found.shape == (*labels.shape, K) and found.dtype == np.float32
  other = c.logits(volume=c.batch["volume"].at[1, 1].add(1.0))
  changed = np.abs(other - found).max(axis=-1).reshape(len(found), -1)
  assert changed[1].min() > 1e-4 and changed[[0, 2, 3]].max() == 0.0


@pytest.mark.parametrize("pool", ["mean", "max", "attention"])
def test_a_head_of_frames_pools_each_frame_by_itself_and_one_of_volumes_all(pool):
  tokens = jax.random.normal(jax.random.key(0), (4, 48, 16))
  features = Features(tokens=tokens, grid=Grid(VOXELS, (1, 2, 4, 4)))
  third = jax.random.normal(jax.random.key(2), (4, 12, 16))
  moved = features.replace(tokens=tokens.at[:, 24:36].add(third))
  for frames in (True, False):
    head = classify.Head(K, pool=pool, frames=frames, heads=2, scale=1.0)
    params = noisy(head.init(jax.random.key(1), features)["params"])
    one, two = (head.apply({"params": params}, f)[0] for f in (features, moved))
    changed = np.abs(one - two).max(axis=-1)
    assert changed.shape == ((4, 4) if frames else (4,))
    if frames:
      assert changed[:, 2].min() > 1e-3 and changed[:, [0, 1, 3]].max() == 0
    else:
      assert changed.min() > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_each_parameter_gets_gradient_and_has_a_rule_of_decay(name):
  c = case(name)
  optim.decay_mask(c.params)
  _, _, gradients = c.loss()
  for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
    where = jax.tree_util.keystr(path)
    if "key" in where and "bias" in where:  # Softmax does not see it.
      continue
    layers = len(gradient) if "blocks" in where else 1  # Stacked over depth.
    units = np.abs(gradient).reshape(layers, -1, gradient.shape[-1]).max(axis=1)
    silent = np.sum(units == 0)
    assert silent == 0, f"{where}: {silent} units without gradient"


@pytest.mark.parametrize("frames", [4, 1])
def test_through_a_class_token_alone_every_layer_of_divided_attention_learns(frames):
  """Also of single time points, with positions in time that were made for four."""
  backbone = make_backbone(
      "vt_former", class_token=True, depth=2, table_voxels=VOXELS
  )
  objective = classify.Classify(backbone, K, head=dict(pool="cls"))
  batch = make_batch()
  batch["volume"] = batch["volume"][:, :frames]
  shapes, state = jax.eval_shape(objective.init, jax.random.key(0), batch)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda p: np.float32(0.3 * rng.normal(size=p.shape)), shapes)

  def loss(params, volume):
    seen = batch | {"volume": volume}
    return objective.loss(params, state, seen, jax.random.key(0), train=True)[0]

  grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
  gradients, voxels = grad(params, batch["volume"])
  assert np.abs(voxels).max(axis=(2, 3, 4, 5)).min() > 0  # of every clip and time
  # A softmax does not see a constant, and one of a single time point sees nothing.
  blind = ("['key']['bias']",)
  if frames == 1:
    blind += ("['time_attn']['query']", "['time_attn']['key']")
  found = jax.tree_util.tree_flatten_with_path(gradients)[0]
  assert len(found) > 30
  for path, gradient in found:
    where = jax.tree_util.keystr(path)
    if any(name in where for name in blind):
      continue
    layers = 2 if "stack" in where else 1
    units = np.abs(gradient).reshape(layers, -1, gradient.shape[-1]).max(axis=1)
    assert units.min() > 0, f"{where}: {np.sum(units == 0)} units without gradient"


@pytest.mark.parametrize("name", ["frames", "over_time"])
def test_frames_of_one_patch_share_their_logits(name):
  found = case(name).logits()
  assert found.shape == (4, 4, K)
  pairs = np.abs(np.diff(found, axis=1)).max(axis=(0, 2))
  if name == "over_time":
    assert pairs[0] == pairs[2] == 0.0 < 1e-3 < pairs[1]
  else:
    assert pairs.min() > 1e-3


def test_a_movie_that_no_patch_divides_has_logits_of_its_own_frames_only():
  objective = make("vt_former", patch=(3, 2, 4, 4), labels="frame_label")
  batch = make_batch()
  params, state = jax.jit(objective.init)(jax.random.key(0), batch)
  found = jax.jit(objective.functions()["logits"])(noisy(params), state, batch)
  assert found.shape == (4, 4, K)
  np.testing.assert_array_equal(found[:, 0], found[:, 2])
  assert np.abs(found[:, 2] - found[:, 3]).max() > 1e-3


@pytest.mark.parametrize("patch, stride, wanted", [
    ((2, 4, 4, 4), (1, 4, 4, 4), [0, 1, 2, 3, 4, 4]),
    ((3, 4, 4, 4), (2, 4, 4, 4), [0, 0, 1, 1, 2, 2]),
    ((2, 4, 4, 4), None, [0, 0, 1, 1, 2, 2]),
    ((1, 4, 4, 4), None, [0, 1, 2, 3, 4, 5]),
])
def test_a_time_point_has_the_logits_of_the_token_that_begins_last_before_it(
    patch, stride, wanted
):
  objective = make("vt_former", patch=patch, stride=stride, labels="frame_label")
  rng = np.random.default_rng(0)
  batch = make_batch(rows=2) | {
      "volume": jnp.asarray(rng.normal(size=(2, 6, 4, 8, 8, 1)), jnp.float32),
  }
  params, state = jax.jit(objective.init)(jax.random.key(0), batch)
  params, functions = noisy(params), objective.functions()
  found = jax.jit(functions["logits"])(params, state, batch)
  features = jax.jit(functions["features"])(params, state, batch)
  tokens, _ = objective._head.apply({"params": params["head"]}, features)
  assert tokens.shape == (2, max(wanted) + 1, K) and found.shape == (2, 6, K)
  np.testing.assert_allclose(found, tokens[:, np.array(wanted)], rtol=1e-5, atol=1e-6)
  # The last time point is of the last token, and moves what the loss says.
  label = jnp.full((2, 6), -1).at[:, 5].set(1)
  loss = lambda batch: objective.loss(
      params, state, batch, jax.random.key(0), train=False
  )[0]
  entropy = optax.softmax_cross_entropy_with_integer_labels(found[:, 5], label[:, 5])
  np.testing.assert_allclose(
      jax.jit(loss)(batch | {"frame_label": label}), entropy.mean(), rtol=1e-5
  )


def test_losses_over_time_compare_tokens_and_not_the_time_points_in_one():
  c = case("over_time")  # Four time points, two tokens.
  tokens = c.logits()[:, ::2]
  chances = jax.nn.softmax(jnp.asarray(tokens))
  allowed = classify.allowed_transitions(K, c.batch["spacing"][:, 0], max_skip=1.0)
  wanted = dict(
      transition=classify.transition_loss(chances, allowed),
      monotone=classify.monotone_loss(chances),
      smooth=classify.smooth_loss(chances),
  )
  _, metrics, _ = c.loss()
  for name, values in wanted.items():
    np.testing.assert_allclose(metrics[name][0], values.sum(), rtol=1e-4)


@pytest.mark.parametrize("name", classify.OVER_TIME)
@pytest.mark.parametrize("frames, patch", [(1, 1), (2, 2), (4, 4)])
def test_losses_over_time_of_one_token_in_time_are_refused(name, frames, patch):
  objective = make(patch=(patch, 2, 4, 4), labels="frame_label", **{name: 0.1})
  two = make_batch()
  one = two | {k: two[k][:, :frames] for k in ("volume", "frame_label")}
  words = re.escape(f"objective.{name}: 0.1 with one token along T (T={frames}, patch")
  with pytest.raises(ValueError, match=words):
    jax.eval_shape(objective.init, jax.random.key(0), one)
  if frames < 4:
    params, state = jax.eval_shape(objective.init, jax.random.key(0), two)
    loss = functools.partial(objective.loss, train=True)
    with pytest.raises(ValueError, match=words):
      jax.eval_shape(loss, params, state, one, jax.random.key(0))


def test_one_token_in_time_is_well_without_losses_over_time():
  objective = make(patch=(4, 2, 4, 4), labels="frame_label")
  batch = make_batch()
  params, state = jax.jit(objective.init)(jax.random.key(0), batch)
  loss = jax.jit(functools.partial(objective.loss, train=True))
  assert np.isfinite(loss(params, state, batch, jax.random.key(0))[0])


def test_an_unknown_time_point_counts_for_nothing():
  c = case("frames")
  labels = np.array(c.batch["frame_label"])
  labels[:, 2] = -1
  loss, metrics, gradients = c.loss(c.batch | {"frame_label": jnp.asarray(labels)})

  def expected(params):
    logits = c.objective.functions()["logits"](params, c.state, c.batch)
    kept = np.array([0, 1, 3])
    return optax.softmax_cross_entropy_with_integer_labels(
        logits[:, kept], c.batch["frame_label"][:, kept]
    ).mean()

  wanted, wanted_gradients = jax.jit(jax.value_and_grad(expected))(c.params)
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)
  close(gradients, wanted_gradients)
  right = (c.logits().argmax(-1) == labels).sum()
  assert metrics["accuracy"] == (right, 12.0)


@pytest.mark.parametrize("name", ["over_time", "volume"])
def test_a_row_without_a_label_changes_nothing(name):
  c = case(name)
  key = c.objective.labels
  other = c.batch["volume"].at[3].add(1.0)
  unknown = c.loss(
      c.batch | {key: c.batch[key].at[3].set(-1), "volume": other}
  )
  close(unknown, c.loss(c.batch | {"_mask": c.batch["_mask"].at[3].set(0.0)}))
  assert unknown[1]["loss"][1] == 3.0
  nothing = c.batch | {key: jnp.full_like(c.batch[key], -1)}
  loss, metrics, gradients = c.loss(nothing)
  assert loss == 0.0 and all(pair == (0.0, 0.0) for pair in metrics.values())
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", ["over_time", "volume"])
def test_the_loss_is_its_metrics_ratio_and_that_of_its_parts(name):
  c = case(name)
  loss, metrics, _ = c.loss()
  means = {name: total / weight for name, (total, weight) in metrics.items()}
  np.testing.assert_allclose(loss, means["loss"], rtol=1e-6)
  parts = {k.removesuffix("_weight"): w for k, w in OVER_TIME.items()}
  if name == "volume":
    assert set(means) == {"loss", "cross_entropy", "accuracy"}
    parts = {}
  assert all(means[part] > 0 for part in parts)
  total = means["cross_entropy"] + sum(w * means[part] for part, w in parts.items())
  np.testing.assert_allclose(loss, total, rtol=1e-5)


@pytest.mark.parametrize("name", ["over_time", "volume"])
def test_halves_of_a_batch_joined_by_weight_are_the_whole(name):
  c = case(name)
  key = c.objective.labels
  batch = c.batch | {key: c.batch[key].at[1].set(-1)}  # The halves weigh 1 and 2.
  whole = c.loss(batch)
  halves = [c.loss({k: v[part] for k, v in batch.items()})
            for part in (slice(0, 2), slice(2, 4))]
  weights = [half[1]["loss"][1] for half in halves]
  assert weights == [1.0, 2.0]
  joined = jax.tree.map(
      lambda a, b: (weights[0] * a + weights[1] * b) / 3, halves[0][2], halves[1][2]
  )
  close(whole[2], joined)
  close(whole[1], jax.tree.map(lambda a, b: a + b, halves[0][1], halves[1][1]), 1e-4)


def test_a_clip_without_labels_at_some_times_weighs_as_much_as_one_with_all():
  c = case("frames")
  labels = np.array(c.batch["frame_label"])
  labels[0, 1:] = -1
  loss, _, _ = c.loss(c.batch | {"frame_label": jnp.asarray(labels)})
  logits = c.logits()
  entropy = np.asarray(optax.softmax_cross_entropy_with_integer_labels(
      logits, c.batch["frame_label"]
  ))
  np.testing.assert_allclose(
      loss, np.mean([entropy[0, 0], *entropy[1:].mean(axis=1)]), rtol=1e-5
  )


def test_smoothed_targets_sum_to_one_and_go_to_all_or_to_neighbours():
  labels = jnp.asarray([[0, 2, 4]])
  plain = classify.smoothed_targets(labels, K, smoothing=0.2, ordinal=False)
  np.testing.assert_allclose(plain.sum(axis=-1), 1.0, rtol=1e-6)
  np.testing.assert_allclose(plain[0, 1], [0.05, 0.05, 0.8, 0.05, 0.05], rtol=1e-6)
  ordinal = classify.smoothed_targets(labels, K, smoothing=0.2, ordinal=True)
  np.testing.assert_allclose(ordinal[0], [
      [0.8, 0.2, 0, 0, 0], [0, 0.1, 0.8, 0.1, 0], [0, 0, 0, 0.2, 0.8],
  ], rtol=1e-6)
  none = classify.smoothed_targets(labels, K, smoothing=0.0, ordinal=False)
  np.testing.assert_array_equal(none[0], np.eye(K)[[0, 2, 4]])


def test_smoothing_is_in_the_loss():
  c = case("volume")
  targets = classify.smoothed_targets(
      c.batch["label"], K, smoothing=0.4, ordinal=False
  )
  wanted = optax.softmax_cross_entropy(c.logits(), targets).mean()
  np.testing.assert_allclose(
      c.variant(label_smoothing=0.4)(c.batch), wanted, rtol=1e-5
  )
  assert abs(wanted - c.loss()[0]) > 1e-3


def test_what_may_follow_goes_by_the_seconds_between_two_time_points():
  seconds = jnp.asarray([60.0, 120.0, np.nan, 30.0])
  allowed = np.asarray(classify.allowed_transitions(4, seconds, max_skip=1.0))
  one, two = np.triu(np.ones((4, 4))) * np.tri(4, k=1), np.triu(np.ones((4, 4)))
  two[0, 3] = 0
  for found, wanted in zip(allowed, (one, two, one, one), strict=True):
    np.testing.assert_array_equal(found, wanted)
  # A clock that is a little fast takes no stage away.
  near = classify.allowed_transitions(4, jnp.asarray([119.97]), max_skip=1.0)
  np.testing.assert_array_equal(near[0], two)
  fast = classify.allowed_transitions(4, seconds[:1], max_skip=2.0)
  np.testing.assert_array_equal(fast[0], two)


def paths(*stages, classes=K):
  return jnp.asarray(np.eye(classes, dtype=np.float32)[np.array(stages)])


def test_the_transition_loss_is_nothing_for_what_can_be_and_large_for_what_cannot():
  found = classify.transition_loss(
      paths([0, 0, 1, 2], [1, 2, 3, 4], [0, 1, 0, 1], [0, 2, 3, 4]),
      classify.allowed_transitions(K, jnp.full(4, MINUTE), max_skip=1.0),
  )
  np.testing.assert_allclose(found[:2], 0.0, atol=1e-5)
  # One impossible transition of three.
  np.testing.assert_allclose(found[2:], -np.log(1e-6) / 3, rtol=1e-3)
  later = classify.allowed_transitions(K, jnp.full(1, 2 * MINUTE), max_skip=1.0)
  assert classify.transition_loss(paths([0, 2, 3, 4]), later)[0] < 1e-5
  even = jnp.full((1, 3, 2), 0.5)
  both = classify.allowed_transitions(2, jnp.full(1, MINUTE), max_skip=1.0)
  np.testing.assert_allclose(
      classify.transition_loss(even, both), -np.log(0.75), rtol=1e-4
  )


def test_the_spacing_of_the_batch_says_what_transitions_cost():
  c = case("over_time")
  slow = c.batch | {"spacing": c.batch["spacing"].at[:, 0].set(4 * MINUTE)}
  name = "transition"
  assert c.loss(slow)[1][name][0] < 0.9 * c.loss()[1][name][0]
  unknown = c.batch | {"spacing": c.batch["spacing"].at[:, 0].set(jnp.nan)}
  close(c.loss(unknown), c.loss())


def test_the_monotone_loss_is_the_square_of_falls_beyond_a_margin():
  chances = jnp.concatenate([paths([0, 2, 2, 4], [3, 1, 2, 1]), jnp.full((1, 4, K), 0.2)])
  np.testing.assert_allclose(
      classify.monotone_loss(chances), [0, (4 + 0 + 1) / 3, 0], rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(
      classify.monotone_loss(chances, margin=1.5), [0, 0.25 / 3, 0], rtol=1e-5,
      atol=1e-6,
  )


def test_the_smooth_loss_is_the_square_of_changes():
  chances = jnp.asarray([[[1, 0], [0, 1], [0, 1]], [[0.5, 0.5], [0.6, 0.4], [0.6, 0.4]]])
  np.testing.assert_allclose(classify.smooth_loss(chances), [1.0, 0.01], rtol=1e-4)


def test_order_is_chance_for_a_head_of_zeros():
  c = case("over_time")
  order = jax.tree.map(jnp.zeros_like, c.params["order"])
  (_, (_, metrics)), _ = c._loss(
      c.params | {"order": order}, c.batch, jax.random.key(0), True
  )
  np.testing.assert_allclose(
      metrics["order"][0] / metrics["order"][1], np.log(3), rtol=1e-5
  )


def learn(objective, batch, steps, rate=3e-3, metric="accuracy"):
  """Trains and returns the metric of every step."""
  params, state = jax.jit(objective.init)(jax.random.key(0), batch)
  optimizer = optax.adam(rate)

  @jax.jit
  def train(params):
    def step(carry, key):
      params, opt_state = carry
      loss = lambda p: objective.loss(p, state, batch, key, train=True)
      gradient, (_, metrics) = jax.grad(loss, has_aux=True)(params)
      updates, opt_state = optimizer.update(gradient, opt_state)
      total, weight = metrics[metric]
      return (optax.apply_updates(params, updates), opt_state), total / weight

    keys = jax.random.split(jax.random.key(1), steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)

  (params, _), found = train(params)
  return params, np.asarray(found)


def test_order_is_that_of_time_and_before_same_and_after_are_all_asked_for():
  objective = make(labels="frame_label", order_weight=1.0)
  rows = 300
  # What is pooled of a time point is which one it is.
  pooled = jnp.zeros((rows, 4, 16)).at[..., 0].set(jnp.arange(4.0))

  def losses(hidden, last, bias):
    params = {"order": {
        "layers_0": {"kernel": hidden, "bias": np.zeros(16, np.float32)},
        "layers_2": {"kernel": last, "bias": np.float32(bias)},
    }}
    return np.asarray(objective._order_loss(
        params, pooled, jnp.arange(rows), jax.random.key(0)
    ))

  hidden, last = np.zeros((32, 16), np.float32), np.zeros((16, 3), np.float32)
  asked = [
      losses(hidden, last, 50 * np.eye(3)[order]) < 1.0 for order in range(3)
  ]
  assert (np.sum(asked, axis=0) == 1).all()
  np.testing.assert_allclose(np.mean(asked, axis=1), [3 / 8, 2 / 8, 3 / 8], atol=0.1)
  # One unit is above 0 where the second is later, one where it is earlier.
  hidden[[0, 16], 0], hidden[[0, 16], 1] = (-9, 9), (9, -9)
  last[0, 2] = last[1, 0] = 9
  assert losses(hidden, last, (0, 9, 0)).max() < 1e-2


def test_order_can_be_learned():
  """Brightness grows with time, from a level of the clip's own."""
  batch = make_batch(rows=16)
  level = np.random.default_rng(3).normal(size=(16, 1, 1, 1, 1, 1))
  ramp = 0.7 * np.arange(4).reshape(1, 4, 1, 1, 1, 1)
  batch["volume"] = 0.3 * batch["volume"] + jnp.asarray(level + ramp, jnp.float32)
  objective = make(labels="frame_label", order_weight=1.0)
  _, losses = learn(objective, batch, 120, metric="order")
  assert losses[0] > 0.8 and losses[-20:].mean() < 0.5


def test_order_pairs_are_drawn_anew_and_from_the_rows_own_key():
  c = case("over_time")
  of = lambda key, batch=None: c.loss(batch, key=key)[1]["order"][0]
  assert of(0) != of(1) and of(0) == of(0)
  apart = {k: jnp.roll(v, 1, axis=0) for k, v in c.batch.items()}
  np.testing.assert_allclose(of(0), of(0, apart), rtol=1e-5)


def test_a_heavier_class_costs_more():
  c = case("volume")
  labels = jnp.asarray([0, 1, 1, 1])
  weighted = c.variant(class_weights=(3, 0.5, 0.5, 0.5, 0.5))
  entropy = np.asarray(
      optax.softmax_cross_entropy_with_integer_labels(c.logits(), labels)
  )
  np.testing.assert_allclose(weighted(c.batch | {"label": labels}), np.mean(
      entropy * np.array([3.0, 0.5, 0.5, 0.5])
  ), rtol=1e-5)


def test_balanced_weights_are_inverse_to_the_counts_and_finite_at_none():
  counts = np.array([10, 0, 5, 1])
  found = np.array(classify.balanced_weights(counts))
  assert found[2] == pytest.approx(2 * found[0]) and found[3] == pytest.approx(10 * found[0])
  assert found[1] == 1.0 and classify.balanced_weights([0, 0]) == (1.0, 1.0)
  # A label weighs 1 in the mean: losses over time keep their share.
  assert (found * counts).sum() / counts.sum() == pytest.approx(1.0)


def test_weights_of_any_scale_become_those_of_mean_1_over_the_labels():
  counts = [2, 6, 0]
  for scale in (0.1, 1.0, 30.0):
    found = classify.scaled_weights([3 * scale, scale, scale], counts)
    np.testing.assert_allclose(found, [2.0, 2 / 3, 1.0])


@pytest.mark.parametrize("options", [
    dict(drop_path=0.5, depth=2), dict(head=dict(dropout=0.5)),
])
def test_what_is_dropped_is_dropped_in_training_alone(options):
  c = Case(labels="frame_label", **options)
  of = c.value
  assert of(0, True) != of(1, True) and of(0, True) == of(0, True)
  assert of(0, False) == of(1, False) != of(0, True)
  # The rows of another micro-batch.
  assert of(0, True, _position=c.batch["_position"] + 4) != of(0, True)


def test_functions_are_of_the_same_encoder():
  c = case("frames")
  functions = c.objective.functions()
  features = functions["features"](c.params, c.state, c.batch)
  assert features.tokens.shape == (4, 48, 16)
  shares = np.asarray(functions["attention"](c.params, c.state, c.batch))
  np.testing.assert_allclose(shares.sum(axis=(2, 3, 4)), 1.0, rtol=1e-5)
  assert shares.shape == (4, 4, 2, 2, 3)


def test_a_diagnosis_is_learned_from_volumes():
  """A blob is bright in the left half, or in the right one."""
  rng = np.random.default_rng(0)

  def blobs(rows):
    label = rng.integers(0, 2, rows)
    volume = 0.3 * rng.normal(size=(rows, 1, 4, 16, 16, 1))
    for row, right in enumerate(label):
      y, x = rng.integers(0, (12, 4))
      volume[row, :, 1:3, y : y + 4, x + 8 * right : x + 8 * right + 4] += 3.0
    return {
        "volume": jnp.asarray(volume, jnp.float32), "label": jnp.asarray(label),
        "spacing": jnp.ones((rows, 4)), "_mask": jnp.ones(rows),
        "_position": jnp.arange(rows, dtype=jnp.int32),
    }

  backbone = make_backbone(positions="sincos")
  objective = classify.Classify(backbone, 2, labels="label")
  params, shares = learn(objective, blobs(256), 60)
  assert shares[0] < 0.8 and shares[-5:].min() > 0.95
  unseen = blobs(256)
  logits = jax.jit(objective.functions()["logits"])(params, {}, unseen)
  assert (logits.argmax(-1) == unseen["label"]).mean() > 0.95


def test_the_first_guess_is_close_to_even():
  c = case("frames")
  logits = c._logits(c.start, c.state, c.batch)
  assert 0 < np.abs(logits).max() < 0.05


FAULTS = [
    (dict(classes=1), "objective.classes: 1 must be"),
    (dict(classes=2.0), "objective.classes: 2.0 must be"),
    (dict(labels="stage"), "objective.labels: 'stage' is none of label, frame_label"),
    (dict(label_smoothing=1.0), "objective.label_smoothing: 1.0 is not in [0, 1)"),
    (dict(label_smoothing=-0.1), "objective.label_smoothing: -0.1"),
    (dict(ordinal=True), "objective.ordinal: says where label_smoothing goes"),
    (dict(class_weights=(1.0,) * 5, balance_classes=True), "give one of them"),
    (dict(class_weights=(1.0, 2.0)), "2 numbers for 5 classes"),
    (dict(class_weights=(1.0, 1.0, 1.0, 1.0, 0.0)), "must all be above 0"),
    (dict(max_skip=0.0), "objective.max_skip: 0.0 must be above 0"),
    (dict(monotone_margin=-1.0), "objective.monotone_margin: -1.0"),
    *(
        (dict(labels="frame_label") | {name: -1.0},
         f"objective.{name}: -1.0 must not be negative")
        for name in classify.OVER_TIME
    ),
    *(
        ({name: 1.0}, f"objective.{name}: 1.0 with labels 'label'")
        for name in classify.OVER_TIME
    ),
    (dict(head=dict(poll="mean")), "objective.head.poll: unknown key; there are pool"),
    (dict(head=dict(frames=True)), "objective.head.frames: unknown key"),
    (dict(head=dict(pool="median")), "'median' is none of mean, max, cls, attention"),
    (dict(labels="frame_label", class_token=True, head=dict(pool="cls")),
     "'cls' with labels 'frame_label'"),
    (dict(head=dict(dropout=1.0)), "objective.head.dropout: 1.0 is not in [0, 1)"),
    (dict(head=dict(hidden=-1)), "objective.head.hidden: -1"),
    (dict(head=dict(pool="cls")), "'cls' without model.class_token"),
    (dict(head=dict(pool="attention", heads=3)), "heads: 3 does not divide the width 16"),
    (dict(head=dict(pool="attention", heads=0)), "heads: 0 does not divide"),
]


@pytest.mark.parametrize("options, words", FAULTS)
def test_what_cannot_work_is_refused_with_the_reason(options, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    make(**options)


def test_all_faults_are_said_at_once():
  with pytest.raises(ValueError) as caught:
    make(classes=1, labels="stage", max_skip=-1.0, head=dict(pool="cls", hidden=-1))
  for words in ("classes", "labels", "max_skip", "hidden", "class_token"):
    assert words in str(caught.value)
