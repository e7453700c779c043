"""The benchmarks that need no device: what compiles, how long, in how many bytes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from vjepa_jax.bench import memory

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = """HloModule jit_step

ENTRY %main (x: f32[2,4]) -> f32[2,4] {
  %x = f32[2,4]{1,0} parameter(0)
  %scores = bf16[1,512,512]{2,1,0} broadcast(%x)
  %fine = bf16[512,768,3]{2,1,0} broadcast(%x)
  ROOT %y = f32[2,4]{1,0} copy(%x)
}
"""


def test_an_array_with_two_axes_of_tokens_is_found():
  assert memory.squares(TEXT, {512, 300}) == ["bf16[1, 512, 512]"]
  assert memory.squares(TEXT, {768}) == []


def test_lengths_are_those_of_encoders_and_predictor():
  masks = {"a": dict(context=0.25, target=0.5), "b": dict(context=0.05, target=0.7)}
  assert memory.lengths({"objective": {"masks": masks}}, 9216) == {
      9216, 2304, 6912, 461 + 6451, 54 * 128
  }


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_has_compiled(tmp_path):
  def run():
    done = subprocess.run(
        [
            sys.executable, "-m", "vjepa_jax.bench.compile",
            "--config=configs/oct_multi.py:tiny", f"--cache={tmp_path}",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

  programs = lambda: {path.name for path in tmp_path.iterdir() if "atime" not in path.name}
  first = run()
  kept = programs()
  again = run()
  assert kept and programs() == kept
  assert again["cpu_s"] < first["cpu_s"]
