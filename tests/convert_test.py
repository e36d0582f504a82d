"""State dicts of the authors' ResNet-19, into our variables and back."""

import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from dsatgo_jax import convert
from dsatgo_jax.models import VGGSNN, ResNet19
from train import convert as command
from train import evaluate

REFERENCE = pathlib.Path(__file__).parent / 'testdata' / 'resnet19_narrow.npz'
IMAGES = np.zeros((2, 8, 8, 3), np.float32)
SMALL = {
  'planes': (2, 3),
  'stage_sizes': (1, 2),
  'head_width': 5,
  'num_classes': 4,
  'learn_decay': True,
  'num_steps': 3,
}


def variables(seed=0, network=ResNet19, **attributes):
  model = network(**attributes)
  template = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda a: rng.normal(size=a.shape).astype(a.dtype), template
  )


def reference(prefix):
  return {
    name.removeprefix(prefix): array
    for name, array in np.load(REFERENCE).items()
    if name.startswith(prefix)
  }


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'width_signal': 'sigma'},
    {'method': 'vanilla'},
    {'method': 'learnable_threshold'},
    {'learn_decay': False},
    {'planes': (3,), 'stage_sizes': (2,)},
    {'planes': (2, 2, 2, 2), 'stage_sizes': (1, 1, 2, 1)},
    {'param_dtype': jnp.bfloat16},
  ],
)
def test_round_trip_is_exact(changes):
  ours = variables(**SMALL | changes)
  theirs = convert.to_torch(ours)
  template = variables(seed=1, **SMALL | changes)
  back = convert.from_torch(theirs, template)
  chex.assert_trees_all_equal(back, ours, strict=True)


@pytest.mark.parametrize('prefix', ['init.', 'final.'])
def test_reference_round_trip_is_exact(prefix):
  theirs = reference(prefix)
  with jax.enable_x64(True):
    template = variables(
      **convert.settings(theirs) | {'num_steps': 2},
      dtype=jnp.float64,
      param_dtype=jnp.float64,
    )
  back = convert.to_torch(convert.from_torch(theirs, template))
  for name, array in theirs.items():
    if name.endswith('num_batches_tracked'):
      assert name not in back
    else:
      np.testing.assert_array_equal(back[name], array, strict=True)
  added = [name for name in back if name not in theirs]
  assert len(added) == (20 if prefix == 'init.' else 0)


def test_layouts():
  ours = variables(**SMALL)
  theirs = convert.to_torch(ours)
  kernel = ours['params']['block1']['spiking1']['layer']['kernel']
  weight = theirs['ResNetBlocks.1.0.conv1.layer.weight']
  assert kernel.shape == (3, 3, 2, 3) and weight.shape == (3, 2, 3, 3)
  assert kernel[0, 1, 1, 2] == weight[2, 1, 0, 1]
  assert theirs['fc.0.layer.weight'].shape == (5, 3)
  assert theirs['fc.2.layer.weight'].shape == (4, 5)


def test_names_are_those_of_the_reference():
  names = set(reference('final.'))
  names -= {name for name in names if name.endswith('num_batches_tracked')}
  settings = convert.settings(reference('final.'))
  assert set(convert.to_torch(variables(**settings))) == names


def test_settings():
  assert convert.settings(convert.to_torch(variables(**SMALL))) == SMALL
  fixed = convert.to_torch(
    variables(**SMALL | {'learn_decay': False, 'method': 'vanilla'})
  )
  expected = SMALL | {'learn_decay': False}
  del expected['num_steps']
  assert convert.settings(fixed) == expected
  assert convert.settings(reference('final.')) == {
    'planes': (8, 16, 32),
    'stage_sizes': (3, 3, 2),
    'head_width': 16,
    'num_classes': 10,
    'learn_decay': True,
    'num_steps': 2,
  }


@pytest.mark.parametrize(
  ('name', 'value', 'got'),
  [
    ('fc.2.layer.weight', None, 'nothing'),
    ('ResNetBlocks.0.0.conv1.layer.weight', None, 'nothing'),
    ('fc.0.layer.weight', np.zeros(3), r'\(3,\)'),
  ],
)
def test_settings_of_another_network(name, value, got):
  theirs = convert.to_torch(variables(**SMALL)) | {name: value}
  theirs = {name: value for name, value in theirs.items() if value is not None}
  with pytest.raises(ValueError, match=f'{name} of . axes, got {got}'):
    convert.settings(theirs)


def test_running_values_are_optional_all_of_a_kind():
  ours = variables(**SMALL, width_signal='sigma')
  theirs = convert.to_torch(ours)
  without = {
    name: array
    for name, array in theirs.items()
    if not name.endswith('running_threshold')
  }
  template = variables(seed=1, **SMALL, width_signal='sigma')
  back = convert.to_torch(convert.from_torch(without, template))
  kept = convert.to_torch(template)
  for name, array in back.items():
    source = kept if name.endswith('running_threshold') else theirs
    np.testing.assert_array_equal(array, source[name])

  theirs.pop('fc.1.neuron.running_threshold')
  with pytest.raises(ValueError, match='fc.1.neuron.running_threshold: expect'):
    convert.from_torch(theirs, template)


