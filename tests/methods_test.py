"""Threshold rules, width rules and the table of methods that pairs them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.stats import norm

from dsatgo_jax import linen as snn
from dsatgo_jax import methods, neurons, quantile, tdbn, threshold, width
from dsatgo_jax.analysis import flow
from dsatgo_jax.methods import METHODS, Method
from dsatgo_jax.neurons import Parameters
from dsatgo_jax.statistics import Statistics

PARAMETERS = Parameters(decay=0.5, v_th=2.0, f_c=0.9, width=1.5)
MEASURED = Statistics(jnp.float32(1.0), jnp.float32(3.0))


@pytest.fixture(scope='module')
def standard_normal():
  return jax.random.normal(jax.random.key(0), (1, 1000, 1000))


# Published figures, by sampling and in closed form.


@pytest.mark.parametrize('mu, sigma', [(0, 1), (0, 1 / 3), (-5, 2), (40, 0.1)])
def test_theorem_1(standard_normal, mu, sigma):
  """At theta = mu + sigma 15.87 % fire, whatever mu and sigma."""
  assert norm.sf(1) == pytest.approx(0.1587, abs=5e-5)
  spikes, _, record = neurons.run(mu + sigma * standard_normal, method='at')
  assert spikes.mean() == pytest.approx(norm.sf(1), abs=0.001)
  assert record.theta[0] == pytest.approx(mu + sigma, abs=0.005 * sigma)


@pytest.mark.parametrize(
  'method, sigma, published',
  [
    ('at', 0.5, 47.72),
    ('at', 1.0, 24.17),
    ('at', 2.0, 12.10),
    ('ds_atgo', 0.5, 26.00),
    ('ds_atgo', 1.0, 24.17),
    ('ds_atgo', 2.0, 21.30),
  ],
)
def test_figure_5(standard_normal, method, sigma, published):
  """The share of u ~ N(0, sigma ** 2) inside the gradient window."""
  rules, parameters = METHODS[method], Parameters()
  measured = Statistics(jnp.float32(0), jnp.float32(sigma))
  theta = rules.threshold(measured, parameters, 0)
  kappa = rules.width(theta, parameters, 0)
  low, high = norm.cdf([theta - kappa / 2, theta + kappa / 2], scale=sigma)
  assert 100 * (high - low) == pytest.approx(published, abs=0.006)

  u = sigma * standard_normal
  share = neurons.run(u, method=method, record=True)[2].gradient_share[0]
  assert 100 * share == pytest.approx(published, abs=0.15)


# The rules by hand.


@pytest.mark.parametrize(
  'rule, expected',
  [
    (threshold.fixed, 2.0),
    (threshold.adaptive, 0.9 * (1.0 + 3.0)),
    (threshold.estimated, 0.9 * np.sqrt(1.25) * 2.0),
    (threshold.learnable, 2.0),
    (width.deviation, 3.0),
  ],
)
def test_threshold_rules(rule, expected):
  assert rule(MEASURED, PARAMETERS, 0) == pytest.approx(expected, rel=1e-6)
  reads = rule in (threshold.adaptive, width.deviation)
  assert threshold.is_measured(rule) == reads


def test_width_follows_its_signal():
  """The two branches of eq 7 are one line, and nothing accumulates."""
  for signal in (-1.0, 0.5, 1.7, 2.0, 2.3, 5.0):
    over = signal - 2.0
    branch = 1 + np.tanh(over) if over >= 0 else 1 - np.tanh(-over)
    for t in (0, 3):
      kappa = width.threshold_driven(signal, PARAMETERS, t)
      assert kappa == pytest.approx(1.5 * branch, rel=1e-5)


def test_width_rules_without_a_signal():
  assert width.fixed(None, PARAMETERS, 1) == 1.5
  parameters = PARAMETERS._replace(tdbn_scale=jnp.array([0.5, 1.0, 1.5, 0.2]))
  first, later = (width.mpd_agl(None, parameters, t) for t in (0, 4))
  assert first == pytest.approx(2 * 0.8 * 2.0)
  assert later == pytest.approx(2 * np.sqrt(1.25) * 0.8 * 2.0)


def test_the_isometric_width_keeps_gradients():
  """`share / width ** 2` is `p * (1 - p) / sigma ** 2`, of whatever sigma."""
  normal = norm(3, 0.7)  # theta = 3.7
  kappa = width.isometric(0.7, Parameters(), 0)
  share = normal.cdf(3.7 + kappa / 2) - normal.cdf(3.7 - kappa / 2)
  p = normal.sf(3.7)
  assert share / kappa**2 == pytest.approx(p * (1 - p) / 0.7**2, rel=0.01)
  # Proportional to sigma and kappa_0; of no deviation it is not zero.
  assert width.isometric(1.4, Parameters(width=0.5), 0) == pytest.approx(kappa)
  assert width.isometric(0.0, Parameters(v_th=2.0), 0) == pytest.approx(0.036)


class Deep(nn.Module):
  """Six dense layers with tdBN, and probes at their membranes."""

  method: str

  @nn.compact
  def __call__(self, x):  # noqa: D102
    for i in range(6):
      x = snn.Dense(512, use_bias=False)(x)
      x = snn.TdBatchNorm(use_running_average=False)(x)
      neuron = snn.SpikingNeuron(self.method, name=f'neuron{i}')
      x = neuron(x, use_running_average=False)
    return x


@pytest.mark.parametrize('method, low, high', [
  ('isometric', 0.7, 1.5), ('ds_atgo', 3, 12),
])  # fmt: skip
def test_the_isometric_width_is_that_of_the_gradient_in_depth(
  method, low, high
):
  """Six layers at the start: dL/du in the first over that in the last."""
  x = jax.random.normal(jax.random.key(0), (2, 64, 512))
  cotangent = jax.random.normal(jax.random.key(1), x.shape)
  net = Deep(method)
  variables = net.init(jax.random.key(2), x)
  zeros = flow.zeros(net, variables, x)

  @jax.jit
  def probes(zeros):
    out, _ = net.apply(variables | zeros, x, mutable=['batch_stats'])
    return (out * cotangent).sum()

  norms = flow.summary(jax.grad(probes)(zeros)['flow'])
  first, last = (np.linalg.norm(norms[f'neuron{i}']['u']) for i in (0, 5))
  assert low < first / last < high


@pytest.mark.parametrize(
  'rule, learns',
  [
    (threshold.fixed, {}),
    (threshold.learnable, {'v_th': 1.0}),
    (threshold.estimated, {'v_th': 0.9 * np.sqrt(1.25)}),
    (width.mpd_agl, {}),
  ],
)
def test_gradients_of_rules(rule, learns):
  """None to decay, to a fixed threshold, or through MPD-AGL's width."""
  parameters = jax.tree.map(
    jnp.float32, PARAMETERS._replace(tdbn_scale=np.ones(2))
  )
  gradient = jax.grad(lambda p: rule(None, p, 1))(parameters)
  expected = {'decay': 0, 'v_th': 0, 'width': 0} | learns
  for name, value in expected.items():
    assert getattr(gradient, name) == pytest.approx(value, rel=1e-6)
  assert not gradient.tdbn_scale.any()


