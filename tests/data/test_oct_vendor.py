"""Claims of readers/oct_vendor.py on small files made by the makers' layouts."""

import io
import itertools
import struct

import numpy as np
import pytest

from vjepa_jax import data
from vjepa_jax.data.readers import ReadOptions, oct_vendor, read_content
from vjepa_jax.data.record import ReadError

NAN = np.nan
SHAPE = (3, 20, 16)  # Z, Y, X


def read(content: bytes, name: str, **options):
  return read_content(content, name, ReadOptions(**options))


def reason(content: bytes, name: str, **options) -> str:
  with pytest.raises(ReadError) as caught:
    read(content, name, **options)
  return caught.value.reason


def make_floats(shape=SHAPE) -> np.ndarray:
  return np.random.default_rng(1).random(shape, np.float32)


def make_shorts(shape=SHAPE) -> np.ndarray:
  return np.random.default_rng(1).integers(0, 60_000, shape).astype(np.uint16)


def make_vol(volume=None, *, eye=b"OS", turn=0.0, patient=b"pat7") -> bytes:
  """A Heidelberg export: the layout of its special function."""
  volume = make_floats() if volume is None else volume
  slices, depth, width = volume.shape
  header = struct.pack(
      "<12s3i3d2i2did4sq2i16s16si21s", b"HSF-OCT-103", width, slices, depth,
      0.0114, 0.12, 0.00387, 8, 6, 0.01, 0.01, 30, 0.0, eye, 0, 3, 256, b"", b"", 1,
      patient,
  )
  header += b"\0" * 3 + struct.pack("<d", 15000.5)  # A birth date.
  parts = [header.ljust(2048, b"\0"), bytes(8 * 6)]
  for index, frame in enumerate(volume):
    angle = turn * index
    ends = (0, 0.12 * index, 4 * np.cos(angle), 0.12 * index + 4 * np.sin(angle))
    head = struct.pack("<12si4d", b"HSF-BS-103", 256, *ends)
    parts += [head.ljust(256, b"\0"), frame.astype("<f4").tobytes()]
  return b"".join(parts)


def make_topcon(volume=None, *, kind="comp", mode=2, eye=1) -> bytes:
  """A Topcon file of one volume: .fda as JPEG 2000 or plain, or .fds."""
  pytest.importorskip("oct_converter", reason="extra oct is not installed")
  from oct_converter.readers.binary_structs import fda_binary as fda
  from oct_converter.readers.binary_structs import fds_binary as fds

  volume = make_shorts() if volume is None else volume
  slices, depth, width = volume.shape
  sizes = {"scan_mode": mode, "width": width, "height": depth,
           "number_slices": slices, "bits_per_pixel": 16, "format": 0,
           "size": volume.nbytes}
  if kind == "jpeg":
    frames = b""
    for frame in volume:
      coded = io.BytesIO()
      from PIL import Image

      Image.fromarray(frame.astype(np.uint8)).save(coded, "JPEG2000")
      frames += struct.pack("<i", len(coded.getvalue())) + coded.getvalue()
    unknown = {"unknown1": 0, "unknown2": 0, "unknown3": 0}
    body = fda.oct_header.build(sizes | unknown) + frames
    name = b"@IMG_JPEG"
  elif kind == "comp":
    body, name = fda.oct_header_2.build(sizes) + volume.tobytes(), b"@IMG_MOT_COMP_03"
  else:
    body, name = fds.oct_header.build(sizes) + volume.tobytes(), b"@IMG_SCAN_03"
  scan = fda.param_scan_04_header.build({
      "fixation": 0, "mirror_pos": 0, "polar": 0, "x_dimension_mm": 6.0,
      "y_dimension_mm": 4.5, "z_resolution_um": 2.6, "comp_eff_2": 0, "comp_eff_3": 0,
      "base_pos": 0, "used_calib_data": 0,
  })
  capture = fda.capture_info_header.build(
      {"eye": eye, "cap_date": [2020, 1, 2, 3, 4, 5]}
  )
  head = fda.header.build(
      {"file_code": "FOCT", "file_type": "FDA", "major_ver": 1, "minor_ver": 0}
  )
  chunks = ((name, body), (b"@PARAM_SCAN_04", scan), (b"@CAPTURE_INFO", capture))
  return head + b"".join(
      bytes([len(n)]) + n + struct.pack("<I", len(b)) + b for n, b in chunks
  ) + b"\0"


