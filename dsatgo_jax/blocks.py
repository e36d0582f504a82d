"""Blocks of arrays, as Pallas kernels for a GPU (Triton) go over them."""

import functools
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsatgo_jax import tdbn


class Given(NamedTuple):
  """What kernels read: arrays, their `BlockSpec`s, or references to blocks.

  Attributes:
    x: [B, T, M, C].
    v: the membrane before x, [B, M, C]; None for neurons at rest.
    norm: of `Parameters`, [1, C] each, or None.
    decay: [1].
    gates: of `Parameters`, [3], or None.
    theta: of the timesteps so far, [1] each.
    width: likewise.
    known: likewise; spikes are NaN where it is not finite.
    u: the membrane of a later timestep, before its reset, to go on from.
  """

  x: Any
  v: Any
  norm: Any
  decay: Any
  gates: Any
  theta: Any = ()
  width: Any = ()
  known: Any = ()
  u: Any = None


def given_of(x, v, parameters):
  """`Given`, without the levels."""
  norm = parameters.norm
  if isinstance(norm, tdbn.Own):
    norm = norm.affine()
  return Given(
    batch_major(x),
    None if v is None else flat(v),
    jax.tree.map(lambda a: a[None], norm),
    parameters.decay.reshape(1),
    parameters.gates,
  )


