"""Zarr arrays of versions 2 and 3, OME-NGFF images among them; they are folders.

The objects of one array are fetched here, whole, through `storage`, and decoded in a
helper process. Axes are those stated in `axes`; else the file's (OME-NGFF `axes`,
`dimension_names`, `_ARRAY_DIMENSIONS`); else [Z, Y, X] or [T, Z, Y, X, C].
"""

from collections.abc import Sequence
from concurrent import futures
import dataclasses
import functools
import json
import math
import re
from typing import Any

import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.data.readers import apart
from vjepa_jax.data.readers.base import (
    DEFAULT_AXES,
    ReadOptions,
    arrange,
    border,
    check_voxels,
    missing_extra,
    to_record,
)
from vjepa_jax.data.record import ReadError, Record

_META = ("zarr.json", ".zarray", ".zgroup")
_META_BYTES = 1 << 24
_MAX_CHUNKS = 1 << 20
_FETCHES = 8
# Pieces claimed for one that is there: above it nearly all would be fill value.
_MAX_SPARSE = 64
# Others, such as pickle, run what the file says.
_CODECS = frozenset({
    "bytes", "endian", "transpose", "sharding_indexed", "crc32c", "blosc", "gzip",
    "zstd", "zlib", "bz2", "lzma", "lz4", "delta", "shuffle", "packbits",
    "fixedscaleoffset", "bitround", "quantize", "astype", "crc32", "adler32",
    "fletcher32", "jenkins_lookup3",
})
_MM = {
    "meter": 1e3, "centimeter": 10.0, "millimeter": 1.0, "micrometer": 1e-3,
    "nanometer": 1e-6, "angstrom": 1e-7, "picometer": 1e-9, "inch": 25.4,
    "m": 1e3, "cm": 10.0, "mm": 1.0, "um": 1e-3, "µm": 1e-3, "nm": 1e-6,
}
_S = {
    "second": 1.0, "millisecond": 1e-3, "microsecond": 1e-6, "nanosecond": 1e-9,
    "minute": 60.0, "hour": 3600.0, "day": 86400.0, "s": 1.0, "ms": 1e-3,
}


@dataclasses.dataclass
class _Array:
  """What the metadata of one array say.

  Attributes:
    path: inside the folder; "" for the folder itself.
    shape: of all voxels.
    chunks: shape of what one object holds.
    dtype: of the voxels.
    names: its axes where it names them, else "".
    spacing: (dt, dz, dy, dx) in s and mm.
  """

  path: str
  shape: tuple[int, ...]
  chunks: tuple[int, ...]
  dtype: np.dtype
  names: str = ""
  spacing: tuple[float, ...] = (math.nan,) * 4


def matches_folder(names: Sequence[str]) -> bool:
  """Says whether these files are a Zarr group or array."""
  return any(n.rsplit("/", 1)[-1] in _META for n in names)


