"""Processes find each other, are compared, watched, and stop at one step."""

import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from vjepa_jax.train import hosts, lifeline

ROOT = pathlib.Path(__file__).resolve().parents[2]
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = dict(
    SLURM_JOB_ID="4097", SLURM_STEP_NODELIST="node[07-09],other", SLURM_NTASKS="8",
    SLURM_PROCID="5", SLURM_LOCALID="1",
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
  for name in (*VARIABLES, *SLURM):
    monkeypatch.delenv(name, raising=False)


def free_port():
  with socket.socket() as probe:
    probe.bind(("", 0))
    return probe.getsockname()[1]


def facts(host="a", **parts):
  return {
      "host": host, "pid": 1, "versions": {"jax": "1"}, "code": {"x.py": "00"},
      "config": {"seed": "0"}, **parts,
  }


def test_one_process_asks_nobody(monkeypatch):
  assert hosts.find_place() is None
  assert hosts.find_place("a:1", 1, 0) is None
  for name, value in {**SLURM, "SLURM_NTASKS": "1"}.items():
    monkeypatch.setenv(name, value)
  assert hosts.find_place() is None
  assert hosts.start(None, facts()).alone


def test_flags_come_before_variables_and_these_before_the_cluster(monkeypatch):
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  port = 4097 % 4096 + 65535 - 4096 + 1
  assert hosts.find_place() == hosts.Place(f"node07:{port}", 8, 5, (1,))
  for name, value in zip(VARIABLES, ("b:9", "4", "2"), strict=True):
    monkeypatch.setenv(name, value)
  assert hosts.find_place() == hosts.Place("b:9", 4, 2)
  assert hosts.find_place("c:8", 3, 1) == hosts.Place("c:8", 3, 1)


@pytest.mark.parametrize("given,said", [
    (("a:1", None, None), "needs --processes=N .* --process_id=I"),
    ((None, 2, None), "needs --coordinator=HOST:PORT"),
    (("a:1", 2, 2), "ids go from 0"), (("a:1", 0, 0), "ids go from 0"),
    (("a", 2, 0), "must be HOST:PORT"), (("a:x", 2, 0), "must be HOST:PORT"),
])
def test_a_place_that_is_incomplete_or_out_of_range_is_named(given, said):
  with pytest.raises(hosts.HostsError, match=said):
    hosts.find_place(*given)


def test_a_variable_that_is_no_number_is_named(monkeypatch):
  monkeypatch.setenv("JAX_PROCESS_ID", "first")
  with pytest.raises(hosts.HostsError, match="JAX_PROCESS_ID='first'.*--process_id"):
    hosts.find_place()


def test_processes_that_differ_are_named_with_what_differs():
  assert hosts.difference({0: facts(), 1: facts("b", pid=2)}) is None
  text = hosts.difference({
      0: facts(), 1: facts("b"), 2: facts("c", versions={"jax": "2"}),
      3: facts("d", code={"x.py": "01", "y.py": "0"}, config={"seed": "7"}),
  })
  assert "process 1" not in text
  assert "process 2 (c): other versions: jax '2', not '1'" in text
  assert "process 3 (d): other code: x.py; y.py" in text
  assert "process 3 (d): other config: seed '7', not '0'" in text


def test_what_a_process_says_of_itself_covers_every_source_and_option(tmp_path):
  mine = hosts.describe({"train": {"accum": 2}}, tmp_path)
  assert {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "python"} <= (
      mine["versions"].keys()
  )
  assert {"vjepa_jax/main.py", "vjepa_jax/train/hosts.py", "configs/common.py"} <= (
      mine["code"].keys()
  )
  assert mine["config"] == {"workdir": str(tmp_path), "train.accum": "2"}


def gathered(processes, joining, check=lambda known: None, timeout_s=20.0):
  """Runs process 0 and the others as threads; returns process -> result or error."""
  port, results = free_port(), {}

  def keep(key, call):
    try:
      results[key] = call()
    except Exception as error:
      results[key] = error

  calls = {0: lambda: lifeline.host_processes(
      port, facts(), processes, timeout_s=timeout_s, check=check,
      answer=lambda known: {"all": sorted(known)},
  )}
  for key, (number, of) in enumerate(joining, 1):
    calls[key] = lambda number=number, of=of: lifeline.join_process(
        f"localhost:{port}", number, facts(f"h{number}"), of, timeout_s=timeout_s
    )
  threads = [threading.Thread(target=keep, args=item) for item in calls.items()]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  return results


def test_all_processes_get_the_answer_of_the_first():
  results = gathered(3, [(2, 3), (1, 3)])
  assert [results[n][1] for n in range(3)] == [{"all": [0, 1, 2]}] * 3
  assert sorted(results[0][0]) == [1, 2]


def test_missing_processes_are_named_to_all_that_came():
  results = gathered(4, [(2, 4)], timeout_s=1.0)
  for number in (0, 1):
    assert isinstance(results[number], lifeline.MissingError)
    said = str(results[number])
    assert "process(es) 1, 3 of 4 did not come" in said and "2 (h2, pid 1)" in said


def test_a_first_process_that_never_listens_is_named():
  with pytest.raises(lifeline.MissingError, match="process 0 was not found at"):
    lifeline.join_process(
        f"localhost:{free_port()}", 1, facts(), 2, timeout_s=0.5
    )


@pytest.mark.parametrize("joining,check,said", [
    ([(1, 3), (1, 3)], None, "two processes say that they are process 1"),
    ([(1, 2)], None, "one of 2 processes, process 0 as one of 3"),
    ([(1, 3), (2, 3)], lambda known: "unlike", "unlike"),
])
def test_processes_that_do_not_fit_are_refused_everywhere(joining, check, said):
  results = gathered(3, joining, check or (lambda known: None), timeout_s=20.0)
  told = list(results.values())
  assert all(isinstance(e, lifeline.RefusedError) for e in told[:2]), told
  assert said in str(results[0])


def test_a_port_that_is_taken_is_named():
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
    with pytest.raises(lifeline.RefusedError, match=f"cannot listen on port {port}"):
      lifeline.host_processes(
          port, facts(), 2, timeout_s=1, check=lambda known: None, answer=dict
      )


class _Plain(lifeline.Peer):
  """A connection of this machine, which has no options of TCP."""

  def __init__(self, sock):
    self.sock, self.heard = sock, time.monotonic()
    self._rest, self._early = b"", []


def test_messages_that_come_in_one_piece_are_all_read():
  ours, theirs = socket.socketpair()
  theirs.sendall(b'{"go": 1}\n{"bye": 2}\n')
  peer = _Plain(ours)
  assert peer.read_one(5) == {"go": 1}
  theirs.sendall(b'{"beat": 0}\n')
  assert peer.read() == [{"bye": 2}, {"beat": 0}]


@pytest.mark.parametrize("seed", range(6))
def test_a_signal_to_one_stops_all_after_the_same_step(seed):
  rng, count = random.Random(seed), 4
  pairs = {n: socket.socketpair() for n in range(1, count)}
  names = {n: f"h{n}" for n in range(count)}
  lines = [lifeline.Lifeline(
      0, {n: _Plain(pair[0]) for n, pair in pairs.items()}, names, lost_after_s=30
  )] + [
      lifeline.Lifeline(n, {0: _Plain(pair[1])}, names, lost_after_s=30)
      for n, pair in pairs.items()
  ]
  told, at = rng.randrange(count), rng.randrange(1, 9)
  stopped = {}
  pace = [rng.uniform(0, 0.02) for _ in range(count)]
  # As in training, none is far ahead of the others.
  steps = threading.Barrier(count)

  def train(number):
    for step in range(1, 500):
      if step % 3 == 0:
        steps.wait(10)
      time.sleep(pace[number])
      received = signal.SIGTERM if number == told and step >= at else 0
      if found := lines[number].reached(step, received):
        stopped[number] = (step, found)
        steps.abort()
        return

  def run(number):
    try:
      train(number)
    except threading.BrokenBarrierError:
      stopped[number] = "waited for one that had stopped"

  threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(20)
  steps_taken = {step for step, _ in stopped.values()}
  assert len(stopped) == count and len(steps_taken) == 1, stopped
  assert {found for _, found in stopped.values()} == {signal.SIGTERM}
  assert at <= steps_taken.pop() <= at + 8
  for line in lines:
    line.leave(0)
  closing = [threading.Thread(target=line.close) for line in lines]
  for thread in closing:
    thread.start()
  for thread in closing:
    thread.join(10)


WATCHED = """
import sys, time
from vjepa_jax.train import lifeline
number, count, port = map(int, sys.argv[1:4])
facts = {"host": f"h{number}", "pid": 0}
if number == 0:
  peers, _ = lifeline.host_processes(
      port, facts, count, timeout_s=60, check=lambda known: None, answer=lambda k: {})
else:
  peers = {0: lifeline.join_process(
      f"localhost:{port}", number, facts, count, timeout_s=60)[0]}
line = lifeline.Lifeline(
    number, peers, {n: f"h{n}" for n in range(count)}, lost_after_s=float(sys.argv[4]))
print("joined", flush=True)
told = sys.stdin.readline()
if not told:
  time.sleep(60)  # the lifeline ends this process
code = int(told)
line.leave(code)
time.sleep(1.0 if code == 0 else 0.0)
line.close()
sys.exit(code)
"""


def watched(count=3, lost_after_s=20.0):
  port = free_port()
  processes = [
      subprocess.Popen(
          [sys.executable, "-c", WATCHED, *map(str, (n, count, port, lost_after_s))],
          cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
          stderr=subprocess.PIPE, text=True,
      ) for n in range(count)
  ]
  assert [p.stdout.readline() for p in processes] == ["joined\n"] * count
  return processes


def ends(process):
  try:
    _, error = process.communicate(timeout=30)
  finally:
    process.kill()
  return process.returncode, error


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_is_named_and_ends_the_others(victim):
  processes = watched()
  processes[victim].kill()
  begin = time.monotonic()
  for number in {0, 1, 2} - {victim}:
    code, error = ends(processes[number])
    assert code == hosts.LOST
    assert f"process {victim} (h{victim}) was lost" in error
  assert time.monotonic() - begin < 10
  processes[victim].communicate()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_falls_silent_is_named_in_bounded_time(victim):
  processes = watched(lost_after_s=3.0)
  os.kill(processes[victim].pid, signal.SIGSTOP)
  for number in {0, 1, 2} - {victim}:
    code, error = ends(processes[number])
    assert code == hosts.LOST
    assert f"process {victim} (h{victim}) was lost: it has not been heard" in error
  processes[victim].kill()
  processes[victim].communicate()


@pytest.mark.parametrize("given, wanted", [(1, 1), (2, 2), (75, 75), (3, hosts.LOST)])
def test_an_error_of_one_ends_the_others_with_a_code_that_says_what_to_do(given, wanted):
  processes = watched()
  processes[1].communicate(f"{given}\n")
  for number in (0, 2):
    code, error = ends(processes[number])
    said = f"process 1 (h1) was lost: it ended with exit code {given}"
    assert code == wanted and said in error


def test_the_end_of_all_is_no_loss():
  processes = watched()
  for process in processes:
    process.stdin.write("0\n")
    process.stdin.flush()
  assert [ends(process) for process in processes] == [(0, "")] * 3
