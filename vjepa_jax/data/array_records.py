"""One shard file: tf.train.Examples in an ArrayRecord, read by byte ranges.

The files are written and checked by ArrayRecord's own library. Reading goes by an
index of byte ranges instead: an uncompressed record lies in the file as it is, but
for a header each 64 KiB, so that one `preadv` brings a volume straight into the
array it is wanted in (0.6 ms for 9.4 MB, against 6 to 25 ms through the library,
whose fresh buffers cost a page fault each 4 KiB), and one range request fetches
it from a bucket.

Layouts: the Riegeli records format (riegeli/doc/riegeli_records_file_format.md)
and the wire format of protocol buffers.
"""

from collections.abc import Iterator, Mapping, Sequence
import itertools
import os
import struct
from typing import NamedTuple

import google_crc32c
import numpy as np

OPTIONS = "group_size:1,uncompressed"
# The library's choice for single records in any order.
_READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BLOCK = 1 << 16
_BLOCK_HEADER = 24
_CHUNK_HEADER = 40
_SIMPLE_CHUNK = ord("r")
_MOST_BUFFERS = 1000  # IOV_MAX is 1024.
# A protocol buffer may not be larger.
MAX_RECORD_BYTES = (1 << 31) - (1 << 20)


class Place(NamedTuple):
  """Where a record lies in its file.

  Attributes:
    start: first byte in the file.
    head: bytes of the record before its volume.
    volume: bytes of the volume, with which the record ends.
    crc: crc32c of the record.
  """

  start: int
  head: int
  volume: int
  crc: int

  @property
  def stop(self) -> int:
    """The byte of the file after the record."""
    return _advance(self.start, self.head + self.volume)


def encode(features: Mapping[str, bytes | np.ndarray], volume: np.ndarray) -> bytes:
  """Returns the head of a tf.train.Example; the volume's bytes complete it.

  Written here because a protocol buffer's map has no fixed order of bytes.

  Args:
    features: {name: bytes, or float32 [n]}, before "volume" in the alphabet.
    volume: C-contiguous.
  """
  entries = [_entry(name, features[name]) for name in sorted(features)]
  entries.append(_entry("volume", None, volume.nbytes))
  size = sum(map(len, entries)) + volume.nbytes
  return b"\x0a" + _varint(size) + b"".join(entries)


def decode_head(head: bytes) -> dict[str, bytes | np.ndarray]:
  """Returns the features before the volume.

  Raises:
    ValueError: if these are not the bytes that `encode` makes.
  """
  tag, at = head[0], 1
  if tag != 0x0A:
    raise ValueError(f"an Example starts with 0x0a, got {tag:#x}")
  _, at = _read_varint(head, at)
  found = {}
  while at < len(head):
    name, at, value = _read_entry(head, at)
    if name == "volume":
      return found
    found[name] = value
  raise ValueError("no volume in the Example")


def write(path: str, records: Iterator[bytes]) -> int:
  """Writes records to a new file and returns how many."""
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter(path, OPTIONS)
  count = 0
  for record in records:
    writer.write(record)
    count += 1
  writer.close()
  return count


def find(path: str, heads: Sequence[int], crcs: Sequence[int]) -> list[Place]:
  """Finds every record of a local file and checks it, byte for byte, twice.

  Args:
    path: the file.
    heads: bytes of each record before its volume.
    crcs: crc32c of each record as it was meant.

  Raises:
    ValueError: if ArrayRecord's reader, or reading by ranges, finds another
      number of records or other bytes.
  """
  from array_record.python import array_record_module

  reader = array_record_module.ArrayRecordReader(path, _READ_OPTIONS)
  if reader.num_records() != len(crcs):
    raise ValueError(f"holds {reader.num_records()} records, not {len(crcs)}")
  places = []
  spans = itertools.islice(_spans(path), len(crcs))
  for row, (head, crc, span) in enumerate(zip(heads, crcs, spans, strict=True)):
    start, size = span
    place = Place(start, head, size - head, crc)
    # Through the library's seek: read([n]) holds the record three times.
    reader.seek(row)
    read_local(path, place, np.empty(place.volume, np.uint8))
    if google_crc32c.value(reader.read()) != crc:
      raise ValueError(f"record {row} reads back differently")
    places.append(place)
  reader.close()
  return places


def read_local(path: str, place: Place, out: np.ndarray) -> bytes:
  """Reads one record of a local file.

  Args:
    path: the file.
    place: of the record.
    out: uint8 [place.volume], gets the volume.

  Returns:
    The head.

  Raises:
    OSError: if the file cannot be read.
    ValueError: if it ends early or its checksum differs.
  """
  head, skipped = bytearray(place.head), bytearray(_BLOCK_HEADER)
  buffers = [
      skipped if part is None else part
      for part in _parts(place.start, memoryview(head), memoryview(out))
  ]
  file = os.open(path, os.O_RDONLY)
  try:
    at = place.start
    for n in range(0, len(buffers), _MOST_BUFFERS):
      some = buffers[n : n + _MOST_BUFFERS]
      found = os.preadv(file, some, at)
      at += found
      if found != sum(map(len, some)):
        raise ValueError(f"ends at byte {at}, before {place.stop}")
  finally:
    os.close(file)
  return _checked(bytes(head), out, place)


