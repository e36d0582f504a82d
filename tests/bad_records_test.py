"""Recordings, prepared datasets and state dicts that were damaged since."""

import json
import os
import pickle
import random
import shutil
import sys
import warnings
import zipfile
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import digits
from tests.bad_data_test import Touch, little_memory
from tests.datasets_test import HEADER, aedat, encoded, imagenet_config, prepare
from train import convert, data
from train.datasets import cifar10_dvs, sources

# Recordings of event cameras.


@pytest.fixture
def archives(tmp_path):
  """A data folder with a zip file of ten recordings a class."""
  folder = tmp_path / 'downloads' / 'manual' / 'cifar10_dvs'
  folder.mkdir(parents=True)
  for name in cifar10_dvs.URLS:
    with zipfile.ZipFile(folder / f'{name}.zip', 'w') as file:
      for n in range(10):
        file.writestr(f'{name}/cifar10_{name}_{n}.aedat', aedat([8], [n]))
  return folder


def refusal(archives, members, method=zipfile.ZIP_DEFLATED):
  """What is said where dog.zip has these files besides its own."""
  path = archives / 'dog.zip'
  with zipfile.ZipFile(path, 'a', method) as file:
    for name, content in members.items():
      file.writestr(name, content)
  with pytest.raises(ValueError, match=str(path)) as raised, little_memory():
    sources.from_tfds(
      'cifar10_dvs/first_count_t4', str(archives.parent.parent.parent)
    )
  assert str(raised.value).isprintable()
  assert not list(archives.parent.parent.parent.rglob('*array_record*'))
  return str(raised.value)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (HEADER, 'no events'),
    (b'', 'no events'),
    (b'#!AER-DAT3.1\n' + bytes(8), 'expected AER-DAT2.0'),
    (aedat([0], [0])[:-1], 'truncated: 7 bytes'),
    (b'#' * 1000, 'header has no end'),
    (b'#\n' * 100_000 + bytes(4), 'truncated: 4 bytes'),
    (bytes(cifar10_dvs.LARGEST + 8), 'expected at most 33554432 bytes, got'),
  ],
)
def test_a_bad_recording_is_named(archives, content, message):
  said = refusal(archives, {'dog/cifar10_dog_0.5.aedat': content})
  assert 'damaged file' in said and 'dog.zip/dog/cifar10_dog_0.5.aedat' in said
  assert message in said


def test_recordings_in_a_zip_file_that_expands_at_will(archives):
  bomb = bytes(10**7)
  said = refusal(
    archives, {'dog/cifar10_dog_0.5.aedat': bomb}, zipfile.ZIP_LZMA
  )
  assert 'expected it stored or deflated, got compression 14' in said


def test_recordings_of_one_name(archives):
  again = {'other/cifar10_dog_3.aedat': aedat([8], [0])}
  said = refusal(archives, again)
  assert 'expected 11 .aedat files of different names, found 10' in said


def test_recordings_with_names_that_lead_elsewhere(archives):
  name = '../' * 300 + f'cifar10_dog_{"9" * 6_000}.aedat'
  said = refusal(archives, {name: HEADER, '/' * 9_000 + 'x': b'', '\n': b''})
  assert 'no events' in said
  assert not list(archives.rglob('*.aedat'))


def test_a_recording_with_a_leap_ahead_is_warned_of(archives):
  leap = aedat([8, 8], [0, 11_000_000])
  with zipfile.ZipFile(archives / 'dog.zip', 'a') as file:
    file.writestr('dog/cifar10_dog_11.aedat', leap)
  with mock.patch.object(cifar10_dvs.logging, 'warning') as warned:
    sources.from_tfds(
      'cifar10_dvs/first_count_t4', str(archives.parent.parent.parent)
    )
  ((_, where, seconds),) = (
    call.args for call in warned.call_args_list if 'its clock' in call.args[0]
  )
  assert where.endswith('dog.zip/dog/cifar10_dog_11.aedat') and seconds == 11


