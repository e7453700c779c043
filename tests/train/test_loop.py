"""The loop resumes bit for bit, stops when told, saves what it should."""

import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import toy

from vjepa_jax.train import evaluate, loop, metrics, sharding, watch
from vjepa_jax.train.checkpoint import CheckpointError, Checkpoints
from vjepa_jax.train.state import init_state

OPTIONS = dict(total_steps=120, checkpoint_every_steps=10, validate_every_steps=25)


class Constant:
  """An evaluator that yields the next of given values at each turn."""

  def __init__(self, name, values):
    self.name, self.values, self.turns = name, list(values), 0

  def run(self, params, model_state):
    yield self.name, self.values[min(self.turns, len(self.values) - 1)]
    self.turns += 1


def process(workdir, **options):
  env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": os.pathsep.join([os.getcwd(), os.path.dirname(__file__)]),
  }
  script = pathlib.Path(__file__).with_name("toy_run.py")
  return subprocess.Popen(
      [sys.executable, str(script), str(workdir), json.dumps(options)],
      env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )


def finish(running):
  output, _ = running.communicate(timeout=240)
  assert running.returncode == 0, output
  return output


def wait_for_step(workdir, step, running):
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline and running.poll() is None:
    if any(line["step"] >= step for line in metrics.read(workdir)):
      return
    time.sleep(0.005)
  raise AssertionError(running.communicate()[0])


def comparable(workdir):
  return [
      {name: value for name, value in line.items() if name not in metrics.TIMING_KEYS}
      for line in metrics.read(workdir)
  ]


def last_state(workdir):
  draw = lambda key: init_state(
      toy.Toy(), toy.optimizer(), toy.augment, toy.batch(), key
  )
  checkpoints = Checkpoints(pathlib.Path(workdir) / "checkpoints")
  step = checkpoints.latest_step()
  return checkpoints.restore(step, jax.eval_shape(draw, jax.random.key(0)))[0]


def assert_equal_bit_for_bit(a, b):
  a, b = (s.replace(key=jax.random.key_data(s.key)) for s in (a, b))
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("unbroken")
  finish(process(workdir, **OPTIONS))
  return workdir


@pytest.mark.slow
def test_a_run_killed_at_a_random_step_ends_as_the_unbroken_one(unbroken, tmp_path):
  killed_at = random.randint(15, 100)
  print(f"killed at step {killed_at}")
  running = process(tmp_path, pace_s=0.01, **OPTIONS)
  wait_for_step(tmp_path, killed_at, running)
  # The first is written while steps go on.
  while not any(p.name.isdigit() for p in (tmp_path / "checkpoints").iterdir()):
    assert running.poll() is None
    time.sleep(0.005)
  running.kill()
  running.communicate()
  assert "goes on from step" in finish(process(tmp_path, **OPTIONS))
  assert comparable(tmp_path) == comparable(unbroken)
  assert_equal_bit_for_bit(last_state(tmp_path), last_state(unbroken))


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(unbroken, tmp_path):
  options = OPTIONS | {"checkpoint_every_steps": None}
  running = process(tmp_path, pace_s=0.01, **options)
  wait_for_step(tmp_path, 20, running)
  running.send_signal(signal.SIGTERM)
  output, _ = running.communicate(timeout=240)
  assert running.returncode == 143
  assert "the same command goes on" in output and "Traceback" not in output
  step = Checkpoints(tmp_path / "checkpoints").latest_step()
  assert 20 <= step < OPTIONS["total_steps"]
  finish(process(tmp_path, **options))
  assert comparable(tmp_path) == comparable(unbroken)
  assert_equal_bit_for_bit(last_state(tmp_path), last_state(unbroken))


class Asking:
  """An evaluator that looks at three batches; a signal comes at the nth of a run."""

  def __init__(self, name, signal_at=None):
    self.name, self.signal_at, self.seen = name, signal_at, 0
    self._features = evaluate.wrap_functions(
        toy.Toy().functions(), toy.augment, sharding.make_mesh()
    )["features"]

  def run(self, params, model_state):
    for number in range(3):
      self.seen += 1
      if self.seen == self.signal_at:
        os.kill(os.getpid(), signal.SIGTERM)
      features = self._features(params, model_state, toy.batch(number))
      yield f"{self.name}.{number}", float(np.mean(features))


