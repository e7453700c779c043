"""Where processes that save together wait for each other, or learn that one has failed.

The usual barrier waits, up to 20 minutes, for a process that will never come since its
own part could not be written; the run would stand still on all hosts that long.
"""

import collections
import time
from typing import Any

import jax
from jax._src import distributed

_PAUSE_S = 0.02
_TOLD = 2000  # characters; a path may fill hundreds before the reason


def in_one_line(error: BaseException) -> str:
  """Returns an error's kind and words, without the length of a storage layer's."""
  return " ".join(f"{type(error).__name__}: {error}".split())[:_TOLD]


class AbsentError(OSError):
  """Another process could not write its part, or did not come; says which."""


class Meeting:
  """The barriers of the saves into one folder; all processes save the same ones."""

  def __init__(self, name: str):
    """Meets nobody yet.

    Args:
      name: the same on all processes, another one for each folder.
    """
    self._name, self._count = name.strip("/"), 0
    self._turns: collections.Counter[str] = collections.Counter()

  def begin(self) -> None:
    """To be called by all before each save: what was told of earlier ones is over."""
    self._count += 1
    self._turns.clear()
    if self._client and jax.process_index() == 0:
      # All have left the save before the last.
      self._client.key_value_delete(self._place(self._count - 2))

  def tell(self, error: BaseException) -> None:
    """Tells the others that this process has failed to write its part."""
    if self._client:
      key = f"{self._place(self._count)}/failed/{jax.process_index()}"
      self._client.key_value_set(key, in_one_line(error), allow_overwrite=True)

  def wait(self, *, key: str, timeout_ms: int) -> None:
    """Returns once all processes are here; the signature is Orbax's.

    Args:
      key: of this barrier within a save.
      timeout_ms: how long the others may take.

    Raises:
      AbsentError: one has failed meanwhile, or has not come in time.
    """
    if not self._client:
      return
    # One key serves for several turns, which come in the same order everywhere.
    self._turns[key] += 1
    save = self._place(self._count)
    place = f"{save}/{key}/{self._turns[key]}/"
    deadline = time.monotonic() + timeout_ms / 1e3
    self._client.key_value_set(f"{place}{jax.process_index()}", "here")
    while True:
      self._check_failed(save)
      here = {int(k.rpartition("/")[2]) for k, _ in self._client.key_value_dir_get(place)}
      absent = set(range(jax.process_count())) - here
      if not absent:
        return
      if time.monotonic() > deadline:
        raise AbsentError(
            f"process(es) {', '.join(map(str, sorted(absent)))} have not written "
            f"their part in {timeout_ms / 1e3:.0f} s"
        )
      time.sleep(_PAUSE_S)

  def _check_failed(self, save: str) -> None:
    failed = self._client.key_value_dir_get(f"{save}/failed/")
    others = {int(k.rpartition("/")[2]): text for k, text in failed}
    others.pop(jax.process_index(), None)
    if others:
      number, text = min(others.items())
      raise AbsentError(f"process {number} could not write its part: {text}")

  def _place(self, count: int) -> str:
    return f"vjepa_jax/saves/{self._name}/{count}"

  @property
  def _client(self) -> Any:
    return distributed.global_state.client if jax.process_count() > 1 else None
