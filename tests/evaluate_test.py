"""What an evaluation adds where asked: gradients and energy."""

import json
import pathlib
import re

import chex
import jax
import numpy as np
import pytest

import train
from dsatgo_jax import losses
from dsatgo_jax.analysis import energy
from tests import tiny
from train import checkpoints, evaluate, loop
from train import step as step_lib


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run that is tested on 21 examples in batches of 8."""
  workdir = tmp_path_factory.mktemp('run')
  data_path = tiny.save(workdir / 'data.npz', train=64, test=21)
  loop.train(tiny.config(data_path=data_path), workdir)
  return workdir


def restored(workdir):
  """The run's network, its variables, and the test images and labels."""
  state, info = checkpoints.restore(workdir)
  arrays = np.load(workdir / 'data.npz')
  images = step_lib.prepare(
    arrays['x_test'][..., None],
    np.float32(info['data']['mean']),
    np.float32(info['data']['std']),
  )
  variables = {name: state[name] for name in ('params', 'batch_stats')}
  model = step_lib.create_model(tiny.config(), 3)
  return model, variables, images, arrays['y_test']


def test_a_trained_network_in_three_lines(workdir):
  """As docs/howto/train.md shows it."""
  model, variables, images, _ = restored(workdir)
  expected = model.apply(variables, images)
  docs = pathlib.Path(__file__).parent.parent / 'docs'
  text = (docs / 'howto/train.md').read_text()
  block = re.search(r'```python\n(import train\n.*?)```', text, re.DOTALL)[1]
  raw = np.load(workdir / 'data.npz')['x_test'][..., None] / 255
  namespace = {'images': np.float32(raw)}
  exec(block.replace('runs/digits', str(workdir)), namespace)
  np.testing.assert_allclose(namespace['logits'], expected, 1e-5, 1e-5)


def test_any_state_that_is_kept_can_be_loaded(workdir):
  state, _ = checkpoints.restore(workdir)
  best, _ = checkpoints.restore(workdir, 'best')
  for which, expected in (
    ('best', best),
    (int(state['step']), state),
    (int(best['step']), best),
  ):
    model, variables, config = train.load(workdir, which)
    chex.assert_trees_all_equal(variables['params'], expected['params'])
    assert config.num_classes == model.num_classes == 3
  with pytest.raises(
    ValueError, match=r"'latest', 'best', .* or .*18\), got 'old'"
  ):
    train.load(workdir, 'old')
  with pytest.raises(ValueError, match=r'or a step .*18\), got 7'):
    train.load(workdir, 7)
  with pytest.raises(ValueError, match='with a latest checkpoint in .*nowhere'):
    train.load(workdir / 'nowhere')


def test_another_t_than_the_one_trained(workdir):
  whole = evaluate.evaluate(workdir)['layers']['conv0']
  for num_steps in 1, 4:
    found = evaluate.evaluate(workdir, num_steps=num_steps)['layers']['conv0']
    expected = [*whole['theta'], *2 * whole['theta'][-1:]][:num_steps]
    np.testing.assert_allclose(found['theta'], expected, rtol=1e-6)


@pytest.mark.sample
def test_gradients_of_a_batch_that_is_spread_over_the_split(workdir):
  found = evaluate.evaluate(workdir, flow=True)['flow']
  assert found['num_examples'] == 8
  for layer, told in found['layers'].items():
    assert min(told['u']) > 0
    assert told['cosine_spatial_leak'][-1] is None  # JSON has no NaN.
    assert sum(found['shares'][layer].values()) == pytest.approx(1, abs=1e-5)
  # The gradient of the last bias, by hand.
  model, variables, images, labels = restored(workdir)
  chosen = [0, 2, 5, 7, 10, 13, 15, 18]
  logits = model.apply(variables, images[np.array(chosen)]).mean(0)
  target = 0.9 * np.eye(3)[labels[chosen]] + 0.1 / 3
  residual = np.asarray(jax.nn.softmax(logits)) - target
  assert found['gradient_norm']['classifier/bias'] == pytest.approx(
    np.linalg.norm(residual.mean(0)), rel=1e-4
  )


def test_a_split_smaller_than_the_devices_has_no_batch(workdir, tmp_path):
  few = tiny.save(tmp_path / 'few.npz', train=5, test=2)
  with pytest.raises(ValueError, match='for each of 4 devices, got 2'):
    evaluate.evaluate(workdir, data_path=few, flow=True)


def test_energy_is_counted_over_the_whole_split_without_padding(workdir):
  found = evaluate.evaluate(workdir, energy=True)['energy']
  model, variables, images, _ = restored(workdir)
  expected = energy.measure(model.apply, variables, images, num_steps=2)
  layers = found.pop('layers')
  assert found == pytest.approx(
    {name: x for name, x in expected._asdict().items() if name != 'layers'}
  )
  assert list(layers) == ['conv0', 'conv1', 'classifier']
  for name, told in expected.layers.items():
    assert layers[name.removesuffix('/layer')] == told._asdict()


@pytest.mark.sample
def test_predictions_are_those_of_the_network(workdir, tmp_path):
  path = tmp_path / 'test.npz'
  found = evaluate.evaluate(workdir, predictions=path)
  assert found == evaluate.evaluate(workdir)
  json.dumps(found, allow_nan=False)
  model, variables, images, labels = restored(workdir)
  logits = model.apply(variables, images).mean(0)
  written = np.load(path)
  np.testing.assert_array_equal(written['label'], labels)
  np.testing.assert_allclose(written['logits'], logits, 1e-5, 1e-5)
  right = written['predicted'] == labels
  assert found['accuracy'] == pytest.approx(right.mean())
  expected = [right[labels == label].mean() for label in range(3)]
  assert found['class_accuracy'] == pytest.approx(expected)
  assert np.trace(found['confusion']) == right.sum()
  # 18 steps: the running averages still hold 0.9 ** 18 of their start.
  assert 'hold 15% of what they started from' in found['warnings'][0]


@pytest.mark.sample
def test_a_run_with_class_weights_is_evaluated_with_them(workdir, tmp_path):
  data_path = str(workdir / 'data.npz')
  config = tiny.config(
    data_path=data_path, num_epochs=1, class_weights=(0.5, 1, 4)
  )
  result = loop.train(config, tmp_path / 'run')
  found = evaluate.evaluate(tmp_path / 'run', predictions=tmp_path / 'test.npz')
  assert found['loss'] == result['loss']
  written = np.load(tmp_path / 'test.npz')
  weights = losses.normalized_weights((0.5, 1, 4), written['label'])
  expected = losses.cross_entropy(
    written['logits'][None], written['label'], 0.1, class_weights=weights
  )
  assert found['loss'] == pytest.approx(float(expected.mean()), rel=1e-5)
  # The same, on a batch, is what gradients are of.
  flow = evaluate.evaluate(tmp_path / 'run', flow=True)['flow']
  chosen = np.array([0, 2, 5, 7, 10, 13, 15, 18])
  logits, label = written['logits'][None, chosen], written['label'][chosen]
  weights = losses.normalized_weights((0.5, 1, 4), label)

  def mean(bias):
    return losses.cross_entropy(
      logits + bias, label, 0.1, class_weights=weights
    ).mean()

  slope = jax.grad(mean)(np.zeros(3, np.float32))
  assert flow['gradient_norm']['classifier/bias'] == pytest.approx(
    float(np.linalg.norm(slope)), rel=1e-4
  )
