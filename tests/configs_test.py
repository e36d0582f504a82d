"""Every config, proven up to the data and the hours."""

import contextlib
import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags
from ml_collections import config_flags

from dsatgo_jax import methods
from tests import datasets_test
from train import data, plan, settings
from train import step as step_lib
from train.datasets import cifar10_dvs

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = {path.stem for path in (ROOT / 'configs').glob('*.py')}
PARAMETERS = {
  'cifar100_resnet19': 12_721_300,
  'cifar10_dvs_vggsnn': 9_268_754,
  'cifar10_resnet19': 12_698_260,
  'imagenet_sew_resnet18': 11_689_532,
  # Four convolutions, tdBN and PLIF after each, a dense layer with a bias.
  'digits': 9 * (1 * 32 + 32 * 32 + 32 * 64 + 64 * 64)
  + 2 * (32 + 32 + 64 + 64) + 4 + (4 * 64 + 1) * 10,
  'digits_dvs': 9 * (2 * 16 + 16 * 32 + 32 * 32 + 32 * 64)
  + 2 * (16 + 32 + 32 + 64) + 4 + (4 * 4 * 64 + 1) * 10,
}  # fmt: skip
ACCURACY = {
  'cifar100_resnet19': 'Published accuracy: 80.59 +- 0.17 % (DS-ATGO, AAAI',
  'cifar10_dvs_vggsnn': 'Published accuracy: 83.70 +- 0.41 % (DS-ATGO, AAAI',
  'cifar10_resnet19': 'Published accuracy: 96.91 +- 0.12 % (DS-ATGO, AAAI',
  'digits': 'Must reach a mean test accuracy of 98 % over seeds 0 to 4',
  'digits_dvs': 'Must reach a mean test accuracy of 95 % over seeds 0 to 2',
  'imagenet_sew_resnet18': 'Published accuracy: 68.86 +- 0.25 % (DS-ATGO, AAAI',
}
CIFAR = {
  'model': 'ResNet19',
  'num_steps': 2,
  'optimizer': 'sgd',
  'momentum': 0.9,
  'learning_rate': 0.1,
  'weight_decay': 1e-4,
  'batch_size': 100,
  'num_epochs': 400,
  'warmup_epochs': 0,
  'cosine_per': 'epoch',
  'loss': 'cross_entropy',
  'label_smoothing': 0.1,
  'augment': ('random_crop:4', 'flip', 'autoaugment_cifar10'),
  'validation_fraction': 0.0,
}
PUBLISHED = {
  'cifar10_resnet19': CIFAR
  | {'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2023, 0.1994, 0.2010)},
  # Mean and deviation are those in use elsewhere.
  'cifar100_resnet19': CIFAR
  | {'mean': (0.5071, 0.4865, 0.4409), 'std': (0.2673, 0.2564, 0.2762)},
  'cifar10_dvs_vggsnn': {
    'model': 'VGGSNN',
    'num_steps': 10,
    'loss': 'tet',
    'weight_decay': 5e-4,
    'augment': ('flip', 'roll:5'),
    'validation_fraction': 0.0,
  },
  'imagenet_sew_resnet18': {
    'model': 'SEWResNet18',
    'num_steps': 4,
    'loss': 'cross_entropy',
    'augment': ('random_resized_crop:224', 'flip'),
    'validation_fraction': 0.0,
  },
}
NARROW = {
  'ConvNet': {'stages': ((4,), (4,))},
  'ResNet19': {'planes': (4, 8), 'stage_sizes': (1, 1), 'head_width': 8},
  'SEWResNet18': {'planes': (4, 8), 'stage_sizes': (1, 1)},
  'VGGSNN': {'stages': ((4,), (8,))},
}
SAMPLE = ('cifar10_resnet19', 'cifar10_dvs_vggsnn')


def load(name):
  """The module of a config, and the config."""
  module = importlib.import_module(f'configs.{name}')
  return module, module.get_config()


# What it says.


@pytest.mark.parametrize('name', sorted(CONFIGS))
def test_head_comment(name):
  module, config = load(name)
  text = re.sub(r'[\s\\]+', ' ', module.__doc__)
  command = f'python -m train.main --config=configs/{name}.py --workdir=runs/'
  assert command in text
  assert ACCURACY[name] in text
  steps, total = re.search(
    r'([\d,]+) steps an epoch, ([\d,]+) in all', text
  ).groups()
  expected = data.steps_per_epoch(plan.load(config), config)
  assert int(steps.replace(',', '')) == expected
  assert int(total.replace(',', '')) == expected * config.num_epochs


@pytest.mark.parametrize('name', sorted(CONFIGS))
def test_every_field_is_there_and_can_be_set(name):
  config, other = load(name)[1], load('digits_dvs')[1]
  assert list(config) == list(other)
  for field in config:
    assert config.get_type(field) is other.get_type(field), field
  assert config.get_type('mean') is tuple
  assert config.get_type('class_weights') is tuple
  settings.check(config)


@pytest.mark.parametrize('name', sorted(CONFIGS))
def test_settings_that_a_head_comment_names_can_be_given(name):
  text = load(name)[0].__doc__.replace('\\\n', ' ')
  pattern = r'^ +(--config\..*)$|`(--config\.[^`=]+=[^`]+)`'
  lines = [block or inline for block, inline in re.findall(pattern, text, re.M)]
  assert lines or name not in PUBLISHED
  for line in lines:
    config, values = load(name)[1], flags.FlagValues()
    with mock.patch.object(sys, 'argv', ['main', *shlex.split(line)]):
      config_flags.DEFINE_config_dict('config', config, flag_values=values)
      values(sys.argv)
    assert config.to_dict() != load(name)[1].to_dict()
    plan.create_train_step(config, plan.load(config))


@pytest.mark.parametrize('name', PUBLISHED)
def test_recipe_is_the_published_one(name):
  config = load(name)[1]
  for field, value in PUBLISHED[name].items():
    assert config[field] == value, field
  assert config.method == 'ds_atgo'
  neuron = {'decay': 0.2, 'learn_decay': True, 'v_th': 1, 'f_c': 1, 'width': 1}
  assert neuron.items() <= config.neuron.to_dict().items()


# That it builds.


@pytest.mark.parametrize('name', sorted(CONFIGS))
def test_builds(name):
  config = load(name)[1]
  step, state, batch = plan.create_train_step(config, plan.load(config))
  sizes = [x.size for x in jax.tree.leaves(state.params)]
  assert sum(sizes) == PARAMETERS[name]
  assert batch['label'].shape == (4, config.batch_size // 4)


# That it runs.


@contextlib.contextmanager
def small_data(config, folder):
  """Something in the place of what has to be downloaded."""
  config.data_dir = str(folder)
  if config.dataset.startswith('digits'):
    yield
  elif config.dataset.startswith('cifar10_dvs'):
    rng = np.random.default_rng(0)
    for label in cifar10_dvs.URLS:
      path = folder / 'downloads' / 'manual' / 'cifar10_dvs' / label
      path.mkdir(parents=True)
      for n in range(10):
        address = rng.integers(0, 0x8000, 500)
        time = 1000 * n + np.sort(rng.integers(0, 10**6, 500))
        content = datasets_test.aedat(address, time)
        (path / f'cifar10_{label}_{n}.aedat').write_bytes(content)
    yield
  else:
    builder = tfds.core.DatasetBuilder
    with (
      tfds.testing.mock_data(num_examples=16),
      mock.patch.object(builder, 'is_prepared', return_value=True),
    ):
      yield


def one_step(config, folder):
  """Runs a narrowed copy's first step as the job does."""
  config.unlock()
  config.update(
    model_args=NARROW[config.model],
    augment=[
      re.sub('resized_crop:.*', 'resized_crop:32', augmentation)
      for augmentation in config.augment
    ],
    batch_size=8,
    num_workers=0,
    warmup_epochs=0,
  )
  with small_data(config, folder):
    settings.check(config)
    dataset = data.load(config)
    old, step = step_lib.create_train_step(
      config, data.describe(dataset), data.steps_per_epoch(dataset, config)
    )
    before = jax.device_get(old)
    batches = data.train_batches(dataset.train, config)
    after, measured = step(old, next(step_lib.on_devices(batches)))
  assert after.step == 1
  for tree in after, measured:
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))
  for tree in 'params', 'batch_stats':
    pairs = jax.tree.map(
      lambda x, y: (np.asarray(x) != np.asarray(y)).any(),
      getattr(before, tree),
      getattr(after, tree),
    )
    still = [
      path for path, moved in jax.tree.leaves_with_path(pairs) if not moved
    ]
    assert not still


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      name,
      marks=[pytest.mark.slow] * (name != 'digits')
      + [pytest.mark.sample] * (name in SAMPLE),
    )
    for name in sorted(CONFIGS)
  ],
)
def test_one_step_of_a_narrowed_copy(name, tmp_path):
  one_step(load(name)[1], tmp_path)


