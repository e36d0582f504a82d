"""The reference arrays are reproduced; and where they are not, it is told."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from dsatgo_jax import convert
from dsatgo_jax.models import ResNet19
from tests import parity

FILES = sorted((pathlib.Path(__file__).parent / 'testdata').glob('*.npz'))
LIF = pathlib.Path(__file__).parent / 'testdata' / 'neuron_lif.npz'


def neuron_inputs(rng):
  shape = (5, 2, 7)
  return {
    'w': np.array(-0.5),
    'b0.input': rng.normal(size=shape),
    'b0.cotangent': rng.normal(size=shape),
    'eval.input': rng.normal(size=(5, 3, 7)),
  }


def resnet19_inputs(rng):
  model = ResNet19(3, 3, planes=(2, 2, 3), stage_sizes=(1, 2, 1), head_width=4)
  images = rng.normal(size=(2, 2, 5, 6, 1))
  variables = jax.jit(model.init)(jax.random.key(0), images[0])
  state_dict = {
    f'init.{name}': array
    for name, array in convert.to_torch(variables).items()
    if 'running_threshold' not in name
  }
  return state_dict | {
    's0.logits': np.zeros((3, 2, 3)),
    's0.images': images[0],
    's0.labels': np.array([0, 2]),
    's0.lr': np.array(0.1),
    's1.images': images[1],
    's1.labels': np.array([1, 1]),
    's1.lr': np.array(0.3),
    's1.grad.fc.2.layer.weight': np.zeros((3, 4)),
    'eval.images': rng.normal(size=(3, 5, 6, 1)),
  }


def mpd_agl_inputs(rng):
  return {
    'v_th': np.array(0.7),
    'tdbn.scale': rng.normal(1, 0.1, size=3),
    'tdbn.bias': rng.normal(size=3),
    'plif.w': np.array(0.3),
    'input': rng.normal(size=(2, 5, 3)),
    'cotangent': rng.normal(size=(2, 5, 3)),
  }


def tet_loss_inputs(rng):
  return {
    'logits': rng.normal(size=(2, 3, 6)),
    'labels': np.array([0, 5, 3]),
    'loss.lambda=0.3': np.zeros(()),
    'grad.lambda=0.3': np.zeros((2, 3, 6)),
  }


@pytest.mark.parametrize(
  'path',
  [
    pytest.param(
      path,
      id=path.stem,
      marks=[pytest.mark.sample] * (path.stem == 'resnet19_narrow'),
    )
    for path in FILES
  ],
)
def test_reference(path, capsys):
  assert parity.main([str(path)]) == 0
  assert 'FAILED' not in capsys.readouterr().out


@pytest.mark.parametrize(
  'run',
  [
    pytest.param(run, marks=[pytest.mark.sample] * (run is parity.resnet19))
    for run, *_ in parity.LAYOUTS
  ],
)
def test_other_shapes_pass_and_every_array_can_fail(run):
  inputs = globals()[f'{run.__name__}_inputs'](np.random.default_rng(0))
  with jax.enable_x64(True):
    results = dict(run(parity.Arrays(inputs)))
    results = {name: np.array(array) for name, array in results.items()}
    arrays = parity.Arrays(inputs | results)
    layout, errors = parity.compare(arrays)
    assert layout == run.__name__
    assert errors.keys() == results.keys()
    assert all(parity.passes(name, error) for name, error in errors.items())

    for name, array in results.items():
      size = 1 if name.endswith('spikes') else 1e-8 * np.max(np.abs(array))
      array.flat[-1] += size or 1e-8
    _, errors = parity.compare(arrays | results)
  passed = [
    name for name, error in errors.items() if parity.passes(name, error)
  ]
  assert not passed


def test_another_method_fails(monkeypatch):
  monkeypatch.setitem(parity.DS_ATGO, 'width_signal', 'theta')
  assert parity.main([str(LIF)]) == 1


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    (
      'b0.spikes',
      lambda a: 1 - a,
      '1080 differ  worst of 3: b0.spikes  FAILED',
    ),
    ('b1.width', lambda a: a * (1 + 1e-8), 'worst of 3: b1.width  FAILED'),
    ('b1.width', lambda a: a * np.nan, 'nan  worst of 3: b1.width  FAILED'),
    ('b1.width', lambda a: a[:2], 'expected b1.width (3,), got (2,)'),
    ('b1.width', None, 'expected an array b1.width, got none'),
    ('b2.input', lambda a: a[:, :2], 'changed.npz: FAILED: '),
    ('b0.input', None, 'expected the arrays of one layout'),
    ('logits', lambda _: np.zeros(3), 'expected the arrays of one layout'),
    ('b0.other', lambda _: np.zeros(3), 'got also b0.other'),
    ('b0.other', lambda _: np.array(None), 'expected an intact .npz file'),
  ],
)
def test_changed_file_fails(name, change, message, tmp_path, capsys):
  arrays = dict(np.load(LIF))
  array = arrays.pop(name, None)
  if change is not None:
    arrays[name] = change(array)
  path = tmp_path / 'changed.npz'
  np.savez(path, **arrays)
  assert parity.main([str(path)]) == 1
  assert message in capsys.readouterr().out


@pytest.mark.parametrize(
  'damage', [lambda b: b[:-100], lambda b: b[:100], lambda _: b'', None]
)
def test_damaged_file_fails(damage, tmp_path, capsys):
  path = tmp_path / 'damaged.npz'
  if damage is not None:
    path.write_bytes(damage(LIF.read_bytes()))
  assert parity.main([str(path)]) == 1
  failed, total = capsys.readouterr().out.splitlines()
  assert failed.startswith(f'{path}: FAILED: expected an intact .npz file, got')
  assert total == f'1 files, 1 failed {path}'


def test_single_array_fails(tmp_path, capsys):
  np.save(tmp_path / 'one.npy', np.zeros(3))
  assert parity.main([str(tmp_path / 'one.npy')]) == 1
  assert 'got a single array' in capsys.readouterr().out


def test_command(tmp_path):
  arrays = dict(np.load(LIF.with_name('tet_loss.npz')))
  path = tmp_path / 'tet_loss.npz'
  for factor, status in ((1, 0), (1 + 1e-8, 1)):
    np.savez(
      path,
      **arrays
      | {'loss.lambda=0.05': np.array(factor) * arrays['loss.lambda=0.05']},
    )
    command = [sys.executable, '-m', 'tests.parity', '--verbose', str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert 'grad.lambda=0.05' in done.stdout
