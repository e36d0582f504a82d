"""Other libraries' spiking layers, forward and backward, ready to be timed.

Each function takes the input [T, B, H, W, C] and the cotangent of the spikes as
NumPy arrays, and returns a function that blocks until its work is done. The
imports are inside, so that a library that is missing can be told.
"""

import jax
import jax.numpy as jnp


def in_jax(run, *arguments):
  """A jitted function of pytrees, ready to be timed."""
  run = jax.jit(run)
  arguments = jax.tree.map(jnp.asarray, arguments)
  return lambda: jax.block_until_ready(run(*arguments))


def there_and_back(layer):
  """Spikes of `layer(x, parameters)`, and the cotangents of both."""

  def run(x, cotangent, parameters):
    spikes, pull = jax.vjp(layer, x, parameters)
    return spikes, pull(cotangent)

  return run


def in_torch(layer, reset, x, cotangent):
  """A layer of PyTorch, forward and backward."""
  import torch

  x = torch.from_numpy(x).requires_grad_()
  cotangent = torch.from_numpy(cotangent)

  def run():
    x.grad = None
    layer(x).backward(cotangent)
    reset()

  return run


def spikingjelly(x, cotangent):
  """SpikingJelly's PLIF, all timesteps in one call, torch backend."""
  from spikingjelly.activation_based import functional, neuron

  layer = neuron.ParametricLIFNode(step_mode='m')
  return in_torch(layer, lambda: functional.reset_net(layer), x, cotangent)


def snntorch(x, cotangent):
  """The Leaky of snnTorch with a learnable beta, timestep by timestep."""
  import snntorch
  import torch

  layer = snntorch.Leaky(beta=0.2, learn_beta=True)

  def run(x):
    membrane, spikes = torch.zeros_like(x[0]), []
    for x_t in x:
      s, membrane = layer(x_t, membrane)
      spikes.append(s)
    return torch.stack(spikes)

  return in_torch(run, layer.zero_grad, x, cotangent)


def spyx(x, cotangent):
  """Spyx's LIF with a learnable beta, scanned by its `run`."""
  from flax import nnx
  from spyx import nn

  layer = nn.LIF(x.shape[2:], beta=0.2, rngs=nnx.Rngs(0))
  graph, parameters = nnx.split(layer)

  def run(x, parameters):
    return nn.run(nnx.merge(graph, parameters), x)[0]

  return in_jax(there_and_back(run), x, cotangent, parameters)


def jaxpike(x, cotangent):
  """The LIF of jaxpike with a learnable tau, scanned by its `unroll`."""
  import equinox as eqx
  import jaxpike

  layer = jaxpike.LIF(2.0, reset='zero')
  parameters, rest = eqx.partition(layer, eqx.is_inexact_array)

  def run(x, parameters):
    return jaxpike.unroll(eqx.combine(parameters, rest), x)[0]

  return in_jax(there_and_back(run), x, cotangent, parameters)


PEERS = {
  'SpikingJelly PLIF': spikingjelly,
  'snnTorch Leaky': snntorch,
  'Spyx LIF': spyx,
  'jaxpike LIF': jaxpike,
}
