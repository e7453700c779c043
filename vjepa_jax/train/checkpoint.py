"""Checkpoints: the whole run at a step, saved in the background, restored strictly."""

from collections.abc import Callable, Mapping
import contextlib
import functools
import json
import os
from typing import Any, Protocol

from absl import logging
from grain import checkpoint as grain_checkpoint
import jax
import numpy as np
import orbax.checkpoint as ocp

from vjepa_jax.train import meeting, seal
from vjepa_jax.train import workdir as workdir_lib
from vjepa_jax.train.optim import named_leaves

_policies = ocp.checkpoint_managers
# What says that a file could not be had now, and nothing of what is in it.
_NOT_DAMAGE = (
    "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED",
    "UNAUTHENTICATED", "CANCELLED", "Forbidden",
)


class CheckpointError(ValueError):
  """A checkpoint that is missing, damaged or does not fit; says which and why."""


class DamagedError(CheckpointError):
  """A checkpoint whose files are missing, cut short or altered.

  Attributes:
    step: of the checkpoint.
    reason: what is wrong with which file.
  """

  def __init__(self, message: str, step: int, reason: str):
    super().__init__(message)
    self.step, self.reason = step, reason


class SaveError(OSError):
  """A checkpoint that could not be written; the earlier ones are as they were."""


class DataIterator(Protocol):
  """What a checkpoint needs of the training data: a place that can be kept."""

  def get_state(self) -> Any:
    """Returns the place, as bytes or as something json can hold."""

  def set_state(self, state: Any) -> None:
    """Goes to a place of `get_state`."""


