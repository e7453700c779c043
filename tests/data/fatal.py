"""Readers that end or hold their process; light, for a worker imports this file."""

import os
import time

import numpy as np

from vjepa_jax.data.record import Record


class Fatal:
  """Ends its process for the path "kills", sleeps for "holds", else paints nines."""

  def __call__(self, row):
    if row.path == "kills":
      os._exit(7)
    if row.path == "holds":
      time.sleep(60)
    return Record(np.full((1, 1, 2, 2, 1), 9, np.uint8), np.ones(4), row.path)


class Unloadable:
  """Cannot be made in another process."""

  def __reduce__(self):
    return int, ("not a number",)
