"""VT-Former: a transformer over volumes in time, with divided attention.

The blocks are TimeSformer's (Bertasius et al. 2021, arXiv:2102.05095), the sizes
those of the WormVT project. A frame is a volume [Z, Y, X], its n patches are its
places; tokens are [B, T, n, D] within the blocks and [B, T n, D] outside.
"""

from collections.abc import Mapping
import difflib
from types import MappingProxyType
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.backbones.base import Features
from vjepa_jax.nn import blocks, divided, placement, tables
from vjepa_jax.nn import positions as positions_lib
from vjepa_jax.nn.patch_embed import PatchEmbed
from vjepa_jax.volumes.grid import Grid

SPACE_TIME = ("divided", "joint", "space_only")
POSITIONS = ("learned", "sincos", "none")

# Parameters with one channel, TimeSformer's projection and learned positions; T, Z, Y,
# X are the voxels of the tables. Without the projection, D^2 + D a block less.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "tiny": dict(width=192, depth=4),
    "small": dict(width=512, depth=6),  # 28,907,520 at (16, 64, 256, 256)
    "base": dict(width=768, depth=12),  # 131,546,112 at (32, 96, 512, 512)
    "large": dict(width=1024, depth=12),  # 228,872,192 at (32, 96, 512, 512)
    "xlarge": dict(width=1024, depth=17),  # 307,601,408 at (16, 64, 256, 256)
    "huge": dict(width=1280, depth=18),  # 507,079,680 at (16, 64, 256, 256)
})
# What the project wrote down: build("small", heads=REFERENCE_HEADS["small"]).
REFERENCE_HEADS: Mapping[str, int] = MappingProxyType(
    dict(tiny=3, small=8, base=12, large=16, xlarge=16, huge=20)
)


