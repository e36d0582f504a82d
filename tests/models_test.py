"""The networks: published sizes, shapes layer by layer, starts, gradients."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from scipy import stats

from dsatgo_jax import convert, layers, losses, methods, models
from dsatgo_jax.methods import METHODS

REFERENCE = pathlib.Path(__file__).parent / 'testdata' / 'resnet19_narrow.npz'

# Narrowed copies, and images for them.
NARROW = {
  'resnet19': (
    functools.partial(
      models.ResNet19, planes=(4, 6), stage_sizes=(1, 1), head_width=8
    ),
    (4, 8, 8, 3),
  ),
  'sew_resnet': (
    functools.partial(
      models.SEWResNet18, 7, num_steps=2, planes=(4, 6), stage_sizes=(1, 1)
    ),
    (4, 16, 16, 3),
  ),
  'vgg': (
    functools.partial(models.VGGSNN, num_steps=3, stages=((4, 4), (6,))),
    (4, 8, 8, 2),
  ),
}
narrow = pytest.mark.parametrize('make, shape', NARROW.values(), ids=NARROW)


def images(shape, dtype=np.float32):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def init(net, x):
  # This generator compiles several times as fast.
  return jax.jit(net.init)(jax.random.key(0, impl='unsafe_rbg'), x)


@functools.partial(jax.jit, static_argnums=0)
def train_step(net, variables, x):
  """Logits, running values and gradients."""

  def loss_fn(params):
    logits, updates = net.apply(
      variables | {'params': params}, x, train=True, mutable=['batch_stats']
    )
    labels = jnp.arange(logits.shape[1])
    return losses.cross_entropy(logits, labels).mean(), (logits, updates)

  gradients, outputs = jax.grad(loss_fn, has_aux=True)(variables['params'])
  return *outputs, gradients


# The published networks, without running them.


@pytest.mark.parametrize(
  'net, shape, parameters, neurons',
  [
    (models.ResNet19(), (32, 32, 3), 12_698_260, 20),
    (models.ResNet19(num_classes=100), (32, 32, 3), 12_721_300, 20),
    (models.VGGSNN(), (48, 48, 2), 9_268_754, 8),
    (models.SEWResNet18(), (224, 224, 3), 11_689_532, 20),
    (models.SEWResNet34(), (224, 224, 3), 21_797_708, 36),
  ],
)
def test_parameter_counts(net, shape, parameters, neurons):
  variables = jax.eval_shape(
    net.init, jax.random.key(0), jnp.zeros((1, *shape))
  )
  params = jax.tree_util.tree_leaves_with_path(variables['params'])
  assert sum(math.prod(leaf.shape) for _, leaf in params) == parameters
  scalars = [path for path, leaf in params if not leaf.shape]
  assert len(scalars) == neurons
  assert {path[-1].key for path in scalars} == {'w'}


RESNET19 = {
  'encode': (32, 32, 128),
  'block0': (32, 32, 128),
  'block1': (32, 32, 128),
  'block2': (32, 32, 128),
  'block3': (16, 16, 256),
  'block4': (16, 16, 256),
  'block5': (16, 16, 256),
  'block6': (8, 8, 512),
  'block7': (8, 8, 512),
  'head': (256,),
  'classifier': (10,),
}
VGG = {
  'conv0': (48, 48, 64),
  'conv1': (48, 48, 128),
  'conv2': (24, 24, 256),
  'conv3': (24, 24, 256),
  'conv4': (12, 12, 512),
  'conv5': (12, 12, 512),
  'conv6': (6, 6, 512),
  'conv7': (6, 6, 512),
  'classifier': (10,),
}


def sew(*stage_sizes):
  sizes = zip(stage_sizes, (56, 28, 14, 7), (64, 128, 256, 512), strict=True)
  blocks = [(s, s, planes) for n, s, planes in sizes for _ in range(n)]
  names = {f'block{i}': shape for i, shape in enumerate(blocks)}
  return {'encode': (112, 112, 64)} | names | {'classifier': (1000,)}


@pytest.mark.parametrize(
  'net, shape, layers',
  [
    (models.ResNet19(), (32, 32, 3), RESNET19),
    (models.VGGSNN(), (48, 48, 2), VGG),
    (models.SEWResNet18(), (224, 224, 3), sew(2, 2, 2, 2)),
    (models.SEWResNet34(), (224, 224, 3), sew(3, 4, 6, 3)),
  ],
)
def test_output_shapes_layer_by_layer(net, shape, layers):
  _, variables = jax.eval_shape(
    functools.partial(
      net.init_with_output, capture_intermediates=True, mutable=True
    ),
    jax.random.key(0),
    jnp.zeros((2, *shape)),
  )
  outputs = variables['intermediates']
  for name, expected in layers.items():
    (output,) = outputs[name]['__call__']
    assert output.shape == (net.num_steps, 2, *expected), name
  assert outputs.keys() - {'__call__'} == layers.keys()


# How they start.


def check_start(params, scale):
  """Every leaf against the distribution that the authors' program draws from.

  Args:
    params: of a network.
    scale: of its tdBN, alpha * v_th.
  """
  params = traverse_util.flatten_dict(params)
  for path, leaf in params.items():
    leaf = np.asarray(leaf, np.float64)
    exact = {'w': -math.log(4), 'scale': scale, 'bias': 0.0}
    kernel = np.shape(params.get((*path[:-1], 'kernel')))
    if len(kernel) == 4:  # A convolution, [h, w, in, out].
      height, width, _, fan_out = kernel
      deviation = math.sqrt(2 / (height * width * fan_out))
      start = stats.norm(scale=deviation)
    elif kernel:  # A dense layer, [in, out]; its bias likewise.
      bound = 1 / math.sqrt(kernel[0])
      start = stats.uniform(-bound, 2 * bound)
      assert np.abs(leaf).max() <= bound * (1 + 1e-6), path
    else:
      np.testing.assert_allclose(leaf, exact[path[-1]], rtol=1e-6)
      continue
    values = leaf.ravel()[:: max(1, leaf.size // 50_000)]
    assert stats.kstest(values, start.cdf).pvalue > 1e-3, path
    error = start.std() * math.sqrt(2 / leaf.size)
    assert leaf.std() == pytest.approx(start.std(), abs=4 * error), path
    assert leaf.mean() == pytest.approx(0, abs=6 * error), path


@pytest.mark.parametrize(
  'network, shape, dense',
  [
    (models.ResNet19, (32, 32, 3), {'head/layer/kernel', 'classifier/kernel'}),
    *(
      pytest.param(
        network, shape, {'classifier/kernel'}, marks=pytest.mark.sample
      )
      for network, shape in [
        (models.VGGSNN, (48, 48, 2)),
        (models.SEWResNet18, (64, 64, 3)),
      ]
    ),
  ],
)
def test_start_is_that_of_the_authors_program(network, shape, dense):
  net = network(num_classes=1000, alpha=1.5, v_th=0.5)
  params = init(net, jnp.zeros((1, *shape)))['params']
  check_start(params, 0.75)
  kernels = traverse_util.flatten_dict(params, sep='/').items()
  ranks = {name: leaf.ndim for name, leaf in kernels if 'kernel' in name}
  assert {name for name, rank in ranks.items() if rank == 2} == dense


@pytest.mark.sample
def test_the_authors_own_start_passes_the_same_check():
  start = {
    name.removeprefix('init.'): array
    for name, array in np.load(REFERENCE).items()
    if name.startswith('init.')
  }
  net = models.ResNet19(**convert.settings(start))
  template = init(net, images((2, 8, 8, 3)))
  check_start(convert.from_torch(start, template)['params'], 1.0)


# Narrowed copies.


@narrow
@pytest.mark.sample
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_gradients_are_finite_and_reach_everything(make, shape, dtype):
  net, x = make(dtype=dtype), images(shape)
  variables = init(net, x)
  logits, updates, gradients = train_step(net, variables, x)
  assert logits.dtype == dtype
  assert logits.shape == (net.num_steps, 4, net.num_classes)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    name = jax.tree_util.keystr(path)
    assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all(), name
    assert leaf.any(), name
  for leaf in jax.tree.leaves(updates):
    assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()


@pytest.mark.sample
@narrow
@jax.enable_x64(True)
def test_an_image_is_encoded_once(make, shape):
  """With the result of frames that repeat it, running variance included."""
  net = make(dtype=np.float64, param_dtype=np.float64)
  x = images(shape, np.float64)
  frames = jnp.stack([x] * net.num_steps)
  variables = init(net, x)
  once, repeated = (train_step(net, variables, a) for a in (x, frames))

  def close(a, b):
    scale = max(np.max(np.abs(b)), 1e-3)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * scale)

  jax.tree.map(close, once, repeated)
  for _ in range(60):
    variables |= train_step(net, variables, x)[1]
  apply = jax.jit(net.apply)
  assert apply(variables, x).any()
  close(apply(variables, x), apply(variables, frames))


class Relu(nn.Module):
  """Stands where a neuron stands."""

  @nn.compact
  def __call__(self, x, norm, tdbn_scale):
    """Takes what a neuron takes."""
    return jax.nn.relu(norm(x))


@pytest.mark.sample
@pytest.mark.parametrize(
  'network, settings, shape',
  [
    (models.ResNet19, {'planes': (32, 32, 32)}, (8, 16, 16, 3)),
    pytest.param(
      models.VGGSNN,
      {'stages': ((32,) * 4, (32,) * 4)},
      (10, 4, 16, 16, 2),
      marks=pytest.mark.sample,
    ),
  ],
)
def test_needs_less_memory_than_with_relu(network, settings, shape):
  """Of tdBN and neurons nothing is kept, of ReLU tdBN's output."""

  class Twin(network):
    def parts(self, train):
      return super().parts(train)._replace(neuron=Relu)

  def memory(net):
    x = jnp.zeros(shape)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    compiled = train_step.lower(net, variables, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert memory(network(**settings)) < 0.9 * memory(Twin(**settings))


@pytest.mark.parametrize(
  'method',
  [
    pytest.param(method, marks=[pytest.mark.sample] * (method != 'ds_atgo'))
    for method in METHODS
  ],
)
def test_every_method(method):
  make, shape = NARROW['vgg']
  net, x = make(method=method, v_th=0.5), images(shape)
  variables = init(net, x)
  layer = variables['params']['conv0']
  scale = 1 if method == 'mpd_agl' else 0.5
  np.testing.assert_array_equal(layer['norm']['scale'], scale)
  learns = method == 'learnable_threshold'
  assert layer['neuron'].keys() == ({'w', 'v_th'} if learns else {'w'})
  kept = variables['batch_stats']['conv0'].get('neuron', {})
  assert len(kept) == len(layers.averaged(methods.get(method)))
  logits, _, gradients = train_step(net, variables, x)
  assert logits.any()
  for leaf in jax.tree.leaves(gradients):
    assert leaf.any() and np.isfinite(leaf).all()


@narrow
@pytest.mark.parametrize(
  'change',
  [lambda s: s[1:], lambda s: (1, 1, *s), lambda s: (9, *s), lambda s: s[:1]],
)
def test_wrong_input_shapes(make, shape, change):
  net, wrong = make(), change(shape)
  message = (
    rf'\[B, H, W, C\] or frames .*T = {net.num_steps} .num_steps., got '
    rf'x.shape=\({", ".join(map(str, wrong))},?\)'
  )
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(wrong))


