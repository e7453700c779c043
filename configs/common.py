"""What the configs share: reading the argument after the colon."""

import difflib


def parse_arm(
    arg: str,
    arms: tuple[str, ...],
    *,
    apart: tuple[tuple[str, ...], ...] = (),
    **options: type,
) -> tuple[set[str], dict]:
  """Reads `:arm,arm,key=value` of a --config flag.

  Args:
    arg: the text after the colon, "" where there is none.
    arms: names that may be given.
    apart: groups of arms of which at most one may be given.
    **options: keys that may be given, each with the type of its value.

  Returns:
    The arms given, and {key: value} of the options given.

  Raises:
    ValueError: for an unknown arm or key (lists the closest), a bad value, or arms
      that cannot be joined.
  """
  chosen, values = set(), {}
  for part in filter(None, (p.strip() for p in (arg or "").split(","))):
    key, _, text = part.partition("=")
    if text and key in options:
      try:
        values[key] = options[key](text)
      except ValueError as error:
        raise ValueError(
            f"config argument {part!r}: {text!r} is not {options[key].__name__}"
        ) from error
    elif not text and key in arms:
      chosen.add(key)
    else:
      known = [*arms, *(f"{k}=" for k in options)]
      close = difflib.get_close_matches(part, known, n=3) or known
      raise ValueError(
          f"config argument {part!r} is unknown; closest: {', '.join(close)}"
      )
  for group in apart:
    if len(both := [name for name in group if name in chosen]) > 1:
      raise ValueError(
          f"config argument {arg!r}: the arms {' and '.join(both)} cannot be joined; "
          "keep one"
      )
  return chosen, values
