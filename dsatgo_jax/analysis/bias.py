"""Surrogate bias: how far the surrogate gradient is from a true one.

A spiking loss has no useful gradient of its own: it is flat but for jumps (and
smooth in what follows the last spikes). What the surrogate gradient stands for
is a matter of what it is compared with (Gygax and Zenke, Neural Computation
2025):

    differences   central differences of the spiking loss along random
                  directions: what a step of that length does
    evolution     the gradient of the spiking loss smoothed by Gaussian noise on
                  the parameters, by evolution strategies: small networks
    smooth        the twin whose neurons emit the antiderivative of the
                  surrogate in the place of spikes, so that autodiff is exact:
                  any network, but another one

    reference = bias.evolution(loss, params, key=key, sigma=0.01)
    bias.compare(jax.grad(loss)(params), reference, depth=1)['Conv_0'].cosine

**What is held constant.** The surrogate gradient takes the membrane's mean and
deviation, and so an adaptive threshold and every width, as constants. The
smoothed loss and the differences move them with the parameters where the loss
measures them (training mode); where they are frozen (evaluation mode), what is
compared is the surrogate alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from dsatgo_jax.analysis.smoothed import smooth as smooth


class Bias(NamedTuple):
  """The surrogate gradient beside a reference; scalars, or one a width.

  Attributes:
    cosine: of the angle between them.
    ratio: the surrogate gradient's norm over the reference's.
    cosine_error: the cosine's standard error, by jackknife; 0 for a reference
      that is not estimated.
    ratio_error: the ratio's.
  """

  cosine: jax.Array
  ratio: jax.Array
  cosine_error: jax.Array
  ratio_error: jax.Array


class Differences(NamedTuple):
  """Central differences of a loss.

  Attributes:
    key: of the directions.
    slopes: a tree as the parameters, each leaf [num_directions]: the slopes
      along directions that move this leaf alone.
  """

  key: jax.Array
  slopes: Any


class Evolution(NamedTuple):
  """A gradient estimated by evolution strategies.

  Attributes:
    gradient: a tree as the parameters.
    parts: of independent parts of the noise, whose mean it is, each leaf
      [8, ...]: their inner products tell its norm without the noise's own.
  """

  gradient: Any
  parts: Any


# How many parts the noise comes in.
_PARTS = 8


def differences(
  loss: Callable,
  params,
  *,
  key: jax.Array,
  step: float = 0.01,
  num_directions: int = 64,
) -> Differences:
  """Central differences of a loss along random directions, leaf by leaf.

  `(L(p + step z) - L(p - step z)) / (2 step)` with z standard normal on one
  leaf of the parameters and zero on all others.

  Args:
    loss: `loss(params)`, a scalar: the spiking loss itself.
    params: a tree of floating-point arrays.
    key: of the directions.
    step: the deviation by which each parameter moves: small beside the
      parameters, and large enough to meet spikes that flip.
    num_directions: for each leaf; it takes two losses for each of them.

  Returns:
    `Differences`, for `compare`.

  Raises:
    ValueError: step is not positive, or there is no direction.
  """
  _check_positive(step=step, num_directions=num_directions)
  return _differences(_partial(loss), params, key, step, num_directions)


@functools.partial(jax.jit, static_argnums=4)
def _differences(loss, params, key, step, num_directions):
  leaves, treedef = jax.tree.flatten(params)

  # One loop over leaves, directions and signs, so that the loss is there once.
  def at(index):
    leaf, direction, sign = index
    directions = _direction(key, leaves, direction)
    moved = [
      a + jnp.where(leaf == i, sign * step, 0) * z
      for i, (a, z) in enumerate(zip(leaves, directions, strict=True))
    ]
    return loss(jax.tree.unflatten(treedef, _like(moved, leaves)))

  indices = jnp.meshgrid(
    jnp.arange(len(leaves)),
    jnp.arange(num_directions),
    jnp.array([1, -1]),
    indexing='ij',
  )
  losses = lax.map(at, [index.ravel() for index in indices])
  up, down = losses.reshape(len(leaves), num_directions, 2).T
  slopes = (up - down).T / (2 * step)
  return Differences(key, jax.tree.unflatten(treedef, list(slopes)))


def _direction(key, leaves, index):
  """Standard normal arrays as the leaves."""
  keys = jax.random.split(jax.random.fold_in(key, index), len(leaves))
  return [
    jax.random.normal(key, jnp.shape(a), _wide(a))
    for key, a in zip(keys, leaves, strict=True)
  ]


def evolution(
  loss: Callable,
  params,
  *,
  key: jax.Array,
  sigma: float = 0.01,
  num_pairs: int = 1024,
  batch_size: int = 1,
) -> Evolution:
  """The gradient of a smoothed loss, by evolution strategies.

  That of `E[L(p + sigma z)]`, z standard normal, as the mean of
  `z (L(p + sigma z) - L(p - sigma z)) / (2 sigma)` over antithetic pairs
  (Salimans et al. 2017). Its error falls with the root of num_pairs and grows
  with that of the number of parameters, so small networks only.

  Args:
    loss: `loss(params)`, a scalar: the spiking loss itself.
    params: a tree of floating-point arrays.
    key: of the noise.
    sigma: the noise's deviation.
    num_pairs: how many; it takes two losses for each.
    batch_size: how many pairs are computed side by side (`vmap`).

  Returns:
    `Evolution`, for `compare`.

  Raises:
    ValueError: sigma is not positive, or num_pairs is not a positive multiple
      of 8 times the batch size.
  """
  _check_positive(sigma=sigma, num_pairs=num_pairs, batch_size=batch_size)
  if num_pairs % (_PARTS * batch_size):
    raise ValueError(
      f'Expected num_pairs to be a multiple of {_PARTS} * batch_size, got '
      f'{num_pairs=}, {batch_size=}.'
    )
  return _evolution(_partial(loss), params, key, sigma, num_pairs, batch_size)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _evolution(loss, params, key, sigma, num_pairs, batch_size):
  leaves, treedef = jax.tree.flatten(params)

  def pair(index):
    noise = _direction(key, leaves, index)

    def at(sigma):
      moved = [
        a + sigma.astype(z.dtype) * z
        for a, z in zip(leaves, noise, strict=True)
      ]
      return loss(jax.tree.unflatten(treedef, _like(moved, leaves)))

    up, down = jax.vmap(at)(jnp.array([sigma, -sigma]))
    return [(up - down) / (2 * sigma) * z for z in noise]

  def part(indices):
    def add(total, indices):
      terms = jax.vmap(pair)(indices)
      return [t + jnp.sum(z, 0) for t, z in zip(total, terms, strict=True)], ()

    zeros = [jnp.zeros(jnp.shape(a), _wide(a)) for a in leaves]
    total, _ = lax.scan(add, zeros, indices.reshape(-1, batch_size))
    return jax.tree.unflatten(treedef, [t / len(indices) for t in total])

  parts = lax.map(part, jnp.arange(num_pairs).reshape(_PARTS, -1))
  return Evolution(jax.tree.map(lambda a: jnp.mean(a, 0), parts), parts)


def compare(gradient, reference, *, depth: int | None = None) -> dict:
  """Cosine and norm ratio between a gradient and a reference, by layer.

  With `Differences`, over their directions: of slopes along them, on both
  sides, and what jumps add to the loss's slopes counts as the reference's. With
  `Evolution`, the reference's norm is without that of its noise: a cosine then
  may come out beyond one by as much as its error, and NaN in a layer in which
  the noise drowns the gradient.

  Args:
    gradient: a tree: the surrogate gradient of a loss.
    reference: `Differences`, `Evolution`, or a gradient: a tree as that.
    depth: how many keys of the tree name a layer: 1 for the outermost modules,
      0 for all in one, whose name is ''; None for each array.

  Returns:
    `{'a/b/c': Bias}`, in the tree's order.
  """
  if isinstance(reference, Differences):
    products = _of_slopes(gradient, reference)
  elif isinstance(reference, Evolution):
    products = jax.tree.map(_of_parts, gradient, reference.parts)
  else:
    products = jax.tree.map(
      lambda g, r: _inner_products(g, r)[None], gradient, reference
    )
  sums: dict[str, Any] = {}
  for path, value in jax.tree_util.tree_leaves_with_path(products):
    name = jax.tree_util.keystr(path[:depth], simple=True, separator='/')
    sums[name] = sums.get(name, 0) + value
  return {name: _bias(value) for name, value in sums.items()}


# Inner products, three in a row: of gradient and reference, of each with
# itself. The first row is of all, the others leave one part or direction out;
# rows of arrays that make up a layer can be added.


def _inner_products(gradient, reference):
  return jnp.stack(
    [
      _inner(gradient, reference),
      _inner(gradient, gradient),
      _inner(reference, reference),
    ]
  )


@jax.jit
def _of_parts(gradient, parts):
  num = len(parts)
  flat = parts.reshape(num, -1)
  with_parts = flat @ gradient.astype(flat.dtype).ravel()
  between = flat @ flat.T * (1 - jnp.eye(num, dtype=flat.dtype))
  both = jnp.append(
    jnp.mean(with_parts), (jnp.sum(with_parts) - with_parts) / (num - 1)
  )
  theirs = jnp.append(
    jnp.sum(between) / (num * (num - 1)),
    (jnp.sum(between) - 2 * jnp.sum(between, 1)) / ((num - 1) * (num - 2)),
  )
  ours = jnp.full_like(both, _inner(gradient, gradient))
  return jnp.stack([both, ours, theirs], 1)


@jax.jit
def _of_slopes(gradient, reference):
  leaves, treedef = jax.tree.flatten(gradient)
  theirs = jax.tree.leaves(reference.slopes)

  def ours(index):
    directions = _direction(reference.key, leaves, index)
    return [_inner(g, z) for g, z in zip(leaves, directions, strict=True)]

  def rows(ours, theirs):
    each = jnp.stack([ours * theirs, ours**2, theirs**2], 1)
    whole = jnp.sum(each, 0)
    return jnp.concatenate([whole[None], whole - each])

  slopes = lax.map(ours, jnp.arange(len(theirs[0])))
  return jax.tree.unflatten(treedef, map(rows, slopes, theirs))


@jax.jit
def _bias(products):
  both, ours, theirs = products.T
  values = both / jnp.sqrt(ours * theirs), jnp.sqrt(ours / theirs)

  def error(value):
    num = len(value) - 1
    if not num:
      return jnp.zeros_like(value[0])
    return jnp.std(value[1:]) * jnp.sqrt(num - 1)

  return Bias(*(v[0] for v in values), *map(error, values))


def sweep(
  loss: Callable, params, widths, reference, *, depth: int | None = None
) -> dict:
  """`compare` at each of several widths of the surrogate.

  Args:
    loss: `loss(params, width)`, a scalar: `SpikingNeuron(width=width)` takes a
      traced width, so that all widths are one compiled program.
    params: a tree of floating-point arrays.
    widths: [W].
    reference: as `compare` takes it; or a function of the width that gives one,
      for the smooth twin, which has a width too. The spiking loss has none.
    depth: as `compare` takes it.

  Returns:
    `{'a/b/c': Bias}` of arrays [W].
  """
  loss = _partial(loss)
  rows = []
  for width in jnp.asarray(widths):
    here = reference(width) if callable(reference) else reference
    rows.append(compare(_gradient(loss, params, width), here, depth=depth))
  return jax.tree.map(lambda *a: jnp.stack(a), *rows)


@jax.jit
def _gradient(loss, params, width):
  return jax.grad(loss)(params, width)


def _inner(a, b):
  return jnp.vdot(a.astype(_wide(a)), b.astype(_wide(b)))


def _wide(a):
  """At least float32."""
  return jnp.promote_types(jnp.result_type(a), jnp.float32)


def _like(arrays, leaves):
  return [
    a.astype(jnp.result_type(leaf))
    for a, leaf in zip(arrays, leaves, strict=True)
  ]


def _partial(function):
  """A function as a tree, so that `jit` takes it as an argument."""
  return function if isinstance(function, Partial) else Partial(function)


def _check_positive(**values):
  for name, value in values.items():
    if not value > 0:
      raise ValueError(f'Expected {name} > 0, got {name}={value}.')
