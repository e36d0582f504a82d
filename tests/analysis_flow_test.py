"""Gradients' statistics: against NumPy loops, and through transformations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsatgo_jax import linen as snn
from dsatgo_jax import losses, methods, models, neurons, probes, surrogate
from dsatgo_jax import nnx as snnx
from dsatgo_jax.analysis import flow
from dsatgo_jax.dynamics import PATHS
from tests import reference_loop
from tests.neurons_test import METHODS, normal, ours

float64 = jax.enable_x64(True)
NAMES = ('paths', 'reach')


def close(actual, expected, tolerance=1e-9):
  """Relative to the largest entry of each array; equal where NaN."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    atol = tolerance * np.nanmax(np.abs(b), initial=1e-2)
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


# One layer, against a loop that keeps the paths apart.


def in_numpy(settings, tape, g_spikes, g_v):
  """What came into each u[t] by each path, and from the spikes of each k."""
  num_steps = len(g_spikes)
  paths = np.zeros((3, *g_spikes.shape))
  came = np.zeros((num_steps, num_steps + 1, *g_v.shape))  # [t, k]
  carried = np.zeros((num_steps + 1, *g_v.shape))  # To v[t], from k.
  carried[-1] = g_v
  for t in reversed(range(num_steps)):
    u, s, theta, width = (
      tape[name][t] for name in ('u', 'spikes', 'theta', 'width')
    )
    slope = reference_loop.DENSITIES[settings.surrogate]((u - theta) / width)
    slope = slope / width
    hard = settings.reset == 'hard'
    leak = 1 - s if hard else np.ones_like(s)
    reset = -slope * (u if hard else theta) * (not settings.detach_reset)
    g_v = carried.sum(0)
    paths[:, t] = g_spikes[t] * slope, g_v * leak, g_v * reset
    came[t] = carried * (leak + reset)
    came[t, t] += paths[0, t]
    carried = settings.decay * came[t]
  lags = [
    [*row[t:num_steps], *np.zeros_like(row[:t]), row[num_steps]]
    for t, row in enumerate(came)
  ]
  return paths, np.array(lags)


CASES = [  # Every fourth in the fast suite.
  pytest.param(
    *(settings, reset, spike, detach, 3 + i % 3),
    marks=[pytest.mark.sample] * (i % 4 > 0),
  )
  for i, (settings, (reset, spike, detach)) in enumerate(
    zip(
      itertools.cycle(METHODS),
      itertools.product(
        ('hard', 'soft'), reference_loop.DENSITIES, (False, True)
      ),
      strict=False,
    )
  )
]


@pytest.mark.parametrize('settings, reset, spike, detach, num_steps', CASES)
@float64
def test_the_paths_are_those_of_a_loop(
  settings, reset, spike, detach, num_steps
):
  """Norms, cosines, shares and lags; the paths sum to the whole."""
  x, g_spikes = normal(2, num_steps, 4, 3)
  g_spikes[0, 1] = 0
  v, g_v = normal(2, 4, 3, seed=1)
  settings = reference_loop.Settings(
    decay=0.7, v_th=0.8, width=1.3, surrogate=spike, reset=reset,
    detach_reset=detach, **settings,
  )  # fmt: skip
  tape = reference_loop.forward(settings, x, v)
  paths, lags = in_numpy(settings, tape, g_spikes, g_v)
  whole = paths.sum(0)
  expected = reference_loop.backward(settings, tape, v, g_spikes, g_v)
  np.testing.assert_allclose(whole, expected['x'], rtol=0, atol=1e-12)
  np.testing.assert_allclose(lags.sum(1), whole, rtol=0, atol=1e-12)

  run, parameters = ours(settings)

  def outputs(x, zeros, **way):
    state = neurons.NeuronState(jnp.asarray(v), jnp.int32(0))
    spikes, state, _ = run(x, parameters, state=state, probes=zeros, **way)
    return spikes, state.v

  zeros = {name: probes.zeros(name, x) for name in probes.NAMES}
  for way in ({}, {'fused': False}):
    told, pull = jax.vjp(
      functools.partial(outputs, **way), jnp.asarray(x), zeros
    )
    np.testing.assert_array_equal(told[0], tape['spikes'])
    g_x, g_zeros = pull((jnp.asarray(g_spikes), jnp.asarray(g_v)))
    close(g_x, whole)
    close((g_zeros['u'], g_zeros['s']), (whole, g_spikes))
    found = flow.summary({'layer': g_zeros})['layer']
    norm = lambda a: np.sqrt((a**2).sum((1, 2)))  # noqa: E731
    close(found['u'], norm(whole))
    close(found['s'], norm(g_spikes))
    close([found[name] for name in PATHS], [norm(path) for path in paths])
    for (i, one), (j, other) in itertools.combinations(enumerate(PATHS), 2):
      with np.errstate(invalid='ignore'):
        cosine = (paths[i] * paths[j]).sum((1, 2)) / (
          norm(paths[i]) * norm(paths[j])
        )
      close(found[f'cosine_{one}_{other}'], cosine)
    close(found['nonzero_u'], (whole != 0).mean((1, 2)))
    close(found['nonzero_s'], (g_spikes != 0).mean((1, 2)))
    share = np.einsum('tkbc,tbc->tk', lags, whole)
    close(found['reach'], share / np.maximum(norm(whole) ** 2, 1e-300)[:, None])


