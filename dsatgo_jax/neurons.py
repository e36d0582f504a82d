"""The spiking neuron: one timestep, and the scan over time.

`dynamics` has the equations. State goes in and comes out. Called outside `jit`,
these functions compile at the first call with the same shapes and settings.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsatgo_jax import (
  devices,
  dtypes,
  dynamics,
  methods,
  tdbn,
  threshold,
  width,
  xla,
)
from dsatgo_jax import fused as fused_scan
from dsatgo_jax import surrogate as surrogates
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
from dsatgo_jax.dynamics import Reset as Reset
from dsatgo_jax.dynamics import Running as Running
from dsatgo_jax.dynamics import at_rest as at_rest
from dsatgo_jax.probes import SUMS, zeros


def step(
  state: NeuronState | None,
  x: jax.Array,
  parameters: Parameters = Parameters(),  # noqa: B008, a constant
  method: methods.Name | methods.Method = 'ds_atgo',
  *,
  running: Running | None = None,
  mask=None,
  surrogate: surrogates.Name | surrogates.Spike = 'rectangular',
  reset: Reset = 'hard',
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
    surrogate: a name of `surrogate.SURROGATES`, or a function like them.
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
  method: methods.Name | methods.Method = 'ds_atgo',
  *,
  state: NeuronState | None = None,
  running: Running | None = None,
  mask=None,
  surrogate: surrogates.Name | surrogates.Spike = 'rectangular',
  reset: Reset = 'hard',
  detach_reset: bool = False,
  cut: Sequence[str] = (),
  axis_name=None,
  dtype=None,
  record: bool | Sequence[str] = False,
  fused: bool | None = None,
  kernel: str = 'xla',
  probes: Mapping[str, jax.Array] | None = None,
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
    surrogate: a name of `surrogate.SURROGATES`, or a function like them.
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
    kernel: 'xla', or 'pallas' for kernels of our own in programs for NVIDIA
      GPUs: fewer, which move less memory; see the module `kernels` for where
      they are taken. Elsewhere, and for second derivatives, it is 'xla'.
    probes: zeros whose gradients tell of the gradients here, by name; see the
      module `probes`.

  Returns:
    Spikes [T, B, ...], the state after the last timestep, and the `Record`,
    each of its fields [T]. Of these u and v alone carry a gradient.

  Raises:
    ValueError: x has no batch axis or is complex; a parameter does not
      broadcast against x[0], or must be positive and is not; running averages,
      state or mask do not fit x; an unknown method, surrogate, reset or kernel,
      a dtype that is not floating point, or a single neuron in all, which has
      no deviation.
  """
  x = sequence(x)
  if reset not in RESETS:
    raise ValueError(
      f'Expected reset to be one of {", ".join(map(repr, RESETS))}, '
      f'got {reset=}.'
    )
  cut = (*cut, *detach_reset * ('reset',))
  if isinstance(record, bool):
    record = record * ('activity',)
  method = methods.get(method)
  settings = Settings(
    method, surrogates.get(surrogate), reset, _chosen('cut', cut, PATHS),
    axis_name, dtypes.floating(dtype or x.dtype),
    _chosen('record', record, RECORDS), state is None,
    *_chosen('kernel', (kernel,), KERNELS),
  )  # fmt: skip
  probes = dict(probes or {})
  for name, probe in probes.items():
    if probe.shape != (shape := zeros(name, x).shape):
      raise ValueError(
        f'Expected the probe {name!r} for x of shape {x.shape} to be of shape '
        f'{shape}, got shape {probe.shape}.'
      )
  state = jax.tree.map(jnp.asarray, state)
  if state is not None:
    check_state(x, state)
  parameters = _checked(
    parameters, method, reset, x, (x if state is None else state.v).dtype
  )
  if state is None:
    state = at_rest(x[0], parameters, method)
  elif dynamics.follows(method):
    rest = at_rest(x[0], parameters, method)
    theta = rest.theta if state.theta is None else state.theta
    if theta.shape != rest.theta.shape:
      raise ValueError(
        f'Expected a state with a threshold of shape {rest.theta.shape}, got '
        f'{state.theta.shape=}.'
      )
    state = state._replace(theta=theta.astype(rest.theta.dtype))
  for name, average in (running or Running())._asdict().items():
    if average is not None and not (
      average.shape[:1] == x.shape[:1] and _fits(average[0], x[0])
    ):
      raise ValueError(
        f'Expected a running {name} for the {x.shape[0]} timesteps of x, '
        f'got shape {average.shape}.'
      )
  if running is None:
    devices.warn_if_not_pooled(axis_name, x)
  if fused is None:
    fused = not getattr(settings.surrogate, 'forward_mode', False)
  fused &= 0 not in x.shape  # An empty batch needs no saving.
  return _run(
    settings,
    fused,
    x,
    state,
    parameters,
    running,
    tdbn.mask_of(x, mask),
    probes,
  )


