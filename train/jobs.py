"""Trains several runs, each in a process of its own, some at a time.

A run is `python -m train.main` on a config that is written into its workdir,
`config.py`: that command trains it alone.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import pprint
import re
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import tqdm

from train import ending, metrics

CONFIG = '''"""The settings of a run, as python -m {command} made them."""

from ml_collections import ConfigDict


def get_config():
  return ConfigDict({fields})
'''
LOG = 'log.txt'


class Run(NamedTuple):
  """A run to be trained: a name for people, its folder, a `ConfigDict`."""

  name: str
  workdir: pathlib.Path
  config: Any


class Child(NamedTuple):
  """A run that is being trained, from step `start` on."""

  run: Run
  process: subprocess.Popen
  bar: tqdm.tqdm
  start: int


def default_jobs():
  """How many at a time: one a core; one in all where there is a GPU."""
  plugins = [f'jax_cuda{version}_plugin' for version in (12, 13)]
  if (
    os.environ.get('JAX_PLATFORMS') != 'cpu'
    and any(map(importlib.util.find_spec, plugins))
    and any(pathlib.Path('/dev').glob('nvidia[0-9]*'))
  ):
    return 1
  return len(os.sched_getaffinity(0))


def is_finished(run):
  """Whether there is nothing left to do."""
  config = json.loads(json.dumps(run.config.to_dict()))
  result = metrics.read_json(run.workdir / 'result.json')
  return bool(result) and (
    metrics.read_json(run.workdir / 'config.json') == config
  )


def train(runs, jobs, command, compiled):
  """Trains all runs that are not finished, and tells of each in a line.

  After SIGTERM, SIGINT or SIGHUP all are stopped as `train.main` is, their
  states saved. One that ends with an error is told, and the others go on;
  unless it trained not a single step, as with a setting that cannot be.

  Args:
    runs: a list of `Run`.
    jobs: how many at a time; each has its share of the cores.
    command: what writes the configs.
    compiled: the folder of compiled programs, which runs share.

  Raises:
    ValueError: what went wrong, by run.
    SystemExit: with 75 after a signal.
  """
  left = [run for run in runs if not is_finished(run)]
  if finished := len(runs) - len(left):
    say(f'{finished} of {len(runs)} runs are finished: not run again')
  jobs = min(jobs, len(left))
  free, children, wrong, told = list(range(jobs)), {}, {}, set()
  with signals() as received:
    while children or (left and not received):
      while left and free and not received:
        slot = free.pop(0)
        cores = share_of_cores(slot, jobs)
        children[slot] = start(
          left.pop(0), slot, cores, jobs, command, compiled
        )
      time.sleep(0.2)
      for slot, child in list(children.items()):
        if received and slot not in told:
          told.add(slot)
          child.process.terminate()
        if child.process.poll() is None:
          child.bar.set_description_str(
            f'{child.run.name}: {last_line(child.run.workdir)}'
          )
          continue
        del children[slot]
        free.append(slot)
        if error := ended(child, received):
          wrong[child.run.name] = error
          if last_step(child.run.workdir) == child.start:
            left.clear()
  if received:
    ending.end(f'with {sum(map(is_finished, runs))} of {len(runs)} runs done')
  if wrong:
    lines = '; '.join(f'{name}: {error}' for name, error in wrong.items())
    raise ValueError(f'expected every run to come to its end, got {lines}')


@contextlib.contextmanager
def signals():
  """Yields the signals that came; a second one ends the process at once."""
  received = []
  numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
  before = {number: signal.getsignal(number) for number in numbers}

  def restore():
    for number, handler in before.items():
      signal.signal(number, handler)

  def receive(number, _):
    restore()
    received.append(number)

  for number in numbers:
    signal.signal(number, receive)
  try:
    yield received
  finally:
    restore()


def share_of_cores(slot, jobs):
  """The cores of one of so many processes; some share one, if need be."""
  cores = sorted(os.sched_getaffinity(0))
  return cores[slot::jobs] or [cores[slot % len(cores)]]


def start(run, slot, cores, jobs, command, compiled):
  """Starts the process of a run, on these cores alone."""
  run.workdir.mkdir(parents=True, exist_ok=True)
  fields = pprint.pformat(run.config.to_dict(), sort_dicts=False)
  path = run.workdir / 'config.py'
  metrics.replace(path, CONFIG.format(command=command, fields=fields))
  # On a GPU each takes its share of the memory, and not three quarters.
  defaults = {
    'JAX_COMPILATION_CACHE_DIR': str(compiled),
    'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{0.9 / jobs:.3f}',
  }
  with open(run.workdir / LOG, 'a') as log:
    process = subprocess.Popen(
      [sys.executable, '-m', 'train.main', f'--config={path}',
       f'--workdir={run.workdir}'],
      env=defaults | dict(os.environ),
      stdin=subprocess.DEVNULL, stdout=log, stderr=log,
      start_new_session=True,  # Ctrl-C comes here, and from here to it.
    )  # fmt: skip
  with contextlib.suppress(ProcessLookupError):  # It may have ended.
    os.sched_setaffinity(process.pid, cores)  # Before it has threads.
  bar = tqdm.tqdm(
    bar_format='{desc}', position=slot, leave=False, disable=None,
    dynamic_ncols=True,
  )  # fmt: skip
  return Child(run, process, bar, last_step(run.workdir))


def ended(child, received):
  """Tells in a line how a run ended; returns what went wrong, if it did."""
  code, run = child.process.returncode, child.run
  child.bar.close()
  if code == ending.STOPPED or (received and code < 0):
    line, error = f'stopped after step {last_step(run.workdir)}', None
  elif code:
    error = (
      last_line(run.workdir).removeprefix('error: ') or f'exit code {code}'
    )
    line = f'ended with an error; see {run.workdir / LOG}'
  else:
    accuracy = metrics.read_json(run.workdir / 'result.json')['accuracy']
    line, error = f'test accuracy {accuracy:.2%}', None
  say(f'{run.name}: {line}')
  return error


def say(line):
  """Prints a line above the progress bars."""
  tqdm.tqdm.write(line, file=sys.stderr)


def last_line(workdir):
  """What a run said last: its progress bar, or its error."""
  with open(workdir / LOG, 'rb') as file:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2000))
    text = file.read().decode(errors='replace')
  lines = [line.strip() for line in re.split(r'[\r\n]', text)]
  return next((line for line in reversed(lines) if line), '')


def last_step(workdir):
  """The last step of which a run has written."""
  return max((line['step'] for line in metrics.read(workdir)), default=0)
