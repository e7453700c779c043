"""TPU slices that need not be there: names, chips, hosts, devices to compile for."""

from collections.abc import Mapping
import dataclasses
import difflib
import importlib.util
import math
import os
from typing import Any

from vjepa_jax.compiler import chips

# Slices that can be had: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. Beside those of
# three axes, v4 and v5p come in any A <= B <= C of multiples of 4.
_SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_CUBES = ("4x4x4", "4x4x8", "4x4x12", "4x4x16", "4x8x8", "8x8x8", "8x8x12", "8x8x16")
_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SHAPES = {
    "v4": _SMALL_CUBES + _CUBES, "v5p": _SMALL_CUBES + _CUBES,
    "v5e": _PLANES, "v6e": _PLANES,
}
_CORES = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}
_ACCELERATORS = {"v4": "v4", "v5p": "v5p", "v5e": "v5litepod", "v6e": "v6e"}
_MOST_CHIPS = {"v4": 4096, "v5p": 8960}


class TopologyError(ValueError):
  """A slice that does not exist, or that cannot be compiled for here."""


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice of TPU chips.

  Attributes:
    name: "v4:2x2x4".
    chip: what each of them can do.
    shape: chips along each axis.
    host_shape: chips of one host along each axis.
  """

  name: str
  chip: chips.Chip
  shape: tuple[int, ...]
  host_shape: tuple[int, ...]

  @property
  def chips(self) -> int:
    """How many chips."""
    return math.prod(self.shape)

  @property
  def hosts(self) -> int:
    """How many hosts."""
    return self.chips // math.prod(self.host_shape)

  @property
  def accelerator(self) -> str:
    """The accelerator type, such as v4-32, which counts cores."""
    cores = self.chips * _CORES[self.chip.name]
    return f"{_ACCELERATORS[self.chip.name]}-{cores}"

  def devices(self) -> list[Any]:
    """Returns one device a chip, to compile for; nothing can run on them.

    Sets what libtpu reads from the environment, so that it looks for no TPU.

    Raises:
      TopologyError: if libtpu is not installed, or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
      raise TopologyError(
          "libtpu, the TPU compiler, is not installed; it needs no TPU: "
          'pip install "vjepa_jax[precompile]"'
      )
    os.environ.update(environment(self))
    import jax
    from jax.experimental import topologies

    # One device for both cores of a chip, as jax shows a real v4 or v5p.
    merged = {"chip_config_name": "megacore"} if _CORES[self.chip.name] == 2 else {}
    bounds = (*self.host_shape, 1, 1)[:3]
    try:
      found = topologies.get_topology_desc(
          platform="tpu", topology_name=self.name, chips_per_host_bounds=bounds,
          **merged,
      ).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
      raise TopologyError(f"libtpu refuses topology {self.name!r}: {error}") from error
    if len(found) != self.chips:
      raise TopologyError(
          f"libtpu shows {len(found)} devices for {self.name!r}, which has "
          f"{self.chips} chips; this version of it is not supported"
      )
    return list(found)


def describe(name: str) -> Topology:
  """Returns the slice of a name such as "v4:2x2x4" (16 chips, 4 hosts).

  Raises:
    TopologyError: for a slice that does not exist; names the closest that do.
  """
  generation, _, text = name.partition(":")
  known = [f"{g}:{shape}" for g, shapes in _SHAPES.items() for shape in shapes]
  if name not in known and not _is_large_cube(generation, text):
    raise TopologyError(
        f"there is no topology {name!r}; closest: {', '.join(_closest(name, known))}"
    )
  shape = tuple(int(size) for size in text.split("x"))
  host = (2, 2, 1)[: len(shape)]
  if math.prod(shape) == 1:
    host = (1,) * len(shape)
  elif shape == (2, 4):  # Its eight chips can be had on one host.
    host = shape
  return Topology(name, chips.TPUS[generation], shape, host)


def environment(topology: Topology) -> Mapping[str, str]:
  """Returns what libtpu must find in the environment to compile without a TPU."""
  return {
      "TPU_SKIP_MDS_QUERY": "1",  # No metadata server to be asked who we are.
      "TPU_ACCELERATOR_TYPE": topology.accelerator,
      "TPU_WORKER_HOSTNAMES": "localhost",
      # Its lock file guards chips, of which there are none.
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }


def _is_large_cube(generation: str, text: str) -> bool:
  sizes = text.split("x")
  if generation not in _MOST_CHIPS or not all(size.isdecimal() for size in sizes):
    return False
  shape = [int(size) for size in sizes]
  return (
      len(shape) == 3 and shape == sorted(shape) and shape[0] > 0
      and not any(size % 4 for size in shape)
      and math.prod(shape) <= _MOST_CHIPS[generation]
  )


def _closest(name: str, known: list[str]) -> list[str]:
  """Returns the accelerator type's own slice, or the names that look most alike."""
  typed = {}
  for candidate in known:
    typed.setdefault(describe(candidate).accelerator, candidate)
  if name in typed:
    return [typed[name]]
  generation, _, shape = name.partition(":")
  own = [one for one in known if one.startswith(f"{generation}:")]
  if own and not shape:
    return own[:3]
  return difflib.get_close_matches(name, own or known, n=3, cutoff=0.0)
