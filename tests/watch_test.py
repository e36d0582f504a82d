"""Watched steps: what is measured and written, and that the run is the same."""

import json
import struct

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from dsatgo_jax import statistics
from dsatgo_jax.analysis import activity, flow
from tests import tiny
from tests.step_test import FACTS, batch_of, double, on_devices
from train import checkpoints, loop, metrics, watch
from train import step as step_lib

# What is measured.


def short(layers):
  return {name.removesuffix('/neuron'): one for name, one in layers.items()}


@pytest.mark.sample
@pytest.mark.parametrize(
  'train', [False, pytest.param(True, marks=pytest.mark.sample)]
)
def test_four_devices_measure_what_the_library_does_of_the_whole_batch(train):
  batch = batch_of(8)
  with jax.enable_x64(True):
    config = double()
    state, run_step = step_lib.create_train_step(config, FACTS, 10)
    for seed in range(8):  # Until the running thresholds let neurons fire.
      state, _ = run_step(state, on_devices(batch_of(8, seed)))
    variables = step_lib.variables(jax.device_get(state))
    run_watch = watch.create_watch_step(config, FACTS, train)
    found = jax.device_get(run_watch(variables, on_devices(batch)))
    _, measured = run_step(state, on_devices(batch))

    model = step_lib.create_model(config, 3)
    images = jax.jit(step_lib.prepare)(
      batch['image'], np.float32([0.4]), np.float32([0.3])
    )
    zeros = flow.zeros(model, variables, images, train=train)

    def loss(params, zeros):
      logits, told = model.apply(
        variables | zeros | {'params': params}, images, train=train,
        mutable=['batch_stats', 'spiking', 'histograms'],
      )  # fmt: skip
      smoothed = 0.9 * jax.nn.one_hot(batch['label'], 3) + 0.1 / 3
      log_p = jax.nn.log_softmax(logits.mean(0))
      return -(smoothed * log_p).sum(-1).mean(), told

    (params, probes), told = jax.grad(loss, (0, 1), has_aux=True)(
      variables['params'], zeros
    )
    expected = {
      'activity': short(activity.by_layer(told['spiking'])),
      'flow': short(flow.summary(probes['flow'])),
      'histograms': {
        name: one['membrane']
        for name, one in short(activity.by_layer(told['histograms'])).items()
      },
      'gradient_norm': {
        'conv1/layer/kernel': np.linalg.norm(params['conv1']['layer']['kernel'])
      },
    }
  norms = found['gradient_norm']
  assert len(norms) == len(jax.tree.leaves(params))
  if train:  # The norm that the step itself tells of.
    total = np.linalg.norm(list(norms.values()))
    np.testing.assert_allclose(total, measured['gradient_norm'], rtol=1e-9)
  found['gradient_norm'] = {
    'conv1/layer/kernel': norms['conv1/layer/kernel'].item()
  }
  plain = {name: dict(tree) for name, tree in found.items()}
  chex.assert_trees_all_close(plain, expected, rtol=1e-9, atol=1e-15)
  assert found['flow']['conv0']['u'].min() > 0


def test_layers_come_in_the_order_of_the_network():
  config = tiny.config(model_args={'stages': ((2,) * 12,)})
  state, _ = step_lib.create_train_step(config, FACTS, 10)
  run_watch = watch.create_watch_step(config, FACTS)
  shapes = jax.eval_shape(
    run_watch, step_lib.variables(state), on_devices(batch_of(8))
  )
  for name in ('activity', 'flow', 'histograms'):
    assert list(shapes[name]) == [f'conv{i}' for i in range(12)]


def test_a_gpu_could_run_it():
  config = tiny.config(dtype='bfloat16')
  state, _ = step_lib.create_train_step(config, FACTS, 10)
  batch = step_lib.unmasked(on_devices(batch_of(8)))
  for step in (
    watch.create_watch_step(config, FACTS),
    watch.create_energy_step(config, FACTS),
  ):
    lower = jax.export.export(jax.jit(step), platforms=['cuda'])
    exported = lower(step_lib.variables(state), batch)
    assert exported.platforms == ('cuda',) and exported.nr_devices == 4


