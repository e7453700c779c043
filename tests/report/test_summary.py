"""report.json: what a run came to."""

import json

import pytest

from vjepa_jax.report import summary


def _metrics():
  lines = [{"step": 10 * i, "loss": loss} for i, loss in
           enumerate((0.9, 0.4, 0.2, 0.3), start=1)]
  for step, value in ((0, 0.36), (20, 0.55), (40, 0.51)):
    lines.append({
        "step": step,
        **{k: v for name, v in (
            ("accuracy", value), ("intensity", 0.32), ("pixel_pca", 0.5),
            ("depth_profile", 0.58), ("minus_intensity", value - 0.32),
        ) for k, v in (
            (f"probe.{name}", v), (f"probe.{name}.low", v - 0.06),
            (f"probe.{name}.high", v + 0.05),
        )},
        "probe.chance": 0.25,
        "health.std": 0.9 - step / 100, "health.rankme": 90.0 - step,
        "health.cosine": 0.2 + step / 100, "health.alarm": float(step == 40),
    })
  return lines


DATA = {
    "device": {"topcon_triton": 30, "zeiss_cirrus": 10},
    "lost": {"wrong_region": 2}, "quarantine": {"truncated": 1},
}


def test_step_0_is_untrained_and_the_last_is_trained():
  report = summary.summarize(_metrics(), DATA, {})
  assert report["steps"] == 40
  for key, value, step in (
      ("untrained", 0.36, 0), ("trained", 0.51, 40), ("intensity", 0.32, 40)
  ):
    found = report["probe"][key]
    assert found["value"] == value and found["step"] == step
    assert found["interval"] == pytest.approx([value - 0.06, value + 0.05])
  assert report["probe"]["minus_intensity"]["value"] == pytest.approx(0.19)
  assert report["probe"]["pixel_pca"]["value"] == 0.5
  assert report["probe"]["depth_profile"]["value"] == 0.58
  assert report["probe"]["chance"] == 0.25


def test_loss_and_health_are_first_and_last():
  report = summary.summarize(_metrics(), DATA, {})
  assert report["loss"] == {"first": 0.9, "last": 0.3, "min": 0.2}
  assert report["health"]["std"] == pytest.approx({"first": 0.9, "last": 0.5})
  assert report["health"]["rankme"] == {"first": 90.0, "last": 50.0}
  assert report["health"]["cosine"] == pytest.approx({"first": 0.2, "last": 0.6})
  assert report["health"]["alarms"] == 1
  assert report["data"] == DATA


def test_lines_may_come_in_any_order():
  forward = summary.summarize(_metrics(), DATA, {})
  assert summary.summarize(_metrics()[::-1], DATA, {}) == forward


def test_best_is_chosen_by_the_metric_of_the_config_among_trained_steps():
  lines = _metrics()
  assert summary.summarize(lines)["best"] == {
      "step": 20, "metric": "probe.accuracy", "value": 0.55
  }
  config = {"train": {"best_metric": "health.cosine", "best_mode": "min"}}
  best = summary.summarize(lines, None, config)["best"]
  assert (best["step"], best["metric"]) == (20, "health.cosine")
  untrained = [line | {"probe.accuracy": 0.99} if line["step"] == 0 else line
               for line in lines]
  assert summary.summarize(untrained)["best"]["step"] == 20


def test_what_was_not_measured_is_none():
  report = summary.summarize([{"step": 10, "loss": 0.5}])
  assert set(report["probe"].values()) == set(report["health"].values()) == {None}
  assert report["best"] is None and report["data"] is None
  resumed = [line for line in _metrics() if line["step"] != 0]
  assert summary.summarize(resumed)["probe"]["untrained"] is None
  start = summary.summarize([line for line in _metrics() if line["step"] == 0])
  assert start["probe"]["trained"] is None and start["best"] is None
  empty = summary.summarize([])
  assert empty["steps"] is None and empty["loss"] is None


def test_an_interval_belongs_to_its_value():
  lines = [*_metrics(), {"step": 60, "probe.accuracy": 0.6}]
  assert summary.summarize(lines)["probe"]["trained"] == {
      "value": 0.6, "interval": [None, None], "step": 60
  }


def test_numbers_that_were_not_finite_are_skipped():
  lines = [*_metrics(), {"step": 50, "loss": None, "probe.accuracy": None}]
  report = summary.summarize(lines)
  assert report["loss"]["last"] == 0.3
  assert report["probe"]["trained"]["step"] == 40


@pytest.fixture
def workdir(tmp_path):
  (tmp_path / "data_report.json").write_text(json.dumps(DATA))
  (tmp_path / "config.json").write_text(
      json.dumps({"name": "oct", "train": {"best_metric": "probe.accuracy"}})
  )
  return tmp_path


def test_a_report_is_written_with_its_curves(workdir):
  report = summary.write_report(workdir, _metrics())
  assert json.loads((workdir / "report.json").read_text()) == report
  assert report["steps"] == 40
  assert (workdir / "figures" / "curves.png").stat().st_size > 10_000
  assert not list(workdir.glob("*.partial"))


def test_a_report_needs_neither_figures_nor_evaluators(tmp_path):
  report = summary.write_report(tmp_path, [{"step": 1, "lr": 0.1}])
  assert report["loss"] is None and report["data"] is None
  assert not (tmp_path / "figures").exists()
  assert "steps 1" in summary.format_report(report)


def test_the_table_shows_what_the_report_holds():
  table = summary.format_report(summary.summarize(_metrics(), DATA, {}))
  assert "encoder, trained                       0.510   0.450 .. 0.560" in table
  assert "encoder, untrained                     0.360" in table
  assert "COLLAPSE ALARM in 1 evaluation(s)" in table
  assert "best probe.accuracy 0.550 at step 20" in table
  assert "topcon_triton 30, zeiss_cirrus 10" in table
  assert "truncated 1" in table
  assert max(map(len, table.splitlines())) <= 88


def test_numbers_of_movies_are_first_and_last_with_the_last_interval():
  history = [
      {"step": 0, "stages.accuracy": 0.1, "stages.accuracy.low": 0.0,
       "stages.accuracy.high": 0.2, "stages.impossible_raw": 9},
      {"step": 5, "stages.accuracy": 0.7, "stages.accuracy.low": 0.6,
       "stages.accuracy.high": 0.8, "stages.kappa": float("nan")},
  ]
  report = summary.summarize(history)
  assert report["numbers"] == {
      "stages.accuracy": {"first": 0.1, "last": 0.7, "interval": [0.6, 0.8]},
      "stages.impossible_raw": {"first": 9.0, "last": 9.0, "interval": None},
  }
  row = next(x for x in summary.format_report(report).splitlines() if ".accuracy" in x)
  assert row.split() == ["stages.accuracy", "0.1", "0.7", "0.600", "..", "0.800"]
