"""Bytes from a local disk or a bucket (`gs://`), whole objects at a time.

A DICOM header read by small ranges costs hundreds of requests, so a remote object
is fetched in one. Every failure is a `ReadError` with a reason; faults of the network
are tried again with growing waits until a deadline, what is refused for good is not.

Requests to a bucket: `read_bytes` 1 (0 where the cache holds the generation that
`expect` names), `write_bytes` 1, `stat` 1, `exists` 1 or 2, `is_folder` 0 for a name
with an extension and 1 for another, `list_entries` 1 a thousand objects, `open_read`
1 and 1 a block.
"""

from collections.abc import Iterable, Iterator
import concurrent.futures
import contextlib
import dataclasses
import errno
import io
import os
import posixpath
import re
from typing import Any, BinaryIO
import uuid

from vjepa_jax.data import counts, file_cache
from vjepa_jax.data.record import ReadError

_BUCKET = "gs://"
_BLOCK_BYTES = 4 << 20
_COPY_BYTES = 1 << 20
_DELETERS = 16
_EXTENSION = re.compile(r"\.[A-Za-z][A-Za-z0-9_]{0,11}$")
# Arrays kept as a folder of chunks, whose names look like a file's.
_FOLDER_EXTENSIONS = (".zarr", ".n5")

counters = counts.counters
reset_counters = counts.reset_counters


@dataclasses.dataclass(frozen=True, order=True)
class Entry:
  """A file or an object, as a listing shows it.

  Attributes:
    path: local, or gs://bucket/name.
    size: in bytes.
    stamp: what changes when it is replaced: a bucket's generation, or size and
      modification time of a local file.
    md5: base64, as a bucket states it; "" where unknown.
    crc32c: base64, as a bucket states it; "" where unknown.
    metadata: what was stored beside it, by name.
  """

  path: str
  size: int
  stamp: str
  md5: str = ""
  crc32c: str = ""
  metadata: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)


def configure(
    *,
    cache: str | None | Any = ...,
    cache_bytes: int | Any = ...,
    deadline_s: float | Any = ...,
    anonymous: bool | Any = ...,
    counts_folder: str | None | Any = ...,
) -> None:
  """Sets options of this process and those it starts; what is not given stays.

  Args:
    cache: a local folder that keeps what is read from buckets; None = no cache.
    cache_bytes: what the cache may hold; the least recently used goes first.
    deadline_s: how long one operation is tried, for each 64 MiB of its body.
    anonymous: read public buckets without credentials.
    counts_folder: where all processes put their `counters`; None = each its own.
  """
  for name, value in (
      ("VJEPA_JAX_FILE_CACHE", cache),
      ("VJEPA_JAX_FILE_CACHE_BYTES", cache_bytes),
      ("VJEPA_JAX_STORAGE_DEADLINE_S", deadline_s),
      ("VJEPA_JAX_ANONYMOUS", anonymous),
      ("VJEPA_JAX_STORAGE_COUNTS", counts_folder),
  ):
    if value is ...:
      continue
    if value is None or value is False or value == "":
      os.environ.pop(name, None)
    else:
      os.environ[name] = "1" if value is True else str(value)
  if counts_folder not in (..., None):
    os.makedirs(counts_folder, exist_ok=True)


def is_remote(path: str) -> bool:
  """Says whether the path names an object in a bucket."""
  return str(path).startswith(_BUCKET)


def is_out_of_reach(error: BaseException | None) -> bool:
  """Says whether an error comes from a bucket that cannot be reached for now."""
  while error is not None:
    if isinstance(error, ReadError) and error.reason == "unreachable":
      return is_remote(error.path)
    error = error.__cause__
  return False