def test_paths_by_hand():
  """As in `test_gradient_paths_by_hand`: hard reset, first timestep."""
  x = jnp.array([[1.2, 0.6], [0.8, 0.9]])
  zeros = {'paths': probes.zeros('paths', x)}

  def outputs(zeros):
    spikes, state, _ = neurons.run(
      x, neurons.Parameters(0.5, width=2.0), 'vanilla', probes=zeros
    )
    return spikes, state.v

  _, pull = jax.vjp(outputs, zeros)
  (told,) = pull((jnp.array([[1.0, 2], [3, 4]]), jnp.array([5.0, 6])))
  found = flow.summary({'layer': told})['layer']
  # Spatial 0.5 and 1.0; leak 0 and dL/dv = -0.8; reset -2.25 * 0.6 and 0.24.
  np.testing.assert_allclose(found['spatial'][0], np.hypot(0.5, 1.0), rtol=1e-6)
  np.testing.assert_allclose(found['leak'][0], 0.8, rtol=1e-6)
  np.testing.assert_allclose(found['reset'][0], np.hypot(1.35, 0.24), rtol=1e-6)
  np.testing.assert_allclose(found['u'][0], np.hypot(0.85, 0.44), rtol=1e-6)


@pytest.mark.sample
@float64
def test_a_sample_of_many_neurons():
  """Of all of them where they are few; else near to all, and from devices."""
  x, g_spikes = normal(2, 3, 8, 64, 64)

  def told(x, g_spikes, axis_name=None):
    zeros = {n: probes.zeros(n, x) for n in ('paths', 'sample')}
    run = functools.partial(neurons.run, axis_name=axis_name)
    _, pull = jax.vjp(lambda z: run(x, probes=z)[0], zeros)
    return pull(g_spikes)[0]

  few = told(*(jnp.asarray(a[..., :4]) for a in (x, g_spikes)))
  close(few['sample'], few['paths'])
  many = told(jnp.asarray(x), jnp.asarray(g_spikes))
  close(many['sample'], many['paths'], 0.05)
  assert abs(many['sample'] - many['paths']).max() > 0
  parts = (np.stack(np.split(a, 4, 1)) for a in (x, g_spikes))
  apart = jax.vmap(functools.partial(told, axis_name='data'), axis_name='data')(
    *parts
  )
  close(jax.tree.map(lambda a: a.sum(0), apart), many)


