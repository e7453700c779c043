"""What is saved comes back whole, or a message says what is wrong."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from vjepa_jax.train import optim
from vjepa_jax.train.checkpoint import CheckpointError, Checkpoints
from vjepa_jax.train.state import TrainState

EXTRA = {"sums": {"a": [0.1, 2]}}
CONFIG = {"name": "toy", "train": {"batch_size": 16}}


def state_of(value=1.0, width=4, **extra):
  params = {"encoder": {"kernel": jnp.full((3, width), value)}, **extra}
  return TrainState(
      step=jnp.asarray(5, jnp.int32),
      params=params,
      model_state={"target": params["encoder"]},
      opt_state=optim.make_optimizer(learning_rate=0.1).init(params),
      key=jax.random.key(3),
      skipped=jnp.zeros((2,), jnp.int32),
  )


def shapes(state):
  return jax.eval_shape(lambda s: s, state)


@pytest.fixture
def saved(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  for step in (5, 10):
    checkpoints.save(step, state_of(step), config=CONFIG, extra=EXTRA)
  checkpoints.wait()
  return checkpoints


def test_a_state_comes_back_with_its_key_and_the_loops_own_numbers(saved):
  state, extra = saved.restore(10, shapes(state_of()))
  assert jax.tree.structure(state) == jax.tree.structure(state_of())
  assert np.all(state.params["encoder"]["kernel"] == 10.0)
  assert jnp.all(jax.random.bits(state.key) == jax.random.bits(jax.random.key(3)))
  assert extra == EXTRA
  assert saved.config(10) == CONFIG


def test_looking_at_a_run_under_way_neither_creates_nor_removes_anything(saved):
  under_way = pathlib.Path(saved.directory) / "15.orbax-checkpoint-tmp"
  under_way.mkdir()
  looked = Checkpoints(saved.directory, keep=None, read_only=True)
  assert looked.latest_step() == 10 and under_way.exists()
  Checkpoints(saved.directory / "none", keep=None, read_only=True)
  assert not (saved.directory / "none").exists()
  going_on = Checkpoints(saved.directory)  # clears, on a thread, what a killed run left
  deadline = time.monotonic() + 30
  while under_way.exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not under_way.exists()
  going_on.close()


def test_a_process_that_has_saved_nothing_reads_the_same(saved):
  fresh = Checkpoints(saved.directory)
  assert fresh.all_steps() == [5, 10] and fresh.latest_step() == 10
  state, _ = fresh.restore(5, shapes(state_of()))
  assert np.all(state.params["encoder"]["kernel"] == 5.0)


def test_a_part_of_the_state_can_be_read_alone(saved):
  part, _ = saved.restore(10, {"params": shapes(state_of()).params}, partial=True)
  assert np.all(part["params"]["encoder"]["kernel"] == 10.0)


def test_missing_unexpected_and_misshapen_names_are_all_listed(saved):
  other = state_of(width=6, head={"kernel": jnp.ones((2, 2))})
  other = other.replace(model_state={})
  with pytest.raises(CheckpointError) as caught:
    saved.restore(10, shapes(other))
  message = str(caught.value)
  assert "missing: params/head/kernel [2, 2]" in message
  assert "missing: opt_state/inner_state/mu/head/kernel" in message
  assert "misshapen: params/encoder/kernel is [3, 4], wanted [3, 6]" in message
  assert "unexpected: model_state/target/kernel [3, 4]" in message


def test_a_part_that_lacks_a_name_is_refused_too(saved):
  with pytest.raises(CheckpointError, match="unexpected: params/encoder/kernel"):
    saved.restore(
        10, {"params": {"other": jax.ShapeDtypeStruct((2,), jnp.float32)}}, partial=True
    )


def test_a_step_that_is_not_there_is_named_with_those_that_are(saved):
  with pytest.raises(CheckpointError, match=r"checkpoint 7 .* steps there: \[5, 10\]"):
    saved.restore(7, shapes(state_of()))


@pytest.mark.parametrize("damage", ["truncated", "metadata", "arrays"])
def test_a_damaged_checkpoint_is_named_with_a_way_out(saved, damage):
  folder = pathlib.Path(saved.directory) / "10" / "state"
  if damage == "truncated":
    for path in folder.rglob("d/*"):
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  elif damage == "metadata":
    (folder / "_METADATA").unlink()
  else:
    for path in folder.rglob("d"):
      shutil.rmtree(path)
  with pytest.raises(CheckpointError, match=r"10 is damaged(.|\n)*\[5\]"):
    Checkpoints(saved.directory).restore(10, shapes(state_of()))


def test_the_latest_stay_and_every_nth_for_good(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2, keep_every_steps=4)
  for step in range(1, 11):
    checkpoints.save(step, state_of(step), config=CONFIG)
  checkpoints.wait()
  assert checkpoints.all_steps() == [4, 8, 9, 10]


@pytest.mark.parametrize("mode, kept, best", [("max", [2, 5], 5), ("min", [3, 4], 4)])
def test_the_best_stay_by_their_metric(tmp_path, mode, kept, best):
  checkpoints = Checkpoints(tmp_path, keep=2, best_mode=mode)
  for step, metric in enumerate([0.5, 0.7, 0.2, 0.1, 0.9, float("nan"), 0.6], start=1):
    if checkpoints.would_keep(metric):
      checkpoints.save(step, state_of(step), config=CONFIG, metric=metric)
  checkpoints.wait()
  assert checkpoints.all_steps() == kept
  assert checkpoints.best_step() == best
  assert Checkpoints(tmp_path, keep=2, best_mode=mode).best_step() == best
  checkpoints.drop_after(kept[0])
  assert checkpoints.all_steps() == kept[:1]


def test_the_place_of_the_data_is_kept(tmp_path):
  iterator = toy.iterator(rows=4)
  for _ in range(3):
    next(iterator)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(3, state_of(), config=CONFIG, iterator=iterator)
  expected = next(iterator)
  other = toy.iterator(rows=4)
  checkpoints.restore_place(3, other)
  np.testing.assert_array_equal(next(other)["volume"], expected["volume"])


def test_the_place_of_the_data_is_found_by_another_number_of_processes(tmp_path):
  iterator = toy.iterator(rows=4)
  next(iterator)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, state_of(), config=CONFIG, iterator=iterator)
  checkpoints.wait()
  (written,) = (tmp_path / "1" / "data").glob("process_*")
  for number in range(4):
    (written.parent / f"process_{number}-of-4.json").write_bytes(written.read_bytes())
  written.unlink()
  other = toy.iterator(rows=4)
  checkpoints.restore_place(1, other)
  np.testing.assert_array_equal(next(other)["volume"], next(iterator)["volume"])


def test_donating_the_state_while_it_is_saved_does_no_harm(tmp_path):
  step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
  checkpoints = Checkpoints(tmp_path, keep=None)
  state = {"params": {"a": jnp.zeros((1000, 1000)), "b": jnp.zeros((3,))}}
  for number in range(1, 6):
    state = step(state)
    checkpoints.save(number, state, config=CONFIG)
    state = step(state)
  for number in range(1, 6):
    restored, _ = checkpoints.restore(number, shapes(state))
    assert np.unique(restored["params"]["a"]).tolist() == [2 * number - 1]


KILLED_WHILE_SAVING = """
import sys, jax.numpy as jnp
from vjepa_jax.train.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
state = {"params": {str(i): jnp.full((400, 1000), 1.0 + i) for i in range(40)}}
checkpoints.save(1, state, config={})
checkpoints.wait()
checkpoints.save(2, state, config={})
print("saving", flush=True)
checkpoints.wait()
print("saved", flush=True)
"""


def test_a_kill_during_a_save_leaves_the_one_before(tmp_path):
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
  with subprocess.Popen(
      [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)], env=env,
      stdout=subprocess.PIPE, text=True,
  ) as process:
    assert process.stdout.readline() == "saving\n"
    time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    finished = "saved" in process.stdout.read()
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.latest_step() == (2 if finished else 1)
  leaf = jax.ShapeDtypeStruct((400, 1000), jnp.float32)
  wanted = {"params": {str(i): leaf for i in range(40)}}
  state, _ = checkpoints.restore(checkpoints.latest_step(), wanted)
  assert all(np.all(state["params"][str(i)] == 1.0 + i) for i in range(40))
  # The same step can be saved again over what the killed process left.
  checkpoints.save(2, state, config=CONFIG)
  checkpoints.wait()
  assert checkpoints.all_steps() == [1, 2]
