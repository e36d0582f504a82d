"""Augmentations: pure functions of an image and a random generator.

Each takes an image `[H, W, C]` or event frames `[T, H, W, C]` and a
`np.random.Generator`, and returns a new array, all frames changed alike.
`config.augment` lists them by name in the order they are applied; a number
after a colon is the setting, as in `('random_crop:2', 'flip')`.

`python -m train.augment --output FILE.png` draws sixteen samples of each.
"""

import argparse
import functools
import inspect
import math
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps


def random_crop(image, rng, padding=4):
  """Pads the borders with zeros and cuts the old size out of the whole."""
  height, width = image.shape[-3:-1]
  borders = [(0, 0)] * (image.ndim - 3) + [(padding, padding)] * 2 + [(0, 0)]
  y, x = rng.integers(2 * padding + 1, size=2)
  return np.pad(image, borders)[..., y : y + height, x : x + width, :]


def flip(image, rng):
  """Mirrors left and right with probability 1/2."""
  return image[..., ::-1, :] if rng.random() < 0.5 else image


def roll(image, rng, pixels=5):
  """Shifts by up to `pixels` either way; what leaves on one side comes back."""
  shift = rng.integers(-pixels, pixels + 1, size=2)
  return np.roll(image, shift, axis=(-3, -2))


def cutout(image, rng, size=16):
  """Puts the channels' means over a square (DeVries and Taylor, 2017).

  Its centre is anywhere in the image, so that it may stick out.
  """
  height, width = image.shape[-3:-1]
  y, x = rng.integers((height, width)) - size // 2
  rows, columns = slice(max(y, 0), y + size), slice(max(x, 0), x + size)
  cut = image.copy()
  cut[..., rows, columns, :] = image.mean(axis=(-3, -2), keepdims=True)
  return cut


def random_resized_crop(image, rng, size=224):
  """Cuts out 8 to 100 % of a uint8 image and resizes it to `size` squared.

  The aspect ratio is log-uniform from 3/4 to 4/3 (Szegedy et al., CVPR 2015);
  the largest central crop of those ratios if ten draws do not fit.
  """
  height, width = image.shape[:2]
  for _ in range(10):
    area = rng.uniform(0.08, 1) * height * width
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      y, x = rng.integers((height - h + 1, width - w + 1))
      return _resized_box(image, (x, y, w, h), size)
  w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
  return _resized_box(image, ((width - w) / 2, (height - h) / 2, w, h), size)


def center_crop(image, size):
  """The test image of `random_resized_crop`: the central 7/8 of the square."""
  height, width = image.shape[:2]
  side = min(height, width) * 7 / 8
  box = ((width - side) / 2, (height - side) / 2, side, side)
  return _resized_box(image, box, size)


def autoaugment_cifar10(image, rng):
  """AutoAugment with the CIFAR-10 policy, for uint8 images."""
  return autoaugment(image, rng, CIFAR10_POLICY)


def autoaugment_cifar10_authors(image, rng):
  """The same as DS-ATGO's program has it; see `AUTHORS_OPERATIONS`."""
  return autoaugment(image, rng, AUTHORS_POLICY, AUTHORS_OPERATIONS)


def autoaugment_imagenet(image, rng):
  """AutoAugment with the ImageNet policy, for uint8 images."""
  return autoaugment(image, rng, IMAGENET_POLICY)


def autoaugment(image, rng, policy, operations=None):
  """Applies a random one of the policy's sub-policies (Cubuk et al., 2019).

  Args:
    image: `[H, W, 1 or 3]` uint8.
    rng: `np.random.Generator`.
    policy: sub-policies, each a sequence of `(operation, probability,
      magnitude)` with a magnitude of 0..9.
    operations: what the names stand for; None for `OPERATIONS`.
  """
  pillow = _to_pillow(image)
  for name, probability, magnitude in policy[rng.integers(len(policy))]:
    if rng.random() < probability:
      operation, largest, signed = (operations or OPERATIONS)[name]
      sign = rng.choice((-1, 1)) if signed else 1
      pillow = operation(pillow, sign * largest * magnitude / 9)
  return np.asarray(pillow).reshape(image.shape)


