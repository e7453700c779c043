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
    padded: whether an axis that its patch does not divide gets zeros at its end;
      `valid` says which voxels are real.
    stride: (st, sz, sy, sx) from one patch to the next, where patches overlap; None:
      the patch. Such patches cannot be put back into a volume.

  Raises:
    ValueError: where an axis is empty or, unless `padded`, not a multiple of its
      patch; names the axis and the nearest sizes that fit.
  """

  voxels: tuple[int, int, int, int]
  patch: tuple[int, int, int, int]
  padded: bool = False
  stride: tuple[int, int, int, int] | None = None

  def __post_init__(self):
    faults = grid_faults(self.voxels, self.patch, self.padded, self.stride)
    if faults:
      raise ValueError("; ".join(faults))
    for name in ("voxels", "patch", "stride"):
      value = getattr(self, name)
      if value is not None:
        object.__setattr__(self, name, tuple(int(v) for v in value))
    if self.stride == self.patch:
      object.__setattr__(self, "stride", None)

  @property
  def dims(self) -> tuple[int, int, int, int]:
    """Tokens per axis (t, z, y, x)."""
    steps = zip(self.voxels, self.patch, self.stride or self.patch, strict=True)
    return tuple(max(-(-(v - p) // s), 0) + 1 for v, p, s in steps)

  @property
  def places(self) -> int:
    """Number of tokens of one time, n = z y x."""
    return int(np.prod(self.dims[1:]))

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

  def valid(self) -> np.ndarray:
    """Says which voxels of every patch are real, bool [N, pt*pz*py*px]."""
    ones = np.ones((1, *self.voxels, 1), bool)
    return self.patchify(ones)[0]

  def patchify(self, volume: jax.Array) -> jax.Array:
    """Cuts a volume [B, T, Z, Y, X, C] into patches [B, N, pt*pz*py*px*C].

    Where the grid is `padded`, what is beyond the volume is 0.

    Raises:
      ValueError: if the volume is not of this grid's size.
    """
    if volume.ndim != 6 or tuple(volume.shape[1:5]) != self.voxels:
      raise ValueError(
          f"patchify: volume has shape {tuple(volume.shape)}, this grid wants "
          f"[B, {', '.join(map(str, self.voxels))}, C]"
      )
    pt, pz, py, px = self.patch
    if any(self._beyond):
      widths = [(0, 0), *((0, n) for n in self._beyond), (0, 0)]
      pad = np.pad if isinstance(volume, np.ndarray) else jax.numpy.pad
      volume = pad(volume, widths)
    if self.stride is not None:
      return self._overlapping(volume)
    if isinstance(volume, jax.Array) and min(self.dims[:2]) > 1:
      return self._by_layer(volume)
    return einops.rearrange(
        volume,
        "b (t pt) (z pz) (y py) (x px) c -> b (t z y x) (pt pz py px c)",
        pt=pt, pz=pz, py=py, px=px,
    )

  def unpatchify(self, patches: jax.Array, channels: int = 1) -> jax.Array:
    """Puts patches [B, N, pt*pz*py*px*C] back into a volume [B, T, Z, Y, X, C].

    Raises:
      ValueError: if the patches are not of this grid, or overlap.
    """
    if self.stride is not None:
      raise ValueError(
          f"unpatchify: patches {self.patch} with stride {self.stride} overlap, so "
          "that a voxel has several values; use a stride equal to the patch"
      )
    size = int(np.prod(self.patch)) * channels
    if patches.ndim != 3 or tuple(patches.shape[1:]) != (self.tokens, size):
      raise ValueError(
          f"unpatchify: patches have shape {tuple(patches.shape)}, this grid "
          f"wants [B, {self.tokens}, {size}] for {channels} channel(s)"
      )
    t, z, y, x = self.dims
    pt, pz, py, px = self.patch
    volume = einops.rearrange(
        patches,
        "b (t z y x) (pt pz py px c) -> b (t pt) (z pz) (y py) (x px) c",
        t=t, z=z, y=y, x=x, pt=pt, pz=pz, py=py, px=px,
    )
    real = tuple(slice(size) for size in self.voxels)
    return volume[(slice(None), *real)] if any(self._beyond) else volume

  @property
  def _beyond(self) -> tuple[int, ...]:
    """Voxels that the patches reach beyond the volume, per axis."""
    steps = zip(
        self.voxels, self.patch, self.stride or self.patch, self.dims, strict=True
    )
    return tuple((n - 1) * s + p - v for v, p, s, n in steps)

  def _by_layer(self, volume):
    """Cuts volumes in time, one layer of patches along Z after the other.

    On the way a TPU holds the few voxels of a patch's row as 128 of them: of a layer.
    """
    t, z, y, x = self.dims
    pt, pz, py, px = self.patch

    def cut(layer, patches):
      part = jax.lax.dynamic_slice_in_dim(volume, layer * pz, pz, 2)
      part = einops.rearrange(
          part, "b (t pt) pz (y py) (x px) c -> b t 1 (y x) (pt pz py px c)",
          pt=pt, py=py, px=px,
      )
      return jax.lax.dynamic_update_slice_in_dim(patches, part, layer, 2)

    size = int(np.prod(self.patch)) * volume.shape[-1]
    patches = jax.numpy.zeros((len(volume), t, z, y * x, size), volume.dtype)
    return jax.lax.fori_loop(0, z, cut, patches).reshape(len(volume), -1, size)

  def _overlapping(self, volume):
    """Cuts windows of the patch's size every `stride` voxels, [B, N, P]."""
    for axis in range(4):
      step, size = self.stride[axis], self.patch[axis]
      rows = np.arange(self.dims[axis])[:, None] * step + np.arange(size)
      # Axes already cut have become two each: [B, t, pt, ...].
      volume = volume.take(rows, 2 * axis + 1)
    return einops.rearrange(
        volume, "b t pt z pz y py x px c -> b (t z y x) (pt pz py px c)"
    )


