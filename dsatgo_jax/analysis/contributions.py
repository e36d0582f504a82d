"""Each timestep's part of the gradient of a layer's weights."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax

from dsatgo_jax import probes


def contributions(
  loss: Callable, model, num_steps: int, axis_name=None
) -> dict[str, dict[str, jax.Array]]:
  """How much of each layer's weight gradient comes from each timestep.

  Of layers with a `kernel` that see [T, B, ...]: Flax's and this package's
  convolutions and dense layers, in Linen and in NNX. Takes about one gradient.

  Args:
    loss: `loss(params) -> scalar`, which applies a Linen model; or
      `loss(model) -> scalar` of an NNX model.
    model: the Linen model's params, or the NNX model.
    num_steps: T.
    axis_name: mapped axis over which the batch is spread, if the loss is the
      mean over each device's part.

  Returns:
    `{layer: {'norm': [T], 'cosine': [T], 'share': [T]}}` of the contributions
    dW[t], which sum to dW: their norms, cosines with dW, and shares
    `<dW[t], dW> / <dW, dW>`, which sum to 1.
  """
  through = _through_nnx if isinstance(model, nnx.Module) else _through_linen
  zeros: dict[str, jax.Array] = {}

  def find(layer, call, params, x):
    zeros[layer] = jnp.zeros((num_steps, 2))
    return call(params, x)

  def probed_loss(zeros):
    def tell(layer, call, params, x):
      return _by_timestep(call, axis_name, params, x, zeros[layer])

    return through(loss, model, num_steps, tell)

  jax.eval_shape(lambda: through(loss, model, num_steps, find))
  layers = {}
  for layer, sums in jax.grad(probed_loss)(dict(zeros)).items():
    norm, whole = jnp.sqrt(sums[:, 0]), jnp.sum(sums[:, 1])
    layers[layer] = {
      'norm': norm / probes.SCALE,
      'cosine': sums[:, 1] / (norm * jnp.sqrt(whole)),
      'share': sums[:, 1] / whole,
    }
  return layers


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_timestep(call, axis_name, params, x, zero):
  """`call(params, x)`; the zero's gradient tells of the timesteps'."""
  return call(params, x)


def _forward(call, axis_name, params, x, zero):
  return call(params, x), (params, x)


def _backward(call, axis_name, residuals, g):
  params, x = residuals

  def at(inputs):
    x, g = inputs
    _, pull = jax.vjp(call, params, x[None])
    g_params, g_x = pull(g[None])
    return g_params, g_x[0]

  each, g_x = lax.map(at, (x, g))
  whole = jax.tree.map(lambda a: jnp.sum(a, 0), each)
  seen = each if axis_name is None else lax.pmean(each, axis_name)
  rows = [
    jnp.reshape(a, (len(a), -1)) * probes.SCALE for a in jax.tree.leaves(seen)
  ]
  products = [
    sum(jnp.sum(a * b, 1) for a, b in zip(rows, others, strict=True))
    for others in (rows, [jnp.sum(a, 0, keepdims=True) for a in rows])
  ]
  return whole, g_x, jnp.stack(products, 1)


_by_timestep.defvjp(_forward, _backward)


def _through_linen(loss, params, num_steps, visit):
  """The loss, with `visit` called in the place of every layer of weights."""
  inside = []

  def intercept(call, args, kwargs, context):
    module = context.module
    own = nn.meta.unbox(module.variables.get('params', {}))
    if (
      inside
      or context.method_name != '__call__'
      or not _has_time(own.get('kernel'), args[0], num_steps)
    ):
      return call(*args, **kwargs)
    alone = module.clone(parent=None, name=None)

    def apply(params, x):
      inside.append(True)
      try:
        return alone.apply({'params': params}, x, *args[1:], **kwargs)
      finally:
        inside.pop()

    return visit('/'.join(module.path), apply, own, args[0])

  with nn.intercept_methods(intercept):
    return loss(params)


def _through_nnx(loss, model, num_steps, visit):
  """The loss, with `visit` called in the place of every layer of weights."""
  model = nnx.clone(model)
  layers = [
    (path, node)
    for path, node in nnx.iter_graph(model)
    if isinstance(node, nnx.Module) and hasattr(node, 'kernel')
  ]
  for path, node in layers:
    *above, last = path
    parent = model
    for key in above:
      parent = parent[key] if isinstance(key, int) else getattr(parent, key)
    visited = _Visited(node, '/'.join(map(str, path)), num_steps, visit)
    if isinstance(last, int):
      parent[last] = visited
    else:
      setattr(parent, last, visited)
  return loss(model)


class _Visited(nnx.Module):
  """Stands where a layer of weights stands."""

  def __init__(self, layer, name, num_steps, visit):
    self.layer = layer
    self.name, self.num_steps, self.visit = name, num_steps, visit

  def __call__(self, x, *args, **kwargs):
    """What the layer gives."""
    if not _has_time(self.layer.kernel, x, self.num_steps):
      return self.layer(x, *args, **kwargs)
    graph, state = nnx.split(self.layer)

    def apply(state, x):
      return nnx.merge(graph, state, copy=True)(x, *args, **kwargs)

    return self.visit(self.name, apply, state, x)


def _has_time(kernel, x, num_steps):
  """Whether x is [T, B, ...] to a layer with that kernel."""
  return (
    kernel is not None
    and jnp.ndim(x) == jnp.ndim(kernel) + 1
    and jnp.shape(x)[0] == num_steps
  )
