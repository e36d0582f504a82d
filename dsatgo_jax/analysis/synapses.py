"""What enters a convolution or a product, and whom it reaches."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('spikes', 'active', 'calls', 'multiplied'),
  meta_fields=(
    'name',
    'reach',
    'fan_out',
    'inputs',
    'examples',
    'connections',
  ),
)
@dataclasses.dataclass(frozen=True)
class Count:
  """What entered one convolution or product, and whom it reaches.

  Counts of several batches or devices add up: `jax.tree.map(jnp.add, a, b)`,
  `lax.psum`.

  Attributes:
    name: the layer's.
    spikes: the sum of their sizes at each position, int32 [H, W] for an image;
      [] where all positions are alike.
    active: how many inputs were not zero, likewise.
    calls: how often this was run.
    multiplied: in how many calls the input was not spikes.
    reach: for each axis of `spikes`, the outputs that an input reaches on it.
    fan_out: outputs for each of these.
    inputs: values that enter in a call.
    examples: how many the batch of a call is, all leading axes taken together.
    connections: pairs of an input and an output in a call.
  """

  name: str
  spikes: jax.Array
  active: jax.Array
  calls: jax.Array
  multiplied: jax.Array
  reach: tuple[tuple[int, ...], ...]
  fan_out: int
  inputs: int
  examples: int
  connections: int


def _name(origin, equation):
  """The path that all weights of a product share, or the scope of it."""
  shared = []
  for keys in zip(*(name.split('/') for name in origin or ()), strict=False):
    if len(set(keys)) > 1:
      break
    shared.append(keys[0])
  scope = str(equation.source_info.name_stack)
  return '/'.join(shared) or scope or equation.primitive.name


def _spikes(x, largest):
  """How many spikes each value is; which are not zero; if one is no spike."""
  size = x.astype(jnp.int32) if x.dtype == bool else jnp.abs(x)
  other = jnp.any((size != jnp.round(size)) | ~(size <= largest))
  spikes = jnp.where(other, 0, size).astype(jnp.int32)
  return spikes, x != 0, other.astype(jnp.int32)


def _sum(a, axes=None):
  return jnp.sum(a, axes, dtype=jnp.int32)


def _convolution(equation, arguments, origins, largest):
  x, kernel = arguments
  settings = equation.params
  of_x, of_kernel, of_output = settings['dimension_numbers']
  shape = equation.outvars[0].aval.shape
  reach = []
  for i, (low, _) in enumerate(settings['padding']):
    at = np.arange(x.shape[of_x[2 + i]])[:, None] * settings['lhs_dilation'][i]
    taps = np.arange(kernel.shape[of_kernel[2 + i]])
    at = at + low - taps * settings['rhs_dilation'][i]
    output, between = np.divmod(at, settings['window_strides'][i])
    hit = (output >= 0) & (output < shape[of_output[2 + i]]) & (between == 0)
    reach.append(tuple(np.sum(hit, 1).tolist()))
  groups = settings['feature_group_count'] * settings['batch_group_count']
  fan_out = kernel.shape[of_kernel[0]] // groups
  spikes, active, other = (
    _sum(jnp.transpose(a, of_x), (0, 1)) if a.ndim else a
    for a in _spikes(x, largest)
  )
  examples = x.shape[of_x[0]]
  here = examples * x.shape[of_x[1]]
  return Count(
    _name(origins[1], equation),
    spikes,
    active,
    jnp.int32(1),
    other,
    tuple(reach),
    fan_out,
    x.size,
    examples,
    here * fan_out * math.prod(map(sum, reach)),
  )


def _product(equation, arguments, origins, largest):
  (contracted, batch) = equation.params['dimension_numbers']
  sides = list(zip(arguments, contracted, batch, strict=True))
  free = [x.size // math.prod(_shape(x, [*c, *b])) for x, c, b in sides]
  if None not in origins or origins == [None, None]:
    return _activations(equation, sides, free, largest)
  data = origins.index(None)
  x, fan_out = arguments[data], free[1 - data]
  spikes, active, other = map(_sum, _spikes(x, largest))
  name = _name(origins[1 - data], equation)
  return Count(
    name, spikes, active, jnp.int32(1), other, (), fan_out, x.size, free[data],
    x.size * fan_out,
  )  # fmt: skip


def _activations(equation, sides, free, largest):
  """A product of two activations."""
  x, contracted, batch = sides[0]
  terms, others = [], []
  for (side, *axes), size in zip(sides, free, strict=True):
    spikes, _, other = _spikes(side, largest)
    lead = [*axes[1], *axes[0]]
    rest = [axis for axis in range(side.ndim) if axis not in lead]
    spikes = _sum(
      jnp.transpose(spikes, lead + rest), tuple(range(len(lead), side.ndim))
    )
    terms.append(jnp.where(other, size, spikes))
    others.append(other)
  reached = _sum(
    terms[0] * terms[1], tuple(range(len(batch), len(batch) + len(contracted)))
  )
  examples = free[0] * math.prod(_shape(x, batch))
  return Count(
    _name(None, equation),
    reached,
    _sum(x != 0),
    jnp.int32(1),
    others[0] & others[1],
    ((1,),) * len(batch),
    1,
    x.size,
    examples,
    x.size * free[1],
  )


def _shape(x, axes):
  return [x.shape[axis] for axis in axes]


PRODUCTS = {'conv_general_dilated': _convolution, 'dot_general': _product}
