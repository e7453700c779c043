"""A family of small TIFF files, as the library that the reader uses writes them."""

from collections.abc import Callable, Iterator
import dataclasses
import io
from typing import Any

import numpy as np

KINDS = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float16", "float32", "float64", "bool", "complex64",
)
LOSSLESS = (
    "lzw", "zlib", "packbits", "zstd", "lzma", "lerc", "png", "jpegxl", "jpeg2000",
    "webp", "packints",
)


@dataclasses.dataclass(frozen=True)
class Case:
  """One file and what reading it should give.

  Attributes:
    name: what is particular about it.
    content: the file.
    options: of `data.read`.
    reason: the code of the error, or "" where it is read.
    expected: the voxels [T, Z, Y, X, C] that tifffile gives.
    spacing: (dt, dz, dy, dx), NaN unknown.
  """

  name: str
  content: bytes
  options: dict[str, Any]
  reason: str
  expected: np.ndarray | None
  spacing: tuple[float, ...]


def family() -> Iterator[Case]:
  """Yields every case; its voxels come from tifffile's own reading of the file."""
  yield from _types()
  yield from _codecs()
  yield from _layouts()
  yield from _axes()
  yield from _lengths()
  yield from _refused()


def _stack(kind: str = "uint8", shape: tuple[int, ...] = (5, 48, 64)) -> np.ndarray:
  """Returns smooth structure with noise in its low bits."""
  rng = np.random.default_rng(3)
  ramp = np.add.outer(np.linspace(0, 3, shape[-2]), np.linspace(0, 2, shape[-1]))
  smooth = 0.5 + 0.45 * np.sin(ramp + np.arange(np.prod(shape[:-2])).reshape(
      *shape[:-2], 1, 1
  )) + 0.02 * rng.standard_normal(shape)
  if kind == "bool":
    return smooth > 0.5
  if kind.startswith(("float", "complex")):
    return smooth.astype(kind)
  most = min(np.iinfo(kind).max, 40_000)
  return (np.clip(smooth, 0, 1) * most).astype(kind)


def _case(
    name: str,
    array: np.ndarray,
    *,
    reason: str = "",
    options: dict[str, Any] | None = None,
    order: str = "ZYX",
    voxels: Callable[[np.ndarray], np.ndarray] | None = None,
    spacing: tuple[float, ...] = (np.nan,) * 4,
    **write: Any,
) -> Case:
  import tifffile

  file = io.BytesIO()
  write.setdefault("photometric", "minisblack")
  tifffile.imwrite(file, array, **write)
  expected = None
  if not reason:
    direct = tifffile.imread(io.BytesIO(file.getvalue()))
    direct = voxels(direct) if voxels else direct
    kept = direct.transpose([order.index(a) for a in "TZYXC" if a in order])
    expected = np.expand_dims(
        kept, tuple(i for i, a in enumerate("TZYXC") if a not in order)
    )
  return Case(name, file.getvalue(), options or {}, reason, expected, spacing)


def _types() -> Iterator[Case]:
  for kind in KINDS:
    for order in "<>":
      array = _stack(kind)
      if kind == "bool" and order == ">":
        continue
      yield _case(
          f"type {order}{kind}", array, byteorder=order, metadata=None,
          reason="unsupported_pixels" if kind == "complex64" else "",
      )
  yield _case("type bool bits", _stack("bool"), bitspersample=1)
  yield _case("type 12 bits", _stack("uint16") >> 4, bitspersample=12)


def _codecs() -> Iterator[Case]:
  for codec in LOSSLESS:
    for kind in ("uint8", "uint16", "float32"):
      if kind == "float32" and codec in ("png", "jpeg2000", "webp", "jpegxl"):
        continue
      if codec == "webp" or (codec == "packints" and kind != "uint16"):
        continue
      extra = {"bitspersample": 12} if codec == "packints" else {}
      array = _stack(kind) >> 4 if codec == "packints" else _stack(kind)
      if codec == "packints":
        yield _case(f"codec {codec} {kind}", array, **extra)
        continue
      yield _case(f"codec {codec} {kind}", array, compression=codec)
  yield _case("codec jpeg uint8", _stack(), compression="jpeg")
  for codec in ("lzw", "zlib", "zstd"):
    for kind in ("uint8", "uint16", "float32"):
      yield _case(
          f"codec {codec} {kind} predictor", _stack(kind), compression=codec,
          predictor=True,
      )


