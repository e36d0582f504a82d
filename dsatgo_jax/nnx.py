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
from flax import nnx

from dsatgo_jax import (
  layers,
  methods,
  neurons,
  probes,
  statistics,
  surrogate,
  tdbn,
)
from dsatgo_jax.initializers import kaiming_normal
from dsatgo_jax.neurons import NeuronState as NeuronState
from dsatgo_jax.threshold import learnable
from dsatgo_jax.time_axis import fold_time as fold_time
from dsatgo_jax.time_axis import over_leading_axes
from dsatgo_jax.time_axis import repeat_in_time as repeat_in_time

# Flax folds all leading axes into the batch: [T, B, H, W, C] goes in as it is.
Conv = functools.partial(nnx.Conv, kernel_init=kaiming_normal)
Dense = nnx.Linear
avg_pool = over_leading_axes(nnx.avg_pool)
max_pool = over_leading_axes(nnx.max_pool)


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


def _chosen(use_running_average, module) -> bool:
  """The call's setting, else the module's."""
  if use_running_average is None:
    use_running_average = module.use_running_average
  if use_running_average is None:
    raise ValueError(
      f'Expected use_running_average for {type(module).__name__}, as its '
      'attribute, in the call, or by train(), eval() or nnx.view, got None.'
    )
  return use_running_average


def _length_of_rnn(t):
  """T of the `nnx.RNN` that carries the time t; None if there is no such one.

  The body of a scan cannot ask for its length, and past the end of the running
  thresholds it would be too late for an error.
  """
  frame, carried = inspect.currentframe(), False
  while frame and frame.f_code is not nnx.RNN.__call__.__code__:
    if frame.f_code.co_name == 'scan_fn':
      carry = jax.tree.leaves(frame.f_locals.get('carry'))
      carried = any(leaf is t for leaf in carry)
    frame = frame.f_back
  if frame and carried and 'time_axis' in frame.f_locals:
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
    scale_init: Callable | None = None,
    bias_init: Callable = nnx.initializers.zeros,
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
      scale_init: of the scale, in the place of its start by alpha; to partition
        it, `nnx.with_partitioning(nnx.initializers.ones, ('model',))`.
      bias_init: of the bias.
      rngs: for initializers that need a key; two are drawn, as by Flax.
    """
    neurons.check_positive(alpha=alpha, v_th=v_th)
    shape, self.factor = (num_features,), alpha * v_th
    start = nnx.initializers.constant(1.0 if factored else self.factor)
    key: Callable = (lambda: None) if rngs is None else rngs.params
    self.scale = nnx.Param((scale_init or start)(key(), shape, param_dtype))
    self.bias = nnx.Param(bias_init(key(), shape, param_dtype))
    running_dtype = jnp.promote_types(param_dtype, jnp.float32)
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

  def __call__(self, x, use_running_average: bool | None = None, *, mask=None):
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
    return affine(x).astype(statistics.floating(dtype))

  def affine(
    self, x, use_running_average: bool | None = None, *, mask=None
  ) -> tdbn.Affine:
    """Measures x, and leaves it to `SpikingNeuron(...)(x, norm=...)`."""
    return self._affine(jnp.asarray(x), use_running_average, mask)

  def _affine(self, x, use_running_average, mask):
    use_running_average = _chosen(use_running_average, self)
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
    scale = self.scale[...]
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
    decay, v_th, f_c, width = map(layers.static, (decay, v_th, f_c, width))
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
    self.dtype, self.param_dtype = dtype, param_dtype
    neurons.check_positive(num_steps=num_steps, v_th=v_th, f_c=f_c, width=width)
    layers.check_shares(decay, learn_decay, momentum)
    if learn_decay:
      self.w = nnx.Param(jnp.asarray(neurons.logit(decay), param_dtype))
    learns = self.method.threshold is learnable
    self.v_th = nnx.Param(jnp.asarray(v_th, param_dtype)) if learns else v_th
    for name, rule in layers.averaged(self.method).items():
      if num_steps is None:
        raise ValueError(
          'This method keeps one running value per timestep: expected '
          f'num_steps=T, got {num_steps=}.'
        )
      average = layers.initial_average(
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
    use_running_average = _chosen(use_running_average, self)
    averages = {
      name: getattr(self, f'running_{name}')
      for name in layers.averaged(self.method)
    }
    # Outside `nnx.capture`, sowing would cost and keep everything.
    kinds = tuple(map(type, getattr(self, '__captures__', ())))
    spikes, state, told, running = layers.layer(
      x,
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
  `nnx.RNN(cell, time_major=True)` equals `SpikingNeuron`. Padding beyond the
  RNN's `seq_lengths` is in the statistics, since a cell does not see it;
  `SpikingNeuron(...)(x, mask=...)` leaves it out.

  Attributes:
    num_feature_axes: how many of x's last axes are no batch axes, for RNNs that
      are not time-major: 3 for x [B, T, H, W, C], whose W would else be time.
  """

  num_feature_axes: int = 1

  def __init__(self, *args, num_feature_axes: int = 1, **settings):
    """Makes parameters and running values; the settings are the neuron's.

    Args:
      *args: those of `SpikingNeuron`.
      num_feature_axes: see above.
      **settings: those of `SpikingNeuron`.
    """
    super().__init__(*args, **settings)
    self.num_feature_axes = num_feature_axes

  def __call__(  # type: ignore[override]
    self, carry: NeuronState, x, use_running_average=None
  ):
    """One timestep.

    Args:
      carry: the `NeuronState` before it; its t may be [B]. Of examples at
        different timesteps the running thresholds are NaN, and not changed.
      x: pre-synaptic input, [B, ...].
      use_running_average: overrides the attribute.

    Returns:
      (state, spikes [B, ...]).
    """
    length = _length_of_rnn(carry.t)
    if length and self.num_steps and length > self.num_steps:
      raise ValueError(
        f'Expected at most T = {self.num_steps} timesteps, as num_steps says, '
        f'got an nnx.RNN over {length}.'
      )
    spikes, state = super().__call__(
      jnp.asarray(x)[None],
      use_running_average,
      state=carry._replace(t=layers.shared_time(carry.t)),
      return_state=True,
    )
    return state._replace(t=carry.t + 1), spikes[0]

  def initialize_carry(self, input_shape, rngs=None, carry_init=None):
    """The state at rest, for x of shape [B, ...].

    Args:
      input_shape: x's.
      rngs: for `carry_init`.
      carry_init: an initializer of the membrane; None for neurons at rest.

    Returns:
      A `NeuronState`, its t [B].
    """
    init = carry_init
    if carry_init is not None:
      stream = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
      init = functools.partial(carry_init, stream and stream())
    return layers.initial_carry(input_shape, self.dtype, self.param_dtype, init)
