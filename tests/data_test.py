"""The data pipeline: splits, statistics, batches; resumed and shared out."""

import dataclasses
import itertools
import json
import multiprocessing

import jax
import ml_collections
import numpy as np
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from train import data
from train.datasets import sources


def make_config(**fields):
  return ml_collections.ConfigDict(
    {
      'dataset': 'npz',
      'data_path': None,
      'data_dir': None,
      'num_classes': None,
      'batch_size': 4,
      'num_steps': 2,
      'seed': 0,
      'validation_fraction': 0.0,
      'augment': (),
      'num_workers': 0,
      'normalize': True,
      'mean': None,
      'std': None,
      **fields,
    }
  )


def make_source(count=10, size=3):
  """Examples that tell their index: in the label, and in all of the image."""
  index = np.arange(count, dtype=np.int32)
  images = np.zeros((count, size, size, 1), np.uint8)
  images[:, 0, 0, 0] = index + 1
  return sources.Arrays(images, index)


def on_disk(source):
  """The same examples as TFDS reads what is too large for the memory."""
  return sources.Records(list(source), np.arange(len(source)))


def take(batches, count):
  return list(itertools.islice(batches, count))


def assert_same(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for key in batch:
      np.testing.assert_array_equal(batch[key], other[key])


@pytest.fixture
def npz_file(tmp_path):
  rng = np.random.default_rng(0)
  path = tmp_path / 'data.npz'
  np.savez(
    path,
    x_train=rng.integers(0, 256, (20, 5, 4, 3), np.uint8),
    y_train=np.arange(20) % 4,
    x_test=rng.integers(0, 256, (6, 5, 4, 3), np.uint8),
    y_test=np.arange(6) % 4,
  )
  return str(path)


def test_load_npz(npz_file):
  config = make_config(data_path=npz_file, validation_fraction=0.2)
  dataset = data.load(config)
  assert (len(dataset.train), len(dataset.validation)) == (16, 4)
  assert sorted(dataset.validation.labels) == [0, 1, 2, 3]
  assert dataset.example_shape == (5, 4, 3)
  assert dataset.num_classes == 4
  images = dataset.train.images / 255
  np.testing.assert_allclose(dataset.mean, images.mean((0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(dataset.std, images.std((0, 1, 2)), rtol=1e-6)
  assert dataset.mean.dtype == dataset.std.dtype == np.float32
  assert data.steps_per_epoch(dataset, config) == 4


def test_load_without_validation_or_normalisation(npz_file):
  config = make_config(data_path=npz_file, normalize=False)
  dataset = data.load(config)
  assert dataset.validation is None and len(dataset.train) == 20
  np.testing.assert_array_equal(dataset.mean, [0, 0, 0])
  np.testing.assert_array_equal(dataset.std, [1, 1, 1])


def test_published_mean_and_std_win(npz_file):
  config = make_config(data_path=npz_file, mean=(0.1, 0.2, 0.3))
  dataset = data.load(config)
  np.testing.assert_allclose(dataset.mean, [0.1, 0.2, 0.3])
  images = dataset.train.images / 255
  np.testing.assert_allclose(dataset.std, images.std((0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'mean': (0.5,)}, 'must be 3 numbers'),
    ({'std': (1.0, 0.0, 1.0)}, 'std positive'),
    ({'mean': (None,) * 3}, 'must be 3 numbers'),
    ({'std': (1.0, 1.0, np.nan)}, 'must be 3 numbers'),
    ({'num_classes': 3}, r'y_train must be in 0..2, got 3'),
    ({'validation_fraction': 1.0}, r'must be in \[0, 1\), got 1.0'),
    ({'validation_fraction': -0.1}, r'must be in \[0, 1\), got -0.1'),
    ({'validation_fraction': 0.01}, '0.01 of 20 examples is less than one'),
    ({'augment': ('mixup',)}, "got 'mixup'"),
    ({'dataset': 'no_such_data'}, "'npz' or a dataset of TFDS, got 'no_such"),
  ],
)
def test_load_refuses(npz_file, fields, message):
  with pytest.raises(ValueError, match=message):
    data.load(make_config(data_path=npz_file, **fields))


def test_num_classes_are_more_than_the_data_show(npz_file):
  config = make_config(data_path=npz_file, num_classes=9)
  assert data.load(config).num_classes == 9


def test_tfds_knows_its_classes(tmp_path):
  config = make_config(dataset='digits', data_dir=str(tmp_path), num_classes=10)
  assert data.load(config).num_classes == 10
  config.num_classes = 9
  with pytest.raises(
    ValueError, match='num_classes must be 10 or None .*got 9'
  ):
    data.load(config)


def test_description_tells_other_data_of_the_same_shape(npz_file):
  config = make_config(data_path=npz_file, validation_fraction=0.2)
  dataset = data.load(config)
  facts = data.describe(dataset)
  assert facts == json.loads(json.dumps(facts))
  assert facts == data.describe(data.load(config))
  assert facts['num_examples'] == {'train': 16, 'validation': 4, 'test': 6}
  assert (facts['dtype'], facts['num_classes']) == ('uint8', 4)

  def changed(**arrays):
    other = dataset._replace(test=dataclasses.replace(dataset.test, **arrays))
    return {
      name for name, fact in data.describe(other).items() if fact != facts[name]
    }

  images, labels = dataset.test.images.copy(), dataset.test.labels
  images[-1, -1, -1, -1] ^= 1
  assert changed(images=images) == {'checksum'}
  assert changed(labels=labels[::-1]) == {'checksum'}
  assert changed(images=images[:5], labels=labels[:5]) == {
    'checksum', 'num_examples'
  }  # fmt: skip


def test_examples_on_disk_are_told_apart_by_some():
  rows = list(make_source(100))
  index = np.arange(100)
  one, same, other, fewer = (
    sources.Records(rows, order).checksum()
    for order in (index, index, index[::-1], index[:3])
  )
  assert one == same and len({one, other, fewer}) == 3


@pytest.mark.parametrize('num_steps', [2, 3])
def test_frames_want_their_number_of_steps(tmp_path, num_steps):
  x, y = np.ones((4, 3, 5, 5, 2), np.float32), np.arange(4)
  path = tmp_path / 'frames.npz'
  np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
  config = make_config(data_path=str(path), num_steps=num_steps)
  if num_steps == 3:
    assert data.load(config).example_shape == (3, 5, 5, 2)
  else:
    with pytest.raises(ValueError, match='must be 3, got 2'):
      data.load(config)


@settings(deadline=None)
@given(
  st.lists(st.integers(1, 60), min_size=1, max_size=6),
  st.floats(0.05, 0.95),
  st.integers(0, 9),
)
def test_split_is_stratified_and_disjoint(class_sizes, fraction, seed):
  labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
  np.random.default_rng(seed).shuffle(labels)
  source = sources.Arrays(np.arange(len(labels)), labels)
  if np.floor(len(labels) * fraction) < 1:
    with pytest.raises(ValueError, match='less than one'):
      data.split(source, fraction, seed)
    return
  rest, held_out = data.split(source, fraction, seed)
  both = np.concatenate([rest.images, held_out.images])
  np.testing.assert_array_equal(np.sort(both), source.images)
  np.testing.assert_array_equal(held_out.labels, labels[held_out.images])
  found = np.bincount(held_out.labels, minlength=len(class_sizes))
  assert (np.abs(found - fraction * np.array(class_sizes)) < 1 + 1e-9).all()


def test_split_depends_on_the_seed_alone():
  source = sources.Arrays(np.arange(100), np.arange(100) % 4)
  first, again, other = (data.split(source, 0.2, s)[1] for s in (0, 0, 1))
  np.testing.assert_array_equal(first.images, again.images)
  assert (first.images != other.images).any()


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_moments(dtype):
  images = np.random.default_rng(0).uniform(0, 255, (7, 4, 5, 3)).astype(dtype)
  images[..., 2] = 51
  scale = 255 if dtype == np.uint8 else 1
  mean, std = data.moments(images)
  exact = images.astype(np.float64) / scale
  np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-12)
  np.testing.assert_allclose(std[:2], exact.std((0, 1, 2))[:2], rtol=1e-12)
  assert std[2] == 1


def test_normalize_divides_bytes_only():
  mean, std = np.float32([0.5, 0.0]), np.float32([0.25, 1.0])
  image = np.uint8([[255, 51], [0, 0]])
  normalize = jax.jit(data.normalize)
  np.testing.assert_allclose(
    normalize(image, mean, std), [[2, 0.2], [-2, 0]], rtol=1e-6
  )
  floats = image.astype(np.float32)
  np.testing.assert_allclose(
    normalize(floats, mean, std), [[1018, 51], [-2, 0]]
  )
  assert normalize(image, mean, std).dtype == np.float32


def test_steps_per_epoch_wants_a_batch():
  dataset = data.Dataset(make_source(10), *[None] * 6)
  assert data.steps_per_epoch(dataset, make_config(batch_size=10)) == 1
  with pytest.raises(ValueError, match='batch_size = 11 is more than the 10'):
    data.steps_per_epoch(dataset, make_config(batch_size=11))


def test_every_epoch_has_another_order():
  config = make_config(batch_size=3)
  labels = [
    b['label'] for b in take(data.train_batches(make_source(), config), 9)
  ]
  epochs = [np.concatenate(labels[i : i + 3]) for i in (0, 3, 6)]
  for epoch in epochs:
    assert len(set(epoch)) == 9  # The tenth is dropped, a different one.
  assert len({tuple(epoch) for epoch in epochs}) == 3
  assert labels[0].dtype == np.int32


def test_seeds_decide_order_and_augmentation():
  source = make_source()

  def batches(seed):
    config = make_config(seed=seed, augment=('roll:1',))
    return take(data.train_batches(source, config), 4)

  assert_same(batches(1), batches(1))
  for key in 'label', 'image':
    one, two = (np.stack([b[key] for b in batches(s)]) for s in (1, 2))
    assert (one != two).any()


@pytest.mark.parametrize('start_step', [1, 2, 7])
def test_resuming_needs_the_step_alone(start_step):
  config = make_config(augment=('random_crop:1', 'roll:1'))
  source = make_source()
  whole = take(data.train_batches(source, config), 10)
  rest = data.train_batches(source, config, start_step=start_step)
  assert_same(take(rest, 10 - start_step), whole[start_step:])


@pytest.mark.parametrize('num_hosts', [2, 4])
def test_hosts_share_the_batch_of_one(num_hosts):
  config = make_config(augment=('roll:1', 'flip'))
  source = make_source(11)
  whole = take(data.train_batches(source, config), 7)
  parts = [
    take(data.train_batches(source, config, host=host, num_hosts=num_hosts), 7)
    for host in range(num_hosts)
  ]
  for step, batch in enumerate(whole):
    assert len(parts[0][step]['label']) == 4 // num_hosts
    for key in batch:
      joined = np.stack([part[step][key] for part in parts], axis=1)
      np.testing.assert_array_equal(
        joined.reshape(batch[key].shape), batch[key]
      )


def test_augmentation_does_not_depend_on_the_batch_size():
  source = make_source(12)

  def examples(batch_size):
    config = make_config(batch_size=batch_size, augment=('roll:1',))
    batches = take(data.train_batches(source, config), 24 // batch_size)
    return {
      key: np.concatenate([batch[key] for batch in batches])
      for key in batches[0]
    }

  assert_same([examples(4)], [examples(6)])
  # And it changes from epoch to epoch.
  whole = examples(12)
  first, second = (
    whole['image'][part][np.argsort(whole['label'][part])]
    for part in (slice(12), slice(12, None))
  )
  assert (first != second).any(axis=(1, 2, 3)).sum() > 6


@pytest.mark.sample
def test_workers_change_nothing():
  flags.FLAGS.unparse_flags()  # As in a notebook or a script.
  source = on_disk(make_source())

  def both(num_workers):
    config = make_config(
      num_workers=num_workers, augment=('roll:1', 'cutout:1')
    )
    training = take(data.train_batches(source, config, start_step=1), 5)
    (tested,) = data.eval_batches([source], config, batch_size=4)
    return training, list(tested)

  for ours, theirs in zip(both(0), both(2), strict=True):
    assert_same(ours, theirs)


def test_evaluations_share_their_workers():
  small, large = on_disk(make_source(5)), on_disk(make_source(9))
  evaluations = data.eval_batches(
    [small, small, large], make_config(num_workers=2), batch_size=4
  )
  others, processes = multiprocessing.active_children(), []
  for count in 5, 5, 9:
    batches = list(next(evaluations))
    assert len(batches) == -(-count // 4)
    seen = np.concatenate([batch['label'][batch['mask']] for batch in batches])
    np.testing.assert_array_equal(seen, np.arange(count))
    processes.append(set(multiprocessing.active_children()).difference(others))
  assert len(processes[0]) == 2 and processes == processes[:1] * 3


def test_evaluations_from_memory_have_no_workers():
  others = multiprocessing.active_children()
  (batches,) = data.eval_batches(
    [make_source()], make_config(num_workers=2), batch_size=4
  )
  assert len(list(batches)) == 3
  assert multiprocessing.active_children() == others


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 3))
def test_evaluation_covers_every_example_once(count, per_host, num_hosts):
  source = make_source(count)
  hosts = [
    [
      batch
      for batches in data.eval_batches(
        [source],
        make_config(),
        batch_size=per_host * num_hosts,
        host=host,
        num_hosts=num_hosts,
      )
      for batch in batches
    ]
    for host in range(num_hosts)
  ]
  assert len({len(batches) for batches in hosts}) == 1
  batches = list(itertools.chain.from_iterable(hosts))
  assert {len(batch['label']) for batch in batches} == {per_host}
  assert {batch['mask'].dtype for batch in batches} == {np.dtype(bool)}
  seen = np.concatenate([batch['label'][batch['mask']] for batch in batches])
  np.testing.assert_array_equal(np.sort(seen), np.arange(count))
  for batch in batches:
    np.testing.assert_array_equal(
      batch['image'][:, 0, 0, 0], batch['label'] + 1
    )


def test_evaluation_keeps_the_order():
  (batches,) = data.eval_batches([make_source(6)], make_config(), batch_size=4)
  batches = list(batches)
  np.testing.assert_array_equal(batches[0]['label'], [0, 1, 2, 3])
  np.testing.assert_array_equal(batches[1]['label'][:2], [4, 5])
  np.testing.assert_array_equal(batches[1]['mask'], [True, True, False, False])


def test_batches_must_divide_among_hosts():
  source = make_source()
  with pytest.raises(ValueError, match='of 3 hosts, such as 6, got 4'):
    data.train_batches(source, make_config(), num_hosts=3)
  with pytest.raises(ValueError, match='of 1 hosts, such as 1, got 0'):
    data.eval_batches([source], make_config(), batch_size=0)
