"""Names of facebookresearch/vjepa2 and facebookresearch/jepa checkpoints.

A published encoder comes out exactly in a `backbones.vit.ViT` with the reference's
heads and, where it has rotary positions, `rope_layout="vjepa2"`; a predictor in
the tree {embed, mask_tokens, stack, norm, proj} of the V-JEPA objective.
"""

from collections.abc import Mapping
import pathlib
import re
from typing import Any

import numpy as np

from vjepa_jax.interop import engine
from vjepa_jax.interop.engine import Rule

COMPONENTS = ("encoder", "predictor", "target_encoder")
# Rotary models carry a table that they never use; sin-cos models one that we
# compute. Neither is a parameter of ours.
IGNORED = ("pos_embed", "predictor_pos_embed")


def read(path: str | pathlib.Path) -> dict[str, engine.Arrays]:
  """Reads a .pt file into component -> {name without wrappers: array}.

  The components are those of COMPONENTS that the file holds.

  Raises:
    ValueError: if it holds none, or is not a safe torch file (`engine.read_torch`).
  """
  saved = engine.read_torch(path)
  found = saved if isinstance(saved, Mapping) else {}
  components = {
      name: strip(found[name]) for name in COMPONENTS if name in found
  }
  if not components:
    raise ValueError(
        f"{path} holds none of {', '.join(COMPONENTS)}; its entries are "
        f"{', '.join(map(str, list(found)[:8])) or type(saved).__name__}"
    )
  return components


def strip(state: Mapping[str, np.ndarray]) -> engine.Arrays:
  """Takes the wrappers `module.` and `backbone.` off the front of names."""
  return {re.sub(r"^(module\.|backbone\.)+", "", name): a for name, a in state.items()}


def encoder_table(
    patch: tuple[int, int, int, int],
    *,
    image: bool = False,
    swiglu: bool = False,
    learned: bool = False,
) -> tuple[Rule, ...]:
  """Returns the rules of an encoder, for a `ViT` of the same patch.

  Args:
    patch: (pt, pz, py, px) of ours; the kernel of a video is (pt * pz, py, px), so
      that its time may become our T or our Z.
    image: whether their patch embedding is 2-D.
    swiglu: whether the MLPs have three layers.
    learned: whether `pos_embed` is a parameter of ours.

  Raises:
    ValueError: if the patch has more axes than their kernel.
  """
  pt, pz, py, px = patch
  if min(pt, pz) > 1 or (image and max(pt, pz) > 1):
    raise ValueError(
        f"patch {patch}: a published {'image' if image else 'video'} kernel has "
        f"{'no' if image else 'one'} axis for T and Z"
    )
  kernel = (py, px) if image else (pt * pz, py, px)
  table = (
      Rule(
          "patch_embed.proj.weight", ("patch_embed/proj/kernel",),
          engine.patch_conv(kernel),
      ),
      Rule("patch_embed.proj.bias", ("patch_embed/proj/bias",), engine.SAME),
      *_block_rules("blocks", swiglu),
      *engine.norm("norm", "norm"),
  )
  if learned:
    table += (Rule("pos_embed", ("pos_embed",), engine.SAME),)
  return table


def predictor_table(*, swiglu: bool = False) -> tuple[Rule, ...]:
  """Returns the rules of a predictor {embed, mask_tokens, stack, norm, proj}."""
  return (
      *engine.linear("predictor_embed", "embed"),
      Rule("mask_tokens.{i}", ("mask_tokens",), engine.leading_ones(2)),
      *_block_rules("predictor_blocks", swiglu),
      *engine.norm("predictor_norm", "norm"),
      *engine.linear("predictor_proj", "proj"),
  )


def load_encoder(
    theirs: Mapping[str, np.ndarray],
    like: Any,
    patch: tuple[int, int, int, int],
    **options: bool,
) -> Any:
  """Returns a ViT's parameters filled from one component of `read`.

  Args:
    theirs: name -> array.
    like: parameters of the ViT, or their shapes (`jax.eval_shape` of its init).
    patch: the ViT's.
    **options: of `encoder_table`.

  Raises:
    ValueError: with the whole report, if anything has no counterpart.
  """
  ignore = () if options.get("learned") else IGNORED
  return engine.load(encoder_table(patch, **options), theirs, like, ignore=ignore)[0]


def load_predictor(
    theirs: Mapping[str, np.ndarray], like: Any, *, swiglu: bool = False
) -> Any:
  """Returns a predictor's parameters filled from one component of `read`.

  Raises:
    ValueError: with the whole report, if anything has no counterpart.
  """
  return engine.load(
      predictor_table(swiglu=swiglu), theirs, like, ignore=IGNORED
  )[0]


def _block_rules(blocks: str, swiglu: bool) -> tuple[Rule, ...]:
  theirs, ours = f"{blocks}.{{i}}", "stack/blocks"
  layers = ("fc1", "fc2", "fc3") if swiglu else ("fc1", "fc2")
  return (
      *engine.norm(f"{theirs}.norm1", f"{ours}/norm1"),
      *engine.attention(
          f"{theirs}.attn.qkv", f"{theirs}.attn.proj", f"{ours}/attn"
      ),
      *engine.norm(f"{theirs}.norm2", f"{ours}/norm2"),
      *(
          rule for name in layers
          for rule in engine.linear(f"{theirs}.mlp.{name}", f"{ours}/mlp/{name}")
      ),
  )
