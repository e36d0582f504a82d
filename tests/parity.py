"""Compares ours with reference arrays: `python -m tests.parity FILE.npz ...`.

Each file holds inputs and results of the authors' programs in one of these
layouts, recognised by its arrays:

  neuron    a PLIF or LIF neuron: training batches b0, b1, ..., inference
  resnet19  ResNet-19: training steps s0, s1, ..., final state, inference
  mpd_agl   tdBN and the MPD-AGL neuron: one training batch
  tet_loss  the TET loss at several lambdas

Ours runs on the same inputs in float64. Printed is the largest relative error,
max|a - b| / max(max|b|, 1e-12), and of spikes the number that differ. The exit
status is 1 if an error is above 1e-9, a spike differs, or a file is damaged or
holds anything but the arrays of one layout.
"""

import argparse
import collections
import itertools
import re
import sys
import zipfile
import zlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsatgo_jax import convert, losses, neurons
from dsatgo_jax import linen as snn
from dsatgo_jax.models import ResNet19

TOLERANCE = 1e-9

# How the authors' programs ran.
DS_ATGO = {'method': 'ds_atgo', 'width_signal': 'sigma'}
LABEL_SMOOTHING = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4


def neuron(arrays):
  """Training batches in a row, then inference."""
  learnt = 'w' in arrays
  settings = {} if learnt else {'decay': float(arrays['decay'])}
  layer = snn.SpikingNeuron(
    **DS_ATGO, **settings, learn_decay=learnt, param_dtype=jnp.float64
  )
  params = {'w': arrays['w']} if learnt else {}
  variables = layer.init(jax.random.key(0), arrays['b0.input'], False)
  stats = variables['batch_stats']

  def forward(params, stats, x):
    variables = {'params': params, 'batch_stats': stats}
    return layer.apply(variables, x, False, mutable=['batch_stats', 'spiking'])

  @jax.jit
  def train(params, stats, x, cotangent):
    spikes, pull, new = jax.vjp(forward, params, stats, x, has_aux=True)
    return spikes, new, pull(cotangent)

  for b in numbered('b', arrays):
    x, cotangent = arrays[f'{b}.input'], arrays[f'{b}.cotangent']
    spikes, new, (grads, _, grad_input) = train(params, stats, x, cotangent)
    stats = new['batch_stats']
    yield f'{b}.spikes', spikes
    yield f'{b}.membrane_after_reset', membranes(x, **params or settings)
    yield f'{b}.threshold', new['spiking']['theta']
    yield f'{b}.width', new['spiking']['width']
    yield f'{b}.grad_input', grad_input
    yield from ((f'{b}.grad_{name}', grad) for name, grad in grads.items())
    yield f'{b}.running_threshold_after', stats['running_threshold']

  variables = {'params': params, 'batch_stats': stats}
  yield 'eval.spikes', layer.apply(variables, arrays['eval.input'], True)


@jax.jit
def membranes(x, w=None, decay=None):
  """The membrane after the reset, of all timesteps."""
  decay = jax.nn.sigmoid(w) if decay is None else decay
  parameters = neurons.Parameters(decay)
  state, after = None, []
  for x_t in x:
    _, state, _ = neurons.step(state, x_t, parameters, 'ds_atgo')
    after.append(state.v)
  return jnp.stack(after)


