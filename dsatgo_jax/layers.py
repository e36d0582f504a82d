"""A layer of neurons: what Linen's and NNX's modules both do.

`neurons.run`, the running averages kept, what happened told by collection, and
settings and states as modules and recurrent cells have them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from dsatgo_jax import methods, statistics, tdbn, threshold
from dsatgo_jax.carry import APART
from dsatgo_jax.dynamics import (
  NeuronState,
  Parameters,
  Running,
  level_at_rest,
)
from dsatgo_jax.neurons import arrays, logit, run, sequence

Tree = TypeVar('Tree')


def averaged(method: methods.Method) -> dict[str, Callable[..., Any]]:
  """The rules of which a method keeps running averages, by `Running`'s names.

  Args:
    method: the rules.

  Returns:
    `{'threshold' or 'signal': rule}`.
  """
  own_signal = method.signal is not method.threshold
  rules = {'threshold': method.threshold}
  if own_signal and method.signal is not None:
    rules['signal'] = method.signal
  return {
    name: rule for name, rule in rules.items() if threshold.is_measured(rule)
  }


def initial_average(
  rule: methods.Rule,
  parameters: Parameters,
  lead: tuple[int, ...],
  x: jax.Array | jax.ShapeDtypeStruct,
  measure: Callable[..., Any] = statistics.measure,
) -> jax.Array:
  """A running average before training: `v_th` [eq 6].

  The mean of `v_th` where that has more numbers than the rule gives.

  Args:
    rule: what is averaged.
    parameters: the neuron's numbers.
    lead: (T,), or () for a single timestep.
    x: pre-synaptic input of a timestep, [B, ...], or what has its shape and
      dtype; the averages are at least float32.
    measure: the method's.

  Returns:
    [*lead, ...], the last axes those of what the rule gives, () for a scalar.
  """
  level = level_at_rest(rule, arrays(parameters, x.dtype), measure, x)
  return jnp.zeros((*lead, *level.shape), level.dtype) + level


def layer(
  x: jax.Array,
  parameters: Parameters,
  method: methods.Method,
  running: Running,
  *,
  num_steps: int | None,
  state: NeuronState | None,
  whole: bool,
  use_running_average: bool,
  momentum: float,
  mask=None,
  record: Sequence[str] = (),
  beyond: str = 'error',
  run: Callable[..., Any] = run,
  **settings,
) -> tuple[jax.Array, NeuronState, dict[str, dict], Running]:
  """`run`, and the running averages kept: what Linen's and NNX's modules do.

  Args:
    x: pre-synaptic input, [T, B, ...].
    parameters: the neuron's numbers.
    method: the rules.
    running: averages of a whole recording.
    num_steps: the timesteps of a whole recording; None for any number.
    state: the state before x.
    whole: whether x is all of the recording; else it begins at `state.t`.
    use_running_average: inference by the averages; they stay as they are.
    momentum: the share of the old averages that is kept [eq 6].
    mask: [T, B] or [B]; None for no mask.
    record: which of `COLLECTIONS` to fill.
    beyond: 'hold' allows any number of timesteps: the last running value goes
      on, and fewer timesteps take the first ones. 'error' does not.
    run: `neurons.run`, or a function that does what it does.
    **settings: further arguments of `run`.

  Returns:
    Spikes and state of `run`; what happened, by collection and name; and the
    new running averages.

  Raises:
    ValueError: what `run` raises; x is not the whole recording, or reaches
      past its end. Where `state.t` is traced this can't be seen: timesteps past
      the end then fire NaN in inference, and change no average in training.
  """
  x = sequence(x)
  running = jax.tree.map(jnp.asarray, running)
  # Of an empty batch nothing is learnt.
  use_running_average = use_running_average or 0 in x.shape
  start = 0 if whole or state is None else state.t
  if beyond not in ('error', 'hold'):
    raise ValueError(f"Expected beyond to be 'error' or 'hold', got {beyond=}.")
  held = None
  if beyond == 'hold' and num_steps is not None:
    held = num_steps - 1
    whole = whole and x.shape[0] == num_steps
  else:
    _check_length(x, start, num_steps, whole)
  times = start + np.arange(x.shape[0], dtype=np.int32)
  here = running
  if not whole:
    found = times
    if held is not None:
      found = jnp.where(times < APART, jnp.minimum(times, held), times)
    here = jax.tree.map(
      lambda a: a.at[found].get(mode='fill', fill_value=jnp.nan), running
    )
  mask = tdbn.mask_of(x, mask)
  spikes, state, happened = run(
    x,
    parameters,
    method,
    state=state,
    running=here if use_running_average else None,
    mask=mask,
    record=[COLLECTIONS[name] for name in record],
    **settings,
  )
  told = _told(spikes, happened, mask, settings.get('axis_name'))
  told = {name: told[name]() for name in record}
  if not use_running_average:
    measured = Running(
      *(
        None if average is None else value
        for average, value in zip(running, happened[:2], strict=True)
      )
    )
    if mask is not None:
      seen = jnp.any(mask, 1)
      if axis_name := settings.get('axis_name'):
        seen = lax.pmax(seen.astype(jnp.int32), axis_name) > 0
      # Of a timestep without a real example nothing is learnt.
      measured = jax.tree.map(
        lambda a: jnp.where(
          lax.expand_dims(seen, range(1, a.ndim)), a, jnp.nan
        ),
        measured,
      )
    new = jax.tree.map(
      lambda old, new: statistics.running_average(old, new, momentum),
      here,
      measured,
    )
    running = (
      new
      if whole
      else jax.tree.map(
        lambda a, new: a.at[times].set(new, mode='drop'), running, new
      )
    )
  return spikes, state, told, running


class Call(Protocol):
  """What `SpikingNeuron(...)(x, ...)` gives, to type checkers."""

  @overload
  def __call__(
    self,
    x: ArrayLike,
    use_running_average: bool | None = None,
    *,
    mask: ArrayLike | None = None,
    state: NeuronState | None = None,
    return_state: Literal[False] = False,
    tdbn_scale: ArrayLike | None = None,
    norm: tdbn.Affine | None = None,
  ) -> jax.Array: ...

  @overload
  def __call__(
    self,
    x: ArrayLike,
    use_running_average: bool | None = None,
    *,
    mask: ArrayLike | None = None,
    state: NeuronState | None = None,
    return_state: Literal[True],
    tdbn_scale: ArrayLike | None = None,
    norm: tdbn.Affine | None = None,
  ) -> tuple[jax.Array, NeuronState]: ...


def typed_call(method: Callable[..., Any]) -> Call:
  """A module's `__call__` as it is, by its type for type checkers."""
  return cast(Call, method)


