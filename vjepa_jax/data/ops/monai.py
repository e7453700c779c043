"""Any dictionary transform of MONAI as an op on Records.

For people who bring a MONAI pipeline. It is slow: spacing, flips, noise and rotations
are far cheaper as ops of this library or on the device.
"""

from collections.abc import Callable, Mapping, Sequence
import copy
import dataclasses
import difflib
import types
from typing import Any

import numpy as np

from vjepa_jax.data.ops.affine import SLICE_KEYS, affine_of
from vjepa_jax.data.record import ReadError, Record

_KEY = "image"


def monai_op(
    transform: str | Callable[[dict[str, Any]], dict[str, Any]],
    options: Mapping[str, Any] | Sequence[tuple[str, Any]] = (),
) -> Callable[[Record, np.random.Generator], Record]:
  """Returns an op that applies one dictionary transform of MONAI.

  The transform sees {"image": MetaTensor [C, X, Y, Z]}, time points among the channels
  so that all share one draw, and an affine in mm. Axes of unknown spacing count voxels
  instead, and stay unknown.

  Args:
    transform: a name within `monai.transforms`, such as "RandAffined", or a transform,
      or a `Compose` of several, made for the key "image".
    options: of a named transform, without `keys`.

  Returns:
    op(record, rng): equal draws for an equal rng, in any thread.

  Raises:
    ImportError: names the extra, where MONAI is missing.
    ValueError: for an unknown name.
  """
  if isinstance(transform, str):
    factory = _find(transform)
    transform = factory(keys=(_KEY,), **dict(options))

  def op(record: Record, rng: np.random.Generator) -> Record:
    one = copy.deepcopy(transform)  # Transforms keep their draws: not for two threads.
    if hasattr(one, "set_random_state"):
      one.set_random_state(seed=int(rng.integers(2**32)))
    return _apply(record, one)

  return op


def _load() -> types.ModuleType:
  try:
    import monai
    import monai.transforms
  except ImportError as error:
    raise ImportError(
        f"op monai needs {error.name}: pip install \"vjepa_jax[monai]\""
    ) from error
  return monai


def _find(name: str) -> Callable[..., Any]:
  transforms = _load().transforms
  found = getattr(transforms, name, None)
  if not isinstance(found, type) or not issubclass(found, transforms.MapTransform):
    names = [
        n for n, v in vars(transforms).items()
        if isinstance(v, type) and issubclass(v, transforms.MapTransform)
    ]
    close = difflib.get_close_matches(name, names, 3, 0.0)
    raise ValueError(
        f"op monai: {name!r} is no dictionary transform of MONAI; closest {close}"
    )
  return found


def _apply(record: Record, transform: Callable[[dict], dict]) -> Record:
  monai = _load()
  times, *_, channels = record.volume.shape
  unknown = np.isnan(record.spacing[1:][::-1])
  affine = affine_of(record.meta)
  if affine is None:
    affine = np.diag([*np.where(unknown, 1, record.spacing[1:][::-1]), 1.0])
  stored = record.volume.transpose(0, 4, 3, 2, 1)  # [T, C, X, Y, Z]
  image = monai.data.MetaTensor(
      np.ascontiguousarray(stored.reshape(-1, *stored.shape[2:])), affine=affine
  )
  found = transform({_KEY: image})[_KEY]
  volume = _to_volume(np.asarray(found), times, channels, record.source)
  moved = np.asarray(getattr(found, "affine", affine), float)
  spacing, meta = _place(record, affine, moved, unknown)
  return dataclasses.replace(
      record, volume=volume, spacing=spacing, mean=None, std=None, meta=meta
  )


def _to_volume(
    array: np.ndarray, times: int, channels: int, source: str
) -> np.ndarray:
  if array.ndim != 4 or not array.size or array.shape[0] % times:
    raise ReadError(
        source, "bad_header",
        f"op monai returned {array.shape} for {times} time points of {channels} "
        "channels, not [C, X, Y, Z]",
        "use transforms that keep the axes of an image",
    )
  if array.dtype.name not in ("uint8", "int16", "uint16", "float32"):
    array = array.astype(np.uint8 if array.dtype == bool else np.float32)
  if array.dtype.kind == "f" and not np.isfinite(array).all():
    raise ReadError(source, "nan_voxels", "op monai returned NaN or infinite voxels")
  array = array.reshape(times, -1, *array.shape[1:])  # [T, C, X, Y, Z]
  return np.ascontiguousarray(array.transpose(0, 4, 3, 2, 1))


def _place(
    record: Record, affine: np.ndarray, moved: np.ndarray, unknown: np.ndarray
) -> tuple[np.ndarray, dict[str, Any]]:
  """Returns the spacing and meta of where a transform says that the voxels lie."""
  meta = dict(record.meta)
  if np.allclose(moved, affine):
    return record.spacing, meta
  lengths = np.linalg.norm(moved[:3, :3], axis=0)
  if "affine" in meta:
    meta["affine"] = moved.tolist()
  else:  # World axes are the stored axes: what they lack, the new ones lack.
    mixed = np.abs(moved[:3, :3]) > 1e-6 * lengths
    lengths[(mixed & unknown[:, None]).any(axis=0)] = np.nan
  meta = {k: v for k, v in meta.items() if k not in SLICE_KEYS}
  return np.array([record.spacing[0], *lengths[::-1]], np.float32), meta
