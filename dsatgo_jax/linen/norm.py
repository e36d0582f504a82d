"""Threshold-dependent batch norm for Flax Linen."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from dsatgo_jax import dtypes, neurons, tdbn


class TdBatchNorm(nn.Module):
  """Threshold-dependent batch norm (Zheng et al., AAAI 2021).

  `y = scale * (x - mean) / sqrt(var + epsilon) + bias` with the statistics of
  each channel pooled over time, batch and space, and `scale` started at
  `alpha * v_th`. The running variance is unbiased, as PyTorch keeps it.

  Attributes:
    use_running_average: whether the stored statistics are used instead of the
      batch's; as attribute or call argument, as in Flax's `BatchNorm`.
    alpha: the deviation of the output, in thresholds.
    v_th: the threshold's base value.
    factored: whether `alpha * v_th` stays a factor outside the learnt scale,
      which then starts at 1 (MPD-AGL's program).
    repeats: how many identical copies of x the statistics stand for: a static
      image encoded once counts `num_steps` times.
    momentum: the share of the running statistics that is kept.
    epsilon: added to the variance.
    axis_name: mapped axis over which the batch is spread.
    dtype: of the output; None for the promoted one.
    param_dtype: of scale and bias.
    use_bias: whether a bias is learnt; else it is 0.
    use_scale: whether the scale is learnt; else it stays at `alpha * v_th`,
      which `mpd_agl` then takes for `tdbn_scale` (1 if factored).
    scale_init: of the scale, in the place of its start above; to partition it,
      `nn.with_partitioning(nn.initializers.ones, ('model',))`.
    bias_init: of the bias.
  """

  use_running_average: bool | None = None
  alpha: float = 1.0
  v_th: float = 1.0
  factored: bool = False
  repeats: int = 1
  momentum: float = 0.9
  epsilon: float = 1e-5
  axis_name: Any = None
  dtype: Any = None
  param_dtype: Any = jnp.float32
  use_bias: bool = True
  use_scale: bool = True
  scale_init: Callable[..., Any] | None = None
  bias_init: Callable[..., Any] = nn.initializers.zeros

  def __call__(
    self,
    x: ArrayLike,
    use_running_average: bool | None = None,
    *,
    mask: ArrayLike | None = None,
  ) -> jax.Array:
    """Normalises x.

    Args:
      x: [T, B, ..., C], or [B, ..., C] with `repeats=T`.
      use_running_average: in the place of the attribute; not both.
      mask: [T, B] or [B], whether an example is real at a timestep; the
        statistics are those of what is. None for all of it.

    Returns:
      The normalised x, of its shape.

    Raises:
      ValueError: x is complex or has no axis, the mask does not fit it, or
        dtype is not floating point.
    """
    affine, x = self.affine(x, use_running_average, mask=mask), jnp.asarray(x)
    dtype = self.dtype or jnp.result_type(x, affine.bias)
    return affine(x).astype(dtypes.floating(dtype))

  @nn.compact
  def affine(
    self,
    x: ArrayLike,
    use_running_average: bool | None = None,
    *,
    mask: ArrayLike | None = None,
  ) -> tdbn.Affine:
    """Measures x, and leaves it to `SpikingNeuron(...)(x, norm=...)`.

    The neuron then keeps x alone for its backward pass, not the normalised x.

    Args:
      x: [T, B, ..., C], or [B, ..., C] with `repeats=T`.
      use_running_average: in the place of the attribute; not both.
      mask: [T, B] or [B]; None for no mask.

    Returns:
      The `tdbn.Affine` that normalises x.
    """
    neurons.check_positive(alpha=self.alpha, v_th=self.v_th)
    use_running_average = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    x = jnp.asarray(x)
    shape, factor = x.shape[-1:], self.alpha * self.v_th
    start = self.scale_init or nn.initializers.constant(
      1.0 if self.factored else factor
    )
    scale = bias = None
    if self.use_scale:
      scale = self.param('scale', start, shape, self.param_dtype)
    if self.use_bias:
      bias = self.param('bias', self.bias_init, shape, self.param_dtype)
    running_dtype = dtypes.wide(self.param_dtype)
    running = [
      self.variable('batch_stats', name, fill, shape, running_dtype)
      for name, fill in (('mean', jnp.zeros), ('var', jnp.ones))
    ]
    active = not self.is_initializing()
    axis_name = self.axis_name if active else ()
    (mean, variance), new = tdbn.layer(
      x,
      (running[0].value, running[1].value),
      use_running_average=use_running_average,
      repeats=self.repeats,
      momentum=self.momentum,
      axis_name=axis_name,
      mask=mask,
    )
    if active and not use_running_average:
      for r, value in zip(running, new, strict=True):
        r.value = value
    learnt = tdbn.scale_and_bias(x, scale, bias, factor, self.factored)
    whole = mask is None and self.repeats == 1 and not use_running_average
    return tdbn.affine(
      mean, variance, *learnt, self.epsilon, x if whole else None, axis_name
    )
