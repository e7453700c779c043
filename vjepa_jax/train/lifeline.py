"""One connection from every process to process 0: who came, who was lost, when to stop.

A killed process closes its connection within milliseconds, and a machine that is gone
misses its beats; neither needs the accelerator, whose collectives would only hang.
"""

from collections.abc import Callable, Mapping
import contextlib
import json
import os
import queue
import selectors
import socket
import sys
import threading
import time
from typing import Any, NoReturn

LOST = 76  # Exit code: another process was lost; the same command goes on.
_BEAT_S = 1.0
_HELLO_S = 10.0
_LEAVING_S = 2.0
# Exit codes that say what the others should end with as well: what a new start does not
# cure must not look on another host as what it does.
_TELLING = (1, 2, 75)


class MissingError(ConnectionError):
  """Not all processes came in time; says which."""


class RefusedError(ValueError):
  """The processes do not belong together; says why."""


class Peer:
  """A connection that carries one JSON object a line."""

  def __init__(self, sock: socket.socket):
    self.sock = sock
    self.heard = time.monotonic()
    self._rest, self._early = b"", []
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

  def send(self, **message: Any) -> None:
    """Sends; that the other side is gone is found out by reading."""
    with contextlib.suppress(OSError):
      self.sock.sendall(json.dumps(message).encode() + b"\n")

  def read(self) -> list[dict[str, Any]] | None:
    """Returns the messages that came, waiting for some bytes; None: it has closed."""
    try:
      found = self.sock.recv(65536)
    except TimeoutError:
      raise
    except OSError:
      return None
    if not found:
      return None
    self.heard = time.monotonic()
    *lines, self._rest = (self._rest + found).split(b"\n")
    early, self._early = self._early, []
    return early + [json.loads(line) for line in lines]

  def read_one(self, timeout_s: float) -> dict[str, Any] | None:
    """Returns the next message; None where it closed or kept silent."""
    self.sock.settimeout(timeout_s)
    try:
      while (found := self.read()) is not None:
        if found:
          self._early = found[1:]
          return found[0]
    except (TimeoutError, ValueError):
      pass
    return None


def host_processes(
    port: int,
    facts: Mapping[str, Any],
    processes: int,
    *,
    timeout_s: float,
    check: Callable[[Mapping[int, Mapping[str, Any]]], str | None],
    answer: Callable[[Mapping[int, Mapping[str, Any]]], dict[str, Any]],
) -> tuple[dict[int, Peer], dict[str, Any]]:
  """Waits, as process 0, for all the others.

  Args:
    port: to listen on.
    facts: of this process; `host` and `pid` name it in messages.
    processes: how many there are.
    timeout_s: how long they may take.
    check: facts of all processes -> why they cannot run together, or None.
    answer: facts of all processes -> what all get; called once all is well.

  Returns:
    (process -> its connection, answer).

  Raises:
    MissingError: names the processes that did not come.
    RefusedError: two have one number, they disagree about how many they are, what
      `check` found, or the port is taken.
  """
  came: queue.Queue[tuple[Peer, dict[str, Any]]] = queue.Queue()
  met: list[Peer] = []
  with _listen(port) as server:
    threading.Thread(target=_accept, args=(server, came), daemon=True).start()
    try:
      peers, known = _gather(came, met, facts, processes, timeout_s)
      fault = check(known)
      if fault:
        raise RefusedError(fault)
      told = answer(known)
    except (MissingError, RefusedError) as error:
      for peer in met:
        peer.send(refused=str(error), missing=isinstance(error, MissingError))
      raise
    finally:
      # A thread that waits in `accept` would keep the port open after `close`.
      with contextlib.suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)
  for peer in peers.values():
    peer.send(go=told)
  return peers, told


def join_process(
    address: str,
    process: int,
    facts: Mapping[str, Any],
    processes: int,
    *,
    timeout_s: float,
) -> tuple[Peer, dict[str, Any]]:
  """Joins process 0, and waits until it says how to go on.

  Args:
    address: HOST:PORT of process 0.
    process: number of this process.
    facts: of this process.
    processes: how many there are.
    timeout_s: how long process 0 may take to listen.

  Returns:
    (connection to process 0, its answer).

  Raises:
    MissingError: process 0, or another, did not come.
    RefusedError: what process 0 found wrong.
  """
  host, _, port = address.rpartition(":")
  deadline, why = time.monotonic() + timeout_s, "nobody listens there"
  while time.monotonic() < deadline:
    try:
      sock = socket.create_connection((host.strip("[]"), int(port)), timeout=5.0)
    except OSError as error:
      why = str(error)
      time.sleep(0.1)
      continue
    peer = Peer(sock)
    peer.send(process=process, processes=processes, facts=dict(facts))
    verdict = peer.read_one(timeout_s + _HELLO_S)
    if verdict is None:  # Process 0 was started again.
      sock.close()
      time.sleep(0.1)
      continue
    if "refused" in verdict:
      kind = MissingError if verdict["missing"] else RefusedError
      raise kind(verdict["refused"])
    return peer, verdict["go"]
  raise MissingError(
      f"process 0 was not found at {address} within {timeout_s:g} s ({why}): it was "
      "not started, the address is another, or a firewall is in between"
  )


