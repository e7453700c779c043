"""What a run needs, tried on a few volumes before any chip time.

  python -m vjepa_jax.main --config=FILE --workdir=gs://bucket/run --preflight=16

Everything that can be looked at is looked at; one fault does not hide the next.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import os
import time
import traceback
from typing import Any
import uuid

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax import config as config_lib
from vjepa_jax.config import programs, units
from vjepa_jax.data import pipeline
from vjepa_jax.data import volumes as volumes_lib
from vjepa_jax.data.manifest import Row
from vjepa_jax.data.record import DataError, ReadError, Record
from vjepa_jax.evaluators import figures as figure_evaluator
from vjepa_jax.evaluators.health import centre_crop
from vjepa_jax.report import figures as drawing
from vjepa_jax.train import sharding
from vjepa_jax.train import workdir as workdir_lib
from vjepa_jax.train.state import init_state, with_positions
from vjepa_jax.train.step import make_train_step

VOLUMES = 8
OK, FAIL, NOTE = "ok", "FAIL", "note"
# Not the file's fault: every file of its kind would be lost.
_SYSTEMATIC = ("missing_extra", "no_decoder", "forbidden", "unreachable")
_EXPECTED = (
    DataError, ReadError, ValueError, KeyError, OSError, ImportError, RuntimeError
)
_DRAWN = 4
_DEADLINE_S = "20"
# Floating point operations that a CPU may be asked for: some seconds.
_SMALL_STEP = 1e12


@dataclasses.dataclass(frozen=True)
class Finding:
  """One line of the table.

  Attributes:
    status: "ok", "FAIL" or "note" (a number, or what is odd but allowed).
    name: what was looked at.
    detail: what was found.
  """

  status: str
  name: str
  detail: str


@dataclasses.dataclass(frozen=True)
class Sample:
  """One recording that was tried.

  Attributes:
    row: of its manifest.
    canvas: as it enters a batch.
    cpu_s: seconds of one core for reading and every host operation.
    wall_s: the same by the clock.
  """

  row: Row
  canvas: Record
  cpu_s: float
  wall_s: float


class Table:
  """The findings, told as they come."""

  def __init__(self, say: Callable[[str], None] = print):
    self.findings: list[Finding] = []
    self._say = say

  def add(self, status: str, name: str, detail: str) -> None:
    """Adds a line and tells it."""
    self.findings.append(Finding(status, name, " ".join(detail.split())))
    self._say(f"{status:<5} {name:<12} {detail}")

  @contextlib.contextmanager
  def trying(self, name: str) -> Iterator[None]:
    """A block whose error becomes a FAIL line, so that what follows is tried too."""
    try:
      yield
    except config_lib.ConfigError as error:
      for fault in error.faults:
        self.add(FAIL, name, fault)
    except _EXPECTED as error:
      self.add(FAIL, name, f"{type(error).__name__}: {error}")
    except Exception as error:  # A fault of ours is a finding too, with its place.
      place = traceback.extract_tb(error.__traceback__)[-1]
      self.add(
          FAIL, name,
          f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})",
      )

  def failed(self, name: str) -> bool:
    """Says whether a line of this name is FAIL."""
    return any(f.name == name and f.status == FAIL for f in self.findings)

  @property
  def faults(self) -> int:
    """How many lines are FAIL."""
    return sum(finding.status == FAIL for finding in self.findings)


def run(
    config: Any,
    workdir: str | os.PathLike[str],
    *,
    volumes: int = VOLUMES,
    checks: Mapping[str, Callable[[], None]] | None = None,
    say: Callable[[str], None] = print,
) -> Table:
  """Tries what a run needs, and writes figures and the table into workdir/preflight.

  Args:
    config: ConfigDict of a run.
    workdir: local or `gs://`.
    volumes: recordings to read, spread over sources, devices and file types.
    checks: name -> a further check, which raises where something is wrong.
    say: gets each line of the table as it comes.

  Returns:
    The table; a run may start where `faults` is 0.
  """
  # A person waits for the answer, unlike for a run.
  os.environ.setdefault(workdir_lib.DEADLINE, _DEADLINE_S)
  table = Table(say)
  folder = workdir_lib.open_path(workdir) / "preflight"
  plain = config_lib.as_plain(config)
  with table.trying("config"):
    config_lib.check_config(config)
    table.add(OK, "config", f"{plain['name']}: all keys and numbers fit")
  _check_places(table, plain, workdir)
  if table.failed("config"):  # What follows reads numbers that must fit.
    _finish(table, folder)
    return table
  for name, check in ({} if table.failed("workdir") else checks or {}).items():
    with table.trying(name):
      check()
      table.add(OK, name, "fits what the workdir holds")
  sources = _check_tables(table, plain)
  samples = _check_volumes(table, plain, sources, volumes) if sources else []
  experiment = None
  with table.trying("units"):
    # Lazily: the manifest is read, and no recording.
    lazy = config.copy_and_resolve_references()
    with lazy.unlocked():
      lazy.data.validate, lazy.data.cache = "lazy", "none"
    experiment = config_lib.build(lazy, say=lambda text: None)
    names = ", ".join(experiment.evaluators) or "none"
    table.add(OK, "units", f"objective, optimiser and evaluators ({names}) are built")
  if experiment is not None:
    if samples:
      with table.trying("batch"):
        _check_batch(table, experiment, samples, folder)
      _check_rate(table, plain["data"], experiment, samples)
    with table.trying("memory"):
      _check_step(table, experiment, samples)
  _finish(table, folder)
  return table


def _check_places(table: Table, plain: Mapping[str, Any], workdir) -> None:
  """Who we are to the bucket, and whether what a run writes can be written."""
  data, train = plain.get("data", {}), plain.get("train", {})
  places = {"workdir": str(workdir)}
  if train.get("checkpoint_dir"):
    places["checkpoints"] = train["checkpoint_dir"]
  if data.get("cache", "none") not in ("memory", "none"):
    places["cache"] = data["cache"]
  read = [data.get("manifest", ""), data.get("root", "")]
  read += [own.get("manifest", "") for own in data.get("sources", {}).values()]
  if any(str(path).startswith("gs://") for path in (*places.values(), *read)):
    with table.trying("credentials"):
      table.add(OK, "credentials", _credentials())
  for name, place in places.items():
    with table.trying(name):
      begin = time.perf_counter()
      # Under a name of its own: the object of a run is never touched.
      probe = workdir_lib.open_path(place) / f"preflight_{uuid.uuid4().hex}"
      workdir_lib.write_bytes(probe, b"preflight")
      if workdir_lib.read_bytes(probe) != b"preflight":
        raise OSError(f"{probe} does not read back as it was written")
      probe.unlink()
      seconds = time.perf_counter() - begin
      table.add(OK, name, f"{place}: written, read back, removed in {seconds:.2f} s")


def _credentials() -> str:
  """Says as whom the buckets are asked."""
  if host := os.environ.get("STORAGE_EMULATOR_HOST"):
    return f"an emulator at {host}, anonymous"
  if os.environ.get("VJEPA_JAX_ANONYMOUS"):
    return "anonymous (VJEPA_JAX_ANONYMOUS); public buckets can be read only"
  import google.auth  # noqa: PLC0415
  from google.auth import exceptions  # noqa: PLC0415

  try:
    found, project = google.auth.default()
  except exceptions.GoogleAuthError as error:
    raise OSError(
        f"{error}; run `gcloud auth application-default login`, name a key file in "
        "GOOGLE_APPLICATION_CREDENTIALS, or set VJEPA_JAX_ANONYMOUS=1 for public "
        "buckets"
    ) from error
  account = getattr(found, "service_account_email", "") or type(found).__name__
  return f"{account}, project {project or 'not set'}"


def _check_tables(table: Table, plain: Mapping[str, Any]) -> list[pipeline.Source]:
  """Reads the manifests, and says what they lose."""
  sources: list[pipeline.Source] = []
  with table.trying("manifest"):
    # `plan` leaves alone what is not its own.
    defaults = {
        name: p.default
        for name, p in inspect.signature(pipeline.open_data).parameters.items()
    }
    sources = pipeline.plan(
        **{**defaults, **units.data_options(plain), "seed": plain["seed"]}
    )
    for source in sources:
      parts = ", ".join(f"{name} {len(rows)}" for name, rows in source.rows.items())
      lost = ", ".join(f"{reason} {n}" for reason, n in source.lost.items()) or "none"
      table.add(
          OK, "manifest",
          f"{source.manifest}: {source.total} rows; {parts}; left out: {lost}",
      )
      devices = collections.Counter(
          row.device for rows in source.parts.values() for row in rows
      )
      listed = ", ".join(f"{name} {n}" for name, n in devices.most_common())
      table.add(NOTE, "devices", listed)
  return sources


def _check_volumes(
    table: Table,
    plain: Mapping[str, Any],
    sources: Sequence[pipeline.Source],
    count: int,
) -> list[Sample]:
  """Reads recordings of every kind through every host operation."""
  samples, bad, formats = [], [], collections.Counter()

  def look(record: Record) -> None:
    kind = record.meta.get("transfer_syntax") or record.meta.get("format", "unknown")
    formats[f"{kind} {record.volume.dtype}"] += 1

  chosen = _spread(sources, count)
  for source, row in chosen:
    cpu, wall = time.thread_time(), time.perf_counter()
    try:
      canvas = source.read(row, look)
    except ReadError as error:
      bad.append(error)
      table.add(FAIL if error.reason in _SYSTEMATIC else NOTE, "volume", str(error))
      continue
    cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
    samples.append(Sample(row, canvas, cpu, wall))
  kinds = ", ".join(f"{kind} x {n}" for kind, n in formats.most_common())
  table.add(OK if formats else FAIL, "decoders", kinds or "no recording could be read")
  allowed = plain["data"].get("max_bad_fraction", 0.05)
  share = len(bad) / len(chosen)
  table.add(
      FAIL if share > allowed or not samples else OK, "volumes",
      f"{len(samples)} of {len(chosen)} tried are good; max_bad_fraction is "
      f"{allowed:g}",
  )
  _check_canvases(table, samples)
  return samples


def _spread(sources, count: int) -> list[tuple[pipeline.Source, Row]]:
  """Chooses rows in turn from each source, device and file type."""
  groups: dict[Any, list[tuple[pipeline.Source, Row]]] = {}
  for source in sources:
    for rows in source.rows.values():
      for row in rows:
        ending = os.path.splitext(row.path)[1].lower()
        groups.setdefault((source.name, row.device, ending), []).append((source, row))
  each = -(-count // len(groups))
  turns = []
  for found in groups.values():
    # Evenly through each group: neighbours in a table are often one person.
    wanted = min(each, len(found))
    turns.append([found[n * len(found) // wanted] for n in range(wanted)])
  in_turn = [pair for n in range(each) for found in turns for pair in found[n : n + 1]]
  return in_turn[:count]


def _check_canvases(table: Table, samples: Sequence[Sample]) -> None:
  kinds = collections.Counter(
      f"{s.canvas.volume.dtype} {list(s.canvas.volume.shape)}" for s in samples
  )
  if kinds:
    listed = ", ".join(f"{kind} x {n}" for kind, n in kinds.items())
    table.add(OK, "canvases", f"[T, Z, Y, X, C]: {listed}")
  unknown = sum(bool(np.isnan(s.canvas.spacing[1:]).any()) for s in samples)
  if unknown:
    table.add(NOTE, "spacing", f"unknown in {unknown} of {len(samples)} recordings")


def _check_batch(table: Table, experiment, samples: Sequence[Sample], folder) -> None:
  """Augments a batch and draws its masks, as the first step would."""
  options, grid = experiment.options, experiment.grid
  same = samples[0].canvas.volume
  alike = [
      s for s in samples
      if (s.canvas.volume.shape, s.canvas.volume.dtype) == (same.shape, same.dtype)
  ]
  rows = options.batch_size // jax.process_count()
  table.add(
      OK, "batch",
      f"{options.batch_size} volumes of {grid.tokens} tokens {grid.dims} (t, z, y, x), "
      f"{options.accum} micro-batch(es); {_size(rows * same.nbytes)} a host and step",
  )
  batch = volumes_lib.stack([_element(n, sample) for n, sample in enumerate(alike)])
  augmented = jax.jit(functools.partial(experiment.augment, train=True))(
      with_positions(batch), jax.random.key(0)
  )
  volume = np.asarray(augmented["volume"])
  if volume.shape[1:5] != tuple(grid.voxels) or not np.isfinite(volume).all():
    raise ValueError(
        f"augmented volumes are {volume.shape}, finite: {np.isfinite(volume).all()}; "
        f"wanted finite {grid.voxels}"
    )
  table.add(
      OK, "augment",
      f"{len(volume)} volumes: mean {volume.mean():.3f}, std {volume.std():.3f}, "
      f"{volume.min():.3g} .. {volume.max():.3g}",
  )
  _draw(table, experiment, alike, batch, folder)


def _element(number: int, sample: Sample) -> volumes_lib.Batch:
  """Returns a row of a batch; what its label is decides no shape."""
  canvas = sample.canvas
  stages = {}
  if getattr(sample.row, "stages", ()):
    stages["frame_label"] = np.full(len(canvas.volume), -1, np.int32)
  return {
      "volume": canvas.volume, "mean": np.float32(canvas.mean),
      "std": np.float32(canvas.std), "spacing": canvas.spacing,
      "index": np.int32(number), "label": np.int32(-1), "source": np.int32(0),
      "_mask": np.float32(1), **stages,
  }


def _draw(table: Table, experiment, samples, batch, folder) -> None:
  """Draws canvases with their tokens, and the masks on them."""
  grid = experiment.grid
  states = None
  masks = experiment.objective.functions().get("masks")
  if masks is not None:
    augmented = experiment.augment(
        with_positions(batch), jax.random.key(0), train=False
    )
    splits = masks(None, None, augmented)
    states = figure_evaluator.token_states(splits, len(samples), grid.tokens)
    for number, state in enumerate(states, 1):
      seen, asked = (
          int((state == kind).sum(axis=1).mean())
          for kind in (drawing.CONTEXT, drawing.TARGET)
      )
      table.add(
          OK if seen and asked else FAIL, "masks",
          f"group {number}: {seen} of {grid.tokens} tokens seen, {asked} predicted",
      )
  middle = grid.dims[0] // 2
  cut = centre_crop(batch["volume"][:_DRAWN], grid)
  scans = [
      drawing.Scan(
          sample.row.device.replace("_", " "),
          volume[volume.shape[0] // 2].astype(np.float32).mean(axis=-1),
          tuple(float(s) for s in sample.canvas.spacing[1:]),
      )
      for sample, volume in zip(samples, cut, strict=False)
  ]
  pictures = {"canvases.png": drawing.grid_panel(scans, grid.dims[1:])}
  if states:
    pictures["masks.png"] = drawing.mask_panel(
        scans,
        [[s[n].reshape(grid.dims)[middle] for s in states] for n in range(len(scans))],
    )
  if table.failed("workdir"):
    return
  for name, picture in pictures.items():
    workdir_lib.write_bytes(folder / name, drawing.encode_png(picture))
  table.add(OK, "figures", f"{', '.join(pictures)} in {folder}")


def _check_rate(
    table: Table, data: Mapping[str, Any], experiment, samples: Sequence[Sample]
) -> None:
  """What reading costs, against what a step takes."""
  cpu = float(np.median([sample.cpu_s for sample in samples]))
  wall = float(np.median([sample.wall_s for sample in samples]))
  readers = max(data.get("workers", 0), data.get("threads", 2))
  cores = min(readers, os.cpu_count() or 1)
  # Processors bound what is computed, readers what is waited for.
  a_volume = max(cpu / cores, wall / readers)
  table.add(
      NOTE, "one volume",
      f"{1000 * cpu:.0f} ms of one core, {1000 * wall:.0f} ms by the clock (median of "
      f"{len(samples)}); {readers} readers on {cores} cores: {1 / a_volume:.1f} "
      "volumes/s a host",
  )
  files = sum(map(len, experiment.data.splits.values()))
  hosts, cache = jax.process_count(), data.get("cache", "memory")
  if cache == "none":
    rows = experiment.options.batch_size // hosts
    table.add(
        NOTE, "each step",
        f"its {rows} volumes take {rows * a_volume:.2f} s to read; a shorter step "
        "waits for data. Prepare shards (data.cache=FOLDER) to read them once",
    )
  else:
    minutes = files * a_volume / 60
    table.add(NOTE, "reading", f"all {files} files once: about {minutes:.1f} min")


def _check_step(table: Table, experiment, samples: Sequence[Sample]) -> None:
  """What a device holds: exact for the state, the compiler's word for a step."""
  options, mesh = experiment.options, experiment.mesh
  batch = _batch_shapes(experiment, samples)
  draw = lambda key: init_state(
      experiment.objective, experiment.optimizer, experiment.augment,
      {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in batch.items()}, key,
  )
  state = jax.eval_shape(draw, jax.random.key(0))
  places = sharding.state_sharding(
      state, mesh, rules=options.fsdp_rules, min_size=options.fsdp_min_size
  )
  parts = {
      "parameters": state.params, "target and statistics": state.model_state,
      "moments": state.opt_state,
  }
  listed = ", ".join(f"{name} {_size(_bytes(tree))}" for name, tree in parts.items())
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
  table.add(
      NOTE, "state",
      f"{count / 1e6:.3g} M parameters; {listed}; exact; a device of {mesh.size} holds "
      f"{_size(_bytes(state, places))}",
  )
  compiled, seconds = _compile(experiment, state, places, batch)
  found = compiled.memory_analysis()
  device = jax.local_devices()[0]
  peak = found.argument_size_in_bytes + found.temp_size_in_bytes
  peak += found.output_size_in_bytes - found.alias_size_in_bytes
  limit = (device.memory_stats() or {}).get("bytes_limit")
  foreign = "" if device.platform != "cpu" else (
      "; another device lays arrays out, and attends, in other ways: expect another "
      "figure there"
  )
  table.add(
      FAIL if limit and peak > limit else NOTE, "memory",
      f"a step: {_size(peak)} a device ({_size(found.temp_size_in_bytes)} of it "
      f"activations and scratch)"
      + (f" of {_size(limit)}" if limit else "")
      + f", by the compiler for {mesh.size} x {device.device_kind}, {seconds:.0f} s to "
      f"compile{foreign}",
  )
  work = 6.0 * count * experiment.grid.tokens * options.batch_size
  if device.platform != "cpu" or work < _SMALL_STEP:
    seconds = _time_step(compiled, draw, places, batch, mesh)
    table.add(NOTE, "a step", f"{seconds:.3f} s on this machine")


