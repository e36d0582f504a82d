"""The plan of a run: every number against a count of its own."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import digits, digits_dvs
from train import cards, data, hlo, plan, watch
from train import step as step_lib

ROOT = pathlib.Path(__file__).parent.parent


def tiny(module=digits, **fields):
  """A config of a size for tests."""
  config = module.get_config()
  config.update(batch_size=16, num_steps=2, model_args={'stages': ((4,),)})
  config.update(watch_every=0)
  config.update(fields)
  return config


# FLOPs.


def count(function, *shapes):
  specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return plan.flops(jax.make_jaxpr(function)(*specs).jaxpr)


def conv(x, kernel, stride=1, padding='VALID', **options):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'), **options,
  )  # fmt: skip


def gradients(function):
  return jax.grad(lambda *args: function(*args).sum(), (0, 1))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_matrix_products(m, k, n):
  assert count(jnp.dot, (m, k), (k, n)) == 2 * m * k * n
  # A batch axis, and two that are contracted.
  product = jax.vmap(lambda x, y: jnp.einsum('abc,bcd->ad', x, y))
  assert count(product, (3, m, k, 2), (3, k, 2, n)) == 3 * 2 * m * 2 * k * n


@settings(deadline=None)
@given(
  batch=st.integers(1, 3), side=st.integers(3, 6), planes=st.integers(1, 4),
  size=st.sampled_from((1, 3)), groups=st.sampled_from((1, 2)),
)  # fmt: skip
def test_convolutions_without_padding_are_xlas(
  batch, side, planes, size, groups
):
  def function(x, kernel):
    return conv(x, kernel, feature_group_count=groups)

  shapes = (batch, side, side, 4), (size, size, 4 // groups, 2 * planes)
  specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  lowered = jax.jit(function).lower(*specs)
  assert count(function, *shapes) == lowered.cost_analysis()['flops']


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [1, 3, 7])
def test_a_convolution_and_its_two_gradients_count_alike(size, stride):
  padding = [(size // 2, (size - 1) // 2)] * 2

  def function(x, kernel):
    return conv(x, kernel, stride, padding)

  shapes = (5, 8, 8, 3), (size, size, 3, 4)
  forward = count(function, *shapes)
  assert forward == 2 * 5 * (8 // stride) ** 2 * 4 * size**2 * 3
  assert count(gradients(function), *shapes) == 3 * forward


def test_a_scan_counts_its_body_each_time():
  def function(x, kernel):
    def body(carry, _):
      return jax.lax.scan(lambda c, _: (c @ kernel, None), carry, length=3)

    return jax.checkpoint(jax.jit(lambda x: jax.lax.scan(body, x, length=7)))(
      x
    )[0]

  one = 2 * 2 * 5 * 5
  assert count(function, (2, 5), (5, 5)) == 21 * one
  # The forward pass once more for the checkpoint, and two products each.
  assert count(gradients(function), (2, 5), (5, 5)) == 21 * 4 * one


# Data that are not there.


@pytest.mark.parametrize(
  ('dataset', 'augment', 'shape', 'dtype', 'num_classes', 'num_examples'),
  [
    ('cifar10', (), (32, 32, 3), np.uint8, 10, 45_000),
    ('cifar100', ('flip',), (32, 32, 3), np.uint8, 100, 45_000),
    (
      'imagenet2012',
      ('random_resized_crop:224',),
      (224, 224, 3),
      np.uint8,
      1000,
      1_153_051,
    ),
    ('cifar10_dvs/last_time_t4', (), (4, 48, 48, 2), np.float32, 10, 8_100),
  ],
)
def test_blank_data(
  tmp_path, dataset, augment, shape, dtype, num_classes, num_examples
):
  config = tiny(
    dataset=dataset, augment=augment, num_steps=4, data_dir=str(tmp_path)
  )
  loaded = plan.load(config)
  assert loaded.example_shape == shape
  assert loaded.train[0]['image'].dtype == dtype
  assert loaded.num_classes == num_classes
  assert len(loaded.train) == num_examples
  assert not list(tmp_path.iterdir())


@pytest.mark.sample
@pytest.mark.parametrize('module', [digits, digits_dvs])
def test_blank_data_are_like_those_on_disk(tmp_path, module):
  config = module.get_config()
  config.data_dir = str(tmp_path)
  blank, real = plan.load(config), data.load(config)
  for part in 'train', 'validation', 'test':
    assert len(getattr(blank, part)) == len(getattr(real, part))
  assert blank.example_shape == real.example_shape
  assert blank.num_classes == real.num_classes
  one, other = (source.train[0]['image'] for source in (blank, real))
  assert (one.dtype, one.shape) == (other.dtype, other.shape)


def test_users_own_arrays(tmp_path):
  path = tmp_path / 'data.npz'
  x, y = np.ones((40, 6, 6, 2), np.float32), np.arange(40) % 7
  np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
  config = tiny(dataset='npz', data_path=str(path), augment=())
  found = plan.plan(config, compile=False)
  assert (found['num_examples'], found['num_classes']) == (36, 7)
  assert found['steps_per_epoch'] == 2


def test_what_does_not_fit_is_the_jobs_error():
  with pytest.raises(ValueError, match='multiple of the number of devices, 4'):
    plan.plan(tiny(batch_size=6))
  with pytest.raises(ValueError, match='must be 10, got 2'):
    plan.plan(tiny(digits_dvs))
  with pytest.raises(ValueError, match='more than the 1294 training examples'):
    plan.plan(tiny(batch_size=2000))


# The whole.


@pytest.fixture(scope='module')
def found():
  return plan.plan(tiny(num_epochs=3, validation_fraction=0.0))


def test_plan_of_a_network_counted_by_hand(found):
  # 3 x 3 to 4 planes, tdBN and PLIF; 4 x 4 x 4 to 10 classes, with a bias.
  assert found['parameters'] == 9 * 4 + 2 * 4 + 1 + 64 * 10 + 10
  once, dense = 2 * 64 * 9 * 4, 2 * 2 * 64 * 10
  # An image is encoded once whatever T is, and has no gradient.
  assert found['inference_flops'] == once + dense
  assert found['training_flops'] == 2 * once + 3 * dense
  assert found['steps_per_epoch'] == 1437 // 16
  assert found['total_steps'] == 3 * (1437 // 16)


def test_memory_and_collectives_are_the_steps_own(found):
  config = tiny(num_epochs=3, validation_fraction=0.0)
  step, state, batch = plan.create_train_step(config, plan.load(config))
  compiled = step.lower(state, batch).compile()
  sizes = compiled.memory_analysis()
  assert found['activation_bytes'] == sizes.temp_size_in_bytes > 0
  # Parameters, momentum and statistics go in, and a quarter of the batch.
  one_batch = 4 * (64 + 4)
  assert found['batch_bytes'] == 3 * one_batch
  assert found['state_bytes'] + one_batch == sizes.argument_size_in_bytes
  assert found['memory_bytes'] == sum(
    found[f'{part}_bytes'] for part in ('state', 'batch', 'activation')
  )
  # The moments of tdBN and of two membranes, from each of four devices; then
  # the gradients of tdBN's and of the parameters, loss and accuracy.
  *forward, rest = 4 * 2 * 4, 4 * 2, 4 * 2, 4 * 2 * 4 + 695 + 2
  carried = [each.bytes for each in hlo.collectives(compiled.as_text())]
  assert carried[:3] == [4 * count for count in forward]
  assert sum(carried[3:]) == 4 * rest
  assert found['collectives'] == len(carried)
  assert found['collective_bytes'] == sum(carried)


@pytest.mark.sample
def test_a_watched_step_counts_where_it_is_larger(found):
  config = tiny(num_epochs=3, validation_fraction=0.0, watch_every=5)
  both = plan.plan(config)
  assert both.keys() - found.keys() == {'watch_bytes'}
  dataset = plan.load(config)
  _, state, batch = plan.create_train_step(config, dataset)
  look = watch.create_watch_step(config, data.describe(dataset))
  program = look.lower(step_lib.variables(state), batch).compile()
  temporary = program.memory_analysis().temp_size_in_bytes
  assert both['watch_bytes'] == temporary
  larger = max(0, temporary - found['activation_bytes'])
  assert both['memory_bytes'] == found['memory_bytes'] + larger


def test_the_step_is_the_one_that_trains(tmp_path):
  config = tiny(data_dir=str(tmp_path))
  dataset = data.load(config)
  step, state, batch = plan.create_train_step(config, plan.load(config))
  real, run = step_lib.create_train_step(config, data.describe(dataset), 80)
  like = jax.tree.map(lambda x: (x.shape, x.dtype), (real, state))
  assert like[0] == like[1]
  batches = data.train_batches(dataset.train, config)
  first = next(step_lib.on_devices(batches))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), first) == jax.tree.map(
    lambda x: (x.shape, x.dtype), batch
  )


FOUND = {
  'model': 'VGGSNN',
  'method': 'tgo',
  'num_steps': 3,
  'dtype': 'bfloat16',
  'dataset': 'mine',
  'num_examples': 1_281_167,
  'example_shape': (3, 9, 9, 2),
  'num_classes': 5,
  'num_devices': 2,
  'batch_size': 16,
  'num_epochs': 3,
  'parameters': 695,
  'inference_flops': 999,
  'training_flops': 41_177_481_216,
  'steps_per_epoch': 80_072,
  'total_steps': 240_216,
}
COMPILED = {
  'state_bytes': 1000,
  'batch_bytes': 16_000_000,
  'activation_bytes': 25_000_000_000,
  'memory_bytes': 25_016_001_000,
  'fits': False,
  'collectives': 12,
  'collective_bytes': 51_146_904,
}
TABLE = """\
VGGSNN, tgo, T = 3, bfloat16
mine, 1,281,167 examples of 3 x 9 x 9 x 2, 16 a step on 2 devices

