"""Figures made from functions and data."""

import numpy as np
import pytest

from vjepa_jax.evaluators.figures import Evaluator, token_states
from vjepa_jax.report import figures as drawing
from vjepa_jax.volumes.grid import Grid
from vjepa_jax.volumes.masks import Split

GRID = Grid((1, 4, 16, 16), (1, 2, 4, 4))


@pytest.fixture
def functions(patches):
  def masks(params, model_state, batch):
    del params, model_state
    rows = len(batch["_mask"])
    generator = np.random.default_rng(0)
    ids = np.stack([generator.permutation(GRID.tokens) for _ in range(rows)])
    padding = np.arange(10) < 8
    whole = Split(ids[:, :10], ids[:, 10:20], None, None)
    cut = Split(
        ids[:, :10], ids[:, 10:20], np.broadcast_to(padding, (rows, 10)),
        np.broadcast_to(padding, (rows, 10)),
    )
    return whole, cut

  return {**patches, "masks": masks}


def test_both_figures_show_every_device(make_data, functions):
  evaluator = Evaluator(functions, make_data(patients=12), per_device=2)
  found = dict(evaluator.run({"scale": 1.0}, {}))
  assert set(found) == {"figures.masks", "figures.pca"}
  single = Evaluator(functions, make_data(patients=12), per_device=1)
  fewer = dict(single.run({"scale": 1.0}, {}))
  for name, image in found.items():
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert image.std() > 20
    assert image.shape[0] > 1.4 * fewer[name].shape[0]


def test_masks_are_drawn_once_and_features_each_time(make_data, functions):
  evaluator = Evaluator(functions, make_data(patients=12))
  assert len(dict(evaluator.run({"scale": 1.0}, {}))) == 2
  assert set(dict(evaluator.run({"scale": 1.0}, {}))) == {"figures.pca"}


def test_without_masks_the_features_are_still_drawn(make_data, patches):
  found = dict(Evaluator(patches, make_data(patients=12)).run({"scale": 1.0}, {}))
  assert set(found) == {"figures.pca"}


def test_token_states_are_those_of_the_split(functions):
  split, padded = functions["masks"]({}, {}, {"_mask": np.ones(3)})
  whole, cut = token_states([split, padded], 3, GRID.tokens)
  for row in range(3):
    assert set(np.flatnonzero(whole[row] == drawing.CONTEXT)) == set(split.context[row])
    assert set(np.flatnonzero(whole[row] == drawing.TARGET)) == set(split.target[row])
    kept = padded.target[row, :8]
    assert set(np.flatnonzero(cut[row] == drawing.TARGET)) == set(kept)


def test_drawing_alters_nothing_that_it_is_given(make_data, functions):
  data = make_data(patients=12)
  before = data.splits["probe"][0].volume.copy()
  dict(Evaluator(functions, data).run({"scale": 1.0}, {}))
  np.testing.assert_array_equal(data.splits["probe"][0].volume, before)
