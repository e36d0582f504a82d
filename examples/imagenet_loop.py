"""The loop of Flax's ImageNet example, with the neuron put in.

    python examples/imagenet_loop.py --steps=100

`create_train_state`, `train_step` under `pmap`, `eval_step`: names and shape
are those of flax/examples/imagenet. What is new is marked `# New`; all the rest
is that of a network with batch norm and ReLU. So that nothing is downloaded,
the images are handwritten digits, each pixel made four.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import jax_utils
from flax import linen as nn
from flax.training import train_state
from sklearn import datasets

from dsatgo_jax import linen as snn  # New.
from dsatgo_jax import losses

IMAGE, BATCH, CLASSES = 16, 32, 10


class ResNetBlock(nn.Module):
  """A residual block; spikes are added, as in SEW-ResNet."""

  filters: int
  norm: Any
  act: Any
  strides: tuple[int, int] = (1, 1)

  @nn.compact
  def __call__(self, x):
    residual = x
    y = snn.Conv(self.filters, (3, 3), self.strides, use_bias=False)(x)
    y = self.act()(self.norm()(y))
    y = snn.Conv(self.filters, (3, 3), use_bias=False)(y)
    y = self.act()(self.norm()(y))
    if residual.shape != y.shape:
      residual = snn.Conv(y.shape[-1], (1, 1), self.strides, use_bias=False)(x)
      residual = self.act()(self.norm()(residual))
    return residual + y


class ResNet(nn.Module):
  """A small ResNet."""

  stage_sizes: tuple[int, ...] = (1, 1)
  num_filters: int = 16
  num_steps: int = 2  # New.

  @nn.compact
  def __call__(self, x, train: bool = True):
    mode = {'use_running_average': not train, 'axis_name': 'batch'}
    norm = functools.partial(snn.TdBatchNorm, **mode)  # New: was nn.BatchNorm.
    act = functools.partial(  # New: was nn.relu.
      snn.SpikingNeuron, 'ds_atgo', num_steps=self.num_steps, **mode
    )
    x = snn.repeat_in_time(x, self.num_steps)  # New: [T, B, H, W, C].
    x = snn.Conv(self.num_filters, (7, 7), (2, 2), use_bias=False)(x)
    x = snn.max_pool(act()(norm()(x)), (3, 3), strides=(2, 2), padding='SAME')
    for i, block_size in enumerate(self.stage_sizes):
      for j in range(block_size):
        strides = (2, 2) if i > 0 and j == 0 else (1, 1)
        x = ResNetBlock(self.num_filters * 2**i, norm, act, strides)(x)
    x = jnp.mean(x, axis=(-3, -2))
    return snn.Dense(CLASSES)(x)  # New: logits [T, B, K].


class TrainState(train_state.TrainState):
  """As in Flax's example; running thresholds are batch_stats."""

  batch_stats: Any


def create_train_state(rng, model, learning_rate):
  """Returns the first state."""
  variables = model.init(rng, jnp.ones((2, IMAGE, IMAGE, 1)), train=False)
  return TrainState.create(
    apply_fn=model.apply,
    params=variables['params'],
    tx=optax.sgd(learning_rate, momentum=0.9, nesterov=True),
    batch_stats=variables['batch_stats'],
  )


def train_step(state, batch):
  """One step on one device of several."""

  def loss_fn(params):
    logits, new_model_state = state.apply_fn(
      {'params': params, 'batch_stats': state.batch_stats},
      batch['image'],
      mutable=['batch_stats'],
    )
    loss = losses.cross_entropy(logits, batch['label']).mean()  # New: over T.
    return loss, new_model_state

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  (loss, new_model_state), grads = grad_fn(state.params)
  grads, loss = jax.lax.pmean((grads, loss), axis_name='batch')
  state = state.apply_gradients(
    grads=grads, batch_stats=new_model_state['batch_stats']
  )
  return state, {'loss': loss}


def eval_step(state, batch):
  """The accuracy on one batch, over all devices."""
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  logits = state.apply_fn(variables, batch['image'], train=False)
  correct = losses.prediction(logits).argmax(-1) == batch['label']  # New.
  return jax.lax.pmean(correct.mean(), axis_name='batch')


def main(steps=100):
  """Trains, and returns the accuracy on images of the test."""
  devices, rng = jax.local_device_count(), np.random.default_rng(0)
  images, labels = datasets.load_digits(return_X_y=True)
  images = np.kron(images.reshape(-1, 8, 8, 1), np.ones((1, 2, 2, 1)))
  images = np.float32(images - 4.9) / 6.0
  train, test = np.split(rng.permutation(len(images)), [-320])
  state = create_train_state(jax.random.key(0), ResNet(), 0.05)
  state = jax_utils.replicate(state)
  p_train_step = jax.pmap(train_step, axis_name='batch', donate_argnums=0)
  p_eval_step = jax.pmap(eval_step, axis_name='batch')
  for step in range(steps):
    chosen = rng.choice(train, (devices, BATCH // devices), replace=False)
    batch = {'image': images[chosen], 'label': labels[chosen]}
    state, metrics = p_train_step(state, batch)
    if step % 20 == 0:
      print(f'step {step}: loss {metrics["loss"][0]:.3f}')
  test = test.reshape(devices, -1)
  batch = {'image': images[test], 'label': labels[test]}
  accuracy = float(p_eval_step(state, batch)[0])
  print(f'test accuracy: {accuracy:.2%}')
  return accuracy


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=100)
  main(**vars(parser.parse_args()))
