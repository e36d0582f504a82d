"""The fused scan as kernels of an NVIDIA GPU, in Pallas (Triton).

A threshold that is measured waits for the whole batch. So forward there are two
kernels for each timestep, one that makes u[t] of x and leaves the moments of
each block, and one that makes the threshold of them; and a last one that fires.
Backward there is one, and one more after the sums of tdBN. All read x as
[B, T, ...], which is how weights and tdBN leave it in memory. Membranes stay in
registers, but for one every few timesteps, from where later ones go on.

They are taken for x [T, B, ..., C] in float32, bfloat16 or float16, for levels
that are scalars and surrogates that `surrogate.custom` made, on one device,
under `pmap` and `shard_map`, and by each device for its part of a batch that is
sharded under `jax.jit`. Programs for other devices, `vmap`, probes, records,
masks (forward) and derivatives of derivatives are left to XLA. JAX 0.11 calls
Pallas for Triton deprecated; where it is gone, `fused` warns, and all is left
to XLA.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton
from jax.extend import core

from dsatgo_jax import devices, dynamics, statistics, tdbn
from dsatgo_jax.blocks import (
  batch_major,
  blocks_of,
  flat,
  gathered,
  given_of,
  of_rows,
  pool,
  pooled,
  refusal,
  refusal_of,
  time_major,
  unit,
  varying,
)
from dsatgo_jax.threshold import is_measured

__all__ = ('backward', 'forward', 'refusal_of')


def _step(x, width):
  del width
  return jnp.asarray(x >= 0, x.dtype)


def _differentiable(gradient):
  """A surrogate without a rule of its own, which Triton has no way for."""

  def spike(x, width):
    slope = lax.stop_gradient(gradient(x, width)).astype(x.dtype)
    return _step(x, width) + slope * (x - lax.stop_gradient(x))

  return spike


def _read(blocks, given):
  """`Given` with its levels as scalars, and the `Parameters` in it."""
  norm, gates = given.norm, given.gates
  if norm is not None:
    norm = tdbn.Affine(*map(blocks.channels_of, norm[:3]))
  if gates is not None:
    gates = tuple(gates[i] for i in range(3))
  parameters = dynamics.Parameters(given.decay[0], norm=norm, gates=gates)
  levels = {
    name: tuple(a[0] for a in getattr(given, name))
    for name in ('theta', 'width', 'known')
  }
  return given._replace(**levels), parameters


def _membranes(settings, given, parameters, tile, num_steps, start=0):
  """The membrane before each of so many timesteps from start on, and u."""
  v, found = None if given.v is None else tile.load(given.v), []
  for t in range(num_steps):
    if start and not t:
      u = tile.load(given.u)
    else:
      u = dynamics.presynaptic(tile.load(given.x, start + t), parameters)
      if v is not None:
        u = parameters.decay * v + u
    found.append((v, u))
    if t + 1 < num_steps:
      _, v = _fire(settings, u, given.theta[t], parameters)
  return found


def _fire(settings, u, theta, parameters, nothing=0.0):
  settings = settings._replace(surrogate=_step)
  return dynamics.fire(settings, (u, u, u), theta, 1.0, parameters, nothing)


def _measure(settings, blocks, given, moments, kept, start):
  """The mean of a block, the root of the squares about it, and its size.

  And the block itself, if that is to be kept.
  """
  tile, (given, parameters) = blocks.tile(), _read(blocks, given)
  *_, (_, u) = _membranes(
    settings, given, parameters, tile, len(given.theta) + 1, start
  )
  if kept is not None:
    tile.store(kept, u)
  most = jnp.max(tile.real(u, -jnp.inf))
  distance = tile.real(u - most)
  count = tile.count(u)
  # The mean is so far below the largest, and nothing is further above it: in
  # this unit no square overflows, and their sum does not vanish.
  below = -jnp.sum(distance) / count
  scale = unit(below)
  squares = jnp.square(tile.real((distance + below) * (1 / scale)))
  moments[0] = most - below
  moments[1] = scale * jnp.sqrt(jnp.sum(squares))
  moments[2] = count


def _decide(number, levels, free, parts, numbers, *outputs):
  """Makes statistics of all parts, and levels of them and of numbers."""
  mean, norm, _ = pooled(number, parts)
  std = norm / math.sqrt(free)
  found = levels(mean, std, *(a[0] for a in numbers))
  for output, value in zip(outputs, (mean, std, *found), strict=True):
    output[0] = jnp.asarray(value, output.dtype)


def _spikes(settings, blocks, given, spikes):
  """The spikes of all timesteps."""
  tile, (given, parameters) = blocks.tile(), _read(blocks, given)
  found = _membranes(settings, given, parameters, tile, len(given.theta))
  for t, (_, u) in enumerate(found):
    theta = given.theta[t]
    known = given.known[t] if given.known else u - theta
    fired, _ = _fire(settings, u, theta, parameters, known - known)
    tile.store(spikes, fired, t)


def _last(settings, blocks, given, last):
  """The membrane after the last timestep."""
  tile, (given, parameters) = blocks.tile(), _read(blocks, given)
  *_, (_, u) = _membranes(settings, given, parameters, tile, len(given.theta))
  theta = given.theta[-1]
  known = given.known[-1] if given.known else u - theta
  tile.store(last, _fire(settings, u, theta, parameters, known - known)[1])


def _back(
  settings, blocks, given, g_spikes, g_v, own, g_x, numbers, g_before, sums
):
  """The cotangents of x and v, and sums of those of the parameters.

  What comes to x by way of its statistics is known as `own`, if at all.
  """
  own = own and tuple(map(blocks.channels_of, own))
  given, parameters = _read(blocks, given)
  decay, norm = parameters.decay, parameters.norm
  num_steps = len(given.theta)
  surrogate = _differentiable(settings.surrogate.gradient)
  settings = settings._replace(dtype=decay.dtype)
  zeros = jnp.zeros((blocks.height, blocks.width), decay.dtype)

  def block(i, carry):
    tile = blocks.tile(i)
    found = _membranes(settings, given, parameters, tile, num_steps)
    retained, per_channel, g_decay, g_theta = carry
    g = zeros if g_v is None else tile.load(g_v)
    g_theta = list(g_theta)
    for t in reversed(range(num_steps)):
      v, u = found[t]

      def fire(u, theta, decay, t=t):
        return dynamics.fire(
          settings._replace(surrogate=surrogate),
          (u, u, u),
          theta,
          given.width[t],
          parameters._replace(decay=decay),
        )

      _, pull = jax.vjp(fire, u, given.theta[t], decay)
      g_s = tile.load(g_spikes, t).astype(decay.dtype)
      g_u, g_here, of_reset = pull((g_s, g))
      g_theta[t] += g_here
      g_decay += of_reset
      if v is not None:
        retained += g_u * v
      g = decay * g_u
      if norm is not None:
        distance = tile.load(given.x, t).astype(decay.dtype) - norm.mean
        both = (g_u, g_u * distance)
        per_channel = tuple(map(jnp.add, per_channel, both))
        g_u = g_u * norm.gain
      if own:
        g_u += own[0] + distance * own[1]
      if g_x is not None:
        tile.store(g_x, g_u, t)
    if g_before is not None:
      tile.store(g_before, g)
    if numbers is None:
      return carry
    return retained, per_channel, g_decay, tuple(g_theta)

  zero = jnp.zeros((), decay.dtype)
  carry = (zeros, (zeros, zeros) if norm else (), zero, (zero,) * num_steps)
  if blocks.times == 1:
    carry = block(0, carry)
  else:
    carry = lax.fori_loop(0, blocks.times, block, carry)
  if numbers is None:
    return
  retained, per_channel, g_decay, g_theta = carry
  for i, number in enumerate((jnp.sum(retained) + g_decay, *g_theta)):
    numbers[i] = number
  for total, a in zip(sums or (), per_channel, strict=True):
    triton.store(total.at[:], jnp.sum(a, 0), mask=blocks.columns())


def _levels(settings, parameters, t, moments, count):
  """Statistics and levels of moments of blocks.

  By one kernel more, where the rules read but numbers and Triton knows them.
  """
  leaves, tree = jax.tree.flatten((parameters, t))
  scalar = jnp.zeros((), parameters.decay.dtype)

  def levels(mean, std, *leaves):
    measured = statistics.Statistics(mean, std)
    parameters, t = tree.unflatten(leaves)
    return dynamics.levels(settings.method, measured, None, parameters, t)

  rules, shape = jax.make_jaxpr(levels, return_shape=True)(
    scalar, scalar, *leaves
  )
  read = {id(v) for e in rules.jaxpr.eqns for v in e.invars}
  read |= {id(v) for v in rules.jaxpr.outvars}
  read = [id(v) in read for v in rules.jaxpr.invars[2:]]
  numbers = [a for a, is_read in zip(leaves, read, strict=True) if is_read]

  def of_numbers(mean, std, *numbers):
    rest = iter(numbers)
    leaves = (next(rest) if is_read else None for is_read in read)
    return core.jaxpr_as_fun(rules)(mean, std, *leaves)

  parts, number = gathered(pool(moments, 1024), settings.axis_name)
  free = count * devices.axis_size(settings.axis_name) - 1
  if not any(map(jnp.ndim, numbers)):
    body = functools.partial(_decide, number, of_numbers, free)
    arrays = parts, [a.reshape(1) for a in numbers]
    like = varying(parts, (1,), parts.dtype)
    outputs = [like] * (2 + len(rules.out_avals))
    call = of_rows(body, 'neuron_decides', arrays, outputs)
    if not refusal(call, *arrays):
      mean, std, *found = (a.reshape(()) for a in call(*arrays))
      found = jax.tree.unflatten(jax.tree.structure(shape), found)
      return statistics.Statistics(mean, std), found
  mean, norm, _ = pool(parts[:number, :3], 1)[0]
  measured = statistics.Statistics(mean, norm / math.sqrt(free))
  return measured, levels(*measured, *leaves)


def _pooling(settings, parameters, axis_name):
  """Settings and parameters for a part of the batch, over an axis if any."""
  if axis_name:
    settings = settings._replace(axis_name=axis_name)
    if isinstance(norm := parameters.norm, tdbn.Own):
      norm = dataclasses.replace(norm, axis_name=axis_name)
      parameters = parameters._replace(norm=norm)
  return settings, parameters


def forward(settings, x, v, t, parameters, running, axis_name=None):
  """`fused`'s scan; arguments and results as there.

  Of a part of a batch, if an axis is named; over that all is pooled then.
  """
  settings, parameters = _pooling(settings, parameters, axis_name)
  method, num_steps = settings.method, len(x)
  dtype = parameters.decay.dtype
  given = given_of(x, None if settings.at_rest else v, parameters)
  blocks = blocks_of(given.x.shape, 4096 if num_steps <= 4 else 2048)
  # Every so often u is kept: from there on it is less to read than x is.
  often = 2 * dtype.itemsize // x.dtype.itemsize

  def call(body, name, given, *outputs):
    body = functools.partial(body, settings, blocks)
    return blocks.call(body, name, (given,), outputs)

  measuring = running is None and (
    is_measured(method.threshold) or is_measured(method.signal)
  )
  membrane = blocks.like(flat(x[0]), x, dtype)
  records, start, since = [], 0, given
  for i in range(num_steps):
    measured = None
    if measuring:
      keeps = i % often == often - 1 and i < num_steps - 1
      moments, kept = call(
        functools.partial(_measure, start=start),
        f'neuron_measures_{i - start + (not start)}_of_{num_steps}',
        since._replace(theta=given.theta[start:], known=()),
        blocks.numbers(3, x, dtype),
        membrane if keeps else None,
      )
      if keeps:
        start, since = i, given._replace(v=None, u=kept)
      measured, levels = _levels(
        settings, parameters, t + i, moments, math.prod(x.shape[1:])
      )
      known = (*given.known, measured.std.reshape(1))
      given = given._replace(known=known)
    else:
      here = jax.tree.map(lambda a: a[i], running)  # noqa: B023
      levels = dynamics.levels(method, None, here, parameters, t + i)
    records.append(dynamics.Record(*levels, measured))
    given = given._replace(theta=(*given.theta, levels[0].reshape(1)))
  like = blocks.like(given.x, x, settings.dtype)
  (spikes,) = call(_spikes, 'neuron_fires', given, like)
  # On its own, so that it is not made where nothing asks for it.
  (last,) = call(_last, 'neuron_ends', given, membrane)
  record = jax.tree.map(lambda *a: jnp.stack(a), *records)
  return time_major(spikes, x), last.reshape(x.shape[1:]), record


def backward(
  settings, silent, x, v, t, parameters, running, record, probes,
  g_spikes, g_v, g_record, axis_name=None,
):  # fmt: skip
  """`fused`'s backward pass; `silent` says that g_v is 0."""
  del g_record
  settings, parameters = _pooling(settings, parameters, axis_name)
  dtype, num_steps = parameters.decay.dtype, len(x)

  def thetas(parameters):
    levels = functools.partial(dynamics.levels, settings.method)
    levels = jax.vmap(levels, (0, 0, None, 0))
    times = dynamics.timesteps(t, x)
    return levels(record.statistics, running, parameters, times)[0]

  # Slices of what was stacked, so that XLA need not stack it.
  theta, width = (
    tuple(a[i : i + 1] for i in range(num_steps))
    for a in (record.theta, record.width)
  )
  given = given_of(x, None if settings.at_rest else v, parameters)._replace(
    theta=theta, width=width
  )
  blocks = blocks_of(given.x.shape, 1024, programs=1024)
  arrays = given, batch_major(g_spikes), None if silent else flat(g_v)
  norm = parameters.norm
  owns = isinstance(norm, tdbn.Own)
  body = functools.partial(_back, settings, blocks)
  like = blocks.like(given.x, x, x.dtype)
  g_x, numbers, g_before, sums = blocks.call(
    body,
    'neuron_sums' if owns else 'neuron_pulls',
    (*arrays, None),
    (
      None if owns else like,
      blocks.numbers(1 + num_steps, x, dtype),
      None if settings.at_rest else blocks.like(given.v, x, dtype),
      (blocks.channels(x, dtype),) * 2 if norm else None,
    ),
  )
  # Each by itself: what nothing asks for is then not summed.
  g_decay = jnp.sum(numbers[..., 0])
  g_theta = jnp.sum(numbers[..., 1:], (0, 1, 2))
  (g_parameters,) = jax.vjp(thetas, parameters)[1](g_theta)
  g_parameters = g_parameters._replace(decay=g_parameters.decay + g_decay)
  if norm:
    g_bias, g_gain = lax.reduce(
      sums,
      (jnp.zeros((), dtype),) * 2,
      lambda a, b: tuple(map(jnp.add, a, b)),
      (0, 1),
    )
    affine, pull = norm, lambda g: (g,)
    if owns:
      affine, pull = jax.vjp(tdbn.Own.affine, norm)
    g = tdbn.Affine(-affine.gain * g_bias, g_gain, g_bias)
    g_parameters = g_parameters._replace(norm=pull(g)[0])
  if owns:
    own = tuple(a[None] for a in norm.through(x, g_parameters.norm))
    # All of it again, which reads and writes less than adding to g_x would.
    outputs = (like, None, None, None)
    g_x, *_ = blocks.call(body, 'neuron_pulls', (*arrays, own), outputs)
  if axis_name:
    g_parameters = lax.psum(g_parameters, axis_name)
  if g_before is None:
    g_before = jnp.zeros_like(v)  # Nothing asks for it.
  return time_major(g_x, x), g_before.reshape(v.shape), g_parameters, probes
