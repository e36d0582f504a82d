"""A whole training step beside the same network with ReLU for its neurons.

  python -m benchmarks.train_step [--json FILE] [--repeats N]

Time (medians of interleaved repeats) and temporary memory (the compiler's
`memory_analysis`) of loss and gradients: with ReLU in the place of the neurons,
with the neurons' own backward pass, with the scan left to autodiff, and with
the options that the job compiles with on CPU; and the time of PyTorch.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks import pytorch, timing
from dsatgo_jax import losses, models
from train.step import CPU_OPTIONS

NETWORKS = {
  'ResNet-19, T = 2': (models.ResNet19, {'num_steps': 2}, (8, 32, 32, 3)),
  'VGGSNN, T = 10': (models.VGGSNN, {}, (10, 4, 48, 48, 2)),
}


class Relu(nn.Module):
  """Stands where a neuron stands."""

  @nn.compact
  def __call__(self, x, norm, tdbn_scale):
    """Takes what a neuron takes."""
    del tdbn_scale
    return jax.nn.relu(norm(x)).astype(x.dtype)


def relu_twin(network):
  """The same network with ReLU in the place of the neurons."""

  class Twin(network):
    def parts(self, train):
      return super().parts(train)._replace(neuron=Relu)

  return Twin


def loss_and_gradients(network, pool=lambda loss: loss):
  """The step, of variables, images and labels; `pool` is of the loss."""

  def step(variables, x, labels):
    def loss(params):
      logits, updates = network.apply(
        {**variables, 'params': params}, x, train=True, mutable=['batch_stats']
      )
      return pool(losses.cross_entropy(logits, labels).mean()), updates

    return jax.value_and_grad(loss, has_aux=True)(variables['params'])

  return step


def compiled(network, shape, options=None):
  """Loss and gradients of a network, compiled, and its arguments."""
  x = jax.random.normal(jax.random.key(0), shape)
  labels = jnp.zeros(shape[0] if len(shape) == 4 else shape[1], jnp.int32)
  arguments = (network.init(jax.random.key(1), x), x, labels)
  step = loss_and_gradients(network)
  return jax.jit(step).lower(*arguments).compile(options), arguments


def measure(arguments):
  """Measures and prints everything."""
  results = {}
  for title, (network, settings, shape) in NETWORKS.items():
    steps = {
      'ReLU': compiled(relu_twin(network)(**settings), shape),
      'spiking': compiled(network(**settings), shape),
    }
    steps['spiking, autodiff'] = compiled(
      network(fused=False, **settings), shape
    )
    for name, net in (('ReLU', relu_twin(network)), ('spiking', network)):
      steps[f"{name}, the job's options"] = compiled(
        net(**settings), shape, CPU_OPTIONS
      )
    functions = {
      name: lambda f=f, a=a: jax.block_until_ready(f(*a))
      for name, (f, a) in steps.items()
    }
    if network is models.ResNet19:
      try:
        for neuron in ('relu', 'ds_atgo'):
          functions[f'PyTorch, {neuron}'] = pytorch.training_step(neuron)
      except ImportError:
        print('PyTorch: not installed')
    times = timing.medians(functions, arguments.repeats, seconds=300)
    rows = {
      name: {'ms': ms, 'of ReLU': ms / times['ReLU']}
      for name, ms in times.items()
    }
    memory = {
      name: f.memory_analysis().temp_size_in_bytes / 2**20
      for name, (f, _) in steps.items()
    }
    for name, size in memory.items():
      rows[name] |= {'MiB': size, 'MiB of ReLU': size / memory['ReLU']}
    timing.table(title, rows, ('ms', 'of ReLU', 'MiB', 'MiB of ReLU'))
    results[title] = rows
  return results


if __name__ == '__main__':
  timing.main(__doc__.split('\n')[0], measure)