@pytest.mark.sample
@pytest.mark.parametrize('num_steps', [17, 24])
@float64
def test_long_recordings_in_chunks(num_steps):
  x, g_spikes = normal(2, num_steps, 4, 3)

  def told(names):
    zeros = {name: probes.zeros(name, x) for name in names}
    _, pull = jax.vjp(lambda z: neurons.run(x, probes=z)[0], zeros)
    return pull(jnp.asarray(g_spikes))[0]['paths']

  close(told(['paths']), told(NAMES))  # With 'reach', there are no chunks.


def test_faint_gradients_have_a_norm():
  x, g_spikes = jnp.float32(normal(2, 3, 4, 5))
  zeros = {name: probes.zeros(name, x) for name in NAMES}
  _, pull = jax.vjp(lambda z: neurons.run(x, probes=z)[0], zeros)
  strong, faint = (
    flow.summary({'layer': pull(g_spikes * scale)[0]})['layer']
    for scale in (1.0, 1e-24)
  )
  np.testing.assert_allclose(faint['u'] * 1e24, strong['u'], rtol=1e-4)
  np.testing.assert_allclose(faint['reach'], strong['reach'], atol=1e-4)


@pytest.mark.sample
def test_bfloat16_tells_what_float32_does_of_the_same_numbers():
  x = jnp.asarray(normal(4, 8, 5), jnp.bfloat16)
  weights = jnp.asarray(normal(4, 8, 5), jnp.bfloat16)

  def total(zeros, dtype):
    spikes, *_ = neurons.run(
      x.astype(dtype), surrogate=surrogate.arctan, probes=zeros
    )
    assert spikes.dtype == dtype
    return jnp.sum(spikes * weights, dtype=jnp.float32)

  zeros = {name: probes.zeros(name, x) for name in ('paths', 'reach')}
  told = jax.grad(total)(zeros, jnp.bfloat16)
  expected = jax.grad(total)(zeros, jnp.float32)
  assert all(a.dtype == jnp.float32 for a in told.values())
  close(told, expected, 1e-3)
  assert (told['paths'][:, probes.FIELDS.index('spatial')] > 0).all()


# Models, through what JAX and Flax do with them.


class Net(nn.Module):
  """A user's own network of two layers."""

  axis_name: object = None
  remat: bool = False

  @nn.compact
  def __call__(self, x, train=True):
    """[T, B, C] to logits [T, B, 3]."""
    kind = nn.remat(snn.SpikingNeuron) if self.remat else snn.SpikingNeuron
    kinds = {'param_dtype': x.dtype}
    for _ in range(2):
      x = snn.Dense(5, **kinds)(x)
      x = snn.TdBatchNorm(not train, axis_name=self.axis_name, **kinds)(x)
      x = kind(
        use_running_average=not train,
        axis_name=self.axis_name,
        surrogate=surrogate.arctan,
        **kinds,
      )(x)
    return snn.Dense(3, **kinds)(x)


X = normal(4, 8, 5)
LABELS = np.arange(8) % 3


def told_by(net, x, labels, variables=None, names=NAMES, train=True):
  """The gradients of the zeros and of the weights."""
  if variables is None:
    variables = net.init(jax.random.key(0), jnp.asarray(X))
  zeros = flow.zeros(net, variables, x, train=train, names=names)

  def loss(zeros, params):
    logits, _ = net.apply(
      variables | zeros | {'params': params}, x, train, mutable=['batch_stats']
    )
    return losses.cross_entropy(logits, labels).mean()

  return jax.grad(loss, (0, 1))(zeros, variables['params'])


@pytest.fixture(scope='module')
def expected():
  with float64:
    told, gradients = jax.jit(functools.partial(told_by, Net()))(X, LABELS)
    return flow.summary(told['flow']), gradients


@float64
def test_layers_are_named_by_their_paths(expected):
  assert list(expected[0]) == ['SpikingNeuron_0', 'SpikingNeuron_1']
  for layer in expected[0].values():
    np.testing.assert_allclose(layer['reach'].sum(-1), 1)
    assert (layer['u'] > 0).all()


