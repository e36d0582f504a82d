"""What a run writes while it trains: metrics, checkpoints, the progress bar."""

import collections
import contextlib
import math
import time

import jax
from absl import logging

from train import checkpoints, health, metrics
from train import step as step_lib


class Journal(contextlib.ExitStack):
  """Counts, shows and writes; a context manager.

  Every process counts, so that all know of the same; the first one alone has a
  workdir and writes.
  """

  def __init__(self, config, facts, workdir, info, start, steps_per_epoch):
    """Goes on with what a checkpoint tells.

    Args:
      config: of the run.
      facts: of the data.
      workdir: None on all processes but the first.
      info: of the checkpoint; `best` and `totals` suffice.
      start: the step to go on from.
      steps_per_epoch: steps in an epoch.
    """
    super().__init__()
    self.config, self.facts, self.workdir = config, facts, workdir
    self.steps_per_epoch = steps_per_epoch
    self.best, self.totals = info['best'], collections.Counter(info['totals'])
    self.since, self.warned = (start, 0), set()
    num_steps = config.num_epochs * steps_per_epoch
    self.saved, self.saved_at = None, time.monotonic()
    if workdir:
      self.write = self.enter_context(
        metrics.writer(workdir, start, evaluated=not info.get('line'))
      )
      metrics.write_json(workdir / 'config.json', config.to_dict())
      self.managers = {
        which: self.enter_context(checkpoints.manager(workdir, which))
        for which in ('latest', 'best')
      }
    # Last, so that no bar is left where these cannot be opened.
    self.bar = self.enter_context(metrics.progress(config, num_steps, start))

  def step(self, step, measured, watched):
    """Waits for the metrics of a step; checks, counts, shows and writes them.

    Returns:
      Its line of `metrics.jsonl`, and what of it is not finite, in words.
    """
    line = {'step': step, 'epoch': step / self.steps_per_epoch}
    if self.workdir and watched:  # Of a step that ends the run, too.
      watched = metrics.numbers(jax.device_get(watched))
      self.write(line | {'watch': watched})
    told = {name: x.item() for name, x in jax.device_get(measured).items()}
    if not self.config.skip_nonfinite:
      del told['skipped']
    wrong = [
      f'{name}, got {told[name]}'
      for name in step_lib.FINITE
      if not math.isfinite(told[name])
    ]
    if wrong:  # JSON has no such numbers.
      told = {name: told[name] for name in ('skipped',) if name in told}
    else:
      self.totals.update(steps=1, loss=told['loss'], accuracy=told['accuracy'])
    line |= told
    metrics.show(self.bar, line, self.config.batch_size)
    due = wrong or step % self.config.log_every == 0
    if self.workdir and due and step % self.steps_per_epoch:
      self.write(line)
    return line, next(iter(wrong), '')

  def epoch(self, state, line, scores, seconds):
    """Counts, writes and saves an epoch.

    Args:
      state: at its end.
      line: of its last step.
      scores: of `step.evaluate`; without `accuracy` where there is no split to
        select on.
      seconds: spent in training so far.
    """
    step, is_best = line['step'], False
    if self.totals:
      for name in ('loss', 'accuracy'):
        line[f'train_{name}'] = self.totals[name] / self.totals['steps']
      self.totals.clear()
    line['layers'] = scores['layers']
    if 'accuracy' in scores:
      for name in ('loss', 'accuracy'):
        line[f'{self.config.select_on}_{name}'] = scores[name]
      is_best = not self.best or scores['accuracy'] > self.best['accuracy']
      if is_best:
        self.best = {'step': step, 'accuracy': scores['accuracy']}
    if self.workdir:
      warn_of_thresholds(line['layers'], step, self.warned)
      momentum = self.config.neuron.get('momentum')
      health.warn(scores, step, momentum, self.warned)
      self.write(line)
      if images := (step - self.since[0]) * self.config.batch_size:
        rate = images / (seconds - self.since[1])
        self.write({'step': step, 'images_per_second': rate}, 'timings')
      self.bar.write(metrics.summary(line))
      if is_best:
        checkpoints.save(self.managers['best'], state, self.describe(step))
        # Before the latest one tells of it.
        self.managers['best'].wait_until_finished()
    self.since = step, seconds
    self.save(state, step)

  def save(self, state, step, line=None):
    """Saves a checkpoint; `line` where an epoch has yet to be evaluated."""
    if self.workdir and self.saved != (step, line):
      info = self.describe(step) | {'line': line}
      checkpoints.save(self.managers['latest'], state, info)
    self.saved, self.saved_at = (step, line), time.monotonic()

  def due(self):
    """Whether it is time to save."""
    limit = 60 * self.config.save_every_minutes
    late = time.monotonic() - self.saved_at > limit
    return bool(self.workdir and limit and late)

  def describe(self, step):
    """What a checkpoint tells of the run."""
    return {
      'step': step,
      'config': self.config.to_dict(),
      'data': self.facts,
      'best': self.best,
      'totals': self.totals,
    }


def warn_of_thresholds(layers, step, warned):
  """Logs the layers that have a threshold of 0 or less, each of them once."""
  for name, layer in layers.items():
    theta = min(layer['theta'])
    if theta <= 0 and name not in warned:
      logging.warning('%s has a threshold of %g at step %d', name, theta, step)
      warned.add(name)
