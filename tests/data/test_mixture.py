"""Claims of data/mixture.py and of several sources behind one iterator."""

import collections
from fractions import Fraction
import json
import pickle

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from vjepa_jax.data import mixture, pipeline
from vjepa_jax.data.manifest import Row
from vjepa_jax.data.pipeline import (
    Mixture,
    Volumes,
    check_hosts,
    eval_batches,
    host_share,
    open_data,
    train_iterator,
)
from vjepa_jax.data.record import DataError, ReadError, Record

WEIGHTS = st.lists(
    st.sampled_from([0.1, 0.335, 0.565, 1, 2, 7, 1 / 3]), min_size=1, max_size=6
)
WHOLE = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def shares_of(weights):
  return list(mixture.shares_of({str(n): w for n, w in enumerate(weights)}).values())


class Painted:
  """Canvases whose every voxel is the number of the row."""

  def __init__(self, shape, missing=()):
    self._shape, self._missing = shape, missing

  def read(self, row):
    number = int(row.path)
    if number in self._missing:
      raise ReadError(row.path, "truncated", "cut")
    return Record(np.full(self._shape, number, np.uint8), np.ones(4), row.path)


def one(rows, *, source="", shape=(1, 1, 2, 2, 1), missing=()):
  table = [Row(str(n), f"p{n}", source=source) for n in range(rows)]
  return Volumes("train", table, (), Painted(shape, missing))


def mixed(sizes, how="weighted", weights=None, shapes=None, missing=()):
  parts = {
      f"s{n}": one(
          size, source=f"s{n}", missing=missing if n == 0 else (),
          shape=shapes[n] if shapes else (1, 1, 2, 2, 1),
      ) for n, size in enumerate(sizes)
  }
  weights = weights and dict(zip(parts, weights, strict=True))
  return Mixture("train", parts, mixture=how, weights=weights)


def take(iterator, batches):
  return [next(iterator) for _ in range(batches)]


def drawn(volumes, batches, *, batch_size=4, seed=0, threads=0, **options):
  iterator = train_iterator(
      volumes, batch_size=batch_size, seed=seed, threads=threads, **options
  )
  return [batch["index"].tolist() for batch in take(iterator, batches)]


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, places=st.integers(1, 400))
def test_after_any_number_of_places_each_source_has_had_its_share(weights, places):
  shares, counts = shares_of(weights), collections.Counter()
  for place in range(places):
    source, before = mixture.draw(place, shares)
    assert before == counts[source]
    counts[source] += 1
  for source, share in enumerate(shares):
    assert abs(counts[source] - places * share) <= Fraction(max(len(shares) - 1, 1), 2)


@settings(max_examples=40, deadline=None)
@given(whole=WHOLE, rounds=st.integers(1, 6))
def test_over_a_common_denominator_the_proportions_are_exact(whole, rounds):
  shares = shares_of(whole)
  places = rounds * sum(whole)
  found = collections.Counter(mixture.draw(p, shares)[0] for p in range(places))
  assert [found[n] for n in range(len(whole))] == [rounds * w for w in whole]


