"""The scan with a backward pass of its own.

It keeps x and the statistics alone and computes the rest from them again,
beyond 16 timesteps in chunks of about sqrt(T) / 2, whose first membranes it
keeps. The derivatives are the plain scan's, at any order of reverse mode.
"""

import dataclasses
import functools
import math
import warnings

import jax
import jax.numpy as jnp
from jax import custom_derivatives, lax

from dsatgo_jax import dynamics, statistics, surrogate, tdbn, xla
from dsatgo_jax import probes as tell


def run(settings, x, v, t, theta, parameters, running, mask, probes):
  """The scan, beyond 16 timesteps in chunks of about sqrt(T) / 2."""
  num_steps = len(x)
  parameters = parameters._replace(
    norm=_norm(settings, x, v, t, theta, parameters, running, mask, probes)
  )
  if num_steps <= 16 or 'reach' in probes:
    return _fused(settings, x, v, t, theta, parameters, running, mask, probes)
  most = max(4, math.isqrt(num_steps) // 2)
  divisors = (n for n in range(most, most // 2, -1) if num_steps % n == 0)
  size = next(divisors, most)
  end = num_steps - num_steps % size
  settings = settings._replace(at_rest=False)

  def chunk(carry, inputs):
    v, t, theta = carry
    x, *others = inputs
    spikes, v, record = _fused(settings, x, v, t, theta, parameters, *others)
    theta = None if theta is None else record.theta[-1]
    return (v, t + len(x), theta), (spikes, record)

  inputs = (x, running, mask, probes)
  carry, outputs = lax.scan(
    chunk,
    (v, t, theta),
    jax.tree.map(lambda a: a[:end].reshape(-1, size, *a.shape[1:]), inputs),
  )
  outputs = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)
  if end < num_steps:
    rest = jax.tree.map(lambda a: a[end:], inputs)
    carry, last = chunk(carry, rest)
    outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, last)
  return outputs[0], carry[0], outputs[1]


def _norm(settings, x, v, t, theta, parameters, running, mask, probes):
  """How x is normalised: by its own statistics, if kernels can pull through."""
  norm = parameters.norm
  own = getattr(norm, 'own', None)
  if own is None:
    return norm
  alone = theta is None and mask is None and not probes and own.x is None
  if (
    alone and len(x) <= 16 and _kernels(settings, x, v, t, parameters, running)
  ):
    return own
  return norm._replace(own=None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(settings, x, v, t, theta, parameters, running, mask, probes):
  """The scan, with a backward pass that keeps x and the statistics alone."""
  # A surrogate of one's own might not be the step that it should be.
  binary = hasattr(settings.surrogate, 'gradient')
  scan = functools.partial(_unrolled, binary=binary)
  kernels = None
  if theta is None and mask is None and not probes:
    kernels = _kernels(settings, x, v, t, parameters, running)
  if not kernels:
    return dynamics.scanned(
      scan, settings, x, v, t, theta, parameters, running, mask
    )

  def plain(x, v, t, parameters, running):
    return dynamics.scanned(
      scan, settings, x, v, t, None, parameters, running, None
    )

  kernel = functools.partial(kernels.forward, settings)
  batch = (1, 0, -1, -1, -1), (1, 0, -1)
  return xla.either(kernel, plain, batch, x, v, t, parameters, running)


def _kernels(settings, x, v, t, parameters, running):
  """The module `kernels` if it can do this, else None."""
  if settings.kernel != 'pallas' or settings.record:
    return None
  if settings.method.measure is not statistics.measure:
    return None
  numbers = parameters.decay, x, v
  if not all(
    a.dtype == jnp.float32 or a is x and a.dtype.itemsize == 2 for a in numbers
  ):
    return None
  known = all(isinstance(n, int) for n in x.shape)  # Or it is symbolic.
  if x.ndim < 3 or not known or x.size >= 2**31:
    return None
  scalar = jnp.zeros((), jnp.float32)
  theta, _, width = jax.eval_shape(
    functools.partial(dynamics.levels, settings.method),
    statistics.Statistics(scalar, scalar),
    jax.tree.map(lambda a: a[0], running),
    parameters,
    t,
  )
  if any(map(jnp.ndim, (parameters.decay, theta, width))):
    return None
  has_gradient = hasattr(settings.surrogate, 'gradient')
  if not has_gradient or not (kernels := _imported()):
    return None
  return None if kernels.refusal_of(settings.surrogate) else kernels


@functools.cache
def _imported():
  """The module `kernels`; None, and a warning, where Triton does not work."""
  try:
    from dsatgo_jax import kernels

    error = kernels.refusal_of(surrogate.rectangular)
  except ImportError as missing:
    error = missing
  if not error:
    return kernels
  warnings.warn(
    "kernel='pallas' needs Pallas for Triton, which does not work here; the "
    f'neurons are left to XLA. {type(error).__name__}: {error}',
    stacklevel=2,
  )
  return None


def _forward(settings, *primals):
  primals = custom_derivatives.custom_vjp_primal_tree_values(primals)
  x, v, t, theta, parameters, running, mask, probes = primals
  outputs = _fused(settings, *primals)
  record = xla.kept(dynamics.Record(*outputs[2][:4]))
  if theta is not None:  # Of each timestep, the one before it.
    theta = jnp.concatenate([theta[None], record.theta[:-1]])
  return outputs, (x, v, t, theta, parameters, running, record, probes)


def _backward(settings, residuals, cotangents):
  silent = isinstance(cotangents[1], custom_derivatives.SymbolicZero)

  def known(a):
    if isinstance(a, custom_derivatives.SymbolicZero):
      return jnp.zeros_like(residuals[0], a.dtype, shape=a.shape)
    return a

  cotangents = jax.tree.map(known, cotangents)
  g_x, g_v, g_parameters, told = _pull(settings, silent, residuals, cotangents)
  if isinstance(norm := g_parameters.norm, tdbn.Own):  # Which g_x went through.
    norm = dataclasses.replace(norm, mean=None, inverse=None)
    g_parameters = g_parameters._replace(norm=norm)
  return g_x, g_v, None, None, g_parameters, None, None, told


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pull(settings, silent, residuals, cotangents):
  x, v, t, theta, parameters, running, record, probes = residuals
  (parameters, probes), pool = jax.vjp(
    functools.partial(xla.vary_like, x), (parameters, probes)
  )
  arguments = x, v, t, parameters, running, record, probes, *cotangents
  pull = functools.partial(_pull_steps, settings, theta)
  kernels = _kernels(settings, x, v, t, parameters, running)
  if kernels and theta is None and not probes:
    kernel = functools.partial(kernels.backward, settings, silent)
    batch = (1, 0, -1, -1, -1, -1, -1, 1, 0, -1), (1, 0, -1, -1)
    pull = functools.partial(xla.either, kernel, pull, batch)
  g_x, g_v, g_parameters, told = pull(*arguments)
  (pooled,) = pool((g_parameters, told))
  return g_x, g_v, *pooled


def _pull_steps(
  settings, theta, x, v, t, parameters, running, record, probes,
  g_spikes, g_v, g_record,
):  # fmt: skip
  """The cotangents of x, v, the parameters and the probes."""
  measured = record.statistics
  decay, kept = parameters.decay, x.dtype
  g_last = g_spikes[-1].astype(g_v.dtype) + g_v
  seen = xla.late(x, g_last, measured)
  x, pull_x = jax.vjp(dynamics.presynaptic, seen, parameters)
  known = (dynamics.timesteps(t, x), running, measured, theta)
  known = [jax.tree.map(lambda a: a[i], known) for i in range(len(x))]  # noqa: B023
  never = xla.never(x, measured)
  # Traced once, whatever T is.
  jit = functools.partial(jax.jit, inline=True)

  def fire(u, parameters, known):
    t, running, measured, previous = known
    theta, _, width = dynamics.levels(
      settings.method, measured, running, parameters, t, previous
    )
    return dynamics.fire(settings, u, theta, width, parameters)

  @jit
  def forth(v, x, known):
    """One timestep: the membrane after it."""
    u = decay * v + x
    return fire((u, u, u), parameters, known)[1]

  @jit
  def back(v, x, known, g_spikes, g_v):
    """One timestep: the cotangents of u, by path, and of all but decay.

    Last, dv/du, if it is asked for.
    """
    # Late, so that u is not kept from `forth` either.
    u = decay * v + xla.late(x, g_spikes.astype(g_v.dtype) + g_v, measured)

    def by_path(parameters, *u):
      return fire(u if probes else 3 * u, parameters, known)

    paths = dynamics.PATHS if probes else ('all',)
    _, pull = jax.vjp(by_path, parameters, *(u for _ in paths))
    g_parameters, *g = pull((g_spikes, g_v))
    slope = None
    if 'reach' in probes:
      _, *slope = pull((jnp.zeros_like(g_spikes), jnp.ones_like(g_v)))
      slope = functools.reduce(jnp.add, slope)
    return g, g_parameters, slope

  before = [v]
  for i in range(len(x) - 1):
    after = forth(before[i], x[i], known[i])
    before.append(xla.in_memory(after, never))

  g_parameters, g_decay = jax.tree.map(jnp.zeros_like, (parameters, decay))
  g_u, told = [], {name: [] for name in probes}
  sample = functools.partial(
    statistics.sample, like=x[0], axis_name=settings.axis_name
  )
  later = sample(g_v)[None] if 'reach' in probes else None
  for i in reversed(range(len(x))):
    if g_record.v is not None:
      g_v += g_record.v[i]
    parts, g_here, slope = back(before[i], x[i], known[i], g_spikes[i], g_v)
    g = functools.reduce(jnp.add, parts)
    if g_record.u is not None:
      g += g_record.u[i]
    for name in ('paths', 'sample'):
      if name in probes:
        seen = [*parts, g_spikes[i]]
        seen = list(map(sample, seen)) if name == 'sample' else seen
        row = tell.paths(seen[:-1], seen[-1], g.size, probes[name][i])
        told[name].append(row)
    if 'reach' in probes:
      spatial, slope = sample(parts[0]), sample(slope)
      contributions = jnp.concatenate([spatial[None], slope * later])
      row = tell.reach(contributions, sample(g), len(x))
      told['reach'].append(row)
      later = sample(decay) * contributions
    g_parameters = jax.tree.map(jnp.add, g_parameters, g_here)
    if i:
      g = xla.in_memory(g, never)
    if i or not settings.at_rest:
      _, retained = jax.vjp(lambda decay: decay * before[i], decay)  # noqa: B023
      g_decay += retained(g)[0]
    g_u.append(g)
    g_v = decay * g

  g_parameters = g_parameters._replace(decay=g_parameters.decay + g_decay)
  # In the dtype of x, whose cotangent it becomes.
  g_u = xla.gathered([g.astype(kept) for g in reversed(g_u)])
  g_x, g_norm = pull_x(g_u.astype(decay.dtype))
  g_parameters = jax.tree.map(jnp.add, g_parameters, g_norm)
  if isinstance(norm := parameters.norm, tdbn.Own):
    shift, slope = norm.through(seen, g_parameters.norm)
    g_x += (shift + (seen - norm.mean) * slope).astype(kept)
  told = {
    name: jnp.stack(rows[::-1]).astype(probes[name].dtype)
    for name, rows in told.items()
  }
  return g_x, g_v, g_parameters, told


_fused.defvjp(_forward, _backward, symbolic_zeros=True)


def _unrolled(body, carry, xs, binary):
  """`lax.scan`, unrolled; `binary` says that spikes are 0 or 1."""
  x, outputs = xs[1], []
  for part in xla.parts(len(x)):
    here = jax.tree.map(lambda a: a[part], xs)  # noqa: B023
    carry, ys = lax.scan(body, carry, here, unroll=True)
    outputs.append(ys)
  spikes, record = xla.join(outputs)
  if binary and len(x) > 4 and record.statistics is None:
    single = [s for spikes, _ in outputs for s in spikes]
    spikes = xla.through_bits(single, xla.never(x))
  return carry, (spikes, record)
