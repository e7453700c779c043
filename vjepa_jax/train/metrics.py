"""Numbers and figures of a run, from (sum, weight) on the device to its workdir."""

from collections.abc import Callable, Iterable, Mapping
import contextlib
import json
import math
import os
import pathlib
import platform
import sys
from typing import Any
import uuid

from absl import logging
import cv2
import jax
import numpy as np
import tqdm

from vjepa_jax.train import workdir as workdir_lib

# What differs between two equal runs: a resume is not compared by these.
TIMING_KEYS = (
    "volumes_per_s", "tokens_per_s", "step_ms", "mfu", "data_wait", "peak_bytes",
    "compiles", "failed_saves",
)

Sums = dict[str, tuple[float, float]]


def merge(total: Sums, metrics: Mapping[str, tuple[Any, Any]]) -> Sums:
  """Adds one step's (sum, weight) pairs to a running total, in float64."""
  merged = dict(total)
  for name, (value, weight) in metrics.items():
    known, known_weight = merged.get(name, (0.0, 0.0))
    merged[name] = (known + float(value), known_weight + float(weight))
  return merged


def means(total: Sums) -> dict[str, float]:
  """Turns (sum, weight) into means; NaN where nothing weighed."""
  return {
      name: value / weight if weight else math.nan
      for name, (value, weight) in total.items()
  }


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns the lines of a run's metrics.jsonl; a last line cut short is left out.

  Args:
    workdir: local or `gs://`.

  Raises:
    WorkdirError: a bucket refuses, or is out of reach.
  """
  path = workdir_lib.open_path(workdir) / "metrics.jsonl"
  content = workdir_lib.read_bytes(path) or b""
  lines = []
  for number, text in enumerate(content.decode().splitlines(), start=1):
    try:
      lines.append(json.loads(text))
    except json.JSONDecodeError:
      logging.warning("%s: line %d is cut short; left out", path, number)
  return lines


def history(
    lines: Iterable[Mapping[str, Any]], name: str
) -> list[tuple[int, float]]:
  """Returns the (step, value) pairs of one name; null reads as NaN."""
  return [
      (line["step"], math.nan if line[name] is None else line[name])
      for line in lines
      if name in line
  ]


class Writer:
  """Writes a run's numbers and figures; on processes other than 0 it does nothing.

  metrics.jsonl gets one JSON object a call, figures/ the PNGs; beside them
  TensorBoard events and Weights & Biases where asked for, and on a terminal a bar.
  """

  def __init__(
      self,
      workdir: str | os.PathLike[str],
      *,
      restored_step: int = -1,
      broken: Mapping[str, Any] | None = None,
      total_steps: int | None = None,
      config: Mapping[str, Any] | None = None,
      tensorboard: bool = True,
      wandb: Mapping[str, Any] | None = None,
  ):
    """Opens the workdir and drops what lies beyond the restored step.

    Args:
      workdir: local folder, made where absent; `workdir.Files` for a bucket.
      restored_step: step of the checkpoint that the run resumes from; -1: none.
      broken: of `evaluate.Evaluations`, where that checkpoint has it: what was
        evaluated at that step and is no part of it is dropped as well.
      total_steps: length of the progress bar on a terminal; None: no bar.
      config: the experiment, for Weights & Biases.
      tensorboard: writes events (extra `tensorboard`; one message without it).
      wandb: keywords of wandb.init (project, entity, name, mode, ...); None: off.
    """
    self._active = jax.process_index() == 0
    self._events = self._wandb = self._bar = None
    self._pending, self._in_trouble = "", False
    if not self._active:
      return
    self.workdir = pathlib.Path(workdir)
    self.workdir.mkdir(parents=True, exist_ok=True)
    self._path = self.workdir / "metrics.jsonl"
    _drop_after(self._path, restored_step, broken)
    if total_steps is not None and sys.stderr.isatty():
      begin = max(restored_step, 0)
      self._bar = tqdm.tqdm(total=total_steps, initial=begin, unit="step")
    if tensorboard:
      self._events = _open_events(self.workdir, restored_step)
    if wandb is not None:
      self._wandb = _open_wandb(self.workdir, config or {}, wandb)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Appends one line; a value that is not finite is written as null."""
    if not self._active or not scalars:
      return
    scalars = {name: float(value) for name, value in scalars.items()}
    line = {
        name: value if math.isfinite(value) else None
        for name, value in scalars.items()
    }
    self._pending += json.dumps({"step": step, **line}) + "\n"
    if error := self._write_pending():
      if not self._in_trouble:
        self.say(
            f"step {step}: {self._path}: {error}; lines are kept in memory and written "
            "once there is room"
        )
    elif self._in_trouble:
      self.say(f"step {step}: {self._path}: written again, no line is lost")
    self._in_trouble = bool(error)
    if self._events:
      self._add_events(lambda events: [
          events.add_scalar(name.replace(".", "/"), value, step)
          for name, value in scalars.items()
      ])
    if self._wandb:
      self._wandb.log({"global_step": step, **scalars})

  def flush(self) -> None:
    """Returns once every line is in the file.

    Raises:
      OSError: it cannot be written.
    """
    if error := self._write_pending():
      raise error

  def figure(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes figures/NAME_STEP.png.

    Args:
      step: global step.
      name: of the figure; "." and "_" are kept.
      image: uint8 [H, W, 3], RGB.

    Raises:
      ValueError: the image has another shape or dtype.
    """
    if not self._active:
      return
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
      raise ValueError(
          f"figure {name!r}: wanted uint8 [H, W, 3], got {image.dtype} "
          f"{list(image.shape)}"
      )
    path = self.workdir / "figures" / f"{name}_{step:07d}.png"
    encoded = cv2.imencode(".png", image[..., ::-1])[1]
    try:
      workdir_lib.write_bytes(path, encoded.tobytes())
    except OSError as error:
      self.say(f"step {step}: a figure is not written: {error}")
    if self._events:
      self._add_events(lambda events: events.add_image(
          name.replace(".", "/"), image, step, dataformats="HWC"
      ))
    if self._wandb:
      import wandb  # pylint: disable=g-import-not-at-top

      self._wandb.log({"global_step": step, name: wandb.Image(image)})

  def artifact(self, path: str | os.PathLike[str], name: str) -> None:
    """Hands a complete checkpoint folder to Weights & Biases, if it is on."""
    if not self._active or not self._wandb:
      return
    import wandb  # pylint: disable=g-import-not-at-top

    artifact = wandb.Artifact(f"{name}-{self._wandb.id}", type="model")
    if "://" in str(path):
      artifact.add_reference(str(path), checksum=False)
    else:
      artifact.add_dir(str(path))
    self._wandb.log_artifact(artifact)

  def advance(self) -> None:
    """Counts one step on the bar."""
    if self._bar is not None:
      self._bar.update()

  def say(self, text: str) -> None:
    """Prints a line: above the bar on a terminal, plain elsewhere."""
    if not self._active:
      return
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    else:
      print(text, flush=True)

  def close(self) -> None:
    """Flushes everything."""
    if self._bar is not None:
      self._bar.close()
    if self._active and (error := self._write_pending()):
      self.say(f"{self._path}: the last lines are not written: {error}")
    if self._events:
      self._end_events() if self._in_trouble else self._events.close()
    if self._wandb:
      self._wandb.finish()

  def _write_pending(self) -> OSError | None:
    """Appends the lines that are not in the file yet: all of them, or none."""
    if not self._pending:
      return None
    size = self._path.stat().st_size if self._path.exists() else 0
    try:
      with self._path.open("a") as file:
        file.write(self._pending)
    except OSError as error:
      with contextlib.suppress(OSError):
        os.truncate(self._path, size)
      return error
    self._pending = ""
    return None

  def _add_events(self, add: Callable[[Any], Any]) -> None:
    """Hands numbers or an image to TensorBoard, until its file cannot be written."""
    worker = self._events.file_writer.event_writer._worker
    try:
      # Its thread ends at the first error, and handing over would then wait for ever.
      if not worker.is_alive():
        raise OSError("its thread has ended")
      add(self._events)
      self._events.flush()
    except OSError as error:
      self.say(f"{self.workdir}: no TensorBoard events from here on: {error}")
      self._end_events()

  def _end_events(self) -> None:
    """Lets go of TensorBoard without waiting for what cannot be written."""
    writer = self._events.file_writer.event_writer
    writer._event_queue.cancel_join_thread()
    writer._closed = True  # else it writes once more when the process ends
    self._events = None


def format_line(step: int, total_steps: int, scalars: Mapping[str, float]) -> str:
  """Writes a line for people: step 50/1000  loss 0.4312  lr 1e-04 ..."""
  return f"step {step}/{total_steps}  {format_scalars(scalars)}"


def format_scalars(scalars: Mapping[str, float], prefix: str = "") -> str:
  """Writes names, without a prefix that all share, and values with four digits.

  A value with NAME.low and NAME.high beside it is written as 0.5 (0.4 .. 0.6).
  """
  parts = []
  for name, value in scalars.items():
    if name.endswith((".low", ".high")):
      continue
    part = f"{name.removeprefix(prefix)} {value:.4g}"
    if f"{name}.low" in scalars:
      part += f" ({scalars[f'{name}.low']:.3g} .. {scalars[f'{name}.high']:.3g})"
    parts.append(part)
  return "  ".join(parts)


def system_info() -> dict[str, Any]:
  """Returns what the run stands on: devices, processes, versions."""
  device = jax.devices()[0]
  return {
      "device": device.device_kind, "platform": device.platform,
      "devices": jax.device_count(), "processes": jax.process_count(),
      "host": platform.node(), "python": platform.python_version(),
      "jax": jax.__version__, "cpus": os.cpu_count(),
  }


def _drop_after(
    path: pathlib.Path, step: int, broken: Mapping[str, Any] | None
) -> None:
  """Rewrites the file without what came after a checkpoint, all or nothing."""
  if not path.exists():
    return

  def belongs(line: Mapping[str, Any]) -> bool:
    if broken is None or line["step"] < broken["step"] or "loss" in line:
      return line["step"] <= step
    return line.keys() <= {"step", *broken["found"]}

  kept = [line for line in read(path.parent) if belongs(line)]
  replacement = path.with_suffix(".jsonl.tmp")
  replacement.write_text("".join(json.dumps(line) + "\n" for line in kept))
  os.replace(replacement, path)


def _open_events(workdir: pathlib.Path, restored_step: int):
  try:
    import tensorboardX  # pylint: disable=g-import-not-at-top
  except ImportError:
    print(
        "no TensorBoard events: tensorboardX is not installed "
        "(pip install 'vjepa_jax[tensorboard]'); metrics.jsonl has the same numbers"
    )
    return None
  # Room for all of a step: what is full makes the loop wait.
  return tensorboardX.SummaryWriter(
      str(workdir), purge_step=restored_step + 1, max_queue=1000
  )


def _open_wandb(
    workdir: pathlib.Path, config: Mapping[str, Any], options: Mapping[str, Any]
):
  """Starts a run, or goes on with the one whose id the workdir holds."""
  try:
    import wandb  # pylint: disable=g-import-not-at-top
  except ImportError as error:
    raise ImportError(
        "wandb was asked for and is not installed: pip install 'vjepa_jax[wandb]'"
    ) from error
  id_file = workdir / "wandb_id.txt"
  if not id_file.exists():
    id_file.write_text(uuid.uuid4().hex[:8])
  run = wandb.init(
      dir=str(workdir), id=id_file.read_text().strip(), resume="allow",
      config={**config, "system": system_info()}, **options,
  )
  # Its own counter would refuse the steps that a resumed run repeats.
  run.define_metric("global_step")
  run.define_metric("*", step_metric="global_step")
  return run
