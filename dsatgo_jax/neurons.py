"""The spiking neuron: one timestep, and the scan over time.

    u[t] = decay * v[t-1] + x[t]                    integrate [eq 2]
    theta[t], width[t]                              the method's rules [eq 5, 7]
    s[t] = 1 if u[t] >= theta[t] else 0             fire [eq 3]
    v[t] = u[t] * (1 - s[t])                        hard reset
    v[t] = u[t] - theta[t] * s[t]                   soft reset

LIF has a fixed `decay`, PLIF learns it as `sigmoid(w)`; to the functions here
it is a number in `Parameters`. State goes in and comes out. Membrane,
statistics and thresholds are at least float32 whatever the input's dtype is.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsatgo_jax import methods, statistics, surrogate, tdbn
from dsatgo_jax.threshold import is_measured


class NeuronState(NamedTuple):
  """What a layer carries from one timestep to the next.

  Attributes:
    v: membrane potentials after the reset, [B, ...].
    t: the index of the next timestep, an int32 scalar.
  """

  v: jax.Array
  t: jax.Array


class Parameters(NamedTuple):
  """The numbers of a neuron; scalars, traced or not.

  Attributes:
    decay: the share of the membrane that is retained.
    v_th: the threshold's base value.
    f_c: the firing-rate factor.
    width: the surrogate's base width, `kappa_0`.
    tdbn_scale: the scale of the tdBN that feeds the neuron, [C]; `mpd_agl`.
    norm: a `tdbn.Affine` that x is yet to go through; None for none.
  """

  decay: Any = 0.2
  v_th: Any = 1.0
  f_c: Any = 1.0
  width: Any = 1.0
  tdbn_scale: Any = None
  norm: tdbn.Affine | None = None


class Running(NamedTuple):
  """Running averages that inference takes in the place of measured values.

  Attributes:
    threshold: [T], or None for a threshold that is not measured.
    signal: [T], or None where the width's signal is the threshold itself or is
      not measured.
  """

  threshold: jax.Array | None = None
  signal: jax.Array | None = None


class Record(NamedTuple):
  """What happened at each timestep, scalars ([T] after a scan).

  Attributes:
    theta: the threshold in force.
    signal: what the width follows, or None.
    width: the surrogate's width.
    statistics: mean and standard deviation of the membrane, or None where
      nothing was measured.
    firing_rate: the share of neurons that fired, or None if not recorded.
    gradient_share: the share of neurons inside the gradient window, `abs(u -
      theta) < width / 2`, or None if not recorded.
  """

  theta: jax.Array
  signal: jax.Array | None
  width: jax.Array
  statistics: statistics.Statistics | None
  firing_rate: jax.Array | None
  gradient_share: jax.Array | None

  def scalars(self) -> dict[str, jax.Array]:
    """All that was recorded, by name; the statistics as `mean` and `std`."""
    named = self._asdict()
    del named['signal']
    return named | named.pop('statistics')._asdict()


class _Dynamics(NamedTuple):
  """What is fixed when a neuron is built."""

  method: methods.Method
  surrogate: Callable
  reset: str
  detach_reset: bool
  axis_name: Any
  dtype: Any
  record: bool
  at_rest: bool


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
  dynamics = _Dynamics(
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
  v = _vary_like(x, state.v.astype(membrane_dtype))
  for name, average in (running or Running())._asdict().items():
    if average is not None and average.shape != x.shape[:1]:
      raise ValueError(
        f'Expected a running {name} for the {x.shape[0]} timesteps of x, '
        f'got shape {average.shape}.'
      )
  parameters = jax.tree.map(
    lambda p: jnp.asarray(p, membrane_dtype), parameters
  )
  scan = _chunked if fused else _plain
  spikes, v, happened = scan(dynamics, x, v, state.t, parameters, running)
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


def at_rest(x: jax.Array) -> NeuronState:
  """The state before the first timestep.

  Args:
    x: pre-synaptic input of one timestep, [B, ...].

  Returns:
    `NeuronState`, its membrane zero and at least float32.
  """
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return NeuronState(jnp.zeros_like(x, dtype), jnp.zeros((), jnp.int32))


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


def _plain(dynamics, x, *rest):
  """The scan; differentiated by JAX."""
  scan = functools.partial(lax.scan, unroll=len(x) <= 16)
  return _scanned(scan, dynamics, x, *rest)


def _scanned(scan, dynamics, x, v, t, parameters, running):
  """All timesteps, by `lax.scan` or a function that does what it does."""
  method = dynamics.method

  def body(v, inputs):
    t, x, running = inputs
    u = parameters.decay * v + x
    measured = None
    if dynamics.record or (
      running is None
      and (is_measured(method.threshold) or is_measured(method.signal))
    ):
      measured = statistics.measure(u, dynamics.axis_name)
    theta, signal, width = _levels(method, measured, running, parameters, t)
    spikes, v = _fire(dynamics, u, theta, width)
    shares = (None, None)
    if dynamics.record:
      inside = jnp.abs(u - theta) < width / 2
      shares = [
        _share(a, dynamics.axis_name, u.dtype) for a in (spikes != 0, inside)
      ]
    return v, (spikes, Record(theta, signal, width, measured, *shares))

  inputs = (_timesteps(t, x), _presynaptic(x, parameters), running)
  v, (spikes, record) = scan(body, v, inputs)
  return spikes, v, record


def _presynaptic(x, parameters):
  """What is added to the membrane: x, in the membrane's dtype, normalised."""
  x = x.astype(parameters.decay.dtype)
  return x if parameters.norm is None else parameters.norm(x)