def grid_faults(
    voxels: tuple[int, ...],
    patch: tuple[int, ...],
    padded: bool = False,
    stride: tuple[int, ...] | None = None,
) -> list[str]:
  """Says what keeps `voxels` from being cut by `patch`; an empty list is well.

  Args:
    voxels: (T, Z, Y, X).
    patch: (pt, pz, py, px).
    padded: whether an axis may be no multiple of its patch.
    stride: of overlapping patches; None: the patch.
  """
  if len(voxels) != 4 or len(patch) != 4 or len(stride or patch) != 4:
    return [
        f"voxels {tuple(voxels)}, patch {tuple(patch)} and stride {stride} must all "
        "name (T, Z, Y, X)" if stride else
        f"voxels {tuple(voxels)} and patch {tuple(patch)} must both name "
        "(T, Z, Y, X)"
    ]
  if stride is not None and tuple(stride) != tuple(patch):
    return _stride_faults(voxels, patch, padded, stride)
  faults = []
  for axis, v, p in zip(AXES, voxels, patch, strict=True):
    if v < 1 or p < 1:
      faults.append(f"{axis}={v} with patch {p}: both must be at least 1")
    elif v % p and not padded:
      below = v // p * p
      nearest = f"{below} or {below + p}" if below else f"{p}"
      faults.append(f"{axis}={v} is not a multiple of patch {p}; nearest {nearest}")
  return faults


def _stride_faults(voxels, patch, padded, stride) -> list[str]:
  faults = []
  for axis, v, p, s in zip(AXES, voxels, patch, stride, strict=True):
    if min(v, p, s) < 1 or s > p:
      faults.append(f"{axis}={v} with patch {p}, stride {s}: need 1 <= stride <= patch")
    elif not padded and (v < p or (v - p) % s):
      below = max((v - p) // s, 0) * s + p
      faults.append(
          f"{axis}={v} is not patch {p} plus a multiple of stride {s}; nearest "
          f"{below} or {below + s}"
      )
  return faults
