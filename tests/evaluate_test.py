"""What an evaluation adds where asked: gradients and energy."""

import pathlib
import re

import chex
import jax
import numpy as np
import pytest

import train
from dsatgo_jax.analysis import energy
from tests import tiny
from train import checkpoints, evaluate, loop, tables
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
  """As the README shows it."""
  model, variables, images, _ = restored(workdir)
  expected = model.apply(variables, images)
  text = (pathlib.Path(__file__).parent.parent / 'README.md').read_text()
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
    ValueError, match=r"'latest', 'best' or .*18\), got 'old'"
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


def test_tables_of_gradients():
  layers = {
    'conv0': {'u': [3e-7, 4e-7]}, 'a/very/deep/layer': {'u': [None, 0.0]}
  }  # fmt: skip
  paths = 'spatial', 'leak', 'reset'
  shares = {
    'conv0': dict(zip(paths, (0.5, 0.4, 0.1), strict=True)),
    'a/very/deep/layer': dict.fromkeys(paths),
  }
  lines = tables.flow_tables(
    {'num_examples': 8, 'layers': layers, 'shares': shares}
  )
  assert list(lines) == [
    'norm of dL/du, 8 examples       t=1       t=2       all',
    'conv0                      3.00e-07  4.00e-07  5.00e-07',
    'a/very/deep/layer               nan  0.00e+00       nan',
    '',
    'shares of the paths, %  spatial   leak  reset',
    'conv0                     50.00  40.00  10.00',
    'a/very/deep/layer             -      -      -',
  ]


def test_table_of_energy():
  layer = {
    'kind': 'AC', 'rate': 0.25, 'operations': 1.5e6, 'energy': 1.35e6,
    'relu_operations': 6e6, 'relu_energy': 27.6e6,
  }  # fmt: skip
  found = {
    'layers': {'conv0': layer}, 'accumulates': 1.5e6,
    'multiply_accumulates': 5e5, 'energy': 3.65e6, 'relu_operations': 6e6,
    'relu_energy': 27.6e6,
  }  # fmt: skip
  *rows, last = tables.energy_table(found)
  assert [row.split('  ')[0] for row in rows] == [
    'operations, an example', 'conv0', 'total'
  ]  # fmt: skip
  assert rows[1].split() == [
    'conv0', 'AC', '25.00', '1,500.0', '1,350.0', '6,000.0', '27,600.0'
  ]  # fmt: skip
  assert rows[2].split() == [
    'total', '2,000.0', '3,650.0', '6,000.0', '27,600.0'
  ]  # fmt: skip
  assert last == (
    '1,500,000 accumulates (AC) and 500,000 multiply-accumulates (MAC): '
    '13.2% of the energy with ReLU'
  )
