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


def measure(x: jax.Array, axis_name=None) -> tuple[jax.Array, jax.Array]:
  """Mean and (biased) variance per channel.

  Args:
    x: [..., C], floating point.
    axis_name: mapped axis over which the batch is spread.

  Returns:
    Mean and variance [C], at least float32.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  mean, variance = _moments(x)
  if axis_name is None:
    return mean, variance
  means, variances = jnp.moveaxis(
    statistics.gather(jnp.stack([mean, variance]), axis_name), 1, 0
  )
  mean = jnp.mean(means, 0)
  point = lax.stop_gradient(mean)
  squares = jnp.mean(variances + jnp.square(means - point), 0)
  return mean, squares - jnp.square(mean - point)


@jax.custom_jvp
def _moments(x):
  """Mean and variance per channel, in one pass."""
  mean, squares = statistics.moments(x, per=1)
  return mean, squares / (x.size // x.shape[-1])


@_moments.defjvp
def _moments_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  mean, variance = _moments(x)
  axes = tuple(range(x.ndim - 1))
  # Of the mean's own tangent the variance sees nothing.
  d_variance = 2 * jnp.mean((x - mean) * dx, axes)
  return (mean, variance), (jnp.mean(dx, axes), d_variance)


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
    return (x - self.mean) * self.gain + self.bias


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


def unbiased(variance, x, repeats=1, axis_name=None) -> jax.Array:
  """`n / (n - 1) * variance`, which the running variance takes, as in PyTorch.

  Args:
    variance: biased, [C].
    x: what it was measured on, [..., C].
    repeats: how many identical copies of x are meant.
    axis_name: mapped axis over which the batch is spread.

  Returns:
    [C].
  """
  count = x.size // x.shape[-1] * repeats
  if axis_name is not None:
    count *= lax.axis_size(axis_name)
  return variance * (count / max(count - 1, 1))
