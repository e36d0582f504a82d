"""The spiking neuron as a recurrent cell for Flax NNX."""

import functools
import inspect

import jax
import jax.numpy as jnp
from flax import nnx

from dsatgo_jax import carry as carries
from dsatgo_jax.neurons import NeuronState
from dsatgo_jax.nnx.neuron import SpikingNeuron


class SpikingCell(SpikingNeuron, nnx.RNNCellBase):
  """`SpikingNeuron` as a recurrent cell, for networks scanned as a whole.

  The running thresholds [T] are indexed by the timestep that the carry holds:
  `nnx.RNN(cell, time_major=True)` equals `SpikingNeuron`. Padding beyond the
  RNN's `seq_lengths` is in the statistics, since a cell does not see it;
  `SpikingNeuron(...)(x, mask=...)` leaves it out.

  Attributes:
    num_feature_axes: how many of x's last axes are no batch axes, for RNNs that
      are not time-major: 3 for x [B, T, H, W, C], whose W would else be time.
  """

  num_feature_axes: int = 1

  def __init__(self, *args, num_feature_axes: int = 1, **settings):
    """Makes parameters and running values; the settings are the neuron's.

    Args:
      *args: those of `SpikingNeuron`.
      num_feature_axes: see above.
      **settings: those of `SpikingNeuron`.
    """
    super().__init__(*args, **settings)
    self.num_feature_axes = num_feature_axes

  def __call__(  # type: ignore[override]
    self, carry: NeuronState, x, use_running_average=None
  ):
    """One timestep.

    Args:
      carry: the `NeuronState` before it; its t may be [B]. Of examples at
        different timesteps the running thresholds are NaN, and not changed.
      x: pre-synaptic input, [B, ...].
      use_running_average: overrides the attribute.

    Returns:
      (state, spikes [B, ...]).
    """
    length, known = _length_of_rnn(carry.t), self._length
    if self.beyond == 'error' and length and known and length > known:
      raise ValueError(
        f'Expected at most T = {known} timesteps, as num_steps says, got an '
        f"nnx.RNN over {length}. For another T, beyond='hold' lets the last "
        'running value go on, and resize_time(variables, num_steps) makes '
        'variables of it.'
      )
    x = jnp.asarray(x)
    start = self.initialize_carry(x.shape)
    spikes, state = super().__call__(
      x[None],
      use_running_average,
      state=carries.of_all(carry, start),
      return_state=True,
    )
    return carries.of_examples(state, carry, start), spikes[0]

  def initialize_carry(self, input_shape, rngs=None, carry_init=None):
    """The state at rest, for x of shape [B, ...].

    Args:
      input_shape: x's.
      rngs: for `carry_init`.
      carry_init: an initializer of the membrane; None for neurons at rest.

    Returns:
      A `NeuronState`, its t and theta [B].
    """
    init = carry_init
    if carry_init is not None:
      stream = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
      init = functools.partial(carry_init, stream and stream())
    return carries.initial(
      input_shape,
      self.dtype,
      self.param_dtype,
      self.parameters(),
      self._rules,
      init,
    )


def _length_of_rnn(t):
  """T of the `nnx.RNN` that carries the time t; None if there is no such one.

  The body of a scan cannot ask for its length, and past the end of the running
  thresholds it would be too late for an error.
  """
  frame, carried = inspect.currentframe(), False
  while frame and frame.f_code is not nnx.RNN.__call__.__code__:
    if frame.f_code.co_name == 'scan_fn':
      carry = jax.tree.leaves(frame.f_locals.get('carry'))
      carried = any(leaf is t for leaf in carry)
    frame = frame.f_back
  if frame and carried and 'time_axis' in frame.f_locals:
    return frame.f_locals['inputs'].shape[frame.f_locals['time_axis']]
  return None
