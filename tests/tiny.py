"""A run of a size for tests."""

import os
import signal

import numpy as np

from configs import digits
from train import journal


def config(**fields):
  """The digits' config, of a size for tests."""
  tiny = digits.get_config()
  tiny.update(
    dataset='npz',
    batch_size=8,
    num_epochs=3,
    num_steps=2,
    model_args={'stages': ((4,), (4,))},
    validation_fraction=0.25,
    log_every=2,
    watch_every=0,
    warmup_epochs=0,
  )
  tiny.update(fields)
  return tiny


def stop_after(step, monkeypatch):
  """Sends SIGTERM to this process while it runs a step."""
  read = journal.Journal.step

  def stop(book, number, *args):
    if number == step - 1:  # Its metrics are read while the next one runs.
      os.kill(os.getpid(), signal.SIGTERM)
    return read(book, number, *args)

  monkeypatch.setattr(journal.Journal, 'step', stop)


def save(path, **counts):
  """Saves images of three classes that can be told apart, and returns `path`.

  Args:
    path: of an `.npz` file.
    **counts: `train` and `test`, how many.
  """
  rng = np.random.default_rng(0)
  arrays = {}
  for split, count in counts.items():
    labels = np.arange(count) % 3
    images = rng.integers(0, 120, (count, 8, 8))
    images[np.arange(count), labels * 3] += 120
    arrays |= {f'x_{split}': images.astype(np.uint8), f'y_{split}': labels}
  np.savez(path, **arrays)
  return str(path)
