"""Energy: counted by hand, by loops over receptive fields, by SpikingJelly."""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dsatgo_jax import linen as snn
from dsatgo_jax import models
from dsatgo_jax import nnx as snnx
from dsatgo_jax.analysis import energy


def spikes(*shape, seed=0, rate=0.3, most=1):
  """Spikes of up to `most`, float32."""
  draw = np.random.default_rng(seed).random(shape)
  return jnp.float32(np.floor(most * np.maximum(0, draw - 1 + rate) / rate + 1)
                     * (draw > 1 - rate))  # fmt: skip


def normal(*shape, seed=0):
  x = np.random.default_rng(seed).normal(0.3, 1, shape)
  return jnp.asarray(x, jnp.float32)


def rows(measured):
  """(kind, operations, the twin's) by layer."""
  return {
    name: (row.kind, row.operations, row.relu_operations)
    for name, row in measured.layers.items()
  }


# By hand.


class Small(nn.Module):
  """Three layers of weights, two of them behind spikes."""

  @nn.compact
  def __call__(self, x):
    """Images [B, 3, 3, 1], shown twice, to [2, B, 4]."""
    x = nn.Conv(2, (3, 3), name='encode')(x)
    x = snn.repeat_in_time(x > 0, 2).astype(jnp.float32)
    x = nn.Conv(5, (2, 2), strides=(2, 2), padding='VALID', name='conv')(x)
    x = jnp.where(x > 0, 2.0, 0.0)
    return nn.Dense(4, name='head')(x.reshape(2, len(x[0]), -1))


def test_by_hand():
  images = jnp.float32(np.linspace(-1, 2, 9).reshape(1, 3, 3, 1))
  net = Small()
  variables = net.init(jax.random.key(0), images)
  # Channel 0 copies the image, channel 1 is silent; so the spikes are
  #   0 0 0
  #   1 1 1
  #   1 1 1
  kernel = jnp.zeros((3, 3, 1, 2)).at[1, 1, 0, 0].set(1)
  variables['params']['encode']['kernel'] = kernel
  variables['params']['conv']['kernel'] = jnp.ones((2, 2, 2, 5))
  found = energy.measure(net.apply, variables, images, num_steps=2)
  # encode: a corner of the image reaches 4 outputs, an edge 6, the centre 9:
  #   (4 * 4 + 4 * 6 + 9) * 2 channels = 98, once.
  # conv: its stride leaves out the last row and column; there is one output,
  #   at 4 inputs, of which the two in the second row are spikes; to 5 channels,
  #   at 2 timesteps: 2 * 5 * 2 = 20. All connections: 4 * 2 channels * 5 = 40.
  # head: 5 inputs of size 2, to 4 outputs, at 2 timesteps: 5 * 2 * 4 * 2 = 80.
  #   All connections: 5 * 4 = 20.
  assert rows(found) == {
    'encode': ('MAC', 98, 98),
    'conv': ('AC', 20, 40),
    'head': ('AC', 80, 20),
  }
  # No pixel is 0; of the conv's 18 inputs 6 are spikes, of the head's 5 all.
  rates = [row.rate for row in found.layers.values()]
  np.testing.assert_allclose(rates, [1, 6 / 18, 1])
  # 4.6 * 98 = 450.8; 0.9 * 20 = 18; 0.9 * 80 = 72; 4.6 * 158 = 726.8.
  energies = [row.energy for row in found.layers.values()]
  np.testing.assert_allclose(energies, [450.8, 18, 72])
  np.testing.assert_allclose(
    found[1:], [100, 98, 540.8, 158, 726.8], rtol=1e-12
  )
  other = energy.measure(
    net.apply, variables, images, num_steps=2,
    accumulate=0.4, multiply_accumulate=1.5,
  )  # fmt: skip
  assert other.energy == pytest.approx(0.4 * 100 + 1.5 * 98)


def test_border_and_stride():
  """A 3 x 3 kernel on a 4 x 4 image, padded by 1, with stride 2.

  Outputs are centred on rows 0 and 2: row 0 is in one receptive field, row 1 in
  two, rows 2 and 3 in one.
  """
  x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 1, 0].set(1).at[0, 3, 1, 0].set(1)
  kernel = {'w': jnp.ones((3, 3, 1, 1))}

  def apply(variables, x):
    return lax.conv_general_dilated(
      x, variables['w'], (2, 2), ((1, 1), (1, 1)),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )  # fmt: skip

  found = energy.measure(apply, kernel, x, num_steps=1)
  # 2 * 2 for the spike at (1, 1), 1 * 2 for the one at (3, 1); 5 * 5 in all.
  assert rows(found) == {'w': ('AC', 6, 25)}


