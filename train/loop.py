"""The training loop, from the model to the final accuracy.

Every device holds the whole state and a part of the batch; gradients, tdBN's
statistics and the membranes' are pooled over the mapped axis `AXIS`. No step
waits for the host: a step's metrics are read after the next one has started.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import signal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import jax_utils, serialization, traverse_util
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsatgo_jax import losses, models
from train import checkpoints, data, metrics, profile

AXIS = 'batch'
# XLA's own convolutions are faster; see benchmarks/README.md.
CPU_OPTIONS = {
  'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'
}

# What is kept of the collection `spiking`, per layer and timestep.
ACTIVITY = ('firing_rate', 'gradient_share', 'theta', 'width')
CHOICES = {
  'cosine_per': ('step', 'epoch'),
  'dtype': ('float32', 'bfloat16', 'float64'),
  'loss': ('cross_entropy', 'tet'),
  'optimizer': ('sgd', 'adamw'),
  'select_on': ('validation', 'test'),
}
POSITIVE = (
  'num_epochs', 'batch_size', 'num_steps', 'learning_rate', 'log_every',
)  # fmt: skip
NOT_NEGATIVE = ('momentum', 'weight_decay', 'grad_clip_norm', 'label_smoothing')
OTHERS = (
  'augment', 'data_dir', 'data_path', 'dataset', 'mean', 'method', 'model',
  'model_args', 'neuron', 'normalize', 'num_workers', 'profile', 'seed', 'std',
  'validation_fraction', 'warmup_epochs',
)  # fmt: skip
# What may differ when a run is resumed; anything else would be another run.
FREE = (
  'config.data_dir', 'config.data_path', 'config.log_every',
  'config.num_workers', 'config.profile',
)  # fmt: skip


class TrainState(flax.struct.PyTreeNode):
  """All that a step changes."""

  step: jax.Array
  params: dict
  batch_stats: dict
  opt_state: optax.OptState


def check(config):
  """Raises a `ValueError` for a setting that is missing or out of its range."""
  expected = {*CHOICES, *POSITIVE, *NOT_NEGATIVE, *OTHERS}
  if missing := expected.difference(config):
    raise ValueError(
      f'expected a config with {", ".join(sorted(missing))}, as '
      'configs/digits.py has them, got none'
    )
  for name, choices in CHOICES.items():
    if config[name] not in choices:
      raise ValueError(
        f'config.{name} must be one of {", ".join(choices)}, '
        f'got {config[name]!r}'
      )
  for name in POSITIVE:
    if not config[name] > 0:
      raise ValueError(f'config.{name} must be positive, got {config[name]}')
  for name in NOT_NEGATIVE:
    if config[name] < 0:
      raise ValueError(f'config.{name} must be 0 or more, got {config[name]}')
  if not 0 <= config.warmup_epochs <= config.num_epochs:
    raise ValueError(
      f'config.warmup_epochs must be in [0, num_epochs = {config.num_epochs}], '
      f'got {config.warmup_epochs}'
    )
  if config.batch_size % jax.device_count():
    raise ValueError(
      'config.batch_size must be a multiple of the number of devices, '
      f'{jax.device_count()}, got {config.batch_size}'
    )


def check_unchanged(info, key, value):
  """Raises a `ValueError` naming what differs from the run to be resumed."""
  expected, got = (
    traverse_util.flatten_dict(json.loads(json.dumps({key: tree})), sep='.')
    for tree in (info.get(key, value), value)
  )
  for name in sorted(expected.keys() | got.keys()):
    if name not in FREE and expected.get(name) != got.get(name):
      raise ValueError(
        f'{name} differs from the run in this workdir, expected '
        f'{expected.get(name)!r}, got {got.get(name)!r}: choose another '
        'workdir for another run'
      )


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
      layers.setdefault(layer, {})[name] = value
  return layers


def train_step(state, batch, *, model, optimizer, schedule, loss, mean, std):
  """One step. Returns the new state and the metrics of the whole batch."""

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
    'learning_rate': schedule(state.step),
  }
  state = TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, change),
    batch_stats=batch_stats,
    opt_state=opt_state,
  )
  return state, measured


def eval_step(variables, batch, *, model, loss, mean, std):
  """Returns sums over the examples of a batch that are not padding.

  Example by example, so that what the layers measured can be masked as well.
  """

  def measure(image, label):
    logits, sown = model.apply(
      variables,
      prepare(image[None], mean, std),
      train=False,
      mutable=['spiking'],
    )
    return {
      'num_examples': jnp.ones(()),
      'loss': loss(logits, label[None])[0],
      'accuracy': (predicted(logits)[0] == label).astype(jnp.float32),
      'layers': by_layer(sown['spiking']),
    }

  measured = jax.vmap(measure)(batch['image'], batch['label'])
  sums = jax.tree.map(
    lambda x: jnp.tensordot(batch['mask'].astype(x.dtype), x, 1), measured
  )
  return jax.lax.psum(sums, AXIS)


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
  """Maps a step of `(state or variables, batch)` over the local devices."""
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


def describe(dataset):
  """What inference needs to know of the data; kept in the checkpoint."""
  return {
    'num_classes': int(dataset.num_classes),
    'example_shape': [int(size) for size in dataset.example_shape],
    'mean': dataset.mean.tolist(),
    'std': dataset.std.tolist(),
  }


def this_host():
  """Which part of every batch this process reads."""
  return {'host': jax.process_index(), 'num_hosts': jax.process_count()}


def objective(config, facts):
  """What both steps are told of the loss and the data."""
  loss = functools.partial(
    getattr(losses, config.loss), label_smoothing=config.label_smoothing
  )
  mean, std = np.float32(facts['mean']), np.float32(facts['std'])
  return {'loss': loss, 'mean': mean, 'std': std}


def create_eval_step(config, facts):
  """Returns `eval_step` of `(variables, batch)`, over all local devices."""
  # No axis: examples are independent, and measured one by one.
  model = create_model(config, facts['num_classes'])
  return pmapped(
    functools.partial(eval_step, model=model, **objective(config, facts))
  )


def create_train_step(config, facts, steps_per_epoch):
  """Returns the first state and `train_step` over all local devices."""
  schedule = create_schedule(config, steps_per_epoch)
  optimizer = create_optimizer(config, schedule)
  model = create_model(config, facts['num_classes'], AXIS)
  state = create_state(config, model, optimizer, facts['example_shape'])
  step = functools.partial(
    train_step,
    model=model,
    optimizer=optimizer,
    schedule=schedule,
    **objective(config, facts),
  )
  return state, pmapped(step, donate_argnums=0)


def evaluate(run_eval, variables, source, config):
  """Returns loss, accuracy and activity, averaged over all examples."""
  batches = data.eval_batches(
    source, config, batch_size=config.batch_size, **this_host()
  )
  return average(run_eval(variables, batch) for batch in on_devices(batches))


def average(results):
  """Turns sums over examples into means; reads each one step late."""
  sums, pending = None, None
  for result in itertools.chain(results, [None]):
    if pending is not None:
      ready = jax.device_get(pending)
      sums = ready if sums is None else jax.tree.map(np.add, sums, ready)
    pending = result
  count = sums.pop('num_examples').item()
  return {
    'num_examples': int(count),
    **jax.tree.map(lambda x: (x / count).tolist(), sums),
  }


def unmasked(batch):
  """A training batch, as the evaluation step takes it."""
  return batch | {'mask': batch['label'] >= 0}


def run_epoch(run_step, state, batches, steps, read, must_stop):
  """Runs steps; the metrics of each are read after the next one was started.

  Returns:
    The state, the last batch, what `read` made of the last step, and whether to
    stop here.
  """
  pending = None
  for step in steps:
    batch = next(batches)
    with jax.profiler.StepTraceAnnotation('start', step_num=step):
      state, measured = run_step(state, batch)
    if pending:
      read(*pending)
    pending = step, measured
    if stopping := must_stop(step):
      break
  return state, batch, read(*pending), stopping


@contextlib.contextmanager
def stop_signal():
  """Yields `must_stop(step)`: whether SIGTERM or Ctrl-C came (once).

  Of several processes all hear it at the same step.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  received = []
  handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

  def restore():
    for number, handler in handlers.items():
      signal.signal(number, handler)

  def receive(number, _):
    received.append(number)
    restore()  # A second signal ends the process at once.

  for number in handlers:
    signal.signal(number, receive)
  try:
    yield lambda step: bool(received)
  finally:
    restore()


