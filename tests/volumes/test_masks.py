"""Masks: partition, fixed counts, coverage, no prefix, one key a sample."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.volumes import masks
from vjepa_jax.volumes.grid import Grid

GRIDS = [(1, 3, 5, 7), (1, 4, 6, 6), (4, 1, 6, 6), (2, 3, 4, 5)]
SHORT = dict(count=8, spatial_scale=0.15, depth_scale=1.0, aspect=(0.75, 1.5))
LONG = dict(count=2, spatial_scale=0.7, depth_scale=1.0, aspect=(0.75, 1.5))


def _grid(dims):
  return Grid(voxels=dims, patch=(1, 1, 1, 1))

# Those that say nothing of time; the others are in test_clip_masks.py.
KINDS = ("random", "tube", "blocks")


def _keys(number, seed=0, first=0):
  return masks.sample_keys(jax.random.key(seed), jnp.arange(first, first + number))


@functools.cache
def _sampler(kind, dims, options):
  grid = _grid(dims)
  return jax.jit(
      lambda keys, weights: masks.sample(
          kind, keys, grid, **dict(options),
          **({} if weights is None else {"weights": weights}),
      )
  )  # yapf: disable


def _draw(kind, dims, number, seed=0, weights=None, **options):
  draw = _sampler(kind, dims, tuple(options.items()))
  return jax.tree.map(np.asarray, draw(_keys(number, seed), weights))


def _options(kind, tokens, extra=SHORT):
  options = dict(context=tokens // 4, target=tokens // 3)
  return options | extra if kind == "blocks" else options


def _valid(ids, valid):
  return [
      row if valid is None else row[valid[b]] for b, row in enumerate(ids)
  ]  # yapf: disable


@pytest.mark.parametrize("dims", GRIDS)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_context_and_target_are_disjoint_sorted_and_of_fixed_count(kind, dims, seed):
  tokens = int(np.prod(dims))
  options = _options(kind, tokens)
  split = _draw(kind, dims, 40, seed=seed, **options)
  assert split.context.shape == (40, options["context"])
  assert split.target.shape == (40, options["target"])
  assert split.context.dtype == split.target.dtype == np.int32
  for ids in (split.context, split.target):
    assert ids.min() >= 0 and ids.max() < tokens
    assert (np.diff(ids) >= 0).all()
  pairs = zip(
      _valid(split.context, split.context_valid),
      _valid(split.target, split.target_valid), strict=True,
  )  # yapf: disable
  for context, target in pairs:
    assert context.size and target.size
    assert len(set(context)) == context.size and len(set(target)) == target.size
    assert not set(context) & set(target)


def test_padding_repeats_valid_ids_and_says_so():
  split = _draw("blocks", (1, 4, 6, 6), 200, context=40, target=100, **LONG)
  assert not split.context_valid.all() and not split.target_valid.all()
  for ids, valid in (
      (split.context, split.context_valid), (split.target, split.target_valid)
  ):  # yapf: disable
    for row, good in zip(ids, valid, strict=True):
      assert set(row[~good]) <= set(row[good])
      # As many real ones as there are to be had, never fewer.
      assert good.all() or len(set(row[good])) == good.sum()


def test_as_many_are_valid_as_the_blocks_leave():
  """With room for all tokens on both sides, the split is a partition."""
  dims, tokens = (1, 4, 6, 6), 144
  split = _draw("blocks", dims, 100, context=72, target=72, **SHORT)
  wide = _draw("blocks", dims, 100, context=1, target=143, **SHORT)
  hidden = wide.target_valid.sum(1)
  np.testing.assert_array_equal(split.target_valid.sum(1), np.minimum(hidden, 72))
  np.testing.assert_array_equal(
      split.context_valid.sum(1), np.minimum(tokens - hidden, 72)
  )


def test_blocks_that_cover_everything_give_one_token_back():
  split = _draw(
      "blocks", (1, 2, 3, 4), 300, context=3, target=20, count=1, spatial_scale=1.0,
      aspect=(0.5, 2.0),
  )  # yapf: disable
  assert (split.context_valid.sum(1) >= 1).all()
  assert (split.target_valid.sum(1) >= 1).all()
  lone = split.context[split.context_valid.sum(1) == 1][:, 0]
  assert set(lone) == set(range(24))  # and it is not always the same one


def _reference_masks(rng, dims, number, count, spatial_scale, depth_scale, aspect):
  """The published sampler's block masks, brute force, bool [number, *dims]."""
  t, z, y, x = dims
  out = np.zeros((number, *dims), bool)
  for one in out:
    dt, dz = max(1, int(t * depth_scale)), max(1, int(z * depth_scale))
    area, ratio = int(y * x * spatial_scale), rng.uniform(*aspect)
    h = min(int(round(np.sqrt(area * ratio))), y)
    w = min(int(round(np.sqrt(area / ratio))), x)
    for _ in range(count):
      a, b = rng.integers(0, t - dt + 1), rng.integers(0, z - dz + 1)
      c, d = rng.integers(0, y - h + 1), rng.integers(0, x - w + 1)
      one[a : a + dt, b : b + dz, c : c + h, d : d + w] = True
  return out


