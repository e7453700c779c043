"""Names of VideoMAE checkpoints in Hugging Face's files.

A published encoder comes out exactly in a `backbones.vit.ViT` with its number of
heads, `positions="flat"`, `final_norm=False`, `eps=1e-12` and `biases="qv"` (or "");
a decoder in that of the masked autoencoder with `positions="flat"`, the same `eps`
and `biases`, and `norm_eps=1e-5`.
"""

from collections.abc import Mapping
import pathlib
from typing import Any

import numpy as np

from vjepa_jax.interop import engine
from vjepa_jax.interop.engine import Rule

_ENCODER, _DECODER = "videomae.", ("decoder.", "encoder_to_decoder.", "mask_token")


def read(path: str | pathlib.Path) -> dict[str, engine.Arrays]:
  """Reads a folder or .safetensors file into part -> {name: array}.

  The parts are "encoder", without their wrapper; "decoder", of pre-training; and
  "head", of classification ("fc_norm.*", "classifier.*"); those that there are.

  Raises:
    ValueError: if it holds no VideoMAE.
  """
  parts = {"encoder": {}, "decoder": {}, "head": {}}
  for name, array in engine.read_safetensors(path).items():
    part = "head"
    if name.startswith(_ENCODER):
      part = "encoder"
    elif name.startswith(_DECODER):
      part = "decoder"
    parts[part][name.removeprefix(_ENCODER)] = array
  if not parts["encoder"]:
    entries = ", ".join(list(parts["head"])[:8])
    raise ValueError(f"{path} holds no VideoMAE; its entries are {entries}")
  return {part: arrays for part, arrays in parts.items() if arrays}


def encoder_table(patch: tuple[int, int, int, int]) -> tuple[Rule, ...]:
  """Returns the rules of an encoder, for a `ViT` of the same patch.

  Args:
    patch: (pt, pz, py, px) of ours, of which pt or pz is 1; their kernel is
      (pt * pz, py, px).

  Raises:
    ValueError: if the patch has more axes than their kernel.
  """
  pt, pz, py, px = patch
  if min(pt, pz) > 1:
    raise ValueError(f"patch {patch}: a published kernel has one axis for T and Z")
  embed = "embeddings.patch_embeddings.projection"
  return (
      Rule(
          f"{embed}.weight", ("patch_embed/proj/kernel",),
          engine.patch_conv((pt * pz, py, px)),
      ),
      Rule(f"{embed}.bias", ("patch_embed/proj/bias",), engine.SAME),
      *_block_rules("encoder.layer"),
  )


def decoder_table() -> tuple[Rule, ...]:
  """Returns the rules of a decoder {embed, mask_token, stack, norm, head}."""
  return (
      Rule("encoder_to_decoder.weight", ("embed/kernel",), engine.LINEAR),
      Rule("mask_token", ("mask_token",), engine.leading_ones(2)),
      *_block_rules("decoder.decoder_layers"),
      *engine.norm("decoder.norm", "norm"),
      *engine.linear("decoder.head", "head"),
  )


def load_encoder(
    theirs: Mapping[str, np.ndarray], like: Any, patch: tuple[int, int, int, int]
) -> Any:
  """Returns a ViT's parameters filled from "encoder" of `read`.

  Args:
    theirs: name -> array.
    like: parameters of the ViT, or their shapes (`jax.eval_shape` of its init).
    patch: the ViT's.

  Raises:
    ValueError: with the whole report, if anything has no counterpart.
  """
  return engine.load(encoder_table(patch), theirs, like)[0]


def load_decoder(theirs: Mapping[str, np.ndarray], like: Any) -> Any:
  """Returns a decoder's parameters filled from "decoder" of `read`.

  Raises:
    ValueError: with the whole report, if anything has no counterpart.
  """
  return engine.load(decoder_table(), theirs, like)[0]


def _block_rules(stack: str) -> tuple[Rule, ...]:
  theirs, ours = f"{stack}.{{i}}", "stack/blocks"
  attention = f"{theirs}.attention.attention"
  out = f"{theirs}.attention.output.dense"
  return (
      *engine.norm(f"{theirs}.layernorm_before", f"{ours}/norm1"),
      *(
          Rule(
              f"{attention}.{name}.weight", (f"{ours}/attn/{name}/kernel",),
              engine.JOINED_LINEAR,
          )
          for name in ("query", "key", "value")
      ),
      # Files name what is called query.bias and value.bias in memory.
      *(
          Rule(
              f"{attention}.{name[0]}_bias", (f"{ours}/attn/{name}/bias",),
              engine.JOINED_BIAS,
          )
          for name in ("query", "value")
      ),
      Rule(f"{out}.weight", (f"{ours}/attn/out/kernel",), engine.OUT_LINEAR),
      Rule(f"{out}.bias", (f"{ours}/attn/out/bias",), engine.SAME),
      *engine.norm(f"{theirs}.layernorm_after", f"{ours}/norm2"),
      *engine.linear(f"{theirs}.intermediate.dense", f"{ours}/mlp/fc1"),
      *engine.linear(f"{theirs}.output.dense", f"{ours}/mlp/fc2"),
  )
