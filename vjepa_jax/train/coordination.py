"""JAX's coordination service, in a process of its own beside process 0.

In process 0 it would die with it, and its clients abort the other processes at once,
before they could say who was lost. Here it outlives process 0 by a little.

  python -m vjepa_jax.train.coordination PORT PROCESSES GRACE_S
"""

import signal
import sys
import time

from jaxlib import _jax

READY, DONE = b"ready\n", b"done\n"
# Whether a process is alive is watched by train.lifeline, which must be first.
HEARTBEAT_S = 3600
_SHUTDOWN_S = 300


def main(argv: list[str]) -> None:
  """Serves until stdin says DONE, or GRACE_S seconds longer than it is open."""
  port, processes, grace_s = int(argv[1]), int(argv[2]), float(argv[3])
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
  service = _jax.get_distributed_runtime_service(
      f"[::]:{port}", processes, heartbeat_timeout=HEARTBEAT_S,
      shutdown_timeout=_SHUTDOWN_S,
  )
  sys.stdout.buffer.write(READY)
  sys.stdout.flush()
  if sys.stdin.buffer.readline() != DONE:
    time.sleep(grace_s)
  service.shutdown()


if __name__ == "__main__":
  main(sys.argv)
