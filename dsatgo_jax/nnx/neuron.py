"""The layer of spiking neurons for Flax NNX."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsatgo_jax import layers, methods, neurons, probes, statistics, tdbn
from dsatgo_jax import surrogate as surrogates
from dsatgo_jax.neurons import NeuronState
from dsatgo_jax.nnx.variables import CAPTURED, chosen
from dsatgo_jax.threshold import learnable


class SpikingNeuron(nnx.Module):
  """A layer of spiking neurons; see `dsatgo_jax.linen.SpikingNeuron`."""

  def __init__(
    self,
    method: methods.Name | methods.Method = 'ds_atgo',
    *,
    num_steps: int | None = None,
    num_features: int | Sequence[int] = (),
    use_running_average: bool = False,
    decay: Any = 0.2,
    learn_decay: bool = True,
    v_th: Any = 1.0,
    f_c: Any = 1.0,
    width: Any = 1.0,
    threshold: Literal['true', 'estimated'] | methods.Rule = 'true',
    width_signal: Literal['theta', 'sigma'] | methods.Rule = 'theta',
    surrogate: surrogates.Name | surrogates.Spike = 'rectangular',
    reset: neurons.Reset = 'hard',
    detach_reset: bool = False,
    cut: Sequence[str] = (),
    momentum: float = 0.9,
    beyond: Literal['error', 'hold'] = 'error',
    axis_name: Any = None,
    fused: bool | None = None,
    kernel: str = 'xla',
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    decay_shape: Sequence[int] = (),
    decay_init: Callable[..., Any] | None = None,
    v_th_shape: Sequence[int] = (),
    rngs: nnx.Rngs | None = None,
  ):
    """Makes parameters and running values; the settings are Linen's.

    Args:
      method: a name of `methods.METHODS`, or a `methods.Method`.
      num_steps: T; None for any, if the method keeps no running values.
      num_features: the size of x's last axis, or axes, which a method needs to
        know whose threshold is not a scalar: 'ds_atgo_per_channel'.
      use_running_average: inference by the running thresholds; `model.eval()`
        sets it.
      decay: the retained fraction of the membrane, in (0, 1) if learnt.
      learn_decay: PLIF: `decay = sigmoid(w)`, `w` of decay's shape.
      v_th: the threshold's base value.
      f_c: the firing-rate factor.
      width: the surrogate's base width, `kappa_0`.
      threshold: 'true' or 'estimated' distribution [eq 5], or your own rule.
      width_signal: 'theta' (the paper) or 'sigma' (the authors' program).
      surrogate: a name of `surrogate.SURROGATES`, or a function like them.
      reset: 'hard', 'soft' or 'subtract_after_decay'; see `dynamics`.
      detach_reset: whether the reset passes no gradient to the spike.
      cut: of 'spatial', 'leak' and 'reset', the paths that pass no gradient.
      momentum: the share of the running threshold that is kept [eq 6].
      beyond: 'hold' allows another T, and holds the last running value.
      axis_name: mapped axis over which the statistics are pooled.
      fused: False leaves the scan to autodiff, as forward mode needs.
      kernel: 'xla', or 'pallas' for kernels of our own on NVIDIA GPUs.
      dtype: of the spikes; None for x's.
      param_dtype: of `w`, `v_th` and the running values (at least float32).
      decay_shape: what decay is broadcast to: (C,) for one number a channel.
      decay_init: `decay_init(key, shape, dtype)` draws decays in its place.
      v_th_shape: what v_th is broadcast to.
      rngs: for `decay_init`.

    Raises:
      ValueError: a setting out of its range.
    """
    decay = layers.filled(decay, decay_shape)
    v_th = layers.filled(v_th, v_th_shape)
    decay, v_th, f_c, width = map(layers.static, (decay, v_th, f_c, width))
    self.method, self.threshold, self.width_signal = (
      method, threshold, width_signal,
    )  # fmt: skip
    self.num_steps = num_steps
    self.use_running_average = use_running_average
    self.decay, self.learn_decay = decay, learn_decay
    self.f_c, self.width = f_c, width
    self.surrogate = surrogate
    self.reset, self.detach_reset, self.cut = reset, detach_reset, tuple(cut)
    self.momentum, self.beyond = momentum, beyond
    self.axis_name = axis_name
    self.fused, self.kernel = fused, kernel
    self.dtype, self.param_dtype = dtype, param_dtype
    neurons.check_positive(num_steps=num_steps, v_th=v_th, f_c=f_c, width=width)
    layers.check_shares(decay, learn_decay, momentum)
    if learn_decay:
      start = layers.logits(decay, decay_init)
      key = rngs.params() if decay_init and rngs else None
      self.w = nnx.Param(start(key, np.shape(decay), param_dtype))
    learns = self._rules.threshold is learnable
    self.v_th = nnx.Param(jnp.asarray(v_th, param_dtype)) if learns else v_th
    features = np.ravel(num_features).astype(int).tolist()
    for name, rule in layers.averaged(self._rules).items():
      if num_steps is None:
        raise ValueError(
          'This method keeps one running value per timestep: expected '
          f'num_steps=T, got {num_steps=}.'
        )
      average = layers.initial_average(
        rule,
        neurons.Parameters(decay, v_th, f_c, width),
        (num_steps,),
        jax.ShapeDtypeStruct((2, *features), param_dtype),
        self._rules.measure,
      )
      measures = self._rules.measure is not statistics.measure
      if average.ndim > 1 and measures and not features:
        raise ValueError(
          "This method's threshold is not a scalar: expected num_features, the "
          f"size of x's last axis, got {num_features=}."
        )
      setattr(self, f'running_{name}', nnx.BatchStat(average))

  @property
  def _rules(self):
    return methods.get(self.method, self.threshold, self.width_signal)

  @property
  def _averages(self):
    return {
      name: getattr(self, f'running_{name}')
      for name in layers.averaged(self._rules)
    }

  @property
  def _length(self):
    """T, of the running values where there are any."""
    lengths = [average.shape[0] for average in self._averages.values()]
    return lengths[0] if lengths else self.num_steps

  @layers.typed_call
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
    use_running_average = chosen(use_running_average, self)
    averages = self._averages
    if norm is not None:
      norm = norm.of(x if self.kernel == 'pallas' else None)
    # Outside `nnx.capture`, sowing would cost and keep everything.
    kinds = tuple(map(type, getattr(self, '__captures__', ())))
    spikes, state, told, running = layers.layer(
      x,
      self.parameters()._replace(tdbn_scale=tdbn_scale, norm=norm),
      self._rules,
      neurons.Running(**{name: a[...] for name, a in averages.items()}),
      num_steps=self._length,
      run=self._scan(),
      state=state,
      whole=state is None,
      use_running_average=use_running_average,
      momentum=self.momentum,
      beyond=self.beyond,
      mask=mask,
      surrogate=self.surrogate,
      reset=self.reset,
      detach_reset=self.detach_reset,
      cut=self.cut,
      axis_name=self.axis_name,
      fused=self.fused,
      kernel=self.kernel,
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

  def parameters(self) -> neurons.Parameters:
    """The neuron's numbers, learnt and fixed."""
    learns = isinstance(self.v_th, nnx.Param)
    return neurons.Parameters(
      jax.nn.sigmoid(self.w[...]) if self.learn_decay else self.decay,
      self.v_th[...] if learns else self.v_th,
      self.f_c,
      self.width,
    )

  def _scan(self):
    """The function that runs the neurons over x."""
    return neurons.run

  def set_view(self, use_running_average: bool | None = None):
    """For `nnx.view`.

    Args:
      use_running_average: whether the running thresholds are used.
    """
    if use_running_average is not None:
      self.use_running_average = use_running_average
