"""Curvature: products with the Hessian, and what follows from them.

**Which second derivative.** A spiking loss is flat almost everywhere; its
gradient is the surrogate's, and so is its Hessian here: reverse over reverse
gives the *formal* Hessian, that of the straight-through twin
`stop_gradient(H(x)) + S(x) - stop_gradient(S(x))` with S an antiderivative of
the surrogate (`surrogate.straight_through`), thresholds' statistics and widths
held constant. It is symmetric, and it is no slice of the true spiking loss:
surrogate gradients are no gradients of a loss of their own (Gygax and Zenke,
Neural Computation 2025), and a step along an eigenvector changes the loss by
something else than the eigenvalue says. `landscape` draws the true loss.

A product is a function of a vector, which is a tree as the parameters are:

    product = curvature.hvp(loss, params)
    product(vector)                                # H vector
    top = curvature.eigenpairs(product, params, key=key, num=2)
    curvature.trace(product, params, key=key).mean

Making it computes what does not depend on the vector, once, and keeps that
(`python -m benchmarks.curvature` measures both beside a gradient). Called
outside `jit`, everything here compiles at the first call with the same
functions and shapes: so pass a function defined once. Data that changes belongs
into its arguments, `jax.tree_util.Partial(loss, batch)` for a
`loss(batch, params)`. On CPU call it there: within `jit` the loops over vectors
are slow where there are convolutions.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsatgo_jax.analysis.products import flat, loop, raveled
from dsatgo_jax.analysis.products import gnvp as gnvp
from dsatgo_jax.analysis.products import hvp as hvp
from dsatgo_jax.analysis.products import jvp as jvp


class Eigenpairs(NamedTuple):
  """Eigenvalues with their vectors, the one asked for first.

  Attributes:
    values: [num].
    vectors: a tree as the parameters, each leaf [num, ...]; of length one, and
      at least float32.
    residuals: `norm(H vector - value * vector)`, [num], or a bound of it: how
      far each value may be from an eigenvalue. NaN, as values and vectors, for
      what is not there: the start vector has no part in so many eigenspaces.
  """

  values: jax.Array
  vectors: Any
  residuals: jax.Array


class Density(NamedTuple):
  """A spectral density.

  Attributes:
    grid: where it is given, [G].
    density: the share of eigenvalues per unit, [G]; its integral is one.
    nodes: of Lanczos quadrature, [num_vectors, num_matvecs].
    weights: of the nodes, of that shape; each row sums to one.
  """

  grid: jax.Array
  density: jax.Array
  nodes: jax.Array
  weights: jax.Array


class Estimate(NamedTuple):
  """A mean over random vectors, and its standard error; scalars."""

  mean: jax.Array
  error: jax.Array


def matrix(product: Callable, params) -> jax.Array:
  """The whole matrix, a column a product: for small networks.

  Of `hvp` the formal Hessian, that of the straight-through twin.

  Args:
    product: `hvp(...)`, `gnvp(...)`, or any linear function of a tree as
      params that gives one.
    params: a tree as the vectors are; its values are not used.

  Returns:
    [n, n], in the order of `jax.flatten_util.ravel_pytree(params)`.
  """
  multiply, zeros, traced = flat(product, params)
  basis = jnp.eye(zeros.size, dtype=zeros.dtype)
  return loop(multiply, basis, traced).T


# What is estimated of a product, by matfree.


def eigenpairs(
  product: Callable,
  params,
  *,
  key: jax.Array,
  num: int = 1,
  num_matvecs: int | None = None,
  which: str = 'largest',
) -> Eigenpairs:
  """Leading eigenvalues with their vectors (Lanczos 1950).

  With full reorthogonalisation. Of `hvp` they are those of the formal Hessian,
  that of the straight-through twin, and no curvature of the true spiking loss.

  Args:
    product: `hvp(...)`, `gnvp(...)`, or any symmetric linear function of a tree
      as params that gives one.
    params: a tree as the vectors are; its values are not used.
    key: of the random start vector.
    num: how many.
    num_matvecs: products taken; None for 20, or 10 + 2 num if that is more, or
      the number of parameters if that is less. It keeps so many vectors.
    which: 'largest', 'smallest', or 'magnitude' for the largest in magnitude.

  Returns:
    `Eigenpairs`. The residuals say whether num_matvecs was enough.

  Raises:
    ValueError: not `1 <= num <= num_matvecs <= n` for n parameters, or an
      unknown `which`.
    ImportError: matfree is not installed.
  """
  if which not in _ORDERS:
    raise ValueError(
      f'Expected which to be one of {", ".join(map(repr, _ORDERS))}, '
      f'got {which=}.'
    )
  size = _size(params)
  if num_matvecs is None:
    num_matvecs = min(size, max(20, 10 + 2 * num))
  if not 1 <= num <= num_matvecs <= size:
    raise ValueError(
      f'Expected 1 <= num <= num_matvecs <= {size}, the number of parameters, '
      f'got {num=}, {num_matvecs=}.'
    )
  multiply, zeros, traced = flat(product, params, key)
  start = jax.random.normal(key, zeros.shape, zeros.dtype)
  return _first(
    params, *_lanczos(multiply, start, num_matvecs, traced), num, which
  )


# What is sorted, upwards.
_ORDERS = {
  'largest': jnp.negative,
  'smallest': lambda values: values,
  'magnitude': lambda values: -jnp.abs(values),
}


@functools.partial(jax.jit, static_argnums=(5, 6))
def _first(params, basis, values, vectors, residuals, num, which):
  first = jnp.argsort(_ORDERS[which](values))[:num]  # NaN comes last.
  _, unravel = raveled(params)
  vectors = jax.vmap(unravel)(vectors[:, first].T @ basis)
  return Eigenpairs(values[first], vectors, residuals[first])


def density(
  product: Callable,
  params,
  *,
  key: jax.Array,
  num_vectors: int = 10,
  num_matvecs: int | None = None,
  grid: jax.Array | None = None,
  width: float | None = None,
) -> Density:
  """The spectral density, by stochastic Lanczos quadrature.

  Ghorbani, Krishnan and Xiao (ICML 2019), the nodes broadened by a Gaussian. Of
  `hvp` it is that of the formal Hessian, that of the straight-through twin, and
  of no curvature of the true spiking loss.

  Args:
    product: `hvp(...)`, `gnvp(...)`, or any symmetric linear function of a tree
      as params that gives one.
    params: a tree as the vectors are; its values are not used.
    key: of the random vectors.
    num_vectors: how many random vectors, taken one after another.
    num_matvecs: products for each; None for 40, or the number of parameters if
      that is less.
    grid: [G], where the density is wanted; None for 512 points over all nodes.
    width: the Gaussian's deviation; None for a hundredth of the nodes' range.

  Returns:
    A `Density`.

  Raises:
    ValueError: num_vectors is not positive, or not `1 <= num_matvecs <= n` for
      n parameters.
    ImportError: matfree is not installed.
  """
  size = _size(params)
  if num_matvecs is None:
    num_matvecs = min(size, 40)
  _check_positive(num_vectors=num_vectors)
  if not 1 <= num_matvecs <= size:
    raise ValueError(
      f'Expected 1 <= num_matvecs <= {size}, the number of parameters, '
      f'got {num_matvecs=}.'
    )
  multiply, zeros, traced = flat(product, params, key)

  def quadrature(key):
    start = jax.random.normal(key, zeros.shape, zeros.dtype)
    _, nodes, vectors, _ = _lanczos(multiply, start, num_matvecs, traced)
    real = jnp.isfinite(nodes)
    return jnp.where(real, nodes, 0), jnp.where(real, vectors[0] ** 2, 0)

  keys = jax.random.split(key, num_vectors)
  return _broadened(*loop(quadrature, keys, traced), grid, width)


@jax.jit
def _broadened(nodes, weights, grid, width):
  low, high = (
    f(nodes, where=weights > 0, initial=initial)
    for f, initial in ((jnp.min, jnp.inf), (jnp.max, -jnp.inf))
  )
  if width is None:
    width = (high - low) / 100
    # A multiple of the unit matrix has no range.
    scale = jnp.maximum(jnp.abs(low), jnp.abs(high))
    width = jnp.maximum(width, 1e-4 * jnp.where(scale > 0, scale, 1))
  if grid is None:
    grid = jnp.linspace(low - 4 * width, high + 4 * width, 512)
  distance = (grid[:, None, None] - nodes) / width
  heights = jax.scipy.stats.norm.pdf(distance) / width
  return Density(
    grid, jnp.sum(heights * weights, (1, 2)) / len(nodes), nodes, weights
  )


def trace(
  product: Callable,
  params,
  *,
  key: jax.Array,
  num_vectors: int = 32,
  semidefinite: bool = False,
) -> Estimate:
  """The trace, by random vectors (Hutchinson 1990).

  Of `hvp` it is that of the formal Hessian, that of the straight-through twin,
  and no curvature of the true spiking loss.

  Args:
    product: `hvp(...)`, `gnvp(...)`, or any symmetric linear function of a tree
      as params that gives one.
    params: a tree as the vectors are; its values are not used.
    key: of the random vectors.
    num_vectors: how many, at least two; they are taken one after another.
    semidefinite: whether the matrix is known to be positive semidefinite: of
      `gnvp`, never of `hvp`. XNysTrace (Epperly, Tropp and Webber 2024) then
      needs far fewer vectors, and keeps three times as many.

  Returns:
    An `Estimate`.

  Raises:
    ValueError: num_vectors is less than two, or, with `semidefinite`, more than
      there are parameters.
    ImportError: matfree is not installed.
  """
  most = _size(params) if semidefinite else num_vectors
  if not 2 <= num_vectors <= most:
    raise ValueError(
      'Expected at least two vectors'
      + (f', and at most {most}, the number of parameters' * semidefinite)
      + f', got {num_vectors=}.'
    )
  stochtrace = _matfree('stochtrace')
  multiply, zeros, traced = flat(product, params, key)
  if semidefinite:
    integrand = stochtrace.leave_one_out_xnystrace()
    sampler = stochtrace.sampler_normal(zeros, num=num_vectors)
    estimate = stochtrace.estimator_leave_one_out_mean_and_sem(
      integrand, sampler
    )
    one_by_one = jax.custom_batching.sequential_vmap(multiply)
    with jax.disable_jit(not traced):
      return Estimate(*estimate(one_by_one, key))
  integrand = stochtrace.monte_carlo_trace()
  sample = stochtrace.sampler_signs(zeros, num=1)
  values = loop(
    lambda key: integrand(multiply, sample(key)[0]),
    jax.random.split(key, num_vectors),
    traced,
  )
  error = jnp.std(values, ddof=1) / num_vectors**0.5
  return Estimate(jnp.mean(values), error)


def _lanczos(multiply, start, num_matvecs, traced):
  """Ritz pairs: basis [k, n], values [k], vectors [k, k], residuals [k].

  What lies beyond a Krylov space that ends before k is NaN.
  """
  decompose = _matfree('decomp').tridiag_sym(
    num_matvecs, materialize=False, custom_vjp=False
  )
  with jax.disable_jit(not traced):
    basis, small, rest, _ = decompose(multiply, start)
  return _ritz(basis, *small, rest)


@jax.jit
def _ritz(basis, diagonal, beside, rest):
  # Where the space ends, what comes next is rounding, and not orthogonal.
  overlap = jnp.max(jnp.abs(jnp.tril(basis @ basis.T, -1)), 1)
  there = jnp.cumprod(overlap < jnp.finfo(overlap.dtype).eps ** 0.5) > 0
  last = jnp.sum(there) - 1
  # An overlap so large comes of what is shorter than this.
  scale = jnp.max(jnp.where(there, jnp.abs(diagonal), 0))
  shorter = jnp.finfo(scale.dtype).eps ** 0.5 * scale
  left = jnp.where(there[-1], jnp.linalg.norm(rest), shorter)
  diagonal = jnp.where(there, diagonal, 0)
  beside = jnp.where(there[1:], beside, 0)
  small = jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
  values, vectors = jnp.linalg.eigh(small)
  # Two blocks, if it ended; an eigenvector belongs to one of them.
  found = jnp.sum(jnp.where(there[:, None], vectors**2, 0), 0) > 0.5
  residuals = left * jnp.abs(vectors[last])
  values, vectors, residuals = (
    jnp.where(found, a, jnp.nan) for a in (values, vectors, residuals)
  )
  return jnp.where(there[:, None], basis, 0), values, vectors, residuals


def _size(params):
  return sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))


def _check_positive(**values):
  for name, value in values.items():
    if value < 1:
      raise ValueError(f'Expected {name} >= 1, got {name}={value}.')


def _matfree(name):
  try:
    return importlib.import_module(f'matfree.{name}')
  except ModuleNotFoundError as error:
    raise ImportError(
      'Eigenvalues, densities and traces are estimated by matfree, which is '
      "not installed: pip install 'dsatgo_jax[analysis]'."
    ) from error
