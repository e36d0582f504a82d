"""Spikes kept in a few bits: the same results, and what is kept."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks.gpu import peak
from dsatgo_jax import linen as snn
from dsatgo_jax import losses, models, surrogate
from dsatgo_jax import nnx as snnx
from dsatgo_jax.packing import KEPT, Packed, max_pool, pack, unpack, width


def spikes(*shape, largest=1, dtype='float32', seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, largest + 1, shape), dtype)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
@pytest.mark.parametrize('largest', [1, 2, 3, 14, 15, 254])
@pytest.mark.parametrize(
  'channels',
  [0, 9, *(pytest.param(n, marks=pytest.mark.sample) for n in (1, 4))],
)
def test_whole_numbers_come_back(channels, largest, dtype):
  x = spikes(3, 2, channels, largest=largest, dtype=dtype)
  bits = width(largest)
  codes = pack(x, bits)
  assert codes.dtype == jnp.uint8
  assert codes.shape == (3, 2, -(-channels * bits // 8))
  chex.assert_trees_all_equal(unpack(codes, bits, channels, dtype), x)


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_all_else_comes_back_as_nan(bits):
  others = [2**bits - 1, 2.0**bits, 0.5, -1, 1e9, np.inf, -np.inf, np.nan]
  x = jnp.array([0, 1, 2, *others])
  back = unpack(pack(x, bits), bits, len(x), x.dtype)
  np.testing.assert_array_equal(back, [0, 1, 2, *len(others) * [np.nan]])


@pytest.mark.parametrize('largest', [0, 255])
def test_numbers_that_no_byte_holds(largest):
  with pytest.raises(ValueError, match=f'<= 254, got largest={largest}'):
    Packed(lax.dot_general, largest)(jnp.ones((2, 3)), jnp.ones((3, 4)))


# Layers: Linen's and NNX's, as functions of `packed` settings, that give the
# parameters and a function of these and x.


def conv(**settings):
  operation = settings and {
    'conv_general_dilated': Packed(lax.conv_general_dilated, **settings)
  }
  return operation | {'kernel_size': (3, 3), 'strides': 2}


def dense(**settings):
  return settings and {'dot_general': Packed(lax.dot_general, **settings)}


def linen_layer(kind, dtype, **settings):
  module = kind(6, dtype=dtype, use_bias=False, **settings)
  x = jnp.zeros((1, 5, 5, 4), dtype)
  return module.init(jax.random.key(0), x), module.apply


def nnx_layer(kind, dtype, **settings):
  module = kind(4, 6, dtype=dtype, use_bias=False, rngs=nnx.Rngs(0), **settings)
  graph, state = nnx.split(module)
  return state, lambda state, x: nnx.merge(graph, state)(x)


def layer(name, dtype='float32', **settings):
  return {
    'linen.Conv': lambda: linen_layer(snn.Conv, dtype, **conv(**settings)),
    'linen.Dense': lambda: linen_layer(snn.Dense, dtype, **dense(**settings)),
    'nnx.Conv': lambda: nnx_layer(snnx.Conv, dtype, **conv(**settings)),
    'nnx.Dense': lambda: nnx_layer(snnx.Dense, dtype, **dense(**settings)),
  }[name]()


LAYERS = ('linen.Conv', 'linen.Dense', 'nnx.Conv', 'nnx.Dense')


def gradients(params, apply, x):
  def loss(params, x):
    y = apply(params, x)
    return jnp.mean(jnp.sin(y).astype(jnp.float32)), y

  (_, y), slopes = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
  return y, slopes


@pytest.mark.parametrize(
  'alone', [pytest.param(False, marks=pytest.mark.sample), True]
)
@pytest.mark.parametrize(
  'largest', [1, pytest.param(4, marks=pytest.mark.sample)]
)
@pytest.mark.parametrize(
  'dtype', ['bfloat16', pytest.param('float32', marks=pytest.mark.sample)]
)
@pytest.mark.parametrize('name', LAYERS)
def test_values_and_gradients_are_those_without(name, dtype, largest, alone):
  x = spikes(3, 2, 5, 5, 4, largest=largest, dtype=dtype)
  params, apply = layer(name, dtype)
  _, packed = layer(name, dtype, largest=largest, alone=alone)
  expected = jax.jit(functools.partial(gradients, apply=apply))(params, x=x)
  found = jax.jit(functools.partial(gradients, apply=packed))(params, x=x)
  assert all(a.any() for a in jax.tree.leaves(expected))
  chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize(
  'value',
  [0.5, *(pytest.param(a, marks=pytest.mark.sample) for a in (3.0, np.nan))],
)
@pytest.mark.parametrize('name', LAYERS)
def test_what_is_no_spike_shows(name, value):
  x = spikes(3, 2, 5, 5, 4).at[0, 0, 0, 0, 0].set(value)
  params, apply = layer(name, alone=True)
  y, (of_params, _) = gradients(params, apply, x)
  assert jnp.isnan(y).any()
  assert all(jnp.isnan(a).any() for a in jax.tree.leaves(of_params))


def on_four_devices(how, function):
  """A function of parameters and [4, ...], mapped over the second's axis."""
  if how == 'pmap':
    return jax.pmap(function, in_axes=(None, 0))
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  return jax.shard_map(
    lambda params, x: jax.tree.map(lambda a: a[None], function(params, x[0])),
    mesh=mesh, in_specs=(P(), P('data')), out_specs=P('data'),
  )  # fmt: skip