def resnet19(arrays):
  """Optimiser steps in a row, then inference."""
  state_dict = {
    name.removeprefix('init.'): array
    for name, array in arrays.items()
    if name.startswith('init.')
  }
  num_steps = {'num_steps': len(arrays['s0.logits'])}
  model = ResNet19(
    **convert.settings(state_dict) | num_steps | DS_ATGO,
    dtype=jnp.float64,
    param_dtype=jnp.float64,
  )
  template = jax.jit(model.init)(jax.random.key(0), arrays['s0.images'])
  variables = convert.from_torch(state_dict, template)
  steps = list(numbered('s', arrays))
  learning_rates = jnp.stack([arrays[f'{s}.lr'] for s in steps])
  optimizer = optax.chain(
    optax.add_decayed_weights(WEIGHT_DECAY),
    optax.sgd(lambda count: learning_rates[count], MOMENTUM),
  )
  opt_state = optimizer.init(variables['params'])

  @jax.jit
  def train(variables, opt_state, images, labels):
    def forward(params):
      logits, new = model.apply(
        variables | {'params': params},
        images,
        train=True,
        mutable=['batch_stats'],
      )
      loss = losses.cross_entropy(logits, labels, LABEL_SMOOTHING)
      return jnp.mean(loss), (logits, new)

    params = variables['params']
    results, grads = jax.value_and_grad(forward, has_aux=True)(params)
    loss, (logits, new) = results
    change, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, change)
    return new | {'params': params}, opt_state, loss, logits, grads

  all_losses = []
  for s in steps:
    variables, opt_state, loss, logits, grads = train(
      variables, opt_state, arrays[f'{s}.images'], arrays[f'{s}.labels']
    )
    all_losses.append(loss)
    yield f'{s}.logits', logits
    if any(name.startswith(f'{s}.grad.') for name in arrays):
      for name, grad in convert.to_torch({'params': grads}).items():
        yield f'{s}.grad.{name}', grad
  yield 'losses', jnp.stack(all_losses)
  for name, array in convert.to_torch(variables).items():
    if not name.endswith('.running_signal'):  # Theirs keeps none.
      yield f'final.{name}', array
  yield 'eval.logits', jax.jit(model.apply)(variables, arrays['eval.images'])


def mpd_agl(arrays):
  """TdBN, then the neuron."""
  v_th = float(arrays['v_th'])
  norm = snn.TdBatchNorm(
    v_th=v_th, factored=True, use_running_average=False, param_dtype=jnp.float64
  )
  neuron = snn.SpikingNeuron(
    'mpd_agl', v_th=v_th, use_running_average=False, param_dtype=jnp.float64
  )
  x, scale = arrays['input'], arrays['tdbn.scale']
  stats = norm.init(jax.random.key(0), x)['batch_stats']

  def normalize(params, x):
    variables = {'params': params, 'batch_stats': stats}
    return norm.apply(variables, x, mutable=['batch_stats'])

  def fire(params, normalized):
    return neuron.apply({'params': params}, normalized, tdbn_scale=scale)

  normalized, pull_norm, new = jax.vjp(
    normalize, {'scale': scale, 'bias': arrays['tdbn.bias']}, x, has_aux=True
  )
  spikes, pull_neuron = jax.vjp(fire, {'w': arrays['plif.w']}, normalized)
  plif, grad_normalized = pull_neuron(jnp.asarray(arrays['cotangent']))
  tdbn, grad_input = pull_norm(grad_normalized)
  yield 'normalized', normalized
  yield 'spikes', spikes
  yield 'grad_input', grad_input
  yield 'grad_normalized', grad_normalized
  yield 'grad.tdbn.scale', tdbn['scale']
  yield 'grad.tdbn.bias', tdbn['bias']
  yield 'grad.plif.w', plif['w']
  yield 'running_mean_after', new['batch_stats']['mean']
  yield 'running_var_after', new['batch_stats']['var']


def tet_loss(arrays):
  """Loss and gradient at each lambda; theirs is the mean over the examples."""

  def loss(logits, lam):
    return jnp.mean(losses.tet(logits, arrays['labels'], lam, mean=1.0))

  for name in [name for name in arrays if name.startswith('loss.lambda=')]:
    _, lam = name.split('=')
    value, grad = jax.value_and_grad(loss)(arrays['logits'], float(lam))
    yield name, value
    yield f'grad.lambda={lam}', grad


# What tells a layout, and the arrays in it that are not results of ours.
LAYOUTS = (
  (neuron, 'b0.input', r'(b\d+|eval)\.input|b\d+\.cotangent|w|decay'),
  (
    resnet19,
    'init.encode.0.layer.weight',
    r'init\..*|(s\d+|eval)\.images|s\d+\.(labels|lr)'
    r'|final\..*\.num_batches_tracked',
  ),
  (mpd_agl, 'tdbn.scale', r'tdbn\..*|plif\.w|v_th|input|cotangent'),
  (tet_loss, 'logits', 'logits|labels'),
)


class Arrays(dict):
  """A file's arrays by name; a missing one is an error that names it."""

  def __missing__(self, name):
    raise ValueError(f'expected an array {name}, got none')