# Where the modules put what happened, and the part of the `Record` it is.
COLLECTIONS = {
  'spiking': 'activity',
  'histograms': 'histogram',
  'membranes': 'membrane',
}


def _told(spikes, happened, mask, axis_name):
  """What goes into each of the collections, as functions."""

  def activity():
    fired = lax.stop_gradient(spikes != 0)
    real = True if mask is None else _like(mask, fired)
    pooled = {
      'axis_name': axis_name,
      'mask': None if mask is None else jnp.any(mask, 0),
    }
    return happened.scalars() | {
      'silent_share': statistics.share(~jnp.any(fired & real, 0), **pooled),
      'always_share': statistics.share(
        jnp.all(fired | ~jnp.asarray(real), 0), **pooled
      ),
    }

  return {
    'spiking': activity,
    'histograms': lambda: {'membrane': happened.histogram},
    'membranes': lambda: {'u': happened.u, 'v': happened.v, 'spikes': spikes},
  }


def _like(mask, x):
  """A mask with x's axes."""
  return lax.expand_dims(mask, range(mask.ndim, x.ndim))


def resize_time(variables: Tree, num_steps: int) -> Tree:
  """Variables for another number of timesteps than they were trained with.

  Args:
    variables: of Linen modules, or an NNX state: `nnx.update(model,
      resize_time(nnx.state(model), num_steps))`. Of them the running thresholds
      and signals, [T, ...], change: the last is repeated, or later ones go.
    num_steps: the new T.

  Returns:
    The same tree; modules with `num_steps` have to be built anew for it.

  Raises:
    ValueError: `num_steps` is not positive.
  """
  if num_steps < 1:
    raise ValueError(f'Expected num_steps >= 1, got {num_steps=}.')

  def resized(path, leaf):
    name = jax.tree_util.keystr(path)
    if not any(f'running_{kind}' in name for kind in Running._fields):
      return leaf
    return leaf[np.minimum(np.arange(num_steps), len(leaf) - 1)]

  return jax.tree_util.tree_map_with_path(resized, variables)


