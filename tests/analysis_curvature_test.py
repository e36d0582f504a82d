"""Products with Hessian and Gauss-Newton matrix, against the whole matrices."""

import functools
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from dsatgo_jax import linen as snn
from dsatgo_jax import losses, surrogate
from dsatgo_jax import nnx as snnx
from dsatgo_jax.analysis import curvature

float64 = jax.enable_x64(True)
close = functools.partial(chex.assert_trees_all_close, rtol=1e-9, atol=1e-11)
KEY = jax.random.key(0, impl='unsafe_rbg')
SETTINGS = {
  'ds_atgo': {'surrogate': surrogate.arctan},
  'learnable_threshold': {
    'surrogate': surrogate.triangular,
    'reset': 'soft',
    'v_th': 0.7,
  },
}
every_method = pytest.mark.parametrize('method', SETTINGS)


class Net(nn.Module):
  """A layer of tdBN and neurons between two of weights."""

  method: str
  twin: bool = False
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x):
    """Frames [T, B, C] to logits [T, B, K]."""
    kinds = {'param_dtype': x.dtype}
    shared = kinds | {'axis_name': self.axis_name, 'use_running_average': False}
    settings = dict(SETTINGS[self.method])
    if self.twin:
      settings['surrogate'] = surrogate.straight_through(settings['surrogate'])
    x = snn.Dense(4, use_bias=False, **kinds)(x)
    x = snn.TdBatchNorm(**shared)(x)
    x = snn.SpikingNeuron(self.method, **shared, **settings)(x)
    return snn.Dense(3, **kinds)(x)


def outputs(net, x, params):
  return net.apply({'params': params}, x, mutable=['batch_stats'])[0]


def of_logits(labels, logits):
  return losses.cross_entropy(logits, labels).mean()


def loss(net, x, labels, params):
  return of_logits(labels, outputs(net, x, params))


def of(function, net, *batch):
  """A function of the parameters, the batch being data."""
  return Partial(_of(function, net), *batch)


@functools.cache
def _of(function, net):
  return lambda *arguments: function(net, *arguments)


@functools.cache
def data(dtype='float64'):
  random = np.random.default_rng(0)
  return jnp.asarray(random.normal(size=(2, 8, 2)), dtype), jnp.arange(8) % 3


@functools.cache
def params_of(method):
  params = jax.jit(Net(method).init)(KEY, data()[0])['params']
  flat, unravel = ravel_pytree(params)
  # Away from tdBN's biases of zero and scales of one.
  return unravel(flat + 0.1 * np.random.default_rng(1).normal(size=flat.size))


@pytest.fixture(scope='session')
def matrices():
  """Of each method Hessian, Gauss-Newton matrix and Jacobian of the twin."""

  @functools.cache
  @float64
  def get(method):
    x, labels = data()
    flat, unravel = ravel_pytree(params_of(method))
    twin = Net(method, twin=True)

    @jax.jit
    def dense(flat):
      def logits(flat):
        return outputs(twin, x, unravel(flat)).ravel()

      def top(logits):
        return of_logits(labels, logits.reshape(2, 8, 3))

      hessian = jax.hessian(lambda flat: top(logits(flat)))(flat)
      jacobian = jax.jacfwd(logits)(flat)
      return hessian, jax.hessian(top)(logits(flat)), jacobian

    hessian, h, jacobian = dense(flat)
    return hessian, jacobian.T @ h @ jacobian, jacobian

  return get


@functools.cache
def hessian_of(method):
  return curvature.hvp(of(loss, Net(method), *data()), params_of(method))


@functools.cache
def gauss_newton_of(method):
  x, labels = data()
  model = of(outputs, Net(method), x)
  return curvature.gnvp(model, Partial(of_logits, labels), params_of(method))


# The products.


@every_method
@float64
def test_hessian_is_that_of_the_straight_through_twin(method, matrices):
  params = params_of(method)
  ours = curvature.matrix(hessian_of(method), params)
  close(ours, matrices(method)[0])
  close(ours, ours.T)
  # Adaptive neurons between weights, and tdBN's scale among the parameters.
  assert np.linalg.norm(ours) > 0.1 and np.sum(np.any(ours != 0, 0)) > 20


@every_method
@float64
def test_forward_over_reverse(method, matrices):
  params = params_of(method)
  twin = of(loss, Net(method, twin=True), *data())
  product = curvature.hvp(twin, params, mode='forward')
  close(curvature.matrix(product, params), matrices(method)[0])


@every_method
@float64
def test_gauss_newton(method, matrices):
  params = params_of(method)
  ours = curvature.matrix(gauss_newton_of(method), params)
  close(ours, matrices(method)[1])
  assert np.linalg.eigvalsh(ours)[0] > -1e-12


