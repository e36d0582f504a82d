"""The neuron, tdBN and time-folded layers for Flax NNX.

    class Net(nnx.Module):
      def __init__(self, rngs):
        self.conv = snn.Conv(1, 64, (3, 3), use_bias=False, rngs=rngs)
        self.norm = snn.TdBatchNorm(64)
        self.neuron = snn.SpikingNeuron(num_steps=4)

      def __call__(self, x):                       # [B, H, W, C]
        x = snn.repeat_in_time(x, num_steps=4)     # [T, B, H, W, C]
        return self.neuron(self.norm(self.conv(x)))

The names and settings are those of `dsatgo_jax.linen`. Running thresholds are
`nnx.BatchStat`s, and `model.train()` and `model.eval()` switch between them
and the batch's own. What happened inside is sown as `nnx.Intermediate` under
`nnx.capture`: `firing_rate`, `theta`, `width`, `mean`, `std` and
`gradient_share`, [T] each.

A membrane that is infinite or NaN shows: its spikes are NaN, in training those
of the whole layer. Running values take nothing that is not finite. Under
all-zero input a measured threshold is zero and every neuron fires in training;
all other thresholds leave it silent.
"""

from flax import nnx

from dsatgo_jax.layers import resize_time
from dsatgo_jax.neurons import NeuronState
from dsatgo_jax.nnx.cell import SpikingCell
from dsatgo_jax.nnx.conv import Conv
from dsatgo_jax.nnx.neuron import SpikingNeuron
from dsatgo_jax.nnx.norm import TdBatchNorm
from dsatgo_jax.nnx.recurrent import (
  FeedbackNeuron,
  LeakyIntegrator,
  SpikingRNN,
)
from dsatgo_jax.nnx.variables import CAPTURED, Histogram, Membrane, Probe
from dsatgo_jax.time_axis import fold_time, over_leading_axes, repeat_in_time

__all__ = [
  'CAPTURED', 'Conv', 'Dense', 'FeedbackNeuron', 'Histogram',
  'LeakyIntegrator', 'Membrane', 'NeuronState', 'Probe', 'SpikingCell',
  'SpikingNeuron', 'SpikingRNN', 'TdBatchNorm', 'avg_pool', 'fold_time',
  'max_pool', 'repeat_in_time', 'resize_time',
]  # fmt: skip

Dense = nnx.Linear
avg_pool = over_leading_axes(nnx.avg_pool)
max_pool = over_leading_axes(nnx.max_pool)
