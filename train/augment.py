"""Augmentations: pure functions of an image and a random generator.

Each takes an image `[H, W, C]` or event frames `[T, H, W, C]` and a
`np.random.Generator`, and returns a new array. `config.augment` lists them by
name in the order they are applied; a number after a colon is the setting, as
in `('random_crop:2', 'flip')`.
"""

import numpy as np


def random_crop(image, rng, padding=4):
  """Pads `[..., H, W, C]` with zeros and cuts the old size out again."""
  height, width = image.shape[-3:-1]
  border = [(0, 0)] * (image.ndim - 3) + [(padding, padding)] * 2 + [(0, 0)]
  y, x = rng.integers(2 * padding + 1, size=2)
  return np.pad(image, border)[..., y : y + height, x : x + width, :]


def flip(image, rng):
  """Mirrors left and right with probability 1/2, all frames alike."""
  return image[..., ::-1, :] if rng.random() < 0.5 else image


AUGMENTATIONS = {'random_crop': random_crop, 'flip': flip}


def compose(names):
  """Returns the function of `(example, rng)` that `config.augment` names."""
  functions = [_parse(name) for name in names]

  def augment(example, rng):
    image = example['image']
    for function in functions:
      image = function(image, rng)
    return example | {'image': image}

  return augment


def _parse(entry):
  name, _, setting = entry.partition(':')
  if name not in AUGMENTATIONS or not (setting or '1').isdecimal():
    raise ValueError(
      'config.augment must be names (or name:number) out of '
      f'{", ".join(AUGMENTATIONS)}, got {entry!r}'
    )
  return AUGMENTATIONS[name]
