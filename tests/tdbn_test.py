"""tdBN: a NumPy computation, one image or T copies, the whole or its parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dsatgo_jax import linen, nnx, tdbn

float64 = jax.enable_x64(True)
close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(0.5, 2, shape)


def through_linen(x, scale, bias, train, **settings):
  """Output, and running mean and variance after it."""
  norm = linen.TdBatchNorm(**settings)
  start = {'mean': jnp.full(3, 0.1), 'var': jnp.full(3, 1.7)}
  variables = {'params': {'scale': scale, 'bias': bias}, 'batch_stats': start}
  y, after = norm.apply(variables, x, not train, mutable=['batch_stats'])
  return y, *jax.tree.leaves(after or start)


def through_nnx(x, scale, bias, train, **settings):
  norm = nnx.TdBatchNorm(3, **settings)
  norm.scale[...], norm.bias[...] = scale, bias
  norm.mean[...], norm.var[...] = jnp.full(3, 0.1), jnp.full(3, 1.7)
  norm.train() if train else norm.eval()
  return norm(x), norm.mean[...], norm.var[...]


faces = pytest.mark.parametrize('through', [through_linen, through_nnx])


@faces
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('factored', [False, True])
@float64
def test_equals_numpy(through, train, factored):
  x, scale, bias = normal(4, 5, 2, 2, 3), normal(3, seed=1), normal(3, seed=2)
  y, mean, var = through(
    x, scale, bias, train, alpha=0.7, v_th=0.5, factored=factored,
    epsilon=1e-3, momentum=0.8, param_dtype=np.float64,
  )  # fmt: skip
  used = expected = np.full(3, 0.1), np.full(3, 1.7)
  if train:
    n = 4 * 5 * 2 * 2
    used = np.mean(x, (0, 1, 2, 3)), np.var(x, (0, 1, 2, 3))
    unbiased = used[0], used[1] * n / (n - 1)
    expected = [
      0.8 * old + 0.2 * new for old, new in zip(expected, unbiased, strict=True)
    ]
  factor = 0.35 if factored else 1
  close(y, factor * scale * (x - used[0]) / np.sqrt(used[1] + 1e-3) + bias)
  close(mean, expected[0])
  close(var, expected[1])


@pytest.mark.parametrize('factored', [False, True])
def test_starts_with_deviation_alpha_v_th(factored):
  norm = linen.TdBatchNorm(False, alpha=0.5, v_th=3.0, factored=factored)
  x = jnp.float32(normal(4, 50, 3))
  variables = norm.init(jax.random.key(0), x)
  start = 1 if factored else 1.5
  np.testing.assert_array_equal(variables['params']['scale'], start)
  assert variables['batch_stats']['var'].tolist() == [1, 1, 1]
  y, _ = norm.apply(variables, x, mutable=['batch_stats'])
  np.testing.assert_allclose(y.std((0, 1)), 1.5, rtol=1e-4)


@faces
@pytest.mark.parametrize('num_steps', [2, 5])
@float64
def test_repeats_stand_for_copies(through, num_steps):
  """Output, gradients and running statistics are those of T real copies."""
  image, weights = normal(4, 2, 2, 3), normal(num_steps, 4, 2, 2, 3, seed=1)

  @functools.partial(jax.jit, static_argnums=(2, 3))
  @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
  def gradient(x, scale, repeats, shape):
    x = jnp.broadcast_to(x, (*shape, *x.shape))
    y, *running = through(
      x, scale, jnp.zeros(3), True, repeats=repeats, param_dtype=np.float64
    )
    return jnp.sum(jnp.sin(y) * weights), running

  scale = normal(3, seed=2)
  once = gradient(image, scale, num_steps, ())
  copied = gradient(image, scale, 1, (num_steps,))
  jax.tree.map(close, once, copied)
  _, (_, uncounted) = gradient(image, scale, 1, ())
  assert abs(uncounted - once[1][1]).min() > 1e-3


class Linen(linen.nn.Module):
  """tdBN and a neuron, which normalises by itself or not."""

  within: bool

  @linen.nn.compact
  def __call__(self, x):
    """[T, B, H, W, C] to spikes."""
    norm = linen.TdBatchNorm(False, param_dtype=np.float64)
    neuron = linen.SpikingNeuron(use_running_average=False)
    if self.within:
      return neuron(x, norm=norm.affine(x))
    return neuron(norm(x))


def outputs_of_linen(within, x):
  net = Linen(within)
  variables = net.init(jax.random.key(0), x)
  params = jax.tree.map(lambda p: p + 0.1, variables.pop('params'))

  def run(params, x):
    return net.apply({'params': params, **variables}, x, mutable='batch_stats')

  return run, params


def outputs_of_nnx(within, x):
  del x
  graph, params, stats = nnx.nnx.split(
    nnx.nnx.Dict(
      norm=nnx.TdBatchNorm(3, param_dtype=np.float64),
      neuron=nnx.SpikingNeuron(num_steps=4),
    ),
    nnx.nnx.Param,
    ...,
  )

  def run(params, x):
    net = nnx.nnx.merge(graph, params, stats, copy=True)
    if within:
      y = net.neuron(x, norm=net.norm.affine(x))
    else:
      y = net.neuron(net.norm(x))
    return y, nnx.nnx.state(net, nnx.nnx.BatchStat)

  return run, jax.tree.map(lambda p: p + 0.1, params)


@pytest.mark.parametrize('outputs_of', [outputs_of_linen, outputs_of_nnx])
@float64
def test_a_neuron_normalises_as_tdbn_before_it(outputs_of):
  """Spikes, running values and gradients; the neuron is given `affine`."""
  x, weights = normal(4, 5, 2, 2, 3), normal(4, 5, 2, 2, 3, seed=1)

  def everything(within):
    run, params = outputs_of(within, x)
    spikes, pull, stats = jax.vjp(run, params, x, has_aux=True)
    return spikes, stats, pull(weights)

  within, before = map(jax.jit(everything, static_argnums=0), (True, False))
  assert all(g.any() for g in jax.tree.leaves(before[2]))
  jax.tree.map(close, within, before)


OVER_DEVICES = {
  'vmap': lambda f: jax.vmap(f, axis_name='batch'),
  'pmap': lambda f: jax.pmap(f, axis_name='batch'),
  'shard_map': lambda f: jax.jit(
    jax.shard_map(
      f,
      mesh=jax.make_mesh((4,), ('batch',), axis_types=(AxisType.Auto,)),
      in_specs=P('batch'),
      out_specs=P(),
    )
  ),
}


@pytest.mark.parametrize(
  'over_devices', OVER_DEVICES.values(), ids=OVER_DEVICES
)
def test_devices_pool_to_the_whole_batch(over_devices):
  measure = over_devices(functools.partial(tdbn.measure, axis_name='batch'))
  far = 3000 + normal(4, 8, 20, 20, 3)
  far[1] += 500
  x = far.astype(np.float32)
  mean, var = measure(x)
  expected = x.astype(np.float64).reshape(-1, 3)
  np.testing.assert_allclose(mean, expected.mean(0) + 0 * mean, rtol=1e-6)
  np.testing.assert_allclose(var, expected.var(0) + 0 * var, rtol=1e-4)
  with jax.enable_x64(True):
    mean, var = map(np.asarray, measure(far))
  close(mean, far.reshape(-1, 3).mean(0) + 0 * mean)
  close(var, far.reshape(-1, 3).var(0) + 0 * var, rtol=1e-11)


@float64
def test_derivatives_of_the_statistics():
  """First and second are those of mean and variance, in parts as well."""
  x = normal(4, 2, 1)

  def loss(measure, x):
    mean, var = measure(x)
    return jnp.sum(jnp.sin(mean) * jnp.sqrt(var))

  def parts(x):
    pool = functools.partial(tdbn.measure, axis_name='batch')
    return jax.tree.map(lambda a: a[0], jax.vmap(pool, axis_name='batch')(x))

  def plain(x):
    return jnp.mean(x, (0, 1)), jnp.var(x, (0, 1))

  for derivative in (jax.grad, jax.hessian):
    expected, *ours = (
      jax.jit(derivative(functools.partial(loss, measure)))(x)
      for measure in (plain, tdbn.measure, parts)
    )
    assert abs(expected).max() > 0.01
    for gradient in ours:
      close(gradient, expected)


@faces
def test_bfloat16(through):
  x = jnp.asarray(normal(4, 50, 3), jnp.bfloat16)
  ones, zeros = jnp.ones(3, jnp.bfloat16), jnp.zeros(3, jnp.bfloat16)
  y, mean, var = through(
    x, ones, zeros, True, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
  )
  assert y.dtype == jnp.bfloat16
  assert mean.dtype == var.dtype == jnp.float32
  exact = np.asarray(x, np.float64)
  np.testing.assert_allclose(mean, 0.09 + 0.1 * exact.mean((0, 1)), rtol=1e-5)
  normalized = (exact - exact.mean((0, 1))) / exact.std((0, 1))
  np.testing.assert_allclose(np.float64(y), normalized, rtol=0.01, atol=0.01)


@faces
@pytest.mark.parametrize('setting', [{'alpha': 0.0}, {'v_th': -1.0}])
def test_errors(through, setting):
  ((name, value),) = setting.items()
  with pytest.raises(ValueError, match=f'{name} > 0, got {name}={value}'):
    through(jnp.ones((2, 2, 3)), jnp.ones(3), jnp.ones(3), True, **setting)
