"""Damaged checkpoints are passed over loudly; one that cannot be written is retried."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from vjepa_jax.train import metrics, seal
from vjepa_jax.train.checkpoint import CheckpointError, Checkpoints, DamagedError

STATE = {"params": {"kernel": jnp.arange(4096.0).reshape(64, 64), "bias": jnp.ones(64)}}
SHAPES = jax.eval_shape(lambda: STATE)


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
  path.write_bytes(b"")


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 16
  path.write_bytes(content)


def garble(path):
  path.write_bytes(os.urandom(path.stat().st_size))


def remove(path):
  path.unlink()


def largest(folder):
  """The file that holds most of the arrays."""
  files = [p for p in (folder / "state").rglob("*") if p.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def named(name):
  return lambda folder: folder / name


@pytest.fixture
def saved(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  for step in (5, 10):
    checkpoints.save(
        step, STATE, config={}, extra={"a": 1}, iterator=toy.iterator(rows=2)
    )
  checkpoints.wait()
  return checkpoints


def read(checkpoints, step):
  checkpoints.check(step)
  checkpoints.restore_place(step, toy.iterator(rows=2))
  return checkpoints.restore(step, SHAPES)[0]


@pytest.mark.parametrize("where", [
    largest, named("state/manifest.ocdbt"), named("state/_METADATA"),
    named("extra/metadata"), named("data/process_0-of-1.json"),
], ids=["arrays", "manifest", "names", "extra", "place"])
@pytest.mark.parametrize("damage", [cut, empty, garble, remove])
def test_every_kind_of_damage_is_found_and_named(saved, where, damage):
  damage(where(pathlib.Path(saved.directory) / "10"))
  with pytest.raises(DamagedError, match=r"10 is damaged: .*"):
    read(Checkpoints(saved.directory), 10)
  assert jax.tree.all(jax.tree.map(np.array_equal, read(saved, 5), STATE))


def test_one_wrong_bit_of_a_weight_is_found(saved):
  path = largest(pathlib.Path(saved.directory) / "10")
  flip(path)
  with pytest.raises(DamagedError, match=rf"{path.name} was altered"):
    saved.check(10)


def test_hosts_that_share_the_reading_miss_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(seal, "_BLOCK", 1000)
  (tmp_path / "a").write_bytes(os.urandom(10_500))
  seal.write(tmp_path)
  shares = [(host, 3) for host in range(3)]
  assert [seal.fault(tmp_path, share) for share in shares] == [None] * 3
  content = bytearray((tmp_path / "a").read_bytes())
  content[4321] ^= 1  # in the fifth block
  (tmp_path / "a").write_bytes(content)
  found = [seal.fault(tmp_path, share) for share in shares]
  assert found == [None, "a was altered between byte 4000 and 5000", None]


def test_a_checkpoint_without_checksums_is_read_as_ever(saved):
  (pathlib.Path(saved.directory) / "10" / "state" / "checksums.json").unlink()
  assert jax.tree.all(jax.tree.map(np.array_equal, read(saved, 10), STATE))


def test_what_lies_aside_is_no_step(saved):
  folder = pathlib.Path(saved.directory)
  assert saved.set_aside(10) == "10.damaged"
  saved.reload()
  assert saved.all_steps() == [5] and (folder / "10.damaged" / "state").is_dir()
  saved.save(10, STATE, config={})
  saved.wait()
  assert saved.set_aside(10) == "10.damaged.1"
  assert Checkpoints(folder, read_only=True).latest_step() == 5


def test_a_run_goes_on_from_the_last_sound_checkpoint(tmp_path, capsys):
  options = dict(total_steps=12, checkpoint_every_steps=4, validate=False, keep=9)
  whole = toy.run(tmp_path, **options)
  lines = without_clock(tmp_path)
  folder = tmp_path / "checkpoints"
  flip(largest(folder / "12"))
  remove(folder / "8" / "extra" / "metadata")
  capsys.readouterr()
  again = toy.run(tmp_path, **options)
  said = capsys.readouterr().out
  assert f"DAMAGED CHECKPOINT: {folder / '12'}: " in said and "was altered" in said
  assert f"DAMAGED CHECKPOINT: {folder / '8'}: " in said
  assert "FALLS BACK to the checkpoint of step 4" in said
  names = {path.name for path in folder.iterdir()}
  assert names == {"4", "8", "8.damaged", "12", "12.damaged"}
  assert without_clock(tmp_path) == lines
  for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(again.params)):
    np.testing.assert_array_equal(one, other)


def test_where_none_is_sound_all_are_named_and_none_is_touched(tmp_path):
  options = dict(total_steps=8, checkpoint_every_steps=4, validate=False)
  toy.run(tmp_path, **options)
  for step in (4, 8):
    cut(largest(tmp_path / "checkpoints" / str(step)))
  for _ in range(2):  # the second time no run begins from scratch either
    with pytest.raises(CheckpointError, match=r"no checkpoint is sound:\n  8: .*\n  4: "):
      toy.run(tmp_path, **options)
  assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"4", "8"}


def without_clock(workdir):
  return [
      {k: v for k, v in line.items() if k not in metrics.TIMING_KEYS}
      for line in metrics.read(workdir)
  ]


def process(workdir, **options):
  env = os.environ | {
      "PYTHONPATH": os.pathsep.join([os.getcwd(), os.path.dirname(__file__)]),
  }
  script = pathlib.Path(__file__).with_name("toy_run.py")
  return subprocess.Popen(
      [sys.executable, str(script), str(workdir), json.dumps(options)],
      env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )


def finish(running, code=0):
  said, _ = running.communicate(timeout=240)
  assert running.returncode == code, said
  return said


OPTIONS = dict(total_steps=30, checkpoint_every_steps=5, log_every_steps=3, keep=9)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("unbroken")
  finish(process(workdir, **OPTIONS))
  return workdir


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_no_line(
    unbroken, tmp_path
):
  # No file may grow beyond 2 KiB while steps 8 to 18 run: neither arrays nor lines.
  said = finish(process(tmp_path, full=[8, 18], tensorboard=True, **OPTIONS))
  assert said.count("NOT SAVED") == 2 and "training goes on" in said
  assert "step 10: NOT SAVED, 1 of 3" in said and "step 15: NOT SAVED, 2 of 3" in said
  assert "File too large" in said and "no TensorBoard events from here on" in said
  steps = Checkpoints(tmp_path / "checkpoints", read_only=True).all_steps()
  assert steps == [5, 20, 25, 30]
  assert without_clock(tmp_path) == without_clock(unbroken)
  failed = metrics.history(metrics.read(tmp_path), "failed_saves")
  # Told by the first line after it was noticed: at the latest when step 15 saves.
  assert failed[0][0] in (12, 15, 18) and failed[-1] == (30, 2.0)


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_and_leaves_the_last_good_one(
    unbroken, tmp_path
):
  said = finish(process(tmp_path, full=[8, 99], **OPTIONS), code=1)
  assert "step 20: NOT SAVED, 3 of 3 times in a row" in said
  assert "the last good checkpoint is that of step 5" in said
  assert "Make room" in said and "train.max_failed_saves" in said
  assert Checkpoints(tmp_path / "checkpoints", read_only=True).all_steps() == [5]
  assert "goes on from step 5" in finish(process(tmp_path, **OPTIONS))
  assert without_clock(tmp_path) == without_clock(unbroken)


@contextlib.contextmanager
def small_disk(folder, size):
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("mounting a small file system needs root")
  try:
    yield folder
  finally:
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_file_system_without_room_is_told_and_used_again(unbroken, tmp_path):
  with small_disk(tmp_path / "disk", "4m") as disk:
    running = process(disk / "run", pace_s=0.3, **OPTIONS)
    saved = disk / "run" / "checkpoints" / "5"
    while not saved.exists():
      assert running.poll() is None, running.communicate()[0]
      time.sleep(0.01)
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
      while True:
        file.write(bytes(4096))
    said = ""
    while "NOT SAVED" not in said:
      assert running.poll() is None
      said += running.stdout.readline()
    ballast.unlink()
    said += finish(running)
    assert "No space left" in said
    assert Checkpoints(disk / "run" / "checkpoints", read_only=True).latest_step() == 30
    assert without_clock(disk / "run") == without_clock(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_while_a_checkpoint_is_written_costs_nothing(
    unbroken, tmp_path, number, code
):
  running = process(tmp_path, pace_s=0.1, **OPTIONS)
  folder = tmp_path / "checkpoints"
  while not list(folder.glob("10.orbax-checkpoint-tmp*")) and not (folder / "10").exists():
    assert running.poll() is None, running.communicate()[0]
  running.send_signal(number)
  finish(running, code)
  left = Checkpoints(folder, read_only=True).all_steps()
  assert left[:1] == [5] and all((folder / str(s) / "extra").exists() for s in left)
  assert "goes on from step" in finish(process(tmp_path, **OPTIONS))
  assert without_clock(tmp_path) == without_clock(unbroken)
