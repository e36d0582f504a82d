"""What we say of other libraries, against these libraries.

The tables of docs/howto/peers.md row by row: spikes and gradients of what the
first cell of a row makes, and of ours with the row's settings.
`pip install -e '.[bench]'` brings the libraries; a row whose library is missing
is skipped.
"""

import functools
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dsatgo_jax import neurons, surrogate
from train import augment
from train.datasets import cifar10_dvs

# What they warn of is not ours.
pytestmark = pytest.mark.filterwarnings('ignore')

PAGE = (
  pathlib.Path(__file__).parent.parent / 'docs/howto/peers.md'
).read_text()


def table(head):
  """The rows of the table whose first line begins so."""
  lines = PAGE.partition(f'| {head} |')[2].partition('\n\n')[0].splitlines()
  return [
    [cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]
  ]


NEURONS = table('neuron there')
SURROGATES = table('surrogate there')


def library(name):
  """A module of another library; skips the test without it."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return pytest.importorskip(name)


def code(cell):
  """What stands between the first backticks of a cell."""
  return re.search('`(.+?)`', cell)[1]


def test_tables_are_found():
  for rows in NEURONS, SURROGATES:
    assert {row[0].split()[0] for row in rows} >= LIBRARIES.keys()


# Neurons. Each library's function takes the expression that makes the neuron, x
# and the spikes' cotangent; it returns spikes, the gradient of x, that of the
# learnt parameter, that parameter, and what tau or beta is as its function.


def in_torch(layer, run, parameter, x, cotangent):
  import torch

  x = torch.from_numpy(x).requires_grad_()
  spikes = run(layer.double(), x)
  spikes.backward(torch.from_numpy(cotangent))
  gradient = None if parameter is None else parameter.grad.numpy()
  return spikes.detach().numpy(), x.grad.numpy(), gradient


def spikingjelly(expression, x, cotangent):
  library('torch')
  neuron = library('spikingjelly.activation_based.neuron')
  layer = eval(expression, vars(neuron) | {'tau': 4.0})
  layer.step_mode = 'm'
  learnt = getattr(layer, 'w', None)
  results = in_torch(layer, lambda layer, x: layer(x), learnt, x, cotangent)
  if learnt is None:
    return *results, 4.0, lambda tau: {'tau': tau}
  w = learnt.detach().numpy()
  return *results, w, lambda w: {'tau': 1 / jax.nn.sigmoid(w)}


def snntorch(expression, x, cotangent):
  torch, snntorch = library('torch'), library('snntorch')
  leaky = functools.partial(snntorch.Leaky, learn_beta=True)
  layer = eval(expression, {'Leaky': leaky, 'beta': 0.75})

  def run(layer, x):
    membrane, spikes = torch.zeros_like(x[0]), []
    for x_t in x:
      s, membrane = layer(x_t, membrane)
      spikes.append(s)
    return torch.stack(spikes)

  results = in_torch(layer, run, layer.beta, x, cotangent)
  return *results, 0.75, lambda beta: {'beta': beta}


def spyx(expression, x, cotangent):
  nnx, nn = library('flax.nnx'), library('spyx.nn')
  lif = functools.partial(nn.LIF, rngs=nnx.Rngs(0))
  names = {'LIF': lif, 'shape': x.shape[2:], 'beta': 0.75}
  graph, parameters = nnx.split(eval(expression, names))

  def run(x, parameters):
    return nn.run(nnx.merge(graph, parameters), x)[0]

  spikes, pull = jax.vjp(run, jnp.asarray(x), parameters)
  grad_x, gradient = pull(jnp.asarray(cotangent))
  (gradient,) = jax.tree.leaves(gradient)
  return spikes, grad_x, gradient, 0.75, lambda beta: {'beta': beta}


def jaxpike(expression, x, cotangent):
  eqx, jaxpike = library('equinox'), library('jaxpike')
  layer = eval(expression, {'LIF': jaxpike.LIF, 'tau': 4.0})

  def run(x, log_tau):
    there = eqx.tree_at(lambda layer: layer.log_tau, layer, log_tau)
    return jaxpike.unroll(there, x)[0]

  # Its membranes are float32 always.
  spikes, pull = jax.vjp(run, jnp.asarray(x, jnp.float32), layer.log_tau)
  results = pull(jnp.asarray(cotangent, jnp.float32))
  return spikes, *results, layer.log_tau, lambda p: {'tau': jnp.exp(p)}


# Each library's default surrogate, as name, width and factor here; and how far
# its gradients are off: snnTorch's spikes and jaxpike's membranes are float32.
LIBRARIES = {
  'SpikingJelly': (spikingjelly, 'sigmoid', 1.0, 1.0, 1e-12),
  'snnTorch': (snntorch, 'arctan', 1.0, 1.0, 1e-6),
  'Spyx': (spyx, 'fast_sigmoid', 0.08, 0.08, 1e-12),
  'jaxpike': (jaxpike, 'fast_sigmoid', 0.08, 0.08, 1e-5),
}


def compare(row, x, cotangent, fused=True):
  """Asserts that spikes and gradients are those of the row's library."""
  there, decay, scaled_x, reset, detach_reset, spikes_there = row
  peer, name, width, factor, error = LIBRARIES[there.split()[0]]
  *theirs, parameter, names = peer(code(there), x, cotangent)
  late = {'`s[t]`': 0, '`s[t - 1]`': 1}[spikes_there]

  def run(x, parameter):
    known = {'exp': jnp.exp, 'x': x} | names(parameter)
    known['decay'] = eval(code(decay), known)
    spikes, *_ = neurons.run(
      eval(code(scaled_x), known),
      neurons.Parameters(decay=known['decay'], width=width),
      'vanilla',
      surrogate=surrogate.scaled(name, factor),
      reset=eval(code(reset)),
      detach_reset=eval(code(detach_reset)),
      fused=fused,
    )
    before = jnp.zeros_like(spikes[:late])
    return jnp.concatenate([before, spikes[: len(x) - late]])

  dtype = jnp.float32 if there.startswith('jaxpike') else jnp.float64
  x, cotangent, parameter = (
    jnp.asarray(a, dtype) for a in (x, cotangent, parameter)
  )
  spikes, pull = jax.vjp(run, x, parameter)
  ours = spikes, *pull(cotangent)
  assert 0.1 < spikes.mean() < 0.9
  np.testing.assert_array_equal(theirs[0], spikes)
  for expected, got in zip(theirs[1:], ours[1:], strict=True):
    if expected is not None:
      assert got.dtype == dtype and np.abs(expected).max() > 0.01
      np.testing.assert_allclose(got, expected, rtol=error, atol=error)


