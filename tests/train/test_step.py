"""One step: exact accumulation, EMA once, non-finite steps leave no trace."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

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
def stepper(accum=1, objective=None, **options):
  optimizer = toy.optimizer(**options)
  return jax.jit(
      make_train_step(
          objective or toy.Toy(), optimizer, augment=toy.augment, accum=accum
      )
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


def labelled(*known, seed=0):
  """A batch of which only the `known` rows have a label."""
  label = np.full(16, -1, np.int32)
  label[list(known)] = 1
  return {**toy.batch(seed), "label": label}


@pytest.mark.parametrize("accum", [1, 4])
def test_a_batch_without_labels_changes_nothing_and_is_no_fault(accum):
  options = dict(objective=toy.Labelled(), accum=accum)
  start, _, _ = train(fresh(), [labelled(*range(16))], **options)
  after, metrics = start, None
  for seed in range(3):
    after, metrics = stepper(**options)(after, labelled(seed=seed))
  for field in ("params", "opt_state", "model_state"):
    assert_same(getattr(after, field), getattr(start, field), rtol=0)
  assert after.step == 4
  np.testing.assert_array_equal(after.skipped, [0, 0])
  assert metrics["nonfinite"] == (0.0, 1.0)
  for name in ("loss", "seen_std", "grad_norm", "clipped"):
    assert metrics[name] == (0.0, 0.0), name
  # The next one with labels moves by the schedules of its own step.
  later = labelled(1, 2)
  one, _, _ = train(after, [later], **options)
  other, _, _ = train(start.replace(step=after.step), [later], **options)
  assert_same(one.params, other.params, rtol=0)
  assert one.model_state["updates"] == 2


def test_micro_batches_without_labels_join_exactly():
  # Every fourth row is of one micro-batch: two of the four have no label.
  batches = [labelled(0, 4, 5, 12, seed=seed) for seed in range(5)]
  one, losses, _ = train(fresh(), batches, objective=toy.Labelled())
  four, losses_of_four, metrics = train(
      fresh(), batches, objective=toy.Labelled(), accum=4
  )
  assert metrics["loss"][1] == 4.0 and metrics["nonfinite"][0] == 0.0
  np.testing.assert_allclose(losses_of_four, losses, rtol=1e-6)
  assert_same(one.params, four.params, rtol=1e-4, atol=1e-6)


def test_a_batch_without_labels_that_is_not_finite_is_a_fault():
  bad = labelled()
  bad["volume"] = bad["volume"].astype(np.float32)
  bad["volume"][5] = np.nan
  after, _, metrics = train(fresh(), [bad], objective=toy.Labelled())
  np.testing.assert_array_equal(after.skipped, [1, 1])
  assert metrics["nonfinite"] == (1.0, 1.0)


def test_without_rows_an_objective_that_needs_no_labels_counts_as_non_finite():
  empty = {**toy.batch(), "_mask": np.zeros(16, np.float32)}
  after, _, metrics = train(fresh(), [empty])
  np.testing.assert_array_equal(after.skipped, [1, 1])
  assert_same(after.params, fresh().params, rtol=0)
  assert metrics["nonfinite"] == (1.0, 1.0)


SHARDED_LABELS = """
import json
import jax
import numpy as np
import toy
from vjepa_jax.train import program, sharding

mesh = sharding.make_mesh()
example = {**toy.batch(), "label": np.zeros(16, np.int32)}
run = program.make_program(
    objective=toy.Labelled(), optimizer=toy.optimizer(learning_rate=1e-2),
    augment=toy.augment, batch=example, mesh=mesh)
for known in ([], [1, 2]):
  state = run.init(jax.random.key(0))
  before = jax.tree.map(np.array, state.params)  # A copy: the state is donated.
  label = np.full(16, -1, np.int32)
  label[known] = 1
  batch = sharding.put_batch({**example, "label": label}, mesh)
  state, metrics = run.step(state, batch)
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).sum()), state.params, before)
  print(json.dumps(dict(
      moved=jax.tree.leaves(moved), skipped=state.skipped.tolist(),
      loss=[float(x) for x in metrics["loss"]])))
"""


def test_labels_that_some_devices_lack_are_those_of_the_whole_batch():
  env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=4 "
      "--xla_backend_optimization_level=0",
      "PYTHONPATH": os.pathsep.join([os.getcwd(), os.path.dirname(__file__)]),
  }
  done = subprocess.run(
      [sys.executable, "-c", SHARDED_LABELS], env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  nothing, some = map(json.loads, done.stdout.splitlines()[-2:])
  assert nothing == dict(moved=[0.0] * 3, skipped=[0, 0], loss=[0.0, 0.0])
  one, losses, _ = train(
      fresh(), [labelled(1, 2)], objective=toy.Labelled(), learning_rate=1e-2
  )
  moved = jax.tree.map(
      lambda a, b: float(jnp.abs(a - b).sum()), one.params, fresh().params
  )
  assert some["skipped"] == [0, 0] and some["loss"][1] == 2.0
  np.testing.assert_allclose(some["loss"][0] / 2, losses[0], rtol=1e-5)
  np.testing.assert_allclose(some["moved"], jax.tree.leaves(moved), rtol=1e-3)
  assert min(some["moved"]) > 0


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
