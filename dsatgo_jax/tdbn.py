"""Threshold-dependent batch norm (tdBN; Zheng et al., AAAI 2021).

Batch norm per channel with the statistics pooled over time, batch and space.
Its scale starts at `alpha * v_th`, so that the pre-synaptic input starts as
`N(0, (alpha * v_th) ** 2)`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsatgo_jax import statistics


def measure(
  x: jax.Array, axis_name=None, mask=None
) -> tuple[jax.Array, jax.Array]:
  """Mean and (biased) variance per channel.

  Args:
    x: [..., C], floating point.
    axis_name: mapped axis over which the batch is spread. None under `pmap` or
      `shard_map` warns; () says that the statistics are each device's own.
    mask: whether x is real, of x's first axes; None for all of it.

  Returns:
    Mean and variance [C], at least float32.
  """
  statistics.warn_if_not_pooled(axis_name, x)
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  mean, variance = _moments(x, mask)
  if not axis_name:
    return mean, variance
  parts = [mean, variance]
  if mask is not None:
    parts.append(jnp.full_like(mean, statistics.count(x, 1, mask)))
  means, variances, *counts = jnp.moveaxis(
    statistics.gather(jnp.stack(parts), axis_name), 1, 0
  )
  mean = statistics.weighted_mean(means, *counts)
  point = lax.stop_gradient(mean)
  squares = variances + jnp.square(means - point[None])
  squares = statistics.weighted_mean(squares, *counts)
  return mean, squares - jnp.square(mean - point)


@jax.custom_jvp
def _moments(x, mask):
  """Mean and variance per channel, in one pass."""
  mean, squares = statistics.moments(x, 1, mask)
  return mean, squares / statistics.nonzero(statistics.count(x, 1, mask))


@_moments.defjvp
def _moments_jvp(primals, tangents):
  (x, mask), (dx, _) = primals, tangents
  mean, variance = _moments(x, mask)
  count = statistics.nonzero(statistics.count(x, 1, mask))

  def average(a):
    a = statistics.only_real(a, mask)
    return jnp.sum(a, range(x.ndim - 1)) / count

  # Of the mean's own tangent the variance sees nothing.
  return (mean, variance), (average(dx), 2 * average((x - _per(mean, x)) * dx))


def _per(channels, x):
  """[C] as an array that has x's axes."""
  return lax.expand_dims(channels, range(x.ndim - 1))


def mask_of(x: jax.Array, repeats: int, mask):
  """A mask of x's first axes.

  Args:
    x: [T, B, ..., C], or [B, ..., C] where `repeats` is more than 1.
    repeats: how many identical copies of x are meant.
    mask: [T, B] or [B]; None for no mask.

  Returns:
    [T, B], or [B] with `repeats`, or None.

  Raises:
    ValueError: it is of another shape.
  """
  if mask is None:
    return None
  mask = jnp.asarray(mask, bool)
  expected = [x.shape[:1]] if repeats > 1 else [x.shape[:2], x.shape[1:2]]
  if mask.shape not in expected:
    raise ValueError(
      f'Expected a mask of shape {" or ".join(map(str, expected))} for x of '
      f'shape {x.shape} with {repeats=}, got shape {mask.shape}.'
    )
  return jnp.broadcast_to(mask, expected[0])


class Affine(NamedTuple):
  """What tdBN comes to once its statistics are known, [C] each.

  Attributes:
    mean: what is subtracted.
    gain: what the difference is multiplied with.
    bias: what is added.
  """

  mean: jax.Array
  gain: jax.Array
  bias: jax.Array

  def __call__(self, x):
    """`(x - mean) * gain + bias`, in the promoted dtype of all."""
    mean, gain, bias = (_per(a, x) for a in self)
    return (x - mean) * gain + bias


def affine(mean, variance, scale, bias, epsilon=1e-5) -> Affine:
  """The `Affine` with a gain of `scale / sqrt(variance + epsilon)`.

  Args:
    mean: [C].
    variance: [C], biased.
    scale: [C].
    bias: [C].
    epsilon: keeps the root from zero.

  Returns:
    `Affine`.
  """
  return Affine(mean, scale * lax.rsqrt(variance + epsilon), bias)


def unbiased(variance, x, repeats=1, axis_name=None, mask=None) -> jax.Array:
  """`n / (n - 1) * variance`, which the running variance takes, as in PyTorch.

  Args:
    variance: biased, [C].
    x: what it was measured on, [..., C].
    repeats: how many identical copies of x are meant.
    axis_name: mapped axis over which the batch is spread.
    mask: whether x is real, of x's first axes; None for all of it.

  Returns:
    [C].
  """
  count = repeats * statistics.count(x, 1, mask)
  if mask is None:
    count *= statistics.axis_size(axis_name)
  elif axis_name:
    count = lax.psum(count, axis_name)
  return variance * (count / statistics.nonzero(count - 1))
