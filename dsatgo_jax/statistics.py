"""Mean and standard deviation of a layer's membrane, and their running average.

One scalar each per layer and timestep, over all axes of the batch, pooled over
devices by `axis_name`; no gradient flows through either.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsatgo_jax import devices, dtypes, xla

# Of deviations whose squares vanish or overflow, those of their products with
# the one or the other do not, from about 1e-36 to 1e22 in float32.
_SCALES = (2.0**70, 2.0**-26)

# Between them a histogram of `u - theta` has its bins, with one below and one
# above; and so many neurons of a timestep it counts, evenly spaced ones.
EDGES = tuple(np.linspace(-4, 4, 65).tolist())
SAMPLES = 2**14


class Statistics(NamedTuple):
  """What is measured of the membrane `u` at one timestep, scalars."""

  mean: jax.Array
  std: jax.Array


def measure(u: jax.Array, axis_name=None, mask=None) -> Statistics:
  """Mean and standard deviation (ddof = 1) of the membrane `u`.

  The moments are taken about a value near the mean, so that a mean of 3,000
  with a deviation of 1 comes out right in float32, and a constant membrane has
  exactly itself as mean and exactly 0 as deviation; deviations of 1e-34 and of
  1e22 come out right, too. Devices exchange their centred moments in one
  all-reduce. A membrane with an infinite or undefined entry has an undefined
  (NaN) deviation, and so threshold and spikes.

  Args:
    u: membrane potentials before the reset, [B, ...], floating point.
    axis_name: mapped axis, or axes, over which the batch is spread.
    mask: [B], whether an example is real; None for all of them. Of less than
      two real neurons the deviation is 0, and of none the mean is any value.

  Returns:
    `Statistics` of scalars in u's dtype, without gradient.

  Raises:
    ValueError: there is one neuron in all, which has no deviation.
  """
  u = lax.stop_gradient(u)
  num_devices = devices.axis_size(axis_name)
  if u.size * num_devices < 2:
    raise ValueError(
      'The deviation of the membrane needs at least two neurons in all (batch '
      f'and devices included), got {u.shape=} on {num_devices} device(s).'
    )
  near, total, square, scale = _sums_about_mean(u, mask)
  counted = count(u, 0, mask)
  number = nonzero(counted)
  mean = near + total / number
  # In this order no product is larger than the sum of squares.
  square -= scale * total * (scale * total / number)
  norm = jnp.sqrt(_not_negative(square)) / scale
  return of_devices(mean, norm, counted, axis_name, mask is None)


def of_devices(
  mean: jax.Array, norm: jax.Array, counted, axis_name=None, even: bool = True
) -> Statistics:
  """`Statistics` of what each device has measured.

  Args:
    mean: of its membrane, a scalar.
    norm: the root of the sum of squared deviations from it, a scalar.
    counted: how many neurons that is of; a number, or a scalar.
    axis_name: mapped axis, or axes, over which the batch is spread.
    even: whether `counted` is the same on all devices.

  Returns:
    `Statistics` of scalars.
  """
  if axis_name:
    parts = [mean, norm] if even else [mean, norm, counted]
    means, norms, *counts = devices.gather(jnp.stack(parts), axis_name).T
    mean = means[0] + weighted_mean(means - means[0], *counts)
    each = counts[0] if counts else counted
    norm = _hypot(jnp.stack([norms, jnp.sqrt(each) * (means - mean)]))
    num_devices = devices.axis_size(axis_name)
    counted = jnp.sum(each) if counts else counted * num_devices
  free = jnp.asarray(nonzero(counted - 1), mean.dtype)
  return Statistics(mean, norm / jnp.sqrt(free))


def moments(
  x: jax.Array, per: int = 0, mask=None
) -> tuple[jax.Array, jax.Array]:
  """Mean, and sum of the squared deviations from it, in one pass.

  Args:
    x: floating point.
    per: how many of the last axes are kept apart: 1 for a mean per channel.
    mask: whether x is real, of x's first axes; None for all of it.

  Returns:
    Two arrays of x's last `per` axes.
  """
  near, distance = _about_mean(x, per, mask)
  total, squares = sums((distance, jnp.square(distance)), per)
  mean = total / nonzero(count(x, per, mask))
  # Which rounding could make negative.
  return near + mean, _not_negative(squares - total * mean)


def count(x: jax.Array, per: int = 0, mask=None):
  """How many entries a statistic is taken of.

  Args:
    x: what it is taken of.
    per: how many of the last axes are kept apart.
    mask: whether x is real, of x's first axes; None for all of it.

  Returns:
    A number, or an array () where there is a mask.
  """
  first = 0 if mask is None else mask.ndim
  each = math.prod(x.shape[first : x.ndim - per])
  if mask is None:
    return each
  return each * jnp.sum(mask, dtype=dtypes.wide(x.dtype))


def nonzero(count):
  """A count to divide by: 1 in the place of what is less.

  Args:
    count: a number, or an array where there is a mask.

  Returns:
    As `count`.
  """
  return max(count, 1) if isinstance(count, int) else jnp.maximum(count, 1)


def only_real(x: jax.Array, mask) -> jax.Array:
  """x, and 0 where the mask of its first axes is False.

  Args:
    x: any shape.
    mask: of x's first axes; None for all of it.

  Returns:
    An array as x.
  """
  if mask is None:
    return x
  return jnp.where(lax.expand_dims(mask, range(mask.ndim, x.ndim)), x, 0)


def weighted_mean(x: jax.Array, weights=None) -> jax.Array:
  """The mean over the first axis.

  Args:
    x: [N, ...].
    weights: [N, ...], not negative and not all 0; None for equal ones.

  Returns:
    [...].
  """
  if weights is None:
    return jnp.mean(x, 0)
  return jnp.sum(weights * x, 0) / nonzero(jnp.sum(weights, 0))


def _about_mean(x, per, mask):
  """A value near x's mean, and x's distance from it, 0 where it is not real."""
  near = _near_mean(x, per, mask)
  return near, only_real(x - lax.expand_dims(near, range(x.ndim - per)), mask)


def _sums_about_mean(u, mask):
  """A value near the mean, the sums of d and (scale * d) ** 2, and the scale.

  Of the distances d from that value.
  """
  tiny, large = _SCALES

  def again_if_needed(u):
    def scaled(u, scale):
      near, distance = _about_mean(u, 0, mask)
      return near, *sums((distance, jnp.square(scale * distance)))

    near, total, square = scaled(u, 1)
    fits = (square > _FAINT) & jnp.isfinite(square)
    scale = jnp.where(square > _FAINT, large, tiny)
    scale = jnp.where(fits, 1, scale).astype(u.dtype)
    # Of u, which is in memory, as its distances would have to be.
    square = lax.cond(fits, lambda u: square, lambda u: scaled(u, scale)[2], u)
    return near, total, square, scale

  def at_once(u):
    near, distance = _about_mean(u, 0, mask)
    scales = [xla.unknown(scale, near) for scale in _SCALES]
    squares = (jnp.square(scale * distance) for scale in scales)
    total, *squares = sums((distance, *squares))
    # One scale alone goes on: infinity minus itself would be undefined.
    fits = jnp.isfinite(squares[0])
    return near, total, jnp.where(fits, *squares), jnp.where(fits, *scales)

  # On CPU a third sum would undo the vectors of the other two; elsewhere a
  # conditional would wait for the host.
  return lax.platform_dependent(u, cpu=again_if_needed, default=at_once)


# Below it a sum of squares in float32 may have lost some that matter.
_FAINT = 1e-20


def _not_negative(x):
  """The larger of x and 0; `jnp.maximum` may lose a NaN on CPU."""
  return jnp.where(x < 0, 0, x)


def _hypot(x):
  """The root of the sum of x's squares, whatever their size."""
  largest = jnp.max(jnp.abs(x))
  largest = jnp.where(largest > 0, largest, 1)
  return largest * jnp.sqrt(jnp.sum(jnp.square(x / largest)))


