"""Claims of data/readers/dicom*.py on small true DICOM files."""

import io
import math
import subprocess
import sys

import numpy as np
from pydicom import uid
from pydicom.sequence import Sequence
import pytest

from vjepa_jax import data
from vjepa_jax.data import readers
from vjepa_jax.data.record import ReadError

NAN = math.nan


def read(dicom, dataset, **options):
  return readers.read_dicom(dicom.to_bytes(dataset), source="scan.dcm", **options)


def reason(function, *args, **options) -> str:
  with pytest.raises(ReadError) as caught:
    function(*args, **options)
  return caught.value.reason


def groups(dicom, frames: list[dict], shared: dict | None = None) -> dict:
  items = Sequence([dicom.item(**frame) for frame in frames])
  tags = {"PerFrameFunctionalGroupsSequence": items}
  if shared is not None:
    tags["SharedFunctionalGroupsSequence"] = Sequence([dicom.item(**shared)])
  return tags


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_frames_rows_columns_become_z_y_x_in_the_stored_type(dicom, dtype):
  volume = dicom.volume((3, 20, 26), dtype)
  record = read(dicom, dicom.dataset(volume))
  assert record.volume.shape == (1, 3, 20, 26, 1) and record.volume.dtype == dtype
  np.testing.assert_array_equal(record.volume[0, ..., 0], volume)
  assert record.subject == "p1"


@pytest.mark.parametrize("syntax", [
    uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000Lossless,
    uid.JPEGLSLossless,
])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_every_lossless_syntax_gives_the_same_voxels(dicom, syntax, dtype):
  if syntax == uid.JPEGLSLossless and dtype == np.int16:
    pytest.skip("no encoder writes signed JPEG-LS")
  volume = dicom.volume((3, 64, 66), dtype)
  dataset = dicom.dataset(volume)
  if syntax.is_encapsulated:
    dataset.compress(syntax, generate_instance_uid=False)
  elif syntax == uid.ExplicitVRBigEndian:
    dataset.PixelData = volume.astype(volume.dtype.newbyteorder(">")).tobytes()
  dataset.file_meta.TransferSyntaxUID = syntax
  record = read(dicom, dataset)
  np.testing.assert_array_equal(record.volume[0, ..., 0], volume)
  assert record.meta["transfer_syntax"] == syntax.name


def test_jpeg_baseline_is_read_within_its_loss(dicom):
  from PIL import Image
  from pydicom.encaps import encapsulate

  volume = dicom.volume((2, 64, 64))
  frames = []
  for frame in volume:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=95)
    frames.append(file.getvalue())
  dataset = dicom.dataset(volume, PixelData=encapsulate(frames))
  dataset["PixelData"].VR = "OB"
  dataset["PixelData"].is_undefined_length = True
  dataset.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
  error = read(dicom, dataset).volume[0, ..., 0].astype(int) - volume
  assert 0 < np.abs(error).mean() < 3


def test_an_unknown_syntax_is_named_and_never_read_as_raw_pixels(dicom):
  dataset = dicom.dataset(dicom.volume())
  dataset.compress(uid.RLELossless, generate_instance_uid=False)
  dataset.file_meta.TransferSyntaxUID = uid.MPEG2MPML
  with pytest.raises(ReadError, match="MPEG2") as caught:
    read(dicom, dataset)
  assert caught.value.reason == "no_decoder"


def test_a_missing_plugin_is_named_with_the_extra_that_brings_it(dicom, tmp_path):
  dataset = dicom.dataset(dicom.volume())
  dataset.compress(uid.JPEG2000Lossless, generate_instance_uid=False)
  path = tmp_path / "scan.dcm"
  path.write_bytes(dicom.to_bytes(dataset))
  code = f"""
import sys
for name in ("openjpeg", "pylibjpeg", "PIL", "gdcm"):
  sys.modules[name] = None  # As where the package is not installed.
from vjepa_jax import data
try:
  data.read({str(path)!r})
except data.ReadError as error:
  print(error.reason, error)
"""
  ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert ran.stdout.startswith("no_decoder"), ran.stderr
  assert "pylibjpeg" in ran.stdout and "vjepa_jax[codecs]" in ran.stdout


def test_bits_above_the_stored_ones_are_dropped(dicom):
  volume = dicom.volume((2, 8, 10), np.uint16) >> 4
  dirty = volume | np.uint16(0xA000)
  tags = {"BitsStored": 12, "HighBit": 11}
  record = read(dicom, dicom.dataset(dirty, **tags))
  np.testing.assert_array_equal(record.volume[0, ..., 0], volume)
  shifted = dicom.dataset(volume << 4, BitsStored=12, HighBit=15)
  np.testing.assert_array_equal(read(dicom, shifted).volume[0, ..., 0], volume)


def test_the_sign_of_twelve_stored_bits_is_kept(dicom):
  volume = np.array([[[-2048, -1, 0, 2047]]], np.int16)
  dirty = (volume & 0x0FFF) | 0x5000
  record = read(dicom, dicom.dataset(dirty.astype(np.int16), BitsStored=12, HighBit=11))
  np.testing.assert_array_equal(record.volume[0, ..., 0], volume)


