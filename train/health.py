"""Says where an evaluation is not of what was learnt: dead layers, and lag.

In inference thresholds and tdBN's statistics are running averages. They start
from `v_th`, 0 and 1, are not corrected for that, and after n updates still hold
`momentum ** n` of it. Until that has faded layers get less than in training,
the deeper the less, and fall silent.
"""

import math

import numpy as np
from absl import logging

from dsatgo_jax import linen

# The share of the start in the running averages above which evaluation lags.
# After the first epoch of configs/digits.py, 20 steps, it is 12 %, and accuracy
# at chance; after the second, 1.5 %.
STALE = 0.05

# Kind, what is the same at all timesteps, what it means, what to do about it.
DEAD = (
  (
    'silent',
    lambda layer: max(layer['firing_rate']) <= 0,
    'no neuron fires, so that nothing of the input passes',
    'try a lower config.neuron.f_c (v_th where the threshold is fixed)',
  ),
  (
    'always',
    lambda layer: min(layer['firing_rate']) >= 1,
    'every neuron fires, so that nothing of the input passes',
    'try a higher config.neuron.f_c (v_th where the threshold is fixed)',
  ),
  (
    'window',
    lambda layer: max(layer['gradient_share']) <= 0,
    'no membrane is in the gradient window, so that no gradient passes by the '
    'running thresholds',
    'try a larger config.neuron.width, or a lower learning rate',
  ),
)


def warn(scores, step, momentum, warned):
  """Logs `complaints`, and a subject of `warned`, a set, no second time."""
  for subject, sentence in complaints(scores, step, momentum).items():
    if subject not in warned:
      logging.warning('step %d: %s', step, sentence)
      warned.add(subject)


def complaints(scores, step, momentum=None):
  """Says what an evaluation suffers from, in sentences.

  Args:
    scores: of `step.average`; its `layers` suffice.
    step: how many updates the running averages had; 0 for not known, as of a
      converted checkpoint.
    momentum: of the running thresholds, `config.neuron.momentum`; None for
      the neuron's default.

  Returns:
    `{subject: sentence}`, a subject being the same as long as what it is about
    is: whoever evaluates every epoch can say it once. Empty if all is well.
  """
  if not math.isfinite(scores.get('loss', 0)):
    return {
      'loss': f'the loss is {scores["loss"]}: the weights, the running '
      'averages or the data are not finite'
    }
  found = lag(step, momentum) if step else {}
  for kind, is_dead, meaning, advice in DEAD:
    layers = [name for name, told in scores['layers'].items() if is_dead(told)]
    if layers:
      names = ', '.join(layers)
      num_steps = len(scores['layers'][layers[0]]['firing_rate'])
      todo = 'more steps may mend it' if 'lag' in found else advice
      found[f'{kind}: {names}'] = (
        f'{names}: at {all_of(num_steps)}, on all examples, {meaning}; {todo}'
      )
  return found | one_answer(scores.get('confusion', [[]]))


def lag(step, momentum):
  """Says how much running averages hold of their start, if it is too much."""
  if momentum is None:
    momentum = linen.SpikingNeuron.momentum
  slowest = max(momentum, linen.TdBatchNorm.momentum)
  share = slowest**step
  if share <= STALE:
    return {}
  until = 'never'
  if slowest < 1:
    until = f'from step {math.ceil(math.log(STALE) / math.log(slowest))} on'
  advice = 'train for more steps'
  if momentum > linen.TdBatchNorm.momentum:
    advice += ', or with a lower config.neuron.momentum'
  return {
    'lag': f'after {step} steps the running thresholds and statistics still '
    f'hold {share:.0%} of what they started from (momentum {slowest:g}; less '
    f'than {STALE:.0%} {until}): evaluation lags behind training, and can be '
    f'at chance; {advice}'
  }


def one_answer(confusion):
  """Says so if examples of several classes are all taken for one class."""
  confusion = np.array(confusion)
  answers = np.flatnonzero(confusion.sum(0))
  if len(answers) != 1 or np.count_nonzero(confusion.sum(1)) < 2:
    return {}
  return {
    'one answer': f'all {confusion.sum()} examples are taken for class '
    f'{answers[0]}: the accuracy is the share of that class'
  }


def all_of(num_steps):
  """All timesteps, in words."""
  return 'its timestep' if num_steps == 1 else f'all {num_steps} timesteps'
