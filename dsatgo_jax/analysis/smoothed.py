"""Spikes that are smooth, with the surrogate as their true derivative."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dsatgo_jax import surrogate

# As in `surrogate`.
_FAR = 1e9


def _rectangular(z):
  return jnp.where(jnp.abs(z) >= 0.5, z > 0, z + 0.5)


def _triangular(z):
  return jnp.where(
    z < 0,
    jnp.maximum(0, 1 + z) ** 2 / 2,
    1 - jnp.maximum(0, 1 - z) ** 2 / 2,
  )


def _sigmoid(z):
  return jax.nn.sigmoid(4 * z)


def _arctan(z):
  return 0.5 + jnp.arctan(jnp.pi * z) / jnp.pi


def _fast_sigmoid(z):
  return 0.5 + z / (1 + 2 * jnp.abs(z))


# Antiderivatives of the densities, of z = x / width.
_INTEGRALS = {
  surrogate.rectangular: _rectangular,
  surrogate.triangular: _triangular,
  surrogate.sigmoid: _sigmoid,
  surrogate.arctan: _arctan,
  surrogate.fast_sigmoid: _fast_sigmoid,
}


def smooth(
  spike: surrogate.Name | surrogate.Spike, integral: Callable | None = None
) -> Callable:
  """The twin of a surrogate that emits its antiderivative instead of spikes.

  Given to a neuron as its `surrogate`, it makes a smooth network whose exact
  gradient has the same form as the surrogate gradient of the spiking one, but
  at other membranes. Its second derivatives are exact as well, and forward mode
  works. Adaptive thresholds and widths are those of the twin's own membranes,
  and held constant by its gradient as ever. A recorded firing rate then is the
  share of outputs that are not zero.

  Args:
    spike: a surrogate of `dsatgo_jax.surrogate`, or its name, or your own.
    integral: of your own, `integral(x, width)`: rises from 0 to 1, with
      `spike.gradient` as its derivative.

  Returns:
    A function of the same signature, with values in [0, 1].

  Raises:
    ValueError: the surrogate is not one of the library's, and has no integral.
  """
  spike = surrogate.get(spike)
  if integral is None:
    if spike not in _INTEGRALS:
      names = ', '.join(named.__name__ for named in _INTEGRALS)
      raise ValueError(f'Expected one of {names}, or an integral, got {spike}.')
    integral = functools.partial(_of_ratio, _INTEGRALS[spike])
  twin = functools.partial(_smooth, integral)
  twin.forward_mode = True  # type: ignore[attr-defined]
  return twin


def _of_ratio(integral, x, width):
  return integral(jnp.clip(x / width, -_FAR, _FAR))


def _smooth(integral, x, width):
  return integral(x, lax.stop_gradient(width)).astype(jnp.result_type(x))
