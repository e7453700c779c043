"""Claims of data/pipeline.py on small corpora of true DICOM files."""

import ast
import collections
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
from pydicom.sequence import Sequence
import pytest

from tests.data import fatal
from vjepa_jax.data import pipeline, pool, storage
from vjepa_jax.data.buffers import Buffers
from vjepa_jax.data.manifest import Row
from vjepa_jax.data.pipeline import eval_batches, open_data, train_iterator
from vjepa_jax.data.record import DataError, ReadError

CANVAS = (4, 16, 16)
FRACTIONS = {"train": 0.7, "validation": 0.3}
KEYS = {"volume", "mean", "std", "spacing", "index", "label", "source", "_mask"}


def opened(manifest, **options):
  return open_data(
      manifest, **{
          "canvas": CANVAS, "splits": "part", "label": "pathology",
          "modalities": ("OPT",), **options,
      }
  )


def indices(iterator, batches):
  return [next(iterator)["index"].tolist() for _ in range(batches)]


def test_a_batch_holds_what_the_contract_names(write_corpus):
  data = opened(write_corpus())
  batch = next(train_iterator(data.splits["train"], batch_size=3, seed=0))
  assert set(batch) == KEYS
  assert batch["volume"].shape == (3, 1, *CANVAS, 1)
  assert batch["volume"].dtype == np.uint8
  for key, dtype, shape in (
      ("mean", np.float32, (3,)), ("std", np.float32, (3,)),
      ("spacing", np.float32, (3, 4)), ("index", np.int32, (3,)),
      ("label", np.int32, (3,)), ("source", np.int32, (3,)), ("_mask", np.float32, (3,)),
  ):
    assert batch[key].dtype == dtype and batch[key].shape == shape
  for row in range(3):
    record = data.splits["train"][int(batch["index"][row])]
    np.testing.assert_array_equal(batch["volume"][row], record.volume)
    assert batch["mean"][row] == np.float32(record.volume.mean(dtype=np.float64))
    std = record.volume.std(dtype=np.float64)
    assert batch["std"][row] == pytest.approx(std, rel=1e-6)
    assert data.labels[batch["label"][row]] == data.splits["train"].rows[
        int(batch["index"][row])].label
  np.testing.assert_allclose(
      batch["spacing"][0], [np.nan, 0.1, 0.004 * 2, 0.012 * 40 / 16], rtol=1e-5
  )


def test_a_record_says_whose_and_what_it_is(write_corpus):
  record = opened(write_corpus()).splits["train"][1]
  assert record.subject == "1000" and record.label == 1
  assert record.meta["device"] == "topcon_triton" and record.meta["laterality"] == "R"
  assert record.meta["site"] == "UW"


def test_the_geometry_seen_in_a_file_wins_over_the_manifest_s(
    write_corpus, dicom, tmp_path
):
  manifest = write_corpus()
  turned = [
      dicom.item(OphthalmicFrameLocationSequence={"ReferenceCoordinates": c})
      for c in ([50, 10, 50, 90], [10, 50, 90, 50], [20, 20, 80, 80], [80, 20, 20, 80])
  ]
  dataset = dicom.dataset(
      dicom.volume((4, 32, 40)), PerFrameFunctionalGroupsSequence=Sequence(turned)
  )
  path = tmp_path / "oct/heidelberg_spectralis/1000/L.dcm"
  path.write_bytes(dicom.to_bytes(dataset))
  train = opened(manifest).splits["train"]
  assert [train[n].meta["geometry"] for n in range(2)] == ["radial", "raster"]


def test_the_report_counts_what_is_there_and_what_was_lost(write_corpus):
  manifest = write_corpus(people=12, broken={3: "truncated"})
  report = opened(manifest, exclude={"participant": ["1000"]}).report
  assert report["records"] == 21 and report["read"] == 22
  assert report["quarantine"] == {"truncated": 1}
  assert report["quarantine_device"] == {"topcon_triton": 1}
  assert report["bad_fraction"] == pytest.approx(1 / 22)
  assert report["lost"] == {"excluded_participant": 2}
  assert report["device"] == {"heidelberg_spectralis": 11, "topcon_triton": 10}
  assert report["site"] == {"UAB": 11, "UW": 10}
  assert report["splits"]["validation"]["records"] == 2
  assert report["splits"]["train"]["label"] == {"drusen": 10, "normal": 9}
  assert report["spacing_source"] == {"top_level+between_slices": 21}
  assert json.loads(json.dumps(report)) == report


HOWS = ["missing_file", "truncated", "not_dicom", "no_pixel_data", "wrong_modality",
        "constant"]


