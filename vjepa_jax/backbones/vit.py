"""Vision transformer over volumes: flat, pre-norm, any grid, any channels.

Sizes and initial weights are V-JEPA 2's (Assran et al. 2025, arXiv:2506.09985;
facebookresearch/vjepa2, src/models/vision_transformer.py). Different on purpose:
heads are 128 wide where the width allows it, rotary positions are true rotations,
masked patches are left out before the embedding and not after.
"""

from collections.abc import Mapping
import difflib
from types import MappingProxyType
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.backbones.base import Features
from vjepa_jax.nn import blocks
from vjepa_jax.nn import positions as positions_lib
from vjepa_jax.nn.patch_embed import PatchEmbed
from vjepa_jax.volumes.grid import Grid

POSITIONS = ("rope", "sincos", "flat", "learned", "none")

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "tiny": dict(width=192, depth=12),
    "small": dict(width=384, depth=12),
    "base": dict(width=768, depth=12),
    "large": dict(width=1024, depth=24),
    "huge": dict(width=1280, depth=32),
    "giant": dict(width=1408, depth=40, mlp_ratio=48 / 11),
})
# What published weights have: build("base", heads=REFERENCE_HEADS["base"]).
REFERENCE_HEADS: Mapping[str, int] = MappingProxyType(
    dict(tiny=3, small=6, base=12, large=16, huge=16, giant=22)
)


class ViT(nn.Module):
  """A `Backbone`: cut, embed the kept patches, add positions, blocks, norm.

  With `mutable=["intermediates"]`, `apply` also gives "embedded" (the kept
  patches with their fixed or learned positions), "blocks" [depth, B, N, D] and
  "normed"; the last two include the class token where there is one.

  Attributes:
    width: D.
    depth: number of blocks.
    patch: (pt, pz, py, px) voxels of one token.
    heads: H; None: 128 wide where D allows it (`blocks.default_heads`).
    mlp_ratio, swiglu, drop_path, attention, attention_chunk, remat, unroll,
      initializer: see `blocks.Stack`.
    positions: "rope", "sincos" (fixed), "flat" (fixed, of the row of tokens:
      VideoMAE's), "learned" or "none".
    rope_layout, rope_base, rope_units, rope_reference: see `positions.rope`.
    table_voxels: (T, Z, Y, X) of the volumes that the fixed or learned table is
      made for, resampled for others; None: a table of the volume at hand.
    class_token: whether a learned token, without a place, is put in front and
      returned as `Features.cls`.
    final_norm: whether the blocks are followed by a norm.
    eps: of all norms.
    biases: of the attention's projections, see `attention.MultiHeadAttention`.
    dtype: compute type; parameters, norms, softmax and the returned tokens are
      float32.
  """

  width: int
  depth: int
  patch: tuple[int, int, int, int]
  heads: int | None = None
  mlp_ratio: float = 4.0
  swiglu: bool = False
  positions: str = "rope"
  rope_layout: str = "rotation"
  rope_base: float = 10000.0
  rope_units: str = "index"
  rope_reference: tuple[float, float, float, float] | None = None
  table_voxels: tuple[int, int, int, int] | None = None
  class_token: bool = False
  drop_path: float = 0.0
  attention: str = "xla"
  attention_chunk: int = 512
  remat: str = "none"
  unroll: int = 1
  dtype: str = "float32"
  initializer: str = "vjepa"
  final_norm: bool = True
  eps: float = 1e-6
  biases: str = "qkv"

  def grid_of(self, voxels: tuple[int, ...]) -> Grid:
    """Returns the tokens of volumes of (T, Z, Y, X) voxels.

    Raises:
      ValueError: if the patch does not divide them.
    """
    return Grid(tuple(voxels), tuple(self.patch))

  @nn.compact
  def __call__(
      self,
      volume: jax.Array,
      *,
      keep_ids: jax.Array | None = None,
      keep_valid: jax.Array | None = None,
      spacing: jax.Array | None = None,
      train: bool = False,
  ) -> Features:
    """Encodes a volume, or only the kept tokens of it; see `base.Backbone`.

    Raises:
      ValueError: if the volume is not [B, T, Z, Y, X, C], its axes are no
        multiples of the patch, keep_ids and keep_valid do not fit it, or an
        attribute is not known.
    """
    self._check(volume, keep_ids, keep_valid)
    capture = self.is_mutable_collection("intermediates")
    grid = self.grid_of(volume.shape[1:5])
    patches = grid.patchify(volume)
    if keep_ids is not None:
      patches = jnp.take_along_axis(patches, keep_ids[..., None], axis=1)
    x = PatchEmbed(
        self.width, dtype=self.dtype, initializer=self.initializer, name="patch_embed"
    )(patches)
    x = self._add_table(x, grid, keep_ids)
    self.sow("intermediates", "embedded", x)
    rope = self._rope(grid, keep_ids, spacing)
    if self.class_token:
      x, rope, keep_valid = self._prepend(x, rope, keep_valid)
    x = self._stack()(
        x, rope=rope, key_valid=keep_valid, train=train, capture=capture,
        class_tokens=int(self.class_token),
    )
    if capture:
      x, outputs = x
      self.sow("intermediates", "blocks", outputs)
    if self.final_norm:
      x = blocks.layer_norm("norm", self.eps)(x)
    x = x.astype(jnp.float32)
    self.sow("intermediates", "normed", x)
    cls = None
    if self.class_token:
      cls, x = x[:, 0], x[:, 1:]
    return Features(tokens=x, grid=grid, ids=keep_ids, cls=cls)

  def _check(self, volume, keep_ids, keep_valid):
    if self.positions not in POSITIONS:
      nearest = difflib.get_close_matches(str(self.positions), POSITIONS, 3, 0.0)
      raise ValueError(
          f"ViT positions={self.positions!r} is not known; the closest: "
          f"{', '.join(nearest)}"
      )
    if volume.ndim != 6:
      raise ValueError(
          f"ViT: volume has shape {tuple(volume.shape)}, it must be [B, T, Z, Y, X, C]"
      )
    if keep_ids is None and keep_valid is not None:
      raise ValueError("ViT: keep_valid without keep_ids; it marks padding in those")
    rows = volume.shape[0]
    for name, value in (("keep_ids", keep_ids), ("keep_valid", keep_valid)):
      if value is None:
        continue
      if value.ndim != 2 or value.shape[0] != rows or value.shape != keep_ids.shape:
        raise ValueError(
            f"ViT: {name} has shape {tuple(value.shape)}, it must be [{rows}, K] "
            "with one K for keep_ids and keep_valid"
        )

  def _stack(self) -> blocks.Stack:
    return blocks.Stack(
        width=self.width, depth=self.depth, heads=self._heads(),
        mlp_ratio=self.mlp_ratio, swiglu=self.swiglu, drop_path=self.drop_path,
        attention=self.attention, attention_chunk=self.attention_chunk,
        remat=self.remat, unroll=self.unroll, dtype=self.dtype,
        initializer=self.initializer, eps=self.eps, biases=self.biases, name="stack",
    )

  def _heads(self) -> int:
    return blocks.default_heads(self.width, self.heads)

  def _rope(self, grid, keep_ids, spacing) -> positions_lib.Rope | None:
    if self.positions != "rope":
      return None
    return positions_lib.rope(
        grid, keep_ids, self.width // self._heads(), layout=self.rope_layout,
        base=self.rope_base, units=self.rope_units, reference=self.rope_reference,
        spacing=spacing,
    )

  def _add_table(self, x, grid, keep_ids):
    """Adds the fixed or learned table at the tokens' places."""
    if self.positions not in ("sincos", "flat", "learned"):
      return x
    made_for = grid
    if self.table_voxels is not None:
      made_for = Grid(tuple(self.table_voxels), tuple(self.patch))
    if self.positions == "sincos":
      table = jnp.asarray(
          positions_lib.sincos_table(made_for.dims, self.width), jnp.float32
      )
    elif self.positions == "flat":
      table = jnp.asarray(
          positions_lib.flat_sincos(made_for.tokens, self.width), jnp.float32
      )
    else:
      table = self._learned_table(made_for)
    if made_for.dims != grid.dims:
      table = positions_lib.resize_table(table, made_for.dims, grid.dims)
    table = table[None] if keep_ids is None else table[keep_ids]
    return x + table.astype(x.dtype)

  def _learned_table(self, grid):
    shape = (1, grid.tokens, self.width)
    if self.has_variable("params", "pos_embed"):
      found = self.get_variable("params", "pos_embed").shape
      if found != shape:
        raise ValueError(
            f"ViT: the learned positions are of {found[1]} tokens, the volume has "
            f"{grid.tokens} ({grid.dims}); set table_voxels to the size they were "
            "learned at to resample them"
        )
    return self.param("pos_embed", nn.initializers.normal(0.02), shape)[0]

  def _prepend(self, x, rope, valid):
    rows = x.shape[0]
    token = self.param("cls", nn.initializers.normal(0.02), (1, 1, self.width))
    token = jnp.broadcast_to(token.astype(x.dtype), (rows, 1, self.width))
    x = jnp.concatenate([token, x], axis=1)
    rope = None if rope is None else rope.prepend(1)
    if valid is not None:
      valid = jnp.concatenate([jnp.ones((rows, 1), bool), valid], axis=1)
    return x, rope, valid