# Calls of the second evaluator: 3 before the first step, then at steps 4, 8, 12.
@pytest.mark.parametrize("at, step", [(1, 0), (3, 0), (5, 4), (12, 12)])
def test_a_signal_while_evaluating_acts_at_once_and_costs_no_number(tmp_path, at, step):
  def run(folder, signal_at=None):
    evaluators = {"first": (Asking("first"), 4), "second": (Asking("second", signal_at), 4)}
    toy.run(
        folder, total_steps=12, evaluators=evaluators, best_metric="first.1",
        early_stop_metric="second.2", early_stop_patience=9,
    )
    return evaluators["second"][0].seen

  assert run(tmp_path / "whole") == 12
  with pytest.raises(SystemExit) as ended:
    run(tmp_path / "broken", at)
  assert ended.value.code == 143
  checkpoints = Checkpoints(tmp_path / "broken" / "checkpoints")
  assert checkpoints.all_steps() == [step]
  names = {k for x in metrics.read(tmp_path / "broken") if x["step"] == step for k in x}
  assert "first.0" in names and "second.0" not in names
  run(tmp_path / "broken")
  assert comparable(tmp_path / "broken") == comparable(tmp_path / "whole")
  whole, broken = last_state(tmp_path / "whole"), last_state(tmp_path / "broken")
  assert_equal_bit_for_bit(whole, broken)
  best = [
      Checkpoints(tmp_path / name / "checkpoints" / "best", best_mode="max").all_steps()
      for name in ("whole", "broken")
  ]
  assert best[0] == best[1]


def test_a_log_line_spans_a_checkpoint_between_two_lines(tmp_path):
  toy.run(tmp_path / "whole", total_steps=12, log_every_steps=5)
  with pytest.raises(RuntimeError, match="unplugged"):
    toy.run(
        tmp_path / "broken", total_steps=12, log_every_steps=5,
        checkpoint_every_steps=2, data=Unplugged(after=9),
    )
  assert Checkpoints(tmp_path / "broken" / "checkpoints").latest_step() == 8
  state = toy.run(tmp_path / "broken", total_steps=12, log_every_steps=5)
  assert comparable(tmp_path / "broken") == comparable(tmp_path / "whole")
  assert_equal_bit_for_bit(state, last_state(tmp_path / "whole"))


class Unplugged:
  """Training data that fail after some batches."""

  def __init__(self, after):
    self._iterator, self._left = toy.iterator(), after

  def __next__(self):
    if not self._left:
      raise RuntimeError("unplugged")
    self._left -= 1
    return next(self._iterator)

  def get_state(self):
    return self._iterator.get_state()

  def set_state(self, state):
    self._iterator.set_state(state)


def test_each_line_says_what_it_should(tmp_path, capsys):
  toy.run(tmp_path, total_steps=9, tokens_per_volume=8, accum=2)
  lines = [line for line in metrics.read(tmp_path) if "loss" in line]
  assert [line["step"] for line in lines] == [3, 6, 9]
  assert lines[0].keys() == {
      "step", "loss", "lr", "weight_decay", "momentum", "grad_norm", "clipped",
      "seen_std", "skipped", "volumes_per_s", "tokens_per_s", "step_ms", "data_wait",
      "peak_bytes", "compiles",
  }
  optimizer = toy.optimizer(9)
  assert lines[1]["lr"] == pytest.approx(float(optimizer.learning_rate(5)))
  assert [line["compiles"] for line in lines] == [1, 1, 1]
  assert lines[2]["tokens_per_s"] == pytest.approx(8 * lines[2]["volumes_per_s"])
  assert 0 < lines[2]["data_wait"] <= 1 and lines[2]["peak_bytes"] > 1e6
  printed = capsys.readouterr().out
  for text in (
      "encoder/kernel", "Total: 784", "batch 16 = 2 micro-batches of 8; 9 steps",
      "lr: first 0, middle", "weight_decay: first 0.04", "step 9/9  loss ",
  ):
    assert text in printed


def test_validation_lines_stand_at_the_start_the_turns_and_the_end(tmp_path):
  toy.run(tmp_path, total_steps=10, validate_every_steps=4, validation_batches=1)
  found = metrics.history(metrics.read(tmp_path), "validation.loss")
  assert [step for step, _ in found] == [0, 4, 8, 10]
  assert found[-1][1] < found[0][1]


