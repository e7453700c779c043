"""Claims of data/manifest.py."""

import collections
import json
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from vjepa_jax.data import manifest as m
from vjepa_jax.data.manifest import Row
from vjepa_jax.data.record import DataError, ReadError

HEAD = (
    "participant_id", "anatomic_region", "imaging", "laterality", "number_of_frames",
    "pixel_spacing", "slice_thickness", "filepath",
)


def line(person="1001", path="/oct/topcon_triton/1001/a.dcm", **more):
  cells = {
      "participant_id": person, "anatomic_region": "Macula", "imaging": "OCT",
      "laterality": "L", "number_of_frames": "60",
      "pixel_spacing": "[0.003872, 0.01206]", "slice_thickness": "0.12",
      "filepath": path, **more,
  }
  return cells


@pytest.fixture
def write(tmp_path):
  def write_table(rows, name="manifest.tsv", head=None):
    head = head or list(HEAD) + sorted({k for r in rows for k in r} - set(HEAD))
    mark = "," if name.endswith("csv") else "\t"
    cell = lambda v: f'"{v}"' if mark in v else v  # noqa: E731
    lines = [head] + [[cell(r.get(k, "")) for k in head] for r in rows]
    path = tmp_path / name
    path.write_text("\n".join(mark.join(row) for row in lines) + "\n")
    return str(path)

  return write_table


@pytest.mark.parametrize("name", ["manifest.tsv", "manifest.csv", "manifest.txt"])
def test_a_row_keeps_what_the_manifest_says(write, tmp_path, name):
  row, = m.read_manifest(write([line()], name)).rows
  assert row.path == str(tmp_path / "oct/topcon_triton/1001/a.dcm")
  assert (row.participant, row.device) == ("1001", "topcon_triton")
  assert (row.region, row.imaging, row.laterality) == ("Macula", "OCT", "L")
  assert row.geometry == "raster" and row.label is None and row.site == "unknown"
  assert row.spacing == (0.12, 0.003872, 0.01206)


def test_all_missing_columns_are_listed_with_what_was_found(write):
  row = {"participant": "1", "file_path": "a"}
  path = write([row], head=["participant", "file_path"])
  with pytest.raises(DataError) as caught:
    m.read_manifest(path)
  for word in ("participant_id (closest: participant)", "filepath (closest: file_path)",
               "Found: participant, file_path"):
    assert word in str(caught.value)


def test_columns_of_other_names_can_be_mapped(write):
  path = write([{"who": "7", "where": "a.dcm"}], head=["who", "where"])
  names = {"participant_id": "who", "filepath": "where"}
  row, = m.read_manifest(path, columns=names).rows
  assert row.participant == "7"


def test_a_missing_manifest_is_a_read_error(tmp_path):
  with pytest.raises(ReadError, match="missing_file"):
    m.read_manifest(str(tmp_path / "absent.tsv"))


def test_the_device_is_a_column_or_a_path_component_else_unknown(write):
  rows = m.read_manifest(write([
      line(path="/oct/heidelberg_spectralis/1/a.dcm", device=""),
      line(path="/oct/my_topcon_triton_copy/1/b.dcm", device=""),
      line(path="/oct/zeiss_cirrus/1/c.dcm", device="other"),
  ])).rows
  assert [r.device for r in rows] == ["heidelberg_spectralis", "unknown", "other"]
  assert m.count(rows, "device")["unknown"] == 1


def test_geometry_and_spacing_of_frames_that_vary_are_not_invented(write):
  varies, single, bad = m.read_manifest(write([
      line(path="a", pixel_spacing="Varies by frame"),
      line(path="b", number_of_frames="1"),
      line(path="c", pixel_spacing="[0, -1]", slice_thickness="abc"),
  ])).rows
  assert varies.geometry == "varying" and math.isnan(varies.spacing[1])
  assert single.geometry == "line"
  assert all(math.isnan(v) for v in bad.spacing)


def test_dropped_rows_are_counted_by_reason(write):
  table = m.read_manifest(write([
      line(), line(), line(person=""), line(path=""),
      line(path="x", sop_instance_uid="1"), line(path="y", sop_instance_uid="1"),
  ]))
  assert len(table.rows) == 2
  assert table.lost == {
      "duplicate_row": 1, "no_participant": 1, "no_filepath": 1, "duplicate_uid": 1
  }


