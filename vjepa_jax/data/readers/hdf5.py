"""Arrays in HDF5 files, MATLAB's .mat of version 7.3 among them.

Axes are those stated in `axes`; else the file's (an attribute `axes`, the labels of
its dimensions, ilastik's `axistags`); else [Z, Y, X] or [T, Z, Y, X, C], and for
MATLAB, which stores the first axis last, [Y, X, Z] or [Y, X, Z, T].
Nothing outside the file is followed: no external link, storage or virtual source.
"""

import contextlib
import io
import json
import math
from typing import Any

import numpy as np

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

_MARK = b"\x89HDF\r\n\x1a\n"
_MATLAB_AXES = {3: "ZXY", 4: "TZXY"}
_MAX_OBJECTS = 100_000
_MAX_LINKS = 16


def matches(head: bytes, path: str) -> bool:
  """Says whether a content begins as an HDF5 file, after a user block perhaps."""
  del path
  return _MARK in (head[:8], head[512:520])


def read(data: bytes, source: str, options: ReadOptions) -> Record:
  """Reads one array: `options.key`, else the only one of three to five axes.

  `element_size_um`, an attribute of the array, is its (dz, dy, dx) in micrometres.

  Raises:
    ReadError: several_series, no_pixel_data, path_escape, ambiguous_axes,
      unsupported_pixels, no_decoder, bad_header, decode_failed, truncated, too_large,
      missing_extra, timed_out, decoder_died.
  """
  return apart.call(
      _read, data, source, options, source=source, timeout_s=options.timeout_s
  )


def _read(data: bytes, source: str, options: ReadOptions) -> Record:
  try:
    import h5py
  except ImportError as error:
    raise missing_extra(source, "formats", error) from error
  matlab = bytes(data[:10]) == b"MATLAB 7.3"
  with contextlib.ExitStack() as stack:
    with border(source, "bad_header"):
      file = stack.enter_context(h5py.File(io.BytesIO(data), "r"))
      if "minc-2.0" in file:
        raise ReadError(
            source, "unsupported_format", "MINC 2 stores its values scaled by slice",
            "convert it to NIfTI (mnc2nii)",
        )
      dataset = _choose(file, source, options.key, matlab)
      _check(dataset, source, options, len(data))
      axes, origin = _axes(dataset, source, options, matlab)
      spacing = _spacing(dataset)
    apart.allow(3 * dataset.size * dataset.dtype.itemsize)
    with border(source, "decode_failed"):
      array = dataset[()]
    name = dataset.name
  return to_record(
      arrange(array, axes, source), spacing, source, options, meta={
          "format": "MATLAB 7.3" if matlab else "HDF5", "key": name, "axes": axes,
          "axes_source": origin, "stored_type": str(array.dtype),
      },
  )


def _choose(file: Any, source: str, key: str | None, matlab: bool) -> Any:
  import h5py

  if key is not None:
    found = _follow(file, key, source)
    if not isinstance(found, h5py.Dataset):
      raise ReadError(source, "several_series", f"{key!r} is a group", _remedy())
    return found
  arrays, others = [], 0

  def visit(name: str, item: Any) -> bool | None:
    nonlocal others
    others += 1
    if others > _MAX_OBJECTS:
      return True
    if isinstance(item, h5py.Dataset) and _is_image(name, item, matlab):
      arrays.append(item)
    return None

  file.visititems(visit)  # Each object once; no soft and no external link.
  if len(arrays) == 1:
    return arrays[0]
  if arrays:
    names = ", ".join(f"{a.name} {a.dtype} {a.shape}" for a in arrays[:8])
    raise ReadError(
        source, "several_series", f"{len(arrays)} arrays: {names}", _remedy()
    )
  raise ReadError(
      source, "no_pixel_data", f"no array of 3 to 5 axes among {others} objects",
      _remedy(),
  )


def _remedy() -> str:
  return "choose the array by its path in the file, such as key=\"raw\""


def _is_image(name: str, item: Any, matlab: bool) -> bool:
  if item.dtype.kind not in "biuf" or not 3 <= len(item.shape or ()) <= 5:
    return False
  if item.is_scale or name.startswith(("#refs#", "#subsystem#")):
    return False
  return not (matlab and bytes(item.attrs.get("MATLAB_class", b"")) == b"char")


