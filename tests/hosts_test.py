"""Two processes that train together, and what becomes of one without the other.

Both on this machine, with two devices each.
"""

import re
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest

from tests import tiny
from tests.job_test import TINY, run, start
from train import checkpoints, metrics

FLAGS = (
  *(flag for flag in TINY if 'model_args' not in flag),
  '--config.num_workers=1',
  '--config.dtype=float64',
  "--config.model_args={'stages': ((4,), (4,)), 'param_dtype': 'float64'}",
)


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'data.npz'
  return f'--config.data_path={tiny.save(path, train=128, test=21)}'


@pytest.fixture(scope='module')
def alone(npz, tmp_path_factory):
  """The workdir of a run of one process with four devices."""
  workdir = tmp_path_factory.mktemp('alone')
  run(
    'main', *FLAGS, npz, f'--workdir={workdir}',
    JAX_NUM_CPU_DEVICES='4', JAX_ENABLE_X64='1',
  )  # fmt: skip
  return workdir


def two(workdir, *flags):
  """Starts two processes; the first one writes in the workdir."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  return [
    start(
      'main', *FLAGS, *flags,
      f'--workdir={workdir if number == 0 else workdir / "other"}',
      f'--coordinator=127.0.0.1:{port}', '--num_processes=2',
      f'--process_id={number}',
      JAX_NUM_CPU_DEVICES='2', JAX_ENABLE_X64='1',
    )
    for number in range(2)
  ]  # fmt: skip


def ended(processes):
  """Returns `[(exit status, output, log)]` of processes."""
  outputs = [process.communicate() for process in processes]
  return [
    (process.returncode, *output)
    for process, output in zip(processes, outputs, strict=True)
  ]


def wait_for(path, processes):
  while not path.exists():
    assert all(p.poll() is None for p in processes), ended(processes)
    time.sleep(0.01)


def assert_same(workdir, alone):
  """The run is that of one process with as many devices."""
  (state, info), (expected, told) = map(checkpoints.restore, (workdir, alone))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-12), state, expected
  )
  assert info['data'] == told['data']
  lines, others = map(metrics.read, (workdir, alone))
  assert [line['step'] for line in lines] == [line['step'] for line in others]
  for line, other in zip(lines, others, strict=True):
    if 'loss' in line:
      assert line['loss'] == pytest.approx(other['loss'], rel=1e-9)


@pytest.mark.sample
def test_a_signal_to_one_of_two_stops_both_at_the_same_step(
  npz, alone, tmp_path
):
  processes = two(tmp_path, npz)
  wait_for(checkpoints.directory(tmp_path, 'latest') / '12', processes)
  processes[1].send_signal(signal.SIGTERM)
  results = ended(processes)
  steps = {
    re.search(r'stopped after step (\d+); the same', log)[1]
    for _, _, log in results
  }
  assert [status for status, *_ in results] == [75, 75] and len(steps) == 1
  assert checkpoints.restore(tmp_path)[1]['step'] == int(*steps)
  # The first process alone writes, and prints the result.
  assert not (tmp_path / 'other' / 'checkpoints').exists()
  (first, out, _), (second, other, _) = ended(two(tmp_path, npz))
  assert first == second == 0
  assert f'going on from step {int(*steps)}' in out
  assert 'est accuracy' in out and 'accuracy' not in other
  assert_same(tmp_path, alone)
  for status, *_ in ended(two(tmp_path, npz)):
    assert status == 0  # It is finished.


@pytest.mark.slow
def test_one_of_two_killed_ends_the_other_and_both_resume(npz, alone, tmp_path):
  processes = two(tmp_path, npz)
  wait_for(checkpoints.directory(tmp_path, 'latest') / '12', processes)
  processes[1].kill()
  (status, _, log), _ = ended(processes)
  assert status not in (0, 75)
  last = log[log.index('another task died') :]
  assert 'Thread 0x' not in last  # No stacks after what is to be read.
  assert [status for status, *_ in ended(two(tmp_path, npz))] == [0, 0]
  assert_same(tmp_path, alone)


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_and_workers(npz, alone, tmp_path):
  shutil.copytree(alone, tmp_path / 'run')
  shutil.rmtree(checkpoints.directory(tmp_path / 'run', 'latest') / '36')
  out, _ = run(
    'main', *FLAGS, npz, f'--workdir={tmp_path / "run"}',
    '--config.num_workers=0', '--config.log_every=1',
    JAX_NUM_CPU_DEVICES='1', JAX_ENABLE_X64='1',
  )  # fmt: skip
  assert 'going on from step 24' in out
  assert_same(tmp_path / 'run', alone)


@pytest.mark.slow
def test_a_process_that_waits_for_another_ends_after_a_while(npz, tmp_path):
  processes = two(tmp_path, npz, '--config.hang_minutes=0.2')
  wait_for(checkpoints.directory(tmp_path, 'latest') / '12', processes)
  processes[1].send_signal(signal.SIGSTOP)
  _, log = processes[0].communicate()
  processes[1].kill()
  processes[1].communicate()
  assert processes[0].returncode == 70
  assert 'expected a step every config.hang_minutes = 0.2' in log
  assert 'in run_steps' in log or 'in evaluate' in log  # The stacks.


@pytest.mark.slow
def test_an_error_of_one_of_two_is_told_by_the_other(npz, alone, tmp_path):
  shutil.copytree(alone, tmp_path / 'run')
  (first, _, log), (second, _, other) = ended(
    two(tmp_path / 'run', npz, '--config.seed=1')
  )
  assert first == second == 1
  assert 'config.seed differs' in log
  assert 'another process has ended, and says why' in other
