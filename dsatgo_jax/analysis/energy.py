"""Energy: the synaptic operations of a network, counted.

A spike costs an addition at every synapse that it reaches; a number that is no
spike costs a multiplication and an addition. A layer of weights then takes

    E = 0.9 pJ * accumulates              where its input is spikes
    E = 4.6 pJ * multiply-accumulates     where it is not

by the energies of 32-bit floating-point arithmetic in 45 nm: 0.9 pJ for an
addition, 3.7 pJ for a multiplication (Horowitz, "Computing's energy problem
(and what we can do about it)", ISSCC 2014, pages 10-14, figure 1.1.9). They are
arguments.

What is counted is every convolution and matrix product that the input takes
part in, wherever the model has it: in `jit`, `remat`, `scan`, `cond`, `while`
or custom derivatives. It is found in the traced program, so the model may be of
Linen, of NNX or a plain function, with neurons of this library or others.

- Connections are the true ones. A spike at the border of an image reaches fewer
  outputs, and one that a stride steps over none. Nothing is multiplied with
  padding, which published figures often count.
- Spikes are small whole numbers, of either sign. One of 2 or 3, as SEW-ADD
  makes them, is that many accumulates. A layer whose input is anything else in
  any call - images, pooled averages, membranes - multiplies, in all its calls
  and with zeros too.
- A product of two activations, as in attention, accumulates where either is
  spikes.
- Beside it stands the ReLU twin: the same layers with all connections
  multiplied, once and not at each of T timesteps.

Not counted, in the network and in its twin, are what a neuron does by itself
(leak, threshold and reset: a few operations per neuron and timestep, where
synapses are hundreds), biases, batch norm, which inference folds into the
weights, pooling, and sums of branches; nor is memory, which takes more than all
of it on most hardware.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from dsatgo_jax.analysis import tree

ACCUMULATE = 0.9
MULTIPLY_ACCUMULATE = 4.6


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


class Layer(NamedTuple):
  """A layer of weights, per example.

  Attributes:
    kind: 'AC' for accumulates, 'MAC' for multiply-accumulates.
    rate: the share of its inputs that were not zero.
    operations: of that kind, over all timesteps.
    energy: pJ.
    relu_operations: multiply-accumulates of the ReLU twin.
    relu_energy: pJ.
  """

  kind: str
  rate: float
  operations: float
  energy: float
  relu_operations: float
  relu_energy: float


class Energy(NamedTuple):
  """A network, per example.

  Attributes:
    layers: `Layer`s by name, in the order in which they run.
    accumulates: of all layers.
    multiply_accumulates: of all layers.
    energy: pJ.
    relu_operations: multiply-accumulates of the ReLU twin.
    relu_energy: pJ.
  """

  layers: dict[str, Layer]
  accumulates: float
  multiply_accumulates: float
  energy: float
  relu_operations: float
  relu_energy: float


def measure(
  apply: Callable,
  variables: Any,
  *inputs: Any,
  num_steps: int,
  batch_axis: int = 0,
  **settings,
) -> Energy:
  """Runs a model on a batch, and counts; `count` and `total` in one call.

  Args:
    apply: the model, `apply(variables, *inputs)`, as it is run in inference.
    variables: its weights, any tree; or an NNX module.
    *inputs: a batch; further arguments.
    num_steps: T; see `total`.
    batch_axis: of the first input: 0 for images [B, ...], 1 for frames
      [T, B, ...].
    **settings: further arguments of `total`.

  Returns:
    `Energy`, per example.

  Raises:
    ValueError: what `count` and `total` raise.
  """
  counts = jax.jit(functools.partial(count, apply))(variables, *inputs)
  num_examples = jax.tree.leaves(inputs)[0].shape[batch_axis]
  return total(counts, num_examples, num_steps, **settings)


def count(
  apply: Callable, variables: Any, *inputs: Any, largest: int = 16
) -> list[Count]:
  """Counts spikes where they enter convolutions and products.

  A pure function, for `jit`, `pmap`, `vmap` or a scan over batches; no
  activation is kept. Compiled once, it serves all batches of a shape:

      count = jax.jit(functools.partial(energy.count, apply))
      counts = [count(variables, images) for images in batches]
      counts = jax.tree.map(lambda *parts: sum(parts), *counts)

  A layer's name is the path of its weights in the variables, without the
  collection and `kernel`: 'block0/conv1'; with a number where a scan takes
  stacked weights one after the other. Weights that are not in the variables are
  called after the scope they are in, or after what is done with them.

  Args:
    apply: the model, `apply(variables, *inputs)`.
    variables: its weights, any tree; or an NNX module.
    *inputs: what it is applied to.
    largest: whole numbers beyond it are no spikes, as in an 8-bit image.

  Returns:
    A `Count` for each convolution and product in the program.

  Raises:
    ValueError: one stands inside something that can't be looked into.
  """
  closed = jax.make_jaxpr(apply)(variables, *inputs)
  named, _ = jax.tree_util.tree_flatten_with_path(variables)
  collections = isinstance(variables, Mapping) and 'params' in variables
  origins = [
    frozenset([_module(path, collections)] if path else []) for path, _ in named
  ]
  batch = jax.tree.leaves(inputs)
  counts = _run(
    closed,
    [*(value for _, value in named), *batch],
    [*origins, *[None] * len(batch)],
    largest,
  )[1]
  # Without a name they would be taken for one layer.
  return [
    dataclasses.replace(part, name=f'{part.name}_{i}')
    if part.name in _PRODUCTS
    else part
    for i, part in enumerate(counts)
  ]


def total(
  counts: list[Count],
  num_examples: int,
  num_steps: int,
  *,
  accumulate: float = ACCUMULATE,
  multiply_accumulate: float = MULTIPLY_ACCUMULATE,
) -> Energy:
  """Adds up what `count` counted; exactly, in integers.

  Args:
    counts: of one batch, or the sum over several.
    num_examples: how many they were made of.
    num_steps: T. Where a layer took T examples, or a multiple, for each one of
      these, its ReLU twin runs once where it ran T times. A layer that took one
      - an image, before it is repeated in time - is the same in both. 1 for a
      twin that sees every frame of a recording.
    accumulate: pJ.
    multiply_accumulate: pJ.

  Returns:
    `Energy`, per example.

  Raises:
    ValueError: a number is not positive.
  """
  if num_examples < 1 or num_steps < 1:
    raise ValueError(
      'Expected num_examples >= 1 and num_steps >= 1, got '
      f'{num_examples=}, {num_steps=}.'
    )
  by_name: dict[str, list[Count]] = {}
  for part in jax.device_get(counts):
    by_name.setdefault(part.name, []).append(part)
  layers = {}
  for name, parts in by_name.items():
    calls = [int(part.calls) for part in parts]
    if not any(calls):
      continue
    inputs, examples, connections = (
      sum(
        n * getattr(part, field) for n, part in zip(calls, parts, strict=True)
      )
      for field in ('inputs', 'examples', 'connections')
    )
    active = sum(int(np.sum(part.active, dtype=np.int64)) for part in parts)
    multiplies = any(int(part.multiplied) for part in parts)
    operations = connections if multiplies else sum(map(_reached, parts))
    repeats = 1 if examples % (num_examples * num_steps) else num_steps
    cost = multiply_accumulate if multiplies else accumulate
    twin = connections / repeats / num_examples
    layers[name] = Layer(
      'MAC' if multiplies else 'AC',
      active / inputs,
      operations / num_examples,
      cost * operations / num_examples,
      twin,
      multiply_accumulate * twin,
    )
  rows = layers.values()
  return Energy(
    layers,
    math.fsum(row.operations for row in rows if row.kind == 'AC'),
    math.fsum(row.operations for row in rows if row.kind == 'MAC'),
    math.fsum(row.energy for row in rows),
    math.fsum(row.relu_operations for row in rows),
    math.fsum(row.relu_energy for row in rows),
  )


def _reached(part):
  """The synapses that spikes reached, each as often as they did."""
  spikes = np.asarray(part.spikes).astype(object)  # Integers of any size.
  for axis, reach in enumerate(part.reach):
    shape = [-1 if i == axis else 1 for i in range(spikes.ndim)]
    spikes = spikes * np.array(reach, object).reshape(shape)
  return part.fan_out * int(np.sum(spikes))


# Where a value comes from: the names of the weights that it is made of, or None
# if the input is in it.


def _join(origins):
  origins = list(origins)
  return None if None in origins else frozenset().union(*origins)


def _module(path, collections):
  """The name of the layer that a variable belongs to."""
  names = tree.keys(path[1:] if collections else path)
  if len(names) > 1 and names[-1] in ('kernel', 'embedding'):
    names.pop()
  return '/'.join(names)


def _name(origin, equation):
  """The path that all weights of a product share, or the scope of it."""
  shared = []
  for keys in zip(*(name.split('/') for name in origin or ()), strict=False):
    if len(set(keys)) > 1:
      break
    shared.append(keys[0])
  scope = str(equation.source_info.name_stack)
  return '/'.join(shared) or scope or equation.primitive.name


def _flow(equation, origins):
  """The origins of an equation's results."""
  name, settings = equation.primitive.name, equation.params
  if name == 'scan':
    return _trace(settings['jaxpr'], _settled(equation, origins))
  if name == 'while':
    return _settled(equation, origins)[settings['body_nconsts'] :]
  if name == 'cond':
    branches = [_trace(branch, origins[1:]) for branch in settings['branches']]
    return list(map(_join, zip(*branches, strict=True)))
  if name in _CALLS:
    return _trace(_called(equation), origins)
  return [_join(origins)] * len(equation.outvars)


