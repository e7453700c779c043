"""The train loop does not wait for shards of the full size."""

import functools
import time

import jax
import pytest

from vjepa_jax.config import units
from vjepa_jax.data import phantoms, pipeline
from vjepa_jax.train import sharding, watch

pytestmark = pytest.mark.slow

# A v4-32 slice: 32 volumes a host and step, which takes 0.853 s (a compiler's bound).
# A quarter of both here.
ROWS, STEP_S, STEPS = 8, 0.853 / 4, 12
MAX_WAIT = 0.02


def test_shards_of_the_full_size_keep_up_with_a_tpu_host(tmp_path):
  manifest = phantoms.write_oct_corpus(
      tmp_path / "oct", **units.PHANTOMS["oct_tiny"]
  )
  data = pipeline.open_data(
      str(manifest), canvas=(64, 384, 384), splits={"train": 1.0}, max_records=6,
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