def test_too_many_non_finite_steps_in_a_row_end_the_run(tmp_path):
  data = toy.iterator(poison=(2, 3, 6, 7, 8))
  with pytest.raises(
      watch.NonFiniteError, match=r"steps 7 to 9: 3 in a row .* checkpoint: step 6"
  ):
    toy.run(
        tmp_path, data=data, max_skipped_in_row=3, checkpoint_every_steps=6,
        validate=False,
    )
  lines = metrics.read(tmp_path)
  assert [(line["step"], line["skipped"]) for line in lines] == [(3, 1), (6, 2)]
  assert all(math.isfinite(line["loss"]) for line in lines)


def test_the_count_of_bad_steps_survives_a_resume(tmp_path):
  options = dict(max_skipped_in_row=4, validate=False, log_every_steps=50)
  with pytest.raises(RuntimeError, match="unplugged"):
    data = Unplugged(after=4)
    data._iterator = toy.iterator(poison=(1, 2, 3, 4, 5))
    toy.run(tmp_path, data=data, checkpoint_every_steps=2, **options)
  with pytest.raises(watch.NonFiniteError, match="steps 2 to 5: 4 in a row"):
    toy.run(tmp_path, data=toy.iterator(poison=(1, 2, 3, 4, 5)), **options)


def test_the_best_checkpoints_follow_the_named_metric(tmp_path):
  probe = Constant("probe.trained", [0.9, 0.2, 0.6, 0.5, 0.3, 0.1])
  toy.run(
      tmp_path, total_steps=12, evaluators={"probe": (probe, 3)}, validate=False,
      best_metric="probe.trained", keep_best=2,
  )
  best = Checkpoints(tmp_path / "checkpoints" / "best", keep=2, best_mode="max")
  assert best.all_steps() == [6, 9] and best.best_step() == 6
  assert Checkpoints(tmp_path / "checkpoints").all_steps() == [12]


def test_a_best_checkpoint_beyond_the_restored_step_is_made_again(tmp_path):
  options = dict(best_metric="probe.trained", validate=False, total_steps=9)
  high, low = Constant("probe.trained", [0.9]), Constant("probe.trained", [0.2, 0.4])
  with pytest.raises(RuntimeError, match="unplugged"):
    toy.run(
        tmp_path, data=Unplugged(after=7), checkpoint_every_steps=4,
        evaluators={"probe": (high, 6)}, **options,
    )
  toy.run(tmp_path, evaluators={"probe": (low, 6)}, **options)
  best = Checkpoints(tmp_path / "checkpoints" / "best", best_mode="max")
  assert best.all_steps() == [9]


def test_a_best_metric_that_nothing_gives_fails_before_training(tmp_path):
  probe = Constant("probe.trained", [0.9])
  with pytest.raises(KeyError, match="probe.train'.*'probe.trained'"):
    toy.run(
        tmp_path, evaluators={"probe": (probe, 3)}, best_metric="probe.train",
        validate=False,
    )
  assert metrics.history(metrics.read(tmp_path), "loss") == []


def test_early_stopping_ends_with_everything_evaluated_and_stays_ended(tmp_path):
  options = dict(
      early_stop_metric="probe.trained", early_stop_patience=2,
  )
  probe = Constant("probe.trained", [0.1, 0.5, 0.4, 0.3, 0.9])
  state = toy.run(tmp_path, evaluators={"probe": (probe, 4)}, **options)
  assert state.step == 12
  lines = metrics.read(tmp_path)
  assert [s for s, _ in metrics.history(lines, "probe.trained")] == [0, 4, 8, 12]
  assert [s for s, _ in metrics.history(lines, "validation.loss")] == [0, 12]
  again = toy.run(tmp_path, evaluators={"probe": (probe, 4)}, **options)
  assert again.step == 12 and metrics.read(tmp_path) == lines


def test_a_finished_run_is_not_run_again(tmp_path):
  first = toy.run(tmp_path, total_steps=6)
  lines = metrics.read(tmp_path)
  again = toy.run(tmp_path, total_steps=6, data=Unplugged(after=1))
  assert metrics.read(tmp_path) == lines
  assert_equal_bit_for_bit(again, first)


