"""What a volume says without any model: the numbers that a probe has to beat.

Each baseline turns one volume, z-scored by its stored mean and std, into a
vector. A transform that must be fitted (PCA) is fitted by the probe within its
training folds, so that no baseline sees a test patient.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import difflib
import math

import numpy as np

from vjepa_jax.evaluators.ridge import Transform

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
# Values outside are counted in the first and last bin.
HISTOGRAM_EDGES = np.linspace(-3.0, 5.0, 33)
# Cells per axis (T, Z, Y, X) of the volume that pixel PCA sees.
PIXELS = (4, 8, 32, 32)


@dataclasses.dataclass(frozen=True)
class Baseline:
  """Features of volumes alone.

  Attributes:
    extract: fn(volume float32 [T, Z, Y, X, C] z-scored, mean, std) -> [V], mean
      and std being those that the volume was z-scored by.
    transform: components -> what the probe fits on training rows; None: nothing.
  """

  extract: Callable[[np.ndarray, float, float], np.ndarray]
  transform: Callable[[int], Transform] | None = None


def intensity(volume: np.ndarray, mean: float, std: float) -> np.ndarray:
  """Mean and std as stored; then per channel of the z-scored volume skew,
  excess kurtosis, percentiles and a histogram of 32 bins."""
  features = [np.array([mean, std])]
  for channel in np.moveaxis(volume, -1, 0):
    values = channel.ravel()
    # float64 sums: a volume holds ten million voxels.
    centred = values - values.mean(dtype=np.float64)
    spread = max(float(np.sqrt(np.mean(centred**2, dtype=np.float64))), 1e-12)
    standard = centred / spread
    edges = HISTOGRAM_EDGES
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    features += [
        np.array([np.mean(standard**3), np.mean(standard**4) - 3.0]),
        np.percentile(values, PERCENTILES),
        counts / values.size,
    ]
  return np.concatenate(features)


def depth_profile(volume: np.ndarray, mean: float, std: float) -> np.ndarray:
  """Mean and std of every row Y over (T, Z, X), per channel: 2 * Y * C numbers.

  It knows that layers lie along Y, which no encoder is told.
  """
  del mean, std
  rows = np.moveaxis(volume, 2, 0).reshape(volume.shape[2], -1, volume.shape[-1])
  return np.concatenate([rows.mean(axis=1).ravel(), rows.std(axis=1).ravel()])


def downsampled(volume: np.ndarray, mean: float, std: float) -> np.ndarray:
  """The volume averaged over at most `PIXELS` cells per axis, flat."""
  del mean, std
  for axis, cells in enumerate(PIXELS):
    size = volume.shape[axis]
    edges = np.linspace(0, size, min(cells, size) + 1).round().astype(int)
    counts = np.diff(edges).reshape([-1 if a == axis else 1 for a in range(5)])
    volume = np.add.reduceat(volume, edges[:-1], axis=axis) / counts
  return volume.ravel()


def pca(components: int) -> Transform:
  """Principal components of the training rows, as a transform to be fitted."""

  def fit(train):
    centre = train.mean(axis=0, dtype=np.float64)
    centred = train - centre
    # Rows are fewer than voxels: their Gram matrix is the small one.
    values, vectors = np.linalg.eigh(centred @ centred.T)
    order = np.argsort(values)[::-1][:components]
    # n centred rows span n - 1 directions; a further one is rounding noise.
    order = order[values[order] > 1e-10 * values.max()]
    axes = centred.T @ vectors[:, order] / np.sqrt(values[order])
    return lambda rows: (rows - centre) @ axes

  return fit


BASELINES = {
    "intensity": Baseline(intensity),
    "pixel_pca": Baseline(downsampled, pca),
    "depth_profile": Baseline(depth_profile),
}


def check_names(names: Sequence[str]) -> None:
  """Raises KeyError for a baseline that does not exist, with the closest ones."""
  for name in names:
    if name not in BASELINES:
      closest = difflib.get_close_matches(name, BASELINES, n=3, cutoff=0.0)
      raise KeyError(
          f"baselines: {name!r} is not known; closest: {', '.join(closest)}"
      )


def extract(
    names: Sequence[str], batches: Iterable[dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
  """Computes baselines of all real rows of host batches, in their order.

  Args:
    names: keys of `BASELINES`.
    batches: host batches with volume [B, T, Z, Y, X, C], mean, std and _mask [B].

  Returns:
    name -> float32 [n, V].

  Raises:
    KeyError: if a name is not known.
  """
  check_names(names)
  features = {name: [] for name in names}
  for batch in batches:
    for row in np.flatnonzero(batch["_mask"]):
      mean, std = float(batch["mean"][row]), float(batch["std"][row])
      safe = std if math.isfinite(std) and std > 0 else 1.0
      volume = (batch["volume"][row].astype(np.float32) - mean) / np.float32(safe)
      for name in names:
        vector = BASELINES[name].extract(volume, mean, std)
        features[name].append(vector.astype(np.float32))
  return {name: np.stack(rows) for name, rows in features.items()}
