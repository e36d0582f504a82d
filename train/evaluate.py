"""Evaluates a checkpoint: accuracy, confusions, and the activity of layers.

  python -m train.evaluate --workdir=runs/digits

Warns of layers that are dead, and of running averages that lag.

`--predictions=test.npz` keeps `label` and `predicted` [N] and `logits` [N, K],
their mean over time, of the examples in their order.

`--flow` adds how gradients reach the layers, on a batch of the split.
`--energy` adds what an example takes, at 0.9 pJ for an accumulate and 4.6 pJ
for a multiply-accumulate (45 nm), beside the same network with ReLU, run once.
"""

import json

import jax
import numpy as np
from absl import flags

from train import (
  augment,
  checkpoints,
  command,
  data,
  health,
  metrics,
  settings,
  tables,
  watch,
)
from train import predictions as predictions_lib
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
NUM_STEPS = flags.DEFINE_integer(
  'num_steps',
  None,
  'Another T than the one trained: past it the last threshold is held.',
)
FLOW = flags.DEFINE_bool(
  'flow', False, 'How gradients reach each layer at each timestep, too.'
)
ENERGY = flags.DEFINE_bool(
  'energy', False, 'Synaptic operations and energy of each layer, too.'
)
PREDICTIONS = flags.DEFINE_string(
  'predictions', None, 'An .npz file to write: what is said of each example.'
)
flags.declare_key_flag('json')


def evaluate(
  workdir,
  checkpoint='latest',
  split='test',
  data_path=None,
  flow=False,
  energy=False,
  num_steps=None,
  predictions=None,
):
  """Returns loss, accuracy, confusions and activity of a checkpoint on a split.

  Args:
    workdir: of the run.
    checkpoint: 'latest' or 'best'.
    split: 'train', 'validation' or 'test'.
    data_path: of other data than the run's.
    flow: whether to add `gradient_flow` as 'flow'.
    energy: whether to add `energy_per_example` as 'energy'.
    num_steps: another T than the run's; None for that.
    predictions: an `.npz` file to write, see `predictions.evaluate`; or None.

  Returns:
    A dict for JSON: what `step.average` returns of the split; `class_accuracy`,
    [K], None for a class without examples; the sentences of `health.complaints`
    as 'warnings'; what was evaluated; and what was asked for.

  Raises:
    ValueError: no such checkpoint or split, data that do not fit it, or a file
      that can't be written.
  """
  if predictions:
    predictions_lib.check(predictions)
  state, info = checkpoints.expect(workdir, checkpoint)
  config, facts = settings.trained(info), info['data']
  if num_steps:
    config.num_steps = num_steps
    config.neuron.beyond = 'hold'
    if len(facts['example_shape']) == 4:  # Event frames.
      facts['example_shape'][0] = num_steps
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
  variables = {name: state[name] for name in ('params', 'batch_stats')}
  batches = data.eval_batches([source], config, batch_size=config.batch_size)
  run_eval = step_lib.compiled(
    step_lib.create_eval_step(config, facts, each=bool(predictions))
  )
  if predictions:
    scores, arrays = predictions_lib.evaluate(
      run_eval, variables, next(batches)
    )
    predictions_lib.write(predictions, arrays)
  else:
    scores = step_lib.evaluate(run_eval, variables, next(batches))
  warnings = health.complaints(
    scores, info['step'], config.neuron.get('momentum')
  )
  found = {
    'checkpoint': checkpoint,
    'step': info['step'],
    'split': split,
    'selected_on': info['best'] and config.select_on,
    **scores,
    'class_accuracy': metrics.numbers(
      tables.class_accuracy(scores['confusion'])
    ),
    'warnings': list(warnings.values()),
  }
  if flow:
    found['flow'] = gradient_flow(config, facts, variables, source)
  if energy:
    found['energy'] = energy_per_example(config, facts, variables, source)
  return found


def gradient_flow(config, facts, variables, source):
  """Returns how the gradient of the mean loss of a batch reaches the layers.

  In inference, by the running thresholds. The batch is spread over the split,
  which may be sorted.

  Returns:
    `num_examples`; of `watch_step` `layers`, its flow, and `gradient_norm`; and
    `shares`, `{layer: {path: share}}`.

  Raises:
    ValueError: the split has less examples than there are devices.
  """
  size = min(config.batch_size, len(source))
  size -= size % jax.device_count()
  if not size:
    raise ValueError(
      f'expected an example for each of {jax.device_count()} devices, got '
      f'{len(source)}'
    )
  spread = source.take(np.arange(size) * len(source) // size)
  (batches,) = data.eval_batches([spread], config, batch_size=size)
  run = step_lib.compiled(watch.create_watch_step(config, facts, train=False))
  watched = run(variables, next(step_lib.on_devices(batches)))
  watched = metrics.numbers(jax.device_get(watched))
  return {
    'num_examples': size,
    'layers': watched['flow'],
    'shares': metrics.numbers(
      {
        name: metrics.path_shares(told)
        for name, told in watched['flow'].items()
      }
    ),
    'gradient_norm': watched['gradient_norm'],
  }


def energy_per_example(config, facts, variables, source):
  """Returns `analysis.energy.Energy` over a split, as dicts of numbers."""
  (batches,) = data.eval_batches([source], config, batch_size=config.batch_size)
  found = watch.measure_energy(config, facts, variables, batches)
  layers = {
    name.removesuffix('/layer'): layer._asdict()
    for name, layer in found.layers.items()
  }
  return found._asdict() | {'layers': layers}


def main():
  """Prints the evaluation, for people or as JSON."""
  command.keep_compiled()
  found = evaluate(
    command.WORKDIR.value,
    CHECKPOINT.value,
    SPLIT.value,
    DATA_PATH.value,
    FLOW.value,
    ENERGY.value,
    NUM_STEPS.value,
    PREDICTIONS.value,
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
  for line in found['warnings']:
    print(f'warning: {line}')
  print('', *tables.class_tables(found['confusion']), sep='\n')
  print(*tables.activity_tables(found['layers']), sep='\n')
  if 'flow' in found:
    print('', *tables.flow_tables(found['flow']), sep='\n')
  if 'energy' in found:
    print('', *tables.energy_table(found['energy']), sep='\n')


if __name__ == '__main__':
  command.run(main, 'workdir')
