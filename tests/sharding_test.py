"""A training step on four devices is the step on one with the whole batch."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsatgo_jax import linen as snn
from dsatgo_jax import losses, neurons
from dsatgo_jax import nnx as snnx
from dsatgo_jax.packing import Packed

float64 = jax.enable_x64(True)
MESH = jax.make_mesh((4,), ('batch',), axis_types=(AxisType.Auto,))


class Net(nn.Module):
  """Two spiking layers; the first starts from a given state, or at rest."""

  settings: Any
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x, state):
    """Frames [T, B, H, W, C] to logits [T, B, K], and the first's state."""
    norm = functools.partial(
      snn.TdBatchNorm, False, axis_name=self.axis_name, param_dtype=x.dtype
    )
    neuron = functools.partial(
      snn.SpikingNeuron,
      use_running_average=False,
      axis_name=self.axis_name,
      param_dtype=x.dtype,
      **dict(self.settings),
    )
    dense = functools.partial(snn.Dense, param_dtype=x.dtype)
    x = norm()(snn.Conv(4, (3, 3), param_dtype=x.dtype)(x))
    x, state = neuron()(x, state=state, return_state=True)
    x = norm()(dense(8)(x.reshape(*x.shape[:2], -1)))
    return dense(3)(neuron()(x)), state


def train_step(net, variables, x, labels, state, reduce_loss=lambda loss: loss):
  """What a step computes of the whole batch, and of each example."""

  def loss_fn(params):
    (logits, last), updates = net.apply(
      variables | {'params': params},
      x,
      state,
      mutable=['batch_stats', 'spiking'],
    )
    loss = reduce_loss(jnp.mean(losses.cross_entropy(logits, labels)))
    return loss, (updates, logits, last.v)

  (loss, (updates, logits, v)), gradients = jax.value_and_grad(
    loss_fn, has_aux=True
  )(variables['params'])
  return (loss, gradients, updates), (logits, v)


def with_jit(net, *batch):
  return jax.jit(functools.partial(train_step, net))(*batch)


def with_sharded_jit(net, variables, x, labels, state):
  """The batch is sharded, `axis_name` None."""

  def shard(tree, *spec):
    return jax.device_put(tree, NamedSharding(MESH, P(*spec)))

  if state is not None:
    state = state._replace(v=shard(state.v, 'batch'))
  batch = shard(x, None, 'batch'), shard(labels, 'batch'), state
  return with_jit(net, shard(variables), *batch)


def with_pmap(net, variables, x, labels, state):
  def step(*batch):
    (loss, gradients, updates), each = train_step(net, *batch)
    loss, gradients = lax.pmean((loss, gradients), 'batch')
    return (loss, gradients, updates), each

  def split(a, axis):
    return a.reshape(*a.shape[:axis], 4, -1, *a.shape[axis + 1 :])

  if state is not None:
    state = state._replace(v=split(state.v, 0))
  pooled, (logits, v) = jax.pmap(
    step,
    axis_name='batch',
    in_axes=(None, 1, 0, state and neurons.NeuronState(0, None)),
    out_axes=(None, (1, 0)),
  )(variables, split(x, 1), split(labels, 0), state)
  logits = logits.reshape(*logits.shape[:1], -1, *logits.shape[3:])
  return pooled, (logits, v.reshape(-1, *v.shape[2:]))


def with_shard_map(net, *batch):
  """With its checks on, which prove the pooled results equal everywhere.

  It sums the gradients of what all devices share: the mean belongs inside.
  """
  pmean = functools.partial(lax.pmean, axis_name='batch')
  state = batch[-1] and neurons.NeuronState(P('batch'), P())
  step = jax.shard_map(
    functools.partial(train_step, net, reduce_loss=pmean),
    mesh=MESH,
    in_specs=(P(), P(None, 'batch'), P('batch'), state),
    out_specs=(P(), (P(None, 'batch'), P('batch'))),
  )
  return jax.jit(step)(*batch)


def close(actual, expected):
  """To 1e-10 of the largest entry of each array."""

  def compare(path, a, b):
    scale = max(np.max(np.abs(b)), 1e-3)
    message = jax.tree_util.keystr(path)
    np.testing.assert_allclose(a, b, 0, 1e-10 * scale, err_msg=message)

  jax.tree_util.tree_map_with_path(compare, actual, expected)


@pytest.mark.parametrize(
  'settings, start',
  [
    *(
      pytest.param(*case, marks=pytest.mark.sample)
      for case in [
        ({}, 'given'),
        ({}, 'at rest'),
        (
          {'method': 'tgo', 'width_signal': 'sigma', 'reset': 'soft'},
          'at rest',
        ),
        ({'method': 'learnable_threshold', 'v_th': 0.8}, 'given'),
        ({'method': 'at'}, 'given'),
      ]
    ),
  ],
)
@float64
def test_four_devices_equal_one(settings, start):
  random = np.random.default_rng(0)
  x, v = random.normal(size=(2, 8, 4, 4, 2)), random.normal(size=(8, 4, 4, 4))
  # Devices that differ in mean and deviation.
  x = x * np.repeat([1, 2, 0.5, 3], 2)[:, None, None, None] + x[:, ::-1]
  x, labels = jnp.asarray(x), jnp.arange(8) % 3
  state = None
  if start == 'given':
    state = neurons.NeuronState(jnp.asarray(v), jnp.int32(0))
  alone = Net(tuple(settings.items()))
  pooled = Net(tuple(settings.items()), 'batch')
  key = jax.random.key(0, impl='unsafe_rbg')
  variables = jax.jit(pooled.init)(key, x, state)
  batch = variables, x, labels, state

  expected = with_jit(alone, *batch)
  assert all(g.any() for g in jax.tree.leaves(expected[0][1]))
  close(with_sharded_jit(alone, *batch), expected)
  close(with_pmap(pooled, *batch), expected)
  close(with_shard_map(pooled, *batch), expected)


