"""Evaluates a checkpoint: accuracy, and the activity of every layer.

python -m train.evaluate --workdir=runs/digits
"""

import json

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from train import augment, checkpoints, command, data, settings
from train import step as step_lib
from train.datasets import npz, sources

CHECKPOINT = flags.DEFINE_enum(
  'checkpoint', 'latest', ['latest', 'best'], 'Which state of the run.'
)
SPLIT = flags.DEFINE_enum(
  'split', 'test', ['train', 'validation', 'test'], 'Which examples.'
)
DATA_PATH = flags.DEFINE_string(
  'data_path',
  None,
  'An .npz file of other data; for the test split, x_test and y_test will do.',
)
flags.declare_key_flag('json')


def evaluate(workdir, checkpoint='latest', split='test', data_path=None):
  """Returns loss, accuracy and activity of a checkpoint on a split.

  Raises:
    ValueError: no such checkpoint or split, or data that do not fit it.
  """
  found = checkpoints.restore(workdir, checkpoint)
  if not found:
    raise ValueError(
      f'expected a run with a {checkpoint} checkpoint in {workdir}, got none'
    )
  state, info = found
  config, facts = ConfigDict(info['config']), info['data']
  # Whatever the data are, the network takes them as it was trained to.
  config.update({name: facts[name] for name in ('num_classes', 'mean', 'std')})
  if data_path:
    config.update(dataset='npz', data_path=data_path)
  # The run may have had other devices; what is too much is masked.
  config.batch_size += -config.batch_size % jax.device_count()
  settings.check(config)
  if data_path and split == 'test':
    source = sources.Arrays(*npz.read_test(data_path, config.num_classes))
  else:
    dataset = data.load(config)
    source = getattr(dataset, split)
    if source is None:
      raise ValueError(
        'expected a split of the run, got validation: it has none'
      )
    if not data_path:
      settings.check_unchanged(
        info, 'data', data.describe(dataset), '--data_path for other data'
      )
  image = augment.evaluation(config.augment)(source[0])['image']
  for name, got in (
    ('example_shape', list(image.shape)),
    ('dtype', image.dtype.name),
  ):
    if (expected := facts.get(name, got)) != got:
      raise ValueError(f'expected data with {name} {expected}, got {got}')
  batches = data.eval_batches([source], config, batch_size=config.batch_size)
  return {
    'checkpoint': checkpoint,
    'step': info['step'],
    'split': split,
    'selected_on': info['best'] and config.select_on,
    **step_lib.evaluate(
      step_lib.compiled(step_lib.create_eval_step(config, facts)),
      {name: state[name] for name in ('params', 'batch_stats')},
      next(batches),
    ),
  }


def table(title, layers, name):
  """Returns the lines of a table in percent: a row a layer, a column a t."""
  num_steps = len(next(iter(layers.values()))[name])
  wide = max(map(len, [title, *layers]))
  columns = [f't={t}' for t in range(1, num_steps + 1)] + ['mean']
  lines = [f'{title:{wide}}' + ''.join(f'{column:>7}' for column in columns)]
  for layer, measured in layers.items():
    values = [*measured[name], np.mean(measured[name])]
    lines.append(f'{layer:{wide}}' + ''.join(f'{100 * x:7.2f}' for x in values))
  return lines


def main():
  """Prints the evaluation, for people or as JSON."""
  command.keep_compiled()
  found = evaluate(
    command.WORKDIR.value, CHECKPOINT.value, SPLIT.value, DATA_PATH.value
  )
  if command.JSON.value:
    print(json.dumps(found))
    return
  chosen = f', chosen on the {found["selected_on"]} split'
  print(
    f'accuracy {found["accuracy"]:.2%}, loss {found["loss"]:.4f} on '
    f'{found["num_examples"]} {found["split"]} examples; '
    f'{found["checkpoint"]} checkpoint, step {found["step"]}'
    + (chosen if found['checkpoint'] == 'best' else '')
  )
  for title, name in (
    ('firing rate, %', 'firing_rate'),
    ('in the gradient window, %', 'gradient_share'),
  ):
    print('', *table(title, found['layers'], name), sep='\n')


if __name__ == '__main__':
  command.run(main, 'workdir')
