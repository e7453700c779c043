"""Claims of readers/tiff.py, on files that tifffile writes."""

import io
import os
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

tifffile = pytest.importorskip("tifffile", reason="extra formats is not installed")
pytest.importorskip("imagecodecs", reason="extra formats is not installed")

from tests.data import library_files_tiff  # noqa: E402
from vjepa_jax.data import read as data_read  # noqa: E402
from vjepa_jax.data.readers import ReadOptions, read_content, tiff  # noqa: E402
from vjepa_jax.data.record import ReadError  # noqa: E402

NAN = np.nan


def read(content: bytes, **options):
  return read_content(content, "scan.tif", ReadOptions(**options))


def reason(content: bytes, **options) -> str:
  with pytest.raises(ReadError) as caught:
    read(content, **options)
  assert "scan.tif" in str(caught.value)
  return caught.value.reason


def make(shape=(5, 48, 64), dtype=np.uint16) -> np.ndarray:
  return np.random.default_rng(2).integers(0, 250, shape).astype(dtype)


def write(array: np.ndarray, **how) -> bytes:
  file = io.BytesIO()
  tifffile.imwrite(file, array, **({"photometric": "minisblack"} | how))
  return file.getvalue()


def set_tag(content: bytes, code: int, value: int, page: int = 0) -> bytes:
  """Overwrites a number in a little-endian classic TIFF's page directory."""
  with tifffile.TiffFile(io.BytesIO(content)) as file:
    tag = file.pages[page].tags[code]
    at = tag.offset + 8
  changed = bytearray(content)
  changed[at:at + 4] = struct.pack("<I", value)
  return bytes(changed)


def test_every_kind_that_tifffile_writes_reads_as_tifffile_reads_it():
  cases, read_ones = list(library_files_tiff.family()), 0
  assert len(cases) > 100 and len({c.name for c in cases}) == len(cases)
  for case in cases:
    if case.reason:
      assert reason(case.content, **case.options) == case.reason, case.name
      continue
    record = read(case.content, **case.options)
    read_ones += 1
    assert record.volume.shape == case.expected.shape, case.name
    np.testing.assert_array_equal(
        record.volume, case.expected.astype(record.volume.dtype), case.name
    )
    np.testing.assert_allclose(
        record.spacing, case.spacing, rtol=1e-5, err_msg=case.name
    )
  assert read_ones > 90


@pytest.mark.parametrize("dtype, kept", [
    (np.uint8, np.uint8), (np.int8, np.int16), (np.uint16, np.uint16),
    (np.int16, np.int16), (np.int32, np.uint8), (np.float64, np.float32),
])
def test_the_stored_type_is_kept_where_a_record_has_it(dtype, kept):
  array = make(dtype=dtype) // 4
  record = read(write(array))
  assert record.volume.dtype == kept
  assert record.meta["stored_type"] == np.dtype(dtype).name
  np.testing.assert_array_equal(record.volume[0, ..., 0], array)


def test_a_stack_of_pages_is_taken_as_z_and_says_that_it_was_assumed():
  record = read(write(make(), metadata=None))
  assert record.volume.shape == (1, 5, 48, 64, 1)
  assert (record.meta["axes"], record.meta["axes_source"]) == ("ZYX", "assumed")
  stated = read(write(make(), metadata=None), axes="TYX")
  assert stated.volume.shape == (5, 1, 48, 64, 1)
  assert stated.meta["axes_source"] == "stated"


def test_wrong_axes_of_a_cell_movie_are_refused_with_shape_and_remedy():
  content = write(make((4, 5, 44, 51)), metadata={"axes": "QQYX"})
  with pytest.raises(ReadError, match="QQYX.*4 x 5 x 44 x 51.*axes=\"TZYX\"") as caught:
    read(content)
  assert caught.value.reason == "ambiguous_axes"
  assert read(content, axes="TZYX").volume.shape == (4, 5, 44, 51, 1)


def test_lengths_fill_only_what_the_file_leaves_open():
  content = write(make(), resolution=(10_000, 5_000), resolutionunit="CENTIMETER")
  record = read(content, manifest_spacing=(0.3, 9.0, 9.0), time_step_s=60.0)
  np.testing.assert_allclose(record.spacing, [60, 0.3, 2e-3, 1e-3], rtol=1e-6)
  assert record.meta["spacing_source"] == "file+manifest"


