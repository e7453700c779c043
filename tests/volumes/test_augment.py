"""Augmentation: one view a sample, its own key, and nothing that was not asked."""

import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.volumes import augment as lib

SHAPE = (1, 4, 8, 8)


def _batch(rows=3, shape=SHAPE, channels=1, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  volume = rng.integers(3, 250, (rows, *shape, channels)).astype(dtype)
  flat = volume.reshape(rows, -1).astype(np.float64)
  return {
      "volume": volume,
      "mean": flat.mean(1).astype(np.float32),
      "std": flat.std(1).astype(np.float32),
      "spacing": np.tile(np.array([np.nan, 0.2, 0.01, 0.05], np.float32), (rows, 1)),
      "_position": np.arange(rows, dtype=np.int32),
      "_mask": np.ones(rows, np.float32),
      "label": np.arange(rows, dtype=np.int32),
  }


def _coordinates(rows, shape=SHAPE):
  """Each voxel holds its own place in four channels."""
  places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
  batch = _batch(rows, shape)
  batch["volume"] = np.tile(places[None], (rows, 1, 1, 1, 1, 1)).astype(np.float32)
  return batch


def _run(batch, *, seed=0, train=True, **options):
  options.setdefault("normalize", "none")
  augment = jax.jit(lib.make_augment(**options), static_argnames="train")
  return jax.tree.map(np.asarray, augment(batch, jax.random.key(seed), train=train))


ALL = dict(
    normalize="zscore", crop=(1, 2, 6, 6), flip=(0.0, 0.5, 0.5, 0.5),
    shift=(0.0, 1.0, 2.0, 2.0), scale=(0.0, 0.1, 0.1, 0.1), rotate=0.2, rot90=0.5,
    brightness=0.3, contrast=0.2, gamma=0.3, noise_std=0.1,
)  # yapf: disable


@functools.cache
def _everything(views="shared"):
  return jax.jit(lib.make_augment(**ALL, views=views), static_argnames="train")


def test_all_off_is_the_identity():
  batch = _batch()
  out = _run(batch)
  assert out["volume"].dtype == np.float32
  jax.tree.map(np.testing.assert_array_equal, out, batch)


def test_eval_only_normalises_and_cuts_the_centre():
  batch = _batch()
  out = jax.tree.map(
      np.asarray, _everything()(batch, jax.random.key(0), train=False)
  )
  wanted = batch["volume"][:, :, 1:3, 1:7, 1:7]
  wanted = (wanted - batch["mean"].reshape(-1, 1, 1, 1, 1, 1)) / batch["std"].reshape(
      -1, 1, 1, 1, 1, 1
  )
  np.testing.assert_allclose(out["volume"], wanted, rtol=1e-5, atol=1e-5)
  for key in ("spacing", "label", "_mask", "mean", "std"):
    np.testing.assert_array_equal(out[key], batch[key])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_stored_types_give_what_float_gives(dtype):
  options = dict(normalize="zscore", crop=(1, 2, 6, 6), scale=(0.0, 0.1, 0.0, 0.0))
  wanted, got = (_run(_batch(dtype=d), **options) for d in (np.float32, dtype))
  assert got["volume"].dtype == jnp.float32
  np.testing.assert_array_equal(got["volume"], wanted["volume"])


def test_zscore_has_mean_0_and_std_1_and_unit_lies_in_0_to_1():
  batch = _batch(dtype=np.uint8)
  flat = _run(batch, normalize="zscore", train=False)["volume"].reshape(3, -1)
  np.testing.assert_allclose(flat.mean(1), 0, atol=1e-5)
  np.testing.assert_allclose(flat.std(1), 1, rtol=1e-5)
  flat = _run(batch, normalize="unit", train=False)["volume"].reshape(3, -1)
  np.testing.assert_array_equal(flat.min(1), 0)
  np.testing.assert_allclose(flat.max(1), 1, rtol=1e-6)


def test_the_range_of_the_stored_type_is_alike_for_all():
  batch = _batch(2, dtype=np.uint8)
  batch["volume"][0] //= 2
  out = _run(batch, normalize="range", train=False)["volume"]
  np.testing.assert_allclose(out, batch["volume"] / 255, rtol=1e-6)


def test_a_constant_volume_stays_finite():
  batch = _batch()
  batch["volume"][:] = 7
  batch["mean"][:], batch["std"][:] = 7, 0
  for how in lib.NORMALIZATIONS:
    assert np.isfinite(_run(batch, normalize=how, gamma=0.5)["volume"]).all()


def test_gamma_of_whole_numbers_that_were_normalised_is_finite():
  """An optimising compiler rounds the z-score twice: a voxel is below the least one."""
  program = (
      "import jax, numpy as np\n"
      "from tests.volumes import test_augment as t\n"
      "for seed in range(3):\n"
      "  batch = t._batch(4, (8, 16, 32, 32), dtype=np.uint8, seed=seed)\n"
      "  out = t._run(batch, normalize='zscore', gamma=0.3, seed=seed)\n"
      "  assert np.isfinite(out['volume']).all(), seed\n"
  )
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
      [sys.executable, "-c", program], env=environment | {"JAX_PLATFORMS": "cpu"},
      capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2],
  )
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("axis", range(4))
def test_a_flip_mirrors_its_axis_and_nothing_else_and_undoes_itself(axis):
  probability = tuple(float(a == axis) for a in range(4))
  batch = _batch(shape=(2, 4, 6, 5))
  once = _run(batch, flip=probability)
  np.testing.assert_array_equal(once["volume"], np.flip(batch["volume"], axis + 1))
  twice = _run(once, flip=probability)
  np.testing.assert_array_equal(twice["volume"], batch["volume"])
  np.testing.assert_array_equal(once["spacing"], batch["spacing"])


