"""What the loop adds to the bare step: EMA, metrics, logging; in one run, by turns.

python -m vjepa_jax.bench.overhead --config=FILE[:ARG] [--config.key=value ...]

Four lines: the step without the moving average of the target, with it (what trains),
the same with the loop's own work between steps (taking the batch, joining metrics,
the clock, a log line every `train.log_every_steps`), and that work alone.
"""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
import sys
import tempfile
import time
from typing import Any

from absl import app, flags
import jax
import numpy as np

from vjepa_jax import config as config_lib
from vjepa_jax.bench import common
from vjepa_jax.config import programs
from vjepa_jax.train import metrics as metrics_lib
from vjepa_jax.train import sharding, watch


class Fixed:
  """The same device batch for ever, with a place: the reading is not measured."""

  def __init__(self, batch: Any):
    self._batch, self._count = batch, 0

  def __next__(self) -> Any:
    self._count += 1
    return self._batch

  def get_state(self) -> dict[str, int]:
    """Returns how many were taken."""
    return {"count": self._count}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes back."""
    self._count = state["count"]


def turns(
    runs: dict[str, Callable[[], Any]], *, repeats: int = 20, steps: int = 5
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
  """Times several ways of stepping by turns, so that all meet the same machine.

  Args:
    runs: name -> one step; returns arrays to wait for.
    repeats: turns of each.
    steps: steps a turn.

  Returns:
    (wall seconds, CPU seconds) a step: name -> one value a turn.
  """
  wall = {name: [] for name in runs}
  cpu = {name: [] for name in runs}
  for turn in range(-1, repeats):  # The first compiles.
    for name, run in runs.items():
      begin, begin_cpu = time.perf_counter(), time.process_time()
      for _ in range(steps):
        out = run()
      jax.block_until_ready(out)
      if turn >= 0:
        wall[name].append((time.perf_counter() - begin) / steps)
        cpu[name].append((time.process_time() - begin_cpu) / steps)
  return wall, cpu


@dataclasses.dataclass(frozen=True)
class WithoutAverage:
  """An objective whose target stays where it is."""

  inner: Any

  def __getattr__(self, name: str) -> Any:
    return getattr(self.inner, name)

  def after_update(self, params: Any, model_state: Any, step: Any) -> Any:
    """Leaves the state as it is."""
    return model_state


def stepper(program: Any, batch: Any) -> Callable[[], Any]:
  """Returns a call that takes one bare step."""
  state = [program.init(jax.random.key(0))]

  def step() -> Any:
    state[0], metrics = program.step(state[0], batch)
    return metrics

  return step


def looper(
    step: Callable[[], Any], batch: Any, folder: str, every: int, rows: int
) -> Callable[[], Any]:
  """Returns a call that takes one step with all that the loop does beside it."""
  feed = watch.Feed(Fixed(batch))
  window = watch.Window(0, {}, skipped_in_row=0, max_skipped_in_row=10)
  writer = metrics_lib.Writer(folder, tensorboard=True)
  clock, count = watch.Clock(feed), itertools.count(1)

  def run() -> Any:
    feed.take()
    with clock.step():
      metrics = step()
    window.add(metrics)
    if (number := next(count)) % every == 0:
      line = window.flush() | clock.rates(rows, None)
      writer.write(number, line)
      metrics_lib.format_line(number, number, line)
    return metrics

  return run


def measure(plain: dict[str, Any], repeats: int) -> Iterator[dict[str, Any]]:
  """Yields the benchmark's lines for a config, on a batch of noise."""
  train = plain["train"]
  mesh = programs.mesh_of(plain)
  program = programs.step_program(plain, mesh)
  bare = programs.step_program(plain, mesh, wrap=WithoutAverage)
  host = {k: np.ones(v.shape, v.dtype) for k, v in program.batch.items()}
  noise = np.random.default_rng(0).integers(0, 256, host["volume"].shape)
  host["volume"] = noise.astype(host["volume"].dtype)
  host |= {"mean": host["mean"] * noise.mean(), "std": host["std"] * noise.std()}
  batch = sharding.put_batch(host, mesh)
  rows, every = train["batch_size"], train.get("log_every_steps", 50)
  done = jax.block_until_ready(stepper(program, batch)())
  with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
    runs = {
        "bare": stepper(bare, batch),
        "average": stepper(program, batch),
        "loop": looper(stepper(program, batch), batch, first, every, rows),
        "host": looper(lambda: done, batch, second, every, rows),
    }
    wall, cpu = turns(runs, repeats=repeats, steps=max(5, every))
  for name in runs:
    ratio = {
        f"{unit}_over_{other}": float(np.median(np.divide(values[name], values[other])))
        for unit, values in (("wall", wall), ("cpu", cpu))
        for other in ("bare", "average")
    }
    yield common.line(
        f"overhead.{name}", plain["name"], wall[name], cpu[name], steps_a_line=every,
        **ratio,
    )


def main(argv: list[str]) -> None:
  """Measures a config's own step."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")
  config_lib.check_config(flags.FLAGS.config)
  plain = config_lib.as_plain(flags.FLAGS.config)
  print("by turns; compare ratios", file=sys.stderr)
  for numbers in measure(plain, flags.FLAGS.repeats):
    common.emit(numbers)


if __name__ == "__main__":
  from ml_collections import config_flags

  config_flags.DEFINE_config_file("config", None, "FILE.py[:ARG]", lock_config=True)
  flags.DEFINE_integer("repeats", 20, "Turns of each.", lower_bound=5)
  flags.mark_flags_as_required(["config"])
  app.run(main)
