"""The loss of a run, and the weights of its classes."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsatgo_jax import losses
from tests import tiny
from train import criterion, settings


@pytest.mark.parametrize('devices', [1, 4])
@jax.enable_x64(True)
def test_the_mean_loss_of_devices_is_that_of_the_batch(devices):
  """With class weights, too, though devices have other labels each."""
  config = tiny.config(class_weights=(0.5, 1, 4), label_smoothing=0.1)
  loss = criterion.of_batch(config, 3, 'batch')
  logits = np.random.default_rng(0).normal(0, 2, (2, 8, 3))
  label = np.array([0, 0, 1, 0, 2, 1, 2, 2])

  @functools.partial(
    jax.pmap, axis_name='batch', devices=jax.local_devices()[:devices]
  )
  def mean(logits, label):
    value = jnp.mean(loss(jnp.moveaxis(logits, 1, 0), label))
    return jax.lax.pmean(value, 'batch')

  batch = np.moveaxis(logits, 1, 0).reshape(devices, -1, 2, 3)
  found = mean(batch, label.reshape(devices, -1))
  weights = np.array(config.class_weights)
  each = losses.cross_entropy(logits, label, 0.1, class_weights=weights)
  expected = np.sum(each) / np.sum(weights[label])
  np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
  'given, got',
  [
    ((1, 2), r'got 2: \(1, 2\)'),
    (('balanced',), r"got 1: \('balanced',\)"),
    ((1, 0, 2), 'got 0 for class 1'),
    ((1, 1, -0.5), 'got -0.5 for class 2'),
    ((math.nan, 1, 1), 'got nan for class 0'),
    ((1, math.inf, 1), 'got inf for class 1'),
    ((1, 'x', 1), "got 'x' for class 1"),
    ((1, True, 1), 'got True for class 1'),
  ],
)
def test_class_weights_that_are_not_k_positive_numbers(given, got):
  config = tiny.config(class_weights=given)
  expected = f'config.class_weights must be 3 positive numbers.*{got}'
  with pytest.raises(ValueError, match=expected):
    criterion.class_weights(config, 3)


def test_a_config_older_than_class_weights_has_none():
  config = tiny.config()
  del config.class_weights
  assert criterion.class_weights(config, 3) is None


def test_a_run_keeps_its_class_weights():
  config = tiny.config(class_weights=(1, 2, 4))
  info = {'config': json.loads(json.dumps(config.to_dict()))}
  settings.check_unchanged(info, 'config', config.to_dict())
  for other in None, (1, 2, 4.5):
    config.class_weights = other
    with pytest.raises(ValueError, match='config.class_weights differs'):
      settings.check_unchanged(info, 'config', config.to_dict())
  config.class_weights = None
  del info['config']['class_weights']  # It is older than the field.
  settings.check_unchanged(info, 'config', config.to_dict())
