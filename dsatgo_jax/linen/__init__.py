"""The neuron, tdBN and time-folded layers for Flax Linen.

    class Net(nn.Module):
      @nn.compact
      def __call__(self, x, train: bool):            # [B, H, W, C]
        x = snn.repeat_in_time(x, num_steps=4)       # [T, B, H, W, C]
        x = snn.Conv(64, (3, 3), use_bias=False)(x)
        x = snn.TdBatchNorm(use_running_average=not train)(x)
        x = snn.SpikingNeuron(num_steps=4, use_running_average=not train)(x)
        ...

Running thresholds live in the `batch_stats` collection, so a training loop
written for batch norm trains the neuron unchanged. What happened inside is
sown, pooled over `axis_name`, into collections where these are mutable, and
costs nothing where they are not:

    spiking     firing_rate, gradient_share, theta, width, mean and std, [T]
                each; silent_share and always_share, of the neurons that fired
                at no timestep and at every one
    histograms  membrane: shares of `u - theta` below, between and above
                `statistics.EDGES`, [T, bins]
    membranes   u, v and spikes, [T, B, ...], with their gradients

Gradients are told of through zeros in the collection `flow` (see `probes` and
`analysis.flow`), and cut by gates in the collection `cuts`.

A membrane that is infinite or NaN shows: its spikes are NaN, in training those
of the whole layer, whose statistics it is in. Running values, tdBN's too, take
nothing that is not finite, so that a step whose update is dropped (as by
`optax.apply_if_finite`) leaves nothing behind. Under all-zero input theta is
zero with a measured threshold, and equality fires: every neuron in training;
fixed, learnable, estimated and running thresholds leave it silent.
"""

from flax import linen as nn

from dsatgo_jax.layers import resize_time
from dsatgo_jax.linen.cell import SpikingCell
from dsatgo_jax.linen.conv import Conv
from dsatgo_jax.linen.neuron import SpikingNeuron
from dsatgo_jax.linen.norm import TdBatchNorm
from dsatgo_jax.linen.recurrent import (
  FeedbackNeuron,
  LeakyIntegrator,
  SpikingRNN,
)
from dsatgo_jax.neurons import NeuronState
from dsatgo_jax.time_axis import fold_time, over_leading_axes, repeat_in_time

__all__ = [
  'Conv', 'Dense', 'FeedbackNeuron', 'LeakyIntegrator', 'NeuronState',
  'SpikingCell', 'SpikingNeuron', 'SpikingRNN', 'TdBatchNorm', 'avg_pool',
  'fold_time', 'max_pool', 'repeat_in_time', 'resize_time',
]  # fmt: skip

Dense = nn.Dense
avg_pool = over_leading_axes(nn.avg_pool)
max_pool = over_leading_axes(nn.max_pool)
