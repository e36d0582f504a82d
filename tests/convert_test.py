"""State dicts of the authors' ResNet-19, into our variables and back."""

import pathlib
import pickle
import subprocess
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from configs import digits
from dsatgo_jax import convert
from dsatgo_jax.models import VGGSNN, ResNet19
from train import checkpoints, evaluate, lock, loop
from train import convert as command

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


@pytest.mark.parametrize(
  ('name', 'array', 'message'),
  [
    ('fc.0.layer.weight', np.zeros((0, 3)), r'of 2 axes, got \(0, 3\)'),
    ('encode.1.neuron.running_threshold', np.float32(1), r'1 axes, got \(\)'),
    ('fc.2.layer.weight', np.full((4, 5), 'text'), '64 bits, got <U4'),
    ('fc.2.layer.weight', np.ones((4, 5), complex), '64 bits, got complex'),
    ('fc.2.layer.weight', np.zeros((4, 5), 'V3'), r'64 bits, got \|V3'),
    ('fc.2.layer.weight', np.ones((4, 5), 'g'), '64 bits, got float128'),
    ('fc.2.layer.weight', np.full((4, 5), None), '64 bits, got object'),
  ],
)
def test_arrays_that_are_no_weights(name, array, message):
  theirs = {**convert.to_torch(variables(**SMALL)), name: array}
  with pytest.raises(ValueError, match=f'{name}.* {message}'):
    convert.settings(theirs)
    convert.from_torch(theirs, variables(**SMALL))


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


@pytest.mark.parametrize(
  'prefix', ['module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.']
)
@pytest.mark.parametrize('where', ['', 'state_dict', 'model', 'net', 'both'])
def test_wrapped_state_dicts_are_read(prefix, where):
  ours = variables(**SMALL)
  theirs = {prefix + k: v for k, v in convert.to_torch(ours).items()}
  theirs['n_averaged'] = np.int64(3)
  if where == 'both':
    theirs = {'net': {'model_state_dict': theirs}, 'epoch': 3}
  elif where:
    theirs = {where: theirs, 'optimizer': {'state': {}}, 'accuracy': 0.5}
  assert convert.settings(theirs) == SMALL
  back = convert.from_torch(theirs, variables(seed=1, **SMALL))
  chex.assert_trees_all_equal(back, ours, strict=True)


def test_compiled_parts_are_read():
  ours = variables(**SMALL)
  theirs = {
    name.replace('Blocks.1.', 'Blocks.1._orig_mod.'): array
    for name, array in convert.to_torch(ours).items()
  }
  back = convert.from_torch(theirs, variables(seed=1, **SMALL))
  chex.assert_trees_all_equal(back, ours, strict=True)


def test_two_entries_of_one_name_are_an_error():
  with pytest.raises(ValueError, match='Expected one a.b in .*, got two'):
    convert.unwrap({'a.b': 1, 'module.a.b': 2})


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value):
  template = variables(**SMALL)
  theirs = convert.to_torch(template)
  theirs['fc.0.layer.weight'] = np.full((5, 3), value, np.float32)
  theirs['fc.1.neuron.w'] = np.float32(value)
  with pytest.raises(ValueError) as caught:
    convert.from_torch(theirs, template)
  message = str(caught.value)
  assert 'finite weights' in message and '\n' not in message
  assert f'in 2 of {len(theirs)} entries' in message
  assert 'fc.' in message


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
  config.watch_every = 0
  return config


@pytest.mark.sample
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
  assert checkpoints.restore(tmp_path / 'run') is None


def test_a_workdir_in_use_or_unwritable_ends_before_the_file(config, tmp_path):
  with lock.hold(tmp_path / 'run'):
    with pytest.raises(ValueError, match='run is in use by process'):
      command.from_torch('none.npz', config, tmp_path / 'run')
  (tmp_path / 'file').touch()
  with pytest.raises(ValueError, match='can be written, got .*file'):
    command.from_torch('none.npz', config, tmp_path / 'file')


@pytest.mark.parametrize(
  'method', ['ds_atgo', pytest.param('vanilla', marks=pytest.mark.sample)]
)
@pytest.mark.parametrize('running', [False, True])
def test_running_thresholds_that_are_missing_are_warned_of(
  config, tmp_path, caplog, method, running
):
  theirs = reference('final.')
  keep = running and method == 'ds_atgo'
  theirs = {
    f'module.{name}': array
    for name, array in theirs.items()
    if keep or not name.endswith('running_threshold')
  }
  np.savez(tmp_path / 'theirs.npz', **theirs)
  config.update(method=method, num_steps=2)
  logging.use_python_logging()
  with caplog.at_level('WARNING'):
    command.from_torch(tmp_path / 'theirs.npz', config, tmp_path / 'run')
  told = [
    text for text in caplog.messages if 'has no running_threshold' in text
  ]
  assert len(told) == (not running and method == 'ds_atgo')
  for text in told:
    assert 'v_th = 1' in text and 'train.main' in text and '\n' not in text


@pytest.mark.sample
def test_train_goes_on_and_measures_the_thresholds(config, tmp_path):
  theirs = reference('final.')
  kinds = 'running_threshold'
  np.savez(
    tmp_path / 'theirs.npz',
    **{name: a for name, a in theirs.items() if not name.endswith(kinds)},
  )
  config.update(num_steps=2, learning_rate=1e-9, num_epochs=8, warmup_epochs=0)
  command.from_torch(tmp_path / 'theirs.npz', config, tmp_path / 'run')
  before, _ = checkpoints.restore(tmp_path / 'run')
  loop.train(config, tmp_path / 'run')
  after, info = checkpoints.restore(tmp_path / 'run')
  assert info['step'] == 8
  chex.assert_trees_all_close(before['params'], after['params'], atol=1e-6)
  threshold = after['batch_stats']['encode']['neuron']['running_threshold']
  assert (
    before['batch_stats']['encode']['neuron']['running_threshold'] == 1
  ).all()
  assert (np.abs(threshold - 1) > 0.1).all()


