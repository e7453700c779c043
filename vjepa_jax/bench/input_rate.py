"""Rate of the input pipeline on one core: from files, from memory, from shards.

python -m vjepa_jax.bench.input_rate [--manifest=PATH] [--canvas=64,384,384]

Without a manifest it writes raw volumes of 128 x 885 x 512, uint8, uncompressed.
"""

from collections.abc import Sequence
import os
import pathlib
import tempfile
from typing import Any

from absl import app, flags
import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    OphthalmicTomographyImageStorage,
    generate_uid,
)

from vjepa_jax.bench import common
from vjepa_jax.data import batches, memory, pipeline

RAW_SHAPE = (128, 885, 512)
_BATCH = 4
# The first batches fill memory that the later ones take over.
_FIRST_BATCHES = 5


def measure(
    manifest: str,
    *,
    canvas: tuple[int, int, int],
    name: str,
    root: str | None = None,
    volumes: int = 32,
    repeats: int = 10,
    warmup: int = 1,
) -> dict[str, Any]:
  """Times one core of the pipeline over the first volumes of a manifest.

  Args:
    manifest: as of `pipeline.open_data`.
    canvas: (Z, Y, X) voxels.
    name: of what is measured, for the line.
    root: what the manifest's filepath is joined to.
    volumes: how many recordings to read, at most; a multiple of 4.
    repeats: timed passes, at least 5.
    warmup: untimed passes before, at least 1.

  Returns:
    The numbers of `common.line`: seconds a volume for reading and resampling the raw
    files in order; and volumes_per_cpu_s, {source: {"eval": ..., "train": ...}}, of
    `files`, of `memory` (cached canvases) and of `shards` (the same from ArrayRecord),
    in batches of 4: in order, and shuffled without end. The shuffling of a handful
    of rows costs more than a cached volume; take some tens.
  """
  memory.keep_large_blocks()  # As a run does, before jax or a reader has threads.
  options = dict(
      root=root, canvas=canvas, splits={"all": 1.0}, max_records=volumes,
      modalities=None, threads=1, max_bad_fraction=0.5,
  )
  with tempfile.TemporaryDirectory() as folder:
    sources = {
        "files": pipeline.open_data(manifest, cache="none", **options),
        "memory": pipeline.open_data(manifest, cache="memory", **options),
        "shards": pipeline.open_data(manifest, cache=folder, **options),
    }
    passes = {
        key: _passes(data.splits["all"], repeats, warmup)
        for key, data in sources.items()
    }
  wall, cpu = passes["files"]["eval"]
  return common.line(
      "input_rate", name, wall, cpu, unit="s a volume", canvas=list(canvas),
      volumes=len(sources["files"].splits["all"]),
      volumes_per_cpu_s={
          key: {kind: 1 / float(np.median(cpu)) for kind, (_, cpu) in of.items()}
          for key, of in passes.items()
      },
  )


def write_synthetic(
    folder: str | os.PathLike[str],
    *,
    volumes: int = 32,
    files: int = 2,
    shape: tuple[int, int, int] = RAW_SHAPE,
) -> str:
  """Writes uncompressed OPT DICOM files of speckle and their manifest.

  Args:
    folder: where to.
    volumes: how many.
    files: how many that differ; the others are links to them.
    shape: (frames, rows, columns).

  Returns:
    Path of the manifest.
  """
  folder = pathlib.Path(folder)
  lines = ["participant_id\tfilepath"]
  for index in range(volumes):
    path = folder / f"{index}.dcm"
    if index < files:
      voxels = np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)
      _dataset(voxels).save_as(path, enforce_file_format=True)
    else:
      os.link(folder / f"{index % files}.dcm", path)
    lines.append(f"{index}\t/{index}.dcm")
  manifest = folder / "manifest.tsv"
  manifest.write_text("\n".join(lines) + "\n")
  return str(manifest)


def _passes(
    volumes: batches.Volumes, repeats: int, warmup: int
) -> dict[str, tuple[list[float], list[float]]]:
  """Returns wall and CPU seconds a volume of each pass over all of them."""
  # No thread reads ahead: what a pass takes is what its volumes cost.
  endless = batches.train_iterator(volumes, batch_size=_BATCH, seed=0, threads=0)
  for _ in range(_FIRST_BATCHES):
    next(endless)
  calls = {
      "eval": lambda: [
          batch["mean"] for batch in batches.eval_batches(volumes, _BATCH, threads=1)
      ],
      "train": lambda: [
          next(endless)["mean"] for _ in range(-(-len(volumes) // _BATCH))
      ],
  }
  found = {}
  for kind, call in calls.items():
    wall, cpu = common.repeat(call, repeats=repeats, warmup=warmup)
    found[kind] = tuple([s / len(volumes) for s in times] for times in (wall, cpu))
  endless.close()
  return found


def _dataset(voxels: np.ndarray) -> pydicom.Dataset:
  dataset = pydicom.Dataset()
  dataset.SOPClassUID = OphthalmicTomographyImageStorage
  dataset.SOPInstanceUID = generate_uid()
  dataset.Modality = "OPT"
  dataset.NumberOfFrames, dataset.Rows, dataset.Columns = voxels.shape
  dataset.SamplesPerPixel = 1
  dataset.PhotometricInterpretation = "MONOCHROME2"
  dataset.BitsAllocated = dataset.BitsStored = 8
  dataset.HighBit = 7
  dataset.PixelRepresentation = 0
  dataset.PixelData = voxels.tobytes()
  dataset["PixelData"].VR = "OB"
  dataset.file_meta = FileMetaDataset()
  dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
  dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
  dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
  return dataset


def main(argv: Sequence[str]) -> None:
  """Measures a manifest, or synthetic files, and prints one JSON line."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")
  values = flags.FLAGS
  canvas = tuple(int(n) for n in values.canvas)
  if len(canvas) != 3:
    raise app.UsageError(f"--canvas={','.join(values.canvas)} must be Z,Y,X")
  with tempfile.TemporaryDirectory() as folder:
    manifest = values.manifest or write_synthetic(folder, volumes=values.volumes)
    common.emit(measure(
        manifest, canvas=canvas, root=values.root, volumes=values.volumes,
        name=values.manifest or "synthetic " + "x".join(map(str, RAW_SHAPE)),
        repeats=values.repeats,
    ))


if __name__ == "__main__":
  flags.DEFINE_string("manifest", None, "TSV or CSV; synthetic files by default.")
  flags.DEFINE_string("root", None, "What the manifest's filepath is joined to.")
  flags.DEFINE_list("canvas", ["64", "384", "384"], "Voxels Z,Y,X.")
  flags.DEFINE_integer("volumes", 32, "Recordings to read, at most.", lower_bound=1)
  flags.DEFINE_integer("repeats", 10, "Timed passes.", lower_bound=5)
  app.run(main)
