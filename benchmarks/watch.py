"""What watching costs: activity, histograms and gradients, every N steps.

  python -m benchmarks.watch [--json FILE] [--repeats N]

The job's own programs, on random images: the training step alone, the same
after the watch step (`config.watch_every`), and what the host does with what
was watched: JSON and TensorBoard. From their times, what a run takes in which
every 100th step is watched, in percent of one in which none is; in the job the
host writes while the devices compute, so that this is the most it can be.
Temporary memory is the compiler's; compiling is done once a run.
"""

import pathlib
import tempfile
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import timing
from configs import digits
from train import metrics, watch
from train import step as step_lib

EVERY = 100
# A config's fields, and the shape of an image.
RUNS = {
  'digits: ConvNet, T = 4, batch 64': ({}, (8, 8, 1)),
  'ResNet-19 of an eighth of the width, T = 2, batch 16': (
    {
      'model': 'ResNet19',
      'model_args': ConfigDict({'planes': (16, 32, 64), 'head_width': 32}),
      'num_steps': 2,
      'batch_size': 16,
    },
    (32, 32, 3),
  ),
}


def compiled(step, *arguments):
  """A step compiled as in the job, and how long that took."""
  start = time.perf_counter()
  program = step_lib.compile_step(step.lower(*arguments))
  return program, time.perf_counter() - start


def measure(arguments):
  """Measures and prints everything."""
  results = {}
  for title, (fields, shape) in RUNS.items():
    config = digits.get_config()
    for name, value in fields.items():
      config[name] = value
    results[title] = of_run(config, shape, arguments.repeats)
    timing.table(title, results[title], ('ms', 'of plain', 'MiB', 'compile s'))
    rows = results[title]
    extra = sum(rows[name]['ms'] for name in ('watch step', 'writing'))
    percent = 100 * extra / (EVERY * rows['plain step']['ms'])
    print(f'every {EVERY}th step watched: {percent:.2f} % more time')
    results[title]['every 100th, %'] = percent
  return results


def of_run(config, shape, repeats):
  """Times of the parts, by name."""
  facts = {
    'num_classes': 10,
    'example_shape': shape,
    'mean': [0.5] * shape[-1],
    'std': [0.3] * shape[-1],
  }
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (config.batch_size, *shape), np.uint8),
    'label': rng.integers(0, 10, config.batch_size, np.int32),
  }
  batch = next(step_lib.on_devices(iter([batch])))
  state, run_step = step_lib.create_train_step(config, facts, 20)
  run_step, step_seconds = compiled(run_step, state, batch)
  run_watch, watch_seconds = compiled(
    watch.create_watch_step(config, facts), step_lib.variables(state), batch
  )
  states = [state]  # The step gives its state away.

  def plain():
    state, measured = run_step(states.pop(), batch)
    states.append(state)
    jax.device_get(measured)

  def watched():
    return jax.device_get(run_watch(step_lib.variables(states[0]), batch))

  found = watched()
  with (
    tempfile.TemporaryDirectory() as folder,
    metrics.writer(pathlib.Path(folder), 0) as write,
  ):

    def writing():
      write({'step': 1, 'watch': metrics.numbers(found)})

    times = timing.medians(
      {'plain step': plain, 'watch step': watched, 'writing': writing},
      repeats,
      seconds=300,
    )
  rows = {
    name: {'ms': ms, 'of plain': ms / times['plain step']}
    for name, ms in times.items()
  }
  for name, program, seconds in (
    ('plain step', run_step, step_seconds),
    ('watch step', run_watch, watch_seconds),
  ):
    memory = program.memory_analysis().temp_size_in_bytes
    rows[name] |= {'MiB': memory / 2**20, 'compile s': seconds}
  return rows


if __name__ == '__main__':
  timing.main(__doc__.split('\n')[0], measure)
