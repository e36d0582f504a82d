"""The Linen modules: what a user of Flax's BatchNorm and RNN expects."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training import train_state

from dsatgo_jax import linen as snn
from dsatgo_jax import losses, methods, neurons, surrogate
from dsatgo_jax.methods import METHODS

close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
NO_SCALE = [name for name in METHODS if name != 'mpd_agl']


def normal(*shape, seed=0):
  x = np.random.default_rng(seed).normal(0.3, 1, shape)
  return jnp.asarray(x, jnp.float32)


def train(neuron, variables, x, **kwargs):
  """Output, and the variables after a training step."""
  y, updates = neuron.apply(
    variables, x, False, mutable=['batch_stats'], **kwargs
  )
  return y, variables | updates


def trained(neuron, x, steps=3):
  """Variables with running values that differ by timestep."""
  variables = neuron.init(jax.random.key(0), x, False)
  for _ in range(steps):
    _, variables = train(neuron, variables, x)
  return variables


class Net(nn.Module):
  """As in the package's documentation."""

  method: str = 'ds_atgo'

  @nn.compact
  def __call__(self, x, train: bool):
    """Images [B, H, W, C] to logits [T, B, K]."""
    x = snn.repeat_in_time(x, num_steps=4)
    x = snn.Conv(8, (3, 3), use_bias=False)(x)
    x = snn.TdBatchNorm(use_running_average=not train)(x)
    x = snn.SpikingNeuron(self.method, use_running_average=not train)(x)
    x = snn.avg_pool(x, (2, 2), strides=(2, 2))
    return snn.Dense(3)(x.reshape(*x.shape[:2], -1))


# A training loop as users have it for batch norm: nothing in it knows spikes.


class TrainState(train_state.TrainState):
  """Of Flax's ImageNet example."""

  batch_stats: dict


