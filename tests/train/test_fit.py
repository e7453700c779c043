"""Micro-batches are chosen before step 1, by bytes, at a constant global batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from vjepa_jax.compiler import chips, estimate
from vjepa_jax.train import fit, loop, metrics, sharding
from vjepa_jax.train.program import make_program
from vjepa_jax.train.watch import compile_count

ROWS = 16


@dataclasses.dataclass(frozen=True)
class Wide(toy.Toy):
  """A toy whose rows need far more memory than its parameters."""

  def loss(self, params, model_state, batch, key, *, train):
    loss, aux = super().loss(params, model_state, batch, key, train=train)
    rows = batch["volume"].reshape(len(batch["volume"]), -1)
    seen = toy.encode(params["encoder"], rows)
    wide = jnp.sin(seen[:, :, None] * jnp.arange(4096.0))
    return loss + 1e-6 * jnp.sum(wide @ jnp.cos(wide).swapaxes(1, 2)), aux


def build(accum):
  return make_program(
      objective=Wide(), optimizer=toy.optimizer(8), augment=toy.augment,
      batch=toy.batch(rows=ROWS), mesh=sharding.make_mesh(), accum=accum,
  )


@functools.cache
def needed_gib(accum):
  program = build(accum)
  rows = sum(leaf.size * leaf.dtype.itemsize for leaf in program.batch.values())
  return (estimate.memory(program.lower().compile()).whole + rows) / chips.GIB


def choose(memory_gib, **options):
  said = []
  program, accum = fit.choose(
      build, batch_size=ROWS, mesh=sharding.make_mesh(), memory_gib=memory_gib,
      say=said.append, **options,
  )
  return program, accum, said


def test_the_fewest_micro_batches_that_fit_are_chosen_and_told():
  assert needed_gib(4) < needed_gib(1)
  program, accum, said = choose(1.01 * needed_gib(4) / 0.95)
  assert accum == 4
  assert program.batch["volume"].shape[0] == ROWS
  assert said[0].startswith("train.fit: accum 1 (micro-batches of 16): ")
  assert said[-1] == "train.fit: takes accum 4: 16 volumes a step as 4 micro-batch(es) of 4"


def test_no_more_micro_batches_than_needed_and_no_fewer_than_asked():
  assert choose(1.01 * needed_gib(1) / 0.95)[1] == 1
  assert choose(1.0, least=8)[1] == 8


def test_the_chosen_program_is_not_compiled_again():
  compile_count()
  program, _, _ = choose(1.0)
  state = program.init(jax.random.key(0))
  batch = sharding.put_batch(toy.batch(rows=ROWS), program.mesh)
  before = compile_count()
  state, _ = program.step(state, batch)
  program.step(state, batch)
  assert compile_count() == before


def test_what_no_micro_batch_makes_small_enough_is_refused_with_what_to_change():
  with pytest.raises(fit.FitError, match="does not fit even as accum 16") as error:
    choose(needed_gib(4) / 100)
  for advice in ("remat='full'", "a smaller model", "more devices"):
    assert advice in str(error.value)


def test_a_device_of_unknown_memory_must_be_told():
  with pytest.raises(fit.FitError, match="train.memory_gib"):
    fit.device_bytes(sharding.make_mesh())
  assert fit.device_bytes(sharding.make_mesh(), 2.0) == 2 * chips.GIB


def test_micro_batches_divide_rows_and_devices():
  assert fit.candidates(12, sharding.make_mesh(), 1) == [1, 2, 3, 4, 6, 12]
  assert fit.candidates(12, sharding.make_mesh(), 4) == [4, 6, 12]


def test_options_that_mean_nothing_are_named():
  assert fit.fit_faults("auto", 16.0) == []
  assert "'on' is none of off, auto" in fit.fit_faults("on")[0]
  assert "must be positive" in fit.fit_faults("auto", 0.0)[0]


def run(workdir, memory_gib, data=None):
  return loop.run(
      objective=Wide(), optimizer=toy.optimizer(8), augment=toy.augment,
      train_iterator=data or toy.iterator(ROWS), workdir=workdir, seed=7,
      options=loop.LoopOptions(
          total_steps=8, batch_size=ROWS, log_every_steps=1, tensorboard=False,
          checkpoint_every_steps=4, fit="auto", memory_gib=memory_gib,
      ),
      config={"name": "toy"},
  )


def test_a_run_that_goes_on_keeps_its_micro_batches_bit_for_bit(tmp_path, capsys):
  memory = 1.01 * needed_gib(4) / 0.95
  whole = run(tmp_path / "whole", memory)
  assert "train.fit: takes accum 4: 16 volumes" in capsys.readouterr().out
  with pytest.raises(RuntimeError, match="unplugged"):
    run(tmp_path / "broken", memory, Unplugged(5))
  # More memory by now: another choice would add up in another order.
  broken = run(tmp_path / "broken", 100.0)
  told = capsys.readouterr().out
  assert "goes on from step 4" in told and "4 micro-batches of 4" in told
  jax.tree.map(np.testing.assert_array_equal, whole.params, broken.params)
  assert losses(tmp_path / "whole") == losses(tmp_path / "broken")


def test_what_the_devices_no_longer_divide_is_chosen_anew_and_said():
  said = []
  told = dict(batch_size=12, mesh=sharding.make_mesh(), say=said.append)
  assert fit.kept(None, 2, **told) == 2
  assert fit.kept(6, 2, **told) == 6
  assert said == []
  assert fit.kept(8, 2, **told) is None
  assert "does not go on bit for bit" in said[0]


class Unplugged:
  """Training data that fail after some batches."""

  def __init__(self, after):
    self._iterator, self._left = toy.iterator(ROWS), after

  def __next__(self):
    if not self._left:
      raise RuntimeError("unplugged")
    self._left -= 1
    return next(self._iterator)

  def __getattr__(self, name):
    return getattr(self._iterator, name)


def losses(workdir):
  return [line["loss"] for line in metrics.read(workdir) if "loss" in line]
