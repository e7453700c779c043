"""Pre-training of transformers on 3-D and 4-D biomedical recordings, in JAX.

  build(preset)  a backbone to use in Python
  load(workdir)  the encoders of a run
  data.read(path)  one recording

`build` and `load` import jax when they are called, so that data workers start
without it.
"""

import dataclasses
import functools
from typing import Any

from vjepa_jax import data

__all__ = ["Encoders", "build", "data", "load"]


def build(preset: str, *, backbone: str = "vit", **overrides: Any) -> Any:
  """Builds a backbone of a published size.

    model = vjepa_jax.build("base", patch=(1, 4, 16, 16), class_token=True)
    variables = model.init(jax.random.key(0), volume)  # [B, T, Z, Y, X, C]
    features = model.apply(variables, volume)  # .tokens [B, N, D], .cls, .pooled

  Args:
    preset: a name of the backbone's PRESETS, such as "tiny" or "base".
    backbone: "vit", or "vt_former" for volumes in time.
    **overrides: attributes of `backbones.vit.ViT` or `backbones.vt_former.VTFormer`.

  Returns:
    A linen module; see `backbones.base.Backbone`.

  Raises:
    ValueError: for an unknown backbone, preset or attribute; names the closest.
  """
  from vjepa_jax.backbones import vit, vt_former

  known = {"vit": vit, "vt_former": vt_former}
  if backbone not in known:
    raise ValueError(f"backbone {backbone!r} is none of {', '.join(known)}")
  return known[backbone].build(preset, **overrides)


@dataclasses.dataclass(frozen=True)
class Encoders:
  """The encoders of a run.

  Attributes:
    backbone: their common architecture.
    params: {"context": the one that was trained} and, where the run has one, of
      V-JEPA, {"target": its moving average}.
    config: of the run.
    step: of the checkpoint.
  """

  backbone: Any
  params: dict[str, Any]
  config: dict[str, Any]
  step: int

  @property
  def best(self) -> Any:
    """Parameters to use: of the moving average where there is one."""
    return self.params["target" if "target" in self.params else "context"]

  def features(
      self, volume: Any, *, encoder: str | None = None, spacing: Any = None
  ) -> Any:
    """Encodes volumes.

    Args:
      volume: float [B, T, Z, Y, X, C], normalised as in the run (z-score).
      encoder: "target" or "context"; None: `best`.
      spacing: float [B, 4], only for positions in mm.

    Returns:
      `backbones.base.Features`: tokens [B, N, D], cls [B, D] or None, pooled [B, D].

    Raises:
      KeyError: for an unknown encoder.
    """
    if encoder is not None and encoder not in self.params:
      raise KeyError(f"encoder {encoder!r} is none of {', '.join(self.params)}")
    params = self.best if encoder is None else self.params[encoder]
    return self._apply({"params": params}, volume, spacing=spacing)

  @functools.cached_property
  def _apply(self):
    """Compiled once a shape: jit of a bound method is new at each call."""
    import jax

    return jax.jit(self.backbone.apply)


def load(workdir: str, *, step: int | None = None, best: bool = False) -> Encoders:
  """Loads the encoders of a run.

  Args:
    workdir: of `python -m vjepa_jax.main`, local or `gs://`.
    step: of a checkpoint; None: the last.
    best: take the checkpoint that the probe chose, not the last.

  Raises:
    FileNotFoundError: if the folder is no run.
    WorkdirError: if its bucket refuses, or is out of reach.
    CheckpointError: if there is no such checkpoint, or it is damaged or does not fit.
  """
  import json

  import jax
  import jax.numpy as jnp

  from vjepa_jax import config as config_lib
  from vjepa_jax.train import checkpoint
  from vjepa_jax.train import workdir as workdir_lib

  folder = workdir_lib.open_path(workdir)
  content = workdir_lib.read_bytes(folder / "config.json")
  if content is None:
    raise FileNotFoundError(f"{folder} holds no config.json; it is no run's workdir")
  plain = json.loads(content)
  # Lengths move no parameter; a share of a long run is no 0.
  objective = config_lib.build_objective(plain, total_steps=10**6, steps_per_epoch=10**3)
  grid = config_lib.model_grid(plain)
  train = plain["train"]
  directory = train.get("checkpoint_dir") or str(folder / "checkpoints")
  checkpoints = checkpoint.Checkpoints(
      f"{directory}/best" if best else directory, keep=None, read_only=True,
      best_mode=train.get("best_mode", "max") if best else None,
  )
  found = step
  if step is None:
    found = checkpoints.best_step() if best else checkpoints.latest_step()
  if found is None:
    raise checkpoint.CheckpointError(f"{checkpoints.directory} holds no checkpoint")
  batch = {
      "volume": jnp.zeros((1, *grid.voxels, 1)), "spacing": jnp.ones((1, 4)),
      "_mask": jnp.ones(1), "_position": jnp.zeros(1, jnp.int32),
  }
  params, model_state = jax.eval_shape(objective.init, jax.random.key(0), batch)
  checkpoints.check(found)
  restored, _ = checkpoints.restore(
      found, {"params": params, "model_state": model_state}, partial=True
  )
  checkpoints.close()
  encoders = {"context": restored["params"]["encoder"]}
  if "target" in restored["model_state"]:
    encoders["target"] = restored["model_state"]["target"]
  return Encoders(objective.backbone, encoders, plain, found)
