"""Files made to harm: bombs, escapes, claims, and what is plainly wrong."""

from collections.abc import Callable, Iterator
import functools
import gzip
import io
import re
import stat
import struct
import zipfile
import zlib

import numpy as np

from tests.data import seeds
from tests.data.seeds import Seed

BOMB = 512 << 20
Files = dict[str, bytes]


def text_numbers(content: bytes) -> list[tuple[int, int]]:
  """Returns (start, end) of numbers written in letters, UIDs among them."""
  return [m.span() for m in re.finditer(rb"(?<![\w.])-?\d+(\.\d+)?", content[:8192])]


def cases(name: str, seed: Seed) -> Iterator[tuple[str, Files]]:
  """Yields (label, files) for a format; the same in every run."""
  first, *_ = seed.files
  content = seed.files[first]
  others = dict(seed.files)
  yield "empty", others | {first: b""}
  yield "truncate to 1", others | {first: content[:1]}
  yield "truncate to 16", others | {first: content[:16]}
  yield "all zero bytes", others | {first: bytes(len(content))}
  noise = np.random.default_rng(3).bytes(4096)
  yield "noise behind the mark", others | {first: content[:16] + noise}
  yield "noise behind the header", others | {first: content[:400] + noise}
  yield "doubled", others | {first: content + content}
  if not seed.folder:
    for suffix in (".dcm", ".nii", ".tif", ".txt", ""):
      yield f"named scan{suffix}", {f"scan{suffix}": content}
  for start, make in _BY_FORMAT:
    if name.startswith(start):
      yield from make(content)


def _bomb(head: bytes = b"", wbits: int = -15) -> bytes:
  """Deflates `head` and then BOMB zeros: raw (-15), as zlib (15) or as gzip (31)."""
  packer = zlib.compressobj(1, zlib.DEFLATED, -15)
  front = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
  packed = front + _zeros_piece() * (BOMB >> 20) + b"\x03\x00"
  if wbits == -15:
    return packed
  size = (len(head) + BOMB) % 2**32
  if wbits == 31:
    check = zlib.crc32(bytes(BOMB), zlib.crc32(head))
    return gzip.compress(b"", mtime=0)[:10] + packed + struct.pack("<2L", check, size)
  return b"\x78\x01" + packed + struct.pack(">L", zlib.adler32(bytes(BOMB)))


@functools.cache
def _zeros_piece() -> bytes:
  """Deflates a MiB of zeros; such pieces can be joined."""
  packer = zlib.compressobj(9, zlib.DEFLATED, -15)
  return packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)


def _dicom_deflated(content: bytes) -> Iterator[tuple[str, Files]]:
  # The file meta information ends where its length says; the rest is deflated.
  end = 144 + int.from_bytes(content[140:144], "little")
  inside = zlib.decompress(content[end:], -15)
  yield "bomb behind the pixels", {"scan.dcm": content[:end] + _bomb(inside)}
  at = inside.rfind(b"\xe0\x7f\x10\x00")
  claim = inside[: at + 8] + BOMB.to_bytes(4, "little")
  yield "bomb of pixels", {"scan.dcm": content[:end] + _bomb(claim)}
  yield "bomb alone", {"scan.dcm": content[:end] + _bomb()}


def _nifti_gz(content: bytes) -> Iterator[tuple[str, Files]]:
  inside = gzip.decompress(content)
  name = "scan.nii.gz"
  yield "bomb behind the voxels", {name: _bomb(inside, wbits=31)}
  claim = bytearray(inside)
  claim[40:56] = np.array([3, 1024, 1024, 128, 1, 1, 1, 1], "<i2").tobytes()
  yield "bomb of voxels", {name: _bomb(bytes(claim[:352]), wbits=31)}
  yield "bomb alone", {name: _bomb(wbits=31)}
  yield "gzip twice", {name: gzip.compress(content, mtime=0)}
  broken = np.frombuffer(inside[352:], np.float32).copy()
  broken[5] = np.nan
  changed = inside[:352] + broken.tobytes()
  yield "NaN voxel", {name: gzip.compress(changed, mtime=0)}
  yield "two streams", {name: gzip.compress(inside[:900], mtime=0)
                        + gzip.compress(inside[900:], mtime=0)}
  wrong = bytearray(content)
  wrong[-8] ^= 1
  yield "wrong CRC", {name: bytes(wrong)}


