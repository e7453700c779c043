"""No damage to a file crashes, hangs or floods a reader, or gives wrong voxels."""

import collections
import os

import numpy as np
import pytest

from tests.data import mutations, seeds
from vjepa_jax import data

LOSSY = ("dicom_jpeg", "tiff_jpeg", "mp4", "avi", "gif")
VENDORS = ("vol", "e2e", "fda", "fda_jpeg", "fds", "bioptigen", "zeiss")


def _defects(outcomes) -> list[str]:
  return [
      f"--only={o.name}:{o.number} {o.kind} [{o.label}] {o.detail}"
      for o in outcomes if o.kind.startswith("DEFECT")
  ]


def test_every_format_has_a_sound_seed_with_its_own_voxels(tmp_path):
  assert mutations.usable() == list(seeds.SEEDS)
  for name in seeds.SEEDS:
    if name in (*LOSSY, *VENDORS) or name.startswith(("nifti", "time_points")):
      continue  # Compared in their own tests; these are made otherwise.
    voxels = mutations._sound_voxels(name)[0, ..., 0]
    wanted = seeds.make_voxels(voxels.dtype).astype(np.float64)
    wanted = wanted - 1024 if name.startswith("series") else wanted
    np.testing.assert_allclose(voxels, wanted, rtol=1e-6, err_msg=name)


def test_a_number_names_the_same_mutation_for_good():
  for name in ("dicom_j2k", "series", "tiff_ome", "hdf5", "mp4", "npz_deflated"):
    again = seeds.SEEDS[name]()
    assert again.files == mutations.load_seed(name).files, name
  for number in (0, 40, 1_000_040):
    first = mutations.make_case("dicom_j2k", number)
    assert first == mutations.make_case("dicom_j2k", number)
  labels = {mutations.make_case("dicom_j2k", n).label for n in range(30, 80)}
  assert len(labels) > 40


_HOSTILE = ("dicom_deflated", "nifti_gz", "series_zip", "npz", "hdf5_gzip")


@pytest.fixture(scope="module")
def outcomes():
  """Of hostile files, of what was found once, and of some mutations of each format."""
  cases = [
      (name, number)
      for name in _HOSTILE for number in range(len(mutations._hostile_cases(name)))
  ]
  # Beyond the hostile files, which come first.
  cases += [(name, 7_000_100 + n) for name in seeds.SEEDS for n in range(7)]
  cases = {*cases, *mutations.FOUND}
  return list(mutations.run(sorted(cases), workers=2))


def test_mutated_and_hostile_files_do_no_harm(outcomes):
  assert not _defects(outcomes)
  kinds = collections.Counter(o.kind for o in outcomes)
  assert len(outcomes) > 400 and kinds["record"] > 90 and kinds["truncated"] > 50, kinds


def test_bombs_are_refused_or_left_packed(outcomes):
  bombs = [o for o in outcomes if "bomb" in o.label]
  assert len(bombs) >= 12
  assert max(o.peak_mib for o in bombs) < mutations.PEAK_MIB


def test_a_path_that_leaves_an_archive_is_refused(outcomes):
  found = {o.label: o.kind for o in outcomes if o.label.startswith("path ")}
  assert len(found) >= 5 and set(found.values()) == {"path_escape"}, found


@pytest.mark.slow
def test_thousands_of_mutations_do_no_harm():
  outcomes = list(
      mutations.run(mutations.plan(list(seeds.SEEDS), 5040, 1), workers=2)
  )
  print(mutations.table(outcomes))
  assert not _defects(outcomes)


_FAULTS = {
    "raise RuntimeError('no')": "DEFECT RuntimeError",
    "return np.zeros(1)": "DEFECT ndarray for a Record",
    "np.ones(500 << 20, np.uint8); raise error": "DEFECT memory",
    "time.sleep(60)": "DEFECT hang",
    "os.abort()": "DEFECT died SIGABRT",
}
_BREAK = """
import os, sys, time
import numpy as np
faults = {faults}
if any("mutations.work" in part for part in sys.orig_argv):
  from tests.data import libraries, mutations
  from vjepa_jax import data
  mutations.ALARM_S = 8
  judge = mutations.judge
  def judge_broken(name, number, folder):
    mutations._sound_voxels(name)
    def read(path, **options):
      error = data.ReadError(path, "truncated")
      here = dict(globals()) | dict(error=error)
      exec("def act():\\n " + faults[number - 50], here)
      return here["act"]()
    data.read = read
    return judge(name, number, folder)
  mutations.judge = judge_broken
"""


def test_the_judge_sees_a_reader_that_fails(monkeypatch, tmp_path):
  """In a process that dies or hangs no assertion can, so its reader is broken here."""
  text = _BREAK.format(faults=list(_FAULTS))
  (tmp_path / "sitecustomize.py").write_text(text)
  monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '.')}")
  cases = [("npy", 50 + index) for index in range(len(_FAULTS))]
  outcomes = mutations.run(cases, workers=1)
  found = {o.number: o.kind for o in outcomes}
  assert found == {50 + n: kind for n, kind in enumerate(_FAULTS.values())}


def test_the_judge_sees_zeros_and_voxels_that_differ(tmp_path):
  sound = mutations._sound_voxels("npy")
  case = mutations.make_case("npy", 50)
  path = tmp_path / "scan.npy"
  np.save(path, sound[0, ..., 0])

  def look(volume, label="flip 1"):
    record = data.Record(volume, np.full(4, np.nan), "x")
    judged = mutations.dataclasses.replace(case, label=label)
    return mutations._check_record(record, sound, judged, str(path), "npy")[0]

  changed = sound.copy()
  changed[0, 0, 0, 0, 0] += 1
  assert look(sound) == "record"
  assert look(changed) == "DEFECT differs"
  assert look(sound[:, :3], "truncate to 9") == "DEFECT filled"
  path.write_bytes(b"not an array")
  assert look(np.zeros_like(sound)) == "DEFECT zeros"
  assert look(changed) == "record alone"
