"""What a recurrent cell carries: a state with an axis of examples in front."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsatgo_jax import dtypes, methods
from dsatgo_jax.dynamics import NeuronState, Parameters, at_rest


def initial(
  shape: tuple[int, ...],
  dtype,
  param_dtype,
  parameters: Parameters,
  method: methods.Method,
  init: Callable[..., Any] | None = None,
) -> NeuronState:
  """A cell's state before the first timestep.

  Args:
    shape: x's, [B, ...].
    dtype: of the spikes, or None.
    param_dtype: of the parameters; the membrane is at least as wide as both.
    parameters: the neuron's numbers.
    method: the rules.
    init: `init(shape, dtype)`, the membrane; None for zeros.

  Returns:
    `NeuronState`, its t and theta with an axis [B] in front, so that RNNs can
    pick what belongs to an example.
  """
  dtype = dtypes.wide(dtype or jnp.float32, param_dtype)
  rest = at_rest(jax.ShapeDtypeStruct(shape, dtype), parameters, method)
  v = rest.v if init is None else init(shape, dtype)
  theta = jnp.broadcast_to(rest.theta, (*shape[:1], *rest.theta.shape))
  return NeuronState(v, jnp.zeros(shape[:1], jnp.int32), theta)


def of_all(carry: NeuronState, start: NeuronState) -> NeuronState:
  """A cell's carry as the state of a layer.

  Args:
    carry: its t and theta with an axis [B] in front, or without it.
    start: `initial`.

  Returns:
    `NeuronState`, its t of `shared_time`.
  """
  theta = carry.theta
  if theta is not None and jnp.ndim(theta) == start.theta.ndim:
    theta = theta[0] if len(theta) else None
  return NeuronState(carry.v, shared_time(carry.t), theta)


def of_examples(
  state: NeuronState, carry: NeuronState, start: NeuronState
) -> NeuronState:
  """The state of a layer after a timestep as a cell's carry.

  Args:
    state: `NeuronState`.
    carry: the one before.
    start: `initial`.

  Returns:
    `NeuronState`, of the shapes of `carry`.
  """
  theta = state.theta
  if theta is not None:
    like = start.theta if carry.theta is None else carry.theta
    theta = jnp.broadcast_to(theta, jnp.shape(like))
  return NeuronState(state.v, carry.t + 1, theta)


# The time of examples that are at different timesteps: past any end.
APART = np.iinfo(np.int32).max


def shared_time(t) -> jax.Array:
  """The timestep at which all examples of a cell's carry are.

  Args:
    t: [B], of which Flax's RNNs pick each example's last one by `seq_lengths`;
      or a scalar.

  Returns:
    A scalar. Where the examples are at different timesteps it is past the end
    of any recording; see `layers.layer`.
  """
  t = jnp.asarray(t)
  if not t.ndim:
    return t
  if 0 in t.shape:
    return jnp.zeros((), t.dtype)
  last = jnp.max(t)
  return jnp.where(last == jnp.min(t), last, APART)
