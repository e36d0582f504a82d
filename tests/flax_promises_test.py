"""What Flax promises of `BatchNorm`, `Dense` and `RNN`, our layers keep."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.experimental import checkify

from dsatgo_jax import linen as snn
from dsatgo_jax import neurons, tdbn
from dsatgo_jax import nnx as snnx

close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-5)
equal = chex.assert_trees_all_equal
KEY = jax.random.key(0)


def normal(*shape, seed=0):
  x = np.random.default_rng(seed).normal(0.3, 1, shape)
  return jnp.asarray(x, jnp.float32)


def through_linen(module):
  """`call(x, train)`, which gives the output and `batch_stats` after it."""

  def call(x, train, **kwargs):
    variables = module.init(KEY, x, False, **kwargs)
    y, updates = module.apply(
      variables, x, not train, mutable=['batch_stats'], **kwargs
    )
    return y, (variables | updates).get('batch_stats', {})

  return call


def through_nnx(build):
  def call(x, train, **kwargs):
    module = build(np.shape(x))
    y = module(x, not train, **kwargs)
    return y, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

  return call


LAYERS = {
  'linen.TdBatchNorm': through_linen(snn.TdBatchNorm()),
  'linen.SpikingNeuron': through_linen(snn.SpikingNeuron()),
  'nnx.TdBatchNorm': through_nnx(lambda s: snnx.TdBatchNorm(s[-1])),
  'nnx.SpikingNeuron': through_nnx(
    lambda s: snnx.SpikingNeuron(num_steps=s[0])
  ),
}
layers = pytest.mark.parametrize('layer', LAYERS.values(), ids=LAYERS)


# Inputs.


@layers
@pytest.mark.parametrize('train', [True, False])
def test_numbers_that_are_not_float32_arrays(layer, train):
  """Integers count as float32, NumPy's float64 is taken as JAX takes it."""
  whole = np.round(3 * np.asarray(normal(3, 4, 5)))
  expected = layer(jnp.float32(whole), train)
  for x in (
    whole,
    whole.astype(np.int32),
    whole.astype(np.int64),
    whole.tolist(),
    jnp.asarray(whole, jnp.int8),
  ):
    got = layer(x, train)
    equal(got, expected)
    chex.assert_trees_all_equal_dtypes(got, expected)
  signs = layer(whole > 0, train)
  equal(signs, layer(jnp.float32(whole > 0), train))


@layers
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize(
  'shape', [(3, 4), (3, 1, 5), (1, 4, 5), (3, 4, 1), (3, 2, 1, 2, 1, 2)]
)
def test_shapes(layer, train, shape):
  y, kept = layer(normal(*shape), train)
  assert y.shape == shape and not y.weak_type
  chex.assert_tree_all_finite((y, kept))


@layers
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('shape', [(3, 0, 5), (20, 0), (3, 2, 0, 2), (3, 2, 0)])
def test_an_empty_batch_gives_an_empty_output_and_teaches_nothing(
  layer, train, shape
):
  y, kept = layer(jnp.zeros(shape), train)
  assert y.shape == shape
  _, start = layer(jnp.zeros(shape), False)
  equal(kept, start)


def test_the_gradient_of_an_empty_batch():
  for num_steps in (3, 20):
    x = jnp.zeros((num_steps, 0, 5))
    assert (
      jax.grad(lambda x: neurons.run(x, method='vanilla')[0].sum())(x).shape
      == x.shape
    )


@pytest.mark.parametrize(
  'layer, x, message',
  [
    (
      'TdBatchNorm',
      jnp.ones((3, 4, 5), complex),
      r'real .*complex64\[3, 4, 5\]',
    ),
    ('TdBatchNorm', jnp.ones(()), r'x \[..., C\].*got float32\[\]'),
    ('SpikingNeuron', jnp.ones((3, 4, 5), complex), r'real .*complex64'),
    ('SpikingNeuron', jnp.ones(()), r'x \[T, B, ...\], got float32\[\]'),
    ('SpikingNeuron', jnp.ones((0, 4, 5)), r'T >= 1 .*got float32\[0, 4, 5\]'),
    ('SpikingNeuron', jnp.ones((3, 1, 1)), r'at least two neurons.*\(1, 1\)'),
  ],
)
def test_what_cannot_be_is_said(layer, x, message):
  kinds = {
    'TdBatchNorm': (snn.TdBatchNorm(), lambda: snnx.TdBatchNorm(5)),
    'SpikingNeuron': (
      snn.SpikingNeuron(),
      lambda: snnx.SpikingNeuron('tgo', num_steps=3),
    ),
  }[layer]
  with pytest.raises(ValueError, match=message):
    kinds[0].init(KEY, x, False)
  with pytest.raises(ValueError, match=message):
    kinds[1]()(x)


@pytest.mark.parametrize('inference', [True, False])
def test_another_number_of_channels(inference):
  """Not broadcast, and not only refused in training."""
  with pytest.raises(
    ValueError, match=r'\[C\] = \[1\], got float32\[3, 4, 5\]'
  ):
    snnx.TdBatchNorm(1)(normal(3, 4, 5), inference)


