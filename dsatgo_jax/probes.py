"""What a layer tells of the gradients that pass it: the gradient of zeros.

A layer may be given arrays of zeros, its probes. They change nothing forward;
their cotangents are statistics of the cotangents that pass in the backward
pass. So these leave the graph as gradients do, through `jit`, `vmap`, `pmap`,
`remat` and `scan`; nothing is stored, and where there is no probe nothing is
computed. All of them are sums over neurons, so that they add up over devices
and parts of a batch. `analysis.flow` makes norms, shares and cosines of them.

    paths  [T, len(FIELDS)]  sums of squares and products of what reaches u[t]
                             by its three paths, and of dL/ds[t]
    sample [T, len(FIELDS)]  the same of a sample of neurons, at less cost
    reach  [T, T + 1]        how much of the square of dL/du[t] came from the
                             spikes of 0 to T - 1 timesteps later, and, last,
                             from beyond the end of x; of such a sample
    u      [T, B, ...]       dL/du itself
    s      [T, B, ...]       dL/ds itself, what reaches the spikes from outside
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsatgo_jax import dtypes, xla

SUMS = ('paths', 'sample', 'reach')
NAMES = (*SUMS, 'u', 's')

# Sums over the neurons of a timestep: of products of the paths' cotangents, of
# the entries of dL/du that are not zero, of the squares and entries not zero of
# dL/ds, and of ones.
FIELDS = (
  'spatial', 'leak', 'reset',
  'spatial_leak', 'spatial_reset', 'leak_reset',
  'nonzero', 'spikes', 'spikes_nonzero', 'count',
)  # fmt: skip

# Gradients are multiplied by it before they are squared: 1e-28 still counts.
SCALE = 2.0**32


def zeros(name: str, x: jax.Array) -> jax.Array:
  """A probe.

  Args:
    name: of `NAMES`.
    x: pre-synaptic input, [T, B, ...].

  Returns:
    Zeros of the membrane's dtype; of the module's docstring's shape.
  """
  num_steps = x.shape[0]
  shape = {
    'paths': (num_steps, len(FIELDS)),
    'sample': (num_steps, len(FIELDS)),
    'reach': (num_steps, num_steps + 1),
    'u': x.shape,
    's': x.shape,
  }[name]
  return jnp.zeros(shape, dtypes.wide(x.dtype))


def paths(parts, g_spikes, num_neurons, zero):
  """The row of `FIELDS` of one timestep, squares multiplied by `SCALE` twice.

  Args:
    parts: the cotangent of u by each of `dynamics.PATHS`, [B, ...] each, or of
      a sample of the neurons.
    g_spikes: the cotangent of the spikes, likewise.
    num_neurons: how many the sums are to be of.
    zero: the probe's row.

  Returns:
    An array like `zero`.
  """
  scale = xla.unknown(SCALE, zero[0])
  a, b, c = (scale * part for part in parts)
  g_s = scale * g_spikes.astype(a.dtype)
  # Products, which XLA's CPU compiler reads from memory: reductions it would
  # fuse with all that the cotangents are made of.
  dot = functools.partial(jnp.vdot, precision=lax.Precision.HIGHEST)
  sums = [
    *(dot(a, a), dot(b, b), dot(c, c)),
    *(dot(a, b), dot(a, c), dot(b, c)),
    jnp.count_nonzero(a + b + c),
    dot(g_s, g_s),
    jnp.count_nonzero(g_spikes),
    a.size,
  ]
  sums = jnp.stack([jnp.asarray(total, a.dtype) for total in sums])
  return sums * (num_neurons / a.size)


def reach(contributions, g, num_steps):
  """The row of one timestep, of squares multiplied by `SCALE` twice.

  Args:
    contributions: what of g came from the spikes of this timestep and of each
      after it, and from beyond, [N, B, n], of `statistics.sample`.
    g: the cotangent of u, [B, n], of the same.
    num_steps: T.

  Returns:
    [T + 1].
  """
  projected = jnp.sum(SCALE * contributions * (SCALE * g[None]), (1, 2))
  row = jnp.zeros(num_steps + 1, g.dtype).at[-1].set(projected[-1])
  return row.at[: len(projected) - 1].set(projected[:-1])
