"""The only training loop: steps, logs, evaluates, saves, resumes."""

from collections.abc import Callable, Iterable, Mapping
import contextlib
import dataclasses
import functools
import os
import pathlib
from typing import Any

from clu import parameter_overview
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vjepa_jax.evaluators.base import Evaluator
from vjepa_jax.objectives.base import Objective
from vjepa_jax.train import (
    checkpoint,
    compiled,
    evaluate,
    fit,
    schedules,
    sharding,
    watch,
)
from vjepa_jax.train import metrics as metrics_lib
from vjepa_jax.train import state as state_lib
from vjepa_jax.train import workdir as workdir_lib
from vjepa_jax.train.optim import Optimizer
from vjepa_jax.train.program import Program, make_program
from vjepa_jax.train.saver import Saver
from vjepa_jax.train.state import Augment, TrainState

# Share of the time spent in waiting for data above which a log line says so.
_MAX_DATA_WAIT = 0.2
# What a resumed run of a bucket needs beside it.
_GOES_ON_WITH = ("metrics.jsonl", "wandb_id.txt")


@dataclasses.dataclass(frozen=True)
class LoopOptions:
  """What the loop does when; every number of steps is a number of optimiser steps.

  Attributes:
    total_steps: length of the run.
    batch_size: rows a step over all hosts and micro-batches.
    accum: micro-batches a step.
    fit: "auto" takes more of them where a step would not fit into memory, by the
      compiler's word before step 1; batch_size stays. A run goes on with what it
      began with.
    memory_gib: of a device, for `fit`; None: what the device says.
    log_every_steps: a line holds the means since the one before.
    checkpoint_every_steps: None: only at the end.
    checkpoint_every_minutes: beside that; on many hosts looked at when logging.
    checkpoint_dir: None: workdir/checkpoints; may be gs://.
    keep: how many of the latest checkpoints stay.
    keep_every_steps: beside these, one every so many steps stays for good.
    best_metric: name of an evaluator's number that ranks checkpoints/best; never
      the self-supervised loss, which is lowest where features have collapsed.
    best_mode: "max" or "min".
    keep_best: how many of the best stay.
    max_failed_saves: checkpoints in a row that could not be written (a full disk, a
      bucket that refuses) before the run ends.
    early_stop_metric: name of an evaluator's number; None never stops early.
    early_stop_patience: evaluations without a better value before stopping.
    early_stop_mode: "max" or "min".
    validate_every_steps: validation loss; None: at the start and the end only.
    validation_batches: at most so many; None: all.
    max_skipped_in_row: non-finite steps in a row that end the run.
    fsdp_min_size: arrays with fewer elements are never split.
    fsdp_rules: (regex, axes) that decide how matching arrays are split.
    tokens_per_volume: for tokens_per_s; None leaves it out.
    tensorboard: writes TensorBoard events.
    wandb: keywords of wandb.init; None: off.
    profile_from_step: writes a trace into workdir/profile; watch.SOON: after the
      first steps of this process; None: off.
    profile_steps: length of the trace.
    flops_per_volume: counts what the model needs for one, for mfu; None leaves it out.
    compilation_cache: folder in which compiled programs outlive the run; "auto" and
      None as in `compiled.keep_programs`.
  """

  total_steps: int
  batch_size: int
  accum: int = 1
  fit: str = "off"
  memory_gib: float | None = None
  log_every_steps: int = 50
  checkpoint_every_steps: int | None = None
  checkpoint_every_minutes: float | None = None
  checkpoint_dir: str | None = None
  keep: int = 3
  keep_every_steps: int | None = None
  best_metric: str | None = None
  best_mode: str = "max"
  keep_best: int = 1
  max_failed_saves: int = 3
  early_stop_metric: str | None = None
  early_stop_patience: int = 10
  early_stop_mode: str = "max"
  validate_every_steps: int | None = None
  validation_batches: int | None = None
  max_skipped_in_row: int = 10
  fsdp_min_size: int = 2**16
  fsdp_rules: sharding.Rules = ()
  tokens_per_volume: int | None = None
  tensorboard: bool = True
  wandb: Mapping[str, Any] | None = None
  profile_from_step: int | None = None
  profile_steps: int = 3
  flops_per_volume: Callable[[], float] | None = None
  compilation_cache: str | None = None


