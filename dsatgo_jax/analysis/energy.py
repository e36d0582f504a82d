"""Energy: the synaptic operations of a network, counted.

A spike costs an addition at every synapse that it reaches; a number that is no
spike costs a multiplication and an addition. A layer of weights then takes

    E = 0.9 pJ * accumulates              where its input is spikes
    E = 4.6 pJ * multiply-accumulates     where it is not

by the energies of 32-bit floating-point arithmetic in 45 nm: 0.9 pJ for an
addition, 3.7 pJ for a multiplication (Horowitz, "Computing's energy problem
(and what we can do about it)", ISSCC 2014, pages 10-14, figure 1.1.9). They are
arguments.

What is counted is every convolution and matrix product that the input takes
part in, wherever the model has it: in `jit`, `remat`, `scan`, `cond`, `while`
or custom derivatives. It is found in the traced program, so the model may be of
Linen, of NNX or a plain function, with neurons of this library or others.

- Connections are the true ones. A spike at the border of an image reaches fewer
  outputs, and one that a stride steps over none. Nothing is multiplied with
  padding, which published figures often count.
- Spikes are small whole numbers, of either sign. One of 2 or 3, as SEW-ADD
  makes them, is that many accumulates. A layer whose input is anything else in
  any call - images, pooled averages, membranes - multiplies, in all its calls
  and with zeros too.
- A product of two activations, as in attention, accumulates where either is
  spikes.
- Beside it stands the ReLU twin: the same layers with all connections
  multiplied, once and not at each of T timesteps.

Not counted, in the network and in its twin, are what a neuron does by itself
(leak, threshold and reset: a few operations per neuron and timestep, where
synapses are hundreds), biases, batch norm, which inference folds into the
weights, pooling, and sums of branches; nor is memory, which takes more than all
of it on most hardware.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dsatgo_jax.analysis.operations import count as count
from dsatgo_jax.analysis.synapses import Count as Count

ACCUMULATE = 0.9
MULTIPLY_ACCUMULATE = 4.6


class Layer(NamedTuple):
  """A layer of weights, per example.

  Attributes:
    kind: 'AC' for accumulates, 'MAC' for multiply-accumulates.
    rate: the share of its inputs that were not zero.
    operations: of that kind, over all timesteps.
    energy: pJ.
    relu_operations: multiply-accumulates of the ReLU twin.
    relu_energy: pJ.
  """

  kind: str
  rate: float
  operations: float
  energy: float
  relu_operations: float
  relu_energy: float


class Energy(NamedTuple):
  """A network, per example.

  Attributes:
    layers: `Layer`s by name, in the order in which they run.
    accumulates: of all layers.
    multiply_accumulates: of all layers.
    energy: pJ.
    relu_operations: multiply-accumulates of the ReLU twin.
    relu_energy: pJ.
  """

  layers: dict[str, Layer]
  accumulates: float
  multiply_accumulates: float
  energy: float
  relu_operations: float
  relu_energy: float


def measure(
  apply: Callable,
  variables: Any,
  *inputs: Any,
  num_steps: int,
  batch_axis: int = 0,
  **settings,
) -> Energy:
  """Runs a model on a batch, and counts; `count` and `total` in one call.

  Args:
    apply: the model, `apply(variables, *inputs)`, as it is run in inference.
    variables: its weights, any tree; or an NNX module.
    *inputs: a batch; further arguments.
    num_steps: T; see `total`.
    batch_axis: of the first input: 0 for images [B, ...], 1 for frames
      [T, B, ...].
    **settings: further arguments of `total`.

  Returns:
    `Energy`, per example.

  Raises:
    ValueError: what `count` and `total` raise.
  """
  counts = jax.jit(functools.partial(count, apply))(variables, *inputs)
  num_examples = jax.tree.leaves(inputs)[0].shape[batch_axis]
  return total(counts, num_examples, num_steps, **settings)


def total(
  counts: list[Count],
  num_examples: int,
  num_steps: int,
  *,
  accumulate: float = ACCUMULATE,
  multiply_accumulate: float = MULTIPLY_ACCUMULATE,
) -> Energy:
  """Adds up what `count` counted; exactly, in integers.

  Args:
    counts: of one batch, or the sum over several.
    num_examples: how many they were made of.
    num_steps: T. Where a layer took T examples, or a multiple, for each one of
      these, its ReLU twin runs once where it ran T times. A layer that took one
      - an image, before it is repeated in time - is the same in both. 1 for a
      twin that sees every frame of a recording.
    accumulate: pJ.
    multiply_accumulate: pJ.

  Returns:
    `Energy`, per example.

  Raises:
    ValueError: a number is not positive.
  """
  if num_examples < 1 or num_steps < 1:
    raise ValueError(
      'Expected num_examples >= 1 and num_steps >= 1, got '
      f'{num_examples=}, {num_steps=}.'
    )
  by_name: dict[str, list[Count]] = {}
  for part in jax.device_get(counts):
    by_name.setdefault(part.name, []).append(part)
  layers = {}
  for name, parts in by_name.items():
    calls = [int(part.calls) for part in parts]
    if not any(calls):
      continue
    inputs, examples, connections = (
      sum(
        n * getattr(part, field) for n, part in zip(calls, parts, strict=True)
      )
      for field in ('inputs', 'examples', 'connections')
    )
    active = sum(int(np.sum(part.active, dtype=np.int64)) for part in parts)
    multiplies = any(int(part.multiplied) for part in parts)
    operations = connections if multiplies else sum(map(_reached, parts))
    repeats = 1 if examples % (num_examples * num_steps) else num_steps
    cost = multiply_accumulate if multiplies else accumulate
    twin = connections / repeats / num_examples
    layers[name] = Layer(
      'MAC' if multiplies else 'AC',
      active / inputs,
      operations / num_examples,
      cost * operations / num_examples,
      twin,
      multiply_accumulate * twin,
    )
  rows = layers.values()
  return Energy(
    layers,
    math.fsum(row.operations for row in rows if row.kind == 'AC'),
    math.fsum(row.operations for row in rows if row.kind == 'MAC'),
    math.fsum(row.energy for row in rows),
    math.fsum(row.relu_operations for row in rows),
    math.fsum(row.relu_energy for row in rows),
  )


def _reached(part):
  """The synapses that spikes reached, each as often as they did."""
  spikes = np.asarray(part.spikes).astype(object)  # Integers of any size.
  for axis, reach in enumerate(part.reach):
    shape = [-1 if i == axis else 1 for i in range(spikes.ndim)]
    spikes = spikes * np.array(reach, object).reshape(shape)
  return part.fan_out * int(np.sum(spikes))
