"""Layers with dynamics of their own: recurrent weights, and a leaky readout.

Neurons whose spikes come back, `run`, and membranes that do not fire,
`integrate`:

    u[t] = decay * v[t-1] + x[t] + s[t-1] @ kernel
    v[t] = decay * v[t-1] + x[t]
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsatgo_jax import methods, neurons, statistics, tdbn
from dsatgo_jax.dynamics import (
  NeuronState,
  Parameters,
  Record,
  at_rest,
  presynaptic,
)

_OF_RUN = 'fused', 'probes'


def run(
  x: jax.Array,
  parameters: Parameters = Parameters(),  # noqa: B008, a constant
  method: methods.Name | methods.Method = 'ds_atgo',
  *,
  kernel: jax.Array,
  state: NeuronState | None = None,
  running: neurons.Running | None = None,
  mask=None,
  **settings,
) -> tuple[jax.Array, NeuronState, Record]:
  """`neurons.run` of neurons whose spikes come back a timestep later.

  Args:
    x: pre-synaptic input from elsewhere, [T, B, ..., C].
    parameters: the neurons' numbers.
    method: a name of `methods.METHODS`, or a `methods.Method`.
    kernel: weights from the spikes to the next membranes, [C, C].
    state: the state to go on from; None for neurons at rest.
    running: running averages of x's timesteps, [T]: inference.
    mask: [T, B] or [B], whether an example is real; None for all of it.
    **settings: those of `neurons.step`; `fused` and `probes`, which
      `neurons.run` has besides, change nothing.

  Returns:
    As `neurons.run`; the state holds the last spikes, too.

  Raises:
    ValueError: the kernel does not fit x, or what `neurons.run` raises.
  """
  x = neurons.sequence(x)
  channels = x.shape[-1:]
  if kernel.shape != channels * 2:
    raise ValueError(
      f'Expected a recurrent kernel {list(channels * 2)} for x of shape '
      f'{x.shape}, got {list(kernel.shape)}.'
    )
  dtype = statistics.floating(settings.get('dtype') or x.dtype)
  state = jax.tree.map(jnp.asarray, at_rest(x[0]) if state is None else state)
  spikes = state.spikes
  if spikes is None:
    spikes = jnp.zeros_like(x[0], dtype)
  wide = statistics.wide(x.dtype, state.v.dtype)
  x = presynaptic(x, neurons.arrays(parameters, wide))
  parameters = parameters._replace(norm=None)
  fixed = {k: v for k, v in settings.items() if k not in _OF_RUN}
  for name in fixed.keys() & {'cut', 'record'}:
    if not isinstance(fixed[name], bool):
      fixed[name] = tuple(fixed[name])
  fixed |= {'method': method, 'dtype': dtype}
  carry = NeuronState(state.v.astype(wide), state.t), spikes.astype(dtype)
  inputs = x, running, tdbn.mask_of(x, mask)
  return _run(tuple(fixed.items()), carry, inputs, parameters, kernel)


# So that eager calls compile once, as `neurons.run`.
@functools.partial(jax.jit, static_argnums=0)
def _run(fixed, carry, inputs, parameters, kernel):
  def step(carry, inputs):
    state, spikes = carry
    x, running, mask = inputs
    back = spikes @ kernel.astype(spikes.dtype)
    spikes, state, happened = neurons.step(
      state, x + back.astype(x.dtype), parameters,
      running=running, mask=mask, **dict(fixed),
    )  # fmt: skip
    return (state, spikes), (spikes, happened)

  (state, last), (spikes, happened) = lax.scan(step, carry, inputs)
  return spikes, state._replace(spikes=last), happened


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
  dtype = statistics.floating(dtype or x.dtype)
  wide = statistics.wide(x.dtype, state.v.dtype)
  v = state.v.astype(wide)
  v, membranes = _integrate(dtype, x, v, jnp.asarray(decay, wide))
  return membranes, NeuronState(v, state.t + len(x))


@functools.partial(jax.jit, static_argnums=0)
def _integrate(dtype, x, v, decay):
  def step(v, x):
    v = decay * v + x.astype(v.dtype)
    return v, v.astype(dtype)

  return lax.scan(step, v, x, unroll=len(x) <= 16)
