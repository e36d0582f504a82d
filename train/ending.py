"""How a run may end before it is through: by a signal, or because it hangs.

What the process exits with then tells the two from an error, which is 1.
"""

import contextlib
import faulthandler
import itertools
import os
import signal
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils

STOPPED = os.EX_TEMPFAIL  # 75; the same command goes on.
HUNG = os.EX_SOFTWARE  # 70


class Stopped(Exception):
  """A signal came, and the run has to end where it is."""


@contextlib.contextmanager
def signals():
  """Yields `stopping()`: whether SIGTERM or Ctrl-C came.

  Before it is asked for the first time there is nothing to save, and either
  ends the process at once, as a second one always does. Of several processes,
  each of which must ask as often, all hear it at the same question. A thread
  other than the main one hears none.
  """
  asked, received, begun = itertools.count(), [], False
  several = jax.process_count() > 1
  numbers = {signal.SIGTERM, signal.SIGINT}
  if several:
    numbers.remove(signal.SIGTERM)  # JAX listens to it.
  if threading.current_thread() is not threading.main_thread():
    numbers.clear()  # Python lets the main thread alone listen.
  handlers = {number: signal.getsignal(number) for number in numbers}

  def restore():
    for number, handler in handlers.items():
      signal.signal(number, handler)

  def receive(number, _):
    restore()
    received.append(number)
    if several:
      os.kill(os.getpid(), signal.SIGTERM)
    elif not begun:
      end('before the first step')

  def stopping():
    nonlocal begun
    begun = True
    if several:
      return multihost_utils.reached_preemption_sync_point(next(asked))
    return bool(received)

  for number in handlers:
    signal.signal(number, receive)
  try:
    yield stopping
  finally:
    restore()


def end(when):
  """Ends the process after a signal; says how to go on."""
  print(f'stopped {when}; the same command resumes', file=sys.stderr)
  raise SystemExit(STOPPED)


@contextlib.contextmanager
def watchdog(minutes):
  """Yields `beat()`, which must be called at least every so many minutes.

  Otherwise every thread's stack is printed and the process ends: it waits for
  something that will not come, such as another process that has died.

  Args:
    minutes: 0 for as long as it likes.
  """
  last, over = time.monotonic(), threading.Event()

  def beat():
    nonlocal last
    last = time.monotonic()

  def watch():
    while not over.wait(minutes * 60 / 20):
      if time.monotonic() - last > minutes * 60:
        faulthandler.dump_traceback(sys.__stderr__)
        print(
          f'error: expected a step every config.hang_minutes = {minutes}, got '
          'none: above is where each thread waits; the same command resumes',
          file=sys.stderr,
          flush=True,
        )
        os._exit(HUNG)

  if minutes:
    threading.Thread(target=watch, daemon=True).start()
  try:
    yield beat
  finally:
    over.set()