@pytest.mark.sample
@float64
def test_eager_and_remat(expected):
  told, gradients = told_by(Net(), X, LABELS)
  close((flow.summary(told['flow']), gradients), expected)

  class Rematted(Net):
    remat: bool = True

  with jax.default_matmul_precision('highest'):
    net = Rematted()
    variables = net.init(jax.random.key(0), jnp.asarray(X))
    zeros = flow.zeros(net, variables, X)

    @jax.jit
    def run(zeros):
      logits, _ = net.apply(variables | zeros, X, mutable=['batch_stats'])
      return losses.cross_entropy(logits, LABELS).mean()

    found = flow.summary(jax.grad(run)(zeros)['flow'])
  # Flax names rematted modules 'Checkpoint...'.
  for layer, other in zip(found.values(), expected[0].values(), strict=True):
    close(layer, {name: other[name] for name in layer})


@pytest.mark.parametrize(
  'how',
  [
    'pmap',
    pytest.param('shard_map', marks=pytest.mark.sample),
    pytest.param('shard_map, pooled loss', marks=pytest.mark.sample),
  ],
)
@float64
def test_four_devices_tell_what_one_does(how, expected):
  net = Net(axis_name='data')

  def step(x, labels):
    if how == 'shard_map, pooled loss':
      variables = net.init(jax.random.key(0), jnp.asarray(X))
      zeros = flow.zeros(net, variables, x, names=NAMES)

      def loss(zeros):
        logits, _ = net.apply(variables | zeros, x, mutable=['batch_stats'])
        loss = losses.cross_entropy(logits, labels).mean()
        return jax.lax.pmean(loss, 'data')

      told = jax.grad(loss)(zeros)
      return flow.pooled(told, 'data', local_mean=False)
    told, _ = told_by(net, x, labels)
    return flow.pooled(told, 'data')

  if how == 'pmap':
    split = np.stack(np.split(X, 4, 1)), LABELS.reshape(4, 2)
    told = jax.tree.map(
      lambda a: a[0], jax.pmap(step, axis_name='data')(*split)
    )
  else:
    mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
    told = jax.jit(
      jax.shard_map(
        step, mesh=mesh, in_specs=(P(None, 'data'), P('data')), out_specs=P()
      )
    )(X, LABELS)
  close(flow.summary(told['flow']), expected[0])


@pytest.mark.sample
@float64
def test_a_sharded_batch_under_jit(expected):
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  x = jax.device_put(X, NamedSharding(mesh, P(None, 'data')))
  labels = jax.device_put(LABELS, NamedSharding(mesh, P('data')))
  told, _ = jax.jit(functools.partial(told_by, Net()))(x, labels)
  close(flow.summary(told['flow']), expected[0])


@pytest.mark.sample
@float64
def test_vmap_over_seeds():
  net = Net()
  seeds = jax.vmap(net.init, (0, None))(
    jax.random.split(jax.random.key(1), 3), jnp.asarray(X)
  )
  run = functools.partial(told_by, net, X, LABELS)
  together = flow.summary(jax.vmap(run)(seeds)[0]['flow'])
  for i in range(3):
    alone = flow.summary(
      run(jax.tree.map(lambda a, i=i: a[i], seeds))[0]['flow']
    )
    close(jax.tree.map(lambda a, i=i: a[i], together), alone)


@pytest.mark.sample
@float64
def test_in_evaluation_mode():
  """Thresholds are the running ones; the paths are there as before."""
  told, _ = told_by(Net(), X, LABELS, train=False)
  for layer in flow.summary(told['flow']).values():
    assert (layer['u'] > 0).all() and (layer['reset'][:-1] > 0).all()


