"""Surrogate gradients beside differences, smoothed losses, smooth twins."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from scipy import stats

from dsatgo_jax import linen as snn
from dsatgo_jax import losses, surrogate
from dsatgo_jax.analysis import bias

float64 = jax.enable_x64(True)
KEY = jax.random.key(0)
SPIKES = {
  name: getattr(surrogate, name)
  for name in ('rectangular', 'triangular', 'sigmoid', 'arctan', 'fast_sigmoid')
}
every_surrogate = pytest.mark.parametrize('name', SPIKES)


# The smooth twin.


@every_surrogate
@float64
def test_the_twins_derivative_is_the_density(name):
  spike, twin = SPIKES[name], bias.smooth(SPIKES[name])
  # All edges: 0, width / 2 and width.
  x = jnp.linspace(-3, 3, 61)
  for width in (0.3, 1.0, 4.0):
    slope = jax.vmap(jax.grad(twin), (0, None))(x, width)
    chex.assert_trees_all_close(
      slope, spike.gradient(x, width), rtol=1e-12, atol=1e-14
    )
    _, tangent = jax.jvp(lambda x: twin(x, width), (x,), (jnp.ones(61),))  # noqa: B023
    chex.assert_trees_all_close(tangent, slope, rtol=1e-12, atol=1e-14)
    assert (jnp.diff(twin(x, width)) >= 0).all()
  ends = twin(jnp.array([-jnp.inf, -1e30, 0, 1e30, jnp.inf]), 1.0)
  np.testing.assert_allclose(ends, [0, 0, 0.5, 1, 1], atol=1e-8)
  assert jax.grad(twin, 1)(0.3, 1.0) == 0
  assert twin(jnp.ones(2, 'bfloat16'), jnp.float32(1)).dtype == 'bfloat16'


def test_a_twin_of_ones_own():
  @surrogate.custom
  def gaussian(x, width):
    return jnp.exp(-jnp.pi * (x / width) ** 2) / width

  with pytest.raises(ValueError, match='one of rectangular, .* or an integral'):
    bias.smooth(gaussian)
  scale = np.sqrt(2 * np.pi)
  twin = bias.smooth(
    gaussian, lambda x, width: jax.scipy.stats.norm.cdf(scale * x / width)
  )
  slope = jax.grad(twin)(0.3, 2.0)
  np.testing.assert_allclose(slope, gaussian.gradient(0.3, 2.0), rtol=1e-5)


# Spiking networks.


class Net(nn.Module):
  """Two spiking layers, and one of weights after the last spikes."""

  surrogate: object
  width: object = 1.0
  method: str = 'ds_atgo'

  @nn.compact
  def __call__(self, x, train: bool = False):
    """Frames [T, B, C] to logits [T, B, K]."""
    shared = {'use_running_average': not train, 'param_dtype': x.dtype}
    dense = functools.partial(snn.Dense, param_dtype=x.dtype)
    for features in (5, 4):
      x = dense(features)(x)
      x = snn.SpikingNeuron(
        self.method, surrogate=self.surrogate, width=self.width, **shared
      )(x)
    return dense(3)(x)


@pytest.fixture(scope='session')
def network():
  """`loss(spike, params, width)` in evaluation mode, and parameters."""
  with jax.enable_x64(True):
    x = 2 * jax.random.normal(KEY, (2, 32, 3))
    labels = jnp.arange(32) % 3
    net = Net(surrogate.arctan)
    variables = jax.jit(net.init)(KEY, x)
    for _ in range(5):
      _, updates = net.apply(variables, x, True, mutable=['batch_stats'])
      variables = variables | updates

  def loss(spike, params, width=1.0):
    logits = Net(spike, width).apply({**variables, 'params': params}, x)
    return losses.cross_entropy(logits, labels).mean()

  return loss, variables['params']


@pytest.mark.sample
@pytest.mark.parametrize(
  'name', ['arctan', pytest.param('rectangular', marks=pytest.mark.sample)]
)
@float64
def test_the_twins_gradient_is_exact(network, name):
  loss, params = network
  twin = functools.partial(loss, bias.smooth(SPIKES[name]))
  reference = bias.differences(
    twin, params, key=KEY, step=1e-6, num_directions=4
  )
  compared = bias.compare(jax.grad(twin)(params), reference)
  assert len(compared) == 8
  for layer in compared.values():
    np.testing.assert_allclose(layer[:2], (1, 1), rtol=1e-4)


@float64
def test_the_twin_has_a_hessian_in_forward_mode(network):
  loss, params = network
  flat, unravel = ravel_pytree(params)
  twin = bias.smooth(surrogate.sigmoid)

  def of_flat(flat):
    return loss(twin, unravel(flat))

  hessian = jax.jit(jax.hessian(of_flat))(flat)
  chex.assert_trees_all_close(hessian, hessian.T, atol=1e-12)
  vector = jnp.ones_like(flat)
  step = 1e-5 * vector
  gradient = jax.jit(jax.grad(of_flat))
  expected = (gradient(flat + step) - gradient(flat - step)) / 2e-5
  chex.assert_trees_all_close(hessian @ vector, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.sample
@float64
def test_bias_of_a_spiking_network(network):
  """After the last spikes there is none; before them there is."""
  loss, params = network
  spiking = functools.partial(loss, surrogate.arctan)
  gradient = jax.jit(jax.grad(spiking))(params)
  references = {
    'differences': bias.differences(
      spiking, params, key=KEY, step=0.05, num_directions=200
    ),
    'evolution': bias.evolution(
      spiking, params, key=KEY, sigma=0.05, num_pairs=8192, batch_size=256
    ),
  }
  for name, reference in references.items():
    compared = bias.compare(gradient, reference, depth=1)
    assert list(compared) == [
      'Dense_0', 'Dense_1', 'Dense_2', 'SpikingNeuron_0', 'SpikingNeuron_1',
    ]  # fmt: skip
    after = compared['Dense_2']
    rtol = {'differences': 0.02, 'evolution': 0.1}[name]
    np.testing.assert_allclose(after[:2], (1, 1), rtol=rtol)
    assert abs(after.cosine - 1) < 4 * after.cosine_error + 1e-3
    for layer in ('Dense_0', 'Dense_1'):
      assert 0.1 < compared[layer].cosine < 0.95
      assert 0.1 < compared[layer].ratio < 3


@pytest.mark.sample
@float64
def test_sweep_over_the_width(network):
  loss, params = network

  @functools.partial(chex.assert_max_traces, n=1)
  def counted(params, width):
    return loss(surrogate.arctan, params, width)

  twin = jax.jit(
    jax.grad(functools.partial(loss, bias.smooth(surrogate.arctan)))
  )
  widths = [0.5, 1.0, 2.0]
  swept = bias.sweep(
    counted, params, widths, lambda width: twin(params, width), depth=1
  )
  assert swept['Dense_0'].cosine.shape == (3,)
  chex.clear_trace_counter()
  gradient = jax.grad(functools.partial(loss, surrogate.arctan))
  alone = bias.compare(gradient(params, 2.0), twin(params, 2.0), depth=1)
  for name, value in alone.items():
    chex.assert_trees_all_close(
      jax.tree.map(lambda a: a[2], swept[name]), value, rtol=1e-9
    )
  # A reference without a width stays what it is.
  fixed = bias.sweep(counted, params, widths, twin(params, 2.0), depth=0)
  assert list(fixed) == ['']
  assert fixed[''].ratio[0] != fixed[''].ratio[1]


# The references, where the answer is known.


@float64
def test_differences_of_a_quadratic_are_exact():
  random = np.random.default_rng(0)
  root = random.normal(size=(5, 5))

  def loss(params):
    flat, _ = ravel_pytree(params)
    return jnp.sum((root @ flat) ** 2)

  params = {'a': jnp.asarray(random.normal(size=3)), 'b': jnp.ones(2)}
  reference = bias.differences(loss, params, key=KEY, step=0.3)
  gradient = jax.grad(loss)(params)
  assert reference.slopes['a'].shape == (64,)
  for depth in (None, 0, 1):
    for layer in bias.compare(gradient, reference, depth=depth).values():
      np.testing.assert_allclose(layer, (1, 1, 0, 0), rtol=1e-9, atol=1e-9)
  turned = {'a': -2 * gradient['a'], 'b': gradient['b']}
  compared = bias.compare(turned, reference)
  np.testing.assert_allclose(compared['a'][:2], (-1, 2), rtol=1e-9)
  np.testing.assert_allclose(compared['b'][:2], (1, 1), rtol=1e-9)


@float64
def test_evolution_of_a_step_is_its_smoothed_slope():
  edge, sigma = jnp.array([0.0, 0.1, -0.2]), 0.3

  def loss(params):
    return jnp.sum(jnp.array([1, 2, -1]) * (params >= edge))

  params = jnp.array([0.2, 0.1, 0.1])
  found = bias.evolution(
    loss, params, key=KEY, sigma=sigma, num_pairs=16_000, batch_size=1000
  )
  expected = np.array([1, 2, -1]) * stats.norm.pdf(params - edge, scale=sigma)
  np.testing.assert_allclose(found.gradient, expected, atol=0.15)
  assert found.parts.shape == (8, 3)
  chex.assert_trees_all_close(found.gradient, found.parts.mean(0))
  compared = bias.compare(jnp.asarray(expected), found)['']
  np.testing.assert_allclose(compared[:2], (1, 1), rtol=0.05)
  assert 0 < compared.cosine_error < 0.05 and 0 < compared.ratio_error < 0.05


def test_the_noise_of_evolution_is_not_in_its_norm():
  """With as many pairs as parameters half of the estimate is noise."""
  slope = jax.random.normal(KEY, (400,))
  compared = []
  for seed in range(20):
    found = bias.evolution(
      lambda params: jnp.vdot(slope, params),
      jnp.zeros(400),
      key=jax.random.key(seed),
      num_pairs=400,
      sigma=1.0,
      batch_size=10,
    )
    assert jnp.linalg.norm(found.gradient) > 1.2 * jnp.linalg.norm(slope)
    compared.append(bias.compare(slope, found)[''])
  values, errors = np.array(compared)[:, :2], np.array(compared)[:, 2:]
  np.testing.assert_allclose(values.mean(0), 1, atol=0.05)
  # The jackknife tells how far they scatter.
  spread = np.sqrt(np.mean((values - 1) ** 2, 0))
  np.testing.assert_allclose(errors.mean(0), spread, rtol=0.5)


def test_compares_gradients_by_layer():
  ours = {'x': {'a': jnp.array([3.0, 0.0]), 'b': jnp.array([4.0])}}
  theirs = {'x': {'a': jnp.array([0.0, 1.0]), 'b': jnp.array([2.0])}}
  compared = bias.compare(ours, theirs)
  assert list(compared) == ['x/a', 'x/b']
  np.testing.assert_allclose(compared['x/a'], (0, 3, 0, 0))
  np.testing.assert_allclose(compared['x/b'], (1, 2, 0, 0))
  whole = bias.compare(ours, theirs, depth=1)['x']
  np.testing.assert_allclose(whole[:2], (8 / 5 / 5**0.5, 5**0.5), rtol=1e-6)


def test_bfloat16_parameters_stay_so():
  params = {'w': jnp.ones(3, 'bfloat16')}

  def loss(params):
    assert params['w'].dtype == 'bfloat16'
    return jnp.sum(jnp.float32(params['w']))

  found = bias.differences(loss, params, key=KEY, step=0.5)
  compared = bias.compare(jax.grad(loss)(params), found)['w']
  np.testing.assert_allclose(compared[:2], (1, 1), rtol=0.02)
  found = bias.evolution(loss, params, key=KEY, sigma=0.5, num_pairs=64)
  assert found.gradient['w'].dtype == 'float32'


def test_errors():
  def loss(params):
    return jnp.sum(params)

  raises = functools.partial(pytest.raises, ValueError)
  with raises(match='step > 0, got step=0'):
    bias.differences(loss, jnp.ones(2), key=KEY, step=0)
  with raises(match='num_directions > 0'):
    bias.differences(loss, jnp.ones(2), key=KEY, num_directions=0)
  with raises(match='sigma > 0, got sigma=-1'):
    bias.evolution(loss, jnp.ones(2), key=KEY, sigma=-1)
  with raises(match=r'multiple of 8 \* batch_size, got num_pairs=6'):
    bias.evolution(loss, jnp.ones(2), key=KEY, num_pairs=6, batch_size=2)
