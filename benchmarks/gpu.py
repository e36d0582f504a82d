"""What GPUs would do: a training step, compiled for cards that are not there.

  pip install --no-deps jax-cuda13-plugin==JAX jax-cuda13-pjrt==JAX
  python -m benchmarks.gpu [--cards h100,rtx4090] [--dtypes bfloat16,float32] \
      [--networks ResNet-19,...] [--json FILE]

JAX is jax's own version; neither a driver nor CUDA is needed. Loss and
gradients of each network, its neurons left to XLA and as our own kernels
(`kernel`), beside its twin with ReLU in their place: kernels, MiB moved by what
is no library, temporary MiB (without cuDNN's own) and collectives, a
device; on one device, and under `jax.jit` with the batch sharded over four.
Nothing runs, so no time is measured.
"""

import argparse
import json
import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'  # Else the plugin wants a driver.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_gpu_autotune_level=0'
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import hlo, train_step
from dsatgo_jax import models

# Class, settings, the batch's axis, and the input of one device.
NETWORKS = {
  'ResNet-19': (models.ResNet19, {'num_steps': 2}, 0, (25, 32, 32, 3)),
  'VGGSNN': (models.VGGSNN, {}, 1, (10, 4, 48, 48, 2)),
  'SEW-ResNet-18': (models.SEWResNet18, {}, 0, (8, 224, 224, 3)),
}
NEURONS = {
  'ReLU': {},
  'spiking': {'kernel': 'xla'},
  'spiking, pallas': {'kernel': 'pallas'},
}
COLUMNS = ('card', 'dtype', 'network', 'devices', 'neurons')
NUMBERS = ('kernels', 'MiB moved', 'MiB temporary')


def mesh_of(card, num_devices):
  """Devices of a card that need not be there."""
  facts = pathlib.Path(__file__).with_name(f'{card}.txtpb').read_text()
  topology = topologies.get_topology_desc(
    platform='cuda', target_config=facts, topology=f'1x1x{num_devices}'
  )
  return Mesh(np.array(topology.devices), ('batch',))


def compiled(network, shape, axis, dtype, mesh):
  """The step, compiled for a mesh; the batch is sharded over it."""
  shape = list(shape)
  shape[axis] *= mesh.size
  x = jax.ShapeDtypeStruct(tuple(shape), dtype)
  labels = jax.ShapeDtypeStruct((shape[axis],), jnp.int32)
  variables = jax.eval_shape(network.init, jax.random.key(0), x)

  def on(tree, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.tree.map(lambda a: a.update(sharding=sharding), tree)

  arguments = (
    on(variables),
    on(x, *[None] * axis, 'batch'),
    on(labels, 'batch'),
  )
  step = jax.jit(
    train_step.loss_and_gradients(network),
    out_shardings=NamedSharding(mesh, P()),
  )
  return step.lower(*arguments).compile()


def measure(name, neurons, dtype, card, num_devices):
  """One row of the table."""
  kind, settings, axis, shape = NETWORKS[name]
  if neurons == 'ReLU':
    kind = train_step.relu_twin(kind)
  network = kind(dtype=jnp.dtype(dtype), **settings, **NEURONS[neurons])
  mesh = mesh_of(card, num_devices)
  program = compiled(network, shape, axis, jnp.dtype(dtype), mesh)
  temporary = program.memory_analysis().temp_size_in_bytes / 2**20
  return hlo.summary(program.as_text()) | {'MiB temporary': temporary}


def main():
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  for name, default in (
    ('cards', 'h100,rtx4090'),
    ('dtypes', 'bfloat16,float32'),
    ('networks', ','.join(NETWORKS)),
  ):
    parser.add_argument(f'--{name}', default=default, help=f'of {default}')
  parser.add_argument('--json', metavar='FILE', help='write every number there')
  arguments = parser.parse_args()
  rows = []
  print('| ' + ' | '.join([*COLUMNS, *NUMBERS, 'collectives']) + ' |')
  print('| --- ' * (len(COLUMNS) + len(NUMBERS) + 1) + '|')
  for card in arguments.cards.split(','):
    for dtype in arguments.dtypes.split(','):
      for name in arguments.networks.split(','):
        for num_devices in (1, 4):
          twin = None
          for neurons in NEURONS:
            row = measure(name, neurons, dtype, card, num_devices)
            twin = twin or row
            cells = [
              f'{row[n]:.0f}'
              + (f' ({row[n] / twin[n]:.2f})' * (row is not twin))
              for n in NUMBERS
            ]
            sent = {n: row[n] for n in row if n not in NUMBERS}
            cells.append(', '.join(f'{c} {n}' for n, c in sent.items()))
            of = card, dtype, name, num_devices, neurons
            print('| ' + ' | '.join(map(str, [*of, *cells])) + ' |', flush=True)
            rows.append(dict(zip(COLUMNS, of, strict=True)) | row)
  if arguments.json:
    pathlib.Path(arguments.json).write_text(json.dumps(rows, indent=1))


if __name__ == '__main__':
  main()
