"""What log lines say about the chip, and which steps a trace holds."""

import gzip
import json
import re
import time

import jax
import pytest
import toy

from vjepa_jax.compiler import chips
from vjepa_jax.train import metrics, watch

CHIP = chips.Chip("pretended", bf16_flops=1e9, hbm_bandwidth=1e9)


def wait_for(mfu, seconds=20.0):
  deadline = time.monotonic() + seconds
  while (value := mfu(0.5)) is None and time.monotonic() < deadline:
    time.sleep(0.01)
  return value


def test_mfu_is_the_models_operations_over_the_peak_of_all_chips():
  devices = jax.devices()[:1] * 4
  mfu = watch.Mfu(lambda: 5e7, batch_size=8, devices=devices, chip=CHIP)
  # 8 volumes of 5e7 operations in half a second, on four chips of 1e9 a second.
  assert wait_for(mfu) == pytest.approx(8 * 5e7 / 0.5 / 4e9)


def test_on_a_cpu_nothing_is_counted():
  counted = []
  mfu = watch.Mfu(
      lambda: counted.append(1) or 5e7, batch_size=8, devices=jax.devices()
  )
  time.sleep(0.1)
  assert mfu(0.5) is None and not counted


def test_a_log_line_holds_mfu_where_the_chip_is_known_only(tmp_path, monkeypatch):
  kind = jax.devices()[0].device_kind
  run = lambda name: toy.run(
      tmp_path / name, total_steps=6, validate=False, flops_per_volume=lambda: 1e6
  )
  run("unknown")
  monkeypatch.setitem(chips._TPU_KINDS, kind, "v4")
  run("known")
  lines = {
      name: [x for x in metrics.read(tmp_path / name) if "loss" in x]
      for name in ("unknown", "known")
  }
  assert all("mfu" not in line for line in lines["unknown"])
  last = lines["known"][-1]
  chip = chips.TPUS["v4"].bf16_flops * jax.device_count()
  assert last["mfu"] == pytest.approx(16e6 / (last["step_ms"] / 1e3) / chip)
  assert last["volumes_per_s"] == pytest.approx(16e3 / last["step_ms"])


@pytest.mark.parametrize(
    "text, span", [("100:105", (100, 5)), ("0:1", (0, 1)), ("3", (watch.SOON, 3))]
)
def test_steps_to_trace_are_read(text, span):
  assert watch.profile_span(text) == span


@pytest.mark.parametrize("text", ["", "a", "5:5", "7:3", "0", "-3", "1:2:3", ":4"])
def test_what_names_no_steps_is_refused(text):
  with pytest.raises(ValueError, match=re.escape(repr(text)) + ".*A:B with A < B"):
    watch.profile_span(text)


def test_a_trace_of_a_run_that_goes_on_holds_whole_steps(tmp_path):
  options = dict(checkpoint_every_steps=2, validate=False)
  toy.run(tmp_path, total_steps=2, **options)
  toy.run(
      tmp_path, total_steps=9, profile_from_step=watch.SOON, profile_steps=3, **options
  )
  (path,) = (tmp_path / "profile").rglob("*.trace.json.gz")
  events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
  calls = [e for e in events if re.search(r"PjitFunction\(step\)", e.get("name", ""))]
  assert len(calls) >= 3
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
