"""When a run is saved, what it goes on from, and what happens when either fails."""

from collections.abc import Callable, Mapping
import time
from typing import Any
import zlib

import jax

from vjepa_jax.train import checkpoint, watch
from vjepa_jax.train import metrics as metrics_lib
from vjepa_jax.train import workdir as workdir_lib
from vjepa_jax.train.program import Program
from vjepa_jax.train.state import TrainState

# Seconds that a save waits for the lines before it to reach a bucket.
_PATIENCE_S = 20.0
_PAUSE_S = 1.0


class Saver:
  """The checkpoints of a run: the latest, and the best by an evaluator's number.

  Attributes:
    directory: where they are.
    resumed: whether the run goes on from one.
    failed: how many saves have failed.
  """

  def __init__(
      self,
      latest: checkpoint.Checkpoints,
      best: checkpoint.Checkpoints | None,
      *,
      feed: watch.Feed,
      files: workdir_lib.Files,
      config: Mapping[str, Any],
      every_steps: int | None = None,
      every_minutes: float | None = None,
      max_failed: int = 3,
  ):
    """Saves and restores nothing yet.

    Args:
      latest: where the run is saved.
      best: where the best are kept; None: nowhere.
      feed: whose place belongs to a checkpoint.
      files: hold the lines that must be written before a checkpoint counts.
      config: the experiment, kept in each.
      every_steps: when `due` says so.
      every_minutes: when `late` says so.
      max_failed: saves in a row that may fail before the run does.
    """
    self._latest, self._best = latest, best
    self.directory = latest.directory
    self._feed, self._files, self._config = feed, files, config
    self._every_steps, self._every_minutes = every_steps, every_minutes
    self._max_failed = max_failed
    self._writer: metrics_lib.Writer | None = None
    self._saved_at = time.monotonic()
    self._under_way: int | None = None
    self._failed_in_row = 0
    self.failed, self.resumed = 0, False

  def attach(self, writer: metrics_lib.Writer) -> None:
    """Takes the writer whose lines a checkpoint vouches for."""
    self._writer = writer

  def latest_step(self) -> int | None:
    """Returns the last complete step; None where there is none."""
    return self._latest.latest_step()

  def folders(self) -> dict[str, str]:
    """Returns the folders of the latest and of the best checkpoint."""
    found = {"checkpoint": f"{self.directory}/{self._latest.latest_step()}"}
    if self._best is not None and self._best.best_step() is not None:
      found["best"] = f"{self._best.directory}/{self._best.best_step()}"
    return found

  def restore(
      self, build: Callable[[], Program]
  ) -> tuple[Program, TrainState, dict[str, Any]] | None:
    """Reads the last checkpoint that is sound; damaged ones are set aside and told.

    Args:
      build: the program for the batch at the place that the data were sent to.

    Returns:
      (program, state, extra), or None where nothing was ever saved.

    Raises:
      CheckpointError: all are damaged (nothing is renamed then), one is of another
        model, or the processes do not see the same ones.
      WorkdirError: the bucket is out of reach.
    """
    damaged: list[checkpoint.DamagedError] = []
    steps = self._latest.all_steps()
    self._check_shared(steps)
    for step in reversed(steps):
      try:
        restored = self._read(step, build)
      except checkpoint.DamagedError as error:
        damaged.append(error)
        continue
      self._set_aside(damaged, step)
      if self._best is not None:
        self._best.drop_after(step)
      self.resumed = True
      return restored
    if damaged:
      listed = "\n  ".join(f"{error.step}: {error.reason}" for error in damaged)
      raise checkpoint.CheckpointError(
          f"{self.directory}: no checkpoint is sound:\n  {listed}\nbring one back "
          "from a copy, or begin again in another workdir"
      )
    return None

  def due(self, step: int) -> bool:
    """Says whether a checkpoint is due by the number of steps."""
    return bool(self._every_steps) and step % self._every_steps == 0

  def late(self) -> bool:
    """Says whether a checkpoint is due by the clock of this process."""
    minutes = self._every_minutes
    return minutes is not None and time.monotonic() - self._saved_at > 60 * minutes

  def save(self, step: int, state: TrainState, extra: Mapping[str, Any]) -> None:
    """Starts saving; a save that fails is told, and tried again at the next.

    Raises:
      CheckpointError: too many in a row have failed.
      WorkdirError: so they have in a bucket, or it is out of reach.
    """
    self._saved_at = time.monotonic()
    self._settle()
    error = _caught(self._write_lines) or self._wait_for_best()
    # Saving has collectives: all processes take part, or none.
    if not watch.agree(error is not None):
      error = _caught(lambda: self._latest.save(
          step, state, config=self._config, extra=extra, iterator=self._feed
      ))
    if watch.agree(error is not None):
      self._count(step, error, self._latest)
    else:
      self._under_way = step

  def save_best(
      self, step: int, state: TrainState, extra: Mapping[str, Any], metric: float
  ) -> None:
    """Saves what is among the best; fails as `save` does."""

    keep = False

    def rank() -> None:
      nonlocal keep
      keep = self._best.would_keep(metric)

    # One at a time: what Orbax signals between its threads knows no folder.
    self._settle()
    error = _caught(rank)
    # As in `save`: all processes take part, or none.
    if not watch.agree(error is not None) and watch.agree(keep):
      error = _caught(lambda: self._best.save(
          step, state, config=self._config, extra=extra, iterator=self._feed,
          metric=metric,
      ))
    if watch.agree(error is not None):
      self._count(step, error, self._best)

  def check(self) -> None:
    """Counts a save that has failed meanwhile; waits for nothing.

    Raises:
      CheckpointError, WorkdirError: as `save`.
    """
    if self._under_way is not None and self._latest.idle():
      self._settle()

  def finish(self, save: Callable[[], None]) -> None:
    """Waits for the last save, and tries it again at once where it failed.

    Args:
      save: calls `save` with the state that must be kept.

    Raises:
      CheckpointError, WorkdirError: as `save`.
    """
    self._settle()
    while self._failed_in_row:
      time.sleep(_PAUSE_S)
      save()
      self._settle()
    if error := self._wait_for_best():
      self._say(f"the last of {self._best.directory} is not saved: {error}")

  def abandon(self) -> None:
    """Makes `close` wait for nothing: the bucket is known to be lost."""
    for checkpoints in self._all():
      checkpoints.abandon()

  def close(self) -> None:
    """Waits and releases threads."""
    for checkpoints in self._all():
      if error := _caught(checkpoints.close):
        self._say(f"not saved: {error}")

  def _all(self) -> list[checkpoint.Checkpoints]:
    return [c for c in (self._latest, self._best) if c is not None]

  def _check_shared(self, steps: list[int]) -> None:
    """Refuses a folder in which the processes see different steps."""
    # 24 bits, which float32 holds exactly.
    digest = float(zlib.crc32(repr(steps).encode()) >> 8)
    if watch.largest(digest) != -watch.largest(-digest):
      raise checkpoint.CheckpointError(
          f"{self.directory}: the processes see different checkpoints; process "
          f"{jax.process_index()} sees {steps or 'none'}. Name a --workdir that all "
          "machines share"
      )

  def _read(
      self, step: int, build: Callable[[], Program]
  ) -> tuple[Program, TrainState, dict[str, Any]]:
    share = jax.process_index(), jax.process_count()
    self._together(step, lambda: self._latest.check(step, share))
    self._together(step, lambda: self._latest.restore_place(step, self._feed))
    program = build()
    state, extra = self._together(
        step, lambda: self._latest.restore(step, program.state)
    )
    return program, state, extra

  def _together(self, step: int, act: Callable[[], Any]) -> Any:
    """Runs `act`; what one process finds damaged is so for all."""
    result = error = None
    try:
      result = act()
    except checkpoint.DamagedError as found:
      error = found
    if watch.agree(error is not None):
      reason = "another process cannot read it"
      raise error or checkpoint.DamagedError(reason, step, reason)
    return result

  def _set_aside(self, damaged: list[checkpoint.DamagedError], step: int) -> None:
    for error in damaged:
      if jax.process_index() == 0:
        try:
          name = self._latest.set_aside(error.step)
        except OSError as trouble:
          raise checkpoint.CheckpointError(
              f"{error}\nand it cannot be renamed: {trouble}"
          ) from trouble
        self._say(
            f"DAMAGED CHECKPOINT: {self.directory / str(error.step)}: {error.reason}; "
            f"set aside as {name}, nothing is deleted"
        )
    if damaged:
      watch.agree(False)  # Until process 0 is through.
      self._latest.reload()
      self._say(
          f"FALLS BACK to the checkpoint of step {step}; what came after it up to "
          f"step {damaged[0].step} is trained again"
      )

  def _write_lines(self) -> None:
    """A checkpoint says that all lines up to it are written."""
    if self._writer is not None:
      self._writer.flush()
    if not self._files.flush(patience_s=_PATIENCE_S):
      raise checkpoint.SaveError(
          f"the lines before it have not reached the bucket in {_PATIENCE_S:.0f} s"
      )

  def _wait_for_best(self) -> OSError | None:
    return _caught(self._best.wait) if self._best is not None else None

  def _settle(self) -> None:
    """Waits for the save under way, and counts it."""
    if self._under_way is None:
      return
    step, self._under_way = self._under_way, None
    error = _caught(self._latest.wait)
    if watch.agree(error is not None):
      self._count(step, error, self._latest)
    else:
      self._failed_in_row = 0

  def _count(
      self, step: int, error: OSError | None, of: checkpoint.Checkpoints
  ) -> None:
    if jax.process_count() > 1:
      of.distrust()  # All open anew together, or none.
    self.failed += 1
    self._failed_in_row += 1
    reason = error or "another process could not write its part"
    told = (
        f"step {step}: NOT SAVED, {self._failed_in_row} of {self._max_failed} times in "
        f"a row: {reason}; the last good checkpoint is that of step "
        f"{self.latest_step()}"
    )
    if self._failed_in_row < self._max_failed:
      self._say(f"{told}; training goes on, the next save tries again")
      return
    kind = checkpoint.CheckpointError
    if workdir_lib.is_remote(self.directory):
      kind = workdir_lib.WorkdirError
    raise kind(
        f"{told}; the run ends here (train.max_failed_saves). Make room or name "
        "another train.checkpoint_dir; the same command goes on"
    ) from error

  def _say(self, text: str) -> None:
    if self._writer is not None:
      self._writer.say(text)
    elif jax.process_index() == 0:
      print(text, flush=True)


def _caught(act: Callable[[], Any]) -> OSError | None:
  """Returns why something could not be written; a lost bucket still ends the run."""
  try:
    act()
  except workdir_lib.WorkdirError:
    raise
  except OSError as error:
    return error
  return None
