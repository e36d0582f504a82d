"""The lock of a workdir: whom it keeps out, and when it ends."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest
from absl import logging

from train import lock

HOLD = """
import sys
from train import lock
with lock.hold(sys.argv[1]):
  print('held', flush=True)
  sys.stdin.read()
"""


def test_a_workdir_is_made_and_held_by_one_at_a_time(tmp_path):
  workdir = tmp_path / 'runs' / 'one'
  with lock.hold(workdir), lock.hold(tmp_path / 'runs' / 'two'):
    with pytest.raises(ValueError, match=f'in use by process {os.getpid()} on'):
      with lock.hold(workdir):
        pass
  with lock.hold(workdir):
    pass
  assert [path.name for path in workdir.iterdir()] == ['lock']


def test_a_lock_ends_with_the_process_that_is_killed(tmp_path):
  holder = subprocess.Popen(
    [sys.executable, '-c', HOLD, tmp_path],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
  )  # fmt: skip
  with holder:
    assert holder.stdout.readline() == b'held\n'
    with pytest.raises(ValueError, match=f'in use by process {holder.pid} on'):
      with lock.hold(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with lock.hold(tmp_path):
      pass


def test_a_lock_ends_with_an_error(tmp_path):
  with pytest.raises(FloatingPointError):
    with lock.hold(tmp_path):
      raise FloatingPointError
  with lock.hold(tmp_path):
    pass


@pytest.mark.parametrize('name', ['file', 'file/run', 'taken'])
def test_what_cannot_be_written_is_named(tmp_path, name):
  (tmp_path / 'file').touch()
  (tmp_path / 'taken' / 'lock').mkdir(parents=True)
  with pytest.raises(ValueError, match=rf'can be written, got .*{name}: \w'):
    with lock.hold(tmp_path / name):
      pass


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, caplog):
  def flock(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', flock)
  logging.use_python_logging()
  with caplog.at_level('WARNING'), lock.hold(tmp_path):
    pass
  assert 'cannot be locked ([Errno 37] No locks' in caplog.text
