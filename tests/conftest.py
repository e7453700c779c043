"""Fixtures shared by all tests."""

import os
import pathlib
import signal

import pytest

# Nearly all of a small model's test is compiling it; unoptimised code compiles in
# 0.4 of the time. Set before jax is imported; a run of one's own may set XLA_FLAGS.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests that were started in the background inherit an ignored SIGINT, and would pass
# it on to what they interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared():
  """Returns shared(relative path) -> Path of a file that lies beside a checkout."""
  root = pathlib.Path(os.environ.get("VJEPA_JAX_SHARED", "../shared")).resolve()

  def find(relative: str) -> pathlib.Path:
    path = root / relative
    if path.exists():
      return path
    message = f"{relative} is not under VJEPA_JAX_SHARED (fixtures are not published)"
    if os.environ.get("CI", "").lower() == "true":
      pytest.fail(message)
    pytest.skip(message)

  return find


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
  """Returns the environment by which all runs of a session share compiled programs."""
  home = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    home = home.parent  # of all workers
  return {
      "JAX_COMPILATION_CACHE_DIR": str(home / "programs"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
  }
