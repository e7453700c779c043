"""Health of features, and the alarm against collapse."""

import numpy as np
import pytest

from vjepa_jax.backbones.base import Features
from vjepa_jax.evaluators import health
from vjepa_jax.evaluators.health import Evaluator
from vjepa_jax.volumes.grid import Grid

GRID = Grid((1, 4, 16, 16), (1, 2, 4, 4))


def _tokens(rows=600, width=32, seed=0):
  generator = np.random.default_rng(seed)
  # Variance falls off, as in features that mean something.
  return generator.normal(size=(rows, width)) * np.linspace(2.0, 0.05, width) ** 2


@pytest.mark.parametrize("shape", [(300, 20), (20, 300)])
def test_rankme_is_the_entropy_of_the_singular_values(shape):
  tokens = np.random.default_rng(0).normal(1.0, 1.0, size=shape)
  for centred in (False, True):
    matrix = tokens - tokens.mean(axis=0) if centred else tokens
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values / values.sum()
    shares = shares[shares > 1e-12]
    wanted = np.exp(-(shares * np.log(shares)).sum())
    assert health.rankme(tokens, centred=centred) == pytest.approx(wanted, rel=1e-5)


def test_rankme_of_known_spectra():
  assert health.rankme(np.eye(7), centred=False) == pytest.approx(7.0)
  assert health.rankme(np.ones((50, 9)), centred=False) == pytest.approx(1.0, rel=1e-5)
  assert health.rankme(np.zeros((5, 3)), centred=False) == 1.0
  assert np.isnan(health.rankme(np.full((5, 3), np.nan), centred=True))


def test_mean_cosine_is_that_of_all_pairs():
  tokens = _tokens(40)
  units = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
  pairs = (units @ units.T)[~np.eye(40, dtype=bool)]
  assert health.mean_cosine(tokens) == pytest.approx(pairs.mean())


def test_otsu_parts_two_groups():
  generator = np.random.default_rng(0)
  dark, bright = generator.normal(10, 2, 300), generator.normal(40, 3, 60)
  threshold = health.otsu(np.concatenate([dark, bright]))
  assert (dark <= threshold).all() and (bright > threshold).all()
  assert health.otsu(np.full(9, 3.0)) == 3.0


def test_foreground_tokens_are_the_bright_ones():
  volume = np.full((2, 1, 4, 16, 16, 1), 5, np.uint8)
  volume[0, :, :, 4:8] = 200
  volume[1, :, 2:, :, 12:] = 90
  found = health.foreground_tokens(volume, GRID).reshape(2, 2, 4, 4)
  assert found[0].sum() == 8 and found[0, :, 1].all()
  assert found[1].sum() == 4 and found[1, 1, :, 3].all()
  noise = np.random.default_rng(0).integers(0, 255, volume.shape).astype(np.uint8)
  assert health.foreground_tokens(noise, GRID, "median").mean() == 0.5


def test_a_larger_volume_is_cropped_in_the_middle():
  volume = np.zeros((1, 1, 6, 16, 20, 1), np.uint8)
  volume[:, :, 1:5, :, 2:18] = 9
  assert (health.centre_crop(volume, GRID) == 9).all()
  with pytest.raises(ValueError, match="smaller than the grid"):
    health.centre_crop(volume[:, :, :3], GRID)


def _functions():
  """Tokens = params["mean"] + params["spread"] * a fixed draw a volume."""

  def features(params, model_state, batch):
    del model_state
    draws = [
        _tokens(GRID.tokens, seed=int(index)) for index in np.maximum(batch["index"], 0)
    ]
    return Features(params["mean"] + params["spread"] * np.stack(draws), GRID)

  return {"features": features}


ALIVE = {"mean": 0.0, "spread": 1.0}
COLLAPSED = {"mean": 1.0, "spread": 1e-3}


def _white(params, model_state, batch):
  """A collapse to one vector, with noise around it that has full rank."""
  del params, model_state
  noise = np.random.default_rng(0).normal(size=(len(batch["index"]), GRID.tokens, 32))
  return Features(1.0 + 1e-3 * noise, GRID)


def test_a_total_collapse_alarms_although_the_centred_rankme_rises(
    make_data, caplog
):
  data = make_data(patients=8)
  alive = Evaluator(_functions(), data, tokens=512)
  start = dict(alive.run(ALIVE, {}))
  alive._functions = {"features": _white}
  end = dict(alive.run({}, {}))
  assert end["health.rankme"] > 1.2 * start["health.rankme"]
  assert end["health.rankme_uncentred"] < 0.1 * start["health.rankme_uncentred"]
  assert (start["health.alarm"], end["health.alarm"]) == (0.0, 1.0)
  assert "health.cosine is 1.0000, above 0.99" in caplog.text
  assert "health.std is 0.0009" in caplog.text or "health.std is 0.001" in caplog.text
  assert "health.rankme_uncentred is 1." in caplog.text
  assert "health.rankme is" not in caplog.text