@pytest.mark.parametrize("validate", ["read", "lazy"])
@pytest.mark.parametrize("how", HOWS)
def test_a_bad_file_is_quarantined_by_reason_and_never_replaced(
    write_corpus, tmp_path, how, validate
):
  manifest = write_corpus(broken={3: how})
  log = tmp_path / "out" / "quarantine.tsv"
  data = opened(
      manifest, validate=validate, max_bad_fraction=0.2, quarantine=str(log)
  )
  train = data.splits["train"]
  iterator = train_iterator(train, batch_size=3, seed=0)
  seen = collections.Counter()
  for _ in range(9):
    batch = next(iterator)
    assert batch["volume"].shape[0] == 3 and (batch["_mask"] == 1).all()
    assert batch["volume"].reshape(3, -1).std(axis=1).min() > 0
    seen.update(train.rows[i].path for i in batch["index"])
  assert len(seen) == 9 and max(seen.values()) - min(seen.values()) <= 1
  bad, = data.quarantine
  assert bad.reason == how and bad.path.endswith("1001/R.dcm")
  assert data.report["quarantine"] == {how: 1}
  lines = log.read_text().splitlines()
  assert lines[0] == "path\treason\tdetail"
  assert [line.split("\t")[:2] for line in lines[1:]] == [[bad.path, how]]


def test_a_volume_smaller_than_a_patch_is_a_named_quarantine_entry(write_corpus):
  manifest = write_corpus()
  with pytest.raises(DataError, match=r"too_small \(first: .*Y=32 < 33"):
    opened(manifest, min_size=(1, 33, 16))


def test_above_max_bad_fraction_the_run_stops_with_reasons_and_first_paths(
    write_corpus, tmp_path
):
  broken = {1: "truncated", 2: "truncated", 5: "no_pixel_data"}
  manifest = write_corpus(broken=broken)
  opened(manifest, max_bad_fraction=0.25)
  log = tmp_path / "q.tsv"
  with pytest.raises(DataError) as caught:
    opened(manifest, max_bad_fraction=0.24, quarantine=str(log))
  message = str(caught.value)
  assert "2 truncated (first: " in message and "1000/R.dcm" in message
  assert "1 no_pixel_data" in message and "max_bad_fraction 0.24" in message
  assert len(log.read_text().splitlines()) == 4


@pytest.mark.parametrize("validate", ["read", "lazy"])
def test_a_device_that_loses_too_much_stops_the_run_though_the_mean_is_small(
    write_corpus, validate
):
  # Files of odd number are the Triton's: 5 of its 20, 5 of 40 in all.
  manifest = write_corpus(people=20, broken=dict.fromkeys(range(1, 11, 2), "truncated"))
  options = dict(validate=validate, splits=FRACTIONS)
  with pytest.raises(DataError, match="5 of the 20 of topcon_triton.* 5 truncated"):
    data = opened(manifest, max_bad_fraction=0.2, **options)
    for volumes in data.splits.values():
      list(eval_batches(volumes, 4))
  opened(manifest, max_bad_fraction=0.25, **options)


def test_bad_files_are_found_in_the_order_of_the_manifest_whatever_the_threads(
    write_corpus, tmp_path
):
  # The first bad file takes longest to tell: it is large, the others are empty.
  manifest = write_corpus(people=10, broken=dict.fromkeys((0, 1, 3, 8), "truncated"))
  first = tmp_path / "oct/heidelberg_spectralis/1000/L.dcm"
  first.write_bytes(b"\x93NUMPY" + bytes(30_000_000))
  for name in ("topcon_triton/1000/R.dcm", "topcon_triton/1001/R.dcm"):
    (tmp_path / "oct" / name).write_bytes(b"")
  for _ in range(5):
    data = opened(manifest, threads=4, max_bad_fraction=0.2)
    assert [bad.path[-10:] for bad in data.quarantine] == [
        "1000/L.dcm", "1000/R.dcm", "1001/R.dcm", "1004/L.dcm"
    ]


def test_bad_files_met_while_training_stop_it_above_the_fraction(write_corpus):
  broken = {n: "truncated" for n in range(0, 16, 2)}
  manifest = write_corpus(people=15, broken=broken)
  data = opened(manifest, validate="lazy", max_bad_fraction=0.1)
  iterator = train_iterator(data.splits["train"], batch_size=2, seed=0)
  with pytest.raises(DataError, match="truncated"):
    for _ in range(100):
      next(iterator)
  tried = data.report["read"]
  assert 20 <= tried <= 28


def test_a_split_that_is_all_bad_stops_instead_of_waiting_for_ever(write_corpus):
  manifest = write_corpus(people=3, broken=dict.fromkeys(range(4), "truncated"))
  data = opened(manifest, validate="lazy", max_bad_fraction=1.0)
  with pytest.raises(DataError):
    next(train_iterator(data.splits["train"], batch_size=2, seed=0))


def test_a_file_found_bad_is_read_and_logged_once(write_corpus, caplog):
  manifest = write_corpus(broken={3: "truncated"})
  data = opened(manifest, validate="lazy", max_bad_fraction=0.2, cache="none")
  with caplog.at_level("WARNING", logger="absl"):
    indices(train_iterator(data.splits["train"], batch_size=3, seed=0), 12)
  assert sum("1001/R.dcm" in r.getMessage() for r in caplog.records) == 1


def test_a_resumed_lazy_run_keeps_what_was_quarantined_before(write_corpus, tmp_path):
  manifest = write_corpus(broken={3: "truncated"})
  log = tmp_path / "q.tsv"
  log.write_text("path\treason\tdetail\nold.dcm\tmissing_file\tgone\n")
  data = opened(manifest, validate="lazy", max_bad_fraction=0.2, quarantine=str(log))
  indices(train_iterator(data.splits["train"], batch_size=3, seed=0), 6)
  assert [line.split("\t")[0][-8:] for line in log.read_text().splitlines()[1:]] == [
      "old.dcm", "01/R.dcm"
  ]


