"""Threshold rules: what the neurons of a layer fire against at a timestep.

A rule is a plain function `rule(statistics, parameters, t) -> scalar` of the
measured `Statistics`, the neuron's `Parameters` and the timestep's index. A
rule that reads the statistics is averaged over training for inference; one
marked `@unmeasured` is computed anew there, and gets None for statistics.
"""

from typing import Any

import jax
import jax.numpy as jnp


def unmeasured(rule: Any) -> Any:
  """Marks a rule that does not read the statistics."""
  rule.measured = False
  return rule


def is_measured(rule) -> bool:
  """Whether a rule reads the statistics, and so needs a running average."""
  return rule is not None and getattr(rule, 'measured', True)


def adaptive(statistics: Any, parameters: Any, t: Any) -> Any:
  """True distribution: `f_c * (mean + std)` [eq 5, second line].

  Of a constant membrane, zero input's too, it is `f_c` times that constant: all
  of its neurons fire with `f_c = 1`.
  """
  del t
  return parameters.f_c * (statistics.mean + statistics.std)


@unmeasured
def estimated(statistics: Any, parameters: Any, t: Any) -> Any:
  """Estimated distribution [eq 5, first line], without a gradient to decay.

  `f_c * sqrt(1 + decay ** 2) * v_th`.
  """
  del statistics, t
  spread = jnp.sqrt(1 + jax.lax.stop_gradient(parameters.decay) ** 2)
  return parameters.f_c * spread * parameters.v_th


@unmeasured
def fixed(statistics: Any, parameters: Any, t: Any) -> Any:
  """The base value `v_th` at all timesteps."""
  del statistics, t
  return jax.lax.stop_gradient(parameters.v_th)


@unmeasured
def learnable(statistics: Any, parameters: Any, t: Any) -> Any:
  """One `v_th` a layer, trained by gradient with the weights.

  `ds/dtheta = -ds/du`; the DIET-SNN, LTMD and LT-SNN family.
  """
  del statistics, t
  return parameters.v_th