@jax.jit
def train_step(state, images, labels):
  def loss_fn(params):
    logits, updates = state.apply_fn(
      {'params': params, 'batch_stats': state.batch_stats},
      images,
      train=True,
      mutable=['batch_stats'],
    )
    return jnp.mean(losses.cross_entropy(logits, labels)), updates

  (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(
    state.params
  )
  state = state.apply_gradients(grads=grads)
  return state.replace(batch_stats=updates['batch_stats']), loss


@pytest.mark.parametrize('method', ['ds_atgo', 'tgo', 'learnable_threshold'])
def test_a_loop_for_batch_norm_trains_the_neuron(method):
  labels = jnp.arange(24) % 3
  images = normal(24, 4, 4, 1) + labels[:, None, None, None] - 1
  net = Net(method)
  variables = net.init(jax.random.key(0), images, train=False)
  assert variables.keys() == {'params', 'batch_stats'}
  state = TrainState.create(
    apply_fn=net.apply, tx=optax.sgd(0.1, momentum=0.9), **variables
  )
  _, first = train_step(state, images, labels)
  for _ in range(30):
    state, loss = train_step(state, images, labels)
  assert loss < 0.3 * first

  neuron = state.params['SpikingNeuron_0']
  assert neuron['w'] != variables['params']['SpikingNeuron_0']['w']
  if method == 'learnable_threshold':
    assert neuron['v_th'] != 1
    assert 'SpikingNeuron_0' not in state.batch_stats
  else:
    (kept,) = state.batch_stats['SpikingNeuron_0'].values()
    assert kept.shape == (4,) and (abs(kept - 1) > 0.01).all()
  logits = net.apply(
    {'params': state.params, 'batch_stats': state.batch_stats},
    images,
    train=False,
  )
  assert jnp.mean(losses.prediction(logits).argmax(-1) == labels) > 0.9


# Running values.


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('width_signal', ['theta', 'sigma'])
def test_what_is_kept(method, width_signal):
  """A threshold or signal that is measured; one value a timestep."""
  x = normal(3, 4, 5)
  neuron = snn.SpikingNeuron(method, width_signal=width_signal, momentum=0.8)
  scale = {'tdbn_scale': jnp.ones(5)}
  variables = neuron.init(jax.random.key(0), x, False, **scale)
  learns = {'v_th'} if method == 'learnable_threshold' else set()
  assert variables['params'].keys() == {'w'} | learns

  names = []
  if 'at' in method or method in ('quantile', 'isometric', 'moving'):
    names.append('running_threshold')
  if method in ('tgo', 'isometric') or (
    'ds_atgo' in method and width_signal == 'sigma'
  ):
    names.append('running_signal')
  kept = variables.get('batch_stats', {})
  shape = (3, 5) if 'channel' in method else 3
  close(kept, {name: jnp.ones(shape) for name in names})

  (_, updates) = neuron.apply(
    variables, x, False, **scale, mutable=['batch_stats', 'spiking']
  )
  happened = updates['spiking']
  new = {'running_threshold': happened['theta']}
  if 'at' in method:
    close(happened['theta'], happened['mean'] + happened['std'])
  if 'running_signal' in names:
    signals = {'theta': happened['mean'] + happened['std']}
    signals['sigma'] = happened['std']
    kind = 'sigma' if method == 'isometric' else width_signal
    new['running_signal'] = signals[kind]
  expected = {name: 0.8 + 0.2 * new[name] for name in names}
  close(updates.get('batch_stats', {}), expected)


def test_inference_fires_against_the_running_threshold():
  x = normal(3, 4, 5)
  neuron = snn.SpikingNeuron()
  variables = trained(neuron, x)
  running = variables['batch_stats']['running_threshold']
  y, happened = neuron.apply(variables, x, True, mutable=['spiking'])
  expected, _, _ = neurons.run(x, running=neurons.Running(running))
  chex.assert_trees_all_equal(y, expected)
  width = 1 + jnp.tanh(running - 1)
  close(
    [happened['spiking']['theta'], happened['spiking']['width']],
    [running, width],
  )
  assert (y != train(neuron, variables, x)[0]).any()
  gradient = jax.grad(lambda x: neuron.apply(variables, x, True).sum())(x)
  assert gradient.any()


def test_use_running_average_as_attribute_or_argument():
  x = normal(3, 4, 5)
  variables = trained(snn.SpikingNeuron(), x)
  as_argument = snn.SpikingNeuron().apply(variables, x, True)
  as_attribute = snn.SpikingNeuron(use_running_average=True).apply(variables, x)
  chex.assert_trees_all_equal(as_attribute, as_argument)
  for call in (snn.SpikingNeuron(), snn.TdBatchNorm()):
    with pytest.raises(ValueError, match='use_running_average'):
      call.init(jax.random.key(0), x)


# What happened inside.


def test_spiking_is_sown_only_where_mutable():
  x = normal(3, 4, 5)
  neuron = snn.SpikingNeuron()
  variables = neuron.init(jax.random.key(0), x, False)
  assert variables.keys() == {'params', 'batch_stats'}
  spikes, updates = neuron.apply(
    variables, x, False, mutable=['batch_stats', 'spiking']
  )
  _, _, record = neurons.run(x, record=True)
  assert updates['spiking'].keys() == {
    'theta', 'width', 'mean', 'std', 'firing_rate', 'gradient_share',
    'silent_share', 'always_share',
  }  # fmt: skip
  told = dict(updates['spiking'])
  close(told.pop('silent_share'), (spikes == 0).all(0).mean())
  close(told.pop('always_share'), spikes.all(0).mean())
  close(told, record.scalars())
  close(updates['spiking']['firing_rate'], spikes.mean((1, 2)))

  def program(*mutable):
    apply = functools.partial(neuron.apply, mutable=mutable)
    return str(jax.make_jaxpr(apply, static_argnums=2)(variables, x, False))

  # Elsewhere it costs nothing: no membrane is compared with the window's edge.
  without = program('batch_stats').count('= lt ')
  assert program('batch_stats', 'spiking').count('= lt ') == without + 1


# Recurrent networks, and parts of a recording.


@pytest.mark.parametrize('use_running_average', [False, True])
@pytest.mark.parametrize('method', NO_SCALE)
def test_rnn_over_the_cell_equals_the_neuron(method, use_running_average):
  x, weights = normal(2, 3, 4, 5)
  neuron = snn.SpikingNeuron(method, use_running_average)
  cell = snn.SpikingCell(method, use_running_average)
  rnn = nn.RNN(cell, time_major=True, variable_axes={'batch_stats': 0})
  variables = trained(snn.SpikingNeuron(method), x)
  wrapped = {name: {'cell': values} for name, values in variables.items()}
  chex.assert_trees_all_equal_shapes(rnn.init(jax.random.key(0), x), wrapped)

  def gradient(module, variables):
    def loss(variables, x):
      y, updates = module.apply(variables, x, mutable=['batch_stats'])
      return jnp.sum(y * weights), (y, updates)

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    return jax.tree.leaves(gradient(variables, x))

  close(gradient(rnn, wrapped), gradient(neuron, variables))


def test_the_cell_returns_its_carry():
  x = normal(4, 5)
  cell = snn.SpikingCell(use_running_average=False)
  carry = cell.initialize_carry(jax.random.key(0), x.shape)
  at_rest = neurons.NeuronState(
    jnp.zeros((4, 5)), jnp.zeros(4, int), jnp.ones(4)
  )
  chex.assert_trees_all_equal(carry, at_rest)
  variables = cell.init(jax.random.key(0), carry, x)
  spikes, state, _ = neurons.step(None, x)
  for before, t in (
    (carry, jnp.ones(4, int)),
    (neurons.at_rest(x), jnp.int32(1)),
  ):
    (after, y), _ = cell.apply(variables, before, x, mutable=['batch_stats'])
    theta = jnp.broadcast_to(state.theta, t.shape)
    expected = state._replace(t=t, theta=theta)
    chex.assert_trees_all_equal((y, after), (spikes, expected))


@pytest.mark.parametrize('use_running_average', [False, True])
@pytest.mark.parametrize('method', ['ds_atgo', 'tgo', 'vanilla'])
def test_chunks_with_the_state_passed_on_equal_the_whole(
  method, use_running_average
):
  x = normal(6, 4, 5)
  neuron = snn.SpikingNeuron(method, use_running_average, num_steps=6)
  variables = trained(snn.SpikingNeuron(method), x)
  apply = functools.partial(
    neuron.apply, mutable=['batch_stats'], return_state=True
  )
  (whole, last), whole_updates = apply(variables, x)
  state, chunks = neurons.at_rest(x[0]), []
  for chunk in (x[:2], x[2:3], x[3:]):
    (y, state), updates = jax.jit(apply)(variables, chunk, state=state)
    variables |= updates
    chunks.append(y)
  close(jnp.concatenate(chunks), whole)
  close(state, last)
  close(updates, whole_updates)


@pytest.mark.parametrize('method', ['at', 'tgo'])
def test_past_the_end_with_a_traced_time(method):
  """No timestep's value is taken or changed by what lies past the end."""
  settings = {'learn_decay': False, 'decay': 0.0, 'momentum': 0.0}
  name = {'at': 'running_threshold', 'tgo': 'running_signal'}[method]
  averages = {'batch_stats': {name: 10 * jnp.arange(5.0) + 1}}
  x = jnp.ones((4, 1, 2)) * jnp.array([8.0, 25, 9, 7])[:, None, None]
  state = neurons.at_rest(x[0])._replace(t=jnp.int32(2))

  @functools.partial(jax.jit, static_argnums=0)
  def apply(inference, state):
    neuron = snn.SpikingNeuron(method, inference, **settings)
    return neuron.apply(averages, x, state=state, mutable=['batch_stats'])

  spikes, _ = apply(True, state)
  if method == 'at':
    assert spikes[:, 0, 0].tolist()[:3] == [0, 0, 0]
    assert np.isnan(spikes[3]).all()
  _, updates = apply(False, state)
  after = updates['batch_stats'][name].tolist()
  assert after == [1, 11, 8, 25, 9]
  with pytest.raises(ValueError, match='= 5 in all.* T = 4 from timestep 2 on'):
    with jax.disable_jit():
      apply(False, state)


# Settings.


@pytest.mark.parametrize('method', ['vanilla', 'at'])
def test_num_steps_is_checked_from_the_first_call_on(method):
  """A batch is not taken for time, whatever the method keeps."""
  neuron = snn.SpikingNeuron(method, False, num_steps=4)
  with pytest.raises(ValueError, match=r'T = 4 in all.*\(64, 5\).*time first'):
    neuron.init(jax.random.key(0), normal(64, 5))


@pytest.mark.parametrize('learn_decay', [True, False])
def test_numbers_per_channel(learn_decay):
  """Tuples and arrays; averages take the shape of what the rule gives."""
  x, decay, f_c = normal(3, 4, 2), (0.2, 0.7), np.array([1.0, 0.5])
  neuron = snn.SpikingNeuron(
    decay=decay, f_c=f_c, learn_decay=learn_decay, use_running_average=False
  )
  variables = neuron.init(jax.random.key(0), x)
  spikes, updates = jax.jit(
    lambda v, x: neuron.apply(v, x, mutable=['batch_stats'])
  )(variables, x)
  expected, _, record = neurons.run(
    x, neurons.Parameters(jnp.array(decay), f_c=f_c)
  )
  close(spikes, expected)
  running = updates['batch_stats']['running_threshold']
  close(running, 0.9 + 0.1 * record.theta)
  assert running.shape == (3, 2)
  inference = neuron.clone(use_running_average=True)
  assert inference.apply(variables, x).shape == x.shape


@pytest.mark.sample
@pytest.mark.parametrize('within', [False, True])
def test_padded_recordings_train_as_the_real_ones(within):
  """Statistics, and so running values, are of the real timesteps only."""
  x = normal(4, 6, 2, 3)
  mask = jnp.arange(4)[:, None] < jnp.array([4, 4, 2, 3, 4, 2])
  norm = snn.TdBatchNorm(False)
  neuron = snn.SpikingNeuron(use_running_average=False)
  variables = norm.init(jax.random.key(0), x), neuron.init(jax.random.key(0), x)

  @jax.jit
  def layers(x, mask):
    mutable = {'mutable': ['batch_stats', 'spiking']}
    if within:
      affine, _ = norm.apply(
        variables[0], x, mask=mask, method='affine', **mutable
      )
      return neuron.apply(variables[1], x, norm=affine, mask=mask, **mutable)
    y, updates = norm.apply(variables[0], x, mask=mask, **mutable)
    spikes, sown = neuron.apply(variables[1], y, mask=mask, **mutable)
    return spikes, sown | {'norm': updates['batch_stats']}

  spikes, updates = layers(x, mask)
  for padding in (0.0, 1e3):
    other, same = layers(jnp.where(mask[..., None, None], x, padding), mask)
    close(same, updates)
    close(other[mask], spikes[mask])
  if not within:
    real = np.asarray(x)[np.asarray(mask)].reshape(-1, 3)
    close(updates['norm']['mean'], 0.1 * real.mean(0))
    close(updates['norm']['var'], 0.9 + 0.1 * real.var(0, ddof=1))
  # Of a timestep without a real example nothing is learnt.
  _, updates = layers(x, mask.at[2:].set(False))
  running = updates['batch_stats']['running_threshold']
  assert (running[:2] != 1).all() and (running[2:] == 1).all()
  _, updates = layers(x, mask[0])  # [B]: the same at all timesteps.
  close(updates, layers(x, jnp.broadcast_to(mask[0], mask.shape))[1])


def test_masks_of_other_shapes():
  x = normal(4, 6, 3)
  for module in (snn.SpikingNeuron(), snn.TdBatchNorm()):
    with pytest.raises(
      ValueError, match=r'mask.*\(4, 6, 3\).*got shape \(4,\)'
    ):
      module.init(jax.random.key(0), x, False, mask=jnp.ones(4, bool))
  with pytest.raises(ValueError, match=r'shape \(6,\) for x.*got shape \(4,\)'):
    snn.TdBatchNorm(repeats=4).init(
      jax.random.key(0), x[0], False, mask=jnp.ones(4, bool)
    )


def own(statistics, parameters, t):
  return 0.9 * statistics.mean + 0.5 * parameters.v_th


@pytest.mark.parametrize(
  'settings, parameters, arguments',
  [
    ({'decay': 0.6}, {'decay': 0.6}, {}),
    ({'decay': 0.6, 'learn_decay': False}, {'decay': 0.6}, {}),
    (
      {'method': 'vanilla', 'v_th': 0.4},
      {'v_th': 0.4},
      {'method': ('vanilla',)},
    ),
    ({'f_c': 0.6}, {'f_c': 0.6}, {}),
    ({'width': 2.5}, {'width': 2.5}, {}),
    ({'threshold': 'estimated'}, {}, {'method': ('ds_atgo', 'estimated')}),
    ({'threshold': own}, {}, {'method': ('ds_atgo', own)}),
    ({'width_signal': 'sigma'}, {}, {'method': ('ds_atgo', 'true', 'sigma')}),
    ({'surrogate': surrogate.arctan}, {}, {'surrogate': surrogate.arctan}),
    ({'reset': 'soft'}, {}, {'reset': 'soft'}),
    ({'detach_reset': True}, {}, {'detach_reset': True}),
  ],
)
def test_settings_reach_the_neuron(settings, parameters, arguments):
  x, weights = normal(2, 3, 4, 5)
  neuron = snn.SpikingNeuron(**settings)
  variables = neuron.init(jax.random.key(0), x, False)
  method = methods.get(*arguments.pop('method', ('ds_atgo',)))
  parameters = neurons.Parameters(**parameters)

  def outputs(run):
    y, pull = jax.vjp(run, x)
    return y, *pull(weights)

  ours = outputs(lambda x: train(neuron, variables, x)[0])
  plain = outputs(lambda x: neurons.run(x)[0])
  close(
    ours,
    outputs(lambda x: neurons.run(x, parameters, method, **arguments)[0]),
  )
  assert not all((a == b).all() for a, b in zip(ours, plain, strict=True))


def test_plif_learns_its_decay_and_lif_does_not():
  x = normal(3, 4, 5)
  variables = snn.SpikingNeuron().init(jax.random.key(0), x, False)
  assert variables['params']['w'] == pytest.approx(-np.log(4))
  neuron = snn.SpikingNeuron(learn_decay=False)
  assert 'params' not in neuron.init(jax.random.key(0), x, False)


def test_mpd_agl_takes_the_scale_of_tdbn():
  x = normal(3, 4, 5)
  neuron = snn.SpikingNeuron('mpd_agl', False, v_th=0.5)
  with pytest.raises(ValueError, match="'mpd_agl' needs.*tdbn_scale=None"):
    neuron.init(jax.random.key(0), x)
  _, happened = neuron.init_with_output(
    jax.random.key(0), x, tdbn_scale=jnp.arange(1.0, 6.0)
  )
  apply = functools.partial(neuron.apply, mutable=['spiking'])
  _, happened = apply(happened, x, tdbn_scale=jnp.arange(1.0, 6.0))
  later = 3 * np.sqrt(1.04)
  close(happened['spiking']['width'], jnp.array([3.0, later, later]))


@pytest.mark.parametrize(
  'dtype, kept', [('bfloat16', 'float32'), ('float64', 'float64')]
)
@jax.enable_x64(True)
def test_dtypes(dtype, kept):
  """As in Flax; membrane and running values are at least float32."""
  x = normal(3, 4, 5).astype(dtype)
  neuron = snn.SpikingNeuron(param_dtype=dtype)
  variables = neuron.init(jax.random.key(0), x, False)
  assert variables['params']['w'].dtype == dtype
  (y, state), variables = train(neuron, variables, x, return_state=True)
  assert y.dtype == dtype
  assert state.v.dtype == kept
  assert variables['batch_stats']['running_threshold'].dtype == kept
  other = snn.SpikingNeuron(dtype=jnp.float16).apply(variables, x, True)
  assert other.dtype == jnp.float16


# Layers without dynamics.


def test_time_folded_layers_see_each_timestep_alone():
  x = normal(3, 2, 4, 4, 5)
  layers = [
    snn.Conv(7, (3, 3)),
    snn.Dense(7),
    functools.partial(snn.avg_pool, window_shape=(2, 2), strides=(2, 2)),
    functools.partial(snn.max_pool, window_shape=(2, 2), strides=(2, 2)),
    snn.fold_time(lambda x: x.reshape(x.shape[0], -1)),
  ]
  # The same, of one timestep.
  alone = layers[:2] + [
    functools.partial(nn.avg_pool, window_shape=(2, 2), strides=(2, 2)),
    functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2)),
    lambda x: x.reshape(x.shape[0], -1),
  ]
  for folded, each in zip(layers, alone, strict=True):
    if isinstance(folded, nn.Module):
      variables = folded.init(jax.random.key(0), x)
      folded = each = functools.partial(folded.apply, variables)
    close(folded(x), jnp.stack([each(x_t) for x_t in x]))


