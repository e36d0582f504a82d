"""The neuron, tdBN and time-folded layers for Flax Linen.

    class Net(nn.Module):
      @nn.compact
      def __call__(self, x, train: bool):            # [B, H, W, C]
        x = snn.repeat_in_time(x, num_steps=4)       # [T, B, H, W, C]
        x = snn.Conv(64, (3, 3), use_bias=False)(x)
        x = snn.TdBatchNorm(use_running_average=not train)(x)
        x = snn.SpikingNeuron(use_running_average=not train)(x)
        ...

Running thresholds live in the `batch_stats` collection, so a training loop
written for batch norm trains the neuron unchanged. What happened inside is
sown into the collection `spiking` where that is mutable: `firing_rate`,
`theta`, `width`, `mean`, `std` and `gradient_share`, [T] each.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsatgo_jax import methods, neurons, statistics, surrogate, tdbn, threshold
from dsatgo_jax.neurons import NeuronState as NeuronState
from dsatgo_jax.time_axis import fold_time as fold_time
from dsatgo_jax.time_axis import repeat_in_time as repeat_in_time

kaiming_normal = jax.nn.initializers.variance_scaling(2, 'fan_out', 'normal')

# Flax folds all leading axes into the batch: [T, B, H, W, C] goes in as it is.
Conv = functools.partial(nn.Conv, kernel_init=kaiming_normal)
Dense = nn.Dense
avg_pool = fold_time(nn.avg_pool)
max_pool = fold_time(nn.max_pool)


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

  def __call__(self, x, use_running_average: bool | None = None):
    """Normalises x.

    Args:
      x: [T, B, ..., C], or [B, ..., C] with `repeats=T`.
      use_running_average: in the place of the attribute; not both.

    Returns:
      The normalised x, of its shape.
    """
    y = self.affine(x, use_running_average)(x)
    return y.astype(self.dtype or jnp.result_type(x, self.param_dtype))

  @nn.compact
  def affine(self, x, use_running_average: bool | None = None) -> tdbn.Affine:
    """Measures x, and leaves it to `SpikingNeuron(...)(x, norm=...)`.

    The neuron then keeps x alone for its backward pass, not the normalised x.

    Args:
      x: [T, B, ..., C], or [B, ..., C] with `repeats=T`.
      use_running_average: in the place of the attribute; not both.

    Returns:
      The `tdbn.Affine` that normalises x.
    """
    neurons.check_positive(alpha=self.alpha, v_th=self.v_th)
    use_running_average = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    shape, factor = x.shape[-1:], self.alpha * self.v_th
    start = nn.initializers.constant(1.0 if self.factored else factor)
    scale = self.param('scale', start, shape, self.param_dtype)
    bias = self.param('bias', nn.initializers.zeros, shape, self.param_dtype)
    running_dtype = jnp.promote_types(self.param_dtype, jnp.float32)
    running = [
      self.variable('batch_stats', name, fill, shape, running_dtype)
      for name, fill in (('mean', jnp.zeros), ('var', jnp.ones))
    ]
    if use_running_average:
      mean, variance = (r.value for r in running)
    else:
      axis_name = None if self.is_initializing() else self.axis_name
      mean, variance = tdbn.measure(x, axis_name)
      if not self.is_initializing():
        unbiased = tdbn.unbiased(variance, x, self.repeats, axis_name)
        for r, new in zip(running, (mean, unbiased), strict=True):
          r.value = statistics.running_average(r.value, new, self.momentum)
    if self.factored:
      scale = factor * scale
    return tdbn.affine(mean, variance, scale, bias, self.epsilon)


class SpikingNeuron(nn.Module):
  """A layer of spiking neurons, over time. One neuron for all methods.

  Attributes:
    method: a name of `methods.METHODS`, or a `methods.Method` of your own.
    num_steps: T; None for what it is initialised with. With a method that
      keeps running values, another T is an error.
    use_running_average: whether inference's running thresholds are used
      instead of the batch's; as attribute or call argument, as in Flax's
      `BatchNorm`.
    decay: the retained fraction of the membrane, in (0, 1) if learnt.
    learn_decay: PLIF: one scalar `w` a layer, `decay = sigmoid(w)`; else LIF.
    v_th: the threshold's base value.
    f_c: the firing-rate factor.
    width: the surrogate's base width, `kappa_0`.
    threshold: 'true' or 'estimated' distribution [eq 5], or a rule of your own.
    width_signal: 'theta' (the paper) or 'sigma' (the authors' program) [eq 7].
    surrogate: see `dsatgo_jax.surrogate`.
    reset: 'hard' or 'soft'.
    detach_reset: whether the reset passes no gradient to the spike.
    momentum: the share of the running threshold that is kept [eq 6].
    axis_name: mapped axis over which the statistics are pooled.
    dtype: of the spikes; None for x's.
    param_dtype: of `w`, `v_th` and the running values (at least float32).
  """

  method: str | methods.Method = 'ds_atgo'
  use_running_average: bool | None = None
  num_steps: int | None = None
  decay: float = 0.2
  learn_decay: bool = True
  v_th: float = 1.0
  f_c: float = 1.0
  width: float = 1.0
  threshold: str | Callable = 'true'
  width_signal: str | Callable = 'theta'
  surrogate: Callable = surrogate.rectangular
  reset: str = 'hard'
  detach_reset: bool = False
  momentum: float = 0.9
  axis_name: Any = None
  dtype: Any = None
  param_dtype: Any = jnp.float32

  def __call__(
    self,
    x,
    use_running_average: bool | None = None,
    *,
    state: NeuronState | None = None,
    return_state: bool = False,
    tdbn_scale=None,
    norm: tdbn.Affine | None = None,
  ):
    """Runs the neurons over x.

    Args:
      x: pre-synaptic input, [T, B, ...].
      use_running_average: in the place of the attribute; not both.
      state: the `NeuronState` to go on from; None for neurons at rest. x is
        then a part of a longer recording, and begins at its timestep `state.t`.
      return_state: whether the state after x is returned too.
      tdbn_scale: the scale of the tdBN that feeds the neuron, [C]; `mpd_agl`.
      norm: `TdBatchNorm.affine(x)`, if x is not yet normalised.

    Returns:
      Spikes [T, B, ...], or (spikes, state).

    Raises:
      ValueError: a setting out of its range, x without a batch axis, or T that
        is not that of the running thresholds.
    """
    shape = (self.num_steps or jnp.shape(x)[0],)
    spikes, state = self._run(
      x, use_running_average, state, shape, tdbn_scale, norm
    )
    return (spikes, state) if return_state else spikes

  @nn.compact
  def _run(
    self,
    x,
    use_running_average,
    state,
    running_shape,
    tdbn_scale=None,
    norm=None,
  ):
    """The layer over x, with running averages of the given shape."""
    use_running_average = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    neurons.check_positive(v_th=self.v_th, f_c=self.f_c, width=self.width)
    neurons.check_shares(self.decay, self.learn_decay, self.momentum)
    method = methods.get(self.method, self.threshold, self.width_signal)
    decay, v_th = self.decay, self.v_th
    if self.learn_decay:
      start = nn.initializers.constant(neurons.logit(decay))
      decay = jax.nn.sigmoid(self.param('w', start, (), self.param_dtype))
    if method.threshold is threshold.learnable:
      start = nn.initializers.constant(v_th)
      v_th = self.param('v_th', start, (), self.param_dtype)

    initial = neurons.initial_running(method, self.v_th, running_shape, x.dtype)
    averages = {
      name: self.variable('batch_stats', f'running_{name}', lambda v=value: v)
      for name, value in initial._asdict().items()
      if value is not None
    }
    active = not self.is_initializing()
    spikes, state, record, running = neurons.layer(
      x,
      neurons.Parameters(decay, v_th, self.f_c, self.width, tdbn_scale, norm),
      method,
      neurons.Running(**{name: a.value for name, a in averages.items()}),
      state=state,
      use_running_average=use_running_average,
      momentum=self.momentum,
      surrogate=self.surrogate,
      reset=self.reset,
      detach_reset=self.detach_reset,
      axis_name=self.axis_name if active else None,
      dtype=self.dtype,
      record=active and self.is_mutable_collection('spiking'),
    )
    if active and not use_running_average:
      for name, average in averages.items():
        average.value = getattr(running, name)
    if active and self.is_mutable_collection('spiking'):
      for name, value in record.scalars().items():
        self.sow('spiking', name, value, reduce_fn=lambda _, new: new)
    return spikes, state


class SpikingCell(SpikingNeuron, nn.RNNCellBase):
  """`SpikingNeuron` as a recurrent cell, for networks scanned as a whole.

  Equal to `SpikingNeuron`, running thresholds included, where each timestep
  keeps its own statistics:

      nn.RNN(cell, time_major=True, variable_axes={'batch_stats': 0})
  """

  def __call__(  # type: ignore[override]
    self, carry: NeuronState, x, use_running_average=None
  ):
    """One timestep.

    Args:
      carry: the `NeuronState` before it.
      x: pre-synaptic input, [B, ...].
      use_running_average: in the place of the attribute; not both.

    Returns:
      (state, spikes [B, ...]).
    """
    spikes, carry = self._run(x[None], use_running_average, carry, ())
    return carry, spikes[0]

  @nn.nowrap
  def initialize_carry(self, rng, input_shape) -> NeuronState:
    """The state at rest, for x of shape [B, ...].

    Args:
      rng: not needed.
      input_shape: x's.

    Returns:
      A `NeuronState`.
    """
    del rng
    return neurons.at_rest(jnp.zeros(input_shape, self.dtype or jnp.float32))

  @property
  def num_feature_axes(self) -> int:
    """One: the last axis of x."""
    return 1