@pytest.mark.sample
@float64
def test_layers_scanned_over():
  """`nn.scan` takes the collection as it takes the parameters."""

  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      x = snn.Dense(5)(x)
      return snn.SpikingNeuron(use_running_average=False)(x), None

  axes = {'params': 0, 'batch_stats': 0, 'flow': 0}
  scanned = nn.scan(
    Layer, variable_axes=axes, split_rngs={'params': True}, length=3
  )()
  x = jnp.asarray(X)
  variables = scanned.init(jax.random.key(0), x, None)

  def told(net, variables):
    zeros = flow.zeros(net, variables, x, None, names=NAMES)

    def loss(zeros):
      (y, _), _ = net.apply(variables | zeros, x, None, mutable=['batch_stats'])
      return jnp.sum(y * X)

    return flow.summary(jax.grad(loss)(zeros)['flow'])

  class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      for i in range(3):
        x, _ = Layer(name=f'layer{i}')(x, None)
      return x, None

  apart = {
    kind: {
      f'layer{i}': jax.tree.map(lambda a, i=i: a[i], tree) for i in range(3)
    }
    for kind, tree in variables.items()
  }
  expected = told(Unrolled(), apart)
  (found,) = told(scanned, variables).values()
  for i in range(3):
    close(
      jax.tree.map(lambda a, i=i: a[i], found),
      expected[f'layer{i}/SpikingNeuron_0'],
    )


@pytest.mark.sample
@float64
def test_the_cell_in_an_rnn_tells_what_the_layer_does():
  """But for the lags: a cell sees one timestep and what lies beyond."""
  x, weights = jnp.asarray(X), jnp.asarray(normal(4, 8, 5, seed=3))
  axes = {'batch_stats': 0, 'flow': 0}
  layer = snn.SpikingNeuron(use_running_average=False)
  cell = snn.SpikingCell(use_running_average=False, dtype=jnp.float64)
  rnn = nn.RNN(cell, time_major=True, variable_axes=axes)
  found = []
  for net in (layer, rnn):
    variables = net.init(jax.random.key(0), x)
    zeros = flow.zeros(net, variables, x, names=NAMES)

    def loss(zeros, net=net, variables=variables):
      y, _ = net.apply(variables | zeros, x, mutable=['batch_stats'])
      return jnp.sum(y * weights)

    (told,) = flow.summary(jax.grad(loss)(zeros)['flow']).values()
    found.append(told)
  lags = [told.pop('reach') for told in found]
  close(*found)
  np.testing.assert_allclose(lags[1][:, 0], lags[0][:, 0])
  np.testing.assert_allclose(lags[1][:, 1], lags[0][:, 1:].sum(1))


# NNX.


class NnxNet(nnx.Module):
  """`Net`, in NNX."""

  def __init__(self, rngs):
    settings = {'num_steps': 4, 'surrogate': surrogate.arctan}
    kinds = {'param_dtype': jnp.float64}
    self.layers = nnx.List(
      [
        layer
        for _ in range(2)
        for layer in (
          snnx.Dense(5, 5, rngs=rngs, **kinds),
          snnx.TdBatchNorm(5, **kinds),
          snnx.SpikingNeuron(**settings, **kinds),
        )
      ]
    )
    self.head = snnx.Dense(5, 3, rngs=rngs, **kinds)

  def __call__(self, x):
    """[T, B, C] to logits [T, B, 3]."""
    for layer in self.layers:
      x = layer(x)
    return self.head(x)


def nnx_like_linen():
  """An NNX network with the weights of `Net`."""
  variables = Net().init(jax.random.key(0), jnp.asarray(X))
  net, params = NnxNet(nnx.Rngs(0)), variables['params']
  for i in range(2):
    for name in ('kernel', 'bias'):
      getattr(net.layers[3 * i], name)[...] = params[f'Dense_{i}'][name]
  for name in ('kernel', 'bias'):
    getattr(net.head, name)[...] = params['Dense_2'][name]
  return net


def nnx_loss(net):
  return losses.cross_entropy(net(jnp.asarray(X)), LABELS).mean()


@float64
def test_nnx_tells_the_same(expected):
  net = flow.probed(nnx_like_linen(), jnp.asarray(X), names=NAMES)
  kinds = nnx.Any(nnx.Param, snnx.Probe)
  gradients = nnx.jit(nnx.grad(nnx_loss, argnums=nnx.DiffState(0, kinds)))(net)
  found = flow.summary(gradients)
  assert list(found) == ['layers/2', 'layers/5']
  close(list(found.values()), list(expected[0].values()))


