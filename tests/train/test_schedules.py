"""Schedules are pure functions of the step that end where they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.train import schedules

STEPS = 100
ALL = {
    "constant": schedules.constant(0.5),
    "linear": schedules.linear(1.0, 0.1, STEPS),
    "cosine": schedules.cosine(0.04, 0.4, STEPS),
    "warmup_cosine": schedules.warmup_cosine(
        1.0, STEPS, warmup_steps=10, start=0.1, final=0.01
    ),
    "wsd": schedules.wsd(1.0, STEPS, warmup_steps=10, decay_steps=20, final=0.01),
}


@pytest.mark.parametrize("name", ALL)
def test_traced_and_host_values_agree(name):
  steps = np.arange(STEPS + 20)
  traced = jax.jit(jax.vmap(ALL[name]))(jnp.asarray(steps))
  host = np.array([ALL[name](int(step)) for step in steps])
  np.testing.assert_allclose(traced, host, rtol=2e-6, atol=1e-7)
  np.testing.assert_array_equal(ALL[name](steps), host)


@pytest.mark.parametrize("name", ALL)
def test_nothing_moves_past_the_end(name):
  assert ALL[name](STEPS) == ALL[name](10 * STEPS)


@pytest.mark.parametrize("name", ALL)
def test_a_schedule_of_ours_turns_at_most_once(name):
  schedules.check_monotone(name, ALL[name], 3 * STEPS)


def test_a_cosine_that_climbs_again_is_refused():
  climbing = lambda step: 0.5 * (1 + np.cos(np.pi * np.asarray(step) / 40))
  with pytest.raises(ValueError, match=r"weight_decay: the schedule turns at steps"):
    schedules.check_monotone("weight_decay", climbing, STEPS)


def test_warmup_reaches_the_peak_at_its_last_step():
  schedule = ALL["warmup_cosine"]
  assert schedule(0) == pytest.approx(0.1)
  assert schedule(5) == pytest.approx(0.55)
  assert schedule(10) == 1.0
  assert schedule(9) < 1.0 and schedule(11) < 1.0


def test_describe_gives_the_first_middle_and_last_value_of_the_run():
  described = schedules.describe(schedules.linear(0.0, 100.0, STEPS), STEPS)
  assert described == {"first": 0.0, "middle": 50.0, "last": 99.0}


def test_a_warmup_longer_than_the_run_is_refused():
  with pytest.raises(ValueError, match="do not fit into total_steps=10"):
    schedules.warmup_cosine(1.0, 10, warmup_steps=10)
  with pytest.raises(ValueError, match="do not fit into total_steps=10"):
    schedules.wsd(1.0, 10, warmup_steps=5, decay_steps=6)