TRANSFORMATIONS = {
  'eager': lambda f: (
    lambda p, x: jax.tree.map(
      lambda *a: jnp.stack(a), *(f(p, each) for each in x)
    )
  ),
  'vmap': lambda f: jax.vmap(f, (None, 0)),
  'vmap of jit': lambda f: jax.vmap(jax.jit(f), (None, 0)),
  'scan': lambda f: lambda p, x: lax.scan(lambda c, x: (c, f(p, x)), 0, x)[1],
  'pmap': functools.partial(on_four_devices, 'pmap'),
  'shard_map': functools.partial(on_four_devices, 'shard_map'),
}


@pytest.mark.sample
@pytest.mark.parametrize(
  'alone', [pytest.param(False, marks=pytest.mark.sample), True]
)
@pytest.mark.parametrize(
  'remat', [None, pytest.param(jax.checkpoint, marks=pytest.mark.sample), KEPT]
)
@pytest.mark.parametrize('how', TRANSFORMATIONS)
def test_under_transformations(how, remat, alone):
  x = spikes(4, 3, 2, 5, 5, 4)
  params, apply = layer('linen.Conv')
  _, packed = layer('linen.Conv', alone=alone)
  if remat:
    policy = KEPT if remat is KEPT else None
    packed = jax.checkpoint(packed, policy=policy)
  transform = TRANSFORMATIONS[how]
  found, expected = (
    transform(lambda p, x, f=f: gradients(p, f, x))(params, x)
    for f in (packed, apply)
  )
  chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-7)


def test_second_derivatives():
  x = spikes(3, 2, 5, 5, 4)
  params, apply = layer('linen.Dense')

  def mixed(apply):
    def loss(params, x):
      return jnp.sum(jnp.sin(apply(params, x)))

    def squares(params, x):
      (slope,) = jax.tree.leaves(jax.grad(loss)(params, x))
      return jnp.sum(slope**2)

    return jax.jit(jax.grad(squares, (0, 1)))(params, x)

  _, packed = layer('linen.Dense', largest=1)
  chex.assert_trees_all_equal(mixed(packed), mixed(apply))
  _, packed = layer('linen.Dense', alone=True)
  with pytest.raises(NotImplementedError, match='no second derivatives'):
    mixed(packed)


# What is kept.


def read_by(platform, name, **settings):
  """Which of the arrays that are kept a backward pass reads, by dtype."""
  params, apply = layer(name, **settings)
  y, pull = jax.vjp(apply, params, spikes(3, 2, 8, 8, 4))
  kept, tree = jax.tree.flatten(pull)

  def back(kept, g):
    return jax.tree.unflatten(tree, kept)(g)

  text = (
    jax.jit(back, keep_unused=True)
    .trace(kept, y)
    .lower(lowering_platforms=(platform,))
    .as_text()
  )
  main = text[text.index('@main') :].partition('func.func private')[0]
  return [
    a.dtype.name
    for i, a in enumerate(kept)
    if a.size >= 3 * 2 * 8 * 8 and len(re.findall(rf'%arg{i}\b', main)) > 1
  ]


@pytest.mark.parametrize('name', LAYERS)
def test_gpus_read_codes_and_cpus_what_they_did(name):
  assert read_by('cpu', name) == ['float32']
  assert read_by('cpu', name, largest=1) == ['float32']
  assert read_by('cuda', name, largest=1) == ['uint8']
  assert read_by('cuda', name, alone=True) == ['uint8']
  assert read_by('cpu', name, alone=True) == ['uint8']


# Pools.


@pytest.mark.sample
@pytest.mark.parametrize('kind', ['spikes', 'numbers'])
@pytest.mark.parametrize(
  'shape, window, strides, padding',
  [
    ((3, 2, 8, 9, 4), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((2, 7, 6, 3), (2, 2), None, 'VALID'),
    ((2, 3, 9, 8, 1), (3, 2), (2, 3), 'SAME'),
    ((2, 3, 9, 2), (3,), (4,), ((2, 0),)),
  ],
)
def test_a_pool_is_that_of_flax(shape, window, strides, padding, kind):
  if kind == 'spikes':
    x = spikes(*shape)
  else:
    x = jax.random.normal(jax.random.key(0), shape)

  def slope(pool, x):
    y = pool(x, window, strides, padding)
    weights = jax.random.normal(jax.random.key(1), y.shape)
    return jnp.sum(weights * jnp.sin(y)), y

  found, expected = (
    jax.jit(jax.grad(functools.partial(slope, pool), has_aux=True))(x)
    for pool in (max_pool, snn.max_pool)
  )
  chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)


