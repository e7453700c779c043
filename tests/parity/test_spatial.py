"""Spatial and intensity ops against MONAI, nibabel and SciPy."""

import numpy as np
import pytest

from tests.parity import cases
from vjepa_jax.data import readers
from vjepa_jax.data.ops import intensity, spatial

AFFINES = ("diag", "flip", "perm", "oblique")


class Checked:
  """A case that knows which of its keys were compared."""

  def __init__(self, path):
    self.case = cases.load(path)
    self.done = set()

  def __getitem__(self, name):
    return self.case[name]

  def check(self, name, got):
    self.done.add(name)
    self.case.check(name, got)

  def near(self, name, got, rtol=1e-6):
    """For keys without a tolerance: rtol of the largest value."""
    self.done.add(name)
    want = self.case[name]
    assert np.shape(got) == want.shape, name
    np.testing.assert_allclose(
        got, want, rtol=0, atol=rtol * np.abs(want).max(), err_msg=name
    )

  def assert_all_compared(self, inputs):
    left = {
        k for k in self.case.arrays if k not in self.done and not k.startswith(inputs)
    }
    assert not left, f"not compared: {sorted(left)}"


@pytest.fixture(scope="module")
def monai(shared):
  return Checked(shared("fixtures/parity/monai_spatial_intensity"))


@pytest.fixture(scope="module")
def original(monai):
  """What spacing and orientation were given.

  A later transform of the reference wrote into `in/volume`; the flipped copy of the
  diagonal affine was made before.
  """
  return monai["orient_LPS_diag/out"][:, ::-1, ::-1]


@pytest.fixture(scope="module")
def nibabel_case(shared):
  return Checked(shared("fixtures/parity/nibabel_orientation"))


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("setting", [
    "bilinear", "bilinear_align", "bilinear_diag", "zeros_pad", "scale_extent",
])
def test_spacing_is_monais(monai, original, name, setting):
  options = dict(monai.case.config[f"spacing_{setting}"])
  options.pop("align_corners", None)  # It changes nothing but rounding.
  options["padding"] = options.pop("padding_mode", "border")
  if setting == "zeros_pad":
    options["padding"] = "zeros"
  got, affine = spatial.spacing(original, monai[f"affine/{name}"], **options)
  monai.check(f"spacing_{name}_{setting}/out", got)
  monai.near(f"spacing_{name}_{setting}/affine", affine)


@pytest.mark.parametrize("name", AFFINES)
def test_nearest_spacing_is_monais_but_for_ties(monai, name):
  labels, affine = monai["in/labels"], monai[f"affine/{name}"]
  pixdim = monai.case.config["spacing_nearest"]["pixdim"]
  key = f"spacing_{name}_nearest"
  got, moved = spatial.spacing(labels, affine, pixdim, mode="nearest")
  monai.near(f"{key}/affine", moved)
  want = monai[f"{key}/out"]
  if name in ("diag", "perm"):
    np.testing.assert_array_equal(got, want)
  change = np.linalg.solve(affine, moved)
  # Halfway between two voxels the reference's rounding noise decides.
  near = []
  for ways in np.ndindex(2, 2, 2):
    shifted = change.copy()
    shifted[:3, 3] += 1e-6 * (2 * np.array(ways) - 1)
    near.append(spatial.sample(labels, shifted, want.shape[1:], mode="nearest"))
  tied = np.ptp(near, axis=0) > 0
  assert tied.mean() < 0.5
  np.testing.assert_array_equal(np.where(tied, want, got), want)
  assert (np.array(near) == want).any(axis=0).all()
  monai.done.add(f"{key}/out")


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("codes", ["RAS", "LPS"])
def test_orientation_is_monais(monai, original, name, codes):
  # An identity shares its memory with what was written into.
  same = (name, codes) in (("diag", "RAS"), ("oblique", "RAS"))
  volume = monai["in/volume"] if same else original
  got, affine = spatial.orientation(volume, monai[f"affine/{name}"], codes)
  monai.check(f"orient_{codes}_{name}/out", got)
  monai.near(f"orient_{codes}_{name}/affine", affine, 1e-12)
  assert spatial.axis_codes(affine) == codes


@pytest.mark.parametrize("name, options", [
    ("trilinear", {"mode": "trilinear"}),
    ("trilinear_align", {"mode": "trilinear", "align_corners": True}),
    ("trilinear_aa", {"mode": "trilinear", "antialias": True}),
    ("nearest", {"mode": "nearest"}), ("area", {"mode": "area"}),
])
@pytest.mark.parametrize("size", [(13, 16, 9), (4, 5, 6)])
def test_resize_is_monais(monai, name, options, size):
  way = "up" if size == (13, 16, 9) else "down"
  monai.check(
      f"resize_{name}_{way}/out", spatial.resize(monai["in/volume"], size, **options)
  )


def test_padding_and_cropping_are_monais(monai):
  monai.check(
      "pad_or_crop/out", spatial.pad_or_crop(monai["in/volume"], (12, 5, 8))
  )
  monai.check("crop_foreground/out", spatial.crop_foreground(monai["in/foreground"]))


