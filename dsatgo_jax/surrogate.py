"""Spikes: Heaviside forward, a surrogate backward.

Every surrogate is a function `spike(x, width)`. Forward it is the Heaviside
step of `x = u - theta` (equality fires); backward its derivative is
`g(x / width) / width` with `g` a density of unit area and `g(0) = 1`, so that
the width alone says how far from the threshold a neuron still learns, and the
gradient at the threshold is `1 / width` for all of them.

    name          g(z)                     where
    rectangular   1 for abs(z) < 1/2       [eq 4], the paper's
    triangular    max(0, 1 - abs(z))       Bellec et al. 2018
    sigmoid       sech(2 z) ** 2           logistic, slope 4
    arctan        1 / (1 + (pi z) ** 2)    Fang et al. 2021
    fast_sigmoid  1 / (1 + 2 abs(z)) ** 2  Zenke & Ganguli 2018

`width` is a traced argument without a gradient. Reverse over reverse is right:
the forward rule calls the surrogate itself, so a second derivative sees the
surrogate and not the bare step. For `jax.jvp`, see `straight_through`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Spike = Callable[..., Any]

# Beyond this many widths every density is zero to float32's precision, and
# its square is still finite.
_FAR = 1e9


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(gradient, x, width):
  """The Heaviside step of x; backward, `gradient(x, width)`."""
  del gradient, width
  return jnp.asarray(x >= 0, jnp.result_type(x))


def _forward(gradient, x, width):
  return _step(gradient, x, width), (x, width)


def _backward(gradient, residuals, cotangent):
  x, width = residuals
  slope = gradient(x, jax.lax.stop_gradient(width))
  return cotangent * slope.astype(cotangent.dtype), jnp.zeros_like(width)


_step.defvjp(_forward, _backward)


def custom(gradient: Spike) -> Spike:
  """Makes a surrogate of its derivative.

  Args:
    gradient: `gradient(x, width)`, the derivative that stands in for the
      step's, of x's shape.

  Returns:
    `spike(x, width)`, which keeps `gradient` as an attribute. Of a function
    with a name in its module it can be pickled, as `gradient` itself could.
  """

  # A plain function, not the custom_vjp itself: that can't be pickled.
  @functools.wraps(gradient)
  def spike(x, width):
    return _step(gradient, x, width)

  spike.gradient = gradient  # type: ignore[attr-defined]
  return spike


def _unit_area(density: Spike) -> Spike:
  """`custom` of `density(x / width) / width`."""

  def gradient(x, width):
    return density(jnp.clip(x / width, -_FAR, _FAR)) / width

  # Not functools.wraps, which would give it the density's signature too.
  for name in ('__module__', '__name__', '__qualname__', '__doc__'):
    setattr(gradient, name, getattr(density, name))
  return custom(gradient)


@custom
def rectangular(x, width):
  """Rectangular surrogate [eq 4]: `1 / width` where `abs(x) < width / 2`.

  Args:
    x: `u - theta`, any shape, floating point.
    width: the surrogate's width, positive; broadcasts against x.

  Returns:
    1 where `x >= 0`, else 0, in x's shape and dtype.
  """
  # A width that is NaN gives a gradient that is.
  return jnp.where(jnp.abs(x) >= width / 2, 0, 1 / width)


@_unit_area
def triangular(z):
  """Triangular surrogate, `max(0, 1 - abs(x / width)) / width`."""
  return jnp.maximum(0, 1 - jnp.abs(z))


@_unit_area
def sigmoid(z):
  """Sigmoid surrogate: the derivative of `logistic(4 x / width)`."""
  return 4 * jax.nn.sigmoid(4 * z) * jax.nn.sigmoid(-4 * z)


@_unit_area
def arctan(z):
  """Arctan surrogate: the derivative of `arctan(pi x / width) / pi`."""
  return 1 / (1 + (jnp.pi * z) ** 2)


@_unit_area
def fast_sigmoid(z):
  """Fast-sigmoid surrogate, `1 / (1 + 2 abs(x / width)) ** 2 / width`."""
  return 1 / (1 + 2 * jnp.abs(z)) ** 2


Name = Literal['rectangular', 'triangular', 'sigmoid', 'arctan', 'fast_sigmoid']

SURROGATES: dict[str, Spike] = {
  spike.__name__: spike
  for spike in (rectangular, triangular, sigmoid, arctan, fast_sigmoid)
}


def get(surrogate: Name | Spike) -> Spike:
  """The surrogate that a setting names.

  Args:
    surrogate: a name of `SURROGATES`, or a function `spike(x, width)`, which is
      returned unchanged.

  Returns:
    A function `spike(x, width)`.

  Raises:
    ValueError: an unknown name.
  """
  if callable(surrogate):
    return surrogate
  if surrogate not in SURROGATES:
    raise ValueError(
      'Expected surrogate to be a function or one of '
      f'{", ".join(map(repr, SURROGATES))}, got {surrogate=}.'
    )
  return SURROGATES[surrogate]


def scaled(spike: Name | Spike, scale: float) -> Spike:
  """A surrogate with its derivative multiplied: an area other than one.

  Of libraries whose derivative peaks at the same height whatever its width.

  Args:
    spike: a surrogate of this module, one made by `custom`, or a name.
    scale: a number, the area.

  Returns:
    A function of the same signature, the same one for the same arguments.
  """
  return _scaled(get(spike), float(scale))


@functools.cache
def _scaled(spike, scale):
  gradient = functools.partial(_times, spike, scale)
  scaled = functools.partial(_spike, gradient)
  scaled.gradient = gradient  # type: ignore[attr-defined]
  return scaled


def _times(spike, scale, x, width):
  return scale * spike.gradient(x, width)


def _spike(gradient, x, width):
  return _step(gradient, x, width)


def straight_through(spike: Name | Spike) -> Spike:
  """The same surrogate for forward mode: `jax.jvp`, `jax.hessian`.

  Equal to `stop_gradient(H(x)) + (S(x) - stop_gradient(S(x)))` with S an
  antiderivative of the surrogate, up to the second derivative. It has no rule
  of its own, since JAX drops that in a scan where forward goes over reverse.
  Layers of neurons that are given it leave their scan to autodiff.

  Args:
    spike: a surrogate of this module, one made by `custom`, or a name.

  Returns:
    A function of the same signature.
  """
  twin = functools.partial(_twin, get(spike))
  twin.forward_mode = True  # type: ignore[attr-defined]
  return twin


def _twin(spike, x, width):
  here, width = jax.lax.stop_gradient((x, width))
  spikes = spike(here, width)
  # The difference of S as a rectangle of no breadth: the midpoint makes its
  # second derivative right too.
  breadth = jnp.where(jnp.isfinite(x), x - here, 0)
  area = breadth * spike.gradient(here + breadth / 2, width)
  return spikes + area.astype(spikes.dtype)
