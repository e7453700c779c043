"""What people use from Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vjepa_jax
from vjepa_jax import config as config_lib
from vjepa_jax.train import loop


def test_build_gives_features_and_class_token_in_one_call():
  model = vjepa_jax.build(
      "tiny", width=32, depth=1, heads=2, patch=(1, 2, 4, 4), class_token=True
  )
  volume = jnp.ones((2, 1, 4, 8, 8, 1))
  features, _ = jax.jit(model.init_with_output)(jax.random.key(0), volume)
  assert features.tokens.shape == (2, 8, 32) and features.cls.shape == (2, 32)


def test_an_unknown_preset_names_the_closest():
  with pytest.raises(ValueError, match="large"):
    vjepa_jax.build("larg")


@pytest.mark.slow
def test_load_gives_both_encoders_of_a_run(tmp_path, monkeypatch):
  from vjepa_jax import main

  monkeypatch.setenv("VJEPA_JAX_CACHE", str(tmp_path / "cache"))
  config = config_lib.load("configs/oct_multi.py:tiny")
  with config.unlocked():
    config.train.total_steps = 3
    config.train.best_metric = ""
    config.evals = {}
  seen = {}
  run = loop.run
  monkeypatch.setattr(loop, "run", lambda **k: seen.setdefault("state", run(**k)))
  main.train(config, tmp_path / "run")
  model = vjepa_jax.load(str(tmp_path / "run"))
  assert model.step == 3
  volume = np.random.default_rng(0).normal(size=(2, 1, 8, 32, 32, 1))
  for encoder, params in (
      ("context", seen["state"].params["encoder"]),
      ("target", seen["state"].model_state["target"]),
  ):
    want = model.backbone.apply({"params": params}, volume)
    got = model.features(volume, encoder=encoder)
    np.testing.assert_allclose(got.pooled, want.pooled, atol=1e-5)
  different = model.features(volume, encoder="context").pooled
  assert np.abs(different - model.features(volume).pooled).max() > 1e-4
  with pytest.raises(KeyError, match="context"):
    model.features(volume, encoder="online")