@pytest.mark.parametrize("stored, dtype, tags, want", [
    ([0, 10, 255], np.uint8, {}, [255, 245, 0]),
    ([0, 10, 4095], np.uint16, {"BitsStored": 12, "HighBit": 11}, [4095, 4085, 0]),
    ([-32768, 0, 32767], np.int16, {}, [32767, -1, -32768]),
])
def test_monochrome1_is_inverted_within_its_stored_bits(
    dicom, stored, dtype, tags, want
):
  dataset = dicom.dataset(
      np.array([[stored]], dtype), PhotometricInterpretation="MONOCHROME1", **tags
  )
  record = read(dicom, dataset)
  assert record.volume[0, ..., 0].tolist() == [[want]]
  assert record.volume.dtype == dtype


def test_a_whole_intercept_stays_an_integer_and_a_slope_gives_float32(dicom):
  volume = np.array([[[0, 1000, 3000]]], np.uint16)
  whole = read(dicom, dicom.dataset(volume, RescaleSlope=1, RescaleIntercept=-1024))
  assert whole.volume.dtype == np.int16
  assert whole.volume.ravel().tolist() == [-1024, -24, 1976]
  scaled = read(dicom, dicom.dataset(volume, RescaleSlope=0.5, RescaleIntercept=3))
  assert scaled.volume.dtype == np.float32
  assert scaled.volume.ravel().tolist() == [3, 503, 1503]


def test_the_shared_rescale_wins_over_the_frames_and_the_top_level(dicom):
  volume = np.full((2, 1, 2), 10, np.uint16)
  item = lambda slope: {  # noqa: E731
      "PixelValueTransformationSequence": {"RescaleSlope": slope, "RescaleIntercept": 0}
  }
  frames = [item(2), item(3)]
  own = dicom.dataset(
      volume, RescaleSlope=7, RescaleIntercept=0, **groups(dicom, frames)
  )
  assert read(dicom, own).volume[0, :, 0, 0, 0].tolist() == [20, 30]
  both = dicom.dataset(volume, **groups(dicom, frames, item(5)))
  assert read(dicom, both).volume[0, :, 0, 0, 0].tolist() == [50, 50]


def test_a_zero_slope_is_refused(dicom):
  dataset = dicom.dataset(dicom.volume(), RescaleSlope=0, RescaleIntercept=1)
  assert reason(read, dicom, dataset) == "bad_rescale"


def measures(*spacing, **more):
  return {"PixelMeasuresSequence": {"PixelSpacing": list(spacing), **more}}


def place(z):
  return {"PlanePositionSequence": {"ImagePositionPatient": [0, 0.6 * z, 0.8 * z]}}


def line(y):
  return {"OphthalmicFrameLocationSequence": {"ReferenceCoordinates": [y, 1, y, 100]}}


@pytest.mark.parametrize("name, frames, shared, top, manifest, want, source", [
    ("shared before per-frame", [measures(9, 9) | place(0.1 * i) for i in range(3)],
     measures(0.004, 0.012, SliceThickness=7), {}, None,
     (0.1, 0.004, 0.012), "shared+positions"),
    ("per-frame before top", [measures(0.005, 0.01)] * 3, {},
     {"PixelSpacing": [9, 9], "SpacingBetweenSlices": 0.25}, None,
     (0.25, 0.005, 0.01), "per_frame+between_slices"),
    ("fundus lines scaled by a frame's own width",
     [line(10.0 + 5 * i) for i in range(3)], measures(0.004, 0.011), {}, None,
     (5 * 0.011 * 9 / 99, 0.004, 0.011), "shared+frame_location"),
    ("between slices before thickness", [{}] * 3,
     measures(0.004, 0.012, SliceThickness=7, SpacingBetweenSlices=0.2), {}, None,
     (0.2, 0.004, 0.012), "shared+between_slices"),
    ("thickness last", [{}] * 3, measures(0.004, 0.012, SliceThickness=0.3), {}, None,
     (0.3, 0.004, 0.012), "shared+slice_thickness"),
    ("the manifest's", [{}] * 3, {}, {}, (0.1, 0.2, 0.3), (0.1, 0.2, 0.3), "manifest"),
    ("the manifest fills the pitch", [{}] * 3, measures(0.004, 0.012), {},
     (0.1, 0.2, 0.3), (0.1, 0.004, 0.012), "shared+manifest"),
    ("missing is NaN, never 1 mm", [{}] * 3, {}, {}, None, (NAN, NAN, NAN), "missing"),
    ("uneven positions have no pitch", [place(z) for z in (0, 0.1, 0.4)],
     measures(0.004, 0.012), {}, None, (NAN, 0.004, 0.012), "shared+varies"),
    ("frames that differ have no spacing",
     [measures(0.004, 0.01), measures(0.004, 0.02), measures(0.004, 0.03)], {},
     {"SliceThickness": 0.1}, None, (0.1, NAN, NAN), "varies+slice_thickness"),
])
def test_spacing_is_looked_up_in_order(
    dicom, name, frames, shared, top, manifest, want, source
):
  dataset = dicom.dataset(
      dicom.volume((3, 8, 10)), **top, **groups(dicom, frames, shared)
  )
  record = read(dicom, dataset, manifest_spacing=manifest)
  np.testing.assert_allclose(record.spacing, (NAN, *want), rtol=1e-5, err_msg=name)
  assert record.meta["spacing_source"] == source