@pytest.mark.parametrize('x', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('dtype', [None, 'float16', 'bfloat16'])
@pytest.mark.parametrize('params', ['float32', 'bfloat16'])
def test_dtypes_are_batch_norms(x, dtype, params):
  """Whether parameters are made in a dtype or cast to it afterwards."""

  def dtypes(module, cast):
    image = normal(2, 3).astype(x)
    variables = module.init(KEY, image)
    if cast:
      variables = variables | {
        'params': jax.tree.map(lambda p: p.astype(params), variables['params'])
      }
    y, updates = jax.eval_shape(
      lambda: module.apply(variables, image, mutable=['batch_stats'])
    )
    return jax.tree.map(lambda a: a.dtype, (variables, y, updates))

  for cast in (True, False):
    settings = {'dtype': dtype and jnp.dtype(dtype)}
    settings['param_dtype'] = jnp.float32 if cast else jnp.dtype(params)
    assert dtypes(snn.TdBatchNorm(False, **settings), cast) == dtypes(
      nn.BatchNorm(False, **settings), cast
    )


@pytest.mark.parametrize('dtype', ['int32', 'bool', 'complex64'])
def test_outputs_that_pass_no_gradient(dtype):
  """Refused as by Flax, which allows complex numbers."""
  x, settings = normal(3, 4, 5), {'dtype': jnp.dtype(dtype)}
  message = f'floating-point dtype, got dtype={dtype}'
  for kind in (snn.TdBatchNorm, snn.SpikingNeuron):
    with pytest.raises(ValueError, match=message):
      kind(**settings).init(KEY, x, True)
  for kind in (snnx.SpikingNeuron, functools.partial(snnx.TdBatchNorm, 5)):
    module = kind(
      **{'num_steps': 3} if kind is snnx.SpikingNeuron else {}, **settings
    )
    with pytest.raises(ValueError, match=message):
      module(x)


# Masks.


@layers
def test_a_mask_of_the_shape_that_batch_norm_takes(layer):
  x = normal(4, 3, 2, 5)
  mask = jnp.arange(4)[:, None] < jnp.array([4, 2, 3])
  expected = layer(x, True, mask=mask)
  equal(layer(x, True, mask=mask[..., None, None]), expected)
  equal(layer(x, True, mask=np.asarray(mask, np.int32)), expected)
  same = jnp.array([True, False, True])
  equal(
    layer(x, True, mask=same[None, :, None, None]), layer(x, True, mask=same)
  )
  with pytest.raises(ValueError, match=r'got shape \(4, 3, 2, 1\)'):
    layer(x, True, mask=jnp.ones((4, 3, 2, 1), bool))


def test_a_mask_without_a_time_axis():
  """Of x [B, C], and of one image that counts T times."""
  x, mask = normal(6, 5), jnp.arange(6) < 4
  for settings in ({}, {'repeats': 3}):
    layer = through_linen(snn.TdBatchNorm(**settings))
    expected, kept = layer(x[:4], True)
    for shape in ((6,), (6, 1)):
      y, after = layer(x, True, mask=mask.reshape(shape))
      close((y[:4], after), (expected, kept))


@layers
def test_of_padding_alone_nothing_is_learnt(layer):
  x = normal(3, 4, 5)
  _, kept = layer(x, True, mask=jnp.zeros(4, bool))
  equal(kept, layer(x, False)[1])


# Settings.


def test_settings_may_be_traced():
  """As Flax's momentum and epsilon; what is traced is not checked."""
  x = normal(3, 4, 5)

  def outputs(a):
    neuron = snn.SpikingNeuron(
      decay=a, learn_decay=False, v_th=a, f_c=a, width=a, momentum=a,
      use_running_average=False,
    )  # fmt: skip
    learnt = snn.SpikingNeuron(decay=a, use_running_average=False)
    norm = snn.TdBatchNorm(False, alpha=a, v_th=a, momentum=a, epsilon=a)
    built = snnx.SpikingNeuron(num_steps=3, decay=a, f_c=a, momentum=a)
    return [
      *(
        module.init_with_output(KEY, x)[0] for module in (neuron, learnt, norm)
      ),
      built(x),
    ]

  values = jnp.array([0.3, 0.7])
  mapped = jax.jit(jax.vmap(outputs))(values)
  for i, value in enumerate(values.tolist()):
    close([y[i] for y in mapped], outputs(value))


def test_modules_with_arrays_for_settings_have_a_hash():
  """So that they can be static arguments."""
  arrays = [np.array([0.2, 0.5]), jnp.array([0.2, 0.5]), (0.2, 0.5)]
  neuron, other, third = (
    snn.SpikingNeuron(decay=decay, f_c=np.array([[1.0, 2.0]]))
    for decay in arrays
  )
  assert neuron != neuron.clone(f_c=1.0)
  assert hash(neuron) == hash(neuron.clone()) and neuron == neuron.clone()
  assert neuron == third and hash(neuron) == hash(third)
  x = normal(3, 4, 2)
  variables = neuron.init(KEY, x, False)
  apply = jax.jit(
    lambda module, x: module.apply(variables, x, True), static_argnums=0
  )
  close(apply(other, x), apply(neuron, x))


def test_variables_may_be_numpy_arrays():
  """As a checkpoint gives them back."""
  x = normal(3, 4, 5)
  neuron = snn.SpikingNeuron(num_steps=3)
  variables = neuron.init(KEY, x, False)
  state = neurons.at_rest(x[0])._replace(t=jnp.int32(1))
  apply = functools.partial(
    neuron.apply, return_state=True, mutable=['batch_stats']
  )
  for inference in (False, True):
    expected = apply(variables, x[:2], inference, state=state)
    got = apply(
      jax.tree.map(np.asarray, variables), x[:2], inference,
      state=neurons.NeuronState(np.asarray(state.v, np.float64), 1, 1.0),
    )  # fmt: skip
    equal(got, expected)


def test_use_running_average_has_to_be_chosen_in_nnx_too():
  x = normal(3, 4, 5)
  for module in (
    snnx.TdBatchNorm(5, use_running_average=None),
    snnx.SpikingNeuron(num_steps=3, use_running_average=None),
  ):
    with pytest.raises(ValueError, match='use_running_average.*got None'):
      module(x)
    module.eval()
    assert module(x).shape == x.shape


@pytest.mark.parametrize('factored', [False, True])
def test_initializers_of_ones_own(factored):
  settings = {
    'alpha': 0.5,
    'factored': factored,
    'scale_init': nn.initializers.normal(),
    'bias_init': nn.initializers.ones,
  }
  params = snn.TdBatchNorm(False, **settings).init(KEY, normal(2, 3))['params']
  module = snnx.TdBatchNorm(3, **settings, rngs=nnx.Rngs(0))
  for scale, bias in (params.values(), (module.scale[...], module.bias[...])):
    assert scale.std() > 0 and abs(scale).max() < 0.1 and (bias == 1).all()


@pytest.mark.parametrize('use_scale', [False, True])
@pytest.mark.parametrize('use_bias', [False, True])
@pytest.mark.parametrize('factored', [False, True])
def test_scale_and_bias_can_be_left_out(use_scale, use_bias, factored):
  """As of `BatchNorm`, with the constant deviation in the place of 1."""
  used = {'use_scale': use_scale, 'use_bias': use_bias}
  settings = used | {'alpha': 0.5, 'factored': factored}
  ours, theirs = snn.TdBatchNorm(False, **settings), nn.BatchNorm(False, **used)
  neuron = snn.SpikingNeuron(use_running_average=False)
  for x in normal(2, 3, 4), normal(2, 3, 4).astype(jnp.bfloat16):
    variables = ours.init(KEY, x)
    expected, _ = theirs.init_with_output(KEY, x)
    kept = variables.get('params', {}).keys()
    assert kept == theirs.init(KEY, x).get('params', {}).keys()
    y, _ = ours.apply(variables, x, mutable=['batch_stats'])
    assert y.dtype == expected.dtype
    if x.dtype == 'float32':
      close(y, 0.5 * expected)
    module = snnx.TdBatchNorm(4, **settings)
    equal(module(x), y)
    assert {k for k in ('scale', 'bias') if getattr(module, k) is not None} == (
      set(kept)
    )
    affine, _ = ours.apply(
      variables, x, mutable=['batch_stats'], method='affine'
    )
    spikes, _ = neuron.init_with_output(KEY, x, norm=affine)
    apart, _ = neuron.init_with_output(KEY, affine(x).astype(x.dtype))
    assert (spikes == apart).mean() > 0.9


@pytest.mark.parametrize('factored', [False, True])
def test_mpd_agl_behind_a_scale_that_is_not_learnt(factored):
  """Gamma is what the scale would start at."""
  x = normal(2, 3, 4)
  norm = snn.TdBatchNorm(False, alpha=0.5, factored=factored)
  scale = norm.init(KEY, x)['params']['scale']
  neuron = snn.SpikingNeuron('mpd_agl', use_running_average=False)

  def gradient(norm, scale):
    def loss(x):
      affine, _ = norm.init_with_output(KEY, x, method='affine')
      return neuron.init_with_output(KEY, x, norm=affine, tdbn_scale=scale)[
        0
      ].sum()

    return jax.grad(loss)(x)

  close(
    gradient(norm.clone(use_scale=False), jnp.full(4, 1 if factored else 0.5)),
    gradient(norm, scale),
  )


def test_a_residual_gain_starts_at_zero():
  module = snnx.TdBatchNorm(4, scale_init=nnx.initializers.zeros)
  equal(module(normal(2, 3, 4)), jnp.zeros((2, 3, 4)))


def test_parameters_can_be_partitioned():
  init = nn.with_partitioning(nn.initializers.ones, ('model',))
  norm = snn.TdBatchNorm(False, scale_init=init, bias_init=init)
  variables = norm.init(KEY, normal(2, 3))
  spec = nn.get_partition_spec(variables)['params']
  assert spec == dict.fromkeys(('scale', 'bias'), jax.P('model'))
  norm.apply(variables, normal(2, 3), mutable=['batch_stats'])
  mesh = jax.make_mesh(
    (1,), ('model',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  with jax.set_mesh(mesh):
    init = nnx.with_partitioning(nnx.initializers.ones, ('model',))
    module = snnx.TdBatchNorm(3, scale_init=init)
    assert module.scale.out_sharding == ('model',)
    assert module(normal(2, 3)).shape == (2, 3)


def test_drawing_keys_as_batch_norm_does():
  """What is built after it starts the same."""
  following = []
  for norm in (nnx.BatchNorm, snnx.TdBatchNorm):
    rngs = nnx.Rngs(0)
    norm(3, rngs=rngs)
    following.append(jax.random.key_data(rngs.params()))
  equal(*following)


# Pooling.

POOLS = {
  'avg': (snn.avg_pool, nn.avg_pool),
  'max': (snnx.max_pool, nnx.max_pool),
}


@pytest.mark.parametrize('pool', POOLS)
@pytest.mark.parametrize(
  'shape',
  [
    (4, 6, 1),
    (2, 4, 6, 1),
    (3, 2, 4, 6, 1),
    (2, 3, 2, 4, 6, 1),
    (3, 0, 4, 6, 1),
  ],
)
@pytest.mark.parametrize('padding', ['VALID', 'SAME', ((1, 0), (0, 1))])
def test_pooling_takes_any_leading_axes(pool, shape, padding):
  """Each image as Flax pools it; none is taken for time or batch."""
  ours, theirs = POOLS[pool]
  x, settings = normal(*shape), {'strides': (1, 2), 'padding': padding}
  y = ours(x, (2, 2), **settings)
  each = (
    [theirs(a, (2, 2), **settings) for a in x.reshape(-1, 1, 4, 6, 1)]
    if x.size
    else []
  )
  height, width = theirs(jnp.ones((4, 6, 1)), (2, 2), **settings).shape[:2]
  assert y.shape == (*shape[:-3], height, width, 1)
  equal(
    y.reshape(-1, height, width, 1),
    jnp.concatenate(each) if each else y.reshape(0, height, width, 1),
  )


def test_folding_an_empty_batch():
  fold = snn.fold_time(lambda x: x[..., :2])
  assert fold(jnp.zeros((3, 0, 5))).shape == (3, 0, 2)


# Recurrent networks.


def linen_rnn(
  neuron, x, *, seed=0, settings=types.MappingProxyType({}), **call
):
  """What a Linen RNN of the cell gives, and the running thresholds after."""
  cell = snn.SpikingCell(use_running_average=False, **neuron)
  rnn = nn.RNN(cell, variable_axes={'batch_stats': 0}, **settings)

  @jax.jit
  def apply(x, call):
    variables = rnn.init(KEY, x)
    return rnn.apply(variables, x, mutable=['batch_stats'], **call)

  y, updates = apply(x, call)
  return y, updates['batch_stats']['cell']['running_threshold']


def nnx_rnn(neuron, x, settings=types.MappingProxyType({}), **call):
  cell = snnx.SpikingCell(num_steps=4, **neuron)
  rnn = nnx.RNN(cell, **settings)
  y = nnx.jit(lambda rnn, x, call: rnn(x, **call))(rnn, x, call)
  return y, cell.running_threshold[...]


rnns = pytest.mark.parametrize('rnn', [linen_rnn, nnx_rnn])
TIME_MAJOR = {'time_major': True}


def run(x):
  """Spikes, state and the running thresholds of a layer over time."""
  spikes, state, record = neurons.run(x)
  return spikes, state, 0.9 + 0.1 * record.theta


@rnns
@pytest.mark.parametrize('axes, batch', [(1, (3, 2)), (3, (3,))])
def test_rnns_that_are_batch_major(rnn, axes, batch):
  """Of vectors, and of images, whose width is not taken for time."""
  x = normal(4, *batch, *(6, 5, 2)[-axes:])
  spikes, _, running = run(x)
  batch_major = jnp.moveaxis(x, 0, len(batch))
  y, after = rnn({'num_feature_axes': axes}, batch_major)
  close((jnp.moveaxis(y, len(batch), 0), after), (spikes, running))


@rnns
def test_rnns_return_the_carry_of_each_examples_last_timestep(rnn):
  x, lengths = normal(4, 3, 5), jnp.array([2, 4, 1])
  settings = TIME_MAJOR | {'return_carry': True}
  (state, y), running = rnn({}, x, settings=settings, seq_lengths=lengths)
  states = [run(x[:n])[1] for n in range(1, 5)]
  last = [states[n - 1].v[i] for i, n in enumerate(lengths.tolist())]
  close((y, running), run(x)[::2])
  theta = jnp.stack([states[n - 1].theta for n in lengths.tolist()])
  close(state, neurons.NeuronState(jnp.stack(last), lengths, theta))


@rnns
@pytest.mark.parametrize('keep_order', [False, True])
def test_rnns_in_reverse(rnn, keep_order):
  x = normal(4, 3, 5)
  settings = TIME_MAJOR | {'reverse': True, 'keep_order': keep_order}
  spikes, _, running = run(x[::-1])
  expected = spikes[::-1] if keep_order else spikes
  close(rnn({}, x, settings=settings), (expected, running))


@rnns
def test_rnns_unrolled_and_from_a_carry(rnn):
  x = normal(4, 3, 5)
  start = neurons.at_rest(x[0])._replace(v=normal(3, 5, seed=1))
  spikes, _, record = neurons.run(x, state=start)
  for t in (start.t, jnp.zeros(3, int)):
    carry = start._replace(t=t)
    y, running = rnn(
      {}, x, settings=TIME_MAJOR | {'unroll': 2}, initial_carry=carry
    )
    close((y, running), (spikes, 0.9 + 0.1 * record.theta))


@pytest.mark.parametrize('lengths', [None, (2, 4, 1)])
def test_bidirectional_rnns(lengths):
  x = normal(4, 3, 5)
  lengths = lengths and jnp.array(lengths)
  axes = {'variable_axes': {'batch_stats': 0}}
  net = nn.Bidirectional(
    *(
      nn.RNN(snn.SpikingCell(use_running_average=False), **axes)
      for _ in range(2)
    ),
    time_major=True,
  )
  both, _ = net.init_with_output(KEY, x, seq_lengths=lengths)
  cells = [nnx.RNN(snnx.SpikingCell(num_steps=4)) for _ in range(2)]
  again = nnx.Bidirectional(*cells, time_major=True)(x, seq_lengths=lengths)
  back = nn.recurrent.flip_sequences(x, lengths, 1, time_major=True)
  back = nn.recurrent.flip_sequences(run(back)[0], lengths, 1, time_major=True)
  expected = jnp.concatenate([run(x)[0], back], -1)
  close([both, again], [expected, expected])


def test_examples_at_different_timesteps_cannot_go_on_together():
  """Their thresholds are others'; a method that keeps none does not mind."""
  x = normal(2, 3, 5)
  carry = neurons.NeuronState(jnp.zeros((3, 5)), jnp.array([1, 2, 1]))
  cell = snnx.SpikingCell(num_steps=4)
  before = cell.running_threshold[...]
  with pytest.raises(ValueError, match='from a different timestep on for each'):
    cell(carry, x[0])
  call = nnx.jit(
    lambda cell, carry, x, inference: cell(carry, x, inference),
    static_argnums=3,
  )
  _, spikes = call(cell, carry, x[0], True)
  assert np.isnan(spikes).all()
  call(cell, carry, x[0], False)
  equal(cell.running_threshold[...], before)
  (after, spikes) = snnx.SpikingCell('vanilla')(carry, x[0])
  equal(spikes, jnp.float32(x[0] >= 1))
  equal(after.t, carry.t + 1)


@rnns
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@jax.enable_x64(True)
def test_the_carry_is_as_wide_as_input_and_parameters(rnn, dtype):
  """The membrane keeps the wider of both from timestep to timestep."""
  x = normal(4, 3, 5).astype(dtype)
  y, _ = rnn({'param_dtype': jnp.float64}, x, settings=TIME_MAJOR)
  assert y.dtype == dtype
  close(y, run(x)[0])


def test_a_carry_of_ones_own():
  """From an initializer in NNX."""
  carry = snnx.SpikingCell('vanilla').initialize_carry(
    (2, 5), nnx.Rngs(0), carry_init=nnx.initializers.normal()
  )
  assert carry.v.std() > 0 and carry.t.tolist() == [0, 0]
  cell = snnx.SpikingCell('vanilla')
  ones = cell.initialize_carry((2, 5), carry_init=nnx.initializers.ones)
  assert (ones.v == 1).all()


def test_what_happened_in_a_cell_is_sown_as_in_the_neuron():
  x = normal(4, 3, 5)
  axes = {'batch_stats': 0, 'spiking': 0}
  rnn = nn.RNN(
    snn.SpikingCell(use_running_average=False), time_major=True,
    variable_axes=axes,
  )  # fmt: skip
  _, sown = rnn.apply(rnn.init(KEY, x), x, mutable=['batch_stats', 'spiking'])
  record = neurons.run(x, record=True)[2].scalars()
  told = sown['spiking']['cell']
  close({name: told[name] for name in record}, record)


class LinenRecurrent(nn.RNNCellBase):
  """A spiking layer that hears its own spikes."""

  @nn.compact
  def __call__(self, carry, x):
    """One timestep."""
    state, spikes = carry
    current = snn.Dense(5)(x) + nn.Dense(5, use_bias=False)(spikes)
    cell = snn.SpikingCell(use_running_average=False)
    state, spikes = cell(state, current)
    return (state, spikes), spikes

  @nn.nowrap
  def initialize_carry(self, rng, input_shape):
    """At rest, and silent."""
    state = snn.SpikingCell(parent=None).initialize_carry(rng, input_shape)
    return state, jnp.zeros(input_shape)

  num_feature_axes = 1


class NnxRecurrent(nnx.RNNCellBase):
  """The same."""

  def __init__(self, rngs):
    self.forward = snnx.Dense(5, 5, rngs=rngs)
    self.back = snnx.Dense(5, 5, use_bias=False, rngs=rngs)
    self.cell = snnx.SpikingCell(num_steps=4)

  def __call__(self, carry, x):
    """One timestep."""
    state, spikes = carry
    state, spikes = self.cell(state, self.forward(x) + self.back(spikes))
    return (state, spikes), spikes

  def initialize_carry(self, input_shape, rngs=None, carry_init=None):
    """At rest, and silent."""
    del carry_init
    return self.cell.initialize_carry(input_shape), jnp.zeros(input_shape)

  num_feature_axes = 1


def test_cells_made_of_layers():
  """With feedback: gradients and carries, in Linen as in NNX."""
  x, lengths = normal(4, 3, 5), jnp.array([2, 4, 1])
  rnn = nn.RNN(
    LinenRecurrent(), time_major=True, variable_axes={'batch_stats': 0}
  )
  variables = rnn.init(KEY, x)
  cell = NnxRecurrent(nnx.Rngs(0))
  params = variables['params']['cell']
  cell.forward.kernel[...] = params['Dense_0']['kernel']
  cell.back.kernel[...] = params['Dense_1']['kernel']
  call = {'seq_lengths': lengths, 'return_carry': True}

  def loss(params):
    (carry, y), updates = rnn.apply(
      variables | {'params': params}, x, mutable=['batch_stats'], **call
    )
    return jnp.sum(y) + jnp.sum(carry[0].v), (carry, y)

  slope, outputs = jax.jit(jax.grad(loss, has_aux=True))(variables['params'])

  @nnx.jit
  @functools.partial(nnx.grad, has_aux=True)
  def gradient(cell):
    carry, y = nnx.RNN(cell, time_major=True)(x, **call)
    return jnp.sum(y) + jnp.sum(carry[0].v), (carry, y)

  slope_nnx, outputs_nnx = gradient(cell)
  close(outputs_nnx, outputs)
  slope = slope['cell']
  close(slope_nnx['forward']['kernel'][...], slope['Dense_0']['kernel'])
  close(slope_nnx['cell']['w'][...], slope['SpikingCell_0']['w'])
  assert slope['Dense_1']['kernel'].any()


class Frames(nnx.RNNCellBase):
  """A network that runs for a while on each frame."""

  def __init__(self):
    self.cell = snnx.SpikingCell(num_steps=2)

  def __call__(self, carry, x):
    """One frame."""
    state = self.cell.initialize_carry(x.shape)
    for _ in range(2):
      state, spikes = self.cell(state, x)
    return carry, spikes

  def initialize_carry(self, input_shape, rngs=None, carry_init=None):
    """Nothing."""
    del input_shape, rngs, carry_init
    return jnp.zeros(())

  num_feature_axes = 1


def test_an_rnn_over_a_network_that_starts_anew_at_each_step():
  """Its length is not that of the cell's recordings."""
  x = normal(5, 3, 4)
  y = nnx.RNN(Frames(), time_major=True)(x)
  close(y, jnp.stack([run(jnp.stack([a, a]))[0][1] for a in x]))


# Lifted transformations of Linen.


class Net(nn.Module):
  """A dense layer, tdBN and neurons."""

  axis_name: str | None = None

  @nn.compact
  def __call__(self, x, _=None):
    """[T, B, 5] to spikes, and nothing for `nn.scan`."""
    x = snn.Dense(5)(x)
    x = snn.TdBatchNorm(False, axis_name=self.axis_name)(x)
    neuron = snn.SpikingNeuron(
      use_running_average=False, axis_name=self.axis_name
    )
    return neuron(x), None


def step(net, variables, x, mutable=('batch_stats', 'spiking')):
  """Spikes, what is kept and sown, and the parameters' gradient."""

  def loss(params):
    (y, _), updates = net.apply(
      variables | {'params': params}, x, mutable=mutable
    )
    weights = np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape)
    return jnp.sum(y * weights), (y, updates)

  slope, outputs = jax.grad(loss, has_aux=True)(variables['params'])
  return outputs, slope


@functools.cache
def trained(num_steps=2):
  """An input, a net's variables, and its step."""
  x = normal(num_steps, 4, 5)
  variables = jax.jit(Net().init)(KEY, x)
  return x, variables, jax.jit(functools.partial(step, Net()))


class Lifted(nn.Module):
  """The net, by roads that Linen lifts."""

  @nn.compact
  def __call__(self, x):
    """As `Net`'s, many times."""
    net = Net(name='net')
    if self.is_initializing():
      return net(x)

    def call(net, x):
      return net(x)[0]

    def skip(net, x):
      return x

    ys = [
      nn.cond(True, call, skip, net, x),
      nn.switch(1, [skip, call], net, x),
      nn.vjp(call, net, x)[0],
      nn.remat(call)(net, x),
      nn.jit(call)(net, x),
    ]
    return jnp.stack(ys), None


@pytest.mark.parametrize('lift', [nn.jit, nn.remat])
def test_lifted_classes_are_the_same(lift):
  x, variables, plain = trained()
  lifted = jax.jit(functools.partial(step, lift(Net)()))
  close(lifted(variables, x), plain(variables, x))


def test_lifted_calls_are_the_same():
  x, variables, plain = trained()
  (y, _), _ = plain(variables, x)
  inside = {name: {'net': tree} for name, tree in variables.items()}
  apply = jax.jit(functools.partial(Lifted().apply, mutable=['batch_stats']))
  (ys, _), updates = apply(inside, x)
  close(ys, jnp.stack([y] * 5))
  for _ in range(5):
    _, kept = Net().apply(variables, x, mutable=['batch_stats'])
    variables = variables | kept
  close(updates['batch_stats']['net'], variables['batch_stats'])


def test_a_vmap_with_an_axis_name_is_the_whole_batch():
  x, variables, plain = trained()
  (expected, after), _ = plain(variables, x)
  parts = nn.vmap(
    Net, in_axes=1, out_axes=1, axis_name='batch',
    variable_axes={'params': None, 'batch_stats': None, 'spiking': None},
    split_rngs={'params': False},
  )(axis_name='batch')  # fmt: skip
  apply = jax.jit(functools.partial(parts.apply, mutable=list(after)))
  (y, _), updates = apply(variables, x.reshape(2, 2, 2, 5))
  close((y.reshape(x.shape), updates), (expected, after))


@pytest.mark.sample
def test_an_ensemble_and_a_stack_of_layers():
  """`nn.vmap` and `nn.scan` over parameters, statistics and what is sown."""
  x, _, plain = trained()
  over = {'params': 0, 'batch_stats': 0, 'spiking': 0}
  settings = {'variable_axes': over, 'split_rngs': {'params': True}}
  ensemble = nn.vmap(Net, in_axes=None, axis_size=2, **settings)()
  stack = nn.scan(nn.remat(Net), length=2, **settings)()
  variables = jax.jit(ensemble.init)(KEY, x)
  members = [jax.tree.map(lambda a, i=i: a[i], variables) for i in range(2)]

  sow = {'mutable': ['batch_stats', 'spiking']}
  (y, _), updates = jax.jit(functools.partial(ensemble.apply, **sow))(
    variables, x
  )
  each = [plain(member, x)[0] for member in members]
  close((y, updates), jax.tree.map(lambda *a: jnp.stack(a), *each))

  (y, updates), slope = jax.jit(functools.partial(step, stack))(variables, x)
  first, kept = plain(members[0], x)[0]
  last, too = plain(members[1], first)[0]
  close((y, updates), (last, jax.tree.map(lambda *a: jnp.stack(a), kept, too)))
  assert slope['Dense_0']['kernel'][0].any()


def test_what_linen_offers_around_a_call():
  x, variables, plain = trained()
  (y, _), _ = plain(variables, x)
  shapes = jax.eval_shape(Net().init, KEY, x)
  lazy = Net().lazy_init(KEY, jax.ShapeDtypeStruct(x.shape, x.dtype))
  chex.assert_trees_all_equal_shapes_and_dtypes(lazy, shapes)
  with pytest.raises(nn.module.errors.ModifyScopeVariableError):
    Net().apply(variables, x)
  _, everything = Net().apply(
    variables, x, mutable=True, capture_intermediates=True
  )
  ours = {'spiking', 'histograms', 'membranes', 'flow'}
  assert everything.keys() == {*variables, *ours, 'intermediates'}
  caught = everything['intermediates']['SpikingNeuron_0']['__call__']
  close(caught[0], y)
  bound = Net().bind(variables, mutable=['batch_stats'])
  close(bound(x)[0], y)
  assert bound.variables['batch_stats']['TdBatchNorm_0']['mean'].any()
  frozen = nn.FrozenDict(variables)
  close(Net().apply(frozen, x, mutable=['batch_stats'])[0][0], y)
  wide = {'width': 200}
  assert 'SpikingNeuron_0' in Net().tabulate(KEY, x, console_kwargs=wide)


# NNX.


class NnxNet(nnx.Module):
  """The same layers."""

  def __init__(self, rngs, axis_name=None):
    self.dense = snnx.Dense(5, 5, rngs=rngs)
    self.norm = snnx.TdBatchNorm(5, axis_name=axis_name)
    self.neuron = snnx.SpikingNeuron(num_steps=2, axis_name=axis_name)

  def __call__(self, x):
    """[2, B, 5] to spikes."""
    return self.neuron(self.norm(self.dense(x)))


def call(net, x):
  return net(x)


def skip(net, x):
  return x


NNX = {
  'jit': lambda net, x, **g: nnx.jit(call, **g)(net, x),
  'remat': lambda net, x, **g: nnx.remat(call, **g)(net, x),
  'cond': lambda net, x, **g: nnx.cond(True, call, skip, net, x, **g),
  'switch': lambda net, x, **g: nnx.switch(1, [skip, call], net, x, **g),
  'fori_loop': lambda net, x, **g: nnx.fori_loop(
    0, 1, lambda i, c: (c[0], c[0](c[1])), (net, x), **g
  )[1],
  'view': lambda net, x, **g: nnx.view(net, use_running_average=False, **g)(x),
  'eval_shape': lambda net, x, **g: (
    nnx.eval_shape(call, net, x, **g), net(x),
  )[1],
  'clone': lambda net, x, **g: (nnx.clone(net, **g)(x), net(x))[1],
  'split and merge': lambda net, x, **g: nnx.merge(*nnx.split(net, **g))(x),
}  # fmt: skip


@pytest.mark.parametrize('graph', [True, False])
@pytest.mark.parametrize('how', NNX)
def test_transformations_of_nnx_change_nothing(how, graph):
  """Both ways that NNX has to see a module: as a graph and as a tree."""
  x = trained()[0]
  nets = [NnxNet(nnx.Rngs(0)) for _ in range(2)]
  expected = nets[0](x)
  close(NNX[how](nets[1], x, graph=graph), expected)
  stats = [nnx.to_pure_dict(nnx.state(net, nnx.BatchStat)) for net in nets]
  close(*stats)
  assert stats[0]['neuron']['running_threshold'].any()


def test_an_ensemble_in_nnx():
  x = trained()[0]
  ensemble = nnx.vmap(NnxNet, in_axes=0, out_axes=0)(nnx.Rngs(0).split(3))
  y = nnx.jit(nnx.vmap(call, in_axes=(0, None)))(ensemble, x)
  assert y.shape == (3, *x.shape) and (y[0] != y[1]).any()
  assert ensemble.neuron.running_threshold.shape == (3, 2)


def test_a_vmap_with_an_axis_name_is_the_whole_batch_in_nnx():
  x = trained()[0]
  whole, net = NnxNet(nnx.Rngs(0)), NnxNet(nnx.Rngs(0), 'batch')
  parts = nnx.vmap(
    call, in_axes=(None, 1), out_axes=1, axis_name='batch', graph=False
  )
  y = nnx.jit(parts, graph=False)(net, x.reshape(2, 2, 2, 5))
  close(y.reshape(x.shape), whole(x))
  close(net.neuron.running_threshold[...], whole.neuron.running_threshold[...])


def test_what_nnx_offers_around_a_module():
  net = NnxNet(nnx.Rngs(0))
  net.set_attributes(snnx.TdBatchNorm, use_running_average=True)
  assert net.norm.use_running_average and not net.neuron.use_running_average
  viewed = nnx.with_attributes(net, use_running_average=True)
  assert viewed.neuron.use_running_average
  info = nnx.view_info(net)
  assert 'SpikingNeuron:' in info and 'TdBatchNorm:' in info
  assert 'running thresholds' in info
  assert 'BatchStat: 12' in repr(net)
  graphs = [nnx.graphdef(NnxNet(nnx.Rngs(seed))) for seed in (0, 1)]
  assert graphs[0] == graphs[1] and hash(graphs[0]) == hash(graphs[1])
  x = trained()[0]
  flops = {'compute_flops': True, 'compute_vjp_flops': True}
  plain = {'width': 200, 'force_terminal': False}
  table = nnx.tabulate(net, x, console_kwargs=plain, **flops)
  assert 'running_threshold: float32[2]' in table and 'affine' not in table


def test_bridges_between_linen_and_nnx():
  x, variables, plain = trained()
  expected, _ = plain(variables, x)[0]
  net = nnx.bridge.to_linen(NnxNet)
  made = net.init(KEY, x)
  names = {'Dense_0': 'dense', 'TdBatchNorm_0': 'norm'}
  names['SpikingNeuron_0'] = 'neuron'
  renamed = {
    kind: {names[name]: tree for name, tree in trees.items()}
    for kind, trees in variables.items()
  }
  assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, renamed)
  y, updates = net.apply(renamed, x, mutable=['batch_stats'])
  close(y, expected)
  assert (updates['batch_stats']['neuron']['running_threshold'] != 1).all()

  neuron = snn.SpikingNeuron(use_running_average=False)
  wrapped = nnx.bridge.ToNNX(neuron, rngs=nnx.Rngs(0)).lazy_init(x)
  close(wrapped(x, mutable=['batch_stats']), neurons.run(x)[0])
  assert isinstance(wrapped.running_threshold, nnx.BatchStat)
  assert (wrapped.running_threshold[...] != 1).all()


# Transformations and flags of JAX.

FLAGS = {
  'enable_checks': lambda: jax.enable_checks(True),
  'check_tracer_leaks': lambda: jax.check_tracer_leaks(True),
  'numpy_rank_promotion': lambda: jax.numpy_rank_promotion('raise'),
  'numpy_dtype_promotion': lambda: jax.numpy_dtype_promotion('strict'),
  'enable_x64': lambda: jax.enable_x64(True),
  'debug_key_reuse': lambda: jax.debug_key_reuse(True),
}


@pytest.mark.sample
@pytest.mark.parametrize('flag', FLAGS)
def test_a_training_step_is_traced_under_any_flag(flag):
  x = trained()[0]
  with FLAGS[flag]():
    variables = jax.eval_shape(Net().init, KEY, x)
    (y, _), _ = jax.eval_shape(functools.partial(step, Net()), variables, x)
  assert y.shape == x.shape


@pytest.mark.parametrize('method', ['ds_atgo', 'vanilla'])
def test_nothing_undefined_is_computed_on_the_way(method):
  """Of silence, of a constant, of anything: no false alarm by checkify."""

  def there_and_back(x):
    mean, variance = tdbn.measure(x)
    norm = tdbn.affine(mean, variance, jnp.ones(5), jnp.zeros(5))
    y, pull = jax.vjp(lambda x: neurons.run(norm(x), method=method)[0], x)
    return y, pull(y)

  checked = checkify.checkify(there_and_back, errors=checkify.float_checks)
  checked, x = jax.jit(checked), normal(1, 4, 5)
  for value in (x, 0 * x, 0 * x + 1):
    error, _ = checked(value)
    error.throw()


def test_control_flow_and_batches_of_batches():
  x, variables, plain = trained()
  x = jnp.stack([x, x[::-1]])
  one = functools.partial(step, Net(), variables)
  each = [plain(variables, a) for a in x]
  expected = jax.tree.map(lambda *a: jnp.stack(a), *each)
  close(jax.jit(jax.vmap(one))(x), expected)
  close(jax.jit(lambda x: jax.lax.map(jax.checkpoint(one), x))(x), expected)

  def kept(stats, x):
    (y, _), updates = Net().apply(
      variables | {'batch_stats': stats}, x, mutable=['batch_stats']
    )
    return updates['batch_stats'], y

  # The carry of a loop keeps its types.
  jax.eval_shape(
    lambda s, x: jax.lax.scan(kept, s, x), variables['batch_stats'], x
  )


# Explicit mesh axes, those of `jax.make_mesh`.


class Explicit(nn.Module):
  """Neurons that normalise, and a mask."""

  @nn.compact
  def __call__(self, x, mask):
    """[T, B, C] to spikes."""
    affine = snn.TdBatchNorm(False).affine(x, mask=mask)
    neuron = snn.SpikingNeuron(use_running_average=False)
    return neuron(x, norm=affine, mask=mask)


@pytest.mark.sample
def test_explicit_sharding_of_batch_and_channels():
  x, mask = np.asarray(normal(2, 4, 6)), np.array([True, True, True, False])
  variables = jax.jit(Explicit().init)(KEY, x, mask)

  @jax.jit
  def step(variables, x, mask):
    def loss(params, x):
      y, updates = Explicit().apply(
        variables | {'params': params}, x, mask,
        mutable=['batch_stats', 'spiking'],
      )  # fmt: skip
      return jnp.sum(y * y), (y, updates)

    gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
    return gradient(variables['params'], x)

  expected = step(variables, x, mask)
  mesh = jax.make_mesh((2, 2), ('data', 'model'))

  def put(a, *spec):
    return jax.device_put(np.asarray(a), jax.NamedSharding(mesh, jax.P(*spec)))

  with jax.set_mesh(mesh):
    spec = jax.P(None, 'data', 'model')
    variables = jax.tree.map(put, variables)
    got = step(variables, put(x, *spec), put(mask, 'data'))
    assert jax.typeof(got[0][1][0]).sharding.spec == spec
  close(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, expected))


