"""The NNX modules: equal to Linen's, and at home in NNX."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dsatgo_jax import linen, losses, neurons, surrogate
from dsatgo_jax import nnx as snn

close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


def normal(*shape, seed=0):
  x = np.random.default_rng(seed).normal(0.3, 1, shape)
  return jnp.asarray(x, jnp.float32)


def pure(module, kind):
  """Its variables of a kind, by name."""
  return {k: v[...] for k, v in nnx.state(module, kind).items()}


def test_the_same_names_as_linen():
  own = {'CAPTURED', 'Histogram', 'Membrane', 'Probe'}
  assert set(snn.__all__) == {*linen.__all__} | own
  for settings in (linen.SpikingNeuron, linen.TdBatchNorm):
    fields = set(settings.__dataclass_fields__) - {'parent', 'name'}
    init = getattr(snn, settings.__name__).__init__
    assert fields <= set(init.__kwdefaults__ | init.__annotations__)


SETTINGS = [
  {'method': 'vanilla', 'v_th': 0.5},
  {'method': 'at', 'f_c': 0.8},
  {'method': 'tgo', 'width': 2.0},
  {'method': 'ds_atgo'},
  {'method': 'ds_atgo', 'threshold': 'estimated', 'decay': 0.6},
  {'method': 'ds_atgo', 'width_signal': 'sigma', 'reset': 'soft'},
  {'method': 'ds_atgo', 'surrogate': surrogate.arctan, 'detach_reset': True},
  {'method': 'ds_atgo', 'learn_decay': False, 'momentum': 0.5},
  {'method': 'mpd_agl', 'v_th': 0.5},
  {'method': 'learnable_threshold', 'v_th': 0.7},
  {'decay': np.linspace(0.1, 0.8, 5), 'v_th': np.linspace(0.5, 1, 5)},
  {'method': 'learnable_threshold', 'v_th': np.linspace(0.5, 1, 4)[:, None]},
]


@pytest.mark.parametrize('settings', SETTINGS)
def test_equals_linen(settings):
  """Spikes, running values, state and gradients, in training and inference."""
  x, weights = normal(2, 3, 4, 5)
  inputs = {'x': x}
  if settings.get('method') == 'mpd_agl':
    inputs['tdbn_scale'] = jnp.linspace(0.5, 1.5, 5)
  ours = snn.SpikingNeuron(num_steps=3, **settings)
  theirs = linen.SpikingNeuron(num_steps=3, **settings)
  variables = theirs.init(jax.random.key(0), **inputs, use_running_average=True)
  close(pure(ours, nnx.Param), variables.get('params', {}))
  close(pure(ours, nnx.BatchStat), variables.get('batch_stats', {}))

  @nnx.jit(static_argnums=2)
  def step(ours, inputs, inference):
    ours.eval() if inference else ours.train()

    def loss(ours, inputs):
      y, state = ours(**inputs, return_state=True)
      return jnp.sum(y * weights) + jnp.sum(state.v**2), (y, state)

    gradient = nnx.grad(loss, argnums=(0, 1), has_aux=True)
    (g_params, g_inputs), outputs = gradient(ours, inputs)
    g_params = {k: v[...] for k, v in g_params.items()}
    return g_params, g_inputs, outputs

  @functools.partial(jax.jit, static_argnums=2)
  def linen_step(variables, inputs, inference):
    params = variables.get('params', {})

    def loss(params, inputs):
      (y, state), updates = theirs.apply(
        variables | {'params': params},
        **inputs,
        use_running_average=inference,
        return_state=True,
        mutable=['batch_stats'],
      )
      return jnp.sum(y * weights) + jnp.sum(state.v**2), (y, state, updates)

    gradients, (y, state, updates) = jax.grad(loss, (0, 1), has_aux=True)(
      params, inputs
    )
    return (*gradients, (y, state)), variables | updates

  for inference in (False, False, True):
    expected, variables = linen_step(variables, inputs, inference)
    close(step(ours, inputs, inference), expected)
    close(pure(ours, nnx.BatchStat), variables.get('batch_stats', {}))


class Net(nnx.Module):
  """As in the package's documentation."""

  def __init__(self, rngs):
    self.conv = snn.Conv(1, 8, (3, 3), use_bias=False, rngs=rngs)
    self.norm = snn.TdBatchNorm(8)
    self.neuron = snn.SpikingNeuron(num_steps=4)
    self.dense = snn.Dense(32, 3, rngs=rngs)

  def __call__(self, x):
    """Images [B, H, W, C] to logits [T, B, K]."""
    x = snn.repeat_in_time(x, num_steps=4)
    x = self.neuron(self.norm(self.conv(x)))
    x = snn.avg_pool(x, (2, 2), strides=(2, 2))
    return self.dense(x.reshape(*x.shape[:2], -1))


