"""Host operations on Records, each by its name.

`OPS[name](**options)` makes an op, and `op(record, rng)` returns a Record; random ones
draw from `rng` alone. In a config they are dicts: {"name": "spacing", "spacing_mm":
(1, 1, 1)}. Heavy augmentation runs on the device.
"""

from vjepa_jax.data.ops.catalog import OPS, op_faults
from vjepa_jax.data.ops.intensity import percentiles, scale_range
from vjepa_jax.data.ops.kernels import scale_to_uint8
from vjepa_jax.data.ops.resample import (
    DTYPES,
    MAX_VOXELS,
    POLICIES,
    check_options,
    resample,
)

__all__ = [
    "DTYPES", "MAX_VOXELS", "OPS", "POLICIES", "check_options", "op_faults",
    "percentiles", "resample", "scale_range", "scale_to_uint8",
]
