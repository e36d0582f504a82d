"""What the findings count, by hand."""

import importlib
import json

import numpy as np
import pytest

from findings import pilot, rates, slopes, thresholds
from tests import tiny
from train import loop


def test_slopes_by_hand():
  # Differences 1, 3, 5 of one seed and 2, 2, 2 of another at 8, 19 and 30.
  found = slopes.slopes([8, 19, 30], np.array([[1, 2], [3, 2], [5, 2]]))
  np.testing.assert_allclose(found, [2 / 11, 0], atol=1e-12)


def test_differences_are_paired_by_seed(tmp_path):
  told = {
    'a': {'accuracies': {'0': 90.0, '1': 95.0}},
    'b': {'accuracies': {'1': 94.0, '0': 88.0}},
  }
  path = tmp_path / 'comparison.json'
  path.write_text(json.dumps({'methods': told}))
  np.testing.assert_array_equal(
    slopes.differences(tmp_path, ['a', 'b']), [2, 1]
  )
  with pytest.raises(ValueError, match='of a and c in .*, got a, b'):
    slopes.differences(tmp_path, ['a', 'c'])
  with pytest.raises(ValueError, match='got none'):
    slopes.differences(tmp_path / 'no', ['a', 'b'])


def test_rates_by_hand():
  layers = {
    f'layer{i}': {'firing_rate': [rate, 0.16], 'gradient_share': [share, 0.3]}
    for i, (rate, share) in enumerate([(0.1, 0.2), (0.15, 0.3), (0.2, 0.4)] * 2)
  }
  found = rates.activity([layers])
  # Of each layer's two rates the second one is steady, and 0.15 of two more.
  assert found['rate_steady'] == pytest.approx(100 * 8 / 12)
  assert found['rate_mean'] == pytest.approx(15.5)
  assert (found['rate_lowest'], found['rate_highest']) == (10, 20)
  assert found['share_lowest'] == 20
  assert found['share_last_mean'] == pytest.approx(30)


def test_gradients_by_hand():
  flow = {
    'first': {'u': [3, 4], 'spatial': [3, 0], 'leak': [1, 0], 'reset': [0, 0]},
    'last': {'u': [1, 0], 'spatial': [1, 0], 'leak': [0, 0], 'reset': [1, 0]},
  }
  found = rates.gradients([flow])
  assert found['depth'] == 5
  assert found['time'] == pytest.approx(np.sqrt(10) / 4)
  assert (found['spatial'], found['leak']) == (62.5, 12.5)


def test_one_threshold_a_layer():
  stats = {
    'a': {'running_threshold': np.array([1.0, 3.0])},
    'b': {'running_signal': np.array([[1.0, 2.0], [3.0, 4.0]])},
    'norm': {'mean': np.array([1.0, 3.0])},
  }
  found = thresholds.per_layer(stats)
  np.testing.assert_array_equal(found['a']['running_threshold'], [2, 2])
  np.testing.assert_array_equal(found['b']['running_signal'], [[2, 3], [2, 3]])
  np.testing.assert_array_equal(found['norm']['mean'], [1, 3])


def test_ways_to_infer_of_a_run(tmp_path):
  path = tiny.save(tmp_path / 'data.npz', train=32, test=6)
  result = loop.train(
    tiny.config(data_path=path, num_epochs=1), tmp_path / 'run'
  )
  found = thresholds.accuracies(tmp_path / 'run', [1, 2, 3])
  assert list(found) == [
    thresholds.TRAINED, 'per layer', "the batch's own", 'T = 1', 'T = 3',
  ]  # fmt: skip
  assert found[thresholds.TRAINED] == pytest.approx(100 * result['accuracy'])


def test_a_pilot_leaves_out_the_test_split():
  labels = np.repeat(np.arange(5), 20)
  images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
  found = pilot.split(images, labels)
  assert np.bincount(found['y_test']).tolist() == [4] * 5
  both = np.concatenate([found['x_train'], found['x_test']]).ravel()
  assert sorted(both) == list(range(100))


@pytest.mark.parametrize('name', ['digits', 'mnist', 'events'])
def test_nothing_is_selected_on_the_test_split(name):
  config = importlib.import_module(f'configs.findings.{name}').get_config()
  assert config.validation_fraction == 0
  assert (config.method, config.seed) == ('ds_atgo', 0)
