"""V-JEPA 2 on retinal OCT of several devices, from DICOM.

The default is the corrected recipe: ViT-B over 64 x 384 x 384 voxels in patches
of 4 x 16 x 16 (9,216 tokens), global batch 128.

  python -m vjepa_jax.main --config=configs/oct_multi.py --workdir=runs/oct \
    --config.data.manifest=/data/oct/manifest.tsv

Arms, joined by commas (`:L,smoke`):
  sample   the embedded corpus on a laptop's two cores, about five minutes, no
           manifest needed
  smoke    20 steps on the first 32 records of your own manifest
  L, H     ViT-L and ViT-H, sharded over 16 chips
  heads=N  attention heads of the encoder (12 is the reference's for B; the
           default is 128 wide, which fills a TPU's matrix unit)
  literal  the recipe as the OCT project wrote it down: learned positions, 60 %
           random patches, MLP predictor with batch norm, L2-normalised targets
           with a cosine loss, fixed spacing 0.05 x 0.02 x 0.02 mm, learning rate
           1.5e-3, betas 0.9 and 0.95, weight decay 0.05, accumulation 8. Repaired,
           since it could not learn: the encoder does not see what it must predict
           (the MLP gets the mean of the visible tokens and the place), the EMA
           target moves, both views share one geometry, the axial axis is never
           flipped, the validation masks hide something, schedules count optimiser
           steps, gradients are clipped at 1 (at 0.01 it never acted as meant).
  tiny     seconds; for the tests
"""

import ml_collections
from ml_collections.config_dict import placeholder

from configs import common

