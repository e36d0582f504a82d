"""Membrane statistics: right where it is hard, and pooled over devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dsatgo_jax import neurons, statistics

measure = jax.jit(statistics.measure)


def expected(u):
  """Of the very numbers, in float64."""
  u = np.asarray(u, np.float64)
  return np.mean(u), np.std(u, ddof=1)


def noise(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('shape', [(2,), (3, 5), (4, 8, 8, 16), (2**20,)])
def test_equals_numpy_with_ddof_1(shape):
  u = 3 * noise(*shape) - 1
  np.testing.assert_allclose(measure(u), expected(u), rtol=1e-5)
  with jax.enable_x64(True):
    u = np.asarray(u, np.float64)
    np.testing.assert_allclose(measure(u), expected(u), rtol=1e-12)


@pytest.mark.parametrize('mean', [3e3, -3e3])
@pytest.mark.parametrize('std', [1.0, 1e-2])
def test_mean_far_from_zero(mean, std):
  u = np.float32(mean) + np.float32(std) * noise(64, 1000)
  measured = measure(u)
  np.testing.assert_allclose(measured.mean, expected(u)[0], rtol=2e-7)
  np.testing.assert_allclose(measured.std, expected(u)[1], rtol=1e-4)


@pytest.mark.parametrize('shape', [(4096,), (4, 8, 8, 16)])
@pytest.mark.parametrize('where', [0, 1, 2048, 4095])
@pytest.mark.parametrize('outlier', [1e6, -1e12])
def test_one_huge_outlier(shape, where, outlier):
  u = noise(*shape)
  u.flat[where] = outlier
  np.testing.assert_allclose(measure(u), expected(u), rtol=1e-3)


@pytest.mark.parametrize(
  'u',
  [
    3e3 + noise(4, 8, 8, 16),
    1e-30 * (1 + noise(4, 64)),
    1e20 * noise(4, 64),
    np.full((3, 5), 0.7, np.float32),
    np.zeros((4, 8, 8, 16), np.float32),
  ],
  ids=['far from zero', 'tiny', 'huge', 'constant', 'zero'],
)
def test_what_other_platforms_compute(u, monkeypatch):
  """The branches that are not the CPU's, run on the CPU."""

  def default(*arguments, default, **others):
    del others
    return default(*arguments)

  monkeypatch.setattr(jax.lax, 'platform_dependent', default)
  scale = np.abs(u).max()
  measured = statistics.measure(jnp.asarray(u, jnp.float32))
  np.testing.assert_allclose(measured.mean, expected(u)[0], 1e-6, 1e-7 * scale)
  np.testing.assert_allclose(measured.std, expected(u)[1], 1e-4, 1e-45)
  mean, squares = statistics.moments(jnp.asarray(u / (scale or 1)), per=1)
  u = np.asarray(u, np.float64).reshape(-1, u.shape[-1]) / (scale or 1)
  np.testing.assert_allclose(mean, u.mean(0), 1e-6, 1e-7)
  np.testing.assert_allclose(squares, u.var(0) * len(u), 1e-4, 1e-12)


@settings(max_examples=50, deadline=None)
@given(
  value=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False),
  shape=st.sampled_from([(2,), (3, 7), (130,), (10, 13, 17)]),
)
def test_constant_membrane_is_its_own_mean(value, shape):
  mean, std = measure(jnp.full(shape, value, jnp.float32))
  assert (mean, std) == (value, 0)


@pytest.mark.parametrize('bad', [np.inf, -np.inf, np.nan])
def test_an_undefined_entry_makes_the_statistics_undefined(bad):
  u = noise(10, 10)
  u[3, 3] = bad
  mean, std = measure(u)
  assert np.isnan(std) and np.isnan(mean + std)


def test_one_neuron_in_all_has_no_deviation():
  with pytest.raises(ValueError, match=r'at least two.*\(1, 1\).* 1 device'):
    statistics.measure(jnp.ones((1, 1)))
  four = jax.vmap(
    functools.partial(statistics.measure, axis_name='i'), axis_name='i'
  )
  np.testing.assert_allclose(
    four(jnp.arange(4.0)[:, None, None]).std[0], np.sqrt(5 / 3), rtol=1e-6
  )


def test_has_no_gradient():
  gradient = jax.grad(lambda u: sum(statistics.measure(u)))(noise(6, 5))
  chex.assert_trees_all_equal(gradient, jnp.zeros((6, 5)))


# From f(part of the batch), which pools over 'batch', to f of [4, ...].
OVER_DEVICES = {
  'vmap': lambda f: jax.vmap(f, axis_name='batch'),
  'pmap': lambda f: jax.pmap(f, axis_name='batch'),
  'shard_map': lambda f: jax.jit(
    jax.shard_map(
      f,
      mesh=jax.make_mesh((4,), ('batch',), axis_types=(AxisType.Auto,)),
      in_specs=P('batch'),
      out_specs=P(),
    )
  ),
}


