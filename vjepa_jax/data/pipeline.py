"""From manifests to splits of canvases: the tables, the files, what was lost and why.

Each file is read once, by threads or worker processes; a bad one is counted by its
reason, logged once, quarantined, and never replaced. The run stops above
`max_bad_fraction`, and above `max_lost_fraction` of rows that nobody asked to lose.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import types
from typing import Any

from vjepa_jax.data import clips as clips_lib
from vjepa_jax.data import ledger as ledger_lib
from vjepa_jax.data import manifest as manifest_lib
from vjepa_jax.data import memory, readers, shard_writing, shards, storage
from vjepa_jax.data import mixture as mixture_lib
from vjepa_jax.data import pool as pool_lib
from vjepa_jax.data import stages as stages_lib
from vjepa_jax.data.batches import (
    HostShare,
    TrainIterator,
    check_hosts,
    eval_batches,
    host_share,
    train_iterator,
)
from vjepa_jax.data.files import Files, Transform, frozen
from vjepa_jax.data.ledger import Bad, Ledger
from vjepa_jax.data.manifest import Row, check_disjoint
from vjepa_jax.data.record import DataError, ReadError, Record
from vjepa_jax.data.volumes import Batch, Mixture, Volumes

__all__ = [
    "Bad", "Batch", "Data", "HostShare", "Mixture", "SOURCE_KEYS", "Source",
    "TrainIterator", "Transform", "Volumes", "check_disjoint", "check_hosts",
    "eval_batches", "host_share", "open_data", "open_shards", "plan",
    "train_iterator",
]
# What a source of its own may say of itself; the rest is common to all.
_TABLE_KEYS = (
    "manifest", "root", "label", "participants", "columns", "filters", "exclude",
    "max_records",
)
_TRANSFORM_KEYS = tuple(
    f.name for f in dataclasses.fields(Transform) if f.name != "seed"
)
SOURCE_KEYS = (*_TABLE_KEYS, *_TRANSFORM_KEYS, "weight")
_MANY_FILES = 64


@dataclasses.dataclass(frozen=True)
class Source:
  """One table of recordings and how each becomes a canvas.

  Attributes:
    name: "" where there is one only.
    manifest: its path.
    parts: {split: rows}.
    transform: row -> canvas.
    weight: in a mixture.
    lost: rows dropped, by reason.
    unexplained: the dropped rows that nobody asked to drop, with their reason.
    total: rows of the table.
    cut: the clips of time points that are the rows; None where each row is a recording
      of its own.
  """

  name: str
  manifest: str
  parts: Mapping[str, tuple[Row, ...]]
  transform: Transform
  weight: float
  lost: Mapping[str, int]
  unexplained: tuple[tuple[Row, str], ...]
  total: int
  cut: clips_lib.Cut | None = None

  @property
  def rows(self) -> Mapping[str, Sequence[Row]]:
    """{split: what it holds}: recordings, or clips."""
    if self.cut is None:
      return self.parts
    return {name: clips for name, clips in self.cut.clips.items() if clips}

  @property
  def facts(self) -> dict[str, Any]:
    """What the report says of clips and stages."""
    if self.cut is None:
      return {}
    return {"clips": self.cut.facts, "stages": self.cut.stage_facts}

  def without(self, is_bad: Callable[[Row], bool]) -> "Source":
    """Returns the source with clips of its good time points alone."""
    if self.cut is None:
      return self
    return dataclasses.replace(self, cut=self.cut.without(is_bad))

  def read(self, row: Row, look: Callable[[Record], None] | None = None) -> Record:
    """Reads one of `rows`; `look` is shown each recording or time point as read.

    Raises:
      ReadError: where it cannot be used.
    """
    if not isinstance(row, clips_lib.Clip):
      return self.transform(row, look)
    one = types.SimpleNamespace(read=lambda frame: self.transform(frame, look))
    return clips_lib.Canvases(one).read(row)


class Data:
  """Splits of one manifest, or of several.

  Attributes:
    splits: {name: Volumes, or Mixture of several sources}.
    labels: class names, common to all splits.
    workers: processes that read; 0: threads of this one.
  """

  def __init__(
      self,
      splits: Mapping[str, Volumes | Mixture],
      labels: Sequence[str],
      ledger: Ledger,
      facts: Mapping[str, Any],
      pools: Sequence[pool_lib.Pool] = (),
  ):
    self.splits = dict(splits)
    self.labels = tuple(labels)
    self.workers = sum(pool.count for pool in pools)
    self._ledger = ledger
    self._facts = dict(facts)
    self._pools = pools

  @property
  def quarantine(self) -> list[Bad]:
    """Files found bad so far, in the order found."""
    return self._ledger.bad()

  @property
  def report(self) -> dict[str, Any]:
    """Counts of what is there and what was lost, ready for JSON."""
    rows = [row for volumes in self.splits.values() for row in volumes.rows]
    return {
        **self._facts,
        "records": len(rows),
        "participants": len({row.participant for row in rows}),
        **_counts(rows),
        "splits": {
            name: {
                "records": len(v), "participants": len({r.participant for r in v.rows}),
                **_counts(v.rows),
            }
            for name, v in self.splits.items()
        },
        **self._ledger.report(),
    }

  def worker_pids(self) -> list[int]:
    """Returns the reading processes that are alive."""
    return sorted(pid for pool in self._pools for pid in pool.pids())

  def close(self) -> None:
    """Ends the worker processes."""
    for pool in self._pools:
      pool.close()


def open_data(
    manifest: str | None = None,
    *,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    mixture: str = "concatenate",
    root: str | None = None,
    canvas: Sequence[int] = (64, 384, 384),
    resample: str = "resize",
    fov_mm: Sequence[float] = (6.0, 2.0, 6.0),
    spacing_mm: Sequence[float] = (0.05, 0.02, 0.02),
    dtype: str = "uint8",
    reader: Mapping[str, Any] | None = None,
    ops: Sequence[Mapping[str, Any]] = (),
    percentiles: Sequence[float] = (0.5, 99.8),
    clip: Mapping[str, Any] | None = None,
    stages: Mapping[str, Any] | None = None,
    splits: Mapping[str, float] | str,
    stratify: Sequence[str] = ("device", "label"),
    seed: int = 0,
    label: str | None = None,
    participants: str | None = None,
    columns: Mapping[str, str] | None = None,
    filters: Mapping[str, Sequence[str] | str] | None = None,
    exclude: Mapping[str, Sequence[str] | str] | None = None,
    max_records: int | None = None,
    train_participants: int | None = None,
    modalities: Sequence[str] | None = None,
    colour: str = "reject",
    min_size: Sequence[int] = (1, 1, 1),
    max_voxels: int = readers.MAX_VOXELS,
    require_spacing: bool = False,
    require_time_step: bool = False,
    validate: str = "read",
    max_bad_fraction: float = 0.05,
    max_lost_fraction: float = 0.05,
    cache: str = "memory",
    cache_bytes: int = 4 << 30,
    threads: int = 2,
    workers: int = 0,
    timeout_s: float = 600.0,
    quarantine: str | None = None,
    host: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> Data:
  """Opens the recordings of a manifest, or of several, as splits of canvases.

  Args:
    manifest: TSV, CSV or JSON, local or `gs://`; see `manifest.read_manifest`, also
      for root, label, participants, columns, filters and exclude.
    sources: in place of one manifest, {name: options}: a manifest each and, where it
      differs from the arguments here, any of `SOURCE_KEYS`, such as weight,
      modalities or dtype. An id of a participant means the same person in all.
    mixture: how the sources make batches: "weighted" (each row, exactly by weight),
      "alternate" (whole batches, by weight; shapes may then differ by source) or
      "concatenate" (every row of every source once an epoch).
    root: what the manifest's filepath is joined to.
    canvas: (Z, Y, X) voxels.
    resample: "resize", "fov" or "spacing"; see `ops.resample`.
    fov_mm: (Z, Y, X) mm for "fov".
    spacing_mm: (dz, dy, dx) mm for "spacing".
    dtype: "uint8" or "keep".
    reader: further fields of `readers.ReadOptions`, such as axes, time_step_s or
      manifest_spacing; a row's own columns win.
    ops: host operations after reading and before resampling, in this order: dicts of
      `name` (of `ops.OPS`) and options. Random ones draw once a recording.
    percentiles: of a movie's voxels that become the ends of the range of all of its
      time points, with `clip`.
    clip: fields of `clips.ClipOptions`: rows are then movies of embryos, and what the
      splits hold are clips of them.
    stages: fields of `stages.StageOptions`, with `clip`: clips have the stages of
      their time points, and `labels` are the classes in their order.
    splits: {name: share of participants}, or the name of a column.
    stratify: row fields to keep in proportion where splits are shares.
    seed: of the split by shares, and of random ops.
    label: column with the class.
    participants: second table, one row a participant.
    columns: {known column: its name in this manifest}.
    filters: {field: values to keep}.
    exclude: {field: values to drop}; {"participant": [...]} drops people.
    max_records: only the first rows left by the filters.
    train_participants: only so many people of the split "train", drawn by the seed,
      with `stages` among those who have a clip with a known one; other splits keep
      theirs. For curves over the number of labels.
    modalities: accepted DICOM modalities; None or (): any.
    colour: "reject" or "luminance".
    min_size: (Z, Y, X) a recording must have, such as one patch.
    max_voxels: cap on a recording, before decoding and before resampling.
    require_spacing: whether a recording of unknown dz, dy or dx is bad.
    require_time_step: whether one of unknown dt is.
    validate: "read" reads every file before the start; "lazy" finds bad files
      while training and skips them. A cache folder reads every file when filled.
    max_bad_fraction: above this share of bad files there is no run; it holds for
      all files together and for each device that has at least 20.
    max_lost_fraction: above this share of a manifest's rows lost without being asked
      for (no participant, no file, no entry in `participants`, no split) there is no
      run; filters, max_records, train_participants and rows listed twice do not
      count.
    cache: "memory" keeps canvases up to cache_bytes, "none" reads each time, a
      folder, local or `gs://`, keeps them as ArrayRecord shards for later runs.
    cache_bytes: for "memory".
    threads: that read side by side.
    workers: processes that read, beside at least as many threads that wait for them;
      0: the threads read. The order is the same.
    timeout_s: seconds that a worker may take for one file.
    quarantine: file to write bad files to, as TSV (path, reason, detail); hosts but
      the first write to a name of their own, and only what lazy reading finds.
    host: (this host, hosts).
    progress: called with (files done, files in all) while reading.

  Returns:
    The open data; `close` it where there are workers.

  Raises:
    DataError: for a manifest that cannot be used, an empty split, volumes that
      do not stack, too many lost rows or bad files (by reason, with the first path
      each), or a bucket that cannot be reached.
    ReadError: if a manifest itself cannot be fetched.
    ValueError: for an option out of range.
  """
  _check_options(
      validate=validate, cache=cache, max_bad_fraction=max_bad_fraction,
      max_lost_fraction=max_lost_fraction, threads=threads, workers=workers,
      timeout_s=timeout_s,
  )
  planned = plan(
      manifest, sources=sources, mixture=mixture, splits=splits, stratify=stratify,
      seed=seed, max_lost_fraction=max_lost_fraction, root=root, canvas=canvas,
      resample=resample, fov_mm=fov_mm, spacing_mm=spacing_mm, dtype=dtype,
      reader=reader, ops=ops, label=label, participants=participants, columns=columns,
      filters=filters, exclude=exclude, max_records=max_records,
      train_participants=train_participants, modalities=modalities, colour=colour,
      min_size=min_size, max_voxels=max_voxels, require_spacing=require_spacing,
      require_time_step=require_time_step, percentiles=percentiles, clip=clip,
      stages=stages,
  )
  parts = _joined_parts(planned)
  rows = [row for part in parts.values() for row in part]
  lazy = validate == "lazy" and cache in ("memory", "none")
  ledger = Ledger(
      parts, max_bad_fraction, lazy=lazy, path=_own_table(quarantine, host, lazy)
  )
  pools = [
      pool_lib.Pool(
          source.transform, workers, timeout_s=timeout_s,
          note_retries=ledger.note_retries,
      ) for source in planned if workers
  ]
  budget = cache_bytes // len(planned) if cache == "memory" else 0
  files = [
      Files(
          source.transform, ledger, budget, pool=pools[n] if workers else None,
          group=source.name if mixture == "alternate" else None,
      ) for n, source in enumerate(planned)
  ]
  threads = max(threads, workers)
  counted = _Progress(progress, len(rows))
  memory.keep_large_blocks()
  with contextlib.ExitStack() as stack:
    # Who gets an error gets no Data to close.
    for pool in pools:
      stack.callback(pool.close)
    if cache not in ("memory", "none"):
      # Processes take seconds to start, which few files are not worth.
      processes = threads if threads > 1 and len(rows) >= _MANY_FILES else 0
      crew = shard_writing.Crew(
          workers or processes, threads, timeout_s, ledger.note_retries
      )
      canvases = [
          open_shards(
              cache, source, own, crew=crew, progress=counted,
              max_bad=int(max_bad_fraction * len(rows)),
          ) for source, own in zip(planned, files, strict=True)
      ]
    else:
      canvases = [dict.fromkeys(source.parts, own) for source, own in zip(planned, files)]
      if not lazy:
        for source, own in zip(planned, files, strict=True):
          for part in source.parts.values():
            for _ in own.read_all(part, threads, counted):
              pass
        ledger.finish()
    labels = manifest_lib.label_names(rows)
    if stages:
      labels = stages_lib.StageOptions(**stages).classes
    planned = [source.without(ledger.is_bad) for source in planned]
    volumes = _volumes(planned, canvases, labels, ledger, mixture)
    stack.pop_all()
  return Data(
      volumes, labels, ledger,
      {
          "labels": list(labels), "cache": cache, "workers": workers,
          **_planned_facts(planned, mixture),
      }, pools,
  )


def plan(
    manifest: str | None = None,
    *,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    mixture: str = "concatenate",
    splits: Mapping[str, float] | str,
    stratify: Sequence[str] = ("device", "label"),
    seed: int = 0,
    max_lost_fraction: float = 0.05,
    train_participants: int | None = None,
    clip: Mapping[str, Any] | None = None,
    stages: Mapping[str, Any] | None = None,
    **common: Any,
) -> list[Source]:
  """Reads the tables and parts their rows; no recording is touched.

  Args: as of `open_data`, which says what `common` may hold.

  Returns:
    The sources, in order; one of name "" where there is one manifest.

  Raises:
    DataError, ReadError, ValueError: as `open_data`.
  """
  _check_sources(manifest, sources, mixture)
  cutting = clips_lib.ClipOptions(**clip) if clip else None
  staging = stages_lib.StageOptions(**stages) if stages else None
  if staging and not cutting:
    raise ValueError("stages are of the time points of clips: give `clip` as well")
  named = sources or {"": {"manifest": manifest}}
  column = splits if isinstance(splits, str) else None
  tables, rows, lost = _read_tables(
      {name: {**common, **own} for name, own in named.items()}, column
  )
  _check_told_apart(rows)
  joined = [row for found in rows.values() for row in found]
  if cutting and cutting.time_blocks:
    parts, missing = _by_time(joined, splits)
  else:
    parts, missing = _split(joined, splits, stratify, seed)
  transforms = {
      name: _transform(seed=seed, of_movies=bool(cutting), **{
          k: v for k, v in {**common, **own}.items() if k in _TRANSFORM_KEYS
      }) for name, own in named.items()
  }
  listed = [row for table in tables.values() for row in table.listed]

  def cut(name: str, parts: Mapping[str, Sequence[Row]]) -> clips_lib.Cut:
    return clips_lib.cut(
        {k: [row for row in part if row.source == name] for k, part in parts.items()},
        cutting, fractions=splits, stages=staging, listed=listed,
        reader=dict(transforms[name].reader),
    )

  unlearned = []
  if train_participants is not None:
    learned, among = _learned_from(parts), None
    if staging:
      cuts = [cut(name, {"train": learned}) for name in named]
      among = clips_lib.with_stages(clip for c in cuts for clip in c.clips["train"])
    parts["train"], unlearned = manifest_lib.some_participants(
        learned, train_participants, seed=seed, among=among
    )
  planned = []
  for name, own in named.items():
    without = [(row, "no_split") for row in missing if row.source == name]
    if without:
      lost[name]["no_split"] = len(without)
    few = sum(row.source == name for row in unlearned)
    if few:
      lost[name]["train_participants"] = few
    found = cut(name, parts) if cutting else None
    gone = found.lost if found else []
    for _, reason in gone:
      lost[name][reason] = lost[name].get(reason, 0) + 1
    unexplained = (*tables[name].unexplained, *without, *gone)
    ledger_lib.check_lost(
        unexplained, tables[name].total, max_lost_fraction, tables[name].path
    )
    mine = _own_parts(found.frames if found else parts, name)
    planned.append(Source(
        name, tables[name].path, mine, transforms[name], own.get("weight", 1),
        lost[name], unexplained, tables[name].total, found,
    ))
  if cutting:
    clips_lib.check_apart(m for source in planned for m in source.cut.movies())
    names = splits if cutting.time_blocks else parts
    clips_lib.check_parts({
        k: [clip for source in planned for clip in source.cut.clips.get(k, ())]
        for k in names
    }, cutting)
  return planned


def _read_tables(
    sources: Mapping[str, Mapping[str, Any]], column: str | None
) -> tuple[
    dict[str, manifest_lib.Manifest], dict[str, list[Row]], dict[str, dict[str, int]]
]:
  """Returns {source: table}, {source: the rows to take}, {source: {reason: lost}}."""
  tables, rows, lost = {}, {}, {}
  for name, own in sources.items():
    given = {k: v for k, v in own.items() if k in _TABLE_KEYS}
    limit = given.pop("max_records", None)
    if limit is not None and limit < 1:
      raise ValueError(f"max_records is {limit}, must be at least 1 or None")
    tables[name] = manifest_lib.read_manifest(
        given.pop("manifest"), split=column, **given
    )
    lost[name] = {reason: n for reason, n in tables[name].lost.items() if n}
    found = [dataclasses.replace(row, source=name) for row in tables[name].rows]
    if limit is not None and len(found) > limit:
      lost[name]["max_records"] = len(found) - limit
      found = found[:limit]
    if not found:
      raise DataError(
          f"{tables[name].path}: no row is left; lost {lost[name] or 'none'}"
      )
    rows[name] = found
  return tables, rows, lost


def _own_parts(
    parts: Mapping[str, Sequence[Row]], source: str
) -> dict[str, tuple[Row, ...]]:
  """Returns the rows of one source, without the splits that it has none of."""
  own = {k: tuple(r for r in part if r.source == source) for k, part in parts.items()}
  return {k: part for k, part in own.items() if part}


def _transform(
    *, seed, of_movies, reader=None, ops=(), modalities=None, **given
) -> Transform:
  sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
  transform = Transform(
      **sizes, modalities=tuple(modalities) if modalities else None,
      reader=frozen(reader or {}), ops=tuple(map(frozen, ops)),
      seed=seed if ops else 0,  # Shards without draws serve runs of any seed.
  )
  transform.check(of_movies=of_movies)
  return transform


def _check_options(
    *,
    validate: str,
    cache: str,
    max_bad_fraction: float,
    max_lost_fraction: float,
    threads: int,
    workers: int,
    timeout_s: float,
):
  if validate not in ("read", "lazy"):
    raise ValueError(f"validate is {validate!r}, must be \"read\" or \"lazy\"")
  if "://" in cache and not storage.is_remote(cache):
    raise ValueError(f"cache={cache!r} must be a local folder or gs://")
  for name, share in (
      ("max_bad_fraction", max_bad_fraction), ("max_lost_fraction", max_lost_fraction)
  ):
    if not 0 <= share <= 1:
      raise ValueError(f"{name} is {share}, must be in [0, 1]")
  if threads < 1:
    raise ValueError(f"threads is {threads}, must be at least 1")
  if workers < 0 or not timeout_s > 0:
    raise ValueError(
        f"workers is {workers} and timeout_s {timeout_s}; must be at least 0, and "
        "above 0"
    )


def _check_sources(manifest, sources, mixture):
  if bool(manifest) == bool(sources):
    raise ValueError(
        f"manifest is {manifest!r} and sources are {list(sources or ())}: give one or "
        "the other"
    )
  if mixture not in mixture_lib.MIXTURES:
    raise ValueError(
        f"mixture is {mixture!r}, must be one of {', '.join(mixture_lib.MIXTURES)}"
    )
  for name, own in (sources or {}).items():
    unknown = sorted(set(own) - set(SOURCE_KEYS))
    if unknown or not own.get("manifest"):
      raise ValueError(
          f"sources.{name}: unknown {unknown}" if unknown
          else f"sources.{name}: needs a manifest"
      )
  mixture_lib.shares_of(
      {name: own.get("weight", 1) for name, own in (sources or {"": {}}).items()}
  )


def _check_told_apart(rows: Mapping[str, Sequence[Row]]):
  homes: dict[str, str] = {}
  for name, found in rows.items():
    for row in found:
      if homes.setdefault(row.id, name) != name:
        raise DataError(
            f"{row.id} is in the sources {homes[row.id]} and {name}; a recording has "
            "one source"
        )


def _split(
    rows: Sequence[Row],
    splits: Mapping[str, float] | str,
    stratify: Sequence[str],
    seed: int,
) -> tuple[dict[str, list[Row]], list[Row]]:
  """Parts the rows of all sources at once: one person has one split in all."""
  if not isinstance(splits, str):
    return manifest_lib.split_by_participant(
        rows, splits, stratify=stratify, seed=seed
    ), []
  parts, _ = manifest_lib.split_by_column(rows)
  if not parts:
    raise DataError(f"no row has a value in the column {splits!r}")
  return parts, [row for row in rows if not row.split]


def _learned_from(parts: Mapping[str, list[Row]]) -> list[Row]:
  if "train" not in parts:
    raise DataError(
        "train_participants takes some of the split \"train\"; the splits are "
        f"{', '.join(name or 'stretches of time' for name in parts)}"
    )
  return parts["train"]


def _by_time(
    rows: Sequence[Row], splits: Mapping[str, float] | str
) -> tuple[dict[str, list[Row]], list[Row]]:
  """Lets every row be in all splits: time is shared out, not the movies."""
  if isinstance(splits, str):
    raise DataError(
        f"clip.time_blocks shares the time of each movie out, but splits are a column, "
        f"{splits!r}: give shares, or time_blocks=0"
    )
  manifest_lib.check_fractions(splits)
  return {"": list(rows)}, []


def _joined_parts(planned: Sequence[Source]) -> dict[str, list[Row]]:
  parts: dict[str, list[Row]] = {}
  for source in planned:
    for name, rows in source.parts.items():
      parts.setdefault(name, []).extend(rows)
  return parts


def _own_table(path: str | None, host: tuple[int, int], lazy: bool) -> str | None:
  """Returns where this host writes bad files: no two write to one name."""
  if path is None or host[0] == 0:
    return path
  stem, dot, ending = path.rpartition(".")
  return f"{stem}.host{host[0]}{dot}{ending}" if lazy else None


class _Progress:
  """Counts over all that is read, whatever part of it reports."""

  def __init__(self, told: Callable[[int, int], None] | None, total: int):
    self._told, self._total = told, total
    self._before = self._last = 0

  def __call__(self, done: int, total: int) -> None:
    del total
    if done <= self._last:  # the next part begins
      self._before += self._last
    self._last = done
    if self._told:
      self._told(self._before + done, self._total)


def open_shards(
    folder: str,
    source: Source,
    files: Files,
    *,
    crew: shard_writing.Crew,
    max_bad: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = print,
    runner: shard_writing.Runner | None = None,
) -> dict[str, shards.Shards]:
  """Opens the cached canvases of a source; writes them, or the rest, if absent.

  Args:
    folder: of all caches, local or `gs://`.
    source: its rows and transform.
    files: notes what is good and bad.
    crew, max_bad, progress, say, runner: see `shard_writing.prepare`.

  Returns:
    {split: its canvases}.

  Raises:
    DataError: as `shard_writing.prepare`, and if too many files are bad.
  """
  options = dataclasses.asdict(source.transform)
  path = shards.locate(folder, source.parts, options)
  by_id = {row.id: row for part in source.parts.values() for row in part}

  def judge(notes: Mapping[str, Any]):
    for name, facts in notes["facts"].items():
      files.note(by_id[name], facts)
    for name, *why in notes["bad"]:
      files.ledger.failed(by_id[name], ReadError(name, *why))
    files.ledger.finish()

  shard_writing.prepare(
      path, source.parts, source.transform, options=options, crew=crew, judge=judge,
      max_bad=max_bad, progress=progress, say=say, runner=runner,
  )
  return {name: shards.Shards(path, name) for name in source.parts}


def _volumes(
    planned: Sequence[Source],
    canvases: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    ledger: Ledger,
    mixture: str,
) -> dict[str, Volumes | Mixture]:
  """Puts rows and canvases together, without what is bad already."""
  weights = {source.name: source.weight for source in planned}
  splits = {}
  for name, part in _joined_parts(planned).items():
    good = {
        source.name: [row for row in source.parts[name] if not ledger.is_bad(row)]
        for source in planned if name in source.parts
    }
    kept = {
        source.name: source.cut.clips[name] if source.cut else good[source.name]
        for source in planned if name in source.parts
    }
    missing = weights.keys() - kept.keys() if name == "train" else set()
    empty = [k for k, rows in kept.items() if not rows] + sorted(missing)
    if empty:
      of = f" of {', '.join(empty)}" if any(empty) else ""
      raise DataError(
          f"split {name}{of}: no good file is left of {len(part)}: "
          f"{ledger_lib.reasons(ledger.bad()) or 'there was none'}"
      )
    volumes = {
        source.name: Volumes(
            name, kept[source.name], labels,
            clips_lib.Canvases(own[name], good[source.name]) if source.cut
            else own[name],
            ledger=ledger,
        )
        for source, own in zip(planned, canvases, strict=True) if source.name in kept
    }
    splits[name] = volumes[""] if "" in volumes else Mixture(
        name, volumes, mixture=mixture, weights=weights
    )
  return splits


def _planned_facts(planned: Sequence[Source], mixture: str) -> dict[str, Any]:
  """Returns what the report says of the tables and how their files are read."""
  facts = [
      {
          "manifest": source.manifest, "rows": source.total, "lost": dict(source.lost),
          "lost_by": ledger_lib.count_by(
              (row, row.split or "none", reason) for row, reason in source.unexplained
          ),
          "canvas": list(source.transform.canvas),
          "resample": source.transform.resample, "dtype": source.transform.dtype,
          "ops": [dict(op)["name"] for op in source.transform.ops],
          **{key: value for key, value in source.facts.items() if value},
      }
      for source in planned
  ]
  if len(planned) == 1 and not planned[0].name:
    return facts[0]
  shares = mixture_lib.shares_of({source.name: source.weight for source in planned})
  lost: dict[str, int] = {}
  for source in planned:
    for reason, n in source.lost.items():
      lost[reason] = lost.get(reason, 0) + n
  return {
      "mixture": mixture, "lost": lost,
      "sources": {
          source.name: {
              **own, "share": float(shares[source.name]),
              "records": {k: len(rows) for k, rows in source.parts.items()},
          }
          for source, own in zip(planned, facts, strict=True)
      },
  }


def _counts(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
  fields = ["device", "site", "region", "laterality", "modality", "label"]
  if any(row.source for row in rows):
    fields.append("source")
  return {field: manifest_lib.count(rows, field) for field in fields}
