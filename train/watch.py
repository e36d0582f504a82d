"""A look inside the network: what neurons do, gradients do, and spikes cost.

`config.watch_every = N` watches the first step of a run and every N-th: what
`watch_step` returns goes into a line of `metrics.jsonl`, to TensorBoard and
into the report. It is a program of its own beside the training step, which
stays what it is; it takes the state and the batch of a step, before that runs.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dsatgo_jax.analysis import activity, energy, flow
from train import step as step_lib


def watch_step(variables, batch, *, model, loss, mean, std, train):
  """Measures activity, membranes and gradients of the mean loss.

  Args:
    variables: params and batch_stats.
    batch: each device's part.
    model: with statistics over `AXIS`.
    loss: of the steps.
    mean: of the data.
    std: of the data.
    train: whether with the batch's statistics and thresholds, or the running
      ones.

  Returns:
    Of the whole batch, layers in the order of the network:

        activity       {layer: what `linen` sows into `spiking`, [T] or (), the
                       mean of thresholds and widths for each channel}
        flow           {layer: `flow.summary`, [T]}
        histograms     {layer: shares of u - theta between `EDGES`, [T, bins]}
        gradient_norm  {parameter: ()}
  """
  images = step_lib.prepare(batch['image'], mean, std)
  zeros = flow.zeros(model, variables, images, train=train)

  def forward(params, zeros):
    logits, told = model.apply(
      variables | zeros | {'params': params},
      images,
      train=train,
      mutable=['batch_stats', 'spiking', 'histograms'],
    )
    # Here their order is still that of the network.
    told = {name: _by_layer(told[name]) for name in ('spiking', 'histograms')}
    return jnp.mean(loss(logits, batch['label'])), told

  (params, probes), told = jax.grad(forward, (0, 1), has_aux=True)(
    variables['params'], zeros
  )
  params = jax.lax.pmean(params, step_lib.AXIS)
  probes = flow.pooled(probes['flow'], step_lib.AXIS)
  paths = {_short(name): one for name, one in flow.summary(probes).items()}
  layers = told['spiking']
  return {
    'activity': jax.tree.map(step_lib.over_time, layers),
    'flow': collections.OrderedDict((name, paths[name]) for name in layers),
    'histograms': collections.OrderedDict(
      (name, one['membrane']) for name, one in told['histograms'].items()
    ),
    'gradient_norm': {
      name: _norm(a)
      for name, a in traverse_util.flatten_dict(params, sep='/').items()
    },
  }


def create_watch_step(config, facts, train=True, devices=None):
  """Returns `watch_step` of `(variables, batch)`, over `devices` or all."""
  model = step_lib.create_model(config, facts['num_classes'], step_lib.AXIS)
  return step_lib.pmapped(
    functools.partial(
      watch_step,
      model=model,
      train=train,
      **step_lib.objective(config, facts),
    ),
    devices=devices,
  )


def energy_step(variables, batch, *, model, mean, std):
  """Counts the spikes of the examples of a batch that are not padding.

  Args:
    variables: params and batch_stats.
    batch: each device's part, with a mask.
    model: without an axis; examples are counted one by one.
    mean: of the data.
    std: of the data.

  Returns:
    `(num_examples, energy.count)` of the whole batch.
  """

  def count(image):
    images = step_lib.prepare(image[None], mean, std)
    return energy.count(model.apply, variables, images)

  mask = batch['mask'].astype(jnp.int32)
  counts = jax.vmap(count)(batch['image'])
  sums = jax.tree.map(lambda x: jnp.tensordot(mask, x, 1), counts)
  return jax.lax.psum((jnp.sum(mask), sums), step_lib.AXIS)


def create_energy_step(config, facts):
  """Returns `energy_step` of `(variables, batch)`, over all local devices."""
  model = step_lib.create_model(config, facts['num_classes'])
  settings = step_lib.objective(config, facts)
  del settings['loss']
  return step_lib.pmapped(
    functools.partial(energy_step, model=model, **settings)
  )


def measure_energy(config, facts, variables, batches):
  """Returns the `energy.Energy` of an example, the mean over all batches."""
  run = step_lib.compiled(create_energy_step(config, facts))
  sums = None
  for batch in step_lib.on_devices(batches):
    found = jax.tree.map(np.int64, jax.device_get(run(variables, batch)))
    sums = found if sums is None else jax.tree.map(np.add, sums, found)
  num_examples, counts = sums
  return energy.total(counts, int(num_examples), config.num_steps)


def is_due(config, step):
  """Whether a step is watched: the first one, and every N-th."""
  every = config.watch_every
  return bool(every) and (step == 1 or step % every == 0)


def _by_layer(collection):
  return collections.OrderedDict(
    (_short(name), layer)
    for name, layer in activity.by_layer(collection).items()
  )


def _short(layer):
  return layer.removesuffix('/neuron')


def _norm(a):
  """The norm of an array, also where its squares would vanish."""
  largest = jnp.max(jnp.abs(a))
  scale = jnp.where(largest > 0, largest, 1)
  return scale * jnp.sqrt(jnp.sum(jnp.square(a / scale)))
