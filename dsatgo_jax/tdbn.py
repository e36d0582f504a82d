"""Threshold-dependent batch norm (tdBN; Zheng et al., AAAI 2021).

Batch norm per channel with the statistics pooled over time, batch and space.
Its scale starts at `alpha * v_th`, so that the pre-synaptic input starts as
`N(0, (alpha * v_th) ** 2)`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsatgo_jax import devices, dtypes, statistics, xla


def measure(
  x: jax.Array, axis_name=None, mask=None
) -> tuple[jax.Array, jax.Array]:
  """Mean and (biased) variance per channel.

  Args:
    x: [..., C], floating point.
    axis_name: mapped axis over which the batch is spread. None under `pmap` or
      `shard_map` warns; () says that the statistics are each device's own.
    mask: whether x is real, of x's first axes; None for all of it.

  Returns:
    Mean and variance [C], at least float32.
  """
  devices.warn_if_not_pooled(axis_name, x)
  x = x.astype(dtypes.wide(x.dtype))
  channels = jax.P(*jax.typeof(x).sharding.spec[-1:])
  pooled = xla.automatic(functools.partial(_pooled, axis_name), channels)
  return xla.kept(pooled(x, mask))


def _pooled(axis_name, x, mask):
  """Mean and variance per channel, of all devices."""
  mean, variance = _moments(x, mask)
  if not axis_name:
    return mean, variance
  parts = [mean, variance]
  if mask is not None:
    parts.append(jnp.full_like(mean, statistics.count(x, 1, mask)))
  means, variances, *counts = jnp.moveaxis(
    xla.kept(devices.gather(jnp.stack(parts), axis_name)), 1, 0
  )
  mean = statistics.weighted_mean(means, *counts)
  point = lax.stop_gradient(mean)
  squares = variances + jnp.square(means - point[None])
  squares = statistics.weighted_mean(squares, *counts)
  return mean, squares - jnp.square(mean - point)


@jax.custom_jvp
def _moments(x, mask):
  """Mean and variance per channel, in one pass."""
  mean, squares = statistics.moments(x, 1, mask)
  return mean, squares / statistics.nonzero(statistics.count(x, 1, mask))


@_moments.defjvp
def _moments_jvp(primals, tangents):
  (x, mask), (dx, _) = primals, tangents
  mean, variance = xla.kept(_moments(x, mask))
  count = statistics.nonzero(statistics.count(x, 1, mask))

  def average(a):
    a = statistics.only_real(a, mask)
    return jnp.sum(a, range(x.ndim - 1)) / count

  # Of the mean's own tangent the variance sees nothing.
  return (mean, variance), (average(dx), 2 * average((x - _per(mean, x)) * dx))


def per_channel(
  u: jax.Array, axis_name=None, mask=None
) -> statistics.Statistics:
  """Mean and deviation (ddof = 1) of each channel of the membrane.

  What `methods.Method.measure` may be, for a threshold per channel.

  Args:
    u: membrane potentials before the reset, [B, ..., C].
    axis_name: mapped axis, or axes, over which the batch is spread.
    mask: [B], whether an example is real; None for all of them.

  Returns:
    `Statistics` of arrays [C], without gradient.
  """
  u = lax.stop_gradient(u)
  mean, variance = _pooled(axis_name, u, mask)
  variance = unbiased(variance, u, 1, axis_name, mask)
  return statistics.Statistics(mean, jnp.sqrt(variance))


def _per(channels, x):
  """[C] as an array that has x's axes."""
  return lax.expand_dims(channels, range(x.ndim - 1))


def mask_of(x: jax.Array, mask, axes: int = 2):
  """A mask of x's first axes.

  Args:
    x: [T, B, ...], or [B, ...].
    mask: [T, B] or [B]; the same with an axis of one for each of x's others,
      as Flax's `BatchNorm` takes it: [T, B, 1, 1, 1]; None for no mask.
    axes: 2 if x has a time axis, 1 if it has none.

  Returns:
    [T, B], or [B] without a time axis, or None.

  Raises:
    ValueError: it is of another shape.
  """
  if mask is None:
    return None
  mask = jnp.asarray(mask, bool)
  expected, given = x.shape[:axes], mask.shape
  if mask.ndim == x.ndim and all(n == 1 for n in given[axes:]):
    mask = mask.reshape(given[:axes])
    fits = all(n in (1, m) for n, m in zip(mask.shape, expected, strict=True))
  else:
    fits = given in (expected, expected[-1:])
  if not fits:
    raise ValueError(
      'Expected a mask '
      + (
        f'[T, B] or [B] of shape {expected} or '
        if axes > 1
        else '[B] of shape '
      )
      + f'{expected[-1:]} for x of shape {x.shape}, got shape {given}.'
    )
  return jnp.broadcast_to(mask, expected)


