"""Runs the job again and again, each time until a moment at which it dies.

  python -m tests.killed --at=MOMENT [--at=MOMENT ...] [FLAGS OF train.main]

A moment is `module:function:N`, the N-th call of a function; after `>` another
follows, counted from there on, and after `+` seconds to wait. There the process
kills itself, as `kill -9` does: nothing is flushed, closed or told; with `!15`
it is sent that signal instead. An empty moment never comes. Flags may follow,
for this run alone. Each run is a process of its own, forked from one that has
imported everything and started nothing; a line says what it ended with.
"""

import functools
import itertools
import os
import pkgutil
import signal
import sys
import threading
import warnings

from train import command, main
from train import loop as _loop  # noqa: F401
from train import report as _report  # noqa: F401


def arm(moment):
  """Has this process kill itself when a moment comes."""
  if not moment:
    return
  moment, _, number = moment.partition('!')
  die = functools.partial(os.kill, os.getpid(), int(number or signal.SIGKILL))
  arm_chain(moment, die)


def arm_chain(moment, die):
  """Has `die()` called when a moment comes."""
  here, _, then = moment.partition('>')
  here, _, seconds = here.partition('+')
  name, _, number = here.rpartition(':')
  module, _, path = name.partition(':')
  *owner, attribute = path.split('.')
  owner = pkgutil.resolve_name(':'.join([module, '.'.join(owner)]).rstrip(':'))
  function, calls = getattr(owner, attribute), itertools.count(1)

  def counted(*args, **kwargs):
    if next(calls) == int(number):
      if then:
        arm_chain(then, die)
      elif seconds:
        threading.Timer(float(seconds), die).start()
      else:
        die()
    return function(*args, **kwargs)

  setattr(owner, attribute, counted)


def run_all(moments):
  """Runs the job once for each moment, and says what each run ended with."""
  for moment in moments:
    sys.stdout.flush()
    with warnings.catch_warnings():
      # JAX has no threads yet: its devices come with their first use.
      warnings.filterwarnings('ignore', 'os.fork', RuntimeWarning)
      child = os.fork()
    if not child:
      moment, *flags = moment.split(' ')
      sys.argv += flags
      arm(moment)
      command.run(main.main, 'config', 'workdir')
    _, status = os.waitpid(child, 0)
    print(f'{moment}: ended with {os.waitstatus_to_exitcode(status)}')


if __name__ == '__main__':
  moments = [arg[5:] for arg in sys.argv if arg.startswith('--at=')]
  sys.argv = [arg for arg in sys.argv if not arg.startswith('--at=')]
  run_all(moments)
