"""The neuron, tdBN and time-folded layers for Flax NNX.

    class Net(nnx.Module):
      def __init__(self, rngs):
        self.conv = snn.Conv(1, 64, (3, 3), use_bias=False, rngs=rngs)
        self.norm = snn.TdBatchNorm(64)
        self.neuron = snn.SpikingNeuron(num_steps=4)

      def __call__(self, x):                       # [B, H, W, C]
        x = snn.repeat_in_time(x, num_steps=4)     # [T, B, H, W, C]
        return self.neuron(self.norm(self.conv(x)))

The names and settings are those of `dsatgo_jax.linen`. Running thresholds are
`nnx.BatchStat`s, and `model.train()` and `model.eval()` switch between them
and the batch's own. What happened inside is sown as `nnx.Intermediate` under
`nnx.capture`: `firing_rate`, `theta`, `width`, `mean`, `std` and
`gradient_share`, [T] each.

A membrane that is infinite or NaN shows: its spikes are NaN, in training those
of the whole layer. Running values take nothing that is not finite. Under
all-zero input a measured threshold is zero and every neuron fires in training;
all other thresholds leave it silent.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsatgo_jax import methods, neurons, probes, statistics, surrogate, tdbn
from dsatgo_jax.initializers import kaiming_normal
from dsatgo_jax.neurons import NeuronState as NeuronState
from dsatgo_jax.threshold import learnable
from dsatgo_jax.time_axis import fold_time as fold_time
from dsatgo_jax.time_axis import repeat_in_time as repeat_in_time

# Flax folds all leading axes into the batch: [T, B, H, W, C] goes in as it is.
Conv = functools.partial(nnx.Conv, kernel_init=kaiming_normal)
Dense = nnx.Linear
avg_pool = fold_time(nnx.avg_pool)
max_pool = fold_time(nnx.max_pool)


class Histogram(nnx.Variable):
  """Captured: histograms of the membranes, as Linen's `histograms`."""


class Membrane(nnx.Variable):
  """Captured: membranes and spikes, as Linen's `membranes`."""


class Probe(nnx.Variable):
  """Zeros whose gradients tell of gradients; see `analysis.flow`."""


# By which kind of variable the modules are captured for which collection.
CAPTURED = {
  'spiking': nnx.Intermediate,
  'histograms': Histogram,
  'membranes': Membrane,
}


def _static(value):
  """A number as it is, an array as tuples: static to NNX."""
  if np.ndim(value) == 0:
    return value
  return tuple(_static(item) for item in np.asarray(value).tolist())


