"""Width rules: how far from the threshold the surrogate gradient reaches.

A rule is a plain function `rule(signal, parameters, t) -> scalar` of the
signal that it follows, the neuron's `Parameters` and the timestep's index.
The signal is itself a rule of the statistics (see `threshold`): the adaptive
threshold in the paper, the deviation in the authors' program.
"""

from typing import Any

import jax
import jax.numpy as jnp


def deviation(statistics: Any, parameters: Any, t: Any) -> Any:
  """The width signal of the authors' program: the membrane's deviation."""
  del parameters, t
  return statistics.std


def fixed(signal: Any, parameters: Any, t: Any) -> Any:
  """The base value, `kappa_0`, at all timesteps."""
  del signal, t
  return parameters.width


def threshold_driven(signal: Any, parameters: Any, t: Any) -> Any:
  """TGO [eq 7]: `kappa_0 * (1 + tanh(signal - v_th))`, which stays positive.

  Far below `v_th` the sum would round to zero; it is at least one `eps`.
  """
  del t
  factor = 1 + jnp.tanh(signal - parameters.v_th)
  return parameters.width * jnp.maximum(factor, jnp.finfo(factor.dtype).eps)


def isometric(signal: Any, parameters: Any, t: Any) -> Any:
  """`1.8 * kappa_0 * sigma`: gradients keep their size from layer to layer.

  Of a normal membrane above whose threshold a share p fires, the surrogate's
  mean square is `share / width ** 2`, share being what is inside the window.
  tdBN divides a layer's input by the deviation of what spikes of variance
  `p * (1 - p)` sum up to, and its gradient with it; so depth leaves the mean
  square of gradients as it is where `share / width ** 2` is
  `p * (1 - p) / sigma ** 2`. At `theta = mu + sigma`, p = 0.1587, that is a
  width of 1.8 sigma, and a share of 43 %. Below a hundredth of `v_th` the
  deviation counts as that.

  Own; docs/findings.md.
  """
  del t
  least = 0.01 * jnp.abs(parameters.v_th)
  return 1.8 * parameters.width * jnp.maximum(signal, least)


def mpd_agl(signal: Any, parameters: Any, t: Any) -> Any:
  """MPD-AGL (Jiang et al., IJCAI 2025): the width of tdBN's distribution.

  `2 * gamma * v_th` at the first timestep, then `sqrt(1 + decay ** 2)` times
  that, with `gamma` the mean of the tdBN scale that feeds the neuron. Where
  gamma is not positive there is no such width: it is NaN, and so are gradients.

  Raises:
    ValueError: the neuron was not given that scale.
  """
  del signal
  if parameters.tdbn_scale is None:
    raise ValueError(
      "The method 'mpd_agl' needs the scale of the tdBN that feeds the neuron: "
      'expected tdbn_scale=an array [C], got tdbn_scale=None.'
    )
  gamma = jnp.mean(parameters.tdbn_scale)
  gamma = jnp.where(gamma > 0, gamma, jnp.nan)
  spread = jnp.where(t == 0, 1, jnp.sqrt(1 + parameters.decay**2))
  return jax.lax.stop_gradient(2 * spread * gamma * parameters.v_th)
