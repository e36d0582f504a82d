"""Whether one method beats another: paired tests over seeds.

A seed gives two methods the same weights and the same batches, so that their
accuracies are compared seed by seed.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.05
# So many pairs at most have all 2 ** n signs of their differences tried.
EXACT = 16


class Paired(NamedTuple):
  """A comparison of pairs.

  Attributes:
    difference: the mean of the differences.
    low: where its 95 % interval begins, of this comparison alone.
    high: where it ends.
    p: of the paired t test, two-sided.
    p_signs: of the exact test over all signs, two-sided; None past `EXACT`
      pairs. Of n pairs it is at least `2 / 2 ** n`: 0.0625 of five.
  """

  difference: float
  low: float
  high: float
  p: float
  p_signs: float | None


def compare(differences):
  """The paired t test (Student 1908), and the exact one over signs.

  Where all differences are the same they have no deviation: the interval is
  that one number, and p is that of the signs (1 beyond `EXACT`, where they are
  zero, and else `2 / 2 ** n`).

  Args:
    differences: [n], of accuracies with the same seed.

  Returns:
    `Paired`.

  Raises:
    ValueError: less than two, or one is not finite.
  """
  differences = np.asarray(differences, np.float64)
  n = len(differences)
  if n < 2 or not np.isfinite(differences).all():
    raise ValueError(
      f'expected two finite differences or more, got {differences.tolist()}'
    )
  mean, deviation = differences.mean(), differences.std(ddof=1)
  p_signs = signs(differences) if n <= EXACT else None
  # Equal up to rounding, as differences of shares are.
  if deviation <= 1e-12 * max(1, abs(mean)):
    least = 1.0 if abs(mean) <= 1e-12 else 2 / 2**n
    return Paired(float(mean), float(mean), float(mean), least, p_signs)
  error = deviation / math.sqrt(n)
  reach = stats.t.ppf(1 - LEVEL / 2, n - 1) * error
  p = 2 * stats.t.sf(abs(mean) / error, n - 1)
  return Paired(
    float(mean), float(mean - reach), float(mean + reach), float(p), p_signs
  )


def signs(differences):
  """The share of all 2 ** n signs of the differences with as large a mean.

  Fisher's exact randomisation test (1935): what the differences would be if
  which of two methods is which made none.
  """
  n = len(differences)
  choices = np.array(list(itertools.product((-1, 1), repeat=n)))
  sums = np.abs(choices @ differences)
  largest = abs(np.sum(differences))
  return float(np.mean(sums >= largest - 1e-12 * max(1, largest)))


def holm(ps):
  """Adjusts p values for their number (Holm 1979); [n], in their order."""
  ps = np.asarray(ps, np.float64)
  order = np.argsort(ps)
  factors = np.arange(len(ps), 0, -1)
  adjusted = np.empty(len(ps))
  adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * ps[order]))
  return adjusted.tolist()


def word(difference, p, level=LEVEL):
  """'better', 'worse', or 'undecided'.

  Args:
    difference: the mean.
    p: adjusted.
    level: below which p decides.
  """
  if not p < level:
    return 'undecided'
  return 'better' if difference > 0 else 'worse'
