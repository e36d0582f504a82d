"""The training loop's parts, and whole runs inside this process."""

import collections
import concurrent.futures
import functools
import re
import signal

import chex
import numpy as np
import pytest
from absl import logging

from dsatgo_jax import methods
from tests import tiny
from train import (
  checkpoints,
  data,
  ending,
  journal,
  lock,
  loop,
  metrics,
  report,
)
from train import step as step_lib


@pytest.fixture
def npz(tmp_path):
  return tiny.save(tmp_path / 'data.npz', train=64, test=21)


def test_metrics_are_read_after_the_next_step_was_started():
  events = []

  def watch(step, state, batch):
    assert state == step - 1  # Before the step, which gives it away.
    return f'{batch} watched' if step == 2 else None

  def run_step(state, batch):
    events.append(f'start {batch}')
    return state + 1, batch

  def read(step, batch, measured, watched, newest):
    assert batch == measured and newest in (step, step + 1)
    events.append(f'read {watched or measured}')
    return step

  def run(*pauses):
    events.clear()
    return loop.run_steps(
      run_step, watch, 0, iter('abcdef'), range(1, 4), read,
      functools.partial(next, iter(pauses)),
    )  # fmt: skip

  assert run('', '', '') == (3, 'c', 3, '')
  assert events == [
    'start a', 'start b', 'read a', 'start c', 'read b watched', 'read c'
  ]  # fmt: skip
  assert run('', 'save') == (2, 'b', 2, 'save')
  assert events == ['start a', 'start b', 'read a', 'read b watched']


def test_a_threshold_of_zero_or_less_is_warned_of_once(caplog):
  logging.use_python_logging()
  warned = set()
  layers = {'conv0': {'theta': [0.5, 1.0]}, 'conv1': {'theta': [0.5, -0.25]}}
  with caplog.at_level('WARNING'):
    for step in 10, 20:
      journal.warn_of_thresholds(layers, step, warned)
  assert caplog.messages == ['conv1 has a threshold of -0.25 at step 10']


# Whole runs.


def test_a_run_leaves_what_it_promises(npz, tmp_path):
  config = tiny.config(data_path=npz)
  result = loop.train(
    config, tmp_path / 'run', collections.Counter({'import': 2.0})
  )
  lines = metrics.read(tmp_path / 'run')
  # 48 examples in batches of 8; every second step and the ends of epochs.
  assert [line['step'] for line in lines] == list(range(2, 19, 2))
  epochs = [line for line in lines if 'layers' in line]
  assert [line['epoch'] for line in epochs] == [1, 2, 3]
  assert epochs[-1]['train_loss'] < epochs[0]['train_loss']
  for line in epochs:
    assert {'train_accuracy', 'validation_loss'} < set(line)
    assert set(line['layers']['conv1']) == set(step_lib.ACTIVITY)
    assert len(line['layers']['conv1']['theta']) == 2
  timings = metrics.read(tmp_path / 'run', 'timings')
  assert [line['step'] for line in timings] == [6, 12, 18]
  assert all(line['images_per_second'] > 0 for line in timings)
  best = max(epochs, key=lambda line: line['validation_accuracy'])
  assert result == metrics.read_json(tmp_path / 'run' / 'result.json')
  assert result['best'] == {
    'step': best['step'],
    'accuracy': best['validation_accuracy'],
  }
  assert (result['step'], result['num_examples']) == (18, 21)
  assert result['selected_on'] == 'validation'
  assert list(result['seconds']) == [
    'import', 'data', 'compile', 'train', 'evaluate'
  ]  # fmt: skip
  state, info = checkpoints.restore(tmp_path / 'run')
  assert info['step'] == int(state['step']) == 18
  assert info['config']['num_steps'] == 2
  assert info['data']['num_classes'] == 3
  assert info['data']['example_shape'] == [8, 8, 1]
  dataset = data.load(config)
  assert info['data']['mean'] == dataset.mean.tolist()
  assert (
    checkpoints.restore(tmp_path / 'run', 'best')[1]['step'] == (best['step'])
  )


