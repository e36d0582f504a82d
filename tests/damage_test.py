"""Checkpoints damaged on disk: found, set aside, and gone on without."""

import random
import shutil

import chex
import pytest
from absl import logging

from tests import checkpoints_test, tiny
from train import checkpoints, evaluate, loop, metrics

# Orbax's reads go on after the first one of them has failed.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)
SEED = 0
FLIPS = 100


@pytest.mark.sample
def test_a_flipped_byte_is_harmless_or_found(tmp_path, caplog):
  checkpoints_test.save(tmp_path / 'whole', 1, 2)
  newest = checkpoints.directory(tmp_path / 'whole', 'latest') / '2'
  files = [
    path.relative_to(newest)
    for path in sorted(newest.rglob('*'))
    if path.is_file() and path.stat().st_size
  ]
  draw, found = random.Random(SEED), []
  print('seed', SEED)
  logging.use_python_logging()
  for _ in range(FLIPS):
    shutil.copytree(tmp_path / 'whole', tmp_path / 'run')
    folder = checkpoints.directory(tmp_path / 'run', 'latest')
    path = folder / '2' / draw.choice(files)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    caplog.clear()
    with caplog.at_level('WARNING'):
      got = checkpoints.restore(tmp_path / 'run', repair=True)
    step = got[1]['step']
    checkpoints_test.assert_is(got, step)
    assert checkpoints_test.steps_in(tmp_path / 'run') == [1, 2][:step]
    if step == 1:
      found.append(path)
      aside = checkpoints.directory(tmp_path / 'run', 'damaged') / 'latest_2'
      assert (aside / path.relative_to(folder / '2')).read_bytes() == content
      assert f'Damaged checkpoint {folder}/2: ' in caplog.text
      assert f'set aside, as {aside}' in caplog.text
    else:
      assert 'Damaged' not in caplog.text
    shutil.rmtree(tmp_path / 'run')
  print(f'{len(found)} of {FLIPS} were found, the others harmless')
  assert FLIPS // 4 < len(found) < FLIPS


def test_a_checkpoint_goes_when_the_one_that_replaces_it_is_there(tmp_path):
  checkpoints_test.save(tmp_path, 1)
  folder = checkpoints.directory(tmp_path, 'latest')
  # A process was killed before the new checkpoint 1 was there,
  (folder / '1').rename(folder / '1.until.1')
  assert checkpoints.restore(tmp_path) is None
  checkpoints_test.assert_is(checkpoints.restore(tmp_path, repair=True), 1)
  # and after that.
  shutil.copytree(folder / '1', folder / '2.until.1')
  checkpoints_test.assert_is(checkpoints.restore(tmp_path, repair=True), 1)
  assert checkpoints_test.steps_in(tmp_path) == [1]


def largest(folder):
  """The file of a checkpoint that has its arrays."""
  files = [path for path in folder.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


DAMAGES = {
  'truncated': lambda path: largest(path).write_bytes(b'\0'),
  'a file is missing': lambda path: (path / 'state/manifest.ocdbt').unlink(),
  'zeroed': lambda path: [
    file.write_bytes(bytes(file.stat().st_size))
    for file in path.rglob('*')
    if file.is_file()
  ],
  'garbage metadata': lambda path: (path / 'info/metadata').write_bytes(
    b'{"step": 7, \xff'
  ),
}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The config and the workdir of a whole run, and what came out."""
  folder = tmp_path_factory.mktemp('whole')
  config = tiny.config(
    data_path=tiny.save(folder / 'data.npz', train=64, test=21)
  )
  return config, folder / 'run', loop.train(config, folder / 'run')


@pytest.mark.parametrize(
  'damage',
  [
    'garbage metadata',
    pytest.param('truncated', marks=pytest.mark.sample),
    'a file is missing',
    'zeroed',
  ],
)
@pytest.mark.slow
def test_a_run_goes_on_from_the_newest_sound_checkpoint(
  whole, tmp_path, caplog, capsys, damage
):
  config, expected, result = whole
  workdir = tmp_path / 'run'
  shutil.copytree(expected, workdir)
  newest = checkpoints.directory(workdir, 'latest') / '18'
  DAMAGES[damage](newest)
  logging.use_python_logging()
  told = f'Damaged checkpoint {newest}: '
  with caplog.at_level('WARNING'):
    assert evaluate.evaluate(workdir)['step'] == 12
    assert told in caplog.text and newest.exists()
    caplog.clear()
    got = loop.train(config, workdir)
  assert told in caplog.text
  assert f'{workdir}: going on from step 12' in capsys.readouterr().out
  aside = checkpoints.directory(workdir, 'damaged') / 'latest_18'
  assert f'set aside, as {aside}' in caplog.text and aside.is_dir()
  got, result = (
    {name: x for name, x in each.items() if name != 'seconds'}
    for each in (got, result)
  )
  assert got == result
  one, other = (checkpoints.restore(path) for path in (expected, workdir))
  chex.assert_trees_all_equal(one[0], other[0])
  assert one[1] == other[1]
  assert metrics.read(expected) == metrics.read(workdir)


@pytest.mark.sample
def test_a_run_with_damaged_checkpoints_alone_stops(whole, tmp_path):
  config, expected, _ = whole
  workdir = tmp_path / 'run'
  shutil.copytree(expected, workdir)
  folder = checkpoints.directory(workdir, 'latest')
  for step in '12', '18':
    DAMAGES['zeroed'](folder / step)
  before = (workdir / 'metrics.jsonl').read_bytes()
  message = r'expected an intact checkpoint in .*latest.*\[18, 12\].*remove'
  for run in (
    lambda: loop.train(config, workdir),
    lambda: evaluate.evaluate(workdir),
  ):
    with pytest.raises(ValueError, match=message):
      run()
    assert sorted(path.name for path in folder.iterdir()) == ['12', '18']
    assert (workdir / 'metrics.jsonl').read_bytes() == before


@pytest.mark.sample
def test_a_damaged_best_checkpoint_is_set_aside_and_told(
  whole, tmp_path, caplog
):
  config, expected, _ = whole
  workdir = tmp_path / 'run'
  shutil.copytree(expected, workdir)
  shutil.rmtree(checkpoints.directory(workdir, 'latest') / '18')
  (best,) = checkpoints.directory(workdir, 'best').iterdir()
  DAMAGES['truncated'](best)
  logging.use_python_logging()
  with caplog.at_level('WARNING'):
    with pytest.raises(ValueError, match='expected an intact .*best'):
      evaluate.evaluate(workdir, 'best')
    got = loop.train(config, workdir)
  aside = checkpoints.directory(workdir, 'damaged') / f'best_{best.name}'
  assert aside.is_dir()
  for message in (
    f'Damaged checkpoint {best}: ',
    f'set aside, as {aside}',
    'The best checkpoint is lost: the next one will be it',
  ):
    assert message in caplog.text
  assert got['best']['step'] == 18
  assert checkpoints.restore(workdir, 'best')[1]['step'] == 18