def test_flips_come_as_often_as_asked_and_never_axially_by_default():
  batch = _coordinates(400)
  volume = _run(batch, flip=(0.0, 0.3, 0.0, 0.5))["volume"]
  flipped = {
      axis: np.take(volume, 0, axis + 1)[..., axis].reshape(400, -1)[:, 0] > 0
      for axis in range(1, 4)
  }
  assert not flipped[2].any()
  assert abs(flipped[1].mean() - 0.3) < 0.08 and abs(flipped[3].mean() - 0.5) < 0.08
  # Independent draws: the two agree as often as chance says.
  assert abs((flipped[1] & flipped[3]).mean() - 0.15) < 0.06


def test_what_is_handed_is_turned_over_and_turned_but_never_mirrored():
  """The sign of the permutation of axes, seen from three neighbours of a voxel."""
  batch = _coordinates(64, (1, 3, 6, 6))
  volume = _run(batch, flip=(0.0, 0.5, 0.5, 0.0), handed=True, rot90=0.75)["volume"]
  corner = volume[:, 0, 0, 0, 0, 1:]
  steps = np.stack([
      volume[:, 0, 1, 0, 0, 1:] - corner, volume[:, 0, 0, 1, 0, 1:] - corner,
      volume[:, 0, 0, 0, 1, 1:] - corner,
  ], axis=1)
  np.testing.assert_allclose(np.linalg.det(steps), 1.0)
  assert len({s.tobytes() for s in steps}) == 8  # All turns of a square prism.
  free = _run(batch, flip=(0.0, 0.5, 0.5, 0.0))["volume"]
  mirrored = free[:, 0, 0, 0, 1, 3] - free[:, 0, 0, 0, 0, 3]
  assert (mirrored == 1).all()  # Without it X stays, and volumes are mirrored.


def test_one_transform_moves_all_channels_and_both_views_alike():
  """Each voxel carries its place: context and target stay the same anatomy."""
  options = {
      **ALL, "normalize": "none", "brightness": 0.0, "contrast": 0.0, "gamma": 0.0,
      "noise_std": 0.0, "views": "shared_geometry",
  }  # yapf: disable
  out = _run(_coordinates(6), **options)
  np.testing.assert_array_equal(out["volume"], out["volume_context"])
  # Linear interpolation maps the place itself: a channel of one axis stays an
  # affine function of the voxel, inside the border that clamping touches.
  options.update(shift=(0.0,) * 4, scale=(0.0,) * 4, rotate=0.0)
  volume = _run(_coordinates(6), **options)["volume"]
  whole = {tuple(p) for p in _coordinates(1)["volume"].reshape(-1, 4)}
  for one in volume:
    places = [tuple(p) for p in one.reshape(-1, 4)]
    assert set(places) <= whole and len(set(places)) == len(places)
    steps = [np.abs(np.diff(one, axis=a)).sum(-1) for a in range(1, 3)]
    assert all((s == 1).all() for s in steps)  # neighbours stay neighbours