def test_the_speed_at_which_imagej_plays_a_stack_is_no_time_step():
  how = {"axes": "TYX", "unit": "um", "fps": 7.0}
  assert np.isnan(read(write(make(), imagej=True, metadata=how)).spacing[0])
  timed = read(write(make(), imagej=True, metadata=how | {"finterval": 2.5}))
  assert timed.spacing[0] == 2.5


def test_a_printer_s_resolution_is_no_length():
  record = read(write(make(), resolution=(72, 72), resolutionunit="INCH"))
  assert np.isnan(record.spacing).all() and "72 dpi" in record.meta["spacing_ignored"]


def test_a_part_of_an_ome_set_is_refused_without_looking_for_the_rest(tmp_path):
  array = make((2, 48, 64))
  content = write(array, ome=True, metadata={"axes": "ZYX"})
  xml = content[content.index(b"<?xml"):content.index(b"</OME>") + 6]
  assert b"<TiffData" in xml
  more = content.replace(b'SizeZ="2"', b'SizeZ="9"')
  assert reason(more) == "frames_mismatch"
  # A set's file names the files that hold the other planes.
  name = b'<TiffData><UUID FileName="%s/other.tif">u</UUID></TiffData>' % (
      str(tmp_path).encode()
  )
  (tmp_path / "other.tif").write_bytes(content)
  description = xml[:xml.index(b"<TiffData")] + name + b"</Pixels></Image></OME>"
  assert reason(write(array, description=description, metadata=None)) == "bad_header"


def test_a_file_cut_anywhere_is_an_error():
  contents = (
      write(make(), metadata=None), write(make(), compression="zlib"),
      write(make(), ome=True), write(make(), imagej=True),
      write(make(), bigtiff=True, tile=(16, 16), compression="lzw"),
  )
  for content in contents:
    for part in (0.999, 0.9, 0.5, 0.05):
      found = reason(content[:int(part * len(content))])
      assert found in ("truncated", "bad_header", "decode_failed", "no_pixel_data")


def test_a_plane_without_stored_pixels_is_not_read_as_zeros():
  content = write(make(), compression="zlib", metadata=None)
  assert reason(set_tag(content, 279, 0, page=2)) == "truncated"
  assert reason(set_tag(content, 273, 0, page=2)) == "truncated"
  assert reason(set_tag(content, 273, 10**9, page=2)) == "truncated"


def test_a_hostile_size_is_refused_before_memory_is_taken():
  content = write(make(), metadata=None, compression="zlib")
  assert reason(set_tag(content, 257, 10**9)) in ("too_large", "several_series")
  one = write(make()[0], metadata=None, compression="zlib")
  assert reason(set_tag(one, 257, 10**9)) == "too_large"
  assert reason(one, max_voxels=48 * 64 - 1) == "too_large"
  assert read(one, max_voxels=48 * 64).volume.size == 48 * 64


def test_a_hostile_number_of_planes_in_the_description_is_refused():
  content = write(make(), ome=True, metadata={"axes": "ZYX"})
  start, end = content.index(b"<?xml"), content.index(b"</OME>") + 6
  xml = content[start:end].replace(b'SizeZ="5"', b'SizeZ="999999"')
  xml = xml.replace(b'PlaneCount="5"', b'PlaneCount="999999"')
  for sizes in (xml, xml.replace(b"999999", b"999999999")):
    hostile = write(make(), description=sizes, metadata=None)
    assert reason(hostile) in ("too_large", "frames_mismatch", "bad_header")
  jay = write(make(), imagej=True).replace(b"images=5", b"images=9")
  jay = jay.replace(b"slices=5", b"slices=9")
  assert reason(jay) in ("truncated", "frames_mismatch")


