"""Where voxels lie: `meta["affine"]`, kept true when an op moves them.

The affine is 4 x 4, a nested list, from voxel indices (x, y, z) of the Record's
volume to mm along (right, anterior, superior), as in NIfTI. Records of other formats
may lack it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# What a reader of a series says of its slices; untrue once they are mixed or turned.
SLICE_KEYS = (
    "slice_positions_mm", "slice_steps_mm", "slice_gaps", "slice_shear_mm",
    "gantry_tilt_deg",
)


def affine_of(meta: Mapping[str, Any]) -> np.ndarray | None:
  """Returns float64 [4, 4] of (x, y, z) to mm, or None where it is unknown."""
  return np.array(meta["affine"], float) if "affine" in meta else None


def place_meta(
    meta: Mapping[str, Any], ratio: Sequence[float], start: Sequence[float]
) -> dict[str, Any]:
  """Returns the meta of voxels that were cut and resized along their axes.

  Args:
    meta: of the Record before.
    ratio: (Z, Y, X) old voxels per new voxel.
    start: (Z, Y, X) where the low edge of the new volume lies, in old voxels from the
      low edge of the old one.
  """
  change = np.eye(4)
  for axis in range(3):
    change[2 - axis, 2 - axis] = ratio[axis]
    # Centres: old + 0.5 = start + (new + 0.5) * ratio.
    change[2 - axis, 3] = start[axis] + 0.5 * ratio[axis] - 0.5
  return move_meta(meta, change)


def move_meta(meta: Mapping[str, Any], change: np.ndarray) -> dict[str, Any]:
  """Returns the meta of voxels that moved.

  Args:
    meta: of the Record before.
    change: [4, 4] from new voxel indices (x, y, z) to old ones.
  """
  known = dict(meta)
  way = np.sign(change[:3, :3])
  if not np.array_equal(way, np.eye(3)) or tuple(change[2, 2:]) != (1, 0):
    known = {k: v for k, v in known.items() if k not in SLICE_KEYS}
  affine = affine_of(meta)
  if affine is not None:
    known["affine"] = (affine @ change).tolist()
  return known