def make_e2e(volumes=(0,), *, slices=3, lost=(), depth=0.0039) -> bytes:
  """A Heidelberg raw file; each volume's image n holds the 16-bit floats of a ramp."""
  pytest.importorskip("oct_converter", reason="extra oct is not installed")
  from oct_converter.readers.binary_structs import e2e_binary as e2e

  head = {"magic1": "CMDb", "version": 1, "unknown": [0] * 10}
  chunks = []
  for volume, index in itertools.product(volumes, range(slices)):
    if index in lost:
      continue
    # Exponents below 63 are brightness below 1.
    ramp = (1024 * (58 + index) + 3 * np.arange(20 * 16).reshape(20, 16)).astype("<u2")
    image = e2e.image_structure.build(
        {"size": ramp.nbytes, "type": 0, "unknown": 0, "height": 20, "width": 16}
    ) + ramp.tobytes()
    zero = {f.name: 0 for f in e2e.bscan_metadata.subcons if f.name != "unknown4"}
    meta = e2e.bscan_metadata.build(zero | {
        "unknown4": [0, 0], "scaley": depth, "numImages": slices, "aktImage": index,
        "acquisitionTime": 132_000_000_000_000_000,
    })
    eye = e2e.pre_data.build({"unknown": 0, "laterality": "R"})
    for kind, ind, body in ((3, 0, eye), (10004, 0, meta), (1073741824, 1, image)):
      chunks.append((volume, 2 * index, kind, ind, body))
  patient = e2e.patient_id_structure.build({
      "first_name": "Ada", "surname": "Lovelace", "title": "", "birthdate": 0,
      "sex": "F", "patient_id": "E7",
  })
  chunks.append((volumes[0], 0, 9, 0, patient))
  start = 36 + 52
  data_at = start + 52 + 44 * len(chunks)
  table, bodies = b"", b""
  for volume, number, kind, ind, body in chunks:
    at = data_at + len(bodies)
    where = {"patient_db_id": 1, "study_id": 2, "series_id": volume,
             "slice_id": number, "type": kind}
    table += e2e.sub_directory_structure.build(where | {
        "pos": 0, "start": at, "size": len(body), "unknown": 0, "unknown2": 0,
        "unknown3": 0, "unknown4": 0,
    })
    bodies += e2e.chunk_structure.build(where | {
        "magic3": "MDbData", "unknown": 0, "unknown2": 0, "pos": 0, "size": len(body),
        "unknown3": 0, "ind": ind, "unknown4": 0, "unknown5": 0,
    }) + body
  directory = {"magic2": "MDbDir", "version": 1, "unknown": [0] * 10, "unknown3": 0}
  return (
      e2e.header_structure.build(head)
      + e2e.main_directory_structure.build(
          directory | {"num_entries": 0, "current": start, "prev": 0})
      + e2e.main_directory_structure.build(
          directory | {"num_entries": len(chunks), "current": 0, "prev": 0})
      + table + bodies
  )


def make_bioptigen(volume=None, *, frames=None) -> bytes:
  """A Bioptigen file of one rectangular volume."""
  volume = make_shorts() if volume is None else volume
  slices, depth, width = volume.shape

  def field(name: str, value: bytes) -> bytes:
    key = name.encode()
    return struct.pack("<I", len(key)) + key + struct.pack("<I", len(value)) + value

  def whole(name: str, value: int) -> bytes:
    return field(name, struct.pack("<I", value))

  def real(name: str) -> bytes:
    return field(name, struct.pack("<d", 1.0))

  content = struct.pack("<IH", 0x5FB31C4A, 0x1) + field("FRAMEHEADER", b"")
  content += whole("FRAMECOUNT", frames or slices) + whole("LINECOUNT", width)
  content += whole("LINELENGTH", depth) + whole("SAMPLEFORMAT", 2)
  content += field("DESCRIPTION", b"none")
  content += real("XMIN") + real("XMAX") + field("XCAPTION", b"x")
  content += real("YMIN") + real("YMAX") + field("YCAPTION", b"y")
  content += whole("SCANTYPE", 1)
  for name in ("SCANDEPTH", "SCANLENGTH", "AZSCANLENGTH", "ELSCANLENGTH",
               "OBJECTDISTANCE", "SCANANGLE"):
    content += real(name)
  content += whole("SCANS", slices) + whole("FRAMES", 1) + whole("DOPPLERFLAG", 0)
  content += field("CONFIG", b"\0" * 8) + struct.pack("<I", 0)
  for frame in volume:
    content += field("FRAMEDATA", b"")
    content += field("FRAMEDATETIME", struct.pack("<8H", 2020, 1, 0, 2, 3, 4, 5, 6))
    content += real("FRAMETIMESTAMP") + whole("FRAMELINES", width)
    content += field("FRAMESAMPLES", frame.T.astype("<u2").tobytes())
    content += struct.pack("<I", 0)
  return content


