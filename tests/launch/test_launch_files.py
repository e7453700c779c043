"""What linters say of the launch scripts, and what the images promise."""

import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script, linter):
  done = subprocess.run(
      [linter("shellcheck"), "-x", "-P", ROOT, script], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout


def test_the_dockerfile_passes_hadolint(linter):
  done = subprocess.run(
      [linter("hadolint"), LAUNCH / "Dockerfile"], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
def test_images_have_a_target_a_machine_that_is_not_root(target):
  text = (LAUNCH / "Dockerfile").read_text()
  stage = text.split(f"FROM base AS {target}\n")[1].split("\nFROM ")[0]
  assert f'".[{target},' in stage
  assert f'"{target}": [' in (ROOT / "setup.py").read_text()
  assert re.search(r"^USER 1000$", stage, re.MULTILINE)
  assert 'ENTRYPOINT ["python", "-m", "vjepa_jax.main"]' in stage
  assert "FROM python:${PYTHON}-slim AS base" in text and "ARG PYTHON=3.11" in text


def test_the_builder_gets_what_is_copied_and_nothing_else():
  ignored = (ROOT / ".dockerignore").read_text().splitlines()
  allowed = {line[1:] for line in ignored if line.startswith("!")}
  copied = {
      word for line in (LAUNCH / "Dockerfile").read_text().splitlines()
      if line.startswith("COPY ") for word in line.split()[1:-1]
  }
  assert ignored[1] == "*" and copied == allowed
  assert all((ROOT / name).exists() for name in allowed)