def _compile(experiment, state, places, batch):
  """Compiles the train step from shapes alone, as the loop would."""
  mesh, options = experiment.mesh, experiment.options
  rows = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(sharding.BATCH_AXES)
  )
  shaped = lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
  )
  step = make_train_step(
      experiment.objective, experiment.optimizer, augment=experiment.augment,
      accum=options.accum,
  )
  begin = time.perf_counter()
  compiled = jax.jit(
      step, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh))
  ).lower(
      jax.tree.map(shaped, state, places),
      {name: shaped(leaf, rows) for name, leaf in batch.items()},
  ).compile()
  return compiled, time.perf_counter() - begin


def _time_step(compiled, draw, places, batch, mesh) -> float:
  """Returns the seconds of the second step, on a batch of ones."""
  state = jax.jit(draw, out_shardings=places)(jax.random.key(0))
  hosts = jax.process_count()
  ones = {
      name: np.ones((leaf.shape[0] // hosts, *leaf.shape[1:]), leaf.dtype)
      for name, leaf in batch.items()
  }
  ones = sharding.put_batch(ones, mesh)
  for _ in range(2):
    begin = time.perf_counter()
    state, metrics = compiled(state, ones)
    jax.block_until_ready(metrics)
    seconds = time.perf_counter() - begin
  return seconds


def _batch_shapes(experiment, samples: Sequence[Sample]) -> dict[str, Any]:
  """Returns the global batch's shapes; without a volume, those of the config."""
  rows = experiment.options.batch_size
  if not samples:
    return programs.batch_shapes(experiment.config, rows)
  return {
      name: jax.ShapeDtypeStruct((rows, *np.shape(value)), np.asarray(value).dtype)
      for name, value in _element(0, samples[0]).items()
  }


def _bytes(tree: Any, places: Any = None) -> int:
  """Returns the bytes of a tree of shapes, in all or on one device."""
  def of(leaf, place=None) -> int:
    shape = place.shard_shape(leaf.shape) if place else leaf.shape
    size = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else (
        leaf.dtype.itemsize
    )
    return math.prod(shape) * size

  sizes = jax.tree.map(of, tree) if places is None else jax.tree.map(of, tree, places)
  return sum(jax.tree.leaves(sizes))


def _size(count: float) -> str:
  for unit in ("B", "KiB", "MiB", "GiB"):
    if count < 1024 or unit == "GiB":
      return f"{count:.3g} {unit}"
    count /= 1024


def _finish(table: Table, folder) -> None:
  """Keeps the table beside the figures, where that is possible."""
  verdict = "no fault; the run may start"
  if table.faults:
    verdict = f"{table.faults} fault(s)"
  text = json.dumps([dataclasses.asdict(f) for f in table.findings], indent=2) + "\n"
  if not table.failed("workdir"):
    with table.trying("workdir"):
      workdir_lib.write_bytes(folder / "preflight.json", text.encode())
  table.add(FAIL if table.faults else OK, "preflight", verdict)
