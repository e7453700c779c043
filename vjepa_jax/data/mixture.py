"""Which source gives which row of which batch: plain arithmetic, no state.

Whatever asks for a place gets the same answer: any host, any number of readers, any
resumed run.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
import functools
import threading

import grain

MIXTURES = ("weighted", "alternate", "concatenate")
# Grain's shuffle of few rows costs milliseconds a row; an epoch of them is kept.
_KEPT_ROWS = 4096


def shares_of(weights: Mapping[str, float]) -> dict[str, Fraction]:
  """Returns each source's exact share; 0.7 counts as 7/10.

  Raises:
    ValueError: if a weight is not a positive finite number.
  """
  bad = {k: w for k, w in weights.items() if not 0 < w < float("inf")}
  if bad or not weights:
    raise ValueError(f"weights {bad or dict(weights)} must be positive numbers")
  exact = {name: Fraction(str(w)) for name, w in weights.items()}
  return {name: w / sum(exact.values()) for name, w in exact.items()}


def draw(place: int, shares: Sequence[Fraction]) -> tuple[int, int]:
  """Says whose turn a place is.

  The draws of a source lie as evenly as they can: after any number of places it has
  had its share to within half a draw for two sources ((S - 1) / 2 for S), and over a
  common denominator of the shares exactly.

  Args:
    place: 0, 1, 2, ...
    shares: of the sources, adding to 1.

  Returns:
    (source, how many draws of it came before).
  """
  left = Fraction(1)
  for source, share in enumerate(shares[:-1]):
    before = _rounded(place * share / left)
    if _rounded((place + 1) * share / left) > before:
      return source, before
    place, left = place - before, left - share
  return len(shares) - 1, place


class Order:
  """The rows of one source, shuffled anew each epoch: n-th draw -> row.

  Args:
    rows: how many there are.
    seed: of the shuffling; the order depends on (seed, epoch, row) alone.
  """

  def __init__(self, rows: int, seed: int):
    self._rows = rows
    self._seed = seed
    self._lock = threading.Lock()
    self._epochs: dict[int, list[int]] = {}

  def __getstate__(self) -> dict:
    return {"_rows": self._rows, "_seed": self._seed}

  def __setstate__(self, state: dict):
    self.__init__(state["_rows"], state["_seed"])

  def __getitem__(self, n: int) -> int:
    """Returns the row of the n-th draw, n >= 0; each comes once an epoch."""
    if self._rows > _KEPT_ROWS:
      return int(self._shuffled[n])
    epoch, place = divmod(n, self._rows)
    with self._lock:
      if epoch not in self._epochs:
        start = epoch * self._rows
        order = [int(self._shuffled[start + k]) for k in range(self._rows)]
        # Readers that look ahead are in two epochs at a time.
        near = {k: v for k, v in self._epochs.items() if abs(k - epoch) == 1}
        self._epochs = {**near, epoch: order}
      return self._epochs[epoch][place]

  @functools.cached_property
  def _shuffled(self) -> grain.MapDataset:
    return grain.MapDataset.range(self._rows).seed(self._seed).shuffle().repeat(None)


def seed_of(seed: int, source: int) -> int:
  """Returns the seed of a source's order; the first has the run's own."""
  return (seed + 0x9E3779B1 * source) % 2**32


def _rounded(value: Fraction) -> int:
  """Returns the nearest whole number, halves upwards."""
  return (2 * value.numerator + value.denominator) // (2 * value.denominator)
