"""A local cache of remote objects that several processes share.

An object lies under the hash of its path, its stamp, size and checksum, so a replaced
object is never found and a torn file is recognised. Files appear by a rename, the
least recently used go first, and every lock is an flock: the kernel frees it when its
process is killed. Nothing that a killed process leaves needs a repair by hand.
"""

import base64
import collections
from collections.abc import Callable, Iterator
import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import pathlib
import re
import tempfile
import threading
import time
from typing import BinaryIO
import uuid

from vjepa_jax.data import counts
from vjepa_jax.data.record import ReadError

CACHE_BYTES = 20 << 30
_STRIPES = 4096
_LEASES = 16
# What an eviction leaves, so that not every insertion scans the folder.
_LOW_WATER = 0.9
_STALE_PART_S = 60.0
_LONGEST_WAIT_S = 120.0
_COPY_BYTES = 1 << 20
_NAME = re.compile(
    r"(?P<key>[0-9a-f]{40})-(?P<stamp>\w+)-(?P<size>\d+)-(?P<crc>[0-9a-f]{8})-"
)


class FileCache:
  """The cache in one folder.

  Args:
    folder: where it lies; made where missing.
    max_bytes: what all its files may hold together. On top come a file in the making
      and the last 16 of `copy`, for each process.
  """

  def __init__(self, folder: str, max_bytes: int):
    self._folder = pathlib.Path(folder)
    self._max_bytes = max_bytes
    self._leases = collections.deque()
    self._lease_lock = threading.Lock()
    os.makedirs(self._folder / "locks", exist_ok=True)

  def read(
      self, path: str, get: Callable, *, expect: str | None = None,
      max_bytes: int | None = None,
  ) -> bytes:
    """Returns the content of an object, from here or by `get`.

    Without `expect` one request asks whether what lies here is still the object.

    Args:
      path: gs://bucket/name.
      get: `gcs.get`.
      expect: the stamp that it must have; what lies here under it is not asked for.
      max_bytes: the largest content that may be read.

    Raises:
      ReadError: as `get`.
    """
    if expect:
      held, data = self._held(path, max_bytes)
      if held and held["stamp"] == expect:
        return data
    with self._one_at_a_time(path):
      held, data = self._held(path, max_bytes)
      known = held["stamp"] if held else None
      if known and known == expect:
        return data
      found = get(path, expect=expect, known=known, max_bytes=max_bytes)
      if found.data is None:
        return data
      # A server that states no generation cannot be told from one that changed.
      if found.generation and len(found.data) <= self._max_bytes:
        self._insert_bytes(path, found.generation, found.data)
      return found.data

  def copy(
      self, path: str, download: Callable, *, expect: str | None = None
  ) -> str:
    """Returns a local file with the content; it is kept while it is leased.

    Args:
      path: gs://bucket/name.
      download: `gcs.download`.
      expect: the stamp that it must have.

    Raises:
      ReadError: as `download`; too_large, where it is larger than the cache.
    """
    with self._one_at_a_time(path):
      held = self._find(path)
      if held and not self._lease(held, path):
        held = None
      if held and held["stamp"] == expect:
        return held["file"]
      with self._part() as part:
        found = download(
            path, part, expect=expect, known=held["stamp"] if held else None,
            max_bytes=self._max_bytes,
        )
        if found.data is None:
          return held["file"]
        crc = base64.b64decode(found.crc32c).hex()
        file = self._insert(path, found.generation or "0", crc, part)
        self._lease({"file": file} | _parse(file), path)
      return file

  def size(self) -> int:
    """Returns the bytes of all files that lie here."""
    return sum(size for _, size, _ in self._scan())

  def _find(self, path: str) -> dict | None:
    """Returns the newest file that holds the path."""
    key = _key(path)
    folder = self._folder / key[:2]
    names = [n for n in _names(folder) if n.startswith(key)]
    found = [{"file": str(folder / name)} | _parse(name) for name in sorted(names)]
    return found[-1] if found else None

  def _held(self, path: str, max_bytes: int | None) -> tuple[dict | None, bytes]:
    """Returns the file that holds the path and its content, or None and b""."""
    held = self._find(path)
    data = self._load(held, max_bytes, path) if held else None
    return (None, b"") if data is None else (held, data)

  def _load(self, held: dict, max_bytes: int | None, path: str) -> bytes | None:
    """Returns the verified content of a file; None where it is gone or torn."""
    size = int(held["size"])
    if max_bytes is not None and size > max_bytes:
      raise ReadError(
          path, "too_large", f"{size} bytes, more than the {max_bytes} allowed"
      )
    try:
      with open(held["file"], "rb") as file:
        data = file.read()
      os.utime(held["file"])
    except OSError:
      return None
    if len(data) == size and _crc32c(data) == held["crc"]:
      return data
    self._discard(held)
    return None

  def _lease(self, held: dict, path: str) -> bool:
    """Opens and locks a file against eviction; False where it is gone or torn."""
    try:
      file = open(held["file"], "rb")  # noqa: SIM115
      os.utime(held["file"])
    except OSError:
      return False
    fcntl.flock(file, fcntl.LOCK_SH)
    if os.fstat(file.fileno()).st_nlink == 0:
      file.close()
      return False
    if not _holds(file, int(held["size"]), held["crc"]):
      file.close()
      self._discard(held)
      return False
    with self._lease_lock:
      self._leases.append(file)
      if len(self._leases) > _LEASES:
        self._leases.popleft().close()
    return True

  def _discard(self, held: dict) -> None:
    counts.count("cache file damaged")
    with contextlib.suppress(FileNotFoundError):
      os.remove(held["file"])

  def _insert_bytes(self, path: str, stamp: str, data: bytes) -> None:
    try:
      with self._part() as part:
        part.write(data)
        self._insert(path, stamp, _crc32c(data), part, needed=False)
    except OSError:
      # A full or read-only disk costs speed, never the content just read.
      counts.count("cache not written")

  def _insert(
      self, path: str, stamp: str, crc: str, part: BinaryIO, needed: bool = True
  ) -> str:
    """Gives a finished part its name, after making room; removes older stamps."""
    part.flush()
    size = os.fstat(part.fileno()).st_size
    key = _key(path)
    folder = self._folder / key[:2]
    os.makedirs(folder, exist_ok=True)
    ending = re.sub(r"[^\w.]", "_", path.rpartition("/")[2])[-80:]
    file = folder / f"{key}-{stamp}-{size}-{crc}-{ending}"
    with self._lock(self._folder / "lock"):
      total = self._total() + size
      if total > self._max_bytes:
        total = self._evict(int(self._max_bytes * _LOW_WATER) - size) + size
        if total > self._max_bytes and not needed:
          raise OSError(errno.ENOSPC, "the cache is full of files in use")
      # Counted before it is there: a kill in between makes the sum too large, which
      # the next scan mends, never too small.
      (self._folder / "total").write_text(str(total))
      os.replace(part.name, file)
    for name in _names(folder):
      if name.startswith(key) and name != file.name:
        self._remove_unless_leased(folder / name)
    return str(file)

  def _total(self) -> int:
    try:
      return int((self._folder / "total").read_text())
    except (OSError, ValueError):
      return self.size()

  def _evict(self, target: int) -> int:
    """Removes the least recently used files; returns the bytes that remain."""
    files = sorted(self._scan())
    total = sum(size for _, size, _ in files)
    for _, size, file in files:
      if total <= max(target, 0):
        break
      if self._remove_unless_leased(file):
        total -= size
    return total

  def _remove_unless_leased(self, file: pathlib.Path) -> bool:
    with contextlib.suppress(FileNotFoundError), open(file, "rb") as held:
      try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        return False
      os.remove(file)
    return True

  def _scan(self) -> Iterator[tuple[float, int, pathlib.Path]]:
    """Yields (last use, bytes, file) of each file; clears parts of the killed."""
    for folder in sorted(self._folder.glob("[0-9a-f][0-9a-f]")):
      for name in _names(folder):
        with contextlib.suppress(FileNotFoundError):
          found = os.stat(folder / name)
          yield found.st_mtime, found.st_size, folder / name
    for part in self._folder.glob("*.part"):
      with contextlib.suppress(FileNotFoundError):
        if time.time() - part.stat().st_mtime > _STALE_PART_S:
          self._remove_unless_leased(part)

  @contextlib.contextmanager
  def _part(self) -> Iterator[BinaryIO]:
    """Opens a file in the making, locked so that no other process clears it."""
    path = self._folder / f"{uuid.uuid4().hex}.part"
    try:
      with open(path, "w+b") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield file
    finally:
      with contextlib.suppress(FileNotFoundError):
        os.remove(path)

  @contextlib.contextmanager
  def _one_at_a_time(self, path: str) -> Iterator[None]:
    """Lets one process at a time fetch an object; the others then find it here."""
    stripe = int(_key(path)[:8], 16) % _STRIPES
    with self._lock(self._folder / "locks" / str(stripe), _LONGEST_WAIT_S):
      yield

  @contextlib.contextmanager
  def _lock(self, path: pathlib.Path, longest_s: float | None = None):
    """Holds a lock; goes on without it after `longest_s`, which is safe but slow."""
    with open(path, "ab") as file:
      end = None if longest_s is None else time.monotonic() + longest_s
      while True:
        try:
          fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if end else 0))
          break
        except BlockingIOError:
          if time.monotonic() > end:
            break
          time.sleep(0.01)
      yield


