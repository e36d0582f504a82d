"""The neuron over time: all ways to its gradient agree with a NumPy loop."""

import functools
import itertools
import random
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from dsatgo_jax import (
  layers,
  methods,
  neurons,
  surrogate,
  tdbn,
  threshold,
  width,
)
from dsatgo_jax.methods import Method
from dsatgo_jax.neurons import NeuronState, Parameters, Running
from tests import reference_loop
from tests.reference_loop import Settings

float64 = jax.enable_x64(True)


def close(actual, expected, tolerance=1e-12):
  """Relative to the largest entry of each array."""
  chex.assert_trees_all_equal_structs(actual, expected)
  for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    atol = tolerance * max(np.max(np.abs(b)), 1e-2)
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(0.3, 1, shape)


def pull_back(run, x, v, parameters, g_spikes, g_v):
  """What `run` gives, and the gradients of x, v and the parameters."""

  def outputs(x, v, parameters):
    state = None if v is None else NeuronState(v, jnp.int32(0))
    spikes, state, record = run(x, parameters, state=state)
    return (spikes, state.v), record

  (spikes, v), pull, record = jax.vjp(outputs, x, v, parameters, has_aux=True)
  return {'spikes': spikes, 'v': v, 'record': record}, pull((g_spikes, g_v))


# The fused backward pass, and the scan left to autodiff.
WAYS = ({}, {'fused': False})


def every_way(run, *arguments):
  """`pull_back` in all `WAYS`."""
  ways = [functools.partial(run, **way) for way in WAYS]
  return jax.jit(lambda *a: [pull_back(way, *a) for way in ways])(*arguments)


# Every method with both resets; the other options as a fixed seed draws them.
METHODS = [
  {'method': 'vanilla'},
  {'method': 'at'},
  {'method': 'at', 'threshold': 'estimated'},
  {'method': 'tgo'},
  {'method': 'tgo', 'width_signal': 'sigma'},
  {'method': 'ds_atgo'},
  {'method': 'ds_atgo', 'width_signal': 'sigma'},
  {'method': 'ds_atgo', 'threshold': 'estimated'},
  {'method': 'mpd_agl', 'tdbn_scale': (0.3, 1.2, 0.9)},
  {'method': 'learnable_threshold'},
]


def cases():
  draw = random.Random(7332)
  for method, reset in itertools.product(METHODS, ['hard', 'soft']):
    settings = Settings(
      decay=0.35,
      v_th=0.8,
      width=1.3,
      f_c=draw.choice([0.7, 1.0, 1.2]),
      surrogate=draw.choice(list(reference_loop.DENSITIES)),
      reset=reset,
      detach_reset=draw.choice([False, True]),
      **method,
    )
    start = draw.choice(['rest', 'started'])
    mode = draw.choice(['training', 'training', 'inference'])
    yield settings, start, mode, draw.choice([1, 2, 3, 5])
  yield Settings(decay=0.7), 'rest', 'training', 20


def ours(settings, running=None):
  """`run` with the loop's settings, and its `Parameters`."""
  s = settings
  scale = None if s.tdbn_scale is None else jnp.array(s.tdbn_scale)
  parameters = Parameters(s.decay, s.v_th, s.f_c, s.width, scale)
  run = functools.partial(
    neurons.run,
    method=methods.get(s.method, s.threshold, s.width_signal),
    running=running,
    surrogate=getattr(surrogate, s.surrogate),
    reset=s.reset,
    detach_reset=s.detach_reset,
  )
  return run, jax.tree.map(jnp.asarray, parameters)


def kept_in_inference(settings, num_steps):
  """Averages as the loop takes them, and as `run` does."""
  theta, signal = np.random.default_rng(2).uniform(0.3, 1.5, (2, num_steps))
  sigma = settings.width_signal == 'sigma'
  true = settings.threshold == 'true'
  adapts, follows = 'at' in settings.method, 'tgo' in settings.method
  kept = {}
  if adapts and true:
    kept['theta'] = theta
  if follows and (sigma or true):
    kept['signal'] = signal if sigma or not adapts else theta
  own = kept.get('signal') is signal
  return kept, Running(kept.get('theta'), signal if own else None)