def _unrolled(body, v, xs, binary):
  """`lax.scan`, unrolled; `binary` says that spikes are 0 or 1."""
  x, outputs = xs[1], []
  for part in _parts(len(x)):
    v, ys = lax.scan(body, v, jax.tree.map(lambda a: a[part], xs), unroll=True)  # noqa: B023
    outputs.append(ys)
  spikes, record = _join(outputs)
  if binary and len(x) > 4 and record.statistics is None:
    single = [s for spikes, _ in outputs for s in spikes]
    spikes = _through_bits(single, _never(x))
  return v, (spikes, record)


def _parts(num_steps):
  """Slices of at most 5 timesteps, all of one length if that is possible."""
  size = next((n for n in (5, 4, 3) if num_steps % n == 0), 5)
  return [slice(i, i + size) for i in range(0, num_steps, size)]


def _stack(arrays):
  """Stacks one array a timestep."""
  return _join([jnp.stack(arrays[part]) for part in _parts(len(arrays))])


def _join(parts):
  """Concatenates trees in time; the last may be shorter than the others.

  XLA's CPU compiler computes up to 8 arrays where their concatenation is to be;
  more it copies. It makes one of nested ones, unless a reshape is between.
  """
  lengths = [len(jax.tree.leaves(part)[0]) for part in parts]
  whole = lengths.count(lengths[0])
  joined = jax.tree.map(
    lambda *a: jnp.stack(a).reshape(-1, *a[0].shape[1:]), *parts[:whole]
  )
  return jax.tree.map(lambda *a: jnp.concatenate(a), joined, *parts[whole:])


def _timesteps(t, x):
  """The indices of x's timesteps."""
  return t + np.arange(len(x), dtype=np.int32)


def _levels(method, measured, running, parameters, t):
  """Threshold, width signal and width at one timestep."""

  def level(rule, average):
    if running is not None and is_measured(rule):
      return average
    return rule(measured if is_measured(rule) else None, parameters, t)

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


def _fire(dynamics, u, theta, width):
  """Spikes, and the membrane after the reset."""
  spikes = dynamics.surrogate(u - theta, width)
  fired = lax.stop_gradient(spikes) if dynamics.detach_reset else spikes
  v = u * (1 - fired) if dynamics.reset == 'hard' else u - theta * fired
  return spikes.astype(dynamics.dtype), v


def _share(mask, axis_name, dtype):
  share = jnp.mean(mask, dtype=dtype)
  return share if axis_name is None else lax.pmean(share, axis_name)


