"""GPUs that a program can be compiled for where there are none.

Beside this lies what XLA knows of each card, a `GpuTargetConfigProto` as text;
that of the RTX 4090 is from its data sheet. Needs JAX's CUDA plugin, of the
extra `plan-gpu`; neither a driver nor CUDA's libraries.
"""

import pathlib
import re

import jax
from jax.experimental import topologies

_FACTS = {
  path.stem: path.read_text()
  for path in sorted(pathlib.Path(__file__).parent.glob('*.txtpb'))
}
NAMES = tuple(_FACTS)


def devices(card, num_devices=1):
  """Returns devices of a card, to compile for; nothing runs on them.

  JAX's platforms must be 'cpu': the plugin wants a driver otherwise.

  Args:
    card: one of `NAMES`.
    num_devices: how many, in one host.

  Raises:
    ValueError: there is no plugin of JAX's own version.
  """
  try:
    return topologies.get_topology_desc(
      platform='cuda',
      target_config=_FACTS[card],
      topology=f'1x1x{num_devices}',
    ).devices
  except NotImplementedError as error:
    raise ValueError(
      f"a GPU's compiler needs JAX's CUDA plugin of version {jax.__version__}:"
      " pip install -e '.[plan-gpu]'"
    ) from error


def memory(card):
  """Returns the bytes of a card's memory."""
  return int(re.search(r'device_memory_size: (\d+)', _FACTS[card])[1])
