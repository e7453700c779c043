"""What an interruption costs: from kill -9 to the next step, restoring, saving.

python -m vjepa_jax.bench.restart [--config=FILE[:ARG]] [--gigabytes=1.6]

One line each: `restart` (the real command, killed once a checkpoint is complete and
started again; seconds until the next trained step is logged, the programs of the
first start being kept), `restore`, `save_stall` (how long a step waits for a save
that goes on in the background) and `save` (until it counts), for a small state and
for one of so many gigabytes.
"""

import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags, logging
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.bench import common
from vjepa_jax.train import metrics
from vjepa_jax.train.checkpoint import Checkpoints

_POLL_S = 0.005


def restart(config: str, folder: pathlib.Path, *, repeats: int = 5) -> dict[str, Any]:
  """Kills the real command, and times the same command until its next step.

  Args:
    config: FILE[:ARG] of a config that saves before its last step.
    folder: an empty folder.
    repeats: kills.
  """
  command = [
      sys.executable, "-m", "vjepa_jax.main", f"--config={config}",
      f"--workdir={folder / 'run'}", "--config.train.total_steps=100000",
      "--config.train.checkpoint_every_steps=4",
  ]
  env = {"VJEPA_JAX_CACHE": str(folder / "cache"), **os.environ}
  _until_killed(command, env, folder / "run")  # Compiles.
  wall, cpu = [], []
  for _ in range(repeats):
    seconds, used = _until_killed(command, env, folder / "run")
    wall.append(seconds)
    cpu.append(used)
  return common.line("restart", config, wall, cpu)


def _until_killed(command, env, workdir) -> tuple[float, float]:
  """Runs until a step is logged and saved after it; seconds (wall, CPU) to the step."""
  before = _last_step(workdir)
  saved = {path.name for path in (workdir / "checkpoints").glob("[0-9]*")}
  begin = time.perf_counter()
  with subprocess.Popen(
      command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  ) as process:
    # Lines beyond the checkpoint are dropped first.
    size = None
    while True:
      if process.poll() is not None:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
      now = _last_step(workdir)
      if size is None and (now < before or before < 0):
        size = now
      if now > (before if size is None else size) and now > 0:
        break
      time.sleep(_POLL_S)
    seconds, used = time.perf_counter() - begin, _cpu_seconds(process.pid)
    while {p.name for p in (workdir / "checkpoints").glob("[0-9]*")} <= saved:
      time.sleep(_POLL_S)
    process.send_signal(signal.SIGKILL)
  return seconds, used


def _last_step(workdir: pathlib.Path) -> int:
  steps = [line["step"] for line in metrics.read(workdir) if "loss" in line]
  return steps[-1] if steps else -1


def _cpu_seconds(pid: int) -> float:
  """CPU seconds of a process that runs, on Linux; NaN elsewhere."""
  try:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
  except OSError:
    return float("nan")
  return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def checkpointing(
    name: str, state: Any, folder: pathlib.Path, *, repeats: int = 5
) -> list[dict[str, Any]]:
  """Times saving and restoring of a state: three lines.

  Args:
    name: of the state.
    state: tree of arrays.
    folder: an empty folder.
    repeats: of each.
  """
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  wanted = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  checkpoints = Checkpoints(folder, keep=1)
  saves = range(1, repeats + 2)
  stall, whole = [], []
  for step in saves:
    checkpoints.wait()
    timer = _Timer()
    checkpoints.save(step, state, config={})
    stall.append(timer.read())
    checkpoints.wait()
    whole.append(timer.read())
  del state

  def restore() -> tuple[float, float]:
    timer = _Timer()
    checkpoints.check(saves[-1])
    jax.block_until_ready(checkpoints.restore(saves[-1], wanted)[0])
    return timer.read()

  times = {
      "save_stall": stall[1:], "save": whole[1:],
      "restore": [restore() for _ in range(repeats + 1)][1:],
  }
  checkpoints.close()
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return [
      common.line(kind, name, *zip(*values), bytes=size, peak_bytes=most)
      for kind, values in times.items()
  ]


class _Timer:
  """Seconds since it was made."""

  def __init__(self):
    self._begin = time.perf_counter(), time.process_time()

  def read(self) -> tuple[float, float]:
    """Returns (wall, CPU)."""
    return time.perf_counter() - self._begin[0], time.process_time() - self._begin[1]


def large_state(gigabytes: float) -> dict[str, Any]:
  """Makes four trees of scanned ViT blocks: parameters, their average, two moments."""
  width = 768
  unit = 12 * width * width
  layers = max(1, round(gigabytes * 1e9 / 16 / unit))
  shapes = {
      "qkvo": (layers, 4, width, width), "fc1": (layers, width, 4 * width),
      "fc2": (layers, 4 * width, width), "bias": (layers, 4 * width),
  }
  draw = np.random.default_rng(0)
  trees = ("params", "average", "mu", "nu")
  return {
      tree: {
          name: jnp.asarray(draw.standard_normal(shape, dtype=np.float32))
          for name, shape in shapes.items()
      }
      for tree in trees
  }


def main(argv: list[str]) -> None:
  """Prints the lines."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")
  options = flags.FLAGS
  logging.set_verbosity(logging.ERROR)
  with tempfile.TemporaryDirectory(dir=options.folder) as root:
    folder = pathlib.Path(root)
    if options.config:
      common.emit(restart(options.config, folder / "restart", repeats=options.repeats))
    small = {str(n): jnp.full((32, 32), 1.0 * n) for n in range(120)}
    for name, state in (("small", small), ("large", None)):
      if state is None:
        state = large_state(options.gigabytes)
      lines = checkpointing(name, state, folder / name, repeats=options.repeats)
      for numbers in lines:
        common.emit(numbers)
      del state


if __name__ == "__main__":
  flags.DEFINE_string("config", "configs/oct_multi.py:tiny", "FILE[:ARG]; '': none.")
  flags.DEFINE_float("gigabytes", 1.6, "Size of the large state.", lower_bound=0.01)
  flags.DEFINE_string("folder", None, "On the disk to measure; default: temporary.")
  flags.DEFINE_integer("repeats", 5, "Of each.", lower_bound=5)
  app.run(main)
