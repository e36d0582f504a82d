"""JAX's own checks, on a training step and an inference of both modules."""

import contextlib
import functools
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from dsatgo_jax import linen as snn
from dsatgo_jax import nnx as snnx


class Linen(nn.Module):
  """All layers of the library, once."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train: bool):
    """[T, B, H, W, C] to logits [T, B, K]."""
    mode = {'use_running_average': not train}
    x = snn.Conv(4, (3, 3), dtype=self.dtype)(x)
    norm = snn.TdBatchNorm(**mode).affine(x)
    x = snn.SpikingNeuron(num_steps=3, **mode)(x, norm=norm)
    x = snn.TdBatchNorm(use_bias=False, dtype=self.dtype, **mode)(x)
    x = snn.SpikingNeuron('learnable_threshold', fused=False, **mode)(x)
    x = snn.max_pool(x, (2, 2)).mean((2, 3))
    x = snn.SpikingRNN('tgo', surrogate='arctan', reset='soft', **mode)(x)
    return snn.LeakyIntegrator()(snn.Dense(5, dtype=self.dtype)(x))


class Nnx(nnx.Module):
  """The same."""

  def __init__(self, rngs, dtype=jnp.float32):
    self.conv = snnx.Conv(2, 4, (3, 3), dtype=dtype, rngs=rngs)
    self.norm1 = snnx.TdBatchNorm(4)
    self.neuron1 = snnx.SpikingNeuron(num_steps=3)
    self.norm2 = snnx.TdBatchNorm(4, use_bias=False, dtype=dtype)
    self.neuron2 = snnx.SpikingNeuron('learnable_threshold', fused=False)
    self.rnn = snnx.SpikingRNN(
      4, 'tgo', num_steps=3, surrogate='arctan', reset='soft', rngs=rngs
    )
    self.dense = snnx.Dense(4, 5, dtype=dtype, rngs=rngs)
    self.readout = snnx.LeakyIntegrator()

  def __call__(self, x):
    """[T, B, H, W, C] to logits [T, B, K]."""
    x = self.conv(x)
    x = self.neuron1(x, norm=self.norm1.affine(x))
    x = self.neuron2(self.norm2(x))
    x = snnx.max_pool(x, (2, 2)).mean((2, 3))
    return self.readout(self.dense(self.rnn(x)))


@functools.cache
def made(module, dtype):
  """A step of gradients and inference, and what it takes besides x."""
  dtype = jnp.dtype(dtype)
  if module == 'nnx':
    return nnx_step, nnx.split(Nnx(nnx.Rngs(0), dtype))
  net, x = Linen(dtype), jnp.zeros((3, 2, 4, 4, 2), dtype)
  variables = net.init(jax.random.key(0), x, False)
  return functools.partial(linen_step, net), variables


def linen_step(net, variables, x):
  def loss(params):
    y, updates = net.apply(
      variables | {'params': params}, x, True, mutable=['batch_stats']
    )
    return jnp.sum(y, dtype=jnp.float32), updates

  gradient, updates = jax.grad(loss, has_aux=True)(variables['params'])
  return gradient, updates, net.apply(variables, x, False)


def nnx_step(made, x):
  module = nnx.merge(*made)
  gradient = nnx.grad(lambda m: jnp.sum(m(x), dtype=jnp.float32))(module)
  module.eval()
  return gradient, nnx.state(module, nnx.BatchStat), module(x)


FLAGS = {
  'strict dtypes': (lambda: jax.numpy_dtype_promotion('strict'), 'bfloat16'),
  'infs': (lambda: jax.debug_infs(True), 'float32'),
  'leaks': (jax.checking_leaks, 'float32'),
  'transfers': (lambda: jax.transfer_guard('disallow'), 'float32'),
}


@pytest.mark.sample
@pytest.mark.parametrize(
  'flag',
  [
    'strict dtypes',
    *(pytest.param(flag, marks=pytest.mark.sample) for flag in list(FLAGS)[1:]),
  ],
)
@pytest.mark.parametrize('module', ['linen', 'nnx'])
def test_a_step_under(flag, module):
  context, dtype = FLAGS[flag]
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(3, 2, 4, 4, 2)), dtype)
  step, variables = made(module, dtype)
  step = jax.jit(step)
  with context():
    results = jax.block_until_ready(step(variables, x))
  chex.assert_tree_all_finite(jax.tree.map(jnp.float32, results))
  assert results[-1].dtype == dtype


@pytest.mark.sample
@pytest.mark.parametrize('module', ['linen', 'nnx'])
def test_float64_of_numpy_gives_no_warning(module):
  x = np.random.default_rng(0).normal(size=(3, 2, 4, 4, 2))
  step, variables = made(module, 'float32')
  with contextlib.ExitStack() as stack:
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter('error')
    y = step(variables, x)[-1]
  assert y.dtype == jnp.float32
