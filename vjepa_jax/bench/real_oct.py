"""Does it learn from REAL OCT? Token probes on an intravascular pullback.

  python -m vjepa_jax.bench.real_oct --data=ivoct_pullback_186x250x250.npz --seeds=0,1,2

Pre-trains the sample's model on sub-volumes of frames 0-63 and 104-124 of one
coronary pullback (186 frames, keys `vol` u8 [Z, Y, X] and `mask_bits` with bits 1
lumen, 2 fibrous cap, 4 lipid core), then fits a ridge readout per token on those
frames and tests it on frames 130-185 (lumen) and 70-99 (lumen, cap, lipid).
Adjacent frames correlate at 0.93, frames 60 apart at 0.33: the gaps matter.

The trained encoder stands beside the untrained one, intensity statistics of the
token's voxels, and its place in the frame; each also joined with the place. One
pullback is one patient: this tests reading on along a vessel, not new patients.
Prints one JSON line; without the file it says so and prints nothing else.
"""

from collections.abc import Iterator
import json
import pathlib
import sys

from absl import app, flags
import jax
import numpy as np

from vjepa_jax import config as config_lib
from vjepa_jax.evaluators import ridge
from vjepa_jax.train.state import init_state
from vjepa_jax.train.step import make_train_step
from vjepa_jax.volumes import augment
from vjepa_jax.volumes.grid import Grid

_DATA = flags.DEFINE_string("data", None, "The pullback, .npz.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of initialisation and of draws.")
_STEPS = flags.DEFINE_integer("steps", 1000, "Optimiser steps.")

VOXELS, PATCH, BATCH = (1, 16, 96, 96), (1, 4, 12, 12), 16
TRAIN, FAR, NEAR = ((0, 64), (104, 125)), ((130, 186),), ((70, 100),)
SPLITS = {"train": TRAIN, "far": FAR, "near": NEAR}
QUESTIONS = (("far", "lumen"), ("near", "lumen"), ("near", "cap"), ("near", "lipid"))
# Corners of the windows that together cover 120 x 120 of a frame of 125 x 125.
CORNERS = [(y, x) for y in (0, 24) for x in (0, 24)]
TISSUES = {"lumen": 1, "cap": 2, "lipid": 4}
RIDGE = 10.0


def main(argv: list[str]) -> None:
  """Runs every seed and prints one JSON line."""
  del argv
  path = pathlib.Path(_DATA.value or "")
  if not path.is_file():
    print(
        f"real_oct: skipped, there is no file {_DATA.value!r}; name the pullback "
        "with --data=", file=sys.stderr,
    )
    return
  pullback = Pullback(path)
  results = [run(pullback, int(seed), _STEPS.value) for seed in _SEEDS.value]
  print(json.dumps({"name": "real_oct", "steps": _STEPS.value, "seeds": results}))