@pytest.mark.parametrize("name, source", [
    ("plain", "in/volume"), ("channel_wise", "in/volume"),
    ("nonzero", "in/volume_with_zeros"), ("nonzero_channel", "in/volume_with_zeros"),
    ("fixed", "in/volume"), ("constant", None),
])
def test_normalize_intensity_is_monais(monai, name, source):
  volume = monai[source] if source else np.full_like(monai["in/volume"], 3)
  options = monai.case.config[f"normalize_{name}"]
  monai.check(f"normalize/{name}", intensity.normalize_intensity(volume, **options))


def test_scaling_of_values_is_monais(monai):
  volume = monai["in/volume"]
  monai.check("scale_range/clip", intensity.scale_range(volume, -1, 4, clip=True))
  monai.check(
      "scale_percentiles/1_99",
      intensity.scale_percentiles(volume, 1, 99, clip=True),
  )


def test_every_tensor_of_monais_case_is_compared(monai, request):
  _skip_unless_whole(request, "monais")
  monai.assert_all_compared(("in/", "affine/"))


ORIENTATIONS = [f"case{n}" for n in range(0, 30, 2)]


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_orientation_is_nibabels(nibabel_case, name):
  case = nibabel_case
  volume, affine = case[f"{name}/in"], case[f"{name}/affine"]
  case.near(f"{name}/ornt", spatial.closest_axes(affine), 0)
  assert spatial.axis_codes(affine) == case.case.config[name]
  first = volume[None] if volume.ndim == 3 else np.moveaxis(volume, -1, 0)
  got, moved = spatial.orientation(first, affine)
  got = got[0] if volume.ndim == 3 else np.moveaxis(got, 0, -1)
  case.check(f"{name}/out", got)
  case.near(f"{name}/out_affine", moved, 1e-12)
  zooms = case[f"{name}/zooms"]
  lengths = np.linalg.norm(moved[:3, :3], axis=0)
  case.near(f"{name}/zooms", [*lengths, *zooms[3:]])


@pytest.mark.parametrize("name, ending", [
    ("scaled_int16", "nii.gz"), ("qform_only", "nii"), ("fourd", "nii.gz"),
])
def test_files_read_as_nibabel_reads_them(nibabel_case, name, ending):
  case = nibabel_case
  record = readers.read(str(case.case.path / f"{name}.{ending}"))
  want, affine = case[f"file_{name}/data"], case[f"file_{name}/affine"]
  first = want[None] if want.ndim == 3 else np.moveaxis(want, -1, 0)
  turned, moved = spatial.orientation(first, affine)
  back = np.linalg.solve(np.array(record.meta["affine"]), moved)
  np.testing.assert_allclose(back, np.eye(4), atol=1e-6)
  got = record.volume[..., 0].transpose(0, 3, 2, 1)  # [T, X, Y, Z]
  # Turned back by nibabel's own axes, the voxels are nibabel's.
  axes = spatial.axis_codes(affine)
  stored, stored_affine = spatial.orientation(got, moved, axes)
  stored = stored[0] if want.ndim == 3 else np.moveaxis(stored, 0, -1)
  case.near(f"file_{name}/data", stored, 1e-7)
  case.near(f"file_{name}/affine", stored_affine)
  np.testing.assert_array_equal(got, turned.astype(np.float32))
  assert record.meta["orientation"] == axes


@pytest.mark.parametrize("key, options", [
    ("order0", {"mode": "nearest-exact", "align_corners": True}),
    ("order0_gridmode", {"mode": "nearest-exact"}),
    ("order1", {"mode": "trilinear", "align_corners": True}),
    ("order1_gridmode", {"mode": "trilinear"}),
    ("order3", {"mode": "cubic", "align_corners": True}),
    ("order3_gridmode", {"mode": "cubic"}),
])
def test_resize_is_scipys_zoom(nibabel_case, key, options):
  want = nibabel_case[f"zoom/{key}"]
  got = spatial.resize(nibabel_case["zoom/in"][None], want.shape, **options)[0]
  nibabel_case.near(f"zoom/{key}", got)


def test_sampling_is_scipys_affine_transform(nibabel_case):
  case = nibabel_case
  change = np.eye(4)
  change[:3, :3] = case["affine_transform/matrix"]
  change[:3, 3] = case["affine_transform/offset"]
  got = spatial.sample(case["zoom/in"][None], change, case["zoom/in"].shape)[0]
  case.near("affine_transform/order1", got)


def test_every_tensor_of_nibabels_case_is_compared(nibabel_case, request):
  _skip_unless_whole(request, "nibabels")
  inputs = ("zoom/in", "affine_transform/matrix", "affine_transform/offset", *(
      f"{n}/{k}" for n in ORIENTATIONS for k in ("in", "affine")
  ))
  # A Gaussian filter by itself is no host op; within Resize it is MONAI's.
  nibabel_case.assert_all_compared((*inputs, "gaussian/sigma1"))


def _skip_unless_whole(request, name):
  """What was compared is known only where the whole file ran."""
  ran = [i for i in request.session.items if i.fspath == request.node.fspath]
  if len(ran) < 60:
    pytest.skip(f"some of {name} tests were left out of this run")
