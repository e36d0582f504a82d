"""The time axis: an image shown at every timestep, and time folded away."""

import functools
import math
from collections.abc import Callable
from typing import Any

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


def fold_time(layer: Callable[..., Any]) -> Callable[..., jax.Array]:
  """Lets a layer without dynamics see time as a part of the batch.

  Args:
    layer: `layer(x, ...)` of x [B, ...]: a function or a Flax module. Flax's
      convolutions and dense layers fold leading axes by themselves.

  Returns:
    The same function of x [T, B, ...].
  """

  @functools.wraps(layer)
  def folded(x, *args, **kwargs):
    def of_examples(x):
      size = math.prod(x.shape[:2])  # -1 says nothing of an empty batch.
      y = layer(x.reshape(size, *x.shape[2:]), *args, **kwargs)
      return y.reshape(*x.shape[:2], *y.shape[1:])

    return batch_major(of_examples, x, x.ndim - 2)

  return folded


def batch_major(
  layer: Callable[..., Any], x: jax.Array, num_axes: int
) -> jax.Array:
  """Applies a layer that folds all leading axes, the batch before time.

  A batch that is sharded stays where it is: [B * T] can be split along B over
  devices, [T * B] cannot. XLA moves nothing for it where the layers around
  do the same.

  Args:
    layer: of x [B, T, ...].
    x: [T, B, ...], or with fewer or more leading axes, the batch last.
    num_axes: how many axes follow the leading ones.

  Returns:
    What the layer gives, its leading axes as x's.
  """
  batch = x.ndim - num_axes - 1
  if batch < 1:
    return layer(x)
  return jnp.moveaxis(layer(jnp.moveaxis(x, batch, 0)), 0, batch)


def over_leading_axes(
  pool: Callable[..., Any],
) -> Callable[..., jax.Array]:
  """Lets a pooling of Flax's take any number of axes before the window's.

  Args:
    pool: `pool(x, window_shape, ...)` of x [B, *window, C]; Flax's own, which
      with padding in numbers takes just this.

  Returns:
    The same function of x [T, B, *window, C], [B, *window, C] or [*window, C].
  """

  @functools.wraps(pool)
  def pooled(x, window_shape, *args, **kwargs):
    def each(x):
      return pool(x, window_shape, *args, **kwargs)

    for _ in range(x.ndim - len(window_shape) - 2):
      each = jax.vmap(each)
    return each(x)

  return pooled
