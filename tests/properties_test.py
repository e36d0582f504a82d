"""What holds for any input, and for every public function."""

import functools

import chex
import hypothesis.extra.numpy as npst
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatgo_jax import (
  carry,
  devices,
  dtypes,
  dynamics,
  layers,
  linen,
  losses,
  methods,
  neurons,
  packing,
  quantile,
  recurrent,
  statistics,
  surrogate,
  tdbn,
  threshold,
  time_axis,
  width,
)
from dsatgo_jax import nnx as snnx
from dsatgo_jax.neurons import Parameters

few = settings(max_examples=20, deadline=None)
shapes = st.sampled_from(
  [(1, 2000), (3, 2, 1000), (2, 20, 10, 10, 2), (7, 999, 3)]
)
seeds = st.integers(0, 2**31 - 1)


@functools.partial(jax.jit, static_argnames=('method', 'fused'))
def run(x, parameters=Parameters(), method='ds_atgo', fused=True):  # noqa: B008
  return neurons.run(x, parameters, method, record=True, fused=fused)


def normal(shape, seed):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# The threshold and the firing rate.


@few
@given(
  shape=shapes,
  seed=seeds,
  log_scale=st.floats(-6, 6),
  shift=st.floats(-300, 300),
  method=st.sampled_from(['at', 'ds_atgo']),
)
def test_theorem_1_for_any_normal_input(shape, seed, log_scale, shift, method):
  """Shift counts in deviations; without a leak each membrane is normal."""
  scale = np.float32(10**log_scale)
  x = scale * (normal(shape, seed) + np.float32(shift))
  spikes, _, record = run(x, Parameters(decay=0.0), method)
  count = x[0].size
  theta = scale * (shift + 1)
  sampling = 5 / np.sqrt(count)
  np.testing.assert_allclose(
    record.theta, theta, 0, atol=1.3 * sampling * scale
  )
  rate = spikes.reshape(shape[0], -1).mean(1)
  np.testing.assert_allclose(rate, 0.1587, atol=0.37 * sampling)
  np.testing.assert_allclose(record.firing_rate, rate, rtol=1e-5)


@pytest.mark.sample
@few
@given(shape=shapes, seed=seeds, power=st.integers(-90, 60))
@pytest.mark.parametrize('method', ['at', 'ds_atgo'])
def test_scaled_input_scales_the_threshold_and_fires_the_same(
  method, shape, seed, power
):
  """Exactly, for a power of two; to rounding where squares are out of range."""
  x, scale = normal(shape, seed), np.float32(2.0**power)
  spikes, state, record = run(x, method=method)
  scaled = run(scale * x, method=method)
  exact = -20 <= power <= 50
  theta = scale * record.theta
  np.testing.assert_allclose(scaled[2].theta, theta, 0 if exact else 1e-5)
  same = (scaled[0] == spikes).all(0)
  assert same.all() if exact else same.mean() > 0.999
  np.testing.assert_array_equal(
    np.where(same, scaled[1].v, 0), np.where(same, scale * state.v, 0)
  )


@few
@given(
  shape=shapes, seed=seeds, shift=st.floats(-100, 100), f_c=st.floats(0.3, 3)
)
def test_shifted_input_shifts_the_threshold(shape, seed, shift, f_c):
  x, parameters = normal(shape, seed), Parameters(decay=0.0, f_c=f_c)
  theta = run(x, parameters)[2].theta
  shifted = run(x + np.float32(shift), parameters)[2].theta
  np.testing.assert_allclose(shifted, theta + f_c * shift, rtol=1e-4, atol=1e-4)


@few
@given(shape=shapes, seed=seeds, f_c=st.floats(0.3, 3), more=st.floats(1.01, 2))
def test_a_larger_f_c_fires_less(shape, seed, f_c, more):
  x = normal(shape, seed)
  first, second = (
    run(x, Parameters(f_c=f))[2].firing_rate[0] for f in (f_c, more * f_c)
  )
  assert second <= first


