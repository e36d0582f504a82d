"""What compilers must be told, and why.

XLA's CPU compiler writes one array with each loop and computes what it has not
written again in every loop that reads it; and what was computed for the forward
pass it keeps for the backward pass where that computes it once more. What is
said here changes no number.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend import core
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def parts(num_steps):
  """Slices of at most 5 timesteps, all of one length if that is possible."""
  size = next((n for n in (5, 4, 3) if num_steps % n == 0), 5)
  return [slice(i, i + size) for i in range(0, num_steps, size)]


def stack(arrays):
  """Stacks one array a timestep."""
  return join([jnp.stack(arrays[part]) for part in parts(len(arrays))])


def gathered(arrays):
  """Stacks one array a timestep; what reads them reads the stack.

  Elsewhere than on CPU as [B, T, ...] in memory, which weights and tdBN want;
  without the barrier each of their kernels would read the single arrays.
  """

  def batch_major(*arrays):
    return jnp.moveaxis(lax.optimization_barrier(jnp.stack(arrays, 1)), 1, 0)

  return lax.platform_dependent(
    *arrays, cpu=lambda *arrays: stack(arrays), default=batch_major
  )


def join(parts):
  """Concatenates trees in time; the last may be shorter than the others.

  XLA's CPU compiler computes up to 8 arrays where their concatenation is to be;
  more it copies. It makes one of nested ones, unless a reshape is between.
  """
  lengths = [len(jax.tree.leaves(part)[0]) for part in parts]
  whole = lengths.count(lengths[0])
  joined = jax.tree.map(
    lambda *a: jnp.stack(a).reshape(-1, *a[0].shape[1:]), *parts[:whole]
  )
  return jax.tree.map(lambda *a: jnp.concatenate(a), joined, *parts[whole:])


def late(x, g, measured):
  """x, but to the compiler something else in the backward pass.

  What is made of it can then be computed only when the cotangent g [B, ...]
  and the last statistics are known. Else XLA would take it from the forward
  pass and keep it until then; its CPU compiler does so across the barriers of
  `jax.checkpoint`, too.
  """
  bound = jnp.inf if measured is None else jnp.inf + _any_of(measured)
  # One value per example leaves a sharded batch where it is.
  first = lax.expand_dims(g.reshape(g.shape[0], -1)[:, 0], range(1, g.ndim))
  return jnp.where(first > bound, 1, x)


def never(x, measured=None):
  """False, which the compiler cannot know."""
  scalar = x[(0,) * x.ndim] if measured is None else _any_of(measured)
  return scalar > jnp.inf


def _any_of(tree):
  """A scalar of a tree of arrays, [T, ...]: one of the last to be known."""
  last = jax.tree.leaves(tree)[-1][-1]
  return last[(0,) * last.ndim]


def unknown(value, x):
  """A number, which the compiler cannot know; x is a scalar at hand.

  XLA makes `(c * a) * (c * a)` of a constant c into `(c * c) * (a * a)`, and
  overflows where the product as written would not.
  """
  return jnp.where(x > jnp.inf, jnp.ones_like(x), value)


def through_bits(spikes, never):
  """Stacks spikes, on CPU from one array with a bit for each timestep.

  XLA's CPU compiler writes one array with each loop, and computes all timesteps
  up to t for the spikes of t. One loop computes all the bits. Where membranes
  are measured they are in memory, and nothing is computed again. Spikes that
  are NaN at a timestep come out NaN at all.
  """

  def by_bits(spikes, never):
    num_steps, dtype = len(spikes), spikes[0].dtype
    # One bit more says that a membrane was not finite, which stays so.
    kind = jnp.uint16 if num_steps < 16 else jnp.uint32
    lost = functools.reduce(jnp.logical_or, map(jnp.isnan, spikes))
    bits = functools.reduce(
      jnp.bitwise_or,
      [
        bit.astype(kind) << i
        for i, bit in enumerate([*(s != 0 for s in spikes), lost])
      ],
    )
    bits = in_memory(bits, never)
    return stack(
      [
        jnp.where(bits >> num_steps == 0, bits >> i & 1, jnp.nan).astype(dtype)
        for i in range(num_steps)
      ]
    )

  return lax.platform_dependent(
    spikes, never, cpu=by_bits, default=lambda spikes, never: stack(spikes)
  )


def in_memory(a, never):
  """a, written to memory by XLA's CPU compiler.

  Else it may compute a anew in every loop that reads it, and in turn all that a
  is made of: work that grows with the square of T. What a conditional takes has
  to be in memory, and is not copied if nothing else reads it.
  """
  return lax.platform_dependent(
    a,
    never,
    cpu=lambda a, never: lax.cond(never, jnp.negative, lambda a: a, a),
    default=lambda a, never: a,
  )


def kept(tree):
  """Statistics that are kept where layers are computed again (`packing.KEPT`).

  Sums in another order would make other thresholds, and other spikes.
  """
  return jax.tree.map(lambda a: checkpoint_name(a, 'statistics'), tree)


def is_summed(x, axis_name):
  """Whether x is known to be the same on all devices of a mapped axis.

  Under `shard_map` the gradient of what is replicated is; under `pmap` nothing
  is known.
  """
  return axis_name in _varying(lax.axis_index(axis_name)) - _varying(x)


def _varying(x):
  """The mapped axes over which x's type says that it varies."""
  aval = jax.typeof(x)
  kind = getattr(aval, 'manual_axis_type', None)
  return kind.varying if kind else getattr(aval, 'vma', None) or frozenset()


