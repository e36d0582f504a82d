"""Turns a state dict of the authors' ResNet-19 into a checkpoint, and back.

  python -m train.convert --workdir=runs/theirs --from_torch=theirs.pt
      --config=configs/cifar10_resnet19.py
  python -m train.evaluate --workdir=runs/theirs

  python -m train.convert --workdir=runs/ours --to_torch=ours.pt

A state dict is a `.npz` file of arrays under PyTorch's names, or a `.pt` file
as `torch.save(network.state_dict(), path)` writes it, which needs PyTorch. It
may lie in a checkpoint, and come from `DataParallel` or `torch.compile`, as
`dsatgo_jax.convert.unwrap` says.

The config tells the data and the method. Planes, stages, head, PLIF or LIF, and
T where the state dict has running thresholds, are those of the state dict. The
authors' has none: `train.main` has to measure them before `train.evaluate`
means anything. The numbers are kept as they are, and come back the same;
`train.main` can train on from them. PyTorch loads what comes back by
`network.load_state_dict(torch.load(path), strict=False)`: its network knows no
running thresholds, and its batch counters, which do nothing, are not kept.
"""

import importlib
import os
import pathlib
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from dsatgo_jax import convert
from dsatgo_jax.models import ResNet19
from train import checkpoints, command, data, lock, settings
from train import step as step_lib
from train.datasets import archive

FROM_TORCH = flags.DEFINE_string(
  'from_torch', None, 'The state dict that becomes a checkpoint in --workdir.'
)
TO_TORCH = flags.DEFINE_string(
  'to_torch', None, 'The state dict to be written of the latest checkpoint.'
)
flags.declare_key_flag('workdir')
flags.declare_key_flag('config')


def from_torch(path, config, workdir):
  """Saves a checkpoint of a state dict, as step 0 of a run.

  Args:
    path: of the state dict.
    config: of the data and the method; the network's settings are set in it.
    workdir: of the run; a new one.

  Raises:
    ValueError: the file is not a state dict of a ResNet-19 for these data, or
      there is a run in the workdir, or it cannot be written.
  """
  settings.check(config)
  with lock.hold(workdir):
    if checkpoints.directory(workdir, 'latest').exists():
      raise ValueError(
        f'expected a new workdir, got {workdir} with a run in it'
      )
    state, facts = converted(path, config)
    info = {'step': 0, 'config': config.to_dict(), 'data': facts}
    with checkpoints.manager(workdir, 'latest') as manager:
      checkpoints.save(manager, state, info | {'best': None, 'totals': {}})


def converted(path, config):
  """Returns the first state of a run with a state dict's numbers, and `facts`.

  Sets the network's settings in `config`.
  """
  state_dict = read(path)
  found = convert.settings(state_dict)
  given = config.model_args if config.model == ResNet19.__name__ else {}
  config.model = ResNet19.__name__
  config.num_steps = found.pop('num_steps', config.num_steps)
  config.neuron.learn_decay = found.pop('learn_decay')
  del found['num_classes']  # The data's, or it is an error.
  config.model_args = {
    **given,
    **{
      name: value
      for name, value in found.items()
      if name in given or value != getattr(ResNet19, name)
    },
  }
  facts = data.describe(data.load(config))

  def create():  # The state is the same for any number of steps.
    return step_lib.create_train_step(config, facts, steps_per_epoch=1)[0]

  # The file tells the network's size: whether all of it is there is seen before
  # there is memory taken for it. These take none.
  blank = jax.tree.map(
    lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape),
    step_lib.variables(jax.eval_shape(create)),
  )
  convert.from_torch(state_dict, blank)
  state = create()
  # In float64 where theirs is, so that the way back is exact.
  dtype = np.promote_types(np.float32, state_dict['fc.2.layer.weight'].dtype)
  template = jax.tree.map(
    lambda a: np.asarray(a, dtype), step_lib.variables(state)
  )
  state = state.replace(**convert.from_torch(state_dict, template))
  if missing := convert.to_torch(template).keys() - state_dict.keys():
    kinds = sorted({name.split('.')[-1] for name in missing})
    logging.warning(
      '%s has no %s: inference starts from v_th = %g, far from where the '
      'trained network fires, and its logits are wrong. An epoch of train.main '
      'with the same config measures them; --config.learning_rate=1e-9, here '
      'and there, keeps the weights.',
      path,
      ' and no '.join(kinds),
      config.neuron.v_th,
    )
  return state, facts