@float64
def test_chosen_layers_and_raw_gradients():
  net = nnx_like_linen()
  told = flow.probed(net, jnp.asarray(X), names=['u', 's'], layers=['layers/5'])
  gradients = nnx.grad(nnx_loss, argnums=nnx.DiffState(0, snnx.Probe))(told)
  (found,) = flow.raw(gradients).values()
  assert found['u'].shape == found['s'].shape == (4, 8, 5)
  variables = Net().init(jax.random.key(0), jnp.asarray(X))
  zeros = flow.zeros(
    Net(), variables, X, names=['u', 's'], layers=['SpikingNeuron_1']
  )
  assert zeros['flow'].keys() == {'SpikingNeuron_1'}
  linen, _ = told_by(Net(), X, LABELS, names=['u', 's'])
  close(found, dict(linen['flow']['SpikingNeuron_1']))


# Nothing of it where it is not asked for.


def test_costs_nothing_where_there_are_no_zeros():
  """The scale by which gradients are multiplied is in no such program."""
  net, x = Net(), jnp.float32(X)
  variables = net.init(jax.random.key(0), x)
  assert variables.keys() == {'params', 'batch_stats'}

  def program(names):
    zeros = flow.zeros(net, variables, x, names=names) if names else {}

    def loss(zeros, params):
      logits, _ = net.apply(
        variables | zeros | {'params': params}, x, mutable=['batch_stats']
      )
      return losses.cross_entropy(logits, LABELS).mean()

    step = jax.jit(jax.grad(loss, (0, 1)))
    return step.lower(zeros, variables['params']).compile().as_text()

  scale = '4.2949673e+09'
  assert float(scale) == pytest.approx(probes.SCALE)
  assert scale in program(['paths'])
  plain = program(())
  assert scale not in plain and 'f32[4,10]' not in plain
  # Forward, the zeros are not even read.
  zeros = flow.zeros(net, variables, x)
  forward = jax.jit(
    lambda zeros: net.apply(variables | zeros, x, mutable=['batch_stats'])[0]
  )
  jaxpr = jax.make_jaxpr(forward)(zeros)
  assert scale not in forward.lower(zeros).compile().as_text()
  assert len(jaxpr.jaxpr.invars) == 2


# Cuts.


def gradient_of_layer(cut=(), gates=None, detach=False, fused=None):
  """Of x and the threshold, with some paths cut."""
  x, g_spikes = (jnp.asarray(a) for a in normal(2, 5, 4, 3))
  g_v = jnp.asarray(normal(4, 3, seed=1))

  def outputs(x, v_th):
    spikes, state, _ = neurons.run(
      x,
      neurons.Parameters(0.7, v_th, width=1.3, gates=gates),
      'learnable_threshold',
      surrogate=surrogate.arctan,
      cut=cut,
      detach_reset=detach,
      fused=fused,
    )
    return spikes, state.v

  out, pull = jax.vjp(outputs, x, jnp.asarray(0.8))
  return out, pull((g_spikes, g_v))


@pytest.mark.parametrize(
  'cut', [(), ('spatial',), ('leak',), ('reset',), ('leak', 'reset'), PATHS]
)
@float64
def test_cut_paths(cut):
  """Forward nothing changes; gates of 0 cut as well; both ways of the scan."""
  out, whole = gradient_of_layer()
  found, gradients = gradient_of_layer(cut)
  close(found, out)
  gates = jnp.array([float(path not in cut) for path in PATHS])
  for other in (
    gradient_of_layer(cut, fused=False),
    gradient_of_layer(gates=gates),
    gradient_of_layer(gates=gates, fused=False),
  ):
    close(other, (out, gradients), 1e-12)
  if cut == ('reset',):
    close(gradient_of_layer(detach=True), (out, gradients), 1e-12)
  # By the loop, path by path.
  x, g_spikes = normal(2, 5, 4, 3)
  settings = reference_loop.Settings(
    decay=0.7, v_th=0.8, width=1.3, surrogate='arctan',
    method='learnable_threshold',
  )  # fmt: skip
  tape = reference_loop.forward(settings, x)
  g_v, expected = normal(4, 3, seed=1), np.zeros_like(x)
  for t in reversed(range(5)):
    distance = tape['u'][t] - 0.8
    slope = reference_loop.DENSITIES['arctan'](distance / 1.3) / 1.3
    parts = {
      'spatial': g_spikes[t] * slope,
      'leak': g_v * (1 - tape['spikes'][t]),
      'reset': -g_v * tape['u'][t] * slope,
    }
    expected[t] = sum(value for name, value in parts.items() if name not in cut)
    g_v = 0.7 * expected[t]
  close(gradients[0], expected)
  assert bool(cut) == (abs(gradients[0] - whole[0]).max() > 1e-6)


