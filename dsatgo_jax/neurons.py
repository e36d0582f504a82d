"""The spiking neuron: one timestep, and the scan over time.

`dynamics` has the equations. State goes in and comes out.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsatgo_jax import fused as fused_scan
from dsatgo_jax import methods, statistics, surrogate, xla
from dsatgo_jax.dynamics import NeuronState as NeuronState
from dsatgo_jax.dynamics import Parameters as Parameters
from dsatgo_jax.dynamics import Record as Record
from dsatgo_jax.dynamics import Running as Running
from dsatgo_jax.dynamics import Settings, plain
from dsatgo_jax.dynamics import at_rest as at_rest
from dsatgo_jax.threshold import is_measured


def step(
  state: NeuronState | None,
  x: jax.Array,
  parameters: Parameters = Parameters(),  # noqa: B008, a constant
  method: str | methods.Method = 'ds_atgo',
  *,
  running: Running | None = None,
  surrogate: Callable = surrogate.rectangular,
  reset: str = 'hard',
  detach_reset: bool = False,
  axis_name=None,
  dtype=None,
  record: bool = False,
) -> tuple[jax.Array, NeuronState, Record]:
  """One timestep.

  Args:
    state: the state before it; None for a neuron at rest.
    x: pre-synaptic input, [B, ...].
    parameters: the neuron's numbers.
    method: a name of `methods.METHODS`, or a `methods.Method`.
    running: running averages of this timestep, scalars: inference. None
      measures this batch: training.
    surrogate: see the module of that name.
    reset: 'hard' or 'soft'.
    detach_reset: whether the reset passes no gradient to the spike.
    axis_name: mapped axis over which the statistics are pooled.
    dtype: of the spikes; None for x's.
    record: whether to compute all fields of the `Record`.

  Returns:
    Spikes [B, ...], the state after the timestep, and the `Record`.

  Raises:
    ValueError: an unknown method or reset, a number that must be positive and
      is not, or one neuron in all.
  """
  spikes, state, happened = run(
    x[None],
    parameters,
    method,
    state=state,
    running=jax.tree.map(lambda a: jnp.asarray(a)[None], running),
    surrogate=surrogate,
    reset=reset,
    detach_reset=detach_reset,
    axis_name=axis_name,
    dtype=dtype,
    record=record,
    fused=False,
  )
  return spikes[0], state, jax.tree.map(lambda a: a[0], happened)


def run(
  x: jax.Array,
  parameters: Parameters = Parameters(),  # noqa: B008, a constant
  method: str | methods.Method = 'ds_atgo',
  *,
  state: NeuronState | None = None,
  running: Running | None = None,
  surrogate: Callable = surrogate.rectangular,
  reset: str = 'hard',
  detach_reset: bool = False,
  axis_name=None,
  dtype=None,
  record: bool = False,
  fused: bool = True,
) -> tuple[jax.Array, NeuronState, Record]:
  """All timesteps of a sequence.

  Args:
    x: pre-synaptic input, [T, B, ...].
    parameters: the neuron's numbers.
    method: a name of `methods.METHODS`, or a `methods.Method`.
    state: the state to go on from; None for a neuron at rest.
    running: running averages of x's timesteps, [T]: inference. None measures
      this batch: training.
    surrogate: see the module of that name.
    reset: 'hard' or 'soft'.
    detach_reset: whether the reset passes no gradient to the spike.
    axis_name: mapped axis over which the statistics are pooled.
    dtype: of the spikes; None for x's.
    record: whether to compute all fields of the `Record`.
    fused: True runs a backward pass that keeps x and the statistics alone and
      computes the rest from them again, beyond 16 timesteps in chunks of about
      sqrt(T) / 2, whose first membranes it keeps; False leaves the scan to
      autodiff. The derivatives are the same, at any order of reverse mode.

  Returns:
    Spikes [T, B, ...], the state after the last timestep, and the `Record`,
    each of its fields [T]. Theta and width carry no gradient here.

  Raises:
    ValueError: x has no batch axis or is not floating point, T does not fit
      the running averages, an unknown method or reset, a number that must be
      positive and is not, or one neuron in all.
  """
  x = jnp.asarray(x)
  if x.ndim < 2 or not len(x) or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f'Expected floating-point x [T, B, ...], got {x.dtype}{list(x.shape)}.'
    )
  if reset not in ('hard', 'soft'):
    raise ValueError(f"Expected reset to be 'hard' or 'soft', got {reset=}.")
  check_positive(
    v_th=parameters.v_th, f_c=parameters.f_c, width=parameters.width
  )
  settings = Settings(
    methods.get(method), surrogate, reset, detach_reset, axis_name,
    jnp.dtype(dtype or x.dtype), record, state is None,
  )  # fmt: skip
  membrane_dtype = jnp.promote_types(x.dtype, jnp.float32)
  if state is None:
    state = at_rest(x[0])
  if state.v.shape != x.shape[1:]:
    raise ValueError(
      f'Expected a state for x[0] of shape {x.shape[1:]}, got {state.v.shape=}.'
    )
  v = xla.vary_like(x, state.v.astype(membrane_dtype))
  for name, average in (running or Running())._asdict().items():
    if average is not None and average.shape != x.shape[:1]:
      raise ValueError(
        f'Expected a running {name} for the {x.shape[0]} timesteps of x, '
        f'got shape {average.shape}.'
      )
  parameters = jax.tree.map(
    lambda p: jnp.asarray(p, membrane_dtype), parameters
  )
  scan = fused_scan.run if fused else plain
  spikes, v, happened = scan(settings, x, v, state.t, parameters, running)
  state = NeuronState(v, state.t + x.shape[0])
  return spikes, state, lax.stop_gradient(happened)


def initial_running(
  method: methods.Method, v_th, shape: tuple[int, ...], dtype=jnp.float32
) -> Running:
  """The running averages before training: `v_th`, where one is kept [eq 6].

  Args:
    method: the rules.
    v_th: the threshold's base value.
    shape: (T,), or () for a single timestep.
    dtype: of the input; the averages are at least float32.

  Returns:
    `Running`, with None for what the method does not measure.
  """
  start = jnp.full(shape, v_th, jnp.promote_types(dtype, jnp.float32))
  own_signal = method.signal is not method.threshold
  return Running(
    start if is_measured(method.threshold) else None,
    start if own_signal and is_measured(method.signal) else None,
  )


def layer(
  x: jax.Array,
  parameters: Parameters,
  method: methods.Method,
  running: Running,
  *,
  state: NeuronState | None,
  use_running_average: bool,
  momentum: float,
  **settings,
) -> tuple[jax.Array, NeuronState, Record, Running]:
  """`run`, and the running averages kept: what Linen's and NNX's modules do.

  Args:
    x: pre-synaptic input, [T, B, ...].
    parameters: the neuron's numbers.
    method: the rules.
    running: averages of a whole recording, [T]; scalars for a single timestep.
    state: the state before x, a part of the recording; None if x is all of it.
    use_running_average: inference by the averages; they stay as they are.
    momentum: the share of the old averages that is kept [eq 6].
    **settings: further arguments of `run`.

  Returns:
    Spikes, state and `Record` of `run`, and the new running averages.

  Raises:
    ValueError: what `run` raises; x is not the whole recording, or reaches
      past its end.
  """
  start = _start(running, state, x.shape[0])
  here = jax.tree.map(
    lambda a: lax.dynamic_slice_in_dim(jnp.atleast_1d(a), start, x.shape[0]),
    running,
  )
  spikes, state, record = run(
    x,
    parameters,
    method,
    state=state,
    running=here if use_running_average else None,
    **settings,
  )
  if not use_running_average:
    measured = Running(
      *(
        None if average is None else value
        for average, value in zip(running, record[:2], strict=True)
      )
    )
    new = jax.tree.map(
      lambda old, new: statistics.running_average(old, new, momentum),
      here,
      measured,
    )
    running = jax.tree.map(
      lambda a, new: lax.dynamic_update_slice_in_dim(
        jnp.atleast_1d(a), new, start, 0
      ).reshape(a.shape),
      running,
      new,
    )
  return spikes, state, record, running


def _start(running, state, num_steps):
  """The index of x's first timestep in the running averages."""
  averages = jax.tree.leaves(running)
  if state is None or not averages or averages[0].ndim == 0:
    start = 0
  else:
    start = state.t
  known = not isinstance(start, jax.core.Tracer)
  for average in averages:
    total = max(1, average.size)
    end = num_steps + (int(start) if known else 0)
    if end > total or (state is None and end != total):
      raise ValueError(
        'This neuron keeps one running value per timestep: expected T = '
        f'{total} in all, got x with T = {num_steps}'
        + (f' from timestep {int(start)} on.' if known and start else '.')
      )
  return start


def logit(decay: float) -> float:
  """PLIF's `w` for a decay: `decay = sigmoid(w)`; -log(4) for 0.2."""
  return math.log(decay / (1 - decay))


def check_shares(decay, learn_decay, momentum):
  """Raises a `ValueError` for a decay or a momentum out of its range."""
  if not (0 < decay < 1 if learn_decay else 0 <= decay <= 1):
    raise ValueError(
      'Expected 0 <= decay <= 1, the retained fraction, both ends excluded if '
      f'it is learnt, got {decay=}, {learn_decay=}.'
    )
  if not 0 <= momentum <= 1:
    raise ValueError(f'Expected 0 <= momentum <= 1, got {momentum=}.')


def check_positive(**values):
  """Raises a `ValueError` for a number that is not positive."""
  for name, value in values.items():
    if isinstance(value, int | float | np.number) and not value > 0:
      raise ValueError(f'Expected {name} > 0, got {name}={value}.')
