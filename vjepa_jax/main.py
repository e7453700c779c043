"""Trains what a config says; the same command again goes on where it stopped.

  python -m vjepa_jax.main --config=configs/oct_multi.py:sample --workdir=runs/sample

The workdir then holds config.json, data_report.json, quarantine.tsv,
metrics.jsonl, TensorBoard events, checkpoints/, figures/ and report.json. Exit
codes: 0 done; 2 a config or data that cannot run; 143 or 130 stopped by SIGTERM
or SIGINT after saving.
"""

from collections.abc import Mapping
import json
import pathlib
import sys
from typing import Any

from absl import app, flags, logging
from etils import epath
import jax
from ml_collections import config_flags

from vjepa_jax import config as config_lib
from vjepa_jax.data import pipeline
from vjepa_jax.data.record import DataError, ReadError
from vjepa_jax.report import summary
from vjepa_jax.train import loop, metrics

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "FILE.py[:ARG] of the experiment; --config.KEY=VALUE overrides.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; default runs/NAME of the config."
)
# What may differ between a run and its continuation.
_FREE = (
    "train", "evals", "wandb", "data.threads", "data.cache_bytes",
    "data.max_bad_fraction",
)
_FIXED_IN_TRAIN = ("batch_size",)
_LENGTHS = ("train.total_steps", "train.total_epochs", "train.steps_per_epoch")


def main(argv: list[str]) -> None:
  """Checks, builds, trains, reports."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  try:
    config_lib.check_config(config)
    workdir = pathlib.Path(_WORKDIR.value or f"runs/{config.name}")
    train(config, workdir)
  except (config_lib.ConfigError, DataError, ReadError) as error:
    print(error, file=sys.stderr)
    sys.exit(2)


def train(config: Any, workdir: pathlib.Path) -> None:
  """Runs an experiment in a workdir and writes its report.

  Args:
    config: a checked ConfigDict.
    workdir: local folder, made where absent.

  Raises:
    ConfigError: if the workdir holds a run of another config.
    DataError: if the data cannot be used.
    ReadError: if the manifest itself cannot be fetched.
  """
  plain = config_lib.as_plain(config)
  check_continuation(workdir, plain)
  workdir.mkdir(parents=True, exist_ok=True)
  experiment = config_lib.build(config, quarantine=str(workdir / "quarantine.tsv"))
  data, options = experiment.data, experiment.options
  if jax.process_index() == 0:
    _write_json(workdir / "config.json", plain)
    _write_json(workdir / "data_report.json", data.report)
    print(format_data(data.report))
  held_out = data.splits.get("validation")
  threads = plain["data"].get("threads", 2)
  try:
    loop.run(
        objective=experiment.objective,
        optimizer=experiment.optimizer,
        augment=experiment.augment,
        train_iterator=pipeline.train_iterator(
            data.splits["train"],
            batch_size=options.batch_size // jax.process_count(),
            seed=config.seed,
            threads=threads,
            shard=(jax.process_index(), jax.process_count()),
        ),
        workdir=workdir,
        options=options,
        config=plain,
        seed=config.seed,
        mesh=experiment.mesh,
        eval_batches=held_out and (
            lambda: pipeline.eval_batches(held_out, options.batch_size, threads=threads)
        ),
        evaluators=experiment.evaluators,
    )
  finally:
    # Lazy reading learns of bad files on the way.
    if jax.process_index() == 0:
      _write_json(workdir / "data_report.json", data.report)
  if jax.process_index() == 0:
    report = summary.write_report(workdir, metrics.read(workdir))
    print(summary.format_report(report))
    print(f"figures, report and checkpoints are in {workdir}")


def check_continuation(workdir: pathlib.Path, plain: Mapping[str, Any]) -> None:
  """Refuses to go on from the checkpoints of another config.

  A workdir without a checkpoint has nothing to go on from. Another length is
  allowed, and said: it stretches the schedules from here on.

  Raises:
    ConfigError: lists every key that differs and matters.
  """
  path = workdir / "config.json"
  saved = plain["train"].get("checkpoint_dir") or workdir / "checkpoints"
  if not path.exists() or not any(epath.Path(saved).glob("[0-9]*")):
    return
  found, wanted = _flat(json.loads(path.read_text())), _flat(json.loads(json.dumps(plain)))
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


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= _flat(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
  jax.config.config_with_absl()
  flags.mark_flags_as_required(["config"])
  app.run(main)
