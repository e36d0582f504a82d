"""The equations of one timestep, what a neuron carries, and the plain scan.

    u[t] = decay * v[t-1] + x[t]                    integrate [eq 2]
    theta[t], width[t]                              the method's rules [eq 5, 7]
    s[t] = 1 if u[t] >= theta[t] else 0             fire [eq 3]
    v[t] = u[t] * (1 - s[t])                        reset 'hard'
    v[t] = u[t] - theta[t] * s[t]                   reset 'soft'
    v[t] = u[t] - theta[t] * s[t] / decay           'subtract_after_decay'

With the last one `u[t+1] = decay * u[t] - theta[t] * s[t] + x[t+1]`, as in
snnTorch and Spyx. LIF has a fixed `decay`, PLIF learns it as `sigmoid(w)`; to
the functions here it is a number in `Parameters`. Membrane, statistics and
thresholds are at least float32 whatever the input's dtype is. Where a membrane
is not finite, its spikes are NaN.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsatgo_jax import dtypes, methods, statistics, tdbn, threshold
from dsatgo_jax.threshold import is_measured


class NeuronState(NamedTuple):
  """What a layer carries from one timestep to the next.

  Attributes:
    v: membrane potentials after the reset, [B, ...].
    t: the index of the next timestep, an int32 scalar.
    theta: the threshold in force at the last timestep, `v_th` at first. None
      stays None where no rule asks for it, and is `v_th` to one that does.
    memory: what a `recurrent.Feedback` carries, its last spikes [B, ...] and a
      tree of its own; else None.
  """

  v: jax.Array
  t: jax.Array
  theta: Any = None
  memory: Any = None


class Parameters(NamedTuple):
  """The numbers of a neuron.

  The first four are scalars, or arrays that broadcast against one timestep's
  input [B, ...]: [C] for one number a channel.

  Attributes:
    decay: the share of the membrane that is retained.
    v_th: the threshold's base value.
    f_c: the firing-rate factor.
    width: the surrogate's base width, `kappa_0`.
    tdbn_scale: the scale of the tdBN that feeds the neuron, [C]; `mpd_agl`.
    norm: a `tdbn.Affine` that x is yet to go through; None for none.
    gates: what the gradient on each of the `PATHS` into u is multiplied with,
      [3]: 0 cuts it. None for 1.
  """

  decay: Any = 0.2
  v_th: Any = 1.0
  f_c: Any = 1.0
  width: Any = 1.0
  tdbn_scale: Any = None
  norm: tdbn.Affine | None = None
  gates: Any = None


class Running(NamedTuple):
  """Running averages that inference takes in the place of measured values.

  Attributes:
    threshold: [T], or None for a threshold that is not measured.
    signal: [T], or None where the width's signal is the threshold itself or is
      not measured.

  Further axes are those of a rule that gives more than a scalar.
  """

  threshold: jax.Array | None = None
  signal: jax.Array | None = None


class Record(NamedTuple):
  """What happened at each timestep, [T] after a scan.

  Scalars each, but for levels made of parameters that are not.

  Attributes:
    theta: the threshold in force.
    signal: what the width follows, or None.
    width: the surrogate's width.
    statistics: mean and standard deviation of the membrane, or what else the
      method measures; None where nothing was measured.
    firing_rate: the share of (real) neurons that fired, or None if not
      recorded.
    gradient_share: the share of (real) neurons inside the gradient window,
      `abs(u - theta) < width / 2`, or None if not recorded.
    histogram: `statistics.histogram` of `u - theta`, or None if not recorded.
    u: the membrane before the reset, [B, ...], or None if not recorded.
    v: the membrane after it, likewise.
  """

  theta: jax.Array
  signal: jax.Array | None
  width: jax.Array
  statistics: Any
  firing_rate: jax.Array | None = None
  gradient_share: jax.Array | None = None
  histogram: jax.Array | None = None
  u: jax.Array | None = None
  v: jax.Array | None = None

  def scalars(self) -> dict[str, Any]:
    """The activity, by name; the statistics, if that is so, as mean and std."""
    names = ('theta', 'width', 'firing_rate', 'gradient_share')
    scalars = {name: getattr(self, name) for name in names}
    measured = self.statistics
    known = isinstance(measured, statistics.Statistics)
    return scalars | (measured._asdict() if known else {})


# What a `Record` may tell beside the levels.
RECORDS = ('activity', 'histogram', 'membrane')


class Settings(NamedTuple):
  """What is fixed when a neuron is built."""

  method: methods.Method
  surrogate: Callable
  reset: str
  cut: tuple[str, ...]
  axis_name: Any
  dtype: Any
  record: tuple[str, ...]
  at_rest: bool
  kernel: str


def at_rest(
  x: jax.Array | jax.ShapeDtypeStruct,
  parameters: Parameters = Parameters(),  # noqa: B008, a constant
  method: methods.Name | methods.Method = 'ds_atgo',
) -> NeuronState:
  """The state before the first timestep.

  Args:
    x: pre-synaptic input of one timestep, [B, ...].
    parameters: the neuron's numbers.
    method: a name of `methods.METHODS`, or a `methods.Method`.

  Returns:
    `NeuronState`, its membrane zero and at least float32, its threshold `v_th`.
  """
  method = methods.get(method)
  dtype = dtypes.wide(x.dtype)
  theta = level_at_rest(method.threshold, parameters, method.measure, x)
  return NeuronState(
    jnp.zeros_like(x, dtype), jnp.zeros((), jnp.int32), theta.astype(dtype)
  )


def level_at_rest(rule, parameters, measure, x):
  """`v_th`, or its mean, in the shape of what a rule gives for x [B, ...]."""
  v_th = jnp.asarray(parameters.v_th)
  dtype = dtypes.wide(v_th.dtype)
  scalar = jax.ShapeDtypeStruct((), dtype)
  measured = statistics.Statistics(scalar, scalar)
  if measure is not statistics.measure:
    u = jax.ShapeDtypeStruct(x.shape, dtypes.wide(x.dtype, dtype))
    measured = jax.eval_shape(lambda u: measure(u, ()), u)
  if not is_measured(rule):
    measured = None
  before = (v_th,) * threshold.follows(rule)
  level = jax.eval_shape(rule, measured, parameters, jnp.int32(0), *before)
  if np.broadcast_shapes(v_th.shape, level.shape) != level.shape:
    v_th = jnp.mean(v_th)
  # Always an array of its own, that can be donated.
  return jnp.zeros(level.shape, dtype) + v_th


def plain(settings, x, *rest):
  """The scan; differentiated by JAX."""
  scan = functools.partial(lax.scan, unroll=len(x) <= 16)
  return scanned(scan, settings, x, *rest)


def scanned(scan, settings, x, v, t, theta, parameters, running, mask):
  """All timesteps, by `lax.scan` or a function that does what it does.

  `theta` is the threshold before them, None where no rule takes it.
  """
  method = settings.method

  def body(carry, inputs):
    v, previous = carry
    t, x, running, mask = inputs
    u = parameters.decay * v + x
    measured = None
    if 'activity' in settings.record or (
      running is None
      and (is_measured(method.threshold) or is_measured(method.signal))
    ):
      real = () if mask is None else (mask,)
      measured = method.measure(u, settings.axis_name, *real)
      measured = lax.stop_gradient(measured)
    theta, signal, width = levels(
      method, measured, running, parameters, t, previous
    )
    # Zero, and NaN where a membrane or a level is infinite or undefined.
    known = u - theta
    if running is None and isinstance(measured, statistics.Statistics):
      known = measured.std
    nothing = lax.stop_gradient(known - known)
    spikes, v = fire(settings, (u, u, u), theta, width, parameters, nothing)
    record = Record(theta, signal, width, measured)
    pooled = {'axis_name': settings.axis_name, 'mask': mask}
    if 'activity' in settings.record:
      inside = jnp.abs(u - theta) < width / 2
      record = record._replace(
        firing_rate=statistics.share(spikes != 0, dtype=u.dtype, **pooled),
        gradient_share=statistics.share(inside, dtype=u.dtype, **pooled),
      )
    if 'histogram' in settings.record:
      record = record._replace(
        histogram=statistics.histogram(u - theta, **pooled)
      )
    if 'membrane' in settings.record:
      record = record._replace(u=u, v=v)
    return (v, None if previous is None else theta), (spikes, record)

  inputs = (timesteps(t, x), presynaptic(x, parameters), running, mask)
  (v, _), (spikes, record) = scan(body, (v, theta), inputs)
  return spikes, v, record


def presynaptic(x, parameters):
  """What is added to the membrane: x, in the membrane's dtype, normalised."""
  x = x.astype(parameters.decay.dtype)
  return x if parameters.norm is None else parameters.norm(x)


