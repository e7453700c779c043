"""From cut patches to token vectors."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.nn import placement
from vjepa_jax.nn.attention import INITIALIZERS


class PatchEmbed(nn.Module):
  """One Dense over the voxels of each patch.

  The volume is cut by `Grid.patchify` before, so that a masked encoder embeds
  only the patches it keeps; together they equal a convolution whose stride is
  its kernel.

  Attributes:
    width: D.
    dtype: compute type.
    initializer: a name in INITIALIZERS.
  """

  width: int
  dtype: str = "float32"
  initializer: str = "vjepa"

  @nn.compact
  def __call__(self, patches: jax.Array) -> jax.Array:
    """Embeds patches [B, N, pt*pz*py*px*C] into [B, N, D].

    Raises:
      ValueError: if the patches are not [B, N, P].
    """
    if patches.ndim != 3:
      raise ValueError(
          f"PatchEmbed: patches have shape {tuple(patches.shape)}, it wants "
          "[B, N, P]; cut a volume by Grid.patchify first"
      )
    return nn.Dense(
        self.width, dtype=jnp.dtype(self.dtype),
        kernel_init=INITIALIZERS[self.initializer], name="proj",
        promote_dtype=placement.promote,
    )(patches)
