"""The phantom corpus: real OPT DICOM, four dialects, balanced and repeatable."""

import collections
import csv

import numpy as np
import pydicom
import pytest

from vjepa_jax.data import phantoms

PATIENTS = {"train": 4, "probe": 8, "validation": 4}
OPT = "1.2.840.10008.5.1.4.1.1.77.1.5.4"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp("oct") / "corpus"
  return phantoms.write_oct_corpus(folder, patients=PATIENTS, seed=3, broken=3)


def _rows(manifest):
  with manifest.open(newline="") as file:
    return list(csv.DictReader(file, delimiter="\t"))


def _path(manifest, row):
  return manifest.parent / row["filepath"].lstrip("/")


def _sound(manifest):
  return _rows(manifest)[:-3]


def _first(manifest, device):
  row = next(r for r in _sound(manifest) if r["device"] == device)
  return pydicom.dcmread(_path(manifest, row))


def _phantom(pathology="normal", device="heidelberg_spectralis", seed=0, **options):
  return phantoms.oct_phantom(
      np.random.default_rng(seed), pathology=pathology, device=device,
      **{"laterality": "R", **options},
  )  # yapf: disable


def test_every_sound_file_is_multi_frame_opt_with_the_pixels_it_promises(corpus):
  for row in _sound(corpus):
    dataset = pydicom.dcmread(_path(corpus, row))
    machine = phantoms.DEVICES[row["device"]]
    assert dataset.SOPClassUID == OPT and dataset.Modality == "OPT"
    assert dataset.SOPInstanceUID == row["sop_instance_uid"]
    assert dataset.ImageLaterality == row["laterality"]
    assert dataset.Manufacturer == row["manufacturer"]
    frames = int(row["number_of_frames"])
    assert len(dataset.PerFrameFunctionalGroupsSequence) == frames
    pixels = dataset.pixel_array
    assert pixels.shape == (frames, int(row["height"]), int(row["width"]))
    assert pixels.max() < 2**machine.bits and pixels.std() > 0


def test_manifest_has_the_columns_of_the_source_and_ours(corpus):
  assert tuple(_rows(corpus)[0]) == phantoms.COLUMNS
  assert all(row["filepath"].startswith("/retinal_oct/") for row in _rows(corpus))


def test_spectralis_keeps_spacing_and_place_in_each_frame(corpus):
  dataset = _first(corpus, "heidelberg_spectralis")
  shared = dataset.SharedFunctionalGroupsSequence[0]
  frames = dataset.PerFrameFunctionalGroupsSequence
  assert "PixelMeasuresSequence" not in shared
  dy, dx = frames[0].PixelMeasuresSequence[0].PixelSpacing
  extent = (len(frames), dataset.Rows, dataset.Columns)
  field = phantoms.DEVICES["heidelberg_spectralis"].field_mm
  places = [f.PlanePositionSequence[0].ImagePositionPatient for f in frames]
  pitch = np.diff(np.array(places, float), axis=0)
  np.testing.assert_allclose(np.linalg.norm(pitch, axis=1), field[0] / extent[0], 1e-4)
  np.testing.assert_allclose([dy, dx], np.divide(field[1:], extent[1:]), rtol=1e-4)
  assert len(frames[0].OphthalmicFrameLocationSequence[0].ReferenceCoordinates) == 4


def test_triton_stores_twelve_bits_in_sixteen_with_a_rescale(corpus):
  dataset = _first(corpus, "topcon_triton")
  shared = dataset.SharedFunctionalGroupsSequence[0]
  assert (dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit) == (16, 12, 11)
  assert shared.PixelValueTransformationSequence[0].RescaleSlope == 2
  assert "SliceThickness" in shared.PixelMeasuresSequence[0]
  assert dataset.pixel_array.max() > 255


def test_maestro2_keeps_the_pitch_at_the_top_and_no_positions(corpus):
  dataset = _first(corpus, "topcon_maestro2")
  frames = dataset.PerFrameFunctionalGroupsSequence
  assert dataset.SpacingBetweenSlices > 0
  assert all("PlanePositionSequence" not in frame for frame in frames)


def test_cirrus_is_monochrome1_and_forgets_the_spacing_of_every_fourth_file(corpus):
  sets = [
      pydicom.dcmread(_path(corpus, r))
      for r in _sound(corpus) if r["device"] == "zeiss_cirrus"
  ]  # yapf: disable
  assert {d.PhotometricInterpretation for d in sets} == {"MONOCHROME1"}
  # Stored inverted: the vitreous, dark to the eye, has the larger numbers.
  assert all(d.pixel_array[:, :8].mean() > d.pixel_array.mean() for d in sets)
  lacking = [
      "PixelMeasuresSequence" not in d.SharedFunctionalGroupsSequence[0] for d in sets
  ]
  assert lacking == [i % 4 == 3 for i in range(len(sets))] and any(lacking)


