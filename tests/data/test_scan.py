"""Claims of data/scan.py: one listing, one head a file, one row a recording."""

import csv
import hashlib
import io
import zipfile

import numpy as np
import pytest

from tests.data.conftest import make_dataset, make_volume, to_bytes
from vjepa_jax.data import read, storage
from vjepa_jax.data.manifest import read_manifest
from vjepa_jax.data.record import DataError
from vjepa_jax.data.scan import scan


def table(path):
  return list(csv.DictReader(io.StringIO(storage.read_bytes(path).decode()), delimiter="\t"))


def slice_of(series, number, *, modality="CT", shape=(16, 20)):
  dataset = make_dataset(make_volume((1, *shape), np.uint16, number))
  del dataset.NumberOfFrames
  dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = (
      "1.2.840.10008.5.1.4.1.1.2"
  )
  dataset.Modality, dataset.SeriesInstanceUID = modality, series
  dataset.InstanceNumber = number
  dataset.ImagePositionPatient = [0, 0, 2.5 * number]
  dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
  dataset.PixelSpacing, dataset.SliceThickness = [0.5, 0.5], 2.5
  return to_bytes(dataset)


@pytest.fixture
def files(tmp_path):
  """Returns {name: content} of a folder with every kind of recording."""
  import nibabel

  rng = np.random.default_rng(0)
  opt = make_dataset(
      make_volume(), PixelSpacing=[0.004, 0.012], SpacingBetweenSlices=0.1,
      ImageLaterality="L", PatientID="1001", Manufacturer="Heidelberg Engineering",
      ManufacturerModelName="Spectralis", AnatomicRegionSequence={"CodeMeaning": "Macula"},
      SeriesInstanceUID="9.9",
  )
  content = {"opt/a.dcm": to_bytes(opt)}
  for n in range(4):
    content[f"ct/alone/{n}"] = slice_of("1.2.3", n)
    content[f"ct/both/{n}.dcm"] = slice_of("1.2.4", n)
    content[f"ct/both/{n + 4}.dcm"] = slice_of("1.2.5", n)
  image = nibabel.Nifti1Image(
      rng.integers(0, 9, (5, 6, 7)).astype(np.int16), np.diag([1, 2, 3, 1.0])
  )
  image.to_filename(tmp_path / "x.nii.gz")
  content["mr/sub-007/anat/sub-007_T1w.nii.gz"] = (tmp_path / "x.nii.gz").read_bytes()
  content["mr/sub-007/anat/sub-007_T1w.json"] = b"{}"
  array = io.BytesIO()
  np.save(array, rng.integers(0, 9, (3, 4, 5), np.uint8))
  content["arrays/v.npy"] = array.getvalue()
  archive = io.BytesIO()
  with zipfile.ZipFile(archive, "w") as packed:
    packed.writestr("1.dcm", content["ct/alone/0"])
  content["packed.zip"] = archive.getvalue()
  content["z/.zgroup"] = content["z/0/.zarray"] = b"{}"
  content["z/0/0.0"] = b"abc"
  content |= {
      "README.md": b"notes", ".hidden.dcm": b"x", "bad/empty.dcm": b"",
      "bad/not.dcm": b"hello" * 100, "bad/what.bin": b"\x01\x02" * 50,
      "bad/cut.dcm": content["opt/a.dcm"].partition(b"delberg")[0],
  }
  return content


@pytest.fixture
def folder(files, tmp_path):
  root = tmp_path / "data"
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return root


def test_every_recording_is_one_row_with_what_its_header_says(folder):
  output = str(folder / "manifest.tsv")
  told = []
  scan(str(folder), output=output, progress=lambda *a: told.append(a))
  rows = {(r["filepath"], r["series_instance_uid"]): r for r in table(output)}
  assert {name for name, _ in rows} == {
      "opt/a.dcm", "ct/alone", "ct/both", "mr/sub-007/anat/sub-007_T1w.nii.gz",
      "arrays/v.npy", "packed.zip", "z",
  }
  assert {uid for name, uid in rows if name == "ct/both"} == {"1.2.4", "1.2.5"}
  opt = rows["opt/a.dcm", ""]
  assert (opt["participant_id"], opt["laterality"], opt["modality"]) == ("1001", "L", "OPT")
  assert opt["device"] == "heidelberg_engineering_spectralis"
  assert (opt["anatomic_region"], opt["number_of_frames"]) == ("Macula", "4")
  assert (opt["shape"], opt["spacing"]) == ("4x64x80", "[0.1, 0.004, 0.012]")
  assert opt["format"] == "dicom" and opt["sop_instance_uid"]
  assert int(opt["size"]) == (folder / "opt/a.dcm").stat().st_size
  series = rows["ct/alone", ""]
  assert (series["format"], series["number_of_frames"]) == ("dicom_series", "4")
  assert series["shape"] == "4x16x20" and series["modality"] == "CT"
  image = rows["mr/sub-007/anat/sub-007_T1w.nii.gz", ""]
  assert (image["participant_id"], image["shape"]) == ("007", "7x6x5")
  assert image["spacing"] == "[3, 2, 1]"
  assert rows["arrays/v.npy", ""]["shape"] == "3x4x5"
  assert [rows[n, ""]["format"] for n in ("packed.zip", "z")] == ["zip", "zarr"]
  assert told[-1][0] == told[-1][1] == len(told)


