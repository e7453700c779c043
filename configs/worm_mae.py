"""A masked autoencoder of embryos in light-sheet movies, one TIFF a time point.

The default is the corrected recipe: VT-Former small over 16 minutes of 96 x 160 x 160
voxels of 0.325 um, which hold a whole egg (about 30 x 30 x 50 um) whichever way it
lies in the plane; 90 % of the tubes are hidden.

  python -m vjepa_jax.main --config=configs/worm_mae.py --workdir=runs/worm \
    --config.data.manifest=/data/nih-ls/manifest.tsv

A row of the manifest is an embryo's folder, with `images/*_tNNN.tif` and
`tracks/tracks.txt` in it. Of NIH-LS (Zenodo 6460375; Moyle et al. 2021), split by
embryo as linajea does (columns with tabs between them):

  participant_id  filepath              spacing                    time_step_s  split
  embryo1         nih_diSPIM_deconv_1   [.0001625,.0001625,.0001625]  60        train
  embryo2         nih_diSPIM_deconv_2   [.0001625,.0001625,.0001625]  60        validation
  embryo3         nih_diSPIM_deconv_3   [.0001625,.0001625,.0001625]  60        test

Arms, joined by commas (`:full,smoke`):
  sample   the embedded corpus on a laptop's two cores, no manifest needed
  smoke    20 steps on your own manifest, at a quarter of the resolution
  full     the WormVT project's geometry for small: 16 x 64 x 256 x 256 voxels as
           stored, batch 2 a chip
  base, large, xlarge, huge
           its geometry for base and large, 32 x 104 x 512 x 512 (its 100 slices are
           no multiple of the patch), encoders of 132, 230, 319 and 522 million
           parameters; the time points of a clip are shared out over four chips
  literal  the recipe as the WormVT project's code has it: its geometry for small,
           space before time without a projection, a class token, 8 heads, 384 x 4
           joint decoder with 6 heads, 75 % hidden, squared error of voxels in 0..1,
           flips, drop-path 0.1, learning rate 1.5e-4 at batch 16 in 8 parts, 100
           epochs. Repaired, since it could not learn: the encoder sees the visible
           patches only, what is hidden is asked of mask tokens at its own place, a
           fixed count is hidden, as tubes (attention over time needs the same places in
           every frame), the class token takes part in the attention over space, the
           decoder's positions are trained, values keep one range through a movie (not
           through a frame), splits are by embryo (its validation clips overlapped its
           training clips). Left out: dropout, stopping after 15 epochs without a
           better loss, and a second change of contrast; the one that stays is made
           always, not for half of the clips. Otherwise than there: drop-path drops
           branches of whole clips, not of single time points or places; the last
           projections of a block begin smaller the deeper it lies; norms and biases do
           not decay; the least learning rate is its yaml's, which its code does not
           read.
  tiny     seconds; for the tests
"""

import ml_collections
from ml_collections.config_dict import placeholder

from configs import common