def test_photometric_views_share_the_geometry_but_not_the_noise():
  batch = _batch()
  out = _run(batch, noise_std=0.5, flip=(0, 0, 0, 0.5), views="shared_geometry")
  clean = _run(batch, flip=(0, 0, 0, 0.5))["volume"]
  first, second = (out[k] - clean for k in ("volume", "volume_context"))
  assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.15
  for noise in (first, second):
    np.testing.assert_allclose(noise.std(), 0.5, rtol=0.1)
  assert "volume_context" not in _run(batch, views="shared_geometry", train=False)


def test_a_random_crop_is_a_window_and_reaches_both_ends():
  batch = _coordinates(200, (1, 5, 6, 8))
  volume = _run(batch, crop=(1, 3, 6, 4))["volume"]
  assert volume.shape == (200, 1, 3, 6, 4, 4)
  starts = volume[:, 0, 0, 0, 0]  # [B, 4]
  window = np.stack(
      np.meshgrid(*map(np.arange, (1, 3, 6, 4)), indexing="ij"), axis=-1
  )
  np.testing.assert_array_equal(volume, starts[:, None, None, None, None] + window)
  assert set(starts[:, 1]) == {0, 1, 2} and set(starts[:, 3]) == {0, 1, 2, 3, 4}


def test_what_is_cut_out_in_evaluation_is_the_centre_or_where_the_batch_says():
  batch = _coordinates(2, (1, 5, 6, 8))
  options = dict(crop=(1, 3, 6, 4), train=False)
  centre = _run(batch, **options)["volume"][:, 0, 0, 0, 0]
  np.testing.assert_array_equal(centre, [[0, 1, 0, 2]] * 2)
  starts = np.array([[0, 2, 0, 4], [0, 0, 0, 1]], np.int32)
  said = _run({**batch, "crop_start": starts}, **options)
  np.testing.assert_array_equal(said["volume"][:, 0, 0, 0, 0], starts)
  assert "crop_start" not in said


def _reference_resample(volume, axis, factor, move):
  """Linear interpolation voxel by voxel with numpy.interp."""
  size = volume.shape[axis]
  centre = (size - 1) / 2
  source = (np.arange(size) - centre - move) / factor + centre
  line = lambda v: np.interp(source, np.arange(size), v)
  return np.apply_along_axis(line, axis, volume)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_scale_and_shift_equal_a_numpy_reference(axis):
  volume = _batch(4, (2, 5, 9, 12))["volume"]
  factor = np.array([0.8, 1.0, 1.25, 1.1], np.float32)
  move = np.array([0.0, 2.0, -1.3, 0.4], np.float32)
  got = lib._resample(jnp.asarray(volume), axis + 1, factor, move, 0.25, 2.0)
  for b in range(4):
    wanted = _reference_resample(volume[b], axis, factor[b], move[b])
    np.testing.assert_allclose(got[b], wanted, rtol=1e-4, atol=1e-3)


def test_blocks_of_a_long_axis_see_all_they_need():
  """At the bounds of scale and shift, and beyond one block of outputs."""
  size = 3 * lib._BLOCK + 17
  line = np.random.default_rng(0).normal(size=(4, 2, size)).astype(np.float32)
  factor = np.array([0.7, 1.3, 0.7, 1.3], np.float32)
  move = np.array([-9.0, -9.0, 9.0, 9.0], np.float32)
  got = lib._resample(jnp.asarray(line), 2, factor, move, 0.3, 9.0)
  for b in range(4):
    wanted = _reference_resample(line[b], 1, factor[b], move[b])
    np.testing.assert_allclose(got[b], wanted, atol=2e-4)


@pytest.mark.parametrize("along", [1, 2])
@pytest.mark.parametrize("bound", [0.02, 0.3, 1.0])
def test_a_shear_moves_each_line_by_its_place(along, bound):
  planes = np.random.default_rng(0).normal(size=(5, 20, 31)).astype(np.float32)
  slope = bound * np.array([-1, -0.37, 0, 0.5, 1], np.float32)
  got = np.asarray(lib._shear(jnp.asarray(planes), along, jnp.asarray(slope), bound))
  lines, moved = (np.moveaxis(a, along, 2) for a in (planes, got))
  place = np.arange(lines.shape[2])
  for b in range(5):
    for number, line in enumerate(lines[b]):
      offset = slope[b] * (number - (lines.shape[1] - 1) / 2)
      wanted = np.interp(place - offset, place, line)
      np.testing.assert_allclose(moved[b, number], wanted, atol=1e-4)


