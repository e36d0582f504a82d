"""The spiking neuron: one timestep, and the scan over time.

`dynamics` has the equations. State goes in and comes out. Called outside `jit`,
these functions compile at the first call with the same shapes and settings.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsatgo_jax import fused as fused_scan
from dsatgo_jax import (
  methods,
  statistics,
  surrogate,
  tdbn,
  threshold,
  width,
  xla,
)
from dsatgo_jax.dynamics import RESETS, Settings, plain
from dsatgo_jax.dynamics import NeuronState as NeuronState
from dsatgo_jax.dynamics import Parameters as Parameters
from dsatgo_jax.dynamics import Record as Record
from dsatgo_jax.dynamics import Running as Running
from dsatgo_jax.dynamics import at_rest as at_rest


def step(
  state: NeuronState | None,
  x: jax.Array,
  parameters: Parameters = Parameters(),  # noqa: B008, a constant
  method: str | methods.Method = 'ds_atgo',
  *,
  running: Running | None = None,
  mask=None,
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
    mask: [B], whether an example is real; None for all of them.
    surrogate: see the module of that name.
    reset: 'hard', 'soft' or 'subtract_after_decay'.
    detach_reset: whether the reset passes no gradient to the spike.
    axis_name: mapped axis over which the statistics are pooled.
    dtype: of the spikes; None for x's.
    record: whether to compute all fields of the `Record`.

  Returns:
    Spikes [B, ...], the state after the timestep, and the `Record`.

  Raises:
    ValueError: what `run` raises.
  """
  spikes, state, happened = run(
    x[None],
    parameters,
    method,
    state=state,
    running=jax.tree.map(lambda a: jnp.asarray(a)[None], running),
    mask=mask,
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
  mask=None,
  surrogate: Callable = surrogate.rectangular,
  reset: str = 'hard',
  detach_reset: bool = False,
  axis_name=None,
  dtype=None,
  record: bool = False,
  fused: bool | None = None,
) -> tuple[jax.Array, NeuronState, Record]:
  """All timesteps of a sequence.

  A membrane that is infinite or undefined shows: its spikes are NaN in
  inference, and in training those of the whole layer, whose statistics it is
  in. Padding that `mask` marks is in no statistic; what it fires is not zero.

  Args:
    x: pre-synaptic input, [T, B, ...]; integers are taken as float32.
    parameters: the neuron's numbers.
    method: a name of `methods.METHODS`, or a `methods.Method`.
    state: the state to go on from; None for a neuron at rest.
    running: running averages of x's timesteps, [T]: inference. None measures
      this batch: training.
    mask: [T, B] or [B], whether an example is real at a timestep; None for all
      of them.
    surrogate: see the module of that name.
    reset: 'hard', 'soft' or 'subtract_after_decay'.
    detach_reset: whether the reset passes no gradient to the spike.
    axis_name: mapped axis over which the statistics are pooled. None under
      `pmap` or `shard_map` warns; () says that they are each device's own.
    dtype: of the spikes; None for x's.
    record: whether to compute all fields of the `Record`.
    fused: True runs a backward pass that keeps x and the statistics alone and
      computes the rest from them again, beyond 16 timesteps in chunks of about
      sqrt(T) / 2, whose first membranes it keeps; False leaves the scan to
      autodiff, which forward mode needs. The derivatives are the same, at any
      order of reverse mode. None is False for surrogates that
      `surrogate.straight_through` made, else True.

  Returns:
    Spikes [T, B, ...], the state after the last timestep, and the `Record`,
    each of its fields [T]. Theta and width carry no gradient here.

  Raises:
    ValueError: x has no batch axis or is complex; a parameter does not
      broadcast against x[0], or must be positive and is not; running averages,
      state or mask do not fit x; an unknown method or reset, a dtype that is
      not floating point, or a single neuron in all, which has no deviation.
  """
  x = sequence(x)
  if reset not in RESETS:
    raise ValueError(
      f'Expected reset to be one of {", ".join(map(repr, RESETS))}, '
      f'got {reset=}.'
    )
  method = methods.get(method)
  settings = Settings(
    method, surrogate, reset, detach_reset, axis_name,
    statistics.floating(dtype or x.dtype), record, state is None,
  )  # fmt: skip
  state = at_rest(x[0]) if state is None else jax.tree.map(jnp.asarray, state)
  if state.v.shape != x.shape[1:]:
    raise ValueError(
      f'Expected a state for x[0] of shape {x.shape[1:]}, got {state.v.shape=}.'
    )
  parameters = _checked(parameters, method, reset, x, state.v.dtype)
  for name, average in (running or Running())._asdict().items():
    if average is not None and not (
      average.shape[:1] == x.shape[:1] and _fits(average[0], x[0])
    ):
      raise ValueError(
        f'Expected a running {name} for the {x.shape[0]} timesteps of x, '
        f'got shape {average.shape}.'
      )
  if running is None:
    statistics.warn_if_not_pooled(axis_name, x)
  if fused is None:
    fused = not getattr(surrogate, 'forward_mode', False)
  fused &= 0 not in x.shape  # An empty batch needs no saving.
  return _run(
    settings, fused, x, state, parameters, running, tdbn.mask_of(x, mask)
  )


