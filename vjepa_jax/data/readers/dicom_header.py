"""The header of a DICOM object, and where its pixels lie in the bytes of a file.

pydicom parses; what it would copy (the pixels), and what a hostile header would
make it do without end (inflating, elements and sequences by the million, values of
megabytes), is kept from it here.
"""

from collections.abc import Iterator
import dataclasses
import io
import struct
from typing import Any
import zlib

import pydicom
import pydicom.config
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.filereader import read_dataset, read_partial, read_sequence
from pydicom.sequence import Sequence
from pydicom.uid import (
  UID,
  DeflatedExplicitVRLittleEndian,
  ExplicitVRBigEndian,
  ExplicitVRLittleEndian,
  ImplicitVRLittleEndian,
)
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, VR

from vjepa_jax.data.record import ReadError

# A warning a file would print the odd value, which may be a name or a birth date.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

UNDEFINED = 0xFFFFFFFF
_PIXELS = {
    0x7FE00008: "FloatPixelData",
    0x7FE00009: "DoubleFloatPixelData",
    0x7FE00010: "PixelData",
}
_VRS = {vr.encode() for vr in VR if len(vr) == 2}
# Reads that parsing may take: two or three an element, few of which are below 16
# bytes. 1,000 frames of OCT need about 100,000 reads.
_FREE_READS, _BYTES_A_READ, _DEFLATED_BYTES_A_READ = 200_000, 16, 2
# The longest value that is asked for is a modality LUT of 65,536 entries.
_MAX_VALUE_BYTES = 1 << 18
_MAX_INFLATED_HEADER = 1 << 26
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD


def is_dicom(head: bytes) -> bool:
  """Says whether a content begins as a DICOM object does.

  Args:
    head: its first bytes, 1024 where it has them. Without the mark at byte 128
      the first three elements must parse, and the first be of group 2 or 8.
  """
  return head[128:132] == b"DICM" or _starts_with_elements(head)


class Header:
  """Values of a dataset or of a sequence's item, by keyword.

  Attributes:
    dataset: what pydicom parsed.
  """

  def __init__(self, dataset: pydicom.Dataset, budget: "_Budget | None" = None):
    self.dataset = dataset
    self._budget = budget or _Budget()
    self._sequences: dict[str, list[Header]] = {}

  def get(self, name: str, default: Any = None) -> Any:
    """Returns a value, or `default` where there is none.

    Raises:
      ValueError: for a value too long to be sane.
    """
    raw = self.dataset.get_item(tag_for_keyword(name), keep_deferred=True)
    if raw is None:
      return default
    if isinstance(raw, RawDataElement) and len(raw.value or b"") > _MAX_VALUE_BYTES:
      raise ValueError(f"{name} is {len(raw.value):,} bytes long")
    value = self.dataset.get(name, default)
    return default if value is None else value

  def raw(self, name: str) -> bytes:
    """Returns a value's bytes as stored, b"" where there is none."""
    element = self.dataset.get_item(tag_for_keyword(name), keep_deferred=True)
    return bytes(element.value) if element is not None and element.value else b""

  def __contains__(self, name: str) -> bool:
    return name in self.dataset

  def items(self, name: str) -> "list[Header]":
    """Returns the items of a sequence, [] where there is none.

    Raises:
      ValueError: where the element is no sequence, or holds too much.
    """
    if name not in self._sequences:
      sequence = self._parse_sequence(name)
      self._sequences[name] = [Header(item, self._budget) for item in sequence]
    return self._sequences[name]

  def item(self, name: str) -> "Header | None":
    """Returns the first item of a sequence, or None."""
    found = self.items(name)
    return found[0] if found else None

  def _parse_sequence(self, name: str) -> Sequence:
    tag = tag_for_keyword(name)
    element = self.dataset.get_item(tag, keep_deferred=True)
    if element is None or not element.value:
      return Sequence()
    if not isinstance(element, RawDataElement):
      if not isinstance(element.value, Sequence):
        raise ValueError(f"{name} is no sequence")
      return element.value
    # A sequence of stated length is parsed only now, within the same budget.
    parsed = read_sequence(
        _Counted(element.value, self._budget),
        element.is_implicit_VR or element.VR == "UN", element.is_little_endian,
        len(element.value), self.dataset.original_character_set,
    )
    self.dataset[tag] = DataElement(tag, "SQ", parsed)
    return parsed


