"""Losses over time: cross-entropy on the mean logits, and TET.

Both give one value per example, so that examples can be left out of the mean. A
mask [T, B] leaves timesteps out: the padding behind a short recording.
"""

import jax
import jax.numpy as jnp


def prediction(logits: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """What the network says: the mean of the logits over time [eq 8].

  Args:
    logits: [T, B, K].
    mask: [T, B], whether a timestep counts; None for all. Of an example
      without any the mean is 0.

  Returns:
    [B, K], at least float32.

  Raises:
    ValueError: logits are not [T, B, K], or the mask is not [T, B].
  """
  return _mean(_checked(logits, mask), mask)


def cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  label_smoothing: float = 0.0,
  *,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Cross-entropy of the mean logits [eq 8].

  Args:
    logits: [T, B, K].
    labels: class indices, [B].
    label_smoothing: the share of the target spread evenly over all classes.
    mask: [T, B], whether a timestep counts; None for all. The loss of an
      example without any is 0.

  Returns:
    One loss per example, [B].

  Raises:
    ValueError: logits are not [T, B, K], labels not [B], the mask not [T, B],
      or the smoothing is not within [0, 1].
  """
  loss = _cross_entropy(prediction(logits, mask), labels, label_smoothing)
  return loss if mask is None else jnp.where(jnp.any(mask, 0), loss, 0)


def tet(
  logits: jax.Array,
  labels: jax.Array,
  lam: float = 1e-3,
  mean: float = 1.0,
  label_smoothing: float = 0.0,
  *,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Temporal efficient training (Deng et al., ICLR 2022).

  `(1 - lam) * mean_t CE(logits[t], labels) + lam * MSE(logits, mean)`.

  Args:
    logits: [T, B, K].
    labels: class indices, [B].
    lam: weight of the regulariser.
    mean: the value that the regulariser draws the logits to.
    label_smoothing: the share of the target spread evenly over all classes.
    mask: [T, B], whether a timestep counts; None for all. The loss of an
      example without any is 0.

  Returns:
    One loss per example, [B].

  Raises:
    ValueError: logits are not [T, B, K], labels not [B], the mask not [T, B],
      or the smoothing is not within [0, 1].
  """
  logits = _checked(logits, mask)
  entropy = jax.vmap(_cross_entropy, (0, None, None))(
    logits, labels, label_smoothing
  )
  squares = jnp.mean((logits - mean) ** 2, axis=2)
  return _mean((1 - lam) * entropy + lam * squares, mask)


def _checked(logits, mask):
  """The logits, at least float32."""
  if logits.ndim != 3:
    raise ValueError(f'Expected logits [T, B, K], got {logits.shape=}.')
  if mask is not None and mask.shape != logits.shape[:2]:
    raise ValueError(
      f'Expected a mask [T, B] of shape {logits.shape[:2]}, got {mask.shape=}.'
    )
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  return logits if mask is None else jnp.where(mask[..., None], logits, 0)


def _mean(x, mask):
  """The mean over time of x [T, B, ...], of what counts."""
  if mask is None:
    return jnp.mean(x, 0)
  real = jnp.reshape(mask, (*mask.shape, *(1,) * (x.ndim - 2)))
  count = jnp.maximum(jnp.sum(real, 0, dtype=x.dtype), 1)
  return jnp.sum(jnp.where(real, x, 0), 0) / count


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
