"""A small objective with an EMA state, and data for it: what the loop is tested on."""

import dataclasses
import time
from typing import ClassVar

import grain
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.train import loop, optim, schedules

WIDTH = 16


@dataclasses.dataclass(frozen=True)
class Toy:
  """Predicts an EMA copy's view of the volume, with noise drawn a row."""

  momentum: float = 0.9

  def init(self, key, batch):
    size = int(np.prod(batch["volume"].shape[1:]))
    first, second = jax.random.split(key)
    params = {
        "encoder": {
            "kernel": 0.3 * jax.random.normal(first, (size, WIDTH)),
            "bias": jnp.zeros((WIDTH,)),
        },
        "head": {"kernel": 0.3 * jax.random.normal(second, (WIDTH, WIDTH))},
    }
    return params, {"target": params["encoder"], "updates": jnp.zeros((), jnp.int32)}

  def loss(self, params, model_state, batch, key, *, train):
    volume = batch["volume"].reshape(len(batch["volume"]), -1)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(batch["_position"])
    noise = jax.vmap(lambda k: jax.random.normal(k, volume.shape[1:]))(keys)
    seen = encode(params["encoder"], volume + 0.1 * noise) @ params["head"]["kernel"]
    target = encode(model_state["target"], volume) + volume[:, :WIDTH]
    error = jnp.abs(seen - jax.lax.stop_gradient(target)).mean(-1) * batch["_mask"]
    weight = batch["_mask"].sum()
    metrics = {"loss": (error.sum(), weight), "seen_std": (seen.std(-1).sum(), weight)}
    return error.sum() / weight, (model_state, metrics)

  def after_update(self, params, model_state, step):
    m = self.momentum
    target = jax.tree.map(
        lambda t, o: m * t + (1 - m) * o, model_state["target"], params["encoder"]
    )
    return {"target": target, "updates": model_state["updates"] + 1}

  def scalars(self, step):
    return {"momentum": jnp.full((), self.momentum)}

  def functions(self):
    return {
        "features": lambda params, state, batch: encode(
            state["target"], batch["volume"].reshape(len(batch["volume"]), -1)
        ),
        "updates": lambda params, state: state["updates"],
    }


@dataclasses.dataclass(frozen=True)
class Labelled(Toy):
  """The same, of the rows alone whose `label` is not negative."""

  needs_labels: ClassVar[bool] = True

  def loss(self, params, model_state, batch, key, *, train):
    known = batch["_mask"] * (batch["label"] >= 0)
    _, (model_state, metrics) = super().loss(
        params, model_state, {**batch, "_mask": known}, key, train=train
    )
    total, weight = metrics["loss"]
    return total / jnp.maximum(weight, 1.0), (model_state, metrics)


def encode(params, rows):
  return jnp.tanh(rows @ params["kernel"] + params["bias"])


def augment(batch, key, *, train):
  """Normalises, and scales each row by a draw of its own while training."""
  volume = batch["volume"].astype(jnp.float32) / 255.0 - 0.5
  if train:
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(batch["_position"])
    scale = jax.vmap(lambda k: jax.random.uniform(k, minval=0.8, maxval=1.2))(keys)
    volume *= scale.reshape(-1, 1, 1, 1, 1, 1)
  return {**batch, "volume": volume}


def batch(seed=0, rows=16):
  """A host batch: volumes uint8 [rows, 1, 2, 4, 4, 1]."""
  rng = np.random.default_rng(seed)
  return {
      "volume": rng.integers(0, 256, (rows, 1, 2, 4, 4, 1), dtype=np.uint8),
      "_mask": np.ones((rows,), np.float32),
  }


def iterator(rows=16, seed=0, poison=(), pace_s=0.0, unlabelled=None):
  """Endless batches by grain; those whose number is in `poison` hold NaN.

  With `unlabelled`, rows have labels, but for batches whose number is in it.
  """

  def draw(index):
    time.sleep(pace_s / rows)
    rng = np.random.default_rng([seed, index % 40])
    volume = rng.integers(0, 256, (1, 2, 4, 4, 1)).astype(np.float32)
    if index // rows in poison:
      volume[:] = np.nan
    row = {"volume": volume, "_mask": np.float32(1)}
    if unlabelled is not None:
      row["label"] = np.int32(-1 if index // rows in unlabelled else 1)
    return row

  data = grain.MapDataset.range(10**6).map(draw)
  return iter(data.to_iter_dataset().batch(rows))


def optimizer(total_steps=40, **options):
  warmup_steps = min(5, total_steps - 1)
  defaults = dict(
      learning_rate=schedules.warmup_cosine(
          1e-2, total_steps, warmup_steps=warmup_steps
      ),
      weight_decay=schedules.cosine(0.04, 0.4, total_steps),
      clip_norm=0.16,
  )
  return optim.make_optimizer(**defaults | options)


def run(
    workdir, *, total_steps=40, data=None, evaluators=None, validate=True,
    objective=None, **options
):
  """Runs the loop on the toy; returns the last state."""
  options = {"log_every_steps": 3, "tensorboard": False, "batch_size": 16, **options}
  return loop.run(
      objective=objective or Toy(),
      optimizer=optimizer(total_steps),
      augment=augment,
      train_iterator=data or iterator(options["batch_size"]),
      workdir=workdir,
      options=loop.LoopOptions(total_steps=total_steps, **options),
      config={"name": "toy"},
      seed=7,
      eval_batches=(lambda: [batch(seed) for seed in range(2)]) if validate else None,
      evaluators=evaluators,
  )
