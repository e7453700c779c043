"""The train loop does not wait for shards of the full size, and steps see their batch."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.config import units
from vjepa_jax.data import phantoms, pipeline
from vjepa_jax.train import sharding, watch

pytestmark = pytest.mark.slow

# A v4-32 slice: 32 volumes a host and step, which takes 0.853 s (a compiler's bound).
# A quarter of both here.
ROWS, STEP_S, STEPS = 8, 0.853 / 4, 12
MAX_WAIT = 0.02


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus") / "oct"
  return str(phantoms.write_oct_corpus(folder, **units.PHANTOMS["oct_tiny"]))


def test_a_step_sees_its_own_batch_whatever_is_read_meanwhile(manifest):
  # Host memory of a batch is used again: not while a device, or a step that is still
  # running on a batch that nobody else holds, may read it.
  data = pipeline.open_data(
      manifest, canvas=(4, 16, 16), splits={"train": 1.0}, max_records=12,
      max_bad_fraction=0.5, max_lost_fraction=1.0,
  )
  place = functools.partial(sharding.put_batch, mesh=sharding.make_mesh())

  @jax.jit
  def slow_sum(volume):
    # Long enough that later batches are read while it runs.
    work = jax.lax.fori_loop(0, 20, lambda _, x: jnp.sin(x), jnp.ones((256, 256)))
    return (volume.astype(jnp.int32) + (work.sum() * 0).astype(jnp.int32)).sum()

  # jax reads numpy's memory in place where that is aligned, which is a matter of
  # chance: one buffer of four.
  for seed in range(16):
    batches = lambda: pipeline.train_iterator(
        data.splits["train"], batch_size=8, seed=seed, threads=0  # noqa: B023
    )
    plain, feed = batches(), watch.Feed(batches(), place)
    wanted = [np.sum(next(plain)["volume"], dtype=int) for _ in range(16)]
    held = [feed.take() for _ in range(8)]
    found = [slow_sum(feed.take()["volume"]) for _ in range(8)]
    feed.close()
    assert [np.sum(batch["volume"], dtype=int) for batch in held] == wanted[:8]
    assert [int(value) for value in found] == wanted[8:]


def test_shards_of_the_full_size_keep_up_with_a_tpu_host(manifest, tmp_path):
  data = pipeline.open_data(
      manifest, canvas=(64, 384, 384), splits={"train": 1.0}, max_records=6,
      cache=str(tmp_path / "shards"), max_bad_fraction=0.5, max_lost_fraction=1.0,
  )
  place = functools.partial(sharding.put_batch, mesh=sharding.make_mesh())
  shares = []
  # Another process may take the cores for a while: the best of three counts.
  for _ in range(3):
    batches = pipeline.train_iterator(
        data.splits["train"], batch_size=ROWS, seed=0, threads=4
    )
    feed = watch.Feed(batches, place)
    feed.take()
    begin, before = time.perf_counter(), feed.waited
    for _ in range(STEPS):
      time.sleep(STEP_S)  # the devices are busy, this host is not
      jax.block_until_ready(feed.take())
    shares.append((feed.waited - before) / (time.perf_counter() - begin))
    feed.close()
    batches.close()
    if shares[-1] <= MAX_WAIT:
      break
  assert min(shares) <= MAX_WAIT, shares
