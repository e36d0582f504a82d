"""Speed of the data pipeline: `python -m benchmarks.data [--json FILE]`.

Images a second of the CIFAR pipeline, with the published augmentation in 0, 1
and 2 worker processes and with parts of it in none, to see what limits it; and
`.aedat` recordings a second, from file to resized frames. All data generated.
"""

import json
import pathlib
import tempfile
import time

import ml_collections
import numpy as np
from absl import app, flags

from train import data
from train.datasets import cifar10_dvs, sources

_JSON = flags.DEFINE_string('json', None, 'Where to write the figures.')

CROP_FLIP = ('random_crop', 'flip')
CASES = (
  ((), 0),
  (CROP_FLIP, 0),
  (('autoaugment_cifar10',), 0),
  ((*CROP_FLIP, 'autoaugment_cifar10'), 0),
  ((*CROP_FLIP, 'autoaugment_cifar10'), 1),
  ((*CROP_FLIP, 'autoaugment_cifar10'), 2),
)


def rate(iterator, draws, items):
  """Items a second over `draws` draws of `items` items each."""
  start = time.perf_counter()
  for _ in range(draws):
    next(iterator)
  return draws * items / (time.perf_counter() - start)


def cifar_rate(augment, num_workers, batch_size=100, draws=300):
  """Images a second of a CIFAR-sized training pipeline."""
  rng = np.random.default_rng(0)
  source = sources.Arrays(
    rng.integers(0, 256, (10_000, 32, 32, 3), np.uint8),
    rng.integers(0, 10, 10_000).astype(np.int32),
  )
  config = ml_collections.ConfigDict(
    {
      'seed': 0,
      'batch_size': batch_size,
      'augment': augment,
      'num_workers': num_workers,
    }
  )
  batches = data.train_batches(source, config)
  for _ in range(50):  # While the workers start, and read ahead.
    next(batches)
  return rate(batches, draws, batch_size)


def aedat_rate(num_events=200_000, files=50):
  """CIFAR10-DVS recordings a second, decoded to frames `[10, 48, 48, 2]`."""
  rng = np.random.default_rng(0)
  events = np.stack(
    [
      rng.integers(0, 0x8000, num_events),
      np.sort(rng.integers(0, 1_300_000, num_events)),
    ],
    axis=1,
  )
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'recording.aedat'
    path.write_bytes(b'#!AER-DAT2.0\r\n' + events.astype('>u4').tobytes())

    def recordings():
      while True:
        arrays = cifar10_dvs.decode(path.read_bytes())
        frames = cifar10_dvs.frames(*arrays, num_steps=10, by='count')
        yield cifar10_dvs.resize(frames, cifar10_dvs.SIZE)

    return rate(recordings(), files, 1)


def main(argv):
  """Prints the table."""
  del argv
  rows = [
    {
      'augment': ', '.join(augment),
      'num_workers': num_workers,
      'images_per_second': cifar_rate(augment, num_workers),
    }
    for augment, num_workers in CASES
  ]
  print('CIFAR pipeline, batch 100'.ljust(42), 'workers  images/s')
  for row in rows:
    print(
      f'{row["augment"] or "no augmentation":42} {row["num_workers"]:7}'
      f'{row["images_per_second"]:10,.0f}'
    )
  files = aedat_rate()
  print(f'\n.aedat, 200,000 events: {files:.0f} files/s')
  if _JSON.value:
    figures = {'cifar': rows, 'aedat_files_per_second': files}
    pathlib.Path(_JSON.value).write_text(json.dumps(figures, indent=2) + '\n')


if __name__ == '__main__':
  app.run(main)