def _settled(equation, origins):
  """Of what a loop's body takes, once what is carried has gone around."""
  settings = equation.params
  if equation.primitive.name == 'scan':
    body, first = settings['jaxpr'], settings['num_consts']
    last = first + settings['num_carry']
  else:
    origins = origins[settings['cond_nconsts'] :]
    body, first = settings['body_jaxpr'], settings['body_nconsts']
    last = len(origins)
  while True:
    results = _trace(body, origins)
    carried = list(map(_join, zip(origins[first:last], results, strict=False)))
    if carried == origins[first:last]:
      return origins
    origins = origins[:first] + carried + origins[last:]


def _trace(closed, origins):
  """The origins of a program's results."""
  known = _known(closed, origins)
  for equation in closed.jaxpr.eqns:
    results = _flow(equation, _read(known, equation.invars, frozenset()))
    known.update(zip(equation.outvars, results, strict=True))
  return _read(known, closed.jaxpr.outvars, frozenset())


def _known(closed, origins):
  constants = dict.fromkeys(closed.jaxpr.constvars, frozenset())
  return constants | dict(zip(closed.jaxpr.invars, origins, strict=True))


def _read(known, atoms, literal=None):
  """What is known of variables; of literals their value, or one for all."""
  return [
    known[atom]
    if not isinstance(atom, core.Literal)
    else atom.val
    if literal is None
    else literal
    for atom in atoms
  ]


