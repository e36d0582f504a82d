"""Checkpoints: what comes back is what was saved, or nothing."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from train import checkpoints


def state_at(step):
  return {
    'step': np.int32(step),
    'params': {
      'kernel': np.arange(600, dtype=np.float32).reshape(20, 30) + step,
      'half': np.full((3,), step, jnp.bfloat16),
    },
    'opt_state': {'0': {}, '1': {'trace': np.float64(step) / 3}},
  }


def info_at(step):
  return {
    'step': step,
    'best': {'step': 1, 'accuracy': 1 / 3},
    'config': {'augment': ('flip',), 'mean': None, 'neuron': {'decay': 0.2}},
  }


def save(workdir, *steps, which='latest'):
  with checkpoints.manager(workdir, which) as manager:
    for step in steps:
      checkpoints.save(manager, state_at(step), info_at(step))
      manager.wait_until_finished()


def steps_in(workdir, which='latest'):
  folder = checkpoints.directory(workdir, which)
  return sorted(int(path.name) for path in folder.iterdir())


def assert_is(found, step):
  state, info = found
  expected = state_at(step)
  assert info == info_at(step) | {
    'config': info_at(step)['config'] | {'augment': ['flip']}
  }
  assert checkpoints.checksum(state, {}) == checkpoints.checksum(expected, {})
  np.testing.assert_array_equal(
    state['params']['kernel'], expected['params']['kernel']
  )
  assert state['params']['half'].dtype == jnp.bfloat16
  assert state['opt_state']['0'] == {}


def test_nothing_there_is_none(tmp_path):
  assert checkpoints.restore(tmp_path) is None
  assert list(tmp_path.iterdir()) == []
  with checkpoints.manager(tmp_path, 'latest'):
    pass
  assert checkpoints.restore(tmp_path) is None


def test_keeps_two_of_the_latest_and_one_best(tmp_path):
  save(tmp_path, 1, 2, 3)
  save(tmp_path, 1, 2, which='best')
  assert steps_in(tmp_path) == [2, 3]
  assert steps_in(tmp_path, 'best') == [2]
  assert_is(checkpoints.restore(tmp_path), 3)
  assert_is(checkpoints.restore(tmp_path, 'best'), 2)


def test_saving_copies(tmp_path):
  state = state_at(5)
  with checkpoints.manager(tmp_path, 'latest') as manager:
    checkpoints.save(manager, state, info_at(5))
    state['params']['kernel'][:] = -1
  assert_is(checkpoints.restore(tmp_path), 5)


def test_saving_an_earlier_step_replaces_what_came_after_it(tmp_path):
  save(tmp_path, 3, which='best')
  save(tmp_path, 2, which='best')
  assert steps_in(tmp_path, 'best') == [2]
  save(tmp_path, 2, which='best')
  assert_is(checkpoints.restore(tmp_path, 'best'), 2)


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(content)


DAMAGES = {
  'flipped': flip,
  'truncated': lambda path: path.write_bytes(path.read_bytes()[:-7]),
  'emptied': lambda path: path.write_bytes(b''),
  'removed': lambda path: path.unlink(),
}


# Orbax's reads go on after the first one of them has failed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('damage', DAMAGES)
def test_damage_anywhere_never_gives_a_wrong_state(tmp_path, damage):
  save(tmp_path / 'whole', 1, 2)
  newest = checkpoints.directory(tmp_path / 'whole', 'latest') / '2'
  files = [
    path.relative_to(newest)
    for path in sorted(newest.rglob('*'))
    if path.is_file() and path.stat().st_size
  ]
  fell_back = set()
  for number, name in enumerate(files):
    workdir = tmp_path / str(number)
    shutil.copytree(tmp_path / 'whole', workdir)
    DAMAGES[damage](checkpoints.directory(workdir, 'latest') / '2' / name)
    found = checkpoints.restore(workdir, repair=True)
    step = found[1]['step']
    assert_is(found, step)
    if step == 1:
      fell_back.add(name.parts[0])
      assert steps_in(workdir) == [1]
      save(workdir, 2)
      assert_is(checkpoints.restore(workdir), 2)
  assert {'state', 'info'} <= fell_back


def test_damage_is_told_and_kept_unless_repairing(tmp_path, caplog):
  save(tmp_path, 1, 2)
  folder = checkpoints.directory(tmp_path, 'latest')
  flip(folder / '2' / 'info' / 'metadata')
  logging.use_python_logging()
  with caplog.at_level('WARNING'):
    assert_is(checkpoints.restore(tmp_path), 1)
  assert f'Damaged checkpoint {folder}/2' in caplog.text
  assert steps_in(tmp_path) == [1, 2]


# Orbax's reads go on after the first one of them has failed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_what_a_run_replaces_while_it_is_read_is_read_again(
  tmp_path, monkeypatch
):
  save(tmp_path, 1)
  read = checkpoints._read

  def slow(manager, step):
    if step == 1:
      shutil.rmtree(checkpoints.directory(tmp_path, 'latest') / '1')
      save(tmp_path, 2)
    return read(manager, step)

  monkeypatch.setattr(checkpoints, '_read', slow)
  assert_is(checkpoints.restore(tmp_path), 2)


def test_damaged_checkpoints_alone_are_an_error_and_stay(tmp_path):
  save(tmp_path, 1, 2)
  folder = checkpoints.directory(tmp_path, 'latest')
  for step in '1', '2':
    flip(folder / step / 'info' / 'metadata')
  with pytest.raises(ValueError, match=r'intact checkpoint.*\[2, 1\]'):
    checkpoints.restore(tmp_path, repair=True)
  assert steps_in(tmp_path) == [1, 2]


def test_half_written_checkpoints_are_ignored_and_cleared(tmp_path):
  save(tmp_path, 1)
  folder = checkpoints.directory(tmp_path, 'latest')
  torn = folder / '2.orbax-checkpoint-tmp'
  shutil.copytree(folder / '1', torn)
  assert_is(checkpoints.restore(tmp_path), 1)
  assert torn.exists()
  assert_is(checkpoints.restore(tmp_path, repair=True), 1)
  assert not torn.exists()
