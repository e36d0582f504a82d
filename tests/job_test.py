"""The commands, run as a user runs them."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import tiny
from train import checkpoints, evaluate, lock, metrics

ROOT = pathlib.Path(__file__).parent.parent
TINY = (
  '--config=configs/digits.py',
  '--config.dataset=npz',
  '--config.batch_size=8',
  '--config.num_epochs=3',
  '--config.num_steps=2',
  '--config.model_args.stages=((4,),(4,))',
  '--config.validation_fraction=0.25',
  '--config.log_every=1',
  '--config.watch_every=5',
)


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'data.npz'
  return f'--config.data_path={tiny.save(path, train=128, test=21)}'


def start(command, *args, **environment):
  environment = (
    os.environ
    | {
      'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.jax_cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
      'JAX_PLATFORMS': 'cpu',
    }
    | environment
  )
  return subprocess.Popen(
    [sys.executable, '-m', f'train.{command}', *map(str, args)],
    cwd=ROOT, env=environment, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def run(command, *args, **environment):
  """Returns what a command printed, and its log; it must succeed."""
  process = start(command, *args, **environment)
  out, err = process.communicate()
  assert process.returncode == 0, err
  return out, err


def fail(command, *args):
  """Returns the one line that a command ends with."""
  process = start(command, *args)
  out, err = process.communicate()
  assert process.returncode == 1, out + err
  assert out == '' and 'Traceback' not in err
  return err.strip().splitlines()[-1]


@pytest.fixture(scope='module')
def finished(npz, tmp_path_factory):
  """The workdir of a whole run, what it printed, and its log."""
  workdir = tmp_path_factory.mktemp('finished')
  return workdir, *run('main', *TINY, npz, f'--workdir={workdir}')


def test_a_run_prints_its_result_and_times_and_leaves_a_report(finished):
  workdir, out, _ = finished
  result = metrics.read_json(workdir / 'result.json')
  assert f'est accuracy {result["accuracy"]:.2%} (21 examples' in out
  last = out.strip().splitlines()[-1]
  for name in ('import', 'data', 'compile', 'train', 'evaluate', 'report'):
    assert f'{name} ' in last
  assert (workdir / 'report.html').stat().st_size > 10_000
  assert len(list((workdir / 'plots').glob('*.png'))) == 9
  assert list((workdir / 'tensorboard').iterdir())


def test_the_progress_bar(finished):
  last = finished[2].strip().splitlines()[-1]
  for part in ('100%', '288/288', 'images/s', 'loss 0.', 'accuracy '):
    assert part in last


def test_evaluate_gives_the_result_again(finished):
  workdir, *_ = finished
  result = metrics.read_json(workdir / 'result.json')
  found = json.loads(run('evaluate', f'--workdir={workdir}', '--json')[0])
  assert found['step'] == result['step'] == 36
  assert found['num_examples'] == result['num_examples'] == 21
  for name in ('accuracy', 'loss', 'layers', 'confusion'):
    assert found[name] == result[name]
  assert len(found['layers']['conv0']['firing_rate']) == 2
  assert len(found['layers']['conv1']['gradient_share']) == 2


@pytest.mark.sample
def test_evaluate_takes_the_best_and_other_splits(finished):
  workdir, *_ = finished
  options = ('--json', '--checkpoint=best', '--split=validation')
  out, _ = run('evaluate', f'--workdir={workdir}', *options)
  found = json.loads(out)
  best = metrics.read_json(workdir / 'result.json')['best']
  assert (found['step'], found['accuracy']) == (best['step'], best['accuracy'])
  assert (found['split'], found['num_examples']) == ('validation', 32)
  assert found['selected_on'] == 'validation'
  out, _ = run('evaluate', f'--workdir={workdir}', *options[1:])
  assert 'chosen on the validation split' in out.splitlines()[0]


def test_evaluate_needs_no_more_than_a_test_split(finished, tmp_path):
  workdir, *_ = finished
  data_path = metrics.read_json(workdir / 'config.json')['data_path']
  arrays = dict(np.load(data_path))
  new = {name: arrays[name][:9] for name in ('x_test', 'y_test')}
  new['y_test'] = new['y_test'] % 2  # Without the last class.
  found = evaluated(workdir, tmp_path, **new)
  # What the whole file says of the same images.
  expected = evaluated(workdir, tmp_path, **arrays | new)
  assert found == expected and found['num_examples'] == 9

  for change, message in (
    ({'y_test': new['y_test'] + 2}, r'y_test must be in 0\.\.2, got 3'),
    (
      {'x_test': new['x_test'][:, 1:]},
      r'with example_shape \[8, 8, 1\], got \[7, 8, 1\]',
    ),
    ({'x_test': new['x_test'] / 255}, 'with dtype uint8, got float32'),
  ):
    with pytest.raises(ValueError, match=message):
      evaluated(workdir, tmp_path, **new | change)


def evaluated(workdir, folder, **arrays):
  np.savez(folder / 'new.npz', **arrays)
  return evaluate.evaluate(workdir, data_path=str(folder / 'new.npz'))


def test_evaluate_takes_splits_of_other_data(finished, tmp_path):
  workdir, *_ = finished
  few = tiny.save(tmp_path / 'few.npz', train=5, test=2)
  found = evaluate.evaluate(workdir, split='train', data_path=few)
  assert found['num_examples'] == 4  # A quarter of five is held out.


def test_evaluate_does_not_take_changed_data_for_the_runs(
  finished, npz, tmp_path
):
  workdir, *_ = finished
  path = pathlib.Path(npz.split('=')[1])
  whole = path.read_bytes()
  arrays = dict(np.load(path))
  try:
    np.savez(path, **arrays | {'x_test': arrays['x_test'][::-1]})
    with pytest.raises(ValueError, match='test differs .*: choose --data_path'):
      evaluate.evaluate(workdir)
    assert evaluate.evaluate(workdir, data_path=str(path))['num_examples'] == 21
  finally:
    path.write_bytes(whole)


@pytest.mark.sample
def test_what_an_error_recommends_can_be_given(npz, tmp_path):
  data_path = npz.split('=')[1]
  arrays = dict(np.load(data_path))
  arrays['y_train'] = arrays['y_train'] * 2
  np.savez(tmp_path / 'gaps.npz', **arrays)
  gaps = f'--config.data_path={tmp_path / "gaps.npz"}'
  narrow = (flag for flag in TINY if 'model_args' not in flag)
  command = ('plan', *narrow, '--devices=1', '--nocompile', '--json')
  assert fail(*command, gaps).endswith(
    'without gaps, or set config.num_classes'
  )
  given = (
    '--config.num_classes=7',
    '--config.mean=0.5',
    '--config.std=0.25',
    "--config.augment='random_crop:1','flip'",
    "--config.model_args={'stages': ((4,),), 'alpha': 0.5}",
  )
  found = json.loads(run(*command, gaps, *given)[0])
  assert (found['num_classes'], found['num_examples']) == (7, 96)
  line = fail(*command, npz, '--config.model_args.alpha=0.5')
  assert line == "error: expected a field of the config, got 'alpha'"


def test_evaluate_prints_tables(finished):
  workdir, *_ = finished
  out, _ = run('evaluate', f'--workdir={workdir}', '--split=train')
  first, classes, *tables = out.split('\n\n')
  assert '96 train examples; latest checkpoint, step 36' in first
  counts = [int(line.split()[-2]) for line in classes.splitlines()[1:]]
  assert len(counts) == 3 and sum(counts) == 96
  assert len(tables) == 2
  for table in tables:
    title, *rows = table.splitlines()
    assert title.split()[-3:] == ['t=1', 't=2', 'mean']
    assert [row.split()[0] for row in rows] == ['conv0', 'conv1']
    for row in rows:
      first, second, mean = map(float, row.split()[1:])
      assert 0 < first < 100
      assert mean == pytest.approx((first + second) / 2, abs=0.011)


@pytest.mark.sample
def test_evaluate_prints_gradients_and_energy_where_asked(finished):
  workdir, *_ = finished
  out, _ = run('evaluate', f'--workdir={workdir}', '--flow', '--energy')
  first, *tables = out.split('\n\n')
  assert '21 test examples' in first
  titles = [table.split('  ')[0] for table in tables]
  assert titles == [
    'class, taken for',
    'firing rate, %',
    'in the gradient window, %',
    'norm of dL/du, 8 examples',
    'shares of the paths, %',
    'operations, an example',
  ]


def test_the_same_command_again_says_that_the_run_is_finished(finished, npz):
  workdir, first, _ = finished
  before = (workdir / 'metrics.jsonl').read_text()
  out, _ = run('main', *TINY, npz, f'--workdir={workdir}')
  assert 'is finished' in out.splitlines()[0]
  assert 'is finished' not in first
  assert (workdir / 'metrics.jsonl').read_text() == before


@pytest.mark.sample
def test_a_run_in_use_is_read_and_not_touched(finished, npz):
  workdir, *_ = finished
  half_written = (
    checkpoints.directory(workdir, 'latest') / '99.orbax-checkpoint-tmp'
  )
  half_written.mkdir()

  def files():
    return {
      path: path.stat().st_mtime_ns
      for path in workdir.rglob('*')
      if not path.is_relative_to(workdir / 'compiled')
    }

  with lock.hold(workdir):
    before = files()
    line = fail('main', *TINY, npz, f'--workdir={workdir}')
    assert line.startswith(f'error: {workdir} is in use by process')
    assert 'accuracy' in run('evaluate', f'--workdir={workdir}')[0]
    assert files() == before
    assert 'report.html' in run('report', f'--workdir={workdir}')[0]
    assert files().keys() == before.keys()
  half_written.rmdir()


def test_another_config_is_one_line(finished, npz):
  workdir, *_ = finished
  line = fail(
    'main', *TINY, npz, f'--workdir={workdir}', '--config.method=vanilla'
  )
  assert line.startswith('error: config.method differs')
  assert "expected 'ds_atgo', got 'vanilla'" in line


@pytest.mark.parametrize(
  'argument, message',
  [
    ('--config.learning_rte=1', 'error: .*learning_rte.*"learning_rate"'),
    ('--config.neuron.dcay=1', 'error: .*dcay.*"decay"'),
    ('--config.num_epochs=many', 'num_epochs=many: invalid literal for int'),
    ('--config=configs/none.py', "error: .*'configs/none.py'"),
    ('--config.method=at_tgo', "error: .*'ds_atgo'.*got method='at_tgo'"),
    ('--config.model=Net', "error: .*ConvNet.*, got 'Net'"),
    ('--config.batch_size=-8', 'error: .*must be positive, got -8'),
    ('--config.data_path=none.npz', 'error: none.npz'),
    ('more', 'error: expected flags only, got more'),
  ],
)
def test_what_is_wrong_is_one_line(npz, tmp_path, argument, message):
  process = start('main', *TINY, npz, f'--workdir={tmp_path}', argument)
  out, err = process.communicate()
  assert process.returncode == 1
  assert out == '' and 'Traceback' not in err
  assert [line for line in err.splitlines() if re.search(message, line)]
  assert [path.name for path in tmp_path.iterdir()] in ([], ['lock'])


@pytest.mark.sample
def test_commands_without_a_run_are_one_line(tmp_path):
  assert fail('evaluate') == 'error: expected --workdir'
  assert fail('main') == 'error: expected --config'
  message = 'error: expected a run with a latest checkpoint in '
  assert fail('evaluate', f'--workdir={tmp_path}').startswith(message)
  assert fail('report', f'--workdir={tmp_path}').startswith('error: expected a')


@pytest.mark.sample
def test_a_file_in_the_place_of_the_workdir_is_one_line(npz, tmp_path):
  workdir = f'--workdir={tmp_path / "file"}'
  (tmp_path / 'file').touch()
  line = fail('main', *TINY, npz, workdir)
  assert line.startswith('error: expected a workdir that can be written, got')
  for command in 'evaluate', 'report':
    assert fail(command, workdir).startswith('error: expected a run with ')


@pytest.mark.sample
@pytest.mark.parametrize('command', ['main', 'seeds', 'evaluate', 'report'])
def test_help_tells_the_flags_that_are_needed(command):
  process = start(command, '--help')
  out, err = process.communicate()
  assert f'python -m train.{command} ' in out and '--workdir:' in out
  if command in ('main', 'seeds'):
    assert '--config:' in out and '--config.' in out


def arrays_of(workdir):
  state, info = checkpoints.restore(workdir)
  return checkpoints.checksum(state, {}), info


@pytest.mark.slow
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_stopped_resumes_exactly(finished, npz, tmp_path, how):
  command = ('main', *TINY, npz, f'--workdir={tmp_path}')
  process = start(*command)
  while process.poll() is None:
    if (checkpoints.directory(tmp_path, 'latest') / '12').exists():
      process.send_signal(how)
      break
    time.sleep(0.002)
  _, err = process.communicate()
  assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 75}[how]
  stopped = checkpoints.restore(tmp_path)[1]['step']
  assert 12 <= stopped < 36
  if how == signal.SIGTERM:
    assert f'stopped after step {stopped}' in err
  out, _ = run(*command)
  assert f'going on from step {stopped}' in out
  assert arrays_of(tmp_path) == arrays_of(finished[0])
  assert metrics.read(tmp_path) == metrics.read(finished[0])
  assert (
    metrics.read_json(tmp_path / 'result.json')['layers']
    == (metrics.read_json(finished[0] / 'result.json')['layers'])
  )


@pytest.mark.slow
def test_profile(npz, tmp_path):
  out, _ = run(
    'main', *TINY, npz, f'--workdir={tmp_path}', '--config.profile=True'
  )
  assert 'ms a step while traced, the devices at work' in out
  for part in (
    'waiting for the metrics',
    'the next batch',
    'starting the step',
  ):
    assert part in out
  summary = (tmp_path / 'profile' / 'summary.txt').read_text()
  assert summary in out
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


@pytest.mark.slow
def test_seeds(npz, tmp_path):
  out, _ = run('seeds', *TINY, npz, f'--workdir={tmp_path}', '--seeds=3,5')
  results = [
    metrics.read_json(tmp_path / f'seed_{seed}' / 'result.json')
    for seed in (3, 5)
  ]
  first, second = (result['accuracy'] for result in results)
  assert f'seed 5: test accuracy {second:.2%}' in out
  mean = f'mean of 2 seeds: {(first + second) / 2:.2%}'
  assert mean in out.splitlines()[-1]
  configs = [
    metrics.read_json(tmp_path / f'seed_{seed}' / 'config.json')
    for seed in (3, 5)
  ]
  assert [config['seed'] for config in configs] == [3, 5]


@pytest.mark.slow
@pytest.mark.parametrize('dtype, least', [('float32', 98), ('bfloat16', 97)])
def test_digits_reach_what_the_config_says(tmp_path, dtype, least):
  out, _ = run(
    'seeds',
    '--config=configs/digits.py',
    f'--config.dtype={dtype}',
    f'--config.data_dir={tmp_path}/data',
    f'--workdir={tmp_path}/runs',
  )
  mean = re.search(r'mean of 5 seeds: ([\d.]+)%', out.splitlines()[-1])
  assert float(mean[1]) >= least
