"""The training loop's parts, and whole runs inside this process."""

import collections
import contextlib
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from configs import digits
from train import checkpoints, data, loop, metrics

FACTS = {
  'num_classes': 3,
  'example_shape': [8, 8, 1],
  'mean': [0.4],
  'std': [0.3],
}


def tiny(**fields):
  """The digits' config, of a size for tests."""
  config = digits.get_config()
  config.update(
    dataset='npz',
    batch_size=8,
    num_epochs=3,
    num_steps=2,
    model_args={'stages': ((4,), (4,))},
    validation_fraction=0.25,
    log_every=2,
    warmup_epochs=0,
  )
  config.update(fields)
  return config


@pytest.fixture
def npz(tmp_path):
  """Images of three classes that can be told apart, in a file."""
  rng = np.random.default_rng(0)
  arrays = {}
  for split, count in ('train', 64), ('test', 21):
    labels = np.arange(count) % 3
    images = rng.integers(0, 120, (count, 8, 8))
    images[np.arange(count), labels * 3] += 120
    arrays |= {f'x_{split}': images.astype(np.uint8), f'y_{split}': labels}
  path = tmp_path / 'data.npz'
  np.savez(path, **arrays)
  return str(path)


def batch_of(size, seed=0):
  rng = np.random.default_rng(seed)
  return {
    'image': rng.integers(0, 256, (size, 8, 8, 1)).astype(np.uint8),
    'label': rng.integers(0, 3, size).astype(np.int32),
  }


def on_devices(batch):
  return next(loop.on_devices(iter([batch])))


# Settings.


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('loss', 'mse', r"config.loss must be one of cross_entropy, .*'mse'"),
    ('dtype', 'int8', r"config.dtype must be one of float32, .*'int8'"),
    ('select_on', 'train', r"config.select_on .* got 'train'"),
    ('cosine_per', 'day', r"config.cosine_per .* got 'day'"),
    ('num_epochs', 0, 'config.num_epochs must be positive, got 0'),
    ('batch_size', 0, 'config.batch_size must be positive, got 0'),
    ('batch_size', 6, r'multiple of the number of devices, 4, got 6'),
    ('weight_decay', -0.1, r'config.weight_decay must be 0 or more, got -0.1'),
    ('warmup_epochs', 4, r'config.warmup_epochs must be in .* 3\], got 4'),
  ],
)
def test_settings_out_of_range_are_errors(field, value, message):
  loop.check(tiny())
  with pytest.raises(ValueError, match=message):
    loop.check(tiny(**{field: value}))


@pytest.mark.parametrize('field', digits.get_config())
def test_a_missing_setting_is_an_error(field):
  config = tiny()
  del config[field]
  with pytest.raises(ValueError, match=f'expected a config with {field}, as'):
    loop.check(config)


def test_unknown_models_and_attributes_are_errors():
  with pytest.raises(ValueError, match="one of .*ConvNet.*, got 'Net'"):
    loop.create_model(tiny(model='Net'), 3)
  with pytest.raises(ValueError, match='attributes of ConvNet.*got planes'):
    loop.create_model(tiny(model_args={'planes': 3}), 3)
  # It has a field of its own.
  with pytest.raises(ValueError, match='attributes of ConvNet.*got method'):
    loop.create_model(tiny(model_args={'method': 'at'}), 3)


