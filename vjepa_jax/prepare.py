"""Gets recordings ready before any chip time.

  python -m vjepa_jax.prepare --config=FILE.py[:ARG] --config.data.cache=FOLDER
    writes all canvases as shards, once; killed and run again it goes on. FOLDER is
    local or gs://, and main with the same data section reads them from there.
  python -m vjepa_jax.prepare --scan=FOLDER --output=manifest.tsv
    writes the manifest of the recordings below a folder.
  python -m vjepa_jax.prepare --config=... --validate-only [--sample=N] [--read]
    compares the manifest with the files that it names.
  python -m vjepa_jax.prepare --expand=FILE.zip --output=FOLDER
    unpacks a ZIP of recordings, from bucket to bucket too.

Exit codes: 0 done; 2 a config or data that cannot be used, or not sound; 75 a bucket
was out of reach for too long; 130 stopped. After the last two the same command goes on.
"""

from collections.abc import Mapping, Sequence
import json
import os
import sys
import time
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags
import tqdm

from vjepa_jax import config as config_lib
from vjepa_jax.config import units
from vjepa_jax.data import (
    beam,
    expand,
    memory,
    pipeline,
    scan,
    shard_writing,
    storage,
    validate,
)
from vjepa_jax.data.files import Files
from vjepa_jax.data.ledger import Ledger
from vjepa_jax.data.record import DataError, ReadError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "FILE.py[:ARG] of the experiment; --config.KEY=VALUE overrides.",
    lock_config=True,
)
_SCAN = flags.DEFINE_string(
    "scan", None, "Folder, local or gs://, to make a manifest of."
)
_PATTERN = flags.DEFINE_multi_string(
    "pattern", [], "COLUMN=REGULAR EXPRESSION for --scan; its first group in the path."
)
_EXPAND = flags.DEFINE_string("expand", None, "ZIP, local or gs://, to unpack.")
_OUTPUT = flags.DEFINE_string("output", None, "What --scan or --expand writes.")
_VALIDATE = flags.DEFINE_bool(
    "validate_only", False, "Compare manifest and files; write nothing."
)
_SAMPLE = flags.DEFINE_integer(
    "sample", None, "With --validate-only: check the content of so many; default all.",
    lower_bound=1,
)
_READ = flags.DEFINE_bool("read", False, "With --validate-only: read the voxels too.")
_WORKERS = flags.DEFINE_integer(
    "workers", os.cpu_count(), "Processes that read files; 0: this one alone.",
    lower_bound=0,
)
_FILE_SECONDS = flags.DEFINE_float(
    "file_seconds", 600.0, "After which a worker gives a file up.", lower_bound=0.1
)
_RUNNER = flags.DEFINE_enum(
    "runner", "local", ["local", "beam"], "Who writes the shards."
)
_BEAM_OPTIONS = flags.DEFINE_string(
    "beam_options", "", "Beam's own flags, in one string; see data/beam.py."
)
_BUCKET_LOST = 75  # EX_TEMPFAIL of sysexits.h
_LINE_SECONDS = 10.0
_NAMED = 5


