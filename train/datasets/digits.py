"""Handwritten digits: 1,797 images of 8 x 8 pixels, shipped by scikit-learn.

The test part of the UCI "Optical Recognition of Handwritten Digits" set
(Alpaydin and Kaynak, 1998). No download, no TensorFlow.
"""

import numpy as np
import tensorflow_datasets as tfds


def arrays(seed=0):
  """Returns the digits, split 80/20 with the same share of every class.

  Args:
    seed: decides which images are held out.

  Returns:
    `x_train, x_test, y_train, y_test`: 1,437 and 360 images `[N, 8, 8, 1]`
    uint8, their grey values 0..16 spread over the byte (`255 / 16 * value`,
    rounded), and labels `[N]`.
  """
  # Takes longer to import than the digits take to build.
  from sklearn import datasets, model_selection

  images, labels = datasets.load_digits(return_X_y=True)
  images = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
  return model_selection.train_test_split(
    images, labels, test_size=0.2, random_state=seed, stratify=labels
  )


class Digits(tfds.core.GeneratorBasedBuilder):
  """Handwritten digits, 8 x 8, in ten classes."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description='Handwritten digits, 8 x 8, shipped by scikit-learn.',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
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
