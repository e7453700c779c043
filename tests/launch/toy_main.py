"""Stands where vjepa_jax.main stands: steps, a checkpoint, SIGTERM, exit codes.

Flags: --workdir, --worker, --steps, --codes=A,B (of each attempt in turn; the last for
all further ones), --cry=TEXT before a code that is not 0, --say=TEXT at the start.
"""

import os
import pathlib
import signal
import sys
import time


def _write(path: pathlib.Path, number: int) -> None:
  """Writes `number` whole or not at all, so that a reader never sees half of it."""
  half = path.with_name(f".{path.name}")
  half.write_text(str(number))
  os.replace(half, path)


def main() -> None:
  flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
  worker, total = flags.get("worker", "0"), int(flags.get("steps", "5"))
  folder = pathlib.Path(flags["workdir"])
  folder.mkdir(parents=True, exist_ok=True)
  saved, attempts = folder / f"step-{worker}", folder / f"attempts-{worker}"
  step = int(saved.read_text()) if saved.exists() else 0
  attempt = int(attempts.read_text()) if attempts.exists() else 0
  _write(attempts, attempt + 1)
  codes = [int(code) for code in flags.get("codes", "0").split(",")]
  code = codes[min(attempt, len(codes) - 1)]

  def leave(number: int, unused_frame: object) -> None:
    _write(saved, step)
    print(f"step {step}: saved after signal {number}", flush=True)
    sys.exit(128 + number)

  signal.signal(signal.SIGTERM, leave)
  print(flags.get("say", "begins"), f"at step {step}", flush=True)
  while step < total:
    time.sleep(0.02)
    step += 1
    print(f"step {step}/{total}  loss 1.0", flush=True)
    if step % 5 == 0:
      _write(saved, step)
  if code:
    _write(saved, max(0, step - 2))
    print(flags.get("cry", "fails"), file=sys.stderr)
  sys.exit(code)


if __name__ == "__main__":
  main()
