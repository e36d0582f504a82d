"""What it costs to look at gradients and membranes in a training step.

  python -m benchmarks.analysis [--json FILE] [--repeats N]

Time (medians of interleaved repeats) and temporary memory (the compiler's
`memory_analysis`) of loss and gradients: plain; with the layers' activity,
histograms included; with the norms, paths and cosines of their gradients, of a
sample of the neurons (`flow.zeros(..., names=['sample'])`); with both; with
those of all neurons; with how far the gradients reach in time; and with the
gradients of all membranes and spikes kept as arrays, which is what hooks do.
Products with the Hessian beside a gradient: `benchmarks.curvature`.
"""

import jax
import jax.numpy as jnp

from benchmarks import timing
from dsatgo_jax import losses, models
from dsatgo_jax.analysis import flow

NETWORKS = {
  'the digits network, T = 4, batch 64': (models.ConvNet, {}, (64, 8, 8, 1)),
  'ResNet-19 of an eighth of the width, T = 2, batch 16': (
    models.ResNet19,
    {'planes': (16, 32, 64), 'head_width': 32},
    (16, 32, 32, 3),
  ),
  'ResNet-19 of half the width, T = 2, batch 8': (
    models.ResNet19,
    {'planes': (64, 128, 256), 'head_width': 128},
    (8, 32, 32, 3),
  ),
}
ACTIVITY = ('spiking', 'histograms')
# What is asked for: collections, and probes.
WAYS = {
  'plain': ((), ()),
  'activity': (ACTIVITY, ()),
  'flow, of a sample': ((), ('sample',)),
  'both': (ACTIVITY, ('sample',)),
  'flow, of all neurons': ((), ('paths',)),
  'flow and reach': ((), ('paths', 'reach')),
  'arrays kept': (('membranes',), ('u', 's')),
}


def compiled(net, shape, collections, names):
  """Loss, gradients and what is asked for, compiled; and its arguments."""
  x = jax.random.normal(jax.random.key(0), shape)
  labels = jnp.arange(shape[0]) % 10
  variables = jax.jit(net.init)(jax.random.key(1), x)
  zeros = flow.zeros(net, variables, x, train=True, names=names)

  def step(variables, zeros, x, labels):
    def loss(params, zeros):
      logits, told = net.apply(
        {**variables, **zeros, 'params': params},
        x,
        train=True,
        mutable=['batch_stats', *collections],
      )
      return losses.cross_entropy(logits, labels).mean(), told

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(
      variables['params'], zeros
    )

  arguments = (variables, zeros, x, labels)
  return jax.jit(step).lower(*arguments).compile(), arguments


def measure(arguments):
  """Measures and prints everything."""
  results = {}
  for title, (network, settings, shape) in NETWORKS.items():
    net = network(**settings)
    steps = {name: compiled(net, shape, *way) for name, way in WAYS.items()}
    times = timing.medians(
      {
        name: lambda f=f, a=a: jax.block_until_ready(f(*a))
        for name, (f, a) in steps.items()
      },
      arguments.repeats,
      seconds=120,
    )
    memory = {
      name: f.memory_analysis().temp_size_in_bytes / 2**20
      for name, (f, _) in steps.items()
    }
    rows = {
      name: {
        'ms': times[name],
        'of plain': times[name] / times['plain'],
        'MiB': memory[name],
        'MiB of plain': memory[name] / memory['plain'],
      }
      for name in WAYS
    }
    timing.table(title, rows, ('ms', 'of plain', 'MiB', 'MiB of plain'))
    results[title] = rows
  return results


if __name__ == '__main__':
  timing.main(__doc__.split('\n')[0], measure)