class Checkpoints:
  """The checkpoints of one folder, one sub-folder a step.

  A save copies the state to the host and goes on in the background; it counts
  only when complete, so that a process killed on the way leaves the earlier ones
  as they were. Sub-folder contents: `state` (arrays), `config` and `extra` (JSON),
  `data` (the data iterator's place, one file a process).
  """

  def __init__(
      self,
      directory: str | os.PathLike[str],
      *,
      keep: int | None = 3,
      keep_every_steps: int | None = None,
      best_mode: str | None = None,
      read_only: bool = False,
  ):
    """Opens or creates a folder, local or gs://.

    Args:
      directory: where the steps are.
      keep: how many to keep: the latest, or the best where best_mode is set;
        None keeps all.
      keep_every_steps: beside these, one every so many steps stays for good.
      best_mode: "max" or "min" rank by the `metric` given to `save`; None by step.
      read_only: neither creates nor changes anything, so that a run that is still
        writing may be looked at.

    Raises:
      ValueError: best_mode is unknown.
    """
    _tell_once()
    if best_mode not in (None, "max", "min"):
      raise ValueError(f"checkpoints: best_mode {best_mode!r} is none of 'max', 'min'")
    self.directory = workdir_lib.open_path(directory)
    if not workdir_lib.is_remote(directory):
      self.directory = self.directory.expanduser().resolve()
    self._keep, self._mode = keep, best_mode
    self._keep_every_steps, self._read_only = keep_every_steps, read_only
    self._failed = self._must_reopen = False
    self._meeting = meeting.Meeting(str(self.directory))
    self._manager = self._open()

  def latest_step(self) -> int | None:
    """Returns the last complete step; None where there is none."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """Returns the step with the best metric; None where there is none.

    Raises:
      SaveError, WorkdirError: as `wait`.
    """
    self.wait()
    return self._manager.best_step()

  def all_steps(self) -> list[int]:
    """Returns the complete steps, ascending."""
    return sorted(self._manager.all_steps())

  def save(
      self,
      step: int,
      state: Any,
      *,
      config: Mapping[str, Any],
      extra: Mapping[str, Any] | None = None,
      iterator: DataIterator | None = None,
      metric: float | None = None,
  ) -> None:
    """Starts saving; returns once the state is copied and may be donated.

    Args:
      step: names the checkpoint; one that exists under this name stays as it is.
      state: tree of arrays; typed PRNG keys are kept as their words.
      config: the experiment, as JSON.
      extra: the loop's own numbers, as JSON.
      iterator: the training data, whose place is kept.
      metric: what "best" is ranked by.

    Raises:
      SaveError: this save failed, or the one before it.
      WorkdirError: its bucket is out of reach for too long.
    """
    self.wait()
    if self._must_reopen:
      self._write(self._reopen)
    if step in self._manager.all_steps():
      return
    items = {
        "state": _Save(_to_nested(state)),
        "config": ocp.args.JsonSave(dict(config)),
        "extra": ocp.args.JsonSave(dict(extra or {})),
    }
    if iterator is not None:
      items["data"] = grain_checkpoint.CheckpointSave(_Place(iterator))
    metrics = None if metric is None else {"metric": float(metric)}
    self._meeting.begin()
    self._write(
        lambda: self._manager.save(
            step, args=ocp.args.Composite(**items), metrics=metrics
        )
    )

  def restore(
      self,
      step: int,
      state: Any,
      *,
      partial: bool = False,
  ) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint that must fit the wanted state exactly.

    Args:
      step: one of `all_steps`.
      state: tree of arrays or ShapeDtypeStruct (with or without sharding), or,
        with `partial`, a mapping of some of its fields, such as {"params": ...}.
      partial: allows fields that the checkpoint has and `state` leaves out.

    Returns:
      (state, extra).

    Raises:
      CheckpointError: no such step; names missing, unexpected or misshapen, all of
        them.
      DamagedError: a file is missing, cut short or altered.
    """
    self._check_exists(step)
    wanted = _to_nested(state)
    self._check_fits(step, wanted, partial)
    items = {
        "state": _Restore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=partial,
        ),
        "extra": ocp.args.JsonRestore(),
    }
    restored = self._read(
        step, lambda: self._manager.restore(step, args=ocp.args.Composite(**items))
    )
    return _from_nested(restored["state"], state), restored["extra"]

  def restore_place(self, step: int, iterator: DataIterator) -> None:
    """Sends the training data to where it was when the step was saved.

    Raises:
      CheckpointError: no such step.
      DamagedError: a file is missing, cut short or altered.
      Exception: what the iterator raises where its data are not those of the place.
    """
    self._check_exists(step)
    place = _Place(iterator)
    self.wait()
    self._read(step, lambda: place.set_state(self._place_file(step).read_bytes()) or True)
    # Apart from reading: that the data are others is no damage of the checkpoint.
    place.go()

  def _place_file(self, step: int):
    """What this process wrote, or, of a run of other processes, any: all are equal."""
    folder = self.directory / str(step) / "data"
    own = folder / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    others = sorted(folder.glob("process_*-of-*.json"))
    return own if own in others or not others else others[0]

  def config(self, step: int) -> dict[str, Any]:
    """Returns the experiment's JSON that was saved with a step.

    Raises:
      CheckpointError: no such step.
      DamagedError: a file is missing, cut short or altered.
    """
    self._check_exists(step)
    args = ocp.args.Composite(config=ocp.args.JsonRestore())
    return self._read(step, lambda: self._manager.restore(step, args=args))["config"]

  def check(self, step: int, share: tuple[int, int] = (0, 1)) -> None:
    """Reads the files of a step's state through and compares their checksums.

    Nothing is read in a bucket, which keeps checksums itself.

    Args:
      step: one of `all_steps`.
      share: (i, n) reads every nth block only, so that n hosts share the work.

    Raises:
      DamagedError: names the first file that is missing, cut short or altered.
    """
    fault = self._read(
        step, lambda: [seal.fault(self.directory / str(step) / "state", share)]
    )[0]
    if fault:
      raise self._damaged(step, fault)

  def set_aside(self, step: int) -> str:
    """Renames a damaged step's folder, so that no run goes on from it.

    One process does it for all; the others call `reload`.

    Returns:
      The new name.

    Raises:
      OSError: the folder cannot be renamed.
    """
    names = [f"{step}.damaged", *(f"{step}.damaged.{n}" for n in range(1, 1000))]
    name = next(n for n in names if not (self.directory / n).exists())
    (self.directory / str(step)).rename(self.directory / name)
    return name

  def reload(self) -> None:
    """Looks again at which steps there are."""
    self._manager.reload()

  def would_keep(self, metric: float) -> bool:
    """Says whether a checkpoint with this metric would be among the best.

    Raises:
      SaveError, WorkdirError: as `wait`.
    """
    if not np.isfinite(metric):
      return False
    self.wait()
    steps = self._manager.all_steps()
    if self._keep is None or len(steps) < self._keep:
      return True
    known = [_metric(self._manager.metrics(step)) for step in steps]
    return metric > min(known) if self._mode == "max" else metric < max(known)

  def drop_after(self, step: int) -> None:
    """Deletes checkpoints later than `step`: a resumed run makes them again."""
    for later in self._manager.all_steps():
      if later > step:
        self._manager.delete(later)

  def wait(self) -> None:
    """Returns once nothing is being saved.

    Raises:
      SaveError: the save under way failed; it is told once.
      WorkdirError: its bucket is out of reach for too long.
    """
    if self._must_reopen:
      return  # What failed was told.
    wait = self._manager.wait_until_finished
    self._write(lambda: workdir_lib.watched(wait, self.directory))

  def idle(self) -> bool:
    """Says whether `wait` would return at once.

    On several processes, which can only find out together, it is False.
    """
    return jax.process_count() == 1 and not self._manager.is_saving_in_progress()

  def close(self) -> None:
    """Waits and releases threads; nothing is waited for after a bucket was lost.

    Raises:
      SaveError, WorkdirError: as `wait`.
    """
    if not self._failed:
      self.wait()
      self._manager.close()

  def distrust(self) -> None:
    """Begins anew at the next save: another process could not write its part."""
    self._must_reopen = True

  def abandon(self) -> None:
    """Makes `close` wait for nothing: the bucket is known to be lost."""
    self._failed = True

  def _open(self) -> ocp.CheckpointManager:
    remote = workdir_lib.is_remote(self.directory)
    if remote and not self._read_only and jax.process_index() == 0:
      self._remove_unfinished()
    handlers = {
        # Weights hardly shrink; unpacking them is what takes long in restoring.
        "state": _SealedHandler(use_compression=False),
        "config": ocp.JsonCheckpointHandler(),
        "extra": ocp.JsonCheckpointHandler(),
        "data": grain_checkpoint.CheckpointHandler(),
    }
    for handler in handlers.values():
      _tell_failures(handler, self._meeting)
    return ocp.CheckpointManager(
        self.directory,
        item_handlers=handlers,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=_retention(
                self._keep, self._keep_every_steps, self._mode
            ),
            best_fn=_metric if self._mode else None,
            best_mode=self._mode or "max",
            # What a killed run left; of a run under way it would be its next save.
            # In a bucket Orbax takes every folder without its mark for one, `best` too.
            cleanup_tmp_directories=not self._read_only and not remote,
            create=not self._read_only,
            read_only=self._read_only,
            save_interval_steps=0 if self._read_only else 1,
            async_options=ocp.AsyncOptions(barrier_sync_fn=self._meeting.wait),
        ),
    )

  def _remove_unfinished(self) -> None:
    """Removes steps in a bucket that have no mark of being complete."""
    try:
      found = list(self.directory.iterdir())
    except FileNotFoundError:
      return
    for path in found:
      if path.name.isdigit() and not (path / "commit_success.txt").exists():
        path.rmtree()

  def _reopen(self) -> None:
    """Begins anew after a failed save, and removes what it left."""
    self._manager = workdir_lib.watched(self._open, self.directory)
    self._must_reopen = False

  def _write(self, act: Callable[[], Any]) -> None:
    """Names the folder when something cannot be saved, and frees what it took."""
    try:
      act()
    except workdir_lib.WorkdirError:
      self._failed = True
      raise
    # The storage layers' errors have no kind in common.
    except Exception as error:
      # On several hosts all must open together: before the next save.
      self._must_reopen = True
      self._meeting.tell(error)
      if jax.process_count() == 1 and not workdir_lib.is_remote(self.directory):
        with contextlib.suppress(Exception):
          self._reopen()
      raise SaveError(f"{self.directory}: {meeting.in_one_line(error)}") from error

  def _check_exists(self, step: int) -> None:
    if step not in self._manager.all_steps():
      raise CheckpointError(
          f"checkpoint {step} is not in {self.directory}; complete steps there: "
          f"{self.all_steps() or 'none'}"
      )

  def _check_fits(self, step: int, wanted: Any, partial: bool) -> None:
    metadata = self._read(step, lambda: self._manager.item_metadata(step)["state"])
    saved = {name: leaf.shape for name, leaf in named_leaves(metadata.tree).items()}
    shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(wanted).items()}
    fields = {name.split("/")[0] for name in shapes}
    faults = [f"missing: {name} {list(shapes[name])}" for name in shapes.keys() - saved]
    faults += [
        f"misshapen: {name} is {list(saved[name])}, wanted {list(shapes[name])}"
        for name in shapes.keys() & saved
        if tuple(saved[name]) != shapes[name]
    ]
    faults += [
        f"unexpected: {name} {list(saved[name])}"
        for name in saved.keys() - shapes
        if not partial or name.split("/")[0] in fields
    ]
    if faults:
      listed = "\n  ".join(sorted(faults))
      raise CheckpointError(
          f"{self.directory / str(step)} does not fit this configuration "
          f"({len(faults)} names):\n  {listed}\nuse the configuration that it was "
          "saved with (see config in its folder), or another workdir"
      )

  def _read(self, step: int, read: Callable[[], Any]) -> Any:
    """Names the step and a way out when a file of it cannot be read."""
    path = self.directory / str(step)
    try:
      result = read()
      if result is None:
        raise FileNotFoundError("the metadata of its state")
      return result
    except workdir_lib.WorkdirError:
      raise
    # Damage shows as anything from KeyError to an error of the storage layer.
    except Exception as error:
      reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
      if not _shows_damage(error):
        kind = CheckpointError
        if workdir_lib.is_remote(path):
          kind = workdir_lib.WorkdirError
        raise kind(f"{path} cannot be read: {reason}; it is left as it is") from error
      raise self._damaged(step, reason) from error

  def _damaged(self, step: int, reason: str) -> DamagedError:
    earlier = [s for s in self.all_steps() if s < step]
    return DamagedError(
        f"{self.directory / str(step)} is damaged: {reason}\nto go on from an "
        f"earlier step ({earlier}), move this folder away",
        step, reason,
    )