# So that eager calls compile once; within a program XLA dissolves it.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(settings, fused, x, state, parameters, running, mask):
  def scan(x, state, parameters, running, mask):
    v = xla.vary_like(x, state.v.astype(parameters.decay.dtype))
    scan = fused_scan.run if fused else plain
    spikes, v, happened = scan(
      settings, x, v, state.t, parameters, running, mask
    )
    state = NeuronState(v, state.t + x.shape[0])
    return spikes, state, lax.stop_gradient(happened)

  spec = jax.typeof(x).sharding.spec
  scan = xla.automatic(
    scan, (spec, NeuronState(jax.P(*spec[1:]), jax.P()), jax.P())
  )
  return scan(x, state, parameters, running, mask)


def sequence(x) -> jax.Array:
  """X as layers of neurons take it.

  Args:
    x: pre-synaptic input, [T, B, ...].

  Returns:
    x; integers and truth values as float32.

  Raises:
    ValueError: it has no timestep or no batch axis, or is complex.
  """
  x = jnp.asarray(x)
  if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool:
    x = x.astype(jnp.float32)
  if x.ndim < 2 or not x.shape[0] or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      'Expected T >= 1 timesteps of real numbers, x [T, B, ...], got '
      f'{x.dtype}{list(x.shape)}.'
    )
  return x


def _checked(parameters, method, reset, x, dtype):
  """The parameters as arrays of the membrane's dtype: x's and the state's."""
  for name in _NUMBERS:
    value = getattr(parameters, name)
    if not _fits(value, x[0]):
      raise ValueError(
        f'Expected {name} to be a number, or an array that broadcasts against '
        f'x[0] of shape {x.shape[1:]}, got shape {np.shape(value)}.'
      )
  positive = {'f_c': parameters.f_c, 'width': parameters.width}
  if method.threshold is not threshold.learnable:  # It goes where it will.
    positive['v_th'] = parameters.v_th
  if reset == 'subtract_after_decay':
    positive['decay'] = parameters.decay
  check_positive(**positive)
  scale = parameters.tdbn_scale
  if method.width is width.mpd_agl and not isinstance(scale, jax.core.Tracer):
    check_positive(
      **{'the mean of tdbn_scale': None if scale is None else np.mean(scale)}
    )
  return _arrays(parameters, jnp.promote_types(x.dtype, dtype))


_NUMBERS = ('decay', 'v_th', 'f_c', 'width')


def _arrays(parameters, dtype):
  """All numbers as arrays, at least float32."""
  dtype = jnp.promote_types(dtype or jnp.float32, jnp.float32)
  numbers = {name: jnp.asarray(getattr(parameters, name)) for name in _NUMBERS}
  return jax.tree.map(
    lambda p: jnp.asarray(p, dtype), parameters._replace(**numbers)
  )