def run(
    *,
    objective: Objective,
    optimizer: Optimizer,
    augment: Augment,
    train_iterator: checkpoint.DataIterator,
    workdir: str | os.PathLike[str],
    options: LoopOptions,
    config: Mapping[str, Any],
    seed: int = 0,
    mesh: Mesh | None = None,
    eval_batches: Callable[[], Iterable[evaluate.HostBatch]] | None = None,
    evaluators: Mapping[str, tuple[Evaluator, int | None]] | None = None,
    reached: Callable[[int, int], int] = watch.stop_alone,
    start: Callable[[], Mapping[str, Any]] | None = None,
) -> TrainState:
  """Trains to the end, or goes on from the last checkpoint of the workdir.

  At each step the order is: log, evaluate, save; so that a checkpoint of a step
  means that all its lines are written, and lines beyond it are dropped and made
  again on resuming. A resumed run equals an unbroken one bit for bit, but for
  metrics.TIMING_KEYS.

  Args:
    objective: owns loss, parameters, model state.
    optimizer: of `optim.make_optimizer`.
    augment: host batch -> device batch, on the device.
    train_iterator: endless host batches of this process, with get_state, set_state.
    workdir: of the run, local or `gs://`.
    options: what happens when.
    config: the experiment as JSON, kept in every checkpoint.
    seed: of parameters and of every draw on the device.
    mesh: of `sharding.make_mesh`; None: all devices along data.
    eval_batches: called for each validation; gives whole batches, the same on every
      host, padded with `_mask` 0.
    evaluators: name -> (evaluator, every how many steps). All run before the first
      step and after the last; None for the number means only then. One that has
      `restore(lines)` gets the lines of metrics.jsonl when a run goes on.
    reached: (step, signal that came here or 0) -> signal by which all processes stop
      at this step, or 0; several processes need `hosts.Hosts.reached`.
    start: gives parts of the parameters, such as {"encoder": ...}, that a new run
      begins with in place of drawn ones; a run that goes on has its own.

  Returns:
    The state after the last step.

  Raises:
    NonFiniteError: options.max_skipped_in_row steps in a row were not finite.
    CheckpointError: no checkpoint is sound, the last one is of another model, or
      options.max_failed_saves in a row could not be written.
    SystemExit: SIGTERM or SIGINT came; the run is saved and the same command goes
      on. The code is 128 + the signal's number (143, 130), so that schedulers
      tell it from a finished run. A second SIGINT interrupts at once.
    ValueError: batch, mesh or schedules that do not fit each other, (FitError) a
      step that does not fit into memory, or (PartsError) a start that does not fit
      the model.
    KeyError: best_metric or early_stop_metric is no number of any evaluator.
    WorkdirError: the bucket of the workdir was out of reach for too long, or
      refused options.max_failed_saves checkpoints in a row.
  """
  mesh = mesh or sharding.make_mesh()
  _check(options, optimizer, mesh)
  compiled.keep_programs(options.compilation_cache)
  feed = watch.Feed(train_iterator, functools.partial(sharding.put_batch, mesh=mesh))
  with contextlib.ExitStack() as stack:
    signals = stack.enter_context(watch.Signals())
    stack.callback(feed.close)
    files = workdir_lib.Files(workdir, fetch=_GOES_ON_WITH)
    stack.callback(files.close)
    saver = _open_saver(str(workdir), feed, files, options, config)
    stack.callback(saver.close)
    build = functools.partial(
        _build, objective, optimizer, augment, options, mesh
    )
    program, accum, state, extra = _begin(build, saver, feed, seed, options, mesh)
    if start and not saver.resumed:
      state = state.replace(params=state_lib.with_parts(state.params, start()))
    options = dataclasses.replace(options, accum=accum)
    writer = metrics_lib.Writer(
        files.folder, restored_step=int(state.step) if saver.resumed else -1,
        total_steps=options.total_steps, config=config,
        tensorboard=options.tensorboard, wandb=options.wandb,
    )
    stack.callback(writer.close)
    saver.attach(writer)
    if saver.resumed:
      _restore_evaluators(evaluators or {}, files.folder)
    profile = watch.Profile(
        files.folder, options.profile_from_step, options.profile_steps,
        begin=int(state.step),
    )
    stack.callback(profile.close)
    if eval_batches is not None:
      evaluators = {
          "validation": (
              evaluate.Validation(
                  objective, augment, mesh, eval_batches, options.validation_batches
              ),
              options.validate_every_steps,
          ),
          **(evaluators or {}),
      }
    session = _Session(
        options=options, mesh=mesh, feed=feed, saver=saver, files=files, writer=writer,
        profile=profile, clock=watch.Clock(feed, _mfu(options, mesh)),
        train_step=program.step,
        scalars=_scalars(objective, optimizer),
        window=watch.Window(
            int(state.step), extra.get("window", {}),
            skipped_in_row=int(state.skipped[0]),
            max_skipped_in_row=options.max_skipped_in_row,
        ),
        evaluations=evaluate.Evaluations(
            evaluators or {}, writer, watched=options.early_stop_metric,
            mode=options.early_stop_mode, patience=options.early_stop_patience,
            history=extra.get("history", ()), broken=extra.get("evaluation"),
            stopped=lambda step: reached(step, signals.received),
        ),
        reached=reached,
    )
    _introduce(session, state)
    try:
      state = _train(session, state, signals)
    except workdir_lib.WorkdirError:
      saver.abandon()
      raise
    except watch.NonFiniteError as error:
      raise watch.NonFiniteError(
          f"{error}; last checkpoint: step {saver.latest_step()} in {workdir}; look at "
          "grad_norm and clipped before it, then lower the learning rate or clip_norm"
      ) from error
  if signals.received:
    raise SystemExit(128 + signals.received)
  return state