def test_norms_of_faint_and_of_missing_gradients():
  for values in ([3e-30, 4e-30], [0.0, 0.0], [3e30, 4e30]):
    np.testing.assert_allclose(
      watch._norm(jnp.array(values)), np.hypot(*values), rtol=1e-6
    )
  assert np.isnan(watch._norm(jnp.array([np.nan, 1.0])))


def test_the_first_step_is_watched_and_every_nth():
  config = tiny.config(watch_every=5)
  steps = [step for step in range(1, 17) if watch.is_due(config, step)]
  assert steps == [1, 5, 10, 15]
  assert not any(watch.is_due(tiny.config(), step) for step in range(1, 17))


# What is written.


def test_numbers_of_json():
  tree = {
    'a': np.array([[1 / 3, np.nan], [np.inf, 0]]), 'b': {'c': np.float32(2)}
  }  # fmt: skip
  found = metrics.numbers(tree)
  assert found == {'a': [[0.333333, None], [None, 0.0]], 'b': {'c': 2.0}}
  assert metrics.numbers(found) == found
  half = metrics.numbers(jnp.array([0.5], jnp.bfloat16))
  assert half == [0.5] and isinstance(half[0], float)


def test_shares_of_paths():
  layer = {'spatial': [3.0, 4.0], 'leak': [4.0, 0.0], 'reset': [1.0, 0.0]}
  found = metrics.path_shares(layer)
  assert found == {'spatial': 0.5, 'leak': 0.4, 'reset': 0.1}
  for values in [0.0, 0.0], [1.0, None]:
    found = metrics.path_shares(dict.fromkeys(layer, values))
    assert np.isnan(list(found.values())).all()


def events(workdir):
  """What TensorBoard reads: `{(tag, step): value}`."""
  found = {}
  for path in sorted((workdir / 'tensorboard').iterdir()):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack('<Q', content[:8])
      event = event_pb2.Event.FromString(content[12 : 12 + length])
      content = content[16 + length :]
      for value in event.summary.value:
        assert (value.tag, event.step) not in found
        found[value.tag, event.step] = value
  return found


def test_tensorboard_has_histograms_of_membranes(tmp_path):
  u = np.array([-9.0, -3.99, 0.01, 0.02, 0.99, 3.99, 4.5, 7.0])
  shares = statistics.histogram(jnp.float32(u)[:, None])
  watched = {
    'activity': {'conv0': {'theta': [1.0, 1.5], 'silent_share': 0.25}},
    'flow': {'conv0': {'cosine_spatial_leak': [0.5, np.nan]}},
    'histograms': {'conv0': np.stack([shares, shares])},
    'gradient_norm': {'conv0/layer/kernel': np.float32(np.inf)},
  }
  with metrics.writer(tmp_path, 0) as write:
    write({'step': 3, 'epoch': 0.5, 'watch': metrics.numbers(watched)})
  (line,) = metrics.read(tmp_path)
  assert line['watch']['flow']['conv0']['cosine_spatial_leak'] == [0.5, None]
  found = events(tmp_path)
  assert {tag for tag, _ in found} == {
    'watch/activity/conv0/theta/t1',
    'watch/activity/conv0/theta/t2',
    'watch/activity/conv0/silent_share',
    'watch/flow/conv0/cosine_spatial_leak/t1',
    'watch/membrane/conv0/t1',
    'watch/membrane/conv0/t2',
  }
  histogram = found['watch/membrane/conv0/t2', 3].histo
  limits = np.array(histogram.bucket_limit)
  percent = np.array(histogram.bucket)
  # Right edges of the bins, the first of which begins at `min`.
  left = np.append(histogram.min, limits[:-1])
  np.testing.assert_allclose(limits - left, 0.125)
  assert histogram.max == limits[-1] and len(limits) == len(percent) == 66
  where = [np.flatnonzero((left <= x) & (x < limits)) for x in u[1:6]]
  expected = np.zeros(66)
  for i in (0, 65, 65, *np.ravel(where)):
    expected[i] += 12.5
  np.testing.assert_allclose(percent, expected, rtol=1e-5)
  assert histogram.num == pytest.approx(100, rel=1e-5)
  mean = histogram.sum / histogram.num
  clipped = np.clip(u, -4.0625, 4.0625)
  assert mean == pytest.approx(clipped.mean(), abs=0.0625)
  deviation = np.sqrt(histogram.sum_squares / histogram.num - mean**2)
  assert deviation == pytest.approx(clipped.std(), abs=0.0625)