# By loops over receptive fields.


def receptive_fields(x, kernel, stride, padding, dilation, holes, groups):
  """Sum over outputs of the spikes, and of the inputs, that each of them sees.

  Of x [N, C, *space] and kernel [O, C / groups, *taps].
  """
  batch_groups, groups = groups
  taps, space = kernel.shape[2:], x.shape[2:]
  outputs = [
    ((n - 1) * h + 1 + low + high - (k - 1) * d - 1) // s + 1
    for n, h, (low, high), k, d, s in zip(
      space, holes, padding, taps, dilation, stride, strict=True
    )
  ]
  arrived = connections = 0
  for position in itertools.product(*map(range, outputs)):
    for tap in itertools.product(*map(range, taps)):
      at = [
        p * s + t * d - low
        for p, s, t, d, (low, _) in zip(
          position, stride, tap, dilation, padding, strict=True
        )
      ]
      if any(a % h for a, h in zip(at, holes, strict=True)):
        continue
      at = [a // h for a, h in zip(at, holes, strict=True)]
      if not all(0 <= a < n for a, n in zip(at, space, strict=True)):
        continue
      # Each output channel sees the channels of its group, in the examples of
      # its batch group.
      for channel in range(kernel.shape[0]):
        group = channel * groups // kernel.shape[0]
        first = group * kernel.shape[1]
        part = channel * batch_groups // kernel.shape[0]
        examples = len(x) // batch_groups
        seen = x[
          (
            slice(part * examples, (part + 1) * examples),
            slice(first, first + kernel.shape[1]),
            *at,
          )
        ]
        arrived += int(np.abs(seen).sum())
        connections += seen.size
  return arrived, connections


@pytest.mark.parametrize('seed', range(12))
def test_convolutions_as_loops_over_receptive_fields(seed):
  rng = np.random.default_rng(seed)
  rank = 1 + seed % 3

  def draw(low, high):
    return tuple(int(n) for n in rng.integers(low, high + 1, rank))

  space, taps = draw(3, 6 - rank), draw(1, 3)
  stride, dilation, holes = draw(1, 3), draw(1, 2), draw(1, 2)
  padding = tuple(zip(draw(-1, 2), draw(0, 2), strict=True))
  groups = [(1, 1), (1, 2), (2, 1)][seed % 3]
  kernel = jnp.asarray(rng.normal(size=(4, 3, *taps)), jnp.float32)
  x = spikes(4, 3 * groups[1], *space, seed=seed, most=3)
  x = x * rng.choice([-1, 1], x.shape)  # Of either sign.

  def apply(variables, x):
    return lax.conv_general_dilated(
      x, variables['w'], stride, padding, holes, dilation,
      batch_group_count=groups[0], feature_group_count=groups[1],
    )  # fmt: skip

  found = energy.measure(apply, {'w': kernel}, x, num_steps=1)
  arrived, connections = receptive_fields(
    np.asarray(x), kernel, stride, padding, dilation, holes, groups
  )
  row = found.layers['w']
  assert row.kind == 'AC' and row.rate == np.count_nonzero(x) / x.size
  assert row.operations * 4 == arrived
  assert row.relu_operations * 4 == connections
  image = energy.measure(apply, {'w': kernel}, x / 2, num_steps=1)
  assert rows(image)['w'] == ('MAC', connections / 4, connections / 4)


@pytest.mark.parametrize('left', [True, False])
def test_products_as_loops(left):
  """Weights on either side, an axis of heads, contracted axes in any order."""
  x = spikes(3, 2, 5, 4, most=2)  # [B, heads, K, L]
  kernel = normal(4, 6, 2, 5)  # [L, N, heads, K]

  def apply(variables, x):
    if left:
      return jnp.einsum('lnhk,bhkl->bhn', variables['w'], x)
    return jnp.einsum('bhkl,lnhk->bhn', x, variables['w'])

  found = energy.measure(apply, {'w': kernel}, x, num_steps=1)
  reached = 0
  for b, n, h, k, m in np.ndindex(3, 6, 2, 5, 4):
    reached += int(x[b, h, k, m]) * (n >= 0)
  assert rows(found)['w'] == ('AC', reached / 3, 6 * 2 * 5 * 4)


def test_products_of_two_activations():
  """As in attention: what both sides are is counted."""
  a, b = spikes(2, 5, 3, most=2), spikes(2, 4, 3, seed=1)

  def apply(_, a, b):
    return jnp.einsum('bik,bjk->bij', a, b)

  def count(a, b):
    return rows(energy.measure(apply, None, a, b, num_steps=1)).popitem()[1]

  pairs = [(a[n, i, k], b[n, j, k]) for n, i, j, k in np.ndindex(2, 5, 4, 3)]
  assert count(a, b) == ('AC', sum(float(p * q) for p, q in pairs) / 2, 60)
  assert count(a, b + 0.5) == ('AC', sum(float(p) for p, _ in pairs) / 2, 60)
  assert count(a - 0.5, b) == ('AC', sum(float(q) for _, q in pairs) / 2, 60)
  assert count(a - 0.5, b + 0.5) == ('MAC', 60, 60)


# What counts as a spike, and as a timestep.


@pytest.mark.parametrize(
  'x, kind',
  [
    (jnp.array([0.0, 1, 3, -1]), 'AC'),
    (jnp.array([0, 1, 16, -16]), 'AC'),
    (jnp.array([True, False, True, True]), 'AC'),
    (jnp.array([0, 1, 2, 0], jnp.bfloat16), 'AC'),
    (jnp.zeros(4), 'AC'),
    (jnp.array([0.0, 1, 17, 0]), 'MAC'),
    (jnp.array([0.0, 0.5, 1, 0]), 'MAC'),
    (jnp.array([0.0, jnp.nan, 1, 0]), 'MAC'),
    (jnp.array([0.0, jnp.inf, 1, 0]), 'MAC'),
  ],
)
def test_what_is_a_spike(x, kind):
  def apply(variables, x):
    return jnp.dot(x, variables['w'].astype(x.dtype))

  found = energy.measure(apply, {'w': jnp.ones((4, 3))}, x[None], num_steps=1)
  sizes = np.abs(np.float32(x)).sum()
  operations = 3 * float(sizes) if kind == 'AC' else 12
  assert rows(found) == {'w': (kind, operations, 12)}


def test_whole_numbers_that_are_no_spikes():
  count = functools.partial(energy.count, lambda w, x: x @ w, jnp.ones((2, 3)))
  pixels = jnp.array([[3.0, 0.0]])
  assert not count(pixels)[0].multiplied
  assert count(pixels, largest=1)[0].multiplied


def test_the_twin_runs_once():
  """Where the layer ran at every timestep; one that saw an image once did."""
  weights = {'once': jnp.ones((5, 5)), 'steps': jnp.ones((5, 7))}

  def apply(weights, x):
    x = (x @ weights['once'] > 0.3).astype(jnp.float32)
    return snn.repeat_in_time(x, 4) @ weights['steps']

  images = normal(3, 5)
  found = energy.measure(apply, weights, images, num_steps=4)
  assert rows(found)['once'][2] == 25 and rows(found)['steps'][2] == 35
  # A twin that sees each frame.
  found = energy.measure(apply, weights, images, num_steps=1)
  assert rows(found)['steps'][2] == 4 * 35
  frames = jnp.ones((4, 3, 5))
  found = energy.measure(
    lambda w, x: x @ w['steps'], weights, frames, num_steps=4, batch_axis=1
  )
  assert rows(found) == {'steps': ('AC', 4 * 35, 35)}


# Wherever it stands in a program.

WEIGHTS = {
  'in': normal(4, 6),
  'cell': {'kernel': normal(6, 6, seed=1), 'back': normal(6, 6, seed=2)},
  'stack': normal(3, 6, 6, seed=3),
}


def fire(x):
  return (x > 0.5).astype(x.dtype)


def rest(x):
  return jnp.zeros_like(x, shape=(x.shape[1], 6)) * x[0, 0, 0]


def cell(weights, state, x):
  """A recurrent layer of spikes."""
  state = fire(x @ weights['kernel'] + state @ weights['back'])
  return state, state


def plain(weights, x):
  """Frames [T, B, 4]; a recurrent cell, and a stack of three layers."""
  state, outputs = rest(x), []
  for frame in x:
    state, _ = cell(weights['cell'], state, fire(frame @ weights['in']))
    outputs.append(state)
  y = jnp.stack(outputs)
  for kernel in weights['stack']:
    y = fire(y @ kernel)
  return y


def scanned(weights, x):
  """The same with scans over time and over layers."""
  entering = fire(x @ weights['in'])
  step = functools.partial(cell, weights['cell'])
  _, y = lax.scan(step, rest(x), entering)
  return lax.scan(lambda y, w: (fire(y @ w), None), y, weights['stack'])[0]


def while_loop(weights, x):
  """The same with loops whose number of rounds is not known."""
  entering = fire(x @ weights['in'])

  def body(i, carry):
    state, outputs = carry
    state, _ = cell(weights['cell'], state, entering[i])
    return state, outputs.at[i].set(state)

  init = rest(x), jnp.zeros_like(entering)
  rounds = jnp.where(jnp.sum(x) > -1e9, len(x), 0)
  _, y = lax.fori_loop(0, rounds, body, init)
  return lax.fori_loop(
    0, rounds - len(x) + 3, lambda i, y: fire(y @ weights['stack'][i]), y
  )


def conditional(weights, x):
  """The same in one branch of two."""
  return lax.cond(
    jnp.sum(x) > -1e9,
    scanned,
    lambda weights, x: x[:, :, :1] @ weights['in'][:1] @ weights['stack'][0],
    weights,
    x,
  )


@jax.custom_vjp
def own_derivative(weights, x):
  return scanned(weights, x)


own_derivative.defvjp(lambda w, x: (scanned(w, x), None), lambda _, g: (g, g))
PROGRAMS = {
  'scan': scanned,
  'jit': jax.jit(scanned),
  'remat': jax.checkpoint(scanned),
  'while': while_loop,
  'cond': conditional,
  'custom_vjp': own_derivative,
  'all of it': jax.jit(jax.checkpoint(lambda w, x: jax.jit(conditional)(w, x))),
}


@pytest.mark.parametrize('name', PROGRAMS)
def test_wherever_it_stands(name):
  x = normal(5, 2, 4)
  measure = functools.partial(energy.measure, num_steps=5, batch_axis=1)
  expected = rows(measure(plain, WEIGHTS, x))
  assert expected.keys() == {'in', 'cell', 'cell/back', 'stack'}
  assert expected['in'][0] == 'MAC' and expected['cell/back'][1] > 0
  found = measure(PROGRAMS[name], WEIGHTS, x)
  layers = rows(found)
  if 'stack/0' in layers:  # A scan over layers has a row for each.
    parts = [layers.pop(f'stack/{i}') for i in range(3)]
    assert {part[0] for part in parts} == {'AC'}
    layers['stack'] = ('AC', *np.sum([part[1:] for part in parts], 0))
  assert ('stack/0' in rows(found)) == (name != 'while')
  assert layers == expected


class Stack(nn.Module):
  """The same layer three times, scanned."""

  @nn.compact
  def __call__(self, x):
    """[T, B, 5] to spikes."""
    scan = nn.scan(
      nn.remat(Repeated), {'params': 0}, split_rngs={'params': True}, length=3
    )
    return scan(name='layers')(x, None)[0]


class Repeated(nn.Module):
  """A layer of weights and spikes."""

  @nn.compact
  def __call__(self, x, _):
    """[T, B, 5] to spikes, and nothing."""
    return fire(nn.Dense(5, name='dense')(x)), None


def test_scanned_layers_have_a_row_each():
  """Of which the first sees an image, the others spikes."""
  x = normal(4, 6, 5)
  variables = Stack().init(jax.random.key(0), x)
  found = energy.measure(
    Stack().apply, variables, x, num_steps=4, batch_axis=1
  ).layers
  kinds = {name: row.kind for name, row in found.items()}
  assert kinds == {
    'layers/dense/0': 'MAC', 'layers/dense/1': 'AC', 'layers/dense/2': 'AC',
  }  # fmt: skip
  rates = []
  for i in range(2):
    of_layer = jax.tree.map(lambda a: a[i], variables['params']['layers'])  # noqa: B023
    x, _ = Repeated().apply({'params': of_layer}, x, None)
    rates.append(float(x.mean()))
  close = pytest.approx(rates, rel=1e-6)
  assert [found[f'layers/dense/{i}'].rate for i in (1, 2)] == close


def test_what_cannot_be_looked_into_is_an_error():
  mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,))
  apply = jax.shard_map(
    lambda w, x: x @ w, mesh=mesh, in_specs=P(), out_specs=P()
  )
  with pytest.raises(ValueError, match="inside 'shard_map'. Count inside it"):
    energy.measure(apply, jnp.ones((2, 3)), jnp.ones((4, 2)), num_steps=1)
  with pytest.raises(ValueError, match='got num_examples=4, num_steps=0'):
    energy.measure(jnp.dot, jnp.ones((4, 4)), jnp.ones((4, 2)), num_steps=0)


