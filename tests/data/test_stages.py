"""Claims of data/stages.py: which stage a time point shows, and what is left out."""

import json
import random
import time

import pytest

from vjepa_jax.data import answers as answers_lib
from vjepa_jax.data import phantom_embryos, stages
from vjepa_jax.data.record import DataError
from vjepa_jax.data.stages import StageOptions

VLM14 = stages.TAXONOMIES["vlm14"]


def entry(number, response, **more):
  return {
      "timepoint_minutes": number, "frame_index": number,
      "frame_path": f"1_png\\frame_{number}.png", "cell_count": "unknown",
      "response": response, "timestamp": "2024-01-01T00:00:00", **more,
  }


def answers(*entries):
  return stages.read_answers(json.dumps(entries).encode(), "answers.json")


RULED_OUT = (
    "\n## 2. Confidence: **0.85**\n## 3. Reasoning\n- **1-cell** stage: ruled out\n"
    "- ~44-cell: too few\n- could become 2-fold\n"
)


@pytest.mark.parametrize("header, stage", [
    ("## 1. Developmental Stage: **~90-cell**", "~90-cell"),
    ("## 1. Developmental Stage: ~90-cell", "~90-cell"),
    ("1. Developmental Stage: ~90-cell stage", "~90-cell"),
    ("1. **Developmental Stage**: 2-cell", "2-cell"),
    ("**1. Developmental Stage:** 8-cell", "8-cell"),
    ("**Developmental Stage: 1.5-fold**", "1.5-fold"),
    ("### Developmental Stage\n**comma** stage", "comma"),
    ("## 1. Developmental Stage: **~90-cell** (gastrulation stage)", "~90-cell"),
    ("## 1. Developmental Stage: comma (~550 cells)", "comma"),
    ("## 1. Developmental Stage: ~550-cell", "comma"),
    ("## 1. Developmental Stage: gastrulation (~190-cell)", "~190-cell"),
    ("# Developmental Stage Analysis\n\n**~350-cell** (late gastrulation)", "~350-cell"),
    ("# Developmental Stage Analysis\n\nDevelopmental Stage: ~24-cell", "~24-cell"),
    ("Based on the picture:\n\n## 1. Developmental Stage: **3-fold**", "3-fold"),
    ("## 1. DEVELOPMENTAL STAGE: Two-cell stage", "2-cell"),
    ("## 1. Developmental Stage - 14 cells", "~14-cell"),
    ("## 1. Developmental Stage: ~90-cell (104 cells tracked)", "~90-cell"),
    ("## 1. Developmental Stage: four-cell", "4-cell"),
    ("## 1. Developmental Stage: 2\u2010cell", "2-cell"),
    ("## 1. Developmental Stage: **~90\u2011cell** (104 cells)", "~90-cell"),
    ("## 1. Developmental Stage: Two\u2212cell stage", "2-cell"),
    ("## 1. Developmental Stage \u2011 1.5\u2011fold", "1.5-fold"),
    ("# Developmental Stage Analysis\n\n## 1. Developmental Stage: **~90-cell**",
     "~90-cell"),
    ("# Developmental Stage Analysis\n1. **Developmental Stage**: 2-fold", "2-fold"),
    ("## 1. Developmental Stage: **2-cell** (AB and P1)", "2-cell"),
    ("## 1. Developmental Stage: **4-cell** (ABa, ABp, EMS, P2)", "4-cell"),
    ("## 1. Developmental Stage: **8-cell** (pre-gastrulation)", "8-cell"),
    ("## 1. Developmental Stage: **~90-cell** (confidence: 0.85)", "~90-cell"),
    ("## 1. Developmental Stage: **~90-cell** (85% confidence)", "~90-cell"),
    ("## 1. Developmental Stage: **~90-cell** (0.85)", "~90-cell"),
    ("## 1. Developmental Stage: **~90-cell**, confidence 0.85", "~90-cell"),
    ("## 1. Developmental Stage: ~90-cell (104 tracked cells, 138 min)", "~90-cell"),
    ("## 1. Developmental Stage: ~90-cell (tracked count: 104)", "~90-cell"),
    ("## 1. Developmental Stage: elongation (1.5-fold, 85%)", "1.5-fold"),
    ("# Developmental Stage Analysis: 2-fold", "2-fold"),
])
def test_a_header_of_any_form_gives_its_stage_and_nothing_below_it(header, stage):
  assert answers_lib.stage_of_answer(header + RULED_OUT) == (stage, "")


