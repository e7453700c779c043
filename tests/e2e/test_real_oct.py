"""The script on real OCT: skips without its file, runs with it."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*flags):
  return subprocess.run(
      [sys.executable, "-m", "vjepa_jax.bench.real_oct", *flags],
      cwd=ROOT, capture_output=True, text=True, timeout=600,
  )


@pytest.mark.slow
def test_without_the_pullback_it_says_so(tmp_path):
  done = run(f"--data={tmp_path / 'absent.npz'}")
  assert done.returncode == 0 and not done.stdout
  assert "skipped" in done.stderr and "--data=" in done.stderr


@pytest.mark.slow
def test_on_the_pullback_it_prints_one_line_with_every_question(shared):
  path = shared("data/ivoct_pullback_186x250x250.npz")
  done = run(f"--data={path}", "--steps=3", "--seeds=4")
  assert done.returncode == 0, done.stderr
  (result,) = json.loads(done.stdout)["seeds"]
  assert result["seed"] == 4
  for question in ("far.lumen", "near.lumen", "near.cap", "near.lipid"):
    for kind in ("trained", "untrained+position", "intensity", "position"):
      assert -1.0 <= result[f"{question}.{kind}"] <= 1.0