@pytest.mark.parametrize('settings, start, mode, num_steps', list(cases()))
@float64
def test_equals_the_loop(settings, start, mode, num_steps):
  x, g_spikes = normal(2, num_steps, 4, 2, 3)
  v, g_v = normal(2, 4, 2, 3, seed=1)
  kept, running = kept_in_inference(settings, num_steps)
  if mode == 'training':
    kept = running = None
  if start == 'rest':
    v = np.zeros_like(v)
  tape = reference_loop.forward(settings, x, v, kept)
  expected = reference_loop.backward(settings, tape, v, g_spikes, g_v)

  run, parameters = ours(settings, running)
  state = v if start == 'started' else None
  for happened, gradients in every_way(
    run, x, state, parameters, g_spikes, g_v
  ):
    record = happened['record']
    np.testing.assert_array_equal(happened['spikes'], tape['spikes'])
    close(happened['v'], tape['v'][-1])
    close([record.theta, record.width], [tape['theta'], tape['width']])
    g_x, g_state, g_parameters = gradients
    close(g_x, expected['x'])
    close(g_parameters.decay, expected['decay'])
    if start == 'started':
      close(g_state, expected['v'])
    if settings.method == 'learnable_threshold':
      close(g_parameters.v_th, expected['v_th'])


# Where the loop does not reach, all ways against the plain scan.


@surrogate.custom
def gaussian(x, width):
  return jnp.exp(-jnp.pi * (x / width) ** 2) / width


# A threshold that learns from all parameters, and a width of its own signal.
OWN = Method(
  lambda statistics, p, t: p.v_th * p.f_c + t / 10 + p.decay * statistics.std,
  lambda signal, p, t: p.width * jnp.exp(-signal) + t * p.v_th,
  lambda statistics, p, t: jnp.abs(statistics.mean) + p.v_th * statistics.std,
)


@pytest.mark.parametrize('mode', ['training', 'inference'])
@pytest.mark.parametrize('reset', ['hard', 'soft'])
@float64
def test_rules_and_surrogates_of_ones_own(mode, reset):
  running = Running(*np.random.default_rng(1).uniform(0.3, 1.5, (2, 5)))
  run = functools.partial(
    neurons.run,
    method=OWN,
    surrogate=gaussian,
    reset=reset,
    running=None if mode == 'training' else running,
    record=True,
  )
  parameters = jax.tree.map(jnp.asarray, Parameters(0.3, 0.6, 0.9, 1.2))
  x, g_spikes = normal(2, 5, 4, 3)
  v, g_v = normal(2, 4, 3, seed=1)
  fused, plain = every_way(run, x, v, parameters, g_spikes, g_v)
  close(fused, plain)
  learns = fused[1][2].v_th
  assert bool(learns) == (mode == 'training')  # Averages have no gradient.


@pytest.mark.parametrize(
  'num_steps', [3, pytest.param(12, marks=pytest.mark.sample), 17]
)
@float64
def test_normalising_within_equals_normalising_before(num_steps):
  x, g_spikes = normal(2, num_steps, 4, 3)
  v, g_v = normal(2, 4, 3, seed=1)
  norm = tdbn.Affine(*jnp.asarray(normal(3, 3, seed=2)))
  run = functools.partial(neurons.run, reset='soft')

  def before(x, parameters, **settings):
    return run(parameters.norm(x), parameters._replace(norm=None), **settings)

  parameters = jax.tree.map(jnp.asarray, Parameters(0.4, norm=norm))
  expected = jax.jit(functools.partial(pull_back, before))(
    x, v, parameters, g_spikes, g_v
  )
  gradients = jax.tree.leaves(expected[1][2].norm)
  assert len(gradients) == 3 and all(g.all() for g in gradients)
  for actual in every_way(run, x, v, parameters, g_spikes, g_v):
    close(actual, expected)