@pytest.mark.parametrize("bad", [0.0, -0.012])
def test_a_spacing_of_zero_or_less_is_unknown_and_noted(dicom, bad):
  dataset = dicom.dataset(
      dicom.volume((3, 8, 10)), PixelSpacing=[0.004, bad], SpacingBetweenSlices=bad
  )
  record = read(dicom, dataset)
  assert np.isnan(record.spacing).all()
  assert record.meta["spacing_source"] == "missing"
  assert "PixelSpacing" in record.meta["spacing_invalid"]


def test_radial_frames_are_told_from_a_raster(dicom):
  angles = np.arange(4) * np.pi / 4
  frames = [
      {"OphthalmicFrameLocationSequence": {"ReferenceCoordinates": [
          round(float(v), 3) for v in (
              50 - 40 * np.sin(a), 50 - 40 * np.cos(a),
              50 + 40 * np.sin(a), 50 + 40 * np.cos(a))
      ]}} for a in angles
  ]
  dataset = dicom.dataset(
      dicom.volume((4, 8, 10)), **groups(dicom, frames, measures(0.004, 0.01))
  )
  record = read(dicom, dataset)
  assert record.meta["geometry"] == "radial" and np.isnan(record.spacing[1])


def corner(x, y):
  return {"PlanePositionSequence": {"ImagePositionPatient": [x, 0, y]}}


@pytest.mark.parametrize("places", [
    [(np.cos(a), np.sin(a)) for a in np.arange(12) * np.pi / 12],  # radial frames
    [(0, 0), (0, 0.1), (0, 0), (0, 0.1)],  # two places in turn
])
def test_equal_steps_that_do_not_follow_one_line_are_no_pitch(dicom, places):
  frames = [corner(round(float(x), 4), round(float(y), 4)) for x, y in places]
  dataset = dicom.dataset(
      dicom.volume((len(places), 8, 10)), SliceThickness=0.1,
      **groups(dicom, frames, measures(0.004, 0.012)),
  )
  record = read(dicom, dataset)
  assert np.isnan(record.spacing[1])
  assert record.meta["spacing_source"] == "shared+varies"


@pytest.mark.parametrize("order, pitch", [
    ((0, 1, 2, 3), 0.1), ((3, 2, 1, 0), 0.1), ((0, 1, 0, 1), NAN),
])
def test_the_pitch_of_fundus_lines_needs_one_direction(dicom, order, pitch):
  dataset = dicom.dataset(
      dicom.volume((4, 8, 10)),
      **groups(dicom, [line(10.0 + n) for n in order], measures(0.004, 1.1)),
  )
  dz = read(dicom, dataset).spacing[1]
  np.testing.assert_allclose(dz, pitch, rtol=1e-5)


def test_a_little_motion_of_the_eye_leaves_the_pitch(dicom):
  sideways = np.random.default_rng(0).normal(0, 0.01, 12)
  frames = [corner(round(float(s), 4), 0.1 * i) for i, s in enumerate(sideways)]
  dataset = dicom.dataset(
      dicom.volume((12, 8, 10)), **groups(dicom, frames, measures(0.004, 0.012))
  )
  np.testing.assert_allclose(read(dicom, dataset).spacing[1], 0.1, rtol=0.02)


def test_anatomy_is_kept_and_the_name_is_not(dicom):
  shared = {"FrameAnatomySequence": {
      "FrameLaterality": "L", "AnatomicRegionSequence": {"CodeMeaning": "Macula"},
  }}
  dataset = dicom.dataset(
      dicom.volume((2, 8, 10)), PatientName="Secret^Person",
      PatientBirthDate="19700101", **groups(dicom, [{}, {}], shared),
  )
  record = read(dicom, dataset)
  assert record.meta["laterality"] == "L" and record.meta["region"] == "Macula"
  assert record.meta["device"] == "Maker One"
  assert "Secret" not in str(record.meta) and "1970" not in str(record.meta)


def test_colour_is_refused_or_read_as_luminance_by_option(dicom):
  rgb = np.random.default_rng(0).integers(0, 256, (2, 8, 10, 3), dtype=np.uint8)
  dataset = dicom.dataset(rgb)
  assert reason(read, dicom, dataset) == "colour"
  grey = read(dicom, dataset, colour="luminance").volume[0, ..., 0]
  want = rgb.astype(float) @ [0.299, 0.587, 0.114]
  assert grey.dtype == np.uint8 and np.abs(grey - want).max() <= 0.51


def test_no_pixels_truncation_and_a_wrong_modality_have_their_reasons(dicom):
  for how in ("no_pixel_data", "truncated", "wrong_modality", "not_dicom"):
    dataset = dicom.dataset(dicom.volume())
    content = dicom.break_bytes(how, dataset, dicom.to_bytes(dataset))
    assert reason(readers.read_dicom, content) == how