def test_settings_reach_the_model():
  config = tiny(method='at', dtype='bfloat16')
  config.neuron.decay = 0.5
  model = loop.create_model(config, 7, 'batch')
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
    optimizer = loop.create_optimizer(
      tiny(optimizer=name, weight_decay=0.01), lambda step: LEARNING_RATE
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
  optimizer = loop.create_optimizer(
    tiny(grad_clip_norm=1.0, weight_decay=0.5, momentum=0.0), lambda _: 1.0
  )
  params = {'kernel': jnp.array([2.0, 0.0])}
  change, _ = optimizer.update(
    {'kernel': jnp.array([30.0, 40.0])}, optimizer.init(params), params
  )
  np.testing.assert_allclose(change['kernel'], [-0.6 - 1.0, -0.8], rtol=1e-6)


@pytest.mark.parametrize('per', ['step', 'epoch'])
@pytest.mark.parametrize('warmup', [0, 1])
def test_schedule(per, warmup):
  config = tiny(cosine_per=per, warmup_epochs=warmup, num_epochs=4)
  schedule = loop.create_schedule(config, 5)
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
  return tiny(
    dtype='float64',
    model_args={'stages': ((4,), (4,)), 'param_dtype': 'float64'},
    **fields,
  )


@pytest.mark.parametrize('method', ['ds_atgo', 'learnable_threshold'])
def test_four_devices_do_what_one_does(method):
  assert jax.local_device_count() == 4
  with jax.enable_x64(True):
    config = double(method=method)
    first, run_step = loop.create_train_step(config, FACTS, 10)
    alone = jax.pmap(
      # The mapped function itself, on one device.
      run_step.__wrapped__,
      axis_name=loop.AXIS,
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
  state, run_step = loop.create_train_step(tiny(), FACTS, 10)
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


def test_metrics_are_read_after_the_next_step_was_started():
  events = []

  def run_step(state, batch):
    events.append(f'start {batch}')
    return state + 1, batch

  def read(step, measured):
    events.append(f'read {measured}')
    return step

  def run(must_stop):
    events.clear()
    return loop.run_epoch(
      run_step, 0, iter('abcdef'), range(1, 4), read, must_stop
    )

  assert run(lambda step: False) == (3, 'c', 3, False)
  assert events == [
    'start a', 'start b', 'read a', 'start c', 'read b', 'read c'
  ]  # fmt: skip
  assert run(lambda step: step == 2) == (2, 'b', 2, True)
  assert events == ['start a', 'start b', 'read a', 'read b']


@pytest.mark.parametrize('frames', [False, True])
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
    state, run_step = loop.create_train_step(config, facts, 10)
    for _ in range(8):  # Until the running statistics let neurons fire.
      state, _ = run_step(state, on_devices(batch))
    run_eval = loop.create_eval_step(config, facts)
    found = loop.evaluate(run_eval, loop.variables(state), source, config)

    images = loop.prepare(jnp.asarray(batch['image'][:21]), 0.4, 0.3)
    logits, sown = loop.create_model(config, 3).apply(
      jax.device_get(loop.variables(state)), images, mutable=['spiking']
    )
    labels = batch['label'][:21]
    log_p = np.asarray(jax.nn.log_softmax(logits.mean(0)))
    picked = log_p[np.arange(21), labels]
  # With label smoothing, as in training.
  loss = -(0.9 * picked + 0.1 * log_p.mean(-1)).mean()
  assert found['num_examples'] == 21
  assert found['accuracy'] == pytest.approx(
    np.mean(log_p.argmax(-1) == labels), rel=1e-6
  )
  assert found['loss'] == pytest.approx(loss, rel=1e-6)
  assert list(found['layers']) == ['conv0', 'conv1']
  for name, layer in found['layers'].items():
    expected = sown['spiking'][name]['neuron']
    assert set(layer) == set(loop.ACTIVITY)
    for key, values in layer.items():
      np.testing.assert_allclose(values, expected[key], rtol=1e-6)
    assert 0 < min(layer['firing_rate']) < 0.9


def test_layers_come_in_the_order_of_the_network():
  config = tiny(model_args={'stages': ((2,) * 12,)})
  state, _ = loop.create_train_step(config, FACTS, 10)
  run_eval = loop.create_eval_step(config, FACTS)
  batch = loop.unmasked(on_devices(batch_of(8)))
  sums = jax.eval_shape(run_eval, loop.variables(state), batch)
  assert list(sums['layers']) == [f'conv{i}' for i in range(12)]


def test_a_threshold_of_zero_or_less_is_warned_of_once(caplog):
  logging.use_python_logging()
  warned = set()
  layers = {'conv0': {'theta': [0.5, 1.0]}, 'conv1': {'theta': [0.5, -0.25]}}
  with caplog.at_level('WARNING'):
    for step in 10, 20:
      loop.warn_of_thresholds(layers, step, warned)
  assert caplog.messages == ['conv1 has a threshold of -0.25 at step 10']


# Whole runs.


def test_a_run_leaves_what_it_promises(npz, tmp_path):
  config = tiny(data_path=npz)
  result = loop.train(
    config, tmp_path / 'run', collections.Counter({'import': 2.0})
  )
  lines = metrics.read(tmp_path / 'run')
  # 48 examples in batches of 8; every second step and the ends of epochs.
  assert [line['step'] for line in lines] == list(range(2, 19, 2))
  epochs = [line for line in lines if 'layers' in line]
  assert [line['epoch'] for line in epochs] == [1, 2, 3]
  assert epochs[-1]['train_loss'] < epochs[0]['train_loss']
  for line in epochs:
    assert {'train_accuracy', 'validation_loss', 'images_per_second'} < set(
      line
    )
    assert set(line['layers']['conv1']) == set(loop.ACTIVITY)
    assert len(line['layers']['conv1']['theta']) == 2
  best = max(epochs, key=lambda line: line['validation_accuracy'])
  assert result == metrics.read_json(tmp_path / 'run' / 'result.json')
  assert result['best'] == {
    'step': best['step'],
    'accuracy': best['validation_accuracy'],
  }
  assert (result['step'], result['num_examples']) == (18, 21)
  assert result['selected_on'] == 'validation'
  assert list(result['seconds']) == [
    'import', 'data', 'compile', 'train', 'evaluate'
  ]  # fmt: skip
  state, info = checkpoints.restore(tmp_path / 'run')
  assert info['step'] == int(state['step']) == 18
  assert info['config']['num_steps'] == 2
  assert info['data']['num_classes'] == 3
  assert info['data']['example_shape'] == [8, 8, 1]
  dataset = data.load(config)
  assert info['data']['mean'] == dataset.mean.tolist()
  assert (
    checkpoints.restore(tmp_path / 'run', 'best')[1]['step'] == (best['step'])
  )


def test_a_finished_run_says_so_and_stops(npz, tmp_path, capsys, monkeypatch):
  config = tiny(data_path=npz, num_epochs=1)
  result = loop.train(config, tmp_path / 'run')
  assert 'finished' not in capsys.readouterr().out
  monkeypatch.setattr(data, 'load', None)
  assert loop.train(config, tmp_path / 'run') == result
  assert 'finished' in capsys.readouterr().out


def test_a_run_stopped_within_an_epoch_resumes_exactly(
  npz, tmp_path, monkeypatch
):
  config = tiny(data_path=npz)
  expected = loop.train(config, tmp_path / 'whole')

  @contextlib.contextmanager
  def stop_signal():
    yield lambda step: step == 9

  with monkeypatch.context() as patch:
    patch.setattr(loop, 'stop_signal', stop_signal)
    with pytest.raises(SystemExit, match='stopped after step 9'):
      loop.train(config, tmp_path / 'parts')
  assert checkpoints.restore(tmp_path / 'parts')[1]['totals']['steps'] == 3
  got = loop.train(config, tmp_path / 'parts')
  for result in expected, got:
    result.pop('seconds')
  assert got == expected
  whole, parts = (
    checkpoints.restore(tmp_path / name) for name in ('whole', 'parts')
  )
  chex.assert_trees_all_equal(whole[0], parts[0])
  assert whole[1] == parts[1]
  for lines in zip(
    *(metrics.read(tmp_path / name) for name in ('whole', 'parts')), strict=True
  ):
    for line in lines:
      line.pop('images_per_second', None)
    assert lines[0] == lines[1]


def test_selecting_on_the_test_split_is_labelled(npz, tmp_path):
  config = tiny(
    data_path=npz, num_epochs=1, select_on='test', validation_fraction=0.0
  )
  result = loop.train(config, tmp_path)
  assert result['selected_on'] == 'test'
  assert result['best']['accuracy'] == result['accuracy']
  line = metrics.read(tmp_path)[-1]
  assert line['test_accuracy'] == result['accuracy']
  assert 'validation_accuracy' not in line


def test_without_a_validation_part_nothing_is_best(npz, tmp_path):
  config = tiny(data_path=npz, num_epochs=1, validation_fraction=0.0)
  result = loop.train(config, tmp_path)
  assert result['best'] is result['selected_on'] is None
  (line,) = [line for line in metrics.read(tmp_path) if 'layers' in line]
  assert 0 < line['layers']['conv0']['firing_rate'][0] < 1
  assert not [name for name in line if name.startswith(('validation', 'test'))]
  assert checkpoints.restore(tmp_path, 'best') is None


@pytest.mark.parametrize(
  'field, value', [('batch_size', 16), ('num_steps', 3), ('seed', 1)]
)
def test_another_config_does_not_resume(npz, tmp_path, field, value):
  config = tiny(data_path=npz, num_epochs=1)
  loop.train(config, tmp_path)
  expected = config[field]
  config[field] = value
  with pytest.raises(
    ValueError,
    match=rf'config.{field} differs .*expected {expected}, got {value}',
  ):
    loop.train(config, tmp_path)


def test_other_data_do_not_resume(npz, tmp_path):
  loop.train(tiny(data_path=npz, num_epochs=1), tmp_path / 'run')
  (tmp_path / 'run' / 'result.json').unlink()
  arrays = dict(np.load(npz))
  arrays['x_train'] //= 2
  np.savez(tmp_path / 'other.npz', **arrays)
  config = tiny(data_path=str(tmp_path / 'other.npz'), num_epochs=1)
  with pytest.raises(ValueError, match=r'data.mean differs .*expected .*, got'):
    loop.train(config, tmp_path / 'run')


def test_a_loss_that_is_not_finite_ends_the_run(npz, tmp_path, monkeypatch):
  schedule = lambda *_: lambda step: jnp.where(step < 9, 0.1, jnp.inf)  # noqa: E731
  monkeypatch.setattr(loop, 'create_schedule', schedule)
  with pytest.raises(
    FloatingPointError, match=r'finite \w+, got (nan|inf) at step 11$'
  ):
    loop.train(tiny(data_path=npz), tmp_path)
  state, info = checkpoints.restore(tmp_path)
  assert info['step'] == 6
  chex.assert_tree_all_finite(state)
