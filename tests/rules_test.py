"""Thresholds that follow their own past, and rules with their own measures."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import dsatgo_jax.linen as snn
import dsatgo_jax.nnx as snnx
from dsatgo_jax import methods, neurons, quantile, tdbn, threshold, width
from dsatgo_jax.neurons import Parameters

OWN = ('ds_atgo_per_channel', 'quantile', 'moving')
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


def fast(*methods):
  """All of them, the others as a sample."""
  return [
    pytest.param(method, marks=[pytest.mark.sample] * (method not in methods))
    for method in OWN
  ]


def skewed(*shape, seed=0):
  x = np.random.default_rng(seed).exponential(1, shape)
  return jnp.asarray(x, jnp.float32)


def loop(x, method, decay=0.2, v_th=1.0):
  """Hard reset by NumPy; the spikes, the thresholds and the widths."""
  x = np.asarray(x, np.float64)
  v, previous, told = np.zeros_like(x[0]), v_th, []
  for x_t in x:
    u = decay * v + x_t
    if method == 'moving':
      theta = (previous + u.mean() + u.std(ddof=1)) / 2
    elif method == 'quantile':
      theta = np.sort(u, None)[-int(np.ceil(0.1587 * u.size))]
    else:
      axes = tuple(range(u.ndim - 1))
      theta = u.mean(axes) + u.std(axes, ddof=1)
    s = u >= theta
    v, previous = u * (1 - s), theta
    told.append((s, theta, 1 + np.tanh(theta - v_th)))
  return [np.stack(one) for one in zip(*told, strict=True)]


@pytest.mark.parametrize(
  'num_steps', [4, pytest.param(18, marks=pytest.mark.sample)]
)
@pytest.mark.parametrize('method', fast('moving', 'quantile'))
def test_equal_to_a_loop_and_both_ways_alike(method, num_steps):
  x = skewed(num_steps, 3, 4, 5)
  parameters = jax.tree.map(jnp.float32, Parameters())

  def loss(x, parameters, fused):
    spikes, state, record = neurons.run(x, parameters, method, fused=fused)
    return (spikes * jnp.cos(jnp.arange(spikes.size)).reshape(x.shape)).sum(), (
      spikes, state, record.theta, record.width,
    )  # fmt: skip

  slope = jax.jit(
    jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2
  )
  (_, told), gradients = slope(x, parameters, True)
  (_, plain), plain_gradients = slope(x, parameters, False)
  close((told, gradients), (plain, plain_gradients))
  assert abs(gradients[0]).max() > 0.01
  spikes, state, theta, kappa = told
  close((spikes, theta, kappa), tuple(map(np.float32, loop(x, method))))
  close(state.theta, theta[-1])


@pytest.mark.parametrize('method', fast('moving'))
def test_parts_with_the_state_passed_on_equal_the_whole(method):
  x = skewed(5, 3, 4)
  whole, end, _ = neurons.run(x, method=method)
  first, state, _ = neurons.run(x[:2], method=method)
  second, state, _ = neurons.run(x[2:], method=method, state=state)
  close((jnp.concatenate([first, second]), state), (whole, end))
  _, state, _ = neurons.run(x, method=method, state=state._replace(theta=None))
  assert (state.theta is None) == (method != 'moving')
  if method == 'moving':
    other = state._replace(theta=jnp.ones(3))
    with pytest.raises(
      ValueError, match=r'of shape \(\), got state.theta.shape'
    ):
      neurons.run(x, method=method, state=other)


@pytest.mark.parametrize('method', fast('moving'))
def test_layers_and_cells_of_both_modules(method):
  x = skewed(3, 4, 5)
  expected, _, record = neurons.run(x, method=method)
  running = 0.9 + 0.1 * record.theta
  neuron = snn.SpikingNeuron(method, use_running_average=False)
  variables = neuron.init(jax.random.key(0), x)
  spikes, updates = neuron.apply(variables, x, mutable=['batch_stats'])
  close(
    (spikes, updates['batch_stats']['running_threshold']), (expected, running)
  )

  cell = snn.SpikingCell(method, use_running_average=False)
  rnn = nn.RNN(cell, time_major=True, variable_axes={'batch_stats': 0})
  variables = rnn.init(jax.random.key(0), x)
  spikes, updates = rnn.apply(variables, x, mutable=['batch_stats'])
  (average,) = jax.tree.leaves(updates)
  close((spikes, average), (expected, running))

  settings = {'num_steps': 3, 'num_features': 5}
  neuron = snnx.SpikingNeuron(method, **settings)
  close(neuron(x), expected)
  close(neuron.running_threshold[...], running)
  cell = snnx.SpikingCell(method, **settings)
  close(nnx.RNN(cell, time_major=True)(x), expected)
  close(cell.running_threshold[...], running)

  neuron.eval()
  inference, _, _ = neurons.run(
    x, method=method, running=neurons.Running(running)
  )
  close(neuron(x), inference)


def test_nnx_asks_for_the_shape_that_it_cannot_know():
  with pytest.raises(ValueError, match='num_features.*got num_features=()'):
    snnx.SpikingNeuron('ds_atgo_per_channel', num_steps=2)


@pytest.mark.parametrize('method', fast('ds_atgo_per_channel'))
def test_pooled_over_devices_and_of_what_is_real(method):
  x = skewed(2, 8, 6)
  x = x * jnp.arange(1, 9)[:, None]
  expected, state, _ = neurons.run(x, method=method)
  pooled = jax.vmap(
    functools.partial(neurons.run, method=method, axis_name='devices'),
    in_axes=1,
    out_axes=(1, 0, 0),
    axis_name='devices',
  )
  spikes, states, _ = pooled(x.reshape(2, 4, 2, 6))
  close(spikes.reshape(x.shape), expected)
  close(states.theta, jnp.stack([state.theta] * 4))

  padded = jnp.concatenate([x, 1e3 + x], 1)
  mask = jnp.arange(16) < 8
  spikes, masked, _ = neurons.run(padded, method=method, mask=mask)
  close((spikes[:, :8], masked.theta), (expected, state.theta))


@pytest.mark.parametrize('rate', [0.01, 0.25, 0.9])
def test_an_exact_rate_whatever_the_distribution(rate):
  measure = functools.partial(quantile.quantile, rate=rate)
  method = methods.METHODS['quantile']._replace(measure=measure)
  for x in (skewed(2, 10, 40), -skewed(2, 10, 40), skewed(2, 10, 40) ** 5):
    _, _, record = neurons.run(x, Parameters(0.0), method, record=True)
    close(record.firing_rate, jnp.full(2, rate))
  for rate in (0, 1):
    with pytest.raises(ValueError, match='0 < rate < 1, got rate'):
      quantile.quantile(x[0], rate=rate)


def test_constant_and_undefined_membranes_have_a_quantile_that_shows_it():
  x = jnp.full((1, 2, 3), 0.7)
  assert neurons.run(x, method='quantile')[0].all()
  for bad in (jnp.nan, jnp.inf):
    spikes = neurons.run(x.at[0, 1, 2].set(bad), method='quantile')[0]
    assert jnp.isnan(spikes[0, 1, 2])


def test_a_measure_of_ones_own_is_any_tree():
  """The median, per channel, and the largest value; without a mask argument."""

  def measure(u, axis_name):
    assert not axis_name
    return {'half': jnp.median(u, 0), 'most': [jnp.max(u)]}

  def rule(statistics, parameters, t):
    return parameters.f_c * (statistics['half'] + statistics['most'][0]) / 2

  method = methods.Method(rule, width.fixed, measure=measure)
  x = skewed(3, 4, 5)
  for fused in (True, False):
    run = functools.partial(neurons.run, method=method, fused=fused)
    theta = run(x, Parameters(0.0))[2].theta
    close(theta, (jnp.median(x, 1) + x.max((1, 2))[:, None]) / 2)
    gradient = jax.grad(lambda x, run=run: run(x)[0][1].sum())(x)
    assert abs(gradient).max() > 0.1
  neuron = snn.SpikingNeuron(method, use_running_average=False)
  (_, told), variables = neuron.init_with_output(
    jax.random.key(0), x, return_state=True
  )
  assert variables['batch_stats']['running_threshold'].shape == (3, 5)
  _, told = neuron.apply(variables, x, mutable=['batch_stats', 'spiking'])
  assert 'mean' not in told['spiking']


@pytest.mark.parametrize('inference', [False, True])
def test_an_unmeasured_rule_follows_its_past_in_inference_too(inference):
  """Half of it at each timestep: 0.8, 0.4, 0.2, and on from there."""

  @threshold.unmeasured
  def halved(statistics, parameters, t, previous):
    assert statistics is None
    return jnp.where(t == 0, previous, previous / 2)

  method = methods.Method(halved, width.fixed)
  running = neurons.Running() if inference else None
  run = functools.partial(neurons.run, method=method, running=running)
  x = skewed(3, 4, 5)
  _, state, record = run(x, Parameters(v_th=0.8))
  close(record.theta, jnp.array([0.8, 0.4, 0.2]))
  close(run(x, state=state)[2].theta, jnp.array([0.1, 0.05, 0.025]))
  scan = jax.jit(
    lambda x: jax.lax.scan(
      lambda state, x: neurons.step(
        state, x, Parameters(v_th=0.8), method, running=running
      )[:2][::-1],
      neurons.at_rest(x[0], Parameters(v_th=0.8), method),
      x,
    )
  )
  close(scan(x)[0].theta, jnp.float32(0.2))
  start = neurons.at_rest(x[0], method='ds_atgo_per_channel')
  close(start.theta, jnp.ones(5))


def test_the_past_passes_no_gradient():
  """To the number that it began with; `adaptive` does not know it either."""
  x = skewed(3, 4, 5)
  for fused in (True, False):
    slope = jax.grad(
      lambda v_th, fused=fused: neurons.run(
        x, Parameters(v_th=v_th), 'moving', fused=fused
      )[0].sum()
    )
    assert slope(1.0) == 0


@pytest.mark.parametrize('rate', [0, 1.5])
def test_a_rate_out_of_its_range(rate):
  with pytest.raises(ValueError, match='0 < rate <= 1, got rate='):
    threshold.Moving(rate)


def test_with_a_rate_of_one_it_is_the_adaptive_threshold():
  x, rule = skewed(3, 4, 5), threshold.Moving(1.0)
  method = methods.METHODS['at']._replace(threshold=rule)
  close(neurons.run(x, method=method)[2].theta, neurons.run(x)[2].theta)


def test_the_statistics_of_channels_are_those_of_each():
  u = skewed(4, 3, 2)
  mean, std = tdbn.per_channel(u)
  close(mean, u.mean((0, 1)))
  close(std, u.std((0, 1), ddof=1))


def test_decays_and_thresholds_have_the_shape_and_start_that_is_asked_for():
  """One a channel; drawn where an initializer says so, in both modules."""
  x = jnp.ones((2, 4, 3))
  shapes = {'decay_shape': (3,), 'v_th_shape': (3,)}
  params = {
    'w': jnp.full(3, -np.log(4.0)), 'v_th': jnp.full(3, 0.5),
  }  # fmt: skip
  neuron = snn.SpikingNeuron('learnable_threshold', v_th=0.5, **shapes)
  close(neuron.init(jax.random.key(0), x, False)['params'], params)
  neuron = snnx.SpikingNeuron('learnable_threshold', v_th=0.5, **shapes)
  close({'w': neuron.w[...], 'v_th': neuron.v_th[...]}, params)

  def init(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, 0.5, 0.9)

  drawn = {'decay_shape': (3,), 'decay_init': init}
  neuron = snn.SpikingNeuron('vanilla', **drawn)
  linen = neuron.init(jax.random.key(0), x, False)['params']['w']
  other = snnx.SpikingNeuron('vanilla', rngs=nnx.Rngs(0), **drawn).w[...]
  for w in (linen, other):
    decay = jax.nn.sigmoid(w)
    assert 0.5 <= decay.min() < decay.max() < 0.9
