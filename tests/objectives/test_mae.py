"""What must hold for a masked autoencoder to learn anything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vjepa_jax.backbones import vit, vt_former
from vjepa_jax.objectives import mae
from vjepa_jax.train import optim
from vjepa_jax.volumes import masks as masks_lib
from vjepa_jax.volumes.grid import Grid

VOXELS = (4, 4, 8, 12)  # 4 times 2 x 2 x 3 places
PATCH = (1, 2, 4, 4)
TUBE = dict(kind="tube", through="T", context=0.25, target=0.75)
RANDOM = dict(kind="random", context=0.25, target=0.75)
DIVIDED = dict(backbone="vt_former", mask=TUBE, decoder=dict(space_time="divided"))
VOLUME = dict(backbone="vit", mask=RANDOM, voxels=(1, 4, 16, 12))
CASES = dict(
    divided=DIVIDED,
    joint=dict(backbone="vt_former", mask=RANDOM, options=dict(space_time="joint")),
    volume=VOLUME,
    movie=dict(
        backbone="vit", mask=TUBE, voxels=(8, 1, 16, 12), patch=(2, 1, 4, 4),
        decoder=dict(positions="flat"),
    ),
    padded=dict(DIVIDED, voxels=(4, 3, 8, 10)),
)


def make(
    backbone="vt_former", mask=TUBE, decoder=None, options=None, patch=PATCH,
    voxels=VOXELS, **objective,
):
  del voxels
  common = dict(width=24, depth=1, heads=2, patch=patch, initializer="xavier")
  module = {"vit": vit.ViT, "vt_former": vt_former.VTFormer}[backbone]
  decoder = dict(width=16, depth=1, heads=2, initializer="xavier") | (decoder or {})
  return mae.MAE(
      module(**common, **(options or {})), {"one": mask}, decoder=decoder, **objective
  )


def make_batch(voxels=VOXELS, rows=3, seed=0, channels=1):
  volume = np.random.default_rng(seed).normal(size=(rows, *voxels, channels))
  return {
      "volume": jnp.asarray(volume, jnp.float32),
      "spacing": jnp.ones((rows, 4), jnp.float32),
      "_mask": jnp.ones(rows),
      "_position": jnp.arange(rows),
  }


class Case:
  """An objective, noisy parameters, a batch, its masks, and what is compiled once."""

  def __init__(self, name):
    options = CASES[name]
    self.objective = make(**options)
    self.batch = make_batch(options.get("voxels", VOXELS))
    params, self.state = jax.jit(self.objective.init)(jax.random.key(0), self.batch)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    self.params = jax.tree.unflatten(tree, [
        x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)
    ])
    self.splits = jax.jit(self.objective.draw_masks)(self.batch, jax.random.key(3))
    self.grid = self.objective._grid(self.batch["volume"])
    self.predict = jax.jit(self.objective.predict)

    def loss(params, view, batch, splits):
      return self.objective.loss_on(
          params, self.state, {**batch, "volume_context": view}, splits, train=True
      )

    self._loss = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

  def loss(self, batch=None, splits=None):
    """Returns (loss, metrics, gradients of parameters and of what is seen)."""
    batch = batch or self.batch
    (loss, (_, metrics)), gradients = self._loss(
        self.params, batch["volume"], batch, splits or self.splits
    )
    return float(loss), metrics, gradients

  def marked(self, ids):
    """bool [B, T, Z, Y, X, 1], the voxels of the given tokens."""
    hit = np.zeros((len(ids), self.grid.tokens, int(np.prod(self.grid.patch))))
    for row, own in enumerate(np.asarray(ids)):
      hit[row, own] = 1
    return np.asarray(self.grid.unpatchify(jnp.asarray(hit))) > 0


case = functools.cache(Case)


@pytest.mark.parametrize("name", CASES)
def test_prediction_does_not_depend_on_hidden_voxels(name):
  c = case(name)
  split = c.splits[0]
  shown = c.marked(split.context)
  assert 0.1 < shown.mean() < 0.5
  other = {**c.batch, "volume": jnp.where(shown, c.batch["volume"], 9.0)}
  found = c.predict(c.params, c.batch, split)
  np.testing.assert_array_equal(found, c.predict(c.params, other, split))
  seen = {**c.batch, "volume": jnp.where(shown, 9.0, c.batch["volume"])}
  assert np.abs(found - c.predict(c.params, seen, split)).max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_each_parameter_gets_gradient_and_what_is_hidden_gets_none(name):
  c = case(name)
  _, _, (gradients, view) = c.loss()
  shown = c.marked(c.splits[0].context)
  assert np.abs(np.asarray(view)[~shown]).max() == 0
  assert np.abs(np.asarray(view)[shown]).max() > 0
  exempt = ("['encoder']['cls_position']",)
  for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
    where = jax.tree_util.keystr(path)
    if ("key" in where and "bias" in where) or where in exempt:
      continue
    if where.endswith("['positions']['space']") or "pos_embed" in where:
      # A place that no row of this batch shows has no part in the encoder.
      gradient = np.abs(gradient).max(axis=0)
    layers = len(gradient) if "blocks" in where else 1  # Stacked over depth.
    units = np.abs(gradient).reshape(layers, -1, gradient.shape[-1]).max(axis=1)
    assert units.min() > 0, f"{where}: {np.sum(units == 0)} units without gradient"


@pytest.mark.parametrize("name", CASES)
def test_each_parameter_has_a_rule_of_decay(name):
  assert all(isinstance(d, bool) for d in jax.tree.leaves(
      optim.decay_mask(case(name).params)
  ))


@pytest.mark.parametrize("name", CASES)
def test_only_hidden_places_are_asked_for_and_counts_are_static(name):
  c = case(name)
  (split,) = c.splits
  tokens = c.grid.tokens
  assert split.context.shape == (3, tokens // 4)
  assert split.target.shape == (3, tokens - tokens // 4)
  for shown, hidden in zip(split.context, split.target):
    assert sorted([*shown, *hidden]) == list(range(tokens))
  other = jax.jit(c.objective.draw_masks)(c.batch, jax.random.key(4))[0]
  assert other.context.shape == split.context.shape
  assert np.any(other.context != split.context)


def test_tubes_show_the_same_places_in_every_frame():
  c = case("divided")
  t, n = c.grid.dims[0], c.grid.places
  for ids in (c.splits[0].context, c.splits[0].target):
    places = np.asarray(ids).reshape(len(ids), t, -1) - n * np.arange(t)[:, None]
    np.testing.assert_array_equal(places, np.broadcast_to(places[:, :1], places.shape))
    assert places.min() >= 0 and places.max() < n


def test_predictions_are_where_the_target_says():
  """A decoder of one mask token and positions alone tells places apart, in order."""
  c = case("divided")
  split = c.splits[0]
  t, m = c.grid.dims[0], split.target.shape[1] // c.grid.dims[0]
  order = np.arange(m)[::-1]
  ids = np.asarray(split.target).reshape(3, t, m)[:, :, order].reshape(3, -1)
  turned = split.replace(target=jnp.asarray(ids))
  found = np.asarray(c.predict(c.params, c.batch, split)).reshape(3, t, m, -1)
  other = np.asarray(c.predict(c.params, c.batch, turned)).reshape(3, t, m, -1)
  np.testing.assert_allclose(other, found[:, :, order], rtol=1e-4, atol=1e-5)
  assert np.abs(found[:, :, 0] - found[:, :, 1]).max() > 1e-2


@pytest.mark.parametrize("space_time", mae.SPACE_TIME)
def test_learned_positions_of_the_decoder_are_parameters_from_the_start(space_time):
  start = lambda **decoder: jax.eval_shape(
      make(decoder=decoder | dict(space_time="divided")).init,
      jax.random.key(0), make_batch(),
  )[0]["decoder"]
  table = {name: p.shape for name, p in start()["positions"].items()}
  assert table == {"space": (12, 16), "time": (4, 16)}
  assert "positions" not in start(positions="sincos")
  # And each of them is learned from.
  decoder = mae.Decoder(voxels=8, width=16, depth=1, heads=2, space_time=space_time)
  ids = lambda *places: jnp.asarray([
      [place + 12 * t for t in range(4) for place in places]
  ])
  split = masks_lib.Split(ids(0, 3, 8), ids(1, 2, 4, 5, 6, 7, 9, 10, 11))
  rng = np.random.default_rng(0)
  context = jnp.asarray(rng.normal(size=(1, 12, 24)), jnp.float32)
  given = (context, split, Grid(VOXELS, PATCH))
  shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), *given))["params"]
  params = jax.tree.map(lambda p: np.float32(0.3 * rng.normal(size=p.shape)), shapes)
  loss = lambda params: jnp.square(decoder.apply({"params": params}, *given)).sum()
  gradients = jax.jit(jax.grad(loss))(params)
  for name, shape in table.items():
    gradient = np.abs(gradients["positions"][name])
    assert gradient.shape == shape and gradient.max(axis=1).min() > 0, name
  assert np.abs(gradients["mask_token"]).min() > 0


def test_the_loss_is_the_mean_over_hidden_patches_of_the_normalised_error():
  c = case("divided")
  loss, metrics, _ = c.loss()
  split = c.splits[0]
  found = np.asarray(c.predict(c.params, c.batch, split), np.float64)
  patches = np.asarray(c.grid.patchify(c.batch["volume"]), np.float64)
  wanted = np.take_along_axis(patches, np.asarray(split.target)[..., None], axis=1)
  mean = wanted.mean(axis=-1, keepdims=True)
  wanted = (wanted - mean) / np.sqrt(wanted.var(-1, ddof=1, keepdims=True) + 0.1**2)
  error = ((found - wanted) ** 2).mean()
  np.testing.assert_allclose(loss, error, rtol=1e-4)
  total, weight = metrics["loss"]
  np.testing.assert_allclose(total / weight, error, rtol=1e-4)
  variance = np.mean([((row - row.mean()) ** 2).mean() for row in wanted])
  share = metrics["error_over_variance"]
  np.testing.assert_allclose(share[0] / share[1], error / variance, rtol=1e-4)


def test_voxels_beyond_the_volume_are_in_no_target():
  c = case("padded")
  split = c.splits[0]
  targets = c.objective.targets(c.batch, split)
  assert 0 < float(targets.real.mean()) < 1
  base = float(c.loss()[0])
  found = np.asarray(c.predict(c.params, c.batch, split)).reshape(targets.values.shape)
  real = np.asarray(targets.real)[..., None]
  square = real * (found - targets.values) ** 2
  error = square.sum(axis=(2, 3)) / real.sum(axis=(2, 3))
  np.testing.assert_allclose(base, error.mean(), rtol=1e-4)
  # The mean and spread are those of the real voxels.
  values, count = np.asarray(targets.values), real.sum(axis=2)
  np.testing.assert_allclose((values * real).sum(axis=2) / count, 0, atol=1e-5)


def test_a_noise_floor_keeps_empty_patches_small():
  rng = np.random.default_rng(0)
  patches = jnp.asarray(np.stack([
      rng.normal(size=(4, 32, 1)) * 0.01, rng.normal(size=(4, 32, 1))
  ]), jnp.float32)
  spread = lambda kind, **options: np.asarray(
      mae.make_targets(patches, None, kind, **options).values
  ).std(axis=(1, 2, 3))
  np.testing.assert_allclose(spread("videomae"), [1, 1], rtol=0.05)
  found = spread("normalized", noise_floor=0.1)
  assert found[0] < 0.12 and found[1] > 0.95
  np.testing.assert_array_equal(
      mae.make_targets(patches, None, "pixel").values, patches
  )


def test_foreground_weighs_more_and_empty_patches_at_least_something():
  patches = jnp.stack([jnp.tile(jnp.array([-s, s]), 8) for s in (0.0, 0.1, 0.2, 4.0)])
  targets = mae.make_targets(
      patches[None, :, :, None], None, "pixel", foreground_std=0.4, foreground_min=0.2
  )
  unbiased = np.sqrt(16 / 15)
  np.testing.assert_allclose(
      targets.weight[0], [0.2, 0.25 * unbiased, 0.5 * unbiased, 1.0], rtol=1e-5
  )
  c = case("divided")
  weighted = make(**DIVIDED, foreground_std=1.2)
  loss = jax.jit(functools.partial(weighted.loss_on, train=False))(
      c.params, c.state, c.batch, c.splits
  )[0]
  assert abs(float(loss) - c.loss()[0]) > 1e-4


def test_a_part_of_the_hidden_may_be_asked_for():
  objective = make(mask=dict(TUBE, target=0.25), decoder=dict(space_time="divided"))
  batch = make_batch()
  split = jax.jit(objective.draw_masks)(batch, jax.random.key(0))[0]
  assert split.context.shape == split.target.shape == (3, 12)
  params, state = jax.jit(objective.init)(jax.random.key(0), batch)
  loss = jax.jit(functools.partial(objective.loss, train=True))(
      params, state, batch, jax.random.key(1)
  )[0]
  assert np.isfinite(loss)


def test_padding_rows_add_nothing_and_a_row_has_its_masks_in_any_batch():
  c = case("divided")
  loss = jax.jit(functools.partial(c.objective.loss, train=False))
  padded = {k: jnp.concatenate([v, v[:2]]) for k, v in c.batch.items()}
  padded["_mask"] = padded["_mask"].at[3:].set(0.0)
  padded["_position"] = jnp.arange(5)
  key = jax.random.key(5)
  one, two = (loss(c.params, c.state, b, key) for b in (c.batch, padded))
  np.testing.assert_allclose(one[0], two[0], rtol=1e-5)
  assert float(two[1][1]["loss"][1]) == 3.0
  half = {k: v[1:] for k, v in c.batch.items()}
  drawn = c.objective.draw_masks(half, jax.random.key(3))[0]
  np.testing.assert_array_equal(drawn.context, c.splits[0].context[1:])


def test_reconstruction_keeps_what_is_seen_and_fills_in_the_rest():
  c = case("padded")
  found = jax.jit(c.objective.functions()["reconstruct"])(c.params, c.state, c.batch)
  volume, hidden = np.asarray(c.batch["volume"]), np.asarray(found["hidden"])
  assert all(found[k].shape == volume.shape for k in ("visible", "reconstruction"))
  assert 0.5 < hidden.mean() < 0.9
  split = c.objective.functions()["masks"](c.params, c.state, c.batch)[0]
  np.testing.assert_array_equal(hidden, c.marked(split.target))
  np.testing.assert_array_equal(found["visible"], np.where(hidden, 0, volume))
  kept = np.asarray(found["reconstruction"])
  np.testing.assert_array_equal(kept[~hidden], volume[~hidden])
  assert np.all(kept[hidden] != volume[hidden])


@pytest.mark.parametrize("target", mae.TARGETS)
def test_it_learns_what_can_be_learned(target):
  """A wave along T and X whose phase the visible places tell."""
  objective = make(**DIVIDED, target=target)
  t, _, _, x = np.meshgrid(*map(np.arange, VOXELS), indexing="ij")
  phase = np.random.default_rng(0).uniform(0, 6.28, size=(16, 1, 1, 1, 1))
  volume = np.sin(0.5 * t + 0.8 * x + phase)[..., None]
  batch = make_batch(rows=16) | {"volume": jnp.asarray(volume, jnp.float32)}
  params, state = jax.jit(objective.init)(jax.random.key(0), batch)
  optimizer = optax.adam(3e-3)

  @jax.jit
  def train(params):
    def step(carry, key):
      params, opt_state = carry
      loss = lambda p: objective.loss(p, state, batch, key, train=True)
      gradient, (_, metrics) = jax.grad(loss, has_aux=True)(params)
      updates, opt_state = optimizer.update(gradient, opt_state)
      share = metrics["error_over_variance"]
      return (optax.apply_updates(params, updates), opt_state), share[0] / share[1]

    keys = jax.random.split(jax.random.key(1), 150)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]

  shares = np.asarray(train(params))
  assert shares[0] > 0.9 and shares[-10:].mean() < 0.5


@pytest.mark.parametrize(
    "options, words",
    [
        (
            dict(mask=RANDOM),
            ["kind 'random'", "one place in every frame", "model.space_time=joint"],
        ),
        (
            dict(mask=dict(RANDOM, kind="frame_random")),
            ["frame_random", "through='T'"],
        ),
        (dict(mask=dict(TUBE, through="TZ")), ["kind 'tube'", "through='T'"]),
        (
            dict(VOLUME, decoder=dict(space_time="divided")),
            ["objective.decoder", "objective.decoder.space_time=joint"],
        ),
        (dict(options=dict(stride=(1, 1, 2, 2))), ["overlap", "model.stride"]),
        (dict(target="pixels"), ["objective.target", "pixel"]),
        (dict(noise_floor=0.0), ["noise_floor", "above 0"]),
        (
            dict(foreground_min=0.0, foreground_std=-1.0),
            ["foreground_min", "foreground_std"],
        ),
        (dict(decoder=dict(widht=3)), ["widht is no option", "width"]),
        (dict(decoder=dict(heads=3)), ["not a multiple of heads 3"]),
        (dict(decoder=dict(space_time="both")), ["'both' is none of joint, divided"]),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(options, words):
  with pytest.raises(ValueError) as caught:
    make(**options)
  for word in words:
    assert word in str(caught.value)


@pytest.mark.parametrize(
    "mask",
    [
        dict(RANDOM, kind="frames"), dict(RANDOM, kind="frame_random", prior="texture"),
        dict(RANDOM, prior="foreground"), dict(TUBE, prior="texture"),
    ],
)
def test_a_joint_encoder_takes_any_mask(mask):
  objective = make(mask=mask, options=dict(space_time="joint"))
  batch = make_batch()
  split = objective.draw_masks(batch, jax.random.key(0))[0]
  assert split.context.shape == (3, 12) and split.target.shape == (3, 36)
  assert masks_lib.mask_faults(mask, Grid(VOXELS, PATCH)) == []
