"""Spikes kept in a few bits until their weights' gradient is due.

For the gradient of its weights a convolution or a dense layer keeps its input.
Spikes are 0 or 1, and sums of n layers' spikes (SEW-ADD) whole numbers up to n.
A maximum pool keeps its input, or, here, which entry of each window it took.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name


@dataclasses.dataclass(frozen=True)
class Packed:
  """A product with weights that keeps its input in a few bits.

      conv = Packed(lax.conv_general_dilated)
      x = snn.Conv(64, (3, 3), conv_general_dilated=conv)(spikes)
      x = snn.Dense(10, dot_general=Packed(lax.dot_general, 2))(spikes + more)

  Values and gradients are those of the product alone, to the bit, at any order
  of reverse mode; forward mode is refused, as by any `jax.custom_vjp`. Input
  that is no whole number, or more than the bits hold, is NaN to what is
  differentiated. On CPU, whose convolutions want float32, x is kept as it is.

  Attributes:
    operation: `operation(x, weights, ...)`; Flax's layers, Linen's and NNX's,
      take one as `conv_general_dilated` or `dot_general`.
    largest: what x may come to: 1 for spikes, n for sums of n layers' spikes.
      Up to 2 it is kept in two bits, up to 14 in four, up to 254 in eight.
    alone: never keeps x, on CPU neither, and has no second derivatives: for
      layers under `jax.checkpoint(..., policy=KEPT)`.
  """

  operation: Any
  largest: int = 1
  alone: bool = False

  def __call__(
    self, x: jax.Array, weights: jax.Array, *args: Any, **settings: Any
  ) -> Any:
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


def max_pool(x, window_shape, strides=None, padding='VALID') -> jax.Array:
  """Flax's `max_pool` of any leading axes, which keeps a byte for each window.

  XLA's gradient needs x again and, on GPUs, writes six arrays of four bytes for
  each window. Forward mode is refused, as by any `jax.custom_vjp`.

  Args:
    x: [..., *spatial, C], floating point.
    window_shape: the window's sizes, at most 256 entries in all.
    strides: the window's; None for 1 each.
    padding: 'SAME', 'VALID' or a pair of numbers for each axis.

  Returns:
    The largest entries, [..., *spatial, C]; of equals the first one has the
    gradient.
  """
  sizes = x.shape[-1 - len(window_shape) : -1]
  strides = tuple(strides or [1] * len(sizes))
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(sizes, window_shape, strides, padding)
  axes = zip(sizes, window_shape, strides, map(tuple, padding), strict=True)
  return _pooled(tuple(axes), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pooled(axes, x):
  return functools.reduce(jnp.maximum, _entries(axes, x))


def _pooled_forward(axes, x):
  entries = _entries(axes, x)
  y = functools.reduce(jnp.maximum, entries)
  first = jnp.full(y.shape, len(entries) - 1, jnp.uint8)
  for i in reversed(range(len(entries) - 1)):
    first = jnp.where(entries[i] == y, jnp.uint8(i), first)
  return y, first


def _pooled_backward(axes, first, g):
  parts = [
    lax.pad(jnp.where(first == i, g, 0), jnp.zeros((), g.dtype), padding)
    for i, (padding, _) in enumerate(_places(axes, g.ndim))
  ]
  # Each entry's sum goes from its first window to its last, as XLA's does.
  return (functools.reduce(jnp.add, parts[::-1]),)


_pooled.defvjp(_pooled_forward, _pooled_backward)


def _entries(axes, x):
  """The entries of all windows, one array for each place in the window."""
  lowest = jnp.full((), -jnp.inf, x.dtype)
  before = [(0, 0, 0)] * (x.ndim - len(axes) - 1)
  pads = [(*pads, 0) for *_, pads in axes]
  padded = lax.pad(x, lowest, [*before, *pads, (0, 0, 0)])
  return [padded[window] for _, window in _places(axes, x.ndim)]


def _places(axes, ndim):
  """For each place in a window where it lies in x: a padding, and slices."""
  lead = ndim - len(axes) - 1
  for place in itertools.product(*(range(window) for _, window, *_ in axes)):
    padding, slices = [], []
    for i, (size, window, stride, (low, high)) in zip(place, axes, strict=True):
      last = i + (size + low + high - window) // stride * stride
      padding.append((i - low, size + low - last - 1, stride - 1))
      slices.append(slice(i, last + 1, stride))
    none = [(0, 0, 0)]
    yield lead * none + padding + none, (..., *slices, slice(None))
