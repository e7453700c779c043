"""--preflight finds all that would stop a run, and stops for none of it."""

import json
import os
import pathlib
import subprocess
import sys

import cv2
import pydicom
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
  folder = tmp_path / "run" / "preflight"
  found = json.loads((folder / "preflight.json").read_text())
  assert [f["name"] for f in found] == [f.name for f in table.findings][:-1]
  for name in ("canvases.png", "masks.png"):
    assert cv2.imread(str(folder / name)).std() > 10


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
  monkeypatch.setattr(preflight, "_check_step", lambda *unused: None)
  rows = [line.split("\t") for line in manifest.read_text().splitlines()]
  place = rows[0].index("filepath")
  dataset = pydicom.dcmread(manifest.parent / rows[1][place].strip("/"))
  # A movie, which no DICOM decoder opens.
  dataset.file_meta.TransferSyntaxUID = pydicom.uid.MPEG4HP41
  dataset.PixelData = pydicom.encaps.encapsulate([b"\0" * 64])
  dataset["PixelData"].VR = "OB"
  dataset["PixelData"].is_undefined_length = True
  dataset.save_as(manifest.parent / "movie.dcm", enforce_file_format=True)
  rows[1][place] = "/movie.dcm"
  own = manifest.with_name("movie.tsv")
  own.write_text("\n".join("\t".join(row) for row in rows) + "\n")
  config = load(own, max_bad_fraction=0.9)
  table = preflight.run(config, tmp_path, volumes=60, say=lambda text: None)
  (line,) = [f for f in lines(table, "volume") if f.status == preflight.FAIL]
  assert "movie.dcm: no_decoder" in line.detail and table.faults == 2


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
def test_a_sound_run_in_a_bucket_has_no_fault_and_is_described(manifest):
  with buckets.start() as emulator:
    bucket = emulator.make_bucket()
    done = command(
        f"--workdir={bucket}/run", "--preflight", f"--config.data.manifest={manifest}",
        **emulator.env,
    )
    written = [r for r in emulator.requests() if r.startswith("POST")]
    refused = command(
        "--workdir=gs://no-such-bucket/run", "--preflight=1",
        "--config.data.threads=0", **emulator.env,
    )
  assert done.returncode == 0 and "FAIL" not in done.stdout, done.stdout + done.stderr
  assert f"emulator at {emulator.host}" in done.stdout
  told = {line[6:19].strip(): line for line in done.stdout.splitlines()}
  assert set(told) >= {
      "config", "credentials", "workdir", "manifest", "devices", "decoders", "volumes",
      "canvases", "units", "batch", "augment", "masks", "figures", "one volume",
      "reading", "state", "memory", "a step", "preflight",
  }
  assert "Explicit VR Little Endian uint8 x" in told["decoders"]
  assert "8 volumes of 32 tokens" in told["batch"]
  # Nothing of a run: neither data are quarantined nor is a step taken.
  names = {r.split("/run/")[1].split("?")[0] for r in written if "/run/preflight/" in r}
  assert names == {
      f"preflight/{name}" for name in ("canvases.png", "masks.png", "preflight.json")
  }
  probes = [r for r in written if "/run/" in r and "/run/preflight/" not in r]
  assert all("/run/preflight_" in r for r in probes)
  assert refused.returncode == 2
  assert "FAIL  workdir" in refused.stdout and "FAIL  config" in refused.stdout


def test_movies_with_stages_for_labels_are_tried_as_clips(tmp_path, monkeypatch):
  monkeypatch.setenv("VJEPA_JAX_CACHE", str(tmp_path / "cache"))
  config = config_lib.load("configs/worm_stages.py:tiny")
  table = preflight.run(config, tmp_path / "run", volumes=2, say=lambda line: None)
  assert [f for f in table.findings if f.status == preflight.FAIL] == []
  assert "parameters" in lines(table, "state")[0].detail