def test_a_workdir_in_use_or_unwritable_ends_before_the_data(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(data, 'load', None)
  with lock.hold(tmp_path / 'run'):
    with pytest.raises(ValueError, match='run is in use by process'):
      loop.train(tiny.config(), tmp_path / 'run')
  (tmp_path / 'file').touch()
  with pytest.raises(ValueError, match='can be written, got .*file: '):
    loop.train(tiny.config(), tmp_path / 'file')


@pytest.mark.sample
def test_a_finished_run_says_so_and_stops(npz, tmp_path, capsys, monkeypatch):
  config = tiny.config(data_path=npz, num_epochs=1)
  result = loop.train(config, tmp_path / 'run')
  assert 'finished' not in capsys.readouterr().out
  monkeypatch.setattr(data, 'load', None)
  assert loop.train(config, tmp_path / 'run') == result
  out = capsys.readouterr().out
  assert 'finished' in out and 'its data were not read again' in out


def test_a_finished_run_looks_at_data_from_elsewhere(npz, tmp_path, capsys):
  config = tiny.config(data_path=npz, num_epochs=1)
  result = loop.train(config, tmp_path / 'run')
  config.data_path = str(tmp_path / 'moved.npz')
  with pytest.raises(ValueError, match='moved.npz: .* is not a file'):
    loop.train(config, tmp_path / 'run')
  arrays = dict(np.load(npz))
  np.savez(config.data_path, **arrays)
  assert loop.train(config, tmp_path / 'run') == result
  out = capsys.readouterr().out
  assert 'finished' in out and 'not read again' not in out
  arrays['y_test'] = arrays['y_test'][::-1]
  np.savez(config.data_path, **arrays)
  with pytest.raises(ValueError, match='data.checksum.test differs from the'):
    loop.train(config, tmp_path / 'run')


def test_a_run_stopped_within_an_epoch_resumes_exactly(
  npz, tmp_path, monkeypatch, capsys
):
  config = tiny.config(data_path=npz)
  expected = loop.train(config, tmp_path / 'whole')

  with monkeypatch.context() as patch:
    tiny.stop_after(9, patch)
    with pytest.raises(SystemExit) as ended:
      loop.train(config, tmp_path / 'parts')
  assert ended.value.code == ending.STOPPED == 75
  assert 'stopped after step 9; the same command' in capsys.readouterr().err
  assert checkpoints.restore(tmp_path / 'parts')[1]['totals']['steps'] == 3
  got = loop.train(config, tmp_path / 'parts')
  for result in expected, got:
    result.pop('seconds')
  assert got == expected
  whole, parts = (
    checkpoints.restore(tmp_path / name) for name in ('whole', 'parts')
  )
  chex.assert_trees_all_equal(whole[0], parts[0])
  assert whole[1] == parts[1]
  for lines in zip(
    *(metrics.read(tmp_path / name) for name in ('whole', 'parts')), strict=True
  ):
    assert lines[0] == lines[1]


def test_a_thread_trains_as_the_main_one_does(npz, tmp_path):
  config = tiny.config(data_path=npz, num_epochs=1)
  handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    got = pool.submit(loop.train, config, tmp_path / 'thread').result()
  expected = loop.train(config, tmp_path / 'main')
  for result in expected, got:
    result.pop('seconds')
  assert got == expected
  assert handlers == [
    signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)
  ]


@pytest.mark.sample
def test_selecting_on_the_test_split_is_labelled(npz, tmp_path):
  config = tiny.config(
    data_path=npz, num_epochs=1, select_on='test', validation_fraction=0.0
  )
  result = loop.train(config, tmp_path)
  assert result['selected_on'] == 'test'
  assert result['best']['accuracy'] == result['accuracy']
  line = metrics.read(tmp_path)[-1]
  assert line['test_accuracy'] == result['accuracy']
  assert 'validation_accuracy' not in line


def test_without_a_validation_part_nothing_is_best(npz, tmp_path):
  config = tiny.config(data_path=npz, num_epochs=1, validation_fraction=0.0)
  result = loop.train(config, tmp_path)
  assert result['best'] is result['selected_on'] is None
  (line,) = [line for line in metrics.read(tmp_path) if 'layers' in line]
  assert 0 < line['layers']['conv0']['firing_rate'][0] < 1
  assert not [name for name in line if name.startswith(('validation', 'test'))]
  assert checkpoints.restore(tmp_path, 'best') is None


