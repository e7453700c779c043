"""Geometry of a volume cut into tokens.

A volume is `[B, T, Z, Y, X, C]`, a patch `(pt, pz, py, px)`, and token ids are
row-major over the grid of patches, so one id names one place in the anatomy
for masks, positions, losses and figures alike.
"""

import dataclasses

import einops
import jax
import numpy as np

AXES = ("T", "Z", "Y", "X")


@dataclasses.dataclass(frozen=True)
class Grid:
  """Voxels, patch and tokens per axis.

  Attributes:
    voxels: (T, Z, Y, X) voxels of the volume.
    patch: (pt, pz, py, px) voxels of one token.

  Raises:
    ValueError: where an axis is empty or not a multiple of its patch; names the
      axis and the nearest sizes that fit.
  """

  voxels: tuple[int, int, int, int]
  patch: tuple[int, int, int, int]

  def __post_init__(self):
    faults = grid_faults(self.voxels, self.patch)
    if faults:
      raise ValueError("; ".join(faults))
    object.__setattr__(self, "voxels", tuple(int(v) for v in self.voxels))
    object.__setattr__(self, "patch", tuple(int(p) for p in self.patch))

  @property
  def dims(self) -> tuple[int, int, int, int]:
    """Tokens per axis (t, z, y, x)."""
    return tuple(v // p for v, p in zip(self.voxels, self.patch, strict=True))

  @property
  def tokens(self) -> int:
    """Number of tokens N."""
    return int(np.prod(self.dims))

  def coords(self) -> np.ndarray:
    """Returns the (t, z, y, x) index of every token, int32 [N, 4]."""
    return np.stack(
        np.unravel_index(np.arange(self.tokens), self.dims), axis=-1
    ).astype(np.int32)

  def coords_of(self, ids: jax.Array) -> jax.Array:
    """Returns the (t, z, y, x) index of the given token ids [...], int32 [..., 4]."""
    _, z, y, x = self.dims
    return jax.numpy.stack(
        [ids // (z * y * x), ids // (y * x) % z, ids // x % y, ids % x], axis=-1
    )

  def patchify(self, volume: jax.Array) -> jax.Array:
    """Cuts a volume [B, T, Z, Y, X, C] into patches [B, N, pt*pz*py*px*C].

    Raises:
      ValueError: if the volume is not of this grid's size.
    """
    if volume.ndim != 6 or tuple(volume.shape[1:5]) != self.voxels:
      raise ValueError(
          f"patchify: volume has shape {tuple(volume.shape)}, this grid wants "
          f"[B, {', '.join(map(str, self.voxels))}, C]"
      )
    pt, pz, py, px = self.patch
    return einops.rearrange(
        volume,
        "b (t pt) (z pz) (y py) (x px) c -> b (t z y x) (pt pz py px c)",
        pt=pt, pz=pz, py=py, px=px,
    )

  def unpatchify(self, patches: jax.Array, channels: int = 1) -> jax.Array:
    """Puts patches [B, N, pt*pz*py*px*C] back into a volume [B, T, Z, Y, X, C].

    Raises:
      ValueError: if the patches are not of this grid.
    """
    size = int(np.prod(self.patch)) * channels
    if patches.ndim != 3 or tuple(patches.shape[1:]) != (self.tokens, size):
      raise ValueError(
          f"unpatchify: patches have shape {tuple(patches.shape)}, this grid "
          f"wants [B, {self.tokens}, {size}] for {channels} channel(s)"
      )
    t, z, y, x = self.dims
    pt, pz, py, px = self.patch
    return einops.rearrange(
        patches,
        "b (t z y x) (pt pz py px c) -> b (t pt) (z pz) (y py) (x px) c",
        t=t, z=z, y=y, x=x, pt=pt, pz=pz, py=py, px=px,
    )


def grid_faults(voxels: tuple[int, ...], patch: tuple[int, ...]) -> list[str]:
  """Says what keeps `voxels` from being cut by `patch`; an empty list is well."""
  if len(voxels) != 4 or len(patch) != 4:
    return [
        f"voxels {tuple(voxels)} and patch {tuple(patch)} must both name "
        "(T, Z, Y, X)"
    ]
  faults = []
  for axis, v, p in zip(AXES, voxels, patch, strict=True):
    if v < 1 or p < 1:
      faults.append(f"{axis}={v} with patch {p}: both must be at least 1")
    elif v % p:
      below = v // p * p
      nearest = f"{below} or {below + p}" if below else f"{p}"
      faults.append(f"{axis}={v} is not a multiple of patch {p}; nearest {nearest}")
  return faults