def test_what_no_reader_takes_is_listed_with_the_reason(folder):
  scan(str(folder), output=str(folder / "manifest.tsv"))
  bad = {r["path"][len(str(folder)) + 1:]: r["reason"] for r in table(
      str(folder / "manifest.unreadable.tsv"))}
  assert bad == {
      "bad/empty.dcm": "empty_file", "bad/not.dcm": "not_dicom",
      "bad/what.bin": "unsupported_format", "bad/cut.dcm": "truncated",
  }
  # Neither table is taken for a recording the next time.
  before = table(str(folder / "manifest.tsv"))
  scan(str(folder), output=str(folder / "manifest.tsv"))
  assert table(str(folder / "manifest.tsv")) == before


def test_the_rows_are_read_back_and_their_files_read(folder, tmp_path):
  for output in (folder / "m.tsv", tmp_path / "elsewhere" / "m.tsv"):
    found = scan(str(folder), output=str(output))
    assert found.rows == read_manifest(str(output)).rows
    rows = {row.path[len(str(folder)) + 1:].rpartition("data/")[2] + row.series: row
            for row in found.rows}
    for row in rows.values():
      assert storage.exists(row.path)
    shapes = {
        row.series: read(row.path, **row.read_options()).volume.shape
        for row in found.rows if "ct" in row.path
    }
    assert set(shapes.values()) == {(1, 4, 16, 20, 1)}
    assert set(shapes) == {"", "1.2.4", "1.2.5"}
  # Rows of whom nothing is known are dropped by name, not silently.
  assert found.lost["no_participant"] == 3


def test_patterns_take_columns_from_the_path(folder):
  found = scan(
      str(folder), output=str(folder / "m.tsv"),
      patterns={"participant_id": r"^([^/]+)/", "visit": r"(sub-\d+)"},
  )
  assert {row.participant for row in found.rows} == {"opt", "ct", "mr", "arrays"}
  visits = {r["filepath"]: r["visit"] for r in table(str(folder / "m.tsv"))}
  assert visits["mr/sub-007/anat/sub-007_T1w.nii.gz"] == "sub-007"


@pytest.mark.parametrize("rule,said", [("(", "unterminated"), ("abc", "needs a group")])
def test_a_pattern_that_is_none_is_refused(folder, rule, said):
  with pytest.raises(DataError, match=said):
    scan(str(folder), output=str(folder / "m.tsv"), patterns={"site": rule})


def test_a_folder_of_no_recording_is_an_error(tmp_path):
  (tmp_path / "notes.txt").write_text("x")
  (tmp_path / "b.dcm").write_bytes(b"no")
  with pytest.raises(DataError, match="no recording among 2 files; 1 not_dicom"):
    scan(str(tmp_path), output=str(tmp_path / "m.tsv"))


def test_local_checksums_are_of_the_content(folder):
  scan(str(folder), output=str(folder / "m.tsv"), checksums=True)
  sums = {r["filepath"]: r["checksum"] for r in table(str(folder / "m.tsv"))}
  content = (folder / "opt/a.dcm").read_bytes()
  assert sums["opt/a.dcm"] == f"md5:{hashlib.md5(content).hexdigest()}"
  assert sums["ct/alone"] == ""


