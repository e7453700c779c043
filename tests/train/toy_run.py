"""Runs the toy in a process of its own: python toy_run.py WORKDIR OPTIONS_AS_JSON."""

import json
import pathlib
import resource
import sys
import threading
import time

import toy


class FullDisk:
  """Batches; from one of them to another no file may grow beyond 2 KiB."""

  def __init__(self, iterator, saved, begin, end):
    self._iterator, self._saved = iterator, saved
    self._begin, self._end, self._count = begin, end, 0

  def __next__(self):
    self._count += 1
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    if self._count == self._begin:
      while not self._saved.exists():
        time.sleep(0.01)
      resource.setrlimit(resource.RLIMIT_FSIZE, (2048, most))
    if self._count == self._end:
      # What is being saved meets the limit.
      while any(thread.name == "async_save" for thread in threading.enumerate()):
        time.sleep(0.01)
      resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    return next(self._iterator)

  def get_state(self):
    return self._iterator.get_state()

  def set_state(self, state):
    self._iterator.set_state(state)


if __name__ == "__main__":
  options = json.loads(sys.argv[2])
  data = toy.iterator(pace_s=options.pop("pace_s", 0.0))
  if full := options.pop("full", None):
    data = FullDisk(data, pathlib.Path(sys.argv[1], "checkpoints", "5"), *full)
  toy.run(sys.argv[1], data=data, **options)
