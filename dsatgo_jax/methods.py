"""The named methods: each one threshold rule and one width rule.

    vanilla              fixed threshold, fixed width
    at                   adaptive threshold [eq 5], fixed width
    tgo                  fixed threshold, width that follows the distribution
    ds_atgo              adaptive threshold, and the width follows it [eq 7]
    mpd_agl              fixed threshold, width from tdBN (IJCAI 2025)
    learnable_threshold  one threshold a layer trained by gradient, fixed width

A method is data: a new one is a row here, or a `Method` of your own rules
passed where a name is expected.
"""

from collections.abc import Callable
from typing import NamedTuple

from dsatgo_jax import threshold, width


class Method(NamedTuple):
  """A threshold rule and a width rule.

  Attributes:
    threshold: `rule(statistics, parameters, t) -> theta`.
    width: `rule(signal, parameters, t) -> width`.
    signal: what the width follows, `rule(statistics, parameters, t)`; None
      where it follows nothing.
  """

  threshold: Callable
  width: Callable
  signal: Callable | None = None


METHODS = {
  'vanilla': Method(threshold.fixed, width.fixed),
  'at': Method(threshold.adaptive, width.fixed),
  'tgo': Method(threshold.fixed, width.threshold_driven, threshold.adaptive),
  'ds_atgo': Method(
    threshold.adaptive, width.threshold_driven, threshold.adaptive
  ),
  'mpd_agl': Method(threshold.fixed, width.mpd_agl),
  'learnable_threshold': Method(threshold.learnable, width.fixed),
}

_THRESHOLDS = {'true': threshold.adaptive, 'estimated': threshold.estimated}


def get(
  method: str | Method,
  *,
  distribution: str = 'true',
  width_signal: str = 'theta',
) -> Method:
  """The rules of a method.

  Args:
    method: a name of `METHODS`, or a `Method`, which is returned unchanged.
    distribution: 'true' takes the measured distribution of the membrane,
      'estimated' the one that tdBN promises [eq 5]; adaptive methods only.
    width_signal: what eq 7 follows: 'theta' as in the paper, or 'sigma' (the
      membrane's deviation) as in the authors' program.

  Returns:
    The `Method`.

  Raises:
    ValueError: an unknown name.
  """
  if isinstance(method, Method):
    return method
  _check_choice('method', method, METHODS)
  _check_choice('threshold', distribution, _THRESHOLDS)
  _check_choice('width_signal', width_signal, ('theta', 'sigma'))
  method = METHODS[method]
  rule, signal = (
    _THRESHOLDS[distribution] if rule is threshold.adaptive else rule
    for rule in (method.threshold, method.signal)
  )
  if signal is not None and width_signal == 'sigma':
    signal = width.deviation
  return Method(rule, method.width, signal)


def _check_choice(name, value, choices):
  if value not in choices:
    raise ValueError(
      f'Expected {name} to be one of {", ".join(map(repr, choices))}, '
      f'got {name}={value!r}.'
    )
