"""One, two and four devices are the same run, and the same evaluation."""

import functools

import chex
import jax
import numpy as np
import pytest

from tests import tiny
from train import data
from train import step as step_lib

FACTS = {
  'num_classes': 3,
  'example_shape': [8, 8, 1],
  'mean': [0.4],
  'std': [0.3],
}
STEPS = 20
EXAMPLES = 43  # A prime: no batch and no device has its share.


def images_of(size, seed):
  rng = np.random.default_rng(seed)
  return {
    'image': rng.integers(0, 256, (size, 8, 8, 1)).astype(np.uint8),
    'label': rng.integers(0, 3, size).astype(np.int32),
  }


def spread(batch, devices):
  """A batch, with a part of it for each of so many devices."""
  return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)


def run(devices):
  """Twenty steps and an evaluation on so many of the devices."""
  devices = jax.local_devices()[:devices]
  config = tiny.config(
    dtype='float64',
    num_epochs=4,
    warmup_epochs=1,
    model_args={'stages': ((4,), (4,)), 'param_dtype': 'float64'},
  )
  state, run_step = step_lib.create_train_step(config, FACTS, 5, devices)
  state, measured = jax.device_get(state), []
  for step in range(STEPS):
    state, told = run_step(state, spread(images_of(8, step), len(devices)))
    measured.append(jax.device_get(told))
  run_eval = jax.pmap(
    # The mapped function itself, on these devices.
    step_lib.create_eval_step(config, FACTS).__wrapped__,
    axis_name=step_lib.AXIS,
    in_axes=(None, 0),
    out_axes=None,
    devices=devices,
  )
  images = images_of(EXAMPLES, STEPS)
  source = [{name: images[name][i] for name in images} for i in range(EXAMPLES)]
  (batches,) = data.eval_batches([source], config, batch_size=8)
  found = step_lib.average(
    map(
      functools.partial(run_eval, jax.device_get(step_lib.variables(state))),
      (spread(batch, len(devices)) for batch in batches),
    )
  )
  return jax.device_get(state), measured, found


@pytest.mark.sample
def test_one_two_and_four_devices_are_the_same_run():
  with jax.enable_x64(True):
    one, two, four = (run(devices) for devices in (1, 2, 4))
  state, measured, found = one
  assert state.step == STEPS and found['num_examples'] == EXAMPLES
  assert state.params['conv0']['layer']['kernel'].dtype == np.float64
  assert measured[-1]['loss'] != measured[0]['loss']
  assert 0 < min(found['layers']['conv1']['firing_rate'])
  for several in two, four:
    chex.assert_trees_all_close(several[:2], one[:2], rtol=1e-9)
    chex.assert_trees_all_close(several[2], found, rtol=1e-9)
    assert several[2]['accuracy'] == found['accuracy']  # Counts.
