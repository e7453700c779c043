"""What the configs share: the argument after the colon, and how labels fine-tune."""

import difflib

import ml_collections
from ml_collections.config_dict import placeholder


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


def fine_tune(c: ml_collections.ConfigDict) -> None:
  """Sets what fine-tuning on labels does otherwise than pre-training."""
  c.model.drop_path = 0.1  # VideoMAE
  c.optimizer.update(
      learning_rate=5e-4,  # VideoMAE on SSv2, at batch 256
      final_fraction=2e-3,  # VideoMAE: 1e-6
      b2=0.999,  # VideoMAE
      layer_decay=0.75,  # VideoMAE
      frozen=(),  # patterns of parameters that never move
      freeze=(),  # and of those that do not before freeze_epochs: ("^encoder/",)
      freeze_epochs=placeholder(float),
  )
  c.train.start_from = ""  # workdir of a pre-training run; "": from scratch
  if "total_epochs" in c.train:
    c.train.total_epochs = 50  # VideoMAE


def spare_encoder(c: ml_collections.ConfigDict, arms: set[str]) -> None:
  """Follows the arms `scratch` and `frozen`, after all others."""
  if arms & {"scratch", "frozen"}:
    # Nothing to spare, or all of it: what learns, learns at one rate.
    c.optimizer.layer_decay = 1.0
  if "frozen" in arms:
    c.optimizer.frozen = ("^encoder/",)
    # The head is fitted to the features that it is judged on, with every block.
    c.model.drop_path = 0.0
