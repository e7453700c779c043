"""One small sound file, archive or folder of each kind that a reader takes.

The bytes are the same on every run, so that a seed and a number name one mutation.
"""

from collections.abc import Callable, Mapping
import dataclasses
import gzip
import io
import re
from typing import Any
import zipfile

import numpy as np

SHAPE = (4, 24, 32)  # Frames, rows, columns.
_STEM = "1.2.826.0.1.3680043.8.498."
_OPT = "1.2.840.10008.5.1.4.1.1.77.1.5.4"
_CT = "1.2.840.10008.5.1.4.1.1.2"


@dataclasses.dataclass(frozen=True)
class Seed:
  """A sound recording.

  Attributes:
    files: relative name -> content; a file has one entry, a folder its members.
    folder: whether the recording is the folder.
    options: fields of `ReadOptions` that it needs.
    fields: (offset, bytes) of numbers in the header of the first file.
  """

  files: Mapping[str, bytes]
  folder: bool = False
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  fields: tuple[tuple[int, int], ...] = ()


def make_voxels(dtype: Any = np.uint8, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
  """Returns layers with some noise, no voxel 0; the same for the same arguments."""
  rng = np.random.default_rng(7)
  rows = np.arange(shape[-2])[:, None]
  layers = 0.5 + 0.35 * np.sin(rows / 3.0) + 0.02 * rng.standard_normal(shape)
  top = 255 if np.dtype(dtype).itemsize == 1 else 4000
  return (1 + np.clip(layers, 0, 1) * (top - 2)).astype(dtype)


# DICOM


def _dataset(voxels: np.ndarray, number: int = 1, **tags: Any):
  from pydicom.dataset import Dataset, FileMetaDataset
  from pydicom.uid import ExplicitVRLittleEndian

  dataset = Dataset()
  bits = 8 * voxels.itemsize
  usual = dict(
      SOPClassUID=_OPT, SOPInstanceUID=f"{_STEM}{number}", Modality="OPT",
      PatientID="p1", SeriesInstanceUID=f"{_STEM}9", Manufacturer="Maker",
      SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2",
      NumberOfFrames=voxels.shape[0], Rows=voxels.shape[1], Columns=voxels.shape[2],
      PixelSpacing=[0.004, 0.012], SpacingBetweenSlices=0.1, BitsAllocated=bits,
      BitsStored=bits, HighBit=bits - 1,
      PixelRepresentation=int(voxels.dtype.kind == "i"),
  )
  for name, value in (usual | tags).items():
    if value is not None:
      setattr(dataset, name, value)
  dataset.PixelData = voxels.astype(voxels.dtype.newbyteorder("<")).tobytes()
  dataset["PixelData"].VR = "OW" if voxels.itemsize == 2 else "OB"
  meta = dataset.file_meta = FileMetaDataset()
  meta.TransferSyntaxUID = ExplicitVRLittleEndian
  meta.MediaStorageSOPClassUID = dataset.SOPClassUID
  meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
  return dataset


def _dicom_bytes(dataset) -> bytes:
  file = io.BytesIO()
  dataset.save_as(file, enforce_file_format=True)
  return file.getvalue()


# Image size, frames, bits, samples, signs, pixels: each followed by VR and length.
_TAGS = (
    "28000200", "28000800", "28001000", "28001100", "28003000", "28000001",
    "28000101", "28000201", "28000301", "28005210", "28005310", "02001000", "e07f1000",
    "00520992", "00523092", "feff00e0", "feffdde0", "18008800", "20003200",
)


def _dicom_seed(content: bytes) -> Seed:
  fields = []
  for tag in map(bytes.fromhex, _TAGS):
    at = content.find(tag, 132)
    if at > 0:
      fields += [(at + 4, 2), (at + 6, 2), (at + 8, 2), (at + 8, 4)]
  return Seed({"scan.dcm": content}, fields=tuple(fields))


def _dicom(syntax: str, dtype: Any = np.uint8) -> Callable[[], Seed]:
  def make() -> Seed:
    from pydicom import uid
    from pydicom.encaps import encapsulate

    chosen = getattr(uid, syntax)
    voxels = make_voxels(dtype)
    dataset = _dataset(voxels)
    if syntax == "RLELossless":
      dataset.compress(chosen, generate_instance_uid=False)
    elif chosen.is_encapsulated:
      frames = [_ENCODERS[syntax](np.ascontiguousarray(f)) for f in voxels]
      dataset.PixelData = encapsulate(frames)
      dataset["PixelData"].VR = "OB"
      dataset["PixelData"].is_undefined_length = True
    elif not chosen.is_little_endian:
      dataset.PixelData = voxels.astype(voxels.dtype.newbyteorder(">")).tobytes()
    dataset.file_meta.TransferSyntaxUID = chosen
    return _dicom_seed(_dicom_bytes(dataset))

  return make


def _encoder(name: str, **options: Any) -> Callable[[np.ndarray], bytes]:
  def encode(frame: np.ndarray) -> bytes:
    import imagecodecs

    return getattr(imagecodecs, name)(frame, **options)

  return encode


_ENCODERS = {
    "JPEGBaseline8Bit": _encoder("jpeg8_encode", level=90),
    "JPEGLosslessSV1": _encoder("ljpeg_encode"),
    "JPEGLSLossless": _encoder("jpegls_encode"),
    "JPEG2000Lossless": _encoder("jpeg2k_encode", codecformat="J2K", level=0),
    "HTJ2KLossless": _encoder("htj2k_encode", level=0),
}


def _enhanced() -> Seed:
  from pydicom.dataset import Dataset
  from pydicom.sequence import Sequence

  def item(**tags):
    made = Dataset()
    for name, value in tags.items():
      setattr(made, name, Sequence([value]) if isinstance(value, Dataset) else value)
    return made

  frames = [
      item(PlanePositionSequence=item(ImagePositionPatient=[0, 0, 0.25 * z]))
      for z in range(SHAPE[0])
  ]
  shared = item(PixelMeasuresSequence=item(PixelSpacing=[0.004, 0.012]))
  dataset = _dataset(
      make_voxels(np.uint16), PixelSpacing=None, SpacingBetweenSlices=None,
      SharedFunctionalGroupsSequence=Sequence([shared]),
      PerFrameFunctionalGroupsSequence=Sequence(frames),
  )
  return _dicom_seed(_dicom_bytes(dataset))


def _slices() -> dict[str, bytes]:
  files = {}
  for index, plane in enumerate(make_voxels(np.int16)):
    dataset = _dataset(
        plane[None], 20 + index, InstanceNumber=index + 1, NumberOfFrames=None,
        ImagePositionPatient=[0, 0, 2.5 * index],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0], SpacingBetweenSlices=None,
        FrameOfReferenceUID=f"{_STEM}8", StudyInstanceUID=f"{_STEM}7",
        RescaleSlope=1, RescaleIntercept=-1024,
    )
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = _CT
    dataset.Modality = "CT"
    # Named against their order in space.
    files[f"{9 - index}.dcm"] = _dicom_bytes(dataset)
  return files


