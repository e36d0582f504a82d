"""What GPUs would do: a training step, compiled for cards that are not there.

  pip install -e '.[train,plan-gpu]'
  python -m benchmarks.gpu [--cards h100,rtx4090] [--dtypes bfloat16,float32] \
      [--networks ResNet-19,...] [--ways 1,4-jit,...] \
      [--neurons spiking,pallas,packed,layer,pallas+packed,pallas+layer] \
      [--sources] [--peak] [--json FILE]
  python -m benchmarks.gpu --check benchmarks/gpu.json

Neither a driver nor CUDA is needed. Loss and gradients of each network beside
its twin with ReLU in the place of the neurons, as it is and with
`kernel='pallas'`, `pack=True` ('packed') and `remat='layer'` ('layer'), or two:
kernels, MiB moved by those that are no library's, temporary MiB (without
cuDNN's own) and collectives, a device; on one device, and on four under
`jax.jit` with a sharded batch, `pmap` and `shard_map`. Nothing runs, so no time
is measured. `--sources` tells under each row where its kernels come from,
`--peak` which arrays there are when memory is at its largest.

`--check` measures what is in a file again, and fails where a figure has grown
by more than a tenth. Where Triton works but on a GPU, it leaves out 'pallas'.
"""

import argparse
import functools
import itertools
import json
import math
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import train_step
from dsatgo_jax import models, surrogate
from train import cards, hlo

# Class, settings, the batch's axis, and the input of one device.
NETWORKS = {
  'ResNet-19': (models.ResNet19, {'num_steps': 2}, 0, (25, 32, 32, 3)),
  'VGGSNN': (models.VGGSNN, {}, 1, (10, 4, 48, 48, 2)),
  'SEW-ResNet-18': (models.SEWResNet18, {}, 0, (8, 224, 224, 3)),
  'ConvNet': (models.ConvNet, {'num_steps': 4}, 0, (16, 8, 8, 1)),
}
NEURONS = {
  'spiking': {},
  'pallas': {'kernel': 'pallas'},
  'packed': {'pack': True},
  'layer': {'remat': 'layer'},
  'pallas+packed': {'kernel': 'pallas', 'pack': True},
  'pallas+layer': {'kernel': 'pallas', 'remat': 'layer'},
}
COLUMNS = ('card', 'dtype', 'network', 'devices', 'neurons')
NUMBERS = ('kernels', 'MiB moved', 'MiB temporary')
# What makes no array of its own.
PASS = 'bitcast', 'get-tuple-element', 'optimization-barrier', 'tuple'
MOST = 25  # Arrays that `--peak` prints.
GROWTH = 1.1  # What `--check` lets pass.


def with_jit(network, arguments, axis, devices):
  """The step with a sharded batch, lowered."""
  mesh = Mesh(np.array(devices), ('batch',))

  def on(tree, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.tree.map(lambda a: a.update(sharding=sharding), tree)

  variables, x, labels = arguments
  arguments = (
    on(variables),
    on(x, *[None] * axis, 'batch'),
    on(labels, 'batch'),
  )
  step = train_step.loss_and_gradients(network)
  return jax.jit(step, out_shardings=NamedSharding(mesh, P())).lower(*arguments)


def with_pmap(network, arguments, axis, devices):
  """The same under `pmap`."""
  network = network.clone(axis_name='batch')

  def step(*arguments):
    (loss, updates), gradients = train_step.loss_and_gradients(network)(
      *arguments
    )
    loss, gradients = jax.lax.pmean((loss, gradients), 'batch')
    return (loss, updates), gradients

  def split(a, axis):
    lead, rest = a.shape[:axis], a.shape[axis + 1 :]
    each = a.shape[axis] // len(devices)
    return a.update(shape=(*lead, len(devices), each, *rest))

  variables, x, labels = arguments
  return jax.pmap(
    step,
    axis_name='batch',
    in_axes=(None, axis, 0),
    out_axes=None,
    devices=devices,
  ).lower(variables, split(x, axis), split(labels, 0))


def with_shard_map(network, arguments, axis, devices):
  """The same under `shard_map`, which sums the gradients by itself."""
  mesh = Mesh(np.array(devices), ('batch',))
  step = train_step.loss_and_gradients(
    network.clone(axis_name='batch'),
    functools.partial(jax.lax.pmean, axis_name='batch'),
  )
  specs = P(), P(*[None] * axis, 'batch'), P('batch')
  step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P())
  arguments = [
    jax.tree.map(lambda a: a.update(sharding=NamedSharding(mesh, spec)), tree)  # noqa: B023
    for spec, tree in zip(specs, arguments, strict=True)
  ]
  return jax.jit(step).lower(*arguments)