class Pullback:
  """The volume, binned by two in the plane, and its tissues."""

  def __init__(self, path: pathlib.Path):
    found = np.load(path)
    self.volume = _binned(found["vol"].astype(np.float32))
    bits = found["mask_bits"]
    self.tissues = {
        name: _binned(((bits & bit) > 0).astype(np.float32))
        for name, bit in TISSUES.items()
    }

  def batches(self, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields random crops of the training frames, flipped and transposed."""
    rng = np.random.default_rng(seed)
    depth, height, width = VOXELS[1:]
    starts = [s for a, b in TRAIN for s in range(a, b - depth + 1)]
    while True:
      crops = []
      for z in rng.choice(starts, BATCH):
        y, x = rng.integers(0, 126 - height), rng.integers(0, 126 - width)
        crop = self.volume[z : z + depth, y : y + height, x : x + width]
        crop = crop[:: rng.choice((-1, 1)), :: rng.choice((-1, 1)), :: rng.choice((-1, 1))]
        crops.append(crop.swapaxes(1, 2) if rng.random() < 0.5 else crop)
      yield _batch(np.stack(crops))

  def windows(
      self, ranges: tuple[tuple[int, int], ...]
  ) -> tuple[dict[str, np.ndarray], list[tuple[int, int, int]]]:
    """Returns all windows that tile the frames of the ranges, and their corners."""
    depth, height, width = VOXELS[1:]
    places = [
        (z, y, x) for first, last in ranges
        for z in sorted({*range(first, last - depth + 1, depth), last - depth})
        for y, x in CORNERS
    ]
    cut = [
        self.volume[z : z + depth, y : y + height, x : x + width] for z, y, x in places
    ]
    return _batch(np.stack(cut)), places

  def truth(self, places: list[tuple[int, int, int]], tissue: str) -> np.ndarray:
    """Returns the share of each token that is the tissue, [tokens of all windows]."""
    depth, height, width = VOXELS[1:]
    cut = np.stack([
        self.tissues[tissue][z : z + depth, y : y + height, x : x + width]
        for z, y, x in places
    ])
    return _patches(cut).mean(axis=-1).reshape(-1)


def run(pullback: Pullback, seed: int, steps: int) -> dict[str, float]:
  """Trains one seed and returns R2 (lumen, cap) and AUC (lipid) of every probe."""
  plain = config_lib.as_plain(config_lib.load("configs/oct_multi.py:sample"))
  plain["model"]["patch"] = PATCH
  plain["optimizer"]["warmup_steps"] = min(50, steps // 2)
  length = dict(total_steps=steps, steps_per_epoch=1)
  objective, optimizer = config_lib.objective_and_optimizer(
      plain, **length, batch_size=BATCH
  )
  unit_augment = augment.make_augment()
  batches = pullback.batches(seed)
  state = jax.jit(
      lambda batch, key: init_state(objective, optimizer, unit_augment, batch, key)
  )(next(batches), jax.random.key(seed))
  step = jax.jit(make_train_step(objective, optimizer, augment=unit_augment), donate_argnums=0)
  features = jax.jit(objective.functions()["features"])
  encode = lambda state, batch: encode_windows(features, unit_augment, state, batch)
  looked_at = {name: pullback.windows(r) for name, r in SPLITS.items()}
  untrained = {name: encode(state, batch) for name, (batch, _) in looked_at.items()}
  for _ in range(steps):
    state, metrics = step(state, next(batches))
  trained = {name: encode(state, batch) for name, (batch, _) in looked_at.items()}
  loss = float(metrics["loss"][0] / metrics["loss"][1])
  return {"seed": seed, "loss": loss, **scores(pullback, looked_at, untrained, trained)}


def encode_windows(features, unit_augment, state, batch) -> np.ndarray:
  """Returns the target encoder's tokens of all windows, [tokens, D]."""
  tokens = []
  for start in range(0, len(batch["volume"]), BATCH):
    part = {k: v[start : start + BATCH] for k, v in batch.items()}
    part["_position"] = np.arange(len(part["volume"]), dtype=np.int32)
    part = unit_augment(part, jax.random.key(0), train=False)
    tokens.append(np.asarray(features(state.params, state.model_state, part).tokens))
  tokens = np.concatenate(tokens)
  return tokens.reshape(-1, tokens.shape[-1])


def scores(pullback, looked_at, untrained, trained) -> dict[str, float]:
  """Fits and tests a ridge readout of every kind of feature."""
  place = {n: position(places) for n, (_, places) in looked_at.items()}
  bright = {n: intensity(batch) for n, (batch, _) in looked_at.items()}
  joined = lambda a, b: {n: np.concatenate([a[n], b[n]], axis=1) for n in a}
  kinds = {
      "trained": trained, "trained+position": joined(trained, place),
      "untrained": untrained, "untrained+position": joined(untrained, place),
      "intensity": bright, "intensity+position": joined(bright, place),
      "position": place,
  }
  found = {}
  for split, tissue in QUESTIONS:
    known = pullback.truth(looked_at["train"][1], tissue)
    wanted = pullback.truth(looked_at[split][1], tissue)
    for kind, features in kinds.items():
      readout = ridge.fit_ridge(features["train"], known[:, None], alphas=(RIDGE,))
      guess = readout(features[split])[0, :, 0]
      score = auc(wanted > 0.5, guess) if tissue == "lipid" else ridge.r2(wanted, guess)
      found[f"{split}.{tissue}.{kind}"] = round(score, 4)
  return found


def intensity(batch: dict[str, np.ndarray]) -> np.ndarray:
  """Returns statistics of each token's voxels, z-scored by window, [tokens, 8]."""
  volume = batch["volume"][:, 0, ..., 0]
  mean, std = batch["mean"][:, None, None, None], batch["std"][:, None, None, None]
  voxels = _patches((volume - mean) / std)
  voxels = voxels.reshape(-1, voxels.shape[-1])
  percentiles = np.percentile(voxels, (0, 10, 25, 50, 75, 90, 100), axis=1).T
  return np.concatenate([percentiles, voxels.std(axis=1, keepdims=True)], axis=1)


def position(places: list[tuple[int, int, int]]) -> np.ndarray:
  """Returns one-hot places in the frame, [tokens, rows + columns + both]."""
  grid = Grid(VOXELS, PATCH)
  coords = grid.coords()[:, 2:]  # [N, 2]
  corners = np.array(places)[:, 1:] // np.array(PATCH[2:])  # [windows, 2]
  cells = (corners[:, None] + coords).reshape(-1, 2)
  size = cells.max() + 1
  return np.eye(size * size, dtype=np.float32)[cells[:, 0] * size + cells[:, 1]]


def auc(positive: np.ndarray, guess: np.ndarray) -> float:
  """Area under the ROC curve, ties counted half."""
  _, inverse, counts = np.unique(guess, return_inverse=True, return_counts=True)
  ranks = np.cumsum(counts) - (counts - 1) / 2.0
  hits = positive.sum()
  return float(
      (ranks[inverse][positive].sum() - hits * (hits + 1) / 2) / hits / (~positive).sum()
  )


def _binned(volume: np.ndarray) -> np.ndarray:
  z, y, x = volume.shape
  return volume.reshape(z, y // 2, 2, x // 2, 2).mean(axis=(2, 4))


def _batch(volumes: np.ndarray) -> dict[str, np.ndarray]:
  rows = len(volumes)
  return {
      "volume": volumes[:, None, ..., None].astype(np.float32),
      "mean": volumes.mean(axis=(1, 2, 3)).astype(np.float32),
      "std": volumes.std(axis=(1, 2, 3)).astype(np.float32),
      "spacing": np.full((rows, 4), np.nan, np.float32),
      "index": np.arange(rows, dtype=np.int32),
      "_mask": np.ones(rows, np.float32),
  }


def _patches(volumes: np.ndarray) -> np.ndarray:
  """Cuts windows [W, Z, Y, X] into tokens [W, N, voxels]."""
  return np.asarray(Grid(VOXELS, PATCH).patchify(volumes[:, None, ..., None]))


if __name__ == "__main__":
  app.run(main)
