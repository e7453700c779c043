"""Claims of data/shard_writing.py, data/beam.py and the verb `prepare`."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest

from tests.data import making
from vjepa_jax import config as config_lib
from vjepa_jax.data import beam, shard_writing, shards, storage
from vjepa_jax.data.record import DataError

ROOT = pathlib.Path(__file__).resolve().parents[2]
BROKEN = ["0", "1", "abort", "3", "bad", "segfault", "6", "bug", "hang", "9"]
# A run of its own process group, so that it can be killed with its workers.
RUN = """
import sys
from tests.data import making
from vjepa_jax import config as config_lib
making.write(*sys.argv[1:], progress=lambda *done: print(done, flush=True))
"""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
  monkeypatch.setattr(shard_writing, "_SHARD_BYTES", making.SHARD_BYTES)


write = making.write


def started(source, path, *arguments, **env):
  return subprocess.Popen(
      [sys.executable, "-c", RUN, str(source), str(path), *arguments], cwd=ROOT,
      env={**os.environ, **env}, start_new_session=True, stdout=subprocess.PIPE,
  )


def run(*arguments, **env):
  return subprocess.run(
      [sys.executable, "-m", "vjepa_jax.prepare", *map(str, arguments)], cwd=ROOT,
      env={**os.environ, **env}, capture_output=True, text=True, check=False,
  )


def test_one_and_two_workers_and_none_write_the_same_bytes(tmp_path):
  folders = []
  for workers in (0, 1, 2):
    path = tmp_path / f"w{workers}"
    write(tmp_path, path, workers)
    folders.append(making.contents(path))
  assert folders[0] == folders[1] == folders[2]
  assert sum("array_record" in name for name in folders[0]) == 8
  assert not [n for n in folders[0] if "unfinished" in n or n.endswith(".part")]


@pytest.mark.parametrize("seed, kills", [
    (0, 2), pytest.param(1, 5, marks=pytest.mark.slow)
])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path, seed, kills):
  write(tmp_path, tmp_path / "whole", 0)
  rng, path = random.Random(seed), tmp_path / "killed"
  kept: dict[str, int] = {}
  for _ in range(kills):
    process = started(tmp_path, path, "2", "", "0.02")
    for _ in range(rng.randrange(3, 9)):
      process.stdout.readline()
    time.sleep(rng.uniform(0, 0.05))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    noted = [p.stem.rpartition("-") for p in path.glob("unfinished/part*.json")]
    for name in path.glob("*array_record*"):
      if any(f"{s}." in name.name and f"-{n}-of" in name.name for s, _, n in noted):
        kept.setdefault(name.name, name.stat().st_mtime_ns)
  write(tmp_path, path, 2)
  assert making.contents(path) == making.contents(tmp_path / "whole")
  assert {n: (path / n).stat().st_mtime_ns for n in kept} == kept
  assert kept


def test_killed_between_its_last_steps_it_tidies_up(tmp_path):
  write(tmp_path, tmp_path / "whole", 0)
  want = making.contents(tmp_path / "whole")
  path = tmp_path / "killed"

  def die(notes):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write(tmp_path, path, 0, judge=die)
  assert shards.read_notes(str(path)) is None
  # As a kill after the notes, and one while a file was written, would leave it.
  (path / "notes.json").write_bytes(want["notes.json"])
  (path / "notes.json.1234.part").write_bytes(b"half")
  write(tmp_path, path, 0)
  (path / "index.json").write_bytes(want["index.json"])
  for name in ("dataset_info.json", "features.json"):
    (path / name).write_bytes(want[name])
  assert making.contents(path) == want


def test_a_shard_damaged_meanwhile_is_written_again(tmp_path):
  write(tmp_path, tmp_path / "whole", 0)
  path = tmp_path / "cut"
  with pytest.raises(DataError, match="enough"):
    write(tmp_path, path, 0, judge=lambda notes: stop("enough"))
  file = sorted(path.glob("*array_record*"))[2]
  content = bytearray(file.read_bytes())
  content[300] ^= 1
  file.write_bytes(bytes(content))
  write(tmp_path, path, 0)
  assert making.contents(path) == making.contents(tmp_path / "whole")


def stop(why):
  raise DataError(why)


def test_a_file_that_kills_hangs_or_confuses_its_reader_is_quarantined(tmp_path):
  notes = write(
      tmp_path, tmp_path / "c", 2, json.dumps(BROKEN), timeout_s=3.0
  )
  source = tmp_path / "a"
  assert [(bad[0], bad[1]) for bad in notes["bad"]] == [
      (f"{source}/002.txt", "decoder_died"), (f"{source}/004.txt", "truncated"),
      (f"{source}/005.txt", "decoder_died"), (f"{source}/007.txt", "decode_failed"),
      (f"{source}/008.txt", "timed_out"),
  ]
  assert "SIGABRT" in notes["bad"][0][2] and "KeyError" in notes["bad"][3][2]
  assert len(shards.Shards(str(tmp_path / "c"), "train")) == 5
  table = (tmp_path / "c" / "quarantine.tsv").read_text().splitlines()
  assert table[0] == "path\treason\tdetail"
  assert table[2] == f"{source}/004.txt\ttruncated\tof two lines"
  report = json.loads((tmp_path / "c" / "report.json").read_text())
  assert report["splits"]["train"]["canvases"] == 5
  assert report["quarantine"] == {
      "decode_failed": 1, "decoder_died": 2, "timed_out": 1, "truncated": 1
  }


@pytest.mark.slow
def test_a_file_killed_for_want_of_memory_is_tried_while_nothing_else_is_read(tmp_path):
  busy = tmp_path / "busy"
  busy.mkdir()
  parts = {"train": making.rows(tmp_path, ["0", "long", "hungry"])}
  notes = shard_writing.prepare(
      str(tmp_path / "c"), parts, making.Made(busy=str(busy)), options={},
      crew=shard_writing.Crew(2),
  )
  assert not notes["bad"]
  assert len(list(busy.glob("tried*"))) == 3 and not (busy / "not alone").exists()


def test_workers_import_no_jax(tmp_path):
  notes = write(tmp_path, tmp_path / "c", 1, json.dumps(["0", "jax"]))
  assert [bad[2] for bad in notes["bad"]] == ["jax is here: False"]


def test_two_at_once_on_one_folder_write_it_once(tmp_path):
  write(tmp_path, tmp_path / "whole", 0)
  path = tmp_path / "both"
  both = [started(tmp_path, path, "1", "", "0.05") for _ in range(2)]
  assert [process.wait(60) for process in both] == [0, 0]
  assert making.contents(path) == making.contents(tmp_path / "whole")


def test_progress_counts_every_file_and_begins_where_it_goes_on(tmp_path):
  told = []
  with pytest.raises(DataError):
    write(tmp_path, tmp_path / "c", 0, judge=lambda n: stop("later"),
          progress=lambda *a: told.append(a))
  assert told == [(n, 22) for n in range(1, 23)]
  file = sorted((tmp_path / "c").glob("*array_record*"))[-1]
  file.unlink()
  told.clear()
  write(tmp_path, tmp_path / "c", 0, progress=lambda *a: told.append(a))
  assert told[0] == (20, 22) and told[-1] == (22, 22)


def test_far_too_many_bad_files_stop_it_early(tmp_path):
  texts = ["bad"] * 40 + ["1"]
  told = []
  with pytest.raises(DataError, match="too many: [456]"):
    write(
        tmp_path, tmp_path / "c", 0, json.dumps(texts), max_bad=3,
        judge=lambda notes: stop(f"too many: {len(notes['bad'])}"),
        progress=lambda *a: told.append(a),
    )
  assert len(told) < 30


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(DataError, match="file/c: no folder to write in"):
    write(tmp_path, tmp_path / "file" / "c", 0)


def test_beam_options_without_their_quote_are_said(tmp_path):
  with pytest.raises(DataError, match="beam_options .*No closing quotation"):
    write(tmp_path, tmp_path / "c", 0, runner=beam.Runner("--runner='x"))


@pytest.mark.parametrize("flags,said", [
    (["--config=nothere.py"], "nothere.py"),
    (["--config=configs/oct_multi.py:tiny", "--validate-only", "--sample=-3"], "sample"),
])
def test_a_wrong_flag_is_no_traceback(flags, said):
  done = run(*flags)
  assert done.returncode and said in done.stderr and "Traceback" not in done.stderr


def test_splits_that_would_share_files_are_refused(tmp_path):
  parts = {name: making.rows(tmp_path / "a", ["0"]) for name in ("fold 1", "fold_1")}
  with pytest.raises(DataError, match="'fold 1' and 'fold_1' would share"):
    shard_writing.prepare(str(tmp_path / "c"), parts, making.Made(), options={})
  assert not (tmp_path / "c").exists()


def test_a_split_without_a_good_file_is_an_error(tmp_path):
  with pytest.raises(DataError, match="split train has no good file left"):
    write(tmp_path, tmp_path / "c", 0, json.dumps(["bad", "bad"]))
  assert shards.read_notes(str(tmp_path / "c")) is None


def test_a_shard_of_bad_files_alone_is_empty_and_the_rest_is_there(tmp_path):
  import tensorflow_datasets as tfds

  write(tmp_path, tmp_path / "c", 0, json.dumps(["bad"] * 3 + ["3", "4"]))
  found = shards.Shards(str(tmp_path / "c"), "train")
  assert [os.path.basename(r.source) for r in found] == ["003.txt", "004.txt"]
  source = tfds.builder_from_directory(str(tmp_path / "c")).as_data_source(
      split="part_train"
  )
  assert len(source) == 2


@pytest.mark.slow
def test_beam_writes_the_same_bytes(tmp_path):
  texts = json.dumps(["0", "1", "abort", "bad"])
  write(tmp_path, tmp_path / "local", 1, texts)
  write(
      tmp_path, tmp_path / "beam", 1, texts,
      runner=beam.Runner("--runner=DirectRunner", say=lambda line: None),
  )
  assert making.contents(tmp_path / "local") == making.contents(tmp_path / "beam")


def test_a_bucket_gets_the_same_bytes_and_what_is_there_is_not_sent_again(
    tmp_path, bucket
):
  write(tmp_path, tmp_path / "local", 0)
  path = f"{bucket.url}/prepared"
  with pytest.raises(DataError, match="later"):
    write(tmp_path, path, 2, judge=lambda notes: stop("later"))
  bucket.forget_requests()
  write(tmp_path, path, 2)
  sent = [r for r in bucket.requests() if r.startswith(("POST", "PUT"))]
  assert not [request for request in sent if "array_record" in request]
  found = {
      entry.path.removeprefix(f"{path}/"): storage.read_bytes(entry.path)
      for entry in storage.list_entries(path)
  }
  assert found == making.contents(tmp_path / "local")
  np.testing.assert_array_equal(
      shards.Shards(path, "train")[7].volume,
      shards.Shards(str(tmp_path / "local"), "train")[7].volume,
  )


def test_a_bucket_lost_on_the_way_stops_it_and_the_same_call_goes_on(
    tmp_path, bucket, monkeypatch
):
  write(tmp_path, tmp_path / "local", 0)
  path = f"{bucket.url}/prepared"
  monkeypatch.setenv("VJEPA_JAX_STORAGE_DEADLINE_S", "1")
  bucket.fault("503", name="prepared/canvases-part_train.array_record-00004")
  with pytest.raises(DataError, match="array_record-00004"):
    write(tmp_path, path, 0)
  assert shards.read_notes(path) is None
  bucket.clear_faults()
  write(tmp_path, path, 0)
  found = {
      entry.path.removeprefix(f"{path}/"): storage.read_bytes(entry.path)
      for entry in storage.list_entries(path)
  }
  assert found == making.contents(tmp_path / "local")


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(tmp_path):
  process = started(tmp_path, tmp_path / "c", "2", "", "0.2")
  process.stdout.readline()
  children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
  pids = [int(p) for p in children.read_text().split()]
  os.kill(process.pid, signal.SIGINT)
  assert process.wait(20) != 0
  assert not [pid for pid in pids if pathlib.Path(f"/proc/{pid}").exists()]
  assert threading.active_count() < 50


@pytest.mark.slow
def test_the_verb_writes_what_main_s_data_section_then_reads(write_corpus, tmp_path):
  manifest = write_corpus(broken={3: "truncated"}, shape=(8, 32, 40))
  cache = tmp_path / "shards"
  arguments = (
      "--config=configs/oct_multi.py:sample", f"--config.data.manifest={manifest}",
      f"--config.data.cache={cache}", "--config.data.label=pathology",
      "--config.data.split_column=part", "--workers=1",
  )
  strict = run(*arguments, "--config.data.max_bad_fraction=0.01")
  assert strict.returncode == 2 and "1 truncated" in strict.stderr
  found = run(*arguments, "--config.data.max_bad_fraction=0.2")
  assert found.returncode == 0, found.stderr
  assert "train: 9 canvases of 10 files" in found.stdout
  assert "left out: truncated 1" in found.stdout
  assert f"main reads them with --config.data.cache={cache}" in found.stdout
  before = making.contents(cache)

  config = config_lib.load("configs/oct_multi.py:sample")
  with config.unlocked():
    config.data.update(
        manifest=manifest, cache=str(cache), label="pathology", split_column="part",
        max_bad_fraction=0.2,
    )
  said = []
  data = config_lib.open_data(config_lib.as_plain(config), say=said.append)
  assert not said and len(data.splits["train"]) == 9
  assert making.contents(cache) == before


@pytest.mark.slow
def test_the_verb_scans_validates_expands_and_says_what_it_lacks(
    write_corpus, tmp_path
):
  write_corpus(shape=(8, 32, 40))
  none = run("--config=configs/oct_multi.py:sample")
  assert none.returncode == 2 and "--config.data.cache=FOLDER" in none.stderr
  with zipfile.ZipFile(tmp_path / "scans.zip", "w") as file:
    for path in (tmp_path / "oct").rglob("*.dcm"):
      file.write(path, path.relative_to(tmp_path))
  there = tmp_path / "there"
  expanded = run(f"--expand={tmp_path}/scans.zip", f"--output={there}")
  assert expanded.returncode == 0 and "12 written" in expanded.stdout, expanded.stderr
  table = tmp_path / "made.tsv"
  scanned = run(f"--scan={there}", f"--output={table}")
  assert scanned.returncode == 0 and "12 recordings" in scanned.stdout, scanned.stderr
  check = (
      "--config=configs/oct_multi.py:sample", f"--config.data.manifest={table}",
      "--config.data.label=", "--validate-only", "--read",
  )
  sound = run(*check)
  assert sound.returncode == 0 and "sound" in sound.stdout, sound.stderr
  next(there.rglob("*.dcm")).unlink()
  unsound = run(*check)
  assert unsound.returncode == 2 and "missing: 1" in unsound.stdout
