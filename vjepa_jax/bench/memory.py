"""Peak bytes of a train step over the number of tokens, by the TPU's compiler.

python -m vjepa_jax.bench.memory --config=FILE[:ARG] [--config.key=value ...]

Depths of the volume go up by doubling, at one batch a chip. Prints one JSON line:
bytes for each number of tokens, their ratios, and arrays that hold two axes of a
volume's tokens (there should be none). Needs no TPU (vjepa_jax[precompile]).
"""

from collections.abc import Collection, Mapping, Sequence
import sys
import time
from typing import Any

from absl import app, flags
import jax
from ml_collections import config_flags

from vjepa_jax import config as config_lib
from vjepa_jax.bench import common
from vjepa_jax.compiler import estimate, hlo, topology
from vjepa_jax.config import programs
from vjepa_jax.volumes import masks

DEPTHS = (32, 64, 128, 256)


def measure(
    plain: Mapping[str, Any],
    slice_: topology.Topology,
    depths: Sequence[int] = DEPTHS,
    *,
    batch_per_chip: int = 1,
) -> dict[str, Any]:
  """Compiles the step of a config at several depths of its volumes.

  Args:
    plain: of a config without a crop; its canvas' first axis is replaced.
    slice_: to compile for.
    depths: voxels along Z, ascending.
    batch_per_chip: volumes a chip, the same at each depth.

  Returns:
    tokens, peak_gib, ratios (peak over the one before), squares (arrays with two
    axes of tokens), compile_s; a list each.
  """
  found: dict[str, list[Any]] = {
      key: [] for key in ("tokens", "peak_gib", "ratios", "squares", "compile_s")
  }
  mesh, last = programs.mesh_of(plain, slice_.devices()), None
  for depth in depths:
    plain = {**plain, "data": {**plain["data"]}}
    plain["data"]["canvas"] = (depth, *plain["data"]["canvas"][1:])
    grid = config_lib.model_grid(plain)
    tokens = grid.tokens
    begin = time.perf_counter()
    compiled = estimate.compile_lowered(programs.step_program(
        plain, mesh, platform="tpu", batch_size=batch_per_chip * slice_.chips
    ).lower())
    found["compile_s"].append(round(time.perf_counter() - begin, 1))
    peak = estimate.memory(compiled).peak
    found["ratios"] += [round(peak / last, 4)] if last else []
    last = peak
    found["tokens"].append(tokens)
    found["peak_gib"].append(estimate.gib(peak))
    found["squares"] += squares(
        compiled.as_text(), lengths(plain, tokens, grid.dims[0])
    )
    print(f"{tokens} tokens: {estimate.gib(peak)} GiB a chip", file=sys.stderr)
  return found


def lengths(plain: Mapping[str, Any], tokens: int, frames: int = 1) -> set[int]:
  """Returns how many tokens attend to each other in the parts of a config's step.

  All of a volume's, each mask group's visible ones and, in its predictor, visible and
  hidden ones; each also rounded up to a kernel's block. Lengths below an eighth of
  all are left out: they could be a width, and their squares are small.

  Args:
    plain: of the config.
    tokens: of a volume.
    frames: along T, where attention is divided: the same are then of one frame, too.
  """
  found = {tokens}
  for options in plain["objective"].get("masks", {}).values():
    seen = masks.count(options["context"], tokens)
    found |= {seen, seen + masks.count(options["target"], tokens)}
  found |= {n // frames for n in found}
  least = tokens // frames
  return {m for n in found if 8 * n >= least for m in (n, -(-n // 128) * 128)}


def squares(text: str, lengths: Collection[int]) -> list[str]:
  """Returns the arrays of a compiled program with two axes of so many tokens."""
  return sorted({
      f"{array.dtype}{list(array.shape)}" for array in hlo.Module(text).arrays()
      if sum(size in lengths for size in array.shape) > 1
  })


def main(argv: list[str]) -> None:
  """Measures the config of the flags."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")
  jax.config.update("jax_platforms", "cpu")
  given = flags.FLAGS
  begin = time.process_time()
  found = measure(
      config_lib.as_plain(given.config), topology.describe(given.topology),
      [int(depth) for depth in given.depths], batch_per_chip=given.batch_per_chip,
  )
  common.emit(common.line(
      "memory", config_flags.get_config_filename(given["config"]),
      found["peak_gib"], [time.process_time() - begin], unit="GiB",
      topology=given.topology, batch_per_chip=given.batch_per_chip,
      label="compiler estimate, not a measurement", **found,
  ))
  if found["squares"]:
    sys.exit(f"arrays with two axes of tokens: {', '.join(found['squares'])}")


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "FILE.py[:ARG]", lock_config=True)
  flags.DEFINE_string("topology", "v4:2x2x4", "A slice, such as v4:2x2x4.")
  flags.DEFINE_integer("batch_per_chip", 1, "Volumes a chip.", lower_bound=1)
  flags.DEFINE_list("depths", [str(depth) for depth in DEPTHS], "Voxels along Z.")
  flags.mark_flags_as_required(["config"])
  app.run(main)
