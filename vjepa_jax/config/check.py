"""Everything that is wrong with a config, at once, before anything is touched."""

import collections.abc
from collections.abc import Iterable, Mapping
import dataclasses
import functools
import inspect
import types
import typing
from typing import Any

import ml_collections

from vjepa_jax.config import names, units
from vjepa_jax.data import clips, ops, pipeline, readers, stages, storage
from vjepa_jax.data import manifest as manifest_lib
from vjepa_jax.data import mixture as mixture_lib
from vjepa_jax.nn import positions
from vjepa_jax.train import loop, sharding
from vjepa_jax.volumes import augment, masks
from vjepa_jax.volumes.grid import AXES, Grid, grid_faults

SECTIONS = ("data", "augment", "model", "objective", "optimizer", "train", "evals")
WANDB = ("project", "entity", "name", "mode", "tags", "group", "notes")
# Options of a reader that have a key of their own, or come from a row.
_SAID_ELSEWHERE = {
    "modalities", "colour", "max_voxels", "series", "frame",
}
_STORAGE_KINDS = dict(cache=str, cache_bytes=int, deadline_s=float, anonymous=bool)
# What an empty key of the section says.
_NOT_GIVEN = (None, "", (), {})
WANDB_MODES = ("online", "offline", "disabled", "shared")


class ConfigError(ValueError):
  """A config that cannot run; `faults` lists every reason."""

  def __init__(self, name: str, faults: list[str]):
    self.faults = faults
    lines = "\n".join(f"  {name}: {fault}" for fault in faults)
    super().__init__(f"{len(faults)} fault(s) in the config:\n{lines}")


def check_config(
    config: ml_collections.ConfigDict, *, device_count: int | None = None
) -> None:
  """Reports everything that is wrong with a config, before anything is touched.

  Args:
    config: of a config file, with overrides.
    device_count: devices of the run, where known: the batch must divide.

  Raises:
    ConfigError: lists every fault.
  """
  plain = names.as_plain(config)
  faults, broken = _section_faults(plain)
  rules = (
      (("data",), _data_faults),
      (("data", "augment", "model"), _geometry_faults),
      (("model",), _model_faults),
      (("data", "objective"), _objective_faults),
      (("data", "augment", "model", "objective"), _mask_faults),
      (("data", "augment", "model", "objective"), _compared_faults),
      (("train", "optimizer"), _optimizer_faults),
      (
          ("train", "objective"),
          functools.partial(_training_faults, device_count=device_count),
      ),
      (
          ("data", "train", "evals"),
          functools.partial(_evaluation_faults, device_count=device_count),
      ),
  )
  for sections, rule in rules:
    # A rule reads keys that must exist.
    if not broken & set(sections):
      faults += rule(plain)
  if faults:
    raise ConfigError(plain.get("name", "config"), faults)


def _section_faults(plain: Mapping[str, Any]) -> tuple[list[str], set[str]]:
  """Unknown and missing keys, durations spelled twice, names that do not resolve.

  Returns the faults, and the sections that lack what their rules read.
  """
  known = {"name", "seed", "wandb", *SECTIONS}
  missing = {"name", "seed", *SECTIONS} - set(plain)
  faults, broken = [f"{key}: missing" for key in sorted(missing)], set(missing)
  for key in sorted(set(plain) - known):
    faults.append(f"{key}: unknown section; closest: {names.closest(key, known)}")
  for section in (s for s in SECTIONS if s in plain):
    if not isinstance(plain[section], Mapping):
      faults.append(f"{section}: {plain[section]!r} is not a dict of options")
      broken.add(section)
      continue
    sections = plain[section].items() if section == "evals" else [("", plain[section])]
    for name, options in sections:
      place = f"{section}.{name}" if name else section
      try:
        keywords = _keywords(section, options)
      except KeyError as error:
        faults.append(f"{place}: {error.args[0]}")
        broken.add(section)
        continue
      absent = _missing_faults(place, options, keywords)
      if section == "data":
        absent += _kind_faults(options)
      faults += _keyword_faults(place, options, keywords) + absent
      if absent:
        broken.add(section)
  if "wandb" in plain:
    faults += _keyword_faults("wandb", plain["wandb"], dict.fromkeys(WANDB, False))
    if plain["wandb"].get("mode", "online") not in WANDB_MODES:
      faults.append(
          f"wandb.mode: {plain['wandb']['mode']!r} is none of {', '.join(WANDB_MODES)}"
      )
  return faults, broken


