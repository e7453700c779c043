"""What the comparisons with other libraries' own test files share."""

from collections import Counter
from collections.abc import Callable, Iterable
import dataclasses
import warnings


@dataclasses.dataclass
class Row:
  """What became of one file.

  Attributes:
    path: the file.
    outcome: "read", or the reason it was refused for.
    detail: what was read, or the words of the refusal.
    fault: what differs from the library's own reading, or is untrue of the refusal.
  """

  path: str
  outcome: str
  detail: str
  fault: str = ""


def quietly(compare: Callable[[str], Row], paths: Iterable[str]) -> list[Row]:
  """Compares each file, without the warnings of either library."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return [compare(path) for path in paths]


def table(rows: Iterable[Row]) -> str:
  """Returns the counts by outcome, the commonest first, as lines."""
  counts = Counter(row.outcome for row in rows)
  return "\n".join(f"{count:5d}  {outcome}" for outcome, count in counts.most_common())
