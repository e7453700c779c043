"""Claims of data/readers/nifti.py."""

import gzip
import io
import math
import resource
import struct
import subprocess
import sys
import time

import nibabel
import numpy as np
import pytest

from tests.data import library_files_nifti
from vjepa_jax import data
from vjepa_jax.data.record import ReadError

RAMP = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
# Offsets of fields in a NIfTI-1 header.
DIM, INTENT, DATATYPE, BITPIX, PIXDIM, VOX_OFFSET = 40, 68, 70, 72, 76, 108
SLOPE, INTER, UNITS, QFORM, SFORM, SROW, MAGIC = 112, 116, 123, 252, 254, 280, 344


def nifti(array=RAMP, affine=None, *, version=1, units=("mm", "sec"), **fields):
  """Returns the content of a .nii file; `fields` are set in its header."""
  kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
  image = kind(array, np.diag([2.0, 3.0, 4.0, 1.0]) if affine is None else affine)
  image.header.set_xyzt_units(*units)
  for name, value in fields.items():
    image.header[name] = value
  return image.to_bytes()


def patch(content, offset, kind, *values):
  """Returns the content with numbers written over those at an offset."""
  written = struct.pack(f"<{len(values)}{kind}", *values)
  return content[:offset] + written + content[offset + len(written):]


def read(content, tmp_path, name="scan.nii", **options):
  path = tmp_path / name
  path.write_bytes(content)
  return data.read(str(path), **options)


def refused(content, tmp_path, name="scan.nii", **options):
  with pytest.raises(ReadError) as caught:
    read(content, tmp_path, name, **options)
  assert caught.value.path.endswith(name)
  assert caught.value.remedy
  return caught.value


def test_axes_become_zyx_with_their_spacing(tmp_path):
  record = read(nifti(), tmp_path)
  np.testing.assert_array_equal(record.volume[0, ..., 0], RAMP.transpose(2, 1, 0))
  assert record.volume.dtype == np.int16
  np.testing.assert_array_equal(record.spacing, [math.nan, 4, 3, 2])
  assert record.meta["orientation"] == "RAS"
  assert record.meta["spacing_source"] == "file"
  assert record.meta["affine"] == np.diag([2.0, 3.0, 4.0, 1.0]).tolist()


@pytest.mark.parametrize("codes", ["LPS", "PIR", "SRA", "AIL", "LAS"])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_any_orientation_becomes_canonical(tmp_path, codes, name):
  axes = nibabel.orientations.axcodes2ornt(codes)
  affine = np.zeros((4, 4))
  for stored, (axis, way) in enumerate(axes):
    affine[int(axis), stored] = way * (2.0 + stored)
  affine[:3, 3], affine[3, 3] = (7, -8, 9), 1
  content = nifti(affine=affine)
  content = gzip.compress(content) if name.endswith("gz") else content
  record = read(content, tmp_path, name)
  wanted = nibabel.as_closest_canonical(nibabel.Nifti1Image(RAMP, affine))
  np.testing.assert_array_equal(
      record.volume[0, ..., 0], np.asarray(wanted.dataobj).transpose(2, 1, 0)
  )
  np.testing.assert_allclose(record.spacing[1:], wanted.header.get_zooms()[::-1])
  np.testing.assert_allclose(record.meta["affine"], wanted.affine)
  assert record.meta["orientation"] == codes
  # The affine still points each voxel at the same place.
  place = np.array(record.meta["affine"]) @ [1, 2, 0, 1]
  index = np.rint(np.linalg.solve(affine, place)).astype(int)[:3]
  assert record.volume[0, 0, 2, 1, 0] == RAMP[tuple(index)]


def test_content_decides_not_the_name(tmp_path):
  zipped = gzip.compress(nifti())
  for name in ("scan.nii", "scan.dcm", "scan"):
    np.testing.assert_array_equal(
        read(zipped, tmp_path, name).volume, read(nifti(), tmp_path).volume
    )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("big", [False, True])