def test_an_epoch_holds_each_row_once_and_the_next_another_order(write_corpus):
  train = opened(write_corpus()).splits["train"]
  flat = sum(indices(train_iterator(train, batch_size=3, seed=0), 10), [])
  epochs = [flat[n : n + 10] for n in (0, 10, 20)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_depends_on_the_seed_and_not_on_threads(write_corpus):
  train = opened(write_corpus()).splits["train"]
  orders = {
      (seed, threads): str(indices(
          train_iterator(train, batch_size=3, seed=seed, threads=threads), 8))
      for seed in (0, 1) for threads in (0, 1, 4)
  }
  assert len({orders[0, t] for t in (0, 1, 4)}) == 1
  assert orders[0, 0] != orders[1, 0]


@pytest.mark.parametrize("broken", [{}, {3: "truncated"}])
def test_a_restored_iterator_gives_the_batches_the_first_would_have(
    write_corpus, broken
):
  manifest = write_corpus(broken=broken)

  def fresh(threads):
    data = opened(manifest, validate="lazy", max_bad_fraction=0.2)
    return train_iterator(data.splits["train"], batch_size=3, seed=5, threads=threads)

  first = fresh(3)
  indices(first, 4)
  state = json.loads(json.dumps(first.get_state()))
  want = [next(first) for _ in range(7)]
  second = fresh(2)
  second.set_state(state)
  for a in want:
    b = next(second)
    for key in KEYS:
      np.testing.assert_array_equal(a[key], b[key])


def test_hosts_are_disjoint_and_make_the_global_batches_of_one(write_corpus):
  train = opened(write_corpus(people=7)).splits["train"]
  one = indices(train_iterator(train, batch_size=4, seed=2), 9)
  hosts = [
      indices(train_iterator(train, batch_size=2, seed=2, shard=(h, 2)), 9)
      for h in range(2)
  ]
  for whole, a, b in zip(one, *hosts, strict=True):
    assert sorted(whole) == sorted(a + b)
  pipeline.check_disjoint({0: hosts[0][0], 1: hosts[1][0]}, "row")
  with pytest.raises(DataError, match="row.*0 and 1"):
    pipeline.check_disjoint({0: hosts[0][0], 1: hosts[0][0]}, "row")


def test_eval_batches_keep_order_and_size_and_mask_the_filling(write_corpus):
  train = opened(write_corpus()).splits["train"]
  batches = list(eval_batches(train, 4))
  assert [b["volume"].shape[0] for b in batches] == [4, 4, 4]
  flat = np.concatenate([b["index"] for b in batches])
  assert flat.tolist() == [*range(10), -1, -1]
  last = batches[-1]
  assert last["_mask"].tolist() == [1, 1, 0, 0]
  assert last["label"][2:].tolist() == [-1, -1]
  normalised = (last["volume"] - last["mean"].reshape(-1, 1, 1, 1, 1, 1)) / last[
      "std"].reshape(-1, 1, 1, 1, 1, 1)
  assert np.isfinite(normalised).all()
  np.testing.assert_array_equal(last["spacing"][2], last["spacing"][0])
  some = list(eval_batches(train, 2, indices=[7, 1, 4]))
  assert np.concatenate([b["index"] for b in some]).tolist() == [7, 1, 4, -1]


def test_eval_batches_pass_over_a_file_found_bad(write_corpus):
  data = opened(
      write_corpus(broken={3: "truncated"}), validate="lazy", max_bad_fraction=0.2
  )
  batches = list(eval_batches(data.splits["train"], 4))
  flat = np.concatenate([b["index"] for b in batches])
  assert flat.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, -1, -1, -1]
  assert [b["volume"].shape[0] for b in batches] == [4, 4, 4]


def test_volumes_pickle_and_read_for_themselves(write_corpus):
  # Twelve canvases of 32 KiB are in memory, and stay there.
  train = opened(write_corpus(), canvas=(8, 64, 64)).splits["train"]
  sent = pickle.dumps(train)
  assert len(sent) < 20_000
  np.testing.assert_array_equal(pickle.loads(sent)[2].volume, train[2].volume)


@pytest.mark.parametrize("cache, cache_bytes, kept", [
    ("memory", 1 << 20, True), ("memory", 0, False), ("none", 1 << 20, False),
])
def test_canvases_are_kept_in_memory_up_to_the_budget(
    write_corpus, tmp_path, cache, cache_bytes, kept
):
  data = opened(
      write_corpus(), cache=cache, cache_bytes=cache_bytes, max_bad_fraction=0.2
  )
  train = data.splits["train"]
  before = train[0].volume.copy()
  for path in tmp_path.rglob("*.dcm"):
    path.unlink()
  if kept:
    np.testing.assert_array_equal(train[0].volume, before)
  else:
    assert train.element(0) is None
    assert data.report["quarantine"] == {"missing_file": 1}
    assert data.report["bad_fraction"] == pytest.approx(1 / 12)


