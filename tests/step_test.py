"""The model, the optimiser and the steps, on four devices."""

import math

import chex
import jax
import jax.numpy as jnp
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


def batch_of(size, seed=0):
  rng = np.random.default_rng(seed)
  return {
    'image': rng.integers(0, 256, (size, 8, 8, 1)).astype(np.uint8),
    'label': rng.integers(0, 3, size).astype(np.int32),
  }


def on_devices(batch):
  return next(step_lib.on_devices(iter([batch])))


# The model.


def test_unknown_models_and_attributes_are_errors():
  with pytest.raises(ValueError, match="one of .*ConvNet.*, got 'Net'"):
    step_lib.create_model(tiny.config(model='Net'), 3)
  with pytest.raises(ValueError, match='attributes of ConvNet.*got planes'):
    step_lib.create_model(tiny.config(model_args={'planes': 3}), 3)
  # It has a field of its own.
  with pytest.raises(ValueError, match='attributes of ConvNet.*got method'):
    step_lib.create_model(tiny.config(model_args={'method': 'at'}), 3)


def test_settings_reach_the_model():
  config = tiny.config(method='at', dtype='bfloat16')
  config.neuron.decay = 0.5
  model = step_lib.create_model(config, 7, 'batch')
  assert (model.num_classes, model.num_steps, model.method) == (7, 2, 'at')
  assert (model.decay, model.dtype) == (0.5, jnp.bfloat16)
  assert (model.axis_name, model.stages) == ('batch', ((4,), (4,)))


# Optimiser: what PyTorch's documentation gives as its algorithms.

LEARNING_RATE = 0.1


def torch_sgd(p, gradients, momentum=0.9, weight_decay=0.01):
  velocity = None
  for g in gradients:
    g = g + weight_decay * p
    velocity = g if velocity is None else momentum * velocity + g
    p = p - LEARNING_RATE * velocity
  return p


def torch_adamw(p, gradients, weight_decay=0.01, b1=0.9, b2=0.999, eps=1e-8):
  m = v = 0
  for t, g in enumerate(gradients, start=1):
    p = p - LEARNING_RATE * weight_decay * p
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g**2
    root = np.sqrt(v / (1 - b2**t)) + eps
    p = p - LEARNING_RATE * m / (1 - b1**t) / root
  return p


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
def test_optimizers_are_pytorchs(name):
  expected = {'sgd': torch_sgd, 'adamw': torch_adamw}[name]
  rng = np.random.default_rng(0)
  params = {'neuron': {'v_th': rng.normal(), 'w': rng.normal()}}
  params['kernel'] = rng.normal(size=(2, 3))
  gradients = [
    jax.tree.map(lambda p: rng.normal(size=np.shape(p)), params)
    for _ in range(4)
  ]
  with jax.enable_x64(True):
    optimizer = step_lib.create_optimizer(
      tiny.config(optimizer=name, weight_decay=0.01), lambda step: LEARNING_RATE
    )
    got, state = params, optimizer.init(params)
    for gradient in gradients:
      change, state = optimizer.update(gradient, state, got)
      got = jax.tree.map(jnp.add, got, change)

  def whole(path):
    return [path(gradient) for gradient in gradients]

  np.testing.assert_allclose(
    got['kernel'],
    expected(params['kernel'], whole(lambda g: g['kernel'])),
    rtol=1e-12,
  )
  np.testing.assert_allclose(
    got['neuron']['w'],
    expected(params['neuron']['w'], whole(lambda g: g['neuron']['w'])),
    rtol=1e-12,
  )
  # A learnable threshold does not decay.
  np.testing.assert_allclose(
    got['neuron']['v_th'],
    expected(
      params['neuron']['v_th'],
      whole(lambda g: g['neuron']['v_th']),
      weight_decay=0,
    ),
    rtol=1e-12,
  )


def test_gradients_are_clipped_before_the_decay_is_added():
  optimizer = step_lib.create_optimizer(
    tiny.config(grad_clip_norm=1.0, weight_decay=0.5, momentum=0.0),
    lambda _: 1.0,
  )
  params = {'kernel': jnp.array([2.0, 0.0])}
  change, _ = optimizer.update(
    {'kernel': jnp.array([30.0, 40.0])}, optimizer.init(params), params
  )
  np.testing.assert_allclose(change['kernel'], [-0.6 - 1.0, -0.8], rtol=1e-6)


@pytest.mark.parametrize('per', ['step', 'epoch'])
@pytest.mark.parametrize('warmup', [0, 1])
def test_schedule(per, warmup):
  config = tiny.config(cosine_per=per, warmup_epochs=warmup, num_epochs=4)
  schedule = step_lib.create_schedule(config, 5)
  for step in range(20):
    at = step - 5 * warmup
    if at < 0:
      expected = 0.1 * step / 5
    else:
      at = at if per == 'step' else at // 5 * 5
      expected = 0.05 * (1 + math.cos(math.pi * at / (20 - 5 * warmup)))
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-5)


# Steps.


