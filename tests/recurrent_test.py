"""Recurrent weights over spikes, and leaky readouts."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from dsatgo_jax import linen as snn
from dsatgo_jax import models, neurons, recurrent
from dsatgo_jax import nnx as snnx
from dsatgo_jax.analysis import flow

close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)
KEY = jax.random.key(0)


def normal(*shape, seed=0):
  x = np.random.default_rng(seed).normal(0.3, 1, shape)
  return jnp.asarray(x, jnp.float32)


# Recurrent weights.


class Cell(nn.RNNCellBase):
  """What `SpikingRNN` is, by hand."""

  method: str
  inference: bool
  num_feature_axes = 1

  @nn.compact
  def __call__(self, carry, x):
    """One timestep."""
    state, spikes = carry
    kernel = self.param(
      'recurrent_kernel', nn.initializers.orthogonal(), 2 * x.shape[-1:]
    )
    neuron = snn.SpikingCell(
      self.method, self.inference, reset='soft', name='neuron'
    )
    state, spikes = neuron(state, x + spikes @ kernel)
    return (state, spikes), spikes

  @nn.nowrap
  def initialize_carry(self, rng, input_shape):
    """At rest."""
    zeros = jnp.zeros(input_shape)
    return neurons.NeuronState(zeros, jnp.int32(0)), zeros


@pytest.mark.parametrize(
  'method, inference',
  [
    ('ds_atgo', True),
    pytest.param('ds_atgo', False, marks=pytest.mark.sample),
    pytest.param('vanilla', False, marks=pytest.mark.sample),
  ],
)
def test_equals_an_rnn_around_a_cell_by_hand(method, inference):
  """Spikes, thresholds, gradients and state; in both modules, and in parts."""
  x, weights = normal(6, 4, 3), normal(6, 4, 3, seed=1)
  rnn = nn.RNN(
    Cell(method, inference),
    time_major=True,
    return_carry=True,
    variable_axes={'batch_stats': 0},
  )
  ours = snn.SpikingRNN(method, inference, num_steps=6, reset='soft')
  variables = ours.init(KEY, x)
  kernel = variables['params']['recurrent_kernel']
  params = {'recurrent_kernel': kernel, 'neuron': {'w': -1.3862944}}
  by_hand = {'params': {'cell': params}}
  if method == 'ds_atgo':
    kept = variables['batch_stats']
    by_hand['batch_stats'] = {'cell': {'neuron': kept}}

  def of_rnn(x, kernel):
    inside = {'cell': params | {'recurrent_kernel': kernel}}
    ((state, _), y), updates = rnn.apply(
      by_hand | {'params': inside}, x, mutable=['batch_stats']
    )
    return jnp.sum(y * weights), (y, state.v, jax.tree.leaves(updates))

  def of_linen(x, kernel):
    inside = variables['params'] | {'recurrent_kernel': kernel}
    (y, state), updates = ours.apply(
      variables | {'params': inside},
      x,
      return_state=True,
      mutable=['batch_stats'],
    )
    return jnp.sum(y * weights), (y, state.v, jax.tree.leaves(updates))

  def of_nnx(x, kernel):
    module = snnx.SpikingRNN(
      3, method, num_steps=6, reset='soft', rngs=nnx.Rngs(0)
    )
    module.recurrent_kernel = nnx.Param(kernel)
    y, state = module(x, inference, return_state=True)
    kept = jax.tree.leaves(nnx.state(module, nnx.BatchStat))
    return jnp.sum(y * weights), (y, state.v, kept)

  expected, *got = (
    jax.jit(jax.grad(f, (0, 1), has_aux=True))(x, kernel)
    for f in (of_rnn, of_linen, of_nnx)
  )
  assert 0.1 < expected[1][0].mean() < 0.9 and abs(expected[0][1]).max() > 0.1
  for results in got:
    close(results, expected)
  if inference:
    start = neurons.NeuronState(np.zeros((4, 3)), 0)
    first, state = ours.apply(variables, x[:4], state=start, return_state=True)
    assert state.t == 4
    rest = ours.apply(variables, x[4:], state=state)
    close(jnp.concatenate([first, rest]), expected[1][0])


@pytest.mark.sample
def test_without_weights_it_is_the_neuron():
  x = normal(4, 5, 3)
  mask = jnp.arange(4)[:, None] < jnp.array([4, 4, 2, 3, 4])
  norm = snn.TdBatchNorm(False).init_with_output(KEY, x, method='affine')[0]
  arguments = {'mask': mask, 'norm': norm}
  expected = neurons.run(x, neurons.Parameters(norm=norm), mask=mask)
  got = recurrent.run(
    x,
    neurons.Parameters(norm=norm),
    feedback=recurrent.weights(jnp.zeros((3, 3))),
    mask=mask,
  )
  close((got[0], got[1].v), (expected[0], expected[1].v))
  none = nn.initializers.zeros
  rnn = snn.SpikingRNN(use_running_average=False, recurrent_kernel_init=none)
  neuron = snn.SpikingNeuron(use_running_average=False)
  mutable = {'mutable': ['batch_stats', 'spiking']}

  def trained(module):
    variables = module.init(KEY, x, **arguments)
    return module.apply(variables, x, **arguments, **mutable)

  close(trained(rnn), trained(neuron))


def test_thresholds_are_pooled_over_devices():
  x, kernel = normal(5, 4, 3), normal(3, 3, seed=1)
  whole = recurrent.run(x, feedback=recurrent.weights(kernel))
  parts = jax.vmap(
    lambda x: recurrent.run(
      x, feedback=recurrent.weights(kernel), axis_name='device'
    )[0],
    in_axes=1, out_axes=1, axis_name='device',
  )(x.reshape(5, 2, 2, 3))  # fmt: skip
  chex.assert_trees_all_equal(parts.reshape(x.shape), whole[0])


class Linen(nn.Module):
  """A neuron, and one with recurrent weights."""

  @nn.compact
  def __call__(self, x):
    """[T, B, C] to spikes."""
    return snn.SpikingRNN(use_running_average=False)(
      snn.SpikingNeuron(use_running_average=False)(x)
    )


@pytest.mark.sample
def test_the_gradient_flow_of_other_layers():
  x = normal(3, 4, 2)
  variables = Linen().init(KEY, x)
  zeros = flow.zeros(Linen(), variables, x)
  assert list(flow.raw(zeros['flow'])) == ['SpikingNeuron_0']

  def loss(zeros):
    return Linen().apply(variables | zeros, x, mutable=['batch_stats'])[0].sum()

  expected = flow.raw(jax.grad(loss)(zeros)['flow'])['SpikingNeuron_0']
  assert abs(expected['paths']).max() > 0
  model = nnx.Sequential(
    snnx.SpikingNeuron(num_steps=3),
    snnx.SpikingRNN(2, num_steps=3, rngs=nnx.Rngs(0)),
  )
  model.layers[1].recurrent_kernel = nnx.Param(
    variables['params']['SpikingRNN_0']['recurrent_kernel']
  )
  probes = nnx.DiffState(0, snnx.Probe)
  gradient = nnx.grad(lambda model: model(x).sum(), argnums=probes)(
    flow.probed(model, x)
  )
  ((_, got),) = flow.raw(gradient).items()
  close(got, expected)


def test_a_kernel_of_another_size():
  with pytest.raises(ValueError, match=r'kernel \[3, 3\] .*got \[3, 4\]'):
    recurrent.run(normal(2, 4, 3), feedback=recurrent.weights(jnp.ones((3, 4))))


# Dynamics of one's own.


def by_hand(x, kind, share=0.6, strength=0.3, decay=0.2):
  """Hard reset, adaptive threshold; the spikes, and the memory at the end."""
  x = np.asarray(x, np.float64)
  v, memory, s, told = 0, np.zeros_like(x[0]), np.zeros_like(x[0]), []
  for x_t in x:
    if kind == 'current':
      memory = share * memory + x_t
      u = decay * v + memory
    else:
      memory = share * memory + strength * s
      u = decay * v + x_t - memory
    s = u >= u.mean() + u.std(ddof=1)
    v = u * (1 - s)
    told.append(s)
  return np.stack(told), memory


FEEDBACK = {
  'current': recurrent.current(0.6),
  'adapting': recurrent.adapting(0.6, 0.3),
}


@pytest.mark.parametrize(
  'kind', ['current', pytest.param('adapting', marks=pytest.mark.sample)]
)
def test_currents_are_a_loop_whole_and_in_parts(kind):
  x, feedback = normal(12, 4, 3), FEEDBACK[kind]
  expected = by_hand(x, kind)
  spikes, state, _ = recurrent.run(x, feedback=feedback)
  close((spikes, state.memory[1]), jax.tree.map(np.float32, expected))
  first, part, _ = recurrent.run(x[:5], feedback=feedback)
  second, part, _ = recurrent.run(x[5:], feedback=feedback, state=part)
  close((jnp.concatenate([first, second]), part), (spikes, state))
  settings = {'feedback': pickle.loads(pickle.dumps(feedback))}
  neuron = snn.FeedbackNeuron(use_running_average=False, **settings)
  got, variables = neuron.init_with_output(KEY, x)
  close(got, spikes)
  assert variables['params'].keys() == {'w'}
  close(snnx.FeedbackNeuron(num_steps=12, **settings)(x), spikes)


def test_gradients_of_currents_are_those_of_a_plain_loop():
  """A current is a leaky integrator before the neuron; its share learns."""
  x, weights = normal(6, 4, 3), normal(6, 4, 3, seed=1)

  def within(share, x):
    return (
      weights * recurrent.run(x, feedback=recurrent.current(share))[0]
    ).sum()

  def before(share, x):
    return (weights * neurons.run(recurrent.integrate(x, share)[0])[0]).sum()

  got, expected = (jax.grad(f, (0, 1))(0.6, x) for f in (within, before))
  close(got, expected)
  assert abs(got[0]) > 0.01


def test_a_third_one_is_a_function():
  """Spikes inhibit all others of their example; no memory."""

  def inhibiting(x, spikes, memory):
    return x - 0.5 * (spikes.sum(-1, keepdims=True) - spikes), memory

  x = normal(6, 4, 3)
  kernel = -0.5 * (1 - jnp.eye(3))
  got = recurrent.run(x, method='vanilla', feedback=inhibiting)
  expected = recurrent.run(
    x, method='vanilla', feedback=recurrent.weights(kernel)
  )
  close(got, expected)


# The readout.


@pytest.mark.parametrize(
  'decay',
  [np.linspace(0.3, 0.9, 3), pytest.param(0.7, marks=pytest.mark.sample)],
)
def test_a_leaky_integrator_is_a_loop(decay):
  """In both modules, gradients included, whole and in parts."""
  x, weights = normal(20, 4, 3), normal(20, 4, 3, seed=1)
  v, expected = np.zeros((4, 3)), []
  for x_t in np.asarray(x):
    v = np.asarray(decay) * v + x_t
    expected.append(v)
  g, slopes = np.zeros((4, 3)), []
  for w in np.asarray(weights)[::-1]:
    g = w + np.asarray(decay) * g
    slopes.append(g)
  ours = snn.LeakyIntegrator(decay)
  variables = ours.init(KEY, x)
  assert variables['params']['w'].shape == np.shape(decay)
  module = snnx.LeakyIntegrator(decay=decay)
  fixed = snn.LeakyIntegrator(decay, learn_decay=False)
  assert fixed.init(KEY, x) == {}
  for layer in (
    functools.partial(ours.apply, variables),
    module,
    functools.partial(fixed.apply, {}),
  ):
    y, pull = jax.vjp(layer, x)
    close(y, np.float32(expected))
    close(pull(weights)[0], np.float32(slopes[::-1]))
    first, state = layer(x[:7], return_state=True)
    rest, state = layer(x[7:], state=state, return_state=True)
    close(jnp.concatenate([first, rest]), y)
    close(state.v, y[-1])
    assert state.t == 20
  slope = jax.grad(lambda p: jnp.sum(ours.apply({'params': p}, x)))
  assert (jnp.abs(slope(variables['params'])['w']) > 0).all()


def test_membranes_are_wide_in_bfloat16():
  x = jnp.full((400, 1, 1), 1, jnp.bfloat16)
  y, state = recurrent.integrate(x, 1.0)
  assert y.dtype == jnp.bfloat16 and state.v == 400


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'decay': np.ones(4) / 2}, r'decay .*\(2, 3\).*\(4,\)'),
    ({'decay': 1.0}, 'decay <= 1, .*decay=1.0'),
    ({'state': neurons.NeuronState(jnp.zeros((2, 4)), 0)}, r'state for x\[0\]'),
  ],
)
def test_errors(arguments, message):
  state = {'state': arguments.pop('state')} if 'state' in arguments else {}
  with pytest.raises(ValueError, match=message):
    snn.LeakyIntegrator(**arguments).init(KEY, normal(5, 2, 3), **state)
  with pytest.raises(ValueError, match=message):
    snnx.LeakyIntegrator(**arguments)(normal(5, 2, 3), **state)


def test_a_network_may_end_in_a_leaky_integrator():
  settings = {'num_steps': 3, 'stages': ((2,),), 'num_classes': 4}
  images = normal(2, 4, 4, 1)
  leaky = models.ConvNet(readout='leaky', **settings)
  logits, variables = leaky.init_with_output(KEY, images)
  w = variables['params'].pop('readout')['w']
  before = models.ConvNet(**settings).apply(variables, images)
  close(logits, recurrent.integrate(before, jax.nn.sigmoid(w))[0])
  with pytest.raises(ValueError, match="'mean' or 'leaky', got 'last'"):
    models.ConvNet(readout='last', **settings).init(KEY, images)
