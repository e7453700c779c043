"""A manifest made from a folder, local or in a bucket: one listing, one head a file.

What a name cannot tell is taken from headers where the format has them at its
beginning; pixels are not read. Files that no reader takes are listed beside, with the
reason.
"""

import base64
import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import concurrent.futures
import csv
import hashlib
import io
import math
import os
import posixpath
import re
from typing import Any
import zlib

import numpy as np

from vjepa_jax.data import readers, storage
from vjepa_jax.data.manifest import DEVICES, Manifest, device_of, read_manifest
from vjepa_jax.data.readers import dicom_geometry, dicom_header
from vjepa_jax.data.record import DataError, ReadError

COLUMNS = (
    "participant_id", "filepath", "device", "laterality", "modality",
    "anatomic_region", "number_of_frames", "shape", "spacing", "series_instance_uid",
    "sop_instance_uid", "format", "size", "checksum",
)
# What lies beside recordings and is none.
BESIDE = (
    ".txt", ".csv", ".tsv", ".json", ".xml", ".md", ".log", ".ini", ".yaml", ".yml",
    ".db", ".pdf", ".html", ".bval", ".bvec", ".png", ".jpg", ".jpeg",
)
_FORMATS = {
    "dicom": "dicom", "nifti": "nifti", "tiff": "tiff", "hdf5": "hdf5",
    "arrays": "numpy", "archives": "zip", "movies": "movie", "oct_vendor": "oct_vendor",
}
_ZARR = (".zarray", ".zgroup", ".zmetadata", "zarr.json")
_HEAD_BYTES = 1 << 16
_MAX_HEAD_BYTES = 1 << 26
# One digit is enough in `images` alone: elsewhere _t1 and _t2 may be weightings.
_TIME_POINT = re.compile(
    r"(.+?)(?:/images/([^/]*)_t\d+|/([^/]*)_t\d\d+)(?:\.ome)?\.(?:tiff?|btf)",
    re.IGNORECASE,
)
_PARTICIPANT = r"(?:^|/)sub-([^/_]+)"
# A file's header may say it in words for people; these are for tables.
_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")


