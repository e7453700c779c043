"""What pre-training on embryos, labels and each choice of the model are worth.

python -m vjepa_jax.bench.embryos --folder=runs/embryos [--seeds=0,1,2] [--jobs=1]
  [--only=NAME,...] [-- --config.key=value ...]

Runs `configs/worm_mae.py:sample` and `configs/worm_stages.py:sample` for each seed and
variation in a process of its own, and prints a table of accuracy on held-out embryos
with 95 % intervals over embryos, then one JSON line. A run whose report is there
already is not made again; flags after `--` go to every run.
"""

from collections.abc import Iterable, Mapping
from concurrent import futures
import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

from absl import app, flags

_FOLDER = flags.DEFINE_string("folder", None, "Folder of all runs.", required=True)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of data order and draws.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time.")
_ONLY = flags.DEFINE_list("only", [], "Names of variations; default: all.")

PRETRAINED = "pretrained"
# The maximum projection, as a 2-D model sees it.
_FLAT = {
    "data.ops": (dict(name="project", axis="Z", how="max"),),
    "data.canvas": (1, 32, 32), "data.spacing_mm": (0.0352, 0.0018, 0.0018),
    "model.patch": (1, 1, 8, 8), "augment.flip": (0.0, 0.0, 0.5, 0.5),
}
# Brightness, contrast and gamma of few embryos are not those of others.
_SHADES = {
    "augment.brightness": 0.3, "augment.contrast": 0.3, "augment.gamma": 0.3,
    "train.total_steps": 400,
}
_FEW = {n: {"data.train_participants": n, **_SHADES} for n in (1, 3)}
_ONE_FRAME = {"data.clip.frames": 1, "objective.transition_weight": 0.0}


@dataclasses.dataclass(frozen=True)
class Variation:
  """One kind of fine-tuning.

  Attributes:
    says: what it is, for the table.
    tuned: whether it starts from the pre-trained encoder, or from drawn parameters.
    overrides: {key below `config`: value}.
  """

  says: str
  tuned: bool
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


VARIATIONS = {
    "tuned": Variation("fine-tuned, all labelled embryos", True),
    "scratch": Variation("from scratch, all", False),
    "tuned_3": Variation("fine-tuned, 3", True, _FEW[3]),
    "scratch_3": Variation("from scratch, 3", False, _FEW[3]),
    "tuned_1": Variation("fine-tuned, 1", True, _FEW[1]),
    "scratch_1": Variation("from scratch, 1", False, _FEW[1]),
    "no_transition": Variation(
        "fine-tuned, all, without the loss of transitions", True,
        {"objective.transition_weight": 0.0},
    ),
    "flat": Variation("from scratch, maximum projections (2-D)", False, _FLAT),
    "joint": Variation(
        "from scratch, joint attention", False, {"model.space_time": "joint"}
    ),
    "one_frame": Variation("from scratch, single time points", False, _ONE_FRAME),
    "flat_frame": Variation(
        "single maximum projections (2-D)", False, _FLAT | _ONE_FRAME
    ),
    "one_frame_cls": Variation(
        "single time points by a class token", False, _ONE_FRAME | {
            "model.class_token": True, "objective.labels": "label",
            "objective.head.pool": "cls",
        },
    ),
    "one_frame_3": Variation(
        "single time points of 3 embryos", False,
        _ONE_FRAME | {"data.train_participants": 3, "train.total_steps": 400},
    ),
    "leaky_3": Variation(
        "the same, tested on minutes between those of training", False, _ONE_FRAME | {
            "data.max_records": 3, "data.split_column": "", "data.clip.time_blocks": 8,
            "data.clip.gap": 0, "train.total_steps": 400,
        },
    ),
}


def command(
    variation: str, seed: int, folder: pathlib.Path, more: Iterable[str] = ()
) -> list[str]:
  """Returns the command line of a run.

  Args:
    variation: "pretrained", or a name of VARIATIONS.
    seed: of the run.
    folder: of all runs.
    more: further flags.

  Raises:
    KeyError: for an unknown variation.
  """
  config, flags_ = "worm_mae.py:sample", {"seed": seed}
  if variation != PRETRAINED:
    found = VARIATIONS[variation]
    config = f"worm_stages.py:sample{'' if found.tuned else ',scratch'}"
    flags_ |= found.overrides
    if found.tuned:
      flags_["train.start_from"] = str(run_folder(folder, PRETRAINED, seed))
  return [
      sys.executable, "-m", "vjepa_jax.main", f"--config=configs/{config}",
      f"--workdir={run_folder(folder, variation, seed)}",
      *(f"--config.{key}={value}" for key, value in flags_.items()), *more,
  ]


