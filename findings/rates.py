r"""How often neurons fire, how many learn, and how gradients reach them.

  python -m findings.rates --runs=runs/digits/vanilla --runs=runs/digits/ds_atgo

Of the runs `RUNS/seed_N` together, over all layers, timesteps and seeds: firing
rates and the shares of neurons inside the gradient window, in the test split,
by the running thresholds; and where steps were watched, in the last of those
training batches, and in the first and the last the norms of the gradient and
its paths.
"""

import json
import pathlib

import numpy as np

from findings import RUNS, seeds
from train import command

STEADY = 15.0, 17.0  # Percent: where Theorem 1 sees the firing rate.
LAST = 3  # So many layers are the last ones.


def read(folder):
  """Returns layers of the result, and watched lines, of the runs in a folder.

  Raises:
    ValueError: one is not finished.
  """
  from train import metrics

  found = []
  for run in seeds(folder).values():
    result = metrics.read_json(run / 'result.json')
    if not result:
      raise ValueError(f'expected a finished run in {run}')
    watched = [line['watch'] for line in metrics.read(run) if 'watch' in line]
    found.append((result['layers'], watched))
  return found


def of(layers, name):
  """The numbers of all layers, [layers, T], in percent."""
  return 100 * np.array([layer[name] for layer in layers.values()])


def activity(layers):
  """Numbers of rates and shares; `layers` is a list, one a seed."""
  rates = np.stack([of(one, 'firing_rate') for one in layers])
  shares = np.stack([of(one, 'gradient_share') for one in layers])
  low, high = STEADY
  steady = (rates >= low) & (rates <= high)
  return {
    'rate_mean': rates.mean(),
    'rate_deviation': rates.std(),
    'rate_lowest': rates.min(),
    'rate_highest': rates.max(),
    'rate_steady': 100 * steady.mean(),
    'share_mean': shares.mean(),
    'share_lowest': shares.min(),
    'share_last_mean': shares[:, -LAST:].mean(),
    'share_last_lowest': shares[:, -LAST:].min(),
  }


def gradients(flows):
  """Numbers of gradients; `flows` is a list of `{layer: flow.summary}`.

  `depth` is the norm of dL/du in the first layer over that in the last one, all
  timesteps together; `time` that at the first timestep over that at the last,
  all layers together; the others are `metrics.path_shares` in percent, the mean
  of the layers. All are means over the seeds.
  """
  from train import metrics

  rows = []
  for layers in flows:
    norms = np.array([layer['u'] for layer in layers.values()])
    by_layer, by_time = (np.linalg.norm(norms, axis=axis) for axis in (1, 0))
    shares = [metrics.path_shares(layer) for layer in layers.values()]
    rows.append(
      {
        'depth': by_layer[0] / by_layer[-1],
        'time': by_time[0] / by_time[-1],
        **{
          path: 100 * np.mean([share[path] for share in shares])
          for path in shares[0]
        },
      }
    )
  return {name: np.mean([row[name] for row in rows]) for name in rows[0]}


def measured(folder):
  """Returns `{'activity', 'gradients'}`, of watched steps where there are."""
  results, watched = zip(*read(folder), strict=True)
  found = {'activity': {'test': activity(results)}, 'gradients': {}}
  if all(watched):
    found['activity']['training'] = activity(
      [lines[-1]['activity'] for lines in watched]
    )
    for name, i in ('first step', 0), ('last step', -1):
      found['gradients'][name] = gradients(
        [lines[i]['flow'] for lines in watched]
      )
  return found


def main():
  """Prints two tables."""
  from train import tables

  found = {pathlib.Path(folder).name: measured(folder) for folder in RUNS.value}
  if command.JSON.value:
    print(json.dumps(found, default=float))
    return
  for kind, title in (
    ('activity', '%'), ('gradients', 'ratios, and paths in %'),
  ):  # fmt: skip
    rows = {
      f'{name}, {when}': told
      for name, both in found.items()
      for when, told in both[kind].items()
    }
    if not rows:
      continue
    columns = [name.replace('_', ' ') for name in next(iter(rows.values()))]
    cells = {
      name: [f'{value:.2f}' for value in told.values()]
      for name, told in rows.items()
    }
    print(*tables.table(title, columns, cells), sep='\n', end='\n\n')


if __name__ == '__main__':
  command.run(main, 'runs')
