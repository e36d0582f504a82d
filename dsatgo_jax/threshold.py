"""Threshold rules: what the neurons of a layer fire against at a timestep.

A rule is a plain function `rule(statistics, parameters, t) -> theta` of what
was measured (`Statistics`, or what the method's own `measure` gives), the
neuron's `Parameters` and the timestep's index; theta is a scalar, or an array
that broadcasts against [B, ...]. A rule that reads the statistics is averaged
over training for inference; one marked `@unmeasured` is computed anew there,
and gets None for statistics.

A rule with a fourth argument, `rule(statistics, parameters, t, previous)`, also
gets the threshold that was in force one timestep before, `v_th` at first,
without gradient.
"""

import dataclasses
import functools
import inspect
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


@functools.cache
def follows(rule) -> bool:
  """Whether a rule takes the threshold before it, as its fourth argument."""
  kinds = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
  )
  given = inspect.signature(rule).parameters.values()
  return (
    sum(one.kind in kinds and one.default is one.empty for one in given) > 3
  )


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


@dataclasses.dataclass(frozen=True)
class Moving:
  """A rule: a threshold that moves towards the adaptive one within a recording.

  `previous + rate * (adaptive - previous)`, from `v_th` on.

  Attributes:
    rate: which share of the distance it goes at each timestep, in (0, 1].

  Raises:
    ValueError: the rate is out of its range.
  """

  rate: float

  def __post_init__(self):
    if not 0 < self.rate <= 1:
      raise ValueError(f'Expected 0 < rate <= 1, got rate={self.rate}.')

  def __call__(self, statistics, parameters, t, previous):
    """The threshold; see the module."""
    aim = adaptive(statistics, parameters, t)
    return previous + self.rate * (aim - previous)


def quantile(statistics, parameters, t):
  """`f_c` times the quantile that `quantile.quantile` measures."""
  del t
  return parameters.f_c * statistics