@pytest.mark.parametrize("syntax", [
    uid.RLELossless, uid.JPEG2000Lossless, uid.JPEGLSLossless,
    uid.DeflatedExplicitVRLittleEndian,
])
def test_a_compressed_file_cut_anywhere_in_its_pixels_is_bad_not_shorter(dicom, syntax):
  dataset = dicom.dataset(dicom.volume((3, 64, 64)))
  if syntax.is_encapsulated:
    dataset.compress(syntax, generate_instance_uid=False)
  dataset.file_meta.TransferSyntaxUID = syntax
  content = dicom.to_bytes(dataset)
  for part in (0.4, 0.7, 0.9, 0.99):
    cut = content[: int(len(content) * part)]
    assert reason(readers.read_dicom, cut) in ("truncated", "decode_failed")


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("claimed", [3, 5])
def test_the_number_of_frames_must_be_what_decodes(dicom, compress, claimed):
  dataset = dicom.dataset(dicom.volume((4, 16, 16)))
  if compress:
    dataset.compress(uid.RLELossless, generate_instance_uid=False)
  dataset.NumberOfFrames = claimed
  assert reason(read, dicom, dataset) in ("frames_mismatch", "truncated")


def test_functional_groups_of_another_number_of_frames_are_refused(dicom):
  dataset = dicom.dataset(dicom.volume((4, 8, 8)), **groups(dicom, [{}] * 3))
  assert reason(read, dicom, dataset) == "frames_mismatch"


def test_a_header_that_claims_terabytes_is_refused_before_decoding(dicom):
  dataset = dicom.dataset(dicom.volume((2, 64, 64)))
  dataset.compress(uid.RLELossless, generate_instance_uid=False)
  dataset.Rows, dataset.Columns, dataset.NumberOfFrames = 65535, 65535, 100_000
  with pytest.raises(ReadError, match="429,483,622,500,000|max_voxels") as caught:
    read(dicom, dataset)
  assert caught.value.reason == "too_large"


@pytest.mark.parametrize("values, dtype", [
    ([0, 7, 255], np.uint8), ([0, 7, 65535], np.uint16), ([-9, 0, 7], np.int16),
    ([0, 7, 70_000], np.float32), ([-1, 0, 70_000], np.float32),
])
def test_32_bits_become_the_smallest_type_that_holds_them(dicom, values, dtype):
  kind = np.int32 if min(values) < 0 else np.uint32
  record = read(dicom, dicom.dataset(np.array([[values]], kind)))
  assert record.volume.ravel().tolist() == values and record.volume.dtype == dtype


def test_a_dose_of_32_bits_keeps_its_digits_through_a_small_slope(dicom):
  stored = np.array([[[2**31, 2**31 + 1, 2**31 + 257]]], np.uint32)
  whole = dicom.dataset(stored, RescaleSlope=1, RescaleIntercept=-(2**31))
  assert read(dicom, whole).volume.ravel().tolist() == [0, 1, 257]
  half = dicom.dataset(stored, RescaleSlope=0.5, RescaleIntercept=-(2**30))
  assert read(dicom, half).volume.ravel().tolist() == [0, 0.5, 128.5]


def test_bits_packed_eight_to_a_byte_are_read_over_frame_borders(dicom):
  mask = np.random.default_rng(0).integers(0, 2, (3, 5, 7), dtype=np.uint8)
  packed = np.packbits(mask.ravel(), bitorder="little").tobytes()
  dataset = dicom.dataset(
      mask, BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=packed
  )
  record = read(dicom, dataset)
  np.testing.assert_array_equal(record.volume[0, ..., 0], mask)
  dataset.PixelData = packed[:-2]
  assert reason(read, dicom, dataset) == "truncated"


def test_bits_that_are_not_supported_are_named(dicom):
  dataset = dicom.dataset(np.zeros((1, 4, 4), np.uint16), BitsAllocated=24)
  assert reason(read, dicom, dataset) == "unsupported_pixels"


def test_float_pixel_data_is_read_and_its_nan_refused(dicom):
  volume = np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32)
  for spoil in (False, True):
    if spoil:
      volume[1, 2, 3] = NAN
    dataset = dicom.dataset(np.zeros((2, 4, 6), np.uint16))
    del dataset.PixelData
    dataset.BitsAllocated = 32
    dataset.FloatPixelData = volume.tobytes()
    if spoil:
      assert reason(read, dicom, dataset) == "nan_voxels"
    else:
      np.testing.assert_array_equal(read(dicom, dataset).volume[0, ..., 0], volume)


def test_damaged_headers_give_read_errors_and_nothing_else(dicom):
  dataset = dicom.dataset(
      dicom.volume((2, 8, 10)), PixelSpacing=[0.004, 0.012], RescaleSlope=1,
      RescaleIntercept=0, **groups(dicom, [place(0), place(1)], measures(0.1, 0.2)),
  )
  content = dicom.to_bytes(dataset)
  rng = np.random.default_rng(0)
  found = set()
  for _ in range(400):
    spoilt = bytearray(content)
    for at in rng.integers(132, len(content) - 160, 4):
      spoilt[at] = rng.integers(256)
    try:
      readers.read_dicom(bytes(spoilt), max_voxels=10**6)
    except ReadError as error:
      found.add(error.reason)
  assert "bad_header" in found


def test_an_open_file_reads_as_its_bytes(dicom):
  content = dicom.to_bytes(dicom.dataset(dicom.volume()))
  a = readers.read_dicom(io.BytesIO(content)).volume
  np.testing.assert_array_equal(a, readers.read_dicom(content).volume)