def _keywords(section: str, options: Mapping[str, Any]) -> dict[str, bool]:
  """Returns {keyword: whether it must be given} of the unit behind a section."""
  if section == "data":
    known = names.without(
        names.parameters(pipeline.open_data), "seed", "quarantine", "progress", "host",
        "require_spacing", "require_time_step",
    )
    return {**known, "split_column": False, "storage": False}
  if section == "augment":
    return names.parameters(augment.make_augment)
  if section == "optimizer":
    return names.without(names.parameters(units.build_optimizer), "batch_size", "total_steps")
  if section == "train":
    known = names.without(
        names.parameters(loop.LoopOptions), "tokens_per_volume", "flops_per_volume",
        "wandb",
    )
    own = ("total_steps", "steps_per_epoch", "start_from", *(f"mesh_{a}" for a in sharding.AXES))
    return {**known, **dict.fromkeys(own, False)}
  if section == "model":
    model = names.resolve("model", options.get("name", ""))
    return {"name": True, "preset": True, **dict.fromkeys(names.fields(model), False)}
  if section == "objective":
    unit = names.resolve("objective", options.get("name", ""))
    return {"name": True, **names.without(names.parameters(unit), "backbone")}
  unit = names.resolve("evals", options.get("type", ""))
  known = names.without(names.parameters(unit), "functions", "data")
  return {"type": True, "every_steps": True, **known}


def _keyword_faults(
    place: str, options: Mapping[str, Any], keywords: Mapping[str, bool]
) -> list[str]:
  faults = []
  stems = {names.stem_of(k) for k in keywords if k.endswith("_steps")}
  durations = {f"{stem}_{s}" for stem in stems for s in names.SUFFIXES}
  for key in sorted(options):
    if key not in keywords and key not in durations:
      near = names.closest(key, set(keywords) | durations)
      faults.append(f"{place}.{key}: unknown key; closest: {near}")
  for stem in sorted(stems):
    found = [f"{stem}_{s}" for s in names.SUFFIXES if f"{stem}_{s}" in options]
    if len(found) > 1:
      faults.append(f"{place}.{stem}: spelled twice, as {' and '.join(found)}; keep one")
    for key in found:
      if not options[key] >= 0:
        faults.append(f"{place}.{key}: {options[key]} must not be negative")
  return faults


def _kind_faults(data: Mapping[str, Any]) -> list[str]:
  """Values of another kind than `pipeline.open_data` takes; empty ones are not given."""
  hints = typing.get_type_hints(pipeline.open_data)
  # Fields and values of filters are checked with the table's own words.
  hints |= dict.fromkeys(("filters", "exclude", "columns"), Mapping[str, Any])
  hints |= dict(
      splits=Mapping[str, float], split_column=str, storage=Mapping[str, Any]
  )
  nested = {
      "data.storage": (data.get("storage"), _STORAGE_KINDS),
      "data.reader": (data.get("reader"), typing.get_type_hints(readers.ReadOptions)),
  }
  sources = data.get("sources")
  for name, own in sources.items() if isinstance(sources, Mapping) else ():
    nested[f"data.sources.{name}"] = (own, hints | {"weight": float})
  canvas = data.get("canvas")
  faults = [] if isinstance(canvas, list | tuple) and len(canvas) == 3 else [
      f"data.canvas: {canvas!r} must be three numbers (Z, Y, X) above 0"
  ]
  return faults + [
      f"{place}.{key}: {value!r} is not {_said(kinds[key])}"
      for place, (options, kinds) in {"data": (data, hints), **nested}.items()
      for key, value in (options.items() if isinstance(options, Mapping) else ())
      if key in kinds and value not in _NOT_GIVEN and not _fits(value, kinds[key])
  ]


def _fits(value: Any, kind: Any) -> bool:
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if kind is Any:
    return True
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, one) for one in inner)
  if origin is collections.abc.Mapping:
    return isinstance(value, Mapping) and all(
        _fits(v, inner[1]) for v in value.values()
    )
  if origin in (tuple, collections.abc.Sequence):
    return isinstance(value, list | tuple) and all(_fits(v, inner[0]) for v in value)
  if kind in (int, float):  # True is an int to Python, and nan a float.
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (kind is float and isinstance(value, float) and value == value)
  return isinstance(value, kind)


