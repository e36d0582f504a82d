"""Convolution over time for Flax Linen."""

import inspect
from typing import Any

import jax
from flax import linen as nn

from dsatgo_jax import time_axis
from dsatgo_jax.initializers import kaiming_normal


class Conv(nn.Conv):
  """Flax's `Conv`, of x with any leading axes, started by Kaiming's rule.

  Attributes, parameters and results are those of `flax.linen.Conv`, except:

  - `kernel_init` is `initializers.kaiming_normal`, of variance 2 / fan_out;
    Flax's is LeCun's, of 1 / fan_in.
  - x [T, B, H, W, C] is folded batch first, so that a batch that is sharded
    over devices stays sharded; see `time_axis.batch_major`.
  """

  kernel_init: Any = kaiming_normal

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Flax's, of inputs [..., B, *spatial, C]."""
    # One call to Flax, whose interceptors and captures see x as it came.
    layer = inspect.unwrap(nn.Conv.__call__).__get__(self)
    sizes = self.kernel_size
    num_axes = 1 + (1 if isinstance(sizes, int) else len(sizes))
    return time_axis.batch_major(layer, inputs, num_axes)