def test_read_goes_by_content_and_lists_what_it_supports(dicom, tmp_path):
  volume = dicom.volume((3, 8, 10))
  disguised = tmp_path / "scan.npy"
  disguised.write_bytes(dicom.to_bytes(dicom.dataset(volume)))
  np.testing.assert_array_equal(data.read(str(disguised)).volume[0, ..., 0], volume)
  other = tmp_path / "scan.doc"
  other.write_bytes(b"some text" * 30)
  with pytest.raises(ReadError, match="convert it to DICOM, NIfTI, TIFF") as caught:
    data.read(str(other))
  assert caught.value.reason == "unsupported_format"
  (tmp_path / "empty.dcm").write_bytes(b"")
  assert reason(data.read, str(tmp_path / "empty.dcm")) == "empty_file"
  (tmp_path / "text.dcm").write_bytes(b"x" * 300)
  assert reason(data.read, str(tmp_path / "text.dcm")) == "not_dicom"


def test_arrays_are_read_with_their_spacing(tmp_path):
  volume = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
  np.savez(tmp_path / "a.npz", volume=volume, spacing=[0.1, 0.2, 0.3])
  np.save(tmp_path / "b.npy", volume.astype(np.float64))
  a, b = (data.read(str(tmp_path / name)) for name in ("a.npz", "b.npy"))
  np.testing.assert_array_equal(a.volume[0, ..., 0], volume)
  np.testing.assert_allclose(a.spacing, [NAN, 0.1, 0.2, 0.3], rtol=1e-6)
  assert b.volume.dtype == np.float32 and np.isnan(b.spacing).all()
  assert b.meta["spacing_source"] == "missing"
  np.save(tmp_path / "flat.npy", volume[0])
  assert reason(data.read, str(tmp_path / "flat.npy")) == "unsupported_format"
  (tmp_path / "c.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:-9])
  assert reason(data.read, str(tmp_path / "c.npy")) == "truncated"


@pytest.mark.parametrize("spacing", [
    [0.1, -0.2, 0.3], [0.1, 0.2], 0.1, ["a", "b", "c"],
])
def test_an_array_of_impossible_spacing_is_one_bad_file(tmp_path, spacing):
  path = str(tmp_path / "a.npz")
  np.savez(path, volume=np.arange(24, dtype=np.uint8).reshape(2, 3, 4), spacing=spacing)
  with pytest.raises(ReadError, match="dz, dy, dx") as caught:
    data.read(path)
  assert caught.value.reason == "bad_header"


@pytest.mark.parametrize("name, shape, dtype, spacing, source", [
    ("enhanced_ct_2frame.dcm", (2, 512, 512), np.int16, (10, 0.388672, 0.388672),
     "shared+positions"),
    ("enhanced_mr_10frame.dcm", (10, 64, 64), np.uint16, (1.2, NAN, NAN),
     "missing+between_slices"),
    ("ct_slice_j2k.dcm", (1, 512, 512), np.int16, (20, 0.478516, 0.478516),
     "top_level+between_slices"),
])
def test_real_files_of_other_modalities_read_right(
    shared, name, shape, dtype, spacing, source
):
  path = str(shared(f"data/{name}"))
  assert reason(data.read, path, modalities=("OPT",)) == "wrong_modality"
  record = data.read(path)
  assert record.volume.shape == (1, *shape, 1) and record.volume.dtype == dtype
  np.testing.assert_allclose(record.spacing[1:], spacing, rtol=1e-5)
  assert record.meta["spacing_source"] == source
  import pydicom

  raw = pydicom.dcmread(path)
  stored = raw.pixel_array.reshape(shape).astype(int)
  if name.startswith(("enhanced_ct", "ct_slice")):
    shift = record.volume[0, ..., 0].astype(int) - stored
    assert len(np.unique(shift)) == 1 and shift.flat[0] < 0
  else:
    np.testing.assert_array_equal(record.volume[0, ..., 0], stored)


def test_raw_pixels_are_a_view_of_the_content_and_not_a_copy(dicom):
  content = dicom.to_bytes(dicom.dataset(dicom.volume((4, 64, 80))))
  volume = readers.read_dicom(content).volume
  assert np.shares_memory(volume, np.frombuffer(content, np.uint8))
  assert not volume.flags.writeable


@pytest.mark.parametrize("syntax", [
    uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian,
])
@pytest.mark.parametrize("meta", [True, False])
def test_a_file_without_preamble_is_known_by_its_elements(
    dicom, tmp_path, syntax, meta
):
  volume = dicom.volume((3, 8, 10), np.uint16)
  dataset = dicom.dataset(volume)
  if syntax == uid.ExplicitVRBigEndian:
    dataset.PixelData = volume.astype(">u2").tobytes()
  dataset.file_meta.TransferSyntaxUID = syntax
  content = dicom.to_bytes(dataset)[132:]
  if not meta:  # Its length is the value of the first element.
    content = content[12 + int.from_bytes(content[8:12], "little"):]
  path = tmp_path / "scan"
  path.write_bytes(content)
  np.testing.assert_array_equal(data.read(str(path)).volume[0, ..., 0], volume)


@pytest.mark.parametrize("head", [
    b"\x08\x00\x05\x00 no elements", bytes(600), b"\x02\x00" * 300,
    b"\x08\x00\x05\x00CS\x02\x00ab" + b"\x01\x00" * 200,
    b"\x5c\x01\x00\x00" + bytes(400),
])
def test_other_contents_are_not_taken_for_dicom_without_preamble(head):
  assert not readers.dicom.matches(head, "x")


def test_frames_out_of_order_are_sorted_by_position_but_not_in_oct(dicom):
  volume = dicom.volume((4, 8, 10))
  order = [2, 0, 3, 1]
  tags = groups(dicom, [place(0.5 * z) for z in order], measures(0.1, 0.2))
  record = read(dicom, dicom.dataset(volume, **tags, Modality="MR"), modalities=None)
  np.testing.assert_array_equal(record.volume[0, ..., 0], volume[np.argsort(order)])
  np.testing.assert_allclose(record.spacing[1], 0.5, rtol=1e-6)
  as_scanned = read(dicom, dicom.dataset(volume, **tags))
  np.testing.assert_array_equal(as_scanned.volume[0, ..., 0], volume)


def test_temporal_positions_of_an_enhanced_file_become_t(dicom):
  volume = dicom.volume((6, 8, 10))
  frames = [
      place(0.5 * (1 - z)) | {
          "FrameContentSequence": {"TemporalPositionIndex": t + 1},
          "TemporalPositionSequence": {"TemporalPositionTimeOffset": 2.5 * t},
      } for z in (0, 1) for t in (0, 1, 2)
  ]
  tags = groups(dicom, frames, measures(1, 1))
  dataset = dicom.dataset(volume, Modality="MR", **tags)
  record = read(dicom, dataset, modalities=None)
  want = volume.reshape(2, 3, 8, 10)[::-1].swapaxes(0, 1)
  np.testing.assert_array_equal(record.volume[..., 0], want)
  np.testing.assert_allclose(record.spacing, [2.5, 0.5, 1, 1])
  frames[0] |= place(7)
  tags = groups(dicom, frames, measures(1, 1))
  dataset = dicom.dataset(volume, Modality="MR", **tags)
  assert reason(read, dicom, dataset, modalities=None) == "irregular_frames"


@pytest.mark.parametrize("tags, step", [
    ({"FrameIncrementPointer": 0x00181063, "FrameTime": 40.0}, 0.04),
    ({"FrameIncrementPointer": 0x00181065, "FrameTimeVector": [0, 50, 50]}, 0.05),
    ({"FrameIncrementPointer": 0x00181065, "FrameTimeVector": [0, 50, 90]}, NAN),
])
def test_the_frames_of_a_film_are_t(dicom, tags, step):
  volume = dicom.volume((3, 8, 10))
  film = dicom.dataset(volume, Modality="US", SliceThickness=2, **tags)
  record = read(dicom, film, modalities=None)
  np.testing.assert_array_equal(record.volume[:, 0, ..., 0], volume)
  np.testing.assert_allclose(record.spacing[:2], [step, 2], rtol=1e-6)
  assert read(dicom, dicom.dataset(volume, **tags)).volume.shape[:2] == (1, 3)


def test_uneven_frames_keep_their_positions(dicom):
  frames = [place(z) for z in (0, 0.1, 0.4)]
  dataset = dicom.dataset(
      dicom.volume((3, 8, 10)), **groups(dicom, frames, measures(1, 1))
  )
  record = read(dicom, dataset)
  np.testing.assert_allclose(record.meta["slice_positions_mm"], [0, 0.1, 0.4])


def test_a_modality_lut_is_applied_and_padding_told_as_the_voxels_have_it(dicom):
  stored = np.array([[[2, 3, 4]]], np.uint16)
  entries = np.array([100, 7, 900], "<u2").tobytes()
  lut = {"LUTDescriptor": [3, 2, 16], "LUTData": entries, "ModalityLUTType": "US"}
  record = read(dicom, dicom.dataset(stored, ModalityLUTSequence=lut))
  assert record.volume.ravel().tolist() == [100, 7, 900]
  padded = dicom.dataset(
      stored, PixelPaddingValue=4, RescaleSlope=2, RescaleIntercept=-3
  )
  assert read(dicom, padded).meta["padding_value"] == 5


@pytest.mark.parametrize("dtype, lowest", [(np.uint16, 0), (np.int16, -2000)])
def test_padding_is_told_inverted_where_the_voxels_are(dicom, dtype, lowest):
  stored = np.array([[[lowest, 3, 40]]], dtype)
  dataset = dicom.dataset(
      stored, PhotometricInterpretation="MONOCHROME1", RescaleIntercept=-7
  )
  dataset.add_new("PixelPaddingValue", "SS" if lowest else "US", lowest)
  record = read(dicom, dataset)
  assert record.meta["padding_value"] == record.volume[0, 0, 0, 0, 0]


def test_a_tilted_multi_frame_file_reads_as_the_same_series_of_slices(dicom, tmp_path):
  volume = dicom.volume((4, 8, 10), np.int16)
  corners = [[1.0, 3.0 * z, 5.0 * z] for z in (0, 1, 2, 4)]
  axes = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
  frames = [{"PlanePositionSequence": {"ImagePositionPatient": c}} for c in corners]
  shared = measures(0.5, 0.7) | {
      "PlaneOrientationSequence": {"ImageOrientationPatient": axes}
  }
  whole = read(
      dicom, dicom.dataset(volume, Modality="CT", **groups(dicom, frames, shared)),
      modalities=None,
  )
  for z, corner in enumerate(corners):
    slice_ = dicom.dataset(
        volume[z:z + 1], Modality="CT", SeriesInstanceUID="1.2", PixelSpacing=[0.5, 0.7],
        ImagePositionPatient=corner, ImageOrientationPatient=axes,
    )
    (tmp_path / f"{z}.dcm").write_bytes(dicom.to_bytes(slice_))
  parts = data.read(str(tmp_path))
  np.testing.assert_array_equal(whole.volume, parts.volume)
  np.testing.assert_array_equal(whole.spacing, parts.spacing)
  assert whole.meta["gantry_tilt_deg"] == pytest.approx(30.9638, abs=1e-4)
  for key in (
      "slice_positions_mm", "slice_steps_mm", "slice_shear_mm", "gantry_tilt_deg"
  ):
    np.testing.assert_allclose(whole.meta[key], parts.meta[key], atol=1e-6, err_msg=key)


def test_frames_side_by_side_in_one_plane_have_no_distance(dicom):
  frames = [
      {"PlanePositionSequence": {"ImagePositionPatient": [0, 0, z]}} for z in range(3)
  ]
  axes = {"PlaneOrientationSequence": {"ImageOrientationPatient": [0, 1, 0, 0, 0, 1]}}
  dataset = dicom.dataset(
      dicom.volume((3, 8, 10)), **groups(dicom, frames, measures(1, 1) | axes)
  )
  assert math.isnan(read(dicom, dataset).spacing[1])


def test_frames_that_visit_places_twice_without_a_time_are_no_volume(dicom):
  frames = [place(z) for z in (0, 1, 0, 1)]
  dataset = dicom.dataset(
      dicom.volume((4, 8, 10)), Modality="MR", **groups(dicom, frames, measures(1, 1))
  )
  assert reason(read, dicom, dataset, modalities=None) == "irregular_frames"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, io.BytesIO])
