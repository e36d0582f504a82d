"""The model, its state, and one step of training or evaluation.

Every device holds the whole state and a part of the batch; gradients, tdBN's
statistics and the membranes' are pooled over the mapped axis `AXIS`. The only
file that knows `pmap`.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import jax_utils, traverse_util
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsatgo_jax import losses, models
from train import criterion, data

AXIS = 'batch'
# XLA's own convolutions are faster; see benchmarks/README.md.
CPU_OPTIONS = {
  'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'
}

# What is kept of the collection `spiking`, per layer and timestep.
ACTIVITY = ('firing_rate', 'gradient_share', 'theta', 'width')


# What of a step's metrics must be finite for the step to count.
FINITE = ('loss', 'gradient_norm', 'update_norm')


class TrainState(flax.struct.PyTreeNode):
  """All that a step changes; `skipped` counts those that changed nothing."""

  step: jax.Array
  params: dict
  batch_stats: dict
  opt_state: optax.OptState
  skipped: jax.Array


def create_model(config, num_classes, axis_name=None):
  """Returns the network that `config.model` names."""
  networks = {
    name: value
    for name, value in vars(models).items()
    if isinstance(value, type) and issubclass(value, nn.Module)
  }
  if config.model not in networks:
    raise ValueError(
      f'config.model must be one of {", ".join(networks)}, got {config.model!r}'
    )
  network = networks[config.model]
  shared = {
    'num_classes': num_classes,
    'num_steps': config.num_steps,
    'method': config.method,
    'dtype': jnp.dtype(config.dtype),
    'axis_name': axis_name,
  }
  chosen = {**config.neuron, **config.model_args}
  known = {field.name for field in dataclasses.fields(network)}
  known -= {*shared, 'parent', 'name'}
  if unknown := chosen.keys() - known:
    raise ValueError(
      'config.neuron and config.model_args must be attributes of '
      f'{config.model}, {", ".join(sorted(known))}, got '
      f'{", ".join(sorted(unknown))}'
    )
  return network(**shared, **chosen)


def create_schedule(config, steps_per_epoch):
  """Returns the learning rate as a function of the step.

  Linear warm-up, then cosine to 0, which PyTorch steps once an epoch.
  """
  warmup = config.warmup_epochs * steps_per_epoch
  decay = config.num_epochs * steps_per_epoch - warmup
  cosine = optax.cosine_decay_schedule(config.learning_rate, max(decay, 1))
  every = {'step': 1, 'epoch': steps_per_epoch}[config.cosine_per]
  return optax.join_schedules(
    (
      optax.linear_schedule(0, config.learning_rate, warmup),
      lambda step: cosine(step // every * every),
    ),
    (warmup,),
  )


def create_optimizer(config, schedule):
  """Returns SGD as PyTorch has it (decay before momentum), or AdamW."""

  def decayed(params):
    return traverse_util.path_aware_map(
      lambda path, _: path[-1] != 'v_th', params
    )

  decay = optax.add_decayed_weights(config.weight_decay, decayed)
  rules = {
    'sgd': (decay, optax.trace(config.momentum)),
    'adamw': (optax.scale_by_adam(), decay),
  }[config.optimizer]
  if config.grad_clip_norm:
    rules = (optax.clip_by_global_norm(config.grad_clip_norm), *rules)
  return optax.chain(*rules, optax.scale_by_learning_rate(schedule))


def create_state(config, model, optimizer, example_shape):
  """Returns the first state, the same on every local device."""

  def create(rng):
    images = prepare(jnp.zeros((2, *example_shape)), 0.0, 1.0)
    variables = model.init(rng, images, train=False)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=variables['params'],
      batch_stats=variables['batch_stats'],
      opt_state=optimizer.init(variables['params']),
      skipped=jnp.zeros((), jnp.int32),
    )

  create = jax.jit(create, out_shardings=replicated())
  key = jax.random.key(config.seed)
  if isinstance(key, jax.core.Tracer):  # `train.plan` asks for shapes only.
    return create(key)
  # It runs once: better compiled fast than fast.
  return create.lower(key).compile({'xla_backend_optimization_level': 0})(key)


def prepare(images, mean, std):
  """Normalises a batch; event frames come out time first."""
  images = data.normalize(images, mean, std)
  return jnp.moveaxis(images, 1, 0) if images.ndim == 5 else images


def predicted(logits):
  """The predicted classes [B] of logits [T, B, K]."""
  return jnp.argmax(losses.prediction(logits), axis=-1)


def by_layer(sown):
  """Turns the `spiking` collection into `{layer: {name: [T]}}`."""
  layers = collections.OrderedDict()  # JAX keeps its order, first to last.
  for (*path, name), value in traverse_util.flatten_dict(sown).items():
    if name in ACTIVITY:
      layer = '/'.join(path).removesuffix('/neuron')
      layers.setdefault(layer, {})[name] = over_time(value)
  return layers


def over_time(a):
  """A number a timestep, [T]; of a threshold for each channel their mean."""
  return a if a.ndim < 2 else a.reshape(a.shape[0], -1).mean(-1)


def train_step(
  state, batch, *, model, optimizer, schedule, loss, mean, std, skip_nonfinite=0
):
  """One step. Returns the new state and the metrics of the whole batch.

  Where one of `FINITE` is not finite all but the counters stays as it
  was; and from the first such step on that is more than `skip_nonfinite`, these
  too: whatever step is run after it, what comes out is the state before it.
  """

  def forward(params):
    logits, updates = model.apply(
      {'params': params, 'batch_stats': state.batch_stats},
      prepare(batch['image'], mean, std),
      train=True,
      mutable=['batch_stats'],
    )
    accuracy = jnp.mean(predicted(logits) == batch['label'])
    value = jnp.mean(loss(logits, batch['label']))
    return value, (accuracy, updates['batch_stats'])

  (value, (accuracy, batch_stats)), gradients = jax.value_and_grad(
    forward, has_aux=True
  )(state.params)
  gradients, value, accuracy = jax.lax.pmean((gradients, value, accuracy), AXIS)
  change, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  measured = {
    'loss': value,
    'accuracy': accuracy,
    'gradient_norm': optax.tree.norm(gradients),
    'update_norm': optax.tree.norm(change),
    'learning_rate': schedule(state.step - state.skipped),
  }
  finite = jnp.isfinite(jnp.stack([measured[name] for name in FINITE])).all()
  skipped = measured['skipped'] = state.skipped + ~finite
  going_on = skipped <= skip_nonfinite
  kept = state.replace(step=state.step + going_on, skipped=skipped)
  changed = kept.replace(
    params=optax.apply_updates(state.params, change),
    batch_stats=batch_stats,
    opt_state=opt_state,
  )
  state = jax.tree.map(
    functools.partial(jnp.where, finite & going_on), changed, kept
  )
  return state, measured


def eval_step(
  variables, batch, *, model, loss, mean, std, class_weights=None, each=False
):
  """Returns sums over the examples of a batch that are not padding.

  Example by example, so that what the layers measured can be masked as well.

  Args:
    variables: params and batch_stats.
    batch: each device's part, with a mask.
    model: without an axis.
    loss: a function of `dsatgo_jax.losses`, its settings given.
    mean: of the data.
    std: of the data.
    class_weights: [K], or None.
    each: whether to return `(sums, {'logits', 'label', 'mask'})`, the latter of
      each example of the whole batch, padding too; [B, K] of the prediction.
  """

  def measure(image, label):
    logits, sown = model.apply(
      variables,
      prepare(image[None], mean, std),
      train=False,
      mutable=['spiking'],
    )
    told = {
      'num_examples': jnp.ones(()),
      'loss': loss(logits, label[None], class_weights=class_weights)[0],
      'accuracy': (predicted(logits)[0] == label).astype(jnp.float32),
      'layers': by_layer(sown['spiking']),
    }
    if class_weights is not None:
      told['weight'] = jnp.asarray(class_weights)[label]
      # TET's regulariser, which has a mean of its own.
      none = jnp.zeros(len(class_weights))
      told['unweighted'] = loss(logits, label[None], class_weights=none)[0]
    return told, losses.prediction(logits)[0]

  measured, logits = jax.vmap(measure)(batch['image'], batch['label'])
  sums = jax.tree.map(
    lambda x: jnp.tensordot(batch['mask'].astype(x.dtype), x, 1), measured
  )
  sums['confusion'] = (
    jnp.zeros((logits.shape[-1],) * 2, jnp.int32)
    .at[batch['label'], jnp.argmax(logits, -1)]
    .add(batch['mask'].astype(jnp.int32))
  )
  sums = jax.lax.psum(sums, AXIS)
  if not each:
    return sums
  told = {'logits': logits, 'label': batch['label'], 'mask': batch['mask']}
  return sums, jax.lax.all_gather(told, AXIS, tiled=True)


def replicated():
  """The sharding of what every local device holds whole."""
  return NamedSharding(
    Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec()
  )


def on_devices(batches):
  """Yields batches on the devices, the next one already under way."""

  def split(array):
    return array.reshape(jax.local_device_count(), -1, *array.shape[1:])

  batches = (jax.tree.map(split, batch) for batch in batches)
  return jax_utils.prefetch_to_device(batches, 2, axis_name=AXIS)


def pmapped(step, **options):
  """Maps a step of `(state or variables, batch)` over devices."""
  return jax.pmap(
    step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, **options
  )


def compiled(step):
  """Returns a mapped step that is compiled, at its first call, for the job."""
  if jax.process_count() > 1:
    # Compiled beforehand, it would expect the shapes of all processes together.
    return step
  programs = []

  def run(*arguments):
    if not programs:
      programs.append(compile_step(step.lower(*arguments)))
    return programs[0](*arguments)

  return run


def compile_step(lowered):
  """Compiles a lowered step; on CPU without YNNPACK's convolutions."""
  if jax.default_backend() == 'cpu':
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # No such option.
      return lowered.compile(CPU_OPTIONS)
  return lowered.compile()


