"""The stored values of a DICOM object's frames, whatever they are packed in."""

from collections.abc import Iterator
import importlib.util
import math
import struct
from typing import Any

import numpy as np
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)

from vjepa_jax.data.readers import apart
from vjepa_jax.data.readers.base import ReadOptions, luminance
from vjepa_jax.data.readers.dicom_header import (
    UNDEFINED,
    Header,
    Parsed,
    fragments,
)
from vjepa_jax.data.record import ReadError

_INSTALL = "pip install \"vjepa_jax[codecs]\""
_BITS = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}
# The fastest of those that are exact; Pillow knows no sign. GDCM is not among them:
# a few flipped bits make it abort the process, and whatever it reads others read.
_PLUGINS = ("pyjpegls", "pylibjpeg", "pydicom", "pillow")
# For these Pillow takes a quarter of the time of libjpeg, for the same voxels.
_BASELINE_PLUGINS = ("pillow", "pylibjpeg")
# Codecs of imagecodecs that take a fraction of the best plugin's time for the same
# voxels: 0.24 for lossless JPEG, 0.6 for baseline JPEG. Its HTJ2K is fast too, but
# gives damaged frames back as if they were well.
_IMAGECODECS = {
    JPEGLossless: "ljpeg_decode",
    JPEGLosslessSV1: "ljpeg_decode",
    JPEGBaseline8Bit: "jpeg8_decode",
}
# After ff, within or between the scans of a JPEG image: a plain ff, fill, restart,
# end, tables, a next scan, lines, an interval, remarks.
_CODED_MARKS = np.zeros(256, bool)
_CODED_MARKS[[0x00, 0xC4, *range(0xD0, 0xD8), *range(0xD9, 0xDE), 0xFE, 0xFF]] = True
_SIZE_MARK = b"\xff\x4f\xff\x51"  # Start of a JPEG 2000 codestream, then its size.


def decode(
    parsed: Parsed, shape: tuple[int, int, int], options: ReadOptions, source: str
) -> np.ndarray:
  """Returns the stored values, with what lies outside the stored bits dropped.

  Args:
    parsed: the object; its `shape` has been checked against the voxels allowed.
    shape: (frames, rows, columns).
    options: colour and timeout_s.
    source: its path, for messages.

  Returns:
    [frames, rows, columns] of 8, 16 or 32 bits or float32; a view of the file's
    bytes where it can be.

  Raises:
    ReadError: with a reason code.
  """
  header, syntax = parsed.header, parsed.syntax
  samples, bits = _check_kind(parsed, options.colour, source)
  value = parsed.pixels.value()
  if syntax.is_encapsulated:
    return _decode_encapsulated(parsed, value, shape, options, source)
  _check_length(parsed, shape, samples, bits, value, source)
  kind = "PixelData" if parsed.pixels.keyword == "PixelData" else "float"
  if samples != 1 or (not syntax.is_little_endian and bits < 16):
    return _decode_native(parsed, value, shape, source)
  count = math.prod(shape)
  if bits == 1:
    return np.unpackbits(
        np.frombuffer(value, np.uint8), count=count, bitorder="little"
    ).reshape(shape)
  letter = "f" if kind == "float" else "i" if header.get("PixelRepresentation") else "u"
  order = "<" if syntax.is_little_endian else ">"
  frames = np.frombuffer(value, f"{order}{letter}{bits // 8}", count).reshape(shape)
  if letter == "f":
    with np.errstate(over="ignore"):  # Beyond float32 is infinite: refused later.
      return np.require(frames, np.float32, ["C", "ALIGNED"])
  if order == ">" or not frames.flags.aligned:
    frames = frames.astype(frames.dtype.newbyteorder("="))
  return _mask_bits(frames, header, source)


def stored_bits(header: Header) -> int:
  """Returns how many of a pixel's bits mean something."""
  return int(header.get("BitsStored") or header.get("BitsAllocated"))


def _check_kind(parsed: Parsed, colour: str, source: str) -> tuple[int, int]:
  """Returns samples and bits a pixel, where they are of a kind that can be used."""
  header, keyword = parsed.header, parsed.pixels.keyword
  samples = int(header.get("SamplesPerPixel", 1))
  meaning = str(header.get("PhotometricInterpretation", ""))
  if samples != 1 and (colour == "reject" or samples != 3):
    raise ReadError(
        source, "colour" if samples == 3 else "unsupported_pixels",
        f"SamplesPerPixel is {samples}, {meaning}",
    )
  if meaning == "PALETTE COLOR":
    raise ReadError(
        source, "colour", "PALETTE COLOR pixels are indices, not intensities",
        "export the file again as greyscale",
    )
  bits = _BITS.get(keyword) or int(header.get("BitsAllocated", 0))
  allowed = (8, 16) if samples == 3 else (1, 8, 16, 32)
  if keyword == "PixelData" and bits not in allowed:
    raise ReadError(source, "unsupported_pixels", f"BitsAllocated is {bits}")
  if parsed.syntax.is_encapsulated and keyword != "PixelData":
    raise ReadError(source, "bad_header", f"{keyword} in {parsed.syntax.name}")
  return samples, bits