def _listen(port: int) -> socket.socket:
  dual = socket.has_dualstack_ipv6()
  try:
    return socket.create_server(
        ("", port), family=socket.AF_INET6 if dual else socket.AF_INET,
        dualstack_ipv6=dual, backlog=1024,
    )
  except OSError as error:
    raise RefusedError(
        f"process 0 cannot listen on port {port}: {error}; end the run that has it, or "
        "give all processes another port in --coordinator"
    ) from error


def _accept(server: socket.socket, came: queue.Queue) -> None:
  def greet(sock: socket.socket) -> None:
    peer = Peer(sock)
    hello = peer.read_one(_HELLO_S)
    if isinstance(hello, dict) and hello.keys() >= {"process", "processes", "facts"}:
      came.put((peer, hello))

  with contextlib.suppress(OSError):  # It is closed once all are there.
    while True:
      sock, _ = server.accept()
      threading.Thread(target=greet, args=(sock,), daemon=True).start()


def _gather(came, met, facts, processes, timeout_s):
  """Returns (process -> connection, process -> facts) once all came; fills `met`."""
  deadline = time.monotonic() + timeout_s
  peers: dict[int, Peer] = {}
  known = {0: dict(facts)}
  while len(known) < processes:
    try:
      peer, hello = came.get(timeout=max(deadline - time.monotonic(), 0))
    except queue.Empty:
      raise MissingError(_missing(known, processes, timeout_s)) from None
    met.append(peer)
    number, name = hello["process"], _named(hello["facts"])
    if hello["processes"] != processes:
      raise RefusedError(
          f"process {number} ({name}) was started as one of {hello['processes']} "
          f"processes, process 0 as one of {processes}; start all of them with the "
          "same number"
      )
    if number in known and not _has_closed(peers, number):
      raise RefusedError(
          f"two processes say that they are process {number}: {_named(known[number])} "
          f"and {name}; each number from 0 to {processes - 1} must come once"
      )
    peers[number], known[number] = peer, hello["facts"]
  return peers, known


def _missing(known, processes, timeout_s) -> str:
  missing = sorted(set(range(processes)) - set(known))
  here = ", ".join(f"{n} ({_named(known[n])})" for n in sorted(known))
  return (
      f"process(es) {', '.join(map(str, missing))} of {processes} did not come within "
      f"{timeout_s:g} s; here: {here}. Look at the logs of the missing, or give them "
      "longer with --start_timeout_s"
  )


def _has_closed(peers: Mapping[int, Peer], number: int) -> bool:
  """Says whether an earlier process of this number is gone, as after a restart."""
  if number not in peers:
    return False
  sock = peers[number].sock
  sock.settimeout(0.0)
  try:
    return sock.recv(1, socket.MSG_PEEK) == b""
  except BlockingIOError:
    return False
  except OSError:
    return True


def _named(facts: Mapping[str, Any]) -> str:
  return f"{facts['host']}, pid {facts['pid']}"