class Affine(NamedTuple):
  """What tdBN comes to once its statistics are known, [C] each.

  Attributes:
    mean: what is subtracted.
    gain: what the difference is multiplied with.
    bias: what is added.
    own: the same, if the statistics are those of one x, without a mask.
  """

  mean: jax.Array
  gain: jax.Array
  bias: jax.Array
  own: 'Own | None' = None

  def __call__(self, x):
    """`(x - mean) * gain + bias`, in the promoted dtype of all."""
    dtype = _promoted(x, *self[:3])
    mean, gain, bias = (_per(jnp.asarray(a, dtype), x) for a in self[:3])
    return (x.astype(dtype) - mean) * gain + bias

  def of(self, x):
    """Without `own` where the statistics are not known to be x's."""
    own = self.own
    if own is not None:
      own = dataclasses.replace(own, x=None) if own.x is x else None
    return self._replace(own=own)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('x', 'mean', 'inverse', 'scale', 'bias'),
  meta_fields=('axis_name',),
)
@dataclasses.dataclass(frozen=True)
class Own:
  """An `Affine` by x's own statistics.

  Kernels that pull a cotangent through both at once read x once less.

  Attributes:
    x: whose statistics they are; None for the input at hand.
    mean: [C].
    inverse: `1 / sqrt(variance + epsilon)`, [C].
    scale: [C].
    bias: [C].
    axis_name: mapped axis over which they are pooled.
  """

  x: Any
  mean: Any
  inverse: Any
  scale: Any
  bias: Any
  axis_name: Any = None

  def affine(self) -> Affine:
    """As it is where the statistics are given."""
    return Affine(self.mean, self.scale * self.inverse, self.bias)

  def __call__(self, x):
    """As `Affine`'s."""
    return self.affine()(x)

  def through(self, x, g):
    """What reaches x by way of its statistics: `shift + (x - mean) * slope`.

    Args:
      x: [..., C].
      g: the cotangent of this, of each device.

    Returns:
      Shift and slope, [2, C].
    """
    pulled = jnp.stack([g.mean, -(self.inverse**3) * g.inverse])
    if self.axis_name:
      pulled = lax.psum(pulled, self.axis_name)
    count = statistics.count(x, 1) * devices.axis_size(self.axis_name)
    return pulled / count


def _promoted(*arrays):
  """The dtype of arrays and numbers together, under strict promotion, too."""
  return dtypes.wide(*(a.dtype for a in arrays if hasattr(a, 'dtype')))


def affine(
  mean, variance, scale, bias, epsilon=1e-5, x=None, axis_name=None
) -> Affine:
  """The `Affine` with a gain of `scale / sqrt(variance + epsilon)`.

  Args:
    mean: [C].
    variance: [C], biased.
    scale: [C].
    bias: [C].
    epsilon: keeps the root from zero.
    x: whose statistics they are, of all of it; None where that is not so.
    axis_name: mapped axis over which they are pooled.

  Returns:
    `Affine`.
  """
  scale = jnp.asarray(scale, _promoted(scale, variance))
  inverse = lax.rsqrt(variance + epsilon)
  own = None
  if x is not None:
    own = Own(x, mean, inverse, scale, bias, axis_name)
  return Affine(mean, scale * inverse, bias, own)


def scale_and_bias(
  x, scale, bias, factor, factored: bool
) -> tuple[jax.Array, jax.Array]:
  """What `affine` takes, of what a layer learns of it.

  Args:
    x: what is normalised, [..., C].
    scale: [C], or None for one that is not learnt and stays at `factor`.
    bias: [C], or None for 0.
    factor: `alpha * v_th`.
    factored: whether a learnt scale has `factor` outside of it.

  Returns:
    Scale and bias, [C]; the bias in the dtype of what is learnt, else of x.
  """
  learnt = [a for a in (scale, bias) if a is not None]
  if bias is None:
    dtype = learnt[0].dtype if learnt else x.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
      dtype = jnp.float32
    bias = jnp.zeros(x.shape[-1:], dtype)
  if scale is None:
    scale = jnp.full(x.shape[-1:], factor, dtypes.wide(bias.dtype))
  elif factored:
    scale = factor * scale
  return scale, bias


def unbiased(variance, x, repeats=1, axis_name=None, mask=None) -> jax.Array:
  """`n / (n - 1) * variance`, which the running variance takes, as in PyTorch.

  Args:
    variance: biased, [C].
    x: what it was measured on, [..., C].
    repeats: how many identical copies of x are meant.
    axis_name: mapped axis over which the batch is spread.
    mask: whether x is real, of x's first axes; None for all of it.

  Returns:
    [C].
  """
  count = repeats * statistics.count(x, 1, mask)
  if mask is None:
    count *= devices.axis_size(axis_name)
  elif axis_name:
    count = lax.psum(count, axis_name)
  return variance * (count / statistics.nonzero(count - 1))


def layer(
  x,
  running: tuple[jax.Array, jax.Array],
  *,
  use_running_average: bool,
  repeats: int = 1,
  momentum=0.9,
  axis_name=None,
  mask=None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """`measure`, and the running statistics kept: what the modules do.

  Args:
    x: [T, B, ..., C], or [B, ..., C] where `repeats` is more than 1.
    running: mean and variance, [C].
    use_running_average: inference: they are used, and stay as they are.
    repeats: how many identical copies of x are meant.
    momentum: the share of the running statistics that is kept.
    axis_name: mapped axis over which the batch is spread.
    mask: [T, B] or [B], whether x is real; None for no mask.

  Returns:
    Mean and variance that normalise x, and the running ones after it. Of a
    batch without an example, empty or masked, nothing is learnt.

  Raises:
    ValueError: x is complex or of another number of channels, or the mask does
      not fit it.
  """
  if jnp.iscomplexobj(x) or not x.ndim or x.shape[-1:] != running[0].shape:
    raise ValueError(
      f'Expected real numbers x [..., C] with [C] = {list(running[0].shape)}, '
      f'got {x.dtype}{list(x.shape)}.'
    )
  if use_running_average or 0 in x.shape:
    return running, running
  axes = 1 if repeats > 1 or x.ndim < 3 else 2
  mask = mask_of(x, mask, axes)
  mean, variance = measure(x, axis_name, mask)
  learnt = mean, unbiased(variance, x, repeats, axis_name, mask)
  if mask is not None:
    real = jnp.any(mask)
    if axis_name:
      real = lax.pmax(real.astype(jnp.int32), axis_name) > 0
    learnt = jax.tree.map(lambda a: jnp.where(real, a, jnp.nan), learnt)
  return (mean, variance), jax.tree.map(
    lambda old, new: statistics.running_average(old, new, momentum),
    running,
    learnt,
  )