SHARED = ("base", "large", "xlarge", "huge")
ARMS = ("sample", "smoke", "full", *SHARED, "literal", "tiny")
# The sample and its shrunk form are recipes of their own, at one size.
APART = (("full", *SHARED, "literal", "sample", "tiny"), ("smoke", "sample", "tiny"))


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the config of the given arms."""
  arms, _ = common.parse_arm(arg, ARMS, apart=APART)
  config = whole_egg()
  if arms & {"full", "literal"}:
    full(config)
  if "literal" in arms:
    literal(config)
  for preset in SHARED:
    if preset in arms:
      shared(config, preset)
  if "smoke" in arms:
    smoke(config)
  if arms & {"sample", "tiny"}:
    sample(config)
  if "tiny" in arms:
    tiny(config)
  config.lock()
  return config


def whole_egg() -> ml_collections.ConfigDict:
  """Returns the recipe for a v4-32 slice (16 chips)."""
  c = ml_collections.ConfigDict()
  c.name = "worm_mae"
  c.seed = 0

  c.data = dict(
      manifest="",  # --config.data.manifest=; TSV, CSV or JSON; gs:// or local
      root="",  # what filepath is joined to; default: the manifest's folder
      filters=nothing(),  # values to keep
      exclude=nothing(),  # values to drop
      max_records=0,  # the first so many embryos; 0: all
      train_participants=0,  # so many of the training split, drawn; 0: all
      # By embryo. Without such a column: "" and shares, in `splits`.
      split_column="split",
      splits=dict(train=0.6, validation=0.2, test=0.2),
      stratify=("device",),
      # Where files do not say: axes ("TZYX"), seconds a time point.
      reader=dict(axes="", key="", time_step_s=placeholder(float)),
      ops=(),  # host operations before resampling: (dict(name="spacing", ...), ...)
      max_voxels=2**30,
      canvas=(96, 160, 160),
      resample="spacing",
      spacing_mm=(0.000325, 0.000325, 0.000325),  # two of the stored steps
      dtype="uint8",
      percentiles=(0.5, 99.8),  # of a movie, not of a frame: bleaching stays
      clip=dict(
          frames=16, stride=1,  # seed: 16 minutes
          step=1,
          eval_step=0,  # of other splits; 0: each time point once, where it can be
          # Of few movies: each one's time in so many stretches, shared out by `splits`
          # (with split_column=""), `gap` minutes apart; default: what a clip spans.
          time_blocks=0,
          gap=placeholder(int),
      ),
      # For the probe alone; {} where nothing is known of them.
      # Files below an embryo's folder; "" is the usual name (docs/embryos.md).
      stages=dict(
          taxonomy="count", sources=("counts",), tracks="", answers="", table=""
      ),
      max_bad_fraction=0.05,
      max_lost_fraction=0.05,
      validate="lazy",
      cache="memory",  # each time point is in 16 clips; a folder keeps them for later
      cache_bytes=8 << 30,  # three embryos of NIH-LS take 2.8e9
      threads=8,
      workers=0,
      timeout_s=600.0,
      storage=dict(
          cache="",  # local folder that keeps what is read from buckets
          cache_bytes=placeholder(int),  # 20 GiB
          deadline_s=placeholder(float),  # of an operation, for each 64 MiB; 120 s
          anonymous=False,  # public buckets, without credentials
      ),
  )
  c.augment = dict(
      # (T, Z, Y, X) voxels: at random in training, in evaluation the centre, or tiles
      # over all of the clip by evals.stages.tile (and .stage_probe.tile) of this size.
      crop=placeholder(tuple),
      # A worm in a mirror is no worm: turned over, but never mirrored.
      flip=(0.0, 0.5, 0.5, 0.0),
      handed=True,
      rot90=0.75,  # all four turns in the plane alike
      rotate=0.0,  # rad in the plane
      scale=(0.0, 0.0, 0.0, 0.0),
      shift=(0.0, 0.0, 0.0, 0.0),  # voxels
      brightness=0.2,  # added, in standard deviations
      contrast=0.2,  # seed: 0.8 to 1.2 times
      gamma=0.0,
      noise_std=0.0,
      noise_probability=0.3,  # seed
      views="shared",
  )
  c.model = dict(
      name="vt_former",
      preset="small",
      patch=(1, 8, 16, 16),  # seed
      heads=placeholder(int),
      space_time="divided",
      order="time_first",  # TimeSformer
      time_projection=True,  # TimeSformer
      zero_time=True,  # TimeSformer
      class_token=False,  # VideoMAE
      positions="learned",  # seed
      table_voxels=placeholder(tuple),  # (T, Z, Y, X) that they are made for
      drop_path=0.0,  # VideoMAE
      attention="auto",  # the device's own kernels
      remat="attention",
      dtype="bfloat16",
  )
  c.objective = dict(
      name="mae",
      # VideoMAE: 90 %. 128 of 1,200 places are seen, whole rows of a TPU's kernels.
      masks=dict(
          tubes=dict(
              kind="tube", through="T", context=128 / 1200, target=1072 / 1200,
              prior="uniform",
          ),
      ),
      decoder=dict(
          width=384, depth=4,  # seed
          space_time="divided",  # joint attention would cost more than the encoder
          positions="learned", attention="auto", remat="attention", dtype="bfloat16",
      ),
      target="normalized",  # VideoMAE, with a floor:
      # The background of a deconvolved volume spreads about so much, of a standard
      # deviation of all voxels; measure it in yours.
      noise_floor=0.1,
      foreground_std=0.3,
      foreground_min=0.1,
  )
  c.optimizer = dict(
      learning_rate=1.5e-4,  # VideoMAE
      learning_rate_batch=256,  # VideoMAE
      learning_rate_scaling="linear",  # VideoMAE
      final_fraction=1 / 15,  # VideoMAE: 1e-5
      schedule="cosine",
      warmup_percent=5.0,  # VideoMAE: 40 of 800 epochs
      weight_decay=0.05,  # VideoMAE
      b1=0.9,
      b2=0.95,  # VideoMAE
      clip_norm=1.0,  # seed
  )
  c.train = dict(
      batch_size=32,
      accum=1,
      fit="off",  # "auto": more micro-batches where a step would not fit
      memory_gib=placeholder(float),  # of a device, for fit; default: as it says
      total_epochs=800,  # VideoMAE; an epoch is each start of a clip once
      mesh_data=-1,
      mesh_fsdp=1,
      mesh_sequence=1,  # devices that share the time points of a clip
      fsdp_min_size=2**16,  # smaller arrays stay whole on every device
      steps_per_epoch=placeholder(int),  # cap; default: all clips once
      log_every_steps=20,
      checkpoint_every_minutes=30.0,
      checkpoint_every_steps=1000,
      keep=2,
      keep_every_steps=placeholder(int),
      best_metric="stage_probe.accuracy",
      early_stop_metric=placeholder(str),
      early_stop_patience=10,
      validate_every_steps=500,
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
      # embryos: labelled ones, 0 for all; of NIH-LS one is there to train on.
      stage_probe=dict(
          type="stage_probe", split="validation", embryos=(1, 0), every_steps=2000,
          tile=placeholder(tuple), batch_size=placeholder(int),
      ),
      reconstruction=dict(
          type="reconstruction", split="validation", every_steps=2000,
          batch_size=placeholder(int),
      ),
      attention=dict(
          type="attention", split="validation", every_steps=5000,
          batch_size=placeholder(int),
      ),
  )
  c.wandb = dict(project="", entity="", mode="online")
  return c


def nothing() -> dict[str, tuple[str, ...]]:
  """Returns the fields of a movie that may be filtered, each without a value."""
  return {field: () for field in ("device", "site", "participant")}


def full(c: ml_collections.ConfigDict) -> None:
  """Sets the WormVT project's geometry for small: a third of the egg's depth."""
  c.data.canvas = (64, 256, 256)
  c.data.spacing_mm = (0.0001625, 0.0001625, 0.0001625)
  c.data.cache_bytes = 16 << 30
  # 91 %: 192 of 2,048 places.
  c.objective.masks.tubes.update(context=192 / 2048, target=1856 / 2048)


def shared(c: ml_collections.ConfigDict, preset: str) -> None:
  """Sets the WormVT project's geometry for base, a clip on four chips.

  By a v4's compiler base holds 11.0 GiB of a chip's 30.75, one clip at a time.
  """
  full(c)
  c.data.canvas = (104, 512, 512)
  c.data.clip.frames = 32
  c.data.cache = "none"  # a folder for the canvases: 31 GB for NIH-LS
  # 90 %: 1,344 of 13,312 places.
  c.objective.masks.tubes.update(context=1344 / 13312, target=11968 / 13312)
  c.model.preset = preset
  c.train.mesh_sequence = 4
  c.train.batch_size = 16
  c.train.accum = 4
  if preset != "base":
    c.objective.decoder.width = dict(large=512, xlarge=512, huge=640)[preset]  # VideoMAE
    c.train.mesh_fsdp = 4
  # Every chip would hold whole clips, 13 bytes a voxel.
  del c.evals.reconstruction


def literal(c: ml_collections.ConfigDict) -> None:
  """Sets the numbers and choices of the WormVT project's own code."""
  # Cut at random out of what is stored; the axes' longest is an egg's 308 voxels.
  c.data.canvas = (192, 320, 320)
  c.data.clip.step = 8
  c.augment.update(
      normalize="range", crop=(16, 64, 256, 256), flip=(0.0, 0.25, 0.25, 0.25),
      handed=False, rot90=0.0, brightness=0.0, noise_std=0.01,
  )
  c.model.update(
      heads=8, order="space_first", time_projection=False, zero_time=False,
      class_token=True, drop_path=0.1, eps=1e-5,
  )
  c.objective.masks.tubes.update(context=0.25, target=0.75)
  c.objective.decoder.update(heads=6, space_time="joint", eps=1e-5, norm_eps=1e-5)
  c.objective.target = "pixel"
  c.objective.foreground_std = 0.0
  c.optimizer.update(
      learning_rate_batch=16, final_fraction=1e-6 / 1.5e-4, warmup_percent=10.0,
  )
  c.train.update(batch_size=16, accum=8, total_epochs=100)


