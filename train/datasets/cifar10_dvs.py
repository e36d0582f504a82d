"""CIFAR10-DVS: 10,000 recordings of an event camera, 128 x 128, in ten classes.

Li et al., "CIFAR10-DVS: An Event-Stream Dataset for Object Classification"
(Frontiers in Neuroscience 2017). Ten archives of 1,000 `.aedat` files; events
are gathered into frames `[T, 48, 48, 2]`.

There is no official split. The literature holds out a tenth of every class, its
first, its last or random recordings, which give different accuracies: the name
of the configuration says which, how events are shared out among frames, and T:
`cifar10_dvs/random_count_t10`. Frames are counts; `..._8bit` are what other
programs make of them (see `resize_8bit`).
"""

import dataclasses
import functools
import itertools
import pathlib
import posixpath
import re
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import requests
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from train.datasets import archive

SENSOR = 128
SIZE = 48
JITTER = 1000  # Microseconds; a hundredth of a frame of the usual ten.
LARGEST = 2**25  # Bytes of a recording; the dataset's have some 1.6 million.
LONGEST = 10_000_000  # Microseconds; the dataset's take some 1.3 million.
PAGE = 'https://figshare.com/articles/dataset/CIFAR10-DVS_New/4724671'
URLS = {
  name: f'https://ndownloader.figshare.com/files/{number}'
  for name, number in {
    'airplane': 7712788,
    'automobile': 7712791,
    'bird': 7712794,
    'cat': 7712812,
    'deer': 7712815,
    'dog': 7712818,
    'frog': 7712842,
    'horse': 7712851,
    'ship': 7712836,
    'truck': 7712839,
  }.items()
}


def decode(data):
  """Decodes one AEDAT 2.0 file of the 128 x 128 sensor.

  Lines that start with `#`, then big-endian pairs of uint32: an address,
  `-yyyyyyyxxxxxxxp` in bits, and a timestamp in microseconds. The first bit is
  ignored, as the dataset's own reader (`dat2mat.m`) and others do.

  A timestamp that jumps back by more than `JITTER` tells of a clock that was
  set back: time goes on from the event before it. The dataset's own reader
  repairs such files alike, adding the time that had been reached; sorted, their
  parts would be shuffled together. A shorter way back is jitter, and sorted. A
  clock that wraps around goes on. A leap ahead of up to 2**31 microseconds is
  believed; a longer one cannot be told from a way back.

  Args:
    data: the file's bytes.

  Returns:
    `(row, column, polarity, time)`, each `[N]`, in the order of time, which
    starts at 0; turned upright as the public readers do: `row = 127 - x`,
    `column = 127 - y`, `polarity = 1 - p`.

  Raises:
    ValueError: saying what is wrong with the file.
  """
  start = 0
  while data.startswith(b'#', start):
    start = data.find(b'\n', start) + 1
    if start == 0:
      raise ValueError('the header has no end')
  if data.startswith(b'#!AER-DAT') and not data.startswith(b'#!AER-DAT2.0'):
    raise ValueError(f'expected AER-DAT2.0, got {data[:14]!r}')
  if (len(data) - start) % 8:
    raise ValueError(
      f'truncated: {len(data) - start} bytes of events are no multiple of 8'
    )
  if len(data) == start:
    raise ValueError('no events')
  events = np.frombuffer(data, '>u4', offset=start).astype(np.int64)
  address, time = events.reshape(-1, 2).T.copy()
  if address.max() > 0xFFFF:
    raise ValueError(
      f'address {address.max():#x} is out of range, expected up to 0xffff'
    )
  # As signed 32-bit differences: from 2**32 - 1 to 0 is a step forward.
  steps = np.diff(time, prepend=time[0]).astype(np.int32)
  time = np.cumsum(np.where(steps < -JITTER, 0, steps), dtype=np.int64)
  order = np.argsort(time, kind='stable')
  address, time = address[order], time[order]
  x, y, p = (address & 0xFE) >> 1, (address & 0x7F00) >> 8, address & 1
  return SENSOR - 1 - x, SENSOR - 1 - y, 1 - p, time - time[0]