def warn_of_thresholds(layers, step, warned):
  """Logs the layers that have a threshold of 0 or less, each of them once."""
  for name, layer in layers.items():
    theta = min(layer['theta'])
    if theta <= 0 and name not in warned:
      logging.warning('%s has a threshold of %g at step %d', name, theta, step)
      warned.add(name)


def train(config, workdir, seconds=None):
  """Trains, or goes on training, and evaluates the last state.

  Args:
    config: see `configs/digits.py`.
    workdir: gets checkpoints, metrics and `result.json`.
    seconds: a counter that this run's times are added to, by name.

  Returns:
    What `result.json` has; None on all processes but the first.

  Raises:
    ValueError: config, data and what is in the workdir do not fit.
    FloatingPointError: the loss or a gradient is not finite.
    SystemExit: after a signal, with the state saved.
  """
  check(config)
  seconds = collections.Counter() if seconds is None else seconds
  timed = functools.partial(metrics.timed, seconds)
  workdir = pathlib.Path(workdir)
  main = jax.process_index() == 0  # It alone touches the workdir.

  # What is there already.
  found = checkpoints.restore(workdir, repair=True) if main else None
  saved, info = found or (None, {'best': None, 'totals': {}})
  check_unchanged(info, 'config', config.to_dict())
  result = metrics.read_json(workdir / 'result.json') if found else None
  finished = result is not None and result['step'] == info['step']
  if multihost_utils.broadcast_one_to_all(finished):
    print(f'{workdir} is finished: nothing left to train')
    return result

  # Data, state and compiled steps.
  with timed('data'):
    dataset = data.load(config)
  facts = describe(dataset)
  check_unchanged(info, 'data', facts)
  steps_per_epoch = data.steps_per_epoch(dataset, config)
  num_steps = config.num_epochs * steps_per_epoch
  with timed('compile'):
    state, run_step = create_train_step(config, facts, steps_per_epoch)
    if saved:
      state = serialization.from_state_dict(state, saved)
    host_state = multihost_utils.broadcast_one_to_all(jax.device_get(state))
    start = int(host_state.step)
    batches = on_devices(
      data.train_batches(dataset.train, config, start_step=start, **this_host())
    )
    batch = next(batches)
    run_step = compiled(run_step)
    run_eval = compiled(create_eval_step(config, facts))
    state = jax.device_put(host_state, replicated())
    # Compiles; what comes out is dropped.
    jax.block_until_ready(run_eval(variables(state), unmasked(batch)))
    jax.block_until_ready(run_step(state, batch))
    state = jax.device_put(host_state, replicated())
  batches = itertools.chain([batch], batches)
  if saved and main:
    print(f'{workdir}: going on from step {start}')
  if config.profile:
    batches = profile.trace(batches, workdir)

  # The epochs.
  best, totals = info['best'], collections.Counter(info['totals'])
  selection, warned = getattr(dataset, config.select_on), set()
  with contextlib.ExitStack() as stack:
    must_stop = stack.enter_context(stop_signal())
    bar = stack.enter_context(metrics.progress(config, num_steps, start))
    if main:
      write = stack.enter_context(metrics.writer(workdir, start))
      metrics.write_json(workdir / 'config.json', config.to_dict())
      latest, best_one = (
        stack.enter_context(checkpoints.manager(workdir, which))
        for which in ('latest', 'best')
      )

    def read(step, scalars):
      """Waits for the metrics of a step; checks, counts and shows them."""
      line = {'step': step, 'epoch': step / steps_per_epoch}
      line |= {name: x.item() for name, x in jax.device_get(scalars).items()}
      for name in ('loss', 'gradient_norm'):
        if not math.isfinite(line[name]):
          raise FloatingPointError(
            f'expected a finite {name}, got {line[name]} at step {step}'
          )
      totals.update(steps=1, loss=line['loss'], accuracy=line['accuracy'])
      metrics.show(bar, line, config.batch_size)
      if main and step % config.log_every == 0 and step % steps_per_epoch:
        write(line)
      return line

    for epoch in range(start // steps_per_epoch, config.num_epochs):
      last = (epoch + 1) * steps_per_epoch
      steps = range(max(start, epoch * steps_per_epoch) + 1, last + 1)
      before = seconds['train']
      with timed('train'):
        state, batch, line, stopping = run_epoch(
          run_step, state, batches, steps, read, must_stop
        )
      step, is_best = line['step'], False
      if step == last:
        line['images_per_second'] = (
          len(steps) * config.batch_size / (seconds['train'] - before)
        )
        line['train_loss'] = totals['loss'] / totals['steps']
        line['train_accuracy'] = totals['accuracy'] / totals['steps']
        totals.clear()
        with timed('evaluate'):
          if selection is None:
            scores = average([run_eval(variables(state), unmasked(batch))])
          else:
            scores = evaluate(run_eval, variables(state), selection, config)
        line['layers'] = scores['layers']
        if selection is not None:
          for name in ('loss', 'accuracy'):
            line[f'{config.select_on}_{name}'] = scores[name]
          is_best = best is None or scores['accuracy'] > best['accuracy']
          if is_best:
            best = {'step': step, 'accuracy': scores['accuracy']}
      if main:
        if step == last:
          warn_of_thresholds(line['layers'], step, warned)
          write(line)
          bar.write(metrics.summary(line))
        info = {
          'step': step,
          'config': config.to_dict(),
          'data': facts,
          'best': best,
          'totals': totals,
        }
        if is_best:
          checkpoints.save(best_one, state, info)
          best_one.wait_until_finished()  # Before the latest one tells of it.
        checkpoints.save(latest, state, info)
      if stopping and step < num_steps:
        raise SystemExit(f'stopped after step {step}; the same command resumes')

  with timed('evaluate'):
    tested = evaluate(run_eval, variables(state), dataset.test, config)
  result = {
    'step': num_steps,
    **tested,
    'best': best,
    'selected_on': config.select_on if best else None,
    'seconds': seconds,
  }
  if main:
    metrics.write_json(workdir / 'result.json', result)
    return result
