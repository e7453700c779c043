"""Decoding in a process of its own, which may die, hang or grow without harm.

Decoders written in C meet files that nobody checked. A helper process does such
work with a clock and a ceiling of memory; it is kept for the next file, and a new
one is started where it fell.
"""

from collections.abc import Callable
import contextlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
from typing import Any

from vjepa_jax.data.record import ReadError

_SIZES = struct.Struct("<Q")
# Above what holds the file: the libraries and their tables, before a header is known.
_START_BYTES = 1 << 30
# Beyond the clock of the helper itself, which does not run while it starts.
_GRACE_S = 60.0
# Above what a header claims: one step of decoding, and little for a bomb.
_SPARE_BYTES = 1 << 28
_idle: list["_Helper"] = []
_lock = threading.Lock()
_limited = False


def call(
    function: Callable[..., Any], *args: Any, source: str, timeout_s: float
) -> Any:
  """Calls a function of this package in a helper process and returns its result.

  Args:
    function: importable by its name; its arguments and result can be pickled.
    *args: bytes among them are sent without a copy, and arrive as bytearray.
    source: the path, for messages.
    timeout_s: seconds of wall time before the helper is killed.

  Raises:
    ReadError: as the function raised it; timed_out, decoder_died, too_large for
      memory; decode_failed for any other exception.
    RuntimeError: where no helper can be started, which is not the file's fault.
  """
  helper = _take()
  try:
    answer = helper.ask(function, args, timeout_s)
  except TimeoutError as error:
    helper.close()
    raise ReadError(
        source, "timed_out", f"no answer after {timeout_s + _GRACE_S:g} s"
    ) from error
  except MemoryError as error:
    helper.close()
    raise ReadError(source, "too_large", "not enough memory for its voxels") from error
  except (OSError, EOFError) as error:
    died = helper.close()
    if died == -signal.SIGALRM:
      raise ReadError(source, "timed_out", f"not done after {timeout_s:g} s") from error
    raise ReadError(
        source, "decoder_died", f"the decoding process ended with {died}"
    ) from error
  except BaseException:
    helper.close()
    raise
  with _lock:
    _idle.append(helper)
  kind, value = answer
  if kind == "result":
    return value
  if isinstance(value, ReadError):
    raise value
  raise ReadError(source, *value)


def allow(extra_bytes: int) -> None:
  """Lets the process grow by this much more than it is; only in a helper.

  A reader calls it once the header is known, with what the header claims.
  """
  if not _limited:
    return
  import resource

  with open("/proc/self/statm", encoding="ascii") as file:
    held = int(file.read().split()[0]) * resource.getpagesize()
  hard = resource.getrlimit(resource.RLIMIT_AS)[1]
  wanted = held + int(extra_bytes) + _SPARE_BYTES
  if hard != resource.RLIM_INFINITY:
    wanted = min(wanted, hard)
  resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


class _Helper:
  """One helper process and the socket to it."""

  def __init__(self):
    self._socket, far = socket.socketpair()
    self._started = False
    paths = [p for p in sys.path if isinstance(p, str)]
    start = (
        f"import sys; sys.path[:] = {json.dumps(paths)}; "
        "from vjepa_jax.data.readers import apart; "
        f"apart._serve({far.fileno()})"
    )
    with far:
      self._process = subprocess.Popen(
          [sys.executable, "-c", start], pass_fds=(far.fileno(),),
          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
          stderr=subprocess.DEVNULL,
      )

  def ask(self, function, args, timeout_s) -> tuple[str, Any]:
    self._socket.settimeout(timeout_s + _GRACE_S)
    if not self._started:
      self._await_start()
    _send(self._socket, (function, args, timeout_s))
    return _receive(self._socket)

  def _await_start(self) -> None:
    try:
      _exactly(self._socket, 1)
    except (OSError, EOFError) as error:
      raise RuntimeError(
          f"no helper process to decode in: {sys.executable} ended with "
          f"{self.close()} before it had imported {__name__}"
      ) from error
    self._started = True

  def alive(self) -> bool:
    return self._process.poll() is None

  def close(self) -> int:
    """Ends the process; returns its exit status, minus the signal's number."""
    self._socket.close()
    try:
      # A helper that fell is gone at once; one that only lost us may still work.
      return self._process.wait(1)
    except subprocess.TimeoutExpired:
      self._process.kill()
      return self._process.wait()


def _take() -> _Helper:
  while True:
    with _lock:
      if not _idle:
        break
      helper = _idle.pop()
    if helper.alive():
      return helper
    helper.close()
  return _Helper()


def _forget() -> None:
  """After a fork: the helpers are the parent's, and so is a lock that was held."""
  global _lock
  _lock = threading.Lock()
  for helper in _idle:
    helper._socket.close()
    helper._process.returncode = 0  # Not this process's to wait for.
  _idle.clear()


os.register_at_fork(after_in_child=_forget)


def _serve(descriptor: int) -> None:
  """Answers calls until the other side is gone."""
  global _limited
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  # The default of this signal ends the process, whatever C code it is in.
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  _limited = os.path.exists("/proc/self/statm")
  channel = socket.socket(fileno=descriptor)
  with contextlib.suppress(OSError, EOFError):
    channel.sendall(b"\0")  # Started.
    while True:
      allow(1 << 40)  # Between calls there is no limit.
      function, args, timeout_s = _receive(channel)
      signal.setitimer(signal.ITIMER_REAL, timeout_s)
      allow(_START_BYTES)
      # What was sent beside the pickle comes as a view; slices of it are no bytes.
      answer = _answer(
          function, [a.obj if isinstance(a, memoryview) else a for a in args]
      )
      allow(1 << 40)
      _send(channel, answer)
      signal.setitimer(signal.ITIMER_REAL, 0)
      del function, args, answer


def _answer(function: Callable[..., Any], args: list[Any]) -> tuple[str, Any]:
  try:
    return "result", function(*args)
  except ReadError as error:
    return "error", error
  except MemoryError:
    return "error", (
        "too_large", "decoding needs more memory than what the header claims",
    )
  except Exception as error:  # Each library raises its own kinds.
    return "error", ("decode_failed", f"{type(error).__name__}: {str(error)[:300]}")


def _send(channel: socket.socket, message: Any) -> None:
  buffers: list[pickle.PickleBuffer] = []
  head = pickle.dumps(_wrap(message), protocol=5, buffer_callback=buffers.append)
  parts = [memoryview(head), *(b.raw() for b in buffers)]
  sizes = b"".join(_SIZES.pack(part.nbytes) for part in parts)
  channel.sendall(_SIZES.pack(len(parts)) + sizes)
  for part in parts:
    channel.sendall(part)


def _wrap(message: Any) -> Any:
  """Marks the bytes of a call's arguments as sent apart from the pickle."""
  if len(message) == 3:
    function, args, timeout_s = message
    return function, tuple(
        pickle.PickleBuffer(a) if isinstance(a, bytes) else a for a in args
    ), timeout_s
  return message


def _receive(channel: socket.socket) -> Any:
  (count,) = _SIZES.unpack(_exactly(channel, _SIZES.size))
  sizes = struct.unpack(f"<{count}Q", _exactly(channel, _SIZES.size * count))
  head, *buffers = [_exactly(channel, size) for size in sizes]
  return pickle.loads(head, buffers=buffers)


def _exactly(channel: socket.socket, size: int) -> bytearray:
  content = bytearray(size)
  view, at = memoryview(content), 0
  while at < size:
    got = channel.recv_into(view[at:])
    if not got:
      raise EOFError
    at += got
  return content