@pytest.mark.sample
@pytest.mark.parametrize('num_steps', [9, 10, 16, 17, 24, 37])
@float64
def test_chunks_of_time_change_nothing(num_steps):
  x, g_spikes = normal(2, num_steps, 3, 2)
  v, g_v = normal(2, 3, 2, seed=1)
  parameters = jax.tree.map(jnp.asarray, Parameters(0.6))
  run = functools.partial(neurons.run, method='tgo', record=True)
  fused, plain = every_way(run, x, v, parameters, g_spikes, g_v)
  close(fused, plain)


@pytest.mark.parametrize('num_steps', [4, 5, 7, 11, 16, 23])
@pytest.mark.parametrize(
  'spike',
  [surrogate.rectangular, lambda x, width: jax.nn.sigmoid(x / width)],
  ids=['step', 'graded'],
)
def test_spikes_without_measuring(num_steps, spike):
  """They may go by way of bits; those of a graded function may not."""
  (x,) = normal(1, num_steps, 3, 2)
  run = functools.partial(
    neurons.run, running=Running(jnp.linspace(0.2, 0.8, num_steps))
  )
  for dtype in (jnp.float32, jnp.bfloat16):
    fused, plain = (
      jax.jit(functools.partial(run, surrogate=spike, dtype=dtype, fused=f))(x)
      for f in (True, False)
    )
    assert 0 < fused[0].mean() < 1 and fused[0].dtype == dtype
    chex.assert_trees_all_close(fused, plain, rtol=1e-6)


def test_keeps_no_membrane_for_the_backward_pass():
  """Memory grows by the chunks' starts, not by the membrane of each step."""

  def arrays(num_steps, **settings):
    x = jax.ShapeDtypeStruct((num_steps, 16, 512), jnp.float32)

    def there_and_back(x, g):
      spikes, pull = jax.vjp(lambda x: neurons.run(x, **settings)[0], x)
      return spikes, pull(g)

    compiled = jax.jit(there_and_back).lower(x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * 16 * 512)

  assert arrays(64) < 40
  assert arrays(64, fused=False) > 128


def layer_and_gradients(x, decay, learn_decay, **settings):
  """Spikes and the cotangents of x, and of decay where it is learnt."""
  run = lambda x, decay: neurons.run(x, Parameters(decay), **settings)[0]  # noqa: E731
  spikes, pull = jax.vjp(run, x, decay)
  return spikes, pull(x)[: 2 if learn_decay else 1]


@pytest.mark.parametrize('method', ['ds_atgo', 'vanilla'])
@pytest.mark.parametrize(
  'run',
  [
    functools.partial(layer_and_gradients, learn_decay=True),
    functools.partial(layer_and_gradients, learn_decay=False),
    lambda x, decay, method: neurons.run(
      x, Parameters(decay), method, running=Running(jnp.ones(len(x)))
    )[0],
  ],
  ids=['PLIF', 'LIF', 'inference'],
)
def test_no_timestep_is_computed_for_each_after_it(run, method):
  """XLA's CPU compiler would do so where it writes the outputs of all t."""

  def depth(num_steps):
    """Operations in the longest chain that ends in a concatenation."""
    x = jax.ShapeDtypeStruct((num_steps, 16, 512), jnp.float32)
    decay = jax.ShapeDtypeStruct((), jnp.float32)
    program = jax.jit(functools.partial(run, method=method)).lower(x, decay)
    *loops, _ = re.split('\n(?:%|ENTRY)', program.compile().as_text())
    depths = {}
    for line in '\n'.join(a for a in loops if ' concatenate(' in a).split('\n'):
      if match := re.match(r' +(?:ROOT )?(%\S+) = .*? [a-z-]+\((.*?)\)', line):
        name, operands = match.groups()
        before = [depths[o] for o in re.findall(r'%[^\s,]+', operands)]
        depths[name] = 1 + max(before, default=0)
    return max(depths.values())

  assert depth(16) < 1.5 * depth(4)