@dataclasses.dataclass(frozen=True)
class _Session:
  """What the steps of one run share."""

  options: LoopOptions
  mesh: Mesh
  feed: watch.Feed
  saver: Saver
  files: workdir_lib.Files
  writer: metrics_lib.Writer
  profile: watch.Profile
  clock: watch.Clock
  train_step: Callable[..., Any]
  scalars: Callable[[int], dict[str, float]]
  window: watch.Window
  evaluations: evaluate.Evaluations
  reached: Callable[[int, int], int]


def _train(s: _Session, state: TrainState, signals: watch.Signals) -> TrainState:
  """Goes from the state's step to the end, an early stop or a signal."""
  options, step = s.options, int(state.step)
  with s.clock.pause():
    stop = _evaluate_at_start(s, state, step)
  if stop:
    s.saver.save(step, state, _extra(s))
  while step < options.total_steps and not stop and not s.evaluations.stagnant():
    s.profile.at(step, state)
    batch = s.feed.take()
    with s.clock.step():
      state, metrics = s.train_step(state, batch)
    s.window.add(metrics)
    s.writer.advance()
    step += 1
    last = step == options.total_steps
    logging = last or step % options.log_every_steps == 0
    if logging:
      _log(s, state, step)
    with s.clock.pause():
      # Hosts that decide apart hang in the next collective.
      stop = _evaluate(s, state, step, last) or s.reached(step, signals.received)
      agreeing = logging or jax.process_count() == 1
      late = agreeing and watch.agree(s.saver.late())
      if stop or last or late or s.evaluations.stagnant() or s.saver.due(step):
        s.saver.save(step, state, _extra(s))
  # Another host may have got the signal: all leave with its code.
  signals.received = stop
  if stop:
    s.writer.say(
        f"step {step}: saved after signal {signals.received}; the same command goes on"
    )
  elif step < options.total_steps:
    s.writer.say(
        f"step {step}: stopped early, {options.early_stop_metric} has not improved in "
        f"{options.early_stop_patience} evaluations"
    )
  s.saver.finish(lambda: s.saver.save(step, state, _extra(s)))
  if not stop:
    for name, folder in s.saver.folders().items():
      s.writer.artifact(folder, name)
  return state


