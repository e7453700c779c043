"""Readers that end or hold their process; light, for a worker imports this file."""

import os
import resource
import signal
import time

import numpy as np

from vjepa_jax.data.record import Record


class Fatal:
  """Ends its process for the path "kills", sleeps for "holds", else paints nines.

  "seven late" paints sevens after 2 s, "bug" raises what no reader should, "no room"
  allows the process no file above 4 bytes, as a full memory does.
  """

  def __call__(self, row):
    if row.path == "kills":
      os._exit(7)
    if row.path == "holds":
      time.sleep(60)
    if row.path == "bug":
      raise KeyError("of an op")
    if row.path == "no room":
      signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
      resource.setrlimit(resource.RLIMIT_FSIZE, (2, 2))
    if row.path == "seven late":
      time.sleep(2)
      return Record(np.full((1, 1, 2, 2, 1), 7, np.uint8), np.ones(4), row.path)
    return Record(np.full((1, 1, 2, 2, 1), 9, np.uint8), np.ones(4), row.path)


class Unloadable:
  """Cannot be made in another process."""

  def __reduce__(self):
    return int, ("not a number",)
