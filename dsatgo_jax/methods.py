"""The named methods: each one threshold rule and one width rule.

    vanilla              fixed threshold, fixed width
    at                   adaptive threshold [eq 5], fixed width
    tgo                  fixed threshold, width that follows the distribution
    ds_atgo              adaptive threshold, and the width follows it [eq 7]
    mpd_agl              fixed threshold, width from tdBN (IJCAI 2025)
    learnable_threshold  one threshold a layer trained by gradient, fixed width
    ds_atgo_per_channel  ds_atgo with a threshold and a width for each channel
    quantile             an exact share of the neurons fires, whatever their
                         distribution; the width follows
    isometric            adaptive threshold, and a width of 1.8 deviations, with
                         which gradients keep their size in depth
    moving               the threshold goes half of its way to the adaptive one
                         at each timestep, from v_th on; the width follows

A method is data: a new one is a row here, or a `Method` of your own rules
passed where a name is expected.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from dsatgo_jax import quantile, statistics, tdbn, threshold, width

Rule = Callable[..., Any]


class Method(NamedTuple):
  """A threshold rule and a width rule.

  Attributes:
    threshold: `rule(statistics, parameters, t) -> theta`, or with a fourth
      argument, the theta before it.
    width: `rule(signal, parameters, t) -> width`.
    signal: what the width follows, a rule as the threshold's; None where it
      follows nothing.
    measure: what rules get as statistics, `measure(u, axis_name) -> tree` of
      arrays, of the membrane u [B, ...]; with a third argument for what may be
      masked. The statistics pass no gradient.
  """

  threshold: Rule
  width: Rule
  signal: Rule | None = None
  measure: Callable[..., Any] = statistics.measure


Name = Literal[
  'vanilla',
  'at',
  'tgo',
  'ds_atgo',
  'mpd_agl',
  'learnable_threshold',
  'ds_atgo_per_channel',
  'quantile',
  'isometric',
  'moving',
]

_MOVING = threshold.Moving(0.5)

METHODS = {
  'vanilla': Method(threshold.fixed, width.fixed),
  'at': Method(threshold.adaptive, width.fixed),
  'tgo': Method(threshold.fixed, width.threshold_driven, threshold.adaptive),
  'ds_atgo': Method(
    threshold.adaptive, width.threshold_driven, threshold.adaptive
  ),
  'mpd_agl': Method(threshold.fixed, width.mpd_agl),
  'learnable_threshold': Method(threshold.learnable, width.fixed),
  'ds_atgo_per_channel': Method(
    threshold.adaptive,
    width.threshold_driven,
    threshold.adaptive,
    tdbn.per_channel,
  ),
  'quantile': Method(
    threshold.quantile,
    width.threshold_driven,
    threshold.quantile,
    quantile.quantile,
  ),
  'isometric': Method(threshold.adaptive, width.isometric, width.deviation),
  'moving': Method(_MOVING, width.threshold_driven, _MOVING),
}

_DISTRIBUTIONS = {'true': threshold.adaptive, 'estimated': threshold.estimated}
_SIGNALS = {'theta': None, 'sigma': width.deviation}


def get(
  method: Name | Method,
  distribution: Literal['true', 'estimated'] | Rule = 'true',
  width_signal: Literal['theta', 'sigma'] | Rule = 'theta',
) -> Method:
  """The rules of a method.

  Args:
    method: a name of `METHODS`, or a `Method`, which is returned unchanged.
    distribution: where an adaptive method takes its threshold from: 'true',
      the measured distribution of the membrane; 'estimated', the one that tdBN
      promises [eq 5]; or a rule of your own, `rule(statistics, parameters, t)`.
    width_signal: what eq 7 follows: 'theta' as in the paper; 'sigma', the
      membrane's deviation, as in the authors' program; or a rule of your own.

  Returns:
    The `Method`. A setting that the method has no use for changes nothing.

  Raises:
    ValueError: an unknown name, or a threshold rule of your own for a method
      that has no adaptive rule it could replace.
  """
  if isinstance(method, Method):
    return method
  rules = _choose('method', method, METHODS)
  rule = _choose('threshold', distribution, _DISTRIBUTIONS)
  signal = _choose('width_signal', width_signal, _SIGNALS) or rule
  adaptive = threshold.adaptive
  if callable(distribution) and adaptive not in rules:
    raise ValueError(
      "A threshold rule of your own needs an adaptive method: expected 'at', "
      f"'tgo' or 'ds_atgo', got {method=}."
    )
  if rules.threshold is adaptive:
    rules = rules._replace(threshold=rule)
  if rules.signal is adaptive:
    rules = rules._replace(signal=signal)
  return rules


def _choose(name, value, choices):
  if callable(value):
    return value
  if value not in choices:
    raise ValueError(
      f'Expected {name} to be one of {", ".join(map(repr, choices))}, '
      f'got {name}={value!r}.'
    )
  return choices[value]