def read_bytes(data: bytes, place: Place, out: np.ndarray) -> bytes:
  """Takes one record out of the bytes [place.start, place.stop) of a file.

  Raises:
    ValueError: if they are too few or the checksum differs.
  """
  if len(data) != place.stop - place.start:
    raise ValueError(f"{len(data)} bytes, not {place.stop - place.start}")
  head = bytearray(place.head)
  _scatter(data, place.start, memoryview(head), memoryview(out))
  return _checked(bytes(head), out, place)


def _checked(head: bytes, out: np.ndarray, place: Place) -> bytes:
  crc = google_crc32c.extend(google_crc32c.value(head), out)
  if crc != place.crc:
    raise ValueError(f"crc32c is {crc:#010x}, not {place.crc:#010x}")
  return head


def _parts(
    start: int, head: memoryview, volume: memoryview
) -> Iterator[memoryview | None]:
  """Yields where the bytes of a file from `start` go; None is a block's header."""
  at = start
  for target in (head, volume):
    done = 0
    while done < len(target):
      if at % _BLOCK == 0:
        yield None
        at += _BLOCK_HEADER
      size = min(_BLOCK - at % _BLOCK, len(target) - done)
      yield target[done : done + size]
      done += size
      at += size


def _scatter(data: bytes, start: int, head: memoryview, volume: memoryview) -> None:
  """Copies a file's bytes from `start` to where they go, without block headers."""
  view, at = memoryview(data), 0
  for part in _parts(start, head, volume):
    size = _BLOCK_HEADER if part is None else len(part)
    if part is not None:
      part[:] = view[at : at + size]
    at += size


def _advance(at: int, size: int) -> int:
  """Returns the place in the file after `size` bytes of content from `at`."""
  while size:
    if at % _BLOCK == 0:
      at += _BLOCK_HEADER
    step = min(_BLOCK - at % _BLOCK, size)
    at += step
    size -= step
  return at


def _spans(path: str) -> Iterator[tuple[int, int]]:
  """Yields (first byte, size) of each record of an uncompressed group_size:1 file."""
  with open(path, "rb") as file:
    at = 0
    while True:
      header = _content(file.fileno(), at, _CHUNK_HEADER)
      size, = struct.unpack_from("<Q", header, 8)
      kind, records = header[24], int.from_bytes(header[25:32], "little")
      body = _advance(at, _CHUNK_HEADER)
      if kind == _SIMPLE_CHUNK:
        # compression (0 is none), size of the sizes, the sizes, the records
        intro = _content(file.fileno(), body, min(size, 32))
        of_sizes, first = _read_varint(intro, 1)
        record, end = _read_varint(intro, first)
        if intro[0] or records != 1 or end != first + of_sizes:
          raise ValueError(f"byte {at}: not a single uncompressed record")
        start = _advance(body, end)
        yield start, record
      at = _advance(body, size)


def _content(file: int, start: int, size: int) -> bytes:
  stop = _advance(start, size)
  data = os.pread(file, stop - start, start)
  if len(data) != stop - start:
    raise ValueError(f"ends at byte {start + len(data)}, before {stop}")
  out = bytearray(size)
  _scatter(data, start, memoryview(out), memoryview(b""))
  return bytes(out)


def _entry(name: str, value: bytes | np.ndarray | None, later: int = 0) -> bytes:
  """Returns an entry of Example.features; `later` bytes of its value follow it."""
  key = _field(1, name.encode())
  if isinstance(value, np.ndarray):  # Feature.float_list, packed.
    inner = _field(2, _field(1, value.astype("<f4").tobytes()))
    return _field(1, key + _field(2, inner))
  # Feature.bytes_list; the lengths count what follows too.
  content = value or b""
  inner = _open(1, len(content) + later) + content
  inner = _open(1, len(inner) + later) + inner
  inner = key + _open(2, len(inner) + later) + inner
  return _open(1, len(inner) + later) + inner


def _field(number: int, content: bytes) -> bytes:
  return _open(number, len(content)) + content


def _open(number: int, size: int) -> bytes:
  return bytes([number << 3 | 2]) + _varint(size)


def _varint(value: int) -> bytes:
  out = bytearray()
  while value >= 0x80:
    out.append(value & 0x7F | 0x80)
    value >>= 7
  out.append(value)
  return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = data[at]
    at += 1
    value |= (byte & 0x7F) << shift
    shift += 7
    if byte < 0x80:
      return value, at


def _read_entry(data: bytes, at: int) -> tuple[str, int, bytes | np.ndarray]:
  """Returns (name, where the entry ends, value) of an entry of Example.features."""
  size, at = _read_varint(data, at + 1)
  end = at + size
  size, at = _read_varint(data, at + 1)
  name = data[at : at + size].decode()
  at += size
  _, at = _read_varint(data, at + 1)  # Feature
  kind = data[at] >> 3
  _, at = _read_varint(data, at + 1)  # its list
  size, at = _read_varint(data, at + 1)
  value = data[at : at + size]
  return name, end, value if kind == 1 else np.frombuffer(value, "<f4")