@pytest.mark.parametrize("header, reason", [
    ("## 1. Developmental Stage: **1.5-fold to 2-fold**", "ambiguous"),
    ("## 1. Developmental Stage: **1.5-fold** or **2-fold**", "ambiguous"),
    ("## 1. Developmental Stage: comma/1.5-fold", "ambiguous"),
    ("## 1. Developmental Stage: 1.5-2-fold", "ambiguous"),
    ("## 1. Developmental Stage: ~44 to ~90-cell", "ambiguous"),
    ("## 1. Developmental Stage: 2\u20134 cells", "ambiguous"),
    ("## 1. Developmental Stage: 2\u20114 cells", "ambiguous"),
    ("## 1. Developmental Stage: not 2-cell", "ambiguous"),
    ("## 1. Developmental Stage: comma or later", "ambiguous"),
    ("## 1. Developmental Stage: beyond ~350-cell", "ambiguous"),
    ("## 1. Developmental Stage: 350+ cells", "ambiguous"),
    ("## 1. Developmental Stage: >350-cell", "ambiguous"),
    ("## 1. Developmental Stage: late gastrulation to comma stage", "ambiguous"),
    ("## 1. Developmental Stage: bean/comma", "ambiguous"),
    ("## 1. Developmental Stage: 1.5-fold to pretzel", "ambiguous"),
    ("## 1. Developmental Stage: **~44-cell** (or ~90-cell)", "ambiguous"),
    ("## 1. Developmental Stage: 2-cell ruled out", "ambiguous"),
    ("## 1. Developmental Stage: twenty-four-cell", "unknown stage"),
    ("## 1. Developmental Stage: Twenty-eight-cell stage", "unknown stage"),
    ("## 1. Developmental Stage: ~1,350 cells", "unknown stage"),
    ("## 1. Developmental Stage: 1,2-cell", "unknown stage"),
    ("## 1. Developmental Stage: ~100-cell", "unknown stage"),
    ("## 1. Developmental Stage: 6-cell", "unknown stage"),
    ("## 1. Developmental Stage: gastrulation", "unknown stage"),
    ("## 1. Developmental Stage: 4-fold", "unknown stage"),
    ("## 1. Developmental Stage:", "no stage section"),
    ("## 1. Developmental Stage:\n## 2. Confidence: 2-cell", "no stage section"),
    ("The embryo is a 2-cell embryo.", "no stage section"),
    ("## 2. Confidence: 0.9\n2-cell", "no stage section"),
    ("", "no stage section"),
])
def test_what_is_ambiguous_or_unknown_gets_no_stage(header, reason):
  assert answers_lib.stage_of_answer(header + RULED_OUT) == ("", reason)


@pytest.mark.parametrize("answer", [
    "~44\u2192~90-cell", "1.5 \u2192 2-fold", "bean \u2192 comma", "44~90-cell",
    "1.5, 2-fold", "44 \u2026 90-cell", "44 ... 90-cell", "44 | 90-cell",
    "44; 90-cell", "2-fold 3", "twenty four-cell", "two, four-cell",
    "almost 2-fold", "nearly 2-fold", "just shy of 2-fold", "sub-comma", "semi-comma",
    "isn't 2-cell", "isn\u2019t 2-cell", "previous frame 44-cell", "until 2-fold",
    "possibly 2-fold", "2-fold?", "60% 2-fold",
    "~90-cell (uncertain: could be 44 or 190)", "~90-cell (90-100 cells)",
    "~90-cell (or later)", "2-fold (not quite)", "2-fold (nearly)", "2-fold (?)",
    "~90-cell (44?)", "~90-cell [44]", "~90-cell (44 tracked cells)",
    "~90-cell (cell count: 44)",
])
def test_an_answer_with_a_second_number_or_a_doubt_is_ambiguous(answer):
  for form in (
      "## 1. Developmental Stage: {}", "## 1. Developmental Stage: **{}**",
      "# Developmental Stage Analysis\n\n**{}**",
  ):
    said = answers_lib.stage_of_answer(form.format(answer) + RULED_OUT)
    assert said == ("", "ambiguous")


