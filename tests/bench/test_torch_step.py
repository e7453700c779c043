"""The PyTorch side of the comparison trains what our side trains."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from vjepa_jax.bench import torch_step
from vjepa_jax.interop import vjepa
from vjepa_jax.train import sharding

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = torch_step.Geometry(
    (4, 32, 32), (2, 8, 8), 2, width=24, depth=2, heads=2, predictor=(24, 1, 2)
)


def needs_torch():
  reason = 'no PyTorch side here; pip install "vjepa_jax[bench]"'
  pytest.importorskip("torch", reason=reason)
  pytest.importorskip("transformers", reason=reason)


def test_the_geometries_have_the_tokens_they_are_called_by():
  for tokens, geometry in torch_step.GEOMETRIES.items():
    assert geometry.grid.tokens == tokens
    assert geometry.width % geometry.heads == 0
    batch = torch_step.make_batch(dataclasses.replace(geometry, batch=1))
    ids = np.concatenate([batch["context_ids"], batch["target_ids"]], axis=1)
    np.testing.assert_array_equal(np.sort(ids[0]), np.arange(tokens))
  # 13.2 TFLOP a volume: ViT-B, a third of the tokens visible.
  full = dataclasses.replace(torch_step.GEOMETRIES[9216], batch=1)
  assert full.model_flops() == pytest.approx(13.2e12, rel=0.02)


def test_parameters_of_the_small_geometries_are_those_of_the_reference():
  made = torch_step.make_ours(torch_step.GEOMETRIES[64])
  assert sum(x.size for x in jax.tree.leaves(made.state.params)) == 3_476_544


def test_both_sides_have_equal_parameters_and_equal_losses_for_three_steps():
  needs_torch()
  batch = torch_step.make_batch(SMALL)
  theirs = torch_step.TorchStep(SMALL, batch, arm="sdpa")
  made = torch_step.make_ours(SMALL, rope_layout="vjepa2")
  count = sum(x.size for x in jax.tree.leaves(made.state.params))
  assert count == sum(p.numel() for p in theirs.model.parameters())

  encoder, predictor = torch_step.published_names(theirs.model)
  like = made.state.params
  params = {
      "encoder": vjepa.load_encoder(encoder, like["encoder"], (1, *SMALL.patch)),
      "predictor": vjepa.load_predictor(predictor, like["predictor"]),
  }
  state = made.init(jax.random.key(0))
  params = jax.tree.map(np.array, params)
  state = state.replace(
      params=params,
      model_state={**state.model_state, "target": jax.tree.map(
          np.array, params["encoder"]
      )},
  )
  state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, made.state))
  placed = sharding.put_batch(batch, made.mesh)
  ours, wanted = [], []
  for _ in range(3):
    state, metrics = made.step(state, placed)
    ours.append(float(metrics["loss"][0] / metrics["loss"][1]))
    wanted.append(theirs())
  assert wanted[0] != wanted[2]
  np.testing.assert_allclose(ours, wanted, rtol=2e-5)


def test_too_few_rounds_and_unknown_arms_are_refused():
  with pytest.raises(ValueError, match="rounds=4; at least 5"):
    torch_step.compare(geometry=SMALL, arms=["sdpa"], rounds=4)
  with pytest.raises(ValueError, match="the arms are eager, sdpa, compile"):
    torch_step.compare(geometry=SMALL, arms=["flash"], rounds=5)


@pytest.mark.slow
def test_the_command_prints_one_json_line():
  needs_torch()
  run = subprocess.run(
      [sys.executable, "-m", "vjepa_jax.bench.torch_step", "--tokens=64", "--batch=1",
       "--rounds=5", "--steps=1", "--threads=1", "--json"],
      cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
      capture_output=True, timeout=240,
  )
  assert run.returncode == 0, run.stderr
  printed = json.loads(run.stdout)
  assert printed["name"] == "torch_step" and printed["repeats"] == 5
  assert {"median", "cpu_seconds", "load", "versions", "commit"} <= printed.keys()
  sides = printed["sides"]
  assert sides.keys() == {"ours", "sdpa"}
  assert sides["ours"]["parameters"] == sides["sdpa"]["parameters"]
  for side in sides.values():
    assert side["wall_s"]["median"] > 0 and side["peak_gib"] > 0
    assert side["mfu"] is None
  ratio = printed["ratios"]["sdpa"]
  assert ratio["wall"]["median"] > 0 and ratio["cpu"]["median"] > 0
