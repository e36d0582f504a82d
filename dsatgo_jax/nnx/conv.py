"""Convolution over time for Flax NNX."""

from flax import nnx

from dsatgo_jax import time_axis
from dsatgo_jax.initializers import kaiming_normal


class Conv(nnx.Conv):
  """Flax's `Conv`; see `dsatgo_jax.linen.Conv`."""

  def __init__(self, *args, kernel_init=kaiming_normal, **settings):
    """Makes the parameters; all else is Flax's.

    Args:
      *args: Flax's.
      kernel_init: of the kernel.
      **settings: Flax's.
    """
    super().__init__(*args, kernel_init=kernel_init, **settings)

  def __call__(self, inputs, **settings):
    """Flax's, of inputs [..., B, *spatial, C]."""

    def layer(x):
      return super(Conv, self).__call__(x, **settings)

    return time_axis.batch_major(layer, inputs, len(self.kernel_size) + 1)