def test_any_bytes_and_any_open_file_are_read(dicom, kind):
  volume = dicom.volume((2, 8, 10))
  record = readers.read_dicom(kind(dicom.to_bytes(dicom.dataset(volume))))
  np.testing.assert_array_equal(record.volume[0, ..., 0], volume)


def test_padding_after_the_pixels_is_let_pass_but_no_other_bytes(dicom):
  volume = dicom.volume((3, 8, 10))
  dataset = dicom.dataset(volume, PixelData=volume.tobytes() + bytes(20))
  np.testing.assert_array_equal(read(dicom, dataset).volume[0, ..., 0], volume)
  dataset.PixelData = volume.tobytes() + bytes(19) + b"x"
  assert reason(read, dicom, dataset) == "frames_mismatch"
  dataset.PixelData = volume.tobytes() + bytes(80)
  assert reason(read, dicom, dataset) == "frames_mismatch"


def compressed(dicom, volume, syntax, frames, *, table=False, **tags):
  from pydicom.encaps import encapsulate, encapsulate_extended

  if table == "extended":
    pixels, offsets, lengths = encapsulate_extended(frames)
    tags |= {"ExtendedOffsetTable": offsets, "ExtendedOffsetTableLengths": lengths}
  else:
    pixels = encapsulate(frames, has_bot=table)
  dataset = dicom.dataset(volume, PixelData=pixels, **tags)
  dataset["PixelData"].VR = "OB"
  dataset["PixelData"].is_undefined_length = True
  dataset.file_meta.TransferSyntaxUID = syntax
  return dataset