def double(**fields):
  return tiny.config(
    dtype='float64',
    model_args={'stages': ((4,), (4,)), 'param_dtype': 'float64'},
    **fields,
  )


@pytest.mark.parametrize(
  'method, class_weights',
  [
    ('ds_atgo', None),
    pytest.param('learnable_threshold', (0.5, 1, 4), marks=pytest.mark.sample),
  ],
)
def test_four_devices_do_what_one_does(method, class_weights):
  assert jax.local_device_count() == 4
  with jax.enable_x64(True):
    config = double(method=method, class_weights=class_weights)
    first, run_step = step_lib.create_train_step(config, FACTS, 10)
    alone = jax.pmap(
      # The mapped function itself, on one device.
      run_step.__wrapped__,
      axis_name=step_lib.AXIS,
      in_axes=(None, 0),
      out_axes=None,
      devices=jax.local_devices()[:1],
    )
    host = jax.device_get(first)
    four, one = first, host
    for seed in range(3):
      batch = batch_of(8, seed)
      four, measured = run_step(four, on_devices(batch))
      one, expected = alone(one, jax.tree.map(lambda x: x[None], batch))
      chex.assert_trees_all_close(
        (four, measured), jax.device_get((one, expected)), rtol=1e-10
      )
    moved = jax.tree.map(
      lambda a, b: np.abs(a - b).max(), host.params, jax.device_get(four).params
    )
    assert min(jax.tree.leaves(moved)) > 0
    assert measured['gradient_norm'].dtype == np.float64


def test_a_step_gives_its_buffers_away_and_asks_nothing_of_the_host():
  state, run_step = step_lib.create_train_step(tiny.config(), FACTS, 10)
  batch = on_devices(batch_of(8))
  run_step = run_step.lower(state, batch).compile()
  assert 'input_output_alias' in run_step.as_text().splitlines()[0]
  for _ in range(3):
    old = state
    with jax.transfer_guard('disallow'):
      state, _ = run_step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
  assert int(state.step) == 3
  # Every device holds the state once.
  for leaf in jax.tree.leaves(state):
    assert leaf.is_fully_replicated and len(leaf.sharding.device_set) == 4


@pytest.mark.sample
@pytest.mark.parametrize(
  'frames', [False, pytest.param(True, marks=pytest.mark.sample)]
)
def test_evaluation_is_the_mean_over_the_examples(frames):
  facts = FACTS | {'example_shape': [2, 8, 8, 1] if frames else [8, 8, 1]}
  batch = batch_of(24)
  if frames:
    images = [batch['image'], batch['image'][:, ::-1]]
    batch['image'] = np.stack(images, axis=1)
  source = [
    {'image': image, 'label': label}
    for image, label in zip(batch['image'], batch['label'], strict=True)
  ][:21]
  with jax.enable_x64(True):
    config = double()
    state, run_step = step_lib.create_train_step(config, facts, 10)
    for _ in range(8):  # Until the running statistics let neurons fire.
      state, _ = run_step(state, on_devices(batch))
    run_eval = step_lib.create_eval_step(config, facts)
    (batches,) = data.eval_batches([source], config, batch_size=8)
    found = step_lib.evaluate(run_eval, step_lib.variables(state), batches)

    images = step_lib.prepare(jnp.asarray(batch['image'][:21]), 0.4, 0.3)
    logits, sown = step_lib.create_model(config, 3).apply(
      jax.device_get(step_lib.variables(state)), images, mutable=['spiking']
    )
    labels = batch['label'][:21]
    log_p = np.asarray(jax.nn.log_softmax(logits.mean(0)))
    picked = log_p[np.arange(21), labels]
  # With label smoothing, as in training.
  loss = -(0.9 * picked + 0.1 * log_p.mean(-1)).mean()
  assert found['num_examples'] == 21
  expected = np.zeros((3, 3), int)
  np.add.at(expected, (labels, log_p.argmax(-1)), 1)
  assert found['confusion'] == expected.tolist()
  assert found['accuracy'] == pytest.approx(
    np.mean(log_p.argmax(-1) == labels), rel=1e-6
  )
  assert found['loss'] == pytest.approx(loss, rel=1e-6)
  assert list(found['layers']) == ['conv0', 'conv1']
  for name, layer in found['layers'].items():
    expected = sown['spiking'][name]['neuron']
    assert set(layer) == set(step_lib.ACTIVITY)
    for key, values in layer.items():
      np.testing.assert_allclose(values, expected[key], rtol=1e-6)
    assert 0 < min(layer['firing_rate']) < 0.9


def test_layers_come_in_the_order_of_the_network():
  config = tiny.config(model_args={'stages': ((2,) * 12,)})
  state, _ = step_lib.create_train_step(config, FACTS, 10)
  run_eval = step_lib.create_eval_step(config, FACTS)
  batch = step_lib.unmasked(on_devices(batch_of(8)))
  sums = jax.eval_shape(run_eval, step_lib.variables(state), batch)
  assert list(sums['layers']) == [f'conv{i}' for i in range(12)]
