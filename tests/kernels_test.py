"""Kernels of a GPU, interpreted on CPU, do what the plain scan does."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.extend import core
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsatgo_jax import (
  fused,
  kernels,
  linen,
  methods,
  neurons,
  surrogate,
  tdbn,
  width,
  xla,
)
from dsatgo_jax import nnx as snnx
from dsatgo_jax.neurons import NeuronState, Parameters, Running
from tests import reference_loop
from tests.neurons_test import METHODS, OWN, gaussian, kept_in_inference, ours

pallas = functools.partial(neurons.run, kernel='pallas')


@pytest.fixture
def interpreted(monkeypatch):
  """Has kernels taken, and run by the interpreter."""
  yield from taken(monkeypatch, 'kernel')


@pytest.fixture
def spread(monkeypatch):
  """The same, as programs take them whose batch is sharded."""
  yield from taken(monkeypatch, 'spread')


def taken(monkeypatch, way):
  interpret = functools.partial(pl.pallas_call, interpret=True)
  monkeypatch.setattr(pl, 'pallas_call', interpret)

  def alone(*arguments, **ways):
    return core.jaxpr_as_fun(ways[way])(*arguments)

  monkeypatch.setattr(xla._either, 'bind', alone)
  jax.clear_caches()
  yield
  jax.clear_caches()


def normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(0.3, 1, shape).astype(np.float32)


def close(actual, expected, tolerance):
  """Relative to the largest entry of each array."""
  pairs = zip(*map(jax.tree.leaves_with_path, (actual, expected)), strict=True)
  for (path, a), (_, b) in pairs:
    assert a.dtype == b.dtype, path
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    atol = tolerance * max(np.max(np.abs(b)), 1e-2)
    np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=f'{path}')


def pull_back(run, x, v, parameters, g_spikes, g_v):
  """Spikes, the last membrane unless g_v is None, the levels, and gradients."""

  def outputs(x, v, parameters):
    state = None if v is None else NeuronState(v, jnp.int32(0))
    spikes, state, record = run(x, parameters, state=state)
    return (spikes, None if g_v is None else state.v), record

  outputs, pull, record = jax.vjp(outputs, x, v, parameters, has_aux=True)
  return outputs, record, pull((g_spikes.astype(outputs[0].dtype), g_v))


SHAPES = [(3, 5, 4, 8), (2, 9, 9, 3), (1, 33, 3, 40), (5, 300), (2, 3, 160)]


def cases():
  """Every method with all resets; the other options as a fixed seed draws."""
  draw = random.Random(4711)
  resets = ['hard', 'soft', 'subtract_after_decay']
  for i, method in enumerate([*METHODS, {'method': OWN}]):
    for j, reset in enumerate(resets):
      options = {
        **method,
        'reset': reset,
        'shape': draw.choice(SHAPES),
        'num_steps': draw.choice([1, 2, 4] if i % 3 == j else [2, 4, 10]),
        'dtype': draw.choice(['float32', 'bfloat16', 'float16']),
        'spike': draw.choice([*reference_loop.DENSITIES, 'gaussian']),
        'cut': draw.choice([(), (), ('reset',), ('leak', 'spatial')]),
        **{
          name: draw.choice([False, True])
          for name in ('normalises', 'started', 'inference', 'gated', 'ends')
        },
      }
      marks = () if i % 3 == j and i % 2 else pytest.mark.sample
      yield pytest.param(options, marks=marks)


@pytest.mark.sample
@pytest.mark.parametrize('case', list(cases()))
def test_equals_the_plain_scan(interpreted, case):
  del interpreted
  shape, num_steps = case['shape'], case['num_steps']
  method = methods.get(
    case['method'], case.get('threshold', 'true'),
    case.get('width_signal', 'theta'),
  )  # fmt: skip
  scale = case.get('tdbn_scale')
  channels = normal(3, shape[-1], seed=2)
  norm = tdbn.Affine(0.1 * channels[0], 1 + 0.1 * channels[1], channels[2])
  running = Running(*np.linspace(0.4, 1.2, 2 * num_steps).reshape(2, -1))
  parameters = jax.tree.map(
    lambda a: jnp.asarray(a, jnp.float32),
    Parameters(
      0.4, 0.8, 0.9, 1.3,
      tdbn_scale=scale and np.array(scale),
      norm=norm if case['normalises'] else None,
      gates=np.array([0.5, 1, 0]) if case['gated'] else None,
    ),
  )  # fmt: skip
  spikes = {'gaussian': gaussian} | vars(surrogate)
  run = functools.partial(
    neurons.run,
    method=method,
    reset=case['reset'],
    surrogate=spikes[case['spike']],
    cut=case['cut'],
    running=running if case['inference'] else None,
  )
  x = jnp.asarray(normal(num_steps, *shape), case['dtype'])
  v = normal(*shape, seed=1) if case['started'] else None
  g_v = normal(*shape, seed=3) if case['ends'] else None
  arguments = x, v, parameters, normal(num_steps, *shape, seed=4), g_v
  actual, expected = jax.jit(
    lambda *a: [
      pull_back(functools.partial(run, kernel=kernel), *a)
      for kernel in ('pallas', 'xla')
    ]
  )(*arguments)
  np.testing.assert_array_equal(actual[0][0], expected[0][0])
  rounding = {'float32': 2e-5, 'bfloat16': 1e-2, 'float16': 2e-3}
  close(actual, expected, rounding[case['dtype']])


@pytest.mark.parametrize(
  'reset, mode, num_steps, start',
  [
    ('hard', 'training', 3, 'rest'),
    ('hard', 'inference', 3, 'started'),
    pytest.param('soft', 'training', 2, 'started', marks=pytest.mark.sample),
    pytest.param('soft', 'inference', 1, 'rest', marks=pytest.mark.sample),
    pytest.param('hard', 'training', 17, 'rest', marks=pytest.mark.sample),
  ],
)
def test_equals_the_loop(interpreted, reset, mode, num_steps, start):
  del interpreted
  settings = reference_loop.Settings(
    decay=0.35, v_th=0.8, width=1.3, f_c=0.9, surrogate='arctan', reset=reset
  )
  x, g_spikes = normal(2, num_steps, 3, 7, 5)
  v, g_v = normal(2, 3, 7, 5, seed=1)
  kept, running = kept_in_inference(settings, num_steps)
  if mode == 'training':
    kept = running = None
  v = v if start == 'started' else np.zeros_like(v)
  tape = reference_loop.forward(settings, x, v, kept)
  expected = reference_loop.backward(settings, tape, v, g_spikes, g_v)
  run, parameters = ours(settings, running)
  (spikes, last), record, (g_x, g_before, g_parameters) = jax.jit(
    functools.partial(pull_back, functools.partial(run, kernel='pallas'))
  )(x, v if start == 'started' else None, parameters, g_spikes, g_v)
  np.testing.assert_array_equal(spikes, tape['spikes'])
  actual = [last, record.theta, record.width, g_x, g_parameters.decay]
  loop = [tape['v'][-1], tape['theta'], tape['width']]
  loop = [*loop, expected['x'], expected['decay']]
  if start == 'started':
    actual, loop = [*actual, g_before], [*loop, expected['v']]
  close(actual, [np.float32(a) for a in loop], 2e-5)


@pytest.mark.sample
@pytest.mark.parametrize('scale', [1e-34, 1e-15, 1.0, 1e15])
@pytest.mark.parametrize('mean', [0.0, 3000.0])
def test_moments_of_any_size(interpreted, mean, scale):
  del interpreted
  x = scale * (mean + normal(1, 3, 17, 9, 20))
  _, _, record = pallas(x)
  wide = x.astype(np.float64)
  np.testing.assert_allclose(record.statistics.mean, [wide.mean()], 1e-5)
  deviation = np.std(wide, ddof=1)
  np.testing.assert_allclose(record.statistics.std, [deviation], 1e-4)


def test_a_constant_membrane(interpreted):
  del interpreted
  spikes, _, record = pallas(jnp.full((1, 3, 17, 9, 20), 0.1))
  assert record.theta[0] == jnp.float32(0.1) and not record.statistics.std[0]
  assert spikes.all()


@pytest.mark.sample
@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize('mode', ['training', 'inference'])
def test_an_undefined_input_shows(interpreted, mode, bad):
  del interpreted
  x = jnp.asarray(normal(3, 4, 5, 6)).at[1, 2, 3, 4].set(bad)
  running = None if mode == 'training' else Running(jnp.ones(3))
  actual, expected = (
    run(x, running=running)[0] for run in (pallas, neurons.run)
  )
  np.testing.assert_array_equal(actual, expected)


def through_both(kernel, x, axis_name=None, face='linen', other=0.0):
  """Spikes of tdBN and neurons, and cotangents of x and all parameters."""
  shared = {'axis_name': axis_name}
  if face == 'linen':
    train = {'use_running_average': False} | shared
    norm = linen.TdBatchNorm(**train)
    neuron = linen.SpikingNeuron(kernel=kernel, **train)

    def apply(variables, x):
      affine, _ = norm.apply(
        variables[0], x, mutable=['batch_stats'], method='affine'
      )
      return neuron.apply(
        variables[1], x + other if other else x, norm=affine,
        mutable=['batch_stats'],
      )[0]  # fmt: skip

    affine = norm.init(jax.random.key(0), x)
    variables = affine, neuron.init(jax.random.key(0), x)
  else:
    layers = (
      snnx.TdBatchNorm(x.shape[-1], **shared),
      snnx.SpikingNeuron(num_steps=len(x), kernel=kernel, **shared),
    )
    graph, variables = nnx.split(layers)

    def apply(variables, x):
      norm, neuron = nnx.merge(graph, variables)
      return neuron(x, norm=norm.affine(x))

  spikes, pull = jax.vjp(apply, variables, x)
  g_variables, g_x = pull(jnp.sin(9 * x))
  if axis_name:
    g_variables = jax.lax.psum(g_variables, axis_name)
  return spikes, g_variables, g_x


@pytest.mark.parametrize(
  'face, dtype, other',
  [
    pytest.param('linen', 'float32', 0.0, marks=pytest.mark.sample),
    pytest.param('nnx', 'float32', 0.0, marks=pytest.mark.sample),
    pytest.param('linen', 'bfloat16', 0.0, marks=pytest.mark.sample),
    pytest.param('linen', 'float32', 0.5, marks=pytest.mark.sample),
  ],
)
def test_pulls_through_the_statistics_of_tdbn(interpreted, face, dtype, other):
  """And where the neurons see something else than tdBN has measured."""
  del interpreted
  x = jnp.asarray(normal(3, 4, 5, 6), dtype)
  actual, expected = (
    jax.jit(
      functools.partial(through_both, kernel, face=face, other=other)
    )(x)
    for kernel in ('pallas', 'xla')
  )  # fmt: skip
  close(actual, expected, 2e-5 if dtype == 'float32' else 1e-2)


@pytest.mark.sample
@pytest.mark.parametrize('way', ['interpreted', 'left to XLA'])
def test_pulls_through_the_statistics_of_all_devices(request, way):
  if way == 'interpreted':
    request.getfixturevalue('interpreted')
  x = normal(2, 8, 5, 6)

  def mapped(kernel):
    return jax.shard_map(
      functools.partial(through_both, kernel, axis_name='batch'),
      mesh=MESH,
      in_specs=P(None, 'batch'),
      out_specs=(P(None, 'batch'), P(), P(None, 'batch')),
      check_vma=False,
    )

  actual = jax.jit(mapped('pallas'))(x)
  expected = jax.jit(functools.partial(through_both, 'xla'))(x)
  close(actual[0], expected[0], 0)
  close(actual[2], expected[2], 2e-5)


@pytest.mark.sample
@pytest.mark.parametrize('other', [0.0, 0.5])
@pytest.mark.parametrize('where', [P(None, 'batch'), P()])
def test_devices_take_their_parts_of_a_sharded_batch(spread, where, other):
  del spread
  x = normal(3, 8, 4, 5, 6)
  sharded = jax.device_put(x, NamedSharding(MESH, where))
  step = jax.jit(functools.partial(through_both, other=other), static_argnums=0)
  actual, expected = step('pallas', sharded), step('xla', x)
  close(actual[0], expected[0], 0)
  close(actual, expected, 2e-5)
  text = step.lower('pallas', sharded).compile().as_text()
  assert 'all-gather' not in text and 'all-to-all' not in text


@pytest.mark.sample
def test_devices_take_their_parts_of_explicit_axes(spread):
  del spread
  x = normal(2, 4, 6, 5)
  mesh = jax.make_mesh((4,), ('batch',), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    sharded = jax.device_put(x, NamedSharding(mesh, P(None, 'batch')))
    actual = jax.jit(there_and_back)(sharded)
  expected = jax.jit(functools.partial(there_and_back, kernel='xla'))(x)
  close(actual, expected, 2e-5)


# Where kernels are taken. Programs are lowered for a GPU that is not there.


def lowered(function, *arguments, platform='cuda'):
  """Whether the program for a platform has kernels."""
  traced = jax.jit(function).trace(*arguments)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  return 'triton' in text


def needs_triton(expected):
  if expected and jax.__version_info__ >= (0, 11) and not HAS_GPU:
    pytest.skip('This JAX lowers Triton only where it finds a GPU.')


def there_and_back(x, **settings):
  spikes, pull = jax.vjp(lambda x: pallas(x, **settings)[0], x)
  return spikes, pull(spikes)


@surrogate.custom
def tabled(x, width):
  """Reads an array, which a kernel may not."""
  return jnp.sum(jnp.arange(3.0) + np.ones(3, np.float32)) * width + 0 * x


SORTING = methods.Method(
  lambda statistics, p, t: jnp.sort(jnp.stack(statistics))[0], width.fixed
)
X = normal(2, 4, 6, 5)
HAS_GPU = jax.default_backend() == 'gpu'
MESH = jax.make_mesh((4,), ('batch',), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize(
  'name, function, expected',
  [
    ('one GPU', there_and_back, True),
    ('checkpointed', jax.checkpoint(there_and_back), True),
    ('mapped', jax.vmap(there_and_back), False),
    ('an activity', functools.partial(there_and_back, record=True), False),
    ('a mask', lambda x: pallas(x, mask=np.ones(4, bool))[0], False),
    (
      'a decay a channel',
      lambda x: pallas(x, Parameters(decay=0.1 * jnp.arange(5)))[0],
      False,
    ),
    ('XLA asked for', lambda x: neurons.run(x)[0], False),
    (
      'a surrogate that Triton does not know',
      functools.partial(there_and_back, surrogate=tabled),
      False,
    ),
    (
      'a rule that Triton does not know',
      functools.partial(there_and_back, method=SORTING),
      True,
    ),
    (
      'a rule that knows what is traced',
      lambda x: pallas(
        x,
        method=methods.Method(
          lambda statistics, p, t, z=x[0, 0, 0, 0]: statistics.mean + z,
          width.fixed,
        ),
      )[0],
      False,
    ),
    (
      'Linen',
      lambda x: linen.SpikingNeuron(
        use_running_average=False, kernel='pallas'
      ).init_with_output(jax.random.key(0), x)[0],
      True,
    ),
    (
      'NNX',
      lambda x: snnx.SpikingNeuron(num_steps=2, kernel='pallas')(x),
      True,
    ),
    (
      'over devices by hand',
      jax.shard_map(
        functools.partial(there_and_back, axis_name='batch'),
        mesh=MESH,
        in_specs=P(None, 'batch'),
        out_specs=P(None, 'batch'),
      ),
      True,
    ),
  ],
)
def test_where_kernels_are_taken(name, function, expected):
  needs_triton(expected)
  x = X[None] if name == 'mapped' else X
  assert lowered(function, x) == expected
  assert not lowered(function, x, platform='cpu')


@pytest.mark.parametrize('platform', ['cuda', 'cpu'])
def test_of_a_sharded_batch_devices_take_their_parts(platform):
  needs_triton(platform == 'cuda')
  x = jax.device_put(X, NamedSharding(MESH, P(None, 'batch')))
  traced = jax.jit(there_and_back).trace(x)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert ('@CustomSPMDPartitioning' in text) == (platform == 'cuda')
  assert 'triton' not in text


def test_without_triton_xla_takes_over(monkeypatch):
  monkeypatch.setattr(kernels, 'refusal_of', lambda _: OSError('no library'))
  fused._imported.cache_clear()
  with pytest.warns(UserWarning, match='Triton, which does not .* no library'):
    assert not lowered(there_and_back, X[:1])
  fused._imported.cache_clear()


def test_an_unknown_kernel_is_refused():
  with pytest.raises(ValueError, match="'xla', 'pallas', got 'cuda'"):
    neurons.run(X, kernel='cuda')


@pytest.mark.sample
@pytest.mark.parametrize('normalises', [False, True])
def test_second_derivatives_are_those_of_the_plain_scan(normalises):
  scale, bias = normal(2, 5, seed=1)

  def curvature(x, scale, kernel):
    def loss(x, scale):
      norm = None
      if normalises:
        moments = tdbn.measure(x, ())
        norm = tdbn.affine(*moments, scale, bias, x=x, axis_name=()).of(x)
      spikes, *_ = neurons.run(
        x, Parameters(norm=norm), surrogate='sigmoid', kernel=kernel
      )
      return jnp.sum(jnp.sin(x) * spikes**2)

    gradient = jax.grad(loss, (0, 1))
    return jax.grad(
      lambda *a: sum(jnp.sum(g**2) for g in gradient(*a)), (0, 1)
    )(x, scale)

  actual, expected = (
    jax.jit(curvature, static_argnums=2)(X, scale, kernel)
    for kernel in ('pallas', 'xla')
  )
  close(actual, expected, 1e-5)