def test_a_bucket_takes_one_listing_and_one_request_a_file(files, bucket, tmp_path):
  for name, content in files.items():
    storage.write_bytes(f"{bucket.url}/data/{name}", content)
  local = tmp_path / "data"
  for name, content in files.items():
    (local / name).parent.mkdir(parents=True, exist_ok=True)
    (local / name).write_bytes(content)
  bucket.forget_requests()
  found = scan(f"{bucket.url}/data", output=f"{bucket.url}/manifest.tsv")
  asked = bucket.requests()
  heads = [line for line in asked if "/data/" in line or "data%2F" in line]
  # README, the sidecar and the hidden file are not asked for; nor what is empty, nor
  # what a Zarr holds.
  candidates = len(files) - 3 - 1 - 3
  assert len(heads) <= candidates + 1 + 2, "\n".join(heads)
  assert found.rows == read_manifest(f"{bucket.url}/manifest.tsv").rows
  rows = table(f"{bucket.url}/manifest.tsv")
  assert all(r["filepath"].startswith("data/") for r in rows)
  checks = {r["filepath"]: r["checksum"] for r in rows}
  content = files["opt/a.dcm"]
  assert checks["data/opt/a.dcm"] in (
      f"md5:{hashlib.md5(content).hexdigest()}", checks["data/opt/a.dcm"]
  ) and checks["data/opt/a.dcm"]
  # A manifest on the local disk names the objects in full.
  scan(f"{bucket.url}/data", output=str(tmp_path / "far.tsv"))
  assert all(r["filepath"].startswith("gs://") for r in table(str(tmp_path / "far.tsv")))
  same = scan(str(local), output=str(local / "m.tsv"))
  key = lambda row: (row.path.rpartition("data/")[2], row.series)
  assert sorted(map(key, same.rows)) == sorted(map(key, found.rows))


def test_a_header_longer_than_the_first_request_is_fetched_further(tmp_path):
  dataset = make_dataset(make_volume(), PatientID="7")
  dataset.ImageComments = "x" * 9000
  dataset.add_new(0x00091001, "OB", bytes(200_000))
  (tmp_path / "long.dcm").write_bytes(to_bytes(dataset))
  found = scan(str(tmp_path), output=str(tmp_path / "m.tsv"))
  assert found.rows[0].participant == "7"


def test_a_header_that_pydicom_chokes_on_is_listed_and_the_rest_scanned(tmp_path):
  content = to_bytes(make_dataset(make_volume(), PatientID="7"))
  (tmp_path / "good.dcm").write_bytes(content)
  rows = content.index(b"\x28\x00\x10\x00US")
  bad = content[: rows + 4] + b"\x55\xc8" + content[rows + 6 :]
  (tmp_path / "bad.dcm").write_bytes(bad)
  found = scan(str(tmp_path), output=str(tmp_path / "m.tsv"))
  assert [row.path for row in found.rows] == [str(tmp_path / "good.dcm")]
  bad, = table(str(tmp_path / "m.unreadable.tsv"))
  assert bad["path"].endswith("bad.dcm") and bad["reason"] == "bad_header"


def write_tiffs(folder, names):
  import tifffile

  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(folder / name, np.zeros((3, 4, 5), np.uint8))


def test_the_time_points_of_an_embryo_are_one_row_and_its_overviews_none(tmp_path):
  moments = [f"_t{t:03d}.tif" for t in range(3)]
  write_tiffs(tmp_path, [
      *(f"e1/images/nih_1{m}" for m in moments), *(f"e1/mip/nih_1{m}" for m in moments),
      *(f"e1/nih_1{m}" for m in moments), "e1/overview.tif",
      *(f"plain/e2{m}" for m in moments), "e3/images/e3_t0.TIFF", "e3/images/e3_t1.TIFF",
      *(f"e4/images/e4_t{t:03d}.ome.tif" for t in range(3)),
  ])
  (tmp_path / "e1" / "tracks").mkdir()
  (tmp_path / "e1" / "tracks" / "tracks.txt").write_text("t\tz\ty\tx\n")
  found = scan(str(tmp_path), output=str(tmp_path / "m.tsv"))
  assert {row.participant: row.path for row in found.rows} == {
      name: str(tmp_path / folder)
      for name, folder in (
          ("e1", "e1"), ("plain", "plain"), ("e3", "e3"), ("e4", "e4"),
      )
  }
  assert not found.lost
  assert [r["number_of_frames"] for r in table(str(tmp_path / "m.tsv"))] == [
      "3", "2", "3", "3"
  ]
  beside = table(str(tmp_path / "m.unreadable.tsv"))
  assert {r["reason"] for r in beside} == {"beside_images"}
  assert sorted(r["path"][len(str(tmp_path)) + 1:] for r in beside) == sorted(
      [*(f"e1/mip/nih_1{m}" for m in moments), *(f"e1/nih_1{m}" for m in moments),
       "e1/overview.tif"]
  )


def test_tiffs_that_number_no_time_are_rows_of_their_own(tmp_path):
  write_tiffs(tmp_path, [
      # Weightings, not time points; two movies in one folder; a movie of one moment.
      "sub-1/brain_t1.tif", "sub-1/brain_t2.tif", "two/a_t000.tif", "two/a_t001.tif",
      "two/b_t000.tif", "sub-2/images/x_t000.tif",
  ])
  scan(str(tmp_path), output=str(tmp_path / "m.tsv"))
  rows = table(str(tmp_path / "m.tsv"))
  assert len(rows) == 6 and {r["format"] for r in rows} == {"tiff"}