Model = ViT


def model_faults(options: Mapping[str, Any]) -> list[str]:
  """Says what is wrong with the keywords of `build`; an empty list is well."""
  preset = options.get("preset")
  if preset not in PRESETS:
    nearest = difflib.get_close_matches(str(preset), PRESETS, 3, 0.0)
    return [f"preset {preset!r} is not known; the closest: {', '.join(nearest)}"]
  return blocks.stack_faults({**PRESETS[preset], **options}, positions=POSITIONS)


def build(preset: str, **overrides: Any) -> ViT:
  """Builds a ViT of a published size, e.g. build("base", patch=(1, 2, 16, 16)).

  Args:
    preset: a name in PRESETS.
    **overrides: attributes of `ViT`; patch is (1, 4, 16, 16) where not given.

  Raises:
    ValueError: for an unknown preset or attribute, with the closest names.
  """
  if preset not in PRESETS:
    nearest = difflib.get_close_matches(str(preset), PRESETS, 3, 0.0)
    raise ValueError(
        f"preset {preset!r} is not known; the closest: {', '.join(nearest)}"
    )
  known = [name for name in ViT.__dataclass_fields__ if name not in ("parent", "name")]
  for name in overrides:
    if name not in known:
      nearest = difflib.get_close_matches(name, known, 3, 0.0)
      raise ValueError(
          f"ViT has no attribute {name!r}; the closest: {', '.join(nearest)}"
      )
  return ViT(**{"patch": (1, 4, 16, 16), **PRESETS[preset], **overrides})
