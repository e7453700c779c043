"""Several processes as one run: found, compared and joined before any data are read."""

from collections.abc import Mapping
import contextlib
import dataclasses
import functools
import hashlib
from importlib import metadata
import os
import pathlib
import platform
import socket
import subprocess
import sys
import time
from typing import Any, NoReturn

import jax
from jax._src import clusters, distributed
from jaxlib import _jax

from vjepa_jax.train import coordination, lifeline

LOST = lifeline.LOST
START_TIMEOUT_S = 300.0
LOST_AFTER_S = 30.0
# Read where the flags are not given; jax itself reads the first.
_ADDRESS, _COUNT, _NUMBER = (
    "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
)
# What jax finds by itself, of all that it knows.
_CLUSTERS = ("slurm", "ompi", "gcetpu", "gketpu")
_PACKAGES = (
    "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain",
    "ml-collections", "numpy",
)
_SHOWN = 8
# How long the lifeline may take to say that an error comes from another's death.
_VERDICT_S = 3.0


class HostsError(ValueError):
  """Processes that cannot be one run; says which and why."""


@dataclasses.dataclass(frozen=True)
class Place:
  """Which process of a run this one is.

  Attributes:
    coordinator: HOST:PORT at which process 0 waits for the others.
    processes: how many there are.
    process: number of this one, from 0.
    local_devices: GPUs of this process; None: all of its machine.
  """

  coordinator: str
  processes: int
  process: int
  local_devices: tuple[int, ...] | None = None


def find_place(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout_s: float = START_TIMEOUT_S,
) -> Place | None:
  """Finds out which process of which run this is.

  What is not given is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID, else from the TPU pod, SLURM or Open MPI that started it.

  Args:
    coordinator: HOST:PORT of process 0.
    processes: how many there are; 1 asks nobody.
    process: number of this one.
    timeout_s: how long the name of process 0's machine may take to be known.

  Returns:
    The place; None for a run of one process.

  Raises:
    HostsError: something is missing or out of range.
  """
  coordinator = coordinator or os.environ.get(_ADDRESS)
  processes = _number("--processes", processes, _COUNT)
  process = _number("--process_id", process, _NUMBER)
  if processes == 1:
    return None
  local = None
  if None in (coordinator, processes, process) and (cluster := _cluster()):
    if processes is None and cluster.get_process_count() == 1:
      return None
    coordinator, processes, process, local = (
        clusters.ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, processes, process, None, cluster.name, int(timeout_s)
        )
    )
  given = {
      f"--coordinator=HOST:PORT (or {_ADDRESS})": coordinator,
      f"--processes=N (or {_COUNT})": processes,
      f"--process_id=I (or {_NUMBER})": process,
  }
  if all(value is None for value in given.values()):
    return None
  missing = [name for name, value in given.items() if value is None]
  if missing:
    raise HostsError(
        f"a run of several processes needs {', '.join(missing)} as well; no TPU pod or "
        "SLURM that would tell was found here"
    )
  _check_range(coordinator, processes, process)
  return Place(coordinator, processes, process, local and tuple(local))


def describe(config: Mapping[str, Any], workdir: str | os.PathLike[str]) -> dict:
  """Returns what all processes must have in common, and how this one is called.

  Args:
    config: plain.
    workdir: of the run.

  Returns:
    JSON: host, pid, versions (name -> text), code (file -> digest of its bytes),
    config (dotted key -> value).
  """
  versions = {"python": platform.python_version()}
  for name in _PACKAGES:
    with contextlib.suppress(metadata.PackageNotFoundError):
      versions[name] = metadata.version(name)
  return {
      "host": socket.gethostname(), "pid": os.getpid(), "versions": versions,
      "code": _sources(),
      "config": {
          "workdir": str(workdir), **{k: repr(v) for k, v in flat(config).items()}
      },
  }


