"""Says what a run will take, without running it and without its data.

  python -m train.plan --config=configs/cifar10_resnet19.py

Takes the same `--config.FIELD=...` as `train.main`. It traces the job's own
training step and compiles it for virtual CPU devices, which shows what each of
them keeps and sends. A GPU's compiler arranges memory in its own way: what is
needed there is near to this, not the same. Of a GPU's memory JAX takes 75 %, or
the share that XLA_PYTHON_CLIENT_MEM_FRACTION says.
"""

import functools
import json
import math
import re
import sys

import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from jax.extend.core import jaxprs_in_params

from train import command, data, settings
from train import step as step_lib
from train.datasets import sources

DEVICES = flags.DEFINE_integer(
  'devices', 4, 'How many devices train together.', lower_bound=1
)
MEMORY = flags.DEFINE_float(
  'memory', 24, 'What each of them has, in GB.', lower_bound=0
)
COMPILE = flags.DEFINE_bool(
  'compile', True, 'Compile, for memory and collectives: a minute or two.'
)
flags.declare_key_flag('json')

# Training and test examples of the datasets that need not be on disk.
NUM_EXAMPLES = {
  'cifar10': (50_000, 10_000),
  'cifar100': (50_000, 10_000),
  'cifar10_dvs': (9_000, 1_000),
  'digits': (1_437, 360),
  'digits_dvs': (1_437, 360),
  'imagenet2012': (1_281_167, 50_000),
}
SIDE = 256  # Of images of many sizes, before they are cropped.
BATCHES = 3  # On a device at a time: one in use, two under way.
COLLECTIVE = (
  r' = (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|'
  r'reduce-scatter)\('
)


def load(config):
  """Returns the `Dataset` of a run, of blank images where that tells enough.

  Raises:
    ValueError: what `data.load` raises.
  """
  counts = NUM_EXAMPLES.get(config.dataset.partition('/')[0])
  if not counts:
    return data.load(config)
  features = tfds.builder(config.dataset).info.features
  size = [side or SIDE for side in features['image'].shape]
  blank = {'image': np.zeros(size, features['image'].np_dtype), 'label': 0}
  train, test = (
    sources.Records([blank] * count, np.arange(count)) for count in counts
  )
  shape = data.example_shape(train, test, config)
  train, validation = data.split(train, config.validation_fraction, config.seed)
  mean, std = np.zeros(shape[-1]), np.ones(shape[-1])
  num_classes = features['label'].num_classes
  return data.Dataset(train, validation, test, shape, num_classes, mean, std)


def create_train_step(config, dataset):
  """Returns the job's training step, and the shapes of what it takes.

  Returns:
    `(step, state, batch)`: the mapped function of `train/step.py`, and its
    arguments as `jax.ShapeDtypeStruct`s; nothing is computed.
  """
  steps = []

  def create():
    state, step = step_lib.create_train_step(
      config, data.describe(dataset), data.steps_per_epoch(dataset, config)
    )
    steps.append(step)
    return state

  state = jax.eval_shape(create)
  lead = jax.device_count(), config.batch_size // jax.device_count()
  dtype = dataset.train[0]['image'].dtype
  batch = {
    'image': jax.ShapeDtypeStruct((*lead, *dataset.example_shape), dtype),
    'label': jax.ShapeDtypeStruct(lead, np.int32),
  }
  return *steps, state, batch


def flops(jaxpr):
  """Counts the FLOPs of convolutions and matrix products, two a multiply-add.

  Padding counts, as in published figures; the holes of a dilated input do not.
  The body of a scan counts as often as it runs.

  Args:
    jaxpr: a `jax.extend.core.Jaxpr`.
  """
  total = 0
  for equation in jaxpr.eqns:
    name, settings = equation.primitive.name, equation.params
    if name == 'dot_general':
      (contracted, _), _ = settings['dimension_numbers']
      shape = equation.invars[0].aval.shape
      terms = math.prod(shape[axis] for axis in contracted)
      total += 2 * equation.outvars[0].aval.size * terms
    elif name == 'conv_general_dilated':
      kernel = equation.invars[1].aval
      features = kernel.shape[settings['dimension_numbers'].rhs_spec[0]]
      terms = kernel.size / features / math.prod(settings['lhs_dilation'])
      total += round(2 * equation.outvars[0].aval.size * terms)
    else:
      times = settings['length'] if name == 'scan' else 1
      total += times * sum(map(flops, jaxprs_in_params(settings)))
  return total


def collectives(hlo):
  """Finds the collectives of a compiled program.

  Args:
    hlo: the program's text.

  Returns:
    A list of the bytes that each of them brings to a device; those in the body
    of a loop are there as often as it runs.
  """
  found = re.findall(r'^(ENTRY )?%?([\w.-]+) \(.*?\n(.*?)^}', hlo, re.M | re.S)
  bodies = {name: body.splitlines() for _, name, body in found}
  (entry,) = (name for is_entry, name, _ in found if is_entry)

  @functools.cache
  def inside(name):
    sizes = []
    for line in bodies[name]:
      if match := re.search(COLLECTIVE, line):
        sizes.append(shape_bytes(match[1]))
      trips = re.search(r'"known_trip_count":{"n":"(\d+)"}', line)
      for callee in re.findall(r'(?:body|calls|to_apply)=%?([\w.-]+)', line):
        sizes += inside(callee) * (int(trips[1]) if trips else 1)
    return sizes

  return inside(entry)


