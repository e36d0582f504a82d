"""The spiking neuron as a recurrent cell for Flax Linen."""

import inspect

import jax.numpy as jnp
from flax import linen as nn

from dsatgo_jax import carry as carries
from dsatgo_jax import methods
from dsatgo_jax.linen.neuron import SpikingNeuron
from dsatgo_jax.neurons import NeuronState, Parameters


class SpikingCell(SpikingNeuron, nn.RNNCellBase):
  """`SpikingNeuron` as a recurrent cell, for networks scanned as a whole.

  Equal to `SpikingNeuron`, running thresholds included, where each timestep
  keeps its own statistics:

      nn.RNN(cell, time_major=True, variable_axes={'batch_stats': 0})

  Over another T than the one trained this takes `resize_time(variables, T)`.

  Padding beyond the RNN's `seq_lengths` is in the statistics, since a cell does
  not see it; `SpikingNeuron(...)(x, mask=...)` leaves it out.

  Attributes:
    num_feature_axes: how many of x's last axes are no batch axes, for RNNs that
      are not time-major: 3 for x [B, T, H, W, C], whose W would else be time.
  """

  num_feature_axes: int = 1

  def __call__(  # type: ignore[override]
    self, carry: NeuronState, x, use_running_average=None
  ):
    """One timestep.

    Args:
      carry: the `NeuronState` before it; its t may be [B]. Examples at
        different timesteps have no t that a rule could read.
      x: pre-synaptic input, [B, ...].
      use_running_average: in the place of the attribute; not both.

    Returns:
      (state, spikes [B, ...]).
    """
    x = jnp.asarray(x)
    start = self.initialize_carry(None, x.shape)
    spikes, state = self._run(
      x[None],
      use_running_average,
      carries.of_all(carry, start),
      True,
      per_step=True,
    )
    return carries.of_examples(state, carry, start), spikes[0]

  @nn.nowrap
  def initialize_carry(self, rng, input_shape) -> NeuronState:
    """The state at rest, for x of shape [B, ...].

    Args:
      rng: not needed.
      input_shape: x's.

    Returns:
      A `NeuronState`, its t and theta [B].

    Raises:
      ValueError: an `nn.RNN` asks that goes over another number of timesteps
        than there are running thresholds.
    """
    del rng
    self._check_length_of_rnn()
    parameters = Parameters(self.decay, self.v_th, self.f_c, self.width)
    method = methods.get(self.method, self.threshold, self.width_signal)
    return carries.initial(
      input_shape, self.dtype, self.param_dtype, parameters, method
    )

  @nn.nowrap
  def _check_length_of_rnn(self):
    """Raises a `ValueError`, where the scan's own would not tell a way out.

    The scan would say that axes differ, and its body can't ask for its length.
    """
    frame = inspect.currentframe()
    while frame and frame.f_code is not _RNN:
      if frame.f_code.co_name == 'scan_fn':
        return  # A timestep of it.
      frame = frame.f_back
    if not frame or self.scope is None:
      return
    given = frame.f_locals
    if given['self'].variable_axes.get('batch_stats') != 0:
      return
    length = given['inputs'].shape[given['time_axis']]
    running = self.variables.get('batch_stats', {}).values()
    known = [average.shape[0] for average in running]
    if known and known[0] != length:
      raise ValueError(
        f'Expected T = {known[0]} timesteps, as there are running values, got '
        f'an nn.RNN over {length}. resize_time(variables, num_steps) makes '
        'variables of it.'
      )


_RNN = inspect.unwrap(nn.RNN.__call__).__code__
