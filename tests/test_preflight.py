"""--preflight finds all that would stop a run, and stops for none of it."""

import json
import os
import pathlib
import subprocess
import sys

import cv2
import pytest

from tests.data import bucket as buckets
from vjepa_jax import config as config_lib
from vjepa_jax.config import preflight, units
from vjepa_jax.data import phantoms

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus") / "oct"
  return phantoms.write_oct_corpus(folder, **units.PHANTOMS["oct_tiny"])


def load(manifest, **data):
  config = config_lib.load("configs/oct_multi.py:tiny")
  with config.unlocked():
    config.data.manifest = str(manifest)
    config.data.update(data)
  return config


def lines(table, name):
  return [f for f in table.findings if f.name == name]


@pytest.mark.slow
def test_a_sound_run_has_no_fault_and_is_described(manifest, tmp_path):
  said = []
  table = preflight.run(load(manifest), tmp_path / "run", volumes=8, say=said.append)
  assert not table.faults, "\n".join(said)
  names = {f.name for f in table.findings}
  assert names >= {
      "config", "workdir", "manifest", "devices", "decoders", "volumes", "canvases",
      "units", "batch", "augment", "masks", "figures", "one volume", "reading",
      "state", "memory", "a step", "preflight",
  }
  assert "Explicit VR Little Endian" in lines(table, "decoders")[0].detail
  assert "8 volumes of 32 tokens" in lines(table, "batch")[0].detail
  folder = tmp_path / "run" / "preflight"
  found = json.loads((folder / "preflight.json").read_text())
  assert [f["name"] for f in found] == [f.name for f in table.findings][:-1]
  for name in ("canvases.png", "masks.png"):
    assert cv2.imread(str(folder / name)).std() > 10
  # Nothing of a run: neither data are quarantined nor is a step taken.
  assert [p.name for p in (tmp_path / "run").iterdir()] == ["preflight"]


def test_every_fault_is_found_not_only_the_first(manifest, tmp_path, monkeypatch):
  monkeypatch.setattr(preflight, "_check_step", lambda *unused: None)
  (tmp_path / "file").write_text("in the way of a folder")
  rows = manifest.read_text().splitlines()
  broken = manifest.with_name("broken.tsv")
  names = rows[0].split("\t")
  place = names.index("filepath")
  for n in range(1, len(rows), 2):  # every other file is not there
    cells = rows[n].split("\t")
    cells[place] += ".gone"
    rows[n] = "\t".join(cells)
  broken.write_text("\n".join(rows) + "\n")
  said = []

  def refuse():
    raise config_lib.ConfigError("tiny", ["model.width: 32 in config.json, 64 now"])

  config = load(broken, label="no_such_column")
  table = preflight.run(
      config, tmp_path / "file" / "run", volumes=8, say=said.append,
      checks={"continuation": refuse},
  )
  failed = {f.name for f in table.findings if f.status == preflight.FAIL}
  assert failed == {"workdir", "manifest", "units", "preflight"}, "\n".join(said)
  config = load(broken)
  table = preflight.run(
      config, tmp_path / "run", volumes=8, say=said.append,
      checks={"continuation": refuse},
  )
  failed = {f.name for f in table.findings if f.status == preflight.FAIL}
  assert failed == {"volumes", "continuation", "preflight"}, "\n".join(said)
  assert all("missing_file" in f.detail for f in lines(table, "volume"))
  assert "model.width" in lines(table, "continuation")[0].detail
  assert lines(table, "masks")  # what can be tried is tried all the same


def test_all_faults_of_a_config_are_lines(manifest, tmp_path):
  config = load(manifest, resample="bend", threads=0)
  table = preflight.run(config, tmp_path, say=lambda text: None)
  found = [f.detail for f in lines(table, "config")]
  assert len(found) == 2 and table.faults == 3
  assert any("bend" in text for text in found)
  assert any("threads" in text for text in found)


def test_a_decoder_that_is_missing_is_a_fault_whatever_may_be_lost(
    manifest, tmp_path, monkeypatch
):
  from vjepa_jax.data import readers
  from vjepa_jax.data.record import ReadError

  monkeypatch.setattr(preflight, "_check_step", lambda *unused: None)
  read, tried = readers.read, []

  def first_has_no_decoder(path, **options):
    tried.append(path)
    if len(tried) == 1:
      raise ReadError(path, "no_decoder", "JPEG 2000", "pip install x")
    return read(path, **options)

  monkeypatch.setattr(readers, "read", first_has_no_decoder)
  config = load(manifest, max_bad_fraction=0.9)
  table = preflight.run(config, tmp_path, say=lambda text: None)
  (line,) = [f for f in lines(table, "volume") if f.status == preflight.FAIL]
  assert "no_decoder" in line.detail and "pip install x" in line.detail


def test_recordings_are_chosen_from_every_device(manifest):
  from vjepa_jax.data import pipeline

  sources = pipeline.plan(str(manifest), splits="split", modalities=("OPT",))
  chosen = preflight._spread(sources, 8)
  devices = [row.device for _, row in chosen]
  assert len(chosen) == len({row.path for _, row in chosen}) == 8
  assert all(devices.count(name) == 2 for name in set(devices))
  everything = preflight._spread(sources, 1000)
  assert len({row.path for _, row in everything}) == 51


def command(*arguments, **environment):
  return subprocess.run(
      [sys.executable, "-m", "vjepa_jax.main", "--config=configs/oct_multi.py:tiny",
       *arguments],
      env={**os.environ, "JAX_PLATFORMS": "cpu", **environment}, cwd=ROOT,
      capture_output=True, text=True, timeout=300,
  )


@pytest.mark.slow
def test_the_command_says_all_of_it_and_ends_with_2(manifest, tmp_path):
  done = command(
      f"--workdir={tmp_path}", "--preflight=3", f"--config.data.manifest={manifest}",
      "--config.model.heads=3", "--config.data.threads=0",
  )
  assert done.returncode == 2, done.stderr
  assert done.stdout.count("FAIL") == 3 and "data.threads" in done.stdout


@pytest.mark.slow
def test_a_run_in_a_bucket_is_tried_there(manifest):
  with buckets.start() as emulator:
    bucket = emulator.make_bucket()
    done = command(
        f"--workdir={bucket}/run", "--preflight", f"--config.data.manifest={manifest}",
        **emulator.env,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"emulator at {emulator.host}" in done.stdout
    written = [r for r in emulator.requests() if r.startswith("POST")]
    for name in ("preflight.json", "canvases.png", "masks.png"):
      assert any(f"run/preflight/{name}" in r for r in written)
    done = command(
        "--workdir=gs://no-such-bucket/run", "--preflight=1",
        "--config.data.threads=0", **emulator.env,
    )
  assert done.returncode == 2
  assert "FAIL  workdir" in done.stdout and "FAIL  config" in done.stdout
