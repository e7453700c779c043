"""Host cost of a volume: ours beside MONAI's chain, in turn, on one core.

python -m vjepa_jax.bench.peers [--volumes=4] [--rounds=7]

Needs the extra `bench` (monai, torch). Three comparisons, in CPU seconds a volume:

  cached  what the host still does once shards are written, against MONAI's chain on
          a NIfTI file that already has the canvas's size, as it runs every epoch;
  raw     a raw uncompressed file, decoded and resampled each time, against the same
          chain with a true `Spacingd` on the same voxels;
  all     as `cached`, with every augmentation in JAX on the same core as well.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import os
import pathlib
import tempfile
import time
from typing import Any

from absl import app, flags
import jax
import numpy as np

from vjepa_jax.bench import common, input_rate
from vjepa_jax.data import batches, pipeline
from vjepa_jax.volumes.augment import make_augment

CANVAS = (64, 384, 384)
RAW_MM = (0.046875, 0.0030, 0.01171875)  # So that the raw scan fills the canvas.
# One view of either side: the same ranges, as fractions where the canvases differ.
ROTATE, SCALE, SHIFT, NOISE, FLIP = 0.1, 0.1, (2.0, 8.0, 8.0), 0.1, 0.5
_SINGLE = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)
_XLA = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
Arm = Callable[[], Any]


def confine(core: int) -> None:
  """Keeps this process, and what it starts, to one core and one thread a library."""
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {core})
  os.environ.update({name: "1" for name in _SINGLE})
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_XLA}".strip()
  jax.config.update("jax_platforms", "cpu")


def compare(
    arms: Mapping[str, Arm], *, volumes: int, rounds: int
) -> dict[str, list[float]]:
  """Runs the arms one after the other, round by round.

  Args:
    arms: name -> call that does the whole work of `volumes` volumes.
    volumes: of a call.
    rounds: timed rounds, at least 5, after one that is not.

  Returns:
    {name: CPU seconds a volume, one a round}.

  Raises:
    ValueError: fewer than 5 rounds.
  """
  if rounds < 5:
    raise ValueError(f"bench: rounds={rounds}; at least 5 are needed for a spread")
  found = {name: [] for name in arms}
  for turn in range(rounds + 1):
    for name, call in arms.items():
      begin = time.process_time()
      jax.block_until_ready(call())
      if turn:
        found[name].append((time.process_time() - begin) / volumes)
  return found


def summary(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
  """Returns median, p10, p90 in ms of CPU a volume, and the rate a CPU second."""
  rows = {}
  for name, values in seconds.items():
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    rows[name] = {
        "median_ms": 1e3 * median, "p10_ms": 1e3 * p10, "p90_ms": 1e3 * p90,
        "volumes_per_cpu_s": 1 / median,
    }
  return rows


def monai_chain(spacing_mm: Sequence[float] | None, seed: int = 0) -> Arm:
  """Returns the usual chain of a MONAI pre-training recipe as a call of a path.

  Args:
    spacing_mm: voxel size (X, Y, Z) to resample to; None: that of the files, so that
      `Spacingd` has nothing to do.
    seed: of its draws.
  """
  import monai.transforms as mt
  import torch

  torch.set_num_threads(1)
  size = CANVAS[::-1]  # A NIfTI array is X, Y, Z.
  crop = [round(n * 0.9) for n in size]
  chain = mt.Compose([
      mt.LoadImaged("image", image_only=False),
      mt.EnsureChannelFirstd("image"),
      mt.Spacingd("image", pixdim=spacing_mm or (1.0, 1.0, 1.0), mode="bilinear"),
      mt.NormalizeIntensityd("image"),
      mt.ResizeWithPadOrCropd("image", size),
      mt.RandSpatialCropd("image", crop, random_size=False),
      mt.Resized("image", size, mode="trilinear"),
      *(mt.RandFlipd("image", prob=FLIP, spatial_axis=axis) for axis in range(3)),
      mt.RandAffined(
          "image", prob=1.0, rotate_range=(0.0, 0.0, ROTATE), scale_range=(SCALE,) * 3,
          translate_range=SHIFT[::-1], mode="bilinear", padding_mode="border",
      ),
      mt.RandGaussianNoised("image", prob=1.0, std=NOISE),
  ])
  chain.set_random_state(seed)
  return lambda path: np.asarray(chain({"image": path})["image"])


def ours_augment() -> Arm:
  """Returns the same draws as a jitted function of a host batch."""
  augment = jax.jit(
      make_augment(
          flip=(0.0, FLIP, FLIP, FLIP), scale=(0.0, SCALE, SCALE, SCALE),
          shift=(0.0, *SHIFT), rotate=ROTATE, noise_std=NOISE,
      ),
      static_argnames="train",
  )

  def call(batch: batches.Batch, key: jax.Array) -> jax.Array:
    # Only what the device needs: file names and the like stay.
    names = ("volume", "mean", "std", "spacing")
    given = {name: batch[name] for name in names}
    given["_position"] = np.arange(len(batch["mean"]), dtype=np.int32)
    return augment(given, key, train=True)["volume"]

  return call


def write_files(folder: pathlib.Path, volumes: int) -> dict[str, list[str]]:
  """Writes raw scans as DICOM and NIfTI, and canvases as NIfTI.

  Returns:
    {"raw_dicom": manifest, "raw": NIfTI paths, "canvas": NIfTI paths}.
  """
  import nibabel

  def save(name: str, shape: Sequence[int], millimetres: Sequence[float]) -> list[str]:
    paths = []
    for index in range(volumes):
      rng = np.random.default_rng(index)
      voxels = rng.integers(0, 256, shape, dtype=np.uint8)
      affine = np.diag([*millimetres[::-1], 1.0])
      paths.append(str(folder / f"{name}_{index}.nii"))
      nibabel.save(nibabel.Nifti1Image(voxels.T, affine), paths[-1])
    return paths

  (folder / "dicom").mkdir()
  manifest = input_rate.write_synthetic(
      folder / "dicom", volumes=volumes, files=volumes
  )
  return {
      "raw_dicom": [manifest],
      "raw": save("raw", input_rate.RAW_SHAPE, RAW_MM),
      "canvas": save("canvas", CANVAS, (1.0, 1.0, 1.0)),
  }


def measure(*, volumes: int, rounds: int) -> dict[str, Any]:
  """Measures the three comparisons; see the module.

  Returns:
    {comparison: {arm: {median_ms, p10_ms, p90_ms, volumes_per_cpu_s}, "ratio": MONAI's
    median over ours}}.
  """
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    files = write_files(folder, volumes)
    nifti = folder / "raw.tsv"
    nifti.write_text("participant_id\tfilepath\n" + "".join(
        f"{index}\t/{pathlib.Path(path).name}\n"
        for index, path in enumerate(files["raw"])
    ))
    options = dict(
        canvas=CANVAS, splits={"all": 1.0}, modalities=None, threads=1,
        max_bad_fraction=0.5,
    )
    open_split = lambda manifest, cache: pipeline.open_data(
        str(manifest), cache=cache, **options
    ).splits["all"]
    shards = open_split(files["raw_dicom"][0], str(folder / "shards"))
    raw = {
        "dicom": open_split(files["raw_dicom"][0], "none"),
        "nifti": open_split(nifti, "none"),
    }
    target = [
        mm * n / c for mm, n, c in zip(RAW_MM, input_rate.RAW_SHAPE, CANVAS)
    ][::-1]
    as_is, spaced = monai_chain(None), monai_chain(target)
    arms = {
        "cached": {
            "ours": lambda: list(_read(shards)),
            "monai": lambda: [as_is(path).shape for path in files["canvas"]],
        },
        "raw": {
            "ours_dicom": lambda: list(_read(raw["dicom"])),
            "ours_nifti": lambda: list(_read(raw["nifti"])),
            "monai": lambda: [spaced(path).shape for path in files["raw"]],
        },
        "all": {
            "ours": _augmented(shards),
            "monai": lambda: [as_is(path).shape for path in files["canvas"]],
        },
    }
    found = {}
    for key, pair in arms.items():
      rows = summary(compare(pair, volumes=volumes, rounds=rounds))
      ours = max(row["median_ms"] for arm, row in rows.items() if arm != "monai")
      found[key] = rows | {"ratio": rows["monai"]["median_ms"] / ours}
    return found


def _read(volumes: batches.Volumes) -> Iterator[np.ndarray]:
  for batch in batches.eval_batches(volumes, 1, threads=1):
    yield batch["mean"]


def _augmented(volumes: batches.Volumes) -> Arm:
  augment, keys = ours_augment(), iter(range(10**9))

  def call() -> list[jax.Array]:
    done = []
    for batch in batches.eval_batches(volumes, 1, threads=1):
      key = jax.random.key(next(keys))
      # Waited for one by one: a rate of its own, not of many in memory at a time.
      done = [jax.block_until_ready(augment(batch, key))]
    return done

  return call


def main(argv: Sequence[str]) -> None:
  """Compares with MONAI and prints one JSON line."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")
  values = flags.FLAGS
  confine(values.core)
  try:
    import monai
    import torch
  except ImportError as error:
    raise app.UsageError(
        f"{error}; pip install \"vjepa_jax[bench]\""
    ) from error
  numbers = measure(volumes=values.volumes, rounds=values.rounds)
  ours = numbers["cached"]["ours"]["median_ms"] / 1e3
  common.emit(common.line(
      "peers", "x".join(map(str, CANVAS)), [ours], [ours], unit="CPU s a volume",
      volumes=values.volumes, rounds=values.rounds,
      peers={"monai": monai.__version__, "torch": torch.__version__},
      comparisons=numbers,
  ))


if __name__ == "__main__":
  flags.DEFINE_integer("volumes", 4, "Volumes of a turn.", lower_bound=1)
  flags.DEFINE_integer("rounds", 7, "Turns of each side.", lower_bound=5)
  flags.DEFINE_integer("core", 0, "The core to stay on.", lower_bound=0)
  app.run(main)
