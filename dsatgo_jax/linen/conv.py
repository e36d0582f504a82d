"""Convolution over time for Flax Linen."""

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

  @nn.nowrap
  def __call__(self, inputs):
    """Flax's, of inputs [..., B, *spatial, C]."""
    sizes = self.kernel_size
    num_axes = 1 + (1 if isinstance(sizes, int) else len(sizes))
    return time_axis.batch_major(super().__call__, inputs, num_axes)
