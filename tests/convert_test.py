"""State dicts of the authors' ResNet-19, into our variables and back."""

import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsatgo_jax import convert
from dsatgo_jax.models import VGGSNN, ResNet19

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
