"""Damaged, absurd and hostile files: one error each, and no more.

Whatever a file says, reading it ends in a `ValueError` of one line that begins
with the file's path, takes little memory, runs nothing, or gives back what was
written.
"""

import contextlib
import os
import pathlib
import pickle
import struct
import tracemalloc
import zipfile
from unittest import mock

import numpy as np
import pytest

from tests.datasets_test import saved, user_arrays
from train import convert
from train.datasets import archive, npz

LITTLE = 16e6  # Bytes that reading a small file may take.


@contextlib.contextmanager
def little_memory():
  tracemalloc.start()
  try:
    yield
    assert tracemalloc.get_traced_memory()[1] < LITTLE
  finally:
    tracemalloc.stop()


def refusal(path, read=npz.read):
  """What is said of a file; None if it is read."""
  try:
    with little_memory():
      read(str(path))
  except ValueError as error:
    message = str(error)
    assert str(path) in message.splitlines()[0]
    assert len(message.splitlines()) == 1 and len(message) < 2_000
    return message
  return None


def member(
  shape=(6, 4, 5),
  descr='|u1',
  *,
  fortran=False,
  data=bytes(120),
  version=(1, 0),
  length=None,
  text=None,
):
  """The bytes of an array, with a header that need not be true."""
  header = {'descr': descr, 'fortran_order': fortran, 'shape': shape}
  text = (repr(header) if text is None else text).encode('latin1')
  text += b' ' * (-(len(text) + 11) % 64) + b'\n'
  size = struct.pack(
    '<H' if version == (1, 0) else '<I', len(text) if length is None else length
  )
  return b'\x93NUMPY' + bytes(version) + size + text + data


def zipped(path, members, method=zipfile.ZIP_STORED, **claims):
  """Writes a zip file of x_train in many forms, and good other arrays.

  Args:
    path: of the file.
    members: `(name, bytes)`s.
    method: of compression.
    **claims: fields of the first member that are not true.
  """
  with zipfile.ZipFile(path, 'w', method) as file:
    for name, content in members:
      file.writestr(name, content)
    for name, array in user_arrays(x_train=None, x_test=None).items():
      with file.open(f'{name}.npy', 'w') as other:
        np.save(other, array)
    file.writestr('x_test.npy', member((2, 4, 5), data=bytes(40)))
    for field, value in claims.items():
      setattr(file.infolist()[0], field, value)
  return path


def x_train(path, *args, method=zipfile.ZIP_STORED, **kwargs):
  return zipped(path, [('x_train.npy', member(*args, **kwargs))], method)