def _said(kind: Any) -> str:
  """Returns a kind in words of its own: `int`, `Sequence[str] | None`."""
  text = kind.__name__ if isinstance(kind, type) else str(kind)
  return text.replace("collections.abc.", "").replace("typing.", "")


def _missing_faults(
    place: str, options: Mapping[str, Any], keywords: Mapping[str, bool]
) -> list[str]:
  return [
      f"{place}.{key}: missing"
      for key in sorted(k for k, required in keywords.items() if required)
      if key not in options
      and (names.stem_of(key) is None or names.duration_key(options, names.stem_of(key)) is None)
  ]


def _geometry_faults(plain: Mapping[str, Any]) -> list[str]:
  """Voxels by patch, crop by canvas."""
  canvas, crop = plain["data"]["canvas"], plain["augment"].get("crop")
  frames = (plain["data"].get("clip") or {}).get("frames", 1)
  if not isinstance(frames, int) or frames < 1:  # reported as a fault of the data
    return []
  voxels = tuple(crop or (frames, *canvas))
  where = "augment.crop" if crop else "data.canvas"
  try:
    model = units.build_model(plain)
  except ValueError:  # reported as a fault of the model
    model = None
  faults = [] if model is None else [
      f"{where} {voxels}: {f}" for f in grid_faults(
          voxels, tuple(model.patch), getattr(model, "pad", False),
          getattr(model, "stride", None),
      )
  ]
  canvases = {"": canvas} | {
      name: tuple(own["canvas"])
      for name, own in (plain["data"].get("sources") or {}).items()
      if isinstance(own, Mapping) and len(own.get("canvas", ())) == 3
  }
  for name, own in canvases.items():
    faults += [
        f"augment{f' of data.sources.{name}' if name else ''}: {f}"
        for f in augment.augment_faults(plain["augment"], (frames, *own))
    ]
    if tuple(own) != tuple(canvas) and not crop:
      faults.append(
          f"data.sources.{name}.canvas: {own} is not data.canvas {canvas}; the model "
          "has one grid, so give both or an augment.crop that fits in each"
      )
  return faults + _time_faults(plain, frames)


def _time_faults(plain: Mapping[str, Any], frames: int) -> list[str]:
  """Views that would part the time points of a clip from their stages."""
  if not plain["data"].get("stages"):
    return []
  options, faults = plain["augment"], []
  for key in ("flip", "shift", "scale"):
    values = options.get(key)
    if isinstance(values, list | tuple) and values and values[0]:
      faults.append(
          f"augment.{key}: {tuple(values)} moves the time points of a clip, whose "
          "stages (data.stages) stay; make its first number 0"
      )
  crop = options.get("crop")
  if isinstance(crop, list | tuple) and crop and crop[0] != frames:
    faults.append(
        f"augment.crop: T={crop[0]} of data.clip.frames {frames} time points that have "
        "stages (data.stages); keep them all, or cut shorter clips"
    )
  for key in ("rotate_axes", "rot90_axes"):
    if "T" in options.get(key, ()) and options.get(key.removesuffix("_axes")):
      faults.append(f"augment.{key}: {options[key]} turns the time of a clip")
  return faults


def _mask_faults(plain: Mapping[str, Any]) -> list[str]:
  """Options of the mask groups, their counts against the grid and the model."""
  try:
    grid, model = units.model_grid(plain), units.build_model(plain)
  except ValueError:  # reported as a fault of the geometry or the model
    return []
  options = {k: v for k, v in plain["objective"].items() if k != "name"}
  faults = [
      f"objective.masks.{name}: {fault}"
      for name, group in options.get("masks", {}).items()
      for fault in masks.mask_faults(group, grid)
  ]
  module = names.module_of("objective", plain["objective"]["name"])
  if hasattr(module, "pair_faults"):
    faults += module.pair_faults(model, **options)
  return faults