@pytest.mark.sample
def test_a_loop_for_batch_norm_trains_the_neuron():
  @nnx.jit
  def train_step(net, optimizer, images, labels):
    def loss(net):
      return jnp.mean(losses.cross_entropy(net(images), labels))

    value, grads = nnx.value_and_grad(loss)(net)
    optimizer.update(net, grads)
    return value

  labels = jnp.arange(24) % 3
  images = normal(24, 4, 4, 1) + labels[:, None, None, None] - 1
  net = Net(nnx.Rngs(0))
  optimizer = nnx.Optimizer(net, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
  net.train()
  first = train_step(net, optimizer, images, labels)
  for _ in range(30):
    loss = train_step(net, optimizer, images, labels)
  assert loss < 0.3 * first
  assert net.neuron.w[...] != pytest.approx(-np.log(4), abs=1e-4)
  kept = net.neuron.running_threshold[...]
  assert kept.shape == (4,) and (abs(kept - 1) > 0.01).all()

  net.eval()
  logits = nnx.jit(lambda net, x: net(x))(net, images)
  assert jnp.mean(losses.prediction(logits).argmax(-1) == labels) > 0.9
  chex.assert_trees_all_equal(net.neuron.running_threshold[...], kept)


def test_train_and_eval_switch_unasked():
  x = normal(3, 4, 5)
  neuron = snn.SpikingNeuron(num_steps=3)
  start = neuron.running_threshold[...]
  neuron.eval()
  fixed, _, _ = neurons.run(x, running=neurons.Running(start))
  chex.assert_trees_all_equal(neuron(x), fixed)
  chex.assert_trees_all_equal(neuron.running_threshold[...], start)
  neuron.train()
  measured, _, record = neurons.run(x)
  chex.assert_trees_all_equal(neuron(x), measured)
  close(neuron.running_threshold[...], 0.9 * start + 0.1 * record.theta)
  assert (fixed != measured).any()
  # A call's argument overrides both.
  running = neurons.Running(neuron.running_threshold[...])
  expected, _, _ = neurons.run(x, running=running)
  chex.assert_trees_all_equal(neuron(x, use_running_average=True), expected)
  # And a view shares the values.
  view = nnx.view(neuron, use_running_average=True)
  chex.assert_trees_all_equal(view(x), expected)


@pytest.mark.parametrize('inference', [False, True])
@pytest.mark.parametrize('method', ['ds_atgo', 'tgo', 'vanilla'])
def test_rnn_over_the_cell_equals_the_neuron(method, inference):
  x, weights = normal(2, 3, 4, 5)
  neuron, cell = (
    cls(method, num_steps=3) for cls in (snn.SpikingNeuron, snn.SpikingCell)
  )
  rnn = nnx.RNN(cell, time_major=True)
  neuron(x)
  nnx.update(cell, nnx.state(neuron, nnx.BatchStat))
  results = []
  for module, kept in ((neuron, neuron), (rnn, cell)):
    module.eval() if inference else module.train()

    @nnx.jit
    def gradient(module, x):
      def loss(module, x):
        return jnp.sum(module(x) * weights)

      return nnx.grad(loss, argnums=(0, 1))(module, x)

    grads, g_x = gradient(module, x)
    results.append(
      (jax.tree.leaves(grads), g_x, module(x), pure(kept, nnx.BatchStat))
    )
  close(*results)


def test_the_cell_returns_its_carry():
  x = normal(4, 5)
  cell = snn.SpikingCell(num_steps=3)
  carry = cell.initialize_carry(x.shape)
  at_rest = neurons.NeuronState(
    jnp.zeros((4, 5)), jnp.zeros(4, int), jnp.ones(4)
  )
  chex.assert_trees_all_equal(carry, at_rest)
  spikes, state, _ = neurons.step(None, x)
  for before, t in (
    (carry, jnp.ones(4, int)),
    (neurons.at_rest(x), jnp.int32(1)),
  ):
    after, y = cell(before, x)
    theta = jnp.broadcast_to(state.theta, t.shape)
    expected = state._replace(t=t, theta=theta)
    chex.assert_trees_all_equal((y, after), (spikes, expected))


def test_chunks_with_the_state_passed_on_equal_the_whole():
  x = normal(6, 4, 5)
  neuron, whole = (snn.SpikingNeuron(num_steps=6) for _ in range(2))
  for inference in (False, True):
    expected, last = whole(x, inference, return_state=True)
    state, chunks = neurons.at_rest(x[0]), []
    for chunk in (x[:2], x[2:3], x[3:]):
      y, state = neuron(chunk, inference, state=state, return_state=True)
      chunks.append(y)
    close((jnp.concatenate(chunks), state), (expected, last))
    close(pure(neuron, nnx.BatchStat), pure(whole, nnx.BatchStat))


def test_an_rnn_over_more_steps_than_the_cell_has():
  for training in (True, False):
    cell = snn.SpikingCell(num_steps=5, use_running_average=not training)
    rnn = nnx.RNN(cell, time_major=True)
    assert rnn(normal(5, 2, 3)).shape == rnn(normal(5, 2, 3)).shape == (5, 2, 3)
    with pytest.raises(ValueError, match='most T = 5.*an nnx.RNN over 8'):
      rnn(normal(8, 2, 3))
    with pytest.raises(ValueError, match='most T = 5.*an nnx.RNN over 6'):
      nnx.jit(lambda rnn, x: rnn(x))(nnx.RNN(cell), normal(2, 6, 3))


def test_past_the_end_with_a_traced_time():
  neuron = snn.SpikingNeuron('at', num_steps=10, learn_decay=False, decay=0.0)
  neuron.running_threshold[...] = jnp.arange(10.0) * 10
  x = jnp.full((4, 1, 2), 75.0)
  state = neurons.at_rest(x[0])._replace(t=jnp.int32(8))
  spikes = nnx.jit(lambda m, x, s: m(x, True, state=s))(neuron, x, state)
  assert spikes[:2].sum() == 0 and np.isnan(spikes[2:]).all()
  nnx.jit(lambda m, x, s: m(x, state=s))(neuron, x, state)
  expected = [*range(0, 80, 10), 0.9 * 80 + 7.5, 0.9 * 90 + 7.5]
  close(neuron.running_threshold[...], jnp.array(expected))


def test_num_steps_may_be_left_out_where_nothing_is_kept():
  assert snn.SpikingNeuron('vanilla')(normal(7, 4, 5)).shape == (7, 4, 5)
  with pytest.raises(
    ValueError, match='expected num_steps=T, got num_steps=None'
  ):
    snn.SpikingNeuron('at')


@pytest.mark.parametrize('decay', [(0.2, 0.7), np.array([0.2, 0.7])])
def test_numbers_per_channel(decay):
  x = normal(3, 4, 2)
  neuron = snn.SpikingNeuron(num_steps=3, decay=decay, f_c=np.array([1, 0.5]))
  fixed = snn.SpikingNeuron(
    num_steps=3, decay=decay, f_c=(1, 0.5), learn_decay=False
  )
  parameters = neurons.Parameters(decay, f_c=jnp.array([1, 0.5]))
  expected, _, record = neurons.run(x, parameters)
  for module in (neuron, fixed):
    close(nnx.jit(lambda m, x: m(x))(module, x), expected)
    close(module.running_threshold[...], 0.9 + 0.1 * record.theta)


def test_a_mask():
  x = normal(4, 6, 3)
  mask = jnp.arange(4)[:, None] < jnp.array([4, 4, 2, 3, 4, 2])
  results = []
  for padding in (0.0, 1e3):
    norm, neuron = snn.TdBatchNorm(3), snn.SpikingNeuron(num_steps=4)
    padded = jnp.where(mask[..., None], x, padding)
    spikes = neuron(norm(padded, mask=mask), mask=mask)
    kept = [pure(module, nnx.BatchStat) for module in (norm, neuron)]
    results.append((spikes[mask], kept))
  close(*results)


def test_settings_are_shown_by_name():
  for shown in (
    repr(snn.SpikingNeuron(num_steps=3)),
    repr(linen.SpikingNeuron()),
  ):
    assert "surrogate='rectangular'" in shown.replace(' = ', '=')
    assert ' at 0x' not in shown


def test_capture_tells_what_happened_inside():
  x = normal(3, 4, 5)
  neuron = snn.SpikingNeuron(num_steps=3)
  spikes, captured = nnx.capture(neuron, nnx.Intermediate)(x)
  _, _, record = neurons.run(x, record=True)
  told = nnx.to_pure_dict(captured)
  close(told.pop('silent_share'), (spikes == 0).all(0).mean())
  close(told.pop('always_share'), spikes.all(0).mean())
  close(told, record.scalars())
  neuron(x)
  assert not nnx.state(neuron, nnx.Intermediate)


@pytest.mark.parametrize(
  'dtype, kept', [('bfloat16', 'float32'), ('float64', 'float64')]
)
@jax.enable_x64(True)
def test_dtypes(dtype, kept):
  x = normal(3, 4, 5).astype(dtype)
  neuron = snn.SpikingNeuron(num_steps=3, param_dtype=dtype)
  y, state = neuron(x, return_state=True)
  assert neuron.w.dtype == y.dtype == dtype
  assert state.v.dtype == neuron.running_threshold.dtype == kept
  other = snn.SpikingNeuron(num_steps=3, dtype=jnp.float16, param_dtype=dtype)
  assert other(x).dtype == jnp.float16


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'v_th': 0.0}, 'v_th > 0, got v_th=0.0'),
    ({'f_c': -1}, 'f_c > 0, got f_c=-1'),
    ({'width': -0.5}, 'width > 0, got width=-0.5'),
    ({'method': 'lif'}, "method to be one of 'vanilla'.*got method='lif'"),
    ({'threshold': 'exact'}, "'true', 'estimated', got threshold='exact'"),
    ({'width_signal': 'mu'}, "'theta', 'sigma', got width_signal='mu'"),
    ({'decay': 1.0}, '0 <= decay <= 1.*got decay=1.0, learn_decay=True'),
    ({'momentum': 1.1}, '0 <= momentum <= 1, got .*1.1'),
    ({'num_steps': 0}, 'num_steps > 0, got num_steps=0'),
  ],
)
def test_settings_out_of_range_when_built(settings, message):
  with pytest.raises(ValueError, match=message):
    snn.SpikingNeuron(**{'num_steps': 3} | settings)


@pytest.mark.parametrize(
  'settings, shape, message',
  [
    ({}, (4, 2, 2), 'expected T = 3 in all, got x with T = 4'),
    ({}, (2, 2, 2), 'expected T = 3 in all, got x with T = 2'),
    ({}, (3,), r'x \[T, B, ...\], got float32\[3\]'),
    ({}, (3, 1, 1), r'at least two neurons.*u.shape=\(1, 1\)'),
    ({'method': 'mpd_agl'}, (3, 2, 2), 'tdbn_scale=None'),
    ({'reset': 'zero'}, (3, 2, 2), "'hard', 'soft', .* got reset='zero'"),
  ],
)
def test_errors_when_called(settings, shape, message):
  with pytest.raises(ValueError, match=message):
    snn.SpikingNeuron(num_steps=3, **settings)(jnp.ones(shape))
