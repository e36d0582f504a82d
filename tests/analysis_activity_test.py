"""What neurons tell of themselves, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from dsatgo_jax import linen as snn
from dsatgo_jax import neurons, statistics
from dsatgo_jax import nnx as snnx
from dsatgo_jax.analysis import activity

COLLECTIONS = ['spiking', 'histograms', 'membranes']
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def normal(*shape, seed=0):
  x = np.random.default_rng(seed).normal(0.3, 1, shape)
  return jnp.asarray(x, jnp.float32)


class Net(nn.Module):
  """Two layers."""

  axis_name: object = None

  @nn.compact
  def __call__(self, x, train=True, mask=None):
    """[T, B, C] to [T, B, 5]."""
    for _ in range(2):
      x = snn.Dense(5)(x)
      x = snn.SpikingNeuron(
        use_running_average=not train, axis_name=self.axis_name
      )(x, mask=mask)
    return x


def tell(x, train=True, mask=None, **settings):
  """What the layers of a network tell, by collection."""
  net = Net(**settings)
  variables = net.init(jax.random.key(0), x)
  return net.apply(
    variables, x, train, mask, mutable=['batch_stats', *COLLECTIONS]
  )


def in_numpy(u, v, spikes, theta, width, mask):
  """The same of raw arrays [T, B, C], of what is real."""
  bounds = [-np.inf, *statistics.EDGES, np.inf]
  real = [(u[t][mask[t]], spikes[t][mask[t]]) for t in range(len(u))]
  inside = [
    np.mean(abs(u - theta[t]) < width[t] / 2) for t, (u, _) in enumerate(real)
  ]
  fired = np.where(mask[..., None], spikes, 0).any(0)[mask.any(0)]
  never = np.where(mask[..., None], spikes, 1).all(0)[mask.any(0)]
  return {
    'firing_rate': [s.mean() for _, s in real],
    'gradient_share': inside,
    'mean': [u.mean() for u, _ in real],
    'std': [u.std(ddof=1) for u, _ in real],
    'silent_share': 1 - fired.mean(),
    'always_share': never.mean(),
    'histogram': [
      np.histogram(u - theta[t], bounds)[0] / u.size
      for t, (u, _) in enumerate(real)
    ],
  }


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('masked', [False, True])
def test_equals_numpy_on_raw_arrays(train, masked):
  x = normal(4, 6, 3)
  mask = np.ones((4, 6), bool)
  if masked:
    mask = np.arange(4)[:, None] < [4, 1, 3, 0, 2, 4]
  spikes, told = tell(x, train, jnp.asarray(mask) if masked else None)
  told = {name: activity.by_layer(told[name]) for name in COLLECTIONS}
  assert list(told['spiking']) == ['SpikingNeuron_0', 'SpikingNeuron_1']
  for layer, scalars in told['spiking'].items():
    raw = {k: np.asarray(a) for k, a in told['membranes'][layer].items()}
    expected = in_numpy(
      theta=scalars['theta'], width=scalars['width'], mask=mask, **raw
    )
    histogram = told['histograms'][layer]['membrane']
    close(histogram, expected.pop('histogram'))
    close(histogram.sum(-1), 1)
    for name, value in expected.items():
      close(scalars[name], value, err_msg=name)
    before = np.concatenate([np.zeros_like(raw['v'][:1]), raw['v'][:-1]])
    assert (raw['v'] == raw['u'] * (1 - raw['spikes'])).all()
    assert before.any()
  np.testing.assert_array_equal(raw['spikes'], spikes)
  rates = activity.rates(told['spiking'])
  close(rates['SpikingNeuron_1'], scalars['firing_rate'].mean())


@pytest.mark.sample
def test_devices_tell_what_the_whole_batch_would():
  x, mask = normal(4, 8, 3), jnp.arange(4)[:, None] < jnp.arange(8) % 4 + 1
  for of_mask in (None, mask):
    _, whole = tell(x, mask=of_mask)
    del whole['membranes']
    parts = lambda a: a if a is None else jnp.stack(jnp.split(a, 4, 1))  # noqa: E731
    _, told = jax.vmap(
      functools.partial(tell, axis_name='i'),
      in_axes=(0, None, None if of_mask is None else 0),
      axis_name='i',
    )(parts(x), True, parts(of_mask))
    del told['membranes']
    for i in range(4):
      jax.tree.map(lambda a, b, i=i: close(a[i], b), told, whole)


def test_many_neurons_are_sampled():
  """Evenly, and of every example as many; the same from several devices."""
  x = normal(8, 64, 128)
  shares = statistics.histogram(x)
  exact = np.histogram(x, [-np.inf, *statistics.EDGES, np.inf])[0] / x.size
  assert statistics.sample(x, x).shape == (8, 2**11)
  np.testing.assert_allclose(shares, exact, atol=0.01)
  parts = jax.vmap(
    functools.partial(statistics.histogram, axis_name='i'), axis_name='i'
  )(x.reshape(4, 2, 64, 128))
  close(parts[0], shares)


def test_nnx_tells_the_same():
  x = normal(4, 6, 5)
  linen, nnx_neuron = snn.SpikingNeuron(), snnx.SpikingNeuron(num_steps=4)
  variables = linen.init(jax.random.key(0), x, False)
  _, told = linen.apply(
    variables, x, False, mutable=['batch_stats', *COLLECTIONS]
  )
  kinds = [snnx.CAPTURED[name] for name in COLLECTIONS]
  _, *captured = nnx.capture(nnx_neuron, *kinds)(x)
  for name, state in zip(COLLECTIONS, captured, strict=True):
    ours = activity.by_layer(state)['']
    assert ours.keys() == told[name].keys()
    for key, value in told[name].items():
      close(ours[key], value, err_msg=key)


def test_each_is_told_only_where_it_is_asked_for():
  x = normal(3, 4, 5)
  neuron = snn.SpikingNeuron(use_running_average=False)
  variables = neuron.init(jax.random.key(0), x)

  def program(*mutable):
    apply = functools.partial(neuron.apply, mutable=['batch_stats', *mutable])
    return len(str(jax.make_jaxpr(apply)(variables, x)))

  plain = program()
  assert all(program(name) > plain for name in COLLECTIONS)
  assert program('others') == plain


def test_records_that_are_not_known():
  with pytest.raises(ValueError, match="'membrane', got 'membranes'"):
    neurons.run(normal(2, 3, 4), record=['membranes'])