def read_bytes(
    path: str,
    *,
    start: int | None = None,
    stop: int | None = None,
    max_bytes: int | None = None,
    expect: str | None = None,
) -> bytes:
  """Returns the content of a file or object, or its bytes from `start` to `stop`.

  Args:
    path: local, or gs://bucket/name.
    start: the first byte; None = 0; negative counts from the end.
    stop: the byte after the last; None = the end.
    max_bytes: more is refused before it is read.
    expect: the stamp of a listing; another one now raises `changed`.

  Raises:
    ReadError: missing_file, forbidden, too_large, changed, or unreachable.
  """
  if not is_remote(path):
    with open_read(path, expect=expect) as file:
      return _read_local(path, file, start, stop, max_bytes)
  cache = file_cache.configured()
  if cache and start is None and stop is None:
    return cache.read(path, _gcs().get, expect=expect, max_bytes=max_bytes)
  return _gcs().get(
      path, start=start, stop=stop, max_bytes=max_bytes, expect=expect
  ).data


def write_bytes(path: str, data: bytes) -> None:
  """Writes a whole file or object; a reader sees the old content or the new.

  Raises:
    ReadError: forbidden, missing_file (no such folder), or unreachable.
  """
  write_pieces(path, (data,))


def write_pieces(
    path: str, pieces: Iterable[bytes], metadata: dict[str, str] | None = None
) -> None:
  """Writes a file or object of any size, 16 MiB of it in memory.

  It appears when it is complete; an error on the way leaves what was there.

  Args:
    path: local, or gs://bucket/name.
    pieces: the content, in order.
    metadata: stored beside an object and shown by listings; nothing on a disk.

  Raises:
    ReadError: forbidden, missing_file (no such folder), or unreachable.
  """
  if is_remote(path):
    _gcs().put_stream(path, pieces, metadata)
    return
  with _local_errors(path), _replacing(path) as file:
    for piece in pieces:
      file.write(piece)


def open_read(
    path: str, *, expect: str | None = None, block_bytes: int = _BLOCK_BYTES
) -> BinaryIO:
  """Opens a file or object for reading at any place.

  An object is fetched in blocks of one generation; the last four are kept.

  Args:
    path: local, or gs://bucket/name.
    expect: the stamp of a listing; another one now raises `changed`.
    block_bytes: what one request fetches.

  Raises:
    ReadError: missing_file, forbidden, changed, or unreachable; on reading too.
  """
  if is_remote(path):
    return io.BufferedReader(_gcs().RangeReader(path, expect, block_bytes), 1 << 16)
  with _local_errors(path):
    file = open(path, "rb")  # noqa: SIM115
    found = _local_stamp(os.fstat(file.fileno()))
    if expect and found != expect:
      file.close()
      raise ReadError(path, "changed", f"stamp is {found}, {expect} was listed")
    return file


def upload(local: str, path: str) -> None:
  """Copies a local file to an object (or another file), 16 MiB in memory.

  Raises:
    ReadError: missing_file, forbidden, or unreachable.
  """
  with open_read(local) as file:
    write_pieces(path, iter(lambda: file.read(_COPY_BYTES), b""))


def download(path: str, local: str, *, expect: str | None = None) -> None:
  """Copies an object (or a file) to a local file, 32 MiB in memory; verified.

  Raises:
    ReadError: missing_file, forbidden, changed, or unreachable.
  """
  with _local_errors(local), _replacing(local) as target:
    if is_remote(path):
      _gcs().download(path, target, expect=expect)
      return
    with open_read(path, expect=expect) as source:
      while piece := source.read(_COPY_BYTES):
        target.write(piece)


def local_copy(path: str, *, expect: str | None = None) -> str:
  """Returns a local file with the content, for libraries that need a file.

  An object goes through the cache (by default one in the folder for temporary files);
  the file is not to be changed, and stays at least until this process has asked for 16
  others.

  Raises:
    ReadError: missing_file, forbidden, too_large (for the cache), changed, or
      unreachable.
  """
  if is_remote(path):
    cache = file_cache.configured() or file_cache.default()
    return cache.copy(path, _gcs().download, expect=expect)
  with open_read(path, expect=expect):
    return path