def test_a_strip_that_swells_is_cut_off():
  plain = write(np.zeros((64, 64), np.uint8), metadata=None, compression="zlib")
  bomb = zlib.compress(bytes(1 << 28), 9)
  with tifffile.TiffFile(io.BytesIO(plain)) as file:
    tags = file.pages[0].tags
    places = tags[273].offset + 8, tags[279].offset + 8
  content = bytearray(plain + bomb)
  for at, value in zip(places, (len(plain), len(bomb)), strict=True):
    content[at:at + 4] = struct.pack("<I", value)
  try:
    volume = read(bytes(content)).volume
  except ReadError as error:
    assert error.reason in ("decode_failed", "too_large")
  else:  # Decoding stops at the strip's size.
    assert volume.shape == (1, 1, 64, 64, 1)


@pytest.mark.parametrize("bigtiff", [False, True])
def test_page_directories_in_a_circle_end(bigtiff):
  content = write(make(), metadata=None, bigtiff=bigtiff)
  with tifffile.TiffFile(io.BytesIO(content)) as file:
    first, second = file.pages[0].offset, file.pages[1].offset
  link = struct.Struct("<Q" if bigtiff else "<I")
  at = content.index(link.pack(second), first)
  circle = content[:at] + link.pack(first) + content[at + link.size:]
  with pytest.raises(ReadError, match="circle") as caught:
    read(circle)
  assert caught.value.reason == "bad_header"


def test_flipped_bits_give_an_error_or_a_record():
  contents = [
      write(make((3, 32, 32)), metadata=None),
      write(make((3, 32, 32)), compression="lzw", predictor=True),
      write(make((3, 32, 32)), ome=True, tile=(16, 16), compression="zlib"),
      write(make((3, 32, 32), np.uint8), imagej=True),
  ]
  rng = np.random.default_rng(0)
  outcomes = set()
  for trial in range(120):
    content = bytearray(contents[trial % len(contents)])
    for _ in range(1 + trial % 3):
      content[rng.integers(4, min(len(content), 900))] ^= 1 << rng.integers(8)
    try:
      record = read(bytes(content), max_voxels=2**20, timeout_s=20)
      outcomes.add("record")
      assert record.volume.ndim == 5
    except ReadError as error:
      outcomes.add(error.reason)
  assert "record" in outcomes and len(outcomes) > 2
  assert "timed_out" not in outcomes


@pytest.mark.parametrize("content", [
    b"II*\0", b"II*\0" + b"\0" * 4, b"MM\0*" + b"\xff" * 60, b"II+\0" + b"x" * 200,
    b"II*\0" + b"x" * 200,
])
def test_a_mark_with_nothing_sound_behind_is_an_error(content):
  assert reason(content) in ("bad_header", "truncated", "no_pixel_data")


def test_content_decides_and_not_the_name(tmp_path):
  content = write(make())
  record = read_content(content, "scan.dcm", ReadOptions())
  assert record.meta["format"].startswith("TIFF")
  with pytest.raises(ReadError, match="unsupported_format"):
    read_content(b"not a TIFF", "scan.tif", ReadOptions())
  assert not tiff.matches(b"", "scan.tif")


def test_a_missing_library_is_named_with_its_extra(tmp_path):
  path = tmp_path / "a.tif"
  path.write_bytes(write(make()))
  code = (
      "import sys; sys.modules['tifffile'] = None\n"
      "from vjepa_jax.data.readers import ReadOptions, tiff\n"
      "try:\n"
      f"  tiff._read(open({str(path)!r}, 'rb').read(), 'a.tif', ReadOptions())\n"
      "except Exception as error: print(error)\n"
  )
  ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert "missing_extra" in ran.stdout, ran.stderr
  assert "vjepa_jax[formats]" in ran.stdout


def write_movie(path, array, **how):
  how = {"metadata": {"axes": "TZYX"}, "photometric": "minisblack"} | how
  tifffile.imwrite(path, array, **how)
  return str(path)


