"""Layers with dynamics of their own: feedback of spikes, and a leaky readout.

`run` lets a function add to a neuron's input what it makes of the spikes of the
timestep before and of a memory of its own. Recurrent weights, a synaptic
current and an adaptation are such functions:

    weights   u[t] = decay * v[t-1] + x[t] + s[t-1] @ kernel
    current   u[t] = decay * v[t-1] + i[t],        i[t] = share * i[t-1] + x[t]
    adapting  u[t] = decay * v[t-1] + x[t] - a[t], a[t] = share * a[t-1]
                                                        + strength * s[t-1]

Thresholds and widths are the method's, as without them. `integrate` has
membranes that do not fire:

    v[t] = decay * v[t-1] + x[t]
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from dsatgo_jax import dtypes, methods, neurons, tdbn
from dsatgo_jax.dynamics import (
  NeuronState,
  Parameters,
  Record,
  at_rest,
  presynaptic,
)

_OF_RUN = 'fused', 'kernel', 'probes'

# `feedback(x, spikes, memory) -> (x, memory)`, of the input [B, ...] of a
# timestep, the spikes [B, ...] of the one before, and any tree of arrays, which
# begins as zeros: of the shapes that come out where None goes in.
Feedback = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def weights(kernel: jax.Array) -> Feedback:
  """Weights from the spikes to the next membranes.

  Args:
    kernel: [C, C].

  Returns:
    The `Feedback`; it has no memory.
  """
  return Partial(_weights, kernel)


def _weights(kernel, x, spikes, memory):
  channels = x.shape[-1:]
  if kernel.shape != channels * 2:
    raise ValueError(
      f'Expected a recurrent kernel {list(channels * 2)} for x[0] of shape '
      f'{x.shape}, got {list(kernel.shape)}.'
    )
  back = spikes @ kernel.astype(spikes.dtype)
  return x + back.astype(x.dtype), memory


def current(share: Any = 0.5) -> Feedback:
  """A synaptic current between input and membrane (CuBa).

  Args:
    share: what is retained of it; broadcasts against x[0].

  Returns:
    The `Feedback`; its memory is the current.
  """
  return Partial(_current, share)


def _current(share, x, spikes, memory):
  del spikes
  memory = x if memory is None else jnp.asarray(share, x.dtype) * memory + x
  return memory, memory


def adapting(share: Any = 0.9, strength: Any = 0.1) -> Feedback:
  """An adaptation current that a neuron's own spikes feed (ALIF).

  Args:
    share: what is retained of it; broadcasts against x[0].
    strength: what each spike adds to it, likewise.

  Returns:
    The `Feedback`; its memory is the adaptation.
  """
  return Partial(_adapting, share, strength)


def _adapting(share, strength, x, spikes, memory):
  share, strength = (jnp.asarray(a, x.dtype) for a in (share, strength))
  memory = jnp.zeros_like(x) if memory is None else memory
  memory = share * memory + strength * spikes.astype(x.dtype)
  return x - memory, memory


def run(
  x: jax.Array,
  parameters: Parameters = Parameters(),  # noqa: B008, a constant
  method: methods.Name | methods.Method = 'ds_atgo',
  *,
  feedback: Feedback,
  state: NeuronState | None = None,
  running: neurons.Running | None = None,
  mask=None,
  **settings,
) -> tuple[jax.Array, NeuronState, Record]:
  """`neurons.run` of neurons whose input hears of their last spikes.

  Args:
    x: pre-synaptic input from elsewhere, [T, B, ...].
    parameters: the neurons' numbers.
    method: a name of `methods.METHODS`, or a `methods.Method`.
    feedback: what becomes of an input, `(x, spikes, memory) -> (x, memory)`.
    state: the state to go on from; None for neurons at rest.
    running: running averages of x's timesteps, [T]: inference.
    mask: [T, B] or [B], whether an example is real; None for all of it.
    **settings: those of `neurons.step`; `fused`, `kernel` and `probes`, which
      `neurons.run` has besides, change nothing.

  Returns:
    As `neurons.run`; the state holds last spikes and memory, too.

  Raises:
    ValueError: what `feedback` or `neurons.run` raises.
  """
  x = neurons.sequence(x)
  method = methods.get(method)
  dtype = dtypes.floating(settings.get('dtype') or x.dtype)
  of_v = x.dtype if state is None else jnp.asarray(state.v).dtype
  wide = dtypes.wide(x.dtype, of_v)
  numbers = neurons.arrays(parameters, wide)
  x = presynaptic(x, numbers)
  parameters = parameters._replace(norm=None)
  start = at_rest(x[0], numbers, method)
  if state is not None:
    start = NeuronState(*jax.tree.map(jnp.asarray, state))
  silent = jnp.zeros_like(x[0], dtype)
  spikes, memory = start.memory or (silent, None)
  if memory is None:
    # Zeros of the shape that it takes.
    shapes = jax.eval_shape(lambda x, s: feedback(x, s, None)[1], x[0], silent)
    memory = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
  fixed = {k: v for k, v in settings.items() if k not in _OF_RUN}
  for name in fixed.keys() & {'cut', 'record'}:
    if not isinstance(fixed[name], bool):
      fixed[name] = tuple(fixed[name])
  fixed |= {'method': method, 'dtype': dtype}
  start = NeuronState(start.v.astype(wide), start.t, start.theta)
  carry = start, spikes.astype(dtype), memory
  inputs = x, running, tdbn.mask_of(x, mask)
  if not isinstance(feedback, Partial):
    feedback = Partial(feedback)
  return _run(tuple(fixed.items()), carry, inputs, parameters, feedback)


# So that eager calls compile once, as `neurons.run`.
@functools.partial(jax.jit, static_argnums=0)
def _run(fixed, carry, inputs, parameters, feedback):
  def step(carry, inputs):
    state, spikes, memory = carry
    x, running, mask = inputs
    x, memory = feedback(x, spikes, memory)
    spikes, state, happened = neurons.step(
      state, x, parameters, running=running, mask=mask, **dict(fixed)
    )
    return (state, spikes, memory), (spikes, happened)

  (end, *memory), (spikes, happened) = lax.scan(step, carry, inputs)
  return spikes, end._replace(memory=tuple(memory)), happened


def integrate(
  x: jax.Array,
  decay: Any = 0.9,
  *,
  state: NeuronState | None = None,
  dtype=None,
) -> tuple[jax.Array, NeuronState]:
  """Membranes that leak and do not fire: a readout.

  Args:
    x: pre-synaptic input, [T, B, ...]; integers are taken as float32.
    decay: the share of the membrane that is retained; a number, or an array
      that broadcasts against x[0].
    state: the state to go on from; None for membranes at rest.
    dtype: of the membranes that are returned; None for x's. Inside they are at
      least float32.

  Returns:
    The membranes [T, B, ...], and the state after the last timestep.

  Raises:
    ValueError: x has no batch axis or is complex, or decay or state do not fit
      it.
  """
  x = neurons.sequence(x)
  neurons.check_fits(x, decay=decay)
  state = jax.tree.map(jnp.asarray, at_rest(x[0]) if state is None else state)
  neurons.check_state(x, state)
  dtype = dtypes.floating(dtype or x.dtype)
  wide = dtypes.wide(x.dtype, state.v.dtype)
  v = state.v.astype(wide)
  v, membranes = _integrate(dtype, x, v, jnp.asarray(decay, wide))
  return membranes, NeuronState(v, state.t + len(x))


@functools.partial(jax.jit, static_argnums=0)
def _integrate(dtype, x, v, decay):
  def step(v, x):
    v = decay * v + x.astype(v.dtype)
    return v, v.astype(dtype)

  return lax.scan(step, v, x, unroll=len(x) <= 16)
