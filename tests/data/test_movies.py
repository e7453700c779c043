"""Claims of readers/movies.py on small movies that FFmpeg writes."""

from fractions import Fraction
import io

import numpy as np
import pytest

from vjepa_jax.data.readers import ReadOptions, movies, read_content
from vjepa_jax.data.record import ReadError

av = pytest.importorskip("av", reason="extra movies is not installed")

NAN = np.nan
KINDS = (
    ("mp4", "mpeg4", "yuv420p"), ("mp4", "libx264", "yuv420p"),
    ("mov", "libx264", "yuv420p"), ("mp4", "libx264", "yuv420p10le"),
    ("avi", "ffv1", "gray"), ("avi", "mjpeg", "yuvj420p"),
    ("matroska", "ffv1", "gray16le"), ("webm", "libvpx-vp9", "yuv420p"),
    ("gif", "gif", "rgb8"),
)


def planes(count=12, size=(64, 48)) -> np.ndarray:
  ramp = np.add.outer(np.arange(size[1]), np.arange(size[0]))
  return np.stack([(ramp + 9 * i) % 200 for i in range(count)]).astype(np.uint8)


def make(kind, codec, pixels, *, count=12, size=(64, 48), rate=10, times=None) -> bytes:
  if codec not in av.codecs_available:
    pytest.skip(f"this FFmpeg writes no {codec}")
  file = io.BytesIO()
  with av.open(file, "w", format=kind) as container:
    stream = container.add_stream(codec, rate=rate)
    stream.width, stream.height, stream.pix_fmt = *size, pixels
    if times:
      stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
    for index, plane in enumerate(planes(count, size)):
      frame = av.VideoFrame.from_ndarray(plane, format="gray").reformat(format=pixels)
      if times:
        frame.pts, frame.time_base = times[index], Fraction(1, 1000)
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return file.getvalue()


def read(content: bytes, name="scan.bin", **options):
  return read_content(content, name, ReadOptions(**options))


def reason(content: bytes, **options) -> str:
  with pytest.raises(ReadError) as caught:
    read(content, **options)
  return caught.value.reason


@pytest.mark.parametrize("kind, codec, pixels", KINDS)
def test_frames_are_those_that_the_library_decodes(kind, codec, pixels):
  content = make(kind, codec, pixels)
  record = read(content)
  wide = "16" in pixels or "10" in pixels
  with av.open(io.BytesIO(content)) as container:
    direct = [
        f.to_ndarray(format="gray16le" if wide else "gray")
        for f in container.decode(video=0)
    ]
  assert record.volume.shape == (12, 1, 48, 64, 1)
  assert record.volume.dtype == (np.uint16 if wide else np.uint8)
  np.testing.assert_array_equal(record.volume[:, 0, ..., 0], direct)
  assert abs(float(record.spacing[0]) - 0.1) < 1e-3
  assert np.isnan(record.spacing[1:]).all()


def test_a_lossless_movie_gives_its_frames_back():
  record = read(make("matroska", "ffv1", "gray"))
  np.testing.assert_array_equal(record.volume[:, 0, ..., 0], planes())


def test_a_varying_rate_is_no_time_step():
  content = make("matroska", "ffv1", "gray", count=5, times=[0, 100, 150, 400, 1000])
  record = read(content)
  assert np.isnan(record.spacing[0]) and "0.05 to 0.6 s" in record.meta["frame_times"]
  assert read(content, time_step_s=0.2).spacing[0] == np.float32(0.2)


def test_a_rate_of_thirty_in_whole_milliseconds_is_even():
  content = make("matroska", "ffv1", "gray", rate=30)
  assert abs(float(read(content).spacing[0]) - 1 / 30) < 2e-4


@pytest.mark.parametrize("kind, codec, pixels", KINDS)
def test_a_movie_that_lacks_its_end_is_an_error(kind, codec, pixels):
  content = make(kind, codec, pixels)
  for part in (0.95, 0.6, 0.2):
    assert reason(content[:int(part * len(content))]) in (
        "truncated", "frames_mismatch", "decode_failed", "bad_header", "no_pixel_data",
    )


