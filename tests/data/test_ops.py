"""Claims of data/ops/: resampling onto the canvas."""

import concurrent.futures
import math
import subprocess
import sys

from hypothesis import assume, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from vjepa_jax.data import ops
from vjepa_jax.data.ops.intensity import percentiles
from vjepa_jax.data.record import ReadError, Record

NAN = math.nan
SIZES = st.tuples(*[st.integers(2, 40)] * 3)


def record(volume, spacing=(NAN, NAN, NAN), source="positions"):
  if volume.ndim == 3:
    volume = volume[None, ..., None]
  return Record(
      volume, np.array([NAN, *spacing], np.float32), "scan.dcm",
      meta={"spacing_source": source},
  )


def ramp(size, axis, dtype=np.float32):
  """Each voxel holds the place of its centre along an axis, from 0 to 1."""
  place = (np.arange(size[axis]) + 0.5) / size[axis]
  shape = [1, 1, 1]
  shape[axis] = size[axis]
  volume = np.broadcast_to(place.reshape(shape), size)
  return np.ascontiguousarray(volume).astype(dtype)


def reason(*args, **options):
  with pytest.raises(ReadError) as caught:
    ops.resample(*args, **options)
  return caught.value.reason


@settings(max_examples=60, deadline=None)
@given(size=SIZES, canvas=SIZES, axis=st.integers(0, 2))
def test_a_ramp_resized_is_the_ramp_of_the_canvas(size, canvas, axis):
  found = ops.resample(record(ramp(size, axis)), canvas=canvas).volume[0, ..., 0]
  want = ramp(canvas, axis)
  # Beyond the outer voxel centres there is nothing to interpolate with, and a
  # smaller canvas averages areas: inside both the ramp is exact.
  edge = 0.5 / size[axis]
  inside = (want >= edge) & (want <= 1 - edge)
  np.testing.assert_allclose(found[inside], want[inside], atol=0.02 if max(
      size[axis] / canvas[axis], 1) > 2 else 1e-5)
  assert np.abs(found - want).max() <= edge + 1e-5


def test_area_shrinking_is_the_mean_over_the_area():
  volume = np.random.default_rng(0).random((12, 12, 12)).astype(np.float32)
  found = ops.resample(record(volume), canvas=(3, 3, 3)).volume[0, ..., 0]
  want = volume.reshape(3, 4, 3, 4, 3, 4).mean(axis=(1, 3, 5))
  np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("canvas", [(3, 20, 3), (20, 3, 20), (3, 3, 20), (20, 20, 3)])
def test_an_axis_that_shrinks_does_not_blur_one_that_grows(canvas):
  volume = np.random.default_rng(0).random((12, 12, 12)).astype(np.float32)
  found = ops.resample(record(volume), canvas=canvas).volume[0, ..., 0]
  for axis in range(3):
    if canvas[axis] == 3:
      others = tuple(a for a in range(3) if a != axis)
      full = ops.resample(
          record(volume), canvas=tuple(12 if a != axis else 3 for a in range(3))
      ).volume[0, ..., 0].mean(axis=others)
      # Growing the others by interpolation moves a mean only through the edges.
      np.testing.assert_allclose(found.mean(axis=others), full, atol=0.05)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_integers_keep_their_type_and_come_within_two_levels(dtype):
  rng = np.random.default_rng(0)
  volume = rng.integers(0, 200, (10, 30, 26)).astype(dtype)
  exact = ops.resample(record(volume.astype(np.float32)), canvas=(7, 24, 40)).volume
  found = ops.resample(record(volume), canvas=(7, 24, 40)).volume
  assert found.dtype == dtype
  assert np.abs(found.astype(float) - exact).max() <= 1.5


@pytest.mark.parametrize("policy, options", [
    ("resize", {}), ("fov", {"fov_mm": (0.5, 0.12, 0.28)}),
    ("spacing", {"spacing_mm": (0.1, 0.02, 0.04)}),
])
def test_the_same_size_is_the_identity(policy, options):
  volume = np.random.default_rng(0).integers(0, 255, (5, 6, 7), dtype=np.uint8)
  found = ops.resample(
      record(volume, (0.1, 0.02, 0.04)), canvas=(5, 6, 7), policy=policy, **options
  )
  np.testing.assert_array_equal(found.volume[0, ..., 0], volume)
  np.testing.assert_allclose(found.spacing[1:], (0.1, 0.02, 0.04), rtol=1e-6)
  assert found.meta["padding"] == 0