def frames(row, column, polarity, time, num_steps, by):
  """Counts events in T frames.

  Args:
    row: `[N]`, and so are `column`, `polarity` and `time`.
    column: from the left.
    polarity: 0 or 1, the channel.
    time: in order, from 0.
    num_steps: T.
    by: `'count'` gives every frame as many events, `'time'` as much time.

  Returns:
    `[T, 128, 128, 2]` float32.
  """
  if by == 'count':
    frame = np.arange(len(time)) * num_steps // len(time)
  else:
    frame = time * num_steps // (time[-1] + 1)
  shape = (num_steps, SENSOR, SENSOR, 2)
  index = np.ravel_multi_index((frame, row, column, polarity), shape)
  counts = np.bincount(index, minlength=np.prod(shape))
  return counts.astype(np.float32).reshape(shape)


def resize(frames, size):
  """Resizes `[T, H, W, C]` float32 to `[T, size, size, C]`, bilinear.

  With antialiasing, so that every event counts (Pillow, torchvision).
  """
  images = np.moveaxis(frames, -1, 1)
  resized = [
    Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    for image in images.reshape(-1, *images.shape[2:])
  ]
  resized = np.stack(resized).reshape(*images.shape[:2], size, size)
  return np.moveaxis(resized, 1, -1)


def resize_8bit(frames, size):
  """What programs that come from TET's (Deng et al., ICLR 2022) train on.

  Each frame `[H, W, 2]` is divided by its largest count, cut down to 8 bits and
  resized as an image. Two channels are grey and opacity to Pillow, and so to
  torchvision: OFF events count as much as there are ON events about.

  Returns:
    `[T, size, size, 2]` uint8, which the job divides by 255.
  """
  largest = frames.max(axis=(1, 2, 3), keepdims=True)
  images = (frames / np.maximum(largest, 1) * 255).astype(np.uint8)
  return np.stack(
    [
      Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
      for image in images
    ]
  )


@dataclasses.dataclass(eq=False, kw_only=True)
class Cifar10DvsConfig(tfds.core.BuilderConfig):
  """How recordings become examples.

  `held_out` (`'first'`, `'last'` or `'random'`, by `seed`) tells which tenth of
  every class is the test split; `by` and `num_steps` are those of `frames`, and
  `eight_bit` chooses `resize_8bit`.
  """

  held_out: str
  by: str
  num_steps: int
  eight_bit: bool = False
  seed: int = 0


class Cifar10Dvs(tfds.core.GeneratorBasedBuilder):
  """CIFAR10-DVS as frames of events."""

  VERSION = tfds.core.Version('2.0.0')
  RELEASE_NOTES = {'2.0.0': 'Time goes on where the clock was set back.'}
  BUILDER_CONFIGS = [
    Cifar10DvsConfig(
      name=f'{held_out}_{by}_t{num_steps}' + '_8bit' * eight_bit,
      held_out=held_out,
      by=by,
      num_steps=num_steps,
      eight_bit=eight_bit,
    )
    for eight_bit, held_out, by, num_steps in itertools.product(
      (False, True),
      ('random', 'first', 'last'),
      ('count', 'time'),
      (10, 4, 5, 8, 16, 20),
    )
  ]
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    f'the ten archives of {PAGE}, airplane.zip to truck.zip, or the folders '
    'unpacked from them, in a folder cifar10_dvs'
  )

  def _info(self):
    config = self.builder_config
    return tfds.core.DatasetInfo(
      builder=self,
      description='CIFAR10-DVS: events of an event camera, counted in frames.',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Tensor(
            shape=(config.num_steps, SIZE, SIZE, 2),
            dtype=np.uint8 if config.eight_bit else np.float32,
            encoding='bytes',
          ),
          'label': tfds.features.ClassLabel(names=list(URLS)),
        }
      ),
      homepage=PAGE,
    )

  def _split_generators(self, dl_manager):
    rng = np.random.default_rng(self.builder_config.seed)
    train, test = [], []
    for label, path in _archives(dl_manager).items():
      files = _recordings(path)
      count = len(files) // 10
      if not count:
        raise ValueError(
          f'{path}: expected 1,000 .aedat files, found {len(files)}'
        )
      if len(names := {file.name for file in files}) < len(files):
        raise ValueError(
          f'{path}: expected {len(files)} .aedat files of different names, '
          f'found {len(names)}'
        )
      if self.builder_config.held_out == 'random':
        files = [files[index] for index in rng.permutation(len(files))]
      if self.builder_config.held_out == 'last':
        files = files[::-1]
      test += [(label, file) for file in files[:count]]
      train += [(label, file) for file in files[count:]]
    return {
      'train': self._generate_examples(train),
      'test': self._generate_examples(test),
    }

  def _generate_examples(self, recordings):
    config = self.builder_config
    shrink = resize_8bit if config.eight_bit else resize
    for label, file in recordings:
      try:
        events = decode(_content(file))
      except Exception as error:  # What is raised depends on what is wrong.
        raise ValueError(f'damaged file {file.where}: {error}') from error
      if (seconds := events[-1][-1] / 1e6) > LONGEST / 1e6:
        logging.warning(
          '%s takes %.0f seconds, expected about 1.3: where its clock leapt '
          'ahead, frames by time are empty',
          file.where,
          seconds,
        )
      counts = frames(*events, config.num_steps, config.by)
      yield (
        f'{label}/{file.name}',
        {'image': shrink(counts, SIZE), 'label': label},
      )