@every_method
@float64
def test_jacobian_product_is_that_of_forward_mode(method, matrices):
  params = params_of(method)
  product = curvature.jvp(of(outputs, Net(method), data()[0]), params)
  vector, _ = ravel_pytree(params)
  expected = matrices(method)[2] @ vector
  assert np.linalg.norm(expected) > 0.1
  close(product(params).ravel(), expected)


@float64
def test_a_detached_reset_leaves_it_symmetric():
  class Detached(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = snn.Dense(4, param_dtype=x.dtype)(x)
      x = snn.SpikingNeuron(
        'vanilla', surrogate=surrogate.arctan, detach_reset=True,
        use_running_average=False, param_dtype=x.dtype,
      )(x)  # fmt: skip
      return snn.Dense(3, param_dtype=x.dtype)(x)

  x, labels = data()
  params = jax.jit(Detached().init)(KEY, x)['params']
  product = curvature.hvp(of(loss, Detached(), x, labels), params)
  hessian = curvature.matrix(product, params)
  assert np.linalg.norm(hessian) > 0.1
  close(hessian, hessian.T)


@float64
def test_compiles_once():
  """New parameters and new data of the same shapes compile nothing."""
  x, labels = data()
  params = params_of('ds_atgo')
  net = Net('ds_atgo')
  counted = chex.assert_max_traces(_of(loss, net), 1)

  found = []
  for scale in (1.0, 1.1):
    scaled = jax.tree.map(lambda a, scale=scale: scale * a, params)
    product = curvature.hvp(Partial(counted, scale * x, labels), scaled)
    top = curvature.eigenpairs(product, scaled, key=KEY, num_matvecs=8)
    found.append((product(params), top.values))
  chex.clear_trace_counter()
  assert not np.allclose(found[0][1], found[1][1])
  expected = curvature.hvp(of(loss, net, 1.1 * x, labels), scaled)(params)
  close(found[1][0], expected)


# What is estimated.


@float64
def test_eigenpairs(matrices):
  method = 'ds_atgo'
  params = params_of(method)
  hessian = matrices(method)[0]
  values, vectors = np.linalg.eigh(hessian)
  by_size = np.argsort(-abs(values))
  for which, order in (
    ('largest', [-1, -2]),
    ('smallest', [0, 1]),
    ('magnitude', by_size[:2]),
  ):
    top = curvature.eigenpairs(
      hessian_of(method), params, key=KEY, num=2, num_matvecs=20, which=which
    )
    chex.assert_trees_all_close(top.values, values[order], rtol=1e-6)
    for i, index in enumerate(order):
      vector = jax.tree.map(lambda a, i=i: a[i], top.vectors)
      chex.assert_trees_all_equal_shapes_and_dtypes(vector, params)
      flat, _ = ravel_pytree(vector)
      assert abs(flat @ vectors[:, index]) == pytest.approx(1, abs=1e-6)
      residual = np.linalg.norm(hessian @ flat - top.values[i] * flat)
      assert top.residuals[i] == pytest.approx(residual, abs=1e-12)


DIAGONAL = np.array([5.0, -3.0, 1.0, 1.0, 1.0, 0.0])


def scaled(vector):
  """A product of one's own: a diagonal matrix, on a tree."""
  diagonal = jnp.asarray(DIAGONAL, vector['a'].dtype)
  return {'a': diagonal[:4] * vector['a'], 'b': diagonal[4:] * vector['b']}


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@float64
def test_a_krylov_space_that_ends(dtype, seed):
  """After four eigenvalues only rounding can tell of more."""
  like = {'a': jnp.zeros(4, dtype), 'b': jnp.zeros(2, dtype)}
  top = curvature.eigenpairs(scaled, like, key=jax.random.key(seed), num=6)
  num = np.sum(np.isfinite(top.values))
  assert np.isfinite(top.values[:num]).all()
  found, residuals = top.values[:num, None], top.residuals[:num]
  distance = np.min(abs(found - DIAGONAL), 1)
  epsilon = np.finfo(dtype).eps
  assert np.all(distance <= residuals + epsilon**0.6)
  assert residuals.max() < 10 * epsilon**0.5
  assert np.max(np.min(abs(found - DIAGONAL), 0)) < epsilon**0.6
  flat = jnp.concatenate([top.vectors['a'], top.vectors['b']], 1)
  close(flat[:num] @ flat[:num].T, np.eye(num), atol=10 * epsilon**0.5)
  assert np.isnan(flat[num:]).all() and np.isnan(top.residuals[num:]).all()
  assert flat.dtype == dtype


def test_bfloat16():
  """The vectors are float32, and go into the product as bfloat16."""
  like = {'a': jnp.zeros(4, 'bfloat16'), 'b': jnp.zeros(2)}
  top = curvature.eigenpairs(scaled, like, key=KEY, num=6)
  assert top.vectors['a'].dtype == 'float32'
  found = top.values[jnp.array([0, -1])]
  np.testing.assert_allclose(found, [5, -3], atol=0.05)


@pytest.mark.sample
@float64
def test_no_curvature_at_all():
  params = {'w': jnp.ones(3)}
  product = curvature.hvp(lambda params: jnp.sum(params['w']), params)
  top = curvature.eigenpairs(product, params, key=KEY, num=2)
  np.testing.assert_array_equal(top.values, [0, np.nan])
  found = curvature.density(product, params, key=KEY)
  assert np.isfinite(found.density).all()
  close(np.trapezoid(found.density, found.grid), 1.0, rtol=1e-3)
  assert curvature.trace(product, params, key=KEY) == (0, 0)


@float64
def test_density():
  like = {'a': jnp.zeros(4), 'b': jnp.zeros(2)}
  found = jax.jit(
    lambda key: curvature.density(scaled, like, key=key, num_vectors=2000)
  )(KEY)
  close(np.trapezoid(found.density, found.grid), 1.0, rtol=1e-3)
  close(found.weights.sum(1), jnp.ones(2000))
  for value in set(DIAGONAL):
    near = abs(found.grid - value) < 0.4
    mass = np.trapezoid(found.density[near], found.grid[near])
    assert mass == pytest.approx(np.mean(DIAGONAL == value), abs=0.02)
  # Nodes and weights integrate polynomials exactly, whatever the vector.
  grid = jnp.linspace(-1, 1, 5)
  given = curvature.density(
    scaled, like, key=KEY, num_vectors=3, num_matvecs=2, grid=grid, width=0.1
  )
  assert given.nodes.shape == (3, 2)
  close(given.grid, grid)


@float64
def test_density_of_a_network(matrices):
  method = 'ds_atgo'
  values = np.linalg.eigvalsh(matrices(method)[0])
  found = curvature.density(
    hessian_of(method), params_of(method), key=KEY, num_vectors=3
  )
  close(np.trapezoid(found.density, found.grid), 1.0, rtol=1e-3)
  assert found.nodes.max() == pytest.approx(values[-1], rel=1e-6)
  assert found.nodes.min() == pytest.approx(values[0], rel=1e-6)


@pytest.mark.sample
@float64
def test_trace(matrices):
  method = 'ds_atgo'
  hessian, gauss_newton, _ = matrices(method)
  params = params_of(method)
  found = curvature.trace(hessian_of(method), params, key=KEY, num_vectors=50)
  assert 0 < found.error < 1
  assert abs(found.mean - np.trace(hessian)) < 4 * found.error
  product = gauss_newton_of(method)
  few = curvature.trace(
    product, params, key=KEY, num_vectors=12, semidefinite=True
  )
  plain = curvature.trace(product, params, key=KEY, num_vectors=12)
  expected = np.trace(gauss_newton)
  assert few.error < 0.1 * plain.error
  assert few.mean == pytest.approx(expected, rel=0.01)
  assert abs(plain.mean - expected) < 4 * plain.error


# Whose models, and where.


@pytest.mark.sample
def test_linen_in_float32_under_jit(matrices):
  x, labels = data('float32')
  params = jax.tree.map(jnp.float32, params_of('ds_atgo'))

  @jax.jit
  def top(x, params):
    product = curvature.hvp(of(loss, Net('ds_atgo'), x, labels), params)
    return curvature.eigenpairs(product, params, key=KEY, which='magnitude')

  found = top(x, params)
  assert found.values.dtype == 'float32'
  expected = max(np.linalg.eigvalsh(matrices('ds_atgo')[0]), key=abs)
  assert found.values[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.sample
def test_nnx():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.dense = snnx.Dense(2, 4, rngs=rngs)
      self.norm = snnx.TdBatchNorm(4)
      self.neuron = snnx.SpikingNeuron('ds_atgo', num_steps=2)
      self.head = snnx.Dense(4, 3, rngs=rngs)

    def __call__(self, x):
      return self.head(self.neuron(self.norm(self.dense(x))))

  x, labels = data('float32')
  graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

  def model(params):
    return nnx.merge(graph, params, rest, copy=True)(x)

  top = functools.partial(of_logits, labels)
  product = curvature.hvp(lambda params: top(model(params)), params)
  hessian = curvature.matrix(product, params)
  np.testing.assert_allclose(hessian, hessian.T, atol=1e-5)
  found = curvature.eigenpairs(product, params, key=KEY)
  expected = np.linalg.eigvalsh(hessian)[-1]
  assert found.values[0] == pytest.approx(expected, rel=1e-3)
  chex.assert_trees_all_equal_structs(found.vectors, params)


MESH = jax.make_mesh((4,), ('batch',), axis_types=(AxisType.Auto,))


def everything(net, x, labels, params, pool=lambda loss: loss, axis_name=None):
  """An eigenvalue and a product, of a part of the batch."""

  def top(logits):
    return pool(of_logits(labels, logits))

  model = functools.partial(outputs, net, x)
  hessian = curvature.hvp(
    lambda params: top(model(params)), params, axis_name=axis_name
  )
  gauss_newton = curvature.gnvp(model, top, params, axis_name=axis_name)
  top = curvature.eigenpairs(hessian, params, key=KEY, num_matvecs=6)
  return top, gauss_newton(params)


@pytest.mark.sample
@float64
def test_four_devices_equal_one():
  x, labels = data()
  # Devices that differ in mean and deviation.
  x = x * np.repeat([1, 2, 0.5, 3], 2)[None, :, None] + x[:, ::-1]
  params = params_of('ds_atgo')
  alone, pooled = Net('ds_atgo'), Net('ds_atgo', axis_name='batch')
  expected = jax.jit(functools.partial(everything, alone))(x, labels, params)

  def shard(a, *spec):
    return jax.device_put(a, NamedSharding(MESH, P(*spec)))

  with_jit = jax.jit(functools.partial(everything, alone))(
    shard(x, None, 'batch'), shard(labels, 'batch'), shard(params)
  )
  with_pmap = jax.pmap(
    functools.partial(everything, pooled, axis_name='batch'),
    axis_name='batch',
    in_axes=(1, 0, None),
    out_axes=None,
  )(x.reshape(2, 4, 2, 2), labels.reshape(4, 2), params)
  for found in (with_jit, with_pmap):
    close(found, expected)


@pytest.mark.sample
@float64
def test_shard_map_with_the_mean_inside():
  x, labels = data()
  params = params_of('ds_atgo')
  net = Net('ds_atgo', axis_name='batch')
  pmean = functools.partial(lax.pmean, axis_name='batch')

  def product(x, labels, params):
    whole = of(loss, net, x, labels)
    return curvature.hvp(lambda params: pmean(whole(params)), params)(params)

  sharded = jax.shard_map(
    product,
    mesh=MESH,
    in_specs=(P(None, 'batch'), P('batch'), P()),
    out_specs=P(),
  )
  close(jax.jit(sharded)(x, labels, params), hessian_of('ds_atgo')(params))


# Errors.


def test_errors(monkeypatch):
  params = {'w': jnp.ones(3)}

  def cube(params):
    return jnp.sum(params['w'] ** 3)

  product = curvature.hvp(cube, params)
  raises = functools.partial(pytest.raises, ValueError)
  with raises(match=r'scalar, got shape \(3,\)'):
    curvature.hvp(lambda params: params['w'], params)
  with raises(match=r"floating-point .* int32 at params\['n'\]"):
    curvature.hvp(cube, params | {'n': jnp.arange(2)})
  with raises(match="'reverse' or 'forward', got mode='both'"):
    curvature.hvp(cube, params, mode='both')
  with pytest.raises(TypeError, match='custom_vjp'):
    curvature.hvp(
      lambda params: jnp.sum(surrogate.arctan(params['w'], 1.0) ** 2),
      params,
      mode='forward',
    )(params)
  with raises(match="'largest', 'smallest', 'magnitude', got which='top'"):
    curvature.eigenpairs(product, params, key=KEY, which='top')
  with raises(match='num_matvecs <= 3, .* got num=1, num_matvecs=4'):
    curvature.eigenpairs(product, params, key=KEY, num_matvecs=4)
  with raises(match='num_vectors >= 1, got num_vectors=0'):
    curvature.density(product, params, key=KEY, num_vectors=0)
  with raises(match='num_matvecs <= 3'):
    curvature.density(product, params, key=KEY, num_matvecs=0)
  with raises(match='at least two vectors, got num_vectors=1'):
    curvature.trace(product, params, key=KEY, num_vectors=1)
  with raises(match='at most 3, .* got num_vectors=4'):
    curvature.trace(product, params, key=KEY, num_vectors=4, semidefinite=True)
  for name in ('decomp', 'stochtrace'):
    monkeypatch.setitem(sys.modules, f'matfree.{name}', None)
  jax.clear_caches()
  chex.assert_trees_all_close(product(params), {'w': 6 * jnp.ones(3)})
  for estimate in (curvature.eigenpairs, curvature.density, curvature.trace):
    with pytest.raises(ImportError, match=r"'dsatgo_jax\[analysis\]'"):
      estimate(product, params, key=KEY)