@pytest.mark.parametrize("how", [
    {}, {"compression": "zlib"}, {"byteorder": ">"}, {"bigtiff": True},
    {"ome": True}, {"tile": (16, 16), "compression": "lzw"},
    {"photometric": "miniswhite"},
])
def test_one_time_point_of_a_movie_is_that_of_the_whole(tmp_path, how):
  array = make((4, 3, 32, 48))
  path = write_movie(tmp_path / "m.tif", array, **how)
  whole = data_read(path)
  assert tiff.count_frames(path, ReadOptions()) == 4
  for frame in range(4):
    one = data_read(path, frame=frame, time_step_s=60)
    np.testing.assert_array_equal(one.volume, whole.volume[frame:frame + 1])
    assert one.volume.dtype == whole.volume.dtype and one.meta["frame"] == frame
    np.testing.assert_allclose(one.spacing[1:], whole.spacing[1:])


def test_a_time_point_beyond_the_end_and_files_of_other_kinds_are_refused(tmp_path):
  path = write_movie(tmp_path / "m.tif", make((4, 3, 32, 48)))
  for frame, other, reason_ in (
      (4, path, "frames_mismatch"), (0, str(tmp_path / "none.tif"), "missing_file"),
      (0, str(tmp_path / "text.tif"), "unsupported_format"),
      (0, str(tmp_path / "empty.tif"), "truncated"),
      (0, str(tmp_path / "cut.tif"), "truncated"),
      (0, str(tmp_path / "colour.tif"), "unsupported_pixels"),
      (0, str(tmp_path / "wide.tif"), "ambiguous_axes"),
  ):
    (tmp_path / "text.tif").write_bytes(b"no movie at all")
    (tmp_path / "empty.tif").write_bytes(b"")
    (tmp_path / "cut.tif").write_bytes((tmp_path / "m.tif").read_bytes()[:-99])
    tifffile.imwrite(tmp_path / "colour.tif", make((4, 32, 48, 3), np.uint8))
    tifffile.imwrite(
        tmp_path / "wide.tif", make((4, 2, 3, 32, 48)), photometric="minisblack"
    )
    with pytest.raises(ReadError) as caught:
      data_read(other, frame=frame)
    assert caught.value.reason == reason_, other
  with pytest.raises(ValueError, match="frame is -1"):
    data_read(path, frame=-1)


def test_a_file_with_no_time_axis_is_a_movie_of_one(tmp_path):
  array = make((3, 32, 48))
  path = write_movie(tmp_path / "m.tif", array, metadata={"axes": "ZYX"})
  assert tiff.count_frames(path, ReadOptions()) == 1
  np.testing.assert_array_equal(data_read(path, frame=0).volume[0, ..., 0], array)
  with pytest.raises(ReadError, match="frame 1 of 1"):
    data_read(path, frame=1)


@pytest.mark.parametrize("mark", ["imagej", "shaped"])
def test_a_movie_larger_than_memory_is_read_by_its_time_points(tmp_path, mark):
  # Sparse: 24 GB that take no room on the disk, and none in memory.
  path, shape = tmp_path / "large.tif", (1500, 16, 1024, 1024)
  if mark == "imagej":
    shape = (100, 16, 1024, 1024)  # Its own limit is 4 GB.
  movie = tifffile.memmap(
      path, shape=shape, dtype=np.uint8, metadata={"axes": "TZYX"},
      **({"imagej": True} if mark == "imagej" else {"bigtiff": True}),
      photometric="minisblack",
  )
  movie[-1, 3, 4, 5] = 77
  del movie
  start = time.monotonic()
  record = data_read(path, frame=shape[0] - 1, max_voxels=2**25)
  assert record.volume.shape == (1, *shape[1:], 1)
  assert record.volume[0, 3, 4, 5, 0] == 77 and record.volume.sum() == 77
  assert tiff.count_frames(str(path), ReadOptions()) == shape[0]
  assert time.monotonic() - start < 20
  with pytest.raises(ReadError, match="too_large"):
    data_read(path, frame=0, max_voxels=2**23)


def test_a_movie_replaced_meanwhile_is_read_anew(tmp_path):
  path = tmp_path / "m.tif"
  for add in (0, 1000):
    array = make((4, 3, 32, 48)) + np.uint16(add)
    write_movie(path, array)
    np.testing.assert_array_equal(
        data_read(path, frame=2).volume[0, ..., 0], array[2]
    )
    assert tiff.count_frames(str(path), ReadOptions()) == 4
    os.utime(path, ns=(add, add))