def test_convolutions_start_with_kaiming_normal_fan_out():
  x = jnp.zeros((1, 1, 8, 8, 3))
  params = snn.Conv(512, (3, 3)).init(jax.random.key(0), x)['params']
  assert params['kernel'].std() == pytest.approx(
    np.sqrt(2 / (9 * 512)), rel=0.02
  )
  assert abs(params['kernel']).max() > 3 * params['kernel'].std()


def test_repeat_in_time():
  x = normal(2, 3)
  chex.assert_trees_all_equal(snn.repeat_in_time(x, 3), jnp.stack([x] * 3))
  with pytest.raises(ValueError, match='>= 1, got num_steps=0'):
    snn.repeat_in_time(x, 0)


# Errors.


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'v_th': 0.0}, 'v_th > 0, got v_th=0.0'),
    ({'f_c': -1}, 'f_c > 0, got f_c=-1'),
    ({'width': -0.5}, 'width > 0, got width=-0.5'),
    ({'method': 'lif'}, "method to be one of 'vanilla'.*got method='lif'"),
    ({'threshold': 'exact'}, "'true', 'estimated', got threshold='exact'"),
    ({'width_signal': 'mu'}, "'theta', 'sigma', got width_signal='mu'"),
    ({'reset': 'zero'}, "'hard', 'soft', .* got reset='zero'"),
    ({'decay': 1.0}, '0 <= decay <= 1.*got decay=1.0, learn_decay=True'),
    ({'decay': 1.5, 'learn_decay': False}, 'got decay=1.5, learn_decay=False'),
    ({'momentum': 1.1}, '0 <= momentum <= 1, got .*1.1'),
    ({'num_steps': 4}, 'expected T = 4 in all, got x with T = 3'),
  ],
)
def test_settings_out_of_range(settings, message):
  with pytest.raises(ValueError, match=message):
    snn.SpikingNeuron(**settings).init(
      jax.random.key(0), normal(3, 4, 5), False
    )


