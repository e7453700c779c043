"""A small data set in memory, behind the pipeline's own `Volumes`."""

from types import SimpleNamespace

import numpy as np
import pytest

from vjepa_jax.backbones.base import Features
from vjepa_jax.data import phantom_embryos, pipeline
from vjepa_jax.data.manifest import Row
from vjepa_jax.data.record import ReadError, Record
from vjepa_jax.volumes.grid import Grid

GRID = Grid((1, 4, 16, 16), (1, 2, 4, 4))
CLASSES = ("drusen", "fluid", "normal")
DEVICES = ("topcon_triton", "zeiss_cirrus")


class InMemory:
  """Canvases by path, where the pipeline has files."""

  def __init__(self, records):
    self._records = {record.source: record for record in records}

  def read(self, row):
    if row.path not in self._records:
      raise ReadError(row.path, "missing_file")
    return self._records[row.path]


@pytest.fixture
def make_data():
  """Returns make(...) -> open data with one split, "probe"."""

  def make(
      patients=40,
      eyes=2,
      labels=CLASSES,
      shape=GRID.voxels,
      seed=0,
      paint=None,
      missing=(),
  ):
    """`paint(volume, label number, patient number)` changes a float volume."""
    generator = np.random.default_rng(seed)
    classes = tuple(sorted(set(labels) - {None}))
    rows, records = [], []
    for patient in range(patients):
      for eye in range(eyes):
        label = labels[patient % len(labels)] if labels else None
        volume = generator.gamma(4.0, 10.0, (*shape, 1))
        if paint:
          paint(volume, patient % max(len(labels), 1), patient)
        path = f"{patient}_{eye}"
        device = DEVICES[(patient // 3) % 2]
        rows.append(Row(path, f"p{patient}", device=device, label=label))
        stored = volume.clip(0, 255).astype(np.uint8)
        spacing = np.array([np.nan, 0.5, 0.03, 0.06])
        if path not in missing:
          records.append(Record(stored, spacing, path))
    volumes = pipeline.Volumes("probe", rows, classes, InMemory(records))
    return SimpleNamespace(splits={"probe": volumes}, report={})

  return make


@pytest.fixture
def patches():
  """Returns functions whose tokens are plain patches times params["scale"]."""

  def features(params, model_state, batch):
    volume = batch["volume"].astype(np.float32)
    volume = (volume - volume.mean()) / volume.std()
    return Features(GRID.patchify(volume) * params["scale"], GRID)

  return {"features": features}


@pytest.fixture(scope="session")
def embryo_corpus(tmp_path_factory):
  """Manifest of 7 small phantom embryos of 32 minutes, 3 of them in "validation"."""
  return phantom_embryos.write_embryo_corpus(
      tmp_path_factory.mktemp("embryos") / "corpus",
      embryos=dict(train=4, validation=3), frames=32, shape=(8, 16, 16),
  )


@pytest.fixture(scope="session")
def open_embryos(embryo_corpus):
  """Returns open(...) -> open data of clips of 4 minutes with their true stages."""

  def opened(manifest=embryo_corpus, *, clip=None, stages=None, **options):
    return pipeline.open_data(
        str(manifest), canvas=(8, 16, 16), splits="split",
        clip=dict(frames=4) | (clip or {}),
        stages=dict(taxonomy="phantom8", sources=("table",)) | (stages or {}),
        **options,
    )

  return opened
