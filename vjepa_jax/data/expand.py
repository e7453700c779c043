"""A ZIP in a bucket, expanded object by object to another place.

Nothing touches the disk and no more than a few blocks a thread are in memory. A run
that was killed and is started again writes only what is missing. An archive is not
trusted: see `safe_members`.
"""

import collections
from collections.abc import Iterator, Sequence
import concurrent.futures
import copy
import errno
import re
import stat
import struct
import threading
from typing import Any, BinaryIO
import unicodedata
import zipfile
import zlib

from vjepa_jax.data import storage
from vjepa_jax.data.record import ReadError

CRC_NAME = "zip-crc32"
MAX_RATIO = 200.0
MAX_MEMBER_BYTES = 16 << 30
# 700,000 members of short names; Python holds about 0.5 kB for each.
_MAX_DIRECTORY_BYTES = 32 << 20
_SMALL = 1 << 20  # a member below this cannot be a bomb, however well it packs
_COPY_BYTES = 1 << 20
_GROUP_BYTES = 32 << 20
_END, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x07"
# Of a file's name on any disk, less what a name of a file half written adds; and of
# an object's in a bucket, less its folder.
_MAX_PART_BYTES, _MAX_NAME_BYTES = 240, 900
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DRIVE = re.compile(r"^[A-Za-z]:")


def expand(
    source: str,
    destination: str,
    *,
    threads: int = 4,
    progress: bool = False,
    max_ratio: float = MAX_RATIO,
    max_member_bytes: int = MAX_MEMBER_BYTES,
) -> dict[str, Any]:
  """Writes each file of a ZIP below `destination`; what is there is not written again.

  A member counts as there when an object of its name has its size and CRC-32.

  Args:
    source: a ZIP, local or gs://.
    destination: a folder, local or gs://.
    threads: members on their way at once; each holds up to 50 MiB.
    progress: shows a bar.
    max_ratio: unpacked over packed size above which a member is refused.
    max_member_bytes: unpacked size above which a member is refused.

  Returns:
    {"written": n, "present": n, "refused": {name: reason}, "reasons": {reason: n},
    "bytes": of what was written, "missing": names that should be there and are not,
    "unlisted": names there that the ZIP does not have}.

  Raises:
    ReadError: bad_archive or too_large (its directory), missing_file, forbidden,
      changed, or unreachable; what was written by then stays.
    ValueError: for less than one thread.
  """
  if threads < 1:
    raise ValueError(f"expand: threads is {threads}, must be at least 1")
  expect = storage.stat(source).stamp
  with storage.open_read(source, expect=expect) as file:
    members, refused = safe_members(
        open_zip(file, source), source, max_ratio=max_ratio,
        max_member_bytes=max_member_bytes,
    )
  run = _Run(source, expect, destination, progress)
  run.go(members, threads)
  there = _there(destination)
  refused |= run.refused
  names = {info.filename for info in members if info.filename not in refused}
  sizes = {info.filename: info.file_size for info in members}
  return {
      "written": run.written,
      "present": run.present,
      "refused": dict(sorted(refused.items())),
      "reasons": dict(sorted(collections.Counter(refused.values()).items())),
      "bytes": run.bytes,
      "missing": sorted(
          n for n in names if n not in there or there[n].size != sizes[n]
      ),
      "unlisted": sorted(there.keys() - names),
  }


def open_zip(file: BinaryIO, source: str) -> zipfile.ZipFile:
  """Opens a ZIP whose directory is of a bearable size.

  Args:
    file: seekable.
    source: its path, for messages.

  Raises:
    ReadError: bad_archive, or too_large.
  """
  size = _directory_bytes(file)
  if size > _MAX_DIRECTORY_BYTES:
    raise ReadError(source, "too_large", f"a directory of {size} bytes")
  try:
    return zipfile.ZipFile(file)
  except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error,
          OSError) as error:
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
      raise
    raise ReadError(
        source, "bad_archive", f"{type(error).__name__}: {error}"
    ) from error