def _near_mean(x, per, mask):
  """A value near x's mean, exact where x is constant.

  Elsewhere than on CPU a single entry: a mean would take two kernels more.
  """
  lead = min(x.ndim - per, 1 + per)
  if mask is not None:  # Of a real example, if there is any.
    lead = 0
    x = x.reshape(-1, *x.shape[mask.ndim :])[jnp.argmax(mask.reshape(-1))]
    x = jnp.where(jnp.any(mask), x, 0)
  size = math.prod(x.shape[lead : x.ndim - per])
  entries = x.reshape(*x.shape[:lead], size, *x.shape[x.ndim - per :])

  # Of every example first: a sharded batch then stays where it is, also where
  # the channels are sharded as parameters are.
  def some(entries):
    few = lax.slice_in_dim(entries, 0, None, max(1, size // 16), lead)
    axes = tuple(range(lead + 1))
    largest = jnp.max(few, axes)
    return largest + jnp.mean(few - lax.expand_dims(largest, axes), axes)

  def single(entries):
    return lax.index_in_dim(entries, 0, lead, keepdims=False)[(0,) * lead]

  return lax.platform_dependent(entries, cpu=some, default=single)


def sums(terms: tuple[jax.Array, ...], per: int = 0) -> tuple[jax.Array, ...]:
  """The sum of each term over all but the last `per` axes.

  Args:
    terms: at most two arrays of one shape and dtype: of more XLA's CPU
      compiler makes no vectors.
    per: how many of the last axes are kept apart.

  Returns:
    As many arrays of the last `per` axes.
  """
  x = terms[0]
  axes = tuple(range(x.ndim - per))
  axis = max(1, x.ndim - 3)
  length = x.shape[axis] if x.ndim > 2 else None
  if not isinstance(length, int) or length > 1024:  # Or it is symbolic.
    return tuple(jnp.sum(term, axes) for term in terms)

  def at_once(*terms):
    # XLA makes vectors of a reduction over a short inner axis.
    zeros = (jnp.zeros_like(x, shape=()),) * len(terms)
    partial = lax.reduce(terms, zeros, _add_each, (axis,))
    return tuple(jnp.sum(term, axes[:-1]) for term in partial)

  def in_pairs(*terms):
    # Each reduction takes a GPU several kernels; of a complex number, too.
    dtype = dtypes.wide(x.dtype)
    single, pairs = terms[: len(terms) % 2], terms[len(terms) % 2 :]
    total = [jnp.sum(term, axes) for term in single]
    for pair in zip(pairs[::2], pairs[1::2], strict=True):
      both = jnp.sum(lax.complex(*(term.astype(dtype) for term in pair)), axes)
      total += [both.real.astype(x.dtype), both.imag.astype(x.dtype)]
    return tuple(total)

  return lax.platform_dependent(*terms, cpu=at_once, default=in_pairs)


def _add_each(a, b):
  return tuple(x + y for x, y in zip(a, b, strict=True))


def sample(a, like: jax.Array, axis_name=None) -> jax.Array:
  """At most `SAMPLES` neurons of a timestep, as many of every example.

  Args:
    a: what is sampled; broadcasts against `like`.
    like: [B, ...].
    axis_name: mapped axis over which the batch is spread.

  Returns:
    [B, n], n at least 1.
  """
  a = jnp.broadcast_to(a, like.shape).reshape(like.shape[0], -1)
  total = like.size * devices.axis_size(axis_name)
  return a[:, :: max(1, -(-total // SAMPLES))]


def histogram(x: jax.Array, axis_name=None, mask=None) -> jax.Array:
  """The shares of x below, between and above `EDGES`, of a `sample` of x.

  Args:
    x: the membrane's distance from the threshold, `u - theta`, [B, ...].
    axis_name: mapped axis over which the batch is spread.
    mask: [B], whether an example is real; None for all of them.

  Returns:
    [len(EDGES) + 1], pooled, in x's dtype.
  """
  few = sample(x, x, axis_name)
  first, step = EDGES[0], EDGES[1] - EDGES[0]
  bins = jnp.clip(jnp.floor((few - first) / step) + 1, 0, len(EDGES))
  one = only_real(jnp.ones_like(few), mask)
  counts = jnp.zeros(len(EDGES) + 1, x.dtype).at[bins.astype(int)].add(one)
  if axis_name:
    counts = lax.psum(counts, axis_name)
  return counts / nonzero(jnp.sum(counts))


def share(a: jax.Array, axis_name=None, mask=None, dtype=jnp.float32):
  """The share of neurons for which a is True.

  Args:
    a: [B, ...], bool.
    axis_name: mapped axis over which the batch is spread.
    mask: [B], whether an example is real; None for all of them.
    dtype: of the share.

  Returns:
    A scalar, pooled.
  """
  # Of truth values XLA's CPU compiler would first make numbers, in memory.
  total = jnp.count_nonzero(only_real(a, mask)).astype(dtype)
  number = count(a, 0, mask)
  if not axis_name:
    return total / nonzero(number)
  if mask is None:
    return lax.pmean(total / number, axis_name)
  total, number = lax.psum((total, number), axis_name)
  return total / nonzero(number)


def running_average(old: jax.Array, new: jax.Array, momentum) -> jax.Array:
  """`momentum * old + (1 - momentum) * new`, without gradient [eq 6].

  A value that is not finite is not taken: the old one stays.

  Args:
    old: the running value, any shape.
    new: the value just measured, of the same shape.
    momentum: the share of the old value that is kept, 0.9 in the paper.

  Returns:
    The new running value, in old's dtype.
  """
  average = momentum * old + (1 - momentum) * new
  kept = old + jnp.zeros_like(average)  # Sharded as the average.
  average = jnp.where(jnp.isfinite(average), average, kept)
  return lax.stop_gradient(average).astype(old.dtype)
