"""How weights start, as in the authors' program.

`jax.nn.initializers` in all: functions `(key, shape, dtype)`, for Linen's and
NNX's layers alike.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.nn import initializers

# Convolutions: normal with variance 2 / fan_out, untruncated (He et al. 2015).
kaiming_normal = initializers.variance_scaling(2, 'fan_out', 'normal')

# Kernels of dense layers: as `dense_bias`, with the fan-in of their shape.
dense_kernel = initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def dense_bias(fan_in: int) -> Callable[..., Any]:
  """Uniform within `1 / sqrt(fan_in)`, as PyTorch starts its dense layers.

  Args:
    fan_in: features that go into the layer, which the shape of a bias does not
      tell: `nn.Dense(10, bias_init=dense_bias(x.shape[-1]))(x)`.

  Returns:
    An initializer.
  """
  bound = 1 / math.sqrt(fan_in)

  def init(key, shape, dtype=float):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init
