r"""Makes the data on which methods are tried: the training split, split again.

  python -m findings.pilot --config=configs/findings/digits.py --out=pilot.npz
  python -m train.compare --config=configs/findings/digits.py \
    --config.dataset=npz --config.data_path=pilot.npz --config.seed=100 \
    --seeds=3 --methods=ds_atgo,isometric --workdir=runs/pilot

A fifth of it takes the place of the test split, which stays unseen.
"""

import numpy as np
from absl import flags
from sklearn import model_selection

from train import command, data

OUT = flags.DEFINE_string('out', None, 'The .npz file to write.')


def split(images, labels):
  """Returns the arrays of an `npz` dataset, the same share of every class."""
  x_train, x_test, y_train, y_test = model_selection.train_test_split(
    images, labels, test_size=0.2, random_state=1, stratify=labels
  )
  return {
    'x_train': x_train, 'x_test': x_test, 'y_train': y_train, 'y_test': y_test,
  }  # fmt: skip


def main():
  """Writes the file."""
  config = command.CONFIG.value
  config.validation_fraction = 0.0
  train = data.load(config).train
  np.savez(OUT.value, **split(train.images, train.labels))


if __name__ == '__main__':
  command.run(main, 'config', 'out')
