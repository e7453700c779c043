"""Movies (MP4, MOV, AVI, Matroska, WebM, GIF): frames are T, brightness is the voxel.

Nearly every movie is stored in colour, grey ones too, so the luminance is taken
whatever `colour` says. A movie that holds fewer frames than it claims is refused.
"""

import io
import math
from typing import Any

import numpy as np

from vjepa_jax.data.readers import apart
from vjepa_jax.data.readers.base import (
    ReadOptions,
    border,
    check_voxels,
    missing_extra,
    to_record,
)
from vjepa_jax.data.record import ReadError, Record

_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"skip", b"free")
# Frames this unlike the mean step have no rate: cameras jitter, clocks are coarse.
_STEP_TOLERANCE = 0.05


def matches(head: bytes, path: str) -> bool:
  """Says whether a content begins as a movie that can be read here."""
  del path
  return bool(_container(head))


def _container(head: bytes) -> str:
  """Returns FFmpeg's name of the container; others could open further files."""
  if head[4:8] in _BOXES:
    return "mov"
  if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
    return "avi"
  if head[:4] == b"\x1a\x45\xdf\xa3":
    return "matroska"
  return "gif" if head[:6] in (b"GIF87a", b"GIF89a") else ""


def read(data: bytes, source: str, options: ReadOptions) -> Record:
  """Reads one movie as [T, 1, Y, X, 1]; dt is the mean step of frames that keep pace.

  `options.key` chooses a picture track of several, by its number.

  Raises:
    ReadError: no_pixel_data, several_series, frames_mismatch, irregular_frames,
      bad_header, decode_failed, too_large, missing_extra, timed_out, decoder_died.
  """
  return apart.call(
      _read, data, source, options, source=source, timeout_s=options.timeout_s
  )


def _read(data: bytes, source: str, options: ReadOptions) -> Record:
  try:
    import av
  except ImportError as error:
    raise missing_extra(source, "movies", error) from error
  av.logging.set_level(av.logging.PANIC)
  kind = _container(bytes(data[:16]))
  with border(source, "bad_header"):
    _check_end(data, kind, source)
    container = av.open(
        io.BytesIO(data), format=kind, options={"err_detect": "explode"}
    )
    stream = _choose(container, source, options.key)
    _check_claims(stream, container, source, options)
  with border(source, "decode_failed"):
    volume, times = _decode(container, stream, source, options)
  step, notes = _pace(times)
  notes |= {
      "format": f"movie ({kind})", "compression": stream.codec_context.name,
      "axes": "TYX", "axes_source": "file", "stored_type": stream.codec_context.pix_fmt,
  }
  return to_record(
      volume[:, None, :, :, None], (step, *(math.nan,) * 3), source, options, meta=notes
  )


def _check_end(data: bytes, kind: str, source: str) -> None:
  """Refuses a file whose own marks say that its end is missing."""
  size, wanted = len(data), 0
  if kind == "avi":
    wanted = 8 + int.from_bytes(data[4:8], "little")
  elif kind == "gif" and bytes(data[-64:]).rstrip(b"\0")[-1:] != b";":
    wanted = size + 1
  while kind == "mov" and wanted + 8 <= size:  # Boxes, each with its size before it.
    box = int.from_bytes(data[wanted:wanted + 4], "big")
    if box == 1:
      box = int.from_bytes(data[wanted + 8:wanted + 16], "big")
    if 0 < box < 8:
      raise ReadError(source, "bad_header", f"a box of {box} bytes at byte {wanted:,}")
    wanted = wanted + box if box else size
  if wanted > size:
    raise ReadError(
        source, "truncated", f"{size:,} bytes, its marks claim at least {wanted:,}"
    )


def _choose(container: Any, source: str, key: str | None) -> Any:
  streams = list(container.streams.video)
  if not streams:
    raise ReadError(source, "no_pixel_data", "it holds no picture track")
  if any(stream.codec_context is None for stream in streams):
    raise ReadError(source, "no_decoder", "a picture track of an unknown codec")
  if key is not None and key.isdecimal() and int(key) < len(streams):
    return streams[int(key)]
  if key is not None or len(streams) > 1:
    raise ReadError(
        source, "several_series", f"{len(streams)} picture tracks, key is {key!r}",
        "choose a track by its number, such as key=\"0\"",
    )
  return streams[0]


