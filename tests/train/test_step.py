"""One step: exact accumulation, EMA once, non-finite steps leave no trace."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from vjepa_jax.train.state import init_state, with_positions
from vjepa_jax.train.step import make_eval_step, make_train_step


@functools.cache
def fresh():
  draw = functools.partial(init_state, toy.Toy(), toy.optimizer(), toy.augment)
  return jax.jit(draw)(toy.batch(), jax.random.key(0))


@functools.cache
def stepper(accum=1, **options):
  optimizer = toy.optimizer(**options)
  return jax.jit(
      make_train_step(toy.Toy(), optimizer, augment=toy.augment, accum=accum)
  )


def train(state, batches, **options):
  losses = []
  for batch in batches:
    state, metrics = stepper(**options)(state, batch)
    losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
  return state, np.array(losses), metrics


def assert_same(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_four_micro_batches_equal_one_large_batch():
  batches = [toy.batch(seed) for seed in range(10)]
  one, losses, _ = train(fresh(), batches)
  four, losses_of_four, _ = train(fresh(), batches, accum=4)
  np.testing.assert_allclose(losses_of_four, losses, rtol=1e-6)
  assert_same(one.params, four.params, rtol=1e-4, atol=1e-6)


def test_micro_batches_of_unequal_weight_join_exactly():
  batches = [toy.batch(seed) for seed in range(5)]
  for batch in batches:
    batch["_mask"][np.arange(16) % 4 < 2] = [0, 1, 0, 0, 1, 1, 0, 0]
  one, losses, _ = train(fresh(), batches)
  four, losses_of_four, _ = train(fresh(), batches, accum=4)
  np.testing.assert_allclose(losses_of_four, losses, rtol=1e-6)
  assert_same(one.params, four.params, rtol=1e-4, atol=1e-6)


def test_the_ema_moves_once_a_step_also_under_accumulation():
  before = fresh()
  after, _, _ = train(before, [toy.batch()], accum=4)
  assert after.model_state["updates"] == 1
  expected = jax.tree.map(
      lambda t, o: 0.9 * t + 0.1 * o, before.model_state["target"],
      after.params["encoder"],
  )
  assert_same(after.model_state["target"], expected, rtol=1e-6)


@pytest.mark.parametrize("accum", [1, 4])
def test_a_non_finite_step_changes_nothing_but_its_count(accum):
  good = toy.batch()
  good["volume"] = good["volume"].astype(np.float32)
  bad = {**good, "volume": good["volume"].copy()}
  bad["volume"][5] = np.nan
  start, _, _ = train(fresh(), [good])
  after, _, metrics = train(start, [bad, bad], accum=accum)
  for field in ("params", "opt_state", "model_state"):
    assert_same(getattr(after, field), getattr(start, field), rtol=0)
  assert after.step == 3
  np.testing.assert_array_equal(after.skipped, [2, 2])
  assert metrics["nonfinite"] == (1.0, 1.0)
  assert metrics["loss"] == (0.0, 0.0) and metrics["grad_norm"] == (0.0, 0.0)
  recovered, _, _ = train(after, [good], accum=accum)
  np.testing.assert_array_equal(recovered.skipped, [0, 2])


def test_a_skipped_step_does_not_shift_the_schedules():
  seen = []

  def rate(step):
    jax.debug.callback(lambda s: seen.append(int(s)), step)
    return 1e-3

  optimizer = dataclasses.replace(toy.optimizer(), learning_rate=rate)
  step = jax.jit(make_train_step(toy.Toy(), optimizer, augment=toy.augment))
  state, good = fresh(), toy.batch()
  bad = {**good, "_mask": np.full(16, np.nan, np.float32)}
  for batch in (good, bad, good):
    state, _ = step(state, batch)
  jax.effects_barrier()
  assert set(seen) == {0, 1, 2}
  assert state.opt_state.inner_state.count == 2


def test_draws_differ_from_step_to_step():
  state = fresh()
  _, now, _ = train(state, [toy.batch()])
  _, later, _ = train(state.replace(step=state.step + 1), [toy.batch()])
  assert now[0] != later[0]


def test_the_clipped_fraction_is_told():
  for clip_norm, clipped in ((1e-3, 1.0), (1e3, 0.0)):
    _, _, metrics = train(fresh(), [toy.batch()], clip_norm=clip_norm)
    assert metrics["clipped"] == (clipped, 1.0)
    assert metrics["grad_norm"][0] > 0


def test_validation_repeats_and_leaves_padding_out():
  state = fresh()
  step = jax.jit(make_eval_step(toy.Toy(), toy.augment))
  run = lambda batch: step(state.params, state.model_state, batch)["loss"]
  whole = toy.batch()
  assert run(whole) == run(whole)
  padded = {k: np.array(v) for k, v in whole.items()}
  padded["_mask"][10:] = 0
  other = {k: np.array(v) for k, v in padded.items()}
  other["volume"][10:] = 255
  assert run(padded)[1] == 10
  assert run(padded) == run(other)
  assert run(padded)[0] != run(whole)[0]


def test_validation_sees_the_batch_as_it_is():
  state, key = fresh(), jax.random.key(0)
  metrics = make_eval_step(toy.Toy(), toy.augment)(
      state.params, state.model_state, toy.batch()
  )
  plain = toy.augment(with_positions(toy.batch()), key, train=False)
  loss, _ = toy.Toy().loss(state.params, state.model_state, plain, key, train=False)
  np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], loss, rtol=1e-6)


def test_initial_parameters_do_not_depend_on_the_data():
  draw = jax.jit(
      functools.partial(init_state, toy.Toy(), toy.optimizer(), toy.augment)
  )
  a = draw(toy.batch(0), jax.random.key(0))
  b = draw(toy.batch(1), jax.random.key(0))
  assert_same(a.params, b.params, rtol=0)
  c = draw(toy.batch(0), jax.random.key(1))
  assert jnp.any(a.params["head"]["kernel"] != c.params["head"]["kernel"])