def smoke(c: ml_collections.ConfigDict) -> None:
  """Shrinks any arm to 20 steps at a quarter of the resolution and two sizes less."""
  c.data.threads = 2
  c.data.canvas = (24, 40, 40)
  c.data.spacing_mm = (0.0013, 0.0013, 0.0013)
  c.data.clip.frames = 8
  if c.augment.crop:
    c.augment.crop = (8, 24, 40, 40)
  c.model.update(preset="tiny", heads=3, patch=(1, 8, 8, 8), dtype="float32", remat="none")
  c.objective.masks.tubes.update(context=0.12, target=0.88)
  c.objective.decoder.update(
      width=96, depth=2, heads=3, dtype="float32", remat="none"
  )
  c.train.batch_size = 8
  c.train.accum = 1
  c.train.mesh_fsdp = 1
  c.train.mesh_sequence = 1
  del c.train.total_epochs
  c.train.total_steps = 20
  c.train.log_every_steps = 1
  c.train.validate_every_steps = 10
  c.train.validation_batches = 1
  for evaluator in c.evals.values():
    evaluator.every_steps = 20


def sample(c: ml_collections.ConfigDict) -> None:
  """The embedded corpus; settings measured to learn on two cores in minutes."""
  c.data.manifest = "phantom:worm"
  c.data.canvas = (16, 32, 32)
  c.data.spacing_mm = (0.0022, 0.0018, 0.0018)
  c.data.clip.update(frames=8, stride=2)
  c.data.stages.update(taxonomy="phantom8", sources=("table",))
  c.data.validate = "read"
  c.data.threads = 2
  # Phantoms are as good in a mirror.
  c.augment.update(
      flip=(0.0, 0.5, 0.5, 0.5), handed=False, brightness=0.0, contrast=0.0
  )
  c.model.update(
      preset="tiny", width=64, depth=3, heads=4, patch=(1, 8, 8, 8),
      attention="xla", remat="none", dtype="float32", initializer="xavier",
  )
  c.objective.masks.tubes.update(context=0.25, target=0.75)
  c.objective.decoder.update(
      width=64, depth=2, heads=4, attention="xla", remat="none", dtype="float32",
      initializer="xavier",
  )
  # Of so small patches most of a normalised target is noise; and the error of voxels
  # can be told without knowing their mean.
  c.objective.target = "pixel"
  c.objective.foreground_std = 0.0
  c.optimizer.update(learning_rate=3e-3, learning_rate_batch=16, warmup_steps=50)
  del c.optimizer.warmup_percent
  c.train.batch_size = 16
  del c.train.total_epochs
  c.train.total_steps = 1000
  c.train.log_every_steps = 20
  c.train.checkpoint_every_steps = 250
  c.train.validate_every_steps = 250
  c.train.validation_batches = 2
  c.evals.stage_probe.embryos = (1, 3, 0)
  for name, steps in dict(
      health=500, stage_probe=500, reconstruction=500, attention=1000
  ).items():
    c.evals[name].every_steps = steps


def tiny(c: ml_collections.ConfigDict) -> None:
  """Shrinks the sample to seconds."""
  c.data.manifest = "phantom:worm_tiny"
  c.data.canvas = (8, 16, 16)
  c.data.spacing_mm = (0.0044, 0.0036, 0.0036)
  c.data.clip.update(frames=4, stride=2, step=2)
  c.model.update(width=32, depth=2, heads=2, patch=(1, 4, 4, 4))
  c.objective.decoder.update(width=32, depth=1, heads=2)
  c.train.batch_size = 8
  c.evals.stage_probe.embryos = (1, 0)
  c.train.total_steps = 12
  c.train.log_every_steps = 1
  c.train.checkpoint_every_steps = 4
  c.train.validate_every_steps = 6
  c.optimizer.warmup_steps = 2
  for evaluator in c.evals.values():
    evaluator.every_steps = 6