@pytest.mark.parametrize(
    "dims,shape",
    [
        ((1, 3, 5, 7), SHORT),
        ((1, 4, 12, 12), SHORT),
        ((1, 4, 12, 12), LONG),
        ((6, 1, 6, 8), dict(SHORT, count=3, depth_scale=0.5)),
        ((2, 3, 4, 5), dict(SHORT, count=2, spatial_scale=0.3, depth_scale=0.7)),
    ],
)
def test_every_cell_is_hidden_at_the_rate_of_a_brute_force_sampler(dims, shape):
  number, tokens = 4000, int(np.prod(dims))
  split = _draw(
      "blocks", dims, number, seed=5, context=1, target=tokens - 1, **shape
  )
  hidden = np.zeros((number, tokens), bool)
  rows = np.repeat(np.arange(number), tokens - 1).reshape(number, -1)
  hidden[rows[split.target_valid], split.target[split.target_valid]] = True
  rate = hidden.mean(0).reshape(dims)
  wanted = _reference_masks(np.random.default_rng(6), dims, 4000, **shape).mean(0)
  error = np.sqrt(2 * wanted * (1 - wanted) / number) + 1e-4
  np.testing.assert_array_less(np.abs(rate - wanted) / error, 5.0)
  for axis in range(4):  # the first and the last cell of an axis fare alike
    first, last = (np.take(rate, i, axis).mean() for i in (0, -1))
    assert abs(first - last) < 0.05 * rate.mean() + 0.01