def test_a_file_of_two_participants_is_an_error_that_names_both(write):
  with pytest.raises(DataError, match="1001 and 1002"):
    m.read_manifest(write([line(), line(person="1002")]))


def test_a_class_named_none_is_a_class_and_an_empty_cell_is_not(write):
  head = ["participant_id", "filepath", "finding"]
  cells = ["none", "drusen", "", "NaN", "n/a"]
  rows = m.read_manifest(write([
      {"participant_id": str(n), "filepath": f"{n}.dcm", "finding": cell}
      for n, cell in enumerate(cells)
  ], head=head), label="finding").rows
  assert [r.label for r in rows] == ["none", "drusen", None, None, None]
  assert m.label_names(rows) == ("drusen", "none")
  assert m.count(rows, "label") == {"unlabelled": 3, "drusen": 1, "none": 1}


def test_labels_splits_and_sites_come_from_participants(write):
  people = write([
      {"participant_id": "1001", "study_group": "healthy", "recommended_split": "train",
       "clinical_site": "UW"},
      {"participant_id": "4001", "study_group": "", "recommended_split": "val",
       "clinical_site": "UCSD"},
  ], "participants.tsv", [
      "participant_id", "study_group", "recommended_split", "clinical_site"
  ])
  table = m.read_manifest(
      write([line(), line("4001", "b"), line("9999", "c")]), participants=people,
      label="study_group", split="recommended_split",
  )
  assert [(r.label, r.split, r.site) for r in table.rows] == [
      ("healthy", "train", "UW"), (None, "val", "UCSD")
  ]
  assert table.lost["not_in_participants"] == 1
  with pytest.raises(DataError, match="study_grop.*closest: study_group"):
    m.read_manifest(write([line()]), participants=people, label="study_grop")


def test_filters_keep_and_excludes_drop_with_a_count(write):
  rows = [line(str(n), f"/oct/topcon_triton/{n}/a.dcm", laterality="LR"[n % 2])
          for n in range(6)]
  table = m.read_manifest(
      write(rows), filters={"laterality": "L"}, exclude={"participant": ["0", "77"]}
  )
  assert [r.participant for r in table.rows] == ["2", "4"]
  assert table.lost["filtered_laterality"] == 3
  assert table.lost["excluded_participant"] == 1


def test_a_filter_that_no_row_meets_and_an_unknown_field_name_the_closest(write):
  path = write([line()])
  with pytest.raises(DataError, match="'topcon_tritn'; closest topcon_triton"):
    m.read_manifest(path, filters={"device": ["topcon_tritn"]})
  with pytest.raises(DataError, match="unknown field 'devise'; closest device"):
    m.read_manifest(path, filters={"devise": ["x"]})


