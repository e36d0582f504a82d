"""The data of a run: split, augmented, batched and normalised.

An example is `{'image', 'label'}`: an image `[H, W, C]` or event frames
`[T, H, W, C]`, and an int32 label. Batches keep the dtype of the source, so
that uint8 images cross to the device as bytes; `normalize` belongs into the
compiled step.
"""

import functools
import itertools
import multiprocessing
import os
import re
import threading
from collections.abc import Sequence
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from train import augment
from train.datasets import sources


class Dataset(NamedTuple):
  """What the job needs to know about its data.

  `train`, `validation` and `test` are sources of examples, the first two of
  them disjoint parts of the training split. `mean` and `std` are `[C]` float32
  on the scale of `normalize`.
  """

  train: Sequence
  validation: Sequence | None
  test: Sequence
  example_shape: tuple[int, ...]
  num_classes: int
  mean: np.ndarray
  std: np.ndarray


def load(config):
  """Returns the `Dataset` that `config.dataset` names.

  Args:
    config: `dataset` is `'npz'`, then `data_path` is the file (see
      `train/datasets/npz.py`), or the name of a TFDS dataset, kept in
      `data_dir` (None: where TFDS keeps them) and prepared there if need be.
      `num_classes`, where not None, is for arrays that do not show them all.
      `validation_fraction` of the training split is held out by `seed`. `mean`
      and `std`, where not None, replace those of the training part;
      `normalize=False` makes them 0 and 1.

  Raises:
    ValueError: wherever data or config are not what was expected.
  """
  if config.dataset == 'npz':
    train, test, num_classes = sources.from_npz(
      config.data_path, config.num_classes
    )
  else:
    train, test, num_classes = sources.from_tfds(
      config.dataset, config.data_dir
    )
    if config.num_classes not in (None, num_classes):
      raise ValueError(
        f'config.num_classes must be {num_classes} or None for '
        f'{config.dataset}, got {config.num_classes}'
      )
  shape = example_shape(train, test, config)
  train, validation = split(train, config.validation_fraction, config.seed)
  mean, std = statistics(train, config)
  return Dataset(train, validation, test, shape, num_classes, mean, std)


def describe(dataset):
  """What inference and a resumed run need to know of the data.

  Kept in checkpoints. The checksums tell other data of the same shape.
  """
  splits = {
    name: getattr(dataset, name)
    for name in ('train', 'validation', 'test')
    if getattr(dataset, name) is not None
  }
  return {
    'num_classes': int(dataset.num_classes),
    'example_shape': [int(size) for size in dataset.example_shape],
    'dtype': dataset.train[0]['image'].dtype.name,
    'mean': dataset.mean.tolist(),
    'std': dataset.std.tolist(),
    'num_examples': {name: len(source) for name, source in splits.items()},
    'checksum': {name: source.checksum() for name, source in splits.items()},
  }


def example_shape(train, test, config):
  """Returns the shape of augmented examples, having tried the augmentation."""
  rng = np.random.default_rng(config.seed)
  shape = augment.training(config.augment)(train[0], rng)['image'].shape
  test_shape = augment.evaluation(config.augment)(test[0])['image'].shape
  if shape != test_shape:
    raise ValueError(
      f'training images of {config.dataset} are {shape} and test images '
      f"{test_shape}; images of many sizes need 'random_resized_crop' in "
      f'config.augment, got {tuple(config.augment)}'
    )
  if len(shape) == 4 and shape[0] != config.num_steps:
    raise ValueError(
      f'{config.dataset} has event frames of {shape} [T, H, W, C]: '
      f'config.num_steps must be {shape[0]}, got {config.num_steps}'
    )
  return shape


def split(source, fraction, seed):
  """Holds out `fraction` of the examples, the same share of every class.

  Records that stay on disk are held out whatever their class: to know it they
  would all have to be read.

  Returns:
    `(rest, held_out)`; `(source, None)` if `fraction` is 0.
  """
  if not 0 <= fraction < 1:
    raise ValueError(
      f'config.validation_fraction must be in [0, 1), got {fraction}'
    )
  if fraction == 0:
    return source, None
  count = len(source)
  order = np.random.default_rng(seed).permutation(count)
  labels = getattr(source, 'labels', np.zeros(count))
  order = order[np.argsort(labels[order], kind='stable')]
  # Evenly spaced among the examples sorted by class.
  held_out = np.diff(np.floor(np.arange(count + 1) * fraction)) > 0
  if not held_out.any():
    raise ValueError(
      f'config.validation_fraction = {fraction} of {count} examples is '
      'less than one'
    )
  return (
    source.take(np.sort(order[~held_out])),
    source.take(np.sort(order[held_out])),
  )


def statistics(source, config):
  """Returns `mean` and `std` for `normalize`, each `[C]` float32."""
  channels = source[0]['image'].shape[-1]
  mean, std = config.mean, config.std
  if not config.normalize:
    mean, std = [0] * channels, [1] * channels
  elif mean is None or std is None:
    if not hasattr(source, 'images'):
      raise ValueError(
        f'{config.dataset} stays on disk: config.mean and config.std must be '
        'given'
      )
    measured = moments(source.images)
    mean = measured[0] if mean is None else mean
    std = measured[1] if std is None else std
  mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
  if not mean.shape == std.shape == (channels,) or not (
    np.isfinite([mean, std]).all() and min(std) > 0
  ):
    raise ValueError(
      f'config.mean and config.std must be {channels} numbers, one a channel, '
      f'std positive, got {mean} and {std}'
    )
  return mean, std