@pytest.mark.parametrize("preamble", [
    "**Timepoint: 138 min, tracked cell count: 44 cells**", "44 cells",
    "Tracked cell count: 8 cells", "Tracked cell count: 104 cells",
    "(Timepoint: 138 min, 44 cells)", "44 cells tracked at 138 min",
    "The embryo of this picture has 44 cells (104 cells).",
])
def test_what_is_said_below_a_title_is_not_taken_for_the_answer(preamble):
  title = f"# Developmental Stage Analysis\n\n{preamble}\n\n"
  for plain in (
      "## 1. Developmental Stage: **~24-cell**", "## Developmental Stage\n**~24-cell**",
      "## Developmental Stage\n\nTracked cell count: 44 cells\n\n**~24-cell**",
  ):
    assert answers_lib.stage_of_answer(title + plain + RULED_OUT) == ("~24-cell", "")


@pytest.mark.parametrize("told", [
    "Tracked cell count: 44 cells", "**Timepoint: 138 min, 44 cells**",
    "- Number of cells: 44 cells", "Frame 138: 44 cells", "(44 cells tracked)",
])
@pytest.mark.parametrize("header", [
    "## Developmental Stage\n\n", "# Developmental Stage Analysis\n\n",
    "# Developmental Stage Classification: ",
])
def test_a_count_or_a_time_point_below_a_header_is_no_answer(header, told):
  said = header + told
  assert answers_lib.stage_of_answer(said + RULED_OUT) == ("", "no stage section")
  more = f"{said}\n\n**~350-cell** (late gastrulation)"
  assert answers_lib.stage_of_answer(more + RULED_OUT) == ("~350-cell", "")
  for prose in ("44 cells are seen.", "The ~44-cell stage is over.", "Cells: 44 cells"):
    stage, reason = answers_lib.stage_of_answer(f"{said}\n\n{prose}" + RULED_OUT)
    assert (stage, reason) == ("", "ambiguous")


@pytest.mark.parametrize("text", [
    "## Developmental Stage\n\n2-cell by the tracked cell count",
    "# Developmental Stage Analysis: 2-cell at this time point",
    "## Developmental Stage: 44 cells tracked",
])
def test_a_count_or_a_time_point_within_an_answer_makes_it_ambiguous(text):
  assert answers_lib.stage_of_answer(text + RULED_OUT) == ("", "ambiguous")


@pytest.mark.parametrize("first, second, said", [
    ("~24-cell", "~24-cell", ("~24-cell", "")),
    ("~24-cell", "~44-cell", ("", "ambiguous")),
    ("~24-cell", "comma or later", ("", "ambiguous")),
    ("comma or later", "~24-cell", ("", "ambiguous")),
    ("~24-cell", "gastrulation", ("", "ambiguous")),
    ("gastrulation", "~24-cell", ("", "ambiguous")),
    ("gastrulation", "6-cell", ("", "unknown stage")),
    ("gastrulation", "1.5-fold to 2-fold", ("", "ambiguous")),
])
def test_several_answers_under_headers_of_one_kind_must_agree(first, second, said):
  for form in (
      "## Developmental Stage: {}", "## Developmental Stage\n{}",
      "## Developmental Stage Analysis: {}", "## Developmental Stage Assessment\n{}",
  ):
    text = form.format(first) + RULED_OUT + form.format(second)
    assert answers_lib.stage_of_answer(text) == said


def test_a_plain_header_decides_before_a_title_and_its_own_line_before_those_below():
  title = "# Developmental Stage Analysis\n**2-fold**\n"
  below = "## Developmental Stage\n**comma**\n"
  own = "## Developmental Stage: **3-fold**\n"
  for texts in ((title, below, own), (own, below, title), (below, title, own)):
    assert answers_lib.stage_of_answer("".join(texts)) == ("3-fold", "")
  for texts in ((title, below), (below, title)):
    assert answers_lib.stage_of_answer("".join(texts)) == ("comma", "")


@pytest.mark.parametrize("text, said", [
    ("## Developmental Stage\n>350-cell", ("", "ambiguous")),
    ("## Developmental Stage\n> 350-cell", ("", "ambiguous")),
    ("## Developmental Stage\n> **~350-cell**", ("~350-cell", "")),
    ("> ## Developmental Stage\n>\n> ~350-cell", ("~350-cell", "")),
])
def test_more_than_a_stage_is_told_from_a_quotation(text, said):
  assert answers_lib.stage_of_answer(text) == said


