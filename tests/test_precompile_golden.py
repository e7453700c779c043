"""The full configs keep their bytes and their estimated time, by the compiler's word.

UPDATE_GOLDEN=1 python -m pytest tests/test_precompile_golden.py

rewrites tests/golden/precompile, after a change that means to move them, or that left
them within the tolerance: what is compiled is then known, and need not be again.
"""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "precompile"
TOPOLOGY = "v4:2x2x4"
# name of the golden file -> FILE:ARG; a later system adds its own full configs.
CONFIGS = {
    "oct_multi_B": "configs/oct_multi.py",
    "oct_multi_L": "configs/oct_multi.py:L",
    "oct_multi_H": "configs/oct_multi.py:H",
    "worm_mae_small": "configs/worm_mae.py",
}
# Settings of the machine or of other tests.
_UNMEANT = ("TPU", "LIBTPU", "XLA", "JAX")
KEPT = ("peak_gib_per_chip", "step_ms_bound")
TOLERANCE = 0.03
# Also written, to be read by people; they follow from the two above.
TOLD = (
    "fingerprint", "config", "topology", "batch_per_chip", "temp_gib", "argument_gib",
    "non_kernel_ms", "kernel_ms", "mfu_bound", "model_tflop_per_step",
    "collective_bytes", "versions", "label",
)


def precompile(config, *flags):
  done = subprocess.run(
      [
          sys.executable, "-m", "vjepa_jax.precompile", f"--config={config}",
          f"--topology={TOPOLOGY}", *flags,
      ],
      cwd=ROOT, capture_output=True, text=True,
      env={k: v for k, v in os.environ.items() if not k.startswith(_UNMEANT)},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def found_by(config, golden):
  """Returns what the compiler says, which is known where nothing that decides it moved."""
  digest = precompile(config, "--fingerprint").strip()
  if not os.environ.get("UPDATE_GOLDEN") and digest == golden.get("fingerprint"):
    return golden | {"unknown_kernels": [], "unknown_loops": []}
  found = json.loads(precompile(config, "--json", "--max_batch=false"))
  return found | {"fingerprint": digest}


def golden_of(name):
  path = GOLDEN / f"{name}.json"
  return json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(scope="module")
def results():
  # Two at a time: one compilation keeps about one core busy.
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    yield {
        name: pool.submit(found_by, config, golden_of(name))
        for name, config in CONFIGS.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_full_config_keeps_its_bytes_and_its_time(results, name):
  found, path = results[name].result(), GOLDEN / f"{name}.json"
  assert not found["unknown_kernels"] and not found["unknown_loops"]
  if os.environ.get("UPDATE_GOLDEN"):
    kept = {key: found[key] for key in (*KEPT, *TOLD)}
    path.write_text(json.dumps(kept, indent=2) + "\n")
  golden = golden_of(name)
  assert found["versions"]["libtpu"] == golden["versions"]["libtpu"], (
      "another compiler estimates otherwise; install the one that setup.py pins"
  )
  moved = "{} has moved; where that is meant, UPDATE_GOLDEN=1 rewrites " + path.name
  for key in KEPT:
    assert found[key] == pytest.approx(golden[key], rel=TOLERANCE), moved.format(key)
  # One array that is gathered by mistake costs more than all that belongs there.
  sent = [one["collective_bytes"]["total"] for one in (found, golden)]
  assert sent[0] == pytest.approx(sent[1], rel=TOLERANCE), moved.format("collective_bytes")
