"""Names and durations: what the strings and numbers of a config stand for."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from typing import Any

import ml_collections

SUFFIXES = ("steps", "epochs", "percent")
# section -> (package, what a module of it offers)
PLACES = {
    "model": ("vjepa_jax.backbones", "Model"),
    "objective": ("vjepa_jax.objectives", "Objective"),
    "evals": ("vjepa_jax.evaluators", "Evaluator"),
}


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


def module_of(section: str, name: str) -> Any:
  """Returns the module `name` of a section's package; for names that resolve."""
  return importlib.import_module(f"{PLACES[section][0]}.{name}")


def resolve(section: str, name: str) -> Any:
  """Returns what the module `name` of a section offers.

  Raises:
    KeyError: for an unknown name; lists the closest.
  """
  package, attribute = PLACES[section]
  known = [
      m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__)
      if m.name != "base" and hasattr(importlib.import_module(f"{package}.{m.name}"), attribute)
  ]
  if name not in known:
    raise KeyError(f"{name!r} is none of {closest(name, known)}")
  return getattr(importlib.import_module(f"{package}.{name}"), attribute)


def as_plain(config: ml_collections.ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """Returns nested dicts without the placeholders that nobody filled."""
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  return {
      key: as_plain(value) if isinstance(value, Mapping) else value
      for key, value in config.items()
      if value is not None
  }


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


def duration_key(section: Mapping[str, Any], stem: str) -> str | None:
  """Returns how a section spells a duration, such as "warmup_percent"."""
  found = (f"{stem}_{suffix}" for suffix in SUFFIXES)
  return next((key for key in found if section.get(key) is not None), None)


def in_steps(
    section: Mapping[str, Any],
    keywords: Iterable[str],
    *,
    total_steps: int,
    steps_per_epoch: int,
) -> dict[str, Any]:
  """Returns a section with every duration rewritten as the unit's `*_steps`."""
  result = {k: v for k, v in section.items() if stem_of(k) is None}
  for stem in {stem_of(k) for k in section} - {None}:
    if f"{stem}_steps" in keywords:
      result[f"{stem}_steps"] = duration(
          section, stem, total_steps=total_steps, steps_per_epoch=steps_per_epoch
      )
    else:
      result.update({k: v for k, v in section.items() if stem_of(k) == stem})
  return result


def stem_of(key: str) -> str | None:
  stem, _, suffix = key.rpartition("_")
  return stem if suffix in SUFFIXES and stem else None


def parameters(unit: Callable[..., Any]) -> dict[str, bool]:
  """Returns {keyword: required} of a function, class or dataclass."""
  return {
      name: p.default is inspect.Parameter.empty
      for name, p in inspect.signature(unit).parameters.items()
      if p.kind is not inspect.Parameter.VAR_KEYWORD
  }


def fields(module: type) -> list[str]:
  return [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]


def without(keywords: Mapping[str, bool], *given: str) -> dict[str, bool]:
  return {k: v for k, v in keywords.items() if k not in given}


def told_as(options: Mapping[str, Any]) -> str:
  """Returns what the names of an evaluator's numbers begin with."""
  return options.get("prefix") or options["type"]


def closest(name: str, known: Iterable[str]) -> str:
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
  return ", ".join(close or known)
