"""The time axis: an image shown at every timestep, and time folded away."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def repeat_in_time(x: jax.Array, num_steps: int) -> jax.Array:
  """Direct encoding: shows a static input at every timestep.

  Args:
    x: [B, ...].
    num_steps: T.

  Returns:
    [T, B, ...]. Inside jit no copy is made where XLA can do without.

  Raises:
    ValueError: `num_steps` is not positive.
  """
  if num_steps < 1:
    raise ValueError(f'Expected num_steps >= 1, got {num_steps=}.')
  return jnp.broadcast_to(x, (num_steps, *x.shape))


def fold_time(layer: Callable) -> Callable:
  """Lets a layer without dynamics see time as a part of the batch.

  Args:
    layer: `layer(x, ...)` of x [B, ...]: a function or a Flax module. Flax's
      convolutions and dense layers fold leading axes by themselves.

  Returns:
    The same function of x [T, B, ...].
  """

  @functools.wraps(layer)
  def folded(x, *args, **kwargs):
    y = layer(x.reshape(-1, *x.shape[2:]), *args, **kwargs)
    return y.reshape(*x.shape[:2], *y.shape[1:])

  return folded