def _layouts() -> Iterator[Case]:
  array = _stack("uint16")
  yield _case("layout BigTIFF", array, bigtiff=True)
  yield _case("layout BigTIFF >", array, bigtiff=True, byteorder=">", metadata=None)
  yield _case("layout tiles", array, tile=(16, 32))
  yield _case("layout tiles lzw", array, tile=(32, 16), compression="lzw")
  yield _case("layout tiles past the edge", array, tile=(32, 48), compression="zlib")
  yield _case("layout 3-D tiles", array, tile=(2, 16, 16), volumetric=True)
  yield _case("layout strips of 7", array, rowsperstrip=7, compression="zlib")
  yield _case("layout strips of 7 plain", array, rowsperstrip=7)
  yield _case("layout not contiguous", array, contiguous=False, metadata=None)
  yield _case("layout one plane", array[0], order="YX", metadata=None)
  for planar in ("contig", "separate"):
    channels = np.moveaxis(array, 0, -1) if planar == "contig" else array
    stated = {} if planar == "contig" else {"axes": "CYX"}
    yield _case(
        f"layout {planar} channels", channels, planarconfig=planar, options=stated,
        order="YXC" if planar == "contig" else "CYX",
    )
  yield _pyramid(array)
  yield _case(
      "layout white is zero", _stack(), photometric="miniswhite",
      voxels=lambda v: 255 - v,
  )
  colours = np.stack([_stack(), _stack()[::-1], _stack()[:, ::-1]], -1)
  for planar in ("contig", "separate"):
    stored = colours if planar == "contig" else np.moveaxis(colours, -1, 1)
    yield _case(
        f"colour RGB {planar}", stored, photometric="rgb", planarconfig=planar,
        options={"colour": "luminance"},
        voxels=lambda v: _luminance(v if v.shape[-1] == 3 else np.moveaxis(v, 1, -1)),
    )
  alpha = np.concatenate([colours, np.full_like(colours[..., :1], 9)], -1)
  yield _case(
      "colour RGBA", alpha, photometric="rgb", extrasamples=["unassalpha"],
      options={"colour": "luminance"}, voxels=lambda v: _luminance(v[..., :3]),
  )


def _pyramid(array: np.ndarray) -> Case:
  import tifffile

  file = io.BytesIO()
  with tifffile.TiffWriter(file, ome=True) as writer:
    how = {"photometric": "minisblack", "tile": (16, 16), "compression": "zlib"}
    writer.write(array, subifds=2, metadata={"axes": "ZYX"}, **how)
    for step in (2, 4):
      writer.write(array[:, ::step, ::step], subfiletype=1, **how)
  return Case(
      "layout OME pyramid", file.getvalue(), {}, "", array[None, ..., None],
      (np.nan,) * 4,
  )


def _luminance(pixels: np.ndarray) -> np.ndarray:
  weights = np.array([0.299, 0.587, 0.114], np.float32)
  return np.rint(pixels.astype(np.float32) @ weights).astype(pixels.dtype)


