"""At the start: rates, membranes and gradients by depth, before training."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from dsatgo_jax import linen as snn
from dsatgo_jax import losses
from dsatgo_jax import nnx as snnx
from dsatgo_jax.analysis import start

close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-7)
RNG = np.random.default_rng(0)
BATCH = {
  'x': jnp.asarray(RNG.normal(size=(3, 16, 5)), jnp.float32),  # [T, B, C]
  'label': jnp.arange(16) % 3,
}


class Net(nn.Module):
  """Dense layers with neurons; named so that names sort in another order."""

  depth: int
  method: str = 'ds_atgo'
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x, train: bool):
    """[T, B, C] to logits [T, B, 3]."""
    names = [f'z{i}' for i in range(self.depth - 1)] + ['last']
    for name in names:
      x = nn.Dense(8, name=f'{name}_weights', use_bias=False)(x)
      x = snn.SpikingNeuron(
        self.method, use_running_average=not train, name=f'{name}_neuron'
      )(x)
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(3, name='head', use_bias=False)(x)


class NnxNet(nnx.Module):
  """The same."""

  def __init__(self, depth, rngs):
    sizes = [5] + [8] * depth
    self.weights = nnx.List(
      snnx.Dense(*pair, use_bias=False, rngs=rngs)
      for pair in zip(sizes, sizes[1:], strict=False)
    )
    self.neurons = nnx.List(
      snnx.SpikingNeuron(num_steps=3) for _ in range(depth)
    )
    self.head = snnx.Dense(8, 3, use_bias=False, rngs=rngs)

  def __call__(self, x, train):
    """[T, B, C] to logits [T, B, 3]."""
    for layer, neuron in zip(self.weights, self.neurons, strict=True):
      x = neuron(layer(x))
    return self.head(x)


def loss(net, batch):
  logits = net(batch['x'], train=True)
  return losses.cross_entropy(logits, batch['label']).mean()


@pytest.mark.sample
def test_equals_what_a_training_step_sees():
  rng = jax.random.key(3)
  found = start.by_depth(Net, (2, 1), loss, BATCH, rng)
  assert list(found) == [2, 1]
  for depth, one in found.items():
    net = Net(depth)
    of_params, _ = jax.random.split(rng)
    variables = net.init(of_params, BATCH['x'], train=True)

    def value(params, net=net, variables=variables):
      logits, updates = net.apply(
        variables | {'params': params}, BATCH['x'], train=True,
        mutable=['batch_stats', 'spiking'],
      )  # fmt: skip
      entropy = losses.cross_entropy(logits, BATCH['label'])
      return entropy.mean(), updates['spiking']

    (expected, sown), slopes = jax.value_and_grad(value, has_aux=True)(
      variables['params']
    )
    close(one.loss, float(expected))
    # From the input on, not by name.
    layers = [*(f'z{i}' for i in range(depth - 1)), 'last']
    assert list(one.neurons) == [f'{name}_neuron' for name in layers]
    kernels = [name for name in one.gradients if name.endswith('kernel')]
    assert kernels == [
      f'{name}/kernel' for name in [*(f'{n}_weights' for n in layers), 'head']
    ]
    for name, activity in one.neurons.items():
      assert activity.firing_rate.shape == (3,)
      for field, numbers in activity._asdict().items():
        close(numbers, np.asarray(sown[name][field]))
    norms = {
      f'{module}/{name}': float(np.linalg.norm(slope))
      for module, arrays in slopes.items()
      for name, slope in arrays.items()
    }
    close(one.gradients, norms)


def test_linen_and_nnx():
  net = NnxNet(2, nnx.Rngs(0))
  kernels = [
    *(layer.kernel[...] for layer in net.weights),
    net.head.kernel[...],
  ]

  def fixed(depth):
    """A Linen network that starts with the other's weights."""
    del depth
    return WithKernels(tuple(map(Frozen, kernels)))

  (ours,) = start.by_depth(lambda _: net, [2], loss, BATCH).values()
  (theirs,) = start.by_depth(fixed, [2], loss, BATCH).values()
  close(ours.loss, theirs.loss)
  assert list(ours.neurons) == ['neurons/0', 'neurons/1']
  close(list(ours.neurons.values()), list(theirs.neurons.values()))
  assert list(ours.gradients) == [
    'weights/0/kernel', 'neurons/0/w', 'weights/1/kernel', 'neurons/1/w',
    'head/kernel',
  ]  # fmt: skip
  close(list(ours.gradients.values()), list(theirs.gradients.values()))
  # The network that was given is as it was.
  assert (net.neurons[0].running_threshold[...] == 1).all()


class Frozen:
  """An array that a module's attribute may be."""

  def __init__(self, array):
    self.array = array


class WithKernels(nn.Module):
  """`NnxNet` in Linen."""

  kernels: tuple

  @nn.compact
  def __call__(self, x, train: bool):
    """[T, B, C] to logits [T, B, 3]."""
    for i, kernel in enumerate(self.kernels):
      weights = self.param(f'kernel{i}', lambda _, kernel=kernel: kernel.array)
      x = x @ weights
      if i < len(self.kernels) - 1:
        x = snn.SpikingNeuron(use_running_average=not train, name=f'n{i}')(x)
    return x


@pytest.mark.sample
def test_where_a_fixed_threshold_goes_silent():
  """Deep layers of `vanilla` get nothing, and give no gradient to the first."""
  vanilla = start.by_depth(
    functools.partial(Net, method='vanilla'), [8], loss, BATCH
  )[8]
  adaptive = start.by_depth(Net, [8], loss, BATCH)[8]
  assert not vanilla.neurons['last_neuron'].firing_rate.any()
  assert vanilla.gradients['z0_weights/kernel'] == 0
  assert (adaptive.neurons['last_neuron'].firing_rate > 0).all()
  assert adaptive.gradients['z0_weights/kernel'] > 0


def test_dropout_and_bfloat16():
  batch = BATCH | {'x': BATCH['x'].astype(jnp.bfloat16)}
  make = functools.partial(Net, dropout=0.5)
  (found,) = start.by_depth(make, [2], loss, batch).values()
  assert len(found.neurons) == 2
  assert all(norm > 0 for norm in found.gradients.values())
  (again,) = start.by_depth(make, [2], loss, batch).values()
  assert found.loss == again.loss


def test_a_network_without_our_neurons():
  found = start.by_depth(nn.Dense, [3], lambda net, x: net(x).sum(), BATCH['x'])
  assert found[3].neurons == {}
  # The gradient of the bias is the number of examples and timesteps, 3 times.
  assert found[3].gradients['bias'] == pytest.approx(48 * 3**0.5)


def test_errors():
  with pytest.raises(ValueError, match='a Linen or an NNX module, got 4'):
    start.by_depth(lambda depth: depth, [4], loss, BATCH)