@dataclasses.dataclass(eq=False)
class Pixels:
  """The element that holds a file's pixels, not yet copied or decoded.

  Attributes:
    keyword: PixelData, FloatPixelData or DoubleFloatPixelData.
    vr: its value representation, "" where it is implicit.
    length: its stated length in bytes, or `UNDEFINED`.
  """

  keyword: str
  vr: str
  length: int
  _data: bytes
  _start: int
  _inflater: "_Inflater | None" = None

  def value(self) -> memoryview:
    """Returns the value's bytes without a copy, fewer where the file ends early."""
    if self.length == UNDEFINED:
      return memoryview(self._data)[self._start:]
    data = self._data
    if self._inflater is not None:
      data = self._inflater.inflate(self._start + self.length)
    return memoryview(data)[self._start:self._start + self.length]


@dataclasses.dataclass(eq=False)
class Parsed:
  """A DICOM object before its pixels are decoded.

  Attributes:
    header: all elements before the pixels.
    syntax: the transfer syntax, guessed from the bytes where the file says none.
    pixels: the pixel element, or None.
  """

  header: Header
  syntax: UID
  pixels: Pixels | None


def parse(data: bytes, source: str) -> Parsed:
  """Parses a whole file up to its pixels, which are not touched.

  Args:
    data: the content.
    source: its path, for messages.

  Raises:
    ReadError: not_dicom, truncated, bad_header, no_decoder, or too_large.
  """
  if not is_dicom(bytes(data[:1024])):
    raise ReadError(source, "not_dicom", "no DICM mark at byte 128")
  try:
    parsed = _parse(data, source)
  except (EOFError, zlib.error) as error:
    raise ReadError(source, "truncated", f"{error}") from error
  except (ReadError, MemoryError):
    raise
  except Exception as error:  # pydicom raises many kinds on damaged headers.
    raise ReadError(
        source, "bad_header", f"{type(error).__name__}: {error}"
    ) from error
  if parsed.pixels is None:
    _check_end(parsed.header.dataset, len(data), source)
  return parsed


def fragments(value: memoryview, source: str) -> Iterator[tuple[int, int]]:
  """Walks the items of encapsulated pixels.

  Args:
    value: the bytes from the first item (the offset table) on.
    source: a path, for messages.

  Yields:
    (start, stop) of each item's value within `value`, the offset table first.

  Raises:
    ReadError: truncated, where the items do not end in a delimiter.
  """
  at = 0
  while True:
    head = value[at:at + 8]
    if len(head) < 8:
      raise ReadError(source, "truncated", "the file ends between two fragments")
    group, element, length = struct.unpack("<HHL", head)
    tag = group << 16 | element
    if tag == _SEQUENCE_END:
      return
    if tag != _ITEM or length == UNDEFINED:
      raise ReadError(
          source, "decode_failed", f"no fragment but ({group:04X},{element:04X}) at "
          f"byte {at:,} of the pixels"
      )
    if at + 8 + length > len(value):
      raise ReadError(
          source, "truncated", f"a fragment of {length:,} bytes ends after the file"
      )
    yield at + 8, at + 8 + length
    at += 8 + length


class _TooLong(ValueError):
  """A header of more elements than parsing may take."""


class _Budget:
  """How many reads parsing one file may still take."""

  def __init__(self, size: int = 0, bytes_a_read: int = _BYTES_A_READ):
    self.total = self.left = _FREE_READS + size // bytes_a_read

  def spend(self):
    self.left -= 1
    if self.left < 0:
      raise _TooLong(f"more than about {self.total // 2:,} elements in the header")


class _Counted(io.BytesIO):
  """Bytes to parse, with a bound on the elements; shares the bytes it is given."""

  def __init__(self, data: bytes, budget: _Budget):
    super().__init__(data)
    self._budget = budget

  def read(self, size: int | None = -1) -> bytes:
    self._budget.spend()
    return super().read(size)


class _Inflater:
  """Inflates a deflated dataset no further than asked."""

  def __init__(self, data: bytes, start: int):
    self._stream = zlib.decompressobj(-zlib.MAX_WBITS)
    self._rest: bytes | memoryview = memoryview(data)[start:]
    self._done = b""

  def inflate(self, size: int) -> bytes:
    """Returns the first `size` bytes, or all that there are."""
    parts = [self._done]
    missing = size - len(self._done)
    while missing > 0 and not self._stream.eof:
      part = self._stream.decompress(self._rest, missing)
      self._rest = self._stream.unconsumed_tail
      if not part and not self._rest:
        break  # The stream is cut off.
      parts.append(part)
      missing -= len(part)
    self._done = b"".join(parts)
    return self._done


