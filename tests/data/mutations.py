"""Damages sound files of every format, reads each in a worker, and judges the outcome.

python -m tests.data.mutations --count=5000 --seed=0 [--only=FORMAT[:NUMBER]]

A format and a number name one mutation for good: `--only=dicom_j2k:17 --save=FOLDER`
writes it and says what reading it gives. A worker's memory is capped, its time
limited; one that dies is a defect, as is any error that is no ReadError.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import queue
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any
import zlib

from absl import app, flags
import numpy as np

from tests.data import hostile, libraries, seeds
from vjepa_jax import data
from vjepa_jax.data.record import DTYPES

MAX_VOXELS = 2**22
MAX_BYTES = 64 << 20
CAP_MIB = 1024  # Address space above what the libraries take.
PEAK_MIB = 384  # Resident, above what was held before.
HELPER_MIB = 1152  # The same of a process that decodes apart, which may just fall.
SLOW_S = 5.0  # CPU seconds a file.
ALARM_S = 60
KILL_S = 90
NUMBERS_A_SEED = 1_000_000
# Coded bits without a check: damaged, each decoder makes something else of them.
_NO_CHECK = ("dicom_jpeg", "dicom_ljpeg", "tiff_jpeg")
# On which reading once failed: (format, number).
FOUND: tuple[tuple[str, int], ...] = (
    # A panic of the RLE decoder, which is no Exception; tokens that do not end;
    # shapes of 10^18; an archive's method and a member that is no array.
    ("dicom_rle", 38), ("dicom_rle", 50), ("npy", 30), ("npy_float", 12),
    ("npy_float", 23), ("npz", 14), ("npz", 17), ("npz", 27),
    # A header or pixels that inflate to half a GB, or take a minute to walk through.
    ("dicom_deflated", 12), ("dicom_deflated", 13), ("dicom_deflated", 14),
    # Marks among coded bits; one stored bit of sixteen; three of four frames lost.
    ("dicom_ljpeg", 23), ("dicom_ljpeg", 1_000_046), ("dicom_i16", 1_000_014),
    ("dicom_jpegls", 2_000_028),
    # A chunk that inflates to half a GB.
    ("hdf5_gzip", 15),
)


class OutOfTime(BaseException):
  """Raised by the alarm; no reader's `except Exception` holds it up."""


