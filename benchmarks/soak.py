"""An hour of the job in one process: is the end like the start?

  python -m benchmarks.soak [--minutes 60] [--json FILE]

`train.loop` itself on a tiny network, with an evaluation and a checkpoint after
every epoch, more checkpoints by time, and a look inside at every 50th step,
until a SIGTERM. Sixty times, after a step, once the checkpoint under way is
written, and after a garbage collection, it reads of its own process: the
resident memory (VmRSS) and the threads in Linux's /proc/self/status, the
entries of /proc/self/fd, and `jax.live_arrays()`. The table has the medians of
the thirds of the time, the first tenth left out; batches under way hold arrays
and threads for a while, so that of what is counted it has the smallest numbers:
a leak raises them, too.
"""

import argparse
import collections
import gc
import json
import os
import pathlib
import re
import signal
import statistics
import tempfile
import time

import jax

from benchmarks import timing
from tests import tiny
from train import journal, loop

SAMPLES = 60
EPOCHS = 2000  # More than it comes to.
# What is told of each third: its name, and of what.
TOLD = {
  'MiB': ('memory', statistics.median),
  'arrays': ('arrays', min),
  'files': ('files', min),
  'threads': ('threads', min),
  'steps/s': ('speed', statistics.median),
}


def sample():
  """What this process holds: MiB, arrays, files and threads."""
  gc.collect()
  status = pathlib.Path('/proc/self/status').read_text()
  memory, threads = (
    int(re.search(rf'^{name}:\s+(\d+)', status, re.MULTILINE)[1])
    for name in ('VmRSS', 'Threads')
  )
  return {
    'memory': memory / 1024,
    'arrays': len(jax.live_arrays()),
    'files': len(os.listdir('/proc/self/fd')),
    'threads': threads,
  }


def run(seconds, folder, steps_per_epoch):
  """Trains for so long.

  Args:
    seconds: from the first step on.
    folder: for the data and the run.
    steps_per_epoch: steps between evaluations.

  Returns:
    `SAMPLES` dicts of numbers: those of `sample`, `seconds` since the first
    step, and `speed`, the steps a second since the sample before, which is an
    epoch's steps behind at least.
  """
  config = tiny.config(
    data_path=tiny.save(
      folder / 'data.npz', train=steps_per_epoch * 8 * 4 // 3 + 2, test=21
    ),
    num_epochs=EPOCHS,
    log_every=10,
    watch_every=50,
    save_every_minutes=0.01,
  )
  samples, begun, last, before = [], None, None, None
  read = journal.Journal.step

  def sampled(book, step, *args):
    nonlocal begun, last, before
    told = read(book, step, *args)
    now = time.monotonic()
    if begun is None:
      begun, last, before = now, now, step
    due = (
      now - begun >= (len(samples) + 1) * seconds / SAMPLES
      and step - before >= steps_per_epoch
    )
    if due and len(samples) < SAMPLES:
      for manager in book.managers.values():
        manager.wait_until_finished()
      speed = (step - before) / (now - last)
      samples.append(sample() | {'speed': speed, 'seconds': now - begun})
      last, before = time.monotonic(), step
      if len(samples) == SAMPLES:
        os.kill(os.getpid(), signal.SIGTERM)
    return told

  journal.Journal.step = sampled
  try:
    loop.train(config, folder / 'run', collections.Counter())
  except SystemExit:
    return samples
  finally:
    journal.Journal.step = read
  raise RuntimeError(f'expected less than {EPOCHS} epochs in {seconds} seconds')


def thirds(samples):
  """The table's rows."""
  samples = samples[len(samples) // 10 :]
  size = len(samples) // 3
  return {
    name: {
      column: summarise([told[key] for told in samples[i * size :][:size]])
      for column, (key, summarise) in TOLD.items()
    }
    for i, name in enumerate(('start', 'middle', 'end'))
  }


def main():
  """Runs and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--minutes', type=float, default=60)
  parser.add_argument('--json', metavar='FILE', help='write every number there')
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    samples = run(60 * arguments.minutes, pathlib.Path(folder), 2000)
  rows = thirds(samples)
  timing.table(
    f'{arguments.minutes:g} minutes of training a tiny network', rows, TOLD
  )
  if arguments.json:
    path = pathlib.Path(arguments.json)
    path.write_text(json.dumps({'thirds': rows, 'samples': samples}, indent=2))


if __name__ == '__main__':
  main()
