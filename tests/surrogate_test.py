"""Surrogates: Heaviside forward, `g(x / width) / width` backward."""

import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from dsatgo_jax import linen, models, neurons, nnx, surrogate
from dsatgo_jax.analysis import bias
from tests.reference_loop import DENSITIES

SPIKES = {name: getattr(surrogate, name) for name in DENSITIES}
every_surrogate = pytest.mark.parametrize('name', SPIKES)


def slope(spike):
  """The derivative of the sum of the spikes, [...] to [...]."""
  return jax.grad(lambda x, width: jnp.sum(spike(x, width)))


slopes = {name: jax.jit(slope(spike)) for name, spike in SPIKES.items()}


@pytest.mark.parametrize(
  'name, x, width, expected',
  [
    ('rectangular', 0.1, 1.0, 1.0),
    ('rectangular', 0.2, 0.5, 2.0),
    ('rectangular', -0.9, 2.0, 0.5),
    ('rectangular', 0.3, 0.5, 0.0),
    # abs(x) < width / 2 is strict.
    ('rectangular', 0.5, 1.0, 0.0),
    ('rectangular', -0.25, 0.5, 0.0),
    ('triangular', 0.25, 1.0, 0.75),
    ('triangular', -0.5, 2.0, 0.375),
    ('triangular', 1.0, 1.0, 0.0),
    ('sigmoid', 0.5, 1.0, 0.41997434161402614),  # sech(1) ** 2
    ('sigmoid', -2.0, 4.0, 0.10499358540350653),
    ('arctan', 1 / np.pi, 1.0, 0.5),
    ('arctan', -2 / np.pi, 2.0, 0.25),
    ('fast_sigmoid', 0.5, 1.0, 0.25),
    ('fast_sigmoid', -1.0, 2.0, 0.125),
  ],
)
def test_slopes_by_hand(name, x, width, expected):
  assert slopes[name](x, width) == pytest.approx(expected, rel=1e-6)


@every_surrogate
def test_is_a_density_that_starts_at_one_over_width(name):
  for width in (0.3, 1.0, 4.0):
    assert slopes[name](0.0, width) == pytest.approx(1 / width)
    with jax.enable_x64(True):
      # x = width * tan(phi) brings the whole line into (-pi / 2, pi / 2).
      phi = (np.arange(200_000) + 0.5) / 200_000 * np.pi - np.pi / 2
      g = np.array(slopes[name](width * np.tan(phi), width))
    area = np.sum(g * width / np.cos(phi) ** 2) * np.pi / 200_000
    assert area == pytest.approx(1, abs=1e-4)


@every_surrogate
def test_equals_the_density_written_in_numpy(name):
  x = np.linspace(-3, 3, 61)
  with jax.enable_x64(True):
    ours = slopes[name](x, 0.77)
  expected = DENSITIES[name](x / 0.77) / 0.77
  np.testing.assert_allclose(ours, expected, rtol=1e-12)


@every_surrogate
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_equality_fires(name, dtype):
  x = jnp.array([-jnp.inf, -2, -1e-4, -0.0, 0, 1e-4, 2, jnp.inf], dtype)
  spikes = SPIKES[name](x, 1.0)
  chex.assert_trees_all_equal(
    spikes, jnp.array([0, 0, 0, 1, 1, 1, 1, 1], dtype)
  )
  assert slopes[name](x, jnp.float32(1)).dtype == dtype


float32 = st.floats(width=32, allow_nan=False, allow_subnormal=False)
widths = st.floats(*np.float32([1e-30, 1e30]).tolist(), width=32)


@every_surrogate
@settings(max_examples=100, deadline=None)
@given(x=float32, width=widths)
def test_no_float32_input_overflows(name, x, width):
  assert SPIKES[name](jnp.float32(x), width) == (x >= 0)
  g = slopes[name](jnp.float32(x), width) * width
  assert 0 <= g <= 1 + 1e-6
  if abs(x) < 1e-3 * width:
    assert g == pytest.approx(1, rel=1e-2)
  if abs(x) > 1e6 * width:
    assert g < 1e-10


@every_surrogate
def test_width_is_traced(name):
  x, widths = jnp.linspace(-1, 1, 9), jnp.array([0.5, 1.0, 3.0])
  one = slope(SPIKES[name])
  expected = jnp.stack([one(x, width) for width in widths])
  assert len({float(row[4]) for row in expected}) == 3

  @jax.jit
  def transformed(x, widths):
    checkpointed = slope(jax.checkpoint(SPIKES[name]))
    return {
      'vmap': jax.vmap(one, (None, 0))(x, widths),
      'scan': jax.lax.scan(lambda c, w: (c, one(x, w)), None, widths)[1],
      'checkpoint': jax.lax.map(lambda w: checkpointed(x, w), widths),
      'array': one(jnp.tile(x, (3, 1)), widths[:, None]),
    }

  for gradient in transformed(x, widths).values():
    chex.assert_trees_all_close(gradient, expected, rtol=1e-6)


@every_surrogate
def test_width_has_no_gradient(name):
  x, widths = jnp.linspace(-1, 1, 9), jnp.linspace(0.5, 1, 9)
  gradient = jax.grad(lambda w: jnp.sum(SPIKES[name](x, w)))
  chex.assert_trees_all_equal(gradient(widths), jnp.zeros(9))


