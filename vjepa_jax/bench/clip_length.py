"""The longest clip of a movie whose train step fits on a TPU chip, by its compiler.

python -m vjepa_jax.bench.clip_length --config=FILE[:ARG] [--topology=v4:2x2x1]
  [--config.key=value ...]

One clip a chip. Prints one JSON line: frames, tokens, and what each length that was
tried holds. Needs no TPU (vjepa_jax[precompile]), opens no data.
"""

from collections.abc import Mapping
import sys
import time
from typing import Any

from absl import app, flags
import jax
from ml_collections import config_flags

from vjepa_jax import config as config_lib
from vjepa_jax.bench import common
from vjepa_jax.compiler import estimate, search, topology
from vjepa_jax.config import programs

MOST = 4096


def lasting(plain: Mapping[str, Any], frames: int) -> dict[str, Any]:
  """Returns a config whose clips have so many frames, all of which the model sees."""
  data = {**plain["data"], "clip": {**plain["data"]["clip"], "frames": frames}}
  augment = dict(plain["augment"])
  if augment.get("crop"):
    augment["crop"] = (frames, *augment["crop"][1:])
  return {**plain, "data": data, "augment": augment}


def longest(plain: Mapping[str, Any], slice_: topology.Topology) -> search.Found:
  """Looks for the longest clip that fits; its sizes are tokens along T."""
  mesh, patch = programs.mesh_of(plain, slice_.devices()), plain["model"]["patch"][0]
  limit = slice_.chip.hbm_bytes

  def peak(size: int) -> float | None:
    begin = time.perf_counter()
    lowered = programs.step_program(
        lasting(plain, size * patch), mesh, platform="tpu", batch_size=slice_.chips
    ).lower()
    try:
      # What compiles fits, however close it comes.
      found = min(estimate.memory(estimate.compile_lowered(lowered)).peak, limit)
    except estimate.OutOfMemory as error:
      found = error.needed and max(error.needed, limit + 1)
    said = "more than there is" if found is None else f"{estimate.gib(found)} GiB"
    seconds = time.perf_counter() - begin
    print(f"{size * patch} frames: {said}; {seconds:.0f} s", file=sys.stderr, flush=True)
    return found

  return search.largest_that_fits(peak, limit, most=MOST)


def main(argv: list[str]) -> None:
  """Measures the config of the flags."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")
  jax.config.update("jax_platforms", "cpu")
  given, begin = flags.FLAGS, time.process_time()
  plain, slice_ = config_lib.as_plain(given.config), topology.describe(given.topology)
  if not plain["data"].get("clip"):
    raise app.UsageError("--config has no data.clip; it is not of movies")
  found, patch = longest(plain, slice_), plain["model"]["patch"][0]
  frames = (found.largest or 0) * patch
  common.emit(common.line(
      "clip_length", config_flags.get_config_filename(given["config"]),
      [frames], [time.process_time() - begin], unit="frames", exact=found.exact,
      tokens=config_lib.model_grid(lasting(plain, frames)).tokens if frames else 0,
      tried_gib={
          size * patch: peak and estimate.gib(peak) for size, peak in found.tried.items()
      },
      topology=given.topology, label="compiler estimate, not a measurement",
  ))


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "FILE.py[:ARG]", lock_config=True)
  flags.DEFINE_string("topology", "v4:2x2x1", "A slice, such as v4:2x2x1.")
  flags.mark_flags_as_required(["config"])
  app.run(main)
