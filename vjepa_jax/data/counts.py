"""Counts of what went wrong on the way to the data, over all worker processes."""

import collections
import json
import os
import threading
import uuid

_FOLDER = "VJEPA_JAX_STORAGE_COUNTS"


class _State:
  """This process's counts; a forked child starts its own."""

  def __init__(self):
    self.clear()

  def clear(self) -> None:
    self.lock = threading.Lock()
    self.counts = collections.Counter()
    self.forgotten = collections.Counter()
    self.name = f"{uuid.uuid4().hex}.json"


_state = _State()
os.register_at_fork(after_in_child=_state.clear)


def count(name: str) -> None:
  """Adds one; shared with other processes where a folder for it is configured."""
  with _state.lock:
    _state.counts[name] += 1
    folder = os.environ.get(_FOLDER)
    if folder:
      path = os.path.join(folder, _state.name)
      with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump(_state.counts, file)
      os.replace(f"{path}.part", path)


def counters() -> dict[str, int]:
  """Returns the counts since the last `reset_counters`, sorted by name.

  They are this process's, or with VJEPA_JAX_STORAGE_COUNTS=folder the sum over all
  processes that inherited it.
  """
  with _state.lock:
    return dict(sorted((_total() - _state.forgotten).items()))


def reset_counters() -> None:
  """Starts this process's view of the counts from nothing."""
  with _state.lock:
    _state.forgotten = _total()


def _total() -> collections.Counter:
  folder = os.environ.get(_FOLDER)
  total = collections.Counter(_state.counts)
  for name in os.listdir(folder) if folder and os.path.isdir(folder) else ():
    if name.endswith(".json") and name != _state.name:
      with open(os.path.join(folder, name), encoding="utf-8") as file:
        total.update(json.load(file))
  return total