@few
@given(
  shape=shapes, seed=seeds, scale=st.floats(0.01, 9), shift=st.floats(-40, 9)
)
def test_the_width_grows_with_the_threshold_and_keeps_its_bounds(
  shape, seed, scale, shift
):
  x = np.float32(scale) * normal(shape, seed) + np.float32(shift)
  _, _, record = run(x, Parameters(width=1.5))
  order = np.argsort(record.theta)
  widths = np.asarray(record.width)
  assert (np.diff(widths[order]) >= -1e-5).all()
  assert (widths > 0).all() and (widths <= 3).all()
  np.testing.assert_array_equal(record.theta > 1, widths > 1.5)


# Gradients.


@pytest.mark.parametrize(
  'method, spike',
  [
    *((method, surrogate.rectangular) for method in list(methods.METHODS)[:6]),
    ('ds_atgo', surrogate.triangular),
    ('ds_atgo', surrogate.sigmoid),
    ('ds_atgo', surrogate.arctan),
    ('ds_atgo', surrogate.fast_sigmoid),
  ],
)
@settings(max_examples=15, deadline=None)
@given(
  x=npst.arrays(
    np.float32,
    (3, 2, 3),
    elements=st.floats(-1024, 1024, width=32, allow_subnormal=False),
  ),
  v_th=st.floats(2.0**-20, 2.0**20, width=32),
  kappa=st.floats(1, 2.0**20, width=32),
  decay=st.floats(0, 1, width=32, allow_subnormal=False),
)
def test_gradients_are_finite(method, spike, x, v_th, kappa, decay):
  """Also where theta is far below v_th, and the width next to nothing."""
  parameters = Parameters(decay, v_th, 1.0, kappa, jnp.ones(3))
  for leaf in jax.tree.leaves(gradient(x, parameters, method, spike)):
    assert np.isfinite(leaf).all()


@functools.partial(jax.jit, static_argnums=(2, 3))
@functools.partial(jax.grad, argnums=(0, 1))
def gradient(x, parameters, method, spike):
  spikes, state, _ = neurons.run(x, parameters, method, surrogate=spike)
  return spikes.sum() + state.v.sum()


# Every public function under jit, vmap and grad, in float32 and bfloat16: each
# as a function of one array [3, 4, 5].


def of_rule(rule):
  """A threshold or width rule, of measured statistics and learnt numbers."""

  def function(x):
    measured = statistics.measure(x)
    parameters = Parameters(*x[0, 0, :4], tdbn_scale=x[0, 0])
    follows = rule in (
      width.fixed, width.threshold_driven, width.isometric, width.mpd_agl,
      threshold.quantile,
    )  # fmt: skip
    return rule(measured.std if follows else measured, parameters, 1)

  return function


def of_linen(module, **arguments):
  def function(x):
    variables = module.init(jax.random.key(0), x, **arguments)
    return module.apply(variables, x, **arguments, mutable=['batch_stats'])

  return function


def of_nnx(make):
  def function(x):
    module = make()
    return module(x), nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

  return function


def of_devices(function):
  """A function that pools, as one of x's first axis."""
  pooled = functools.partial(function, axis_name='device')
  return lambda x: jax.vmap(pooled, axis_name='device')(x)


def of_layer(x):
  method = methods.get('ds_atgo')
  running = neurons.Running(jnp.ones(3))
  return layers.layer(
    x, Parameters(), method, running, num_steps=3, state=None, whole=True,
    use_running_average=False, momentum=0.9,
  )  # fmt: skip