@pytest.mark.parametrize(
  ('leap', 'duration'),
  [
    (10**6, 999 * 10**6),
    (2**31 - 1, 999 * (2**31 - 1)),
    (2**31, 0),  # Back, as far as anyone can tell.
    (2**32 - 1, 999),  # Back by one microsecond, which is jitter.
  ],
)
def test_timestamps_that_overflow_stay_in_order(leap, duration):
  time = np.arange(1_000) * leap
  events = cifar10_dvs.decode(aedat(np.arange(1_000) % 99, time))
  assert (np.diff(events[3]) >= 0).all() and events[3][0] == 0
  assert events[3][-1] == duration
  for by in 'count', 'time':
    assert cifar10_dvs.frames(*events, 20, by).sum() == 1_000


# Datasets that TFDS has prepared.


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """A data folder with CIFAR-10 of seven images, and what is in it."""
  folder = tmp_path_factory.mktemp('data')
  rng = np.random.default_rng(0)
  rows = [
    {'id': str(i), 'image': encoded(image, 'PNG'), 'label': i % 3}
    for i, image in enumerate(rng.integers(0, 256, (7, 32, 32, 3), np.uint8))
  ]
  prepare('cifar10', folder, {'train': rows[:5], 'test': rows[5:]})
  return folder, sources.from_tfds('cifar10', str(folder))[:2]


@pytest.fixture
def copy(prepared, tmp_path):
  """The folder's copy, and the file of the training split."""
  shutil.copytree(prepared[0], tmp_path / 'data')
  (file,) = tmp_path.rglob('*train.array_record*')
  return tmp_path / 'data', file