def variables(state):
  """What inference needs of a state."""
  return {'params': state.params, 'batch_stats': state.batch_stats}


def objective(config, facts):
  """What a step is told of the loss and the data."""
  loss = criterion.of_batch(config, facts['num_classes'], AXIS)
  mean, std = np.float32(facts['mean']), np.float32(facts['std'])
  return {'loss': loss, 'mean': mean, 'std': std}


def create_eval_step(config, facts, each=False):
  """Returns `eval_step` of `(variables, batch)`, over all local devices.

  With class weights the loss of an evaluation is weighted as in training: by
  `average`, over all of its examples. Accuracies never are.
  """
  # No axis: examples are independent, and measured one by one.
  model = create_model(config, facts['num_classes'])
  told = objective(config, facts) | {
    'loss': criterion.of_example(config),
    'class_weights': criterion.class_weights(config, facts['num_classes']),
  }
  return pmapped(functools.partial(eval_step, model=model, each=each, **told))


def create_train_step(config, facts, steps_per_epoch, devices=None):
  """Returns the first state and `train_step`, over `devices` or all here."""
  schedule = create_schedule(config, steps_per_epoch)
  optimizer = create_optimizer(config, schedule)
  model = create_model(config, facts['num_classes'], AXIS)
  state = create_state(config, model, optimizer, facts['example_shape'])
  step = functools.partial(
    train_step,
    model=model,
    optimizer=optimizer,
    schedule=schedule,
    skip_nonfinite=config.skip_nonfinite,
    **objective(config, facts),
  )
  return state, pmapped(step, donate_argnums=0, devices=devices)


def evaluate(run_eval, variables, batches):
  """Returns loss, accuracy and activity, averaged over all examples."""
  return average(run_eval(variables, batch) for batch in on_devices(batches))


def average(results):
  """Turns sums over examples into means; reads each one step late.

  Returns:
    `num_examples`, `loss`, `accuracy`, `layers`, and `confusion`, how many
    examples of each class (rows) were taken for each class (columns).
  """
  sums, pending = None, None
  for result in itertools.chain(results, [None]):
    if pending is not None:
      ready = jax.device_get(pending)
      sums = ready if sums is None else jax.tree.map(np.add, sums, ready)
    pending = result
  count, confusion = sums.pop('num_examples').item(), sums.pop('confusion')
  means = jax.tree.map(lambda x: (x / count).tolist(), sums)
  if 'weight' in means:
    weight, rest = means.pop('weight'), means.pop('unweighted')
    means['loss'] = (means['loss'] - rest) / weight + rest
  return {'num_examples': int(count), **means, 'confusion': confusion.tolist()}


def unmasked(batch):
  """A training batch, as the evaluation step takes it."""
  return batch | {'mask': batch['label'] >= 0}
