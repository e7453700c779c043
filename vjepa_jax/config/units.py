"""One builder a section: data, model and objective, optimiser, each its own keywords."""

from collections.abc import Callable, Mapping
import functools
import os
import pathlib
from typing import Any

from vjepa_jax.config import names
from vjepa_jax.data import phantom_embryos, phantoms, pipeline, storage
from vjepa_jax.train import optim, schedules
from vjepa_jax.volumes.grid import Grid

# Of numbers only these have a 0 that means "all"; others mean what they say.
_ALL_AT_0 = ("max_records", "train_participants")
# The embedded corpora, by what follows `phantom:` in data.manifest.
PHANTOMS = {
    "oct": {},
    "oct_tiny": dict(patients=dict(train=8, probe=12, validation=4), broken=3),
}
# The same of light-sheet movies.
EMBRYOS = {
    "worm": {},
    "worm_tiny": dict(
        embryos=dict(train=4, validation=2), frames=16, shape=(8, 16, 16)
    ),
}
SCALING = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}
SCHEDULES = ("cosine", "constant", "linear", "wsd")


def open_data(
    plain: Mapping[str, Any],
    *,
    quarantine: str | None = None,
    host: tuple[int, int] = (0, 1),
    say: Callable[[str], None] = print,
) -> pipeline.Data:
  """Opens the data section; `phantom:NAME` writes the embedded corpus first.

  Args:
    plain: the whole config; an empty value of the section means "not given".
    quarantine: file that bad recordings are listed in.
    host: (this host, hosts).
    say: gets a line now and then while data are read.
  """
  section = data_options(plain, say)

  def progress(done: int, total: int) -> None:
    if done == total or done % max(total // 4, 1) == 0:
      say(f"read {done} of {total} files")

  return pipeline.open_data(
      **section, seed=plain["seed"], quarantine=quarantine, host=host,
      progress=progress,
  )


def data_options(
    plain: Mapping[str, Any], say: Callable[[str], None] = print
) -> dict[str, Any]:
  """Returns the data section as keywords of `pipeline.open_data` and `plan`.

  `phantom:NAME` becomes the path of its manifest; the corpus is written if absent.
  `data.storage` is set for this process and those that it starts.
  """
  section = dict(plain["data"])
  given = {
      name: _source(own) for name, own in (section.pop("sources", None) or {}).items()
  }
  section = filled_in(section)
  # What is not given, or False, leaves the environment's own settings.
  storage.configure(**{k: v for k, v in section.pop("storage", {}).items() if v})
  if column := section.pop("split_column", ""):
    section["splits"] = column
  # A recording of fewer voxels than a patch would be made up by resampling.
  section.setdefault("min_size", tuple(plain["model"]["patch"][1:]))
  # Positions in mm of an unknown spacing would make every feature NaN.
  section["require_spacing"] = "mm" in (
      plain["model"].get("rope_units"), plain["model"].get("position_units"),
      (plain["objective"].get("predictor") or {}).get("rope_units"),
  )
  section["require_time_step"] = (
      section["require_spacing"] and model_grid(plain).dims[0] > 1
  )
  if given:
    section["sources"] = given
  for table in (section, *given.values()):
    if table.get("manifest", "").startswith("phantom:"):
      table["manifest"] = phantom_manifest(table["manifest"], say)
  return section


def _source(options: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a source says of itself: an empty tuple is its own value there."""
  kept = filled_in(options)
  return kept | {k: v for k, v in options.items() if v == () and k not in kept}


def filled_in(section: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a section without the keys whose value is empty, at any depth."""
  kept = {
      k: filled_in(v) if isinstance(v, Mapping) else v for k, v in section.items()
  }
  return {
      k: v for k, v in kept.items()
      if v not in ("", (), {}) and not (k in _ALL_AT_0 and v == 0)
  }


def phantom_splits(key: str) -> list[str]:
  """Returns the splits of the phantom corpus `phantom:KEY`."""
  if key in EMBRYOS:
    return list(EMBRYOS[key].get("embryos", phantom_embryos.EMBRYOS))
  return list(PHANTOMS[key].get("patients", phantoms.PATIENTS))


def phantom_manifest(name: str, say: Callable[[str], None] = print) -> str:
  """Writes the phantom corpus `phantom:NAME` into the cache, once.

  The cache is VJEPA_JAX_CACHE, or ~/.cache/vjepa_jax.

  Raises:
    KeyError: for an unknown name.
  """
  _, _, key = name.partition(":")
  if key in EMBRYOS:
    version = phantom_embryos.VERSION
    write = functools.partial(phantom_embryos.write_embryo_corpus, **EMBRYOS[key])
  elif key in PHANTOMS:
    version = phantoms.VERSION
    write = functools.partial(phantoms.write_oct_corpus, **PHANTOMS[key])
  else:
    known = [*PHANTOMS, *EMBRYOS]
    raise KeyError(f"data.manifest {name!r}: closest: {names.closest(key, known)}")
  home = os.environ.get("VJEPA_JAX_CACHE", "~/.cache/vjepa_jax")
  folder = pathlib.Path(home).expanduser() / f"{key}_phantoms_v{version}"
  if not folder.exists():
    say(f"writing the embedded corpus to {folder}")
  return str(write(folder))


def data_voxels(plain: Mapping[str, Any]) -> tuple[int, int, int, int]:
  """Returns (T, Z, Y, X) of what the data hold: one scan, or the frames of a clip."""
  clip = plain["data"].get("clip") or {}
  return (clip.get("frames", 1), *plain["data"]["canvas"])


def model_grid(plain: Mapping[str, Any]) -> Grid:
  """Returns the grid of tokens that the model sees.

  Raises:
    ValueError: if the model cannot be built, or cannot cut such volumes.
  """
  voxels = plain["augment"].get("crop") or data_voxels(plain)
  return build_model(plain).grid_of(tuple(voxels))


def build_model(plain: Mapping[str, Any]) -> Any:
  """Builds the backbone.

  Raises:
    ValueError: for options that it does not know.
  """
  section = {k: v for k, v in plain["model"].items() if k != "name"}
  return names.module_of("model", plain["model"]["name"]).build(**section)


def build_objective(
    plain: Mapping[str, Any], *, total_steps: int, steps_per_epoch: int
) -> Any:
  """Builds the objective and the backbone in it."""
  model = build_model(plain)
  unit = names.resolve("objective", plain["objective"]["name"])
  options = names.in_steps(
      {k: v for k, v in plain["objective"].items() if k != "name"},
      names.parameters(unit), total_steps=total_steps, steps_per_epoch=steps_per_epoch,
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
    layer_decay: float = 1.0,
    freeze: tuple[str, ...] = (),
    freeze_steps: int = 0,
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
    b1, b2, eps, clip_norm, decay, frozen, layer_decay, freeze, freeze_steps: see
      `optim.make_optimizer`.

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
      clip_norm=clip_norm, decay=decay, frozen=frozen, layer_decay=layer_decay,
      freeze=freeze, freeze_steps=freeze_steps,
  )