def safe_members(
    zip_file: zipfile.ZipFile,
    source: str,
    *,
    max_bytes: int | None = None,
    max_member_bytes: int = MAX_MEMBER_BYTES,
    max_ratio: float = MAX_RATIO,
) -> tuple[list[zipfile.ZipInfo], dict[str, str]]:
  """Parts the files of a ZIP into those that can be unpacked safely and the others.

  Args:
    zip_file: opened (see `open_zip`).
    source: its path, for messages.
    max_bytes: what all safe members may hold together, unpacked.
    max_member_bytes: what one may hold.
    max_ratio: unpacked over packed size that one above 1 MiB may have.

  Returns:
    The members, in the order of their bytes in the file, `filename` being a clean
    relative path with "/"; and name -> reason of the refused: path_escape (absolute,
    a drive, "..", a control character), not_a_file (a link or device), encrypted,
    packing (neither stored nor deflated), too_large, bomb, bad_archive (it shares
    bytes with another), name_too_long (for a file or an object), or name_collision
    (two members, or a member and a folder, would have one name). Folders are in
    neither.

  Raises:
    ReadError: too_large (all together).
  """
  infos = [info for info in zip_file.infolist() if not info.is_dir()]
  infos.sort(key=lambda info: info.header_offset)
  displaced = _displaced(zip_file)
  safe, refused = {}, {}
  for info in infos:
    reason = _refusal(info, max_member_bytes, max_ratio)
    if id(info) in displaced:
      reason = reason or "bad_archive"
    name = _clean(info.orig_filename)
    if reason:
      refused[info.filename] = reason
      continue
    same = safe.get(name)
    if same is None:
      safe[name] = copy.copy(info)
      safe[name].filename = name
    elif (same.CRC, same.file_size) != (info.CRC, info.file_size):
      refused[name] = "name_collision"
  folders = {f for name in safe for f in _folders(name)}
  refused |= {name: "name_collision" for name in safe if name in folders}
  chosen = [info for name, info in safe.items() if name not in refused]
  total = sum(info.file_size for info in chosen)
  if max_bytes is not None and total > max_bytes:
    raise ReadError(
        source, "too_large", f"unpacks to {total} bytes, {max_bytes} are allowed"
    )
  return chosen, refused