@dataclasses.dataclass(frozen=True)
class Case:
  """One damaged recording.

  Attributes:
    label: what was done to it.
    files: relative name -> content.
    folder: whether the recording is the folder.
  """

  label: str
  files: dict[str, bytes]
  folder: bool


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What reading one case gave.

  Attributes:
    name: the format.
    number: of the mutation.
    label: what was done.
    kind: "record", "record alone" (its own library refuses it), "record disputed"
      (decoders differ on damaged bits), a ReadError's reason or "DEFECT ...".
    detail: the message.
    seconds: of CPU.
    peak_mib: resident memory above what was held before.
    helper_mib: the same of the processes that decode apart.
  """

  name: str
  number: int
  label: str
  kind: str
  detail: str = ""
  seconds: float = 0.0
  peak_mib: float = 0.0
  helper_mib: float = 0.0


@functools.cache
def load_seed(name: str) -> seeds.Seed:
  return seeds.SEEDS[name]()


@functools.cache
def _hostile_cases(name: str) -> tuple[Case, ...]:
  seed = load_seed(name)
  return tuple(
      Case(label, files, seed.folder)
      for label, files in hostile.cases(name, seed)
  )


def make_case(name: str, number: int) -> Case:
  """Returns the mutation called `name:number`, the same on every run.

  The first numbers of every seed's range are the hostile files written by hand.
  """
  fixed = _hostile_cases(name)
  if number % NUMBERS_A_SEED < len(fixed):
    return fixed[number % NUMBERS_A_SEED]
  seed = load_seed(name)
  rng = np.random.default_rng([zlib.crc32(name.encode()), number])
  names = list(seed.files)
  if seed.folder and rng.random() < 0.25:
    return Case(*_change_folder(dict(seed.files), rng), True)
  target = names[int(rng.integers(len(names)))]
  edit = _EDITS[int(rng.choice(len(_EDITS), p=_WEIGHTS))]
  content, label = edit(seed.files[target], seed.fields, rng)
  if rng.random() < 0.15:
    content, more = _flip_bits(content, (), rng)
    label += f" + {more}"
  return Case(f"{label} of {target}", dict(seed.files) | {target: content}, seed.folder)


def _place(content: bytes, rng: np.random.Generator) -> int:
  """A place, half of the time where headers are: near the start or the end."""
  size = max(1, len(content))
  reach = min(size, 600)
  kind = rng.random()
  if kind < 0.35:
    return int(rng.integers(reach))
  if kind < 0.5:
    return size - 1 - int(rng.integers(reach))
  return int(rng.integers(size))


def _flip_bits(content, fields, rng):
  changed = bytearray(content or b"\0")
  count = int(rng.choice([1, 1, 1, 2, 4, 16]))
  for _ in range(count):
    changed[_place(content, rng)] ^= 1 << int(rng.integers(8))
  return bytes(changed), f"flip {count}"


def _overwrite(content, fields, rng):
  start, size = _place(content, rng), int(rng.choice([1, 2, 4, 8, 64, 1024]))
  size = min(size, len(content) - start)
  fill = int(rng.integers(3))
  new = (bytes(size), b"\xff" * size, rng.bytes(size))[fill]
  label = f"overwrite {size} at {start} by {('00', 'ff', 'noise')[fill]}"
  return content[:start] + new + content[start + size :], label


def _truncate(content, fields, rng):
  kind = int(rng.integers(4))
  size = (
      _place(content, rng), len(content) - 1, len(content) // 2,
      len(content) - int(rng.integers(1, min(64, len(content)))),
  )[kind]
  return content[:size], f"truncate to {size}"


def _insert(content, fields, rng):
  start, size = _place(content, rng), int(rng.choice([1, 2, 7, 64, 4096]))
  changed = content[:start] + rng.bytes(size) + content[start:]
  return changed, f"insert {size} at {start}"


def _delete(content, fields, rng):
  start, size = _place(content, rng), int(rng.choice([1, 2, 7, 64, 512]))
  return content[:start] + content[start + size :], f"delete {size} at {start}"


def _swap(content, fields, rng):
  size = int(rng.choice([4, 64, 512]))
  first, second = sorted(_place(content, rng) for _ in range(2))
  second = max(second, first + size)
  parts = (
      content[:first], content[second : second + size],
      content[first + size : second], content[first : first + size],
      content[second + size :],
  )
  return b"".join(parts), f"swap {size} at {first} and {second}"


def _repeat(content, fields, rng):
  start, size = _place(content, rng), int(rng.choice([16, 256, 2048]))
  return content[: start + size] + content[start:], f"repeat {size} at {start}"


_NUMBERS = (
    0, 1, -1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 10**6, 2**31 - 1, -(2**31), 2**32 - 1,
    2**62,
)
_FLOATS = (np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-30, 1e30)


def _set_field(content, fields, rng):
  """Puts a number no one counts with where the format keeps one."""
  if not fields:
    return _set_text(content, fields, rng)
  at, size = fields[int(rng.integers(len(fields)))]
  order = ("little", "big")[int(rng.random() < 0.3)]
  if size in (4, 8) and rng.random() < 0.4:
    value: Any = _FLOATS[int(rng.integers(len(_FLOATS)))]
    new = np.array(value, f"{'<' if order == 'little' else '>'}f{size}").tobytes()
  else:
    value = _NUMBERS[int(rng.integers(len(_NUMBERS)))]
    new = (value % 2 ** (8 * size)).to_bytes(size, order)
  return content[:at] + new + content[at + size :], f"{value} at {at}+{size} {order}"


_TEXTS = (
    b"0", b"-1", b"nan", b"1e400", b"2147483647", b"1000000", b"99999999999999999999",
    b"\\\\", b"", b"1.5", b"\xff",
)


def _set_text(content, fields, rng):
  """Puts such a number where the header holds one in letters."""
  places = hostile.text_numbers(content)
  if not places:
    return _overwrite(content, fields, rng)
  start, end = places[int(rng.integers(len(places)))]
  new = _TEXTS[int(rng.integers(len(_TEXTS)))]
  label = f"{new!r} for {content[start:end]!r} at {start}"
  if rng.random() < 0.6:  # In the same room, as a fixed field wants it.
    new = new[: end - start].ljust(end - start)
  return content[:start] + new + content[end:], label


_EDITS = (
    _flip_bits, _overwrite, _truncate, _insert, _delete, _swap, _repeat, _set_field,
    _set_text,
)
_WEIGHTS = (0.22, 0.13, 0.15, 0.06, 0.07, 0.05, 0.04, 0.2, 0.08)


def _change_folder(files, rng):
  names = list(files)
  target = names[int(rng.integers(len(names)))]
  kind = int(rng.integers(6))
  if kind == 0:
    del files[target]
    return f"remove {target}", files
  if kind == 1:
    files["copy_" + target.replace("/", "_")] = files[target]
    return f"double {target}", files
  if kind == 2:
    files["notes.txt"] = b"not a scan"
    return "add notes.txt", files
  if kind == 3:
    files["below/" + target.rsplit("/", 1)[-1]] = files[target]
    return f"copy {target} below", files
  if kind == 4:
    return f"remove content of {target}", files | {target: b""}
  other = names[int(rng.integers(len(names)))]
  return f"put {other} for {target}", files | {target: files[other]}


def write_case(case: Case, folder: str | os.PathLike[str]) -> str:
  """Writes a case below a folder and returns the path to read."""
  folder = pathlib.Path(folder)
  for name, content in case.files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return str(folder if case.folder else folder / next(iter(case.files)))


@functools.cache
def _sound_voxels(name: str) -> np.ndarray:
  seed = load_seed(name)
  with tempfile.TemporaryDirectory() as folder:
    path = write_case(Case("sound", dict(seed.files), seed.folder), folder)
    return data.read(path, max_voxels=MAX_VOXELS, **seed.options).volume


def judge(name: str, number: int, folder: str) -> Outcome:
  """Reads one mutation in this process and says what came of it."""
  case, options = make_case(name, number), load_seed(name).options
  sound = _sound_voxels(name)
  path = write_case(case, os.path.join(folder, "case"))
  before = sorted(os.listdir(folder))
  held = {pid: _memory_mib("VmRSS", pid) for pid in _family()}
  for pid in held:
    _reset_peak(pid)
  started = _cpu_s()
  record, kind, detail = None, "record", ""
  try:
    record = data.read(path, max_voxels=MAX_VOXELS, max_bytes=MAX_BYTES, **options)
  except data.ReadError as error:
    kind, detail = error.reason, error.detail
  except OutOfTime:
    kind = "DEFECT hang"
  except BaseException as error:
    kind, detail = f"DEFECT {type(error).__name__}", str(error)
  seconds = _cpu_s() - started
  # A helper process that began meanwhile counts whole, its libraries with it.
  peak, *helpers = [
      _memory_mib("VmHWM", pid) - held.get(pid, 0.0) for pid in _family()
  ]
  helper = max(helpers, default=0.0)
  if isinstance(record, data.Record):
    kind, detail = _check_record(record, sound, case, path, name)
  elif kind == "record":
    kind = f"DEFECT {type(record).__name__} for a Record"
  if not kind.startswith("DEFECT"):
    if peak > PEAK_MIB or helper > HELPER_MIB:
      found = f"{peak:.0f} and {helper:.0f} MiB; {kind} {detail}"
      kind, detail = "DEFECT memory", found
    elif seconds > SLOW_S:
      kind, detail = "DEFECT slow", f"{seconds:.1f} s; {kind} {detail}"
    elif sorted(os.listdir(folder)) != before:
      kind, detail = "DEFECT wrote outside", str(os.listdir(folder))
  return Outcome(
      name, number, case.label, kind, detail[:300], seconds, peak, helper
  )


def _check_record(record, sound, case, path, name) -> tuple[str, str]:
  volume = record.volume
  if volume.ndim != 5 or volume.dtype.name not in DTYPES or volume.size > MAX_VOXELS:
    return "DEFECT shape", f"{volume.dtype} {volume.shape}"
  if not np.isfinite(volume).all():
    return "DEFECT not finite", ""
  same = volume.shape == sound.shape and np.array_equal(volume, sound)
  if same:
    return "record", ""
  if case.label.startswith(("truncate", "remove")) and " + " not in case.label:
    if case.label.startswith("remove ") and _tells_what_is_left(record, sound):
      return "record", ""
    return "DEFECT filled", f"{case.label}: {volume.shape}"
  try:
    wanted = libraries.read(name, path)
  except OutOfTime:
    raise
  except BaseException as error:
    if not volume.any():
      return "DEFECT zeros", "and its library refuses it"
    return "record alone", f"{type(error).__name__}: {error}"
  if wanted is None:
    fine = volume.any() or case.label == "all zero bytes"
    return ("record", "") if fine else ("DEFECT zeros", "")
  if libraries.same_voxels(volume, wanted):
    return "record", ""
  if name in _NO_CHECK:
    return "record disputed", ""
  shapes = f"{volume.dtype} {volume.shape}, {wanted.dtype} {wanted.shape}"
  return "DEFECT differs", shapes


def _tells_what_is_left(record: data.Record, sound: np.ndarray) -> bool:
  """Whether a folder that lost a file gives the rest of it, or says what is absent.

  That a last slice is gone no one can know.
  """
  if record.meta.get("pieces_absent"):
    return True
  axis = 0 if record.volume.shape[0] < sound.shape[0] else 1
  return any(
      np.array_equal(record.volume, np.delete(sound, place, axis))
      for place in range(sound.shape[axis])
  )


def _family() -> list[int]:
  """This process and the helpers that it keeps."""
  found = [os.getpid()]
  for task in os.listdir("/proc/self/task"):
    with contextlib.suppress(OSError):  # A thread that has ended.
      with open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
        found += map(int, file.read().split())
  return found


def _memory_mib(field: str, pid: int) -> float:
  try:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
      lines = [line for line in file if line.startswith(field)]
  except OSError:
    return 0.0  # Gone by now.
  return int(lines[0].split()[1]) / 1024 if lines else 0.0


def _cpu_s() -> float:
  """CPU seconds of this process, of its helpers and of those that have ended."""
  times = os.times()
  ticks = 0
  for pid in _family()[1:]:
    try:
      with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        ticks += sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
    except OSError:
      continue
  return sum(times[:4]) + ticks / os.sysconf("SC_CLK_TCK")


def _reset_peak(pid: int) -> None:
  with open(f"/proc/{pid}/clear_refs", "w", encoding="ascii") as file:
    file.write("5")


def work(folder: str) -> None:
  """Reads "name number" lines, answers each with an Outcome as JSON."""
  answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
  # What the C libraries print goes nowhere.
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  libraries.load()
  cap = int((_memory_mib("VmSize", os.getpid()) + CAP_MIB) * 2**20)
  resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

  def ring(*_):
    raise OutOfTime

  signal.signal(signal.SIGALRM, ring)
  answers.write("ready\n")
  answers.flush()
  for line in sys.stdin:
    name, number = line.split()
    place = os.path.join(folder, "now")
    os.makedirs(place)
    signal.alarm(ALARM_S)
    try:
      outcome = judge(name, int(number), place)
    except OutOfTime:
      outcome = Outcome(name, int(number), "", "DEFECT hang", "beside the reader")
    signal.alarm(0)
    shutil.rmtree(place)
    answers.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
    answers.flush()


class _Worker:
  """A process that judges one mutation at a time and may die of it."""

  def __init__(self):
    self._process = None

  def judge(self, name: str, number: int) -> Outcome:
    if self._process is None:
      self._start()
    print(name, number, file=self._process.stdin, flush=True)
    line = self._line(KILL_S)
    if line:
      return Outcome(**json.loads(line))
    code = self._process.poll()
    died = code is not None or line == ""
    if died:
      self._process.wait()
      code = self._process.returncode
    trace = pathlib.Path(self._folder, "stderr").read_text(errors="replace")
    self.close()
    kind = f"DEFECT died {signal.Signals(-code).name}" if died and code < 0 else (
        f"DEFECT died {code}" if died else "DEFECT hang, killed"
    )
    case = make_case(name, number)
    return Outcome(name, number, case.label, kind, trace[-900:])

  def close(self) -> None:
    if self._process is not None:
      self._process.kill()
      self._process.wait()
      shutil.rmtree(self._folder)
      self._process = None

  def _start(self) -> None:
    self._folder = tempfile.mkdtemp()
    limits = {
        n: "1" for n in (
            "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
            "TIFFFILE_NUM_THREADS", "MALLOC_ARENA_MAX",
        )
    }
    with open(os.path.join(self._folder, "stderr"), "wb") as trace:
      self._process = subprocess.Popen(
          [sys.executable, "-X", "faulthandler", "-c",
           f"from tests.data import mutations; mutations.work({self._folder!r})"],
          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=trace, text=True,
          env=os.environ | limits, cwd=pathlib.Path(__file__).parents[2],
      )
    if self._line(KILL_S) != "ready\n":
      trace = pathlib.Path(self._folder, "stderr").read_text(errors="replace")
      self.close()
      raise RuntimeError(f"a mutation worker did not start:\n{trace}")

  def _line(self, seconds: float) -> str | None:
    """The next line, "" at its end, or None where none comes in time."""
    ready, _, _ = select.select([self._process.stdout], [], [], seconds)
    return self._process.stdout.readline() if ready else None


def run(
    cases: Sequence[tuple[str, int]], *, workers: int = 2
) -> Iterator[Outcome]:
  """Yields the outcome of each (format, number), as they come."""
  waiting: queue.SimpleQueue = queue.SimpleQueue()
  done: queue.SimpleQueue = queue.SimpleQueue()
  for case in cases:
    waiting.put(case)

  def drain():
    worker = _Worker()
    try:
      while True:
        done.put(worker.judge(*waiting.get_nowait()))
    except queue.Empty:
      pass
    except Exception as error:  # Handed over: a thread's own is lost.
      done.put(error)
    finally:
      worker.close()

  threads = [threading.Thread(target=drain, daemon=True) for _ in range(workers)]
  for thread in threads:
    thread.start()
  for _ in cases:
    outcome = done.get()
    if isinstance(outcome, Exception):
      raise outcome
    yield outcome
  for thread in threads:
    thread.join()


def plan(names: Sequence[str], count: int, seed: int) -> list[tuple[str, int]]:
  """Deals `count` numbers out evenly to the formats."""
  return [
      (names[i % len(names)], seed * NUMBERS_A_SEED + i // len(names))
      for i in range(count)
  ]


def table(outcomes: Sequence[Outcome]) -> str:
  """Returns the counts by format and outcome, then the reasons, then the defects."""
  lines = [
      f"{'format':<18}{'files':>6}{'record':>8}{'alone':>7}{'disputed':>10}"
      f"{'refused':>9}{'defect':>8}"
      f"{'peak MiB':>10}{'helper MiB':>12}{'slowest s':>11}"
  ]
  by_name: dict[str, list[Outcome]] = {}
  for outcome in outcomes:
    by_name.setdefault(outcome.name, []).append(outcome)
  for name, group in [*sorted(by_name.items()), ("all", list(outcomes))]:
    kinds = [o.kind for o in group]
    defects = sum(k.startswith("DEFECT") for k in kinds)
    read = [kinds.count(k) for k in ("record", "record alone", "record disputed")]
    lines.append(
        f"{name:<18}{len(group):>6}{read[0]:>8}{read[1]:>7}{read[2]:>10}"
        f"{len(group) - defects - sum(read):>9}{defects:>8}"
        f"{max(o.peak_mib for o in group):>10.0f}"
        f"{max(o.helper_mib for o in group):>12.0f}"
        f"{max(o.seconds for o in group):>11.2f}"
    )
  reasons = Counter(o.kind for o in outcomes)
  lines += ["", *(f"{count:>6}  {kind}" for kind, count in reasons.most_common())]
  lines += [
      f"{o.name}:{o.number}  {o.kind}  [{o.label}]  {o.detail}"
      for o in sorted(outcomes, key=lambda o: (o.name, o.kind, o.number))
      if o.kind.startswith("DEFECT")
  ]
  return "\n".join(lines)


def usable() -> list[str]:
  """Returns the formats whose seed a reader takes; the others have none yet."""
  names = []
  for name in seeds.SEEDS:
    try:
      _sound_voxels(name)
    except data.ReadError as error:
      print(f"left out: {error}", file=sys.stderr)
    else:
      names.append(name)
  return names


def main(argv: Sequence[str]) -> None:
  """Runs the mutations and prints the table; exits 1 where there is a defect."""
  values = flags.FLAGS
  only = [part.split(":") for part in values.only]
  names = [part[0] for part in only if len(part) == 1] or usable()
  cases = [(part[0], int(part[1])) for part in only if len(part) == 2]
  for name, number in cases if values.save else ():
    print(write_case(make_case(name, number), os.path.join(
        values.save, f"{name}_{number}")))
  outcomes = []
  for outcome in run(cases or plan(names, values.count, values.seed),
                     workers=values.workers):
    outcomes.append(outcome)
    if cases or values.verbose:
      print(outcome, flush=True)
  print(table(outcomes))
  if any(o.kind.startswith("DEFECT") for o in outcomes):
    sys.exit(1)


if __name__ == "__main__":
  flags.DEFINE_integer("count", 1000, "Mutations, over all formats.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Another thousand.", lower_bound=0)
  flags.DEFINE_list("only", [], "Formats, or FORMAT:NUMBER to run one again.")
  flags.DEFINE_string("save", "", "Folder to write the files of --only to.")
  flags.DEFINE_integer("workers", 2, "Processes.", lower_bound=1)
  flags.DEFINE_bool("verbose", False, "Print each outcome.")
  app.run(main)