def _affine(image, *matrix, resample=Image.Resampling.NEAREST):
  return image.transform(
    image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=_grey(image)
  )


def _grey(image):
  return (128,) * len(image.getbands())


# Each operation of an image and a value, the value at magnitude 9 (at 0 it is
# 0), and whether a random sign goes with it. Ranges of the paper's table 6; a
# translation is in parts of the image's side, of which its 150 pixels were 331.
# Contrast, Color, Brightness and Sharpness change by the value either way, as
# in torchvision: ('Color', 0) leaves an image as it is, where the table's range
# of 0.1 to 1.9 would give 0.1.
OPERATIONS = {
  'ShearX': (lambda im, v: _affine(im, 1, v, 0, 0, 1, 0), 0.3, True),
  'ShearY': (lambda im, v: _affine(im, 1, 0, 0, v, 1, 0), 0.3, True),
  'TranslateX': (
    lambda im, v: _affine(im, 1, 0, v * im.width, 0, 1, 0),
    150 / 331,
    True,
  ),
  'TranslateY': (
    lambda im, v: _affine(im, 1, 0, 0, 0, 1, v * im.height),
    150 / 331,
    True,
  ),
  'Rotate': (lambda im, v: im.rotate(v, fillcolor=_grey(im)), 30, True),
  'AutoContrast': (lambda im, v: ImageOps.autocontrast(im), 0, False),
  'Invert': (lambda im, v: ImageOps.invert(im), 0, False),
  'Equalize': (lambda im, v: ImageOps.equalize(im), 0, False),
  'Solarize': (lambda im, v: ImageOps.solarize(im, 256 - v), 256, False),
  'Posterize': (lambda im, v: ImageOps.posterize(im, 8 - round(v)), 4, False),
  'Contrast': (
    lambda im, v: ImageEnhance.Contrast(im).enhance(1 + v),
    0.9,
    True,
  ),
  'Color': (lambda im, v: ImageEnhance.Color(im).enhance(1 + v), 0.9, True),
  'Brightness': (
    lambda im, v: ImageEnhance.Brightness(im).enhance(1 + v),
    0.9,
    True,
  ),
  'Sharpness': (
    lambda im, v: ImageEnhance.Sharpness(im).enhance(1 + v),
    0.9,
    True,
  ),
}

# Cubuk et al., table 7.
CIFAR10_POLICY = (
  (('Invert', 0.1, 7), ('Contrast', 0.2, 6)),
  (('Rotate', 0.7, 2), ('TranslateX', 0.3, 9)),
  (('Sharpness', 0.8, 1), ('Sharpness', 0.9, 3)),
  (('ShearY', 0.5, 8), ('TranslateY', 0.7, 9)),
  (('AutoContrast', 0.5, 8), ('Equalize', 0.9, 2)),
  (('ShearY', 0.2, 7), ('Posterize', 0.3, 7)),
  (('Color', 0.4, 3), ('Brightness', 0.6, 7)),
  (('Sharpness', 0.3, 9), ('Brightness', 0.7, 9)),
  (('Equalize', 0.6, 5), ('Equalize', 0.5, 1)),
  (('Contrast', 0.6, 7), ('Sharpness', 0.6, 5)),
  (('Color', 0.7, 7), ('TranslateX', 0.5, 8)),
  (('Equalize', 0.3, 7), ('AutoContrast', 0.4, 8)),
  (('TranslateY', 0.4, 3), ('Sharpness', 0.2, 6)),
  (('Brightness', 0.9, 6), ('Color', 0.2, 8)),
  (('Solarize', 0.5, 2), ('Invert', 0.0, 3)),
  (('Equalize', 0.2, 0), ('AutoContrast', 0.6, 0)),
  (('Equalize', 0.2, 8), ('Equalize', 0.6, 4)),
  (('Color', 0.9, 9), ('Equalize', 0.6, 6)),
  (('AutoContrast', 0.8, 4), ('Solarize', 0.2, 8)),
  (('Brightness', 0.1, 3), ('Color', 0.7, 0)),
  (('Solarize', 0.4, 5), ('AutoContrast', 0.9, 3)),
  (('TranslateY', 0.9, 9), ('TranslateY', 0.7, 9)),
  (('AutoContrast', 0.9, 2), ('Solarize', 0.8, 3)),
  (('Equalize', 0.8, 8), ('Invert', 0.1, 3)),
  (('TranslateY', 0.7, 9), ('AutoContrast', 0.9, 1)),
)