class Lifeline:
  """Watches the other processes, and agrees with them on the step to stop at.

  A thread of its own: where a process is lost it says which, and ends this one with
  exit code LOST, whatever the main thread hangs in.
  """

  def __init__(
      self,
      process: int,
      peers: Mapping[int, Peer],
      names: Mapping[int, str],
      *,
      lost_after_s: float,
  ):
    """Begins to watch.

    Args:
      process: number of this process.
      peers: for process 0 all others; for these only process 0.
      names: process -> how messages call it.
      lost_after_s: silence after which a process counts as lost.
    """
    self._process, self._peers, self._names = process, dict(peers), dict(names)
    self._lost_after_s = lost_after_s
    self._lock = threading.Condition()
    self._step = -1
    self._turn = self._signal = 0
    self._asked = self._told = self._leaving = False
    self._stop_at: int | None = None
    self._reports: dict[int, int] = {}
    self._ended: set[int] = set()
    self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
    for peer in self._peers.values():
      peer.sock.settimeout(None)
      peer.heard = time.monotonic()
    self._thread.start()

  def reached(self, step: int, received: int = 0) -> int:
    """Says whether all processes stop here; asked after each step, or part of one.

    No collective: a process that got a signal tells process 0, which asks all how far
    they are and names the first turn that none has passed.

    Args:
      step: reached, for messages; all processes ask at the same places.
      received: number of a signal that this process got; 0: none.

    Returns:
      The number of the signal to stop for; 0: go on.
    """
    with self._lock:
      if received and not (self._told or self._asked):
        self._told = True
        self._handle(self._process, {"stop": received})
      # Between the question and the answer nobody goes on.
      self._lock.wait_for(lambda: not self._asked or self._stop_at is not None)
      self._step = step
      self._turn += 1
      stop = self._stop_at is not None and self._turn >= self._stop_at
      return self._signal if stop else 0

  def leave(self, code: int) -> None:
    """Tells the others that this process ends: 0 in order, else they must as well."""
    with self._lock:
      self._leaving = True
      self._send(bye=code)

  def close(self) -> None:
    """Ends the connections, once all processes have left."""
    for peer in self._peers.values():
      with contextlib.suppress(OSError):
        peer.sock.shutdown(socket.SHUT_WR)
    # One that is closed before it is read to its end may swallow its last words.
    self._thread.join(_LEAVING_S)

  def _send(self, **message: Any) -> None:
    for peer in self._peers.values():
      peer.send(**message)

  def _watch(self) -> None:
    with selectors.DefaultSelector() as selector:
      for number, peer in self._peers.items():
        selector.register(peer.sock, selectors.EVENT_READ, number)
      beat = 0.0
      while selector.get_map():
        for key, _ in selector.select(_BEAT_S / 2):
          messages = self._peers[key.data].read()
          if messages is None:
            selector.unregister(key.fileobj)
            self._closed(key.data)
            continue
          with self._lock:
            for message in messages:
              self._handle(key.data, message)
        now = time.monotonic()
        if now - beat > _BEAT_S:
          beat = now
          with self._lock:
            self._send(beat=0)
        self._check_beats(now)

  def _check_beats(self, now: float) -> None:
    for number, peer in self._peers.items():
      silent = now - peer.heard
      if number not in self._ended and silent > self._lost_after_s:
        self._end(number, f"has not been heard of for {silent:.0f} s")

  def _closed(self, number: int) -> None:
    if number not in self._ended:
      self._end(number, "closed its connection without a word (killed, out of memory?)")

  def _handle(self, number: int, message: Mapping[str, Any]) -> None:
    """Acts on a message; process 0 relays what all must know. Holds the lock."""
    if "bye" in message:
      self._ended.add(number)
      if message["bye"]:
        self._end(number, f"ended with exit code {message['bye']}", message["bye"])
    elif "lost" in message:
      self._end(message["lost"], message["why"], message["code"])
    elif "stop" in message:
      if self._process:
        self._send(stop=message["stop"])
      elif not self._asked:
        self._send(ask=message["stop"])
        self._report(0, message["stop"])
    elif "ask" in message:
      self._report(self._process, message["ask"])
      self._send(at=self._turn)
    elif "at" in message:
      self._reports[number] = message["at"]
      self._decide()
    elif "stop_at" in message:
      self._stop_at = message["stop_at"]
      self._lock.notify_all()

  def _report(self, number: int, received: int) -> None:
    self._asked, self._signal = True, received
    self._reports[number] = self._turn
    if not self._process:
      self._decide()

  def _decide(self) -> None:
    """Names the turn once all have said how far they are; only process 0 knows."""
    if set(self._reports) | self._ended >= {0, *self._peers}:
      self._stop_at = max(self._reports.values()) + 1
      self._send(stop_at=self._stop_at)
      self._lock.notify_all()

  def _end(self, number: int, why: str, code: int = LOST) -> None:
    """Ends this process, unless it is ending already."""
    if self._leaving:
      return
    code = code if code in _TELLING else LOST
    if not self._process:
      self._send(lost=number, why=why, code=code)
    step = f" after step {self._step}" if self._step >= 0 else ""
    _exit(
        f"process {number} ({self._names[number]}) was lost{step}: it {why}. Process "
        f"{self._process} stops; the same command on all goes on from the last "
        "checkpoint", code,
    )


def _exit(text: str, code: int) -> NoReturn:
  print(text, file=sys.stderr, flush=True)
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  os._exit(code)
