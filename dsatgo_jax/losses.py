"""Losses over time: cross-entropy on the mean logits, TET; regularisers.

The first two give one value per example, so that examples can be left out of
the mean. A mask [T, B] leaves timesteps out: the padding behind a short
recording. Class weights [K] make classes count more or less; with those of
`normalized_weights` the plain mean over a batch is PyTorch's weighted mean.

The regularisers give one number, the mean over the layers that they are given
as an array or a tree of them, such as a dict by name. They are added with a
weight:

    entropy = jnp.mean(losses.cross_entropy(logits, labels))
    loss = entropy + 0.1 * losses.rate_target(rates, 0.15)

Their gradient goes through the spikes, by the surrogate. So the rates are to be
those of the spikes themselves, `firing_rate(spikes)`: what layers sow is a
measurement, without a gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from dsatgo_jax import dtypes


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
  class_weights: ArrayLike | None = None,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Cross-entropy of the mean logits [eq 8].

  `-sum_k target_k * class_weights_k * log p_k`, each class of the smoothed
  target by its own weight, as PyTorch's
  `CrossEntropyLoss(weight, label_smoothing, reduction='none')`.

  Args:
    logits: [T, B, K].
    labels: class indices, [B].
    label_smoothing: the share of the target spread evenly over all classes.
    class_weights: [K], how much a class counts; None for 1 each.
    mask: [T, B], whether a timestep counts; None for all. The loss of an
      example without any is 0.

  Returns:
    One loss per example, [B].

  Raises:
    ValueError: logits are not [T, B, K], labels not [B], the mask not [T, B],
      the weights not [K], or the smoothing is not within [0, 1].
  """
  loss = _cross_entropy(
    prediction(logits, mask), labels, label_smoothing, class_weights
  )
  return loss if mask is None else jnp.where(jnp.any(mask, 0), loss, 0)