def scan(
    folder: str,
    *,
    output: str,
    patterns: Mapping[str, str] | None = None,
    threads: int = 16,
    checksums: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
  """Writes the manifest of all recordings below a folder.

  A folder of DICOM slices of one series is one row, and so are a Zarr array and the
  time points of an embryo (NAME/images/*_tNNN.tif or NAME/*_tNNN.tif, all of one
  beginning); a DICOM series among others is named by series_instance_uid. `filepath`
  is such that the manifest can be read without a root. `OUTPUT.unreadable.tsv` (for
  output OUTPUT.tsv) lists what no reader takes, with the reason, and TIFFs that lie
  beside an embryo's `images`.

  Args:
    folder: local or `gs://`.
    output: TSV to write, local or `gs://`.
    patterns: {column: regular expression}; what its first group finds in the path
      below the folder wins over a header. participant_id is `sub-NAME` by default.
    threads: headers read side by side, one request each.
    checksums: whether to read local files whole for their MD5; a bucket states it.
    progress: called with (files done, files in all).

  Returns:
    The manifest as read back; rows without a participant are in `lost`.

  Raises:
    DataError: if there is no recording, or a pattern is no regular expression.
    ReadError: if the folder cannot be listed, or the output not written.
  """
  rules = _rules(patterns or {})
  beside = f"{output.removesuffix('.tsv')}.unreadable.tsv"
  entries = [e for e in storage.list_entries(folder) if e.path not in (output, beside)]
  loose, rows = _group_zarr([e for e in entries if is_recording(e.path)])
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    found = []
    for done, cells in enumerate(pool.map(_describe, loose), 1):
      found.append(cells)
      if progress:
        progress(done, len(loose))
    bad = [cells for cells in found if "reason" in cells]
    sound = [cells for cells in found if "reason" not in cells]
    grouped, aside = _group_movies(_group_series(sound))
    rows, bad = rows + grouped, bad + aside
    if checksums and not storage.is_remote(folder):
      sums = pool.map(md5_of, [cells["filepath"] for cells in rows])
      rows = [{**cells, "checksum": c} for cells, c in zip(rows, sums, strict=True)]
  if not rows:
    raise DataError(
        f"{folder}: no recording among {len(entries)} files; {_reasons(bad)}"
    )
  for cells in rows:
    below = cells["filepath"][len(folder.rstrip("/")) + 1:]
    for column, rule in rules.items():
      if (match := rule.search(below)) and (match[1] or not cells.get(column)):
        cells[column] = match[1]
    cells["filepath"] = _relative(cells["filepath"], output)
  rows.sort(key=lambda cells: (cells["filepath"], cells.get("series_instance_uid", "")))
  columns = [*COLUMNS, *(c for c in rules if c not in COLUMNS)]
  storage.make_folder(storage.parent(output))
  _write(output, columns, rows)
  _write(beside, ("path", "reason", "detail"), bad)
  return read_manifest(output)


def is_recording(path: str) -> bool:
  """Says whether a name may be a recording's: not hidden, no note or picture beside."""
  name = posixpath.basename(path)
  if name in _ZARR:
    return True
  hidden = name.startswith(".") or "/__MACOSX/" in path or name.upper() == "DICOMDIR"
  return not hidden and not name.lower().endswith(BESIDE)


def md5_of(path: str) -> str:
  """Returns "md5:..." of a local file, "" of a folder."""
  if os.path.isdir(path):
    return ""
  with open(path, "rb") as file:
    return f"md5:{hashlib.file_digest(file, 'md5').hexdigest()}"


def checksum_of(entry: storage.Entry, *kinds: str) -> str:
  """Returns the first of these checksums that a bucket states, as in a manifest.

  Args:
    entry: of a listing.
    *kinds: "md5", "crc32c"; by default both, in this order.
  """
  for kind in kinds or ("md5", "crc32c"):
    if stated := getattr(entry, kind):
      return f"{kind}:{base64.b64decode(stated).hex()}"
  return ""


def _rules(patterns: Mapping[str, str]) -> dict[str, re.Pattern]:
  rules = {}
  for column, text in {"participant_id": _PARTICIPANT, **patterns}.items():
    try:
      rules[column] = re.compile(text)
    except re.error as error:
      raise DataError(f"pattern {column}={text!r}: {error}") from error
    if rules[column].groups < 1:
      raise DataError(f"pattern {column}={text!r}: needs a group, such as ([^/]+)")
  return rules


def _group_zarr(
    entries: Sequence[storage.Entry],
) -> tuple[list[storage.Entry], list[dict[str, Any]]]:
  """Takes the files of each Zarr group or array together as one row."""
  tops: list[str] = []
  marks = (e.path for e in entries if storage.basename(e.path) in _ZARR)
  marked = set(map(storage.parent, marks))
  for folder in sorted(marked):
    if not tops or not folder.startswith(tops[-1] + "/"):
      tops.append(folder)
  sizes = dict.fromkeys(tops, 0)
  loose = []
  for entry in entries:
    home = next((t for t in parents(entry.path) if t in sizes), None)
    if home is None:
      loose.append(entry)
    else:
      sizes[home] += entry.size
  return loose, [
      {"filepath": top, "format": "zarr", "size": size} for top, size in sizes.items()
  ]


def parents(path: str) -> Iterable[str]:
  """Yields the folders that a path lies in, the nearest first."""
  while "/" in path.removeprefix("gs://"):
    path = storage.parent(path)
    if path in ("/", ".", ""):
      return
    yield path


def _describe(entry: storage.Entry) -> dict[str, Any]:
  """Returns the cells of one file, or why no reader takes it."""
  cells = {
      "filepath": entry.path, "size": entry.size, "checksum": checksum_of(entry)
  }
  try:
    return cells | _head_facts(entry)
  except ReadError as error:
    if error.reason == "unreachable":
      raise
    detail = " ".join(error.detail.split())
    return {"path": entry.path, "reason": error.reason, "detail": detail}
  except Exception as error:  # pydicom raises many kinds, when a value is asked for.
    detail = " ".join(f"{type(error).__name__}: {error}".split())
    return {"path": entry.path, "reason": "bad_header", "detail": detail}


def _head_facts(entry: storage.Entry) -> dict[str, Any]:
  if not entry.size:
    raise ReadError(entry.path, "empty_file", "0 bytes")
  head = storage.read_bytes(entry.path, start=0, stop=_HEAD_BYTES)
  kind = next(
      (
          name for module in readers.FORMATS
          if (name := module.__name__.rpartition(".")[2]) in _FORMATS
          and module.matches(head[: readers.HEAD_BYTES], entry.path)
      ), None,
  )
  if kind is None:
    named = entry.path.lower().endswith((".dcm", ".dicom"))
    raise ReadError(
        entry.path, "not_dicom" if named else "unsupported_format",
        f"starts with {head[:8]!r}",
    )
  facts = {"dicom": _dicom_facts, "nifti": _nifti_facts, "arrays": _array_facts}
  found = facts[kind](entry, head) if kind in facts else {}
  return {"format": _FORMATS[kind], **found}


def _dicom_facts(entry: storage.Entry, head: bytes) -> dict[str, Any]:
  while True:
    try:
      parsed = dicom_header.parse(head, entry.path)
      break
    except ReadError as error:
      # Headers with a group for each frame may be long.
      if len(head) >= min(entry.size, _MAX_HEAD_BYTES) or error.reason != "truncated":
        raise
    head = storage.read_bytes(entry.path, start=0, stop=16 * len(head))
  header = parsed.header
  rows, columns = header.get("Rows"), header.get("Columns")
  if not rows or not columns or parsed.pixels is None:
    raise ReadError(
        entry.path, "no_pixel_data", f"SOP class {header.get('SOPClassUID', '')}"
    )
  frames = int(header.get("NumberOfFrames", 1) or 1)
  spacing, _ = dicom_geometry.spacing(header, None)
  region = header.item("AnatomicRegionSequence")
  device = device_of(entry.path)
  maker = f"{header.get('Manufacturer', '')} {header.get('ManufacturerModelName', '')}"
  if device not in DEVICES:
    device = _NOT_IN_NAMES.sub("_", maker.lower()).strip("_")
  return {
      "participant_id": str(header.get("PatientID", "")).strip(),
      "device": device,
      "laterality": str(
          header.get("ImageLaterality", "") or header.get("Laterality", "")
      ),
      "modality": str(header.get("Modality", "")),
      "anatomic_region": str(
          (region.get("CodeMeaning", "") if region else "")
          or header.get("BodyPartExamined", "")
      ),
      "number_of_frames": frames, "shape": f"{frames}x{rows}x{columns}",
      "spacing": _spacing_text(spacing),
      "sop_instance_uid": str(header.get("SOPInstanceUID", "")),
      "_series": str(header.get("SeriesInstanceUID", "")),
  }


def _nifti_facts(entry: storage.Entry, head: bytes) -> dict[str, Any]:
  try:
    import nibabel
  except ImportError:
    return {}
  if head[:2] == b"\x1f\x8b":
    try:
      head = zlib.decompressobj(31).decompress(head, 1024)
    except zlib.error as error:
      raise ReadError(entry.path, "decode_failed", f"gzip: {error}") from error
  kind = nibabel.Nifti1Header
  if 540 in (int.from_bytes(head[:4], order) for order in ("little", "big")):
    kind = nibabel.Nifti2Header
  try:
    fields = kind.from_fileobj(io.BytesIO(head), check=False)
    shape, zooms = fields.get_data_shape(), fields.get_zooms()
  except Exception as error:  # nibabel raises many kinds on damaged headers.
    raise ReadError(entry.path, "bad_header", f"{error}") from error
  unit = {"meter": 1e3, "micron": 1e-3}.get(fields.get_xyzt_units()[0], 1.0)
  spacing = [float(zoom) * unit for zoom in zooms[:3][::-1]]
  return {
      "shape": "x".join(map(str, shape[::-1])),
      "spacing": _spacing_text(spacing) if len(spacing) == 3 else "",
  }


def _array_facts(entry: storage.Entry, head: bytes) -> dict[str, Any]:
  if head[:6] != b"\x93NUMPY":
    return {}
  file = io.BytesIO(head)
  try:
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0 if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, _ = read(file)
  except ValueError as error:
    raise ReadError(entry.path, "bad_header", f"{error}") from error
  return {"shape": "x".join(map(str, shape))}


def _group_series(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Takes single-frame DICOM files of one folder and one series together."""
  groups: dict[tuple[str, str], list[dict[str, Any]]] = collections.defaultdict(list)
  rows = []
  for cells in found:
    series = cells.pop("_series", "")
    if series and cells["number_of_frames"] == 1:
      groups[storage.parent(cells["filepath"]), series].append(cells)
    else:
      rows.append(cells)
  homes = collections.Counter()
  for cells in found:
    if cells["format"] == "dicom":
      homes.update(parents(cells["filepath"]))
  for (folder, series), slices in groups.items():
    if len(slices) == 1:
      rows += slices
      continue
    # A folder is read with all below it: other files there make the series ambiguous.
    alone = homes[folder] == len(slices)
    first, last = slices[0], slices[0]["shape"].partition("x")[2]
    rows.append({
        **first, "filepath": folder, "format": "dicom_series",
        "number_of_frames": len(slices), "shape": f"{len(slices)}x{last}",
        "size": sum(cells["size"] for cells in slices), "checksum": "",
        "sop_instance_uid": "", "series_instance_uid": "" if alone else series,
    })
  return rows


def _group_movies(
    rows: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Takes NAME/images/*_tNNN.tif, as NIH-LS has them, or NAME/*_tNNN.tif together.

  Returns:
    The rows with movies in them, and what lies beside a movie's `images`.
  """
  # {(folder of the movie, folder of its files): {path: how its name begins}}
  folders: dict[tuple[str, str], dict[str, str]] = collections.defaultdict(dict)
  for cells in rows:
    path = cells["filepath"]
    if cells["format"] == "tiff" and (found := _TIME_POINT.fullmatch(path)):
      folders[found[1], storage.parent(path)][path] = found[2] or found[3] or ""
  movies = {
      of: names for of, names in folders.items()
      if len(names) > 1 and len(set(names.values())) == 1
  }
  with_images = {home for home, folder in movies if home != folder}
  movies = {
      (home, folder): names for (home, folder), names in movies.items()
      if home != folder or with_images.isdisjoint([home, *parents(home)])
  }
  grouped = {path for names in movies.values() for path in names}
  kept, beside = [], []
  for cells in rows:
    path = cells["filepath"]
    if path in grouped:
      continue
    within = cells["format"] == "tiff" and with_images.intersection(parents(path))
    if within and storage.basename(storage.parent(path)) != "images":
      detail = f"the time points of {min(within)} are in its folder images"
      beside.append({"path": path, "reason": "beside_images", "detail": detail})
    else:
      kept.append(cells)
  for (home, _), names in movies.items():
    kept.append({
        "participant_id": storage.basename(home), "filepath": home,
        "format": "tiff_movie", "number_of_frames": len(names),
        # Of all in the folder no listing tells, and tracks come and go.
        "size": "", "checksum": "",
    })
  return kept, beside


def _spacing_text(spacing: Sequence[float]) -> str:
  if all(math.isnan(v) for v in spacing):
    return ""
  return "[" + ", ".join("nan" if math.isnan(v) else f"{v:.6g}" for v in spacing) + "]"


def _relative(path: str, output: str) -> str:
  """Returns a path as a manifest at `output` names it without a root."""
  home = storage.parent(output)
  if path.startswith(home.rstrip("/") + "/"):
    return path[len(home.rstrip("/")) + 1:]
  if storage.is_remote(path):
    return path
  if storage.is_remote(output):
    raise DataError(
        f"{output}: a manifest in a bucket cannot name the local file {path}; write it "
        "beside the files"
    )
  return os.path.relpath(path, home)


def _write(path: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]):
  text = io.StringIO()
  writer = csv.DictWriter(
      text, columns, restval="", delimiter="\t", lineterminator="\n",
      extrasaction="ignore",
  )
  writer.writeheader()
  writer.writerows(rows)
  storage.write_bytes(path, text.getvalue().encode())


def _reasons(bad: Sequence[Mapping[str, str]]) -> str:
  counts = collections.Counter(cells["reason"] for cells in bad)
  return ", ".join(f"{n} {reason}" for reason, n in counts.most_common()) or "none read"