# Programs within programs.

# They run one, once, on what they are given.
_CALLS = (
  'jit', 'pjit', 'remat', 'remat2', 'checkpoint', 'custom_jvp_call',
  'custom_vjp_call', 'closed_call', 'core_call',
)  # fmt: skip


def _called(equation):
  settings = equation.params
  jaxpr = settings.get('jaxpr', settings.get('call_jaxpr'))
  if isinstance(jaxpr, core.ClosedJaxpr):
    return jaxpr
  return core.ClosedJaxpr(jaxpr, ())


def _has_products(jaxpr):
  return any(
    equation.primitive.name in _PRODUCTS
    or any(map(_has_products, core.jaxprs_in_params(equation.params)))
    for equation in jaxpr.eqns
  )


# The program, run and counted.


def _run(closed, arguments, origins, largest):
  """A program's results, and a list of `Count`s."""
  known = _known(closed, origins)
  values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
  values |= dict(zip(closed.jaxpr.invars, arguments, strict=True))
  counts = []
  for equation in closed.jaxpr.eqns:
    here = _read(known, equation.invars, frozenset())
    taken = _read(values, equation.invars)
    name = equation.primitive.name
    if name in _PRODUCTS and None in here:
      counts.append(_PRODUCTS[name](equation, taken, here, largest))
    inside = core.jaxprs_in_params(equation.params)
    if None in here and any(map(_has_products, inside)):
      results, more = _run_inside(equation, taken, here, largest)
      counts += more
    else:
      results = _bind(equation, taken)
    values.update(zip(equation.outvars, results, strict=True))
    known.update(zip(equation.outvars, _flow(equation, here), strict=True))
  return _read(values, closed.jaxpr.outvars), counts


