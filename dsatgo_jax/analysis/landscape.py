"""Loss landscapes along one, two or more directions from trained parameters.

    directions = landscape.random_directions(params, key=key, num=2)
    axis = np.linspace(-1, 1, 41)
    for grid in landscape.sweep(loss, params, directions, axis, axis):
      np.savez('landscape.npz', *grid.axes, grid.losses, grid.done)

Directions are a tree as the parameters with an axis in front, [D, ...]:
random ones, `curvature.eigenpairs(...).vectors`, or `between` checkpoints.

**What is drawn** is what `loss(params)` computes, the true spiking loss with
its steps, and not the twin whose Hessian `curvature` gives. What of the
statistics is held fast is the caller's choice, and belongs under every picture.
In Linen:

    def frozen(params):                # evaluation mode: as they were trained
      logits = net.apply({**variables, 'params': params}, x, train=False)
      return losses.cross_entropy(logits, labels).mean()

    def measured(params):              # training mode: anew at each point
      logits, _ = net.apply(
        {**variables, 'params': params}, x, train=True, mutable=['batch_stats']
      )
      return losses.cross_entropy(logits, labels).mean()

`frozen` keeps tdBN's means and variances and the running thresholds: far from
the centre they no longer fit the layers' inputs, and the walls are steeper than
what training sees. `measured` takes them of the batch at each point, as a
training step does: scale-invariant directions are then flat, and x should be a
batch of the size that was trained with. Where both checkpoints' statistics
should count, give `sweep` the whole `variables` in the place of params.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

_AXIS = 'landscape'


class Grid(NamedTuple):
  """Losses on a grid, some of them yet to be computed; NumPy arrays.

  Attributes:
    axes: coordinates along each of D directions, [n_1], ..., [n_D].
    losses: [n_1, ..., n_D]; 0 where not done.
    done: whether each is computed, of that shape.
  """

  axes: tuple[np.ndarray, ...]
  losses: np.ndarray
  done: np.ndarray


def random_directions(
  params, *, key: jax.Array, num: int = 2, vectors: str = 'zero'
):
  """Filter-normalised random directions (Li et al., NeurIPS 2018).

  Each filter of a Gaussian direction is scaled to the norm of the parameters'
  filter. A filter is what leads to one output: all of a kernel [..., out] but
  its last axis, of a dense layer as of a convolution. All that has less than
  two axes is left where it is, as in that paper's figures: biases, tdBN's scale
  and bias (and running statistics, if params has them), the neurons' decays and
  thresholds, one a layer or one a channel.

  Args:
    params: a tree of floating-point arrays.
    key: of the random numbers.
    num: D, how many.
    vectors: what becomes of leaves with less than two axes: 'zero' leaves them
      out; 'norm' scales each as a whole to the parameters' norm.

  Returns:
    A tree as params, each leaf [num, ...].

  Raises:
    ValueError: num is not positive, or an unknown choice for vectors.
  """
  if num < 1:
    raise ValueError(f'Expected num >= 1, got {num=}.')
  if vectors not in ('zero', 'norm'):
    raise ValueError(
      f"Expected vectors to be 'zero' or 'norm', got {vectors=}."
    )
  leaves, treedef = jax.tree.flatten(params)

  def direction(key, leaf):
    leaf = jnp.asarray(leaf)
    if leaf.ndim < 2 and vectors == 'zero':
      return jnp.zeros((num, *leaf.shape), leaf.dtype)
    of_filter = tuple(range(leaf.ndim - 1)) if leaf.ndim > 1 else None

    def norm(a):
      return jnp.sqrt(jnp.sum(a**2, of_filter, keepdims=True))

    def one(key):
      random = jax.random.normal(key, leaf.shape, leaf.dtype)
      return random * (norm(leaf) / norm(random))

    # One after another, so that the first do not depend on num.
    return jnp.stack([one(jax.random.fold_in(key, i)) for i in range(num)])

  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(treedef, map(direction, keys, leaves))


def between(params, *others):
  """Directions from one checkpoint to others: coordinate 1 is there.

  Goodfellow, Vinyals and Saxe (ICLR 2015) for one other.

  Args:
    params: a tree of arrays: the parameters, or the whole `variables`, whose
      statistics and running thresholds then go along.
    *others: D trees of the same structure and shapes.

  Returns:
    A tree as params, each leaf [D, ...].

  Raises:
    ValueError: there is no other, or one differs in structure or shapes.
  """
  if not others:
    raise ValueError('Expected at least one other checkpoint, got none.')
  for other in others:
    _check_like(params, other, 'another checkpoint', lambda shape: shape)
  return jax.tree.map(
    lambda a, *b: jnp.stack([jnp.asarray(b) - a for b in b]), params, *others
  )


def start(*axes) -> Grid:
  """A grid of which nothing is computed.

  Args:
    *axes: coordinates along each of D directions, [n_1], ..., [n_D].

  Returns:
    A `Grid`.

  Raises:
    ValueError: there is no axis, or one has not one axis of its own.
  """
  axes = tuple(np.asarray(axis) for axis in axes)
  if not axes or any(axis.ndim != 1 or not axis.size for axis in axes):
    raise ValueError(
      'Expected coordinates [n] for each direction, got shapes '
      f'{[axis.shape for axis in axes]}.'
    )
  shape = tuple(axis.size for axis in axes)
  return Grid(axes, np.zeros(shape), np.zeros(shape, bool))


def sweep(
  loss: Callable,
  params,
  directions,
  *axes,
  chunk: int = 64,
  batch_size: int = 1,
  mesh: Mesh | None = None,
) -> Iterator[Grid]:
  """The losses at `params + sum_d c_d directions[d]`, chunk by chunk.

  It computes what is not done, in the axes' order; so a `Grid` that was saved
  goes on where it stopped:

      *axes, values, done = np.load('landscape.npz').values()
      saved = landscape.Grid(axes, values, done)
      for grid in landscape.sweep(loss, params, directions, saved): ...

  All chunks are one compiled program. Data that changes belongs into the loss's
  arguments, `jax.tree_util.Partial(loss, batch)` for a `loss(batch, params)`.

  Args:
    loss: `loss(params)`, a scalar; the module's documentation says what of the
      statistics it may hold fast.
    params: a tree of arrays: the centre.
    directions: a tree as params, each leaf [D, ...].
    *axes: coordinates along the D directions, [n_1], ..., [n_D], or a `Grid`.
    chunk: how many points until the grid is given, rounded up to full use of
      the devices.
    batch_size: how many points a device computes side by side (`vmap`).
    mesh: devices over all of which the points are spread, each with the whole
      batch: the neurons' `axis_name` stays None. None for the default device.

  Yields:
    The `Grid` after each chunk; if nothing is left to do, once.

  Raises:
    ValueError: directions do not fit params and axes, the loss is not a scalar,
      or chunk or batch_size is not positive.
  """
  first = axes[0] if axes else None
  grid = first if isinstance(first, Grid) else start(*axes)
  axes = tuple(map(np.asarray, grid.axes))
  shape = tuple(map(len, axes))
  if not np.shape(grid.losses) == np.shape(grid.done) == shape:
    raise ValueError(
      f'Expected losses and done of shape {shape}, as the axes, got shapes '
      f'{np.shape(grid.losses)} and {np.shape(grid.done)}.'
    )
  for name, value in {'chunk': chunk, 'batch_size': batch_size}.items():
    if value < 1:
      raise ValueError(f'Expected {name} >= 1, got {name}={value}.')
  _check_like(
    params, directions, 'directions', lambda shape: (len(axes), *shape)
  )
  return _sweep(loss, params, directions, grid, chunk, batch_size, mesh)


def _sweep(loss, params, directions, grid, chunk, batch_size, mesh):
  """The generator: what is wrong is said before its first step."""
  shape = tuple(map(len, grid.axes))
  losses, done = np.array(grid.losses), np.array(grid.done, bool)
  loss = loss if isinstance(loss, Partial) else Partial(loss)
  devices = 1
  if mesh is not None:
    devices, mesh = mesh.size, Mesh(mesh.devices.ravel(), (_AXIS,))
    loss, params, directions = jax.device_put(
      (loss, params, directions), NamedSharding(mesh, P())
    )
  chunk = math.ceil(chunk / (devices * batch_size)) * devices * batch_size
  left = np.flatnonzero(~done)
  for begin in range(0, len(left), chunk):
    here = left[begin : begin + chunk]
    # The last chunk is filled up: another length would compile again.
    indices = np.unravel_index(np.resize(here, chunk), shape)
    points = np.stack(
      [axis[i] for axis, i in zip(grid.axes, indices, strict=True)], 1
    )
    with warnings.catch_warnings():
      # The neurons', of statistics that are not pooled. Each device has the
      # whole batch.
      warnings.filterwarnings('ignore', f".*the mapped axis '{_AXIS}'")
      values = _losses(loss, params, directions, points, batch_size, mesh)
    losses, done = losses.copy(), done.copy()
    losses.flat[here] = np.asarray(values)[: len(here)]
    done.flat[here] = True
    yield Grid(grid.axes, losses, done)
  if not len(left):
    yield Grid(grid.axes, losses, done)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _losses(loss, params, directions, points, batch_size, mesh):
  """One loss for each of points [n, D]."""

  def moved(point, centre, directions):
    step = jnp.tensordot(point.astype(directions.dtype), directions, 1)
    return (centre + step).astype(jnp.result_type(centre))

  def losses(loss, params, directions, points):
    def at(point):
      value = loss(
        jax.tree.map(functools.partial(moved, point), params, directions)
      )
      if jnp.shape(value):
        raise ValueError(
          f'Expected loss to give a scalar, got shape {jnp.shape(value)}.'
        )
      return value

    if batch_size == 1:
      return lax.map(at, points)
    return lax.map(at, points, batch_size=batch_size)

  if mesh is None:
    return losses(loss, params, directions, points)
  return jax.shard_map(
    losses,
    mesh=mesh,
    in_specs=(P(), P(), P(), P(_AXIS)),
    out_specs=P(_AXIS),
    check_vma=False,
  )(loss, params, directions, points)


def _check_like(params, other, name, expected):
  """Raises a `ValueError` for leaves that do not fit those of params."""
  ours, theirs = jax.tree.structure(params), jax.tree.structure(other)
  if ours != theirs:
    raise ValueError(
      f'Expected {name} of the structure of params, {ours}, got {theirs}.'
    )
  leaves = jax.tree.leaves(other)
  for (path, leaf), given in zip(
    jax.tree_util.tree_leaves_with_path(params), leaves, strict=True
  ):
    shape = expected(jnp.shape(leaf))
    if jnp.shape(given) != shape:
      raise ValueError(
        f'Expected {name} of shape {shape} at '
        f'{jax.tree_util.keystr(path)}, got shape {jnp.shape(given)}.'
      )
