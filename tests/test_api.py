"""What people use from Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vjepa_jax
from vjepa_jax import config as config_lib
from vjepa_jax.train import checkpoint, loop, watch


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


def test_features_of_one_shape_are_compiled_once():
  model = vjepa_jax.build("tiny", width=16, depth=1, heads=2, patch=(1, 2, 4, 4))
  volume = jnp.ones((1, 1, 4, 8, 8, 1))
  params = jax.jit(model.init)(jax.random.key(0), volume)["params"]
  encoders = vjepa_jax.Encoders(model, {"target": params}, {}, 0)
  watch.compile_count()
  encoders.features(volume)
  before = watch.compile_count()
  encoders.features(volume)
  assert watch.compile_count() == before


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
  best = checkpoint.Checkpoints(
      tmp_path / "run" / "checkpoints" / "best", keep=2, best_mode="max"
  )
  for step, metric in ((1, 0.9), (2, 0.5)):
    best.save(step, seen["state"], config={}, metric=metric)
  best.close()
  assert vjepa_jax.load(str(tmp_path / "run"), best=True).step == 1
