"""The study of embryos: its runs are sound, each is made once, its tables tell all."""

import json
import sys

from absl import flags
from ml_collections import config_flags
import pytest

from vjepa_jax import config as config_lib
from vjepa_jax.bench import embryos

NUMBER = {"first": 0.2, "last": 0.5, "interval": [0.4, 0.6]}
REPORT = {"numbers": {
    "reconstruction.error_over_variance": NUMBER, "stages.accuracy": NUMBER,
    "stages.impossible_raw": {"first": 90.0, "last": 7.0, "interval": None},
    **{f"stage_probe.{name}{count}": NUMBER
       for name in ("accuracy", "intensity", "radial") for count in ("", "_1", "_3")},
}}


@pytest.fixture
def parsed(monkeypatch):
  def parse(command):
    with monkeypatch.context() as patch:
      patch.setattr(sys, "argv", command[2:])  # Where overrides are looked for.
      return read(command)

  return parse


def read(command):
  """Returns the config that main would see."""
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file("config", flag_values=values)
  flags.DEFINE_string("workdir", None, "", flag_values=values)
  values(command[2:])
  return values[holder.name].value


@pytest.mark.parametrize("name", [embryos.PRETRAINED, *embryos.VARIATIONS])
def test_every_run_is_a_sound_config_of_its_seed(name, parsed, tmp_path):
  command = embryos.command(name, 3, tmp_path)
  config = parsed(command)
  config_lib.check_config(config, device_count=1)
  assert config.seed == 3
  tuned = name in embryos.VARIATIONS and embryos.VARIATIONS[name].tuned
  begin = str(tmp_path / "pretrained_seed3") if tuned else ""
  assert config.train.get("start_from", "") == begin


def test_variations_differ_from_one_another(parsed, tmp_path):
  configs = [str(parsed(embryos.command(n, 0, tmp_path))) for n in embryos.VARIATIONS]
  assert len(set(configs)) == len(configs)


def test_a_run_that_is_there_is_not_made_again(tmp_path, monkeypatch):
  called = []

  def make(command, **unused):
    called.append(command)
    workdir = embryos.run_folder(tmp_path, "joint", 0)
    (workdir / "report.json").write_text(json.dumps(REPORT))
    return 0

  monkeypatch.setattr(embryos.subprocess, "call", make)
  for _ in range(2):
    assert embryos.run("joint", 0, tmp_path, ["--x"]) == REPORT["numbers"]
  assert len(called) == 1 and called[0][-1] == "--x"


def test_a_run_that_fails_names_its_log(tmp_path, monkeypatch):
  monkeypatch.setattr(embryos.subprocess, "call", lambda *unused, **more: 2)
  with pytest.raises(RuntimeError, match="exit code 2; see .*joint_seed1/log.txt"):
    embryos.run("joint", 1, tmp_path)


def test_the_tables_hold_every_run_with_its_interval():
  numbers = REPORT["numbers"]
  lines = embryos.probe_table({0: numbers, 1: numbers})
  assert len(lines) == 2 + 2 * 3
  assert lines[2] == "| 0 | 0.500 | 1 | 0.500 (0.400 .. 0.600) | 0.200 | 0.500 | 0.500 |"
  lines = embryos.tuned_table({"joint": {0: numbers, 1: numbers}})
  assert lines[2:] == [
      "| from scratch, joint attention | 0.500 (0.400 .. 0.600); 0.500 (0.400 .. 0.600) "
      "| 7, 7 |"
  ]
