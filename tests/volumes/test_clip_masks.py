"""Masks of clips: tubes through time, frames, frame by frame, and where they look."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.volumes import masks
from vjepa_jax.volumes.grid import Grid

DIMS = (4, 2, 3, 5)  # 30 places
GRID = Grid(DIMS, (1, 1, 1, 1))
OPTIONS = dict(
    tube=dict(through="T", context=32, target=72),
    frame_random=dict(context=32, target=72), frames=dict(context=30, target=60),
)


def draw(kind, rows=40, seed=0, weights=None, **changes):
  keys = masks.sample_keys(jax.random.key(seed), jnp.arange(rows))
  options = OPTIONS.get(kind, {}) | changes
  if weights is not None:
    options["weights"] = jnp.broadcast_to(jnp.asarray(weights), (rows, GRID.tokens))
  split = jax.jit(lambda keys: masks.sample(kind, keys, GRID, **options))(keys)
  return jax.tree.map(np.asarray, split)


@pytest.mark.parametrize("kind", OPTIONS)
def test_counts_are_fixed_and_context_and_target_apart(kind):
  split, options = draw(kind), OPTIONS[kind]
  assert split.context_valid is None and split.target_valid is None
  assert split.context.shape == (40, options["context"])
  assert split.target.shape == (40, options["target"])
  for context, target in zip(split.context, split.target, strict=True):
    assert np.all(np.diff(context) > 0) and np.all(np.diff(target) > 0)
    assert not set(context) & set(target)
    assert min(*context, *target) >= 0 and max(*context, *target) < GRID.tokens
  assert len({tuple(row) for row in split.target}) > 4
  assert not np.array_equal(split.target, draw(kind, seed=1).target)


def test_a_tube_through_time_is_the_same_place_in_every_frame():
  split = draw("tube")
  for ids in (split.context, split.target):
    places = ids.reshape(40, 4, -1) - 30 * np.arange(4)[:, None]
    np.testing.assert_array_equal(places, np.repeat(places[:, :1], 4, axis=1))
  # In z too, places are drawn one by one.
  planes = {tuple(row) for row in split.target[:, :18] // 15}
  assert len(planes) > 4


def test_every_frame_has_as_many_random_tokens_and_others():
  split = draw("frame_random")
  for ids, each in ((split.context, 8), (split.target, 18)):
    frames = ids.reshape(40, 4, each)
    np.testing.assert_array_equal(frames // 30, np.arange(4)[:, None] + 0 * frames)
    assert np.any(frames[:, 0] != frames[:, 1] - 30)


def test_whole_frames_are_shown_or_hidden():
  split = draw("frames")
  for ids, number in ((split.context, 1), (split.target, 2)):
    frames = ids.reshape(40, number, 30)
    np.testing.assert_array_equal(frames % 30, np.arange(30) + 0 * frames)
  hidden = np.bincount(split.target.ravel() // 30, minlength=4)
  assert hidden.min() > 0


@pytest.mark.parametrize("kind", ["tube", "frame_random", "random"])
def test_heavy_tokens_are_hidden_sooner(kind):
  weights = np.ones(DIMS, np.float32)
  weights[:, :, 1, 2] = 9.0  # two places of thirty
  target = 1 if kind == "random" else 4  # a token of every frame
  split = draw(
      kind, rows=2000, weights=weights.reshape(-1), context=8, target=target
  )
  wanted = 2 * 9 / (28 + 2 * 9)
  places = np.asarray(split.target) % 30 % 15
  found = np.mean(places == 7)
  assert abs(found - wanted) < 0.05, (found, wanted)


def test_texture_weighs_what_is_not_flat_and_leaves_nothing_out():
  grid = Grid((1, 2, 8, 8), (1, 2, 4, 4))
  volume = np.zeros((2, 1, 2, 8, 8, 1), np.float32)
  volume[0, :, :, :4, :4] = np.random.default_rng(0).normal(size=(1, 2, 4, 4, 1))
  weight = np.asarray(masks.texture(jnp.asarray(volume), grid))
  np.testing.assert_allclose(weight.sum(axis=1), 1, rtol=1e-5)
  assert weight[0, 0] > 0.7 and weight[0].min() > 0.01
  np.testing.assert_allclose(weight[1], 0.25, rtol=1e-5)


def test_shares_are_rounded_to_what_stays_together():
  volume = jnp.zeros((3, *DIMS, 1))
  groups = {
      "a": dict(kind="tube", through="T", context=0.25, target=0.75),
      "b": dict(kind="frames", context=0.25, target=0.5),
      "c": dict(kind="frame_random", context=0.1, target=0.9, prior="texture"),
  }
  splits = masks.draw(groups, volume, GRID, jax.random.key(0), jnp.arange(3))
  assert [s.context.shape[1] for s in splits] == [8 * 4, 30, 3 * 4]
  assert [s.target.shape[1] for s in splits] == [22 * 4, 60, 27 * 4]
  for group in groups.values():
    assert masks.mask_faults(group, GRID) == []


@pytest.mark.parametrize(
    "group, words",
    [
        (dict(kind="tube", through="T", context=31, target=40), ["multiples of 4"]),
        (dict(kind="frames", context=30, target=100), ["multiples of 30"]),
        (dict(kind="frames", context=0.5, target=0.75), ["frames", "fit together"]),
        (dict(kind="tube", through="Z", context=0.2, target=0.2), ["closest: TZ"]),
        (
            dict(kind="frames", context=0.2, target=0.2, prior="texture"),
            ["prior is no option of frames"],
        ),
        (dict(kind="frame", context=0.2, target=0.2), ["closest: frames"]),
    ],
)
def test_groups_that_do_not_fit_are_refused(group, words):
  faults = "\n".join(masks.mask_faults(group, GRID))
  assert all(word in faults for word in words), faults
  if "multiples" in words[0]:
    with pytest.raises(ValueError, match=words[0]):
      draw(**group)
