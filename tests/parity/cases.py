"""Reads a parity case and compares with the tolerances stated in it."""

import contextlib
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
  """One case: `case["in/x"]` is an array of io.npz, `config` what it was made with."""

  path: pathlib.Path
  arrays: dict[str, np.ndarray]
  config: dict
  tolerance: dict[str, dict | str]

  def __getitem__(self, name: str) -> np.ndarray:
    return self.arrays[name]

  def check(self, name: str, got) -> None:
    """Asserts that `got` is the reference's `name` within its stated tolerance."""
    want, got = self.arrays[name], np.asarray(got)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, not {want.shape}"
    stated = self.tolerance.get(name, "exact")
    if stated == "exact":
      np.testing.assert_array_equal(got, want, err_msg=name)
    else:
      np.testing.assert_allclose(got, want, **stated, err_msg=name)


def load(path: pathlib.Path) -> Case:
  """Loads ../shared/fixtures/parity/<case>, with all arrays of its io.npz."""
  about = json.loads((path / "case.json").read_text())
  with np.load(path / "io.npz") as arrays:
    return Case(path, dict(arrays), about["config"], about["tolerance"])


def volume(video: np.ndarray, axis: str = "T") -> jax.Array:
  """Turns a video [B, C, T, H, W] into [B, T, Z, Y, X, C]; its time is `axis`."""
  frames = np.moveaxis(video, 1, -1)  # [B, T, H, W, C]
  return jnp.asarray(frames[:, :, None] if axis == "T" else frames[:, None])


def highest() -> contextlib.AbstractContextManager:
  """Makes every product full float32, which the tolerances are stated for."""
  return jax.default_matmul_precision("highest")
