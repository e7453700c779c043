"""What every benchmark shares: how to repeat, and the one JSON line it prints."""

from collections.abc import Callable, Mapping, Sequence
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import time
from typing import Any

import jax
import numpy as np

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "grain")


def repeat(
    call: Callable[[], Any], *, repeats: int = 10, warmup: int = 2
) -> tuple[list[float], list[float]]:
  """Times a call whose result is waited for.

  Args:
    call: returns the arrays that are done when the work is done.
    repeats: timed calls, at least 5.
    warmup: calls before, untimed: compilation and caches.

  Returns:
    (wall seconds, CPU seconds of this process), one each a timed call.

  Raises:
    ValueError: fewer than 5 repeats, or no warm-up.
  """
  if repeats < 5 or warmup < 1:
    raise ValueError(
        f"bench: repeats={repeats}, warmup={warmup}; at least 5 and 1 are needed for "
        "a spread without compilation"
    )
  for _ in range(warmup):
    jax.block_until_ready(call())
  wall, cpu = [], []
  for _ in range(repeats):
    begin, begin_cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    wall.append(time.perf_counter() - begin)
    cpu.append(time.process_time() - begin_cpu)
  return wall, cpu


def line(
    name: str,
    config: str,
    wall: Sequence[float],
    cpu: Sequence[float],
    *,
    unit: str = "s",
    **more: Any,
) -> dict[str, Any]:
  """Joins a benchmark's numbers with what they were taken on.

  Args:
    name: of the benchmark.
    config: what was measured, such as FILE:ARG.
    wall: values of the repeats, in `unit`.
    cpu: CPU seconds of the repeats.
    unit: of `wall`.
    **more: further numbers of the benchmark.

  Returns:
    name, config, commit, device, versions, unit, median, p10, p90, repeats,
    cpu_seconds (median), load (1 minute, before the report) and `more`. On a
    machine with a load above 1 compare CPU seconds, not the wall.
  """
  p10, median, p90 = np.percentile(wall, [10, 50, 90])
  device = jax.devices()[0]
  return {
      "name": name, "config": config, "commit": _commit(),
      "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
      "cpu": f"{os.cpu_count()} x {platform.machine()}",
      "versions": {p: importlib.metadata.version(p) for p in _PACKAGES},
      "unit": unit, "median": median, "p10": p10, "p90": p90, "repeats": len(wall),
      "cpu_seconds": float(np.median(cpu)), "load": os.getloadavg()[0], **more,
  }


def emit(numbers: Mapping[str, Any]) -> None:
  """Prints the one JSON line."""
  print(json.dumps(numbers), flush=True)


def _commit() -> str | None:
  """The source's commit, marked where it was changed; None outside a repository."""
  root = pathlib.Path(__file__).resolve().parents[2]
  git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
  try:
    done = subprocess.run(git, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return None
  return done.stdout.strip()