def run_folder(folder: pathlib.Path, variation: str, seed: int) -> pathlib.Path:
  """Returns the workdir of a run."""
  return folder / f"{variation}_seed{seed}"


def run(
    variation: str, seed: int, folder: pathlib.Path, more: Iterable[str] = ()
) -> dict[str, Any]:
  """Makes a run, or takes the report of one that is there.

  Returns:
    {number: {"first", "last", "interval"}} of `report.json`.

  Raises:
    RuntimeError: if the run fails; names its log.
  """
  workdir = run_folder(folder, variation, seed)
  report = workdir / "report.json"
  if not report.exists():
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "log.txt").open("a") as log:
      code = subprocess.call(
          command(variation, seed, folder, more), stdout=log, stderr=log
      )
    if code:
      raise RuntimeError(f"{variation}, seed {seed}: exit code {code}; see {log.name}")
  return json.loads(report.read_text())["numbers"]


def main(argv: list[str]) -> None:
  """Runs all that is asked for, then prints the tables and one JSON line."""
  seeds = [int(seed) for seed in _SEEDS.value]
  names = list(_ONLY.value or VARIATIONS)
  unknown = [name for name in names if name not in VARIATIONS]
  if unknown:
    raise app.UsageError(f"--only={unknown}: there are {', '.join(VARIATIONS)}")
  folder = pathlib.Path(_FOLDER.value)
  with futures.ThreadPoolExecutor(_JOBS.value) as pool:
    first = {
        seed: pool.submit(run, PRETRAINED, seed, folder, argv[1:]) for seed in seeds
    }

    def make(name, seed):
      if VARIATIONS[name].tuned:
        first[seed].result()  # Begun before: it is first in the queue.
      return run(name, seed, folder, argv[1:])

    later = {
        (name, seed): pool.submit(make, name, seed) for seed in seeds for name in names
    }
    found = {PRETRAINED: {seed: done.result() for seed, done in first.items()}}
    for (name, seed), done in later.items():
      found.setdefault(name, {})[seed] = done.result()
  print("\n".join([*probe_table(found[PRETRAINED]), "", *tuned_table(found)]))
  print(json.dumps({"name": "embryos", "runs": {
      name: {str(seed): numbers for seed, numbers in by_seed.items()}
      for name, by_seed in found.items()
  }}))


def probe_table(by_seed: Mapping[int, Mapping[str, Any]]) -> list[str]:
  """Returns lines of Markdown: the frozen features, and what needs no model."""
  counts = ("_1", "_3", "")
  lines = [
      "| seed | masked error over variance | labelled embryos | trained | untrained | "
      "intensity | radial |",
      "|---|---|---|---|---|---|---|",
  ]
  for seed, numbers in by_seed.items():
    error = numbers["reconstruction.error_over_variance"]["last"]
    for count in counts:
      own = numbers[f"stage_probe.accuracy{count}"]
      lines.append(
          f"| {seed} | {error:.3f} | {count.strip('_') or 'all'} | {_share(own)} | "
          f"{own['first']:.3f} | "
          f"{numbers[f'stage_probe.intensity{count}']['last']:.3f} | "
          f"{numbers[f'stage_probe.radial{count}']['last']:.3f} |"
      )
  return lines


def tuned_table(
    found: Mapping[str, Mapping[int, Mapping[str, Any]]]
) -> list[str]:
  """Returns lines of Markdown: accuracy and raw impossible transitions by seed."""
  lines = [
      "| run | accuracy, by seed (95 % over embryos) | raw impossible transitions |",
      "|---|---|---|",
  ]
  for name, variation in VARIATIONS.items():
    if name in found:
      numbers = found[name].values()
      shares = "; ".join(_share(n["stages.accuracy"]) for n in numbers)
      raw = ", ".join(f"{n['stages.impossible_raw']['last']:.0f}" for n in numbers)
      lines.append(f"| {variation.says} | {shares} | {raw} |")
  return lines


def _share(number: Mapping[str, Any]) -> str:
  text = f"{number['last']:.3f}"
  if number["interval"]:
    low, high = number["interval"]
    text += f" ({low:.3f} .. {high:.3f})"
  return text


if __name__ == "__main__":
  app.run(main)