WAYS = {
  '1': with_jit,
  '4-jit': with_jit,
  '4-pmap': with_pmap,
  '4-shard_map': with_shard_map,
}


def compiled(card, dtype, name, way, neurons):
  """Returns the program of a row of the table."""
  kind, settings, axis, shape = NETWORKS[name]
  kind = train_step.relu_twin(kind) if neurons == 'ReLU' else kind
  settings = settings | NEURONS.get(neurons, {})
  network = kind(dtype=jnp.dtype(dtype), **settings)
  devices = cards.devices(card, int(way[0]))
  shape = list(shape)
  shape[axis] *= len(devices)
  x = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
  labels = jax.ShapeDtypeStruct((shape[axis],), jnp.int32)
  variables = jax.eval_shape(network.init, jax.random.key(0), x)
  arguments = variables, x, labels
  return WAYS[way](network, arguments, axis, devices).compile()


def numbers(program):
  """Returns those of a row of the table."""
  told = hlo.summary(program.as_text())
  return {
    'kernels': told['kernels'],
    'MiB moved': told['moved_bytes'] / 2**20,
    'MiB temporary': program.memory_analysis().temp_size_in_bytes / 2**20,
    **told['collectives'],
  }


def peak(text):
  """What is alive where a program's temporary arrays come to most.

  Where a kernel writes over what it reads is not known: it may come to less.

  Args:
    text: optimised HLO, scheduled.

  Returns:
    JAX's name of what runs then, and of each array its bytes, dtype, shape and
    JAX's name of what made it, the largest first.
  """
  computations, entry = hlo.parse(text)
  order = list(computations[entry].values())
  holds, made, last = {}, [], {}
  for now, i in enumerate(order):
    operands = [holds.get(name, []) for name in i.operands]
    read = list(itertools.chain(*operands))
    if i.op == 'get-tuple-element':
      index = int(re.search(r'index=(\d+)', i.attributes)[1])
      read = read[index : index + 1]
    if i.op in PASS:
      holds[i.name] = read
    else:
      number = len(made)
      made += [(now, shape) for shape in i.shapes]
      holds[i.name] = list(range(number, len(made)))
    last |= dict.fromkeys(read + holds[i.name], now)
  returned = holds[next(i.name for i in order if i.root)]
  live = [[] for _ in order]
  for number in set(last) - set(returned):
    first, (dtype, sizes) = made[number]
    if order[first].op in hlo.FREE:
      continue
    bits = hlo.BITS.get(dtype) or int(re.findall(r'\d+', dtype + ' 0')[0])
    found = bits * math.prod(sizes) // 8, f'{dtype}{list(sizes)}', order[first]
    for now in range(first, last[number] + 1):
      live[now].append(found)
  now = max(range(len(order)), key=lambda now: sum(a[0] for a in live[now]))

  def name(i):
    found = re.search(r'op_name="([^"]*)"', i.attributes)
    return found[1] if found else i.name

  arrays = sorted(live[now], key=lambda a: -a[0])
  return name(order[now]), [(*rest, name(i)) for *rest, i in arrays]


