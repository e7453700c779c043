"""The published predictor with fixed sin-cos positions."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.interop import vjepa as names
from vjepa_jax.nn import positions
from vjepa_jax.objectives import vjepa
from vjepa_jax.volumes.grid import Grid
from vjepa_jax.volumes.masks import Split


@pytest.fixture(scope="module")
def sincos(shared):
  case = cases.load(shared("fixtures/parity/fb_vjepa_sincos"))
  return case, names.read(case.path / "vjepa_sincos.pt")["predictor"]


def test_the_fixed_table_of_the_checkpoint_is_the_one_we_compute(sincos):
  case, weights = sincos
  table = positions.sincos_table((4, 1, 4, 4), case.config["pred_dim"])
  np.testing.assert_allclose(weights["predictor_pos_embed"][0], table, atol=1e-6)


@pytest.mark.parametrize("mask", [0, 1])
def test_predictions_of_both_masks_match(sincos, mask):
  case, weights = sincos
  c = case.config
  grid = Grid((c["frames"], 1, c["img"], c["img"]), (c["tubelet"], 1, c["patch"], c["patch"]))
  tokens = sum(name.startswith("mask_tokens") for name in weights)
  depth = sum(name.endswith("norm1.weight") for name in weights)
  predictor = vjepa.TransformerPredictor(
      features=c["dim"], groups=tokens, width=c["pred_dim"], depth=depth,
      heads=c["pred_heads"], positions="sincos",
  )
  ids = lambda kind: jnp.asarray(case[f"in/masks_{kind}_{mask}"], jnp.int32)
  split = Split(ids("enc"), ids("pred"))
  context = jnp.asarray(case[f"m/masked/out_{mask}"])
  draw = lambda key: predictor.init(key, context, split, grid)
  like = jax.eval_shape(draw, jax.random.key(0))["params"]
  params = names.load_predictor(weights, like)
  with cases.highest():
    got, _ = jax.jit(
        lambda p: predictor.apply({"params": p}, context, split, grid, group=mask % tokens)
    )(params)
  case.check(f"m/pred/out_{mask}", got)


def test_places_on_a_grid_that_is_not_square_are_the_true_ones(shared):
  case = cases.load(shared("fixtures/parity/fb_vjepa2_encoder_nonsquare"))
  frames, (height, width) = 6, case.config["img"]
  patch, tubelet = case.config["p"], case.config["tub"]
  grid = Grid((frames, 1, height, width), (tubelet, 1, patch, patch))
  for axis, name in ((0, "d"), (2, "h"), (3, "w")):
    case.check(f"correct/pos_{name}", grid.coords()[:, axis])
    # Upstream's predictor takes every grid to be square; ours must not.
  assert (case["pred_refquirk/pos_h"] != grid.coords()[:, 2]).any()