def test_no_voxel_is_fetched_by_an_index_of_its_own():
  """Such a gather is the slow way on a TPU; few indices of large windows are not."""
  lowered = _everything("shared_geometry").lower(
      _batch(), jax.random.key(0), train=True
  )
  pattern = r"gather.*?\(tensor<[^>]*>, tensor<((?:\d+x)*)[a-z]+\d+>"
  found = re.findall(pattern, lowered.as_text())
  counts = [math.prod(map(int, sizes.split("x")[:-1])) for sizes in found]
  assert counts and max(counts) <= 3 * 8  # The window of each crop; spacing's axes.


def test_spacing_shrinks_as_the_image_grows():
  batch = _coordinates(50, (1, 4, 8, 16))
  out = _run(batch, scale=(0.0, 0.0, 0.0, 0.3))
  factor = batch["spacing"][:, 3] / out["spacing"][:, 3]
  assert factor.min() < 0.8 and factor.max() > 1.2 and abs(factor - 1).max() <= 0.3
  np.testing.assert_array_equal(out["spacing"][:, :3], batch["spacing"][:, :3])
  step = np.diff(out["volume"][:, 0, 0, 0, 6:10, 3], axis=1)  # stored voxels a voxel
  np.testing.assert_allclose(step, np.tile(1 / factor[:, None], 3), rtol=1e-4)


def test_shift_is_bounded_by_its_amount():
  out = _run(_coordinates(200, (1, 2, 8, 16)), shift=(0.0, 0.0, 0.0, 3.0))["volume"]
  move = 8 - out[:, 0, 0, 0, 8, 3]
  assert abs(move).max() <= 3 and move.min() < -2 and move.max() > 2