def _fits(value, x):
  """Whether a parameter broadcasts against x."""
  shape = np.shape(value)
  return len(shape) <= x.ndim and all(
    size in (1, of_x)
    for size, of_x in zip(shape[::-1], x.shape[::-1], strict=False)
  )


def averaged(method: methods.Method) -> dict[str, Callable]:
  """The rules of which a method keeps running averages, by `Running`'s names.

  Args:
    method: the rules.

  Returns:
    `{'threshold' or 'signal': rule}`.
  """
  own_signal = method.signal is not method.threshold
  rules = {'threshold': method.threshold}
  if own_signal and method.signal is not None:
    rules['signal'] = method.signal
  return {
    name: rule for name, rule in rules.items() if threshold.is_measured(rule)
  }


def initial_average(
  rule: Callable, parameters: Parameters, lead: tuple[int, ...], dtype=None
) -> jax.Array:
  """A running average before training: `v_th` [eq 6].

  Args:
    rule: what is averaged.
    parameters: the neuron's numbers.
    lead: (T,), or () for a single timestep.
    dtype: of the input; the averages are at least float32.

  Returns:
    [*lead, ...], the last axes those of what the rule gives, () for a scalar.
  """
  parameters = _arrays(parameters, dtype)
  scalar = jnp.zeros((), parameters.v_th.dtype)
  value = jax.eval_shape(
    rule, statistics.Statistics(scalar, scalar), parameters, jnp.int32(0)
  )
  # Always an array of its own, that can be donated.
  return jnp.zeros((*lead, *value.shape), scalar.dtype) + parameters.v_th


def layer(
  x: jax.Array,
  parameters: Parameters,
  method: methods.Method,
  running: Running,
  *,
  num_steps: int | None,
  state: NeuronState | None,
  whole: bool,
  use_running_average: bool,
  momentum: float,
  mask=None,
  **settings,
) -> tuple[jax.Array, NeuronState, Record, Running]:
  """`run`, and the running averages kept: what Linen's and NNX's modules do.

  Args:
    x: pre-synaptic input, [T, B, ...].
    parameters: the neuron's numbers.
    method: the rules.
    running: averages of a whole recording.
    num_steps: the timesteps of a whole recording; None for any number.
    state: the state before x.
    whole: whether x is all of the recording; else it begins at `state.t`.
    use_running_average: inference by the averages; they stay as they are.
    momentum: the share of the old averages that is kept [eq 6].
    mask: [T, B] or [B]; None for no mask.
    **settings: further arguments of `run`.

  Returns:
    Spikes, state and `Record` of `run`, and the new running averages.

  Raises:
    ValueError: what `run` raises; x is not the whole recording, or reaches
      past its end. Where `state.t` is traced this can't be seen: timesteps past
      the end then fire NaN in inference, and change no average in training.
  """
  x = sequence(x)
  running = jax.tree.map(jnp.asarray, running)
  # Of an empty batch nothing is learnt.
  use_running_average = use_running_average or 0 in x.shape
  start = 0 if whole or state is None else state.t
  _check_length(x, start, num_steps, whole)
  times = start + np.arange(x.shape[0], dtype=np.int32)
  here = running
  if not whole:
    here = jax.tree.map(
      lambda a: a.at[times].get(mode='fill', fill_value=jnp.nan), running
    )
  mask = tdbn.mask_of(x, mask)
  spikes, state, record = run(
    x,
    parameters,
    method,
    state=state,
    running=here if use_running_average else None,
    mask=mask,
    **settings,
  )
  if not use_running_average:
    measured = Running(
      *(
        None if average is None else value
        for average, value in zip(running, record[:2], strict=True)
      )
    )
    if mask is not None:
      seen = jnp.any(mask, 1)
      if axis_name := settings.get('axis_name'):
        seen = lax.pmax(seen.astype(jnp.int32), axis_name) > 0
      # Of a timestep without a real example nothing is learnt.
      measured = jax.tree.map(
        lambda a: jnp.where(
          lax.expand_dims(seen, range(1, a.ndim)), a, jnp.nan
        ),
        measured,
      )
    new = jax.tree.map(
      lambda old, new: statistics.running_average(old, new, momentum),
      here,
      measured,
    )
    running = (
      new
      if whole
      else jax.tree.map(
        lambda a, new: a.at[times].set(new, mode='drop'), running, new
      )
    )
  return spikes, state, record, running