@pytest.mark.parametrize("kind", ["random", "tube"])
@pytest.mark.parametrize("dims", [(1, 3, 5, 7), (4, 1, 6, 6)])
def test_random_and_tube_choose_every_cell_equally_often(kind, dims):
  number, tokens = 4000, int(np.prod(dims))
  split = _draw(kind, dims, number, context=tokens // 4, target=tokens // 2)
  for ids in (split.context, split.target):
    rate = np.bincount(ids.ravel(), minlength=tokens) / number
    wanted = ids.shape[1] / tokens
    error = np.sqrt(wanted * (1 - wanted) / number)
    assert np.abs(rate - wanted).max() < 5 * error


@pytest.mark.parametrize("side", ["context", "target"])
def test_what_is_kept_is_no_prefix(side):
  """Among qualifying tokens the last depth is kept as often as the first."""
  dims = (1, 8, 6, 6)
  split = _draw("blocks", dims, 4000, context=40, target=60, **SHORT)
  ids = getattr(split, side)[getattr(split, f"{side}_valid")]
  depth = np.bincount(ids // 36, minlength=8)
  # Blocks are tubes here, so all depths qualify equally.
  assert np.abs(depth / depth.mean() - 1).max() < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_has_one_mask_whatever_batch_it_is_in(kind):
  grid = _grid((1, 4, 6, 6))
  draw = jax.jit(
      lambda keys: masks.sample(kind, keys, grid, **_options(kind, grid.tokens))
  )
  whole = draw(_keys(12))
  parts = [draw(_keys(4, first=i)) for i in (0, 4, 8)]
  joined = jax.tree.map(lambda *p: jnp.concatenate(p), *parts)
  jax.tree.map(np.testing.assert_array_equal, whole, joined)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_any_type_of_key_gives_masks_by_sample(implementation):
  key = jax.random.key(3, impl=implementation)
  grid = _grid((1, 4, 6, 6))
  draw = jax.jit(
      lambda positions: masks.random(
          masks.sample_keys(key, positions), grid, context=20, target=30
      ).target
  )
  whole = draw(jnp.arange(6))
  np.testing.assert_array_equal(whole[4:], draw(jnp.arange(4, 6)))
  assert len({tuple(row) for row in np.asarray(whole)}) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_samples_and_keys_differ(kind):
  first, second = (
      _draw(kind, (1, 4, 6, 6), 8, seed, **_options(kind, 144)) for seed in (0, 1)
  )
  assert len({tuple(row) for row in first.target}) == 8
  assert not np.array_equal(first.target, second.target)
  again = _draw(kind, (1, 4, 6, 6), 8, 0, **_options(kind, 144))
  np.testing.assert_array_equal(first.target, again.target)


@pytest.mark.parametrize("kind", KINDS)
def test_one_compilation_serves_all_steps(kind):
  grid, traces = _grid((1, 4, 6, 6)), []

  @jax.jit
  def draw(key):
    traces.append(1)
    keys = masks.sample_keys(key, jnp.arange(4))
    return masks.sample(kind, keys, grid, **_options(kind, grid.tokens))

  for step in range(4):
    draw(jax.random.fold_in(jax.random.key(0), step))
  assert len(traces) == 1


@pytest.mark.parametrize("dims", [(2, 3, 5, 7), (4, 1, 6, 6)])
def test_a_tube_is_constant_over_time_and_depth(dims):
  depth, plane = dims[0] * dims[1], dims[2] * dims[3]
  split = _draw("tube", dims, 30, context=8 * depth, target=12 * depth)
  for ids, tubes in ((split.context, 8), (split.target, 12)):
    for row in ids:
      seen = np.bincount(row % plane, minlength=plane)
      assert set(seen) == {0, depth} and (seen > 0).sum() == tubes


def test_a_thinned_tube_never_shares_its_place():
  split = _draw("tube", (1, 4, 5, 5), 100, context=21, target=37)
  for context, target in zip(split.context % 25, split.target % 25, strict=True):
    assert not set(context) & set(target)
    assert len(set(context)) == 6 and len(set(target)) <= 10


@pytest.mark.parametrize("shape,fraction", [(SHORT, 0.379), (LONG, 0.188)])
def test_mean_context_of_the_published_groups(shape, fraction):
  dims = (8, 1, 16, 16)
  split = _draw("blocks", dims, 3000, context=2047, target=1, **shape)
  # One size a sample, not one a batch: the mean is the same.
  np.testing.assert_allclose(split.context_valid.mean(), fraction, rtol=0.03)


def test_block_sizes_equal_the_published_ones(shared):
  case = shared("fixtures/parity/fb_masks_multiblock3d")
  config = json.loads((case / "case.json").read_text())["config"]
  arrays = np.load(case / "io.npz")
  for number, options in config.items():
    depth = options["num_frames"] // options["temporal_patch_size"]
    y, x = (
        c // p for c, p in
        zip(options["crop_size"], options["spatial_patch_size"], strict=True)
    )  # yapf: disable
    uniforms = arrays[f"cfg{number}/uniforms_temporal_spatial_aspect"]
    extents = masks.block_extents(
        *uniforms.T, (depth, 1, y, x),
        spatial_scale=tuple(options["spatial_pred_mask_scale"]),
        depth_scale=tuple(options["temporal_pred_mask_scale"]),
        aspect=tuple(options["aspect_ratio"]),
    )  # yapf: disable
    wanted = arrays[f"cfg{number}/block_size_t_h_w"]
    np.testing.assert_array_equal(extents[:, [0, 2, 3]], wanted)
    assert (extents[:, 1] == 1).all()


def test_blocks_to_hidden_tokens_equals_the_published(shared):
  arrays = np.load(shared("fixtures/parity/fb_masks_multiblock3d/io.npz"))
  for call in range(6):
    drawn = arrays[f"cfg1/call{call}/blocks_t0_h0_w0_t_h_w"].reshape(3, 2, 6)
    length = arrays[f"cfg1/call{call}/pred"].shape[1]
    for sample, rows in enumerate(drawn):
      starts = np.insert(rows[:, :3], 1, 0, axis=1)
      extents = np.insert(rows[0, 3:], 1, 1)
      hidden = np.flatnonzero(masks._covered((4, 1, 6, 4), starts, extents))
      # The reference keeps a prefix, as long as the shortest of the batch.
      np.testing.assert_array_equal(
          hidden[:length], arrays[f"cfg1/call{call}/pred"][sample]
      )


def test_depth_scale_shortens_time_and_depth_but_not_a_single_slice():
  extents = masks.block_extents(
      0.0, 0.0, 0.0, (8, 6, 10, 10), spatial_scale=0.7, depth_scale=0.5, aspect=(1, 1)
  )
  assert extents.tolist() == [4, 3, 8, 8]
  extents = masks.block_extents(
      0.9, 0.5, 0.5, (1, 6, 2, 2), spatial_scale=0.01, depth_scale=0.01, aspect=(1, 1)
  )
  assert extents.tolist() == [1, 1, 1, 1]


def test_block_centres_follow_the_weights_and_stay_inside():
  grid = _grid((1, 2, 9, 9))
  weights = np.full((4, *grid.dims), 1e-9, np.float32)
  for sample, place in enumerate([(0, 0), (0, 8), (4, 4), (8, 3)]):
    weights[sample, 0, 0, place[0], place[1]] = 1
  split = _draw(
      "blocks", grid.dims, 4, context=10, target=18, count=3, spatial_scale=0.11,
      aspect=(1, 1), weights=jnp.asarray(weights.reshape(4, -1)),
  )  # yapf: disable
  for sample, corner in enumerate([(0, 0), (0, 6), (3, 3), (6, 2)]):
    ids = np.asarray(split.target[sample])
    y, x = np.divmod(ids % 81, 9)
    assert (y.min(), x.min()) == corner
    assert (y.max() - y.min(), x.max() - x.min()) == (2, 2)
    assert split.target_valid[sample].all()


def test_foreground_finds_the_bright_band_and_leaves_nothing_out():
  grid = Grid(voxels=(1, 4, 32, 24), patch=(1, 2, 4, 4))
  volume = np.random.default_rng(0).normal(0, 0.1, (2, 1, 4, 32, 24, 1))
  volume[0, :, :, 8:16] += 3
  volume[0, :, :, 8:12, 4:8] = 0  # a dark lesion in the band
  weights = np.asarray(masks.foreground(jnp.asarray(volume), grid))
  np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
  assert weights.min() > 0.02 / grid.tokens
  cells = weights.reshape(2, *grid.dims)
  assert cells[0, :, :, 2:4].sum() > 0.6
  assert cells[0, 0, :, 2, 1].mean() > 2 * cells[0, 0, :, 6, 1].mean()
  flat = masks.foreground(jnp.zeros((1, 1, 4, 32, 24, 1)), grid)
  np.testing.assert_allclose(flat, 1 / grid.tokens, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("stride", [None, (1, 1, 3, 4)])
@pytest.mark.parametrize("prior", [masks.texture, masks.foreground])
def test_what_the_grid_pads_counts_for_nothing(prior, stride, channels):
  """Weights are those of each patch's own voxels, computed one by one."""
  grid = Grid((2, 5, 10, 9), (1, 2, 4, 4), padded=True, stride=stride)
  rng = np.random.default_rng(0)
  volume = rng.normal(2.0, 0.1, (2, *grid.voxels, channels)).astype(np.float32)
  volume[:, :, 1:3, 2:6, 3:7] += rng.normal(1.0, 1.0, (2, 2, 2, 4, 4, channels))
  step, of = stride or grid.patch, np.std if prior is masks.texture else np.mean
  found = np.empty((2, *grid.dims))
  for place in np.ndindex(*grid.dims):
    own = tuple(
        slice(i * s, i * s + p)  # cut at the volume's end
        for i, s, p in zip(place, step, grid.patch, strict=True)
    )
    for row in range(2):
      found[(row, *place)] = of(volume[(row, *own)])
  if prior is masks.foreground:
    found -= np.percentile(found, 25, axis=(1, 2, 3, 4), keepdims=True)
    found = np.maximum(found, 0)
    found = (found + found.mean(axis=(1, 2, 4), keepdims=True)) / 2
  found = found.reshape(2, -1)
  found = np.maximum(found, 0.1 * found.mean(axis=1, keepdims=True))
  found /= found.sum(axis=1, keepdims=True)
  weights = prior(jnp.asarray(volume), grid)
  np.testing.assert_allclose(weights, found, rtol=2e-4, atol=1e-7)


def test_an_even_volume_has_no_texture_at_the_edge_of_a_padded_grid():
  rng = np.random.default_rng(0)
  volume = jnp.asarray(rng.normal(2.0, 0.1, (1, 1, 4, 18, 18, 1)), jnp.float32)
  grid = Grid((1, 4, 18, 18), (1, 2, 4, 4), padded=True)
  weights = np.asarray(masks.texture(volume, grid)).reshape(grid.dims)
  assert weights[:, :, -1].mean() < 1.2 * weights[:, :, :-1, :-1].mean()
  assert weights[:, :, :, -1].mean() < 1.2 * weights[:, :, :-1, :-1].mean()


@pytest.mark.parametrize("prior", [masks.texture, masks.foreground])
def test_a_grid_that_may_pad_and_need_not_gives_the_same_weights(prior):
  volume = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 4, 8, 8, 1)))
  one, other = (
      prior(volume, Grid((2, 4, 8, 8), (1, 2, 4, 4), padded)) for padded in (True, False)
  )
  np.testing.assert_array_equal(one, other)


