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
from vjepa_jax.data import pipeline

RAW_SHAPE = (128, 885, 512)


def measure(
    manifest: str,
    *,
    canvas: tuple[int, int, int],
    name: str,
    root: str | None = None,
    volumes: int = 4,
    repeats: int = 10,
    warmup: int = 1,
) -> dict[str, Any]:
  """Times one core of the pipeline over the first volumes of a manifest.

  Args:
    manifest: as of `pipeline.open_data`.
    canvas: (Z, Y, X) voxels.
    name: of what is measured, for the line.
    root: what the manifest's filepath is joined to.
    volumes: how many recordings to read, at most.
    repeats: timed passes, at least 5.
    warmup: untimed passes before, at least 1.

  Returns:
    The numbers of `common.line`: seconds a volume for reading and resampling;
    and volumes_per_cpu_s of `files`, of `memory` (a batch of cached canvases)
    and of `shards` (the same from ArrayRecord).
  """
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
  wall, cpu = passes["files"]
  return common.line(
      "input_rate", name, wall, cpu, unit="s a volume", canvas=list(canvas),
      volumes=len(sources["files"].splits["all"]),
      volumes_per_cpu_s={
          key: 1 / float(np.median(seconds)) for key, (_, seconds) in passes.items()
      },
  )


def write_synthetic(
    folder: str | os.PathLike[str],
    *,
    volumes: int = 2,
    shape: tuple[int, int, int] = RAW_SHAPE,
) -> str:
  """Writes uncompressed OPT DICOM files of speckle and their manifest.

  Args:
    folder: where to.
    volumes: how many.
    shape: (frames, rows, columns).

  Returns:
    Path of the manifest.
  """
  folder = pathlib.Path(folder)
  lines = ["participant_id\tfilepath"]
  for index in range(volumes):
    voxels = np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)
    _dataset(voxels).save_as(folder / f"{index}.dcm", enforce_file_format=True)
    lines.append(f"{index}\t/{index}.dcm")
  manifest = folder / "manifest.tsv"
  manifest.write_text("\n".join(lines) + "\n")
  return str(manifest)


def _passes(
    volumes: pipeline.Volumes, repeats: int, warmup: int
) -> tuple[list[float], list[float]]:
  """Returns wall and CPU seconds a volume of each pass over all of them."""
  count = len(volumes)
  # In order: Grain's shuffle of a handful of rows costs more than a cached volume.
  wall, cpu = common.repeat(
      lambda: [batch["mean"] for batch in pipeline.eval_batches(volumes, 1, threads=1)],
      repeats=repeats, warmup=warmup,
  )
  return [w / count for w in wall], [c / count for c in cpu]


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
    manifest = values.manifest or write_synthetic(folder)
    common.emit(measure(
        manifest, canvas=canvas, root=values.root, volumes=values.volumes,
        name=values.manifest or "synthetic " + "x".join(map(str, RAW_SHAPE)),
        repeats=values.repeats,
    ))


if __name__ == "__main__":
  flags.DEFINE_string("manifest", None, "TSV or CSV; synthetic files by default.")
  flags.DEFINE_string("root", None, "What the manifest's filepath is joined to.")
  flags.DEFINE_list("canvas", ["64", "384", "384"], "Voxels Z,Y,X.")
  flags.DEFINE_integer("volumes", 4, "Recordings to read, at most.", lower_bound=1)
  flags.DEFINE_integer("repeats", 10, "Timed passes.", lower_bound=5)
  app.run(main)