@pytest.mark.parametrize('method', ['ds_atgo', 'tgo', 'learnable_threshold'])
@float64
def test_parts_of_a_batch_equal_the_whole(method):
  """Both ways, with the statistics pooled over a mapped axis."""
  x, g_spikes = normal(2, 3, 4, 2, 3)
  v, g_v = normal(2, 4, 2, 3, seed=1)
  parameters = jax.tree.map(jnp.asarray, Parameters())
  run = functools.partial(neurons.run, method=method, record=True)
  _, whole = every_way(run, x, v, parameters, g_spikes, g_v)
  parts = functools.partial(
    every_way, functools.partial(run, axis_name='batch')
  )

  mapped = jax.vmap(parts, (1, 0, None, 1, 0), axis_name='batch', axis_size=4)(
    x, v, parameters, g_spikes, g_v
  )
  for happened, (g_x, g_v_0, g_parameters) in mapped:
    actual = {
      'spikes': jnp.moveaxis(happened['spikes'], 0, 1),
      'v': happened['v'],
      'record': jax.tree.map(lambda a: a[0], happened['record']),
    }
    pooled = jax.tree.map(lambda a: a.sum(0), g_parameters)
    close((actual, (jnp.moveaxis(g_x, 0, 1), g_v_0, pooled)), whole)


# Gradient paths by hand: two neurons, two timesteps, theta = 1, width = 2, so
# that 1 / width = 0.5 in the whole window; u = [1.2, 0.6] and [0.8, 1.2] (soft:
# [0.9, 1.2]). Cotangents: spikes [1, 2] and [3, 4], the last v [5, 6].
@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize(
  'reset, detach, first, second, decay, v_th',
  [
    ('hard', False, [-0.85, 0.44], [4.5, -1.6], -0.96, 1.71),
    ('hard', True, [0.5, 2.0], [6.5, 2.0], 1.2, -5.0),
    ('soft', False, [1.5, 2.25], [4.0, 5.0], 3.8, -5.25),
    ('soft', True, [3.75, 5.0], [6.5, 8.0], 6.1, -14.25),
  ],
)
def test_gradient_paths_by_hand(
  fused, reset, detach, first, second, decay, v_th
):
  x = jnp.array([[1.2, 0.6], [0.8, 0.9]])
  run = functools.partial(
    neurons.run,
    method='learnable_threshold',
    reset=reset,
    detach_reset=detach,
    fused=fused,
  )
  parameters = Parameters(decay=0.5, v_th=1.0, width=2.0)
  happened, (g_x, _, g_parameters) = jax.jit(functools.partial(pull_back, run))(
    x, None, parameters, jnp.array([[1.0, 2], [3, 4]]), jnp.array([5.0, 6])
  )
  chex.assert_trees_all_equal(happened['spikes'], jnp.array([[1.0, 0], [0, 1]]))
  np.testing.assert_allclose(g_x, [first, second], rtol=1e-5)
  assert g_parameters.decay == pytest.approx(decay, rel=1e-5)
  assert g_parameters.v_th == pytest.approx(v_th, rel=1e-5)


def test_no_gradient_through_the_statistics_or_outside_the_window():
  """A neuron far from theta moves theta, but passes nothing by that way."""
  x = jnp.array([[0.0, 0.1, 0.2, 9.0]])
  gradient = jax.grad(lambda x: neurons.run(x)[0].sum())(x)
  assert not gradient.any()


@pytest.mark.parametrize('fused', [True, False])
@float64
def test_subtracting_after_the_decay(fused):
  """`u[t] = decay * u[t-1] + x[t] - theta * s[t-1]`, with its gradients."""
  x, g_spikes = jnp.asarray(normal(2, 5, 4, 3))

  def before_the_reset(x, decay, v_th):
    u = spikes = jnp.zeros((4, 3))
    outputs = []
    for x_t in x:
      u = decay * u + x_t - v_th * spikes
      spikes = surrogate.arctan(u - v_th, 1.3)
      outputs.append(spikes)
    return jnp.stack(outputs)

  def ours(x, decay, v_th):
    spikes, _, _ = neurons.run(
      x,
      Parameters(decay, v_th, width=1.3),
      'learnable_threshold',
      surrogate=surrogate.arctan,
      reset='subtract_after_decay',
      fused=fused,
    )
    return spikes

  for run in (before_the_reset, ours):
    spikes, pull = jax.vjp(run, x, 0.7, 0.8)
    results = spikes, pull(g_spikes)
    if run is before_the_reset:
      expected = results
  assert 0.1 < spikes.mean() < 0.9
  close(results, expected)


