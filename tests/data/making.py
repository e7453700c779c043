"""Transforms for tests of preparing, importable by worker processes."""

import dataclasses
import json
import os
import pathlib
import signal
import sys
import time

import numpy as np

from vjepa_jax.data import shard_writing
from vjepa_jax.data.manifest import Row
from vjepa_jax.data.record import ReadError, Record

SHARD_BYTES = 3 * 128  # three of the small canvases


@dataclasses.dataclass(frozen=True)
class Made:
  """A canvas made from a small text file; what the text says may happen to it.

  "abort" and "segfault" end the process, "hang" never ends, "bad" is a ReadError,
  "bug" an error no reader should raise, "hungry" is killed while a "long" one is read.
  """

  shape: tuple[int, ...] = (1, 2, 8, 8, 1)
  dtype: str = "uint8"
  seconds: float = 0.0
  busy: str = ""

  def __call__(self, row: Row, look=None) -> Record:
    text = pathlib.Path(row.path).read_text()
    time.sleep(self.seconds)
    if "abort" in text:
      os.abort()
    if "segfault" in text:
      os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in text:
      time.sleep(1000)
    if "bad" in text:
      raise ReadError(row.path, "truncated", "of  two\nlines")
    if "jax" in text:
      raise ReadError(row.path, "constant", f"jax is here: {'jax' in sys.modules}")
    if "bug" in text:
      raise KeyError("a bug")
    if "long" in text:
      self._read_long()
    if "hungry" in text:
      self._eat()
    rng = np.random.default_rng(list(text.encode()))
    volume = rng.integers(0, 255, self.shape, np.uint8).astype(self.dtype)
    record = Record(
        volume, np.array([np.nan, 0.1, 0.2, 0.3]), row.path, subject=row.participant,
        meta={"padding": 0.5},
    )
    if look:
      look(record)
    return record

  def _read_long(self):
    """Reads until a hungry one beside it has died twice, and somewhat longer."""
    reading = pathlib.Path(self.busy) / "reading"
    reading.touch()
    tries = lambda: len(list(reading.parent.glob("tried*")))
    _wait_for(lambda: tries() > 1)
    # A third that does not wait for this one's end comes now.
    _wait_for(lambda: tries() > 2, seconds=6)
    reading.unlink()

  def _eat(self):
    """Dies like a process out of memory while another one reads."""
    folder = pathlib.Path(self.busy)
    (folder / f"tried by {os.getpid()}").touch()
    if len(list(folder.glob("tried*"))) < 3:
      _wait_for((folder / "reading").exists)
    elif (folder / "reading").exists():
      (folder / "not alone").touch()
    if (folder / "reading").exists():
      os.kill(os.getpid(), signal.SIGKILL)


def _wait_for(happened, seconds=30):
  end = time.monotonic() + seconds
  while not happened() and time.monotonic() < end:
    time.sleep(0.02)


def rows(folder: pathlib.Path, texts: list[str], **facts) -> list[Row]:
  """Writes a file a text and returns its rows."""
  folder.mkdir(parents=True, exist_ok=True)
  made = []
  for n, text in enumerate(texts):
    path = folder / f"{n:03d}.txt"
    if not path.exists():
      path.write_text(text)
    made.append(Row(str(path), f"p{n}", **facts))
  return made


def contents(folder: str) -> dict[str, bytes]:
  """Returns every file below a folder, by its name there."""
  root = pathlib.Path(folder)
  return {
      str(path.relative_to(root)): path.read_bytes()
      for path in sorted(root.rglob("*")) if path.is_file()
  }


def write(source, path, workers="2", texts="", seconds="0", **options):
  """Prepares a folder of small made canvases, three a shard."""
  texts = json.loads(texts) if texts else [str(n) for n in range(20)]
  shard_writing._SHARD_BYTES = SHARD_BYTES
  parts = {
      "train": rows(pathlib.Path(source) / "a", texts),
      "all": rows(pathlib.Path(source) / "b", ["x", "y"]),
  }
  return shard_writing.prepare(
      str(path), parts, Made(seconds=float(seconds)), options={"o": 1},
      crew=shard_writing.Crew(int(workers), timeout_s=options.pop("timeout_s", 60)),
      **options,
  )
