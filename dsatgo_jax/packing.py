"""Spikes kept in a few bits until their weights' gradient is due.

For the gradient of its weights a convolution or a dense layer keeps its input.
Spikes are 0 or 1, and sums of n layers' spikes (SEW-ADD) whole numbers up to n.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name


class Packed(NamedTuple):
  """A product with weights that keeps its input in a few bits.

      conv = Packed(lax.conv_general_dilated)
      x = snn.Conv(64, (3, 3), conv_general_dilated=conv)(spikes)
      x = snn.Dense(10, dot_general=Packed(lax.dot_general, 2))(spikes + more)

  Values and gradients are those of the product alone, to the bit, at any order
  of reverse mode; forward mode is refused, as by any `jax.custom_vjp`. Input
  that is no whole number, or more than the bits hold, is taken for NaN, so that
  it shows. On CPU, whose convolutions want float32, x is kept as it is.

  Attributes:
    operation: `operation(x, weights, ...)`; Flax's layers, Linen's and NNX's,
      take one as `conv_general_dilated` or `dot_general`.
    largest: what x may come to: 1 for spikes, n for sums of n layers' spikes.
      Up to 2 it is kept in two bits, up to 14 in four, up to 254 in eight.
    alone: never keeps x, on CPU neither, and has no second derivatives: for
      layers under `jax.checkpoint(..., policy=KEPT)`.
  """

  operation: Callable
  largest: int = 1
  alone: bool = False

  def __call__(self, x, weights, *args, **settings):
    """The operation's.

    Args:
      x: [..., C], floating point.
      weights: what the operation takes.
      *args: further arguments of the operation.
      **settings: further arguments of the operation, by name.

    Returns:
      What the operation returns.

    Raises:
      ValueError: `largest` is not from 1 to 254.
    """

    def operation(x, weights):
      return self.operation(x, weights, *args, **settings)

    kind = width(self.largest), x.shape[-1], x.dtype
    return _packed(operation, kind, self.alone, x, weights)


def width(largest: int) -> int:
  """How many bits hold whole numbers, and one code more for all else.

  Args:
    largest: of the numbers, which begin with 0.

  Returns:
    2, 4 or 8.

  Raises:
    ValueError: eight bits are too few, or there is but zero.
  """
  if not 1 <= largest <= 254:
    raise ValueError(f'Expected 1 <= largest <= 254, got {largest=}.')
  return next(bits for bits in (2, 4, 8) if largest < 2**bits - 1)


def pack(x: jax.Array, bits: int) -> jax.Array:
  """Whole numbers as codes of a few bits.

  Args:
    x: [..., C].
    bits: 2, 4 or 8.

  Returns:
    [..., ceil(C * bits / 8)], uint8: neighbours share a byte.
  """
  unknown, share = 2**bits - 1, 8 // bits
  codes = x.astype(jnp.uint8)
  known = (codes < unknown) & (codes.astype(x.dtype) == x)
  codes = jnp.where(known, codes, jnp.uint8(unknown))
  size = -(-x.shape[-1] // share)
  rest = [(0, 0)] * (x.ndim - 1) + [(0, size * share - x.shape[-1])]
  codes = jnp.pad(codes, rest).reshape(*x.shape[:-1], size, share)
  return functools.reduce(
    jnp.bitwise_or, [codes[..., i] << bits * i for i in range(share)]
  )


def unpack(codes: jax.Array, bits: int, size: int, dtype) -> jax.Array:
  """What `pack` packed.

  Args:
    codes: [..., ceil(C * bits / 8)], uint8.
    bits: 2, 4 or 8.
    size: C.
    dtype: of what was packed.

  Returns:
    [..., C]; NaN where it was no whole number from 0 to `2 ** bits - 2`.
  """
  unknown, shifts = 2**bits - 1, np.arange(0, 8, bits, dtype=np.uint8)
  each = lax.expand_dims(shifts, range(codes.ndim))
  shape = *codes.shape[:-1], codes.shape[-1] * len(shifts)
  codes = ((codes[..., None] >> each) & np.uint8(unknown)).reshape(shape)
  codes = codes[..., :size]
  return jnp.where(codes == unknown, jnp.nan, codes.astype(dtype))


# For `jax.checkpoint` or `nn.remat` of a layer: keeps its packed spikes and its
# statistics, and computes all else again.
KEPT = jax.checkpoint_policies.save_only_these_names('packed', 'statistics')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _packed(operation, kind, alone, x, weights):
  del kind, alone
  return operation(x, weights)


def _forward(operation, kind, alone, x, weights):
  codes = pack(_differentiable_once(x) if alone else x, kind[0])
  codes = checkpoint_name(codes, 'packed')
  x = None if alone else x
  seen, _ = _restored(kind, x, codes)
  return operation(seen, weights), (x, codes, weights)


def _backward(operation, kind, alone, residuals, g):
  del alone
  x, codes, weights = residuals
  seen, g = _restored(kind, x, codes, g)
  return jax.vjp(operation, seen, weights)[1](g)


_packed.defvjp(_forward, _backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _restored(kind, x, codes, g=None):
  """What was packed, not before the cotangent g is there; and g.

  A compiled program keeps one of x and codes, that which its platform reads.
  """

  def of_codes(x, codes, g):
    codes, g = lax.optimization_barrier((codes, g))
    return unpack(codes, *kind), g

  if x is None:
    return of_codes(x, codes, g)
  return lax.platform_dependent(
    x, codes, g, cpu=lambda x, codes, g: (x, g), default=of_codes
  )


@_restored.defjvp
def _restored_jvp(kind, primals, tangents):
  x, _, g = tangents
  seen, late = _restored(kind, *primals)
  return (seen, late), (jnp.zeros_like(seen) if x is None else x, g)


@jax.custom_jvp
def _differentiable_once(x):
  return x


@_differentiable_once.defjvp
def _differentiable_once_jvp(primals, tangents):
  raise NotImplementedError(
    'Where packed spikes are kept alone (Packed(..., alone=True), '
    "remat='layer') there are no second derivatives: leave it out for them."
  )