class VTFormer(nn.Module):
  """A `Backbone`: cut, embed the kept patches, add positions, blocks, norm.

  With `mutable=["intermediates"]`, `apply` also gives "embedded" (the kept patches
  with their positions, [B, K, D]), "blocks" [depth, B, K, D] and, with a class token,
  "block_cls" [depth, B, 1, D] (of "space_only" [depth, B, T, D]).

  Attributes:
    width: D.
    depth: number of blocks.
    patch: (pt, pz, py, px) voxels of one token.
    heads: H; None: 128 wide where D allows it (`blocks.default_heads`).
    mlp_ratio: hidden width of the MLPs over D.
    space_time: "divided"; the baselines "joint" (every token sees every other) and
      "space_only" (every frame by itself).
    order, time_projection, zero_time: see `divided.DividedBlock`.
    class_token: whether a learned token is put in front and returned as
      `Features.cls`; of "space_only" the mean of the frames' own.
    class_position: whether that token has a position, as TimeSformer's.
    stride: (st, sz, sy, sx) of overlapping patches; None: they do not overlap. Such
      patches have no inverse, hence nothing can be reconstructed from them.
    pad: whether an axis that its patch does not divide gets zeros at its end;
      otherwise it is refused. `Features.grid.valid()` says what is real.
    positions: "learned" (a table of places and one of times), "sincos" (fixed; its
      channels are shared among the axes with more than one token, which must
      therefore stay the same from one use of the parameters to the next) or "none".
    position_units, position_reference: of "sincos": "index", a patch is a step; or
      "mm", a place is index * patch * spacing / reference, with (T, Z, Y, X) what
      counts as a step in s and mm: (60.0, 0.001, 0.001, 0.001) for minutes and um.
    table_voxels: (T, Z, Y, X) of the volumes that the learned tables are made for,
      resampled for others; None: the volume at hand.
    table_resize: how, "linear" or "nearest".
    drop_path, attention, attention_chunk, remat, unroll, initializer, eps: see
      `blocks.Stack`; drop-path drops whole clips.
    dtype: compute type; parameters, norms, softmax and the returned tokens are
      float32.
  """

  width: int
  depth: int
  patch: tuple[int, int, int, int]
  heads: int | None = None
  mlp_ratio: float = 4.0
  space_time: str = "divided"
  order: str = "time_first"
  time_projection: bool = True
  zero_time: bool = True
  class_token: bool = True
  class_position: bool = False
  stride: tuple[int, int, int, int] | None = None
  pad: bool = True
  positions: str = "learned"
  position_units: str = "index"
  position_reference: tuple[float, float, float, float] | None = None
  table_voxels: tuple[int, int, int, int] | None = None
  table_resize: str = "linear"
  drop_path: float = 0.0
  attention: str = "xla"
  attention_chunk: int = 512
  remat: str = "none"
  unroll: int = 1
  eps: float = 1e-6
  dtype: str = "float32"
  initializer: str = "vjepa"

  @property
  def rectangular(self) -> bool:
    """Whether all frames must keep the same places (`keep_places`)."""
    return self.space_time != "joint"

  def grid_of(self, voxels: tuple[int, ...]) -> Grid:
    """Returns the tokens of volumes of (T, Z, Y, X) voxels.

    Raises:
      ValueError: if the patch does not divide them and `pad` is off.
    """
    return Grid(tuple(voxels), tuple(self.patch), self.pad, self.stride)

  @nn.compact
  def __call__(
      self,
      volume: jax.Array,
      *,
      keep_ids: jax.Array | None = None,
      keep_valid: jax.Array | None = None,
      keep_places: jax.Array | None = None,
      spacing: jax.Array | None = None,
      train: bool = False,
  ) -> Features:
    """Encodes a volume, or only the kept tokens of it; see `base.Backbone`.

    Args:
      volume: float [B, T, Z, Y, X, C], normalised.
      keep_ids: int32 [B, K] token ids to keep; "joint" only.
      keep_valid: bool [B, K]; False marks padding in keep_ids.
      keep_places: int32 [B, k] places in (z, y, x), row-major, that every frame
        keeps; the features have t k tokens, frame by frame.
      spacing: float32 [B, 4] (dt, dz, dy, dx) in s and mm.
      train: whether drop-path draws (rng stream "drop_path").

    Raises:
      ValueError: if the volume is not [B, T, Z, Y, X, C], what is kept does not fit
        it or the kind of attention, or an attribute is not known.
    """
    self._check(volume, keep_ids, keep_valid, keep_places)
    grid = self.grid_of(volume.shape[1:5])
    volume = placement.constrain(volume, "batch", "tokens", *[None] * 4)
    patches, ids = self._kept(grid, grid.patchify(volume), keep_ids, keep_places)
    x = PatchEmbed(
        self.width, dtype=self.dtype, initializer=self.initializer, name="patch_embed"
    )(patches)
    x, cls = self._add_positions(
        x, self._class(len(x)), grid, ids, keep_places, spacing
    )
    self.sow("intermediates", "embedded", x)
    encode = self._joint if self.space_time == "joint" else self._divided
    x, cls = encode(x, cls, grid, keep_valid, train)
    norm = blocks.layer_norm("norm", self.eps)
    cls = None if cls is None else norm(cls.astype(jnp.float32).mean(axis=1))
    return Features(tokens=norm(x), grid=grid, ids=ids, cls=cls)

  def _check(self, volume, keep_ids, keep_valid, keep_places):
    faults = _name_faults({f: getattr(self, f) for f in _NAMES})
    if faults:
      raise ValueError(f"VTFormer: {'; '.join(faults)}")
    if volume.ndim != 6:
      raise ValueError(
          f"VTFormer: volume has shape {tuple(volume.shape)}, it must be "
          "[B, T, Z, Y, X, C]"
      )
    if keep_ids is not None and self.rectangular:
      raise ValueError(
          f"VTFormer: keep_ids with space_time={self.space_time!r}: its attention "
          "takes the same places of every frame; give keep_places=[B, k], or build "
          "it with space_time='joint'"
      )
    if keep_ids is not None and keep_places is not None:
      raise ValueError("VTFormer: keep_ids and keep_places; give one of them")
    if keep_ids is None and keep_valid is not None:
      raise ValueError(
          "VTFormer: keep_valid without keep_ids; it marks padding in those"
      )
    rows = volume.shape[0]
    for name, value in (
        ("keep_ids", keep_ids), ("keep_places", keep_places), ("keep_valid", keep_valid)
    ):
      wrong = value is not None and (value.ndim != 2 or value.shape[0] != rows)
      if wrong or (name == "keep_valid" and value is not None
                   and value.shape != keep_ids.shape):
        raise ValueError(
            f"VTFormer: {name} has shape {tuple(value.shape)}, it must be [{rows}, K]"
            f"{', as keep_ids' if name == 'keep_valid' else ''}"
        )

  def _kept(self, grid, patches, keep_ids, keep_places):
    """Returns the kept patches [B, K, P] and their ids, None for all."""
    if keep_ids is not None:
      return jnp.take_along_axis(patches, keep_ids[..., None], axis=1), keep_ids
    if keep_places is None:
      return patches, None
    frames = patches.reshape(len(patches), grid.dims[0], grid.places, -1)
    kept = jnp.take_along_axis(frames, keep_places[:, None, :, None], axis=2)
    starts = jnp.arange(grid.dims[0], dtype=keep_places.dtype)[:, None] * grid.places
    ids = starts + keep_places[:, None]  # [B, T, k]
    return kept.reshape(len(patches), -1, kept.shape[-1]), ids.reshape(len(ids), -1)

  def _class(self, rows):
    """The class token of each clip [B, 1, D], or None."""
    if not self.class_token:
      return None
    draw = nn.initializers.normal(0.02)
    token = self.param("cls", draw, (1, 1, self.width))
    if self.class_position:
      token = token + self.param("cls_position", draw, (1, 1, self.width))
    return jnp.broadcast_to(token, (rows, 1, self.width))

  def _add_positions(self, x, cls, grid, ids, places, spacing):
    if self.positions == "learned":
      made_for = self.table_voxels and self.grid_of(self.table_voxels).dims
      table = tables.SpaceTimeTable(
          self.width, made_for, self.table_resize,
          time=self.space_time != "space_only", name="positions",
      )(grid.dims, ids=ids if places is None else None, places=places)
      table = table[None] if ids is None else table
    elif self.positions == "sincos":
      table = positions_lib.sincos_at(
          positions_lib.coordinates(
              grid, ids, units=self.position_units,
              reference=self.position_reference, spacing=spacing,
          ),
          self.width,
      )
    else:
      return x, cls
    return x + table.astype(x.dtype), cls

  def _joint(self, x, cls, grid, valid, train):
    """Plain blocks over all tokens."""
    first = 0 if cls is None else cls.shape[1]
    tokens = x
    if first:
      tokens = jnp.concatenate([cls.astype(x.dtype), x], axis=1)
      if valid is not None:
        valid = jnp.pad(valid, ((0, 0), (first, 0)), constant_values=True)
    capture = self.is_mutable_collection("intermediates")
    tokens = blocks.Stack(**self._stack(), name="stack")(
        tokens, key_valid=valid, train=train, capture=capture, class_tokens=first
    )
    if capture:
      tokens, outputs = tokens
      self._sow(outputs[:, :, first:], outputs[:, :, :first] if first else None)
    return tokens[:, first:], tokens[:, :first] if first else None

  def _divided(self, x, cls, grid, valid, train):
    """Divided blocks, or the same without time."""
    rows, frames = len(x), grid.dims[0]
    divides = self.space_time == "divided"
    if cls is not None and not divides:
      cls = jnp.broadcast_to(cls, (rows, frames, self.width))
    capture = self.is_mutable_collection("intermediates")
    (x, cls), outputs = divided.DividedStack(
        **self._stack(), time=divides, order=self.order,
        time_projection=self.time_projection, zero_time=self.zero_time, name="stack",
    )(x.reshape(rows, frames, -1, self.width), cls, train=train, capture=capture)
    if capture:
      tokens, own = outputs
      self._sow(tokens.reshape(self.depth, rows, -1, self.width), own)
    return x.reshape(rows, -1, self.width), cls

  def _sow(self, tokens, cls):
    self.sow("intermediates", "blocks", tokens)
    if cls is not None:
      self.sow("intermediates", "block_cls", cls)

  def _stack(self):
    return dict(
        width=self.width, depth=self.depth,
        heads=blocks.default_heads(self.width, self.heads), mlp_ratio=self.mlp_ratio,
        drop_path=self.drop_path, attention=self.attention,
        attention_chunk=self.attention_chunk, remat=self.remat, unroll=self.unroll,
        eps=self.eps, dtype=self.dtype, initializer=self.initializer,
    )


