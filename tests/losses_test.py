"""Losses and regularisers, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from scipy.special import log_softmax

from dsatgo_jax import linen as snn
from dsatgo_jax import losses, neurons
from dsatgo_jax import nnx as snnx

LOGITS = np.random.default_rng(0).normal(0, 3, (4, 5, 7))
LABELS = np.array([0, 6, 3, 3, 1])


def cross_entropy(logits, label_smoothing):
  """Of logits [..., B, K], in NumPy."""
  target = np.eye(7)[LABELS] * (1 - label_smoothing) + label_smoothing / 7
  return -np.sum(target * log_softmax(logits, -1), -1)


@pytest.mark.parametrize('label_smoothing', [0.0, 0.1, 1.0])
@jax.enable_x64(True)
def test_cross_entropy(label_smoothing):
  loss = losses.cross_entropy(jnp.asarray(LOGITS), LABELS, label_smoothing)
  expected = cross_entropy(LOGITS.mean(0), label_smoothing)
  np.testing.assert_allclose(loss, expected, rtol=1e-12)


@pytest.mark.parametrize('lam, mean', [(0, 1), (1e-3, 1), (0.05, 0.5), (1, 1)])
@pytest.mark.parametrize('label_smoothing', [0.0, 0.1])
@jax.enable_x64(True)
def test_tet(lam, mean, label_smoothing):
  loss = losses.tet(jnp.asarray(LOGITS), LABELS, lam, mean, label_smoothing)
  entropy = cross_entropy(LOGITS, label_smoothing).mean(0)
  squares = ((LOGITS - mean) ** 2).mean((0, 2))
  expected = (1 - lam) * entropy + lam * squares
  np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_tet_of_one_timestep_without_weight_is_cross_entropy():
  logits = jnp.float32(LOGITS[:1])
  expected = losses.cross_entropy(logits, LABELS, 0.1)
  tet = losses.tet(logits, LABELS, 0.0, label_smoothing=0.1)
  np.testing.assert_allclose(tet, expected, rtol=1e-6)


@pytest.mark.parametrize('loss', [losses.cross_entropy, losses.tet])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradients_and_dtypes(loss, dtype):
  logits = jnp.asarray(LOGITS, dtype)
  value, gradient = jax.jit(
    jax.value_and_grad(lambda a: loss(a, LABELS).sum())
  )(logits)
  assert value.dtype == jnp.float32 and gradient.dtype == dtype
  assert losses.prediction(logits).dtype == jnp.float32
  # Cross-entropy does not see a shift, and has a zero gradient along it.
  if loss is losses.cross_entropy:
    along = np.float32(gradient).sum(-1)
    np.testing.assert_allclose(along, 0, atol=0.01 * abs(gradient).max())
  extreme = jax.grad(lambda a: loss(a, LABELS).sum())(logits * 1e4)
  assert np.isfinite(np.float32(extreme)).all()


@pytest.mark.sample
@pytest.mark.parametrize('loss', [losses.cross_entropy, losses.tet])
@jax.enable_x64(True)
def test_a_mask_leaves_timesteps_out(loss):
  """As many losses of recordings of their own length; one of them has none."""
  lengths = [4, 1, 3, 0, 2]
  mask = np.arange(4)[:, None] < lengths
  logits = np.where(mask[..., None], LOGITS, np.nan)
  masked = functools.partial(loss, labels=LABELS, label_smoothing=0.1)
  value, pull = jax.vjp(
    lambda a: masked(a, mask=jnp.asarray(mask)), jnp.asarray(logits)
  )
  expected = [
    loss(jnp.asarray(LOGITS[:length, [i]]), LABELS[[i]], label_smoothing=0.1)[0]
    if length
    else 0.0
    for i, length in enumerate(lengths)
  ]
  np.testing.assert_allclose(value, expected, rtol=1e-12)
  (gradient,) = pull(jnp.ones(5))
  assert not gradient[~mask].any() and gradient[mask].all()
  with pytest.raises(ValueError, match=r'\(4, 5\), got mask.shape=\(5,\)'):
    masked(logits, mask=jnp.ones(5, bool))


@pytest.mark.parametrize('loss', [losses.cross_entropy, losses.tet])
def test_errors(loss):
  logits = jnp.float32(LOGITS)
  with pytest.raises(ValueError, match=r'\[T, B, K\], got .*\(5, 7\)'):
    loss(logits[0], LABELS)
  with pytest.raises(ValueError, match=r'shape \(5,\), got .*\(4,\)'):
    loss(logits, LABELS[:4])
  for value in (-0.1, 1.5):
    with pytest.raises(ValueError, match=f'<= 1, got label_smoothing={value}'):
      functools.partial(loss, label_smoothing=value)(logits, LABELS)


# What PyTorch 2.13 gives in float64: `CrossEntropyLoss(weight,
# label_smoothing)` of the mean logits, the same with reduction='none', and
# `0.95 * mean_t(that of logits[t]) + 0.05 * MSELoss()(logits, 1)`.
TORCH = {
  0.0: (
    2.829322279751862,
    [0.3588679593333512, 13.396048867072745, 1.8063557122291465],
    3.1038271288836685,
  ),
  0.1: (
    2.704281392153356,
    [0.5545660818222449, 12.55376288677297, 1.7652186882482421],
    2.9778171600258454,
  ),
}


@pytest.mark.parametrize('label_smoothing', TORCH)
@jax.enable_x64(True)
def test_class_weights_are_pytorchs(label_smoothing):
  logits = jnp.array(
    [
      [[2, -1, 0.5], [0, 1, -2], [1, 1, 3]],
      [[0, -3, 1.5], [4, 1, 0], [-1, 0, 1]],
    ]
  )
  labels, weights = jnp.array([0, 2, 1]), np.array([0.5, 1.0, 4.0])
  mean, each, tet = TORCH[label_smoothing]
  given = logits, labels, label_smoothing
  loss = losses.cross_entropy(*given, class_weights=weights)
  np.testing.assert_allclose(loss, each, rtol=1e-12)
  weights = losses.normalized_weights(weights, labels)
  assert jnp.mean(weights[labels]) == pytest.approx(1)
  loss = losses.cross_entropy(*given, class_weights=weights)
  np.testing.assert_allclose(jnp.mean(loss), mean, rtol=1e-12)
  loss = losses.tet(
    logits, labels, 0.05, 1.0, label_smoothing, class_weights=weights
  )
  np.testing.assert_allclose(jnp.mean(loss), tet, rtol=1e-12)
  with pytest.raises(ValueError, match=r'\[K\] of shape \(3,\), got \(2,\)'):
    losses.cross_entropy(*given, class_weights=weights[:2])


# Regularisers.


def test_rates_by_hand():
  rates = {'a': jnp.array([0.1, 0.4]), 'b': jnp.array([0.3, 0.0])}
  # a: (0.1 ** 2 + 0.2 ** 2) / 2 = 0.025; b: (0.1 ** 2 + 0.2 ** 2) / 2.
  value, slope = jax.value_and_grad(losses.rate_target)(rates, 0.2)
  assert value == pytest.approx(0.025)
  # Of (rate - target) ** 2 / 4 each.
  np.testing.assert_allclose(slope['a'], [-0.05, 0.1], rtol=1e-6)
  np.testing.assert_allclose(slope['b'], [0.05, -0.1], rtol=1e-6)
  # a: 0 and 0.3 ** 2; b: 0.2 ** 2 and 0.1 ** 2. Their means: 0.045, 0.025.
  value = losses.rate_target(rates, {'a': 0.1, 'b': 0.1})
  assert value == pytest.approx(0.035)
  assert losses.rate_target(rates, {'a': 0.1, 'b': 0.3}) == pytest.approx(0.045)

  # Beyond [0.05, 0.25]: a by 0 and 0.15, b by 0.05 and 0.05.
  value, slope = jax.value_and_grad(losses.rate_bounds)(rates, 0.05, 0.25)
  assert value == pytest.approx((0.15**2 + 0.05**2 + 0.05**2) / 4)
  np.testing.assert_allclose(slope['a'], [0, 0.075], rtol=1e-6)
  np.testing.assert_allclose(slope['b'], [0.025, -0.025], rtol=1e-6)
  only = losses.rate_bounds(rates, upper={'a': 0.2, 'b': 1.0})
  assert only == pytest.approx(0.2**2 / 4)
  assert losses.rate_bounds(rates) == 0


def test_rmp_by_hand():
  """At threshold 1/2 the distance to 0 or 1, squared; equality is a spike."""
  u = jnp.array([[[-0.5, 0.25]], [[0.5, 2.0]]])
  value, slope = jax.value_and_grad(losses.rmp)(u, 0.5)
  assert value == pytest.approx((0.25 + 0.0625 + 0.25 + 1) / 4)
  # 2 u / 4 below, -2 (1 - u) / 4 from the threshold on.
  expected = [[[-0.25, 0.125]], [[-0.25, 0.5]]]
  np.testing.assert_allclose(slope, expected, rtol=1e-6)
  # In units of twice the threshold, one a timestep; a layer with other axes.
  scaled = {'a': u * jnp.array([2.0, 3.0])[:, None, None], 'b': u[..., None]}
  theta = {'a': jnp.array([1.0, 1.5]), 'b': 0.5}
  assert losses.rmp(scaled, theta) == pytest.approx(value)


@jax.enable_x64(True)
def test_rmp_and_rates_against_numpy():
  rng = np.random.default_rng(0)
  u, theta = rng.normal(size=(4, 5, 3, 2)), rng.uniform(0.3, 2, 4)
  mask = rng.random((4, 5)) < 0.6
  mask[2] = False
  mask[3] = True

  def error(u):
    x = u / (2 * theta[:, None, None, None])
    return np.minimum(x**2, (1 - x) ** 2)

  expected = error(u).mean()
  np.testing.assert_allclose(losses.rmp(u, theta), expected, rtol=1e-12)
  padded = np.where(mask[..., None, None], u, np.nan)
  value, slope = jax.value_and_grad(losses.rmp)(
    jnp.asarray(padded), theta, jnp.asarray(mask)
  )
  steps = [
    error(u)[t, mask[t]].mean() if mask[t].any() else 0 for t in range(4)
  ]
  np.testing.assert_allclose(value, np.mean(steps), rtol=1e-12)
  assert not slope[~mask].any() and slope[mask].all()
  step, at = 1e-6, (3, 4, 2, 1)
  there = losses.rmp(jnp.asarray(padded).at[at].add(step), theta, mask)
  np.testing.assert_allclose(slope[at], (there - value) / step, rtol=1e-4)

  spikes = np.float64(u > 0.5)
  rates = losses.firing_rate(jnp.asarray(spikes))
  np.testing.assert_allclose(rates, spikes.mean((1, 2, 3)), rtol=1e-12)
  rates = losses.firing_rate(jnp.asarray(spikes), jnp.asarray(mask))
  expected = [
    spikes[t, mask[t]].mean() if mask[t].any() else 0 for t in range(4)
  ]
  np.testing.assert_allclose(rates, expected, rtol=1e-12)


class Layers(nn.Module):
  """Two layers of neurons that are neither trained nor measured."""

  @nn.compact
  def __call__(self, x):
    """[T, B, C] to spikes."""
    for name in ('first', 'second'):
      neuron = snn.SpikingNeuron(
        'vanilla', learn_decay=False, use_running_average=True, name=name
      )
      x = 1.2 * neuron(x)
    return x


def test_rates_of_layers_pass_the_surrogates_gradient():
  """At one timestep, with theta and width 1: 1 for membranes in [0.5, 1.5]."""
  x = jnp.array([[[0.2, 0.7, 1.2, 1.3, 1.9]]])

  def is_neuron(module, _):
    return isinstance(module, snn.SpikingNeuron)

  def loss(x):
    _, kept = Layers().apply(
      {}, x, mutable=['intermediates'], capture_intermediates=is_neuron
    )
    spikes = {n: kept['intermediates'][n]['__call__'][0] for n in kept_names}
    rates = jax.tree.map(losses.firing_rate, spikes)
    return losses.rate_target(rates, 0.5)

  kept_names = ['first']
  value, slope = jax.value_and_grad(loss)(x)
  # The rate is 3/5. 2 (0.6 - 0.5) / 5 = 0.04 where the surrogate is 1.
  assert value == pytest.approx(0.01)
  expected = np.array([[[0, 0.04, 0.04, 0.04, 0]]])
  np.testing.assert_allclose(slope, expected, rtol=1e-5)
  # The second layer's membranes are 1.2 or 0, and its spikes the first's: its
  # gradient is 1.2 times that, where the first's spikes are 1 and learn.
  kept_names = ['second']
  expected = np.array([[[0, 0, 0.048, 0.048, 0]]])
  np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-5)


def test_rates_of_nnx_layers():
  neuron = snnx.SpikingNeuron('vanilla', learn_decay=False)
  x = jnp.array([[[0.2, 0.7, 1.2, 1.3, 1.9]]])

  def loss(neuron, x):
    return losses.rate_target(losses.firing_rate(neuron(x)), 0.5)

  expected = np.array([[[0, 0.04, 0.04, 0.04, 0]]])
  slope = nnx.grad(loss, argnums=1)(neuron, x)
  np.testing.assert_allclose(slope, expected, rtol=1e-5)


def test_gradient_of_a_rate_through_time():
  """What a timestep fires takes from the next one, through the reset."""
  x = jnp.array([[[1.2]], [[0.9]]])
  parameters = neurons.Parameters(decay=0.5)

  def rates(x):
    spikes, _, _ = neurons.run(x, parameters, 'vanilla')
    return losses.firing_rate(spikes)

  # u = [1.2, 0.9], s = [1, 0]; v[0] = u[0] (1 - s[0]) = 0, whose slope by u[0]
  # is (1 - 1) - 1.2 = -1.2; so that of s[1] by x[0] is 0.5 * -1.2 = -0.6.
  jacobian = jax.jacrev(rates)(x)[:, :, 0, 0]
  np.testing.assert_allclose(jacobian, [[1, 0], [-0.6, 1]], rtol=1e-6)


def test_regularisers_errors():
  rates = {'a': jnp.ones(3), 'b': jnp.ones(3)}
  with pytest.raises(
    ValueError, match='target to be a number, or one for each'
  ):
    losses.rate_target(rates, {'a': 0.1})
  with pytest.raises(ValueError, match='upper to be a number, or one for each'):
    losses.rate_bounds(rates, upper={'a': 0.1, 'c': 0.1})
  for nothing in ({}, ()):
    with pytest.raises(ValueError, match='at least one layer, got'):
      losses.rate_target(nothing, 0.1)
  with pytest.raises(ValueError, match=r'spikes \[T, B, ...\], got shape \(3,'):
    losses.firing_rate(jnp.ones(3))
  with pytest.raises(ValueError, match=r'\[T, B\] of shape \(3, 2\), got'):
    losses.rmp(jnp.ones((3, 2, 4)), 1.0, jnp.ones(2, bool))