class Blocks(NamedTuple):
  """[B, T, M, C] cut along B, M and C; a program goes over `times` blocks."""

  shape: tuple[int, ...]
  height: int
  width: int
  times: int = 1

  @property
  def rows(self):
    """Of a program."""
    return self.height * self.times

  @property
  def grid(self):
    """Programs along B, M and C."""
    batch, _, m, c = self.shape
    return batch, pl.cdiv(m, self.rows), pl.cdiv(c, self.width)

  def tile(self, i=0):
    """Block i of a program."""
    rows = slice(None)
    if self.times > 1:
      rows = pl.ds(i * self.height, self.height)
    shape, mask = (self.height, self.width), []
    if self.shape[2] % self.rows:
      row = pl.program_id(1) * self.rows + i * self.height
      row += lax.broadcasted_iota(jnp.int32, shape, 0)
      mask.append(row < self.shape[2])
    if (column := self.columns()) is not None:
      mask.append(jnp.broadcast_to(column[None], shape))
    return Tile(rows, functools.reduce(jnp.logical_and, mask) if mask else None)

  def columns(self):
    """Which channels of a program exist; None for all."""
    if self.shape[3] % self.width == 0:
      return None
    first = pl.program_id(2) * self.width
    return first + jnp.arange(self.width) < self.shape[3]

  def channels_of(self, ref):
    """The program's channels of an array [1, C], 0 where there is none."""
    mask = self.columns()
    if mask is None:
      return ref[...]
    return triton.load(ref.at[:], mask=mask, other=0)

  def spec(self, a):
    """The `BlockSpec` of an array of `Given`."""
    if a.ndim == 4:
      block = (None, self.shape[1], self.rows, self.width)
      return pl.BlockSpec(block, lambda b, m, c: (b, 0, m, c))
    if a.ndim == 3:
      block = (None, self.rows, self.width)
      return pl.BlockSpec(block, lambda b, m, c: (b, m, c))
    if a.ndim == 2:
      return pl.BlockSpec((None, self.width), lambda b, m, c: (0, c))
    return pl.BlockSpec(a.shape, lambda b, m, c: (0,))

  def call(self, body, name, arrays, outputs):
    """`body(*arrays, *outputs)` of references; `Output`s are told beside."""

    def each(i):
      return jax.tree.map(
        lambda out: out[i], outputs, is_leaf=lambda a: isinstance(a, Output)
      )

    # Of many timesteps a thread can keep fewer neurons in its registers.
    most = 256 if self.shape[1] <= 8 else 128
    warps = max(1, min(8, self.height * self.width // most))
    return pl.pallas_call(
      body,
      grid=self.grid,
      in_specs=jax.tree.map(self.spec, arrays),
      out_shape=each(0),
      out_specs=each(1),
      compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
      name=name,
    )(*arrays)

  def like(self, a, x, dtype):
    """An output of the shape of an array of `Given`."""
    return Output(varying(x, a.shape, dtype), self.spec(a))

  def numbers(self, size, x, dtype):
    """An output of so many numbers a program."""
    block = pl.BlockSpec((None, None, None, size), lambda b, m, c: (b, m, c, 0))
    return Output(varying(x, (*self.grid, size), dtype), block)

  def channels(self, x, dtype):
    """An output of a number for each of a program's channels."""
    block = pl.BlockSpec((None, None, self.width), lambda b, m, c: (b, m, c))
    shape = (*self.grid[:2], self.shape[3])
    return Output(varying(x, shape, dtype), block)


class Output(NamedTuple):
  """What a kernel writes."""

  like: jax.ShapeDtypeStruct
  spec: pl.BlockSpec


def varying(x, shape, dtype):
  """What varies over the mesh axes that x varies over (`shard_map`)."""
  zeros = functools.partial(jnp.zeros_like, dtype=dtype, shape=shape)
  return jax.eval_shape(zeros, x)


class Tile(NamedTuple):
  """A block's rows, and which of its entries exist; None for all."""

  rows: Any
  mask: Any

  def load(self, ref, *lead):
    """The block, its entries that do not exist 0."""
    at = ref.at[(*map(jnp.int32, lead), self.rows, slice(None))]
    if self.mask is None:
      return triton.load(at)
    return triton.load(at, mask=self.mask, other=0)

  def store(self, ref, value, *lead):
    """Writes the entries that exist."""
    at = ref.at[(*map(jnp.int32, lead), self.rows, slice(None))]
    triton.store(at, value.astype(ref.dtype), mask=self.mask)

  def count(self, a):
    """How many of the block's entries exist."""
    if self.mask is None:
      return jnp.asarray(a.size, a.dtype)
    return jnp.sum(self.mask.astype(a.dtype))

  def real(self, a, other=0):
    """The block, its entries that do not exist something else."""
    return a if self.mask is None else jnp.where(self.mask, a, other)


def blocks_of(shape, size, programs=None):
  """`Blocks` of at most `size` entries, and at least so many programs."""
  _, _, m, c = shape
  width = min(_power(c), 128 if m > 1 else size)
  blocks = Blocks(shape, min(_power(m), size // width), width)
  if programs:
    for times in (2, 4, 8):
      more = blocks._replace(times=times)
      if np.prod(more.grid) >= programs:
        blocks = more
  return blocks


def unit(size):
  """To divide by: its inverse is finite."""
  return jnp.clip(size, 1e-30, 1e30)


def pooled(number, parts):
  """Mean, root of the squares about it and size, of so many parts, [N, ...]."""
  size = parts.shape[0]
  mask = pl.program_id(0) * size + jnp.arange(size) < number
  means, norms, counts = (
    triton.load(parts.at[:, jnp.int32(i)], mask=mask, other=0) for i in range(3)
  )
  most = jnp.max(jnp.where(mask, means, -jnp.inf))
  distance = jnp.where(mask, means - most, 0)
  count = jnp.sum(counts)
  below = -jnp.sum(counts * distance) / count
  between = jnp.sqrt(counts) * (distance + below)
  largest = unit(jnp.max(jnp.maximum(norms, jnp.abs(between))))
  squares = jnp.square(norms * (1 / largest))
  squares += jnp.square(between * (1 / largest))
  return most - below, largest * jnp.sqrt(jnp.sum(squares)), count


def pool(parts, most):
  """Pools parts, [..., 3], 1024 at a time, until there are at most so many."""

  def body(number, parts, one):
    for i, value in enumerate(pooled(number, parts)):
      one[i] = value

  parts = parts.reshape(-1, parts.shape[-1])
  while len(parts) > most:
    shape = pl.cdiv(len(parts), 1024), parts.shape[1]
    like = varying(parts, shape, parts.dtype)
    call = of_rows(
      functools.partial(body, len(parts)), 'neuron_pools', (parts,), like
    )
    parts = call(parts)
  return parts


def gathered(parts, axis_name):
  """The parts of all devices, each device's pooled, in one all-reduce.

  Args:
    parts: [N, 3], N <= 1024.
    axis_name: mapped axis, or axes; None for one device.

  Returns:
    Parts, [M, 3 or more], and how many rows of them there are.
  """
  if not axis_name:
    return parts, len(parts)
  number, size = lax.axis_size(axis_name), len(parts)
  shape = _power(number), 4

  def body(parts, mine, places):
    row, column = (
      lax.broadcasted_iota(jnp.int32, shape, axis).reshape(-1)
      for axis in range(2)
    )
    found = jnp.zeros(row.shape, parts.dtype)
    for i, value in enumerate(pooled(size, parts)):
      found = jnp.where((row == mine[0]) & (column == i), value, found)
    places[...] = found

  arrays = parts, lax.axis_index(axis_name).reshape(1)
  like = varying(parts, (math.prod(shape),), parts.dtype)
  # The device's place among zeros: XLA would take a kernel more for that.
  places = of_rows(body, 'neuron_pools', arrays, like)(*arrays)
  return lax.psum(places, axis_name).reshape(shape), number


def of_rows(body, name, arrays, outputs):
  """A kernel of rows, [N, n], at most 1024 a program, and of whole arrays."""
  number, size = arrays[0].shape
  height = min(_power(number), 1024)

  def spec(a):
    if a.ndim == 2:
      return pl.BlockSpec((None, size), lambda i: (i, 0))
    return pl.BlockSpec(a.shape, lambda i: (0,))

  rows = pl.BlockSpec((height, size), lambda i: (i, 0))
  return pl.pallas_call(
    body,
    grid=pl.cdiv(number, height),
    in_specs=(rows, *jax.tree.map(spec, arrays[1:])),
    out_specs=jax.tree.map(spec, outputs),
    out_shape=outputs,
    compiler_params=triton.CompilerParams(
      num_warps=max(1, height // 256), num_stages=1
    ),
    name=name,
  )


def refusal(call, *arrays) -> Exception | None:
  """Why Triton does not take a kernel of such arrays; None if it does."""
  try:
    like = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays
    )
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', DeprecationWarning)  # Of Triton itself.
      jax.jit(call).trace(*like).lower(lowering_platforms=('cuda',))
  except Exception as error:  # Of many kinds, most of them private.
    return error
  return None


@functools.lru_cache
def refusal_of(surrogate) -> Exception | None:
  """Why Triton does not take the surrogate's derivative; None if it does."""

  def body(x, width, slope):
    slope[...] = surrogate.gradient(x[...], width[0])

  x, width = (jax.ShapeDtypeStruct((n,), jnp.float32) for n in (128, 1))
  call = pl.pallas_call(
    body, out_shape=x, compiler_params=triton.CompilerParams()
  )
  return refusal(call, x, width)


def _power(n):
  """The least power of two that is not less."""
  return 1 << (n - 1).bit_length()


def flat(v):
  """[B, ..., C] as [B, M, C]."""
  return v.reshape(v.shape[0], -1, v.shape[-1])


def batch_major(x):
  """[T, B, ..., C] as [B, T, M, C]."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(*x.shape[:2], -1, x.shape[-1])


def time_major(x, like):
  """[B, T, M, C] as [T, B, ..., C]."""
  num_steps, batch, *rest = like.shape
  return jnp.moveaxis(x.reshape(batch, num_steps, *rest), 1, 0)
