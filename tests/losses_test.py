"""Losses: one value per example, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from dsatgo_jax import losses

LOGITS = np.random.default_rng(0).normal(0, 3, (4, 5, 7))
LABELS = np.array([0, 6, 3, 3, 1])


def cross_entropy(logits, label_smoothing):
  """Of logits [..., B, K], in NumPy."""
  target = np.eye(7)[LABELS] * (1 - label_smoothing) + label_smoothing / 7
  return -np.sum(target * log_softmax(logits, -1), -1)


@pytest.mark.parametrize('label_smoothing', [0.0, 0.1, 1.0])
@jax.enable_x64(True)
def test_cross_entropy(label_smoothing):
  loss = losses.cross_entropy(jnp.asarray(LOGITS), LABELS, label_smoothing)
  expected = cross_entropy(LOGITS.mean(0), label_smoothing)
  np.testing.assert_allclose(loss, expected, rtol=1e-12)


@pytest.mark.parametrize('lam, mean', [(0, 1), (1e-3, 1), (0.05, 0.5), (1, 1)])
@pytest.mark.parametrize('label_smoothing', [0.0, 0.1])
@jax.enable_x64(True)
def test_tet(lam, mean, label_smoothing):
  loss = losses.tet(jnp.asarray(LOGITS), LABELS, lam, mean, label_smoothing)
  entropy = cross_entropy(LOGITS, label_smoothing).mean(0)
  squares = ((LOGITS - mean) ** 2).mean((0, 2))
  expected = (1 - lam) * entropy + lam * squares
  np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_tet_of_one_timestep_without_weight_is_cross_entropy():
  logits = jnp.float32(LOGITS[:1])
  expected = losses.cross_entropy(logits, LABELS, 0.1)
  tet = losses.tet(logits, LABELS, 0.0, label_smoothing=0.1)
  np.testing.assert_allclose(tet, expected, rtol=1e-6)


@pytest.mark.parametrize('loss', [losses.cross_entropy, losses.tet])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradients_and_dtypes(loss, dtype):
  logits = jnp.asarray(LOGITS, dtype)
  value, gradient = jax.jit(
    jax.value_and_grad(lambda a: loss(a, LABELS).sum())
  )(logits)
  assert value.dtype == jnp.float32 and gradient.dtype == dtype
  assert losses.prediction(logits).dtype == jnp.float32
  # Cross-entropy does not see a shift, and has a zero gradient along it.
  if loss is losses.cross_entropy:
    along = np.float32(gradient).sum(-1)
    np.testing.assert_allclose(along, 0, atol=0.01 * abs(gradient).max())
  extreme = jax.grad(lambda a: loss(a, LABELS).sum())(logits * 1e4)
  assert np.isfinite(np.float32(extreme)).all()


@pytest.mark.parametrize('loss', [losses.cross_entropy, losses.tet])
@jax.enable_x64(True)
def test_a_mask_leaves_timesteps_out(loss):
  """As many losses of recordings of their own length; one of them has none."""
  lengths = [4, 1, 3, 0, 2]
  mask = np.arange(4)[:, None] < lengths
  logits = np.where(mask[..., None], LOGITS, np.nan)
  masked = functools.partial(loss, labels=LABELS, label_smoothing=0.1)
  value, pull = jax.vjp(
    lambda a: masked(a, mask=jnp.asarray(mask)), jnp.asarray(logits)
  )
  expected = [
    loss(jnp.asarray(LOGITS[:length, [i]]), LABELS[[i]], label_smoothing=0.1)[0]
    if length
    else 0.0
    for i, length in enumerate(lengths)
  ]
  np.testing.assert_allclose(value, expected, rtol=1e-12)
  (gradient,) = pull(jnp.ones(5))
  assert not gradient[~mask].any() and gradient[mask].all()
  with pytest.raises(ValueError, match=r'\(4, 5\), got mask.shape=\(5,\)'):
    masked(logits, mask=jnp.ones(5, bool))


@pytest.mark.parametrize('loss', [losses.cross_entropy, losses.tet])
def test_errors(loss):
  logits = jnp.float32(LOGITS)
  with pytest.raises(ValueError, match=r'\[T, B, K\], got .*\(5, 7\)'):
    loss(logits[0], LABELS)
  with pytest.raises(ValueError, match=r'shape \(5,\), got .*\(4,\)'):
    loss(logits, LABELS[:4])
  for value in (-0.1, 1.5):
    with pytest.raises(ValueError, match=f'<= 1, got label_smoothing={value}'):
      functools.partial(loss, label_smoothing=value)(logits, LABELS)
