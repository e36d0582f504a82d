"""Any file at all: read as it was written, or refused with one error."""

import contextlib
import pathlib
import tempfile
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bad_data_test import little_memory, member, refusal, zipped
from tests.datasets_test import aedat, user_arrays
from train import convert
from train.datasets import cifar10_dvs, npz

FAST = settings(deadline=None, derandomize=True, max_examples=60)
LONG = settings(deadline=None, max_examples=4_000)

SIZES = st.integers(-3, 7) | st.integers() | st.booleans() | st.none()
DESCRS = st.sampled_from(
  ['|u1', '<f4', '>f2', '<i8', '|O', '|b1', '<c8', '|S3', '<U2', '|V2', 'a9']
) | st.text(max_size=5)


@st.composite
def headers(draw):
  """Arguments of `member`."""
  shape = draw(st.lists(SIZES, max_size=6).map(tuple) | SIZES)
  return {
    'shape': shape,
    'descr': draw(DESCRS | st.lists(st.tuples(DESCRS, DESCRS), max_size=2)),
    'fortran': draw(st.sampled_from([False, True, None, 1])),
    'data': draw(st.binary(max_size=200)),
    'version': draw(st.sampled_from([(1, 0), (2, 0), (3, 0), (0, 1)])),
    'length': draw(st.none() | st.integers(0, 65_535)),
  }


def any_header(changes, method):
  changes = {**changes, 'text': None}
  try:
    content = member(**changes)
  except UnicodeEncodeError:
    return
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'data.npz')
    zipped(path, [('x_train.npy', content)], method)
    if refusal(path) is None:
      images = npz.read(str(path))[0]
      assert images.dtype in (np.uint8, np.float32)


def damaged(changes, content):
  """The content cut, changed or filled up at some places."""
  for kind, where, junk in changes:
    where %= len(content) + 1
    rest = {'cut': len(content), 'set': where + len(junk), 'insert': where}
    content = content[:where] + junk + content[rest[kind] :]
  return content


CHANGES = st.lists(
  st.tuples(
    st.sampled_from(['cut', 'set', 'insert']),
    st.integers(0, 10**6),
    st.binary(max_size=4) | st.sampled_from([b'\xff' * 4, b'\xff' * 8]),
  ),
  min_size=1,
  max_size=3,
)
METHODS = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])


def any_damage(changes, method):
  arrays = user_arrays(x_train=np.arange(360, dtype='f4').reshape(6, 4, 5, 3))
  arrays['x_test'] = arrays['x_train'][:2]
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'data.npz')
    with zipfile.ZipFile(path, 'w', method) as file:
      for name, array in arrays.items():
        with file.open(f'{name}.npy', 'w') as one:
          np.save(one, array)
    path.write_bytes(damaged(changes, path.read_bytes()))
    if refusal(path) is None:  # What was damaged does not matter.
      for name, read in zip(arrays, npz.read(str(path))[:4], strict=True):
        np.testing.assert_array_equal(arrays[name], read)
    refusal(path, convert.read)


def any_recording(changes):
  content = aedat(np.arange(40) * 7, np.arange(40) * 900)
  content = damaged(changes, content)
  with little_memory(), contextlib.suppress(ValueError):
    events = cifar10_dvs.decode(content)
    row, column, polarity, time = events
    assert (np.diff(time) >= 0).all() and time[0] == 0
    for by in 'count', 'time':
      assert cifar10_dvs.frames(*events, 4, by).sum() == len(time)


@FAST
@given(headers(), METHODS)
def test_any_header(changes, method):
  any_header(changes, method)


@FAST
@given(CHANGES, METHODS)
def test_any_damage_to_a_file_of_arrays(changes, method):
  any_damage(changes, method)


@FAST
@given(CHANGES)
def test_any_damage_to_a_recording(changes):
  any_recording(changes)


@pytest.mark.slow
@LONG
@given(headers(), METHODS)
def test_thousands_of_headers(changes, method):
  any_header(changes, method)


@pytest.mark.slow
@LONG
@given(CHANGES, METHODS)
def test_thousands_of_damages_to_a_file_of_arrays(changes, method):
  any_damage(changes, method)


@pytest.mark.slow
@LONG
@given(CHANGES)
def test_thousands_of_damages_to_a_recording(changes):
  any_recording(changes)
