"""Batches of a split: shuffled without end for training, in order for evaluation.

The n-th row of the k-th batch is plain arithmetic of (seed, n, k), so that threads,
worker processes and hosts change who reads a row, never which row it is.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import concurrent.futures
import functools
import hashlib
from typing import Any, NamedTuple

import grain
import numpy as np

from vjepa_jax.data import mixture as mixture_lib
from vjepa_jax.data import volumes as volumes_lib
from vjepa_jax.data.buffers import Buffers
from vjepa_jax.data.manifest import check_disjoint
from vjepa_jax.data.mixture import Order
from vjepa_jax.data.record import DataError
from vjepa_jax.data.volumes import Batch, Mixture, Volumes, padding, stack

# Rows of each host that the start-up check compares.
_COMPARED = 4096
_STATE_VERSION = 2
# A batch in use, one on its way to the devices, one being made, and one more.
_BUFFERS = 4


class HostShare(NamedTuple):
  """What one host says it will read first.

  Attributes:
    host: its number.
    hosts: how many it thinks there are.
    order: digest of rows, seed, batch and mixture; the same on all hosts.
    draws: uint64 [n], its first draws.
  """

  host: int
  hosts: int
  order: str
  draws: np.ndarray


def host_share(
    volumes: Volumes | Mixture, *, batch_size: int, seed: int, shard: tuple[int, int]
) -> HostShare:
  """Returns what host `shard[0]` of `shard[1]` will read; see `check_hosts`."""
  rule = _rule(volumes, batch_size, seed, shard[1])
  draws = []
  for stream in _streams(volumes, batch_size, seed, shard):
    count = min(_COMPARED, -(-stream.rows // shard[1]))
    for n in range(count):
      place = stream.place(n)
      text = f"{place}:{volumes.rows[stream.row(place)].id}"
      draws.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
  text = repr(sorted(rule.items()))
  return HostShare(
      shard[0], shard[1], hashlib.sha256(text.encode()).hexdigest()[:16],
      np.array(draws, np.uint64),
  )


def check_hosts(shares: Sequence[HostShare]) -> None:
  """Checks, before the first step, that the hosts part the data between them.

  Args:
    shares: of every process, as each of them sees itself.

  Raises:
    DataError: if two take the same number or the same draws, one is missing, or they
      do not open the same rows in the same order.
  """
  for index, share in enumerate(shares):
    if share.hosts != len(shares):
      raise DataError(
          f"process {index} thinks it is one of {share.hosts} hosts; there are "
          f"{len(shares)}. Start all of them with the same number of processes"
      )
  numbers = [share.host for share in shares]
  if sorted(numbers) != list(range(len(shares))):
    raise DataError(
        f"the processes say they are hosts {numbers}; each number from 0 to "
        f"{len(shares) - 1} must come once, else they read the same data"
    )
  orders = {share.host: share.order for share in shares}
  other = [host for host, order in orders.items() if order != shares[0].order]
  if other:
    raise DataError(
        f"host(s) {', '.join(map(str, other))} open other rows, or the same in another "
        f"order, than host {shares[0].host}: manifest, files found bad before the "
        "start, seed, batch_size and mixture must be the same on all hosts"
    )
  check_disjoint({share.host: share.draws.tolist() for share in shares}, "draw")


class TrainIterator:
  """Endless batches whose place can be kept and restored; see `train_iterator`."""

  def __init__(
      self,
      volumes: Volumes | Mixture,
      batches: Sequence[grain.DatasetIterator],
      shares: Sequence[Any],
      rule: Mapping[str, Any],
      workers: int,
      *,
      rows: int,
      hosts: int,
  ):
    self._volumes = volumes
    self._batches = batches
    self._shares = shares
    self._rule = dict(rule)
    self._workers = workers
    self._rows, self._hosts = rows, hosts
    self._taken = [0] * len(batches)

  def __iter__(self) -> "TrainIterator":
    return self

  def __next__(self) -> Batch:
    source, _ = mixture_lib.draw(sum(self._taken), self._shares)
    batch = next(self._batches[source])
    self._taken[source] += 1
    return batch

  def get_state(self) -> dict[str, Any]:
    """Returns the place after the last batch, as JSON."""
    ledger = self._volumes.ledger
    return {
        "version": _STATE_VERSION, "batches": list(self._taken),
        "hosts": self._hosts,
        "place": [batches.get_state() for batches in self._batches],
        "rule": dict(self._rule), "workers": self._workers,
        "ledger": ledger.state() if ledger else None,
    }

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a place of `get_state`.

    Another number of threads, workers or hosts is no matter: who reads a row does
    not decide which row comes. On another number of hosts the places of any one of
    them serve; only files that reading lazily has skipped make a difference there.

    Raises:
      DataError: if rows, seed, global batch or mixture are not those of the state, so
        that other batches would follow.
    """
    if state.get("version") != _STATE_VERSION:
      raise DataError(
          "the place of the data was kept by another version of this library; begin "
          "anew in another workdir"
      )
    differing = [
        f"{key} was {state['rule'].get(key)}, is {value}"
        for key, value in self._rule.items() if state["rule"].get(key) != value
    ]
    if differing:
      raise DataError(
          "the training data are not those of the checkpoint "
          f"({'; '.join(differing)}): other batches would follow. Restore the "
          "manifest, its files and the config, or begin anew in another workdir"
      )
    self._taken, places = list(state["batches"]), state["place"]
    if state["hosts"] != self._hosts:
      places = [{"next_index": taken * self._rows} for taken in self._taken]
    for batches, place in zip(self._batches, places, strict=True):
      batches.set_state(place)
    if self._volumes.ledger:
      self._volumes.ledger.restore(state["ledger"])

  def close(self) -> None:
    """Stops reading ahead."""
    for batches in self._batches:
      batches.close()


