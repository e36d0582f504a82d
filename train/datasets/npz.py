"""Users' own arrays: one `.npz` file with both splits."""

import contextlib
import functools
import os

import numpy as np

from train.datasets import archive


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
    ValueError: naming the file, what was expected and what it has; see
      `archive.read` for damaged and hostile files.
  """
  with _named(path) as path:
    arrays = _arrays(path, ('train', 'test'))
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
    x, y = _split(_arrays(path, ('test',)), 'test')
    return x, _below(num_classes, 'y_test', y)


@contextlib.contextmanager
def _named(path):
  """Yields the file's path, and names it in what is wrong with it."""
  path = os.path.expanduser(path or '')
  try:
    yield path
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


def _arrays(path, splits):
  """Returns arrays of the file as they are, by name."""
  names = [f'{kind}_{split}' for split in splits for kind in 'xy']
  if not os.path.isfile(path):
    raise ValueError(
      'config.data_path is not a file; expected an .npz file with '
      + ', '.join(names)
    )
  return archive.read(path, names, functools.partial(_check, splits))


def _check(splits, headers):
  """Checks shapes and dtypes, before any array is read."""
  for split in splits:
    x, y = f'x_{split}', f'y_{split}'
    images, labels = headers[x], headers[y]
    if len(images.shape) not in (3, 4, 5) or 0 in images.shape:
      raise ValueError(
        f'{x} must be [N, H, W], [N, H, W, C] or [N, T, H, W, C] and not '
        f'empty, got shape {images.shape}'
      )
    if images.dtype != np.uint8 and images.dtype.kind != 'f':
      raise ValueError(f'{x} must be uint8 or float, got {images.dtype}')
    if labels.shape != images.shape[:1]:
      raise ValueError(
        f'{y} must have shape {images.shape[:1]}, one label an image, '
        f'got {labels.shape}'
      )
    if labels.dtype.kind not in 'iu':
      raise ValueError(f'{y} must be integers, got {labels.dtype}')


def _split(arrays, split):
  """Returns images and labels of a split, each checked by itself."""
  x, y = f'x_{split}', f'y_{split}'
  images = _images(x, arrays.pop(x))  # Not to hold what it was made of.
  if (least := arrays[y].min()) < 0:
    raise ValueError(f'{y} must not be negative, got {least}')
  return images, arrays[y]


def _images(name, images):
  """Returns `[N, H, W, C]` or `[N, T, H, W, C]`, uint8 or finite float32."""
  if images.dtype != np.uint8:
    with np.errstate(over='ignore'):
      images = images.astype(np.float32, copy=False)
    if bad := np.count_nonzero(~np.isfinite(images)):
      raise ValueError(
        f'{name} must be finite in float32, got {bad} NaN or infinite values'
      )
  return images[..., None] if images.ndim == 3 else images


def _below(num_classes, name, labels):
  """Returns labels as int32, none of them too large."""
  if labels.max() >= num_classes:
    raise ValueError(
      f'{name} must be in 0..{num_classes - 1}, got {labels.max()}'
    )
  return labels.astype(np.int32)
