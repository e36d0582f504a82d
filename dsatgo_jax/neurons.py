"""The spiking neuron: one timestep, and the scan over time.

`dynamics` has the equations. State goes in and comes out. Called outside `jit`,
these functions compile at the first call with the same shapes and settings.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsatgo_jax import fused as fused_scan
from dsatgo_jax import methods, statistics, surrogate, threshold, width, xla
from dsatgo_jax.dynamics import (
  PATHS,
  RECORDS,
  RESETS,
  Settings,
  plain,
  presynaptic,
)
from dsatgo_jax.dynamics import NeuronState as NeuronState
from dsatgo_jax.dynamics import Parameters as Parameters
from dsatgo_jax.dynamics import Record as Record
from dsatgo_jax.dynamics import Running as Running
from dsatgo_jax.dynamics import at_rest as at_rest
from dsatgo_jax.probes import SUMS, zeros


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
  cut: Sequence[str] = (),
  axis_name=None,
  dtype=None,
  record: bool | Sequence[str] = False,
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
    cut: ways of the gradient into u, of 'spatial', 'leak' and 'reset', that
      pass none; 'reset' is what `detach_reset` cuts.
    axis_name: mapped axis over which the statistics are pooled.
    dtype: of the spikes; None for x's.
    record: what to compute for the `Record`, of 'activity', 'histogram' and
      'membrane'; True is 'activity'.

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
    cut=cut,
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
  cut: Sequence[str] = (),
  axis_name=None,
  dtype=None,
  record: bool | Sequence[str] = False,
  fused: bool | None = None,
  probes: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, NeuronState, Record]:
  """All timesteps of a sequence.

  A membrane that is infinite or undefined shows: its spikes are NaN in
  inference, and in training those of the whole layer, whose statistics it is
  in. Padding that `mask` marks is in no statistic; what it fires is not zero.

  Args:
    x: pre-synaptic input, [T, B, ...].
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
    cut: ways of the gradient into u, of 'spatial', 'leak' and 'reset', that
      pass none; 'reset' is what `detach_reset` cuts.
    axis_name: mapped axis over which the statistics are pooled. None under
      `pmap` or `shard_map` warns; () says that they are each device's own.
    dtype: of the spikes; None for x's.
    record: what to compute for the `Record`, of 'activity', 'histogram' and
      'membrane'; True is 'activity'.
    fused: True runs a backward pass that keeps x and the statistics alone and
      computes the rest from them again, beyond 16 timesteps in chunks of about
      sqrt(T) / 2, whose first membranes it keeps; False leaves the scan to
      autodiff, which forward mode needs. The derivatives are the same, at any
      order of reverse mode. None is False for surrogates that
      `surrogate.straight_through` made, else True; with probes it is True.
    probes: zeros whose gradients tell of the gradients here, by name; see the
      module `probes`.

  Returns:
    Spikes [T, B, ...], the state after the last timestep, and the `Record`,
    each of its fields [T]. Of these u and v alone carry a gradient.

  Raises:
    ValueError: x has no batch axis or is not floating point; a parameter does
      not broadcast against x[0], or must be positive and is not; running
      averages, state or mask do not fit x; an unknown method or reset, or one
      neuron in all.
  """
  x = jnp.asarray(x)
  if x.ndim < 2 or not x.shape[0] or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f'Expected floating-point x [T, B, ...], got {x.dtype}{list(x.shape)}.'
    )
  if reset not in RESETS:
    raise ValueError(
      f'Expected reset to be one of {", ".join(map(repr, RESETS))}, '
      f'got {reset=}.'
    )
  cut = (*cut, *detach_reset * ('reset',))
  if isinstance(record, bool):
    record = record * ('activity',)
  method = methods.get(method)
  parameters = _checked(parameters, method, reset, x)
  settings = Settings(
    method, surrogate, reset, _chosen('cut', cut, PATHS), axis_name,
    jnp.dtype(dtype or x.dtype), _chosen('record', record, RECORDS),
    state is None,
  )  # fmt: skip
  probes = dict(probes or {})
  for name, probe in probes.items():
    if probe.shape != (shape := zeros(name, x).shape):
      raise ValueError(
        f'Expected the probe {name!r} for x of shape {x.shape} to be of shape '
        f'{shape}, got shape {probe.shape}.'
      )
  if state is None:
    state = at_rest(x[0])
  if state.v.shape != x.shape[1:]:
    raise ValueError(
      f'Expected a state for x[0] of shape {x.shape[1:]}, got {state.v.shape=}.'
    )
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
  return _run(
    settings, fused, x, state, parameters, running, over_time(mask, x), probes
  )


# So that eager calls compile once; within a program XLA dissolves it.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(settings, fused, x, state, parameters, running, mask, probes):
  if 'u' in probes:
    x = presynaptic(x, parameters) + probes['u']
    parameters = parameters._replace(norm=None)
  v = xla.vary_like(x, state.v.astype(parameters.decay.dtype))
  inputs = settings, x, v, state.t, parameters, running, mask
  sums = {name: probes[name] for name in SUMS if name in probes}
  if fused or sums:
    spikes, v, happened = fused_scan.run(*inputs, sums)
  else:
    spikes, v, happened = plain(*inputs)
  if 's' in probes:
    spikes += probes['s'].astype(spikes.dtype)
  state = NeuronState(v, state.t + x.shape[0])
  membranes = {'u': happened.u, 'v': happened.v}
  return spikes, state, lax.stop_gradient(happened)._replace(**membranes)


def _chosen(name, chosen, known):
  """The names chosen of the known ones, in their order."""
  if unknown := set(chosen).difference(known):
    raise ValueError(
      f'Expected {name} to be of {", ".join(map(repr, known))}, '
      f'got {", ".join(map(repr, sorted(unknown)))}.'
    )
  return tuple(one for one in known if one in chosen)


def _checked(parameters, method, reset, x):
  """The parameters as arrays of the membrane's dtype."""
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
  return _arrays(parameters, x.dtype)


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


