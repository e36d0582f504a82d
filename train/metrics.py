"""Metrics: JSON lines, TensorBoard and the progress bar."""

import contextlib
import json
import math
import os
import pathlib
import re
import sys
import time

import jax
import numpy as np
import tqdm
from tensorboardX import event_file_writer
from tensorboardX import summary as summaries
from tensorboardX.proto import event_pb2

from dsatgo_jax import statistics

# `metrics` is the same for every run of a config; `timings` never is.
FILES = ('metrics', 'timings')
SHOWN_EVERY = 120  # Seconds; a run of days is watched while it goes on.


def read(workdir, name='metrics'):
  """Returns the lines of a file of `FILES` in order, dicts with a `step`.

  A last line that a killed process left incomplete is not among them.
  """
  path = pathlib.Path(workdir) / f'{name}.jsonl'
  lines = []
  for line in path.read_text().splitlines() if path.exists() else ():
    with contextlib.suppress(json.JSONDecodeError):
      lines.append(json.loads(line))
  return lines


@contextlib.contextmanager
def writer(workdir, step, evaluated=True):
  """Yields `write(line, name)` for dicts with a `step` and numbers, or lists.

  What was watched, `line['watch']`, goes to TensorBoard without the rest of its
  line, and its histograms as such.

  Args:
    workdir: gets a `.jsonl` of each of `FILES`, and `tensorboard/`.
    step: where the run starts or resumes; what was written of later steps is
      dropped, because it comes again.
    evaluated: False where the epoch that this step ends comes again, too.
  """
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    files, add = {}, stack.enter_context(board(workdir / 'tensorboard', step))
    for name in FILES:
      kept = [
        line
        for line in read(workdir, name)
        if line['step'] < step + (evaluated or 'watch' in line)
      ]
      path = workdir / f'{name}.jsonl'
      replace(path, ''.join(json.dumps(line) + '\n' for line in kept))
      files[name] = stack.enter_context(open(path, 'a'))

    def write(line, name='metrics'):
      files[name].write(json.dumps(line) + '\n')
      files[name].flush()
      step, tree = line['step'], line
      if 'watch' in line:
        watched = dict(line['watch'])
        for name, value in histograms(watched.pop('histograms')):
          add(step, summaries.histogram_raw(f'watch/{name}', **value))
        tree = {'watch': watched}
      for name, value in scalars(tree):
        if value is not None:
          add(step, summaries.scalar(name, value))

    yield write


@contextlib.contextmanager
def board(folder, step):
  """Yields `add(step, summary)`, of tensorboardX's summaries.

  It writes in the caller's thread: that of `tensorboardX.SummaryWriter` dies
  where the disk is full, and whoever adds then waits for ever.

  Args:
    folder: gets a file of events.
    step: where the run starts; TensorBoard drops what came of later ones.
  """
  folder.mkdir(exist_ok=True)
  events = event_file_writer.EventsWriter(str(folder / 'events'))
  shown = time.monotonic()

  def add(step, summary):
    nonlocal shown
    events.write_event(
      event_pb2.Event(wall_time=time.time(), step=step, summary=summary)
    )
    if time.monotonic() - shown > SHOWN_EVERY:
      events.flush()
      shown = time.monotonic()

  with contextlib.closing(events):
    events.write_event(
      event_pb2.Event(
        wall_time=time.time(),
        step=step + 1,
        session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
      )
    )
    events.flush()
    yield add


def numbers(tree):
  """Arrays in nested dicts as lists of numbers, to six digits.

  What is not finite is None: JSON has no such number.
  """
  if isinstance(tree, dict):
    return {name: numbers(value) for name, value in tree.items()}
  if isinstance(tree, list):
    return [numbers(value) for value in tree]
  if isinstance(tree, float):
    return float(f'{tree:.6g}') if math.isfinite(tree) else None
  return numbers(np.asarray(tree, np.float64).tolist())


def path_shares(layer):
  """The parts of the gradient's paths into a layer's membranes.

  Args:
    layer: of what was watched of the `flow`, as numbers.

  Returns:
    `{path: share}` of the sum of their norms over all timesteps; NaN where no
    gradient came.
  """
  norms = {path: norm(layer[path]) for path in ('spatial', 'leak', 'reset')}
  total = sum(norms.values()) or math.nan
  return {path: value / total for path, value in norms.items()}


def norm(values):
  """The norm of numbers; NaN where one is None."""
  return float(np.linalg.norm(np.array(values, float)))


def histograms(layers):
  """Yields `(name, arguments)` of TensorBoard's histograms.

  Args:
    layers: `{layer: shares}` of `statistics.histogram`, [T, bins].
  """
  edges = np.array(statistics.EDGES)
  width = edges[1] - edges[0]
  # What is below all edges, and above, takes a bin at either end.
  limits = np.append(edges, edges[-1] + width)
  middles = limits - width / 2
  for layer, shares in layers.items():
    for t, percent in enumerate(100 * np.array(shares, float), start=1):
      yield (
        f'membrane/{layer}/t{t}',
        {
          'min': edges[0] - width,
          'max': limits[-1],
          'num': percent.sum(),
          'sum': percent @ middles,
          'sum_squares': percent @ middles**2,
          'bucket_limits': limits.tolist(),
          'bucket_counts': percent.tolist(),
        },
      )


def scalars(tree, name=''):
  """Yields `(name, number)` out of nested dicts, and lists over timesteps."""
  if isinstance(tree, dict):
    for key, value in tree.items():
      yield from scalars(value, f'{name}/{key}' if name else key)
  elif isinstance(tree, list):
    for t, value in enumerate(tree, start=1):
      yield name + f'/t{t}', value
  else:
    yield name, tree


def progress(config, num_steps, step):
  """Returns the progress bar: images, images/s and the time left."""
  return tqdm.tqdm(
    total=num_steps * config.batch_size,
    initial=step * config.batch_size,
    unit=' images',
    unit_scale=True,
    dynamic_ncols=True,
    # In a log file every refresh is a line of its own.
    mininterval=0.2 if sys.stderr.isatty() else 10,
    disable=jax.process_index() > 0,
  )


def show(bar, line, batch_size):
  """Moves the progress bar on by a step."""
  if 'loss' in line:
    bar.set_postfix_str(
      f'loss {line["loss"]:.3f}, accuracy {line["accuracy"]:.1%}', refresh=False
    )
  bar.update(batch_size)


def summary(line):
  """An epoch's line, for people."""
  return '  '.join(
    [f'epoch {line["epoch"]:.0f}']
    + [
      f'{name} {value:.2%}'
      if name.endswith('accuracy')
      else f'{name} {value:.4f}'
      for name, value in line.items()
      if name.startswith(('train', 'validation', 'test'))
    ]
  )


@contextlib.contextmanager
def timed(seconds, name):
  """Adds the time spent inside to `seconds[name]`."""
  start = time.perf_counter()
  try:
    yield
  finally:
    seconds[name] += time.perf_counter() - start


def read_json(path):
  """Returns what `write_json` wrote; None if there is no such file."""
  return json.loads(path.read_text()) if path.exists() else None


def write_json(path, tree):
  """Writes a file of nested dicts and lists, whole or not at all."""
  text = json.dumps(tree, indent=2)
  # A list of numbers is a line: matrices stay readable, and small.
  text = re.sub(r'\[[^][{}]*\]', lambda m: re.sub(r'\n *', ' ', m[0]), text)
  replace(path, text + '\n')


def replace(path, text):
  """Writes a file that is never seen half written."""
  temporary = path.with_suffix('.tmp')
  temporary.write_text(text)
  os.replace(temporary, path)