def people(n, labels=("a", "b"), devices=("d1", "d2"), eyes=2):
  return [
      Row(f"{p}/{e}.dcm", str(p), device=devices[p % len(devices)],
          label=labels[p // 2 % len(labels)], laterality="LR"[e % 2])
      for p in range(n) for e in range(eyes)
  ]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(3, 60), seed=st.integers(0, 9), eyes=st.integers(1, 4),
    train=st.floats(0.2, 0.8),
)
def test_splits_part_the_participants_and_lose_no_file(n, seed, eyes, train):
  rows = people(n, eyes=eyes)
  fractions = {"train": train, "validation": (1 - train) / 2, "probe": (1 - train) / 2}
  parts = m.split_by_participant(rows, fractions, seed=seed)
  homes = collections.defaultdict(set)
  for name, part in parts.items():
    assert part
    for row in part:
      homes[row.participant].add(name)
  assert all(len(h) == 1 for h in homes.values())
  dealt = [r.path for part in parts.values() for r in part]
  assert sorted(dealt) == sorted(r.path for r in rows)


def test_splits_are_stratified_and_repeat_by_seed():
  rows = people(80)
  fractions = {"train": 0.75, "test": 0.25}
  parts = m.split_by_participant(rows, fractions, seed=1)
  for field in ("device", "label"):
    assert set(m.count(parts["test"], field).values()) == {20}
  again = m.split_by_participant(rows, fractions, seed=1)
  other = m.split_by_participant(rows, fractions, seed=2)
  assert parts == again and parts != other


def test_one_person_a_stratum_still_fills_every_split_in_proportion():
  rows = people(100, labels=[str(n) for n in range(50)], devices=("d",), eyes=1)
  rows = [Row(r.path, r.participant, label=r.participant) for r in rows]
  parts = m.split_by_participant(rows, {"train": 0.8, "validation": 0.1, "probe": 0.1})
  sizes = {k: len(v) for k, v in parts.items()}
  assert abs(sizes["train"] - 80) <= 2 and min(sizes.values()) >= 9


@pytest.mark.parametrize("fractions, words", [
    ({"train": 0.5, "test": 0.2}, "add to 1"),
    ({"train": 1.2, "test": -0.2}, "positive"), ({}, "add to 1"),
])
def test_bad_shares_are_refused(fractions, words):
  with pytest.raises(DataError, match=words):
    m.split_by_participant(people(6), fractions)


def test_fewer_people_than_splits_is_an_error():
  with pytest.raises(DataError, match="2 participant"):
    m.split_by_participant(people(2), {"a": 0.4, "b": 0.3, "c": 0.3})


def test_a_participant_in_two_splits_of_a_column_is_named():
  rows = [Row("a", "7", split="train"), Row("b", "7", split="test"), Row("c", "8")]
  with pytest.raises(DataError, match="7 in train and test"):
    m.split_by_column(rows)
  parts, missing = m.split_by_column([rows[0], rows[2]])
  assert list(parts) == ["train"] and missing == 1


def test_class_names_are_in_order_of_number_else_of_letter():
  rows = lambda *names: [Row("p", "1", label=n) for n in names]  # noqa: E731
  assert m.label_names(rows("10", "9", None, "2")) == ("2", "9", "10")
  assert m.label_names(rows("fluid", "drusen", "fluid")) == ("drusen", "fluid")


def test_every_site_survives_whatever_its_numbers(write):
  rows = [line(str(k * 1000 + 1), f"{k}.dcm", clinical_site=s)
          for k, s in ((1, "UW"), (4, "UCSD"), (7, "UAB"))]
  found = m.read_manifest(write(rows)).rows
  assert m.count(found, "site") == {"UAB": 1, "UCSD": 1, "UW": 1}


def test_an_empty_cell_of_the_manifest_does_not_hide_the_participants_own(write):
  people = write(
      [{"participant_id": "1", "group": "healthy", "clinical_site": "UW"},
       {"participant_id": "2", "group": "sick", "clinical_site": "UAB"}],
      "people.tsv", ["participant_id", "group", "clinical_site"],
  )
  head = ["participant_id", "filepath", "group", "clinical_site"]
  rows = m.read_manifest(write([
      {"participant_id": "1", "filepath": "a", "group": "", "clinical_site": "n/a"},
      {"participant_id": "2", "filepath": "b", "group": "none", "clinical_site": "X"},
  ], head=head), participants=people, label="group").rows
  assert [(r.label, r.site) for r in rows] == [("healthy", "UW"), ("none", "X")]


JSON_ROWS = [
    {"participant_id": 1, "filepath": "a.nii.gz", "label": 0, "modality": "MR"},
    {"participant_id": 2, "filepath": "b.nii.gz", "label": None,
     "pixel_spacing": [0.5, 0.25], "slice_thickness": 2},
]


@pytest.mark.parametrize("tree", [JSON_ROWS, {"data": JSON_ROWS, "name": "x"}])
def test_json_of_objects_is_a_table(tmp_path, tree):
  path = tmp_path / "m.json"
  path.write_text(json.dumps(tree))
  one, two = m.read_manifest(str(path), label="label").rows
  assert (one.participant, one.label, one.modality) == ("1", "0", "MR")
  assert one.path == str(tmp_path / "a.nii.gz")
  assert (two.label, two.spacing) == (None, (2, 0.5, 0.25))


def test_a_datalist_names_the_split_by_its_key(tmp_path):
  path = tmp_path / "dataset.json"
  path.write_text(json.dumps({
      "name": "brain", "labels": ["background", "tumour"], "numTraining": 2,
      "training": [{"image": "./a.nii.gz", "label": "./a_seg.nii.gz", "subject": "s1"},
                   {"image": "b.nii.gz", "subject": "s2"}],
      "test": ["c.nii.gz"],
  }))
  rows = m.read_manifest(
      str(path), split="split", columns={"participant_id": "filepath"}
  ).rows
  assert [r.split for r in rows] == ["training", "training", "test"]
  people = m.read_manifest(str(path), columns={"participant_id": "subject"})
  assert [r.participant for r in people.rows] == ["s1", "s2"]
  assert people.lost == {"no_participant": 1}
  with pytest.raises(DataError, match="participant_id.*Found: split, filepath, label"):
    m.read_manifest(str(path))


@pytest.mark.parametrize("text,said", [
    ("{", "is not JSON"), ("{\"name\": \"x\"}", "no list of objects"), ("[]", "no list"),
    ("{\"training\": [{\"image\": [\"a\", \"b\"]}]}", "image .* is a list"),
])
def test_json_of_another_kind_is_refused(tmp_path, text, said):
  path = tmp_path / "m.json"
  path.write_text(text)
  with pytest.raises(DataError, match=said):
    m.read_manifest(str(path))


def test_a_row_says_how_its_file_is_to_be_read(write):
  head = ["participant_id", "filepath", "axes", "key", "series_instance_uid",
          "time_step_s", "spacing", "size", "checksum"]
  plain, full = m.read_manifest(write([
      {"participant_id": "1", "filepath": "a.tif"},
      {"participant_id": "1", "filepath": "b.h5", "axes": "tzyx", "key": "raw",
       "series_instance_uid": "1.2.3", "time_step_s": "60", "spacing": "[3, 2, nan]",
       "size": "12", "checksum": "md5:00ff"},
  ], head=head)).rows
  assert set(plain.read_options()) == {"manifest_spacing"}
  options = full.read_options()
  dz, dy, dx = options.pop("manifest_spacing")
  assert (dz, dy) == (3, 2) and math.isnan(dx)
  assert options == dict(axes="TZYX", key="raw", series="1.2.3", time_step_s=60.0)
  assert (full.size, full.checksum) == (12, "md5:00ff")


def test_arrays_of_one_file_are_recordings_of_their_own(write):
  head = ["participant_id", "filepath", "key"]
  table = m.read_manifest(write([
      {"participant_id": "1", "filepath": "a.h5", "key": "x"},
      {"participant_id": "2", "filepath": "a.h5", "key": "y"},
      {"participant_id": "2", "filepath": "a.h5", "key": "y"},
  ], head=head))
  assert len({row.id for row in table.rows}) == 2
  assert table.lost == {"duplicate_row": 1}


def test_what_nobody_asked_to_lose_is_kept_apart(write):
  table = m.read_manifest(
      write([line(), line(person=""), line(path=""), line(), line(path="z", laterality="R")]),
      filters={"laterality": ["L"]},
  )
  assert table.total == 5 and len(table.rows) == 1
  assert sorted(reason for _, reason in table.unexplained) == [
      "no_filepath", "no_participant"
  ]
  assert not m.is_explained("no_split") and m.is_explained("excluded_device")


@pytest.mark.parametrize("name,text", [
    ("a.csv", 'participant_id,filepath,note\n1,a.dcm,"5 mm\n2,b.dcm,x\n'),
    ("a.tsv", 'participant_id\tfilepath\tnote\n1\ta.dcm\t"5 mm\n2\tb.dcm\tx"\n'),
    ("b.tsv", "participant_id\tfilepath\n1\t" + "a" * 200_000 + "\n"),
])
def test_a_quote_that_would_swallow_rows_is_refused(tmp_path, name, text):
  (tmp_path / name).write_text(text)
  with pytest.raises(DataError, match=f"{name}: line [0-9]+ is no row"):
    m.read_manifest(str(tmp_path / name))


def test_a_note_of_several_lines_is_no_fault(tmp_path):
  text = 'participant_id,filepath,note\n1,a.dcm,"left, then\nright"\n2,b.dcm,\n'
  (tmp_path / "a.csv").write_text(text)
  assert len(m.read_manifest(str(tmp_path / "a.csv")).rows) == 2


def test_a_column_that_is_there_twice_is_refused(tmp_path):
  (tmp_path / "a.tsv").write_text("participant_id\tfilepath\tfilepath\n1\ta\tb\n")
  with pytest.raises(DataError, match="filepath are there twice"):
    m.read_manifest(str(tmp_path / "a.tsv"))


def test_a_participant_without_a_name_is_nobody(write, tmp_path):
  people = tmp_path / "people.json"
  people.write_text(json.dumps([{"participant_id": "1001", "age": 4}, {"age": 5}]))
  found = m.read_manifest(write([line()]), participants=str(people))
  assert len(found.rows) == 1