def test_the_corpus_uses_four_transfer_syntaxes_without_loss(tmp_path):
  manifest = phantoms.write_oct_corpus(
      tmp_path / "c", patients={"probe": 48}, broken=0
  )
  seen = collections.Counter()
  for row in _rows(manifest):
    dataset = pydicom.dcmread(_path(manifest, row), defer_size=4096)
    syntax = dataset.file_meta.TransferSyntaxUID
    seen[syntax.keyword] += 1
    if syntax.is_compressed and seen[syntax.keyword] == 1:
      scans = phantoms._plan({"probe": 48}, 0, 0)
      scan = next(s for s in scans if s.uid("instance") == row["sop_instance_uid"])
      drawn, _ = phantoms.oct_phantom(
          np.random.Generator(np.random.SFC64(scan.seed + (ord(scan.laterality),))),
          pathology=scan.pathology, device=scan.device, laterality=scan.laterality,
          traits=phantoms.patient_traits(
              np.random.Generator(np.random.SFC64(scan.seed))
          ),
      )  # yapf: disable
      np.testing.assert_array_equal(dataset.pixel_array, drawn)
  assert set(seen) == {
      "ExplicitVRLittleEndian", "RLELossless", "JPEGLSLossless", "JPEG2000Lossless"
  }  # yapf: disable
  assert seen["ExplicitVRLittleEndian"] > 0.8 * sum(seen.values())


def test_equal_seeds_write_equal_bytes_and_others_do_not(corpus, tmp_path):
  again = phantoms.write_oct_corpus(
      tmp_path / "again", patients=PATIENTS, seed=3, broken=3
  )
  other = phantoms.write_oct_corpus(
      tmp_path / "other", patients=PATIENTS, seed=4, broken=3
  )
  assert again.read_bytes() == corpus.read_bytes()
  for row in _rows(corpus)[::3]:
    assert _path(again, row).read_bytes() == _path(corpus, row).read_bytes()
  ours, theirs = _rows(corpus)[0], _rows(other)[0]
  assert ours["sop_instance_uid"] != theirs["sop_instance_uid"]
  pixels = [
      pydicom.dcmread(_path(m, r)).pixel_array
      for m, r in ((corpus, ours), (other, theirs))
  ]  # yapf: disable
  assert not np.array_equal(*pixels)


def test_a_second_call_writes_nothing_and_other_options_are_refused(corpus):
  before = {p: p.stat().st_mtime_ns for p in corpus.parent.rglob("*")}
  assert corpus == phantoms.write_oct_corpus(
      corpus.parent, patients=PATIENTS, seed=3, broken=3
  )
  assert before == {p: p.stat().st_mtime_ns for p in corpus.parent.rglob("*")}
  with pytest.raises(ValueError, match="other options"):
    phantoms.write_oct_corpus(corpus.parent, patients=PATIENTS, seed=5, broken=3)


def test_a_folder_of_other_things_is_left_alone(tmp_path):
  (tmp_path / "thesis.txt").write_text("do not lose")
  with pytest.raises(ValueError, match="name another folder"):
    phantoms.write_oct_corpus(tmp_path, patients={"train": 1})
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_call_leaves_no_half_corpus(tmp_path, monkeypatch):
  monkeypatch.setattr(phantoms, "COLUMNS", ("participant_id",))
  with pytest.raises(ValueError):
    phantoms.write_oct_corpus(tmp_path / "c", patients={"train": 1}, broken=0)
  assert not list(tmp_path.iterdir())


def test_no_patient_is_in_two_splits_and_only_train_is_unlabelled(corpus):
  homes = collections.defaultdict(set)
  for row in _rows(corpus):
    homes[row["participant_id"]].add(row["split"])
    assert bool(row["pathology"]) == (row["split"] != "train")
  assert all(len(splits) == 1 for splits in homes.values())
  assert len(homes) == sum(PATIENTS.values())


def test_the_full_plan_is_balanced_and_has_the_promised_sizes():
  scans = phantoms._plan(phantoms.PATIENTS, 0, 6)
  sound = [s for s in scans if not s.breakage]
  assert collections.Counter(s.split for s in sound) == {
      "train": 220, "probe": 304, "validation": 32
  }  # yapf: disable
  assert len(scans) - len(sound) == 6
  probe = [s for s in sound if s.split == "probe"]
  assert set(collections.Counter(s.pathology for s in probe).values()) == {76}
  for s in ("device", "site"):
    table = collections.Counter((getattr(v, s), v.pathology) for v in probe)
    assert max(table.values()) - min(table.values()) <= 4, s
  eyes = collections.Counter((s.participant, s.laterality) for s in sound)
  assert set(eyes.values()) == {1} and len(eyes) == len(sound)
  assert len({s.path for s in scans}) == len(scans)


