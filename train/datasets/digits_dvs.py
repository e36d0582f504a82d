"""Handwritten digits before an event camera: simulated, so no download.

Each of scikit-learn's 8 x 8 digits moves once round a smooth closed path, not
quite the same for any two, in front of a sensor whose pixels report changes of
log intensity: an ON (OFF) event whenever it has risen (fallen) by the pixel's
threshold since the pixel's last event. Thresholds differ between pixels, the
intensity is noisy, and pixels fire now and then by themselves. A simplified
form of ESIM (Rebecq et al., CoRL 2018) and v2e (Hu et al., CVPRW 2021).
"""

import numpy as np
import tensorflow_datasets as tfds

from train.datasets import digits

NUM_STEPS = 10
SIZE = 16


def shift_weights(position, size, old_size, zoom):
  """Returns `[..., size, old_size]`, the rows of a sensor that sees an image.

  Args:
    position: `[...]`, where the image's centre is from the sensor's, in pixels
      of the sensor.
    size: pixels of the sensor along this axis.
    old_size: pixels of the image along this axis.
    zoom: sensor pixels to an image pixel; in between the image is linear, and
      it is 0 outside.
  """
  sensor = np.arange(size) - (size - 1) / 2 - position[..., None]
  distance = sensor[..., None] / zoom - np.arange(old_size) + (old_size - 1) / 2
  return np.clip(1 - np.abs(distance), 0, None)


def simulate(
  images,
  rng,
  *,
  num_steps=NUM_STEPS,
  size=SIZE,
  substeps=8,
  zoom=1.5,
  amplitude=1.5,
  jitter=0.25,
  background=0.1,
  threshold=0.25,
  mismatch=0.03,
  noise=0.03,
  leak=0.002,
):
  """Returns the event frames `[N, T, size, size, 2]` of moving images.

  Args:
    images: `[N, h, h]` in 0..1.
    rng: `np.random.Generator`.
    num_steps: T, the frames in one round of the path.
    size: pixels of the sensor along an axis.
    substeps: times that the sensor looks at the image in a frame.
    zoom: sensor pixels to an image pixel.
    amplitude: how far the image moves to each side, in pixels of the sensor.
    jitter: how far the paths' phases differ between images, in half turns.
    background: intensity added to the image before the logarithm.
    threshold: mean change of log intensity for an event.
    mismatch: standard deviation of the threshold between pixels.
    noise: standard deviation of the log intensity at every look.
    leak: chance of an event without a cause, per pixel, polarity and look.

  Returns:
    uint8 counts; channel 0 counts OFF events and channel 1 ON events.
  """
  count, height, _ = images.shape
  # One round of a lying eight, x and y sines of one and two turns.
  angle = np.linspace(0, 2 * np.pi, num_steps * substeps + 1)
  phase = jitter * rng.uniform(-np.pi, np.pi, (2, count, 1))
  x = amplitude * np.sin(angle + phase[0])
  y = amplitude * np.sin(2 * angle + phase[1])
  thresholds = rng.normal(threshold, mismatch, (size, size, 2))
  thresholds = np.clip(thresholds, 0.2 * threshold, None).astype(np.float32)

  frames = np.zeros((count, num_steps, size, size, 2), np.uint8)
  reference = None
  for look in range(num_steps * substeps + 1):
    rows = shift_weights(y[:, look], size, height, zoom)
    columns = shift_weights(x[:, look], size, height, zoom)
    seen = rows @ images @ columns.swapaxes(1, 2)
    log = np.log(seen + background).astype(np.float32)
    log += noise * rng.standard_normal(log.shape, np.float32)
    if reference is None:
      reference = log
      continue
    change = np.stack([reference - log, log - reference], axis=-1)
    events = np.floor(np.clip(change, 0, None) / thresholds)
    steps = events * thresholds
    reference = reference + steps[..., 1] - steps[..., 0]
    events += rng.random(events.shape, np.float32) < leak
    frames[:, (look - 1) // substeps] += events.astype(np.uint8)
  return frames


def arrays(seed=0):
  """Returns the recordings, split as the digits are.

  Args:
    seed: of the split and the simulation.

  Returns:
    `x_train, x_test, y_train, y_test`: 1,437 and 360 recordings
    `[N, T, H, W, 2]` uint8 of one and the same sensor, and labels `[N]`.
  """
  x_train, x_test, y_train, y_test = digits.arrays(seed)
  images = np.concatenate([x_train, x_test])[..., 0] / 255
  frames = simulate(images, np.random.default_rng(seed))
  return frames[: len(x_train)], frames[len(x_train) :], y_train, y_test


class DigitsDvs(tfds.core.GeneratorBasedBuilder):
  """Event counts of handwritten digits, 16 x 16, in ten classes."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description='Handwritten digits before a simulated event camera.',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Tensor(
            shape=(NUM_STEPS, SIZE, SIZE, 2),
            dtype=np.float32,
            encoding='bytes',
          ),
          'label': tfds.features.ClassLabel(num_classes=10),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing to download.
    x_train, x_test, y_train, y_test = arrays()
    return {
      'train': self._generate_examples(x_train, y_train),
      'test': self._generate_examples(x_test, y_test),
    }

  def _generate_examples(self, frames, labels):
    for key, (image, label) in enumerate(zip(frames, labels, strict=True)):
      yield key, {'image': image.astype(np.float32), 'label': int(label)}


def linear_accuracy(x_train, y_train, x_test, y_test):
  """Test accuracy of a linear classifier on frames summed over time.

  What a network must beat to show that it uses more than where events fell.

  Args:
    x_train: `[N, T, H, W, C]`.
    y_train: `[N]`.
    x_test: `[M, T, H, W, C]`.
    y_test: `[M]`.
  """
  from sklearn import linear_model, pipeline, preprocessing

  classifier = pipeline.make_pipeline(
    preprocessing.StandardScaler(),
    linear_model.LogisticRegression(max_iter=1000),
  )
  x_train, x_test = (
    x.sum(axis=1, dtype=np.float32).reshape(len(x), -1)
    for x in (x_train, x_test)
  )
  return classifier.fit(x_train, y_train).score(x_test, y_test)
