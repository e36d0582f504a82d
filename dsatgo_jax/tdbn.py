"""Threshold-dependent batch norm (tdBN; Zheng et al., AAAI 2021).

Batch norm per channel with the statistics pooled over time, batch and space.
Its scale starts at `alpha * v_th`, so that the pre-synaptic input starts as
`N(0, (alpha * v_th) ** 2)`.
"""

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
  axes = tuple(range(x.ndim - 1))
  # Second moments about a point without gradient, then moved to the mean: the
  # numbers stay small and derivatives of any order are right.
  mean = jnp.mean(x, axes)
  point = lax.stop_gradient(mean)
  variance = jnp.mean(jnp.square(x - point), axes) - jnp.square(mean - point)
  if axis_name is None:
    return statistics.named((mean, variance))
  means, variances = jnp.moveaxis(
    statistics.gather(jnp.stack([mean, variance]), axis_name), 1, 0
  )
  mean = jnp.mean(means, 0)
  point = lax.stop_gradient(mean)
  squares = jnp.mean(variances + jnp.square(means - point), 0)
  return statistics.named((mean, squares - jnp.square(mean - point)))


def normalize(x, mean, variance, scale, bias, epsilon=1e-5) -> jax.Array:
  """`scale * (x - mean) / sqrt(variance + epsilon) + bias`.

  Args:
    x: [..., C].
    mean: [C].
    variance: [C], biased.
    scale: [C].
    bias: [C].
    epsilon: keeps the root from zero.

  Returns:
    The normalised x, in the promoted dtype of all.
  """
  return (x - mean) * (scale * lax.rsqrt(variance + epsilon)) + bias


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