def _data_faults(plain: Mapping[str, Any]) -> list[str]:
  """Tables, sources, readers, operations, storage, shares of the splits, ranges."""
  data = {k: v for k, v in plain["data"].items() if v not in ("", (), {})}
  faults = _source_faults(data) + _table_faults("data", data)
  if data.get("validate", "read") not in ("read", "lazy"):
    faults.append(f"data.validate: {data['validate']!r} is none of read, lazy")
  for key, least in (("threads", 1), ("workers", 0)):
    if data.get(key, least) < least:
      faults.append(f"data.{key}: {data[key]} must be at least {least}")
  if not data.get("timeout_s", 1.0) > 0:
    faults.append(f"data.timeout_s: {data['timeout_s']} must be above 0")
  for key in ("max_bad_fraction", "max_lost_fraction"):
    if not 0 <= data.get(key, 0.0) <= 1:
      faults.append(f"data.{key}: {data[key]} is not in [0, 1]")
  if data.get("cache", "none") not in ("memory", "none"):
    if "://" in data["cache"] and not data["cache"].startswith("gs://"):
      faults.append(f"data.cache: {data['cache']!r} must be a local folder or gs://")
  if data.get("cache_bytes", 0) < 0:
    faults.append(f"data.cache_bytes: {data['cache_bytes']} must not be negative")
  faults += _clip_faults(data)
  faults += _storage_faults(data.get("storage", {}))
  faults += _field_faults("data.stratify", data.get("stratify", ()))
  splits = data.get("splits", {})
  if not data.get("split_column"):
    shares = ", ".join(f"{k} {v}" for k, v in splits.items()) or "none"
    if "train" not in splits or min(splits.values()) <= 0:
      faults.append(f"data.splits: {shares}; needs train, and shares above 0")
    elif abs(sum(splits.values()) - 1) > 1e-6:
      faults.append(f"data.splits: {shares} add to {sum(splits.values()):g}, not 1")
  return faults


def _clip_faults(data: Mapping[str, Any]) -> list[str]:
  """Clips of movies, and the stages of their time points."""
  clip, staging = (
      units.filled_in({k: v for k, v in data.get(key, {}).items() if v is not None})
      for key in ("clip", "stages")
  )
  faults = [f"data.clip.{f}" for f in clips.clip_option_faults(clip)] if clip else []
  faults += [f"data.stages.{f}" for f in stages.stage_option_faults(staging)]
  if staging and not clip:
    faults.append(
        "data.stages: given without data.clip; stages are of the time points of clips"
    )
  if clip and clip.get("time_blocks") and data.get("split_column"):
    faults.append(
        f"data.clip.time_blocks: {clip['time_blocks']} beside data.split_column "
        f"{data['split_column']!r}; time is shared out by data.splits alone"
    )
  ends = tuple(data.get("percentiles", (0.5, 99.8)))
  if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= 100:
    faults.append(
        f"data.percentiles: {ends} must be two numbers that rise within 0 .. 100"
    )
  return faults


def _source_faults(data: Mapping[str, Any]) -> list[str]:
  """One manifest or several sources; how they are mixed."""
  sources, faults = data.get("sources", {}), []
  if not sources and not data.get("manifest"):
    faults.append(
        "data.manifest: empty; give your own table with --config.data.manifest=FILE "
        "(columns participant_id, filepath, ...), or run the embedded corpus with "
        "the arm :sample"
    )
  if sources and data.get("manifest"):
    faults.append(
        f"data.manifest: {data['manifest']!r} beside data.sources "
        f"{', '.join(sources)}; give one or the other"
    )
  mixture = data.get("mixture", "weighted")
  if mixture not in mixture_lib.MIXTURES:
    near = names.closest(mixture, mixture_lib.MIXTURES)
    faults.append(f"data.mixture: {mixture!r} is none of {near}")
  for name, own in sources.items():
    place = f"data.sources.{name}"
    if not isinstance(own, Mapping):
      faults.append(f"{place}: {own!r} is not a dict of options")
      continue
    faults += _keyword_faults(place, own, dict.fromkeys(pipeline.SOURCE_KEYS, False))
    faults += _table_faults(place, own)
    if not own.get("manifest"):
      faults.append(f"{place}.manifest: missing")
    weight = own.get("weight", 1.0)
    if not 0 < weight < float("inf"):
      faults.append(f"{place}.weight: {weight} must be a number above 0")
    if "weight" in own and mixture == "concatenate":
      faults.append(
          f"{place}.weight: {weight} has no say in data.mixture 'concatenate'; use "
          "'weighted' or 'alternate'"
      )
    for key in ("canvas", "dtype"):
      if mixture != "alternate" and own.get(key, data.get(key)) != data.get(key):
        faults.append(
            f"{place}.{key}: {own[key]} is not data.{key} {data.get(key)}; rows of one "
            "batch are alike, only data.mixture 'alternate' keeps sources apart"
        )
  return faults