def _archives(dl_manager):
  """Returns the folder or zip file of every class, downloaded if need be."""
  try:
    folder = pathlib.Path(dl_manager.manual_dir) / 'cifar10_dvs'
  except AssertionError:  # TFDS's way to say that there is no such folder.
    folder = pathlib.Path(dl_manager.download_dir) / 'manual' / 'cifar10_dvs'
  if folder.exists():
    paths = {name: folder / name for name in URLS}
    paths = {
      name: path if path.exists() else path.with_suffix('.zip')
      for name, path in paths.items()
    }
    missing = [str(path) for path in paths.values() if not path.exists()]
    if missing:
      raise ValueError(f'CIFAR10-DVS: not found: {", ".join(missing)}')
    return paths
  try:  # TFDS itself would go on trying for minutes.
    requests.head(URLS['airplane'], timeout=10)
  except requests.RequestException as error:
    raise ValueError(
      f'CIFAR10-DVS is not in {folder}, and {URLS["airplane"]} cannot be '
      f'reached ({type(error).__name__}): put into it the ten archives '
      f'of {PAGE}, airplane.zip to truck.zip, or the folders unpacked from them'
    ) from error
  return {
    name: pathlib.Path(path) for name, path in dl_manager.download(URLS).items()
  }


class _Recording(NamedTuple):
  """An `.aedat` file, in a folder or a zip file."""

  name: str
  where: str
  size: int
  open: Callable


def _recordings(path):
  """Returns the recordings in a folder or zip file by their number."""
  if path.is_dir():
    files = [
      _Recording(
        file.name,
        str(file),
        file.stat().st_size,
        functools.partial(file.open, 'rb'),
      )
      for file in path.rglob('*.aedat')
      if file.is_file()
    ]
  else:
    try:
      zipped = zipfile.ZipFile(path)
    except Exception as error:  # What it raises depends on what is wrong.
      raise ValueError(f'damaged file {path}: {error}') from error
    files = [
      _Recording(
        posixpath.basename(member.filename),
        f'{path}/{ascii(member.filename)[1:-1]}',
        member.file_size,
        functools.partial(_unzipped, zipped, member),
      )
      for member in zipped.infolist()
    ]
  return sorted(
    (file for file in files if re.fullmatch(r'[^.].*\.aedat', file.name)),
    key=lambda file: [int(n) for n in re.findall(r'\d{1,18}', file.name)],
  )


def _unzipped(zipped, member):
  """Opens a file within a zip file that says how large it gets."""
  if member.compress_type not in archive.EXPANSION:
    raise ValueError(
      f'expected it stored or deflated, got compression {member.compress_type}'
    )
  return zipped.open(member)


def _content(recording):
  """Returns a recording's bytes."""
  if recording.size > LARGEST:
    raise ValueError(f'expected at most {LARGEST} bytes, got {recording.size}')
  with recording.open() as file:
    return file.read(LARGEST)
