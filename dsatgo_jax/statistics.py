"""Mean and standard deviation of a layer's membrane, and their running average.

One scalar each per layer and timestep, over all axes of the batch, pooled over
devices by `axis_name`; no gradient flows through either.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Statistics(NamedTuple):
  """What is measured of the membrane `u` at one timestep, scalars."""

  mean: jax.Array
  std: jax.Array


def measure(u: jax.Array, axis_name=None) -> Statistics:
  """Mean and standard deviation (ddof = 1) of the membrane `u`.

  The moments are taken about a value near the mean, so that a mean of 3,000
  with a deviation of 1 comes out right in float32, and a constant membrane has
  exactly itself as mean and exactly 0 as deviation. Devices exchange their
  centred moments in one all-reduce. A membrane with an infinite or undefined
  entry has an undefined (NaN) deviation, and so threshold: at that timestep no
  neuron of the layer reaches it.

  Args:
    u: membrane potentials before the reset, [B, ...], floating point.
    axis_name: mapped axis, or axes, over which the batch is spread.

  Returns:
    `Statistics` of scalars in u's dtype, without gradient.

  Raises:
    ValueError: there is one neuron in all, which has no deviation.
  """
  u = lax.stop_gradient(u)
  num_devices = 1 if axis_name is None else lax.axis_size(axis_name)
  count = u.size * num_devices
  if count < 2:
    raise ValueError(
      'The deviation of the membrane needs at least two neurons in all (batch '
      f'and devices included), got {u.shape=} on {num_devices} device(s).'
    )
  mean, squares = moments(u)
  if axis_name is not None:
    means, squares = gather(jnp.stack([mean, squares]), axis_name).T
    mean = means[0] + jnp.mean(means - means[0])
    squares = jnp.sum(squares) + u.size * jnp.sum((means - mean) ** 2)
  return Statistics(mean, jnp.sqrt(squares / (count - 1)))


def moments(x: jax.Array, per: int = 0) -> tuple[jax.Array, jax.Array]:
  """Mean, and sum of the squared deviations from it, in one pass.

  Args:
    x: floating point.
    per: how many of the last axes are kept apart: 1 for a mean per channel.

  Returns:
    Two arrays of x's last `per` axes.
  """
  count = x.size // math.prod(x.shape[x.ndim - per :])
  shift = _near_mean(x, per)
  total, squares = _sums(x - shift, per)
  squares -= total * total / count  # Which rounding could make negative.
  return shift + total / count, jnp.maximum(squares, 0)


def _near_mean(x, per):
  """A value near x's mean, from a sample; exact where x is constant."""
  # Of one example only, so that a sharded batch need not be gathered.
  sample = x[(0,) * max(1, x.ndim - 3)]
  sample = sample.reshape(-1, *x.shape[x.ndim - per :])
  sample = sample[:: max(1, len(sample) // 64)]
  return sample[0] + jnp.mean(sample - sample[0], 0)


def _sums(x, per):
  """The sums of x and of its squares over all but the last `per` axes."""
  axes = tuple(range(x.ndim - per))
  axis = max(1, x.ndim - 3)
  if x.ndim < 3 or x.shape[axis] > 1024:
    return jnp.sum(x, axes), jnp.sum(x * x, axes)
  # Both in one pass. XLA makes vectors of a reduction over a short inner axis,
  # and over one that is not the batch it leaves a sharded batch where it is.
  sums = lax.reduce(
    (x, x * x),
    (jnp.zeros_like(x, shape=()),) * 2,
    lambda a, b: (a[0] + b[0], a[1] + b[1]),
    (axis,),
  )
  return tuple(jnp.sum(s, axes[:-1]) for s in sums)


def gather(x: jax.Array, axis_name) -> jax.Array:
  """All devices' x, [devices, ...], in one all-reduce.

  Written as a sum, since `shard_map` knows a sum's result to be the same on
  all devices.
  """
  num_devices = lax.axis_size(axis_name)
  mine = jnp.arange(num_devices) == lax.axis_index(axis_name)
  mine = jnp.expand_dims(mine, range(1, x.ndim + 1))
  return lax.psum(jnp.where(mine, x, 0), axis_name)


def running_average(old: jax.Array, new: jax.Array, momentum) -> jax.Array:
  """`momentum * old + (1 - momentum) * new`, without gradient [eq 6].

  Args:
    old: the running value, any shape.
    new: the value just measured, of the same shape.
    momentum: the share of the old value that is kept, 0.9 in the paper.

  Returns:
    The new running value, in old's dtype.
  """
  average = momentum * old + (1 - momentum) * new
  return lax.stop_gradient(average).astype(old.dtype)
