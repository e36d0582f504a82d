"""Paired tests, by hand and beside SciPy's."""

import numpy as np
import pytest
from scipy import stats

from train import paired


def test_by_hand():
  # Mean 2, deviation sqrt(2.5), error 0.7071; t = 2.8284 of 4 degrees, whose
  # 97.5 % point is 2.7764.
  found = paired.compare([0.0, 1.0, 2.0, 3.0, 4.0])
  assert found.difference == 2
  assert (found.low, found.high) == pytest.approx((0.0368, 3.9632), abs=1e-4)
  assert found.p == pytest.approx(0.0474, abs=1e-4)
  # All ten of the sum; 0 has two signs, and so has the whole: 4 of 32.
  assert found.p_signs == 4 / 32


@pytest.mark.parametrize('n', [2, 3, 5, 10, 20])
def test_beside_scipy(n):
  rng = np.random.default_rng(n)
  a, b = rng.normal(90, 1, n), rng.normal(90.5, 1, n)
  found, expected = paired.compare(a - b), stats.ttest_rel(a, b)
  interval = expected.confidence_interval(0.95)
  assert found.p == pytest.approx(expected.pvalue, rel=1e-10)
  assert found[1:3] == pytest.approx((interval.low, interval.high), rel=1e-10)
  if n > paired.EXACT:
    assert found.p_signs is None
    return
  exact = stats.permutation_test(
    (a, b), lambda a, b, axis: np.mean(a - b, axis), n_resamples=np.inf,
    permutation_type='samples', vectorized=True,
  )  # fmt: skip
  assert found.p_signs == pytest.approx(exact.pvalue, rel=1e-10)


def test_signs_by_hand():
  # |sum| of 1, 2, 3 with any signs: 6, 4, 2, 0 and their negatives.
  assert paired.signs(np.array([1.0, 2.0, 3.0])) == 2 / 8
  assert paired.signs(np.array([-1.0, 2.0, 3.0])) == 4 / 8
  assert paired.signs(np.array([1.0] * 5)) == 2 / 32


@pytest.mark.parametrize(
  'value, p, signs', [(0.0, 1, 1), (0.3, 2 / 2**5, 2 / 2**5)]
)
def test_differences_that_are_all_the_same(value, p, signs):
  found = paired.compare(np.full(5, 90 + value) - 90)
  assert found[:3] == pytest.approx((value,) * 3)
  assert (found.p, found.p_signs) == (p, signs)
  assert paired.word(found.difference, found.p) == 'undecided'


@pytest.mark.parametrize('bad', [[], [1.0], [1.0, np.nan], [1.0, np.inf]])
def test_too_few_or_not_finite(bad):
  with pytest.raises(ValueError, match='expected two finite .*, got'):
    paired.compare(bad)


def test_holm_by_hand():
  # 4 * 0.01; 3 * 0.02; then never less than what came before.
  assert paired.holm([0.03, 0.01, 0.02, 0.9]) == pytest.approx(
    [0.06, 0.04, 0.06, 0.9]
  )
  assert paired.holm([0.6, 0.7]) == [1, 1]
  assert paired.holm([0.04]) == [0.04] and paired.holm([]) == []


def test_the_word():
  assert paired.word(1.0, 0.049) == 'better'
  assert paired.word(-1.0, 0.049) == 'worse'
  assert paired.word(1.0, 0.05) == paired.word(1.0, np.nan) == 'undecided'
