"""Features of volumes without a model."""

import numpy as np
import pytest

from vjepa_jax.evaluators import baselines, ridge


def _batch(volumes, mask=None):
  volumes = np.stack(volumes)
  axes = (1, 2, 3, 4, 5)
  return {
      "volume": volumes,
      "mean": volumes.mean(axis=axes, dtype=np.float64).astype(np.float32),
      "std": volumes.std(axis=axes, dtype=np.float64).astype(np.float32),
      "_mask": np.ones(len(volumes), np.float32) if mask is None else mask,
  }


def _volumes(count=3, shape=(2, 6, 20, 24, 1), seed=0):
  generator = np.random.default_rng(seed)
  drawn = (generator.gamma(4, 10, shape) for _ in range(count))
  return [volume.clip(0, 255).astype(np.uint8) for volume in drawn]


def test_intensity_follows_its_definition():
  stats = pytest.importorskip("scipy.stats", reason="scikit-learn brings it")
  volume = _volumes(1)[0]
  found = baselines.extract(["intensity"], [_batch([volume])])["intensity"][0]
  values = volume.astype(np.float64).ravel()
  standard = (values - values.mean()) / values.std()
  np.testing.assert_allclose(found[:2], [values.mean(), values.std()], rtol=1e-5)
  np.testing.assert_allclose(
      found[2:4], [stats.skew(standard), stats.kurtosis(standard)], rtol=1e-3
  )
  wanted = np.percentile(standard, baselines.PERCENTILES)
  np.testing.assert_allclose(found[4:13], wanted, atol=1e-5)
  assert found[13:].sum() == pytest.approx(1.0)
  assert found.shape == (13 + 32,)


def test_depth_profile_is_a_mean_and_a_std_for_every_row():
  volume = _volumes(1)[0]
  batch = _batch([volume])
  found = baselines.extract(["depth_profile"], [batch])["depth_profile"][0]
  standard = (volume[..., 0] - batch["mean"][0]) / batch["std"][0]
  np.testing.assert_allclose(found[:20], standard.mean(axis=(0, 1, 3)), atol=1e-5)
  np.testing.assert_allclose(found[20:], standard.std(axis=(0, 1, 3)), atol=1e-5)


def test_downsampling_keeps_the_mean_of_every_cell():
  volume = np.random.default_rng(0).normal(size=(1, 16, 64, 96, 1))
  cells = baselines.downsampled(volume, 0.0, 1.0).reshape(8, 32, 32)
  np.testing.assert_allclose(cells[2, 5, 7], volume[0, 4:6, 10:12, 21:24, 0].mean())
  odd = np.random.default_rng(0).normal(size=(1, 9, 37, 50, 1))
  assert baselines.downsampled(odd, 0.0, 1.0).size == 8 * 32 * 32


def test_padding_rows_are_left_out_and_order_is_kept():
  volumes = _volumes(3)
  whole = baselines.extract(["intensity"], [_batch(volumes)])["intensity"]
  padded = baselines.extract(
      ["intensity"],
      [_batch(volumes[:2]), _batch([volumes[2], volumes[0]], np.array([1.0, 0.0]))],
  )["intensity"]
  np.testing.assert_array_equal(whole, padded)


def test_a_constant_volume_gives_finite_features():
  volume = np.full((1, 4, 8, 8, 1), 7, np.uint8)
  found = baselines.extract(list(baselines.BASELINES), [_batch([volume])])
  assert all(np.isfinite(values).all() for values in found.values())


def test_pca_finds_the_directions_of_most_variance():
  generator = np.random.default_rng(0)
  rows = generator.normal(size=(30, 200)) * np.linspace(3.0, 0.1, 200)
  scores = baselines.pca(5)(rows)(rows)
  singular = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
  np.testing.assert_allclose(np.linalg.norm(scores, axis=0), singular[:5], rtol=1e-8)
  np.testing.assert_allclose(scores.T @ scores, np.diag(singular[:5] ** 2), atol=1e-6)
  assert baselines.pca(64)(rows)(rows).shape == (30, 29)


def test_pixel_pca_does_not_see_the_tested_patients():
  """A wild tested row may spoil its own guess, never those of its fold."""
  generator = np.random.default_rng(0)
  labels = np.arange(60) % 3
  rows = generator.normal(size=(60, 300))
  rows[np.arange(60), labels] += 6.0
  patients = np.arange(60) // 2
  labels = (patients % 3).astype(int)
  fold_of = ridge.grouped_folds(patients, 5, seed=0, stratify=labels)

  def guess(rows):
    return ridge.cross_predict(
        rows, labels, patients, classes=3, transform=baselines.pca(8)
    )

  wild = rows.copy()
  tested = np.flatnonzero(fold_of == 2)
  wild[tested[0]] += 1000.0 * generator.normal(size=300)
  np.testing.assert_array_equal(guess(rows)[tested[1:]], guess(wild)[tested[1:]])


def test_an_unknown_baseline_names_the_closest():
  with pytest.raises(KeyError, match="'intensty' is not known; closest: intensity"):
    baselines.extract(["intensty"], [])