def initial_carry(
  shape: tuple[int, ...], dtype, param_dtype, init: Callable | None = None
) -> NeuronState:
  """A cell's state before the first timestep.

  Args:
    shape: x's, [B, ...].
    dtype: of the spikes, or None.
    param_dtype: of the parameters; the membrane is at least as wide as both.
    init: `init(shape, dtype)`, the membrane; None for zeros.

  Returns:
    `NeuronState`, its t [B], so that RNNs can pick what belongs to an example.
  """
  dtype = jnp.promote_types(dtype or jnp.float32, param_dtype)
  dtype = jnp.promote_types(dtype, jnp.float32)
  return NeuronState(
    (init or jnp.zeros)(shape, dtype), jnp.zeros(shape[:1], jnp.int32)
  )


# The time of examples that are at different timesteps: past any end.
_APART = np.iinfo(np.int32).max


def shared_time(t) -> jax.Array:
  """The timestep at which all examples of a cell's carry are.

  Args:
    t: [B], of which Flax's RNNs pick each example's last one by `seq_lengths`;
      or a scalar.

  Returns:
    A scalar. Where the examples are at different timesteps it is past the end
    of any recording; see `layer`.
  """
  t = jnp.asarray(t)
  if not t.ndim:
    return t
  if 0 in t.shape:
    return jnp.zeros((), t.dtype)
  last = jnp.max(t)
  return jnp.where(last == jnp.min(t), last, _APART)


def _check_length(x, start, num_steps, whole):
  """Raises a `ValueError` for timesteps that the neuron does not have."""
  if num_steps is None:
    return
  known = not isinstance(start, jax.core.Tracer)
  start = int(start) if known else 0
  end = x.shape[0] + start
  if end > num_steps or (whole and end != num_steps):
    begin = f' from timestep {start} on' if start else ''
    if start == _APART:
      begin = ' from a different timestep on for each example'
    raise ValueError(
      'This neuron was built for so many timesteps (num_steps, or its running '
      f'values): expected T = {num_steps} in all, got x with T = {x.shape[0]}'
      f'{begin}, of shape {x.shape}. x is [T, B, ...], time first.'
    )


def logit(decay):
  """PLIF's `w` for a decay: `decay = sigmoid(w)`; -log(4) for 0.2."""
  if isinstance(decay, jax.core.Tracer):
    return jax.scipy.special.logit(decay)
  if np.ndim(decay):
    return np.log(decay) - np.log1p(-np.asarray(decay))
  return math.log(decay / (1 - decay))


def static(value):
  """A number as it is, an array as tuples of numbers: a setting with a hash.

  Args:
    value: a setting of a module; what is traced stays as it is.

  Returns:
    A number, or tuples.
  """
  if isinstance(value, jax.core.Tracer) or np.ndim(value) == 0:
    return value
  return tuple(static(item) for item in np.asarray(value).tolist())


def check_shares(decay, learn_decay, momentum):
  """Raises a `ValueError` for a decay or a momentum out of its range.

  What is traced is not checked.
  """
  if not isinstance(decay, jax.core.Tracer):
    low, high = np.min(decay), np.max(decay)
    if not (0 < low <= high < 1 if learn_decay else 0 <= low <= high <= 1):
      raise ValueError(
        'Expected 0 <= decay <= 1, the retained fraction, both ends excluded '
        f'if it is learnt, got {decay=}, {learn_decay=}.'
      )
  if not isinstance(momentum, jax.core.Tracer) and not 0 <= momentum <= 1:
    raise ValueError(f'Expected 0 <= momentum <= 1, got {momentum=}.')


def check_positive(**values):
  """Raises a `ValueError` for a number, or an array, that is not positive."""
  for name, value in values.items():
    if value is not None and not isinstance(value, jax.core.Tracer):
      if not np.all(np.asarray(value) > 0):
        raise ValueError(f'Expected {name} > 0, got {name}={value}.')