def difference(facts: Mapping[int, Mapping[str, Any]]) -> str | None:
  """Says which processes differ from process 0, and in what; None: they are alike.

  Args:
    facts: process -> what `describe` gave there.
  """
  lines = []
  for number in sorted(facts):
    mine, theirs = facts[0], facts[number]
    for part in ("versions", "code", "config"):
      keys = sorted(mine[part].keys() | theirs[part].keys())
      differing = [key for key in keys if mine[part].get(key) != theirs[part].get(key)]
      if not differing:
        continue
      told = [
          key if part == "code" else
          f"{key} {theirs[part].get(key)!r}, not {mine[part].get(key)!r}"
          for key in differing[:_SHOWN]
      ]
      more = len(differing) - len(told)
      lines.append(
          f"process {number} ({theirs['host']}): other {part}: {'; '.join(told)}"
          + (f"; and {more} more" if more else "")
      )
  if not lines:
    return None
  return "\n  ".join([
      "the processes are not alike, compared with process 0 "
      f"({facts[0]['host']}):", *lines,
      "install the same versions, copy the same code and give the same command on all",
  ])


def code_digest(facts: Mapping[str, Any]) -> str:
  """Returns one short digest of the code that `describe` saw."""
  text = "".join(f"{path} {digest}\n" for path, digest in sorted(facts["code"].items()))
  return hashlib.sha256(text.encode()).hexdigest()[:12]


class Hosts:
  """The processes of a run, joined; of one process it is made without arguments."""

  def __init__(
      self,
      line: lifeline.Lifeline | None = None,
      service: subprocess.Popen | None = None,
  ):
    self._line, self._service = line, service

  def reached(self, step: int, received: int = 0) -> int:
    """Says, after each step, by which signal all processes stop here; 0: none.

    See `lifeline.Lifeline.reached`.
    """
    return received if self._line is None else self._line.reached(step, received)

  @property
  def alone(self) -> bool:
    """Whether the run has but one process."""
    return self._line is None

  def close(self) -> None:
    """Leaves in order: waits until all processes have come to their end."""
    if self._line is None:
      return
    self._line.leave(0)
    # All is saved: one that is lost on its way out is no fault of this one.
    with contextlib.suppress(RuntimeError):
      distributed.global_state.shutdown()
    self._line.close()
    if self._service is not None:
      self._service.communicate(coordination.DONE)

  def fail(self, code: int) -> NoReturn:
    """Ends this process after an error; the others are told.

    A collective fails before the lifeline has said that another process was lost:
    that has a while to end this one with its own message.
    """
    if self._line is None:
      sys.exit(code)
    time.sleep(_VERDICT_S)
    self._line.leave(code)
    # What waits for the other processes would hold this one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(
    place: Place | None,
    facts: Mapping[str, Any],
    *,
    timeout_s: float = START_TIMEOUT_S,
    lost_after_s: float = LOST_AFTER_S,
) -> Hosts:
  """Joins the processes of a run, before jax has touched a device.

  Args:
    place: of `find_place`; None: there is but one process, nothing is started.
    facts: of `describe`.
    timeout_s: how long the others may take to come.
    lost_after_s: silence after which a process counts as lost.

  Raises:
    HostsError: the processes are not alike, or their numbers do not fit.
    lifeline.MissingError: not all came; says which.
  """
  if place is None:
    return Hosts()
  service: list[subprocess.Popen] = []
  try:
    if place.process == 0:
      peers, told = lifeline.host_processes(
          int(place.coordinator.rpartition(":")[2]), facts, place.processes,
          timeout_s=timeout_s, check=difference,
          answer=functools.partial(_serve, place.processes, lost_after_s, service),
      )
    else:
      peer, told = lifeline.join_process(
          place.coordinator, place.process, facts, place.processes,
          timeout_s=timeout_s,
      )
      peers = {0: peer}
  except lifeline.RefusedError as error:
    raise HostsError(str(error)) from error
  names = dict(enumerate(told["names"]))
  line = lifeline.Lifeline(place.process, peers, names, lost_after_s=lost_after_s)
  _connect(place, told["port"], timeout_s)
  return Hosts(line, *service)