# What differs in DS-ATGO's program: bicubic shears, rotations anticlockwise
# only, and Equalize 0.8 for 0.6 in row 17.
_bicubic = functools.partial(_affine, resample=Image.Resampling.BICUBIC)
AUTHORS_OPERATIONS = OPERATIONS | {
  'ShearX': (lambda im, v: _bicubic(im, 1, v, 0, 0, 1, 0), 0.3, True),
  'ShearY': (lambda im, v: _bicubic(im, 1, 0, 0, v, 1, 0), 0.3, True),
  'Rotate': (*OPERATIONS['Rotate'][:2], False),
}
AUTHORS_POLICY = (
  *CIFAR10_POLICY[:16],
  (('Equalize', 0.2, 8), ('Equalize', 0.8, 4)),
  *CIFAR10_POLICY[17:],
)

# Cubuk et al., table 9; magnitudes that no operation uses are 0.
IMAGENET_POLICY = (
  (('Posterize', 0.4, 8), ('Rotate', 0.6, 9)),
  (('Solarize', 0.6, 5), ('AutoContrast', 0.6, 0)),
  (('Equalize', 0.8, 0), ('Equalize', 0.6, 0)),
  (('Posterize', 0.6, 7), ('Posterize', 0.6, 6)),
  (('Equalize', 0.4, 0), ('Solarize', 0.2, 4)),
  (('Equalize', 0.4, 0), ('Rotate', 0.8, 8)),
  (('Solarize', 0.6, 3), ('Equalize', 0.6, 0)),
  (('Posterize', 0.8, 5), ('Equalize', 1.0, 0)),
  (('Rotate', 0.2, 3), ('Solarize', 0.6, 8)),
  (('Equalize', 0.6, 0), ('Posterize', 0.4, 6)),
  (('Rotate', 0.8, 8), ('Color', 0.4, 0)),
  (('Rotate', 0.4, 9), ('Equalize', 0.6, 0)),
  (('Equalize', 0.0, 0), ('Equalize', 0.8, 0)),
  (('Invert', 0.6, 0), ('Equalize', 1.0, 0)),
  (('Color', 0.6, 4), ('Contrast', 1.0, 8)),
  (('Rotate', 0.8, 8), ('Color', 1.0, 2)),
  (('Color', 0.8, 8), ('Solarize', 0.8, 7)),
  (('Sharpness', 0.4, 7), ('Invert', 0.6, 0)),
  (('ShearX', 0.6, 5), ('Equalize', 1.0, 0)),
  (('Color', 0.4, 0), ('Equalize', 0.6, 0)),
  (('Equalize', 0.4, 0), ('Solarize', 0.2, 4)),
  (('Solarize', 0.6, 5), ('AutoContrast', 0.6, 0)),
  (('Invert', 0.6, 0), ('Equalize', 1.0, 0)),
  (('Color', 0.6, 4), ('Contrast', 1.0, 8)),
  (('Equalize', 0.8, 0), ('Equalize', 0.6, 0)),
)

AUGMENTATIONS = {
  function.__name__: function
  for function in (
    random_crop,
    flip,
    roll,
    cutout,
    random_resized_crop,
    autoaugment_cifar10,
    autoaugment_cifar10_authors,
    autoaugment_imagenet,
  )
}