def read_member(zip_file: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
  """Yields a member's content by pieces of at most 1 MiB, verified at its end.

  Raises:
    zipfile.BadZipFile: it is damaged, or not of the size and CRC-32 it claims.
  """
  left = info.file_size
  try:
    with zip_file.open(info) as file:
      while piece := file.read(_COPY_BYTES):
        left -= len(piece)
        yield piece
  except (zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError,
          struct.error) as error:
    raise zipfile.BadZipFile(f"{type(error).__name__}: {error}") from error
  if left:
    raise zipfile.BadZipFile(f"it is {left} bytes shorter than it claims")


class _Run:
  """One expansion: what is done, counted under a lock."""

  def __init__(self, source: str, expect: str, destination: str, progress: bool):
    self.source, self.expect, self.destination = source, expect, destination
    self.progress = progress
    self.written = self.present = self.bytes = 0
    self.refused = {}
    self._lock = threading.Lock()
    self._stopped = threading.Event()

  def go(self, members: Sequence[zipfile.ZipInfo], threads: int) -> None:
    """Writes the members; the first error that is not a member's own ends it."""
    import tqdm  # pylint: disable=g-import-not-at-top

    self._there = _there(self.destination)
    groups = list(_groups(members, _GROUP_BYTES))
    total = sum(info.file_size for info in members)
    with (
        tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="expand",
                  disable=not self.progress) as self._bar,
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):
      futures = [
          pool.submit(self._run_share, groups[i::threads]) for i in range(threads)
      ]
      try:
        for future in concurrent.futures.as_completed(futures):
          future.result()
      finally:
        self._stopped.set()

  def _run_share(self, groups: Sequence[Sequence[zipfile.ZipInfo]]) -> None:
    todo = [[i for i in group if not self._is_there(i)] for group in groups]
    if not any(todo):
      return
    with storage.open_read(self.source, expect=self.expect) as file:
      zip_file = open_zip(file, self.source)
      for info in (info for group in todo for info in group):
        if self._stopped.is_set():
          return
        self._write(zip_file, info)

  def _is_there(self, info: zipfile.ZipInfo) -> bool:
    entry = self._there.get(info.filename)
    if self._stopped.is_set() or entry is None or entry.size != info.file_size:
      return False
    found = entry.metadata.get(CRC_NAME)
    if found is None:
      found = _crc32(entry)
    if found != f"{info.CRC:08x}":
      return False
    with self._lock:
      self.present += 1
      self._bar.update(info.file_size)
    return True

  def _write(self, zip_file: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    path = storage.join(self.destination, info.filename)
    storage.make_folder(storage.parent(path))
    try:
      storage.write_pieces(
          path, read_member(zip_file, info), {CRC_NAME: f"{info.CRC:08x}"}
      )
    except zipfile.BadZipFile:
      with self._lock:
        self.refused[info.filename] = "bad_archive"
        self._bar.update(info.file_size)
      return
    with self._lock:
      self.written += 1
      self.bytes += info.file_size
      self._bar.update(info.file_size)


def _there(destination: str) -> dict[str, storage.Entry]:
  """Returns what lies below a folder by its path relative to it."""
  try:
    entries = storage.list_entries(destination)
  except ReadError as error:
    if error.reason != "missing_file":
      raise
    return {}
  root = destination.rstrip("/") + "/"
  return {entry.path.removeprefix(root): entry for entry in entries}


def _crc32(entry: storage.Entry) -> str:
  """Returns the CRC-32 of what lies there, for want of a note of it."""
  crc = 0
  with storage.open_read(entry.path) as file:
    while piece := file.read(_COPY_BYTES):
      crc = zlib.crc32(piece, crc)
  return f"{crc:08x}"


def _groups(
    members: Sequence[zipfile.ZipInfo], size: int
) -> Iterator[list[zipfile.ZipInfo]]:
  """Cuts the members into neighbours of about `size` bytes, so blocks are shared."""
  group, held = [], 0
  for info in members:
    group.append(info)
    held += info.compress_size
    if held >= size:
      yield group
      group, held = [], 0
  if group:
    yield group


def _refusal(
    info: zipfile.ZipInfo, max_member_bytes: int, max_ratio: float
) -> str | None:
  mode = info.external_attr >> 16
  name = _clean(info.orig_filename)
  if not name:
    return "path_escape"
  if max(len(part.encode()) for part in name.split("/")) > _MAX_PART_BYTES or (
      len(name.encode()) > _MAX_NAME_BYTES
  ):
    return "name_too_long"
  if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
    return "not_a_file"
  if info.flag_bits & 0x1:
    return "encrypted"
  if info.compress_type not in _METHODS:
    return "packing"
  if info.file_size > max_member_bytes:
    return "too_large"
  if info.file_size > max(_SMALL, max_ratio * info.compress_size):
    return "bomb"
  return None


def _clean(name: str) -> str:
  """Returns a relative path with "/", or "" where the name leads elsewhere."""
  name = unicodedata.normalize("NFC", name.replace("\\", "/"))
  parts = [part for part in name.split("/") if part not in ("", ".")]
  if name.startswith("/") or _DRIVE.match(name) or ".." in parts:
    return ""
  if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
    return ""
  return "/".join(parts)


def _folders(name: str) -> Iterator[str]:
  parts = name.split("/")[:-1]
  for count in range(1, len(parts) + 1):
    yield "/".join(parts[:count])


def _displaced(zip_file: zipfile.ZipFile) -> set[int]:
  """Returns the identities of members that share bytes or lie outside of the archive.

  Members in one another are the way to a bomb without a high ratio.
  """
  infos = sorted(zip_file.infolist(), key=lambda info: info.header_offset)
  starts = [info.header_offset for info in infos] + [zip_file.start_dir]
  return {
      id(info) for info, following in zip(infos, starts[1:])
      # 30 bytes of a local header, and a name that may be encoded otherwise there.
      if info.header_offset < 0
      or info.header_offset + 30 + info.compress_size > following
  }


def _directory_bytes(file: BinaryIO) -> int:
  """Returns the size of a ZIP's directory as its end claims; 0 where none is seen."""
  size = file.seek(0, 2)
  file.seek(max(0, size - (1 << 16) - 22 - 20 - 56))
  tail = file.read()
  end = len(tail) - 22
  if end < 0 or not tail.startswith(_END, end) or tail[-2:] != b"\0\0":
    end = tail.rfind(_END)
  if end < 0 or end + 22 > len(tail):
    return 0
  if end >= 76 and tail.startswith(_LOCATOR_64, end - 20):
    return struct.unpack_from("<Q", tail, end - 76 + 40)[0]
  return struct.unpack_from("<L", tail, end + 12)[0]
