"""Products with Hessian and Gauss-Newton matrix beside a gradient.

  python -m benchmarks.curvature [--json FILE] [--repeats N]

Time (medians of interleaved repeats) of the gradient of a loss in training
mode, of making a product (what does not depend on the vector, once), of each
product, and of one of the products in a Lanczos iteration of 12, which is
compiled as a whole; the seconds that each takes when first called, with
compilation; and the memory that a made product keeps beside the temporary
memory of the gradient. The products are reverse over reverse, forward over
reverse with the surrogate's straight-through twin, and Gauss-Newton.
"""

import functools
import time

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from benchmarks import timing
from dsatgo_jax import losses, models, surrogate
from dsatgo_jax.analysis import curvature

NUM_MATVECS = 12
NETWORKS = {
  'the digits network, T = 4, batch 64': (
    models.ConvNet, {}, (64, 8, 8, 1),
  ),
  'ResNet-19 of an eighth the width, T = 2, batch 8': (
    models.ResNet19,
    {'planes': (16, 32, 64), 'head_width': 32},
    (8, 32, 32, 3),
  ),
}  # fmt: skip


def functions(network, settings, shape):
  """What is timed, by name; what is first called, first."""
  x = jax.random.normal(jax.random.key(0), shape)
  labels = jnp.arange(shape[0]) % 10
  net = network(**settings)
  twin = network(
    surrogate=surrogate.straight_through(surrogate.rectangular), **settings
  )
  variables = jax.jit(net.init)(jax.random.key(1), x)
  params = variables['params']

  def model(net, x, params):
    everything = {**variables, 'params': params}
    return net.apply(everything, x, train=True, mutable=['batch_stats'])[0]

  def of_logits(labels, logits):
    return losses.cross_entropy(logits, labels).mean()

  def loss(net, x, labels, params):
    return of_logits(labels, model(net, x, params))

  whole = Partial(functools.partial(loss, net), x, labels)
  logits = Partial(functools.partial(model, net), x)
  top = Partial(of_logits, labels)
  of_twin = Partial(functools.partial(loss, twin), x, labels)
  gradient = jax.jit(jax.grad(whole))
  makers = {
    'reverse over reverse': lambda: curvature.hvp(whole, params),
    'forward over reverse': lambda: curvature.hvp(
      of_twin, params, mode='forward'
    ),
    'Gauss-Newton': lambda: curvature.gnvp(logits, top, params),
  }
  made = {}

  def make(name):
    made[name] = makers[name]()
    return made[name]

  timed = {'gradient': lambda: gradient(params)}
  for name in makers:
    timed[f'{name}, made'] = functools.partial(make, name)
    timed[name] = lambda name=name: made[name](params)
    timed[f'{name}, in Lanczos'] = lambda name=name: curvature.eigenpairs(
      made[name], params, key=jax.random.key(2), num_matvecs=NUM_MATVECS
    )
  temporary = gradient.lower(params).compile().memory_analysis()
  return timed, made, temporary.temp_size_in_bytes


def measure(arguments):
  """Measures and prints everything."""
  results = {}
  for title, network in NETWORKS.items():
    timed, made, temporary = functions(*network)
    blocking = {
      name: lambda f=f: jax.block_until_ready(f()) for name, f in timed.items()
    }
    first = {}
    for name, function in blocking.items():
      start = time.perf_counter()
      function()
      first[name] = time.perf_counter() - start
    times = timing.medians(blocking, arguments.repeats, seconds=300)
    rows = {}
    for name, ms in times.items():
      each = NUM_MATVECS if name.endswith('Lanczos') else 1
      rows[name] = {
        'ms': ms / each,
        'of a gradient': ms / each / times['gradient'],
        'first call, s': first[name],
      }
      if name in made:
        kept = sum(leaf.nbytes for leaf in jax.tree.leaves(made[name]))
        rows[name] |= {'MiB kept': kept / 2**20}
    rows['gradient']['MiB kept'] = temporary / 2**20
    timing.table(title, rows, list(rows['gradient']))
    results[title] = rows
  return results


if __name__ == '__main__':
  timing.main(__doc__.split('\n')[0], measure)
