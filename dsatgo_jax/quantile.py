"""A quantile of a layer's membrane: where a share of the neurons fires."""

import jax
import jax.numpy as jnp
from jax import lax

from dsatgo_jax import devices, statistics


def quantile(
  u: jax.Array, axis_name=None, mask=None, *, rate: float = 0.1587
) -> jax.Array:
  """The value at which a share of the neurons fires, whatever they are like.

  What `methods.Method.measure` may be, for any share as
  `functools.partial(quantile, rate=0.2)`. It counts the membrane once for every
  bit of its result, from the first to the last; no device sends its membrane.

  Args:
    u: membrane potentials before the reset, [B, ...].
    axis_name: mapped axis, or axes, over which the batch is spread.
    mask: [B], whether an example is real; None for all of them.
    rate: the share; by default that of a Gaussian beyond one deviation.

  Returns:
    The largest of the values of u that at least this share of the (real)
    neurons reaches; a scalar without gradient.

  Raises:
    ValueError: the rate is not between 0 and 1.
  """
  if not 0 < rate < 1:
    raise ValueError(f'Expected 0 < rate < 1, got {rate=}.')
  u = lax.stop_gradient(u)
  number = statistics.count(u, 0, mask)
  if mask is not None and axis_name:
    number = lax.psum(number, axis_name)
  elif axis_name:
    number *= devices.axis_size(axis_name)
  ordered = _ordered(u)
  num_bits = 8 * ordered.dtype.itemsize

  def next_bit(i, value):
    bit = jnp.ones((), value.dtype) << (num_bits - 1 - i).astype(value.dtype)
    reached = statistics.only_real(ordered >= value | bit, mask)
    reached = jnp.count_nonzero(reached)
    if axis_name:
      reached = lax.psum(reached, axis_name)
    return jnp.where(reached >= rate * number, value | bit, value)

  zero = jnp.zeros_like(ordered, shape=())
  return _number(lax.fori_loop(0, num_bits, next_bit, zero), u.dtype)


def _ordered(u):
  """Floating-point numbers as unsigned integers of the same order."""
  kind = jnp.dtype(f'uint{8 * u.dtype.itemsize}')
  bits, sign = lax.bitcast_convert_type(u, kind), _sign(kind)
  return jnp.where(bits & sign, ~bits, bits | sign)


def _number(ordered, dtype):
  """The floating-point number of such an integer."""
  sign = _sign(ordered.dtype)
  bits = jnp.where(ordered & sign, ordered ^ sign, ~ordered)
  return lax.bitcast_convert_type(bits, dtype)


def _sign(kind):
  return jnp.ones((), kind) << (8 * kind.itemsize - 1)