def test_a_long_blank_line_takes_no_time():
  start = time.process_time()
  text = "# Developmental Stage Analysis\n" + " " * 10_000 + "\n**2-fold**"
  assert answers_lib.stage_of_answer(text) == ("2-fold", "")
  assert time.process_time() - start < 2


def test_answers_are_matched_by_frame_index_and_losses_counted():
  good = "## 1. Developmental Stage: **{}**" + RULED_OUT
  found, losses = answers(
      entry(7, good.format("2-cell")), entry(3, good.format("~14-cell"), success=True),
      entry(4, "ERROR: overloaded"), entry(5, good.format("comma"), success=False),
      entry(6, good.format("comma to 1.5-fold")), entry(8, None),
      {"response": good.format("comma")}, entry("9", good.format("comma")),
      entry(-1, good.format("comma")), entry(True, good.format("comma")), "text",
      entry(10, good.format("comma")), entry(10, good.format("2-fold")),
      entry(11, good.format("2-fold")), entry(11, good.format("2-fold")),
  )
  assert found == {7: "2-cell", 3: "~14-cell", 11: "2-fold"}
  assert losses == {
      "failed": 3, "ambiguous": 1, "no frame_index": 4,
      "no answer": 1, "answers differ": 1,
  }


def test_the_phantom_s_own_answers_are_read():
  import numpy as np

  _, truth = phantom_embryos.embryo(np.random.default_rng(0), shape=(8, 16, 16))
  made = phantom_embryos.answers(truth)
  found, losses = answers(*made)
  assert len(found) + losses["failed"] == len(made) and losses["failed"] > 1
  names = {**dict(enumerate(phantom_embryos.STAGES)), 6: "comma", 7: "2-fold"}
  assert all(found[n] == names[truth.stages[n]] for n in found)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[" * 100_000, b"null", b"{}", b"3", b"\xff\xfe\x00", b"[1e999999]x",
])
def test_an_answer_file_of_another_kind_is_named(content):
  with pytest.raises(DataError, match="answers.json"):
    stages.read_answers(content, "answers.json")


@pytest.mark.parametrize("cells, stage", [
    (1, "1-cell"), (2, "2-cell"), (3, "4-cell"), (5, "4-cell"), (6, "8-cell"),
    (10, "8-cell"), (11, "~14-cell"), (18, "~14-cell"), (19, "~24-cell"),
    (32, "~24-cell"), (33, "~44-cell"), (62, "~44-cell"), (63, "~90-cell"),
    (130, "~90-cell"), (131, "~190-cell"), (257, "~190-cell"), (258, "~350-cell"),
    (438, "~350-cell"), (439, "elongation"), (574, "elongation"),
])
def test_counts_meet_the_geometric_midpoints(cells, stage):
  assert stages.stage_of_count(cells) == stage


def test_edges_are_geometric_midpoints_of_the_nominal_counts():
  nominal = (1, 2, 4, 8, 14, 24, 44, 90, 190, 350, 550)
  for edge, low, high in zip(stages.EDGES, nominal[:-1], nominal[1:], strict=True):
    assert abs(edge / (low * high) ** 0.5 - 1) < 0.015


@pytest.mark.parametrize("taxonomy, found, lost", [
    ("vlm14", {0: "2-cell", 1: "~14-cell", 2: "~90-cell"}, {"no class for elongation"}),
    ("count", {0: "2-cell", 1: "~14-cell", 2: "~90-cell", 3: "elongation"}, set()),
    ("worm10", {0: "2-cell", 2: "early gastrulation"},
     {"no class for ~14-cell", "no class for elongation"}),
])
def test_a_count_without_a_class_is_dropped_and_not_moved(
    tmp_path, taxonomy, found, lost
):
  write_tracks(tmp_path, [2, 14, 104, 560])
  stated, losses = stages.stages_of(
      StageOptions(taxonomy=taxonomy), str(tmp_path), "e", range(4)
  )
  assert stated == found
  assert {k.removeprefix("counts: ") for k in losses if "class" in k} == lost


