"""Slices of a series that lie unevenly, or aslant behind a tilted gantry, made even."""

import dataclasses
import math

import numpy as np

from vjepa_jax.data.ops import taps as taps_lib
from vjepa_jax.data.ops.affine import SLICE_KEYS
from vjepa_jax.data.ops.spatial import check_result
from vjepa_jax.data.record import ReadError, Record


def even_slices(
    record: Record, step_mm: float | None, max_step_mm: float | None, max_voxels: int
) -> Record:
  """Brings a series onto slices of one step, stacked straight along their normal.

  Where slices are shifted against each other (`meta["slice_shear_mm"]`), each is moved
  within its plane to where it lies, onto a frame that holds them all; between slices
  the values are interpolated linearly. What no slice covers gets the lowest value.

  Args:
    record: with `meta["slice_positions_mm"]` [Z] along the normal; without, an even
      series as its spacing says.
    step_mm: between the new slices; None: the median step.
    max_step_mm: a wider step between slices is refused; None: none is.
    max_voxels: cap on the result.

  Raises:
    ReadError: missing_spacing, slices_missing, bad_header, too_large.
  """
  positions = _positions(record)
  shear = np.array(record.meta.get("slice_shear_mm", ()), float).reshape(-1, 2)
  steps = np.diff(positions)
  if max_step_mm is not None and len(steps) and steps.max() > max_step_mm:
    raise ReadError(
        record.source, "slices_missing",
        f"a step of {steps.max():g} mm between slices, max_step_mm is {max_step_mm:g}",
    )
  step = step_mm or (float(np.median(steps)) if len(steps) else math.nan)
  even = not len(steps) or np.abs(steps - step).max() < 1e-4 * step
  if even and not len(shear):
    return record
  volume = record.volume
  if len(shear):
    volume = _straighten(record, shear, max_voxels)
  if not even:
    count = int((positions[-1] - positions[0]) / step + 1e-6) + 1
    check_result(record, (count, *volume.shape[2:4]), max_voxels, "even slices")
    at = np.interp(
        positions[0] + step * np.arange(count), positions, np.arange(len(positions))
    )
    keep = (taps_lib.keep_taps(n) for n in volume.shape[2:4])
    volume = taps_lib.apply_taps(
        volume, [taps_lib.linear_taps(at, len(positions)), *keep]
    )
  spacing = np.array([record.spacing[0], step, *record.spacing[2:]], np.float32)
  dropped = (*SLICE_KEYS, "affine")  # An affine says even slices, and these were not.
  meta = {k: v for k, v in record.meta.items() if k not in dropped}
  return dataclasses.replace(
      record, volume=volume, spacing=spacing, mean=None, std=None, meta=meta
  )


def _positions(record: Record) -> np.ndarray:
  """Returns float64 [Z], where the slices lie along their normal, in mm, rising."""
  depth, dz = record.volume.shape[1], float(record.spacing[1])
  if "slice_positions_mm" not in record.meta:
    if math.isnan(dz) and depth > 1:
      raise ReadError(
          record.source, "missing_spacing", "neither slice positions nor dz are known"
      )
    return np.arange(depth) * (1.0 if math.isnan(dz) else dz)
  positions = np.array(record.meta["slice_positions_mm"], float)
  if positions.shape != (depth,) or not (np.diff(positions) > 0).all():
    raise ReadError(
        record.source, "bad_header",
        f"{positions.shape} slice positions for {depth} slices, or not rising",
    )
  return positions


def _straighten(record: Record, shear: np.ndarray, max_voxels: int) -> np.ndarray:
  """Returns the volume with each slice moved to its place: rows and columns grow."""
  pixel = record.spacing[2:].astype(float)
  if np.isnan(pixel).any():
    raise ReadError(
        record.source, "missing_spacing", f"(dy, dx) is {pixel.tolist()}"
    )
  volume = record.volume
  if len(shear) != volume.shape[1] or not np.isfinite(shear).all():
    raise ReadError(record.source, "bad_header", f"{len(shear)} shears of slices")
  moved = (shear - shear.min(axis=0)) / pixel  # [Z, 2] in pixels, none negative.
  grown = np.ceil(moved.max(axis=0) - 1e-6).astype(int)
  size = tuple(n + int(g) for n, g in zip(volume.shape[2:4], grown, strict=True))
  check_result(record, (volume.shape[1], *size), max_voxels, "even slices")
  low = float(volume.min())
  result = np.empty((*volume.shape[:2], *size, volume.shape[4]), volume.dtype)
  for z in range(volume.shape[1]):
    frame = volume[:, z : z + 1].astype(np.float32) - np.float32(low)
    taps = [taps_lib.keep_taps(1)] + [
        taps_lib.linear_taps(np.arange(count) - shift, n, "zeros")
        for n, count, shift in zip(volume.shape[2:4], size, moved[z], strict=True)
    ]
    found = taps_lib.apply_taps(frame, taps) + np.float32(low)
    result[:, z : z + 1] = found if volume.dtype.kind == "f" else np.rint(found)
  return result
