"""Trains what a config says; the same command again goes on where it stopped.

  python -m vjepa_jax.main --config=configs/oct_multi.py:sample --workdir=runs/sample

The workdir, local or gs://bucket/folder, then holds config.json, data_report.json,
quarantine.tsv, metrics.jsonl, TensorBoard events, checkpoints/, figures/ and
report.json. With --preflight nothing is trained: what a run needs is tried on a few
volumes.

Several processes are one run: on a TPU pod, under SLURM and Open MPI by the same
command on each, elsewhere with --coordinator=HOST:PORT --processes=N --process_id=I
(or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID).

Exit codes: 0 done; 2 a config, data or processes that cannot run; 75 a bucket was out
of reach for too long; 76 another process was lost or never came; 143 or 130 stopped
by SIGTERM or SIGINT after saving. After 75, 76, 143 and 130 the same command goes on.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import functools
import json
import os
import sys
import traceback
from typing import Any

from absl import app, flags, logging
import jax
from jax.experimental import multihost_utils
from ml_collections import config_flags
import numpy as np

import vjepa_jax
from vjepa_jax import config as config_lib
from vjepa_jax.config import preflight
from vjepa_jax.data import pipeline, storage
from vjepa_jax.data.record import DataError, ReadError
from vjepa_jax.report import summary
from vjepa_jax.train import checkpoint, fit, hosts, lifeline, loop, metrics, watch
from vjepa_jax.train import state as state_lib
from vjepa_jax.train import workdir as workdir_lib

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "FILE.py[:ARG] of the experiment; --config.KEY=VALUE overrides.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None,
    "Folder of the run, local or gs://; default runs/NAME of the config.",
)


class _CountParser(flags.ArgumentParser):
  """A count that may be left out, as in --preflight."""

  syntactic_help = "a number"

  def parse(self, argument: Any) -> int:
    words = {"true": preflight.VOLUMES, "false": 0}
    count = words.get(str(argument))
    count = int(argument) if count is None else count
    if count < 0:
      raise ValueError("must not be negative")
    return count


_PREFLIGHT = flags.DEFINE_flag(flags.Flag(
    _CountParser(), flags.ArgumentSerializer(), "preflight", 0,
    f"Trains nothing; tries what a run needs on so many volumes "
    f"({preflight.VOLUMES} where no number is given).", boolean=True,
))
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0 of a run of several processes.",
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_START_TIMEOUT_S = flags.DEFINE_float(
    "start_timeout_s", hosts.START_TIMEOUT_S,
    "How long process 0 waits for the others.",
)
_LOST_AFTER_S = flags.DEFINE_float(
    "lost_after_s", hosts.LOST_AFTER_S,
    "Silence after which another process counts as lost.",
)


class _SpanParser(flags.ArgumentParser):
  """Steps to trace, as in --profile_steps=100:105."""

  syntactic_help = "A:B or N"

  def parse(self, argument: Any) -> tuple[int, int]:
    return watch.profile_span(argument)


_PROFILE = flags.DEFINE_flag(flags.Flag(
    _SpanParser(), flags.ArgumentSerializer(), "profile_steps", None,
    "Writes a trace of the steps after A up to B, or of N once all is compiled, into "
    "WORKDIR/profile, for TensorBoard or xprof.",
))
_BUCKET_LOST = 75  # EX_TEMPFAIL of sysexits.h: a scheduler may start it again
# What may differ between a run and its continuation.
_FREE = (
    "train", "evals", "wandb", "data.threads", "data.cache_bytes",
    "data.max_bad_fraction", "data.max_lost_fraction", "data.workers",
    "data.timeout_s", "data.storage.cache", "data.storage.cache_bytes",
    "data.storage.deadline_s", "data.storage.anonymous",
)
_FIXED_IN_TRAIN = ("batch_size",)
_LENGTHS = ("train.total_steps", "train.total_epochs", "train.steps_per_epoch")


def main(argv: list[str]) -> None:
  """Checks, builds, trains, reports."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")
  logging.set_verbosity(logging.WARNING)
  config, together = _CONFIG.value, hosts.Hosts()
  try:
    workdir = _WORKDIR.value or f"runs/{config.name}"
    if not _PREFLIGHT.value:
      config_lib.check_config(config)
    together = _join(config, workdir)
    if _PREFLIGHT.value:
      sys.exit(2 if try_run(config, workdir, _PREFLIGHT.value) else 0)
    train(config, workdir, together, profile=_PROFILE.value)
  except SystemExit as end:
    if end.code not in (None, 0, 130, 143):  # Those are the ends that all come to.
      together.fail(end.code)
    together.close()
    raise
  except lifeline.MissingError as error:
    print(error, file=sys.stderr, flush=True)
    sys.exit(hosts.LOST)
  except (
      config_lib.ConfigError, DataError, ReadError, checkpoint.CheckpointError,
      workdir_lib.WorkdirError, hosts.HostsError, fit.FitError, state_lib.PartsError,
  ) as error:
    print(error, file=sys.stderr, flush=True)
    if not _is_bucket_lost(error):
      together.fail(2)
    if not together.alone:
      together.fail(_BUCKET_LOST)
    # Threads that still wait for the bucket would hold the process.
    sys.stdout.flush()
    os._exit(_BUCKET_LOST)
  except BaseException:
    if together.alone:
      raise
    traceback.print_exc()
    together.fail(1)
  together.close()