def test_broken_files_are_each_broken_in_their_way(corpus):
  no_pixels, truncated, wrong = (
      _path(corpus, row) for row in _rows(corpus)[-3:]
  )
  assert "PixelData" not in pydicom.dcmread(no_pixels)
  with pytest.raises(Exception, match="(?i)length|bytes|EOF|end of file"):
    _ = pydicom.dcmread(truncated).pixel_array
  assert pydicom.dcmread(wrong).Modality == "OP"


@pytest.mark.parametrize("device", phantoms.DEVICES)
def test_the_vitreous_is_dark_and_at_the_top_and_the_rpe_is_bright(device):
  volume, truth = _phantom(device=device)
  bounds = truth["surfaces"]
  assert (np.diff(bounds, axis=0) > -1e-3).all()  # surfaces keep their order
  assert bounds.min() > 0 and bounds[-2].max() < volume.shape[1]
  y = np.arange(volume.shape[1])[None, :, None] + 0.5
  vitreous = volume[y + 2 < bounds[0][:, None]].mean()
  rpe = (y > bounds[7][:, None]) & (y < bounds[8][:, None])
  below = volume[(y > bounds[9][:, None]) & (y < bounds[10][:, None])].mean()
  assert vitreous < 0.5 * below < volume[rpe].mean()


def test_the_fovea_is_a_pit_and_the_nerve_fibres_are_thicker_nasally():
  for laterality in "RL":
    _, truth = _phantom(laterality=laterality)
    rnfl = truth["surfaces"][1] - truth["surfaces"][0]
    inner = truth["surfaces"][3] - truth["surfaces"][0]
    middle = np.s_[inner.shape[0] // 2, inner.shape[1] // 3:-inner.shape[1] // 3]
    assert inner[middle].min() < 0.6 * np.median(inner)
    edges = rnfl[:, -20:].mean() - rnfl[:, :20].mean()
    assert (edges > 0) == (laterality == "R")


def test_lesions_are_where_the_truth_says():
  volume, truth = _phantom("fluid", seed=1)
  bounds, lesion = truth["surfaces"], truth["lesion"]
  y = np.arange(volume.shape[1])[None, :, None] + 0.5
  retina = (y > bounds[2][:, None]) & (y < bounds[6][:, None])
  assert lesion.sum() > 200
  assert volume[lesion].mean() < 0.6 * volume[retina & ~lesion].mean()
  for pathology in ("drusen", "thinning"):
    assert _phantom(pathology)[1]["lesion"].any()
  assert not _phantom("normal")[1]["lesion"].any()


def test_pathologies_change_the_layers_they_should():
  def build(pathology):
    traits = phantoms.patient_traits(np.random.default_rng(9))
    return _phantom(pathology, seed=5, traits=traits)[1]["surfaces"]

  normal = build("normal")
  inner = lambda s: (s[2] - s[0]).mean()
  lift = lambda s: (s[9] - s[8]).max()
  assert inner(build("thinning")) < 0.85 * inner(normal)
  assert lift(build("drusen")) > 2 * lift(normal)


def test_an_unknown_name_lists_the_closest():
  with pytest.raises(KeyError, match="closest are drusen"):
    _phantom("druzen")
  with pytest.raises(KeyError, match="topcon_triton"):
    _phantom(device="topcon_tritn")


@pytest.mark.slow
def test_intensity_hardly_tells_the_class_and_the_layers_do():
  """Nearest class mean on standardised features, trained and tested by patient."""
  stats, profiles, labels = [], [], []
  for p in range(160):
    rng = np.random.Generator(np.random.SFC64([11, p]))
    pathology = phantoms.PATHOLOGIES[p % 4]
    device = list(phantoms.DEVICES)[p // 4 % 4]
    volume, truth = _phantom_of(rng, pathology, device)
    values = volume / (2.0 ** phantoms.DEVICES[device].bits - 1)
    stats.append([values.mean(), values.std(), *np.percentile(values, [5, 25, 75, 95])])
    thick = np.diff(truth["surfaces"], axis=0) * truth["spacing_mm"][1]
    profiles.append([*thick.mean((1, 2)), *thick.std((1, 2)), truth["lesion"].mean()])
    labels.append(p % 4)
  assert _nearest_mean(stats, labels) < 0.42
  assert _nearest_mean(profiles, labels) > 0.7


def _phantom_of(rng, pathology, device):
  return phantoms.oct_phantom(
      rng, pathology=pathology, device=device, laterality="R"
  )


def _nearest_mean(features, labels):
  x, y = np.array(features), np.array(labels)
  x = (x - x.mean(0)) / (x.std(0) + 1e-9)
  train = np.arange(len(y)) % 8 < 4
  means = np.stack([x[train & (y == c)].mean(0) for c in range(4)])
  guess = ((x[~train, None] - means) ** 2).sum(-1).argmin(-1)
  return (guess == y[~train]).mean()