def test_patients_of_the_splits_are_disjoint_and_labels_common(write_corpus):
  data = opened(write_corpus(people=12), splits=FRACTIONS)
  homes = {k: {r.participant for r in v.rows} for k, v in data.splits.items()}
  assert not homes["train"] & homes["validation"]
  assert sum(len(v) for v in data.splits.values()) == 24
  assert data.labels == ("drusen", "normal")
  assert {v.labels for v in data.splits.values()} == {data.labels}


def test_max_records_takes_the_first_rows_and_says_so(write_corpus):
  data = opened(write_corpus(), max_records=4, splits={"train": 0.5, "test": 0.5})
  assert data.report["records"] == 4 and data.report["lost"] == {"max_records": 8}
  rows = [r for v in data.splits.values() for r in v.rows]
  assert {r.participant for r in rows} == {"1000", "1001"}


def test_train_participants_draws_people_of_the_training_split_alone(write_corpus):
  options = dict(splits={"train": 0.7, "test": 0.3})
  all_ = opened(write_corpus(), **options)
  people = lambda data, split: {r.participant for r in data.splits[split].rows}
  fewer, few = (
      opened(write_corpus(), train_participants=n, **options) for n in (2, 1)
  )
  assert people(few, "train") < people(fewer, "train") < people(all_, "train")
  assert len(people(few, "train")) == 1
  assert people(few, "test") == people(all_, "test")
  gone = len(all_.splits["train"].rows) - len(few.splits["train"].rows)
  assert few.report["lost"] == {"train_participants": gone}
  other = opened(write_corpus(), train_participants=1, seed=1, splits="part")
  assert people(other, "train") <= people(opened(write_corpus()), "train")


@pytest.mark.parametrize("count", [0, 99])
def test_more_training_participants_than_there_are_is_an_error(write_corpus, count):
  with pytest.raises(DataError, match=f"train_participants is {count}, must be from 1"):
    opened(write_corpus(), train_participants=count)


def test_train_participants_without_such_a_split_is_an_error(write_corpus):
  with pytest.raises(DataError, match="the splits are fit, test"):
    opened(write_corpus(), train_participants=1, splits={"fit": 0.7, "test": 0.3})


def test_volumes_that_do_not_stack_are_an_error_that_names_the_remedy(
    write_corpus, dicom, tmp_path
):
  manifest = write_corpus()
  other = dicom.to_bytes(dicom.dataset(dicom.volume((4, 32, 40), np.uint16)))
  (tmp_path / "oct/topcon_triton/1002/R.dcm").write_bytes(other)
  with pytest.raises(DataError, match="uint8.*uint16.*dtype=\"uint8\""):
    opened(manifest, dtype="keep")
  opened(manifest, dtype="uint8")


def test_missing_spacing_is_nan_and_counted_and_stops_a_policy_that_needs_it(
    write_corpus, dicom, tmp_path
):
  manifest = write_corpus()
  text = (tmp_path / "manifest.tsv").read_text()
  (tmp_path / "manifest.tsv").write_text(
      text.replace("[0.004, 0.012]\t0.1", "Varies by frame\t")
  )
  path = tmp_path / "oct/topcon_triton/1002/R.dcm"
  path.write_bytes(dicom.to_bytes(dicom.dataset(dicom.volume((4, 32, 40)))))
  data = opened(manifest)
  assert data.report["spacing_source"]["missing"] == 1
  assert np.isnan(data.splits["train"][5].spacing).all()
  fov = opened(manifest, resample="fov", fov_mm=(0.4, 0.1, 0.4), max_bad_fraction=0.1)
  assert fov.report["quarantine"] == {"missing_spacing": 1}


def test_the_manifest_fills_a_spacing_that_the_file_lacks(
    write_corpus, dicom, tmp_path
):
  manifest = write_corpus()
  path = tmp_path / "oct/topcon_triton/1002/R.dcm"
  path.write_bytes(dicom.to_bytes(dicom.dataset(dicom.volume((4, 32, 40)))))
  assert opened(manifest).report["spacing_source"] == {
      "top_level+between_slices": 11, "manifest": 1
  }


def test_progress_is_told_of_every_file(write_corpus):
  told = []
  opened(write_corpus(), progress=lambda done, total: told.append((done, total)))
  assert told == [(n, 12) for n in range(1, 13)]


@pytest.mark.parametrize("options, words", [
    ({"validate": "maybe"}, "validate"), ({"max_bad_fraction": 2}, "max_bad_fraction"),
    ({"threads": 0}, "threads"), ({"max_records": 0}, "max_records"),
    ({"resample": "zoom"}, "policy"), ({"dtype": "int8"}, "dtype"),
    ({"colour": "blue"}, "colour"),
])
def test_an_option_out_of_range_is_named(write_corpus, options, words):
  with pytest.raises(ValueError, match=words):
    opened(write_corpus(people=2), **options)


def test_a_cache_folder_is_filled_at_once_also_where_reading_is_lazy(
    write_corpus, tmp_path
):
  manifest = write_corpus(people=3, broken={1: "truncated"})
  data = opened(
      manifest, validate="lazy", cache=str(tmp_path / "shards"), max_bad_fraction=0.5
  )
  assert [bad.reason for bad in data.quarantine] == ["truncated"]
  assert sum(map(len, data.splits.values())) == 5


