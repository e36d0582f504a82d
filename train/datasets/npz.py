"""Users' own arrays: one `.npz` file with both splits."""

import contextlib
import os
import zipfile
import zlib

import numpy as np


def read(path, num_classes=None):
  """Reads and checks a user's arrays.

  Args:
    path: a file with `x_train`, `y_train`, `x_test` and `y_test`: images
      `[N, H, W]` or `[N, H, W, C]` or event frames `[N, T, H, W, C]`, uint8 or
      float; labels `[N]`, integers from 0.
    num_classes: None takes the largest label of `y_train`, and then wants every
      class below it there too.

  Returns:
    `(x_train, y_train, x_test, y_test, num_classes)`, images with a channel
    axis and uint8 or float32, labels int32.

  Raises:
    ValueError: naming what was expected and what the file has.
  """
  with _named(path) as path:
    arrays = _arrays(path, ('x_train', 'y_train', 'x_test', 'y_test'))
    x_train, y_train = _split(arrays, 'train')
    x_test, y_test = _split(arrays, 'test')
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
      raise ValueError(
        'x_train and x_test must agree, got '
        f'{x_train.shape[1:]} {x_train.dtype} and '
        f'{x_test.shape[1:]} {x_test.dtype}'
      )
    if num_classes is None:
      num_classes = int(y_train.max()) + 1
      if (found := len(np.unique(y_train))) < num_classes:
        raise ValueError(
          f'y_train goes up to {num_classes - 1} but has {found} classes only: '
          'number them from 0 without gaps, or set config.num_classes'
        )
    y_train = _below(num_classes, 'y_train', y_train)
    y_test = _below(num_classes, 'y_test', y_test)
  return x_train, y_train, x_test, y_test, num_classes


def read_test(path, num_classes):
  """Reads and checks `x_test` and `y_test` alone, as `read` does.

  Returns:
    `(x_test, y_test)`.
  """
  with _named(path) as path:
    x, y = _split(_arrays(path, ('x_test', 'y_test')), 'test')
    return x, _below(num_classes, 'y_test', y)


@contextlib.contextmanager
def _named(path):
  """Yields the file's path, and names it in what is wrong with it."""
  path = os.path.expanduser(path or '')
  try:
    yield path
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


def _arrays(path, names):
  """Returns arrays of the file as they are, by name."""
  if not os.path.isfile(path):
    raise ValueError(
      'config.data_path is not a file; expected an .npz file with '
      + ', '.join(names)
    )
  try:
    with open(path, 'rb') as file, np.load(file) as arrays:
      missing = [name for name in names if name not in arrays]
      if not missing:
        return {name: arrays[name] for name in names}
      found = ', '.join(arrays) or 'nothing'
  except (OSError, EOFError, TypeError, AttributeError, ValueError) as error:
    raise ValueError(f'not a whole .npz file of arrays: {error}') from error
  except (zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(f'not a whole .npz file of arrays: {error}') from error
  raise ValueError(f'expected {", ".join(missing)} as well, found {found}')


def _split(arrays, split):
  """Returns images and labels of a split, each checked by itself."""
  x, y = f'x_{split}', f'y_{split}'
  images = _images(x, arrays.pop(x))  # Not to hold what it was made of.
  return images, _labels(y, arrays[y], len(images))


def _images(name, images):
  """Returns `[N, H, W, C]` or `[N, T, H, W, C]`, uint8 or finite float32."""
  if images.ndim not in (3, 4, 5) or 0 in images.shape:
    raise ValueError(
      f'{name} must be [N, H, W], [N, H, W, C] or [N, T, H, W, C] and not '
      f'empty, got shape {images.shape}'
    )
  if images.dtype != np.uint8:
    if not np.issubdtype(images.dtype, np.floating):
      raise ValueError(f'{name} must be uint8 or float, got {images.dtype}')
    with np.errstate(over='ignore'):
      images = images.astype(np.float32)
    if bad := np.count_nonzero(~np.isfinite(images)):
      raise ValueError(
        f'{name} must be finite in float32, got {bad} NaN or infinite values'
      )
  return images[..., None] if images.ndim == 3 else images


def _labels(name, labels, count):
  """Checks that there are `count` integers from 0."""
  if labels.shape != (count,):
    raise ValueError(
      f'{name} must have shape ({count},), one label an image, '
      f'got {labels.shape}'
    )
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f'{name} must be integers, got {labels.dtype}')
  if labels.min() < 0:
    raise ValueError(f'{name} must not be negative, got {labels.min()}')
  return labels


def _below(num_classes, name, labels):
  """Returns labels as int32, none of them too large."""
  if labels.max() >= num_classes:
    raise ValueError(
      f'{name} must be in 0..{num_classes - 1}, got {labels.max()}'
    )
  return labels.astype(np.int32)
