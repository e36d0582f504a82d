"""The training loop, from the config to the final accuracy.

No step waits for the host: a step's metrics are read after the next one has
started.
"""

import collections
import contextlib
import functools
import itertools
import math
import pathlib
import signal
import threading

import jax
from absl import logging
from flax import serialization
from jax.experimental import multihost_utils

from train import checkpoints, data, lock, metrics, profile, settings
from train import step as step_lib
from train import watch as watch_lib


def run_epoch(run_step, watch, state, batches, steps, read, must_stop):
  """Runs steps; the metrics of each are read after the next one was started.

  `watch(step, state, batch)` comes before the step, which gives its state away.

  Returns:
    The state, the last batch, what `read` made of the last step, and whether to
    stop here.
  """
  pending = None
  for step in steps:
    batch = next(batches)
    watched = watch(step, state, batch)
    with jax.profiler.StepTraceAnnotation('start', step_num=step):
      state, measured = run_step(state, batch)
    if pending:
      read(*pending)
    pending = step, measured, watched
    if stopping := must_stop(step):
      break
  return state, batch, read(*pending), stopping


@contextlib.contextmanager
def stop_signal():
  """Yields `must_stop(step)`: whether SIGTERM or Ctrl-C came (once).

  Of several processes all hear it at the same step. A thread other than the
  main one hears none.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  if threading.current_thread() is not threading.main_thread():
    yield lambda step: False  # Python lets the main thread alone listen.
    return
  received = []
  handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

  def restore():
    for number, handler in handlers.items():
      signal.signal(number, handler)

  def receive(number, _):
    received.append(number)
    restore()  # A second signal ends the process at once.

  for number in handlers:
    signal.signal(number, receive)
  try:
    yield lambda step: bool(received)
  finally:
    restore()


def warn_of_thresholds(layers, step, warned):
  """Logs the layers that have a threshold of 0 or less, each of them once."""
  for name, layer in layers.items():
    theta = min(layer['theta'])
    if theta <= 0 and name not in warned:
      logging.warning('%s has a threshold of %g at step %d', name, theta, step)
      warned.add(name)


def train(config, workdir, seconds=None):
  """Trains, or goes on training, and evaluates the last state.

  Args:
    config: see `configs/digits.py`.
    workdir: gets checkpoints, metrics and `result.json`.
    seconds: a counter that this run's times are added to, by name.

  Returns:
    What `result.json` has; None on all processes but the first.

  Raises:
    ValueError: config, data and what is in the workdir do not fit; or the
      workdir cannot be written, or is in use.
    FloatingPointError: the loss or a gradient is not finite.
    SystemExit: after a signal, with the state saved.
  """
  settings.check(config)
  seconds = collections.Counter() if seconds is None else seconds
  main = jax.process_index() == 0  # It alone touches the workdir.
  with lock.hold(workdir) if main else contextlib.nullcontext():
    return run(config, pathlib.Path(workdir), seconds, main)


def run(config, workdir, seconds, main):
  """What `train` does once the workdir is this process's own."""
  timed = functools.partial(metrics.timed, seconds)

  # What is there already.
  found = checkpoints.restore(workdir, repair=True) if main else None
  saved, info = found or (None, {'best': None, 'totals': {}})
  settings.check_unchanged(info, 'config', config.to_dict())
  result = metrics.read_json(workdir / 'result.json') if found else None
  finished = result is not None and result['step'] == info['step']
  # Where they were the data are taken to be the same; elsewhere they are read.
  known = finished and all(
    config[name] == info['config'][name] for name in ('data_dir', 'data_path')
  )
  finished, known = multihost_utils.broadcast_one_to_all((finished, known))
  if not known:
    with timed('data'):
      dataset = data.load(config)
    facts = data.describe(dataset)
    settings.check_unchanged(info, 'data', facts)
  if finished:
    unread = ', and its data were not read again' if known else ''
    print(f'{workdir} is finished: nothing left to train{unread}')
    return result

  # State and compiled steps.
  steps_per_epoch = data.steps_per_epoch(dataset, config)
  num_steps = config.num_epochs * steps_per_epoch
  with timed('compile'):
    state, run_step = step_lib.create_train_step(config, facts, steps_per_epoch)
    if saved:
      state = serialization.from_state_dict(state, saved)
    host_state = multihost_utils.broadcast_one_to_all(jax.device_get(state))
    start = int(host_state.step)
    batches = step_lib.on_devices(
      data.train_batches(
        dataset.train, config, start_step=start, **data.this_host()
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
  batches = itertools.chain([batch], batches)
  if saved and main:
    print(f'{workdir}: going on from step {start}')
  if config.profile:
    batches = profile.trace(batches, workdir)

  # The epochs.
  best, totals = info['best'], collections.Counter(info['totals'])
  selection, warned = getattr(dataset, config.select_on), set()
  epochs = range(start // steps_per_epoch, config.num_epochs)
  evaluations = data.eval_batches(
    [selection] * (len(epochs) if selection else 0) + [dataset.test],
    config,
    batch_size=config.batch_size,
    **data.this_host(),
  )
  with contextlib.ExitStack() as stack:
    must_stop = stack.enter_context(stop_signal())
    bar = stack.enter_context(metrics.progress(config, num_steps, start))
    if main:
      write = stack.enter_context(metrics.writer(workdir, start))
      metrics.write_json(workdir / 'config.json', config.to_dict())
      latest, best_one = (
        stack.enter_context(checkpoints.manager(workdir, which))
        for which in ('latest', 'best')
      )

    def watch(step, state, batch):
      """Starts to measure what the step is about to change, where due."""
      if watch_lib.is_due(config, step):
        return run_watch(step_lib.variables(state), batch)
      return None

    def read(step, scalars, watched):
      """Waits for the metrics of a step; checks, counts and shows them."""
      line = {'step': step, 'epoch': step / steps_per_epoch}
      if main and watched:  # Of a step that ends the run, too.
        write(line | {'watch': metrics.numbers(jax.device_get(watched))})
      line |= {name: x.item() for name, x in jax.device_get(scalars).items()}
      for name in ('loss', 'gradient_norm'):
        if not math.isfinite(line[name]):
          raise FloatingPointError(
            f'expected a finite {name}, got {line[name]} at step {step}'
          )
      totals.update(steps=1, loss=line['loss'], accuracy=line['accuracy'])
      metrics.show(bar, line, config.batch_size)
      if main and step % config.log_every == 0 and step % steps_per_epoch:
        write(line)
      return line

    for epoch in epochs:
      last = (epoch + 1) * steps_per_epoch
      steps = range(max(start, epoch * steps_per_epoch) + 1, last + 1)
      before = seconds['train']
      with timed('train'):
        state, batch, line, stopping = run_epoch(
          run_step, watch, state, batches, steps, read, must_stop
        )
      step, is_best = line['step'], False
      if step == last:
        line['images_per_second'] = (
          len(steps) * config.batch_size / (seconds['train'] - before)
        )
        line['train_loss'] = totals['loss'] / totals['steps']
        line['train_accuracy'] = totals['accuracy'] / totals['steps']
        totals.clear()
        with timed('evaluate'):
          if selection is None:
            scores = step_lib.average(
              [run_eval(step_lib.variables(state), step_lib.unmasked(batch))]
            )
          else:
            scores = step_lib.evaluate(
              run_eval, step_lib.variables(state), next(evaluations)
            )
        line['layers'] = scores['layers']
        if selection is not None:
          for name in ('loss', 'accuracy'):
            line[f'{config.select_on}_{name}'] = scores[name]
          is_best = best is None or scores['accuracy'] > best['accuracy']
          if is_best:
            best = {'step': step, 'accuracy': scores['accuracy']}
      if main:
        if step == last:
          warn_of_thresholds(line['layers'], step, warned)
          write(line)
          bar.write(metrics.summary(line))
        info = {
          'step': step,
          'config': config.to_dict(),
          'data': facts,
          'best': best,
          'totals': totals,
        }
        if is_best:
          checkpoints.save(best_one, state, info)
          best_one.wait_until_finished()  # Before the latest one tells of it.
        checkpoints.save(latest, state, info)
      if stopping and step < num_steps:
        raise SystemExit(f'stopped after step {step}; the same command resumes')

  with timed('evaluate'):
    tested = step_lib.evaluate(
      run_eval, step_lib.variables(state), next(evaluations)
    )
  result = {
    'step': num_steps,
    **tested,
    'best': best,
    'selected_on': config.select_on if best else None,
    'seconds': seconds,
  }
  if main:
    metrics.write_json(workdir / 'result.json', result)
    return result
