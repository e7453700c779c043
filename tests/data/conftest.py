"""Small true DICOM files and corpora for the tests of data/."""

import io
import types

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
import pytest

from tests.data.bucket import Bucket, start

OPT = "1.2.840.10008.5.1.4.1.1.77.1.5.4"


def make_item(**tags) -> Dataset:
  """Returns a dataset of the given tags; dicts become one-item sequences."""
  item = Dataset()
  for name, value in tags.items():
    nested = isinstance(value, dict)
    setattr(item, name, Sequence([make_item(**value)]) if nested else value)
  return item


def make_dataset(volume: np.ndarray, **tags) -> Dataset:
  """Returns a multi-frame OPT dataset of the stored values [Z, Y, X] (or RGB)."""
  dataset = make_item(
      SOPClassUID=OPT, SOPInstanceUID=generate_uid(), Modality="OPT",
      PatientID="p1", Manufacturer="Maker", ManufacturerModelName="One",
      Rows=volume.shape[1], Columns=volume.shape[2],
      NumberOfFrames=volume.shape[0], SamplesPerPixel=1,
      PhotometricInterpretation="MONOCHROME2",
      BitsAllocated=8 * volume.itemsize, BitsStored=8 * volume.itemsize,
      HighBit=8 * volume.itemsize - 1,
      PixelRepresentation=int(volume.dtype.kind == "i"),
  )
  if volume.ndim == 4:
    dataset.SamplesPerPixel = 3
    dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = "RGB"
  dataset.PixelData = volume.astype(volume.dtype.newbyteorder("<")).tobytes()
  dataset["PixelData"].VR = "OW" if volume.itemsize == 2 else "OB"
  dataset.update(make_item(**tags))
  dataset.file_meta = FileMetaDataset()
  dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
  dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
  dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
  return dataset


def to_bytes(dataset: Dataset) -> bytes:
  file = io.BytesIO()
  dataset.save_as(file, enforce_file_format=True)
  return file.getvalue()


def make_volume(shape=(4, 64, 80), dtype=np.uint8, seed=0) -> np.ndarray:
  """Returns smooth layers with some noise, over most of the range of the type."""
  rng = np.random.default_rng(seed)
  _, rows, _ = shape
  layers = 0.5 + 0.4 * np.sin(np.arange(rows) / rows * (5 + seed % 7))
  noisy = np.clip(layers[None, :, None] + 0.05 * rng.standard_normal(shape), 0, 1)
  info = np.iinfo(dtype)
  return np.rint(noisy * info.max).astype(dtype)


@pytest.fixture(scope="session")
def dicom():
  """Returns the makers above: item, dataset, to_bytes, volume, break_bytes."""
  return types.SimpleNamespace(
      item=make_item, dataset=make_dataset, to_bytes=to_bytes, volume=make_volume,
      break_bytes=break_bytes,
  )


@pytest.fixture(scope="session")
def emulator():
  """A bucket emulator for the whole run (see tests/data/bucket.py)."""
  with start() as running:
    yield running


@pytest.fixture
def bucket(emulator, monkeypatch):
  """An empty bucket of a name of its own; the environment points at it."""
  for name, value in emulator.env.items():
    monkeypatch.setenv(name, value)
  yield Bucket(emulator.make_bucket(), emulator)
  emulator.clear_faults()
  emulator.forget_requests()


@pytest.fixture
def write_corpus(tmp_path):
  """Returns write(people, ...) -> manifest path; two eyes a person, two devices."""

  def write(people=6, broken=(), shape=(4, 32, 40), dtype=np.uint8):
    lines = ["\t".join((
        "participant_id", "anatomic_region", "imaging", "laterality",
        "number_of_frames", "pixel_spacing", "slice_thickness", "filepath",
        "clinical_site", "pathology", "part",
    ))]
    devices = ("heidelberg_spectralis", "topcon_triton")
    for person in range(people):
      for eye, device in enumerate(devices):
        name = f"/oct/{device}/{1000 + person}/{'LR'[eye]}.dcm"
        path = tmp_path / name.strip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = 2 * person + eye
        dataset = make_dataset(
            make_volume(shape, dtype, seed), PatientID=str(1000 + person),
            PixelSpacing=[0.004, 0.012], SpacingBetweenSlices=0.1,
        )
        content = to_bytes(dataset)
        if seed in broken:
          content = break_bytes(broken[seed], dataset, content)
        if content is not None:
          path.write_bytes(content)
        lines.append("\t".join((
            str(1000 + person), "Macula", "OCT", "LR"[eye], str(shape[0]),
            "[0.004, 0.012]", "0.1", name, ("UW", "UAB")[person % 2],
            ("normal", "drusen")[person // 2 % 2],
            ("train", "validation")[person == people - 1],
        )))
    manifest = tmp_path / "manifest.tsv"
    manifest.write_text("\n".join(lines) + "\n")
    return str(manifest)

  return write


def break_bytes(how: str, dataset: Dataset, content: bytes) -> bytes | None:
  if how == "missing_file":
    return None
  if how == "truncated":
    return content[: len(content) // 2]
  if how == "not_dicom":
    return b"not a scan at all" * 20
  if how == "no_pixel_data":
    del dataset.PixelData
  elif how == "wrong_modality":
    dataset.Modality = "OP"
  elif how == "constant":
    dataset.PixelData = bytes(len(dataset.PixelData))
  else:
    raise ValueError(how)
  return to_bytes(dataset)