def test_second_derivative_sees_the_surrogate():
  square = jax.grad(lambda u: surrogate.rectangular(u, 1.0) ** 2)
  assert jax.grad(square)(0.1) == 2
  assert jax.grad(square)(-0.1) == 2
  assert jax.grad(square)(0.6) == 0


@pytest.mark.sample
@every_surrogate
@jax.enable_x64(True)
def test_straight_through_has_jvp_and_the_same_derivatives(name):
  spike, twin = SPIKES[name], surrogate.straight_through(SPIKES[name])
  x = jnp.array([-1.3, -0.4, -0.1, 0.2, 0.45, 0.9])
  weights = jax.random.normal(jax.random.key(0), (6, 6))

  def loss(spike, x):
    return jnp.sum(jnp.sin(weights @ spike(x, 0.9)) + spike(x, 1.7) ** 3)

  ends = jnp.append(x, jnp.array([-jnp.inf, jnp.inf]))
  chex.assert_trees_all_equal(twin(ends, 0.9), spike(ends, 0.9))
  _, tangents = jax.jvp(lambda x: twin(x, 0.9), (x,), (x,))
  chex.assert_trees_all_close(tangents, slopes[name](x, 0.9) * x, rtol=1e-12)

  reverse = jax.jacrev(jax.grad(loss, argnums=1), argnums=1)(spike, x)
  forward = jax.hessian(loss, argnums=1)(twin, x)
  assert jnp.linalg.norm(reverse) > 1
  chex.assert_trees_all_close(reverse, reverse.T, rtol=1e-12)
  chex.assert_trees_all_close(reverse, forward, rtol=1e-12)


def test_jvp_needs_straight_through():
  with pytest.raises(TypeError, match='custom_vjp'):
    jax.jvp(lambda x: surrogate.rectangular(x, 1.0), (0.0,), (1.0,))


def test_custom_surrogate():
  @surrogate.custom
  def gaussian(x, width):
    """Area one, height 1 / width."""
    return jnp.exp(-jnp.pi * (x / width) ** 2) / width

  assert gaussian.__doc__ == 'Area one, height 1 / width.'
  chex.assert_trees_all_equal(
    gaussian(jnp.array([-1.0, 0.0, 1.0]), 2.0), jnp.array([0.0, 1.0, 1.0])
  )
  for width in (0.5, 2.0):
    area, _ = integrate.quad(slope(gaussian), -np.inf, np.inf, args=(width,))
    assert area == pytest.approx(1, abs=1e-5)
  twin = surrogate.straight_through(gaussian)
  expected = jax.grad(jax.grad(lambda x: gaussian(x, 2.0) ** 2))(0.3)
  assert expected != 0
  hessian = jax.hessian(lambda x: twin(x, 2.0) ** 2)(0.3)
  chex.assert_trees_all_close(hessian, expected, rtol=1e-4)


# Names and scales.


def test_every_surrogate_has_a_name():
  assert surrogate.SURROGATES == SPIKES
  assert typing.get_args(surrogate.Name) == tuple(surrogate.SURROGATES)
  x = jnp.linspace(-2, 2, 24).reshape(3, 2, 4)
  known = "'rectangular', .*'fast_sigmoid', got surrogate='atan'"
  for run in (
    neurons.run,
    lambda x, surrogate: neurons.step(None, x, surrogate=surrogate),
    lambda x, surrogate: linen.SpikingNeuron(surrogate=surrogate).init(
      jax.random.key(0), x, True
    ),
    lambda x, surrogate: nnx.SpikingNeuron(num_steps=3, surrogate=surrogate)(x),
    lambda x, surrogate: models.ConvNet(
      surrogate=surrogate, num_steps=3, stages=((2,),)
    ).init(jax.random.key(0), x[..., None, None].repeat(4, -2)),
    lambda x, surrogate: globals()['surrogate'].scaled(surrogate, 2),
    lambda x, surrogate: globals()['surrogate'].straight_through(surrogate),
    lambda x, surrogate: bias.smooth(surrogate),
  ):
    with pytest.raises(ValueError, match=known):
      run(x, surrogate='atan')


def test_a_name_is_the_function():
  x = jnp.linspace(-2, 2, 24).reshape(3, 2, 4)

  def gradient(spike):
    return jax.grad(lambda x: neurons.run(x, surrogate=spike)[0].sum())(x)

  chex.assert_trees_all_equal(gradient('arctan'), gradient(surrogate.arctan))


def test_a_scale_multiplies_the_derivative_alone():
  x = np.linspace(-3, 3, 60)
  spike = surrogate.scaled('fast_sigmoid', 0.08)
  chex.assert_trees_all_equal(spike(x, 0.08), surrogate.sigmoid(x, 1.0))
  with jax.enable_x64(True):  # snnTorch's fast_sigmoid(), Spyx's superspike().
    slopes = slope(spike)(x, 0.08)
  np.testing.assert_allclose(slopes, 1 / (1 + 25 * abs(x)) ** 2, rtol=1e-12)
  assert surrogate.scaled(surrogate.fast_sigmoid, 0.08) is spike
  forward = surrogate.straight_through(spike)
  _, tangent = jax.jvp(lambda x: forward(x, 0.08), (x,), (np.ones(60),))
  np.testing.assert_allclose(tangent, slopes, rtol=1e-4)