def _series() -> Seed:
  files = _slices()
  return Seed(files, folder=True, fields=_dicom_seed(next(iter(files.values()))).fields)


def make_zip(files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
  """Returns an archive, the same bytes for the same files."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", method) as archive:
    for name, content in files.items():
      archive.writestr(zipfile.ZipInfo(name), content, method)
  return file.getvalue()


def _zip_fields(content: bytes) -> tuple[tuple[int, int], ...]:
  """Sizes, offsets, methods and flags of every entry, and of the archive."""
  places = {
      b"PK\x03\x04": ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
      b"PK\x01\x02": (
          (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4),
      ),
      b"PK\x05\x06": ((8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
  }
  return tuple(
      (found.start() + offset, size)
      for mark, offsets in places.items()
      for found in re.finditer(re.escape(mark), content)
      for offset, size in offsets
  )


def _zip_seed(name: str, content: bytes) -> Seed:
  return Seed({name: content}, fields=_zip_fields(content))


def _series_zip() -> Seed:
  return _zip_seed("series.zip", make_zip(_slices()))


# NIfTI

_NIFTI_FIELDS = (
    (0, 4), *((40 + 2 * i, 2) for i in range(8)), (68, 2), (70, 2), (72, 2),
    *((76 + 4 * i, 4) for i in range(8)), (108, 4), (112, 4), (116, 4), (123, 1),
    (252, 2), (254, 2), *((256 + 4 * i, 4) for i in range(6)),
    *((280 + 4 * i, 4) for i in range(12)), (344, 4), (348, 4),
)


def _nifti(shape: tuple[int, ...], dtype: Any = np.int16, *, name: str = "scan.nii",
           big: bool = False, vector: bool = False, scaled: bool = False):
  def make() -> Seed:
    import nibabel

    voxels = make_voxels(dtype, shape)
    kind = nibabel.Nifti2Image if "2" in name else nibabel.Nifti1Image
    affine = np.array([
        [-1.5, 0, 0, 20], [0, 2.0, 0, -10], [0, 0, 3.0, 5], [0, 0, 0, 1]
    ])
    header = kind.header_class(endianness=">" if big else "<")
    header.set_data_dtype(dtype)
    image = kind(voxels, affine, header)
    if vector:
      image.header.set_intent("vector")
    if scaled:
      image.header.set_slope_inter(0.5, -3.0)
    content = image.to_bytes()
    if name.endswith(".gz"):
      content = gzip.compress(content, mtime=0)
    fields = () if "2" in name or name.endswith(".gz") else _NIFTI_FIELDS
    return Seed({name: content}, fields=fields)

  return make


# TIFF


def _tiff(**options: Any) -> Callable[[], Seed]:
  def make() -> Seed:
    import tifffile

    chosen = {"photometric": "minisblack"} | options
    voxels = make_voxels(chosen.pop("dtype", np.uint16))
    axes = chosen.pop("axes", None)
    file = io.BytesIO()
    tifffile.imwrite(file, voxels, **chosen)
    # OME has a new name for every file.
    content = re.sub(
        rb"urn:uuid:[0-9a-f-]{36}", b"urn:uuid:" + b"0" * 8 + b"-0000" * 3 + b"-"
        + b"0" * 12, file.getvalue(),
    )
    return Seed(
        {"stack.ome.tif" if chosen.get("ome") else "stack.tif": content},
        options={"axes": axes} if axes else {}, fields=_tiff_fields(content),
    )

  return make


def _tiff_fields(content: bytes) -> tuple[tuple[int, int], ...]:
  """Type, count and value of the entries of each directory, and the links."""
  order = "little" if content[:2] == b"II" else "big"
  number = lambda at, size: int.from_bytes(content[at : at + size], order)
  big = number(2, 2) == 43
  word, head, width = (8, 8, 20) if big else (4, 2, 12)
  link = 8 if big else 4
  fields = [(2, 2), (link, word)]
  at = number(link, word)
  while at and len(fields) < 400:
    count = number(at, head)
    fields.append((at, head))
    for entry in range(count):
      place = at + head + width * entry
      fields += [(place, 2), (place + 2, 2), (place + 4, word),
                 (place + 4 + word, word)]
    at = at + head + width * count
    fields.append((at, word))
    at = number(at, word)
  return tuple(fields)


def _time_points() -> Seed:
  import tifffile

  files = {}
  for time in range(3):
    file = io.BytesIO()
    tifffile.imwrite(
        file, make_voxels(np.uint8) + np.uint8(time), metadata=None,
        photometric="minisblack",
    )
    files[f"t{time:03d}.tif"] = file.getvalue()
  return Seed(
      files, folder=True, options={"axes": "ZYX"},
      fields=_tiff_fields(files["t000.tif"]),
  )


# Arrays


def _npy(dtype: Any = np.uint16, **options: Any) -> Callable[[], Seed]:
  def make() -> Seed:
    file = io.BytesIO()
    np.save(file, make_voxels(dtype, options.get("shape", SHAPE)))
    return Seed({"scan.npy": file.getvalue()}, fields=((6, 1), (7, 1), (8, 2)))

  return make


def _npz(save: Callable[..., None]) -> Callable[[], Seed]:
  def make() -> Seed:
    file = io.BytesIO()
    save(file, volume=make_voxels(), spacing=np.array([0.1, 0.004, 0.012]))
    return _zip_seed("scan.npz", file.getvalue())

  return make


def _hdf5(**storage: Any) -> Callable[[], Seed]:
  def make() -> Seed:
    import h5py

    file = io.BytesIO()
    with h5py.File(file, "w") as group:
      group.create_dataset("volume", data=make_voxels(), **storage)
    content = file.getvalue()
    # The superblock, and every 8-byte word that holds a size of the array.
    fields = [(at, 1) for at in range(8, 24)] + [(at, 8) for at in range(24, 96, 8)]
    for size in (*SHAPE, make_voxels().size):
      mark = size.to_bytes(8, "little")
      fields += [(found.start(), 8) for found in re.finditer(re.escape(mark), content)]
    return Seed({"scan.h5": content}, fields=tuple(fields))

  return make


def _zarr(version: int) -> Callable[[], Seed]:
  def make() -> Seed:
    import zarr
    from zarr.storage import MemoryStore

    stored: dict[str, Any] = {}
    array = zarr.create_array(
        MemoryStore(stored), shape=SHAPE, chunks=(2, 12, 32), dtype="uint16",
        zarr_format=version,
    )
    array[:] = make_voxels(np.uint16)
    return Seed(
        {name: value.to_bytes() for name, value in sorted(stored.items())},
        folder=True,
    )

  return make


# Movies


def _movie(name: str, codec: str, pixels: str) -> Callable[[], Seed]:
  def make() -> Seed:
    import av

    file = io.BytesIO()
    kind = name.split(".")[1]
    options = {"fflags": "+bitexact"}
    with av.open(file, "w", format=kind, options=options) as container:
      stream = container.add_stream(codec, rate=10)
      stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
      stream.codec_context.flags |= 0x00800000  # Bit-exact: no name of the encoder.
      stream.codec_context.thread_count = 1
      for index in range(5):
        plane = np.roll(make_voxels(np.uint8, (1, 48, 64))[0], 2 * index, 1)
        frame = av.VideoFrame.from_ndarray(plane, format="gray")
        container.mux(stream.encode(frame.reformat(format=pixels)))
      container.mux(stream.encode(None))
    content = file.getvalue()
    marks = (b"mvhd", b"tkhd", b"stsz", b"stco", b"stsc", b"stts", b"avc1", b"mp4v")
    fields = [(4, 4), (6, 2), (8, 2)]
    for mark in marks:
      at = content.find(mark)
      if at > 4:
        fields += [(at - 4, 4), *((at + 4 + 4 * i, 4) for i in range(5)),
                   (at + 28, 2), (at + 30, 2)]
    return Seed({name: content}, options={"colour": "luminance"}, fields=tuple(fields))

  return make


# OCT vendors, by the makers of their own tests


def _vendor(name: str, make: str, **options: Any) -> Callable[[], Seed]:
  def build() -> Seed:
    from tests.data import test_oct_vendor as vendors

    content = getattr(vendors, make)(**options)
    # Every word where the headers are.
    fields = tuple((at, 4) for at in range(0, min(640, len(content) - 8), 4))
    return Seed({name: content}, fields=fields)

  return build


def _zeiss() -> Seed:
  from tests.data import test_oct_vendor as vendors

  content = vendors.make_zeiss(make_voxels(np.uint8, (3, 1024, 16)))
  return Seed({vendors.ZEISS.format(x=16, z=3): content})


SEEDS: dict[str, Callable[[], Seed]] = {
    "dicom_u8": _dicom("ExplicitVRLittleEndian"),
    "dicom_i16": _dicom("ImplicitVRLittleEndian", np.int16),
    "dicom_big": _dicom("ExplicitVRBigEndian", np.uint16),
    "dicom_deflated": _dicom("DeflatedExplicitVRLittleEndian", np.uint16),
    "dicom_rle": _dicom("RLELossless", np.uint16),
    "dicom_jpeg": _dicom("JPEGBaseline8Bit"),
    "dicom_ljpeg": _dicom("JPEGLosslessSV1", np.uint16),
    "dicom_jpegls": _dicom("JPEGLSLossless", np.uint16),
    "dicom_j2k": _dicom("JPEG2000Lossless", np.uint16),
    "dicom_htj2k": _dicom("HTJ2KLossless"),
    "dicom_enhanced": _enhanced,
    "series": _series,
    "series_zip": _series_zip,
    "nifti": _nifti((12, 10, 8)),
    "nifti_gz": _nifti((12, 10, 8), np.float32, name="scan.nii.gz"),
    "nifti_big_scaled": _nifti((12, 10, 8), big=True, scaled=True),
    "nifti_4d": _nifti((8, 10, 6, 3), np.uint8),
    "nifti_vector": _nifti((8, 10, 6, 1, 2), np.float32, vector=True),
    "nifti2": _nifti((12, 10, 8), np.uint16, name="scan2.nii"),
    "tiff": _tiff(metadata=None, axes="ZYX"),
    "tiff_big_endian": _tiff(byteorder=">", metadata=None, axes="ZYX"),
    "tiff_ome": _tiff(ome=True, metadata={"axes": "ZYX"}),
    "tiff_imagej": _tiff(imagej=True, metadata={"axes": "ZYX", "spacing": 0.5}),
    "tiff_lzw": _tiff(compression="lzw", metadata=None, axes="ZYX"),
    "tiff_deflate": _tiff(compression="zlib", predictor=True, tile=(16, 16),
                          metadata=None, axes="ZYX"),
    "tiff_jpeg": _tiff(compression="jpeg", dtype=np.uint8, metadata=None, axes="ZYX"),
    "tiff_zstd": _tiff(compression="zstd", metadata=None, axes="ZYX"),
    "tiff_packbits": _tiff(compression="packbits", dtype=np.uint8, metadata=None,
                           axes="ZYX"),
    "tiff_bigtiff": _tiff(bigtiff=True, metadata=None, axes="ZYX"),
    "time_points": _time_points,
    "npy": _npy(),
    "npy_float": _npy(np.float64),
    "npz": _npz(np.savez),
    "npz_deflated": _npz(np.savez_compressed),
    "hdf5": _hdf5(),
    "hdf5_gzip": _hdf5(chunks=(2, 12, 32), compression="gzip", shuffle=True),
    "zarr2": _zarr(2),
    "zarr3": _zarr(3),
    "mp4": _movie("movie.mp4", "mpeg4", "yuv420p"),
    "gif": _movie("movie.gif", "gif", "gray"),
    "avi": _movie("movie.avi", "mjpeg", "yuvj420p"),
    "vol": _vendor("scan.vol", "make_vol"),
    "e2e": _vendor("scan.e2e", "make_e2e"),
    "fda": _vendor("scan.fda", "make_topcon"),
    "fda_jpeg": _vendor("scan.fda", "make_topcon", kind="jpeg"),
    "fds": _vendor("scan.fds", "make_topcon", kind="scan"),
    "bioptigen": _vendor("scan.oct", "make_bioptigen"),
    "zeiss": _zeiss,
}