def _join(config: Any, workdir: str) -> hosts.Hosts:
  """Finds the other processes of this run, and says what it runs on."""
  place = hosts.find_place(
      _COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value,
      timeout_s=_START_TIMEOUT_S.value,
  )
  facts = hosts.describe(config_lib.as_plain(config), workdir)
  together = hosts.start(
      place, facts, timeout_s=_START_TIMEOUT_S.value, lost_after_s=_LOST_AFTER_S.value
  )
  if place is not None and jax.process_count() != place.processes:
    print(
        f"{place.processes} processes have met, but jax counts {jax.process_count()} "
        "in this slice of devices: each would train alone. Start one process a host "
        "of one pod, without --processes", file=sys.stderr, flush=True,
    )
    together.fail(2)
  if place is None or place.process == 0:
    print(hosts.summary(facts), flush=True)
  return together


def train(
    config: Any,
    workdir: str | os.PathLike[str],
    together: hosts.Hosts | None = None,
    *,
    profile: tuple[int, int] | None = None,
) -> None:
  """Runs an experiment in a workdir and writes its report.

  Args:
    config: a checked ConfigDict.
    workdir: local or `gs://`, made where absent.
    together: the processes of the run; None: there is but this one.
    profile: steps to trace, of `watch.profile_span`; None: as the config says.

  Raises:
    ConfigError: if the workdir holds a run of another config, or there is nothing to
      start from where the config counts on it.
    DataError: if the data cannot be used.
    ReadError: if the manifest itself cannot be fetched.
    CheckpointError: if the last checkpoint is damaged or does not fit.
    WorkdirError: if the bucket of the workdir is out of reach.
    PartsError: if what the run starts from does not fit its model.
  """
  plain = config_lib.as_plain(config)
  workdir = workdir_lib.open_path(workdir)
  check_continuation(workdir, plain)
  _check_start(plain)
  first = jax.process_index() == 0
  if first:  # Before the data are read: an unwritable workdir is told at once.
    _write_json(workdir / "config.json", plain)
  experiment = config_lib.build(config, quarantine=str(workdir / "quarantine.tsv"))
  data, options = experiment.data, experiment.options
  if profile:
    options = dataclasses.replace(
        options, profile_from_step=profile[0], profile_steps=profile[1]
    )
  if first:
    _write_json(workdir / "data_report.json", data.report)
    print(format_data(data.report))
  held_out = data.splits.get("validation")
  threads = plain["data"].get("threads", 2)
  with contextlib.ExitStack() as stack:
    stack.callback(data.close)
    if first:
      stack.push(functools.partial(_write_report_of, data, workdir))
    train_iterator = pipeline.train_iterator(
        data.splits["train"],
        batch_size=options.batch_size // jax.process_count(),
        seed=config.seed,
        threads=threads,
        shard=(jax.process_index(), jax.process_count()),
        workers=data.workers,
        exchange=_exchange,
    )
    stack.callback(train_iterator.close)
    loop.run(
        objective=experiment.objective,
        optimizer=experiment.optimizer,
        augment=experiment.augment,
        train_iterator=train_iterator,
        workdir=workdir,
        options=options,
        config=plain,
        seed=config.seed,
        mesh=experiment.mesh,
        eval_batches=held_out and (
            lambda: pipeline.eval_batches(held_out, options.batch_size, threads=threads)
        ),
        evaluators=experiment.evaluators,
        reached=(together or hosts.Hosts()).reached,
        start=functools.partial(_start, plain) if plain["train"].get("start_from") else None,
    )
  if first:
    report = summary.write_report(workdir, metrics.read(workdir))
    print(summary.format_report(report))
    print(f"figures, report and checkpoints are in {workdir}")


def _check_start(plain: Mapping[str, Any]) -> None:
  """Checks what can be told of `train.start_from` before the data are read.

  Raises:
    ConfigError: if it is empty where the encoder is spared, holds no run, or one whose
      fixed positions mean other places.
  """
  source, optimizer = plain["train"].get("start_from"), plain["optimizer"]
  if source is None:
    return
  fault = ""
  spared = optimizer.get("layer_decay", 1.0) != 1.0 or any(
      pattern.startswith("^encoder") for pattern in optimizer.get("frozen") or ()
  )
  if not source and spared:
    fault = (
        "empty, but optimizer.layer_decay or .frozen spares an encoder that has learned "
        "something; name the workdir of a run, or take the arm 'scratch'"
    )
  elif source:
    content = workdir_lib.read_bytes(workdir_lib.open_path(source) / "config.json")
    fault = (
        f"{source} holds no config.json; it is no run's workdir" if content is None
        else config_lib.positions_fault(source, json.loads(content), plain)
    )
  if fault:
    raise config_lib.ConfigError(plain["name"], [f"train.start_from: {fault}"])