# Numbers that are not scalars.


@pytest.mark.parametrize('reset', ['hard', 'soft', 'subtract_after_decay'])
@float64
def test_a_number_per_channel(reset):
  """Each channel is a layer of its own, its gradients too."""
  x, g_spikes = normal(2, 5, 4, 3)
  v, g_v = normal(2, 4, 3, seed=1)
  run = functools.partial(
    neurons.run,
    method='learnable_threshold',
    reset=reset,
    surrogate=surrogate.sigmoid,
  )
  f_c = jnp.float64(1)
  numbers = list(jnp.array([[0.3, 0.9, 0.5], [0.4, 0.9, 1.1], [0.6, 1.4, 1.0]]))
  whole = every_way(
    run, x, v, Parameters(*numbers[:2], f_c, numbers[2]), g_spikes, g_v
  )
  for c in range(3):
    here = slice(c, c + 1)
    decay, v_th, width = (n[c] for n in numbers)
    (happened, gradients), _ = every_way(
      run, *(a[..., here] for a in (x, v)),
      Parameters(decay, v_th, f_c, width), g_spikes[..., here], g_v[..., here],
    )  # fmt: skip
    for all_happened, all_gradients in whole:
      close(all_happened['spikes'][..., here], happened['spikes'])
      close(all_happened['record'].theta[..., c], happened['record'].theta)
      g_x, g_state, g_parameters = all_gradients
      close((g_x[..., here], g_state[..., here]), gradients[:2])
      for name in ('decay', 'v_th'):
        close(getattr(g_parameters, name)[c], getattr(gradients[2], name))


@pytest.mark.parametrize('shape', [(3,), (2, 1), (1, 2, 3), (4, 1, 1)])
@pytest.mark.parametrize('method', ['ds_atgo', 'tgo', 'mpd_agl', OWN])
@float64
def test_numbers_that_broadcast(method, shape):
  x, g_spikes = normal(2, 3, 4, 2, 3)
  v, g_v = normal(2, 4, 2, 3, seed=1)
  numbers = np.random.default_rng(2).uniform(0.3, 0.9, (4, *shape))
  parameters = Parameters(*map(jnp.asarray, numbers), jnp.ones(3))
  run = functools.partial(
    neurons.run, method=method, record=True, surrogate=surrogate.arctan
  )
  fused, plain = every_way(run, x, v, parameters, g_spikes, g_v)
  close(fused, plain)
  assert fused[1][2].decay.shape == shape and fused[1][2].decay.all()
  if method == 'ds_atgo':
    u = numbers[0] * v + x[0]
    theta = numbers[2] * (u.mean() + u.std(ddof=1))
    close(fused[0]['record'].theta[0], jnp.asarray(theta))
    inference = neurons.run(
      x, parameters, running=Running(fused[0]['record'].theta),
      state=NeuronState(v, 0),
    )  # fmt: skip
    close(inference[0], fused[0]['spikes'])


# Padding.


