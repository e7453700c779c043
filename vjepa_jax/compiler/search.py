"""How much fits: few compilations, since each that succeeds takes a minute."""

from collections.abc import Callable, Mapping
import dataclasses
import math

# A search ends where what is left open is so small a part of what fits.
_FINE = 100


@dataclasses.dataclass(frozen=True)
class Found:
  """The outcome of a search.

  Attributes:
    largest: the largest size that was compiled and fits; None: not even one.
    exact: whether the next size was tried and does not fit.
    tried: size -> bytes of its peak, fitting or not; None where a refusal gave none.
  """

  largest: int | None
  exact: bool
  tried: Mapping[int, float | None]


def largest_that_fits(
    measure: Callable[[int], float | None],
    limit: float,
    *,
    tried: Mapping[int, float | None] | None = None,
    fixed: float = 0.0,
    most: int = 2**20,
    attempts: int = 12,
) -> Found:
  """Finds the largest size whose peak stays within a limit.

  Bytes grow nearly linearly with the size, so that each guess is taken from the two
  sizes closest to the limit, and kept within what is still open.

  Args:
    measure: size -> bytes, above the limit where it does not fit; None where that is
      all that is known.
    limit: bytes.
    tried: what is known already, in the same terms.
    fixed: bytes that no size changes, for the first guess.
    most: size beyond which nobody asks.
    attempts: calls of `measure` at most.
  """
  known = dict(tried or {})
  for attempt in range(attempts):
    low, high = _bracket(known, limit, most)
    if high - low <= max(1, low // _FINE):
      break
    size = _guess(known, limit, fixed, low, high)
    if attempt > 3 and attempt % 2:  # The bytes are not so linear after all.
      size = math.isqrt(low * high) if low else high // 2
    size = min(max(size, low + 1), high - 1)
    known[size] = measure(size)
  low, high = _bracket(known, limit, most)
  return Found(low or None, high - low <= 1, known)


def _bracket(
    known: Mapping[int, float | None], limit: float, most: int
) -> tuple[int, int]:
  """Returns (largest that fits, smallest that does not)."""
  fitting = [size for size, peak in known.items() if peak is not None and peak <= limit]
  low = max(fitting, default=0)
  other = [size for size in known if size > low and size not in fitting]
  return low, min(other, default=most + 1)


def _guess(
    known: Mapping[int, float | None], limit: float, fixed: float, low: int, high: int
) -> int:
  points = sorted(
      ((size, peak) for size, peak in known.items() if peak is not None),
      key=lambda point: abs(point[1] - limit),
  )[:2]
  if not points:
    return 1 if high > 2**19 else (low + high) // 2
  points = points if len(points) == 2 else [*points, (0, fixed)]
  (a, bytes_a), (b, bytes_b) = points
  slope = (bytes_a - bytes_b) / (a - b)
  if slope <= 0:
    return (low + high) // 2
  return int(a + (limit - bytes_a) / slope)