def timesteps(t, x):
  """The indices of x's timesteps."""
  return t + np.arange(len(x), dtype=np.int32)


def follows(method):
  """Whether a rule of the method takes the threshold before."""
  return any(map(threshold.follows, filter(None, method[:3:2])))


def levels(method, measured, running, parameters, t, previous=None):
  """Threshold, width signal and width at one timestep."""

  def level(rule, average):
    if running is not None and is_measured(rule):
      return average
    before = (lax.stop_gradient(previous),) * threshold.follows(rule)
    return rule(measured if is_measured(rule) else None, parameters, t, *before)

  average = Running() if running is None else running
  theta = level(method.threshold, average.threshold)
  if method.signal is None:
    signal = None
  elif method.signal is method.threshold:
    signal = theta
  else:
    signal = level(method.signal, average.signal)
  width = method.width(lax.stop_gradient(signal), parameters, t)
  return theta, signal, width


Reset = Literal['hard', 'soft', 'subtract_after_decay']

# The membrane after the reset, of u, what fired, theta and decay.
RESETS = {
  'hard': lambda u, fired, theta, decay: u * (1 - fired),
  'soft': lambda u, fired, theta, decay: u - theta * fired,
  'subtract_after_decay': lambda u, fired, theta, decay: (
    u - theta / decay * fired
  ),
}


# The ways of a gradient into u[t]: through this step's spike, through the next
# membrane, and through the reset by this step's spike.
PATHS = ('spatial', 'leak', 'reset')


def fire(settings, u, theta, width, parameters, nothing=0.0):
  """Spikes, and the membrane after the reset; `u` once for each of `PATHS`."""
  spatial, leak, reset = u
  spikes = fired = settings.surrogate(spatial - theta, width) + nothing
  if reset is not spatial:
    fired = settings.surrogate(reset - theta, width) + nothing
  spikes, leak, fired = (
    _passed(settings, parameters, i, a)
    for i, a in enumerate((spikes, leak, fired))
  )
  v = RESETS[settings.reset](leak, fired, theta, parameters.decay)
  return spikes.astype(settings.dtype), v


def _passed(settings, parameters, path, a):
  """What goes on a path, its gradient cut or scaled."""
  still = lax.stop_gradient(a)
  if PATHS[path] in settings.cut:
    return still
  if parameters.gates is None:
    return a
  return still + parameters.gates[path] * (a - still)
