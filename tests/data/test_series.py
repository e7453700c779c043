"""Claims of data/readers/series.py and archives.py: slices to one volume."""

import io
import math
import random
import struct
import zipfile

import numpy as np
from pydicom.uid import CTImageStorage, JPEG2000Lossless, generate_uid
import pytest

from vjepa_jax import data
from vjepa_jax.data import readers, storage
from vjepa_jax.data.record import ReadError

SERIES = "1.2.3.4"


@pytest.fixture
def make_slice(dicom):
  """Returns make(z, ...) -> (voxels, dataset) of one CT slice at z mm."""

  def make(z=0.0, *, seed=None, shape=(16, 20), dtype=np.int16, corner=None, **tags):
    seed = round(z * 1000) % 2**32 if seed is None else seed
    voxels = np.random.default_rng(seed).integers(0, 1000, (1, *shape)).astype(dtype)
    place = [-5.0, 7.0, z] if corner is None else corner
    values = {
        "SOPClassUID": CTImageStorage, "Modality": "CT", "SeriesInstanceUID": SERIES,
        "ImagePositionPatient": place, "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [0.5, 0.25], "SliceThickness": 9.0,
    } | tags
    dataset = dicom.dataset(voxels, **values)
    del dataset.NumberOfFrames
    for name in [k for k, v in values.items() if v is None]:
      del dataset[name]
    return voxels[0], dataset

  return make


@pytest.fixture
def write(dicom, tmp_path):
  """Returns write(datasets) -> folder; names tell nothing of the order."""

  def write(datasets, folder="series"):
    target = tmp_path / folder
    target.mkdir(exist_ok=True)
    names = list(range(len(datasets)))
    random.Random(0).shuffle(names)
    for name, dataset in zip(names, datasets):
      (target / f"{name}.dcm").write_bytes(dicom.to_bytes(dataset))
    return str(target)

  return write


def reason(path, **options) -> str:
  with pytest.raises(ReadError) as caught:
    data.read(path, **options)
  return caught.value.reason


def zip_of(files: dict[str, bytes], method=zipfile.ZIP_DEFLATED) -> bytes:
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", method) as archive:
    for name, content in files.items():
      archive.writestr(zipfile.ZipInfo(name), content, method)
  return file.getvalue()


def test_slices_are_ordered_by_position_along_their_normal(make_slice, write):
  # The normal of these axes points down -x: positions fall as x grows.
  axes = [0, 1, 0, 0, 0, -1]
  made = [
      make_slice(
          x, corner=[x, 3.0, 4.0], ImageOrientationPatient=axes, InstanceNumber=i
      ) for i, x in enumerate((3.0, -1.5, 0.0, 1.5, 4.5))
  ]
  record = data.read(write([d for _, d in made]))
  want = np.array([made[i][0] for i in (4, 0, 3, 2, 1)])
  np.testing.assert_array_equal(record.volume[0, ..., 0], want)
  np.testing.assert_allclose(record.spacing, [math.nan, 1.5, 0.5, 0.25])
  assert record.meta["slice_positions_mm"] == [-4.5, -3.0, -1.5, 0.0, 1.5]
  assert record.meta["spacing_source"] == "top_level+positions"
  assert record.meta["gantry_tilt_deg"] == 0 and record.meta["slice_gaps"] == []
  assert "slice_shear_mm" not in record.meta


def test_a_lost_slice_is_reported_and_leaves_dz_unknown(make_slice, write):
  record = data.read(write([make_slice(z)[1] for z in (0, 2, 4, 10, 12, 14)]))
  assert math.isnan(record.spacing[1])
  assert record.meta["slice_gaps"] == [[2, 2]]
  assert record.meta["slice_positions_mm"] == [0, 2, 4, 10, 12, 14]
  assert record.meta["spacing_source"] == "top_level+varies"


def test_steps_that_are_no_multiples_are_uneven_and_no_gap(make_slice, write):
  record = data.read(write([make_slice(z)[1] for z in (0, 2, 4, 7, 10)]))
  assert math.isnan(record.spacing[1]) and record.meta["slice_gaps"] == []


def test_a_copy_of_a_slice_is_dropped_and_counted(make_slice, write):
  datasets = [make_slice(z)[1] for z in (0, 1, 2)]
  again = make_slice(1)[1]
  again.SOPInstanceUID = generate_uid()
  record = data.read(write([*datasets, again]))
  assert record.volume.shape[1] == 3 and record.meta["duplicate_slices"] == 1