def test_bad_settings():
  x = images((2, 8, 8, 1))
  for settings, message in (
    ({'v_th': 0.0}, 'v_th > 0, got v_th=0.0'),
    ({'alpha': -1.0}, 'alpha > 0, got alpha=-1.0'),
    ({'method': 'snn'}, "got method='snn'"),
    ({'stages': [(4,)] * 4}, r'16 x 16 pixels.* got .*\(2, 8, 8, 1\)'),
    ({'num_steps': 0}, 'num_steps > 0, got num_steps=0'),
  ):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(models.ConvNet(**settings).init, jax.random.key(0), x)


@pytest.mark.sample
@pytest.mark.parametrize('name, frames', [('resnet19', False), ('vgg', True)])
def test_padding_that_a_mask_marks_is_in_no_running_value(name, frames):
  """Behind short recordings, or in the place of examples that are missing."""
  make, shape = NARROW[name]
  net = make()
  x = images((net.num_steps, *shape) if frames else shape)
  mask = jnp.arange(4) < 3
  if frames:
    mask = jnp.arange(net.num_steps)[:, None] < jnp.array([3, 2, 3, 1])
  variables = init(net, x)
  step = jax.jit(
    lambda x: net.apply(variables, x, True, mask, mutable=['batch_stats'])
  )
  real = mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))
  updates = [step(jnp.where(real, x, padding))[1] for padding in (0.0, 10.0)]
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    *updates,
  )