def test_a_shrunken_spread_alone_alarms(make_data, caplog):
  evaluator = Evaluator(_functions(), make_data(patients=8), tokens=512)
  assert dict(evaluator.run(ALIVE, {}))["health.alarm"] == 0.0
  assert dict(evaluator.run(ALIVE | {"spread": 0.2}, {}))["health.alarm"] == 0.0
  assert not caplog.text
  shrunken = dict(evaluator.run(ALIVE | {"spread": 0.05}, {}))
  assert shrunken["health.alarm"] == 1.0
  assert shrunken["health.cosine"] < 0.5
  assert "health.std" in caplog.text and "health.cosine" not in caplog.text


def test_features_that_are_not_finite_alarm(make_data):
  evaluator = Evaluator(_functions(), make_data(patients=8), tokens=512)
  dict(evaluator.run(ALIVE, {}))
  assert dict(evaluator.run(ALIVE | {"spread": np.nan}, {}))["health.alarm"] == 1.0


def test_a_resumed_run_is_judged_by_its_first_values(make_data):
  data = make_data(patients=8)
  shrunken = ALIVE | {"spread": 0.05}
  fresh = Evaluator(_functions(), data, tokens=512)
  assert dict(fresh.run(shrunken, {}))["health.alarm"] == 0.0
  first = Evaluator(_functions(), data, tokens=512)
  history = [{"step": 0, "loss": 1.0}, {"step": 0, **dict(first.run(ALIVE, {}))}]
  unbroken = dict(first.run(shrunken, {}))
  resumed = Evaluator(_functions(), data, tokens=512)
  resumed.restore([*history, {"step": 5, "health.std": 1e-9, "health.cosine": None}])
  assert dict(resumed.run(shrunken, {})) == unbroken
  assert unbroken["health.alarm"] == 1.0


def test_numbers_follow_their_definitions(make_data):
  data = make_data(patients=8)
  evaluator = Evaluator(_functions(), data, volumes=16, tokens=16 * GRID.tokens)
  found = dict(evaluator.run(ALIVE, {}))
  tokens = np.stack([_tokens(GRID.tokens, seed=i) for i in range(16)])
  flat = tokens.reshape(-1, 32).astype(np.float32).astype(np.float64)
  assert found["health.std"] == pytest.approx(flat.std(axis=0).mean(), rel=1e-5)
  assert found["health.dead"] == pytest.approx((flat.std(axis=0) < 0.01).mean())
  assert found["health.cosine"] == pytest.approx(health.mean_cosine(flat), abs=1e-6)
  assert found["health.rankme"] == pytest.approx(health.rankme(flat, centred=True))
  means = tokens.mean(axis=1)
  assert found["health.std_volumes"] == pytest.approx(
      means.std(axis=0).mean(), rel=1e-4
  )


def test_foreground_numbers_are_of_foreground_tokens(make_data):
  """Bright tokens are all one vector; the others are spread."""

  def paint(volume, label, patient):
    del label, patient
    volume[0, :, 4:8] += 100.0

  def features(params, model_state, batch):
    del params, model_state
    bright = health.foreground_tokens(batch["volume"], GRID)
    noise = np.random.default_rng(0).normal(size=(*bright.shape, 16))
    return Features(np.where(bright[..., None], 1.0 + 1e-4 * noise, noise), GRID)

  data = make_data(patients=8, paint=paint)
  found = dict(Evaluator({"features": features}, data, tokens=512).run({}, {}))
  assert found["health.cosine_foreground"] > 0.999
  assert found["health.std_foreground"] < 1e-3
  assert found["health.cosine"] < 0.3 and found["health.std"] > 0.5
  assert found["health.alarm"] == 0.0


def test_the_offset_of_the_target_is_asked_of_the_objective(make_data):
  data = make_data(patients=8)
  functions = _functions()
  assert "health.target_offset" not in dict(Evaluator(functions, data).run(ALIVE, {}))
  functions["target_offset"] = lambda params, state: np.float32(state["far"])
  found = dict(Evaluator(functions, data).run(ALIVE, {"far": 0.25}))
  assert found["health.target_offset"] == 0.25


def test_the_same_tokens_are_looked_at_every_time(make_data):
  evaluator = Evaluator(_functions(), make_data(patients=20), volumes=7, tokens=60)
  assert dict(evaluator.run(ALIVE, {})) == dict(evaluator.run(ALIVE, {}))


def test_it_refuses_unknown_options(make_data):
  with pytest.raises(ValueError, match="foreground 'bright' is not one of otsu"):
    Evaluator(_functions(), make_data(), foreground="bright")
  with pytest.raises(KeyError, match="must offer 'features'; it offers loss"):
    Evaluator({"loss": None}, make_data())