def _axes() -> Iterator[Case]:
  array = _stack("uint8", (2, 3, 48, 64))
  for axes in ("TZYX", "TCYX", "ZCYX", "CZYX", "ZTYX"):
    yield _case(f"axes {axes} by tifffile", array, metadata={"axes": axes}, order=axes)
    yield _case(
        f"axes {axes} OME", array, ome=True, metadata={"axes": axes}, order=axes
    )
  five = _stack("uint16", (2, 3, 2, 24, 32))
  for axes in ("TZCYX", "TCZYX", "CTZYX", "ZCTYX"):
    yield _case(f"axes {axes} OME", five, ome=True, metadata={"axes": axes}, order=axes)
  yield _case(
      "axes TZCYX ImageJ", five, imagej=True, metadata={"axes": "TZCYX"}, order="TZCYX"
  )
  yield _case(
      "axes TYX ImageJ", five[:, 0, 0], imagej=True, metadata={"axes": "TYX"},
      order="TYX",
  )
  yield _case("axes unknown, four", array, reason="ambiguous_axes")
  yield _case("axes unknown, five", five, reason="ambiguous_axes")
  yield _case("axes stated", array, options={"axes": "TZYX"}, order="TZYX")
  yield _case("axes stated, wrong in file", array, metadata={"axes": "QQYX"},
              options={"axes": "TZYX"}, order="TZYX")
  yield _case("axes wrong in file", array, metadata={"axes": "QQYX"},
              reason="ambiguous_axes")
  yield _case("axes of planes of samples", array[0], planarconfig="separate",
              reason="ambiguous_axes")
  yield _case("axes of stacks of planes of samples", array, planarconfig="separate",
              reason="ambiguous_axes")
  yield _case("axes stated of planes of samples", array, planarconfig="separate",
              options={"axes": "TZYX"}, order="TZYX")
  yield _case("axes one too many stated", array[0], options={"axes": "TZYX"},
              reason="ambiguous_axes")
  yield _case("axes stated of a page of one", array[:1], options={"axes": "TZYX"},
              order="TZYX", voxels=lambda v: v.reshape(1, 3, 48, 64))


def _lengths() -> Iterator[Case]:
  array = _stack("uint8", (2, 3, 48, 64))
  nan = np.nan
  yield _case(
      "lengths OME", array, ome=True, order="TZYX", spacing=(90, 2e-3, 4e-4, 5e-4),
      metadata={"axes": "TZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.4,
                "PhysicalSizeZ": 2000, "PhysicalSizeZUnit": "nm",
                "TimeIncrement": 1.5, "TimeIncrementUnit": "min"},
  )
  yield _case(
      "lengths OME in pixels", array, ome=True, order="TZYX", spacing=(nan,) * 4,
      metadata={"axes": "TZYX", "PhysicalSizeX": 1, "PhysicalSizeXUnit": "pixel"},
  )
  yield _case(
      "lengths ImageJ", array, imagej=True, order="TZYX", resolution=(4, 5),
      spacing=(2, 3e-3, 2e-4, 2.5e-4),
      metadata={"axes": "TZYX", "spacing": 3.0, "unit": "um", "finterval": 2.0},
  )
  yield _case(
      "lengths ImageJ in pixels", array, imagej=True, order="TZYX", resolution=(4, 5),
      spacing=(2, nan, nan, nan),
      metadata={"axes": "TZYX", "spacing": 3.0, "unit": "pixel", "finterval": 2.0},
  )
  yield _case(
      "lengths per cm", array[0], resolution=(10_000, 5_000),
      resolutionunit="CENTIMETER", spacing=(nan, nan, 2e-3, 1e-3),
  )
  yield _case("lengths 300 dpi", array[0], resolution=(300, 300), resolutionunit="INCH")
  yield _case("lengths of no unit", array[0], resolution=(4, 4), resolutionunit="NONE")


def _refused() -> Iterator[Case]:
  grey = _stack()
  colours = np.stack([grey, grey[::-1], grey], -1)
  yield _case("refused RGB", colours, photometric="rgb", reason="colour")
  yield _case("refused JPEG in YCbCr", colours, photometric="rgb", compression="jpeg",
              reason="colour")
  yield _case("refused palette", grey[0], photometric="palette",
              colormap=np.zeros((3, 256), np.uint16), reason="unsupported_pixels")
  yield _case("refused CMYK", np.concatenate([colours, colours[..., :1]], -1),
              photometric="separated", reason="unsupported_pixels")
  yield _case(
      "refused NaN", np.full((3, 8, 9), np.nan, np.float32), reason="nan_voxels"
  )
  yield _two_series(grey, {}, "several_series")
  yield _two_series(grey, {"key": "1"}, "")


def _two_series(grey: np.ndarray, options: dict[str, Any], reason: str) -> Case:
  import tifffile

  file = io.BytesIO()
  with tifffile.TiffWriter(file) as writer:
    writer.write(grey, photometric="minisblack")
    writer.write(grey[:2, :24, :32] + 1, photometric="minisblack")
  expected = None if reason else (grey[:2, :24, :32] + 1)[None, ..., None]
  return Case(
      f"two series {options or ''}".strip(), file.getvalue(), options, reason, expected,
      (np.nan,) * 4,
  )
