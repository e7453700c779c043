"""Compiled programs outlive a process, and no trouble with them ends a run."""

import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import jax, jax.numpy as jnp
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
jax.jit(lambda x: x + 1)(jnp.ones(2))  # before anybody has said where
from vjepa_jax.train import compiled
folder = compiled.keep_programs(sys.argv[1] or None)
print("folder", folder)
print("value", float(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((3, 3))).sum()))
print("hits", found.count("/jax/compilation_cache/cache_hits"))
"""


def run(folder, cache, **env):
  env = {
      **{k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"},
      "PYTHONPATH": os.getcwd(), "VJEPA_JAX_CACHE": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **env,
  }
  done = subprocess.run(
      [sys.executable, "-c", PROGRAM, str(folder)], env=env, capture_output=True,
      text=True, timeout=120,
  )
  assert done.returncode == 0, done.stderr
  said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
  assert said["value"].startswith("22.7")
  return said | {"all": done.stdout + done.stderr}


def entries(folder):
  return sorted(pathlib.Path(folder).glob("*-cache"))


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
  first = run("auto", tmp_path)
  assert first["folder"] == str(tmp_path / "compiled") and first["hits"] == "0"
  assert entries(tmp_path / "compiled")
  assert int(run("auto", tmp_path)["hits"]) > 0


@pytest.mark.parametrize("content", [b"", b"no program", None])
def test_damaged_entries_are_compiled_again(tmp_path, content):
  run("auto", tmp_path)
  for path in entries(tmp_path / "compiled"):
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(half if content is None else content)
  run("auto", tmp_path)


def test_a_folder_that_cannot_be_made_is_told_and_done_without(tmp_path):
  (tmp_path / "compiled").write_text("a file where the folder should be")
  assert "not kept" in run("auto", tmp_path)["all"]


def test_what_the_user_gave_to_jax_goes_first(tmp_path):
  own = tmp_path / "own"
  said = run("auto", tmp_path, JAX_COMPILATION_CACHE_DIR=str(own))
  assert said["folder"] == str(own) and not (tmp_path / "compiled").exists()
  assert entries(own)


def test_none_keeps_nothing(tmp_path):
  assert run("", tmp_path)["folder"] == "None"
  assert not (tmp_path / "compiled").exists()