@pytest.mark.parametrize('how', ['pmap', 'shard_map', 'vmap', 'scan'])
def test_counts_add_up(how):
  """Over devices and over batches, to those of all examples."""
  count = functools.partial(energy.count, plain)
  x = normal(5, 8, 4)
  parts = jnp.stack(jnp.split(x, 4, axis=1))

  def pooled(x):
    return lax.psum(count(WEIGHTS, x), 'data')

  if how == 'pmap':
    counts = jax.pmap(pooled, axis_name='data', out_axes=None)(parts)
  elif how == 'shard_map':
    mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
    counts = jax.jit(
      jax.shard_map(pooled, mesh=mesh, in_specs=P(None, 'data'), out_specs=P())
    )(x)
  elif how == 'vmap':
    counts = jax.jit(jax.vmap(functools.partial(count, WEIGHTS)))(parts)
    counts = jax.tree.map(lambda a: a.sum(0), counts)
  else:
    counts = [jax.jit(count)(WEIGHTS, part) for part in parts]
    counts = jax.tree.map(lambda *parts: sum(parts), *counts)
  assert energy.total(counts, 8, 5) == energy.measure(
    plain, WEIGHTS, x, num_steps=5, batch_axis=1
  )


# Models.


class LinenNet(nn.Module):
  """Shown twice before the first layer, as in the README."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    """Images [B, H, W, C] to logits."""
    x = snn.repeat_in_time(x, num_steps=2)
    x = snn.Conv(4, (3, 3), use_bias=False, name='conv')(x)
    x = snn.SpikingNeuron(use_running_average=not train, name='neuron')(x)
    return snn.Dense(3, name='head')(x.reshape(*x.shape[:2], -1))


class NnxNet(nnx.Module):
  """The same."""

  def __init__(self, rngs):
    self.conv = snnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs)
    self.neuron = snnx.SpikingNeuron(num_steps=2)
    self.head = snnx.Dense(4 * 36, 3, rngs=rngs)

  def __call__(self, x):
    """Images [B, H, W, C] to logits."""
    x = snnx.repeat_in_time(x, num_steps=2)
    x = self.neuron(self.conv(x))
    return self.head(x.reshape(*x.shape[:2], -1))


def test_linen_and_nnx():
  images = normal(3, 6, 6, 1)
  net = LinenNet()
  variables = net.init(jax.random.key(0), images)
  twin = NnxNet(nnx.Rngs(0))
  twin.conv.kernel[...] = variables['params']['conv']['kernel']
  twin.head.kernel[...] = variables['params']['head']['kernel']
  twin.eval()
  graph, state = nnx.split(twin)
  measure = functools.partial(energy.measure, num_steps=2)
  expected = measure(net.apply, variables, images)
  assert list(expected.layers) == ['conv', 'head']
  assert expected.layers['head'].operations > 0

  def merged(state, images):
    return nnx.merge(graph, state)(images)

  assert measure(merged, state, images) == expected
  assert measure(lambda net, images: net(images), twin, images) == expected
  # Weights that the function closes over.
  for closed in (lambda _, x: net.apply(variables, x), lambda _, x: twin(x)):
    found = measure(closed, None, images)
    assert len(found.layers) == 2 and found[1:] == expected[1:]
  # The neurons' rate is the rate of what enters the next layer.
  _, sown = net.apply(variables, images, mutable=['spiking'])
  rate = sown['spiking']['neuron']['firing_rate'].mean()
  np.testing.assert_allclose(expected.layers['head'].rate, rate, rtol=1e-6)


@pytest.mark.sample
def test_residual_network():
  """Blocks add spikes, which then have a size of 2; in bfloat16."""
  net = models.ResNet19(
    planes=(4, 4), stage_sizes=(2, 1), head_width=8, dtype=jnp.bfloat16
  )
  images = normal(4, 8, 8, 3)
  variables = jax.jit(net.init)(jax.random.key(0), images)

  def apply(variables, images):
    return net.apply(variables, images, train=True, mutable=['batch_stats'])

  found = energy.measure(apply, variables, images, num_steps=2)
  kinds = {name: row.kind for name, row in found.layers.items()}
  assert kinds.pop('encode/layer') == kinds.pop('head/layer') == 'MAC'
  assert set(kinds.values()) == {'AC'} and len(kinds) == 8
  # encode: 9 connections of a pixel, 6 at the edge, 4 in the corner.
  connections = (36 * 9 + 24 * 6 + 4 * 4) * 3 * 4
  assert found.layers['encode/layer'].relu_operations == connections
  assert found.multiply_accumulates == connections + 2 * 4 * 8
  # Behind the stem, each spike of size 1 reaches at most 9 times 4 outputs. The
  # second block's input has spikes of size 2, too.
  sizes = []
  for name in ('block0/spiking1/layer', 'block1/spiking1/layer'):
    row = found.layers[name]
    sizes.append(row.operations / (2 * 8 * 8 * 4 * row.rate * 9 * 4))
  assert 0.8 < sizes[0] < 1 and 1.03 * sizes[0] < sizes[1] < 2


def test_large_counts_are_exact():
  """Beyond int32 and float32's whole numbers."""
  x = jnp.ones((2, 64, 64, 1)).at[0, 0, 0].set(0)

  def apply(kernel, x):
    return jnp.concatenate([x] * 20) @ kernel

  found = energy.measure(apply, jnp.ones((1, 50_000)), x, num_steps=20)
  assert found.accumulates * 2 == 20 * (2 * 64 * 64 - 1) * 50_000 > 2**31


