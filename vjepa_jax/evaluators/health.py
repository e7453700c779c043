"""Whether the target features are alive: spread, rank and likeness of tokens.

The alarm looks at pairwise cosine, at the std and at the UNCENTRED RankMe,
against the start of the run. The centred RankMe is reported but never alarms: in
a total collapse it rises, because what is left around the common vector is noise
of full rank. None of these numbers is a score of quality; the probe is.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import math
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.data import pipeline
from vjepa_jax.evaluators.base import find_split
from vjepa_jax.volumes.grid import Grid

FOREGROUNDS = ("otsu", "median")
# A dimension of a smaller std is counted as dead.
DEAD_STD = 0.01
# An alarm compares these with their first values.
BASES = ("health.std", "health.rankme_uncentred")


class Evaluator:
  """Health of the target features, on all and on foreground tokens.

  `run` yields, over tokens drawn from volumes of one split:
    health.std: std of a dimension over tokens, mean over dimensions.
    health.dead: share of dimensions whose std is below 0.01.
    health.rankme, health.rankme_uncentred: effective rank (see `rankme`).
    health.cosine: mean cosine of two tokens.
    health.*_foreground: std, rankme and cosine of the tokens brighter than the
      volume's threshold.
    health.std_volumes: std over volumes of the mean token, mean over dimensions;
      near 0 where tokens differ by place alone.
    health.target_offset: what functions["target_offset"](params, model_state)
      says, |target - online| / |online| of the parameters; if offered.
    health.alarm: 1 if the features have collapsed (also logged in words), or 0.
  """

  def __init__(
      self,
      functions: Mapping[str, Callable[..., Any]],
      data: Any,
      *,
      split: str = "probe",
      volumes: int = 64,
      batch_size: int = 16,
      tokens: int = 2048,
      foreground: str = "otsu",
      seed: int = 0,
      max_cosine: float = 0.99,
      min_std_share: float = 0.1,
      min_rankme_share: float = 0.1,
  ):
    """Chooses the volumes.

    Args:
      functions: of the objective; "features" at least.
      data: the open data.
      split: where to look.
      volumes: number of volumes, drawn once (all, where there are fewer).
      batch_size: volumes a call of the encoder.
      tokens: number of tokens, drawn evenly from the volumes. RankMe needs more
        of them than dimensions.
      foreground: "otsu" or "median" of a volume's token intensities.
      seed: of the draws.
      max_cosine: alarm above it.
      min_std_share: alarm where health.std is below this share of its first value.
      min_rankme_share: the same of health.rankme_uncentred.

    Raises:
      KeyError: for an unknown split, or if functions lack "features".
      ValueError: for an unknown foreground or an empty split.
    """
    if "features" not in functions:
      raise KeyError(
          "health: the objective must offer 'features'; it offers "
          f"{', '.join(sorted(functions))}"
      )
    if foreground not in FOREGROUNDS:
      raise ValueError(
          f"health.foreground {foreground!r} is not one of {', '.join(FOREGROUNDS)}"
      )
    self._functions = functions
    self._volumes = find_split(data, split, "health")
    generator = np.random.default_rng(seed)
    count = min(volumes, len(self._volumes))
    self._rows = np.sort(generator.choice(len(self._volumes), count, replace=False))
    self._each = math.ceil(tokens / count)
    self._batch_size, self._foreground, self._seed = batch_size, foreground, seed
    self._max_cosine = max_cosine
    self._min_shares = dict(
        zip(BASES, (min_std_share, min_rankme_share), strict=True)
    )
    self._first = {}

  def restore(self, history: Iterable[Mapping[str, float]]) -> None:
    """Takes the first values from earlier metrics, so that a resumed run is
    judged by its true start; `history` are the lines of metrics.jsonl."""
    for line in history:
      for name in BASES:
        if line.get(name) is not None:
          self._first.setdefault(name, line[name])

  def run(self, params: Any, model_state: Any) -> Iterator[tuple[str, float]]:
    """Yields the numbers named above for these parameters."""
    tokens, foreground, pooled = self._draw(params, model_state)
    numbers = {
        **_described(tokens, ""),
        "health.dead": float((tokens.std(axis=0) < DEAD_STD).mean()),
        "health.rankme_uncentred": rankme(tokens, centred=False),
        "health.std_volumes": float(pooled.std(axis=0).mean()),
    }
    if len(foreground) > 1:
      numbers |= _described(foreground, "_foreground")
    if "target_offset" in self._functions:
      offset = self._functions["target_offset"](params, model_state)
      numbers["health.target_offset"] = float(offset)
    for name in BASES:
      self._first.setdefault(name, numbers[name])
    yield from numbers.items()
    yield "health.alarm", float(self._alarm(numbers))

  def _draw(self, params, model_state):
    """Returns all and foreground tokens [n, D] and mean tokens [volumes, D]."""
    generator = np.random.default_rng(self._seed)
    everywhere, bright, pooled = [], [], []
    for batch in pipeline.eval_batches(self._volumes, self._batch_size, self._rows):
      features = self._functions["features"](params, model_state, batch)
      masks = foreground_tokens(batch["volume"], features.grid, self._foreground)
      each = min(self._each, features.tokens.shape[1])
      real = np.flatnonzero(batch["_mask"])
      ids, known = np.zeros((len(masks), 2 * each), np.int32), []
      for row in real:
        ids[row, :each] = generator.permutation(masks.shape[1])[:each]
        inside = generator.permutation(np.flatnonzero(masks[row]))[:each]
        ids[row, each : each + len(inside)] = inside
        known.append(len(inside))
      chosen, mean = map(np.asarray, _gather(features.tokens, ids))
      everywhere.append(chosen[real, :each].reshape(-1, chosen.shape[-1]))
      bright += [
          chosen[row, each : each + count]
          for row, count in zip(real, known, strict=True)
      ]
      pooled.append(mean[real])
    return (
        np.concatenate(everywhere).astype(np.float64),
        np.concatenate(bright).astype(np.float64),
        np.concatenate(pooled).astype(np.float64),
    )

  def _alarm(self, numbers: Mapping[str, float]) -> bool:
    reasons = []
    if not numbers["health.cosine"] <= self._max_cosine:
      reasons.append(
          f"health.cosine is {numbers['health.cosine']:.4f}, above {self._max_cosine}: "
          "all tokens point the same way"
      )
    for name, share in self._min_shares.items():
      now, first = numbers[name], self._first[name]
      if not now >= share * first:
        reasons.append(
            f"{name} is {now:.4g}; its first value was {first:.4g} (alarm below "
            f"{share:.0%} of it)"
        )
    if reasons:
      logging.warning(
          "The target features have collapsed: %s. A lower learning rate, or a "
          "momentum of the target closer to 1, usually helps.", "; ".join(reasons)
      )
    return bool(reasons)


def rankme(tokens: np.ndarray, *, centred: bool) -> float:
  """Effective rank of tokens [n, D]: exp of the entropy of their singular values.

  Garrido et al., RankMe (2023), equation 2, without its epsilon; 1 for a single
  direction, at most min(n, D). `centred` takes the mean token away first.

  Returns:
    1.0 where all tokens are 0; NaN where one is not finite.
  """
  tokens = np.asarray(tokens, np.float64)
  if not np.isfinite(tokens).all():
    return math.nan
  if centred:
    tokens = tokens - tokens.mean(axis=0)
  gram = tokens @ tokens.T if len(tokens) < tokens.shape[1] else tokens.T @ tokens
  values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0))
  shares = values[values > 0] / max(values.sum(), np.finfo(float).tiny)
  return float(np.exp(-(shares * np.log(shares)).sum()))


def mean_cosine(tokens: np.ndarray) -> float:
  """Mean cosine over all pairs of different tokens of [n, D], n > 1."""
  tokens = np.asarray(tokens, np.float64)
  norms = np.linalg.norm(tokens, axis=1, keepdims=True)
  units = tokens / np.maximum(norms, np.finfo(float).tiny)
  n = len(units)
  # |sum u|^2 holds every ordered pair, and each token with itself.
  return float((np.square(units.sum(axis=0)).sum() - n) / (n * (n - 1)))


def centre_crop(volume: np.ndarray, grid: Grid) -> np.ndarray:
  """Cuts the middle of [B, T, Z, Y, X, C] that an encoder of `grid` sees.

  Raises:
    ValueError: if the volume is smaller than the grid.
  """
  slices = [slice(None)]
  for size, wanted in zip(volume.shape[1:5], grid.voxels, strict=True):
    if size < wanted:
      raise ValueError(
          f"volume {volume.shape[1:5]} is smaller than the grid's voxels {grid.voxels}"
      )
    start = (size - wanted) // 2
    slices.append(slice(start, start + wanted))
  return volume[tuple(slices)]


def foreground_tokens(
    volume: np.ndarray, grid: Grid, method: str = "otsu"
) -> np.ndarray:
  """Says which tokens are brighter than their volume's threshold.

  Args:
    volume: [B, T, Z, Y, X, C] as stored, of the grid's size or larger.
    grid: of the encoder.
    method: "otsu" or "median" of the token means.

  Returns:
    bool [B, N].
  """
  patches = grid.patchify(centre_crop(volume, grid))
  means = patches.mean(axis=-1, dtype=np.float32)
  if method == "median":
    return means > np.median(means, axis=1, keepdims=True)
  return np.stack([row > otsu(row) for row in means])


def otsu(values: np.ndarray) -> float:
  """Threshold that parts values [n] into two groups of least variance (Otsu 1979).

  Returns:
    The largest value of the lower group; of constant values, themselves.
  """
  ordered = np.sort(np.asarray(values, np.float64))
  below = np.arange(1, len(ordered))
  sums = np.cumsum(ordered)
  low = sums[:-1] / below
  high = (sums[-1] - sums[:-1]) / (len(ordered) - below)
  between = below * (len(ordered) - below) * (high - low) ** 2
  return float(ordered[between.argmax()])


def _described(tokens: np.ndarray, suffix: str) -> dict[str, float]:
  return {
      f"health.std{suffix}": float(tokens.std(axis=0).mean()),
      f"health.rankme{suffix}": rankme(tokens, centred=True),
      f"health.cosine{suffix}": mean_cosine(tokens),
  }


@jax.jit
def _gather(tokens: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the tokens at ids [B, k] and the mean token, in float32."""
  chosen = jnp.take_along_axis(tokens, ids[..., None], axis=1)
  return chosen.astype(jnp.float32), tokens.astype(jnp.float32).mean(axis=1)
