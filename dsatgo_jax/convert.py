"""The authors' PyTorch ResNet-19: state dicts into our variables, and back.

A state dict is a dict of NumPy arrays under PyTorch's names:

    model = ResNet19(**convert.settings(state_dict), width_signal='sigma')
    variables = model.init(jax.random.key(0), images)
    variables = convert.from_torch(state_dict, variables)
    logits = model.apply(variables, images)

A state dict may lie in a checkpoint beside other things, and its names may have
what `DataParallel` and `torch.compile` put before them: see `unwrap`.

What their program keeps in no state dict has a name of our own:
`<neuron>.running_threshold` and, where the width follows another signal than
the threshold, `<neuron>.running_signal`, [T] each.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

# Our paths into their names, row after row.
_NAMES = (
  (r'^encode/neuron/', r'encode.1.neuron.'),
  (r'^encode/', r'encode.0.'),
  (r'^block(\d+)/spiking(\d)/neuron/', r'ResNetBlocks.\1.0.spike\2.neuron.'),
  (r'^block(\d+)/spiking(\d)/', r'ResNetBlocks.\1.0.conv\2.'),
  (r'^block(\d+)/downsample/', r'ResNetBlocks.\1.0.downsample.0.'),
  (r'downsample\.0\.neuron/', r'downsample.1.neuron.'),
  (r'^head/neuron/', r'fc.1.neuron.'),
  (r'^head/', r'fc.0.'),
  (r'^classifier/', r'fc.2.layer/'),
  (r'layer/kernel$', r'layer.weight'),
  (r'norm/scale$', r'bn.tdBN.weight'),
  (r'norm/bias$', r'bn.tdBN.bias'),
  (r'norm/mean$', r'bn.tdBN.running_mean'),
  (r'norm/var$', r'bn.tdBN.running_var'),
)
# Where their axes go, by rank: OIHW to HWIO, [out, in] to [in, out].
_AXES = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,), 0: ()}

_OPTIONAL = ('running_threshold', 'running_signal')
_IGNORED = ('num_batches_tracked', 'n_averaged')  # Counters.
# Where training programs keep a state dict, and what wrappers put into names.
_WHERE = ('state_dict', 'model_state_dict', 'model', 'net')
_WRAPPERS = ('module', '_orig_mod')


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
  """The state dict of a checkpoint, under the network's own names.

  Args:
    checkpoint: a state dict; or a dict that holds one as `'state_dict'`,
      `'model_state_dict'`, `'model'` or `'net'`. Its names may contain
      `module.` (DataParallel) and `_orig_mod.` (torch.compile).

  Returns:
    The values as they are, by names without those.

  Raises:
    ValueError: two entries would have one name.
  """
  while inner := [w for w in _WHERE if isinstance(checkpoint.get(w), Mapping)]:
    checkpoint = checkpoint[inner[0]]
  state_dict: dict[str, Any] = {}
  for name, value in checkpoint.items():
    plain = '.'.join(p for p in str(name).split('.') if p not in _WRAPPERS)
    if plain in state_dict:
      raise ValueError(f'Expected one {plain} in the state dict, got two.')
    state_dict[plain] = value
  return state_dict


def settings(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """The attributes of the `ResNet19` that a state dict belongs to.

  Args:
    state_dict: arrays under PyTorch's names, or what `unwrap` takes.

  Returns:
    `planes`, `stage_sizes`, `head_width`, `num_classes` and `learn_decay`; and
    `num_steps`, where running thresholds tell it.

  Raises:
    ValueError: a weight that tells one of them is missing or misshapen.
  """
  state_dict = unwrap(state_dict)

  def length(name, rank):
    shape = np.shape(state_dict[name]) if name in state_dict else ()
    if len(shape) != rank or 0 in shape:
      raise ValueError(
        f'Expected the state dict of a ResNet-19, with {name} of {rank} axes, '
        f'got {shape if name in state_dict else "nothing"}.'
      )
    return shape[0]

  def outputs(layer, rank):
    return length(f'{layer}.layer.weight', rank)

  found = (re.match(r'ResNetBlocks\.(\d+)\.', name) for name in state_dict)
  num_blocks = len({match[1] for match in found if match})
  # Each stage but the first begins with a block that changes the shape.
  starts = [
    i
    for i in range(num_blocks)
    if not i or f'ResNetBlocks.{i}.0.downsample.0.layer.weight' in state_dict
  ]
  attributes = {
    'planes': tuple(outputs(f'ResNetBlocks.{i}.0.conv1', 4) for i in starts),
    'stage_sizes': tuple(np.diff([*starts, num_blocks]).tolist()),
    'head_width': outputs('fc.0', 2),
    'num_classes': outputs('fc.2', 2),
    'learn_decay': 'encode.1.neuron.w' in state_dict,
  }
  running = 'encode.1.neuron.running_threshold'
  if running in state_dict:
    attributes['num_steps'] = length(running, 1)
  return attributes


def from_torch(state_dict: Mapping[str, Any], template: Any) -> dict[str, Any]:
  """Our variables of the authors' state dict.

  Args:
    state_dict: arrays under PyTorch's names, or what `unwrap` takes; counters
      are ignored. Running thresholds and running signals are optional, all of a
      kind; without them inference starts from `v_th`, which is far from what a
      trained network fires at.
    template: variables of the `ResNet19` to be filled, from its `init`. They
      say which names, shapes and dtypes are expected, and keep the running
      thresholds and signals that the state dict does not hold.

  Returns:
    `{'params', 'batch_stats'}` of NumPy arrays, in the template's dtypes.

  Raises:
    ValueError: it names every entry that is missing, extra or misshapen, or
      not of real numbers, or not finite.
  """
  expected = to_torch(template)
  given = {
    name: np.asarray(value)
    for name, value in unwrap(state_dict).items()
    if not name.endswith(_IGNORED)
  }
  kept = tuple(
    kind for kind in _OPTIONAL if not any(name.endswith(kind) for name in given)
  )
  problems = []
  for name in (expected | given).keys():
    want, got = (
      tree[name].shape if name in tree else 'nothing'
      for tree in (expected, given)
    )
    if want != got and not (got == 'nothing' and name.endswith(kept)):
      problems.append(f'{name}: expected {want}, got {got}')
  problems += [
    f'{name}: expected real numbers of up to 64 bits, got {array.dtype}'
    for name, array in given.items()
    if array.dtype.kind in 'cmMOSTU'
    or array.dtype.type is np.void  # Unlike bfloat16, of kind V too.
    or array.dtype.itemsize > 8
  ]
  if problems:
    raise ValueError(
      'The state dict does not fit the network:\n  ' + '\n  '.join(problems)
    )
  bad = [name for name, array in given.items() if not np.isfinite(array).all()]
  if bad:
    raise ValueError(
      f'Expected finite weights, got NaN or infinite values in {len(bad)} of '
      f'{len(given)} entries, the first of them {bad[0]}.'
    )
  filled = expected | given
  variables = {
    path: np.transpose(filled[_name(path)], _AXES[leaf.ndim]).astype(leaf.dtype)
    for path, leaf in traverse_util.flatten_dict(template).items()
  }
  return traverse_util.unflatten_dict(variables)


def to_torch(variables: Any) -> dict[str, np.ndarray]:
  """The authors' state dict of our variables; `from_torch` undoes it exactly.

  PyTorch loads it with `strict=False`: their modules know no running
  thresholds, and `num_batches_tracked` is not among our variables.

  Args:
    variables: of a `ResNet19`: `{'params', 'batch_stats'}`, or one of the two,
      or anything of their structure, such as gradients.

  Returns:
    NumPy arrays under PyTorch's names.

  Raises:
    ValueError: variables of another network.
  """
  return {
    _name(path): np.transpose(leaf, np.argsort(_AXES[leaf.ndim]))
    for path, leaf in traverse_util.flatten_dict(variables).items()
  }


def _name(path):
  """Their name of our path, which begins with the collection."""
  ours = name = '/'.join(path[1:])
  for pattern, replacement in _NAMES:
    name = re.sub(pattern, replacement, name)
  if '/' in name:
    raise ValueError(f'Expected variables of a ResNet19, got {ours!r}.')
  return name