def test_versions_and_byte_orders_read_alike(tmp_path, version, big):
  kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
  header = kind.header_class(endianness="><"[1 - big])
  header.set_data_dtype(np.int16)
  image = kind(RAMP, np.diag([2.0, 3.0, 4.0, 1.0]), header)
  image.header.set_xyzt_units("mm")
  content = image.to_bytes()
  record = read(content, tmp_path)
  np.testing.assert_array_equal(record.volume[0, ..., 0], RAMP.transpose(2, 1, 0))
  assert record.meta["format"] == f"NIfTI-{version}"
  assert record.volume.dtype.isnative


@pytest.mark.parametrize("kind", [
    np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64,
    np.float32, np.float64,
])
def test_every_type_of_number_keeps_its_values(tmp_path, kind):
  least = 0 if np.dtype(kind).itemsize == 1 else 300
  array = (np.arange(120).reshape(4, 5, 6) + least).astype(kind)
  image = nibabel.Nifti1Image(array, np.eye(4), dtype=kind)
  record = read(image.to_bytes(), tmp_path)
  np.testing.assert_array_equal(
      record.volume[0, ..., 0], array.transpose(2, 1, 0).astype(np.float64)
  )
  assert record.volume.dtype.name in ("uint8", "int16", "uint16", "float32")


def test_scaling_equals_nibabels_in_half_the_memory(tmp_path):
  content = nifti(scl_slope=0.37, scl_inter=-5.25)
  record = read(content, tmp_path)
  wanted = nibabel.Nifti1Image.from_bytes(content).get_fdata()
  assert record.volume.dtype == np.float32
  np.testing.assert_array_equal(
      record.volume[0, ..., 0], wanted.transpose(2, 1, 0).astype(np.float32)
  )


def test_whole_scalings_keep_whole_numbers(tmp_path):
  record = read(nifti(scl_slope=1, scl_inter=-1024), tmp_path)
  assert record.volume.dtype == np.int16 and record.volume.min() == -1024
  record = read(nifti(RAMP.astype(np.uint8), scl_slope=2, scl_inter=10), tmp_path)
  assert record.volume.dtype == np.uint8 or record.volume.dtype == np.int16
  assert record.volume.max() == 2 * 119 + 10
  far = read(nifti(scl_slope=3e4, scl_inter=-1e6), tmp_path)
  assert far.volume.dtype == np.float32
  assert far.volume.max() == np.float32(119 * 3e4 - 1e6)


@pytest.mark.parametrize("slope, inter", [(0, 5), (math.nan, math.nan), (1, 0)])
def test_no_scaling_leaves_the_stored_numbers(tmp_path, slope, inter):
  record = read(
      patch(patch(nifti(), SLOPE, "f", slope), INTER, "f", inter), tmp_path
  )
  np.testing.assert_array_equal(record.volume[0, ..., 0], RAMP.transpose(2, 1, 0))


def test_units_of_length_and_time_become_mm_and_s(tmp_path):
  movie = np.arange(4 * 5 * 6 * 3, dtype=np.int16).reshape(4, 5, 6, 3)
  for length, scale in (("mm", 1.0), ("micron", 1e-3), ("meter", 1e3)):
    for clock, seconds in (("sec", 1.0), ("msec", 1e-3), ("usec", 1e-6)):
      record = read(
          patch(nifti(movie, units=(length, clock)), PIXDIM + 16, "f", 2.5), tmp_path
      )
      np.testing.assert_allclose(
          record.spacing, [2.5 * seconds, 4 * scale, 3 * scale, 2 * scale], rtol=1e-6
      )
      np.testing.assert_allclose(
          np.array(record.meta["affine"])[0, 0], 2 * scale, rtol=1e-6
      )
  np.testing.assert_array_equal(record.volume[..., 0], movie.transpose(3, 2, 1, 0))


