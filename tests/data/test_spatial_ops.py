"""Claims of the ops that a config can name: geometry, values, slices, MONAI."""

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from vjepa_jax import data
from vjepa_jax.data import ops
from vjepa_jax.data.ops import intensity, spatial
from vjepa_jax.data.record import ReadError, Record

NAN = math.nan


def record(volume, spacing=(NAN, 3.0, 2.0, 1.0), **meta):
  if volume.ndim == 3:
    volume = volume[None, ..., None]
  return Record(volume, np.array(spacing, np.float32), "scan", meta=meta)


def noise(shape=(6, 7, 8), dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  values = rng.random(shape) * 200 + 20
  return values.astype(dtype)


def apply(found, name, **options):
  return ops.OPS[name](**options)(found, np.random.default_rng(0))


def places(found):
  """Returns [Z, Y, X, 3], mm of each voxel's centre by the Record's affine."""
  affine = np.array(found.meta["affine"])
  index = np.indices(found.volume.shape[1:4])[::-1]  # x, y, z
  return np.moveaxis(np.tensordot(affine[:3, :3], index, 1), 0, -1) + affine[:3, 3]


LINEAR = np.array([0.5, -0.7, 0.9])


def linear(shape=(6, 7, 8), affine=None):
  """Returns a Record whose values are a linear function of the place in mm."""
  affine = np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine
  lengths = np.linalg.norm(affine[:3, :3], axis=0)
  found = record(
      np.zeros(shape, np.float32), (NAN, *lengths[::-1]), affine=affine.tolist()
  )
  values = (places(found) @ LINEAR).astype(np.float32)
  return record(values, (NAN, *lengths[::-1]), affine=affine.tolist())


OBLIQUE = np.array([
    [0.0, -1.5, 0.3, 12], [1.2, 0.1, 0, -7], [0, 0.2, 2.5, 30], [0, 0, 0, 1.0]
])


@pytest.mark.parametrize("name, options", [
    ("spacing", {"spacing_mm": (1.7, 1.1, 0.9)}), ("orientation", {"axcodes": "LPS"}),
    ("orientation", {"axcodes": "AIR"}),
    ("resize", {"size": (6, 14, 5), "mode": "trilinear"}),
    ("resize", {"size": (3, 7, 4)}), ("pad_or_crop", {"size": (4, 5, 6)}),
    ("crop_foreground", {"above": -8.0}),
])
@pytest.mark.parametrize("affine", [None, OBLIQUE])
def test_the_affine_stays_true_to_the_voxels(name, options, affine):
  found = apply(linear(affine=affine), name, **options)
  wanted = places(found) @ LINEAR
  inner = (slice(1, -1),) * 3
  np.testing.assert_allclose(
      found.volume[0, ..., 0][inner], wanted[inner], atol=1e-3 * np.abs(wanted).max()
  )
  np.testing.assert_allclose(
      found.spacing[1:],
      np.linalg.norm(np.array(found.meta["affine"])[:3, :3], axis=0)[::-1], rtol=1e-5,
  )
  assert found.mean == pytest.approx(found.volume.mean(), abs=1e-3)


@pytest.mark.parametrize("policy, options", [
    ("resize", {}), ("fov", {"fov_mm": (9, 10, 11)}), ("fov", {"fov_mm": (40, 9, 40)}),
    ("spacing", {"spacing_mm": (2.0, 2.5, 1.5)}),
])
def test_resampling_onto_a_canvas_keeps_the_affine_true(policy, options):
  source = linear((12, 14, 16))
  found = ops.resample(source, canvas=(9, 8, 8), policy=policy, **options)
  wanted = places(found) @ LINEAR
  inside = np.pad(np.all([
      (p >= 0) & (p <= (n - 1) * d)
      for p, n, d in zip(np.moveaxis(places(found), -1, 0), (16, 14, 12), (1, 2, 3))
  ], axis=0), 1)
  # The outermost voxel of what is cut or padded holds no interpolation.
  for axis in range(3):
    inside &= np.roll(inside, 1, axis) & np.roll(inside, -1, axis)
  inside = inside[1:-1, 1:-1, 1:-1]
  assert inside.mean() > 0.02
  np.testing.assert_allclose(found.volume[0, ..., 0][inside], wanted[inside], atol=2e-3)


def test_spacing_keeps_types_and_all_time_points_and_channels():
  volume = noise((3, 6, 7, 8, 2), np.uint16)
  found = apply(record(volume), "spacing", spacing_mm=(1.5, 1.5, 1.5))
  assert found.volume.dtype == np.uint16 and found.volume.shape == (3, 11, 9, 6, 2)
  alone = apply(record(volume[2, ..., 1].copy()), "spacing", spacing_mm=(1.5, 1.5, 1.5))
  np.testing.assert_array_equal(found.volume[2, ..., 1], alone.volume[0, ..., 0])
  exact, _ = spatial.spacing(
      volume[2, ..., 1].transpose(2, 1, 0)[None], np.diag([1.0, 2, 3, 1]), (1.5,) * 3
  )
  np.testing.assert_allclose(
      alone.volume[0, ..., 0], exact[0].transpose(2, 1, 0), atol=0.5001
  )


def test_a_spacing_that_is_there_already_changes_nothing():
  volume, affine = noise((1, 6, 7, 8)), np.diag([1.0, 2, 3, 1])
  found, moved = spatial.spacing(volume, affine, (1.0004, -1, 0))
  np.testing.assert_array_equal(found, volume)
  np.testing.assert_array_equal(moved, affine)


@pytest.mark.parametrize("n, size, first", [(8, 5, 2), (7, 4, 1), (9, 5, 2), (6, 4, 1)])
def test_a_crop_about_the_centre_starts_where_monais_does(n, size, first):
  volume = np.broadcast_to(np.arange(n), (1, 3, 3, n))
  found = spatial.pad_or_crop(volume, (3, 3, size))
  np.testing.assert_array_equal(found[0, 0, 0], np.arange(first, first + size))


def test_labels_stay_labels_under_nearest():
  labels = np.random.default_rng(0).integers(0, 4, (6, 7, 8)).astype(np.uint8) * 60
  found = apply(record(labels), "spacing", spacing_mm=(1, 1, 1), mode="nearest")
  assert set(np.unique(found.volume)) <= {0, 60, 120, 180}


@pytest.mark.parametrize("name, options, reason", [
    ("spacing", {"spacing_mm": (1, 1, 1)}, "missing_spacing"),
    ("orientation", {}, "missing_spacing"),
    ("even_slices", {}, "missing_spacing"),
    ("crop_foreground", {"above": 1e6}, "constant"),
])
def test_what_a_recording_lacks_is_refused(name, options, reason):
  with pytest.raises(ReadError) as caught:
    apply(record(noise(), (NAN,) * 4), name, **options)
  assert caught.value.reason == reason


def test_a_spacing_that_asks_for_too_much_is_refused():
  with pytest.raises(ReadError) as caught:
    apply(record(noise()), "spacing", spacing_mm=(1e-4, 1e-4, 1e-4))
  assert caught.value.reason == "too_large"


@pytest.mark.parametrize("name, options", [
    ("spacing", {"spacing_mm": (3, 2, 0.5)}), ("resize", {"size": (1024, 1024, 16)}),
    ("pad_or_crop", {"size": (1024, 1024, 16)}),
])
def test_all_time_points_and_channels_count_before_a_result_is_made(name, options):
  if name == "spacing":
    options = options | {"max_voxels": 9 * 2 * 6 * 7 * 15 - 1}
  found = record(np.zeros((9, 6, 7, 8, 2), np.uint8) if name == "spacing" else
                 np.zeros((65, 1, 1, 1, 1), np.uint8))
  with pytest.raises(ReadError, match="more than max_voxels") as caught:
    apply(found, name, **options)
  assert caught.value.reason == "too_large"


@pytest.mark.parametrize("value", [-1, 256.0, 0.5])
def test_padding_that_the_type_cannot_hold_is_refused_and_never_wraps(value):
  with pytest.raises(ReadError, match="cannot be padded with") as caught:
    apply(record(noise(dtype=np.uint8)), "pad_or_crop", size=(9, 9, 9), value=value)
  assert caught.value.reason == "unsupported_pixels"
  padded = apply(record(noise()), "pad_or_crop", size=(9, 9, 9), value=value)
  assert padded.volume[0, 0, 0, 0, 0] == value


@pytest.mark.parametrize("how", ["max", "mean"])
@pytest.mark.parametrize("place, axis", enumerate("ZYX"))
def test_a_projection_is_one_voxel_as_long_as_the_volume(place, axis, how):
  source = linear((6, 7, 9), OBLIQUE)
  found = apply(source, "project", axis=axis, how=how)
  wanted = getattr(source.volume, how)(axis=place + 1, keepdims=True)
  np.testing.assert_allclose(found.volume, wanted, rtol=1e-5)
  assert found.volume.dtype == source.volume.dtype
  times = found.spacing[1:] / source.spacing[1:]
  assert times[place] == pytest.approx((6, 7, 9)[place])
  if how == "mean":  # Of a linear function its value at the centre.
    np.testing.assert_allclose(
        found.volume[0, ..., 0], places(found) @ LINEAR, rtol=1e-4
    )


def test_a_mean_projection_of_whole_numbers_is_rounded():
  volume = np.array([[[0]], [[1]], [[1]]], np.uint8)
  assert apply(record(volume), "project", how="mean").volume.ravel() == [1]


def test_numbers_of_ops_that_are_none_are_faults():
  steps = [
      {"name": "pad_or_crop", "size": (1, 1, 1), "value": "x"},
      {"name": "pad_or_crop", "size": (1, 1, 1), "value": NAN},
      {"name": "crop_foreground", "above": NAN},
      {"name": "crop_foreground", "margin": 0.5},
      {"name": "project", "axis": "T"},
      {"name": "project", "how": "median"},
      {"name": "normalize_intensity", "divisor": NAN},
      {"name": "normalize_intensity", "subtrahend": (1, 2)},
      {"name": "scale_range", "a_min": 0, "a_max": math.inf},
  ]
  assert [f.split("]")[0] for f in ops.op_faults(steps)] == [
      f"ops[{n}" for n in range(len(steps))
  ]


def test_ops_on_values_are_those_on_arrays():
  volume = noise((2, 6, 7, 8, 3), np.uint16)
  first = np.moveaxis(volume, -1, 0)
  for name, function, options in (
      ("normalize_intensity", intensity.normalize_intensity, {"channel_wise": True}),
      ("scale_range", intensity.scale_range, {"a_min": 30, "a_max": 90, "clip": True}),
      ("scale_percentiles", intensity.scale_percentiles,
       {"lower": 2, "upper": 97, "clip": True, "channel_wise": True}),
      ("clip_percentiles", intensity.clip_percentiles, {"lower": 5, "upper": 60}),
  ):
    found = apply(record(volume), name, **options)
    wanted = np.moveaxis(function(first, **options), 0, -1)
    np.testing.assert_array_equal(found.volume, wanted)
    assert found.mean == pytest.approx(wanted.mean(), abs=1e-4)
  assert found.volume.dtype == np.uint16
  assert found.volume.max() == round(np.percentile(volume, 60))


def tilted(steps, shear_per_mm, shape=(40, 36)):
  """Returns a series of a smooth function sampled on shifted, uneven slices."""
  positions = np.cumsum([0.0, *steps])
  shear = positions[:, None] * np.array(shear_per_mm)
  y = np.arange(shape[0]) * 0.5 + shear[:, :1]
  x = np.arange(shape[1]) * 0.5 + shear[:, 1:]
  volume = smooth(positions[:, None, None], y[:, :, None], x[:, None, :])
  meta = {"slice_positions_mm": positions.tolist(), "gantry_tilt_deg": 1.0}
  if np.any(shear):
    meta["slice_shear_mm"] = shear.tolist()
  return record(volume.astype(np.float32), (NAN, NAN, 0.5, 0.5), **meta), shear


def smooth(z, y, x):
  return 100 + 3 * z + 10 * np.sin(y / 4) + 8 * np.cos(x / 5)


@pytest.mark.parametrize("shear", [(0, 0), (-0.33, 0), (0.4, -0.25)])
@pytest.mark.parametrize("steps", [(2.0,) * 9, (1.14, 4.22, 4.22, 7.38, 1.14)])
def test_tilted_and_unequal_slices_become_straight_and_even(steps, shear):
  source, offsets = tilted(steps, shear)
  found = apply(source, "even_slices", step_mm=1.5)
  volume = found.volume[0, ..., 0]
  np.testing.assert_array_equal(found.spacing, np.float32([NAN, 1.5, 0.5, 0.5]))
  z = np.arange(len(volume)) * 1.5
  y, x = (
      low + np.arange(n) * 0.5
      for low, n in zip(offsets.min(axis=0), volume.shape[1:], strict=True)
  )
  wanted = smooth(z[:, None, None], y[:, None], x)
  # Where the slices around lie; elsewhere the lowest value.
  positions = np.cumsum([0.0, *steps])
  inside = np.ones(volume.shape, bool)
  for index, at in enumerate(z):
    for k in {int(np.searchsorted(positions, at, "right")) - 1,
              min(int(np.searchsorted(positions, at)), len(positions) - 1)}:
      dy, dx = offsets[k]
      inside[index] &= ((y >= dy) & (y <= dy + 19.5))[:, None]
      inside[index] &= (x >= dx) & (x <= dx + 17.5)
  assert inside.mean() > 0.3
  assert np.abs(volume - wanted)[inside].max() < 0.6
  assert volume.min() == pytest.approx(source.volume.min())
  assert not any(k.startswith(("slice_", "gantry")) for k in found.meta)


def test_even_straight_slices_are_left_alone():
  source, _ = tilted((2.0,) * 5, (0, 0))
  assert apply(source, "even_slices") is source
  plain = record(noise())
  assert apply(plain, "even_slices") is plain


def test_the_step_is_the_median_and_a_wide_gap_can_be_refused():
  source, _ = tilted((1.0, 2.0, 2.0, 2.0, 9.0), (0, 0))
  found = apply(source, "even_slices")
  assert found.spacing[1] == 2 and found.volume.shape[1] == 9
  with pytest.raises(ReadError) as caught:
    apply(source, "even_slices", max_step_mm=5.0)
  assert caught.value.reason == "slices_missing"
  with pytest.raises(ReadError) as caught:
    apply(source, "even_slices", step_mm=1e-6)
  assert caught.value.reason == "too_large"


def test_the_real_tilted_head_becomes_a_volume_of_even_slices(shared):
  source = data.read(str(shared("data/ge_head_ct_28_dicom.zip")))
  assert source.meta["gantry_tilt_deg"] == pytest.approx(18.5, abs=0.1)
  found = apply(source, "even_slices", step_mm=2.0)
  positions = source.meta["slice_positions_mm"]
  assert found.volume.shape[1] == int((positions[-1] - positions[0]) / 2) + 1
  assert found.volume.dtype == np.int16 and found.spacing[1] == 2
  shift = np.ptp(np.array(source.meta["slice_shear_mm"])[:, 0])
  grown = found.volume.shape[2] - 512
  assert grown == math.ceil(shift / source.spacing[2])
  # A straight head: the bone of neighbouring slices lies on itself as well as it did
  # along the tilted axis, which it does only if slices moved the right way.
  bone = found.volume[0, ..., 0] > 300
  overlap = [
      (a & b).sum() / max(1, (a | b).sum()) for a, b in zip(bone[20:-20], bone[21:-19])
  ]
  wrong = dict(source.meta, slice_shear_mm=[
      [-dy, -dx] for dy, dx in source.meta["slice_shear_mm"]
  ])
  bent = apply(
      Record(source.volume, source.spacing, "", meta=wrong), "even_slices", step_mm=2.0
  ).volume[0, ..., 0] > 300
  bent_overlap = [
      (a & b).sum() / max(1, (a | b).sum()) for a, b in zip(bent[20:-20], bent[21:-19])
  ]
  assert np.mean(overlap) > np.mean(bent_overlap) + 0.05


def test_faults_of_ops_are_named_before_any_file_is_read():
  assert ops.op_faults([
      {"name": "spacing", "spacing_mm": (1, 1, 1)}, {"name": "even_slices"},
      {"name": "scale_range", "a_min": -1000, "a_max": 1000},
  ]) == []
  faults = ops.op_faults([
      {"name": "spacings"}, {"name": "spacing"}, {"name": "resize", "sise": (1, 2, 3)},
      {"name": "spacing", "spacing_mm": (1, 1)},
      {"name": "spacing", "spacing_mm": (1, 1, 0)},
      {"name": "orientation", "axcodes": "RRS"},
      {"name": "clip_percentiles", "lower": 90, "upper": 10}, {},
      {"name": "even_slices", "step_mm": -1}, {"name": "resize", "size": (4, 4, 4.5)},
      {"name": "spacing", "spacing_mm": (1, 1, 1), "mode": "cubic"},
      {"name": "scale_range", "a_min": 3, "a_max": 3},
  ])
  words = [
      "ops[0]: unknown name 'spacings'; closest ['spacing'", "'spacing_mm' is missing",
      "unknown option 'sise'; closest ['size'", "'size' is missing", "three positive",
      "three positive", "axcodes is 'RRS'", "must rise", "ops[7]: unknown name None",
      "step_mm is -1", "three positive whole", "mode is 'cubic'", "must rise",
  ]
  assert len(faults) == len(words)
  for fault, word in zip(faults, words, strict=True):
    assert word in fault, fault


def test_every_op_is_described():
  for name, factory in ops.OPS.items():
    assert factory.__doc__, name


MONAI_OPS = (
    ("RandAffined", {"prob": 1.0, "rotate_range": [0.3] * 3}),
    ("RandFlipd", {"prob": 0.5}), ("Spacingd", {"pixdim": (1.0, 1.0, 1.5)}),
    ("Orientationd", {"axcodes": "LPS"}), ("Resized", {"spatial_size": (5, 6, 7)}),
    ("RandSpatialCropd", {"roi_size": (4, 4, 4), "random_size": False}),
    ("NormalizeIntensityd", {}), ("Rotate90d", {"spatial_axes": (0, 1)}),
)


@pytest.mark.parametrize("name, options", MONAI_OPS)
def test_a_transform_of_monai_is_an_op(name, options):
  pytest.importorskip("monai")
  source = linear(affine=OBLIQUE)
  op = ops.OPS["monai"](transform=name, options=options)
  first, again = (op(source, np.random.default_rng(5)) for _ in range(2))
  np.testing.assert_array_equal(first.volume, again.volume)
  assert first.volume.dtype == np.float32 and first.volume.shape[0] == 1
  np.testing.assert_allclose(
      first.spacing[1:],
      np.linalg.norm(np.array(first.meta["affine"])[:3, :3], axis=0)[::-1], rtol=1e-5,
  )
  if name in ("Spacingd", "Orientationd", "RandSpatialCropd", "Rotate90d", "RandFlipd"):
    wanted = places(first) @ LINEAR
    inner = (slice(1, -1),) * 3
    # Spacing drops the shear that this oblique affine has, and with it the place.
    if name != "Spacingd":
      found = first.volume[0, ..., 0]
      np.testing.assert_allclose(found[inner], wanted[inner], atol=0.02)
  if name.startswith("Rand"):
    others = [op(source, np.random.default_rng(s)).volume for s in range(6)]
    assert any(not np.array_equal(first.volume, other) for other in others)


def test_monai_and_this_library_agree_through_the_op():
  pytest.importorskip("monai")
  source = record(noise())
  for name, theirs, ours in (
      ("Spacingd", {"pixdim": (1.5,) * 3}, ("spacing", {"spacing_mm": (1.5,) * 3})),
      ("Resized", {"spatial_size": (5, 9, 4)}, ("resize", {"size": (4, 9, 5)})),
      ("ResizeWithPadOrCropd", {"spatial_size": (5, 9, 4)},
       ("pad_or_crop", {"size": (4, 9, 5), "value": 0.0})),
      ("NormalizeIntensityd", {}, ("normalize_intensity", {})),
  ):
    found = apply(source, "monai", transform=name, options=theirs)
    wanted = apply(source, ours[0], **ours[1])
    np.testing.assert_allclose(found.volume, wanted.volume, atol=2e-4, err_msg=name)
    np.testing.assert_allclose(found.spacing, wanted.spacing, rtol=1e-5, err_msg=name)


def test_unknown_spacing_stays_unknown_through_monai():
  pytest.importorskip("monai")
  source = record(noise((6, 7, 8)), (NAN, NAN, 2.0, 1.0))
  found = apply(
      source, "monai", transform="Resized", options={"spatial_size": (4, 7, 3)}
  )
  np.testing.assert_array_equal(found.spacing, np.float32([NAN, NAN, 2.0, 2.0]))
  turned = apply(
      source, "monai", transform="Rotate90d", options={"spatial_axes": (1, 2)}
  )
  np.testing.assert_array_equal(turned.spacing, np.float32([NAN, 2.0, NAN, 1.0]))


def test_time_points_share_one_draw_of_monai():
  pytest.importorskip("monai")
  one = noise((6, 7, 8))
  movie = np.stack([one, one])[..., None]
  found = apply(
      record(movie), "monai", transform="RandAffined",
      options={"prob": 1.0, "rotate_range": [0.3] * 3},
  )
  np.testing.assert_array_equal(found.volume[0], found.volume[1])


def test_a_composed_transform_of_monai_is_an_op_too():
  pytest.importorskip("monai")
  from monai import transforms

  op = ops.OPS["monai"](transform=transforms.Compose([
      transforms.RandFlipd(keys="image", prob=0.5, spatial_axis=0),
      transforms.RandGaussianNoised(keys="image", prob=1.0, std=0.1),
  ]))
  source = record(noise())
  first, again = (op(source, np.random.default_rng(3)).volume for _ in range(2))
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, op(source, np.random.default_rng(4)).volume)


def test_names_that_monai_lacks_are_named():
  pytest.importorskip("monai")
  (fault,) = ops.op_faults([{"name": "monai", "transform": "RandAffine3d"}])
  assert "RandAffined" in fault
  (fault,) = ops.op_faults([
      {"name": "monai", "transform": "Resized", "options": {"sise": 3}}
  ])
  assert "sise" in fault


def test_monai_missing_names_the_extra():
  script = (
      "import sys; sys.modules['monai'] = None\n"
      "from vjepa_jax.data import ops\n"
      "print(ops.op_faults([{'name': 'monai', 'transform': 'Resized'}]))"
  )
  done = subprocess.run(
      [sys.executable, "-c", script], capture_output=True, text=True, check=True
  )
  assert "vjepa_jax[monai]" in done.stdout


def test_records_survive_pickling_after_ops():
  found = apply(linear(), "spacing", spacing_mm=(1, 1, 1))
  again = pickle.loads(pickle.dumps(found))
  np.testing.assert_array_equal(found.volume, again.volume)
