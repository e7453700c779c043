"""Slices that exist, slices that do not."""

import sys

import pytest

from vjepa_jax.compiler import topology

NAMES = [
    ("v4:2x2x4", 16, 4, "v4-32"), ("v4:2x2x1", 4, 1, "v4-8"),
    ("v5p:4x4x8", 128, 32, "v5p-256"), ("v5e:4x4", 16, 4, "v5litepod-16"),
    ("v5e:1x1", 1, 1, "v5litepod-1"), ("v6e:2x4", 8, 1, "v6e-8"),
    ("v6e:16x16", 256, 64, "v6e-256"), ("v4:8x12x16", 1536, 384, "v4-3072"),
]


@pytest.mark.parametrize("name,chips,hosts,accelerator", NAMES)
def test_a_slice_has_chips_hosts_and_a_type(name, chips, hosts, accelerator):
  found = topology.describe(name)
  assert (found.chips, found.hosts, found.accelerator) == (chips, hosts, accelerator)
  assert topology.environment(found)["TPU_ACCELERATOR_TYPE"] == accelerator


@pytest.mark.parametrize("name,closest", [
    ("v4:2x2x5", "v4:2x2x4"), ("v4-32", "v4:2x2x4"), ("v5litepod-16", "v5e:4x4"),
    ("v5e:4x4x4", "v5e:4x4"), ("v9:4x4", "v6e:4x4"), ("v4:4x8x6", "v4:4x8x8"),
    ("", "v"), ("v4", "v4:2x2x1"), ("v4:axbxc", "v4:"), ("v4:-4x4x4", "v4:4x4x4"),
    ("v4:16x16x32", "v4:"),
])
def test_a_slice_that_does_not_exist_is_refused_with_the_closest(name, closest):
  with pytest.raises(topology.TopologyError, match="there is no topology") as error:
    topology.describe(name)
  assert closest in str(error.value).partition("closest")[2]


def test_a_missing_compiler_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)  # As where it is not installed.
  with pytest.raises(topology.TopologyError, match=r"vjepa_jax\[precompile\]"):
    topology.describe("v4:2x2x4").devices()


@pytest.mark.parametrize("name,chips,hosts,accelerator", NAMES)
def test_the_compiler_knows_the_slice_as_we_do(name, chips, hosts, accelerator):
  devices = topology.describe(name).devices()
  assert len(devices) == chips
  assert len({device.process_index for device in devices}) == hosts