class _Stop:
  """Stops pydicom at the pixels and keeps what they claim to be."""

  def __init__(self):
    self.found: tuple[int, str | None, int] | None = None

  def __call__(self, tag: int, vr: str | None, length: int) -> bool:
    if tag not in _PIXELS:
      return False
    self.found = (int(tag), vr, length)
    return True


def _parse(data: bytes, source: str) -> Parsed:
  budget, stop = _Budget(len(data)), _Stop()
  buffer = _Counted(data, budget)
  buffer.seek(132 if data[128:132] == b"DICM" else 0)
  meta = read_dataset(buffer, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
  if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
    inflater = _Inflater(data, buffer.tell())
    budget = _Budget(len(data), _DEFLATED_BYTES_A_READ)
    dataset, pixels = _parse_deflated(inflater, budget, source)
    return Parsed(Header(dataset, budget), DeflatedExplicitVRLittleEndian, pixels)
  buffer.seek(0)
  dataset = read_partial(buffer, stop_when=stop, force=True)
  pixels = _pixels(stop, data, buffer.tell())
  syntax = dataset.file_meta.get("TransferSyntaxUID")
  if syntax is None:
    _, little = dataset.original_encoding
    implicit = stop.found is not None and stop.found[1] is None
    syntax = (
        ExplicitVRBigEndian if not little else
        ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    )
    if pixels is not None and pixels.length == UNDEFINED:
      raise ReadError(source, "bad_header", "compressed pixels, no transfer syntax")
  syntax = UID(syntax)
  if pixels is not None and not syntax.is_transfer_syntax:
    raise ReadError(
        source, "no_decoder", f"transfer syntax {syntax} is not known",
        "store the file with another transfer syntax",
    )
  return Parsed(Header(dataset, budget), syntax, pixels)


def _parse_deflated(
    inflater: _Inflater, budget: _Budget, source: str
) -> tuple[pydicom.Dataset, Pixels | None]:
  """Inflates as much as the header needs; the pixels when their size is checked."""
  size = 1 << 20
  while True:
    body, stop = inflater.inflate(size), _Stop()
    whole = len(body) < size
    buffer = _Counted(body, budget)
    try:
      dataset = read_dataset(buffer, False, True, stop_when=stop)
    except _TooLong:
      raise
    except Exception:
      if whole:
        raise
      stop = _Stop()
    if stop.found:
      pixels = _pixels(stop, body, buffer.tell())
      pixels._inflater = inflater
      return dataset, pixels
    if whole:
      return dataset, None
    size *= 8
    if size > _MAX_INFLATED_HEADER:
      raise ReadError(
          source, "too_large",
          f"a deflated header of more than {_MAX_INFLATED_HEADER >> 20} MiB",
      )


def _pixels(stop: _Stop, data: bytes, at: int) -> Pixels | None:
  if stop.found is None:
    return None
  tag, vr, length = stop.found
  start = at + (12 if vr in EXPLICIT_VR_LENGTH_32 else 8)
  return Pixels(_PIXELS[tag], vr or "", length, data, start)


def _check_end(dataset: pydicom.Dataset, size: int, source: str):
  """Tells a file that was cut in its header from one without pixels."""
  if not len(dataset):  # What pydicom gives where an element has no end.
    raise ReadError(source, "truncated", f"{size:,} bytes end inside an element")
  last = dataset.get_item(list(dataset.keys())[-1], keep_deferred=True)
  if isinstance(last, RawDataElement) and last.length != UNDEFINED:
    got = len(last.value or b"")
    if got < last.length:
      raise ReadError(
          source, "truncated", f"{got:,} of {last.length:,} bytes of {last.tag}"
      )


def _starts_with_elements(head: bytes) -> bool:
  return any(_parses(head, order) for order in "<>")


def _parses(head: bytes, order: str) -> bool:
  """Says whether the head is three elements in ascending order, the first plain."""
  at, last = 0, 0
  for index in range(3):
    if len(head) < at + 8:
      return False
    group, element, vr, short = struct.unpack(f"{order}HH2sH", head[at:at + 8])
    tag = group << 16 | element
    first = group in (2, 8) and element <= 0xFF
    if tag <= last or group % 2 or not (index or first):
      return False
    at += 8
    if vr in _VRS:
      length = short
      if vr.decode() in EXPLICIT_VR_LENGTH_32:
        if len(head) < at + 4:
          return False
        length = struct.unpack(f"{order}L", head[at:at + 4])[0]
        at += 4
    elif order == "<":
      length = struct.unpack("<L", vr + struct.pack("<H", short))[0]
    else:
      return False  # Big endian is always explicit.
    if length % 2 or length > 512:
      return False
    at, last = at + length, tag
  return True