def train_iterator(
    volumes: Volumes | Mixture,
    *,
    batch_size: int,
    seed: int,
    threads: int = 2,
    shard: tuple[int, int] = (0, 1),
    prefetch: int | None = None,
    workers: int = 0,
    exchange: Callable[[HostShare], Sequence[HostShare]] | None = None,
) -> TrainIterator:
  """Returns an endless iterator of shuffled batches that can be stopped and resumed.

  The order depends on (seed, epoch, row) alone: not on threads or workers, and the
  batches of all hosts, one below the other, are row for row the batch that one host
  alone would make. Each row comes once an epoch of its source; nothing is dropped at
  its end. A file that reading lazily finds bad is skipped, on its own host: only then
  do the global batches depend on the hosts.

  Args:
    volumes: the split.
    batch_size: rows of a batch on this host.
    seed: of the shuffling.
    threads: that read ahead; 0 reads in one thread, nothing ahead of its batch.
    shard: (this host, hosts).
    prefetch: volumes read ahead; by default two batches, of each source that
      alternates.
    workers: processes that `open_data` was given; kept with the place.
    exchange: gives every process's HostShare for this one's; with several hosts the
      shares are then checked (`check_hosts`).

  Returns:
    Iterator of dicts: volume [B, T, Z, Y, X, C] as stored, mean, std, _mask
    float32 [B], spacing float32 [B, 4], index, label, source int32 [B], and of clips
    with stages frame_label int32 [B, T], -1 where there is none; with
    get_state(), set_state(state), close().

  Raises:
    ValueError: for an empty split, or a batch_size or shard out of range.
    DataError: if the hosts do not part the data between them.
  """
  host, hosts = shard
  if not len(volumes) or batch_size < 1 or not 0 <= host < hosts:
    raise ValueError(
        f"train_iterator: {len(volumes)} volumes, batch_size {batch_size}, shard "
        f"{shard}: needs at least one volume, batch_size >= 1 and host < hosts"
    )
  if exchange is not None and hosts > 1:
    check_hosts(exchange(
        host_share(volumes, batch_size=batch_size, seed=seed, shard=shard)
    ))
  threads = max(threads, workers)  # Each worker has a thread that waits for it.
  ahead = 2 * batch_size if prefetch is None else prefetch
  options = grain.ReadOptions(
      num_threads=threads, prefetch_buffer_size=max(ahead, threads)
  )
  streams = _streams(volumes, batch_size, seed, shard)
  batches = [
      iter(
          grain.MapDataset.source(stream).to_iter_dataset(options)
          .batch(
              batch_size, drop_remainder=True,
              batch_fn=functools.partial(stack, buffers=Buffers(_BUFFERS)),
          )
      ) for stream in streams
  ]
  shares = volumes.shares if len(streams) > 1 else (1,)
  rule = _rule(volumes, batch_size, seed, hosts)
  return TrainIterator(
      volumes, batches, shares, rule, workers, rows=batch_size, hosts=hosts
  )


