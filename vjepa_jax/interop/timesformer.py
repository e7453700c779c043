"""Names of TimeSformer checkpoints, facebookresearch's and Hugging Face's.

A published model comes out exactly in a `backbones.vt_former.VTFormer` with its
number of heads, its patch as (1, 1, py, px), `class_position=True` and
`table_resize="nearest"`; T is the movie's time, Z is 1. Its head is left to the
caller, who finds it under "head" (`read`).
"""

from collections.abc import Mapping
import pathlib
from typing import Any

import numpy as np

from vjepa_jax.interop import engine
from vjepa_jax.interop.engine import Layout, Rule

# [1, 1 + n, D], the class token's position in front
_POSITIONS = Layout(
    load=lambda array, shapes: (array[:, :1], array[0, 1:]),
    save=lambda ours: np.concatenate([ours[0], ours[1][None]], axis=1),
)
# Our branch -> facebookresearch's names, Hugging Face's.
_NAMES = {
    "norm1": ("norm1", "layernorm_before"),
    "attn": (
        ("attn.qkv", "attn.proj"),
        ("attention.attention.qkv", "attention.output.dense"),
    ),
    "time_norm": ("temporal_norm1", "temporal_layernorm"),
    "time_attn": (
        ("temporal_attn.qkv", "temporal_attn.proj"),
        ("temporal_attention.attention.qkv", "temporal_attention.output.dense"),
    ),
    "time_proj": ("temporal_fc", "temporal_dense"),
    "norm2": ("norm2", "layernorm_after"),
    "mlp/fc1": ("mlp.fc1", "intermediate.dense"),
    "mlp/fc2": ("mlp.fc2", "output.dense"),
}


def read(path: str | pathlib.Path) -> dict[str, engine.Arrays]:
  """Reads a .pyth file, or a Hugging Face folder or .safetensors file.

  Returns:
    "encoder" and, where there is one, "head": {name without wrappers: array}.

  Raises:
    ValueError: if it holds no TimeSformer.
  """
  path = pathlib.Path(path)
  if path.is_dir() or path.suffix == ".safetensors":
    state, wrapper, head = engine.read_safetensors(path), "timesformer.", "classifier."
  else:
    saved = engine.read_torch(path)
    saved = saved if isinstance(saved, Mapping) else {}
    state, wrapper, head = saved.get("model_state", saved), "model.", "head."
  names = {name.removeprefix(wrapper): name for name in state}
  encoder = {k: state[v] for k, v in names.items() if not k.startswith(head)}
  if not any(name.endswith("cls_token") for name in encoder):
    raise ValueError(
        f"{path} holds no TimeSformer; its entries are {', '.join(list(state)[:8])}"
    )
  found = {k.removeprefix(head): state[v] for k, v in names.items() if k not in encoder}
  return {"encoder": encoder, "head": found} if found else {"encoder": encoder}


def encoder_table(
    patch: tuple[int, int, int, int], *, hugging_face: bool = False
) -> tuple[Rule, ...]:
  """Returns the rules of an encoder, of whatever `space_time`.

  Args:
    patch: (1, 1, py, px).
    hugging_face: whose names.

  Raises:
    ValueError: if the patch is not one of frames.
  """
  if tuple(patch[:2]) != (1, 1):
    raise ValueError(f"patch {patch}: TimeSformer's are of one frame, (1, 1, py, px)")
  side = int(hugging_face)
  prefix = ("", "embeddings.")[side]
  embed = ("patch_embed.proj", "embeddings.patch_embeddings.projection")[side]
  theirs = ("blocks.{i}", "encoder.layer.{i}")[side]
  rules = [
      Rule(
          f"{embed}.weight", ("patch_embed/proj/kernel",), engine.patch_conv(patch[2:])
      ),
      Rule(f"{embed}.bias", ("patch_embed/proj/bias",), engine.SAME),
      Rule(f"{prefix}cls_token", ("cls",), engine.SAME),
      Rule(
          ("pos_embed", "embeddings.position_embeddings")[side],
          ("cls_position", "positions/space"), _POSITIONS,
      ),
      Rule(
          ("time_embed", "embeddings.time_embeddings")[side], ("positions/time",),
          engine.leading_ones(1),
      ),
      *engine.norm(("norm", "layernorm")[side], "norm"),
  ]
  for ours, names in _NAMES.items():
    place, name = f"stack/blocks/{ours}", names[side]
    if ours.endswith("attn"):
      rules += engine.attention(f"{theirs}.{name[0]}", f"{theirs}.{name[1]}", place)
    else:
      kind = engine.norm if "norm" in ours else engine.linear
      rules += kind(f"{theirs}.{name}", place)
  return tuple(rules)


def load_encoder(
    theirs: Mapping[str, np.ndarray], like: Any, patch: tuple[int, int, int, int]
) -> Any:
  """Returns a VT-Former's parameters filled from "encoder" of `read`.

  Args:
    theirs: name -> array.
    like: parameters of the VT-Former, or their shapes (`jax.eval_shape` of its init).
    patch: the VT-Former's.

  Raises:
    ValueError: with the whole report, if anything has no counterpart.
  """
  hugging_face = any(name.startswith("encoder.layer.") for name in theirs)
  table = encoder_table(patch, hugging_face=hugging_face)
  return engine.load(table, theirs, like)[0]
