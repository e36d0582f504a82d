r"""What inference loses by the thresholds that it takes, and by its timesteps.

  python -m findings.thresholds --runs=runs/digits/ds_atgo

Of each run `RUNS/seed_N`, the test accuracy of the last state with the running
threshold of each timestep, as it was trained; with each layer's mean of them;
with those of the batch itself; and, of images, with other numbers of timesteps,
past the last of which its threshold is held. The differences from the first are
paired by seed, their p values adjusted for the number of ways (Holm).
"""

import json

import jax
import numpy as np
from absl import flags

from findings import RUNS, seeds
from train import command

LENGTHS = flags.DEFINE_multi_integer(
  'lengths', [1, 2, 4, 8], 'Numbers of timesteps to try on images.'
)
TRAINED = 'per timestep'


def per_layer(batch_stats):
  """Running averages [T, ...], each replaced by its mean over time."""

  def mean(path, a):
    if not any(name in str(path) for name in ('threshold', 'signal')):
      return a
    return np.broadcast_to(np.mean(a, 0), a.shape)

  return jax.tree_util.tree_map_with_path(mean, batch_stats)


def ways(network, num_steps):
  """Yields names of ways to infer, and the network so changed.

  Args:
    network: a `train.drawn.runs.Network`.
    num_steps: numbers of timesteps, for images.
  """
  from train.drawn import inside

  model, stats = network.model, network.variables['batch_stats']
  yield TRAINED, network
  yield (
    'per layer',
    network._replace(
      variables=network.variables | {'batch_stats': per_layer(stats)}
    ),
  )
  yield (
    "the batch's own",
    network._replace(model=inside.with_own_thresholds(model)),
  )
  if network.raw.ndim < 5:  # Else the frames are what they are.
    for t in num_steps:
      if t != model.num_steps:
        yield (
          f'T = {t}',
          network._replace(model=model.clone(num_steps=t, beyond='hold')),
        )


def accuracies(workdir, num_steps):
  """Returns `{way: test accuracy in percent}` of a run."""
  from train import data
  from train.drawn import inside, runs

  network = runs.network(runs.told(workdir), size=1)
  count = len(data.load(network.config).test)
  # Equal batches, so that every example counts, in the batch's own too.
  network.config.batch_size = max(n for n in range(1, 65) if count % n == 0)
  return {
    way: 100 * np.divide(*inside.accuracy(changed, changed.model, count))
    for way, changed in ways(network, num_steps)
  }


def main():
  """Prints the accuracies and their comparison."""
  from train import compare

  found = {}
  for folder in RUNS.value:
    each = {
      seed: accuracies(run, LENGTHS.value)
      for seed, run in seeds(folder).items()
    }
    if len(each) < 2:
      raise ValueError(
        f'expected two runs or more in {folder}, got {len(each)}'
      )
    found[folder] = compare.compared(
      {
        way: {seed: told[way] for seed, told in each.items()}
        for way in next(iter(each.values()))
      }
    )
  if command.JSON.value:
    print(json.dumps(found))
    return
  for folder, told in found.items():
    print(folder, *compare.lines(told), sep='\n', end='\n\n')


if __name__ == '__main__':
  command.run(main, 'runs')
