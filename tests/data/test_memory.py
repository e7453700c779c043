"""Claims of data/memory.py, in processes of their own: it changes the whole of one."""

import platform
import subprocess
import sys

import pytest

from vjepa_jax.data import memory

CODE = """
import concurrent.futures, resource, sys
from vjepa_jax.data import memory
if sys.argv[1] == "kept":
  memory.keep_large_blocks()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use = lambda n: (b"x" * 58_000_000)[n]  # numpy asks for huge pages by itself
with concurrent.futures.ThreadPoolExecutor(4) as pool:
  list(pool.map(use, range(8)))
  before = faults()
  list(pool.map(use, range(24)))
  print((faults() - before) // 24, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def used(how):
  done = subprocess.run(
      [sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True,
      env={"PYTHONPATH": ":".join(sys.path)},
  )
  return map(int, done.stdout.split())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_large_blocks_are_kept_by_threads_and_the_peak_stays_bounded():
  faults, peak = used("fresh")
  assert faults > 10_000
  fewer, kept_peak = used("kept")
  assert fewer < faults / 4
  assert kept_peak < peak + 2 * 58_000


def test_where_there_is_no_such_allocator_nothing_happens(monkeypatch):
  class Other:
    pass

  monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Other())
  memory.keep_large_blocks()
