"""Which dtypes numbers are computed in, and come out in."""

import functools

import jax
import jax.numpy as jnp


def wide(*dtypes) -> jnp.dtype:
  """What numbers of these dtypes are computed in: at least float32.

  Args:
    *dtypes: anything that names one.

  Returns:
    The widest; under strict promotion, too, since it is meant.
  """
  with jax.numpy_dtype_promotion('standard'):
    return functools.reduce(jnp.promote_types, dtypes, jnp.dtype('float32'))


def floating(dtype) -> jnp.dtype:
  """The dtype of an output.

  Args:
    dtype: anything that names one.

  Returns:
    It.

  Raises:
    ValueError: it is not floating point, and so would pass no gradient.
  """
  dtype = jnp.dtype(dtype)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f'Expected a floating-point dtype, got {dtype=!s}.')
  return dtype