Model = VTFormer

# attribute -> what it may be
_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "space_time": SPACE_TIME, "order": divided.ORDERS, "positions": POSITIONS,
    "position_units": positions_lib.UNITS, "table_resize": tables.RESIZES,
})


def model_faults(options: Mapping[str, Any]) -> list[str]:
  """Says what is wrong with the keywords of `build`; an empty list is well."""
  preset = options.get("preset")
  if preset not in PRESETS:
    return [_unknown("preset", preset, PRESETS)]
  options = {**PRESETS[preset], **options}
  faults = blocks.stack_faults(options, positions=POSITIONS) + [
      fault for fault in _name_faults(options) if not fault.startswith("positions ")
  ]
  units, reference = options.get("position_units"), options.get("position_reference")
  if units == "mm" and options.get("positions") != "sincos":
    faults.append(
        "position_units 'mm' is read by positions 'sincos' only, not "
        f"{options.get('positions', POSITIONS[0])!r}"
    )
  elif units == "mm" and (not reference or len(reference) != 4 or min(reference) <= 0):
    faults.append(
        "position_units 'mm' needs position_reference=(s, mm, mm, mm), positive: what "
        f"counts as one step along T, Z, Y, X; got {reference}"
    )
  elif units != "mm" and reference is not None:
    faults.append(
        f"position_reference {reference} is read with position_units 'mm' only"
    )
  return faults


def _name_faults(options: Mapping[str, Any]) -> list[str]:
  return [
      _unknown(name, options[name], known)
      for name, known in _NAMES.items()
      if options.get(name, known[0]) not in known
  ]


def build(preset: str, **overrides: Any) -> VTFormer:
  """Builds a VT-Former of a preset size, e.g. build("small", space_time="joint").

  Args:
    preset: a name in PRESETS.
    **overrides: attributes of `VTFormer`; patch is (1, 8, 16, 16) where not given.

  Raises:
    ValueError: for an unknown preset or attribute, with the closest names.
  """
  if preset not in PRESETS:
    raise ValueError(_unknown("preset", preset, PRESETS))
  known = [
      name for name in VTFormer.__dataclass_fields__ if name not in ("parent", "name")
  ]
  for name in overrides:
    if name not in known:
      nearest = ", ".join(difflib.get_close_matches(name, known, 3, 0.0))
      raise ValueError(f"VTFormer has no attribute {name!r}; the closest: {nearest}")
  return VTFormer(**{"patch": (1, 8, 16, 16), **PRESETS[preset], **overrides})


def _unknown(what, got, known) -> str:
  nearest = ", ".join(difflib.get_close_matches(str(got), known, 3, 0.0))
  return f"{what} {got!r} is not known; the closest: {nearest}"
