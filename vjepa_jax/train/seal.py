"""Sizes and checksums of a folder's files, so that damage is found before use."""

import concurrent.futures
import json
import os
import pathlib

import google_crc32c

from vjepa_jax.train import workdir as workdir_lib

_NAME = "checksums.json"
_BLOCK = 32 << 20
# Read at once: more would be fresh memory each time, which takes longer than the sum.
_PIECE = 1 << 20
_THREADS = 8


def write(folder: str | os.PathLike[str]) -> None:
  """Writes checksums.json beside the files of a folder: sizes, CRC32C by blocks.

  Nothing in a bucket, which keeps checksums itself and gives no half of an object.

  Args:
    folder: complete.
  """
  if workdir_lib.is_remote(folder):
    return
  folder, files = pathlib.Path(folder), {}
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
      size = path.stat().st_size
      sums = pool.map(lambda at, p=path: _crc(p, at, _BLOCK), range(0, size, _BLOCK))
      files[path.relative_to(folder).as_posix()] = [size, list(sums)]
  content = json.dumps({"block": _BLOCK, "files": files})
  workdir_lib.write_bytes(folder / _NAME, content.encode())


def fault(folder: str | os.PathLike[str], share: tuple[int, int] = (0, 1)) -> str | None:
  """Says which file of a folder is not as it was written.

  Args:
    folder: of `write`; one without checksums.json has no fault.
    share: (i, n) reads every nth block only.

  Returns:
    A name with what is wrong; None where nothing is.
  """
  if workdir_lib.is_remote(folder) or not (path := pathlib.Path(folder, _NAME)).exists():
    return None
  try:
    sealed = json.loads(path.read_bytes())
    block, files = sealed["block"], sorted(sealed["files"].items())
  except (ValueError, KeyError) as error:
    return f"{_NAME}: {type(error).__name__}: {error}"
  places = []
  for name, (size, sums) in files:
    file = path.parent / name
    if not file.exists():
      return f"{name} is missing"
    if (found := file.stat().st_size) != size:
      return f"{name} has {found} bytes, {size} were written"
    places += [(file, name, n * block, crc) for n, crc in enumerate(sums)]
  mine = places[share[0] :: share[1]]
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    found = pool.map(lambda place: _crc(place[0], place[2], block), mine)
    for (_, name, begin, crc), now in zip(mine, found, strict=True):
      if now != crc:
        return f"{name} was altered between byte {begin} and {begin + block}"
  return None


def _crc(path: pathlib.Path, begin: int, length: int) -> int:
  total = 0
  with path.open("rb", buffering=0) as file:
    file.seek(begin)
    while length and (piece := file.read(min(length, _PIECE))):
      total = google_crc32c.extend(total, piece)
      length -= len(piece)
  return total
