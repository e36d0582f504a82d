"""A run of a size for tests."""

import numpy as np

from configs import digits


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
