"""Phantom embryos: the layout of NIH-LS, stages that show and intensity that does not."""

import csv
import subprocess
import sys

import numpy as np
import pytest

from vjepa_jax.data import phantom_embryos, pipeline, stages

tifffile = pytest.importorskip("tifffile", reason="extra formats is not installed")
SMALL = dict(embryos={"train": 2, "validation": 1}, frames=16, shape=(8, 16, 16), seed=3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp("worm") / "corpus"
  return phantom_embryos.write_embryo_corpus(folder, **SMALL)


@pytest.fixture(scope="module")
def drawn():
  """Returns movies [N, T, Z, Y, X] and stages [N, T] of embryos of full size."""
  found = [phantom_embryos.embryo(np.random.default_rng([7, n])) for n in range(16)]
  return np.stack([movie for movie, _ in found]), [truth for _, truth in found]


def rows(manifest):
  with manifest.open(newline="") as file:
    return list(csv.DictReader(file, delimiter="\t"))


def test_the_layout_is_that_of_nih_ls(corpus):
  table = rows(corpus)
  assert tuple(table[0]) == phantom_embryos.COLUMNS
  assert [row["split"] for row in table] == ["train", "train", "validation"]
  for row in table:
    folder = corpus.parent / row["filepath"]
    name = row["participant_id"]
    files = sorted(path.name for path in (folder / "images").iterdir())
    assert files == [f"{name}_t{t:03d}.tif" for t in range(16)]
    volume = tifffile.imread(folder / "images" / files[3])
    assert volume.shape == (8, 16, 16) and volume.dtype == np.uint16
    assert (folder / "tracks" / "tracks_polar_bodies.txt").exists()


def test_tracks_count_the_nuclei_and_lie_within_the_volume(corpus):
  number = 1
  folder = corpus.parent / rows(corpus)[number - 1]["filepath"]
  rng = np.random.Generator(np.random.SFC64((SMALL["seed"], number)))
  _, truth = phantom_embryos.embryo(rng, frames=16, shape=(8, 16, 16))
  data = (folder / "tracks" / "tracks.txt").read_bytes()
  counts, losses = stages.read_tracks(data, "tracks.txt")
  assert not losses and counts == dict(enumerate(truth.counts.tolist()))
  ids = {int(track["cell_id"]) for track in truth.tracks}
  parents = [int(track["parent_id"]) for track in truth.tracks]
  assert len(ids) == len(truth.tracks)
  assert all(parent == -1 or parent in ids for parent in parents)
  assert parents.count(-1) == 1
  for axis, size in zip("zyx", (8, 16, 16), strict=True):
    places = np.array([float(track[axis]) for track in truth.tracks])
    assert np.mean((places > -1) & (places < size)) > 0.97


def test_stages_follow_one_another_and_are_all_there(drawn):
  for truth in drawn[1]:
    assert (np.diff(truth.stages) >= 0).all() and set(truth.stages) == set(range(8))
    early = truth.stages < 6
    by_count = np.minimum(np.log2(truth.counts[early]).astype(int), 5)
    np.testing.assert_array_equal(truth.stages[early], by_count)
  shares = np.bincount(np.concatenate([t.stages for t in drawn[1]])) / (16 * 64)
  assert shares.max() < 0.17 and shares.min() > 0.07
  starts = {tuple(np.searchsorted(t.stages, range(1, 8))) for t in drawn[1]}
  assert len(starts) == 16


def ridge(features, labels, train) -> float:
  """Returns the best accuracy over penalties on embryos that were not fitted."""
  mean, std = features[train].mean(axis=0), features[train].std(axis=0)
  inputs = np.c_[(features - mean) / std, np.ones(len(features))]
  targets, found = np.eye(8)[labels], []
  for penalty in (1e-3, 1e-1, 1, 10, 100):
    square = inputs[train].T @ inputs[train] + penalty * np.eye(inputs.shape[1])
    weights = np.linalg.solve(square, inputs[train].T @ targets[train])
    found.append(((inputs[~train] @ weights).argmax(axis=1) == labels[~train]).mean())
  return max(found)


def statistics(volumes):
  flat = volumes.reshape(-1, np.prod(volumes.shape[2:]))
  return np.stack([
      flat.mean(axis=1), flat.std(axis=1), np.percentile(flat, 1, axis=1),
      np.percentile(flat, 99, axis=1),
  ], axis=1)


def spectrum(volumes):
  """Returns the log power of 15 shells of spatial frequency."""
  volumes = volumes.reshape(-1, *volumes.shape[2:])
  power = np.abs(np.fft.rfftn(volumes, axes=(1, 2, 3))) ** 2
  steps = [np.fft.fftfreq(16) / 2.2, np.fft.fftfreq(32) / 1.8, np.fft.rfftfreq(32) / 1.8]
  waves = np.sqrt(sum(k**2 for k in np.meshgrid(*steps, indexing="ij")))
  shells = np.digitize(waves, np.linspace(0.01, 0.3, 15))
  return np.log(np.stack([power[:, shells == n].mean(axis=1) for n in range(16)], axis=1))


def test_intensity_says_little_of_the_stage_and_texture_says_much(drawn):
  movies = drawn[0].astype(np.float32)
  low, high = np.percentile(movies, (0.5, 99.8), axis=(1, 2, 3, 4), keepdims=True)
  scaled = np.clip((movies - low) / (high - low), 0, 1)
  labels = np.concatenate([truth.stages for truth in drawn[1]])
  train = np.repeat(np.arange(16) < 12, 64)
  assert ridge(statistics(movies), labels, train) < 0.4
  assert ridge(statistics(scaled), labels, train) < 0.4
  assert ridge(spectrum(scaled), labels, train) > 0.7


def test_light_bleaches_and_the_egg_drifts_by_embryo(drawn):
  means = drawn[0].mean(axis=(2, 3, 4)) - 100
  change = means[:, -8:].mean(axis=1) / means[:, :8].mean(axis=1)
  assert change.max() > 1.1 and change.min() < 0.8
  assert means.mean(axis=1).max() > 2 * means.mean(axis=1).min()


def test_equal_seeds_write_equal_bytes_and_others_do_not(corpus, tmp_path):
  again = phantom_embryos.write_embryo_corpus(tmp_path / "again", **SMALL)
  other = phantom_embryos.write_embryo_corpus(tmp_path / "other", **SMALL | {"seed": 4})
  for path in sorted(corpus.parent.rglob("*")):
    if path.is_file():
      name = path.relative_to(corpus.parent)
      assert (again.parent / name).read_bytes() == path.read_bytes()
  name = "nih-ls/phantom_diSPIM_1/images/phantom_diSPIM_1_t000.tif"
  assert (other.parent / name).read_bytes() != (corpus.parent / name).read_bytes()


def test_a_second_call_writes_nothing_and_other_options_are_refused(corpus):
  before = {p: p.stat().st_mtime_ns for p in corpus.parent.rglob("*")}
  assert phantom_embryos.write_embryo_corpus(corpus.parent, **SMALL) == corpus
  assert before == {p: p.stat().st_mtime_ns for p in corpus.parent.rglob("*")}
  with pytest.raises(ValueError, match="other options"):
    phantom_embryos.write_embryo_corpus(corpus.parent, **SMALL | {"seed": 5})


def test_tifffile_missing_names_the_extra_and_leaves_nothing(tmp_path):
  script = (
      "import sys; sys.modules['tifffile'] = None\n"
      "from vjepa_jax.data import ReadError, phantom_embryos\n"
      "try: phantom_embryos.write_embryo_corpus(sys.argv[1])\n"
      "except ReadError as e: print(e.reason, e)"
  )
  done = subprocess.run(
      [sys.executable, "-c", script, str(tmp_path / "c")], capture_output=True,
      text=True, check=True,
  )
  for word in ("missing_extra", "tifffile", "vjepa_jax[formats]", str(tmp_path / "c")):
    assert word in done.stdout
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [
    dict(embryos={}), dict(embryos={"train": -1}), dict(frames=7), dict(shape=(3, 9, 9)),
])
def test_numbers_out_of_range_are_refused_and_leave_nothing(tmp_path, options):
  with pytest.raises(ValueError):
    phantom_embryos.write_embryo_corpus(tmp_path / "c", **SMALL | options)
  assert not list(tmp_path.iterdir())


def test_the_corpus_goes_through_the_pipeline_with_its_true_stages(corpus):
  data = pipeline.open_data(
      str(corpus), canvas=(8, 16, 16), resample="spacing",
      spacing_mm=(0.0044, 0.0036, 0.0036), splits="split", clip=dict(frames=4, stride=2),
      stages=dict(taxonomy="phantom8", sources=("table",)),
  )
  assert data.labels == phantom_embryos.STAGES and not data.quarantine
  assert data.report["stages"]["dropped"] == {} and data.report["padding"] == 0
  record = data.splits["train"][0]
  np.testing.assert_allclose(record.spacing, [120, 0.0044, 0.0036, 0.0036], 1e-5)
  shown = data.splits["train"].stage_ids
  assert shown.shape == (2 * (16 - 6), 4) and (np.diff(shown, axis=1) >= 0).all()
