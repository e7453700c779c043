"""One recording on the host, and the errors that reading one can raise."""

from collections.abc import Mapping
import dataclasses
import difflib
from typing import Any

import cv2
import numpy as np

DTYPES = ("uint8", "int16", "uint16", "float32")

# Reason code -> what a reader of the message can do about it.
REASONS = {
    "missing_file": "check the manifest's filepath and the root it is joined to",
    "forbidden": "give this account read access to the path",
    "unreachable": "check the network and the address, then run again",
    "empty_file": "copy the file again from its source",
    "truncated": "copy the file again from its source",
    "not_dicom": "leave the file out of the manifest or convert it to DICOM",
    "unsupported_format": "convert it to DICOM, NIfTI, TIFF, .npy or .npz",
    "missing_extra": "install the extra named here",
    "changed": "copy it again, or make the manifest anew: it changed while read",
    "bad_archive": "copy the archive again from its source",
    "path_escape": "do not trust this archive; pack it again without such names",
    "several_series": "name one with `series`, or give each its own folder",
    "ambiguous_axes": "state the axes, such as axes=\"TZYX\"",
    "irregular_frames": "leave it out, or make its frames of one size and kind",
    "slices_missing": "copy the series again; a slice is lost or double",
    "decoder_died": "leave the file out; it kills the decoder",
    "timed_out": "leave the file out, or raise the time allowed a file",
    "wrong_modality": "leave it out by a filter, or name its modality in "
                      "`modalities`",
    "no_pixel_data": "export the file again with its pixels",
    "bad_header": "export the file again; its header contradicts itself",
    "frames_mismatch": "export the file again; frames were lost",
    "no_decoder": "install the decoder named here",
    "decode_failed": "copy the file again; its compressed frames are damaged",
    "colour": "pass colour=\"luminance\" to read colour as grey",
    "unsupported_pixels": "convert the pixels to 8 or 16 bit integers or float32",
    "bad_rescale": "export the file again with a finite, non-zero rescale slope",
    "too_large": "check the header and the spacing, or raise `max_voxels`",
    "too_small": "leave it out, or use a smaller patch",
    "constant": "leave it out; it holds no signal",
    "nan_voxels": "export it again without NaN or infinite voxels",
    "missing_spacing": "give pixel_spacing and slice_thickness in the manifest, "
                       "or use resample=\"resize\"",
}


class DataError(ValueError):
  """A manifest or a whole data set that cannot be used as asked."""


class ReadError(Exception):
  """One recording that cannot be used; counted by its reason, never replaced.

  Attributes:
    path: the file.
    reason: a short code, one of `REASONS`.
    detail: what was found, in words.
    remedy: what to do about it.
  """

  def __init__(
      self, path: str, reason: str, detail: str = "", remedy: str | None = None
  ):
    if reason not in REASONS:
      close = difflib.get_close_matches(reason, REASONS, 3, 0.0)
      raise KeyError(f"ReadError: unknown reason {reason!r}; closest {close}")
    self.path = path
    self.reason = reason
    self.detail = detail
    self.remedy = remedy or REASONS[reason]
    super().__init__(f"{path or '<bytes>'}: {reason}: {detail}; {self.remedy}")

  def __reduce__(self):
    return ReadError, (self.path, self.reason, self.detail, self.remedy)


@dataclasses.dataclass(eq=False)
class Record:
  """One recording: voxels, their size, and where they come from.

  Attributes:
    volume: uint8, int16, uint16 or float32 [T, Z, Y, X, C]. In OCT a frame is
      Z, a row (depth into the retina) Y, a column X.
    spacing: float32 [4], (dt, dz, dy, dx) in s and mm; NaN = unknown.
    source: the path it was read from.
    subject: the participant; splits never part one subject's recordings.
    mean: mean of the voxels; computed where None.
    std: standard deviation of the voxels; computed where None.
    meta: device, site, laterality, region, spacing_source, ...
    label: class number, or None.

  Raises:
    ValueError: names the source where a field breaks these rules.
  """

  volume: np.ndarray
  spacing: np.ndarray
  source: str
  subject: str = ""
  mean: float | None = None
  std: float | None = None
  meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  label: int | None = None

  def __post_init__(self):
    self._check_volume()
    self._check_spacing()
    if self.mean is None or self.std is None:
      self.mean, self.std = mean_std(self.volume)
    if not (np.isfinite(self.mean) and np.isfinite(self.std) and self.std >= 0):
      raise ValueError(
          f"{self.source}: mean {self.mean} and std {self.std} must be finite, "
          "and std not negative"
      )

  @property
  def stored_type(self) -> str:
    """The type of the voxels in the file, which may be another one here."""
    return str(self.meta.get("stored_type", self.volume.dtype))

  def _check_volume(self):
    volume = self.volume
    if not isinstance(volume, np.ndarray) or volume.ndim != 5:
      raise ValueError(
          f"{self.source}: volume must be an array [T, Z, Y, X, C], got "
          f"{type(volume).__name__} of shape {np.shape(volume)}"
      )
    if not volume.size:
      raise ValueError(f"{self.source}: volume {volume.shape} holds no voxel")
    if volume.dtype.name not in DTYPES:
      raise ValueError(
          f"{self.source}: volume is {volume.dtype}, must be one of "
          f"{', '.join(DTYPES)}"
      )

  def _check_spacing(self):
    self.spacing = np.asarray(self.spacing, np.float32)
    known = self.spacing[~np.isnan(self.spacing)]
    if self.spacing.shape != (4,) or not np.all((known > 0) & np.isfinite(known)):
      raise ValueError(
          f"{self.source}: spacing must be (dt, dz, dy, dx) > 0 in s and mm with "
          f"NaN for unknown, got {self.spacing.tolist()}"
      )


def mean_std(volume: np.ndarray) -> tuple[float, float]:
  """Returns mean and standard deviation of all voxels, summed in float64."""
  flat = np.ascontiguousarray(volume).reshape(volume.shape[0] * volume.shape[1], -1)
  mean, std = cv2.meanStdDev(flat)
  return float(mean[0, 0]), float(std[0, 0])
