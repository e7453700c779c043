"""Where compiled programs outlive the process, so that a restart need not compile."""

from collections.abc import Callable
import os
import pathlib
import warnings

import jax
from jax.experimental.compilation_cache import compilation_cache

# `auto`: below VJEPA_JAX_CACHE, else ~/.cache/vjepa_jax.
_AUTO = "auto"
_FOLDER = "compiled"
# A restart waits for many small programs too; jax keeps those above a second.
_MIN_SECONDS = 0.1
_MAX_BYTES = 10 << 30


def keep_programs(folder: str | None, say: Callable[[str], None] = print) -> str | None:
  """Keeps what is compiled from now on, and looks there first.

  No trouble with the folder ends a run: what cannot be read is compiled again, what
  cannot be written is not kept.

  Args:
    folder: local or `gs://`; "auto" is `compiled` below VJEPA_JAX_CACHE, else below
      ~/.cache/vjepa_jax, where 10 GiB stay; None or "" changes nothing. What the
      user gave to jax itself (JAX_COMPILATION_CACHE_DIR) goes first.
    say: gets a line when nothing can be kept.

  Returns:
    The folder in use; None where there is none.
  """
  given = jax.config.jax_compilation_cache_dir
  if not folder or given:
    return given
  if folder == _AUTO:
    home = os.environ.get("VJEPA_JAX_CACHE", "~/.cache/vjepa_jax")
    folder = str(pathlib.Path(home).expanduser() / _FOLDER)
    _make_room(pathlib.Path(folder))
  if "://" not in folder and not _usable(pathlib.Path(folder), say):
    return None
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
  jax.config.update("jax_compilation_cache_dir", folder)
  # It looks at its folder once, at the first program: that may have been before.
  compilation_cache.reset_cache()
  return folder


def _usable(folder: pathlib.Path, say: Callable[[str], None]) -> bool:
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    say(f"{folder}: compiled programs are not kept: {error}")
    return False
  if not os.access(folder, os.W_OK):
    say(f"{folder}: not writable; only the compiled programs there are used")
    # One a program otherwise.
    warnings.filterwarnings("ignore", message="Error writing persistent compilation")
  return True


def _make_room(folder: pathlib.Path) -> None:
  """Removes the oldest programs beyond the bound."""
  try:
    found = [(path.stat().st_mtime, path) for path in folder.glob("*-cache")]
    total = 0
    for _, path in sorted(found, reverse=True):
      total += path.stat().st_size
      if total > _MAX_BYTES:
        path.unlink()
  except OSError:  # Another process was quicker, or may not.
    pass
