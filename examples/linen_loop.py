"""A training loop of one's own in Flax Linen, `jax.jit` over all devices.

    python examples/linen_loop.py --steps=300

The batch is sharded, the rest is as on one device: neither model nor step knows
of devices, and statistics and thresholds are those of the whole batch. In the
model `BatchNorm` and `relu` became `TdBatchNorm` and `SpikingNeuron`; the loop
is one written for batch norm.
"""

import argparse
import functools

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn import datasets

from dsatgo_jax import linen as snn
from dsatgo_jax import losses

BATCH = 64


class Net(nn.Module):
  """Two layers of convolutions, four timesteps."""

  num_steps: int = 4

  @nn.compact
  def __call__(self, x, train: bool):  # images [B, 8, 8, 1]
    mode = {'use_running_average': not train}
    x = snn.repeat_in_time(x, self.num_steps)  # [T, B, 8, 8, 1]
    for features in (16, 32):
      x = snn.Conv(features, (3, 3), use_bias=False)(x)
      x = snn.TdBatchNorm(**mode)(x)
      x = snn.SpikingNeuron(num_steps=self.num_steps, **mode)(x)
      x = snn.avg_pool(x, (2, 2), strides=(2, 2))
    return snn.Dense(10)(x.reshape(*x.shape[:2], -1))  # logits [T, B, 10]


def digits():
  """Images [N, 8, 8, 1], normalised, and labels [N], to train and to test."""
  images, labels = datasets.load_digits(return_X_y=True)
  images = np.float32(images.reshape(-1, 8, 8, 1) - 4.9) / 6.0
  order = np.random.default_rng(0).permutation(len(images))
  return [(images[part], labels[part]) for part in np.split(order, [1440])]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(net, optimizer, state, images, labels):
  """One step; returns the new state and the loss."""
  params, batch_stats, opt_state = state

  def loss_fn(params):
    logits, updates = net.apply(
      {'params': params, 'batch_stats': batch_stats},
      images,
      train=True,
      mutable=['batch_stats'],  # Running thresholds are in it too.
    )
    return losses.cross_entropy(logits, labels).mean(), updates

  (loss, updates), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
  change, opt_state = optimizer.update(gradient, opt_state, params)
  params = optax.apply_updates(params, change)
  return (params, updates['batch_stats'], opt_state), loss


@functools.partial(jax.jit, static_argnums=0)
def predict(net, params, batch_stats, images):
  """The classes [B]."""
  variables = {'params': params, 'batch_stats': batch_stats}
  logits = net.apply(variables, images, train=False)
  return losses.prediction(logits).argmax(-1)


def main(steps=300):
  """Trains, and returns the test accuracy."""
  (images, labels), (test_images, test_labels) = digits()
  net, rng = Net(), np.random.default_rng(0)
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

  mesh = jax.make_mesh((jax.device_count(),), ('batch',))
  everywhere, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P('batch'))
  variables = net.init(jax.random.key(0), images[:2], train=False)
  params, batch_stats = variables['params'], variables['batch_stats']
  state = jax.device_put(
    (params, batch_stats, optimizer.init(params)), everywhere
  )
  for step in range(steps):
    chosen = rng.choice(len(images), BATCH, replace=False)
    batch = jax.device_put((images[chosen], labels[chosen]), spread)
    state, loss = train_step(net, optimizer, state, *batch)
    if step % 50 == 0:
      print(f'step {step}: loss {loss:.3f}')
  correct = predict(net, *state[:2], test_images) == test_labels
  accuracy = float(correct.mean())
  print(f'test accuracy: {accuracy:.2%}')
  return accuracy


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=300)
  main(**vars(parser.parse_args()))