def _length_of_rnn():
  """T of the `nnx.RNN` that is calling, None outside of one.

  The body of a scan cannot ask for its length, and past the end of the running
  thresholds it would be too late for an error.
  """
  frame = inspect.currentframe()
  while frame and frame.f_code is not nnx.RNN.__call__.__code__:
    frame = frame.f_back
  if frame and 'time_axis' in frame.f_locals:
    return frame.f_locals['inputs'].shape[frame.f_locals['time_axis']]
  return None


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
      rngs: not needed.
    """
    del rngs
    neurons.check_positive(alpha=alpha, v_th=v_th)
    shape, self.factor = (num_features,), alpha * v_th
    start = 1.0 if factored else self.factor
    self.scale = nnx.Param(jnp.full(shape, start, param_dtype))
    self.bias = nnx.Param(jnp.zeros(shape, param_dtype))
    running_dtype = jnp.promote_types(param_dtype, jnp.float32)
    self.mean = nnx.BatchStat(jnp.zeros(shape, running_dtype))
    self.var = nnx.BatchStat(jnp.ones(shape, running_dtype))
    self.use_running_average = use_running_average
    self.factored = factored
    self.repeats = repeats
    self.momentum = momentum
    self.epsilon = epsilon
    self.axis_name = axis_name
    self.dtype = dtype

  def __call__(self, x, use_running_average: bool | None = None, *, mask=None):
    """Normalises x [T, B, ..., C], or [B, ..., C] with `repeats=T`.

    Args:
      x: what is normalised.
      use_running_average: overrides the attribute.
      mask: [T, B] or [B], whether an example is real; None for all of it.

    Returns:
      The normalised x, of its shape.
    """
    y = self.affine(x, use_running_average, mask=mask)(x)
    return y.astype(self.dtype or jnp.result_type(x, self.scale[...]))

  def affine(
    self, x, use_running_average: bool | None = None, *, mask=None
  ) -> tdbn.Affine:
    """Measures x, and leaves it to `SpikingNeuron(...)(x, norm=...)`."""
    if use_running_average is None:
      use_running_average = self.use_running_average
    scale = self.scale[...]
    if use_running_average:
      mean, variance = self.mean[...], self.var[...]
    else:
      mask = tdbn.mask_of(x, self.repeats, mask)
      mean, variance = tdbn.measure(x, self.axis_name, mask)
      unbiased = tdbn.unbiased(variance, x, self.repeats, self.axis_name, mask)
      for running, new in ((self.mean, mean), (self.var, unbiased)):
        running[...] = statistics.running_average(
          running[...], new, self.momentum
        )
    if self.factored:
      scale = self.factor * scale
    return tdbn.affine(mean, variance, scale, self.bias[...], self.epsilon)

  def set_view(self, use_running_average: bool | None = None):
    """For `nnx.view`.

    Args:
      use_running_average: whether the running statistics are used.
    """
    if use_running_average is not None:
      self.use_running_average = use_running_average


class SpikingNeuron(nnx.Module):
  """A layer of spiking neurons; see `dsatgo_jax.linen.SpikingNeuron`."""

  def __init__(
    self,
    method: str | methods.Method = 'ds_atgo',
    *,
    num_steps: int | None = None,
    use_running_average: bool = False,
    decay: Any = 0.2,
    learn_decay: bool = True,
    v_th: Any = 1.0,
    f_c: Any = 1.0,
    width: Any = 1.0,
    threshold: str | Callable = 'true',
    width_signal: str | Callable = 'theta',
    surrogate: Callable = surrogate.rectangular,
    reset: str = 'hard',
    detach_reset: bool = False,
    cut: Sequence[str] = (),
    momentum: float = 0.9,
    axis_name: Any = None,
    fused: bool | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs | None = None,
  ):
    """Makes parameters and running values; the settings are Linen's.

    Args:
      method: a name of `methods.METHODS`, or a `methods.Method`.
      num_steps: T; None for any, if the method keeps no running values.
      use_running_average: inference by the running thresholds; `model.eval()`
        sets it.
      decay: the retained fraction of the membrane, in (0, 1) if learnt.
      learn_decay: PLIF: one scalar `w` a layer, `decay = sigmoid(w)`.
      v_th: the threshold's base value.
      f_c: the firing-rate factor.
      width: the surrogate's base width, `kappa_0`.
      threshold: 'true' or 'estimated' distribution [eq 5], or your own rule.
      width_signal: 'theta' (the paper) or 'sigma' (the authors' program).
      surrogate: see `dsatgo_jax.surrogate`.
      reset: 'hard', 'soft' or 'subtract_after_decay'; see `dynamics`.
      detach_reset: whether the reset passes no gradient to the spike.
      cut: of 'spatial', 'leak' and 'reset', the paths that pass no gradient.
      momentum: the share of the running threshold that is kept [eq 6].
      axis_name: mapped axis over which the statistics are pooled.
      fused: False leaves the scan to autodiff, as forward mode needs.
      dtype: of the spikes; None for x's.
      param_dtype: of `w`, `v_th` and the running values (at least float32).
      rngs: not needed.

    Raises:
      ValueError: a setting out of its range.
    """
    del rngs
    decay, v_th, f_c, width = map(_static, (decay, v_th, f_c, width))
    self.method = methods.get(method, threshold, width_signal)
    self.num_steps = num_steps
    self.use_running_average = use_running_average
    self.decay, self.learn_decay = decay, learn_decay
    self.f_c, self.width = f_c, width
    self.surrogate = surrogate
    self.reset, self.detach_reset, self.cut = reset, detach_reset, tuple(cut)
    self.momentum = momentum
    self.axis_name = axis_name
    self.fused = fused
    self.dtype = dtype
    neurons.check_positive(num_steps=num_steps, v_th=v_th, f_c=f_c, width=width)
    neurons.check_shares(decay, learn_decay, momentum)
    if learn_decay:
      self.w = nnx.Param(jnp.asarray(neurons.logit(decay), param_dtype))
    learns = self.method.threshold is learnable
    self.v_th = nnx.Param(jnp.asarray(v_th, param_dtype)) if learns else v_th
    for name, rule in neurons.averaged(self.method).items():
      if num_steps is None:
        raise ValueError(
          'This method keeps one running value per timestep: expected '
          f'num_steps=T, got {num_steps=}.'
        )
      average = neurons.initial_average(
        rule,
        neurons.Parameters(decay, v_th, f_c, width),
        (num_steps,),
        param_dtype,
      )
      setattr(self, f'running_{name}', nnx.BatchStat(average))

  def __call__(
    self,
    x,
    use_running_average: bool | None = None,
    *,
    mask=None,
    state: NeuronState | None = None,
    return_state: bool = False,
    tdbn_scale=None,
    norm: tdbn.Affine | None = None,
  ):
    """Runs the neurons over x; arguments and errors as Linen's.

    Args:
      x: pre-synaptic input, [T, B, ...].
      use_running_average: overrides the attribute.
      mask: [T, B] or [B], whether an example is real; None for all of it.
      state: the `NeuronState` to go on from; None for neurons at rest.
      return_state: whether the state after x is returned too.
      tdbn_scale: the scale of the tdBN that feeds the neuron, [C]; `mpd_agl`.
      norm: `TdBatchNorm.affine(x)`, if x is not yet normalised.

    Returns:
      Spikes [T, B, ...], or (spikes, state).
    """
    if use_running_average is None:
      use_running_average = self.use_running_average
    averages = {
      name: getattr(self, f'running_{name}')
      for name in neurons.averaged(self.method)
    }
    # Outside `nnx.capture`, sowing would cost and keep everything.
    kinds = tuple(map(type, getattr(self, '__captures__', ())))
    spikes, state, told, running = neurons.layer(
      jnp.asarray(x),
      neurons.Parameters(
        jax.nn.sigmoid(self.w[...]) if self.learn_decay else self.decay,
        self.v_th[...] if isinstance(self.v_th, nnx.Param) else self.v_th,
        self.f_c,
        self.width,
        tdbn_scale,
        norm,
      ),
      self.method,
      neurons.Running(**{name: a[...] for name, a in averages.items()}),
      num_steps=self.num_steps,
      state=state,
      whole=state is None,
      use_running_average=use_running_average,
      momentum=self.momentum,
      mask=mask,
      surrogate=self.surrogate,
      reset=self.reset,
      detach_reset=self.detach_reset,
      cut=self.cut,
      axis_name=self.axis_name,
      fused=self.fused,
      dtype=self.dtype,
      record=[name for name, kind in CAPTURED.items() if kind in kinds],
      probes={
        name: getattr(self, f'flow_{name}')[...]
        for name in probes.NAMES
        if hasattr(self, f'flow_{name}')
      },
    )
    if not use_running_average:
      for name, average in averages.items():
        average[...] = getattr(running, name)
    for collection, values in told.items():
      for name, value in values.items():
        self.sow(CAPTURED[collection], name, value, lambda _, new: new)
    return (spikes, state) if return_state else spikes

  def set_view(self, use_running_average: bool | None = None):
    """For `nnx.view`.

    Args:
      use_running_average: whether the running thresholds are used.
    """
    if use_running_average is not None:
      self.use_running_average = use_running_average


class SpikingCell(SpikingNeuron, nnx.RNNCellBase):
  """`SpikingNeuron` as a recurrent cell, for networks scanned as a whole.

  The running thresholds [T] are indexed by the timestep that the carry holds:
  `nnx.RNN(cell, time_major=True)` equals `SpikingNeuron`.
  """

  def __call__(  # type: ignore[override]
    self, carry: NeuronState, x, use_running_average=None
  ):
    """One timestep.

    Args:
      carry: the `NeuronState` before it.
      x: pre-synaptic input, [B, ...].
      use_running_average: overrides the attribute.

    Returns:
      (state, spikes [B, ...]).
    """
    length = _length_of_rnn()
    if length and self.num_steps and length > self.num_steps:
      raise ValueError(
        f'Expected at most T = {self.num_steps} timesteps, as num_steps says, '
        f'got an nnx.RNN over {length}.'
      )
    spikes, carry = super().__call__(
      x[None], use_running_average, state=carry, return_state=True
    )
    return carry, spikes[0]

  def initialize_carry(self, input_shape, rngs=None, carry_init=None):
    """The state at rest, for x of shape [B, ...].

    Args:
      input_shape: x's.
      rngs: not needed.
      carry_init: not needed.

    Returns:
      A `NeuronState`.
    """
    del rngs, carry_init
    return neurons.at_rest(jnp.zeros(input_shape, self.dtype or jnp.float32))

  @property
  def num_feature_axes(self) -> int:
    """One: the last axis of x."""
    return 1