@pytest.mark.parametrize('use_running_average', [False, True])
@pytest.mark.parametrize('method', ['ds_atgo', 'tgo'])
def test_another_number_of_timesteps(method, use_running_average):
  x = normal(5, 4, 5)
  neuron = snn.SpikingNeuron(method, use_running_average)
  variables = neuron.init(jax.random.key(0), x[:3])
  apply = functools.partial(neuron.apply, variables, mutable=['batch_stats'])
  for x_t in (x[:2], x):
    message = f'expected T = 3 in all, got x with T = {len(x_t)}'
    with pytest.raises(ValueError, match=message):
      apply(x_t)
  _, state = apply(x[:2], state=neurons.at_rest(x[0]), return_state=True)[0]
  with pytest.raises(ValueError, match='= 3 in all.* T = 2 from timestep 2 on'):
    apply(x[:2], state=state)


@pytest.mark.parametrize('method', ['vanilla', 'learnable_threshold'])
def test_methods_that_keep_nothing_take_any_number_of_timesteps(method):
  neuron = snn.SpikingNeuron(method, False)
  variables = neuron.init(jax.random.key(0), normal(3, 4, 5))
  assert neuron.apply(variables, normal(7, 4, 5)).shape == (7, 4, 5)


@pytest.mark.parametrize(
  'shape, message',
  [
    ((3,), r'x \[T, B, ...\], got float32\[3\]'),
    ((3, 1, 1), r'at least two neurons.*u.shape=\(1, 1\)'),
  ],
)
def test_shapes(shape, message):
  with pytest.raises(ValueError, match=message):
    snn.SpikingNeuron().init(jax.random.key(0), jnp.ones(shape), False)


def test_a_convolution_is_one_call_of_time_first():
  x = jnp.ones((4, 2, 5, 5, 3))
  conv = snn.Conv(6, (3, 3))
  (y, variables), seen = conv.init_with_output(jax.random.key(0), x), []

  def look(call, args, kwargs, context):
    del context
    seen.append(args[0].shape)
    return call(*args, **kwargs)

  with nn.intercept_methods(look):
    _, kept = conv.apply(variables, x, capture_intermediates=True)
  assert seen == [x.shape]
  (output,) = kept['intermediates']['__call__']
  np.testing.assert_array_equal(output, y)
  each = [conv.apply(variables, x[i]) for i in range(4)]
  np.testing.assert_allclose(y, jnp.stack(each), rtol=1e-6)