def load(path):
  """The arrays of a file, floating point ones as float64."""
  try:
    with open(path, 'rb') as file:
      archive = np.load(file)
      if isinstance(archive, np.ndarray):
        raise ValueError('a single array')
      arrays = Arrays(archive)
  except (
    OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error,
  ) as error:  # fmt: skip
    raise ValueError(f'expected an intact .npz file, got {error}') from error
  for name, array in arrays.items():
    if np.issubdtype(array.dtype, np.floating):
      arrays[name] = array.astype(np.float64)
  return arrays


def numbered(letter, arrays):
  """The prefixes b0, b1, ... that arrays have."""
  prefixes = {name.split('.')[0] for name in arrays}
  names = (f'{letter}{i}' for i in itertools.count())
  return itertools.takewhile(prefixes.__contains__, names)


def compare(arrays):
  """Runs ours. Returns the layout's name, and the error of each array."""
  known = [layout for layout in LAYOUTS if layout[1] in arrays]
  if len(known) != 1:
    marks = ', '.join(mark for _, mark, _ in LAYOUTS)
    raise ValueError(
      f'expected the arrays of one layout, told by one of {marks}; got '
      f'{", ".join(itertools.islice(arrays, 5))}, ...'
    )
  ((run, _, inputs),) = known
  errors = {
    name: difference(name, np.asarray(ours), arrays[name])
    for name, ours in run(arrays)
  }
  left = [
    name
    for name in arrays
    if name not in errors and not re.fullmatch(inputs, name)
  ]
  if left:
    raise ValueError(
      f'expected arrays of the layout {run.__name__} alone, got also '
      f'{", ".join(left)}'
    )
  return run.__name__, errors


def difference(name, ours, theirs):
  """The largest relative error, or the number of spikes that differ."""
  if ours.shape != theirs.shape:
    raise ValueError(f'expected {name} {ours.shape}, got {theirs.shape}')
  if name.endswith('spikes'):
    return int(np.sum(ours != theirs))
  with np.errstate(invalid='ignore'):
    error = np.max(np.abs(ours - theirs))
  return float(error / max(np.max(np.abs(theirs)), 1e-12))


def passes(name, error):
  """Whether an error is small enough; NaN is not."""
  return error <= (0 if name.endswith('spikes') else TOLERANCE)


def group(name):
  """What stands in the table for an array and others of its kind."""
  name = re.sub(r'^([bs])\d+\.', r'\1*.', name)
  return re.sub(r'^(s\*\.grad|final)\..*\.', r'\1.*.', name)


def table(errors, verbose):
  """Lines of a table, one for each kind of array, or for each array."""
  groups = collections.defaultdict(list)
  for name in errors:
    groups[name if verbose else group(name)].append(name)
  width = max(map(len, groups))
  for kind, names in groups.items():
    # NaN is the worst.
    worst = max(
      names, key=lambda name: (errors[name] != errors[name], errors[name])
    )
    error = errors[worst]
    shown = f'{error} differ' if isinstance(error, int) else f'{error:.1e}'
    line = f'  {kind:<{width}}  {shown:>10}'
    if len(names) > 1:
      line += f'  worst of {len(names)}: {worst}'
    yield line if passes(worst, error) else f'{line}  FAILED'


def check(path, verbose):
  """Compares one file and prints the table. Returns whether it passes."""
  try:
    layout, errors = compare(load(path))
  except (ValueError, TypeError, flax.errors.FlaxError) as error:
    print(f'{path}: FAILED: {" ".join(str(error).split())}')
    return False
  print(f'{path}: {layout}, {len(errors)} arrays')
  print(*table(errors, verbose), sep='\n')
  return all(passes(name, error) for name, error in errors.items())


def main(argv=None):
  """Runs the command. Returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m tests.parity',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('files', nargs='+', metavar='FILE.npz')
  parser.add_argument(
    '-v', '--verbose', action='store_true', help='a line for each array'
  )
  args = parser.parse_args(argv)
  with jax.enable_x64(True):
    failed = [path for path in args.files if not check(path, args.verbose)]
  print(f'{len(args.files)} files, {len(failed)} failed', *failed)
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
