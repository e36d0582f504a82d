"""Mapped axes over which a batch is spread: `pmap`, `shard_map`, `vmap`."""

import warnings

import jax
import jax.numpy as jnp
from jax import lax

from dsatgo_jax import xla


def axis_size(axis_name) -> int:
  """How many devices a mapped axis, or axes, have; 1 for none."""
  return lax.axis_size(axis_name) if axis_name else 1


def gather(x: jax.Array, axis_name) -> jax.Array:
  """All devices' x, [devices, ...], in one all-reduce.

  Written as a sum, since `shard_map` knows a sum's result to be the same on
  all devices.
  """
  num_devices = lax.axis_size(axis_name)
  mine = jnp.arange(num_devices) == lax.axis_index(axis_name)
  mine = jnp.expand_dims(mine, range(1, x.ndim + 1))
  return lax.psum(jnp.where(mine, x, 0), axis_name)


def warn_if_not_pooled(axis_name, x: jax.Array):
  """Warns where x is spread over mapped axes that `axis_name` does not name.

  Seen under `pmap` and `shard_map`. `axis_name=()` says that each device's own
  statistics are meant.
  """
  if axis_name is not None:
    return
  mesh = jax.sharding.get_abstract_mesh()
  names = [
    name
    for name in mesh.manual_axes
    if mesh.shape[name] > 1 and not xla.is_summed(x, name)
  ]
  if names:
    warnings.warn(
      f'x is spread over the mapped axis {", ".join(map(repr, names))}, and '
      'axis_name=None: every device takes the statistics of its own part of '
      "the batch. Name the axis (axis_name='...') for those of the whole "
      'batch; axis_name=() says that this is meant.',
      stacklevel=3,
    )