def test_every_missing_extra_and_misshapen_entry_is_named():
  template = variables(**SMALL)
  theirs = convert.to_torch(template)
  theirs['spare'] = np.zeros(7)
  theirs['fc.0.layer.weight'] = theirs['fc.0.layer.weight'].T
  theirs['encode.1.neuron.running_threshold'] = np.zeros(4)
  del theirs['encode.0.bn.tdBN.running_var'], theirs['fc.1.neuron.w']
  with pytest.raises(ValueError) as caught:
    convert.from_torch(theirs, template)
  head, *problems = str(caught.value).split('\n  ')
  assert head == 'The state dict does not fit the network:'
  assert sorted(problems) == [
    'encode.0.bn.tdBN.running_var: expected (2,), got nothing',
    'encode.1.neuron.running_threshold: expected (3,), got (4,)',
    'fc.0.layer.weight: expected (5, 3), got (3, 5)',
    'fc.1.neuron.w: expected (), got nothing',
    'spare: expected nothing, got (7,)',
  ]


def test_another_network_has_no_state_dict():
  ours = variables(network=VGGSNN, stages=((2,),), num_steps=3)
  with pytest.raises(ValueError, match="of a ResNet19, got 'conv0/"):
    convert.to_torch(ours)


@pytest.fixture
def config(tmp_path):
  """Of data whose labels are what the authors' network says."""
  arrays = np.load(REFERENCE)
  images, logits = arrays['eval.images'], arrays['eval.logits']
  np.savez(
    tmp_path / 'data.npz',
    x_train=np.zeros((10, *images.shape[1:])),
    y_train=np.arange(10),
    x_test=images,
    y_test=np.argmax(logits.mean(0), axis=-1),
  )
  config = digits.get_config()
  config.dataset = 'npz'
  config.data_path = str(tmp_path / 'data.npz')
  config.normalize = False
  config.validation_fraction = 0.0
  config.batch_size = 8
  return config


def test_checkpoint_there_and_back(config, tmp_path):
  theirs = reference('final.')
  np.savez(tmp_path / 'theirs.npz', **theirs)
  workdir = tmp_path / 'run'
  command.from_torch(tmp_path / 'theirs.npz', config, workdir)
  found = evaluate.evaluate(workdir)
  assert (found['accuracy'], found['step']) == (1.0, 0)
  labels = np.load(config.data_path)['y_test']
  log_p = jax.nn.log_softmax(np.load(REFERENCE)['eval.logits'].mean(0))
  expected = -0.9 * log_p[np.arange(6), labels] - 0.1 * log_p.mean(-1)
  np.testing.assert_allclose(found['loss'], expected.mean(), rtol=1e-5)

  command.to_torch(tmp_path / 'back.npz', workdir)
  back = dict(np.load(tmp_path / 'back.npz'))
  counters = [name for name in theirs if name.endswith('num_batches_tracked')]
  for name in counters:
    del theirs[name]
  chex.assert_trees_all_equal(back, theirs, strict=True)

  with pytest.raises(ValueError, match='expected a new workdir'):
    command.from_torch(tmp_path / 'theirs.npz', config, workdir)


def test_state_dict_for_other_data(config, tmp_path):
  np.savez(tmp_path / 'small.npz', **convert.to_torch(variables(**SMALL)))
  with pytest.raises(ValueError, match='expected .10, 5., got .4, 5.'):
    command.from_torch(tmp_path / 'small.npz', config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_pt_file(tmp_path):
  torch = pytest.importorskip('torch')
  theirs = reference('final.')
  tensors = {name: torch.tensor(array) for name, array in theirs.items()}
  torch.save(tensors, tmp_path / 'theirs.pt')
  chex.assert_trees_all_equal(
    command.read(tmp_path / 'theirs.pt'), theirs, strict=True
  )
  command.write(tmp_path / 'ours.pt', theirs)
  chex.assert_trees_all_equal(
    torch.load(tmp_path / 'ours.pt'), tensors, strict=True
  )


def test_pt_file_without_torch(monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(ValueError, match='expected PyTorch, .* take a .npz file'):
    command.read('theirs.pt')


def test_files_that_are_not_state_dicts(tmp_path):
  (tmp_path / 'text.npz').write_text('text')
  for name, message in (
    ('text.npz', 'expected a state dict, tensors by name, in .*text.npz, got'),
    ('none.npz', 'got FileNotFoundError'),
    ('other.bin', 'expected a .npz or .pt file, got .*other.bin'),
  ):
    with pytest.raises(ValueError, match=message):
      command.read(tmp_path / name)
  with pytest.raises(ValueError, match='expected to write .*FILE.npz, got'):
    command.write(tmp_path / 'none' / 'FILE.npz', {})
  with pytest.raises(ValueError, match='expected a run with a checkpoint in'):
    command.to_torch(tmp_path / 'FILE.npz', tmp_path)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], 'error: expected --from_torch or --to_torch, and not both\n'),
    (['--from_torch=a.npz'], 'error: expected --config, for the data and'),
    (['--from_torch=a.npz', '--config=none.py'], 'error: Configuration is not'),
  ],
)
def test_command_ends_in_one_line(flags, message, tmp_path):
  args = [sys.executable, '-m', 'train.convert', f'--workdir={tmp_path}']
  done = subprocess.run(args + flags, capture_output=True, text=True)
  assert done.returncode == 1
  assert done.stderr.startswith(message) and done.stderr.count('\n') == 1
