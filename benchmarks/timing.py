"""Interleaved repeats, so that what slows the machine slows all alike."""

import argparse
import ctypes
import json
import statistics
import time


def medians(functions, repeats=15, seconds=60.0):
  """Median time of each function, in milliseconds.

  Args:
    functions: `{name: function}`; each blocks until its work is done.
    repeats: how often each is called, in turn, after one call to warm up.
    seconds: no further round is begun after so long.

  Returns:
    `{name: milliseconds}`.
  """
  times = {name: [] for name in functions}
  for function in functions.values():
    function()
  end = time.perf_counter() + seconds
  for _ in range(repeats):
    for name, function in functions.items():
      start = time.perf_counter()
      function()
      times[name].append(1e3 * (time.perf_counter() - start))
    if time.perf_counter() > end:
      break
  return {name: statistics.median(all_) for name, all_ in times.items()}


def keep_pages():
  """Lets glibc keep the memory that is freed, for the next array.

  By default a large array comes in fresh pages from Linux every time, and at
  ten timesteps most of a copy's time goes into them.
  """
  libc = ctypes.CDLL(None)
  for parameter, value in (
    (-8, 1),  # M_ARENA_MAX
    (-4, 0),  # M_MMAP_MAX
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD
  ):
    libc.mallopt(parameter, value)


def table(title, rows, columns):
  """Prints `{row: {column: number}}` as a table."""
  print(f'\n{title}')
  width = max(map(len, rows)) + 2
  print(' ' * width + ''.join(f'{column!s:>15}' for column in columns))
  for name, row in rows.items():
    cells = (row.get(column) for column in columns)
    print(
      f'{name:{width}}'
      + ''.join(f'{"-" if c is None else format(c, ".2f"):>15}' for c in cells)
    )


def main(description, measure):
  """Runs `measure(arguments)` and writes what it returns, with `--json`."""
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument('--json', metavar='FILE', help='write every number there')
  parser.add_argument(
    '--repeats', type=int, default=15, help='calls of each, in turn'
  )
  parser.add_argument(
    '--keep-pages',
    action='store_true',
    help='keep freed memory, so that no time goes into fresh pages (glibc)',
  )
  arguments = parser.parse_args()
  if arguments.keep_pages:
    keep_pages()
  results = measure(arguments)
  if arguments.json:
    with open(arguments.json, 'w') as file:
      json.dump(results, file, indent=2)