@float64
def test_gates_between():
  """They scale a path; half the leak twice is half of what one step carries."""
  _, (half, _) = gradient_of_layer(gates=jnp.array([1, 0.5, 0]))
  _, (none, _) = gradient_of_layer(cut=('leak', 'reset'))
  _, (full, _) = gradient_of_layer(cut=('reset',))
  np.testing.assert_allclose(
    (half - none)[-1], (full - none)[-1] / 2, atol=1e-12
  )


@pytest.mark.sample
@float64
def test_cutting_in_chosen_layers_of_a_model():
  net, x = Net(), jnp.asarray(X)
  variables = net.init(jax.random.key(0), x)

  @jax.jit
  def gradient(gates):
    def loss(params):
      logits, _ = net.apply(
        variables | gates | {'params': params}, x, mutable=['batch_stats']
      )
      return losses.cross_entropy(logits, LABELS).mean()

    return jax.grad(loss)(variables['params'])

  gates = functools.partial(flow.gates, net, variables, x)
  whole = gradient({})
  close(gradient(gates(cut=())), whole)
  upper = gradient(gates(cut={'SpikingNeuron_1': ('leak', 'reset')}))
  both = gradient(gates(cut=('leak', 'reset')))
  close(upper['Dense_2'], whole['Dense_2'])
  close(both['Dense_1'], upper['Dense_1'])
  assert (
    abs(both['Dense_0']['kernel'] - upper['Dense_0']['kernel']).max() > 1e-6
  )
  # NNX, where `cut` is an attribute.
  model = flow.cut(nnx_like_linen(), {'layers/5': ('leak', 'reset')})
  gradients = nnx.grad(nnx_loss)(model)
  close(gradients['layers'][3]['kernel'][...], upper['Dense_1']['kernel'])
  close(gradients['layers'][0]['kernel'][...], upper['Dense_0']['kernel'])


@pytest.mark.sample
def test_cut_is_a_setting_of_the_networks():
  images = jnp.float32(normal(2, 8, 8, 1))
  gradients = []
  for settings in ({'cut': ('reset',)}, {'detach_reset': True}, {}):
    net = models.ConvNet(stages=((3,),), **settings)
    variables = net.init(jax.random.key(0), images)
    gradients.append(
      jax.grad(lambda x, n=net, v=variables: jnp.sum(n.apply(v, x) ** 2))(
        images
      )
    )
  close(*gradients[:2])
  assert abs(gradients[0] - gradients[2]).max() > 0


# What each timestep gives to the weights.


