"""What a run came to: report.json, its table, and the figure of its curves."""

from collections.abc import Mapping, Sequence
import json
import math
import os
from typing import Any

from absl import logging
from etils import epath

from vjepa_jax.report import figures as drawing

# Numbers of the probe and of the health evaluator that the report holds.
PROBES = (
    "intensity", "pixel_pca", "depth_profile", "minus_intensity", "context", "few",
    "device",
)
HEALTH = (
    "std", "rankme", "rankme_uncentred", "cosine", "std_foreground",
    "rankme_foreground", "cosine_foreground", "target_offset",
)
DEFAULT_BEST = "probe.accuracy"
# Evaluators whose numbers are reported one by one, as they were first and last.
FAMILIES = ("stage_probe", "stages", "reconstruction")

_LABELS = {
    "trained": "encoder, trained",
    "untrained": "encoder, untrained",
    "context": "online encoder, trained",
    "few": "encoder, few patients",
    "depth_profile": "depth profile",
    "pixel_pca": "pixel PCA",
    "intensity": "intensity statistics",
    "minus_intensity": "trained less intensity",
    "device": "device, decoded",
}


def summarize(
    metrics: Sequence[Mapping[str, Any]],
    data_report: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Sums up a run.

  Args:
    metrics: lines of metrics.jsonl, each with `step`.
    data_report: what the data said of itself (counts by device, reasons of
      loss); passed on as it is.
    config: of the run; `best_metric` and `best_mode` are looked for in it.

  Returns:
    steps; loss {first, last, min}; probe {trained, untrained and the rest of
    PROBES: {value, interval [low, high], step}, chance}; untrained is the encoder
    before the first step; health {HEALTH: {first, last}, alarms: how often the
    alarm rang}; best {step, metric, value} over trained steps; data. What was not
    measured is None: an untrained probe needs a line of step 0, a trained one a
    line of a later step. numbers: of the evaluators FAMILIES, name -> {first, last,
    and the last one's interval where it has one}.
  """
  history = sorted(metrics, key=lambda line: line["step"])
  trained = [line for line in history if line["step"] > 0]
  untrained = [line for line in history if line["step"] == 0]
  losses = drawing.series(history, "loss")[1]
  report = {
      "steps": max((line["step"] for line in history), default=None),
      "loss": None if not losses.size else {
          "first": float(losses[0]),
          "last": float(losses[-1]),
          "min": float(losses.min()),
      },
      "probe": {
          "trained": _scored(trained, "probe.accuracy"),
          "untrained": _scored(untrained, "probe.accuracy"),
          **{name: _scored(history, f"probe.{name}") for name in PROBES},
          "chance": _last(history, "probe.chance"),
      },
      "health": {name: _first_and_last(history, f"health.{name}") for name in HEALTH},
  }
  alarms = drawing.series(history, "health.alarm")[1]
  report["health"]["alarms"] = int(alarms.sum()) if alarms.size else None
  report["numbers"] = _numbers(history)
  report["best"] = _best(trained, config or {})
  report["data"] = dict(data_report) if data_report is not None else None
  return report


def write_report(
    workdir: str | os.PathLike[str],
    metrics: Sequence[Mapping[str, Any]],
    *,
    figures: bool = True,
) -> dict[str, Any]:
  """Writes report.json and figures/curves.png of a run.

  Reads data_report.json and config.json where they are there. Without matplotlib
  the figure is left out, and a line says so.

  Args:
    workdir: of the run, local or `gs://`.
    metrics: lines of its metrics.jsonl.
    figures: whether to draw.

  Returns:
    The report.
  """
  workdir = epath.Path(workdir)
  config = _read_json(workdir / "config.json")
  report = summarize(metrics, _read_json(workdir / "data_report.json"), config)
  text = json.dumps(_finite(report), indent=2) + "\n"
  _write(workdir / "report.json", text.encode())
  if figures and drawing.has_curves(metrics):
    try:
      image = drawing.curves(metrics, title=str((config or {}).get("name", "")))
      _write(workdir / "figures" / "curves.png", drawing.encode_png(image))
    except ImportError as error:
      logging.warning("figures/curves.png is not drawn: %s", error)
  return report


def format_report(report: Mapping[str, Any]) -> str:
  """Returns the report as a plain table for a terminal."""
  lines = [f"steps {report['steps']}"]
  if report["loss"]:
    loss = report["loss"]
    lines.append(
        f"loss  first {loss['first']:.4f}  last {loss['last']:.4f}  "
        f"lowest {loss['min']:.4f}"
    )
  probe, health = report["probe"], report["health"]
  rows = [(label, probe[key]) for key, label in _LABELS.items() if probe[key]]
  if rows:
    lines += ["", f"{'probe':<26}{'balanced accuracy':>18}   95 % over patients"]
    lines += [_probe_row(label, found) for label, found in rows]
    if probe["chance"] is not None:
      lines.append(f"{'chance':<26}{probe['chance']:>18.3f}")
  if report["numbers"]:
    lines += ["", f"{'evaluation':<42}{'first':>10}{'last':>10}   95 % of the last"]
    lines += [_number_row(name, found) for name, found in report["numbers"].items()]
  if found := [(key, health[key]) for key in HEALTH if health[key]]:
    lines += ["", f"{'target features':<26}{'first':>10}{'last':>10}"]
    lines += [f"{k:<26}{v['first']:>10.3f}{v['last']:>10.3f}" for k, v in found]
    if health["alarms"]:
      lines.append(f"COLLAPSE ALARM in {health['alarms']} evaluation(s)")
  if ((report["data"] or {}).get("clips") or {}).get("time_blocks"):
    lines += [
        "", "The splits share the movies (data.clip.time_blocks): neighbours in time are "
        "alike, so these numbers say little of other embryos.",
    ]
  lines += _data_lines(report["data"] or {})
  if report["best"]:
    best = report["best"]
    lines += ["", f"best {best['metric']} {best['value']:.3f} at step {best['step']}"]
  return "\n".join(lines)


def _data_lines(data: Mapping[str, Any]) -> list[str]:
  lines = []
  for title, key in (
      ("volumes by device", "device"),
      ("lost from the manifest", "lost"),
      ("quarantined", "quarantine"),
  ):
    if data.get(key):
      counts = ", ".join(f"{name} {count}" for name, count in data[key].items())
      lines.append(f"{title:<26}{counts}")
  return ["", *lines] if lines else []


def _probe_row(label: str, found: Mapping[str, Any]) -> str:
  low, high = found["interval"]
  interval = "" if low is None or high is None else f"   {low:.3f} .. {high:.3f}"
  return f"{label:<26}{found['value']:>18.3f}{interval}"


def _numbers(history) -> dict[str, dict[str, Any]]:
  """Returns name -> first, last and interval of the numbers of FAMILIES."""
  names = sorted(
      {
          key for line in history for key in line
          if key.split(".")[0] in FAMILIES and not key.endswith((".low", ".high"))
      },
      key=lambda name: (FAMILIES.index(name.split(".")[0]), name),
  )
  found = {}
  for name in names:
    if ends := _first_and_last(history, name):
      interval = _scored(history, name)["interval"]
      found[name] = {**ends, "interval": None if None in interval else interval}
  return found


def _number_row(name: str, found: Mapping[str, Any]) -> str:
  row = f"{name:<42}{found['first']:>10.4g}{found['last']:>10.4g}"
  if found["interval"]:
    row += "   {:.3f} .. {:.3f}".format(*found["interval"])
  return row


def _first_and_last(history, key: str) -> dict[str, float] | None:
  values = drawing.series(history, key)[1]
  if not values.size:
    return None
  return {"first": float(values[0]), "last": float(values[-1])}


def _last(history: Sequence[Mapping[str, Any]], key: str) -> float | None:
  values = drawing.series(history, key)[1]
  return float(values[-1]) if values.size else None


def _scored(history, metric: str) -> dict[str, Any] | None:
  steps, values = drawing.series(history, metric)
  if not values.size:
    return None
  # Of the same step, so that value and interval belong together.
  same = [line for line in history if line["step"] == steps[-1]]
  return {
      "value": float(values[-1]),
      "interval": [_last(same, f"{metric}.low"), _last(same, f"{metric}.high")],
      "step": int(steps[-1]),
  }


def _best(trained, config: Mapping[str, Any]) -> dict[str, Any] | None:
  metric = _find(config, "best_metric") or DEFAULT_BEST
  steps, values = drawing.series(trained, metric)
  if not values.size:
    return None
  lowest = _find(config, "best_mode") == "min"
  at = int(values.argmin() if lowest else values.argmax())
  return {"step": int(steps[at]), "metric": metric, "value": float(values[at])}


def _find(config: Mapping[str, Any], key: str) -> Any:
  """Returns config[key], at the top or in a section; None where there is none."""
  if key in config:
    return config[key]
  sections = [v for v in config.values() if isinstance(v, Mapping)]
  return next((v[key] for v in sections if key in v), None)


def _read_json(path: epath.Path) -> Any:
  return json.loads(path.read_text()) if path.exists() else None


def _write(path: epath.Path, content: bytes) -> None:
  """Writes a file of which no reader sees half; a bucket's objects come whole."""
  if "://" in str(path):
    path.write_bytes(content)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(content)
  os.replace(partial, path)


def _finite(value: Any) -> Any:
  """JSON has no NaN: a number that is not finite becomes null."""
  if isinstance(value, Mapping):
    return {key: _finite(found) for key, found in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(found) for found in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
