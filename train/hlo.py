"""What a compiled program does, read off its HLO text."""

import collections
import math
import re
from typing import NamedTuple

BITS = {'pred': 8, 's4': 4, 'u4': 4}
# What launches no kernel.
FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast',
  'after-all', 'partition-id', 'replica-id', 'optimization-barrier',
}  # fmt: skip
# What runs other computations.
CALLS = {'while', 'call', 'conditional', 'async-start'}
COLLECTIVE = 'all-|reduce-scatter|collective-permute'


class Instruction(NamedTuple):
  """A line of HLO; `shapes` are (dtype, dimensions)."""

  name: str
  shapes: list
  op: str
  operands: list
  attributes: str
  root: bool
  arguments: str


class Kernel(NamedTuple):
  """A launch: what it is, the bytes it reads and writes, and JAX's name."""

  kind: str
  bytes: float
  times: int
  source: str = ''


def parse(text):
  """Returns the computations, `{name: {name: Instruction}}`, and the entry."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    head = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{\s*$', line)
    if head and ' = ' not in line:
      current = computations[head[2]] = {}
      entry = head[2] if head[1] else entry
    elif current is not None and ' = ' in line:
      instruction = _instruction(line)
      current[instruction.name] = instruction
  return computations, entry


def _instruction(line):
  name, _, rest = line.strip().partition(' = ')
  shape, rest = _until_closed(rest) if rest[0] == '(' else rest.split(' ', 1)
  op, _, rest = rest.strip().partition('(')
  arguments, attributes = _until_closed('(' + rest)
  return Instruction(
    name.split('%')[-1].split(' ')[-1],
    [
      (dtype, tuple(map(int, filter(None, sizes.split(',')))))
      for dtype, sizes in re.findall(r'(\w+)\[([\d,]*)\]', shape)
    ],
    op,
    re.findall(r'%([\w.-]+)', arguments),
    attributes,
    name.startswith('ROOT'),
    arguments.strip('()'),
  )


def _until_closed(text):
  """Splits behind the parenthesis that closes the first one."""
  depth = 0
  for i, character in enumerate(text):
    depth += (character == '(') - (character == ')')
    if not depth:
      return text[: i + 1], text[i + 1 :]
  raise ValueError(f'Expected a closing parenthesis in {text!r}.')


def _size(shape):
  return math.prod(shape[1])


def _bytes(shape, size):
  dtype = shape[0]
  digits = re.search(r'\d+', dtype)
  return size * BITS.get(dtype, int(digits[0]) if digits else 0) / 8


def _all_bytes(instruction):
  """The bytes of all that an instruction makes."""
  return sum(_bytes(shape, _size(shape)) for shape in instruction.shapes)


def moved(computation):
  """Bytes that a fused computation reads of each parameter, and writes.

  Of an array only what is sliced out of it is read, each slice once.
  """
  # For each instruction, by the slices taken of it, how many entries are read.
  read = {name: collections.Counter() for name in computation}

  def demand(name, wanted):
    if name in computation:
      read[name] |= collections.Counter(wanted)

  def total(i):
    return min(sum(read[i.name].values()), _size(i.shapes[0]))

  instructions = list(computation.values())
  root = next(i for i in instructions if i.root)
  roots = root.operands if root.op == 'tuple' else [root.name]
  written, in_place = 0, set()
  for name in roots:
    i = computation[name]
    while i.op == 'bitcast':
      in_place.add(i.name)
      i = computation[i.operands[0]]
    if i.op == 'dynamic-update-slice':
      in_place.add(i.name)
      i = computation[i.operands[1]]
    else:
      in_place.discard(name)
      i = computation[name]
    size = _size(i.shapes[0])
    written += _bytes(i.shapes[0], size)
    demand(i.name, {(): size})
  for i in reversed(instructions):
    if i.op in ('parameter', 'constant', 'tuple') or i.name in in_place:
      continue
    share = total(i) / max(1, _size(i.shapes[0]))
    for k, operand in enumerate(i.operands):
      if operand not in computation:
        continue
      size = _size(computation[operand].shapes[0])
      if i.op in ('slice', 'dynamic-slice') and k == 0:
        spec = re.search(r'slice=\{.*?\}', i.attributes)
        spec = spec[0] if spec else i.name
        wanted = {(spec, *key): n for key, n in read[i.name].items()}
      elif i.op == 'reduce' or i.op == 'concatenate':
        wanted = {(): math.ceil(size * share)}
      elif size == _size(i.shapes[0]):
        wanted = read[i.name]
      else:
        wanted = {(): min(size, math.ceil(total(i)))}
      demand(operand, wanted)
  reads = sum(
    _bytes(i.shapes[0], total(i))
    for i in instructions
    if i.op == 'parameter' and i.shapes
  )
  return reads + written


def running(computations, entry):
  """Yields what runs, in order: `(instruction, its computation, times)`.

  What is in a fused computation is not told, what is in a loop's body is.
  """

  def visit(name, times):
    for i in computations[name].values():
      if i.op in CALLS:
        trips = re.search(r'known_trip_count":\{"n":"(\d+)"', i.attributes)
        for called in _called(i):
          yield from visit(called, times * int(trips[1]) if trips else times)
      elif i.op not in FREE:
        yield i, computations[name], times

  return visit(entry, 1)


def _called(instruction):
  """The names of the computations that an instruction runs."""
  branches = re.search(r'branch_computations=\{(.*?)\}', instruction.attributes)
  return re.findall(
    r'(?:to_apply|calls|body|condition|true_computation|'
    r'false_computation)=%?([\w.-]+)',
    instruction.attributes,
  ) + re.findall(r'%([\w.-]+)', branches[1] if branches else '')


def kernels(text):
  """Every `Kernel` that a compiled program launches.

  Args:
    text: optimised HLO of a GPU.
  """
  computations, entry = parse(text)

  def kernel(i, within, times):
    source = re.search(r'op_name="([^"]*)"', i.attributes)
    source = source[1] if source else ''
    if i.op == 'fusion':
      return Kernel(i.op, moved(computations[_called(i)[0]]), times, source)
    operands = [within[name] for name in i.operands if name in within]
    sizes = [
      _bytes(shape, _size(shape)) for j in [i, *operands] for shape in j.shapes
    ]
    # Triton's kernels have names of their own, within.
    if name := re.search(r'\bname = "(\w+)"', i.attributes):
      source += f'/{name[1]}/'
    # Of our own some read so many of an array's timesteps alone.
    if part := re.search(r'_(\d+)_of_(\d+)/$', source):
      sizes.sort()
      sizes[-1] *= int(part[1]) / int(part[2])
    kind = i.op
    if kind == 'custom-call':
      kind = 'triton' if 'triton' in i.attributes else 'library'
    return Kernel(kind, sum(sizes), times, source)

  return [
    kernel(*launch)
    for launch in running(computations, entry)
    if not launch[0].op.endswith('-done')
  ]


def collectives(text):
  """Every collective of a compiled program, as a `Kernel`.

  Its bytes are those that it brings to a device.

  Args:
    text: optimised HLO.
  """
  return [
    Kernel(i.op.removesuffix('-done'), _all_bytes(i), times)
    for i, _, times in running(*parse(text))
    if re.match(COLLECTIVE, i.op) and not i.op.endswith('-start')
  ]


def summary(text):
  """What a compiled program launches, moves and sends.

  Args:
    text: optimised HLO.

  Returns:
    The number of `kernels`; `moved_bytes`, by those that are no library's;
    `collectives`, `{name: number}`, and `collective_bytes`.
  """
  launched, sent = kernels(text), collectives(text)
  number = collections.Counter()
  for each in sent:
    number[each.kind] += each.times
  own = (each for each in launched if each.kind != 'library')
  return {
    'kernels': sum(each.times for each in launched),
    'moved_bytes': round(sum(each.bytes * each.times for each in own)),
    'collectives': dict(number),
    'collective_bytes': round(sum(each.bytes * each.times for each in sent)),
  }


def sources(text):
  """Where a program's kernels come from, but for a library's.

  Args:
    text: optimised HLO of a GPU.

  Returns:
    `{(pass, part): (kernels, bytes)}`: 'forward' or 'backward', and the name of
    a kernel of our own, the part of a layer, or 'between layers'; ('', '') is
    what JAX has no name for: most of it transposes gradients of weights.
  """
  found = collections.defaultdict(lambda: (0, 0.0))
  for each in kernels(text):
    if each.kind == 'library':
      continue
    backward = 'transpose(' in each.source
    parts = re.findall(
      r'/(neuron_[a-z]+|neuron|norm|layer)(?=[._/])', each.source
    )
    part = parts[-1] if parts else 'between layers'
    key = ('backward' if backward else 'forward', part)
    key = key if each.source else ('', '')
    number, size = found[key]
    found[key] = number + each.times, size + each.bytes * each.times
  return dict(found)
