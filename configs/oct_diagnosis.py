"""Diagnoses of retinal OCT from few labels, by an encoder that was pre-trained on many.

  python -m vjepa_jax.main --config=configs/oct_diagnosis.py --workdir=runs/diagnosis \
    --config.data.manifest=/data/oct/manifest.tsv --config.data.label=diagnosis \
    --config.objective.classes=4 --config.train.start_from=runs/oct

The manifest is that of `configs/oct_multi.py`, with a column of the classes; scans
without one teach nothing. `--config.data.train_participants=20` takes so many of the
training patients, to see what labels are worth.

Arms, joined by commas (`:L,frozen`):
  L, H     the encoder of `oct_multi.py`'s arm of that name
  scratch  begins with drawn parameters, to compare with
  frozen   the encoder does not move: a linear probe that is trained
  smoke    20 steps on your own manifest
  sample   the embedded corpus; wants --config.train.start_from= of a run of
           `oct_multi.py:sample`
  tiny     seconds; for the tests
"""

import ml_collections
from ml_collections.config_dict import placeholder

from configs import common, oct_multi

ARMS = ("sample", "scratch", "frozen", "smoke", "L", "H", "tiny")
APART = (*(group for group in oct_multi.APART if "literal" not in group),
         ("scratch", "frozen"))
OF_ENCODER = ("L", "H", "smoke", "sample", "tiny")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the config of the given arms."""
  arms, _ = common.parse_arm(arg, ARMS, apart=APART)
  config = oct_multi.get_config(",".join(name for name in OF_ENCODER if name in arms))
  config.unlock()
  config.name = "oct_diagnosis"
  # Masks, predictor and target are of pre-training alone.
  del config.objective
  diagnosis(config)
  if "smoke" in arms:
    for evaluator in config.evals.values():
      evaluator.every_steps = 20
  if arms & {"sample", "tiny"}:
    sample(config)
  if "tiny" in arms:
    tiny(config)
  common.spare_encoder(config, arms)
  config.lock()
  return config


def diagnosis(c: ml_collections.ConfigDict) -> None:
  """Sets what fine-tuning does otherwise than pre-training."""
  c.data.label = c.data.label or "diagnosis"
  c.data.splits = dict(train=0.7, validation=0.15, test=0.15)
  c.objective = dict(
      name="classify",
      classes=4,  # of the column
      labels="label",
      head=dict(pool="mean", hidden=0, dropout=0.0),  # VideoMAE
      label_smoothing=0.1,  # VideoMAE
      ordinal=False,
      class_weights=(),  # a number a class, in their order; or by their counts:
      balance_classes=True,
  )
  common.fine_tune(c)
  c.optimizer.update(
      learning_rate_batch=256,
      learning_rate_scaling="linear",  # VideoMAE
      weight_decay=0.05,  # VideoMAE
  )
  c.train.best_metric = "classes.balanced_accuracy"
  c.evals = dict(
      classes=judged("validation"),
      # Nothing is chosen by it; "" for its split leaves it out.
      test=judged("test", prefix="test"),
  )


def judged(split: str, **more: str) -> dict[str, object]:
  """Returns the evaluator of classes of a split."""
  return dict(
      type="classes", split=split, every_steps=500, batch_size=placeholder(int), **more
  )


def sample(c: ml_collections.ConfigDict) -> None:
  """The embedded corpus: its labelled patients, and others that teach nothing."""
  c.data.split_column = ""
  c.model.drop_path = 0.0
  c.optimizer.update(learning_rate=1e-3, learning_rate_batch=16, layer_decay=1.0)
  c.train.total_steps = 300
  # The last step is what is reported, so that nothing is chosen.
  c.train.best_metric = ""
  for evaluator in c.evals.values():
    evaluator.every_steps = 150


def tiny(c: ml_collections.ConfigDict) -> None:
  """Shrinks the sample to seconds."""
  c.train.total_steps = 12
  c.train.best_metric = "classes.balanced_accuracy"
  c.optimizer.layer_decay = 0.75
  for evaluator in c.evals.values():
    evaluator.every_steps = 6
