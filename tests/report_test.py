"""The report: every figure drawn, and one page that needs nothing else."""

import base64
import json
import re

import numpy as np
import pytest

from train import metrics, report


def layers_of(names, num_steps, rng):
  return {
    name: {
      key: rng.uniform(0.1, 0.9, num_steps).tolist()
      for key in ('firing_rate', 'gradient_share', 'theta', 'width')
    }
    for name in names
  }


@pytest.fixture
def workdir(tmp_path):
  """A run of three epochs of a network of twelve layers, T = 5."""
  rng = np.random.default_rng(0)
  names = [f'block{i}/conv' for i in range(12)]
  with metrics.writer(tmp_path, 0) as write:
    for epoch in range(1, 4):
      write({'step': 10 * epoch - 5, 'epoch': epoch - 0.5, 'loss': 1.0})
      write(
        {
          'step': 10 * epoch,
          'epoch': float(epoch),
          'train_loss': 1 / epoch,
          'train_accuracy': 1 - 1 / epoch,
          'validation_loss': 1.1 / epoch,
          'validation_accuracy': 0.5,
          'layers': layers_of(names, 5, rng),
        }
      )
  metrics.write_json(
    tmp_path / 'config.json',
    {'method': '<at>', 'model': 'Net', 'dataset': 'npz', 'seed': 12345},
  )
  metrics.write_json(
    tmp_path / 'result.json',
    {
      'step': 30,
      'num_examples': 80,
      'accuracy': 0.6125,
      'loss': 0.7,
      'best': {'step': 20, 'accuracy': 0.55},
      'selected_on': 'validation',
      'layers': layers_of(names, 5, rng),
    },
  )
  return tmp_path


def test_the_page_holds_the_plots_and_the_result(workdir):
  path = report.write(workdir)
  assert path == workdir / 'report.html'
  page = path.read_text()
  names = [name for name, *_ in report.FIGURES]
  plots = {path.stem: path for path in (workdir / 'plots').glob('*.png')}
  assert set(plots) == set(names)
  images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
  assert len(images) == len(names)
  for name, image in zip(names, images, strict=True):
    content = plots[name].read_bytes()
    assert content.startswith(b'\x89PNG')
    assert base64.b64decode(image) == content
  assert not re.search(r'(src|href)="(?!data:)', page)
  assert 'Test accuracy 61.25%' in page and '12345' in page
  assert '<title>&lt;at&gt;, Net, npz</title>' in page


def test_a_run_that_goes_on_can_be_drawn(workdir):
  (workdir / 'result.json').unlink()
  page = report.write(workdir).read_text()
  assert 'not finished' in page and 'Test accuracy' not in page
  assert len(list((workdir / 'plots').glob('*.png'))) == len(report.FIGURES)


def test_no_epoch_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='at least one epoch in .*, got none'):
    report.write(tmp_path)


def test_the_headline_says_what_was_chosen_on_what():
  result = {'accuracy': 0.5, 'num_examples': 8, 'step': 9, 'best': None}
  assert report.headline(result) == (
    'Test accuracy 50.00% (8 examples; the last checkpoint, step 9).'
  )
  result |= {'best': {'step': 3, 'accuracy': 0.75}, 'selected_on': 'test'}
  text = report.headline(result)
  assert 'step 3, with 75.00%: chosen on the test split' in text
  result['selected_on'] = 'validation'
  text = report.headline(result)
  assert 'validation' in text and 'chosen' not in text


def test_curves_are_the_metrics(workdir):
  epochs = [line for line in metrics.read(workdir) if 'layers' in line]
  result = metrics.read_json(workdir / 'result.json')
  loss, accuracy = report.curves(epochs, result).axes
  lines = {line.get_label(): line for line in accuracy.lines}
  assert set(lines) == {'train', 'validation', 'test, last checkpoint'}
  np.testing.assert_allclose(lines['train'].get_ydata(), [0, 50, 200 / 3])
  np.testing.assert_allclose(lines['validation'].get_ydata(), 50)
  assert lines['test, last checkpoint'].get_ydata().item() == pytest.approx(
    61.25
  )
  assert lines['train'].get_xdata().tolist() == [1, 2, 3]
  np.testing.assert_allclose(loss.lines[0].get_ydata(), [1, 1 / 2, 1 / 3])

  threshold, width, _ = report.over_training(('theta', 'width'), 1)(
    epochs, result
  ).axes
  assert len(threshold.lines) == len(width.lines) == 12
  colours = [line.get_color() for line in threshold.lines]
  assert len({tuple(colour) for colour in colours}) == 12
  np.testing.assert_allclose(
    threshold.lines[3].get_ydata(),
    [np.mean(line['layers']['block3/conv']['theta']) for line in epochs],
  )

  rate = report.activity(epochs, result).axes[0]
  numbers = np.array([float(text.get_text()) for text in rate.texts])
  expected = [layer['firing_rate'] for layer in result['layers'].values()]
  np.testing.assert_allclose(
    numbers.reshape(12, 5), 100 * np.array(expected), atol=0.051
  )
  labels = [label.get_text() for label in rate.get_yticklabels()]
  assert labels == list(result['layers'])


def test_lines_of_later_steps_and_torn_lines_are_dropped(workdir):
  path = workdir / 'metrics.jsonl'
  path.write_text(path.read_text() + '{"step": 3')
  assert [line['step'] for line in metrics.read(workdir)] == [
    5, 10, 15, 20, 25, 30
  ]  # fmt: skip
  with metrics.writer(workdir, 20) as write:
    write({'step': 21, 'loss': 0.5})
  steps = [json.loads(line)['step'] for line in path.read_text().splitlines()]
  assert steps == [5, 10, 15, 20, 21]


def test_scalars_have_names_for_tensorboard():
  line = {'step': 3, 'layers': {'conv0': {'theta': [1.5, 2.5]}}}
  assert list(metrics.scalars(line)) == [
    ('step', 3),
    ('layers/conv0/theta/t1', 1.5),
    ('layers/conv0/theta/t2', 2.5),
  ]