def test_two_slices_at_one_place_that_differ_are_refused(make_slice, write):
  datasets = [make_slice(z)[1] for z in (0, 1, 2)]
  folder = write([*datasets, make_slice(1, seed=9)[1]])
  assert reason(folder) == "slices_missing"


def test_times_of_the_same_places_become_t(make_slice, write):
  made = {
      (t, z): make_slice(z, seed=10 * t + z, TemporalPositionIdentifier=t,
                         AcquisitionTime=f"1000{5 + 2 * t:02d}.5")
      for t in (2, 1, 3) for z in (0, 1)
  }
  record = data.read(write([d for _, d in made.values()]))
  assert record.volume.shape == (3, 2, 16, 20, 1)
  for (t, z), (voxels, _) in made.items():
    np.testing.assert_array_equal(record.volume[t - 1, z, ..., 0], voxels)
  np.testing.assert_allclose(record.spacing, [2, 1, 0.5, 0.25])


@pytest.mark.parametrize("tags, want", [
    (lambda i: {"EchoTime": 10.0 * i, "AcquisitionNumber": i}, "irregular_frames"),
    (lambda i: {}, "irregular_frames"),
])
def test_images_of_one_place_that_differ_in_no_time_are_refused(
    make_slice, write, tags, want
):
  folder = write([
      make_slice(z, seed=10 * i + z, **tags(i)) [1] for i in (1, 2) for z in (0, 1)
  ])
  assert reason(folder) == want


def test_several_series_are_listed_and_one_can_be_named(make_slice, write):
  one = [make_slice(z)[1] for z in (0, 1)]
  other = [make_slice(z, seed=7 + z, SeriesInstanceUID="9.9")[1] for z in (0, 1, 2)]
  folder = write([*one, *other])
  with pytest.raises(ReadError, match=r"9\.9 \(3\).*1\.2\.3\.4 \(2\)") as caught:
    data.read(folder)
  assert caught.value.reason == "several_series"
  assert data.read(folder, series="9.9").volume.shape[1] == 3
  assert reason(folder, series="5.5") == "several_series"


