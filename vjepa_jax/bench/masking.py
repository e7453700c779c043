"""What a step costs by the share of tokens that the encoder of an autoencoder sees.

python -m vjepa_jax.bench.masking --config=FILE[:ARG] [--keep=0.1,0.25,1]
  [--topology=v4:2x2x1 --batch_per_chip=2] [--config.key=value ...]

The masks show so much of a volume and ask for the rest (1: all but one place), so
that the decoder always has all tokens. Without a topology the real train steps are
timed on this machine, by turns, on random voxels; with it they are compiled for TPU
chips that are not there (vjepa_jax[precompile]). Prints one JSON line; its lists have
one value a share.
"""

from collections.abc import Mapping, Sequence
import sys
from typing import Any

from absl import app, flags
import jax
from ml_collections import config_flags
import numpy as np

from vjepa_jax import config as config_lib
from vjepa_jax.bench import common, overhead
from vjepa_jax.compiler import estimate, topology
from vjepa_jax.config import programs
from vjepa_jax.train import sharding
from vjepa_jax.volumes import masks

KEEP = (0.1, 0.25, 1.0)


def showing(plain: Mapping[str, Any], keep: float) -> dict[str, Any]:
  """Returns a config whose mask groups show a share of the tokens, and hide the rest.

  Args:
    plain: of a config with mask groups.
    keep: rounded to what a group shows at a time, of which one at least is shown and
      one hidden.

  Raises:
    ValueError: for a share out of (0, 1].
  """
  if not 0 < keep <= 1:
    raise ValueError(f"bench: keep={keep} is not in (0, 1]")
  grid, groups = config_lib.model_grid(plain), {}
  for name, options in plain["objective"]["masks"].items():
    unit = masks.unit_of(options, grid)
    seen = min(masks.count(float(keep), grid.tokens, unit), grid.tokens - unit)
    groups[name] = {**options, "context": seen, "target": grid.tokens - seen}
  return {**plain, "objective": {**plain["objective"], "masks": groups}}


def measure(plains: Sequence[Mapping[str, Any]], repeats: int) -> dict[str, Any]:
  """Times the steps of configs by turns.

  Returns:
    wall and cpu, the seconds of each turn, a list for each config.
  """
  steps = {}
  for number, plain in enumerate(plains):
    program = programs.step_program(plain, programs.mesh_of(plain))
    steps[number] = overhead.stepper(program, _batch(program))
  wall, cpu = overhead.turns(steps, repeats=repeats, steps=1)
  return {"wall": list(wall.values()), "cpu": list(cpu.values())}


def _batch(program: Any) -> dict[str, jax.Array]:
  """Random voxels and ones, as the program's batch."""
  rng = np.random.default_rng(0)
  batch = {
      name: rng.integers(0, 255, shape.shape).astype(shape.dtype)
      if name == "volume" else np.ones(shape.shape, shape.dtype)
      for name, shape in program.batch.items()
  }
  return sharding.put_batch(batch, program.mesh)


def compiled(
    plain: Mapping[str, Any], slice_: topology.Topology, batch_per_chip: int
) -> dict[str, Any]:
  """Compiles the step of a config for a slice.

  Returns:
    peak_gib of a chip; step_ms_bound, the least time of a step, with kernel_ms of it
    in kernels; model_tflop of a volume.
  """
  made = estimate.compile_lowered(programs.step_program(
      plain, programs.mesh_of(plain, slice_.devices()), platform="tpu",
      batch_size=batch_per_chip * slice_.chips,
  ).lower())
  cost = estimate.cost(made.as_text(), slice_.chip)
  return {
      "peak_gib": estimate.gib(estimate.memory(made).peak),
      "step_ms_bound": round(cost.bound_ms, 3),
      "kernel_ms": round(cost.kernel_ms, 3),
      "model_tflop": round(programs.flops_per_volume(plain) / 1e12, 4),
  }


def main(argv: list[str]) -> None:
  """Times or compiles the config of the flags at each share."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")
  given, name = flags.FLAGS, config_flags.get_config_filename(flags.FLAGS["config"])
  if given.topology:
    jax.config.update("jax_platforms", "cpu")
  plain = config_lib.as_plain(given.config)
  if not plain["objective"].get("masks"):
    raise app.UsageError("--config has no objective.masks; it hides nothing")
  keeps = [float(keep) for keep in given.keep]
  plains = [showing(plain, keep) for keep in keeps]
  about = {
      "keep": keeps, "tokens": config_lib.model_grid(plain).tokens,
      "visible": [
          [group["context"] for group in one["objective"]["masks"].values()]
          for one in plains
      ],
  }
  if given.topology:
    rows = []
    for keep, one in zip(keeps, plains, strict=True):
      rows.append(
          compiled(one, topology.describe(given.topology), given.batch_per_chip)
      )
      print(f"{keep:g} seen: {rows[-1]}", file=sys.stderr, flush=True)
    found = {key: [row[key] for row in rows] for key in rows[0]}
    common.emit(common.line(
        "masking", name, found["peak_gib"], [0.0], unit="GiB",
        topology=given.topology, batch_per_chip=given.batch_per_chip,
        label="compiler estimate, not a measurement", **about, **found,
    ))
    return
  found = measure(plains, given.repeats)
  middle = {key: [float(np.median(turns)) for turns in found[key]] for key in found}
  common.emit(common.line(
      "masking", name, found["wall"][0], found["cpu"][0],
      batch=plain["train"]["batch_size"], step_s=middle["wall"],
      step_cpu_s=middle["cpu"],
      cpu_ratios=[one / middle["cpu"][-1] for one in middle["cpu"]], **about,
  ))


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "FILE.py[:ARG]", lock_config=True)
  flags.DEFINE_list("keep", [str(keep) for keep in KEEP], "Shares of the tokens.")
  flags.DEFINE_string("topology", None, "A slice to compile for; default: time here.")
  flags.DEFINE_integer("batch_per_chip", 1, "Volumes a chip.", lower_bound=1)
  flags.DEFINE_integer("repeats", 10, "Turns.", lower_bound=5)
  flags.mark_flags_as_required(["config"])
  app.run(main)