def configured() -> FileCache | None:
  """Returns the cache that the environment names, or None."""
  folder = os.environ.get("VJEPA_JAX_FILE_CACHE")
  return _open(folder, _configured_bytes(), os.getpid()) if folder else None


def default() -> FileCache:
  """Returns the cache for copies where none is configured."""
  folder = os.path.join(tempfile.gettempdir(), f"vjepa_jax_files_{os.getuid()}")
  return _open(folder, _configured_bytes(), os.getpid())


@functools.lru_cache(8)
def _open(folder: str, max_bytes: int, process: int) -> FileCache:
  return FileCache(folder, max_bytes)


def _configured_bytes() -> int:
  return int(os.environ.get("VJEPA_JAX_FILE_CACHE_BYTES") or CACHE_BYTES)


def _key(path: str) -> str:
  return hashlib.sha256(path.encode()).hexdigest()[:40]


def _parse(file: str) -> dict[str, str]:
  return _NAME.match(os.path.basename(file)).groupdict()


def _names(folder: pathlib.Path) -> list[str]:
  try:
    return [name for name in os.listdir(folder) if _NAME.match(name)]
  except FileNotFoundError:
    return []


def _crc32c(data: bytes) -> str:
  import google_crc32c  # pylint: disable=g-import-not-at-top

  return google_crc32c.Checksum(data).digest().hex()


def _holds(file: BinaryIO, size: int, crc: str) -> bool:
  """Says whether a file has its size and checksum."""
  import google_crc32c  # pylint: disable=g-import-not-at-top

  if os.fstat(file.fileno()).st_size != size:
    return False
  checksum = google_crc32c.Checksum()
  while piece := file.read(_COPY_BYTES):
    checksum.update(piece)
  return checksum.digest().hex() == crc