# Who makes the fused scan's kernels on a GPU.
KERNELS = ('xla', 'pallas')


# So that eager calls compile once; within a program XLA dissolves it.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(settings, fused, x, state, parameters, running, mask, probes):
  def scan(x, state, parameters, running, mask, probes):
    if 'u' in probes:
      x = presynaptic(x, parameters) + probes['u']
      parameters = parameters._replace(norm=None)
    v = xla.vary_like(x, state.v.astype(parameters.decay.dtype))
    before = None
    if dynamics.follows(settings.method):
      before = xla.vary_like(x, state.theta)
    inputs = settings, x, v, state.t, before, parameters, running, mask
    sums = {name: probes[name] for name in SUMS if name in probes}
    if fused or sums:
      spikes, v, happened = fused_scan.run(*inputs, sums)
    else:
      spikes, v, happened = plain(*inputs)
    if 's' in probes:
      spikes += probes['s'].astype(spikes.dtype)
    theta = None if state.theta is None else happened.theta[-1]
    state = NeuronState(v, state.t + x.shape[0], theta)
    membranes = {'u': happened.u, 'v': happened.v}
    return spikes, state, lax.stop_gradient(happened)._replace(**membranes)

  spec = jax.typeof(x).sharding.spec
  of_record = dict.fromkeys(Record._fields, jax.P()) | {'u': spec, 'v': spec}
  level = None if state.theta is None else jax.P()
  of_state = NeuronState(jax.P(*spec[1:]), jax.P(), level)
  scan = xla.automatic(
    scan,
    (spec, of_state, Record(**of_record)),
  )
  return scan(x, state, parameters, running, mask, probes)


def _chosen(name, chosen, known):
  """The names chosen of the known ones, in their order."""
  if unknown := set(chosen).difference(known):
    raise ValueError(
      f'Expected {name} to be of {", ".join(map(repr, known))}, '
      f'got {", ".join(map(repr, sorted(unknown)))}.'
    )
  return tuple(one for one in known if one in chosen)


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
  check_fits(x, **{name: getattr(parameters, name) for name in _NUMBERS})
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
  return arrays(parameters, dtypes.wide(x.dtype, dtype))


_NUMBERS = ('decay', 'v_th', 'f_c', 'width')


def arrays(parameters, dtype):
  """All numbers as arrays, at least float32."""
  dtype = dtypes.wide(dtype or jnp.float32)
  numbers = {name: jnp.asarray(getattr(parameters, name)) for name in _NUMBERS}
  return jax.tree.map(
    lambda p: jnp.asarray(p, dtype), parameters._replace(**numbers)
  )


def check_fits(x, **values):
  """Raises a `ValueError` for a number that does not broadcast against x[0]."""
  for name, value in values.items():
    if not _fits(value, x[0]):
      raise ValueError(
        f'Expected {name} to be a number, or an array that broadcasts against '
        f'x[0] of shape {x.shape[1:]}, got shape {np.shape(value)}.'
      )


def check_state(x, state):
  """Raises a `ValueError` for a state of other membranes than x[0]'s."""
  if state.v.shape != x.shape[1:]:
    raise ValueError(
      f'Expected a state for x[0] of shape {x.shape[1:]}, got {state.v.shape=}.'
    )


def _fits(value, x):
  """Whether a parameter broadcasts against x."""
  shape = np.shape(value)
  return len(shape) <= x.ndim and all(
    size in (1, of_x)
    for size, of_x in zip(shape[::-1], x.shape[::-1], strict=False)
  )


def logit(decay):
  """PLIF's `w` for a decay: `decay = sigmoid(w)`; -log(4) for 0.2."""
  if isinstance(decay, jax.core.Tracer):
    return jax.scipy.special.logit(decay)
  if np.ndim(decay):
    return np.log(decay) - np.log1p(-np.asarray(decay))
  return math.log(decay / (1 - decay))


def check_positive(**values):
  """Raises a `ValueError` for a number, or an array, that is not positive."""
  for name, value in values.items():
    if value is not None and not isinstance(value, jax.core.Tracer):
      if not np.all(np.asarray(value) > 0):
        raise ValueError(f'Expected {name} > 0, got {name}={value}.')