def _evaluate_at_start(s: _Session, state: TrainState, step: int) -> int:
  """Runs everything before the first step, or what a signal broke off; as below."""
  if step and not s.evaluations.broken:
    return 0
  if step:
    return _evaluate(s, state, step, step == s.options.total_steps)
  try:
    s.evaluations.run(0, state.params, state.model_state, everything=True)
  except evaluate.Interrupted as broken:
    return broken.signal
  s.evaluations.require(s.options.best_metric, "best_metric")
  s.evaluations.require(s.options.early_stop_metric, "early_stop_metric")
  return 0


def _evaluate(s: _Session, state: TrainState, step: int, last: bool) -> int:
  """Runs what is due, everything where the run ends here, and keeps the best.

  Returns:
    The signal that broke it off; 0: none.
  """
  run = functools.partial(s.evaluations.run, step, state.params, state.model_state)
  try:
    found = run(everything=last)
    if found and s.evaluations.stagnant():
      found |= run(everything=True)
  except evaluate.Interrupted as broken:
    return broken.signal
  if s.options.best_metric in found:
    s.saver.save_best(step, state, _extra(s), found[s.options.best_metric])
  return 0


def _log(s: _Session, state: TrainState, step: int) -> None:
  """Writes one line: means since the last, schedules of the last step, rates."""
  values = s.window.flush()
  values.pop("nonfinite")
  line = {"loss": values.pop("loss"), **s.scalars(step - 1), **values}
  line["skipped"] = int(state.skipped[1])
  if s.clock.recompiled:
    s.writer.say(
        f"step {step}: the train step was compiled again; the shapes of a batch have "
        "changed, which costs a compilation each time"
    )
  line |= s.clock.rates(s.options.batch_size, s.options.tokens_per_volume)
  if line["data_wait"] > _MAX_DATA_WAIT:
    s.writer.say(
        f"step {step}: {line['data_wait']:.0%} of the time went into waiting for data; "
        "read with more threads, or from shards"
    )
  if line["grad_norm"] == 0:
    s.writer.say(f"step {step}: the gradient is exactly 0; nothing is being learned")
  s.files.check()
  s.saver.check()
  if s.saver.failed:
    line["failed_saves"] = s.saver.failed
  s.writer.write(step, line)
  s.writer.say(metrics_lib.format_line(step, s.options.total_steps, line))


def _extra(s: _Session) -> dict[str, Any]:
  extra = {
      "window": s.window.sums(), "history": s.evaluations.history,
      "accum": s.options.accum,
  }
  if s.evaluations.broken:
    extra["evaluation"] = s.evaluations.broken
  return extra