def test_a_time_step_without_a_unit_is_unknown_until_stated(tmp_path):
  movie = np.arange(4 * 5 * 6 * 3, dtype=np.int16).reshape(4, 5, 6, 3)
  content = nifti(movie, units=("mm", "unknown"))
  assert math.isnan(read(content, tmp_path).spacing[0])
  assert math.isnan(read(nifti(movie, units=("mm", "hz")), tmp_path).spacing[0])
  assert read(content, tmp_path, time_step_s=0.5).spacing[0] == 0.5


def test_simpleitks_vectors_are_channels(tmp_path):
  vector = np.arange(4 * 5 * 6 * 3, dtype=np.int16).reshape(4, 5, 6, 1, 3)
  record = read(nifti(vector, intent_code=1007), tmp_path)
  assert record.volume.shape == (1, 6, 5, 4, 3)
  wanted = vector[..., 0, :].transpose(2, 1, 0, 3)
  np.testing.assert_array_equal(record.volume[0], wanted)
  five = np.arange(4 * 5 * 6 * 2 * 3, dtype=np.int16).reshape(4, 5, 6, 2, 3)
  np.testing.assert_array_equal(
      read(nifti(five), tmp_path).volume, five.transpose(3, 2, 1, 0, 4)
  )


def test_stated_axes_make_the_fourth_axis_channels(tmp_path):
  four = np.arange(4 * 5 * 6 * 3, dtype=np.int16).reshape(4, 5, 6, 3)
  assert read(nifti(four), tmp_path).volume.shape == (3, 6, 5, 4, 1)
  record = read(nifti(four), tmp_path, axes="CZYX")
  np.testing.assert_array_equal(record.volume[0], four.transpose(2, 1, 0, 3))
  assert refused(nifti(four), tmp_path, axes="ZYX").reason == "ambiguous_axes"
  assert refused(nifti(), tmp_path, axes="TYX").reason == "ambiguous_axes"


def test_a_picture_is_one_slice_of_unknown_thickness(tmp_path):
  record = read(nifti(RAMP[:, :, 0], np.diag([2.0, 3.0, 1.0, 1.0])), tmp_path)
  np.testing.assert_array_equal(record.volume[0, 0, ..., 0], RAMP[:, :, 0].T)
  # Its sform still has a third direction; without one the thickness is unknown.
  flat = patch(nifti(RAMP[:, :, 0]), SROW, "f", 2, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0)
  np.testing.assert_array_equal(
      read(flat, tmp_path).spacing, [math.nan, math.nan, 3, 2]
  )


def test_the_sform_counts_before_the_qform_and_is_compared_with_pixdim(tmp_path):
  image = nibabel.Nifti1Image(RAMP, np.diag([-2.0, 3, 4, 1]))
  image.set_qform(np.diag([5.0, 6, 7, 1]), 1)
  content = image.to_bytes()
  record = read(content, tmp_path)
  assert record.meta["orientation_source"] == "sform"
  assert record.meta["orientation"] == "LAS"
  np.testing.assert_array_equal(record.spacing[1:], [4, 3, 2])
  assert record.meta["pixdim"] == [5, 6, 7]
  record = read(patch(content, SFORM, "h", 0), tmp_path)
  assert record.meta["orientation_source"] == "qform"
  np.testing.assert_array_equal(record.spacing[1:], [7, 6, 5])
  record = read(patch(content, QFORM, "h", 0, 0), tmp_path)
  assert record.meta["orientation_source"] == "none"
  assert record.meta["orientation"] == "LAS"  # nibabel's convention.


@pytest.mark.parametrize("value", [0.0, -3.0, math.nan, math.inf])
def test_a_pixdim_that_is_none_is_unknown_and_named(tmp_path, value):
  content = patch(nifti(), QFORM, "h", 1, 0)  # The qform, which needs pixdim.
  record = read(patch(content, PIXDIM + 8, "f", value), tmp_path)
  np.testing.assert_array_equal(record.spacing, [math.nan, 4, math.nan, 2])
  assert ("spacing_invalid" in record.meta) == (value < 0 or math.isinf(value))
  stated = read(
      patch(content, PIXDIM + 8, "f", value), tmp_path, manifest_spacing=(9, 8, 7)
  )
  np.testing.assert_array_equal(stated.spacing[1:], [4, 8, 2])
  assert stated.meta["spacing_source"] == "file+manifest"


