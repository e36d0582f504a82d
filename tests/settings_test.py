"""Settings: what is out of range, missing or changed is named."""

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
    ('warmup_epochs', 4, r'config.warmup_epochs must be in .* 3\], got 4'),
  ],
)
def test_settings_out_of_range_are_errors(field, value, message):
  settings.check(tiny.config())
  with pytest.raises(ValueError, match=message):
    settings.check(tiny.config(**{field: value}))


@pytest.mark.parametrize('field', digits.get_config())
def test_a_missing_setting_is_an_error(field):
  config = tiny.config()
  del config[field]
  with pytest.raises(ValueError, match=f'expected a config with {field}, as'):
    settings.check(config)
