"""The layer of spiking neurons for Flax Linen."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dsatgo_jax import (
  layers,
  methods,
  neurons,
  probes,
  tdbn,
  threshold,
)
from dsatgo_jax import surrogate as surrogates
from dsatgo_jax.neurons import NeuronState


class SpikingNeuron(nn.Module):
  """A layer of spiking neurons, over time. One neuron for all methods.

  Attributes:
    method: a name of `methods.METHODS`, or a `methods.Method` of your own.
    num_steps: T, which is then checked; None for what it is initialised with,
      or for any T where the method keeps no running values.
    use_running_average: whether inference's running thresholds are used
      instead of the batch's; as attribute or call argument, as in Flax's
      `BatchNorm`.
    decay: the retained fraction of the membrane, in (0, 1) if learnt. Like
      `v_th`, `f_c` and `width` a number, or a tuple or array of numbers that
      broadcasts against x[0].
    learn_decay: PLIF: `decay = sigmoid(w)`, w of decay's shape: one scalar a
      layer for a number, one a channel for `np.full(channels, 0.2)`; else LIF.
    v_th: the threshold's base value; `learnable_threshold` learns it, in its
      shape.
    f_c: the firing-rate factor.
    width: the surrogate's base width, `kappa_0`.
    threshold: 'true' or 'estimated' distribution [eq 5], or a rule of your own.
    width_signal: 'theta' (the paper) or 'sigma' (the authors' program) [eq 7].
    surrogate: a name of `surrogate.SURROGATES`, or a function like them.
    reset: 'hard', 'soft' or 'subtract_after_decay'; see `dynamics`.
    detach_reset: whether the reset passes no gradient to the spike.
    cut: ways of the gradient into the membrane, of 'spatial', 'leak' and
      'reset', that pass none.
    momentum: the share of the running threshold that is kept [eq 6].
    beyond: 'hold' allows another T than that of the running values: the last
      one is held, and fewer timesteps take the first ones. See also
      `resize_time`.
    axis_name: mapped axis over which the statistics are pooled. None under
      `pmap` or `shard_map` warns; () says that they are each device's own.
    fused: False leaves the scan to autodiff, which forward mode needs; None
      does so for surrogates made by `surrogate.straight_through`.
    kernel: 'xla', or 'pallas' for kernels of our own on NVIDIA GPUs; see
      `neurons.run`.
    dtype: of the spikes; None for x's.
    param_dtype: of `w`, `v_th` and the running values (at least float32).
    decay_shape: what decay is broadcast to: (C,) for one number a channel.
    decay_init: `decay_init(key, shape, dtype)` draws decays in (0, 1), of
      decay's shape, in its place where they are learnt.
    v_th_shape: what v_th is broadcast to.
  """

  method: methods.Name | methods.Method = 'ds_atgo'
  use_running_average: bool | None = None
  num_steps: int | None = None
  decay: Any = 0.2
  learn_decay: bool = True
  v_th: Any = 1.0
  f_c: Any = 1.0
  width: Any = 1.0
  threshold: Literal['true', 'estimated'] | methods.Rule = 'true'
  width_signal: Literal['theta', 'sigma'] | methods.Rule = 'theta'
  surrogate: surrogates.Name | surrogates.Spike = 'rectangular'
  reset: neurons.Reset = 'hard'
  detach_reset: bool = False
  cut: Sequence[str] = ()
  momentum: float = 0.9
  beyond: Literal['error', 'hold'] = 'error'
  axis_name: Any = None
  fused: bool | None = None
  kernel: str = 'xla'
  dtype: Any = None
  param_dtype: Any = jnp.float32
  decay_shape: Sequence[int] = ()
  decay_init: Callable[..., Any] | None = None
  v_th_shape: Sequence[int] = ()

  def __post_init__(self):
    self.decay = layers.filled(self.decay, self.decay_shape)
    self.v_th = layers.filled(self.v_th, self.v_th_shape)
    for name in ('decay', 'v_th', 'f_c', 'width'):
      setattr(self, name, layers.static(getattr(self, name)))
    super().__post_init__()

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
    """Runs the neurons over x.

    Args:
      x: pre-synaptic input, [T, B, ...]; integers are taken as float32.
      use_running_average: in the place of the attribute; not both.
      mask: [T, B] or [B], whether an example is real at a timestep; statistics
        and running thresholds are those of what is. None for all of it.
      state: the `NeuronState` to go on from; None for neurons at rest. x is
        then a part of a longer recording, and begins at its timestep `state.t`.
      return_state: whether the state after x is returned too.
      tdbn_scale: the scale of the tdBN that feeds the neuron, [C]; `mpd_agl`.
      norm: `TdBatchNorm.affine(x)`, if x is not yet normalised.

    Returns:
      Spikes [T, B, ...], or (spikes, state).

    Raises:
      ValueError: a setting out of its range, x complex or without a batch axis,
        a single neuron in all (which has no deviation) in training, or T that
        is not that of the running thresholds.
    """
    spikes, state = self._run(
      x, use_running_average, state, state is None, mask, tdbn_scale, norm
    )
    return (spikes, state) if return_state else spikes

  @nn.compact
  def _run(
    self,
    x,
    use_running_average,
    state,
    whole,
    mask=None,
    tdbn_scale=None,
    norm=None,
    per_step=False,
  ):
    """The layer over x; `per_step` keeps the averages of one timestep."""
    use_running_average = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    neurons.check_positive(
      num_steps=self.num_steps, v_th=self.v_th, f_c=self.f_c, width=self.width
    )
    layers.check_shares(self.decay, self.learn_decay, self.momentum)
    method = methods.get(self.method, self.threshold, self.width_signal)
    decay, v_th = self.decay, self.v_th
    if self.learn_decay:
      start = layers.logits(decay, self.decay_init)
      w = self.param('w', start, np.shape(decay), self.param_dtype)
      decay = jax.nn.sigmoid(w)
    if method.threshold is threshold.learnable:
      start = nn.initializers.constant(np.asarray(v_th))
      v_th = self.param('v_th', start, np.shape(v_th), self.param_dtype)
    gates = None
    if self.has_variable('cuts', 'gates'):
      gates = self.get_variable('cuts', 'gates')
    x = neurons.sequence(x)
    if norm is not None:
      norm = norm.of(x if self.kernel == 'pallas' else None)
    parameters = neurons.Parameters(
      decay, v_th, self.f_c, self.width, tdbn_scale, norm, gates
    )

    lead = () if per_step else (self.num_steps or x.shape[0],)
    initial = parameters._replace(v_th=self.v_th)
    averages = {
      name: self.variable(
        'batch_stats',
        f'running_{name}',
        layers.initial_average,
        *(rule, initial, lead, x[0], method.measure),
      )
      for name, rule in layers.averaged(method).items()
    }
    running = {
      name: average.value[None] if per_step else average.value
      for name, average in averages.items()
    }
    num_steps = self.num_steps
    if not per_step:
      for average in running.values():
        num_steps = average.shape[0]
    active = not self.is_initializing()
    spikes, state, told, new = layers.layer(
      x,
      parameters,
      method,
      neurons.Running(**running),
      num_steps=None if per_step else num_steps,
      run=self._scan(x),
      state=state,
      whole=whole,
      use_running_average=use_running_average,
      momentum=self.momentum,
      beyond=self.beyond,
      mask=mask,
      surrogate=self.surrogate,
      reset=self.reset,
      detach_reset=self.detach_reset,
      cut=self.cut,
      axis_name=self.axis_name if active else (),
      fused=self.fused,
      kernel=self.kernel,
      dtype=self.dtype,
      record=[
        name
        for name in layers.COLLECTIONS
        if active and self.is_mutable_collection(name)
      ],
      probes=self._probes(x, per_step) if active else None,
    )
    if active and not use_running_average:
      for name, average in averages.items():
        value = getattr(new, name)
        average.value = value[0] if per_step else value
    for collection, values in told.items():
      for name, value in values.items():
        if per_step and jnp.ndim(value):  # Stacked by the scan.
          value = value[0]
        self.sow(collection, name, value, reduce_fn=lambda _, new: new)
    return spikes, state

  @nn.nowrap
  def _scan(self, x):
    """The function that runs the neurons over x."""
    del x
    return neurons.run

  def _probes(self, x, per_step):
    """The zeros in the collection `flow`, made where that is mutable."""
    found = {}
    for name in probes.NAMES:
      if self.is_mutable_collection('flow'):
        zeros = probes.zeros(name, x)
        self.variable('flow', name, lambda a=zeros: a[0] if per_step else a)
      if self.has_variable('flow', name):
        value = self.get_variable('flow', name)
        found[name] = value[None] if per_step else value
    return found