def test_attributes_that_the_state_dict_does_not_tell_are_kept(
  config, tmp_path
):
  np.savez(tmp_path / 'theirs.npz', **reference('final.'))
  config.model, config.model_args = 'ResNet19', {'alpha': 0.5, 'planes': (3,)}
  command.from_torch(tmp_path / 'theirs.npz', config, tmp_path / 'run')
  assert config.model_args.to_dict() == {
    'alpha': 0.5,
    'planes': (8, 16, 32),
    'head_width': 16,
  }


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


class Tensor:
  """What `torch.load` gives, as far as it is used."""

  def __init__(self, array, dtype='float32', grad=False):
    self.array, self.dtype, self.grad = array, dtype, grad

  def detach(self):
    """Returns it without what autograd knows."""
    return Tensor(self.array, self.dtype)

  def float(self):
    """Returns it in float32."""
    return Tensor(np.float32(self.array), 'float32', self.grad)

  def numpy(self):
    """Returns its array, or says what PyTorch says."""
    if self.grad:
      raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
    if self.dtype == 'bfloat16':
      raise TypeError('Got unsupported ScalarType BFloat16')
    return self.array

  def numel(self):
    """Returns how many elements it has."""
    return self.array.size

  def element_size(self):
    """Returns how many bytes each of them has."""
    return self.array.itemsize


def fake_torch(monkeypatch, path, found):
  """Puts in PyTorch's place what loads `found`, or raises it."""
  path.write_bytes(bytes(1000))

  def load(path, map_location, weights_only):
    assert map_location == 'cpu' and weights_only is True
    if isinstance(found, Exception):
      raise found
    return found

  monkeypatch.setitem(sys.modules, 'torch', types.SimpleNamespace(load=load))


def test_tensors_of_a_pt_file(monkeypatch, tmp_path):
  array = np.arange(3, dtype=np.float32)
  state_dict = {
    'plain': Tensor(array),
    'trained': Tensor(array, grad=True),
    'half': Tensor(array, 'bfloat16', grad=True),
  }
  path = tmp_path / 'theirs.pt'
  named = {f'module.{name}': tensor for name, tensor in state_dict.items()}
  fake_torch(monkeypatch, path, {'model': named})
  found = command.read(path)
  chex.assert_trees_all_equal(
    found, dict.fromkeys(state_dict, array), strict=True
  )


def test_a_whole_module_is_one_clear_line(monkeypatch, tmp_path):
  path = tmp_path / 'theirs.pt'
  error = pickle.UnpicklingError('Weights only load failed.\n\nMany lines.')
  fake_torch(monkeypatch, path, error)
  with pytest.raises(
    ValueError, match='such as a whole network: save '
  ) as caught:
    command.read(path)
  message = str(caught.value)
  assert message.startswith(
    f'expected a state dict, tensors by name, in {path}'
  )
  assert 'network.state_dict()' in message and '\n' not in message
  fake_torch(monkeypatch, path, [1, 2])
  with pytest.raises(ValueError, match='expected a state dict, .* got'):
    command.read(path)


def test_bfloat16_comes_and_goes_as_float32(tmp_path):
  half = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
  command.write(tmp_path / 'ours.npz', {'half': np.asarray(half)})
  (found,) = np.load(tmp_path / 'ours.npz').values()
  np.testing.assert_array_equal(found, np.float32(half), strict=True)
  np.savez(tmp_path / 'raw.npz', half=np.asarray(half))
  (found,) = command.read(tmp_path / 'raw.npz').values()
  np.testing.assert_array_equal(found, np.asarray(half), strict=True)


def test_pt_file_without_torch(monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(ValueError, match='expected PyTorch, .* take a .npz file'):
    command.read('theirs.pt')


def test_files_that_are_not_state_dicts(tmp_path):
  (tmp_path / 'text.npz').write_text('text')
  for name, message in (
    ('text.npz', 'expected a state dict, tensors by name, in .*text.npz, got'),
    ('none.npz', 'got .*: FileNotFoundError'),
    ('other.bin', 'expected a .npz or .pt file, got .*other.bin'),
  ):
    with pytest.raises(ValueError, match=message):
      command.read(tmp_path / name)
  with pytest.raises(ValueError, match='expected to write .*FILE.npz, got'):
    command.write(tmp_path / 'none' / 'FILE.npz', {})
  with pytest.raises(
    ValueError, match='expected a run with a latest checkpoint in'
  ):
    command.to_torch(tmp_path / 'FILE.npz', tmp_path)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], 'error: expected --from_torch or --to_torch, and not both\n'),
    pytest.param(
      ['--from_torch=a.npz'],
      'error: expected --config, for the data and',
      marks=pytest.mark.sample,
    ),
    pytest.param(
      ['--from_torch=a.npz', '--config=none.py'],
      'error: Configuration is not',
      marks=pytest.mark.sample,
    ),
  ],
)
def test_command_ends_in_one_line(flags, message, tmp_path):
  args = [sys.executable, '-m', 'train.convert', f'--workdir={tmp_path}']
  done = subprocess.run(args + flags, capture_output=True, text=True)
  assert done.returncode == 1
  assert done.stderr.startswith(message) and done.stderr.count('\n') == 1
