"""The data of a run: TFDS or the user's own arrays, read through Grain.

An example is `{'image', 'label'}`: an image `[H, W, C]` or event frames
`[T, H, W, C]`, and an int32 label. Batches keep the dtype of the source, so
that uint8 images cross to the device as bytes; `normalize` belongs into the
compiled step.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import grain
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds

from train import augment
from train.datasets import digits, npz  # noqa: F401, digits registers itself.


class Dataset(NamedTuple):
  """What the job needs to know about its data.

  `train` and `validation` are disjoint parts of the training split; `mean` and
  `std` are `[C]` float32 on the scale of `normalize`.
  """

  train: Sequence
  validation: Sequence | None
  test: Sequence
  example_shape: tuple[int, ...]
  num_classes: int
  mean: np.ndarray
  std: np.ndarray


@dataclasses.dataclass(frozen=True)
class Arrays:
  """Images `[N, ...]` and labels `[N]` in memory, as a source of examples."""

  images: np.ndarray
  labels: np.ndarray

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    return {'image': self.images[index], 'label': self.labels[index]}


def load(config):
  """Returns the `Dataset` that `config.dataset` names.

  Args:
    config: `dataset` is `'npz'` (then `data_path` is the file, see `npz.read`)
      or the name of a TFDS dataset, which is prepared in `data_dir` (None:
      TFDS's own default) if it is not there. `validation_fraction` of the
      training split is held out, by `seed`, the same share of every class.
      `mean` and `std`, where not None, replace those of the training part;
      `normalize=False` makes them 0 and 1.

  Raises:
    ValueError: wherever data or config are not what was expected.
  """
  if config.dataset == 'npz':
    *arrays, num_classes = npz.read(config.data_path, config.get('num_classes'))
    train, test = Arrays(*arrays[:2]), Arrays(*arrays[2:])
  else:
    train, test, num_classes = read_tfds(config.dataset, config.data_dir)
  shape = train[0]['image'].shape
  if len(shape) == 4 and shape[0] != config.num_steps:
    raise ValueError(
      f'{config.dataset} has event frames of {shape} [T, H, W, C]: '
      f'config.num_steps must be {shape[0]}, got {config.num_steps}'
    )
  train, validation = split(train, config.validation_fraction, config.seed)
  mean, std = statistics(train, config)
  return Dataset(train, validation, test, shape, num_classes, mean, std)


def read_tfds(name, data_dir=None):
  """Prepares a TFDS dataset where needed; returns train, test, num_classes."""
  if data_dir is not None:
    data_dir = os.path.expanduser(data_dir)
  builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
  try:
    # A command's standard output is its own, `--json` above all.
    with contextlib.redirect_stdout(sys.stderr):
      builder.download_and_prepare()
  except OSError:  # Another process of this job may have been quicker.
    builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    if not builder.is_prepared():
      raise

  def read(split):
    source = builder.as_data_source(split=split)
    examples = source.__getitems__(range(len(source)))
    return Arrays(
      np.stack([example['image'] for example in examples]),
      np.array([example['label'] for example in examples], np.int32),
    )

  num_classes = builder.info.features['label'].num_classes
  return read('train'), read('test'), num_classes


def split(source, fraction, seed):
  """Holds out `fraction` of a source, the same share of every class.

  Returns:
    `(rest, held_out)`, disjoint, chosen by `seed`; `(source, None)` if
    `fraction` is 0.
  """
  if not 0 <= fraction < 1:
    raise ValueError(
      f'config.validation_fraction must be in [0, 1), got {fraction}'
    )
  if fraction == 0:
    return source, None
  order = np.random.default_rng(seed).permutation(len(source))
  order = order[np.argsort(source.labels[order], kind='stable')]
  # Evenly spaced over the examples sorted by class.
  held_out = np.diff(np.floor(np.arange(len(order) + 1) * fraction)) > 0
  if not held_out.any():
    raise ValueError(
      f'config.validation_fraction = {fraction} of {len(order)} examples is '
      'less than one'
    )
  return tuple(
    Arrays(source.images[index], source.labels[index])
    for index in (np.sort(order[~held_out]), np.sort(order[held_out]))
  )


def statistics(source, config):
  """Returns `mean` and `std` for `normalize`, each `[C]` float32."""
  channels = source[0]['image'].shape[-1]
  if not config.normalize:
    return np.zeros(channels, np.float32), np.ones(channels, np.float32)
  if config.mean is None or config.std is None:
    mean, std = moments(source.images)
  mean = np.asarray(mean if config.mean is None else config.mean, np.float32)
  std = np.asarray(std if config.std is None else config.std, np.float32)
  if mean.shape != (channels,) or std.shape != (channels,) or (std <= 0).any():
    raise ValueError(
      f'config.mean and config.std must be {channels} numbers, one a channel, '
      f'and std positive, got {config.mean} and {config.std}'
    )
  return mean, std


def moments(images):
  """Mean and deviation per channel, `[C]`; of uint8 images after `/ 255`.

  A constant channel has deviation 1, so that it can be divided by.
  """
  axes = tuple(range(images.ndim - 1))
  mean = images.mean(axes, dtype=np.float64)
  # Image by image, for no float64 copy of the dataset.
  variance = sum(np.square(x - mean).mean(axes[:-1]) for x in images)
  std = np.sqrt(variance / len(images))
  scale = 255 if images.dtype == np.uint8 else 1
  return mean / scale, np.where(std > 0, std / scale, 1.0)


def normalize(image, mean, std):
  """`(image - mean) / std` in float32, uint8 divided by 255 before.

  Args:
    image: `[..., C]`, uint8 or float.
    mean: `[C]`.
    std: `[C]`.
  """
  scale = 255 if image.dtype == jnp.uint8 else 1
  return (image.astype(jnp.float32) / scale - mean) / std


def steps_per_epoch(dataset, config):
  """Returns the whole batches in an epoch; what is left over is dropped."""
  if config.batch_size > len(dataset.train):
    raise ValueError(
      f'config.batch_size = {config.batch_size} is more than the '
      f'{len(dataset.train)} training examples'
    )
  return len(dataset.train) // config.batch_size


def train_batches(source, config, *, start_step=0, host=0, num_hosts=1):
  """Yields shuffled, augmented training batches without end.

  Batch `step` is decided by `config.seed`, `config.batch_size` and `step`
  alone, so a run resumes at any step; the augmentation of an example is
  decided by seed, example and epoch, whatever the number of workers and hosts.

  Args:
    source: examples.
    config: `batch_size` (global), `seed`, `augment`, `num_workers`.
    start_step: the first batch to yield.
    host: this host's index.
    num_hosts: how many hosts share a batch.

  Returns:
    An iterator of `{'image': [b, ...], 'label': [b]}`,
    `b = batch_size // num_hosts`.
  """
  used = len(source) // config.batch_size * config.batch_size
  batches = (
    grain.MapDataset.source(source)
    .seed(config.seed)
    .shuffle()
    .random_map(augment.compose(config.augment))
    .slice(slice(used))
    .slice(slice(host, None, num_hosts))  # After the augmentation's seeds.
    .batch(_per_host(config.batch_size, num_hosts))
    .repeat()
    .slice(slice(start_step, None))
  )
  return iter(_prefetch(batches, config))


def eval_batches(source, config, *, batch_size, host=0, num_hosts=1):
  """Yields every example once, in order; the last batch padded and masked.

  Args:
    source: examples.
    config: `num_workers`.
    batch_size: global.
    host: this host's index.
    num_hosts: how many hosts share a batch.

  Returns:
    An iterator of `{'image': [b, ...], 'label': [b], 'mask': [b]}`,
    `b = batch_size // num_hosts`, as many on every host; `mask` is False where
    the last example was repeated to fill the batch.
  """
  count = len(source)

  def example(index):
    return source[min(index, count - 1)] | {'mask': index < count}

  batches = (
    grain.MapDataset.range(-(-count // batch_size) * batch_size)
    .map(example)
    .slice(slice(host, None, num_hosts))
    .batch(_per_host(batch_size, num_hosts))
  )
  return iter(_prefetch(batches, config))


def _per_host(batch_size, num_hosts):
  if batch_size < 1 or batch_size % num_hosts:
    raise ValueError(
      f'the batch size must be a positive multiple of the {num_hosts} hosts, '
      f'got {batch_size}'
    )
  return batch_size // num_hosts


def _prefetch(batches, config):
  """Reads ahead, a few batches, in threads or in worker processes."""
  batches = batches.to_iter_dataset(
    grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
  )
  if config.num_workers:
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=config.num_workers)
    )
  return batches