def cut(content):
  return content[: len(content) // 2]


@pytest.mark.parametrize(
  'damage', [cut, lambda c: c[:-1], lambda c: b'', lambda c: bytes(len(c))]
)
def test_a_damaged_file_of_records_is_named(copy, damage):
  folder, file = copy
  file.write_bytes(damage(file.read_bytes()))
  with pytest.raises(ValueError, match=f'^damaged file {file}: example 0 of'):
    sources.from_tfds('cifar10', str(folder))
  file.unlink()
  with pytest.raises(ValueError, match=f'damaged file {file}: .*No such file'):
    sources.from_tfds('cifar10', str(folder))


def random_damage(prepared, copy, seed, count):
  """Whatever happens to a file of records is found or changes nothing."""
  folder, file = copy
  content, rng = file.read_bytes(), random.Random(seed)
  written = [index for index, byte in enumerate(content) if byte]
  for _ in range(count):
    where, changed = rng.choice(written), bytearray(content)
    match rng.choice(['flip', 'cut', 'set', 'insert']):
      case 'flip':
        changed[where] ^= 1 << rng.randrange(8)
      case 'cut':
        del changed[where:]
      case 'set':
        changed[where : where + 8] = rng.randbytes(8)
      case 'insert':
        changed[where:where] = rng.randbytes(rng.randrange(1, 9))
    file.write_bytes(changed)
    try:
      found = sources.from_tfds('cifar10', str(folder))[:2]
    except ValueError as error:
      assert str(error).startswith(f'damaged file {file}')
      continue
    for part, other in zip(found, prepared[1], strict=True):
      np.testing.assert_array_equal(part.images, other.images)
      np.testing.assert_array_equal(part.labels, other.labels)


def test_random_damage_to_records(prepared, copy):
  random_damage(prepared, copy, seed=0, count=10)


@pytest.mark.slow
def test_much_random_damage_to_records(prepared, copy):
  random_damage(prepared, copy, seed=1, count=1_000)


@pytest.mark.parametrize(
  ('count', 'message'),
  [
    ('6', r'damaged file .*train.*: example 5 of the split: .*out of bound'),
    (str(10**15), r'GB of memory that are free, got 3.07e\+09 GB of .*, train'),
  ],
)
def test_a_dataset_that_says_it_has_more(copy, count, message):
  folder, file = copy
  path = file.with_name('dataset_info.json')
  info = json.loads(path.read_text())
  (split,) = (s for s in info['splits'] if s['name'] == 'train')
  split['shardLengths'] = [count]
  path.write_text(json.dumps(info))
  with pytest.raises(ValueError, match=message):
    sources.from_tfds('cifar10', str(folder))


@pytest.mark.parametrize('text', ['', '{', '[]', '{"name": 3}', '\x00' * 99])
def test_a_dataset_whose_facts_are_damaged(copy, text):
  folder, file = copy
  file.with_name('dataset_info.json').write_text(text)
  with pytest.raises(ValueError, match=f'dataset_info.json in {folder}/cifar'):
    sources.from_tfds('cifar10', str(folder))


def test_labels_that_are_no_classes(copy):
  info = tfds.builder('cifar10', data_dir=str(copy[0])).info
  with (
    mock.patch.object(type(info.features['label']), 'num_classes', 2),
    pytest.raises(ValueError, match=r'train: expected labels in 0..1, got 1 o'),
  ):
    sources.from_tfds('cifar10', str(copy[0]))


def test_images_that_stay_on_disk_name_their_file(tmp_path):
  rows = [
    {
      'file_name': f'{i}.JPEG',
      'image': encoded(np.full((30 + i, 40, 3), 9, np.uint8), 'JPEG'),
      'label': i,
    }
    for i in range(6)
  ]
  # A record that is whole, of an image that is not.
  rows[3]['image'] = rows[3]['image'][:40]
  prepare('imagenet2012', tmp_path, {'train': rows, 'validation': rows[:2]})
  train, *_ = sources.from_tfds('imagenet2012', str(tmp_path))
  (file,) = tmp_path.rglob('*train.array_record*')
  config = imagenet_config(tmp_path)
  with pytest.raises(
    ValueError, match=f'damaged file {file}: example [0-5] of'
  ):
    for _, _ in zip(range(3), data.train_batches(train, config), strict=False):
      pass
  file.write_bytes(cut(file.read_bytes()))
  with pytest.raises(ValueError, match=f'damaged file {file}: example 0 of'):
    sources.from_tfds('imagenet2012', str(tmp_path))[0][0]


# State dicts.


def test_a_state_dict_larger_than_its_file_is_not_built(tmp_path):
  """A network's size goes with the square of what its file has."""
  x = np.zeros((2, 8, 8), np.uint8)
  np.savez(
    tmp_path / 'data.npz', x_train=x, y_train=[0, 1], x_test=x, y_test=[0, 1]
  )
  narrow = {
    'ResNetBlocks.0.0.conv1.layer.weight': np.zeros((10**6, 1, 1, 1), 'f4'),
    'fc.0.layer.weight': np.zeros((10**6, 1), 'f4'),
    'fc.2.layer.weight': np.zeros((2, 1), 'f4'),
  }
  np.savez_compressed(tmp_path / 'theirs.npz', **narrow)
  config = digits.get_config()
  config.update(dataset='npz', data_path=str(tmp_path / 'data.npz'))
  config.validation_fraction = 0.0
  with pytest.raises(ValueError, match='does not fit the network'):
    convert.from_torch(tmp_path / 'theirs.npz', config, tmp_path / 'run')


def test_a_pt_file_that_is_compressed_is_refused(monkeypatch, tmp_path):
  """Before PyTorch sees it."""
  path = tmp_path / 'bomb.pt'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
    file.writestr('archive/data/0', bytes(10**6))
  monkeypatch.setitem(sys.modules, 'torch', mock.Mock(spec=[]))
  with pytest.raises(ValueError, match='compressed tensors, which PyTorch nev'):
    convert.read(path)


@pytest.mark.slow
def test_hostile_pt_files(tmp_path):
  torch = pytest.importorskip('torch')
  touched, path = tmp_path / 'touched', tmp_path / 'theirs.pt'
  attack = {'w': Touch(touched)}
  weights = {'w': torch.arange(1_000.0)}
  forms = {'zip': True, 'legacy': False}
  with warnings.catch_warnings(action='ignore'):  # Of what it meets.
    for zipped in forms.values():
      torch.save(attack, path, _use_new_zipfile_serialization=zipped)
      with pytest.raises(
        ValueError, match=f'state dict, .* in {path}, got a p'
      ):
        convert.read(path)
      torch.save(weights, path, _use_new_zipfile_serialization=zipped)
      whole = path.read_bytes()
      for size in 0, 1, 10, 100, 1_000, len(whole) // 2, len(whole) - 1:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f'state dict, .* in {path}, got'):
          convert.read(path)
    path.write_bytes(pickle.dumps(attack))
    with pytest.raises(ValueError, match='got a pickle of more than tensors'):
      convert.read(path)
    torch.save({'w': torch.zeros(1).expand(10**12)}, path)
    with pytest.raises(ValueError, match='of 4000000000000 bytes in a file of'):
      convert.read(path)
  assert not os.path.exists(touched)