def test_the_data_room_imports_no_jax():
  folder = pathlib.Path(pipeline.__file__).parent
  for path in folder.glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
      if isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
      assert not {n.split(".")[0] for n in names} & {"jax", "flax", "optax"}, path
      rooms = [n.split(".")[1] for n in names if n.startswith("vjepa_jax.")]
      assert set(rooms) <= {"data"}, path


def test_what_the_network_cannot_bring_stops_the_run_and_quarantines_nothing(
    write_corpus, bucket, tmp_path, monkeypatch
):
  monkeypatch.setenv("VJEPA_JAX_STORAGE_DEADLINE_S", "0.5")
  manifest = to_bucket(write_corpus(), tmp_path, bucket)
  bucket.fault("503", name="oct/topcon_triton/1002/R.dcm", share=1.0)
  for validate in ("read", "lazy"):
    log = tmp_path / f"{validate}.tsv"
    with pytest.raises(DataError, match="not the file's fault") as caught:
      data = opened(manifest, validate=validate, quarantine=str(log), cache="none")
      list(eval_batches(data.splits["train"], 2))
    assert "1002/R.dcm" in str(caught.value)
    assert caught.value.__cause__.reason == "unreachable"
    assert not log.exists() or len(log.read_text().splitlines()) == 1


def test_the_report_counts_what_had_to_be_tried_again(
    write_corpus, bucket, tmp_path
):
  storage.reset_counters()
  manifest = to_bucket(write_corpus(), tmp_path, bucket)
  bucket.fault("503", name="oct", share=0.3, seed=3)
  bucket.fault("reset", name="oct", share=0.2, seed=4)
  data = opened(manifest)
  assert data.report["records"] == 12 and not data.report["quarantine"]
  assert {"retried 503", "retried reset"} <= set(data.report["retries"])


def to_bucket(manifest, folder, bucket):
  """Copies a corpus into a bucket; returns its manifest there."""
  for path in folder.rglob("*"):
    if path.is_file():
      name = f"{bucket.url}/{path.relative_to(folder)}"
      storage.write_bytes(name, path.read_bytes())
  return f"{bucket.url}/{pathlib.Path(manifest).name}"


def test_rows_lost_without_being_asked_for_stop_the_run_by_reason_and_site(
    write_corpus, tmp_path
):
  manifest = write_corpus(people=10)
  text = (tmp_path / "manifest.tsv").read_text()
  # Half the participants are in no table: one whole site.
  people = ["participant_id"] + [str(1000 + n) for n in range(0, 10, 2)]
  (tmp_path / "people.tsv").write_text("\n".join(people) + "\n")
  options = dict(participants=str(tmp_path / "people.tsv"), splits=FRACTIONS)
  with pytest.raises(DataError) as caught:
    opened(manifest, **options)
  assert "10 of 20 rows are lost" in str(caught.value)
  assert "not_in_participants 10" in str(caught.value)
  assert "by site: UAB 10" in str(caught.value)
  report = opened(manifest, max_lost_fraction=0.5, **options).report
  assert report["lost"] == {"not_in_participants": 10} and report["rows"] == 20
  assert report["lost_by"]["site"] == {"UAB": {"not_in_participants": 10}}
  assert report["lost_by"]["device"]["topcon_triton"] == {"not_in_participants": 5}
  # What was asked for, or is there twice, is no loss.
  (tmp_path / "manifest.tsv").write_text(text + text.splitlines()[-1] + "\n")
  report = opened(
      manifest, splits=FRACTIONS, max_lost_fraction=0.0, filters={"site": "UW"}
  ).report
  assert report["lost"] == {"filtered_site": 10, "duplicate_row": 1}


def test_rows_without_a_split_count_as_lost(write_corpus, tmp_path):
  manifest = write_corpus()
  path = tmp_path / "manifest.tsv"
  lines = path.read_text().splitlines()
  lines[1:3] = [line.rpartition("\t")[0] + "\t" for line in lines[1:3]]
  path.write_text("\n".join(lines) + "\n")
  with pytest.raises(DataError, match="no_split 2"):
    opened(manifest)
  assert opened(manifest, max_lost_fraction=0.2).report["lost"] == {"no_split": 2}


def test_the_report_tells_losses_by_device_site_split_label_and_path(write_corpus):
  broken = {3: "truncated", 4: "not_dicom"}
  report = opened(write_corpus(broken=broken), max_bad_fraction=0.2).report
  by = report["quarantine_by"]
  assert by["device"] == {
      "heidelberg_spectralis": {"not_dicom": 1}, "topcon_triton": {"truncated": 1}
  }
  assert by["site"] == {"UAB": {"truncated": 1}, "UW": {"not_dicom": 1}}
  assert by["split"] == {"train": {"not_dicom": 1, "truncated": 1}}
  assert by["label"] == {"drusen": {"not_dicom": 1}, "normal": {"truncated": 1}}
  (path,) = report["quarantine_paths"]["truncated"]
  assert path.endswith("1001/R.dcm")
  json.dumps(report)


def lazy(manifest, threads=2, **options):
  data = opened(
      manifest, validate="lazy", cache="none", **{"max_bad_fraction": 0.3, **options}
  )
  train = data.splits["train"]
  return data, train_iterator(train, batch_size=3, seed=0, threads=threads)