def test_rotation_turns_a_plane_about_its_centre():
  size, angle = 33, 0.3
  y, x = np.meshgrid(*(np.arange(size) - size // 2,) * 2, indexing="ij")
  blob = lambda cy, cx: np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 8.0)
  volume = blob(0, 9)[None, None, None, :, :, None].astype(np.float32)
  plane = jnp.asarray(volume[:, 0, 0, :, :, 0])
  image = np.asarray(lib._rotate(plane, jnp.array([angle]), angle))[0]
  centre = np.array([(image * y).sum(), (image * x).sum()]) / image.sum()
  wanted = 9 * np.array([np.sin(angle), np.cos(angle)])
  np.testing.assert_allclose(np.abs(centre), wanted, atol=0.1)
  still = lib._rotate(plane, jnp.zeros(1), angle)
  np.testing.assert_allclose(still, plane, atol=1e-6)


def test_quarter_turns_equal_numpy_and_take_the_spacing_along():
  batch = _batch(40, (1, 2, 6, 6))
  out = _run(batch, rot90=1.0)
  seen = set()
  for row in range(40):
    turned = [np.rot90(batch["volume"][row], k, axes=(2, 3)) for k in range(4)]
    quarters = [k for k in range(4) if np.array_equal(out["volume"][row], turned[k])]
    assert len(quarters) == 1 and quarters[0]
    seen |= set(quarters)
    pair = batch["spacing"][row, 2:]
    wanted = pair[::-1] if quarters[0] % 2 else pair
    np.testing.assert_array_equal(out["spacing"][row, 2:], wanted)
  assert seen == {1, 2, 3}


def test_noise_has_the_std_asked_and_mean_0_as_often_as_asked():
  batch = _batch(64, (1, 4, 16, 16))
  noise = _run(batch, noise_std=0.3, noise_probability=0.5)["volume"] - batch["volume"]
  noisy = np.abs(noise).reshape(64, -1).max(1) > 0
  assert 18 < noisy.sum() < 46
  np.testing.assert_allclose(noise[noisy].std(), 0.3, rtol=0.02)
  np.testing.assert_allclose(noise[noisy].mean(), 0, atol=0.01)


@pytest.mark.parametrize("generator", lib.NOISE_GENERATORS)
def test_noise_is_normal_and_the_samples_own_whatever_draws_it(generator):
  batch = _batch(6, (1, 4, 32, 32))
  augment = jax.jit(
      lib.make_augment(normalize="none", noise_std=1.0, noise_generator=generator),
      static_argnames="train",
  )
  draw = lambda part: np.asarray(augment(part, jax.random.key(3), train=True)["volume"])
  noise = draw(batch) - batch["volume"]
  flat = noise.reshape(6, -1)
  tails = [(np.abs(flat) > bound).mean() for bound in (1, 2, 3)]
  np.testing.assert_allclose(tails, [0.3173, 0.0455, 0.0027], rtol=0.2)
  assert np.abs(np.corrcoef(flat) - np.eye(6)).max() < 0.06
  planes = np.corrcoef(noise.reshape(24, -1))
  assert np.abs(planes - np.eye(24)).max() < 0.2
  # Alone, in another batch, in another order: what it was among the six.
  for rows in ([5], [4, 1], [2, 3, 0]):
    part = {k: v[rows] for k, v in batch.items()}
    np.testing.assert_allclose(draw(part), (batch["volume"] + noise)[rows], atol=1e-4)


def test_brightness_contrast_and_gamma_change_what_they_should():
  batch = _batch(40)
  flat = batch["volume"].reshape(40, -1)
  run = lambda **o: _run(batch, **o)["volume"].reshape(40, -1)
  added = run(brightness=2.0) - flat
  assert np.ptp(added, axis=1).max() < 1e-4 and 1 < np.abs(added).max() <= 2
  ratio = run(contrast=0.2) / flat
  assert np.ptp(ratio, axis=1).max() < 1e-4 and 0.1 < np.abs(ratio - 1).max() <= 0.2
  bent = run(gamma=0.5)
  np.testing.assert_allclose(bent.min(1), flat.min(1), rtol=1e-5)
  np.testing.assert_allclose(bent.max(1), flat.max(1), rtol=1e-5)
  change = bent.mean(1) - flat.mean(1)
  assert change.max() > 1 and change.min() < -1


def test_a_sample_is_augmented_alike_whatever_batch_it_is_in():
  batch = _batch(6)
  whole = _everything("shared_geometry")(batch, jax.random.key(4), train=True)
  parts = [
      _everything("shared_geometry")(
          {k: v[i : i + 3] for k, v in batch.items()}, jax.random.key(4), train=True
      )
      for i in (0, 3)
  ]
  joined = jax.tree.map(lambda *p: np.concatenate(p), *parts)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), whole, joined
  )


def test_draws_repeat_with_the_key_and_differ_between_samples_and_keys():
  batch = _batch(4)
  for key in ("volume", "mean", "std"):
    batch[key][:] = batch[key][:1]
  run = lambda seed: np.asarray(
      _everything()(batch, jax.random.key(seed), train=True)["volume"]
  )
  first = run(0)
  np.testing.assert_array_equal(first, run(0))
  assert not np.allclose(first, run(1))
  assert all(not np.allclose(first[0], other) for other in first[1:])


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_other_types_of_key_serve_as_well(implementation):
  key = jax.random.key(0, impl=implementation)
  batch = _batch(4)
  augment = jax.jit(
      lib.make_augment(crop=(1, 2, 6, 6), noise_std=0.1), static_argnames="train"
  )
  whole = augment(batch, key, train=True)["volume"]
  last = augment({k: v[2:] for k, v in batch.items()}, key, train=True)["volume"]
  np.testing.assert_allclose(whole[2:], last, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options,word",
    [
        ({"flip": (0, 0, 1.5, 0)}, "flip"),
        ({"flip": (0.5, 0.5, 0.5)}, "four numbers"),
        ({"shift": (0, 0, -1, 0)}, "shift"),
        ({"scale": (0, 0, 0, 1.0)}, "scale"),
        ({"rot90": 2}, "rot90 2"),
        ({"noise_std": -0.1}, "noise_std"),
        ({"crop": (1, 9, 8, 8)}, "Z=9 is larger than the volume's 4"),
        ({"crop": (1, 0, 8, 8)}, "crop"),
        ({"normalize": "z-score"}, "closest: zscore"),
        ({"views": "two"}, "closest"),
        ({"rotate_axes": ("Y", "Y")}, "rotate_axes"),
        ({"handed": True, "flip": (0.0, 0.5, 0.5, 0.5)}, "handed"),
    ({"rotate": 1.0}, "rotate 1.0 must be a number in 0..0.785"),
        ({"noise_generator": "philox"}, "closest: "),
        ({"rot90": 0.5, "rot90_axes": ("Z", "X")}, "equal length"),
    ],
)
def test_augment_faults_names_each_fault(options, word):
  faults = lib.augment_faults(options, SHAPE)
  assert len(faults) == 1 and word in faults[0], faults