def _introduce(s: _Session, state: TrainState) -> None:
  """Prints what will run, before the first step."""
  options = s.options
  if jax.process_index():
    return
  s.writer.say(parameter_overview.get_parameter_overview(
      state.params, include_stats="sharding" if s.mesh.shape["fsdp"] > 1 else False
  ))
  device = jax.devices()[0]
  s.writer.say(
      f"{s.mesh.size} x {device.device_kind} ({device.platform}), mesh "
      f"{dict(s.mesh.shape)}, {jax.process_count()} processes; batch "
      f"{options.batch_size} = {options.accum} micro-batches of "
      f"{options.batch_size // options.accum}; {options.total_steps} steps"
  )
  steps = {"first": 0, "middle": options.total_steps // 2}
  steps["last"] = max(options.total_steps - 1, 0)
  values = {place: s.scalars(step) for place, step in steps.items()}
  for name in values["first"]:
    s.writer.say(
        f"{name}: " + ", ".join(f"{p} {values[p][name]:.6g}" for p in steps)
    )
  if s.saver.resumed:
    s.writer.say(
        f"goes on from step {int(state.step)}/{options.total_steps} of "
        f"{s.saver.directory}"
    )


def _begin(
    build, saver, feed, seed, options, mesh
) -> tuple[Program, int, TrainState, dict[str, Any]]:
  """Restores the last state, or draws one; (program, its accum, state, extra)."""
  told = {"batch_size": options.batch_size, "mesh": mesh, "say": _say_first}
  make = lambda accum=options.accum: build(feed.peek(), accum)
  choose = lambda: fit.choose(
      make, least=options.accum, memory_gib=options.memory_gib, **told
  )
  if restored := saver.restore(make):
    program, state, extra = restored
    accum = options.accum
    if options.fit == "auto":
      accum = fit.kept(extra.get("accum"), accum, **told)
      program, accum = choose() if accum is None else (make(accum), accum)
    return program, accum, state, extra
  auto = options.fit == "auto"
  program, accum = choose() if auto else (make(), options.accum)
  return program, accum, program.init(jax.random.key(seed)), {}


def _say_first(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)


def _build(objective, optimizer, augment, options, mesh, batch, accum) -> Program:
  """Makes the program of a run from one host batch."""
  rows = options.batch_size
  return make_program(
      objective=objective, optimizer=optimizer, augment=augment,
      batch={
          name: jax.ShapeDtypeStruct((rows, *value.shape[1:]), value.dtype)
          for name, value in batch.items()
      },
      mesh=mesh, accum=accum, fsdp_rules=options.fsdp_rules,
      fsdp_min_size=options.fsdp_min_size,
  )


def _open_saver(workdir, feed, files, options, config) -> Saver:
  directory = options.checkpoint_dir or f"{workdir.rstrip('/')}/checkpoints"
  best = None
  if options.best_metric is not None:
    best = checkpoint.Checkpoints(
        f"{directory}/best", keep=options.keep_best, best_mode=options.best_mode
    )
  latest = checkpoint.Checkpoints(
      directory, keep=options.keep, keep_every_steps=options.keep_every_steps
  )
  return Saver(
      latest, best, feed=feed, files=files, config=config,
      every_steps=options.checkpoint_every_steps,
      every_minutes=options.checkpoint_every_minutes,
      max_failed=options.max_failed_saves,
  )


def _mfu(options: LoopOptions, mesh: Mesh) -> watch.Mfu:
  return watch.Mfu(options.flops_per_volume, options.batch_size, mesh.devices.flatten())


def _restore_evaluators(evaluators, workdir: pathlib.Path) -> None:
  lines = metrics_lib.read(workdir)
  for evaluator, _ in evaluators.values():
    if hasattr(evaluator, "restore"):
      evaluator.restore(lines)


def _scalars(
    objective: Objective, optimizer: Optimizer
) -> Callable[[int], dict[str, float]]:
  """Joins the schedules of the optimiser and of the objective, as floats."""

  def at(step: int) -> dict[str, float]:
    values = {**optimizer.scalars(step), **objective.scalars(jnp.asarray(step))}
    return {name: float(value) for name, value in values.items()}

  return at


def _check(options: LoopOptions, optimizer: Optimizer, mesh: Mesh) -> None:
  """Refuses what could only fail later."""
  sharding.check_batch(options.batch_size, options.accum, mesh)
  for name in ("learning_rate", "weight_decay"):
    schedules.check_monotone(name, getattr(optimizer, name), options.total_steps)
  given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
  faults = option_faults({k: v for k, v in given.items() if v is not None})
  if faults:
    raise ValueError("; ".join(f"train.{fault}" for fault in faults))


def option_faults(options: Mapping[str, Any]) -> list[str]:
  """Says what is wrong with keywords of `LoopOptions`; those left out are well."""
  faults = [
      f"{name} {options[name]} must be at least 1"
      for name in (
          "total_steps", "batch_size", "accum", "log_every_steps", "keep",
          "keep_best", "checkpoint_every_steps", "keep_every_steps",
          "early_stop_patience", "validation_batches", "max_skipped_in_row",
          "max_failed_saves", "profile_steps",
      )
      if options.get(name, 1) < 1
  ]
  if not options.get("checkpoint_every_minutes", 1.0) > 0:
    minutes = options["checkpoint_every_minutes"]
    faults.append(f"checkpoint_every_minutes {minutes} must be positive")
  faults += fit.fit_faults(options.get("fit", "off"), options.get("memory_gib"))
  return faults + [
      f"{name} {options[name]!r} is not max or min"
      for name in ("best_mode", "early_stop_mode")
      if options.get(name, "max") not in ("max", "min")
  ]