SPIKES = ('rectangular', 'triangular', 'sigmoid', 'arctan', 'fast_sigmoid')
FUNCTIONS = {
  f'surrogate.{name}': lambda x, name=name: getattr(surrogate, name)(x, 0.9)
  for name in SPIKES
} | {
  'surrogate.straight_through': lambda x: surrogate.straight_through(
    surrogate.arctan
  )(x, 0.9),
  'surrogate.scaled': lambda x: surrogate.scaled('arctan', 0.5)(x, 0.9),
  'surrogate.custom': lambda x: surrogate.custom(lambda x, w: w - x)(x, 0.9),
  'statistics.measure': statistics.measure,
  'statistics.moments': statistics.moments,
  'statistics.of_devices': lambda x: statistics.of_devices(
    jnp.mean(x), jnp.sqrt(jnp.sum(x**2)), x.size
  ),
  'statistics.histogram': statistics.histogram,
  'statistics.sample': lambda x: statistics.sample(x**2, x),
  'statistics.share': lambda x: statistics.share(x > 0.5),
  'statistics.sums': lambda x: statistics.sums((x, x * x), per=1),
  'statistics.count': lambda x: x * statistics.count(x),
  'statistics.nonzero': statistics.nonzero,
  'statistics.only_real': lambda x: statistics.only_real(
    x, jnp.arange(len(x)) > 0
  ),
  'statistics.weighted_mean': lambda x: statistics.weighted_mean(x, x**2),
  'devices.gather': of_devices(devices.gather),
  'statistics.running_average': lambda x: statistics.running_average(x, x, 0.9),
  'threshold.adaptive': of_rule(threshold.adaptive),
  'threshold.estimated': of_rule(threshold.estimated),
  'threshold.fixed': of_rule(threshold.fixed),
  'threshold.learnable': of_rule(threshold.learnable),
  'threshold.quantile': of_rule(threshold.quantile),
  'quantile.quantile': quantile.quantile,
  'width.deviation': of_rule(width.deviation),
  'width.fixed': of_rule(width.fixed),
  'width.threshold_driven': of_rule(width.threshold_driven),
  'width.isometric': of_rule(width.isometric),
  'width.mpd_agl': of_rule(width.mpd_agl),
  'neurons.run': neurons.run,
  'neurons.step': lambda x: neurons.step(None, x),
  'recurrent.run': lambda x: recurrent.run(
    x, feedback=recurrent.weights(x[0, 0, :, None] * x[0, 0])
  ),
  'recurrent.integrate': recurrent.integrate,
  'layers.layer': of_layer,
  'neurons.sequence': neurons.sequence,
  'dynamics.at_rest': dynamics.at_rest,
  'tdbn.measure': tdbn.measure,
  'tdbn.per_channel': tdbn.per_channel,
  'tdbn.affine': lambda x: tdbn.affine(*tdbn.measure(x), x[0, 0], 0.5)(x),
  'tdbn.layer': lambda x: tdbn.layer(
    x, tdbn.measure(x), use_running_average=False
  ),
  'tdbn.scale_and_bias': lambda x: tdbn.scale_and_bias(
    x, None, x[0, 0], 0.7, False
  ),
  'tdbn.unbiased': lambda x: tdbn.unbiased(tdbn.measure(x)[1], x),
  'losses.prediction': losses.prediction,
  'losses.cross_entropy': lambda x: losses.cross_entropy(x, jnp.arange(4), 0.1),
  'losses.tet': lambda x: losses.tet(x, jnp.arange(4)),
  'losses.normalized_weights': lambda x: losses.normalized_weights(
    jnp.abs(x[0, 0]) + 1, jnp.arange(4)
  ),
  'losses.firing_rate': losses.firing_rate,
  'losses.rate_target': lambda x: losses.rate_target({'a': x, 'b': x[0]}, 0.2),
  'losses.rate_bounds': lambda x: losses.rate_bounds(x, 0.4, 0.5),
  'losses.rmp': lambda x: losses.rmp(x, x[:, 0, 0] ** 2 + 0.1),
  'time_axis.repeat_in_time': lambda x: time_axis.repeat_in_time(x, 2),
  'time_axis.fold_time': time_axis.fold_time(lambda x: x[:, ::-1] ** 2),
  'time_axis.over_leading_axes': lambda x: linen.max_pool(x[None], (2, 2)),
  'time_axis.batch_major': lambda x: time_axis.batch_major(jnp.sin, x, 1),
  'packing.pack': lambda x: x * packing.pack(x, 8).astype(x.dtype),
  'packing.unpack': lambda x: (
    x * packing.unpack(packing.pack(x > 0.5, 2), 2, 5, x.dtype)
  ),
  'packing.max_pool': lambda x: packing.max_pool(x, (2,)),
  'linen.Conv': of_linen(linen.Conv(2, (3,))),
  'nnx.Conv': of_nnx(lambda: snnx.Conv(5, 2, (3,), rngs=nnx.Rngs(0))),
  'linen.TdBatchNorm': of_linen(linen.TdBatchNorm(False)),
  'linen.SpikingNeuron': of_linen(
    linen.SpikingNeuron(), use_running_average=False
  ),
  'linen.FeedbackNeuron': of_linen(
    linen.FeedbackNeuron(), use_running_average=False
  ),
  'nnx.FeedbackNeuron': of_nnx(lambda: snnx.FeedbackNeuron(num_steps=3)),
  'linen.SpikingRNN': of_linen(linen.SpikingRNN(), use_running_average=False),
  'linen.LeakyIntegrator': of_linen(linen.LeakyIntegrator()),
  'linen.SpikingCell': of_linen(
    linen.nn.RNN(
      linen.SpikingCell(use_running_average=False),
      time_major=True,
      variable_axes={'batch_stats': 0},
    )
  ),
  'nnx.TdBatchNorm': of_nnx(lambda: snnx.TdBatchNorm(5)),
  'nnx.SpikingNeuron': of_nnx(lambda: snnx.SpikingNeuron(num_steps=3)),
  'nnx.SpikingRNN': of_nnx(
    lambda: snnx.SpikingRNN(5, num_steps=3, rngs=nnx.Rngs(0))
  ),
  'nnx.LeakyIntegrator': of_nnx(snnx.LeakyIntegrator),
  'nnx.SpikingCell': of_nnx(
    lambda: nnx.RNN(snnx.SpikingCell(num_steps=3), time_major=True)
  ),
}
# Of names and settings, before anything is traced.
OF_SETTINGS = {
  'methods.get',
  'neurons.arrays',
  'neurons.check_fits',
  'neurons.check_state',
  'neurons.check_positive',
  'layers.check_shares',
  'layers.averaged',
  'layers.filled',
  'layers.initial_average',
  'layers.logits',
  'carry.initial',
  'neurons.logit',
  'carry.of_all',
  'carry.of_examples',
  'recurrent.adapting',
  'recurrent.current',
  'recurrent.weights',
  'surrogate.get',
  'layers.resize_time',
  'packing.Packed',
  'packing.width',
  'carry.shared_time',
  'layers.typed_call',
  'layers.static',
  'devices.axis_size',
  'dtypes.floating',
  'dtypes.wide',
  'devices.warn_if_not_pooled',
  'tdbn.mask_of',
  'threshold.follows',
  'threshold.is_measured',
  'threshold.Moving',
  'threshold.unmeasured',
}
# What `neurons.run` is made of; tested through it.
PARTS = {'tdbn.Own'} | {
  f'dynamics.{name}'
  for name in (
    *('fire', 'follows', 'level_at_rest', 'levels', 'plain', 'presynaptic'),
    *('scanned', 'timesteps'),
  )
}