def _start(plain: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the encoder of `train.start_from`, which a new run begins with.

  Raises:
    ConfigError: if `train.start_from` holds no run, or no whole checkpoint.
  """
  source = plain["train"]["start_from"]
  try:
    encoders = vjepa_jax.load(source)
  except (FileNotFoundError, checkpoint.CheckpointError) as error:
    fault = f"train.start_from: {error}"
    raise config_lib.ConfigError(plain["name"], [fault]) from error
  if jax.process_index() == 0:
    print(f"starts with the encoder of step {encoders.step} of {source}", flush=True)
  return {"encoder": encoders.best}


def _write_report_of(data: pipeline.Data, workdir, kind, *unused) -> None:
  """Writes what lazy reading has learnt; a lost bucket takes no report."""
  if kind is None or not issubclass(kind, workdir_lib.WorkdirError):
    _write_json(workdir / "data_report.json", data.report)


def _exchange(share: pipeline.HostShare) -> list[pipeline.HostShare]:
  """Returns what every process says that it will read."""
  text = json.dumps([share.host, share.hosts, share.order, share.draws.tolist()])
  words = np.frombuffer(text.encode(), np.uint8)
  longest = int(multihost_utils.process_allgather(np.int32(len(words))).max())
  padded = np.pad(words, (0, longest - len(words)), constant_values=ord(" "))
  told = [
      json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)
  ]
  return [
      pipeline.HostShare(host, hosts, order, np.array(draws, np.uint64))
      for host, hosts, order, draws in told
  ]


def try_run(config: Any, workdir: str | os.PathLike[str], volumes: int) -> int:
  """Prints what `preflight.run` finds, and returns the number of faults."""
  plain = config_lib.as_plain(config)
  checks = {"continuation": lambda: check_continuation(workdir, plain)}
  return preflight.run(config, workdir, volumes=volumes, checks=checks).faults


def check_continuation(
    workdir: str | os.PathLike[str], plain: Mapping[str, Any]
) -> None:
  """Refuses to go on from the checkpoints of another config.

  A workdir without a checkpoint has nothing to go on from. Another length is
  allowed, and said: it stretches the schedules from here on.

  Raises:
    ConfigError: lists every key that differs and matters.
  """
  workdir = workdir_lib.open_path(workdir)
  path = workdir / "config.json"
  saved = plain["train"].get("checkpoint_dir") or workdir / "checkpoints"
  content = workdir_lib.read_bytes(path)
  if content is None or not any(workdir_lib.open_path(saved).glob("[0-9]*")):
    return
  found = hosts.flat(json.loads(content))
  wanted = hosts.flat(json.loads(json.dumps(plain)))
  differing = [
      key for key in sorted(found.keys() | wanted.keys())
      if found.get(key) != wanted.get(key)
  ]
  faults = [
      f"{key}: {found.get(key)!r} in {path}, {wanted.get(key)!r} now; name another "
      "--workdir, or the old value"
      for key in differing if _matters(key)
  ]
  if faults:
    raise config_lib.ConfigError(plain["name"], faults)
  for key in set(differing) & set(_LENGTHS):
    print(
        f"{key}: was {found.get(key)!r}, is {wanted.get(key)!r}; learning rate and "
        "momentum follow the new length from here on"
    )


def format_data(report: Mapping[str, Any]) -> str:
  """Returns a few lines that say what the data are and what was lost."""
  lines = []
  for name, split in report["splits"].items():
    devices = ", ".join(f"{k} {n}" for k, n in sorted(split["device"].items()))
    lines.append(
        f"{name}: {split['records']} volumes of {split['participants']} participants "
        f"({devices})"
    )
  tally = lambda counts: ", ".join(f"{k} {n}" for k, n in counts.items()) or "none"
  lines.append(f"left out by the manifest and its filters: {tally(report['lost'])}")
  bad = f"quarantined: {tally(report['quarantine'])}"
  if report["quarantine"]:
    bad += f"; by device: {tally(report['quarantine_device'])}"
  lines.append(bad)
  lines.append(f"spacing from: {tally(report['spacing_source'])}")
  return "\n".join(lines)


def _matters(key: str) -> bool:
  section, _, rest = key.partition(".")
  free = section in _FREE or key in _FREE
  return not free or (section == "train" and rest in _FIXED_IN_TRAIN)


def _is_bucket_lost(error: BaseException | None) -> bool:
  """Says whether an error comes from a bucket that cannot be reached for now."""
  cause = error
  while cause is not None:
    if isinstance(cause, workdir_lib.WorkdirError):
      return True
    cause = cause.__cause__
  return storage.is_out_of_reach(error)


def _write_json(path: os.PathLike[str], value: Any) -> None:
  text = json.dumps(value, indent=2, sort_keys=True) + "\n"
  workdir_lib.write_bytes(path, text.encode())


if __name__ == "__main__":
  jax.config.config_with_absl()
  flags.mark_flags_as_required(["config"])
  app.run(main)
