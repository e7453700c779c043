"""The benchmarks that need no device: what compiles, how long, in how many bytes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from vjepa_jax import config as config_lib
from vjepa_jax.bench import clip_length, masking, memory

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


def test_lengths_are_also_those_of_a_frame_where_attention_is_divided():
  masks = {"tubes": dict(context=0.1, target=0.9)}
  found = memory.lengths({"objective": {"masks": masks}}, 32 * 13312, 32)
  assert {32 * 13312, 13312} <= found
  assert not found & {1331, 1408}  # too few: could be a width


def worm(arm):
  return config_lib.as_plain(config_lib.load(f"{ROOT / 'configs' / 'worm_mae'}.py:{arm}"))


@pytest.mark.parametrize("keep, visible", [(0.1, 120), (0.25, 300), (1.0, 1199), (1e-9, 1)])
def test_masks_show_whole_places_and_ask_for_all_others(keep, visible):
  plain = masking.showing(worm(""), keep)
  tubes = plain["objective"]["masks"]["tubes"]
  assert (tubes["context"], tubes["target"]) == (16 * visible, 16 * (1200 - visible))
  assert tubes["kind"] == "tube"


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1])
def test_a_share_that_is_none_is_refused(keep):
  with pytest.raises(ValueError, match="keep"):
    masking.showing(worm(""), keep)


def test_a_longer_clip_is_seen_whole():
  for arm in ("", "literal"):
    plain = clip_length.lasting(worm(arm), 40)
    assert config_lib.model_grid(plain).dims[0] == 40
    assert plain["data"]["clip"]["stride"] == 1


@pytest.mark.slow
def test_steps_that_see_less_take_less():
  done = subprocess.run(
      [
          sys.executable, "-m", "vjepa_jax.bench.masking", "--keep=0.1,1",
          "--config=configs/worm_mae.py:tiny", "--config.data.canvas=(16,32,32)",
          "--repeats=5",
      ],
      cwd=ROOT, capture_output=True, text=True, timeout=280,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found["visible"] == [[4 * 26], [4 * 255]] and found["tokens"] == 1024
  assert found["cpu_ratios"][0] < found["cpu_ratios"][1] == 1.0


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
