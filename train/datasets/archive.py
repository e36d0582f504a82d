"""Arrays of `.npz` files that anyone may have written.

Before an array is read, its header, the file's directory, the size of the file
and the memory of the machine must agree on how large it is.
"""

import contextlib
import io
import math
import os
import pathlib
import re
import warnings
import zipfile
from typing import NamedTuple

import numpy as np

HEADER = 1024  # Bytes; NumPy writes 128 for an array of plain numbers.
# What a byte in a file becomes at most; deflate's codes cannot say more.
EXPANSION = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}
KINDS = 'biufcSUV'  # NumPy's; V are the bytes of bfloat16, for one.
SHOWN = 10  # Names in an error.
# Version 3 is for fields with names that are not Latin.
PARSERS = {
  (1, 0): np.lib.format.read_array_header_1_0,
  (2, 0): np.lib.format.read_array_header_2_0,
}


class Header(NamedTuple):
  """What an array will be."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self):
    """How large it is."""
    return math.prod(self.shape) * self.dtype.itemsize


def read(path, names=None, check=lambda headers: None):
  """Returns arrays of a file by name. Nothing in it is unpickled.

  Args:
    path: of a `.npz` file.
    names: the arrays to read; None for all.
    check: is given the `Header` of each by name before any of them is read, and
      raises a `ValueError` for what is not wanted.

  Raises:
    ValueError: the file is damaged or no `.npz` file, an array is missing, or
      there twice, or not of plain numbers, or larger than the file can hold; or
      all together are larger than `free_memory()`.
  """
  with contextlib.ExitStack() as stack:
    with _whole('the file'):
      archive = stack.enter_context(zipfile.ZipFile(path))
    members = _members(archive)
    names = list(members) if names is None else names
    if missing := [name for name in names if name not in members]:
      raise ValueError(
        f'expected {_listed(missing)} as well, found {_listed(members)}'
      )
    end = os.path.getsize(path)
    headers = {
      name: _header(archive, _listed([name]), members[name], end)
      for name in names
    }
    check(headers)
    fits(sum(header.nbytes for header in headers.values()), _listed(names))
    return {name: _array(archive, name, members[name]) for name in names}


def fits(size, what):
  """Raises a `ValueError` where memory has no `size` bytes free for `what`."""
  if size > (free := free_memory()):
    raise ValueError(
      f'expected at most the {free / 1e9:.3g} GB of memory that are free, got '
      f'{size / 1e9:.3g} GB of {what}'
    )


def free_memory(root='/'):
  """Returns how many bytes a process can have, as far as the system tells.

  What is free on the machine, where it is Linux, and else all that it has; and
  what the control group (a container, a job of Slurm's) may have.

  Args:
    root: where `proc` and `sys` are.
  """
  limits = [math.inf]
  with contextlib.suppress(AttributeError, ValueError, OSError):
    limits.append(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
  with contextlib.suppress(OSError):
    text = pathlib.Path(root, 'proc/meminfo').read_text()
    found = re.findall(r'^MemAvailable:\s*(\d+) kB', text, re.MULTILINE)
    limits += [1024 * int(size) for size in found]
  with contextlib.suppress(OSError):
    text = pathlib.Path(root, 'proc/self/cgroup').read_text()
    groups = pathlib.Path(root, 'sys/fs/cgroup')
    for group in re.findall(r'^0::/(.*)$', text, re.MULTILINE):
      for folder in (groups / group, *(groups / group).parents):
        with contextlib.suppress(OSError, ValueError):  # No file, or 'max'.
          limits.append(int((folder / 'memory.max').read_text()))
  return min(limits)


@contextlib.contextmanager
def _whole(what):
  """Says in one way what libraries say in many, of bytes they cannot read."""
  try:
    yield
  except MemoryError as error:
    raise ValueError(f'not enough memory for {what}: {error}') from error
  except Exception as error:  # What they raise depends on what is wrong.
    reason = f'{type(error).__name__}: {error}'.splitlines()[0][:300]
    raise ValueError(
      f'not a whole .npz file of arrays: {what}: {reason}'
    ) from error


def _members(archive):
  """Returns what the file's directory has, by the names of the arrays."""
  members = {}
  for member in archive.infolist():
    name = member.filename.removesuffix('.npy')
    if name in members:
      raise ValueError(f'expected one array {_listed([name])}, got two')
    members[name] = member
  return members


def _listed(names):
  """Returns names for an error: not all, and no control characters."""
  names = list(names)
  shown = [ascii(name)[1:-1][:80] for name in names[:SHOWN]]
  if more := len(names) - len(shown):
    shown.append(f'{more} more')
  return ', '.join(shown) or 'nothing'


def _header(archive, name, member, end):
  """Returns the `Header` of an array, if it can be true."""
  expansion = EXPANSION.get(member.compress_type)
  if expansion is None or member.flag_bits & 1:
    raise ValueError(
      f'{name}: expected it stored or deflated, got compression '
      f'{member.compress_type}{", encrypted" * (member.flag_bits & 1)}'
    )
  room = expansion * min(member.compress_size, end - member.header_offset)
  if member.file_size > room:
    raise ValueError(
      f'{name}: expected at most {room} bytes, for which there is room in the '
      f'file, got {member.file_size}'
    )
  with _whole(name), archive.open(member) as file:
    start = io.BytesIO(file.read(HEADER))
    version = np.lib.format.read_magic(start)
    if version not in PARSERS:
      raise ValueError(f'expected version 1 or 2 of a header, got {version}')
    with warnings.catch_warnings(action='ignore'):  # Of Python 2's spelling.
      shape, _, dtype = PARSERS[version](start, max_header_size=HEADER)
  header = Header(shape, dtype)
  if dtype.kind not in KINDS or dtype.names or dtype.subdtype:
    raise ValueError(
      f'{name}: expected plain numbers, got {_listed([str(dtype)])}; objects '
      'are never unpickled'
    )
  if any(type(size) is not int or size < 0 for size in shape):
    raise ValueError(f'{name}: expected sizes of 0 or more, got {shape}')
  if header.nbytes != (got := member.file_size - start.tell()):
    raise ValueError(
      f'{name}: expected {header.nbytes} bytes, for {shape} {dtype}, got {got}'
    )
  return header


def _array(archive, name, member):
  """Returns an array whose header has been checked."""
  with _whole(_listed([name])), archive.open(member) as file:
    return np.lib.format.read_array(
      file, allow_pickle=False, max_header_size=HEADER
    )
