"""A loss or a gradient that is not finite: where it began, and what is kept.

The step itself leaves the state as it was (`train_step`); what is here runs
once, when such a step ends the run.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from train import checkpoints
from train import step as step_lib

# What has a name of its own; the rest are modules and parameters.
GIVEN = ('the images', 'the parameters and running values', 'the loss')


def examine_step(variables, batch, *, model, loss, mean, std):
  """Counts what is not finite in a training step's batch, layers, gradients.

  Args:
    variables: params and batch_stats.
    batch: each device's part.
    model: with statistics over `AXIS`.
    loss: of the steps.
    mean: of the data.
    std: of the data.

  Returns:
    `(forward, backward)`, numbers of values by name, each in the order in which
    they were computed: images, variables, what each module gave, the loss; and
    the gradients of the parameters, the last layer first.
  """
  images = step_lib.prepare(batch['image'], mean, std)

  def run(params):
    logits, told = model.apply(
      variables | {'params': params},
      images,
      train=True,
      mutable=['batch_stats', 'intermediates'],
      capture_intermediates=True,
    )
    modules = collections.OrderedDict(
      ('/'.join(path[:-1]), count(outputs))
      for path, outputs in traverse_util.flatten_dict(
        told['intermediates']
      ).items()
    )
    return jnp.mean(loss(logits, batch['label'])), modules

  (value, modules), gradients = jax.value_and_grad(run, has_aux=True)(
    variables['params']
  )
  gradients = jax.lax.pmean(gradients, step_lib.AXIS)
  flat = traverse_util.flatten_dict(gradients, sep='/')
  order = list(modules)  # As they ran; gradients come sorted by name.

  def depth(name):
    while name not in order:
      name = name.rpartition('/')[0]
    return order.index(name)

  forward = collections.OrderedDict(
    zip(GIVEN[:2], map(count, (images, variables)), strict=True)
  )
  forward |= modules | {'the loss': count(value)}
  backward = collections.OrderedDict(
    (name, count(flat[name])) for name in sorted(flat, key=depth, reverse=True)
  )
  return jax.lax.psum((forward, backward), step_lib.AXIS)


def count(tree):
  """How many values of a tree of arrays are not finite."""
  return sum(
    jnp.sum(~jnp.isfinite(leaf))
    for leaf in jax.tree.leaves(tree)
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  )


def create_examine_step(config, facts):
  """Returns `examine_step` of `(variables, batch)`, over all local devices."""
  model = step_lib.create_model(config, facts['num_classes'], step_lib.AXIS)
  return step_lib.pmapped(
    lambda variables, batch: examine_step(
      variables, batch, model=model, **step_lib.objective(config, facts)
    )
  )


def first(forward, backward):
  """Says in words where the first value was that is not finite."""
  for counts, what in ((forward, 'the output'), (backward, 'the gradient')):
    for name, number in counts.items():
      if number:
        whose = name if name in GIVEN else f'{what} of {name or "the network"}'
        return f'the first values that are not finite are those of {whose}'
  return 'run again, every output and gradient was finite'


def explain(book, state, batch, step):
  """Says where it began, and writes the state before the step and its batch.

  Args:
    book: the run's journal.
    state: which the step left as it was, but for the counters.
    batch: of the step.
    step: its number.
  """
  run = create_examine_step(book.config, book.facts)
  counts = run(step_lib.variables(state), batch)
  told = first(*jax.device_get(counts))
  if not book.workdir:
    return told
  info, workdir = book.describe(step - 1), book.workdir
  before = state.replace(skipped=state.skipped - 1)
  with checkpoints.manager(workdir, 'nonfinite') as manager:
    checkpoints.save(manager, before, info)
  # Of several processes each has its own part of the batch.
  arrays = {
    name: np.concatenate(
      [np.concatenate(shard.data) for shard in array.addressable_shards]
    )
    for name, array in batch.items()
  }
  np.savez(workdir / 'nonfinite.npz', **arrays)
  return (
    f'{told}; the batch is in {workdir}/nonfinite.npz, and '
    f"train.load('{workdir}', 'nonfinite') gives the network before it"
  )
