"""A gradient-flow study: which methods pass a gradient through many layers.

    python examples/gradient_flow.py --steps=20

Trains a deep network of each method for a few steps, and tells for each layer
how many neurons fire, how many are in the gradient window, and the norm of
dL/du.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from sklearn import datasets

from dsatgo_jax import linen as snn
from dsatgo_jax import losses
from dsatgo_jax.analysis import activity, flow

DEPTH, BATCH = 8, 64
METHODS = 'vanilla', 'at', 'tgo', 'ds_atgo'


class Net(nn.Module):
  """Dense layers, without tdBN between them, so that depth is felt."""

  method: str

  @nn.compact
  def __call__(self, x, train: bool):  # x [B, 64]
    x = snn.repeat_in_time(x, num_steps=4)
    for i in range(DEPTH):
      kernel = nn.initializers.variance_scaling(6, 'fan_in', 'normal')
      x = snn.Dense(64, use_bias=False, kernel_init=kernel)(x)
      x = snn.SpikingNeuron(
        self.method, use_running_average=not train, name=f'neuron{i:02}'
      )(x)
    return snn.Dense(10)(x)


def study(method, steps):
  """Trains, then `{layer: {name: mean over time}}` on the last batch."""
  images, labels = datasets.load_digits(return_X_y=True)
  images = np.float32(images - 4.9) / 6.0
  net, rng = Net(method), np.random.default_rng(0)
  variables = net.init(jax.random.key(0), images[:2], False)
  zeros = flow.zeros(net, variables, images[:BATCH], train=True)

  @jax.jit
  def gradients(variables, images, labels):
    def loss(params, zeros):
      logits, told = net.apply(
        variables | zeros | {'params': params},
        images,
        True,
        mutable=['batch_stats', 'spiking'],
      )
      return losses.cross_entropy(logits, labels).mean(), told

    of_loss = jax.grad(loss, argnums=(0, 1), has_aux=True)
    return of_loss(variables['params'], zeros)

  for _ in range(steps):
    chosen = rng.choice(len(images), BATCH, replace=False)
    (change, passed), told = gradients(
      variables, images[chosen], labels[chosen]
    )
    params = jax.tree.map(lambda p, g: p - 0.1 * g, variables['params'], change)
    variables = {'params': params}
    if 'batch_stats' in told:
      variables['batch_stats'] = told['batch_stats']
  norms = flow.summary(passed['flow'])
  return {
    name: {
      'fires': jnp.mean(layer['firing_rate']),
      'window': jnp.mean(layer['gradient_share']),
      'gradient': jnp.linalg.norm(norms[name]['u']),
    }
    for name, layer in activity.by_layer(told['spiking']).items()
  }


def main(steps=20):
  """Prints a table a method, and returns them."""
  found = {method: study(method, steps) for method in METHODS}
  for method, layers in found.items():
    print(f'\n{method:10}  fires  in the window  norm of dL/du')
    for name, layer in sorted(layers.items()):
      print(
        f'{name:10} {layer["fires"]:6.1%} {layer["window"]:14.1%} '
        f'{layer["gradient"]:14.2e}'
      )
  return found


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=20)
  main(**vars(parser.parse_args()))
