"""Residual networks: ResNet-19 for CIFAR, SEW-ResNet-18 and -34 for ImageNet.

Their blocks are spike-element-wise (SEW-ADD; Fang et al., NeurIPS 2021): the
spikes of the residual branch are added to those of the identity.
"""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from dsatgo_jax import initializers
from dsatgo_jax.models.network import Network, Parts


class Block(nn.Module):
  """conv - tdBN - neuron - conv - tdBN - neuron, plus the identity.

  Attributes:
    planes: output channels.
    stride: of the first convolution.
    parts: the network's makers.
    spikes: how many layers' spikes x sums.
  """

  planes: int
  stride: int
  parts: Parts
  spikes: int

  @nn.compact
  def __call__(self, x, mask=None):
    """[T, B, H, W, C] to [T, B, H / stride, W / stride, planes]."""
    conv = partial(self.parts.conv, self.planes)
    stride = (self.stride, self.stride)
    first = partial(conv, (3, 3), strides=stride, padding=1, spikes=self.spikes)
    y = self.parts.spiking(first, self.parts, name='spiking1')(x, mask)
    second = partial(conv, (3, 3), padding=1, spikes=1)
    y = self.parts.spiking(second, self.parts, name='spiking2')(y, mask)
    if self.stride != 1 or x.shape[-1] != self.planes:
      shortcut = partial(conv, (1, 1), strides=stride, spikes=self.spikes)
      x = self.parts.spiking(shortcut, self.parts, name='downsample')(x, mask)
    return x + y


class ResNet19(Network):
  """ResNet-19, as published for CIFAR: 12,698,260 parameters for 10 classes.

  Attributes:
    planes: channels of the three stages.
    stage_sizes: blocks of each.
    head_width: units of the dense layer before the last.
  """

  planes: Sequence[int] = (128, 256, 512)
  stage_sizes: Sequence[int] = (3, 3, 2)
  head_width: int = 256

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
    stem = partial(parts.conv, self.planes[0], (3, 3), padding=1)
    x = parts.spiking(stem, parts, self.static_steps(x), name='encode')(x, mask)
    x = _stages(x, mask, self.planes, self.stage_sizes, parts)
    x = jnp.mean(x, axis=(-3, -2))
    head = partial(parts.dense, self.head_width, use_bias=False)
    x = parts.spiking(head, parts, name='head')(x, mask)
    x = parts.dense(self.num_classes, use_bias=False, name='classifier')(x)
    return self.read_out(x)


class SEWResNet18(Network):
  """SEW-ResNet-18 for ImageNet: 11,689,532 parameters for 1,000 classes.

  Attributes:
    planes: channels of the stages.
    stage_sizes: blocks of each.
  """

  num_classes: int = 1000
  num_steps: int = 4
  planes: Sequence[int] = (64, 128, 256, 512)
  stage_sizes: Sequence[int] = (2, 2, 2, 2)

  @nn.compact
  def __call__(self, x, train: bool = False, mask=None):
    """Logits over time; arguments as `ResNet19`'s."""
    parts = self.parts(train)
    stem = partial(
      parts.conv, self.planes[0], (7, 7), strides=(2, 2), padding=3
    )
    x = parts.spiking(stem, parts, self.static_steps(x), name='encode')(x, mask)
    padding = (1, 1), (1, 1)
    x = parts.max_pool(x, (3, 3), strides=(2, 2), padding=padding)
    x = _stages(x, mask, self.planes, self.stage_sizes, parts)
    x = jnp.mean(x, axis=(-3, -2))
    bias = initializers.dense_bias(x.shape[-1])
    x = parts.dense(self.num_classes, bias_init=bias, name='classifier')(x)
    return self.read_out(x)


class SEWResNet34(SEWResNet18):
  """SEW-ResNet-34 for ImageNet: 21,797,708 parameters for 1,000 classes."""

  stage_sizes: Sequence[int] = (3, 4, 6, 3)


def _stages(x, mask, planes, stage_sizes, parts):
  """Stages of blocks; each but the first halves the resolution."""
  index, spikes = 0, 1
  for stage, (width, size) in enumerate(zip(planes, stage_sizes, strict=True)):
    for block in range(size):
      stride = 2 if stage and not block else 1
      changes = stride != 1 or x.shape[-1] != width
      x = Block(width, stride, parts, spikes, name=f'block{index}')(x, mask)
      spikes = 2 if changes else spikes + 1
      index += 1
  return x