def _table_faults(place: str, data: Mapping[str, Any]) -> list[str]:
  """What a manifest and the way from its files to canvases may say, here or there."""
  faults = []
  manifest = data.get("manifest", "")
  corpora = (*units.PHANTOMS, *units.EMBRYOS)
  if manifest.startswith("phantom:") and manifest[8:] not in corpora:
    faults.append(
        f"{place}.manifest: no embedded corpus {manifest!r}; there are "
        + ", ".join(f"phantom:{key}" for key in corpora)
    )
  try:
    ops.check_options(data.get("resample", "resize"), data.get("dtype", "uint8"))
  except ValueError as error:
    faults.append(f"{place}.{error}")
  for key, least in (
      ("max_records", 0), ("train_participants", 0), ("max_voxels", 1)
  ):
    if data.get(key, least) < least:
      faults.append(f"{place}.{key}: {data[key]} must be at least {least}")
  for key in ("canvas", "fov_mm", "spacing_mm"):
    if key in data and (len(data[key]) != 3 or min(data[key]) <= 0):
      faults.append(
          f"{place}.{key}: {data[key]} must be three numbers (Z, Y, X) above 0"
      )
  if data.get("colour", "reject") not in readers.COLOURS:
    faults.append(
        f"{place}.colour: {data['colour']!r} is none of {', '.join(readers.COLOURS)}"
    )
  reader = units.filled_in(data.get("reader", {}))
  known = {f.name for f in dataclasses.fields(readers.ReadOptions)} - _SAID_ELSEWHERE
  faults += _keyword_faults(f"{place}.reader", reader, dict.fromkeys(known, False))
  faults += [f"{place}.reader: {fault}" for fault in readers.read_option_faults(reader)]
  faults += [f"{place}.{fault}" for fault in ops.op_faults(
      data.get("ops", ()), of_movies=bool(data.get("clip"))
  )]
  for key in ("filters", "exclude"):
    faults += _field_faults(f"{place}.{key}", data.get(key, ()))
  return faults


def _field_faults(place: str, given: Iterable[str]) -> list[str]:
  fields = (*manifest_lib.FIELDS, "label")
  return [
      f"{place}: no field {field!r} of a recording; closest: "
      f"{names.closest(field, fields)}"
      for field in given if field not in fields
  ]


def _storage_faults(options: Mapping[str, Any]) -> list[str]:
  known = names.without(names.parameters(storage.configure), "counts_folder")
  faults = _keyword_faults("data.storage", options, known)
  if "://" in (options.get("cache") or ""):
    faults.append(f"data.storage.cache: {options['cache']!r} must be a local folder")
  for key in ("cache_bytes", "deadline_s"):
    if not options.get(key, 1) > 0:
      faults.append(f"data.storage.{key}: {options[key]} must be above 0")
  return faults


def _model_faults(plain: Mapping[str, Any]) -> list[str]:
  """Asks the backbone's own module what is wrong with its options."""
  options = {k: v for k, v in plain["model"].items() if k != "name"}
  module = names.module_of("model", plain["model"]["name"])
  return [f"model.{fault}" for fault in module.model_faults(options)]