def moments(images):
  """Returns mean and deviation per channel, `[C]`; of uint8 after `/ 255`.

  A constant channel gets deviation 1, so that it can be divided by.
  """
  axes = tuple(range(images.ndim - 1))
  mean = images.mean(axes, dtype=np.float64)
  # Image by image, for no float64 copy of all.
  variance = sum(np.square(image - mean).mean(axes[:-1]) for image in images)
  std = np.sqrt(variance / len(images))
  scale = 255 if images.dtype == np.uint8 else 1
  return mean / scale, np.where(std > 0, std / scale, 1)


def normalize(image, mean, std):
  """Returns `(image - mean) / std` in float32, uint8 divided by 255 before.

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


def this_host():
  """Which part of every batch this process reads."""
  return {'host': jax.process_index(), 'num_hosts': jax.process_count()}


def train_batches(source, config, *, start_step=0, host=0, num_hosts=1):
  """Yields shuffled and augmented batches without end.

  Batch `step` is decided by `config.seed`, `config.batch_size` and `step`
  alone, so that a run resumes at any step. How an example is augmented is
  decided by seed, example and epoch, whatever the number of workers and hosts.

  Args:
    source: examples.
    config: `batch_size` (global), `seed`, `augment`, `num_workers`.
    start_step: the first batch to yield.
    host: this host's index.
    num_hosts: how many hosts share a batch.

  Returns:
    An iterator of `{'image': [b, ...], 'label': [b]}`,
    `b = batch_size // num_hosts`. A worker process that is gone makes it raise
    `ChildProcessError`, and an example that cannot be read `ValueError`.
  """
  batch_size = config.batch_size
  per_host = _per_host(batch_size, num_hosts)
  batches = (
    grain.MapDataset.source(source)
    .seed(config.seed)
    .shuffle()
    .random_map(augment.training(config.augment))
    .slice(slice(len(source) // batch_size * batch_size))
    .slice(slice(host, None, num_hosts))
    .batch(per_host)
    .repeat()
    .slice(slice(start_step, None))
  )
  return _read_ahead(batches, config.num_workers)


def eval_batches(sources, config, *, batch_size, host=0, num_hosts=1):
  """Yields for each source an iterator over its batches.

  A source's batches hold every example once, in order, the last batch filled up
  and masked. They are to be read before the next source's: the same readers go
  on with those. Worker processes read only what stays on disk; a thread is
  faster than they where nothing is left to do but to stack arrays.

  Args:
    sources: a list; of examples, each, and the same one as often as it is to be
      read.
    config: `augment` (for the size of a crop), `num_workers`.
    batch_size: global.
    host: this host's index.
    num_hosts: how many hosts share a batch.

  Returns:
    An iterator of iterators over `{'image': [b, ...], 'label': [b], 'mask':
    [b]}`, `b = batch_size // num_hosts`, as many on every host; `mask` is False
    where the last example fills the batch.
  """
  per_host = _per_host(batch_size, num_hosts)
  counts = [-(-len(source) // batch_size) for source in sources]
  transform = augment.evaluation(config.augment)

  def example(source, index):
    last = len(source) - 1
    return transform(source[min(index, last)]) | {'mask': index <= last}

  def examples(source, times):
    size = -(-len(source) // batch_size) * batch_size
    each = functools.partial(example, source)
    return grain.MapDataset.range(size).map(each).repeat(times)

  # A run of many epochs reads the same source as often.
  same = (list(run) for _, run in itertools.groupby(sources, key=id))
  batches = (
    grain.MapDataset.concatenate([examples(run[0], len(run)) for run in same])
    .slice(slice(host, None, num_hosts))
    .batch(per_host)
  )
  in_memory = all(hasattr(source, 'images') for source in sources)
  batches = _read_ahead(batches, 0 if in_memory else config.num_workers)
  return (itertools.islice(batches, count) for count in counts)


def _per_host(batch_size, num_hosts):
  if batch_size < 1 or batch_size % num_hosts:
    good = max(1, -(-batch_size // num_hosts)) * num_hosts
    raise ValueError(
      f'the batch size must be a positive multiple of {num_hosts} hosts, such '
      f'as {good}, got {batch_size}'
    )
  return batch_size // num_hosts


def _read_ahead(batches, num_workers):
  """Makes batches in a thread, or in worker processes, before they are due."""
  # Two threads would wait for each other: the augmentations hold the GIL.
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
  batches = batches.to_iter_dataset(options)
  if num_workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain reads its own; a notebook has none.
    options = grain.MultiprocessingOptions(num_workers=num_workers)
    batches = batches.mp_prefetch(options, _end_with_parent)
  return _until_death(iter(batches))


def _end_with_parent(worker, num_workers):
  """Has a worker process end where the job was killed; Grain's stay forever."""
  del worker, num_workers

  def wait():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()


def _until_death(batches):
  """Yields batches; says in our words that a worker process is gone.

  Raises:
    ChildProcessError: it is.
  """
  try:
    yield from batches
  except RuntimeError as error:  # Grain's; there is no other way to tell it.
    if 'terminated unexpectedly' not in str(error):
      raise
    code = re.search(r'exit code (-?\d+)', str(error))
    raise ChildProcessError(
      'a process that reads data (config.num_workers) ended with exit code '
      f'{code[1] if code else "unknown"}; -9 is a kill, as of a machine that '
      'is out of memory'
    ) from error
