"""What an evaluation says of each example, on four devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsatgo_jax import losses
from tests import tiny
from train import criterion, data, evaluate, predictions
from train import step as step_lib


class Written:
  """A network whose logits [T, K] are the image: nothing to compile."""

  def apply(self, variables, images, **_):
    """[B, T, K, 1] to [T, B, K]."""
    return jnp.moveaxis(images[..., 0], 1, 0), {'spiking': {}}


@pytest.mark.parametrize(
  'loss, class_weights', [('cross_entropy', None), ('tet', (0.5, 1, 4))]
)
@jax.enable_x64(True)
def test_an_evaluation_is_averaged_over_all_of_its_examples(
  loss, class_weights, monkeypatch
):
  """The loss as of one batch; examples in their order, padding left out."""
  monkeypatch.setattr(step_lib, 'create_model', lambda *_: Written())
  monkeypatch.setattr(
    data, 'normalize', lambda images, *_: jnp.asarray(images, jnp.float64)
  )
  config = tiny.config(loss=loss, class_weights=class_weights)
  rng = np.random.default_rng(0)
  image, label = rng.normal(0, 2, (24, 2, 3, 1)), rng.integers(0, 3, 24)
  batch = {'image': image, 'label': label, 'mask': np.arange(24) < 21}
  batches = [
    {name: a[i : i + 8] for name, a in batch.items()} for i in (0, 8, 16)
  ]
  facts = {'num_classes': 3, 'mean': [0.0], 'std': [1.0]}
  run_eval = step_lib.create_eval_step(config, facts, each=True)
  found, each = predictions.evaluate(run_eval, {}, iter(batches))
  logits, label = jnp.moveaxis(image[:21, ..., 0], 1, 0), label[:21]
  told = {}
  if class_weights:
    told['class_weights'] = losses.normalized_weights(class_weights, label)
  expected = criterion.of_example(config)(logits, label, **told)
  assert found['loss'] == pytest.approx(np.asarray(expected).mean(), rel=1e-12)
  guessed = np.asarray(logits).mean(0).argmax(-1)
  assert found['accuracy'] == pytest.approx(np.mean(guessed == label))
  assert np.sum(found['confusion'], 1).tolist() == np.bincount(label).tolist()
  assert np.trace(found['confusion']) == np.sum(guessed == label)
  assert found['confusion'][0][1] == np.sum((label == 0) & (guessed == 1))
  assert not {'weight', 'unweighted'} & found.keys()

  np.testing.assert_array_equal(each['label'], label)
  np.testing.assert_array_equal(each['predicted'], guessed)
  np.testing.assert_allclose(each['logits'], logits.mean(0), rtol=1e-12)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / 'test.npz'
  predictions.write(path, {'label': np.arange(3)})
  assert np.load(path)['label'].tolist() == [0, 1, 2]

  def full(file, **_):
    file.write(b'half')
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(np, 'savez', full)
  with pytest.raises(OSError, match='No space'):
    predictions.write(path, {'label': np.arange(4)})
  assert np.load(path)['label'].tolist() == [0, 1, 2]
  assert [found.name for found in tmp_path.iterdir()] == ['test.npz']


def test_a_file_that_can_not_be_written_is_an_error_before_the_evaluation(
  tmp_path,
):
  predictions.check(tmp_path / 'test.npz')
  (tmp_path / 'folder.npz').mkdir()
  for name in 'test.txt', 'nowhere/test.npz', 'folder.npz':
    with pytest.raises(ValueError, match=f'an .npz file in .*, got .*{name}'):
      evaluate.evaluate(tmp_path, predictions=tmp_path / name)
