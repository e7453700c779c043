"""Claims of data/validate.py: a manifest against what is there."""

import hashlib
import json
import pathlib

import pytest

from vjepa_jax.data import storage
from vjepa_jax.data.record import DataError
from vjepa_jax.data.scan import scan
from vjepa_jax.data.validate import validate


@pytest.fixture
def corpus(write_corpus, tmp_path):
  """Returns the path of a scanned manifest over twelve files."""
  write_corpus()
  (tmp_path / "manifest.tsv").unlink()
  scan(str(tmp_path), output=str(tmp_path / "manifest.tsv"), checksums=True)
  return str(tmp_path / "manifest.tsv")


def file(manifest, name):
  return pathlib.Path(manifest).parent / "oct/topcon_triton" / name


def test_a_sound_set_is_told_so_and_counted(corpus):
  told = []
  report = validate(corpus, read=True, progress=lambda *a: told.append(a))
  assert report["sound"] and report["rows"] == 12 == report["read"]
  assert report["sizes_checked"] == report["checksums_checked"] == 12
  assert report["device"] == {"heidelberg_spectralis": 6, "topcon_triton": 6}
  assert told[-1] == (12, 12)
  json.dumps(report)


def test_each_difference_is_told_by_its_kind(corpus):
  file(corpus, "1000/R.dcm").unlink()
  file(corpus, "1001/R.dcm").write_bytes(b"short")
  content = bytearray(file(corpus, "1002/R.dcm").read_bytes())
  content[-1] ^= 1
  file(corpus, "1002/R.dcm").write_bytes(bytes(content))
  file(corpus, "1009").mkdir()
  file(corpus, "1009/R.dcm").write_bytes(bytes(content))
  (pathlib.Path(corpus).parent / "oct" / "notes.txt").write_text("x")
  report = validate(corpus, read=True)
  ends = {k: [p[-10:] for p in report[k]] for k in (
      "missing", "unlisted", "size_differs", "checksum_differs")}
  assert ends == {
      "missing": ["1000/R.dcm"], "unlisted": ["1009/R.dcm"],
      "size_differs": ["1001/R.dcm"],
      "checksum_differs": ["1001/R.dcm", "1002/R.dcm"],
  }
  assert {k: [p[-10:] for p in v] for k, v in report["unreadable"].items()} == {
      "not_dicom": ["1001/R.dcm"]
  }
  assert report["unreadable_device"] == {"topcon_triton": 1} and not report["sound"]


def test_unlisted_files_alone_are_sound(corpus):
  file(corpus, "1009").mkdir()
  file(corpus, "1009/R.dcm").write_bytes(b"x")
  report = validate(corpus)
  assert report["sound"] and len(report["unlisted"]) == 1 and report["read"] == 0


def test_a_sample_is_drawn_by_seed_and_bounds_what_is_read(corpus):
  for n in range(6):
    file(corpus, f"100{n}/R.dcm").write_bytes(b"broken")
  found = [validate(corpus, sample=4, read=True, seed=s) for s in (0, 0, 1)]
  assert [report["read"] for report in found] == [4, 4, 4]
  assert found[0]["unreadable"] == found[1]["unreadable"] != found[2]["unreadable"]
  assert len(found[0]["size_differs"]) == 6  # sizes are known of all


def test_a_folder_row_holds_what_lies_below_it(tmp_path):
  (tmp_path / "v").mkdir()
  for n in range(3):
    (tmp_path / "v" / f"{n}.dcm").write_bytes(bytes(10))
  (tmp_path / "m.tsv").write_text("participant_id\tfilepath\tsize\n1\tv\t30\n2\tw\t1\n")
  report = validate(str(tmp_path / "m.tsv"))
  assert not report["unlisted"] and not report["size_differs"]
  assert [p[-2:] for p in report["missing"]] == ["/w"]


def test_a_bucket_is_held_against_its_own_checksums(write_corpus, bucket, tmp_path):
  write_corpus()
  names = [p for p in tmp_path.rglob("*.dcm")]
  for path in names:
    storage.write_bytes(f"{bucket.url}/{path.relative_to(tmp_path)}", path.read_bytes())
  manifest = f"{bucket.url}/manifest.tsv"
  scan(str(bucket.url), output=manifest)
  bucket.forget_requests()
  report = validate(manifest)
  assert report["sound"] and report["checksums_checked"] == 12, report
  assert not [line for line in bucket.requests() if "alt=media" in line and ".dcm" in line]
  other = names[0].read_bytes()[::-1]
  storage.write_bytes(f"{bucket.url}/{names[1].relative_to(tmp_path)}", other)
  storage.delete(f"{bucket.url}/{names[2].relative_to(tmp_path)}")
  report = validate(manifest, read=True)
  assert len(report["checksum_differs"]) == 1 and len(report["missing"]) == 1
  assert set(report["unreadable"]) == {"not_dicom"}


def test_a_checksum_of_either_kind_is_computed_from_a_local_file(tmp_path):
  import google_crc32c

  content = b"some bytes"
  (tmp_path / "a").write_bytes(content)
  (tmp_path / "b").write_bytes(content)
  (tmp_path / "c").write_bytes(content)
  crc = google_crc32c.Checksum(content).digest().hex()
  (tmp_path / "m.tsv").write_text(
      "participant_id\tfilepath\tchecksum\n"
      f"1\ta\tmd5:{hashlib.md5(content).hexdigest()}\n1\tb\tcrc32c:{crc}\n"
      "1\tc\tcrc32c:00000000\n"
  )
  report = validate(str(tmp_path / "m.tsv"))
  assert report["checksums_checked"] == 3
  assert [p[-1] for p in report["checksum_differs"]] == ["c"]


def test_a_bucket_out_of_reach_is_no_verdict(write_corpus, bucket, tmp_path, monkeypatch):
  monkeypatch.setenv("VJEPA_JAX_STORAGE_DEADLINE_S", "0.5")
  write_corpus(people=2)
  for path in tmp_path.rglob("*.dcm"):
    storage.write_bytes(f"{bucket.url}/{path.relative_to(tmp_path)}", path.read_bytes())
  scan(str(bucket.url), output=f"{bucket.url}/manifest.tsv")
  bucket.fault("503", name="oct/topcon_triton/1001/R.dcm", share=1.0)
  with pytest.raises(DataError, match="Nothing is known of the rest"):
    validate(f"{bucket.url}/manifest.tsv", read=True)
