"""One process at a time writes in a workdir."""

import contextlib
import fcntl
import os
import pathlib
import socket

from absl import logging


@contextlib.contextmanager
def hold(workdir):
  """Makes the folder, and keeps other processes out of it while inside.

  The lock is the system's, on `workdir/lock`, and ends with the process,
  however that ends. It is for those who write; reading takes none.

  Raises:
    ValueError: the folder cannot be written, or another process holds it.
  """
  path = pathlib.Path(workdir) / 'lock'
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, 'a+')
  except OSError as error:
    raise ValueError(
      f'expected a workdir that can be written, got {workdir}: {error.strerror}'
    ) from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise ValueError(
        f'{workdir} is in use by {file.read().strip() or "another process"}: '
        'wait until it has ended, or choose another workdir'
      ) from error
    except OSError as error:  # Some network file systems have no locks.
      logging.warning(
        '%s cannot be locked (%s): start no other run in it', workdir, error
      )
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    yield