def stat(path: str) -> Entry:
  """Returns size, stamp and checksums of a file or object.

  Raises:
    ReadError: missing_file, forbidden, or unreachable.
  """
  if is_remote(path):
    return _entry(path, _gcs().stat(path))
  with open_read(path) as file:
    found = os.fstat(file.fileno())
  return Entry(path, found.st_size, _local_stamp(found))


def stamp(path: str) -> str:
  """Returns what changes when the content is replaced; "" where nothing is there.

  Raises:
    ReadError: forbidden or unreachable.
  """
  try:
    return stat(path).stamp
  except ReadError as error:
    if error.reason != "missing_file":
      raise
    return ""


def exists(path: str) -> bool:
  """Says whether a file, object or folder is there.

  Raises:
    ReadError: forbidden or unreachable.
  """
  if not is_remote(path):
    return os.path.exists(path)
  return bool(not path.endswith("/") and stamp(path)) or _has_objects(path)


def is_folder(path: str) -> bool:
  """Says whether a path is a folder: for a bucket, whether objects lie below it.

  In a bucket a name with an extension is taken for an object, and nothing is asked;
  end a folder's name with "/" where it looks like a file's.

  Raises:
    ReadError: forbidden or unreachable.
  """
  if not is_remote(path):
    return os.path.isdir(path)
  extension = _EXTENSION.search(path.removeprefix(_BUCKET).partition("/")[2])
  if extension and extension[0].lower() not in _FOLDER_EXTENSIONS:
    return False
  return _has_objects(path)


def list_entries(folder: str) -> list[Entry]:
  """Returns all files below a folder, sorted by path, by one listing.

  Raises:
    ReadError: missing_file (no such folder, or no object in it), forbidden, or
      unreachable.
  """
  if is_remote(folder):
    bucket = folder.removeprefix(_BUCKET).partition("/")[0]
    entries = [
        _entry(f"{_BUCKET}{bucket}/{item['name']}", item)
        for item in _gcs().list_objects(folder)
    ]
    if not entries:
      raise ReadError(folder, "missing_file", "no object under this prefix")
    return sorted(entries)
  if not os.path.isdir(folder):
    raise ReadError(folder, "missing_file", "no such folder")
  return sorted(_local_entries(folder))


def list_files(folder: str, suffix: str = "") -> list[str]:
  """Returns the sorted paths of all files below a folder that end in `suffix`.

  Raises:
    ReadError: as `list_entries`.
  """
  return [e.path for e in list_entries(folder) if e.path.endswith(suffix)]


def delete(path: str) -> None:
  """Deletes a file or object.

  Raises:
    ReadError: missing_file, forbidden, or unreachable.
  """
  if is_remote(path):
    _gcs().delete(path)
    return
  with _local_errors(path):
    os.remove(path)


def delete_tree(folder: str) -> None:
  """Deletes all files below a folder; nothing there is no error.

  Raises:
    ValueError: for a whole bucket or a disk's root.
    ReadError: forbidden or unreachable.
  """
  name = folder.removeprefix(_BUCKET).strip("/")
  if not name or (is_remote(folder) and "/" not in name):
    raise ValueError(f"delete_tree: {folder!r} is a whole bucket or disk")
  if not is_remote(folder):
    import shutil  # pylint: disable=g-import-not-at-top

    with _local_errors(folder), contextlib.suppress(FileNotFoundError):
      shutil.rmtree(folder)
    return
  bucket = name.partition("/")[0]
  paths = [f"{_BUCKET}{bucket}/{o['name']}" for o in _gcs().list_objects(folder)]
  with concurrent.futures.ThreadPoolExecutor(_DELETERS) as pool:
    list(pool.map(_delete_if_there, paths))


def make_folder(path: str) -> None:
  """Makes a local folder and those above it; a bucket needs none.

  Raises:
    ReadError: forbidden, or missing_file (a file of that name is in the way).
  """
  if is_remote(path):
    return
  try:
    os.makedirs(path, exist_ok=True)
  except FileExistsError as error:
    raise ReadError(path, "missing_file", "a file lies where a folder must") from error
  except OSError as error:
    raise ReadError(path, "forbidden", f"{type(error).__name__}: {error}") from error


