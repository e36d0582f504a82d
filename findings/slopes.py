r"""Whether a difference between two methods grows, as with depth.

  python -m findings.slopes --at=8=runs/depth_8 --at=19=runs/digits \
    --pair=ds_atgo,vanilla

Takes comparisons of `train.compare`, each at its number x, and of each seed the
slope of the paired difference over x (least squares): percent of accuracy for
each unit of x. Tested by a t test over the seeds, two-sided.
"""

import json
import pathlib

import numpy as np
from absl import flags

from train import command

AT = flags.DEFINE_multi_string(
  'at', None, 'X=FOLDER of a comparison; two or more.'
)
PAIR = flags.DEFINE_list(
  'pair', ['ds_atgo', 'vanilla'], 'The first one minus the second one.'
)


def differences(folder, methods):
  """Returns [seeds], in percent, of the comparison in a folder.

  Raises:
    ValueError: there is none, or not of these methods.
  """
  from train import metrics

  found = metrics.read_json(pathlib.Path(folder) / 'comparison.json')
  if not found or not set(methods) <= set(found['methods']):
    raise ValueError(
      f'expected a comparison of {" and ".join(methods)} in {folder}, got '
      + (', '.join(found['methods']) if found else 'none')
    )
  a, b = (found['methods'][method]['accuracies'] for method in methods)
  return np.array([a[seed] - b[seed] for seed in sorted(a)])


def slopes(xs, values):
  """Least-squares slopes; xs [n], values [n, seeds]."""
  xs = np.array(xs, float) - np.mean(xs)
  return xs @ values / (xs @ xs)


def main():
  """Prints the differences at each x, and the slope."""
  from train import compare, paired, tables

  given = [one.partition('=')[::2] for one in AT.value]
  if len(given) < 2 or len(PAIR.value) != 2:
    raise ValueError('expected two --at or more and a --pair of two methods')
  values = np.array([differences(path, PAIR.value) for _, path in given])
  found = {
    f'at {x}': paired.compare(v)
    for (x, _), v in zip(given, values, strict=True)
  }
  found['slope'] = paired.compare(slopes([float(x) for x, _ in given], values))
  if command.JSON.value:
    print(json.dumps({name: one._asdict() for name, one in found.items()}))
    return
  rows = {
    name: [
      f'{one.difference:+.3f}', f'{one.low:+.3f} to {one.high:+.3f}',
      compare.probability(one.p),
    ]
    for name, one in found.items()
  }  # fmt: skip
  title = f'{PAIR.value[0]} - {PAIR.value[1]}'
  print(*tables.table(title, ['points', '95 % interval', 'p'], rows), sep='\n')


if __name__ == '__main__':
  command.run(main, 'at')
