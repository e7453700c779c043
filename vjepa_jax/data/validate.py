"""A manifest held against what is there: objects, sizes, checksums, readability."""

import collections
from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import os
import posixpath
import random
from typing import Any

import google_crc32c

from vjepa_jax.data import readers, storage
from vjepa_jax.data import scan as scan_lib
from vjepa_jax.data.manifest import Row, count, read_manifest
from vjepa_jax.data.record import DataError, ReadError


def validate(
    manifest: str,
    *,
    root: str | None = None,
    sample: int | None = None,
    read: bool = False,
    threads: int = 16,
    seed: int = 0,
    reader: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **table: Any,
) -> dict[str, Any]:
  """Compares a manifest with the files or objects that it names.

  One listing tells what is there; local checksums are computed, a bucket states its
  own. Nothing is changed.

  Args:
    manifest: as of `manifest.read_manifest`.
    root: what its filepath is joined to.
    sample: check the content of only so many rows, drawn by `seed`; None: of all.
    read: whether to read the voxels of those rows.
    threads: that check side by side.
    seed: of the sample.
    reader: fields of `readers.ReadOptions`, for reading.
    progress: called with (rows done, rows in all).
    **table: further arguments of `manifest.read_manifest`, such as filters.

  Returns:
    Ready for JSON: manifest, folder, rows, lost {reason: n}; paths of missing,
    unlisted (there, and in no row), size_differs, checksum_differs; how many sizes,
    checksums and rows were checked; unreadable {reason: paths}; device {name: n},
    unreadable_device {name: n}; `sound`, whether nothing but unlisted files was found.

  Raises:
    DataError: if the manifest cannot be used, or the bucket cannot be reached.
    ReadError: if the manifest cannot be fetched or the folder cannot be listed.
  """
  found = read_manifest(manifest, root=root, **table)
  if not found.rows:
    raise DataError(f"{manifest}: no row is left; lost {dict(found.lost) or 'none'}")
  folder = _common_folder([row.path for row in found.rows])
  entries = {entry.path: entry for entry in storage.list_entries(folder)}
  below = collections.Counter()
  for entry in entries.values():
    below.update({parent: entry.size for parent in scan_lib.parents(entry.path)})
  known = {*entries, *below}
  there = [row for row in found.rows if row.path in known]
  missing = [row.id for row in found.rows if row.path not in known]
  chosen = there
  if sample is not None and sample < len(there):
    drawn = sorted(random.Random(seed).sample(range(len(there)), sample))
    chosen = [there[n] for n in drawn]
  sizes = _wrong_sizes(there, entries, below)
  outcomes = _check_content(
      chosen, entries, read, dict(reader or {}), threads, progress
  )
  unreadable: dict[str, list[str]] = {}
  for row, reason in outcomes["unreadable"]:
    unreadable.setdefault(reason, []).append(row.id)
  report = {
      "manifest": manifest, "folder": folder, "rows": len(found.rows),
      "lost": {k: n for k, n in found.lost.items() if n},
      "missing": missing,
      "unlisted": _unlisted(found.rows, entries, manifest),
      "size_differs": sizes,
      "sizes_checked": sum(r.size is not None and not r.series for r in there),
      "checksum_differs": outcomes["checksum_differs"],
      "checksums_checked": outcomes["checksums_checked"],
      "read": len(chosen) if read else 0, "unreadable": unreadable,
      "device": count(found.rows, "device"),
      "unreadable_device": count([row for row, _ in outcomes["unreadable"]], "device"),
  }
  faults = ("missing", "size_differs", "checksum_differs", "unreadable")
  return {**report, "sound": not any(report[name] for name in faults)}


def _common_folder(paths: Sequence[str]) -> str:
  if storage.is_remote(paths[0]):
    buckets = [path.removeprefix("gs://") for path in paths]
    if any(not storage.is_remote(path) for path in paths):
      raise DataError("a manifest of local files and objects cannot be listed at once")
    return "gs://" + posixpath.commonpath(map(posixpath.dirname, buckets))
  return os.path.commonpath([os.path.dirname(path) or "." for path in paths])


def _wrong_sizes(
    rows: Sequence[Row], entries: Mapping[str, storage.Entry], below: Mapping[str, int]
) -> list[str]:
  wrong = []
  for row in rows:
    # Of one series among several in a folder no listing tells the size.
    if row.size is None or row.series:
      continue
    size = entries[row.path].size if row.path in entries else below[row.path]
    if size != row.size:
      wrong.append(row.id)
  return wrong


def _check_content(
    rows: Sequence[Row],
    entries: Mapping[str, storage.Entry],
    read: bool,
    options: Mapping[str, Any],
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
  def check(row: Row) -> tuple[bool | None, str | None]:
    same = None
    try:
      same = _same_checksum(row, entries.get(row.path))
      if read:
        readers.read(row.path, **{**options, **row.read_options()})
    except ReadError as error:
      if error.reason == "unreachable":
        raise DataError(
            f"{error}. Nothing is known of the rest; run it again"
        ) from error
      return same, error.reason
    return same, None

  differs, checked, unreadable = [], 0, []
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for done, (row, (same, reason)) in enumerate(zip(rows, pool.map(check, rows)), 1):
      checked += same is not None
      if same is False:
        differs.append(row.id)
      if reason:
        unreadable.append((row, reason))
      if progress:
        progress(done, len(rows))
  return {
      "checksum_differs": differs, "checksums_checked": checked,
      "unreadable": unreadable,
  }


def _same_checksum(row: Row, entry: storage.Entry | None) -> bool | None:
  """Compares a row's checksum; None where one of the two is not known."""
  kind, _, wanted = row.checksum.lower().partition(":")
  if not wanted or entry is None or kind not in ("md5", "crc32c"):
    return None
  if storage.is_remote(row.path):
    stated = scan_lib.checksum_of(entry, kind)
    return stated == f"{kind}:{wanted}" if stated else None
  if kind == "md5":
    return scan_lib.md5_of(row.path) == f"md5:{wanted}"
  with open(row.path, "rb") as file:
    total = google_crc32c.Checksum()
    for _ in total.consume(file, 1 << 20):
      pass
  return total.digest().hex() == wanted


def _unlisted(
    rows: Sequence[Row], entries: Mapping[str, storage.Entry], manifest: str
) -> list[str]:
  """Returns what may be a recording, and is in no row or below one's folder."""
  named = {row.path for row in rows}
  return [
      path for path in entries
      if path not in named and path != manifest and scan_lib.is_recording(path)
      and not named.intersection(scan_lib.parents(path))
  ]
