"""Trains one run a seed, and prints the mean test accuracy.

  python -m train.seeds --config=configs/digits.py --workdir=runs/seeds

Takes the same `--config.FIELD=...` as `train.main`, and resumes as it does. For
event frames it prints, too, what a linear classifier makes of their sums.
"""

import copy

import numpy as np
from absl import flags

from train import command, data, loop
from train.datasets import digits_dvs

SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2', '3', '4'], 'The seeds.')


def main():
  """Trains in `workdir/seed_N`; a seed that is finished is not run again."""
  workdir = command.WORKDIR.value
  command.keep_compiled()
  accuracies = []
  for seed in map(int, SEEDS.value):
    config = copy.deepcopy(command.CONFIG.value)
    config.seed = seed
    result = loop.train(config, f'{workdir}/seed_{seed}')
    accuracies.append(result['accuracy'])
    print(f'seed {seed}: test accuracy {result["accuracy"]:.2%}')
  print(
    f'mean of {len(accuracies)} seeds: {np.mean(accuracies):.2%}, standard '
    f'deviation {np.std(accuracies, ddof=len(accuracies) > 1):.2%}'
  )
  dataset = data.load(command.CONFIG.value)
  if len(dataset.example_shape) == 4:
    train, test = dataset.train, dataset.test
    accuracy = digits_dvs.linear_accuracy(
      train.images, train.labels, test.images, test.labels
    )
    print(f'linear classifier on the frames summed over time: {accuracy:.2%}')


if __name__ == '__main__':
  command.run(main, 'config', 'workdir')