def to_torch(path, workdir):
  """Writes the state dict of the latest checkpoint.

  Raises:
    ValueError: there is none, or it is of another network.
  """
  state, _ = checkpoints.expect(workdir)
  variables = {name: state[name] for name in ('params', 'batch_stats')}
  write(path, convert.to_torch(variables))


def read(path):
  """Returns the state dict in a file, as NumPy arrays, under plain names."""
  torch = library(path)
  try:
    if torch:
      check_stored(path)
      found = torch.load(path, map_location='cpu', weights_only=True)
    else:
      found = archive.read(path)
    if not isinstance(found, dict):
      raise TypeError(f'a {type(found).__name__}')
    found = convert.unwrap(found)
    if torch:
      check_sizes(path, found)
    return {name: array(value) for name, value in found.items()}
  except Exception as error:  # What they raise depends on what is wrong.
    reason = f'{type(error).__name__}: {error}'.splitlines()[0]
    if isinstance(error, pickle.UnpicklingError):
      reason = (
        'a pickle of more than tensors, such as a whole network: save '
        'network.state_dict() alone; or a damaged file'
      )
    raise ValueError(
      f'expected a state dict, tensors by name, in {path}, got {reason}'
    ) from error


def check_stored(path):
  """Raises a `ValueError` where a `.pt` file is larger once it is read.

  PyTorch writes zip files that are not compressed; before 1.6, no zip files.
  """
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as file:
      for member in file.infolist():
        if member.compress_type != zipfile.ZIP_STORED:
          raise ValueError('compressed tensors, which PyTorch never writes')


def check_sizes(path, tensors):
  """Raises a `ValueError` for a tensor that repeats what the file has once."""
  room = os.path.getsize(path)
  for name, tensor in tensors.items():
    if hasattr(tensor, 'detach'):
      size = tensor.numel() * tensor.element_size()
      if size > room:
        raise ValueError(
          f'{ascii(name)[:80]} of {size} bytes in a file of {room}'
        )


def array(value):
  """Returns a tensor or an array as a NumPy array; bfloat16 as float32."""
  if hasattr(value, 'detach'):
    value = value.detach()
    try:
      return value.numpy()
    except TypeError:  # NumPy has no such type.
      return value.float().numpy()
  value = np.asarray(value)
  # NumPy saves bfloat16 as two bytes of no type.
  return value.view(jnp.bfloat16) if value.dtype == 'V2' else value


def write(path, state_dict):
  """Writes a state dict of NumPy arrays into a file, bfloat16 as float32."""
  torch = library(path)
  state_dict = {
    name: a.astype(np.float32) if a.dtype == jnp.bfloat16 else a
    for name, a in state_dict.items()
  }
  try:
    if torch:
      tensors = {name: torch.tensor(a) for name, a in state_dict.items()}
      torch.save(tensors, path)
    else:
      np.savez(path, **state_dict)
  except (OSError, RuntimeError) as error:
    raise ValueError(f'expected to write {path}, got {error}') from error


def library(path):
  """PyTorch for a `.pt` file, None for a `.npz` file."""
  suffix = pathlib.Path(path).suffix
  if suffix == '.npz':
    return None
  if suffix not in ('.pt', '.pth'):
    raise ValueError(f'expected a .npz or .pt file, got {path}')
  try:
    return importlib.import_module('torch')
  except ImportError as error:
    raise ValueError(
      f'expected PyTorch, to read or write {path}, got none: install torch, or '
      'take a .npz file: numpy.savez(path, **{name: tensor.float().numpy() for '
      'name, tensor in network.state_dict().items()})'
    ) from error


def main():
  """Converts, one way or the other."""
  workdir = command.WORKDIR.value
  if bool(FROM_TORCH.value) == bool(TO_TORCH.value):
    raise ValueError('expected --from_torch or --to_torch, and not both')
  if TO_TORCH.value:
    to_torch(TO_TORCH.value, workdir)
    print(f'{TO_TORCH.value}: the latest checkpoint of {workdir}')
    return
  if command.CONFIG.value is None:
    raise ValueError('expected --config, for the data and the method')
  config = ConfigDict(command.CONFIG.value.to_dict())
  from_torch(FROM_TORCH.value, config, workdir)
  print(f'{workdir}: {FROM_TORCH.value}, to be read by train.evaluate')


if __name__ == '__main__':
  command.run(main, 'workdir')