def read_folder(path: str, names: Sequence[str], options: ReadOptions) -> Record:
  """Reads one array: `options.key`, the finest of an OME-NGFF image, or the only one.

  Raises:
    ReadError: several_series, no_pixel_data, bad_header, ambiguous_axes,
      unsupported_pixels, no_decoder, path_escape, decode_failed, too_large,
      missing_extra, timed_out, decoder_died, and those of `storage`.
  """
  files = {n[len(path.rstrip("/")) + 1:]: n for n in names}
  folder = _Folder(path, files)
  with border(path, "bad_header"):
    found = _find(folder, options.key)
  check_voxels(found.shape, path, options.max_voxels)
  check_voxels(found.chunks, path, max(options.max_voxels, 1 << 24))
  axes, origin = _axes(found, path, options)
  mine = folder.below(found.path)
  stored = sum(bool(re.search(r"(^|[/.])(c|\d+([/.]\d+)*)$", k)) for k in mine)
  wanted = math.prod(-(-n // c) for n, c in zip(found.shape, found.chunks, strict=True))
  if wanted > _MAX_CHUNKS:
    raise ReadError(path, "too_large", f"its voxels lie in {wanted:,} pieces")
  if not stored:
    raise ReadError(path, "no_pixel_data", f"no piece of {found.path or 'the array'}")
  if wanted > _MAX_SPARSE * stored:
    raise ReadError(
        path, "truncated", f"{stored:,} of the {wanted:,} pieces claimed are there"
    )
  contents = _fetch(mine, options.max_bytes)
  array = apart.call(
      _decode, path, list(mine), found.path, found.shape, found.dtype.itemsize,
      *contents, source=path, timeout_s=options.timeout_s,
  )
  meta = {
      "format": "Zarr", "key": found.path, "axes": axes, "axes_source": origin,
      "stored_type": str(found.dtype),
  }
  if stored < wanted:  # The format leaves out what holds nothing but its fill value.
    meta["pieces_absent"] = f"{wanted - stored} of {wanted}"
  return to_record(arrange(array, axes, path), found.spacing, path, options, meta=meta)


class _Folder:
  """The files of a Zarr folder by their path in it, and their metadata."""

  def __init__(self, path: str, files: dict[str, str]):
    self.path, self.files = path, files
    self._read: dict[str, dict[str, Any]] = {}

  def meta(self, where: str) -> dict[str, Any]:
    """Returns the node's metadata with its `attributes`; {} where there is no node."""
    if where not in self._read:
      prefix = where + "/" if where else ""
      found: dict[str, Any] = {}
      for name in ("zarr.json", ".zarray", ".zgroup", ".zattrs"):
        if prefix + name in self.files:
          part = json.loads(
              storage.read_bytes(self.files[prefix + name], max_bytes=_META_BYTES)
          )
          found |= {"attributes": part} if name == ".zattrs" else part
      self._read[where] = found
    return self._read[where]

  def nodes(self) -> list[str]:
    """Returns where arrays and groups lie."""
    return sorted({
        k.rpartition("/")[0] for k in self.files if k.rpartition("/")[2] in _META
    })

  def below(self, where: str) -> dict[str, str]:
    """Returns the files of one array."""
    prefix = where + "/" if where else ""
    return {k: v for k, v in self.files.items() if k.startswith(prefix)}


def _find(folder: _Folder, key: str | None) -> _Array:
  where = _safe(key or "", folder)
  if not folder.meta(where):
    raise _several(folder, f"no {key!r}")
  if "shape" in folder.meta(where):
    return _level(folder, where)
  images = _images(folder, where)
  if not images and key is None:
    images = [
        i for n in folder.nodes() if "labels" not in n.split("/")
        for i in _images(folder, n)
    ]
  if len(images) == 1:
    return _image(folder, *images[0], level=0)
  if images:
    raise _several(folder, f"{len(images)} images")
  below = f"{where}/" if where else ""
  arrays = [
      n for n in folder.nodes() if n.startswith(below)
      and 3 <= len(folder.meta(n).get("shape", ())) <= 5
  ]
  if len(arrays) == 1:
    return _array(folder, arrays[0])
  raise _several(folder, f"{len(arrays)} arrays of 3 to 5 axes")


def _several(folder: _Folder, detail: str) -> ReadError:
  found = ", ".join(
      f"{n} {folder.meta(n).get('shape', 'group')}" for n in folder.nodes()[:12]
  )
  return ReadError(
      folder.path, "several_series", f"{detail}; it holds {found}",
      "choose the array by its path in the folder, such as key=\"0\"",
  )


def _safe(path: str, folder: _Folder) -> str:
  parts = [p for p in path.split("/") if p]
  if any(p in (".", "..") for p in parts):
    raise ReadError(folder.path, "path_escape", f"path {path!r} in the folder")
  return "/".join(parts)


def _images(folder: _Folder, where: str) -> list[tuple[str, dict[str, Any]]]:
  """Returns the OME-NGFF images that a group describes."""
  attributes = folder.meta(where).get("attributes", {})
  attributes = attributes.get("ome", attributes)
  return [(where, image) for image in attributes.get("multiscales", ())]


def _level(folder: _Folder, where: str) -> _Array:
  """Returns an array, as the level of an image where a group around it says so."""
  parts = where.split("/")
  for at in range(len(parts)):
    group = "/".join(parts[:at])
    for _, image in _images(folder, group):
      for number, level in enumerate(image["datasets"]):
        if _safe(f"{group}/{level['path']}", folder) == where:
          return _image(folder, group, image, number)
  return _array(folder, where)


def _image(folder: _Folder, where: str, image: dict[str, Any], level: int) -> _Array:
  """Returns one level of an OME-NGFF image; 0 is the finest."""
  dataset = image["datasets"][level]
  found = _array(folder, _safe(f"{where}/{dataset['path']}", folder))
  axes = image.get("axes")
  if axes is None:  # Before version 0.3 of OME-NGFF there was but one order.
    return dataclasses.replace(found, names="TCZYX")
  axes = [{"name": a} if isinstance(a, str) else a for a in axes]
  names = "".join(a["name"][:1] for a in axes).upper()
  scale = [1.0] * len(axes)
  steps = (
      *dataset.get("coordinateTransformations", ()),
      *image.get("coordinateTransformations", ()),
  )
  for step in steps:
    if step.get("type") == "scale":
      scale = [a * float(b) for a, b in zip(scale, step["scale"], strict=True)]
  units = {a["name"][:1].upper(): a.get("unit", "") for a in axes}
  lengths = dict(zip(names, scale, strict=True))
  spacing = [
      lengths.get(a, math.nan)
      * (_S if a == "T" else _MM).get(units.get(a, ""), math.nan)
      for a in "TZYX"
  ]
  return dataclasses.replace(found, names=names, spacing=tuple(spacing))


def _array(folder: _Folder, where: str) -> _Array:
  """Reads and checks the metadata of one array."""
  meta = folder.meta(where)
  if "shape" not in meta:
    raise _several(folder, f"no array at {where!r}")
  if meta.get("zarr_format") == 3:
    chunks = meta["chunk_grid"]["configuration"]["chunk_shape"]
    codecs, names = meta["codecs"], meta.get("dimension_names")
    dtype = meta["data_type"]
  else:
    chunks, dtype = meta["chunks"], meta["dtype"]
    codecs = [*(meta.get("filters") or ()), *filter(None, [meta.get("compressor")])]
    names = meta.get("attributes", {}).get("_ARRAY_DIMENSIONS")
  _check_codecs(codecs, folder.path)
  try:
    kind = np.dtype(dtype)
  except TypeError:
    kind = np.dtype(object)
  if kind.kind not in "biuf":
    raise ReadError(folder.path, "unsupported_pixels", f"array of {str(dtype)[:60]}")
  shape, chunks = (tuple(int(n) for n in v) for v in (meta["shape"], chunks))
  if len(shape) != len(chunks) or any(n < 1 for n in chunks):
    raise ReadError(folder.path, "bad_header", f"shape {shape} in pieces of {chunks}")
  letters = "".join(str(n)[:1] for n in names or ()).upper()
  known = len(letters) == len(shape) and not set(letters) - set("TZYXC")
  return _Array(where, shape, chunks, kind, letters if known else "")


def _check_codecs(codecs: Sequence[dict[str, Any]], source: str) -> None:
  for codec in codecs:
    name = str(codec.get("id", codec.get("name", "")))
    if name.removeprefix("numcodecs.") not in _CODECS:
      raise ReadError(
          source, "no_decoder", f"Zarr codec {name[:60]!r}",
          "store it again with blosc, zstd or gzip",
      )
    inner = codec.get("configuration") or {}
    for part in ("codecs", "index_codecs"):
      _check_codecs(inner.get(part, ()), source)


def _axes(found: _Array, source: str, options: ReadOptions) -> tuple[str, str]:
  for letters, origin in (
      (options.axes or "", "stated"), (found.names, "file"),
      (DEFAULT_AXES.get(len(found.shape), ""), "default"),
  ):
    if letters and len(letters) == len(found.shape) and not set(letters) - set("TZYXC"):
      return letters, origin
    if letters:
      raise ReadError(
          source, "ambiguous_axes",
          f"axes {letters!r} ({origin}) for an array of shape {found.shape}",
      )
  raise ReadError(source, "ambiguous_axes", f"array of shape {found.shape}")


def _fetch(files: dict[str, str], max_bytes: int) -> list[bytes]:
  """Fetches whole objects, several at a time, in the order of the files."""
  left = max_bytes
  contents: list[bytes] = []
  with futures.ThreadPoolExecutor(_FETCHES) as pool:
    paths = list(files.values())
    for start in range(0, len(paths), 8 * _FETCHES):
      some = paths[start:start + 8 * _FETCHES]
      fetch = functools.partial(storage.read_bytes, max_bytes=max(left, 1))
      for content in pool.map(fetch, some):
        left -= len(content)
        contents.append(content)
        if left < 0:
          raise ReadError(
              some[0], "too_large",
              f"the array's objects hold more than {max_bytes:,} bytes",
          )
  return contents


def _decode(
    source: str, keys: list[str], where: str, shape: tuple[int, ...], itemsize: int,
    *contents: bytes,
) -> np.ndarray:
  try:
    import zarr
    from zarr.core.buffer import cpu
    from zarr.storage import MemoryStore
  except ImportError as error:
    raise missing_extra(source, "zarr", error) from error
  # Each of its threads takes 100 MB of addresses, of which it uses little.
  apart.allow(4 * math.prod(shape) * itemsize + (1 << 28))
  with border(source, "decode_failed"):
    stored = {
        k: cpu.Buffer.from_bytes(bytes(v)) for k, v in zip(keys, contents, strict=True)
    }
    with zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1}):
      array = zarr.open_array(MemoryStore(stored), path=where, mode="r")
      voxels = np.asarray(array[...])
  if voxels.shape != tuple(shape):
    raise ReadError(
        source, "frames_mismatch", f"decodes to {voxels.shape}, not {shape}"
    )
  return voxels