def shape_bytes(shape):
  """The bytes of an HLO shape, as `f32[4,2]{1,0}` or a tuple of such."""
  total = 0
  for dtype, sizes in re.findall(r'(\w+)\[([\d,]*)\]', shape):
    bits = int(re.sub(r'\D', '', dtype) or 8)  # A pred has a byte.
    total += bits // 8 * math.prod(int(n) for n in sizes.split(',') if n)
  return total


def tree_bytes(tree):
  """The bytes of a tree of arrays."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def plan(config, memory=24, compile=True):
  """Returns what a run takes on the devices there are; of numbers and names.

  Args:
    config: the run's.
    memory: GB of a device.
    compile: whether to compile, for memory and collectives.

  Raises:
    ValueError: what `loop.train` raises before its first step.
  """
  settings.check(config)
  dataset = load(config)
  model = step_lib.create_model(config, dataset.num_classes)
  step, state, batch = create_train_step(config, dataset)
  num_devices = jax.device_count()
  steps_per_epoch = data.steps_per_epoch(dataset, config)
  image = batch['image'].update(shape=(1, *dataset.example_shape))
  inference = jax.make_jaxpr(
    lambda variables, image: model.apply(
      variables, step_lib.prepare(image, 0.0, 1.0), train=False
    )
  )(step_lib.variables(state), image)
  training = jax.make_jaxpr(step)(state, batch)  # What one device does.
  result = {
    'model': config.model,
    'method': config.method,
    'num_steps': config.num_steps,
    'dtype': config.dtype,
    'dataset': config.dataset,
    'num_examples': len(dataset.train),
    'example_shape': dataset.example_shape,
    'num_classes': dataset.num_classes,
    'num_devices': num_devices,
    'batch_size': config.batch_size,
    'num_epochs': config.num_epochs,
    'parameters': sum(x.size for x in jax.tree.leaves(state.params)),
    'inference_flops': flops(inference.jaxpr),
    'training_flops': flops(training.jaxpr) * num_devices // config.batch_size,
    'steps_per_epoch': steps_per_epoch,
    'total_steps': config.num_epochs * steps_per_epoch,
  }
  if compile:
    print(f'compiling for {num_devices} devices ...', file=sys.stderr)
    compiled = step_lib.compile_step(step.lower(state, batch))
    sizes = collectives(compiled.as_text())
    parts = {
      'state_bytes': tree_bytes(state),
      'batch_bytes': BATCHES * tree_bytes(batch) // num_devices,
      'activation_bytes': compiled.memory_analysis().temp_size_in_bytes,
    }
    total = sum(parts.values())
    result |= parts | {
      'memory_bytes': total,
      'fits': total <= memory * 1e9,
      'collectives': len(sizes),
      'collective_bytes': sum(sizes),
    }
  return result


def table(found, memory):
  """Returns the lines of a plan as people read it."""

  def row(label, value, unit=''):
    power = 0
    while unit and value >= 1000:
      value, power = value / 1000, power + 1
    number = f'{value:,.2f}' if unit else f'{value:,}'
    return f'{label:40}{number:>12} {" kMGTPE"[power].strip()}{unit}'.rstrip()

  shape = ' x '.join(map(str, found['example_shape']))
  lines = [
    f'{found["model"]}, {found["method"]}, T = {found["num_steps"]}, '
    f'{found["dtype"]}',
    f'{found["dataset"]}, {found["num_examples"]:,} examples of {shape}, '
    f'{found["batch_size"]} a step on {found["num_devices"]} devices',
    '',
    row('parameters', found['parameters']),
    row('an image, inference', found['inference_flops'], 'FLOP'),
    row('an image, training', found['training_flops'], 'FLOP'),
    row('steps an epoch', found['steps_per_epoch']),
    row(f'steps in {found["num_epochs"]} epochs', found['total_steps']),
  ]
  if 'fits' in found:
    lines += [
      '',
      row('collectives a step', found['collectives']),
      row('their bytes', found['collective_bytes'], 'B'),
      '',
      row('parameters, optimiser, statistics', found['state_bytes'], 'B'),
      row(f'{BATCHES} batches', found['batch_bytes'], 'B'),
      row('activations', found['activation_bytes'], 'B'),
      row('memory of a device', found['memory_bytes'], 'B'),
    ]
    if found['fits']:
      lines += [f'It fits into {memory:g} GB.']
    else:
      lines += [f'More than {memory:g} GB: choose a smaller batch.']
  return lines


def main():
  """Prints the plan, for people or as JSON."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', DEVICES.value)
  found = plan(command.CONFIG.value, MEMORY.value, COMPILE.value)
  if command.JSON.value:
    print(json.dumps(found))
  else:
    print(*table(found, MEMORY.value), sep='\n')


if __name__ == '__main__':
  command.run(main, 'config')
