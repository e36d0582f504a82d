"""How a run ends before it is through."""

import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from tests import tiny
from train import checkpoints, command, ending, journal, loop, metrics


def send(number):
  os.kill(os.getpid(), number)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_and_handlers_come_back(number, capsys):
  before = signal.getsignal(number)
  with ending.signals() as stopping:
    assert not stopping()
    send(number)
    assert stopping() and stopping()
    # A second one would end the process at once.
    assert signal.getsignal(number) == before
  assert signal.getsignal(number) == before
  assert capsys.readouterr().err == ''


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_before_the_first_step_a_signal_ends_the_process(number, capsys):
  with pytest.raises(SystemExit) as ended, ending.signals():
    send(number)
    time.sleep(1)  # Where the handler runs, at the latest.
  assert ended.value.code == 75
  assert 'before the first step; the same command' in capsys.readouterr().err


def test_another_thread_hears_nothing():
  found = []

  def listen():
    with ending.signals() as stopping:
      found.append(stopping())

  before = signal.getsignal(signal.SIGTERM)
  thread = threading.Thread(target=listen)
  thread.start()
  thread.join()
  assert found == [False] and signal.getsignal(signal.SIGTERM) == before


HANGS = """
import time
from train import ending
with ending.watchdog(0.01) as beat:
  for _ in range(5):
    time.sleep(0.2)
    beat()
  print('alive', flush=True)
  def waits_for_another():
    time.sleep(60)
  waits_for_another()
"""


@pytest.mark.sample
def test_the_watchdog_ends_what_hangs_and_nothing_else():
  process = subprocess.run(
    [sys.executable, '-c', HANGS], capture_output=True, text=True, check=False
  )
  assert process.returncode == ending.HUNG == 70
  assert process.stdout == 'alive\n'
  assert 'in waits_for_another' in process.stderr
  assert process.stderr.splitlines()[-1].startswith('error: expected a step')


def test_without_minutes_nothing_is_watched():
  before = threading.active_count()
  with ending.watchdog(0) as beat:
    beat()
    assert threading.active_count() == before


def test_out_of_memory_tells_what_to_do():
  error = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')
  assert 'smaller config.batch_size, or' in command.advice(error)
  assert command.advice(RuntimeError('RESOURCE_EXHAUSTED')) == ''
  assert command.advice(jax.errors.JaxRuntimeError('INTERNAL: ?')) == ''


# Whole runs.


@pytest.fixture
def npz(tmp_path):
  return tiny.save(tmp_path / 'data.npz', train=64, test=21)


def test_an_evaluation_that_was_stopped_comes_first_when_the_run_resumes(
  npz, tmp_path, monkeypatch
):
  config = tiny.config(data_path=npz, num_epochs=2)
  expected = loop.train(config, tmp_path / 'whole')
  with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
    tiny.stop_after(7, patch)  # The metrics of step 6 are read by its epoch.
    loop.train(config, tmp_path / 'parts')
  assert ended.value.code == 75
  _, info = checkpoints.restore(tmp_path / 'parts')
  assert (info['step'], info['line']['step'], info['best']) == (6, 6, None)
  got = loop.train(config, tmp_path / 'parts')
  for result in expected, got:
    result.pop('seconds')
  assert got == expected
  whole, parts = (metrics.read(tmp_path / name) for name in ('whole', 'parts'))
  assert whole == parts


def test_a_run_saves_by_time(npz, tmp_path, monkeypatch):
  saved = []
  save = journal.Journal.save

  def spy(book, state, step, line=None):
    saved.append(step)
    save(book, state, step, line)

  monkeypatch.setattr(journal.Journal, 'save', spy)
  config = tiny.config(data_path=npz, num_epochs=1, save_every_minutes=1e-9)
  loop.train(config, tmp_path)
  assert saved == [1, 2, 3, 4, 5, 6, 6]  # Unevaluated, and evaluated.
  info = checkpoints.restore(tmp_path)[1]
  assert info['line'] is None and info['best']


def test_a_finished_run_is_extended_where_that_is_asked_for(
  npz, tmp_path, capsys
):
  config = tiny.config(data_path=npz, num_epochs=1)
  with pytest.raises(ValueError, match='expected a run to extend .* got none'):
    loop.train(config, tmp_path, extend=True)
  loop.train(config, tmp_path)
  config.num_epochs = 2
  with pytest.raises(
    ValueError, match='num_epochs .* expected 1, got 2: .* --extend'
  ):
    loop.train(config, tmp_path)
  result = loop.train(config, tmp_path, extend=True)
  assert result['step'] == 12
  out = capsys.readouterr().out
  # Half of the cosine to come, where there was none of it.
  assert '1 epochs become 2' in out
  assert 'it goes on from 0.05, where it was 0' in out
  assert loop.train(config, tmp_path, extend=True) == result
  config.num_epochs = 1
  with pytest.raises(ValueError, match='num_epochs of 2 or more, .* got 1'):
    loop.train(config, tmp_path, extend=True)