def table(cases, with_sources=False, with_peak=False):
  """Prints the table, and returns its rows; a twin comes before its network."""
  print('| ' + ' | '.join([*COLUMNS, *NUMBERS, 'collectives']) + ' |')
  print('| --- ' * (len(COLUMNS) + len(NUMBERS) + 1) + '|')
  rows, twin = [], {}
  for case in cases:
    program = compiled(*case)
    row = numbers(program)
    twin = row if case[-1] == 'ReLU' else twin
    cells = [
      f'{row[n]:.0f}' + f' ({row[n] / twin[n]:.2f})' * (row is not twin)
      for n in NUMBERS
    ]
    sent = (f'{row[n]} {n}' for n in row if n not in NUMBERS)
    cells = [*map(str, case), *cells, ', '.join(sent)]
    print('| ' + ' | '.join(cells) + ' |', flush=True)
    if with_sources:
      found = sorted(hlo.sources(program.as_text()).items())
      for key, (launched, size) in found:
        print(f'  {" ".join(key):30}{launched:6}{size / 2**20:9.1f} MiB')
    if with_peak:
      at, arrays = peak(program.as_text())
      print(f'  {sum(a[0] for a in arrays) / 2**20:.1f} MiB at {at}')
      for size, *rest in arrays[:MOST]:
        print(f'  {size / 2**20:9.1f} MiB', *rest)
    rows.append(dict(zip(COLUMNS, case, strict=True)) | row)
  return rows


def grown(rows, kept):
  """Returns a line for every number that is larger than it should be."""
  return [
    f'{", ".join(str(row[c]) for c in COLUMNS)}: {name} {row[name]:.6g}, '
    f'kept {old.get(name, 0):.6g}'
    for row, old in zip(rows, kept, strict=True)
    for name in row
    if name not in COLUMNS and row[name] > GROWTH * old.get(name, 0)
  ]


def triton_refusal():
  """Why no kernel of our own can be compiled here; None if they can be."""
  try:
    from dsatgo_jax import kernels
  except ImportError as error:
    return error
  return kernels.refusal_of(surrogate.rectangular)


def main():
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  choices = {
    'cards': ['h100', 'rtx4090'],
    'dtypes': ['bfloat16', 'float32'],
    'networks': list(NETWORKS),
    'ways': list(WAYS),
    'neurons': list(NEURONS),
  }
  for name, known in choices.items():
    parser.add_argument(
      f'--{name}',
      default=['spiking'] if name == 'neurons' else known,
      type=lambda text: text.split(','),
      help='of ' + ','.join(known),
    )
  parser.add_argument(
    '--sources', action='store_true', help='where kernels come from'
  )
  parser.add_argument(
    '--peak', action='store_true', help='what is in memory at its largest'
  )
  parser.add_argument('--json', metavar='FILE', help='write every number there')
  parser.add_argument(
    '--check', metavar='FILE', help='compare with those that --json wrote'
  )
  arguments = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  if arguments.check:
    kept = json.loads(pathlib.Path(arguments.check).read_text())
    if refusal := triton_refusal():
      rest = [row for row in kept['rows'] if row['neurons'] != 'pallas']
      left_out = len(kept['rows']) - len(rest)
      print(f"left out {left_out} rows of kernel='pallas': {refusal}")
      kept['rows'] = rest
    cases = [tuple(row[c] for c in COLUMNS) for row in kept['rows']]
  else:
    arguments.neurons.insert(0, 'ReLU')
    cases = itertools.product(*(getattr(arguments, name) for name in choices))
  rows = table(cases, arguments.sources, arguments.peak)
  if arguments.json:
    found = {'jax': jax.__version__, 'rows': rows}
    text = json.dumps(found, indent=1) + '\n'
    pathlib.Path(arguments.json).write_text(text)
  elif arguments.check and (lines := grown(rows, kept['rows'])):
    sys.exit(
      '\n'.join(lines)
      + f'\nGrown by more than a tenth; kept with jax {kept["jax"]}, this is '
      f'{jax.__version__}. If it is meant, this writes the new figures:\n'
      f'  python -m benchmarks.gpu --check {arguments.check} '
      f'--json {arguments.check}'
    )


if __name__ == '__main__':
  main()
