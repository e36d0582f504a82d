"""A training loop of one's own in Flax NNX.

    python examples/nnx_loop.py --steps=300

`model.train()` fires by the batch's thresholds and moves the running ones,
`model.eval()` fires by these. Modules that keep running thresholds take
`num_steps` when they are built.
"""

import argparse

import numpy as np
import optax
from flax import nnx
from sklearn import datasets

from dsatgo_jax import losses
from dsatgo_jax import nnx as snn

BATCH = 64


class Net(nnx.Module):
  """Two layers of convolutions, four timesteps."""

  def __init__(self, rngs: nnx.Rngs, num_steps: int = 4):
    self.num_steps = num_steps
    self.conv1 = snn.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
    self.norm1 = snn.TdBatchNorm(16)
    self.neuron1 = snn.SpikingNeuron(num_steps=num_steps)
    self.conv2 = snn.Conv(16, 32, (3, 3), use_bias=False, rngs=rngs)
    self.norm2 = snn.TdBatchNorm(32)
    self.neuron2 = snn.SpikingNeuron(num_steps=num_steps)
    self.head = snn.Dense(2 * 2 * 32, 10, rngs=rngs)

  def __call__(self, x):  # images [B, 8, 8, 1]
    x = snn.repeat_in_time(x, self.num_steps)  # [T, B, 8, 8, 1]
    x = self.neuron1(self.norm1(self.conv1(x)))
    x = snn.avg_pool(x, (2, 2), strides=(2, 2))
    x = self.neuron2(self.norm2(self.conv2(x)))
    x = snn.avg_pool(x, (2, 2), strides=(2, 2))
    return self.head(x.reshape(*x.shape[:2], -1))  # logits [T, B, 10]


def digits():
  """Images [N, 8, 8, 1], normalised, and labels [N], to train and to test."""
  images, labels = datasets.load_digits(return_X_y=True)
  images = np.float32(images.reshape(-1, 8, 8, 1) - 4.9) / 6.0
  order = np.random.default_rng(0).permutation(len(images))
  return [(images[part], labels[part]) for part in np.split(order, [1440])]


@nnx.jit
def train_step(model, optimizer, images, labels):
  """One step; updates both in place, and returns the loss."""

  def loss_fn(model):
    return losses.cross_entropy(model(images), labels).mean()

  loss, gradient = nnx.value_and_grad(loss_fn)(model)
  optimizer.update(model, gradient)
  return loss


@nnx.jit
def predict(model, images):
  """The classes [B]."""
  return losses.prediction(model(images)).argmax(-1)


def main(steps=300):
  """Trains, and returns the test accuracy."""
  (images, labels), (test_images, test_labels) = digits()
  model, rng = Net(nnx.Rngs(0)), np.random.default_rng(0)
  schedule = optax.cosine_decay_schedule(1e-2, steps)
  optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
  model.train()
  for step in range(steps):
    chosen = rng.choice(len(images), BATCH, replace=False)
    loss = train_step(model, optimizer, images[chosen], labels[chosen])
    if step % 50 == 0:
      print(f'step {step}: loss {loss:.3f}')
  model.eval()
  accuracy = float((predict(model, test_images) == test_labels).mean())
  print(f'test accuracy: {accuracy:.2%}')
  return accuracy


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=300)
  main(**vars(parser.parse_args()))
