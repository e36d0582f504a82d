"""A method of one's own in twenty lines: threshold, width, what is measured.

    python examples/own_method.py --steps=200

The threshold is the root mean square of the membrane, and the surrogate is as
wide as the threshold is high. The rules are functions; nothing is registered.
What a method measures is kept as running averages for inference without more
being said.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn import datasets

from dsatgo_jax import linen as snn
from dsatgo_jax import losses, methods


def mean_square(u, axis_name):
  """Measures: of all neurons of a layer, over all devices."""
  square = jnp.mean(u**2)
  return jax.lax.pmean(square, axis_name) if axis_name else square


def root(square, parameters, t):
  """Threshold rule: fires where the membrane is above its own size."""
  return parameters.f_c * jnp.sqrt(square)


def as_high(signal, parameters, t):
  """Width rule: as wide as the threshold is high."""
  return parameters.width * signal


OWN = methods.Method(root, as_high, signal=root, measure=mean_square)


class Net(nn.Module):
  """Two dense layers."""

  method: methods.Name | methods.Method

  @nn.compact
  def __call__(self, x, train: bool):  # x [B, 64]
    mode = {'use_running_average': not train}
    x = snn.repeat_in_time(x, num_steps=4)
    for _ in range(2):
      x = snn.TdBatchNorm(**mode)(snn.Dense(64, use_bias=False)(x))
      x = snn.SpikingNeuron(self.method, num_steps=4, **mode)(x)
    return snn.Dense(10)(x)  # logits [T, B, 10]


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_step(net, optimizer, variables, opt_state, images, labels):
  """One step; returns variables and the optimiser's state."""

  def loss_fn(params):
    logits, updates = net.apply(
      variables | {'params': params}, images, True, mutable=['batch_stats']
    )
    return losses.cross_entropy(logits, labels).mean(), updates

  params = variables['params']
  gradient, updates = jax.grad(loss_fn, has_aux=True)(params)
  change, opt_state = optimizer.update(gradient, opt_state, params)
  return {'params': optax.apply_updates(params, change), **updates}, opt_state


def accuracy(method, steps):
  """Trains a network of the method, and returns its test accuracy."""
  images, labels = datasets.load_digits(return_X_y=True)
  images = np.float32(images - 4.9) / 6.0
  rng = np.random.default_rng(0)
  train, test = np.split(rng.permutation(len(images)), [1440])
  net, optimizer = Net(method), optax.adam(5e-3)
  variables = net.init(jax.random.key(0), images[:2], False)
  opt_state = optimizer.init(variables['params'])
  for _ in range(steps):
    chosen = rng.choice(train, 64, replace=False)
    variables, opt_state = train_step(
      net, optimizer, variables, opt_state, images[chosen], labels[chosen]
    )
  found = losses.prediction(net.apply(variables, images[test], False)).argmax(
    -1
  )
  return float((found == labels[test]).mean())


def main(steps=200):
  """Prints and returns the accuracies of this method and of ds_atgo."""
  found = {'own': accuracy(OWN, steps), 'ds_atgo': accuracy('ds_atgo', steps)}
  for name, value in found.items():
    print(f'{name}: {value:.2%}')
  return found


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=200)
  main(**vars(parser.parse_args()))
