"""Looking ahead loses no batch; signals and bounds act when they should."""

import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
import toy

from vjepa_jax.train import watch
from vjepa_jax.train.checkpoint import Checkpoints


def same(a, b):
  return np.array_equal(a["volume"], b["volume"])


def test_looking_ahead_loses_neither_the_batch_nor_the_place():
  plain, feed = toy.iterator(), watch.Feed(toy.iterator())
  first = next(plain)
  ahead = feed.peek()
  assert same(ahead, first) and same(feed.peek(), first)
  before = feed.get_state()
  assert same(feed.take(), first) and same(feed.take(), next(plain))
  feed.peek()
  feed.set_state(before)
  assert same(feed.take(), first)


class Slow:
  """Batches of one number, each after some time; counts what was read."""

  def __init__(self, seconds):
    self.seconds, self.read = seconds, 0

  def __next__(self):
    time.sleep(self.seconds)
    self.read += 1
    return {"volume": np.full((2, 1), self.read)}

  def get_state(self):
    return {"read": self.read}

  def set_state(self, state):
    self.read = state["read"]


def test_the_next_batch_is_read_and_put_while_a_step_runs():
  putters = []

  def put(batch):
    putters.append(threading.current_thread())
    time.sleep(0.03)
    return batch

  feed = watch.Feed(Slow(0.03), put)
  feed.take()
  first = feed.waited
  assert first > 0.05
  for _ in range(10):
    time.sleep(0.12)  # the step
    feed.take()
  feed.close()
  assert feed.waited - first < 0.3  # 0.6 if the batches were read in between
  assert threading.main_thread() not in putters


def test_the_place_is_that_of_the_batches_taken():
  source = Slow(0.0)
  feed = watch.Feed(source)
  assert feed.get_state() == {"read": 0}
  for number in range(1, 4):
    assert feed.take()["volume"][0, 0] == number
    assert feed.get_state() == {"read": number}
  assert feed.peek()["volume"][0, 0] == 4 and source.read == 4
  assert feed.get_state() == {"read": 3}
  feed.set_state({"read": 1})
  assert feed.get_state() == {"read": 1}
  assert feed.take()["volume"][0, 0] == 2
  feed.close()


class Ended:
  def __next__(self):
    raise StopIteration

  def get_state(self):
    return {}


def test_training_data_that_end_are_an_error():
  with pytest.raises(ValueError, match="the iterator has ended"):
    watch.Feed(Ended()).take()


def test_a_first_signal_is_remembered_and_the_second_acts():
  # A process started in the background inherits an ignored SIGINT.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  with watch.Signals() as signals:
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.received == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_window_goes_on_from_the_sums_of_a_checkpoint():
  steps = [
      {"loss": (np.float32(v), np.float32(1)), "nonfinite": (0.0, 1.0)}
      for v in (0.1, 0.2, 0.3, 0.4)
  ]
  limits = dict(skipped_in_row=0, max_skipped_in_row=1)
  whole = watch.Window(0, {}, **limits)
  for metrics in steps:
    whole.add(metrics)
  first = watch.Window(0, {}, **limits)
  for metrics in steps[:2]:
    first.add(metrics)
  second = watch.Window(2, first.sums(), **limits)
  for metrics in steps[2:]:
    second.add(metrics)
  assert second.flush() == whole.flush()
  assert second.sums() == {}


def test_compilations_are_counted():
  before = watch.compile_count()
  fn = jax.jit(lambda x: x * 3 + 1)
  fn(np.zeros(3, np.float32))
  fn(np.ones(3, np.float32))
  once = watch.compile_count()
  fn(np.zeros(4, np.float32))
  assert (once - before, watch.compile_count() - once) == (1, 1)


def test_a_trace_is_written_for_the_steps_asked_for(tmp_path):
  toy.run(tmp_path, total_steps=6, profile_from_step=2, profile_steps=2, validate=False)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_minutes_make_a_checkpoint_due(tmp_path):
  toy.run(tmp_path, total_steps=5, checkpoint_every_minutes=1e-9, validate=False, keep=9)
  assert Checkpoints(tmp_path / "checkpoints").all_steps() == [1, 2, 3, 4, 5]