def drive(row, size=1.0, num_steps=12):
  """Input that fires about every other time, and a cotangent."""
  rng = np.random.default_rng(0)
  x, cotangent = rng.normal(size=(2, num_steps, 4, 8))
  x = size * np.clip(0.4 + x, -1.2, 1.2)
  # What the row divides x by.
  return (4 * x if row[2] != '`x`' else x), cotangent


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('row', NEURONS, ids=[row[0] for row in NEURONS])
@jax.enable_x64(True)
def test_neuron(row, fused):
  compare(row, *drive(row), fused=fused)


def only_small(row):
  """Whether the row holds for membranes up to two thresholds alone."""
  return 'reset_delay=False)' in row[0] and 'zero' not in row[0]


@pytest.mark.parametrize('row', NEURONS, ids=[row[0] for row in NEURONS])
@jax.enable_x64(True)
def test_neuron_whose_membrane_passes_two_thresholds(row):
  x, cotangent = drive(row, size=3.0)
  if only_small(row):
    with pytest.raises(AssertionError, match='not equal'):
      compare(row, x, cotangent)
  else:
    compare(row, x, cotangent)


# Surrogates.


def surrogate_there(cell, values, x):
  """A library's surrogate at x: spikes (a formula has none) and derivative."""
  name = cell.split()[0]
  if name.startswith('TET'):  # A program, not a package.
    return None, np.maximum(0, values['g'] - np.abs(x)) / values['g'] ** 2
  module = {
    'SpikingJelly': 'spikingjelly.activation_based.surrogate',
    'snnTorch': 'snntorch.surrogate',
    'Spyx': 'spyx.axn',
    'jaxpike': 'jaxpike.surrogate',
  }[name]
  spike = eval(code(cell), vars(library(module)) | values)
  if name in ('SpikingJelly', 'snnTorch'):
    x = library('torch').from_numpy(x).requires_grad_()
    spikes = spike(x)
    spikes.sum().backward()
    return spikes.detach().numpy(), x.grad.numpy()
  spikes, pull = jax.vjp(spike, jnp.asarray(x))
  return spikes, *pull(jnp.ones_like(spikes))