def test_a_workdir_of_another_model_is_refused(tmp_path):
  toy.run(tmp_path, total_steps=3)
  folder = tmp_path / "checkpoints" / "3"
  with pytest.raises(CheckpointError, match="misshapen: params/encoder/kernel"):
    toy.run(tmp_path, total_steps=6, data=Doubled())
  assert folder.exists()


class Doubled:
  """Training data with another canvas."""

  def __init__(self):
    self._iterator = toy.iterator()

  def __next__(self):
    batch = next(self._iterator)
    return {**batch, "volume": np.concatenate([batch["volume"]] * 2, axis=2)}

  def get_state(self):
    return self._iterator.get_state()

  def set_state(self, state):
    self._iterator.set_state(state)


def test_figures_of_an_evaluator_reach_the_workdir(tmp_path):
  figure = Constant("figures.masks", [np.zeros((4, 4, 3), np.uint8)])
  evaluators = {"figures": (figure, None)}
  toy.run(tmp_path, total_steps=2, evaluators=evaluators, validate=False)
  assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
      "figures.masks_0000000.png", "figures.masks_0000002.png",
  ]


def test_wrapped_functions_take_host_batches_and_do_not_augment():
  objective, mesh = toy.Toy(), sharding.make_mesh()
  functions = evaluate.wrap_functions(objective.functions(), toy.augment, mesh)
  device = toy.augment(toy.batch(), jax.random.key(5), train=False)
  params, model_state = objective.init(jax.random.key(0), device)
  features = functions["features"](params, model_state, toy.batch())
  expected = objective.functions()["features"](params, model_state, device)
  np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)
  assert functions["updates"](params, model_state) == 0


def test_a_step_compiled_again_is_told_once_a_line(tmp_path, capsys):
  class Growing(Unplugged):
    def __next__(self):
      batch = super().__next__()
      if self._left < 15:
        batch["label"] = np.zeros((16,), np.int32)
      return batch

  toy.run(tmp_path, total_steps=9, data=Growing(after=20), validate=False)
  assert capsys.readouterr().out.count("was compiled again") == 1
  assert [line["compiles"] for line in metrics.read(tmp_path)] == [1, 2, 2]


def test_a_schedule_that_climbs_again_is_refused_before_anything_is_written(tmp_path):
  climbing = lambda step: 1e-3 * (1 + np.cos(np.pi * np.asarray(step) / 10))
  optimizer = toy.optimizer(learning_rate=climbing)
  with pytest.raises(ValueError, match="learning_rate: the schedule turns"):
    loop.run(
        objective=toy.Toy(), optimizer=optimizer, augment=toy.augment,
        train_iterator=toy.iterator(), workdir=tmp_path / "run", config={},
        options=loop.LoopOptions(total_steps=40, batch_size=16),
    )
  assert not (tmp_path / "run").exists()


def test_a_run_goes_on_over_many_batches_without_a_label(tmp_path):
  data = toy.iterator(unlabelled=range(2, 10))
  state = toy.run(
      tmp_path, total_steps=12, data=data, objective=toy.Labelled(), validate=False,
      max_skipped_in_row=3,
  )
  assert state.step == 12 and state.model_state["updates"] == 4
  lines = [line for line in metrics.read(tmp_path) if "loss" in line]
  assert [line["skipped"] for line in lines] == [0] * len(lines)
  # Means are of the steps that had labels; between them there is none.
  assert [line["loss"] is None for line in lines] == [False, True, True, False]


def test_a_validation_without_labels_says_so():
  def validation(**changes):
    batches = [toy.batch() | {"label": np.full(16, -1)} | changes] * 2
    return evaluate.Validation(
        toy.Labelled(), toy.augment, sharding.make_mesh(), lambda: batches
    )

  draw = lambda key: init_state(
      toy.Toy(), toy.optimizer(), toy.augment, toy.batch(), key
  )
  state = jax.jit(draw)(jax.random.key(0))
  run = lambda one: dict(one.run(state.params, state.model_state))
  with pytest.raises(ValueError, match=r"none of the 32 rows in 2 batch\(es\) has a label"):
    run(validation())
  with pytest.raises(ValueError, match="no batch had a row with _mask 1"):
    run(validation(_mask=np.zeros(16, np.float32)))
  assert run(validation(label=np.arange(16) - 8))["validation.loss"] > 0