class _Telling:
  """A write under way; that it failed is told to the other processes at once."""

  def __init__(self, future: Any, told: meeting.Meeting):
    self._future, self._meeting = future, told

  def result(self, timeout: float | None = None) -> Any:
    try:
      return self._future.result(timeout=timeout)
    except BaseException as error:
      self._meeting.tell(error)
      raise


def _tell_failures(handler: Any, told: meeting.Meeting) -> None:
  """Makes a handler tell what fails in the background, where nobody waits for it."""
  start, finalize = getattr(handler, "async_save", None), handler.finalize

  async def async_save(*args, **kwargs):
    return [_Telling(future, told) for future in await start(*args, **kwargs) or ()]

  def telling_finalize(*args, **kwargs):
    try:
      return finalize(*args, **kwargs)
    except BaseException as error:
      told.tell(error)
      raise

  if start is not None:
    handler.async_save = async_save
  handler.finalize = telling_finalize


class _SealedHandler(ocp.PyTreeCheckpointHandler):
  """Writes checksums of the arrays' files before the checkpoint counts."""

  def finalize(self, directory: Any) -> None:
    super().finalize(directory)
    seal.write(directory)


@ocp.args.register_with_handler(_SealedHandler, for_save=True)
class _Save(ocp.args.PyTreeSave):
  """What `_SealedHandler` saves."""