@pytest.mark.parametrize("taxonomy, moved", [
    ("vlm14", {}),
    ("count", dict.fromkeys(("comma", "1.5-fold", "2-fold", "3-fold"), "elongation")),
    ("worm10", {
        "~14-cell": None, "~24-cell": None,
        "~44-cell": "early gastrulation", "~90-cell": "early gastrulation",
        "~190-cell": "late gastrulation", "~350-cell": "late gastrulation",
    }),
    ("worm10_merged", {
        "~14-cell": "8-cell", "~24-cell": "8-cell",
        "~44-cell": "early gastrulation", "~90-cell": "early gastrulation",
        "~190-cell": "late gastrulation", "~350-cell": "late gastrulation",
    }),
])
def test_each_category_goes_to_its_class_or_to_none(taxonomy, moved):
  options = StageOptions(taxonomy=taxonomy)
  found = {stage: stages.in_taxonomy(stage, options) for stage in VLM14}
  assert found == dict(zip(VLM14, VLM14)) | moved
  assert {stage for stage in found.values() if stage} == set(options.classes)


def write_tracks(folder, counts, head="t\tz\ty\tx\tcell_id\tparent_id\ttrack_id"):
  (folder / "tracks").mkdir(exist_ok=True)
  rows = [
      f"{t}\t1.0\t2.0\t3.0\t{n}\t-1" for t, count in enumerate(counts)
      for n in range(count)
  ]
  random.Random(0).shuffle(rows)
  (folder / "tracks" / "tracks.txt").write_text("\n".join([head, *rows]) + "\n")


@pytest.mark.parametrize("text", [
    "t\tz\ty\tx\tcell_id\tparent_id\ttrack_id\tradius\tname\tdiv_state\n"
    "0\t1\t2\t3\t1\t-1\t1\t4.2\tAB a\t0\n1\t1\t2\t3\t2\t1\t1\t4\t\t\n1\t1\t2\t3\t3\t1\n",
    "x\ty\tz\tt\n1\t2\t3\t0\n1\t2\t3\t1\n1\t2\t3\t1.0\n",
    "# t z y x\n0 1 2 3\n1 1 2 3\n\n1 1 2 3\n",
    "T,Z\n0,1\n1,1\n1,2\n",
    "\ufefft\r\n0\r\n1\r\n1\r\n",
])
def test_tracks_are_read_by_the_names_of_their_header(text):
  assert stages.read_tracks(text.encode(), "tracks.txt") == ({0: 1, 1: 2}, {})


@pytest.mark.parametrize("text", [
    "#\tt\tz\n0\t5\n0\t6\n1\t5\n",  # Rows without a cell for the mark.
    "#\tt\tz\n7\t0\t5\n8\t0\t6\n9\t1\n",  # And with one.
    "\t0\t5\n\t0\t6\n\t1\n".join(["# \tt\tz\n", ""]),
    "#,t,z\n0,5\n0\n1,5\n", "#, t, z\n5, 0, 1\n5, 0, 2\n5, 1, 3\n",
])
def test_the_mark_of_a_header_may_be_a_cell_with_or_without_cells_below(text):
  assert stages.read_tracks(text.encode(), "tracks.txt") == ({0: 2, 1: 1}, {})


@pytest.mark.parametrize("text", [
    "#\tt\tz\n0\n0\n1\n", "#\tt\tz\n0\t5\t\n1\t5\t\n", "#,t,z\n1,2,3,4\n",
])
def test_rows_that_fit_neither_reading_of_the_mark_are_refused(text):
  with pytest.raises(DataError, match="tracks.txt.*#"):
    stages.read_tracks(text.encode(), "tracks.txt")


@pytest.mark.parametrize("text, found, losses", [
    ('name,t\n"AB, a",0\n"AB, p",0\nEMS,1\n', {0: 2, 1: 1}, {}),
    ('x, name, t\n5, "3, 7", 0\n5, "AB", 0\n5\n', {0: 2}, {"row without a time": 1}),
    ('"name"\t"t"\n"AB\ta"\t"0"\n"AB ""p"""\t0\n', {0: 2}, {}),
])
def test_a_quoted_cell_of_tracks_is_one_cell(text, found, losses):
  assert stages.read_tracks(text.encode(), "tracks.txt") == (found, losses)