def over_time(mask, x):
  """A mask [T, B] of x [T, B, ...].

  Args:
    mask: [T, B] or [B]; None for no mask.
    x: [T, B, ...].

  Returns:
    [T, B], or None.

  Raises:
    ValueError: it is of another shape.
  """
  if mask is None:
    return None
  mask = jnp.asarray(mask, bool)
  if mask.shape not in (x.shape[:2], x.shape[1:2]):
    raise ValueError(
      f'Expected a mask [T, B] or [B] for x [T, B, ...] of shape {x.shape}, '
      f'got shape {mask.shape}.'
    )
  return jnp.broadcast_to(mask, x.shape[:2])


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
  record: Sequence[str] = (),
  **settings,
) -> tuple[jax.Array, NeuronState, dict[str, dict], Running]:
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
    record: which of `COLLECTIONS` to fill.
    **settings: further arguments of `run`.

  Returns:
    Spikes and state of `run`; what happened, by collection and name; and the
    new running averages.

  Raises:
    ValueError: what `run` raises; x is not the whole recording, or reaches
      past its end. Where `state.t` is traced this can't be seen: timesteps past
      the end then fire NaN in inference, and change no average in training.
  """
  start = 0 if whole or state is None else state.t
  _check_length(x, start, num_steps, whole)
  times = start + np.arange(x.shape[0], dtype=np.int32)
  here = running
  if not whole:
    here = jax.tree.map(
      lambda a: a.at[times].get(mode='fill', fill_value=jnp.nan), running
    )
  mask = over_time(mask, x)
  spikes, state, happened = run(
    x,
    parameters,
    method,
    state=state,
    running=here if use_running_average else None,
    mask=mask,
    record=[COLLECTIONS[name] for name in record],
    **settings,
  )
  told = _told(spikes, happened, mask, settings.get('axis_name'))
  told = {name: told[name]() for name in record}
  if not use_running_average:
    measured = Running(
      *(
        None if average is None else value
        for average, value in zip(running, happened[:2], strict=True)
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
  return spikes, state, told, running


# Where the modules put what happened, and the part of the `Record` it is.
COLLECTIONS = {
  'spiking': 'activity',
  'histograms': 'histogram',
  'membranes': 'membrane',
}


def _told(spikes, happened, mask, axis_name):
  """What goes into each of the collections, as functions."""

  def activity():
    fired = lax.stop_gradient(spikes != 0)
    real = True if mask is None else _like(mask, fired)
    pooled = {
      'axis_name': axis_name,
      'mask': None if mask is None else jnp.any(mask, 0),
    }
    return happened.scalars() | {
      'silent_share': statistics.share(~jnp.any(fired & real, 0), **pooled),
      'always_share': statistics.share(
        jnp.all(fired | ~jnp.asarray(real), 0), **pooled
      ),
    }

  return {
    'spiking': activity,
    'histograms': lambda: {'membrane': happened.histogram},
    'membranes': lambda: {'u': happened.u, 'v': happened.v, 'spikes': spikes},
  }


def _like(mask, x):
  """A mask with x's axes."""
  return lax.expand_dims(mask, range(mask.ndim, x.ndim))


def _check_length(x, start, num_steps, whole):
  """Raises a `ValueError` for timesteps that the neuron does not have."""
  if num_steps is None:
    return
  known = not isinstance(start, jax.core.Tracer)
  end = x.shape[0] + (int(start) if known else 0)
  if end > num_steps or (whole and end != num_steps):
    raise ValueError(
      'This neuron was built for so many timesteps (num_steps, or its running '
      f'values): expected T = {num_steps} in all, got x with T = {x.shape[0]}'
      + (f' from timestep {int(start)} on' if known and start else '')
      + f', of shape {x.shape}. x is [T, B, ...], time first.'
    )


def logit(decay):
  """PLIF's `w` for a decay: `decay = sigmoid(w)`; -log(4) for 0.2."""
  if np.ndim(decay):
    return np.log(decay) - np.log1p(-np.asarray(decay))
  return math.log(decay / (1 - decay))


def check_shares(decay, learn_decay, momentum):
  """Raises a `ValueError` for a decay or a momentum out of its range."""
  low, high = np.min(decay), np.max(decay)
  if not (0 < low <= high < 1 if learn_decay else 0 <= low <= high <= 1):
    raise ValueError(
      'Expected 0 <= decay <= 1, the retained fraction, both ends excluded if '
      f'it is learnt, got {decay=}, {learn_decay=}.'
    )
  if not 0 <= momentum <= 1:
    raise ValueError(f'Expected 0 <= momentum <= 1, got {momentum=}.')


def check_positive(**values):
  """Raises a `ValueError` for a number, or an array, that is not positive."""
  for name, value in values.items():
    if value is not None and not isinstance(value, jax.core.Tracer):
      if not np.all(np.asarray(value) > 0):
        raise ValueError(f'Expected {name} > 0, got {name}={value}.')
