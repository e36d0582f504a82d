"""Says what a run will take, without running it and without its data.

  python -m train.plan --config=configs/cifar10_resnet19.py [--gpu=h100]

Takes the same `--config.FIELD=...` as `train.main`. It traces the job's own
training step and compiles it, and where `config.watch_every` asks for it the
look inside as well, for virtual CPU devices: this shows what each of them keeps
and sends. A GPU's compiler arranges memory in its own way: with `--gpu` it is
asked itself, and tells kernels, traffic and the largest batch too, with each
setting that saves memory or traffic: minutes. No GPU need be there, only the
plugin of the extra `plan-gpu`. Of a GPU's memory JAX takes 75 %, or the share
that XLA_PYTHON_CLIENT_MEM_FRACTION says.
"""

import json
import math
import sys
import warnings

import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from jax.extend.core import jaxprs_in_params

from train import cards, command, data, hlo, settings, watch
from train import step as step_lib
from train.datasets import sources

DEVICES = flags.DEFINE_integer(
  'devices', 4, 'How many devices train together.', lower_bound=1
)
MEMORY = flags.DEFINE_float(
  'memory',
  None,
  "What each of them may take, in GB: 24, or 75 % of the GPU's.",
  lower_bound=0,
)
GPU = flags.DEFINE_enum(
  'gpu',
  None,
  cards.NAMES,
  'Compile for GPUs of this name, there or not, with each setting that saves '
  'memory or traffic: minutes, ten or more for a large network.',
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
SHARE = 0.75  # Of a GPU's memory, that JAX takes.
# Of `model_args`, that may save memory or traffic.
SETTINGS = (('pack', True), ('remat', 'layer'), ('kernel', 'pallas'))


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


def create_train_step(config, dataset, devices=None):
  """Returns the job's training step, and the shapes of what it takes.

  Args:
    config: the run's.
    dataset: a `Dataset`.
    devices: as many as there are, to compile for; None for these.

  Returns:
    `(step, state, batch)`: the mapped function of `train/step.py`, and its
    arguments as `jax.ShapeDtypeStruct`s; nothing is computed.
  """
  steps = []

  def create():
    state, step = step_lib.create_train_step(
      config,
      data.describe(dataset),
      data.steps_per_epoch(dataset, config),
      devices,
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


def tree_bytes(tree):
  """The bytes of a tree of arrays."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def create_steps(config, dataset, devices=None):
  """As `create_train_step`; all that is compiled, named as its memory is."""
  step, state, batch = create_train_step(config, dataset, devices)
  steps = {'activation_bytes': (step, state)}
  if config.watch_every:
    look = watch.create_watch_step(
      config, data.describe(dataset), devices=devices
    )
    steps['watch_bytes'] = look, step_lib.variables(state)
  return steps, state, batch


def compiled(steps, batch, gpu=None):
  """Compiles mapped functions of `(what all devices have, batch)`.

  Args:
    steps: `{name: (function, first argument)}`.
    batch: of all devices.
    gpu: of which card the functions' devices are; None for CPU.

  Returns:
    `{name: program}`.
  """
  build = jax.stages.Lowered.compile if gpu else step_lib.compile_step
  return {
    name: build(step.lower(first, batch))
    for name, (step, first) in steps.items()
  }


def needs(programs, state, batch):
  """Returns the bytes that a device needs, by what for, and in all.

  Args:
    programs: `{name: program}`; they run one after the other.
    state: what all devices have.
    batch: of all devices.
  """
  always = {
    'state_bytes': tree_bytes(state),
    'batch_bytes': BATCHES * tree_bytes(batch) // len(batch['label']),
  }
  temporary = {
    name: program.memory_analysis().temp_size_in_bytes
    for name, program in programs.items()
  }
  total = sum(always.values()) + max(temporary.values())
  return always | temporary | {'memory_bytes': total}


def on_gpu(found, programs, steps, state, batch, gpu, memory):
  """Returns what a GPU's compiler tells, beside the memory that was found."""
  double = jax.tree.map(
    lambda x: x.update(shape=(x.shape[0], 2 * x.shape[1], *x.shape[2:])), batch
  )
  more = needs(compiled(steps, double, gpu), state, double)['memory_bytes']
  more -= found['memory_bytes']
  # By a line: as many more examples on each device as there is room for.
  num_devices, each = batch['label'].shape
  room = memory * 1e9 - found['memory_bytes']
  each = max(0, each + math.floor(room / more * each))
  told = hlo.summary(programs['activation_bytes'].as_text())
  return {
    'memory_bytes': found['memory_bytes'],
    'kernels': told['kernels'],
    'moved_bytes': told['moved_bytes'],
    'largest_batch_size': each * num_devices,
  }


def with_settings(config, dataset, devices, gpu, memory):
  """Yields what `on_gpu` tells, and the memory, with each of `SETTINGS`."""
  for name, value in SETTINGS:
    if config.model_args.get(name) == value:
      continue
    changed, title = config.copy_and_resolve_references(), f'{name}={value!r}'
    changed.model_args = dict(config.model_args) | {name: value}
    print(f'compiling with {title} ...', file=sys.stderr)
    with warnings.catch_warnings():
      warnings.filterwarnings('error', "kernel='pallas' needs")
      try:
        steps, state, batch = create_steps(changed, dataset, devices)
      except UserWarning as missing:
        print(f'left out: {missing}', file=sys.stderr)
        continue
    programs = compiled(steps, batch, gpu)
    found = needs(programs, state, batch)
    told = on_gpu(found, programs, steps, state, batch, gpu, memory)
    yield {'setting': title} | told


def plan(config, memory=24, compile=True, gpu=None):
  """Returns what a run takes on the devices there are; of numbers and names.

  Args:
    config: the run's.
    memory: GB that a device may take.
    compile: whether to compile, for memory and collectives.
    gpu: one of `cards.NAMES`, of which as many devices are taken to be there;
      None for these.

  Raises:
    ValueError: what `loop.train` raises before its first step, and what
      `cards.devices` raises.
  """
  settings.check(config)
  num_devices = jax.device_count()
  devices = cards.devices(gpu, num_devices) if gpu else None
  dataset = load(config)
  model = step_lib.create_model(config, dataset.num_classes)
  steps, state, batch = create_steps(config, dataset, devices)
  step, _ = steps['activation_bytes']
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
  if not compile:
    return result
  kind = f'{gpu}s' if gpu else 'devices'
  print(f'compiling for {num_devices} {kind} ...', file=sys.stderr)
  programs = compiled(steps, batch, gpu)
  told = hlo.summary(programs['activation_bytes'].as_text())
  result |= needs(programs, state, batch)
  result |= {
    'fits': result['memory_bytes'] <= memory * 1e9,
    'collectives': sum(told['collectives'].values()),
    'collective_bytes': told['collective_bytes'],
  }
  if gpu:
    told = on_gpu(result, programs, steps, state, batch, gpu, memory)
    rows = [{'setting': 'as it is'} | told]
    rows += with_settings(config, dataset, devices, gpu, memory)
    result |= told | {'gpu': gpu, 'settings': rows}
  return result


def table(found, memory):
  """Returns the lines of a plan as people read it."""

  def scaled(value, unit=''):
    power = 0
    while unit and value >= 1000:
      value, power = value / 1000, power + 1
    number = f'{value:,.2f}' if unit else f'{value:,}'
    return number, f'{" kMGTPE"[power]}{unit}'.strip()

  def row(label, value, unit=''):
    number, unit = scaled(value, unit)
    return f'{label:40}{number:>12} {unit}'.rstrip()

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
  if 'fits' not in found:
    return lines
  lines += ['']
  if 'gpu' in found:
    lines += [
      row('kernels a step', found['kernels']),
      row('bytes moved by our own', found['moved_bytes'], 'B'),
    ]
  lines += [
    row('collectives a step', found['collectives']),
    row('their bytes', found['collective_bytes'], 'B'),
    '',
    row('parameters, optimiser, statistics', found['state_bytes'], 'B'),
    row(f'{BATCHES} batches', found['batch_bytes'], 'B'),
    row('activations', found['activation_bytes'], 'B'),
  ]
  if 'watch_bytes' in found:
    lines += [row('or those of a watched step', found['watch_bytes'], 'B')]
  lines += [row('memory of a device', found['memory_bytes'], 'B')]
  if found['fits']:
    lines += [f'It fits into {memory:.4g} GB.']
  else:
    lines += [f'More than {memory:.4g} GB: choose a smaller batch.']
  if 'gpu' in found:
    lines += [
      f'As compiled for {found["gpu"]}; what cuDNN takes comes on top.',
      '',
      'config.model_args  kernels      moved     memory  largest batch',
    ]
    for one in found['settings']:
      moved, memory = (
        '{:>7} {:2}'.format(*scaled(one[name], 'B'))
        for name in ('moved_bytes', 'memory_bytes')
      )
      lines.append(
        f'{one["setting"]:18}{one["kernels"]:8,} {moved} {memory}'
        f'{one["largest_batch_size"]:14,}'
      )
    lines += ['By a line through the memory for this batch and for two of it.']
  return lines


def main():
  """Prints the plan, for people or as JSON."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', DEVICES.value)
  gpu, memory = GPU.value, MEMORY.value
  if memory is None:
    memory = SHARE * cards.memory(gpu) / 1e9 if gpu else 24
  found = plan(command.CONFIG.value, memory, COMPILE.value, gpu)
  if command.JSON.value:
    print(json.dumps(found))
  else:
    print(*table(found, memory), sep='\n')


if __name__ == '__main__':
  command.run(main, 'config')
