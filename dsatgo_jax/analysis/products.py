"""Products with the Hessian and the Gauss-Newton matrix; see `curvature`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial


def hvp(
  loss: Callable, params, *, mode: str = 'reverse', axis_name=None
) -> Callable:
  """Products with the Hessian (Pearlmutter 1994).

  The formal Hessian, that of the straight-through twin: no slice of the true
  spiking loss (see the module's documentation). Symmetric; what has no first
  derivative, such as a detached reset, is held constant in the second too.

  Args:
    loss: `loss(params)`, a scalar. In Linen `net.apply({**variables, 'params':
      params}, ...)`, in NNX `nnx.merge(graph, params, rest, copy=True)(...)`.
    params: a tree of floating-point arrays.
    mode: 'reverse', over reverse: right for every layer of this library.
      'forward', over reverse: for layers whose surrogate is made by
      `surrogate.straight_through`, with the same result. Of other layers the
      product then raises JAX's TypeError about a custom_vjp.
    axis_name: `pmap`'s axis over which the batch is spread, where loss is the
      mean over a device's part of it; the products are then those of the mean
      over all. Under `shard_map` with its checks the `pmean` belongs into the
      loss instead, and None here.

  Returns:
    `product(vector)`, vector and result being trees as params.

  Raises:
    ValueError: params are not floating point, the loss is not a scalar, or an
      unknown mode.
  """
  if mode not in ('reverse', 'forward'):
    raise ValueError(
      f"Expected mode to be 'reverse' or 'forward', got {mode=}."
    )
  _check_floating(params)
  return Partial(_multiply(axis_name), _hessian(_partial(loss), params, mode))


def jvp(model: Callable, params) -> Callable:
  """Products with the Jacobian, without forward mode.

  The transpose of the transposed product, which reverse mode gives, is the
  product itself (the double-vjp trick). The Jacobian is the surrogate's: that
  of the straight-through twin.

  Args:
    model: `model(params)`, a tree of outputs.
    params: a tree of floating-point arrays.

  Returns:
    `product(vector)`, of a tree as params a tree as the outputs.

  Raises:
    ValueError: params are not floating point.
  """
  _check_floating(params)
  return Partial(_multiply(None), _jacobian(_partial(model), params))


def gnvp(
  model: Callable, loss: Callable, params, *, axis_name=None
) -> Callable:
  """Products with the Gauss-Newton matrix, `J^T H J` (Schraudolph 2002).

  J is the surrogate's Jacobian of the outputs, that of the straight-through
  twin, and H the loss's true Hessian with respect to the outputs. No second
  derivative of a surrogate is in it. Positive semidefinite where the loss is
  convex in the outputs, as cross-entropy is.

  Args:
    model: `model(params)`, a tree of outputs.
    loss: `loss(outputs)`, a scalar.
    params: a tree of floating-point arrays.
    axis_name: as in `hvp`.

  Returns:
    `product(vector)`, vector and result being trees as params.

  Raises:
    ValueError: params are not floating point, or the loss is not a scalar.
  """
  _check_floating(params)
  factors = _gauss_newton(_partial(model), _partial(loss), params)
  return Partial(_multiply(axis_name), *factors)


# Each factor maps a tree to a tuple of one tree, and its leaves are all that it
# needs. `jit` gives factors of one kind the same structure every time, so what
# takes them is compiled once.


@functools.partial(jax.jit, static_argnums=2)
def _hessian(loss, params, mode):
  gradient = jax.grad(_scalar(loss))
  if mode == 'forward':
    return jax.linearize(lambda params: (gradient(params),), params)[1]
  # The transpose of the pullback is equal, the Hessian being symmetric, and has
  # the convolutions of a forward pass; for those of the pullback, with their
  # kernels reversed, XLA's CPU compiler has no fast code.
  return _pushed(*jax.vjp(gradient, params))


@jax.jit
def _jacobian(model, params):
  return _pushed(*jax.vjp(model, params))


@jax.jit
def _gauss_newton(model, loss, params):
  outputs, pull = jax.vjp(model, params)
  pull_loss = jax.vjp(jax.grad(_scalar(loss)), outputs)[1]
  return _pushed(outputs, pull), pull_loss, pull


def _pushed(outputs, pull):
  """The transpose of a pullback, which is linear: at any point the same."""
  zeros = jax.tree.map(jnp.zeros_like, outputs)
  return jax.vjp(lambda outputs: pull(outputs)[0], zeros)[1]


@functools.cache
def _multiply(axis_name):
  """What applies factors to a vector; one function for each axis name."""

  @jax.jit
  def multiply(*arguments):
    *factors, vector = arguments
    for factor in factors:
      (vector,) = factor(vector)
    return lax.pmean(vector, axis_name) if axis_name else vector

  return multiply


# Outside `jit` all loops are Python's, by `jax.disable_jit`, and the product in
# them is compiled, by a primitive that runs it as it is. XLA's CPU compiler
# brings convolutions into the form that it has fast code for only where they
# are in no loop; the gradient of a kernel takes many times as long in one.


def flat(product, params, key=None):
  """The product of flat vectors, a vector of zeros, and whether it is traced.

  Vectors are at least float32.
  """
  product = _partial(product)
  leaves, treedef = jax.tree.flatten((product, params))
  # What is made here is a tracer within `jit`, where all may be constants.
  traced = any(
    isinstance(leaf, jax.core.Tracer) for leaf in (*leaves, key, jnp.zeros(()))
  )
  zeros, _ = raveled(params)

  def multiply(vector):
    if traced:
      return _multiply_flat(product, params, vector)
    return _compiled.bind(vector, *leaves, treedef=treedef)

  return multiply, zeros, traced


_compiled = Primitive('compiled_product')
_compiled.def_abstract_eval(lambda vector, *leaves, treedef: vector)


@_compiled.def_impl
def _(vector, *leaves, treedef):
  with jax.disable_jit(False):
    return _multiply_flat(*jax.tree.unflatten(treedef, leaves), vector)


def _multiply_flat(product, params, vector):
  # What `hvp` and `gnvp` made is compiled, once, whoever calls it.
  call = product if hasattr(product.func, 'lower') else Partial(_call, product)
  return _ravel(call(_unravel(params, vector)))


@jax.jit
def _call(product, tree):
  return product(tree)


@jax.jit
def _unravel(params, vector):
  tree = raveled(params)[1](vector)
  return jax.tree.map(lambda v, a: v.astype(a.dtype), tree, params)


@jax.jit
def _ravel(tree):
  return ravel_pytree(jax.tree.map(_widened, tree))[0]


def _widened(a):
  return a.astype(jnp.promote_types(a.dtype, jnp.float32))


def raveled(params):
  """A flat vector of zeros, at least float32, and what unravels it."""
  return ravel_pytree(
    jax.tree.map(lambda a: _widened(jnp.zeros_like(a)), params)
  )


def loop(function, xs, traced):
  """`lax.map`, or a loop of Python's."""
  if traced:
    return lax.map(function, xs)
  return jax.tree.map(lambda *a: jnp.stack(a), *map(function, xs))


def _partial(function):
  """A function as a tree, so that `jit` takes it as an argument."""
  return function if isinstance(function, Partial) else Partial(function)


def _scalar(loss):
  """The loss, which says so if it is not a scalar."""

  def checked(arguments):
    value = loss(arguments)
    if jnp.shape(value):
      raise ValueError(
        f'Expected loss to give a scalar, got shape {jnp.shape(value)}.'
      )
    return value

  return checked


def _check_floating(params):
  """Raises a `ValueError` for a leaf that has no derivative."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      raise ValueError(
        'Expected params of floating-point arrays, got '
        f'{jnp.result_type(leaf)} at params{jax.tree_util.keystr(path)}.'
      )