def _optimizer_faults(plain: Mapping[str, Any]) -> list[str]:
  """Names, ranges, and lengths against the run's as far as they are known."""
  options, faults = plain["optimizer"], []
  for name, known in (("schedule", units.SCHEDULES), ("learning_rate_scaling", units.SCALING)):
    if options.get(name, next(iter(known))) not in known:
      faults.append(f"optimizer.{name}: {options[name]!r} is none of {', '.join(known)}")
  for name in ("learning_rate", "learning_rate_batch", "eps", "clip_norm"):
    if not options.get(name, 1.0) > 0:
      faults.append(f"optimizer.{name}: {options[name]} must be positive")
  for name, low, high in (
      ("b1", 0, 1), ("b2", 0, 1), ("final_fraction", 0, 1),
      ("weight_decay", 0, float("inf")), ("final_weight_decay", 0, float("inf")),
  ):
    if not low <= options.get(name, 0.0) <= high:
      faults.append(f"optimizer.{name}: {options[name]} is not in [{low}, {high}]")
  if not 0 < options.get("layer_decay", 1.0) <= 1:
    faults.append(f"optimizer.layer_decay: {options['layer_decay']} is not in (0, 1]")
  if bool(options.get("freeze")) != bool(names.duration_key(options, "freeze")):
    faults.append(
        "optimizer.freeze and optimizer.freeze_steps (or _epochs, _percent): what does "
        "not move, and until when; give both or neither"
    )
  falls = names.duration_key(options, "decay")
  if (options.get("schedule") == "wsd") != (falls is not None):
    faults.append(
        "optimizer.decay_steps (or _epochs, _percent): the length of the fall, to be "
        f"given with schedule 'wsd' and no other; schedule is "
        f"{options.get('schedule', 'cosine')!r}, decay {options.get(falls)}"
    )
  return faults + _fit_faults(options, plain["train"])


def _fit_faults(options: Mapping[str, Any], train: Mapping[str, Any]) -> list[str]:
  """Warm-up and decay against the run; a length that only the data tell is left."""
  keys = [k for k in (names.duration_key(options, s) for s in ("warmup", "decay")) if k]
  length = names.duration_key(train, "total")
  if not keys or length is None or train[length] < 1:
    return []
  suffixes = {key.rpartition("_")[2] for key in (*keys, length)} - {"percent"}
  per_epoch = train.get("steps_per_epoch")
  if len(suffixes) > 1 and not per_epoch:
    return []
  per_epoch = per_epoch or 1000  # of one unit only, any number compares the same
  total = train[length] * (per_epoch if length == "total_epochs" else 1)
  scale = {"steps": 1, "epochs": per_epoch, "percent": total / 100}
  spent = sum(options[key] * scale[key.rpartition("_")[2]] for key in keys)
  warmup = keys[0] if keys[0].startswith("warmup") else None
  too_long = warmup and options[warmup] * scale[warmup.rpartition("_")[2]] >= total
  if not too_long and spent <= total:
    return []
  given = " and ".join(f"{key} {options[key]}" for key in keys)
  return [
      f"optimizer.{given}: as long as the whole run, train.{length} {train[length]}; "
      "shorten it or train longer"
  ]