class Convolutional(nn.Module):
  """Convolutions, tdBN, neurons, pools and dense layers."""

  train: bool = True
  packed: bool = False

  @nn.compact
  def __call__(self, x):
    """Frames [T, B, H, W, C] to logits [T, B, K]."""
    mode = {'use_running_average': not self.train}
    conv, dense = {}, {}
    for features in (4, 8):
      x = snn.Conv(features, (3, 3), use_bias=False, **conv)(x)
      norm = snn.TdBatchNorm(**mode).affine(x)
      x = snn.SpikingNeuron(num_steps=4, **mode)(x, norm=norm)
      x = snn.max_pool(x, (2, 2), strides=(2, 2))
      if self.packed:
        product = Packed(lax.conv_general_dilated, alone=True)
        conv = {'conv_general_dilated': product}
        dense = {'dot_general': Packed(lax.dot_general, alone=True)}
    x = snn.avg_pool(x, x.shape[2:4])
    x = snn.SpikingNeuron(num_steps=4, **mode)(snn.Dense(12)(x[:, :, 0, 0]))
    return snn.Dense(4, **dense)(x)


def sent(net, mesh, spec_of):
  """What a sharded step sends, `(entries of the largest array, how)`.

  And the parameters; `spec_of` tells how one is sharded.
  """
  x, labels = jnp.zeros((4, 8, 8, 8, 2)), jnp.arange(8) % 3
  variables = net.init(jax.random.key(0), x)

  def loss(params, x, labels):
    logits, updates = net.apply(
      variables | {'params': params}, x, mutable=['batch_stats']
    )
    return losses.tet(logits, labels).mean(), updates

  def shard(a, *spec):
    return jax.device_put(a, NamedSharding(mesh, P(*spec)))

  params = jax.tree.map(lambda a: shard(a, *spec_of(a)), variables['params'])
  arguments = params, shard(x, None, 'batch'), shard(labels, 'batch')
  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  text = step.lower(*arguments).compile().as_text()
  collectives = (
    r' = (.*?) (all-to-all|collective-permute|all-gather|all-reduce'
    r'|reduce-scatter)\('
  )
  found = []
  for shape, how in re.findall(collectives, text):
    sizes = re.findall(r'\[([\d,]*)\]', shape)
    found.append(
      (max(math.prod(map(int, filter(None, s.split(',')))) for s in sizes), how)
    )
  return found, params


@pytest.mark.parametrize(
  'train, packed, kind',
  [
    (True, True, AxisType.Explicit),
    *(
      pytest.param(*case, marks=pytest.mark.sample)
      for case in [
        (True, False, AxisType.Auto),
        (True, False, AxisType.Explicit),
        (True, True, AxisType.Auto),
        (False, False, AxisType.Auto),
        (False, False, AxisType.Explicit),
      ]
    ),
  ],
)
def test_a_sharded_batch_stays_where_it_is(train, packed, kind):
  """Nothing of it is sent to another device, images and frames alike."""
  mesh = jax.make_mesh((4,), ('batch',), axis_types=(kind,))
  found, params = sent(Convolutional(train, packed), mesh, lambda a: ())
  largest = max(a.size for a in jax.tree.leaves(params))
  for most, how in found:
    assert how in ('all-reduce', 'all-gather'), (most, how)
    assert most <= largest, (most, how)


@pytest.mark.parametrize(
  'axis', [-1, pytest.param(-2, marks=pytest.mark.sample)]
)
def test_of_sharded_parameters_they_alone_are_gathered(axis):
  """Each device keeps a quarter of what can be split; the batch stays."""

  def spec(a):
    spec = [None] * a.ndim
    if a.ndim >= -axis and a.shape[axis] % 4 == 0:
      spec[axis] = 'batch'
    return spec

  found, params = sent(Convolutional(), MESH, spec)
  sizes = [a.size for a in jax.tree.leaves(params)]
  assert {how for _, how in found} <= {
    'all-gather', 'all-reduce', 'reduce-scatter',
  }, found  # fmt: skip
  gathered = [most for most, how in found if how == 'all-gather']
  assert gathered and all(most in sizes for most in gathered), (found, sizes)
  assert all(most <= max(sizes) for most, _ in found), found


@float64
def test_nnx_under_pmap():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2, 5)))
  x *= jnp.array([1, 2, 0.5, 3])[:, None, None, None]

  def step(graph, values, x):
    model = nnx.merge(graph, values)
    y = model(x)
    return y, nnx.split(model)[1]

  def model(axis_name):
    kinds = {'axis_name': axis_name, 'param_dtype': jnp.float64}
    return nnx.split(
      nnx.Sequential(
        snnx.TdBatchNorm(5, **kinds), snnx.SpikingNeuron(num_steps=3, **kinds)
      )
    )

  whole = jnp.moveaxis(x, 0, 1).reshape(3, 8, 5)
  expected, after = step(*model(None), whole)
  graph, values = model('batch')
  y, pooled = jax.pmap(
    functools.partial(step, graph),
    axis_name='batch',
    in_axes=(None, 0),
    out_axes=(1, None),
  )(values, x)
  close(y.reshape(3, 8, 5), expected)
  close(nnx.to_pure_dict(pooled), nnx.to_pure_dict(after))
