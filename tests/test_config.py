"""Configs: all faults at once, before anything is touched; golden dumps."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from vjepa_jax import config as config_lib
from vjepa_jax import main
from vjepa_jax.config import units

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
ARMS = [
    (name, arm)
    for name in ("oct_multi", "oct_single")
    for arm in ("", "L", "H", "heads=12", "literal", "smoke", "literal,smoke", "sample", "tiny")
] + [
    ("worm_mae", arm) for arm in (
        "", "full", "base", "large", "xlarge", "huge", "literal", "smoke", "base,smoke",
        "literal,smoke", "sample", "tiny",
    )
] + [
    ("worm_stages", arm) for arm in (
        "", "full", "base", "large", "xlarge", "huge", "literal", "smoke", "base,smoke",
        "literal,smoke", "scratch", "frozen", "sample", "tiny",
    )
] + [
    ("oct_diagnosis", arm) for arm in (
        "", "L", "H", "smoke", "scratch", "frozen", "sample", "tiny",
    )
]


def load(name, arm=""):
  return config_lib.load(f"{ROOT / 'configs' / name}.py:{arm}")


def faults_of(config, **known):
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.check_config(config, **known)
  return error.value.faults


@pytest.mark.parametrize("name,arm", ARMS)
def test_every_config_is_sound_and_equals_its_golden_dump(name, arm):
  config = load(name, arm)
  text = str(config)
  golden = GOLDEN / f"{name}_{arm.replace('=', '').replace(',', '_') or 'default'}.txt"
  if os.environ.get("UPDATE_GOLDEN"):
    golden.write_text(text)
  assert text == golden.read_text(), "UPDATE_GOLDEN=1 rewrites the dumps"
  with config.unlocked():
    config.data.manifest = config.data.manifest or "manifest.tsv"
  config_lib.check_config(config)


def test_all_faults_are_reported_at_once():
  config = load("oct_multi", "sample")
  with config.unlocked():
    config.data.canvaz = (1, 2, 3)
    config.model.patch = (1, 7, 8, 8)
    config.model.heads = 7
    config.optimizer.warmup_epochs = 3
    config.objective.name = "vjeppa"
    config.evals.health.type = "helth"
    del config.train.batch_size
  text = "\n".join(faults_of(config))
  for part in (
      "data.canvaz: unknown key; closest: canvas",
      "optimizer.warmup: spelled twice, as warmup_steps and warmup_epochs",
      "objective: 'vjeppa' is none of vjepa",
      "evals.health: 'helth' is none of health",
      "train.batch_size: missing",
      "Z=16 is not a multiple of patch 7",
      "model.width 128 is not a multiple of heads 7",
  ):
    assert part in text, text


@pytest.mark.parametrize("path,value,part", [
    ("model.preset", "basee", "closest: base"),
    ("model.heads", 7, "768 is not a multiple of heads 7; nearest 6 or 8"),
    ("model.positions", "rop", "'rop' is none of rope"),
    ("model.attention", "chunkd", "'chunkd' is none of xla, chunked"),
    ("model.rope_units", "mm", "needs rope_reference"),
    ("model.rope_reference", (1.0, 1.0, 1.0, 1.0), "rope_units 'mm' only"),
    ("objective.predictor.depht", 3, "depht is no option of transformer; closest: depth"),
    ("objective.predictor.positions", "sincoss", "'sincoss' is none of rope, sincos"),
    ("objective.masks.short.cuont", 3, "cuont is no option of blocks; closest: count"),
    ("optimizer.schedule", "cosin", "'cosin' is none of cosine"),
    ("optimizer.schedule", "wsd", "optimizer.decay_steps"),
    ("optimizer.learning_rate", -1e-3, "must be positive"),
    ("optimizer.warmup_percent", 100.0, "as long as the whole run"),
    ("optimizer.b2", 1.5, "not in [0, 1]"),
    ("train.best_metric", "prob.accuracy", "comes from no evaluator"),
    ("train.log_every_steps", 0, "must be at least 1"),
    ("train.mesh_fsdp", 0, "must be positive"),
    ("evals.probe.split", "nosuch", "they have train, validation"),
    ("data.splits", dict(train=0.9, validation=0.3), "add to 1.2, not 1"),
    ("data.resample", "resiz", "'resiz'"),
    ("data.max_bad_fraction", 2.0, "not in [0, 1]"),
    ("data.manifest", "phantom:octt", "phantom:oct"),
    ("wandb.mode", "onlin", "none of online"),
])
def test_a_value_that_could_only_fail_later_is_refused_by_its_place(path, value, part):
  config = load("oct_multi")
  *sections, key = path.split(".")
  with config.unlocked():
    config.data.manifest = "m.tsv"
    node = config
    for section in sections:
      node = node[section]
    node[key] = value
  (fault,) = faults_of(config)
  assert part in fault and path.split(".")[0] in fault


def test_an_evaluators_split_is_held_against_the_embedded_corpus():
  config = load("oct_multi", "sample")
  with config.unlocked():
    config.evals.probe.split = "prob"
  (fault,) = faults_of(config)
  assert "evals.probe.split: 'prob'" in fault and "probe" in fault


def test_rules_of_sound_sections_are_checked_beside_a_typo_in_another():
  config = load("oct_multi", "sample")
  with config.unlocked():
    config.data.canvaz = (1, 2, 3)
    config.optimizer.learning_rate = -1.0
    config.train.accum = 3
  text = "\n".join(faults_of(config))
  for part in ("data.canvaz", "optimizer.learning_rate", "train.accum 3"):
    assert part in text, text


def test_a_warm_up_in_steps_is_not_held_against_a_run_in_epochs_of_unknown_length():
  config = load("oct_multi")
  with config.unlocked():
    config.data.manifest = "m.tsv"
    del config.optimizer.warmup_percent
    config.optimizer.warmup_steps = 1000
    config.train.total_epochs = 2
  config_lib.check_config(config)
  with config.unlocked():
    config.train.steps_per_epoch = 400
  (fault,) = faults_of(config)
  assert "warmup_steps 1000" in fault


def test_batches_of_evaluators_must_divide_by_the_devices():
  config = load("oct_multi")
  with config.unlocked():
    config.data.manifest = "m.tsv"
    config.evals.probe.batch_size = 16
  text = "\n".join(faults_of(config, device_count=32))
  assert "evals.probe.batch_size: 16" in text and "32 device(s)" in text


def test_a_zero_is_a_value_and_not_the_default():
  given = units.filled_in(dict(max_bad_fraction=0.0, max_records=0, label=""))
  assert given == dict(max_bad_fraction=0.0)


@pytest.mark.parametrize("arm", ["sample,smoke", "L,H", "literal,sample", "sample,tiny"])
def test_arms_that_cannot_be_joined_are_refused(arm):
  with pytest.raises(ValueError, match="cannot be joined"):
    load("oct_multi", arm)


def test_a_run_may_go_on_with_more_threads_and_more_bad_files_but_not_other_data(
    tmp_path,
):
  plain = config_lib.as_plain(load("oct_multi", "sample"))
  (tmp_path / "config.json").write_text(json.dumps(plain))
  data = {**plain["data"], "threads": 9, "max_bad_fraction": 0.5}
  other = {**plain, "data": {**data, "resample": "fov"}}
  main.check_continuation(tmp_path, other)  # no checkpoint: nothing to go on from
  (tmp_path / "checkpoints" / "200").mkdir(parents=True)
  main.check_continuation(tmp_path, {**plain, "data": data})
  with pytest.raises(config_lib.ConfigError, match="data.resample"):
    main.check_continuation(tmp_path, other)


def test_voxels_that_the_patch_does_not_divide_name_the_axis_and_the_nearest():
  config = load("oct_multi")
  with config.unlocked():
    config.data.manifest = "m.tsv"
    config.data.canvas = (64, 380, 384)
  (fault,) = faults_of(config)
  assert "Y=380 is not a multiple of patch 16; nearest 368 or 384" in fault


def test_mask_counts_are_held_against_the_grid():
  config = load("oct_multi", "literal")
  with config.unlocked():
    config.data.manifest = "m.tsv"
    config.objective.masks.random.target = 0.7
  assert any("objective.masks.random" in f for f in faults_of(config))


def test_batch_must_divide_by_accumulation_and_devices():
  config = load("oct_multi", "sample")
  with config.unlocked():
    config.train.accum = 3
  assert any("not a multiple of train.accum 3" in f for f in faults_of(config))
  config = load("oct_multi", "sample")
  assert any("3 device(s)" in f for f in faults_of(config, device_count=3))
  config = load("oct_multi", "L")
  with config.unlocked():
    config.data.manifest = "m.tsv"
  assert any("mesh_fsdp 16" in f for f in faults_of(config, device_count=8))


def test_best_is_never_chosen_by_the_self_supervised_loss():
  config = load("oct_multi", "sample")
  with config.unlocked():
    config.train.best_metric = "validation.loss"
  assert any("best_metric" in f for f in faults_of(config))


def test_a_run_has_one_length():
  config = load("oct_multi", "sample")
  with config.unlocked():
    config.train.total_epochs = 3
  assert any("total_steps and total_epochs" in f for f in faults_of(config))


def test_the_full_config_without_a_manifest_names_the_remedy():
  (fault,) = faults_of(load("oct_multi"))
  assert "--config.data.manifest=" in fault and ":sample" in fault


def test_unknown_arms_list_the_closest():
  with pytest.raises(ValueError, match="closest: sample"):
    load("oct_multi", "smaple")


@pytest.mark.parametrize("options,steps", [
    (dict(warmup_steps=7), 7), (dict(warmup_epochs=2), 20),
    (dict(warmup_percent=10.0), 30), (dict(), None),
])
def test_durations_become_steps(options, steps):
  got = config_lib.duration(options, "warmup", total_steps=300, steps_per_epoch=10)
  assert got == steps


def test_a_duration_spelled_twice_is_refused():
  with pytest.raises(ValueError, match="twice"):
    config_lib.duration(
        dict(warmup_steps=1, warmup_epochs=1), "warmup", total_steps=1, steps_per_epoch=1
    )


@pytest.mark.slow
def test_faults_are_reported_before_a_device_or_a_file_is_touched(tmp_path):
  done = subprocess.run(
      [sys.executable, "-m", "vjepa_jax.main", "--config=configs/oct_multi.py",
       f"--workdir={tmp_path / 'run'}", "--config.train.accum=5"],
      # A platform that does not exist: touching a device would say so.
      env={**os.environ, "JAX_PLATFORMS": "no_such_platform"},
      cwd=ROOT, capture_output=True, text=True, timeout=120,
  )
  assert done.returncode == 2, done.stderr
  assert "--config.data.manifest=" in done.stderr and "train.accum 5" in done.stderr
  assert "no_such_platform" not in done.stderr
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_unknown_override_names_the_closest_key(tmp_path):
  done = subprocess.run(
      [sys.executable, "-m", "vjepa_jax.main", "--config=configs/oct_multi.py:tiny",
       f"--workdir={tmp_path / 'run'}", "--config.train.batchsize=5"],
      cwd=ROOT, capture_output=True, text=True, timeout=120,
  )
  assert done.returncode != 0 and "batch_size" in done.stderr + done.stdout


@pytest.mark.parametrize("key,value,said", [
    ("cache", "s3://canvases", "must be a local folder or gs://"),
    ("max_records", -1, "must be at least 0"),
    ("canvas", (64, 384), "three numbers"),
    ("fov_mm", (6.0, 0.0, 6.0), "above 0"),
    ("colour", "rainbow", "none of reject, luminance"),
    ("stratify", ("devise",), "closest: device"),
])
def test_contradictions_of_the_data_section_are_found_before_reading(key, value, said):
  config = load("oct_multi")
  with config.unlocked():
    config.data.manifest = "m.tsv"
    config.data[key] = value
  assert any(f"data.{key}" in f and said in f for f in faults_of(config))


def three_recordings(folder, frames, spacing):
  """Writes three .npy recordings and a manifest; returns a plain config of them."""
  rng = np.random.default_rng(0)
  rows = ["participant_id\tfilepath\tpixel_spacing\tslice_thickness"]
  for person, (count, mm) in enumerate(zip(frames, spacing, strict=True)):
    volume = rng.integers(0, 255, (count, 32, 48), np.uint8)
    np.save(folder / f"{person}.npy", volume)
    rows.append(f"{person}\t{person}.npy\t{mm}")
  manifest = folder / "manifest.tsv"
  manifest.write_text("\n".join(rows) + "\n")
  plain = config_lib.as_plain(load("oct_multi", "tiny"))
  plain["data"] |= dict(
      manifest=str(manifest), split_column="", max_bad_fraction=0.5, label="",
      splits=dict(train=0.5, validation=0.5),
  )
  return plain


KNOWN_SPACING, NO_SPACING = "[0.01, 0.02]\t0.1", "\t"


def test_a_recording_of_fewer_voxels_than_a_patch_is_quarantined(tmp_path):
  plain = three_recordings(tmp_path, (8, 8, 3), [NO_SPACING] * 3)
  data = config_lib.open_data(plain, say=lambda text: None)
  assert [bad.reason for bad in data.quarantine] == ["too_small"]
  assert data.quarantine[0].path.endswith("2.npy")


def test_positions_in_mm_quarantine_recordings_of_unknown_spacing(tmp_path):
  plain = three_recordings(
      tmp_path, (8, 8, 8), [KNOWN_SPACING, KNOWN_SPACING, NO_SPACING]
  )
  assert not config_lib.open_data(plain, say=lambda text: None).quarantine
  for part in (plain["model"], plain["objective"]["predictor"]):
    part["rope_units"] = "mm"
    (bad,) = config_lib.open_data(plain, say=lambda text: None).quarantine
    assert bad.reason == "missing_spacing" and bad.path.endswith("2.npy")
    part["rope_units"] = "index"


def test_positions_in_minutes_need_the_time_step_where_time_has_places():
  options = lambda plain: units.data_options(plain, say=lambda text: None)
  plain = config_lib.as_plain(load("worm_mae"))
  plain["data"]["manifest"] = "movies.tsv"
  plain["model"]["position_units"] = "index"
  assert not options(plain)["require_time_step"]
  plain["model"]["position_units"] = "mm"
  assert options(plain)["require_time_step"]
  plain["augment"]["crop"] = (1, *units.data_voxels(plain)[1:])
  assert options(plain)["require_spacing"] and not options(plain)["require_time_step"]


def with_data(**changes):
  config = load("oct_multi")
  with config.unlocked():
    config.data.manifest = "m.tsv"
    for key, value in changes.items():
      config.data[key] = value
  return config


@pytest.mark.parametrize("key,value,said", [
    ("workers", -1, "at least 0"), ("timeout_s", 0.0, "above 0"),
    ("max_lost_fraction", 1.5, "not in [0, 1]"), ("mixture", "alternat", "none of alternate"),
    ("reader", dict(axis="TZYX"), "data.reader.axis: unknown key; closest: axes"),
    ("reader", dict(axes="QQYX"), "each stored axis once"),
    ("reader", dict(time_step_s=-1.0), "positive number of seconds"),
    ("ops", (dict(name="clip_percentile"),), "closest ['clip_percentiles'"),
    ("ops", (dict(name="clip_percentiles", lowr=3),), "unknown option 'lowr'; closest ['lower'"),
    ("ops", (dict(name="spacing"),), "'spacing_mm' is missing"),
    ("storage", dict(cash="x"), "data.storage.cash: unknown key; closest: cache"),
    ("storage", dict(cache="gs://b/c"), "must be a local folder"),
    ("storage", dict(deadline_s=0.0), "above 0"),
    ("filters", dict(devise=("x",)), "closest: device"),
    ("cache", "s3://bucket/x", "local folder or gs://"),
    ("sources", dict(ct=dict(manifest="c.tsv")), "one or the other"),
])
def test_what_the_data_section_cannot_mean_is_said_by_its_key(key, value, said):
  text = "\n".join(faults_of(with_data(**{key: value})))
  assert said in text, text


def test_several_faults_of_new_keys_are_reported_together():
  config = with_data(
      workers=-1, max_lost_fraction=-0.1, reader=dict(axes="XX"),
      ops=(dict(name="nosuch"), dict(name="resize", size=(0, 1, 2))),
  )
  text = "\n".join(faults_of(config))
  for part in (
      "data.workers: -1", "data.max_lost_fraction: -0.1", "data.reader: axes",
      "data.ops[0]: unknown name 'nosuch'", "data.ops[1] resize",
  ):
    assert part in text, text


SOURCES = dict(
    mri=dict(manifest="m.tsv", modalities=("MR",)),
    ct=dict(manifest="c.tsv", modalities=(), weight=2.0),
)


def with_sources(mixture="weighted", **changes):
  config = load("oct_multi")
  with config.unlocked():
    config.data.mixture = mixture
    config.data.sources = {k: {**v, **changes.get(k, {})} for k, v in SOURCES.items()}
  return config


def test_sources_in_place_of_a_manifest_are_sound():
  for mixture in ("weighted", "alternate"):
    config_lib.check_config(with_sources(mixture))


@pytest.mark.parametrize("mixture,change,said", [
    ("weighted", dict(wieght=1.0), "data.sources.ct.wieght: unknown key; closest: weight"),
    ("weighted", dict(weight=0.0), "data.sources.ct.weight: 0.0 must be a number above 0"),
    ("concatenate", {}, "has no say in data.mixture 'concatenate'"),
    ("weighted", dict(manifest=""), "data.sources.ct.manifest: missing"),
    ("weighted", dict(manifest="phantom:octt"), "data.sources.ct.manifest: no embedded"),
    ("weighted", dict(dtype="keep"), "only data.mixture 'alternate' keeps sources apart"),
    ("alternate", dict(canvas=(32, 384, 384)), "one grid"),
    ("alternate", dict(resample="zoom"), "data.sources.ct.resample"),
    ("alternate", dict(reader=dict(axes="ZZ")), "data.sources.ct.reader: axes"),
    ("alternate", dict(ops=(dict(name="x"),)), "data.sources.ct.ops[0]: unknown name"),
    ("alternate", dict(exclude=dict(side=("L",))), "data.sources.ct.exclude: no field"),
    ("alternate", dict(threads=3), "data.sources.ct.threads: unknown key"),
])
def test_faults_of_a_source_name_it(mixture, change, said):
  text = "\n".join(faults_of(with_sources(mixture, ct=change)))
  assert said in text, text


def test_the_data_section_becomes_keywords_and_storage_options(monkeypatch):
  for name in ("FILE_CACHE", "FILE_CACHE_BYTES", "STORAGE_DEADLINE_S", "ANONYMOUS"):
    monkeypatch.setenv(f"VJEPA_JAX_{name}", "")
  monkeypatch.setenv("VJEPA_JAX_STORAGE_DEADLINE_S", "7")
  config = with_sources()
  with config.unlocked():
    config.data.storage.cache = "/tmp/cache"
    config.data.ops = (dict(name="clip_percentiles"),)
  options = units.data_options(config_lib.as_plain(config))
  assert options["sources"]["ct"]["modalities"] == ()  # any, and not the section's
  assert options["modalities"] == ("OPT",) and "manifest" not in options
  assert options["ops"] == (dict(name="clip_percentiles"),)
  assert "reader" not in options and "storage" not in options
  assert os.environ["VJEPA_JAX_FILE_CACHE"] == "/tmp/cache"
  assert os.environ["VJEPA_JAX_STORAGE_DEADLINE_S"] == "7"  # not given: left alone


def test_a_config_of_two_sources_opens_both(tmp_path):
  folders = [tmp_path / "a", tmp_path / "b"]
  for folder in folders:
    folder.mkdir()
  plain = three_recordings(folders[0], (8, 8, 8), [NO_SPACING] * 3)
  three_recordings(folders[1], (8, 8, 8), [NO_SPACING] * 3)
  plain["data"] |= dict(
      manifest="", mixture="alternate", stratify=(),
      sources={f.name: dict(manifest=str(f / "manifest.tsv")) for f in folders},
  )
  data = config_lib.open_data(plain, say=lambda text: None)
  assert data.report["source"] == {"a": 3, "b": 3}
  assert data.splits["train"].sources == ("a", "b")


@pytest.mark.parametrize("key,value,said", [
    ("canvas", 64, "three numbers"), ("canvas", (64, 384), "three numbers"),
    ("canvas", ("a", "b", "c"), "Sequence[int]"), ("threads", "8", "is not int"),
    ("max_bad_fraction", float("nan"), "is not float"), ("workers", True, "is not int"),
    ("reader", "TZYX", "is not Mapping"), ("reader", {"axes": 4}, "is not str"),
    ("storage", ("a",), "is not Mapping"), ("storage", {"cache": 1}, "is not str"),
    ("sources", {"mr": {"manifest": 3}}, "is not str"), ("ops", ("spacing",), "Sequence"),
    ("splits", {"train": "most"}, "Mapping[str, float]"), ("manifest", 7, "is not str"),
])
def test_a_value_of_another_kind_is_a_fault_with_its_place(key, value, said):
  config = load("oct_multi", "tiny").to_dict()
  config["data"][key] = value
  found = [f for f in faults_of(config) if f.startswith(f"data.{key}")]
  assert any(said in fault for fault in found), found


@pytest.mark.parametrize("patch, crop, said", [
    (4, None, "with one token along T (T=4, patch 4)"),
    (1, 1, "with one token along T (T=1, patch 1)"),
    (2, 2, "with one token along T (T=2, patch 2)"),
    (2, None, ""),
])
def test_losses_over_time_need_two_tokens_in_time(patch, crop, said):
  """However many time points a clip has, for the model sees tokens of a crop."""
  config = load("worm_stages", "tiny")
  with config.unlocked(), config.ignore_type():
    config.model.patch = (patch, *config.model.patch[1:])
    if crop:
      config.augment.crop = (crop, *config.data.canvas)
    config.objective.smooth_weight = 0.1
  if not said:
    config_lib.check_config(config)
    return
  over_time = [f for f in faults_of(config) if "compares tokens" in f]
  assert len(over_time) == 2  # of each loss
  assert all(said in fault for fault in over_time)
  assert over_time[0].startswith("objective.transition_weight: 0.1")