def _evaluation_faults(
    plain: Mapping[str, Any], device_count: int | None
) -> list[str]:
  """Splits and batches of evaluators; metrics that no evaluator gives."""
  evals, train, faults = plain["evals"], plain["train"], []
  splits = _split_names(plain["data"])
  # Rows go over data x fsdp; the others share a row.
  rows_over = max((device_count or 1) // max(train.get("mesh_sequence", 1), 1), 1)
  for name, given in evals.items():
    parameters = inspect.signature(names.resolve("evals", given["type"])).parameters
    options = {k: p.default for k, p in parameters.items()} | given
    split, rows = options.get("split"), options.get("batch_size", rows_over)
    if split and splits is not None and split not in splits:
      faults.append(
          f"evals.{name}.split: {split!r} is no split of the data; they have "
          + ", ".join(splits)
      )
    if rows < 1 or rows % rows_over:
      faults.append(
          f"evals.{name}.batch_size: {rows} must be a positive multiple of the "
          f"{rows_over if device_count else 'number of'} device(s)"
      )
    tile, crop = options.get("tile"), plain["augment"].get("crop")
    if tile and tuple(tile) != tuple(crop or ()):
      faults.append(
          f"evals.{name}.tile: {tuple(tile)} is not augment.crop {crop}; the model sees "
          "volumes of one size"
      )
  types = sorted({names.told_as(options) for options in evals.values()})
  for key, known in (
      ("best_metric", types), ("early_stop_metric", [*types, "validation"])
  ):
    metric = train.get(key, "")
    kind = metric.split(".")[0]
    if not metric or (key == "best_metric" and kind in ("loss", "validation")):
      continue  # the latter is refused for another reason
    faults += _truth_faults(plain, key, metric)
    if kind not in known:
      faults.append(
          f"train.{key}: {metric!r} comes from no evaluator of evals; they give "
          f"numbers of {', '.join(f'{k}.*' for k in known) or 'nothing'}"
      )
  return faults


def _truth_faults(plain: Mapping[str, Any], key: str, metric: str) -> list[str]:
  """A metric of stages against a truth, where answers are all that is known."""
  if set((plain["data"].get("stages") or {}).get("sources", ())) != {"answers"}:
    return []
  kind, _, own = metric.partition(".")
  of_stages = {
      names.told_as(options) for options in plain["evals"].values()
      if options["type"] in ("stages", "stage_probe")
  }
  without_truth = ("answers_", "kappa_answers", "impossible_", "time_")
  if kind not in of_stages or own.startswith(without_truth):
    return []
  return [
      f"train.{key}: {metric!r} needs a truth, and data.stages.sources are answers "
      f"alone; name {kind}.answers_{own}, agreement with them"
  ]


def _split_names(data: Mapping[str, Any]) -> list[str] | None:
  """Returns the splits' names; None: in a column of a manifest not yet read."""
  if not data.get("split_column"):
    return list(data["splits"])
  _, _, corpus = (data.get("manifest") or "").partition("phantom:")
  if corpus not in (*units.PHANTOMS, *units.EMBRYOS):
    return None
  return units.phantom_splits(corpus)


def _objective_faults(plain: Mapping[str, Any]) -> list[str]:
  """Asks the objective's own module what is wrong with its options."""
  name = plain["objective"]["name"]
  known = names.parameters(names.resolve("objective", name))
  faults = names.module_of("objective", name).objective_faults(**{
      k: v for k, v in plain["objective"].items()
      if k in known and names.stem_of(k) is None
  })
  return faults + (_label_faults(plain) if "classes" in known else [])


def _label_faults(plain: Mapping[str, Any]) -> list[str]:
  """What an objective that learns from labels needs of the data."""
  options, data = plain["objective"], plain["data"]
  frames = (data.get("clip") or {}).get("frames", 1)
  module = names.module_of("objective", options["name"])
  alone = [
      f"objective.{name}: {options[name]} with data.clip.frames {frames}; it compares "
      "time points of a clip, give it two or more"
      for name in module.OVER_TIME if options.get(name) and frames == 1
  ]
  clip = data.get("clip") or {}
  if frames > 1 and options.get("labels", "label") == "label" and (
      data.get("stages") and clip.get("eval_step", 0) != 1
  ):
    alone.append(
        f"objective.labels: 'label' is of the middle of {frames} time points, and of "
        "the fewest clips that show all; set data.clip.eval_step=1, or labels "
        "'frame_label'"
    )
  return alone + _class_faults(options, data)


def _compared_faults(plain: Mapping[str, Any]) -> list[str]:
  """Losses over time where one token holds all the time points that the model sees."""
  options = plain["objective"]
  module = names.module_of("objective", options["name"])
  given = {key: options.get(key) for key in getattr(module, "OVER_TIME", ())}
  frames = (plain["data"].get("clip") or {}).get("frames", 1)
  if frames == 1 or not any(given.values()):  # the former is said of the clip
    return []
  try:
    grid = units.model_grid(plain)
  except ValueError:  # reported as a fault of the geometry or the model
    return []
  return module.time_faults(grid, **given)


def positions_fault(
    source: str, theirs: Mapping[str, Any], plain: Mapping[str, Any]
) -> str:
  """Says why the fixed positions of two runs differ, "" where they do not.

  Sines and cosines have no parameters whose shapes could tell it.

  Args:
    source: the workdir of the run to start from.
    theirs, plain: the configs of that run and of this one.
  """
  if not all(c["model"].get("positions") == "sincos" for c in (theirs, plain)):
    return ""
  grids = [_grid_of_positions(c) for c in (theirs, plain)]
  there, here = (
      [AXES[axis] for axis in positions.active_axes(grid.dims)] for grid in grids
  )
  if there == here:
    return ""
  differing = [axis for axis in AXES if (axis in there) != (axis in here)]
  return (
      f"{source} has model.positions 'sincos', whose channels are shared out among the "
      f"axes with more than one token: {', '.join(there) or 'none'} there {tuple(grids[0].dims)}, "
      f"{', '.join(here) or 'none'} here {tuple(grids[1].dims)} (T, Z, Y, X), so that its encoder "
      "would take places for others; keep at least two tokens along "
      f"{', '.join(differing)} in both runs, or pre-train with model.positions='learned' "
      "and name the voxels of its tables here (model.table_voxels)"
  )


def _grid_of_positions(plain: Mapping[str, Any]) -> Grid:
  """Returns the grid that the encoder's fixed positions are computed for."""
  model = plain["model"]
  if model["name"] == "vit" and model.get("table_voxels"):  # resampled to the grid
    plain = {**plain, "augment": {**plain["augment"], "crop": model["table_voxels"]}}
  return units.model_grid(plain)


def _class_faults(options: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
  staging = units.filled_in(data.get("stages") or {})
  if options.get("labels", "label") == "frame_label" and not staging:
    return [
        "objective.labels: 'frame_label' without data.stages; that says where the "
        "stages of time points come from"
    ]
  if not staging:
    return [] if data.get("label") else [
        "objective.labels: 'label' without data.label; name the column that holds them"
    ]
  if stages.stage_option_faults(staging):  # reported as a fault of the data
    return []
  known = stages.StageOptions(**staging).classes
  return [] if options["classes"] == len(known) else [
      f"objective.classes: {options['classes']}, but data.stages.taxonomy has "
      f"{len(known)}: {', '.join(known)}"
  ]


def _training_faults(
    plain: Mapping[str, Any], device_count: int | None
) -> list[str]:
  """Ranges, batch by accumulation and devices, the run's length."""
  train = plain["train"]
  faults = [f"train.{fault}" for fault in loop.option_faults(train)]
  batch, accum = train["batch_size"], train.get("accum", 1)
  lengths = [f"total_{s}" for s in names.SUFFIXES[:2] if f"total_{s}" in train]
  if len(lengths) != 1:
    faults.append(
        "train.total_steps or train.total_epochs: give one; got "
        + (" and ".join(lengths) or "none")
    )
  elif not train[lengths[0]] > 0:
    faults.append(f"train.{lengths[0]} {train[lengths[0]]} must be positive")
  if batch >= 1 and accum >= 1 and batch % accum:
    faults.append(
        f"train.batch_size {batch}: not a multiple of train.accum {accum}"
    )
  elif batch >= 1 and accum >= 1:
    faults += _mesh_faults(train, batch // accum, device_count)
  faults += _sharing_faults(plain)
  if train.get("start_from") and plain["objective"].get("name") == "vjepa":
    faults.append(
        f"train.start_from: {train['start_from']!r} with objective 'vjepa', whose "
        "moving average would start elsewhere; leave it out"
    )
  best = train.get("best_metric", "")
  if best and best.split(".")[0] in ("loss", "validation"):
    faults.append(
        f"train.best_metric {best!r}: the self-supervised loss does not say which "
        "checkpoint is best (it may rise while features improve); name a probe's "
        "number such as 'probe.accuracy', or '' for none"
    )
  return faults


def _sharing_faults(plain: Mapping[str, Any]) -> list[str]:
  """Time points of a clip that devices cannot share evenly."""
  shares = plain["train"].get("mesh_sequence", 1)
  try:
    grid, model = units.model_grid(plain), units.build_model(plain)
  except ValueError:  # reported as a fault of the geometry or the model
    return []
  if getattr(model, "space_time", "joint") == "joint" or shares < 1:
    return []
  return [
      f"train.mesh_sequence: {shares} devices cannot share {grid.dims[0]} time points "
      "of a clip evenly; give a divisor"
  ] if grid.dims[0] % shares else []


def _mesh_faults(
    train: Mapping[str, Any], micro: int, device_count: int | None
) -> list[str]:
  data, fsdp, sequence = (
      train.get(f"mesh_{axis}", -1 if axis == "data" else 1) for axis in sharding.AXES
  )
  sizes = (
      f"train.mesh_data {data} x train.mesh_fsdp {fsdp} x train.mesh_sequence {sequence}"
  )
  faults = sharding.mesh_faults(data, fsdp, sequence, device_count)
  if faults:
    return [f"{sizes}: {fault}" for fault in faults]
  shares = device_count // sequence if device_count else max(data, 1) * fsdp
  if micro % shares:
    return [
        f"train.batch_size: a micro-batch of {micro} rows does not divide over data x "
        f"fsdp = {shares} device(s); give it a multiple of {shares}"
    ]
  return []
