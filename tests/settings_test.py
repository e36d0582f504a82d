"""Settings: what is out of range, missing or changed is named."""

import jax
import numpy as np
import pytest

from configs import digits
from tests import tiny
from train import settings


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('loss', 'mse', r"config.loss must be one of cross_entropy, .*'mse'"),
    ('dtype', 'int8', r"config.dtype must be one of float32, .*'int8'"),
    ('select_on', 'train', r"config.select_on .* got 'train'"),
    ('cosine_per', 'day', r"config.cosine_per .* got 'day'"),
    ('num_epochs', 0, 'config.num_epochs must be positive, got 0'),
    ('batch_size', 0, 'config.batch_size must be positive, got 0'),
    ('batch_size', 6, r'multiple of the number of devices, 4, got 6'),
    ('weight_decay', -0.1, r'config.weight_decay must be 0 or more, got -0.1'),
    ('num_workers', -1, 'config.num_workers must be 0 or more, got -1'),
    ('seed', -1, 'config.seed must be 0 or more, got -1'),
    ('learning_rate', np.inf, 'config.learning_rate must be finite, got inf'),
    ('weight_decay', np.nan, 'config.weight_decay must be finite, got nan'),
    ('neuron', {'v_th': np.nan}, 'config.neuron.v_th must be finite, got nan'),
    ('dtype', 'float64', 'float64 needs JAX_ENABLE_X64=1'),
    (
      'dataset',
      'digits',
      "of config.dataset = 'npz', got 'a.npz' with .*digits",
    ),
    ('warmup_epochs', 4, r'config.warmup_epochs must be in .* 3\], got 4'),
  ],
)
def test_settings_out_of_range_are_errors(field, value, message):
  settings.check(tiny.config())
  with pytest.raises(ValueError, match=message):
    settings.check(tiny.config(data_path='a.npz', **{field: value}))


@pytest.mark.parametrize('field', digits.get_config())
def test_a_missing_setting_is_an_error(field):
  config = tiny.config()
  del config[field]
  with pytest.raises(ValueError, match=f'expected a config with {field}, as'):
    settings.check(config)


def test_float64_is_taken_where_jax_has_it():
  with jax.enable_x64(True):
    settings.check(tiny.config(dtype='float64'))


def test_another_run_is_named_by_what_differs_first():
  before = {'seed': 0, 'mean': (0.5, 0.25), 'neuron': {'decay': 0.2}}
  info = {'config': before}
  settings.check_unchanged(info, 'config', before)
  for change, message in (
    ({'seed': 1}, 'config.seed differs .* expected 0, got 1: choose another w'),
    ({'mean': [0.5, 0.5]}, r'config.mean .* \[0.5, 0.25\], got \[0.5, 0.5\]'),
    ({'neuron': {'decay': 0.3}}, 'config.neuron.decay .* 0.2, got 0.3'),
    ({'neuron': {}}, 'config.neuron.decay .* expected 0.2, got None'),
  ):
    with pytest.raises(ValueError, match=message):
      settings.check_unchanged(info, 'config', before | change)
  with pytest.raises(ValueError, match='choose peace'):
    settings.check_unchanged(info, 'config', {'seed': 1}, 'peace')


def test_a_resumed_run_may_differ_in_what_is_free_or_new():
  free = {name.removeprefix('config.'): 1 for name in settings.FREE}
  info = {'config': {'seed': 0} | free}
  now = {'seed': 0} | {name: 2 for name in free}
  settings.check_unchanged(info, 'config', now)
  settings.check_unchanged(info, 'config', now | {'num_classes': None})
  settings.check_unchanged({}, 'config', now)


def test_a_run_older_than_a_surrogate_by_name_had_the_rectangular_one():
  now = tiny.config().to_dict()
  older = now | {'neuron': dict(now['neuron'])}
  del older['neuron']['surrogate']
  settings.check_unchanged({'config': older}, 'config', now)
  now['neuron'] |= {'surrogate': 'arctan'}
  with pytest.raises(ValueError, match="expected 'rectangular', got 'arctan'"):
    settings.check_unchanged({'config': older}, 'config', now)
