"""Attention over the ambient mesh: rows, groups, queries where tokens are split."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from vjepa_jax.nn.placement import BATCH_AXES, SEQUENCE_AXIS

# (q, k, v, key_valid, offset) -> [B, H, Nq, d], on one device.
Local = Callable[..., jax.Array]


def attend(
    local: Local,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_valid: jax.Array | None,
    *,
    opaque: bool,
) -> jax.Array:
  """Runs `local` on each device's share of the queries, [B, H, Nq, d].

  Rows are split over those of the axes "data" and "fsdp" that divide them, and are
  the same everywhere along the others. Along the axis "sequence" each device keeps
  its own queries and sees the keys and values of all; tokens that the axis does not
  divide are padded, what is invented is unseen and cut.

  Args:
    local: (q, k, v, key_valid, offset) -> output; query i sees, if causal, keys up
      to i + offset.
    q: [B, H, Nq, d].
    k: [B, H, Nk, d].
    v: [B, H, Nk, d].
    key_valid: bool [B, Nk] or None.
    opaque: whether the compiler cannot split `local` by itself; then also rows are
      mapped by hand.
  """
  offset = k.shape[2] - q.shape[2]
  mesh = jax.sharding.get_abstract_mesh()
  shares = mesh.shape.get(SEQUENCE_AXIS, 1)
  # Within someone else's shard_map the arrays are a device's own already.
  alone = mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types
  if alone or (shares == 1 and not opaque):
    return local(q, k, v, key_valid, offset)

  rows = _dividing_axes(q.shape[0], mesh) or None
  tokens = SEQUENCE_AXIS if shares > 1 else None
  queries = q.shape[2]
  if shares > 1:
    q, k, v, key_valid = _padded(q, k, v, key_valid, shares)
  wide, mask = PartitionSpec(rows, None, tokens), PartitionSpec(rows, tokens)

  def one_share(q, k, v, key_valid):
    own = offset
    if shares > 1:
      k, v = (jax.lax.all_gather(x, SEQUENCE_AXIS, axis=2, tiled=True) for x in (k, v))
      if key_valid is not None:
        key_valid = jax.lax.all_gather(key_valid, SEQUENCE_AXIS, axis=1, tiled=True)
      own = offset + jax.lax.axis_index(SEQUENCE_AXIS) * q.shape[2]
    return local(q, k, v, key_valid, own)

  # Kernels do not say over which axes their results vary.
  out = jax.shard_map(
      one_share, in_specs=(wide, wide, wide, mask), out_specs=wide, check_vma=False
  )(q, k, v, key_valid)
  return out[:, :, :queries]


def attend_within(
    local: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    opaque: bool,
) -> jax.Array:
  """Runs `local` on each device's share of the groups, [B, G, H, N, d].

  Rows are split as in `attend`, groups over "sequence" where it divides them; no
  group is ever cut, so that nothing is sent.

  Args:
    local: (q, k, v) -> output, all [B, G, H, N, d], on one device.
    q, k, v: [B, G, H, N, d].
    opaque: as in `attend`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  shares = mesh.shape.get(SEQUENCE_AXIS, 1)
  alone = mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types
  if alone or (shares == 1 and not opaque):
    return local(q, k, v)
  # Mapped by hand even where the compiler could: it cannot join rows and groups
  # that are both split without sending them around.
  groups = SEQUENCE_AXIS if shares > 1 and q.shape[1] % shares == 0 else None
  spec = PartitionSpec(_dividing_axes(q.shape[0], mesh) or None, groups)
  return jax.shard_map(
      local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
  )(q, k, v)


def _dividing_axes(rows: int, mesh) -> tuple[str, ...]:
  """Those of the batch axes, in order, whose product divides the rows."""
  axes, taken = [], 1
  for axis in BATCH_AXES:
    size = mesh.shape.get(axis, 1)
    if size > 1 and rows % (taken * size) == 0:
      axes.append(axis)
      taken *= size
  return tuple(axes)


def _padded(q, k, v, key_valid, shares):
  """Makes `shares` divide the tokens; what is invented is unseen."""
  pad_q, pad_k = -q.shape[2] % shares, -k.shape[2] % shares
  if pad_k:
    if key_valid is None:
      key_valid = jnp.ones((k.shape[0], k.shape[2]), bool)
    key_valid = jnp.pad(key_valid, ((0, 0), (0, pad_k)))
  widen = lambda x, pad: jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0)))
  return widen(q, pad_q), widen(k, pad_k), widen(v, pad_k), key_valid