def _nifti(content: bytes) -> Iterator[tuple[str, Files]]:
  for dims in ((3, 32767, 32767, 32767), (3, 0, 10, 8), (3, -1, 10, 8), (0, 1, 1, 1),
               (7, 12, 10, 8), (9, 12, 10, 8)):
    claim = bytearray(content)
    claim[40:56] = np.array([*dims, 1, 1, 1, 1], "<i2").tobytes()
    yield f"dim {dims}", {"scan.nii": bytes(claim)}


def _stored_zip(name: str, packed: bytes, size: int, claimed: int) -> bytes:
  """A ZIP of one deflated member whose directory states any size."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr(zipfile.ZipInfo(name), packed)
  content = bytearray(file.getvalue())
  crc = 0  # Of zeros; wrong in any case, and only found once all is unpacked.
  for mark, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
    start = content.find(mark)
    content[start + at : start + at + 2] = (8).to_bytes(2, "little")
    crc_at = start + at + 6
    content[crc_at : crc_at + 4] = crc.to_bytes(4, "little")
    content[crc_at + 8 : crc_at + 12] = claimed.to_bytes(4, "little")
  return bytes(content)


def _zip_bombs(name: str, member: str, head: bytes) -> Iterator[tuple[str, Files]]:
  packed = _bomb(head)
  size = BOMB + len(head)
  yield "bomb", {name: _stored_zip(member, packed, size, size)}
  yield "bomb that lies", {name: _stored_zip(member, packed, size, 4096)}
  yield "bomb of 4 GB claimed", {name: _stored_zip(member, b"\x03\x00", 0, 2**32 - 2)}


def _series_zip(content: bytes) -> Iterator[tuple[str, Files]]:
  name = "series.zip"
  with zipfile.ZipFile(io.BytesIO(content)) as archive:
    files = {i.filename: archive.read(i) for i in archive.infolist()}
  yield from _zip_bombs(name, "1.dcm", next(iter(files.values())))
  one, *rest = files
  for escape in ("../escape.dcm", "/tmp/escape.dcm", "..\\..\\escape.dcm",
                 "C:\\escape.dcm", "a/../../escape.dcm", "nul\x00.dcm"):
    moved = {escape: files[one]} | {n: files[n] for n in rest}
    kind = "name" if "\x00" in escape else "path"
    yield f"{kind} {escape!r}", {name: seeds.make_zip(moved)}
  link = zipfile.ZipInfo("link.dcm")
  link.external_attr = (stat.S_IFLNK | 0o777) << 16
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr(link, "/etc/passwd")
    for member, inside in files.items():
      archive.writestr(zipfile.ZipInfo(member), inside)
  yield "symbolic link", {name: file.getvalue()}
  yield "nested", {name: seeds.make_zip({"inner.zip": content})}
  yield "no entries", {name: seeds.make_zip({})}
  yield "no scans", {name: seeds.make_zip({"readme.txt": b"nothing"})}
  yield "20,000 entries", {name: seeds.make_zip(
      {f"{i}.dcm": b"" for i in range(20_000)}, zipfile.ZIP_STORED)}
  fewer = {n: files[n] for n in [*rest[1:], one]}
  yield "remove a slice", {name: seeds.make_zip(fewer)}
  yield "double slice", {name: seeds.make_zip(files | {"again.dcm": files[rest[0]]})}


def _npz(content: bytes) -> Iterator[tuple[str, Files]]:
  del content
  shape = (BOMB >> 20, 1024, 1024)
  head = _npy_head({"descr": "|u1", "fortran_order": False, "shape": shape})
  yield from _zip_bombs("scan.npz", "volume.npy", head)
  file = io.BytesIO()
  np.savez(file, volume=np.array([{"a": 1}], object))
  yield "pickled", {"scan.npz": file.getvalue()}
  file = io.BytesIO()
  np.savez(file, volume=seeds.make_voxels(), spacing=np.array([np.nan, -1.0, np.inf]))
  yield "spacing nan, -1, inf", {"scan.npz": file.getvalue()}
  yield "no array", {"scan.npz": seeds.make_zip({"volume.npy": b""})}


def _npy_head(header: dict) -> bytes:
  file = io.BytesIO()
  np.lib.format.write_array_header_1_0(file, header)
  return file.getvalue()


def _npy(content: bytes) -> Iterator[tuple[str, Files]]:
  del content
  for descr, shape in (
      ("<u2", (10**6, 10**6, 10**6)), ("<u2", (2**40, 1, 1)), ("<u2", (-1, 24, 32)),
      ("|O", (1, 2, 3)), ("<u2", (0, 24, 32)), ("<c16", (2, 2, 2)), ("|S4", (2, 2, 2)),
      ("<u2", ()), ("<M8[s]", (2, 2, 2)), ("<u2", (2,) * 40),
  ):
    head = _npy_head({"descr": descr, "fortran_order": False, "shape": shape})
    yield f"{descr} {shape}", {"scan.npy": head + bytes(512)}
  long = b"\x93NUMPY\x02\x00" + (2**31 - 1).to_bytes(4, "little") + b"{" * 64
  yield "header of 2 GB", {"scan.npy": long}
  deep = b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000
  yield "9,000 brackets", {"scan.npy": deep}
  for value in (np.nan, np.inf, 1e300):
    voxels = seeds.make_voxels(np.float64)
    voxels[1, 2, 3] = value
    file = io.BytesIO()
    np.save(file, voxels)
    yield f"voxel {value}", {"scan.npy": file.getvalue()}
  for what, voxels in (("2-D", np.ones((24, 32), np.uint8)), ("0-D", np.uint8(1)),
                       ("constant", np.zeros(seeds.SHAPE, np.uint8))):
    file = io.BytesIO()
    np.save(file, voxels)
    yield what, {"scan.npy": file.getvalue()}


def _tiff(content: bytes) -> Iterator[tuple[str, Files]]:
  order = "little" if content[:2] == b"II" else "big"
  if content[:4] not in (b"II*\0", b"MM\0*"):
    return
  start = int.from_bytes(content[4:8], order)
  count = int.from_bytes(content[start : start + 2], order)
  end = start + 2 + 12 * count
  loop = content[:end] + start.to_bytes(4, order) + content[end + 4 :]
  yield "directory loop", {"stack.tif": loop}
  for size in (60_000, 2**31 - 1, 2**32 - 1, 0):
    changed = bytearray(content)
    for entry in range(count):
      at = start + 2 + 12 * entry
      if int.from_bytes(content[at : at + 2], order) in (256, 257):
        changed[at + 2 : at + 4] = (4).to_bytes(2, order)
        changed[at + 8 : at + 12] = size.to_bytes(4, order)
    yield f"width and length {size}", {"stack.tif": bytes(changed)}


def _tiff_deflate(content: bytes) -> Iterator[tuple[str, Files]]:
  del content
  import tifffile

  packed = _bomb(wbits=15)
  file = io.BytesIO()
  tifffile.imwrite(
      file, iter([packed]), shape=(24, 32), dtype=np.uint16, compression="zlib",
      photometric="minisblack", metadata=None, rowsperstrip=24,
  )
  yield "bomb of a strip", {"stack.tif": file.getvalue()}


def _hdf5(content: bytes) -> Iterator[tuple[str, Files]]:
  del content
  import h5py

  def make(fill: Callable) -> Files:
    file = io.BytesIO()
    with h5py.File(file, "w") as group:
      fill(group)
    return {"scan.h5": file.getvalue()}

  yield "10^18 voxels unwritten", make(lambda g: g.create_dataset(
      "volume", (10**6,) * 3, np.uint16, chunks=(1, 64, 64)))
  yield "never written", make(lambda g: g.create_dataset(
      "volume", seeds.SHAPE, np.uint16, chunks=(1, 8, 8)))
  yield "bomb of chunks", make(lambda g: g.create_dataset(
      "volume", (64, 1024, 8192), np.uint8, chunks=(1, 1024, 8192), compression="gzip",
      fillvalue=1).id.write_direct_chunk((0, 0, 0), zlib.compress(bytes(8 << 20), 1)))
  yield "chunk that bursts", make(lambda g: g.create_dataset(
      "volume", seeds.SHAPE, np.uint8, chunks=seeds.SHAPE, compression="gzip",
  ).id.write_direct_chunk((0, 0, 0), _bomb(wbits=15)))
  yield "external link", make(lambda g: g.__setitem__(
      "volume", h5py.ExternalLink("/etc/hostname", "/volume")))
  yield "external storage", make(lambda g: g.create_dataset(
      "volume", (2, 4, 4), np.uint8, external=[("/etc/passwd", 0, 32)]))
  yield "link to itself", make(lambda g: g.__setitem__(
      "volume", h5py.SoftLink("/volume")))
  yield "objects", make(lambda g: g.create_dataset(
      "volume", (2, 2, 2), h5py.string_dtype()))
  yield "complex", make(lambda g: g.create_dataset("volume", (2, 2, 2), np.complex64))
  yield "scalar", make(lambda g: g.create_dataset("volume", data=1))
  yield "no arrays", make(lambda g: g.create_group("empty"))


def _zarr3(content: bytes) -> Iterator[tuple[str, Files]]:
  del content
  seed = seeds.SEEDS["zarr3"]()
  text = seed.files["zarr.json"]
  for shape in (b"1000000, 1000000, 1000000", b"0, 24, 32", b"-4, 24, 32", b"4"):
    changed = re.sub(rb'("shape": \[)[^\]]*', rb"\g<1>" + shape, text, count=1)
    yield f"shape {shape.decode()}", dict(seed.files) | {"zarr.json": changed}
  for part in (b"1000000000, 1000000000, 32", b"0, 0, 0"):
    changed = re.sub(rb'("chunk_shape": \[)[^\]]*', rb"\g<1>" + part, text)
    yield f"chunk {part.decode()}", dict(seed.files) | {"zarr.json": changed}
  import imagecodecs

  burst = imagecodecs.zstd_encode(bytes(BOMB >> 2))
  chunk = next(n for n in seed.files if n.startswith("c/"))
  yield "chunk that bursts", dict(seed.files) | {chunk: burst}
  yield "no chunks: removed", {"zarr.json": text}


def _gif(content: bytes) -> Iterator[tuple[str, Files]]:
  for size in (65_535, 0):
    both = size.to_bytes(2, "little") * 2
    yield f"screen {size}", {"movie.gif": content[:6] + both + content[10:]}


def _vol(content: bytes) -> Iterator[tuple[str, Files]]:
  for at, word in ((12, "columns"), (16, "frames"), (20, "rows"), (100, "header")):
    for value in (0, -1, 10**6, 2**31 - 1):
      new = (value % 2**32).to_bytes(4, "little")
      yield f"{word} {value}", {"scan.vol": content[:at] + new + content[at + 4 :]}


_BY_FORMAT = (
    ("dicom_deflated", _dicom_deflated), ("nifti_gz", _nifti_gz),
    ("nifti_4d", _nifti), ("nifti_vector", _nifti), ("series_zip", _series_zip),
    ("npz", _npz), ("npy_float", _npy), ("tiff_deflate", _tiff_deflate),
    ("tiff", _tiff), ("hdf5_gzip", _hdf5), ("zarr3", _zarr3), ("gif", _gif),
    ("vol", _vol),
)
