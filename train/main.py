"""Trains a spiking network.

  python -m train.main --config=configs/digits.py --workdir=runs/digits

Every field of the config can be set on the command line, as in
`--config.num_epochs=5 --config.method=vanilla`; the config file explains them.
The same command again resumes a run that was interrupted, exactly. The process
exits with 0 when the run is finished, 75 after a signal, the state saved, 70
when it hung, and 1 after an error.
"""

import collections
import time

from absl import flags

from train import command

COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'For several processes: HOST:PORT of the first one, on every one of them. '
  '"auto" where JAX knows the cluster manager, as Slurm.',
)
NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many processes train together.'
)
PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this one is, counted from 0.'
)
EXTEND = flags.DEFINE_bool(
  'extend',
  False,
  'Train a run on for more epochs than it was begun with. The learning rate '
  'goes on along the schedule of so many epochs, and so rises again.',
)


def join():
  """Joins the other processes, if there are any."""
  import faulthandler

  import jax

  if COORDINATOR.value:
    # Where one process dies JAX aborts the others, and says so in a line that
    # the stacks of all threads would bury.
    faulthandler.disable()
  if COORDINATOR.value == 'auto':
    jax.distributed.initialize()
  elif COORDINATOR.value:
    jax.distributed.initialize(
      COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
    )


def main():
  """Trains, writes the report, prints the result and where the time went."""
  seconds = collections.Counter()
  start = time.perf_counter()
  # Late, so that --help and misspelt flags are answered at once.
  from train import loop, metrics, report

  join()
  command.keep_compiled()
  seconds['import'] = time.perf_counter() - start
  result = loop.train(
    command.CONFIG.value, command.WORKDIR.value, seconds, EXTEND.value
  )
  if result:
    with metrics.timed(seconds, 'report'):
      page = report.write(command.WORKDIR.value)
    print(report.headline(result))
    print(f'report: {page}')
    times = ', '.join(f'{name} {s:.1f}' for name, s in seconds.items())
    print(f'seconds: {times}')


if __name__ == '__main__':
  command.run(main, 'config', 'workdir')
