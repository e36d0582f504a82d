"""Finished runs: what they wrote, and their networks on a small batch."""

import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

import train
from dsatgo_jax.analysis import activity
from train import augment, checkpoints, criterion, data, metrics, settings
from train import step as step_lib


class Told(NamedTuple):
  """What a run wrote.

  Attributes:
    name: of its row in a figure.
    workdir: its folder.
    config: as in `config.json`.
    epochs: the lines of `metrics.jsonl` at the end of an epoch.
    result: as in `result.json`.
  """

  name: str
  workdir: pathlib.Path
  config: dict
  epochs: list
  result: dict


class Network(NamedTuple):
  """A trained network and examples of its test split.

  Attributes:
    name: of the run.
    layers: of neurons, from the input on.
    model: the Linen network.
    variables: params and batch_stats.
    config: of the run.
    images: as the network takes them, [B, H, W, C] or [T, B, H, W, C].
    labels: [B].
    raw: the images before they are normalised, [B, ...].
    loss: `loss(logits, labels)`, [B].
  """

  name: str
  layers: list
  model: Any
  variables: dict
  config: Any
  images: jax.Array
  labels: np.ndarray
  raw: np.ndarray
  loss: Any


def told(workdir, name=''):
  """Reads what a run wrote.

  Raises:
    ValueError: it is not finished.
  """
  workdir = pathlib.Path(workdir)
  result = metrics.read_json(workdir / 'result.json')
  config = metrics.read_json(workdir / 'config.json')
  epochs = [line for line in metrics.read(workdir) if 'layers' in line]
  if not (result and config and epochs):
    raise ValueError(
      f'expected a run with a result in {workdir}, got none: is it finished?'
    )
  return Told(name or config['method'], workdir, config, epochs, result)


def named(workdirs):
  """Reads runs, and names them by what tells them apart.

  By their methods, or the folders that `train.compare` gave them; where two
  are the same, by their own folders too.

  Raises:
    ValueError: one is not finished, or is named twice.
  """
  found = [told(workdir) for workdir in workdirs]
  names = [
    run.workdir.parent.name
    if re.fullmatch(r'seed_\d+', run.workdir.name)
    and run.workdir.parent.name.startswith(run.name)
    else run.name
    for run in found
  ]
  names = [
    name if names.count(name) == 1 else f'{name}, {run.workdir.name}'
    for name, run in zip(names, found, strict=True)
  ]
  if again := {name for name in names if names.count(name) > 1}:
    raise ValueError(
      f'expected runs in folders of different names, got {again.pop()} twice'
    )
  return [
    run._replace(name=name) for run, name in zip(found, names, strict=True)
  ]


def spread(source, size):
  """Examples that are spread over a split, which may be sorted."""
  return source.take(np.arange(size) * len(source) // size)


def network(run, size=64):
  """Loads the last state of a run, and examples of its test split.

  Args:
    run: a `Told`.
    size: how many examples, or all that there are.

  Returns:
    A `Network`.

  Raises:
    ValueError: no checkpoint, or the data are not those of the run.
  """
  model, variables, config = train.load(run.workdir)
  model = model.clone(remat=None)  # Which has no second derivatives.
  _, info = checkpoints.expect(run.workdir)
  dataset = data.load(config)
  settings.check_unchanged(info, 'data', data.describe(dataset))
  few = spread(dataset.test, min(size, len(dataset.test)))
  transform = augment.evaluation(config.augment)
  examples = [transform(few[i]) for i in range(len(few))]
  raw = np.stack([example['image'] for example in examples])
  labels = np.array([example['label'] for example in examples], np.int32)
  mean, std = np.float32(config.mean), np.float32(config.std)
  return Network(
    run.name, list(run.result['layers']), model, variables, config,
    step_lib.prepare(raw, mean, std), labels, raw,
    criterion.of_example(config),
  )  # fmt: skip


def take(network, size):
  """The network with the first of its examples only."""
  axis = network.images.ndim == 5
  images = network.images[:, :size] if axis else network.images[:size]
  return network._replace(
    images=images, labels=network.labels[:size], raw=network.raw[:size]
  )


def loss(network, train=True):
  """Returns the mean loss of the examples as a function of the parameters.

  Args:
    network: a `Network`.
    train: with the batch's statistics and thresholds, or the running ones.
  """

  def mean(images, labels, params):
    logits, _ = network.model.apply(
      network.variables | {'params': params},
      images,
      train=train,
      mutable=['batch_stats'],
    )
    return network.loss(logits, labels).mean()

  return Partial(mean, network.images, network.labels)


def once(function, *arguments):
  """Runs a function that runs once: better compiled fast than fast."""
  lowered = jax.jit(function).lower(*arguments)
  return lowered.compile({'xla_backend_optimization_level': 0})(*arguments)


def happened(network, *collections):
  """What the neurons tell in inference, `{layer: {name: array}}`.

  Args:
    network: a `Network`.
    *collections: of `dsatgo_jax.linen`: 'spiking', 'membranes'.
  """

  def run(variables, images):
    return network.model.apply(
      variables, images, train=False, mutable=collections
    )[1]

  told = once(run, network.variables, network.images)
  layers = {name: {} for name in network.layers}
  for collection in collections:
    for path, one in activity.by_layer(told[collection]).items():
      layers[path.removesuffix('/neuron')] |= jax.device_get(one)
  return layers