def test_foreground_blocks_hide_more_tissue_than_uniform_ones():
  grid = _grid((1, 2, 16, 16))
  weights = np.full((300, *grid.dims), 0.1, np.float32)
  weights[:, :, :, 9:13] = 3
  options = dict(context=64, target=100, count=3, spatial_scale=0.1)
  share = []
  for w in (None, jnp.asarray(weights.reshape(300, -1))):
    split = _draw("blocks", grid.dims, 300, weights=w, **options)
    y = split.target // 16 % 16
    share.append(((y >= 9) & (y < 13))[split.target_valid].mean())
  assert share[1] > share[0] + 0.2


@pytest.mark.parametrize("name", ["tubes", "block", "randm"])
def test_an_unknown_kind_lists_the_closest(name):
  with pytest.raises(KeyError, match="closest"):
    masks.sample(name, _keys(1), _grid((1, 2, 4, 4)), context=1, target=1)


def test_counts_that_do_not_fit_are_refused():
  grid = _grid((1, 2, 4, 4))
  with pytest.raises(ValueError, match="32"):
    masks.random(_keys(1), grid, context=20, target=13)
  with pytest.raises(ValueError, match="tubes of 2"):
    masks.tube(_keys(1), grid, context=16, target=17)
  with pytest.raises(ValueError, match="spatial_scale"):
    masks.blocks(_keys(1), grid, context=4, target=4, count=1, spatial_scale=1.5)


