"""What all networks share: their settings, and conv - tdBN - neuron."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dsatgo_jax import initializers, methods, neurons, packing
from dsatgo_jax import linen as snn
from dsatgo_jax import surrogate as surrogates


class Parts(NamedTuple):
  """Makers of layers, with the network's settings filled in.

  `conv` takes, as `spikes`, how many layers' spikes its input sums; None for
  any other input.
  """

  conv: Callable[..., Any]
  dense: Callable[..., Any]
  norm: Callable[..., Any]
  neuron: Callable[..., Any]
  spiking: Callable[..., Any]
  max_pool: Callable[..., Any]


class Network(nn.Module):
  """Settings of a spiking network; `SpikingNeuron` explains the neuron's.

  Attributes:
    num_classes: K.
    num_steps: T.
    readout: 'mean', the dense layer's outputs are the logits, whose mean is the
      prediction; or 'leaky', a `LeakyIntegrator` goes over them.
    alpha: tdBN's deviation of the pre-synaptic input, in thresholds.
    axis_name: mapped axis over which all statistics are pooled.
    pack: whether convolutions keep the spikes that they see in a few bits each
      for their weights' gradient; not on CPU. See `packing.Packed`.
    remat: 'layer' keeps of a layer these alone, and its statistics, and
      computes the output of the weights again for the backward pass, which then
      has no second derivatives. XLA's CPU compiler keeps it all the same.
    dtype: of the computation; membranes and statistics are at least float32.
    param_dtype: of the parameters.
  """

  num_classes: int = 10
  num_steps: int = 2
  method: methods.Name | methods.Method = 'ds_atgo'
  decay: float = 0.2
  learn_decay: bool = True
  v_th: float = 1.0
  f_c: float = 1.0
  width: float = 1.0
  threshold: Literal['true', 'estimated'] | methods.Rule = 'true'
  width_signal: Literal['theta', 'sigma'] | methods.Rule = 'theta'
  surrogate: surrogates.Name | surrogates.Spike = 'rectangular'
  reset: neurons.Reset = 'hard'
  detach_reset: bool = False
  cut: Sequence[str] = ()
  momentum: float = 0.9
  beyond: Literal['error', 'hold'] = 'error'
  readout: Literal['mean', 'leaky'] = 'mean'
  alpha: float = 1.0
  axis_name: Any = None
  fused: bool | None = None
  kernel: str = 'xla'
  pack: bool = False
  remat: str | None = None
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def parts(self, train: bool) -> Parts:
    """The makers of this network's layers."""
    if self.remat not in REMAT:
      raise ValueError(
        f"Expected remat to be None or 'layer', got {self.remat!r}."
      )
    kinds = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    shared = kinds | {
      'use_running_average': not train,
      'v_th': self.v_th,
      'axis_name': self.axis_name,
    }

    # What has forward mode might not be spikes, and would lose it.
    spike = surrogates.get(self.surrogate)
    whole = not getattr(spike, 'forward_mode', False)
    packs = whole and (self.pack or self.remat)
    # XLA joins its own pool's gradient with its own kernels of neurons alone.
    pools = packs or whole and self.kernel == 'pallas'

    def conv(*args, spikes=None, **settings):
      if packs and spikes:
        settings['conv_general_dilated'] = packing.Packed(
          lax.conv_general_dilated, spikes, alone=bool(self.remat)
        )
      return snn.Conv(*args, use_bias=False, **kinds, **settings)

    return Parts(
      conv,
      partial(snn.Dense, kernel_init=initializers.dense_kernel, **kinds),
      partial(
        snn.TdBatchNorm,
        alpha=self.alpha,
        factored=self.method == 'mpd_agl',
        **shared,
      ),
      partial(
        snn.SpikingNeuron,
        method=self.method,
        num_steps=self.num_steps,
        decay=self.decay,
        learn_decay=self.learn_decay,
        f_c=self.f_c,
        width=self.width,
        threshold=self.threshold,
        width_signal=self.width_signal,
        surrogate=self.surrogate,
        reset=self.reset,
        detach_reset=self.detach_reset,
        cut=self.cut,
        momentum=self.momentum,
        beyond=self.beyond,
        fused=self.fused,
        kernel=self.kernel,
        **shared,
      ),
      REMAT[self.remat],
      packing.max_pool if pools else snn.max_pool,
    )

  @nn.nowrap
  def read_out(self, x):
    """The logits [T, B, K] of the last layer's outputs."""
    if self.readout not in ('mean', 'leaky'):
      raise ValueError(
        f"Expected readout to be 'mean' or 'leaky', got {self.readout!r}."
      )
    if self.readout == 'mean':
      return x
    return snn.LeakyIntegrator(param_dtype=self.param_dtype, name='readout')(x)

  def static_steps(self, x) -> int | None:
    """`num_steps` for images [B, H, W, C], None for frames [T, B, H, W, C]."""
    neurons.check_positive(num_steps=self.num_steps)
    if x.ndim == 4:
      return self.num_steps
    if x.ndim == 5 and x.shape[0] == self.num_steps:
      return None
    raise ValueError(
      'Expected images [B, H, W, C] or frames [T, B, H, W, C] with '
      f'T = {self.num_steps} (num_steps), got {x.shape=}.'
    )


class Spiking(nn.Module):
  """A layer of weights, tdBN and neurons.

  Attributes:
    layer: makes the convolution or dense layer.
    parts: the network's makers.
    num_steps: shows a static input [B, ...] at so many timesteps. Weights and
      tdBN see it once, with the same result. None for an input with time.
  """

  layer: Callable[..., Any]
  parts: Parts
  num_steps: int | None = None

  @nn.compact
  def __call__(self, x, mask=None):
    """[T, B, ...], or [B, ...] with `num_steps`, to spikes [T, B, ...]."""
    x = self.layer(name='layer')(x)
    norm = self.parts.norm(repeats=self.num_steps or 1, name='norm')
    affine = norm.affine(x, mask=mask)
    if self.num_steps:
      x = snn.repeat_in_time(x, self.num_steps)
    neuron = self.parts.neuron(name='neuron')
    if mask is not None:  # What stands in a neuron's place need not know it.
      neuron = partial(neuron, mask=mask)
    return neuron(x, norm=affine, tdbn_scale=norm.variables['params']['scale'])


# Layers by the network's `remat`.
REMAT = {None: Spiking, 'layer': nn.remat(Spiking, policy=packing.KEPT)}