def test_a_resumed_lazy_run_counts_on(write_corpus, tmp_path):
  manifest = write_corpus(people=12, broken={3: "truncated", 8: "not_dicom"})
  log = tmp_path / "q.tsv"
  first, iterator = lazy(manifest, quarantine=str(log))
  indices(iterator, 8)  # once around
  state = json.loads(json.dumps(iterator.get_state()))
  assert first.report["quarantine"] == {"not_dicom": 1, "truncated": 1}
  (tmp_path / "oct/topcon_triton/1001/R.dcm").write_bytes(
      (tmp_path / "oct/topcon_triton/1002/R.dcm").read_bytes()
  )
  second, again = lazy(manifest, quarantine=str(log))
  again.set_state(state)
  want = {k: v for k, v in first.report.items() if k != "retries"}
  assert {k: v for k, v in second.report.items() if k != "retries"} == want
  # A file mended meanwhile stays out, as in an unbroken run.
  seen = indices(again, 8)
  assert seen == indices(iterator, 8)
  assert second.report["read"] == first.report["read"]
  assert log.read_text().count("R.dcm") == 1


def test_a_resumed_lazy_run_stops_at_the_file_that_an_unbroken_one_stops_at(
    write_corpus
):
  broken = dict.fromkeys(range(0, 30, 3), "truncated")
  manifest = write_corpus(people=20, broken=broken)

  def met(iterator, limit):
    for n in range(limit):
      try:
        next(iterator)
      except DataError:
        return n
    return None

  options = dict(max_bad_fraction=0.2, threads=0)  # nothing is read ahead
  unbroken = met(lazy(manifest, **options)[1], 100)
  assert unbroken is not None and unbroken > 3
  _, first = lazy(manifest, **options)
  assert met(first, 3) is None
  _, second = lazy(manifest, **options)
  second.set_state(first.get_state())
  assert met(second, 100) == unbroken - 3


def test_each_host_keeps_a_table_of_its_own(write_corpus, tmp_path):
  manifest = write_corpus(broken={3: "truncated"})
  log = tmp_path / "out" / "quarantine.tsv"
  options = dict(max_bad_fraction=0.3, quarantine=str(log))
  for host in range(2):
    data = opened(manifest, validate="lazy", host=(host, 2), **options)
    list(eval_batches(data.splits["train"], 4))
  names = sorted(path.name for path in log.parent.iterdir())
  assert names == ["quarantine.host1.tsv", "quarantine.tsv"]
  for path in log.parent.iterdir():
    path.unlink()
  opened(manifest, host=(1, 2), **options)  # the first host has read the same
  assert not list(log.parent.iterdir())


@pytest.fixture(scope="module")
def with_workers():
  """Returns open(...) -> data read by processes, which are ended afterwards."""
  opened_data = []

  def open_(manifest, **options):
    data = opened(manifest, workers=2, cache="none", **options)
    opened_data.append(data)
    return data

  yield open_
  for data in opened_data:
    data.close()
    assert not data.worker_pids()


@pytest.mark.parametrize("validate", ["read", "lazy"])
def test_worker_processes_change_nothing_but_who_reads(
    write_corpus, with_workers, validate
):
  manifest = write_corpus(broken={3: "truncated", 4: "not_dicom"})
  options = dict(validate=validate, max_bad_fraction=0.3)
  found = []
  for data in (opened(manifest, **options), with_workers(manifest, **options)):
    iterator = train_iterator(
        data.splits["train"], batch_size=3, seed=0, threads=4, workers=data.workers
    )
    first = [next(iterator) for _ in range(4)]
    state = iterator.get_state()
    found.append((data, first + [next(iterator) for _ in range(4)], state))
  (plain, want, state), (other, batches, others_state) = found
  assert len(other.worker_pids()) == 2
  for a, b in zip(want, batches, strict=True):
    for key in KEYS:
      np.testing.assert_array_equal(a[key], b[key])
  assert sorted(plain.quarantine) == sorted(other.quarantine)
  # The number of workers is kept, and decides nothing: each goes on from the other.
  assert (state["workers"], others_state["workers"]) == (0, 2)
  for data, given in ((plain, others_state), (other, state)):
    again = train_iterator(
        data.splits["train"], batch_size=3, seed=0, workers=data.workers
    )
    again.set_state(given)
    assert indices(again, 4) == [b["index"].tolist() for b in want[4:]]


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_order_stays(write_corpus, with_workers):
  manifest = write_corpus()
  want = indices(
      train_iterator(opened(manifest).splits["train"], batch_size=2, seed=0), 30
  )
  data = with_workers(manifest, validate="lazy")
  iterator = train_iterator(data.splits["train"], batch_size=2, seed=0, threads=2)
  found = []
  for step in range(30):
    found.append(next(iterator)["index"].tolist())
    if step in (3, 11):
      os.kill(data.worker_pids()[0], signal.SIGKILL)
  assert found == want and not data.quarantine
  assert len(data.worker_pids()) == 2


@pytest.mark.slow
def test_a_file_that_kills_or_holds_its_worker_is_named_within_bounds():
  workers = pool.Pool(fatal.Fatal(), 1, timeout_s=5)
  for path, reason, said in (
      ("kills", "decoder_died", "exit code 7"), ("holds", "timed_out", "within 5 s"),
  ):
    with pytest.raises(ReadError, match=said) as caught:
      workers.read(Row(path, "1"))
    assert caught.value.reason == reason and caught.value.path == path
    assert workers.read(Row("good", "1")).volume.max() == 9
  workers.close()
  with pytest.raises(DataError, match="closed"):
    workers.read(Row("good", "1"))


