"""What hosts and worker processes read together: each example once an epoch."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data_test import make_config, make_source, on_disk, take
from train import data

HOSTS = st.integers(1, 3)


def read(source, config, steps, num_hosts):
  """The labels that all hosts read in some steps, [steps, batch_size]."""
  parts = [
    take(
      data.train_batches(
        source, config, start_step=steps.start, host=host, num_hosts=num_hosts
      ),
      len(steps),
    )
    for host in range(num_hosts)
  ]
  return [
    np.concatenate([part[step]['label'] for part in parts])
    for step in range(len(steps))
  ]


@settings(deadline=None, max_examples=15)
@given(HOSTS, HOSTS, st.integers(1, 2), st.integers(0, 20), st.data())
def test_an_epoch_has_each_example_once(before, after, size, more, drawn):
  """However many hosts there are, and however many there were before."""
  batch_size = before * after * size
  source = make_source(batch_size + more)
  config = make_config(batch_size=batch_size, augment=('flip',))
  per_epoch = len(source) // batch_size
  stop = drawn.draw(st.integers(0, 2 * per_epoch))
  labels = read(source, config, range(stop), before)
  labels += read(source, config, range(stop, 2 * per_epoch), after)
  for epoch in range(2):
    seen = np.concatenate(labels[epoch * per_epoch :][:per_epoch])
    assert len(set(seen)) == len(seen) == per_epoch * batch_size
    assert set(seen) <= set(range(len(source)))


class Slow:
  """Examples that take their time."""

  def __len__(self):
    return 1_000

  def __getitem__(self, index):
    time.sleep(0.01)
    return {'image': np.zeros((3, 3, 1), np.uint8), 'label': np.int32(index)}


@contextlib.contextmanager
def no_hang(seconds=300):
  """Raises where it takes longer."""

  def late(*_):
    raise TimeoutError(f'nothing came in {seconds} seconds')

  before = signal.signal(signal.SIGALRM, late)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.sample
@pytest.mark.parametrize(
  ('num_workers', 'batches_before'), [(1, 3), (2, 3), (2, 0)]
)
def test_a_killed_worker_is_an_error(num_workers, batches_before):
  others = set(multiprocessing.active_children())
  batches = data.train_batches(Slow(), make_config(num_workers=num_workers))

  def kill():
    while not (workers := set(multiprocessing.active_children()) - others):
      time.sleep(0.01)
    os.kill(min(worker.pid for worker in workers), signal.SIGKILL)

  killer = threading.Thread(target=kill)
  with no_hang():
    if not batches_before:  # It dies while it starts.
      killer.start()
    else:
      take(batches, batches_before)
      killer.start()
    with pytest.raises(ChildProcessError, match='ended with exit code -9') as e:
      take(batches, 500)
    killer.join()
  assert '\n' not in str(e.value)


@pytest.mark.sample
def test_workers_end_where_the_job_was_killed():
  program = """
import multiprocessing
from tests import hosts_data_test as test
from train import data
if __name__ == '__main__':
  batches = data.train_batches(test.Slow(), test.make_config(num_workers=2))
  test.take(batches, 3)
  workers = multiprocessing.active_children()
  print(*(worker.pid for worker in workers), flush=True)
  test.take(batches, 500)
"""
  with (
    no_hang(),
    subprocess.Popen([sys.executable, '-c', program], stdout=-1) as job,
  ):
    workers = job.stdout.readline().split()
    assert len(workers) == 2
    job.kill()
    # Its end comes when none is left that could write to it.
    assert job.stdout.read() == b''


class Damaged:
  """Examples of which one cannot be read."""

  def __len__(self):
    return 12

  def __getitem__(self, index):
    if index == 7:
      raise ValueError('damaged file FILE')
    return {'image': np.zeros((3, 3, 1), np.uint8), 'label': np.int32(index)}


@pytest.mark.parametrize(
  'num_workers', [0, pytest.param(1, marks=pytest.mark.sample)]
)
def test_a_damaged_example_is_told_as_it_is(num_workers):
  config = make_config(num_workers=num_workers)
  with no_hang(), pytest.raises(ValueError, match='damaged file FILE'):
    take(data.train_batches(Damaged(), config), 3)
  (batches,) = data.eval_batches([Damaged()], config, batch_size=4)
  with no_hang(), pytest.raises(ValueError, match='damaged file FILE'):
    list(batches)


def test_an_error_of_another_kind_stays_as_it_is():
  class Other(Damaged):
    def __getitem__(self, index):
      raise RuntimeError('of another kind')

  with pytest.raises(RuntimeError, match='of another kind'):
    next(data.train_batches(Other(), make_config()))


def test_every_host_evaluates_as_many_batches():
  for num_hosts in 1, 2, 3:
    counts = set()
    for host in range(num_hosts):
      (batches,) = data.eval_batches(
        [on_disk(make_source(7))],
        make_config(),
        batch_size=6,
        host=host,
        num_hosts=num_hosts,
      )
      counts.add(len(list(batches)))
    assert counts == {2}
