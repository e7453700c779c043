"""Claims of data/clips.py and of its way through the pipeline, on small movies."""

import dataclasses
import itertools
import json
import math
import pathlib
import pickle

import numpy as np
import pytest

from vjepa_jax.data import clips, ops, pipeline, read, scan, storage
from vjepa_jax.data.manifest import Row
from vjepa_jax.data.record import DataError, ReadError

tifffile = pytest.importorskip("tifffile", reason="extra formats is not installed")

SHAPE = (4, 8, 10)


def volume(embryo: int, t: int, shape=SHAPE) -> np.ndarray:
  """Returns uint16 voxels of which the last tells embryo and time."""
  rng = np.random.default_rng([embryo, t])
  found = rng.integers(100, 200, shape, np.uint16)
  found[0, 0, 0], found[-1, -1, -1] = 0, 1000 + t
  return found


@pytest.fixture
def write(tmp_path):
  """Returns write(embryos, ...) -> manifest, in the layout of NIH-LS."""

  def write_all(
      lengths, *, drop=(), cut=(), sizes=None, names="_t{:03d}", step=1, stages=True,
      home="nih-ls",
  ):
    lines = ["participant_id\tfilepath\tspacing\ttime_step_s\tsplit"]
    for n, length in enumerate(lengths):
      name = f"emb_{n}"
      folder = tmp_path / home / name
      (folder / "images").mkdir(parents=True)
      (folder / "tracks" / "nuclei").mkdir(parents=True)
      (folder / "tracks" / "nuclei" / "t000-nuclei").write_text("1, 1, 2")
      (folder / "tracks" / "tracks_polar_bodies.txt").write_text("t\tz\n0\t1\n" * 50)
      counts = []
      for t in range(length):
        counts += [t * step] * 2 ** (4 * t // max(length, 1))
        if (n, t) in drop:
          continue
        path = folder / "images" / f"{name}{names.format(t * step)}.tif"
        shape = (sizes or {}).get((n, t), SHAPE)
        tifffile.imwrite(
            path, volume(n, t, shape), metadata=None, photometric="minisblack"
        )
        if (n, t) in cut:
          path.write_bytes(path.read_bytes()[:-60])
      if stages:
        (folder / "tracks" / "tracks.txt").write_text(
            "t\tz\n" + "".join(f"{t}\t1\n" for t in counts)
        )
      split = "validation" if n == len(lengths) - 1 else "train"
      lines.append(f"{name}\t{home}/{name}\t[0.002, 0.001, 0.001]\t60\t{split}")
    path = tmp_path / "manifest.tsv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)

  return write_all


def rewrite(manifest, old, new, count=-1):
  path = pathlib.Path(manifest)
  path.write_text(path.read_text().replace(old, new, count))


def open_clips(manifest, **options):
  given = dict(
      canvas=SHAPE, resample="spacing", spacing_mm=(0.002, 0.001, 0.001),
      splits="split", clip=dict(frames=4), max_lost_fraction=0.5, max_bad_fraction=0.5,
  )
  return pipeline.open_data(manifest, **given | options)


def times(record) -> list[int]:
  """Returns the time points of a clip, by their last voxels: all else is noise."""
  return record.volume[:, -1, -1, -1, 0].tolist()


@pytest.mark.parametrize("length, frames, stride, last", [
    (400, 16, 1, 384), (400, 16, 2, 369), (16, 16, 1, 0), (15, 16, 1, -1), (5, 1, 7, 4),
])
def test_the_last_start_is_the_last_that_fits(length, frames, stride, last):
  assert clips.max_start(length, frames, stride) == last
  found = clips.starts(range(length), frames=frames, stride=stride, step=1)
  assert found == list(range(last + 1))


@pytest.mark.parametrize("frames", [1, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 7, 12, 25])
def test_evaluation_shows_each_time_point_that_a_clip_can_show(frames, stride, length):
  numbers = set(range(length)) - {5}
  options = dict(frames=frames, stride=stride)
  shown = lambda step: [
      s + n * stride for s in clips.starts(numbers, step=step, **options)
      for n in range(frames)
  ]
  assert set(shown(0)) == set(shown(1)) <= numbers
  assert len(shown(0)) <= 2 * len(numbers)


@pytest.mark.parametrize("numbers", [
    set(range(8)), set(range(9)) - {5}, set(range(9)) - {2, 3}, {0, 2, 4, 6, 7},
])
@pytest.mark.parametrize("frames, stride", [(1, 1), (2, 1), (3, 1), (2, 2), (2, 3)])
def test_evaluation_takes_as_few_clips_as_can_be(numbers, frames, stride):
  shown = lambda places: {s + n * stride for s in places for n in range(frames)}
  every = clips.starts(numbers, frames=frames, stride=stride, step=1)
  found = clips.starts(numbers, frames=frames, stride=stride, step=0)
  fewest = next(
      count for count in range(len(every) + 1)
      if any(shown(some) == shown(every) for some in itertools.combinations(every, count))
  )
  assert len(found) == fewest and shown(found) == shown(every)


def test_clips_hold_their_time_points_in_numeric_order(write):
  data = open_clips(write([12, 12], names="_t{}"), clip=dict(frames=4, stride=2))
  train = data.splits["train"]
  assert [row.numbers for row in train.rows[:2]] == [(0, 2, 4, 6), (1, 3, 5, 7)]
  assert len(train) == clips.max_start(12, 4, 2) + 1
  record = train[3]
  assert record.volume.shape == (4, *SHAPE, 1) and record.volume.dtype == np.uint8
  assert record.subject == "emb_0" and record.meta["start"] == 3
  np.testing.assert_allclose(record.spacing, [120, 0.002, 0.001, 0.001])
  # Noise is the same in no two time points, so this tells them.
  singles = [train[n].volume[0] for n in (3, 5)]
  np.testing.assert_array_equal(record.volume[:2], singles)


def test_a_movie_has_one_range_of_values_one_mean_and_one_std(write):
  data = open_clips(write([12, 12]))
  train = data.splits["train"]
  records = [train[n] for n in range(len(train))]
  assert len({(r.mean, r.std) for r in records}) == 1
  low, high = np.percentile(
      [volume(0, t) for t in np.linspace(0, 11, 9).round().astype(int)], (0.5, 99.8)
  )
  for start in (0, 8):
    wanted = np.stack([volume(0, t) for t in range(start, start + 4)]).astype(float)
    wanted = np.clip((wanted - low) / (high - low), 0, 1) * 255
    got = records[start].volume[..., 0]
    assert np.abs(got - wanted).max() <= 0.51
  every = np.stack([r.volume[0] for r in records])
  assert abs(records[0].mean - every.mean()) < 2 and abs(
      records[0].std - every.std()
  ) < 2
  assert open_clips(
      data.report["manifest"], percentiles=(10, 90)
  ).splits["train"][0].mean > records[0].mean


def test_embryos_are_in_one_split_each(write):
  data = open_clips(
      write([8] * 7), splits=dict(train=0.6, validation=0.2, test=0.2), stratify=()
  )
  people = {k: {r.participant for r in v.rows} for k, v in data.splits.items()}
  assert sorted(len(p) for p in people.values()) == [1, 2, 4]
  assert len(set.union(*people.values())) == 7
  files = {k: {f.path for r in v.rows for f in r.frames} for k, v in data.splits.items()}
  assert sum(map(len, files.values())) == len(set.union(*files.values())) == 56


@pytest.mark.parametrize("blocks, gap", [(1, None), (2, 3), (3, 0)])
def test_one_embryo_is_split_by_time_with_a_gap(write, blocks, gap):
  data = open_clips(
      write([60]), splits=dict(train=0.6, validation=0.4),
      clip=dict(frames=3, stride=2, time_blocks=blocks, gap=gap),
  )
  used = {k: {n for r in v.rows for n in r.numbers} for k, v in data.splits.items()}
  near = min(abs(a - b) for a in used["train"] for b in used["validation"])
  assert near > (5 if gap is None else gap)
  assert len(used["train"]) > len(used["validation"]) > 5
  for name, volumes in data.splits.items():
    frames = {f.id for r in volumes.rows for f in r.frames}
    assert len(frames) == len(used[name])
  assert data.report["clips"]["time_blocks"] == blocks


def test_one_embryo_by_embryos_and_blocks_too_short_are_refused(write):
  manifest = write([20])
  with pytest.raises(DataError, match="1 participant"):
    open_clips(manifest, splits=dict(train=0.6, validation=0.4))
  with pytest.raises(DataError, match="validation have no clip of 4.*fewer time_blocks"):
    open_clips(
        manifest, splits=dict(train=0.8, validation=0.2),
        clip=dict(frames=4, time_blocks=2),
    )
  with pytest.raises(DataError, match="time_blocks"):
    open_clips(manifest, clip=dict(frames=4, time_blocks=1))


def test_missing_time_points_lose_the_clips_that_need_them(write):
  data = open_clips(write([12, 12], drop={(0, 5), (1, 0)}))
  rows = data.splits["train"].rows
  assert [row.start for row in rows] == [0, 1, 6, 7, 8]
  assert data.report["clips"]["missing_time_points"] == 1  # A late start is none.
  assert data.report["clips"]["splits"]["validation"]["in_no_clip"] == 0
  numbers = {n for row in data.splits["validation"].rows for n in row.numbers}
  assert numbers == set(range(1, 12))


def test_a_broken_time_point_is_quarantined_once_and_its_clips_are_gone(write):
  manifest = write([12, 12], cut={(0, 5)})
  data = open_clips(manifest)
  assert [row.start for row in data.splits["train"].rows] == [0, 1, 6, 7, 8]
  assert [bad.reason for bad in data.quarantine] == ["truncated"]
  assert data.report["read"] == 24
  lazy = open_clips(manifest, validate="lazy", cache="none").splits["train"]
  elements = [lazy.element(n) for n in range(len(lazy))]
  assert [n for n, e in enumerate(elements) if e is None] == [2, 3, 4, 5]
  assert len(lazy.ledger.bad()) == 1


def test_a_time_point_of_another_size_is_named_and_quarantined(write):
  data = open_clips(write([12, 12], sizes={(0, 11): (4, 8, 12), (1, 0): (3, 8, 10)}))
  assert {bad.reason for bad in data.quarantine} == {"irregular_frames"}
  assert "(4, 8, 12, 1)" in data.quarantine[0].detail
  assert [row.start for row in data.splits["train"].rows] == list(range(8))


def test_movies_shorter_than_a_clip_are_lost_and_counted(write):
  manifest = write([12, 3, 12])
  data = open_clips(manifest)
  assert data.report["lost"] == {"shorter_than_clip": 1}
  assert {row.participant for row in data.splits["train"].rows} == {"emb_0"}
  with pytest.raises(DataError, match="shorter_than_clip 1.*max_lost_fraction"):
    open_clips(manifest, max_lost_fraction=0.1)
  with pytest.raises(DataError, match="lost for reasons.*shorter_than_clip 3"):
    open_clips(manifest, clip=dict(frames=13))


def test_a_movie_with_too_many_gaps_for_any_clip_is_lost_by_its_own_reason(write):
  gaps = {(0, t) for t in (2, 5, 8, 11)}
  data = open_clips(write([12, 12, 12], drop=gaps))
  assert data.report["lost"] == {"no_whole_clip": 1}


def test_a_folder_that_is_not_there_is_lost_and_counted(write):
  manifest = write([8, 8])
  with open(manifest, "a", encoding="utf-8") as file:
    file.write("emb_9\tnih-ls/emb_9\t\t60\ttrain\n")
  assert open_clips(manifest).report["lost"] == {"missing_file": 1}


def test_numbers_that_go_on_by_five_are_one_step_each(write):
  data = open_clips(
      write([10, 8], step=5, drop={(0, 3)}), clip=dict(frames=3, stride=2),
      stages=dict(taxonomy="count"),
  )
  rows = data.splits["train"].rows
  assert rows[0].numbers == (0, 10, 20) and rows[0].spacing == (0.002, 0.001, 0.001)
  assert 3 * 5 not in {n for row in rows for n in row.numbers}
  assert data.report["clips"]["missing_time_points"] == 1
  assert data.splits["train"][0].spacing[0] == 120


@pytest.mark.parametrize("names", [("e_t0", "e_t2", "e_t5"), ("a_t1", "b_t2"), ("x", "y")])
def test_names_that_number_no_even_time_are_refused(tmp_path, names):
  for name in names:
    tifffile.imwrite(tmp_path / f"{name}.tif", volume(0, 0))
  with pytest.raises(ReadError, match="irregular_frames"):
    clips.list_movie(Row(str(tmp_path), "e"))


@pytest.mark.parametrize("where", ["", "images"])
def test_a_plain_folder_of_time_points_is_a_movie(tmp_path, where):
  folder = tmp_path / "embryo" / where
  folder.mkdir(parents=True)
  for t in (10, 9, 2):
    tifffile.imwrite(folder / f"e1_t{t}.tif", volume(0, t), metadata=None, photometric="minisblack")
  (folder / "notes.txt").write_text("x")
  movie = clips.list_movie(Row(str(folder), "e"))
  assert list(movie.frames) == [2, 9, 10] and movie.missing == 6
  assert movie.homes == (str(tmp_path / "embryo"),)
  assert not [row for row in movie.frames.values() if "notes" in row.path]


def test_pictures_beside_the_time_points_are_passed_over(tmp_path):
  folder = tmp_path / "images"
  folder.mkdir()
  for t in range(3):
    (folder / f"e_t{t:03d}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
  with pytest.raises(ReadError, match="empty_file"):
    clips.list_movie(Row(str(folder), "e"))
  for t in (0, 1):
    tifffile.imwrite(folder / f"e_t{t:03d}.tif", volume(0, t))
  movie = clips.list_movie(Row(str(folder), "e"))
  assert list(movie.frames) == [0, 1] and movie.missing == 0
  assert all(row.path.endswith(".tif") for row in movie.frames.values())


def test_of_an_embryo_s_folder_the_images_alone_are_time_points(write, tmp_path):
  manifest = write([8, 8])
  home = tmp_path / "nih-ls" / "emb_0"
  (home / "mip").mkdir()
  for t in (0, 1):
    tifffile.imwrite(home / "mip" / f"emb_0_mip_{t}.tif", volume(0, t)[0])
  tifffile.imwrite(home / "overview.tif", volume(0, 0)[0])
  data = open_clips(manifest)
  assert data.report["lost"] == {} and len(data.splits["train"]) == 5
  movie = clips.list_movie(Row(f"{home}/", "e"))
  assert list(movie.frames) == list(range(8)) and movie.homes == (str(home),)
  for path in (home / "images").iterdir():
    path.unlink()
  with pytest.raises(ReadError, match="irregular_frames"):
    clips.list_movie(Row(str(home), "e"))


def test_a_stack_whose_axis_is_called_time_is_no_time_point_but_by_stated_axes(
    write, tmp_path
):
  wanted = open_clips(write([8, 8])).splits["train"]
  manifest = write([8, 8], home="fiji")
  for n in (0, 1):
    for t in range(8):
      tifffile.imwrite(
          tmp_path / "fiji" / f"emb_{n}" / "images" / f"emb_{n}_t{t:03d}.tif",
          volume(n, t), imagej=True, metadata={"axes": "TYX"},
      )
  with pytest.raises(DataError, match="9 ambiguous_axes"):
    open_clips(manifest)
  lazy = open_clips(manifest, validate="lazy", cache="none").splits["train"]
  with pytest.raises(ReadError, match="holds 4 of its own.*TYX.*axes=.ZYX.") as caught:
    lazy[0]
  assert caught.value.reason == "ambiguous_axes"
  found = open_clips(manifest, reader=dict(axes="ZYX")).splits["train"]
  assert found[1].volume.shape == (4, *SHAPE, 1)
  np.testing.assert_array_equal(found[1].volume, wanted[1].volume)


@pytest.fixture
def write_files(tmp_path):
  """Returns write_files(names, ...) -> manifest of movies in one TIFF each."""

  def write_all(names, *, length=8, **how):
    lines = ["participant_id\tfilepath\tspacing\ttime_step_s\tsplit"]
    how = how or dict(metadata={"axes": "TZYX"})
    for n, name in enumerate(names):
      path = tmp_path / name
      path.parent.mkdir(parents=True, exist_ok=True)
      movie = np.stack([volume(n, t) for t in range(length)])
      if how.get("metadata", ()) is None:
        movie = movie[:, 0]
      tifffile.imwrite(path, movie, photometric="minisblack", **how)
      split = "validation" if n == len(names) - 1 else "train"
      lines.append(f"emb_{n}\t{name}\t[0.002, 0.001, 0.001]\t60\t{split}")
    manifest = tmp_path / "files.tsv"
    manifest.write_text("\n".join(lines) + "\n")
    return str(manifest)

  return write_all


def write_table(folder, stages):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "stages.tsv").write_text(
      "t\tstage\n" + "".join(f"{t}\t{stage}\n" for t, stage in enumerate(stages))
  )


TABLES = dict(taxonomy=("a", "b"), sources=("table",))


def test_one_file_s_labels_lie_in_a_folder_of_its_name_or_beside_a_file_that_is_alone(
    write_files, tmp_path
):
  manifest = write_files(["all/e0.tif", "all/e1.ome.tif", "own/e2.tif"])
  write_table(tmp_path / "all" / "e0", "aaaaaaaa")
  write_table(tmp_path / "all" / "e1", "bbbbbbbb")
  write_table(tmp_path / "own", "abababab")
  data = open_clips(manifest, stages=TABLES)
  shown = {
      row.participant: row.stages for volumes in data.splits.values()
      for row in volumes.rows if row.start == 0
  }
  assert shown == {
      "emb_0": tuple("aaaa"), "emb_1": tuple("bbbb"), "emb_2": tuple("abab"),
  }


@pytest.mark.parametrize("narrow", [
    {}, dict(max_records=2), dict(exclude={"participant": ["emb_1"]}),
    dict(train_participants=1),
])
def test_labels_that_two_movies_would_share_are_refused_and_both_are_named(
    write_files, tmp_path, narrow
):
  manifest = write_files(["all/e0.tif", "own/e2.tif", "all/e1.tif", "own/e3.tif"])
  write_table(tmp_path / "all", "aaaabbbb")
  options = dict(stages=TABLES, splits=dict(train=0.5, validation=0.5))
  with pytest.raises(DataError, match="all/stages.tsv.*all/e0.tif and .*all/e1.tif"):
    open_clips(manifest, **options | narrow)
  write_table(tmp_path / "all" / "e0", "aaaaaaaa")  # Of the other it may still not be.
  with pytest.raises(DataError, match="folder NAME.*data.stages.table"):
    open_clips(manifest, **options)
  given = {"emb_0": str(tmp_path / "all" / "stages.tsv")}
  data = open_clips(manifest, **options | dict(stages=TABLES | dict(table=given)))
  assert data.report["stages"]["dropped"]["table: no file"] == 3


def test_movies_of_two_sources_do_not_share_labels_either(write_files, tmp_path):
  whole = write_files(["all/e0.tif", "all/e1.tif"])
  write_table(tmp_path / "all", "aaaabbbb")
  head, *lines = open(whole, encoding="utf-8").read().splitlines()
  sources = {}
  for name, line in zip("xy", lines, strict=True):
    (tmp_path / f"{name}.tsv").write_text(f"{head}\n{line}\n")
    sources[name] = dict(manifest=str(tmp_path / f"{name}.tsv"))
  with pytest.raises(DataError, match="2 movies would share"):
    pipeline.plan(sources=sources, splits="split", clip=dict(frames=4), stages=TABLES)


def test_the_reader_s_options_hold_for_the_listing_and_a_row_s_own_win(
    write_files, tmp_path
):
  manifest = write_files(["e0.tif", "e1.tif"], metadata={"axes": "ZCYX"})
  with pytest.raises(DataError, match="shorter_than_clip"):
    open_clips(manifest)
  data = open_clips(manifest, reader=dict(axes="TZYX"))
  assert len(data.splits["train"]) == 5
  np.testing.assert_allclose(data.splits["train"][0].spacing[0], 60)
  movie = clips.list_movie(Row(str(tmp_path / "e0.tif"), "e"), dict(axes="TZYX"))
  assert len(movie.frames) == 8
  row = Row(str(tmp_path / "e0.tif"), "e", axes="ZTYX")
  assert len(clips.list_movie(row, dict(axes="TZYX")).frames) == 4


def test_a_file_that_names_no_axes_is_lost_by_that_and_not_as_too_short(
    write_files, caplog
):
  manifest = write_files(["e0.tif", "e1.tif"], metadata=None)
  with pytest.raises(DataError, match="ambiguous_axes 2"):
    open_clips(manifest)
  assert "taken as ZYX it is one time point" in caplog.text
  assert 'axes="TYX"' in caplog.text
  data = open_clips(
      manifest, reader=dict(axes="TYX"), canvas=(1, 8, 10),
  )
  assert len(data.splits["train"]) == 5
  # One time point is as long as a clip of one.
  assert len(open_clips(manifest, clip=dict(frames=1)).splits["train"]) == 1


def test_training_participants_are_drawn_among_those_with_a_stage(write, tmp_path):
  manifest = write([8] * 6)
  for n in (0, 2, 3):
    (tmp_path / "nih-ls" / f"emb_{n}" / "tracks" / "tracks.txt").unlink()
  (tmp_path / "nih-ls" / "emb_1" / "tracks" / "tracks.txt").write_text("t\n99\n")
  people = lambda **options: {
      row.participant for row in open_clips(manifest, **options).splits["train"].rows
  }
  for seed in range(4):
    options = dict(train_participants=1, seed=seed, stages=dict(taxonomy="count"))
    assert people(**options) == {"emb_4"}
  assert len({*map(str, (people(train_participants=1, seed=n) for n in range(4)))}) > 1
  report = open_clips(manifest, **options).report
  assert report["lost"] == {"train_participants": 4}
  with pytest.raises(DataError, match="is 2, must be from 1 to the 1 .*known stage"):
    open_clips(manifest, **options | dict(train_participants=2))


def test_a_source_of_a_mixture_may_lack_a_split_but_not_all_of_them(write, tmp_path):
  whole = write([8, 8, 8])
  head, *lines = open(whole, encoding="utf-8").read().splitlines()
  sources = {}
  for name, own in (("x", lines[:1]), ("y", lines[1:])):
    path = tmp_path / f"{name}.tsv"
    path.write_text("\n".join([head, *own]) + "\n")
    sources[name] = dict(manifest=str(path))
  data = open_clips(None, sources=sources, stages=dict(taxonomy="count"))
  assert len(data.splits["train"].rows) == 10
  assert {row.source for row in data.splits["validation"].rows} == {"y"}
  (tmp_path / "y.tsv").write_text("\n".join([head, lines[1]]) + "\n")
  (tmp_path / "x.tsv").write_text(
      "\n".join([head, lines[0], lines[2].replace("emb_2\tnih", "emb_9\tno")]) + "\n"
  )
  with pytest.raises(DataError, match="validation have no clip"):
    open_clips(None, sources=sources)


def test_stages_of_time_points_come_with_the_batch(write):
  data = open_clips(write([16, 16]), stages=dict(taxonomy="count"))
  assert data.labels[:4] == ("1-cell", "2-cell", "4-cell", "8-cell")
  batch = next(pipeline.train_iterator(data.splits["train"], batch_size=3, seed=0))
  assert batch["frame_label"].shape == (3, 4) and batch["frame_label"].dtype == np.int32
  for index, labels, label in zip(batch["index"], batch["frame_label"], batch["label"]):
    row = data.splits["train"].rows[index]
    assert labels.tolist() == [n // 4 for n in row.numbers] and label == labels[2]
  last = list(pipeline.eval_batches(data.splits["validation"], 3))[-1]
  assert last["_mask"].tolist() == [1, 0, 0]
  assert (last["frame_label"][1:] == -1).all() and (last["label"][1:] == -1).all()


def test_numbers_of_stages_are_places_in_the_taxonomy_whatever_comes_first(
    write, tmp_path
):
  manifest = write([4, 4])
  for name, told in (("emb_0", "dcdb"), ("emb_1", "bbca")):
    (tmp_path / "nih-ls" / name / "stages.tsv").write_text(
        "t\tstage\n" + "".join(f"{t}\t{told[t]}\n" for t in (2, 0, 3, 1))
    )
  data = open_clips(
      manifest, stages=dict(taxonomy=("a", "b", "c", "d", "e"), sources=("table",))
  )
  assert data.labels == ("a", "b", "c", "d", "e")
  assert data.splits["train"].stage_ids.tolist() == [[3, 2, 3, 1]]
  assert data.splits["validation"].stage_ids.tolist() == [[1, 1, 2, 0]]


def test_without_stages_a_batch_has_no_frame_labels(write):
  data = open_clips(write([8, 8]))
  assert "frame_label" not in data.splits["train"].element(0)
  with pytest.raises(ValueError, match="clip"):
    open_clips(data.report["manifest"], clip=None, stages=dict(taxonomy="count"))


def test_time_points_without_a_stage_are_minus_one_and_counted(write, tmp_path):
  manifest = write([8, 8, 8])
  tracks = tmp_path / "nih-ls" / "emb_0" / "tracks" / "tracks.txt"
  tracks.write_text("t\tx\n" + "".join(f"{t}\t1\n" for t in (0, 1, 2, 90)))
  (tmp_path / "nih-ls" / "emb_1" / "tracks" / "tracks.txt").unlink()
  data = open_clips(manifest, stages=dict(taxonomy="count"))
  train = data.splits["train"]
  assert train.element(0)["frame_label"].tolist() == [0, 0, 0, -1]
  assert train.element(len(train) - 1)["frame_label"].tolist() == [-1] * 4
  assert train.element(len(train) - 1)["label"] == -1
  report = data.report["stages"]
  assert report["dropped"] == {
      "no stage": 13, "counts: no file": 1, "counts: no such time point": 1,
  }
  assert report["movies_without"] == [train.rows[-1].path]
  assert report["time_points"]["train"]["without"] == 13


def test_answers_that_name_no_one_stage_are_left_out_and_counted_in_the_report(
    write, tmp_path
):
  manifest = write([6, 6], stages=False)
  said = ("**2-cell**", "1.5-fold to 2-fold", "~100-cell", "", "comma")
  (tmp_path / "nih-ls" / "emb_0" / "embryo_classifications_all.json").write_text(
      json.dumps([
          {"frame_index": t, "response": f"## Developmental Stage: {stage}"}
          for t, stage in enumerate(said)
      ] + [{"frame_index": 5, "response": "ERROR: overloaded"}])
  )
  (source,) = pipeline.plan(
      manifest, splits="split", clip=dict(frames=6),
      stages=dict(taxonomy="vlm14", sources=("answers",)),
  )
  report = source.facts["stages"]
  assert report["dropped"] == {
      "no stage": 4 + 6, "answers: ambiguous": 1, "answers: failed": 1,
      "answers: no file": 1, "answers: no stage section": 1, "answers: unknown stage": 1,
  }
  shown = {k: n for k, n in report["time_points"]["train"].items() if n}
  assert shown == {"2-cell": 1, "comma": 1, "without": 4}


def test_a_stage_that_training_lacks_is_reported(write, tmp_path, caplog):
  manifest = write([8, 8])
  tracks = tmp_path / "nih-ls" / "emb_0" / "tracks" / "tracks.txt"
  tracks.write_text("t\n" + "".join(f"{t}\n" for t in range(8)))
  report = open_clips(manifest, stages=dict(taxonomy="count")).report["stages"]
  assert report["absent_but_elsewhere"] == {
      "validation": {"2-cell": 2, "4-cell": 2, "8-cell": 2}
  }
  assert "2-cell" in report["absent_from_training"] and "2-cell" in caplog.text
  json.dumps(report)


def test_a_file_of_tracks_that_is_none_stops_the_run_by_its_name(write, tmp_path):
  manifest = write([8, 8])
  (tmp_path / "nih-ls" / "emb_0" / "tracks" / "tracks.txt").write_text("z\ty\n1\t2\n")
  with pytest.raises(DataError, match="emb_0/tracks/tracks.txt.*column t"):
    open_clips(manifest, stages=dict(taxonomy="count"))


def test_shards_and_workers_give_the_same_clips(write, tmp_path):
  manifest = write([10, 8], cut={(0, 2)})
  wanted = open_clips(manifest)
  shards = open_clips(manifest, cache=str(tmp_path / "shards"))
  workers = open_clips(manifest, workers=1, cache="none")
  again = open_clips(manifest, cache=str(tmp_path / "shards"))
  try:
    for split, volumes in wanted.splits.items():
      for n in range(len(volumes)):
        for other in (shards, workers, again):
          record = other.splits[split][n]
          np.testing.assert_array_equal(record.volume, volumes[n].volume)
          assert abs(record.mean - volumes[n].mean) < 1e-6
          assert abs(record.std - volumes[n].std) < 1e-6
  finally:
    workers.close()
  (report,) = (tmp_path / "shards").glob("*/report.json")
  splits = json.loads(report.read_text())["splits"]
  # Each time point once, however many clips it is in.
  assert {name: split["canvases"] for name, split in splits.items()} == {
      "train": 9, "validation": 8,
  }


def test_a_clip_reads_its_own_time_points_and_no_other(write, tmp_path):
  data = open_clips(write([40, 8]), validate="lazy", cache="none")
  train = data.splits["train"]
  train[0]  # The range of values of the movie takes nine of them.
  images = tmp_path / "nih-ls" / "emb_0" / "images"
  for t in range(20, 40):
    (images / f"emb_0_t{t:03d}.tif").unlink()
  assert train[16].volume.shape[0] == 4
  with pytest.raises(ReadError, match="missing_file"):
    train[17]


def test_one_file_of_all_time_points_gives_the_same_clips(write, tmp_path):
  manifest = write([12, 8], stages=False)
  movie = np.stack([volume(0, t) for t in range(12)])
  wanted = open_clips(manifest).splits["train"]
  for name, how in (
      ("plain", dict(metadata={"axes": "TZYX"})), ("imagej", dict(imagej=True)),
      ("ome", dict(ome=True, metadata={"axes": "TZYX"})),
      ("zip", dict(metadata={"axes": "TZYX"}, compression="zlib")),
      ("swap", dict(metadata={"axes": "TZYX"}, byteorder=">")),
      ("ztyx", dict(metadata={"axes": "ZTYX"})),
  ):
    path = tmp_path / f"{name}.tif"
    array = movie.swapaxes(0, 1) if name == "ztyx" else movie
    if name == "imagej":
      how["metadata"] = {"axes": "TZYX"}
    tifffile.imwrite(path, array, photometric="minisblack", **how)
    lines = open(manifest, encoding="utf-8").read().replace("nih-ls/emb_0", path.name)
    (tmp_path / f"{name}.tsv").write_text(lines)
    found = open_clips(str(tmp_path / f"{name}.tsv")).splits["train"]
    assert len(found) == len(wanted) == 9 and found.rows[2].numbers == (2, 3, 4, 5)
    for n in (0, 8):
      np.testing.assert_array_equal(found[n].volume, wanted[n].volume, name)


def test_rows_of_clips_can_be_sent_to_processes(write):
  data = open_clips(write([8, 8]))
  volumes = data.splits["train"]
  other = pickle.loads(pickle.dumps(volumes))
  np.testing.assert_array_equal(other[1].volume, volumes[1].volume)
  assert other.rows[1].id == volumes.rows[1].id == f"{volumes.rows[1].path}::t1+4x1"


def test_clips_in_a_bucket_are_those_of_the_disk(write, bucket, tmp_path):
  manifest = write([8, 8])
  for entry in storage.list_entries(str(tmp_path)):
    if entry.size:
      storage.upload(entry.path, bucket.url + entry.path[len(str(tmp_path)):])
  stages = dict(taxonomy="count")
  local = open_clips(manifest, stages=stages).splits["train"]
  remote = open_clips(f"{bucket.url}/manifest.tsv", stages=stages).splits["train"]
  np.testing.assert_array_equal(local[2].volume, remote[2].volume)
  np.testing.assert_array_equal(local.stage_ids, remote.stage_ids)


@pytest.mark.parametrize("options, words", [
    (dict(), "frames: missing"), (dict(frames=0), "frames is 0"),
    (dict(frames=4, stride=0), "stride is 0"), (dict(frames=4, step=0), "step is 0"),
    (dict(frames=4, time_blocks=-1), "time_blocks"), (dict(frames=2.5), "2.5"),
    (dict(frames=True), "True"), (dict(frames=4, gap=-1), "gap"),
])
def test_options_out_of_range_are_refused(options, words):
  assert any(words in fault for fault in clips.clip_option_faults(options))
  with pytest.raises((ValueError, TypeError)):
    clips.ClipOptions(**options)


def test_a_scan_makes_one_row_of_each_embryo(write, tmp_path):
  write([6, 5, 1])
  manifest = str(tmp_path / "nih.tsv")
  found = scan.scan(str(tmp_path / "nih-ls"), output=manifest)
  by_name = {row.participant: row for row in found.rows}
  assert {"emb_0", "emb_1"} <= set(by_name) and len(found.rows) == 2
  assert by_name["emb_0"].path == str(tmp_path / "nih-ls" / "emb_0")
  assert found.lost == {"no_participant": 1}  # One time point is no movie.
  data = open_clips(
      manifest, splits=dict(train=0.5, validation=0.5), clip=dict(frames=2),
      reader=dict(manifest_spacing=(0.002, 0.001, 0.001), time_step_s=60.0),
      stages=dict(taxonomy="count"),
  )
  assert sum(map(len, data.splits.values())) in (8, 7)
  np.testing.assert_allclose(data.splits["train"][0].spacing, [60, 0.002, 0.001, 0.001])


def test_the_folder_of_an_embryo_reads_as_one_movie(write, tmp_path):
  write([3, 2])
  record = read(str(tmp_path / "nih-ls" / "emb_0"))
  np.testing.assert_array_equal(
      record.volume[..., 0], np.stack([volume(0, t) for t in range(3)])
  )


def test_a_whole_egg_fits_or_the_share_beyond_the_canvas_is_told(write):
  manifest = write([8, 8])
  coarse = dict(spacing_mm=(0.004, 0.002, 0.002), canvas=(2, 4, 5))
  data = open_clips(manifest, **coarse)
  assert data.report["cut"] == 0 and data.report["padding"] == 0
  np.testing.assert_allclose(data.splits["train"][0].spacing[1:], coarse["spacing_mm"])
  data = open_clips(manifest, **coarse | dict(canvas=(2, 4, 4)))
  assert abs(data.report["cut"] - 0.2) < 1e-6 and data.report["padding"] == 0
  data = open_clips(manifest, **coarse | dict(canvas=(4, 4, 5)))
  assert data.report["cut"] == 0 and data.report["padding"] == 0.5


@pytest.mark.parametrize("seed", range(2))
def test_tracks_of_any_content_stop_by_name_or_count_their_losses(write, tmp_path, seed):
  manifest = write([6, 6])
  tracks = tmp_path / "nih-ls" / "emb_0" / "tracks" / "tracks.txt"
  whole, rng = tracks.read_bytes(), np.random.default_rng(seed)
  outcomes = set()
  for trial in range(25):
    content = bytearray(whole)
    # Every other time within the header.
    reach = len(content) if trial % 2 else 3
    for at in rng.integers(0, reach, rng.integers(1, 5)):
      content[at] = rng.integers(256)
    tracks.write_bytes(content[: rng.integers(1, len(content) + 1)])
    try:
      (source,) = pipeline.plan(
          manifest, splits="split", clip=dict(frames=4), stages=dict(taxonomy="count")
      )
      shown = source.facts["stages"]["time_points"]["train"]
      assert sum(shown.values()) == 6
      outcomes.add("read")
    except DataError as error:
      assert "tracks.txt" in str(error)
      outcomes.add("named")
  assert outcomes == {"read", "named"}


@pytest.mark.parametrize("cache", ["memory", "shards"])
def test_beside_a_broken_time_point_evaluation_shows_all_others(write, tmp_path, cache):
  manifest = write([12, 13], cut={(1, 5)})
  folder = cache if cache == "memory" else str(tmp_path / cache)
  data = open_clips(manifest, cache=folder, stages=dict(taxonomy="count"))
  found = data.splits["validation"]
  shown = [number for row in found.rows for number in row.numbers]
  assert set(shown) == set(range(13)) - {5}
  singles = open_clips(manifest, clip=dict(frames=1)).splits["validation"]
  alone = {row.start: singles[n].volume[0] for n, row in enumerate(singles.rows)}
  for n, row in enumerate(found.rows):
    np.testing.assert_array_equal(found[n].volume, [alone[t] for t in row.numbers])
  counts = data.report["clips"]["splits"]["validation"]
  assert counts == dict(movies=1, clips=len(found), time_points=12, in_no_clip=0, bad=1)
  told = data.report["stages"]["time_points"]["validation"]
  assert sum(told.values()) == 12


def test_training_keeps_its_starts_beside_a_broken_time_point(write):
  data = open_clips(write([12, 12], cut={(0, 0)}), clip=dict(frames=4, step=3))
  assert [row.start for row in data.splits["train"].rows] == [3, 6]
  counts = data.report["clips"]["splits"]["train"]
  assert (counts["bad"], counts["time_points"], counts["in_no_clip"]) == (1, 7, 4)


def test_a_stage_whose_time_points_are_all_broken_is_absent(write, caplog):
  # The first quarter of a phantom here is of one cell.
  data = open_clips(
      write([16, 16], cut={(0, t) for t in range(4)}), stages=dict(taxonomy="count")
  )
  report = data.report["stages"]
  assert report["time_points"]["train"]["1-cell"] == 0
  assert report["absent_but_elsewhere"] == {"validation": {"1-cell": 4}}
  assert "1-cell" in caplog.text and "1-cell" in report["absent_from_training"]


def test_time_points_in_the_gaps_of_time_blocks_are_counted(write):
  manifest = write([60])
  facts = open_clips(
      manifest, splits=dict(train=0.6, validation=0.2, test=0.2),
      clip=dict(frames=4, time_blocks=1),
  ).report["clips"]
  shared_out = sum(s["time_points"] + s["in_no_clip"] for s in facts["splits"].values())
  assert facts["in_gaps"] == 8 and shared_out == 52
  assert open_clips(manifest, splits=dict(train=1), clip=dict(frames=4)).report[
      "clips"]["in_gaps"] == 0


@pytest.mark.parametrize("again", [
    "nih-ls/emb_0/", "nih-ls//emb_0", "nih-ls/./emb_0", "nih-ls/../nih-ls/emb_0",
    "nih-ls/emb_0/images",
])
def test_one_movie_under_two_names_is_refused(write, again):
  manifest = write([8, 8], stages=False)
  with open(manifest, "a") as file:
    file.write(f"other\t{again}\t[0.002, 0.001, 0.001]\t60\tvalidation\n")
  with pytest.raises(DataError, match="keep one"):
    open_clips(manifest)


def test_a_draw_is_the_same_for_all_time_points_of_a_movie(write, monkeypatch):
  def mirror_op(*, share: float):
    def mirror(record, rng):
      seen = record.volume if rng.random() > share else record.volume[..., ::-1, :]
      return dataclasses.replace(record, volume=np.ascontiguousarray(seen))
    return mirror

  monkeypatch.setitem(ops.OPS, "mirror", mirror_op)
  mirrored = []
  for seed in range(6):
    data = open_clips(
        write([8, 8], home=f"again_{seed}"), seed=seed,
        ops=[{"name": "mirror", "share": 0.5}],
    )
    # The brightest voxel is the last of a row.
    record = data.splits["train"][0]
    at_end = record.volume[:, -1, -1, -1, 0] > record.volume[:, -1, -1, 0, 0]
    assert at_end.all() or not at_end.any()
    mirrored.append(not at_end[0])
  assert 0 < sum(mirrored) < 6


@pytest.mark.parametrize("op", [
    dict(name="crop_foreground"), dict(name="normalize_intensity"),
    dict(name="scale_percentiles", lower=1.0, upper=99.0),
    dict(name="clip_percentiles", lower=1.0, upper=99.0),
])
def test_ops_that_go_by_the_values_of_one_time_point_are_refused(write, op):
  with pytest.raises(ValueError, match=f"{op['name']}.*one time point"):
    open_clips(write([8, 8]), ops=[op])


def test_the_time_step_is_the_movie_s_not_that_of_a_file(write, tmp_path):
  manifest = write([8, 8])
  for path in (tmp_path / "nih-ls" / "emb_0" / "images").iterdir():
    tifffile.imwrite(
        path, tifffile.imread(path), imagej=True,
        metadata={"axes": "ZYX", "finterval": 0.05, "unit": "um", "spacing": 2.0},
        resolution=(1.0, 1.0),
    )
  assert open_clips(manifest).splits["train"][0].spacing[0] == 60
  rewrite(manifest, "\t60\t", "\t\t")
  assert math.isnan(open_clips(manifest).splits["train"][0].spacing[0])


def test_a_time_point_of_another_type_is_bad(write, tmp_path):
  manifest = write([12, 12])
  path = tmp_path / "nih-ls" / "emb_0" / "images" / "emb_0_t007.tif"
  tifffile.imwrite(
      path, (volume(0, 7) // 5).astype(np.uint8), metadata=None,
      photometric="minisblack",
  )
  data = open_clips(manifest)
  (bad,) = data.quarantine
  assert bad.path == str(path) and bad.reason == "irregular_frames"
  assert "uint8" in bad.detail and "uint16" in bad.detail
  assert all(7 not in row.numbers for row in data.splits["train"].rows)


def test_what_is_wrong_with_a_whole_movie_is_told_of_each_of_its_files(write):
  manifest = write([8, 8, 8])
  rewrite(manifest, "[0.002, 0.001, 0.001]", "", 1)
  data = open_clips(manifest, require_spacing=True)
  told = [(bad.path, bad.reason) for bad in data.quarantine]
  assert len(set(told)) == 8 and {reason for _, reason in told} == {"missing_spacing"}


def test_an_unknown_time_step_is_bad_where_it_is_required(write):
  manifest = write([8, 8])
  assert not open_clips(manifest, require_time_step=True).quarantine
  rewrite(manifest, "\t60\t", "\t\t", 1)
  assert not open_clips(manifest).quarantine
  with pytest.raises(DataError, match="8 missing_spacing .*time_step_s is unknown"):
    open_clips(manifest, require_time_step=True)
