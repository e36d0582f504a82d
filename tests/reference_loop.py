"""One layer of neurons as a NumPy loop: the oracle of the tests.

The equations of the method, forward and backward, one timestep after the
other and nothing else: no JAX, no autodiff, no code shared with the library.
"""

from typing import NamedTuple

import numpy as np

DENSITIES = {
  'rectangular': lambda z: np.where(abs(z) < 0.5, 1.0, 0.0),
  'triangular': lambda z: np.maximum(1 - abs(z), 0),
  'sigmoid': lambda z: np.cosh(2 * z) ** -2.0,
  'arctan': lambda z: 1 / (1 + (np.pi * z) ** 2),
  'fast_sigmoid': lambda z: (1 + 2 * abs(z)) ** -2.0,
}


class Settings(NamedTuple):
  """A neuron's settings, named as in `SpikingNeuron`."""

  method: str = 'ds_atgo'
  decay: float = 0.2
  v_th: float = 1.0
  f_c: float = 1.0
  width: float = 1.0
  threshold: str = 'true'
  width_signal: str = 'theta'
  surrogate: str = 'rectangular'
  reset: str = 'hard'
  detach_reset: bool = False
  tdbn_scale: np.ndarray | None = None


def forward(settings, x, v=0.0, running=None):
  """All timesteps.

  Args:
    settings: `Settings`.
    x: [T, ...].
    v: membrane before the first timestep.
    running: inference, `{'theta': [T], 'signal': [T]}` as far as the method
      keeps them; None for training.

  Returns:
    By name: `u`, `v` (before and after each reset) and `spikes` [T, ...],
    `mean`, `std`, `theta`, `signal` and `width` [T].
  """
  tape = []
  for t, x_t in enumerate(x):
    u = settings.decay * v + x_t  # [eq 2]
    mean = np.mean(u)
    std = np.sqrt(np.sum((u - mean) ** 2) / (u.size - 1))
    theta, signal = _threshold_and_signal(settings, mean, std)  # [eq 5]
    if running is not None:
      theta = running.get('theta', [theta] * len(x))[t]
      signal = running.get('signal', [signal] * len(x))[t]
    width = _width(settings, signal, t)  # [eq 7]
    spikes = np.where(u >= theta, 1.0, 0.0)  # [eq 3]
    v = u * (1 - spikes) if settings.reset == 'hard' else u - theta * spikes
    tape.append(
      dict(
        u=u, v=v, spikes=spikes, mean=mean, std=std,
        theta=theta, signal=signal, width=width,
      )
    )  # fmt: skip
  return {name: np.array([step[name] for step in tape]) for name in tape[0]}


def backward(settings, tape, v, g_spikes, g_v):
  """The gradient.

  Args:
    settings: `Settings`.
    tape: what `forward` returned.
    v: membrane before the first timestep, as given to `forward`.
    g_spikes: cotangent of the spikes, [T, ...].
    g_v: cotangent of the membrane after the last reset.

  Returns:
    Gradients by name: `x` [T, ...], `v` (the first), `decay`, `v_th` (nonzero
    for the learnable threshold only).
  """
  before = np.concatenate([np.broadcast_to(v, g_spikes[:1].shape), tape['v']])
  g_x = np.zeros_like(g_spikes)
  g_decay = g_theta = 0.0
  for t in reversed(range(len(g_spikes))):
    u, s, theta, width = (tape[k][t] for k in ('u', 'spikes', 'theta', 'width'))
    g = DENSITIES[settings.surrogate]((u - theta) / width) / width  # [eq 4]
    hard = settings.reset == 'hard'
    reset = 0.0 if settings.detach_reset else -g_v * (u if hard else theta)
    leak = g_v * (1 - s) if hard else g_v
    into_spikes = g_spikes[t] + reset
    g_x[t] = into_spikes * g + leak
    g_theta -= np.sum(into_spikes * g) + (0 if hard else np.sum(g_v * s))
    g_decay += np.sum(g_x[t] * before[t])
    g_v = settings.decay * g_x[t]
  learns = settings.method == 'learnable_threshold'
  return {'x': g_x, 'v': g_v, 'decay': g_decay, 'v_th': g_theta * learns}


def _threshold_and_signal(settings, mean, std):
  estimated = np.sqrt(1 + settings.decay**2) * settings.v_th
  distribution = {'true': mean + std, 'estimated': estimated}
  adaptive = settings.f_c * distribution[settings.threshold]
  signal = {'theta': adaptive, 'sigma': std}[settings.width_signal]
  return adaptive if 'at' in settings.method else settings.v_th, signal


def _width(settings, signal, t):
  if 'tgo' in settings.method:
    return settings.width * (1 + np.tanh(signal - settings.v_th))
  if settings.method == 'mpd_agl':
    spread = 1 if t == 0 else np.sqrt(1 + settings.decay**2)
    return 2 * spread * np.mean(settings.tdbn_scale) * settings.v_th
  return settings.width