def training(names):
  """Returns the function of `(example, rng)` that `config.augment` lists."""
  steps = [_parse(name) for name in names]

  def augment(example, rng):
    image = example['image']
    for function, setting in steps:
      image = function(image, rng, *setting)
    return example | {'image': image}

  return augment


def evaluation(names):
  """Returns the function of an example that goes with `training(names)`.

  The centre of the image where training crops and resizes, else nothing.
  """
  for function, setting in map(_parse, names):
    if function is random_resized_crop:
      size = setting[0] if setting else 224
      return lambda example: (
        example | {'image': center_crop(example['image'], size)}
      )
  return lambda example: example


def _parse(entry):
  """Returns the function and `(number,)`, or `()` where none is given."""
  name, colon, number = entry.partition(':')
  function = AUGMENTATIONS.get(name)
  if function and not colon:
    return function, ()
  if function and number.isdecimal():
    if len(inspect.signature(function).parameters) == 3:
      return function, (int(number),)
  raise ValueError(
    'config.augment: expected names (or name:number where there is something '
    f'to set) out of {", ".join(AUGMENTATIONS)}, got {entry!r}'
  )


def _to_pillow(image):
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
    raise ValueError(
      'this augmentation needs uint8 images [H, W, 1 or 3], '
      f'got {image.dtype} {image.shape}'
    )
  return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _resized_box(image, box, size):
  """Resizes the box `(x, y, width, height)` of an image to `size` squared."""
  x, y, width, height = box
  resized = _to_pillow(image).resize(
    (size, size),
    Image.Resampling.BILINEAR,
    box=(x, y, x + width, y + height),
  )
  return np.asarray(resized).reshape(size, size, image.shape[2])


def draw(tile=64, samples=16):
  """Returns a picture: a row for each augmentation, the original first."""
  from sklearn import datasets

  from train.datasets import digits, digits_dvs

  china = datasets.load_sample_image('china.jpg')
  flower = datasets.load_sample_image('flower.jpg')
  digit = digits.arrays()[0][1:2, ..., 0] / 255
  events = digits_dvs.simulate(digit, np.random.default_rng(0))[0]
  # OFF events blue, ON events red, at one timestep.
  events = np.insert(events[6] * (255 / events[6].max()), 1, 0, axis=-1)
  rows = {
    'random_crop': center_crop(china, 32),
    'flip': center_crop(china, 32),
    'cutout': center_crop(china, 32),
    'autoaugment_cifar10': center_crop(china, 32),
    'autoaugment_cifar10_authors': center_crop(china, 32),
    'random_crop, flip, autoaugment_cifar10': center_crop(flower, 32),
    'autoaugment_imagenet': center_crop(flower, tile),
    f'random_resized_crop:{tile}': china,
    'flip, roll:2': events[..., ::-1].astype(np.uint8),
  }
  label, pitch = 14, tile + 2
  picture = Image.new(
    'RGB', ((samples + 1) * pitch + 6, len(rows) * (tile + label)), 'white'
  )
  for row, (names, image) in enumerate(rows.items()):
    top = row * (tile + label)
    ImageDraw.Draw(picture).text((2, top + 1), names, fill='black')
    names, example = names.split(', '), {'image': image}
    tiles = [evaluation(names)(example)] + [
      training(names)(example, np.random.default_rng(seed))
      for seed in range(samples)
    ]
    for column, shown in enumerate(tiles):
      shown = Image.fromarray(np.ascontiguousarray(shown['image']))
      shown = shown.resize((tile, tile), Image.Resampling.NEAREST)
      picture.paste(shown, (column * pitch + 8 * (column > 0), top + label))
  return picture


def main():
  """Writes the picture."""
  parser = argparse.ArgumentParser(description=main.__doc__)
  parser.add_argument('--output', default='docs/made/augmentation.png')
  output = pathlib.Path(parser.parse_args().output)
  output.parent.mkdir(parents=True, exist_ok=True)
  draw().quantize(256).save(output, optimize=True)


if __name__ == '__main__':
  main()
