"""Configs of clips: all faults at once, and data that fit the compiled step."""

import json

import jax
import numpy as np
import pytest

from tests.test_config import faults_of, load
from vjepa_jax import config as config_lib
from vjepa_jax.config import programs, units
from vjepa_jax.data import pipeline

STAGES = dict(taxonomy="phantom8", sources=("table",))


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("VJEPA_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def clips(stages=STAGES, **clip):
  config = load("oct_multi", "tiny")
  config.unlock()
  config.data.update(
      manifest="phantom:worm_tiny", canvas=(8, 16, 16), label="", resample="resize",
      modalities=(), clip={"frames": 4} | clip, stages=stages,
  )
  config.augment = dict(flip=(0.0, 0.5, 0.5, 0.5), views="shared")
  config.model.patch = (2, 4, 8, 8)
  config.train.update(batch_size=2, best_metric="probe.accuracy")
  config.evals.probe.update(split="validation", folds=2, inner_folds=2)
  config.lock()
  return config


def said(config) -> str:
  return "\n".join(faults_of(config))


def test_the_grid_and_the_compiled_batch_are_those_of_the_data(cache):
  config = clips()
  config_lib.check_config(config)
  plain = config_lib.as_plain(config)
  assert units.model_grid(plain).voxels == (4, 8, 16, 16)
  data = config_lib.open_data(plain)
  batch = next(pipeline.train_iterator(data.splits["train"], batch_size=2, seed=0))
  found = {
      name: jax.ShapeDtypeStruct(value.shape, value.dtype)
      for name, value in batch.items()
  }
  assert found == programs.batch_shapes(plain, 2)
  assert data.labels[-1] == "folded" and set(data.splits) == {"train", "validation"}
  json.dumps(data.report)


def test_an_experiment_on_clips_is_built_with_its_probe_of_stages(cache):
  built = config_lib.build(clips())
  assert "probe" in built.evaluators and built.grid.tokens == 2 * 2 * 2 * 2
  assert built.data.splits["train"].rows[0].stages
  batch = next(iter(pipeline.eval_batches(built.data.splits["validation"], 2)))
  volume = built.augment(
      batch | {"_position": np.arange(2, dtype=np.int32)}, jax.random.key(0), train=True
  )
  assert volume["volume"].shape == (2, 4, 8, 16, 16, 1)
  np.testing.assert_array_equal(volume["frame_label"], batch["frame_label"])


def test_all_faults_of_clips_and_stages_come_at_once():
  config = clips(
      dict(taxonomy="worm11", sources=("model",)), frames=4, strides=2, step=0,
  )
  text = said(config)
  for words in (
      "data.clip.strides: unknown", "data.clip.step is 0", "data.stages.taxonomy 'worm11'",
      "data.stages.sources",
  ):
    assert words in text


@pytest.mark.parametrize("section, key, value, words", [
    ("augment", "flip", (0.5, 0.0, 0.0, 0.0), "augment.flip"),
    ("augment", "shift", (1.0, 0.0, 0.0, 0.0), "augment.shift"),
    ("augment", "crop", (2, 8, 16, 16), "augment.crop: T=2"),
    ("data", "percentiles", (50.0, 1.0), "data.percentiles"),
    ("data", "clip", {}, "data.stages: given without data.clip"),
    ("data", "manifest", "phantom:wurm", "phantom:worm"),
    ("model", "patch", (3, 4, 8, 8), "T=4"),
])
def test_what_does_not_go_with_clips_is_refused(section, key, value, words):
  config = clips()
  config.unlock()
  config[section][key] = value
  assert words in said(config)


def test_time_blocks_and_a_split_column_are_refused_together():
  assert "data.clip.time_blocks" in said(clips(time_blocks=2))


def test_time_may_be_cropped_and_flipped_where_nobody_asks_for_stages():
  config = clips(stages={})
  config.unlock()
  config.augment.update(crop=(2, 8, 16, 16), flip=(0.5, 0.0, 0.0, 0.0))
  config_lib.check_config(config)
  assert units.model_grid(config_lib.as_plain(config)).voxels == (2, 8, 16, 16)
  shapes = programs.batch_shapes(config_lib.as_plain(config), 3)
  assert shapes["volume"].shape == (3, 4, 8, 16, 16, 1) and "frame_label" not in shapes