# The table.


def test_the_table():
  adaptive, follows = threshold.adaptive, width.threshold_driven
  rate, moving = threshold.quantile, METHODS['moving'].threshold
  table = {
    'vanilla': (threshold.fixed, width.fixed, None),
    'at': (adaptive, width.fixed, None),
    'tgo': (threshold.fixed, follows, adaptive),
    'ds_atgo': (adaptive, follows, adaptive),
    'mpd_agl': (threshold.fixed, width.mpd_agl, None),
    'learnable_threshold': (threshold.learnable, width.fixed, None),
    'ds_atgo_per_channel': (adaptive, follows, adaptive, tdbn.per_channel),
    'quantile': (rate, follows, rate, quantile.quantile),
    'isometric': (adaptive, width.isometric, width.deviation),
    'moving': (moving, follows, moving),
  }
  assert METHODS == {name: Method(*row) for name, row in table.items()}
  for name, method in METHODS.items():
    assert methods.get(name) == method


@pytest.mark.parametrize('name', ['at', 'tgo', 'ds_atgo'])
def test_choosing_distribution_and_signal(name):
  """The width follows the threshold that `ds_atgo` would have, or sigma."""
  _, kappa, follows, _ = METHODS[name]

  def expected(rule, signal):
    theta = threshold.fixed if name == 'tgo' else rule
    return Method(theta, kappa, follows and signal)

  estimated, sigma = threshold.estimated, width.deviation
  own = lambda statistics, parameters, t: 2 * statistics.mean  # noqa: E731
  for setting, rule in (('estimated', estimated), (own, own)):
    assert methods.get(name, setting) == expected(rule, rule)
    assert methods.get(name, setting, 'sigma') == expected(rule, sigma)
  assert methods.get(name, 'true', own) == expected(threshold.adaptive, own)


@pytest.mark.parametrize('name', ['vanilla', 'mpd_agl', 'learnable_threshold'])
def test_settings_without_a_use_change_nothing(name):
  assert methods.get(name, 'estimated', 'sigma') == METHODS[name]
  with pytest.raises(ValueError, match="expected 'at', 'tgo' or 'ds_atgo'"):
    methods.get(name, threshold.adaptive)


def test_a_method_of_ones_own_is_returned_unchanged():
  own = Method(threshold.estimated, width.fixed)
  assert methods.get(own, 'estimated', 'sigma') is own


@pytest.mark.parametrize(
  'arguments, message',
  [
    (('ds-atgo',), "method to be one of 'vanilla'.*got method='ds-atgo'"),
    (
      ('at', 'real'),
      "threshold to be one of 'true', 'estimated', got .*'real'",
    ),
    (
      ('at', 'true', 'mu'),
      "width_signal to be one of 'theta', 'sigma', got width_signal='mu'",
    ),
  ],
)
def test_unknown_names(arguments, message):
  with pytest.raises(ValueError, match=message):
    methods.get(*arguments)


def test_mpd_agl_says_that_it_needs_the_scale():
  with pytest.raises(ValueError, match=r"'mpd_agl' needs.*got tdbn_scale=None"):
    neurons.run(jnp.ones((2, 3, 4)), method='mpd_agl')
