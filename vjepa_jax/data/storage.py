"""Bytes from a local disk or a bucket (`gs://`), whole objects at a time.

A DICOM header read by small ranges costs hundreds of requests, so a remote
object is always fetched in one. Every failure is a `ReadError` with a reason.
"""

import os
import posixpath

from vjepa_jax.data.record import ReadError

_BUCKET = "gs://"


def is_remote(path: str) -> bool:
  """Says whether the path names an object in a bucket."""
  return str(path).startswith(_BUCKET)


def read_bytes(path: str) -> bytes:
  """Returns the whole content of a local file or a `gs://` object.

  Raises:
    ReadError: missing_file, forbidden, or unreachable.
  """
  try:
    if is_remote(path):
      return _bucket().cat_file(path)
    with open(path, "rb") as file:
      return file.read()
  except Exception as error:
    raise _as_read_error(path, error) from error


def write_bytes(path: str, data: bytes) -> None:
  """Writes a whole file or object; a reader sees the old content or the new.

  Raises:
    ReadError: forbidden, missing_file (no such folder), or unreachable.
  """
  try:
    if is_remote(path):
      _bucket().pipe_file(path, data)
      return
    partial = f"{path}.{os.getpid()}.part"
    with open(partial, "wb") as file:
      file.write(data)
    os.replace(partial, path)
  except Exception as error:
    raise _as_read_error(path, error) from error


def exists(path: str) -> bool:
  """Says whether a file, object or folder is there.

  Raises:
    ReadError: forbidden or unreachable.
  """
  if not is_remote(path):
    return os.path.exists(path)
  try:
    return _bucket().exists(path)
  except Exception as error:
    raise _as_read_error(path, error) from error


def list_files(folder: str, suffix: str = "") -> list[str]:
  """Returns the sorted paths of all files below a folder that end in `suffix`.

  Raises:
    ReadError: missing_file, forbidden, or unreachable.
  """
  if not is_remote(folder):
    if not os.path.isdir(folder):
      raise ReadError(folder, "missing_file", "no such folder")
    found = [
        os.path.join(base, name)
        for base, _, names in os.walk(folder) for name in names
    ]
  else:
    try:
      found = [_BUCKET + name for name in _bucket().find(folder)]
    except Exception as error:
      raise _as_read_error(folder, error) from error
    if not found:
      raise ReadError(folder, "missing_file", "no object under this prefix")
  return sorted(name for name in found if name.endswith(suffix))


def join(root: str, path: str) -> str:
  """Joins a path onto a root; a leading "/" of the path is not absolute."""
  if is_remote(path):
    return path
  if is_remote(root):
    return root.rstrip("/") + "/" + path.lstrip("/")
  return os.path.join(root, path.lstrip("/"))


def parent(path: str) -> str:
  """Returns the folder that a file lies in."""
  if is_remote(path):
    return _BUCKET + posixpath.dirname(path[len(_BUCKET):])
  return os.path.dirname(path) or "."


def stamp(path: str) -> str:
  """Returns what changes when a local file is replaced; "" for a bucket."""
  if is_remote(path) or not os.path.exists(path):
    return ""
  found = os.stat(path)
  return f"{found.st_size}:{found.st_mtime_ns}"


def _bucket():
  # gcsfs otherwise asks by gRPC for the bucket's kind first: 58 s without it.
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  import gcsfs  # pylint: disable=g-import-not-at-top

  # fsspec keeps one instance a process, so that a forked worker gets its own.
  if os.environ.get("STORAGE_EMULATOR_HOST"):
    return gcsfs.GCSFileSystem(token="anon", use_listings_cache=False)
  return gcsfs.GCSFileSystem(use_listings_cache=False)


def _as_read_error(path: str, error: Exception) -> ReadError:
  code = str(getattr(error, "code", "") or getattr(error, "status", ""))
  detail = f"{type(error).__name__}: {error}"
  if isinstance(error, (FileNotFoundError, NotADirectoryError)) or code == "404":
    return ReadError(path, "missing_file", "no such file")
  if isinstance(error, IsADirectoryError):
    return ReadError(path, "missing_file", "this is a folder, not a file")
  if isinstance(error, PermissionError) or code in ("401", "403"):
    return ReadError(path, "forbidden", detail)
  return ReadError(path, "unreachable", detail)
