"""Claims of readers/apart.py: work in a helper process."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from vjepa_jax.data.readers import apart
from vjepa_jax.data.record import ReadError


def call(function, *args, timeout_s=30.0):
  return apart.call(function, *args, source="scan.x", timeout_s=timeout_s)


def reason(function, *args, **how) -> str:
  with pytest.raises(ReadError, match="scan.x") as caught:
    call(function, *args, **how)
  return caught.value.reason


def test_large_arrays_and_bytes_go_and_come_whole():
  content = np.random.default_rng(0).bytes(3_000_001)
  assert call(bytes, content) == content
  array = call(np.full, (300, 4000), 7, "uint16")
  assert array.shape == (300, 4000) and array.dtype == np.uint16
  array += 1  # It is ours to change.
  assert array.min() == array.max() == 8


def test_what_hangs_is_ended_and_the_next_call_is_served():
  start = time.monotonic()
  assert reason(time.sleep, 60, timeout_s=0.5) == "timed_out"
  assert time.monotonic() - start < 20
  assert call(max, 3, 4) == 4


def test_a_helper_that_was_stopped_does_not_hold_its_caller(monkeypatch):
  monkeypatch.setattr(apart, "_GRACE_S", 0.5)
  pid = call(os.getpid)
  os.kill(pid, signal.SIGSTOP)
  assert reason(max, 3, 4, timeout_s=0.5) == "timed_out"
  monkeypatch.undo()
  assert call(os.getpid) != pid


def test_a_helper_that_cannot_start_is_not_the_fault_of_the_file():
  code = (
      "import sys\n"
      "from vjepa_jax.data.readers import apart\n"
      "sys.executable = '/bin/false'\n"
      "try: apart.call(max, 3, 4, source='scan.x', timeout_s=30.0)\n"
      "except RuntimeError as error: print(error)\n"
  )
  run = subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert "/bin/false ended with 1" in run.stdout


def test_what_dies_is_an_error_and_the_next_call_is_served():
  assert reason(os.abort) == "decoder_died"
  assert reason(os._exit, 0) == "decoder_died"
  assert call(max, 3, 4) == 4


def test_memory_beyond_what_is_allowed_is_an_error():
  assert reason(np.ones, 2**29) == "too_large"
  assert call(np.ones, 2**20).size == 2**20


def test_other_exceptions_are_one_error_and_our_own_pass():
  assert reason(int, "x") == "decode_failed"
  error = ReadError("scan.x", "colour", "red")
  assert reason(_raise, error) == "colour"


def _raise(error: Exception) -> None:
  raise error


def test_a_helper_is_kept_for_the_next_file():
  assert call(os.getpid) == call(os.getpid) != os.getpid()


def test_threads_have_helpers_of_their_own():
  barrier, found = threading.Barrier(2), []

  def work():
    barrier.wait()
    call(time.sleep, 0.2)
    found.append(call(os.getpid))

  threads = [threading.Thread(target=work) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(found) == 2 and os.getpid() not in found


def test_no_helper_outlives_its_parent():
  code = (
      "import os, sys\nfrom vjepa_jax.data.readers import apart\n"
      "print(apart.call(os.getpid, source='x', timeout_s=30), flush=True)\n"
      "os.kill(os.getpid(), 9)\n"
  )
  ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  helper = int(ran.stdout)
  for _ in range(100):
    if not os.path.exists(f"/proc/{helper}"):
      return
    with open(f"/proc/{helper}/stat") as file:
      if file.read().split(")")[1].split()[0] == "Z":
        return  # Gone; this container's first process reaps nobody.
    time.sleep(0.1)
  pytest.fail("the helper still runs")


def test_a_fork_starts_helpers_of_its_own_whatever_a_thread_was_doing():
  call(max, 1, 2)
  with apart._lock:  # As where another thread has it at that moment.
    child = os.fork()
    if not child:
      signal.alarm(60)
      os._exit(0 if call(os.getppid) == os.getpid() else 1)
  assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
  assert call(max, 3, 4) == 4