def test_no_public_function_is_forgotten():
  modules = (
    surrogate, statistics, dtypes, carry, devices, threshold, width, methods,
    dynamics,
    neurons, recurrent, layers, quantile, packing, tdbn, losses, time_axis,
    linen, snnx,
  )  # fmt: skip
  public = {
    f'{module.__name__.rpartition(".")[2]}.{name}'
    for module in modules
    for name, value in vars(module).items()
    if callable(value)
    and str(getattr(value, '__module__', '')).startswith(module.__name__)
    if not name.startswith('_') and not hasattr(value, '_fields')
    if name not in ('Call', 'Histogram', 'Membrane', 'Probe')  # Types.
  }
  assert public == FUNCTIONS.keys() | OF_SETTINGS | PARTS


@pytest.mark.parametrize(
  'dtype', ['bfloat16', pytest.param('float32', marks=pytest.mark.sample)]
)
@pytest.mark.parametrize('name', FUNCTIONS)
def test_every_public_function_under_jit_vmap_and_grad(name, dtype):
  def outputs(x):
    leaves = jax.tree.leaves(FUNCTIONS[name](x))
    return [a for a in leaves if jnp.issubdtype(a.dtype, jnp.floating)]

  def total(x):
    return sum(jnp.sum(a, dtype=jnp.float32) for a in outputs(x))

  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def transformed(batch):
    each = jax.tree.map(lambda *a: jnp.stack(a), *map(outputs, batch))
    return each, jax.vmap(outputs)(batch), jax.grad(total)(batch[0])

  for seed in (0, 1):
    batch = jnp.asarray(0.6 + 0.5 * normal((2, 3, 4, 5), seed), dtype)
    each, mapped, slope = transformed(batch)
    chex.assert_tree_all_finite(each)
    chex.assert_trees_all_close(mapped, each, rtol=0.01, atol=1e-5)
    assert slope.dtype == dtype and np.isfinite(slope).all()
