"""ZIP archives of one DICOM series, read without a touch of the disk."""

from collections.abc import Callable
import io
import posixpath
import struct
import zipfile

from vjepa_jax.data import expand
from vjepa_jax.data.readers import dicom_header, series
from vjepa_jax.data.readers.base import ReadOptions
from vjepa_jax.data.record import ReadError, Record

_NESTED = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".7z", ".rar", ".xz")
# What one voxel may take unpacked, and all headers together.
_VOXEL_BYTES = 4
_HEADER_BYTES = 1 << 26
_REASONS = {"path_escape": "path_escape", "too_large": "too_large", "bomb": "too_large"}


def matches(head: bytes, path: str) -> bool:
  """Says whether a content begins as a ZIP does that is no npz."""
  del path
  if head[:4] == b"PK\x05\x06":  # An archive of nothing.
    return True
  if head[:4] != b"PK\x03\x04" or len(head) < 30:
    return False
  length = struct.unpack("<H", head[26:28])[0]
  return not head[30:30 + length].endswith(b".npy")


def read(data: bytes, source: str, options: ReadOptions) -> Record:
  """Reads a ZIP of one DICOM series; see `series.read_members`.

  Args:
    data: the archive.
    source: its path.
    options: `series` names one of several; max_voxels and max_bytes bound what is
      unpacked.

  Raises:
    ReadError: bad_archive, path_escape, too_large, or as of a folder of slices.
  """
  archive = expand.open_zip(io.BytesIO(data), source)
  limit = min(options.max_bytes, _VOXEL_BYTES * options.max_voxels + _HEADER_BYTES)
  infos, refused = expand.safe_members(archive, source, max_bytes=limit)
  for name, reason in refused.items():
    raise ReadError(
        source, _REASONS.get(reason, "bad_archive"), f"member {name!r}: {reason}"
    )
  if not infos:
    raise ReadError(source, "empty_file", "an archive of no file")
  nested = [info.filename for info in infos if info.filename.lower().endswith(_NESTED)]
  if nested:
    raise ReadError(
        source, "bad_archive", f"an archive within it: {nested[0]}", "unpack it once"
    )
  members = [
      series.Member(posixpath.join(source, i.filename), _loader(archive, i, source))
      for i in infos
  ]
  return series.read_members(members, source, options)


def _loader(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, source: str
) -> Callable[[int | None], bytes]:
  def load(limit: int | None) -> bytes:
    """Unpacks a member by pieces: no further than asked, or than its head deserves."""
    pieces, size = [], 0
    try:
      for piece in expand.read_member(archive, info):
        pieces.append(piece)
        size += len(piece)
        if size >= (limit or 1 << 62) or not dicom_header.is_dicom(pieces[0][:1024]):
          break
    except (zipfile.BadZipFile, OSError) as error:
      raise ReadError(
          source, "bad_archive", f"member {info.filename}: {error}"
      ) from error
    return b"".join(pieces)[:limit]

  return load
