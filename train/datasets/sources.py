"""Datasets as random access sources of examples `{'image', 'label'}`."""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import sys
import zlib
from collections.abc import Sequence

import numpy as np
import requests
import tensorflow_datasets as tfds
from google.protobuf import json_format  # TFDS's, and it lets it through.

# The builders register themselves with TFDS when they are imported.
from train.datasets import (  # noqa: F401
  archive,
  cifar10_dvs,
  digits,
  digits_dvs,
  mnist_5000,
  npz,
)

# What TFDS cannot download, and where users get it.
MANUAL_FILES = {
  'imagenet2012': {
    file: 'https://image-net.org/download-images (you have to register)'
    for file in ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')
  }
}


@dataclasses.dataclass(frozen=True)
class Arrays:
  """Images `[N, ...]` and labels `[N]` in memory."""

  images: np.ndarray
  labels: np.ndarray

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    return {'image': self.images[index], 'label': self.labels[index]}

  def take(self, indices):
    """Returns the examples at `indices`."""
    return Arrays(self.images[indices], self.labels[indices])

  def checksum(self):
    """CRC-32 of all labels and images."""
    crc = zlib.crc32(np.ascontiguousarray(self.labels))
    return zlib.crc32(np.ascontiguousarray(self.images), crc)


@dataclasses.dataclass(frozen=True)
class Records:
  """Examples of a TFDS data source, decoded when they are read."""

  source: Sequence
  indices: np.ndarray

  def __len__(self):
    return len(self.indices)

  def __getitem__(self, index):
    index = int(self.indices[index])
    with naming_file(self.source, index):
      example = self.source[index]
    return {'image': example['image'], 'label': np.int32(example['label'])}

  def take(self, indices):
    """Returns the examples at `indices`."""
    return Records(self.source, self.indices[indices])

  def checksum(self):
    """CRC-32 of the labels and shapes of sixteen; all would take too long."""
    some = np.linspace(0, len(self) - 1, 16, dtype=int)
    examples = [self[index] for index in some]
    facts = [(int(e['label']), e['image'].shape) for e in examples]
    return zlib.crc32(repr(facts).encode())


@contextlib.contextmanager
def naming_file(source, index):
  """Names the file of an example that cannot be read from a TFDS data source.

  Raises:
    ValueError: instead of whatever is raised within.
  """
  try:
    yield
  except Exception as error:  # What is raised depends on what is wrong.
    if not hasattr(source, 'dataset_info'):
      raise
    split = source.dataset_info.splits[source.split]
    shard = np.searchsorted(np.cumsum(split.shard_lengths), index, 'right')
    raise ValueError(
      f'damaged file {split.filepaths[shard]}: example {index} of the split: '
      f'{error}'
    ) from error


def from_npz(path, num_classes=None):
  """Returns `(train, test, num_classes)` of a user's file, see `npz.read`."""
  x_train, y_train, x_test, y_test, num_classes = npz.read(path, num_classes)
  return Arrays(x_train, y_train), Arrays(x_test, y_test), num_classes


def from_tfds(name, data_dir=None):
  """Returns `(train, test, num_classes)` of a TFDS dataset.

  Images of one size are read into memory, as `Arrays`; images of many sizes
  (ImageNet) stay on disk, as `Records`.

  Args:
    name: as TFDS takes it; the dataset needs features `image` and `label`.
    data_dir: where TFDS keeps its datasets, None for its default.

  Raises:
    ValueError: for an unknown name, or saying what it takes to prepare it; for
      one prepared in a format without random access, or with other features;
      naming a file that is damaged; for images of one size that are larger
      than the memory.
  """
  data_dir = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
  make = functools.partial(
    tfds.builder, name, data_dir=data_dir, file_format='array_record'
  )
  try:
    builder = make()
  except tfds.core.registered.DatasetNotFoundError as error:
    raise ValueError(
      f"config.dataset: expected 'npz' or a dataset of TFDS, got {name!r}"
    ) from error
  except (json_format.ParseError, AssertionError) as error:  # Another version.
    folder = os.path.join(data_dir, name)
    raise ValueError(
      f'damaged dataset_info.json in {folder}: {error}; where the folder is '
      'moved away, the dataset is prepared anew'
    ) from error
  if not builder.is_prepared():
    _prepare(builder, name, data_dir)
    builder = make()
  features = builder.info.features
  if not {'image', 'label'} <= set(features):
    raise ValueError(f'{name} has no image and label but {sorted(features)}')
  test = 'validation' if name.startswith('imagenet2012') else 'test'
  try:
    train, test = _read(builder, 'train'), _read(builder, test)
  except NotImplementedError as error:  # TFDS's word for such a format.
    raise ValueError(str(error)) from error
  return train, test, features['label'].num_classes


def _read(builder, split):
  """Returns one split of a prepared dataset."""
  source = builder.as_data_source(split=split)
  feature = builder.info.features['image']
  if None in feature.shape:
    return Records(source, np.arange(len(source)))
  shape = (len(source), *feature.shape)
  size = math.prod(shape) * np.dtype(feature.np_dtype).itemsize
  archive.fits(size, f'{builder.data_dir}, {split}')
  images = np.empty(shape, feature.np_dtype)
  labels = np.empty(len(source), np.int32)
  for index in range(len(source)):
    with naming_file(source, index):
      example = source[index]
      images[index], labels[index] = example['image'], example['label']
  num_classes = builder.info.features['label'].num_classes
  if bad := np.count_nonzero((labels < 0) | (labels >= num_classes)):
    raise ValueError(
      f'{builder.data_dir}, {split}: expected labels in 0..{num_classes - 1}, '
      f'got {bad} others of {len(labels)}'
    )
  return Arrays(images, labels)


def _prepare(builder, name, data_dir):
  """Writes a dataset to disk, or says at once what is missing for it."""
  if missing := _missing(builder, os.path.join(data_dir, 'downloads/manual')):
    raise ValueError(
      f'{name} is not in {data_dir}, and cannot be prepared without\n'
      + ''.join(f'- {line}\n' for line in missing)
      + 'With these, run this command again, or prepare it alone by\n'
      f'tfds build {name} --file_format=array_record --data_dir={data_dir}'
    )
  try:
    # Standard output belongs to the command that reads the data.
    with contextlib.redirect_stdout(sys.stderr):
      builder.download_and_prepare()
  except OSError as error:
    # Another process may have been quicker.
    if not builder.is_prepared():
      raise ValueError(f'{name} could not be prepared: {error}') from error


def _missing(builder, folder):
  """Returns what TFDS's own builders lack, before they try for minutes."""
  if type(builder).__module__.startswith('train.'):
    return []
  missing = []
  if importlib.util.find_spec('tensorflow') is None:
    missing.append('TensorFlow, for this one step: pip install tensorflow')
  manual = MANUAL_FILES.get(builder.name, {})
  for file, origin in manual.items():
    if not os.path.exists(os.path.join(folder, file)):
      missing.append(f'{folder}/{file}, from {origin}')
  for url, info in {} if manual else (builder.url_infos or {}).items():
    if not os.path.exists(os.path.join(folder, info.filename)):
      try:
        requests.head(url, timeout=10)
      except requests.RequestException:
        missing.append(f'a connection to {url}, or {folder}/{info.filename}')
        break
  return missing
