"""What an evaluation says of each example, in a file."""

import os
import pathlib

import jax
import numpy as np

from train import step as step_lib


def evaluate(run_eval, variables, batches):
  """Returns what `step.evaluate` does, and what it says of each example.

  Args:
    run_eval: of `create_eval_step(..., each=True)`.
    variables: params and batch_stats.
    batches: of one process.

  Returns:
    The scores, and arrays in the order of the split: `label` [N], `predicted`
    [N], and `logits` [N, K], their mean over time.
  """
  found = []

  def sums():
    for batch in step_lib.on_devices(batches):
      result, each = run_eval(variables, batch)
      found.append(each)
      yield result

  scores = step_lib.average(sums())
  label, logits, mask = (
    np.concatenate([each[name] for each in jax.device_get(found)])
    for name in ('label', 'logits', 'mask')
  )
  logits = logits[mask]
  predicted = logits.argmax(-1).astype(np.int32)
  return scores, {
    'label': label[mask],
    'predicted': predicted,
    'logits': logits,
  }


def check(path):
  """Raises a `ValueError` for a file that `write` could not write."""
  path = pathlib.Path(path)
  if path.suffix != '.npz' or path.is_dir() or not path.parent.is_dir():
    raise ValueError(
      f'expected an .npz file in a folder that exists for predictions, got '
      f'{path}'
    )


def write(path, arrays):
  """Writes an `.npz` file, whole or not at all."""
  path = pathlib.Path(path)
  temporary = path.with_suffix('.tmp')
  try:
    with open(temporary, 'wb') as file:
      np.savez(file, **arrays)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
