"""What an evaluation suffers from, in sentences."""

import math

import pytest

from train import health


def layer(firing_rate=0.2, gradient_share=0.3, num_steps=3):
  told = {'firing_rate': firing_rate, 'gradient_share': gradient_share}
  return {name: [value] * num_steps for name, value in told.items()}


def complaints(step=1000, momentum=0.9, confusion=((3, 1), (0, 4)), **layers):
  layers = layers or {'conv0': layer()}
  scores = {'loss': 1.0, 'layers': layers, 'confusion': confusion}
  return health.complaints(scores, step, momentum)


def test_all_is_well():
  assert complaints() == {}
  # A layer may be silent, or all of it fire, at some timesteps.
  quiet = {'firing_rate': [0.0, 1.0, 0.1], 'gradient_share': [0.0, 0.0, 0.1]}
  assert complaints(conv0=quiet) == {}
  # An older run has no confusions, and one without a split no loss.
  assert health.complaints({'layers': {'conv0': layer()}}, 1000) == {}


def test_dead_layers_are_named_together():
  found = complaints(
    conv0=layer(), conv1=layer(0.0), conv2=layer(1.0), conv3=layer(0.0, 0.0)
  )
  silent, always, window = found.values()
  assert list(found) == [
    'silent: conv1, conv3', 'always: conv2', 'window: conv3'
  ]  # fmt: skip
  assert silent == (
    'conv1, conv3: at all 3 timesteps, on all examples, no neuron fires, so '
    'that nothing of the input passes; try a lower config.neuron.f_c (v_th '
    'where the threshold is fixed)'
  )
  assert always.startswith('conv2: at all 3 timesteps, on all examples, every ')
  assert 'a higher config.neuron.f_c' in always
  assert 'conv3: ' in window and 'config.neuron.width' in window
  (line,) = complaints(conv0=layer(0.0, num_steps=1)).values()
  assert line.startswith('conv0: at its timestep, on all examples, no neuron')


def test_running_averages_that_lag():
  found = complaints(step=2, conv0=layer(0.0))
  assert list(found) == ['lag', 'silent: conv0']
  assert found['lag'].startswith('after 2 steps the running thresholds and ')
  # 0.9 ** 2 = 0.81; 0.9 ** 28 = 0.0523, 0.9 ** 29 = 0.0471.
  assert 'hold 81% of what they started from (momentum 0.9;' in found['lag']
  assert 'less than 5% from step 29 on' in found['lag']
  assert found['lag'].endswith('; train for more steps')
  assert found['silent: conv0'].endswith('; more steps may mend it')
  assert list(complaints(step=28)) == ['lag'] and not complaints(step=29)
  # A converted checkpoint's averages are another run's.
  assert not complaints(step=0)


@pytest.mark.parametrize(
  'momentum, slowest, until',
  # 0.99 ** 298 = 0.0500 (more), 0.99 ** 299 = 0.0495.
  [
    (None, '0.9', 'from step 29 on'),
    (0.5, '0.9', 'from step 29 on'),
    (0.99, '0.99', 'from step 299 on'),
    (1, '1', 'never'),
  ],
)
def test_the_slowest_average_counts(momentum, slowest, until):
  """Thresholds have a momentum of their own; tdBN's is 0.9."""
  line = complaints(step=10, momentum=momentum)['lag']
  assert f'(momentum {slowest}; less than 5% {until})' in line
  assert ('a lower config.neuron.momentum' in line) == ((momentum or 0) > 0.9)


def test_one_answer_for_all():
  found = complaints(confusion=[[0, 0, 3], [0, 0, 4], [0, 0, 0]])
  assert found == {
    'one answer': 'all 7 examples are taken for class 2: the accuracy is the '
    'share of that class'
  }
  # Where there are examples of one class only, this is right.
  assert complaints(confusion=[[0, 0], [0, 7]]) == {}


def test_a_loss_that_is_not_finite_is_all_that_is_said():
  scores = {'loss': math.nan, 'layers': {'conv0': layer(1.0, 0.0)}}
  assert health.complaints(scores, 1, 0.9) == {
    'loss': 'the loss is nan: the weights, the running averages or the data '
    'are not finite'
  }


def test_a_subject_is_warned_of_once(caplog):
  warned = set()
  with caplog.at_level('WARNING'):
    for step, layers in (
      (20, {'conv0': layer(0.0)}),
      (25, {'conv0': layer(0.0)}),
      (30, {'conv0': layer(0.0), 'conv1': layer(0.0)}),
      (35, {'conv0': layer(0.0), 'conv1': layer(0.0)}),
    ):
      health.warn({'layers': layers}, step, 0.9, warned)
  assert [message.split(':')[:2] for message in caplog.messages] == [
    ['step 20', ' after 20 steps the running thresholds and statistics still '
     'hold 12% of what they started from (momentum 0.9; less than 5% from step '
     '29 on)'],
    ['step 20', ' conv0'],
    ['step 30', ' conv0, conv1'],
  ]  # fmt: skip
