"""Plain convolutional networks: VGGSNN for events, ConvNet for small images."""

from collections.abc import Sequence
from functools import partial

from flax import linen as nn

from dsatgo_jax import initializers
from dsatgo_jax import linen as snn
from dsatgo_jax.models.network import Network


class VGGSNN(Network):
  """VGGSNN for 48 x 48 x 2 event frames: 9,268,754 parameters for 10 classes.

  Attributes:
    stages: the convolutions' channels, stage by stage; each stage ends in a
      2 x 2 average pool.
  """

  num_steps: int = 10
  stages: Sequence[Sequence[int]] = (
    (64, 128), (256, 256), (512, 512), (512, 512),
  )  # fmt: skip

  @nn.compact
  def __call__(self, x, train: bool = False, mask=None):
    """Logits over time.

    Args:
      x: images [B, H, W, C], or frames [T, B, H, W, C].
      train: whether statistics are those of the batch, or the running ones.
      mask: [T, B] of frames, or [B], whether an example is real; statistics
        are those of what is. None for all of it.

    Returns:
      Logits [T, B, K].
    """
    parts = self.parts(train)
    num_steps = self.static_steps(x)
    smallest = 2 ** len(self.stages)
    if min(x.shape[-3:-1]) < smallest:
      raise ValueError(
        f'Expected at least {smallest} x {smallest} pixels for '
        f'{len(self.stages)} stages, got {x.shape=}.'
      )
    index = 0
    for stage in self.stages:
      spikes = None  # The first sees an image or averages.
      for planes in stage:
        conv = partial(parts.conv, planes, (3, 3), padding=1, spikes=spikes)
        x = parts.spiking(conv, parts, num_steps, name=f'conv{index}')(x, mask)
        num_steps, spikes = None, 1
        index += 1
      x = snn.avg_pool(x, (2, 2), strides=(2, 2))
    x = x.reshape(*x.shape[:2], -1)
    bias = initializers.dense_bias(x.shape[-1])
    x = parts.dense(self.num_classes, bias_init=bias, name='classifier')(x)
    return self.read_out(x)


class ConvNet(VGGSNN):
  """A small network for small images, 8 x 8 and up; built as VGGSNN is."""

  num_steps: int = 4
  stages: Sequence[Sequence[int]] = ((32, 32), (64, 64))