# Another library.


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
  'stride, padding, dilation, groups',
  [((1, 1), (1, 1), (1, 1), 1), ((2, 1), (0, 2), (1, 2), 2)],
)
def test_equals_spikingjelly(stride, padding, dilation, groups):
  """Its synaptic operations; its MACs where nothing is padded."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    torch = pytest.importorskip('torch')
    op_counter = pytest.importorskip('spikingjelly.activation_based.op_counter')
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(4, 4 // groups, 3, 3)).astype(np.float32)
  dense = rng.normal(size=(4, 7)).astype(np.float32)
  x = spikes(3, 4, 8, 8)

  def theirs(x, padding, counter):
    with op_counter.DispatchCounterMode([counter]), torch.no_grad():
      x = torch.nn.functional.conv2d(
        torch.tensor(np.asarray(x)), torch.tensor(kernel), None, stride,
        padding, dilation, groups,
      )  # fmt: skip
      x = ((x > 0.5).float().mean((2, 3)) > 0.2).float()
      torch.mm(x, torch.tensor(dense))
    return counter.get_total()

  def ours(x, padding):
    def apply(weights, x):
      x = lax.conv_general_dilated(
        x, weights[0], stride, [(p, p) for p in padding], None, dilation,
        feature_group_count=groups,
      )  # fmt: skip
      return ((x > 0.5).mean((2, 3)) > 0.2) @ weights[1]

    found = energy.measure(apply, [kernel, dense], x, num_steps=1)
    return round(3 * found.accumulates), round(3 * found.multiply_accumulates)

  synaptic, multiplied = op_counter.SynOpCounter, op_counter.MACCounter
  counted = theirs(x, padding, synaptic()), theirs(x, padding, multiplied())
  assert ours(x, padding) == counted and counted[0] > 0 == counted[1]
  image, none = x + 0.25, (0, 0)
  counted = theirs(image, none, synaptic()), theirs(image, none, multiplied())
  assert ours(image, none) == counted and min(counted) > 0