def summary(facts: Mapping[str, Any]) -> str:
  """Returns one line: processes, devices, versions, code. Opens the devices."""
  devices, count = jax.devices(), jax.process_count()
  versions = ", ".join(f"{name} {text}" for name, text in facts["versions"].items())
  return (
      f"{count} process{'es' if count > 1 else ''}, {len(devices)} x "
      f"{devices[0].device_kind} ({len(jax.local_devices())} each); {versions}; code "
      f"{code_digest(facts)}"
  )


def _serve(
    processes: int,
    lost_after_s: float,
    service: list[subprocess.Popen],
    known: Mapping[int, Mapping[str, Any]],
) -> dict[str, Any]:
  """Starts the coordination service; returns what all processes must know of it."""
  with socket.socket() as probe:
    probe.bind(("", 0))
    port = probe.getsockname()[1]
  command = [
      sys.executable, "-m", coordination.__name__, str(port), str(processes),
      str(lost_after_s),
  ]
  process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
      env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
  )
  service.append(process)
  if process.stdout.readline() != coordination.READY:
    process.kill()
    raise lifeline.RefusedError(
        f"the coordination service could not be started on port {port}: "
        f"{' '.join(command)} ended with code {process.wait()}"
    )
  return {"port": port, "names": [known[n]["host"] for n in range(processes)]}


def _connect(place: Place, port: int, timeout_s: float) -> None:
  """Does what jax.distributed.initialize does, with a service of our own.

  That one would start the service in process 0, and a listener for SIGTERM that
  takes the place of the loop's.
  """
  if place.local_devices is not None:
    visible = ",".join(map(str, place.local_devices))
    jax.config.update("jax_cuda_visible_devices", visible)
  if "cpu" in (jax.config.jax_platforms or "cpu"):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  state = distributed.global_state
  host = place.coordinator.rpartition(":")[0]
  state.coordinator_address = f"{host}:{port}"
  state.process_id, state.num_processes = place.process, place.processes
  state.client = _jax.get_distributed_runtime_client(
      state.coordinator_address, place.process, init_timeout=int(timeout_s),
      use_compression=True, heartbeat_timeout=coordination.HEARTBEAT_S,
  )
  state.client.connect()


def _cluster() -> Any:
  """Returns what jax knows of the cluster that this process was started by, or None."""
  on_cpu = jax.config.jax_platforms == "cpu"
  for cluster in clusters.ClusterEnv._cluster_types:
    if cluster.name not in _CLUSTERS or (on_cpu and cluster.name.endswith("tpu")):
      continue
    if cluster.is_env_present():
      return cluster
  return None


def _number(flag: str, value: int | None, variable: str) -> int | None:
  if value is not None or variable not in os.environ:
    return value
  try:
    return int(os.environ[variable])
  except ValueError:
    raise HostsError(
        f"{variable}={os.environ[variable]!r} is no whole number; it stands for {flag}"
    ) from None


def _check_range(coordinator: str, processes: int, process: int) -> None:
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise HostsError(
        f"--coordinator={coordinator}: must be HOST:PORT of process 0, such as "
        "10.0.0.1:8476"
    )
  if processes < 1 or not 0 <= process < processes:
    raise HostsError(
        f"--process_id={process}, --processes={processes}: ids go from 0 to "
        "processes - 1"
    )


def _sources() -> dict[str, str]:
  """Returns the digest of each Python file of the package and of the configs."""
  package = pathlib.Path(__file__).resolve().parents[1]
  folders = [package, package.parent / "configs"]
  return {
      str(path.relative_to(package.parent)):
          hashlib.sha256(path.read_bytes()).hexdigest()[:16]
      for folder in folders for path in sorted(folder.rglob("*.py"))
  }


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns the values of nested dicts by dotted key."""
  found = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      found |= flat(value, f"{prefix}{key}.")
    else:
      found[prefix + key] = value
  return found