def join(root: str, path: str) -> str:
  """Joins a path onto a root; a leading "/" of the path is not absolute."""
  if is_remote(path):
    return path
  if is_remote(root):
    return root.rstrip("/") + "/" + path.lstrip("/")
  return os.path.join(root, path.lstrip("/"))


def plain(path: str) -> str:
  """Returns a path without "..", "." and doubled "/": one file, one name.

  For comparing: where a folder is a link, ".." of it may lead elsewhere.
  """
  scheme, mark, rest = path.rpartition("://")
  return scheme + mark + posixpath.normpath(rest)


def parent(path: str) -> str:
  """Returns the folder that a file lies in."""
  if is_remote(path):
    return _BUCKET + posixpath.dirname(path[len(_BUCKET):])
  return os.path.dirname(path) or "."


def basename(path: str) -> str:
  """Returns the last part of a path; of a folder's too, with or without "/"."""
  return posixpath.basename(path.rstrip("/"))


def _gcs():
  # gcsfs otherwise asks by gRPC for the bucket's kind first: 58 s without it.
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  from vjepa_jax.data import gcs  # pylint: disable=g-import-not-at-top

  return gcs


def _entry(path: str, about: dict) -> Entry:
  return Entry(
      path, int(about["size"]), str(about["generation"]), about.get("md5Hash") or "",
      about.get("crc32c") or "", about.get("metadata") or {},
  )


def _has_objects(folder: str) -> bool:
  try:
    return bool(_gcs().list_objects(folder, limit=1))
  except ReadError as error:
    if error.reason != "missing_file":
      raise
    return False


def _delete_if_there(path: str) -> None:
  try:
    delete(path)
  except ReadError as error:
    if error.reason != "missing_file":
      raise


def _local_entries(folder: str) -> Iterator[Entry]:
  for base, _, names in os.walk(folder):
    for name in names:
      path = os.path.join(base, name)
      # A file may go, and a link may lead nowhere, between listing and stat.
      with contextlib.suppress(FileNotFoundError):
        found = os.stat(path)
        yield Entry(path, found.st_size, _local_stamp(found))


def _local_stamp(found: os.stat_result) -> str:
  return f"{found.st_size}:{found.st_mtime_ns}"


def _read_local(
    path: str, file: BinaryIO, start: int | None, stop: int | None,
    max_bytes: int | None,
) -> bytes:
  with _local_errors(path):
    size = os.fstat(file.fileno()).st_size
    first, last, _ = slice(start, stop).indices(size)
    if max_bytes is not None and last - first > max_bytes:
      raise ReadError(
          path, "too_large", f"{last - first} bytes, more than the {max_bytes} allowed"
      )
    file.seek(first)
    # A pipe or a device states no size.
    return file.read(max(last - first, 0)) if size else file.read(max_bytes or -1)


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
  """Opens a file that takes the path's place at the end, and only on success."""
  partial = f"{path}.{uuid.uuid4().hex[:8]}.part"
  try:
    with open(partial, "wb") as file:
      yield file
    os.replace(partial, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(partial)
    raise


@contextlib.contextmanager
def _local_errors(path: str) -> Iterator[None]:
  """Turns an error of the operating system into a ReadError."""
  try:
    yield
  except IsADirectoryError as error:
    raise ReadError(
        path, "missing_file", "this is a folder, not a file"
    ) from error
  except (FileNotFoundError, NotADirectoryError) as error:
    raise ReadError(path, "missing_file", "no such file") from error
  except ValueError as error:  # A null byte in the name.
    raise ReadError(path, "missing_file", f"no such file: {error}") from error
  except PermissionError as error:
    raise ReadError(path, "forbidden", f"{type(error).__name__}: {error}") from error
  except OSError as error:
    found = f"{type(error).__name__}: {error}"
    named = error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
    raise ReadError(path, "missing_file" if named else "unreachable", found) from error
