"""Synaptic operations, counted where they are in a traced program.

The program is looked through for convolutions and products that the input takes
part in; `energy` says what counts, and makes energies of the counts.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from dsatgo_jax.analysis import tree
from dsatgo_jax.analysis.synapses import PRODUCTS, Count


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
    if part.name in PRODUCTS
    else part
    for i, part in enumerate(counts)
  ]


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
    body, (first, last) = settings['jaxpr'], _carried(settings)
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


def _carried(settings):
  """Where what a scan carries begins and ends among its arguments."""
  if 'ft_in' in settings:  # Since JAX 0.12.
    constants, carry, _ = map(len, settings['ft_in'].unpack())
  else:
    constants, carry = settings['num_consts'], settings['num_carry']
  return constants, constants + carry


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
    equation.primitive.name in PRODUCTS
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
    if name in PRODUCTS and None in here:
      counts.append(PRODUCTS[name](equation, taken, here, largest))
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
  first, last = _carried(settings)
  origins = _settled(equation, origins)

  def body(carry, x):
    results, counts = _run(
      settings['jaxpr'], [*arguments[:first], *carry, *x], origins, largest
    )
    split = last - first
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
