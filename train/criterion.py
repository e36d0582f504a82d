"""The loss of a run, with the weights of its classes.

`config.class_weights` are K positive numbers, one a class. They weigh losses as
PyTorch's `CrossEntropyLoss(weight, label_smoothing)` does: each class of a
smoothed target by its own weight, and the sum over a batch, of all devices,
divided by the sum of its labels' weights. An evaluation's loss is weighted
likewise, over all of its examples; accuracies never are. To make up for classes
of `N_k` of `N` examples give `N / (K * N_k)`; `train.evaluate --split=train`
tells `N_k`.
"""

import functools
import math

import numpy as np

from dsatgo_jax import losses


def of_example(config):
  """Returns `loss(logits, labels, class_weights=None)`, [B]."""
  return functools.partial(
    getattr(losses, config.loss), label_smoothing=config.label_smoothing
  )


def of_batch(config, num_classes, axis_name):
  """Returns `loss(logits, labels)`, [B], to be averaged over a whole batch.

  Args:
    config: `loss`, `label_smoothing`, `class_weights`.
    num_classes: K.
    axis_name: mapped axis over which the batch is spread.

  Raises:
    ValueError: there is not one positive class weight for each class.
  """
  loss, weights = of_example(config), class_weights(config, num_classes)
  if weights is None:
    return loss

  def weighted(logits, labels):
    normalized = losses.normalized_weights(weights, labels, axis_name)
    return loss(logits, labels, class_weights=normalized)

  return weighted


def class_weights(config, num_classes):
  """Returns `config.class_weights` as [K] float64; None where there are none.

  Raises:
    ValueError: there is not one positive number for each class.
  """
  given = config.get('class_weights')  # A run may be older than the field.
  if given is None:
    return None
  expected = (
    f'config.class_weights must be {num_classes} positive numbers, one a '
    'class, or None'
  )
  if len(given) != num_classes:
    raise ValueError(f'{expected}, got {len(given)}: {tuple(given)}')
  for label, weight in enumerate(given):
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 < weight < math.inf:
      raise ValueError(f'{expected}, got {weight!r} for class {label}')
  return np.array(given, np.float64)