@pytest.mark.parametrize("syntax, encoder, options", [
    (uid.JPEGLosslessSV1, "ljpeg", {}),
    (uid.HTJ2KLossless, "htj2k", {"reversible": True}),
    (uid.JPEGLSNearLossless, "jpegls", {"level": 0}),
    (uid.JPEG2000, "jpeg2k", {"reversible": True, "level": 0, "codecformat": "j2k"}),
])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("table", [False, True, "extended"])
def test_other_codecs_give_the_same_voxels(
    dicom, syntax, encoder, options, dtype, table
):
  imagecodecs = pytest.importorskip("imagecodecs")
  volume = dicom.volume((3, 64, 66), dtype)
  encode = getattr(imagecodecs, f"{encoder}_encode")
  frames = [bytes(encode(f, **options)) for f in volume]
  dataset = compressed(dicom, volume, syntax, frames, table=table)
  np.testing.assert_array_equal(read(dicom, dataset).volume[0, ..., 0], volume)


def test_every_transfer_syntax_is_read_or_named_as_without_decoder(dicom):
  lost = set()
  for syntax in uid.AllTransferSyntaxes:
    dataset = compressed(dicom, dicom.volume((1, 8, 10)), syntax, [bytes(64)])
    if not syntax.is_encapsulated:
      continue  # Of these each has its own test above.
    found = reason(read, dicom, dataset)
    assert found in ("no_decoder", "decode_failed")
    if found == "no_decoder":
      lost.add(syntax.name.split()[0])
  assert lost <= {"MPEG2", "MPEG-4", "HEVC/H.265", "SMPTE", "Fragmentable", "JPIP",
                  "JPEG"}, lost


def test_a_frame_of_another_size_than_the_header_says_is_never_decoded(dicom):
  imagecodecs = pytest.importorskip("imagecodecs")
  volume = dicom.volume((2, 64, 64))
  for syntax, encode in (
      (uid.JPEG2000Lossless, imagecodecs.jpeg2k_encode),
      (uid.JPEGLSLossless, imagecodecs.jpegls_encode),
      (uid.JPEGLosslessSV1, imagecodecs.ljpeg_encode),
  ):
    frames = [bytes(encode(f)) for f in volume]
    dataset = compressed(dicom, volume, syntax, frames, Rows=32)
    with pytest.raises(ReadError, match="64 x 64, the header says 32 x 64") as caught:
      read(dicom, dataset)
    assert caught.value.reason == "bad_header"