def main(argv: list[str]) -> None:
  """Does what the flags name."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")
  logging.set_verbosity(logging.ERROR)  # Each bad file is in the table, not here.
  try:
    sys.exit(_run())
  except (config_lib.ConfigError, DataError, ReadError, ImportError) as error:
    print(error, file=sys.stderr, flush=True)
    sys.exit(_BUCKET_LOST if storage.is_out_of_reach(error) else 2)
  except KeyboardInterrupt:
    print("stopped; the same command goes on", file=sys.stderr)
    sys.exit(130)


def _run() -> int:
  try:
    config = _CONFIG.value
    _ = config and config.keys()  # A file that was not loaded says so when asked.
  except OSError as error:
    raise app.UsageError(f"--config: {error}") from error
  if bool(config) + bool(_SCAN.value) + bool(_EXPAND.value) != 1:
    raise app.UsageError("give one of --config, --scan and --expand")
  if (_SCAN.value or _EXPAND.value) and not _OUTPUT.value:
    raise app.UsageError("--scan and --expand need --output")
  if _SCAN.value:
    return _write_manifest(_SCAN.value, _OUTPUT.value)
  if _EXPAND.value:
    return _unpack(_EXPAND.value, _OUTPUT.value)
  config_lib.check_config(config)
  plain = config_lib.as_plain(config)
  if _VALIDATE.value:
    return _validate(plain)
  return prepare(plain)


def prepare(plain: Mapping[str, Any]) -> int:
  """Writes the shards of a config's data section and says what there is.

  Raises:
    ConfigError: where `data.cache` names no folder.
    DataError: as `shard_writing.prepare`, or if too many files are bad.
  """
  memory.keep_large_blocks()
  section = units.data_options(plain, _say)
  folder = section.get("cache", "memory")
  if folder in ("memory", "none"):
    raise config_lib.ConfigError(plain["name"], [
        f"data.cache is {folder!r}; name the folder for the shards, local or gs://, "
        "as --config.data.cache=FOLDER"
    ])
  planned = pipeline.plan(**section, seed=plain["seed"])
  parts: dict[str, list[pipeline.Row]] = {}
  for source in planned:
    for name, rows in source.parts.items():
      parts.setdefault(name, []).extend(rows)
  max_bad = section.get("max_bad_fraction", 0.05)
  ledger = Ledger(parts, max_bad)
  crew = shard_writing.Crew(
      _WORKERS.value, section.get("threads", 2), _FILE_SECONDS.value,
      ledger.note_retries,
  )
  runner = None
  if _RUNNER.value == "beam":
    runner = beam.Runner(_BEAM_OPTIONS.value, _FILE_SECONDS.value, _say)
  for source in planned:
    with _Bar(source.name or "files") as bar:
      found = pipeline.open_shards(
          folder, source, Files(source.transform, ledger, 0), crew=crew,
          max_bad=int(max_bad * sum(map(len, parts.values()))), progress=bar,
          say=bar.say, runner=runner,
      )
    path = next(iter(found.values())).path
    _say(summary(path))
    if runner is None:
      _say(bar.speed())
  retries = ledger.report()["retries"]
  if retries:
    _say(f"tried again: {_tally(retries)}")
  _say(f"main reads them with --config.data.cache={folder}")
  return 0


def summary(path: str) -> str:
  """Returns what lies in a prepared folder, and what was left out."""
  report = json.loads(storage.read_bytes(storage.join(path, "report.json")))
  lines = [f"shards: {path}"]
  for name, split in report["splits"].items():
    lines.append(
        f"  {name}: {split['canvases']} canvases of {split['files']} files, "
        f"{split['shards']} shard(s), {split['bytes'] / 1e9:.3g} GB"
    )
  bad = report["quarantine"]
  lines.append(
      f"  left out: {_tally(bad) or 'none'}"
      + (f"; see {storage.join(path, 'quarantine.tsv')}" if bad else "")
  )
  return "\n".join(lines)


class _Bar:
  """Progress: a bar with rate and time left on a terminal, else a line now and then.

  Attributes:
    before: files that were done at the start.
    done: files since.
    seconds: they took.
  """

  def __init__(self, name: str):
    self._name = name
    self._bar: tqdm.tqdm | None = None
    self._start = self._line = time.monotonic()
    self.before = self.done = 0
    self.seconds = 0.0

  def __enter__(self) -> "_Bar":
    return self

  def __exit__(self, *_):
    if self._bar is not None:
      self._bar.close()

  def __call__(self, done: int, total: int) -> None:
    now = time.monotonic()
    if self._bar is None and not self.done + self.before:
      self.before = done - 1 if done == 1 else done
      self._start = self._start if done == 1 else now
    self.done, self.seconds = done - self.before, now - self._start
    if sys.stderr.isatty():
      if self._bar is None:
        self._bar = tqdm.tqdm(
            desc=self._name, total=total, initial=self.before, unit=" files"
        )
      self._bar.update(done - self._bar.n)
    elif now - self._line >= _LINE_SECONDS or done == total:
      self._line = now
      rate = self.done / max(self.seconds, 1e-9)
      left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
      print(f"{self._name}: {done} of {total}, {rate:.3g}/s{left}", flush=True)

  def speed(self) -> str:
    """Returns how many files were read, and how fast."""
    if not self.done:
      return "  all of it was there; nothing was read"
    there = f"; {self.before} were there" if self.before else ""
    rate = self.done / max(self.seconds, 1e-9)
    return f"  read {self.done} files in {self.seconds:.1f} s: {rate:.3g}/s{there}"

  def say(self, line: str) -> None:
    """Prints a line without breaking the bar."""
    tqdm.tqdm.write(line)


def _validate(plain: Mapping[str, Any]) -> int:
  section = units.data_options(plain, _say)
  sources = section.get("sources") or {"": {}}
  sound = True
  for name, own in sources.items():
    given = {**section, **own}
    table = {
        k: given[k] for k in (
            "root", "label", "participants", "columns", "filters", "exclude", "reader"
        ) if k in given
    }
    with _Bar(name or "files") as bar:
      found = validate.validate(
          given["manifest"], sample=_SAMPLE.value, read=_READ.value, progress=bar,
          **table,
      )
    _say(_describe(found))
    sound &= found["sound"]
  return 0 if sound else 2


def _describe(found: Mapping[str, Any]) -> str:
  lines = [
      f"{found['manifest']}: {found['rows']} rows ({_tally(found['device'])}); left "
      f"out by the table: {_tally(found['lost']) or 'none'}"
  ]
  names = ("missing", "size_differs", "checksum_differs", "unlisted")
  for kind, paths in {**{k: found[k] for k in names}, **found["unreadable"]}.items():
    named = ", ".join(paths[:_NAMED]) + (", ..." if len(paths) > _NAMED else "")
    lines.append(f"  {kind}: {len(paths)}" + (f" ({named})" if paths else ""))
  lines.append("  sound" if found["sound"] else "  NOT sound")
  return "\n".join(lines)


def _write_manifest(folder: str, output: str) -> int:
  patterns = dict(rule.partition("=")[::2] for rule in _PATTERN.value)
  with _Bar("files") as bar:
    found = scan.scan(folder, output=output, patterns=patterns, progress=bar)
  _say(
      f"{output}: {len(found.rows)} recordings of "
      f"{len({row.participant for row in found.rows})} participants; left out: "
      f"{_tally(found.lost) or 'none'}"
  )
  return 0


def _unpack(source: str, folder: str) -> int:
  found = expand.expand(source, folder, progress=sys.stderr.isatty())
  _say(
      f"{folder}: {found['written']} written ({found['bytes'] / 1e9:.3g} GB), "
      f"{found['present']} were there; refused: {_tally(found['reasons']) or 'none'}"
  )
  for name, reason in found["refused"].items():
    _say(f"  {name}: {reason}")
  return 2 if found["refused"] or found["missing"] else 0


def _tally(counts: Mapping[str, int]) -> str:
  return ", ".join(f"{name} {n}" for name, n in counts.items())


def _say(line: str) -> None:
  print(line, flush=True)


def _spelled(argv: Sequence[str]) -> list[str]:
  """Lets --validate-only be written as the other commands' flags are."""
  return [
      arg.replace("-", "_").replace("__", "--", 1)
      if arg.startswith("--validate-only") else arg for arg in argv
  ]


if __name__ == "__main__":
  app.run(main, argv=_spelled(sys.argv))