def _chunked(dynamics, x, v, t, parameters, running):
  """`_fused`, beyond 16 timesteps in chunks of about sqrt(T) / 2."""
  num_steps = len(x)
  if num_steps <= 16:
    return _fused(dynamics, x, v, t, parameters, running)
  most = max(4, math.isqrt(num_steps) // 2)
  divisors = (n for n in range(most, most // 2, -1) if num_steps % n == 0)
  size = next(divisors, most)
  end = num_steps - num_steps % size
  dynamics = dynamics._replace(at_rest=False)

  def chunk(carry, inputs):
    v, t = carry
    x, running = inputs
    spikes, v, record = _fused(dynamics, x, v, t, parameters, running)
    return (v, t + len(x)), (spikes, record)

  carry, outputs = lax.scan(
    chunk,
    (v, t),
    jax.tree.map(
      lambda a: a[:end].reshape(-1, size, *a.shape[1:]), (x, running)
    ),
  )
  outputs = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)
  if end < num_steps:
    rest = jax.tree.map(lambda a: a[end:], (x, running))
    carry, last = chunk(carry, rest)
    outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, last)
  return outputs[0], carry[0], outputs[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(dynamics, x, v, t, parameters, running):
  """The scan, with a backward pass that keeps x and the statistics alone."""
  # A surrogate of one's own might not be the step that it should be.
  binary = hasattr(dynamics.surrogate, 'gradient')
  scan = functools.partial(_unrolled, binary=binary)
  return _scanned(scan, dynamics, x, v, t, parameters, running)


def _fused_forward(dynamics, x, v, t, parameters, running):
  outputs = _fused(dynamics, x, v, t, parameters, running)
  measured = outputs[2].statistics
  return outputs, (x, v, t, parameters, running, measured)


def _fused_backward(dynamics, residuals, cotangents):
  x, v, t, parameters, running, measured = residuals
  g_spikes, g_v, _ = cotangents
  parameters, pool = jax.vjp(functools.partial(_vary_like, x), parameters)
  decay = parameters.decay
  x, pull_x = jax.vjp(
    _presynaptic, _late(x, g_spikes[-1] + g_v, measured), parameters
  )
  known = (_timesteps(t, x), running, measured)
  known = [jax.tree.map(lambda a: a[i], known) for i in range(len(x))]  # noqa: B023
  never = _never(x, measured)
  # Traced once, whatever T is.
  jit = functools.partial(jax.jit, inline=True)

  def fire(u, parameters, known):
    t, running, measured = known
    theta, _, width = _levels(dynamics.method, measured, running, parameters, t)
    return _fire(dynamics, u, theta, width)

  @jit
  def forth(v, x, known):
    """One timestep: the membrane after it."""
    return fire(decay * v + x, parameters, known)[1]

  @jit
  def back(v, x, known, g_spikes, g_v):
    """One timestep: the cotangents of u and of the parameters but decay."""
    # Late, so that u is not kept from `forth` either.
    u = decay * v + _late(x, g_spikes + g_v, measured)
    _, pull = jax.vjp(lambda u, p: fire(u, p, known), u, parameters)
    return pull((g_spikes, g_v))

  before = [v]
  for i in range(len(x) - 1):
    after = forth(before[i], x[i], known[i])
    before.append(_in_memory(after, never))

  g_parameters, g_decay = jax.tree.map(jnp.zeros_like, (parameters, decay))
  g_u = []
  for i in reversed(range(len(x))):
    g, g_here = back(before[i], x[i], known[i], g_spikes[i], g_v)
    g_parameters = jax.tree.map(jnp.add, g_parameters, g_here)
    if i:
      g = _in_memory(g, never)
    if i or not dynamics.at_rest:
      g_decay += jnp.sum(g * before[i])
    g_u.append(g)
    g_v = decay * g

  g_parameters = g_parameters._replace(decay=g_parameters.decay + g_decay)
  g_x, g_norm = pull_x(_stack(g_u[::-1]))
  g_parameters = jax.tree.map(jnp.add, g_parameters, g_norm)
  return g_x, g_v, None, *pool(g_parameters), None


_fused.defvjp(_fused_forward, _fused_backward)


def _late(x, g, measured):
  """x, but to the compiler something else in the backward pass.

  What is made of it can then be computed only when the cotangent g [B, ...]
  and the last statistics are known. Else XLA would take it from the forward
  pass and keep it until then; its CPU compiler does so across the barriers of
  `jax.checkpoint`, too.
  """
  bound = jnp.inf if measured is None else jnp.inf * measured.std[-1]
  # One value per example leaves a sharded batch where it is.
  first = g.reshape(len(g), -1)[:, 0]
  return jnp.where(first.reshape(-1, *[1] * (g.ndim - 1)) > bound, 1, x)


def _never(x, measured=None):
  """False, which the compiler cannot know."""
  scalar = x[(0,) * x.ndim] if measured is None else measured.std[-1]
  return scalar > jnp.inf


def _through_bits(spikes, never):
  """Stacks spikes, on CPU from one array with a bit for each timestep.

  XLA's CPU compiler writes one array with each loop, and computes all timesteps
  up to t for the spikes of t. One loop computes all the bits. Where membranes
  are measured they are in memory, and nothing is computed again.
  """

  def by_bits(spikes, never):
    bits = functools.reduce(
      jnp.bitwise_or,
      [(s != 0).astype(jnp.uint16) << i for i, s in enumerate(spikes)],
    )
    bits = _in_memory(bits, never)
    dtype = spikes[0].dtype
    return _stack([(bits >> i & 1).astype(dtype) for i in range(len(spikes))])

  return lax.platform_dependent(
    spikes, never, cpu=by_bits, default=lambda spikes, never: _stack(spikes)
  )


def _in_memory(a, never):
  """a, written to memory by XLA's CPU compiler.

  Else it may compute a anew in every loop that reads it, and in turn all that a
  is made of: work that grows with the square of T. What a conditional takes has
  to be in memory, and is not copied if nothing else reads it.
  """
  return lax.platform_dependent(
    a,
    never,
    cpu=lambda a, never: lax.cond(never, jnp.negative, lambda a: a, a),
    default=lambda a, never: a,
  )


def _vary_like(x, tree):
  """Makes a tree vary over the mesh axes that x varies over (`shard_map`)."""
  return jax.tree.map(
    lambda a: a + jnp.zeros_like(x, dtype=a.dtype, shape=()), tree
  )