parameters                                       695
an image, inference                           999.00 FLOP
an image, training                             41.18 GFLOP
steps an epoch                                80,072
steps in 3 epochs                            240,216

collectives a step                                12
their bytes                                    51.15 MB

parameters, optimiser, statistics               1.00 kB
3 batches                                      16.00 MB
activations                                    25.00 GB
memory of a device                             25.02 GB
More than 24 GB: choose a smaller batch."""


GPU_TABLE = """\
kernels a step                                   673
bytes moved by our own                          3.31 GB
collectives a step                                12
their bytes                                    51.15 MB

parameters, optimiser, statistics               1.00 kB
3 batches                                      16.00 MB
activations                                    25.00 GB
or those of a watched step                     20.00 GB
memory of a device                             25.02 GB
It fits into 40 GB.
As compiled for h100; what cuDNN takes comes on top.

config.model_args  kernels      moved     memory  largest batch
as it is               673    3.31 GB   25.02 GB         1,234
remat='layer'        1,180    4.50 GB  800.00 kB        12,340
By a line through the memory for this batch and for two of it."""


def test_table():
  expected = TABLE.splitlines()
  assert plan.table(FOUND | COMPILED, 24) == expected
  assert plan.table(FOUND, 24) == expected[:8]
  plain = {
    'setting': 'as it is',
    'memory_bytes': COMPILED['memory_bytes'],
    'kernels': 673,
    'moved_bytes': 3_310_000_000,
    'largest_batch_size': 1234,
  }
  layer = {
    'setting': "remat='layer'",
    'memory_bytes': 800_000,
    'kernels': 1180,
    'moved_bytes': 4_500_000_000,
    'largest_batch_size': 12_340,
  }
  of_gpu = plain | {
    'gpu': 'h100',
    'watch_bytes': 20_000_000_000,
    'fits': True,
    'settings': [plain, layer],
  }
  lines = plan.table(FOUND | COMPILED | of_gpu, 40)
  assert lines == expected[:8] + ['', *GPU_TABLE.splitlines()]


# GPUs that are not there.


def test_a_missing_plugin_is_one_line(monkeypatch):
  def unknown(**_):
    raise NotImplementedError('topology not implemented for cuda')

  monkeypatch.setattr(cards.topologies, 'get_topology_desc', unknown)
  with pytest.raises(ValueError, match=r'pip install -e .*plan-gpu'):
    plan.plan(tiny(), gpu='h100')


def test_what_is_known_of_the_cards():
  assert cards.NAMES == ('a100', 'h100', 'rtx4090')
  assert [round(cards.memory(card) / 2**30) for card in cards.NAMES] == [
    79, 79, 24,
  ]  # fmt: skip


def command(*args):
  return subprocess.run(
    [sys.executable, '-m', 'train.plan', *args],
    cwd=ROOT,
    env=os.environ | {'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.jax_cache')},
    capture_output=True,
    text=True,
  )


SMALL = (
  '--config=configs/digits.py', '--config.num_steps=2',
  '--config.model_args.stages=((4,),)', '--devices=2', '--json',
)  # fmt: skip


@pytest.mark.sample
@pytest.mark.skipif(
  not importlib.util.find_spec('jax_cuda13_plugin'),
  reason="JAX's CUDA plugin is not installed",
)
def test_the_largest_batch_of_a_gpu_fits():
  def run(*args):
    done = command(*SMALL, '--gpu=h100', *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

  found = run('--memory=0.003')
  assert found['kernels'] > 50 and found['collectives'] > 0
  assert found['moved_bytes'] > found['activation_bytes'] > 0
  most = found['largest_batch_size']
  assert most % 2 == 0
  rows = {row['setting']: row for row in found['settings']}
  others = ('pack=True', "remat='layer'", "kernel='pallas'")
  assert ('as it is', *others)[: len(rows)] == tuple(rows)
  assert rows['as it is']['largest_batch_size'] == most
  assert all(rows[name]['largest_batch_size'] > 0 for name in rows)
  there = run('--memory=0.003', f'--config.batch_size={most}')
  assert 0.9 < there['memory_bytes'] / 0.003e9 < 1.1


@pytest.mark.sample
def test_the_command():
  done = command(*SMALL)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found['num_devices'] == 2 and found['fits'] is True
  assert found['collectives'] > 0
  done = command('--config=configs/cifar10_resnet19.py', '--nocompile')
  assert done.returncode == 0, done.stderr
  assert 'Collectives' not in done.stdout
  assert done.stdout.splitlines()[-1].split()[-1] == '200,000'
  done = command('--config=configs/digits.py', '--devices=3', '--nocompile')
  assert done.returncode == 1 and done.stdout == ''
  assert done.stderr.startswith('error: config.batch_size must be a multiple')
