"""A run killed with SIGKILL, anywhere and again and again, ends as a whole one.

Each moment is tests/killed.py's; each run goes on from what the one before it
left.
"""

import os
import pathlib
import random
import subprocess
import sys

import chex
import pytest

from tests import tiny
from train import checkpoints, metrics

ROOT = pathlib.Path(__file__).parent.parent
SEED = 0
STEP = 'train.journal:Journal.step'
EPOCH = 'train.journal:Journal.epoch'
LATEST = 'train.journal:Journal.save'
SAVE = 'train.checkpoints:save'
# Orbax renames the info, the state and then the whole.
RENAME, REMOVE = 'os:rename', 'shutil:rmtree'
EVALUATE, READ = 'train.step:evaluate', 'jax:device_get'

OFTEN, RARELY = (
  f' --config.save_every_minutes={minutes}' for minutes in ('1e-6', '0')
)  # A checkpoint after every step, or after every epoch.

COMPILING = 'train.step:compile_step:2+0.02'
DRAWN = '{drawn}' + OFTEN
STOP = f'{EVALUATE}:1!15' + RARELY  # It saves before the evaluation.
# The new one has its parts; the old one, of the same step, is out of the way.
REPLACING = f'{EPOCH}:1>{LATEST}:1>{RENAME}:3' + RARELY

# One after the other; of the tiny run, which `.ci/run` takes,
SAMPLE = {
  'compiling the second program': COMPILING,
  'asked to stop, in an evaluation': STOP,
  'the only checkpoint half replaced': REPLACING,
  'at a time that is drawn': DRAWN,
  'a checkpoint half written': f'{SAVE}:3>{RENAME}:2' + OFTEN,
  'within an evaluation': f'{EVALUATE}:1>{READ}:1',
  'the epoch written, not saved': f'{EPOCH}:1>{LATEST}:1',
  'within the last evaluation': f'{EVALUATE}:2>{READ}:2',
  'within the report': 'train.report:embed:3',
}
# and of the digits.
ALL = {
  'compiling the second program': COMPILING,
  'at a time that is drawn': DRAWN,
  'at another one': DRAWN,
  'asked to stop, in an evaluation': STOP,
  'the best checkpoint half written': (
    f'{EPOCH}:1>{SAVE}:1>{RENAME}:2' + RARELY
  ),
  'the best one saved, the latest not': f'{EPOCH}:1>{LATEST}:1' + RARELY,
  'the latest half replaced': REPLACING,
  'at a third one': DRAWN,
  'a checkpoint half written': f'{SAVE}:2>{RENAME}:1' + OFTEN,
  'a checkpoint all but renamed': f'{SAVE}:3>{RENAME}:3' + OFTEN,
  'an old checkpoint half deleted': (
    f'{SAVE}:4>{REMOVE}:1>os:unlink:12' + OFTEN
  ),
  'within a step': f'{STEP}:3' + OFTEN,
  'within an evaluation': f'{EVALUATE}:1>{READ}:1' + OFTEN,
  'a later best one half written': f'{EPOCH}:1>{SAVE}:1>{RENAME}:2' + OFTEN,
  'a later best one saved, the latest not': f'{EPOCH}:1>{LATEST}:1' + OFTEN,
  'asked to stop, in a step': f'{STEP}:5!15' + RARELY,
  'within the last evaluation': f'{EVALUATE}:2>{READ}:2' + RARELY,
  'the result all but renamed': 'train.metrics:write_json:2>os:replace:1',
  'within the report': 'train.report:embed:3',
  'the report all but written': (
    'train.report:write:1>pathlib:Path.write_text:1'
  ),
}


def environment():
  """What the job's processes are started with."""
  return os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.jax_cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
    'JAX_PLATFORMS': 'cpu',
    'PYTHONUNBUFFERED': '1',
  }


def tiny_flags(data_path):
  """A run of two epochs, of 12 steps each."""
  return (
    '--config=configs/digits.py',
    '--config.dataset=npz',
    f'--config.data_path={data_path}',
    '--config.batch_size=8',
    '--config.num_epochs=2',
    '--config.num_steps=2',
    '--config.model_args.stages=((4,),)',
    '--config.validation_fraction=0.25',
    '--config.log_every=1',
    '--config.watch_every=0',
    '--config.save_every_minutes=0',
  )


def run(moments, *flags):
  """Runs the job once for each moment.

  Returns:
    What each run ended with, and what all of them printed.
  """
  process = subprocess.run(
    [
      sys.executable, '-m', 'tests.killed',
      *(f'--at={moment}' for moment in moments), *flags,
    ],
    cwd=ROOT, env=environment(), text=True, capture_output=True,
  )  # fmt: skip
  print(process.stdout, process.stderr[-5000:])
  ended = [
    int(line.rpartition(' ')[2])
    for line in process.stdout.splitlines()
    if ': ended with ' in line
  ]
  return ended, process.stdout


def kill_everywhere(folder, moments, *flags):
  """Checks that a run that is killed becomes what a whole one is.

  Returns:
    The whole one's workdir.
  """
  draw = random.Random(SEED)
  print('seed', SEED)
  drawn = (
    moment.format(drawn=f'{STEP}:{draw.randint(1, 4)}+{draw.random() / 30:.4f}')
    for moment in moments.values()
  )
  whole, killed = folder / 'whole', folder / 'killed'
  assert run([''], *flags, f'--workdir={whole}')[0] == [0]
  ended, out = run([*drawn, ''], *flags, f'--workdir={killed}')
  expected = [75 if '!15' in moment else -9 for moment in moments.values()]
  assert ended == [*expected, 0]
  # Once there is a checkpoint no run starts from zero.
  _, then = out.split('ended with 75', maxsplit=1)
  resumed = then.count('going on from step') + then.count('is finished')
  assert resumed == len(ended) - 1 - ended.index(75)
  assert_same(whole, killed)
  return whole


def assert_same(expected, got):
  """Checks that two runs left the same, bit by bit, but for times."""
  for which in 'latest', 'best':
    (state, info), (same, told) = (
      checkpoints.restore(workdir, which) for workdir in (expected, got)
    )
    chex.assert_trees_all_equal(state, same)
    assert checkpoints.checksum(state, {}) == checkpoints.checksum(same, {})
    for each in info, told:
      del each['config']['save_every_minutes']
    assert info == told
  results = [
    metrics.read_json(workdir / 'result.json') for workdir in (expected, got)
  ]
  for result in results:
    result.pop('seconds')
  assert results[0] == results[1]
  lines = [
    (workdir / 'metrics.jsonl').read_bytes() for workdir in (expected, got)
  ]
  assert lines[0] == lines[1]
  assert (got / 'report.html').stat().st_size > 10_000
  for left in '*.tmp', '*.orbax-checkpoint-tmp', '*.until.*':
    assert not list(got.rglob(left))


@pytest.mark.sample
def test_a_tiny_run_killed_anywhere_ends_as_a_whole_one(tmp_path):
  data_path = tiny.save(tmp_path / 'data.npz', train=128, test=21)
  kill_everywhere(tmp_path, SAMPLE, *tiny_flags(data_path))


@pytest.mark.slow
def test_the_digits_killed_anywhere_end_as_a_whole_run(tmp_path):
  flags = (
    '--config=configs/digits.py',
    f'--config.data_dir={tmp_path}/data',
    '--config.num_epochs=3',
  )
  whole = kill_everywhere(tmp_path, ALL, *flags)
  # And a second whole one is the same.
  again = tmp_path / 'again'
  assert run([''], *flags, f'--workdir={again}')[0] == [0]
  assert_same(whole, again)