def test_a_duration_that_lies_is_an_error():
  content = make("matroska", "ffv1", "gray")
  at = content.index(b"\x44\x89\x88") + 3  # Segment duration, a float64.
  longer = content[:at] + np.array(9e3, ">f8").tobytes() + content[at + 8:]
  assert reason(longer) == "frames_mismatch"


def test_frames_are_counted_before_they_are_decoded():
  content = make("mp4", "mpeg4", "yuv420p", count=30)
  with pytest.raises(ReadError, match="30 x 48 x 64") as caught:
    read(content, max_voxels=29 * 48 * 64)
  assert caught.value.reason == "too_large"
  assert len(read(content, max_voxels=30 * 48 * 64).volume) == 30
  # Of a header that claims too few, frames are counted as they come.
  movie = make("matroska", "ffv1", "gray")
  at = movie.index(b"\x44\x89\x88") + 3
  short = movie[:at] + np.array(200.0, ">f8").tobytes() + movie[at + 8:]
  with pytest.raises(ReadError, match="8 x 48 x 64"):
    read(short, max_voxels=7 * 48 * 64)


def test_a_hostile_size_is_refused():
  content = bytearray(make("gif", "gif", "rgb8"))
  content[6:10] = b"\xff" * 4  # 65535 x 65535
  assert reason(bytes(content)) in ("too_large", "bad_header", "decode_failed")


def test_sound_alone_is_no_recording():
  file = io.BytesIO()
  with av.open(file, "w", format="mp4") as container:
    stream = container.add_stream("aac", rate=48000, layout="mono")
    frame = av.AudioFrame.from_ndarray(
        np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
    )
    frame.rate = 48000
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  assert reason(file.getvalue()) == "no_pixel_data"


def test_one_of_two_tracks_is_chosen_by_its_number():
  file = io.BytesIO()
  with av.open(file, "w", format="matroska") as container:
    streams = [container.add_stream("ffv1", rate=10) for _ in range(2)]
    for stream in streams:
      stream.width, stream.height, stream.pix_fmt = 64, 48, "gray"
    for index, plane in enumerate(planes(4)):
      for shift, stream in enumerate(streams):
        frame = av.VideoFrame.from_ndarray(plane + np.uint8(shift), format="gray")
        frame.pts = index
        container.mux(stream.encode(frame))
    for stream in streams:
      container.mux(stream.encode(None))
  content = file.getvalue()
  assert reason(content) == reason(content, key="2") == "several_series"
  np.testing.assert_array_equal(
      read(content, key="1").volume[:, 0, ..., 0], planes(4) + 1
  )


def test_flipped_bits_give_an_error_or_a_record_of_its_shape():
  contents = [make("mp4", "libx264", "yuv420p"), make("avi", "mjpeg", "yuvj420p"),
              make("matroska", "ffv1", "gray16le"), make("gif", "gif", "rgb8")]
  rng = np.random.default_rng(0)
  found = set()
  for trial in range(80):
    content = bytearray(contents[trial % 4])
    for _ in range(1 + trial % 5):
      content[rng.integers(0, len(content))] ^= 1 << rng.integers(8)
    try:
      record = read(bytes(content), max_voxels=2**22, timeout_s=20)
      found.add("record")
      assert record.volume.ndim == 5
    except ReadError as error:
      found.add(error.reason)
  assert "record" in found and len(found) > 2 and "timed_out" not in found


@pytest.mark.parametrize("content", [
    b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile a.mp4\n",
    b"<?xml version='1.0'?><MPD></MPD>", b"RIFF\0\0\0\0WAVEfmt ",
])
def test_lists_of_other_files_are_no_movies(content):
  assert not movies.matches(content, "a.mp4")
  with pytest.raises(ReadError, match="unsupported_format"):
    read(content, "a.mp4")


@pytest.mark.parametrize("content", [
    b"\0\0\0\x18ftypmp42", b"\x1a\x45\xdf\xa3" + b"\0" * 40, b"GIF89a;",
    b"RIFF\x04\0\0\0AVI ", b"\0\0\0\0ftyp" + b"\xff" * 100,
])
def test_a_mark_with_nothing_behind_is_an_error(content):
  assert reason(content) in (
      "bad_header", "truncated", "no_pixel_data", "decode_failed",
  )
