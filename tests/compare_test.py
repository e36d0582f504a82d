"""The comparison of methods: what is run, what is said, what is written."""

import csv
import itertools
import json
import pathlib
import signal
import time

import jax
import numpy as np
import pytest

from configs import digits
from tests import job_test, tiny
from train import compare, data, jobs, metrics, step

METHODS = 'vanilla', 'ds_atgo', 'mpd_agl', 'learnable_threshold'


def test_a_method_has_settings_of_its_own():
  config = digits.get_config()
  found = compare.varied(
    config, 'ds_atgo+threshold=estimated+f_c=2+num_steps=6+cut=["reset"]'
  )
  assert found.method == 'ds_atgo' and found.num_steps == 6
  assert (found.neuron.threshold, found.neuron.f_c) == ('estimated', 2.0)
  assert found.model_args.cut == ('reset',)
  assert config == digits.get_config()
  assert compare.varied(config, 'ds_atgo') == config


@pytest.mark.parametrize(
  'method, message',
  [
    ('atgo', "expected methods of vanilla, at, .*, got 'atgo'"),
    ('at+f_c', r"expected NAME\+FIELD=VALUE .*, got 'at\+f_c'"),
    ('at+seed=3', 'other than seed and method'),
    ('at+num_epochs=many', r'at\+num_epochs=many: .*int'),
  ],
)
def test_a_setting_that_cannot_be(method, message):
  with pytest.raises(ValueError, match=message):
    compare.varied(digits.get_config(), method)


def test_pairs():
  assert compare.pairs_of('abc', 'first') == [('b', 'a'), ('c', 'a')]
  assert compare.pairs_of('abc', 'previous') == [('b', 'a'), ('c', 'b')]
  assert compare.pairs_of('abc', 'all') == [('b', 'a'), ('c', 'a'), ('c', 'b')]


def test_the_comparison_by_hand():
  found = compare.compared(
    {
      'a': {0: 90.0, 1: 91.0, 2: 92.0},
      'b': {0: 95.0, 1: 96.1, 2: 96.9},
      'c': {0: 90.0, 1: 91.0, 2: 92.0},
    }
  )
  assert found['methods']['a']['mean'] == 91
  assert found['methods']['a']['deviation'] == 1
  first, second = found['pairs']
  # 5, 5.1, 4.9: error 0.1 / sqrt(3), t = 86.6; 97.5 % of 2 degrees: 4.3027.
  assert first['difference_percent'] == pytest.approx(5)
  assert first['low_percent'] == pytest.approx(5 - 4.3027 * 0.05774, abs=1e-4)
  assert first['p'] == pytest.approx(1.333e-4, rel=1e-3)
  assert first['p_holm'] == 2 * first['p'] and first['p_signs'] == 0.25
  assert (first['word'], second['word']) == ('better', 'undecided')
  table, pairs = '\n'.join(compare.lines(found)).split('\n\n')
  assert table.splitlines()[1].split() == [
    'a', '91.00', '1.00', '90.00', '91.00', '92.00',
  ]  # fmt: skip
  assert '+5.00  +4.75 to +5.25  0.0001    0.0003' in pairs
  json.dumps(found)


def test_the_same_seed_shows_every_method_the_same_batches(tmp_path):
  path = tiny.save(tmp_path / 'data.npz', train=32, test=6)
  base = tiny.config(data_path=path, seed=3)
  seen = []
  for method in METHODS:
    config = compare.varied(base, method)
    batches = data.train_batches(data.load(config).train, config)
    seen.append(list(itertools.islice(batches, 4)))
  for other in seen[1:]:
    jax.tree.map(np.testing.assert_array_equal, seen[0], other)