def test_colour_is_refused_or_weighed(tmp_path):
  rng = np.random.default_rng(0)
  for letters in ("RGB", "RGBA"):
    pixels = rng.integers(0, 255, (4, 5, 6, len(letters)), np.uint8)
    kind = np.dtype([(c, "u1") for c in letters])
    array = pixels.copy().view(kind)[..., 0]
    content = nibabel.Nifti1Image(array, np.diag([-2.0, 3, 4, 1])).to_bytes()
    assert refused(content, tmp_path).reason == "colour"
    record = read(content, tmp_path, colour="luminance")
    wanted = np.rint(pixels[..., :3] @ [0.299, 0.587, 0.114])[::-1].transpose(2, 1, 0)
    assert record.volume.shape == (1, 6, 5, 4, 1)
    assert np.abs(record.volume[0, ..., 0] - wanted).max() <= 1
  vector = nifti(pixels[..., None, :3], intent_code=2003)
  assert refused(vector, tmp_path).reason == "colour"
  assert read(vector, tmp_path, colour="luminance").volume.shape == (1, 6, 5, 4, 1)


def test_free_text_and_extensions_of_a_header_are_not_kept(tmp_path):
  image = nibabel.Nifti1Image(RAMP, np.eye(4))
  image.header["descrip"] = b"Jane Doe"
  image.header["aux_file"] = b"doe.txt"
  image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, b"Jane Doe" * 40))
  content = image.to_bytes()
  record = read(content, tmp_path)
  np.testing.assert_array_equal(record.volume[0, ..., 0], RAMP.transpose(2, 1, 0))
  assert b"Jane" in content and "oe" not in str(record.meta)