@pytest.mark.parametrize("rows", [
    '0\tAB\n0\t"AB\n1\tC\n', '0\tAB\n0\t"AB\n1\tC"\n', '0\tAB\n0\t"AB"p\n1\tC\n',
])
def test_a_quote_that_does_not_end_on_its_line_is_named_with_the_line(rows):
  for mark in "\t,":
    tracks = "t\tname\n\n".replace("\t", mark) + rows.replace("\t", mark)
    with pytest.raises(DataError, match="tracks.txt: line 4 .*quotes"):
      stages.read_tracks(tracks.encode(), "tracks.txt")
  with pytest.raises(DataError, match="stages.tsv: line 4 .*quotes"):
    stages.read_table(f"t\tstage\n\n{rows}".encode(), "stages.tsv")


def test_rows_of_tracks_without_a_time_are_counted():
  text = "z\tt\n1\t0\n1\n1\t\n1\tnan\n1\t-1\n1\t0.5\n1\tinf\n1\t0\n"
  counts, losses = stages.read_tracks(text.encode(), "tracks.txt")
  assert counts == {0: 2} and losses == {"row without a time": 6}


@pytest.mark.parametrize("text", ["", "\n\n", "z\ty\n1\t2\n", "t\tt\n1\t1\n", "t\tz\n"])
def test_tracks_without_a_time_column_are_named(text):
  with pytest.raises(DataError, match="tracks.txt"):
    stages.read_tracks(text.encode(), "tracks.txt")


def test_labels_of_time_points_that_are_not_there_are_dropped_and_counted(tmp_path):
  write_tracks(tmp_path, [1, 2, 2, 4])
  found, losses = stages.stages_of(StageOptions(), str(tmp_path), "e", [1, 2, 9])
  assert found == {1: "2-cell", 2: "2-cell"}
  assert losses == {"counts: no such time point": 2, "no stage": 1}


@pytest.mark.parametrize("source", ["answers", "table"])
def test_what_is_told_of_time_points_that_are_not_there_is_counted(tmp_path, source):
  told = {3: "2-cell", 7: "4-cell", 8: "4-cell"}
  (tmp_path / "stages.tsv").write_text(
      "t\tstage\n" + "".join(f"{t}\t{stage}\n" for t, stage in told.items())
  )
  (tmp_path / "embryo_classifications_all.json").write_text(json.dumps([
      entry(t, f"## Developmental Stage: {stage}") for t, stage in told.items()
  ]))
  found, losses = stages.stages_of(
      StageOptions(sources=(source,)), str(tmp_path), "e", [2, 3, 4]
  )
  assert found == {3: "2-cell"}
  assert losses == {f"{source}: no such time point": 2, "no stage": 2}


def test_answers_go_by_the_frame_s_index_not_by_its_minute_or_picture():
  said = entry(4, "## Developmental Stage: comma") | {
      "timepoint_minutes": 9, "frame_path": "1_png\\frame_0007.png",
      "cell_count": 2, "stage": "2-cell",
  }
  found, losses = answers(said)
  assert found == {4: "comma"} and not +losses
  del said["frame_index"]
  found, losses = answers(said)
  assert not found and +losses == {"no frame_index": 1}


def test_the_first_source_that_knows_decides_and_what_differs_is_counted(tmp_path):
  write_tracks(tmp_path, [2, 2, 560, 560])
  text = "## Developmental Stage: {}"
  (tmp_path / "embryo_classifications_all.json").write_text(json.dumps([
      entry(1, text.format("4-cell")), entry(2, text.format("comma")),
  ]))
  options = StageOptions(sources=("counts", "answers"))
  found, losses = stages.stages_of(options, str(tmp_path), "e", range(4))
  assert found == {0: "2-cell", 1: "2-cell", 2: "comma"}
  assert losses == {
      "counts: no class for elongation": 2, "sources differ": 1, "no stage": 1,
  }


def test_a_file_that_is_not_there_is_counted_and_another_embryo_s_is_not_taken(tmp_path):
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
  path = tmp_path / "answers.json"
  path.write_text(json.dumps([entry(0, "## Developmental Stage: comma")]))
  options = StageOptions(sources=("answers",), answers={"a": str(path)})
  assert stages.stages_of(options, str(tmp_path / "a"), "a", [0])[0] == {0: "comma"}
  found, losses = stages.stages_of(options, str(tmp_path / "b"), "b", [0])
  assert not found and losses == {"answers: no file": 1, "no stage": 1}


