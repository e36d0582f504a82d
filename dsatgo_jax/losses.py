"""Losses over time: cross-entropy on the mean logits, and TET.

Both give one value per example, so that a mask can be applied before the mean.
"""

import jax
import jax.numpy as jnp


def prediction(logits: jax.Array) -> jax.Array:
  """What the network says: the mean of the logits over time [eq 8].

  Args:
    logits: [T, B, K].

  Returns:
    [B, K], at least float32.
  """
  _check(logits)
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  return jnp.mean(logits, axis=0, dtype=dtype)


def cross_entropy(
  logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
  """Cross-entropy of the mean logits [eq 8].

  Args:
    logits: [T, B, K].
    labels: class indices, [B].
    label_smoothing: the share of the target spread evenly over all classes.

  Returns:
    One loss per example, [B].

  Raises:
    ValueError: logits are not [T, B, K], labels not [B], or the smoothing is
      not within [0, 1].
  """
  return _cross_entropy(prediction(logits), labels, label_smoothing)


def tet(
  logits: jax.Array,
  labels: jax.Array,
  lam: float = 1e-3,
  mean: float = 1.0,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Temporal efficient training (Deng et al., ICLR 2022).

  `(1 - lam) * mean_t CE(logits[t], labels) + lam * MSE(logits, mean)`.

  Args:
    logits: [T, B, K].
    labels: class indices, [B].
    lam: weight of the regulariser.
    mean: the value that the regulariser draws the logits to.
    label_smoothing: the share of the target spread evenly over all classes.

  Returns:
    One loss per example, [B].

  Raises:
    ValueError: logits are not [T, B, K], labels not [B], or the smoothing is
      not within [0, 1].
  """
  _check(logits)
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  entropy = jax.vmap(_cross_entropy, (0, None, None))(
    logits, labels, label_smoothing
  )
  squares = jnp.mean((logits - mean) ** 2, axis=(0, 2))
  return (1 - lam) * jnp.mean(entropy, axis=0) + lam * squares


def _check(logits):
  if logits.ndim != 3:
    raise ValueError(f'Expected logits [T, B, K], got {logits.shape=}.')


def _cross_entropy(logits, labels, label_smoothing):
  if not 0 <= label_smoothing <= 1:
    raise ValueError(
      f'Expected 0 <= label_smoothing <= 1, got {label_smoothing=}.'
    )
  if labels.shape != logits.shape[:1]:
    raise ValueError(
      f'Expected labels of shape {logits.shape[:1]}, got {labels.shape=}.'
    )
  log_p = jax.nn.log_softmax(logits)
  target = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
  smooth = jnp.mean(log_p, axis=-1)
  return -(1 - label_smoothing) * target - label_smoothing * smooth
