"""What Flax's own layers go through, ours go through."""

import copy
import functools
import pickle
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dsatgo_jax import (
  linen,
  methods,
  models,
  neurons,
  recurrent,
  surrogate,
  tdbn,
)
from dsatgo_jax import nnx as snnx

float64 = jax.enable_x64(True)


def normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(0.4, 1, shape), jnp.float32)


# Copies.


@surrogate.custom
def gaussian(x, width):
  return jnp.exp(-jnp.pi * (x / width) ** 2) / width


THINGS = {
  'surrogate.rectangular': surrogate.rectangular,
  'surrogate.arctan': surrogate.arctan,
  "a surrogate of one's own": gaussian,
  'surrogate.scaled': surrogate.scaled('arctan', 0.5),
  'surrogate.straight_through': surrogate.straight_through(surrogate.arctan),
  'methods.METHODS': methods.METHODS,
  'linen.SpikingNeuron': linen.SpikingNeuron(surrogate=gaussian),
  'linen.TdBatchNorm': linen.TdBatchNorm(),
  'models.ConvNet': models.ConvNet(),
  'nnx.SpikingNeuron': snnx.SpikingNeuron(num_steps=3),
  'nnx.TdBatchNorm': snnx.TdBatchNorm(5),
}


@pytest.mark.parametrize('name', THINGS)
@pytest.mark.parametrize(
  'duplicate', [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))]
)
def test_can_be_copied_and_pickled(name, duplicate):
  thing, x = THINGS[name], normal(3, 4, 5)
  twin = duplicate(thing)
  if name == 'methods.METHODS' or isinstance(thing, nn.Module):
    assert twin == thing
  elif isinstance(thing, nnx.Module):
    chex.assert_trees_all_equal(twin(x), thing(x))
    chex.assert_trees_all_equal(nnx.state(twin), nnx.state(thing))
  else:
    slope, expected = (
      jax.grad(lambda x, f=f: f(x, 0.9)) for f in (twin, thing)
    )
    assert slope(0.1) == expected(0.1) != 0


# Donation.


@pytest.mark.parametrize('width_signal', ['theta', 'sigma'])
def test_fresh_variables_can_be_donated(width_signal):
  x = normal(4, 8, 6)
  module = linen.SpikingNeuron(
    use_running_average=False, width_signal=width_signal
  )
  variables = module.init(jax.random.key(0), x)
  step = jax.jit(
    lambda v, x: v | module.apply(v, x, mutable=['batch_stats'])[1],
    donate_argnums=0,
  )
  assert jax.tree.structure(step(variables, x)) == jax.tree.structure(variables)
  graph, state = nnx.split(
    snnx.SpikingNeuron(num_steps=4, width_signal=width_signal)
  )

  @functools.partial(jax.jit, donate_argnums=0)
  def nnx_step(state, x):
    module = nnx.merge(graph, state)
    module(x)
    return nnx.state(module)

  nnx_step(state, x)


# Export, with the size of the batch left open.


def layers(x):
  """Batch norm and neurons that train."""
  mean, variance = tdbn.measure(x)
  norm = tdbn.affine(mean, variance, jnp.ones(6), jnp.zeros(6))
  parameters = neurons.Parameters(norm=norm)
  spikes, _, record = neurons.run(x, parameters, record=True)
  return spikes, record.scalars(), tdbn.unbiased(variance, x)


@pytest.mark.parametrize(
  'num_steps', [4, pytest.param(20, marks=pytest.mark.sample)]
)
def test_export_with_a_symbolic_batch_and_a_gradient(num_steps):
  def there_and_back(x):
    outputs, pull, others = jax.vjp(
      lambda x: (layers(x)[0], layers(x)[1:]), x, has_aux=True
    )
    return outputs, others, pull(outputs)

  (b,) = export.symbolic_shape('b')
  spec = jax.ShapeDtypeStruct((num_steps, b, 6), jnp.float32)
  exported = export.export(jax.jit(there_and_back))(spec)
  for batch in (3, 8):
    x = normal(num_steps, batch, 6)
    chex.assert_trees_all_close(
      exported.call(x), jax.jit(there_and_back)(x), rtol=1e-4, atol=1e-6
    )


# Eager calls.


def compilations(function):
  """How many programs a call compiles."""
  durations = []

  def listen(event, _, **__):
    if 'backend_compile' in event:
      durations.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    jax.block_until_ready(function())
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  return len(durations)


def eager_calls():
  x = normal(4, 8, 6)
  long = normal(20, 8, 6)
  state = neurons.at_rest(x[0])
  module = linen.SpikingNeuron(use_running_average=False)
  norm = linen.TdBatchNorm(False)
  variables = module.init(jax.random.key(0), x)
  norm_variables = norm.init(jax.random.key(0), x)
  rnn = linen.SpikingRNN(use_running_average=False)
  rnn_variables = rnn.init(jax.random.key(0), x)
  nnx_module = snnx.SpikingNeuron(num_steps=4)
  nnx_norm = snnx.TdBatchNorm(6)
  return {
    'run': lambda: neurons.run(x)[0],
    'run over a long time': lambda: neurons.run(long)[0],
    'step': lambda: neurons.step(state, x[0])[0],
    'gradient of run': lambda: jax.grad(
      lambda x: neurons.run(x, method='tgo')[0].sum()
    )(x),
    'gradient of step': lambda: jax.grad(
      lambda x: neurons.step(state, x)[0].sum()
    )(x[0]),
    'linen.SpikingNeuron': lambda: module.apply(
      variables, x, mutable=['batch_stats', 'spiking']
    ),
    'linen.TdBatchNorm': lambda: norm.apply(
      norm_variables, x, mutable=['batch_stats']
    ),
    'nnx.SpikingNeuron': lambda: nnx_module(x),
    'nnx.TdBatchNorm': lambda: nnx_norm(x),
    'gradient of nnx.TdBatchNorm': lambda: nnx.grad(
      lambda norm: jnp.sum(norm(x) ** 2)
    )(nnx_norm),
    'linen.SpikingRNN': lambda: rnn.apply(
      rnn_variables, x, mutable=['batch_stats', 'spiking']
    ),
    'recurrent.integrate': lambda: recurrent.integrate(x, 0.5),
    'a part of a recording': lambda: nnx_module(x[:2], state=state),
  }


