"""What it costs to split one train step over eight devices, on this machine's CPU.

python -m vjepa_jax.bench.scaling [--config=FILE[:ARG]] [--repeats=9]

Eight virtual devices share the cores of one CPU, so that nothing can become faster:
the ratio of CPU seconds to the same step on one device is what splitting costs. The
two alternate. The batch is of random voxels.
"""

from collections.abc import Mapping
import time
from typing import Any

from absl import app, flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np

from vjepa_jax import config as config_lib
from vjepa_jax.bench import common
from vjepa_jax.config import programs
from vjepa_jax.train import program, sharding

DEVICES = 8
_STEPS = dict(total_steps=1000, steps_per_epoch=10)


def random_batch(plain: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
  """Returns a host batch [B, ...] of random voxels, as the data of a config give it."""
  rng, rows = np.random.default_rng(seed), plain["train"]["batch_size"]
  canvas = plain["data"]["canvas"]
  return {
      "volume": rng.integers(0, 256, (rows, 1, *canvas, 1), dtype=np.uint8),
      "mean": np.full(rows, 127.5, np.float32), "std": np.full(rows, 74.0, np.float32),
      "spacing": np.full((rows, 4), 0.02, np.float32),
      "_mask": np.ones(rows, np.float32),
  }


def make_run(plain: Mapping[str, Any], mesh: jax.sharding.Mesh) -> program.Program:
  """Builds the train step of a config on a mesh, without its data.

  The warm-up is short, so that a difference between two runs can show in few steps.

  Args:
    plain: of `config.as_plain`.
    mesh: of `sharding.make_mesh`.
  """
  return programs.step_program(plain, mesh, lengths=_STEPS)


def measure(
    plain: Mapping[str, Any], *, config: str, repeats: int = 9, warmup: int = 2
) -> dict[str, Any]:
  """Alternates a step on one device, on eight along data, and on eight along fsdp.

  Args:
    plain: of `config.as_plain`.
    config: FILE:ARG, for the line.
    repeats: timed steps of each.
    warmup: untimed steps before.

  Returns:
    The numbers of `common.line` for fsdp, with the ratios of CPU seconds to one
    device, the largest relative difference of a loss, and the share of the state's
    bytes that one device holds.
  """
  meshes = {
      "one": sharding.make_mesh(devices=jax.devices()[:1]),
      "data": sharding.make_mesh(data=DEVICES),
      "fsdp": sharding.make_mesh(fsdp=DEVICES),
  }
  runs = {name: make_run(plain, mesh) for name, mesh in meshes.items()}
  states = {name: run.init(jax.random.key(0)) for name, run in runs.items()}
  cpu, wall, losses = ({name: [] for name in runs} for _ in range(3))
  for repeat in range(warmup + repeats):
    batch = random_batch(plain, repeat)
    for name, run in runs.items():
      placed = jax.block_until_ready(sharding.put_batch(batch, run.mesh))
      begin, begin_cpu = time.perf_counter(), time.process_time()
      states[name], metrics = run.step(states[name], placed)
      jax.block_until_ready((states[name], metrics))
      if repeat >= warmup:
        wall[name].append(time.perf_counter() - begin)
        cpu[name].append(time.process_time() - begin_cpu)
      losses[name].append(float(metrics["loss"][0] / metrics["loss"][1]))
  median = {name: float(np.median(values)) for name, values in cpu.items()}
  difference = {
      name: max(abs(a - b) / abs(b) for a, b in zip(losses[name], losses["one"]))
      for name in ("data", "fsdp")
  }
  return common.line(
      "scaling", config, wall["fsdp"], cpu["fsdp"],
      cpu_seconds_one=median["one"],
      cpu_ratio_data=median["data"] / median["one"],
      cpu_ratio_fsdp=median["fsdp"] / median["one"],
      loss_difference=difference, steps=warmup + repeats,
      state_share_fsdp=state_share(states["fsdp"], plain["train"]["fsdp_min_size"]),
      state_share_fsdp_all=state_share(states["fsdp"], 0),
  )


def state_share(state: Any, min_size: int) -> float | None:
  """Returns the share of a state's bytes that the first device holds; None of none.

  Args:
    state: tree of arrays.
    min_size: arrays with fewer elements do not count.
  """
  leaves = [
      leaf for leaf in jax.tree.leaves(state)
      if leaf.size >= min_size and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
  ]
  held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
  whole = sum(leaf.nbytes for leaf in leaves)
  return held / whole if whole else None


def main(argv: list[str]) -> None:
  """Measures a config."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", DEVICES)
  config = flags.FLAGS.config
  common.emit(measure(
      config_lib.as_plain(config), config=config.name, repeats=flags.FLAGS.repeats
  ))


if __name__ == "__main__":
  # Not at import: other verbs define --config too.
  config_flags.DEFINE_config_file(
      "config", "configs/oct_multi.py:sample", "FILE.py[:ARG]", lock_config=True
  )
  flags.DEFINE_integer("repeats", 9, "Timed steps of each.", lower_bound=5)
  app.run(main)