@pytest.mark.sample
@float64
def test_contributions_of_timesteps():
  """By hand from what enters a dense layer and the gradient of what leaves."""
  net, x = Net(), jnp.asarray(X)
  variables = net.init(jax.random.key(0), x)

  def loss(params):
    logits, _ = net.apply(
      variables | {'params': params}, x, mutable=['batch_stats']
    )
    return losses.cross_entropy(logits, LABELS).mean()

  found = jax.jit(lambda params: flow.contributions(loss, params, 4))(
    variables['params']
  )
  assert list(found) == ['Dense_0', 'Dense_1', 'Dense_2']
  logits, told = net.apply(variables, x, mutable=['batch_stats', 'membranes'])
  spikes = told['membranes']['SpikingNeuron_1']['spikes']
  g = jax.grad(lambda a: losses.cross_entropy(a, LABELS).mean())(logits)
  each = np.concatenate(
    [np.einsum('tbi,tbo->tio', spikes, g), g.sum(1)[:, None]], 1
  ).reshape(4, -1)
  whole = each.sum(0)
  norms = np.linalg.norm(each, axis=1)
  close(found['Dense_2']['norm'], norms)
  close(
    found['Dense_2']['cosine'], each @ whole / (norms * np.linalg.norm(whole))
  )
  close(found['Dense_2']['share'], each @ whole / (whole @ whole))
  for layer in found.values():
    np.testing.assert_allclose(layer['share'].sum(), 1)
  ours = flow.contributions(nnx_loss, nnx_like_linen(), 4)
  assert list(ours) == ['head', 'layers/0', 'layers/3']
  close(ours['head'], found['Dense_2'])
  close(ours['layers/0'], found['Dense_0'])


@pytest.mark.sample
@float64
def test_contributions_over_devices():
  whole = Net()
  variables = whole.init(jax.random.key(0), jnp.asarray(X))

  def contributions(x, labels, axis_name=None):
    net = Net(axis_name=axis_name)

    def loss(params):
      logits, _ = net.apply(
        variables | {'params': params}, x, mutable=['batch_stats']
      )
      return losses.cross_entropy(logits, labels).mean()

    return flow.contributions(loss, variables['params'], 4, axis_name)

  split = np.stack(np.split(X, 4, 1)), LABELS.reshape(4, 2)
  pooled = jax.pmap(
    functools.partial(contributions, axis_name='data'), axis_name='data'
  )(*split)
  expected = contributions(jnp.asarray(X), LABELS)
  close(jax.tree.map(lambda a: a[0], pooled), expected)


@pytest.mark.sample
def test_contributions_skip_layers_without_time():
  """An image that is encoded once is the same at every timestep."""
  net = models.ConvNet(stages=((3,), (4,)))
  images = jnp.float32(normal(2, 8, 8, 1))
  variables = net.init(jax.random.key(0), images)

  def loss(params):
    logits, _ = net.apply(
      variables | {'params': params}, images, True, mutable=['batch_stats']
    )
    return losses.cross_entropy(logits, np.array([0, 1])).mean()

  found = flow.contributions(loss, variables['params'], 4)
  assert list(found) == ['classifier', 'conv1/layer']


# Errors.


def test_errors():
  net, x = Net(), jnp.float32(X)
  variables = net.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match="'reach', 'u', 's', got 'path'"):
    flow.zeros(net, variables, x, names=['path'])
  with pytest.raises(ValueError, match="'SpikingNeuron_1', got 'Dense_0'"):
    flow.zeros(net, variables, x, layers=['Dense_0'])
  with pytest.raises(ValueError, match="'spatial', 'leak', 'reset', got 'lea'"):
    flow.gates(net, variables, x, cut={'SpikingNeuron_0': ['lea']})
  with pytest.raises(ValueError, match="'reset', got 'time'"):
    neurons.run(x, cut=['time'])
  with pytest.raises(ValueError, match=r'shape \(4, 10\), got shape \(3, 10\)'):
    neurons.run(x, probes={'paths': jnp.zeros((3, 10))})
  model = snnx.SpikingNeuron(num_steps=4)
  with pytest.raises(ValueError, match="to be of '', got 'layer'"):
    flow.probed(model, x, layers=['layer'])


def test_methods_of_ones_own_tell_too():
  own = methods.Method(
    lambda s, p, t: s.mean + 0.5, lambda signal, p, t: p.width
  )
  x = jnp.float32(normal(3, 4, 5))
  zeros = {'paths': probes.zeros('paths', x)}
  told = jax.grad(lambda z: neurons.run(x, method=own, probes=z)[0].sum())(
    zeros
  )
  assert (flow.summary({'layer': told})['layer']['u'] > 0).all()
