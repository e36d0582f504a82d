"""Checkpoints: the latest states and the best one, checked when read.

The only file that knows Orbax. A checkpoint is a state, as host arrays, and
`info`, a dict of plain values with at least `step`; a checksum over both is
kept with them, because array data damaged on disk reads back without an error.
"""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import serialization, traverse_util

# Two of the latest, so that a damaged one leaves one to go back to. The one
# before a step that was not finite is for a look, as train/finite.py says.
KEPT = {'latest': 2, 'best': 1, 'nonfinite': 1}
TORN = '.orbax-checkpoint-tmp'
UNTIL = '.until.'  # `12.until.12` is kept until there is a new 12.


def directory(workdir, which):
  """The folder of the checkpoints of a kind of `KEPT`."""
  return pathlib.Path(workdir).absolute() / 'checkpoints' / which


@contextlib.contextmanager
def manager(workdir, which, tidy=True):
  """Yields the Orbax manager that `save` takes.

  One process alone may open it, whatever the number of processes. `tidy`
  removes what a killed process left half written.

  Raises:
    OSError: the disk is full.
  """
  folder = directory(workdir, which)
  folder.mkdir(parents=True, exist_ok=True)
  if tidy:
    _settle(folder)
  options = ocp.CheckpointManagerOptions(
    create=False,
    max_to_keep=KEPT[which],
    multiprocessing_options=ocp.options.MultiprocessingOptions(
      primary_host=0, active_processes={0}, barrier_sync_key_prefix=which
    ),
  )
  try:
    with ocp.CheckpointManager(folder, options=options) as open_manager:
      yield open_manager
  except Exception as error:  # Orbax's own is of any kind, and pages long.
    if os.strerror(errno.ENOSPC) in str(error):
      raise OSError(
        errno.ENOSPC, os.strerror(errno.ENOSPC), str(workdir)
      ) from error
    raise
  if tidy:
    _settle(folder)


def save(manager, state, info):
  """Saves a state in the background, as step `info['step']`.

  Steps from there on, if any, are left over from before a resume, and go, once
  this one is there: it may be the only one.
  """
  manager.wait_until_finished()  # It might be one of them.
  folder = pathlib.Path(manager.directory)
  _settle(folder)
  if late := [step for step in manager.all_steps() if step >= info['step']]:
    for step in late:
      (folder / str(step)).rename(folder / f'{step}{UNTIL}{info["step"]}')
    manager.reload()
  # Copies: the arrays' memory is given away while Orbax still writes.
  state = jax.tree.map(np.array, serialization.to_state_dict(state))
  info = json.loads(json.dumps(info))  # Tuples read back as lists.
  info['checksum'] = checksum(state, info)
  manager.save(
    info['step'],
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(info)
    ),
  )


def restore(workdir, which='latest', repair=False):
  """Returns the newest intact checkpoint, or None if there is none at all.

  Args:
    workdir: of the run.
    which: a kind of `KEPT`.
    repair: whether to set damaged checkpoints that are newer aside, into
      `checkpoints/damaged/`; none is deleted.

  Returns:
    `(state, info)`, the state as a dict of arrays for
    `flax.serialization.from_state_dict`.

  Raises:
    ValueError: there are checkpoints, but not an intact one. With `repair` a
      damaged best one is set aside, and None: a run can do without.
  """
  folder = directory(workdir, which)
  while folder.is_dir():
    seen = set(folder.iterdir())
    try:
      return _newest(workdir, which, repair)
    except (FileNotFoundError, ValueError):
      if seen == set(folder.iterdir()):
        raise
      # A run that goes on has replaced what was being read.
  return None


def expect(workdir, which='latest'):
  """Returns the checkpoint that is asked for: what `restore` does.

  Args:
    workdir: of the run.
    which: a kind of `KEPT`, or a step that is kept.

  Raises:
    ValueError: there is no such checkpoint, or it is damaged.
  """
  if which in KEPT:
    if found := restore(workdir, which):
      return found
    raise ValueError(
      f'expected a run with a {which} checkpoint in {workdir}, got none'
    )
  kept = {kind: steps(workdir, kind) for kind in KEPT}
  for kind in KEPT:
    if which in kept[kind]:
      with manager(workdir, kind, tidy=False) as open_manager:
        try:
          return _read(open_manager, which)
        except Exception as error:  # What Orbax raises depends on what was hit.
          path = directory(workdir, kind) / str(which)
          raise ValueError(
            f'expected an intact checkpoint in {path}, got {repr(error)[:200]}'
          ) from error
  told = ', '.join(map(str, sorted(set().union(*kept.values()))))
  raise ValueError(
    f'expected {", ".join(map(repr, KEPT))} or a step that is kept in '
    f'{workdir} ({told or "there is none"}), got {which!r}'
  )


def steps(workdir, which):
  """Returns the steps of the checkpoints of a kind of `KEPT`."""
  folder = directory(workdir, which)
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return [int(name) for name in names if name.isdigit()]


def checksum(state, info):
  """CRC-32 of a dict of arrays, names, dtypes and shapes, and of `info`."""
  crc = zlib.crc32(json.dumps(info, sort_keys=True).encode())
  for name, array in sorted(traverse_util.flatten_dict(state, sep='/').items()):
    crc = zlib.crc32(f'{name} {array.dtype} {array.shape}'.encode(), crc)
    crc = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view('u1'), crc)
  return crc


def _settle(folder):
  """Removes what is half written or replaced; what was not yet comes back."""
  for path in folder.glob(f'*{TORN}*'):
    shutil.rmtree(path)
  for path in folder.glob(f'*{UNTIL}*'):
    step, _, new = path.name.partition(UNTIL)
    if (folder / new).exists():
      shutil.rmtree(path)
    else:
      path.rename(folder / step)


def _newest(workdir, which, repair):
  damaged, found = [], None
  with manager(workdir, which, tidy=repair) as open_manager:
    for step in sorted(open_manager.all_steps(), reverse=True):
      try:
        found = _read(open_manager, step)
        break
      except Exception as error:  # What Orbax raises depends on what was hit.
        path = directory(workdir, which) / str(step)
        logging.warning('Damaged checkpoint %s: %s', path, repr(error)[:200])
        damaged.append(step)
  if damaged and not found and not (repair and which == 'best'):
    raise ValueError(
      f'expected an intact checkpoint in {directory(workdir, which)}, got '
      f'damaged ones only (steps {damaged}); remove the folder to start over'
    )
  for step in damaged if repair else ():
    _set_aside(workdir, which, step)
  return found


def _set_aside(workdir, which, step):
  """Moves a damaged checkpoint out of the way; it may still be of use."""
  folder = directory(workdir, 'damaged')
  folder.mkdir(exist_ok=True)
  name = f'{which}_{step}'
  taken = len(list(folder.glob(f'{name}*')))
  target = folder / (f'{name}.{taken}' if taken else name)
  (directory(workdir, which) / str(step)).rename(target)
  logging.warning('It was set aside, as %s', target)


def _read(manager, step):
  restored = manager.restore(
    step,
    args=ocp.args.Composite(
      state=ocp.args.StandardRestore(), info=ocp.args.JsonRestore()
    ),
  )
  state, info = restored['state'], restored['info']
  expected = info.pop('checksum')
  if (got := checksum(state, info)) != expected:
    raise ValueError(f'expected checksum {expected}, got {got}')
  return state, info