FAULTS = {
    "magic": (lambda c: patch(c, MAGIC, "i", 0), "bad_header"),
    "dim 0": (lambda c: patch(c, DIM, "h", 0), "bad_header"),
    "dim 9": (lambda c: patch(c, DIM, "h", 9), "bad_header"),
    "one axis": (lambda c: patch(c, DIM, "h", 1), "unsupported_format"),
    "six axes": (
        lambda c: patch(c, DIM, "h", 6, 2, 2, 2, 1, 1, 2), "unsupported_format"),
    "negative size": (lambda c: patch(c, DIM + 2, "h", -4), "bad_header"),
    "no voxels": (lambda c: patch(c, DIM + 2, "h", 0), "empty_file"),
    "a million slices": (
        lambda c: patch(c, DIM, "h", 5, 1000, 1000, 1000, 10, 10), "too_large"),
    "more than is there": (lambda c: patch(c, DIM + 2, "h", 400), "truncated"),
    "complex": (lambda c: patch(c, DATATYPE, "h", 32, 64), "unsupported_pixels"),
    "float128": (lambda c: patch(c, DATATYPE, "h", 1536, 128), "unsupported_pixels"),
    "unknown type": (lambda c: patch(c, DATATYPE, "h", 77, 16), "bad_header"),
    "bits": (lambda c: patch(c, BITPIX, "h", 8), "bad_header"),
    "offset within the header": (
        lambda c: patch(c, VOX_OFFSET, "f", 100), "bad_header"),
    "offset before the extension mark": (
        lambda c: patch(c, VOX_OFFSET, "f", 348), "bad_header"),
    "offset NaN": (lambda c: patch(c, VOX_OFFSET, "f", math.nan), "bad_header"),
    "offset fraction": (lambda c: patch(c, VOX_OFFSET, "f", 352.5), "bad_header"),
    "offset beyond the end": (lambda c: patch(c, VOX_OFFSET, "f", 1e9), "truncated"),
    "slope infinite": (lambda c: patch(c, SLOPE, "f", math.inf), "bad_rescale"),
    "intercept NaN": (lambda c: patch(c, SLOPE, "f", 2, math.nan), "bad_rescale"),
    "sform of zeros": (lambda c: patch(c, SROW, "f", *[0] * 12), "bad_header"),
    "sform of one line": (
        lambda c: patch(c, SROW, "f", 1, 1, 1, *[0] * 9), "bad_header"),
    "sform NaN": (lambda c: patch(c, SROW, "f", math.nan), "bad_header"),
    "cut in the header": (lambda c: c[:200], "bad_header"),
    "cut in the voxels": (lambda c: c[:-1], "truncated"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_each_fault_of_a_file_has_its_reason(tmp_path, fault, name):
  change, reason = FAULTS[fault]
  content = change(nifti())
  if name.endswith(".gz"):
    content = gzip.compress(content)
  found = refused(content, tmp_path, name).reason
  # A header that ends early is no NIfTI file to be seen by its content.
  assert found == ("truncated" if fault == "cut in the header" else reason)


def test_nan_voxels_and_empty_files_are_refused(tmp_path):
  array = RAMP.astype(np.float32)
  array[1, 2, 3] = math.nan
  assert refused(nifti(array), tmp_path).reason == "nan_voxels"
  assert refused(b"", tmp_path).reason == "empty_file"
  huge = RAMP.astype(np.float64) * 1e300
  assert refused(nifti(huge), tmp_path).reason == "nan_voxels"


def test_pairs_and_analyze_headers_are_refused_with_what_to_do(tmp_path):
  header = nibabel.Nifti1Pair(RAMP, np.eye(4)).header
  file = io.BytesIO()
  header.write_to(file)
  error = refused(file.getvalue(), tmp_path, "scan.hdr")
  assert error.reason == "unsupported_format" and ".nii" in error.remedy
  file = io.BytesIO()
  nibabel.AnalyzeImage(RAMP, np.eye(4)).header.write_to(file)
  assert "Analyze" in refused(file.getvalue(), tmp_path, "scan.hdr").detail


def test_damaged_gzip_streams_are_refused(tmp_path):
  array = np.random.default_rng(0).integers(0, 2**15, (20, 20, 20)).astype(np.int16)
  content = gzip.compress(nifti(array))
  for cut in (12, 100, len(content) // 2, len(content) - 4):
    assert refused(content[:cut], tmp_path, "a.nii.gz").reason == "truncated"
  flipped = bytearray(content)
  flipped[-6] ^= 1  # The checksum.
  assert refused(bytes(flipped), tmp_path, "b.nii.gz").reason == "decode_failed"
  flipped = bytearray(content)
  flipped[len(content) // 2] ^= 255
  assert refused(bytes(flipped), tmp_path, "c.nii.gz").reason in (
      "decode_failed", "truncated"
  )


def test_gzip_members_one_after_the_other_are_one_file(tmp_path):
  content = nifti()
  parts = gzip.compress(content[:300]) + gzip.compress(content[300:500])
  parts += gzip.compress(content[500:]) + b"\0" * 64
  np.testing.assert_array_equal(
      read(parts, tmp_path, "scan.nii.gz").volume, read(content, tmp_path).volume
  )


def test_bytes_after_the_voxels_are_passed_over(tmp_path):
  wanted = read(nifti(), tmp_path).volume
  more = nifti() + b"more"
  np.testing.assert_array_equal(read(more, tmp_path).volume, wanted)
  np.testing.assert_array_equal(
      read(gzip.compress(more), tmp_path, "scan.nii.gz").volume, wanted
  )


BOMB = """
import resource, sys, time
from vjepa_jax import data
try:
  import nibabel
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  start = time.process_time()
  data.read(sys.argv[1])
except data.ReadError as error:
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  print(error.reason, (after - before) // 1024, time.process_time() - start)
"""


@pytest.mark.parametrize("kind", ["claims", "offset", "tail"])
def test_decompression_bombs_take_little_memory_and_time(tmp_path, kind):
  content = nifti()
  zeros = b"\0" * (1 << 20)
  if kind == "claims":  # 1 GB of voxels, 100 kB of file.
    content = patch(content, DIM, "h", 3, 1000, 1000, 500)
    content, count = content[:352], 100
  elif kind == "offset":
    content, count = patch(content, VOX_OFFSET, "f", 4e8), 100
  else:
    count = 64
  file = io.BytesIO()
  with gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as stream:
    stream.write(content)
    for _ in range(count):
      stream.write(zeros)
  path = tmp_path / "bomb.nii.gz"
  path.write_bytes(file.getvalue())
  done = subprocess.run(
      [sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True,
      check=True,
  )
  reason, megabytes, seconds = done.stdout.split()
  assert reason == {"claims": "truncated", "offset": "truncated", "tail": "bad_header"}[
      kind]
  assert int(megabytes) < 100
  assert float(seconds) < 5


def test_nibabel_missing_names_the_extra(tmp_path):
  path = tmp_path / "scan.nii"
  path.write_bytes(nifti())
  script = (
      "import sys; sys.modules['nibabel'] = None\n"
      "from vjepa_jax import data\n"
      "try: data.read(sys.argv[1])\n"
      "except data.ReadError as e: print(e.reason, e.remedy)"
  )
  done = subprocess.run(
      [sys.executable, "-c", script, str(path)], capture_output=True, text=True,
      check=True,
  )
  assert "missing_extra" in done.stdout and "vjepa_jax[formats]" in done.stdout


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_mutated_files_are_read_or_refused(tmp_path, name):
  """Every byte of the header in turn, then cuts and noise, in bounded time."""
  rng = np.random.default_rng(0)
  content = nifti(np.asfortranarray(RAMP))
  outcomes = {}
  start = time.process_time()
  for number in range(1000):
    changed = bytearray(content)
    if number < 352:
      changed[number] ^= 1 << int(rng.integers(8))
    elif number < 704:
      changed[number - 352] = int(rng.integers(256))
    else:
      for place in rng.integers(0, len(content), int(rng.integers(1, 30))):
        changed[place] = int(rng.integers(256))
    if number % 10 == 9:
      changed = changed[: int(rng.integers(len(changed)))]
    changed = bytes(changed)
    if name.endswith("gz"):
      changed = gzip.compress(changed, 1)
      if number % 3 == 0 and changed:
        packed = bytearray(changed)
        packed[int(rng.integers(len(packed)))] ^= 1 << int(rng.integers(8))
        changed = bytes(packed)
    if not changed:
      continue
    try:
      record = read(changed, tmp_path, name, max_voxels=1 << 20)
    except ReadError as error:
      outcomes[error.reason] = outcomes.get(error.reason, 0) + 1
    else:
      outcomes["read"] = outcomes.get("read", 0) + 1
      assert np.isfinite(record.volume).all() and record.volume.size
  assert set(outcomes) <= {
      "read", "truncated", "bad_header", "too_large", "empty_file", "bad_rescale",
      "unsupported_format", "unsupported_pixels", "colour", "nan_voxels",
      "decode_failed",
  }
  assert outcomes["read"] > 100 and len(outcomes) >= 4
  assert time.process_time() - start < 30
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20


def test_real_scans_equal_nibabels_own_reading(shared):
  found = library_files_nifti.compare(
      sorted(map(str, shared("data").glob("*.nii.gz")))
  )
  assert len(found) >= 5
  assert {row.outcome for row in found} == {"read"}
  assert [row.fault for row in found] == [""] * len(found)


def test_nibabels_own_files_are_read_alike_or_refused_for_a_true_reason():
  rows = library_files_nifti.compare(library_files_nifti.nibabel_files())
  faults = [(row.path, row.outcome, row.fault) for row in rows if row.fault]
  assert not faults
  assert sum(row.outcome == "read" for row in rows) >= 6