@pytest.mark.sample
def test_the_same_seed_gives_every_method_the_same_weights():
  base = tiny.config(seed=3)

  def weights(config):
    state, _ = step.create_train_step(
      config,
      {'num_classes': 3, 'example_shape': (8, 8, 1), 'mean': 0.0, 'std': 1.0},
      steps_per_epoch=2,
    )
    return {
      jax.tree_util.keystr(path): np.asarray(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
      if np.ndim(leaf) > 1
    }

  first, *others = (weights(compare.varied(base, name)) for name in METHODS)
  assert len(first) == 3
  for other in others:
    jax.tree.map(np.testing.assert_array_equal, first, other)
  base.seed = 4
  assert any((first[name] != a).any() for name, a in weights(base).items())


def test_cores_are_shared(monkeypatch):
  monkeypatch.setattr('os.sched_getaffinity', lambda _: {0, 2, 3, 5, 7})
  shares = [jobs.share_of_cores(slot, 2) for slot in range(2)]
  assert shares == [[0, 3, 7], [2, 5]]
  assert jobs.share_of_cores(6, 7) == [2]
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert jobs.default_jobs() == 5


def test_what_is_finished_is_not_run_again(tmp_path):
  run = jobs.Run('at', tmp_path, compare.varied(digits.get_config(), 'at'))
  assert not jobs.is_finished(run)
  metrics.write_json(tmp_path / 'config.json', run.config.to_dict())
  assert not jobs.is_finished(run)
  metrics.write_json(tmp_path / 'result.json', {'accuracy': 0.5})
  assert jobs.is_finished(run)
  jobs.train([run], 1, 'train.compare', tmp_path)  # Starts nothing.
  assert not (tmp_path / 'config.py').exists()
  run.config.num_epochs += 1
  assert not jobs.is_finished(run)


def test_the_config_that_is_written_is_that_of_the_run():
  config = compare.varied(digits.get_config(), 'at+f_c=0.5')
  fields = config.to_dict()
  space = {}
  exec(jobs.CONFIG.format(command='x', fields=fields), space)
  assert space['get_config']().to_dict() == fields


FLAGS = '--methods=vanilla,ds_atgo', '--seeds=2', '--jobs=2'


@pytest.mark.sample
def test_a_comparison_resumes_and_runs_nothing_twice(tmp_path):
  path = tiny.save(tmp_path / 'data.npz', train=128, test=21)
  folder = tmp_path / 'runs'
  command = (
    'compare', *job_test.TINY, f'--config.data_path={path}',
    f'--workdir={folder}', *FLAGS,
  )  # fmt: skip
  process = job_test.start(*command)
  logs = folder / 'vanilla' / 'seed_0' / 'metrics.jsonl'
  while process.poll() is None and not logs.exists():
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  _, stopped = process.communicate()
  assert process.returncode == 75, stopped
  assert 'of 4 runs done; the same command resumes' in stopped

  _, err = job_test.run(*command)
  said = stopped + err  # One may have been faster than the signal.
  for method in 'vanilla', 'ds_atgo':
    for seed in 0, 1:
      result = metrics.read_json(folder / method / f'seed_{seed}/result.json')
      assert said.count(f'{method}, seed {seed}: test accuracy') == 1
      found = metrics.read_json(folder / 'comparison.json')
      told = found['methods'][method]['accuracies'][str(seed)]
      assert told == 100 * result['accuracy']
  rows = list(
    csv.DictReader((folder / 'comparison.csv').read_text().splitlines())
  )
  assert [row['method'] for row in rows] == ['vanilla', 'ds_atgo']
  assert float(rows[0]['mean']) == found['methods']['vanilla']['mean']
  pictures = {path.name for path in (folder / 'figures').iterdir()}
  for name in '06_curves', '08_firing_rate', '11_gradient_share', 'pairs':
    assert {f'{name}.png', f'{name}.svg', f'{name}.csv'} <= pictures

  before = times(folder)
  gone = folder / 'vanilla' / 'seed_1'
  result = (gone / 'result.json').read_text()
  gone.rename(tmp_path / 'gone')
  out, err = job_test.run(*command, '--pairs=previous', '--json')
  assert '3 of 4 runs are finished: not run again' in err
  assert err.count('test accuracy ') == 1
  assert json.loads(out) == metrics.read_json(folder / 'comparison.json')
  again = json.loads((gone / 'result.json').read_text())
  assert again['accuracy'] == json.loads(result)['accuracy']
  after = times(folder)
  changed = {path for path in before if before[path] != after[path]}
  assert {path.parent.name for path in changed} == {'seed_1'}
  assert {path.parent.parent.name for path in changed} == {'vanilla'}


def times(folder):
  return {
    path: path.stat().st_mtime_ns for path in folder.glob('*/*/result.json')
  }


@pytest.mark.sample
def test_what_is_wrong_with_a_comparison_is_one_line(tmp_path):
  path = tiny.save(tmp_path / 'data.npz', train=32, test=6)
  given = (
    '--config=configs/digits.py', '--config.dataset=npz',
    f'--config.data_path={path}', f'--workdir={tmp_path}',
  )  # fmt: skip
  for flags, message in (
    (('--seeds=1',), 'error: expected --seeds of 2 or more, got 1'),
    (('--methods=at',), 'error: expected --methods, two or more, each once'),
    (('--jobs=0',), 'error: expected --jobs of 1 or more, got 0'),
    (('--methods=at,it',), 'error: expected methods of vanilla, at'),
  ):
    assert job_test.fail('compare', *given, *flags).startswith(message)
  none = f'--config.data_path={tmp_path / "none.npz"}'
  assert 'none.npz' in job_test.fail('compare', *given, none, *FLAGS)
  wrong = '--config.learning_rate=-1'
  process = job_test.start('compare', *given, *FLAGS, '--jobs=1', wrong)
  out, err = process.communicate()
  assert process.returncode == 1
  assert out == '' and err.count('ended with an error') == 1
  assert err.splitlines()[-1].startswith(
    'error: expected every run to come to its end, got vanilla, seed 0: '
    'config.learning_rate must be positive'
  )
  assert not list(pathlib.Path(tmp_path).glob('*/*/result.json'))