def coordinates(size, spacing, axis):
  """Each voxel holds its place in mm from the centre of the volume."""
  place = (np.arange(size[axis]) - (size[axis] - 1) / 2) * spacing[axis]
  shape = [1, 1, 1]
  shape[axis] = size[axis]
  return np.ascontiguousarray(np.broadcast_to(place.reshape(shape), size), np.float32)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(*[st.integers(6, 40)] * 3),
    canvas=st.tuples(*[st.integers(4, 32)] * 3),
    policy=st.sampled_from(["resize", "fov", "spacing"]), axis=st.integers(0, 2),
)
def test_the_reported_spacing_is_the_step_between_voxels_in_mm(
    size, canvas, policy, axis
):
  spacing = (0.1, 0.05, 0.08)
  extent = {"fov": (1.5, 0.9, 1.2), "spacing": np.multiply(canvas, (0.12, 0.04, 0.1))}
  if policy in extent:  # On one voxel a ramp is its mean, and refused as constant.
    assume(size[axis] * spacing[axis] / extent[policy][axis] * canvas[axis] >= 2)
  volume = coordinates(size, spacing, axis)
  found = ops.resample(
      record(volume, spacing), canvas=canvas, policy=policy, fov_mm=(1.5, 0.9, 1.2),
      spacing_mm=(0.12, 0.04, 0.1),
  )
  along = np.moveaxis(found.volume[0, ..., 0], axis, 0)
  along = along[:, along.shape[1] // 2, along.shape[2] // 2]
  # Linear inside the voxel centres; padding and the outer half voxel are flat.
  steps = np.diff(along)[1:-1]
  step = found.spacing[1 + axis]
  inner = steps[(steps > 0.2 * step)]
  if len(inner) > 4:
    np.testing.assert_allclose(np.mean(inner[1:-1]), step, rtol=0.05)
  nonzero = along[(along > along.min()) & (along < along.max())]
  if len(nonzero) > 4:  # Centred within one source or one canvas voxel.
    limit = max(step, spacing[axis])
    assert abs(nonzero.max() + nonzero.min()) <= 2 * limit + 1e-4


def test_a_fixed_field_of_view_pads_what_is_missing_and_cuts_what_is_more():
  volume = np.random.default_rng(0).integers(50, 255, (10, 20, 40), dtype=np.uint8)
  found = ops.resample(
      record(volume, (0.1, 0.1, 0.1)), canvas=(20, 10, 10), policy="fov",
      fov_mm=(2.0, 1.0, 2.0),
  )
  # Z: 1 of 2 mm: half padding. Y: 1 of 2 mm kept. X: 2 of 4 mm onto 10 voxels.
  inside = found.volume[0, 5:15, ..., 0]
  np.testing.assert_array_equal(found.volume[0, :5], inside.min())
  np.testing.assert_array_equal(found.volume[0, 15:], inside.min())
  assert found.meta["padding"] == 0.5
  np.testing.assert_allclose(found.spacing[1:], (0.1, 0.1, 0.2), rtol=1e-6)
  want = volume[:, 5:15, 10:30].reshape(10, 10, 10, 2).mean(axis=-1)
  assert np.abs(inside - want).max() <= 1
  assert found.mean == pytest.approx(inside.mean())
  assert found.std == pytest.approx(inside.std())


def test_a_fixed_spacing_crops_the_centre():
  volume = np.random.default_rng(0).integers(0, 255, (8, 40, 40), dtype=np.uint8)
  found = ops.resample(
      record(volume, (0.05, 0.02, 0.02)), canvas=(8, 20, 20), policy="spacing",
      spacing_mm=(0.05, 0.02, 0.02),
  )
  np.testing.assert_array_equal(found.volume[0, ..., 0], volume[:, 10:30, 10:30])


def test_missing_spacing_stays_missing_and_stops_what_needs_it():
  volume = np.random.default_rng(0).integers(0, 255, (4, 8, 8), dtype=np.uint8)
  assert np.isnan(ops.resample(record(volume), canvas=(2, 4, 4)).spacing).all()
  for policy in ("fov", "spacing"):
    with pytest.raises(ReadError, match="spacing_source missing") as caught:
      ops.resample(record(volume, source="missing"), canvas=(2, 4, 4), policy=policy)
    assert caught.value.reason == "missing_spacing"


def test_a_resample_to_terabytes_is_refused_naming_the_source_of_the_spacing():
  volume = np.random.default_rng(0).integers(0, 255, (60, 100, 100), dtype=np.uint8)
  words = "spacing_source assumed.*30,000,000,000"
  with pytest.raises(ReadError, match=words) as caught:
    ops.resample(
        record(volume, (1, 1, 1), "assumed"), canvas=(64, 96, 96), policy="spacing",
        spacing_mm=(0.05, 0.02, 0.02),
    )
  assert caught.value.reason == "too_large"


def test_bad_volumes_have_their_reasons():
  noise = np.random.default_rng(0).random((4, 8, 8)).astype(np.float32)
  assert reason(record(noise), canvas=(4, 8, 8), min_size=(4, 16, 16)) == "too_small"
  assert reason(record(noise * 0 + 3), canvas=(2, 4, 4)) == "constant"
  assert reason(
      record(noise, (0.1, 0.1, 0.1)), canvas=(4, 8, 8), policy="fov",
      fov_mm=(0.4, 0.2, 0.8), min_size=(1, 4, 4),
  ) == "too_small"
  spoilt = noise.copy()
  spoilt[0, 0, 0] = NAN
  bad = Record(
      spoilt[None, ..., None], np.full(4, NAN), "scan.dcm", mean=0.0, std=1.0
  )
  assert reason(bad, canvas=(2, 4, 4)) == "nan_voxels"


def test_uint8_maps_robust_percentiles_and_leaves_uint8_alone():
  rng = np.random.default_rng(0)
  volume = rng.integers(1000, 3000, (8, 20, 20)).astype(np.uint16)
  volume[0, 0, 0] = 65535
  found = ops.resample(record(volume), canvas=(8, 20, 20), dtype="uint8")
  low, high = np.percentile(volume, (0.5, 99.5))
  want = np.clip((volume - low) / (high - low), 0, 1) * 255
  assert found.volume.dtype == np.uint8
  assert np.abs(found.volume[0, ..., 0] - want).max() <= 0.51
  assert found.mean == pytest.approx(found.volume.mean())
  small = rng.integers(40, 90, (8, 20, 20), dtype=np.uint8)
  kept = ops.resample(record(small), canvas=(8, 20, 20), dtype="uint8")
  np.testing.assert_array_equal(kept.volume[0, ..., 0], small)


def test_negative_values_become_uint8_in_order():
  volume = np.linspace(-500, 500, 4 * 8 * 8).reshape(4, 8, 8).astype(np.int16)
  found = ops.resample(record(volume), canvas=(4, 8, 8), dtype="uint8").volume
  assert (np.diff(found.ravel().astype(int)) >= 0).all()
  assert found.min() == 0 and found.max() == 255


def test_time_and_channels_pass_through_alike():
  volume = np.random.default_rng(0).random((3, 6, 10, 8, 2)).astype(np.float32)
  found = ops.resample(record(volume), canvas=(4, 5, 6)).volume
  assert found.shape == (3, 4, 5, 6, 2)
  for t in range(3):
    for c in range(2):
      alone = ops.resample(record(volume[t, ..., c]), canvas=(4, 5, 6)).volume
      np.testing.assert_allclose(found[t, ..., c], alone[0, ..., 0], atol=1e-6)


def test_a_long_film_onto_a_large_canvas_is_refused_before_it_is_made():
  film = record(np.arange(500 * 16, dtype=np.float32).reshape(500, 1, 4, 4, 1))
  with pytest.raises(ReadError, match="500 x 64 x 384 x 384 x 1") as caught:
    ops.resample(film, canvas=(64, 384, 384))
  assert caught.value.reason == "too_large"


def test_an_unknown_policy_is_named():
  with pytest.raises(ValueError, match="'zoom'.*resize"):
    ops.resample(record(np.ones((2, 2, 2), np.uint8)), canvas=(2, 2, 2), policy="zoom")


def exact(volume, canvas):
  """Returns the resize rule in float64: linear, or area means above two to one."""
  found = volume.astype(float)
  for axis, size in enumerate(canvas):
    n = found.shape[axis]
    weights = np.zeros((size, n))
    for new in range(size):
      low, high = new * n / size, (new + 1) * n / size
      if n > 2 * size:
        ends = np.arange(n)
        weights[new] = np.clip(np.minimum(ends + 1, high) - np.maximum(ends, low), 0, 1)
      else:
        at = np.clip((low + high) / 2 - 0.5, 0, n - 1)
        weights[new] = np.clip(1 - np.abs(np.arange(n) - at), 0, 1)
    weights /= weights.sum(axis=1, keepdims=True)
    found = np.moveaxis(np.tensordot(weights, found, (1, axis)), 0, axis)
  return found


@settings(max_examples=25, deadline=None)
@given(size=SIZES, canvas=SIZES, dtype=st.sampled_from(["uint8", "uint16", "int16"]))
def test_resizing_rounds_once(size, canvas, dtype):
  info = np.iinfo(dtype)
  volume = np.random.default_rng(0).integers(
      info.min, info.max, size, dtype=dtype, endpoint=True
  )
  found = ops.resample(record(volume), canvas=canvas).volume[0, ..., 0]
  limit = 0.501 if dtype == "uint8" else 0.51
  assert np.abs(found - exact(volume, canvas)).max() <= limit


def test_resizing_a_large_volume_is_exact_to_half_a_grey_level():
  volume = np.random.default_rng(0).integers(0, 256, (128, 885, 512), dtype=np.uint8)
  found = ops.resample(record(volume), canvas=(64, 384, 384)).volume[0, ..., 0]
  for z in (0, 31, 63):
    wanted = exact(volume[2 * z : 2 * z + 2], (1, 384, 384))[0]
    assert np.abs(found[z] - wanted).max() <= 0.501


@pytest.mark.parametrize("way", ["flipped", "transposed", "big endian", "read only"])
def test_any_layout_in_memory_gives_the_same(way):
  volume = np.random.default_rng(0).integers(0, 999, (2, 9, 12, 10, 2)).astype(np.int16)
  wanted = ops.resample(record(volume), canvas=(7, 5, 13)).volume
  if way == "flipped":
    other = np.ascontiguousarray(volume[:, ::-1, :, ::-1])[:, ::-1, :, ::-1]
  elif way == "transposed":
    other = np.ascontiguousarray(volume.transpose()).transpose()
  elif way == "big endian":
    other = volume.astype(">i2")
  else:
    other = volume.copy()
    other.flags.writeable = False
  found = ops.resample(
      Record(other, np.full(4, NAN), "scan", mean=0.0, std=1.0), canvas=(7, 5, 13)
  ).volume
  assert found.dtype.isnative
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_percentiles_count_every_voxel(dtype):
  rng = np.random.default_rng(0)
  # Every third column is bright: a stride of three would see nothing else.
  volume = rng.integers(0, 100, (4, 50, 48)).astype(dtype)
  volume[..., ::3] += 100
  if dtype in ("int16", "float32"):
    volume -= 90
  if dtype == "float32":
    volume += rng.standard_normal(volume.shape, np.float32)
    volume[0, 0, :4] = 0.0, -0.0, 1e-40, -3e38
  shares = (0, 0.5, 33.3, 50, 99.5, 100)
  np.testing.assert_allclose(
      percentiles(volume, shares), np.percentile(volume.astype(float), shares),
      rtol=1e-6, atol=1e-6,
  )


def test_threads_side_by_side_give_what_one_gives():
  volumes = [
      np.random.default_rng(s).integers(0, 255, (10, 60, 50)).astype(np.uint8)
      for s in range(16)
  ]
  alone = [ops.resample(record(v), canvas=(5, 20, 40)).volume for v in volumes]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(
        lambda v: ops.resample(record(v), canvas=(5, 20, 40)).volume, volumes
    ))
  for one, other in zip(alone, found, strict=True):
    np.testing.assert_array_equal(one, other)


def test_importing_the_ops_does_not_import_the_compiler():
  done = subprocess.run(
      [sys.executable, "-c",
       "import sys; from vjepa_jax.data import ops; print('numba' in sys.modules)"],
      capture_output=True, text=True, check=True,
  )
  assert done.stdout.strip() == "False"