PROGRAM = """HloModule program, is_scheduled=true

ENTRY %main (a: f32[64]) -> f32[512] {
  %a = f32[64]{0} parameter(0)
  %b = (f32[64]{0}, bf16[256]{0}) fusion(%a), calls=%f, metadata={op_name="b"}
  %c = bf16[256]{0} get-tuple-element(%b), index=1
  %d = bf16[16,16]{1,0} bitcast(%c)
  %e = f32[512]{0} fusion(%d), calls=%f, metadata={op_name="e"}
  %f = pred[256]{0} fusion(%e), calls=%f, metadata={op_name="f"}
  ROOT %g = f32[512]{0} fusion(%e, %f), calls=%f
}
"""


def test_what_is_in_memory_at_its_largest():
  arrays = [
    (2048, 'f32[512]', 'e'),
    (512, 'bf16[256]', 'b'),
  ]
  assert peak(PROGRAM) == ('e', arrays)


def test_a_pool_keeps_a_byte_for_each_window():
  _, pull = jax.vjp(lambda x: max_pool(x, (2, 2), (2, 2)), spikes(3, 8, 8, 4))
  (kept,) = jax.tree.leaves(pull)
  assert (kept.shape, kept.dtype) == ((3, 4, 4, 4), jnp.uint8)


# Networks.

NETWORKS = {
  'ResNet19': functools.partial(
    models.ResNet19, planes=(4, 6), stage_sizes=(3, 1), head_width=8
  ),
  'SEWResNet18': functools.partial(
    models.SEWResNet18, 7, num_steps=2, planes=(4, 6), stage_sizes=(1, 1)
  ),
  'VGGSNN': functools.partial(
    models.VGGSNN, num_steps=3, stages=((4, 4), (6, 6))
  ),
}


@functools.partial(jax.jit, static_argnums=0)
def network_step(net, variables, x):
  def loss_fn(params):
    logits, updates = net.apply(
      variables | {'params': params}, x, train=True, mutable=['batch_stats']
    )
    labels = jnp.arange(logits.shape[1]) % 3
    return losses.cross_entropy(logits, labels).mean(), (logits, updates)

  return jax.value_and_grad(loss_fn, has_aux=True)(variables['params'])


@pytest.mark.sample
@pytest.mark.parametrize(
  'dtype', ['bfloat16', pytest.param('float32', marks=pytest.mark.sample)]
)
@pytest.mark.parametrize('name', NETWORKS)
def test_networks_learn_the_same(name, dtype):
  """On CPU, packed, to the bit; computed again, to rounding."""
  make = functools.partial(NETWORKS[name], dtype=dtype)
  x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  variables = jax.jit(make().init)(jax.random.key(1), x)
  expected = network_step(make(), variables, x)
  packed = network_step(make(pack=True), variables, x)
  chex.assert_trees_all_equal_structs(packed, expected)
  if name == 'SEWResNet18':  # Its pool sums in another order.
    chex.assert_trees_all_close(packed, expected, rtol=1e-4, atol=1e-5)
  else:
    chex.assert_trees_all_equal(packed, expected)
  again = network_step(make(remat='layer'), variables, x)
  chex.assert_trees_all_equal_structs(again, expected)
  chex.assert_trees_all_close(again, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.sample
def test_a_layer_that_is_computed_again_keeps_its_codes():
  """Of all that is as large as a layer; but the image."""
  net = NETWORKS['ResNet19'](planes=(4,), stage_sizes=(2,), remat='layer')
  x = jnp.ones((3, 16, 16, 3))
  variables = jax.eval_shape(net.init, jax.random.key(0), x)
  variables = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), variables)

  def apply(params):
    variables['params'] = params
    return net.apply(variables, x, train=True, mutable=['batch_stats'])[0]

  _, pull = jax.vjp(apply, variables['params'])
  kept = [a for a in jax.tree.leaves(pull) if a.size >= x[0].size]
  kept = [a for a in kept if a.shape != x.shape]
  assert len(kept) == 4
  assert {a.dtype.name for a in kept} == {'uint8'}


@pytest.mark.sample
@pytest.mark.parametrize('settings', [{'pack': True}, {'remat': 'layer'}])
def test_forward_mode_where_the_surrogate_has_it(settings):
  twin = surrogate.straight_through(surrogate.arctan)
  net = models.ConvNet(stages=((2, 2),), surrogate=twin, **settings)
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
  variables = net.init(jax.random.key(1), x)
  _, tangent = jax.jvp(functools.partial(net.apply, variables), (x,), (x,))
  assert tangent.any()


def test_an_unknown_remat():
  with pytest.raises(ValueError, match="None or 'layer', got 'block'"):
    models.ConvNet(remat='block').init(
      jax.random.key(0), jnp.ones((1, 8, 8, 1))
    )