ARMS = ("sample", "smoke", "L", "H", "literal", "tiny")
# The sample and its shrunk form are recipes of their own, at one size.
APART = (("L", "H", "sample", "tiny"), ("smoke", "sample", "tiny"), ("literal", "sample", "tiny"))


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the config of the given arms."""
  arms, options = common.parse_arm(arg, ARMS, apart=APART, heads=int)
  config = full()
  if "L" in arms:
    config.model.preset = "large"
    config.train.mesh_fsdp = 16
  if "H" in arms:
    config.model.preset = "huge"
    config.train.mesh_fsdp = 16
    # By a v4's compiler 10.4 GiB for 16 volumes a chip, 14.2 with "attention", and
    # the same step within a hundredth.
    config.model.remat = "full"
  if "literal" in arms:
    literal(config)
  if "smoke" in arms:
    smoke(config)
  if "sample" in arms:
    sample(config)
  if "tiny" in arms:
    sample(config)
    tiny(config)
  if "heads" in options:
    config.model.heads = options["heads"]
  config.lock()
  return config


def full() -> ml_collections.ConfigDict:
  """Returns the recipe for a v4-32 slice (16 chips)."""
  c = ml_collections.ConfigDict()
  c.name = "oct_multi"
  c.seed = 0

  c.data = dict(
      manifest="",  # --config.data.manifest=; TSV, CSV or JSON; gs:// or local
      # In place of one manifest: dict(NAME=dict(manifest=, weight=1.0, ...)), with any
      # key of this section that differs by source; a config file of your own sets it.
      sources=dict(),
      mixture="weighted",  # or "alternate" (whole batches), "concatenate"
      root="",  # what filepath is joined to; default: the manifest's folder
      participants="",  # a table joined on participant_id
      label="",  # a column of either; without it there is no probe
      filters=nothing(),  # values to keep
      exclude=nothing(),  # values to drop
      max_records=0,  # the first so many; 0: all
      train_participants=0,  # so many of the training split, drawn; 0: all
      splits=dict(train=0.9, validation=0.1),  # by participant; seed: 10 % by file
      split_column="",  # in place of shares: a column that names the split
      stratify=("device", "label"),
      modalities=("OPT",),  # of DICOM; (): any
      colour="reject",  # or "luminance"
      # Where files do not say: axes ("TZYX"), key of the array, seconds a time point.
      reader=dict(axes="", key="", time_step_s=placeholder(float)),
      ops=(),  # host operations before resampling: (dict(name="spacing", ...), ...)
      max_voxels=2**30,
      canvas=(64, 384, 384),  # seed
      resample="resize",  # each device's whole field of view; "fov", "spacing"
      fov_mm=(6.0, 2.0, 6.0),
      spacing_mm=(0.05, 0.02, 0.02),  # seed
      dtype="uint8",
      max_bad_fraction=0.2,  # the seed's project met 10-20 % of broken files
      # Rows without a participant, file, entry in participants or split: the seed's
      # project lost two sites of three in silence.
      max_lost_fraction=0.05,
      validate="lazy",
      cache="none",  # a folder, local or gs://, keeps the canvases as shards
      cache_bytes=4 << 30,
      threads=8,
      workers=0,  # processes that read raw files, for compressed ones; order unchanged
      timeout_s=600.0,  # of one file in a worker; J2K of 58 Mvoxels takes 6 s
      storage=dict(
          cache="",  # local folder that keeps what is read from buckets
          cache_bytes=placeholder(int),  # 20 GiB
          deadline_s=placeholder(float),  # of an operation, for each 64 MiB; 120 s
          anonymous=False,  # public buckets, without credentials
      ),
  )
  c.augment = dict(
      flip=(0.0, 0.0, 0.0, 0.5),  # left-right; axial never, superior-inferior no
      shift=(0.0, 0.0, 8.0, 8.0),  # voxels; eye position
      scale=(0.0, 0.0, 0.05, 0.05),  # seed: affine scale 0.05
      noise_std=0.05,  # seed
      views="shared",
  )
  c.model = dict(
      name="vit",
      preset="base",
      patch=(1, 4, 16, 16),  # seed
      heads=placeholder(int),
      class_token=False,
      positions="rope",
      rope_base=10000.0,  # V-JEPA 2
      rope_units="index",  # "mm" wants rope_reference and the spacing of every file
      rope_reference=placeholder(tuple),  # (s, mm, mm, mm) that count as one step
      drop_path=0.0,
      attention="auto",  # the device's own kernels
      remat="attention",
      dtype="bfloat16",
  )
  c.objective = dict(
      name="vjepa",
      # V-JEPA 2's two groups. Counts: near its means at batch 24 a host, which are
      # 0.25, 0.48 and 0.066, 0.7; here both groups have 6,912 of 9,216 tokens, whole
      # blocks of a TPU's kernels, and go through the predictor as one batch.
      # prior="foreground" centres blocks on tissue.
      masks=dict(
          short=dict(
              kind="blocks", count=8, spatial_scale=0.15, depth_scale=1.0,
              aspect=(0.75, 1.5), context=0.25, target=0.5, prior="uniform",
          ),
          long=dict(
              kind="blocks", count=2, spatial_scale=0.7, depth_scale=1.0,
              aspect=(0.75, 1.5), context=5 / 72, target=49 / 72, prior="uniform",
          ),
      ),
      predictor=dict(
          kind="transformer", width=384, depth=12, rope_units="index",
          rope_reference=placeholder(tuple), attention="auto",
          remat="attention", dtype="bfloat16",
      ),
      target_norm="layer_norm",
      loss_kind="l1",
      momentum_start=0.996,  # I-JEPA on OCT at batch 512; V-JEPA 2's 0.99925 is
      momentum_end=1.0,  # for batch 3072
      momentum_percent=100.0,
      context_weight=0.0,
      variance_weight=0.0,
  )
  c.optimizer = dict(
      learning_rate=2.5e-4,  # I-JEPA on OCT, measured at batch 512; 5e-4 diverged
      learning_rate_batch=512,
      learning_rate_scaling="sqrt",
      final_fraction=0.01,
      schedule="cosine",
      warmup_percent=3.0,  # seed
      weight_decay=0.04,  # V-JEPA 2
      b1=0.9,
      b2=0.999,  # V-JEPA 2
      clip_norm=1.0,
  )
  c.train = dict(
      batch_size=128,  # seed
      accum=1,
      fit="off",  # "auto": more micro-batches where a step would not fit
      memory_gib=placeholder(float),  # of a device, for fit; default: as it says
      total_epochs=150,  # seed
      mesh_data=-1,
      mesh_fsdp=1,
      mesh_sequence=1,  # devices that share the tokens of a volume
      fsdp_min_size=2**16,  # smaller arrays stay whole on every device
      steps_per_epoch=placeholder(int),  # cap; default: all volumes once
      log_every_steps=20,
      checkpoint_every_minutes=30.0,
      checkpoint_every_steps=1000,
      keep=2,
      keep_every_steps=placeholder(int),
      best_metric="probe.accuracy",
      early_stop_metric=placeholder(str),
      early_stop_patience=10,
      validate_every_steps=1000,
      validation_batches=8,
      max_skipped_in_row=20,
      profile_from_step=placeholder(int),
      # Compiled programs outlive a restart: a folder, or ~/.cache/vjepa_jax/compiled;
      # "": none.
      compilation_cache="auto",
  )
  c.evals = dict(
      health=dict(
          type="health", split="validation", every_steps=500,
          batch_size=placeholder(int),
      ),
      probe=dict(
          type="probe", split="validation", every_steps=2000,
          batch_size=placeholder(int),
      ),
      figures=dict(
          type="figures", split="validation", every_steps=5000,
          batch_size=placeholder(int),
      ),
  )
  c.wandb = dict(project="", entity="", mode="online")
  return c


def nothing() -> dict[str, tuple[str, ...]]:
  """Returns the fields of a recording that may be filtered, each without a value."""
  fields = (
      "device", "region", "imaging", "laterality", "geometry", "site", "modality",
      "participant",
  )
  return {field: () for field in fields}


def literal(c: ml_collections.ConfigDict) -> None:
  """Sets the numbers and choices of the OCT project's own plan."""
  c.data.resample = "spacing"
  c.augment.shift = (0.0, 5.0, 5.0, 5.0)
  c.augment.scale = (0.0, 0.05, 0.05, 0.05)
  c.augment.rotate = 0.1  # rad
  c.augment.rotate_axes = ("Z", "X")  # about the optical axis
  c.augment.noise_probability = 0.3
  c.model.positions = "learned"
  c.model.heads = dict(base=12, large=16, huge=16)[c.model.preset]
  c.objective.masks = dict(random=dict(kind="random", context=0.4, target=0.6))
  c.objective.predictor = dict(kind="mlp", width=768, norm="batch")
  c.objective.target_norm = "l2"
  c.objective.loss_kind = "cosine"
  c.objective.momentum_schedule = "cosine"
  c.optimizer.learning_rate = 1.5e-3
  c.optimizer.learning_rate_batch = 128
  c.optimizer.weight_decay = 0.05
  c.optimizer.b2 = 0.95
  c.train.accum = 8