def test_two_equal_sources_take_turns_and_a_decimal_is_what_it_says():
  assert [mixture.draw(p, shares_of([1, 1]))[0] for p in range(6)] == [0, 1] * 3
  assert shares_of([0.7, 0.3]) == [Fraction(7, 10), Fraction(3, 10)]


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": -1.0}, {"a": float("nan")}])
def test_a_weight_that_is_no_positive_number_is_refused(weights):
  with pytest.raises(ValueError, match="positive"):
    mixture.shares_of(weights)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 30), st.just(4100)), seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_each_row_comes_once_an_epoch_of_its_source(rows, seed, epoch):
  order = mixture.Order(rows, seed)
  found = [order[epoch * rows + n] for n in range(rows)]
  assert sorted(found) == list(range(rows))
  again = pickle.loads(pickle.dumps(order))
  some = range(0, rows, max(1, rows // 7))
  assert [again[epoch * rows + n] for n in some] == [found[n] for n in some]


def test_every_epoch_and_every_source_has_an_order_of_its_own():
  orders = [mixture.Order(50, mixture.seed_of(3, source)) for source in range(3)]
  found = {
      tuple(order[epoch * 50 + n] for n in range(50))
      for order in orders for epoch in range(3)
  }
  assert len(found) == 9


def test_rows_of_a_batch_follow_the_weights_and_each_source_its_own_epochs():
  volumes = mixed([6, 40], weights=[1, 3])
  batches = drawn(volumes, 24)
  assert all(sum(i < 6 for i in batch) == 1 for batch in batches)
  first = [i for batch in batches for i in batch if i < 6]
  assert [sorted(first[n : n + 6]) for n in range(0, 24, 6)] == [list(range(6))] * 4
  second = [i for batch in batches for i in batch if i >= 6]
  assert sorted(second[:40]) == list(range(6, 46))


def test_a_batch_says_the_source_of_each_row():
  volumes = mixed([5, 5], weights=[1, 1])
  for batch in take(train_iterator(volumes, batch_size=4, seed=1), 5):
    assert batch["source"].dtype == np.int32
    assert batch["source"].tolist() == [int(i >= 5) for i in batch["index"]]
    painted = batch["volume"].reshape(4, -1)[:, 0]
    assert painted.tolist() == [i % 5 for i in batch["index"]]


def test_alternating_sources_keep_whole_batches_and_their_own_shapes():
  shapes = [(1, 1, 2, 2, 1), (1, 1, 2, 2, 3)]
  volumes = mixed([7, 9], "alternate", [1, 2], shapes, missing=(2, 5))
  batches = take(train_iterator(volumes, batch_size=4, seed=0), 60)
  sources = [set(batch["source"].tolist()) for batch in batches]
  assert sources == [{mixture.draw(n, shares_of([1, 2]))[0]} for n in range(60)]
  assert collections.Counter(map(min, sources)) == {0: 20, 1: 40}
  for batch, source in zip(batches, map(min, sources), strict=True):
    assert batch["volume"].shape == (4, *shapes[source])
  first = [i for b in batches for i in b["index"].tolist() if i < 7]
  assert sorted(first[:5]) == [0, 1, 3, 4, 6]  # two files of it are bad


def test_concatenated_sources_give_every_row_once_an_epoch():
  flat = sum(drawn(mixed([3, 9], "concatenate"), 9), [])
  assert [sorted(flat[n : n + 12]) for n in (0, 12, 24)] == [list(range(12))] * 3


KINDS = [
    lambda: one(31), lambda: mixed([16, 27], weights=[0.3, 0.7]),
    lambda: mixed([26, 19], "alternate", [2, 1]), lambda: mixed([15, 18], "concatenate"),
]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("hosts", [2, 4])
def test_the_batches_of_all_hosts_are_row_for_row_those_of_one(make, hosts):
  volumes = make()
  whole = drawn(volumes, 8, batch_size=8, seed=5)
  parts = [
      drawn(volumes, 8, batch_size=8 // hosts, seed=5, shard=(host, hosts), threads=host)
      for host in range(hosts)
  ]
  joined = [sum((part[n] for part in parts), []) for n in range(8)]
  assert joined == whole


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("missing", [(), (1, 3)])
def test_a_run_resumed_at_any_step_goes_on_with_the_same_batches(make, missing):
  def fresh():
    volumes = make()
    part = volumes.parts[0] if isinstance(volumes, Mixture) else volumes
    part._canvases = Painted((1, 1, 2, 2, 1), missing)
    return train_iterator(volumes, batch_size=3, seed=2, threads=2)

  first, states, batches = fresh(), [], []
  for _ in range(12):
    states.append(json.dumps(first.get_state()))
    batches.append(next(first))
  for step in range(12):
    again = fresh()
    again.set_state(json.loads(states[step]))
    for want in batches[step : step + 3]:
      found = next(again)
      for key in want:
        np.testing.assert_array_equal(found[key], want[key])


@pytest.mark.parametrize("make", KINDS[1:3])
@pytest.mark.parametrize("before,after", [(1, 4), (4, 2)])
def test_another_number_of_hosts_goes_on_with_the_same_global_batches(
    make, before, after
):
  def iterators(hosts):
    return [
        train_iterator(
            make(), batch_size=8 // hosts, seed=5, threads=0, shard=(host, hosts)
        )
        for host in range(hosts)
    ]

  first, second = iterators(before), iterators(after)
  for iterator in first:
    take(iterator, 5)
  for iterator in second:
    iterator.set_state(json.loads(json.dumps(first[0].get_state())))
  assert second[0].get_state()["batches"] == first[0].get_state()["batches"]
  joined = lambda parts: [
      sum((next(part)["index"].tolist() for part in parts), []) for _ in range(6)
  ]
  assert joined(second) == joined(first) == drawn(make(), 11, batch_size=8, seed=5)[5:]


@pytest.mark.parametrize("change,named", [
    (dict(seed=3), "seed was 2, is 3"), (dict(batch_size=4), "batch_size was 3, is 4"),
    (dict(shard=(0, 2)), "batch_size was 3, is 6"),
])
def test_a_place_of_another_order_is_refused_by_what_differs(change, named):
  options = dict(batch_size=3, seed=2)
  state = train_iterator(one(9), **options).get_state()
  with pytest.raises(DataError, match=named):
    train_iterator(one(9), **{**options, **change}).set_state(state)


def test_a_place_of_other_rows_or_another_mixture_is_refused():
  options = dict(batch_size=3, seed=2)
  state = train_iterator(mixed([4, 5], weights=[1, 1]), **options).get_state()
  for other, named in (
      (mixed([4, 6], weights=[1, 1]), "rows was 9"),
      (mixed([4, 5], weights=[1, 2]), "shares was"),
      (mixed([4, 5], "concatenate"), "mixture was weighted"), (one(9), "mixture"),
  ):
    with pytest.raises(DataError, match=named):
      train_iterator(other, **options).set_state(state)


def test_a_place_of_another_version_is_refused():
  with pytest.raises(DataError, match="another version"):
    train_iterator(one(3), batch_size=1, seed=0).set_state({"next_index": 3})


def shares(volumes, hosts):
  return [
      host_share(volumes, batch_size=4, seed=0, shard=(host, hosts))
      for host in range(hosts)
  ]


@pytest.mark.parametrize("make", KINDS)
def test_hosts_that_part_the_data_pass_the_start_up_check(make):
  check_hosts(shares(make(), 4))


def test_hosts_that_all_think_they_are_the_first_are_found_out():
  volumes = one(40)
  same = [host_share(volumes, batch_size=4, seed=0, shard=(0, 4)) for _ in range(4)]
  with pytest.raises(DataError, match=r"\[0, 0, 0, 0\].*read the same data"):
    check_hosts(same)
  alone = [host_share(volumes, batch_size=4, seed=0, shard=(0, 1)) for _ in range(4)]
  with pytest.raises(DataError, match="one of 1 hosts; there are 4"):
    check_hosts(alone)
  # The right number, and yet another's draws.
  stolen = shares(volumes, 2)
  stolen[1] = stolen[1]._replace(draws=stolen[0].draws)
  with pytest.raises(DataError, match="draw.*0 and 1"):
    check_hosts(stolen)


def test_hosts_with_other_rows_or_another_seed_are_found_out():
  volumes = one(40)
  mine = host_share(volumes, batch_size=4, seed=0, shard=(0, 2))
  for other in (
      host_share(volumes, batch_size=4, seed=1, shard=(1, 2)),
      host_share(one(39), batch_size=4, seed=0, shard=(1, 2)),
  ):
    with pytest.raises(DataError, match="host.s. 1 open other rows"):
      check_hosts([mine, other])


def test_the_iterator_checks_what_the_hosts_exchange():
  volumes, told = one(40), []

  def exchange(mine):
    told.append(mine)
    return [mine, mine]

  options = dict(batch_size=4, seed=0, exchange=exchange)
  with pytest.raises(DataError, match="read the same data"):
    train_iterator(volumes, shard=(0, 2), **options)
  train_iterator(volumes, shard=(0, 1), **options)
  assert len(told) == 1  # one host has none to ask


def test_evaluation_of_alternating_sources_pads_each_apart():
  shapes = [(1, 1, 2, 2, 1), (1, 1, 2, 2, 3)]
  volumes = mixed([5, 3], "alternate", shapes=shapes)
  batches = list(eval_batches(volumes, 2))
  assert [b["volume"].shape[-1] for b in batches] == [1, 1, 1, 3, 3]
  flat = np.concatenate([b["index"] for b in batches]).tolist()
  assert flat == [0, 1, 2, 3, 4, -1, 5, 6, 7, -1]
  some = list(eval_batches(volumes, 2, indices=[6, 1, 7, 0]))
  assert [b["index"].tolist() for b in some] == [[1, 0], [6, 7]]
  together = list(eval_batches(mixed([2, 2]), 3, indices=[3, 0, 2, 1]))
  assert [b["index"].tolist() for b in together] == [[3, 0, 2], [1, -1, -1]]


@pytest.fixture
def two_tables(tmp_path):
  """Writes an MR and a CT table of the same people; returns their sources."""
  rng = np.random.default_rng(0)
  sources = {}
  for name, channels, count in (("mri", 1, 8), ("ct", 3, 6)):
    folder = tmp_path / name
    folder.mkdir()
    rows = ["participant_id\tfilepath\tmodality\tdisease\tpart"]
    for person in range(count):
      volume = rng.integers(0, 255, (4, 8, 8, channels), np.uint8)
      np.save(folder / f"{person}.npy", volume)
      part = "train" if person < count - 2 else "validation"
      rows.append(f"{person}\t{person}.npy\t{name.upper()}\t{'ab'[person % 2]}\t{part}")
    (folder / "manifest.tsv").write_text("\n".join(rows) + "\n")
    sources[name] = dict(manifest=str(folder / "manifest.tsv"), reader=dict(axes="ZYXC"))
  return sources


OPTIONS = dict(canvas=(4, 8, 8), stratify=("modality",), label="disease")
HALVES = {"train": 0.6, "validation": 0.4}


def test_several_tables_open_as_one_set_with_counts_by_source(two_tables):
  two_tables["ct"]["weight"] = 3
  data = open_data(
      sources=two_tables, mixture="alternate", splits=HALVES, **OPTIONS
  )
  report = data.report
  assert report["mixture"] == "alternate" and report["source"] == {"mri": 8, "ct": 6}
  assert report["modality"] == {"MRI": 8, "CT": 6}
  assert report["sources"]["ct"]["share"] == 0.75
  counts = {k: v["records"] for k, v in report["sources"].items()}
  assert {k: sum(v.values()) for k, v in counts.items()} == {"mri": 8, "ct": 6}
  assert report["splits"]["train"]["source"]["mri"] == counts["mri"]["train"]
  batches = take(train_iterator(data.splits["train"], batch_size=2, seed=0), 8)
  assert [b["volume"].shape[-1] for b in batches].count(3) == 6
  assert data.labels == ("a", "b")


def test_a_person_of_two_sources_is_in_one_split_of_both(two_tables):
  for seed in range(5):
    data = open_data(
        sources=two_tables, mixture="alternate", splits=HALVES, seed=seed, **OPTIONS
    )
    people = [{r.participant for r in v.rows} for v in data.splits.values()]
    assert not people[0] & people[1]
  # By a column it is refused where it would be in two: 4 and 5 are.
  with pytest.raises(DataError, match="4 in train and validation"):
    open_data(sources=two_tables, mixture="alternate", splits="part", **OPTIONS)


def test_sources_that_do_not_stack_need_batches_of_their_own(two_tables):
  with pytest.raises(DataError, match="mixture=\"alternate\""):
    open_data(sources=two_tables, mixture="weighted", splits=HALVES, **OPTIONS)


@pytest.mark.parametrize("change,said", [
    (dict(mixture="weighed"), "mixture is 'weighed'"),
    (dict(manifest="m.tsv"), "one or the other"),
    (dict(sources={"a": {"weight": 1}}), "needs a manifest"),
    (dict(sources={"a": {"manifest": "m.tsv", "wieght": 1}}), "unknown .*wieght"),
    (dict(sources={"a": {"manifest": "m.tsv", "weight": 0}}), "positive"),
    (dict(sources={}), "one or the other"),
])
def test_sources_that_cannot_be_meant_are_refused(two_tables, change, said):
  options = {**dict(manifest=None, sources=two_tables, splits=HALVES), **change}
  with pytest.raises(ValueError, match=said):
    open_data(options.pop("manifest"), **options, **OPTIONS)


def test_one_recording_in_two_sources_is_refused(two_tables):
  two_tables["ct"] = two_tables["mri"]
  with pytest.raises(DataError, match="in the sources mri and ct"):
    open_data(sources=two_tables, splits=HALVES, **OPTIONS)


def test_shards_of_each_source_are_kept_and_serve_the_same_batches(two_tables, tmp_path):
  options = dict(
      sources=two_tables, mixture="alternate", splits=HALVES, workers=0, threads=1,
      **OPTIONS,
  )
  plain = open_data(**options)
  kept = open_data(cache=str(tmp_path / "shards"), **options)
  again = open_data(cache=str(tmp_path / "shards"), **options)
  assert len(list((tmp_path / "shards").iterdir())) == 2
  for name in plain.splits:
    found = [
        take(train_iterator(data.splits[name], batch_size=2, seed=1), 6)
        for data in (plain, kept, again)
    ]
    for batches in zip(*found, strict=True):
      for other in batches[1:]:
        np.testing.assert_array_equal(other["volume"], batches[0]["volume"])
        assert other["index"].tolist() == batches[0]["index"].tolist()


def test_plan_names_sources_splits_and_transforms_without_reading(two_tables, tmp_path):
  for path in tmp_path.rglob("*.npy"):
    path.unlink()
  planned = pipeline.plan(sources=two_tables, splits=HALVES, **OPTIONS)
  assert [source.name for source in planned] == ["mri", "ct"]
  assert [sum(map(len, s.parts.values())) for s in planned] == [8, 6]
  assert dict(planned[1].transform.reader) == {"axes": "ZYXC"}