@pytest.mark.sample
@pytest.mark.parametrize(
  'over_devices', OVER_DEVICES.values(), ids=OVER_DEVICES
)
def test_devices_pool_to_the_whole_batch(over_devices):
  pooled = over_devices(
    functools.partial(statistics.measure, axis_name='batch')
  )
  u = noise(4, 8, 32, 32)
  far = np.float32(3000) + u
  apart = u + np.float32([-5000, 0, 3, 7000])[:, None, None, None]
  for values, rtol in ((u, 1e-5), (far, 1e-4), (apart, 1e-5)):
    np.testing.assert_allclose(
      pooled(values).mean, expected(values)[0], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
      pooled(values).std, expected(values)[1], rtol=rtol
    )
  with jax.enable_x64(True):
    u = apart.astype(np.float64)
    np.testing.assert_allclose(pooled(u).mean, expected(u)[0], rtol=1e-12)
    np.testing.assert_allclose(pooled(u).std, expected(u)[1], rtol=1e-12)


@pytest.mark.parametrize(
  'over_devices', OVER_DEVICES.values(), ids=OVER_DEVICES
)
def test_constant_membrane_over_devices(over_devices):
  pooled = over_devices(
    functools.partial(statistics.measure, axis_name='batch')
  )
  measured = pooled(np.full((4, 3, 7), 0.1, np.float32))
  np.testing.assert_array_equal(measured.mean, np.float32(0.1))
  np.testing.assert_array_equal(measured.std, 0)


def test_several_axes():
  pool = functools.partial(statistics.measure, axis_name=('a', 'b'))
  u = noise(2, 3, 5)
  pooled = jax.vmap(jax.vmap(pool, axis_name='b'), axis_name='a')(u)
  np.testing.assert_allclose(
    pooled.std, np.full((2, 3), expected(u)[1]), rtol=1e-5
  )


def test_running_average():
  old, new = jnp.array([1.0, 2.0]), jnp.array([3.0, -2.0])
  average = statistics.running_average(old, new, 0.9)
  np.testing.assert_allclose(average, [1.2, 1.6], rtol=1e-6)
  double = statistics.running_average(old.astype(jnp.bfloat16), new, 0.5)
  chex.assert_trees_all_equal(double, jnp.array([2, 0], jnp.bfloat16))
  gradient = jax.grad(lambda a: statistics.running_average(a, a, 0.9))(1.0)
  assert gradient == 0


# What a layer does with such membranes.


@pytest.mark.parametrize('value', [0.0, 0.1, -3.0, 3000.1])
@pytest.mark.parametrize('method', ['at', 'ds_atgo'])
def test_a_constant_membrane_fires_everywhere(value, method):
  """Theta equals it, and equality fires; zero input is such a membrane."""
  x = jnp.full((3, 4, 5), value)
  parameters = neurons.Parameters(decay=0.0)
  spikes, _, record = neurons.run(x, parameters, method, record=True)
  np.testing.assert_array_equal(record.theta, np.float32(value))
  np.testing.assert_array_equal(spikes, 1)
  np.testing.assert_array_equal(record.firing_rate, 1)
  np.testing.assert_array_equal(record.statistics.std, 0)


@pytest.mark.parametrize('value', [0.0, 0.1, -3.0])
@pytest.mark.parametrize('f_c', [0.9, 1.1])
def test_a_constant_membrane_with_another_f_c(value, f_c):
  """All fire or none: theta is `f_c` times the constant."""
  spikes, _, record = neurons.run(
    jnp.full((1, 4, 5), value), neurons.Parameters(f_c=f_c)
  )
  assert record.theta[0] == pytest.approx(f_c * value)
  np.testing.assert_array_equal(spikes, value >= np.float32(f_c * value))


def test_zero_input_against_a_fixed_threshold_stays_silent():
  spikes, state, record = neurons.run(jnp.zeros((3, 4, 5)), method='tgo')
  assert not spikes.any() and not state.v.any()
  np.testing.assert_allclose(record.width, 1 - np.tanh(1), rtol=1e-6)


def test_mean_3000_deviation_1_fires_as_theorem_1_says():
  x = 3000 + noise(1, 100_000)[:, :, None]
  spikes, _, record = neurons.run(x)
  np.testing.assert_allclose(record.theta, 3001, atol=0.02)
  assert spikes.mean() == pytest.approx(0.1587, abs=0.003)


