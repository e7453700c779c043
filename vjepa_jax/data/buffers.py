"""Large arrays used again once nobody holds them.

A batch of a gigabyte that is fresh from the system costs a page fault, and zeroing,
for each of its pages: at 32 volumes of 9.4 MB that was half of what a volume from
shards cost in all (10.9 ms against 5.0).
"""

from collections.abc import Sequence
import math
import sys
import threading

import numpy as np

# References of a free array while it is looked at: the list, the name, the argument.
_FREE = 3


class Buffers:
  """Hands out arrays; one whose every view is gone may be handed out again.

  Whoever still needs a batch holds it, or a view of it, or has given it to a library
  that does, as jax does until a transfer is over: nothing has to be returned.

  Args:
    keep: arrays kept for another time; more are made where more are held.
  """

  def __init__(self, keep: int):
    self._keep = keep
    self._lock = threading.Lock()
    self._arrays: list[np.ndarray] = []

  def take(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an array of any content."""
    size = math.prod(shape) * dtype.itemsize
    with self._lock:
      for array in self._arrays:
        if array.nbytes == size and sys.getrefcount(array) == _FREE:
          return array.view(dtype).reshape(shape)
      array = np.empty(size, np.uint8)
      # The oldest goes: if it is held, it lives on where it is held.
      self._arrays = [*self._arrays, array][-self._keep:]
    return array.view(dtype).reshape(shape)