def test_lying_fragments_are_refused(dicom):
  dataset = dicom.dataset(dicom.volume((4, 16, 16)))
  dataset.compress(uid.RLELossless, generate_instance_uid=False)
  content = dicom.to_bytes(dataset)
  item = b"\xfe\xff\x00\xe0"
  first = content.find(item, content.find(item) + 4)
  for length in (2, 2**31, 2**32 - 2):
    lying = bytearray(content)
    lying[first + 4:first + 8] = length.to_bytes(4, "little")
    assert reason(readers.read_dicom, bytes(lying)) in ("truncated", "decode_failed")
  for claimed in (1_000_000, 2**31 - 1):
    dataset.NumberOfFrames = claimed
    assert reason(read, dicom, dataset) in ("frames_mismatch", "too_large")


def deflated(content: bytes, body: bytes) -> bytes:
  import zlib

  meta = 144 + int.from_bytes(content[140:144], "little")
  packer = zlib.compressobj(1, zlib.DEFLATED, -15)
  return content[:meta] + packer.compress(body) + packer.flush()


@pytest.mark.parametrize("make", [
    lambda head: head + bytes(80 << 20),  # Zeros after the pixels.
    lambda head: head[:8] + bytes(80 << 20),  # No end of the header.
    lambda head: b"\x08\x00\x05\x00CS\x00\x00" * (9 << 20),  # Elements without end.
])
def test_a_deflated_bomb_costs_little_memory_and_time(dicom, make):
  import resource
  import time

  dataset = dicom.dataset(dicom.volume((2, 16, 16)))
  dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
  content = dicom.to_bytes(dataset)
  plain = dicom.dataset(dicom.volume((2, 16, 16)))
  raw = dicom.to_bytes(plain)
  bomb = deflated(content, make(raw[144 + int.from_bytes(raw[140:144], "little"):]))
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  start = time.process_time()
  try:
    readers.read_dicom(bomb, max_voxels=10**6)
  except ReadError as error:
    assert error.reason in ("too_large", "bad_header", "truncated", "no_pixel_data")
  assert time.process_time() - start < 30
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20


def test_sequences_without_end_and_values_of_megabytes_are_refused(dicom):
  dataset = dicom.dataset(dicom.volume((2, 16, 16)))
  content = dicom.to_bytes(dataset)
  at = content.find(b"\xe0\x7f\x10\x00")
  item, sequence = b"\xfe\xff\x00\xe0", b"\x00\x52\x30\x92SQ\x00\x00"
  deep = (sequence + b"\xff" * 4 + item + b"\xff" * 4) * 20_000
  assert reason(readers.read_dicom, content[:at] + deep + content[at:]) == "bad_header"
  many = (item + bytes(4)) * 150_000
  wide = sequence + len(many).to_bytes(4, "little") + many
  assert reason(readers.read_dicom, content[:at] + wide + content[at:]) == "bad_header"
  long = dicom.dataset(dicom.volume((2, 16, 16)), InstitutionName="x" * 400_000)
  long.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
  assert reason(read, dicom, long) == "bad_header"


def test_a_million_frames_claimed_are_refused_at_once(dicom):
  for tags in ({"NumberOfFrames": 10**6}, {"NumberOfFrames": 10**6, "Rows": 65535}):
    dataset = dicom.dataset(dicom.volume((2, 16, 16)), **tags)
    assert reason(read, dicom, dataset) in ("truncated", "too_large")


@pytest.mark.parametrize("syntax", [
    uid.ExplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian, uid.RLELossless,
    uid.JPEG2000Lossless, uid.JPEGLSLossless,
])
def test_cut_and_flipped_files_are_read_errors_or_records(dicom, syntax):
  dataset = dicom.dataset(dicom.volume((2, 64, 64)), PixelSpacing=[0.1, 0.2])
  if syntax.is_encapsulated:
    dataset.compress(syntax, generate_instance_uid=False)
  dataset.file_meta.TransferSyntaxUID = syntax
  content = dicom.to_bytes(dataset)
  rng = np.random.default_rng(0)
  found = set()
  for trial in range(120):
    spoilt = bytearray(content)
    if trial % 2:
      del spoilt[int(rng.integers(len(content))):]
    else:
      for at in rng.integers(0, len(content), 1 + trial % 7):
        spoilt[at] ^= 1 << int(rng.integers(8))
    try:
      record = readers.read_dicom(bytes(spoilt), modalities=None, max_voxels=10**6)
      assert record.volume.size <= 10**6
    except ReadError as error:
      found.add(error.reason)
  assert "truncated" in found


def test_every_file_of_pydicom_is_read_as_pydicom_does_or_refused_truly():
  from tests.data import library_files_dicom

  rows = library_files_dicom.compare(library_files_dicom.pydicom_files())
  assert not [row for row in rows if row.fault]
  counts = {row.outcome for row in rows}
  assert {"read", "colour", "no_pixel_data", "truncated"} <= counts
  assert sum(row.outcome == "read" for row in rows) >= 50