# What is not finite.


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('num_steps', [3, 6, 16])
@pytest.mark.parametrize('bad', [np.inf, -np.inf, np.nan])
def test_an_undefined_input_shows(bad, num_steps, fused):
  """In training the layer's spikes are NaN, in inference the neuron's."""
  x = noise(num_steps, 10, 10)
  x[-2, 2, 3] = bad
  run = jax.jit(functools.partial(neurons.run, fused=fused))
  spikes, _, record = run(x)
  np.testing.assert_array_equal(
    np.isnan(record.theta), np.arange(num_steps) >= num_steps - 2
  )
  assert np.isnan(spikes[-2:]).all()
  assert set(np.unique(spikes[:-2])) == {0, 1}
  spikes, _, _ = run(x, running=neurons.Running(jnp.ones(num_steps)))
  assert np.isnan(spikes[-2:, 2, 3]).all()
  assert np.isnan(spikes).sum() in (2, num_steps)


@pytest.mark.parametrize('bad', [np.inf, np.nan])
def test_a_running_average_takes_no_undefined_value(bad):
  average = statistics.running_average(
    jnp.array([1.0, 2.0]), jnp.array([bad, -2.0]), 0.5
  )
  np.testing.assert_array_equal(average, [1, 0])


# Deviations whose squares are out of float32's range.

sizes = pytest.mark.parametrize('size', [1e-34, 1e-30, 1e-19, 1e18, 1e21])


@sizes
@pytest.mark.parametrize('shape', [(20, 30), (4, 8, 8, 16)])
def test_very_small_and_very_large_deviations(size, shape):
  u = np.float32(size) * (noise(*shape) + 0.5)
  np.testing.assert_allclose(measure(u), expected(u), rtol=1e-5)


@sizes
@pytest.mark.parametrize(
  'over_devices', OVER_DEVICES.values(), ids=OVER_DEVICES
)
def test_very_small_and_very_large_deviations_over_devices(size, over_devices):
  pooled = over_devices(
    functools.partial(statistics.measure, axis_name='batch')
  )
  u = np.float32(size) * (
    noise(4, 5, 6) + np.float32([-3, 0, 1, 2])[:, None, None]
  )
  np.testing.assert_allclose(pooled(u).std, expected(u)[1], rtol=1e-5)


def test_the_rate_does_not_depend_on_the_membranes_size():
  """Also in the silence behind a recording, of membranes that fade away."""
  x = noise(4, 8, 320)
  rates = [
    neurons.run(jnp.asarray(x * np.float32(size)), record=True)[2].firing_rate
    for size in (1, 1e-10, 1e-25, 1e15)
  ]
  for rate in rates:
    np.testing.assert_allclose(rate, rates[0], atol=2e-3)
  silence = np.concatenate([x, np.zeros((35, 8, 320), np.float32)])
  *_, single = neurons.run(jnp.asarray(silence), record=True)
  with jax.enable_x64(True):
    *_, double = neurons.run(jnp.asarray(silence, np.float64), record=True)
  faint = np.asarray(double.statistics.std) < 1e-10
  assert faint.sum() > 20
  np.testing.assert_array_equal(
    single.firing_rate[faint], double.firing_rate[faint]
  )


# What is not real.


@pytest.mark.parametrize('padding', [0.0, np.nan, 1e6])
def test_a_mask_leaves_examples_out(padding):
  u = 3 * noise(6, 5, 7) - 1
  mask = np.array([False, True, True, False, True, False])
  padded = np.where(mask[:, None, None], u, np.float32(padding))
  measured = jax.jit(statistics.measure)(padded, mask=jnp.asarray(mask))
  np.testing.assert_allclose(measured, expected(u[mask]), rtol=1e-5)


@pytest.mark.parametrize(
  'over_devices', OVER_DEVICES.values(), ids=OVER_DEVICES
)
def test_a_mask_over_devices(over_devices):
  """Each with its own number of real examples, one of them with none."""
  u = noise(4, 3, 5) + np.float32([-5, 0, 3, 7])[:, None, None]
  mask = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 1]], bool)
  pooled = over_devices(lambda u, mask: statistics.measure(u, 'batch', mask))

  def call(u, mask):
    return jax.tree.map(lambda a: np.ravel(a)[0], pooled(u, mask))

  if over_devices is OVER_DEVICES['shard_map']:
    u, mask = u.reshape(12, 5), mask.reshape(12)
  for a, b in zip(call(u, mask), expected(u[mask]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize('num_real, std', [(0, 0), (1, 0)])
def test_nothing_real_has_finite_statistics(num_real, std):
  u = noise(3, 1)
  mean, found = statistics.measure(u, mask=jnp.arange(3) < num_real)
  assert np.isfinite(mean) and found == std