@pytest.mark.slow
def test_a_call_given_up_by_ctrl_c_does_not_answer_the_next_one():
  workers = pool.Pool(fatal.Fatal(), 1, timeout_s=60)
  workers.read(Row("good", "1"))
  threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
  with pytest.raises(KeyboardInterrupt):
    workers.read(Row("seven late", "1"))
  assert workers.read(Row("good", "1")).volume.max() == 9
  workers.close()


@pytest.mark.slow
def test_a_pool_closed_while_it_is_read_from_closes_each_pipe_once(monkeypatch):
  closed = []
  close = pool.connection.Connection._close
  monkeypatch.setattr(
      pool.connection.Connection, "_close",
      lambda self: (closed.append(threading.get_ident()), close(self)),
  )
  workers, found = pool.Pool(fatal.Fatal(), 2, timeout_s=60), []

  def read(path):
    try:
      workers.read(Row(path, "1"))
    except Exception as error:
      found.append(error)

  for path in ("good", "good"):
    read(path)
  reading = threading.Thread(target=read, args=("seven late",))
  reading.start()
  time.sleep(0.5)
  del closed[:]
  workers.close()
  reading.join(10)
  assert isinstance(found[0], DataError) and "closed" in str(found[0])
  assert closed == [reading.ident] and not workers.pids()


@pytest.mark.slow
def test_a_fault_of_an_operation_stops_the_run_and_blames_no_file():
  workers = pool.Pool(fatal.Fatal(), 1, timeout_s=60)
  pid = None
  for _ in range(2):
    with pytest.raises(DataError, match="bug: KeyError: 'of an op'"):
      workers.read(Row("bug", "1"))
    assert pid in (None, *workers.pids())  # The worker lives on.
    pid, = workers.pids()
  workers.close()


@pytest.mark.slow
def test_a_canvas_larger_than_the_common_memory_comes_by_the_pipe():
  workers = pool.Pool(fatal.Fatal(), 1, timeout_s=60)
  assert workers.read(Row("no room", "1")).volume.max() == 9
  workers.close()


def test_an_opening_that_fails_leaves_no_worker(write_corpus, monkeypatch):
  made = []
  monkeypatch.setattr(
      pool, "Pool", lambda *args, _pool=pool.Pool, **options: (
          made.append(_pool(*args, **options)) or made[-1]
      )
  )
  with pytest.raises(DataError, match="max_bad_fraction"):
    opened(
        write_corpus(broken=dict.fromkeys(range(6), "truncated")), workers=1,
        cache="none", max_bad_fraction=0.1,
    )
  assert made and not made[0].pids()


def test_a_quarantine_table_that_cannot_be_written_is_not_the_recording_s_fault(
    write_corpus, tmp_path
):
  (tmp_path / "file").write_text("")
  manifest = write_corpus(broken={3: "truncated"})
  _, iterator = lazy(manifest, quarantine=str(tmp_path / "file" / "q.tsv"))
  with pytest.raises(DataError, match="quarantine table cannot be written"):
    indices(iterator, 8)


def test_a_worker_that_cannot_start_is_a_clear_error():
  workers = pool.Pool(fatal.Unloadable(), 1, timeout_s=5)
  with pytest.raises(DataError, match="did not start.*exit code 1"):
    workers.read(Row("a", "1"))
  workers.close()


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(write_corpus, tmp_path):
  manifest = write_corpus(people=3)
  code = (
      "import os, sys\n"
      "from vjepa_jax.data.pipeline import open_data\n"
      f"data = open_data({manifest!r}, canvas=(4, 16, 16), splits='part', workers=2)\n"
      "print(*data.worker_pids(), flush=True)\n"
      "os.kill(os.getpid(), 9)\n"
  )
  done = subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
      env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
  )
  pids = [int(pid) for pid in done.stdout.split()]
  assert len(pids) == 2, done.stderr
  deadline = time.monotonic() + 20
  while any(is_alive(pid) for pid in pids):
    assert time.monotonic() < deadline
    time.sleep(0.05)


def is_alive(pid):
  status = pathlib.Path(f"/proc/{pid}/status")
  return status.exists() and "\nState:\tZ" not in status.read_text()


def test_ops_come_before_resampling_and_draw_once_a_recording(write_corpus):
  manifest = write_corpus()
  clipped = opened(manifest, ops=[dict(name="clip_percentiles", lower=40, upper=60)])
  plain = opened(manifest)
  for n in range(3):
    a, b = (d.splits["train"][n].volume for d in (clipped, plain))
    assert a.std() != b.std()
  assert clipped.report["ops"] == ["clip_percentiles"]
  small = opened(manifest, ops=[dict(name="pad_or_crop", size=(4, 16, 16))])
  assert small.splits["train"][0].volume.shape == (1, *CANVAS, 1)


