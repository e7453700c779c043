"""Numbers add up exactly and reach the workdir once."""

import math
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

from vjepa_jax.train import metrics


def test_means_are_weighted_by_what_they_stand_for():
  total = metrics.merge({}, {"loss": (6.0, 3.0)})
  total = metrics.merge(total, {"loss": (1.0, 1.0), "other": (0.0, 0.0)})
  means = metrics.means(total)
  assert means["loss"] == 7.0 / 4.0
  assert math.isnan(means["other"])


def test_lines_are_appended_and_non_finite_values_are_null(tmp_path):
  writer = metrics.Writer(tmp_path, tensorboard=False)
  writer.write(1, {"loss": 0.5, "grad_norm": float("nan")})
  writer.write(2, {"loss": np.float32(0.25)})
  assert metrics.read(tmp_path) == [
      {"step": 1, "loss": 0.5, "grad_norm": None}, {"step": 2, "loss": 0.25},
  ]
  assert metrics.history(metrics.read(tmp_path), "loss") == [(1, 0.5), (2, 0.25)]


def test_lines_beyond_the_restored_step_are_dropped(tmp_path):
  first = metrics.Writer(tmp_path, tensorboard=False)
  for step in range(5):
    first.write(step, {"loss": float(step)})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 5, "lo')  # killed while writing
  metrics.Writer(tmp_path, restored_step=2, tensorboard=False).write(3, {"loss": 9.0})
  assert [line["loss"] for line in metrics.read(tmp_path)] == [0.0, 1.0, 2.0, 9.0]
  metrics.Writer(tmp_path, tensorboard=False)
  assert metrics.read(tmp_path) == []


def test_a_figure_is_the_same_picture_on_disk(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
  writer = metrics.Writer(tmp_path, tensorboard=False)
  writer.figure(30, "figures.masks", image)
  stored = cv2.imread(str(tmp_path / "figures" / "figures.masks_0000030.png"))
  np.testing.assert_array_equal(stored[..., ::-1], image)
  with pytest.raises(ValueError, match=r"wanted uint8 \[H, W, 3\], got float64"):
    writer.figure(30, "figures.masks", image / 255)


def test_tensorboard_gets_numbers_and_figures(tmp_path):
  pytest.importorskip("tensorboardX")
  writer = metrics.Writer(tmp_path)
  writer.write(3, {"loss": 0.5})
  writer.figure(3, "probe.curve", np.zeros((4, 4, 3), np.uint8))
  writer.close()
  (events,) = tmp_path.glob("events.*")
  assert b"probe/curve" in events.read_bytes() and b"loss" in events.read_bytes()


OFFLINE = """
import sys
import numpy as np
from vjepa_jax.train import metrics
writer = metrics.Writer(
    sys.argv[1], restored_step=int(sys.argv[2]), config={"lr": 0.1}, tensorboard=False,
    wandb=dict(project="vjepa-test", name="toy", mode="offline"))
writer.write(int(sys.argv[2]) + 1, {"loss": 0.5, "probe.trained": 0.7})
writer.figure(1, "masks", np.zeros((4, 4, 3), np.uint8))
writer.artifact(sys.argv[3], "checkpoint")
writer.close()
print(dict(writer._wandb.config)["system"]["platform"])
"""


@pytest.mark.slow
def test_wandb_offline_keeps_one_run_id_over_a_resume(tmp_path):
  pytest.importorskip("wandb")
  folder = tmp_path / "checkpoint"
  folder.mkdir()
  (folder / "weights").write_text("1")
  env = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
  env |= {
      name: str(tmp_path / name.lower())
      for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")
  }
  for step in ("-1", "5"):
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path / "run"), step, str(folder)],
        env=env, capture_output=True, text=True, timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "cpu" in done.stdout
  identity = (tmp_path / "run" / "wandb_id.txt").read_text()
  runs = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
  assert len(runs) == 2 and all(run.name.endswith(identity) for run in runs)
  stored = b"".join(next(run.glob("run-*.wandb")).read_bytes() for run in runs)
  assert b"probe.trained" in stored and b"checkpoint-" in stored


def test_wandb_that_is_not_installed_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ImportError, match=r"vjepa_jax\[wandb\]"):
    metrics.Writer(tmp_path, tensorboard=False, wandb={"mode": "offline"})


def test_without_tensorboardx_one_plain_line_says_so(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  writer = metrics.Writer(tmp_path)
  writer.write(1, {"loss": 0.5})
  assert capsys.readouterr().out.count("tensorboardX is not installed") == 1
  assert metrics.read(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_a_line_for_people_folds_intervals_and_drops_the_common_prefix():
  numbers = {"probe.few": 0.25, "probe.few.low": 0.125, "probe.few.high": 0.5, "x": 2}
  assert metrics.format_scalars(numbers, "probe.") == "few 0.25 (0.125 .. 0.5)  x 2"