def test_count_rounds_and_is_never_zero():
  assert [masks.count(f, 192) for f in (0.25, 0.3, 1e-6, 7)] == [48, 58, 1, 7]


@pytest.mark.parametrize(
    "change,words",
    [
        ({}, []),
        ({"context": 100}, []),
        ({"kind": "block"}, ["closest: blocks"]),
        ({"cont": 1}, ["cont is no option", "count"]),
        ({"target": 1.5}, ["target 1.5", "fraction"]),
        ({"context": 0.0}, ["context 0.0"]),
        ({"context": 0.9, "target": 0.9}, ["fit together"]),
        ({"count": 0, "aspect": (2, 1)}, ["count 0", "aspect (2, 1)"]),
        ({"spatial_scale": (0.1, 2.0)}, ["spatial_scale (0.1, 2.0)"]),
        ({"prior": "foregrund"}, ["closest: foreground"]),
    ],
)
def test_mask_faults_lists_every_fault_of_a_group(change, words):
  options = dict(SHORT, kind="blocks", context=0.25, target=0.3) | change
  faults = masks.mask_faults(options, _grid((1, 4, 8, 8)))
  assert bool(faults) == bool(words)
  assert all(word in "\n".join(faults) for word in words), faults


def test_mask_faults_names_what_is_missing():
  faults = masks.mask_faults({"kind": "blocks", "context": 0.3}, _grid((1, 2, 4, 4)))
  assert {f.split()[0] for f in faults} == {"target", "count", "spatial_scale"}
