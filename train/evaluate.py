"""Evaluates a checkpoint: accuracy, and the activity of every layer.

  python -m train.evaluate --workdir=runs/digits

`--flow` adds how gradients reach the layers, on a batch of the split.
`--energy` adds what an example takes, at 0.9 pJ for an accumulate and 4.6 pJ
for a multiply-accumulate (45 nm), beside the same network with ReLU, run once.
"""

import json

import jax
import numpy as np
from absl import flags

from train import augment, checkpoints, command, data, metrics, settings, watch
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
flags.declare_key_flag('json')


def evaluate(
  workdir,
  checkpoint='latest',
  split='test',
  data_path=None,
  flow=False,
  energy=False,
  num_steps=None,
):
  """Returns loss, accuracy and activity of a checkpoint on a split.

  Args:
    workdir: of the run.
    checkpoint: 'latest' or 'best'.
    split: 'train', 'validation' or 'test'.
    data_path: of other data than the run's.
    flow: whether to add `gradient_flow` as 'flow'.
    energy: whether to add `energy_per_example` as 'energy'.
    num_steps: another T than the run's; None for that.

  Raises:
    ValueError: no such checkpoint or split, or data that do not fit it.
  """
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
  found = {
    'checkpoint': checkpoint,
    'step': info['step'],
    'split': split,
    'selected_on': info['best'] and config.select_on,
    **step_lib.evaluate(
      step_lib.compiled(step_lib.create_eval_step(config, facts)),
      variables,
      next(batches),
    ),
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


def table(title, columns, rows):
  """Returns the lines of a table: `{row: cells}`, cells as they are printed."""
  wide = max(map(len, [title, *rows]))
  sizes = [
    max(map(len, cells)) for cells in zip(columns, *rows.values(), strict=True)
  ]
  return [
    f'{name:{wide}}'
    + ''.join(
      f'  {cell:>{size}}' for cell, size in zip(cells, sizes, strict=True)
    )
    for name, cells in {title: columns, **rows}.items()
  ]


def over_time(title, layers, form, last, summarise):
  """Returns the lines of a table: a row a layer, a column a timestep.

  Args:
    title: what is told.
    layers: `{layer: numbers}`, one a timestep.
    form: of a number.
    last: the name of the last column.
    summarise: what makes that one of a layer's numbers.
  """
  num_steps = len(next(iter(layers.values())))
  columns = [f't={t}' for t in range(1, num_steps + 1)] + [last]
  rows = {
    layer: [form.format(x) for x in [*values, summarise(values)]]
    for layer, values in layers.items()
  }
  return table(title, columns, rows)


def flow_tables(found):
  """Yields the lines of the tables of `gradient_flow`."""
  yield from over_time(
    f'norm of dL/du, {found["num_examples"]} examples',
    {
      name: np.array(told['u'], float) for name, told in found['layers'].items()
    },
    '{:.2e}',
    'all',
    metrics.norm,
  )
  yield ''
  rows = {
    layer: ['-' if x is None else f'{100 * x:.2f}' for x in shares.values()]
    for layer, shares in found['shares'].items()
  }
  yield from table(
    'shares of the paths, %', next(iter(found['shares'].values())), rows
  )


def energy_table(found):
  """Yields the lines of the table of `energy_per_example`."""
  names = 'operations', 'energy', 'relu_operations', 'relu_energy'

  def cells(row, kind='', rate=''):
    return [kind, rate, *(f'{row[name] / 1e3:,.1f}' for name in names)]

  rows = {
    layer: cells(row, row['kind'], f'{100 * row["rate"]:.2f}')
    for layer, row in found['layers'].items()
  }
  accumulates, multiply_accumulates = (
    found[name] for name in ('accumulates', 'multiply_accumulates')
  )
  whole = found | {'operations': accumulates + multiply_accumulates}
  yield from table(
    'operations, an example',
    ['kind', 'input, %', 'thousand', 'nJ', 'ReLU, thousand', 'ReLU, nJ'],
    rows | {'total': cells(whole)},
  )
  share = found['energy'] / found['relu_energy']
  yield (
    f'{accumulates:,.0f} accumulates (AC) and {multiply_accumulates:,.0f} '
    f'multiply-accumulates (MAC): {share:.1%} of the energy with ReLU'
  )


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
    layers = {
      layer: 100 * np.array(told[name])
      for layer, told in found['layers'].items()
    }
    lines = over_time(title, layers, '{:.2f}', 'mean', np.mean)
    print('', *lines, sep='\n')
  if 'flow' in found:
    print('', *flow_tables(found['flow']), sep='\n')
  if 'energy' in found:
    print('', *energy_table(found['energy']), sep='\n')


if __name__ == '__main__':
  command.run(main, 'workdir')