def _follow(file: Any, key: str, source: str) -> Any:
  """Opens an object by its path, link by link, and never leaves the file."""
  import h5py

  group, left, links = file, [p for p in key.split("/") if p], 0
  while left:
    name, left = left[0], left[1:]
    link = group.get(name, getlink=True) if isinstance(group, h5py.Group) else None
    if link is None:
      near = ", ".join(list(group)[:8]) if isinstance(group, h5py.Group) else "no group"
      raise ReadError(
          source, "several_series", f"no {key!r}; {group.name} holds {near}", _remedy()
      )
    if isinstance(link, h5py.ExternalLink):
      raise _escape(source, f"{key!r} leads to the file {link.filename!r}")
    if isinstance(link, h5py.SoftLink):
      links += 1
      if links > _MAX_LINKS:
        raise ReadError(source, "bad_header", f"{key!r} is a circle of links")
      group = file if link.path.startswith("/") else group
      left = [p for p in link.path.split("/") if p] + left
      continue
    group = group[name]
  return group


def _escape(source: str, detail: str) -> ReadError:
  return ReadError(
      source, "path_escape", detail, "copy the array itself into one file",
  )


def _check(dataset: Any, source: str, options: ReadOptions, size: int) -> None:
  """Refuses claims and storage that cannot be read safely and wholly."""
  import h5py

  if dataset.external:
    raise _escape(source, f"its voxels lie in {dataset.external[0][0]!r}")
  if dataset.is_virtual:
    raise _escape(source, f"{dataset.name} is put together from other arrays")
  if dataset.dtype.kind not in "biuf":
    raise ReadError(source, "unsupported_pixels", f"array of {dataset.dtype}")
  check_voxels(dataset.shape or (), source, options.max_voxels)
  filters = dataset.id.get_create_plist()
  for i in range(filters.get_nfilters()):
    code, _, _, name = filters.get_filter(i)
    if not h5py.h5z.filter_avail(code):
      raise ReadError(
          source, "no_decoder", f"HDF5 filter {code} {name.decode('utf8', 'replace')}",
          "store it again with gzip",
      )
  stored = dataset.id.get_storage_size()
  if stored == 0:
    raise ReadError(source, "no_pixel_data", f"{dataset.name} was never written")
  if dataset.chunks:
    check_voxels(dataset.chunks, source, max(options.max_voxels, 1 << 24))
    wanted = math.prod(
        -(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)
    )
    held = dataset.id.get_num_chunks()
    if held < wanted:
      raise ReadError(
          source, "truncated",
          f"{held} of {wanted} pieces of {dataset.name} were written",
      )
  elif not filters.get_nfilters() and stored < dataset.size * dataset.dtype.itemsize:
    raise ReadError(source, "truncated", f"{stored:,} bytes for {dataset.shape}")
  if stored > size:
    raise ReadError(
        source, "truncated", f"{stored:,} bytes stored in a file of {size:,}"
    )


def _axes(
    dataset: Any, source: str, options: ReadOptions, matlab: bool
) -> tuple[str, str]:
  """Returns one letter an axis and who says so."""
  rank = len(dataset.shape)
  default = (_MATLAB_AXES if matlab else DEFAULT_AXES).get(rank, "")
  for letters, origin in (
      (options.axes or "", "stated"), (_labels(dataset), "file"), (default, "default"),
  ):
    if not letters:
      continue
    if len(letters) == rank and not set(letters) - set("TZYXC"):
      return letters, origin
    raise ReadError(
        source, "ambiguous_axes",
        f"axes {letters!r} ({origin}) for an array of shape {dataset.shape}",
    )
  raise ReadError(source, "ambiguous_axes", f"array of shape {dataset.shape}")


def _labels(dataset: Any) -> str:
  """Returns the axes that attributes or labels name, such as "TZYX"; else ""."""
  found = dataset.attrs.get("axes")
  if found is None and "axistags" in dataset.attrs:
    tags = json.loads(_text(dataset.attrs["axistags"])).get("axes", ())
    found = [str(tag.get("key", "")) for tag in tags]
  if found is None:
    found = [dimension.label for dimension in dataset.dims]
    if not all(found):
      return ""
  if isinstance(found, str | bytes):
    return _text(found).replace(",", "").replace(" ", "").upper()
  return "".join(_text(letter)[:1] for letter in np.atleast_1d(found)).upper()


def _text(value: Any) -> str:
  return value.decode("utf8", "replace") if isinstance(value, bytes) else str(value)


def _spacing(dataset: Any) -> tuple[float, ...]:
  """Returns (dt, dz, dy, dx) in s and mm of `element_size_um`; else NaN."""
  found = np.ravel(dataset.attrs.get("element_size_um", ()))
  if found.shape != (3,) or found.dtype.kind not in "iuf":
    return (math.nan,) * 4
  return (math.nan, *(float(v) / 1000 for v in found))
