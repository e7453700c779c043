"""What main does beside the loop: hosts that agree on who reads what."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOST = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from vjepa_jax import main
from vjepa_jax.data import pipeline
host = int(sys.argv[2])
# Of unequal length, and beyond what int32 holds.
draws = np.array([2**63 + host, *range(100 * host)], np.uint64)
shares = main._exchange(pipeline.HostShare(host, 2, "order", draws))
assert [s.host for s in shares] == [0, 1]
assert [int(s.draws[0]) for s in shares] == [2**63, 2**63 + 1]
assert [len(s.draws) for s in shares] == [1, 101]
print("told", shares[1 - host].order)
"""


@pytest.mark.slow
def test_every_host_learns_what_all_of_them_read():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  hosts = [
      subprocess.Popen(
          [sys.executable, "-c", HOST, address, str(number)], cwd=ROOT,
          env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT, text=True,
      ) for number in range(2)
  ]
  said = [host.communicate(timeout=200)[0] for host in hosts]
  assert all("told order" in text for text in said), said