# Whole runs.


def strict(workdir):
  """The lines of a run, of JSON as the standard has it."""

  def refuse(name):
    raise AssertionError(name)

  return [
    json.loads(line, parse_constant=refuse)
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'data.npz'
  return tiny.save(path, train=64, test=21)


@pytest.fixture(scope='module')
def plain(npz, tmp_path_factory):
  """The workdir of a run that nobody watched."""
  workdir = tmp_path_factory.mktemp('plain')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(watch, 'create_watch_step', None)  # It would be missed.
    loop.train(tiny.config(data_path=npz), workdir)
  return workdir


@pytest.mark.sample
def test_a_watched_run_is_the_same_run(npz, plain, tmp_path, monkeypatch):
  config = tiny.config(data_path=npz, watch_every=4)
  with monkeypatch.context() as patch:
    tiny.stop_after(9, patch)
    with pytest.raises(SystemExit):
      loop.train(config, tmp_path)
  # Killed after it had watched a step that no checkpoint knows of.
  with metrics.writer(tmp_path, 9) as write:
    write({'step': 12, 'epoch': 2.0, 'watch': {'histograms': {}}})
  loop.train(config, tmp_path)

  expected, found = (checkpoints.restore(d)[0] for d in (plain, tmp_path))
  chex.assert_trees_all_equal(found, expected)
  lines = strict(tmp_path)
  watched = [line for line in lines if 'watch' in line]
  assert [line['step'] for line in watched] == [1, 4, 8, 12, 16]
  assert [line for line in lines if 'watch' not in line] == strict(plain)
  for line in watched:
    assert line['epoch'] == line['step'] / 6
    layer = line['watch']['flow']['conv0']
    assert layer['u'][0] > 0 and layer['cosine_spatial_leak'][1] is None
    assert np.sum(line['watch']['histograms']['conv1'][1]) == pytest.approx(1)
  # The gradient is that of the step with that number.
  norms = {
    line['step']: line['gradient_norm'] for line in lines if 'loss' in line
  }
  for line in watched[1:]:
    total = np.linalg.norm(list(line['watch']['gradient_norm'].values()))
    assert total == pytest.approx(norms[line['step']], rel=1e-4)
  assert watched[-1]['watch']['gradient_norm'].keys() >= {
    'conv0/layer/kernel', 'conv1/neuron/w', 'classifier/bias'
  }  # fmt: skip


def test_watching_may_begin_and_end_within_a_run(npz, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    tiny.stop_after(9, patch)
    with pytest.raises(SystemExit):
      loop.train(tiny.config(data_path=npz), tmp_path)
  loop.train(tiny.config(data_path=npz, watch_every=6), tmp_path)
  steps = [line['step'] for line in strict(tmp_path) if 'watch' in line]
  assert steps == [12, 18]


def test_a_step_that_ends_the_run_is_watched(npz, tmp_path, monkeypatch):
  schedule = lambda *_: lambda step: jnp.where(step < 9, 0.1, jnp.inf)  # noqa: E731
  monkeypatch.setattr(step_lib, 'create_schedule', schedule)
  with pytest.raises(FloatingPointError, match='at step 10'):
    loop.train(tiny.config(data_path=npz, watch_every=10), tmp_path)
  last = [line for line in metrics.read(tmp_path) if 'watch' in line][-1]
  assert last['step'] == 10
  assert last['watch']['gradient_norm']['classifier/bias'] > 0