@pytest.mark.parametrize('method', ['ds_atgo', 'tgo'])
@float64
def test_masked_recordings_have_the_statistics_of_what_is_real(method):
  """Of each timestep's real examples; fused, plain and by the loop."""
  x, g_spikes = normal(2, 4, 5, 3)
  v, g_v = normal(2, 5, 3, seed=1)
  mask = np.arange(4)[:, None] < [4, 2, 3, 2, 4]
  parameters = jax.tree.map(jnp.asarray, Parameters(0.6))
  run = functools.partial(
    neurons.run, method=method, mask=jnp.asarray(mask), record=True
  )
  fused, plain = every_way(run, x, v, parameters, g_spikes, g_v)
  close(fused, plain)
  happened, _ = fused
  # The recordings one by one, each with the levels of all.
  record = happened['record']
  u, now = [], v
  for t in range(4):
    u.append(0.6 * now + x[t])
    now = np.where(happened['spikes'][t], 0, u[-1])
    real = u[-1][mask[t]]
    level = real.mean() + real.std(ddof=1)
    signal = record.theta if method == 'ds_atgo' else record.signal
    assert float(signal[t]) == pytest.approx(level, rel=1e-12)
    fired = np.asarray(happened['spikes'][t])[mask[t]]
    assert float(record.firing_rate[t]) == pytest.approx(fired.mean())


def test_a_mask_over_a_mapped_axis():
  """Devices with different numbers of real examples pool to the whole."""
  x = jnp.float32(normal(3, 4, 2, 5))
  mask = jnp.array([[1, 1], [0, 1], [0, 0], [1, 0]], bool)
  run = functools.partial(neurons.run, record=True)
  spikes, _, record = run(x.reshape(3, 8, 5), mask=mask.reshape(8))
  parts, _, pooled = jax.vmap(
    lambda x, mask: run(x, mask=mask, axis_name='batch'),
    (1, 0),
    axis_name='batch',
  )(x, mask)
  close(jnp.moveaxis(parts, 0, 1).reshape(spikes.shape), spikes)
  for i in range(4):
    close(jax.tree.map(lambda a, i=i: a[i], pooled), record, 1e-5)


@pytest.mark.parametrize('num_steps', [3, 18])
@float64
def test_recorded_membranes_have_gradients(num_steps):
  """For a loss on them; in both ways of the scan."""
  x, weights = normal(2, num_steps, 4, 3)

  def loss(x, decay, fused):
    spikes, _, record = neurons.run(
      x, Parameters(decay), record=['membrane'], fused=fused
    )
    return jnp.sum(weights * (spikes + record.u**2 + jnp.sin(record.v)))

  gradients = [
    jax.jit(jax.grad(functools.partial(loss, fused=fused), (0, 1)))(
      jnp.asarray(x), 0.6
    )
    for fused in (True, False)
  ]
  close(*gradients)
  # By the last timestep alone: u and v are neither reset nor leak again.
  last = jax.grad(lambda x: neurons.run(x, record=['membrane'])[2].u[-1].sum())(
    jnp.asarray(x)
  )
  np.testing.assert_array_equal(last[-1], 1)


# Second derivatives.


@pytest.mark.sample
@pytest.mark.parametrize(
  'method, spike, reset, detach',
  [
    ('ds_atgo', surrogate.rectangular, 'hard', False),
    ('ds_atgo', surrogate.triangular, 'soft', False),
    ('learnable_threshold', surrogate.arctan, 'hard', False),
    pytest.param(OWN, gaussian, 'soft', True, marks=pytest.mark.sample),
  ],
)
@float64
def test_hessian_is_that_of_the_straight_through_twin(
  method, spike, reset, detach
):
  x, weights = normal(3, 2, 3), normal(6, 18, seed=1)
  point = (x, normal(2, 3, seed=2), jnp.array(0.4), jnp.array(0.7))
  flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, point))

  def loss(flat, spike, way):
    x, v, decay, v_th = unravel(flat)
    spikes, state, _ = neurons.run(
      x,
      Parameters(decay, v_th, width=1.5),
      method,
      state=NeuronState(v, jnp.int32(0)),
      surrogate=spike,
      reset=reset,
      detach_reset=detach,
      **way,
    )
    return jnp.sum(jnp.sin(weights @ spikes.ravel())) + jnp.sum(state.v**3)

  @jax.jit
  def hessians(flat):
    reverse = [jax.jacrev(jax.grad(loss))(flat, spike, way) for way in WAYS]
    twin = surrogate.straight_through(spike)
    return *reverse, jax.hessian(loss)(flat, twin, {'fused': False})

  *reverse, twin = hessians(flat)
  assert np.linalg.norm(twin) > 1
  for hessian in reverse:
    close(hessian, twin)
  if not detach:  # A cut path leaves no gradient of a scalar.
    close(twin, twin.T)