def tet(
  logits: jax.Array,
  labels: jax.Array,
  lam: float = 1e-3,
  mean: float = 1.0,
  label_smoothing: float = 0.0,
  *,
  class_weights: ArrayLike | None = None,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Temporal efficient training (Deng et al., ICLR 2022).

  `(1 - lam) * mean_t CE(logits[t], labels) + lam * MSE(logits, mean)`. Class
  weights are those of the cross-entropy; the regulariser knows no classes.

  Args:
    logits: [T, B, K].
    labels: class indices, [B].
    lam: weight of the regulariser.
    mean: the value that the regulariser draws the logits to.
    label_smoothing: the share of the target spread evenly over all classes.
    class_weights: [K], how much a class counts; None for 1 each.
    mask: [T, B], whether a timestep counts; None for all. The loss of an
      example without any is 0.

  Returns:
    One loss per example, [B].

  Raises:
    ValueError: logits are not [T, B, K], labels not [B], the mask not [T, B],
      the weights not [K], or the smoothing is not within [0, 1].
  """
  logits = _checked(logits, mask)
  entropy = jax.vmap(_cross_entropy, (0, None, None, None))(
    logits, labels, label_smoothing, class_weights
  )
  squares = jnp.mean((logits - mean) ** 2, axis=2)
  return _mean((1 - lam) * entropy + lam * squares, mask)


def normalized_weights(
  class_weights: ArrayLike, labels: jax.Array, axis_name=None
) -> jax.Array:
  """Class weights with a mean of 1 over the labels of a batch.

  With them the mean over the batch is the weighted mean of PyTorch's
  `CrossEntropyLoss(weight)`, which divides by the sum of the labels' weights:

      weights = losses.normalized_weights(weights, labels)
      loss = jnp.mean(
        losses.cross_entropy(logits, labels, class_weights=weights)
      )

  Args:
    class_weights: [K], positive.
    labels: class indices, [B].
    axis_name: mapped axis, or axes, over which the batch is spread.

  Returns:
    [K].
  """
  weights = _at_least_float32(class_weights)
  mean = jnp.mean(weights[labels])
  return weights / (lax.pmean(mean, axis_name) if axis_name else mean)


def firing_rate(spikes: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """The share of neurons that fire, with the gradient of their spikes.

  Args:
    spikes: [T, B, ...].
    mask: [T, B], whether an example is real at a timestep; None for all. The
      rate of a timestep without any is 0.

  Returns:
    [T], at least float32.

  Raises:
    ValueError: spikes are not [T, B, ...], or the mask is not [T, B].
  """
  return _over_examples(_at_least_float32(spikes), mask, 'spikes')


def rate_target(rates: Any, target: Any) -> jax.Array:
  """Draws firing rates to a target: the mean of `(rate - target) ** 2`.

  Args:
    rates: of each layer, [T] or any shape: a rate per channel or neuron is one
      target for each. An array or a tree of them.
    target: a number in [0, 1]; or a tree of numbers, one a layer.

  Returns:
    A scalar, the mean over layers.

  Raises:
    ValueError: there is no layer, or not one target for each.
  """
  return _over_layers(lambda rate, t: (rate - t) ** 2, rates, target=target)


def rate_bounds(rates: Any, lower: Any = 0.0, upper: Any = 1.0) -> jax.Array:
  """Keeps firing rates in a range: the mean square of what is beyond it.

  `max(0, lower - rate) ** 2 + max(0, rate - upper) ** 2`. A neuron that is
  silent, but whose membrane enters the surrogate's window, learns to fire.
  Cramer et al. (IEEE TNNLS 33, 2022) bound spike counts from both sides.

  Args:
    rates: of each layer, [T] or any shape; an array or a tree of them.
    lower: a number; or a tree of numbers, one a layer.
    upper: likewise.

  Returns:
    A scalar, the mean over layers.

  Raises:
    ValueError: there is no layer, or not one bound for each.
  """

  def beyond(rate, lower, upper):
    return jax.nn.relu(lower - rate) ** 2 + jax.nn.relu(rate - upper) ** 2

  return _over_layers(beyond, rates, lower=lower, upper=upper)


def rmp(u: Any, theta: Any, mask: jax.Array | None = None) -> jax.Array:
  """Draws membranes to the spikes that they become.

  The mean of `min(x ** 2, (1 - x) ** 2)` for `x = u / (2 theta)`, the squared
  error of quantising x to 0 or 1 at 1/2, which RMP-Loss is to reduce (Guo et
  al., "RMP-Loss: Regularizing Membrane Potential Distribution for Spiking
  Neural Networks", ICCV 2023). Its threshold is 1/2, so that x is u there.
  MPD-Loss (Guo et al., "RecDis-SNN", CVPR 2022) is another of this kind.

  Args:
    u: membranes before the reset, of each layer, [T, B, ...]. An array or a
      tree of them.
    theta: thresholds, positive: a number, or one array a layer that broadcasts
      against u from the left: [T] for one a timestep.
    mask: [T, B], whether an example is real at a timestep; None for all.

  Returns:
    A scalar, the mean over layers.

  Raises:
    ValueError: there is no layer, not one threshold for each, membranes are not
      [T, B, ...] or the mask is not [T, B].
  """

  def error(u, theta):
    if mask is not None and mask.shape == u.shape[:2]:  # Else an error below.
      u = jnp.where(_over(mask, u), u, 0)
    theta = jnp.reshape(theta, theta.shape + (1,) * (u.ndim - theta.ndim))
    x = u / (2 * theta)
    return _over_examples(jnp.where(x < 0.5, x, 1 - x) ** 2, mask, 'u')

  return _over_layers(error, u, theta=theta)


def _at_least_float32(x):
  x = jnp.asarray(x)
  return x.astype(dtypes.wide(x.dtype))


def _over_examples(x, mask, name):
  """The mean of x [T, B, ...] at each timestep, of what is real."""
  if x.ndim < 2:
    raise ValueError(f'Expected {name} [T, B, ...], got shape {x.shape}.')
  if mask is None:
    return jnp.mean(x, range(1, x.ndim))
  if mask.shape != x.shape[:2]:
    raise ValueError(
      f'Expected a mask [T, B] of shape {x.shape[:2]}, got {mask.shape=}.'
    )
  per_example = jnp.mean(jnp.where(_over(mask, x), x, 0), range(2, x.ndim))
  return jnp.sum(per_example, 1) / jnp.maximum(jnp.sum(mask, 1), 1)


def _over_layers(function, arrays, **numbers):
  """The mean over layers of the mean of `function(array, *numbers)`."""
  structure = jax.tree.structure(arrays)
  if not structure.num_leaves:
    raise ValueError(f'Expected at least one layer, got {arrays}.')
  for name, value in numbers.items():
    if jax.tree.structure(value) == jax.tree.structure(0):  # One for all.
      numbers[name] = jax.tree.map(lambda _: value, arrays)  # noqa: B023
    elif jax.tree.structure(value) != structure:
      raise ValueError(
        f'Expected {name} to be a number, or one for each layer as in '
        f'{structure}, got {jax.tree.structure(value)}.'
      )
  terms = jax.tree.map(
    lambda array, *rest: jnp.mean(
      function(*map(_at_least_float32, (array, *rest)))
    ),
    arrays,
    *numbers.values(),
  )
  return jnp.mean(jnp.stack(jax.tree.leaves(terms)))


def _checked(logits, mask):
  """The logits, at least float32."""
  if logits.ndim != 3:
    raise ValueError(f'Expected logits [T, B, K], got {logits.shape=}.')
  if mask is not None and mask.shape != logits.shape[:2]:
    raise ValueError(
      f'Expected a mask [T, B] of shape {logits.shape[:2]}, got {mask.shape=}.'
    )
  logits = logits.astype(dtypes.wide(logits.dtype))
  return logits if mask is None else jnp.where(mask[..., None], logits, 0)


def _mean(x, mask):
  """The mean over time of x [T, B, ...], of what counts."""
  if mask is None:
    return jnp.mean(x, 0)
  real = _over(mask, x)
  count = jnp.maximum(jnp.sum(real, 0, dtype=x.dtype), 1)
  return jnp.sum(jnp.where(real, x, 0), 0) / count


def _over(mask, x):
  """A mask [T, B] with the further axes of x."""
  return jnp.reshape(mask, (*mask.shape, *(1,) * (x.ndim - 2)))


def _cross_entropy(logits, labels, label_smoothing, class_weights):
  if not 0 <= label_smoothing <= 1:
    raise ValueError(
      f'Expected 0 <= label_smoothing <= 1, got {label_smoothing=}.'
    )
  if labels.shape != logits.shape[:1]:
    raise ValueError(
      f'Expected labels of shape {logits.shape[:1]}, got {labels.shape=}.'
    )
  log_p = jax.nn.log_softmax(logits)
  if class_weights is not None:
    weights = jnp.asarray(class_weights, log_p.dtype)
    if weights.shape != logits.shape[1:]:
      raise ValueError(
        f'Expected class_weights [K] of shape {logits.shape[1:]}, got '
        f'{weights.shape}.'
      )
    log_p *= weights
  target = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
  smooth = jnp.mean(log_p, axis=-1)
  return -(1 - label_smoothing) * target - label_smoothing * smooth