def smoke(c: ml_collections.ConfigDict) -> None:
  """Shrinks any arm to 20 steps on the manifest's first 32 records."""
  c.data.max_records = 32
  c.data.validate = "read"
  c.data.cache = "memory"
  c.data.threads = 2
  c.data.canvas = (16, 64, 96)
  # A quarter, a sixth and a quarter of the voxels see as much of the eye.
  c.data.spacing_mm = (0.2, 0.12, 0.08)
  c.model.patch = (1, 4, 16, 16)
  c.model.preset = "tiny"
  c.model.dtype = "float32"
  c.model.remat = "none"
  if c.objective.predictor.kind == "transformer":
    c.objective.predictor.update(width=96, depth=2, dtype="float32", remat="none")
  c.train.batch_size = 8
  c.train.accum = 1
  c.train.mesh_fsdp = 1
  del c.train.total_epochs
  c.train.total_steps = 20
  c.train.log_every_steps = 1
  c.train.validate_every_steps = 10
  c.train.validation_batches = 1
  # A tenth of so few participants would be too few for a probe.
  c.evals.probe.update(split="train", folds=2, inner_folds=2)


def sample(c: ml_collections.ConfigDict) -> None:
  """The embedded corpus; settings measured to learn on two cores in minutes."""
  c.data.manifest = "phantom:oct"
  c.data.canvas = (18, 72, 104)
  c.data.split_column = "split"
  c.data.label = "pathology"
  c.data.validate = "read"
  c.data.cache = "memory"
  c.data.threads = 2
  c.augment = dict(
      # Superior-inferior too: the corpus is small, its retinas have no vessels
      # that would tell.
      flip=(0.0, 0.5, 0.0, 0.5), crop=(1, 16, 64, 96), views="shared",
  )
  c.model.update(
      preset="tiny", width=128, depth=4, heads=4, patch=(1, 8, 8, 8),
      rope_base=100.0, attention="xla", remat="none", dtype="float32",
      initializer="xavier",
  )
  c.objective.masks = dict(
      tubes=dict(
          kind="blocks", count=6, spatial_scale=0.2, depth_scale=1.0,
          aspect=(0.75, 1.5), context=0.25, target=0.3,
      )
  )
  c.objective.predictor.update(
      width=96, depth=2, heads=4, rope_base=100.0, attention="xla", remat="none",
      dtype="float32", initializer="xavier",
  )
  c.objective.momentum_start = 0.99
  c.objective.momentum_end = 0.99
  c.optimizer.update(
      learning_rate=1.5e-3, learning_rate_batch=16, b2=0.98, warmup_steps=50,
  )
  del c.optimizer.warmup_percent
  c.train.batch_size = 16
  del c.train.total_epochs
  c.train.total_steps = 600
  c.train.log_every_steps = 20
  c.train.checkpoint_every_steps = 200
  c.train.validate_every_steps = 100
  c.train.validation_batches = 2
  c.evals.health.update(split="validation", every_steps=100)
  c.evals.probe.update(split="probe", every_steps=200)
  c.evals.figures.update(every_steps=600)


def tiny(c: ml_collections.ConfigDict) -> None:
  """Shrinks the sample to seconds."""
  c.data.manifest = "phantom:oct_tiny"
  c.data.canvas = (8, 32, 48)
  c.augment.crop = (1, 8, 32, 32)
  c.model.update(width=32, depth=2, heads=2, patch=(1, 4, 8, 8))
  c.objective.predictor.update(width=32, depth=1, heads=2)
  c.train.batch_size = 8
  c.train.total_steps = 12
  c.train.log_every_steps = 1
  c.train.checkpoint_every_steps = 4
  c.train.validate_every_steps = 6
  c.optimizer.warmup_steps = 2
  c.evals.health.every_steps = 6
  c.evals.probe.every_steps = 6
  c.evals.figures.every_steps = 12