def make_zeiss(volume: np.ndarray) -> bytes:
  return np.asfortranarray(volume.transpose(1, 2, 0)).tobytes(order="F")


ZEISS = "P7_Macular Cube {x}x{z}_1-2-2020_3-4-5_OS_sn12_cube_z.img"


def test_a_heidelberg_export_is_read_with_its_spacing_and_eye():
  volume = make_floats()
  record = read(make_vol(volume), "a.bin")
  np.testing.assert_array_equal(record.volume[0, ..., 0], volume)
  np.testing.assert_allclose(record.spacing, [NAN, 0.12, 0.00387, 0.0114], rtol=1e-6)
  assert record.meta["laterality"] == "L" and record.subject == "pat7"
  assert record.meta["geometry"] == "raster"


def test_samples_outside_the_image_become_zero_and_are_counted():
  volume = make_floats()
  volume[1, :5] = np.finfo(np.float32).max
  record = read(make_vol(volume), "a.vol")
  assert record.volume.max() <= 1 and not record.volume[0, 1, :5].any()
  assert "8.33%" in record.meta["samples_absent"]


def test_slices_that_turn_have_no_distance():
  record = read(make_vol(turn=0.5), "a.vol")
  assert np.isnan(record.spacing[1]) and record.spacing[2] > 0
  assert record.meta["geometry"] == "radial"


@pytest.mark.parametrize("kind", ["comp", "fds", "jpeg"])
def test_topcon_files_are_read_with_their_spacing_and_eye(kind):
  volume = make_shorts() if kind != "jpeg" else make_shorts() // 256
  record = read(make_topcon(volume, kind=kind), "a.fda")
  np.testing.assert_array_equal(record.volume[0, ..., 0], volume)
  np.testing.assert_allclose(record.spacing, [NAN, 1.5, 0.0026, 6 / 16], rtol=1e-6)
  assert record.meta["laterality"] == "L"


def test_a_radial_topcon_scan_has_no_distance():
  record = read(make_topcon(mode=3), "a.fda")
  assert np.isnan(record.spacing[1]) and record.meta["geometry"] == "radial"


def test_a_heidelberg_raw_file_keeps_only_the_length_it_holds():
  record = read(make_e2e(), "a.e2e")
  assert record.volume.shape == (1, *SHAPE, 1) and record.volume.dtype == np.float32
  np.testing.assert_allclose(record.spacing, [NAN, NAN, 0.0039, NAN], rtol=1e-5)
  assert record.meta["laterality"] == "R" and record.subject == "E7"
  assert (np.diff(record.volume[0, :, 3, 3, 0]) > 0).all()  # In the order of slices.


def test_a_raw_file_equals_the_library_s_reading(tmp_path):
  content = make_e2e()
  from oct_converter.readers import E2E

  (tmp_path / "a.e2e").write_bytes(content)
  (direct,) = E2E(tmp_path / "a.e2e").read_oct_volume()
  np.testing.assert_array_equal(
      read(content, "a.e2e").volume[0, ..., 0], np.float32(direct.volume)
  )


def test_one_of_two_volumes_is_chosen_by_key():
  content = make_e2e((5, 6))
  with pytest.raises(ReadError, match="1_2_5.*1_2_6") as caught:
    read(content, "a.e2e")
  assert caught.value.reason == "several_series"
  for key in ("1", "1_2_6"):
    assert read(content, "a.e2e", key=key).meta["key"] == "1_2_6"
  assert reason(content, "a.e2e", key="9") == "several_series"


def test_a_lost_slice_is_an_error():
  assert reason(make_e2e(lost=(1,)), "a.e2e") == "slices_missing"


def test_bioptigen_frames_have_depth_on_y():
  pytest.importorskip("oct_converter", reason="extra oct is not installed")
  volume = make_shorts()
  record = read(make_bioptigen(volume), "p_OD_1.OCT")
  np.testing.assert_array_equal(record.volume[0, ..., 0], volume)
  assert record.meta["laterality"] == "R" and np.isnan(record.spacing).all()