@ocp.args.register_with_handler(_SealedHandler, for_restore=True)
class _Restore(ocp.args.PyTreeRestore):
  """What `_SealedHandler` restores."""


@functools.cache
def _tell_once() -> None:
  """Keeps Orbax from printing a traceback of each error that it raises as well."""
  logging.get_absl_logger().addFilter(
      lambda record: not (record.exc_info and "/orbax/" in record.pathname)
  )


def _shows_damage(error: Exception) -> bool:
  """Says whether an error can come from what is in a file."""
  if isinstance(error, (MemoryError, PermissionError)):
    return False
  code = str(getattr(error, "code", "") or getattr(error, "status", ""))
  return code not in ("401", "403", "429", "500", "502", "503", "504") and not any(
      word in str(error) for word in _NOT_DAMAGE
  )


class _Place:
  """An iterator's place as bytes, which is what grain's handler writes."""

  def __init__(self, iterator: DataIterator):
    self._iterator = iterator

  def get_state(self) -> bytes:
    state = self._iterator.get_state()
    if isinstance(state, bytes):
      return json.dumps({"bytes": state.decode()}).encode()
    return json.dumps({"json": state}).encode()

  def set_state(self, state: bytes) -> None:
    self._kind, self._state = next(iter(json.loads(state).items()))

  def go(self) -> None:
    """Sends the iterator to the place that was read."""
    state = self._state.encode() if self._kind == "bytes" else self._state
    self._iterator.set_state(state)


def _retention(keep, keep_every_steps, best_mode):
  if best_mode:
    policy = _policies.BestN(
        get_metric_fn=_metric, reverse=best_mode == "min", n=keep
    )
  else:
    policy = _policies.LatestN(n=keep)
  if not keep_every_steps:
    return policy
  forever = _policies.EveryNSteps(interval_steps=keep_every_steps)
  return _policies.AnyPreservationPolicy([policy, forever])


def _metric(metrics: Mapping[str, float]) -> float:
  return metrics["metric"]


def _to_nested(tree: Any) -> dict[str, Any]:
  """Turns any tree into nested dicts by name, PRNG keys into their words."""
  nested: dict[str, Any] = {}
  for name, leaf in named_leaves(tree).items():
    *path, last = name.split("/")
    node = nested
    for part in path:
      node = node.setdefault(part, {})
    node[last] = _key_words(leaf) if _is_key(leaf) else leaf
  return nested


def _from_nested(nested: Mapping[str, Any], like: Any) -> Any:
  found = named_leaves(nested)
  leaves = [
      jax.random.wrap_key_data(found[name]) if _is_key(leaf) else found[name]
      for name, leaf in named_leaves(like).items()
  ]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _is_key(leaf: Any) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_words(key: Any) -> Any:
  if isinstance(key, jax.Array):
    return jax.random.key_data(key)
  words = jax.eval_shape(jax.random.key_data, key)
  return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=key.sharding)
