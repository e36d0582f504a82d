"""The training loop, from the config to the final accuracy.

No step waits for the host: a step's metrics are read after the next one has
started.
"""

import collections
import contextlib
import functools
import itertools
import pathlib

import jax
import numpy as np
from absl import logging
from flax import serialization
from jax.experimental import multihost_utils

from train import (
  checkpoints,
  data,
  ending,
  finite,
  journal,
  lock,
  metrics,
  profile,
  settings,
  transfer,
)  # fmt: skip
from train import step as step_lib
from train import watch as watch_lib


def run_steps(run_step, watch, state, batches, steps, read, pause):
  """Runs steps; the metrics of each are read after the next one was started.

  `watch(step, state, batch)` comes before the step, which gives its state away;
  `read(step, batch, measured, watched, state)` gets the newest state there is.

  Returns:
    The state, the last batch, what `read` made of the last step, and whether
    `pause()` ended it, after whatever step.
  """
  pending = None
  for step in steps:
    batch = next(batches)
    watched = watch(step, state, batch)
    with jax.profiler.StepTraceAnnotation('start', step_num=step):
      state, measured = run_step(state, batch)
    if pending:
      read(*pending, state)
    pending = step, batch, measured, watched
    if paused := pause():
      break
  return state, batch, read(*pending, state), paused


def train(config, workdir, seconds=None, extend=False):
  """Trains, or goes on training, and evaluates the last state.

  Args:
    config: see `configs/digits.py`.
    workdir: gets checkpoints, metrics and `result.json`.
    seconds: a counter that this run's times are added to, by name.
    extend: whether a run that is there may be given more epochs.

  Returns:
    What `result.json` has; None on all processes but the first.

  Raises:
    ValueError: config, data and what is in the workdir do not fit; or the
      workdir cannot be written, or is in use.
    FloatingPointError: the loss or a gradient is not finite.
    SystemExit: with 75 after a signal, the state saved.
  """
  settings.check(config)
  seconds = collections.Counter() if seconds is None else seconds
  main = jax.process_index() == 0  # It alone touches the workdir.
  with (
    lock.hold(workdir) if main else contextlib.nullcontext(),
    ending.signals() as stopping,
  ):
    return run(config, pathlib.Path(workdir), seconds, main, extend, stopping)


