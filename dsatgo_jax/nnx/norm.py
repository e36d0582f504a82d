"""Threshold-dependent batch norm for Flax NNX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from dsatgo_jax import dtypes, neurons, tdbn
from dsatgo_jax.nnx.variables import chosen


class TdBatchNorm(nnx.Module):
  """Threshold-dependent batch norm; see `dsatgo_jax.linen.TdBatchNorm`."""

  def __init__(
    self,
    num_features: int,
    *,
    use_running_average: bool = False,
    alpha: float = 1.0,
    v_th: float = 1.0,
    factored: bool = False,
    repeats: int = 1,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    axis_name: Any = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    use_bias: bool = True,
    use_scale: bool = True,
    scale_init: Callable[..., Any] | None = None,
    bias_init: Callable[..., Any] = nnx.initializers.zeros,
    rngs: nnx.Rngs | None = None,
  ):
    """Makes the parameters; those not listed are as Linen's.

    Args:
      num_features: C.
      use_running_average: as in `nnx.BatchNorm`; `model.eval()` sets it.
      alpha: the deviation of the output, in thresholds.
      v_th: the threshold's base value.
      factored: whether `alpha * v_th` stays outside the learnt scale.
      repeats: how many identical copies of x the statistics stand for.
      momentum: the share of the running statistics that is kept.
      epsilon: added to the variance.
      axis_name: mapped axis over which the batch is spread.
      dtype: of the output; None for the promoted one.
      param_dtype: of scale and bias.
      use_bias: whether a bias is learnt; else it is 0.
      use_scale: whether the scale is learnt; else it stays at `alpha * v_th`.
      scale_init: of the scale, in the place of its start by alpha; to partition
        it, `nnx.with_partitioning(nnx.initializers.ones, ('model',))`.
      bias_init: of the bias.
      rngs: for initializers that need a key; two are drawn, as by Flax.
    """
    neurons.check_positive(alpha=alpha, v_th=v_th)
    shape, self.factor = (num_features,), alpha * v_th
    start = nnx.initializers.constant(1.0 if factored else self.factor)
    key: Callable[..., Any] = (lambda: None) if rngs is None else rngs.params

    def learnt(init):
      return nnx.Param(init(key(), shape, param_dtype))

    self.scale = learnt(scale_init or start) if use_scale else nnx.data(None)
    self.bias = learnt(bias_init) if use_bias else nnx.data(None)
    running_dtype = dtypes.wide(param_dtype)
    self.mean = nnx.BatchStat(jnp.zeros(shape, running_dtype))
    self.var = nnx.BatchStat(jnp.ones(shape, running_dtype))
    self.num_features = num_features
    self.use_running_average = use_running_average
    self.factored = factored
    self.repeats = repeats
    self.momentum = momentum
    self.epsilon = epsilon
    self.axis_name = axis_name
    self.dtype = dtype

  def __call__(
    self,
    x: ArrayLike,
    use_running_average: bool | None = None,
    *,
    mask: ArrayLike | None = None,
  ) -> jax.Array:
    """Normalises x [T, B, ..., C], or [B, ..., C] with `repeats=T`.

    Args:
      x: what is normalised.
      use_running_average: overrides the attribute.
      mask: [T, B] or [B], whether an example is real; None for all of it.

    Returns:
      The normalised x, of its shape.

    Raises:
      ValueError: x is complex or of another number of channels, the mask does
        not fit it, or `use_running_average` is None here and there.
    """
    x = jnp.asarray(x)
    affine = self._affine(x, use_running_average, mask)
    dtype = self.dtype or jnp.result_type(x, affine.bias)
    return affine(x).astype(dtypes.floating(dtype))

  def affine(
    self,
    x: ArrayLike,
    use_running_average: bool | None = None,
    *,
    mask: ArrayLike | None = None,
  ) -> tdbn.Affine:
    """Measures x, and leaves it to `SpikingNeuron(...)(x, norm=...)`."""
    return self._affine(jnp.asarray(x), use_running_average, mask)

  def _affine(self, x, use_running_average, mask):
    use_running_average = chosen(use_running_average, self)
    (mean, variance), new = tdbn.layer(
      x,
      (self.mean[...], self.var[...]),
      use_running_average=use_running_average,
      repeats=self.repeats,
      momentum=self.momentum,
      axis_name=self.axis_name,
      mask=mask,
    )
    if not use_running_average:
      self.mean[...], self.var[...] = new
    learnt = (a if a is None else a[...] for a in (self.scale, self.bias))
    scale, bias = tdbn.scale_and_bias(x, *learnt, self.factor, self.factored)
    whole = mask is None and self.repeats == 1 and not use_running_average
    source = x if whole else None
    return tdbn.affine(
      mean, variance, scale, bias, self.epsilon, source, self.axis_name
    )

  def set_view(self, use_running_average: bool | None = None):
    """For `nnx.view`.

    Args:
      use_running_average: whether the running statistics are used.
    """
    if use_running_average is not None:
      self.use_running_average = use_running_average
