"""Convolution over time for Flax NNX."""

from typing import Any

import jax
from flax import nnx

from dsatgo_jax import time_axis
from dsatgo_jax.initializers import kaiming_normal


class Conv(nnx.Conv):
  """Flax's `Conv`, of x with any leading axes, started by Kaiming's rule.

  Arguments, parameters and results are those of `flax.nnx.Conv`, except:

  - `kernel_init` is `initializers.kaiming_normal`, of variance 2 / fan_out;
    Flax's is LeCun's, of 1 / fan_in.
  - x [T, B, H, W, C] is folded batch first, so that a batch that is sharded
    over devices stays sharded; see `time_axis.batch_major`.
  """

  def __init__(self, *args, kernel_init=kaiming_normal, **settings):
    """Makes the parameters; all else is Flax's.

    Args:
      *args: Flax's.
      kernel_init: of the kernel.
      **settings: Flax's.
    """
    super().__init__(*args, kernel_init=kernel_init, **settings)

  def __call__(  # type: ignore[override]
    self, inputs: jax.Array, **settings: Any
  ) -> jax.Array:
    """Flax's, of inputs [..., B, *spatial, C]."""

    def layer(x):
      return super(Conv, self).__call__(x, **settings)

    return time_axis.batch_major(layer, inputs, len(self.kernel_size) + 1)