def test_explicit_sharding_of_other_layers():
  """Seen when traced: pools, repeats, NNX, a part of a recording, an RNN."""
  mesh = jax.make_mesh((4,), ('data',))

  def batch(*shape, axis=1, dtype=jnp.float32):
    spec = jax.P(*[None] * axis, 'data')
    sharding = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def axes(function, *args):
    """Which axis of each output is sharded."""
    return [
      [i for i, name in enumerate(a.sharding.spec) if name == 'data']
      for a in jax.tree.leaves(jax.eval_shape(function, *args))
    ]

  with jax.set_mesh(mesh):
    x, image = batch(3, 8, 4, 4, 2), batch(8, 4, 4, 2, axis=0)
    assert axes(lambda x: snn.repeat_in_time(x, 3), image) == [[1]]
    for pool in (snn.avg_pool, snn.max_pool):
      slope = jax.grad(lambda x, pool=pool: pool(x, (2, 2)).sum())
      assert axes(slope, x) == [[1]]

    net = nnx.Sequential(snnx.TdBatchNorm(2), snnx.SpikingNeuron(num_steps=3))
    graph, values = nnx.split(net)
    assert axes(lambda v, x: nnx.merge(graph, v)(x), values, x) == [[1]]

    state = neurons.NeuronState(image, jax.ShapeDtypeStruct((), jnp.int32))
    neuron = snnx.SpikingNeuron(num_steps=5)
    graph, values = nnx.split(neuron)

    def part(values, x, state):
      neuron = nnx.merge(graph, values)
      return neuron(x, state=state, return_state=True)

    assert axes(part, values, x, state) == [[1], [0], []]

    rnn = nn.RNN(
      snn.SpikingCell(use_running_average=False), time_major=True,
      variable_axes={'batch_stats': 0},
    )  # fmt: skip
    carry = state._replace(t=batch(8, axis=0, dtype=jnp.int32))
    variables = jax.eval_shape(
      lambda: rnn.init(KEY, jnp.zeros((3, 8, 4, 4, 2)))
    )
    assert axes(
      lambda v, x, c: rnn.apply(
        v, x, initial_carry=c, mutable=['batch_stats']
      )[0],
      variables, x, carry,
    ) == [[1]]  # fmt: skip