@pytest.mark.parametrize('name', eager_calls())
def test_the_second_eager_call_compiles_nothing(name):
  call = eager_calls()[name]
  call()
  assert compilations(call) == 0


# Flags of JAX.

MODULES = {
  'linen.SpikingNeuron': linen.SpikingNeuron(use_running_average=False),
  'linen.TdBatchNorm': linen.TdBatchNorm(False),
  'linen.TdBatchNorm, inference': linen.TdBatchNorm(True),
}


@pytest.mark.parametrize('name', MODULES)
def test_without_rank_promotion(name):
  module, x = MODULES[name], normal(4, 2, 3)
  with jax.numpy_rank_promotion('raise'):
    variables = module.init(jax.random.key(0), x)
    jax.grad(
      lambda x: jnp.sum(
        module.apply(variables, x, mutable=['batch_stats', 'spiking'])[0]
      )
    )(x)


# Forward mode.


class Net(nn.Module):
  """Two layers of neurons."""

  surrogate: object

  @nn.compact
  def __call__(self, x):
    """[T, B, C] to spikes."""
    for _ in range(2):
      x = linen.TdBatchNorm(False)(x)
      x = linen.SpikingNeuron(
        surrogate=self.surrogate, use_running_average=False
      )(x)
    return x


@pytest.mark.sample
@float64
def test_forward_mode_where_the_surrogate_is_straight_through():
  """Without a word to the neuron, and equal to reverse mode."""
  x = normal(4, 3, 2).astype(np.float64)
  plain, twin = (
    Net(surrogate.arctan),
    Net(surrogate.straight_through(surrogate.arctan)),
  )
  variables = plain.init(jax.random.key(0), x)
  weights = jax.random.normal(jax.random.key(1), x.shape)

  def loss(net, x):
    spikes, _ = net.apply(variables, x, mutable=['batch_stats'])
    return jnp.sum(jnp.sin(weights * spikes))

  forward = jax.jacfwd(functools.partial(loss, twin))(x)
  reverse = jax.grad(functools.partial(loss, plain))(x)
  np.testing.assert_allclose(forward, reverse, rtol=1e-9, atol=1e-12)
  mixed = jax.hessian(functools.partial(loss, twin))(x)
  both = jax.jacrev(jax.grad(functools.partial(loss, plain)))(x)
  np.testing.assert_allclose(mixed, both, rtol=1e-8, atol=1e-10)


def test_forward_mode_of_nnx_and_of_networks():
  twin = surrogate.straight_through(surrogate.arctan)
  neuron, x = snnx.SpikingNeuron(num_steps=4, surrogate=twin), normal(4, 3, 2)
  neuron.eval()
  _, tangent = jax.jvp(neuron, (x,), (jnp.ones_like(x),))
  assert tangent.any()
  images = normal(2, 8, 8, 1)
  for settings in ({'surrogate': twin}, {'fused': False}):
    net = models.ConvNet(stages=((2,),), **settings)
    variables = net.init(jax.random.key(0), images)

    def loss(images, net=net, variables=variables):
      return jnp.sum(net.apply(variables, images) ** 2)

    assert jax.grad(loss)(images).any()
    if 'surrogate' in settings:
      assert jax.linearize(loss, images)[1](images)


# Statistics that are not pooled.


def on_four_devices(function):
  """What a mapped function warns of, by how it is mapped."""
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  return {
    'pmap': jax.pmap(function, axis_name='data', in_axes=1, out_axes=1),
    'shard_map': jax.jit(
      jax.shard_map(
        function, mesh=mesh, in_specs=P(None, 'data'), out_specs=P(None, 'data')
      )
    ),
  }


@pytest.mark.parametrize('how', ['pmap', 'shard_map'])
@pytest.mark.parametrize('layer', ['neuron', 'norm'])
def test_an_axis_that_is_not_named_is_warned_of(how, layer):
  x = normal(3, 4, 4, 5) if how == 'pmap' else normal(3, 16, 5)

  def function(x, **settings):
    kind = {'neuron': linen.SpikingNeuron, 'norm': linen.TdBatchNorm}[layer]
    module = kind(use_running_average=False, **settings)
    variables = {
      'neuron': {
        'params': {'w': jnp.zeros(())},
        'batch_stats': {'running_threshold': jnp.ones(3)},
      },
      'norm': {
        'params': {'scale': jnp.ones(5), 'bias': jnp.zeros(5)},
        'batch_stats': {'mean': jnp.zeros(5), 'var': jnp.ones(5)},
      },
    }[layer]
    return module.apply(variables, x, mutable=['batch_stats'])[0]

  with pytest.warns(UserWarning, match="the mapped axis 'data', and axis_name"):
    on_four_devices(function)[how](x)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    for axis_name in ('data', ()):
      named = functools.partial(function, axis_name=axis_name)
      on_four_devices(named)[how](x)
