"""The table of chips, by the names that jax gives them."""

import pytest

from vjepa_jax.compiler import chips


@pytest.mark.parametrize("kind,name", [
    ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"),
    ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA A100-SXM4-40GB", "a100"),
])
def test_a_device_is_known_by_its_kind(kind, name):
  assert chips.of_kind(kind).name == name


@pytest.mark.parametrize("kind", ["cpu", "TPU v99", "NVIDIA GeForce GTX 970", ""])
def test_an_unknown_device_has_no_peak(kind):
  assert chips.of_kind(kind) is None


def test_a_tpus_peak_is_its_clock_times_whole_matrix_units():
  for chip in chips.TPUS.values():
    units = chip.bf16_flops / (chip.clock_hz * 2 * chip.mxu_width**2)
    assert units == pytest.approx(round(units), rel=0.01), chip.name
