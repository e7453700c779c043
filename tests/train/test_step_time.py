"""The benchmark's line has what a claim of speed needs."""

import json

import jax
import numpy as np
import pytest
import toy

from vjepa_jax.bench import common, step_time


def test_the_line_of_a_step_names_what_it_stands_on(capsys):
  numbers = step_time.measure_objective(
      objective=toy.Toy(), optimizer=toy.optimizer(), augment=toy.augment,
      batch=toy.batch(), name="toy", accum=2, tokens_per_volume=8, repeats=5,
  )
  common.emit(numbers)
  printed = json.loads(capsys.readouterr().out)
  assert printed.keys() >= {
      "name", "config", "commit", "device", "cpu", "versions", "unit", "median", "p10",
      "p90", "repeats", "cpu_seconds", "load", "batch", "accum", "volumes_per_s",
      "tokens_per_s",
  }
  assert printed["p10"] <= printed["median"] <= printed["p90"]
  assert printed["volumes_per_s"] == pytest.approx(16 / printed["median"])
  assert printed["versions"]["jax"] == jax.__version__


def test_the_warm_up_is_not_timed_and_the_state_is_handed_on():
  seen = []

  def step(state, batch):
    seen.append(state)
    return state + 1, {}

  wall, cpu = step_time.measure(step, 0, {}, repeats=5, warmup=3)
  assert seen == list(range(8))
  assert len(wall) == len(cpu) == 5


def test_too_few_repeats_are_refused():
  with pytest.raises(ValueError, match="at least 5 and 1"):
    common.repeat(lambda: np.zeros(1), repeats=3)