def test_sound_options_have_no_faults_and_all_faults_come_together():
  assert not lib.augment_faults(ALL, SHAPE)
  assert len(lib.augment_faults({"flip": (2,), "rotate": -1, "views": "x"})) == 3
  with pytest.raises(ValueError, match="flip.*rotate"):
    lib.make_augment(flip=(2.0, 0, 0, 0), rotate=-1.0)


def test_a_volume_that_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="larger than"):
    _run(_batch(), crop=(1, 4, 8, 9))
  batch = _batch()
  batch["volume"] = batch["volume"][..., 0]
  with pytest.raises(ValueError, match="wanted"):
    _run(batch)


def test_one_view_moves_all_time_points_of_a_clip_alike():
  still = _batch(4, (1, 4, 8, 8))
  still["volume"] = np.repeat(still["volume"], 5, axis=1)  # A clip where nothing moves.
  options = {k: v for k, v in ALL.items() if not k.startswith("noise")}
  options |= dict(crop=(5, 2, 6, 6))
  out = _run(still, **options)["volume"]
  assert out.shape[1] == 5
  np.testing.assert_allclose(out, np.repeat(out[:, :1], 5, axis=1), atol=1e-6)
  assert len({frame.tobytes() for frame in out[:, 0]}) == 4
  noisy = _run(still, noise_std=0.1, normalize="zscore")["volume"]
  assert np.abs(np.diff(noisy, axis=1)).min() > 0


def test_what_changes_within_a_clip_keeps_its_order_and_ratio():
  clip = _batch(3, (1, 4, 8, 8))
  fade = np.linspace(1, 0.5, 6, dtype=np.float32).reshape(1, 6, 1, 1, 1, 1)
  clip["volume"] = clip["volume"] * fade
  out = _run(clip, flip=(0.0, 0.5, 0.5, 0.5), rot90=0.5, rotate=0.2, contrast=0.3)
  ratio = out["volume"] / out["volume"][:, :1]
  np.testing.assert_allclose(ratio, np.broadcast_to(fade, ratio.shape), rtol=1e-4)


ON_MESH = """
import json, re
import jax, jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np
from vjepa_jax.volumes import augment as lib

mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "sequence"),
            axis_types=(AxisType.Auto,) * 2)
put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
rng = np.random.default_rng(0)
volume = rng.integers(0, 255, (2, 8, 6, 16, 16, 1)).astype(np.uint8)
batch = dict(
    volume=put(volume, "data"), mean=put(np.full(2, 9.0, np.float32), "data"),
    std=put(np.ones(2, np.float32), "data"), _position=put(np.arange(2), "data"),
)
augment = lib.make_augment(
    rot90=0.9, flip=(0.0, 0.5, 0.5, 0.5), rotate=0.2, scale=(0.0, 0.0, 0.1, 0.1),
    contrast=0.2, noise_std=0.1,
)

def view(batch, key, split):
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    volume = augment(batch, key, train=True)["volume"]
    spec = P("data", "sequence") if split else P("data")
    return jax.lax.with_sharding_constraint(volume, spec)

compiled = {
    split: jax.jit(view, static_argnums=2).lower(batch, jax.random.key(0), split).compile()
    for split in (True, False)
}
split, whole = (compiled[s](batch, jax.random.key(0)) for s in (True, False))
print(json.dumps(dict(
    parts=sorted({s.data.shape[1] for s in split.addressable_shards}),
    sent=re.findall(r" (all-gather|all-to-all|collective-permute)", compiled[True].as_text()),
    error=float(jnp.abs(split - whole).max()),
)))
"""


def test_where_a_mesh_splits_time_no_voxel_is_sent():
  env = os.environ | {
      "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
      "--xla_backend_optimization_level=0",
      "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd(),
  }
  done = subprocess.run(
      [sys.executable, "-c", ON_MESH], env=env, capture_output=True, text=True,
      timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout)
  assert found["parts"] == [2] and found["error"] < 1e-4
  assert found["sent"] == []
