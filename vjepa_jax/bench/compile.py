"""Seconds to compile a train step, and to find it again in the persistent cache.

python -m vjepa_jax.bench.compile --config=FILE[:ARG] [--topology=v4:2x2x4]

Without a topology the step is compiled for this machine, in fresh processes, with an
empty cache, then with the one that was filled; with it for TPU chips that are not
there. Prints one JSON line; no data are opened and nothing runs.
"""

from collections.abc import Sequence
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

from absl import app, flags
import jax
from ml_collections import config_flags

from vjepa_jax import config as config_lib
from vjepa_jax.bench import common
from vjepa_jax.compiler import estimate, topology
from vjepa_jax.config import programs


def once(plain, topology_name: str | None = None) -> dict[str, float]:
  """Traces and compiles a config's step in this process.

  Returns:
    lower_s and compile_s by the clock, and cpu_s of both in this process.
  """
  devices = topology.describe(topology_name).devices() if topology_name else None
  mesh = programs.mesh_of(plain, devices)
  begin, begin_cpu = time.perf_counter(), time.process_time()
  platform = "tpu" if topology_name else jax.default_backend()
  lowered = programs.step_program(plain, mesh, platform=platform).lower()
  middle = time.perf_counter()
  estimate.compile_lowered(lowered)
  return {
      "lower_s": middle - begin, "compile_s": time.perf_counter() - middle,
      "cpu_s": time.process_time() - begin_cpu,
  }


def fresh(arguments: Sequence[str], cache: str) -> dict[str, float]:
  """Runs `once` in a process of its own, with a persistent cache."""
  begin = time.perf_counter()
  done = subprocess.run(
      [sys.executable, "-m", "vjepa_jax.bench.compile", *arguments, f"--cache={cache}"],
      capture_output=True, text=True, check=True,
  )
  found = json.loads(done.stdout.splitlines()[-1])
  return {**found, "process_s": time.perf_counter() - begin}


def main(argv: list[str]) -> None:
  """Measures the config of the flags; with --cache, in this process alone."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")
  given = flags.FLAGS
  if given.topology:
    jax.config.update("jax_platforms", "cpu")
  if given.cache:
    jax.config.update("jax_compilation_cache_dir", given.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    common.emit(once(config_lib.as_plain(given.config), given.topology))
    return
  first, again = [], []
  for _ in range(given.repeats):
    with tempfile.TemporaryDirectory() as cache:
      first.append(fresh(sys.argv[1:], cache))
      if not given.topology:  # What is not there to run is not kept either.
        again.append(fresh(sys.argv[1:], cache))
  wall = lambda runs: [run["lower_s"] + run["compile_s"] for run in runs]
  children = resource.getrusage(resource.RUSAGE_CHILDREN)
  common.emit(common.line(
      "compile", config_flags.get_config_filename(given["config"]),
      wall(first), [run["cpu_s"] for run in first], topology=given.topology,
      cached_median=sorted(wall(again))[len(again) // 2] if again else None,
      first=first, cached=again, peak_rss_gib=children.ru_maxrss / 2**20,
      cores=os.cpu_count(),
  ))


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "FILE.py[:ARG]", lock_config=True)
  flags.DEFINE_string("topology", None, "A slice; default: this machine's devices.")
  flags.DEFINE_integer("repeats", 3, "Fresh processes.", lower_bound=1)
  flags.DEFINE_string("cache", None, "Folder of compiled programs; compiles once.")
  flags.mark_flags_as_required(["config"])
  app.run(main)
