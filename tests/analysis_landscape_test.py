"""Directions, and the losses along them: chunked, resumed, sharded."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType
from jax.tree_util import Partial

from dsatgo_jax import linen as snn
from dsatgo_jax import losses
from dsatgo_jax.analysis import curvature, landscape

float64 = jax.enable_x64(True)
KEY = jax.random.key(0)


class Net(nn.Module):
  """A convolution with tdBN and neurons, a decay for each channel."""

  @nn.compact
  def __call__(self, x, train: bool):
    """Images [B, H, W, C] to logits [T, B, K]."""
    shared = {'use_running_average': not train, 'param_dtype': x.dtype}
    x = snn.repeat_in_time(x, num_steps=2)
    x = snn.Conv(5, (3, 3), use_bias=False, param_dtype=x.dtype)(x)
    x = snn.TdBatchNorm(**shared)(x)
    x = snn.SpikingNeuron(decay=(0.2,) * 5, **shared)(x)
    return snn.Dense(3, param_dtype=x.dtype)(x.mean((2, 3)))


@pytest.fixture(scope='session')
def network():
  """Variables after a training step, and the two losses of `landscape`."""
  with jax.enable_x64(True):
    x = jax.random.normal(KEY, (6, 4, 4, 2))
    labels = jnp.arange(6) % 3
    net = Net()
    variables = jax.jit(net.init, static_argnums=2)(KEY, x, False)
    _, updates = net.apply(variables, x, True, mutable=['batch_stats'])
    variables = variables | updates

    def frozen(params):
      logits = net.apply({**variables, 'params': params}, x, False)
      return losses.cross_entropy(logits, labels).mean()

    def measured(params):
      logits, _ = net.apply(
        {**variables, 'params': params}, x, True, mutable=['batch_stats']
      )
      return losses.cross_entropy(logits, labels).mean()

  return variables, {'frozen': frozen, 'measured': measured}


def last(iterator):
  *_, grid = iterator
  return grid


# Directions.


@float64
def test_filter_normalised_directions(network):
  params = network[0]['params']
  directions = landscape.random_directions(params, key=KEY, num=2)
  chex.assert_trees_all_equal_structs(directions, params)
  for name, axes in (('Conv_0', (0, 1, 2)), ('Dense_0', (0,))):
    kernel, moved = params[name]['kernel'], directions[name]['kernel']
    for direction in moved:
      norms = np.sqrt(np.sum(direction**2, axes))
      np.testing.assert_allclose(norms, np.sqrt(np.sum(kernel**2, axes)))
      assert norms.shape == kernel.shape[-1:]
    assert abs(np.corrcoef(moved[0].ravel(), moved[1].ravel())[0, 1]) < 0.5
  for path, leaf in jax.tree_util.tree_leaves_with_path(directions):
    assert leaf.shape[0] == 2
    assert leaf.any() == ('kernel' in jax.tree_util.keystr(path))
  first = landscape.random_directions(params, key=KEY, num=1)
  chex.assert_trees_all_equal(first, jax.tree.map(lambda a: a[:1], directions))
  whole = landscape.random_directions(params, key=KEY, num=1, vectors='norm')
  for name in ('scale', 'bias'):
    norm = np.linalg.norm(params['TdBatchNorm_0'][name])
    moved = whole['TdBatchNorm_0'][name][0]
    np.testing.assert_allclose(np.linalg.norm(moved), norm, rtol=1e-6)
  assert whole['SpikingNeuron_0']['w'].any()


@float64
def test_between_checkpoints_with_their_statistics(network):
  variables, losses_of = network
  other = jax.tree.map(lambda a: 1.1 * a + 0.1, variables)

  def loss(variables):
    x = jax.random.normal(KEY, (6, 4, 4, 2))
    logits = Net().apply(variables, x, False)
    return losses.cross_entropy(logits, jnp.arange(6) % 3).mean()

  directions = landscape.between(variables, other)
  grid = last(
    landscape.sweep(loss, variables, directions, [0, 0.5, 1], chunk=3)
  )
  assert grid.done.all()
  frozen = losses_of['frozen'](variables['params'])
  expected = [
    frozen,
    loss(jax.tree.map(lambda a, b: (a + b) / 2, variables, other)),
    loss(other),
  ]
  np.testing.assert_allclose(grid.losses, expected, rtol=1e-9)


def test_along_leading_eigenvectors():
  params = {'w': jnp.array([1.0, -2.0])}

  def loss(params):
    return jnp.sum(jnp.array([3.0, 1.0]) * params['w'] ** 2)

  top = curvature.eigenpairs(curvature.hvp(loss, params), params, key=KEY)
  grid = last(landscape.sweep(loss, params, top.vectors, [-0.1, 0.0, 0.1]))
  second = (grid.losses[0] - 2 * grid.losses[1] + grid.losses[2]) / 0.01
  np.testing.assert_allclose(second, top.values[0], rtol=1e-2)


# The grid.


@pytest.mark.parametrize('policy', ['frozen', 'measured'])
@float64
def test_chunks_resumed_and_sharded(network, policy, tmp_path):
  variables, losses_of = network
  loss, params = losses_of[policy], variables['params']
  directions = landscape.random_directions(params, key=KEY)
  axes = np.linspace(-1, 1, 3), np.linspace(0, 1, 5)
  once = jax.jit(loss)

  def at(a, b):
    return once(
      jax.tree.map(lambda p, d: p + a * d[0] + b * d[1], params, directions)
    )

  expected = np.array([[at(a, b) for b in axes[1]] for a in axes[0]])
  assert np.ptp(expected) > 0.1

  # Two chunks of four, saved, gone on with.
  sweep = functools.partial(landscape.sweep, loss, params, directions, chunk=4)
  iterator = sweep(*axes)
  assert next(iterator).done.sum() == 4
  half = next(iterator)
  assert half.done.ravel().tolist() == [True] * 8 + [False] * 7
  assert not half.losses[~half.done].any()
  path = tmp_path / 'landscape.npz'
  np.savez(path, *half.axes, half.losses, half.done)
  with np.load(path) as file:
    *saved, values, done = file.values()
  rest = list(sweep(landscape.Grid(tuple(saved), values, done)))
  assert [grid.done.sum() for grid in rest] == [12, 15]
  np.testing.assert_allclose(rest[-1].losses, expected, rtol=1e-9)
  np.testing.assert_array_equal(
    rest[0].losses[half.done], half.losses[half.done]
  )
  assert half.done.sum() == 8  # What was given stays as it was.
  (again,) = sweep(rest[-1])
  chex.assert_trees_all_equal(again, rest[-1])

  mesh = jax.make_mesh((2, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
  for settings in ({'mesh': mesh}, {'batch_size': 3}):
    grids = list(sweep(*axes, **settings))
    assert len(grids) == {'mesh': 4, 'batch_size': 3}[next(iter(settings))]
    np.testing.assert_allclose(grids[-1].losses, expected, rtol=1e-9)


def test_compiles_once():
  params = {'w': jnp.ones(3)}
  directions = {'w': jnp.eye(3)[:1]}

  @functools.partial(chex.assert_max_traces, n=1)
  def loss(batch, params):
    return jnp.sum(batch * params['w'])

  for scale in (1.0, 2.0):
    grid = last(
      landscape.sweep(
        Partial(loss, scale * jnp.ones(3)), params, directions,
        np.arange(7), chunk=3,
      )
    )  # fmt: skip
    np.testing.assert_allclose(grid.losses, scale * (3 + np.arange(7)))


def test_bfloat16_parameters_stay_so():
  params = {'w': jnp.ones(3, 'bfloat16')}

  def loss(params):
    assert params['w'].dtype == 'bfloat16'
    return jnp.sum(params['w'])

  directions = {'w': jnp.ones((1, 3), 'bfloat16')}
  grid = last(landscape.sweep(loss, params, directions, [0, 1]))
  np.testing.assert_allclose(grid.losses, [3, 6])


def test_errors():
  params = {'w': jnp.ones((2, 3))}

  def loss(params):
    return jnp.sum(params['w'])

  good = {'w': jnp.ones((1, 2, 3))}
  raises = functools.partial(pytest.raises, ValueError)
  with raises(match='num >= 1, got num=0'):
    landscape.random_directions(params, key=KEY, num=0)
  with raises(match="'zero' or 'norm', got vectors='all'"):
    landscape.random_directions(params, key=KEY, vectors='all')
  with raises(match='at least one other checkpoint'):
    landscape.between(params)
  with raises(match=r"checkpoint of shape \(2, 3\) at \['w'\], got .* \(2,\)"):
    landscape.between(params, {'w': jnp.ones(2)})
  with raises(match=r'directions of the structure of params'):
    landscape.sweep(loss, params, {'v': jnp.ones((1, 2, 3))}, [0])
  with raises(match=r"of shape \(2, 2, 3\) at \['w'\], got shape \(1, 2, 3\)"):
    landscape.sweep(loss, params, good, [0], [0])
  with raises(match=r'coordinates \[n\] for each direction, got .*\(1, 1\)'):
    landscape.sweep(loss, params, good, [[0]])
  with raises(match='coordinates'):
    landscape.start()
  with raises(match='chunk >= 1, got chunk=0'):
    landscape.sweep(loss, params, good, [0], chunk=0)
  with raises(match=r'done of shape \(2,\), as the axes, got shapes \(3,\)'):
    saved = landscape.Grid(([0, 1],), np.zeros(3), np.zeros(3, bool))
    landscape.sweep(loss, params, good, saved)
  with raises(match=r'scalar, got shape \(2, 3\)'):
    next(landscape.sweep(lambda params: params['w'], params, good, [0]))