def _check_length(
    parsed: Parsed, shape: tuple[int, int, int], samples: int, bits: int,
    value: memoryview, source: str,
):
  keyword, length = parsed.pixels.keyword, parsed.pixels.length
  got = len(value)
  if length == UNDEFINED:
    raise ReadError(
        source, "bad_header", f"{keyword} has no length in {parsed.syntax.name}"
    )
  frame = shape[1] * shape[2] * samples * bits / 8
  if parsed.header.get("PhotometricInterpretation") == "YBR_FULL_422":
    frame = frame * 2 / 3  # Chroma is stored once for two pixels.
  want = math.ceil(frame * shape[0])
  if got < want or got < length:
    raise ReadError(
        source, "truncated", f"{got:,} of {max(want, length):,} bytes of {keyword}"
    )
  # One byte pads an odd length; some pad with more, but less than a frame.
  if got > want + 1 and (got >= want + frame or any(value[want:])):
    raise ReadError(
        source, "frames_mismatch",
        f"{keyword} holds {got / frame:.6g} frames, NumberOfFrames is {shape[0]}",
    )


def _options(header: Header, shape: tuple[int, int, int]) -> dict[str, Any]:
  """Returns what pydicom's decoders ask of a header."""
  options = {
      "rows": shape[1],
      "columns": shape[2],
      "number_of_frames": shape[0],
      "samples_per_pixel": int(header.get("SamplesPerPixel", 1)),
      "bits_allocated": int(header.get("BitsAllocated")),
      "bits_stored": stored_bits(header),
      "pixel_representation": int(header.get("PixelRepresentation", 0)),
      "photometric_interpretation": str(
          header.get("PhotometricInterpretation") or "MONOCHROME2"
      ),
      "pixel_keyword": "PixelData",
  }
  if options["samples_per_pixel"] > 1:
    options["planar_configuration"] = int(header.get("PlanarConfiguration", 0))
  return options


def _decode_native(
    parsed: Parsed, value: memoryview, shape: tuple[int, int, int], source: str
) -> np.ndarray:
  """Reads colour and swapped bytes by pydicom."""
  samples = int(parsed.header.get("SamplesPerPixel", 1))
  frames = None
  try:
    found = get_decoder(parsed.syntax).iter_array(
        bytes(value), raw=samples == 1, pixel_vr=parsed.pixels.vr or "OW",
        allow_excess_frames=False, **_options(parsed.header, shape),
    )
    for index, (frame, _) in enumerate(found):
      frame = frame if samples == 1 else luminance(frame)
      if frames is None:
        frames = np.empty(shape, frame.dtype.newbyteorder("="))
      frames[index] = frame
  except (ValueError, AttributeError) as error:
    raise ReadError(source, "bad_header", f"{error}") from error
  return frames if samples != 1 else _mask_bits(frames, parsed.header, source)


def _decode_encapsulated(
    parsed: Parsed, value: memoryview, shape: tuple[int, int, int],
    options: ReadOptions, source: str,
) -> np.ndarray:
  """Decodes compressed frames; codecs written in C run in a process of their own."""
  header, syntax = parsed.header, parsed.syntax
  wanted = _options(header, (1, *shape[1:]))
  extended = header.raw("ExtendedOffsetTable")
  codecs = _codec_names(syntax, wanted, source)
  if syntax == RLELossless:  # Rust and Python: what is damaged raises.
    frames = _decode_frames(value, extended, syntax, wanted, codecs, shape, source)
    return frames if wanted["samples_per_pixel"] > 1 else _mask_bits(
        frames, header, source
    )
  frames = apart.call(
      _decode_frames, bytes(value), extended, syntax, wanted, codecs, shape, source,
      source=source, timeout_s=options.timeout_s,
  )
  return frames.astype(np.int16) if frames.dtype == np.int8 else frames


