"""A small Spikformer: attention whose queries, keys and values are spikes.

    python examples/spikformer.py --steps=300

After Zhou et al., "Spikformer: When Spiking Neural Network Meets Transformer",
ICLR 2023: attention needs no softmax, since products of spikes are not
negative, and the order of its products is free. Every linear map is followed by
tdBN and a neuron; blocks add spikes to spikes.
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
from dsatgo_jax import losses

BATCH = 64


class Spiking(nn.Module):
  """A linear map, tdBN and neurons: [T, B, N, C] to spikes [T, B, N, D]."""

  features: int
  train: bool

  @nn.compact
  def __call__(self, x):
    mode = {'use_running_average': not self.train}
    x = snn.Dense(self.features, use_bias=False)(x)
    x = snn.TdBatchNorm(**mode)(x)
    return snn.SpikingNeuron('ds_atgo', **mode)(x)


class Attention(nn.Module):
  """Spiking self-attention over the N tokens of each timestep."""

  heads: int
  train: bool

  @nn.compact
  def __call__(self, x):
    split = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
    query, key, value = (
      Spiking(x.shape[-1], self.train, name=name)(x).reshape(split)
      for name in ('query', 'key', 'value')
    )
    weights = jnp.einsum('tbnhd,tbmhd->tbhnm', query, key)
    x_new = jnp.einsum('tbhnm,tbmhd->tbnhd', weights, value) * 0.125
    mode = {'use_running_average': not self.train}
    x_new = snn.SpikingNeuron('ds_atgo', **mode)(x_new.reshape(x.shape))
    return Spiking(x.shape[-1], self.train, name='out')(x_new)


class Spikformer(nn.Module):
  """Patches of 2 x 2 pixels, `depth` blocks, a mean over tokens."""

  width: int = 32
  depth: int = 2
  heads: int = 4
  num_steps: int = 4

  @nn.compact
  def __call__(self, x, train: bool):  # images [B, 8, 8, 1]
    x = snn.repeat_in_time(x, self.num_steps)
    x = snn.Conv(self.width, (2, 2), (2, 2), padding='VALID')(x)
    x = x.reshape(*x.shape[:2], -1, self.width)  # [T, B, 16, C]
    place = nn.initializers.normal(0.02)
    x += self.param('place', place, x.shape[-2:])
    x = Spiking(self.width, train)(x)
    for _ in range(self.depth):
      x += Attention(self.heads, train)(x)
      x += Spiking(self.width, train)(Spiking(2 * self.width, train)(x))
    return snn.Dense(10)(x.mean(2))  # logits [T, B, 10]


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_step(net, optimizer, variables, opt_state, images, labels):
  """One step; returns variables, the optimiser's state and the loss."""

  def loss_fn(params):
    logits, updates = net.apply(
      variables | {'params': params}, images, True, mutable=['batch_stats']
    )
    return losses.cross_entropy(logits, labels).mean(), updates

  params = variables['params']
  (loss, updates), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
  change, opt_state = optimizer.update(gradient, opt_state, params)
  params = optax.apply_updates(params, change)
  return {'params': params, **updates}, opt_state, loss


def main(steps=300):
  """Trains, and returns the test accuracy."""
  images, labels = datasets.load_digits(return_X_y=True)
  images = np.float32(images.reshape(-1, 8, 8, 1) - 4.9) / 6.0
  rng = np.random.default_rng(0)
  train, test = np.split(rng.permutation(len(images)), [1440])
  net = Spikformer()
  optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
  variables = net.init(jax.random.key(0), images[:2], False)
  opt_state = optimizer.init(variables['params'])
  for step in range(steps):
    chosen = rng.choice(train, BATCH, replace=False)
    variables, opt_state, loss = train_step(
      net, optimizer, variables, opt_state, images[chosen], labels[chosen]
    )
    if step % 50 == 0:
      print(f'step {step}: loss {loss:.3f}')
  logits = jax.jit(net.apply, static_argnums=2)(variables, images[test], False)
  found = losses.prediction(logits).argmax(-1)
  accuracy = float((found == labels[test]).mean())
  print(f'test accuracy: {accuracy:.2%}')
  return accuracy


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=300)
  main(**vars(parser.parse_args()))
