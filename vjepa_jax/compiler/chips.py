"""Accelerators: what they can do at most, by the name that jax gives them."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator, as its vendor describes it.

  Attributes:
    name: "v4", "h200", ...
    bf16_flops: dense bfloat16 floating point operations a second.
    hbm_bandwidth: bytes a second.
    hbm_bytes: what a program may use; None: ask the device.
    clock_hz: of a TPU's cores; None elsewhere.
    mxu_width: rows and columns of a TPU's matrix unit; None elsewhere.
    link_bandwidth: bytes a second over all links between chips, one way; None:
      not known.
  """

  name: str
  bf16_flops: float
  hbm_bandwidth: float
  hbm_bytes: int | None = None
  clock_hz: float | None = None
  mxu_width: int | None = None
  link_bandwidth: float | None = None


# Peaks and links: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. Usable bytes: what
# libtpu's compiler names in its refusals. Clocks follow from peak / (2 x width^2 x
# units), and give a 1 GiB copy and a 16,384^3 product 0.72-0.81 and 0.78-0.94 of
# what the vendor states; see tests/compiler/test_topology.py.
TPUS = {
    "v4": Chip(
        "v4", 275e12, 1.228e12, int(30.75 * GIB), 1.05e9, 128, 0.3e12,
    ),
    "v5e": Chip(
        "v5e", 197e12, 0.819e12, int(15.75 * GIB), 1.5e9, 128, 0.2e12,
    ),
    "v5p": Chip(
        "v5p", 459e12, 2.765e12, int(95.73 * GIB), 1.75e9, 128, 0.6e12,
    ),
    "v6e": Chip(
        "v6e", 918e12, 1.640e12, int(31.24 * GIB), 1.75e9, 256, 0.448e12,
    ),
}
# Without sparsity; nvidia.com data sheets.
GPUS = {
    "h200": Chip("h200", 989e12, 4.8e12),
    "h100-pcie": Chip("h100-pcie", 756e12, 2.0e12),
    "h100": Chip("h100", 989e12, 3.35e12),
    "a100": Chip("a100", 312e12, 2.0e12),
}
_TPU_KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p",
    "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e",
}
# Words that must all stand in the name; the first row that fits decides.
_GPU_KINDS = (
    (("h200",), "h200"), (("h100", "pcie"), "h100-pcie"), (("h100",), "h100"),
    (("a100",), "a100"),
)


def of_kind(device_kind: str) -> Chip | None:
  """Returns the chip behind `jax.Device.device_kind`; None where it is unknown.

  A CPU is unknown on purpose: a share of its peak says nothing that is asked here.
  """
  if device_kind in _TPU_KINDS:
    return TPUS[_TPU_KINDS[device_kind]]
  kind = device_kind.lower()
  if "nvidia" not in kind:
    return None
  return next(
      (GPUS[name] for words, name in _GPU_KINDS if all(word in kind for word in words)),
      None,
  )