def _decode_frames(
    value: bytes | bytearray | memoryview, extended: bytes, syntax: UID,
    options: dict[str, Any], codecs: list[str], shape: tuple[int, int, int],
    source: str,
) -> np.ndarray:
  """Returns [frames, rows, columns], all by the first codec that reads the first."""
  apart.allow(8 * math.prod(shape) + 64 * math.prod(shape[1:]))
  frames = None
  encoded = _encoded_frames(memoryview(value), bytes(extended), shape[0], source)
  for index, data in enumerate(encoded):
    where = f"frame {index} of {shape[0]} ({UID(syntax).name})"
    _check_codestream(data, syntax, shape, where, source)
    frame, codecs = _decode_frame(data, codecs, syntax, options, where, source)
    if frames is None:
      frames = np.empty(shape, frame.dtype.newbyteorder("="))
    if frame.shape != shape[1:] or frame.dtype.itemsize > frames.dtype.itemsize:
      raise ReadError(
          source, "bad_header",
          f"{where} decodes to {frame.shape} of {frame.dtype}, the header says "
          f"{shape[1:]}",
      )
    frames[index] = frame
  return frames


def _decode_frame(
    data: bytes, codecs: list[str], syntax: UID, options: dict[str, Any], where: str,
    source: str,
) -> tuple[np.ndarray, list[str]]:
  """Returns a frame, and the codec that all after it must be read with."""
  faults = []
  for codec in codecs:
    try:
      if codec == "imagecodecs":
        return _decode_by_imagecodecs(data, syntax, options), [codec]
      return _decode_by_plugin(data, syntax, codec, options), [codec]
    except (KeyboardInterrupt, SystemExit):
      raise
    except BaseException as error:  # A panic of the RLE decoder is no Exception.
      faults.append(f"{type(error).__name__}: {str(error)[:200]}")
  raise ReadError(source, "decode_failed", f"{where}: {faults[0]}")


def _codec_names(syntax: UID, options: dict[str, Any], source: str) -> list[str]:
  """Returns the codecs that can be used here, the best first."""
  try:
    decoder = get_decoder(syntax)
  except NotImplementedError as error:
    raise ReadError(
        source, "no_decoder", f"no decoder exists for {syntax.name} ({syntax})",
        "store the file with another transfer syntax",
    ) from error
  order = _BASELINE_PLUGINS if syntax == JPEGBaseline8Bit else _PLUGINS
  names = [p for p in order if p in decoder.available_plugins]
  plain = options["samples_per_pixel"] == 1 and not options["pixel_representation"]
  if plain and syntax in _IMAGECODECS and importlib.util.find_spec("imagecodecs"):
    names.insert(0, "imagecodecs")
  if not names:
    missing = [m for m in decoder.missing_dependencies if not m.startswith("gdcm")]
    raise ReadError(
        source, "no_decoder", f"{syntax.name} needs one of: {'; '.join(missing)}",
        _INSTALL,
    )
  return names


def _decode_by_plugin(
    data: bytes, syntax: UID, plugin: str, options: dict[str, Any]
) -> np.ndarray:
  grey = options["samples_per_pixel"] == 1
  array, _ = get_decoder(syntax).as_array(
      encapsulate([data], has_bot=False), index=0, raw=grey, validate=False,
      decoding_plugin=plugin, **options,
  )
  return array if grey else luminance(array)


def _decode_by_imagecodecs(
    data: bytes, syntax: UID, options: dict[str, Any]
) -> np.ndarray:
  import imagecodecs  # pylint: disable=g-import-not-at-top

  array = getattr(imagecodecs, _IMAGECODECS[syntax])(data)
  bits = options["bits_allocated"]
  if array.dtype.kind != "u" or array.dtype.itemsize * 8 > bits:
    raise ValueError(f"decodes to {array.dtype}, BitsAllocated is {bits}")
  return array.astype(f"u{bits // 8}", copy=False)


def _encoded_frames(
    value: memoryview, extended: bytes, count: int, source: str
) -> Iterator[bytes]:
  """Yields each frame's compressed bytes, joined of its fragments."""
  spans = list(fragments(value, source))
  if len(spans) < 2:
    raise ReadError(source, "truncated", "no compressed frame")
  table, spans = spans[0], spans[1:]
  starts = [at - 8 - table[1] for at, _ in spans]  # As offset tables count.
  if len(spans) == count:
    firsts = list(range(count))
  elif count == 1:  # One image in pieces; but several images are not one.
    firsts = _marked(value, spans) or [0]
  else:
    firsts = _first_fragments(value, table, extended, spans, starts, count)
  if len(firsts) != count:
    raise ReadError(
        source, "frames_mismatch",
        f"{len(spans)} fragments make {len(firsts)} frames, NumberOfFrames is {count}",
    )
  for first, after in zip(firsts, [*firsts[1:], len(spans)], strict=True):
    yield b"".join(bytes(value[at:stop]) for at, stop in spans[first:after])


