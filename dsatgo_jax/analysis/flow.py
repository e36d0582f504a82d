"""How gradients flow through layers and timesteps.

Into the membrane u[t] of a neuron a gradient comes by three paths:

    spatial  (dL/ds[t]) g[t]          through this step's spike
    leak     (dL/dv[t]) (1 - s[t])    through the next membrane
    reset   -(dL/dv[t]) u[t] g[t]     through the reset by this step's spike

with g the surrogate (hard reset; soft: `dL/dv[t]` and `-(dL/dv[t]) theta g`)
and dL/ds[t] what reaches the spikes from outside the neuron. Statistics of them
leave the graph as the gradient of zeros (see `probes`). Linen has these in the
collection `flow`:

    zeros = flow.zeros(net, variables, images, train=True)

    def loss(params, zeros):
      logits, _ = net.apply(
        variables | zeros | {'params': params}, images, train=True,
        mutable=['batch_stats'],
      )
      return losses.cross_entropy(logits, labels).mean()

    _, told = jax.grad(loss, argnums=(0, 1))(variables['params'], zeros)
    flow.summary(told['flow'])  # {layer: {'u': [T], 'spatial': [T], ...}}

and NNX as variables of the kind `snn.Probe`:

    net = flow.probed(net, images)
    kinds = nnx.Any(nnx.Param, snn.Probe)
    told = nnx.grad(loss, argnums=nnx.DiffState(0, kinds))(net)
    flow.summary(told)

Lifted transformations of Linen take the collection as they take others:
`nn.scan(..., variable_axes={'params': 0, 'flow': 0})`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx, traverse_util
from jax import lax

from dsatgo_jax import nnx as snnx
from dsatgo_jax import probes, xla
from dsatgo_jax.analysis import tree
from dsatgo_jax.analysis.activity import by_layer
from dsatgo_jax.analysis.contributions import contributions as contributions
from dsatgo_jax.dynamics import PATHS

_PREFIX = 'flow_'  # Of NNX's attributes.


def zeros(
  model: nn.Module,
  variables: Mapping[str, Any],
  *args,
  names: Sequence[str] = ('paths',),
  layers: Sequence[str] | None = None,
  **kwargs,
) -> dict[str, Any]:
  """The zeros for a Linen model's neurons.

  Args:
    model: has neurons of `dsatgo_jax.linen` somewhere in it.
    variables: the model's.
    *args: arguments of the model, as in training; nothing is computed.
    names: which `probes`: 'paths', or 'sample' at less cost; 'reach'; 'u' and
      's' for whole arrays.
    layers: of which layers, by path as `by_layer` names them; None for all.
    **kwargs: further arguments of the model.

  Returns:
    `{'flow': ...}`, to be put among the variables.

  Raises:
    ValueError: no such probe or layer.
  """
  shapes = jax.eval_shape(
    lambda variables, args: model.apply(
      variables, *args, mutable=True, **kwargs
    )[1].get('flow', {}),
    variables,
    args,
  )
  made = {
    layer: {
      name: jnp.zeros(a.shape, a.dtype) for name, a in one.items()
      if name in _known('names', names, probes.NAMES)
    }
    for layer, one in by_layer(shapes).items()
  }  # fmt: skip
  chosen = _known('layers', made if layers is None else layers, made)
  nested = {
    (*layer.split('/'), name) if layer else (name,): a
    for layer in chosen
    for name, a in made[layer].items()
  }
  return {'flow': traverse_util.unflatten_dict(nested)}


def probed(
  model: nnx.Module,
  *args,
  names: Sequence[str] = ('paths',),
  layers: Sequence[str] | None = None,
  **kwargs,
):
  """A copy of an NNX model whose neurons have zeros, `snn.Probe`.

  Args:
    model: has neurons of `dsatgo_jax.nnx` somewhere in it.
    *args: arguments of the model, as in training; nothing is computed.
    names: which `probes`: 'paths', or 'sample' at less cost; 'reach'; 'u' and
      's' for whole arrays.
    layers: of which layers, by path as `by_layer` names them; None for all.
    **kwargs: further arguments of the model.

  Returns:
    The copy.

  Raises:
    ValueError: no such probe or layer.
  """
  model = nnx.clone(model)
  graph, state = nnx.split(model)

  def inputs(state, args):
    capture = nnx.capture(nnx.merge(graph, state), snnx.Membrane)
    return capture(*args, **kwargs)[1]

  neurons = {
    '/'.join(map(str, path)): node
    for path, node in nnx.iter_graph(model)
    if isinstance(node, snnx.SpikingNeuron)
    and not isinstance(node, snnx.SpikingRNN)
  }
  told = by_layer(jax.eval_shape(inputs, state, args))
  told = {layer: one for layer, one in told.items() if layer in neurons}
  for layer in _known('layers', told if layers is None else layers, told):
    for name in _known('names', names, probes.NAMES):
      zero = probes.zeros(name, told[layer]['u'])
      setattr(neurons[layer], _PREFIX + name, snnx.Probe(zero))
  return model


def raw(gradients) -> dict[str, dict[str, jax.Array]]:
  """The gradients of the zeros, by layer and name of the probe.

  Args:
    gradients: what `jax.grad` gave for the collection `flow`, or `nnx.grad` for
      a `probed` model.

  Returns:
    `{layer: {'paths': ..., 'reach': ..., 'u': ..., 's': ...}}`, of those that
    were asked for.
  """
  layers = {
    layer: {
      name.removeprefix(_PREFIX): value
      for name, value in one.items()
      if name.removeprefix(_PREFIX) in probes.NAMES
    }
    for layer, one in by_layer(gradients).items()
  }
  return {layer: one for layer, one in layers.items() if one}


def summary(gradients) -> dict[str, dict[str, jax.Array]]:
  """Norms, shares and cosines of what passed each layer at each timestep.

  Args:
    gradients: of the zeros, as for `raw`; with further axes in front under
      `vmap` and `nn.scan`. Of a batch on several devices, `pooled` first.

  Returns:
    `{layer: {name: [T]}}`: `u` and `s`, the norms of dL/du and dL/ds;
    `spatial`, `leak` and `reset`, those of the paths into u; the paths'
    `cosine_spatial_leak` and so on (NaN where one of them is zero);
    `nonzero_u` and `nonzero_s`, shares of neurons. With the probe 'reach',
    `reach` [T, T + 1]: which share of dL/du came from the spikes of 0 to T - 1
    timesteps later and, last, from beyond the end; the projection on the whole,
    so that a row sums to 1.
  """
  layers = {}
  for layer, told in raw(gradients).items():
    found: dict[str, jax.Array] = {}
    for name in ('sample', 'paths'):
      if name in told:
        found |= _norms(told[name])
    if 'reach' in told:
      total = jnp.sum(told['reach'], -1, keepdims=True)
      found['reach'] = told['reach'] / jnp.where(total > 0, total, 1)
    layers[layer] = found
  return layers


def _norms(paths):
  """What the sums of `probes.FIELDS` come to."""
  total = {name: paths[..., i] for i, name in enumerate(probes.FIELDS)}
  root = {
    name: jnp.sqrt(total[name]) / probes.SCALE for name in (*PATHS, 'spikes')
  }
  products = {
    f'{one}_{other}': (one, other)
    for i, one in enumerate(PATHS)
    for other in PATHS[i + 1 :]
  }
  squares = sum(total[name] for name in PATHS)
  squares += 2 * sum(total[name] for name in products)
  return {
    'u': jnp.sqrt(jnp.maximum(squares, 0)) / probes.SCALE,
    's': root.pop('spikes'),
    **root,
    **{
      f'cosine_{name}': total[name]
      / probes.SCALE**2
      / (root[one] * root[other])
      for name, (one, other) in products.items()
    },
    'nonzero_u': total['nonzero'] / total['count'],
    'nonzero_s': total['spikes_nonzero'] / total['count'],
  }


def pooled(gradients, axis_name, local_mean: bool = True):
  """The gradients of the zeros, over all devices of a mapped axis.

  Under `pmap` and `shard_map`, in the place of the `pmean` that the gradients
  of the weights take.

  Args:
    gradients: of the zeros, as for `raw`; not 'u' and 's', which stay where
      they are.
    axis_name: over which the batch is spread.
    local_mean: whether the loss that was differentiated is the mean over each
      device's part of the batch, and not the whole's.

  Returns:
    The same, as one device would have it of the whole batch.
  """
  factor = lax.axis_size(axis_name) ** (-2.0 if local_mean else 0.0)
  squares = jnp.array([name not in _COUNTS for name in probes.FIELDS])

  def pool(path, a):
    if not xla.is_summed(a, axis_name):
      a = lax.psum(a, axis_name)
    if tree.keys(path)[-1].removeprefix(_PREFIX) == 'reach':
      return a * factor
    return a * jnp.where(squares, factor, 1)

  return jax.tree_util.tree_map_with_path(pool, gradients)


_COUNTS = ('nonzero', 'spikes_nonzero', 'count')


def gates(
  model: nn.Module,
  variables: Mapping[str, Any],
  *args,
  cut: Sequence[str] | Mapping[str, Sequence[str]],
  **kwargs,
) -> dict[str, Any]:
  """Cuts gradient paths in a Linen model; forward nothing changes.

  `SpikingNeuron(cut=...)` cuts them for good. These are arrays: one compiled
  step serves all cuts, and values between 0 and 1 scale a path.

  Args:
    model: has neurons of `dsatgo_jax.linen` somewhere in it.
    variables: the model's.
    *args: arguments of the model; nothing is computed.
    cut: of 'spatial', 'leak' and 'reset', for all layers; or for each layer
      that is named, by path as `by_layer` names them.
    **kwargs: further arguments of the model.

  Returns:
    `{'cuts': ...}`, to be put among the variables.

  Raises:
    ValueError: no such path or layer.
  """
  layers = list(raw(zeros(model, variables, *args, **kwargs)['flow']))
  if not isinstance(cut, Mapping):
    cut = dict.fromkeys(layers, cut)
  _known('layers', cut, layers)
  nested = {
    (*layer.split('/'), 'gates') if layer else ('gates',): jnp.array(
      [float(path not in _known('cut', paths, PATHS)) for path in PATHS]
    )
    for layer, paths in cut.items()
  }
  return {'cuts': traverse_util.unflatten_dict(nested)}


def cut(model: nnx.Module, cut: Sequence[str] | Mapping[str, Sequence[str]]):
  """A copy of an NNX model with gradient paths cut; forward nothing changes.

  Args:
    model: has neurons of `dsatgo_jax.nnx` somewhere in it.
    cut: of 'spatial', 'leak' and 'reset', for all layers; or for each layer
      that is named, by path as `by_layer` names them.

  Returns:
    The copy.

  Raises:
    ValueError: no such path or layer.
  """
  model = nnx.clone(model)
  neurons = {
    '/'.join(map(str, path)): node
    for path, node in nnx.iter_graph(model)
    if isinstance(node, snnx.SpikingNeuron)
  }
  if not isinstance(cut, Mapping):
    cut = dict.fromkeys(neurons, cut)
  for layer in _known('layers', cut, neurons):
    neurons[layer].cut = tuple(_known('cut', cut[layer], PATHS))
  return model


def _known(what, chosen, known):
  """What is chosen, if it is all known."""
  if unknown := [one for one in chosen if one not in known]:
    raise ValueError(
      f'Expected {what} to be of {", ".join(map(repr, known))}, '
      f'got {", ".join(map(repr, unknown))}.'
    )
  return list(chosen)