def test_rows_say_how_they_are_to_be_read_and_win_over_the_config(tmp_path):
  rng = np.random.default_rng(0)
  volume = rng.integers(0, 255, (2, 4, 8, 8), np.uint8)
  np.save(tmp_path / "tzyx.npy", volume)
  np.save(tmp_path / "ztyx.npy", volume.swapaxes(0, 1))
  np.savez(tmp_path / "two.npz", a=volume, b=volume[::-1])
  lines = [
      "participant_id\tfilepath\taxes\tkey\ttime_step_s\tspacing", "1\ttzyx.npy\t\t\t\t",
      "2\tztyx.npy\tZTYX\t\t2.5\t[3, 2, 1]", "3\ttwo.npz\t\ta\t\t",
      "4\ttwo.npz\t\tb\t\t",
  ]
  (tmp_path / "m.tsv").write_text("\n".join(lines) + "\n")
  data = open_data(
      str(tmp_path / "m.tsv"), canvas=(4, 8, 8), splits={"train": 1.0},
      reader=dict(axes="TZYX", time_step_s=1.0), dtype="keep",
  )
  train = data.splits["train"]
  records = {train.rows[n].participant: train[n] for n in range(4)}
  for person in "123":
    np.testing.assert_array_equal(records[person].volume[..., 0], volume)
  np.testing.assert_array_equal(records["4"].volume[..., 0], volume[::-1])
  assert records["1"].spacing[0] == 1.0 and records["2"].spacing.tolist() == [2.5, 3, 2, 1]


def test_a_batch_that_is_held_is_not_written_over(write_corpus):
  train = opened(write_corpus()).splits["train"]
  iterator = train_iterator(train, batch_size=3, seed=0)
  held = [next(iterator) for _ in range(9)]
  copies = [batch["volume"].copy() for batch in held]
  views = [batch["volume"][1:] for batch in held[::2]]
  on_device = [jax.device_put(batch["volume"]) for batch in held]
  del held
  for _ in range(12):
    next(iterator)
  for view, copy in zip(views, copies[::2], strict=True):
    np.testing.assert_array_equal(view, copy[1:])
  for array, copy in zip(on_device, copies, strict=True):
    np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("how", ["put", "global"])
def test_memory_that_jax_still_computes_from_is_not_lent_again(how, monkeypatch):
  # Aligned so that jax on a CPU takes the memory itself and not a copy.
  empty = np.empty
  aligned = lambda size, dtype: _aligned(empty(size + 64, dtype))
  monkeypatch.setattr(np, "empty", aligned)
  buffers, shape = Buffers(2), (8, 1 << 20)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
  placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

  @jax.jit
  def read_late(volume, steps):
    first = volume.reshape(-1)[:64].astype(jax.numpy.float32)
    last = jax.lax.fori_loop(0, steps, lambda _, x: jax.numpy.sin(x) + 1e-9, first)
    return (volume.astype(jax.numpy.int32) + (last.sum() * 0).astype(int)).sum()

  read_late(jax.numpy.zeros(shape, np.uint8), 3).block_until_ready()
  running = 0
  for n in range(5):
    host = buffers.take(shape, np.dtype(np.uint8))
    host[:] = n
    place = host.ctypes.data
    if how == "put":
      given = jax.device_put(host, jax.devices()[0])
    else:
      given = jax.make_array_from_process_local_data(placed, host)
    assert given.addressable_data(0).unsafe_buffer_pointer() == place
    total = read_late(given, 400_000)
    del host, given
    for _ in range(4):
      other = buffers.take(shape, np.dtype(np.uint8))
      still = not total.is_ready()
      other[:] = 255
      running += still
      del other
    assert int(total) == n * 8 << 20
  assert running


def _aligned(array):
  start = -array.ctypes.data % 64
  return array[start : start + array.size - 64]


def test_memory_of_batches_is_used_again_once_they_are_gone():
  buffers = Buffers(8)
  first = buffers.take((4, 8), np.dtype(np.uint8))
  place = first.ctypes.data
  view = first[2:]
  del first
  assert buffers.take((4, 8), np.dtype(np.uint8)).ctypes.data != place
  del view
  held = buffers.take((4, 8), np.dtype(np.uint8))
  other = buffers.take((4, 8), np.dtype(np.uint8))
  assert place in (held.ctypes.data, other.ctypes.data)
  assert buffers.take((4, 4), np.dtype(np.uint16)).shape == (4, 4)


@pytest.mark.slow
def test_shards_in_a_bucket_serve_the_batches_of_the_raw_files(
    write_corpus, bucket, tmp_path
):
  manifest = to_bucket(write_corpus(broken={3: "truncated"}), tmp_path, bucket)
  options = dict(max_bad_fraction=0.2, threads=1)
  raw = opened(manifest, **options).splits["train"]
  iterator = train_iterator(raw, batch_size=3, seed=0)
  want = [next(iterator) for _ in range(4)]
  opened(manifest, cache=f"{bucket.url}/shards", **options)
  bucket.forget_requests()
  data = opened(manifest, cache=f"{bucket.url}/shards", **options)
  found = train_iterator(data.splits["train"], batch_size=3, seed=0)
  for batch in want:
    other = next(found)
    for key in KEYS:
      np.testing.assert_array_equal(other[key], batch[key])
  assert data.report["quarantine"] == {"truncated": 1}
  assert not [line for line in bucket.requests() if ".dcm" in line and "alt=media" in line]
