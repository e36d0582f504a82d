"""A run that starts from the network of another."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests import tiny
from train import checkpoints, transfer
from train import step as step_lib

FACTS = {'num_classes': 3, 'example_shape': [8, 8, 1], 'mean': [0], 'std': [1]}


def first_state(num_classes=3, **fields):
  facts = FACTS | {'num_classes': num_classes}
  return step_lib.create_train_step(tiny.config(**fields), facts, 4)[0]


def flat(state):
  tree = jax.device_get(step_lib.variables(state))
  return traverse_util.flatten_dict(tree, sep='/')


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
  """The workdir of a network whose arrays are their sizes, counted up."""
  workdir = tmp_path_factory.mktemp('theirs')
  state = jax.tree.map(
    lambda a: np.arange(a.size, dtype=a.dtype).reshape(a.shape),
    jax.device_get(first_state()),
  )
  with checkpoints.manager(workdir, 'latest') as manager:
    checkpoints.save(manager, state, {'step': 7})
  return workdir


def test_all_of_an_equal_network_is_taken(theirs, capsys):
  state = transfer.take(first_state(seed=1), theirs)
  for name, array in flat(state).items():
    assert array.ravel().tolist() == list(range(array.size)), name
  assert int(state.step) == 0  # Of the weights' run nothing else.
  out = capsys.readouterr().out
  assert out.startswith(
    f'from {theirs}, step 7: 16 arrays taken; made anew: none'
  )


def test_another_number_of_classes_gets_a_new_classifier(theirs, capsys):
  own = first_state(num_classes=5, seed=1)
  state = transfer.take(own, theirs)
  for name, array in flat(state).items():
    if name.startswith('params/classifier'):
      np.testing.assert_array_equal(array, flat(own)[name])
    else:
      assert array.ravel().tolist() == list(range(array.size))
  out = capsys.readouterr().out
  assert (
    'made anew: params/classifier/bias (5,), params/classifier/kernel' in out
  )


@pytest.mark.parametrize('num_steps, expected', [(4, [0, 1, 1, 1]), (1, [0])])
def test_running_thresholds_of_another_number_of_timesteps(
  theirs, num_steps, expected
):
  state = transfer.take(first_state(num_steps=num_steps), theirs)
  found = flat(state)['batch_stats/conv1/neuron/running_threshold']
  assert found.tolist() == expected


def test_another_method_takes_what_it_has_too(theirs, capsys):
  state = transfer.take(first_state(method='vanilla'), theirs)
  assert flat(state)['params/conv1/layer/kernel'].max() > 100
  out = capsys.readouterr().out
  assert 'left out: batch_stats/conv0/neuron/running_threshold, ' in out


def test_a_network_of_which_nothing_fits_is_an_error(theirs):
  state = first_state()
  other = state.replace(params={'w': np.zeros(3)}, batch_stats={})
  with pytest.raises(
    ValueError, match='network like that of this run in .* got'
  ):
    transfer.take(other, theirs)
