"""What a config may say, and what a resumed run may say anew."""

import json
import math

import jax
from flax import traverse_util
from ml_collections import ConfigDict

CHOICES = {
  'cosine_per': ('step', 'epoch'),
  'dtype': ('float32', 'bfloat16', 'float64'),
  'loss': ('cross_entropy', 'tet'),
  'optimizer': ('sgd', 'adamw'),
  'select_on': ('validation', 'test'),
}
POSITIVE = (
  'num_epochs', 'batch_size', 'num_steps', 'learning_rate', 'log_every',
)  # fmt: skip
NOT_NEGATIVE = (
  'momentum', 'weight_decay', 'grad_clip_norm', 'label_smoothing',
  'num_workers', 'seed', 'watch_every', 'save_every_minutes', 'hang_minutes',
  'skip_nonfinite',
)  # fmt: skip
OTHERS = (
  'augment', 'class_weights', 'data_dir', 'data_path', 'dataset', 'init_from',
  'mean', 'method', 'model', 'model_args', 'neuron', 'normalize',
  'num_classes', 'profile', 'std', 'validation_fraction', 'warmup_epochs',
)  # fmt: skip
# What may differ when a run is resumed; anything else would be another run.
FREE = (
  'config.data_dir', 'config.data_path', 'config.hang_minutes',
  'config.init_from', 'config.log_every', 'config.model_args.pack',
  'config.model_args.remat', 'config.num_workers', 'config.profile',
  'config.save_every_minutes', 'config.watch_every',
)  # fmt: skip
# How runs went that are older than a field.
BEFORE = {
  'config.class_weights': None,
  'config.hang_minutes': 0,
  'config.init_from': '',
  'config.neuron.surrogate': 'rectangular',
  'config.save_every_minutes': 0,
  'config.skip_nonfinite': 0,
}


def check(config):
  """Raises a `ValueError` for a setting that is missing or out of its range."""
  expected = {*CHOICES, *POSITIVE, *NOT_NEGATIVE, *OTHERS}
  if missing := expected.difference(config):
    raise ValueError(
      f'expected a config with {", ".join(sorted(missing))}, as '
      'configs/digits.py has them, got none'
    )
  fields = traverse_util.flatten_dict(config.to_dict(), sep='.')
  for name, value in fields.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f'config.{name} must be finite, got {value}')
  for name, choices in CHOICES.items():
    if config[name] not in choices:
      raise ValueError(
        f'config.{name} must be one of {", ".join(choices)}, '
        f'got {config[name]!r}'
      )
  for name in POSITIVE:
    if not config[name] > 0:
      raise ValueError(f'config.{name} must be positive, got {config[name]}')
  for name in NOT_NEGATIVE:
    if config[name] < 0:
      raise ValueError(f'config.{name} must be 0 or more, got {config[name]}')
  if not 0 <= config.warmup_epochs <= config.num_epochs:
    raise ValueError(
      f'config.warmup_epochs must be in [0, num_epochs = {config.num_epochs}], '
      f'got {config.warmup_epochs}'
    )
  if config.data_path and config.dataset != 'npz':
    raise ValueError(
      "config.data_path is the file of config.dataset = 'npz', got "
      f'{config.data_path!r} with config.dataset = {config.dataset!r}'
    )
  if config.dtype == 'float64' and not jax.config.jax_enable_x64:
    raise ValueError(
      'config.dtype = float64 needs JAX_ENABLE_X64=1 in the environment'
    )
  devices = jax.device_count()
  if left := config.batch_size % devices:
    raise ValueError(
      f'config.batch_size must be a multiple of the number of devices, '
      f'{devices}, got {config.batch_size}: the next one is '
      f'{config.batch_size + devices - left}'
    )


def trained(info):
  """Returns the config of a checkpoint's run.

  Whatever the data are, the network takes them as it was trained to: classes,
  mean and deviation are those of the run's data.
  """
  fields = {name.removeprefix('config.'): x for name, x in BEFORE.items()}
  fields.pop('neuron.surrogate')  # The neuron's own default.
  config = ConfigDict(fields | info['config'])
  facts = info['data']
  config.update({name: facts[name] for name in ('num_classes', 'mean', 'std')})
  return config


def check_extends(info, config):
  """Raises a `ValueError` if a checkpoint's run cannot be given more epochs."""
  if 'config' not in info:
    raise ValueError('expected a run to extend in this workdir, got none')
  before = info['config']['num_epochs']
  if config.num_epochs < before:
    raise ValueError(
      f'expected config.num_epochs of {before} or more, to extend the run in '
      f'this workdir, got {config.num_epochs}'
    )


def check_unchanged(info, key, value, otherwise='another workdir', free=FREE):
  """Raises a `ValueError` naming all that differs from a checkpoint's run.

  Args:
    info: of the checkpoint. What it does not tell, being older, may be any.
    key: what of it, `'config'` or `'data'`.
    value: the same as it is now, a dict.
    otherwise: what another run, or other data, would take.
    free: what may differ.
  """
  told = info.get(key, {})
  expected, got = _flat(key, value | told), _flat(key, value)
  for name in got.keys() & BEFORE.keys() if told else ():
    expected[name] = _flat(key, told).get(name, BEFORE[name])
  changes = {}
  for name in expected | got:
    before, now = (t.get(name) for t in (expected, got))
    if name not in free and before != now:
      changes[name] = f'expected {before!r}, got {now!r}'
  if not changes:
    return
  if 'config.num_epochs' in changes:
    otherwise += ', or --extend to train it longer'
  first, *others = (f'{name}, {change}' for name, change in changes.items())
  first = first.replace(',', ' differs from the run in this workdir,', 1)
  raise ValueError(f'{"; ".join([first, *others])}: choose {otherwise}')


def _flat(key, tree):
  """Names from `key` on, with dots, and values as a checkpoint has them."""
  return traverse_util.flatten_dict(
    json.loads(json.dumps({key: tree})), sep='.'
  )