def test_localisers_are_left_out_and_counted(make_slice, write):
  datasets = [make_slice(z)[1] for z in (0, 1, 2)]
  scout = dict(shape=(30, 40), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
  same = data.read(write([*datasets, make_slice(5, **scout)[1]], "same"))
  assert same.volume.shape == (1, 3, 16, 20, 1)
  assert same.meta["localisers_left_out"] == 1
  apart = make_slice(5, SeriesInstanceUID="8.8", **scout)[1]
  own = data.read(write([*datasets, apart], "own"))
  assert own.volume.shape == (1, 3, 16, 20, 1) and own.meta["files_ignored"] == 1


@pytest.mark.parametrize("odd", [
    dict(shape=(16, 24)),
    dict(PhotometricInterpretation="MONOCHROME1"),
    dict(ImageOrientationPatient=[0, 1, 0, 0, 0, 1]),
])
def test_slices_of_another_size_meaning_or_direction_are_refused(
    make_slice, write, odd
):
  folder = write([make_slice(0)[1], make_slice(1)[1], make_slice(2, **odd)[1]])
  assert reason(folder) == "irregular_frames"


def test_multi_frame_files_among_slices_are_refused_but_one_alone_is_read(
    dicom, make_slice, write
):
  film = dicom.dataset(dicom.volume((3, 16, 20)), SeriesInstanceUID=SERIES)
  with pytest.raises(ReadError, match="1 of 2 files have several frames") as caught:
    data.read(write([make_slice(0)[1], film], "mixed"))
  assert caught.value.reason == "irregular_frames"
  assert data.read(write([film], "alone")).volume.shape == (1, 3, 16, 20, 1)


def test_each_slice_has_its_own_rescale(make_slice, write):
  made = [make_slice(z, RescaleSlope=z + 1, RescaleIntercept=-z) for z in (0, 1, 2)]
  record = data.read(write([d for _, d in made]))
  want = [(z + 1) * voxels.astype(float) - z for z, (voxels, _) in enumerate(made)]
  np.testing.assert_allclose(record.volume[0, ..., 0], want)
  whole = [make_slice(z, RescaleSlope=1, RescaleIntercept=-1024) for z in (0, 1)]
  assert data.read(write([d for _, d in whole], "whole")).volume.dtype == np.int16


def test_slices_of_two_patients_are_no_series_and_their_names_stay_untold(
    make_slice, write
):
  slices = [make_slice(z, PatientID=f"Name^{z}")[1] for z in (0, 1)]
  with pytest.raises(ReadError, match="slices of 2 patients") as caught:
    data.read(write(slices))
  assert caught.value.reason == "irregular_frames" and "Name" not in str(caught.value)


def test_without_positions_the_number_orders_and_dz_is_as_stated(make_slice, write):
  made = [
      make_slice(0, seed=n, ImagePositionPatient=None, InstanceNumber=n,
                 SpacingBetweenSlices=3.0)
      for n in (12, 3, 7)
  ]
  record = data.read(write([d for _, d in made]))
  want = np.array([made[i][0] for i in (1, 2, 0)])
  np.testing.assert_array_equal(record.volume[0, ..., 0], want)
  assert record.spacing[1] == 3 and "slice_positions_mm" not in record.meta
  made = [make_slice(0, seed=n, ImagePositionPatient=None)[1] for n in (1, 2)]
  assert reason(write(made, "nothing")) == "irregular_frames"


def test_compressed_slices_read_as_the_uncompressed(make_slice, write):
  made = [make_slice(z, shape=(64, 80)) for z in (0, 1, 2)]
  for _, dataset in made:
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
  record = data.read(write([d for _, d in made]))
  np.testing.assert_array_equal(record.volume[0, ..., 0], [v for v, _ in made])


def test_a_damaged_slice_names_itself_and_other_files_are_ignored(
    make_slice, write, tmp_path
):
  folder = write([make_slice(z)[1] for z in (0, 1)])
  (tmp_path / "series" / "notes.txt").write_text("of no use")
  (tmp_path / "series" / "DICOMDIR").write_text("neither")
  record = data.read(folder)
  assert record.volume.shape[1] == 2 and record.meta["files_ignored"] == 2
  bad = tmp_path / "series" / "bad.dcm"
  content = (tmp_path / "series" / "0.dcm").read_bytes()
  for spoilt, want in (
      (b"", "empty_file"), (b"no scan" * 40, "not_dicom"),
      (content[:-100], "truncated"),
  ):
    bad.write_bytes(spoilt)
    with pytest.raises(ReadError, match="bad.dcm") as caught:
      data.read(folder)
    assert caught.value.reason == want


def test_the_claims_of_all_slices_are_added_before_decoding(make_slice, write):
  folder = write([make_slice(z)[1] for z in range(4)])
  assert reason(folder, max_voxels=4 * 320 - 1) == "too_large"
  assert reason(folder, max_bytes=3000) == "too_large"
  assert data.read(folder, max_voxels=4 * 320).volume.shape[1] == 4


def test_an_archive_reads_as_the_folder_it_holds(dicom, make_slice, write, tmp_path):
  made = [make_slice(z) for z in (0, 1, 2)]
  folder = write([d for _, d in made])
  files = {f"deep/er/{i}": dicom.to_bytes(d) for i, (_, d) in enumerate(made)}
  path = tmp_path / "scan.zip"
  path.write_bytes(zip_of(files | {"__MACOSX/x": b"junk", "deep/readme.txt": b"x"}))
  a, b = data.read(str(path)), data.read(folder)
  np.testing.assert_array_equal(a.volume, b.volume)
  np.testing.assert_array_equal(a.spacing, b.spacing)
  assert a.meta.pop("files_ignored") == 2 and a.meta == b.meta


@pytest.mark.parametrize("name", [
    "../a.dcm", "/a.dcm", "x/../../a.dcm", "C:\\a.dcm", "..\\a.dcm",
])
def test_a_path_that_escapes_condemns_the_archive(dicom, make_slice, tmp_path, name):
  path = tmp_path / "scan.zip"
  path.write_bytes(zip_of({name: dicom.to_bytes(make_slice()[1])}))
  assert reason(str(path)) == "path_escape"


def test_a_broken_nested_empty_or_encrypted_archive_has_its_reason(
    dicom, make_slice, tmp_path
):
  path = tmp_path / "scan.zip"
  content = dicom.to_bytes(make_slice()[1])
  good = zip_of({"a.dcm": content}, zipfile.ZIP_STORED)
  spoilt = bytearray(good)
  spoilt[600] ^= 1
  locked = bytearray(good)
  locked[6] |= 1
  locked[good.rfind(b"PK\x01\x02") + 8] |= 1
  for archive, want in (
      (bytes(spoilt), "bad_archive"), (bytes(locked), "bad_archive"),
      (good[:-40], "bad_archive"), (zip_of({"in.zip": good}), "bad_archive"),
      (zip_of({}), "empty_file"), (zip_of({"a.txt": b"x"}), "unsupported_format"),
  ):
    path.write_bytes(archive)
    assert reason(str(path)) == want


def test_a_bomb_is_refused_by_what_it_claims_or_by_what_it_holds(tmp_path):
  path = tmp_path / "scan.zip"
  path.write_bytes(zip_of({"a.dcm": bytes(64 << 20)}))
  assert reason(str(path)) == "too_large"
  lying = bytearray(path.read_bytes())
  for mark, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
    start = lying.find(mark) + at
    lying[start:start + 4] = struct.pack("<L", 4096)
  path.write_bytes(lying)
  assert reason(str(path)) in ("bad_archive", "not_dicom")


def test_damaged_archives_give_read_errors_and_nothing_else(dicom, make_slice):
  made = {f"{z}.dcm": dicom.to_bytes(make_slice(z)[1]) for z in range(3)}
  content = zip_of(made)
  rng = np.random.default_rng(0)
  found = set()
  for trial in range(150):
    spoilt = bytearray(content)
    for at in rng.integers(0, len(content), 1 + trial % 4):
      spoilt[at] = rng.integers(256)
    spoilt = spoilt[: len(spoilt) - trial % 3 * int(rng.integers(500))]
    try:
      readers.read_content(bytes(spoilt), "a.zip", readers.ReadOptions())
    except ReadError as error:
      found.add(error.reason)
  assert "bad_archive" in found


def test_a_real_tilted_and_uneven_head_ct_reads_straight_from_its_zip(shared):
  path = shared("data/ge_head_ct_28_dicom.zip")
  record = data.read(str(path))
  assert record.volume.shape == (1, 28, 512, 512, 1)
  assert record.volume.dtype == np.int16 and record.volume.min() == -1500
  meta = record.meta
  assert meta["padding_value"] == -1500
  np.testing.assert_allclose(meta["gantry_tilt_deg"], 18.5, atol=1e-3)
  steps = [4.22] * 13 + [1.14] + [7.38] * 13
  np.testing.assert_allclose(meta["slice_steps_mm"], steps, atol=1e-5)
  planes = np.diff(meta["slice_positions_mm"])
  tilt = math.radians(18.5)
  np.testing.assert_allclose(planes, np.array(steps) * math.cos(tilt), atol=1e-4)
  shear = np.diff(np.array(meta["slice_shear_mm"]), axis=0)  # [27, (down, along)]
  np.testing.assert_allclose(shear[:, 0], -np.array(steps) * math.sin(tilt), atol=1e-4)
  assert not shear[:, 1].any()
  np.testing.assert_allclose(
      record.spacing, [math.nan, math.nan, 0.4882812, 0.4882812]
  )
  import pydicom

  with zipfile.ZipFile(path) as archive:
    slices = [pydicom.dcmread(archive.open(name)) for name in archive.namelist()]
  slices.sort(key=lambda s: s.ImagePositionPatient[2])
  for got, want in zip(record.volume[0, ..., 0], slices):
    np.testing.assert_array_equal(got, want.pixel_array)


def test_a_series_in_a_bucket_reads_as_on_a_disk_one_request_a_slice(
    dicom, make_slice, write, bucket
):
  made = [make_slice(z) for z in range(5)]
  folder = write([d for _, d in made])
  for index, (_, dataset) in enumerate(made):
    storage.write_bytes(f"{bucket}/scan/{4 - index}.dcm", dicom.to_bytes(dataset))
  bucket.forget_requests()
  remote, local = data.read(f"{bucket}/scan"), data.read(folder)
  np.testing.assert_array_equal(remote.volume, local.volume)
  assert remote.meta == local.meta
  assert sum(".dcm" in request for request in bucket.requests()) == 5


def test_a_slice_that_cannot_be_fetched_stops_the_series_with_its_reason(
    dicom, make_slice, bucket, monkeypatch
):
  monkeypatch.setenv("VJEPA_JAX_STORAGE_DEADLINE_S", "1")
  for z in range(3):
    storage.write_bytes(
        f"{bucket}/scan/{z}.dcm", dicom.to_bytes(make_slice(z)[1])
    )
  bucket.fault("503", name="scan/1.dcm")
  assert reason(f"{bucket}/scan") == "unreachable"
  bucket.clear_faults()
  assert data.read(f"{bucket}/scan").volume.shape[1] == 3
