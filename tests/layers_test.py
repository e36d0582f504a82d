"""A trained layer over another number of timesteps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsatgo_jax import linen as snn
from dsatgo_jax import neurons
from dsatgo_jax import nnx as snnx

equal = chex.assert_trees_all_equal
KEPT = jnp.array([0.5, 1.0, 1.5])


def normal(*shape, seed=0):
  x = np.random.default_rng(seed).normal(0.6, 1, shape)
  return jnp.asarray(x, jnp.float32)


def linen(num_steps=3, **settings):
  """`call(x, inference, **kwargs)` of a layer trained with T = 3."""
  neuron = snn.SpikingNeuron(num_steps=num_steps, **settings)
  variables = {
    'params': {'w': jnp.float32(neurons.logit(0.2))},
    'batch_stats': {'running_threshold': KEPT},
  }

  def call(x, inference, variables=variables, **kwargs):
    y, updates = neuron.apply(
      variables, x, inference, mutable=['batch_stats'], **kwargs
    )
    return y, (variables | updates)['batch_stats']['running_threshold']

  return call, variables


def of_nnx(**settings):
  def call(x, inference, **kwargs):
    neuron = snnx.SpikingNeuron(num_steps=3, **settings)
    neuron.running_threshold[...] = KEPT
    y = neuron(x, inference, **kwargs)
    return y, neuron.running_threshold[...]

  return call


faces = pytest.mark.parametrize(
  'face', [lambda **settings: linen(**settings)[0], of_nnx]
)


@pytest.mark.sample
@faces
@pytest.mark.parametrize('num_steps', [1, 5])
def test_held_over_another_number_of_timesteps(face, num_steps):
  x = normal(num_steps, 4, 3)
  held = neurons.Running(KEPT[np.minimum(np.arange(num_steps), 2)])
  expected, state, _ = neurons.run(x, running=held)
  hold = face(beyond='hold')
  equal(hold(x, True)[0], expected)
  first, middle = hold(x[:1], True, state=neurons.at_rest(x[0]),
                       return_state=True)[0]  # fmt: skip
  if num_steps > 1:
    rest, last = hold(x[1:], True, state=middle, return_state=True)[0]
    equal((jnp.concatenate([first, rest]), last), (expected, state))
  # In training those that there are learn.
  spikes, new = hold(x, False)
  _, _, record = neurons.run(x)
  known = min(num_steps, 3)
  learnt = 0.9 * KEPT[:known] + 0.1 * record.theta[:known]
  np.testing.assert_allclose(new, [*learnt, *KEPT[known:]], rtol=1e-6)
  equal(spikes, neurons.run(x)[0])


@faces
def test_an_error_tells_of_the_ways_out(face):
  ways = r"beyond='hold' .* resize_time\(variables, num_steps\)"
  for num_steps in 2, 4:
    with pytest.raises(ValueError, match=ways):
      face()(normal(num_steps, 4, 3), True)
  with pytest.raises(ValueError, match="'error' or 'hold', got beyond='stop'"):
    face(beyond='stop')(normal(3, 4, 3), True)


@pytest.mark.parametrize('num_steps', [1, 5])
def test_variables_of_another_number_of_timesteps(num_steps):
  x = normal(num_steps, 4, 3)
  expected, _ = linen(beyond='hold')[0](x, True)
  call, variables = linen(num_steps)
  resized = snn.resize_time(variables, num_steps)
  equal(call(x, True, resized)[0], expected)
  module = snnx.SpikingNeuron(num_steps=3)
  module.running_threshold[...] = KEPT
  nnx.update(module, snnx.resize_time(nnx.state(module), num_steps))
  equal(module(x, True), expected)
  with pytest.raises(ValueError, match='num_steps >= 1, got num_steps=0'):
    snn.resize_time(variables, 0)


def test_an_rnn_over_another_number_of_timesteps():
  x = normal(5, 4, 3)
  expected, _ = linen(beyond='hold')[0](x, True)
  cell = snn.SpikingCell(use_running_average=True)
  rnn = snn.nn.RNN(cell, time_major=True, variable_axes={'batch_stats': 0})
  variables = {name: {'cell': tree} for name, tree in linen()[1].items()}
  with pytest.raises(ValueError, match='T = 3 .*RNN over 5. resize_time'):
    rnn.apply(variables, x)
  equal(rnn.apply(snn.resize_time(variables, 5), x), expected)


def test_a_cell_holds_its_last_threshold():
  x = normal(5, 4, 3)
  expected, _ = linen(beyond='hold')[0](x, True)
  settings = {'num_steps': 3, 'use_running_average': True}

  def rnn(**more):
    cell = snnx.SpikingCell(**settings, **more)
    cell.running_threshold[...] = KEPT
    return nnx.RNN(cell, time_major=True, rngs=nnx.Rngs(0))

  equal(rnn(beyond='hold')(x), expected)
  with pytest.raises(ValueError, match=r"RNN over 5.*beyond='hold'.*resize_"):
    rnn()(x)


def test_examples_at_different_timesteps_hold_no_threshold():
  cell = snnx.SpikingCell(num_steps=3, beyond='hold', use_running_average=True)
  carry = cell.initialize_carry((2, 3))._replace(t=jnp.array([0, 4]))
  _, spikes = jax.jit(lambda carry, x: cell(carry, x))(carry, normal(2, 3))
  assert jnp.isnan(spikes).all()