def _check_claims(
    stream: Any, container: Any, source: str, options: ReadOptions
) -> None:
  """Refuses a claim that is too large; sets the decoder to refuse damage."""
  context = stream.codec_context
  plane = (int(context.height), int(context.width))
  if min(plane) < 1:
    raise ReadError(source, "bad_header", f"its frames are {plane[0]} x {plane[1]}")
  claimed = max(_claimed_frames(stream, container), 1)
  check_voxels((claimed, *plane), source, options.max_voxels)
  context.thread_count = 1
  context.options = {"err_detect": "explode"}
  apart.allow(32 * math.prod(plane))


def _claimed_frames(stream: Any, container: Any) -> int:
  """Returns how many frames the header claims; 0 where it does not say."""
  if stream.frames:
    return int(stream.frames)
  return int(_claimed_seconds(stream, container) * float(stream.average_rate or 0))


def _claimed_seconds(stream: Any, container: Any) -> float:
  """Returns how long the header says it lasts; 0 where it does not say."""
  if stream.duration and stream.time_base:
    return float(stream.duration * stream.time_base)
  # With a sound track beside, the longer of the two counts.
  return (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0


def _decode(
    container: Any, stream: Any, source: str, options: ReadOptions
) -> tuple[np.ndarray, list[float | None]]:
  """Returns [T, Y, X] and the frames' times in s."""
  frames: list[np.ndarray] = []
  times: list[float | None] = []
  packets = 0
  for packet in container.demux(stream):
    packets += bool(packet.size)
    if packet.is_corrupt:
      raise ReadError(source, "decode_failed", f"packet {packets} is damaged")
    for frame in packet.decode():
      if frame.is_corrupt:
        raise ReadError(source, "decode_failed", f"frame {len(frames)} is damaged")
      wide = any(part.bits > 8 for part in frame.format.components)
      plane = frame.to_ndarray(format="gray16le" if wide else "gray")
      if frames and plane.shape != frames[0].shape:
        raise ReadError(
            source, "irregular_frames",
            f"frame {len(frames)} is {plane.shape}, the first {frames[0].shape}",
        )
      check_voxels((len(frames) + 1, *plane.shape), source, options.max_voxels)
      if not frames or len(frames) % 64 == 0:
        apart.allow(2 * (len(frames) + 64) * plane.nbytes)
      frames.append(plane)
      times.append(frame.time)
  _check_count(times, packets, stream, container, source)
  return np.stack(frames), times


def _check_count(
    times: list[float | None], packets: int, stream: Any, container: Any, source: str
) -> None:
  """Refuses a movie of which frames are lost."""
  if not times:
    raise ReadError(source, "no_pixel_data", "no frame decodes")
  if stream.frames:
    if packets < stream.frames:
      raise ReadError(
          source, "frames_mismatch", f"{packets} of {stream.frames} frames are there"
      )
    return
  seconds = _claimed_seconds(stream, container)
  if seconds and len(times) > 1 and None not in times:
    rest = seconds - (times[-1] - times[0])
    longest = float(np.diff(np.array(times, float)).max())
    if rest > 1.5 * longest + 0.002:
      raise ReadError(
          source, "frames_mismatch",
          f"the header claims {seconds:.3g} s, its {len(times)} frames end at "
          f"{times[-1]:.3g} s",
      )


def _pace(times: list[float | None]) -> tuple[float, dict[str, Any]]:
  """Returns the step in s; NaN with a note where frames do not keep pace."""
  if len(times) < 2 or any(t is None for t in times):
    return math.nan, {}
  steps = np.diff(np.array(times, float))
  mean = float(steps.mean())
  # Containers count in whole milliseconds, GIF in hundredths of a second.
  coarse = 0.0011 if mean < 0.5 else 0.0
  if mean > 0 and np.abs(steps - mean).max() <= max(_STEP_TOLERANCE * mean, coarse):
    return mean, {}
  return math.nan, {"frame_times": f"steps of {steps.min():.4g} to {steps.max():.4g} s"}