@pytest.mark.parametrize(
  'field, value', [('batch_size', 16), ('num_steps', 3), ('seed', 1)]
)
def test_another_config_does_not_resume(npz, tmp_path, field, value):
  config = tiny.config(data_path=npz, num_epochs=1)
  loop.train(config, tmp_path)
  expected = config[field]
  config[field] = value
  with pytest.raises(
    ValueError,
    match=rf'config.{field} differs .*expected {expected}, got {value}',
  ):
    loop.train(config, tmp_path)


@pytest.mark.parametrize(
  'name, change, message',
  [
    ('x_train', lambda x: x // 2, 'data.mean differs .*expected .*, got'),
    ('x_test', lambda x: x // 2, 'data.checksum.test differs .*expected'),
    ('y_test', lambda y: 1 - y % 2, 'data.checksum.test differs .*expected'),
  ],
)
def test_other_data_do_not_resume(npz, tmp_path, name, change, message):
  loop.train(tiny.config(data_path=npz, num_epochs=1), tmp_path / 'run')
  (tmp_path / 'run' / 'result.json').unlink()
  arrays = dict(np.load(npz))
  arrays[name] = change(arrays[name])
  np.savez(tmp_path / 'other.npz', **arrays)
  for path in str(tmp_path / 'other.npz'), npz:  # Elsewhere, and in place.
    np.savez(path, **arrays)
    config = tiny.config(data_path=path, num_epochs=1)
    with pytest.raises(ValueError, match=message):
      loop.train(config, tmp_path / 'run')


@pytest.fixture
def huge(npz):
  """Data with one training image that float32 cannot train on."""
  arrays = dict(np.load(npz))
  for split in 'train', 'test':
    arrays[f'x_{split}'] = arrays[f'x_{split}'].astype(np.float32) / 255
  arrays['x_train'][2] = 3e38
  np.savez(npz, **arrays)
  return tiny.config(data_path=npz, normalize=False, num_epochs=2)


def test_a_step_that_is_not_finite_ends_the_run(huge, tmp_path, monkeypatch):
  monkeypatch.setattr(journal.Journal, 'due', lambda book: True)
  with pytest.raises(FloatingPointError) as raised:
    loop.train(huge, tmp_path)
  step = int(
    re.search(r'finite loss, got nan at step (\d+)', str(raised.value))[1]
  )
  assert 'those of the output of conv0/layer; the batch' in str(raised.value)
  (state, info), (before, _) = (
    checkpoints.expect(tmp_path, which) for which in ('latest', 'nonfinite')
  )
  assert info['step'] == before['step'] == step - 1
  chex.assert_trees_all_equal(state, before)
  with np.load(tmp_path / 'nonfinite.npz') as file:
    batch = dict(file)
  assert batch['image'].shape == (8, 8, 8, 1)
  assert batch['image'].max() == np.float32(3e38)
  assert batch['label'].shape == (8,)


def test_steps_that_are_not_finite_can_be_left_out(huge, tmp_path):
  huge.skip_nonfinite = 1
  with pytest.raises(FloatingPointError, match='not finite'):
    loop.train(huge, tmp_path / 'one')
  huge.skip_nonfinite = 2
  result = loop.train(huge, tmp_path / 'two')
  skipped = [
    line['step']
    for line in metrics.read(tmp_path / 'two')
    if 'loss' not in line
  ]
  assert len(skipped) == 2 and skipped[0] <= 6 < skipped[1]
  state, _ = checkpoints.restore(tmp_path / 'two')
  assert (state['step'], state['skipped']) == (12, 2)
  chex.assert_tree_all_finite(state)
  assert np.isfinite(result['loss'])


@pytest.mark.parametrize(
  'method',
  [
    pytest.param(
      name, marks=[pytest.mark.slow] * (name != 'ds_atgo_per_channel')
    )
    for name in methods.METHODS
  ],
)
def test_every_method_trains_is_watched_and_reported(method, npz, tmp_path):
  config = tiny.config(
    data_path=npz, method=method, num_epochs=1, watch_every=4
  )
  result = loop.train(config, tmp_path / 'run')
  for layer in result['layers'].values():
    assert np.shape(layer['theta']) == np.shape(layer['firing_rate']) == (2,)
  assert report.write(tmp_path / 'run').stat().st_size > 1000
