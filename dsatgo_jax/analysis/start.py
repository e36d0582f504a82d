"""At the start: activity and gradients against depth, before any training.

Whether a deep spiking network learns at all is decided here: where a layer is
silent, those behind it get nothing; where its membranes are out of the
surrogate's window, those before it get no gradient.

    def make(depth):
      return ConvNet(stages=[[16] * depth], num_steps=4)

    def loss(net, batch):
      logits = net(batch['image'], train=True)
      return losses.cross_entropy(logits, batch['label']).mean()

    for depth, found in start.by_depth(make, (2, 4, 8), loss, batch).items():
      rates = [layer.firing_rate.mean() for layer in found.neurons.values()]
"""

import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.extend import core

from dsatgo_jax.analysis import tree


class Neurons(NamedTuple):
  """A layer of neurons, [T] each.

  Attributes:
    firing_rate: the share of neurons that fired.
    mean: of the membrane potential before the reset.
    std: its standard deviation.
    gradient_share: the share of neurons inside the gradient window.
  """

  firing_rate: np.ndarray
  mean: np.ndarray
  std: np.ndarray
  gradient_share: np.ndarray


class Start(NamedTuple):
  """A network before any training.

  Attributes:
    loss: of the batch.
    neurons: `Neurons` of each layer by the path of its module, from the input
      on.
    gradients: the norm of the loss's gradient by each array of parameters, by
      its path, from the input on.
  """

  loss: float
  neurons: dict[str, Neurons]
  gradients: dict[str, float]


def by_depth(
  make: Callable[[Any], Any],
  depths: Iterable[Hashable],
  loss: Callable[[Any, Any], jax.Array],
  batch: Any,
  rng: jax.Array | None = None,
) -> dict[Any, Start]:
  """Builds a network of each depth, and looks at a batch's way through it.

  Args:
    make: `make(depth)`, a Linen or an NNX module with this library's neurons.
    depths: what `make` is given, one after the other.
    loss: `loss(net, batch)`, a scalar. It calls the network as a training step
      does; a Linen module is bound to its variables there.
    batch: any tree of arrays.
    rng: for Linen's parameters and dropout; None for `jax.random.key(0)`. An
      NNX module has its own.

  Returns:
    A `Start` for each depth.

  Raises:
    ValueError: `make` gives something else.
  """
  rng = jax.random.key(0) if rng is None else rng
  return {depth: _start(make(depth), loss, batch, rng) for depth in depths}


def _start(net, loss, batch, rng):
  if isinstance(net, nn.Module):
    function, params, rest = _of_linen(net, loss, batch, rng)
  else:
    function, params, rest = _of_nnx(net, loss)

  @jax.jit
  def run(params, rest, batch):
    gradient = jax.value_and_grad(function, has_aux=True)
    (value, sown), slopes = gradient(params, rest, batch)
    return value, sown, jax.tree.map(_norm, slopes)

  value, sown, norms = jax.device_get(run(params, rest, batch))
  used, made = _ranks(function, params, rest, batch)
  layers = {}
  for path, number in _ordered(sown, made):
    module, _, name = path.rpartition('/')
    layers.setdefault(module, {})[name] = number
  neurons = {
    module: Neurons(*(found[name] for name in Neurons._fields))
    for module, found in layers.items()
    if found.keys() >= set(Neurons._fields)
  }
  gradients = {path: float(norm) for path, norm in _ordered(norms, used)}
  return Start(float(value), neurons, gradients)


def _of_linen(net, loss, batch, rng):
  """The loss and what is sown, as a function; parameters, other variables."""
  of_params, of_dropout = jax.random.split(rng)
  rngs = {'params': of_params, 'dropout': of_dropout}
  variables = dict(jax.jit(nn.init(loss, net))(rngs, batch))
  params = variables.pop('params', {})
  apply = nn.apply(loss, net, mutable=['spiking', *variables])

  def function(params, rest, batch):
    rngs = {'dropout': of_dropout}
    value, updates = apply({'params': params, **rest}, batch, rngs=rngs)
    return value, updates.get('spiking', {})

  return function, params, variables


def _of_nnx(net, loss):
  """The same."""
  from flax import nnx  # A Linen user does not load it.

  if not isinstance(net, nnx.Module):
    raise ValueError(
      f'Expected make(depth) to give a Linen or an NNX module, got {net!r}.'
    )
  graph, params, rest = nnx.split(net, nnx.Param, ...)

  def function(params, rest, batch):
    net = nnx.merge(graph, params, rest, copy=True)
    value, sown = nnx.capture(loss, nnx.Intermediate)(net, batch)
    return value, nnx.to_pure_dict(sown)

  return function, params, rest


def _norm(x):
  """The Euclidean norm, at least float32."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return jnp.sqrt(jnp.sum(jnp.square(x)))


def _ranks(function, params, rest, batch):
  """When parameters are first used, and when what is sown is made."""
  jaxpr = jax.make_jaxpr(function)(params, rest, batch).jaxpr
  used, made = {}, {}
  for i, equation in enumerate(jaxpr.eqns):
    for variable in equation.invars:
      if not isinstance(variable, core.Literal):
        used.setdefault(variable, i)
    made.update(dict.fromkeys(equation.outvars, i))
  params = jaxpr.invars[: len(jax.tree.leaves(params))]
  return (
    [used.get(variable, math.inf) for variable in params],
    [
      math.inf if isinstance(v, core.Literal) else made.get(v, math.inf)
      for v in jaxpr.outvars[1:]
    ],
  )


def _ordered(leaves, ranks):
  """(path, leaf) by rank: a dict that went through JAX is in that of names."""
  named, _ = jax.tree_util.tree_flatten_with_path(leaves)
  order = sorted(range(len(named)), key=ranks.__getitem__)
  return [(tree.name(named[i][0]), named[i][1]) for i in order]
