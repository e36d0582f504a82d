"""Neurons with recurrent weights, and a leaky readout, for Flax NNX."""

import functools
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from dsatgo_jax import layers, neurons, recurrent
from dsatgo_jax.neurons import NeuronState
from dsatgo_jax.nnx.neuron import SpikingNeuron


class FeedbackNeuron(SpikingNeuron):
  """Dynamics of one's own; see `dsatgo_jax.linen.FeedbackNeuron`."""

  def __init__(
    self,
    *args,
    feedback: recurrent.Feedback = recurrent.current(),  # noqa: B008
    **settings,
  ):
    """Makes parameters and running values.

    Args:
      *args: those of `SpikingNeuron`.
      feedback: `feedback(x, spikes, memory) -> (x, memory)`; see `recurrent`.
      **settings: those of `SpikingNeuron`.
    """
    super().__init__(*args, **settings)
    self.feedback = feedback

  def _scan(self):
    return functools.partial(recurrent.run, feedback=self.feedback)


class SpikingRNN(SpikingNeuron):
  """Neurons with recurrent weights; see `dsatgo_jax.linen.SpikingRNN`."""

  def __init__(
    self,
    num_features: int,
    *args,
    recurrent_kernel_init: Callable[..., Any] = nnx.initializers.orthogonal(),  # noqa: B008
    rngs: nnx.Rngs,
    **settings,
  ):
    """Makes parameters and running values.

    Args:
      num_features: C.
      *args: those of `SpikingNeuron`.
      recurrent_kernel_init: of the weights [C, C].
      rngs: for the weights.
      **settings: those of `SpikingNeuron`.
    """
    super().__init__(*args, **settings)
    self.recurrent_kernel = nnx.Param(
      recurrent_kernel_init(
        rngs.params(), (num_features, num_features), self.param_dtype
      )
    )

  def _scan(self):
    feedback = recurrent.weights(self.recurrent_kernel[...])
    return functools.partial(recurrent.run, feedback=feedback)


class LeakyIntegrator(nnx.Module):
  """Membranes that do not fire; see `dsatgo_jax.linen.LeakyIntegrator`."""

  def __init__(
    self,
    *,
    decay: Any = 0.9,
    learn_decay: bool = True,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs | None = None,
  ):
    """Makes the parameter; the settings are Linen's.

    Args:
      decay: the retained fraction of the membrane, in (0, 1) if learnt.
      learn_decay: `decay = sigmoid(w)`, `w` of decay's shape.
      dtype: of the membranes; None for x's.
      param_dtype: of `w`.
      rngs: not needed.

    Raises:
      ValueError: decay is out of its range.
    """
    del rngs
    self.decay, self.learn_decay = layers.static(decay), learn_decay
    self.dtype = dtype
    layers.check_shares(decay, learn_decay, momentum=0)
    if learn_decay:
      self.w = nnx.Param(jnp.asarray(neurons.logit(decay), param_dtype))

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

  def __call__(self, x, *, state=None, return_state=False):
    """Integrates x; arguments and errors as Linen's.

    Args:
      x: pre-synaptic input, [T, B, ...].
      state: the `NeuronState` to go on from; None for membranes at rest.
      return_state: whether the state after x is returned too.

    Returns:
      Membranes [T, B, ...], or (membranes, state).
    """
    membranes, state = recurrent.integrate(
      x,
      jax.nn.sigmoid(self.w[...]) if self.learn_decay else self.decay,
      state=state,
      dtype=self.dtype,
    )
    return (membranes, state) if return_state else membranes
