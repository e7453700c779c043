"""What waiting for data costs a train step: the real loader against one batch held.

python -m vjepa_jax.bench.input_wait --config=FILE[:ARG] [--config.key=value ...]
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import sys
import time
from typing import Any

from absl import app, flags
import jax
from ml_collections import config_flags
import numpy as np

from vjepa_jax import config as config_lib
from vjepa_jax.bench import common
from vjepa_jax.data import batches as batches_lib
from vjepa_jax.train import sharding, watch
from vjepa_jax.train.state import init_state
from vjepa_jax.train.step import make_train_step

Step = Callable[[Any, Any], tuple[Any, Any]]


class Held:
  """An endless iterator of one and the same host batch."""

  def __init__(self, batch: Mapping[str, np.ndarray]):
    self._batch = batch

  def __iter__(self) -> "Held":
    return self

  def __next__(self) -> Mapping[str, np.ndarray]:
    return self._batch

  def get_state(self) -> None:
    return None

  def set_state(self, state: None) -> None:
    del state


def measure(
    step: Step,
    state: Any,
    feeds: Mapping[str, watch.Feed],
    *,
    steps: int = 20,
    rounds: int = 9,
) -> dict[str, dict[str, list[float]]]:
  """Runs the steps of a train loop on one feed and then the other, in turn.

  Args:
    step: jitted; may donate the state.
    state: before the first step.
    feeds: by name, as the loop takes its batches.
    steps: of a turn.
    rounds: turns of each feed, at least 5, after one that is not counted.

  Returns:
    {name: {"wall": s a step, "cpu": s a step, "waited": share of the wall}} of lists.

  Raises:
    ValueError: fewer than 5 rounds.
  """
  if rounds < 5:
    raise ValueError(f"bench: rounds={rounds}; at least 5 are needed for a spread")
  found = {name: {"wall": [], "cpu": [], "waited": []} for name in feeds}
  for turn in range(rounds + 1):
    for name, feed in feeds.items():
      jax.block_until_ready(state)
      waited = feed.waited
      begin, begin_cpu = time.perf_counter(), time.process_time()
      for _ in range(steps):
        state, _ = step(state, feed.take())
      jax.block_until_ready(state)
      wall = time.perf_counter() - begin
      if turn:
        found[name]["wall"].append(wall / steps)
        found[name]["cpu"].append((time.process_time() - begin_cpu) / steps)
        found[name]["waited"].append((feed.waited - waited) / wall)
  return found


def main(argv: Sequence[str]) -> None:
  """Measures the train loop of a config on its own data; one JSON line."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")
  values = flags.FLAGS
  experiment = config_lib.build(
      values.config, say=lambda text: print(text, file=sys.stderr)
  )
  options, mesh = experiment.options, experiment.mesh
  iterator = batches_lib.train_iterator(
      experiment.data.splits["train"], batch_size=options.batch_size, seed=0
  )
  held = {k: np.array(v) for k, v in next(iterator).items()}
  put = functools.partial(sharding.put_batch, mesh=mesh)
  feeds = {
      "loader": watch.Feed(iterator, put), "held": watch.Feed(Held(held), put)
  }
  draw = functools.partial(
      init_state, experiment.objective, experiment.optimizer, experiment.augment
  )
  batch, key = put(held), jax.random.key(0)
  places = sharding.state_sharding(jax.eval_shape(draw, batch, key), mesh)
  state = jax.jit(draw, out_shardings=places)(batch, key)
  step = jax.jit(
      make_train_step(
          experiment.objective, experiment.optimizer, augment=experiment.augment,
          accum=options.accum,
      ),
      donate_argnums=0, out_shardings=(places, sharding.replicated(mesh)),
  )
  found = measure(step, state, feeds, steps=values.steps, rounds=values.rounds)
  for feed in feeds.values():
    feed.close()
  iterator.close()
  loader, alone = found["loader"], found["held"]
  common.emit(common.line(
      "input_wait", experiment.config["name"], loader["wall"], loader["cpu"],
      unit="s a step", batch=options.batch_size, held_median=np.median(alone["wall"]),
      held_cpu_seconds=float(np.median(alone["cpu"])),
      slowdown=float(np.median(loader["wall"]) / np.median(alone["wall"]) - 1),
      data_wait=float(np.median(loader["waited"])),
  ))


if __name__ == "__main__":
  # Not at import: other verbs define --config too.
  config_flags.DEFINE_config_file("config", None, "FILE.py[:ARG]", lock_config=True)
  flags.DEFINE_integer("steps", 20, "Steps of a turn.", lower_bound=1)
  flags.DEFINE_integer("rounds", 9, "Turns of each.", lower_bound=5)
  flags.mark_flags_as_required(["config"])
  app.run(main)
