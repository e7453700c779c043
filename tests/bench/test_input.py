"""The benchmarks of the input measure what they say."""

import itertools
import json
import time

import numpy as np
import pytest

from vjepa_jax.bench import common, input_rate, input_wait, peers
from vjepa_jax.train import watch


def test_the_input_rate_tells_files_from_what_is_cached(tmp_path, capsys):
  manifest = input_rate.write_synthetic(tmp_path, volumes=8, shape=(8, 40, 48))
  numbers = input_rate.measure(
      manifest, canvas=(4, 16, 16), name="toy", volumes=8, repeats=5
  )
  common.emit(numbers)
  printed = json.loads(capsys.readouterr().out)
  assert printed["volumes"] == 8 and printed["repeats"] == 5
  rates = printed["volumes_per_cpu_s"]
  assert rates.keys() == {"files", "memory", "shards"}
  for kind in ("eval", "train"):
    assert all(rates[key][kind] > 0 for key in rates)
  assert rates["memory"]["eval"] > rates["files"]["eval"]


def test_waiting_for_a_slow_loader_shows_and_a_held_batch_does_not():
  batch = {"volume": np.zeros((2, 3))}

  class Slow(input_wait.Held):

    def __next__(self):
      time.sleep(0.02)
      return super().__next__()

  def step(state, batch):
    time.sleep(0.005)
    return state + len(batch), None

  feeds = {"loader": watch.Feed(Slow(batch)), "held": watch.Feed(input_wait.Held(batch))}
  found = input_wait.measure(step, 0, feeds, steps=5, rounds=5)
  for feed in feeds.values():
    feed.close()
  loader, held = (
      {k: np.median(v) for k, v in found[name].items()} for name in ("loader", "held")
  )
  assert loader["wall"] > 2 * held["wall"] and loader["waited"] > 0.5 > held["waited"]
  assert all(len(values) == 5 for values in found["held"].values())


def test_peers_take_turns_and_the_first_round_is_not_counted():
  turns, clock = [], itertools.count()
  arms = {
      name: lambda name=name: turns.append((name, next(clock))) for name in ("a", "b")
  }
  found = peers.compare(arms, volumes=2, rounds=5)
  assert [name for name, _ in turns] == ["a", "b"] * 6
  assert {name: len(values) for name, values in found.items()} == {"a": 5, "b": 5}
  rows = peers.summary({"a": [0.001, 0.002, 0.003]})
  assert rows["a"]["median_ms"] == pytest.approx(2.0)
  assert rows["a"]["volumes_per_cpu_s"] == pytest.approx(500)
  with pytest.raises(ValueError, match="at least 5"):
    peers.compare(arms, volumes=2, rounds=3)