def test_a_zeiss_file_gets_its_size_from_its_name_only():
  pytest.importorskip("oct_converter", reason="extra oct is not installed")
  volume = (make_shorts((3, 1024, 16)) // 256).astype(np.uint8)
  name = ZEISS.format(x=16, z=3)
  record = read(make_zeiss(volume), name)
  np.testing.assert_array_equal(record.volume[0, ..., 0], volume)
  assert record.meta["laterality"] == "L" and np.isnan(record.spacing).all()
  assert reason(make_zeiss(volume), "a_cube_z.img") == "ambiguous_axes"
  assert reason(make_zeiss(volume)[:-1], name) == "truncated"
  assert reason(make_zeiss(volume), "other.img") == "unsupported_format"


def test_an_optovue_file_is_read_by_the_text_beside(tmp_path):
  pytest.importorskip("oct_converter", reason="extra oct is not installed")
  volume = make_floats()
  turned = np.stack([np.rot90(f, -1) for f in volume])
  (tmp_path / "a.oct").write_bytes(turned.astype("<f4").tobytes())
  with pytest.raises(ReadError, match="a.txt"):
    data.read(str(tmp_path / "a.oct"))
  text = "Window Height = 20\nEye Scanned = OD\nScan Length 16\nScan Usage 3\n"
  (tmp_path / "a.txt").write_text(text)
  record = data.read(str(tmp_path / "a.oct"))
  np.testing.assert_array_equal(record.volume[0, ..., 0], volume)
  assert np.isnan(record.spacing).all() and record.meta["laterality"] == "R"
  (tmp_path / "a.oct").write_bytes(turned.astype("<f4").tobytes()[:-4])
  with pytest.raises(ReadError, match="text file states"):
    data.read(str(tmp_path / "a.oct"))


@pytest.mark.parametrize("make, name", [(make_vol, "a.vol"), (make_e2e, "a.e2e")])
def test_no_name_and_no_birth_date_is_passed_on(make, name):
  found = str(read(make(), name).meta)
  assert not any(word in found for word in ("Ada", "Lovelace", "15000", "birth", "F'"))


@pytest.mark.parametrize("make", [
    make_vol, make_topcon, make_e2e, make_bioptigen,
    lambda: make_topcon(make_shorts() // 256, kind="jpeg"),
], ids=["vol", "fda", "e2e", "bioptigen", "jpeg"])
def test_half_a_file_is_an_error(make):
  if make is make_bioptigen:
    pytest.importorskip("oct_converter", reason="extra oct is not installed")
  content = make()
  for part in (0.9, 0.5, 0.1):
    assert reason(content[:int(part * len(content))], "a.x") in (
        "truncated", "bad_header", "slices_missing", "no_pixel_data",
        "irregular_frames",
    )


def test_a_claim_of_ten_million_slices_is_refused_before_memory_is_taken():
  content = bytearray(make_vol())
  content[16:20] = struct.pack("<i", 10**7)
  assert reason(bytes(content), "a.vol") == "too_large"
  content[16:20] = struct.pack("<i", -3)
  assert reason(bytes(content), "a.vol") == "bad_header"


def test_directories_in_a_circle_end():
  content = bytearray(make_e2e())
  content[88 + 44:88 + 48] = struct.pack("<I", 88)
  assert reason(bytes(content), "a.e2e") == "bad_header"


def test_a_slice_number_of_a_billion_ends():
  content = make_e2e().replace(struct.pack("<3Ii", 1, 2, 0, 4), struct.pack(
      "<3Ii", 1, 2, 0, 2**31 - 2))
  assert reason(content, "a.e2e", timeout_s=20) in ("too_large", "slices_missing")


@pytest.mark.parametrize("content, name, maker", [
    (b"HSF-OCT-101", "x", "vol"), (b"CMDb", "x", "e2e"), (b"FOCTFDA", "x", "topcon"),
    (b"\0" * 10 + b"FRAMEHEADER", "x", "boct"), (b"", "x.OCT", "poct"),
    (b"", "x_cube_raw.img", "img"), (b"", "x.img", ""), (b"", "x.vol", ""),
])
def test_the_mark_decides_before_the_name(content, name, maker):
  assert oct_vendor._maker(content, name) == maker