def _first_fragments(
    value: memoryview, table: tuple[int, int], extended: bytes,
    spans: list[tuple[int, int]], starts: list[int], count: int,
) -> list[int]:
  """Returns which fragment each frame begins with: by an offset table, or by marks."""
  basic = bytes(value[slice(*table)])
  for raw, letter, size in ((extended, "Q", 8), (basic, "L", 4)):
    if len(raw) == count * size:
      places = {start: index for index, start in enumerate(starts)}
      firsts = [places.get(v, -1) for v in struct.unpack(f"<{count}{letter}", raw)]
      if firsts[0] == 0 and all(a < b for a, b in zip(firsts, firsts[1:])):
        return firsts
  return _marked(value, spans)


def _marked(value: memoryview, spans: list[tuple[int, int]]) -> list[int]:
  """Returns which fragments begin as a JPEG image or a JPEG 2000 codestream does."""
  marks = (b"\xff\xd8\xff", _SIZE_MARK)
  heads = [bytes(value[at:at + 4]) for at, _ in spans]
  return [index for index, head in enumerate(heads) if head.startswith(marks)]


def _check_codestream(
    data: bytes, syntax: UID, shape: tuple[int, int, int], where: str, source: str
):
  """Refuses an image of another size before its decoder allocates it."""
  if syntax in JPEG2000TransferSyntaxes:
    size = _jpeg_2000_size(data)
  elif syntax in JPEGTransferSyntaxes or syntax in JPEGLSTransferSyntaxes:
    size = _jpeg_size(data)
  else:
    return
  if size is None:
    raise ReadError(source, "decode_failed", f"{where}: no image in its bytes")
  if size != shape[1:]:
    raise ReadError(
        source, "bad_header",
        f"{where} is {size[0]} x {size[1]}, the header says {shape[1]} x {shape[2]}",
    )
  if syntax in JPEGTransferSyntaxes and (stray := _stray_mark(data)):
    # The fast decoders pass over it, and give what they guess for the rest.
    raise ReadError(source, "decode_failed", f"{where}: {stray}")


def _jpeg_2000_size(data: bytes) -> tuple[int, int] | None:
  """Returns (rows, columns) of a codestream, bare or in a JP2 file."""
  at = data.find(_SIZE_MARK, 0, 4096)
  if at < 0 or len(data) < at + 24:
    return None
  right, below, left, above = struct.unpack(">4L", data[at + 8:at + 24])
  return below - above, right - left


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
  """Returns (rows, columns) of a JPEG or JPEG-LS image's frame header."""
  at = data.find(b"\xff\xd8", 0, 4096)
  at = at + 2 if at >= 0 else len(data)
  while at + 9 <= len(data) and data[at] == 0xFF:
    mark = data[at + 1]
    if mark == 0xFF:  # Fill.
      at += 1
      continue
    if mark == 0xF7 or (0xC0 <= mark <= 0xCF and mark not in (0xC4, 0xC8, 0xCC)):
      return struct.unpack(">2H", data[at + 5:at + 9])
    at += 2 + struct.unpack(">H", data[at + 2:at + 4])[0]
  return None


def _stray_mark(data: bytes) -> str:
  """Names a mark that cannot stand among the coded bits of a JPEG image, or ""."""
  start = data.find(b"\xff\xda")
  coded = np.frombuffer(data, np.uint8)[max(start, 0):]
  at = np.flatnonzero(coded[:-1] == 0xFF)
  marks = coded[at + 1]
  stray = at[~_CODED_MARKS[marks]]
  if start < 0 or not len(stray):
    return ""
  place = int(stray[0])
  return f"mark ff{coded[place + 1]:02x} at byte {start + place}, among coded bits"


def _mask_bits(frames: np.ndarray, header: Header, source: str) -> np.ndarray:
  """Drops what lies above or below the stored bits, and restores the sign."""
  stored, allocated = stored_bits(header), frames.dtype.itemsize * 8
  high = int(header.get("HighBit", stored - 1))
  if not stored <= high + 1 <= allocated:
    raise ReadError(
        source, "bad_header",
        f"BitsAllocated {allocated}, BitsStored {stored}, HighBit {high}",
    )
  if stored < allocated:
    # Shifted up, the bits above fall off; an arithmetic shift back keeps the sign.
    kept = np.right_shift(
        np.left_shift(frames, allocated - 1 - high), allocated - stored
    )
    if not kept.any() and frames.any():
      raise ReadError(
          source, "bad_header",
          f"BitsStored {stored} and HighBit {high} leave nothing of the pixels",
      )
    frames = kept
  return frames.astype(np.int16) if frames.dtype == np.int8 else frames