@pytest.mark.parametrize('value', [1.0, 2.0, 4.0, 25.0, None])
@pytest.mark.parametrize('row', SURROGATES, ids=[row[0] for row in SURROGATES])
@jax.enable_x64(True)
def test_surrogate(row, value):
  """With a value of its argument, or with the default."""
  there, name, width, factor = row
  letter, default = re.search(r', (\w) = (\d+)$', there).groups()
  values = {letter: value or float(default), 'pi': np.pi}
  if value is None:
    there = re.sub(r'\(.*\)', '()', there)
  x = np.linspace(-3, 3, 1001)  # Not on the edges of a window.
  spikes, gradient = surrogate_there(there, values, x)
  width, factor = (eval(code(cell), dict(values)) for cell in (width, factor))
  ours = surrogate.scaled(code(name), factor).gradient(x, width)
  assert np.max(gradient) > 0
  np.testing.assert_allclose(ours, gradient, rtol=1e-12, atol=1e-13)
  if spikes is not None:
    at_equality = there.startswith('SpikingJelly')
    np.testing.assert_array_equal(spikes, x >= 0 if at_equality else x > 0)


# Data.


@pytest.mark.parametrize(
  'name, policy',
  [('CIFAR10', augment.CIFAR10_POLICY), ('IMAGENET', augment.IMAGENET_POLICY)],
)
def test_autoaugment_is_torchvisions(name, policy):
  theirs = library('torchvision.transforms.autoaugment')
  transform = theirs.AutoAugment(theirs.AutoAugmentPolicy[name])
  rows = [
    tuple((*row[:2], row[2] or 0) for row in pair)
    for pair in transform.policies
  ]
  measured = transform._augmentation_space(10, (32, 32))

  def used(pair):  # Magnitudes that no operation uses differ.
    return [(*row[:2], row[2] * (measured[row[0]][0].ndim > 0)) for row in pair]

  assert [used(pair) for pair in policy] == [used(pair) for pair in rows]


# torchvision translates by whole pixels, and solarizes 255 levels, not 256.
@pytest.mark.parametrize(
  'name',
  sorted(augment.OPERATIONS.keys() - {'TranslateX', 'TranslateY', 'Solarize'}),
)
def test_operations_are_torchvisions(name):
  theirs = library('torchvision.transforms.autoaugment')
  transform = theirs.AutoAugment()
  operation, largest, signed = augment.OPERATIONS[name]
  values, signed_there = transform._augmentation_space(10, (32, 32))[name]
  assert signed == signed_there
  pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  image = Image.fromarray(pixels)
  for magnitude in range(10):
    for sign in (1, -1) if signed else (1,):
      value = sign * float(values[magnitude]) if values.ndim else 0.0
      expected = theirs._apply_op(
        image, name, value, transform.interpolation, [128] * 3
      )
      got = operation(image, sign * largest * magnitude / 9)
      difference = np.abs(np.asarray(got, int) - np.asarray(expected, int))
      # Factors of 1 + v may round otherwise.
      assert difference.max() <= (largest == 0.9)


def test_8bit_frames_are_torchvisions():
  torch, transforms = library('torch'), library('torchvision.transforms')
  counts = np.random.default_rng(0).poisson(0.3, (3, 128, 128, 2))
  counts = counts.astype(np.float32)
  ours = cifar10_dvs.resize_8bit(counts, 48)
  change = transforms.Compose(
    [
      transforms.ToPILImage(),
      transforms.Resize((48, 48)),
      transforms.ToTensor(),
    ]
  )
  for frame, got in zip(counts, ours, strict=True):
    scaled = torch.from_numpy(frame / frame.max()).permute(2, 0, 1)
    expected = change(scaled).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(got, np.rint(255 * expected))
    np.testing.assert_allclose(got / 255, expected, rtol=1e-6)