def _check_length(x, start, num_steps, whole):
  """Raises a `ValueError` for timesteps that the neuron does not have."""
  if num_steps is None:
    return
  known = not isinstance(start, jax.core.Tracer)
  start = int(start) if known else 0
  end = x.shape[0] + start
  if end > num_steps or (whole and end != num_steps):
    begin = f' from timestep {start} on' if start else ''
    if start == APART:
      begin = ' from a different timestep on for each example'
    raise ValueError(
      'This neuron was built for so many timesteps (num_steps, or its running '
      f'values): expected T = {num_steps} in all, got x with T = {x.shape[0]}'
      f'{begin}, of shape {x.shape}. x is [T, B, ...], time first. For another '
      "T, beyond='hold' lets the last running value go on, and "
      'resize_time(variables, num_steps) makes variables of it.'
    )


def static(value):
  """A number as it is, an array as tuples of numbers: a setting with a hash.

  Args:
    value: a setting of a module; what is traced stays as it is.

  Returns:
    A number, or tuples.
  """
  if isinstance(value, jax.core.Tracer) or np.ndim(value) == 0:
    return value
  return tuple(static(item) for item in np.asarray(value).tolist())


def filled(value, shape: Sequence[int]):
  """A number, or an array of one, in another shape.

  Args:
    value: what is traced stays as it is.
    shape: () for value's own.

  Returns:
    A number, or an array.
  """
  if not len(shape) or isinstance(value, jax.core.Tracer):
    return value
  return np.broadcast_to(value, tuple(shape))


def logits(decay, init: Callable[..., Any] | None = None) -> Callable[..., Any]:
  """An initializer of PLIF's `w`, `decay = sigmoid(w)`.

  Args:
    decay: what it is to start with.
    init: `init(key, shape, dtype)` draws it, in (0, 1); None for `decay`.

  Returns:
    `initializer(key, shape, dtype)`.
  """

  def initializer(key, shape, dtype):
    drawn = jnp.broadcast_to(logit(decay), shape)
    if init is not None:
      drawn = jax.scipy.special.logit(init(key, shape, dtype))
    return jnp.asarray(drawn, dtype)

  return initializer


def check_shares(decay, learn_decay, momentum):
  """Raises a `ValueError` for a decay or a momentum out of its range.

  What is traced is not checked.
  """
  if not isinstance(decay, jax.core.Tracer):
    low, high = np.min(decay), np.max(decay)
    if not (0 < low <= high < 1 if learn_decay else 0 <= low <= high <= 1):
      raise ValueError(
        'Expected 0 <= decay <= 1, the retained fraction, both ends excluded '
        f'if it is learnt, got {decay=}, {learn_decay=}.'
      )
  if not isinstance(momentum, jax.core.Tracer) and not 0 <= momentum <= 1:
    raise ValueError(f'Expected 0 <= momentum <= 1, got {momentum=}.')