class Touch:
  """Runs code where it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (pathlib.Path(self.path),)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'shape': (10**15, 4, 5)}, 'expected 20000000000000000 bytes, .* got 120'),
    ({'shape': (10**200, 4, 5)}, 'expected 20{201} bytes'),
    ({'shape': (6, 4, 6)}, 'expected 144 bytes, for .6, 4, 6. uint8, got 120'),
    ({'shape': (6, 4, 4)}, 'expected 96 bytes, .* got 120'),
    ({'shape': (-6, -4, 5)}, r'expected sizes of 0 or more, got \(-6, -4, 5'),
    ({'shape': (-1, 4, 5)}, 'expected sizes of 0 or more'),
    ({'shape': (True, 24, 5)}, 'expected sizes of 0 or more'),
    ({'shape': 120}, 'shape is not valid'),
    ({'shape': (6.0, 4, 5)}, 'shape is not valid'),
    ({'shape': (0, 4, 5), 'data': b''}, 'x_train must be .* not empty'),
    ({'shape': (0, 10**30, 5), 'data': b''}, 'x_train must be .* not empty'),
    ({'shape': (1,) * 400, 'data': b'1'}, 'x_train'),
    ({'descr': '|V1'}, 'x_train must be uint8 or float, got .*V1'),
    ({'descr': '|S1'}, 'x_train must be uint8 or float, got .*S1'),
    ({'descr': '|S2000000000'}, 'expected 240000000000 bytes'),
    ({'descr': '<U500000000'}, 'expected 240000000000 bytes'),
    ({'descr': '|V99999999999999'}, 'x_train'),
    ({'descr': '|O'}, 'plain numbers, got object; objects are never unpickled'),
    ({'descr': [('a', '|u1')]}, 'plain numbers, got .*a'),
    ({'descr': ('|u1', (1,))}, 'plain numbers, got'),
    ({'descr': '(1,)u1'}, 'x_train'),
    ({'descr': '(1000000000,)u1'}, 'x_train'),
    ({'descr': 'u1,u1'}, 'x_train'),
    ({'descr': '<M8[s]', 'shape': (3, 1, 5)}, 'plain numbers, got datetime64'),
    ({'descr': 'nonsense'}, 'x_train: .*descr'),
    ({'descr': None}, 'x_train: '),
    ({'fortran': 2}, 'fortran_order is not a valid bool'),
    ({'text': '{'}, 'x_train: '),
    ({'text': '(' * 900}, 'x_train: '),
    ({'text': '-' * 900 + '1'}, 'x_train: '),
    ({'text': '[' * 900 + ']' * 900}, 'x_train: '),
    ({'text': '9' * 900}, 'x_train: '),
    ({'text': '__import__("os").abort()'}, 'x_train: '),
    ({'text': '{"descr": "|u1"}'}, 'x_train: .*correct keys'),
    ({'text': ' ' * 60_000}, 'x_train: .*header'),
    ({'version': (2, 0), 'length': 2**32 - 1}, 'x_train: .*header'),
    ({'version': (3, 0)}, r'expected version 1 or 2 .*, got \(3, 0\)'),
    ({'version': (9, 9)}, r'version'),
    ({'data': bytes(119)}, 'expected 120 bytes, .* got 119'),
    ({'data': bytes(10**6)}, 'expected 120 bytes, .* got 1000000'),
  ],
)
def test_absurd_headers(tmp_path, changes, message):
  path = x_train(tmp_path / 'data.npz', **changes)
  said = refusal(path)
  assert said is not None
  with pytest.raises(ValueError, match=message):
    npz.read(str(path))


@pytest.mark.parametrize(
  'changes', [{'version': (2, 0)}, {'fortran': True}, {}, {'descr': 'B'}]
)
def test_other_true_headers(tmp_path, changes):
  data = np.arange(120, dtype=np.uint8)
  path = x_train(tmp_path / 'data.npz', data=data.tobytes(), **changes)
  shaped = data.reshape((6, 4, 5), order='F' if 'fortran' in changes else 'C')
  np.testing.assert_array_equal(npz.read(str(path))[0][..., 0], shaped)


def test_big_endian_arrays_are_read(tmp_path):
  x = np.linspace(-1, 1, 6 * 4 * 5 * 3).reshape(6, 4, 5, 3)
  path = saved(
    tmp_path,
    x_train=x.astype('>f8'),
    x_test=x[:2].astype('>f4'),
    y_train=np.array([0, 1, 2, 0, 1, 2], '>i8'),
  )
  x_train, y_train, x_test, *_ = npz.read(path)
  np.testing.assert_array_equal(x_train, x.astype(np.float32), strict=True)
  np.testing.assert_array_equal(x_test, x_train[:2], strict=True)
  np.testing.assert_array_equal(y_train, [0, 1, 2, 0, 1, 2])
  assert y_train.dtype == np.int32 and y_train.dtype.isnative


def test_objects_are_never_unpickled(tmp_path):
  touched = tmp_path / 'touched'
  attack = pickle.dumps(Touch(touched))
  pickle.loads(attack)  # It does what it is feared for.
  touched.unlink()
  array = np.array([Touch(touched)] * 6, object)
  np.savez(tmp_path / 'a.npz', **user_arrays(x_train=array))
  x_train(tmp_path / 'b.npz', (1,), '|O', data=attack)
  zipped(tmp_path / 'c.npz', [('x_train.npy', attack)])
  (tmp_path / 'd.npz').write_bytes(attack)
  for name in 'abcd':
    path = tmp_path / f'{name}.npz'
    assert refusal(path)
    assert refusal(path, convert.read)
  assert not touched.exists()


@pytest.mark.parametrize(
  'names',
  [
    ('x_train.npy', 'x_train.npy'),
    ('x_train.npy', 'x_train'),
    ('../x_train.npy',),
    ('/x_train.npy',),
    ('a/x_train.npy',),
    ('x_train.npy\n\x1b[31m',),
    ('x' * 60_000,),
    [f'{n}.npy' for n in range(3_000)],
  ],
)
def test_odd_names(tmp_path, names):
  with pytest.warns() if len(set(names)) < len(names) else mock.MagicMock():
    path = zipped(tmp_path / 'data.npz', [(name, member()) for name in names])
  said = refusal(path)
  assert 'expected one array x_train' in said or 'expected x_train as' in said
  assert said.isprintable()


def test_nested_and_other_contents(tmp_path):
  inner = pathlib.Path(saved(tmp_path)).read_bytes()
  for content in inner, b'', b'text', b'\x93NUMPY', os.urandom(200):
    path = zipped(tmp_path / 'data.npz', [('x_train.npy', content)])
    assert refusal(path).startswith(f'{path}: not a whole .npz file')


@pytest.mark.parametrize(
  ('method', 'claims', 'message'),
  [
    (
      zipfile.ZIP_BZIP2,
      {},
      'expected it stored or deflated, got compress.* 12',
    ),
    (
      zipfile.ZIP_LZMA,
      {},
      'expected it stored or deflated, got compressi.* 14',
    ),
    (zipfile.ZIP_STORED, {'compress_type': 93}, 'got compression 93'),
    (zipfile.ZIP_STORED, {'flag_bits': 1}, 'got compression 0, encrypted'),
    (zipfile.ZIP_STORED, {'file_size': 10**15}, 'for which there is room .*'),
    (zipfile.ZIP_DEFLATED, {'file_size': 10**15}, 'for which there is room'),
    (zipfile.ZIP_DEFLATED, {'file_size': 10**5}, 'for which there is room'),
    (
      zipfile.ZIP_STORED,
      {'file_size': 10**15, 'compress_size': 10**15},
      'for which there is room in the file, got 1000000000000000',
    ),
    (zipfile.ZIP_STORED, {'CRC': 1}, 'Bad CRC-32'),
    (zipfile.ZIP_STORED, {'header_offset': 7}, 'not a whole .npz file'),
    (zipfile.ZIP_STORED, {'header_offset': 2**40}, 'for which there is room'),
    (zipfile.ZIP_STORED, {'extract_version': 99}, 'zip file version 9.9'),
    (zipfile.ZIP_STORED, {'extra': b'\x01\x00\xff\x00'}, 'orrupt extra'),
  ],
)
def test_directories_that_lie(tmp_path, method, claims, message):
  content = [('x_train.npy', member())]
  path = zipped(tmp_path / 'data.npz', content, method, **claims)
  assert refusal(path)
  with pytest.raises(ValueError, match=message):
    npz.read(str(path))


def test_bombs(tmp_path):
  path = tmp_path / 'data.npz'
  zeros = bytes(10**8)
  # A header, an array and another array that are nothing but zeros.
  zeroed = member(version=(2, 0), length=10**8, data=zeros)
  zipped(path, [('x_train.npy', zeroed)], zipfile.ZIP_DEFLATED)
  assert path.stat().st_size < 200_000
  assert 'header' in refusal(path)
  x_train(path, method=zipfile.ZIP_DEFLATED, data=zeros)
  assert 'expected 120 bytes' in refusal(path)
  zipped(
    path,
    [('x_train.npy', member()), ('other.npy', zeros)],
    zipfile.ZIP_DEFLATED,
  )
  assert refusal(path) is None
  # One that is what it says it is.
  x_train(path, (10**5, 20, 50), method=zipfile.ZIP_DEFLATED, data=zeros)
  assert 'must have shape (100000,)' in refusal(path)
  with mock.patch.object(archive, 'free_memory', return_value=5e7):
    assert (
      'expected at most the 0.05 GB of memory that are free, got 0.1 GB of '
      'x_train' in refusal(path, archive_of(path))
    )


def archive_of(path):
  """Reads x_train alone, and names the file."""

  def read(name):
    try:
      archive.read(path, ['x_train'])
    except ValueError as error:
      raise ValueError(f'{name}: {error}') from error

  return read


def test_free_memory(tmp_path):
  whole = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  assert 0 < archive.free_memory() <= whole
  assert archive.free_memory(tmp_path) == whole
  (tmp_path / 'proc' / 'self').mkdir(parents=True)
  (tmp_path / 'proc' / 'meminfo').write_text(
    'MemTotal:  9000 kB\nMemAvailable:  7000 kB\n'
  )
  assert archive.free_memory(tmp_path) == 7000 * 1024
  (tmp_path / 'proc' / 'self' / 'cgroup').write_text('1:cpu:/\n0::/job/step\n')
  groups = tmp_path / 'sys' / 'fs' / 'cgroup'
  (groups / 'job' / 'step').mkdir(parents=True)
  (groups / 'job' / 'step' / 'memory.max').write_text('max\n')
  assert archive.free_memory(tmp_path) == 7000 * 1024
  (groups / 'job' / 'memory.max').write_text('5000000\n')
  assert archive.free_memory(tmp_path) == 5_000_000
