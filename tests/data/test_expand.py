"""Claims of data/expand.py: a ZIP in a bucket, expanded there; none is trusted."""

import collections
import io
import os
import pathlib
import random
import signal
import stat
import struct
import subprocess
import sys
import time
import zipfile
import zlib

import pytest

from vjepa_jax.data import expand, storage
from vjepa_jax.data.record import ReadError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def pack(members, compression=zipfile.ZIP_DEFLATED) -> bytes:
  """Returns a ZIP of (name or ZipInfo, content)."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", compression) as zip_file:
    for name, content in members:
      zip_file.writestr(name, content, compress_type=compression)
  return file.getvalue()


def as_link(name: str) -> zipfile.ZipInfo:
  info = zipfile.ZipInfo(name)
  info.create_system = 3
  info.external_attr = (stat.S_IFLNK | 0o777) << 16
  return info


def scans(count=12, size=30_000, seed=0) -> dict[str, bytes]:
  rng = random.Random(seed)
  return {f"study/{i % 3}/IM{i:04}.dcm": rng.randbytes(size + i) for i in range(count)}


def lay(place: str, data: bytes) -> str:
  storage.write_bytes(f"{place}/in/x.zip", data)
  return f"{place}/in/x.zip"


@pytest.fixture(params=["bucket", "disk"])
def place(request, tmp_path):
  """A root on a bucket, then on a disk."""
  if request.param == "bucket":
    return request.getfixturevalue("bucket").url
  (tmp_path / "in").mkdir()
  return str(tmp_path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_file_of_an_archive_is_written_and_verified(place, compression):
  files = scans()
  source = lay(place, pack([("study/", b""), *files.items()], compression))
  report = expand.expand(source, f"{place}/out")
  assert {
      e.path.removeprefix(f"{place}/out/"): storage.read_bytes(e.path)
      for e in storage.list_entries(f"{place}/out")
  } == files
  assert report == {
      "written": 12, "present": 0, "refused": {}, "reasons": {},
      "bytes": sum(map(len, files.values())), "missing": [], "unlisted": [],
  }


def test_a_second_run_writes_only_what_is_missing_or_different(place):
  files = scans()
  source = lay(place, pack(files.items()))
  expand.expand(source, f"{place}/out")
  names = sorted(files)
  storage.delete(f"{place}/out/{names[3]}")
  storage.write_bytes(f"{place}/out/{names[5]}", b"x" * len(files[names[5]]))
  storage.write_bytes(f"{place}/out/{names[7]}", b"short")
  storage.write_bytes(f"{place}/out/stranger", b"x")
  # Written by another program: no note of its CRC, but the right content.
  storage.write_bytes(f"{place}/out/{names[9]}", files[names[9]])
  report = expand.expand(source, f"{place}/out")
  assert (report["written"], report["present"]) == (3, 9)
  assert report["unlisted"] == ["stranger"] and report["missing"] == []
  assert all(storage.read_bytes(f"{place}/out/{n}") == files[n] for n in names)


def test_nothing_is_written_outside_and_each_refusal_has_its_reason(place):
  hostile = [
      ("../up.dcm", b"1"), ("a/../../up.dcm", b"1"), ("/abs.dcm", b"1"),
      ("C:\\win.dcm", b"1"), ("..\\up.dcm", b"1"), ("line\nbreak.dcm", b"1"),
      (as_link("link.dcm"), b"/etc/passwd"), ("good/./a.dcm", b"kept"),
      ("same.dcm", b"one"), ("./same.dcm", b"two"), ("twin.dcm", b"t"),
      ("./twin.dcm", b"t"), ("node", b"file"), ("node/child.dcm", b"1"),
      ("zeros.dcm", bytes(30 << 20)),
  ]
  source = lay(place, pack(hostile))
  report = expand.expand(source, f"{place}/out")
  assert report["refused"] == {
      "../up.dcm": "path_escape", "a/../../up.dcm": "path_escape",
      "/abs.dcm": "path_escape", "C:\\win.dcm": "path_escape",
      "..\\up.dcm": "path_escape", "line\nbreak.dcm": "path_escape",
      "link.dcm": "not_a_file", "same.dcm": "name_collision",
      "node": "name_collision", "zeros.dcm": "bomb",
  }
  assert report["reasons"]["path_escape"] == 6
  assert storage.list_files(place) == sorted(
      [source] + [f"{place}/out/{n}" for n in ("good/a.dcm", "node/child.dcm",
                                               "twin.dcm")]
  )


def test_a_name_too_long_for_a_disk_is_refused_and_its_neighbours_written(place):
  long, deep = "n" * 250 + ".dcm", "d/" * 500 + "x.dcm"
  source = lay(place, pack([(long, b"1"), ("a.dcm", b"2"), (deep, b"3")]))
  report = expand.expand(source, f"{place}/out")
  assert report["refused"] == {long: "name_too_long", deep: "name_too_long"}
  assert report["written"] == 1 and report["missing"] == []


def test_no_thread_is_an_error_and_not_an_empty_expansion(tmp_path):
  with pytest.raises(ValueError, match="threads is 0"):
    expand.expand(str(tmp_path / "x.zip"), str(tmp_path / "out"), threads=0)


def rewrite(data: bytes, name: str, **fields) -> bytes:
  """Returns a ZIP whose directory claims other things of a member."""
  out = bytearray(data)
  at = {"flags": (8, "<H", 6), "method": (10, "<H", 8), "crc": (16, "<L", 14),
        "packed": (20, "<L", 18), "size": (24, "<L", 22)}
  central = data.rindex(b"PK\x01\x02", 0, data.rindex(name.encode()))
  local = data.index(b"PK\x03\x04", max(0, data.index(name.encode()) - 30))
  for field, value in fields.items():
    offset, form, offset_local = at[field]
    struct.pack_into(form, out, central + offset, value)
    struct.pack_into(form, out, local + offset_local, value)
  return bytes(out)


@pytest.mark.parametrize("fields, reason", [
    ({"flags": 1}, "encrypted"), ({"method": 12}, "packing"),
    ({"size": 100}, "bad_archive"), ({"size": 50_000}, "bad_archive"),
    ({"crc": 7}, "bad_archive"), ({"method": 0}, "bad_archive"),
])
def test_a_member_that_lies_is_refused_and_leaves_nothing(place, fields, reason):
  files = {"a.dcm": b"a" * 30_000, "b.dcm": b"b" * 100, "c.dcm": b"c" * 100}
  source = lay(place, rewrite(pack(files.items()), "a.dcm", **fields))
  report = expand.expand(source, f"{place}/out")
  assert report["refused"] == {"a.dcm": reason} and report["written"] == 2
  assert [p[-5:] for p in storage.list_files(f"{place}/out")] == ["b.dcm", "c.dcm"]


def test_a_damaged_member_is_refused_and_its_neighbours_are_written(bucket):
  files = {"a.dcm": os.urandom(20 << 20), "b.dcm": os.urandom(1000)}
  data = bytearray(pack(files.items(), zipfile.ZIP_STORED))
  data[19 << 20] ^= 1
  # Larger than an upload's piece: the first of it has been sent when it shows.
  report = expand.expand(lay(bucket.url, bytes(data)), f"{bucket}/out")
  assert report["refused"] == {"a.dcm": "bad_archive"} and report["missing"] == []
  assert storage.list_files(f"{bucket}/out") == [f"{bucket}/out/b.dcm"]


def test_members_that_share_bytes_are_refused(place):
  data = bytearray(pack((n, os.urandom(500)) for n in ("a.dcm", "b.dcm", "c.dcm")))
  middle = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
  struct.pack_into("<L", data, middle + 42, 10)
  report = expand.expand(lay(place, bytes(data)), f"{place}/out")
  assert report["refused"] == {"a.dcm": "bad_archive", "b.dcm": "bad_archive"}
  assert report["written"] == 1 and report["missing"] == []


@pytest.mark.parametrize("data, reason", [
    (b"", "bad_archive"), (b"no archive" * 50, "bad_archive"),
    (pack(scans().items())[:-40], "bad_archive"),
    (b"PK\x05\x06" + struct.pack("<HHHHLLH", 0, 0, 9, 9, 1 << 31, 0, 0), "too_large"),
])
def test_what_is_no_sound_archive_is_one_error(tmp_path, data, reason):
  path = str(tmp_path / "x.zip")
  storage.write_bytes(path, data)
  with pytest.raises(ReadError) as caught:
    expand.expand(path, str(tmp_path / "out"))
  assert caught.value.reason == reason and path in str(caught.value)


def test_the_sound_end_of_a_cut_archive_is_kept(tmp_path):
  files = scans()
  path = str(tmp_path / "x.zip")
  storage.write_bytes(path, pack(files.items())[200_000:])
  report = expand.expand(path, str(tmp_path / "out"))
  assert report["reasons"] == {"bad_archive": 7} and report["written"] == 5
  assert all(
      storage.read_bytes(str(tmp_path / "out" / n)) == files[n]
      for n in files.keys() - report["refused"].keys()
  )


def test_all_members_together_are_bounded():
  zip_file = zipfile.ZipFile(io.BytesIO(pack(scans(size=1000).items())))
  chosen, refused = expand.safe_members(zip_file, "x.zip", max_bytes=20_000)
  assert len(chosen) == 12 and refused == {}
  with pytest.raises(ReadError) as caught:
    expand.safe_members(zip_file, "x.zip", max_bytes=12_000)
  assert caught.value.reason == "too_large"


def test_any_changed_byte_of_an_archive_ends_in_a_report_or_one_error(tmp_path):
  files = scans(4, 300)
  whole = pack(files.items())
  rng = random.Random(0)
  outcomes = collections.Counter()
  for number in range(400):
    data = bytearray(whole)
    # Most of the damage goes to the directory and the headers.
    low = len(whole) - 400 if number % 2 else 0
    for _ in range(rng.randint(1, 3)):
      data[rng.randrange(low, len(data))] = rng.randrange(256)
    path, out = str(tmp_path / "x.zip"), tmp_path / f"out{number}"
    storage.write_bytes(path, bytes(data))
    try:
      report = expand.expand(path, str(out), threads=1)
    except ReadError as error:
      outcomes[error.reason] += 1
      continue
    outcomes["report"] += 1
    assert report["missing"] == []
    for entry in storage.list_entries(str(out)) if out.exists() else ():
      content = storage.read_bytes(entry.path)
      assert zlib.crc32(content) in map(zlib.crc32, files.values())
  assert set(outcomes) <= {"report", "bad_archive", "too_large"}
  assert outcomes["report"] > 50 and outcomes["bad_archive"] > 10


def test_an_expansion_ends_through_faults_of_the_bucket(bucket):
  files = scans(40)
  source = lay(bucket.url, pack(files.items()))
  storage.reset_counters()
  for kind in ("503", "reset", "dropped", "truncate"):
    bucket.fault(kind, share=0.05, seed=len(kind))
  report = expand.expand(source, f"{bucket}/out")
  bucket.clear_faults()
  assert report["written"] == 40 and report["missing"] == []
  assert sum(storage.counters().values()) > 0
  assert all(storage.read_bytes(f"{bucket}/out/{n}") == files[n] for n in files)


def test_an_archive_replaced_while_it_is_expanded_is_told(bucket):
  source = lay(bucket.url, pack(scans(200, 60_000).items(), zipfile.ZIP_STORED))
  # Its directory has been read, and the list of what is there takes its time.
  bucket.fault("hang", name="?prefix=out/", seconds=2)
  code = (
      "from vjepa_jax.data import expand, record\n"
      f"try: expand.expand({source!r}, '{bucket}/out')\n"
      "except record.ReadError as error: print(error.reason)"
  )
  running = subprocess.Popen(
      [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
  )
  while not any("in/x.zip?alt" in line for line in bucket.requests()):
    time.sleep(0.02)
  time.sleep(0.5)
  storage.write_bytes(source, pack(scans(200, 60_000, seed=1).items()))
  assert running.communicate(timeout=60)[0].strip() == "changed"


def test_a_killed_expansion_goes_on_where_it_was(bucket):
  files = scans(60, 20_000)
  source = lay(bucket.url, pack(files.items()))
  bucket.fault("hang", name="out/", method="POST", seconds=0.05)
  code = f"from vjepa_jax.data import expand; expand.expand({source!r}, '{bucket}/out')"
  for target in (10, 30):
    running = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while len(uploads(bucket)) < target and running.poll() is None:
      time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
  bucket.clear_faults()
  report = expand.expand(source, f"{bucket}/out")
  assert report["written"] + report["present"] == 60 and report["present"] >= 25
  assert all(storage.read_bytes(f"{bucket}/out/{n}") == files[n] for n in files)
  # Only a write under way when its process was killed may come twice.
  twice = [n for n, count in uploads(bucket).items() if count > 1]
  assert len(twice) <= 2 * 4


def uploads(bucket) -> collections.Counter:
  return collections.Counter(
      line.split()[1].partition("?")[0] for line in bucket.requests()
      if line.startswith("POST") and "/out/" in line
  )


@pytest.mark.slow
def test_a_large_archive_is_never_whole_in_memory_nor_on_the_disk(bucket, tmp_path):
  local = tmp_path / "x.zip"
  with zipfile.ZipFile(local, "w", zipfile.ZIP_STORED) as zip_file:
    for number in range(12):
      zip_file.writestr(f"{number}.dcm", os.urandom(40 << 20))
  storage.upload(str(local), f"{bucket}/x.zip")
  local.unlink()
  code = (
      "import os, resource\n"
      "from vjepa_jax.data import expand, storage\n"
      f"storage.exists('{bucket}/x.zip')\n"
      "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
      f"report = expand.expand('{bucket}/x.zip', '{bucket}/out', threads=2)\n"
      "after = resource.getrusage(resource.RUSAGE_SELF)\n"
      "print(report['written'], after.ru_maxrss - before)\n"
  )
  ran = subprocess.run(
      [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
      check=True, env=os.environ | {"TMPDIR": str(tmp_path)},
  )
  written, kilobytes = map(int, ran.stdout.split())
  assert written == 12 and kilobytes < 250_000
  assert os.listdir(tmp_path) == []
