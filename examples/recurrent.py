"""A recurrent spiking network on spike trains whose times are the message.

    python examples/recurrent.py --steps=300

Ten neurons fire once each. In one class they fire in an order, in the others in
other orders, moved and jittered: how often they fire says nothing. `SpikingRNN`
has weights from its spikes back to its membranes, and `LeakyIntegrator`, which
does not fire, gives the logits.
"""

import argparse
import functools

import jax
import numpy as np
import optax
from flax import linen as nn

from dsatgo_jax import linen as snn
from dsatgo_jax import losses

NUM_STEPS, UNITS, CLASSES, BATCH = 40, 10, 4, 64


class Net(nn.Module):
  """32 recurrent neurons."""

  @nn.compact
  def __call__(self, x, train: bool):  # events [T, B, UNITS]
    mode = {'use_running_average': not train}
    x = nn.Dense(32, kernel_init=nn.initializers.normal(1.0))(x)
    x = snn.TdBatchNorm(**mode)(x)
    x = snn.SpikingRNN(
      'learnable_threshold',
      decay=0.9,
      surrogate='arctan',
      recurrent_kernel_init=nn.initializers.orthogonal(0.2),
      **mode,
    )(x)
    return snn.LeakyIntegrator(0.95)(nn.Dense(CLASSES)(x))  # [T, B, CLASSES]


def draw(rng, orders, count):
  """Events [T, B, UNITS], one a unit, and the classes [B]."""
  labels = rng.integers(CLASSES, size=count)
  times = 2 * orders[labels] + rng.integers(0, 16, (count, 1))
  times = np.clip(times + rng.integers(-1, 2, times.shape), 0, NUM_STEPS - 1)
  events = np.zeros((NUM_STEPS, count, UNITS), np.float32)
  events[times, np.arange(count)[:, None], np.arange(UNITS)] = 1
  return events, labels


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_step(net, optimizer, variables, opt_state, events, labels):
  """One step; returns variables, the optimiser's state and the loss."""

  def loss_fn(params):
    logits, updates = net.apply(
      variables | {'params': params}, events, True, mutable=['batch_stats']
    )
    return losses.cross_entropy(logits, labels).mean(), updates

  params = variables['params']
  (loss, updates), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
  change, opt_state = optimizer.update(gradient, opt_state, params)
  params = optax.apply_updates(params, change)
  return {'params': params, **updates}, opt_state, loss


def main(steps=300):
  """Trains, and returns the accuracy on new spike trains."""
  rng = np.random.default_rng(0)
  orders = rng.permuted(np.tile(np.arange(UNITS), (CLASSES, 1)), axis=1)
  net = Net()
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
  variables = net.init(jax.random.key(0), draw(rng, orders, 2)[0], False)
  opt_state = optimizer.init(variables['params'])
  for step in range(steps):
    variables, opt_state, loss = train_step(
      net, optimizer, variables, opt_state, *draw(rng, orders, BATCH)
    )
    if step % 50 == 0:
      print(f'step {step}: loss {loss:.3f}')
  events, labels = draw(rng, orders, 1000)
  logits = jax.jit(net.apply, static_argnums=2)(variables, events, False)
  accuracy = float((losses.prediction(logits).argmax(-1) == labels).mean())
  print(f'accuracy on new spike trains: {accuracy:.2%}')
  return accuracy


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=300)
  main(**vars(parser.parse_args()))