# State and time.


@pytest.mark.parametrize(
  'method, mode',
  [
    ('ds_atgo', 'training'),
    ('ds_atgo', 'inference'),
    ('tgo', 'inference'),
    ('mpd_agl', 'training'),
    (OWN, 'training'),
    (OWN, 'inference'),
  ],
)
def test_chunks_and_steps_equal_the_whole(method, mode):
  x = jnp.float32(normal(5, 3, 4))
  levels = np.random.default_rng(0).uniform(0.3, 1.5, (2, 5))
  running = Running(*jnp.float32(levels)) if mode == 'inference' else None

  @functools.partial(jax.jit, static_argnums=0)
  def part(function, x, running, state):
    first = (state,) if function is neurons.step else ()
    last = {} if first else {'state': state}
    parameters = Parameters(tdbn_scale=jnp.ones(4))
    return function(
      *first, x, parameters, method, running=running, record=True, **last
    )

  def pieces(function, indices, join):
    """State handed on from piece to piece, the rest joined."""
    state, outputs = None, []
    for i in indices:
      here = jax.tree.map(lambda a, i=i: a[i], (x, running))
      spikes, state, record = part(function, *here, state)
      outputs.append((spikes, record))
    spikes, record = jax.tree.map(lambda *a: join(a), *outputs)
    return spikes, state, record

  whole = part(neurons.run, x, running, None)
  assert whole[1].t == 5 and whole[1].t.dtype == jnp.int32
  chunks = [slice(0, 2), slice(2, 3), slice(3, 5)]
  close(pieces(neurons.run, chunks, jnp.concatenate), whole, 1e-6)
  close(pieces(neurons.step, range(5), jnp.stack), whole, 1e-6)


@float64
def test_record():
  x = normal(4, 5, 6)
  settings = Settings()
  tape = reference_loop.forward(settings, x)
  run, parameters = ours(settings)
  record = run(x, parameters, record=True)[2]
  distance = abs(tape['u'] - tape['theta'][:, None, None])
  inside = distance < tape['width'][:, None, None] / 2
  expected = {
    'theta': tape['theta'],
    'width': tape['width'],
    'mean': tape['mean'],
    'std': tape['std'],
    'firing_rate': tape['spikes'].mean((1, 2)),
    'gradient_share': inside.mean((1, 2)),
  }
  close(record.scalars(), jax.tree.map(jnp.asarray, expected))
  unrecorded = run(x, parameters)[2]
  assert unrecorded.firing_rate is None and unrecorded.gradient_share is None

  def levels(x):
    return sum(
      map(jnp.sum, run(x, parameters, record=True)[2].scalars().values())
    )

  assert not jax.grad(levels)(x).any()


@pytest.mark.parametrize(
  'dtype, kept', [('bfloat16', 'float32'), ('float64', 'float64')]
)
@float64
def test_dtypes(dtype, kept):
  """Membrane and levels in float32 at least; spikes as x, or as asked."""
  x = jnp.asarray(normal(2, 3, 4), dtype)

  @jax.jit
  def run(x):
    def loss(x):
      spikes, state, record = neurons.run(x)
      return jnp.sum(spikes, dtype=kept), (spikes, state, record)

    other, _, _ = neurons.run(x, dtype=jnp.float16)
    return *jax.grad(loss, has_aux=True)(x), other

  gradient, (spikes, state, record), other = run(x)
  assert spikes.dtype == gradient.dtype == dtype and gradient.any()
  assert state.v.dtype == record.theta.dtype == record.width.dtype == kept
  assert neurons.at_rest(x[0]).v.dtype == kept
  assert other.dtype == jnp.float16
  first = np.asarray(x[0], kept)
  theta = np.mean(first) + np.std(first, ddof=1)
  assert float(record.theta[0]) == pytest.approx(theta, rel=1e-6)