def automatic(function, out):
  """Leaves the sharding within a function to the compiler.

  Under explicit mesh axes, those of `jax.make_mesh`, slices and reshapes of
  what is sharded are refused.

  Args:
    function: of arrays, the first of which tells the mesh.
    out: the `PartitionSpec`s of its outputs, or of whole trees of them.

  Returns:
    The same function of arrays that are sharded explicitly, or not.
  """

  def shielded(x, *rest):
    mesh = jax.typeof(x).sharding.mesh
    axes = mesh.explicit_axes
    if not axes:
      return function(x, *rest)
    within = jax.sharding.auto_axes(function, axes=axes, out_sharding=out)
    with jax.sharding.use_abstract_mesh(mesh):
      return within(x, *rest)

  return shielded


def vary_like(x, tree):
  """Makes a tree vary over the mesh axes that x varies over (`shard_map`)."""
  return jax.tree.map(
    lambda a: a + jnp.zeros_like(x, dtype=a.dtype, shape=()), tree
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def either(kernel, plain, batch, *arguments):
  """`plain(*arguments)`, or what does the same as a program's own kernels.

  Those are taken where a program, or its part under `shard_map` or `pmap`, is
  for one NVIDIA GPU, and by each of several for its part of a batch that is
  sharded under `jax.jit`. Under `vmap`, and for derivatives of it, `plain` is
  taken.

  Args:
    kernel: of trees of arrays; and of `axis_name`, over which they are then to
      be pooled as well, the parts of a batch.
    plain: of the same trees, differentiable.
    batch: which axis of the arrays is the batch, -1 for none: a prefix of the
      trees of arguments, the first of which is an array that has one, and a
      prefix of what is returned.
    *arguments: trees of arrays; where the two know other traced values,
      `plain` is taken.

  Returns:
    What `plain` returns.
  """
  flat, tree = jax.tree.flatten(arguments)

  def traced(function):
    def of_flat(*flat):
      return function(*tree.unflatten(flat))

    return jax.make_jaxpr(of_flat, return_shape=True)(*flat)

  ours, shape = traced(plain)
  theirs, _ = traced(kernel)
  if any(isinstance(a, jax.core.Tracer) for a in ours.consts + theirs.consts):
    return plain(*arguments)  # A rule of one's own knows what is traced.

  def part(axis_name, *flat):
    return jax.tree.leaves(kernel(*tree.unflatten(flat), axis_name=axis_name))

  axes = tuple(
    tuple(jax.tree.leaves(jax.tree.broadcast(prefix, whole)))
    for prefix, whole in zip(batch, (arguments, shape), strict=True)
  )
  # Traced here, since programs are told of their devices for what is in them.
  spread = jax.make_jaxpr(by_parts(ours, part, axes))(*flat)
  flat = _either.bind(*flat, kernel=theirs, plain=ours, spread=spread)
  return jax.tree.unflatten(jax.tree.structure(shape), flat)


def by_parts(plain, part, axes):
  """`plain`, which devices do by `part` where its batch is sharded."""

  def placed(mesh, names, axes):
    return [
      NamedSharding(mesh, P(*[None] * axis, names) if axis >= 0 else P())
      for axis in axes
    ]

  def partition(mesh, arguments, outputs):
    del outputs
    x, axis = arguments[0], axes[0][0]
    names = [*x.sharding.spec, *[None] * x.ndim][axis]
    size = math.prod(mesh.shape[name] for name in jax.tree.leaves(names))
    if x.shape[axis] % size:
      names = None  # Each does all of it.

    def one(*arguments):
      none = jax.sharding.AbstractMesh((), ())  # Of explicit axes.
      with jax.sharding.use_abstract_mesh(none):
        return part(names, *arguments[:number])

    given, told = (placed(mesh, names, of) for of in axes)
    return mesh, one, told, tuple(given)

  def rule(avals, axes, start):
    return ', '.join(
      ' '.join('b' if i == axis else f'{start}{k}d{i}' for i in range(a.ndim))
      for k, (a, axis) in enumerate(zip(avals, axes, strict=True))
    )

  @custom_partitioning
  def whole(*arguments):
    closed = core.ClosedJaxpr(plain.jaxpr, arguments[number:])
    return core.jaxpr_as_fun(closed)(*arguments[:number])

  # It may know no array.
  number, consts = len(axes[0]), plain.consts
  axes = (*axes[0], *(-1 for _ in consts)), axes[1]
  whole.def_partition(
    partition,
    sharding_rule=f'{rule([*plain.in_avals, *consts], axes[0], "i")} -> '
    f'{rule(plain.out_avals, axes[1], "o")}',
  )
  return lambda *arguments: whole(*arguments, *consts)


def _either_forward(kernel, plain, batch, *arguments):
  return either(kernel, plain, batch, *arguments), arguments


def _either_backward(kernel, plain, batch, arguments, cotangent):
  del kernel, batch
  return jax.vjp(plain, *arguments)[1](cotangent)


either.defvjp(_either_forward, _either_backward)

_either = core.Primitive('either')
_either.multiple_results = True
_either.def_abstract_eval(lambda *_, plain, **__: plain.out_avals)


@_either.def_impl
def _plainly(*arguments, plain, **_):
  return core.jaxpr_as_fun(plain)(*arguments)


def _either_batched(axis, arguments, dims, plain, **_):
  outputs = jax.vmap(
    core.jaxpr_as_fun(plain),
    dims,
    axis_name=axis.name,
    axis_size=axis.size,
    spmd_axis_name=axis.spmd_name,
  )(*arguments)
  return outputs, [0] * len(outputs)


batching.fancy_primitive_batchers[_either] = _either_batched


def _either_on_gpu(ctx, *arguments, kernel, plain, spread):
  context = ctx.module_context.axis_context
  chosen = plain
  if isinstance(context, mlir.ShardingContext):
    chosen = kernel if context.num_devices == 1 else spread
  elif isinstance(context, mlir.SPMDAxisContext) and (
    set(context.mesh.axis_names) == set(context.manual_axes)
  ):  # Under `shard_map` over all axes.
    chosen = kernel
  function = mlir.lower_fun(core.jaxpr_as_fun(chosen), multiple_results=True)
  return function(ctx, *arguments)


mlir.register_lowering(_either, mlir.lower_fun(_plainly, multiple_results=True))
mlir.register_lowering(_either, _either_on_gpu, platform='cuda')
