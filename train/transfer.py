"""Starts a run from the network of another."""

import jax
import numpy as np
from flax import traverse_util

from dsatgo_jax import linen as snn
from train import checkpoints
from train import step as step_lib


def take(state, workdir):
  """Returns a first state with the weights and running values of another run.

  What both networks have under the same name and shape is taken, another
  number of classes or another method notwithstanding. Running thresholds are
  made those of this run's T: the last one is repeated, or later ones go.
  Prints what was taken, made anew and left out.

  Args:
    state: `TrainState`; its optimizer's state and step stay.
    workdir: of the other run, or of a state dict that was converted; its
      latest checkpoint is read.

  Raises:
    ValueError: there is no such checkpoint, or nothing of it fits.
  """
  theirs, info = checkpoints.expect(workdir)
  own, given = (
    traverse_util.flatten_dict(jax.device_get(tree), sep='/')
    for tree in (
      step_lib.variables(state),
      {name: theirs[name] for name in ('params', 'batch_stats')},
    )
  )
  made, taken = [], {}
  for name, array in own.items():
    found = given.get(name)
    if found is not None and found.ndim and array.ndim:
      found = snn.resize_time({name: found}, len(array))[name]
    if found is None or found.shape != array.shape:
      made.append(f'{name} {array.shape}')
    else:
      taken[name] = np.asarray(found, array.dtype)
  if not taken:
    raise ValueError(
      f'expected a network like that of this run in {workdir}, got one without '
      f'an array of the same name and shape: {", ".join(given)}'
    )
  left = [name for name in given if name not in own]
  print(
    f'from {workdir}, step {info["step"]}: {len(taken)} arrays taken; '
    f'made anew: {", ".join(made) or "none"}; '
    f'left out: {", ".join(left) or "none"}'
  )
  return state.replace(**traverse_util.unflatten_dict(own | taken, sep='/'))