@pytest.mark.parametrize("source, option, name", [
    ("counts", "tracks", "x.txt"), ("answers", "answers", "x.json"),
    ("table", "table", "x.tsv"),
])
def test_each_file_of_labels_may_be_given_by_participant_and_by_no_other_absolute_path(
    tmp_path, source, option, name
):
  path = tmp_path / "elsewhere" / name
  path.parent.mkdir()
  path.write_text({
      "counts": "t\n0\n0\n", "table": "t\tstage\n0\t2-cell\n",
      "answers": json.dumps([entry(0, "## Developmental Stage: 2-cell")]),
  }[source])
  options = StageOptions(sources=(source,), **{option: {"a": str(path)}})
  assert stages.stages_of(options, str(tmp_path), "a", [0])[0] == {0: "2-cell"}
  _, losses = stages.stages_of(options, str(tmp_path), "b", [0])
  assert losses == {f"{source}: no file": 1, "no stage": 1}
  for given in (str(path), f"gs://bucket/{name}", f"~/{name}", {"a": 3}, {"a": ""}):
    (fault,) = stages.stage_option_faults({option: given})
    assert option in fault and "{participant: path}" in fault
    with pytest.raises(ValueError, match="participant: path"):
      StageOptions(**{option: given})


def test_a_file_above_several_embryos_is_refused_and_both_are_named(tmp_path):
  (tmp_path / "stages.tsv").write_text("t\tstage\n0\t2-cell\n")
  options = StageOptions(sources=("table",), table="../stages.tsv")
  homes = {name: [str(tmp_path / name)] for name in ("a", "b")}
  for home in homes:
    (tmp_path / home).mkdir()
  movies = {name: (found, name) for name, found in homes.items()}
  sharers = stages.sharers_of(options, movies)
  with pytest.raises(DataError, match="stages.tsv.*a and b"):
    stages.by_source(options, homes["a"], "a", [0], sharers=sharers)
  alone = stages.sharers_of(options, {"a": movies["a"]})
  told, _ = stages.by_source(options, homes["a"], "a", [0], sharers=alone)
  assert told == {"table": {0: "2-cell"}}


@pytest.mark.parametrize("movies", [
    {"a": ([], "a"), "b": ([], "b")},  # Two embryos, one path given for both.
    {"a.tif": ([], "a"), "again.tif": ([], "a")},  # Two movies of one embryo.
])
def test_a_file_given_to_several_movies_is_refused(movies, tmp_path):
  path = tmp_path / "stages.tsv"
  path.write_text("t\tstage\n0\t2-cell\n")
  options = StageOptions(sources=("table",), table={"a": str(path), "b": f"{path}"})
  sharers = stages.sharers_of(options, movies)
  with pytest.raises(DataError, match="stages.tsv.*" + " and ".join(movies)):
    stages.by_source(options, [], "a", [0], sharers=sharers)
  one = stages.sharers_of(options, dict([*movies.items()][:1]))
  told, _ = stages.by_source(options, [], "a", [0], sharers=one)
  assert told == {"table": {0: "2-cell"}}


@pytest.mark.parametrize("text, found, losses", [
    ("t\tstage\n1\tb\n0\ta\n", {1: "b", 0: "a"}, {}),
    ("who\tstage\tt\nx\ta\t0\nx\t\t1\nx\tq\t2\nx\ta\n",
     {0: "a"}, {"no stage given": 1, "row without a time": 1, "no class for q": 1}),
    ("t\tstage\n0\ta\n0\tb\n1\ta\n1\ta\n", {1: "a"}, {"rows differ": 1}),
])
def test_a_table_of_stages_is_read(tmp_path, text, found, losses):
  (tmp_path / "stages.tsv").write_text(text)
  options = StageOptions(taxonomy=("a", "b"), sources=("table",))
  stated, lost = stages.stages_of(options, str(tmp_path), "e", found)
  lost.pop("no stage", None)
  assert stated == found and lost == {f"table: {k}": n for k, n in losses.items()}