def run(config, workdir, seconds, main, extend, stopping):
  """What `train` does once the workdir is this process's own."""
  timed = functools.partial(metrics.timed, seconds)

  # What is there already.
  found = checkpoints.restore(workdir, repair=True) if main else None
  saved, info = found or (None, {'best': None, 'totals': {}})
  free = settings.FREE
  if extend and main:
    settings.check_extends(info, config)
    free = (*free, 'config.num_epochs')
  settings.check_unchanged(info, 'config', config.to_dict(), free=free)
  result = metrics.read_json(workdir / 'result.json') if found else None
  finished = bool(result) and (
    (result['step'], info['config']['num_epochs'])
    == (info['step'], config.num_epochs)
  )
  # Where they were the data are taken to be the same; elsewhere they are read.
  known = finished and all(
    config[name] == info['config'][name] for name in ('data_dir', 'data_path')
  )
  # The last step's metrics, where its epoch was not evaluated any more.
  line = info.get('line')
  finished, known, unevaluated = multihost_utils.broadcast_one_to_all(
    (finished, known, bool(line))
  )
  if not known:
    with timed('data'):
      dataset = data.load(config)
    facts = data.describe(dataset)
    settings.check_unchanged(info, 'data', facts)
  if finished:
    unread = ', and its data were not read again' if known else ''
    print(f'{workdir} is finished: nothing left to train{unread}')
    return result
  if info['best'] and not checkpoints.restore(workdir, 'best', repair=True):
    logging.warning('The best checkpoint is lost: the next one will be it')
    info['best'] = None

  # State and compiled steps.
  steps_per_epoch = data.steps_per_epoch(dataset, config)
  num_steps = config.num_epochs * steps_per_epoch
  with timed('compile'):
    state, run_step = step_lib.create_train_step(config, facts, steps_per_epoch)
    if saved:
      # Older runs did not count what they skipped.
      saved = {'skipped': np.zeros((), np.int32)} | saved
      state = serialization.from_state_dict(state, saved)
    elif config.init_from and main:
      state = transfer.take(state, config.init_from)
    host_state = multihost_utils.broadcast_one_to_all(jax.device_get(state))
    start = int(host_state.step)
    batches = step_lib.on_devices(
      data.train_batches(
        dataset.train,
        config,
        start_step=start - unevaluated,
        **data.this_host(),
      )
    )
    batch = next(batches)
    run_step = step_lib.compiled(run_step)
    run_eval = step_lib.compiled(step_lib.create_eval_step(config, facts))
    run_watch = None
    if config.watch_every:
      run_watch = step_lib.compiled(watch_lib.create_watch_step(config, facts))
    state = jax.device_put(host_state, step_lib.replicated())
    # Compiles; what comes out is dropped.
    if run_watch:
      jax.block_until_ready(run_watch(step_lib.variables(state), batch))
    jax.block_until_ready(
      run_eval(step_lib.variables(state), step_lib.unmasked(batch))
    )
    jax.block_until_ready(run_step(state, batch))
    state = jax.device_put(host_state, step_lib.replicated())
  if not unevaluated:  # Else it is that of the last step.
    batches = itertools.chain([batch], batches)
  if saved and main:
    print(f'{workdir}: going on from step {start}')
    if info['config']['num_epochs'] != config.num_epochs:
      print(extension(info, config, start, steps_per_epoch))
  if config.profile:
    batches = profile.trace(batches, workdir)
  selection = getattr(dataset, config.select_on)
  epochs = config.num_epochs - start // steps_per_epoch + unevaluated
  evaluations = data.eval_batches(
    [selection] * (epochs if selection else 0) + [dataset.test],
    config,
    batch_size=config.batch_size,
    **data.this_host(),
  )

  # The epochs.
  with (
    ending.watchdog(config.hang_minutes) as beat,
    journal.Journal(
      config, facts, main and workdir, info, start, steps_per_epoch
    ) as book,
  ):

    def pause():
      """Whether to leave the steps to save or, being stopped, for good."""
      return 'stop' if stopping() else 'save' if book.due() else ''

    def watch(step, state, batch):
      """Starts to measure what the step is about to change, where due."""
      if watch_lib.is_due(config, step):
        return run_watch(step_lib.variables(state), batch)
      return None

    def read(step, batch, measured, watched, state):
      beat()
      line, wrong = book.step(step, measured, watched)
      if wrong and line.get('skipped', 1) > config.skip_nonfinite:
        where = finite.explain(book, state, batch, step)
        raise FloatingPointError(
          f'expected a finite {wrong} at step {step}: {where}'
        )
      return line

    def evaluate():
      def heeded(batches):
        for batch in batches:
          beat()
          if stopping():
            raise ending.Stopped
          yield batch

      with timed('evaluate'):
        return step_lib.evaluate(
          run_eval, step_lib.variables(state), heeded(next(evaluations))
        )

    step = start
    if unevaluated:
      line = line or {'step': start}
    try:
      while line or step < num_steps:
        if line:
          scores = evaluate() if selection else look(run_eval, state, batch)
          book.epoch(state, line, scores, seconds['train'])
          line = None
          continue
        last = (step // steps_per_epoch + 1) * steps_per_epoch
        with timed('train'):
          state, batch, line, paused = run_steps(
            run_step, watch, state, batches, range(step + 1, last + 1), read,
            pause,
          )  # fmt: skip
        step = line['step']
        if step < last:
          line = None
        if paused == 'stop':
          raise ending.Stopped
        if paused:
          book.save(state, step, line)
          beat()
      tested = evaluate()
    except ending.Stopped:
      book.save(state, step, line)
      tested = None
  if tested is None:
    ending.end(f'after step {step}')
  result = {
    'step': num_steps,
    **tested,
    'best': book.best,
    'selected_on': config.select_on if book.best else None,
    'seconds': seconds,
  }
  if main:
    metrics.write_json(workdir / 'result.json', result)
    return result


def look(run_eval, state, batch):
  """What the layers do on a training batch, where no split is for that."""
  scores = step_lib.average(
    [run_eval(step_lib.variables(state), step_lib.unmasked(batch))]
  )
  return {'layers': scores['layers']}


def extension(info, config, step, steps_per_epoch):
  """Says what more epochs do to a run."""
  before, now = (
    float(step_lib.create_schedule(c, steps_per_epoch)(step))
    for c in (settings.trained(info), config)
  )
  return (
    f'{info["config"]["num_epochs"]} epochs become {config.num_epochs}, and '
    f'the learning rate follows the schedule of {config.num_epochs} from here '
    f'on: it goes on from {now:.3g}, where it was {before:.3g}'
  )