@pytest.mark.sample
@pytest.mark.parametrize('method', methods.METHODS)
def test_one_step_of_every_method(method, tmp_path):
  config = load('digits')[1]
  config.update(method=method, num_steps=2)
  one_step(config, tmp_path)


@pytest.mark.sample
@pytest.mark.parametrize(
  'setting', [{'threshold': 'estimated'}, {'width_signal': 'sigma'}]
)
def test_one_step_of_the_other_settings(setting, tmp_path):
  config = load('digits')[1]
  config.num_steps = 2
  config.neuron.update(setting)
  one_step(config, tmp_path)


# That a GPU could run it.


@pytest.mark.sample
@pytest.mark.parametrize('name', sorted(CONFIGS))
def test_full_size_step_lowers_for_cuda_in_bfloat16(name):
  config = load(name)[1]
  config.dtype = 'bfloat16'
  step, state, batch = plan.create_train_step(config, plan.load(config))
  exported = jax.export.export(jax.jit(step), platforms=['cuda'])(state, batch)
  assert exported.platforms == ('cuda',) and exported.nr_devices == 4
  text = exported.mlir_module()
  convolutions = re.findall(r'stablehlo.convolution.*', text)
  assert len(convolutions) > 8
  for convolution in convolutions:
    assert re.search(r'-> tensor<[\dx]+xbf16>', convolution)
  assert 'stablehlo.all_reduce' in text
  assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(state))


@pytest.mark.slow
def test_digits_dvs_reach_their_target(tmp_path):
  done = subprocess.run(
    [
      sys.executable, '-m', 'train.seeds', '--config=configs/digits_dvs.py',
      '--seeds=0,1,2', f'--workdir={tmp_path}', f'--config.data_dir={tmp_path}',
    ],
    cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  network, linear = done.stdout.splitlines()[-2:]
  network = re.search(r'mean of 3 seeds: ([\d.]+)%', network)
  linear = re.search(r'linear classifier .*: ([\d.]+)%', linear)
  assert float(network[1]) >= 95
  assert float(network[1]) > float(linear[1]) > 80
