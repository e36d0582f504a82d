"""Neurons with recurrent weights, and a leaky readout, for Flax Linen."""

import functools
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from dsatgo_jax import layers, neurons, recurrent
from dsatgo_jax.linen.neuron import SpikingNeuron
from dsatgo_jax.neurons import NeuronState


class FeedbackNeuron(SpikingNeuron):
  """`SpikingNeuron` with dynamics of its own, a function in `recurrent`'s way.

  `feedback=recurrent.current(0.5)` puts a synaptic current before the membrane
  (CuBa), `recurrent.adapting(0.9, 0.1)` an adaptation into it (ALIF).
  `analysis.flow` tells nothing of this layer.

  Attributes:
    feedback: `feedback(x, spikes, memory) -> (x, memory)`; see `recurrent`.
  """

  feedback: recurrent.Feedback = recurrent.current()

  @nn.nowrap
  def _scan(self, x):
    return functools.partial(recurrent.run, feedback=self.feedback)

  @nn.nowrap
  def _probes(self, x, per_step):
    return None


class SpikingRNN(SpikingNeuron):
  """`SpikingNeuron` whose spikes come back, weighted, a timestep later.

  `u[t] = decay * v[t-1] + x[t] + s[t-1] @ recurrent_kernel`, the weights [C, C]
  for x [T, B, ..., C]; weights of the input are a layer before it. Equal to
  `nn.RNN` around a cell of a `SpikingCell` and such weights, but takes masks,
  and recordings in parts. `analysis.flow` tells nothing of this layer.

  Attributes:
    recurrent_kernel_init: of the weights.
  """

  recurrent_kernel_init: Callable[..., Any] = nn.initializers.orthogonal()

  @nn.nowrap
  def _scan(self, x):
    shape = 2 * x.shape[-1:]
    kernel = self.param(
      'recurrent_kernel', self.recurrent_kernel_init, shape, self.param_dtype
    )
    return functools.partial(recurrent.run, feedback=recurrent.weights(kernel))

  @nn.nowrap
  def _probes(self, x, per_step):
    return None


class LeakyIntegrator(nn.Module):
  """Membranes that leak and do not fire: `v[t] = decay * v[t-1] + x[t]`.

  Attributes:
    decay: the retained fraction of the membrane, in (0, 1) if learnt: a number,
      or a tuple or array of numbers that broadcasts against x[0].
    learn_decay: `decay = sigmoid(w)`, w of decay's shape.
    dtype: of the membranes; None for x's.
    param_dtype: of `w`.
  """

  decay: Any = 0.9
  learn_decay: bool = True
  dtype: Any = None
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    self.decay = layers.static(self.decay)
    super().__post_init__()

  @overload
  def __call__(
    self,
    x: ArrayLike,
    *,
    state: NeuronState | None = None,
    return_state: Literal[False] = False,
  ) -> jax.Array: ...

  @overload
  def __call__(
    self,
    x: ArrayLike,
    *,
    state: NeuronState | None = None,
    return_state: Literal[True],
  ) -> tuple[jax.Array, NeuronState]: ...

  @nn.compact
  def __call__(self, x, *, state=None, return_state=False):
    """Integrates x.

    Args:
      x: pre-synaptic input, [T, B, ...]; integers are taken as float32.
      state: the `NeuronState` to go on from; None for membranes at rest.
      return_state: whether the state after x is returned too.

    Returns:
      Membranes [T, B, ...], or (membranes, state).

    Raises:
      ValueError: decay out of its range, or what `recurrent.integrate` raises.
    """
    layers.check_shares(self.decay, self.learn_decay, momentum=0)
    decay = self.decay
    if self.learn_decay:
      w = neurons.logit(decay)
      start = nn.initializers.constant(w)
      w = self.param('w', start, jnp.shape(w), self.param_dtype)
      decay = jax.nn.sigmoid(w)
    membranes, state = recurrent.integrate(
      x, decay, state=state, dtype=self.dtype
    )
    return (membranes, state) if return_state else membranes
