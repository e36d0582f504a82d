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
  """A launch: what it is, and the bytes it reads and writes."""

  kind: str
  bytes: float
  times: int


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


def kernels(text):
  """Every `Kernel` that a compiled program launches.

  Args:
    text: optimised HLO of a GPU.
  """
  computations, entry = parse(text)
  found = []

  def visit(name, times):
    computation = computations[name]
    for i in computation.values():
      if i.op in FREE or i.op.endswith('-done'):
        continue
      called = re.findall(
        r'(?:to_apply|calls|body|condition|true_computation|'
        r'false_computation)=%?([\w.-]+)',
        i.attributes,
      )
      branches = re.search(r'branch_computations=\{(.*?)\}', i.attributes)
      if i.op == 'fusion':
        size = moved(computations[called[0]])
        found.append(Kernel('fusion', size, times))
      elif i.op in ('while', 'call', 'conditional', 'async-start'):
        trips = re.search(r'known_trip_count":\{"n":"(\d+)"', i.attributes)
        if branches:
          called += re.findall(r'%([\w.-]+)', branches[1])
        for each in called:
          visit(each, times * int(trips[1]) if trips else times)
      else:
        of = [computation[o] for o in i.operands if o in computation]
        shapes = [shape for each in [i, *of] for shape in each.shapes]
        sizes = sorted(_bytes(shape, _size(shape)) for shape in shapes)
        if part := re.search(r'_(\d+)_of_(\d+)/pallas_call', i.attributes):
          sizes[-1] *= int(part[1]) / int(part[2])
        size, kind = sum(sizes), i.op
        if i.op == 'custom-call':
          kind = 'triton' if 'triton' in i.attributes else 'library'
        found.append(Kernel(kind, size, times))

  visit(entry, 1)
  return found


def summary(text):
  """Kernels, MiB that those of our own move, and collectives, by name."""
  found = kernels(text)
  collectives = collections.Counter()
  for kernel in found:
    if re.match(COLLECTIVE, kernel.kind):
      collectives[kernel.kind.removesuffix('-start')] += kernel.times
  own = (k.bytes * k.times for k in found if k.kind != 'library')
  return {
    'kernels': sum(k.times for k in found),
    'MiB moved': sum(own) / 2**20,
  } | dict(collectives)