def eval_batches(
    volumes: Volumes | Mixture,
    batch_size: int,
    indices: Iterable[int] | None = None,
    *,
    threads: int = 2,
) -> Iterator[Batch]:
  """Yields batches in a fixed order, each row once; all of the same size.

  Args:
    volumes: the split. Sources that alternate keep batches of their own: first
      all of the first source, then of the next.
    batch_size: rows of a batch.
    indices: rows to take, in this order; by default all.
    threads: that read side by side.

  Yields:
    Batches as of `train_iterator`. The last (of each source that alternates) is filled
    up with rows of `_mask` 0, index -1 and label -1, whose volume is 0, std 1 and
    spacing the first row's.

  Raises:
    ValueError: if batch_size is below 1.
    DataError: if too many files are bad.
  """
  if batch_size < 1:
    raise ValueError(f"eval_batches: batch_size is {batch_size}, must be at least 1")
  wanted = range(len(volumes)) if indices is None else [int(i) for i in indices]
  groups = [wanted]
  if _alternates(volumes):
    homes = [volumes.home(index)[0] for index in wanted]
    groups = [
        [index for index, home in zip(wanted, homes, strict=True) if home == part]
        for part in range(len(volumes.parts))
    ]
  pool = concurrent.futures.ThreadPoolExecutor(threads)
  try:
    for group in groups:
      yield from _in_order(volumes, batch_size, group, pool)
  finally:
    pool.shutdown(cancel_futures=True)


def _in_order(volumes, batch_size, wanted, pool) -> Iterator[Batch]:
  ahead: collections.deque[concurrent.futures.Future] = collections.deque()
  later, buffers = iter(wanted), Buffers(_BUFFERS)
  waiting: list[Batch] = []
  for _ in wanted:
    # The next batch is read while the caller has this one.
    while len(ahead) < 2 * batch_size and (index := next(later, None)) is not None:
      ahead.append(pool.submit(volumes.element, index))
    element = ahead.popleft().result()
    if element is not None:
      waiting.append(element)
    if len(waiting) == batch_size:
      yield stack(waiting, buffers)
      waiting = []
  if waiting:
    filling = [padding(waiting[0])] * (batch_size - len(waiting))
    yield stack([*waiting, *filling], buffers)


class _Stream:
  """What Grain draws from: number on this host -> element, or None for a bad file."""

  def __init__(
      self,
      volumes: Volumes | Mixture,
      parts: Sequence[tuple[int, int]],
      shares: Sequence[Any],
      *,
      seeds: Sequence[int],
      batch_size: int,
      shard: tuple[int, int],
  ):
    self._volumes = volumes
    self._starts = [start for start, _ in parts]
    self._orders = [Order(rows, seed) for (_, rows), seed in zip(parts, seeds)]
    self._shares = shares
    self._batch, (self._host, self._hosts) = batch_size, shard
    self.rows = sum(rows for _, rows in parts)

  def __len__(self) -> int:
    return 2**62

  def __getitem__(self, number: int) -> Batch | None:
    return self._volumes.element(self.row(self.place(int(number))))

  def __repr__(self) -> str:
    return f"_Stream({self._volumes.name}, {self.rows} rows)"

  def place(self, number: int) -> int:
    """Returns the place in the global batches: a host has rows together in each."""
    batch, row = divmod(number, self._batch)
    return (batch * self._hosts + self._host) * self._batch + row

  def row(self, place: int) -> int:
    """Returns the row of the split at a place of the global batches."""
    part, draw = mixture_lib.draw(place, self._shares)
    return self._starts[part] + self._orders[part][draw]


def _streams(
    volumes: Volumes | Mixture, batch_size: int, seed: int, shard: tuple[int, int]
) -> list[_Stream]:
  options = dict(batch_size=batch_size, shard=shard)
  if not isinstance(volumes, Mixture) or volumes.mixture == "concatenate":
    return [_Stream(volumes, [(0, len(volumes))], (1,), seeds=[seed], **options)]
  starts = [int(start) for start in volumes.starts[:-1]]
  parts = list(zip(starts, map(len, volumes.parts), strict=True))
  seeds = [mixture_lib.seed_of(seed, n) for n in range(len(parts))]
  if volumes.mixture == "weighted":
    return [_Stream(volumes, parts, volumes.shares, seeds=seeds, **options)]
  return [
      _Stream(volumes, [part], (1,), seeds=[own], **options)
      for part, own in zip(parts, seeds, strict=True)
  ]


def _alternates(volumes: Volumes | Mixture) -> bool:
  return isinstance(volumes, Mixture) and volumes.mixture == "alternate"


def _rule(
    volumes: Volumes | Mixture, batch_size: int, seed: int, hosts: int
) -> dict[str, Any]:
  """Returns all that decides which rows a batch holds, as JSON."""
  digest = hashlib.sha256()
  for row in volumes.rows:
    digest.update(f"{row.source}\0{row.participant}\0{row.id}\n".encode())
  return {
      "rows": f"{len(volumes)} ({digest.hexdigest()[:16]})", "seed": seed,
      "batch_size": batch_size * hosts, **volumes_lib.facts(volumes),
  }