def test_a_quoted_cell_of_a_table_of_stages_is_read_without_its_quotes():
  text = 't\tstage\tnote\r\n1\t "2-cell"\t"a\tb"\r\n\r\n"2"\t4-cell\r\n'
  found, losses = stages.read_table(text.encode(), "stages.tsv")
  assert found == {1: "2-cell", 2: "4-cell"} and not +losses


@pytest.mark.parametrize("head", ["t\tstage\tstage", "t\tt\tstage"])
def test_a_table_with_a_column_twice_is_named(head):
  with pytest.raises(DataError, match="columns t and stage.*once"):
    stages.read_table(f"{head}\n0\t1\t2\n".encode(), "stages.tsv")


def test_a_table_without_its_columns_is_named():
  with pytest.raises(DataError, match="columns t and stage; found time"):
    stages.read_table(b"time\tlabel\n0\ta\n", "stages.tsv")


def test_classes_are_in_the_order_of_development_whatever_the_file_s_order(tmp_path):
  assert VLM14[0] == "1-cell" and VLM14[-1] == "3-fold" and len(VLM14) == 14
  for name, classes in stages.TAXONOMIES.items():
    assert StageOptions(taxonomy=name).classes == classes
    assert len(set(classes)) == len(classes)
  text = "## Developmental Stage: {}"
  entries = [entry(n, text.format(name)) for n, name in enumerate(VLM14)]
  shuffled = random.Random(1).sample(entries, len(entries))
  assert answers(*entries) == answers(*shuffled)


@pytest.mark.parametrize("options, words", [
    (dict(taxonomy="vlm10"), "vlm14"), (dict(taxonomy=("a", "a")), "different"),
    (dict(sources=()), "counts"), (dict(sources=("vlm",)), "answers"),
    (dict(tracks=3), "tracks"), (dict(answers=3), "answers"),
])
def test_options_out_of_range_are_refused(options, words):
  with pytest.raises(ValueError, match=words):
    StageOptions(**options)


@pytest.mark.parametrize("seed", range(3))
def test_mutated_tables_and_answers_give_an_error_or_a_loss(seed):
  rng = random.Random(seed)
  tracks = "t\tz\ty\tx\tcell_id\n" + "".join(
      f"{t}\t1.5\t2\t3\t{t}\n" for t in range(20)
  )
  said = [
      entry(n, f"## 1. Developmental Stage: **{name}**" + RULED_OUT)
      for n, name in enumerate(VLM14)
  ]
  table = "t\tstage\n" + "".join(f"{n}\t{name}\n" for n, name in enumerate(VLM14))
  errors, read = 0, 0
  for reader, text in (
      (stages.read_tracks, tracks), (stages.read_answers, json.dumps(said)),
      (stages.read_table, table),
  ):
    for _ in range(300):
      content = bytearray(text.encode())
      for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(content))
        how = rng.random()
        if how < 0.5:
          content[at] = rng.randrange(256)
        elif how < 0.7:
          del content[at:at + rng.randint(1, 50)]
        elif how < 0.9:
          content[at:at] = bytes(rng.choices(b"0123456789-+.\"'{}[],:\t\n\\*#", k=5))
        else:
          content[at:at] = content[:at]
        content = content[:1 << 16] or bytearray(b"t")
      try:
        found, losses = reader(bytes(content), "x")
      except DataError:
        errors += 1
        continue
      read += 1
      assert all(isinstance(n, int) and n >= 0 for n in found)
      assert all(n >= 0 for n in losses.values())
      if reader is stages.read_answers:
        assert set(found.values()) <= set(VLM14)
  assert errors > 50 and read > 50


@pytest.mark.parametrize("seed", range(2))
def test_any_text_has_a_stage_or_a_reason(seed):
  rng = random.Random(seed)
  words = (
      "developmental stage", "Developmental Stage Analysis", ":", "**", "#", "\n", "1.",
      "2-cell", "1.5-fold", "comma", "(", ")", "~90", "cells", "-", "to", "9" * 400, "+",
      "\u00bd", "confidence", " ", "or", "[", "]", "---",
  )
  for _ in range(3000):
    text = "".join(rng.choices(words, k=rng.randint(0, 25)))
    stage, reason = answers_lib.stage_of_answer(text)
    assert (stage in VLM14) != (reason != "") and (stage or reason)