def test_what_is_averaged_and_where_it_starts():
  at, tgo, both, none = (
    layers.averaged(methods.get(*name))
    for name in (
      ('at',), ('tgo',), ('ds_atgo', 'true', 'sigma'), ('learnable_threshold',)
    )
  )  # fmt: skip
  assert at == {'threshold': threshold.adaptive}
  assert tgo == {'signal': threshold.adaptive}
  assert both == at | {'signal': width.deviation} and none == {}
  parameters, x = Parameters(v_th=0.5, f_c=(1.0, 0.9)), jnp.ones((4, 2))
  average = layers.initial_average(threshold.adaptive, parameters, (3,), x)
  chex.assert_trees_all_equal(average, jnp.full((3, 2), 0.5))
  parameters = Parameters(v_th=np.array([0.25, 0.75]))
  average = layers.initial_average(threshold.adaptive, parameters, (3,), x)
  chex.assert_trees_all_equal(average, jnp.full(3, 0.5))
  average = layers.initial_average(width.deviation, parameters, (), x)
  chex.assert_trees_all_equal(average, jnp.float32(0.5))


def test_no_retracing_for_other_numbers():
  @jax.jit
  @chex.assert_max_traces(n=1)
  def train(x, parameters, state):
    return jax.grad(lambda x: neurons.run(x, parameters, state=state)[0].sum())(
      x
    )

  x = jnp.float32(normal(2, 3, 4))
  for i in range(3):
    state = NeuronState(x[0] + i, jnp.int32(i))
    train(x + i, Parameters(decay=0.1 + i / 10, width=1.0 + i), state)


# Errors.


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'x': jnp.ones(3)}, r'x \[T, B, ...\], got float32\[3\]'),
    ({'x': jnp.ones((0, 3))}, r'x \[T, B, ...\], got float32\[0, 3\]'),
    ({'x': jnp.ones((2, 3, 4), complex)}, r'real .*complex64\[2, 3, 4\]'),
    ({'reset': 'none'}, "'hard', 'soft', .* got reset='none'"),
    ({'method': 'dsatgo'}, "method='dsatgo'"),
    ({'parameters': Parameters(decay=np.ones(3))}, r'decay .*x\[0\].*\(3,\)'),
    ({'parameters': Parameters(v_th=jnp.array([1.0, 0, 1, 1]))}, 'v_th > 0'),
    (
      {
        'parameters': Parameters(tdbn_scale=jnp.array([1.0, -2])),
        'method': 'mpd_agl',
      },
      'mean of tdbn_scale > 0, got .*-0.5',
    ),
    (
      {'parameters': Parameters(0.0), 'reset': 'subtract_after_decay'},
      'decay > 0, got decay=0.0',
    ),
    ({'mask': np.ones(4)}, r'\[T, B\] or \[B\].*\(2, 3, 4\).*\(4,\)'),
    ({'parameters': Parameters(v_th=0)}, 'v_th > 0, got v_th=0'),
    ({'parameters': Parameters(f_c=-0.5)}, 'f_c > 0, got f_c=-0.5'),
    ({'parameters': Parameters(width=0.0)}, 'width > 0, got width=0.0'),
    ({'parameters': Parameters(width=np.nan)}, 'width > 0, got width=nan'),
    (
      {'state': NeuronState(jnp.zeros((5, 4)), 0)},
      r'shape \(3, 4\), got .*\(5, 4\)',
    ),
    (
      {'running': Running(jnp.ones(3))},
      r'running threshold for the 2 timesteps.*\(3,\)',
    ),
    (
      {'running': Running(signal=jnp.ones(1)), 'method': 'tgo'},
      r'running signal for the 2 timesteps.*\(1,\)',
    ),
    ({'x': jnp.ones((2, 1, 1))}, 'at least two neurons'),
  ],
)
def test_errors(arguments, message):
  with pytest.raises(ValueError, match=message):
    neurons.run(**{'x': jnp.ones((2, 3, 4))} | arguments)
