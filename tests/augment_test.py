"""Augmentations against values worked out by hand."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from train import augment


class Scripted:
  """A random generator that hands out the numbers it was given."""

  def __init__(self, *numbers):
    self.numbers = list(numbers)

  def __getattr__(self, name):
    return lambda *args, **kwargs: np.asarray(self.numbers.pop(0))[()]


def ramp(height=4, width=6, channels=1, dtype=np.uint8):
  count = height * width * channels
  return np.arange(count, dtype=dtype).reshape(height, width, channels)


def apply(names, image, seed=0):
  rng = np.random.default_rng(seed)
  return augment.training(names)({'image': image, 'label': 3}, rng)['image']


def test_random_crop_moves_the_image_and_fills_with_zeros():
  image = ramp() + 1
  # Offset (2, 2) of padding 2 is no move, (0, 0) two down and two right.
  np.testing.assert_array_equal(
    augment.random_crop(image, Scripted((2, 2)), 2), image
  )
  moved = augment.random_crop(image, Scripted((0, 0)), 2)
  np.testing.assert_array_equal(moved[2:, 2:], image[:-2, :-2])
  assert not moved[:2].any() and not moved[:, :2].any()


def test_random_crop_reaches_every_offset():
  image = ramp(9, 9) + 1
  crops = {apply(('random_crop:1',), image, s).tobytes() for s in range(200)}
  assert len(crops) == 9


def test_flip_mirrors_columns_half_of_the_time():
  image = ramp()
  assert augment.flip(image, Scripted(0.5)) is image
  np.testing.assert_array_equal(
    augment.flip(image, Scripted(0.49))[0, :, 0], [5, 4, 3, 2, 1, 0]
  )
  flipped = sum(
    (apply(('flip',), image, seed) != image).any() for seed in range(400)
  )
  assert 150 < flipped < 250


def test_roll_brings_back_what_leaves():
  image = ramp()
  rolled = augment.roll(image, Scripted((1, -2)))
  np.testing.assert_array_equal(rolled[1, :, 0], [2, 3, 4, 5, 0, 1])
  np.testing.assert_array_equal(rolled[0, :, 0], [20, 21, 22, 23, 18, 19])


def test_roll_stays_within_its_pixels():
  image = np.zeros((20, 20, 1), np.uint8)
  image[10, 10] = 1
  spots = [
    np.argwhere(apply(('roll:3',), image, seed))[0, :2] for seed in range(300)
  ]
  assert np.min(spots) == 7 and np.max(spots) == 13


@pytest.mark.parametrize('name', ['random_crop:2', 'flip', 'roll', 'cutout:3'])
def test_event_frames_all_change_alike(name):
  frame = ramp(8, 8, 2, np.float32)
  frames = np.stack([frame, 2 * frame, 0 * frame])
  for seed in range(5):
    new = apply((name,), frames, seed)
    assert new.shape == frames.shape and new.dtype == frames.dtype
    np.testing.assert_allclose(new[1], 2 * new[0])
    assert not new[2].any()
    np.testing.assert_allclose(new[0], apply((name,), frame, seed), rtol=1e-6)


def test_cutout_covers_a_square_with_the_mean():
  image = np.zeros((10, 10, 1), np.uint8)
  image[:5] = 100
  np.testing.assert_array_equal(
    np.argwhere(augment.cutout(image, Scripted((5, 5)), 4)[..., 0] == 50),
    [(y, x) for y in range(3, 7) for x in range(3, 7)],
  )
  corner = augment.cutout(image, Scripted((0, 9)), 4)
  np.testing.assert_array_equal(
    np.argwhere(corner[..., 0] == 50),
    [(0, 7), (0, 8), (0, 9), (1, 7), (1, 8), (1, 9)],
  )
  assert image.max() == 100 and set(np.unique(image)) == {0, 100}


def test_random_resized_crop_of_the_whole_is_a_resize():
  image = ramp(8, 8, 3)
  # All of the area, aspect ratio 1, offset (0, 0).
  crop = augment.random_resized_crop(image, Scripted(1.0, 0.0, (0, 0)), 4)
  expected = Image.fromarray(image).resize((4, 4), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(crop, np.asarray(expected))


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
def test_random_resized_crop_takes_any_size(height, width, seed):
  image = np.full((height, width, 3), 7, np.uint8)
  crop = apply(('random_resized_crop:5',), image, seed)
  np.testing.assert_array_equal(crop, np.full((5, 5, 3), 7))


def test_center_crop_keeps_seven_eighths_of_the_shorter_side():
  image = np.zeros((64, 128, 1), np.uint8)
  image[4:60, 36:92] = 200  # 56 x 56 in the middle.
  assert (augment.center_crop(image, 56) == 200).all()
  wider = augment.center_crop(np.roll(image, 1, axis=1), 56)
  assert (wider[:, 1:] == 200).all() and not wider[:, 0].any()


def test_evaluation_crops_only_where_training_resizes():
  example = {'image': ramp(16, 16, 3).astype(np.uint8), 'label': 1}
  assert augment.evaluation(('random_crop', 'flip'))(example) is example
  cropped = augment.evaluation(('random_resized_crop:5', 'flip'))(example)
  assert cropped['image'].shape == (5, 5, 3) and cropped['label'] == 1
  assert example['image'].shape == (16, 16, 3)
  whole = augment.evaluation(('random_resized_crop',))(example)
  assert whole['image'].shape == (224, 224, 3)


@pytest.mark.parametrize(
  'policy',
  [augment.CIFAR10_POLICY, augment.AUTHORS_POLICY, augment.IMAGENET_POLICY],
)
def test_policies_are_25_pairs(policy):
  assert len(policy) == 25
  for sub_policy in policy:
    assert len(sub_policy) == 2
    for operation, probability, magnitude in sub_policy:
      assert operation in augment.OPERATIONS
      assert probability in np.round(np.linspace(0, 1, 11), 1)
      assert magnitude in range(10)


@pytest.mark.parametrize(
  ('policy', 'counts', 'probabilities', 'first', 'last'),
  [
    (
      augment.CIFAR10_POLICY,
      {'Equalize': 9, 'AutoContrast': 7, 'Sharpness': 5, 'TranslateY': 5},
      26.5,
      (('Invert', 0.1, 7), ('Contrast', 0.2, 6)),
      (('TranslateY', 0.7, 9), ('AutoContrast', 0.9, 1)),
    ),
    (
      augment.IMAGENET_POLICY,
      {'Equalize': 17, 'Solarize': 7, 'Rotate': 6, 'Color': 6},
      31.0,
      (('Posterize', 0.4, 8), ('Rotate', 0.6, 9)),
      (('Equalize', 0.8, 0), ('Equalize', 0.6, 0)),
    ),
  ],
)
def test_policies_are_the_published_ones(
  policy, counts, probabilities, first, last
):
  rows = [row for sub_policy in policy for row in sub_policy]
  found = collections.Counter(name for name, _, _ in rows)
  assert dict(found.most_common(4)) == counts
  assert sum(row[1] for row in rows) == pytest.approx(probabilities)
  assert policy[0] == first and policy[-1] == last


def operate(name, image, magnitude, sign=1, operations=augment.OPERATIONS):
  """The operation at a magnitude, as `autoaugment` applies it."""
  rng = Scripted(0, 0.0, *([sign] if operations[name][2] else []))
  policy = (((name, 1.0, magnitude),),)
  return augment.autoaugment(image, rng, policy, operations)


def grey(*values):
  """A 1-row image of grey pixels."""
  return np.array(values, np.uint8)[None, :, None].repeat(3, axis=2)


def test_pixel_operations_by_hand():
  image = grey(0, 100, 128, 255)
  np.testing.assert_array_equal(
    operate('Invert', image, 7)[0, :, 0], [255, 155, 127, 0]
  )
  # Solarize from 256 * (1 - 5 / 9) = 113.8 up.
  np.testing.assert_array_equal(
    operate('Solarize', image, 5)[0, :, 0], [0, 100, 127, 0]
  )
  # 8 - round(4 * 7 / 9) = 5 bits.
  np.testing.assert_array_equal(
    operate('Posterize', image, 7)[0, :, 0], [0, 96, 128, 248]
  )
  # Brightness 1 - 0.9 * 5 / 9 = 0.5.
  np.testing.assert_array_equal(
    operate('Brightness', image, 5, -1)[0, :, 0], [0, 50, 64, 127]
  )
  # Contrast 1.9 about the mean, 121.
  np.testing.assert_array_equal(
    operate('Contrast', image, 9, 1)[0, :, 0], [0, 81, 134, 255]
  )
  np.testing.assert_array_equal(
    operate('AutoContrast', grey(50, 100, 150), 2)[0, :, 0], [0, 127, 255]
  )
  # Color 0.1 of a pure red, whose grey is 76.
  red = np.array([[[255, 0, 0]]], np.uint8)
  np.testing.assert_array_equal(operate('Color', red, 9, -1), [[[93, 68, 68]]])
  np.testing.assert_array_equal(operate('Color', image, 9, 1), image)
  # Equal shares of the histogram, spread evenly.
  np.testing.assert_array_equal(
    operate('Equalize', np.uint8([[10, 20], [30, 40]])[..., None], 0)[..., 0],
    np.asarray(
      augment.ImageOps.equalize(Image.fromarray(np.uint8([[10, 20], [30, 40]])))
    ),
  )
  flat = np.full((5, 5, 3), 77, np.uint8)
  np.testing.assert_array_equal(operate('Sharpness', flat, 9), flat)


def test_geometric_operations_by_hand():
  image = np.full((20, 20, 1), 9, np.uint8)
  image[:, 0] = 200
  image[0] = 100
  # 150 / 331 of 20 pixels is 9; a positive value looks further right.
  left = operate('TranslateX', image, 9)[..., 0]
  np.testing.assert_array_equal(left[:, :11], image[:, 9:, 0])
  assert (left[:, 11:] == 128).all()
  down = operate('TranslateY', image, 9, -1)[..., 0]
  np.testing.assert_array_equal(down[9:], image[:11, :, 0])
  assert (down[:9] == 128).all()
  # The row y is shifted by 0.3 * (y + 0.5).
  sheared = operate('ShearX', image, 9)[..., 0]
  assert (sheared[15, -5:] == 128).all() and sheared[15, -6] == 9
  assert (sheared[0] == 100).all()
  sheared = operate('ShearY', image, 9, -1)[..., 0]
  assert (sheared[:5, 15] == 128).all() and sheared[5, 15] == 100
  # 30 degrees anticlockwise empties the corners.
  turned = operate('Rotate', image, 9)[..., 0]
  assert turned[0, 0] == turned[-1, -1] == 128 and turned[10, 10] == 9


@pytest.mark.parametrize(
  'name', ['Contrast', 'Color', 'Brightness', 'Sharpness']
)
def test_magnitude_zero_leaves_an_image_as_it_is(name):
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  np.testing.assert_array_equal(operate(name, image, 0), image)


def test_what_differs_in_the_authors_program():
  theirs = augment.AUTHORS_OPERATIONS
  changed = {
    name for name in theirs if theirs[name] != augment.OPERATIONS[name]
  }
  assert changed == {'ShearX', 'ShearY', 'Rotate'}
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)
  # Neither sign nor side is drawn: 20 degrees anticlockwise.
  turned = operate('Rotate', image, 6, operations=theirs)
  np.testing.assert_array_equal(turned, operate('Rotate', image, 6, 1))
  assert (turned != operate('Rotate', image, 6, -1)).any()
  # Row 5 looks 0.3 * 5.5 pixels further right: between two, or at the nearer.
  ramp = np.arange(0, 200, 10, np.uint8)[None, :, None].repeat(20, axis=0)
  for axes, name in ((0, 1, 2), 'ShearX'), ((1, 0, 2), 'ShearY'):
    for operations, shift in (theirs, 15), (augment.OPERATIONS, 20):
      sheared = operate(name, ramp.transpose(axes), 9, operations=operations)
      row = sheared.transpose(axes)[5, 2:16, 0]
      np.testing.assert_array_equal(row, ramp[5, 2:16, 0] + shift)
  rows = zip(augment.CIFAR10_POLICY, augment.AUTHORS_POLICY, strict=True)
  ((number, theirs),) = (
    (n, row) for n, (ours, row) in enumerate(rows, 1) if ours != row
  )
  assert number == 17
  assert theirs == (('Equalize', 0.2, 8), ('Equalize', 0.8, 4))


def test_autoaugment_applies_with_its_probabilities():
  image = grey(0, 100, 255)
  policy = ((('Invert', 0.3, 0), ('Posterize', 0.0, 9)),)
  rng = np.random.default_rng(0)
  inverted = [
    (augment.autoaugment(image, rng, policy) != image).any()
    for _ in range(1000)
  ]
  assert 0.25 < np.mean(inverted) < 0.35


def test_autoaugment_chooses_among_all_sub_policies():
  # The sign is random, and so is the sub-policy.
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  for name in augment.AUGMENTATIONS:
    if not name.startswith('autoaugment'):
      continue
    kinds = {apply((name,), image, seed).tobytes() for seed in range(300)}
    assert len(kinds) > 30


@pytest.mark.parametrize('name', list(augment.AUGMENTATIONS))
def test_same_generator_same_image(name):
  image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  before = image.copy()
  results = [apply((name,), image, seed) for seed in (*range(20), *range(20))]
  for first, second in zip(results[:20], results[20:], strict=True):
    np.testing.assert_array_equal(first, second)
  assert len({result.tobytes() for result in results}) > 1
  np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
  'names',
  [
    ('mixup',),
    ('flip:2',),
    ('random_crop:x',),
    ('random_crop:-1',),
    ('cutout:',),
  ],
)
def test_unknown_names_and_settings(names):
  with pytest.raises(ValueError, match=f"random_crop.*got '{names[0]}'"):
    augment.training(names)


@pytest.mark.parametrize(
  'image', [np.zeros((4, 4, 3), np.float32), np.zeros((2, 4, 4, 3), np.uint8)]
)
@pytest.mark.parametrize('name', ['autoaugment_cifar10', 'random_resized_crop'])
def test_pillow_wants_uint8_images(name, image):
  with pytest.raises(ValueError, match=r'uint8 images \[H, W, 1 or 3\], got'):
    apply((name,), image)


def test_picture_has_a_row_for_every_augmentation():
  picture = augment.draw(tile=16, samples=2)
  assert picture.size == (3 * 18 + 6, 9 * 30)
  assert len(picture.getcolors(10**5)) > 500