def _bind(equation, arguments):
  """An equation's results."""
  given = {
    variable: value
    for variable, value in zip(equation.invars, arguments, strict=True)
    if not isinstance(variable, core.Literal)
  }
  jaxpr = core.Jaxpr(
    (),
    list(given),
    equation.outvars,
    [equation],
    equation.effects,
    core.DebugInfo('count', equation.primitive.name, None, None),
  )
  return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*given.values())


def _run_inside(equation, arguments, origins, largest):
  """`_run` of an equation that has products inside."""
  name, settings = equation.primitive.name, equation.params
  if name in _CALLS:
    return _run(_called(equation), arguments, origins, largest)
  if name == 'scan':
    return _run_scan(equation, arguments, origins, largest)
  if name == 'cond':
    return _run_cond(equation, arguments, origins, largest)
  if name == 'while' and not _has_products(settings['cond_jaxpr'].jaxpr):
    return _run_while(equation, arguments, origins, largest)
  raise ValueError(
    'Expected convolutions and matrix products in jit, remat, scan, cond, '
    'while or custom derivatives, where they can be counted, got one inside '
    f'{name!r}. Count inside it, or give a model without it.'
  )


def _run_scan(equation, arguments, origins, largest):
  settings = equation.params
  first = settings['num_consts']
  last = first + settings['num_carry']
  origins = _settled(equation, origins)

  def body(carry, x):
    results, counts = _run(
      settings['jaxpr'], [*arguments[:first], *carry, *x], origins, largest
    )
    split = settings['num_carry']
    return results[:split], (results[split:], counts)

  carry, (stacked, counts) = lax.scan(
    body,
    arguments[first:last],
    arguments[last:],
    settings['length'],
    settings['reverse'],
    settings['unroll'],
  )
  apart = _join(origin for origin in origins[last:] if origin is not None)
  summed = []
  for part in counts:
    if part.name in apart:  # A layer for each round, as in `nn.scan`.
      summed += [
        dataclasses.replace(
          jax.tree.map(lambda a: a[i], part),  # noqa: B023
          name=f'{part.name}/{i}',
        )
        for i in range(settings['length'])
      ]
    else:
      summed.append(jax.tree.map(_sum_first, part))
  return [*carry, *stacked], summed


def _sum_first(a):
  return jnp.sum(a, 0, dtype=a.dtype)


def _run_cond(equation, arguments, origins, largest):
  index, *arguments = arguments
  branches = [
    functools.partial(_run, branch, origins=origins[1:], largest=largest)
    for branch in equation.params['branches']
  ]
  shapes = [jax.eval_shape(branch, arguments)[1] for branch in branches]

  def counted(i):
    def branch(arguments):
      results, counts = branches[i](arguments)
      return results, [
        counts if i == j else _zeros(other) for j, other in enumerate(shapes)
      ]

    return branch

  results, counts = lax.switch(
    index, [counted(i) for i in range(len(branches))], arguments
  )
  return results, sum(counts, [])


def _run_while(equation, arguments, origins, largest):
  settings = equation.params
  first = settings['cond_nconsts']
  last = first + settings['body_nconsts']
  origins = _settled(equation, origins)

  def run(carry):
    return _run(
      settings['body_jaxpr'], [*arguments[first:last], *carry], origins, largest
    )

  def go_on(state):
    test = core.jaxpr_as_fun(settings['cond_jaxpr'])
    return test(*arguments[:first], *state[0])[0]

  def body(state):
    carry, counts = run(state[0])
    return carry, jax.tree.map(jnp.add, state[1], counts)

  init = arguments[last:]
  zeros = _zeros(jax.eval_shape(run, init)[1])
  return lax.while_loop(go_on, body, (init, zeros))


def _zeros(shapes):
  return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


# Products.


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


_PRODUCTS = {'conv_general_dilated': _convolution, 'dot_general': _product}
