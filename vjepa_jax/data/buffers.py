"""Large arrays used again once nobody holds them.

A batch of a gigabyte that is fresh from the system costs a page fault, and zeroing,
for each of its pages: at 32 volumes of 9.4 MB that was half of what a volume from
shards cost in all (10.9 ms against 5.0).
"""

from collections.abc import Sequence
import math
import threading
import weakref

import numpy as np


class Buffers:
  """Hands out arrays; one whose every view is gone may be handed out again.

  Whoever still needs a batch holds it, or a view of it, or has given it to a library
  that does, as jax does until all that reads it is over: nothing has to be returned.

  Args:
    keep: arrays kept for another time; more are made where more are held.
  """

  def __init__(self, keep: int):
    self._keep = keep
    self._lock = threading.Lock()
    self._lent: list[tuple[np.ndarray, weakref.ref[_Lease]]] = []

  def take(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an array of any content."""
    size = math.prod(shape) * dtype.itemsize
    with self._lock:
      free = (
          n for n, (array, lease) in enumerate(self._lent)
          if array.nbytes == size and lease() is None
      )
      place = next(free, None)
      array = np.empty(size, np.uint8) if place is None else self._lent.pop(place)[0]
      lease = _Lease(array)
      # The oldest goes: if it is held, it lives on where it is held.
      self._lent = [*self._lent, (array, weakref.ref(lease))][-self._keep:]
    return np.asarray(lease).view(dtype).reshape(shape)


class _Lease:
  """What the views of one loan have in common: gone when the last of them is.

  numpy keeps the object whose `__array_interface__` gave an array, and a view keeps
  its array, so that no count of references has to be guessed.
  """

  def __init__(self, array: np.ndarray):
    self._array = array
    self.__array_interface__ = array.__array_interface__
