"""From a config to the units it names: all faults at once, then one build each.

This is the only place where a string of a config becomes an import, and, beside
`main`, the only one that sees a whole config. Every unit gets its own keywords
and nothing else.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import difflib
import functools
import importlib
import inspect
import os
import pathlib
import pkgutil
from typing import Any

import jax
import ml_collections

from vjepa_jax.data import manifest as manifest_lib
from vjepa_jax.data import ops, phantoms, pipeline
from vjepa_jax.train import evaluate, loop, optim, schedules, sharding
from vjepa_jax.volumes import augment, masks
from vjepa_jax.volumes.grid import Grid, grid_faults

SUFFIXES = ("steps", "epochs", "percent")
# The embedded corpora, by what follows `phantom:` in data.manifest.
PHANTOMS = {
    "oct": {},
    "oct_tiny": dict(patients=dict(train=8, probe=12, validation=4), broken=3),
}
WANDB = ("project", "entity", "name", "mode", "tags", "group", "notes")
WANDB_MODES = ("online", "offline", "disabled", "shared")
SCALING = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}
SCHEDULES = ("cosine", "constant", "linear", "wsd")
# section -> (package, what a module of it offers)
_PLACES = {
    "model": ("vjepa_jax.backbones", "Model"),
    "objective": ("vjepa_jax.objectives", "Objective"),
    "evals": ("vjepa_jax.evaluators", "Evaluator"),
}
SECTIONS = ("data", "augment", "model", "objective", "optimizer", "train", "evals")


class ConfigError(ValueError):
  """A config that cannot run; `faults` lists every reason."""

  def __init__(self, name: str, faults: list[str]):
    self.faults = faults
    lines = "\n".join(f"  {name}: {fault}" for fault in faults)
    super().__init__(f"{len(faults)} fault(s) in the config:\n{lines}")


def load(spec: str) -> ml_collections.ConfigDict:
  """Reads `FILE.py[:arg]` and returns its config.

  Raises:
    FileNotFoundError: if there is no such file.
  """
  path, _, arg = spec.partition(":")
  module_spec = importlib.util.spec_from_file_location("vjepa_jax_config", path)
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)
  return module.get_config(arg)


def resolve(section: str, name: str) -> Any:
  """Returns what the module `name` of a section offers.

  Raises:
    KeyError: for an unknown name; lists the closest.
  """
  package, attribute = _PLACES[section]
  known = [
      m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__)
      if m.name != "base" and hasattr(importlib.import_module(f"{package}.{m.name}"), attribute)
  ]
  if name not in known:
    raise KeyError(f"{name!r} is none of {_closest(name, known)}")
  return getattr(importlib.import_module(f"{package}.{name}"), attribute)


def duration(
    section: Mapping[str, Any], stem: str, *, total_steps: int, steps_per_epoch: int
) -> int | None:
  """Returns `stem`_{steps,epochs,percent} of a section in steps; None if absent.

  Raises:
    ValueError: if it is spelled in two ways.
  """
  found = [s for s in SUFFIXES if section.get(f"{stem}_{s}") is not None]
  if len(found) > 1:
    raise ValueError(
        f"{stem} is spelled twice: " + ", ".join(f"{stem}_{s}" for s in found)
    )
  if not found:
    return None
  value = section[f"{stem}_{found[0]}"]
  scale = {
      "steps": 1, "epochs": steps_per_epoch, "percent": total_steps / 100.0
  }[found[0]]
  return round(value * scale)


def in_steps(
    section: Mapping[str, Any],
    keywords: Iterable[str],
    *,
    total_steps: int,
    steps_per_epoch: int,
) -> dict[str, Any]:
  """Returns a section with every duration rewritten as the unit's `*_steps`."""
  result = {k: v for k, v in section.items() if _stem(k) is None}
  for stem in {_stem(k) for k in section} - {None}:
    if f"{stem}_steps" in keywords:
      result[f"{stem}_steps"] = duration(
          section, stem, total_steps=total_steps, steps_per_epoch=steps_per_epoch
      )
    else:
      result.update({k: v for k, v in section.items() if _stem(k) == stem})
  return result


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
  plain = as_plain(config)
  faults, broken = _section_faults(plain)
  rules = (
      (("data",), _data_faults),
      (("data", "augment", "model"), _geometry_faults),
      (("model",), _model_faults),
      (("objective",), _objective_faults),
      (("data", "augment", "model", "objective"), _mask_faults),
      (("train", "optimizer"), _optimizer_faults),
      (("train",), functools.partial(_training_faults, device_count=device_count)),
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


def as_plain(config: ml_collections.ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """Returns nested dicts without the placeholders that nobody filled."""
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  return {
      key: as_plain(value) if isinstance(value, Mapping) else value
      for key, value in config.items()
      if value is not None
  }


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a config stands for, built and ready to run.

  Attributes:
    config: the plain config, as saved with the run.
    data: the open data.
    objective: owns parameters, masks and loss.
    optimizer: of `train.optim`.
    augment: host batch -> device batch.
    mesh: of devices.
    grid: tokens that the model sees.
    options: of the train loop.
    evaluators: name -> (evaluator, every how many steps).
  """

  config: dict[str, Any]
  data: pipeline.Data
  objective: Any
  optimizer: optim.Optimizer
  augment: Callable[..., Any]
  mesh: Any
  grid: Grid
  options: loop.LoopOptions
  evaluators: dict[str, tuple[Any, int | None]]


def build(
    config: ml_collections.ConfigDict,
    *,
    quarantine: str | None = None,
    say: Callable[[str], None] = print,
) -> Experiment:
  """Builds every unit of a sound config, each from its own keywords.

  Args:
    config: of a config file, with overrides; `check_config` is run again, now
      with the number of devices.
    quarantine: file that bad recordings are listed in.
    say: gets a line now and then while data are read.

  Raises:
    ConfigError: as `check_config`.
    DataError: if the manifest or too many of its files cannot be used.
  """
  check_config(config, device_count=jax.device_count())
  plain = as_plain(config)
  grid = model_grid(plain)
  data = open_data(plain, quarantine=quarantine, say=say)
  train, steps = plain["train"], _lengths(plain["train"], data)
  try:
    objective = build_objective(plain, **steps)
    optimizer = build_optimizer(
        batch_size=train["batch_size"],
        **in_steps(plain["optimizer"], _parameters(build_optimizer), **steps)
        | {"total_steps": steps["total_steps"]},
    )
  except ValueError as error:  # lengths that only the size of the data tells
    raise ConfigError(plain["name"], [str(error)]) from error
  unit_augment = augment.make_augment(**plain["augment"])
  mesh = sharding.make_mesh(train.get("mesh_data", -1), train.get("mesh_fsdp", 1))
  functions = evaluate.wrap_functions(objective.functions(), unit_augment, mesh)
  evaluators = _build_evaluators(plain, functions, data, **steps)
  return Experiment(
      config=plain,
      data=data,
      objective=objective,
      optimizer=optimizer,
      augment=unit_augment,
      mesh=mesh,
      grid=grid,
      options=_loop_options(plain, grid, evaluators, **steps),
      evaluators=evaluators,
  )


def open_data(
    plain: Mapping[str, Any],
    *,
    quarantine: str | None = None,
    say: Callable[[str], None] = print,
) -> pipeline.Data:
  """Opens the data section; `phantom:NAME` writes the embedded corpus first.

  Args:
    plain: the whole config; an empty value of the section means "not given".
    quarantine: file that bad recordings are listed in.
    say: gets a line now and then while data are read.
  """
  section = _given(plain["data"])
  if column := section.pop("split_column", ""):
    section["splits"] = column
  # A recording of fewer voxels than a patch would be made up by resampling.
  section.setdefault("min_size", tuple(plain["model"]["patch"][1:]))
  # Positions in mm of an unknown spacing would make every feature NaN.
  section["require_spacing"] = plain["model"].get("rope_units", "index") == "mm"
  if section["manifest"].startswith("phantom:"):
    section["manifest"] = phantom_manifest(section["manifest"], say)

  def progress(done: int, total: int) -> None:
    if done == total or done % max(total // 4, 1) == 0:
      say(f"read {done} of {total} files")

  return pipeline.open_data(
      **section, seed=plain["seed"], quarantine=quarantine, progress=progress
  )


def _given(section: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a section without the keys whose value is empty, at any depth."""
  filled = {
      k: _given(v) if isinstance(v, Mapping) else v for k, v in section.items()
  }
  # Of numbers only max_records has a 0 that means "all"; others mean what they say.
  return {
      k: v for k, v in filled.items()
      if v not in ("", (), {}) and not (k == "max_records" and v == 0)
  }


def phantom_manifest(name: str, say: Callable[[str], None] = print) -> str:
  """Writes the phantom corpus `phantom:NAME` into the cache, once.

  The cache is VJEPA_JAX_CACHE, or ~/.cache/vjepa_jax.

  Raises:
    KeyError: for an unknown name.
  """
  _, _, key = name.partition(":")
  if key not in PHANTOMS:
    raise KeyError(f"data.manifest {name!r}: closest: {_closest(key, PHANTOMS)}")
  home = os.environ.get("VJEPA_JAX_CACHE", "~/.cache/vjepa_jax")
  folder = pathlib.Path(home).expanduser() / f"{key}_phantoms_v{phantoms.VERSION}"
  if not folder.exists():
    say(f"writing the embedded corpus to {folder}")
  return str(phantoms.write_oct_corpus(folder, **PHANTOMS[key]))


def build_objective(
    plain: Mapping[str, Any], *, total_steps: int, steps_per_epoch: int
) -> Any:
  """Builds the objective and the backbone in it."""
  section = {k: v for k, v in plain["model"].items() if k != "name"}
  model = importlib.import_module(
      f"{_PLACES['model'][0]}.{plain['model']['name']}"
  ).build(**section)
  unit = resolve("objective", plain["objective"]["name"])
  options = in_steps(
      {k: v for k, v in plain["objective"].items() if k != "name"},
      _parameters(unit), total_steps=total_steps, steps_per_epoch=steps_per_epoch,
  )
  return unit(model, **options)


def build_optimizer(
    *,
    batch_size: int,
    total_steps: int,
    learning_rate: float,
    learning_rate_batch: int | None = None,
    learning_rate_scaling: str = "none",
    schedule: str = "cosine",
    warmup_steps: int = 0,
    decay_steps: int = 0,
    final_fraction: float = 0.0,
    weight_decay: float = 0.0,
    final_weight_decay: float | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip_norm: float | None = None,
    decay: tuple[tuple[str, bool], ...] = (),
    frozen: tuple[str, ...] = (),
) -> optim.Optimizer:
  """Builds AdamW and its schedules from a config's numbers.

  Args:
    batch_size: global batch of the run.
    total_steps: length of the run.
    learning_rate: peak, as measured at `learning_rate_batch`.
    learning_rate_batch: global batch that it was measured at; None: this run's.
    learning_rate_scaling: "none", "sqrt" or "linear" in batch_size over it.
    schedule: "cosine", "constant", "linear" or "wsd", after the warm-up.
    warmup_steps: linear rise from 0.
    decay_steps: of "wsd", the fall at the end.
    final_fraction: of the peak, reached at the end.
    weight_decay: at the start.
    final_weight_decay: at the end, along a cosine; None: constant.
    b1, b2, eps, clip_norm, decay, frozen: see `optim.make_optimizer`.

  Raises:
    ValueError: for unknown names or lengths that do not fit.
  """
  for name, value, known in (
      ("learning_rate_scaling", learning_rate_scaling, SCALING),
      ("schedule", schedule, SCHEDULES),
  ):
    if value not in known:
      raise ValueError(f"optimizer.{name} {value!r} is none of {', '.join(known)}")
  ratio = batch_size / (learning_rate_batch or batch_size)
  peak = learning_rate * ratio ** SCALING[learning_rate_scaling]
  # offset 1: as V-JEPA 2 counts, so that no step has a learning rate of 0.
  common = dict(warmup_steps=warmup_steps, final=final_fraction * peak, offset=1)
  builders = {
      "cosine": lambda: schedules.warmup_cosine(peak, total_steps, **common),
      "wsd": lambda: schedules.wsd(
          peak, total_steps, decay_steps=decay_steps, **common
      ),
      "linear": lambda: schedules.wsd(
          peak, total_steps, decay_steps=total_steps - warmup_steps, **common
      ),
      "constant": lambda: schedules.wsd(
          peak, total_steps, decay_steps=0, **{**common, "final": peak}
      ),
  }
  wd = weight_decay
  if final_weight_decay is not None:
    wd = schedules.cosine(weight_decay, final_weight_decay, total_steps)
  return optim.make_optimizer(
      learning_rate=builders[schedule](), weight_decay=wd, b1=b1, b2=b2, eps=eps,
      clip_norm=clip_norm, decay=decay, frozen=frozen,
  )


def _lengths(train: Mapping[str, Any], data: pipeline.Data) -> dict[str, int]:
  """Returns total_steps and steps_per_epoch of a run on these data."""
  volumes = len(data.splits["train"])
  per_epoch = train.get("steps_per_epoch") or max(volumes // train["batch_size"], 1)
  total = train.get("total_steps") or round(train["total_epochs"] * per_epoch)
  return {"total_steps": total, "steps_per_epoch": per_epoch}


def _loop_options(plain, grid, evaluators, **steps) -> loop.LoopOptions:
  own = ("steps_per_epoch", "mesh_data", "mesh_fsdp", "total_epochs")
  section = {k: v for k, v in plain["train"].items() if k not in own}
  section = in_steps(section, _parameters(loop.LoopOptions), **steps)
  section["total_steps"] = steps["total_steps"]
  best = section.get("best_metric") or None
  # Without labels there is no probe, and then nothing to choose the best by.
  given = {plain["evals"][name]["type"] for name in evaluators}
  if best and best.split(".")[0] not in given:
    best = None
  wandb = _given(plain.get("wandb", {}))
  return loop.LoopOptions(**{
      **section,
      "best_metric": best,
      "early_stop_metric": section.get("early_stop_metric") or None,
      "tokens_per_volume": grid.tokens,
      "wandb": wandb if wandb.get("project") else None,
  })


def _build_evaluators(plain, functions, data, **steps):
  evaluators = {}
  for name, options in plain["evals"].items():
    unit = resolve("evals", options["type"])
    if getattr(unit, "needs_labels", False) and not plain["data"].get("label"):
      continue
    options = in_steps(
        options, [*_parameters(unit), "every_steps"], **steps
    )
    every = options.pop("every_steps") or None
    options.pop("type")
    try:
      evaluators[name] = (unit(functions, data, **options), every)
    except (KeyError, ValueError) as error:
      raise ConfigError(
          plain["name"], [f"evals.{name}: {error.args[0]}"]
      ) from error
  return evaluators


def model_grid(plain: Mapping[str, Any]) -> Grid:
  """Returns the grid of tokens that the model sees.

  Raises:
    ValueError: if the voxels are not a multiple of the patch.
  """
  voxels = plain["augment"].get("crop") or (1, *plain["data"]["canvas"])
  return Grid(tuple(voxels), tuple(plain["model"]["patch"]))


def _section_faults(plain: Mapping[str, Any]) -> tuple[list[str], set[str]]:
  """Unknown and missing keys, durations spelled twice, names that do not resolve.

  Returns the faults, and the sections that lack what their rules read.
  """
  known = {"name", "seed", "wandb", *SECTIONS}
  missing = {"name", "seed", *SECTIONS} - set(plain)
  faults, broken = [f"{key}: missing" for key in sorted(missing)], set(missing)
  for key in sorted(set(plain) - known):
    faults.append(f"{key}: unknown section; closest: {_closest(key, known)}")
  for section in (s for s in SECTIONS if s in plain):
    if not isinstance(plain[section], Mapping):
      faults.append(f"{section}: {plain[section]!r} is not a dict of options")
      broken.add(section)
      continue
    units = plain[section].items() if section == "evals" else [("", plain[section])]
    for name, options in units:
      place = f"{section}.{name}" if name else section
      try:
        keywords = _keywords(section, options)
      except KeyError as error:
        faults.append(f"{place}: {error.args[0]}")
        broken.add(section)
        continue
      absent = _missing_faults(place, options, keywords)
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
    known = _without(_parameters(pipeline.open_data), "seed", "quarantine", "progress")
    return {**_without(known, "require_spacing"), "split_column": False}
  if section == "augment":
    return _parameters(augment.make_augment)
  if section == "optimizer":
    return _without(_parameters(build_optimizer), "batch_size", "total_steps")
  if section == "train":
    known = _without(_parameters(loop.LoopOptions), "tokens_per_volume", "wandb")
    own = dict.fromkeys(("total_steps", "steps_per_epoch", "mesh_data", "mesh_fsdp"), False)
    return {**known, **own}
  if section == "model":
    model = resolve("model", options.get("name", ""))
    return {"name": True, "preset": True, **dict.fromkeys(_fields(model), False)}
  if section == "objective":
    unit = resolve("objective", options.get("name", ""))
    return {"name": True, **_without(_parameters(unit), "backbone")}
  unit = resolve("evals", options.get("type", ""))
  known = _without(_parameters(unit), "functions", "data")
  return {"type": True, "every_steps": True, **known}


def _keyword_faults(
    place: str, options: Mapping[str, Any], keywords: Mapping[str, bool]
) -> list[str]:
  faults = []
  stems = {_stem(k) for k in keywords if k.endswith("_steps")}
  durations = {f"{stem}_{s}" for stem in stems for s in SUFFIXES}
  for key in sorted(options):
    if key not in keywords and key not in durations:
      near = _closest(key, set(keywords) | durations)
      faults.append(f"{place}.{key}: unknown key; closest: {near}")
  for stem in sorted(stems):
    found = [f"{stem}_{s}" for s in SUFFIXES if f"{stem}_{s}" in options]
    if len(found) > 1:
      faults.append(f"{place}.{stem}: spelled twice, as {' and '.join(found)}; keep one")
    for key in found:
      if not options[key] >= 0:
        faults.append(f"{place}.{key}: {options[key]} must not be negative")
  return faults


def _missing_faults(
    place: str, options: Mapping[str, Any], keywords: Mapping[str, bool]
) -> list[str]:
  return [
      f"{place}.{key}: missing"
      for key in sorted(k for k, required in keywords.items() if required)
      if key not in options
      and (_stem(key) is None or duration_key(options, _stem(key)) is None)
  ]


def _geometry_faults(plain: Mapping[str, Any]) -> list[str]:
  """Voxels by patch, crop by canvas."""
  canvas, crop = plain["data"]["canvas"], plain["augment"].get("crop")
  voxels = tuple(crop or (1, *canvas))
  where = "augment.crop" if crop else "data.canvas"
  patch = tuple(plain["model"]["patch"])
  faults = [f"{where} {voxels}: {f}" for f in grid_faults(voxels, patch)]
  faults += [
      f"augment: {f}" for f in augment.augment_faults(plain["augment"], (1, *canvas))
  ]
  return faults


def _mask_faults(plain: Mapping[str, Any]) -> list[str]:
  """Options of the mask groups, their counts against the grid."""
  try:
    grid = model_grid(plain)
  except ValueError:  # reported as a fault of the geometry
    return []
  return [
      f"objective.masks.{name}: {fault}"
      for name, group in plain["objective"].get("masks", {}).items()
      for fault in masks.mask_faults(group, grid)
  ]


def _data_faults(plain: Mapping[str, Any]) -> list[str]:
  """The manifest, names, shares of the splits, ranges."""
  data = {k: v for k, v in plain["data"].items() if v not in ("", (), {})}
  faults = []
  manifest = data.get("manifest", "")
  if not manifest:
    faults.append(
        "data.manifest: empty; give your own table with --config.data.manifest=FILE "
        "(columns participant_id, filepath, ...), or run the embedded corpus with "
        "the arm :sample"
    )
  if manifest.startswith("phantom:") and manifest[8:] not in PHANTOMS:
    faults.append(
        f"data.manifest: no embedded corpus {manifest!r}; there are "
        + ", ".join(f"phantom:{key}" for key in PHANTOMS)
    )
  try:
    ops.check_options(data.get("resample", "resize"), data.get("dtype", "uint8"))
  except ValueError as error:
    faults.append(f"data.{error}")
  if data.get("validate", "read") not in ("read", "lazy"):
    faults.append(f"data.validate: {data['validate']!r} is none of read, lazy")
  if data.get("threads", 1) < 1:
    faults.append(f"data.threads: {data['threads']} must be at least 1")
  if not 0 <= data.get("max_bad_fraction", 0.0) <= 1:
    faults.append(f"data.max_bad_fraction: {data['max_bad_fraction']} is not in [0, 1]")
  if data.get("cache", "none") not in ("memory", "none"):
    if data.get("validate", "read") == "lazy":
      faults.append(
          f"data.cache: {data['cache']!r} is filled before step 1; it needs "
          "data.validate=read"
      )
    if "://" in data["cache"]:
      faults.append(f"data.cache: {data['cache']!r} must be a local folder")
  for key in ("max_records", "cache_bytes", "max_voxels"):
    if data.get(key, 0) < 0:
      faults.append(f"data.{key}: {data[key]} must not be negative")
  for key in ("canvas", "fov_mm", "spacing_mm"):
    if key in data and (len(data[key]) != 3 or min(data[key]) <= 0):
      faults.append(f"data.{key}: {data[key]} must be three numbers (Z, Y, X) above 0")
  if data.get("colour", "reject") not in ("reject", "luminance"):
    faults.append(f"data.colour: {data['colour']!r} is none of reject, luminance")
  fields = {f.name for f in dataclasses.fields(manifest_lib.Row)}
  for key in ("filters", "exclude", "stratify"):
    faults += [
        f"data.{key}: no field {field!r} of a recording; closest: "
        f"{_closest(field, fields)}"
        for field in data.get(key, ()) if field not in fields
    ]
  splits = data.get("splits", {})
  if not data.get("split_column"):
    shares = ", ".join(f"{k} {v}" for k, v in splits.items()) or "none"
    if "train" not in splits or min(splits.values()) <= 0:
      faults.append(f"data.splits: {shares}; needs train, and shares above 0")
    elif abs(sum(splits.values()) - 1) > 1e-6:
      faults.append(f"data.splits: {shares} add to {sum(splits.values()):g}, not 1")
  return faults


def _model_faults(plain: Mapping[str, Any]) -> list[str]:
  """Asks the backbone's own module what is wrong with its options."""
  package, _ = _PLACES["model"]
  options = {k: v for k, v in plain["model"].items() if k != "name"}
  module = importlib.import_module(f"{package}.{plain['model']['name']}")
  return [f"model.{fault}" for fault in module.model_faults(options)]


def _optimizer_faults(plain: Mapping[str, Any]) -> list[str]:
  """Names, ranges, and lengths against the run's as far as they are known."""
  options, faults = plain["optimizer"], []
  for name, known in (("schedule", SCHEDULES), ("learning_rate_scaling", SCALING)):
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
  falls = duration_key(options, "decay")
  if (options.get("schedule") == "wsd") != (falls is not None):
    faults.append(
        "optimizer.decay_steps (or _epochs, _percent): the length of the fall, to be "
        f"given with schedule 'wsd' and no other; schedule is "
        f"{options.get('schedule', 'cosine')!r}, decay {options.get(falls)}"
    )
  return faults + _fit_faults(options, plain["train"])


def _fit_faults(options: Mapping[str, Any], train: Mapping[str, Any]) -> list[str]:
  """Warm-up and decay against the run; a length that only the data tell is left."""
  keys = [k for k in (duration_key(options, s) for s in ("warmup", "decay")) if k]
  length = duration_key(train, "total")
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


def duration_key(section: Mapping[str, Any], stem: str) -> str | None:
  """Returns how a section spells a duration, such as "warmup_percent"."""
  found = (f"{stem}_{suffix}" for suffix in SUFFIXES)
  return next((key for key in found if section.get(key) is not None), None)


def _evaluation_faults(
    plain: Mapping[str, Any], device_count: int | None
) -> list[str]:
  """Splits and batches of evaluators; metrics that no evaluator gives."""
  evals, train, faults = plain["evals"], plain["train"], []
  splits = _split_names(plain["data"])
  for name, given in evals.items():
    parameters = inspect.signature(resolve("evals", given["type"])).parameters
    options = {k: p.default for k, p in parameters.items()} | given
    split, rows = options.get("split"), options.get("batch_size", device_count or 1)
    if split and splits is not None and split not in splits:
      faults.append(
          f"evals.{name}.split: {split!r} is no split of the data; they have "
          + ", ".join(splits)
      )
    if rows < 1 or rows % (device_count or 1):
      faults.append(
          f"evals.{name}.batch_size: {rows} must be a positive multiple of the "
          f"{device_count or 'number of'} device(s)"
      )
  types = sorted({options["type"] for options in evals.values()})
  for key, known in (
      ("best_metric", types), ("early_stop_metric", [*types, "validation"])
  ):
    metric = train.get(key, "")
    kind = metric.split(".")[0]
    if not metric or (key == "best_metric" and kind in ("loss", "validation")):
      continue  # the latter is refused for another reason
    if kind not in known:
      faults.append(
          f"train.{key}: {metric!r} comes from no evaluator of evals; they give "
          f"numbers of {', '.join(f'{k}.*' for k in known) or 'nothing'}"
      )
  return faults


def _split_names(data: Mapping[str, Any]) -> list[str] | None:
  """Returns the splits' names; None: in a column of a manifest not yet read."""
  if not data.get("split_column"):
    return list(data["splits"])
  _, _, corpus = data.get("manifest", "").partition("phantom:")
  if corpus not in PHANTOMS:
    return None
  return list(PHANTOMS[corpus].get("patients", phantoms.PATIENTS))


def _objective_faults(plain: Mapping[str, Any]) -> list[str]:
  """Asks the objective's own module what is wrong with its options."""
  name = plain["objective"]["name"]
  known = _parameters(resolve("objective", name))
  module = importlib.import_module(f"{_PLACES['objective'][0]}.{name}")
  return module.objective_faults(**{
      k: v for k, v in plain["objective"].items() if k in known and _stem(k) is None
  })


def _training_faults(
    plain: Mapping[str, Any], device_count: int | None
) -> list[str]:
  """Ranges, batch by accumulation and devices, the run's length."""
  train = plain["train"]
  faults = [f"train.{fault}" for fault in loop.option_faults(train)]
  batch, accum = train["batch_size"], train.get("accum", 1)
  lengths = [f"total_{s}" for s in SUFFIXES[:2] if f"total_{s}" in train]
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
  best = train.get("best_metric", "")
  if best and best.split(".")[0] in ("loss", "validation"):
    faults.append(
        f"train.best_metric {best!r}: the self-supervised loss does not say which "
        "checkpoint is best (it may rise while features improve); name a probe's "
        "number such as 'probe.accuracy', or '' for none"
    )
  return faults


def _mesh_faults(
    train: Mapping[str, Any], micro: int, device_count: int | None
) -> list[str]:
  data, fsdp = train.get("mesh_data", -1), train.get("mesh_fsdp", 1)
  faults = []
  if fsdp < 1 or (data < 1 and data != -1):
    return [
        f"train.mesh_data {data} x train.mesh_fsdp {fsdp}: must be positive, or -1 "
        "for mesh_data (all devices that are left)"
    ]
  if device_count and device_count % fsdp:
    faults.append(
        f"train.mesh_fsdp {fsdp}: does not divide the {device_count} device(s)"
    )
  elif device_count and data not in (-1, device_count // fsdp):
    faults.append(
        f"train.mesh_data {data} x train.mesh_fsdp {fsdp}: is not the number of "
        f"devices, {device_count}; -1 takes what is left"
    )
  shards = device_count or (data * fsdp if data > 0 else fsdp)
  if not faults and micro % shards:
    faults.append(
        f"train.batch_size: a micro-batch of {micro} rows does not divide over "
        f"{shards} device(s)"
    )
  return faults


def _parameters(unit: Callable[..., Any]) -> dict[str, bool]:
  """Returns {keyword: required} of a function, class or dataclass."""
  return {
      name: p.default is inspect.Parameter.empty
      for name, p in inspect.signature(unit).parameters.items()
      if p.kind is not inspect.Parameter.VAR_KEYWORD
  }


def _fields(module: type) -> list[str]:
  return [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]


def _without(keywords: Mapping[str, bool], *given: str) -> dict[str, bool]:
  return {k: v for k, v in keywords.items() if k not in given}


def _stem(key: str) -> str | None:
  stem, _, suffix = key.rpartition("_")
  return stem if suffix in SUFFIXES and stem else None


def _closest(name: str, known: Iterable[str]) -> str:
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
  return ", ".join(close or known)
