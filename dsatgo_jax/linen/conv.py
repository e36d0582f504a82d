"""Convolution over time for Flax Linen."""

import inspect
from typing import Any

from flax import linen as nn

from dsatgo_jax import time_axis
from dsatgo_jax.initializers import kaiming_normal


class Conv(nn.Conv):
  """Flax's `Conv`, started by Kaiming's rule, of x with any leading axes.

  [T, B, H, W, C] goes in as it is, and a batch that is sharded over devices
  stays sharded; see `time_axis.batch_major`.
  """

  kernel_init: Any = kaiming_normal

  @nn.compact
  def __call__(self, inputs):
    """Flax's, of inputs [..., B, *spatial, C]."""
    # One call to Flax, whose interceptors and captures see x as it came.
    layer = inspect.unwrap(nn.Conv.__call__).__get__(self)
    sizes = self.kernel_size
    num_axes = 1 + (1 if isinstance(sizes, int) else len(sizes))
    return time_axis.batch_major(layer, inputs, num_axes)
